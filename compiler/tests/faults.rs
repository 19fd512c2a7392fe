//! What goes wrong when a policy is put in force, each by a clear error that says what to do, and nothing changed.
//!
//! Each test has a host of its own: a network namespace with a pair of devices, and directories for pins and state.
//! Without root the tests say that they are skipped.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use polc_tests::kernel::{self, BpfFs, Namespace, TempDir};

const RULES: &str = "\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p udp -m udp --dport 53 -j DROP
COMMIT
";

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

/// A host with a pair of devices, and where its polc keeps things.
struct Host {
    files: TempDir,
    pins: BpfFs,
    state: PathBuf,
    _namespace: Namespace,
}

impl Host {
    /// Moves the calling thread into the host; `None` if the test can't run.
    fn new(name: &str) -> Option<Host> {
        if !kernel::may_run(name) || !kernel::has_tools(name, &["ip"]) {
            return None;
        }
        let namespace = Namespace::enter(name);
        ip("link add eth0 type veth peer name eth1");
        ip("link set eth0 up");
        let files = TempDir::new(name);
        files.file("rules.v4", RULES.as_bytes());
        let state = files.path().join("state");
        let pins = BpfFs::new(&format!("{name}-pins"));
        Some(Host { files, pins, state, _namespace: namespace })
    }

    fn polc(&self, args: &[&str], input: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_polc"))
            .args(args)
            .args(["--bpffs", &self.pins.join(""), "--state"])
            .arg(&self.state)
            .current_dir(self.files.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("polc runs");
        // A command that does not read ends before it is written to.
        let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
        child.wait_with_output().expect("polc ends")
    }

    /// What a command says that ends with `code`.
    fn says(&self, args: &[&str], code: i32) -> String {
        self.says_of(args, "", code)
    }

    fn says_of(&self, args: &[&str], input: &str, code: i32) -> String {
        let output = self.polc(args, input);
        let said =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        said
    }

    /// The one file of this name that is kept.
    fn kept(&self, name: &str) -> PathBuf {
        let mut folders = vec![self.state.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.file_name().is_some_and(|own| own == name) {
                    return path;
                }
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        panic!("no {name} is kept");
    }
}

fn ip(args: &str) -> String {
    kernel::run("ip", &args.split(' ').collect::<Vec<_>>()).expect("ip")
}

/// Whether an XDP program is attached to a device.
fn has_xdp(device: &str) -> bool {
    ip(&format!("link show {device}")).contains("xdp")
}

#[test]
fn devices_that_are_not_there_or_go_away() {
    let Some(host) = Host::new("fault-device") else { return };
    let said = host.says(&["apply", "rules.v4", "--replace", "--dev", "nosuch"], 3);
    assert!(said.contains("[E0803] there is no device `nosuch`") && said.contains("`ip link`"), "{said}");
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

/// A file system with no room left.
struct FullDisk(PathBuf);

impl FullDisk {
    fn new(path: PathBuf) -> FullDisk {
        fs::create_dir_all(&path).expect("a folder");
        let target = path.to_str().expect("UTF-8");
        kernel::run("mount", &["-t", "tmpfs", "-o", "size=16k", "tmpfs", target]).expect("a tmpfs");
        let mut file = fs::File::create(path.join("ballast")).expect("a file");
        while file.write_all(&[0; 1 << 10]).is_ok() {}
        FullDisk(path)
    }

    fn make_room(&self) {
        fs::remove_file(self.0.join("ballast")).expect("the ballast");
        let target = self.0.to_str().expect("UTF-8");
        kernel::run("mount", &["-o", "remount,size=4m", target]).expect("more room");
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        _ = Command::new("umount").arg(&self.0).status();
    }
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
        assert!(!said.contains(&format!("{file}:5:")), "{said}");
        assert!(!has_xdp("eth0"), "nothing is in force");
        assert!(!host.state.exists(), "nothing was kept");
    }
    // In accelerate mode the kernel's own rules decide the rest.
    host.says(&["apply", "uncompiled.v4", "--unchecked", "--dev", "eth0"], 0);
    host.says(&["flush"], 0);
}
