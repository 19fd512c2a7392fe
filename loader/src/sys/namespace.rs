//! Network namespaces of a thread, and frames that come in by a device.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use super::{Sys, checked};

/// `BPF_F_TEST_XDP_LIVE_FRAMES` (include/uapi/linux/bpf.h).
const TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;
const PROG_TEST_RUN: i32 = 10;
/// Bytes of `struct xdp_md`, the context of an XDP program.
const XDP_CONTEXT_BYTES: usize = 24;

/// A network namespace.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

/// Frames for an XDP program that run on into the network stack.
#[derive(Clone, Copy, Debug)]
pub struct LiveFrames<'a> {
    /// The device that the frames come in by.
    pub ifindex: u32,
    /// What a frame holds before the program runs.
    pub template: &'a [u8],
    /// How many.
    pub count: u32,
    /// How many of them pass one step of the stack before the first of them takes the next, at most 256.
    pub batch: u32,
}

/// The fields of `union bpf_attr` for `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestRunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

impl Sys {
    /// The network namespace of the calling thread.
    pub fn net_namespace(&self) -> io::Result<Namespace> {
        self.enter("net_namespace")?;
        Ok(Namespace(File::open("/proc/thread-self/ns/net")?.into()))
    }

    /// Moves the calling thread into a new, empty network namespace, which goes away when nothing is in it any more.
    pub fn unshare_net(&self) -> io::Result<()> {
        self.enter("unshare_net")?;
        // SAFETY: the call touches no memory, and the network namespace is no part of what threads have to share.
        checked(unsafe { libc::unshare(libc::CLONE_NEWNET) }.into()).map(|_| ())
    }

    /// Moves the calling thread into a network namespace.
    pub fn set_net_namespace(&self, namespace: &Namespace) -> io::Result<()> {
        self.enter("set_net_namespace")?;
        // SAFETY: the call touches no memory, and the descriptor is open.
        checked(unsafe { libc::setns(namespace.0.as_raw_fd(), libc::CLONE_NEWNET) }.into()).map(|_| ())
    }

    /// Runs an XDP program on frames; those it passes go on into the stack as if the device had received them. When
    /// the call returns, all have gone as far as they go.
    pub fn run_live_frames(&self, program: impl AsFd, frames: &LiveFrames<'_>) -> io::Result<()> {
        self.enter("run_live_frames")?;
        let len = frames.template.len() as u32;
        let mut context = [0u8; XDP_CONTEXT_BYTES];
        context[4..8].copy_from_slice(&len.to_ne_bytes());
        context[12..16].copy_from_slice(&frames.ifindex.to_ne_bytes());
        let mut attr = TestRunAttr {
            prog_fd: program.as_fd().as_raw_fd() as u32,
            data_size_in: len,
            data_in: frames.template.as_ptr() as u64,
            repeat: frames.count,
            ctx_size_in: XDP_CONTEXT_BYTES as u32,
            ctx_in: context.as_ptr() as u64,
            flags: TEST_XDP_LIVE_FRAMES,
            batch_size: frames.batch,
            ..TestRunAttr::default()
        };
        let (attr, bytes) = (std::ptr::from_mut(&mut attr), size_of::<TestRunAttr>());
        // SAFETY: template and context live and are as long as said; nothing but `attr` is written.
        checked(unsafe { libc::syscall(libc::SYS_bpf, PROG_TEST_RUN, attr, bytes) }).map(|_| ())
    }
}
