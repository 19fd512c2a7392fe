//! `flatten`: chains and jumps become stages of cubes.
//!
//! A stage stands for a position in the rules together with what evaluation remembers there: the chains to come back
//! to, whether an earlier rule may have dropped the packet, whether the rule at hand will, whether the packet is a
//! fragment, whether a clause relied on its having no connection. From its position it
//! runs down its chain, an entry for each way a rule can turn out. What changes a field or spends state ends the stage,
//! and so that suffixes are not copied once for each jump, a stage also ends at the next multiple of `BLOCK` rules
//! once something in it comes back later. Doubt does not come back later but begins the stage again: what did not hold
//! before does not hold then either, and every stage has at most one such double. Entries therefore grow linearly with the rules for each return stack; their
//! number is bounded all the same, and what lies beyond the bound is deferred.

use std::collections::{BTreeSet, HashMap, VecDeque};

use cranelift_entity::PrimaryMap;
use polc_ir::classifier::{Classifier, EntryData, Exit, Origin, StageData};
use polc_ir::cube::{Cube, Test};
use polc_ir::derived::{DerivedData, address_types};
use polc_ir::diag::{Code, Diagnostic};
use polc_ir::entities::{Chain, Derived, Rule, Stage};
use polc_ir::env::{Connections, Env, Fragments, Place};
use polc_ir::field::Field;
use polc_ir::interval::{Interval, IntervalSet};
use polc_ir::limits::{CLASSIFIER_ENTRIES_MAX, ENTRIES_BASE, ENTRIES_PER_RULE_MAX, RULE_CUBES_MAX};
use polc_ir::outcome::{Count, Decider, Ending, Verdict};
use polc_ir::ruleset::deferral::{
    ClauseAbility, SUPPOSED_STATE, clause_ability, drops_undecided, is_handed_over, supposes,
};
use polc_ir::ruleset::{Action, Behind, ClauseKind, Policy, Ruleset, Write};
use polc_ir::set;
use smallvec::{SmallVec, smallvec};

use crate::members::Members;

/// The rules have more ways through them than a classifier may have entries.
pub const TOO_MANY_ENTRIES: Code = Code(500);

/// A rule asks for one of more combinations than it may expand to.
pub const TOO_MANY_CUBES: Code = Code(503);

/// A stage ends at a multiple of this many rules once something in it comes back later.
const BLOCK: usize = 8;

/// Flattens the path of `place`. `env` gives the host's addresses.
pub fn flatten(ruleset: &Ruleset, place: &Place, env: &Env, diagnostics: &mut Vec<Diagnostic>) -> Classifier {
    let mut flattener = Flattener {
        ruleset,
        place,
        chains: ruleset.path_chains(place),
        frames: Vec::new(),
        frame_ids: HashMap::new(),
        ids: HashMap::new(),
        queue: VecDeque::new(),
        built: Vec::new(),
        entries: 0,
        entries_max: CLASSIFIER_ENTRIES_MAX.min(ENTRIES_BASE + ENTRIES_PER_RULE_MAX * ruleset.rules.len()),
        many_cubes: BTreeSet::new(),
        tested: Vec::new(),
        sets: Members::default(),
    };
    flattener.run(env, diagnostics)
}

/// A return stack, as an index into the frames; `None` is the empty one.
type Stack = Option<u32>;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Frame {
    chain: Chain,
    next: usize,
    below: Stack,
    /// The jump was only possible.
    hypothetical: bool,
    /// The outermost hypothetical frame at or below this one.
    outermost: Stack,
}

/// What a stage stands for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// Index of the base chain in the path.
    base: usize,
    chain: Chain,
    rule: usize,
    /// Clauses of that rule that are already known to hold.
    clause: usize,
    /// One of them is unknown.
    unknown: bool,
    /// One of them dooms the packet: it is dropped behind the rule at the latest.
    doomed: bool,
    stack: Stack,
    doubt: bool,
    fragment: bool,
    /// A clause was evaluated as for a packet without a connection.
    supposed: bool,
}

