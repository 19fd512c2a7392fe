//! What a program is given with a packet: the context structures of XDP, tc and netfilter, emulated.
//!
//! Offsets are those of `struct xdp_md` and `struct __sk_buff` in include/uapi/linux/bpf.h. Their packet pointers are
//! 32-bit fields that no 64-bit address fits, so behind the structure the VM keeps the same pointers at full width,
//! and the linker turns recorded loads of the narrow fields into loads of the wide ones, much as the kernel rewrites
//! them (net/core/filter.c, `xdp_convert_ctx_access`, `bpf_convert_ctx_access`).
//!
//! At netfilter the context is two pointers to structures of the kernel's own. They lie behind it, in the local layout of
//! [`crate::kernel_api`], which is what programs have before they are loaded.

use super::Connection;
use crate::abi::nf_ctx;
use crate::kernel_api::KernelField;
use crate::object::ProgramKind;

/// What the kernel knows about a packet besides its bytes. Numbers are in the CPU's order unless said otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// The device it came by; 0 for none.
    pub ingress_ifindex: u32,
    /// The device it is on: at egress and at netfilter, the one it leaves by, 0 for none. XDP has no such field; its
    /// `egress_ifindex` is 0.
    pub ifindex: u32,
    /// Receive queue.
    pub rx_queue_index: u32,
    /// Mark. Not XDP's.
    pub mark: u32,
    /// `PACKET_HOST` and so on (include/uapi/linux/if_packet.h). Not XDP's.
    pub packet_type: u32,
    /// VLAN tag that the device took out of the frame, as the 16 bits of TCI. tc only.
    pub vlan_tci: Option<u16>,
    /// EtherType of that tag.
    pub vlan_protocol: u16,
    /// Priority. tc only.
    pub priority: u32,
    /// EtherType; `None`: what the frame says. tc only.
    pub protocol: Option<u16>,
    /// `skb->_nfct`: the address of the packet's connection, 0 for none, plus what the packet is to it. Netfilter only.
    pub connection: u64,
}

/// A packet for [`super::Vm::run`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Input<'a> {
    /// The frame, from the Ethernet header on; at netfilter, the packet from the network header on.
    pub packet: &'a [u8],
    /// How many bytes of it `data` and `data_end` enclose, the rest being in pages or fragments; `None`: all.
    pub linear: Option<usize>,
    /// The rest.
    pub context: Context,
    /// The connections that the kernel's table has.
    pub connections: &'a [Connection],
}

/// Space for the larger context with its wide pointers.
pub(crate) const CONTEXT_BYTES_MAX: usize = bytes(ProgramKind::Classifier);

const SKB_LEN: usize = 0;
const SKB_PKT_TYPE: usize = 4;
/// Offset of `mark`, which programs may write.
pub(crate) const SKB_MARK: usize = 8;
const SKB_PROTOCOL: usize = 16;
const SKB_VLAN_PRESENT: usize = 20;
const SKB_VLAN_TCI: usize = 24;
const SKB_VLAN_PROTO: usize = 28;
const SKB_PRIORITY: usize = 32;
const SKB_INGRESS_IFINDEX: usize = 36;
const SKB_IFINDEX: usize = 40;
const XDP_INGRESS_IFINDEX: usize = 12;
const XDP_RX_QUEUE_INDEX: usize = 16;

/// Bytes of the context that a program of that kind may address, wide pointers included.
pub(crate) const fn bytes(kind: ProgramKind) -> usize {
    match kind {
        ProgramKind::Xdp | ProgramKind::Classifier => wide_pointers(kind) + 3 * 8,
        ProgramKind::Netfilter => NF_OUT + 8,
    }
}

/// Where the structures are that a netfilter context points to.
const NF_STATE: usize = 16;
/// `struct sk_buff`.
pub(crate) const NF_SKB: usize = 32;
const NF_IN: usize = 56;
const NF_OUT: usize = 64;

/// Where the wide pointers `data`, `data_end` and `data_meta` are.
pub(crate) const fn wide_pointers(kind: ProgramKind) -> usize {
    kind.context_bytes() as usize
}

