//! Netfilter hooks: a small program that goes on with whichever generation's program is current.
//!
//! A netfilter link takes no other program (net/netfilter/nf_bpf_link.c, `bpf_nf_link_update`), and two links at once
//! would have packets decided, and counted, twice. So what is linked to the hook stays the same for good: a program that
//! jumps to one of the two in a map of the hook's, by the lowest bit of a word that all hooks of a family share. New
//! programs are put where no packet goes; then one store to the word, and packets meet them at all of these hooks. One that
//! a host sends to itself may have passed OUTPUT by then, and meets the new program at INPUT: each hook reads the word.
//! Between changes both places of a hook have the same program, so that a change at other hooks leaves it. That costs a
//! packet one load and one jump, since both places are known when the program is translated, and jumps to them direct
//! (arch/x86/net/bpf_jit_comp.c, `emit_bpf_tail_call_direct`).
//!
//! Where a hook is about to get its first program, or to lose its last, one that lets every packet on stands for none.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::Path;

use polc_backend_ebpf::abi::netfilter;
use polc_backend_ebpf::asm::Asm;
use polc_backend_ebpf::insn::{AluOp, Cond, Helper, Reg, Size};
use polc_backend_ebpf::object::MapType;
use polc_ir::env::Mode;
use polc_ir::hook::{Family, Hook};

use crate::attach;
use crate::coexist;
use crate::error::Error;
use crate::kernel_types::{KernelTypes, KernelTypesError};
use crate::state::Via;
use crate::store::Slot;
use crate::sys::{LinkSpec, Map, MapFlags, MapSpec, MapWords, ProgramSpec, ProgramType, Sys};

/// `BPF_NETFILTER` of `enum bpf_attach_type`.
const ATTACH_NETFILTER: u32 = 45;
/// `BPF_LINK_TYPE_NETFILTER` of `enum bpf_link_type`.
const LINK_TYPE_NETFILTER: i32 = 10;
/// Name of the maps and programs.
const NAME: &str = "polc_dispatch";
/// The places in a hook's map: where packets go while the word is even, and while it is odd.
const PLACES: [[u8; 4]; 2] = [[0; 4], 1u32.to_ne_bytes()];

const NFPROTO_IPV4: u32 = 2;
const NFPROTO_IPV6: u32 = 10;

/// Priorities tried before giving up.
pub const PRIORITIES_TRIED: i32 = 32;

/// Where among a hook's functions a program goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// The priority; none for the highest free one before `before`.
    pub priority: Option<i32>,
    /// Priority of the first function that has to come after it.
    pub before: i32,
    /// Whether fragments are reassembled before packets get there.
    pub defrag: bool,
}

/// `NFPROTO_*` (include/uapi/linux/netfilter.h).
pub(crate) const fn family_number(family: Family) -> u32 {
    match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    }
}

/// A hook's number (include/uapi/linux/netfilter.h, `enum nf_inet_hooks`).
pub(crate) const fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

/// The slot's hook.
fn hook(slot: &Slot) -> Result<Hook, Error> {
    slot.name.hook.ok_or_else(|| Error::NoProgram(format!("no hook is named {}", slot.name)))
}

/// What the hooks of a family share.
#[derive(Debug)]
struct Hooks {
    /// An array of one word, which counts their changes.
    word: Map,
    /// The program that stands for none, and its number.
    none: (OwnedFd, u32),
}

impl Hooks {
    /// What is there of it, in a directory that exists.
    ///
    /// # Errors
    /// [`Error::Pin`] if it is not there, or something else is.
    fn open(sys: &Sys, slot: &Slot) -> Result<Hooks, Error> {
        let open = |path: &Path| {
            let gone = || Error::Pin { path: path.into(), why: "it is not there".to_string() };
            attach::open_pin(sys, path)?.ok_or_else(gone)
        };
        let (word, none) = (slot.hooks_word(), slot.hooks_none());
        let wrong = |path: &Path| Error::Pin { path: path.into(), why: "it is something else".to_string() };
        let map = sys.map(open(&word)?).ok().filter(|map| map.info().value_bytes == 8);
        let map = map.ok_or_else(|| wrong(&word))?;
        let program = open(&none)?;
        let ask = || Error::call(format!("ask what `{}` is", none.display()));
        if !sys.is_program(&program).map_err(ask())? {
            return Err(wrong(&none));
        }
        let id = sys.prog_info(&program).map_err(ask())?.id;
        Ok(Hooks { word: map, none: (program, id) })
    }

