//! `select`: fields get words of the key, devices get classes, and each stage becomes code or a table.
//!
//! A structure takes a stage or hands it back: code is tried first, for classifiers whose code stays small; the walk
//! table takes anything.

use std::collections::BTreeMap;

use cranelift_entity::PrimaryMap;
use polc_ir::classifier::{Classifier, EntryData, Exit};
use polc_ir::cube::Test;
use polc_ir::decision::{Decision, NodeData};
use polc_ir::entities::{Entry, Stage, Step};
use polc_ir::env::{Attach, Device};
use polc_ir::field::{DeviceName, Field};
use polc_ir::interval::{Interval, IntervalSet, max_value};
use polc_ir::outcome::FrameKind;
use polc_ir::packet::frame_ending;
use polc_ir::plan::{
    DeviceClasses, KeySlot, LinearEntry, LinearStep, LinearTest, Plan, PlanExit, Target, Trace, WalkNode,
    WalkRef, WalkTable, WordTest, WordWrite,
};

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

/// Word tests that code may hold before a table is the better choice.
const CODE_TESTS_MAX: usize = 900;

/// Chooses how every stage is decided.
pub fn select(classifier: &Classifier, decision: &Decision, devices: &Devices) -> Plan {
    let selector = Selector::new(classifier, devices);
    let linear = selector.linear();
    let (steps, walk, root) = match linear {
        Some((steps, root)) => (steps, WalkTable::default(), root),
        None => {
            let (walk, root) = selector.walk(decision);
            (PrimaryMap::new(), walk, root)
        }
    };
    Plan {
        family: classifier.family,
        place: classifier.place.clone(),
        key: selector.key,
        devices: selector.devices,
        steps,
        walk,
        root,
        traces: selector.traces,
        derived: classifier.derived.clone(),
        sets: classifier.sets.clone(),
        effect_tests: classifier.effect_tests.iter().map(|(_, test)| test.kind).collect(),
    }
}

struct Selector<'a> {
    classifier: &'a Classifier,
    key: Vec<KeySlot>,
    devices: DeviceClasses,
    /// For each class the value (a device's name) that stands for it, to evaluate tests on.
    class_values: Vec<u128>,
    traces: Vec<Trace>,
    slots: BTreeMap<Trace, u32>,
}

