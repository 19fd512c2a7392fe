//! Policies that stand at several hooks: all of them are changed, or none is.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{fs, io};

use polc_backend_ebpf::object::Object;
use polc_ir::env::Attach;
use polc_ir::hook::Hook;
use polc_loader::flush::flush_all;
use polc_loader::held::Held;
use polc_loader::state::SlotName;
use polc_loader::store::{LOCK_WAIT, Store};
use polc_loader::swap::Request;
use polc_loader::sys::Sys;
use polc_loader::{Error, attach, swap};
use polc_tests::kernel::{has_tools, may_run};

use crate::host::{CALLS_MAX, Operation, POLICIES, Way, bench, confirm, object, request};

/// Policies that stand at two hooks.
struct Several<'a> {
    store: &'a Store,
    slots: [SlotName; 2],
    objects: [Object; 2],
}

impl Several<'_> {
    fn new(store: &Store) -> Several<'_> {
        let at = |hook| SlotName { hook: Some(hook), ..Way::Netfilter.slot() };
        let slots = [Hook::Input, Hook::Forward].map(at);
        Several { store, slots, objects: POLICIES.map(|port| object(port, Attach::Netfilter)) }
    }

    fn apply(&self, sys: &Sys, policy: usize) -> Result<(), Error> {
        self.apply_for(sys, policy, None)
    }

    /// The same, to be confirmed.
    fn apply_for(&self, sys: &Sys, policy: usize, confirm: Option<Duration>) -> Result<(), Error> {
        let request = |slot| request(slot, &self.objects[policy], Way::Netfilter, confirm);
        let requests = self.slots.each_ref().map(request);
        swap::apply_all(sys, self.store, &requests, &mut |_, _| Ok(())).map(|_| ())
    }

    /// Numbers of the programs attached.
    fn attached(&self) -> [Option<u32>; 2] {
        self.slots.each_ref().map(|name| {
            let (sys, slot) = (Sys::new(), self.store.slot(name));
            let state = slot.read(&sys).expect("it can be read")?;
            attach::current(&sys, &slot, &state).expect("asked")
        })
    }

    fn each(&self, act: impl FnMut(&SlotName) -> Result<(), Error>) -> Result<(), Error> {
        self.slots.iter().try_for_each(act)
    }

    /// What a process that watches a slot's change does in the end.
    fn go_back(&self, sys: &Sys, name: &SlotName) -> Result<(), Error> {
        let state = self.store.slot(name).read(&Sys::new())?.expect("there");
        let Some(confirm) = state.intent.and_then(|intent| intent.confirm) else { return Ok(()) };
        Held::new(&Sys::new(), self.store, name, &confirm.token)?
            .go_back(sys, Instant::now() + LOCK_WAIT)
            .map(|_| ())
    }

    fn waits_no_more(&self, name: &SlotName) -> bool {
        let state = self.store.slot(name).read(&Sys::new()).expect("readable").expect("there");
        state.intent.is_none_or(|intent| intent.confirm.is_none())
    }

    /// Makes the time for a confirmation be over.
    fn let_time_pass(&self) {
        for name in &self.slots {
            let slot = self.store.slot(name);
            let mut state = slot.read(&Sys::new()).expect("readable").expect("there");
            if let Some(confirm) = state.intent.as_mut().and_then(|intent| intent.confirm.as_mut()) {
                confirm.deadline_ms = 0;
                slot.write(&Sys::new(), &state).expect("written");
            }
        }
    }

    /// Takes both away.
    fn flush(&self, sys: &Sys) -> Result<(), Error> {
        let flushed = flush_all(sys, self.store, &|_| true)?;
        flushed.into_iter().try_for_each(|(_, flushed)| flushed.map(|_| ()))
    }
}

/// The changes of a policy that stands at several hooks are made together.
#[test]
fn of_several_changes_all_are_made_or_none() {
    const NAME: &str = "of_several_changes_all_are_made_or_none";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("several");
    let store = Store::new(Path::new(&bpffs.join("")), state.path()).expect("the namespace is known");
    let several = Several::new(&store);
    let (apply, attached) = (|sys: &Sys, policy| several.apply(sys, policy), || several.attached());
    // The calls that attach a first program, and that exchange it.
    for (first, call) in [(true, "link_create"), (false, "map_update")] {
        for number in 1..=CALLS_MAX {
            if !first {
                apply(&Sys::new(), 0).expect("nothing fails here");
            }
            let before = attached();
            assert!(before.iter().all(|program| program.is_none() == first), "{before:?}");
            let calls = Arc::new(AtomicUsize::new(0));
            let counted = calls.clone();
            let sys = Sys::with_hook(move |name| {
                let fails = name == call && counted.fetch_add(1, Ordering::Relaxed) + 1 == number;
                if fails { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) }
            });
            let result = apply(&sys, 1);
            match &result {
                Ok(()) => assert!(attached().iter().zip(before).all(|(now, before)| *now != before)),
                Err(error) => assert_eq!(attached(), before, "{call} {number}: {error}"),
            }
            several.flush(&Sys::new()).expect("flushed");
            assert_eq!(attached(), [None; 2]);
            if calls.load(Ordering::Relaxed) < number {
                assert!(number > 2 && result.is_ok(), "{call} {number}");
                break;
            }
        }
    }
}

