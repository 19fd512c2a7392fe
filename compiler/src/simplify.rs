//! `simplify`: stages ask nothing that is known where they are entered.
//!
//! Chains that come back continue where the jump was, and there the packet is asked again what the jump had asked: in a
//! chain of a thousand Services, one after another, each asks of the packets of those before it. Going down from the
//! root, what is known of a packet that enters a stage is the union of what is known at the entries that lead there.
//! Tests that hold for all of these packets are left out, and entries that hold for none; what is behind an entry that
//! always holds goes, and with it stages that nothing leads to any more. What is known at one entry often tells more than
//! the union: an exit leads past every stage in which its packets take one and the same entry, counting and writing what
//! that does.
//!
//! What is left of a stage that was cut in blocks is put together again, a packet is counted at the end of its way rather
//! than on it, and a stage that has a single entry is none: entries that led to it do what it did. Nothing else changes: a packet meets the same rules, in the same order, and is
//! counted for the same.

use cranelift_entity::{PrimaryMap, SecondaryMap};
use polc_ir::classifier::{Classifier, EntryData, Exit, StageData};
use polc_ir::cube::{Cube, Test};
use polc_ir::entities::{Entry, Stage};
use polc_ir::hook::Family;
use polc_ir::ruleset::Write;

/// Intervals of a field that are kept of what is known; more are as good as nothing.
const KNOWN_INTERVALS_MAX: usize = 32;

/// Entries before one that are asked for what a packet which comes so far is not. A rule's guards are right before it.
const EARLIER_ENTRIES: usize = 16;

/// Entries that leading exits past stages may ask, for each that there is, and altogether if that is more: each of five
/// thousand rules that mark may ask all behind it, and as they see fragments once more.
const ASKED_PER_ENTRY: usize = 32;
const ASKED: usize = 32 << 20;

/// Entries of one stage that an exit may ask: what chains come back to is cut in blocks, and where thousands follow one
/// another, each would ask those of all before it.
const ASKED_OF_STAGE_MAX: usize = 32;

/// Entries of a stage that may come to count on their way what was counted before.
const UNCOUNTED_ENTRIES_MAX: usize = 8;

/// Simplifies every stage.
pub fn simplify(classifier: Classifier) -> Classifier {
    thread(join(prune(classifier)))
}

/// What is known of the packets that enter a stage, as a cube that holds for all of them; `None` if there are none.
type Known = Option<Cube>;

/// Leaves out tests and entries that are decided where their stage is entered. The stages keep their numbers; those that
/// nothing leads to have no entries.
fn prune(mut classifier: Classifier) -> Classifier {
    let family = classifier.family;
    let mut asks = ASKED.max(ASKED_PER_ENTRY * classifier.entries.len());
    let mut known: SecondaryMap<Stage, Known> = SecondaryMap::new();
    known[classifier.root] = Some(Cube::all());
    let mut pruned: SecondaryMap<Stage, Vec<EntryData>> = SecondaryMap::new();
    // Stages lead to smaller numbers: whatever leads to a stage comes before it.
    for stage in classifier.stages.keys().rev() {
        let Some(here) = known[stage].take() else { continue };
        let entries = std::mem::take(&mut classifier.stages[stage].entries);
        let mut kept: Vec<EntryData> = Vec::with_capacity(entries.len());
        for &entry in &entries {
            let Some(cube) = asked(&mut classifier.entries[entry].cube, &here) else { continue };
            let all = cube.is_all();
            // What an entry before asked beside this one's tests may be known here.
            let earlier = &kept[kept.len().saturating_sub(EARLIER_ENTRIES)..];
            if !here.is_all() && earlier.iter().rev().any(|earlier| earlier.cube.is_superset(&cube)) {
                continue;
            }
            let mut data = EntryData { cube, ..take(&mut classifier.entries[entry]) };
            if data.exit.successors().next().is_some() {
                let Some(taken) = taken(&here, &data.cube, earlier, family) else {
                    classifier.entries[entry] = data;
                    continue;
                };
                past(&classifier, &taken, &mut data, &mut asks);
                leave(&taken, &data.exit, family, &mut known);
            }
            kept.push(data);
            if all {
                break;
            }
        }
        // Every packet that enters takes an entry, the last if no other: it needs to ask nothing. That no entry is left
        // means that no packet enters, though not one field alone says so.
        match (kept.last_mut(), entries.last()) {
            (Some(last), _) => last.cube = Cube::all(),
            (None, Some(&last)) => {
                let last = &classifier.entries[last];
                leave(&here, &last.exit, family, &mut known);
                kept.push(last.clone());
            }
            (None, None) => {}
        }
        pruned[stage] = kept;
    }
    let root = classifier.root;
    rebuild(classifier, root, pruned)
}

