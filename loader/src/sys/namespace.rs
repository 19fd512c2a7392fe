//! Network namespaces of a thread.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use super::{Sys, checked};

/// A network namespace.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

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
}
