//! `u32` programs.

use super::{U32Op, U32Program};

/// net/netfilter/xt_u32.c, `u32_match_it`, on the packet from its network header on.
pub(super) fn u32_program(program: &U32Program, packet: &[u8]) -> bool {
    let load = |at: u64| {
        let at = usize::try_from(at).ok()?;
        let bytes = packet.get(at..at.checked_add(4)?)?;
        Some(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    program.tests.iter().all(|test| {
        let mut at = 0u64;
        let Some(mut value) = load(test.start.into()) else { return false };
        for op in &test.ops {
            match *op {
                U32Op::And(mask) => value &= mask,
                U32Op::ShiftLeft(by) => value = value.checked_shl(by).unwrap_or(0),
                U32Op::ShiftRight(by) => value = value.checked_shr(by).unwrap_or(0),
                U32Op::At(offset) => {
                    at += u64::from(value);
                    match load(at + u64::from(offset)) {
                        Some(loaded) => value = loaded,
                        None => return false,
                    }
                }
            }
        }
        test.ranges.iter().any(|&(first, last)| first <= value && value <= last)
    })
}
