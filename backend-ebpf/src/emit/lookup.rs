//! Look-up steps: a line of operations becomes a line of instructions.
//!
//! All tables of a plan are one read-only map, each table at its own offset, the small ones first: a register points
//! into their midst, so that those within reach of an instruction's displacement are read by an addition and a load. An
//! offset is masked to its table unless it follows from what the tables hold that it can't lead out, and from the
//! operations alone, by the reasoning of the kernel's verifier, that it can't lead out of the map. The last read turns the exit's number into a word that says
//! what to do; all exits that only end share the code that counts and returns.

use std::borrow::Cow;

use polc_ir::entities::{Data, Map, Step};
use polc_ir::env::Attach;
use polc_ir::outcome::Verdict;
use polc_ir::plan::{
    AluKind, DataTable, Known, LookupStep, Op, Operand as OpOperand, PlanExit, StepData, Target as PlanTarget,
};

use super::steps::StepLabels;
use super::values::{TABLES, Values};
use super::{Emitter, TABLES_MAP, return_code};
use crate::abi;
use crate::asm::Label;
use crate::insn::{AluOp, Cond, Operand, Reg, Size};
use crate::object::{DataSection, MapDef};

/// Tables begin at multiples of a cache line.
const ALIGN: usize = 64;

/// How far a displacement reaches, forwards and back: where the register for tables points, if there is so much.
const REACH: u32 = 1 << 15;

/// Where an exit word has its kind.
const KIND_SHIFT: i32 = 30;
/// Count in the slot of the lower bits and let the packet on.
const PASS: u32 = 0;
/// Count in the slot of the lower bits and drop the packet.
const DROP: u32 = 1;
/// Go on in the walk table. The lower bits are a reference, its two highest bits moved down to follow the index.
const WALK: u32 = 2;
/// Take the exit that the lower bits number.
const CODE: u32 = 3;

/// In place of a return code: the packet does not end here.
const ELSEWHERE: u8 = 0x80;

/// What lies in the map of tables.
enum Block {
    Table(Data),
    Exits(Step),
    Codes(Step),
}

