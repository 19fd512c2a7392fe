//! The same file loads unchanged through aya, bpftool (libbpf), `ip` and `tc`, and then decides packets.

use aya::maps::{Array, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, TestRunResult, Xdp};
use polc_backend_ebpf::object::ProgramKind;
use polc_tests::kernel::{BpfFs, TempDir, VethPair, has_tools, may_run, run};
use polc_tests::programs::{FRAME_KINDS, actions, looks_up_connections, packet, sample_with_tables};

/// Packets and whether the sample drops them.
const CASES: [(u16, bool); 4] = [(22, true), (80, false), (445, true), (53, false)];

fn kernel_verdict<P>(program: &P, port: u16) -> u32
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let data = packet(port, 7);
    let mut options = TestRunOptions::new();
    options.data_in = Some(&data);
    program.test_run(options).expect("test run").return_value
}

#[test]
fn aya_loads_the_object() {
    if !may_run("aya_loads_the_object") {
        return;
    }
    let bytes = sample_with_tables(&FRAME_KINDS).write().expect("writes");
    let mut ebpf = aya::EbpfLoader::new().load(&bytes).expect("aya parses and makes the maps");
    let xdp: &mut Xdp = ebpf.program_mut("sample_xdp").expect("named").try_into().expect("XDP");
    xdp.load().expect("the verifier accepts the XDP program");
    for (port, dropped) in CASES {
        let actions = actions(ProgramKind::Xdp);
        let expected = if dropped { actions.drop } else { actions.pass };
        assert_eq!(kernel_verdict(xdp, port), expected as u32, "port {port}");
    }
    let tc: &mut SchedClassifier = ebpf.program_mut("sample_tc").expect("named").try_into().expect("tc");
    tc.load().expect("the verifier accepts the tc program");
    for (port, dropped) in CASES {
        let actions = actions(ProgramKind::Classifier);
        let expected = if dropped { actions.drop } else { actions.pass };
        assert_eq!(kernel_verdict(tc, port), expected as u32, "port {port}");
    }

    let counts: PerCpuArray<_, u64> = ebpf.map("counts").expect("named").try_into().expect("per-CPU array");
    let udp: u64 = counts.get(&17, 0).expect("a slot").iter().sum();
    assert_eq!(udp, 2 * CASES.len() as u64);
    let last: Array<_, [u8; 16]> = ebpf.map(".data.last").expect("named").try_into().expect("array");
    assert_eq!(last.get(&0, 0).expect("a value")[8..12], [192, 0, 2, 7]);
    let bss: Array<_, [u8; 1 << 16]> = ebpf.map(".bss").expect("named").try_into().expect("array");
    assert_eq!(bss.get(&0, 0).expect("a value")[8..12], [192, 0, 2, 7]);
    let ports: Array<_, [u8; 16]> = ebpf.map(".rodata.ports").expect("named").try_into().expect("array");
    assert_eq!(ports.get(&0, 0).expect("a value")[..4], [22, 0, 0, 0]);
}

/// Runs a loaded program through bpftool; `which` names it (`id 7`, `pinned PATH`).
fn bpftool_verdict(dir: &TempDir, which: &[&str], port: u16) -> u32 {
    let file = dir.file("packet", &packet(port, 9));
    let mut args = vec!["prog", "run"];
    args.extend_from_slice(which);
    args.extend_from_slice(&["data_in", &file, "repeat", "1"]);
    let text = run("bpftool", &args).expect("it runs");
    let value = text.split("Return value: ").nth(1).and_then(|rest| rest.split([',', ' ', '\n']).next());
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no return value in: {text}"))
}

fn check_with_bpftool(dir: &TempDir, which: &[&str], kind: ProgramKind) {
    for (port, dropped) in CASES {
        let actions = actions(kind);
        let expected = if dropped { actions.drop } else { actions.pass };
        assert_eq!(bpftool_verdict(dir, which, port), expected as u32, "port {port}");
    }
}

