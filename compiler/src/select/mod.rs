//! `select`: fields get words of the key, devices get classes, and each stage becomes code, tables or both.
//!
//! A structure takes a stage or hands it back. Comparing (`linear`) takes short stages, matrices of classes
//! (`matrix`) all whose tables stay small, grouped classes (`groups`) any number of entries that ask for few different
//! things beside two columns; of two that take a stage the cost model (`cost`) chooses. What none of them takes is cut into
//! parts that they take (`parts`), as far as a program has room. The walk table takes anything, and everything behind it.
use cranelift_entity::{PrimaryMap, SecondaryMap};
use polc_ir::classifier::{Classifier, EntryData, Exit};
use polc_ir::cube::Test;
use polc_ir::decision::Decision;
use polc_ir::derived::DerivedData;
use polc_ir::entities::{Entry, Stage, Step};
use polc_ir::env::{Attach, Device};
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::Family;
use polc_ir::interval::{Interval, max_value};
use polc_ir::limits::KEY_WORDS_MAX;
use polc_ir::outcome::{Count, Ending, FrameKind, Verdict};
use polc_ir::packet::frame_ending;
use polc_ir::plan::{
    DeviceClasses, KeySlot, LinearEntry, LinearStep, LookupStep, Plan, PlanExit, StepData, Target, Trace,
    WalkTable, WordTest, WordWrite,
};
use polc_ir::ruleset::Write;

use self::classes::FastMap;
pub use self::explain::{StageCost, longest_tenths_ns, stage_costs};
use self::line::Tables;
use self::parts::{Cut, Parts};
use self::room::Room;
use self::shape::Shape;
use self::words::word_ranges;

mod cells;
mod classes;
mod column;
mod cost;
mod cuckoo;
mod explain;
mod groups;
mod line;
mod matrix;
mod members;
mod parts;
mod problem;
mod room;
mod rows;
mod search;
mod shape;
mod walk;
mod wide;
mod words;

/// The devices a program is made for.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    /// Devices by number.
    pub declared: Vec<Device>,
    /// The program sits where every packet comes in by this device.
    pub fixed_in: Option<DeviceName>,
    /// The program sits where every packet leaves by this device.
    pub fixed_out: Option<DeviceName>,
}

/// How stages may be decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefer {
    /// What the cost model likes best.
    #[default]
    Cheapest,
    /// Code that compares, where it is small.
    Linear,
    /// Matrices of classes, where they are small.
    Matrix,
    /// Grouped classes.
    Groups,
    /// Parts of stages, as if no structure took a whole one.
    Parts,
    /// The walk table.
    Walk,
}

/// Instructions of a program that stages decided by code may take, of the 32,767 that it may have: the rest is for
/// headers, searches of the packet and the walk.
const CODE_INSNS_MAX: usize = 28_000;

/// Instructions that an exit becomes which code takes, for it goes on in code: finding it and going, counting, a write.
const INSNS_PER_EXIT: usize = 6;
const INSNS_PER_COUNT: usize = 18;
const INSNS_PER_WRITE: usize = 4;

/// Fields that are 0 or 1 and have a word each, rather than a bit of one that takes two more operations to read.
const FLAGS_APART_MAX: usize = 16;

/// Where the key ends; fields behind it overlap. No program has room for so many words, which emission says.
const WORDS_MAX: u8 = 128;

const _: () = assert!(WORDS_MAX as usize > KEY_WORDS_MAX);

/// What a program needs of a packet to look its connection up.
pub const LOOKED_UP_BY: [Field; 7] = [
    Field::Fragment,
    Field::SrcAddr,
    Field::DstAddr,
    Field::Proto,
    Field::L4Len,
    Field::SrcPort,
    Field::DstPort,
];

/// What every stage is decided by.
#[derive(Debug)]
pub struct Structures {
    keys: Keys,
    tables: Tables,
    shapes: SecondaryMap<Stage, Option<Shape>>,
    /// The stages that the walk table decides.
    pub walked: SecondaryMap<Stage, bool>,
    /// Where stages would have to be cut to be decided by code.
    cuts: Vec<Cut>,
    /// Where walked stages could be cut so that all but the last part is decided by code.
    begun: Vec<Cut>,
}

