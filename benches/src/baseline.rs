//! Programs to compare with, emitted with polc's own assembler: nothing at all, reading the headers, and what others
//! build classifiers of.

use cranelift_entity::PrimaryMap;
use polc_backend_ebpf::abi;
use polc_backend_ebpf::asm::Asm;
use polc_backend_ebpf::insn::{AluOp, Cond, Helper, Reg, Size};
use polc_backend_ebpf::object::{MapDef, MapKind, MapType, Object, ProgramKind};
use polc_ir::hook::Family;

use crate::kernel::object;
use crate::packet::L3;
use crate::rules::{PORTS, RuleSet};

/// The return code that lets a packet on.
pub(crate) const fn pass(kind: ProgramKind) -> i32 {
    match kind {
        ProgramKind::Xdp => abi::xdp::PASS,
        ProgramKind::Classifier => abi::tc::UNSPEC,
        ProgramKind::Netfilter => abi::netfilter::ACCEPT,
    }
}

/// The return code that drops a packet.
pub(crate) const fn drop(kind: ProgramKind) -> i32 {
    match kind {
        ProgramKind::Xdp => abi::xdp::DROP,
        ProgramKind::Classifier => abi::tc::SHOT,
        ProgramKind::Netfilter => abi::netfilter::DROP,
    }
}

/// The program that does nothing.
///
/// # Errors
/// None but a mistake in it.
pub(crate) fn empty(kind: ProgramKind) -> Result<Object, String> {
    let mut a = Asm::new();
    a.mov32(Reg::R0, pass(kind));
    a.exit();
    Ok(object(kind, PrimaryMap::new(), a.finish().map_err(|error| error.to_string())?))
}

/// The registers that hold a packet's fields after [`parse`].
pub(crate) struct Fields {
    /// The network header.
    pub(crate) l3: Reg,
    /// The transport header.
    pub(crate) l4: Reg,
    /// The protocol.
    pub(crate) proto: Reg,
}

/// Emits what every filter of packets has to do first: bounds, Ethernet type, version, header length, fragments,
/// protocol. What is not a whole packet of the family goes to `other`.
pub(crate) fn parse(
    a: &mut Asm,
    kind: ProgramKind,
    family: Family,
    other: polc_backend_ebpf::asm::Label,
) -> Fields {
    let (data, data_end) = match kind {
        ProgramKind::Xdp => (abi::xdp_md::DATA, abi::xdp_md::DATA_END),
        ProgramKind::Classifier => (abi::sk_buff::DATA, abi::sk_buff::DATA_END),
        ProgramKind::Netfilter => unreachable!("netfilter programs are not measured"),
    };
    let fields = Fields { l3: Reg::R7, l4: Reg::R8, proto: Reg::R9 };
    let header = match family {
        Family::V4 => 20,
        Family::V6 => 40,
    };
    a.load_ctx_pointer(Reg::R2, Reg::R1, data);
    a.load_ctx_pointer(Reg::R3, Reg::R1, data_end);
    a.mov64(Reg::R4, Reg::R2);
    a.alu64(AluOp::Add, Reg::R4, L3 as i32 + header);
    a.jump64(Cond::Gt, Reg::R4, Reg::R3, other);
    a.load(Size::H, Reg::R5, Reg::R2, 12);
    let ethertype = match family {
        Family::V4 => 0x0008,
        Family::V6 => 0xdd86,
    };
    a.jump32(Cond::Ne, Reg::R5, ethertype, other);
    a.mov64(fields.l3, Reg::R2);
    a.alu64(AluOp::Add, fields.l3, L3 as i32);
    a.load(Size::B, Reg::R5, fields.l3, 0);
    a.mov32(Reg::R0, Reg::R5);
    a.alu32(AluOp::Rsh, Reg::R0, 4);
    match family {
        Family::V4 => {
            a.jump32(Cond::Ne, Reg::R0, 4, other);
            a.alu32(AluOp::And, Reg::R5, 15);
            a.alu32(AluOp::Lsh, Reg::R5, 2);
            a.jump32(Cond::Lt, Reg::R5, 20, other);
            a.load(Size::H, Reg::R0, fields.l3, 6);
            a.alu32(AluOp::And, Reg::R0, 0xff3f);
            a.jump32(Cond::Ne, Reg::R0, 0, other);
            a.load(Size::B, fields.proto, fields.l3, 9);
            a.mov64(fields.l4, fields.l3);
            a.alu64(AluOp::Add, fields.l4, Reg::R5);
        }
        Family::V6 => {
            a.jump32(Cond::Ne, Reg::R0, 6, other);
            a.load(Size::B, fields.proto, fields.l3, 6);
            a.mov64(fields.l4, fields.l3);
            a.alu64(AluOp::Add, fields.l4, 40);
        }
    }
    a.mov64(Reg::R4, fields.l4);
    a.alu64(AluOp::Add, Reg::R4, 4);
    a.jump64(Cond::Gt, Reg::R4, Reg::R3, other);
    fields
}

/// The program that reads the five fields and lets the packet on.
///
/// # Errors
/// None but a mistake in it.
pub(crate) fn parse_only(kind: ProgramKind, family: Family) -> Result<Object, String> {
    let mut a = Asm::new();
    let other = a.label();
    let fields = parse(&mut a, kind, family, other);
    match family {
        Family::V4 => {
            a.load(Size::W, Reg::R0, fields.l3, 12);
            a.load(Size::W, Reg::R1, fields.l3, 16);
        }
        Family::V6 => {
            for (reg, at) in [(Reg::R0, 8), (Reg::R1, 16), (Reg::R2, 24), (Reg::R3, 32)] {
                a.load(Size::Dw, reg, fields.l3, at);
            }
        }
    }
    a.load(Size::H, Reg::R4, fields.l4, 0);
    a.load(Size::H, Reg::R5, fields.l4, 2);
    a.bind(other);
    a.mov32(Reg::R0, pass(kind));
    a.exit();
    Ok(object(kind, PrimaryMap::new(), a.finish().map_err(|error| error.to_string())?))
}

