//! What changing and reading an applied policy takes: `polc apply`, `polc set` and `polc save -c` as a user runs them.
//!
//! Times are those of whole processes, from their start to their end, in the network namespace of this benchmark. polc
//! is the release build beside this program. What a process takes that does nothing is told beside them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use polc_loader::net;
use polc_loader::sys::Sys;
use polc_tests::kernel::{BpfFs, TempDir};

use crate::context::{Context, progress};
use crate::generator;
use crate::machine::{on_all_cpus, run};
use crate::random::Random;
use crate::report::{Section, Table};

/// Rules of the set that is applied, and of the one whose counters are read.
const RULES: usize = 1_000;
const SAVED_RULES: usize = 10_000;

/// Addresses of the set of which one changes.
const ADDRESSES: usize = 100_000;

/// The devices, which are made for this.
const DEVICE: &str = "live0";
const PEER: &str = "live1";

/// What `apply` takes its time for.
const WHERE: &str = "Of the instructions that `apply` takes for these rules at XDP (all threads, valgrind's \
                     callgrind) reading is 6 %, chains to stages, splitting and simplifying 10 %, choosing \
                     the structures 26 %, emitting and writing the object 7 %; making packets to try it on, \
                     which compares its tables with the rules, 30 %, and running 200 of them through the \
                     rules and the program under rbpf 14 %.";

/// polc, and where it keeps things meanwhile.
struct Polc {
    program: PathBuf,
    files: TempDir,
    pins: BpfFs,
}

/// Times in milliseconds, sorted.
struct Times(Vec<f64>);

impl Times {
    fn of(mut times: Vec<f64>) -> Times {
        times.sort_unstable_by(f64::total_cmp);
        Times(times)
    }

    fn least(&self) -> f64 {
        self.0.first().copied().unwrap_or(f64::NAN)
    }

    fn median(&self) -> f64 {
        self.0.get(self.0.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn cells(&self) -> [String; 2] {
        [self.least(), self.median()].map(|ms| format!("{ms:.2}"))
    }
}

impl Polc {
    fn new() -> Result<Polc, String> {
        let own = std::env::current_exe().map_err(|error| format!("this program: {error}"))?;
        let program = own.with_file_name("polc");
        if !program.exists() {
            return Err(format!("{} is not there: `./bench` builds it", program.display()));
        }
        Ok(Polc { program, files: TempDir::in_memory("bench-live"), pins: BpfFs::new("bench-live-pins") })
    }

    /// Runs a command; what it says on stderr, and its time in milliseconds. Options go before what `polc set` takes for
    /// an element.
    fn run(&self, args: &[&str]) -> Result<(String, f64), String> {
        let state = self.files.path().join("state");
        let (verb, rest) = args.split_at(if args[0] == "set" { 2 } else { 1 });
        let mut command = Command::new(&self.program);
        command.args(verb).current_dir(self.files.path());
        if args != ["--version"] {
            command.args(["--bpffs", &self.pins.join(""), "--state"]).arg(&state);
        }
        command.args(rest);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let start = Instant::now();
        let output = on_all_cpus(|| command.output())?.map_err(|error| format!("polc: {error}"))?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok((said, ms)) } else { Err(format!("polc {}: {said}", args.join(" "))) }
    }

    /// The times of commands, run in turn `rounds` times, each behind a process that does nothing.
    fn times(&self, commands: &[&[&str]], rounds: usize) -> Result<Compared, String> {
        let (mut whole, mut over) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            for args in commands {
                let idle = self.run(&["--version"])?.1;
                let ms = self.run(args)?.1;
                whole.push(ms);
                over.push(ms - idle);
            }
        }
        Ok(Compared { whole: Times::of(whole), over: Times::of(over) })
    }
}

/// The times of processes.
struct Compared {
    whole: Times,
    /// What they took longer than the ones before them, which did nothing.
    over: Times,
}

/// The milliseconds that a remark of polc's gives before ` ms` and `what`.
fn told(said: &str, what: &str) -> Result<f64, String> {
    let before = said.split(&format!(" ms{what}")).next().filter(|before| before.len() < said.len());
    let number = before.and_then(|before| before.rsplit(' ').next()?.parse().ok());
    number.ok_or_else(|| format!("polc does not tell `{what}`: {said}"))
}

/// Numbers of the device's XDP programs.
fn programs() -> Result<Vec<u32>, String> {
    let devices = net::devices(&Sys::new()).map_err(|error| error.to_string())?;
    net::find(&devices, DEVICE).map(|device| device.xdp.clone()).map_err(|error| error.to_string())
}

/// Runs it.
///
/// # Errors
/// What polc or the kernel says.
pub(crate) fn run_all(context: &mut Context) -> Result<Section, String> {
    let mut section = Section::new("live", "Changing what is in force");
    run(&["ip", "link", "add", DEVICE, "type", "veth", "peer", "name", PEER])?;
    let measured = measure(context, &mut section);
    run(&["ip", "link", "del", DEVICE])?;
    measured.map(|()| section)
}