impl Structures {
    /// How many tests of words the walk table makes of a test.
    pub fn tests_of(&self, classifier: &Classifier, test: &Test) -> usize {
        Selector { classifier, keys: &self.keys }.word_tests(test).iter().map(Vec::len).sum()
    }
}

/// Finds a structure for every stage, by preference. Stages that need it are cut.
pub fn structure(classifier: Classifier, devices: &Devices, prefer: Prefer) -> (Classifier, Structures) {
    let structures = structure_whole(&classifier, devices, prefer);
    if structures.cuts.is_empty() {
        return (classifier, structures);
    }
    let classifier = parts::cut(classifier, &structures.cuts);
    // What was taken as a part is taken.
    let structures = structure_whole(&classifier, devices, Prefer::Cheapest);
    (classifier, structures)
}

/// Cuts a walked stage so that code decides its first entries, as many as there is room for: these take no turns of the
/// walk. `None` if it can't be cut so.
pub fn structure_begun(
    classifier: &Classifier,
    structures: &Structures,
    stage: Stage,
    devices: &Devices,
) -> Option<(Classifier, Structures)> {
    let cut = structures.begun.iter().find(|cut| cut.stage == stage)?;
    let classifier = parts::cut(classifier.clone(), std::slice::from_ref(cut));
    let structures = structure_whole(&classifier, devices, Prefer::Cheapest);
    Some((classifier, structures))
}

/// Finds a structure for every stage as it is.
fn structure_whole(classifier: &Classifier, devices: &Devices, prefer: Prefer) -> Structures {
    let keys = Keys::new(classifier, devices);
    let selector = Selector { classifier, keys: &keys };
    let busy = busy(classifier);
    let mut ahead = selector.ahead(&busy, prefer);
    let mut tables = Tables::new();
    let mut shapes: SecondaryMap<Stage, Option<Shape>> = SecondaryMap::new();
    // Where packets may come from: the root comes first, stages lead to smaller numbers.
    let (mut by_code, mut walked) = (SecondaryMap::new(), SecondaryMap::new());
    by_code[classifier.root] = true;
    // Instructions of the exits of look-ups that lead to a stage: if it is decided by code, they are code.
    let mut led: SecondaryMap<Stage, usize> = SecondaryMap::new();
    let (mut insns, mut cuts, mut begun) = (0, Vec::new(), Vec::new());
    for stage in classifier.stages.keys().rev() {
        let entries = &classifier.stages[stage].entries;
        let mut is_code = false;
        if by_code[stage] {
            let left = CODE_INSNS_MAX.saturating_sub(insns + led[stage]);
            let whole = (left > 0 && (prefer != Prefer::Parts || entries.len() < 3)).then(|| {
                let lookup = || {
                    let ahead = ahead.iter_mut().find(|(known, _)| *known == stage);
                    ahead.map_or_else(
                        || selector.lookup(entries, busy[stage], prefer, Room::WHOLE),
                        |(_, lookup)| lookup.take(),
                    )
                };
                selector.shape(entries, busy[stage], prefer, lookup, &mut tables)
            });
            let parts = match whole.flatten() {
                Some(shape) => Some(vec![(entries.len(), shape)]),
                None if matches!(prefer, Prefer::Cheapest | Prefer::Parts) && entries.len() > 2 => {
                    let Parts { parts, is_whole } = selector.parts(entries, busy[stage], left);
                    if !is_whole && !parts.is_empty() {
                        let ends = parts.iter().map(|&(end, _)| end).chain([entries.len()]);
                        begun.push(Cut { stage, ends: ends.collect() });
                    }
                    is_whole.then_some(parts)
                }
                None => None,
            };
            let taken = |parts: &[(usize, Shape)]| {
                parts.iter().map(|(_, shape)| shape.insns(classifier)).sum::<usize>()
            };
            match parts.filter(|parts| taken(parts) <= left) {
                Some(mut parts) => {
                    insns += taken(&parts) + led[stage];
                    for (_, shape) in &parts {
                        if let Shape::Lookup { exits, .. } = shape {
                            for entry in exits.iter().map(|&entry| &classifier.entries[entry]) {
                                entry.exit.successors().for_each(|next| led[next] += exit_insns(entry));
                            }
                        }
                    }
                    if parts.len() == 1 {
                        shapes[stage] = parts.pop().map(|(_, shape)| shape);
                    } else {
                        cuts.push(Cut { stage, ends: parts.iter().map(|&(end, _)| end).collect() });
                    }
                    is_code = true;
                }
                None => walked[stage] = true,
            }
        }
        for &entry in entries {
            for next in classifier.entries[entry].exit.successors() {
                by_code[next] |= is_code;
                walked[next] |= walked[stage];
            }
        }
    }
    Structures { keys, tables, shapes, walked, cuts, begun }
}