/// A program that looks at one rule after another, each field loaded from the packet, masked, compared, and jumped on:
/// the shape of what bpfilter emits (libbpfilter/cgen), without its counters and its calls.
///
/// # Errors
/// The program is too long to be assembled.
pub(crate) fn linear(kind: ProgramKind, set: &RuleSet) -> Result<Object, String> {
    let mut a = Asm::new();
    let other = a.label();
    let fields = parse(&mut a, kind, Family::V4, other);
    for rule in &set.rules {
        let next = a.label();
        for (prefix, at) in [(rule.src, 12), (rule.dst, 16)] {
            if prefix.length == 0 {
                continue;
            }
            a.load(Size::W, Reg::R0, fields.l3, at);
            let wire = |bits: u32| u32::from_ne_bytes(bits.to_be_bytes()) as i32;
            if prefix.length < 32 {
                a.alu32(AluOp::And, Reg::R0, wire(u32::MAX << (32 - prefix.length)));
            }
            a.jump32(Cond::Ne, Reg::R0, wire(prefix.address as u32), next);
        }
        if let Some(proto) = rule.proto {
            a.jump32(Cond::Ne, fields.proto, i32::from(proto), next);
            for (ports, at) in [(rule.sport, 0), (rule.dport, 2)] {
                if ports == PORTS {
                    continue;
                }
                a.load(Size::H, Reg::R0, fields.l4, at);
                a.be(16, Reg::R0);
                if ports.0 == ports.1 {
                    a.jump32(Cond::Ne, Reg::R0, i32::from(ports.0), next);
                } else {
                    a.jump32(Cond::Lt, Reg::R0, i32::from(ports.0), next);
                    a.jump32(Cond::Gt, Reg::R0, i32::from(ports.1), next);
                }
            }
        }
        a.mov32(Reg::R0, if rule.accept { pass(kind) } else { drop(kind) });
        a.exit();
        if !a.is_bound(next) {
            a.bind(next);
        }
    }
    a.mov32(Reg::R0, if set.policy_accepts { pass(kind) } else { drop(kind) });
    a.exit();
    a.bind(other);
    a.mov32(Reg::R0, pass(kind));
    a.exit();
    Ok(object(kind, PrimaryMap::new(), a.finish().map_err(|error| error.to_string())?))
}

/// What a set's program looks up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// The source address in a hash table.
    Hash,
    /// Source address and destination port in a hash table.
    HashPort,
    /// The source address's longest prefix in a trie.
    Trie,
}

/// Name of the map of [`member`].
pub(crate) const SET_MAP: &str = "set";

/// A program that drops what is in a set of `max_entries`: parse, one lookup in one of the kernel's own maps.
/// Keys are the address, then the port and two bytes of zero, or before it the prefix length, all as in
/// include/uapi/linux/bpf.h (struct bpf_lpm_trie_key_u8).
///
/// # Errors
/// None but a mistake in it.
pub(crate) fn member(
    kind: ProgramKind,
    family: Family,
    lookup: Lookup,
    max_entries: u32,
) -> Result<Object, String> {
    /// BPF_F_NO_PREALLOC, which tries must have.
    const NO_PREALLOC: u32 = 1;
    let (source, words) = match family {
        Family::V4 => (12, 1),
        Family::V6 => (8, 4),
    };
    let more = if lookup == Lookup::Hash { 0 } else { 4 };
    let key_bytes = 4 * words + more;
    let mut maps = PrimaryMap::new();
    let set = maps.push(MapDef {
        name: SET_MAP.into(),
        kind: MapKind::Declared {
            map_type: if lookup == Lookup::Trie { MapType::LPM_TRIE } else { MapType::HASH },
            key_bytes: key_bytes as u32,
            value_bytes: 4,
            max_entries,
            flags: if lookup == Lookup::Trie { NO_PREALLOC } else { 0 },
        },
    });
    let mut a = Asm::new();
    let other = a.label();
    let fields = parse(&mut a, kind, family, other);
    let key = -24;
    let address = if lookup == Lookup::Trie { key + 4 } else { key };
    for word in 0..words {
        a.load(Size::W, Reg::R0, fields.l3, source + 4 * word);
        a.store(Size::W, Reg::FP, address + 4 * word, Reg::R0);
    }
    match lookup {
        Lookup::Hash => {}
        Lookup::HashPort => {
            a.load(Size::H, Reg::R0, fields.l4, 2);
            a.store(Size::W, Reg::FP, key + 4 * words, Reg::R0);
        }
        Lookup::Trie => a.store(Size::W, Reg::FP, key, i32::from(32 * words)),
    }
    a.load_map(Reg::R1, set);
    a.mov64(Reg::R2, Reg::FP);
    a.alu64(AluOp::Add, Reg::R2, i32::from(key));
    a.call(Helper::MAP_LOOKUP_ELEM);
    a.jump64(Cond::Eq, Reg::R0, 0, other);
    a.mov32(Reg::R0, drop(kind));
    a.exit();
    a.bind(other);
    a.mov32(Reg::R0, pass(kind));
    a.exit();
    Ok(object(kind, maps, a.finish().map_err(|error| error.to_string())?))
}
