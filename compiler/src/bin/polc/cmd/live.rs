//! What the commands on applied policies share, and the short ones among them: `confirm`, `flush`, the watchdog.

use std::io::Read as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use polc_loader::Error;
use polc_loader::confirm::{self, Confirmed};
use polc_loader::flush::flush_all;
use polc_loader::gone;
use polc_loader::held::Held;
use polc_loader::net::{self, Device};
use polc_loader::repair;
use polc_loader::state::{Confirm, SlotName};
use polc_loader::store::{LOCK_WAIT, Store};
use polc_loader::swap;
use polc_loader::sys::Sys;

use super::FOUND;
use crate::cli::{FlushArgs, SlotArgs, StoreArgs, WatchdogArgs};
use crate::failure::Failure;
use crate::output::Output;

/// Name of the file that the applied rules are kept in.
pub(super) const RULES_FILE: &str = "rules";
/// Name of the file that the rules are kept in as iptables-save prints them.
pub(super) const CANONICAL_FILE: &str = "canonical";
/// Name of the file that the host is kept in as it was ([`super::host::Surroundings`]).
pub(super) const HOST_FILE: &str = "host.json";
/// Name of the file that the options are kept in which apply the same rules again.
pub(super) const OPTIONS_FILE: &str = "options.json";

/// The store that options name.
pub(super) fn store(args: &StoreArgs) -> Result<Store, Failure> {
    Ok(Store::new(&args.bpffs, &args.state)?)
}

/// The slots that options name: those with state, whatever has become of it, or pins.
pub(super) fn slots(sys: &Sys, args: &SlotArgs) -> Result<Vec<SlotName>, Failure> {
    swap::may_change(sys)?;
    let store = store(&args.store)?;
    let (names, asked) = (store.names(sys)?, Asked::new(sys, &store, args)?);
    Ok(names.into_iter().filter(|slot| asked.includes(slot)).collect())
}

/// Takes changes back that had to be confirmed by now, where the process that was to do it did not live to.
pub(super) fn take_back_overdue(sys: &Sys, args: &SlotArgs, output: &Output) -> Result<(), Failure> {
    let store = store(&args.store)?;
    for slot in slots(sys, args)? {
        // What can't be taken back is told by whoever looks at it.
        if let Ok(true) = repair::take_back_overdue(sys, &store, &slot) {
            output
                .remark(&format!("{slot}: nobody confirmed the last change in time, so it was taken back\n"));
        }
    }
    Ok(())
}

/// Which slots options name.
struct Asked<'a> {
    sys: &'a Sys,
    store: &'a Store,
    args: &'a SlotArgs,
    /// The devices there are, if one is asked for.
    devices: Vec<Device>,
}

