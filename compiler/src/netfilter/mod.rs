//! `netfilter`: the rules' meaning against the running kernel's own packet filter.
//!
//! The rule set is restored with iptables in a namespace of its own, the packets of `verify` go through, and for each
//! the verdict and the mark are compared with those of [`Ruleset::eval`], and at the end every rule's and every
//! policy's counters. What got through must not be dropped by a program that has it as it arrives, either.
//! What the kernel does around the rules is *observed*, not modelled: how far a packet came says
//! at which hook it was evaluated, so a packet that died in routing is only compared at PREROUTING.
//!
//! Left out are packets on which the rules' meaning says nothing (deferred: a limit, a search of the payload), and
//! what a kernel can't be asked in this way: `nat` tables are not restored, since a connection's first packet decides
//! for the others, and packets come from outside and go no further than FORWARD, so none is sent through OUTPUT and
//! POSTROUTING ([`not_compared`] names what is there).

mod left;
mod packets;

use std::collections::{BTreeMap, BTreeSet};

use polc_ir::entities::Chain;
use polc_ir::env::{Attach, Connection, Connections, Counting, Env, Fragments, Input, Mode, Place};
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::{Family, Hook, Semantics, TableKind};
use polc_ir::interval::Interval;
use polc_ir::outcome::{Decider, FrameKind, Outcome, Verdict};
use polc_ir::packet::View;
use polc_ir::ruleset::{Action, Counters, Event, Policy, Ruleset, Truth, Write};
use polc_ir::source::SourceMap;
use polc_ir::state::State;
use polc_loader::netfilter::{
    CounterLine, DEVICES_MAX, Entry, FRAMES_MAX, Frame, Netfilter, NetfilterError, Passage, Route, Stages,
    Tool, counter_lines,
};
use polc_loader::sys::Sys;

use self::packets::{hop, rewrite};
use crate::place::place as place_of;
use crate::session::Session;

pub use self::left::{NotCompared, not_compared};
pub use self::packets::{Sample, device_names, renumbered, samples};

/// Targets that change neither the packet nor its fate.
const HARMLESS: [&str; 4] = ["AUDIT", "CLASSIFY", "LOG", "NFLOG"];

/// The device packets leave by, and one they come by, if rules name none.
const OUTPUT: &str = "polc-out";
const OTHER: &str = "polc-other";

