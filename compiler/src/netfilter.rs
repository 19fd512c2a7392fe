//! `netfilter`: the rules' meaning against the running kernel's own packet filter.
//!
//! The rule set is restored with iptables in a namespace of its own, the packets of `verify` go through, and for each
//! the verdict and the mark are compared with those of [`Ruleset::eval`], and at the end every rule's and every
//! policy's counters. What the kernel does around the rules is *observed*, not modelled: how far a packet came says
//! at which hook it was evaluated, so a packet that died in routing is only compared at PREROUTING.
//!
//! Left out are packets on which the rules' meaning says nothing (deferred: a limit, a search of the payload), and
//! what a kernel can't be asked in this way: `nat` tables are not restored, since a connection's first packet decides
//! for the others.

use std::collections::BTreeMap;

use polc_ir::env::{Connection, Connections, Device, Env, Fragments, Input, Mode, Place};
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::{Family, Hook, Semantics, TableKind};
use polc_ir::interval::Interval;
use polc_ir::outcome::{Decider, FrameKind, Outcome, Verdict};
use polc_ir::packet::View;
use polc_ir::ruleset::{Action, ClauseKind, Counters, Event, Policy, Ruleset, Truth};
use polc_ir::source::SourceMap;
use polc_ir::state::State;
use polc_loader::netfilter::{
    CounterLine, DEVICES_MAX, FRAMES_MAX, Frame, Netfilter, NetfilterError, Passage, Route, Stages, Tool,
    counter_lines,
};
use polc_loader::sys::Sys;

use crate::flatten::flatten;
use crate::session::Session;
use crate::witness::Witnesses;

/// Longest frame sent.
const FRAME_BYTES_MAX: usize = 1_514 + 8;

/// Bytes of an Ethernet header.
const ETHERNET_BYTES: usize = 14;

/// Targets that change neither the packet nor its fate.
const HARMLESS: [&str; 4] = ["AUDIT", "CLASSIFY", "LOG", "NFLOG"];

/// The device packets leave by, and one they come by, if rules name none.
const OUTPUT: &str = "polc-out";
const OTHER: &str = "polc-other";

/// `0x100`: the packet is deliberately without a connection; `0x01`: none could be found for it
/// (include/uapi/linux/netfilter/xt_conntrack.h).
const STATE_UNTRACKED: u16 = 0x100;
const STATE_INVALID: u16 = 1;

/// A packet sent through.
#[derive(Clone, Debug)]
pub struct Sample {
    /// As it was sent.
    pub input: Input,
    frame: Frame,
}

/// Where rules and kernel differ.
#[derive(Clone, Debug)]
pub enum Difference {
    /// In a verdict or a mark.
    Packet {
        /// The hook at which they differ.
        hook: Hook,
        /// What the rules say there.
        expected: Outcome,
        /// What the kernel did.
        passage: Passage,
    },
    /// In counters: what the kernel counted, and what the rules count. Of one packet alone if it shows them alone.
    Counters(Vec<(CounterLine, Counters)>),
    /// In how many rules there are: a table and chain, and the number the kernel has, and the rules have.
    Rules(String, String, usize, usize),
    /// The packet fared otherwise the second time, when only such as can be compared went through.
    Unsteady(Passage),
}

/// What was compared.
#[derive(Clone, Debug, Default)]
pub struct Compared {
    /// Packets that went through and were compared.
    pub packets: usize,
    /// What became of them, by the rules: verdicts, and `routing` for those that did not come to the hook.
    pub verdicts: BTreeMap<&'static str, usize>,
    /// Packets left out, by reason.
    pub left_out: BTreeMap<&'static str, usize>,
    /// Rules and policies whose counters were compared.
    pub counters: usize,
    /// How many of those were not zero.
    pub counters_hit: usize,
    /// The first difference, with the packet that shows it if there is one.
    pub difference: Option<(Option<Sample>, Difference)>,
}

/// What is compared.
#[derive(Clone, Copy, Debug)]
pub struct Comparison<'a> {
    /// The rule set.
    pub session: &'a Session,
    /// Its sets, as `ipset save` writes them.
    pub sets: &'a [String],
    /// How packets are routed.
    pub route: Route,
    /// How many packets are made.
    pub packets: usize,
    /// Seed of the packets.
    pub seed: u64,
}

