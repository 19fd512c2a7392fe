//! `verify --netfilter`: the rules mean what the running kernel's own packet filter makes of them.

use std::collections::BTreeMap;

use polc::decider::describe;
use polc::netfilter::{Compared, Comparison, Difference, NotCompared, compare};
use polc::session::Session;
use polc_ir::hook::Semantics;
use polc_loader::netfilter::{Route, Tool};
use serde::Serialize;

use super::{counted, input_text};
use crate::failure::Failure;

/// What one way through the kernel gave.
#[derive(Debug, Serialize)]
pub(super) struct NetfilterRun {
    /// The tool that the rules were restored with.
    pub tool: &'static str,
    /// `forward` or `input`: the hook after PREROUTING.
    pub hook: &'static str,
    /// Packets compared.
    pub packets: usize,
    /// How many of them got each verdict; `routing` got to PREROUTING alone.
    pub verdicts: BTreeMap<&'static str, usize>,
    /// Packets that say nothing, by reason.
    pub left_out: BTreeMap<&'static str, usize>,
    /// Counters of rules and policies compared.
    pub counters: usize,
    /// How many of those were not zero.
    pub counters_hit: usize,
    /// The first difference, for people.
    pub difference: Option<String>,
}

/// Sends `packets` packets through the rules on either way.
pub(super) fn verify(
    session: &Session,
    sets: &[String],
    seed: u64,
    packets: usize,
) -> Result<Vec<NetfilterRun>, Failure> {
    let tool = match session.ruleset.semantics {
        Semantics::Legacy => Tool::Legacy,
        Semantics::Nft => Tool::Nft,
    };
    let mut runs = Vec::new();
    for (route, hook) in [(Route::Local, "input"), (Route::Forward, "forward")] {
        let comparison = Comparison { session, sets, route, packets, seed };
        let Compared { packets, verdicts, left_out, counters, counters_hit, difference } =
            compare(&comparison, &mut |_| {})?;
        let difference = difference.map(|(sample, difference)| {
            let mut text = difference_text(session, &difference);
            if let Some(sample) = sample {
                text += &format!("\n  packet: {}", input_text(&sample.input));
            }
            text
        });
        let tool = tool.command(session.family());
        runs.push(NetfilterRun {
            tool,
            hook,
            packets,
            verdicts,
            left_out,
            counters,
            counters_hit,
            difference,
        });
    }
    Ok(runs)
}

fn difference_text(session: &Session, difference: &Difference) -> String {
    match difference {
        Difference::Packet { hook, expected, passage } => format!(
            "the rules and the kernel differ at {hook}\n  rules:  {}, mark {:#x}\n  kernel: {:?}, mark {:#x}",
            describe(session, expected.ending),
            expected.mark,
            passage.stages,
            passage.mark
        ),
        Difference::Counters(lines) => {
            let mut text = String::from("counters differ");
            for (line, expected) in lines {
                let what = match line.number {
                    0 => "policy".to_string(),
                    number => number.to_string(),
                };
                text += &format!(
                    "\n  {} {} {what}: {} and {} bytes by the rules, {} and {} bytes by the kernel",
                    line.table,
                    line.chain,
                    counted(expected.packets as usize, "packet"),
                    expected.bytes,
                    counted(line.packets as usize, "packet"),
                    line.bytes
                );
            }
            text
        }
        Difference::Rules(table, chain, have, want) => {
            format!("{table} {chain} has {have} rules in the kernel and {want} here")
        }
        Difference::Unsteady(passage) => format!(
            "a packet fared otherwise when only such as can be compared went through: {:?}",
            passage.stages
        ),
    }
}

/// A run, in a line or a few.
pub(super) fn text(run: &NetfilterRun) -> String {
    let mut text = format!("{} at {}: ", run.tool, run.hook);
    if let Some(difference) = &run.difference {
        return text + difference + "\n";
    }
    let list = |counts: &BTreeMap<&str, usize>| {
        let parts: Vec<String> = counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
        parts.join(", ")
    };
    text += &format!("agrees on {} ({})", counted(run.packets, "packet"), list(&run.verdicts));
    text += &format!(" and on {}, {} of them not zero\n", counted(run.counters, "counter"), run.counters_hit);
    for (why, count) in &run.left_out {
        text += &format!("  {count} left out: {why}\n");
    }
    text
}

/// What no packet was sent through, in a line; nothing if there is nothing.
pub(super) fn not_compared_text(left: &NotCompared) -> Option<String> {
    let rules = counted(left.rules, "rule");
    (!left.chains.is_empty())
        .then(|| format!("iptables was not compared in {} ({rules})\n", left.chains.join(", ")))
}
