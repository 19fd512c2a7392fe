//! Packets for a rule set that a kernel can be sent, and told apart by.
//!
//! They come from [`Witnesses`] and are changed as little as sending demands: the device that receives them is the
//! host's, and each carries a number in its header (the identification of IPv4, the flow label of IPv6).

use polc_ir::env::{Device, Env, Input};
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::{Family, Hook};
use polc_ir::ruleset::{Ruleset, Write};
use polc_loader::netfilter::{FRAMES_MAX, Frame};

use super::place;
use crate::flatten::flatten;
use crate::witness::Witnesses;

/// Longest frame sent: an Ethernet header, a VLAN tag, and what devices take by default.
const FRAME_BYTES_MAX: usize = 14 + 4 + 1_500;

/// Bytes of an Ethernet header.
const ETHERNET_BYTES: usize = 14;

/// A packet sent through.
#[derive(Clone, Debug)]
pub struct Sample {
    /// As it was sent.
    pub input: Input,
    /// As the kernel takes it.
    pub frame: Frame,
}

/// Packets made for the chains of PREROUTING and `hook`, in batches of at most [`FRAMES_MAX`].
///
/// They come by `inputs`. Frames that are no packets of this family are left out; most others are kept.
pub fn samples(
    ruleset: &Ruleset,
    env: &Env,
    inputs: &[DeviceName],
    hook: Hook,
    packets: usize,
    seed: u64,
) -> Vec<Vec<Sample>> {
    let classifier = flatten(ruleset, &place(&[Hook::Prerouting, hook]), env, &mut Vec::new());
    let devices: Vec<Device> =
        inputs.iter().zip(1..).map(|(&name, ifindex)| Device { ifindex, name }).collect();
    let made = Witnesses::new(&classifier, &devices, seed);
    let mut batches = vec![Vec::new()];
    let mut count = 0;
    for input in made.take(packets.saturating_mul(2)) {
        if count == packets {
            break;
        }
        let batch = batches.last_mut().expect("there is always one");
        let id = batch.len() as u32 + 1;
        let Some(sample) = sample(ruleset.family, inputs, input, id) else { continue };
        batch.push(sample);
        count += 1;
        if id as usize == FRAMES_MAX {
            batches.push(Vec::new());
        }
    }
    batches
}

/// Makes a packet one that can be sent and told apart; `None` if it can't be sent.
fn sample(family: Family, inputs: &[DeviceName], mut input: Input, id: u32) -> Option<Sample> {
    let frame = &mut input.frame;
    if frame.len() < ETHERNET_BYTES || frame.len() > FRAME_BYTES_MAX {
        return None;
    }
    let network = network_offset(family, frame)?;
    // To this host's device, if to any one device.
    if frame[0] & 1 == 0 {
        frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    }
    let told = stamp(family, &mut frame[network..], id);
    let device = inputs.iter().position(|name| Some(*name) == input.in_device).unwrap_or(0);
    input.in_device = Some(inputs[device]);
    input.out_device = None;
    input.mark = 0;
    input.packet_type = None;
    // A tag that was taken out is not in the frame, which is all that is sent.
    input.vlan = None;
    let frame = Frame { bytes: input.frame.clone(), id: if told { id } else { 0 }, device };
    Some(Sample { input, frame })
}

/// The same packets with numbers that differ among them.
pub fn renumbered(family: Family, samples: &[Sample]) -> Vec<Sample> {
    let mut samples = samples.to_vec();
    for (sample, id) in samples.iter_mut().zip(1..).filter(|(sample, _)| sample.frame.id != 0) {
        let frame = &mut sample.frame.bytes;
        if let Some(network) = network_offset(family, frame) {
            stamp(family, &mut frame[network..], id);
            sample.frame.id = id;
            sample.input.frame = frame.clone();
        }
    }
    samples
}

