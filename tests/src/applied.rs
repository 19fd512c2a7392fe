//! An applied policy against the kernel's own packet filter: the same packets through both, in one network namespace,
//! one after the other; verdicts, marks, and the counters of every rule and policy.
//!
//! The oracle is what iptables does, not the rules' meaning: that only says which packets can't be compared, and each
//! of those is counted under its reason. Where polc's program sits is a parameter ([`Who`]), so that every place is
//! held to the same packets.

use std::collections::BTreeMap;
use std::path::PathBuf;

use polc::build::object;
use polc::guard::{GUARD_NUMBER, split_local};
use polc::netfilter::{Sample, device_names, renumbered, samples};
use polc::place::place;
use polc::runner::{Level, run};
use polc::select::Devices;
use polc::session::Session;
use polc_ir::diag::Diagnostic;
use polc_ir::env::{Attach, Device, Env, Input, Mode, Place};
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::{Family, Hook, Semantics};
use polc_ir::outcome::{Decider, FrameKind, Verdict};
use polc_ir::ruleset::{ClauseKind, Event, Ruleset, Truth};
use polc_ir::state::State;
use polc_loader::coexist::Order;
use polc_loader::flush::flush;
use polc_loader::netfilter::{
    Entry, FRAMES_MAX, Netfilter, NetfilterError, Passage, Route, Stages, Tool, counter_lines,
};
use polc_loader::state::SlotName;
use polc_loader::store::Store;
use polc_loader::swap::{Request, apply};
use polc_loader::sys::Sys;
use polc_loader::{net, status};

use crate::stateless::{Stateless, arriving};

/// A device that no rule names, and the one that packets leave by.
const OTHER: &str = "polc-other";
const OUTPUT: &str = "polc-out";

/// Rounds of packets until enough of them can be compared.
const ROUNDS_MAX: u64 = 8;

/// Who decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The kernel's packet filter.
    Iptables,
    /// polc's program at an attach point.
    Polc(Attach),
}

impl Who {
    /// Where packets have to come in to meet it.
    fn entry(self) -> Entry {
        match self {
            Who::Polc(Attach::Xdp) => Entry::Driver,
            Who::Polc(_) | Who::Iptables => Entry::Stack,
        }
    }

    /// The packet's mark if it was let through. A program on a device lets a packet through to PREROUTING.
    fn passed(self, passage: &Passage) -> Option<u32> {
        let stages = passage.stages;
        let through = |stage: Stages, mark: u32| stages.has(stage).then_some(mark);
        match self {
            Who::Iptables | Who::Polc(Attach::Netfilter) => {
                through(Stages::FORWARDED, passage.mark).or_else(|| through(Stages::DELIVERED, passage.mark))
            }
            Who::Polc(_) => through(Stages::PREROUTING, passage.mark_routed),
        }
    }
}

/// Packets and bytes by chain and rule; rule 0 is the policy.
pub type Counts = BTreeMap<(String, u32), (u64, u64)>;

/// What became of packets, in their order, and what was counted for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided {
    /// The mark of those that were let through.
    pub passed: Vec<Option<u32>>,
    /// Every rule and policy of the filter table.
    pub counts: Counts,
}

/// What was compared.
#[derive(Clone, Debug, Default)]
pub struct Compared {
    /// Packets, for each place of polc's program.
    pub packets: usize,
    /// How many of them were let through.
    pub passed: usize,
    /// How many of them are of some kinds: fragments, malformed, with extension headers or IPv4 options.
    pub kinds: BTreeMap<&'static str, usize>,
    /// Packets left out, by reason.
    pub left_out: BTreeMap<&'static str, usize>,
    /// Counters of rules and policies, for each place.
    pub counters: usize,
    /// How many of those were not zero.
    pub counters_hit: usize,
    /// The first difference.
    pub difference: Option<String>,
}

/// A rule set in a namespace of its own, to be decided by several.
#[derive(Debug)]
pub struct Bench<'a> {
    rules: &'a Stateless,
    netfilter: Netfilter,
    tool: Tool,
    sys: Sys,
    store: Store,
    /// The device that packets come in by.
    input: DeviceName,
    /// The namespace's devices, as a program knows them.
    declared: Vec<Device>,
}

