//! What deciding is expected to take, stage by stage.

use std::collections::BTreeSet;

use cranelift_entity::SecondaryMap;
use polc_ir::entities::{Data, Stage, Step};
use polc_ir::field::Field;
use polc_ir::plan::{LinearEntry, Op, Plan, PlanExit, StepData, Target};

use super::cost;

/// What the cost model expects of a stage that code decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageCost {
    /// The stage.
    pub stage: Stage,
    /// What decides it.
    pub structure: String,
    /// Time a packet, in tenths of a nanosecond.
    pub tenths_ns: u32,
    /// Bytes of the tables it reads; tables that stages share count for each.
    pub table_bytes: usize,
}

/// What is expected of every stage that code decides, the first that packets come to first.
pub fn stage_costs(plan: &Plan) -> Vec<StageCost> {
    plan.steps.values().rev().map(|step| stage_cost(plan, step)).collect()
}

fn stage_cost(plan: &Plan, step: &StepData) -> StageCost {
    match step {
        StepData::Linear(step) => StageCost {
            stage: step.stage,
            structure: format!("{} entries compared", step.entries.len()),
            tenths_ns: cost::linear(step.entries.iter().map(|entry| entry.tests.as_slice())),
            table_bytes: 0,
        },
        StepData::Lookup(step) => {
            let read = |op: &Op| if let Op::Read(table, _) = op { Some(*table) } else { None };
            let tables: BTreeSet<Data> = step.ops.values().filter_map(read).collect();
            StageCost {
                stage: step.stage,
                structure: step.structure.clone(),
                tenths_ns: step.modelled,
                table_bytes: tables.iter().map(|&table| plan.tables[table].bytes.len()).sum(),
            }
        }
    }
}

/// What is expected of the packet that takes longest, as far as code decides it and but for fragments and headers that
/// are cut short, in tenths of a nanosecond.
pub fn longest_tenths_ns(plan: &Plan) -> u32 {
    let word = |field: Field| plan.key.iter().find(|slot| slot.field == field).map(|slot| slot.word);
    let (fragment, length) = (word(Field::Fragment), word(Field::L4Len));
    let rare = |entry: &LinearEntry| {
        let mut tests = entry.tests.iter().flat_map(|test| &test.any).flatten();
        tests.any(|test| {
            Some(test.word) == fragment && test.lo > 0
                || Some(test.word) == length && test.hi < u16::MAX.into()
        })
    };
    // Steps lead to smaller numbers.
    let mut from: SecondaryMap<Step, u32> = SecondaryMap::new();
    for (step, data) in plan.steps.iter() {
        let after = |target: &Target| if let Target::Step(next) = target { from[*next] } else { 0 };
        let ahead = |exit: &PlanExit| match exit {
            PlanExit::End(_) => 0,
            PlanExit::Then { next, .. } => after(next),
            PlanExit::Test { yes, no, .. } => after(yes).max(after(no)),
        };
        let most = match data {
            StepData::Linear(step) => {
                step.entries.iter().filter(|entry| !rare(entry)).map(|entry| ahead(&entry.exit)).max()
            }
            StepData::Lookup(step) => step.exits.iter().map(ahead).max(),
        };
        from[step] = most.unwrap_or(0) + stage_cost(plan, data).tenths_ns;
    }
    if let Target::Step(root) = plan.root { from[root] } else { 0 }
}