/// Instructions that an entry's exit becomes.
fn exit_insns(entry: &EntryData) -> usize {
    let ends = matches!(entry.exit, Exit::End(_) | Exit::EndIfAbsent(_));
    let counts = usize::from(!ends && !entry.counts.is_empty());
    let writes = if let Exit::Then { writes, .. } = &entry.exit { writes.len() } else { 0 };
    INSNS_PER_EXIT + INSNS_PER_COUNT * counts + INSNS_PER_WRITE * writes
}

/// The stages that more than rare packets come to.
pub(crate) fn busy(classifier: &Classifier) -> SecondaryMap<Stage, bool> {
    let mut busy: SecondaryMap<Stage, bool> = SecondaryMap::new();
    busy[classifier.root] = true;
    for stage in classifier.stages.keys().rev().filter(|&stage| stage <= classifier.root) {
        if !busy[stage] {
            continue;
        }
        for &entry in &classifier.stages[stage].entries {
            let entry = &classifier.entries[entry];
            if entry.exit.successors().next().is_some() && !entry.cube.tests().iter().any(is_rare) {
                entry.exit.successors().for_each(|next| busy[next] = true);
            }
        }
    }
    busy
}

/// Whether a test holds for rare packets alone: fragments, and those whose transport header is cut short.
pub(crate) fn is_rare(test: &Test) -> bool {
    match test.field {
        Field::Fragment | Field::FragOffset => !test.holds(0),
        Field::L4Len => !test.holds(u16::MAX.into()),
        _ => false,
    }
}

/// Makes a plan of the structures. `decision` is what the walk table is made of.
pub fn select(classifier: &Classifier, decision: &Decision, structures: Structures) -> Plan {
    let Structures { keys, tables, mut shapes, walked, .. } = structures;
    let selector = Selector { classifier, keys: &keys };
    let counting = Counting::new(classifier, &shapes);
    let (mut walk, walk_roots) = selector.walk(&counting, decision, &walked);
    let own_exits = walk.exits.len();
    let mut steps: PrimaryMap<Step, StepData> = PrimaryMap::new();
    let mut targets: SecondaryMap<Stage, Option<Target>> = SecondaryMap::new();
    for stage in classifier.stages.keys() {
        targets[stage] = match shapes[stage].take() {
            Some(shape) => {
                let target = |next: Stage| targets[next].expect("what code leads to comes before it");
                Some(Target::Step(steps.push(selector.step(&counting, stage, shape, target, &mut walk))))
            }
            None => walk_roots[stage].map(Target::Walk),
        };
    }
    // Exits of steps that became the table's are visited before all else.
    walk.visits_max += u32::from(walk.exits.len() > own_exits);
    Plan {
        family: classifier.family,
        place: classifier.place.clone(),
        root: targets[classifier.root].expect("the root is decided"),
        members: members::steps(classifier, |field| selector.slot(field)),
        set_tables: members::tables(classifier),
        traces: counting.traces,
        key: keys.key,
        devices: keys.devices,
        steps,
        tables: tables.finish(),
        walk,
        derived: classifier.derived.clone(),
        sets: classifier.sets.clone(),
        effect_tests: classifier.effect_tests.iter().map(|(_, test)| test.kind).collect(),
    }
}