/// Whether something holds of a packet, by what is known of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    Never,
    Maybe,
    Always,
}

fn holds(test: &Test, known: &Cube) -> Holds {
    match known.test(test.field, test.mask) {
        Some(have) if test.values.is_superset(&have.values) => Holds::Always,
        Some(have) if !test.values.intersects(&have.values) => Holds::Never,
        _ => Holds::Maybe,
    }
}

/// What is left to ask of a packet of which `known` holds; `None`, and the cube stays, if it holds for none.
fn asked(cube: &mut Cube, known: &Cube) -> Option<Cube> {
    if known.is_all() {
        return Some(std::mem::take(cube));
    }
    if cube.tests().iter().any(|test| holds(test, known) == Holds::Never) {
        return None;
    }
    let open = cube.tests().iter().filter(|test| holds(test, known) == Holds::Maybe);
    Some(if open.clone().count() == cube.tests().len() {
        std::mem::take(cube)
    } else {
        open.cloned().collect()
    })
}

/// Takes an entry out of its stage; what is left is empty.
fn take(entry: &mut EntryData) -> EntryData {
    let EntryData { stage, rule, .. } = *entry;
    EntryData {
        stage,
        cube: std::mem::take(&mut entry.cube),
        rule,
        counts: std::mem::take(&mut entry.counts),
        exit: std::mem::replace(&mut entry.exit, Exit::Then { writes: Vec::new(), stage }),
    }
}

/// The entry that packets of which `known` holds take in a stage, if all take the same and it is among the first; and how
/// many were asked.
fn certain(classifier: &Classifier, stage: Stage, known: &Cube) -> (Option<Entry>, usize) {
    let entries = &classifier.stages[stage].entries;
    let entries = &entries[..entries.len().min(ASKED_OF_STAGE_MAX)];
    for (at, &entry) in entries.iter().enumerate() {
        let mut all = Holds::Always;
        for test in classifier.entries[entry].cube.tests() {
            match holds(test, known) {
                Holds::Never => {
                    all = Holds::Never;
                    break;
                }
                Holds::Maybe => all = Holds::Maybe,
                Holds::Always => {}
            }
        }
        match all {
            Holds::Never => {}
            Holds::Maybe => return (None, at + 1),
            Holds::Always => return (Some(entry), at + 1),
        }
    }
    (None, entries.len())
}

/// Leads an entry's exit past stages in which its packets, of which `taken` holds, take one and the same entry.
fn past(classifier: &Classifier, taken: &Cube, entry: &mut EntryData, asks: &mut usize) {
    let mut known = taken.clone();
    let mut told = 0;
    while let Exit::Then { writes, stage } = &mut entry.exit
        && *asks > 0
    {
        writes[told..].iter().for_each(|write| write_to(&mut known, write, classifier.family));
        told = writes.len();
        let (certain, asked) = certain(classifier, *stage, &known);
        *asks = asks.saturating_sub(asked);
        let Some(next) = certain.map(|next| &classifier.entries[next]) else { return };
        match &next.exit {
            Exit::Then { writes: more, stage: next } => {
                writes.extend(more);
                *stage = *next;
            }
            exit if writes.is_empty() => entry.exit = exit.clone(),
            _ => return,
        }
        entry.counts.extend(&next.counts);
    }
    if let Exit::Test { yes, no, .. } = &mut entry.exit {
        for way in [yes, no] {
            past_uncounted(classifier, &known, way, asks);
        }
    }
}

/// Leads one way of a test past stages in which its packets take one and the same entry that does nothing.
fn past_uncounted(classifier: &Classifier, known: &Cube, way: &mut Stage, asks: &mut usize) {
    while *asks > 0 {
        let (certain, asked) = certain(classifier, *way, known);
        *asks = asks.saturating_sub(asked);
        match certain.map(|next| &classifier.entries[next]) {
            Some(EntryData { counts, exit: Exit::Then { writes, stage }, .. })
                if counts.is_empty() && writes.is_empty() =>
            {
                *way = *stage;
            }
            _ => return,
        }
    }
}

