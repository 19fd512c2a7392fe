//! How a stage is decided by code: by comparing, or by a look-up of one structure or another.

use cranelift_entity::{PrimaryMap, SecondaryMap};
use polc_ir::at_once::{both, each};
use polc_ir::classifier::Classifier;
use polc_ir::entities::{Entry, Stage, Value};
use polc_ir::field::Field;
use polc_ir::limits::LOOKUP_OPS_MAX;
use polc_ir::plan::{LinearTest, LookupStep, Op, PRESSURE_MAX};

use super::groups::groups;
use super::line::{Line, Tables};
use super::matrix::{self, matrix};
use super::problem::Problem;
use super::room::Room;
use super::{Prefer, Selector, cost, exit_insns};

/// Word tests that a stage decided by comparing may have: what is more, tables decide faster.
const LINEAR_TESTS_MAX: usize = 400;

/// Entries up to which a stage that only rare packets come to is compared.
const RARE_ENTRIES_MAX: usize = 16;

/// Entries from which on a stage's look-up is worth a thread, and how many stages may have theirs found ahead: of more,
/// most will not be decided by code.
const LARGE_ENTRIES: usize = 256;
const LARGE_STAGES_MAX: usize = 16;

/// Entries of a stage that tells rare packets from others.
const GUARD_ENTRIES_MAX: usize = 8;

/// Instructions that an operation of a look-up becomes, those included that make room for its value: most of long look-ups,
/// where it was measured to be 1.3 to 1.6.
const INSNS_PER_OP: usize = 2;

/// Instructions that follow a look-up: what its exit's word says.
const INSNS_PER_LOOKUP: usize = 24;

/// Instructions that a word test becomes, and an exit.
const INSNS_PER_TEST: usize = 4;

/// Bytes of tables below which no other structure is tried.
const SMALL_BYTES: usize = 256 << 10;

/// How a stage is decided by code, its exits still those of the classifier.
#[derive(Clone, Debug)]
pub(super) enum Shape {
    /// By comparing: for each entry that can hold, its tests.
    Linear(Vec<(Entry, Vec<LinearTest>)>),
    /// By looking up: the operations, the result, what they are, and the exits, each by an entry that has it.
    Lookup { ops: PrimaryMap<Value, Op>, result: Value, structure: String, exits: Vec<Entry>, modelled: u32 },
}

impl Shape {
    /// Most instructions that it becomes: comparing with all its exits, a look-up with those that end or walk.
    pub(super) fn insns(&self, classifier: &Classifier) -> usize {
        match self {
            Shape::Linear(entries) => entries
                .iter()
                .map(|(entry, tests)| {
                    let tests = tests.iter().flat_map(|test| &test.any);
                    let tests = tests.map(|all| all.len() + 1).sum::<usize>();
                    exit_insns(&classifier.entries[*entry]) + INSNS_PER_TEST * tests
                })
                .sum(),
            Shape::Lookup { ops, .. } => INSNS_PER_OP * ops.len() + INSNS_PER_LOOKUP,
        }
    }

    pub(super) fn modelled(&self) -> u32 {
        match self {
            Shape::Linear(entries) => cost::linear(entries.iter().map(|(_, tests)| tests.as_slice())),
            Shape::Lookup { modelled, .. } => *modelled,
        }
    }
}

