//! rtnetlink: one request, its answers.
//!
//! A socket is opened for each request (rtnetlink(7)); the loader asks a handful of times a command. What messages
//! mean is for `net` and `clsact` to say.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

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
        self.enter("netlink")?;
        // SAFETY: the call touches no memory.
        let fd = checked(
            unsafe {
                libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE)
            }
            .into(),
        )?;
        // SAFETY: a new descriptor that nobody else has.
        let socket = unsafe { OwnedFd::from_raw_fd(fd as i32) };
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

/// Length and kind of the message that `bytes` starts with, if it is whole.
fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    (length >= HEADER_BYTES && length <= bytes.len()).then_some((length, kind))
}
