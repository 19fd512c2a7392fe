//! `split`: packets whose transport header is cut short, and later fragments, are decided apart.
//!
//! A rule that asks for ports asks something before: whether the header is as long as the kernel wants it, for it drops
//! the packet otherwise (net/netfilter/xt_tcpudp.c, `tcp_mt`, `udp_mt`). So stages have an entry more for each such rule,
//! and a field more to look at, for packets that nobody sends. Here one question is asked before all others, but for those
//! whether a packet is a fragment: one that is long enough for every protocol goes on where nothing is asked of lengths any
//! more, and so does one that is long enough for its own. The others have copies of the stages, which `simplify` cuts down
//! to what can still hold there.
//!
//! Such a rule asks for the first fragment, too, where rules see fragments as they are
//! ([`polc_ir::env::Fragments::AsSeen`]), and drops what pretends to continue a TCP header: later fragments are asked for
//! ahead of that, and have a copy as well.

use std::collections::BTreeMap;
use std::mem::take;

use cranelift_entity::{PrimaryMap, SecondaryMap};
use polc_ir::classifier::{Classifier, EntryData, Exit, StageData};
use polc_ir::cube::{Cube, Test};
use polc_ir::entities::{Entry, Stage};
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::interval::{IntervalSet, max_value};

/// Entries up to which stages are copied: of more, the copies' tables would be a burden.
const ENTRIES_MAX: usize = 1 << 12;

/// Stages that are copied: their code is.
const STAGES_MAX: usize = 64;

/// Decides packets that are cut short apart, and later fragments.
pub fn split(classifier: Classifier) -> Classifier {
    if classifier.entries.len() > ENTRIES_MAX || classifier.stages.len() > STAGES_MAX {
        return classifier;
    }
    let family = classifier.family;
    let mut needed: BTreeMap<u128, u128> = BTreeMap::new();
    for (protocol, bytes) in classifier.entries.values().filter_map(|entry| asks(entry, family)) {
        let most = needed.entry(protocol).or_default();
        *most = bytes.max(*most);
    }
    let asks_offset = |entry: &EntryData| offset(entry, family).is_some();
    let sees_later = classifier.entries.values().any(asks_offset);
    if needed.is_empty() && !sees_later {
        return classifier;
    }
    let from = behind_fragments(&classifier);
    let mut split = classifier;
    let whole = Whole { stages: take(&mut split.stages), entries: take(&mut split.entries) };
    split.entries = PrimaryMap::with_capacity(2 * whole.entries.len());
    let is_first = |entry: &EntryData| offset(entry, family).is_none_or(|test| test.holds(0));
    let takes = |entry: &EntryData| {
        is_first(entry) && asks(entry, family).is_none_or(|(proto, bytes)| needed[&proto] < bytes)
    };
    let short: Vec<(Cube, Stage)> = needed
        .iter()
        .map(|(&protocol, &bytes)| {
            let proto = Test::new(Field::Proto, family, IntervalSet::point(protocol));
            let length = Test::new(Field::L4Len, family, IntervalSet::range(0, bytes - 1));
            let cube: Cube = [proto, length].into_iter().collect();
            let takes = |entry: &EntryData| {
                let holds = |test: &Test, own: &Test| test.values.intersects(&own.values);
                let mut asked = cube.tests().iter();
                is_first(entry)
                    && asked
                        .all(|test| entry.cube.test(test.field, test.mask).is_none_or(|own| holds(test, own)))
            };
            let stage = whole.copy(from, &mut split, None, takes);
            (cube, stage)
        })
        .collect();
    let long_enough = whole.copy(from, &mut split, None, takes);
    let top = max_value(Field::FragOffset.bits(family));
    let later = Test::new(Field::FragOffset, family, IntervalSet::range(1, top));
    let mut ways: Vec<(Cube, Stage)> = Vec::new();
    if let Some(&most) = needed.values().max() {
        let top = max_value(Field::L4Len.bits(family));
        let first = sees_later.then(|| Test::new(Field::FragOffset, family, IntervalSet::point(0)));
        let long = Test::new(Field::L4Len, family, IntervalSet::range(most, top));
        ways.push((first.into_iter().chain([long]).collect(), long_enough));
    }
    if sees_later {
        let takes = |entry: &EntryData| {
            offset(entry, family).is_none_or(|test| test.values.intersects(&later.values))
        };
        let stage = whole.copy(from, &mut split, None, takes);
        ways.push(([later].into_iter().collect(), stage));
    }
    ways.extend(short);
    ways.push((Cube::all(), long_enough));
    let guard = split.stages.push(StageData { entries: Vec::new(), origin: None });
    for (cube, stage) in ways {
        let exit = Exit::Then { writes: Vec::new(), stage };
        let entry =
            split.entries.push(EntryData { stage: guard, cube, rule: None, counts: Vec::new(), exit });
        split.stages[guard].entries.push(entry);
    }
    let root = split.root;
    split.root = whole.copy(root, &mut split, Some((from, guard)), |_| true);
    split
}