/// Offset of the wide pointer that stands for the narrow one at `off`.
pub(crate) fn widen(kind: ProgramKind, off: i16) -> Option<i16> {
    let narrow = match kind {
        ProgramKind::Xdp => [0, 4, 8],
        ProgramKind::Classifier => [76, 80, 140],
        ProgramKind::Netfilter => return None,
    };
    let index = narrow.iter().position(|&known| known == off)?;
    Some((wide_pointers(kind) + index * 8) as i16)
}

/// Fills in the context at `address` of a packet whose bytes are at `data`.
pub(crate) fn fill(
    kind: ProgramKind,
    input: &Input<'_>,
    linear: usize,
    data: u64,
    address: u64,
    out: &mut [u8; CONTEXT_BYTES_MAX],
) {
    out.fill(0);
    let mut put = |at: usize, value: u32| out[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    let context = &input.context;
    match kind {
        ProgramKind::Xdp => {
            put(XDP_INGRESS_IFINDEX, context.ingress_ifindex);
            put(XDP_RX_QUEUE_INDEX, context.rx_queue_index);
        }
        ProgramKind::Classifier => {
            let in_frame = || match input.packet {
                [_, _, _, _, _, _, _, _, _, _, _, _, a, b, ..] => u16::from_be_bytes([*a, *b]),
                _ => 0,
            };
            put(SKB_LEN, input.packet.len() as u32);
            put(SKB_PKT_TYPE, context.packet_type);
            put(SKB_MARK, context.mark);
            put(SKB_PROTOCOL, u32::from(context.protocol.unwrap_or_else(in_frame).to_be()));
            put(SKB_VLAN_PRESENT, u32::from(context.vlan_tci.is_some()));
            put(SKB_VLAN_TCI, u32::from(context.vlan_tci.unwrap_or(0)));
            put(SKB_VLAN_PROTO, u32::from(context.vlan_protocol.to_be()));
            put(SKB_PRIORITY, context.priority);
            put(SKB_INGRESS_IFINDEX, context.ingress_ifindex);
            put(SKB_IFINDEX, context.ifindex);
        }
        ProgramKind::Netfilter => return fill_netfilter(input, address, out),
    }
    pointers(kind, data, linear, out);
}

/// Fills in a netfilter context and what it points to, with null pointers for devices that there are none of.
fn fill_netfilter(input: &Input<'_>, address: u64, out: &mut [u8; CONTEXT_BYTES_MAX]) {
    let context = &input.context;
    let at = |base: usize, field: KernelField| base + field.local_offset() as usize;
    for (place, to, there) in [
        (nf_ctx::STATE as usize, NF_STATE, true),
        (nf_ctx::SKB as usize, NF_SKB, true),
        (at(NF_STATE, KernelField::STATE_IN), NF_IN, context.ingress_ifindex != 0),
        (at(NF_STATE, KernelField::STATE_OUT), NF_OUT, context.ifindex != 0),
    ] {
        let to = if there { address + to as u64 } else { 0 };
        out[place..place + 8].copy_from_slice(&to.to_ne_bytes());
    }
    for (place, value) in [
        (at(NF_SKB, KernelField::SKB_LEN), input.packet.len() as u32),
        (at(NF_SKB, KernelField::SKB_MARK), context.mark),
        // The bits above the packet type's three are other fields'.
        (at(NF_SKB, KernelField::SKB_PACKET_TYPE), context.packet_type & 7 | 0xf8),
        (at(NF_IN, KernelField::DEVICE_NUMBER), context.ingress_ifindex),
        (at(NF_OUT, KernelField::DEVICE_NUMBER), context.ifindex),
    ] {
        out[place..place + 4].copy_from_slice(&value.to_ne_bytes());
    }
    let place = at(NF_SKB, KernelField::SKB_CONNECTION);
    out[place..place + 8].copy_from_slice(&context.connection.to_ne_bytes());
}

/// Fills in the wide pointers.
pub(crate) fn pointers(kind: ProgramKind, data: u64, linear: usize, out: &mut [u8; CONTEXT_BYTES_MAX]) {
    let at = wide_pointers(kind);
    for (index, pointer) in [data, data + linear as u64, data].into_iter().enumerate() {
        out[at + index * 8..at + index * 8 + 8].copy_from_slice(&pointer.to_ne_bytes());
    }
}
