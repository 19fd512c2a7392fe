//! `witness`: packets that show what a classifier does.
//!
//! Half of them are *directed* (`directed`): for each entry some that take it, and some at each value at which one of its
//! tests changes its mind (the ends of every interval, the values just beyond, each bit of a mask), while the entry's other
//! tests hold and no earlier entry catches the packet; and for each element of a set that is looked up in a table one in
//! it and one just beside it. The others take turns: *odd* ones (`odd`) are cut, tagged,
//! fragmented or bent in each of some hundred ways, because rules meet packets they did not foresee; *mixed* ones have
//! fields of several entries, since a packet passes several stages. Around directed packets a plan is *probed* (`probe`);
//! before the first, its steps are compared with their stages, *cell* by cell (`cells`). Others are aimed at the rules
//! themselves (`rules`), should the classifier not be what they say. The sequences depend on the seed alone.
//!
//! What entries such packets miss is searched for (`ways`): what packets are like at a stage is a *region* (`region`), that
//! earlier entries don't catch them a list of clauses, and whether both leave anything is decided (`solve`). Of an entry that
//! nothing is left for, no packet is missing.

mod cells;
mod directed;
mod elements;
mod facts;
mod first;
mod frame;
mod hidden;
mod odd;
mod probe;
mod random;
mod region;
mod rules;
mod solve;
mod ways;

pub use odd::ODD_FRAMES;
pub use random::Random;
pub use rules::Aimed;

use std::borrow::Cow;
use std::cell::OnceCell;

use polc_ir::classifier::Classifier;
use polc_ir::cube::Cube;
use polc_ir::entities::Entry;
use polc_ir::env::{Attach, Device, Input};
use polc_ir::field::Field;
use polc_ir::interval::max_value;
use polc_ir::plan::Plan;

pub use cells::Effort;
use cells::{Aim, Compared, compare};
use directed::{Directed, input};
use facts::Facts;
pub(crate) use first::{First, FirstOfList};
use frame::Wanted;
use probe::Probes;
pub(crate) use ways::Untaken;

/// Of so many packets, half are directed, one is odd and one mixed.
const TURN: usize = 4;

/// Rounds that a run of all packets makes.
const ROUNDS: usize = 2;

/// How far apart two ways to be odd are that follow each other: a prime that does not divide their number.
const ODD_STRIDE: usize = 59;
const _: () = assert!(!ODD_FRAMES.is_multiple_of(ODD_STRIDE));

/// An endless sequence of packets for a classifier.
#[derive(Debug)]
pub struct Witnesses<'a> {
    classifier: &'a Classifier,
    devices: &'a [Device],
    random: Random,
    directed: Directed<'a>,
    /// Worked out once entries are left that no packet takes.
    facts: OnceCell<Facts>,
    cubes: Vec<Cow<'a, Cube>>,
    made: usize,
    /// The last packet that is not odd.
    plain: Input,
    probes: Option<Probes<'a>>,
    /// What comparing a plan's steps with their stages gave; what of it is still to be shown.
    compared: Option<Compared>,
    /// Fields on which a plan differs, that a packet is to have.
    differing: Option<Wanted>,
}

