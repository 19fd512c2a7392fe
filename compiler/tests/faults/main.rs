//! What goes wrong when a policy is put in force, each by a clear error that says what to do, and nothing changed; and
//! changes that go back by themselves.
//!
//! Each test has a host of its own: a network namespace with a pair of devices, and directories for pins and state.
//! Without root the tests say that they are skipped.

mod hooks;
mod host;
mod kept;
mod places;

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use polc_ir::env::Attach;
use polc_ir::hook::Family;
use polc_loader::net;
use polc_loader::state::SlotName;
use polc_loader::sys::{LinkSpec, ProgramType, QueryPoint, Sys};
use polc_tests::kernel;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Signal, kill_process, kill_process_group};

use host::{
    APPLY, APPLY_OTHER, FullDisk, Host, OTHER_RULES, PATIENCE, comes_into_force, has_xdp, in_force, ip, pid,
    programs, theirs,
};

/// Rules of which replace mode can do without none and compile only the first.
const UNCOMPILED: &str = "\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p udp -m udp --dport 53 -j DROP
-A INPUT -p tcp -m limit --limit 5/sec -j ACCEPT
-A INPUT -m state --state NEW -j LOG --log-prefix \"new: \"
COMMIT
";

#[test]
fn devices_that_are_not_there_or_go_away() {
    let Some(host) = Host::new("fault-device") else { return };
    let said = host.says(&["apply", "rules.v4", "--replace", "--dev", "nosuch"], 3);
    assert!(said.contains("[E0803] there is no device `nosuch`") && said.contains("`eth0`"), "{said}");
    assert!(!host.state.exists(), "nothing was kept");
    // A device that vanishes takes the program along; what is kept about it is told, and can be removed.
    for attach in ["xdp", "tc-ingress"] {
        host.says(&["apply", "rules.v4", "--replace", "--attach", attach, "--dev", "eth0"], 0);
        ip("link del eth0");
        let said = host.says(&["apply", "rules.v4", "--replace", "--attach", attach, "--dev", "eth0"], 3);
        assert!(said.contains("there is no device `eth0`"), "{said}");
        host.says(&["status", "--sample", "0"], 0);
        host.says(&["flush"], 0);
        let said = host.says(&["status", "--sample", "0"], 0);
        assert!(!said.contains("program"), "{said}");
        ip("link add eth0 type veth peer name eth1");
        ip("link set eth0 up");
    }
}

#[test]
fn an_mtu_that_the_driver_runs_no_xdp_with() {
    let Some(host) = Host::new("fault-mtu") else { return };
    ip("link set eth1 mtu 9000");
    ip("link set eth0 mtu 9000");
    ip("link set eth1 up");
    let apply = ["apply", "rules.v4", "--replace", "--dev", "eth0"];
    let said = host.says(&apply, 3);
    assert!(said.contains("[E0805]") && said.contains("MTU of 9000"), "{said}");
    assert!(said.contains("ip link set eth0 mtu 1500") && said.contains("--generic"), "{said}");
    assert!(!has_xdp("eth0"));
    let said = host.says(&["status", "--sample", "0"], 0);
    assert!(!said.contains("program"), "{said}");
    // What the hint says does it.
    host.says(&[&apply[..], &["--generic"]].concat(), 0);
    assert!(has_xdp("eth0"));
    host.says(&["flush"], 0);
    assert!(!has_xdp("eth0"));
}

#[test]
fn a_full_disk() {
    let Some(host) = Host::new("fault-disk") else { return };
    let disk = FullDisk::new(host.state.clone());
    let said = host.says(&["apply", "rules.v4", "--replace", "--dev", "eth0"], 3);
    assert!(said.contains("[E0814]") && said.contains("make room"), "{said}");
    assert!(!has_xdp("eth0"), "nothing is in force");
    let pinned = kernel::run("find", &[&host.pins.join(""), "-mindepth", "2", "-type", "f"]).expect("find");
    assert_eq!(pinned, "", "nothing is pinned beside the file system's own files");
    disk.make_room();
    host.says(&["apply", "rules.v4", "--replace", "--dev", "eth0"], 0);
    assert!(has_xdp("eth0"));
    host.says(&["flush"], 0);
}

