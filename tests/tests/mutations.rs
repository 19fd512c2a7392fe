//! Planted miscompilations: rules, plans, tables and emitted code with one thing wrong, run on the packets that `verify`
//! makes.
//!
//! Each mutant differs from what the compiler made in one place: a test's bound, mask or word, an entry's place or
//! exit, a node's branch, an element of a table, an immediate, a distance, an operation or a register of an
//! instruction. All have to be caught. A mutant that nothing can tell from the original is no miscompilation: a bound
//! that is never reached, an exit that another entry hides, a table's padding, a check that only the kernel's verifier
//! asks for. Whether it is one is judged by [`JUDGING`] times as many packets from other seeds, and for plans by probing
//! the mutant around each of them.

use polc::Compiled;
use polc::place::{attach_for, devices_of, place};
use polc::runner::{Level, Program, run};
use polc::select::{Devices, Prefer};
use polc::witness::{Aimed, Effort, Random, Witnesses};
use polc_backend_ebpf::emit::emit;
use polc_backend_ebpf::insn::decode_all;
use polc_backend_ebpf::object::Object;
use polc_frontend_iptables::{ParseOptions, ipset, lower, parse};
use polc_ir::entities::{Chain, Data, Step, Value};
use polc_ir::env::{Attach, Device, Env, Input, Mode};
use polc_ir::hook::{Hook, Semantics};
use polc_ir::interval::Interval;
use polc_ir::outcome::Outcome;
use polc_ir::plan::{Op, Operand, Plan, PlanExit, StepData, WalkNode, WalkRef, WordTest};
use polc_ir::ruleset::{Action, ClauseKind, Ruleset};
use polc_ir::source::SourceMap;
use polc_ir::state::State;
use polc_tests::corpus;
use polc_tests::levels::target;

/// Miscompilations to plant, of each of the four kinds.
const WANTED: usize = 50;

/// How many times `verify`'s packets a mutant is judged by.
const JUDGING: usize = 2;

/// The rule sets: those that need no state, so that no level leaves much to the kernel, and one with ipsets.
const DUMPS: [&str; 3] = ["stateless", "shorewall", "firewalld"];

/// A rule set at a hook, and the packets that `verify` makes for it.
struct Case {
    name: String,
    attach: Attach,
    ruleset: Ruleset,
    compiled: Compiled,
    env: Env,
    devices: Vec<Device>,
    packets: Vec<(Input, Outcome)>,
    /// Packets to judge by, made when they are first needed.
    others: Vec<(Input, Outcome)>,
}

impl Case {
    /// The packets that `verify` makes, if `plan` is what was compiled.
    fn packets<'a>(&'a self, plan: &'a Plan, seed: u64) -> impl Iterator<Item = (Input, Outcome)> + 'a {
        let witnesses =
            Witnesses::of_plan(&self.compiled.classifier, plan, &self.devices, Effort::THOROUGH, seed);
        let enough = witnesses.enough();
        let outcome = move |input: &Input| {
            run(Level::Ruleset, &self.ruleset, &self.compiled, &self.env, input, &mut State::new(1))
        };
        witnesses.take(enough).map(move |input| {
            let outcome = outcome(&input);
            (input, outcome)
        })
    }

    fn emit(&self, plan: &Plan) -> Option<Object> {
        emit(plan, &target(self.attach)).ok()
    }

    /// The first packet that an object treats otherwise than the rules do.
    fn caught(&self, plan: &Plan, object: &Object, packets: &[(Input, Outcome)]) -> Option<usize> {
        // What the check VM does not take is caught before it runs.
        let Ok(mut program) = Program::new(plan, self.attach, object) else { return Some(0) };
        packets.iter().position(|(input, expected)| {
            !program.run(plan, input).is_ok_and(|(ending, counted)| expected.is(ending, &counted))
        })
    }
}

/// What became of the mutants of one kind.
#[derive(Default)]
struct Tally {
    caught: usize,
    /// Shown to be no miscompilations: everything that the steps and their stages tell apart was compared.
    proven: usize,
    /// Of which no packet shows that they are.
    same: usize,
    missed: Vec<String>,
}

