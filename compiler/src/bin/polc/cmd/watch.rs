//! `polc watch`: applied policies are kept in step with the host.
//!
//! An accelerating program is right as long as the kernel's rules and sets are those it was compiled from. x_tables does
//! not tell when they change, so they are read at intervals; a program whose rules are no longer the kernel's is
//! suspended by one word in its memory, and leaves every packet to the kernel until they are again. So is one of which
//! that can't be told: what is kept of it is damaged, or the kernel does not tell. Addresses, links and announced
//! connections are what programs were compiled for: when they change, the policy is applied anew, which swaps its
//! programs at once, with the sets as they are. Changes of the network are told over netlink and wake the command at
//! once. What can't be applied is tried again at the next such change, and after longer and longer pauses.
//!
//! Until a change is seen a program still drops by the old state: for rules and sets at most the interval and the time
//! that reading them takes, for addresses and links the time that applying anew takes.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use polc::agree;
use polc::session::{ReadOptions, Session};
use polc_backend_ebpf::emit::{SUSPEND_MAP, suspend_map};
use polc_ir::env::Mode;
use polc_ir::source::SourceMap;
use polc_ir::source::bytes::to_text;
use polc_loader::load::map_spec;
use polc_loader::sets::SETS_FILE;
use polc_loader::state::SlotName;
use polc_loader::status::{self, Open};
use polc_loader::store::Store;
use polc_loader::sys::{Map, NetworkChanges, Signals, Sys};
use polc_loader::{Error, net};
use serde::de::DeserializeOwned;

use super::applied::{self, Opened};
use super::host::{self, Surroundings};
use super::retry::{self, Retries};
use super::{FOUND, kept_sets, live, set};
use crate::cli::WatchArgs;
use crate::failure::Failure;
use crate::output::Output;

/// What is said of a policy of which nobody knows whether the kernel's rules are its own.
const UNJUDGED: &str = "suspended, whether the kernel's rules are its own can't be told";

