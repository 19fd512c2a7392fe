//! What tests on a real kernel need: to know whether they may run, commands, a bpffs, a network namespace of their own.
//!
//! A thread that enters a [`Namespace`] stays in it, and so do the commands and sockets it makes; `ip netns exec` would
//! mount another `/sys` for each command, without the bpffs. Everything made here goes away when it is dropped.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use aya::programs::ProgramError;
use polc_loader::sys::without_signals;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Whether the test runs as root; if not, says that `name` is skipped.
pub fn may_run(name: &str) -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0);
    if !root {
        eprintln!("skipped {name}: needs root");
    }
    root
}

/// Whether the programs are installed; if not, says that `name` is skipped.
pub fn has_tools(name: &str, tools: &[&str]) -> bool {
    tools.iter().all(|tool| {
        let found = Command::new(tool).arg("-V").output().is_ok();
        if !found {
            eprintln!("skipped {name}: needs the program {tool}");
        }
        found
    })
}

/// Runs a command on a text; whether it succeeded, and its standard error.
///
/// # Panics
/// If it can't be run.
pub fn feed(command: &str, args: &[&str], text: &str) -> (bool, String) {
    let mut child = Command::new(command)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command}: {error}"));
    // What it refuses it need not read to the end.
    _ = child.stdin.take().expect("it is piped").write_all(text.as_bytes());
    let output = child.wait_with_output().unwrap_or_else(|error| panic!("{command}: {error}"));
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Runs a command; its standard output and error together.
///
/// # Errors
/// The command and what it said, if it can't be run or fails.
pub fn run(command: &str, args: &[&str]) -> Result<String, String> {
    let line = || format!("{command} {}", args.join(" "));
    let output = Command::new(command).args(args).output().map_err(|error| format!("{}: {error}", line()))?;
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(text) } else { Err(format!("{}: {text}", line())) }
}

/// How often a program is offered to the kernel while it says that it was interrupted, and how long between.
const LOADS_MAX: usize = 50;
const LOAD_PAUSE: Duration = Duration::from_millis(10);

/// Loads a program with aya as polc's loader does: without signals, of which the ends of processes that other threads
/// spawn are some ([`without_signals`]), and again if it was interrupted all the same.
///
/// # Errors
/// Why the kernel refuses the program.
pub fn load(mut offer: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    let interrupted = |result: &Result<(), ProgramError>| {
        matches!(result, Err(ProgramError::LoadError { io_error, .. })
            if io_error.kind() == io::ErrorKind::WouldBlock)
    };
    without_signals(|| {
        let mut result = offer();
        for _ in 1..LOADS_MAX {
            if !interrupted(&result) {
                break;
            }
            thread::sleep(LOAD_PAUSE);
            result = offer();
        }
        result
    })
}

/// Makes a call until no signal interrupts it. A socket with a time-out is interrupted by a child's end that another
/// thread, which starts a process, can't be told of (socket(7); posix_spawn lets no signals through meanwhile).
///
/// # Errors
/// Those of the call.
pub fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The packet type of a test packet (`BPF_PROG_TEST_RUN` of tc programs): it is received on the loopback device, whose
/// own and broadcast addresses are both zero (net/ethernet/eth.c, `eth_type_trans`).
pub fn loopback_type(frame: &[u8]) -> u8 {
    match frame {
        [0, 0, 0, 0, 0, 0, ..] => 0,
        [first, ..] if first & 1 == 1 => 2,
        _ => 3,
    }
}

/// A directory that goes away with its contents.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// Makes a directory whose name contains `name` and the process number.
    ///
    /// # Panics
    /// If it can't be made.
    pub fn new(name: &str) -> TempDir {
        let path = std::env::temp_dir().join(format!("polc-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary directory");
        TempDir(path)
    }

    /// The same in memory: what is written there is never waited for.
    ///
    /// # Panics
    /// If it can't be made.
    pub fn in_memory(name: &str) -> TempDir {
        let path = Path::new("/dev/shm").join(format!("polc-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory in memory");
        TempDir(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file; its path.
    ///
    /// # Panics
    /// If it can't be written.
    pub fn file(&self, name: &str, contents: &[u8]) -> String {
        let path = self.0.join(name);
        fs::write(&path, contents).expect("a temporary file");
        path.to_str().expect("UTF-8").to_string()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        _ = fs::remove_dir_all(&self.0);
    }
}

/// A bpffs mounted in a directory of its own.
#[derive(Debug)]
pub struct BpfFs(TempDir);

impl BpfFs {
    /// Mounts one.
    ///
    /// # Panics
    /// If the mount fails.
    pub fn new(name: &str) -> BpfFs {
        let dir = TempDir::new(name);
        run("mount", &["-t", "bpf", "bpf", dir.path().to_str().expect("UTF-8")]).expect("a bpffs");
        BpfFs(dir)
    }

    /// The path of `name` in it.
    pub fn join(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("UTF-8").to_string()
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// A network namespace.
#[derive(Debug)]
pub struct Namespace(String);

impl Namespace {
    /// Makes a namespace and moves the calling thread into it, for good.
    ///
    /// # Panics
    /// If that fails.
    pub fn enter(name: &str) -> Namespace {
        let namespace = Namespace(format!("polc-{name}-{}", std::process::id()));
        run("ip", &["netns", "add", &namespace.0]).expect("a namespace");
        let file = File::open(format!("/run/netns/{}", namespace.0)).expect("the namespace's file");
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).expect("root may");
        namespace
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Its devices go when the last thread in it has left.
        _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// A network namespace with a veth pair, `in0` and `out0`, that nobody enters.
#[derive(Debug)]
pub struct VethPair(String);

impl VethPair {
    /// Makes it.
    ///
    /// # Panics
    /// If that fails.
    pub fn new(name: &str) -> VethPair {
        let namespace = VethPair(format!("polc-{name}-{}", std::process::id()));
        run("ip", &["netns", "add", &namespace.0]).expect("a namespace");
        namespace.run("ip", &["link", "add", "in0", "type", "veth", "peer", "name", "out0"]);
        namespace
    }

    /// Runs a command inside; its standard output and error. `ip netns exec` would mount another /sys.
    ///
    /// # Panics
    /// If it fails.
    pub fn run(&self, command: &str, args: &[&str]) -> String {
        let net = format!("--net=/run/netns/{}", self.0);
        let mut all = vec![net.as_str(), command];
        all.extend_from_slice(args);
        run("nsenter", &all).expect("it runs")
    }
}

impl Drop for VethPair {
    fn drop(&mut self) {
        _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}
