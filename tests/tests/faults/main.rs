//! Whatever call of the loader's fails, and wherever the process is killed, the old policy or the new one is in force;
//! the next polc repairs what is left over, and after a flush nothing is.
//!
//! Every operation is tried with call 1 failing, with call 2 failing, and so on until it makes no more calls, and then
//! with the process killed at each of them: the test runs itself again for that. Without root the tests say that they
//! are skipped.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use polc_backend_ebpf::object::Object;
use polc_loader::held::Held;
use polc_loader::sys::Sys;
use polc_loader::{Error, confirm};
use polc_tests::kernel::{BpfFs, TempDir, has_tools, may_run};

use self::host::{CALLS_MAX, Host, Operation, POLICIES, WAYS, Way, bench, faulty, object};

mod host;
mod others;
mod several;

/// The child's part: which operation, where it dies, and where things are.
const CHILD: &str = "POLC_FAULTS_CHILD";

/// The test that runs itself again, to be killed.
const KILLED: &str = "killed_at_any_call_it_leaves_the_old_policy_or_the_new";

#[test]
fn every_failing_call_leaves_the_old_policy_or_the_new() {
    const NAME: &str = "every_failing_call_leaves_the_old_policy_or_the_new";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("faults");
    let mut wrong = Vec::new();
    for way in WAYS {
        let host = Host::with_policies(way, &bpffs, &state);
        let mut summary = Vec::new();
        for operation in Operation::ALL {
            let (before, after) = operation.changes();
            let (mut tried, mut failed) = (0, 0);
            for number in 1..=CALLS_MAX {
                host.prepare(operation);
                let (sys, calls) = faulty(number, false);
                let result = host.operate(&sys, operation);
                let done = calls.load(Ordering::Relaxed) < number;
                let found = host.in_force();
                let expected = if result.is_ok() { after } else { before };
                let error = result.as_ref().err().map(ToString::to_string);
                // Where taking away what was confirmed or is overdue fails, it may have been done already.
                let may_be_done =
                    found == Ok(after) && matches!(operation, Operation::GoBack | Operation::Flush);
                let verdict = match found {
                    Ok(found) if found == expected || may_be_done => host.settle(operation, found),
                    Ok(found) => Err(format!("policy {found:?} is in force instead of {expected:?}")),
                    Err(why) => Err(why),
                };
                if let Err(why) = verdict {
                    wrong.push(format!("{way:?} {operation:?}, call {number} ({error:?}): {why}"));
                    _ = host.clear();
                }
                failed += usize::from(error.is_some());
                if done {
                    assert!(result.is_ok(), "{operation:?} fails by itself: {error:?}");
                    break;
                }
                tried += 1;
            }
            assert!(tried > 5, "{operation:?} makes {tried} calls only");
            summary.push(format!("{operation:?} {tried} calls, {failed} of them fatal"));
        }
        eprintln!("{way:?}: {}", summary.join("; "));
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong[..wrong.len().min(12)].join("\n"));
}

/// Who keeps a slot locked is waited for no longer than there is time, and keeps nothing from going back.
#[test]
fn a_lock_that_is_never_released_holds_nobody_up() {
    const NAME: &str = "a_lock_that_is_never_released_holds_nobody_up";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("held");
    let soon = || Instant::now() + Duration::from_millis(20);
    for way in WAYS {
        let host = Host::with_policies(way, &bpffs, &state);
        let (sys, slot) = (Sys::new(), host.store.slot(&host.slot));
        host.prepare(Operation::GoBack);
        let token =
            slot.read(&sys).expect("readable").expect("there").intent.and_then(|intent| intent.confirm);
        let held = Held::new(&sys, &host.store, &host.slot, &token.expect("it waits").token).expect("opened");
        let lock = slot.lock(&sys).expect("nobody is at work");
        let confirmed = confirm::confirm(&sys, &host.store, &host.slot, soon());
        assert!(matches!(confirmed, Err(Error::Locked(_))), "{way:?}: {confirmed:?}");
        assert_eq!(host.in_force(), Ok(Some(1)));
        // The program goes back, and what is kept follows once it may be changed.
        for _ in 0..2 {
            assert!(!held.go_back(&sys, soon()).expect("put back"), "{way:?}");
            assert_eq!(host.in_force(), Ok(Some(0)), "{way:?}");
        }
        drop(lock);
        assert!(held.go_back(&sys, soon()).expect("gone back"), "{way:?}");
        host.settle(Operation::GoBack, Some(0)).unwrap_or_else(|why| panic!("{way:?}: {why}"));
    }
}

