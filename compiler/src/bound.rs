//! `bound`: leaves to the kernel what lies deeper than a program may look.
//!
//! The kernel's verifier follows a program's loop turn by turn, so a packet may visit only so many table records. Stages
//! that a packet reaches after more than that become deferrals, and so do the entries of a stage that it can't be asked for
//! any more: packets that are decided early are still decided, and those that would wander through hundreds of chains are
//! left to the kernel's own rules, with a diagnostic.

use std::collections::BTreeSet;

use cranelift_entity::SecondaryMap;
use polc_ir::classifier::{Classifier, EntryData, Exit, Origin};
use polc_ir::cube::{Cube, Test};
use polc_ir::decision::{Decision, NodeData};
use polc_ir::diag::{Code, Diagnostic};
use polc_ir::entities::{Entry, Node, Rule, Stage};
use polc_ir::interval::IntervalSet;
use polc_ir::limits::WALK_TURNS_CAUTIOUS;
use polc_ir::outcome::{Decider, Ending, Verdict};
use polc_ir::ruleset::Ruleset;

use crate::beyond::Beyond;
use crate::decide::decide_walked;
use crate::select::{Structures, busy};
use crate::simplify::rebuild;

/// Some packets would take more turns through the tables than the kernel's verifier follows.
pub const TOO_DEEP: Code = Code(501);

/// Steps of a turn, as the backend emits it.
const STEPS_PER_TURN: u32 = 5;

/// Writes of an exit's record.
const WRITES_PER_TURN: usize = 2;

/// Replaces what lies too deep by deferrals, and adds what packets don't get to to `beyond`; true if there is any. Stages
/// and entries have other numbers then, and structures and the decision have to be made anew.
pub fn bound(
    ruleset: &Ruleset,
    classifier: Classifier,
    decision: &Decision,
    structures: &Structures,
    beyond: &mut Beyond,
) -> (Classifier, bool) {
    let (kept, deep) = kept(&classifier, decision, structures);
    if deep.is_empty() {
        return (classifier, false);
    }
    let kept = |stage: Stage| kept[stage].unwrap_or(classifier.stages[stage].entries.len());
    beyond.add_rules(&classifier, kept);
    let position = |rule: Rule| {
        let chain = ruleset.rules[rule].chain;
        let at = ruleset.chains[chain].rules.iter().position(|&own| own == rule);
        (chain, at.expect("a chain has its rules") as u32)
    };
    // A rule that others ask as well is not told by what is rare.
    let busy = busy(&classifier);
    for stage in deep.into_iter().filter(|&stage| busy[stage]) {
        let data = &classifier.stages[stage];
        let first = data.entries.get(kept(stage)).and_then(|&entry| classifier.entries[entry].rule);
        match (data.origin, first) {
            (Some((chain, at)), Some(rule)) if kept(stage) > 0 => {
                let (end_chain, end) = position(rule);
                beyond.add_end((chain, at), if chain == end_chain { end } else { at });
            }
            _ => origins(&classifier, stage)
                .into_iter()
                .for_each(|(chain, at)| beyond.add_end((chain, at), at)),
        }
    }
    let mut entries: SecondaryMap<Stage, Vec<EntryData>> = SecondaryMap::new();
    for (stage, data) in &classifier.stages {
        let kept = kept(stage);
        let all = data.entries.iter().map(|&entry| classifier.entries[entry].clone());
        entries[stage] = all.take(kept).collect();
        let Some(&first) = data.entries.get(kept) else { continue };
        let begin = data.origin.and_then(|(chain, skipped)| {
            let rules = &ruleset.chains[chain].rules;
            rules.get(skipped as usize).or(rules.last()).copied()
        });
        let by = classifier.entries[first].rule.filter(|_| kept > 0).or(begin);
        let by = by.map_or(Decider::Nothing, Decider::Rule);
        let exit = Exit::End(Ending { verdict: Verdict::Defer, by });
        entries[stage].push(EntryData { stage, cube: Cube::all(), rule: None, counts: Vec::new(), exit });
    }
    let root = classifier.root;
    (rebuild(classifier, root, entries), true)
}