/// What is known of a packet that takes an entry; `None` if those before it take all.
fn taken(here: &Cube, cube: &Cube, earlier: &[EntryData], family: Family) -> Known {
    let mut taken = here.intersect(cube, family)?;
    for entry in earlier {
        // It did not hold: if that can only be because of one of its tests, that test doesn't.
        let mut open = None;
        let told = entry.cube.tests().iter().all(|test| match holds(test, &taken) {
            Holds::Always => true,
            Holds::Maybe => open.replace(test).is_none(),
            Holds::Never => false,
        });
        if !told {
            continue;
        }
        if !taken.and(&open?.negated(family), family) {
            return None;
        }
    }
    Some(taken)
}

/// Adds what is known of a packet that takes an exit to what is known where it leads.
fn leave(taken: &Cube, exit: &Exit, family: Family, known: &mut SecondaryMap<Stage, Known>) {
    let written;
    let after = match exit {
        Exit::Then { writes, .. } if !writes.is_empty() => {
            let mut after = taken.clone();
            writes.iter().for_each(|write| write_to(&mut after, write, family));
            written = after;
            &written
        }
        _ => taken,
    };
    for next in exit.successors() {
        known[next] = Some(match known[next].take() {
            None => after.clone(),
            Some(have) => either(&have, after, family),
        });
    }
}

/// Makes what is known what is known behind a write: of its field, only the bits that it gives.
fn write_to(known: &mut Cube, write: &Write, family: Family) {
    known.forget(write.field);
    let given = Test::masked(write.field, family, write.xor, write.clear);
    let possible = known.and(&given, family);
    debug_assert!(possible, "a value is possible");
}

/// What is known of a packet of either.
fn either(a: &Cube, b: &Cube, family: Family) -> Cube {
    let joined = |test: &Test| {
        let values = test.values.union(&b.test(test.field, test.mask)?.values);
        let joined = Test { values, ..test.clone() };
        (joined.values.intervals().len() <= KNOWN_INTERVALS_MAX && !joined.is_always(family))
            .then_some(joined)
    };
    a.tests().iter().filter_map(joined).collect()
}

/// Puts stages together that follow one another in a chain, if nothing else leads to the second.
fn join(mut classifier: Classifier) -> Classifier {
    let mut led: SecondaryMap<Stage, u32> = SecondaryMap::new();
    for next in classifier.entries.values().flat_map(|entry| entry.exit.successors()) {
        led[next] += 1;
    }
    let follows = |classifier: &Classifier, stage: Stage| -> Option<(Entry, Stage)> {
        let chain = |stage: Stage| classifier.stages[stage].origin.map(|(chain, _)| chain);
        let last = *classifier.stages[stage].entries.last()?;
        match &classifier.entries[last].exit {
            Exit::Then { writes, stage: next } if writes.is_empty() && led[*next] == 1 => {
                (chain(stage).is_some() && chain(stage) == chain(*next)).then_some((last, *next))
            }
            _ => None,
        }
    };
    for stage in classifier.stages.keys().rev().collect::<Vec<_>>() {
        while let Some((last, next)) = follows(&classifier, stage) {
            let counts = classifier.entries[last].counts.clone();
            let more = std::mem::take(&mut classifier.stages[next].entries);
            for &entry in &more {
                let data = &mut classifier.entries[entry];
                data.stage = stage;
                data.counts.splice(0..0, counts.iter().copied());
            }
            classifier.stages[stage].entries.pop();
            classifier.stages[stage].entries.extend(more);
        }
        for entry in classifier.stages[stage].entries.clone() {
            count_later(&mut classifier, entry, &led);
        }
    }
    classifier
}

/// Counts what an entry counts on its way with what the entries count that it leads to, if nothing else leads to them.
fn count_later(classifier: &mut Classifier, entry: Entry, led: &SecondaryMap<Stage, u32>) {
    let Exit::Then { stage: next, .. } = classifier.entries[entry].exit else { return };
    let entries = &classifier.stages[next].entries;
    let counts = |&entry: &Entry| {
        let data = &classifier.entries[entry];
        !data.counts.is_empty() || matches!(data.exit, Exit::End(_) | Exit::EndIfAbsent(_))
    };
    // Where nothing is counted yet it is no more work either, but a place for it.
    let few = entries.len() <= UNCOUNTED_ENTRIES_MAX && entries.iter().any(counts);
    if led[next] != 1 || !(few || entries.iter().all(counts)) {
        return;
    }
    let entries = entries.clone();
    let counts = std::mem::take(&mut classifier.entries[entry].counts);
    for entry in entries {
        classifier.entries[entry].counts.splice(0..0, counts.iter().copied());
    }
}

