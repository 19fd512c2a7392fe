//! Directed packets: each takes one entry, or just misses it at one value of one test.
//!
//! From the entry backwards a way to the root is chosen, and with it what the packet has to be like at the root: the
//! cubes on the way, each write undone. A frame is made and followed; where an earlier entry catches it, one of that
//! entry's tests is made to fail, and the frame is made again. What can't be reached so within a few attempts (an entry
//! that others hide, say) gives a packet that gets as near as it came.

use std::collections::BTreeMap;

use cranelift_entity::SecondaryMap;
use polc_ir::classifier::{Classifier, Exit, Fields};
use polc_ir::cube::{Cube, Test};
use polc_ir::derived::DerivedData;
use polc_ir::entities::{Derived, Entry, Stage};
use polc_ir::env::{Attach, Connection, Connections, Device, Input, ct_state};
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::{Family, Hook};
use polc_ir::interval::{Interval, IntervalSet, max_value};
use polc_ir::ruleset::Write;

use super::first::First;
use super::frame::{Frames, Wanted};
use super::random::Random;
use super::region::{Literal, Region};

/// Packets that take an entry, before those at its edges.
const TAKING: usize = 6;
/// Of them, those that also satisfy a later entry of the stage.
const OVERLAPPING: std::ops::Range<usize> = 3..5;
/// Later entries looked at for one that overlaps.
const LATER_MAX: usize = 64;
/// Ways to the root that are tried, and steps back that are tried at each stage.
const WAYS_MAX: usize = 6;
const BACK_MAX: usize = 16;
/// Frames that are made for one packet.
const REPAIRS_MAX: usize = 48;
/// Values tried for a field under several masks.
const PICKS_MAX: usize = 16;
/// Packets at the edges of an interval: its ends and the values beyond, and where a value of more than 32 bits goes
/// from one word to the next.
const EDGES: usize = 4;
const INNER_EDGES: usize = 12;

/// Packets at an interval of a field of so many bits that differ from a value there in one bit: of each byte but the
/// lowest, or of each word of wide fields, so that who takes a part of a value for the whole is found out.
fn flips(bits: u8) -> usize {
    usize::from(bits.div_ceil(if bits > 32 { 32 } else { 8 })) - 1
}

/// Packets for an element of a set: one in it, and one just beside it.
const OF_ELEMENT: usize = 2;

/// What packets are made for: an entry, or an element of a set that the entry asks for.
#[derive(Clone, Copy, Debug)]
struct Target {
    entry: Entry,
    /// The membership, and the number of the element's cube.
    element: Option<(Derived, usize)>,
}

/// Where a value is taken from its interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    Lo,
    Hi,
    Any,
}

/// Makes directed packets.
#[derive(Debug)]
pub(super) struct Directed<'a> {
    classifier: &'a Classifier,
    devices: &'a [Device],
    frames: Frames<'a>,
    first: First<'a>,
    /// For each stage, the entries that lead to it, by their stage.
    into: SecondaryMap<Stage, Vec<Vec<Entry>>>,
    /// What no input can be but.
    domain: Cube,
    /// Cubes of elements of the sets that are looked up.
    elements: BTreeMap<Derived, Vec<Cube>>,
    /// What packets are made for; what of it has packets left, and which one is next.
    targets: Vec<Target>,
    left: Vec<Target>,
    next: usize,
    pass: usize,
}

