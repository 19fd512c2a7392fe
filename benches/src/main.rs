//! Measures compiled rule sets against what else one would use, in the kernel that runs here.
//!
//! `./bench` builds and runs this; it needs root, and it makes network namespaces of its own and removes them. What it
//! finds goes into a Markdown document with plots.
//!
//! How a packet's price is found is told in [`driver`]; which packets, in [`trace`]; which rules, in [`classbench`] and
//! [`generator`].

mod baseline;
mod classbench;
mod classify;
mod context;
mod driver;
mod dumps;
mod generator;
mod kernel;
mod live;
mod local;
mod machine;
mod packet;
mod peers;
mod plot;
mod random;
mod report;
mod reports;
mod rules;
mod sets;
mod subject;
mod trace;
mod wire;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use polc_ir::hook::Family;

use crate::context::{Context, NOISY, Options, progress};
use crate::report::Section;

/// The benchmarks, in the order of the document.
const BENCHMARKS: [&str; 9] =
    ["classify", "ipv6", "small", "peers", "sets", "dumps", "reports", "local", "live"];

/// Measures compiled rule sets against what else one would use, in the kernel that runs here.
#[derive(Parser)]
#[command(name = "bench", arg_required_else_help = false)]
struct Arguments {
    /// Fewer sizes, rule sets and rounds: a few minutes
    #[arg(long)]
    quick: bool,
    /// Only these benchmarks
    #[arg(long, value_name = "NAME", value_parser = BENCHMARKS)]
    only: Vec<String>,
    /// Only rule sets whose name contains this
    #[arg(long, value_name = "TEXT")]
    set: Option<String>,
    /// Only this many rules (10, 100, 1000, 10000, 100000)
    #[arg(long, value_name = "RULES")]
    size: Option<usize>,
    /// Rounds, of which the least time counts
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Seed of everything random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Measure generated rule sets even if ClassBench's lie beside the checkout
    #[arg(long)]
    generated: bool,
    /// The folder for the document and its plots; by default docs after a full run, target/bench otherwise
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("programs are measured in the kernel, which takes root".into());
    }
    let cpu = machine::pin()?;
    let load = machine::load_average();
    let options = Options {
        quick: arguments.quick,
        rounds: arguments.rounds.unwrap_or(if arguments.quick { 5 } else { 15 }).max(1),
        seed: arguments.seed,
        rulesets: if arguments.generated { None } else { classbench::folder() },
        set: arguments.set.clone(),
        size: arguments.size,
    };
    let partial = arguments.quick || arguments.set.is_some() || arguments.size.is_some();
    let folder =
        arguments.out.clone().unwrap_or_else(|| PathBuf::from(if partial { "target/bench" } else { "docs" }));
    let head = format!(
        "# Benchmarks\n\n\
         Written by `./bench{}`, seed {}, least of {} rounds. {}; CPU {cpu}.\n",
        if arguments.quick { " --quick" } else { "" },
        options.seed,
        options.rounds,
        machine::describe(),
    );
    let mut context = Context::new(options)?;
    for name in BENCHMARKS {
        if !arguments.only.is_empty() && !arguments.only.iter().any(|only| only == name) {
            continue;
        }
        progress(name);
        let section = benchmark(&mut context, name)?;
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", section.markdown()).map_err(|error| format!("stdout: {error}"))?;
        section.write(&folder, &BENCHMARKS, &head)?;
    }
    if context.spread > NOISY || load > 1.0 {
        eprintln!(
            "noisy: {load} processes ran when this started, and a program's median round took {:.2} times its least",
            context.spread
        );
    }
    eprintln!("written to {}", folder.display());
    Ok(())
}

fn benchmark(context: &mut Context, name: &str) -> Result<Section, String> {
    match name {
        "classify" => classify::run(context, Family::V4),
        "ipv6" => classify::run(context, Family::V6),
        "small" => peers::small(context),
        "peers" => peers::run(context),
        "sets" => sets::run(context),
        "dumps" => dumps::run(context),
        "reports" => reports::run(context),
        "local" => local::run_all(context),
        "live" => live::run_all(context),
        _ => Err(format!("no benchmark `{name}`")),
    }
}