impl Emitter<'_> {
    /// Lays the plan's tables and the exit words of its look-up steps out in one map.
    pub(super) fn add_tables(&mut self) {
        let plan = self.plan;
        if plan.steps.values().all(|step| !matches!(step, StepData::Lookup(_))) {
            return;
        }
        // The small ones first, within reach of displacements.
        let mut blocks: Vec<(Block, Cow<'_, [u8]>)> = plan
            .tables
            .iter()
            .map(|(table, data)| (Block::Table(table), data.bytes.as_slice().into()))
            .collect();
        for (step, data) in plan.steps.iter() {
            if let StepData::Lookup(data) = data {
                let words = (0..).zip(&data.exits).map(|(index, exit)| self.exit_word(index, exit));
                let mut bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
                // Padding is read by no packet; the verifier must not see a number that leads nowhere.
                let last = bytes[bytes.len() - 4..].to_vec();
                while !(bytes.len() / 4).is_power_of_two() {
                    bytes.extend_from_slice(&last);
                }
                if self.first_slot(data).is_none() || data.exits.iter().any(|exit| !self.ends(exit)) {
                    blocks.push((Block::Exits(step), bytes.into()));
                }
                if self.first_slot(data).is_some() {
                    let mut codes: Vec<u8> = data.exits.iter().map(|exit| self.exit_code(exit)).collect();
                    codes.resize(codes.len().next_power_of_two(), codes.last().copied().unwrap_or(0));
                    blocks.push((Block::Codes(step), codes.into()));
                }
            }
        }
        blocks.sort_by_key(|(_, bytes)| bytes.len());
        let mut bytes: Vec<u8> = Vec::new();
        self.table_offsets = vec![0; plan.tables.len()];
        self.exactly = plan.tables.values().map(DataTable::known).collect();
        for (block, contents) in blocks {
            bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
            match block {
                Block::Table(table) => self.table_offsets[table.as_u32() as usize] = bytes.len() as u32,
                Block::Exits(step) => {
                    self.exit_offsets.insert(step, bytes.len() as u32);
                }
                Block::Codes(step) => {
                    self.code_offsets.insert(step, bytes.len() as u32);
                }
            }
            bytes.extend_from_slice(&contents);
        }
        self.tables_midst = if bytes.len() > REACH as usize { REACH } else { 0 };
        self.tables = Some(self.maps.push(MapDef::data(TABLES_MAP, DataSection::Rodata, bytes)));
    }

    fn exit_word(&self, index: u32, exit: &PlanExit) -> u32 {
        match exit {
            PlanExit::End(slot) if !self.plan.traces[*slot as usize].if_absent => {
                let [pass, drop] = self.codes();
                let code = self.return_code(*slot);
                debug_assert!(code == pass || code == drop, "there are two return codes");
                slot | (if code == drop { DROP } else { PASS }) << KIND_SHIFT
            }
            PlanExit::Then { count: None, writes, next: PlanTarget::Walk(reference) }
                if writes.is_empty() =>
            {
                let reference = self.reference(*reference);
                // The index, then the two bits that say what it is an index of.
                (reference & 0x0fff_ffff) | reference >> 30 << 28 | WALK << KIND_SHIFT
            }
            _ => index | CODE << KIND_SHIFT,
        }
    }

    /// Whether an exit counts and returns.
    fn ends(&self, exit: &PlanExit) -> bool {
        matches!(exit, PlanExit::End(slot) if !self.plan.traces[*slot as usize].if_absent)
    }

    /// The slot of a step's first exit, if those that end count in one slot after the other: then the number of the exit
    /// is that of the slot, and nothing but the return code has to be read.
    fn first_slot(&self, data: &LookupStep) -> Option<u32> {
        let mut first = None;
        for (index, exit) in (0u32..).zip(&data.exits) {
            match exit {
                PlanExit::End(slot) if self.ends(exit) => {
                    let of_first = slot.checked_sub(index)?;
                    if *first.get_or_insert(of_first) != of_first {
                        return None;
                    }
                }
                _ => {}
            }
        }
        first
    }

    /// An exit's return code, more by [`Emitter::code_bias`]; [`ELSEWHERE`] if it does not end.
    fn exit_code(&self, exit: &PlanExit) -> u8 {
        match exit {
            PlanExit::End(slot) if self.ends(exit) => (self.return_code(*slot) + self.code_bias()) as u8,
            _ => ELSEWHERE,
        }
    }

    /// What return codes are more in a table of bytes, so that none is negative.
    fn code_bias(&self) -> i32 {
        match self.target.attach {
            Attach::TcIngress | Attach::TcEgress => 1,
            Attach::Xdp | Attach::Netfilter => 0,
        }
    }

    /// The return codes that let on and drop.
    fn codes(&self) -> [i32; 2] {
        let mode = polc_ir::env::Mode::Accelerate;
        [Verdict::Accept, Verdict::Drop].map(|verdict| return_code(self.target.attach, mode, verdict))
    }

    pub(super) fn lookup(&mut self, step: Step, data: &LookupStep, labels: &mut StepLabels) {
        let Some(map) = self.tables else {
            self.goto_bail();
            return;
        };
        let Some(result) = self.operations(data, map) else {
            // A plan that `Plan::verify` accepts has no more values at a time than there are registers.
            self.goto_bail();
            return;
        };
        let words = data.exits.len().next_power_of_two();
        self.asm.alu64(AluOp::And, result, (words - 1) as i32);
        let mut result = result;
        if let Some(first) = self.first_slot(data) {
            let a = &mut self.asm;
            a.comment("the exit's return code, and its slot");
            if result != Reg::R8 {
                a.mov64(Reg::R8, result);
            }
            a.mov64(Reg::R9, Reg::R8);
            let (address, at) = self.table_address(map, self.code_offsets[&step], Reg::R9);
            self.asm.load(Size::B, Reg::R9, address, at);
            let only_ends = data.exits.iter().all(|exit| self.ends(exit));
            let bias = self.code_bias();
            let a = &mut self.asm;
            let elsewhere = a.label();
            if !only_ends {
                a.jump32(Cond::Eq, Reg::R9, i32::from(ELSEWHERE), elsewhere);
            }
            if bias != 0 {
                a.alu64(AluOp::Sub, Reg::R9, bias);
            }
            if first != 0 {
                a.alu64(AluOp::Add, Reg::R8, first as i32);
            }
            a.goto(self.count);
            if only_ends {
                return;
            }
            a.bind(elsewhere);
            result = Reg::R8;
        }
        let a = &mut self.asm;
        a.comment("what the exit's word says");
        a.alu64(AluOp::Lsh, result, 2);
        let (address, at) = self.table_address(map, self.exit_offsets[&step], result);
        self.asm.load(Size::W, Reg::R8, address, at);
        let words: Vec<u32> =
            (0..).zip(&data.exits).map(|(index, exit)| self.exit_word(index, exit)).collect();
        let has = |kind: u32| words.iter().any(|word| word >> KIND_SHIFT == kind);
        let ends = self.first_slot(data).is_none() && (has(PASS) || has(DROP));
        let [pass, drop] = self.codes();
        let other = self.asm.label();
        if ends {
            let a = &mut self.asm;
            a.mov64(Reg::R9, Reg::R8);
            a.alu64(AluOp::Rsh, Reg::R9, KIND_SHIFT);
            if has(WALK) || has(CODE) {
                a.jump32(Cond::Gt, Reg::R9, DROP as i32, other);
            }
            // The return code from the kind: 0 lets on, 1 drops.
            a.alu32(AluOp::Mul, Reg::R9, drop - pass);
            a.alu32(AluOp::Add, Reg::R9, pass);
            a.alu64(AluOp::And, Reg::R8, (1 << KIND_SHIFT) - 1);
            a.goto(self.count);
        }
        self.asm.bind(other);
        if has(WALK) {
            let code = self.asm.label();
            let walk = labels.use_walk();
            let a = &mut self.asm;
            if has(CODE) {
                a.mov64(Reg::R9, Reg::R8);
                a.alu64(AluOp::Rsh, Reg::R9, KIND_SHIFT);
                a.jump32(Cond::Eq, Reg::R9, CODE as i32, code);
            }
            a.comment("on in the walk table");
            a.mov64(Reg::R9, Reg::R8);
            a.alu64(AluOp::Rsh, Reg::R9, 28);
            a.alu64(AluOp::Lsh, Reg::R9, 30);
            a.alu64(AluOp::And, Reg::R8, 0x0fff_ffff);
            a.alu64(AluOp::Or, Reg::R8, Reg::R9);
            a.store(Size::W, Reg::FP, abi::HANDOVER, Reg::R8);
            a.goto(walk);
            a.bind(code);
        }
        let by_code: Vec<u32> = (0..)
            .zip(&words)
            .filter(|(_, word)| *word >> KIND_SHIFT == CODE)
            .map(|(index, _)| index)
            .collect();
        if !by_code.is_empty() {
            self.asm.alu64(AluOp::And, Reg::R8, (1 << KIND_SHIFT) - 1);
            self.dispatch(data, &by_code, labels);
        }
    }

    /// Goes to the exit whose number is in `r8`, by halving the numbers.
    fn dispatch(&mut self, data: &LookupStep, exits: &[u32], labels: &mut StepLabels) {
        let mut pending: Vec<(&[u32], Option<Label>)> = vec![(exits, None)];
        while let Some((mut exits, label)) = pending.pop() {
            if let Some(label) = label {
                self.asm.bind(label);
            }
            while exits.len() > 1 {
                let (low, high) = exits.split_at(exits.len() / 2);
                let above = self.asm.label();
                self.asm.jump32(Cond::Ge, Reg::R8, high[0] as i32, above);
                pending.push((high, Some(above)));
                exits = low;
            }
            self.exit(&data.exits[exits[0] as usize], labels);
        }
    }

    /// The operations; gives the register of the result. `None` if there is no room for the values.
    fn operations(&mut self, data: &LookupStep, map: Map) -> Option<Reg> {
        let known = data.known(&self.plan.tables);
        let exactly = data.known_by(&|table| self.exactly[table.as_u32() as usize]);
        self.asm.load_map_value(TABLES, map, self.tables_midst);
        let mut values = Values::new(data);
        for (value, op) in data.ops.iter() {
            if !values.is_written(value) {
                continue;
            }
            let asm = &mut self.asm;
            let layout = self.layout;
            match *op {
                Op::Word(_) | Op::Const(_) => unreachable!("given values are made where they are used"),
                Op::Alu(kind, a, b) => {
                    let source = values.bring(asm, layout, a)?;
                    let b: Operand = match b {
                        OpOperand::Value(b) => values.bring(asm, layout, b)?.into(),
                        OpOperand::Const(b) => (b as i32).into(),
                    };
                    // The result takes the place of the first operand, unless the second needs that one.
                    let reuse = if b == Operand::Reg(source) { None } else { Some(a) };
                    let into = values.define(asm, value, reuse)?;
                    if into != source {
                        asm.mov64(into, source);
                    }
                    let op = match kind {
                        AluKind::Add => AluOp::Add,
                        AluKind::Sub => AluOp::Sub,
                        AluKind::Mul => AluOp::Mul,
                        AluKind::And => AluOp::And,
                        AluKind::Or => AluOp::Or,
                        AluKind::Xor => AluOp::Xor,
                        AluKind::Shl => AluOp::Lsh,
                        AluKind::Shr => AluOp::Rsh,
                        AluKind::Sar => AluOp::Arsh,
                    };
                    asm.alu64(op, into, b);
                }
                Op::Read(table, offset) => {
                    let source = values.bring(asm, layout, offset)?;
                    let into = values.define(asm, value, Some(offset))?;
                    let offset = offset.as_u32() as usize;
                    self.read(map, table, into, source, known[offset], exactly[offset]);
                }
            }
            values.done(data, value);
        }
        values.bring(&mut self.asm, self.layout, data.result)
    }

    /// Reads the element at an offset, of which the verifier works out what is `known`; it is what it is `exactly`.
    fn read(&mut self, map: Map, table: Data, into: Reg, offset: Reg, known: Known, exactly: Known) {
        let table_data = &self.plan.tables[table];
        let (width, mask) = (table_data.width, table_data.mask());
        let size = match width {
            1 => Size::B,
            2 => Size::H,
            4 => Size::W,
            _ => Size::Dw,
        };
        let base = self.table_offsets[table.as_u32() as usize];
        // Inside the table by what its offsets are, and inside the map by what the verifier knows of them.
        let map_bytes = self.maps[map].contents().map_or(0, <[u8]>::len) as u64;
        let inside = exactly.max <= mask
            && exactly.zeros >= u32::from(width).trailing_zeros()
            && known.max <= map_bytes - u64::from(base) - u64::from(width);
        let a = &mut self.asm;
        if into != offset {
            a.mov64(into, offset);
        }
        if !inside {
            // Object data is at most 2^29 bytes.
            a.alu64(AluOp::And, into, mask as i32);
        }
        let (address, at) = self.table_address(map, base, into);
        self.asm.load(size, into, address, at);
    }

    /// Adds what is at `base` in the map of tables to an offset in a register: the register that has the address then, which
    /// is the same or `r0`, and the displacement to it.
    fn table_address(&mut self, map: Map, base: u32, offset: Reg) -> (Reg, i16) {
        let a = &mut self.asm;
        match i16::try_from(i64::from(base) - i64::from(self.tables_midst)) {
            Ok(displacement) => {
                a.alu64(AluOp::Add, offset, TABLES);
                (offset, displacement)
            }
            Err(_) => {
                a.load_map_value(Reg::R0, map, base);
                a.alu64(AluOp::Add, Reg::R0, offset);
                (Reg::R0, 0)
            }
        }
    }
}