impl Selector<'_> {
    /// The best way to decide a stage by code, if there is one. To one that is not `busy` only rare packets come: it is
    /// small rather than quick.
    pub(super) fn shape(
        &self,
        entries: &[Entry],
        busy: bool,
        prefer: Prefer,
        lookup: impl FnOnce() -> Option<(Shape, Tables)>,
        tables: &mut Tables,
    ) -> Option<Shape> {
        let linear = self.linear(entries);
        match prefer {
            Prefer::Walk => return None,
            Prefer::Linear => return linear,
            Prefer::Cheapest | Prefer::Matrix | Prefer::Groups | Prefer::Parts => {}
        }
        // Code that compares stands beside its rules, which costs nothing where hardly a packet comes.
        let most = if busy || prefer != Prefer::Cheapest { 1 } else { RARE_ENTRIES_MAX };
        let few = linear.as_ref().is_some_and(|shape| match shape {
            Shape::Linear(entries) => entries.len() <= most,
            Shape::Lookup { .. } => false,
        });
        if few || (self.is_guard(entries) && linear.is_some()) {
            return linear;
        }
        let lookup = lookup().filter(|(lookup, _)| {
            let cheaper = |linear: &Shape| linear.modelled() <= lookup.modelled();
            prefer != Prefer::Cheapest || !linear.as_ref().is_some_and(cheaper)
        });
        let Some((mut lookup, own)) = lookup else { return linear };
        if let Shape::Lookup { ops, .. } = &mut lookup {
            tables.adopt(own, ops);
        }
        Some(lookup)
    }

    /// The look-ups of large stages, which take longest to find: several at once.
    pub(super) fn ahead(
        &self,
        busy: &SecondaryMap<Stage, bool>,
        prefer: Prefer,
    ) -> Vec<(Stage, Option<(Shape, Tables)>)> {
        let large = |stage: &Stage| self.classifier.stages[*stage].entries.len() >= LARGE_ENTRIES;
        let stages: Vec<Stage> =
            self.classifier.stages.keys().rev().filter(large).take(LARGE_STAGES_MAX).collect();
        if stages.len() < 2 || matches!(prefer, Prefer::Walk | Prefer::Linear | Prefer::Parts) {
            return Vec::new();
        }
        let lookups = each(&stages, |&stage| {
            let entries = &self.classifier.stages[stage].entries;
            self.lookup(entries, busy[stage], prefer, Room::WHOLE)
        });
        stages.into_iter().zip(lookups).collect()
    }

    /// Whether a stage only tells rare packets from others: a branch for them is foreseen.
    fn is_guard(&self, entries: &[Entry]) -> bool {
        let asks = |entry: &Entry, fields: &[Field]| {
            self.classifier.entries[*entry].cube.tests().iter().all(|test| fields.contains(&test.field))
        };
        entries.len() <= GUARD_ENTRIES_MAX
            && entries
                .first()
                .is_some_and(|first| asks(first, &[Field::Fragment, Field::FragOffset, Field::L4Len]))
            && entries
                .iter()
                .all(|entry| asks(entry, &[Field::Fragment, Field::FragOffset, Field::L4Len, Field::Proto]))
    }

    /// A stage as comparisons, if they are few.
    fn linear(&self, entries: &[Entry]) -> Option<Shape> {
        // Each counts for one at least.
        if entries.len() > LINEAR_TESTS_MAX {
            return None;
        }
        let mut compared = Vec::new();
        let mut total = 0;
        for &entry in entries {
            let data = &self.classifier.entries[entry];
            let tests: Vec<LinearTest> =
                data.cube.tests().iter().map(|test| LinearTest { any: self.word_tests(test) }).collect();
            total += 1 + tests.iter().flat_map(|test| &test.any).map(Vec::len).sum::<usize>();
            if total > LINEAR_TESTS_MAX {
                return None;
            }
            if tests.iter().any(|test| test.any.is_empty()) {
                continue;
            }
            compared.push((entry, tests));
        }
        Some(Shape::Linear(compared))
    }

    /// A stage as a look-up with its tables, if a structure takes it; of two, the cheaper.
    pub(super) fn lookup(
        &self,
        entries: &[Entry],
        busy: bool,
        prefer: Prefer,
        room: Room,
    ) -> Option<(Shape, Tables)> {
        let stage = self.classifier.entries[entries[0]].stage;
        let problem = Problem::new(self, entries, room)?;
        let by_groups = || {
            let groups = groups(&problem)?;
            let tables = if busy { Tables::new() } else { Tables::frugal() };
            write(stage, room, groups.describe(), &groups.exits, tables, |line| groups.write(line))
        };
        if !busy
            && prefer == Prefer::Cheapest
            && let Some(groups) = by_groups()
        {
            return Some(groups);
        }
        let by_matrix = || {
            let matrix = if prefer == Prefer::Groups { None } else { matrix(&problem) }?;
            write(stage, room, matrix.describe(), &problem.exits, Tables::new(), |line| {
                Some(matrix.write(line))
            })
        };
        let enough = |matrix: &(Shape, Tables)| prefer == Prefer::Matrix || matrix.1.bytes() <= SMALL_BYTES;
        // Of many entries each takes long, and few matrices are so small that nothing else need be tried.
        let is_large = problem.entries.len() >= LARGE_ENTRIES && matrix::is_open(&problem);
        let (matrix, groups) = if is_large && prefer == Prefer::Cheapest {
            both(by_matrix, by_groups)
        } else {
            let matrix = by_matrix();
            let groups = if matrix.as_ref().is_some_and(enough) { None } else { by_groups() };
            (matrix, groups)
        };
        match (matrix, groups) {
            (Some(matrix), _) if enough(&matrix) => Some(matrix),
            (Some(matrix), Some(groups)) if matrix.0.modelled() <= groups.0.modelled() => Some(matrix),
            (matrix, groups) => groups.or(matrix),
        }
    }
}

/// Writes a look-up and its tables; `None` if it grows too large.
fn write(
    stage: Stage,
    room: Room,
    structure: String,
    exits: &[Entry],
    mut tables: Tables,
    ops: impl FnOnce(&mut Line<'_>) -> Option<Value>,
) -> Option<(Shape, Tables)> {
    let mut line = Line::new(&mut tables);
    let result = ops(&mut line)?;
    let (ops, result) = line.finish(result);
    let step = LookupStep { stage, structure, ops, result, exits: Vec::new(), modelled: 0 };
    if tables.bytes() > room.table_bytes || step.ops.len() > LOOKUP_OPS_MAX || step.pressure() > PRESSURE_MAX
    {
        return None;
    }
    let modelled = cost::line(&step.ops, tables.sizes(), result);
    let LookupStep { ops, structure, .. } = step;
    Some((Shape::Lookup { ops, result, structure, exits: exits.to_vec(), modelled }, tables))
}
