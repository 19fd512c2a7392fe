//! Shortcuts through the walk table: an exit that changes and counts nothing, and leads on within the table, is left out,
//! and what led to it leads to where it leads.
//!
//! Each exit costs a turn of the loop, whatever it does. A service's chains are stages of one or two tests each, whose
//! exits only say which stage comes next; a packet goes through a dozen of them.
//!
//! Under a fork an exit stays: there the smallest of two exits decides which stage comes next, and it must have come to
//! both before.

use polc_ir::plan::{PlanExit, Target, WalkNode, WalkRef, WalkTable};

/// Where references to exits lead.
#[derive(Debug, Default)]
pub(super) struct Shortcuts {
    /// Of each exit: itself, or what stands for it.
    leads: Vec<WalkRef>,
    /// Of each exit that is kept, how many are before it. For the others a number without meaning.
    places: Vec<u32>,
    /// How many exits are kept.
    pub(super) kept: usize,
}

impl Shortcuts {
    pub(super) fn new(walk: &WalkTable) -> Shortcuts {
        let forked = forked(walk);
        let mut leads: Vec<WalkRef> = (0..walk.exits.len() as u32).map(WalkRef::Exit).collect();
        for (exit, forked) in forked.into_iter().enumerate() {
            if let (false, Some(next)) = (forked, passes(&walk.exits[exit])) {
                leads[exit] = next;
            }
        }
        // Along chains of such exits, to the end of each. Those of a circle, which no compiler makes and which is
        // refused where turns are counted, keep leading around it.
        for exit in 0..leads.len() {
            for _ in 0..leads.len() {
                match leads[exit] {
                    WalkRef::Exit(next) if leads[next as usize] != leads[exit] => {
                        leads[exit] = leads[next as usize];
                    }
                    _ => break,
                }
            }
        }
        let mut kept = 0;
        let places = leads
            .iter()
            .enumerate()
            .map(|(exit, lead)| {
                let place = kept as u32;
                kept += usize::from(*lead == WalkRef::Exit(exit as u32));
                place
            })
            .collect();
        Shortcuts { leads, places, kept }
    }

    /// Where a reference leads.
    pub(super) fn lead(&self, reference: WalkRef) -> WalkRef {
        match reference {
            WalkRef::Exit(exit) => self.leads[exit as usize],
            other => other,
        }
    }

    /// Number of the record of an exit that is kept, among those of exits.
    pub(super) fn place(&self, exit: u32) -> u32 {
        self.places[exit as usize]
    }

    /// The exits that are kept, in their order.
    pub(super) fn exits(&self) -> impl Iterator<Item = usize> + '_ {
        self.leads
            .iter()
            .enumerate()
            .filter(|(exit, lead)| **lead == WalkRef::Exit(*exit as u32))
            .map(|(exit, _)| exit)
    }
}

/// Where an exit leads that does nothing else.
fn passes(exit: &PlanExit) -> Option<WalkRef> {
    match exit {
        PlanExit::Then { count: None, writes, next: Target::Walk(next) } if writes.is_empty() => Some(*next),
        _ => None,
    }
}

/// Whether each exit is what a fork may come to.
fn forked(walk: &WalkTable) -> Vec<bool> {
    let mut exits = vec![false; walk.exits.len()];
    let mut nodes = vec![false; walk.nodes.len()];
    // Nodes refer to those before them.
    for (index, node) in walk.nodes.iter().enumerate().rev() {
        let is_fork = matches!(node, WalkNode::Fork { .. });
        if !(is_fork || nodes[index]) {
            continue;
        }
        let (WalkNode::Test { yes: one, no: other, .. } | WalkNode::Fork { first: one, rest: other }) = *node;
        for reference in [one, other] {
            match reference {
                WalkRef::Node(node) => nodes[node as usize] = true,
                WalkRef::Exit(exit) => exits[exit as usize] = true,
                WalkRef::None => {}
            }
        }
    }
    exits
}

#[cfg(test)]
mod tests {
    use polc_ir::plan::{WordTest, WordWrite};

    use super::*;

    fn test(yes: WalkRef, no: WalkRef) -> WalkNode {
        WalkNode::Test { test: WordTest { word: 0, mask: u32::MAX, lo: 0, hi: 9 }, yes, no }
    }

    fn to(next: WalkRef) -> PlanExit {
        PlanExit::Then { count: None, writes: Vec::new(), next: Target::Walk(next) }
    }

    #[test]
    fn what_does_nothing_and_is_under_no_fork_is_left_out() {
        use WalkRef::{Exit, Node};
        let write = WordWrite { word: 0, clear: 1, xor: 0 };
        let walk = WalkTable {
            nodes: vec![
                test(Exit(0), Exit(1)),
                test(Exit(2), Exit(3)),
                test(Exit(4), Exit(5)),
                WalkNode::Fork { first: Node(1), rest: Node(2) },
            ],
            exits: vec![
                PlanExit::End(7),
                to(Exit(6)),
                to(Node(0)),
                PlanExit::End(8),
                PlanExit::End(9),
                to(Node(0)),
                to(Exit(7)),
                PlanExit::Then { count: None, writes: vec![write], next: Target::Walk(Node(0)) },
            ],
            visits_max: 9,
        };
        let shortcuts = Shortcuts::new(&walk);
        // Through two of them to one that writes; the fork's stay.
        assert_eq!(shortcuts.lead(Exit(1)), Exit(7));
        assert_eq!(shortcuts.lead(Exit(6)), Exit(7));
        assert_eq!(shortcuts.exits().collect::<Vec<_>>(), [0, 2, 3, 4, 5, 7]);
        assert_eq!(shortcuts.kept, 6);
        assert_eq!([0, 2, 3, 4, 5, 7].map(|exit| shortcuts.place(exit)), [0, 1, 2, 3, 4, 5]);
        assert_eq!(shortcuts.lead(Node(3)), Node(3));
    }
}