/// What a rule asks for, as alternatives: mostly one.
type Cubes = SmallVec<[Cube; 1]>;

/// An entry; its exit's stages are still numbered in the order of discovery.
struct Entry {
    cube: Cube,
    rule: Option<Rule>,
    onward: Onward,
}

impl Entry {
    fn drop_undecided(&mut self) {
        if let Exit::End(ending) | Exit::EndIfAbsent(ending) = &mut self.onward.exit
            && ending.verdict == Verdict::Defer
        {
            ending.verdict = Verdict::Drop;
        }
    }
}

/// What happens next, and what a packet is counted for on the way there.
#[derive(Clone)]
struct Onward {
    counts: Vec<Count>,
    exit: Exit,
}

impl Onward {
    fn end(verdict: Verdict, by: Decider) -> Onward {
        Onward { counts: Vec::new(), exit: Exit::End(Ending { verdict, by }) }
    }

    /// Drops the packet; if it was supposed to have no connection, only if it has none.
    fn drop(key: Key, by: Decider) -> Onward {
        let ending = Ending { verdict: Verdict::Drop, by };
        let exit = if key.supposed { Exit::EndIfAbsent(ending) } else { Exit::End(ending) };
        Onward { counts: Vec::new(), exit }
    }

    fn go(stage: Stage) -> Onward {
        Onward { counts: Vec::new(), exit: Exit::Then { writes: Vec::new(), stage } }
    }

    /// Leaves the packet to the kernel.
    fn defer(rule: Rule) -> Onward {
        Onward::end(Verdict::Defer, Decider::Rule(rule))
    }

    /// Counts `first`, ahead of everything, if it is to be counted.
    fn counting(mut self, first: Count, counted: bool) -> Onward {
        if counted {
            self.counts.insert(0, first);
        }
        self
    }
}

struct Flattener<'a> {
    ruleset: &'a Ruleset,
    place: &'a Place,
    chains: Vec<Chain>,
    frames: Vec<Frame>,
    frame_ids: HashMap<Frame, u32>,
    ids: HashMap<Key, Stage>,
    queue: VecDeque<(Key, Stage)>,
    built: Vec<(Vec<Entry>, Option<Origin>)>,
    entries: usize,
    entries_max: usize,
    /// Rules that would expand to more than [`RULE_CUBES_MAX`].
    many_cubes: BTreeSet<Rule>,
    /// Derived fields that entries test, in order of discovery.
    tested: Vec<Derived>,
    /// Which of them are looked up in tables of sets.
    sets: Members,
}

