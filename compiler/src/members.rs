//! Which sets become tables, and which become stages of cubes as rules do.
//!
//! Stages cost a packet less as long as they are small, and combine with what else is tested. Tables take sets of any
//! size, and alone can change while a program runs.

use std::collections::{BTreeMap, BTreeSet};

use polc_ir::derived::DerivedData;
use polc_ir::diag::{Code, Diagnostic};
use polc_ir::entities::{Derived, Set};
use polc_ir::hook::Family;
use polc_ir::plan::set::{SetShape, shape};
use polc_ir::ruleset::Ruleset;
use polc_ir::set::{DimensionKind, SetContents, leaves};

/// A set that a running program should look up can't be a table.
pub(crate) const SET_NOT_LIVE: Code = Code(502);

/// Elements that a set of one dimension may have as a stage.
const STAGE_ELEMENTS_MAX: usize = 1_000;
/// The same of what a table finds in one step and a stage in several: elements of several dimensions, hosts of IPv6.
const STAGE_LONG_MAX: usize = 64;

/// Membership that tables give.
#[derive(Clone, Debug, Default)]
pub(crate) struct Members {
    /// The fields.
    pub(crate) fields: BTreeSet<Derived>,
    /// The shape of each table.
    pub(crate) shapes: BTreeMap<Set, SetShape>,
}

impl Members {
    /// Chooses among the fields that are tested.
    pub(crate) fn choose(
        ruleset: &Ruleset,
        tested: &[Derived],
        diagnostics: &mut Vec<Diagnostic>,
    ) -> Members {
        let mut members = Members::default();
        for &derived in tested {
            let DerivedData::Member { set, ends, .. } = &ruleset.derived[derived] else { continue };
            let asked: Vec<Set> = leaves(&ruleset.sets, *set)
                .into_iter()
                .filter(|leaf| ruleset.sets[*leaf].dimensions.len() <= ends.len())
                .collect();
            if !asked.iter().any(|leaf| wants_table(ruleset, *leaf)) {
                continue;
            }
            let mut shapes = BTreeMap::new();
            let mut fits = true;
            for &leaf in &asked {
                let data = &ruleset.sets[leaf];
                let known = members.shapes.get(&leaf).cloned();
                match known.map_or_else(|| shape(data, ruleset.family), Ok) {
                    Ok(shape) => {
                        shapes.insert(leaf, shape);
                    }
                    Err(why) => {
                        fits = false;
                        let message = format!("set `{}` can't change while it is in force: {why}", data.name);
                        if data.live && !diagnostics.iter().any(|known| known.message == message) {
                            diagnostics.push(
                                Diagnostic::note(SET_NOT_LIVE, message, data.span)
                                    .with_hint("to change it, apply the rules again with the new set"),
                            );
                        }
                    }
                }
            }
            if fits {
                members.fields.insert(derived);
                members.shapes.extend(shapes);
            }
        }
        members
    }
}

fn wants_table(ruleset: &Ruleset, set: Set) -> bool {
    let data = &ruleset.sets[set];
    let SetContents::Elements(elements) = &data.contents else { return false };
    let small = match data.dimensions[..] {
        [DimensionKind::Address] if ruleset.family == Family::V6 => STAGE_LONG_MAX,
        [_] => STAGE_ELEMENTS_MAX,
        _ => STAGE_LONG_MAX,
    };
    data.live || elements.len() > small
}
