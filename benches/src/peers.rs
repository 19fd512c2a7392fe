//! The same rules by everything that can decide them, end to end in veth pairs.

use polc_backend_ebpf::object::ProgramKind;
use polc_ir::hook::Family;

use crate::baseline::linear;
use crate::classify::{Input, input, names, noise};
use crate::context::{Context, NOISY, progress};
use crate::driver::Pool;
use crate::kernel::Loaded;
use crate::machine::Namespace;
use crate::plot::Plot;
use crate::random::Random;
use crate::report::{Section, Table, geometric_mean, ns};
use crate::subject::Subject;
use crate::trace::{DISTINCT, Traffic, draw, headers};
use crate::wire::{Lane, Timed};

/// What decides packets in a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contestant {
    /// Nothing: all packets go on to the sink.
    AcceptAll,
    /// The raw table's policy drops everything.
    DropAll,
    PolcXdp,
    PolcTc,
    LinearXdp,
    Legacy,
    IptablesNft,
    Nft,
}

impl Contestant {
    const fn name(self) -> &'static str {
        match self {
            Contestant::AcceptAll => "no rules, accept",
            Contestant::DropAll => "no rules, drop",
            Contestant::PolcXdp => "polc, XDP",
            Contestant::PolcTc => "polc, tc",
            Contestant::LinearXdp => "linear eBPF, XDP",
            Contestant::Legacy => "iptables-legacy",
            Contestant::IptablesNft => "iptables-nft",
            Contestant::Nft => "nft",
        }
    }

    /// Puts the rules into a lane.
    fn set_up(self, lane: &mut Lane, home: &Namespace, input: &Input) -> Result<(), String> {
        let set = &input.set;
        let polc = |kind| -> Result<Loaded, String> {
            let text = set.iptables_text("INPUT");
            Ok(Subject::new(&set.name, &text, None, Family::V4, kind)?.loaded)
        };
        match self {
            Contestant::AcceptAll => Ok(()),
            Contestant::DropAll => {
                lane.run(&["iptables-legacy", "-w", "-t", "raw", "-P", "PREROUTING", "DROP"], "").map(drop)
            }
            Contestant::PolcXdp => lane.attach(polc(ProgramKind::Xdp)?, home),
            Contestant::PolcTc => lane.attach(polc(ProgramKind::Classifier)?, home),
            Contestant::LinearXdp => lane.attach(Loaded::load(&linear(ProgramKind::Xdp, set)?)?, home),
            Contestant::Legacy => {
                lane.run(&["iptables-legacy-restore", "-w", "-n"], &set.raw_text()).map(drop)
            }
            Contestant::IptablesNft => {
                lane.run(&["iptables-nft-restore", "-w", "-n"], &set.raw_text()).map(drop)
            }
            Contestant::Nft => lane.run(&["nft", "-f", "-"], &set.nft_text()).map(drop),
        }
    }
}

/// A contestant's time, or why it has none.
type Outcome = Result<Timed, String>;

/// Measures contestants on one rule set. The pool is uniform.
fn contest(context: &mut Context, input: &Input, contestants: &[Contestant]) -> Result<Vec<Outcome>, String> {
    let mut random = Random::new(context.options.seed ^ 0x7769_7265);
    let order = draw(Traffic::Uniform, input.headers.len(), &mut random);
    let pool = Pool::new(Family::V4, &input.headers, &order);
    let accepts: Vec<bool> = order.iter().map(|&at| input.set.accepts(input.first[at as usize])).collect();
    let rounds = context.options.rounds;
    let (wire, home) = context.wire()?;
    let mut lanes = Vec::new();
    let mut outcomes = Vec::new();
    for contestant in contestants {
        let mut lane = wire.lane(contestant.name())?;
        match contestant.set_up(&mut lane, home, input) {
            Ok(()) => {
                lanes.push(lane);
                outcomes.push(None);
            }
            Err(error) => outcomes.push(Some(error)),
        }
    }
    let mut times = wire.measure(&mut lanes, &pool, &accepts, rounds)?.into_iter();
    for (lane, timed) in lanes.iter().zip(times.as_slice()) {
        if !timed.is_right()
            && lane.name != Contestant::DropAll.name()
            && lane.name != Contestant::AcceptAll.name()
        {
            let (found, expected) = timed.accepted;
            return Err(format!(
                "WRONG VERDICTS: {}: {} accepted {found} packets instead of {expected}",
                input.set.name, lane.name
            ));
        }
    }
    let spread = times.as_slice().iter().map(|timed| timed.spread).fold(1.0, f64::max);
    let done = outcomes
        .into_iter()
        .map(|error| match error {
            Some(error) => Err(error),
            None => times.next().ok_or_else(|| "a lane has no time".to_string()),
        })
        .collect();
    context.note(spread);
    Ok(done)
}

