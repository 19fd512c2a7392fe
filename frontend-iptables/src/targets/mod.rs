//! The target extensions: one entry each.

mod cluster;
mod hmark;
mod led;
mod nat;
mod rateest;
mod rewrite;
mod terminal;

use std::sync::LazyLock;

use polc_ir::hook::Family;
use polc_ir::ruleset::Opaque;

use crate::extension::{Entry, Extension};

/// Every target, by group.
pub const ALL: &[&[Extension]] =
    &[terminal::ALL, nat::ALL, rewrite::ALL, hmark::ALL, rateest::ALL, led::ALL, cluster::ALL];

static ENTRIES: LazyLock<Vec<Entry>> = LazyLock::new(|| Entry::table(ALL));

/// Every target, as the line parser sees it.
pub fn entries() -> impl Iterator<Item = &'static Entry> {
    ENTRIES.iter()
}

/// The target of this name in a family.
pub fn find(name: &str, family: Family) -> Option<&'static Entry> {
    entries().find(|entry| entry.spec.name == name && entry.spec.families.contains(family))
}

/// What only the kernel does.
fn kernel(name: &str, reason: &str) -> Opaque {
    Opaque { name: name.into(), reason: reason.into(), observable: true }
}
