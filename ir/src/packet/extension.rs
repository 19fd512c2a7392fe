//! IPv6 extension headers, one after the other, as the kernel's `ipv6_find_hdr` walks them.
//!
//! There is no checking beyond what that function does: lengths may lead past the packet's end, and whatever stands
//! after them decides. RFC 8200, section 4, has the headers; net/ipv6/exthdrs_core.c the walk.

/// Protocol numbers of headers and of what ends a chain (include/net/ipv6.h, `NEXTHDR_*`).
pub mod kind {
    /// Hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// Routing.
    pub const ROUTING: u8 = 43;
    /// Fragment.
    pub const FRAGMENT: u8 = 44;
    /// Encapsulating security payload, which hides what follows.
    pub const ESP: u8 = 50;
    /// Authentication.
    pub const AUTHENTICATION: u8 = 51;
    /// Nothing follows.
    pub const NONE: u8 = 59;
    /// Destination options.
    pub const DESTINATION: u8 = 60;
}

/// The headers that another follows (`ipv6_ext_hdr`, without "none").
pub const EXTENSIONS: [u8; 5] =
    [kind::HOP_BY_HOP, kind::ROUTING, kind::FRAGMENT, kind::AUTHENTICATION, kind::DESTINATION];

/// Bytes of a header, from the second byte of it.
pub fn length(of: u8, byte: u8) -> usize {
    match of {
        kind::FRAGMENT => 8,
        kind::AUTHENTICATION => (usize::from(byte) + 2) * 4,
        _ => (usize::from(byte) + 1) * 8,
    }
}

/// What the walk came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walked {
    /// A header, after which the walk goes on.
    Header {
        /// Which, of [`EXTENSIONS`].
        kind: u8,
        /// Where it is in the packet.
        at: usize,
    },
    /// The Fragment header of a later fragment, which ends the walk.
    Later {
        /// The protocol number in it.
        next: u8,
        /// Where what follows it is.
        at: usize,
        /// The fragment's offset in units of 8 bytes, not 0.
        offset: u16,
    },
    /// The end of the chain: a protocol that is none of [`EXTENSIONS`].
    Transport {
        /// The protocol.
        protocol: u8,
        /// Where its header is, or would be.
        at: usize,
    },
    /// A header of which the packet does not have what the walk reads.
    Malformed,
}

/// The walk over a packet's extension headers. It ends with anything but [`Walked::Header`]; what
/// [`ExtensionHeaders::step`] gives after that means nothing.
#[derive(Clone, Copy, Debug)]
pub struct ExtensionHeaders<'a> {
    packet: &'a [u8],
    next: u8,
    at: usize,
}

impl<'a> ExtensionHeaders<'a> {
    /// The headers of a packet, given from its IPv6 header on, which is whole.
    pub fn new(packet: &'a [u8]) -> ExtensionHeaders<'a> {
        ExtensionHeaders { packet, next: packet[6], at: 40 }
    }

    /// The next header.
    pub fn step(&mut self) -> Walked {
        let (kind, at) = (self.next, self.at);
        if !EXTENSIONS.contains(&kind) {
            return Walked::Transport { protocol: kind, at };
        }
        let read = if matches!(kind, kind::ROUTING | kind::FRAGMENT) { 4 } else { 2 };
        let Some(bytes) = self.packet.get(at..at + read) else { return Walked::Malformed };
        self.next = bytes[0];
        self.at = at + length(kind, bytes[1]);
        if kind == kind::FRAGMENT {
            let offset = u16::from_be_bytes([bytes[2], bytes[3]]) >> 3;
            if offset != 0 {
                return Walked::Later { next: self.next, at: self.at, offset };
            }
        }
        Walked::Header { kind, at }
    }

    /// `ipv6_find_hdr` for one header: where the first of this kind is. The walk is at its start.
    ///
    /// # Errors
    /// Whether the walk came to a malformed header before. If not, the packet doesn't have the header.
    pub fn find(mut self, target: u8) -> Result<usize, bool> {
        loop {
            let before = (self.next, self.at);
            match self.step() {
                Walked::Header { kind, at } if kind == target => return Ok(at),
                Walked::Header { .. } => {}
                Walked::Later { .. } if before.0 == target => return Ok(before.1),
                Walked::Later { .. } | Walked::Transport { .. } => return Err(false),
                Walked::Malformed => return Err(true),
            }
        }
    }
}
