//! Packets aimed at rules: made from the rules' own clauses, so that they come where the rules say so whatever was lost
//! when a classifier was made of them.
//!
//! For each rule there is a packet that satisfies it: a way to the rule is chosen, by the rules that jump to its chain;
//! where the reference evaluator says that an earlier rule caught the packet, one of that rule's tests is made to fail, as
//! in `directed`. Then there are packets like it but for one field: at each value at which one of the rule's tests changes
//! its mind.

use cranelift_entity::{EntitySet, SecondaryMap};
use polc_ir::classifier::Classifier;
use polc_ir::cube::{Cube, Test};
use polc_ir::entities::{Chain, Derived, Rule};
use polc_ir::env::{Device, Env, Input};
use polc_ir::field::Field;
use polc_ir::interval::{IntervalSet, max_value};
use polc_ir::ruleset::{Action, ClauseKind, Event, Ruleset};
use polc_ir::state::State;

use super::directed::{Choice, input, pick};
use super::elements;
use super::frame::{Frames, Wanted};
use super::random::Random;

/// Frames that are made for one packet.
const REPAIRS_MAX: usize = 12;
/// Ways to a rule that are tried, and jumps on one.
const WAYS_MAX: usize = 8;
const JUMPS_MAX: usize = 64;
/// Intervals of a test whose ends packets are made for: the first, the last, and some between.
const INTERVALS_MAX: usize = 64;
/// Clauses that the evaluator looks at for all packets together.
const WORK_MAX: usize = 5_000_000;

/// What a packet is aimed at.
#[derive(Clone, Copy, Debug)]
struct Target {
    rule: Rule,
    /// A clause and one of its tests, and which of the test's values; else the packet just satisfies the rule.
    edge: Option<(u32, u32, u32)>,
}

/// A packet that satisfies a rule, or gets as near as it came: its fields, and the seed of what they leave open.
#[derive(Clone, Debug)]
struct Base {
    wanted: Wanted,
    seed: u64,
}

/// A sequence of packets for the rules of a place, which ends.
pub struct Aimed<'a> {
    ruleset: &'a Ruleset,
    /// Tells the place, and what is looked up in tables.
    classifier: &'a Classifier,
    env: &'a Env,
    devices: &'a [Device],
    frames: Frames<'a>,
    random: Random,
    /// What packets are like that are in a set.
    elements: SecondaryMap<Derived, Vec<Cube>>,
    /// The rules that lead to each chain.
    callers: SecondaryMap<Chain, Vec<Rule>>,
    targets: Vec<Target>,
    bases: SecondaryMap<Rule, Option<Base>>,
    next: usize,
    work: usize,
}