/// Takes out stages of a single entry: entries that lead there do what it does.
fn thread(mut classifier: Classifier) -> Classifier {
    // Nor is one without entries, which it lost to another.
    if classifier.stages.values().all(|data| data.entries.len() > 1) {
        return classifier;
    }
    let mut threaded: SecondaryMap<Stage, Vec<EntryData>> = SecondaryMap::new();
    for (stage, data) in classifier.stages.iter() {
        let mut entries: Vec<EntryData> =
            data.entries.iter().map(|&entry| take(&mut classifier.entries[entry])).collect();
        for entry in &mut entries {
            match &mut entry.exit {
                Exit::Then { writes, stage: next } => {
                    if let [only] = &threaded[*next][..]
                        && let Some(exit) = behind(writes, &only.exit)
                    {
                        entry.counts.extend(&only.counts);
                        entry.rule = entry.rule.or(only.rule);
                        entry.exit = exit;
                    }
                }
                Exit::Test { yes, no, .. } => {
                    for next in [yes, no] {
                        if let [EntryData { counts, exit: Exit::Then { writes, stage }, .. }] =
                            &threaded[*next][..]
                            && counts.is_empty()
                            && writes.is_empty()
                        {
                            *next = *stage;
                        }
                    }
                }
                Exit::End(_) | Exit::EndIfAbsent(_) => {}
            }
        }
        threaded[stage] = entries;
    }
    let mut root = classifier.root;
    while let [EntryData { counts, exit: Exit::Then { writes, stage }, .. }] = &threaded[root][..]
        && counts.is_empty()
        && writes.is_empty()
    {
        root = *stage;
    }
    rebuild(classifier, root, threaded)
}

/// An exit behind writes, if it is one.
fn behind(writes: &[Write], exit: &Exit) -> Option<Exit> {
    match exit {
        exit if writes.is_empty() => Some(exit.clone()),
        Exit::Then { writes: more, stage } => {
            Some(Exit::Then { writes: [writes, more].concat(), stage: *stage })
        }
        _ => None,
    }
}