/// Wherever the process ends, policies that stand at several hooks have all been changed, or none has.
#[test]
fn killed_at_any_call_it_leaves_all_hooks_old_or_all_new() {
    const NAME: &str = "killed_at_any_call_it_leaves_all_hooks_old_or_all_new";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("between");
    let store = Store::new(Path::new(&bpffs.join("")), state.path()).expect("the namespace is known");
    let several = Several::new(&store);
    let ready = |result: Result<(), Error>| result.expect("nothing fails here");
    let unconfirmed = |policy, within| several.apply_for(&Sys::new(), policy, Some(within));
    let step = if std::env::var_os("POLC_LONG").is_some() { 1 } else { 5 };
    for operation in
        [Operation::First, Operation::Swap, Operation::Confirm, Operation::GoBack, Operation::Flush]
    {
        let mut tried = 0;
        for number in (1..=CALLS_MAX).step_by(step) {
            if operation != Operation::First {
                ready(several.apply(&Sys::new(), 0));
            }
            let old = several.attached();
            match operation {
                Operation::Confirm => ready(unconfirmed(1, Duration::from_secs(600))),
                Operation::GoBack => {
                    ready(unconfirmed(1, Duration::from_millis(1)));
                    std::thread::sleep(Duration::from_millis(2));
                }
                _ => {}
            }
            let before = several.attached();
            let calls = Arc::new(AtomicUsize::new(0));
            let counted = calls.clone();
            // A process that has ended makes no more calls, and tidies nothing up.
            let sys = Sys::with_hook(move |_| match counted.fetch_add(1, Ordering::Relaxed) + 1 < number {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(5)),
            });
            let result = match operation {
                Operation::Confirm => several.each(|slot| confirm(&sys, &store, slot).map(|_| ())),
                Operation::GoBack => several.each(|slot| several.go_back(&sys, slot)),
                Operation::Flush => several.flush(&sys),
                _ => several.apply(&sys, 1),
            };
            let now = several.attached();
            let changed = now.iter().zip(before).filter(|(now, before)| *now != before).count();
            assert!([0, 2].contains(&changed), "{operation:?}, call {number}: {before:?}, now {now:?}");
            if operation == Operation::GoBack && changed == 2 {
                assert_eq!(now, old, "call {number}");
            }
            if operation == Operation::Confirm {
                // Confirmed at one hook, it stays at both, though the other's time be over.
                let confirmed = several.slots.each_ref().map(|slot| several.waits_no_more(slot));
                several.let_time_pass();
                ready(several.each(|slot| confirm(&Sys::new(), &store, slot).map(|_| ())));
                let expected = if confirmed.contains(&true) { before } else { old };
                assert_eq!(several.attached(), expected, "call {number}: {confirmed:?}");
            } else {
                _ = several.each(|slot| confirm(&Sys::new(), &store, slot).map(|_| ()));
                let expected = if operation == Operation::GoBack { old } else { now };
                assert_eq!(several.attached(), expected, "{operation:?}, call {number}: after the next polc");
            }
            ready(several.apply(&Sys::new(), 0));
            several.flush(&Sys::new()).expect("flushed");
            let left = fs::read_dir(bpffs.join("polc")).map_or(0, |left| left.count());
            assert_eq!(left, 0, "{operation:?}, call {number}: pins are left");
            if calls.load(Ordering::Relaxed) < number {
                ready(result);
                break;
            }
            tried += 1;
        }
        eprintln!("{operation:?} at two hooks: killed at {tried} calls");
        assert!(tried > 20, "{operation:?}: {tried}");
    }
}

/// Whenever another polc gets in between, policies that stand at several hooks have all been changed, or none has.
#[test]
fn two_polcs_at_several_hooks_leave_all_of_them_alike() {
    const NAME: &str = "two_polcs_at_several_hooks_leave_all_of_them_alike";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("beside");
    let store = Store::new(Path::new(&bpffs.join("")), state.path()).expect("the namespace is known");
    let step = if std::env::var_os("POLC_LONG").is_some() { 1 } else { 11 };
    let run = |sys: &Sys, several: &Several<'_>, flushes| match flushes {
        true => several.flush(sys),
        false => several.apply(sys, 1),
    };
    let kept_out = |result: &Result<(), Error>| matches!(result, Ok(()) | Err(Error::Locked(_)));
    for flushes in [true, false] {
        let mut tried = 0;
        for number in (1..=CALLS_MAX).step_by(step) {
            Several::new(&store).apply(&Sys::new(), 0).expect("nothing fails here");
            let calls = Arc::new(AtomicUsize::new(0));
            let (counted, same_store) = (calls.clone(), store.clone());
            let sys = Sys::with_hook(move |_| {
                if counted.fetch_add(1, Ordering::Relaxed) + 1 == number {
                    let result = run(&Sys::new(), &Several::new(&same_store), !flushes);
                    assert!(kept_out(&result), "call {number}: {result:?}");
                }
                Ok(())
            });
            let several = Several::new(&store);
            let result = run(&sys, &several, flushes);
            assert!(kept_out(&result), "call {number}: {result:?}");
            let [one, other] = several.attached();
            assert_eq!(one.is_some(), other.is_some(), "flushes: {flushes}, call {number}");
            several.flush(&Sys::new()).expect("flushed");
            if calls.load(Ordering::Relaxed) < number {
                break;
            }
            tried += 1;
        }
        assert!(tried > 2, "{tried}");
    }
    // What is to be the whole policy is none beside another that came in between.
    let several = Several::new(&store);
    several.apply(&Sys::new(), 0).expect("nothing fails here");
    let before = several.attached();
    let alone =
        Request { alone: true, ..request(&several.slots[0], &several.objects[1], Way::Netfilter, None) };
    let result = swap::apply(&Sys::new(), &store, &alone, &mut |_| Ok(()));
    assert!(matches!(result, Err(Error::Overtaken(_))), "{result:?}");
    assert_eq!(several.attached(), before);
    several.flush(&Sys::new()).expect("flushed");
}