impl<'a> Witnesses<'a> {
    /// Packets for `classifier` that come and go by `devices`.
    pub fn new(classifier: &'a Classifier, devices: &'a [Device], seed: u64) -> Witnesses<'a> {
        let entries = classifier.entries.values().map(|entry| &entry.cube).filter(|cube| !cube.is_all());
        let elements = elements::elements(classifier);
        let of_sets = elements.values().flatten().cloned();
        let cubes = entries.map(Cow::Borrowed).chain(of_sets.map(Cow::Owned)).collect();
        let mut random = Random::new(seed);
        let directed = Directed::new(classifier, devices, elements, &mut random);
        Witnesses {
            classifier,
            devices,
            random,
            directed,
            facts: OnceCell::new(),
            cubes,
            made: 0,
            plain: Input::default(),
            probes: None,
            compared: None,
            differing: None,
        }
    }

    /// The same, but first packets where the steps of `plan`, which was made from the classifier, differ from what they
    /// decide, and for all values that its tables have boundaries around; and wherever fields are found on which it
    /// decides otherwise than the classifier, a packet that has them.
    pub fn of_plan(
        classifier: &'a Classifier,
        plan: &'a Plan,
        devices: &'a [Device],
        effort: Effort,
        seed: u64,
    ) -> Witnesses<'a> {
        let mut witnesses = Witnesses::new(classifier, devices, seed);
        witnesses.compared = Some(compare(classifier, plan, effort, &mut Random::new(seed)));
        // Nothing is left to find where all was compared.
        if !witnesses.are_steps_proven() {
            witnesses.probes = Some(Probes::new(classifier, plan, witnesses.directed.elements()));
        }
        witnesses
    }

    /// Whether every step of the plan was compared with its stage on every combination of values that either tells
    /// apart, and none differs: then no packet can, and none is needed to say so.
    pub fn are_steps_proven(&self) -> bool {
        self.compared.as_ref().is_some_and(|compared| compared.is_complete && compared.differences.is_empty())
    }

    /// How many packets it takes until each directed one and each kind of odd one was there twice, with
    /// whatever a test leaves open being different.
    pub fn enough(&self) -> usize {
        let first = self
            .compared
            .as_ref()
            .map_or(0, |compared| compared.differences.len() + compared.boundaries.len());
        first + ROUNDS * (2 * self.directed.len()).max(TURN * ODD_FRAMES)
    }

    /// The entries that no packet took, to find out why.
    pub(crate) fn untaken(&self, was_taken: impl Fn(Entry) -> bool, seed: u64) -> Untaken<'_> {
        Untaken::new(&self.directed, self.facts(), was_taken, seed)
    }

    fn facts(&self) -> &Facts {
        self.facts.get_or_init(|| {
            let elements = self.directed.elements().values().flatten();
            Facts::new(self.classifier, self.directed.domain(), elements)
        })
    }

    fn mixed(&mut self) -> Input {
        let mut wanted = Wanted::new();
        if !self.cubes.is_empty() {
            for _ in 0..1 + self.random.below(3) {
                let cube = self.random.below(self.cubes.len());
                self.satisfy(cube, &mut wanted);
            }
        }
        self.with(&wanted, true)
    }

    fn with(&mut self, wanted: &Wanted, odd: bool) -> Input {
        input(self.classifier, self.devices, self.directed.frames(), wanted, odd, &mut self.random)
    }

    fn satisfy(&mut self, cube: usize, wanted: &mut Wanted) {
        for test in self.cubes[cube].tests() {
            let intervals = test.values.intervals();
            if intervals.is_empty() {
                continue;
            }
            let interval = intervals[self.random.below(intervals.len())];
            let top = max_value(test.field.bits(self.classifier.family));
            let value = match self.random.below(16) {
                0 => interval.lo().wrapping_sub(1) & top,
                1 => interval.hi().wrapping_add(1) & top,
                2..=5 => interval.hi(),
                6..=8 => {
                    let width = interval.hi() - interval.lo();
                    interval.lo() + u128::from(self.random.next_u64()) % width.saturating_add(1).max(1)
                }
                _ => interval.lo(),
            };
            // The long packets are directed ones.
            if matches!(test.field, Field::Length | Field::L4Len) && value > 1500 {
                continue;
            }
            wanted.insert(test.field, value | self.random.next_u128() & !test.mask & top);
        }
    }
}