impl<'a> Directed<'a> {
    pub(super) fn new(
        classifier: &'a Classifier,
        devices: &'a [Device],
        elements: BTreeMap<Derived, Vec<Cube>>,
        random: &mut Random,
    ) -> Directed<'a> {
        let mut into: SecondaryMap<Stage, Vec<Vec<Entry>>> = SecondaryMap::new();
        for (entry, data) in &classifier.entries {
            for next in data.exit.successors() {
                match into[next].last_mut() {
                    Some(group) if classifier.entries[group[0]].stage == data.stage => group.push(entry),
                    _ => into[next].push(vec![entry]),
                }
            }
        }
        // A run that ends early has seen entries from all parts.
        let mut targets = targets(classifier, &elements);
        for at in (1..targets.len()).rev() {
            targets.swap(at, random.below(at + 1));
        }
        Directed {
            classifier,
            devices,
            first: First::new(classifier),
            frames: Frames { family: classifier.family, derived: &classifier.derived },
            into,
            domain: domain(classifier, devices),
            elements,
            left: targets.clone(),
            targets,
            next: 0,
            pass: 0,
        }
    }

    pub(super) fn frames(&self) -> &Frames<'a> {
        &self.frames
    }

    pub(super) fn first(&self) -> &First<'a> {
        &self.first
    }

    pub(super) fn elements(&self) -> &BTreeMap<Derived, Vec<Cube>> {
        &self.elements
    }

    pub(super) fn classifier(&self) -> &'a Classifier {
        self.classifier
    }

    /// What no input can be but.
    pub(super) fn domain(&self) -> &Cube {
        &self.domain
    }

    /// The entries that lead to a stage, by their stage.
    pub(super) fn into(&self, stage: Stage) -> &[Vec<Entry>] {
        &self.into[stage]
    }

    /// How many packets there are before they repeat in kind.
    pub(super) fn len(&self) -> usize {
        self.targets.iter().map(|&target| self.passes(target)).sum()
    }

    /// The next packet.
    pub(super) fn packet(&mut self, random: &mut Random) -> Input {
        loop {
            if self.next == self.left.len() {
                self.next = 0;
                self.pass += 1;
                let mut left = std::mem::take(&mut self.left);
                left.retain(|&target| self.passes(target) > self.pass);
                if left.is_empty() {
                    left.extend(&self.targets);
                    self.pass = 0;
                }
                self.left = left;
            }
            let target = self.left[self.next];
            self.next += 1;
            let goal = match target.element {
                None => self.goal(target.entry, self.pass, random),
                Some((member, number)) => self.element_goal(target.entry, member, number, self.pass, random),
            };
            if let Some((cube, choice)) = goal {
                return self.reach(target.entry, &cube, choice, random);
            }
        }
    }

    /// A packet with these fields where the entry is tried.
    pub(super) fn towards(&self, entry: Entry, fields: &Cube, random: &mut Random) -> Input {
        self.reach(entry, fields, Choice::Any, random)
    }

    fn passes(&self, target: Target) -> usize {
        if target.element.is_some() {
            return OF_ELEMENT;
        }
        let tests = self.classifier.entries[target.entry].cube.tests();
        TAKING + tests.iter().map(|test| self.edges_of(test)).sum::<usize>()
    }

    fn is_full(&self, test: &Test) -> bool {
        test.mask == max_value(test.field.bits(self.classifier.family))
    }

    /// How many packets a test has at its edges.
    fn edges_of(&self, test: &Test) -> usize {
        if matches!(test.field, Field::InDevice | Field::OutDevice) {
            return self.devices.len();
        }
        if !self.is_full(test) {
            return test.mask.count_ones() as usize;
        }
        let bits = test.field.bits(self.classifier.family);
        let inner = if bits > 32 { INNER_EDGES } else { 0 };
        test.values.intervals().len() * (EDGES + inner + flips(bits))
    }

    /// A test's value of this number; `None` if it is the same as another.
    fn edge(&self, test: &Test, number: usize) -> Option<u128> {
        if matches!(test.field, Field::InDevice | Field::OutDevice) {
            return Some(self.devices[number].name.value());
        }
        if !self.is_full(test) {
            let bit = (0..128).filter(|bit| test.mask >> bit & 1 == 1).nth(number)?;
            return Some(test.values.intervals().first()?.lo() ^ 1 << bit);
        }
        let bits = test.field.bits(self.classifier.family);
        let each = EDGES + flips(bits) + if bits > 32 { INNER_EDGES } else { 0 };
        let interval = test.values.intervals()[number / each];
        let (lo, hi) = (interval.lo(), interval.hi());
        let number = number % each;
        if let Some(flip) = number.checked_sub(each - flips(bits)) {
            // Alike but for one part: beside a range, or beside the only value.
            let alike = if lo == hi { lo } else { lo.checked_sub(1)? };
            let apart = if bits > 32 { 32 } else { 8 };
            return Some(alike ^ 1 << (apart * (flip + 1) + alike as usize % apart))
                .filter(|value| *value <= max_value(bits));
        }
        let value = match number {
            0 => return Some(lo),
            1 => return (hi != lo).then_some(hi),
            2 => return lo.checked_sub(1),
            3 => return hi.checked_add(1).filter(|value| *value <= max_value(bits)),
            inner => {
                let (word, kind) = ((inner - EDGES) / 4, (inner - EDGES) % 4);
                let low = max_value(32 * (word as u8 + 1));
                match kind {
                    0 => lo | low,
                    1 => (lo | low).checked_add(1)?,
                    2 => hi & !low,
                    _ => (hi & !low).checked_sub(1)?,
                }
            }
        };
        (interval.contains(value) && value != lo && value != hi).then_some(value)
    }

    /// What a packet of this pass has to be like where the entry is tried.
    fn goal(&self, entry: Entry, pass: usize, random: &mut Random) -> Option<(Cube, Choice)> {
        let cube = &self.classifier.entries[entry].cube;
        if OVERLAPPING.contains(&pass) {
            return self.overlap(entry, pass == OVERLAPPING.start, random).map(|both| (both, Choice::Any));
        }
        let Some(mut number) = pass.checked_sub(TAKING) else {
            let choice = match pass {
                0 => Choice::Lo,
                1 => Choice::Hi,
                _ => Choice::Any,
            };
            return Some((cube.clone(), choice));
        };
        let tests = cube.tests();
        let at = tests.iter().position(|test| {
            let edges = self.edges_of(test);
            let here = number < edges;
            if !here {
                number -= edges;
            }
            here
        });
        let at = at?;
        let value = self.edge(&tests[at], number)?;
        Some((self.beside(cube, at, value)?, Choice::Any))
    }

    /// The cube, but with this value where its test number `at` is.
    fn beside(&self, cube: &Cube, at: usize, value: u128) -> Option<Cube> {
        let mut beside = Cube::all();
        for (index, test) in cube.tests().iter().enumerate() {
            let values = || IntervalSet::point(value & test.mask);
            let test = if index == at { &Test { values: values(), ..test.clone() } } else { test };
            if !beside.and(test, self.frames.family) {
                return None;
            }
        }
        Some(beside)
    }

    /// What a packet of this pass has to be like that is in an element of a set or just misses it, and of which the rest
    /// of the entry holds.
    fn element_goal(
        &self,
        entry: Entry,
        member: Derived,
        number: usize,
        pass: usize,
        random: &mut Random,
    ) -> Option<(Cube, Choice)> {
        let mut goal = self.elements[&member][number].clone();
        if pass > 0 {
            let at = random.below(goal.tests().len().max(1));
            let test = goal.tests().get(at)?;
            let edges = Some(self.edges_of(test)).filter(|count| *count > 0)?;
            let value = self.edge(test, random.below(edges))?;
            goal = self.beside(&goal, at, value)?;
        }
        let rest = self.classifier.entries[entry].cube.tests();
        let mut rest = rest.iter().filter(|test| test.field != Field::Derived(member));
        rest.all(|test| goal.and(test, self.frames.family)).then_some((goal, Choice::Any))
    }

    /// The entry and a later one of its stage that does something else.
    fn overlap(&self, entry: Entry, first: bool, random: &mut Random) -> Option<Cube> {
        let data = &self.classifier.entries[entry];
        let entries = &self.classifier.stages[data.stage].entries;
        let at = entries.binary_search(&entry).expect("a stage's entries ascend");
        let later = entries[at + 1..].iter().take(LATER_MAX).map(|&later| &self.classifier.entries[later]);
        let mut both = later
            .filter(|later| later.exit != data.exit || later.counts != data.counts)
            .filter(|later| !later.cube.is_all())
            .filter_map(|later| data.cube.intersect(&later.cube, self.frames.family));
        if first { both.next() } else { both.nth(random.below(LATER_MAX / 8)) }
    }

    /// A packet that comes to the entry's stage, is caught by none before it, and satisfies `cube` there.
    fn reach(&self, entry: Entry, cube: &Cube, choice: Choice, random: &mut Random) -> Input {
        let mut best = None;
        for _ in 0..WAYS_MAX {
            let Some((way, mut demands)) = self.way(entry, cube, random) else { continue };
            let seed = random.next_u64();
            let mut wanted = Wanted::new();
            for test in demands.tests() {
                wanted.entry(test.field).or_insert_with(|| self.pick(&demands, test.field, choice, random));
            }
            for _ in 0..REPAIRS_MAX {
                let input = self.input(&wanted, seed);
                let blocked = self.follow(&way, &input);
                best = Some(input);
                match blocked {
                    Followed::Whole => return best.expect("just made"),
                    Followed::Lost => break,
                    Followed::Caught { by, written } => {
                        let Some(field) = self.avoid(by, &written, &mut demands, random) else { break };
                        wanted.insert(field, self.pick(&demands, field, Choice::Any, random));
                    }
                }
            }
        }
        best.unwrap_or_else(|| {
            let wanted =
                cube.tests().iter().map(|test| (test.field, self.pick(cube, test.field, choice, random)));
            let wanted = wanted.collect();
            self.input(&wanted, random.next_u64())
        })
    }

    /// Part of the region: packets there that are to be in sets are like elements of them. `None` if none was found.
    pub(super) fn in_sets<'b>(&'b self, region: &Region<'b>, random: &mut Random) -> Option<Region<'b>> {
        let family = self.frames.family;
        let mut found = region.clone();
        for field in region.fields() {
            let Field::Derived(id) = field else { continue };
            if self.computed(id) || found.pick(field, family, random) != Ok(Some(1)) {
                continue;
            }
            let elements = self.elements.get(&id).filter(|elements| !elements.is_empty())?;
            let mut like = || {
                let element = &elements[random.below(elements.len())];
                let mut like = found.clone();
                let tests = element.tests();
                tests.iter().all(|test| like.and(&Literal::new(test), true, family)).then_some(like)
            };
            found = (0..BACK_MAX).find_map(|_| like())?;
        }
        Some(found)
    }

    pub(super) fn input(&self, wanted: &Wanted, seed: u64) -> Input {
        input(self.classifier, self.devices, &self.frames, wanted, false, &mut Random::new(seed))
    }

    /// Entries from the root to this one, and what a packet has to be like to take them.
    fn way(&self, entry: Entry, cube: &Cube, random: &mut Random) -> Option<(Vec<Entry>, Cube)> {
        let mut way = vec![entry];
        let mut demands = cube.clone();
        let mut stage = self.classifier.entries[entry].stage;
        while stage != self.classifier.root {
            let groups = &self.into[stage];
            let (from, before) = (0..BACK_MAX).find_map(|_| {
                let group = &groups[random.below(groups.len())];
                // The last is the way of packets that nothing special holds of.
                let last = random.below(4) != 0;
                let from = if last { *group.last()? } else { group[random.below(group.len())] };
                Some((from, self.before(from, &demands, random)?))
            })?;
            demands = before;
            way.push(from);
            stage = self.classifier.entries[from].stage;
        }
        way.reverse();
        let family = self.frames.family;
        let mut whole = demands.clone();
        for test in demands.tests() {
            let Field::Derived(id) = test.field else { continue };
            if self.computed(id) || test.holds(0) {
                continue;
            }
            // A packet in a set is like one of its elements. What is not looked up is 0 until a stage writes it.
            let elements = self.elements.get(&id).filter(|elements| test.holds(1) && !elements.is_empty())?;
            let like = |_| whole.intersect(&elements[random.below(elements.len())], family);
            whole = (0..BACK_MAX).find_map(like)?;
        }
        for test in self.domain.tests() {
            if whole.tests().iter().any(|demand| demand.field == test.field) && !whole.and(test, family) {
                return None;
            }
        }
        Some((way, whole))
    }

    fn computed(&self, id: Derived) -> bool {
        !matches!(self.classifier.derived[id], DerivedData::Member { .. } | DerivedData::AddressType { .. })
    }

    /// What has to hold before an entry is taken so that `after` holds behind it.
    fn before(&self, entry: Entry, after: &Cube, random: &mut Random) -> Option<Cube> {
        let family = self.frames.family;
        let data = &self.classifier.entries[entry];
        let writes: &[Write] = match &data.exit {
            Exit::Then { writes, .. } => writes,
            _ => &[],
        };
        let mut before = data.cube.clone();
        for test in after.tests() {
            let mut test = test.clone();
            let mut settled = false;
            let field = test.field;
            for write in writes.iter().rev().filter(|write| write.field == field) {
                let full = max_value(write.field.bits(family));
                if write.clear & test.mask & full == test.mask {
                    if !test.holds(write.xor) {
                        return None;
                    }
                    settled = true;
                    break;
                }
                let value = undo(&test, write, random)?;
                let mask = test.mask & !write.clear;
                test = Test { mask, values: IntervalSet::point((value ^ write.xor) & mask), ..test };
            }
            if !settled && !before.and(&test, family) {
                return None;
            }
        }
        Some(before)
    }

    /// Follows an input along a way.
    fn follow(&self, way: &[Entry], input: &Input) -> Followed {
        let mut followed = Followed::Lost;
        let entries = &self.classifier.entries;
        self.frames.given(self.classifier, input, &mut |given| {
            let mut fields = Fields::new(given);
            let mut written: Vec<Field> = Vec::new();
            for (index, &step) in way.iter().enumerate() {
                if let Some(by) = self.first.before(step, &fields) {
                    followed = Followed::Caught { by, written };
                    return;
                }
                if index + 1 < way.len() && !entries[step].cube.holds(|field| fields.get(field)) {
                    return;
                }
                if let Exit::Then { writes, .. } = &entries[step].exit {
                    for write in writes {
                        fields.set(write.field, write.apply(fields.get(write.field)));
                        written.push(write.field);
                    }
                }
            }
            followed = Followed::Whole;
        });
        followed
    }

    /// Demands that one of the entry's tests fails; which field changes for that.
    fn avoid(
        &self,
        entry: Entry,
        written: &[Field],
        demands: &mut Cube,
        random: &mut Random,
    ) -> Option<Field> {
        let family = self.frames.family;
        let tests = self.classifier.entries[entry].cube.tests();
        let start = random.below(tests.len().max(1));
        let turned = || tests.iter().cycle().skip(start).take(tests.len());
        let is_free = |test: &&Test| !demands.tests().iter().any(|demand| demand.field == test.field);
        // Fields of which nothing is asked yet come first.
        let order: Vec<&Test> =
            turned().filter(is_free).chain(turned().filter(|test| !is_free(test))).collect();
        for test in order {
            if written.contains(&test.field) || matches!(test.field, Field::Derived(id) if !self.computed(id))
            {
                continue;
            }
            let mut narrower = demands.clone();
            let own = self.domain.tests().iter().filter(|domain| domain.field == test.field);
            if own.chain([&test.negated(family)]).all(|test| narrower.and(test, family)) {
                *demands = narrower;
                return Some(test.field);
            }
        }
        None
    }

    fn pick(&self, demands: &Cube, field: Field, choice: Choice, random: &mut Random) -> u128 {
        pick(self.frames.family, demands, field, choice, random)
    }
}

