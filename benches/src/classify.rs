//! Rule sets of five fields, 10 to 100,000 rules: the price of a packet beyond reading its headers.
//!
//! The goals are this project's own, for the twelve ClassBench sets.

use std::time::Duration;

use polc_backend_ebpf::object::ProgramKind;
use polc_ir::hook::Family;

use crate::baseline::{empty, parse_only};
use crate::context::{Context, NOISY, progress};
use crate::driver::Pool;
use crate::kernel::Loaded;
use crate::packet::Form;
use crate::plot::Plot;
use crate::random::Random;
use crate::report::{Section, Table, geometric_mean, mb, ms, ns};
use crate::rules::{Header, RuleSet};
use crate::subject::{Cost, Subject};
use crate::trace::{DISTINCT, Traffic, draw, headers};
use crate::{classbench, generator};

/// Goals at a number of rules.
struct Goal {
    size: &'static str,
    rules: usize,
    uniform: f64,
    zipf: f64,
    worst: f64,
    memory_mb: f64,
    compile_ms: f64,
}

const GOALS: [Goal; 5] = [
    Goal { size: "10", rules: 10, uniform: 4.0, zipf: 4.0, worst: 6.0, memory_mb: 0.1, compile_ms: 1.0 },
    Goal { size: "100", rules: 100, uniform: 8.0, zipf: 8.0, worst: 12.0, memory_mb: 0.2, compile_ms: 2.0 },
    Goal {
        size: "1k",
        rules: 1_000,
        uniform: 15.0,
        zipf: 13.0,
        worst: 25.0,
        memory_mb: 1.0,
        compile_ms: 5.0,
    },
    Goal {
        size: "10k",
        rules: 10_000,
        uniform: 40.0,
        zipf: 30.0,
        worst: 60.0,
        memory_mb: 2.0,
        compile_ms: 30.0,
    },
    Goal {
        size: "100k",
        rules: 100_000,
        uniform: 200.0,
        zipf: 90.0,
        worst: 350.0,
        memory_mb: 24.0,
        compile_ms: 300.0,
    },
];

/// Why small sets take what they take.
const WHERE: &str = "Where the time goes: for a packet and 10 rules (acl1_10) the program executes some 145 instructions, the \
                     one that only parses 31, by `polc dump` and the kernel's expansion of the map lookup. That is 16 in a \
                     nanosecond, about all that the processor can do, so instructions are what is paid for. Of the 115 more, \
                     30 count and return (a packet and its bytes, in this CPU's own slot of a map), 23 are what `ip_rcv` \
                     checks beyond a parser, the key and the questions for fragments and for headers that are cut short, and \
                     62 search four columns and combine their classes. 4 ns have room for 65: with counters, for 12 that \
                     search. Larger sets search more, and add the tables of pairs: from 10,000 rules on these no longer lie \
                     in the second-level cache, and each read of them that another waits for is some 10 ns. Rows of grouped \
                     classes that would take more than 1 MB are kept in pages, which takes 4 ns more at 10,000 rules and a \
                     quarter of the memory.\n\n\
                     Of the time that rules take to compile (12 sets, passes timed one by one while other work was stopped), \
                     of 1,000 and of 10,000 rules, chains to stages are 11 and 24 %, splitting and simplifying 12 and 11 %, \
                     the structures of the stages 64 and 42 %, the plan with its slots of counters 5 and 11 %, the object 8 \
                     and 12 %. Of 1,000 rules a matrix of classes and grouped classes are made of the stage that most packets \
                     come to, for neither's cost is known before; they take one CPU each. From 10,000 rules on a fifth of \
                     all time goes into the first touch of pages (`perf record`).";

/// What one rule set costs.
struct Row {
    name: String,
    rules: usize,
    /// ns over the parsing program, for each [`Traffic`].
    ns: [f64; 2],
    /// ns of the parsing program over the empty one.
    parse: f64,
    cost: Cost,
}

/// A rule set with headers and the number of the first rule of each.
pub(crate) struct Input {
    /// The rules.
    pub(crate) set: RuleSet,
    /// Different headers, in random order.
    pub(crate) headers: Vec<Header>,
    /// First rules, from 1; 0: none.
    pub(crate) first: Vec<u32>,
}

impl Input {
    /// Whether each header is accepted.
    pub(crate) fn accepts(&self) -> Vec<bool> {
        self.first.iter().map(|&number| self.set.accepts(number)).collect()
    }
}

