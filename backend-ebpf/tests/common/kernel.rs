//! What kernel tests need: to know whether they may run, a network namespace and a bpffs of their own, and commands.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whether the test runs as root; if not, says that `name` is skipped.
pub(crate) fn may_run(name: &str) -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0);
    if !root {
        eprintln!("skipped {name}: needs root");
    }
    root
}

/// Whether the programs are installed; if not, says that `name` is skipped.
pub(crate) fn has_tools(name: &str, tools: &[&str]) -> bool {
    tools.iter().all(|tool| {
        let found = Command::new(tool).arg("-V").output().is_ok();
        if !found {
            eprintln!("skipped {name}: needs the program {tool}");
        }
        found
    })
}

/// Runs a command that has to succeed; its standard output and error.
pub(crate) fn run(command: &str, args: &[&str]) -> String {
    let output =
        Command::new(command).args(args).output().unwrap_or_else(|error| panic!("{command}: {error}"));
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command} {}: {text}", args.join(" "));
    text
}

/// A directory that goes away with its contents.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new(name: &str) -> TempDir {
        let path = std::env::temp_dir().join(format!("polc-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary directory");
        TempDir(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn file(&self, name: &str, contents: &[u8]) -> String {
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
pub(crate) struct BpfFs(TempDir);

impl BpfFs {
    pub(crate) fn new(name: &str) -> BpfFs {
        let dir = TempDir::new(name);
        run("mount", &["-t", "bpf", "bpf", dir.path().to_str().expect("UTF-8")]);
        BpfFs(dir)
    }

    pub(crate) fn join(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("UTF-8").to_string()
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// A network namespace with a veth pair, `in0` and `out0`.
pub(crate) struct NetNs(String);

impl NetNs {
    pub(crate) fn new(name: &str) -> NetNs {
        let ns = NetNs(format!("polc-{name}-{}", std::process::id()));
        run("ip", &["netns", "add", &ns.0]);
        ns.run("ip", &["link", "add", "in0", "type", "veth", "peer", "name", "out0"]);
        ns
    }

    /// Runs a command inside. `ip netns exec` would mount another /sys.
    pub(crate) fn run(&self, command: &str, args: &[&str]) -> String {
        let net = format!("--net=/run/netns/{}", self.0);
        let mut all = vec![net.as_str(), command];
        all.extend_from_slice(args);
        run("nsenter", &all)
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}
