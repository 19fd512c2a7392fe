//! The check VM: runs an object's programs without a kernel, for `verify`, `simulate` and tests.
//!
//! The instructions are run by rbpf's interpreter (never its JITs, which miscompile); around it this module emulates
//! what the kernel gives a program: the context structures, maps, helpers, tail calls. It is no verifier: registers
//! start as 0 and keep their values over calls, and an access is only checked to stay in the packet, the context, the
//! stack or the map values. What it does check is that every run ends (see `link`), and that nothing outside is
//! touched.
//!
//! A [`Vm`] is made once for an object and then run for many packets; maps keep their contents between runs, as in the
//! kernel, until [`Vm::reset`].

#![allow(unsafe_code)]

mod arena;
mod connections;
mod context;
mod dynptr;
mod helpers;
mod link;
mod maps;

use std::cell::UnsafeCell;
use std::fmt;

use cranelift_entity::{EntityRef, PrimaryMap};
use polc_ir::diag::Code as DiagCode;
use polc_ir::entities::Map;
use polc_ir::limits::{VM_MAP_BYTES_MAX, VM_PACKET_BYTES_MAX};
use rbpf::EbpfVmMbuff;

use arena::Arena;
use context::CONTEXT_BYTES_MAX;
use helpers::{HELPERS, Random, State};
use link::{Linked, link};
use maps::MapState;

use crate::object::{Object, ObjectError, ProgramKind};

pub use connections::Connection;
pub use context::{Context, Input};

/// Diagnostic code: an object's maps are too large for the check VM.
pub const MAPS_TOO_LARGE: DiagCode = DiagCode(554);

/// Diagnostic code: a packet is too long for the check VM.
pub const PACKET_TOO_LONG: DiagCode = DiagCode(555);

/// Bytes before the packet, as XDP has them (`XDP_PACKET_HEADROOM`).
const HEADROOM_BYTES: usize = 256;

/// What a program did with a packet. What it did to maps is seen through [`Vm::map`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunResult {
    /// The lower half of `r0`: `XDP_*`, `TC_ACT_*` or `NF_*`.
    pub return_value: u32,
    /// The packet's mark afterwards (tc; the others don't change it).
    pub mark: u32,
}

/// Why a program can't be run, or a run failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmError {
    /// The object is not well formed.
    Object(ObjectError),
    /// The VM has no map of that type.
    UnsupportedMap {
        /// The map.
        map: String,
    },
    /// The maps, up to this one, take more than [`VM_MAP_BYTES_MAX`].
    TooLarge {
        /// The map.
        map: String,
    },
    /// A program has something that the VM can't run as the kernel does.
    Refused {
        /// The program.
        program: String,
        /// The instruction's slot.
        at: u32,
        /// What is wrong.
        why: String,
    },
    /// The object has no such program.
    NoProgram(usize),
    /// A packet is longer than [`VM_PACKET_BYTES_MAX`].
    PacketTooLong(usize),
    /// A program did what the kernel's verifier would have refused: an access outside its memory, a loop without end.
    Fault {
        /// The program that was running.
        program: String,
        /// What it did.
        what: String,
    },
}

impl fmt::Display for VmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmError::Object(error) => write!(f, "{error}"),
            VmError::UnsupportedMap { map } => write!(f, "the check VM has no map like `{map}`"),
            VmError::TooLarge { map } => {
                write!(
                    f,
                    "map `{map}` makes the maps larger than the {VM_MAP_BYTES_MAX} bytes the check VM has"
                )
            }
            VmError::Refused { program, at, why } => {
                write!(f, "program `{program}`, instruction {at}: {why}")
            }
            VmError::NoProgram(index) => write!(f, "the object has no program {index}"),
            VmError::PacketTooLong(bytes) => {
                write!(f, "a packet of {bytes} bytes; the check VM takes {VM_PACKET_BYTES_MAX}")
            }
            VmError::Fault { program, what } => write!(f, "program `{program}`: {what}"),
        }
    }
}

impl std::error::Error for VmError {}

impl VmError {
    /// The diagnostic's code when the user's input, not a bug, is the cause.
    pub fn code(&self) -> Option<DiagCode> {
        match self {
            VmError::Object(error) => Some(error.code()),
            VmError::TooLarge { .. } => Some(MAPS_TOO_LARGE),
            VmError::PacketTooLong(_) => Some(PACKET_TOO_LONG),
            _ => None,
        }
    }
}

/// A program and the interpreter that holds it.
struct Loaded {
    name: String,
    /// Borrows from `linked`, so it is declared, and dropped, first.
    interpreter: EbpfVmMbuff<'static>,
    linked: Box<Linked>,
}

