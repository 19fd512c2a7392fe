//! `polc trace`: packets as applied policies decide them, through the programs' ring buffers.
//!
//! A program reports only while somebody watches, so whatever ends this command (a signal, a reader that goes away, a
//! policy that is replaced or removed) ends in switching reports off again. What was not reported is counted in the
//! kernel; since counts are read after the last program run has ended, packets shown and packets not shown are all there
//! were. A policy that takes another's place reports from its first packet on ([`polc_loader::wish`]), so that holds for
//! both together.

mod stream;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use polc::watch;
use polc_backend_ebpf::manifest::Manifest;
use polc_backend_ebpf::trace::{Config, Pattern, Tally};
use polc_ir::hook::Hook;
use polc_loader::events::{self, Ends, TraceMaps, Watch};
use polc_loader::state::SlotName;
use polc_loader::status::Open;
use polc_loader::store::Lock;
use polc_loader::sys::Sys;
use polc_loader::wish::Wish;
use polc_loader::{Error, net};

use self::stream::Stream;
use super::applied::{self, Opened};
use super::live;
use crate::cli::TraceArgs;
use crate::failure::Failure;
use crate::output::Output;

/// How often is told what was not reported, and asked whether the policies are still there.
const CHECK: Duration = Duration::from_secs(1);
/// Reports of one policy that are taken at once, to be put in order with those of the others: more than its buffer holds.
const BATCH_MAX: usize = 4_096;

pub(super) fn run(args: &TraceArgs, output: &Output) -> Result<ExitCode, Failure> {
    let sys = Sys::new();
    let Opened { mut policies, failed, .. } = applied::open_some(&sys, &args.slots, output)?;
    let mut devices = Devices::new(&sys)?;
    let patterns = watch::filter(&args.filter, &|name| devices.number(name)).map_err(Failure::Usage)?;
    let signals = sys.signals().map_err(Error::call("wait for signals"))?;
    let mut stream = Stream::new(args, &sys, &signals);
    let asked = Asked::new(&sys, args, patterns, output);
    let mut held = BTreeMap::new();
    let result = loop {
        match asked.watch_policies(&policies, &mut held, &mut devices, &mut stream) {
            Ok(End::Asked) => break Ok(()),
            Ok(End::Changed) => {}
            Err(failure) => break Err(failure),
        }
        policies = match applied::open_all(&sys, &args.slots, output) {
            Ok(Opened { policies, failed, .. }) if policies.is_empty() && failed.is_empty() => {
                output.remark("what was watched is not applied any more\n");
                break Ok(());
            }
            // Of those that can't be opened the last one is told, at the end.
            Ok(Opened { policies, failed, .. }) if policies.is_empty() => {
                break live::all_well(failed, output).map(|_| ());
            }
            Ok(opened) => {
                opened.failed.iter().for_each(|failure| output.error(&failure.to_string()));
                opened.policies
            }
            Err(failure) => break Err(failure),
        };
        output.remark("a policy was replaced or removed; going on with what is applied now\n");
    };
    // Some may have been left on for another look that did not come.
    for policy in policies.iter().filter(|policy| Held::of(&held, policy).is_some()) {
        if let Some(maps) = TraceMaps::of(&policy.object.manifest, |name| policy.map(name)) {
            events::switch_off(&sys, maps);
        }
    }
    output.remark(&stream.summary());
    result.and_then(|()| live::all_well(failed, output))
}

/// Why watching ended.
enum End {
    /// Somebody wants it, or nobody reads any more.
    Asked,
    /// A policy is no longer attached.
    Changed,
}

/// The generation of a slot that was watched last; nobody else watches it meanwhile.
struct Held {
    number: u32,
    _lock: Lock,
    /// If it was left reporting while others are looked at again, what it had reported by then.
    left_on: Option<Tally>,
}

impl Held {
    fn of<'h>(held: &'h BTreeMap<SlotName, Held>, policy: &Open) -> Option<&'h Held> {
        held.get(&policy.slot).filter(|held| held.number == policy.number)
    }
}

/// What is asked for.
struct Asked<'a> {
    sys: &'a Sys,
    args: &'a TraceArgs,
    wish: Wish,
    config: Config,
    output: &'a Output,
}

