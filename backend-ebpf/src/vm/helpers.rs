//! Kernel helpers, emulated.
//!
//! rbpf calls helpers as plain functions, so the state they work on is found through a thread-local pointer that is
//! set for the time of one run. Each helper checks the memory it is pointed at; what the kernel's verifier would have
//! refused ends the run with a named fault.

#![allow(unsafe_code)]

use std::cell::Cell;

use super::connections::{self, Connection};
use super::context::{self, CONTEXT_BYTES_MAX};
use super::dynptr;
use super::maps::{self, MapState};
use crate::insn::Helper;
use crate::kernel_api::KernelFunction;
use crate::object::ProgramKind;
use polc_ir::limits::STACK_BYTES_MAX;

/// Not a kernel helper: told the stack's address when a program starts.
pub(crate) const ENTER: Helper = Helper(0x504f_0001);
/// Not a kernel helper: asked before each backward jump; not 0 ends the run.
pub(crate) const STEP: Helper = Helper(0x504f_0002);

/// Not kernel helpers: what calls of kernel functions become.
const CT_LOOKUP: Helper = Helper(0x504f_0003);
const CT_RELEASE: Helper = Helper(0x504f_0004);
const DYNPTR_FROM_SKB: Helper = Helper(0x504f_0005);

/// Tail calls a packet may take (include/linux/bpf.h, `MAX_TAIL_CALL_CNT`).
pub(crate) const TAIL_CALLS_MAX: u32 = 33;

const ENOMEM: i64 = 12;
const EFAULT: i64 = 14;
pub(super) const EINVAL: i64 = 22;

type Function = fn(u64, u64, u64, u64, u64) -> u64;

/// The helper that stands for a kernel function.
pub(crate) fn of_kernel_function(function: KernelFunction) -> Helper {
    match function {
        KernelFunction::XdpCtLookup | KernelFunction::SkbCtLookup => CT_LOOKUP,
        KernelFunction::CtRelease => CT_RELEASE,
        KernelFunction::DynptrFromSkb => DYNPTR_FROM_SKB,
    }
}

/// All helpers, and whether they take pointers to a program's memory.
pub(crate) const HELPERS: [(Helper, bool, Function); 18] = [
    (ENTER, false, enter),
    (STEP, false, step),
    (Helper::MAP_LOOKUP_ELEM, true, map_lookup_elem),
    (Helper::MAP_UPDATE_ELEM, true, map_update_elem),
    (Helper::MAP_DELETE_ELEM, true, map_delete_elem),
    (Helper::KTIME_GET_NS, false, ktime_get_ns),
    (Helper::KTIME_GET_BOOT_NS, false, ktime_get_ns),
    (Helper::GET_PRANDOM_U32, false, get_prandom_u32),
    (Helper::GET_SMP_PROCESSOR_ID, false, get_smp_processor_id),
    (Helper::TAIL_CALL, false, tail_call),
    (Helper::SKB_LOAD_BYTES, true, skb_load_bytes),
    (Helper::SKB_PULL_DATA, false, skb_pull_data),
    (Helper::RINGBUF_OUTPUT, true, ringbuf_output),
    (Helper::XDP_LOAD_BYTES, true, xdp_load_bytes),
    (CT_LOOKUP, true, connections::lookup),
    (CT_RELEASE, false, connections::release),
    (DYNPTR_FROM_SKB, true, dynptr::from_skb),
    (Helper::DYNPTR_READ, true, dynptr::read),
];

/// Whether programs may call it.
pub(crate) fn is_known(helper: Helper) -> bool {
    HELPERS.iter().any(|(known, ..)| *known == helper && known.0 >> 16 != ENTER.0 >> 16)
}

/// Whether it reads or writes memory that a program points it at.
pub(crate) fn takes_pointers(helper: Helper) -> bool {
    HELPERS.iter().any(|(known, pointers, _)| *known == helper && *pointers)
}

/// Where random numbers come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Random {
    /// Always this.
    Fixed(u32),
    /// The sequence of `polc_ir::state::State`, so that a program and the levels above it draw the same numbers.
    Sequence(u64),
}

