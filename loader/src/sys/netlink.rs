//! Netlink: one request, its answers; and being told of changes.
//!
//! A socket is opened for each request (rtnetlink(7)); the loader asks a handful of times a command. What messages
//! mean is for `net` and `clsact` to say.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use super::{Sys, checked};

const HEADER_BYTES: usize = 16;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Bytes the kernel may send at once: it fills up to 32 KiB (net/netlink/af_netlink.c, `netlink_dump`).
const RECEIVE_BYTES: usize = 1 << 16;

/// A request.
#[derive(Clone, Debug)]
pub struct NetlinkRequest {
    /// `RTM_*`.
    pub kind: u16,
    /// `NLM_F_*`, beside `NLM_F_REQUEST` and `NLM_F_ACK`.
    pub flags: u16,
    /// What follows the header.
    pub body: Vec<u8>,
}

impl NetlinkRequest {
    /// `NLM_F_DUMP`: all objects.
    pub const DUMP: u16 = 0x300;
    /// `NLM_F_CREATE`: make it if it isn't there.
    pub const CREATE: u16 = 0x400;
    /// `NLM_F_EXCL`: fail if it is there.
    pub const EXCL: u16 = 0x200;
    /// `NLM_F_REPLACE`: put it in place of what is there.
    pub const REPLACE: u16 = 0x100;
    /// `NLM_F_ECHO`: tell what was made.
    pub const ECHO: u16 = 8;
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `RTM_*`.
    pub kind: u16,
    /// What follows the header.
    pub body: Vec<u8>,
}

impl Sys {
    /// Sends a request and gives the answers before the closing one.
    ///
    /// # Errors
    /// What the kernel answers, as `errno`.
    pub fn netlink(&self, request: &NetlinkRequest) -> io::Result<Vec<Message>> {
        self.netlink_of(libc::NETLINK_ROUTE, request)
    }

    /// The same of netfilter (include/uapi/linux/netfilter/nfnetlink.h).
    ///
    /// # Errors
    /// As [`Sys::netlink`].
    pub fn nfnetlink(&self, request: &NetlinkRequest) -> io::Result<Vec<Message>> {
        self.netlink_of(libc::NETLINK_NETFILTER, request)
    }

    /// Opens a socket that can be read when links, addresses or routes change.
    ///
    /// # Errors
    /// What the kernel answers, as `errno`.
    pub fn network_changes(&self) -> io::Result<NetworkChanges> {
        self.enter("netlink")?;
        let socket = netlink_socket(libc::NETLINK_ROUTE, libc::SOCK_NONBLOCK)?;
        // SAFETY: all zeros is a valid address, of which the family and the groups are set.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as u16;
        address.nl_groups = CHANGE_GROUPS;
        // SAFETY: the address lives and is as long as said.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_nl>() as libc::socklen_t,
            )
        };
        checked(bound.into())?;
        Ok(NetworkChanges(File::from(socket)))
    }

    fn netlink_of(&self, protocol: i32, request: &NetlinkRequest) -> io::Result<Vec<Message>> {
        self.enter("netlink")?;
        let socket = netlink_socket(protocol, 0)?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + request.body.len());
        bytes.extend_from_slice(&((HEADER_BYTES + request.body.len()) as u32).to_ne_bytes());
        bytes.extend_from_slice(&request.kind.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | request.flags).to_ne_bytes());
        bytes.extend_from_slice(&1u32.to_ne_bytes());
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&request.body);
        // SAFETY: the buffer lives and is as long as said. An unconnected netlink socket sends to the kernel.
        checked(unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) } as i64)?;

        let mut answers = Vec::new();
        let mut buffer = vec![0u8; RECEIVE_BYTES];
        loop {
            // SAFETY: the buffer lives, exclusively, and is as long as said.
            let received =
                unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            let received = checked(received as i64)? as usize;
            let mut rest = &buffer[..received];
            while let Some((length, kind)) = header(rest) {
                let body = &rest[HEADER_BYTES..length];
                match kind {
                    NLMSG_DONE => return Ok(answers),
                    NLMSG_ERROR => {
                        let code =
                            body.get(..4).and_then(|code| code.try_into().ok()).map_or(0, i32::from_ne_bytes);
                        return if code == 0 {
                            Ok(answers)
                        } else {
                            Err(io::Error::from_raw_os_error(-code))
                        };
                    }
                    kind => answers.push(Message { kind, body: body.to_vec() }),
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

/// Groups of rtnetlink (include/uapi/linux/rtnetlink.h, `RTMGRP_*`): links, addresses and routes of both families.
const CHANGE_GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;

/// What can be read when links, addresses or routes changed.
#[derive(Debug)]
pub struct NetworkChanges(File);

impl NetworkChanges {
    /// Throws away what was told so far. If more was told than the kernel keeps, that is over with too (netlink(7),
    /// `ENOBUFS`): whoever asks looks at everything anyway.
    pub fn forget(&mut self) {
        let mut buffer = vec![0u8; RECEIVE_BYTES];
        loop {
            match self.0.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(0) => return,
                Ok(_) | Err(_) => {}
            }
        }
    }
}

impl AsFd for NetworkChanges {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn netlink_socket(protocol: i32, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call touches no memory.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC | flags, protocol) };
    let fd = checked(fd.into())?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Length and kind of the message that `bytes` starts with, if it is whole.
fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    (length >= HEADER_BYTES && length <= bytes.len()).then_some((length, kind))
}