/// An object ready to run.
pub struct Vm {
    programs: Vec<Loaded>,
    arena: Arena,
    state: Box<UnsafeCell<State>>,
    /// The maps' names.
    maps: PrimaryMap<Map, String>,
}

impl Vm {
    /// Places the object's maps and links its programs.
    pub fn new(object: &Object) -> Result<Vm, VmError> {
        object.verify().map_err(VmError::Object)?;
        let map_bytes = maps::arena_bytes(object)?;
        let mut arena = Arena::new(CONTEXT_BYTES_MAX + HEADROOM_BYTES + VM_PACKET_BYTES_MAX + map_bytes + 64);
        let context = arena.take(CONTEXT_BYTES_MAX);
        let packet = arena.take(HEADROOM_BYTES + VM_PACKET_BYTES_MAX) + HEADROOM_BYTES as u64;
        let first_value = arena.take(0);
        let mut states = Vec::with_capacity(object.maps.len());
        for def in object.maps.values() {
            states.push(MapState::new(def, &mut arena)?);
        }
        let values = first_value..arena.take(0);

        let mut programs = Vec::with_capacity(object.programs.len());
        for program in &object.programs {
            let linked = Box::new(link(program, |map| states[map].base)?);
            programs.push(load(&program.name, linked, &values)?);
        }
        let state = State {
            maps: states,
            values,
            context,
            packet,
            packet_bytes: 0,
            linear_bytes: 0,
            kind: ProgramKind::Xdp,
            frame: 0,
            random: Random::Sequence(1),
            time_ns: 0,
            cpu: 0,
            back_jumps_left: 0,
            tail_calls: 0,
            tail_call: None,
            connections: Vec::new(),
            held: 0,
            fault: None,
        };
        let maps = object.maps.values().map(|def| def.name.clone()).collect();
        Ok(Vm { programs, arena, state: Box::new(UnsafeCell::new(state)), maps })
    }

    /// The programs' names, in the object's order.
    pub fn program(&self, name: &str) -> Option<usize> {
        self.programs.iter().position(|program| program.name == name)
    }

    /// Runs a program on a packet.
    pub fn run(&mut self, program: usize, input: &Input<'_>) -> Result<RunResult, VmError> {
        let mut index = program;
        let kind = self.programs.get(index).ok_or(VmError::NoProgram(index))?.linked.kind;
        let length = input.packet.len();
        if length > VM_PACKET_BYTES_MAX {
            return Err(VmError::PacketTooLong(length));
        }
        let linear = input.linear.map_or(length, |linear| linear.min(length));
        let (context, packet) = {
            let state = self.state.get_mut();
            state.packet_bytes = length;
            state.linear_bytes = linear;
            state.kind = kind;
            state.tail_calls = 0;
            state.connections = input.connections.to_vec();
            state.held = 0;
            state.fault = None;
            (state.context, state.packet)
        };
        let mut filled = [0; CONTEXT_BYTES_MAX];
        context::fill(kind, input, linear, packet, context, &mut filled);
        self.arena.copy_in(context, &filled);
        self.arena.copy_in(packet, input.packet);

        let value = loop {
            let Loaded { name, interpreter, linked } = &self.programs[index];
            let state = self.state.get_mut();
            state.back_jumps_left = linked.back_jumps_max;
            state.tail_call = None;
            state.frame = 0;
            // Where the packet may grow while the program runs, its end is checked against the whole.
            let readable = match kind {
                ProgramKind::Netfilter => 0,
                _ if linked.pulls => length,
                _ => state.linear_bytes,
            };
            let mbuff = self.arena.slice(context, context::bytes(kind));
            let mem = self.arena.slice(packet, readable);
            let outcome = {
                // SAFETY: `self` is borrowed exclusively and the state isn't used here while the value lives.
                let _running = unsafe { helpers::enter_run(self.state.get()) };
                interpreter.execute_program(mem, mbuff)
            };
            let state = self.state.get_mut();
            let fault = |what: String| VmError::Fault { program: name.clone(), what };
            if let Some(what) = state.fault {
                return Err(fault(what.to_string()));
            }
            let value = outcome.map_err(|error| fault(first_line(&error.to_string())))?;
            if state.held != 0 && state.tail_call.is_none() {
                return Err(fault("it keeps a reference to a connection".to_string()));
            }
            match state.tail_call {
                None => break value,
                Some(next) if self.programs[next].linked.kind == kind => index = next,
                Some(_) => return Err(fault("a tail call to a program of another kind".to_string())),
            }
        };
        let mark = match kind {
            ProgramKind::Xdp | ProgramKind::Netfilter => input.context.mark,
            ProgramKind::Classifier => {
                let bytes = self.arena.slice(context + context::SKB_MARK as u64, 4);
                u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
            }
        };
        Ok(RunResult { return_value: value as u32, mark })
    }