/// Where fields are in the key, and devices as classes.
#[derive(Debug)]
struct Keys {
    key: Vec<KeySlot>,
    devices: DeviceClasses,
    /// For each class the value (a device's name) that stands for it, to evaluate tests on.
    class_values: Vec<u128>,
}

/// What packets are counted for.
struct Counting<'a> {
    traces: Vec<Trace>,
    slots: FastMap<Counted<'a>, u32>,
}

/// What a packet that takes an entry is counted in: its ending, what it is counted for, and whether it ends so only without
/// a connection. In the order of [`Trace`]s.
type Counted<'a> = (Option<Ending>, &'a [Count], bool);

struct Selector<'a> {
    classifier: &'a Classifier,
    keys: &'a Keys,
}

impl<'a> Counting<'a> {
    /// Slots in the order of the traces, but for the ends that a look-up gives: those are together and in its order, so
    /// that the number it finds is the slot but for a constant.
    fn new(classifier: &'a Classifier, shapes: &SecondaryMap<Stage, Option<Shape>>) -> Counting<'a> {
        let mut lookups: Vec<&[Entry]> = shapes
            .values()
            .filter_map(|shape| match shape {
                Some(Shape::Lookup { exits, .. }) => Some(exits.as_slice()),
                _ => None,
            })
            .collect();
        lookups.sort_by_key(|exits| std::cmp::Reverse(exits.len()));
        let exits = lookups.iter().map(|exits| exits.len()).sum();
        let slots = FastMap::with_capacity_and_hasher(exits, Default::default());
        let mut counting = Counting { traces: Vec::with_capacity(exits), slots };
        for exits in lookups {
            let ends = exits.iter().map_while(|&exit| {
                counted(&classifier.entries[exit])
                    .filter(|(ending, _, if_absent)| ending.is_some() && !if_absent)
            });
            let ends: Vec<Counted<'_>> = ends.collect();
            if !ends.iter().any(|end| counting.slots.contains_key(end)) {
                ends.into_iter().for_each(|end| counting.add(end));
            }
        }
        let frames = [
            FrameKind::Runt,
            FrameKind::NotIp,
            FrameKind::OtherFamily,
            FrameKind::Vlan,
            FrameKind::Malformed,
            FrameKind::UnknownDevice,
        ];
        let many_headers = (classifier.family == Family::V6).then_some(FrameKind::ManyHeaders);
        let frames = frames.into_iter().chain(many_headers);
        let frames =
            frames.map(|kind| (Some(frame_ending(kind, classifier.place.mode)), [].as_slice(), false));
        let mut others: Vec<Counted<'_>> =
            classifier.entries.values().filter_map(counted).chain(frames).collect();
        others.retain(|other| !counting.slots.contains_key(other));
        others.sort_unstable();
        others.into_iter().for_each(|other| counting.add(other));
        counting
    }

    /// Gives what has none a slot; what ends only without a connection is followed by how it ends otherwise.
    fn add(&mut self, counted: Counted<'a>) {
        let (ending, counts, if_absent) = counted;
        let std::collections::hash_map::Entry::Vacant(slot) = self.slots.entry(counted) else { return };
        slot.insert(self.traces.len() as u32);
        self.traces.push(Trace { ending, counts: counts.to_vec(), if_absent });
        self.traces.extend(ending.filter(|_| if_absent).map(|ending| Trace {
            ending: Some(Ending { verdict: Verdict::Defer, ..ending }),
            counts: counts.to_vec(),
            if_absent: false,
        }));
    }
}

impl Keys {
    fn new(classifier: &Classifier, devices: &Devices) -> Keys {
        let family = classifier.family;
        let used = classifier.entries.values().flat_map(|entry| {
            let writes = match &entry.exit {
                Exit::Then { writes, .. } => writes.as_slice(),
                _ => &[],
            };
            let tested = entry.cube.tests().iter().map(|test| test.field);
            tested.chain(writes.iter().map(|write| write.field))
        });
        let used: FastMap<Field, ()> = used.map(|field| (field, ())).collect();
        let mut fields: Vec<Field> = used.into_keys().collect();
        let looks_up = |entry: &EntryData| matches!(entry.exit, Exit::EndIfAbsent(_));
        if classifier.entries.values().any(looks_up) {
            fields.extend(LOOKED_UP_BY);
        }
        fields.extend(members::fields(classifier));
        fields.sort_unstable();
        fields.dedup();
        let is_flag = |field: &Field| match field {
            Field::Derived(derived) => matches!(
                classifier.derived[*derived],
                DerivedData::Member { .. } | DerivedData::AddressType { .. }
            ),
            _ => false,
        };
        let mut flags: Vec<Field> = fields.iter().copied().filter(is_flag).collect();
        if flags.len() <= FLAGS_APART_MAX {
            flags.clear();
        }
        let mut key = Vec::new();
        let mut word = 0;
        for field in fields.into_iter().filter(|field| flags.binary_search(field).is_err()) {
            let words = match field {
                Field::InDevice | Field::OutDevice => 1,
                field => field.bits(family).div_ceil(32),
            };
            key.push(KeySlot { field, word, words, flag: None });
            word = WORDS_MAX.min(word + words);
        }
        for flags in flags.chunks(32) {
            let flag = |(bit, &field)| KeySlot { field, word, words: 1, flag: Some(bit) };
            key.extend((0..).zip(flags).map(flag));
            word = WORDS_MAX.min(word + 1);
        }
        key.sort_unstable_by_key(|slot| slot.field);
        let mut keys = Keys { key, devices: DeviceClasses::default(), class_values: Vec::new() };
        keys.classes(classifier, devices);
        keys
    }