/// Devices that rules name in `field`, and that can be made.
pub fn device_names(ruleset: &Ruleset, field: Field) -> Vec<String> {
    let clauses = ruleset.rules.values().flat_map(|rule| &rule.clauses);
    let tests = clauses.flat_map(|clause| clause.kind.tests());
    let mut names = Vec::new();
    for test in tests.filter(|test| test.field == field) {
        for interval in test.values.intervals() {
            for value in [interval.lo(), interval.hi()] {
                let name = DeviceName::from_value(value).to_string();
                // net/core/dev.c, `dev_valid_name`; and what the namespace has already.
                let valid = name.chars().all(|c| c.is_ascii_graphic() && c != '/' && c != ':' && c != '%');
                let free = !["", ".", "..", "lo", "all", "default"].contains(&name.as_str());
                if DeviceName::new(&name).is_some() && valid && free && !names.contains(&name) {
                    names.push(name);
                }
            }
        }
    }
    names
}

/// Where the network header begins, if the frame is one of this family as far as its types say.
pub(super) fn network_offset(family: Family, frame: &[u8]) -> Option<usize> {
    let mut at = ETHERNET_BYTES;
    loop {
        let kind = u16::from_be_bytes(frame.get(at - 2..at)?.try_into().ok()?);
        match kind {
            0x8100 | 0x88a8 if at < ETHERNET_BYTES + 8 => at += 4,
            _ if kind == family.ether_type() => return (at < frame.len()).then_some(at),
            _ => return None,
        }
    }
}

/// Puts a number into a packet's header and makes the header's checksum right; whether there is room for it.
fn stamp(family: Family, packet: &mut [u8], id: u32) -> bool {
    match family {
        Family::V4 => {
            if packet.len() < 20 {
                return false;
            }
            packet[4..6].copy_from_slice(&(id as u16).to_be_bytes());
            checksum(packet);
        }
        Family::V6 => {
            if packet.len() < 40 {
                return false;
            }
            packet[1] = packet[1] & 0xf0 | (id >> 16 & 15) as u8;
            packet[2..4].copy_from_slice(&(id as u16).to_be_bytes());
        }
    }
    true
}

/// Makes an IPv4 header's checksum right, if it is all there (RFC 1071).
fn checksum(packet: &mut [u8]) {
    let header = usize::from(packet[0] & 15) * 4;
    if header < 20 || header > packet.len() {
        return;
    }
    packet[10..12].fill(0);
    let words =
        packet[..header].chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

/// One hop less, as forwarding leaves it before the rules see it (net/ipv4/ip_forward.c, net/ipv6/ip6_output.c,
/// `ip6_forward`).
pub(super) fn hop(family: Family, frame: &mut [u8]) {
    let Some(network) = network_offset(family, frame) else { return };
    let packet = &mut frame[network..];
    match family {
        Family::V4 => {
            packet[8] = packet[8].wrapping_sub(1);
            checksum(packet);
        }
        Family::V6 => packet[7] = packet[7].wrapping_sub(1),
    }
}

/// Changes the frame's header as rules did.
pub(super) fn rewrite(family: Family, frame: &mut [u8], write: Write) {
    let Some(network) = network_offset(family, frame) else { return };
    let packet = &mut frame[network..];
    match (write.field, family) {
        (Field::Tos, Family::V4) => packet[1] = write.apply(packet[1].into()) as u8,
        (Field::Tos, Family::V6) => {
            let tos = write.apply((packet[0] << 4 | packet[1] >> 4).into()) as u8;
            packet[0] = packet[0] & 0xf0 | tos >> 4;
            packet[1] = packet[1] & 0x0f | tos << 4;
        }
        (Field::Ttl, Family::V4) => packet[8] = write.apply(packet[8].into()) as u8,
        (Field::Ttl, Family::V6) => packet[7] = write.apply(packet[7].into()) as u8,
        _ => return,
    }
    if family == Family::V4 {
        checksum(packet);
    }
}