/// A value of the field that the demands allow, if one is found.
pub(super) fn pick(
    family: Family,
    demands: &Cube,
    field: Field,
    choice: Choice,
    random: &mut Random,
) -> u128 {
    let top = max_value(field.bits(family));
    let tests: Vec<&Test> = demands.tests().iter().filter(|test| test.field == field).collect();
    let mut value = 0;
    for attempt in 0..PICKS_MAX {
        let choice = if attempt == 0 { choice } else { Choice::Any };
        value = random.next_u128() & top;
        // The whole field first, then what masks ask for.
        for test in tests.iter().rev() {
            value = value & !test.mask | in_values(test, choice, random) & test.mask;
        }
        if tests.iter().all(|test| test.holds(value)) {
            break;
        }
    }
    value
}

/// How far an input came along a way.
enum Followed {
    /// To its end.
    Whole,
    /// An earlier entry of a stage caught it; the fields written until then.
    Caught { by: Entry, written: Vec<Field> },
    /// An entry of the way does not hold though everything was done for it.
    Lost,
}

/// A value for which the test holds; under a mask that leaves bits out, one that the mask allows, if it is found.
fn in_values(test: &Test, choice: Choice, random: &mut Random) -> u128 {
    let intervals = test.values.intervals();
    if intervals.is_empty() {
        return 0;
    }
    let bits: Vec<u32> = (0..u128::BITS).filter(|bit| test.mask >> bit & 1 == 1).collect();
    let mut value = 0;
    for attempt in 0..PICKS_MAX {
        let interval = match choice {
            Choice::Lo if attempt == 0 => intervals[0],
            Choice::Hi if attempt == 0 => intervals[intervals.len() - 1],
            _ => intervals[random.below(intervals.len())],
        };
        value = match choice {
            Choice::Lo => interval.lo(),
            Choice::Hi => interval.hi(),
            Choice::Any => match (random.below(3), (interval.hi() - interval.lo()).checked_add(1)) {
                (0, _) => interval.lo(),
                (1, _) => interval.hi(),
                (_, Some(count)) => interval.lo() + random.next_u128() % count,
                (_, None) => random.next_u128(),
            },
        } & test.mask;
        // Where bits outside the mask made the interval, a value beside it or any other may do.
        let flipped = value ^ 1 << bits[random.below(bits.len())];
        let other = random.next_u128() & test.mask;
        if let Some(found) = [value, flipped, other].into_iter().find(|value| test.values.contains(*value)) {
            return found;
        }
    }
    value
}

