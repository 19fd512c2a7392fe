//! `Decision::eval` and `Decision::verify`.

use super::{Decision, NodeData};
use crate::classifier::{Classifier, Fields};
use crate::entities::{Entry, Node, Stage};
use crate::field::Field;
use crate::outcome::Outcome;
use crate::state::State;

/// Finds the first of a list's entries that holds for a packet with these fields.
pub type FirstOfList<'a> = dyn Fn(Node, &[Entry], &Fields<'_>) -> Option<Entry> + 'a;

impl Decision {
    /// What becomes of a packet with these fields, where `classifier` is what the decision was made from.
    pub fn eval(&self, classifier: &Classifier, given: &dyn Fn(Field) -> u128, state: &mut State) -> Outcome {
        self.eval_by(classifier, given, state, &|_, entries, fields| classifier.first_of(entries, fields))
    }

    /// The same, where `first` says which of a list's entries is the first that holds.
    pub fn eval_by(
        &self,
        classifier: &Classifier,
        given: &dyn Fn(Field) -> u128,
        state: &mut State,
        first: &FirstOfList<'_>,
    ) -> Outcome {
        classifier.eval_by(given, state, |stage, fields| {
            self.decide(stage, fields, first).expect("a stage's decision gives an entry")
        })
    }

    /// The entry of a stage that a packet takes.
    fn decide(&self, stage: Stage, fields: &Fields<'_>, first: &FirstOfList<'_>) -> Option<Entry> {
        let mut best: Option<Entry> = None;
        let mut pending = vec![self.roots[stage]?];
        while let Some(node) = pending.pop() {
            let found = match &self.nodes[node] {
                NodeData::Test { field, mask, edges } => {
                    let value = fields.get(*field) & mask;
                    pending.extend(edges.iter().find(|(bound, _)| value <= *bound).map(|(_, next)| *next));
                    None
                }
                NodeData::Min { children } => {
                    pending.extend(children);
                    None
                }
                NodeData::List { entries } => first(node, entries, fields),
                NodeData::Done { entry } => Some(*entry),
                NodeData::None => None,
            };
            best = match (best, found) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        best
    }

    /// Everything wrong with the decision's shape.
    pub fn verify(&self, classifier: &Classifier) -> Vec<String> {
        let mut wrong = Vec::new();
        for stage in classifier.stages.keys() {
            if self.roots[stage].is_none() {
                wrong.push(format!("{stage} has no decision"));
            }
        }
        for (node, data) in self.nodes.iter() {
            let children: Vec<Node> = match data {
                NodeData::Test { edges, .. } => edges.iter().map(|(_, next)| *next).collect(),
                NodeData::Min { children } => children.clone(),
                _ => Vec::new(),
            };
            if children.iter().any(|child| *child >= node) {
                wrong.push(format!("{node} leads upwards"));
            }
            match data {
                NodeData::Test { edges, .. } if !edges.windows(2).all(|pair| pair[0].0 < pair[1].0) => {
                    wrong.push(format!("{node}'s edges are out of order"));
                }
                NodeData::List { entries } if !entries.is_sorted() => {
                    wrong.push(format!("{node}'s entries are out of order"));
                }
                _ => {}
            }
        }
        wrong
    }
}

/// Prints a node a line.
impl std::fmt::Display for Decision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (stage, root) in self.roots.iter() {
            if let Some(root) = root {
                writeln!(f, "{stage} = {root}")?;
            }
        }
        for (node, data) in self.nodes.iter() {
            match data {
                NodeData::Test { field, mask, edges } => {
                    write!(f, "{node}: {field} & {mask:#x}")?;
                    for (bound, next) in edges {
                        write!(f, " <={bound:#x}: {next}")?;
                    }
                    writeln!(f)?;
                }
                NodeData::Min { children } => writeln!(f, "{node}: min {children:?}")?,
                NodeData::List { entries } => writeln!(f, "{node}: list {entries:?}")?,
                NodeData::Done { entry } => writeln!(f, "{node}: {entry}")?,
                NodeData::None => writeln!(f, "{node}: none")?,
            }
        }
        Ok(())
    }
}