/// What a packet showed.
enum Judged {
    /// Rules and kernel agree; a verdict, or how far it came.
    Same(&'static str),
    /// It can't be compared, and must not be counted.
    LeftOut(&'static str),
    /// They differ.
    Differs(Hook, Outcome),
}

/// Compares a rule set with the kernel's packet filter.
///
/// # Errors
/// The kernel's packet filter can't be asked, or refuses the rules.
pub fn compare(
    comparison: &Comparison<'_>,
    progress: &mut dyn FnMut(usize),
) -> Result<Compared, NetfilterError> {
    let session = comparison.session;
    let ruleset = comparable(&session.ruleset);
    let tool = match ruleset.semantics {
        Semantics::Legacy => Tool::Legacy,
        Semantics::Nft => Tool::Nft,
    };
    let mut inputs = names(&ruleset, Field::InDevice);
    inputs.truncate(DEVICES_MAX - 1);
    inputs.push(OTHER.to_string());
    let output = names(&ruleset, Field::OutDevice).into_iter().next().unwrap_or_else(|| OUTPUT.to_string());
    let netfilter = Netfilter::new(&Sys::new(), ruleset.family, &inputs, &output)?;
    let mut against = Against {
        netfilter,
        tool,
        text: without_nat(&session.sources, session),
        env: env(&ruleset, comparison.route),
        state: State::new(0),
        inputs: inputs.iter().filter_map(|name| DeviceName::new(name)).collect(),
        output: DeviceName::new(&output),
        ruleset,
    };
    against.netfilter.route(comparison.route)?;
    for sets in comparison.sets {
        against.netfilter.load_sets(sets)?;
    }
    against.compare(comparison, progress)
}

/// The rule set as far as it can be compared: no base chain of `nat`, and targets without consequence do nothing.
fn comparable(ruleset: &Ruleset) -> Ruleset {
    let mut ruleset = ruleset.clone();
    let tables = &ruleset.tables;
    for chain in ruleset.chains.values_mut() {
        if tables[chain.table].kind == TableKind::Nat {
            chain.base = None;
        }
    }
    for rule in ruleset.rules.values_mut() {
        if matches!(&rule.action, Action::Effect { what, .. } if HARMLESS.contains(&what.name.as_str())) {
            rule.action = Action::Continue;
        }
    }
    ruleset
}

/// The text without its `nat` tables; lines keep their numbers.
fn without_nat(sources: &SourceMap, session: &Session) -> String {
    let mut text = String::new();
    let mut nat = false;
    for line in sources.file(session.rules_file).text().lines() {
        if let Some(name) = line.strip_prefix('*') {
            nat = name.trim() == "nat";
        }
        if !nat {
            text += line;
        }
        nat &= line.trim() != "COMMIT";
        text.push('\n');
    }
    text
}

/// Devices that rules name, and that can be made.
fn names(ruleset: &Ruleset, field: Field) -> Vec<String> {
    let clauses = ruleset.rules.values().flat_map(|rule| &rule.clauses);
    let tests = clauses.filter_map(|clause| match &clause.kind {
        ClauseKind::Any(tests) | ClauseKind::Hotdrop(tests) => Some(tests),
        ClauseKind::Effect(_) | ClauseKind::Opaque(_) | ClauseKind::Beyond(_) => None,
    });
    let mut names = Vec::new();
    for test in tests.flatten().filter(|test| test.field == field) {
        for interval in test.values.intervals() {
            for value in [interval.lo(), interval.hi()] {
                let name = DeviceName::from_value(value).to_string();
                // net/core/dev.c, `dev_valid_name`; and what the namespace has already.
                let valid = name.chars().all(|c| c.is_ascii_graphic() && c != '/' && c != ':' && c != '%');
                let free = !["", ".", "..", "lo", "all", "default"].contains(&name.as_str());
                if DeviceName::new(&name).is_some() && valid && free && !names.contains(&name) {
                    names.push(name);
                }
            }
        }
    }
    names
}

/// The host as the namespace makes it.
fn env(ruleset: &Ruleset, route: Route) -> Env {
    let all = match (route, ruleset.family) {
        (Route::Forward, _) => Vec::new(),
        // net/ipv4/fib_frontend.c, `__inet_dev_addr_type`: broadcast and multicast come before the routes.
        (Route::Local, Family::V4) => {
            [Interval::new(1, 0xdfff_ffff), Interval::new(0xf000_0000, 0xffff_fffe)].into()
        }
        (Route::Local, Family::V6) => vec![Interval::new(0, (0xff00 << 112) - 1)],
    };
    // The loopback device's own broadcast address is a route of its own, more exact than any here.
    let broadcast = (ruleset.family == Family::V4).then(|| Interval::new(0x7fff_ffff, 0x7fff_ffff)).flatten();
    Env {
        local: Some(all.into_iter().flatten().collect()),
        broadcast: broadcast.into_iter().collect(),
        ..Env::default()
    }
}

struct Against {
    netfilter: Netfilter,
    tool: Tool,
    text: String,
    ruleset: Ruleset,
    env: Env,
    state: State,
    inputs: Vec<DeviceName>,
    output: Option<DeviceName>,
}

impl Against {
    fn compare(
        &mut self,
        comparison: &Comparison<'_>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Compared, NetfilterError> {
        let mut compared = Compared::default();
        let batches = self.samples(comparison);
        self.netfilter.load(self.tool, &self.text)?;
        // What can't be compared must not be counted, and is known only once it has gone through.
        let mut kept = Vec::new();
        let mut all = true;
        for batch in batches {
            let passages = self.send(&batch)?;
            let mut keep = Vec::new();
            for (sample, passage) in batch.into_iter().zip(passages) {
                match self.judge(&sample, &passage) {
                    Judged::LeftOut(why) => {
                        *compared.left_out.entry(why).or_default() += 1;
                        all = false;
                    }
                    Judged::Same(what) => {
                        *compared.verdicts.entry(what).or_default() += 1;
                        keep.push(sample);
                    }
                    Judged::Differs(hook, expected) => {
                        let difference = Difference::Packet { hook, expected, passage };
                        compared.difference = Some((Some(sample), difference));
                        return Ok(compared);
                    }
                }
            }
            compared.packets += keep.len();
            progress(compared.packets);
            kept.push(keep);
        }
        if !all && let Some(difference) = self.restart(&kept)? {
            compared.difference = Some(difference);
            return Ok(compared);
        }
        let (difference, counters, hit) = self.counters()?;
        (compared.counters, compared.counters_hit) = (counters, hit);
        if let Some(difference) = difference {
            compared.difference = Some(self.culprit(kept, difference)?);
        }
        Ok(compared)
    }

    /// Packets made for the rules, in batches.
    fn samples(&self, comparison: &Comparison<'_>) -> Vec<Vec<Sample>> {
        let hook = match comparison.route {
            Route::Forward => Hook::Forward,
            Route::Local => Hook::Input,
        };
        let place = place(&[Hook::Prerouting, hook]);
        let classifier = flatten(&self.ruleset, &place, &self.env, &mut Vec::new());
        let devices: Vec<Device> =
            self.inputs.iter().zip(1..).map(|(&name, ifindex)| Device { ifindex, name }).collect();
        let made = Witnesses::new(&classifier, &devices, comparison.seed);
        let mut batches = vec![Vec::new()];
        let mut count = 0;
        // Frames that are no packets of this family are passed over; most are.
        for input in made.take(comparison.packets.saturating_mul(2)) {
            let batch = batches.last_mut().expect("there is always one");
            let id = batch.len() as u32 + 1;
            let Some(sample) = self.sample(input, id) else { continue };
            batch.push(sample);
            count += 1;
            if count == comparison.packets {
                break;
            }
            if id as usize == FRAMES_MAX {
                batches.push(Vec::new());
            }
        }
        batches
    }

    /// Makes a packet one that can be sent and told apart; `None` if it can't be sent.
    fn sample(&self, mut input: Input, id: u32) -> Option<Sample> {
        let family = self.ruleset.family;
        let frame = &mut input.frame;
        if frame.len() < ETHERNET_BYTES || frame.len() > FRAME_BYTES_MAX {
            return None;
        }
        let network = network_offset(family, frame)?;
        // To this host's device, if to any one device.
        if frame[0] & 1 == 0 {
            frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
        }
        let told = stamp(family, &mut frame[network..], id);
        let device = self.inputs.iter().position(|name| Some(*name) == input.in_device).unwrap_or(0);
        input.in_device = Some(self.inputs[device]);
        input.out_device = None;
        input.mark = 0;
        input.packet_type = None;
        let frame = Frame { bytes: input.frame.clone(), id: if told { id } else { 0 }, device };
        Some(Sample { input, frame })
    }

    fn send(&mut self, samples: &[Sample]) -> Result<Vec<Passage>, NetfilterError> {
        let frames: Vec<Frame> = samples.iter().map(|sample| sample.frame.clone()).collect();
        self.netfilter.run(&frames)
    }

    /// What a packet's passage shows, and counts it.
    fn judge(&mut self, sample: &Sample, passage: &Passage) -> Judged {
        let stages = passage.stages;
        let connection = connection(passage);
        let mut input = Input { connection: Some(connection), ..sample.input.clone() };
        let hook = Hook::Prerouting;
        let outcome = self.eval(hook, &input);
        if let Decider::Frame(kind) = outcome.ending.by {
            return match kind {
                _ if stages.has(Stages::PREROUTING) => Judged::Differs(hook, outcome),
                FrameKind::Malformed => Judged::Same("malformed"),
                FrameKind::Vlan => Judged::Same("vlan"),
                _ => Judged::Same("no packet"),
            };
        }
        if sample.frame.id == 0 {
            return Judged::LeftOut("too short to be told apart");
        }
        if !stages.has(Stages::PREROUTING) {
            // net/ipv6/ip6_input.c, `ip6_rcv_core`, drops impossible addresses and bad hop-by-hop options.
            return match self.ruleset.family {
                Family::V4 => Judged::Differs(hook, outcome),
                Family::V6 => Judged::LeftOut("dropped before the first hook"),
            };
        }
        if !stages.has(Stages::WHOLE) {
            // No rule comes before it.
            return Judged::LeftOut("held for reassembly");
        }
        // net/ipv6/reassembly.c: a Fragment header that stands for the whole packet is taken out.
        let place = place(&[hook]);
        let bytes = View::new(self.ruleset.family, &place, &input).map_or(0, |view| view.bytes());
        if u64::from(passage.length) != bytes {
            return Judged::LeftOut("changed by reassembly");
        }
        let passed = stages.has(Stages::ROUTED);
        match outcome.ending.verdict {
            Verdict::Defer => return Judged::LeftOut("not decided by the rules alone"),
            Verdict::Accept if passed && passage.mark_routed == outcome.mark => {}
            Verdict::Drop | Verdict::Reject(_) if !passed => {
                return Judged::Same(outcome.ending.verdict.word());
            }
            _ => return Judged::Differs(hook, outcome),
        }
        let (hook, passed) = if stages.has(Stages::FORWARD) {
            (Hook::Forward, stages.has(Stages::FORWARDED))
        } else if stages.has(Stages::INPUT) {
            (Hook::Input, stages.has(Stages::DELIVERED))
        } else {
            return Judged::Same("routing");
        };
        input.mark = outcome.mark;
        if hook == Hook::Forward {
            input.out_device = self.output;
            hop(self.ruleset.family, &mut input.frame);
        }
        let outcome = self.eval(hook, &input);
        match outcome.ending.verdict {
            Verdict::Defer => Judged::LeftOut("not decided by the rules alone"),
            Verdict::Accept if passed && passage.mark == outcome.mark => Judged::Same("accept"),
            Verdict::Drop | Verdict::Reject(_) if !passed => Judged::Same(outcome.ending.verdict.word()),
            _ => Judged::Differs(hook, outcome),
        }
    }

    /// What the rules say at a hook; deferred as soon as a clause's truth is not known, since then what is counted
    /// isn't either.
    fn eval(&mut self, hook: Hook, input: &Input) -> Outcome {
        let mut known = true;
        let mut trace =
            |event| known &= !matches!(event, Event::Clause(_, _, Truth::Unknown) | Event::Possible(_));
        let mut outcome =
            self.ruleset.eval_traced(&place(&[hook]), &self.env, input, &mut self.state, &mut trace);
        if !known {
            outcome.ending.verdict = Verdict::Defer;
        }
        outcome
    }

    /// Sends these alone, with all counters at zero first. They were judged before; here they are counted.
    fn restart(
        &mut self,
        batches: &[Vec<Sample>],
    ) -> Result<Option<(Option<Sample>, Difference)>, NetfilterError> {
        self.netfilter.load(self.tool, &self.text)?;
        self.state = State::new(0);
        for batch in batches {
            for (sample, passage) in batch.iter().zip(self.send(batch)?) {
                let difference = match self.judge(sample, &passage) {
                    Judged::Same(_) => continue,
                    Judged::LeftOut(_) => Difference::Unsteady(passage),
                    Judged::Differs(hook, expected) => Difference::Packet { hook, expected, passage },
                };
                return Ok(Some((Some(sample.clone()), difference)));
            }
        }
        Ok(None)
    }

    /// The counters that differ, or how many rules do, and how many counters were compared and were not zero.
    fn counters(&self) -> Result<(Option<Difference>, usize, usize), NetfilterError> {
        let lines = counter_lines(&self.netfilter.save(self.tool)?);
        let mut expected: BTreeMap<(String, &str, u32), Counters> = BTreeMap::new();
        let mut rules: BTreeMap<(String, &str), usize> = BTreeMap::new();
        for (id, chain) in &self.ruleset.chains {
            let table = self.ruleset.tables[chain.table].kind;
            // Base chains that let everything on are no part of a path, and nothing is counted there.
            let idle = chain.rules.is_empty() && chain.base.is_some_and(|base| base.policy == Policy::Accept);
            if table == TableKind::Nat || idle {
                continue;
            }
            let table = table.to_string();
            if chain.base.is_some() {
                expected.insert((table.clone(), &chain.name, 0), self.state.policies[id]);
            }
            rules.insert((table.clone(), &chain.name), chain.rules.len());
            for &rule in &chain.rules {
                let number = self.ruleset.rules[rule].number;
                expected.insert((table.clone(), &chain.name, number), self.state.rules[rule]);
            }
        }
        let mut found: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        let (mut compared, mut hit) = (0, 0);
        let mut differing = Vec::new();
        for line in &lines {
            if line.number > 0 {
                *found.entry((&line.table, &line.chain)).or_default() += 1;
            }
            // The tool makes base chains that the rule set does not mention.
            let key = (line.table.clone(), line.chain.as_str(), line.number);
            let Some(&expected) = expected.get(&key) else { continue };
            let counted = Counters { packets: line.packets, bytes: line.bytes };
            compared += 1;
            hit += usize::from(counted != Counters::default());
            if counted != expected {
                differing.push((line.clone(), expected));
            }
        }
        let other = rules.into_iter().find_map(|((table, chain), count)| {
            let have = found.get(&(table.as_str(), chain)).copied().unwrap_or(0);
            (have != count).then(|| Difference::Rules(table, chain.to_string(), have, count))
        });
        let differing = (!differing.is_empty()).then_some(Difference::Counters(differing));
        Ok((other.or(differing), compared, hit))
    }

    /// One packet whose counters differ when it goes alone, and the difference, by halves; if there is none, what was
    /// found before.
    fn culprit(
        &mut self,
        batches: Vec<Vec<Sample>>,
        difference: Difference,
    ) -> Result<(Option<Sample>, Difference), NetfilterError> {
        if let Difference::Rules(..) = difference {
            return Ok((None, difference));
        }
        let mut suspects: Vec<Sample> = batches.into_iter().flatten().collect();
        let mut difference = difference;
        let family = self.ruleset.family;
        while suspects.len() > 1 {
            let half = suspects.split_off(suspects.len() / 2);
            let mut guilty = None;
            for part in [suspects, half] {
                // Numbers are unique in a batch only.
                let batches: Vec<Vec<Sample>> =
                    part.chunks(FRAMES_MAX).map(|part| renumbered(family, part)).collect();
                if let Some(found) = self.restart(&batches)? {
                    return Ok(found);
                }
                if let (Some(found), ..) = self.counters()? {
                    guilty = Some((part, found));
                    break;
                }
            }
            let Some((part, found)) = guilty else { return Ok((None, difference)) };
            (suspects, difference) = (part, found);
        }
        Ok((suspects.pop(), difference))
    }
}

/// The same samples with numbers that differ among them.
fn renumbered(family: Family, samples: &[Sample]) -> Vec<Sample> {
    let mut samples = samples.to_vec();
    for (sample, id) in samples.iter_mut().zip(1..).filter(|(sample, _)| sample.frame.id != 0) {
        let frame = &mut sample.frame.bytes;
        if let Some(network) = network_offset(family, frame) {
            stamp(family, &mut frame[network..], id);
            sample.frame.id = id;
            sample.input.frame = frame.clone();
        }
    }
    samples
}

/// The hooks' chains as they are, with everything given.
fn place(path: &[Hook]) -> Place {
    Place {
        path: path.to_vec(),
        attach: None,
        mode: Mode::Accelerate,
        fragments: Fragments::AsSeen,
        connections: Connections::Given,
        local_addresses: true,
    }
}

/// What connection tracking made of a packet (net/netfilter/xt_conntrack.c, `conntrack_mt`).
fn connection(passage: &Passage) -> Connection {
    let info = passage.connection & 7;
    let state = match passage.connection {
        7 => STATE_UNTRACKED,
        0..=7 => STATE_INVALID,
        // `XT_CONNTRACK_STATE_BIT`: `enum ip_conntrack_info` without its direction.
        _ => 1 << (info % 3 + 1),
    };
    Connection { state, reply: passage.connection & 8 != 0 && info >= 3, ..Connection::default() }
}

/// Where the network header begins, if the frame is one of this family as far as its types say.
fn network_offset(family: Family, frame: &[u8]) -> Option<usize> {
    let mut at = ETHERNET_BYTES;
    loop {
        let kind = u16::from_be_bytes(frame.get(at - 2..at)?.try_into().ok()?);
        match kind {
            0x8100 | 0x88a8 if at < ETHERNET_BYTES + 8 => at += 4,
            _ if kind == family.ether_type() => return (at < frame.len()).then_some(at),
            _ => return None,
        }
    }
}

/// Puts a number into a packet's header and makes the header's checksum right; whether there is room for it.
fn stamp(family: Family, packet: &mut [u8], id: u32) -> bool {
    match family {
        Family::V4 => {
            if packet.len() < 20 {
                return false;
            }
            packet[4..6].copy_from_slice(&(id as u16).to_be_bytes());
            checksum(packet);
        }
        Family::V6 => {
            if packet.len() < 40 {
                return false;
            }
            packet[1] = packet[1] & 0xf0 | (id >> 16 & 15) as u8;
            packet[2..4].copy_from_slice(&(id as u16).to_be_bytes());
        }
    }
    true
}

/// Makes an IPv4 header's checksum right, if it is all there (RFC 1071).
fn checksum(packet: &mut [u8]) {
    let header = usize::from(packet[0] & 15) * 4;
    if header < 20 || header > packet.len() {
        return;
    }
    packet[10..12].fill(0);
    let words =
        packet[..header].chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

/// One hop less, as forwarding leaves it before the rules see it (net/ipv4/ip_forward.c, net/ipv6/ip6_output.c,
/// `ip6_forward`).
fn hop(family: Family, frame: &mut [u8]) {
    let Some(network) = network_offset(family, frame) else { return };
    let packet = &mut frame[network..];
    match family {
        Family::V4 => {
            packet[8] = packet[8].wrapping_sub(1);
            checksum(packet);
        }
        Family::V6 => packet[7] = packet[7].wrapping_sub(1),
    }
}
