//! Calls about processes, mounts and CPUs that the standard library has no safe form of.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::{Sys, checked};

/// `BPF_FS_MAGIC` (include/uapi/linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
/// Capabilities by name and number (include/uapi/linux/capability.h): to attach, to load, and to load programs that index
/// their stack by what they compute.
const NEEDED: [(&str, u32); 3] = [("CAP_NET_ADMIN", CAP_NET_ADMIN), ("CAP_BPF", 39), ("CAP_PERFMON", 38)];
/// `MEMBARRIER_CMD_GLOBAL` (include/uapi/linux/membarrier.h).
const MEMBARRIER_CMD_GLOBAL: i32 = 1;

impl Sys {
    /// Names of the capabilities that loading and attaching programs takes and this thread lacks. Before Linux 5.8
    /// `CAP_SYS_ADMIN` stood for those of BPF, and it still does (include/linux/capability.h, `bpf_capable`).
    pub fn missing_capabilities(&self) -> Vec<&'static str> {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
        let has = |bit: u32| effective >> bit & 1 != 0;
        let lacks = |(name, bit): &(&'static str, u32)| {
            (!has(*bit) && (*bit == CAP_NET_ADMIN || !has(CAP_SYS_ADMIN))).then_some(*name)
        };
        NEEDED.iter().filter_map(lacks).collect()
    }

    /// Whether a process that led to this one sees other mounts, so that what this one mounts may end with it (`ip netns
    /// exec`, `unshare`). Processes that can't be asked are passed over.
    pub fn has_own_mounts(&self) -> bool {
        let mounts = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
        let parent = |process: &str| {
            let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
            // The name before it, in parentheses, may hold anything (proc_pid_stat(5)).
            let (_, rest) = stat.rsplit_once(')')?;
            rest.split_whitespace().nth(1).map(str::to_string)
        };
        let own = mounts("self");
        let mut ancestors = std::iter::successors(parent("self"), |process| parent(process));
        ancestors.any(|process| mounts(&process).is_some_and(|mounts| Some(mounts) != own))
    }

    /// Whether a directory is in a bpffs.
    pub fn is_bpffs(&self, path: &Path) -> io::Result<bool> {
        self.enter("statfs")?;
        let path = std::ffi::CString::new(path.as_os_str().as_bytes())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: all zeros is a valid `statfs`.
        let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the path ends in NUL, and `stat` is a structure of the right type.
        checked(unsafe { libc::statfs(path.as_ptr(), &raw mut stat) }.into())?;
        Ok(stat.f_type as i64 == BPF_FS_MAGIC)
    }

    /// Mounts a bpffs on a directory.
    pub fn mount_bpffs(&self, path: &Path) -> io::Result<()> {
        self.enter("mount")?;
        let path = std::ffi::CString::new(path.as_os_str().as_bytes())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: all strings end in NUL; a bpffs takes no data.
        let result =
            unsafe { libc::mount(c"bpf".as_ptr(), path.as_ptr(), c"bpf".as_ptr(), 0, std::ptr::null()) };
        checked(result.into()).map(|_| ())
    }

    /// Milliseconds since boot, suspend included, so that no change of the clock moves a deadline.
    pub fn uptime_ms(&self) -> io::Result<u64> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a structure of the right type.
        checked(unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) }.into())?;
        Ok(time.tv_sec as u64 * 1_000 + time.tv_nsec as u64 / 1_000_000)
    }

    /// Lifts the limit on locked memory, which kernels before 5.11 count maps against.
    pub fn raise_memlock(&self) -> io::Result<()> {
        self.enter("setrlimit")?;
        let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: `limit` is a structure of the right type.
        checked(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) }.into()).map(|_| ())
    }

    /// Leaves the terminal's session, so that nobody who hangs up takes this process along.
    pub fn new_session(&self) -> io::Result<()> {
        // SAFETY: the call touches no memory.
        checked(unsafe { libc::setsid() }.into()).map(|_| ())
    }

    /// Waits until every program run that had begun when this was called has ended: `MEMBARRIER_CMD_GLOBAL` is
    /// `synchronize_rcu` (kernel/sched/membarrier.c), and programs run inside RCU read sections.
    pub fn wait_for_runs(&self) -> io::Result<()> {
        self.enter("membarrier")?;
        // SAFETY: the call touches no memory.
        checked(unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) }).map(|_| ())
    }

    /// Nanoseconds since boot, suspend excluded: what `bpf_ktime_get_ns` gives programs.
    pub fn monotonic_ns(&self) -> u64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a structure of the right type. The call fails for unknown clocks only.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    }

    /// How many CPUs there may be: per-CPU maps have a value for each.
    pub fn possible_cpus(&self) -> io::Result<usize> {
        let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
        // `0-3`, `0,2-5`: the highest number counts, since values are kept up to it.
        let last = text.trim().rsplit([',', '-']).next().and_then(|number| number.parse::<usize>().ok());
        last.map(|last| last + 1).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }
}