/// The finding that packets don't get to some rules.
pub fn too_deep(ruleset: &Ruleset, beyond: &Beyond) -> Diagnostic {
    // Ways through the rules differ in the turns they take: if no rule is beyond all, the first that is beyond one is told.
    let first = |rules: &mut dyn Iterator<Item = Rule>| {
        rules.map(|rule| ruleset.rules[rule].span).min_by_key(|span| (span.file, span.start))
    };
    let ends = |(chain, end): Origin| ruleset.chains[chain].rules.get(end as usize).copied();
    let span = first(&mut beyond.left()).or_else(|| first(&mut beyond.ends().filter_map(ends)));
    let message = format!(
        "packets may take more than {WALK_TURNS_CAUTIOUS} turns through the tables; from this rule on such packets are deferred"
    );
    Diagnostic::warning(TOO_DEEP, message, span)
        .with_note("the kernel's verifier follows every turn of a program's loop, up to a million instructions")
        .with_hint(
            "what takes turns, one after another: rules that change marks or ask for chance, chains that come back without a verdict",
        )
}

/// How many entries packets get to of stages where they don't get to all; and the stages among them that packets come to,
/// the first of them first.
fn kept(
    classifier: &Classifier,
    decision: &Decision,
    structures: &Structures,
) -> (SecondaryMap<Stage, Option<usize>>, Vec<Stage>) {
    let costs = costs(classifier, decision, structures);
    let mut kept: SecondaryMap<Stage, Option<usize>> = SecondaryMap::new();
    let mut deep: Vec<Stage> = Vec::new();
    // Most turns taken before a stage is entered. Stages lead to smaller numbers: the root comes first.
    let mut reached: SecondaryMap<Stage, Option<u32>> = SecondaryMap::new();
    reached[classifier.root] = Some(0);
    for stage in classifier.stages.keys().rev() {
        // What only deep stages led to is out of reach, and takes no room.
        let Some(before) = reached[stage] else {
            kept[stage] = Some(0);
            continue;
        };
        let entries = &classifier.stages[stage].entries;
        let mut after = before.saturating_add(costs[stage]);
        // Leaving packets to the kernel takes a turn as well.
        let goes_on = |&entry: &Entry| classifier.entries[entry].exit.successors().next().is_some();
        if after > WALK_TURNS_CAUTIOUS && (entries.len() > 1 || entries.iter().any(goes_on)) {
            deep.push(stage);
            let (first, turns) = first_entries(classifier, structures, entries, before);
            kept[stage] = Some(first);
            after = before + turns;
        }
        for &entry in entries.iter().take(kept[stage].unwrap_or(entries.len())) {
            for next in classifier.entries[entry].exit.successors() {
                reached[next] = Some(reached[next].map_or(after, |known| known.max(after)));
            }
        }
    }
    (kept, deep)
}

/// The first stage that packets come to after too many turns, if there is one.
pub fn first_deep(classifier: &Classifier, decision: &Decision, structures: &Structures) -> Option<Stage> {
    kept(classifier, decision, structures).1.first().copied()
}

/// How many entries of a stage can be decided after `before` turns, none of them a rule in part; and in how many turns.
fn first_entries(
    classifier: &Classifier,
    structures: &Structures,
    entries: &[Entry],
    before: u32,
) -> (usize, u32) {
    let Some((&last, body)) = entries.split_last() else { return (0, 0) };
    let turns = |first: usize| {
        let first: Vec<Entry> = body[..first].iter().copied().chain([last]).collect();
        let mut decision = Decision::default();
        let exits = first.iter().map(|&entry| more(&classifier.entries[entry])).max().unwrap_or(0);
        let root = decide_walked(classifier, first, &mut decision);
        let steps = steps(classifier, &decision, structures, |_| false)[root];
        turns_of(exits, steps)
    };
    let fits = |first: usize| before.saturating_add(turns(first)) <= WALK_TURNS_CAUTIOUS;
    let (mut first, mut beyond) = (0, body.len());
    while beyond - first > 1 {
        let middle = usize::midpoint(first, beyond);
        if fits(middle) { first = middle } else { beyond = middle }
    }
    let rule = |at: usize| classifier.entries[entries[at]].rule;
    while first > 0 && rule(first).is_some() && rule(first) == rule(first - 1) {
        first -= 1;
    }
    match first {
        0 => (0, 0),
        first => (first, turns(first)),
    }
}

