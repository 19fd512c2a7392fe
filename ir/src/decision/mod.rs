//! `Decision`: how each stage's first matching entry is found.
//!
//! One hash-consed DAG of nodes for all stages. A classical decision diagram has only `Test` and `Done`; a linear scan
//! is one `List`; independent groups of entries are a `Min` of partial decisions, of which the earliest entry wins.

mod eval;

pub use eval::FirstOfList;

use cranelift_entity::{PrimaryMap, SecondaryMap};

use crate::entities::{Entry, Node, Stage};
use crate::field::Field;

/// The decisions of all stages of one classifier.
#[derive(Clone, Debug, Default)]
pub struct Decision {
    /// The nodes. A node refers only to nodes with a smaller number.
    pub nodes: PrimaryMap<Node, NodeData>,
    /// The node at which each stage's decision starts.
    pub roots: SecondaryMap<Stage, Option<Node>>,
}

/// A node of a decision. Each gives the earliest entry that holds among those it covers, or none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NodeData {
    /// Goes on by the value of `field & mask`.
    Test {
        /// What is looked at.
        field: Field,
        /// Which bits of it.
        mask: u128,
        /// Where to go on: an edge covers the values above the previous edge's bound up to and including its own. The
        /// last bound is the mask's width all ones.
        edges: Vec<(u128, Node)>,
    },
    /// The earliest entry that any of the children gives.
    Min {
        /// Decisions over disjoint parts of the entries.
        children: Vec<Node>,
    },
    /// The first of these entries whose cube holds. Ascending.
    List {
        /// The entries still in question.
        entries: Vec<Entry>,
    },
    /// This entry, without looking at its cube: the path here implies it.
    Done {
        /// The entry.
        entry: Entry,
    },
    /// None of the entries that the node covers.
    None,
}