impl<'a> Bench<'a> {
    /// Makes the namespace and its devices. Packets come in by the first device that the rules name, or by one that
    /// they don't. polc keeps its pins and files in `bpffs` and `state`.
    ///
    /// # Errors
    /// The kernel or a tool refuses.
    pub fn new(
        rules: &'a Stateless,
        sets: &[String],
        named: bool,
        bpffs: &str,
        state: &str,
    ) -> Result<Bench<'a>, NetfilterError> {
        let ruleset = &rules.session.ruleset;
        let sys = Sys::new();
        let names = device_names(ruleset, Field::InDevice);
        let input = names.into_iter().next().filter(|_| named).unwrap_or_else(|| OTHER.to_string());
        let netfilter = Netfilter::new(&sys, ruleset.family, std::slice::from_ref(&input), OUTPUT)?;
        for sets in sets {
            netfilter.load_sets(sets)?;
        }
        let tool = match ruleset.semantics {
            Semantics::Legacy => Tool::Legacy,
            Semantics::Nft => Tool::Nft,
        };
        let store = Store::new(&PathBuf::from(bpffs), &PathBuf::from(state)).map_err(refused)?;
        let declared = net::devices(&sys).map_err(refused)?;
        let declared = declared.iter().filter_map(|device| {
            DeviceName::new(&device.name).map(|name| Device { ifindex: device.ifindex, name })
        });
        let declared = declared.collect();
        let input = DeviceName::new(&input).expect("rules name devices");
        Ok(Bench { rules, netfilter, tool, sys, store, input, declared })
    }

    /// Lets all of `who` decide at least `packets` packets that can be compared, on their way by `route`.
    ///
    /// # Errors
    /// The kernel or a tool refuses.
    pub fn compare(
        &mut self,
        route: Route,
        who: &[Attach],
        packets: usize,
    ) -> Result<Compared, NetfilterError> {
        let mut compared = Compared::default();
        self.netfilter.route(route)?;
        let judges: Vec<Judge> =
            who.iter().map(|attach| self.judge(*attach, route)).collect::<Result<_, NetfilterError>>()?;
        // What is compiled of the same text at one place is at the others.
        let kept = self.comparable(route, &judges[0], packets, &mut compared)?;
        let expected = self.decide(Who::Iptables, &kept)?;
        if let Some(at) = kept.iter().zip(&expected.passed).position(|((_, first), again)| first != again) {
            let (sample, _) = &kept[at];
            compared.difference =
                Some(format!("iptables decides otherwise the second time: {}", text(sample)));
            return Ok(compared);
        }
        compared.passed = expected.passed.iter().flatten().count();
        let kept: Vec<Sample> = kept.into_iter().map(|(sample, _)| sample).collect();
        for judge in &judges {
            self.apply(judge)?;
            let found = self.decide(Who::Polc(judge.attach), &known(&kept));
            let difference =
                found.and_then(|found| self.difference(judge, &kept, &expected, &found, &mut compared));
            self.flush(judge)?;
            compared.packets += kept.len();
            compared.counters += expected.counts.len();
            compared.counters_hit += expected.counts.values().filter(|count| **count != (0, 0)).count();
            if let Some(difference) = difference? {
                compared.difference = Some(format!("{} {route:?}: {difference}", judge.attach));
                break;
            }
        }
        for sample in &kept {
            for kind in kinds(self.rules.session.ruleset.family, &sample.input) {
                *compared.kinds.entry(kind).or_default() += 1;
            }
        }
        Ok(compared)
    }

    /// Packets that can be compared, and what iptables does with each.
    fn comparable(
        &mut self,
        route: Route,
        judge: &Judge,
        packets: usize,
        compared: &mut Compared,
    ) -> Result<Vec<(Sample, Option<u32>)>, NetfilterError> {
        let hook = hook(route);
        let ruleset = &self.rules.session.ruleset;
        self.netfilter.load(self.tool, &self.rules.text)?;
        let mut kept = Vec::new();
        for round in 0..ROUNDS_MAX {
            let wanted = packets - kept.len();
            let made =
                samples(ruleset, &Env::default(), &[self.input], hook, wanted + wanted / 8 + 64, 7 + round);
            for batch in made {
                let frames: Vec<_> = batch.iter().map(|sample| sample.frame.clone()).collect();
                let passages = self.netfilter.run(&frames, Entry::Stack)?;
                for (sample, passage) in batch.into_iter().zip(passages) {
                    match judge.leaves_out(&sample, &passage) {
                        Some(why) => *compared.left_out.entry(why).or_default() += 1,
                        None => kept.push((sample, Who::Iptables.passed(&passage))),
                    }
                }
            }
            if kept.len() >= packets {
                break;
            }
        }
        kept.truncate(packets);
        let (family, mut numbered) = (ruleset.family, Vec::with_capacity(kept.len()));
        // Numbers are unique in a batch only.
        for chunk in kept.chunks(FRAMES_MAX) {
            let batch: Vec<Sample> = chunk.iter().map(|(sample, _)| sample.clone()).collect();
            numbered
                .extend(renumbered(family, &batch).into_iter().zip(chunk.iter().map(|(_, passed)| *passed)));
        }
        Ok(numbered)
    }

    /// Sends packets to whoever is in force, and reads what was counted for them.
    fn decide(&mut self, who: Who, samples: &[(Sample, Option<u32>)]) -> Result<Decided, NetfilterError> {
        let before = match who {
            Who::Iptables => {
                self.netfilter.load(self.tool, &self.rules.text)?;
                Counts::new()
            }
            Who::Polc(attach) => self.counted(attach)?,
        };
        let mut passed = Vec::with_capacity(samples.len());
        for batch in samples.chunks(FRAMES_MAX) {
            let frames: Vec<_> = batch.iter().map(|(sample, _)| sample.frame.clone()).collect();
            let passages = self.netfilter.run(&frames, who.entry())?;
            passed.extend(passages.iter().map(|passage| who.passed(passage)));
        }
        let counts = match who {
            Who::Iptables => {
                let counts = self.saved()?;
                self.netfilter.load(self.tool, EMPTY)?;
                counts
            }
            Who::Polc(attach) => {
                let mut counts = self.counted(attach)?;
                for (key, (packets, bytes)) in before {
                    let count = counts.entry(key).or_default();
                    *count = (count.0 - packets, count.1 - bytes);
                }
                counts
            }
        };
        Ok(Decided { passed, counts })
    }

    /// What iptables counted. iptables-nft gives policies counters only where the text declares them.
    fn saved(&self) -> Result<Counts, NetfilterError> {
        let saved = self.netfilter.save(self.tool)?;
        let counted = |chain: &str| {
            let declared = |line: &str| line.strip_prefix(':').is_some_and(|line| line.starts_with(chain));
            self.tool == Tool::Legacy || self.rules.text.lines().any(declared)
        };
        let lines = counter_lines(&saved).into_iter();
        let lines = lines.filter(|line| {
            // OUTPUT sees none of the packets, and no policy of other chains counts them.
            line.table == "filter" && line.chain != "OUTPUT" && (line.number > 0 || counted(&line.chain))
        });
        Ok(lines.map(|line| ((line.chain, line.number), (line.packets, line.bytes))).collect())
    }

    /// What polc's programs at an attach point counted.
    fn counted(&self, attach: Attach) -> Result<Counts, NetfilterError> {
        let mut counts = Counts::new();
        for (slot, _) in self.programs(attach) {
            let open = status::open(&self.sys, &self.store, &slot).map_err(refused)?;
            let counted = open.counted(&self.sys).map_err(refused)?;
            let counted = open.object.manifest.counted.iter().zip(counted);
            // Rules that polc adds tell packets for this host from others.
            let counted = counted.filter(|(what, _)| what.rule != Some(GUARD_NUMBER));
            for (what, (packets, bytes)) in counted {
                let count = counts.entry((what.chain.clone(), what.rule.unwrap_or(0))).or_default();
                *count = (count.0 + packets, count.1 + bytes);
            }
        }
        Ok(counts)
    }

    /// What polc does otherwise than iptables, in as few packets as show it.
    fn difference(
        &mut self,
        judge: &Judge,
        samples: &[Sample],
        expected: &Decided,
        found: &Decided,
        compared: &mut Compared,
    ) -> Result<Option<String>, NetfilterError> {
        let counted = unequal(&expected.counts, &found.counts);
        let pairs = expected.passed.iter().zip(&found.passed).enumerate();
        let differing: Vec<usize> =
            pairs.filter(|(_, (one, other))| one != other).map(|(at, _)| at).collect();
        if let Some(&at) = differing.first() {
            let again: Vec<Sample> = differing.iter().map(|&at| samples[at].clone()).collect();
            let lost = differing.iter().all(|&at| found.passed[at].is_none());
            if lost && counted.is_none() && self.agree(judge, &again)? {
                // The kernel drops a frame when it has no memory for a packet (drivers/net/veth.c,
                // `veth_xdp_rcv_bulk_skb`).
                *compared.left_out.entry("lost once behind the program, which counted it").or_default() +=
                    again.len();
                return Ok(None);
            }
            let (one, other) = (expected.passed[at], found.passed[at]);
            let packet = text(&samples[at]);
            let levels = self.levels(judge, &samples[at].input);
            let (count, counted) = (differing.len(), counted.unwrap_or("the counters are the same".into()));
            return Ok(Some(format!(
                "{count} packets, the first: iptables: {}, polc: {} ({levels}; {counted}) {packet}",
                fate(one),
                fate(other)
            )));
        }
        let Some(mut difference) = counted else { return Ok(None) };
        // By halves, to the one packet whose counters differ when it goes alone.
        let mut suspects = samples.to_vec();
        while suspects.len() > 1 {
            let half = suspects.split_off(suspects.len() / 2);
            let mut guilty = None;
            for part in [suspects, half] {
                let part = known(&part);
                let expected = self.decide(Who::Iptables, &part)?;
                let found = self.decide(Who::Polc(judge.attach), &part)?;
                if let Some(shown) = unequal(&expected.counts, &found.counts) {
                    guilty = Some((part.into_iter().map(|(sample, _)| sample).collect(), shown));
                    break;
                }
            }
            match guilty {
                Some((part, shown)) => (suspects, difference) = (part, shown),
                None => return Ok(Some(format!("{difference}, not shown by fewer packets"))),
            }
        }
        Ok(Some(format!("{difference} {}", suspects.first().map(text).unwrap_or_default())))
    }

    /// Whether iptables and polc do the same with packets that go alone, and count the same for them.
    fn agree(&mut self, judge: &Judge, samples: &[Sample]) -> Result<bool, NetfilterError> {
        if samples.len() > FRAMES_MAX {
            return Ok(false);
        }
        let samples = known(&renumbered(self.rules.session.ruleset.family, samples));
        let expected = self.decide(Who::Iptables, &samples)?;
        let found = self.decide(Who::Polc(judge.attach), &samples)?;
        Ok(expected.passed == found.passed && unequal(&expected.counts, &found.counts).is_none())
    }

    /// What polc's levels make of a packet.
    fn levels(&self, judge: &Judge, input: &Input) -> String {
        let compiled = polc::compile(&judge.ruleset, &judge.place, &judge.env, &self.devices(judge.attach));
        let levels = [Level::Ruleset, Level::Classifier, Level::Decision, Level::Plan].map(|level| {
            let state = &mut State::new(0);
            let outcome = run(level, &judge.ruleset, &compiled, &judge.env, input, state);
            format!("{level}: {} by {}", outcome.ending.verdict.word(), outcome.ending.by)
        });
        levels.join(", ")
    }

    /// The host's devices; what sits on one knows which it is.
    fn devices(&self, attach: Attach) -> Devices {
        let fixed_in = (attach != Attach::Netfilter).then_some(self.input);
        Devices { declared: self.declared.clone(), fixed_in, fixed_out: None }
    }

    /// polc's programs at an attach point: at netfilter one for each hook that arriving packets may come to.
    fn programs(&self, attach: Attach) -> Vec<(SlotName, Place)> {
        let family = self.rules.session.ruleset.family;
        if attach != Attach::Netfilter {
            let slot = SlotName { device: Some(self.input.to_string()), attach, hook: None, family };
            return vec![(slot, arriving(attach))];
        }
        let program = |hook| {
            let slot = SlotName { device: None, attach, hook: Some(hook), family };
            (slot, place(&[hook], attach, Mode::Replace, true))
        };
        vec![program(Hook::Input), program(Hook::Forward)]
    }

    fn judge(&self, attach: Attach, route: Route) -> Result<Judge, NetfilterError> {
        if attach == Attach::Netfilter {
            let ruleset = self.rules.session.ruleset.clone();
            let place = place(&[hook(route)], attach, Mode::Replace, true);
            return Ok(Judge { attach, ruleset, place, env: self.env()? });
        }
        let mut ruleset = self.rules.session.ruleset.clone();
        let (place, env) = (arriving(attach), self.env()?);
        split_local(&mut ruleset, &place, &env);
        Ok(Judge { attach, ruleset, place, env })
    }

    /// The host as the namespace makes it.
    fn env(&self) -> Result<Env, NetfilterError> {
        let found = net::addresses(&self.sys, self.rules.session.ruleset.family).map_err(refused)?;
        Ok(Env { local: Some(found.local), broadcast: found.broadcast, ..Env::default() })
    }

    /// Puts the rules in force at an attach point, as `polc apply --mode replace` does.
    fn apply(&self, judge: &Judge) -> Result<(), NetfilterError> {
        let mut session = self.rules.session.clone();
        session.ruleset = judge.ruleset.clone();
        for (slot, place) in self.programs(judge.attach) {
            self.apply_one(judge, &session, &slot, &place)?;
        }
        Ok(())
    }

    fn apply_one(
        &self,
        judge: &Judge,
        session: &Session,
        slot: &SlotName,
        place: &Place,
    ) -> Result<(), NetfilterError> {
        let compiled = polc::compile(&session.ruleset, place, &judge.env, &self.devices(judge.attach));
        let said =
            |findings: &[Diagnostic]| NetfilterError::Refused("polc apply".into(), format!("{findings:?}"));
        if !compiled.diagnostics.is_empty() {
            return Err(said(&compiled.diagnostics));
        }
        let (object, _) = object(session, &compiled).map_err(|findings| said(&findings))?;
        let request = Request {
            slot,
            object: &object,
            source: "rules",
            files: &[],
            contents: &[],
            checks: &[],
            generic: false,
            clsact: false,
            order: Order::Alone,
            hook_order: Default::default(),
            over: &[],
            alone: false,
            confirm: None,
            initial: &[],
        };
        apply(&self.sys, &self.store, &request, &mut |_| Ok(())).map(|_| ()).map_err(refused)
    }

    fn flush(&self, judge: &Judge) -> Result<(), NetfilterError> {
        for (slot, _) in self.programs(judge.attach) {
            flush(&self.sys, &self.store, &slot).map_err(refused)?;
        }
        Ok(())
    }
}