/// Names of the rule sets to measure, and whether they are ClassBench's.
pub(crate) fn names(context: &Context) -> (Vec<&'static str>, bool) {
    let options = &context.options;
    let all: Vec<&'static str> = match &options.rulesets {
        Some(_) => classbench::SETS.to_vec(),
        None => generator::sets().collect(),
    };
    let wanted = |name: &&'static str| options.set.as_ref().is_none_or(|part| name.contains(part.as_str()));
    let few = options.quick && options.set.is_none();
    let step = if few { all.len() / 4 } else { 1 };
    // Every third of twelve: two access lists, a firewall, an IP chain.
    let chosen = all.iter().copied().skip(step / 2).step_by(step.max(1)).filter(wanted).collect();
    (chosen, options.rulesets.is_some())
}

/// A rule set of that name and size with at least [`DISTINCT`] headers; ClassBench's own headers are among them, and
/// what their file says of them must be what the scan finds.
///
/// # Errors
/// A file is of another form, or its first rules are not the scan's.
pub(crate) fn input(context: &Context, name: &str, size: &str, rules: usize) -> Result<Input, String> {
    let seed = context.options.seed;
    let (set, given) = match &context.options.rulesets {
        Some(folder) => classbench::read(folder, name, size)?,
        None => {
            let set = generator::generate(name, rules, seed).ok_or_else(|| format!("no set `{name}`"))?;
            (set, Vec::new())
        }
    };
    let mut random = Random::new(seed ^ 0x7261_6666_6963);
    let mut all: Vec<Header> = given.iter().map(|(header, _)| *header).collect();
    let found = set.first_matches(&all);
    if let Some(at) = (0..given.len()).find(|&at| found[at] != given[at].1) {
        let (header, expected) = &given[at];
        return Err(format!("{}: {header:?}: rule {} here, {expected} in the file", set.name, found[at]));
    }
    let mut seen: std::collections::HashSet<Header> = all.iter().copied().collect();
    for header in headers(&set, DISTINCT, &mut random) {
        if all.len() < DISTINCT && seen.insert(header) {
            all.push(header);
        }
    }
    random.shuffle(&mut all);
    let first = set.first_matches(&all);
    Ok(Input { set, headers: all, first })
}

/// The same in IPv6.
fn to_v6(input: &Input) -> Result<Input, String> {
    let set = input.set.to_v6();
    let headers: Vec<Header> = input.headers.iter().map(|header| header.to_v6()).collect();
    let first = set.first_matches(&headers);
    if first != input.first {
        return Err(format!("{}: the mapping to IPv6 changes which rule is first", set.name));
    }
    Ok(Input { set, headers, first })
}

/// Pools of both kinds of traffic.
pub(crate) fn pools(input: &Input, seed: u64) -> Vec<Pool> {
    let mut random = Random::new(seed ^ 0x706f_6f6c);
    let draw = |traffic| {
        Pool::new(input.set.family, &input.headers, &draw(traffic, input.headers.len(), &mut random))
    };
    Traffic::ALL.map(draw).into_iter().collect()
}

/// Compiles, checks and measures.
fn row(context: &mut Context, kind: ProgramKind, input: &Input) -> Result<Row, String> {
    let family = input.set.family;
    let subject = Subject::new(&input.set.name, &input.set.iptables_text("INPUT"), None, family, kind)?;
    subject
        .check(kind, &input.headers, &input.accepts(), input.set.rules.len())
        .map_err(|error| format!("{error} ({})", input.set.name))?;
    let (nothing, parser) = (Loaded::load(&empty(kind)?)?, Loaded::load(&parse_only(kind, family)?)?);
    let pools = pools(input, context.options.seed);
    let rounds = context.options.rounds;
    let driver = context.driver(kind, Form::Fields(family))?;
    let times = driver.measure(&[&nothing, &parser, &subject.loaded], &pools, rounds)?;
    context.note(times.spread);
    let over = |pool: usize| times.ns[2][pool] - times.ns[1][pool];
    Ok(Row {
        name: input.set.name.clone(),
        rules: input.set.rules.len(),
        ns: [over(0), over(1)],
        parse: times.ns[1][0] - times.ns[0][0],
        cost: subject.cost,
    })
}

