//! `verify`: every level and the emitted program decide packets as the rules do, shown on packets made for the purpose.
//!
//! Packets come from [`Witnesses`]: for each entry of the classifier, at the edges of its intervals and just beyond; cut,
//! tagged, fragmented and bent in every way there is; and mixed ones; and where the plan's tables are found to decide
//! otherwise. Each goes through the reference evaluator, the classifier, the decision, the plan and, on a thread of its
//! own, the program under rbpf; the first packet on which two of them differ ends the run. Equal seeds give equal runs.

use std::collections::BTreeMap;

use cranelift_entity::EntitySet;
use polc_backend_ebpf::budget::Budget;
use polc_backend_ebpf::emit::Told;
use polc_backend_ebpf::object::Object;
use polc_backend_ebpf::vm::VmError;
use polc_ir::at_once::both;
use polc_ir::classifier::Fields;
use polc_ir::diag::{Code, Diagnostic, Severity};
use polc_ir::entities::Entry;
use polc_ir::env::{Env, Input, Place};
use polc_ir::outcome::{Outcome, Verdict};
use polc_ir::plan::Plan;
use polc_ir::ruleset::Ruleset;
use polc_ir::state::State;

use crate::build;
use crate::reach::Reach;
use crate::runner::{Level, Program, left_marked, run_by};
use crate::select::Devices;
use crate::session::Session;
use crate::witness::{Aimed, Effort, First, FirstOfList, Witnesses};
use crate::{Compiled, compile};

/// Code of a program that the check VM can't run.
pub const NOT_RUN: Code = Code(531);

/// Code of a table that is not what its set's elements are.
pub const WRONG_TABLE: Code = Code(532);

/// Bound on packets times entries, since the reference levels look at entries one by one.
const WORK_MAX: usize = 400_000_000;

/// Of that bound, one part in so many is for packets aimed at rules: they get deep into the rules, and take longest.
const AIMED_PART: usize = 4;

/// Bound on the stages that packets at a place pass together: in rules that write marks one after another each packet
/// passes as many as there are rules, at every level.
const STEPS_MAX: usize = 2_000_000;

/// Bound on the rules that packets at a place are tried against, beside the first of them: chains that are jumped to
/// often may take a packet through millions. One that matches weighs [`MATCHED`] as much, for every level counts it.
const TRIED_MAX: u64 = 1 << 33;
const MATCHED: u64 = 128;

/// Packets that go through levels and program at once.
const TOGETHER: usize = 256;

/// Packets of each kind at each place however many entries there are, and stages on the way.
const PACKETS_MIN: usize = 1_000;

/// What one level made of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// A verdict, who gave it, and the mark (which the program's return does not tell).
    Outcome(Outcome),
    /// What a program tells.
    Told(Told),
    /// Something went wrong.
    Wrong(String),
}

/// A packet on which levels differ.
#[derive(Clone, Debug)]
pub struct Disagreement {
    /// The packet.
    pub input: Input,
    /// What each level said, the reference first.
    pub levels: Vec<(Level, Said)>,
}

/// What verifying one place gave.
#[derive(Debug)]
pub struct Verified {
    /// The place.
    pub place: Place,
    /// How many packets went through all levels.
    pub packets: usize,
    /// How many of them got each verdict.
    pub verdicts: BTreeMap<&'static str, usize>,
    /// Entries of the classifier.
    pub entries: usize,
    /// How many of them no packet took though none is proven to be unreachable: no packet was found, or the search was
    /// given up.
    pub not_taken: usize,
    /// The verifier's budget of each program; empty if nothing was emitted.
    pub budgets: Vec<Budget>,
    /// What compiling found.
    pub diagnostics: Vec<Diagnostic>,
    /// How far packets get in the rules.
    pub reach: Reach,
    /// What kept the program from being emitted; then the levels above it were verified alone.
    pub not_emitted: Vec<Diagnostic>,
    /// The first packet on which levels differ, if any.
    pub disagreement: Option<Disagreement>,
}