fn measure(context: &Context, section: &mut Section) -> Result<(), String> {
    run(&["ip", "link", "set", DEVICE, "up"])?;
    let rounds = context.options.rounds;
    let polc = Polc::new()?;
    let idle = polc.times(&[&["--version"]], 4 * rounds)?.whole;
    section.text(format!(
        "Milliseconds of whole processes; `polc --version` takes {:.2} at least and {:.2} in the median.",
        idle.least(),
        idle.median()
    ));
    section.table(applies(context, &polc, idle.median())?);
    let mut table =
        Table::new(&["what", "least, ms", "median, ms", "median without the process, ms", "goal"]);
    for (what, times, goal) in [set(&polc, rounds)?, save(context, &polc)?] {
        let [least, median] = times.whole.cells();
        table.row(vec![what, least, median, format!("{:.2}", times.over.median()), goal.to_string()]);
    }
    section.table(table);
    section.text(
        "No program is loaded when a set changes: the device's program has the same number afterwards.",
    );
    section.text(WHERE);
    Ok(())
}

/// `polc apply` in place of another policy, at each place: from the start of its process, which takes `idle`, until
/// packets meet the new one. What the kernel itself takes is told apart: making the maps and verifying the program, which
/// whoever loads the same object waits for, and attaching it. What follows (waiting until no packet is in the old program any more, taking its counts
/// over, removing it) is in the whole process.
fn applies(context: &Context, polc: &Polc, idle: f64) -> Result<Table, String> {
    let mut table = Table::new(&[
        "apply",
        "at",
        "to attached: least, ms",
        "median, ms",
        "of them compile and verify",
        "the kernel's loading",
        "the kernel's attaching",
        "median over both (goal: 50)",
        "the whole process, ms",
    ]);
    let name = generator::sets().next().ok_or("there are generators")?;
    for seed in [0, 1] {
        let set = generator::generate(name, RULES, context.options.seed + seed).ok_or("no such generator")?;
        polc.files.file(&format!("rules{seed}.v4"), set.iptables_text("FORWARD").as_bytes());
    }
    for attach in ["xdp", "tc-ingress", "netfilter"] {
        // At netfilter each hook has a program; the rules are FORWARD's, which most packets come to.
        let device = if attach == "netfilter" { ["--hook", "forward"] } else { ["--dev", DEVICE] };
        let (mut attached, mut compiling, mut loading, mut attaching, mut over, mut whole) =
            (vec![], vec![], vec![], vec![], vec![], vec![]);
        for round in 0..=context.options.rounds {
            let file = format!("rules{}.v4", round % 2);
            let args = [&["apply", &file, "--replace", "--attach", attach], &device[..]].concat();
            let (said, ms) = polc.run(&args)?;
            // The first has nothing to replace.
            if round > 0 {
                let load_ms = told(&said, " of the kernel's to load")?;
                let attach_ms = told(&said, " of the kernel's to attach")?;
                let attached_ms = idle + told(&said, ":")?;
                attached.push(attached_ms);
                compiling.push(told(&said, " to compile and verify")?);
                loading.push(load_ms);
                attaching.push(attach_ms);
                over.push(attached_ms - load_ms - attach_ms);
                whole.push(ms);
            }
        }
        polc.run(&["flush"])?;
        let [least, median] = Times::of(attached).cells();
        let middle = |times| format!("{:.2}", Times::of(times).median());
        let what = format!("{name}, {RULES} rules");
        let cells = vec![
            what,
            attach.into(),
            least,
            median,
            middle(compiling),
            middle(loading),
            middle(attaching),
            middle(over),
            middle(whole),
        ];
        progress(&format!("  {}", cells.join("  ")));
        table.row(cells);
    }
    Ok(table)
}

/// One address of a large set, added and deleted.
fn set(polc: &Polc, rounds: usize) -> Result<(String, Compared, &'static str), String> {
    let mut random = Random::new(1);
    let mut addresses = BTreeSet::new();
    while addresses.len() < ADDRESSES {
        addresses.insert(random.below(0xe000_0000) as u32 | 1);
    }
    let mut text = format!("create s hash:ip family inet hashsize 65536 maxelem {}\n", 2 * ADDRESSES);
    for address in &addresses {
        _ = writeln!(text, "add s {}", Ipv4Addr::from(*address));
    }
    polc.files.file("sets.ipset", text.as_bytes());
    polc.files
        .file("set.v4", b"*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m set --match-set s src -j DROP\nCOMMIT\n");
    polc.run(&["apply", "set.v4", "--ipset", "sets.ipset", "--replace", "--dev", DEVICE])?;
    let before = programs()?;
    // No address of the set is even.
    let times =
        polc.times(&[&["set", "add", "s", "192.0.2.2"], &["set", "del", "s", "192.0.2.2"]], 2 * rounds)?;
    if programs()? != before || before.len() != 1 {
        return Err("changing a set loaded a program".into());
    }
    polc.run(&["flush"])?;
    progress(&format!("  set: {:?}", times.whole.cells()));
    Ok((format!("`set add` and `del`, one of {ADDRESSES} addresses"), times, "1"))
}

/// The counters of a large rule set.
fn save(context: &Context, polc: &Polc) -> Result<(String, Compared, &'static str), String> {
    let name = generator::sets().next().ok_or("there are generators")?;
    let set = generator::generate(name, SAVED_RULES, context.options.seed).ok_or("no such generator")?;
    polc.files.file("many.v4", set.iptables_text("FORWARD").as_bytes());
    polc.run(&["apply", "many.v4", "--replace", "--dev", DEVICE])?;
    let times = polc.times(&[&["save", "-c"]], context.options.rounds)?;
    polc.run(&["flush"])?;
    progress(&format!("  save: {:?}", times.whole.cells()));
    Ok((format!("`save -c` of {SAVED_RULES} rules"), times, "50"))
}