fn case(dump: &corpus::Dump, hook: Hook, prefer: Prefer) -> Option<Case> {
    let mut sources = SourceMap::new();
    let file = sources.add(dump.name.as_str(), dump.text());
    let sets: Vec<_> = dump
        .ipset_text()
        .map(|text| {
            let file = sources.add("sets", text);
            ipset::parse(&sources, file).0
        })
        .into_iter()
        .collect();
    let ruleset = lower(&parse(&sources, file, &ParseOptions::default()).0, &sets, Semantics::Legacy);
    let attach = attach_for(hook);
    let place = place(&[hook], attach, Mode::Accelerate, false);
    if ruleset.path_chains(&place).is_empty() {
        return None;
    }
    let env = Env::default();
    let devices = devices_of(&ruleset);
    let given = Devices { declared: devices.clone(), ..Devices::default() };
    let compiled = polc::compile_with(&ruleset, &place, &env, &given, prefer);
    let name = format!("{} {hook} {prefer:?}", dump.name);
    let mut case =
        Case { name, attach, ruleset, compiled, env, devices, packets: Vec::new(), others: Vec::new() };
    case.packets = case.packets(&case.compiled.plan, 1).collect();
    Some(case)
}

fn cases(prefer: Prefer) -> impl Iterator<Item = Case> {
    corpus::own()
        .into_iter()
        .filter(|dump| DUMPS.iter().any(|wanted| dump.name.starts_with(wanted)))
        .flat_map(move |dump| Hook::ALL.map(|hook| case(&dump, hook, prefer)))
        .flatten()
}

/// Plants mutants in every case's plan, so many `each`.
fn plant_in_plans(prefer: Prefer, each: usize, mutate: impl Fn(&Plan, &mut Random) -> Option<Plan>) -> Tally {
    let mut tally = Tally::default();
    let mut random = Random::new(42);
    for mut case in cases(prefer) {
        for _ in 0..each {
            let Some(mutant) = mutate(&case.compiled.plan, &mut random) else { continue };
            if mutant.verify() != Vec::<String>::new() {
                tally.caught += 1;
                continue;
            }
            // What can't be emitted is caught before it runs.
            let Some(object) = case.emit(&mutant) else {
                tally.caught += 1;
                continue;
            };
            judge(&mut case, &mutant, &object, "plan", &mut tally);
        }
    }
    tally
}

fn judge(case: &mut Case, plan: &Plan, object: &Object, what: &str, tally: &mut Tally) {
    if case.caught(plan, object, &case.packets).is_some() {
        tally.caught += 1;
        return;
    }
    // The packets that the original gets, then, if the plan is the mutant, those that it gets itself.
    let original = &case.compiled.plan;
    let tells =
        if (&plan.tables, &plan.steps, &plan.walk) != (&original.tables, &original.steps, &original.walk) {
            if Witnesses::of_plan(&case.compiled.classifier, plan, &case.devices, Effort::THOROUGH, 1)
                .are_steps_proven()
            {
                tally.proven += 1;
                return;
            }
            let catches = |seed| {
                let own: Vec<_> = case.packets(plan, seed).collect();
                case.caught(plan, object, &own).is_some()
            };
            if catches(1) {
                tally.caught += 1;
                return;
            }
            (2..2 + JUDGING as u64).any(catches)
        } else {
            if case.others.is_empty() {
                let seeds = 2..2 + JUDGING as u64;
                case.others = seeds.flat_map(|seed| case.packets(&case.compiled.plan, seed)).collect();
            }
            case.caught(plan, object, &case.others).is_some()
        };
    if tells {
        tally.missed.push(format!("{}: {what}", case.name));
    } else {
        tally.same += 1;
    }
}

fn finish(kind: &str, tally: &Tally) {
    let Tally { caught, proven, same, missed } = tally;
    eprintln!(
        "{kind}: {caught} caught, {} missed, {} the same, {proven} proven",
        missed.len(),
        same + proven
    );
    assert!(caught + missed.len() >= WANTED, "{kind}: only {caught} were planted");
    assert!(missed.is_empty(), "{kind}: missed {} beside {caught}:\n{}", missed.len(), missed.join("\n"));
}