impl Flattener<'_> {
    fn run(&mut self, env: &Env, diagnostics: &mut Vec<Diagnostic>) -> Classifier {
        let family = self.ruleset.family;
        let whole = self.start(0);
        let root = match whole {
            None => self.add(vec![Entry::rest(Onward::end(Verdict::Accept, Decider::Nothing))], None),
            Some(key) => {
                let whole = self.stage(key);
                if self.place.fragments == Fragments::Unresolved {
                    let pieces = self.stage(Key { fragment: true, ..key });
                    let mut cube = Cube::all();
                    let possible =
                        cube.and(&Test::new(Field::Fragment, family, IntervalSet::point(1)), family);
                    debug_assert!(possible, "a bit can be 1");
                    let pieces = Entry { cube, rule: None, onward: Onward::go(pieces) };
                    self.add(vec![pieces, Entry::rest(Onward::go(whole))], None)
                } else {
                    whole
                }
            }
        };
        let mut refused = None;
        while let Some((key, id)) = self.queue.pop_front() {
            let entries = if self.entries > self.entries_max {
                let rule = self.ruleset.chains[key.chain].rules.get(key.rule).copied();
                let by = rule.map_or(Decider::Policy(self.chains[key.base]), Decider::Rule);
                refused = refused.or(rule);
                vec![Entry::rest(Onward::end(Verdict::Defer, by))]
            } else {
                let mut entries = self.build(key);
                if drops_undecided(self.place, key.fragment) {
                    entries.iter_mut().for_each(Entry::drop_undecided);
                }
                entries
            };
            self.entries += entries.len();
            self.built[id.as_u32() as usize] = (entries, Some((key.chain, key.rule as u32)));
        }
        for &rule in &self.many_cubes {
            let message = format!(
                "the rule asks for one of more than {RULE_CUBES_MAX} combinations; packets that get as far are deferred"
            );
            let finding = Diagnostic::warning(TOO_MANY_CUBES, message, self.ruleset.rules[rule].span);
            diagnostics.push(finding.with_hint("make several rules of it, with fewer alternatives each"));
        }
        if let Some(rule) = refused {
            let message = format!(
                "the rules have more than {} ways through them; from this rule on packets are deferred",
                self.entries_max
            );
            diagnostics.push(
                Diagnostic::warning(TOO_MANY_ENTRIES, message, self.ruleset.rules[rule].span)
                    .with_hint("chains that are jumped to from many places, and come back, multiply; let them end in a verdict"),
            );
        }
        self.sets = Members::choose(self.ruleset, &self.tested, diagnostics);
        let root = self.prelude(root, env);
        self.finish(root)
    }

    /// The key of a base chain's start, with nothing remembered; `None` past the last.
    fn start(&self, base: usize) -> Option<Key> {
        let &chain = self.chains.get(base)?;
        Some(Key {
            base,
            chain,
            rule: 0,
            clause: 0,
            unknown: false,
            doomed: false,
            stack: None,
            doubt: false,
            fragment: false,
            supposed: false,
        })
    }

    fn stage(&mut self, key: Key) -> Stage {
        if let Some(&id) = self.ids.get(&key) {
            return id;
        }
        let id = self.add(Vec::new(), None);
        self.ids.insert(key, id);
        self.queue.push_back((key, id));
        id
    }

    fn add(&mut self, entries: Vec<Entry>, origin: Option<Origin>) -> Stage {
        let id = Stage::from_u32(self.built.len() as u32);
        self.built.push((entries, origin));
        id
    }

    fn push(&mut self, stack: Stack, chain: Chain, next: usize, hypothetical: bool) -> Stack {
        let outermost = stack.and_then(|top| self.frames[top as usize].outermost);
        let id = self.frames.len() as u32;
        let outermost = outermost.or(hypothetical.then_some(id));
        let frame = Frame { chain, next, below: stack, hypothetical, outermost };
        // The same frame again has the number of the first: compare without its own number.
        let probe = Frame { outermost: outermost.filter(|&own| own != id), ..frame };
        if let Some(&known) = self.frame_ids.get(&probe) {
            return Some(known);
        }
        self.frames.push(frame);
        self.frame_ids.insert(probe, id);
        Some(id)
    }

    fn outermost(&self, stack: Stack) -> Stack {
        stack.and_then(|top| self.frames[top as usize].outermost)
    }

    /// Goes on at a position: another stage, or what the end of the base chain brings.
    fn go_on(&mut self, mut key: Key) -> Onward {
        loop {
            if key.rule < self.ruleset.chains[key.chain].rules.len() {
                return Onward::go(self.stage(key));
            }
            match key.stack {
                Some(top) => {
                    let frame = self.frames[top as usize];
                    key = Key {
                        chain: frame.chain,
                        rule: frame.next,
                        clause: 0,
                        unknown: false,
                        doomed: false,
                        stack: frame.below,
                        ..key
                    };
                }
                None => return self.policy(key),
            }
        }
    }

    fn policy(&mut self, key: Key) -> Onward {
        let chain = self.chains[key.base];
        let drop = self.ruleset.chains[chain].base.is_some_and(|base| base.policy == Policy::Drop);
        let by = Decider::Policy(chain);
        let onward = if drop { Onward::drop(key, by) } else { self.accept(key, by, false) };
        onward.counting(Count::Policy(chain), self.place.counters.counts(true))
    }

    /// Leaves the base chain, which let the packet on or does not see it (`passed`).
    fn accept(&mut self, key: Key, by: Decider, passed: bool) -> Onward {
        let chain = self.chains[key.base];
        let Key { doubt, fragment, supposed, .. } = key;
        let next = self.ruleset.next_base(&self.chains, key.base, passed);
        match self.start(next).map(|start| Key { doubt, fragment, supposed, ..start }) {
            None => Onward::end(if doubt { Verdict::Defer } else { Verdict::Accept }, by),
            Some(next) => match self.ruleset.behind(chain, self.place, fragment) {
                Behind::Known => self.go_on(next),
                Behind::IfAbsent => self.go_on(Key { supposed: true, ..next }),
                Behind::Unknown => Onward::end(Verdict::Defer, Decider::Policy(chain)),
            },
        }
    }

    /// Drops the packet; in a chain that was only possibly jumped to, goes on behind that jump as if it may have been.
    fn dropped(&mut self, rule: Rule, key: Key, by: Decider) -> Onward {
        match self.outermost(key.stack) {
            Some(outermost) => self.behind(rule, key, outermost),
            None => Onward::drop(key, by),
        }
    }

    /// A rule may have dropped the packet: on in doubt, unless what can't be decided is dropped.
    fn doubt(&mut self, rule: Rule, on: Key) -> Onward {
        if drops_undecided(self.place, on.fragment) {
            return Onward::defer(rule);
        }
        self.go_on(Key { doubt: true, ..on })
    }

    /// The packet may have been dropped in a chain that was only possibly jumped to: on behind that jump.
    fn behind(&mut self, rule: Rule, key: Key, outermost: u32) -> Onward {
        let frame = self.frames[outermost as usize];
        let on = Key {
            chain: frame.chain,
            rule: frame.next,
            clause: 0,
            unknown: false,
            doomed: false,
            stack: frame.below,
            ..key
        };
        self.doubt(rule, on)
    }

    fn build(&mut self, start: Key) -> Vec<Entry> {
        let ruleset = self.ruleset;
        let mut entries: Vec<Entry> = Vec::new();
        let mut key = start;
        let mut comes_back = false;
        loop {
            let Some(&rule) = ruleset.chains[key.chain].rules.get(key.rule) else {
                let onward = self.go_on(key);
                entries.push(Entry::rest(onward));
                return entries;
            };
            if comes_back && key.rule.is_multiple_of(BLOCK) && key.clause == 0 {
                let onward = self.go_on(key);
                entries.push(Entry::rest(onward));
                return entries;
            }
            let ends = self.rule(rule, start, key, &mut entries, &mut comes_back);
            if entries.last().is_some_and(|entry| entry.cube.is_all()) {
                return entries;
            }
            if key.doomed {
                entries.push(Entry::rest(self.dropped(rule, key, Decider::Hotdrop(rule))));
                return entries;
            }
            key = Key { rule: key.rule + 1, clause: 0, unknown: false, ..key };
            if ends {
                let onward = self.go_on(key);
                entries.push(Entry::rest(onward));
                return entries;
            }
        }
    }

    /// Adds a rule's entries. True if the stage has to end behind it.
    fn rule(
        &mut self,
        rule: Rule,
        start: Key,
        key: Key,
        entries: &mut Vec<Entry>,
        comes_back: &mut bool,
    ) -> bool {
        let ruleset = self.ruleset;
        let data = &ruleset.rules[rule];
        let next = Key { rule: key.rule + 1, clause: 0, unknown: false, doomed: false, ..key };
        let mut cubes: Cubes = smallvec![Cube::all()];
        let mut unknown = key.unknown;
        for (index, clause) in data.clauses.iter().enumerate().skip(key.clause) {
            let ability = clause_ability(ruleset, self.place, clause, key.fragment);
            if ability == ClauseAbility::Known && !key.supposed && supposes(self.place, clause, key.fragment)
            {
                let onward = Onward::go(self.stage(Key { clause: index, unknown, supposed: true, ..key }));
                emit(entries, cubes, rule, onward);
                *comes_back = true;
                return false;
            }
            match ability {
                ClauseAbility::Observable(_) => {
                    emit(entries, cubes, rule, Onward::defer(rule));
                    return false;
                }
                ClauseAbility::Unknown(_) if clause.kind.drops_if().is_some() => {
                    if !key.doubt {
                        let onward = self.doubt(rule, start);
                        emit(entries, cubes, rule, onward);
                        return false;
                    }
                }
                ClauseAbility::Unknown(_) if matches!(clause.kind, ClauseKind::Beyond(_)) => {}
                ClauseAbility::Unknown(_) => unknown = true,
                ClauseAbility::Known => match &clause.kind {
                    ClauseKind::Any(tests) => {
                        cubes = self.narrow(cubes, tests);
                        if cubes.is_empty() {
                            return false;
                        }
                        if cubes.len() > RULE_CUBES_MAX {
                            self.many_cubes.insert(rule);
                            emit(entries, cubes, rule, Onward::defer(rule));
                            return false;
                        }
                    }
                    ClauseKind::Hotdrop(tests) => {
                        let dropped = self.narrow_all(cubes.clone(), tests);
                        if dropped.is_empty() {
                            continue;
                        }
                        let onward = if unknown && !key.doomed {
                            *comes_back = true;
                            self.doubt(rule, next)
                        } else {
                            self.dropped(rule, key, Decider::Hotdrop(rule))
                        };
                        emit(entries, dropped, rule, onward);
                    }
                    ClauseKind::Doom(_) if key.doomed || unknown && key.doubt => {}
                    ClauseKind::Doom(tests) => {
                        let doomed = self.narrow_all(cubes.clone(), tests);
                        if doomed.is_empty() {
                            continue;
                        }
                        let onward = if unknown {
                            self.doubt(rule, start)
                        } else {
                            Onward::go(self.stage(Key { clause: index + 1, doomed: true, ..key }))
                        };
                        emit(entries, doomed, rule, onward);
                    }
                    ClauseKind::Beyond(test) => {
                        let beyond = self.narrow(cubes.clone(), std::slice::from_ref(&**test));
                        emit(entries, beyond, rule, Onward::defer(rule));
                    }
                    ClauseKind::Effect(_) if unknown => {
                        emit(entries, cubes, rule, Onward::defer(rule));
                        return false;
                    }
                    ClauseKind::Effect(test) => {
                        let holds = self.stage(Key { clause: index + 1, unknown, ..key });
                        let fails = match key.doomed {
                            true => self.dropped(rule, key, Decider::Hotdrop(rule)),
                            false => self.go_on(next),
                        };
                        let fails = self.as_stage(fails);
                        let (yes, no) =
                            if ruleset.effect_tests[*test].negate { (fails, holds) } else { (holds, fails) };
                        let exit = Exit::Test { test: *test, yes, no };
                        emit(entries, cubes, rule, Onward { counts: Vec::new(), exit });
                        return true;
                    }
                    ClauseKind::Opaque(_) => {
                        emit(entries, cubes, rule, Onward::defer(rule));
                        return false;
                    }
                },
            }
        }
        if unknown {
            self.possible(rule, [start, key, next], cubes, entries, comes_back)
        } else {
            self.matched(rule, key, next, cubes, entries, comes_back)
        }
    }

    /// A rule that may match: see `Ruleset::eval`. The positions are where the stage starts, the rule's, and the next.
    fn possible(
        &mut self,
        rule: Rule,
        [start, key, next]: [Key; 3],
        cubes: Cubes,
        entries: &mut Vec<Entry>,
        comes_back: &mut bool,
    ) -> bool {
        let action = &self.ruleset.rules[rule].action;
        match *if key.doomed { action.of_doomed() } else { action } {
            Action::Drop if key.doomed => {}
            Action::Continue => {}
            Action::Drop if key.doubt => {}
            Action::Drop => {
                let onward = self.doubt(rule, start);
                emit(entries, cubes, rule, onward);
            }
            Action::Jump(to) => {
                let stack = self.push(key.stack, key.chain, next.rule, true);
                let onward = self.go_on(Key { chain: to, rule: 0, stack, ..next });
                emit(entries, cubes, rule, onward);
                *comes_back = true;
            }
            _ => emit(entries, cubes, rule, Onward::defer(rule)),
        }
        false
    }

    fn matched(
        &mut self,
        rule: Rule,
        key: Key,
        next: Key,
        cubes: Cubes,
        entries: &mut Vec<Entry>,
        comes_back: &mut bool,
    ) -> bool {
        let action = &self.ruleset.rules[rule].action;
        let (action, by) = match key.doomed {
            true => (action.of_doomed(), Decider::Hotdrop(rule)),
            false => (action, Decider::Rule(rule)),
        };
        let outermost = self.outermost(key.stack);
        if is_handed_over(self.place, action, outermost.is_some(), key.doubt) {
            emit(entries, cubes, rule, Onward::defer(rule));
            return false;
        }
        let end = |verdict| Onward::end(verdict, Decider::Rule(rule));
        let mut ends = false;
        let onward = match action {
            // Nobody would see that the rule matched.
            Action::Continue if outermost.is_some() => return false,
            Action::Continue => {
                *comes_back = true;
                self.go_on(next)
            }
            Action::Accept => self.accept(key, Decider::Rule(rule), false),
            Action::Pass => self.accept(key, Decider::Rule(rule), true),
            Action::Drop => self.dropped(rule, key, by),
            Action::Reject(with) => end(Verdict::Reject(*with)),
            Action::Jump(to) => {
                *comes_back = true;
                let stack = self.push(key.stack, key.chain, next.rule, false);
                self.go_on(Key { chain: *to, rule: 0, stack, ..next })
            }
            Action::Goto(to) => self.go_on(Key { chain: *to, rule: 0, ..next }),
            Action::Return => {
                let len = self.ruleset.chains[key.chain].rules.len();
                self.go_on(Key { rule: len, ..next })
            }
            Action::Write(write) => {
                ends = true;
                let onward = self.go_on(next);
                let stage = self.as_stage(onward);
                Onward { counts: Vec::new(), exit: Exit::Then { writes: vec![*write], stage } }
            }
            Action::Effect { .. } | Action::Steal(_) => Onward::defer(rule),
        };
        let counted =
            outermost.is_none() && self.place.counters.counts(self.ruleset.rules[rule].action.ends());
        let onward = onward.counting(Count::Rule(rule), counted);
        emit(entries, cubes, rule, onward);
        ends
    }

    /// A stage that goes on at once.
    fn as_stage(&mut self, onward: Onward) -> Stage {
        match onward.exit {
            Exit::Then { ref writes, stage } if writes.is_empty() && onward.counts.is_empty() => stage,
            _ => self.add(vec![Entry::rest(onward)], None),
        }
    }

    /// The cubes narrowed by a conjunction of tests.
    fn narrow_all(&mut self, cubes: Cubes, tests: &[Test]) -> Cubes {
        tests.iter().fold(cubes, |cubes, test| self.narrow(cubes, std::slice::from_ref(test)))
    }

    /// The cubes narrowed by a disjunction of tests.
    fn narrow(&mut self, mut cubes: Cubes, tests: &[Test]) -> Cubes {
        let family = self.ruleset.family;
        let unresolved = self.place.fragments == Fragments::Unresolved;
        let looked_up = matches!(self.place.connections, Connections::LookedUp { .. });
        let mut narrowed = Cubes::new();
        for test in tests {
            let fixed = match test.field {
                // Neither whole packets nor, to the rules, reassembled ones have an offset.
                Field::FragOffset if unresolved => Some(0),
                Field::CtState if looked_up => Some(SUPPOSED_STATE.into()),
                _ => None,
            };
            if let Some(value) = fixed {
                if test.holds(value) {
                    return cubes;
                }
                continue;
            }
            if let Field::Derived(derived) = test.field
                && !self.tested.contains(&derived)
            {
                self.tested.push(derived);
            }
            if let [_] = tests {
                cubes.retain(|cube| cube.and(test, family));
                return cubes;
            }
            for cube in &cubes {
                let mut both = cube.clone();
                if both.and(test, family) {
                    narrowed.push(both);
                }
            }
        }
        narrowed
    }

    /// Stages that compute set membership and address types, ahead of everything.
    fn prelude(&mut self, root: Stage, env: &Env) -> Stage {
        let family = self.ruleset.family;
        let mut root = root;
        for derived in std::mem::take(&mut self.tested) {
            let field = Field::Derived(derived);
            let write = |value: u128| Write { field, clear: u128::from(u32::MAX), xor: value };
            let exit = |value: u128, stage| Exit::Then { writes: vec![write(value)], stage };
            let go = |exit| Onward { counts: Vec::new(), exit };
            match &self.ruleset.derived[derived] {
                DerivedData::Member { .. } if self.sets.fields.contains(&derived) => {}
                DerivedData::Member { set, ends, return_nomatch } => {
                    // From the last set of a list to the first, each going on where its elements don't decide.
                    let mut next = go(exit(0, root));
                    for leaf in set::leaves(&self.ruleset.sets, *set).into_iter().rev() {
                        let data = &self.ruleset.sets[leaf];
                        let wanted = *return_nomatch && data.takes_nomatch();
                        let entry = |(mut cube, nomatch): (Cube, bool)| {
                            if self.place.fragments == Fragments::Unresolved {
                                cube.forget(Field::FragOffset);
                            }
                            let onward = if nomatch == wanted { go(exit(1, root)) } else { next.clone() };
                            Entry { cube, rule: None, onward }
                        };
                        let cubes = set::cubes(data, family, ends);
                        let mut entries: Vec<Entry> = cubes.into_iter().map(entry).collect();
                        entries.push(Entry::rest(next));
                        let stage = self.add(entries, None);
                        next = Onward::go(stage);
                    }
                    root = self.as_stage(next);
                }
                DerivedData::AddressType { of, .. } => {
                    let entry = |(range, kind): (Interval, u8)| {
                        let mut cube = Cube::all();
                        let test = Test::new(Field::address(*of), family, range.into());
                        let onward = go(exit(kind.into(), root));
                        cube.and(&test, family).then_some(Entry { cube, rule: None, onward })
                    };
                    let mut entries: Vec<Entry> =
                        address_types(family, env).into_iter().filter_map(entry).collect();
                    entries.push(Entry::rest(go(exit(1, root))));
                    root = self.add(entries, None);
                }
                _ => {}
            }
        }
        root
    }

    /// Numbers the stages so that each refers to smaller numbers only, and leaves out what can't be reached.
    fn finish(&mut self, root: Stage) -> Classifier {
        let built = std::mem::take(&mut self.built);
        let mut number: Vec<Option<Stage>> = vec![None; built.len()];
        let mut order: Vec<usize> = Vec::new();
        let mut path = vec![(root.as_u32() as usize, 0usize)];
        let mut seen = vec![false; built.len()];
        seen[root.as_u32() as usize] = true;
        while let Some((stage, at)) = path.last_mut() {
            let Some(entry) = built[*stage].0.get(*at) else {
                number[*stage] = Some(Stage::from_u32(order.len() as u32));
                order.push(*stage);
                path.pop();
                continue;
            };
            // One at a time: the second of two may lead to the first.
            let mut successors = entry.onward.exit.successors().map(|stage| stage.as_u32() as usize);
            match successors.find(|&stage| !seen[stage]) {
                Some(successor) => {
                    seen[successor] = true;
                    path.push((successor, 0));
                }
                None => *at += 1,
            }
        }
        let renumber =
            |stage: Stage| number[stage.as_u32() as usize].expect("what an exit leads to was visited");
        let mut classifier = Classifier {
            family: self.ruleset.family,
            place: self.place.clone(),
            stages: PrimaryMap::with_capacity(order.len()),
            entries: PrimaryMap::with_capacity(order.iter().map(|&stage| built[stage].0.len()).sum()),
            root: renumber(root),
            derived: self.ruleset.derived.clone(),
            sets: self.ruleset.sets.clone(),
            members: std::mem::take(&mut self.sets.fields),
            set_shapes: std::mem::take(&mut self.sets.shapes),
            effect_tests: self.ruleset.effect_tests.clone(),
        };
        let mut built = built;
        for old in order {
            let (entries, origin) = std::mem::take(&mut built[old]);
            let data = StageData { entries: Vec::with_capacity(entries.len()), origin };
            let stage = classifier.stages.push(data);
            for Entry { cube, rule, onward: Onward { counts, exit } } in entries {
                let exit = exit.renumbered(renumber);
                let all = cube.is_all();
                let entry = classifier.entries.push(EntryData { stage, cube, rule, counts, exit });
                classifier.stages[stage].entries.push(entry);
                if all {
                    break;
                }
            }
        }
        classifier
    }
}

