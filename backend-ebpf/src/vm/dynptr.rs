//! Handles to a packet's bytes, emulated: `bpf_dynptr_from_skb` (net/core/filter.c) and `bpf_dynptr_read`
//! (kernel/bpf/helpers.c).
//!
//! The kernel's verifier sees to it that a program reads through nothing but a handle that it made, of the packet it was
//! given, and did not touch since. Here a handle holds a mark, so that anything else ends the run with a fault.

use super::context::NF_SKB;
use super::helpers::{EINVAL, State, error, with};
use crate::abi::DYNPTR_BYTES;
use crate::object::ProgramKind;

const E2BIG: i64 = 7;

/// What tells a handle from what else may be on a stack.
const MARK: u64 = 0x504f_4459_4e50_5452;

/// The handle to the packet.
fn handle(state: &State) -> Vec<u8> {
    [state.packet, MARK].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `bpf_dynptr_from_skb`.
pub(super) fn from_skb(skb: u64, flags: u64, to: u64, _: u64, _: u64) -> u64 {
    with(|state| {
        if state.kind != ProgramKind::Netfilter || skb != state.context + NF_SKB as u64 {
            state.fail("a handle was made of something else than the packet");
            return error(EINVAL);
        }
        if flags != 0 {
            return error(EINVAL);
        }
        state.write(to, &handle(state));
        0
    })
}

/// `bpf_dynptr_read`: leaves the destination alone when it fails.
pub(super) fn read(to: u64, len: u64, from: u64, offset: u64, flags: u64) -> u64 {
    with(|state| {
        let Some(given) = state.read(from, DYNPTR_BYTES as usize) else { return error(EINVAL) };
        if given != handle(state) {
            state.fail("bytes were read through something else than a handle");
            return error(EINVAL);
        }
        if flags != 0 {
            return error(EINVAL);
        }
        match state.packet_bytes(offset as u32 as usize, len as u32 as usize) {
            Some(bytes) => {
                state.write(to, &bytes);
                0
            }
            None => error(E2BIG),
        }
    })
}