/// Where a stage begins; where it leads to if it has no rule, for it lies before the rules.
fn origins(classifier: &Classifier, stage: Stage) -> BTreeSet<Origin> {
    let mut known: SecondaryMap<Stage, bool> = SecondaryMap::new();
    let mut origins = BTreeSet::new();
    let mut pending = vec![stage];
    while let Some(stage) = pending.pop() {
        if std::mem::replace(&mut known[stage], true) {
            continue;
        }
        match classifier.stages[stage].origin {
            Some(origin) => _ = origins.insert(origin),
            None => {
                let entries = classifier.stages[stage].entries.iter();
                pending.extend(entries.flat_map(|&entry| classifier.entries[entry].exit.successors()));
            }
        }
    }
    origins
}

/// Turns that an entry's exit takes beyond one: counting on the way takes one, and so does every second write.
fn more(entry: &EntryData) -> u32 {
    match &entry.exit {
        Exit::Then { writes, .. } => (writes.len().div_ceil(WRITES_PER_TURN)
            + usize::from(!entry.counts.is_empty()))
        .saturating_sub(1) as u32,
        Exit::Test { .. } => u32::from(!entry.counts.is_empty()),
        Exit::End(_) | Exit::EndIfAbsent(_) => 0,
    }
}

/// Most turns that deciding each stage takes. Stages that the walk does not decide take none.
fn costs(classifier: &Classifier, decision: &Decision, structures: &Structures) -> SecondaryMap<Stage, u32> {
    // The list of a stage that the walk does not decide is nobody's way, and may be long.
    let mut unwalked: SecondaryMap<Node, bool> = SecondaryMap::new();
    for stage in classifier.stages.keys().filter(|stage| !structures.walked[*stage]) {
        if let Some(root) = decision.roots[stage] {
            unwalked[root] = true;
        }
    }
    let nodes = steps(classifier, decision, structures, |node| unwalked[node]);
    let mut costs = SecondaryMap::new();
    for stage in classifier.stages.keys() {
        if !structures.walked[stage] {
            continue;
        }
        let exits = classifier.stages[stage].entries.iter().map(|&entry| more(&classifier.entries[entry]));
        costs[stage] =
            turns_of(exits.max().unwrap_or(0), decision.roots[stage].map_or(0, |root| nodes[root]));
    }
    costs
}

/// The turns of so many steps and what exits take more: a turn is five steps, and a stage begins one.
fn turns_of(exits: u32, steps: u32) -> u32 {
    1 + exits + steps / STEPS_PER_TURN
}

/// Most steps that each node takes, and what is behind it; none where it is not asked for.
fn steps(
    classifier: &Classifier,
    decision: &Decision,
    structures: &Structures,
    is_unasked: impl Fn(Node) -> bool,
) -> SecondaryMap<Node, u32> {
    let tests = |test: &Test| structures.tests_of(classifier, test) as u32;
    let mut nodes: SecondaryMap<Node, u32> = SecondaryMap::new();
    for (node, data) in decision.nodes.iter() {
        nodes[node] = match data {
            NodeData::Test { field, mask, edges } => {
                let cut = |bound: u128| {
                    tests(&Test { field: *field, mask: *mask, values: IntervalSet::range(0, bound) })
                };
                // What lies beyond all other bounds is not asked for.
                let cuts: u32 = edges.iter().rev().skip(1).map(|(bound, _)| cut(*bound)).sum();
                let below = edges.iter().map(|(_, next)| nodes[*next]).max().unwrap_or(0);
                cuts + below
            }
            NodeData::Min { children } => children.iter().map(|child| 1 + nodes[*child]).sum(),
            NodeData::List { .. } if is_unasked(node) => 0,
            NodeData::List { entries } => {
                entries.iter().flat_map(|&entry| classifier.entries[entry].cube.tests()).map(tests).sum()
            }
            NodeData::Done { .. } | NodeData::None => 0,
        };
    }
    nodes
}
