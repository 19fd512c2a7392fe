//! The commands, a file each, and what several of them share.

mod account;
#[cfg(feature = "kernel")]
mod applied;
#[cfg(feature = "kernel")]
mod apply;
mod check;
mod compile;
mod completions;
mod dump;
mod explain;
mod fmt;
#[cfg(feature = "kernel")]
mod host;
#[cfg(feature = "kernel")]
mod kept_sets;
#[cfg(feature = "kernel")]
mod live;
mod man;
#[cfg(feature = "kernel")]
mod metrics;
mod place;
#[cfg(feature = "kernel")]
mod retry;
#[cfg(feature = "kernel")]
mod save;
#[cfg(feature = "kernel")]
mod set;
mod simulate;
#[cfg(feature = "kernel")]
mod status;
#[cfg(feature = "kernel")]
mod test_run;
#[cfg(feature = "kernel")]
mod top;
#[cfg(feature = "kernel")]
mod trace;
mod verify;
#[cfg(feature = "kernel")]
mod watch;

use std::process::ExitCode;

use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::source::SourceMap;

use crate::cli::Command;
use crate::failure::Failure;
use crate::output::Output;
use crate::render::human;

/// Something was found, or differs.
pub(crate) const FOUND: u8 = 1;

/// Runs a command.
pub(crate) fn run(command: &Command, output: &Output) -> Result<ExitCode, Failure> {
    match command {
        Command::Check(args) => check::run(args, output),
        Command::Fmt(args) => fmt::run(args, output),
        Command::Compile(args) => compile::run(args, output),
        Command::Verify(args) => verify::run(args, output),
        Command::Simulate(args) => simulate::run(args, output),
        Command::Explain(args) => explain::run(args, output),
        Command::Dump(args) => dump::run(args, output),
        #[cfg(feature = "kernel")]
        Command::Apply(args) => apply::run(args, output),
        #[cfg(feature = "kernel")]
        Command::Restore(args) => apply::restore(args, output),
        #[cfg(feature = "kernel")]
        Command::Confirm(args) => live::confirm(args, output),
        #[cfg(feature = "kernel")]
        Command::Flush(args) => live::flush(args, output),
        #[cfg(feature = "kernel")]
        Command::Status(args) => status::run(args, output),
        #[cfg(feature = "kernel")]
        Command::Save(args) => save::run(args, output),
        #[cfg(feature = "kernel")]
        Command::Trace(args) => trace::run(args, output),
        #[cfg(feature = "kernel")]
        Command::Top(args) => top::run(args, output),
        #[cfg(feature = "kernel")]
        Command::ServeMetrics(args) => metrics::run(args, output),
        #[cfg(feature = "kernel")]
        Command::Set(command) => set::run(command, output),
        #[cfg(feature = "kernel")]
        Command::Watch(args) => watch::run(args, output),
        #[cfg(feature = "kernel")]
        Command::Watchdog(args) => live::watchdog(args),
        Command::Completions { shell } => completions::run(*shell, output),
        Command::Man { folder } => man::run(folder),
    }
}

/// Writes findings for people, then how many there are.
fn show(output: &Output, sources: &SourceMap, findings: &[Diagnostic]) {
    let renderer = output.renderer();
    for finding in findings {
        output.remark(&human::render(&renderer, sources, finding));
    }
}

/// The worst severity among findings.
fn worst(findings: &[Diagnostic]) -> Option<Severity> {
    findings.iter().map(|finding| finding.severity).max()
}

/// `1 rule`, `2 rules`.
fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}
