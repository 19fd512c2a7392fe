//! Membership in sets: from key words to a word that says whether the packet is in a set, by tables.
//!
//! A table is a data map of its own, so that its words can change while the program runs; how it is laid out, and in
//! which order words may be read, is in [`polc_ir::plan::set`]. For each level in turn the key is put together from
//! constants and words of the stack, its two buckets are found, and the eight slots are compared. Nothing that is
//! loaded decides where another load goes, so the levels' loads overlap. Keys of one word are compared without jumps.
//! For longer ones a slot that matches leads to the one place that looks at its cell: the registers there say the same
//! whatever the slot, so the verifier follows it once.
//!
//! | register | holds |
//! | --- | --- |
//! | `r7` | the key's first word |
//! | `r8` | the first word of the first bucket, then of the slot found |
//! | `r9` | of the second bucket |
//! | `r5` | the path of the five bits behind the key |
//!
//! Further words of the key are in the buffer.

use polc_ir::entities::Map;
use polc_ir::hook::Family;
use polc_ir::packet::extension::kind;
use polc_ir::plan::set::{CELL_BITS, Half, MULTIPLIER, SLOTS, SetShape, USED_WORD};
use polc_ir::plan::{KeySlot, MemberPart, NumberWords};
use polc_ir::set::port::{Compared, WITH_HEADER};

use super::{DEVICE_NAMES_MAP, Emitter, SET_MAP_PREFIX};
use crate::abi;
use crate::asm::{Asm, Label};
use crate::insn::{AluOp, Cond, Operand, Reg, Size};
use crate::manifest::SetManifest;
use crate::object::{DataSection, MapDef};

/// Bytes of a device's name as a number.
const NAME_BYTES: usize = 16;

/// Where a port's number is kept while its set is looked up: behind the key's further words.
const PORT: i16 = abi::BUFFER + 40;
const _: () = assert!(PORT + 8 <= abi::BUFFER + abi::BUFFER_BYTES);

/// Where the name of a device is: in sets that have one, keys are four words at most.
const DEVICE: i16 = abi::BUFFER + 24;
const _: () = assert!(DEVICE + 16 <= PORT);