/// Runs the comparison at usual sizes.
///
/// # Errors
/// A wrong verdict, or the kernel's word.
pub(crate) fn run(context: &mut Context) -> Result<Section, String> {
    const ALL: [Contestant; 8] = [
        Contestant::AcceptAll,
        Contestant::DropAll,
        Contestant::PolcXdp,
        Contestant::PolcTc,
        Contestant::LinearXdp,
        Contestant::Legacy,
        Contestant::IptablesNft,
        Contestant::Nft,
    ];
    let mut section = Section::new("peers", "End to end: rule sets in veth pairs");
    let names = names(context).0;
    let sizes: &[(&str, usize)] = &[("10", 10), ("100", 100), ("1k", 1_000), ("10k", 10_000)];
    let mut table =
        Table::new(&["rules", "contestant", "ns a packet", "Mpps", "times polc at XDP", "without the way"]);
    let mut lines: Vec<(String, Vec<(f64, f64)>)> =
        ALL[2..].iter().map(|contestant| (contestant.name().to_string(), Vec::new())).collect();
    let mut failures = Vec::new();
    for &(size, rules) in sizes {
        if context.options.size.is_some_and(|only| only != rules) {
            continue;
        }
        let mut sums: Vec<Vec<(f64, f64)>> = vec![Vec::new(); ALL.len()];
        for name in names.iter().take(if context.options.quick { 2 } else { 12 }) {
            let input = input(context, name, size, rules)?;
            let outcomes = contest(context, &input, &ALL)?;
            let way = way(&input, &outcomes);
            for (at, outcome) in outcomes.into_iter().enumerate() {
                match outcome {
                    Ok(timed) => sums[at].push((timed.ns, timed.ns - way)),
                    Err(error) => failures.push(format!("{}, {}: {error}", input.set.name, ALL[at].name())),
                }
            }
            let shown: Vec<String> = ALL
                .iter()
                .zip(&sums)
                .map(|(one, sum)| {
                    format!("{} {}", one.name(), sum.last().map_or("-".into(), |last| ns(last.0)))
                })
                .collect();
            progress(&format!("  {}: {}", input.set.name, shown.join(", ")));
        }
        let polc = geometric_mean(sums[2].iter().map(|pair| pair.0));
        for (at, contestant) in ALL.iter().enumerate() {
            if sums[at].is_empty() {
                continue;
            }
            let mean = geometric_mean(sums[at].iter().map(|pair| pair.0));
            let partial = sums[at].len() < names.len().min(if context.options.quick { 2 } else { 12 });
            let over = match contestant {
                Contestant::AcceptAll | Contestant::DropAll | Contestant::PolcXdp | Contestant::LinearXdp => {
                    "-".into()
                }
                _ => ns(geometric_mean(sums[at].iter().map(|pair| pair.1))),
            };
            table.row(vec![
                size.to_string(),
                format!("{}{}", contestant.name(), if partial { " (some sets only)" } else { "" }),
                ns(mean),
                format!("{:.2}", 1e3 / mean),
                if sums[2].is_empty() { "-".into() } else { format!("{:.1}", mean / polc) },
                over,
            ]);
            if at >= 2 && !partial {
                lines[at - 2].1.push((rules as f64, mean));
            }
        }
    }
    section.text(
        "One CPU injects, forwards over a veth pair and decides; 60-byte packets, uniform traffic; polc's programs \
         count packets, nft's rules don't, iptables' always do. Kernel rules are in the raw table's PREROUTING, \
         where they are cheapest. Every lane's accepted packets are counted and must be exactly those that the rules accept. \
         *Without the way*: less what the same packets cost there with no rules at all.",
    );
    section.table(table);
    lines.retain(|(_, points)| points.len() > 1);
    if !lines.is_empty() {
        section.plot(Plot {
            name: "peers".into(),
            title: "End to end, ns a packet".into(),
            x: "rules".into(),
            y: "ns a packet".into(),
            lines,
        });
    }
    finish(context, &mut section, &failures);
    Ok(section)
}