/// What an entry asks of where in its packet a fragment begins.
fn offset(entry: &EntryData, family: Family) -> Option<&Test> {
    entry.cube.test(Field::FragOffset, max_value(Field::FragOffset.bits(family)))
}

/// The first stage that asks for more than whether a packet is a fragment.
fn behind_fragments(classifier: &Classifier) -> Stage {
    let mut stage = classifier.root;
    loop {
        let mut entries = classifier.stages[stage].entries.iter().map(|&entry| &classifier.entries[entry]);
        let fragments =
            |entry: &EntryData| entry.cube.tests().iter().all(|test| test.field == Field::Fragment);
        match entries.clone().next_back().map(|last| &last.exit) {
            Some(Exit::Then { stage: next, .. }) if entries.all(fragments) => stage = *next,
            _ => return stage,
        }
    }
}

/// The protocol and how many bytes its header has to have, if an entry is for packets that have fewer.
fn asks(entry: &EntryData, family: Family) -> Option<(u128, u128)> {
    let whole = |field: Field| entry.cube.test(field, max_value(field.bits(family)));
    let [length] = whole(Field::L4Len)?.values.intervals() else { return None };
    let [protocol] = whole(Field::Proto)?.values.intervals() else { return None };
    (length.lo() == 0 && protocol.lo() == protocol.hi()).then(|| (protocol.lo(), length.hi() + 1))
}

/// The stages that are copied, and their entries.
struct Whole {
    stages: PrimaryMap<Stage, StageData>,
    entries: PrimaryMap<Entry, EntryData>,
}

