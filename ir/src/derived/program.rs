//! `u32` programs.

use super::{U32Op, U32Program, U32Test};
use crate::hook::Family;

impl U32Program {
    /// Whether any of these bytes of the network header may bear on what the program says; they are given by their
    /// offsets. What is read after the origin has been moved counts as behind the header if that was by an IPv4 header's
    /// length (`0>>22&0x3C@`), and else as anywhere.
    pub fn reads(&self, family: Family, bytes: &[u32]) -> bool {
        self.tests.iter().any(|test| test.reads(family, bytes))
    }
}

impl U32Test {
    fn reads(&self, family: Family, asked: &[u32]) -> bool {
        // The loaded word's bits that are left of it, as they lay in it, and by how much they are shifted to the left.
        let (start, mut left, mut shift) = (self.start, u64::from(u32::MAX), 0i64);
        let moved = |bits: u64, by: i64| match by {
            0.. => bits.checked_shl(by as u32).unwrap_or(0),
            _ => bits.checked_shr(by.unsigned_abs() as u32).unwrap_or(0),
        };
        let bears = |start: u32, left: u64| {
            (0..4).any(|byte| {
                left >> (24 - 8 * byte) & 0xff != 0 && asked.contains(&start.saturating_add(byte))
            })
        };
        for op in &self.ops {
            match *op {
                U32Op::And(mask) => left &= moved(mask.into(), -shift),
                U32Op::ShiftLeft(by) => {
                    shift += i64::from(by);
                    left &= moved(u32::MAX.into(), -shift);
                }
                U32Op::ShiftRight(by) => {
                    shift -= i64::from(by);
                    left &= moved(u64::MAX, -shift);
                }
                U32Op::At(_) => {
                    // The length of the header in bytes, as the shifted and masked first word gives it.
                    let by_length = family == Family::V4 && (start, left, shift) == (0, 0x0f00_0000, -22);
                    return bears(start, left) || !by_length && !asked.is_empty();
                }
            }
        }
        bears(start, left)
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bytes_whose_bits_are_left_are_read() {
        use U32Op::{And, At, ShiftLeft, ShiftRight};
        let reads = |start: u32, ops: &[U32Op], byte: u32| {
            U32Test { start, ops: ops.to_vec(), ranges: vec![(0, 0)] }.reads(Family::V4, &[byte])
        };
        // `6&0xFF`: the protocol, and not the hop count before it.
        assert!(reads(6, &[And(0xff)], 9));
        assert!(!reads(6, &[And(0xff)], 8));
        assert!(reads(6, &[], 8) && !reads(6, &[], 10) && !reads(6, &[], 5));
        assert!(reads(8, &[ShiftRight(24)], 8) && !reads(8, &[ShiftRight(24)], 9));
        assert!(!reads(8, &[ShiftLeft(8)], 8) && reads(8, &[ShiftLeft(8)], 9));
        assert!(
            !reads(8, &[ShiftLeft(8), ShiftRight(24)], 10) && reads(8, &[ShiftLeft(8), ShiftRight(24)], 9)
        );
        assert!(!reads(8, &[ShiftLeft(40)], 11) && !reads(8, &[ShiftRight(40)], 8));
        let length = [ShiftRight(22), And(0x3c), At(0)];
        assert!(!reads(0, &length, 8), "behind the header");
        assert!(reads(0, &length, 0), "the length itself");
        assert!(reads(0, &[ShiftRight(22), And(0x3f), At(0)], 8), "anywhere");
        let program =
            U32Program { tests: vec![U32Test { start: 0, ops: length.to_vec(), ranges: Vec::new() }] };
        assert!(program.reads(Family::V6, &[8]), "IPv6 has no such length");
    }
}