impl Entry {
    /// An entry for every packet that comes so far.
    fn rest(onward: Onward) -> Entry {
        Entry { cube: Cube::all(), rule: None, onward }
    }
}

/// Adds an entry for each cube, unless an entry before it has the same cube and takes every packet.
fn emit(entries: &mut Vec<Entry>, cubes: Cubes, rule: Rule, onward: Onward) {
    let onwards = std::iter::repeat_n(onward, cubes.len());
    for (cube, onward) in cubes.into_iter().zip(onwards) {
        // Guards repeat from rule to rule: look back a few entries for one that covers this.
        let covered = entries.iter().rev().take(16).any(|earlier| earlier.cube.is_superset(&cube));
        if !covered {
            entries.push(Entry { cube, rule: Some(rule), onward });
        }
    }
}

#[cfg(test)]
mod tests {
    use polc_frontend_iptables::{ParseOptions, lower, parse};
    use polc_ir::env::{Attach, Mode};
    use polc_ir::hook::{Hook, Semantics};
    use polc_ir::source::SourceMap;

    use super::*;
    use crate::place::place;

    #[test]
    fn stages_lead_to_smaller_numbers_where_one_way_joins_the_other() {
        for rule in ["", "-j MARK --set-xmark 1", "-j own"] {
            let text = format!(
                "*filter\n:INPUT DROP [0:0]\n:own - [0:0]\n\
                 -A INPUT -m statistic --mode nth ! --every 3 --packet 0 {rule}\n\
                 -A INPUT -m statistic --mode random ! --probability 0.5 {rule}\n\
                 -A INPUT -s 10.0.0.0/8 -j ACCEPT\n-A own -p tcp -j DROP\nCOMMIT\n"
            );
            let mut sources = SourceMap::new();
            let file = sources.add("rules", text);
            let (dump, findings) = parse(&sources, file, &ParseOptions::default());
            assert!(findings.is_empty(), "{findings:?}");
            let ruleset = lower(&dump, &[], Semantics::Legacy);
            let place = place(&[Hook::Input], Attach::Xdp, Mode::Replace, false);
            let flat = flatten(&ruleset, &place, &Env::default(), &mut Vec::new());
            assert_eq!(flat.verify(), Vec::<String>::new(), "{flat}");
        }
    }
}