#[test]
fn what_is_kept_is_damaged() {
    let Some(host) = Host::new("fault-kept") else { return };
    let apply = ["apply", "rules.v4", "--replace", "--dev", "eth0"];
    host.says(&apply, 0);
    let object = host.kept("object.o");
    let whole = fs::read(&object).expect("the object");
    fs::write(&object, &whole[..whole.len() / 2]).expect("written");
    let said = host.says(&["save", "-c"], 3);
    assert!(said.contains("[E0813]") && said.contains("is damaged"), "{said}");
    assert!(has_xdp("eth0"), "what is in force stays");
    fs::write(&object, &whole).expect("written");
    host.says(&["save", "-c"], 0);
    let state = host.kept("state.json");
    let whole = fs::read(&state).expect("the state");
    fs::write(&state, b"{ \"version\": ").expect("written");
    for args in [&["status", "--sample", "0"][..], &apply[..]] {
        let said = host.says(args, 3);
        assert!(said.contains("[E0813]") && said.contains("apply again"), "{said}");
        assert!(has_xdp("eth0"), "what is in force stays");
    }
    fs::write(&state, whole).expect("written");
    host.says(&apply, 0);
    host.says(&["flush"], 0);
    assert!(!has_xdp("eth0"));
    // Damaged or lost, it can be taken away, and what is beside it as well.
    host.says(&apply, 0);
    host.says(&[&apply[..], &["--attach", "tc-ingress"]].concat(), 0);
    for name in ["eth0-xdp-4", "eth0-tc-ingress-4"] {
        let netns = fs::read_dir(&host.state).expect("a folder").next().expect("one").expect("a folder");
        let folder = netns.path().join(name);
        match name {
            "eth0-xdp-4" => fs::write(folder.join("state.json"), b"{").expect("written"),
            _ => fs::remove_dir_all(folder).expect("it is there"),
        }
    }
    host.says(&["flush"], 0);
    assert!(!has_xdp("eth0"));
    assert!(!host.says(&["status", "--sample", "0"], 0).contains("eth0"));
    host.says(&[&apply[..], &["--attach", "tc-ingress"]].concat(), 0);
    host.says(&["flush"], 0);
}

#[test]
fn replace_mode_names_what_it_can_not_compile() {
    let Some(host) = Host::new("fault-replace") else { return };
    host.files.file("uncompiled.v4", UNCOMPILED.as_bytes());
    let apply = ["apply", "uncompiled.v4", "--replace", "--dev", "eth0"];
    let restore = ["restore", "--dev", "eth0"];
    for (args, input, file) in [(&apply[..], "", "uncompiled.v4"), (&restore[..], UNCOMPILED, "<stdin>")] {
        let said = host.says_of(args, input, 1);
        for (line, rule, why) in
            [(6, "--limit 5/sec", "a rate limit"), (7, "--state NEW", "connection state")]
        {
            assert!(said.contains(&format!("{file}:{line}:")), "{said}");
            assert!(said.contains(rule) && said.contains(why), "{said}");
        }
        assert_eq!(said.matches("error[").count(), 2, "{said}");
        assert!(!has_xdp("eth0"), "nothing is in force");
        assert!(!host.state.exists(), "nothing was kept");
    }
    // In accelerate mode the kernel's own rules decide the rest.
    host.says(&["apply", "uncompiled.v4", "--unchecked", "--dev", "eth0"], 0);
    host.says(&["flush"], 0);
}

#[test]
fn replace_mode_names_what_its_place_can_not_enforce() {
    let Some(host) = Host::new("fault-output") else { return };
    let policy = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT DROP [0:0]\nCOMMIT\n";
    let rule =
        "*filter\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p udp --dport 53 -j DROP\nCOMMIT\n";
    for (text, what) in [(policy, "policy DROP"), (rule, "1 rule is in a chain that no packet passes")] {
        host.files.file("output.v4", text.as_bytes());
        let apply = ["apply", "output.v4", "--replace", "--dev", "eth0"];
        for attach in ["xdp", "tc-ingress"] {
            let said = host.says(&[&apply[..], &["--attach", attach]].concat(), 1);
            assert!(said.contains("error[E0302]") && said.contains(what), "{said}");
            assert!(
                said.contains("--> output.v4:4:") && said.contains("--hook input --hook forward"),
                "{said}"
            );
            assert!(host.says(&["status", "--sample", "0"], 0).contains("nothing is applied"));
        }
        host.says_of(&["restore", "--dev", "eth0"], text, 1);
        // Who names the hooks is told.
        let hooks = ["--hook", "input", "--hook", "forward"];
        let said = host.says(&[&apply[..], &hooks].concat(), 0);
        assert!(said.contains("note[N0302]") && said.contains(what), "{said}");
        host.says_of(&[&["restore", "--dev", "eth0"], &hooks[..]].concat(), text, 0);
        host.says(&["flush"], 0);
        let said = host.says(&[&apply[..3], &["--attach", "netfilter"]].concat(), 0);
        assert!(said.contains("netfilter output for IPv4") && !said.contains("0302"), "{said}");
        host.says(&["flush"], 0);
    }
}

#[test]
fn a_policy_is_not_lost_to_an_empty_file() {
    let Some(host) = Host::new("fault-empty") else { return };
    host.files.file("empty.v4", b"");
    host.says(&APPLY, 0);
    let said = host.says(&["apply", "empty.v4", "--replace", "--dev", "eth0"], 2);
    assert!(said.contains("`empty.v4` has no table, so nothing is applied"), "{said}");
    host.says(&["restore", "--dev", "eth0"], 2);
    assert_eq!(in_force(&host), Some(53));
    host.says(&["flush"], 0);
}