impl Emitter<'_> {
    /// Adds the tables of sets, and what the manifest says about them.
    pub(super) fn add_sets(&mut self) {
        let plan = self.plan;
        for (&set, table) in &plan.set_tables {
            let data = &plan.sets[set];
            let name = format!("{SET_MAP_PREFIX}{}", set.as_u32());
            self.set_manifests.push(SetManifest {
                name: data.name.clone(),
                map: name.clone(),
                create: data.create.clone(),
                live: data.live,
                elements_max: data.elements_max,
                shape: table.shape.clone(),
            });
            let map = self.maps.push(MapDef::data(name, DataSection::Data, table.bytes()));
            self.sets.insert(set, map);
        }
        let names_devices = |numbers: &NumberWords| matches!(numbers, NumberWords::Device { .. });
        if plan.members.iter().flat_map(|step| &step.parts).any(|part| part.numbers.iter().any(names_devices))
        {
            let classes = plan.devices.names.len().next_power_of_two();
            let names =
                (0..classes as u32).flat_map(|class| plan.devices.name(class).to_le_bytes()).collect();
            self.device_names =
                Some(self.maps.push(MapDef::data(DEVICE_NAMES_MAP, DataSection::Data, names)));
        }
    }

    /// Computes the words that say whether the packet is in a set.
    pub(super) fn members(&mut self) {
        let plan = self.plan;
        for step in &plan.members {
            self.asm.comment(format!("{}", step.derived));
            let (member, done) = (self.asm.label(), self.asm.label());
            // A table without second cells has no element that is `nomatch`.
            let may_hold = |part: &&MemberPart| !part.nomatch || plan.set_tables[&part.set].shape.nomatch;
            let parts: Vec<&MemberPart> = step.parts.iter().filter(may_hold).collect();
            if parts.is_empty() {
                continue;
            }
            for part in parts {
                let other = self.asm.label();
                self.look_up(part, member, other);
                self.asm.bind(other);
            }
            self.asm.goto(done);
            self.asm.bind(member);
            self.set(step.slot);
            self.asm.bind(done);
        }
    }

    /// Stores 1 in a place that has 0. `r0` and `r5` are lost.
    fn set(&mut self, slot: KeySlot) {
        let place = self.layout.word(slot.word);
        if slot.flag.is_none() {
            self.asm.store(Size::W, Reg::FP, place, 1);
        } else {
            self.asm.load(Size::W, Reg::R0, Reg::FP, place);
            self.asm.alu32(AluOp::Or, Reg::R0, Operand::bits(slot.own()));
            self.asm.store(Size::W, Reg::FP, place, Reg::R0);
        }
        self.forget_word(slot.word);
    }

    /// Goes to `member` if the packet is in a set, else to `other`.
    fn look_up(&mut self, part: &MemberPart, member: Label, other: Label) {
        let plan = self.plan;
        let (shape, map) = (&plan.set_tables[&part.set].shape, self.sets[&part.set]);
        for numbers in &part.numbers {
            self.port_number(numbers);
            self.device_name(numbers);
        }
        for level in 0..shape.levels.len() {
            let next = self.asm.label();
            self.level(shape, map, part, level, (member, other, next));
            self.asm.bind(next);
        }
        self.asm.goto(other);
    }

    /// Puts what [`NumberWords::Device`] is to its place, its least significant word first.
    fn device_name(&mut self, numbers: &NumberWords) {
        let (&NumberWords::Device { word }, Some(names)) = (numbers, self.device_names) else { return };
        let classes = self.maps[names].contents().map_or(1, |contents| contents.len() / NAME_BYTES);
        let a = &mut self.asm;
        a.load(Size::W, Reg::R1, Reg::FP, self.layout.word(word));
        a.alu64(AluOp::And, Reg::R1, (classes - 1) as i32);
        a.alu64(AluOp::Mul, Reg::R1, NAME_BYTES as i32);
        a.load_map_value(Reg::R2, names, 0);
        a.alu64(AluOp::Add, Reg::R2, Reg::R1);
        for at in [0, 8] {
            a.load(Size::Dw, Reg::R1, Reg::R2, at);
            a.store(Size::Dw, Reg::FP, DEVICE + at, Reg::R1);
        }
    }

    /// Puts what [`NumberWords::Port`] is to its place.
    fn port_number(&mut self, numbers: &NumberWords) {
        let NumberWords::Port { family, proto, port, icmp, l4_len, frag_offset } = *numbers else { return };
        let [proto, port, icmp, l4_len] = [proto, port, icmp, l4_len].map(|word| self.layout.word(word));
        let frag_offset = frag_offset.map(|word| self.layout.word(word));
        let a = &mut self.asm;
        let (compared, none, done) = (a.label(), a.label(), a.label());
        let (has_port, has_type) = (a.label(), a.label());
        let whole = |a: &mut Asm| {
            if let Some(frag_offset) = frag_offset {
                a.load(Size::W, Reg::R2, Reg::FP, frag_offset);
                a.jump32(Cond::Ne, Reg::R2, 0, none);
            }
        };
        a.load(Size::W, Reg::R1, Reg::FP, proto);
        a.load(Size::W, Reg::R3, Reg::FP, l4_len);
        for (number, bytes, compared) in WITH_HEADER {
            let (other, to) = (a.label(), if compared == Compared::Port { has_port } else { has_type });
            a.jump32(Cond::Ne, Reg::R1, i32::from(number), other);
            a.jump32(Cond::Ge, Reg::R3, i32::from(bytes), to);
            a.goto(none);
            a.bind(other);
        }
        if family == Family::V6 {
            a.jump32(Cond::Eq, Reg::R1, i32::from(kind::NONE), none);
            whole(a);
        }
        a.mov64(Reg::R2, 0);
        a.goto(compared);
        a.bind(has_type);
        whole(a);
        a.load(Size::W, Reg::R2, Reg::FP, icmp);
        a.goto(compared);
        a.bind(has_port);
        whole(a);
        a.load(Size::W, Reg::R2, Reg::FP, port);
        a.bind(compared);
        // Loaded anew, since the verifier tells apart what it was compared with.
        a.load(Size::W, Reg::R1, Reg::FP, proto);
        a.alu64(AluOp::Lsh, Reg::R1, 16);
        a.alu64(AluOp::Or, Reg::R1, Reg::R2);
        a.goto(done);
        a.bind(none);
        // 0, but not to the verifier, which would follow it apart: a packet has less than 2^31 bytes.
        a.load(Size::W, Reg::R1, Reg::FP, l4_len);
        a.alu32(AluOp::Rsh, Reg::R1, 31);
        a.bind(done);
        a.store(Size::W, Reg::FP, PORT + 4, Reg::R1);
    }

    fn level(
        &mut self,
        shape: &SetShape,
        map: Map,
        part: &MemberPart,
        level: usize,
        (member, other, next): (Label, Label, Label),
    ) {
        let count = shape.key_words();
        let table = polc_ir::plan::set::HEADER_WORDS as u32 * 8;
        if shape.live {
            self.asm.load_map_value(Reg::R0, map, 8 * USED_WORD as u32);
            self.asm.load(Size::Dw, Reg::R0, Reg::R0, 0);
            self.asm.alu64(AluOp::Rsh, Reg::R0, level as i32);
            self.asm.alu64(AluOp::And, Reg::R0, 1);
            self.asm.jump64(Cond::Eq, Reg::R0, 0, next);
        }
        self.key(shape, part, level);
        self.hash(count);
        let a = &mut self.asm;
        // The upper half chooses the group, the quarters of the lower half the buckets in it.
        a.mov64(Reg::R2, Reg::R1);
        a.alu64(AluOp::Rsh, Reg::R2, 32);
        a.alu64(AluOp::Mul, Reg::R2, shape.groups as i32);
        a.alu64(AluOp::Rsh, Reg::R2, 32);
        a.alu64(AluOp::Mul, Reg::R2, 8 * shape.group_words() as i32);
        a.load_map_value(Reg::R8, map, table);
        a.alu64(AluOp::Add, Reg::R8, Reg::R2);
        a.mov64(Reg::R9, Reg::R8);
        for (bucket, shift) in [(Reg::R8, 16), (Reg::R9, 0)] {
            a.mov64(Reg::R2, Reg::R1);
            if shift > 0 {
                a.alu64(AluOp::Rsh, Reg::R2, shift);
            }
            a.alu64(AluOp::And, Reg::R2, 0xffff);
            a.alu64(AluOp::Mul, Reg::R2, shape.group_buckets() as i32);
            a.alu64(AluOp::Rsh, Reg::R2, 16);
            a.alu64(AluOp::Mul, Reg::R2, 8 * shape.bucket_words() as i32);
            a.alu64(AluOp::Add, bucket, Reg::R2);
        }
        self.path(shape, map, part, level);
        if shape.nomatch || count > 1 {
            self.compare(shape, part.nomatch, (member, other, next));
        } else {
            self.gather(shape, member);
        }
    }

    /// Looks for the slot that has the key, and then at its cell.
    fn compare(&mut self, shape: &SetShape, nomatch: bool, (member, other, next): (Label, Label, Label)) {
        let (count, slot_bytes) = (shape.key_words(), 8 * shape.slot_words() as i32);
        let a = &mut self.asm;
        let cell = a.label();
        let mut found: Vec<(Label, Reg, i16)> = Vec::new();
        for bucket in [Reg::R8, Reg::R9] {
            for slot in 0..SLOTS {
                let at = (slot as i32 * slot_bytes) as i16;
                let here = a.label();
                a.load(Size::Dw, Reg::R0, bucket, at);
                if count == 1 {
                    a.jump64(Cond::Eq, Reg::R0, Reg::R7, here);
                } else {
                    let differs = a.label();
                    a.jump64(Cond::Ne, Reg::R0, Reg::R7, differs);
                    for word in 1..count {
                        a.load(Size::Dw, Reg::R0, bucket, at + 8 * word as i16);
                        a.load(Size::Dw, Reg::R1, Reg::FP, abi::BUFFER + 8 * (word as i16 - 1));
                        a.jump64(Cond::Ne, Reg::R0, Reg::R1, differs);
                    }
                    a.goto(here);
                    a.bind(differs);
                }
                found.push((here, bucket, at + 8 * count as i16));
            }
        }
        a.goto(next);
        for (here, bucket, at) in found {
            a.bind(here);
            a.load(Size::Dw, Reg::R1, bucket, at);
            if shape.nomatch {
                a.load(Size::Dw, Reg::R2, bucket, at + 8);
            }
            a.goto(cell);
        }
        a.bind(cell);
        a.alu64(AluOp::And, Reg::R1, Reg::R5);
        a.jump64(Cond::Eq, Reg::R1, 0, next);
        if shape.nomatch {
            // The highest bit found is in one of the two numbers, and makes it the larger.
            a.alu64(AluOp::And, Reg::R2, Reg::R1);
            a.alu64(AluOp::Xor, Reg::R1, Reg::R2);
            let cond = if nomatch { Cond::Gt } else { Cond::Lt };
            a.jump64(cond, Reg::R2, Reg::R1, member);
            a.goto(other);
        } else {
            a.goto(member);
        }
    }

    /// Where a key is one word, and any element that covers the packet makes it a member: gathers the cell of the slot
    /// that has the key without a jump, since which slot it is can't be foretold.
    fn gather(&mut self, shape: &SetShape, member: Label) {
        let slot_bytes = 8 * shape.slot_words() as i16;
        let a = &mut self.asm;
        a.mov64(Reg::R4, 0);
        for bucket in [Reg::R8, Reg::R9] {
            for slot in 0..SLOTS as i16 {
                a.load(Size::Dw, Reg::R0, bucket, slot * slot_bytes);
                a.alu64(AluOp::Xor, Reg::R0, Reg::R7);
                // Ones if nothing differs, zeros if anything does: only 0 has a sign that taking 1 changes to set.
                a.mov64(Reg::R1, Reg::R0);
                a.alu64(AluOp::Sub, Reg::R1, 1);
                a.alu64(AluOp::Xor, Reg::R0, -1);
                a.alu64(AluOp::And, Reg::R0, Reg::R1);
                a.alu64(AluOp::Arsh, Reg::R0, 63);
                a.load(Size::Dw, Reg::R1, bucket, slot * slot_bytes + 8);
                a.alu64(AluOp::And, Reg::R0, Reg::R1);
                a.alu64(AluOp::Or, Reg::R4, Reg::R0);
            }
        }
        a.alu64(AluOp::And, Reg::R4, Reg::R5);
        a.jump64(Cond::Ne, Reg::R4, 0, member);
    }

    /// The key's words: the first to `r7`, the others to the buffer.
    fn key(&mut self, shape: &SetShape, part: &MemberPart, level: usize) {
        let halves = shape.halves();
        for word in (0..shape.key_words()).rev() {
            let into = if word == 0 { Reg::R7 } else { Reg::R1 };
            let low = halves[2 * word];
            self.half(shape, part, level, low, into);
            if word == 0 {
                self.asm.alu64(AluOp::Or, into, level as i32 + 1);
            }
            if let Some(&high) = halves.get(2 * word + 1)
                && self.half(shape, part, level, high, Reg::R0)
            {
                self.asm.alu64(AluOp::Lsh, Reg::R0, 32);
                self.asm.alu64(AluOp::Or, into, Reg::R0);
            }
            if word > 0 {
                self.asm.store(Size::Dw, Reg::FP, abi::BUFFER + 8 * (word as i16 - 1), into);
            }
        }
    }

    /// Loads a piece of the key; false if it is 0.
    fn half(&mut self, shape: &SetShape, part: &MemberPart, level: usize, half: Half, into: Reg) -> bool {
        let dimension = usize::from(half.dimension);
        let mask = (shape.mask(level, dimension) >> (32 * half.index)) as u32;
        if mask == 0 {
            self.asm.mov64(into, 0);
            return false;
        }
        let own = self.number(&part.numbers[dimension], half.index, into);
        if mask & own != own {
            self.asm.alu32(AluOp::And, into, Operand::bits(mask & own));
        }
        true
    }

    /// Loads 32 bits of a number; gives the bits that it may have.
    fn number(&mut self, numbers: &NumberWords, index: u8, into: Reg) -> u32 {
        match *numbers {
            NumberWords::Words { word, words, mask } => {
                self.asm.load(Size::W, into, Reg::FP, self.layout.word(word + words - 1 - index));
                if index == 0 && mask != u32::MAX {
                    self.asm.alu32(AluOp::And, into, Operand::bits(mask));
                    mask
                } else {
                    u32::MAX
                }
            }
            NumberWords::Device { .. } => {
                self.asm.load(Size::W, into, Reg::FP, DEVICE + 4 * i16::from(index));
                u32::MAX
            }
            NumberWords::Port { .. } => {
                self.asm.load(Size::W, into, Reg::FP, PORT + 4);
                0xff_ffff
            }
        }
    }

    /// `r1` = the hash of the key.
    fn hash(&mut self, words: usize) {
        let a = &mut self.asm;
        a.load_imm64(Reg::R3, MULTIPLIER);
        a.mov64(Reg::R1, Reg::R7);
        for word in 0..words {
            if word > 0 {
                a.load(Size::Dw, Reg::R2, Reg::FP, abi::BUFFER + 8 * (word as i16 - 1));
                a.alu64(AluOp::Xor, Reg::R1, Reg::R2);
            }
            a.alu64(AluOp::Mul, Reg::R1, Reg::R3);
            a.mov64(Reg::R2, Reg::R1);
            a.alu64(AluOp::Rsh, Reg::R2, 32);
            a.alu64(AluOp::Xor, Reg::R1, Reg::R2);
        }
        a.alu64(AluOp::Mul, Reg::R1, Reg::R3);
    }

    /// `r5` = the path of the five bits behind the key.
    fn path(&mut self, shape: &SetShape, map: Map, part: &MemberPart, level: usize) {
        let cell = usize::from(shape.cell);
        let behind = shape.widths[cell] - shape.levels[level][cell] - CELL_BITS;
        let (low, shift) = (behind / 32, behind % 32);
        let numbers = &part.numbers[cell];
        self.number(numbers, low, Reg::R1);
        if shift + CELL_BITS > 32 {
            self.number(numbers, low + 1, Reg::R0);
            self.asm.alu64(AluOp::Lsh, Reg::R0, 32);
            self.asm.alu64(AluOp::Or, Reg::R1, Reg::R0);
        }
        let a = &mut self.asm;
        if shift > 0 {
            a.alu64(AluOp::Rsh, Reg::R1, i32::from(shift));
        }
        a.alu64(AluOp::And, Reg::R1, (1 << CELL_BITS) - 1);
        a.alu64(AluOp::Lsh, Reg::R1, 3);
        a.load_map_value(Reg::R5, map, 0);
        a.alu64(AluOp::Add, Reg::R5, Reg::R1);
        a.load(Size::Dw, Reg::R5, Reg::R5, 0);
    }
}
