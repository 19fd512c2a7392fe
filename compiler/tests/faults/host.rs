//! A host that policies are put in force on: a network namespace with a pair of devices, and directories for pins and
//! state.

use std::fs;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use polc_loader::net;
use polc_loader::state::SlotName;
use polc_loader::store::{Slot, Store};
use polc_loader::sys::{ProgramSpec, ProgramType, Sys};
use polc_tests::kernel::{self, BpfFs, Namespace, TempDir};
use rustix::process::Pid;

pub(crate) const RULES: &str = "\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p udp -m udp --dport 53 -j DROP
COMMIT
";

/// Another policy.
pub(crate) const OTHER_RULES: &str = "\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p udp -m udp --dport 54 -j DROP
COMMIT
";

pub(crate) const APPLY: [&str; 5] = ["apply", "rules.v4", "--replace", "--dev", "eth0"];
pub(crate) const APPLY_OTHER: [&str; 5] = ["apply", "other.v4", "--replace", "--dev", "eth0"];

/// Longest wait for what comes in moments.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A host with a pair of devices, and where its polc keeps things.
pub(crate) struct Host {
    pub(crate) files: TempDir,
    pub(crate) pins: BpfFs,
    pub(crate) state: PathBuf,
    _namespace: Namespace,
}

impl Host {
    /// Moves the calling thread into the host; `None` if the test can't run.
    pub(crate) fn new(name: &str) -> Option<Host> {
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

    /// polc with its directories.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polc"));
        command.args(args).args(["--bpffs", &self.pins.join(""), "--state"]).arg(&self.state);
        command.current_dir(self.files.path()).stdin(Stdio::piped());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn polc(&self, args: &[&str], input: &str) -> Output {
        let mut child = self.command(args).spawn().expect("polc runs");
        // A command that does not read ends before it is written to.
        let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
        child.wait_with_output().expect("polc ends")
    }

    /// What a command says that ends with `code`.
    pub(crate) fn says(&self, args: &[&str], code: i32) -> String {
        self.says_of(args, "", code)
    }

    pub(crate) fn says_of(&self, args: &[&str], input: &str, code: i32) -> String {
        let output = self.polc(args, input);
        let said =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        said
    }

    /// Does it once nobody else is at work: who takes a change back has the lock for a moment after that is seen.
    pub(crate) fn does_when_free(&self, args: &[&str]) {
        let began = Instant::now();
        let mut output = self.polc(args, "");
        while output.status.code() == Some(3) && began.elapsed() < PATIENCE {
            output = self.polc(args, "");
        }
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The one file of this name that is kept.
    pub(crate) fn kept(&self, name: &str) -> PathBuf {
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

/// What tells the two policies apart: the port in the rules that are in force; `None`: no policy is.
pub(crate) fn in_force(host: &Host) -> Option<u16> {
    let saved = host.polc(&["save"], "");
    let text = String::from_utf8_lossy(&saved.stdout).into_owned();
    match (text.contains("--dport 53 "), text.contains("--dport 54 ")) {
        (true, false) => Some(53),
        (false, true) => Some(54),
        found => {
            assert_eq!(found, (false, false), "{text}");
            assert!(!has_xdp("eth0"));
            None
        }
    }
}

/// Waits for a policy; how long it took.
pub(crate) fn comes_into_force(host: &Host, policy: Option<u16>) -> Duration {
    let began = Instant::now();
    while in_force(host) != policy {
        assert!(began.elapsed() < PATIENCE, "{policy:?} does not come into force");
        std::thread::sleep(Duration::from_millis(20));
    }
    began.elapsed()
}

/// Numbers of the device's XDP programs.
pub(crate) fn programs(device: &str) -> Vec<u32> {
    let devices = net::devices(&Sys::new()).expect("a list");
    net::find(&devices, device).expect("it is there").xdp.clone()
}

pub(crate) fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

pub(crate) fn ip(args: &str) -> String {
    kernel::run("ip", &args.split(' ').collect::<Vec<_>>()).expect("ip")
}

/// Whether an XDP program is attached to a device.
pub(crate) fn has_xdp(device: &str) -> bool {
    ip(&format!("link show {device}")).contains("xdp")
}

/// A file system with no room left.
pub(crate) struct FullDisk(PathBuf);

impl FullDisk {
    pub(crate) fn new(path: PathBuf) -> FullDisk {
        fs::create_dir_all(&path).expect("a folder");
        let target = path.to_str().expect("UTF-8");
        kernel::run("mount", &["-t", "tmpfs", "-o", "size=16k", "tmpfs", target]).expect("a tmpfs");
        let disk = FullDisk(path);
        disk.fill();
        disk
    }

    pub(crate) fn fill(&self) {
        let mut file = fs::File::create(self.0.join("ballast")).expect("a file");
        while file.write_all(&[0; 1 << 10]).is_ok() {}
    }

    pub(crate) fn make_room(&self) {
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

/// A program of somebody else's, which lets everything on.
pub(crate) fn theirs(kind: ProgramType, returns: u64) -> OwnedFd {
    // `r0 = returns; exit`.
    let slots = [returns << 32 | 0xb7, 0x95];
    let spec = ProgramSpec { kind, attach_type: 0, name: "theirs", license: "GPL", slots: &slots, btf: None };
    Sys::new().prog_load(&spec, &mut []).expect("accepted")
}

impl Host {
    /// A slot by its directory's name, in this host's directories.
    pub(crate) fn slot(&self, name: &SlotName) -> Slot {
        Store::new(self.pins.join("").as_ref(), &self.state).expect("a namespace").slot(name)
    }
}
