//! Steps: stages decided by code, one entry after the other.
//!
//! An entry with one test jumps on if the test fails. With more tests, every word test adds to "how wrong the packet
//! is" without a jump, and one jump decides: the verifier then has one pending path an entry, not one a test, and the
//! CPU one branch to predict. Words are read from the stack anew for each test, because the verifier follows values in
//! registers from entry to entry and would take time quadratic in their number.

use std::collections::BTreeMap;

use polc_ir::entities::{EffectTest, Step};
use polc_ir::field::Field;
use polc_ir::plan::{
    KeySlot, LinearEntry, LinearTest, PlanExit, StepData, Target as PlanTarget, WordTest, WordWrite,
};
use polc_ir::ruleset::EffectTestKind;

use super::{Emitter, step_of};
use crate::abi;
use crate::asm::Label;
use crate::insn::{AluOp, Cond, Helper, Operand, Reg, Size};

/// Labels of the steps in use, and of the entry to the walk.
pub(super) struct StepLabels {
    steps: BTreeMap<Step, Label>,
    walk: Label,
    walk_used: bool,
}

impl StepLabels {
    /// Where the walk begins.
    pub(super) fn use_walk(&mut self) -> Label {
        self.walk_used = true;
        self.walk
    }
}

impl Emitter<'_> {
    /// All steps that packets can reach, from the root down, then the walk.
    pub(super) fn steps(&mut self) {
        let mut labels = StepLabels { steps: self.reachable(), walk: self.asm.label(), walk_used: false };
        self.go(self.plan.root, &mut labels);
        let steps: Vec<Step> = labels.steps.keys().rev().copied().collect();
        for step in steps {
            self.asm.set_line(None);
            self.asm.bind(labels.steps[&step]);
            let plan = self.plan;
            let data = match &plan.steps[step] {
                StepData::Linear(data) => data,
                StepData::Lookup(data) => {
                    self.asm.comment(format!("{step}: {}, {}", data.stage, data.structure));
                    self.lookup(step, data, &mut labels);
                    continue;
                }
            };
            self.asm.comment(format!("{step}: {}", data.stage));
            for entry in &data.entries {
                self.entry(entry, &mut labels);
                if simplify(&entry.tests).is_some_and(|(all, any)| all.is_empty() && any.is_empty()) {
                    break;
                }
            }
        }
        self.asm.set_line(None);
        if labels.walk_used {
            self.asm.bind(labels.walk);
            self.walk();
        }
    }

    /// A label for each step that a chain of exits leads to.
    fn reachable(&mut self) -> BTreeMap<Step, Label> {
        let mut found = BTreeMap::new();
        let mut todo: Vec<Step> = step_of(self.plan.root).into_iter().collect();
        while let Some(step) = todo.pop() {
            if found.contains_key(&step) {
                continue;
            }
            found.insert(step, self.asm.label());
            for exit in self.plan.steps[step].exits() {
                match exit {
                    PlanExit::End(_) => {}
                    PlanExit::Then { next, .. } => todo.extend(step_of(*next)),
                    PlanExit::Test { yes, no, .. } => {
                        todo.extend(step_of(*yes));
                        todo.extend(step_of(*no));
                    }
                }
            }
        }
        found
    }

    /// Goes on at a target.
    fn go(&mut self, target: PlanTarget, labels: &mut StepLabels) {
        match target {
            PlanTarget::Step(step) => self.asm.goto(labels.steps[&step]),
            PlanTarget::Walk(reference) => {
                let walk = labels.use_walk();
                // Through memory that the verifier does not follow, so that the walk is the same from everywhere.
                let reference = self.reference(reference);
                self.asm.store(Size::W, Reg::FP, abi::HANDOVER, Operand::bits(reference));
                self.asm.goto(walk);
            }
        }
    }

    fn entry(&mut self, entry: &LinearEntry, labels: &mut StepLabels) {
        self.set_rule(entry.rule);
        let Some((conjunction, disjunctions)) = simplify(&entry.tests) else { return };
        if let ([test], [], PlanExit::Then { count: None, writes, next: PlanTarget::Step(next) }) =
            (conjunction.as_slice(), disjunctions.as_slice(), &entry.exit)
            && writes.is_empty()
            && let Some((cond, _, bound)) = one_comparison(test)
        {
            self.load_word(Reg::R1, test);
            self.asm.jump32(cond, Reg::R1, bound, labels.steps[next]);
            return;
        }
        let next = self.asm.label();
        self.fail_unless(&conjunction, next);
        for alternatives in &disjunctions {
            let holds = self.asm.label();
            for (index, alternative) in alternatives.iter().enumerate() {
                if index + 1 == alternatives.len() {
                    self.fail_unless(alternative, next);
                } else {
                    let wrong = self.asm.label();
                    self.fail_unless(alternative, wrong);
                    self.asm.goto(holds);
                    self.asm.bind(wrong);
                }
            }
            self.asm.bind(holds);
        }
        self.exit(&entry.exit, labels);
        self.asm.bind(next);
    }

    /// Jumps to `wrong` unless all tests hold.
    fn fail_unless(&mut self, tests: &[WordTest], wrong: Label) {
        if let [test] = tests {
            self.load_word(Reg::R1, test);
            match one_comparison(test) {
                Some((_, fails, bound)) => self.asm.jump32(fails, Reg::R1, bound, wrong),
                None => {
                    self.asm.alu32(AluOp::Sub, Reg::R1, Operand::bits(test.lo));
                    self.asm.jump32(Cond::Gt, Reg::R1, Operand::bits(test.hi.wrapping_sub(test.lo)), wrong);
                }
            }
            return;
        }
        for (index, test) in tests.iter().enumerate() {
            // The first result goes to r0, the others are added to it.
            let into = if index == 0 { Reg::R0 } else { Reg::R1 };
            self.load_word(into, test);
            if test.lo == test.hi {
                if test.lo != 0 {
                    self.asm.alu32(AluOp::Xor, into, Operand::bits(test.lo));
                }
            } else {
                // span - (word - lo) borrows out of 32 bits where the word is out of range: all upper bits are set.
                if test.lo != 0 {
                    self.asm.alu32(AluOp::Sub, into, Operand::bits(test.lo));
                }
                self.asm.mov32(Reg::R2, Operand::bits(test.hi.wrapping_sub(test.lo)));
                self.asm.alu64(AluOp::Sub, Reg::R2, into);
                self.asm.alu64(AluOp::Rsh, Reg::R2, 63);
                self.asm.mov64(into, Reg::R2);
            }
            if index > 0 {
                self.asm.alu32(AluOp::Or, Reg::R0, Reg::R1);
            }
        }
        if !tests.is_empty() {
            self.asm.jump32(Cond::Ne, Reg::R0, 0, wrong);
        }
    }

    fn load_word(&mut self, into: Reg, test: &WordTest) {
        self.asm.load(Size::W, into, Reg::FP, self.layout.word(test.word));
        if self.word_bits(test.word) & !test.mask != 0 {
            self.asm.alu32(AluOp::And, into, Operand::bits(test.mask));
        }
    }

    /// The bits of a word that its field may have set.
    fn word_bits(&self, word: u8) -> u32 {
        let holder = self.plan.key.iter().find(|slot| (slot.word..slot.word + slot.words).contains(&word));
        // Devices are in the key as classes.
        let whole = |slot: &&KeySlot| !matches!(slot.field, Field::InDevice | Field::OutDevice);
        holder.filter(whole).map_or(u32::MAX, |slot| {
            let below = 32 * u32::from(slot.word + slot.words - 1 - word);
            let bits = u32::from(slot.field.bits(self.plan.family)).saturating_sub(below).min(32);
            u32::MAX.checked_shr(32 - bits).unwrap_or(0)
        })
    }

    pub(super) fn exit(&mut self, exit: &PlanExit, labels: &mut StepLabels) {
        match exit {
            PlanExit::End(slot) => self.end(*slot),
            PlanExit::Then { count, writes, next } => {
                self.count_on_the_way(*count);
                for write in writes {
                    self.write(write);
                }
                self.go(*next, labels);
            }
            PlanExit::Test { count, test, yes, no } => {
                self.count_on_the_way(*count);
                let fails = self.asm.label();
                if self.effect_test(*test, fails) {
                    self.go(*yes, labels);
                }
                self.asm.bind(fails);
                self.go(*no, labels);
            }
        }
    }

    fn count_on_the_way(&mut self, slot: Option<u32>) {
        if let Some(slot) = slot {
            self.bump(Operand::bits(slot));
        }
    }

    fn write(&mut self, write: &WordWrite) {
        let word = self.layout.word(write.word);
        self.asm.load(Size::W, Reg::R1, Reg::FP, word);
        if write.clear != 0 {
            self.asm.alu32(AluOp::And, Reg::R1, Operand::bits(!write.clear));
        }
        if write.xor != 0 {
            self.asm.alu32(AluOp::Xor, Reg::R1, Operand::bits(write.xor));
        }
        self.asm.store(Size::W, Reg::FP, word, Reg::R1);
        self.forget_word(write.word);
    }

    /// Jumps to `fails` if a test does not hold (net/netfilter/xt_statistic.c, `statistic_mt`). `false`: it never
    /// holds, and no code was needed.
    fn effect_test(&mut self, test: EffectTest, fails: Label) -> bool {
        match (self.plan.effect_tests[test], self.nth) {
            (EffectTestKind::Random { probability }, _) => {
                self.asm.call(Helper::GET_PRANDOM_U32);
                self.asm.alu32(AluOp::And, Reg::R0, i32::MAX);
                self.asm.jump32(Cond::Ge, Reg::R0, Operand::bits(probability), fails);
                true
            }
            (EffectTestKind::Nth { every, .. }, Some(map)) => {
                self.asm.load_map_value(Reg::R2, map, 4 * test.as_u32());
                self.asm.load(Size::W, Reg::R1, Reg::R2, 0);
                self.asm.mov32(Reg::R3, Operand::bits(every));
                self.nth(fails);
                true
            }
            // A rate limit's credit is the kernel's own; rules that have one are handed over before.
            (EffectTestKind::Limit { .. } | EffectTestKind::Nth { .. }, _) => false,
        }
    }

    /// The nth packet: `r2` the counter's address, `r1` its value, `r3` the value at which it holds. The kernel
    /// compares and swaps; this reads and writes, so two CPUs at once may count one packet for two, as two packets a
    /// moment apart may also arrive in either order.
    pub(super) fn nth(&mut self, fails: Label) {
        let a = &mut self.asm;
        let holds = a.label();
        a.jump32(Cond::Eq, Reg::R1, Reg::R3, holds);
        a.alu32(AluOp::Add, Reg::R1, 1);
        a.store(Size::W, Reg::R2, 0, Reg::R1);
        a.goto(fails);
        a.bind(holds);
        a.store(Size::W, Reg::R2, 0, 0);
    }
}