    /// The same, made if it is not there, unless another hook goes by one that was lost.
    fn make(sys: &Sys, slot: &Slot) -> Result<Hooks, Error> {
        let (word, none) = (slot.hooks_word(), slot.hooks_none());
        let fail = || Error::call("make what netfilter hooks share");
        if attach::open_pin(sys, &word)?.is_none() {
            for other in slot.at_other_hooks(sys)? {
                if attach::open_link(sys, &other)?.is_some() {
                    return Hooks::open(sys, slot);
                }
            }
            let spec = MapSpec {
                map_type: MapType::ARRAY.0,
                key_bytes: 4,
                value_bytes: 8,
                max_entries: 1,
                flags: MapFlags::MMAPABLE,
                name: NAME,
            };
            let map = sys.map_create(&spec).map_err(fail())?;
            sys.obj_pin(&map, &word).map_err(Error::disk(&word))?;
        }
        if attach::open_pin(sys, &none)?.is_none() {
            let program = load_none(sys).map_err(fail())?;
            sys.obj_pin(&program, &none).map_err(Error::disk(&none))?;
        }
        Hooks::open(sys, slot)
    }
}

/// Attaches what jumps to the current program, while none is.
///
/// # Errors
/// [`Error::PriorityTaken`], or the call that failed. Nothing is attached.
pub fn attach(sys: &Sys, slot: &Slot, mode: Option<Mode>, via: Via) -> Result<(), Error> {
    let Via::Dispatch { priority, defrag } = via else {
        return Err(Error::NoProgram(format!("no priority is chosen {}", slot.name)));
    };
    // What is left of an attempt that went no further.
    for pin in [slot.link(), slot.dispatch()] {
        sys.remove_file(&pin).map_err(Error::disk(&pin))?;
    }
    let spec = MapSpec {
        map_type: MapType::PROG_ARRAY.0,
        key_bytes: 4,
        value_bytes: 4,
        max_entries: PLACES.len() as u32,
        flags: 0,
        name: NAME,
    };
    let fail = || Error::call(format!("make what the program {} is reached by", slot.name));
    let hooks = Hooks::make(sys, slot)?;
    let places = sys.map_create(&spec).map_err(fail())?;
    put_everywhere(sys, &places, &hooks.none.0).map_err(fail())?;
    // A map of programs forgets them when nobody in userspace has it: the pin has.
    let pin = slot.dispatch();
    sys.obj_pin(&places, &pin).map_err(Error::disk(&pin))?;
    let dispatcher = load(sys, &places, &hooks.word, mode).map_err(fail())?;
    let spec = link_spec(slot, priority, defrag)?;
    let link = match sys.link_create(&dispatcher, &spec) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Err(taken(sys, slot, priority)),
        result => result.map_err(Error::call(format!("attach the program {}", slot.name)))?,
    };
    // Unpinned it would go with this process, and so it does if pinning fails.
    let pin = slot.link();
    sys.obj_pin(&link, &pin).map_err(Error::disk(&pin))
}

/// Puts programs, or none, in place of those that packets meet at hooks of one family, at all of them at once. The hooks
/// are locked.
///
/// # Errors
/// Packets meet what they met before.
pub fn exchange(sys: &Sys, new: &[(&Slot, Option<OwnedFd>)]) -> Result<(), Error> {
    let Some((slot, _)) = new.first() else { return Ok(()) };
    let fail = || Error::call(format!("replace the program {}", slot.name));
    let hooks = Hooks::open(sys, slot)?;
    let word = MapWords::new(sys, &hooks.word).map_err(fail())?;
    let change = word.get(0);
    word.failure().map_or(Ok(()), Err).map_err(fail())?;
    let [now, next] = sides(change);
    for other in slot.at_other_hooks(sys)? {
        if new.iter().all(|(slot, _)| slot.name != other.name) {
            level(sys, &hooks, &other, now, next)?;
        }
    }
    let mut changed = Vec::new();
    for (slot, program) in new {
        let places = attach::place(sys, slot)?.ok_or_else(|| Error::NotApplied(slot.name.to_string()))?;
        let program = program.as_ref().unwrap_or(&hooks.none.0);
        put(sys, &places, next, program).map_err(fail())?;
        changed.push((places, program));
    }
    word.set(0, change.wrapping_add(1)).map_err(fail())?;
    for (places, program) in changed {
        // Where this fails, the next change does it.
        let _ = put(sys, &places, now, program);
    }
    Ok(())
}

/// The places that packets go by after so many changes, and after the next.
const fn sides(change: u64) -> [[u8; 4]; 2] {
    match change & 1 {
        0 => PLACES,
        _ => [PLACES[1], PLACES[0]],
    }
}