impl<'a> Asked<'a> {
    fn new(sys: &'a Sys, args: &'a TraceArgs, patterns: Vec<Pattern>, output: &'a Output) -> Asked<'a> {
        let verdicts = args.verdict.iter().map(|verdict| verdict.word().to_string()).collect();
        let wish = Wish { verdicts, chain: args.chain.clone(), line: args.line, ..Wish::default() };
        let config = Config { on: true, patterns, rate: args.rate, burst: args.rate };
        Asked { sys, args, wish, config, output }
    }

    /// Watches policies until somebody wants it to end, or one of them is no longer attached.
    fn watch_policies(
        &self,
        policies: &[Open],
        held: &mut BTreeMap<SlotName, Held>,
        devices: &mut Devices<'_>,
        stream: &mut Stream<'_>,
    ) -> Result<End, Failure> {
        let (sys, output) = (self.sys, self.output);
        let (mut watched, mut watches) = (Vec::new(), Vec::new());
        let (mut any, mut changed) = (false, false);
        let is_first = held.is_empty();
        for policy in policies {
            let manifest = &policy.object.manifest;
            let Some(maps) = TraceMaps::of(manifest, |name| policy.map(name)) else { continue };
            any |= manifest.counters.iter().any(|slot| self.wish.wants(slot));
            match self.watch(policy, maps, held) {
                Ok(watch) => watches.push(watch),
                // It may have been replaced since it was opened.
                Err(_) if is_gone(sys, policy) => {
                    changed = true;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            watched.push(Watched::new(policy));
        }
        let none = watches.is_empty() && !changed;
        if none && is_first {
            let first = policies.first().map_or_else(String::new, |policy| policy.slot.to_string());
            return Err(Error::NoReports(first).into());
        }
        if !any && !none && !changed {
            let nobody = nobody_decides(self.args);
            if is_first {
                return Err(Failure::Usage(nobody));
            }
            // The next policy may have who does.
            output.remark(&format!("{nobody}\n"));
        }
        for policy in policies.iter().filter(|policy| policy.object.manifest.trace.is_none()) {
            output.remark(&format!("{}: applied without reports, so not shown\n", policy.slot));
        }
        if none {
            output.remark("waiting for a policy that is applied without --no-trace\n");
        }
        for Watched { policy, .. } in &watched {
            output.remark(&format!("watching {}: {}\n", policy.slot, policy.generation.source));
        }
        let end = match changed {
            true => Ok(End::Changed),
            false => show(sys, policies, &mut watches, &watched, devices, stream),
        };
        // Whatever the end was: switch off, show what is still there, and only then count. What is still in force goes on
        // reporting while the others are looked at again.
        let mut tally = Tally::default();
        for (watch, Watched { policy, .. }) in watches.iter_mut().zip(&watched) {
            let stays = matches!(end, Ok(End::Changed)) && !is_gone(sys, policy);
            if !stays {
                watch.stop()?;
            }
            let told = watch.tally()?;
            if let Some(held) = held.get_mut(&policy.slot).filter(|_| stays) {
                held.left_on = Some(watch.leave_on(told));
            }
            tally = tally + told;
        }
        if end.is_ok() {
            take(&mut watches, &watched, devices, stream)?;
        }
        stream.not_reported(tally)?;
        stream.finish_round(tally);
        end
    }

    /// Watches a policy's reports: goes on with them where the policy was watched before, or took the place of one that
    /// was, else switches them on.
    fn watch<'o>(
        &self,
        policy: &'o Open,
        maps: TraceMaps<'o>,
        held: &mut BTreeMap<SlotName, Held>,
    ) -> Result<Watch<'o>, Error>
    where
        'a: 'o,
    {
        let sys = self.sys;
        let counters = &policy.object.manifest.counters;
        let wanted = |slot: usize| counters.get(slot).is_some_and(|slot| self.wish.wants(slot));
        let before = held.get(&policy.slot).map(|held| (held.number, held.left_on));
        let is_new = before.is_none_or(|(number, _)| number != policy.number);
        if is_new {
            let _lock = policy.lock_reports(sys)?;
            held.insert(policy.slot.clone(), Held { number: policy.number, _lock, left_on: None });
        }
        let handed_on = policy.wish(sys)?.filter(|wish| wish.is_like(&self.wish) && wish.after.is_some());
        let start = match before {
            Some((_, left_on)) if !is_new => left_on,
            Some(_) => handed_on.as_ref().map(|wish| wish.start),
            None => None,
        };
        let watch = match start {
            Some(start) => Watch::take_over(sys, maps, &self.config, wanted, start)?,
            None => None,
        };
        let is_next = !is_new || handed_on.and_then(|wish| wish.after) == before.map(|(number, _)| number);
        if before.is_some() && !(watch.is_some() && is_next) {
            self.output.remark(&format!(
                "{}: what was decided between the two policies that were watched is neither shown nor counted as not reported\n",
                policy.slot
            ));
        }
        match watch {
            Some(watch) => Ok(watch),
            None => {
                policy.leave_wish(sys, &self.wish)?;
                Watch::start(sys, maps, &self.config, wanted)
            }
        }
    }
}

/// Whether a policy is not what is attached any more. What keeps it from being told is told when it is opened again.
fn is_gone(sys: &Sys, policy: &Open) -> bool {
    !policy.is_attached(sys).unwrap_or(false)
}

/// Shows packets until something ends it. A policy that reports nothing may be replaced by one that does.
fn show(
    sys: &Sys,
    policies: &[Open],
    watches: &mut [Watch<'_>],
    watched: &[Watched<'_>],
    devices: &mut Devices<'_>,
    stream: &mut Stream<'_>,
) -> Result<End, Failure> {
    let stdout = io::stdout();
    let mut changes = sys
        .name_changes(policies.iter().map(Open::pins))
        .map_err(Error::call("wait for changes of the policies"))?;
    let mut checked = Instant::now();
    let mut notes: Vec<Option<String>> = vec![None; policies.len()];
    loop {
        let is_due = checked.elapsed() >= CHECK;
        if is_due {
            checked = Instant::now();
            let mut tally = Tally::default();
            for watch in watches.iter() {
                tally = tally + watch.tally()?;
            }
            stream.not_reported(tally)?;
        }
        for (policy, before) in policies.iter().zip(&mut notes) {
            let note = policy.note(sys)?;
            if (is_due || note != *before) && is_gone(sys, policy) {
                return Ok(End::Changed);
            }
            *before = note;
        }
        let ends =
            Ends { changes: Some(&changes), signals: Some(stream.signals()), output: Some(stdout.as_fd()) };
        let ended = events::wait(sys, watches, ends, CHECK)?;
        changes.forget();
        take(watches, watched, devices, stream)?;
        if ended || stream.is_over() {
            return Ok(End::Asked);
        }
    }
}

/// Shows reports of each policy, no more than [`BATCH_MAX`], in the order of their times.
fn take(
    watches: &mut [Watch<'_>],
    watched: &[Watched<'_>],
    devices: &mut Devices<'_>,
    stream: &mut Stream<'_>,
) -> Result<(), Failure> {
    let mut batch = Vec::new();
    for (watch, policy) in watches.iter_mut().zip(watched) {
        batch.extend(std::iter::from_fn(|| watch.take()).take(BATCH_MAX).map(|event| (event, policy)));
    }
    batch.sort_by_key(|(event, _)| event.time_ns);
    for (event, policy) in batch {
        if stream.is_over() {
            break;
        }
        stream.packet(&event, policy, devices)?;
    }
    stream.flush()
}

fn nobody_decides(args: &TraceArgs) -> String {
    let mut wanted = Vec::new();
    if !args.verdict.is_empty() {
        let words: Vec<&str> = args.verdict.iter().map(|verdict| verdict.word()).collect();
        wanted.push(format!("with verdict {}", words.join(" or ")));
    }
    wanted.extend(args.chain.as_ref().map(|chain| format!("in chain `{chain}`")));
    wanted.extend(args.line.map(|line| format!("by a rule in line {line}")));
    format!("no packet is ever decided {}; `polc save` prints the applied rules", wanted.join(", "))
}

/// A policy being watched.
struct Watched<'o> {
    policy: &'o Open,
    manifest: &'o Manifest,
    /// By counter slot.
    hooks: Vec<Option<Hook>>,
}

impl Watched<'_> {
    fn new(policy: &Open) -> Watched<'_> {
        let manifest = &policy.object.manifest;
        let hooks = manifest.counters.iter().map(|slot| applied::hook_of(manifest, slot)).collect();
        Watched { policy, manifest, hooks }
    }
}

/// Names of devices by number.
struct Devices<'s> {
    sys: &'s Sys,
    names: BTreeMap<u32, String>,
    asked: Instant,
}

impl Devices<'_> {
    fn new(sys: &Sys) -> Result<Devices<'_>, Error> {
        let names = net::devices(sys)?.into_iter().map(|device| (device.ifindex, device.name)).collect();
        Ok(Devices { sys, names, asked: Instant::now() })
    }

    fn number(&self, name: &str) -> Option<u32> {
        self.names.iter().find(|(_, own)| *own == name).map(|(number, _)| *number)
    }

    /// The device's name; `#7` if the kernel has none.
    fn name(&mut self, number: u32) -> String {
        if !self.names.contains_key(&number)
            && self.asked.elapsed() >= CHECK
            && let Ok(again) = Devices::new(self.sys)
        {
            *self = Devices { ..again };
        }
        self.names.get(&number).cloned().unwrap_or_else(|| format!("#{number}"))
    }
}
