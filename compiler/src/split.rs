//! `split`: packets whose transport header is cut short are decided apart.
//!
//! A rule that asks for ports asks something before: whether the header is as long as the kernel wants it, for it drops
//! the packet otherwise (net/netfilter/xt_tcpudp.c, `tcp_mt`, `udp_mt`). So stages have an entry more for each such rule,
//! and a field more to look at, for packets that nobody sends. Here one question is asked before all others, but for those
//! whether a packet is a fragment: one that is long enough for every protocol goes on where nothing is asked of lengths any
//! more, and so does one that is long enough for its own. The others have copies of the stages, which `simplify` cuts down
//! to what can still hold there.

use std::collections::BTreeMap;

use cranelift_entity::{PrimaryMap, SecondaryMap};
use polc_ir::classifier::{Classifier, EntryData, Exit, StageData};
use polc_ir::cube::{Cube, Test};
use polc_ir::entities::Stage;
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::interval::{IntervalSet, max_value};

/// Entries up to which stages are copied: of more, the copies' tables would be a burden.
const ENTRIES_MAX: usize = 1 << 12;

/// Stages that are copied: their code is.
const STAGES_MAX: usize = 64;

/// Decides packets that are cut short apart.
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
    let Some(&most) = needed.values().max() else { return classifier };
    let from = behind_fragments(&classifier);
    let mut split =
        Classifier { stages: PrimaryMap::new(), entries: PrimaryMap::new(), ..classifier.clone() };
    let proto = |protocol: u128| Test::new(Field::Proto, family, IntervalSet::point(protocol));
    let length = |lo: u128, hi: u128| Test::new(Field::L4Len, family, IntervalSet::range(lo, hi));
    let short: Vec<(Cube, Stage)> = needed
        .iter()
        .map(|(&protocol, &bytes)| {
            let cube: Cube = [proto(protocol), length(0, bytes - 1)].into_iter().collect();
            let takes = |entry: &EntryData| {
                let holds = |test: &Test, own: &Test| test.values.intersects(&own.values);
                let mut asked = cube.tests().iter();
                asked.all(|test| entry.cube.test(test.field, test.mask).is_none_or(|own| holds(test, own)))
            };
            let stage = copy(&classifier, from, &mut split, None, takes);
            (cube, stage)
        })
        .collect();
    let takes = |entry: &EntryData| asks(entry, family).is_none_or(|(proto, bytes)| needed[&proto] < bytes);
    let whole = copy(&classifier, from, &mut split, None, takes);
    let guard = split.stages.push(StageData { entries: Vec::new(), origin: None });
    let long: Cube = [length(most, max_value(Field::L4Len.bits(family)))].into_iter().collect();
    let ways = [(long, whole)].into_iter().chain(short).chain([(Cube::all(), whole)]);
    for (cube, stage) in ways {
        let exit = Exit::Then { writes: Vec::new(), stage };
        let entry =
            split.entries.push(EntryData { stage: guard, cube, rule: None, counts: Vec::new(), exit });
        split.stages[guard].entries.push(entry);
    }
    split.root = copy(&classifier, classifier.root, &mut split, Some((from, guard)), |_| true);
    split
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

/// Copies a stage and those that it may lead to, with some of their entries, and gives the copy. Of two stages `instead`,
/// the second, which is a copy already, stands for the first.
fn copy(
    classifier: &Classifier,
    root: Stage,
    into: &mut Classifier,
    instead: Option<(Stage, Stage)>,
    takes: impl Fn(&EntryData) -> bool,
) -> Stage {
    let mut number: SecondaryMap<Stage, Option<Stage>> = SecondaryMap::new();
    let to = |number: &SecondaryMap<Stage, Option<Stage>>, old: Stage| {
        number[old].expect("what an exit leads to has a smaller number")
    };
    for (old, data) in classifier.stages.iter().filter(|(stage, _)| *stage <= root) {
        if let Some((first, second)) = instead
            && first == old
        {
            number[old] = Some(second);
            continue;
        }
        let stage = into.stages.push(StageData { entries: Vec::new(), origin: data.origin });
        number[old] = Some(stage);
        for &entry in &data.entries {
            let entry = &classifier.entries[entry];
            if !takes(entry) {
                continue;
            }
            let exit = match entry.exit.clone() {
                Exit::Then { writes, stage } => Exit::Then { writes, stage: to(&number, stage) },
                Exit::Test { test, yes, no } => {
                    Exit::Test { test, yes: to(&number, yes), no: to(&number, no) }
                }
                ends => ends,
            };
            let entry = into.entries.push(EntryData { stage, exit, ..entry.clone() });
            into.stages[stage].entries.push(entry);
        }
    }
    to(&number, root)
}

#[cfg(test)]
mod tests {
    use polc_frontend_iptables::{ParseOptions, lower, parse};
    use polc_ir::env::{Env, Mode};
    use polc_ir::hook::{Hook, Semantics};
    use polc_ir::source::SourceMap;

    use super::*;
    use crate::flatten::flatten;
    use crate::place::place;
    use crate::simplify::simplify;

    /// A rule set's INPUT chain, split and simplified.
    fn split_input(rules: &str) -> Classifier {
        let text = format!("*filter\n:INPUT ACCEPT [0:0]\n{rules}COMMIT\n");
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", text.as_str());
        let (dump, found) = parse(&sources, file, &ParseOptions::default());
        assert!(found.is_empty(), "{found:?}");
        let ruleset = lower(&dump, &[], Semantics::Legacy);
        let place = place(&[Hook::Input], polc_ir::env::Attach::Xdp, Mode::Replace, true);
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
