//! The entries that no packet took: for each a packet that does, or that none can.
//!
//! From an entry back to the root, every way is gone, one after another: what has to hold behind a step, each write undone,
//! and before it what the step's entry asks for and the earlier ones of its stage leave. A way ends where nothing is left,
//! or the same was left there before; entries that lead on alike are one step, so that ways that part and meet again
//! are few. At the root packets are made of what is left. If nothing is left of any way, no packet takes the entry: each
//! step asks for no more than what is necessary. Ways may be many all the same, and a search of what clauses leave long;
//! both are bounded by the tests that are looked at.

use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;

use polc_ir::classifier::Exit;
use polc_ir::entities::{Entry, Stage};
use polc_ir::env::Input;
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::interval::IntervalSet;
use polc_ir::ruleset::Write;
use polc_ir::state::State;

use super::directed::Directed;
use super::facts::Facts;
use super::frame::Wanted;
use super::hidden::Hidden;
use super::random::Random;
use super::region::{Region, TooLong};
use super::solve::{Budget, Problem, Search};

/// Tests that are looked at for one entry, and for all: some seconds.
const TESTS_MAX: usize = 1 << 22;
const TESTS_OF_ALL_MAX: usize = 1 << 26;
/// Of what is left for an entry, the share that one way's end may use.
const SHARE: usize = 4;
/// Regions of one way that packets are made for, all regions of an entry, and packets for each.
const REGIONS_OF_WAY_MAX: usize = 8;
const REGIONS_MAX: usize = 64;
const PACKETS: usize = 8;
/// How often a packet is shown whose way depends on a counter or a random number.
const SHOWS: usize = 32;
/// Bytes that packets have rather than more.
const USUAL_BYTES_MAX: u128 = 1_400;

/// What became of an entry that no packet had taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// A packet took it.
    Taken,
    /// No packet takes it.
    Unreachable,
    /// Nothing rules it out, and no packet was made that takes it.
    NotTaken,
    /// The search was too long.
    Undecided,
}

/// The entries that no packet took.
#[derive(Debug)]
pub(crate) struct Untaken<'a> {
    directed: &'a Directed<'a>,
    facts: &'a Facts,
    hidden: Hidden<'a>,
    left: Budget,
    random: Random,
}

/// A step back that is left to try: to a stage where one of these entries is taken, and what has to hold behind it.
struct Back<'a> {
    entries: Vec<Entry>,
    problem: Rc<Problem<'a>>,
}

/// What a search came to see.
#[derive(Default)]
struct Seen<'a> {
    /// Where it was, and with what.
    places: HashSet<(Stage, Rc<Problem<'a>>)>,
    /// Regions that nothing ruled out.
    regions: usize,
    /// Whether more was let through than there is, because entries that lead on alike were taken together.
    is_loose: bool,
    /// Whether something was left out because it took too long.
    gave_up: bool,
}

