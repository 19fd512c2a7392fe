//! From a dump's text to an object: the largest dump at hand and the median one, as the command does it and inside this
//! process, where allocations are counted. `cargo bench -p polc --bench compile`.
//!
//! Where the corpus that has the 42,622 rules is not beside the checkout, a dump of that size and shape is generated, and
//! the median is of the dumps that come with polc.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use divan::{AllocProfiler, Bencher};
use polc::build::build;
use polc::place::{default_path, devices_of, place};
use polc::select::Devices;
use polc::session::{ReadOptions, Session};
use polc_ir::env::{Attach, Env, Mode};
use polc_ir::source::SourceMap;
use polc_tests::corpus;
use polc_tests::services::services;

#[global_allocator]
static ALLOCATIONS: AllocProfiler = AllocProfiler::system();

/// The file, and the rules that it appends.
struct Dump {
    path: PathBuf,
    rules: usize,
}

fn main() {
    for (which, dump) in [("largest", largest()), ("median", median())] {
        let name = dump.path.file_name().expect("a file").to_string_lossy().into_owned();
        eprintln!("{which}: {name}, {} rules", dump.rules);
    }
    divan::main();
}

/// The valid dumps at hand, ascending by rules.
fn dumps() -> Vec<Dump> {
    let rules = |text: String| text.lines().filter(|line| is_rule(line)).count();
    let valid = corpus::all().into_iter().filter(|dump| dump.valid);
    let mut dumps: Vec<Dump> =
        valid.map(|dump| Dump { rules: rules(dump.text()), path: dump.rules }).collect();
    dumps.sort_by(|a, b| (a.rules, &a.path).cmp(&(b.rules, &b.path)));
    dumps
}

/// Counters may come first.
fn is_rule(line: &str) -> bool {
    line.trim_start_matches(|c: char| "[:] ".contains(c) || c.is_ascii_digit()).starts_with("-A")
}

/// The generated one is written where Cargo keeps what it builds.
fn largest() -> Dump {
    /// As many as make 42,636 rules.
    const SERVICES: usize = 1_470;
    if corpus::shared().is_some() {
        return dumps().pop().expect("there are dumps");
    }
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("services.v4.rules");
    let text = services(SERVICES);
    std::fs::write(&path, &text).expect("the folder for tests can be written");
    Dump { rules: text.lines().filter(|line| is_rule(line)).count(), path }
}

fn median() -> Dump {
    let mut dumps = dumps();
    dumps.swap_remove(dumps.len() / 2)
}

/// `polc compile`, from start to exit.
fn process(bencher: Bencher<'_, '_>, dump: &Dump) {
    let object = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("bench.o");
    bencher.bench_local(|| {
        let mut polc = Command::new(env!("CARGO_BIN_EXE_polc"));
        polc.args(["compile", "--attach", "xdp", "-o"]).arg(&object).arg(&dump.path);
        let status = polc.stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(status.expect("it can be started").success());
    });
}

/// Reading and compiling alone.
fn in_memory(bencher: Bencher<'_, '_>, dump: &Dump) {
    let text = corpus::read(&dump.path);
    let name = dump.path.to_string_lossy().into_owned();
    bencher.bench_local(|| {
        let mut sources = SourceMap::new();
        let file = sources.add(name.as_str(), text.as_str());
        let session = Session::read(sources, file, &[], &ReadOptions::default());
        let place = place(&default_path(Attach::Xdp), Attach::Xdp, Mode::Accelerate, false);
        let devices = Devices { declared: devices_of(&session.ruleset), ..Devices::default() };
        build(&session, &place, &Env::default(), &devices).expect("it can be compiled")
    });
}

#[divan::bench(sample_count = 20, sample_size = 1)]
fn largest_process(bencher: Bencher<'_, '_>) {
    process(bencher, &largest());
}

#[divan::bench(sample_count = 20, sample_size = 1)]
fn largest_in_memory(bencher: Bencher<'_, '_>) {
    in_memory(bencher, &largest());
}

#[divan::bench]
fn median_process(bencher: Bencher<'_, '_>) {
    process(bencher, &median());
}

#[divan::bench]
fn median_in_memory(bencher: Bencher<'_, '_>) {
    in_memory(bencher, &median());
}
