//! The walk: stages decided by a table of nodes, and the loop that reads it.
//!
//! The code is the same whatever the table holds. Nodes and exits are records of 32 bytes in read-only data, padded to
//! a power of two, so that a mask bounds every reference. A turn of the loop takes [`STEPS_PER_TURN`] steps from node
//! to node without a jump (which way a test goes is computed), and at its start and before the last asks whether it has
//! come to something other than a test; a step from there stays there.
//!
//! That shape is made for the verifier, which follows the loop turn by turn. Inside a loop it remembers a state only
//! at jumps and their targets, only once 100 instructions have passed since the last, and forgets one that three later
//! turns did not match (kernel/bpf/verifier.c, `is_state_visited`). A turn is just so long that the state remembered is
//! the one at its end, where the rarer paths join again and most are done. Steps that asked each time were measured
//! at 390 processed instructions a step, these at 630 a turn of five steps. That bounds how many turns a packet may
//! take, [`WALK_TURNS_MAX`]; a table that needs more is refused here, with the numbers, before the kernel would.

use cranelift_entity::PrimaryMap;
use polc_ir::diag::Diagnostic;
use polc_ir::entities::Map;
use polc_ir::limits::{VERIFIER_PROCESSED_MAX, WALK_TURNS_MAX};
use polc_ir::plan::{PlanExit, Target as PlanTarget, WalkNode, WalkRef, WordWrite};
use polc_ir::ruleset::EffectTestKind;

use super::{Emitter, WALK_MAP, WALK_TOO_DEEP};
use crate::abi::{self, KeyLayout, exit, node};
use crate::asm::Asm;
use crate::insn::{AluOp, Cond, Helper, Operand, Reg, Size, Width};
use crate::object::{DataSection, MapDef};

/// Steps that a turn of the loop takes.
const STEPS_PER_TURN: u32 = 5;

/// Instructions the verifier processes for each turn, measured.
const VERIFIER_PROCESSED_PER_TURN: u32 = 630;

/// Turns beyond the computed bound, so that the bound is never what ends a loop.
const MARGIN: u32 = 4;