/// Another exit for one that ends: another slot of an ending.
fn other_end(plan: &Plan, exit: &mut PlanExit, random: &mut Random) -> Option<()> {
    let PlanExit::End(slot) = exit else { return None };
    let others: Vec<u32> = (0..)
        .zip(&plan.traces)
        .filter(|(index, trace)| index != slot && trace.ending.is_some())
        .map(|(index, _)| index)
        .collect();
    *slot = others[random.below(others.len())];
    Some(())
}

/// A bound that is one off, a mask without a bit or with one more.
fn other_test(test: &mut WordTest, random: &mut Random) -> Option<()> {
    match random.below(3) {
        0 => test.lo = test.lo.checked_add(1)?,
        1 => test.hi = test.hi.checked_sub(1)?,
        _ => test.mask ^= 1 << random.below(32),
    }
    Some(())
}

#[test]
fn mutants_of_comparisons_are_caught() {
    let tally = plant_in_plans(Prefer::Linear, 10, |original, random| {
        let mut plan = original.clone();
        let step = Step::from_u32(random.below(plan.steps.len().max(1)) as u32);
        let StepData::Linear(step) = plan.steps.get_mut(step)? else { return None };
        let count = step.entries.len();
        let at = random.below(count);
        match random.below(4) {
            0 => other_end(original, &mut step.entries[at].exit, random)?,
            1 if !step.entries[at].tests.is_empty() && at + 1 < count => {
                let test = random.below(step.entries[at].tests.len());
                step.entries[at].tests.remove(test);
            }
            2 if at + 2 < count => step.entries.swap(at, at + 1),
            3 => {
                let mut tests: Vec<&mut WordTest> =
                    step.entries[at].tests.iter_mut().flat_map(|test| &mut test.any).flatten().collect();
                let test = random.below(tests.len().max(1));
                other_test(tests.get_mut(test)?, random)?;
            }
            _ => return None,
        }
        Some(plan)
    });
    finish("comparisons", &tally);
}

#[test]
fn mutants_of_walk_tables_are_caught() {
    let tally = plant_in_plans(Prefer::Walk, 3, |original, random| {
        let mut plan = original.clone();
        if random.below(4) == 0 {
            let at = random.below(plan.walk.exits.len().max(1));
            other_end(original, plan.walk.exits.get_mut(at)?, random)?;
            return Some(plan);
        }
        let at = random.below(plan.walk.nodes.len().max(1));
        match plan.walk.nodes.get_mut(at)? {
            WalkNode::Test { test, yes, no } => match random.below(3) {
                0 => std::mem::swap(yes, no),
                1 => {
                    let exit = WalkRef::Exit(random.below(original.walk.exits.len()) as u32);
                    *(if random.below(2) == 0 { yes } else { no }) = exit;
                }
                _ => other_test(test, random)?,
            },
            WalkNode::Fork { first, rest } => std::mem::swap(first, rest),
        }
        (plan.walk != original.walk).then_some(plan)
    });
    finish("walk tables", &tally);
}

#[test]
fn mutants_of_lookups_are_caught() {
    let tally = plant_in_plans(Prefer::Matrix, 10, |original, random| {
        let mut plan = original.clone();
        let kind = random.below(4);
        if kind < 2 {
            let step = Step::from_u32(random.below(plan.steps.len().max(1)) as u32);
            let StepData::Lookup(step) = plan.steps.get_mut(step)? else { return None };
            if kind == 0 {
                let at = random.below(step.exits.len());
                other_end(original, &mut step.exits[at], random)?;
            } else {
                let at = Value::from_u32(random.below(step.ops.len()) as u32);
                let Op::Alu(_, _, Operand::Const(by)) = &mut step.ops[at] else { return None };
                *by = [*by + 1, by.checked_sub(1)?][random.below(2)];
            }
            return Some(plan);
        }
        let table = Data::from_u32(random.below(plan.tables.len().max(1)) as u32);
        let bytes = &mut plan.tables.get_mut(table)?.bytes;
        let at = random.below(bytes.len());
        bytes[at] ^= 1 << random.below(8);
        Some(plan)
    });
    finish("look-ups", &tally);
}