impl<'a> Untaken<'a> {
    pub(super) fn new(
        directed: &'a Directed<'a>,
        facts: &'a Facts,
        was_taken: impl Fn(Entry) -> bool,
        seed: u64,
    ) -> Untaken<'a> {
        let hidden = Hidden::new(directed.classifier(), &facts.always, |entry| !was_taken(entry));
        let left = Budget::new(TESTS_OF_ALL_MAX);
        Untaken { directed, facts, hidden, left, random: Random::new(seed) }
    }

    /// Whether it is known that no packet takes an entry.
    pub(crate) fn is_unreachable(&self, entry: Entry) -> bool {
        self.hidden.entries.contains(entry)
    }

    /// A packet that takes an entry, or gets as near as it came.
    pub(crate) fn towards(&mut self, entry: Entry) -> Input {
        let cube = &self.directed.classifier().entries[entry].cube;
        self.directed.towards(entry, cube, &mut self.random)
    }

    /// Searches for a packet that takes an entry; `show` is given some that may, until it says that one did.
    pub(crate) fn seek(&mut self, entry: Entry, show: &mut dyn FnMut(Input) -> bool) -> Fate {
        if self.is_unreachable(entry) {
            return Fate::Unreachable;
        }
        let given = self.left.left().min(TESTS_MAX);
        if given == 0 {
            return Fate::Undecided;
        }
        let mut budget = Budget::new(given);
        let mut fate = Fate::Undecided;
        for apart in [false, true] {
            let mut seen = Seen::default();
            let found = self.search(entry, apart, &mut budget, &mut seen, show);
            fate = match found {
                Ok(true) => Fate::Taken,
                _ if seen.regions > 0 => Fate::NotTaken,
                Ok(false) if !seen.gave_up => Fate::Unreachable,
                _ => Fate::Undecided,
            };
            if fate != Fate::NotTaken || !seen.is_loose {
                break;
            }
        }
        _ = self.left.spend(given - budget.left());
        if fate == Fate::Unreachable {
            self.hidden.entries.insert(entry);
        }
        fate
    }

    /// Goes the ways to an entry; whether a packet took it. Entries of a stage that lead on alike are taken together
    /// unless they are to be kept `apart` where that lets more through.
    fn search(
        &mut self,
        entry: Entry,
        apart: bool,
        budget: &mut Budget,
        seen: &mut Seen<'a>,
        show: &mut dyn FnMut(Input) -> bool,
    ) -> Result<bool, TooLong> {
        let classifier = self.directed.classifier();
        let mut left = vec![Back { entries: vec![entry], problem: Rc::default() }];
        while let Some(Back { entries, problem: behind }) = left.pop() {
            let problem = Problem::clone(&behind);
            let Some((problem, is_exact)) = self.hidden.enter(&entries, problem, budget)? else { continue };
            if !is_exact && apart {
                left.extend(
                    entries.iter().map(|&entry| Back { entries: vec![entry], problem: behind.clone() }),
                );
                continue;
            }
            seen.is_loose |= !is_exact;
            let (stage, problem) = (classifier.entries[entries[0]].stage, Rc::new(problem));
            if !seen.places.insert((stage, problem.clone())) {
                continue;
            }
            if stage != classifier.root {
                self.back(stage, &problem, &mut left, budget)?;
            } else if self.end(entry, &problem, budget, seen, show)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The steps back from a stage where this has to hold. The last of them is the one by which packets come of which
    /// nothing special holds.
    fn back(
        &self,
        stage: Stage,
        problem: &Problem<'a>,
        left: &mut Vec<Back<'a>>,
        budget: &mut Budget,
    ) -> Result<(), TooLong> {
        let classifier = self.directed.classifier();
        for group in self.directed.into(stage).iter().rev() {
            let mut known: BTreeMap<&[Write], Option<Rc<Problem<'a>>>> = BTreeMap::new();
            let mut before = |entry: Entry| {
                budget.spend(1)?;
                let writes = match &classifier.entries[entry].exit {
                    Exit::Then { writes, .. } => &writes[..],
                    _ => &[],
                };
                if !known.contains_key(writes) {
                    budget.spend(1 + problem.clauses.len())?;
                    known.insert(writes, problem.before(writes, classifier.family).map(Rc::new));
                }
                Ok::<_, TooLong>(known[writes].clone())
            };
            let last = *group.last().expect("groups are of entries");
            let takes_all = classifier.entries[last].cube.is_all();
            let usual = if takes_all { before(last)? } else { None };
            let mut alike = Vec::new();
            for (at, &entry) in group.iter().enumerate() {
                if at > 0 && group[at - 1] == entry {
                    continue;
                }
                let Some(problem) = before(entry)? else { continue };
                if usual.as_ref() == Some(&problem) {
                    alike.push(entry);
                } else {
                    left.push(Back { entries: vec![entry], problem });
                }
            }
            if let Some(problem) = usual {
                left.push(Back { entries: alike, problem });
            }
        }
        Ok(())
    }

    /// Makes packets for what is left at the root, and shows those that seem to take the entry; whether one did.
    fn end(
        &mut self,
        entry: Entry,
        problem: &Problem<'a>,
        budget: &mut Budget,
        seen: &mut Seen<'a>,
        show: &mut dyn FnMut(Input) -> bool,
    ) -> Result<bool, TooLong> {
        let classifier = self.directed.classifier();
        let mut problem = Problem::clone(problem);
        problem.clauses.extend(self.facts.clauses());
        let mut own = Budget::new(budget.left() / SHARE);
        let given = own.left();
        let mut search = Search::new(problem, classifier.family);
        for _ in 0..REGIONS_OF_WAY_MAX {
            let region = match search.next(&mut own, &mut self.random) {
                Ok(Some(region)) => region,
                Ok(None) => break,
                Err(TooLong) => {
                    seen.gave_up = true;
                    break;
                }
            };
            seen.regions += 1;
            for _ in 0..PACKETS {
                let Some(input) = self.packet(&region) else { continue };
                let shows = self.takes(entry, &input);
                if (0..shows).any(|_| show(input.clone())) {
                    return Ok(true);
                }
            }
            if seen.regions >= REGIONS_MAX {
                return Err(TooLong);
            }
        }
        budget.spend(given - own.left())?;
        Ok(false)
    }

    /// How often a packet has to be shown to take an entry: 0 if it does not. Its way may depend on a counter or a random
    /// number.
    fn takes(&self, entry: Entry, input: &Input) -> usize {
        let classifier = self.directed.classifier();
        let shows = if classifier.effect_tests.is_empty() { 1 } else { SHOWS };
        let mut takes = false;
        self.directed.frames().given(classifier, input, &mut |given| {
            let mut state = State::new(0);
            for _ in 0..shows {
                classifier.eval_by(given, &mut state, |stage, fields| {
                    let taken = self.directed.first().of(stage, fields);
                    takes |= taken == entry;
                    taken
                });
            }
        });
        if takes { shows } else { 0 }
    }

    /// A packet that is in the region where its fields can be chosen one by one.
    fn packet(&mut self, region: &Region<'a>) -> Option<Input> {
        let family = self.directed.classifier().family;
        let mut region = self.directed.in_sets(region, &mut self.random)?;
        let usual = IntervalSet::range(0, USUAL_BYTES_MAX);
        region = region.narrowed(Field::L4Len, usual, family).unwrap_or(region);
        if region.fields().any(|field| field == Field::Length) {
            // All that a packet has behind its first header, if that may be.
            let l4 = region.pick(Field::L4Len, family, &mut self.random).ok()??;
            let header = if family == Family::V4 { 20 } else { 40 };
            let whole = region.narrowed(Field::L4Len, IntervalSet::point(l4), family);
            let whole =
                whole.and_then(|all| all.narrowed(Field::Length, IntervalSet::point(header + l4), family));
            region = whole.unwrap_or(region);
        }
        let mut wanted = Wanted::new();
        let fields: Vec<Field> = region.fields().collect();
        for field in fields {
            let value = region.pick(field, family, &mut self.random).ok()??;
            wanted.insert(field, value);
        }
        Some(self.directed.input(&wanted, self.random.next_u64()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cranelift_entity::EntitySet;
    use polc_ir::classifier::Classifier;
    use polc_ir::env::Attach;

    use super::super::Witnesses;
    use super::super::tests::classified;
    use super::*;

    /// The entries that one packet takes.
    fn taken(classifier: &Classifier, directed: &Directed<'_>, input: &Input) -> Vec<Entry> {
        let mut taken = Vec::new();
        directed.frames().given(classifier, input, &mut |given| {
            classifier.eval_noting(given, &mut State::new(1), &mut |entry| taken.push(entry));
        });
        taken
    }

    /// What becomes of the entries of each rule, by its number, if each is searched for; every packet that is found
    /// takes the entry it was made for, and no entry that one takes is ever said to be unreachable.
    fn fates(rules: &str, attach: Attach) -> (String, BTreeMap<u32, Vec<Fate>>) {
        let text = format!("*filter\n:INPUT ACCEPT [0:0]\n:a - [0:0]\n:b - [0:0]\n{rules}\nCOMMIT\n");
        let (classifier, devices) = classified(&text, attach);
        let witnesses = Witnesses::new(&classifier, &devices, 1);
        let mut untaken = witnesses.untaken(|_| false, 1);
        let mut fates: BTreeMap<u32, Vec<Fate>> = BTreeMap::new();
        let mut came: EntitySet<Entry> = EntitySet::new();
        let mut unreachable = Vec::new();
        for (entry, data) in &classifier.entries {
            let fate = untaken.seek(entry, &mut |input| {
                let taken = taken(&classifier, &witnesses.directed, &input);
                taken.iter().for_each(|entry| _ = came.insert(*entry));
                taken.contains(&entry)
            });
            if fate == Fate::Unreachable {
                unreachable.push(entry);
            }
            fates.entry(data.rule.map_or(0, |rule| rule.as_u32() + 1)).or_default().push(fate);
        }
        assert!(unreachable.iter().all(|entry| !came.contains(*entry)), "{unreachable:?} of {classifier}");
        (classifier.to_string(), fates)
    }

    /// Whether a packet takes each rule's entry or none can, by the rule's number.
    fn are_reachable(rules: &str, attach: Attach) -> BTreeMap<u32, bool> {
        let (shown, fates) = fates(rules, attach);
        let is_decided = |fate: &Fate| matches!(fate, Fate::Taken | Fate::Unreachable);
        assert!(fates.values().flatten().all(is_decided), "{fates:?} of {shown}");
        fates.into_iter().map(|(rule, fates)| (rule, fates.contains(&Fate::Taken))).collect()
    }

    #[test]
    fn what_writes_rule_out_is_unreachable() {
        let rules = "-A INPUT -s 10.0.0.0/8 -j MARK --set-xmark 0x4000/0x4000\n\
            -A INPUT -j MARK --set-xmark 0x0/0x8000\n\
            -A INPUT -m mark --mark 0x8000/0x8000 -j DROP\n\
            -A INPUT -s 11.0.0.0/8 -m mark --mark 0x4000/0xc000 -j DROP\n\
            -A INPUT -s 10.0.0.0/8 -m mark ! --mark 0x4000/0x4000 -j DROP\n\
            -A INPUT -m mark --mark 0x4000/0x4000 -j ACCEPT";
        let at_xdp = are_reachable(rules, Attach::Xdp);
        assert_eq!([3, 4, 5, 6].map(|rule| at_xdp[&rule]), [false, false, false, true]);
        // Where packets come with a mark, the fourth rule's may.
        let at_tc = are_reachable(rules, Attach::TcIngress);
        assert_eq!([3, 4, 5, 6].map(|rule| at_tc[&rule]), [false, true, false, true]);
    }

    #[test]
    fn what_the_way_rules_out_is_unreachable() {
        let rules = "-A INPUT -p tcp -m tcp --dport 80 -j a\n-A INPUT -p tcp -m tcp --dport 443 -j b\n\
            -A a -j MARK --set-xmark 0x1/0x1\n-A b -j MARK --set-xmark 0x2/0x2\n\
            -A INPUT -m mark --mark 0x3/0x3 -j DROP\n\
            -A INPUT -p tcp -m tcp --dport 443 -m mark --mark 0x1/0x1 -j DROP\n\
            -A INPUT -p udp -m mark ! --mark 0x0 -j DROP\n\
            -A INPUT -p tcp -m tcp --dport 80 -m mark --mark 0x1/0x1 -j DROP";
        let reachable = are_reachable(rules, Attach::Xdp);
        assert_eq!([5, 6, 7, 8].map(|rule| reachable[&rule]), [false, false, false, true]);
    }

    /// Ways that part and meet again are not gone one by one: there are 2^30 here.
    #[test]
    fn diamonds_take_no_longer_than_their_rules() {
        let marks: String = (0..30)
            .map(|bit| {
                let mark = 1u32 << bit;
                format!("-A INPUT -s {0}.0.0.0/8 -j MARK --set-xmark {mark:#x}/{mark:#x}\n", 10 + bit / 2)
            })
            .collect();
        let ask = |mark: u32| format!("-A INPUT -m mark --mark {mark:#x}/{mark:#x} -j DROP\n");
        // Of one address, of two, and of none.
        let rules = format!("{marks}{}{}{}", ask(0x3), ask(0x9), ask(0x4000_0000));
        let reachable = are_reachable(&rules, Attach::Xdp);
        assert_eq!([31, 32, 33].map(|rule| reachable[&rule]), [true, false, false]);
    }

    /// Of rules that ask for scattered bits of a byte it is known of each whether a packet takes it.
    #[test]
    fn rules_agree_with_values_one_by_one() {
        let mut random = Random::new(1);
        for _ in 0..12 {
            let tests: Vec<(u32, u32, bool)> = (0..40)
                .map(|_| {
                    let mask = 1 + random.below(255) as u32;
                    (random.below(256) as u32 & mask, mask, random.one_in(8))
                })
                .collect();
            let line = |(value, mask, negated): &(u32, u32, bool)| {
                let not = if *negated { "! " } else { "" };
                format!("-A INPUT {not}-s 10.0.0.{value}/255.255.255.{mask} -j DROP\n")
            };
            let others = "-A INPUT ! -s 10.0.0.0/24 -j ACCEPT\n";
            let rules: String = std::iter::once(others.to_string()).chain(tests.iter().map(line)).collect();
            let first =
                |byte: u32| tests.iter().position(|(value, mask, not)| (byte & mask == *value) != *not);
            let first: Vec<usize> = (0..256).filter_map(first).collect();
            let reachable = are_reachable(&rules, Attach::Xdp);
            for number in 0..tests.len() {
                // What an earlier rule takes all of has no entries.
                let found = reachable.get(&(number as u32 + 2)).is_some_and(|is_taken| *is_taken);
                assert_eq!(found, first.contains(&number), "rule {} of {rules}", number + 2);
            }
        }
    }
}