impl Emitter<'_> {
    /// How tables write a reference. The table holds the nodes, then two records for each exit that is kept: the first,
    /// from which a step leads nowhere else, brings the second into the cache, since both are in one of its lines.
    pub(super) fn reference(&self, reference: WalkRef) -> u32 {
        match self.shortcuts.lead(reference) {
            WalkRef::Node(index) => match self.plan.walk.nodes.get(index as usize) {
                Some(WalkNode::Fork { .. }) => abi::EXIT_BIT | abi::NODE_BIT | index,
                _ => abi::NODE_BIT | index,
            },
            WalkRef::Exit(exit) => self.record_reference(self.shortcuts.place(exit)),
            WalkRef::None => abi::NONE,
        }
    }

    /// How tables refer to an exit's record.
    fn record_reference(&self, record: u32) -> u32 {
        abi::EXIT_BIT | (self.exits_from() as u32 + 2 * record)
    }

    /// Where the first exit's records are: in one line of the cache.
    fn exits_from(&self) -> usize {
        self.plan.walk.nodes.len().next_multiple_of(2)
    }

    fn target_reference(&self, target: PlanTarget) -> u32 {
        match target {
            PlanTarget::Walk(reference) => self.reference(reference),
            // Exits of the table lead into the table alone.
            PlanTarget::Step(_) => abi::NONE,
        }
    }

    /// The loop. Where to start is in [`abi::HANDOVER`].
    pub(super) fn walk(&mut self) {
        let turns = self.turns();
        if turns > WALK_TURNS_MAX {
            let turns = if turns == u32::MAX { "without end".to_string() } else { turns.to_string() };
            let message = format!(
                "a packet may take {turns} turns through the tables; at most {WALK_TURNS_MAX} are verified"
            );
            let diagnostic = Diagnostic::error(WALK_TOO_DEEP, message, None)
                .with_note(format!(
                    "for each turn the kernel's verifier processes about {VERIFIER_PROCESSED_PER_TURN} of \
                     {VERIFIER_PROCESSED_MAX} instructions"
                ))
                .with_hint("split the rule set, or compile fewer chains of long rule lists");
            self.diagnostics.push(diagnostic);
            self.goto_bail();
            return;
        }
        let counts = self.plan.walk.exits.iter().any(|exit| match exit {
            PlanExit::Then { count, .. } | PlanExit::Test { count, .. } => count.is_some(),
            PlanExit::End(_) => false,
        });
        let forks = self.plan.walk.nodes.iter().any(|node| matches!(node, WalkNode::Fork { .. }));
        let records = self.records();
        let nodes = Records::new(&mut self.maps, WALK_MAP, records);
        let bail = self.bail_label();
        let (count, layout) = (self.count, self.layout);
        // An exit's own record is behind the one that its reference leads to.
        let own = |word: i16| abi::RECORD_BYTES as i16 + word;
        let turns = turns + MARGIN;
        let a = &mut self.asm;
        let (top, special, leaf, fork) = (a.label(), a.label(), a.label(), a.label());
        let (rejoin, next) = (a.label(), a.label());
        a.comment("walk: r7 reference, r9 turns taken");
        if forks {
            a.store(Size::W, Reg::FP, abi::PENDING, -1);
            a.store(Size::W, Reg::FP, abi::BEST, -1);
        }
        a.load(Size::W, Reg::R7, Reg::FP, abi::HANDOVER);
        a.mov64(Reg::R9, 0);
        a.bind(top);
        // An exit that leads to an exit: there is nothing to step over.
        a.jump32(Cond::Slt, Reg::R7, 0, special);
        for _ in 1..STEPS_PER_TURN {
            step(a, &nodes, layout);
        }
        a.jump32(Cond::Slt, Reg::R7, 0, special);
        step(a, &nodes, layout);
        a.goto(next);

        a.bind(special);
        if forks {
            a.jump32(Cond::Eq, Reg::R7, -1, leaf);
            a.jump32(Cond::Set, Reg::R7, Operand::bits(abi::NODE_BIT), fork);
            a.bind(leaf);
            a.comment("an exit or nothing: keep the smaller, then what a fork left to decide");
            let (keep, resolve) = (a.label(), a.label());
            a.load(Size::W, Reg::R1, Reg::FP, abi::BEST);
            a.jump32(Cond::Ge, Reg::R7, Reg::R1, keep);
            a.store(Size::W, Reg::FP, abi::BEST, Reg::R7);
            a.bind(keep);
            a.load(Size::W, Reg::R7, Reg::FP, abi::PENDING);
            a.jump32(Cond::Eq, Reg::R7, -1, resolve);
            a.store(Size::W, Reg::FP, abi::PENDING, -1);
            a.goto(rejoin);

            a.bind(fork);
            a.comment("a fork");
            nodes.address(a, Reg::R2);
            a.load(Size::W, Reg::R1, Reg::R2, node::REST);
            a.store(Size::W, Reg::FP, abi::PENDING, Reg::R1);
            a.load(Size::W, Reg::R7, Reg::R2, node::NO);
            a.goto(rejoin);

            a.bind(resolve);
            a.load(Size::W, Reg::R7, Reg::FP, abi::BEST);
            a.store(Size::W, Reg::FP, abi::BEST, -1);
        }
        a.comment("the stage is decided");
        let (then, random, nth, counting) = (a.label(), a.label(), a.label(), a.label());
        a.jump32(Cond::Eq, Reg::R7, -1, bail);
        nodes.exit_address(a, Reg::R8);
        a.load(Size::W, Reg::R1, Reg::R8, own(exit::KIND));
        a.jump32(Cond::Eq, Reg::R1, exit::THEN as i32, then);
        if counts {
            a.jump32(Cond::Eq, Reg::R1, exit::COUNT as i32, counting);
        }
        a.jump32(Cond::Eq, Reg::R1, exit::RANDOM as i32, random);
        if self.nth.is_some() {
            a.jump32(Cond::Eq, Reg::R1, exit::NTH as i32, nth);
        }
        a.load(Size::W, Reg::R9, Reg::R8, own(exit::OTHER));
        a.load(Size::W, Reg::R8, Reg::R8, own(exit::NEXT));
        a.goto(count);

        a.bind(random);
        let (no, yes) = (a.label(), a.label());
        a.call(Helper::GET_PRANDOM_U32);
        a.alu32(AluOp::And, Reg::R0, i32::MAX);
        a.load(Size::W, Reg::R1, Reg::R8, own(exit::PARAMETER));
        a.jump32(Cond::Ge, Reg::R0, Reg::R1, no);
        a.goto(yes);
        if let Some(map) = self.nth {
            a.bind(nth);
            a.comment("every nth packet");
            let bytes = self.maps[map].contents().map_or(4, <[u8]>::len) as i32;
            a.load(Size::W, Reg::R1, Reg::R8, own(exit::STATE));
            a.alu64(AluOp::And, Reg::R1, bytes - 4);
            a.load_map_value(Reg::R2, map, 0);
            a.alu64(AluOp::Add, Reg::R2, Reg::R1);
            a.load(Size::W, Reg::R1, Reg::R2, 0);
            a.load(Size::W, Reg::R3, Reg::R8, own(exit::PARAMETER));
            self.nth(no);
        }
        let a = &mut self.asm;
        a.bind(yes);
        a.load(Size::W, Reg::R7, Reg::R8, own(exit::NEXT));
        a.goto(rejoin);
        a.bind(no);
        a.load(Size::W, Reg::R7, Reg::R8, own(exit::OTHER));
        a.goto(rejoin);

        if counts {
            a.bind(counting);
            a.comment("count on the way");
            a.load(Size::W, Reg::R1, Reg::R8, own(exit::OTHER));
            self.bump(Operand::Reg(Reg::R1));
            let a = &mut self.asm;
            a.load(Size::W, Reg::R7, Reg::R8, own(exit::NEXT));
            a.goto(rejoin);
        }
        let a = &mut self.asm;
        a.bind(then);
        a.comment("changes of words");
        for write in 0..exit::WRITES as i16 {
            let at = own(exit::WRITE + write * exit::WRITE_BYTES);
            a.load(Size::W, Reg::R3, Reg::R8, at);
            key_address(a, layout);
            a.load(Size::W, Reg::R3, Reg::R4, layout.word(0));
            a.load(Size::W, Reg::R1, Reg::R8, at + 4);
            // (word & !clear) ^ xor, the complement stored.
            a.alu64(AluOp::And, Reg::R3, Reg::R1);
            a.load(Size::W, Reg::R1, Reg::R8, at + 8);
            a.alu64(AluOp::Xor, Reg::R3, Reg::R1);
            a.store(Size::W, Reg::R4, layout.word(0), Reg::R3);
        }
        a.load(Size::W, Reg::R7, Reg::R8, own(exit::NEXT));

        a.bind(rejoin);
        a.goto(next);
        a.bind(next);
        a.alu64(AluOp::Add, Reg::R9, 1);
        a.loop_jump(Width::W64, Cond::Lt, Reg::R9, turns as i32, top, turns);
        a.goto(bail);
    }

    /// The table: nodes, exits (those that continue lists of changes too), padding, and "none".
    fn records(&self) -> Vec<[u32; 8]> {
        let mut records: Vec<[u32; 8]> = Vec::new();
        for (index, node) in self.plan.walk.nodes.iter().enumerate() {
            let itself = self.reference(WalkRef::Node(index as u32));
            records.push(match *node {
                WalkNode::Test { test, yes, no } => [
                    self.reference(yes),
                    self.reference(no),
                    test.mask,
                    test.lo,
                    test.hi.wrapping_sub(test.lo),
                    self.layout.table_offset(test.word),
                    0,
                    0,
                ],
                WalkNode::Fork { first, rest } => {
                    [itself, self.reference(first), 0, 0, 0, 0, self.reference(rest), 0]
                }
            });
        }
        let none = [abi::NONE, 0, 0, 0, 0, 0, 0, 0];
        records.resize(self.exits_from(), none);
        for (exit, record) in (0..).zip(self.exit_records()) {
            records.extend([[self.record_reference(exit), 0, 0, 0, 0, 0, 0, 0], record]);
        }
        records.resize((records.len() + 1).next_power_of_two().max(2), none);
        records
    }

    /// The exits' records, then those that hold the rest of long lists of changes.
    fn exit_records(&self) -> Vec<[u32; 8]> {
        let mut records = vec![[0; 8]; self.shortcuts.kept];
        for (index, exit) in self.shortcuts.exits().enumerate() {
            records[index] = match &self.plan.walk.exits[exit] {
                PlanExit::End(slot) => [exit::END, *slot, self.return_code(*slot) as u32, 0, 0, 0, 0, 0],
                PlanExit::Then { count, writes, next } => {
                    let mut chunks: Vec<&[WordWrite]> = writes.chunks(exit::WRITES).collect();
                    let first = if chunks.is_empty() { &[] } else { chunks.remove(0) };
                    let mut next = self.target_reference(*next);
                    // The last record leads out of the list, each before it to the one after.
                    for chunk in chunks.into_iter().rev() {
                        records.push(self.then_record(chunk, next));
                        next = self.record_reference(records.len() as u32 - 1);
                    }
                    match count {
                        Some(slot) if first.is_empty() => count_record(*slot, next),
                        Some(slot) => {
                            records.push(self.then_record(first, next));
                            count_record(*slot, self.record_reference(records.len() as u32 - 1))
                        }
                        None => self.then_record(first, next),
                    }
                }
                PlanExit::Test { count, test, yes, no } => {
                    let (kind, parameter) = match self.plan.effect_tests[*test] {
                        EffectTestKind::Random { probability } => (exit::RANDOM, probability),
                        EffectTestKind::Nth { every, .. } => (exit::NTH, every),
                        // Never holds: no number of 31 bits is below 0. Rules with a limit are handed over before.
                        EffectTestKind::Limit { .. } => (exit::RANDOM, 0),
                    };
                    let (yes, no) = (self.target_reference(*yes), self.target_reference(*no));
                    let record = [kind, yes, no, parameter, 4 * test.as_u32(), 0, 0, 0];
                    match count {
                        Some(slot) => {
                            records.push(record);
                            count_record(*slot, self.record_reference(records.len() as u32 - 1))
                        }
                        None => record,
                    }
                }
            };
        }
        records
    }

    fn then_record(&self, writes: &[WordWrite], next: u32) -> [u32; 8] {
        let mut record = [exit::THEN, next, 0, u32::MAX, 0, 0, u32::MAX, 0];
        for (write, into) in writes.iter().zip(record[2..].chunks_exact_mut(3)) {
            into.copy_from_slice(&[self.layout.table_offset(write.word), !write.clear, write.xor]);
        }
        record
    }

    /// Most turns any packet takes, from any node or exit of the table. A table with a cycle has no bound, which is
    /// `u32::MAX`.
    fn turns(&self) -> u32 {
        let walk = &self.plan.walk;
        let nodes = walk.nodes.len();
        let index = |reference| match self.shortcuts.lead(reference) {
            WalkRef::Node(node) => Some(node as usize),
            WalkRef::Exit(exit) => Some(nodes + exit as usize),
            WalkRef::None => None,
        };
        let follow = |target| match target {
            PlanTarget::Walk(reference) => index(reference),
            PlanTarget::Step(_) => None,
        };
        let successors = |at: usize| -> [Option<usize>; 2] {
            match walk.nodes.get(at) {
                Some(WalkNode::Test { yes, no, .. }) => [index(*yes), index(*no)],
                Some(WalkNode::Fork { first, rest }) => [index(*first), index(*rest)],
                None => match &walk.exits[at - nodes] {
                    PlanExit::End(_) => [None, None],
                    PlanExit::Then { next, .. } => [follow(*next), None],
                    PlanExit::Test { yes, no, .. } => [follow(*yes), follow(*no)],
                },
            }
        };
        let mut costs: Vec<Option<Turns>> = vec![None; nodes + walk.exits.len()];
        let mut open = vec![false; costs.len()];
        let mut most = 0u32;
        for start in 0..costs.len() {
            let mut todo = vec![start];
            while let Some(&at) = todo.last() {
                if costs[at].is_some() {
                    todo.pop();
                    continue;
                }
                let waiting: Vec<usize> =
                    successors(at).into_iter().flatten().filter(|&next| costs[next].is_none()).collect();
                if !waiting.is_empty() {
                    if std::mem::replace(&mut open[at], true) {
                        return u32::MAX;
                    }
                    todo.extend(waiting);
                    continue;
                }
                todo.pop();
                let [one, two] = successors(at).map(|next| next.and_then(|next| costs[next]));
                let cost = match (walk.nodes.get(at), walk.exits.get(at.wrapping_sub(nodes))) {
                    (Some(WalkNode::Test { .. }), _) => {
                        Turns::test(one.unwrap_or(Turns::NOTHING), two.unwrap_or(Turns::NOTHING))
                    }
                    (Some(WalkNode::Fork { .. }), _) => {
                        Turns::fork(one.unwrap_or(Turns::NOTHING), two.unwrap_or(Turns::NOTHING))
                    }
                    (None, exit) => {
                        let more = match exit {
                            Some(PlanExit::Then { count, writes, .. }) => {
                                let records =
                                    writes.len().div_ceil(exit::WRITES) + usize::from(count.is_some());
                                records.saturating_sub(1) as u32
                            }
                            Some(PlanExit::Test { count, .. }) => u32::from(count.is_some()),
                            _ => 0,
                        };
                        let next = |cost: Option<Turns>| cost.map_or(0, |cost| cost.all[0]);
                        Turns::exit(next(one).max(next(two)).saturating_add(more))
                    }
                };
                most = most.max(cost.all[0]);
                costs[at] = Some(cost);
            }
        }
        most
    }
}