#[test]
fn mutants_of_code_are_caught() {
    let mut tally = Tally::default();
    let mut random = Random::new(42);
    for prefer in [Prefer::Cheapest, Prefer::Walk] {
        for mut case in cases(prefer) {
            let plan = case.compiled.plan.clone();
            let original = case.emit(&plan).expect("a plan that can be emitted");
            for _ in 0..3 {
                let mut object = original.clone();
                let Some(what) = other_code(&mut object.programs[0].code.slots, &mut random) else {
                    continue;
                };
                judge(&mut case, &plan, &object, &what, &mut tally);
            }
        }
    }
    finish("code", &tally);
}

/// What the passes above the plan lose: the rule set that is compiled is not the one that is verified. A rule is gone, a
/// clause, a range of a list; a bound is one off, two rules have changed places, one ends in something else.
#[test]
fn mutants_of_rules_are_caught() {
    let mut tally = Tally::default();
    let mut random = Random::new(42);
    for case in cases(Prefer::Walk) {
        let given = Devices { declared: case.devices.clone(), ..Devices::default() };
        let place = &case.compiled.plan.place;
        for _ in 0..5 {
            let mut mutant = case.ruleset.clone();
            let Some(what) = other_rule(&mut mutant, &case.ruleset.path_chains(place), &mut random) else {
                continue;
            };
            let compiled = polc::compile_with(&mutant, place, &case.env, &given, Prefer::Walk);
            let tells = |input: &Input, seed| {
                let of = |level, rules: &Ruleset| {
                    run(level, rules, &compiled, &case.env, input, &mut State::new(seed))
                };
                of(Level::Ruleset, &case.ruleset) != of(Level::Classifier, &mutant)
            };
            let witnesses = |compiled: &Compiled, seed| -> Vec<Input> {
                let (classifier, plan) = (&compiled.classifier, &compiled.plan);
                let made = Witnesses::of_plan(classifier, plan, &case.devices, Effort::THOROUGH, seed);
                let enough = made.enough();
                Aimed::new(&case.ruleset, classifier, &case.env, &case.devices, seed)
                    .chain(made.take(enough))
                    .collect()
            };
            if witnesses(&compiled, 1).iter().any(|input| tells(input, 1)) {
                tally.caught += 1;
            } else if (2..2 + JUDGING as u64)
                .any(|seed| witnesses(&case.compiled, seed).iter().any(|input| tells(input, seed)))
            {
                tally.missed.push(format!("{}: {what}", case.name));
            } else {
                tally.same += 1;
            }
        }
    }
    finish("rules", &tally);
}