/// Makes both places of a hook have the program that packets meet: a change that was cut short left them different.
fn level(sys: &Sys, hooks: &Hooks, slot: &Slot, now: [u8; 4], next: [u8; 4]) -> Result<(), Error> {
    let fail = || Error::call(format!("ask which program is current {}", slot.name));
    let Some(places) = attach::place(sys, slot)? else { return Ok(()) };
    let Some(current) = program_in(sys, &places, now).map_err(fail())? else { return Ok(()) };
    if program_in(sys, &places, next).map_err(fail())? == Some(current) {
        return Ok(());
    }
    let fail = || Error::call(format!("keep the program {}", slot.name));
    if current == hooks.none.1 {
        return put(sys, &places, next, &hooks.none.0).map_err(fail());
    }
    for generation in slot.generations_present(sys)? {
        let Some(program) = attach::open_pin(sys, &slot.program(generation))? else { continue };
        if sys.prog_info(&program).map_err(fail())?.id == current {
            return put(sys, &places, next, &program).map_err(fail());
        }
    }
    Err(Error::Pin { path: slot.pins().into(), why: format!("program {current} is not pinned there") })
}

fn link_spec(slot: &Slot, priority: i32, defrag: bool) -> Result<LinkSpec, Error> {
    let (family, hook) = (family_number(slot.name.family), hook_number(hook(slot)?));
    Ok(LinkSpec::Netfilter { family, hook, priority, defrag })
}

fn taken(sys: &Sys, slot: &Slot, priority: i32) -> Error {
    let by = hook(slot).map(|hook| coexist::netfilter(sys, slot.name.family, hook, priority));
    Error::PriorityTaken { place: slot.name.to_string(), priority, by: by.unwrap_or_default() }
}

/// A program that lets every packet on. It stands for none, and tries whether a priority of a hook is free, which nothing
/// else tells where the kernel has no nfnetlink_hook.
fn load_none(sys: &Sys) -> io::Result<OwnedFd> {
    let mut asm = Asm::new();
    asm.mov32(Reg::R0, netfilter::ACCEPT);
    asm.exit();
    load_code(sys, asm, &[])
}

/// Whether a link's program is still on its hook. The kernel tells neither of a link that was detached nor whose function
/// is at a priority, which another may have got since: a program that goes over all links reads it from the link itself
/// (net/netfilter/nf_bpf_link.c, `struct bpf_nf_link`).
pub fn is_linked(sys: &Sys, slot: &Slot, link: u32) -> Result<bool, Error> {
    let types = KernelTypes::read().map_err(Error::KernelTypes)?;
    let over = types.function("bpf_iter_bpf_link").map_err(Error::KernelTypes)?;
    let code = detached_links(types).map_err(Error::KernelTypes)?;
    let fail = Error::call(format!("ask whether the program {} is still attached", slot.name));
    let found = sys.iterate(NAME, &code, over).map_err(fail)?;
    Ok(found.as_chunks().0.iter().all(|id| u32::from_ne_bytes(*id) != link))
}

/// A program that writes down the numbers of all netfilter links that were detached.
fn detached_links(types: &KernelTypes) -> Result<Vec<u64>, KernelTypesError> {
    const META: i16 = 0;
    const LINK: i16 = 8;
    const ID: i16 = -8;
    const DEAD: i16 = -4;
    let [kind, number] = [types.field_offset("bpf_link", "type")?, types.field_offset("bpf_link", "id")?];
    let (dead, seq) =
        (types.field_offset("bpf_nf_link", "dead")?, types.field_offset("bpf_iter_meta", "seq")?);
    let mut a = Asm::new();
    let done = a.label();
    // `struct bpf_iter__bpf_link`: what goes over them, and one of them, or null at the end.
    a.load(Size::Dw, Reg::R6, Reg::R1, LINK);
    a.load(Size::Dw, Reg::R7, Reg::R1, META);
    a.jump64(Cond::Eq, Reg::R6, 0, done);
    a.load(Size::W, Reg::R2, Reg::R6, kind);
    a.jump32(Cond::Ne, Reg::R2, LINK_TYPE_NETFILTER, done);
    a.load(Size::W, Reg::R2, Reg::R6, number);
    a.store(Size::W, Reg::FP, ID, Reg::R2);
    a.mov64(Reg::R1, Reg::FP);
    a.alu64(AluOp::Add, Reg::R1, i32::from(DEAD));
    a.mov64(Reg::R2, 4);
    a.mov64(Reg::R3, Reg::R6);
    a.alu64(AluOp::Add, Reg::R3, i32::from(dead));
    a.call(Helper::PROBE_READ_KERNEL);
    a.load(Size::W, Reg::R2, Reg::FP, DEAD);
    a.jump32(Cond::Eq, Reg::R2, 0, done);
    a.load(Size::Dw, Reg::R1, Reg::R7, seq);
    a.mov64(Reg::R2, Reg::FP);
    a.alu64(AluOp::Add, Reg::R2, i32::from(ID));
    a.mov64(Reg::R3, 4);
    a.call(Helper::SEQ_WRITE);
    a.bind(done);
    a.mov32(Reg::R0, 0);
    a.exit();
    Ok(a.finish().expect("a fixed program assembles").slots)
}