/// A value after the write that the write can give and the test holds for.
fn undo(test: &Test, write: &Write, random: &mut Random) -> Option<u128> {
    let fixed = test.mask & write.clear;
    (0..PICKS_MAX).find_map(|_| {
        let value = in_values(test, Choice::Any, random);
        let value = value & !fixed | write.xor & fixed;
        test.holds(value).then_some(value)
    })
}

/// What the fields of any input can be where the classifier runs.
fn domain(classifier: &Classifier, devices: &[Device]) -> Cube {
    let family = classifier.family;
    let attach = classifier.place.attach;
    let mut cube = Cube::all();
    let mut limit = |field: Field, values: IntervalSet| {
        _ = cube.and(&Test::new(field, family, values), family);
    };
    let names = || devices.iter().map(|device| Interval::point(device.name.value()));
    let nobody = || Interval::point(DeviceName::default().value());
    match attach {
        Some(Attach::TcEgress) => {
            limit(Field::InDevice, names().chain([nobody()]).collect());
            limit(Field::OutDevice, names().collect());
        }
        Some(Attach::Netfilter) => {
            for (field, known) in [
                (Field::InDevice, is_on_path(classifier, Hook::has_in_device)),
                (Field::OutDevice, is_on_path(classifier, Hook::has_out_device)),
            ] {
                limit(field, if known { names().collect() } else { nobody().into() });
            }
        }
        _ => {
            limit(Field::InDevice, names().collect());
            limit(Field::OutDevice, nobody().into());
        }
    }
    if attach == Some(Attach::Xdp) {
        limit(Field::Mark, IntervalSet::point(0));
        limit(Field::PacketType, IntervalSet::range(0, 2));
    }
    for field in [Field::CtState, Field::CtStatus, Field::CtDirection, Field::CtMark] {
        let carried = field == Field::CtState && classifier.place.connections == Connections::State;
        let values = if carried { &ct_state::ALL[..] } else { &[0] };
        limit(field, values.iter().map(|&value| Interval::point(value.into())).collect());
    }
    cube
}