/// What helpers work on.
pub(crate) struct State {
    pub(crate) maps: Vec<MapState>,
    /// Addresses of all map values.
    pub(crate) values: std::ops::Range<u64>,
    pub(crate) context: u64,
    pub(crate) packet: u64,
    pub(crate) packet_bytes: usize,
    pub(crate) linear_bytes: usize,
    pub(crate) kind: ProgramKind,
    /// End of the stack; 0 until the program entered.
    pub(crate) frame: u64,
    pub(crate) random: Random,
    pub(crate) time_ns: u64,
    pub(crate) cpu: u32,
    pub(crate) back_jumps_left: u32,
    pub(crate) tail_calls: u32,
    /// The program to go on with.
    pub(crate) tail_call: Option<usize>,
    /// The connections that look-ups find.
    pub(crate) connections: Vec<Connection>,
    /// References to connections that the program has not given back.
    pub(crate) held: usize,
    /// What went wrong first.
    pub(crate) fault: Option<&'static str>,
}

thread_local! {
    static CURRENT: Cell<*mut State> = const { Cell::new(std::ptr::null_mut()) };
}

/// Makes `state` the one that helpers on this thread work on, until the value returned is dropped.
///
/// # Safety
/// Nothing else may access `*state` while the value lives.
pub(crate) unsafe fn enter_run(state: *mut State) -> Running {
    Running { before: CURRENT.replace(state) }
}

/// See [`enter_run`].
pub(crate) struct Running {
    before: *mut State,
}

impl Drop for Running {
    fn drop(&mut self) {
        CURRENT.set(self.before);
    }
}

/// Calls `f` with the running state.
pub(super) fn with<R>(f: impl FnOnce(&mut State) -> R) -> R {
    let state = CURRENT.get();
    assert!(!state.is_null(), "helpers are called by running programs only");
    // SAFETY: not null, so inside the life of a `Running`, whose maker promises that nobody else uses the state; and
    // helpers don't call each other, so no other reference made here is alive.
    f(unsafe { &mut *state })
}

pub(super) fn error(errno: i64) -> u64 {
    -errno as u64
}

impl State {
    /// Whether a program owns the `bytes` at `address`.
    fn owns(&self, address: u64, bytes: usize) -> bool {
        let Some(end) = address.checked_add(bytes as u64) else { return false };
        let inside = |start: u64, length: u64| start <= address && end <= start + length;
        inside(self.frame.saturating_sub(STACK_BYTES_MAX as u64), STACK_BYTES_MAX as u64) && self.frame != 0
            || inside(self.values.start, self.values.end - self.values.start)
            || inside(self.packet, self.linear_bytes as u64)
            || inside(self.context, context::bytes(self.kind) as u64)
    }

    pub(super) fn fail(&mut self, fault: &'static str) {
        self.fault.get_or_insert(fault);
    }

    /// The bytes a program points a helper at.
    pub(super) fn read(&mut self, address: u64, bytes: usize) -> Option<Vec<u8>> {
        if !self.owns(address, bytes) {
            self.fail("a helper was pointed at memory that the program does not own");
            return None;
        }
        // SAFETY: `owns` says that the range is the program's stack, a map value, the packet or the context, all of
        // which live while a program runs; the bytes are copied, so no reference is kept.
        Some(unsafe { std::slice::from_raw_parts(address as *const u8, bytes) }.to_vec())
    }

    /// Writes where a program points a helper at; whether it may.
    pub(super) fn write(&mut self, address: u64, from: &[u8]) -> bool {
        if !self.owns(address, from.len()) {
            self.fail("a helper was pointed at memory that the program does not own");
            return false;
        }
        // SAFETY: as in `read`; `from` is the host's own memory, so the ranges don't overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), address as *mut u8, from.len()) };
        true
    }

    /// The packet, paged part included.
    pub(super) fn packet_bytes(&self, offset: usize, bytes: usize) -> Option<Vec<u8>> {
        let end = offset.checked_add(bytes).filter(|end| *end <= self.packet_bytes)?;
        // SAFETY: the packet lies at `packet`, `packet_bytes` long, in the arena.
        Some(
            unsafe { std::slice::from_raw_parts((self.packet as usize + offset) as *const u8, end - offset) }
                .to_vec(),
        )
    }

    fn map(&mut self, handle: u64) -> Option<&mut MapState> {
        let index = maps::from_handle(handle).filter(|index| *index < self.maps.len());
        match index {
            Some(index) => self.maps.get_mut(index),
            None => {
                self.fail("a helper was given something else than a map");
                None
            }
        }
    }

    fn key(&mut self, handle: u64, key: u64) -> Option<Vec<u8>> {
        let bytes = self.map(handle)?.key_bytes;
        self.read(key, bytes)
    }
}

fn enter(_: u64, frame: u64, _: u64, _: u64, _: u64) -> u64 {
    with(|state| state.frame = frame);
    0
}