/// Most turns from a record on, by how many steps of a turn were taken before it.
#[derive(Clone, Copy)]
struct Turns {
    /// Until packets end.
    all: [u32; STEPS_PER_TURN as usize],
    /// Until the stage is decided.
    decided: [u32; STEPS_PER_TURN as usize],
    /// From then on.
    after: u32,
}

impl Turns {
    /// [`WalkRef::None`]: a turn finds that there is nothing.
    const NOTHING: Turns = Turns::exit(0);

    /// A turn looks at what it came to before its last step, so it is the one that finds the exit.
    const fn exit(after: u32) -> Turns {
        let all = [after.saturating_add(1); STEPS_PER_TURN as usize];
        Turns { all, decided: [1; STEPS_PER_TURN as usize], after }
    }

    /// A step to one of two records; the last begins another turn.
    fn test(one: Turns, two: Turns) -> Turns {
        let step = |one: [u32; STEPS_PER_TURN as usize], two: [u32; STEPS_PER_TURN as usize]| {
            let mut turns = std::array::from_fn(|at| {
                let next = (at + 1) % STEPS_PER_TURN as usize;
                one[next].max(two[next])
            });
            if let Some(last) = turns.last_mut() {
                *last = u32::saturating_add(*last, 1);
            }
            turns
        };
        Turns {
            all: step(one.all, two.all),
            decided: step(one.decided, two.decided),
            after: one.after.max(two.after),
        }
    }