#[test]
fn killed_at_any_call_it_leaves_the_old_policy_or_the_new() {
    if std::env::var_os(CHILD).is_some() {
        return child();
    }
    if !may_run(KILLED) || !has_tools(KILLED, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("kills");
    for (index, way) in WAYS.into_iter().enumerate() {
        // Programs of a device are linked, or listed, much alike.
        if matches!(way, Way::Tcx | Way::Netfilter) {
            killed_at_any_call(way, index, &bpffs, &state);
        }
    }
}

fn killed_at_any_call(way: Way, way_index: usize, bpffs: &BpfFs, state: &TempDir) {
    let objects = POLICIES.map(|port| object(port, way.attach())).to_vec();
    let files = TempDir::in_memory("kills-objects");
    for (policy, object) in objects.iter().enumerate() {
        files.file(&policy.to_string(), &object.write().expect("written"));
    }
    let host = Host::new(way, Path::new(&bpffs.join("")), state.path(), objects);
    let (mut wrong, mut summary) = (Vec::new(), Vec::new());
    for (index, operation) in Operation::ALL.into_iter().enumerate() {
        let (before, after) = operation.changes();
        let mut killed = 0;
        for number in 1..=CALLS_MAX {
            host.prepare(operation);
            let folder = |path: &Path| path.to_str().expect("UTF-8").to_string();
            let part = [
                way_index.to_string(),
                index.to_string(),
                number.to_string(),
                bpffs.join(""),
                folder(state.path()),
                folder(files.path()),
            ];
            let status = Command::new(std::env::current_exe().expect("it has a path"))
                .args(["--exact", KILLED, "--nocapture"])
                .env(CHILD, part.join("\n"))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .expect("it runs");
            let found = host.in_force();
            let verdict = match found {
                Ok(found) if found == before || found == after => host.settle(operation, found),
                Ok(found) => Err(format!("policy {found:?} is in force")),
                Err(why) => Err(why),
            };
            if let Err(why) = verdict {
                wrong.push(format!("{operation:?}, killed at call {number}: {why}"));
                _ = host.clear();
            }
            if status.success() {
                break;
            }
            assert_eq!(status.signal(), Some(9), "{operation:?} {number}");
            killed += 1;
        }
        assert!(killed > 5, "{operation:?} was killed {killed} times only");
        summary.push(format!("{operation:?} {killed} times"));
    }
    eprintln!("{way:?} killed: {}", summary.join(", "));
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong[..wrong.len().min(12)].join("\n"));
}

/// The operation, in a process of its own that ends at a call.
fn child() {
    let part = std::env::var(CHILD).expect("it was asked for");
    let [way, operation, number, bpffs, state, files] = part.split('\n').collect::<Vec<_>>()[..] else {
        panic!("six lines: {part}");
    };
    let operation = Operation::ALL[operation.parse::<usize>().expect("a number")];
    let read = |policy: usize| {
        let bytes = fs::read(Path::new(files).join(policy.to_string())).expect("the object is there");
        Object::read(&bytes).expect("it is one")
    };
    let host = Host::new(
        WAYS[way.parse::<usize>().expect("a number")],
        Path::new(bpffs),
        Path::new(state),
        vec![read(0), read(1)],
    );
    let (sys, _) = faulty(number.parse().expect("a number"), true);
    host.operate(&sys, operation).expect("what is not killed is done");
}
