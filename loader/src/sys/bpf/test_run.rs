//! `BPF_PROG_TEST_RUN`: a loaded program on packets that no device received.

use std::io;
use std::os::fd::AsFd;

use super::{Sys, fd, ptr};

const PROG_TEST_RUN: i32 = 10;
/// `BPF_F_TEST_XDP_LIVE_FRAMES` (include/uapi/linux/bpf.h).
const TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;
/// Bytes of `struct xdp_md`, the context of an XDP program.
const XDP_CONTEXT_BYTES: usize = 24;

/// A packet for `BPF_PROG_TEST_RUN`.
#[derive(Clone, Copy, Debug)]
pub struct TestRun<'a> {
    /// The frame.
    pub frame: &'a [u8],
    /// The context's bytes; empty for the kernel's own.
    pub context: &'a [u8],
    /// How often to run it; 0 and 1 both mean once.
    pub repeat: u32,
}

/// What a test run gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRunResult {
    /// The program's return value.
    pub return_value: u32,
    /// The context's bytes afterwards; none if none were given.
    pub context: Vec<u8>,
    /// Mean time of a run, in nanoseconds.
    pub duration_ns: u32,
}

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
    /// Runs a program on a packet, attached or not.
    pub fn test_run(&self, program: impl AsFd, run: &TestRun<'_>) -> io::Result<TestRunResult> {
        let mut context = vec![0u8; run.context.len()];
        let mut attr = TestRunAttr {
            prog_fd: fd(program),
            data_size_in: run.frame.len() as u32,
            data_in: ptr(run.frame),
            repeat: run.repeat,
            ctx_size_in: run.context.len() as u32,
            ctx_in: ptr(run.context),
            ctx_size_out: context.len() as u32,
            ctx_out: if context.is_empty() { 0 } else { context.as_mut_ptr() as u64 },
            ..TestRunAttr::default()
        };
        // SAFETY: all buffers live and are as long as said, and only `context` is written.
        unsafe { self.bpf("test_run", PROG_TEST_RUN, &mut attr) }?;
        Ok(TestRunResult { return_value: attr.retval, context, duration_ns: attr.duration })
    }

    /// Runs an XDP program on frames; those it passes go on into the stack as if the device had received them. When
    /// the call returns, all have gone as far as they go.
    pub fn run_live_frames(&self, program: impl AsFd, frames: &LiveFrames<'_>) -> io::Result<()> {
        let len = frames.template.len() as u32;
        let mut context = [0u8; XDP_CONTEXT_BYTES];
        context[4..8].copy_from_slice(&len.to_ne_bytes());
        context[12..16].copy_from_slice(&frames.ifindex.to_ne_bytes());
        let mut attr = TestRunAttr {
            prog_fd: fd(program),
            data_size_in: len,
            data_in: ptr(frames.template),
            repeat: frames.count,
            ctx_size_in: XDP_CONTEXT_BYTES as u32,
            ctx_in: ptr(&context),
            flags: TEST_XDP_LIVE_FRAMES,
            batch_size: frames.batch,
            ..TestRunAttr::default()
        };
        // SAFETY: template and context live and are as long as said; nothing but `attr` is written.
        unsafe { self.bpf("run_live_frames", PROG_TEST_RUN, &mut attr) }.map(|_| ())
    }
}
