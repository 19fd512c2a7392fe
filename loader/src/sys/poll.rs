//! Waiting: for descriptors that can be read, and for the signals that ask a process to end.
//!
//! A command that watches has to undo what it switched on, so it takes the signals as one more thing to wait for
//! (signalfd(2)) and leaves its loop as if it had been told to on a terminal. Loading a program does not take them at
//! all.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _};
use std::time::Duration;

use super::{Sys, checked};

/// Signals that ask to end.
const ENDING: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// The signals that ask the process to end, as something to wait for. Those that come while this lives do nothing else.
#[derive(Debug)]
pub struct Signals(File);

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn ending() -> libc::sigset_t {
    // SAFETY: all zeros is a valid signal set, which `sigemptyset` makes an empty one; the signals are known.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in ENDING {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // What was not read would end the process now.
        let _ = self.0.read(&mut [0; ENDING.len() * size_of::<libc::signalfd_siginfo>()]);
        let set = ending();
        // SAFETY: the set lives; the old one is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) };
    }
}

/// The signals that a thread let through before it let none through, for it to let through again.
struct Held(libc::sigset_t);

impl Held {
    fn new() -> Option<Held> {
        // SAFETY: all zeros is a valid signal set, which `sigfillset` fills; both sets live.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            let failed = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
            (failed == 0).then_some(Held(before))
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: the set lives; the old one is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// Runs what a signal would make the kernel give up (kernel/bpf/verifier.c, `do_check`), with this thread's signals put
/// off until it is done. Also those that nobody asked for: the end of a process that another thread spawned is reported
/// to this one if it comes while that one is still between vfork(2) and letting signals through again, as
/// posix_spawn(3) does.
pub fn without_signals<R>(run: impl FnOnce() -> R) -> R {
    let _held = Held::new();
    run()
}

impl Sys {
    /// Makes the signals that ask to end something to wait for, for this thread and those that it starts.
    pub fn signals(&self) -> io::Result<Signals> {
        self.enter("signalfd")?;
        let set = ending();
        // SAFETY: the set lives; the old one is not asked for.
        let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        // SAFETY: the set lives.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        let fd = checked(fd.into())?;
        // SAFETY: the descriptor is new and nobody else has it.
        Ok(Signals(unsafe { File::from_raw_fd(fd as i32) }))
    }

    /// Waits until one of `files` can be read, or the reader of `output` has gone away, for at most `timeout`; whether
    /// each is so, `output` last.
    pub fn wait_readable(
        &self,
        files: &[BorrowedFd<'_>],
        output: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> io::Result<Vec<bool>> {
        // That nobody reads any more is told without being asked for (poll(2), `POLLERR`).
        self.wait(files, output.map(|output| (output, 0)), Some(timeout))
    }

    /// Waits until `output` takes something, or its reader has gone away, or one of `files` can be read, for at most
    /// `timeout`; whether each of these is so, `output` last.
    pub fn wait_writable(
        &self,
        files: &[BorrowedFd<'_>],
        output: BorrowedFd<'_>,
        timeout: Option<Duration>,
    ) -> io::Result<Vec<bool>> {
        self.wait(files, Some((output, libc::POLLOUT)), timeout)
    }

    fn wait(
        &self,
        files: &[BorrowedFd<'_>],
        output: Option<(BorrowedFd<'_>, i16)>,
        timeout: Option<Duration>,
    ) -> io::Result<Vec<bool>> {
        self.enter("poll")?;
        let millis = timeout.map_or(FOREVER, |time| i32::try_from(time.as_millis()).unwrap_or(i32::MAX));
        let poll = |file: BorrowedFd<'_>, events| libc::pollfd { fd: file.as_raw_fd(), events, revents: 0 };
        let mut polls: Vec<libc::pollfd> = files
            .iter()
            .map(|file| poll(*file, libc::POLLIN))
            .chain(output.map(|(file, events)| poll(file, events)))
            .collect();
        // SAFETY: the structures live and are as many as said.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, millis) };
        match checked(ready.into()) {
            Ok(_) => {}
            // Another signal is no failure.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(vec![false; polls.len()]),
            Err(error) => return Err(error),
        }
        Ok(polls.iter().map(|poll| poll.revents != 0).collect())
    }
}

/// A timeout that poll(2) takes for none.
const FOREVER: i32 = -1;