/// The classifier with other entries and another root, without the stages that the root does not lead to.
pub(crate) fn rebuild(
    classifier: Classifier,
    root: Stage,
    mut entries: SecondaryMap<Stage, Vec<EntryData>>,
) -> Classifier {
    let mut reached: SecondaryMap<Stage, bool> = SecondaryMap::new();
    reached[root] = true;
    for stage in classifier.stages.keys().rev().filter(|&stage| stage <= root) {
        if reached[stage] {
            for next in entries[stage].iter().flat_map(|entry| entry.exit.successors()) {
                reached[next] = true;
            }
        }
    }
    let mut rebuilt = Classifier {
        stages: PrimaryMap::with_capacity(classifier.stages.len()),
        entries: PrimaryMap::with_capacity(entries.values().map(Vec::len).sum()),
        root,
        family: classifier.family,
        place: classifier.place,
        derived: classifier.derived,
        sets: classifier.sets,
        members: classifier.members,
        set_shapes: classifier.set_shapes,
        effect_tests: classifier.effect_tests,
    };
    let mut number: SecondaryMap<Stage, Option<Stage>> = SecondaryMap::new();
    for (old, data) in classifier.stages.iter().filter(|(stage, _)| reached[*stage]) {
        let stage = rebuilt.stages.push(StageData { entries: Vec::new(), origin: data.origin });
        number[old] = Some(stage);
        let to = |old: Stage| number[old].expect("what an exit leads to has a smaller number");
        for entry in std::mem::take(&mut entries[old]) {
            let exit = entry.exit.renumbered(to);
            let entry = rebuilt.entries.push(EntryData { stage, exit, ..entry });
            rebuilt.stages[stage].entries.push(entry);
        }
    }
    rebuilt.root = number[root].expect("the root was reached");
    rebuilt
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use polc_frontend_iptables::{ParseOptions, lower, parse};
    use polc_ir::env::{Attach, Env, Fragments, Mode, Place};
    use polc_ir::hook::{Hook, Semantics};
    use polc_ir::source::SourceMap;

    use super::*;
    use crate::flatten::flatten;
    use crate::place::place;

    /// A rule set's INPUT chain, flattened and simplified.
    fn both(rules: &str) -> [Classifier; 2] {
        let text = format!("*filter\n:INPUT ACCEPT [0:0]\n{rules}COMMIT\n");
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", text.as_str());
        let (dump, found) = parse(&sources, file, &ParseOptions::default());
        assert!(found.is_empty(), "{found:?}");
        let ruleset = lower(&dump, &[], Semantics::Legacy);
        // No stages for fragments: they would only be the same once more.
        let place = Place {
            fragments: Fragments::AsSeen,
            ..place(&[Hook::Input], Attach::TcIngress, Mode::Replace, true)
        };
        let flat = flatten(&ruleset, &place, &Env::default(), &mut Vec::new());
        let simple = simplify(flat.clone());
        assert_eq!(simple.verify(), Vec::<String>::new());
        [flat, simple]
    }

    /// Most stages that a packet may enter.
    fn depth(classifier: &Classifier) -> usize {
        let mut depths: SecondaryMap<Stage, usize> = SecondaryMap::new();
        for (stage, data) in classifier.stages.iter() {
            let exits = data.entries.iter().map(|&entry| &classifier.entries[entry].exit);
            depths[stage] = 1 + exits.flat_map(Exit::successors).map(|next| depths[next]).max().unwrap_or(0);
        }
        depths[classifier.root]
    }

    #[test]
    fn chains_that_come_back_are_not_asked_again() {
        const SERVICES: usize = 100;
        let (mut chains, mut rules) = (String::new(), String::new());
        for service in 0..SERVICES {
            writeln!(chains, ":S{service} - [0:0]").expect("strings take text");
            writeln!(rules, "-A INPUT -d 10.0.0.{service}/32 -p udp -j S{service}")
                .expect("strings take text");
            writeln!(rules, "-A S{service} -s 192.0.2.{service}/32 -j DROP").expect("strings take text");
        }
        let [flat, simple] = both(&format!("{chains}{rules}"));
        assert!(depth(&flat) > SERVICES, "{}", depth(&flat));
        // The chain, and the one that it jumps to; after that, nothing is left to ask.
        assert_eq!(depth(&simple), 2, "{simple}");
        assert_eq!(simple.stages.len(), 1 + SERVICES);
        assert_eq!(simple.entries.len(), SERVICES + 1 + 2 * SERVICES);
    }

    #[test]
    fn rules_that_mark_a_host_each_are_one_stage() {
        let mut rules = String::new();
        for host in 0..1_000 {
            writeln!(rules, "-A INPUT -s 10.0.{}.{}/32 -j MARK --set-xmark {host}", host / 256, host % 256)
                .expect("strings take text");
        }
        let [flat, simple] = both(&rules);
        assert!(depth(&flat) > 1_000, "{}", depth(&flat));
        // A packet of one host is not one of the others: it goes on to the last rule, behind which packets end.
        assert_eq!(depth(&simple), 3, "{simple}");
    }

    #[test]
    fn what_was_written_is_known() {
        let [flat, simple] = both(
            ":M - [0:0]\n\
             -A INPUT -s 10.0.0.0/8 -j M\n\
             -A INPUT -m mark --mark 0x4000/0x4000 -j DROP\n\
             -A M -j MARK --set-xmark 0x4000/0x4000\n",
        );
        assert_eq!(depth(&flat), 3, "{flat}");
        // What has been marked is dropped without being asked for its mark.
        assert_eq!(depth(&simple), 2, "{simple}");
        assert_eq!(simple.entries.len(), 4, "{simple}");
    }

    #[test]
    fn guards_are_known_behind_them() {
        // Both rules drop what is too short to have ports; the second never sees it.
        let [_, simple] = both(
            ":C - [0:0]\n\
             -A INPUT -p tcp -m tcp --dport 22 -j C\n\
             -A C -p tcp -m tcp --sport 1000 -j DROP\n",
        );
        let asks =
            |entry: &EntryData| entry.cube.tests().iter().any(|test| test.field.to_string() == "l4_len");
        assert_eq!(simple.entries.values().filter(|entry| asks(entry)).count(), 1, "{simple}");
    }
}