/// The hook that decides packets on a route.
fn hook(route: Route) -> Hook {
    match route {
        Route::Forward => Hook::Forward,
        Route::Local => Hook::Input,
    }
}

/// No rules, and policies that let everything through.
const EMPTY: &str = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n";

/// The rules as polc applies them at a place, which say what can't be compared there.
#[derive(Debug)]
struct Judge {
    attach: Attach,
    ruleset: Ruleset,
    place: Place,
    env: Env,
}

impl Judge {
    /// Whether rules ask for the offsets of fragments (`-f`).
    fn asks_offsets(&self) -> bool {
        let mut clauses = self.ruleset.rules.values().flat_map(|rule| &rule.clauses);
        clauses.any(|clause| match &clause.kind {
            ClauseKind::Any(tests) => tests.iter().any(|test| test.field == Field::FragOffset),
            _ => false,
        })
    }

    /// Why a packet can't be compared, if so.
    fn leaves_out(&self, sample: &Sample, passage: &Passage) -> Option<&'static str> {
        if sample.frame.id == 0 {
            return Some("too short to be told apart");
        }
        let mut known = true;
        let mut trace =
            |event| known &= !matches!(event, Event::Clause(_, _, Truth::Unknown) | Event::Possible(_));
        let mut state = State::new(0);
        let outcome = self.ruleset.eval_traced(&self.place, &self.env, &sample.input, &mut state, &mut trace);
        let stages = passage.stages;
        match outcome.ending.by {
            // The kernel drops it before any hook, and a program has to, too.
            Decider::Frame(FrameKind::Malformed) => return None,
            Decider::Frame(FrameKind::Vlan) => return Some("a VLAN's, whose device is another"),
            Decider::Frame(_) => return Some("no packet of the family"),
            _ => {}
        }
        if !stages.has(Stages::PREROUTING) {
            // net/ipv6/ip6_input.c, `ip6_rcv_core`: impossible addresses, bad hop-by-hop options.
            return Some("dropped before the first hook");
        }
        if !stages.has(Stages::FORWARD) && !stages.has(Stages::INPUT) {
            // net/ipv4/ip_input.c, `ip_local_deliver`, reassembles before INPUT; the rest has no route.
            return Some("died in routing, or held for reassembly");
        }
        if outcome.ending.verdict == Verdict::Defer || !known {
            return Some("a fragment on which reassembly bears");
        }
        if self.ruleset.family == Family::V4
            && is_fragment(self.ruleset.family, sample)
            && self.asks_offsets()
        {
            // A program takes it for what reassembly makes of it; without conntrack, FORWARD's rules don't.
            return Some("a fragment that the kernel's rules see, and which they tell from a packet");
        }
        if self.ruleset.semantics == Semantics::Nft
            && self.ruleset.family == Family::V6
            && is_fragment(self.ruleset.family, sample)
        {
            // include/net/netfilter/nf_tables_ipv6.h: nft takes the IPv6 header for the transport header.
            return Some("a later fragment, of which nft reads other bytes");
        }
        None
    }
}