/// The priority that a first program gets: the user's, or the highest free one.
///
/// # Errors
/// [`Error::PriorityTaken`] if none is free.
pub fn choose(sys: &Sys, slot: &Slot, order: Order) -> Result<Via, Error> {
    let fail = || Error::call(format!("find a free priority {}", slot.name));
    let program = load_none(sys).map_err(fail())?;
    let candidates = match order.priority {
        Some(priority) => priority..=priority,
        None => order.before.saturating_sub(PRIORITIES_TRIED)..=order.before.saturating_sub(1),
    };
    for priority in candidates.clone().rev() {
        match sys.link_create(&program, &link_spec(slot, priority, order.defrag)?) {
            Ok(_) => return Ok(Via::Dispatch { priority, defrag: order.defrag }),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            // net/netfilter/nf_bpf_link.c, `bpf_nf_check_pf_and_hooks`: before defragmentation, or at either end.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && order.priority.is_some() => {
                return Err(Error::Priority { priority, defrag: order.defrag });
            }
            Err(error) => return Err(fail()(error)),
        }
    }
    Err(taken(sys, slot, *candidates.end()))
}

/// The program that jumps: what it cannot reach it would leave to the kernel's own rules, or drop where there are none.
fn load(sys: &Sys, places: &Map, word: &Map, mode: Option<Mode>) -> io::Result<OwnedFd> {
    let mut asm = Asm::new();
    let [places_number, word_number] = [0, 1].map(polc_ir::entities::Map::from_u32);
    let (odd, unreachable) = (asm.label(), asm.label());
    asm.load_map_value(Reg::R2, word_number, 0);
    asm.load(Size::Dw, Reg::R3, Reg::R2, 0);
    asm.load_map(Reg::R2, places_number);
    asm.jump64(Cond::Set, Reg::R3, 1, odd);
    asm.mov64(Reg::R3, 0);
    asm.call(Helper::TAIL_CALL);
    asm.goto(unreachable);
    asm.bind(odd);
    asm.mov64(Reg::R3, 1);
    asm.call(Helper::TAIL_CALL);
    asm.bind(unreachable);
    asm.mov32(Reg::R0, if mode == Some(Mode::Replace) { netfilter::DROP } else { netfilter::ACCEPT });
    asm.exit();
    load_code(sys, asm, &[places, word])
}

/// Assembles and loads; map numbers in the code are indices into `maps`.
fn load_code(sys: &Sys, asm: Asm, maps: &[&Map]) -> io::Result<OwnedFd> {
    let mut code = asm.finish().expect("a fixed program assembles");
    for reloc in &code.relocs {
        let fd = maps[reloc.map.as_u32() as usize].as_fd().as_raw_fd();
        let slot = &mut code.slots[reloc.slot as usize];
        *slot = *slot & 0xffff_ffff | (fd as u64) << 32;
    }
    let spec = ProgramSpec {
        kind: ProgramType::NETFILTER,
        attach_type: ATTACH_NETFILTER,
        name: NAME,
        license: "GPL",
        slots: &code.slots,
        btf: None,
    };
    sys.prog_load(&spec, &mut [])
}

fn put(sys: &Sys, places: &Map, place: [u8; 4], program: impl AsFd) -> io::Result<()> {
    sys.map_update(places, &place, &program.as_fd().as_raw_fd().to_ne_bytes())
}

/// Puts `program` wherever packets may go by.
pub fn put_everywhere(sys: &Sys, places: &Map, program: impl AsFd) -> io::Result<()> {
    PLACES.iter().try_for_each(|place| put(sys, places, *place, program.as_fd()))
}

fn program_in(sys: &Sys, places: &Map, place: [u8; 4]) -> io::Result<Option<u32>> {
    let found = sys.map_lookup(places, &place)?;
    Ok(found.map(|id| u32::from_ne_bytes(id.try_into().expect("values of four bytes"))))
}

/// Number of the program that packets meet, of a slot's places; `None` if one stands for none.
///
/// # Errors
/// [`Error::Pin`], or the kernel does not tell.
pub fn current(sys: &Sys, slot: &Slot, places: &Map) -> Result<Option<u32>, Error> {
    let fail = || Error::call(format!("ask which program is current {}", slot.name));
    let hooks = Hooks::open(sys, slot)?;
    let word = sys.map_lookup(&hooks.word, &[0; 4]).map_err(fail())?;
    let change = word.map_or(0, |word| u64::from_ne_bytes(word.try_into().expect("values of eight bytes")));
    let found = program_in(sys, places, sides(change)[0]).map_err(fail())?;
    Ok(found.filter(|id| *id != hooks.none.1))
}