/// Verifies one place. `progress` is told the packets done and all packets.
pub fn verify(
    session: &Session,
    place: &Place,
    env: &Env,
    devices: &Devices,
    seed: u64,
    random: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Verified {
    let ruleset = &session.ruleset;
    let compiled = compile(ruleset, place, env, devices);
    let mut verified = Verified {
        place: place.clone(),
        packets: 0,
        verdicts: BTreeMap::new(),
        entries: compiled.classifier.entries.len(),
        not_taken: 0,
        budgets: Vec::new(),
        diagnostics: compiled.diagnostics.clone(),
        reach: compiled.reach.clone(),
        not_emitted: Vec::new(),
        disagreement: None,
    };
    let mut program = None;
    match build::object(session, &compiled) {
        Err(findings) => verified.not_emitted = findings,
        Ok((object, budgets)) => {
            verified.budgets = budgets;
            let attach = place.attach.expect("programs are made for an attach point");
            match Program::new(&compiled.plan, attach, &object) {
                Ok(made) => program = Some(made),
                Err(error) => {
                    let message = format!("the program can't be checked: {error}");
                    verified.not_emitted.push(Diagnostic::error(NOT_RUN, message, None));
                }
            }
        }
    }
    // Levels from the plan on look up the same tables, and packets are not made for each of a million elements.
    for (&set, table) in &compiled.plan.set_tables {
        let data = &ruleset.sets[set];
        if let Some(pattern) = table.difference(data, ruleset.family) {
            let message =
                format!("the table of set `{}` is not what its elements are: {pattern:?}", data.name);
            verified.not_emitted.push(Diagnostic::error(WRONG_TABLE, message, Some(data.span)));
        }
    }
    let entries = verified.entries.max(1);
    let mut witnesses =
        Witnesses::of_plan(&compiled.classifier, &compiled.plan, &devices.declared, Effort::THOROUGH, seed);
    let most = (WORK_MAX / entries).max(PACKETS_MIN);
    let aimed = Aimed::new(&session.ruleset, &compiled.classifier, env, &devices.declared, seed);
    let looked_at = entries.max(ruleset.rules.len());
    let own = aimed.most().min((WORK_MAX / AIMED_PART / looked_at).max(PACKETS_MIN));
    let made = (witnesses.enough() + random).min(most);
    let total = own + made;
    let mut levels = Levels::new(&session.ruleset, &compiled, env, devices, program, seed);
    let mut show = |input: Input, (reference, differing): Judged| {
        verified.packets += 1;
        *verified.verdicts.entry(reference.ending.verdict.word()).or_default() += 1;
        if verified.packets.is_multiple_of(256) {
            progress(verified.packets.min(total), total);
        }
        verified.disagreement = differing.map(|levels| Disagreement { input, levels });
        verified.disagreement.is_none()
    };
    let aimed = Aimed::new(&session.ruleset, &compiled.classifier, env, &devices.declared, seed).take(total);
    let mut agree = true;
    let kinds: [(Box<dyn Iterator<Item = Input> + '_>, usize); 2] =
        [(Box::new(aimed), STEPS_MAX / AIMED_PART), (Box::new(witnesses.by_ref().take(total)), STEPS_MAX)];
    for (mut packets, steps_max) in kinds {
        let mut shown = 0;
        while agree && levels.above.has_time() && (shown < PACKETS_MIN || levels.above.steps < steps_max) {
            let mut inputs: Vec<Input> = packets.by_ref().take(levels.above.together()).collect();
            if inputs.is_empty() {
                break;
            }
            shown += inputs.len();
            let judged = levels.run_all(&mut inputs, &Level::ABOVE);
            agree = inputs.into_iter().zip(judged).all(|(input, judged)| show(input, judged));
        }
    }
    // Then those that no packet came to while packets for others were made, unless none can.
    let mut untaken = witnesses.untaken(|entry| levels.above.taken.contains(entry), seed);
    for entry in compiled.classifier.entries.keys() {
        let open = !levels.above.taken.contains(entry) && !untaken.is_unreachable(entry);
        if agree && open && levels.above.has_time() {
            let mut input = untaken.towards(entry);
            let judged = levels.run(&mut input, &Level::ABOVE);
            agree = show(input, judged);
        }
    }
    // For what is left all ways are gone, those to what lies first before others.
    for &entry in compiled.classifier.stages.values().rev().flat_map(|stage| &stage.entries) {
        if agree && levels.above.has_time() && !levels.above.taken.contains(entry) {
            untaken.seek(entry, &mut |mut input| {
                let judged = levels.run(&mut input, &Level::ABOVE);
                agree = show(input, judged);
                !agree || !levels.above.has_time() || levels.above.taken.contains(entry)
            });
        }
    }
    let open = |entry: &Entry| !levels.above.taken.contains(*entry) && !untaken.is_unreachable(*entry);
    verified.not_taken = compiled.classifier.entries.keys().filter(open).count();
    verified
}

/// Packets to hold a program against the rules on: `count` where its tables decide otherwise than their stages or have
/// boundaries.
pub fn directed_packets(compiled: &Compiled, devices: &Devices, count: usize) -> Vec<Input> {
    let (classifier, declared) = (&compiled.classifier, &devices.declared);
    let all = Witnesses::of_plan(classifier, &compiled.plan, declared, Effort::QUICK, SPOT_SEED);
    all.take(count).collect()
}

/// The same, spread over all entries.
pub fn spread_packets(compiled: &Compiled, devices: &Devices, count: usize) -> Vec<Input> {
    // The first of a sequence are for entries from all parts.
    Witnesses::new(&compiled.classifier, &devices.declared, SPOT_SEED + 1).take(count).collect()
}

/// Seed of what is random about such packets and what runs on them.
const SPOT_SEED: u64 = 1;

/// Holds a program against the rules on packets: one on which they differ, else what `each` gives for the packets, and
/// the program to run others like them. This is done before a program is loaded: the levels between cost as much again,
/// and [`verify`] is for them. Two threads take half of the packets each.
///
/// # Errors
/// The check VM does not run the program.
pub fn spot_check<T: Send>(
    session: &Session,
    compiled: &Compiled,
    object: &Object,
    env: &Env,
    devices: &Devices,
    packets: Vec<Input>,
    each: &(dyn Fn(&mut Program, &Input) -> Option<T> + Sync),
) -> Result<Result<Vec<T>, Disagreement>, VmError> {
    let attach = compiled.plan.place.attach.expect("programs are made for an attach point");
    let hold = |packets: Vec<Input>| {
        let program = Program::new(&compiled.plan, attach, object)?;
        let mut levels = Levels::new(&session.ruleset, compiled, env, devices, Some(program), SPOT_SEED);
        // Beyond a bound the rules could tell more than the program does.
        let which: &[Level] =
            if levels.above.bounded { &[Level::Ruleset, Level::Classifier] } else { &[Level::Ruleset] };
        let mut found = Vec::new();
        for mut input in packets {
            if let (_, Some(levels)) = levels.run(&mut input, which) {
                return Ok(Err(Disagreement { input, levels }));
            }
            found.extend(each(levels.program.as_mut().expect("it was made above"), &input));
        }
        Ok(Ok(found))
    };
    let mut first = packets;
    let second = first.split_off(first.len() / 2);
    let (first, second) = both(|| hold(first), || hold(second));
    let (first, second) = (first?, second?);
    Ok(first.and_then(|mut found| {
        found.extend(second?);
        Ok(found)
    }))
}

/// The levels of a compiled rule set, to run packets through. State (counters of `nth`, random numbers) lives as long as
/// the rule set: each level has its own.
struct Levels<'a> {
    above: Above<'a>,
    program: Option<Program>,
}

/// Those above the object.
struct Above<'a> {
    ruleset: &'a Ruleset,
    compiled: &'a Compiled,
    env: &'a Env,
    devices: &'a Devices,
    states: [State; Level::ABOVE.len()],
    /// Whether rules were left out for their number.
    bounded: bool,
    first: First<'a>,
    first_of_list: FirstOfList<'a>,
    /// Entries that packets took.
    taken: EntitySet<Entry>,
    /// Stages that packets passed.
    steps: usize,
    /// Packets that the rules themselves decided, and rules that these matched.
    decided: u64,
    matched: u64,
}

/// What rules make of a packet, and what each level said if they differ.
type Judged = (Outcome, Option<Vec<(Level, Said)>>);

/// What a program tells of a packet, and the mark it left with.
type Run = (Result<Told, String>, u32);

impl<'a> Levels<'a> {
    fn new(
        ruleset: &'a Ruleset,
        compiled: &'a Compiled,
        env: &'a Env,
        devices: &'a Devices,
        mut program: Option<Program>,
        seed: u64,
    ) -> Levels<'a> {
        if let Some(program) = &mut program {
            program.set_random_seed(seed);
        }
        let above = Above {
            ruleset,
            compiled,
            env,
            devices,
            states: Level::ABOVE.map(|_| State::new(seed)),
            bounded: compiled.diagnostics.iter().any(|found| found.severity != Severity::Note),
            first: First::new(&compiled.classifier),
            first_of_list: FirstOfList::new(&compiled.classifier, &compiled.decision),
            taken: EntitySet::new(),
            steps: 0,
            decided: 0,
            matched: 0,
        };
        Levels { above, program }
    }

    /// Runs a packet through the first of the levels above the object, `which`, and the program.
    fn run(&mut self, input: &mut Input, which: &[Level]) -> Judged {
        self.above.place(input);
        let outcomes = self.above.outcomes(input, which);
        let ran = ran(&mut self.program, &self.above.compiled.plan, input);
        self.above.judge(input, which, outcomes, ran)
    }

    /// The same for packets one after another: the levels take one thread, the program another.
    fn run_all(&mut self, inputs: &mut [Input], which: &[Level]) -> Vec<Judged> {
        let Levels { above, program } = self;
        inputs.iter_mut().for_each(|input| above.place(input));
        let (plan, inputs) = (&above.compiled.plan, &*inputs);
        let (runs, outcomes): (Vec<Option<Run>>, Vec<Vec<Outcome>>) = both(
            || inputs.iter().map(|input| ran(program, plan, input)).collect(),
            || inputs.iter().map(|input| above.outcomes(input, which)).collect(),
        );
        let both = outcomes.into_iter().zip(runs);
        inputs
            .iter()
            .zip(both)
            .map(|(input, (outcomes, ran))| above.judge(input, which, outcomes, ran))
            .collect()
    }
}

