//! What it costs a packet that a program could report it, while nobody watches.
//!
//! The same rules are compiled with and without reports, and the two programs are measured in turn on the same random
//! packets. Where machine code and counters come to lie makes more of a difference than what is asked for here, so each
//! program is loaded several times, and the median of its copies counts.

use polc::build::{Extras, object_with};
use polc::place::{default_path, devices_of, place};
use polc::select::Devices;
use polc_backend_ebpf::object::ProgramKind;
use polc_ir::env::{Env, Mode};
use polc_ir::hook::Family;

use crate::baseline::empty;
use crate::classify::noise;
use crate::context::{Context, NOISY, progress};
use crate::driver::Pool;
use crate::generator;
use crate::kernel::Loaded;
use crate::packet::Form;
use crate::random::Random;
use crate::report::{Section, Table, ns};
use crate::rules::RuleSet;
use crate::subject::{attach, session};
use crate::trace::{DISTINCT, Traffic, draw, headers};

/// Copies of each program.
const COPIES: usize = 5;

/// The programs of a rule set, without reports and with, in turn.
fn programs(set: &RuleSet, kind: ProgramKind) -> Result<Vec<Loaded>, String> {
    let session = session(&set.name, &set.iptables_text("INPUT"), None, Family::V4);
    let place = place(&default_path(attach(kind)), attach(kind), Mode::Replace, false);
    let devices = Devices { declared: devices_of(&session.ruleset), ..Devices::default() };
    let compiled = polc::compile(&session.ruleset, &place, &Env::default(), &devices);
    let object = |trace| {
        object_with(&session, &compiled, Extras { trace, ..Extras::default() })
            .map(|(object, _)| object)
            .map_err(|findings| findings.first().map_or_else(String::new, |first| first.message.clone()))
    };
    let objects = [object(false)?, object(true)?];
    (0..COPIES).flat_map(|_| &objects).map(Loaded::load).collect()
}

/// The median of every other time, from `first` on.
fn median(times: &[Vec<f64>], first: usize) -> f64 {
    let mut own: Vec<f64> = times.iter().skip(first).step_by(2).map(|pools| pools[0]).collect();
    own.sort_unstable_by(f64::total_cmp);
    own[own.len() / 2]
}

/// Runs it.
///
/// # Errors
/// What polc or the kernel says.
pub(crate) fn run(context: &mut Context) -> Result<Section, String> {
    let mut section = Section::new("reports", "Reports that nobody watches");
    let mut table = Table::new(&["rules", "set", "at", "without, ns", "switched off, ns", "difference"]);
    let mut worst = f64::MIN;
    for size in [10, 100, 1_000, 10_000] {
        for name in generator::sets().take(if context.options.quick { 2 } else { 4 }) {
            let set = generator::generate(name, size, context.options.seed)
                .ok_or_else(|| format!("no generator `{name}`"))?;
            let mut random = Random::new(context.options.seed);
            let headers = headers(&set, DISTINCT, &mut random);
            let pool = Pool::new(Family::V4, &headers, &draw(Traffic::Uniform, headers.len(), &mut random));
            for (kind, at) in [(ProgramKind::Xdp, "XDP"), (ProgramKind::Classifier, "tc")] {
                let nothing = Loaded::load(&empty(kind)?)?;
                let programs = programs(&set, kind)?;
                let all: Vec<&Loaded> = std::iter::once(&nothing).chain(&programs).collect();
                let rounds = context.options.rounds;
                let driver = context.driver(kind, Form::Fields(Family::V4))?;
                let times = driver.measure(&all, std::slice::from_ref(&pool), rounds)?;
                context.note(times.spread);
                let (without, off) = (median(&times.ns, 1), median(&times.ns, 2));
                let difference = off - without;
                worst = worst.max(difference);
                let cells = vec![
                    size.to_string(),
                    set.name.clone(),
                    at.to_string(),
                    ns(without - times.ns[0][0]),
                    ns(off - times.ns[0][0]),
                    format!("{difference:+.2}"),
                ];
                progress(&format!("  {}", cells.join("  ")));
                table.row(cells);
            }
        }
    }
    section.text(format!(
        "ns a packet over an empty program, uniform traffic. Programs that can report packets, with nobody watching, against \
         the same rules compiled without; each time is the median of {COPIES} copies, since where a program lies in memory \
         makes more of a difference. Goal: 1 ns at most; largest difference here {worst:+.2} ns."
    ));
    section.table(table);
    if context.spread > NOISY {
        section.text(noise(context.spread));
    }
    Ok(section)
}
