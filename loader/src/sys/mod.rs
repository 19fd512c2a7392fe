//! The system calls of the loader: the one place that is `unsafe`, and the one place where a call can be made to fail.
//!
//! Everything the loader asks of the kernel goes through [`Sys`]: `bpf` commands (`bpf`), rtnetlink (`netlink`), the
//! few calls about processes and files that the standard library lacks (`misc`), and the file operations of its state
//! (`files`). Each announces itself to a *hook* before it is made. In production there is none; tests put one there
//! that fails the nth call, or kills the process at it, and so walk through every place where the world may stop.

#![allow(unsafe_code)]

mod bpf;
mod files;
mod mapped;
mod misc;
mod names;
mod namespace;
mod netlink;
mod poll;
mod ring;

use std::fmt;
use std::io;
use std::sync::Arc;

pub use bpf::{
    BtfBlob, LineInfo, LinkInfo, LinkKind, LinkSpec, LiveFrames, Map, MapFlags, MapInfo, MapSpec,
    ProgramCode, ProgramInfo, ProgramSpec, ProgramType, QueryPoint, TestRun, TestRunResult,
};
pub use mapped::MapWords;
pub use names::NameChanges;
pub use namespace::Namespace;
pub use netlink::{Message, NetlinkRequest, NetworkChanges};
pub use poll::{Signals, without_signals};
pub use ring::Ring;

/// Asked before every system call, with its name. An error is returned in place of the call's result.
pub type Hook = dyn Fn(&'static str) -> io::Result<()> + Send + Sync;

/// The way to the kernel.
#[derive(Clone, Default)]
pub struct Sys {
    hook: Option<Arc<Hook>>,
}

impl Sys {
    /// The running kernel.
    pub fn new() -> Sys {
        Sys::default()
    }

    /// The running kernel, with a hook that is asked before every call.
    pub fn with_hook(hook: impl Fn(&'static str) -> io::Result<()> + Send + Sync + 'static) -> Sys {
        Sys { hook: Some(Arc::new(hook)) }
    }

    fn enter(&self, call: &'static str) -> io::Result<()> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(call))
    }
}

impl fmt::Debug for Sys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sys").field("hook", &self.hook.is_some()).finish()
    }
}

/// The result of a call that gives -1 and `errno` on failure.
fn checked(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