/// `0x100`: the packet is deliberately without a connection; `0x01`: none could be found for it
/// (include/uapi/linux/netfilter/xt_conntrack.h).
const STATE_UNTRACKED: u16 = 0x100;
const STATE_INVALID: u16 = 1;

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
    let mut inputs = device_names(&ruleset, Field::InDevice);
    inputs.truncate(DEVICES_MAX - 1);
    inputs.push(OTHER.to_string());
    let output =
        device_names(&ruleset, Field::OutDevice).into_iter().next().unwrap_or_else(|| OUTPUT.to_string());
    let netfilter = Netfilter::new(&Sys::new(), ruleset.family, &inputs, &output)?;
    let mut against = Against {
        netfilter,
        tool,
        text: without_nat(&session.sources, session),
        env: env(&ruleset, comparison.route),
        state: State::new(0),
        early: State::new(0),
        inputs: inputs.iter().filter_map(|name| DeviceName::new(name)).collect(),
        output: DeviceName::new(&output),
        uncounted: undeclared(session, tool),
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

/// Base chains that a rule set uses without declaring them: iptables-nft makes those without counters, which it prints
/// as zero.
fn undeclared(session: &Session, tool: Tool) -> BTreeSet<Chain> {
    let declared = |chain: Chain| {
        let span = session.ruleset.chains[chain].span;
        let file = session.sources.file(span.file);
        file.line_text(file.line(span.start)).trim_start().starts_with(':')
    };
    let chains = session.ruleset.chains.keys();
    if tool == Tool::Nft { chains.filter(|chain| !declared(*chain)).collect() } else { BTreeSet::new() }
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
    /// Base chains whose policies have no counters.
    uncounted: BTreeSet<Chain>,
    env: Env,
    state: State,
    /// That of programs which have packets as they arrive.
    early: State,
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
        samples(&self.ruleset, &self.env, &self.inputs, hook, comparison.packets, comparison.seed)
    }

    fn send(&mut self, samples: &[Sample]) -> Result<Vec<Passage>, NetfilterError> {
        let frames: Vec<Frame> = samples.iter().map(|sample| sample.frame.clone()).collect();
        self.netfilter.run(&frames, Entry::Stack)
    }

    /// What a packet's passage shows, and counts it.
    fn judge(&mut self, sample: &Sample, passage: &Passage) -> Judged {
        let stages = passage.stages;
        let connection = connection(passage);
        let mut input = Input { connection: Some(connection), ..sample.input.clone() };
        let hook = Hook::Prerouting;
        let (outcome, writes) = self.eval(hook, &input);
        if let Decider::Frame(kind) = outcome.ending.by {
            return match kind {
                // The kernel has no such bound, and goes on to its rules.
                FrameKind::ManyHeaders => Judged::LeftOut("more extension headers than are followed"),
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
        if self.tool == Tool::Nft && self.ruleset.family == Family::V6 && is_later_fragment(&place, &input) {
            // include/net/netfilter/nf_tables_ipv6.h: `ipv6_find_hdr` does not say where a later fragment's payload
            // is, and nft takes the IPv6 header for the transport header.
            return Judged::LeftOut("a later fragment, of which nft reads other bytes");
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
        writes.into_iter().for_each(|write| rewrite(self.ruleset.family, &mut input.frame, write));
        if hook == Hook::Forward {
            input.out_device = self.output;
            hop(self.ruleset.family, &mut input.frame);
        }
        let (outcome, _) = self.eval(hook, &input);
        if passed && let Some(early) = self.dropped_early(hook, sample) {
            return Judged::Differs(hook, early);
        }
        match outcome.ending.verdict {
            Verdict::Defer => Judged::LeftOut("not decided by the rules alone"),
            Verdict::Accept if passed && passage.mark == outcome.mark => Judged::Same("accept"),
            Verdict::Drop | Verdict::Reject(_) if !passed => Judged::Same(outcome.ending.verdict.word()),
            _ => Judged::Differs(hook, outcome),
        }
    }

    /// What the rules say at a hook, and what they change; deferred as soon as a clause's truth is not known, since then
    /// what is counted isn't either.
    fn eval(&mut self, hook: Hook, input: &Input) -> (Outcome, Vec<Write>) {
        let mut known = true;
        let mut writes = Vec::new();
        let rules = &self.ruleset.rules;
        let mut trace = |event| match event {
            Event::Clause(_, _, Truth::Unknown) | Event::Possible(_) => known = false,
            Event::Matched(rule) => match &rules[rule].action {
                Action::Write(write) => writes.push(*write),
                // The hop count less one is no such change.
                Action::Effect { writes, .. } => known &= !writes.contains(&Field::Ttl),
                _ => {}
            },
            _ => {}
        };
        let mut outcome =
            self.ruleset.eval_traced(&place(&[hook]), &self.env, input, &mut self.state, &mut trace);
        if !known {
            outcome.ending.verdict = Verdict::Defer;
        }
        (outcome, writes)
    }

    /// What a program that has the packet as it arrives would make of it, if that is to drop it.
    fn dropped_early(&mut self, hook: Hook, sample: &Sample) -> Option<Outcome> {
        [Attach::Xdp, Attach::TcIngress].into_iter().find_map(|attach| {
            let place = place_of(&[Hook::Prerouting, hook], attach, Mode::Accelerate, true);
            let outcome = self.ruleset.eval(&place, &self.env, &sample.input, &mut self.early);
            (outcome.ending.verdict == Verdict::Drop).then_some(outcome)
        })
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
            if chain.base.is_some() && !self.uncounted.contains(&id) {
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

/// The hooks' chains as they are, with everything given.
fn place(path: &[Hook]) -> Place {
    Place {
        path: path.to_vec(),
        attach: None,
        mode: Mode::Accelerate,
        fragments: Fragments::AsSeen,
        connections: Connections::Given,
        local_addresses: true,
        counters: Counting::Exact,
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

/// Whether a packet is a second or further fragment.
fn is_later_fragment(place: &Place, input: &Input) -> bool {
    View::new(Family::V6, place, input).is_ok_and(|view| view.get(Field::FragOffset) != 0)
}