impl<'a> Aimed<'a> {
    /// Packets for the rules that `classifier` was made of.
    pub fn new(
        ruleset: &'a Ruleset,
        classifier: &'a Classifier,
        env: &'a Env,
        devices: &'a [Device],
        seed: u64,
    ) -> Aimed<'a> {
        let mut aimed = Aimed {
            ruleset,
            classifier,
            env,
            devices,
            frames: Frames { family: ruleset.family, derived: &ruleset.derived },
            random: Random::new(seed),
            elements: SecondaryMap::new(),
            callers: SecondaryMap::new(),
            targets: Vec::new(),
            bases: SecondaryMap::new(),
            next: 0,
            work: 0,
        };
        for (derived, data) in &ruleset.derived {
            aimed.elements[derived] = elements::cubes(&ruleset.sets, ruleset.family, data);
        }
        let rules = aimed.find_rules();
        let mut edges: Vec<Target> = rules.iter().flat_map(|&rule| aimed.edges(rule)).collect();
        for at in (1..edges.len()).rev() {
            edges.swap(at, aimed.random.below(at + 1));
        }
        // Where not all can be done, each rule comes first.
        aimed.targets = rules.into_iter().map(|rule| Target { rule, edge: None }).chain(edges).collect();
        aimed
    }

    /// How many packets there are at most.
    pub fn most(&self) -> usize {
        self.targets.len()
    }

    /// The rules of chains on the path, and who leads where.
    fn find_rules(&mut self) -> Vec<Rule> {
        let mut rules = Vec::new();
        let mut chains = self.ruleset.path_chains(&self.classifier.place);
        let mut known: EntitySet<Chain> = EntitySet::new();
        chains.retain(|&chain| known.insert(chain));
        while let Some(chain) = chains.pop() {
            for &rule in &self.ruleset.chains[chain].rules {
                rules.push(rule);
                if let Action::Jump(to) | Action::Goto(to) = self.ruleset.rules[rule].action {
                    self.callers[to].push(rule);
                    if known.insert(to) {
                        chains.push(to);
                    }
                }
            }
        }
        rules
    }

    fn edges(&self, rule: Rule) -> impl Iterator<Item = Target> {
        let clauses = self.ruleset.rules[rule].clauses.iter().enumerate();
        clauses.flat_map(move |(clause, data)| {
            let counts: Vec<usize> = match &data.kind {
                ClauseKind::Any(tests) => tests.iter().map(|test| self.values(test).len()).collect(),
                ClauseKind::Hotdrop(_) | ClauseKind::Doom(_) => vec![1],
                ClauseKind::Effect(_) | ClauseKind::Opaque(_) | ClauseKind::Beyond(_) => Vec::new(),
            };
            counts.into_iter().enumerate().flat_map(move |(test, count)| {
                let edge = move |at| Some((clause as u32, test as u32, at as u32));
                (0..count).map(move |at| Target { rule, edge: edge(at) })
            })
        })
    }

    /// What a packet can be like around a test: at each end of its intervals and beyond, with each bit of its mask
    /// flipped, like each element of its set and just beside it.
    fn values(&self, test: &Test) -> Vec<Cube> {
        let family = self.ruleset.family;
        if let Field::Derived(derived) = test.field {
            let like = &self.elements[derived];
            let beside = like.iter().filter_map(|cube| self.beside(cube));
            return like.iter().cloned().chain(beside).chain([Cube::from_iter([test.clone()])]).collect();
        }
        let point = |value: u128| {
            Cube::from_iter([Test { values: IntervalSet::point(value & test.mask), ..test.clone() }])
        };
        let intervals = test.values.intervals();
        if test.mask != max_value(test.field.bits(family)) {
            let Some(first) = intervals.first() else { return Vec::new() };
            let bits = (0..u128::BITS).filter(|bit| test.mask >> bit & 1 == 1);
            return bits.map(|bit| first.lo() ^ 1 << bit).chain([first.lo()]).map(point).collect();
        }
        let count = intervals.len().min(INTERVALS_MAX);
        let chosen = (0..count).map(|at| intervals[at * (intervals.len() - 1) / (count - 1).max(1)]);
        let ends = chosen.flat_map(|interval| {
            let beyond = interval.hi().checked_add(1).filter(|value| *value <= test.mask);
            [interval.lo().checked_sub(1), Some(interval.lo()), Some(interval.hi()), beyond]
        });
        let mut values: Vec<u128> = ends.flatten().collect();
        values.sort_unstable();
        values.dedup();
        values.into_iter().map(point).collect()
    }

    /// The value of a number of a test's [`Aimed::values`].
    fn value(&self, test: &Test, number: usize) -> Option<Cube> {
        match test.field {
            // Of many, one is not to be found by making all.
            Field::Derived(derived) if number < self.elements[derived].len() => {
                Some(self.elements[derived][number].clone())
            }
            _ => self.values(test).into_iter().nth(number),
        }
    }

    /// The cube, but just beyond the last of its ranges.
    fn beside(&self, cube: &Cube) -> Option<Cube> {
        let (last, rest) = cube.tests().split_last()?;
        let next = last.values.intervals().last()?.hi().checked_add(1).filter(|next| *next <= last.mask)?;
        let beside = Test { values: IntervalSet::point(next), ..last.clone() };
        Some(rest.iter().cloned().chain([beside]).collect())
    }

    /// What a packet is like that satisfies a rule.
    fn goal(&mut self, rule: Rule) -> Option<Cube> {
        let mut goal = Cube::all();
        for clause in &self.ruleset.rules[rule].clauses {
            if let ClauseKind::Any(tests) = &clause.kind {
                let test = tests.get(self.random.below(tests.len().max(1)))?;
                goal = self.satisfying(&goal, test)?;
            }
        }
        Some(goal)
    }

    /// The cube with one more test; of a set that a packet is to be in, one of its elements.
    fn satisfying(&mut self, cube: &Cube, test: &Test) -> Option<Cube> {
        let family = self.ruleset.family;
        let mut both = cube.clone();
        if let Field::Derived(derived) = test.field
            && test.holds(1)
        {
            let like = &self.elements[derived];
            if !like.is_empty() {
                return cube.intersect(&like[self.random.below(like.len())], family);
            }
        }
        both.and(test, family).then_some(both)
    }

    /// The goal, and what leads to the rule's chain, the last jump being the one of this number.
    fn way(&mut self, rule: Rule, goal: &Cube, number: usize) -> Cube {
        let mut demands = goal.clone();
        let mut chain = self.ruleset.rules[rule].chain;
        for jump in 0..JUMPS_MAX {
            let callers = &self.callers[chain];
            if callers.is_empty() {
                break;
            }
            let which = if jump == 0 { number } else { self.random.below(callers.len()) };
            let caller = callers[which % callers.len()];
            for clause in &self.ruleset.rules[caller].clauses {
                let ClauseKind::Any(tests) = &clause.kind else { continue };
                if tests.is_empty() {
                    continue;
                }
                let test = &tests[self.random.below(tests.len())];
                // What contradicts may have been written on the way.
                demands = self.satisfying(&demands, test).unwrap_or(demands);
            }
            chain = self.ruleset.rules[caller].chain;
        }
        demands
    }

    /// A packet that satisfies a rule, or gets as near as it came with so many repairs.
    fn reach(&mut self, rule: Rule, repairs: usize) -> Option<Base> {
        let mut best = None;
        let first = self.random.below(usize::from(u16::MAX));
        for way in first..first + WAYS_MAX {
            let Some(goal) = self.goal(rule) else { continue };
            let mut demands = self.way(rule, &goal, way);
            let mut base = Base { wanted: Wanted::new(), seed: self.random.next_u64() };
            for test in demands.tests() {
                base.wanted.entry(test.field).or_insert_with(|| {
                    pick(self.ruleset.family, &demands, test.field, Choice::Any, &mut self.random)
                });
            }
            if repairs == 0 {
                return Some(base);
            }
            for _ in 0..repairs {
                let caught = self.follow(rule, &self.input(&base.wanted, base.seed));
                best = Some(base.clone());
                let Some(by) = caught else { return best };
                let Some(field) = self.avoid(&by, &mut demands) else { break };
                let value = pick(self.ruleset.family, &demands, field, Choice::Any, &mut self.random);
                base.wanted.insert(field, value);
            }
        }
        best
    }

    /// The fields of the packet that satisfies a rule, but at one of the values of one of its tests; or all that a clause
    /// drops it for.
    fn at_edge(&mut self, base: &Base, rule: Rule, (clause, test, value): (u32, u32, u32)) -> Option<Wanted> {
        let cube = match &self.ruleset.rules[rule].clauses.get(clause as usize)?.kind {
            ClauseKind::Any(tests) => self.value(tests.get(test as usize)?, value as usize)?,
            ClauseKind::Hotdrop(tests) | ClauseKind::Doom(tests) => {
                let mut all = Cube::all();
                tests.iter().all(|test| all.and(test, self.ruleset.family)).then_some(all)?
            }
            ClauseKind::Effect(_) | ClauseKind::Opaque(_) | ClauseKind::Beyond(_) => return None,
        };
        let mut wanted = base.wanted.clone();
        for test in cube.tests() {
            let value = pick(self.ruleset.family, &cube, test.field, Choice::Any, &mut self.random);
            let before = wanted.get(&test.field).copied().unwrap_or(value);
            wanted.insert(test.field, before & !test.mask | value & test.mask);
        }
        Some(wanted)
    }

    fn input(&self, wanted: &Wanted, seed: u64) -> Input {
        input(self.classifier, self.devices, &self.frames, wanted, false, &mut Random::new(seed))
    }

    /// Whether a packet comes to a rule: if not, the jumps that it took and the rule that caught it, which is the last.
    fn follow(&mut self, rule: Rule, input: &Input) -> Option<Vec<Rule>> {
        let (mut came, mut caught, mut by, mut looked) = (false, false, Vec::new(), 0);
        let rules = &self.ruleset.rules;
        let mut trace = |event| {
            looked += 1;
            match event {
                Event::Clause(at, ..) | Event::Matched(at) if at == rule => came = true,
                Event::Matched(at) | Event::Possible(at) if !came && !caught => match rules[at].action {
                    Action::Continue | Action::Write(_) | Action::Effect { .. } => {}
                    Action::Jump(_) | Action::Goto(_) | Action::Return => by.push(at),
                    _ => {
                        by.push(at);
                        caught = true;
                    }
                },
                _ => {}
            }
        };
        let place = &self.classifier.place;
        self.ruleset.eval_traced(place, self.env, input, &mut State::new(0), &mut trace);
        self.work += looked;
        (!came).then_some(by)
    }

    /// Demands that a test of the last of these rules fails that can, or else one before; which field changes for that.
    fn avoid(&mut self, rules: &[Rule], demands: &mut Cube) -> Option<Field> {
        rules.iter().rev().find_map(|&rule| self.avoid_one(rule, demands))
    }

    fn avoid_one(&mut self, rule: Rule, demands: &mut Cube) -> Option<Field> {
        let family = self.ruleset.family;
        let clauses = &self.ruleset.rules[rule].clauses;
        let start = self.random.below(clauses.len().max(1));
        let turned = clauses.iter().cycle().skip(start).take(clauses.len());
        let mut tests: Vec<&Test> = turned
            .filter_map(|clause| match &clause.kind {
                ClauseKind::Any(tests) if tests.len() == 1 => Some(&tests[0]),
                _ => None,
            })
            .filter(|test| !matches!(test.field, Field::Derived(_)))
            .collect();
        // Fields of which nothing is asked yet come first.
        tests.sort_by_key(|test| demands.tests().iter().any(|demand| demand.field == test.field));
        for test in tests {
            let mut narrower = demands.clone();
            if narrower.and(&test.negated(family), family) {
                *demands = narrower;
                return Some(test.field);
            }
        }
        None
    }
}

impl Iterator for Aimed<'_> {
    type Item = Input;

    fn next(&mut self) -> Option<Input> {
        loop {
            let Target { rule, edge } = *self.targets.get(self.next)?;
            self.next += 1;
            let Some(edge) = edge else {
                // Behind the bound, what rules before would catch is not looked for.
                let repairs = if self.work < WORK_MAX { REPAIRS_MAX } else { 0 };
                self.bases[rule] = self.reach(rule, repairs);
                match &self.bases[rule] {
                    Some(base) => return Some(self.input(&base.wanted, base.seed)),
                    None => continue,
                }
            };
            let Some(base) = self.bases[rule].take() else { continue };
            let wanted = self.at_edge(&base, rule, edge);
            let input = wanted.map(|wanted| self.input(&wanted, base.seed));
            self.bases[rule] = Some(base);
            if input.is_some() {
                return input;
            }
        }
    }
}