/// Changes one thing about a rule of these chains or those they lead to. What.
fn other_rule(ruleset: &mut Ruleset, path: &[Chain], random: &mut Random) -> Option<String> {
    let mut chains = path.to_vec();
    let mut at = 0;
    while at < chains.len() {
        for &rule in &ruleset.chains[chains[at]].rules {
            if let Action::Jump(to) | Action::Goto(to) = ruleset.rules[rule].action
                && !chains.contains(&to)
            {
                chains.push(to);
            }
        }
        at += 1;
    }
    chains.retain(|chain| !ruleset.chains[*chain].rules.is_empty());
    let chain = chains[random.below(chains.len().max(1)).min(chains.len().checked_sub(1)?)];
    let count = ruleset.chains[chain].rules.len();
    let at = random.below(count);
    let rule = ruleset.chains[chain].rules[at];
    let what = match random.below(5) {
        0 => {
            ruleset.chains[chain].rules.remove(at);
            "is lost"
        }
        1 if at + 1 < count => {
            ruleset.chains[chain].rules.swap(at, at + 1);
            "comes later"
        }
        2 if ruleset.rules[rule].action.ends() => {
            let action = &mut ruleset.rules[rule].action;
            *action = if *action == Action::Accept { Action::Drop } else { Action::Accept };
            "ends otherwise"
        }
        3 if !ruleset.rules[rule].clauses.is_empty() => {
            let clause = random.below(ruleset.rules[rule].clauses.len());
            ruleset.rules[rule].clauses.remove(clause);
            "lacks a clause"
        }
        _ => {
            let clauses = &mut ruleset.rules[rule].clauses;
            let clause = random.below(clauses.len().max(1));
            let ClauseKind::Any(tests) = &mut clauses.get_mut(clause)?.kind else { return None };
            let mut changed = tests.to_vec();
            let test = random.below(changed.len().max(1));
            let values = &mut changed.get_mut(test)?.values;
            let mut intervals = values.intervals().to_vec();
            let which = random.below(intervals.len().max(1));
            let interval = *intervals.get(which)?;
            if random.below(2) == 0 && intervals.len() > 1 {
                intervals.remove(which);
            } else {
                intervals[which] = Interval::new(interval.lo(), interval.hi().checked_sub(1)?)
                    .unwrap_or(Interval::point(interval.lo() ^ 1));
            }
            *values = intervals.into_iter().collect();
            *tests = changed.into();
            "has another range"
        }
    };
    Some(format!("rule {} of {} {what}", at + 1, ruleset.chains[chain].name))
}

/// Changes one thing of one instruction that is neither a call nor the second half of another. What it was and is.
fn other_code(slots: &mut [u64], random: &mut Random) -> Option<String> {
    let insns = decode_all(slots).expect("what was emitted decodes");
    let (slot, before) = &insns[random.below(insns.len())];
    let slot = *slot as usize;
    let [mut opcode, mut regs, off_low, off_high, rest @ ..] = slots[slot].to_le_bytes();
    let mut off = i16::from_le_bytes([off_low, off_high]);
    let mut imm = i32::from_le_bytes(rest);
    // Documentation/bpf/standardization/instruction-set.rst: class in the low three bits, then source, then operation.
    let (class, register, op) = (opcode & 7, opcode & 8 != 0, opcode & 0xf0);
    let (load, store, jump) = (class == 1, class == 2 || class == 3, class == 5 || class == 6);
    if jump && matches!(op, 0x80 | 0x90) || class == 0 {
        return None;
    }
    match random.below(4) {
        0 if !register && !load && op != 0 => {
            imm = [imm.wrapping_add(1), imm.wrapping_sub(1), imm ^ 1 << random.below(31)][random.below(3)]
        }
        1 if load || store || jump => off = [off.wrapping_add(1), off.wrapping_sub(1)][random.below(2)],
        // Greater and greater or equal, less and less or equal, equal and not equal, add and subtract, or and and.
        2 if jump && op != 0 => {
            opcode = opcode & 0x0f
                | match op {
                    0x10 => 0x50,
                    0x50 | 0x40 => 0x10,
                    0x20 => 0x30,
                    0x30 => 0x20,
                    0xa0 => 0xb0,
                    0xb0 => 0xa0,
                    _ => return None,
                };
        }
        2 if class == 4 || class == 7 => {
            opcode = opcode & 0x0f
                | match op {
                    0x00 => 0x10,
                    0x10 => 0x00,
                    0x40 => 0x50,
                    0x50 => 0x40,
                    0x60 => 0x70,
                    0x70 => 0x60,
                    _ => return None,
                };
        }
        3 => {
            let other = random.below(10) as u8;
            regs =
                if register && random.below(2) == 0 { regs & 0x0f | other << 4 } else { regs & 0xf0 | other };
        }
        _ => return None,
    }
    let [off_low, off_high] = off.to_le_bytes();
    let imm = imm.to_le_bytes();
    let changed = u64::from_le_bytes([opcode, regs, off_low, off_high, imm[0], imm[1], imm[2], imm[3]]);
    if changed == slots[slot] {
        return None;
    }
    slots[slot] = changed;
    Some(format!("slot {slot} {before:?} is {changed:016x}"))
}