/// Runs it.
///
/// # Errors
/// A wrong verdict, or no drivers.
pub(crate) fn run(context: &mut Context, family: Family) -> Result<Section, String> {
    let (name, title) = match family {
        Family::V4 => ("classify", "Classification: ns a packet over parsing, IPv4"),
        Family::V6 => ("ipv6", "The same rule sets in IPv6"),
    };
    let mut section = Section::new(name, title);
    let (names, classbench) = names(context);
    let source = if classbench {
        "ClassBench sets".to_string()
    } else {
        format!("generated sets (seed {}; no ClassBench sets beside the checkout)", context.options.seed)
    };
    section.text(format!(
        "{source} in INPUT, replace mode, XDP; {DISTINCT} or more different headers, every verdict checked \
         against a linear scan, and a sample against `Ruleset::eval`. ns are over a program that only parses. \
         *Uniform / Zipf* traffic."
    ));
    if family == Family::V4 {
        section.text(WHERE);
    }
    let mut summary = Table::new(&[
        "rules",
        "uniform / Zipf, ns (goal)",
        "worst set, uniform (goal)",
        "tables, MB: mean, most (goal)",
        "compile, ms: mean (goal)",
        "read, load, ms",
        "insns",
    ]);
    let mut detail = Table::new(&[
        "set",
        "rules",
        "uniform",
        "Zipf",
        "predicted",
        "parse",
        "tables, MB",
        "counters, MB",
        "insns",
        "verified",
        "code, kB",
        "read",
        "compile",
        "load",
    ]);
    let mut lines = vec![("uniform".to_string(), Vec::new()), ("Zipf".to_string(), Vec::new())];
    let mut failures = Vec::new();
    for goal in &GOALS {
        let options = &context.options;
        if options.size.map_or(options.quick && goal.rules > 10_000, |size| size != goal.rules) {
            continue;
        }
        let mut rows = Vec::new();
        for set in &names {
            let mut input = input(context, set, goal.size, goal.rules)?;
            if family == Family::V6 {
                input = to_v6(&input)?;
            }
            match row(context, ProgramKind::Xdp, &input) {
                Ok(row) => {
                    progress(&format!(
                        "  {:14} {:7} rules: {:>6} / {:>6} ns, {:>6} MB, compile {} ms",
                        row.name,
                        row.rules,
                        ns(row.ns[0]),
                        ns(row.ns[1]),
                        mb(row.cost.table_bytes),
                        ms(row.cost.compile)
                    ));
                    rows.push(row);
                }
                Err(error) if error.starts_with("WRONG") => return Err(error),
                Err(error) => {
                    progress(&format!("  {}: {error}", input.set.name));
                    failures.push(format!("{}: {error}", input.set.name));
                }
            }
        }
        if rows.is_empty() {
            continue;
        }
        let mean = |of: &dyn Fn(&Row) -> f64| geometric_mean(rows.iter().map(of));
        let average = |of: &dyn Fn(&Cost) -> Duration| {
            rows.iter().map(|row| of(&row.cost)).sum::<Duration>() / rows.len() as u32
        };
        let (uniform, zipf) = (mean(&|row| row.ns[0]), mean(&|row| row.ns[1]));
        let worst = rows.iter().max_by(|a, b| a.ns[0].total_cmp(&b.ns[0])).expect("not empty");
        let tables = rows.iter().map(|row| row.cost.table_bytes);
        summary.row(vec![
            goal.size.to_string(),
            format!("**{} / {}** ({} / {})", ns(uniform), ns(zipf), goal.uniform, goal.zipf),
            format!("{} {} ({})", worst.name, ns(worst.ns[0]), goal.worst),
            format!(
                "{}, {} ({})",
                mb(tables.clone().sum::<usize>() / rows.len()),
                mb(tables.max().unwrap_or(0)),
                goal.memory_mb
            ),
            format!("{} ({})", ms(average(&|cost| cost.compile)), goal.compile_ms),
            format!("{}, {}", ms(average(&|cost| cost.read)), ms(average(&|cost| cost.load))),
            rows.iter().map(|row| row.cost.insns).max().unwrap_or(0).to_string(),
        ]);
        lines[0].1.push((goal.rules as f64, uniform));
        lines[1].1.push((goal.rules as f64, zipf));
        for row in rows {
            detail.row(vec![
                row.name,
                row.rules.to_string(),
                ns(row.ns[0]),
                ns(row.ns[1]),
                ns(f64::from(row.cost.predicted_tenths_ns) / 10.0),
                ns(row.parse),
                mb(row.cost.table_bytes),
                mb(row.cost.counter_bytes),
                row.cost.insns.to_string(),
                row.cost.verified.to_string(),
                format!("{:.1}", f64::from(row.cost.jited_bytes) / 1e3),
                ms(row.cost.read),
                ms(row.cost.compile),
                ms(row.cost.load),
            ]);
        }
    }
    section.table(summary);
    if !failures.is_empty() {
        section.text(format!("Not measured: {}.", failures.join("; ")));
    }
    if lines[0].1.len() > 1 {
        section.plot(Plot {
            name: name.to_string(),
            title: format!("{title} (geometric mean of {} sets)", names.len()),
            x: "rules".into(),
            y: "ns a packet".into(),
            lines,
        });
    }
    section.text("Each set (times in ms, of compiling with all CPUs; ns as above):");
    section.table(detail);
    if context.spread > NOISY {
        section.text(noise(context.spread));
    }
    Ok(section)
}

/// What to say of a noisy machine.
pub(crate) fn noise(spread: f64) -> String {
    format!(
        "**Noisy machine**: at worst, a program's median round took {:.0} % longer than its fastest. Least times are \
         given, but treat differences below a fifth as nothing.",
        (spread - 1.0) * 100.0
    )
}