    /// Groups devices that no test tells apart, unless sets do.
    fn classes(&mut self, classifier: &Classifier, devices: &Devices) {
        let tests: Vec<&Test> = {
            let mut tests: Vec<&Test> = classifier
                .entries
                .values()
                .flat_map(|entry| entry.cube.tests())
                .filter(|test| matches!(test.field, Field::InDevice | Field::OutDevice))
                .collect();
            tests.sort_unstable();
            tests.dedup();
            tests
        };
        let apart = members::ask_for_devices(classifier);
        let signature = |value: u128| -> (Vec<bool>, Option<u128>) {
            (tests.iter().map(|test| test.holds(value)).collect(), apart.then_some(value))
        };
        // Class 0 is nobody, class 1 is no device.
        let mut signatures = vec![(Vec::new(), None), signature(0)];
        self.class_values = vec![0, 0];
        self.devices.names = vec![Vec::new(), Vec::new()];
        let mut class = |value: u128, values: &mut Vec<u128>, names: &mut Vec<Vec<String>>| -> u16 {
            let wanted = signature(value);
            let known = signatures.iter().skip(1).position(|have| *have == wanted);
            let index = match known {
                Some(index) => index + 1,
                None => {
                    signatures.push(wanted);
                    values.push(value);
                    names.push(Vec::new());
                    signatures.len() - 1
                }
            };
            if value != 0 {
                names[index].push(DeviceName::from_value(value).to_string());
            }
            index as u16
        };
        let (values, names) = (&mut self.class_values, &mut self.devices.names);
        let mut declared = Vec::new();
        if matches!(classifier.place.attach, Some(Attach::TcEgress | Attach::Netfilter)) {
            // A packet of this host's own has no input device, and one for this host no output device: number 0.
            declared.push((Device { ifindex: 0, name: DeviceName::default() }, 1));
        }
        for device in &devices.declared {
            declared.push((*device, class(device.name.value(), values, names)));
        }
        declared.sort_by_key(|(device, _)| device.ifindex);
        self.devices.fixed_in = devices.fixed_in.map(|name| class(name.value(), values, names));
        self.devices.fixed_out = devices.fixed_out.map(|name| class(name.value(), values, names));
        self.devices.devices = declared;
    }
}

impl Selector<'_> {
    fn slot(&self, field: Field) -> KeySlot {
        let at = self.keys.key.binary_search_by_key(&field, |slot| slot.field);
        self.keys.key[at.expect("every tested or written field has a slot")]
    }