fn step(_: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    with(|state| match state.back_jumps_left.checked_sub(1) {
        Some(left) => {
            state.back_jumps_left = left;
            0
        }
        None => {
            state.fail("the program takes more steps than the kernel's verifier would follow");
            1
        }
    })
}

fn map_lookup_elem(map: u64, key: u64, _: u64, _: u64, _: u64) -> u64 {
    with(|state| {
        let key = state.key(map, key)?;
        state.map(map)?.lookup(&key)
    })
    .unwrap_or(0)
}

fn map_update_elem(map: u64, key: u64, value: u64, flags: u64, _: u64) -> u64 {
    with(|state| {
        let key = state.key(map, key)?;
        let bytes = state.map(map)?.value_bytes;
        let value = state.read(value, bytes)?;
        Some(match state.map(map)?.update(&key, flags) {
            Ok(address) => {
                state.write(address, &value);
                0
            }
            Err(errno) => errno as u64,
        })
    })
    .unwrap_or(error(EINVAL))
}

fn map_delete_elem(map: u64, key: u64, _: u64, _: u64, _: u64) -> u64 {
    with(|state| {
        let key = state.key(map, key)?;
        Some(state.map(map)?.delete(&key) as u64)
    })
    .unwrap_or(error(EINVAL))
}

fn ktime_get_ns(_: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    with(|state| state.time_ns)
}

fn get_prandom_u32(_: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    with(|state| match &mut state.random {
        Random::Fixed(value) => u64::from(*value),
        Random::Sequence(x) => {
            *x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = *x;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) >> 32
        }
    })
}

fn get_smp_processor_id(_: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    with(|state| u64::from(state.cpu))
}

/// Not 0 if the program has to end because another goes on.
fn tail_call(_: u64, map: u64, index: u64, _: u64, _: u64) -> u64 {
    with(|state| {
        let program = state.map(map)?.program(index as u32)?;
        if state.tail_calls >= TAIL_CALLS_MAX {
            return None;
        }
        state.tail_calls += 1;
        state.tail_call = Some(program);
        Some(1)
    })
    .unwrap_or(0)
}

/// net/core/filter.c, `bpf_skb_load_bytes`: clears the destination when it fails.
fn skb_load_bytes(_: u64, offset: u64, to: u64, len: u64, _: u64) -> u64 {
    with(|state| {
        let (offset, len) = (offset as u32 as usize, len as u32 as usize);
        match state.packet_bytes(offset, len).filter(|_| offset <= i32::MAX as usize) {
            Some(bytes) => {
                state.write(to, &bytes);
                0
            }
            None => {
                if len <= STACK_BYTES_MAX {
                    state.write(to, &vec![0; len]);
                }
                error(EFAULT)
            }
        }
    })
}

/// net/core/filter.c, `bpf_skb_pull_data`: 0 means the linear part, more than the packet has is an error.
fn skb_pull_data(_: u64, len: u64, _: u64, _: u64, _: u64) -> u64 {
    with(|state| {
        let wanted = len as u32 as usize;
        if wanted > state.packet_bytes {
            return error(ENOMEM);
        }
        state.linear_bytes = state.linear_bytes.max(wanted);
        let mut wide = [0; CONTEXT_BYTES_MAX];
        context::pointers(state.kind, state.packet, state.linear_bytes, &mut wide);
        let at = context::wide_pointers(state.kind);
        state.write(state.context + at as u64, &wide[at..at + 3 * 8]);
        0
    })
}

/// kernel/bpf/ringbuf.c, `bpf_ringbuf_output`. Flags only say whether readers are woken.
fn ringbuf_output(map: u64, data: u64, len: u64, flags: u64, _: u64) -> u64 {
    with(|state| {
        if flags > 3 {
            return Some(error(EINVAL));
        }
        let record = state.read(data, usize::try_from(len).ok()?)?;
        Some(match state.map(map)?.append(record) {
            Ok(()) => 0,
            Err(errno) => errno as u64,
        })
    })
    .unwrap_or(error(EINVAL))
}

/// net/core/filter.c, `__bpf_xdp_load_bytes` and `bpf_xdp_pointer`: leaves the destination alone when it fails.
fn xdp_load_bytes(_: u64, offset: u64, to: u64, len: u64, _: u64) -> u64 {
    with(|state| {
        let (offset, len) = (offset as u32 as usize, len as u32 as usize);
        if offset > 0xffff || len > 0xffff {
            return error(EFAULT);
        }
        match state.packet_bytes(offset, len) {
            Some(bytes) => {
                state.write(to, &bytes);
                0
            }
            None => error(EINVAL),
        }
    })
}
