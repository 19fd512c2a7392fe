//! `bound`: leaves to the kernel what lies deeper than a program may look.
//!
//! The kernel's verifier follows a program's loop turn by turn, so a packet may visit only so many table records. Stages
//! that a packet reaches after more than that become deferrals: packets that are decided early are still decided, and
//! those that would wander through hundreds of chains are left to the kernel's own rules, with a diagnostic.

use std::collections::BTreeSet;

use cranelift_entity::SecondaryMap;
use polc_ir::classifier::{Classifier, EntryData, Exit, Origin};
use polc_ir::cube::{Cube, Test};
use polc_ir::decision::{Decision, NodeData};
use polc_ir::diag::{Code, Diagnostic};
use polc_ir::entities::{Node, Stage};
use polc_ir::interval::IntervalSet;
use polc_ir::limits::WALK_TURNS_CAUTIOUS;
use polc_ir::outcome::{Decider, Ending, Verdict};
use polc_ir::ruleset::Ruleset;

use crate::select::Structures;
use crate::simplify::rebuild;

/// Some packets would take more turns through the tables than the kernel's verifier follows.
pub const TOO_DEEP: Code = Code(501);

/// Steps of a turn, as the backend emits it.
const STEPS_PER_TURN: u32 = 5;

/// Writes of an exit's record.
const WRITES_PER_TURN: usize = 2;

/// Replaces stages that lie too deep by deferrals, and gives where they begin. If there are any, stages and entries have
/// other numbers, and structures and the decision have to be made anew.
pub fn bound(
    ruleset: &Ruleset,
    classifier: Classifier,
    decision: &Decision,
    structures: &Structures,
    diagnostics: &mut Vec<Diagnostic>,
) -> (Classifier, BTreeSet<Origin>) {
    let costs = costs(&classifier, decision, structures);
    // Most turns taken before a stage is entered. Stages lead to smaller numbers: the root comes first.
    let mut reached: SecondaryMap<Stage, Option<u32>> = SecondaryMap::new();
    reached[classifier.root] = Some(0);
    let mut deep: Vec<Stage> = Vec::new();
    for stage in classifier.stages.keys().rev() {
        let Some(before) = reached[stage] else { continue };
        let after = before.saturating_add(costs[stage]);
        if after > WALK_TURNS_CAUTIOUS {
            deep.push(stage);
            continue;
        }
        for &entry in &classifier.stages[stage].entries {
            for next in classifier.entries[entry].exit.successors() {
                reached[next] = Some(reached[next].map_or(after, |known| known.max(after)));
            }
        }
    }
    if deep.is_empty() {
        return (classifier, BTreeSet::new());
    }
    let begin = origins(&classifier, &deep);
    // What only deep stages led to is out of reach now, and takes no room.
    let cut: Vec<Stage> = classifier
        .stages
        .keys()
        .filter(|&stage| {
            reached[stage].is_none_or(|before| before.saturating_add(costs[stage]) > WALK_TURNS_CAUTIOUS)
        })
        .collect();
    let mut entries: SecondaryMap<Stage, Vec<EntryData>> = SecondaryMap::new();
    for (stage, data) in &classifier.stages {
        entries[stage] = data.entries.iter().map(|&entry| classifier.entries[entry].clone()).collect();
    }
    for stage in cut {
        let rule = classifier.stages[stage].origin.and_then(|(chain, skipped)| {
            let rules = &ruleset.chains[chain].rules;
            rules.get(skipped as usize).or(rules.last()).copied()
        });
        let by = rule.map_or(Decider::Nothing, Decider::Rule);
        let exit = Exit::End(Ending { verdict: Verdict::Defer, by });
        entries[stage] = vec![EntryData { stage, cube: Cube::all(), rule: None, counts: Vec::new(), exit }];
    }
    let root = classifier.root;
    let classifier = rebuild(classifier, root, entries);
    // Ways through the rules differ in the turns they take; the first rule that one of them does not come to is told.
    let rules =
        begin.iter().filter_map(|&(chain, skipped)| ruleset.chains[chain].rules.get(skipped as usize));
    let spans = rules.map(|&rule| ruleset.rules[rule].span);
    let span = spans.min_by_key(|span| (span.file, span.start));
    let message = format!(
        "packets may take more than {WALK_TURNS_CAUTIOUS} turns through the tables; from this rule on such packets are left to the kernel"
    );
    diagnostics.push(
        Diagnostic::warning(TOO_DEEP, message, span)
            .with_note(
                "the kernel's verifier follows every turn of a program's loop, up to a million instructions",
            )
            .with_hint(
                "what takes turns, one after another: rules that change marks or ask for chance, chains that come back without a verdict",
            ),
    );
    (classifier, begin)
}

/// Where stages begin; where ones without a rule lead to, if they lie before the rules.
fn origins(classifier: &Classifier, stages: &[Stage]) -> BTreeSet<Origin> {
    let mut known: SecondaryMap<Stage, bool> = SecondaryMap::new();
    let mut origins = BTreeSet::new();
    let mut pending = stages.to_vec();
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

/// Most turns that deciding each stage takes: a turn is five steps, and a stage begins one. Stages that the walk does
/// not decide take none.
fn costs(classifier: &Classifier, decision: &Decision, structures: &Structures) -> SecondaryMap<Stage, u32> {
    let tests = |test: &Test| structures.tests_of(classifier, test) as u32;
    // The list of a stage that the walk does not decide is nobody's way, and may be long.
    let mut unwalked: SecondaryMap<Node, bool> = SecondaryMap::new();
    for stage in classifier.stages.keys().filter(|stage| !structures.walked[*stage]) {
        if let Some(root) = decision.roots[stage] {
            unwalked[root] = true;
        }
    }
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
            NodeData::List { .. } if unwalked[node] => 0,
            NodeData::List { entries } => {
                entries.iter().flat_map(|&entry| classifier.entries[entry].cube.tests()).map(tests).sum()
            }
            NodeData::Done { .. } | NodeData::None => 0,
        };
    }
    let mut costs = SecondaryMap::new();
    for stage in classifier.stages.keys() {
        if !structures.walked[stage] {
            continue;
        }
        let exits = classifier.stages[stage].entries.iter().map(|&entry| more(&classifier.entries[entry]));
        costs[stage] = 1
            + exits.max().unwrap_or(0)
            + decision.roots[stage].map_or(0, |root| nodes[root]) / STEPS_PER_TURN;
    }
    costs
}