    /// A test as alternatives of word tests; none means that it never holds.
    fn word_tests(&self, test: &Test) -> Vec<Vec<WordTest>> {
        let slot = self.slot(test.field);
        if matches!(test.field, Field::InDevice | Field::OutDevice) {
            let classes = self.device_classes(test);
            return classes
                .intervals()
                .iter()
                .map(|range| {
                    vec![WordTest {
                        word: slot.word,
                        mask: u32::MAX,
                        lo: range.lo() as u32,
                        hi: range.hi() as u32,
                    }]
                })
                .collect();
        }
        let top = max_value(slot.bits(test.field.bits(self.classifier.family))) & test.mask;
        test.values
            .intervals()
            .iter()
            .filter_map(|range| range.intersect(Interval::new(0, top)?))
            .flat_map(|range| word_ranges(slot, test.mask & max_value(slot.bits(128)), range))
            .collect()
    }

    /// A change of a field as one of its word.
    fn word_write(&self, write: &Write) -> WordWrite {
        let slot = self.slot(write.field);
        let own = |bits: u128| (bits as u32) << slot.shift() & slot.own();
        WordWrite { word: slot.word, clear: own(write.clear), xor: own(write.xor) }
    }

    fn exit(&self, counting: &Counting<'_>, entry: &EntryData, target: impl Fn(Stage) -> Target) -> PlanExit {
        let count = counted(entry).map(|counted| counting.slots[&counted]);
        match &entry.exit {
            Exit::End(_) | Exit::EndIfAbsent(_) => PlanExit::End(count.expect("an end is a trace")),
            Exit::Then { writes, stage } => PlanExit::Then {
                count,
                writes: writes.iter().map(|write| self.word_write(write)).collect(),
                next: target(*stage),
            },
            Exit::Test { test, yes, no } => {
                PlanExit::Test { count, test: *test, yes: target(*yes), no: target(*no) }
            }
        }
    }

    /// A stage's step, once the stages it leads to have theirs.
    fn step(
        &self,
        counting: &Counting<'_>,
        stage: Stage,
        shape: Shape,
        target: impl Fn(Stage) -> Target,
        walk: &mut WalkTable,
    ) -> StepData {
        let entries = &self.classifier.entries;
        match shape {
            Shape::Linear(shape) => {
                let entries = shape.into_iter().map(|(entry, tests)| LinearEntry {
                    tests,
                    exit: self.exit(counting, &entries[entry], &target),
                    rule: entries[entry].rule,
                });
                StepData::Linear(LinearStep { stage, entries: entries.collect() })
            }
            Shape::Lookup { ops, result, structure, exits, modelled } => {
                let exit = |entry: Entry| walk.by_table(self.exit(counting, &entries[entry], &target));
                let exits = exits.into_iter().map(exit).collect();
                StepData::Lookup(LookupStep { stage, structure, ops, result, exits, modelled })
            }
        }
    }
}

/// What a packet that takes the entry is counted in; `None` if in nothing.
fn counted(entry: &EntryData) -> Option<Counted<'_>> {
    let (ending, if_absent) = match entry.exit {
        Exit::End(ending) => (Some(ending), false),
        Exit::EndIfAbsent(ending) => (Some(ending), true),
        Exit::Then { .. } | Exit::Test { .. } => (None, false),
    };
    let is_counted = ending.is_some() || !entry.counts.is_empty();
    is_counted.then_some((ending, &entry.counts, if_absent))
}

/// The same as a trace.
pub(crate) fn trace(entry: &EntryData) -> Option<Trace> {
    counted(entry).map(|(ending, counts, if_absent)| Trace { ending, counts: counts.to_vec(), if_absent })
}