/// Whether the path has a hook of this kind.
fn is_on_path(classifier: &Classifier, kind: fn(Hook) -> bool) -> bool {
    classifier.place.path.iter().any(|hook| kind(*hook))
}

/// What packets are made for in turn: every entry, and every element with one of the entries that ask for its set.
fn targets(classifier: &Classifier, elements: &BTreeMap<Derived, Vec<Cube>>) -> Vec<Target> {
    let mut targets: Vec<Target> =
        classifier.entries.keys().map(|entry| Target { entry, element: None }).collect();
    for (&member, cubes) in elements {
        let asks = |entry: &Entry| {
            let tests = classifier.entries[*entry].cube.tests();
            tests.iter().any(|test| test.field == Field::Derived(member))
        };
        let asking: Vec<Entry> = classifier.entries.keys().filter(asks).collect();
        let of_element = |(number, entry)| Target { entry, element: Some((member, number)) };
        targets.extend((0..cubes.len()).zip(asking.iter().copied().cycle()).map(of_element));
    }
    targets
}

/// A packet with wanted fields, at the classifier's place; `odd` as for [`Frames::frame`].
pub(super) fn input(
    classifier: &Classifier,
    devices: &[Device],
    frames: &Frames<'_>,
    wanted: &Wanted,
    odd: bool,
    random: &mut Random,
) -> Input {
    let frame = frames.frame(wanted, odd, random);
    let mut input = Input { frame, ..Input::default() };
    surroundings(classifier, devices, wanted, &mut input, random);
    input
}

