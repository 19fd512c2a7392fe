//! The frames that are measured with: Ethernet, an IP header without options, and 26 bytes behind it.
//!
//! Only what [`record`] holds differs from frame to frame. 26 bytes are a TCP header and a little more, so that no rule
//! finds a header cut short.

use polc_ir::hook::Family;

use crate::rules::Header;

/// Offset of the network header.
pub(crate) const L3: usize = 14;

/// Length of the frames that [`Form::Frames`] is of.
pub(crate) const FRAME: usize = 96;

/// What differs from packet to packet in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Form {
    /// The fields of [`record`].
    Fields(Family),
    /// Everything: frames of [`FRAME`] bytes.
    Frames,
}

impl Form {
    /// Bytes of a packet in a pool.
    pub(crate) const fn record(self) -> usize {
        match self {
            Form::Fields(family) => layout(family).record,
            Form::Frames => FRAME,
        }
    }
}

/// Where an IPv4 packet's record holds the header's checksum.
pub(crate) const CHECKSUM: usize = 14;

/// Where a family's headers are in a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Length of the frame, bytes.
    pub(crate) frame: usize,
    /// Source address; the destination follows it.
    pub(crate) src: usize,
    /// Bytes of an address.
    pub(crate) address: usize,
    /// The protocol's byte.
    pub(crate) proto: usize,
    /// The transport header.
    pub(crate) l4: usize,
    /// Bytes of a packet's record in the pool: both addresses, ports, protocol, zeros, and in IPv4 the checksum.
    pub(crate) record: usize,
}

/// The layout of a family's frames.
pub(crate) const fn layout(family: Family) -> Layout {
    match family {
        Family::V4 => Layout { frame: 60, src: L3 + 12, address: 4, proto: L3 + 9, l4: L3 + 20, record: 16 },
        Family::V6 => Layout { frame: 80, src: L3 + 8, address: 16, proto: L3 + 6, l4: L3 + 40, record: 40 },
    }
}

/// What the driver copies into the frame.
pub(crate) fn record(family: Family, header: &Header) -> Vec<u8> {
    let mut out = fields(family, header);
    if family == Family::V4 {
        out[CHECKSUM..CHECKSUM + 2].copy_from_slice(&frame(family, header)[L3 + 10..L3 + 12]);
    }
    out
}

/// A record without the checksum.
fn fields(family: Family, header: &Header) -> Vec<u8> {
    let layout = layout(family);
    let mut out = Vec::with_capacity(layout.record);
    for address in [header.src, header.dst] {
        out.extend_from_slice(&address.to_be_bytes()[16 - layout.address..]);
    }
    out.extend_from_slice(&header.sport.to_be_bytes());
    out.extend_from_slice(&header.dport.to_be_bytes());
    out.push(header.proto);
    out.resize(layout.record, 0);
    out
}

/// A header's frame.
pub(crate) fn frame(family: Family, header: &Header) -> Vec<u8> {
    let layout = layout(family);
    let mut frame = vec![0; layout.frame];
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 0xb, 2, 0, 0, 0, 0, 0xa]);
    match family {
        Family::V4 => {
            frame[12..14].copy_from_slice(&[0x08, 0x00]);
            frame[L3] = 0x45;
            frame[L3 + 3] = (layout.frame - L3) as u8;
            frame[L3 + 8] = 64;
        }
        Family::V6 => {
            frame[12..14].copy_from_slice(&[0x86, 0xdd]);
            frame[L3] = 0x60;
            frame[L3 + 5] = (layout.frame - L3 - 40) as u8;
            frame[L3 + 7] = 64;
        }
    }
    // TCP: a header of 20 bytes, ACK. Other protocols don't look there.
    frame[layout.l4 + 12] = 0x50;
    frame[layout.l4 + 13] = 0x10;
    let record = fields(family, header);
    let addresses = 2 * layout.address;
    frame[layout.src..layout.src + addresses].copy_from_slice(&record[..addresses]);
    frame[layout.l4..layout.l4 + 4].copy_from_slice(&record[addresses..addresses + 4]);
    frame[layout.proto] = header.proto;
    if family == Family::V4 {
        let sum: u32 =
            frame[L3..L3 + 20].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
        frame[L3 + 10..L3 + 12].copy_from_slice(&checksum.to_be_bytes());
    }
    frame
}