    /// Both records, one after the other; which of them decides what follows is open.
    fn fork(one: Turns, two: Turns) -> Turns {
        let decided = 1u32.saturating_add(one.decided[0]).saturating_add(two.decided[0]);
        let after = one.after.max(two.after);
        Turns {
            all: [decided.saturating_add(after); STEPS_PER_TURN as usize],
            decided: [decided; STEPS_PER_TURN as usize],
            after,
        }
    }
}

fn count_record(slot: u32, next: u32) -> [u32; 8] {
    [exit::COUNT, next, slot, 0, 0, 0, 0, 0]
}

/// Follows the reference in `r7` by one test.
fn step(a: &mut Asm, nodes: &Records, layout: KeyLayout) {
    a.comment("a step");
    nodes.address(a, Reg::R2);
    a.load(Size::W, Reg::R3, Reg::R2, node::WORD);
    key_address(a, layout);
    a.load(Size::W, Reg::R3, Reg::R4, layout.word(0));
    a.load(Size::W, Reg::R4, Reg::R2, node::MASK);
    a.alu64(AluOp::And, Reg::R3, Reg::R4);
    a.load(Size::W, Reg::R4, Reg::R2, node::LO);
    a.alu32(AluOp::Sub, Reg::R3, Reg::R4);
    a.load(Size::W, Reg::R4, Reg::R2, node::SPAN);
    // r4 = all ones if the test fails; then r7 is the reference that it chooses.
    a.alu64(AluOp::Sub, Reg::R4, Reg::R3);
    a.alu64(AluOp::Arsh, Reg::R4, 63);
    a.load(Size::W, Reg::R7, Reg::R2, node::YES);
    a.load(Size::W, Reg::R3, Reg::R2, node::NO);
    a.alu64(AluOp::Xor, Reg::R3, Reg::R7);
    a.alu64(AluOp::And, Reg::R3, Reg::R4);
    a.alu64(AluOp::Xor, Reg::R7, Reg::R3);
}