/// The devices, the mark, the packet type and the connection of an input.
fn surroundings(
    classifier: &Classifier,
    devices: &[Device],
    wanted: &Wanted,
    input: &mut Input,
    random: &mut Random,
) {
    let attach = classifier.place.attach;
    let mut device = |field: Field| {
        let asked = wanted.get(&field).map(|value| DeviceName::from_value(*value));
        let known = asked.filter(|name| devices.iter().any(|device| device.name == *name));
        known.or_else(|| (!devices.is_empty()).then(|| devices[random.below(devices.len())].name))
    };
    let (input_device, output_device) = (device(Field::InDevice), device(Field::OutDevice));
    match attach {
        Some(Attach::TcEgress) => {
            input.out_device = output_device;
            let none = wanted.get(&Field::InDevice).map_or_else(|| random.one_in(2), |value| *value == 0);
            if !none {
                input.in_device = input_device;
            }
        }
        Some(Attach::Netfilter) => {
            input.in_device = input_device.filter(|_| is_on_path(classifier, Hook::has_in_device));
            input.out_device = output_device.filter(|_| is_on_path(classifier, Hook::has_out_device));
        }
        _ => input.in_device = input_device,
    }
    match classifier.place.connections {
        Connections::LookedUp { .. } if random.one_in(2) => {
            input.connection = Some(Connection { state: ct_state::ESTABLISHED, ..Connection::default() });
        }
        Connections::State => {
            let asked = wanted.get(&Field::CtState).copied().unwrap_or_default();
            let fits = ct_state::ALL.into_iter().find(|state| u128::from(*state) & asked != 0);
            let state = fits.unwrap_or_else(|| ct_state::ALL[random.below(ct_state::ALL.len())]);
            input.connection = Some(Connection { state, reply: random.one_in(2), ..Connection::default() });
        }
        _ => {}
    }
    if attach != Some(Attach::Xdp) {
        input.mark = wanted.get(&Field::Mark).map_or(0, |mark| *mark as u32);
        input.packet_type = wanted.get(&Field::PacketType).map(|kind| *kind as u8);
    }
}