fn ran(program: &mut Option<Program>, plan: &Plan, input: &Input) -> Option<Run> {
    program.as_mut().map(|program| (program.tell(plan, input), program.mark()))
}

impl Above<'_> {
    /// Where the program sits, every packet comes or leaves by the one device.
    fn place(&self, input: &mut Input) {
        input.in_device = self.devices.fixed_in.or(input.in_device);
        input.out_device = self.devices.fixed_out.or(input.out_device);
    }

    /// What each level makes of a packet.
    fn outcomes(&mut self, input: &Input, which: &[Level]) -> Vec<Outcome> {
        let (taken, steps) = (&mut self.taken, &mut self.steps);
        let mut decide = |stage, fields: &Fields<'_>| {
            let entry = self.first.of(stage, fields);
            taken.insert(entry);
            *steps += 1;
            entry
        };
        let list =
            |list, entries: &[Entry], fields: &Fields<'_>| self.first_of_list.of(list, entries, fields);
        let levels = which.iter().zip(&mut self.states);
        let outcomes: Vec<Outcome> = levels
            .map(|(&level, state)| {
                run_by(level, self.ruleset, self.compiled, self.env, input, state, &mut decide, &list)
            })
            .collect();
        self.decided += 1;
        self.matched += outcomes.first().map_or(0, |outcome| outcome.counted.len() as u64);
        outcomes
    }

    /// Rules that packets were tried against, with what matches weigh.
    fn tried(&self) -> u64 {
        self.states[0].tried + MATCHED * self.matched
    }

    /// Whether more packets may be tried.
    fn has_time(&self) -> bool {
        self.tried() < TRIED_MAX
    }

    /// Packets to be tried at once: no more than there is time for, if they take as long as those so far.
    fn together(&self) -> usize {
        match self.tried().checked_div(self.decided) {
            None => 1,
            Some(each) => {
                (TRIED_MAX.saturating_sub(self.tried()) / each.max(1)).clamp(1, TOGETHER as u64) as usize
            }
        }
    }

    /// Holds what levels and program made of a packet against each other.
    fn judge(&self, input: &Input, which: &[Level], outcomes: Vec<Outcome>, ran: Option<Run>) -> Judged {
        // Beyond a bound the rules could tell, and the object leaves it to the kernel.
        let reference = match outcomes.get(1) {
            Some(classified) if self.bounded && classified.ending.verdict == Verdict::Defer => classified,
            _ => &outcomes[0],
        };
        let plan = &self.compiled.plan;
        let attach = plan.place.attach;
        let said = ran.map(|(told, mark)| match told {
            Ok(told) => {
                match attach.map_or(Ok(()), |attach| left_marked(plan, attach, input, reference, mark)) {
                    Ok(()) => Said::Told(told),
                    Err(error) => Said::Wrong(error),
                }
            }
            Err(error) => Said::Wrong(error),
        });
        let agree = outcomes[1..].iter().all(|outcome| outcome == reference)
            && match &said {
                None => true,
                Some(Said::Told(told)) => attach.is_some_and(|attach| told.is(reference, plan, attach)),
                Some(_) => false,
            };
        let reference = reference.clone();
        if agree {
            return (reference, None);
        }
        let said = said.map(|said| (Level::Rbpf, said));
        let levels = which.iter().copied().zip(outcomes.into_iter().map(Said::Outcome)).chain(said);
        (reference, Some(levels.collect()))
    }
}