/// The comparison that a test is, if it is one: when it holds, when it fails, and with what.
fn one_comparison(test: &WordTest) -> Option<(Cond, Cond, Operand)> {
    if test.lo == test.hi {
        Some((Cond::Eq, Cond::Ne, Operand::bits(test.lo)))
    } else if test.lo == 0 {
        Some((Cond::Le, Cond::Gt, Operand::bits(test.hi)))
    } else if test.hi >= test.mask {
        Some((Cond::Ge, Cond::Lt, Operand::bits(test.lo)))
    } else {
        None
    }
}

/// Tests without what always or never holds: a conjunction, and disjunctions of two or more. `None`: never holds.
#[allow(clippy::type_complexity)]
fn simplify(tests: &[LinearTest]) -> Option<(Vec<WordTest>, Vec<Vec<Vec<WordTest>>>)> {
    let mut conjunction = Vec::new();
    let mut disjunctions = Vec::new();
    for test in tests {
        let mut alternatives: Vec<Vec<WordTest>> = test
            .any
            .iter()
            .filter(|all| all.iter().all(|test| test.lo <= test.hi))
            .map(|all| all.iter().filter(|test| test.lo != 0 || test.hi < test.mask).copied().collect())
            .collect();
        if alternatives.iter().any(Vec::is_empty) {
            continue;
        }
        match alternatives.len() {
            0 => return None,
            1 => conjunction.append(&mut alternatives[0]),
            _ => disjunctions.push(alternatives),
        }
    }
    Some((conjunction, disjunctions))
}