    /// The packet as the last run left it.
    pub fn packet(&self) -> &[u8] {
        // SAFETY: no program runs while `self` is borrowed, so nobody writes to the state.
        let state = unsafe { &*self.state.get() };
        self.arena.slice(state.packet, state.packet_bytes)
    }

    /// The map of that name.
    pub fn map(&self, name: &str) -> Option<Map> {
        self.maps.iter().find(|(_, own)| *own == name).map(|(map, _)| map)
    }

    /// All values of an array or data map, one after the other, each padded to 8 bytes. The place of a hash table's
    /// values is found through [`Vm::value`].
    pub fn values(&self, map: Map) -> &[u8] {
        // SAFETY: as in `packet`.
        let state = unsafe { &*self.state.get() };
        match state.maps.get(map.index()) {
            Some(state) => {
                let bytes = state.value_bytes.next_multiple_of(8) * state.entries as usize;
                self.arena.slice(state.base, bytes)
            }
            None => &[],
        }
    }

    /// The value for a key: for arrays, the index in the CPU's order.
    pub fn value(&self, map: Map, key: &[u8]) -> Option<&[u8]> {
        // SAFETY: as in `packet`.
        let state = unsafe { &*self.state.get() };
        let map = state.maps.get(map.index())?;
        Some(self.arena.slice(map.lookup(key)?, map.value_bytes))
    }

    /// Sets the value for a key from outside; whether the map has a place for it and the length is right.
    pub fn set_value(&mut self, map: Map, key: &[u8], value: &[u8]) -> bool {
        let Some(map) = self.state.get_mut().maps.get_mut(map.index()) else { return false };
        if key.len() != map.key_bytes || value.len() != map.value_bytes {
            return false;
        }
        match map.update(key, 0) {
            Ok(address) => {
                self.arena.copy_in(address, value);
                true
            }
            Err(_) => false,
        }
    }

    /// Takes the records that programs wrote to a ring buffer since the last time, oldest first.
    pub fn take_records(&mut self, map: Map) -> Vec<Vec<u8>> {
        match self.state.get_mut().maps.get_mut(map.index()) {
            Some(map) => map.take_records(),
            None => Vec::new(),
        }
    }

    /// Puts `program` at `index` of a program array; whether there is such a place.
    pub fn set_program(&mut self, map: Map, index: u32, program: usize) -> bool {
        program < self.programs.len()
            && self
                .state
                .get_mut()
                .maps
                .get_mut(map.index())
                .is_some_and(|map| map.set_program(index, program))
    }

    /// Puts every map's contents back to what they were when the VM was made of `object`. Program arrays keep their
    /// programs.
    pub fn reset(&mut self, object: &Object) {
        let state = self.state.get_mut();
        for (map, def) in state.maps.iter_mut().zip(object.maps.values()) {
            map.reset(def, &mut self.arena);
        }
    }

    /// From now on, `get_prandom_u32` gives the sequence that starts from `seed`.
    pub fn set_random_seed(&mut self, seed: u64) {
        self.state.get_mut().random = Random::Sequence(seed);
    }

    /// From now on, `get_prandom_u32` always gives `value`.
    pub fn set_random(&mut self, value: u32) {
        self.state.get_mut().random = Random::Fixed(value);
    }

    /// From now on, `ktime_get_ns` gives `ns`.
    pub fn set_time_ns(&mut self, ns: u64) {
        self.state.get_mut().time_ns = ns;
    }

    /// From now on, `get_smp_processor_id` gives `cpu`.
    pub fn set_cpu(&mut self, cpu: u32) {
        self.state.get_mut().cpu = cpu;
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("programs", &self.programs.len()).finish_non_exhaustive()
    }
}

/// rbpf's messages go on with its memory layout, which is of no use to anybody else.
fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().trim_start_matches("Error: ").to_string()
}

fn load(name: &str, linked: Box<Linked>, values: &std::ops::Range<u64>) -> Result<Loaded, VmError> {
    let refuse = |error: std::io::Error| VmError::Refused {
        program: name.to_string(),
        at: 0,
        why: first_line(&error.to_string()),
    };
    // SAFETY: the bytes are on the heap, owned by `linked`, which is never changed and is dropped after the
    // interpreter (field order of `Loaded`).
    let bytes: &'static [u8] =
        unsafe { std::slice::from_raw_parts(linked.bytes.as_ptr(), linked.bytes.len()) };
    let mut interpreter = EbpfVmMbuff::new(Some(bytes)).map_err(refuse)?;
    for (helper, _, function) in HELPERS {
        interpreter.register_helper(helper.0, function).map_err(refuse)?;
    }
    interpreter.register_allowed_memory(values.clone());
    Ok(Loaded { name: name.to_string(), interpreter, linked })
}