#[test]
fn a_name_that_another_device_has_now_is_refused() {
    let Some(host) = Host::new("fault-renamed") else { return };
    host.says(&APPLY, 0);
    let before = programs("eth0");
    ip("link set eth0 down");
    ip("link set eth0 name old0");
    ip("link add eth0 type veth peer name eth2");
    let said = host.says(&APPLY, 3);
    assert!(said.contains("[E0830]") && said.contains("polc flush"), "{said}");
    assert_eq!((programs("old0"), programs("eth0")), (before, Vec::new()));
    host.says(&["flush"], 0);
    host.says(&APPLY, 0);
    assert_eq!((programs("old0").len(), programs("eth0").len()), (0, 1));
    host.says(&["flush"], 0);
    // Under its new name a device has the policy that it got under the old one.
    let at = |dev, attach| ["apply", "rules.v4", "--replace", "--dev", dev, "--attach", attach];
    for attach in ["xdp", "tc-ingress"] {
        host.says(&at("eth0", attach), 0);
        ip("link set eth0 down");
        ip("link set eth0 name new0");
        let said = host.says(&at("new0", attach), 3);
        assert!(said.contains("[E0837]") && said.contains("`polc flush --dev new0`"), "{said}");
        assert!(host.says(&["flush", "--dev", "new0"], 0).contains("removed at"));
        host.says(&at("new0", attach), 0);
        host.says(&["flush"], 0);
        ip("link set new0 name eth0");
    }
}

#[test]
fn unconfirmed_changes_go_back() {
    let Some(host) = Host::new("fault-confirm") else { return };
    host.files.file("other.v4", OTHER_RULES.as_bytes());
    // Where nothing was before, nothing is afterwards.
    let said = host.says(&[&APPLY_OTHER[..], &["--confirm", "2"]].concat(), 0);
    assert!(said.contains("it goes back by itself unless `polc confirm` follows"), "{said}");
    assert_eq!(in_force(&host), Some(54));
    comes_into_force(&host, None);
    host.does_when_free(&APPLY);
    // Until then nothing else is applied.
    host.says(&[&APPLY_OTHER[..], &["--confirm", "2"]].concat(), 0);
    let said = host.says(&APPLY, 3);
    assert!(said.contains("[E0822]") && said.contains("`polc confirm` keeps it"), "{said}");
    comes_into_force(&host, Some(53));
    // Who confirms too late hears of it.
    assert!(host.says(&["confirm"], 1).contains("nothing to confirm"));
    // What is confirmed stays.
    host.says(&[&APPLY_OTHER[..], &["--confirm", "2"]].concat(), 0);
    assert!(host.says(&["confirm"], 0).contains("kept at xdp of `eth0`"));
    std::thread::sleep(Duration::from_millis(2_700));
    assert_eq!(in_force(&host), Some(54));
    host.says(&["flush"], 0);
}

#[test]
fn changes_go_back_when_polc_is_killed_or_hung_up_on() {
    let Some(host) = Host::new("fault-hangup") else { return };
    host.files.file("other.v4", OTHER_RULES.as_bytes());
    host.says(&APPLY, 0);
    let apply = [&APPLY_OTHER[..], &["--confirm", "3"]].concat();
    // Killed as soon as the other policy is in force, whatever there is left to do.
    let before = programs("eth0");
    let mut child = host.command(&apply).spawn().expect("polc runs");
    let began = Instant::now();
    while programs("eth0") == before {
        assert!(began.elapsed() < PATIENCE, "it is not applied");
    }
    _ = kill_process(pid(&child), Signal::KILL);
    child.wait().expect("it was started");
    assert_eq!(in_force(&host), Some(54));
    comes_into_force(&host, Some(53));
    // The session that it was applied from hangs up: every process of it is told.
    // Who took the first change back may have the lock for a moment more.
    let script = "for i in 1 2 3 4 5; do \"$@\" && exec sleep 60; sleep 1; done";
    let polc = host.command(&apply);
    // Under nohup signals to hang up are ignored, here and in all that is started here.
    let mut session = Command::new("env");
    session.args(["--default-signal=HUP", "sh", "-c", script, "sh"]);
    session.arg(polc.get_program()).args(polc.get_args());
    session.current_dir(host.files.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut session = session.process_group(0).spawn().expect("a shell");
    comes_into_force(&host, Some(54));
    kill_process_group(pid(&session), Signal::HUP).expect("it sleeps");
    session.wait().expect("it was started");
    assert_eq!(in_force(&host), Some(54));
    comes_into_force(&host, Some(53));
    host.does_when_free(&["flush"]);
}

#[test]
fn two_polcs_do_not_get_into_each_others_way() {
    let Some(host) = Host::new("fault-two") else { return };
    host.files.file("other.v4", OTHER_RULES.as_bytes());
    host.says(&APPLY, 0);
    // While one is at work, the other changes nothing.
    let slot = SlotName { device: Some("eth0".into()), attach: Attach::Xdp, hook: None, family: Family::V4 };
    let lock = fs::File::open(host.slot(&slot).pins()).expect("it is there");
    flock(&lock, FlockOperation::LockExclusive).expect("nobody is at work");
    for args in [&APPLY_OTHER[..], &["flush"]] {
        let said = host.says(args, 3);
        assert!(said.contains("[E0815] another polc is at work"), "{said}");
        assert!(said.contains("wait for the other polc to end"), "{said}");
    }
    assert_eq!(in_force(&host), Some(53));
    drop(lock);
    // Of many at once each applies its rules or says that another is at work, and one program is left.
    let commands = [APPLY, APPLY_OTHER].iter().cycle().take(8);
    let children: Vec<Child> = commands.map(|args| host.command(args).spawn().expect("polc runs")).collect();
    let mut applied = 0;
    for child in children {
        let output = child.wait_with_output().expect("polc ends");
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => applied += 1,
            Some(3) => assert!(said.contains("[E0815]"), "{said}"),
            code => panic!("{code:?}: {said}"),
        }
    }
    assert!(applied > 0, "one of them is the first");
    assert_eq!(programs("eth0").len(), 1);
    assert!(in_force(&host).is_some());
    host.says(&["flush"], 0);
    assert_eq!(in_force(&host), None);
}