pub(super) fn run(args: &WatchArgs, output: &Output) -> Result<ExitCode, Failure> {
    let sys = Sys::new();
    let mut said = Said { output, by_slot: BTreeMap::new() };
    if args.once {
        let store = live::store(&args.slots.store)?;
        let Opened { policies, mut failed, unread, .. } = applied::open_all(&sys, &args.slots, output)?;
        if policies.is_empty() && failed.is_empty() {
            return Err(live::nothing(&sys, &args.slots));
        }
        for slot in &unread {
            failed.extend(suspend_unread(&sys, &store, slot, &mut said).err());
        }
        let (well, failures) = look_at(&sys, &policies, &mut Tries::new(Duration::ZERO), &mut said);
        failed.extend(failures.into_iter().map(|(_, failure)| failure));
        live::all_well(failed, output)?;
        return Ok(if well { ExitCode::SUCCESS } else { FOUND.into() });
    }
    let store = live::store(&args.slots.store)?;
    let signals = sys.signals().map_err(Error::call("wait for signals"))?;
    let mut changes = sys.network_changes().map_err(Error::call("listen for changes of the network"))?;
    let interval = Duration::from_millis(args.interval.into());
    let mut tries = Tries::new(interval);
    loop {
        live::take_back_overdue(&sys, &args.slots, output)?;
        let mut policies = Vec::new();
        for slot in live::slots(&sys, &args.slots)? {
            match status::open(&sys, &store, &slot) {
                Ok(policy) => policies.push(policy),
                Err(error) => {
                    let suspended = match &error {
                        Error::NotApplied(_) => Ok(()),
                        _ => suspend_unread(&sys, &store, &slot, &mut said),
                    };
                    let mut text = Failure::from(error).to_string();
                    if let Err(failure) = suspended {
                        text += &format!("\n{failure}");
                    }
                    said.of(&slot, &text);
                }
            }
        }
        for (policy, failure) in look_at(&sys, &policies, &mut tries, &mut said).1 {
            // A policy that is replaced or removed meanwhile is looked at again, or no more.
            if policy.is_attached(&sys).unwrap_or(true) {
                said.of(&policy.slot, &failure.to_string());
            }
        }
        if wait(&sys, &signals, &mut changes, interval)? {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// What a policy takes to be in step with the host.
enum Step {
    /// Nothing: it is.
    Nothing,
    /// More than can be done here, for this reason.
    Off(String),
    /// To be applied with these options anew, for what the host is now.
    Anew(Vec<String>, Surroundings),
}

/// Which policies could not be applied anew: what was noted of them, which tells of every change, and the host as it was.
type Tries = Retries<SlotName, (Option<String>, Surroundings)>;

/// Brings policies in step with the host; whether they are, and what failed.
fn look_at<'p>(
    sys: &Sys,
    policies: &'p [Open],
    tries: &mut Tries,
    said: &mut Said<'_>,
) -> (bool, Vec<(&'p Open, Failure)>) {
    let (mut well, mut failed) = (true, Vec::new());
    let mut anew: Vec<Anew<'_>> = Vec::new();
    for policy in policies {
        let step = look(sys, policy, said).and_then(|step| match step {
            Step::Anew(options, now) => Anew::new(sys, policy, &options, now).map(Some),
            Step::Off(_) => {
                well = false;
                Ok(None)
            }
            Step::Nothing => Ok(None),
        });
        match step {
            Ok(None) => {}
            // Several hooks that have the same rules are changed at once, as they were when they got them.
            Ok(Some(one)) => match anew.iter_mut().find(|other| other.what == one.what) {
                Some(other) => {
                    other.policies.extend(one.policies);
                    other.host.extend(one.host);
                    other.hooks.extend(one.hooks);
                }
                None => anew.push(one),
            },
            Err(failure) => failed.push((policy, failure)),
        }
    }
    for one in &anew {
        let now = Instant::now();
        let tried = one.tried(sys);
        if tried.iter().all(|(slot, seen)| tries.waits(slot, seen, now)) {
            well = false;
            continue;
        }
        let applied = one.apply();
        let is_applied = matches!(applied, Ok((true, _)));
        tried.iter().for_each(|(slot, seen)| tries.tried(slot, seen, is_applied, now));
        well &= is_applied;
        match applied {
            Ok((_, told)) => one.said(is_applied, &told, said),
            Err(failure) => failed.push((one.policies[0], failure)),
        }
    }
    (well, failed)
}

/// What was last said of each policy: the same is not said again until something else was.
struct Said<'o> {
    output: &'o Output,
    by_slot: BTreeMap<SlotName, String>,
}

impl Said<'_> {
    fn of(&mut self, slot: &SlotName, what: &str) {
        let before = self.by_slot.insert(slot.clone(), what.to_string());
        if before.is_none_or(|before| before != what) {
            self.output.remark(&format!("{slot}: {what}\n"));
        }
    }

    fn nothing_of(&mut self, slot: &SlotName) {
        self.by_slot.remove(slot);
    }
}

/// Waits until there is something to look at; whether the command was asked to end.
fn wait(
    sys: &Sys,
    signals: &Signals,
    changes: &mut NetworkChanges,
    interval: Duration,
) -> Result<bool, Failure> {
    let files = [signals.as_fd(), changes.as_fd()];
    let ready = sys.wait_readable(&files, None, interval).map_err(Error::call("wait"))?;
    changes.forget();
    Ok(ready.first() == Some(&true))
}

/// Suspends a policy, or lets it go on, as the host has it; what else it takes.
fn look(sys: &Sys, policy: &Open, said: &mut Said<'_>) -> Result<Step, Failure> {
    let step = judge(sys, policy);
    // What can't be judged does not go on dropping.
    let in_step = matches!(step, Ok(Step::Nothing));
    let map = policy.map(SUSPEND_MAP);
    let changed = map.map_or(Ok(false), |map| suspend(sys, &policy.slot, map, !in_step))?;
    match &step {
        Ok(Step::Nothing) => {
            if changed {
                said.of(&policy.slot, "goes on, the kernel's rules are its own again");
            }
            said.nothing_of(&policy.slot);
        }
        Ok(Step::Off(why)) => {
            let suspended = if map.is_some() { "suspended, " } else { "" };
            said.of(&policy.slot, &format!("{suspended}{why}"));
        }
        Ok(Step::Anew(..)) => {}
        // Of a policy that is replaced meanwhile nothing is kept any more.
        Err(_) if changed && policy.is_attached(sys).unwrap_or(true) => said.of(&policy.slot, UNJUDGED),
        Err(_) => {}
    }
    step
}

/// What a policy takes to be in step with the host.
fn judge(sys: &Sys, policy: &Open) -> Result<Step, Failure> {
    let manifest = &policy.object.manifest;
    let kept: Surroundings = kept_json(sys, policy, live::HOST_FILE)?;
    let options: Vec<String> = kept_json(sys, policy, live::OPTIONS_FILE)?;
    let accelerates = manifest.mode == Some(Mode::Accelerate);
    let checked = accelerates && !options.iter().any(|option| option == "--unchecked");
    if checked && let Some(why) = disagreement(sys, policy)? {
        return Ok(Step::Off(format!("the kernel's rules are not its own: {why}")));
    }
    // Rules and options name devices, and so does the place that the policy is kept at.
    if let Some(name) = policy.renamed(&net::devices(sys)?) {
        return Ok(Step::Off(format!(
            "its device is called `{name}` now, by which it can't be applied anew: `polc flush --dev {name}`, and apply it with --dev {name}"
        )));
    }
    let family = manifest.family.unwrap_or(policy.slot.family);
    let now = Surroundings::now(sys, family, policy.slot.device.as_deref(), kept.addresses.is_some())?;
    Ok(if now == kept { Step::Nothing } else { Step::Anew(options, now) })
}

/// What is kept with a policy as JSON.
fn kept_json<T: DeserializeOwned>(sys: &Sys, policy: &Open, name: &str) -> Result<T, Error> {
    let text = policy.kept_text(sys, name)?;
    serde_json::from_str(&text).map_err(|error| damaged(policy, name, error))
}

/// The failure that a file kept with a policy is damaged.
fn damaged(policy: &Open, name: &str, why: impl ToString) -> Error {
    Error::Corrupt { path: policy.path(name), why: why.to_string() }
}

/// Why the kernel's rules are not those that a policy was compiled from, if they aren't.
///
/// # Errors
/// The kernel does not tell, or what is kept is not what was applied.
fn disagreement(sys: &Sys, policy: &Open) -> Result<Option<String>, Failure> {
    let manifest = &policy.object.manifest;
    let mut sources = SourceMap::new();
    let rules = sources.add("rules", policy.kept_text(sys, live::RULES_FILE)?);
    let options =
        ReadOptions { family: manifest.family, semantics: manifest.semantics, ..ReadOptions::default() };
    let session = Session::read(sources, rules, &[], &options);
    let printed = host::dump(&policy.kept_text(sys, live::CANONICAL_FILE)?, session.family());
    // Rules with errors are not applied, and what stands for no rule at all would agree with a kernel that has none.
    if session.has_errors() || agree::rules(&session.dump, &printed).is_some() {
        return Err(damaged(policy, live::RULES_FILE, kept_sets::NOT_APPLIED).into());
    }
    let sets = kept_sets::read(sys, policy)?.into_iter().map(|(_, bytes)| host::sets(&to_text(bytes)).0);
    let sets: Vec<_> = sets.collect();
    host::disagreement(sys, &session, &sets)
}

/// Suspends a program, by its map, or lets it go on; whether that is a change. Programs in replace mode have no such map:
/// nothing else would decide their packets.
fn suspend(sys: &Sys, slot: &SlotName, map: &Map, on: bool) -> Result<bool, Failure> {
    let key = 0u32.to_ne_bytes();
    let failed = || Error::call(format!("suspend the program {slot}"));
    let Some(mut value) = sys.map_lookup(map, &key).map_err(failed())? else { return Ok(false) };
    let word = u32::from(on).to_ne_bytes();
    if value.get(..4) == Some(&word) {
        return Ok(false);
    }
    value[..4].copy_from_slice(&word);
    sys.map_update(map, &key, &value).map_err(failed())?;
    Ok(true)
}

/// Suspends a policy that can't be opened, by its pins.
fn suspend_unread(sys: &Sys, store: &Store, name: &SlotName, said: &mut Said<'_>) -> Result<(), Failure> {
    let (slot, def) = (store.slot(name), suspend_map());
    for number in slot.generations_present(sys)? {
        match status::pinned_map(sys, &slot.map(number, SUSPEND_MAP), &map_spec(&def)) {
            Ok(map) => {
                if suspend(sys, name, &map, true)? {
                    said.of(name, UNJUDGED);
                }
            }
            // There is none in replace mode.
            Err(Error::Pin { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Policies to be applied anew by one `polc apply`.
struct Anew<'p> {
    policies: Vec<&'p Open>,
    /// The host as each was looked at.
    host: Vec<Surroundings>,
    /// The hooks of their programs.
    hooks: Vec<String>,
    what: What,
}

/// What is applied, but for the hooks.
#[derive(PartialEq, Eq)]
struct What {
    options: Vec<String>,
    source: String,
    rules: Option<Vec<u8>>,
    /// The files of sets.
    sets: Vec<(String, Vec<u8>)>,
    /// What is to be read instead of them, because sets were changed.
    changed: Option<String>,
}

/// The text of the sets of a policy as they are now, if they are not as the policy was applied with.
fn changed_sets(sys: &Sys, policy: &Open, files: &[(String, Vec<u8>)]) -> Result<Option<String>, Failure> {
    let sets = policy.sets(sys)?;
    // Where it is lost, sets that were changed would look as if they were not.
    if sets.sets != policy.object.manifest.sets {
        return Err(damaged(policy, SETS_FILE, kept_sets::NOT_APPLIED).into());
    }
    let changed = sets.changed(sys)?;
    if changed.is_empty() {
        return Ok(None);
    }
    let adds = |line: &str| {
        let mut words = line.split_whitespace();
        let verb = words.next().is_some_and(|word| ["add", "-A", "--add"].contains(&word));
        verb && words.next().is_some_and(|name| changed.iter().any(|(set, _)| set.name == name))
    };
    let mut text = String::new();
    for (_, bytes) in files {
        let kept = to_text(bytes.clone());
        kept.lines().filter(|line| !adds(line)).for_each(|line| text.extend([line, "\n"]));
    }
    for (manifest, words) in &changed {
        let now = set::text(manifest, policy.slot.family, words);
        now.lines().filter(|line| adds(line)).for_each(|line| text.extend([line, "\n"]));
    }
    Ok(Some(text))
}

impl<'p> Anew<'p> {
    fn new(sys: &Sys, policy: &'p Open, options: &[String], host: Surroundings) -> Result<Anew<'p>, Failure> {
        let (mut others, mut hooks) = (Vec::new(), Vec::new());
        let mut words = options.iter();
        while let Some(word) = words.next() {
            if word == "--hook" { hooks.extend(words.next().cloned()) } else { others.push(word.clone()) }
        }
        let sets = kept_sets::read(sys, policy)?;
        let what = What {
            options: others,
            source: policy.generation.source.clone(),
            rules: policy.file(sys, live::RULES_FILE)?,
            changed: changed_sets(sys, policy, &sets)?,
            sets,
        };
        Ok(Anew { policies: vec![policy], host: vec![host], hooks, what })
    }

    /// What is tried: each policy as it is, for the host as it is.
    fn tried(&self, sys: &Sys) -> Vec<(&'p SlotName, (Option<String>, Surroundings))> {
        let one = |(policy, host): (&&'p Open, &Surroundings)| {
            // A note that can't be read is that of no change.
            (&policy.slot, (policy.note(sys).ok().flatten(), host.clone()))
        };
        self.policies.iter().zip(&self.host).map(one).collect()
    }

    /// Says what was done, and what that told.
    fn said(&self, applied: bool, told: &str, said: &mut Said<'_>) {
        const DONE: &str = "the host has changed, applying anew";
        let (first, others) = self.policies.split_first().expect("there is one");
        others.iter().for_each(|policy| said.of(&policy.slot, DONE));
        let mut text = format!("{DONE}\n{}", told.trim_end());
        if !applied {
            let longest = retry::PAUSE_MAX.as_secs();
            text += &format!("\ntried again when the host changes, and after pauses of up to {longest} s");
        }
        said.of(&first.slot, &text);
    }

    /// Applies the rules again, as `polc apply` does; whether that went well, and what it told. What was in force before
    /// stays otherwise, suspended where it can be.
    fn apply(&self) -> Result<(bool, String), Failure> {
        let program = std::env::current_exe().map_err(Error::call("find polc itself"))?;
        let policy = self.policies[0];
        let mut command = Command::new(program);
        command.arg("apply").args(&self.what.options).args(["--named", &self.what.source]);
        // Whoever applies something else while this compiles has the last word.
        let over: Vec<String> =
            self.policies.iter().map(|policy| policy.generation.program_id.to_string()).collect();
        command.args(["--over", &over.join(",")]);
        self.hooks.iter().for_each(|hook| {
            command.args(["--hook", hook]);
        });
        let changed = self.what.changed.as_deref();
        if changed.is_some() {
            command.args(["--ipset", "/dev/stdin"]).stdin(Stdio::piped());
        } else {
            // The files are read before they are replaced.
            for (name, _) in &self.what.sets {
                command.arg("--ipset").arg(policy.path(name));
            }
            command.stdin(Stdio::null());
        }
        command.arg(policy.path(live::RULES_FILE));
        command.stdout(Stdio::inherit()).stderr(Stdio::piped());
        let running = || Error::call("run polc apply");
        let mut child = command.spawn().map_err(running())?;
        if let (Some(text), Some(mut stdin)) = (changed, child.stdin.take()) {
            // Who does not read it says why.
            _ = stdin.write_all(text.as_bytes());
        }
        let output = child.wait_with_output().map_err(running())?;
        Ok((output.status.success(), to_text(output.stderr)))
    }
}