impl<'a> Asked<'a> {
    fn new(sys: &'a Sys, store: &'a Store, args: &'a SlotArgs) -> Result<Asked<'a>, Failure> {
        let devices = if args.dev.is_some() { net::devices(sys)? } else { Vec::new() };
        Ok(Asked { sys, store, args, devices })
    }

    fn includes(&self, slot: &SlotName) -> bool {
        let args = self.args;
        args.attach.is_none_or(|attach| slot.attach == attach.into())
            && args.family.family().is_none_or(|family| slot.family == family)
            && args.hook.is_none_or(|hook| slot.hook == Some(hook.into()))
            && args.dev.as_ref().is_none_or(|dev| self.is_of(slot, dev))
    }

    /// Whether a slot is a device's: that of the one which has the name now, whatever it was called when the policy was
    /// applied. Where none has the name, or the slot's device is gone, the slot's own name tells.
    fn is_of(&self, slot: &SlotName, dev: &str) -> bool {
        let Some(own) = &slot.device else { return false };
        let applied = || self.store.slot(slot).known(self.sys).ok()?.map(|state| state.ifindex);
        match (net::find(&self.devices, dev), applied()) {
            (Ok(named), Some(applied)) if net::name(&self.devices, applied).is_some() => {
                named.ifindex == applied
            }
            _ => own == dev,
        }
    }

    /// What there is to say where a slot's device was asked for by another name than the policy was applied by.
    fn by_another_name(&self, slot: &SlotName) -> String {
        match &self.args.dev {
            Some(dev) if slot.device.as_ref() != Some(dev) => format!(", whose device is called `{dev}` now"),
            _ => String::new(),
        }
    }
}

/// Refuses to take it that nothing is applied to a device which does not exist: as for `ip link show` and `tc qdisc
/// delete`, such a name is a mistake.
pub(super) fn device_exists(sys: &Sys, args: &SlotArgs) -> Result<(), Error> {
    args.dev.as_ref().map_or(Ok(()), |dev| net::find(&net::devices(sys)?, dev).map(|_| ()))
}

/// The failure that no policy is applied where options say.
pub(super) fn nothing(sys: &Sys, args: &SlotArgs) -> Failure {
    if let Err(error) = device_exists(sys, args) {
        return error.into();
    }
    let mut place = String::from("here");
    if let Some(attach) = args.attach {
        place = format!("at {}", polc_ir::env::Attach::from(attach));
    }
    if let Some(dev) = &args.dev {
        place += &format!(" of `{dev}`");
    }
    if let Some(family) = args.family.family() {
        place += &format!(" for {family}");
    }
    if let Some(hook) = args.hook {
        place += &format!(" on {}", polc_ir::hook::Hook::from(hook));
    }
    Error::NotApplied(place).into()
}

pub(super) fn confirm(args: &SlotArgs, output: &Output) -> Result<ExitCode, Failure> {
    let sys = Sys::new();
    let store = store(&args.store)?;
    take_back_overdue(&sys, args, output)?;
    let slots = slots(&sys, args)?;
    // One time for all of them.
    let until = Instant::now() + LOCK_WAIT;
    let (mut kept, mut failed) = (Vec::new(), Vec::new());
    let (mut before, mut gone) = (false, 0);
    for slot in &slots {
        if kept.contains(slot) {
            continue;
        }
        match confirm::confirm(&sys, &store, slot, until) {
            Ok(Confirmed::Kept { slots, untidy }) => {
                slots.iter().for_each(|slot| output.remark(&format!("kept {slot}\n")));
                kept.extend(slots);
                if let Some(error) = untidy {
                    output.remark(&format!(
                        "what is kept could not be brought up to date ({error}); the next polc does it\n"
                    ));
                }
            }
            Ok(Confirmed::Before) => {
                output.remark(&format!("confirmed before {slot}\n"));
                before = true;
            }
            Ok(Confirmed::Nothing) => output.remark(&format!("nothing to confirm {slot}\n")),
            Err(Error::NotApplied(_)) => gone += 1,
            Err(error) => failed.push(Failure::at(slot, error)),
        }
    }
    if gone == slots.len() {
        return Err(nothing(&sys, args));
    }
    // Who confirms too late has to hear of it.
    match all_well(failed, output)? {
        _ if kept.is_empty() && !before => Ok(FOUND.into()),
        well => Ok(well),
    }
}

pub(super) fn flush(args: &FlushArgs, output: &Output) -> Result<ExitCode, Failure> {
    let sys = Sys::new();
    let store = store(&args.slots.store)?;
    if let Some(namespace) = args.gone {
        swap::may_change(&sys)?;
        let count = gone::flush(&sys, &store, namespace)?;
        output.remark(&format!(
            "removed {} of network namespace {namespace}\n",
            if count == 1 { "1 policy".to_string() } else { format!("{count} policies") }
        ));
        return Ok(ExitCode::SUCCESS);
    }
    swap::may_change(&sys)?;
    let asked = Asked::new(&sys, &store, &args.slots)?;
    let mut failed = Vec::new();
    let flushed = flush_all(&sys, &store, &|slot| asked.includes(slot))?;
    if flushed.is_empty() {
        device_exists(&sys, &args.slots)?;
        output.remark("nothing to remove\n");
    }
    for (slot, flushed) in flushed {
        match flushed {
            Ok(true) => output.remark(&format!("removed {slot}{}\n", asked.by_another_name(&slot))),
            Ok(false) => {}
            Err(error) => failed.push(Failure::at(&slot, error)),
        }
    }
    all_well(failed, output)
}

/// Tells of network namespaces that are gone and of which something is kept.
pub(super) fn tell_of_gone(sys: &Sys, args: &StoreArgs, output: &Output) -> Result<(), Failure> {
    for namespace in gone::namespaces(sys, &store(args)?)? {
        output.remark(&format!(
            "network namespace {namespace} is gone, and policies that were applied in it are kept: `polc flush --gone {namespace}` removes them\n"
        ));
    }
    Ok(())
}

/// Success, or all failures shown and the last one's status.
pub(super) fn all_well(mut failed: Vec<Failure>, output: &Output) -> Result<ExitCode, Failure> {
    let Some(last) = failed.pop() else { return Ok(ExitCode::SUCCESS) };
    for failure in failed {
        output.error(&failure.to_string());
    }
    Err(last)
}

/// Starts the process that takes a change back, and waits until it holds what it needs.
pub(super) fn start_watchdog(args: &StoreArgs, slot: &SlotName, confirm: &Confirm) -> Result<(), Error> {
    let fail = || Error::call("start the process that takes the change back");
    let program = std::env::current_exe().map_err(fail())?;
    let mut child = Command::new(program)
        .arg("watchdog")
        .args(["--slot", &serde_json::to_string(slot).expect("plain data serializes")])
        .args(["--token", &confirm.token])
        .arg("--bpffs")
        .arg(&args.bpffs)
        .arg("--state")
        .arg(&args.state)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(fail())?;
    let mut ready = [0];
    let told = child.stdout.take().map(|mut out| out.read(&mut ready));
    match told {
        Some(Ok(1)) => Ok(()),
        _ => Err(fail()(std::io::Error::other("it ended at once"))),
    }
}

pub(super) fn watchdog(args: &WatchdogArgs) -> Result<ExitCode, Failure> {
    use std::io::Write as _;
    let sys = Sys::new();
    let slot: SlotName =
        serde_json::from_str(&args.slot).map_err(|error| Failure::Usage(format!("--slot: {error}")))?;
    let store = store(&args.store)?;
    // Whoever started this may hang up or be killed with its whole session.
    let _ = sys.new_session();
    let held = Held::new(&sys, &store, &slot, &args.token)?;
    let mut out = std::io::stdout();
    let _ = out.write_all(b"\n").and_then(|()| out.flush());
    loop {
        let Some(deadline) = held.deadline(&sys) else { return Ok(ExitCode::SUCCESS) };
        let left = deadline.saturating_sub(sys.uptime_ms().map_err(Error::call("read the clock"))?);
        if left == 0 && held.go_back(&sys, Instant::now() + LOCK_WAIT)? {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(Duration::from_millis(left.min(500)));
    }
}
