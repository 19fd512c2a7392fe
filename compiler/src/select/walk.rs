//! The walk table: stages as nodes that a loop follows, for whatever no other structure takes.

use std::collections::BTreeMap;

use cranelift_entity::SecondaryMap;
use polc_ir::cube::Test;
use polc_ir::decision::{Decision, NodeData};
use polc_ir::entities::{Entry, Stage};
use polc_ir::interval::IntervalSet;
use polc_ir::plan::{PlanExit, Target, WalkNode, WalkRef, WalkTable, WordTest};

use super::{Counting, Selector};

impl Selector<'_> {
    /// The stages that `needed` names in the walk table, and where each begins.
    pub(super) fn walk(
        &self,
        counting: &Counting<'_>,
        decision: &Decision,
        needed: &SecondaryMap<Stage, bool>,
    ) -> (WalkTable, SecondaryMap<Stage, Option<WalkRef>>) {
        let classifier = self.classifier;
        let mut walk = Walk {
            selector: self,
            table: WalkTable::default(),
            node_visits: Vec::new(),
            exit_visits: Vec::new(),
        };
        let mut roots: SecondaryMap<Stage, Option<WalkRef>> = SecondaryMap::new();
        for (stage, data) in classifier.stages.iter() {
            if !needed[stage] {
                continue;
            }
            let first = walk.table.exits.len() as u32;
            for &entry in &data.entries {
                let exit = self.exit(counting, &classifier.entries[entry], |stage| {
                    Target::Walk(roots[stage].expect("what a stage of the walk leads to is in it"))
                });
                walk.add_exit(exit);
            }
            let number: BTreeMap<Entry, u32> = data.entries.iter().copied().zip(first..).collect();
            let root = decision.roots[stage].expect("every stage is decided");
            let root = walk.stage(decision, root, &number);
            walk.table.visits_max = walk.table.visits_max.max(walk.visits(root));
            roots[stage] = Some(root);
        }
        (walk.table, roots)
    }
}

struct Walk<'a> {
    selector: &'a Selector<'a>,
    table: WalkTable,
    /// For each node and exit, most visits from it to an ending.
    node_visits: Vec<u32>,
    exit_visits: Vec<u32>,
}

impl Walk<'_> {
    fn visits(&self, at: WalkRef) -> u32 {
        match at {
            WalkRef::Node(node) => self.node_visits[node as usize],
            WalkRef::Exit(exit) => self.exit_visits[exit as usize],
            WalkRef::None => 0,
        }
    }

    fn add_exit(&mut self, exit: PlanExit) {
        let target = |target: &Target| match target {
            Target::Walk(at) => self.visits(*at),
            Target::Step(_) => 0,
        };
        let visits = 1 + match &exit {
            PlanExit::End(_) => 0,
            PlanExit::Then { next, .. } => target(next),
            PlanExit::Test { yes, no, .. } => target(yes).max(target(no)),
        };
        self.table.exits.push(exit);
        self.exit_visits.push(visits);
    }

    fn test(&mut self, test: WordTest, yes: WalkRef, no: WalkRef) -> WalkRef {
        if yes == no {
            return yes;
        }
        self.node_visits.push(1 + self.visits(yes).max(self.visits(no)));
        self.table.nodes.push(WalkNode::Test { test, yes, no });
        WalkRef::Node(self.table.nodes.len() as u32 - 1)
    }

    /// Alternatives of word tests.
    fn any(&mut self, alternatives: &[Vec<WordTest>], yes: WalkRef, no: WalkRef) -> WalkRef {
        alternatives
            .iter()
            .rev()
            .fold(no, |no, all| all.iter().rev().fold(yes, |yes, &test| self.test(test, yes, no)))
    }

    /// The nodes below `root`. Nodes lead to smaller ones, so ascending order visits children first.
    fn stage(
        &mut self,
        decision: &Decision,
        root: polc_ir::entities::Node,
        number: &BTreeMap<Entry, u32>,
    ) -> WalkRef {
        let mut built: BTreeMap<polc_ir::entities::Node, WalkRef> = BTreeMap::new();
        let mut pending = vec![root];
        let mut needed = Vec::new();
        while let Some(node) = pending.pop() {
            needed.push(node);
            if let NodeData::Test { edges, .. } = &decision.nodes[node] {
                pending.extend(edges.iter().map(|(_, next)| *next));
            }
        }
        needed.sort_unstable();
        needed.dedup();
        for node in needed {
            let at = match &decision.nodes[node] {
                NodeData::Test { field, mask, edges } => {
                    let (_, last) = edges.last().expect("a test has edges");
                    let mut at = built[last];
                    for (bound, next) in edges.iter().rev().skip(1) {
                        let test = Test { field: *field, mask: *mask, values: IntervalSet::range(0, *bound) };
                        let tests = self.selector.word_tests(&test);
                        at = self.any(&tests, built[next], at);
                    }
                    at
                }
                NodeData::List { entries } => entries.iter().rev().fold(WalkRef::None, |next, entry| {
                    let tests = self.selector.classifier.entries[*entry].cube.tests();
                    tests.iter().rev().fold(WalkRef::Exit(number[entry]), |yes, test| {
                        let tests = self.selector.word_tests(test);
                        self.any(&tests, yes, next)
                    })
                }),
                NodeData::Done { entry } => WalkRef::Exit(number[entry]),
                NodeData::None => WalkRef::None,
                NodeData::Min { .. } => unreachable!("`decide` makes no minima"),
            };
            built.insert(node, at);
        }
        built[&root]
    }
}
