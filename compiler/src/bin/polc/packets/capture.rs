//! Packets of pcap and pcapng captures.
//!
//! The rules see Ethernet frames; packets captured without one (raw IP, Linux' cooked form) get a header of polc's own.
//! A packet of which only the first bytes were captured is filled up with zeros to its length, so that rules about its
//! headers decide as they would have. What a capture says of itself (its longest packet, its times) is not held against
//! it: the lengths that count are those beside each packet (draft-ietf-opsawg-pcap, section 5).

use std::io::Cursor;
use std::path::Path;

use pcap_file::DataLink;
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::{Block, PcapNgReader};
use polc_ir::env::Input;

use crate::failure::Failure;
use crate::input;

/// First bytes of a pcapng file: the type of its section header block.
const PCAPNG_MAGIC: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

/// Longest packet that is filled up, in bytes: the longest IP packet and its link header.
const FRAME_BYTES_MAX: usize = 65_535 + 14;

/// What a capture holds.
#[derive(Debug, Default)]
pub(crate) struct Capture {
    /// The packets, as frames.
    pub packets: Vec<Input>,
    /// How many of them were captured in part.
    pub cut: usize,
    /// Why what follows these packets can't be read.
    pub broken: Option<String>,
}

/// Reads a capture. One that ends within a packet, as those of a capture program that was killed do, has the packets
/// before it.
pub(crate) fn read(path: &Path) -> Result<Capture, Failure> {
    let bytes = input::bytes(path)?;
    let mut capture = Capture::default();
    let result = if bytes.starts_with(&PCAPNG_MAGIC) {
        pcapng(&bytes, &mut capture)
    } else {
        pcap(&bytes, &mut capture)
    };
    if let Err(why) = result {
        let count = capture.packets.len();
        let why = format!("`{}`, after {count} packets: {why}", path.display());
        if count == 0 {
            return Err(Failure::Input(why));
        }
        capture.broken = Some(why);
    }
    Ok(capture)
}

fn pcap(bytes: &[u8], capture: &mut Capture) -> Result<(), String> {
    let mut reader =
        PcapReader::new(Cursor::new(bytes)).map_err(|error| format!("not a capture: {error}"))?;
    let link = reader.header().datalink;
    while let Some(packet) = reader.next_raw_packet() {
        let packet = packet.map_err(|error| error.to_string())?;
        capture.add(link, &packet.data, packet.orig_len)?;
    }
    Ok(())
}

fn pcapng(bytes: &[u8], capture: &mut Capture) -> Result<(), String> {
    let mut reader =
        PcapNgReader::new(Cursor::new(bytes)).map_err(|error| format!("not a capture: {error}"))?;
    // The reader lends a block until the next one is asked for, so links are kept here.
    let mut links: Vec<DataLink> = Vec::new();
    while let Some(block) = reader.next_block() {
        let link = |links: &[DataLink], id: u32| {
            links.get(id as usize).copied().ok_or_else(|| format!("interface {id} was not described"))
        };
        match block.map_err(|error| error.to_string())? {
            Block::SectionHeader(_) => links.clear(),
            Block::InterfaceDescription(interface) => links.push(interface.linktype),
            Block::EnhancedPacket(packet) => {
                capture.add(link(&links, packet.interface_id)?, &packet.data, packet.original_len)?;
            }
            Block::Packet(packet) => {
                capture.add(link(&links, packet.interface_id.into())?, &packet.data, packet.original_len)?;
            }
            Block::SimplePacket(packet) => {
                capture.add(link(&links, 0)?, &packet.data, packet.original_len)?
            }
            _ => {}
        }
    }
    Ok(())
}

impl Capture {
    fn add(&mut self, link: DataLink, data: &[u8], original: u32) -> Result<(), String> {
        let mut data = data.to_vec();
        let whole = (original as usize).min(FRAME_BYTES_MAX);
        if data.len() < whole {
            data.resize(whole, 0);
            self.cut += 1;
        }
        let mut packet_type = None;
        let frame = match link {
            DataLink::ETHERNET => data,
            DataLink::RAW | DataLink::IPV4 | DataLink::IPV6 => ethernet(ether_type(&data), &data),
            // tcpdump's list of link types: packet type, ARPHRD type, address length, address, protocol.
            DataLink::LINUX_SLL => {
                let (header, packet) = cooked::<16>(&data)?;
                packet_type = Some(header[1]);
                ethernet(u16::from_be_bytes([header[14], header[15]]), packet)
            }
            // Protocol, reserved, device number, ARPHRD type, packet type, address length, address.
            DataLink::LINUX_SLL2 => {
                let (header, packet) = cooked::<20>(&data)?;
                packet_type = Some(header[10]);
                ethernet(u16::from_be_bytes([header[0], header[1]]), packet)
            }
            other => {
                return Err(format!(
                    "packets of link type {other:?} are not read; known: Ethernet, raw IP, Linux cooked"
                ));
            }
        };
        self.packets.push(Input { frame, packet_type, ..Input::default() });
        Ok(())
    }
}

fn cooked<const HEADER: usize>(data: &[u8]) -> Result<(&[u8; HEADER], &[u8]), String> {
    let message = || format!("a packet of {} bytes, less than a header of Linux' cooked form", data.len());
    data.split_first_chunk().ok_or_else(message)
}

fn ether_type(packet: &[u8]) -> u16 {
    match packet.first().map(|byte| byte >> 4) {
        Some(6) => 0x86dd,
        _ => 0x0800,
    }
}

fn ethernet(ether_type: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    frame.extend(ether_type.to_be_bytes());
    frame.extend(packet);
    frame
}