#[test]
fn bpftool_loads_the_object_and_shows_the_rules() {
    const NAME: &str = "bpftool_loads_the_object_and_shows_the_rules";
    if !may_run(NAME) || !has_tools(NAME, &["bpftool", "mount"]) {
        return;
    }
    let (dir, fs) = (TempDir::new("bpftool"), BpfFs::new("bpftool-fs"));
    let file = dir.file("x.o", &sample_with_tables(&FRAME_KINDS).write().expect("writes"));
    let pins = fs.join("all");
    let said = run("bpftool", &["prog", "loadall", &file, &pins]).expect("it runs");
    // libbpf remarks on sections it doesn't know, and has nothing to complain about.
    let complaints: Vec<&str> = said.lines().filter(|line| !line.ends_with("polc.manifest")).collect();
    assert_eq!(complaints, [""; 0]);
    for (name, kind) in [("sample_xdp", ProgramKind::Xdp), ("sample_tc", ProgramKind::Classifier)] {
        let pin = format!("{pins}/{name}");
        check_with_bpftool(&dir, &["pinned", &pin], kind);
        let dump = run("bpftool", &["prog", "dump", "xlated", "pinned", &pin, "linum"]).expect("it runs");
        assert!(dump.contains("; -A INPUT -p tcp --dport 22 -j DROP [file:rules.v4 line_num:4"), "{dump}");
    }
}

#[test]
fn ip_loads_the_object() {
    const NAME: &str = "ip_loads_the_object";
    if !may_run(NAME) || !has_tools(NAME, &["bpftool", "ip", "nsenter"]) {
        return;
    }
    let (dir, ns) = (TempDir::new("ip"), VethPair::new("ip"));
    let file = dir.file("x.o", &sample_with_tables(&FRAME_KINDS).write().expect("writes"));
    let said = ns.run("ip", &["link", "set", "dev", "in0", "xdp", "obj", &file, "sec", "xdp"]);
    assert_eq!(said, "", "nothing to complain about");
    let shown = ns.run("ip", &["link", "show", "dev", "in0"]);
    let id = number_after(&shown, "prog/xdp id ");
    check_with_bpftool(&dir, &["id", &id], ProgramKind::Xdp);
}

#[test]
fn tc_loads_the_object() {
    const NAME: &str = "tc_loads_the_object";
    if !may_run(NAME) || !has_tools(NAME, &["bpftool", "ip", "tc", "nsenter"]) {
        return;
    }
    let (dir, ns) = (TempDir::new("tc"), VethPair::new("tc"));
    let file = dir.file("x.o", &sample_with_tables(&FRAME_KINDS).write().expect("writes"));
    ns.run("tc", &["qdisc", "add", "dev", "in0", "clsact"]);
    let filter = ["filter", "add", "dev", "in0", "ingress", "bpf", "da", "obj", &file, "sec", "classifier"];
    assert_eq!(ns.run("tc", &filter), "", "nothing to complain about");
    let shown = ns.run("tc", &["filter", "show", "dev", "in0", "ingress"]);
    let id = number_after(&shown, "direct-action not_in_hw id ");
    check_with_bpftool(&dir, &["id", &id], ProgramKind::Classifier);
}

fn number_after(text: &str, marker: &str) -> String {
    let rest = text.split(marker).nth(1).unwrap_or_else(|| panic!("no `{marker}` in: {text}"));
    rest.chars().take_while(char::is_ascii_digit).collect()
}

#[test]
fn bpftool_resolves_kernel_functions() {
    const NAME: &str = "bpftool_resolves_kernel_functions";
    if !may_run(NAME) || !has_tools(NAME, &["bpftool"]) {
        return;
    }
    let (dir, fs) = (TempDir::new("functions"), BpfFs::new("functions-pins"));
    for kind in FRAME_KINDS {
        let object = dir.file("lookup.o", &looks_up_connections(kind).write().expect("writes"));
        let pin = fs.join(kind.section());
        run("bpftool", &["prog", "load", &object, &pin]).expect("it runs");
        assert_eq!(bpftool_verdict(&dir, &["pinned", &pin], 53), actions(kind).drop as u32);
    }
}