/// A table of records in the program.
struct Records {
    map: Map,
    mask: i32,
}

impl Records {
    /// Makes a map of the records, padded with zeros to a power of two.
    fn new(maps: &mut PrimaryMap<Map, MapDef>, name: &str, mut records: Vec<[u32; 8]>) -> Records {
        records.resize(records.len().next_power_of_two(), [0; 8]);
        let bytes = records.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
        let map = maps.push(MapDef::data(name, DataSection::Rodata, bytes));
        Records { map, mask: (records.len() - 1) as i32 }
    }

    /// `into` = address of the record that `r7` refers to. `r1` is lost.
    fn address(&self, a: &mut Asm, into: Reg) {
        self.masked(a, into, self.mask);
    }

    /// The same for an exit, whose two records begin at an even number.
    fn exit_address(&self, a: &mut Asm, into: Reg) {
        self.masked(a, into, self.mask & !1);
    }

    fn masked(&self, a: &mut Asm, into: Reg, mask: i32) {
        a.mov64(Reg::R1, Reg::R7);
        a.alu64(AluOp::And, Reg::R1, mask);
        a.alu64(AluOp::Lsh, Reg::R1, abi::RECORD_SHIFT);
        a.load_map_value(into, self.map, 0);
        a.alu64(AluOp::Add, into, Reg::R1);
    }
}

/// `r4` = address of the word whose table offset is in `r3`, less the key's stack offset. `r3` and `r5` are lost.
fn key_address(a: &mut Asm, layout: KeyLayout) {
    a.mov64(Reg::R4, Reg::FP);
    if layout.split() {
        a.mov64(Reg::R5, Reg::R3);
        a.alu64(AluOp::Rsh, Reg::R5, 1);
        a.alu64(AluOp::And, Reg::R5, 128);
        a.alu64(AluOp::Add, Reg::R4, Reg::R5);
        a.alu64(AluOp::And, Reg::R3, 252);
    } else {
        a.alu64(AluOp::And, Reg::R3, i32::from(layout.stride()) * (i32::from(layout.words()) - 1));
    }
    a.alu64(AluOp::Add, Reg::R4, Reg::R3);
}