#[test]
fn what_others_attached_is_named_and_stays() {
    let Some(host) = Host::new("fault-others") else { return };
    if !kernel::has_tools("what_others_attached_is_named_and_stays", &["tc"]) {
        return;
    }
    let sys = Sys::new();
    let devices = net::devices(&sys).expect("a list");
    let ifindex = net::find(&devices, "eth0").expect("it was made").ifindex;
    // XDP has room for one.
    let program = theirs(ProgramType::XDP, 2);
    sys.obj_pin(&program, Path::new(&host.pins.join("theirs"))).expect("pinned");
    ip(&format!("link set dev eth0 xdp pinned {}", host.pins.join("theirs")));
    let before = (ip("-d link show eth0"), programs("eth0"));
    for more in [&[][..], &["--generic"]] {
        let said = host.says(&[&APPLY[..], more].concat(), 3);
        let named = format!("[E0807] xdp of `eth0` is taken by program `theirs` (id {})", before.1[0]);
        assert!(said.contains(&named) && said.contains("detach it first"), "{said}");
    }
    assert_eq!((ip("-d link show eth0"), programs("eth0")), before);
    host.says(&["flush"], 0);
    assert_eq!((ip("-d link show eth0"), programs("eth0")), before);
    ip("link set dev eth0 xdp off");
    // At tcx and in lists of filters there is room beside it.
    let program = theirs(ProgramType::SCHED_CLS, 0xffff_ffff);
    sys.obj_pin(&program, Path::new(&host.pins.join("theirs-tc"))).expect("pinned");
    let tc = |args: &str| kernel::run("tc", &args.split(' ').collect::<Vec<_>>()).expect("tc");
    tc("qdisc add dev eth0 clsact");
    tc(&format!("filter add dev eth0 ingress bpf da pinned {}", host.pins.join("theirs-tc")));
    let _link = sys.link_create(&program, &LinkSpec::Tcx { ifindex, egress: false, first: true });
    let shown = || {
        let attached = sys.prog_query(ifindex, QueryPoint::TcxIngress).expect("asked");
        (tc("filter show dev eth0 ingress"), tc("qdisc show dev eth0"), attached)
    };
    let before = shown();
    let apply = ["apply", "rules.v4", "--replace", "--dev", "eth0", "--attach", "tc-ingress"];
    let said = host.says(&apply, 3);
    assert!(said.contains("[E0807] tc-ingress of `eth0` is taken by program `theirs`"), "{said}");
    assert!(said.contains("--order first or --order last puts polc's program beside it"), "{said}");
    assert_eq!(shown(), before);
    for (more, place) in [(&["--order", "first"][..], 0), (&["--order", "last"], 1)] {
        host.says(&[&apply[..], more].concat(), 0);
        let attached = shown().2;
        assert_eq!((attached.len(), attached[1 - place]), (2, before.2[0]), "{more:?}");
        host.says(&["flush"], 0);
        assert_eq!(shown(), before);
    }
    host.says(&[&apply[..], &["--clsact"]].concat(), 0);
    assert!(shown().0.contains("theirs-tc"));
    host.says(&["flush"], 0);
    assert_eq!(shown(), before);
}