impl<'a> Selector<'a> {
    fn new(classifier: &'a Classifier, devices: &Devices) -> Selector<'a> {
        let family = classifier.family;
        let mut fields: Vec<Field> = classifier
            .entries
            .values()
            .flat_map(|entry| {
                let writes = match &entry.exit {
                    Exit::Then { writes, .. } => writes.as_slice(),
                    _ => &[],
                };
                let tested = entry.cube.tests().iter().map(|test| test.field);
                tested.chain(writes.iter().map(|write| write.field))
            })
            .collect();
        fields.sort_unstable();
        fields.dedup();
        let mut key = Vec::new();
        let mut word = 0;
        for field in fields {
            let words = match field {
                Field::InDevice | Field::OutDevice => 1,
                field => field.bits(family).div_ceil(32),
            };
            key.push(KeySlot { field, word, words });
            word += words;
        }
        let mut selector = Selector {
            classifier,
            key,
            devices: DeviceClasses::default(),
            class_values: Vec::new(),
            traces: Vec::new(),
            slots: BTreeMap::new(),
        };
        selector.classes(devices);
        let frames = [
            FrameKind::Runt,
            FrameKind::NotIp,
            FrameKind::OtherFamily,
            FrameKind::Vlan,
            FrameKind::Malformed,
            FrameKind::UnknownDevice,
        ];
        let mut traces: Vec<Trace> = classifier
            .entries
            .values()
            .filter_map(trace)
            .chain(frames.map(|kind| frame_ending(kind, classifier.place.mode).into()))
            .collect();
        traces.sort_unstable();
        traces.dedup();
        selector.slots = traces.iter().cloned().zip(0..).collect();
        selector.traces = traces;
        selector
    }

    /// Groups devices that no test tells apart.
    fn classes(&mut self, devices: &Devices) {
        let tests: Vec<&Test> = {
            let mut tests: Vec<&Test> = self
                .classifier
                .entries
                .values()
                .flat_map(|entry| entry.cube.tests())
                .filter(|test| matches!(test.field, Field::InDevice | Field::OutDevice))
                .collect();
            tests.sort_unstable();
            tests.dedup();
            tests
        };
        let signature = |value: u128| -> Vec<bool> { tests.iter().map(|test| test.holds(value)).collect() };
        // Class 0 is nobody, class 1 is no device.
        let mut signatures: Vec<Vec<bool>> = vec![Vec::new(), signature(0)];
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
        if self.classifier.place.attach == Some(Attach::TcEgress) {
            // A packet of this host's own has no input device: number 0.
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

    fn slot(&self, field: Field) -> KeySlot {
        let at = self.key.binary_search_by_key(&field, |slot| slot.field);
        self.key[at.expect("every tested or written field has a slot")]
    }

    /// A test as alternatives of word tests; none means that it never holds.
    fn word_tests(&self, test: &Test) -> Vec<Vec<WordTest>> {
        let slot = self.slot(test.field);
        if matches!(test.field, Field::InDevice | Field::OutDevice) {
            let classes: IntervalSet = (1..self.class_values.len())
                .filter(|&class| test.holds(self.class_values[class]))
                .map(|class| Interval::point(class as u128))
                .collect();
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
        let top = max_value(test.field.bits(self.classifier.family)) & test.mask;
        test.values
            .intervals()
            .iter()
            .filter_map(|range| range.intersect(Interval::new(0, top)?))
            .flat_map(|range| word_ranges(slot, test.mask, range))
            .collect()
    }

    fn exit(&self, entry: &EntryData, target: impl Fn(Stage) -> Target) -> PlanExit {
        let count = trace(entry).map(|trace| self.slots[&trace]);
        match &entry.exit {
            Exit::End(_) => PlanExit::End(count.expect("an end is a trace")),
            Exit::Then { writes, stage } => PlanExit::Then {
                count,
                writes: writes
                    .iter()
                    .map(|write| WordWrite {
                        word: self.slot(write.field).word,
                        clear: write.clear as u32,
                        xor: write.xor as u32,
                    })
                    .collect(),
                next: target(*stage),
            },
            Exit::Test { test, yes, no } => {
                PlanExit::Test { count, test: *test, yes: target(*yes), no: target(*no) }
            }
        }
    }

    /// Every stage as code, if that stays small.
    fn linear(&self) -> Option<(PrimaryMap<Step, LinearStep>, Target)> {
        let classifier = self.classifier;
        let mut steps = PrimaryMap::new();
        let mut tests_total = 0;
        for (stage, data) in classifier.stages.iter() {
            let mut entries = Vec::new();
            for &entry in &data.entries {
                let data = &classifier.entries[entry];
                let tests: Vec<LinearTest> =
                    data.cube.tests().iter().map(|test| LinearTest { any: self.word_tests(test) }).collect();
                tests_total += 1 + tests.iter().flat_map(|test| &test.any).map(Vec::len).sum::<usize>();
                if tests_total > CODE_TESTS_MAX {
                    return None;
                }
                if tests.iter().any(|test| test.any.is_empty()) {
                    continue;
                }
                let exit = self.exit(data, |stage| Target::Step(Step::from_u32(stage.as_u32())));
                entries.push(LinearEntry { tests, exit, rule: data.rule });
            }
            steps.push(LinearStep { stage, entries });
        }
        Some((steps, Target::Step(Step::from_u32(classifier.root.as_u32()))))
    }

    /// Every stage in the walk table.
    fn walk(&self, decision: &Decision) -> (WalkTable, Target) {
        let classifier = self.classifier;
        let mut walk = Walk {
            selector: self,
            table: WalkTable::default(),
            node_visits: Vec::new(),
            exit_visits: Vec::new(),
        };
        let mut roots: Vec<WalkRef> = Vec::new();
        for (stage, data) in classifier.stages.iter() {
            let first = walk.table.exits.len() as u32;
            for &entry in &data.entries {
                let exit = self
                    .exit(&classifier.entries[entry], |stage| Target::Walk(roots[stage.as_u32() as usize]));
                walk.add_exit(exit);
            }
            let number: BTreeMap<Entry, u32> = data.entries.iter().copied().zip(first..).collect();
            let root = decision.roots[stage].expect("every stage is decided");
            roots.push(walk.stage(decision, root, &number));
        }
        let root = roots[classifier.root.as_u32() as usize];
        walk.table.visits_max = walk.visits(root);
        (walk.table, Target::Walk(root))
    }
}

/// What a packet that takes the entry is counted in; `None` if in nothing.
fn trace(entry: &EntryData) -> Option<Trace> {
    let ending = if let Exit::End(ending) = entry.exit { Some(ending) } else { None };
    (ending.is_some() || !entry.counts.is_empty()).then(|| Trace { ending, counts: entry.counts.clone() })
}

struct Walk<'a> {
    selector: &'a Selector<'a>,
    table: WalkTable,
    /// For each node and exit, most visits from it to an ending.
    node_visits: Vec<u32>,
    exit_visits: Vec<u32>,
}

impl Walk<'_> {
    fn visits(&self, at: WalkRef) -> u32 {
        match at {
            WalkRef::Node(node) => self.node_visits[node as usize],
            WalkRef::Exit(exit) => self.exit_visits[exit as usize],
            WalkRef::None => 0,
        }
    }

    fn add_exit(&mut self, exit: PlanExit) {
        let target = |target: &Target| match target {
            Target::Walk(at) => self.visits(*at),
            Target::Step(_) => 0,
        };
        let visits = 1 + match &exit {
            PlanExit::End(_) => 0,
            PlanExit::Then { next, .. } => target(next),
            PlanExit::Test { yes, no, .. } => target(yes).max(target(no)),
        };
        self.table.exits.push(exit);
        self.exit_visits.push(visits);
    }

    fn test(&mut self, test: WordTest, yes: WalkRef, no: WalkRef) -> WalkRef {
        if yes == no {
            return yes;
        }
        self.node_visits.push(1 + self.visits(yes).max(self.visits(no)));
        self.table.nodes.push(WalkNode::Test { test, yes, no });
        WalkRef::Node(self.table.nodes.len() as u32 - 1)
    }

    /// Alternatives of word tests.
    fn any(&mut self, alternatives: &[Vec<WordTest>], yes: WalkRef, no: WalkRef) -> WalkRef {
        alternatives
            .iter()
            .rev()
            .fold(no, |no, all| all.iter().rev().fold(yes, |yes, &test| self.test(test, yes, no)))
    }

    /// The nodes below `root`. Nodes lead to smaller ones, so ascending order visits children first.
    fn stage(
        &mut self,
        decision: &Decision,
        root: polc_ir::entities::Node,
        number: &BTreeMap<Entry, u32>,
    ) -> WalkRef {
        let mut built: BTreeMap<polc_ir::entities::Node, WalkRef> = BTreeMap::new();
        let mut pending = vec![root];
        let mut needed = Vec::new();
        while let Some(node) = pending.pop() {
            needed.push(node);
            if let NodeData::Test { edges, .. } = &decision.nodes[node] {
                pending.extend(edges.iter().map(|(_, next)| *next));
            }
        }
        needed.sort_unstable();
        needed.dedup();
        for node in needed {
            let at = match &decision.nodes[node] {
                NodeData::Test { field, mask, edges } => {
                    let (_, last) = edges.last().expect("a test has edges");
                    let mut at = built[last];
                    for (bound, next) in edges.iter().rev().skip(1) {
                        let test = Test { field: *field, mask: *mask, values: IntervalSet::range(0, *bound) };
                        let tests = self.selector.word_tests(&test);
                        at = self.any(&tests, built[next], at);
                    }
                    at
                }
                NodeData::List { entries } => entries.iter().rev().fold(WalkRef::None, |next, entry| {
                    let tests = self.selector.classifier.entries[*entry].cube.tests();
                    tests.iter().rev().fold(WalkRef::Exit(number[entry]), |yes, test| {
                        let tests = self.selector.word_tests(test);
                        self.any(&tests, yes, next)
                    })
                }),
                NodeData::Done { entry } => WalkRef::Exit(number[entry]),
                NodeData::None => WalkRef::None,
                NodeData::Min { .. } => unreachable!("`decide` makes no minima"),
            };
            built.insert(node, at);
        }
        built[&root]
    }
}

/// A range of a field's masked values as alternatives of word tests.
fn word_ranges(slot: KeySlot, mask: u128, range: Interval) -> Vec<Vec<WordTest>> {
    let words = usize::from(slot.words);
    let word = |value: u128, index: usize| (value >> (32 * (words - 1 - index))) as u32;
    let test = |index: usize, lo: u32, hi: u32| -> Option<WordTest> {
        let mask = word(mask, index);
        // The whole word holds: nothing to ask.
        (lo != 0 || hi != mask).then_some(WordTest { word: slot.word + index as u8, mask, lo, hi })
    };
    let (lo, hi) = (range.lo(), range.hi());
    let split = (0..words).find(|&index| word(lo, index) != word(hi, index));
    let equal = |until: usize, value: u128| -> Vec<WordTest> {
        (0..until).filter_map(|index| test(index, word(value, index), word(value, index))).collect()
    };
    let Some(split) = split else { return vec![equal(words, lo)] };
    let low_is_least = (split + 1..words).all(|index| word(lo, index) == 0);
    let high_is_most = (split + 1..words).all(|index| word(hi, index) == word(mask, index));
    let mut alternatives = Vec::new();
    let first = word(lo, split) + u32::from(!low_is_least);
    let last = word(hi, split) - u32::from(!high_is_most);
    if first <= last {
        let mut all = equal(split, lo);
        all.extend(test(split, first, last));
        alternatives.push(all);
    }
    if !low_is_least {
        // Equal to the lower bound so far, then above it at some word, or equal to its end.
        for above in split + 1..=words {
            let mut all = equal(above.min(words), lo);
            if above < words {
                if word(lo, above) == u32::MAX {
                    continue;
                }
                all.extend(test(above, word(lo, above) + 1, word(mask, above)));
            }
            alternatives.push(all);
        }
    }
    if !high_is_most {
        for below in split + 1..=words {
            let mut all = equal(below.min(words), hi);
            if below < words {
                let Some(last) = word(hi, below).checked_sub(1) else { continue };
                all.extend(test(below, 0, last));
            }
            alternatives.push(all);
        }
    }
    alternatives
}