fn is_fragment(family: Family, sample: &Sample) -> bool {
    kinds(family, &sample.input).contains(&"fragments")
}

/// What kinds a packet is of.
fn kinds(family: Family, input: &Input) -> Vec<&'static str> {
    let place = arriving(Attach::Xdp);
    let Ok(view) = polc_ir::packet::View::new(family, &place, input) else { return vec!["malformed"] };
    let options = match family {
        Family::V4 => input.frame.get(14).is_some_and(|first| first & 15 > 5),
        Family::V6 => input.frame.get(20).is_some_and(|next| [0, 43, 44, 51, 60].contains(next)),
    };
    let mut kinds = Vec::new();
    if view.get(Field::Fragment) != 0 {
        kinds.push("fragments");
    }
    if view.get(Field::L4Len) < 8 {
        kinds.push("cut short");
    }
    if options {
        kinds.push(if family == Family::V4 { "with options" } else { "with extension headers" });
    }
    kinds
}

/// The packets, of which nothing is known beforehand.
fn known(samples: &[Sample]) -> Vec<(Sample, Option<u32>)> {
    samples.iter().map(|sample| (sample.clone(), None)).collect()
}

/// The counters that differ, if any do.
fn unequal(expected: &Counts, found: &Counts) -> Option<String> {
    let none = (0, 0);
    let differing: Vec<String> = expected
        .iter()
        .map(|(key, count)| (key, *count, *found.get(key).unwrap_or(&none)))
        .filter(|(_, expected, found)| expected != found)
        .map(|((chain, rule), expected, found)| format!("{chain} {rule}: {expected:?} and {found:?}"))
        .take(8)
        .collect();
    (!differing.is_empty())
        .then(|| format!("packets and bytes of iptables and polc: {}", differing.join("; ")))
}

fn fate(passed: Option<u32>) -> String {
    passed.map_or("dropped".to_string(), |mark| format!("passed with mark {mark:#x}"))
}

fn text(sample: &Sample) -> String {
    let hex: String = sample.input.frame.iter().map(|byte| format!("{byte:02x}")).collect();
    let device = sample.input.in_device.map(|name| name.to_string()).unwrap_or_default();
    format!("by {device} {hex}")
}

fn refused(error: polc_loader::Error) -> NetfilterError {
    NetfilterError::Refused("polc".into(), error.to_string())
}