impl Whole {
    /// Copies a stage and those that it may lead to, with some of their entries, and gives the copy. Of two stages `instead`,
    /// the second, which is a copy already, stands for the first.
    fn copy(
        &self,
        root: Stage,
        into: &mut Classifier,
        instead: Option<(Stage, Stage)>,
        takes: impl Fn(&EntryData) -> bool,
    ) -> Stage {
        let mut number: SecondaryMap<Stage, Option<Stage>> = SecondaryMap::new();
        let to = |number: &SecondaryMap<Stage, Option<Stage>>, old: Stage| {
            number[old].expect("what an exit leads to has a smaller number")
        };
        for (old, data) in self.stages.iter().filter(|(stage, _)| *stage <= root) {
            if let Some((first, second)) = instead
                && first == old
            {
                number[old] = Some(second);
                continue;
            }
            let stage = into.stages.push(StageData { entries: Vec::new(), origin: data.origin });
            number[old] = Some(stage);
            for &entry in &data.entries {
                let entry = &self.entries[entry];
                if !takes(entry) {
                    continue;
                }
                let exit = entry.exit.clone().renumbered(|stage| to(&number, stage));
                let (cube, rule, counts) = (entry.cube.clone(), entry.rule, entry.counts.clone());
                let entry = into.entries.push(EntryData { stage, cube, rule, counts, exit });
                into.stages[stage].entries.push(entry);
            }
        }
        to(&number, root)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use polc_frontend_iptables::{ParseOptions, lower, parse};
    use polc_ir::env::{Attach, Env, Mode};
    use polc_ir::hook::{Hook, Semantics};
    use polc_ir::outcome::Verdict;
    use polc_ir::source::SourceMap;

    use super::*;
    use crate::flatten::flatten;
    use crate::place::place;
    use crate::simplify::simplify;

    /// A rule set's INPUT chain at XDP, split and simplified.
    fn split_input(rules: &str) -> Classifier {
        split_at(Attach::Xdp, rules)
    }

    fn split_at(attach: Attach, rules: &str) -> Classifier {
        let text = format!("*filter\n:INPUT ACCEPT [0:0]\n{rules}COMMIT\n");
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", text.as_str());
        let (dump, found) = parse(&sources, file, &ParseOptions::default());
        assert!(found.is_empty(), "{found:?}");
        let ruleset = lower(&dump, &[], Semantics::Legacy);
        let place = place(&[Hook::Input], attach, Mode::Replace, true);
        let split = split(flatten(&ruleset, &place, &Env::default(), &mut Vec::new()));
        assert_eq!(split.verify(), Vec::<String>::new());
        simplify(split)
    }

    fn asks_length(entry: &EntryData) -> bool {
        entry.cube.tests().iter().any(|test| test.field == Field::L4Len)
    }

    #[test]
    fn lengths_are_asked_once() {
        let split = split_input(
            "-A INPUT -p tcp -m tcp --dport 22 -j DROP\n\
             -A INPUT -p udp -m udp --dport 53 -j DROP\n\
             -A INPUT -s 10.0.0.0/8 -p tcp -m tcp --dport 23 -j DROP\n",
        );
        let stages: Vec<Stage> =
            split.entries.values().filter(|entry| asks_length(entry)).map(|entry| entry.stage).collect();
        // Long enough for both; TCP that is not; UDP that is not.
        assert_eq!(stages.len(), 3, "{split}");
        assert!(stages.iter().all(|stage| *stage == stages[0]), "{split}");
        // Of what is cut short no ports are asked: it is dropped before.
        let asks_ports =
            |entry: &&EntryData| entry.cube.tests().iter().any(|test| test.field == Field::DstPort);
        let ports: BTreeSet<Stage> =
            split.entries.values().filter(asks_ports).map(|entry| entry.stage).collect();
        assert_eq!(ports.len(), 1, "{split}");
    }

    #[test]
    fn fragments_end_where_they_may_be_dropped() {
        let split = split_input(
            "-A INPUT -p tcp -m tcp --dport 22 -j DROP\n\
             -A INPUT -p udp -m udp --dport 53 -j ACCEPT\n\
             -A INPUT -s 10.0.0.0/8 -j ACCEPT\n",
        );
        let fragment =
            |entry: &&EntryData| entry.cube.tests().iter().any(|test| test.field == Field::Fragment);
        let exits: Vec<Exit> =
            split.entries.values().filter(fragment).map(|entry| entry.exit.clone()).collect();
        let [Exit::Then { stage, .. }] = exits[..] else { panic!("{split}") };
        // What becomes of TCP and UDP is not known, and what is not known is dropped; by address the others are told.
        let entries = split.stages[stage].entries.iter().map(|&entry| &split.entries[entry]);
        let verdicts = entries.map(|entry| match entry.exit {
            Exit::End(ending) => ending.verdict,
            _ => panic!("{split}"),
        });
        let expected = [Verdict::Drop, Verdict::Drop, Verdict::Accept, Verdict::Accept];
        assert_eq!(verdicts.collect::<Vec<Verdict>>(), expected, "{split}");
    }

    #[test]
    fn later_fragments_are_asked_for_once() {
        let rules = "-A INPUT -p tcp -m tcp --dport 22 -j DROP\n-A INPUT -p udp -m udp --dport 53 -j DROP\n";
        let split = split_at(Attach::Netfilter, rules);
        let asks =
            |entry: &EntryData, field: Field| entry.cube.tests().iter().any(|test| test.field == field);
        assert!(split.entries.values().any(|entry| asks(entry, Field::FragOffset)), "{split}");
        let ports: Vec<Stage> = split
            .entries
            .values()
            .filter(|entry| asks(entry, Field::DstPort))
            .map(|entry| entry.stage)
            .collect();
        assert_eq!(ports.len(), 2, "{split}");
        let beside = |entry: &EntryData| ports.contains(&entry.stage) && asks(entry, Field::FragOffset);
        assert!(!split.entries.values().any(beside), "{split}");
    }

    #[test]
    fn what_asks_for_no_ports_stays_as_it_is() {
        let split = split_input("-A INPUT -s 10.0.0.0/8 -p tcp -j DROP\n");
        assert!(!split.entries.values().any(asks_length), "{split}");
        // For fragments, for others, and what tells them apart.
        assert_eq!(split.stages.len(), 3, "{split}");
    }

    #[test]
    fn only_so_many_entries_are_copied() {
        let rules = |count: usize| -> String {
            let rule = |number: usize| {
                let (high, low) = (number / 256, number % 256);
                format!("-A INPUT -s 10.0.{high}.{low}/32 -p tcp -m tcp --dport {number} -j DROP\n")
            };
            (1..=count).map(rule).collect()
        };
        let asks = |count: usize| {
            split_input(&rules(count)).entries.values().filter(|entry| asks_length(entry)).count()
        };
        // Three entries a rule: for fragments, for what is cut short, for the others.
        assert_eq!(asks(ENTRIES_MAX / 3 - 8), 2);
        assert!(asks(ENTRIES_MAX / 3 + 8) > 2);
    }
}
