//! Calls about processes, mounts and CPUs that the standard library has no safe form of.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::{Sys, checked};

/// `BPF_FS_MAGIC` (include/uapi/linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// `MEMBARRIER_CMD_GLOBAL` (include/uapi/linux/membarrier.h).
const MEMBARRIER_CMD_GLOBAL: i32 = 1;

impl Sys {
    /// Whether the process runs as root, as far as its effective user says.
    pub fn is_root(&self) -> bool {
        // SAFETY: the call always succeeds and touches no memory.
        unsafe { libc::geteuid() == 0 }
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
