//! `Classifier`: chains and jumps flattened to stages of cubes.
//!
//! A stage is an ordered list of entries over fields that are fixed while the stage runs; the first entry whose cube
//! holds decides. Whatever changes a field or spends state ends a stage, so nothing of the kind is ever reordered,
//! duplicated or dropped. Stages form a DAG.

mod eval;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

pub use eval::Fields;

use cranelift_entity::PrimaryMap;

use crate::cube::Cube;
use crate::derived::DerivedData;
use crate::entities::{Chain, Derived, EffectTest, Entry, Rule, Set, Stage};
use crate::env::Place;
use crate::hook::Family;
use crate::outcome::{Count, Ending};
use crate::plan::set::SetShape;
use crate::ruleset::{EffectTestData, Write};
use crate::set::SetData;

/// What a place decides, as stages.
#[derive(Clone, Debug)]
pub struct Classifier {
    /// The address family of the packets the stages see.
    pub family: Family,
    /// What it was made for.
    pub place: Place,
    /// The stages. A stage refers only to stages with a *smaller* number, so that ascending order visits successors
    /// first and no cycle can exist.
    pub stages: PrimaryMap<Stage, StageData>,
    /// The entries of all stages.
    pub entries: PrimaryMap<Entry, EntryData>,
    /// Where packets enter.
    pub root: Stage,
    /// The rule set's computed fields.
    pub derived: PrimaryMap<Derived, DerivedData>,
    /// The rule set's sets, which derived fields refer to.
    pub sets: PrimaryMap<Set, SetData>,
    /// Fields that say whether a packet is in a set, and that no stage computes: they are given, as [`Self::member`]
    /// says.
    pub members: BTreeSet<Derived>,
    /// The shapes of the tables of the sets that `members` ask.
    pub set_shapes: BTreeMap<Set, SetShape>,
    /// The rule set's stateful and random tests.
    pub effect_tests: PrimaryMap<EffectTest, EffectTestData>,
}

/// A stage.
#[derive(Clone, Debug, Default)]
pub struct StageData {
    /// The entries, first match first. The last one's cube always holds.
    pub entries: Vec<Entry>,
    /// Where the stage starts, for people.
    pub origin: Option<Origin>,
}

/// A chain, and a position in it: how many rules are before it.
pub type Origin = (Chain, u32);

/// An entry of a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryData {
    /// The stage it is in.
    pub stage: Stage,
    /// When it applies.
    pub cube: Cube,
    /// The rule whose clauses the cube comes from; none for policies and fall-throughs.
    pub rule: Option<Rule>,
    /// What a packet that takes this entry is counted for, in order: what it met since the stage was entered.
    pub counts: Vec<Count>,
    /// What happens.
    pub exit: Exit,
}

/// What an entry does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Exit {
    /// The packet's fate is decided.
    End(Ending),
    /// The packet is dropped so if the kernel's table has no connection for it ([`crate::field::Field::CtAbsent`]), and
    /// deferred by the same decider otherwise.
    EndIfAbsent(Ending),
    /// Change fields, in order, and go on in another stage.
    Then {
        /// The changes.
        writes: Vec<Write>,
        /// Where to go on.
        stage: Stage,
    },
    /// Run a stateful or random test and go on in one of two stages.
    Test {
        /// The test. Its `negate` is already accounted for in the stages.
        test: EffectTest,
        /// Where to go on if it holds.
        yes: Stage,
        /// Where to go on if it doesn't.
        no: Stage,
    },
}

impl Exit {
    /// The stages this may go on in.
    pub fn successors(&self) -> impl Iterator<Item = Stage> {
        let pair = match *self {
            Exit::End(_) | Exit::EndIfAbsent(_) => [None, None],
            Exit::Then { stage, .. } => [Some(stage), None],
            Exit::Test { yes, no, .. } => [Some(yes), Some(no)],
        };
        pair.into_iter().flatten()
    }

    /// The same where stages have other numbers.
    #[must_use]
    pub fn renumbered(self, to: impl Fn(Stage) -> Stage) -> Exit {
        match self {
            Exit::End(_) | Exit::EndIfAbsent(_) => self,
            Exit::Then { writes, stage } => Exit::Then { writes, stage: to(stage) },
            Exit::Test { test, yes, no } => Exit::Test { test, yes: to(yes), no: to(no) },
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::End(ending) => write!(f, "{ending}"),
            Exit::EndIfAbsent(ending) => write!(f, "{ending} if without connection"),
            Exit::Then { writes, stage } => {
                for write in writes {
                    write!(
                        f,
                        "{} = {} & !{:#x} ^ {:#x}; ",
                        write.field, write.field, write.clear, write.xor
                    )?;
                }
                write!(f, "then {stage}")
            }
            Exit::Test { test, yes, no } => write!(f, "if {test} then {yes} else {no}"),
        }
    }
}

impl fmt::Display for Classifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "classifier {} root {}", self.family, self.root)?;
        for derived in &self.members {
            writeln!(f, "{derived} given: {:?}", self.derived[*derived])?;
        }
        for (stage, data) in self.stages.iter().rev() {
            write!(f, "{stage}:")?;
            if let Some((chain, skipped)) = data.origin {
                write!(f, " # {chain} from rule {}", skipped + 1)?;
            }
            writeln!(f)?;
            for &entry in &data.entries {
                let data = &self.entries[entry];
                write!(f, "    {entry}: {} => {}", data.cube, data.exit)?;
                if let Some(rule) = data.rule {
                    write!(f, "  # {rule}")?;
                }
                for (index, count) in data.counts.iter().enumerate() {
                    write!(f, "{}{count}", if index == 0 { "  counts " } else { ", " })?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}