impl Iterator for Witnesses<'_> {
    type Item = Input;

    fn next(&mut self) -> Option<Input> {
        if let Some(wanted) = self.differing.take() {
            return Some(self.with(&wanted, false));
        }
        let aim = self.compared.as_mut().and_then(|found| found.differences.pop().or(found.boundaries.pop()));
        if let Some(Aim { entry, fields }) = aim {
            return Some(self.directed.towards(entry, &fields, &mut self.random));
        }
        let turn = self.made % TURN;
        let number = self.made / TURN;
        self.made += 1;
        Some(match turn {
            1 => {
                let mut odd = self.plain.clone();
                // Ways that are far apart take turns, so that a short run sees all sorts.
                let way = number * ODD_STRIDE % ODD_FRAMES;
                odd::bend(self.classifier.family, way, &mut odd, &mut self.random);
                if self.classifier.place.attach == Some(Attach::Xdp) {
                    // Nobody tells a program there of a tag that was taken out.
                    odd.vlan = None;
                }
                odd
            }
            3 => self.mixed(),
            _ => {
                let input = self.directed.packet(&mut self.random);
                self.plain = input.clone();
                if let Some(probes) = &self.probes {
                    // Numbers of their own, so that the packets are the same with and without.
                    let mut random = Random::new(self.made as u64);
                    self.differing = probes.differing(self.directed.frames(), &input, &mut random);
                }
                input
            }
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use polc_frontend_iptables::{ParseOptions, lower, parse};
    use polc_ir::env::{Env, Mode};
    use polc_ir::hook::{Hook, Semantics};
    use polc_ir::packet::View;
    use polc_ir::source::SourceMap;
    use polc_ir::state::State;

    use super::*;
    use crate::flatten::flatten;
    use crate::place::{devices_of, place};

    /// Looks at a packet: its fields, and the entries it takes.
    type Look<'a> = dyn FnMut(&Classifier, &dyn Fn(Field) -> u128, &[Entry]) + 'a;

    /// A rule set's classifier for INPUT, and the devices that its rules name.
    pub(crate) fn classified(text: &str, attach: Attach) -> (Classifier, Vec<Device>) {
        let mut sources = SourceMap::new();
        let file = sources.add("rules", text);
        let ruleset = lower(&parse(&sources, file, &ParseOptions::default()).0, &[], Semantics::Legacy);
        let place = place(&[Hook::Input], attach, Mode::Accelerate, false);
        (flatten(&ruleset, &place, &Env::default(), &mut Vec::new()), devices_of(&ruleset))
    }

    /// The first packets for a rule set.
    fn packets(text: &str, each: &mut Look<'_>) {
        let (classifier, devices) = classified(text, Attach::TcIngress);
        let witnesses = Witnesses::new(&classifier, &devices, 1);
        let enough = witnesses.enough();
        for input in witnesses.take(enough) {
            let Ok(view) = View::new(classifier.family, &classifier.place, &input) else { continue };
            let given = |field: Field| match field {
                Field::Derived(id) => {
                    let member = classifier.member(id, &mut |field| view.get(field));
                    member.unwrap_or_else(|| polc_ir::derived::eval(&classifier.derived[id], &view)).into()
                }
                field => view.get(field),
            };
            let taken = std::cell::RefCell::new(Vec::new());
            let mut fields = polc_ir::classifier::Fields::new(&given);
            classifier.eval_with(&mut fields, &mut State::new(1), |stage, fields| {
                let entries = &classifier.stages[stage].entries;
                let holds =
                    |entry: &&Entry| classifier.entries[**entry].cube.holds(|field| fields.get(field));
                let entry = *entries.iter().find(holds).expect("a stage is total");
                taken.borrow_mut().push(entry);
                entry
            });
            each(&classifier, &given, &taken.into_inner());
        }
    }

    /// Every entry that a packet can take is taken, behind writes, jumps, sets of ports and rules that hide most of it; of
    /// the others it is proven that none can.
    #[test]
    fn every_entry_is_taken() {
        let text = "*filter\n:INPUT DROP [0:0]\n:a - [0:0]\n:b - [0:0]\n\
            -A INPUT -s 10.0.0.0/8 -p tcp -m tcp --dport 1000:2000 -j a\n\
            -A INPUT -d 192.0.2.0/255.255.0.255 -j b\n\
            -A INPUT -s 0.0.0.0/1 -j DROP\n\
            -A INPUT -p udp -m multiport --dports 53,123,1000:2000 -m ttl --ttl-gt 63 -j ACCEPT\n\
            -A INPUT -p tcp -m tcp --tcp-flags SYN,ACK,FIN,RST SYN -m length --length 1500 -j ACCEPT\n\
            -A INPUT -p tcp -m tcp --tcp-option 8 -j ACCEPT\n\
            -A INPUT -m u32 --u32 \"0>>22&0x3C@4&0xFFFF=77\" -p tcp -j ACCEPT\n\
            -A a -m mark --mark 0x0/0x3 -j MARK --set-xmark 0x2/0x3\n\
            -A a -m mark --mark 0x2/0x3 -p tcp -m tcp --sport 7 -j ACCEPT\n\
            -A a -s 10.1.2.3 -j DROP\n\
            -A b -p icmp -m icmp --icmp-type 8 -j ACCEPT\n\
            -A b -i eth0 -p sctp -m sctp --dport 5 -j RETURN\n\
            -A b -i eth+ -j DROP\nCOMMIT\n";
        let mut all = BTreeSet::new();
        let mut taken = BTreeSet::new();
        let mut shown = String::new();
        packets(text, &mut |classifier, _, entries| {
            if shown.is_empty() {
                shown = classifier.to_string();
                all.extend(classifier.entries.keys());
            }
            taken.extend(entries.iter().copied());
        });
        let missing: Vec<String> = all.difference(&taken).map(Entry::to_string).collect();
        assert_eq!(missing, HIDDEN, "{shown}");
        let (classifier, devices) = classified(text, Attach::TcIngress);
        let witnesses = Witnesses::new(&classifier, &devices, 1);
        let mut untaken = witnesses.untaken(|_| false, 1);
        let unreachable = classifier.entries.keys().filter(|entry| {
            untaken.seek(*entry, &mut |_| true);
            untaken.is_unreachable(*entry)
        });
        assert_eq!(unreachable.map(|entry| entry.to_string()).collect::<Vec<_>>(), HIDDEN);
    }

    /// What no packet takes. TCP packets from 10.0.0.0/8 come back from `a` to the drop of 0.0.0.0/1, so nothing behind
    /// it sees one, and no other packet comes that way: entries 10 to 12 for fragments, 55 to 63 for others. None of
    /// those others is too short (64): the rule that led to `a` has dropped it. Fragments that could be UDP or TCP of
    /// the other rules (18, 19) have passed what `b` and the drop of 0.0.0.0/1 take.
    const HIDDEN: [&str; 15] = [
        "entry10", "entry11", "entry12", "entry18", "entry19", "entry55", "entry56", "entry57", "entry58",
        "entry59", "entry60", "entry61", "entry62", "entry63", "entry64",
    ];

    /// Each end of an interval is met, and each value beside it, by packets that the rest of the rule lets through.
    #[test]
    fn edges_are_met_while_the_rest_of_the_rule_holds() {
        let text = "*filter\n:INPUT ACCEPT [0:0]\n\
            -A INPUT -s 10.0.0.0/24 -p tcp -m tcp --dport 1:65534 -j ACCEPT\n\
            -A INPUT -s 10.0.0.0/8 -p tcp -m tcp --dport 1000:2000 -j DROP\nCOMMIT\n";
        let mut ports = BTreeSet::new();
        packets(text, &mut |_, field, _| {
            let source = field(Field::SrcAddr);
            let second = source >> 24 == 10 && source >> 8 != 0x0a_0000;
            if second && field(Field::Proto) == 6 && field(Field::L4Len) >= 20 && field(Field::Fragment) == 0
            {
                ports.insert(field(Field::DstPort));
            }
        });
        for port in [999, 1000, 2000, 2001] {
            assert!(ports.contains(&port), "{port}");
        }
    }

    #[test]
    fn equal_seeds_give_equal_packets() {
        let mut first = Vec::new();
        let mut again = Vec::new();
        let text = "*filter\n:INPUT DROP [0:0]\n-A INPUT -p tcp -j ACCEPT\nCOMMIT\n";
        packets(text, &mut |_, field, _| first.push(field(Field::SrcAddr)));
        packets(text, &mut |_, field, _| again.push(field(Field::SrcAddr)));
        assert_eq!(first, again);
    }
}