/// What the packets cost without rules: those that are accepted on the way to the sink, the others up to the raw table.
fn way(input: &Input, outcomes: &[Outcome]) -> f64 {
    let of = |at: usize| outcomes[at].as_ref().map_or(0.0, |timed| timed.ns);
    let accepted = input.first.iter().filter(|&&number| input.set.accepts(number)).count();
    let share = accepted as f64 / input.first.len() as f64;
    of(0) * share + of(1) * (1.0 - share)
}

fn finish(context: &Context, section: &mut Section, failures: &[String]) {
    if !failures.is_empty() {
        section.text(format!("Not measured: {}.", failures.join("; ")));
    }
    if context.spread > NOISY {
        section.text(noise(context.spread));
    }
}

/// Runs the comparison with iptables-legacy where it is at its best: few rules.
///
/// # Errors
/// A wrong verdict, or the kernel's word.
pub(crate) fn small(context: &mut Context) -> Result<Section, String> {
    const ALL: [Contestant; 5] = [
        Contestant::AcceptAll,
        Contestant::DropAll,
        Contestant::PolcXdp,
        Contestant::PolcTc,
        Contestant::Legacy,
    ];
    let mut section = Section::new("small", "Few rules: never slower than iptables-legacy");
    let mut table =
        Table::new(&["rules", "set", "polc, XDP", "polc, tc", "iptables-legacy", "no rules", "never slower"]);
    let names = names(context).0;
    let mut failures = Vec::new();
    for rules in [1, 5, 10, 50] {
        for name in names.iter().take(if context.options.quick { 2 } else { 12 }) {
            let mut whole = input(context, name, "1k", 1_000)?;
            whole.set = whole.set.thinned(rules);
            whole.headers = headers(&whole.set, DISTINCT, &mut Random::new(context.options.seed));
            whole.first = whole.set.first_matches(&whole.headers);
            let outcomes = contest(context, &whole, &ALL)?;
            let way = way(&whole, &outcomes);
            let time = |at: usize| outcomes[at].as_ref().ok().map(|timed| timed.ns);
            let (Some(xdp), Some(tc), Some(legacy)) = (time(2), time(3), time(4)) else {
                let why: Vec<String> =
                    outcomes.iter().filter_map(|outcome| outcome.as_ref().err().cloned()).collect();
                failures.push(format!("{}: {}", whole.set.name, why.join("; ")));
                continue;
            };
            let cells = vec![
                rules.to_string(),
                whole.set.name.clone(),
                ns(xdp),
                ns(tc),
                ns(legacy),
                ns(way),
                if xdp <= legacy && tc <= legacy { "yes" } else { "**NO**" }.to_string(),
            ];
            progress(&format!("  {}", cells.join("  ")));
            table.row(cells);
        }
    }
    section.text(
        "ns a packet, end to end in veth pairs, as above in *peers*. iptables' rules are in the raw table. A packet that polc drops at tc \
         never reaches the IP stack; one that it accepts goes the whole way.",
    );
    section.table(table);
    finish(context, &mut section, &failures);
    Ok(section)
}
