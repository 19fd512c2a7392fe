//! Whatever call of the loader's fails, and wherever the process is killed, the old policy or the new one is in force;
//! the next polc repairs what is left over, and after a flush nothing is.
//!
//! Every operation is tried with call 1 failing, with call 2 failing, and so on until it makes no more calls, and then
//! with the process killed at each of them: the test runs itself again for that. Without root the tests say that they
//! are skipped.

use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{fs, io};

use polc::build::build;
use polc::place::place;
use polc::select::Devices;
use polc::session::{ReadOptions, Session};
use polc_backend_ebpf::object::Object;
use polc_ir::env::{Attach, Env, Mode};
use polc_ir::hook::{Family, Hook};
use polc_ir::source::SourceMap;
use polc_loader::coexist::Order;
use polc_loader::confirm::{self, Confirmed};
use polc_loader::flush::{flush, flush_all};
use polc_loader::held::Held;
use polc_loader::state::{SlotName, Via};
use polc_loader::store::{LOCK_WAIT, Store, lock_qdiscs};
use polc_loader::swap::{self, Request};
use polc_loader::sys::{LinkSpec, ProgramSpec, ProgramType, QueryPoint, Sys, TestRun};
use polc_loader::{Error, attach, clsact, net};
use polc_tests::kernel::{BpfFs, Namespace, TempDir, has_tools, may_run, run, uninterrupted};

const DEVICE: &str = "in0";

/// Calls that an operation makes at most; it ends long before.
const CALLS_MAX: usize = 400;

/// The child's part: which operation, where it dies, and where things are.
const CHILD: &str = "POLC_FAULTS_CHILD";

/// Policies: each drops the UDP port that is its own.
const POLICIES: [u16; 2] = [1_001, 1_002];

/// A UDP port that no policy drops.
const OPEN: u16 = 1_003;

/// Time within which a packet to it arrives.
const ARRIVES_WITHIN: Duration = Duration::from_secs(10);

/// How a policy is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Tcx,
    Clsact,
    Xdp,
    Netfilter,
}

impl Way {
    fn attach(self) -> Attach {
        match self {
            Way::Tcx | Way::Clsact => Attach::TcIngress,
            Way::Xdp => Attach::Xdp,
            Way::Netfilter => Attach::Netfilter,
        }
    }

    fn slot(self) -> SlotName {
        let at_hook = self == Way::Netfilter;
        SlotName {
            device: (!at_hook).then(|| DEVICE.into()),
            attach: self.attach(),
            hook: at_hook.then_some(Hook::Input),
            family: Family::V4,
        }
    }
}

const WAYS: [Way; 4] = [Way::Tcx, Way::Clsact, Way::Xdp, Way::Netfilter];

/// The test that runs itself again, to be killed.
const KILLED: &str = "killed_at_any_call_it_leaves_the_old_policy_or_the_new";

/// What is done while a call fails. Before each the first policy is in force, except before the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// A policy where none is.
    First,
    /// The second policy in place of the first.
    Swap,
    /// The same, to be confirmed.
    SwapUnconfirmed,
    /// The second policy, confirmed.
    Confirm,
    /// The second policy, not confirmed in time.
    GoBack,
    /// Nothing.
    Flush,
}

impl Operation {
    const ALL: [Operation; 6] = [
        Operation::First,
        Operation::Swap,
        Operation::SwapUnconfirmed,
        Operation::Confirm,
        Operation::GoBack,
        Operation::Flush,
    ];

    /// The policies (by index; `None`: none) in force before and after.
    fn changes(self) -> (Option<usize>, Option<usize>) {
        match self {
            Operation::First => (None, Some(0)),
            Operation::Swap | Operation::SwapUnconfirmed => (Some(0), Some(1)),
            Operation::Confirm => (Some(1), Some(1)),
            Operation::GoBack => (Some(1), Some(0)),
            Operation::Flush => (Some(0), None),
        }
    }
}

/// Where a policy is applied to, and what is applied.
struct Host {
    store: Store,
    slot: SlotName,
    way: Way,
    objects: Vec<Object>,
    bpffs: PathBuf,
    state: PathBuf,
}

fn request<'a>(slot: &'a SlotName, object: &'a Object, way: Way, confirm: Option<Duration>) -> Request<'a> {
    Request {
        slot,
        object,
        source: "rules",
        files: &[("rules", b"text")],
        contents: &[],
        checks: &[],
        generic: false,
        clsact: way == Way::Clsact,
        order: Order::Alone,
        hook_order: Default::default(),
        over: &[],
        alone: false,
        confirm,
        initial: &[],
    }
}

fn confirm(sys: &Sys, store: &Store, name: &SlotName) -> Result<Confirmed, Error> {
    confirm::confirm(sys, store, name, Instant::now() + LOCK_WAIT)
}

impl Host {
    fn new(way: Way, bpffs: &Path, state: &Path, objects: Vec<Object>) -> Host {
        let slot = way.slot();
        let store = Store::new(bpffs, state).expect("the namespace is known");
        Host { store, slot, way, objects, bpffs: bpffs.into(), state: state.into() }
    }

    fn apply(&self, sys: &Sys, policy: usize, confirm: Option<Duration>) -> Result<(), Error> {
        let request = request(&self.slot, &self.objects[policy], self.way, confirm);
        swap::apply(sys, &self.store, &request, &mut |_| Ok(())).map(|_| ())
    }

    /// What goes before an operation; nothing of it fails.
    fn prepare(&self, operation: Operation) {
        let sys = Sys::new();
        let applied = |result: Result<(), Error>| result.expect("nothing fails here");
        match operation {
            Operation::First => {}
            Operation::Swap | Operation::SwapUnconfirmed | Operation::Flush => {
                applied(self.apply(&sys, 0, None))
            }
            Operation::Confirm => {
                applied(self.apply(&sys, 0, None));
                applied(self.apply(&sys, 1, Some(Duration::from_secs(600))));
            }
            Operation::GoBack => {
                applied(self.apply(&sys, 0, None));
                applied(self.apply(&sys, 1, Some(Duration::from_millis(1))));
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    fn operate(&self, sys: &Sys, operation: Operation) -> Result<(), Error> {
        match operation {
            Operation::First => self.apply(sys, 0, None),
            Operation::Swap => self.apply(sys, 1, None),
            Operation::SwapUnconfirmed => self.apply(sys, 1, Some(Duration::from_secs(600))),
            Operation::Confirm => confirm(sys, &self.store, &self.slot).map(|_| ()),
            Operation::GoBack => {
                let state = self.store.slot(&self.slot).read(&Sys::new()).expect("readable").expect("there");
                let token = state.intent.and_then(|intent| intent.confirm).expect("it waits").token;
                Held::new(sys, &self.store, &self.slot, &token)?
                    .go_back(sys, Instant::now() + LOCK_WAIT)
                    .map(|_| ())
            }
            Operation::Flush => flush(sys, &self.store, &self.slot).map(|_| ()),
        }
    }

    /// The policy that packets meet.
    fn in_force(&self) -> Result<Option<usize>, String> {
        let dropped = match self.way {
            Way::Netfilter => dropped_by_hook().map(Some).map_err(|error| error.to_string())?,
            _ => self.dropped_by_device()?,
        };
        match dropped {
            // At a hook nothing else tells that there is no program.
            Some([false, false]) if self.way == Way::Netfilter => Ok(None),
            None => Ok(None),
            Some([true, false]) => Ok(Some(0)),
            Some([false, true]) => Ok(Some(1)),
            dropped => Err(format!("neither policy: dropped {dropped:?}")),
        }
    }

    /// Whether the device's program drops what each policy does; `None`: it has none.
    fn dropped_by_device(&self) -> Result<Option<[bool; 2]>, String> {
        let sys = Sys::new();
        let devices = net::devices(&sys).map_err(|error| error.to_string())?;
        let device = net::find(&devices, DEVICE).map_err(|error| error.to_string())?;
        let mut programs = Vec::new();
        if self.way == Way::Xdp {
            programs.extend(&device.xdp);
        } else {
            // Where the question for tcx fails, a filter is the way that is left.
            let found = sys.prog_query(device.ifindex, QueryPoint::TcxIngress).expect("asked");
            programs.extend(found.into_iter().map(|(program, _)| program));
            if clsact::qdisc(&sys, device.ifindex).expect("asked").is_some() {
                let filters = clsact::filters(&sys, device.ifindex, false).expect("asked");
                programs.extend(filters.into_iter().map(|filter| filter.program_id));
            }
        }
        let program = match programs[..] {
            [] => return Ok(None),
            [program] => sys.prog_by_id(program).map_err(|error| error.to_string())?,
            _ => return Err(format!("several programs are attached: {programs:?}")),
        };
        Ok(Some(POLICIES.map(|port| {
            let run = TestRun { frame: &frame(port), context: &[], repeat: 1 };
            let result = sys.test_run(program.as_fd(), &run).expect("a test run");
            // `XDP_DROP`, `TC_ACT_SHOT`.
            result.return_value == if self.way == Way::Xdp { 1 } else { 2 }
        })))
    }

    /// What a next, unhindered polc finds and leaves.
    fn settle(&self, operation: Operation, found: Option<usize>) -> Result<(), String> {
        let sys = Sys::new();
        let slot = self.store.slot(&self.slot);
        // An apply that has to be confirmed keeps the next one out.
        let next = match confirm(&sys, &self.store, &self.slot) {
            Ok(_) => found,
            Err(Error::NotApplied(_)) => None,
            Err(error) => return Err(format!("the next polc says: {error}")),
        };
        let expected = match operation {
            // It is overdue, and the next polc takes it back.
            Operation::GoBack => Some(0),
            _ => next,
        };
        let now = self.in_force()?;
        if now != expected {
            return Err(format!("policy {now:?} is in force after the next polc, and {found:?} was before"));
        }
        let present = slot.generations_present(&sys).map_err(|error| error.to_string())?;
        if present.len() != usize::from(now.is_some()) {
            return Err(format!("generations {present:?} are left with policy {now:?}"));
        }
        self.apply(&sys, 1, None).map_err(|error| format!("applying afterwards: {error}"))?;
        if self.in_force()? != Some(1) {
            return Err("what was applied afterwards is not in force".into());
        }
        self.clear()
    }

    /// Flushes, and looks for anything left.
    fn clear(&self) -> Result<(), String> {
        flush(&Sys::new(), &self.store, &self.slot).map_err(|error| format!("flushing: {error}"))?;
        if let Some(policy) = self.in_force()? {
            return Err(format!("policy {policy} is in force after a flush"));
        }
        if self.way == Way::Clsact {
            let devices = net::devices(&Sys::new()).map_err(|error| error.to_string())?;
            let ifindex = net::find(&devices, DEVICE).map_err(|error| error.to_string())?.ifindex;
            if let Some(qdisc) = clsact::qdisc(&Sys::new(), ifindex).map_err(|error| error.to_string())? {
                return Err(format!("after a flush the qdisc {qdisc:?} is left"));
            }
        }
        for folder in [&self.bpffs, &self.state] {
            let left: Vec<_> = fs::read_dir(folder)
                .map_err(|error| error.to_string())?
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                // The kernel puts two files into every bpffs.
                .filter(|name| !name.ends_with(".debug"))
                .collect();
            if !left.is_empty() {
                return Err(format!("after a flush {left:?} is left in {}", folder.display()));
            }
        }
        Ok(())
    }
}

/// Whether packets that each policy drops are dropped on the way in. A packet sent after them tells that they have been
/// decided.
fn dropped_by_hook() -> io::Result<[bool; 2]> {
    // A command that another test starts has this one's sockets, too, until it is executed: a port may be taken as long.
    let socket = |port: u16| {
        let give_up = Instant::now() + ARRIVES_WITHIN;
        loop {
            match UdpSocket::bind(("127.0.0.1", port)) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < give_up => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                result => return result,
            }
        }
    };
    let (receivers, last, sender) = (POLICIES.map(socket), socket(OPEN)?, socket(0)?);
    for port in POLICIES.into_iter().chain([OPEN]) {
        sender.send_to(&[0], ("127.0.0.1", port))?;
    }
    last.set_read_timeout(Some(ARRIVES_WITHIN))?;
    uninterrupted(|| last.recv(&mut [0]))?;
    let mut dropped = [false; 2];
    for (receiver, dropped) in receivers.into_iter().zip(&mut dropped) {
        let receiver = receiver?;
        receiver.set_nonblocking(true)?;
        *dropped = match receiver.recv(&mut [0]) {
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
            Err(error) => return Err(error),
        };
    }
    Ok(dropped)
}

/// UDP to a port.
fn frame(port: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 2]);
    frame.extend([4, 0]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 8, 0, 0]);
    frame
}

fn object(port: u16, attach: Attach) -> Object {
    let rules =
        format!("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p udp -m udp --dport {port} -j DROP\nCOMMIT\n");
    let mut sources = SourceMap::new();
    let file = sources.add("rules.v4", rules);
    let session = Session::read(sources, file, &[], &ReadOptions::default());
    let place = place(&[Hook::Input], attach, Mode::Replace, false);
    build(&session, &place, &Env::default(), &Devices::default()).expect("it compiles").object
}

/// A call to the kernel that fails: the number, counted from 1, and whether the process ends there instead.
fn faulty(number: usize, dies: bool) -> (Sys, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let sys = Sys::with_hook(move |_| {
        if counted.fetch_add(1, Ordering::Relaxed) + 1 != number {
            return Ok(());
        }
        if dies {
            let own = rustix::process::getpid();
            _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
        }
        // EIO: nothing in the loader takes it for anything but a failure.
        Err(io::Error::from_raw_os_error(5))
    });
    (sys, calls)
}

/// A namespace with the device, for as long as the result lives.
fn bench(name: &str) -> (BpfFs, TempDir, Namespace) {
    let bench = (BpfFs::new(&format!("{name}-fs")), TempDir::in_memory(name), Namespace::enter(name));
    let ip = |line: &str| run("ip", &line.split(' ').collect::<Vec<_>>()).expect("root may");
    ip("link add name in0 type veth peer name out0");
    ip("link set lo up");
    ip("link set in0 up");
    ip("link set out0 up");
    bench
}

#[test]
fn every_failing_call_leaves_the_old_policy_or_the_new() {
    const NAME: &str = "every_failing_call_leaves_the_old_policy_or_the_new";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("faults");
    let mut wrong = Vec::new();
    for way in WAYS {
        let objects = POLICIES.map(|port| object(port, way.attach())).to_vec();
        let host = Host::new(way, Path::new(&bpffs.join("")), state.path(), objects);
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
        let objects = POLICIES.map(|port| object(port, way.attach())).to_vec();
        let host = Host::new(way, Path::new(&bpffs.join("")), state.path(), objects);
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

/// A priority that somebody gave a filter first who waits for no lock makes that filter nobody else's, whatever its name.
#[test]
fn a_filter_that_was_there_first_is_not_polcs() {
    const NAME: &str = "a_filter_that_was_there_first_is_not_polcs";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("first");
    let objects = POLICIES.map(|port| object(port, Way::Clsact.attach())).to_vec();
    let host = Host::new(Way::Clsact, Path::new(&bpffs.join("")), state.path(), objects);
    let ifindex =
        net::find(&net::devices(&Sys::new()).expect("a list"), DEVICE).expect("it is there").ifindex;
    // `r0 = TC_ACT_UNSPEC; exit`.
    let slots = [0xffff_ffff_0000_00b7, 0x95];
    let spec = ProgramSpec {
        kind: ProgramType::SCHED_CLS,
        attach_type: 0,
        name: "other",
        license: "GPL",
        slots: &slots,
        btf: None,
    };
    let other = Arc::new(Sys::new().prog_load(&spec, &mut []).expect("loaded"));
    let (mut refused, mut added) = (0, 0);
    for number in 1..=CALLS_MAX {
        let calls = Arc::new(AtomicUsize::new(0));
        let (counted, beside) = (calls.clone(), other.clone());
        let sys = Sys::with_hook(move |call| {
            if call == "netlink" && counted.fetch_add(1, Ordering::Relaxed) + 1 == number {
                // Where polc came first, they are there already.
                _ = clsact::add_qdisc(&Sys::new(), ifindex);
                let name = clsact::filter_name(false);
                _ = clsact::set_filter(&Sys::new(), ifindex, false, 1, &*beside, name, false);
            }
            Ok(())
        });
        match host.apply(&sys, 0, None) {
            Ok(()) => added += 1,
            Err(Error::Occupied { .. }) => {
                refused += 1;
                assert_eq!(host.store.names(&Sys::new()).expect("readable"), [], "call {number}");
            }
            Err(error) => panic!("call {number}: {error}"),
        }
        flush(&Sys::new(), &host.store, &host.slot).unwrap_or_else(|error| panic!("call {number}: {error}"));
        // What is theirs is left.
        for filter in clsact::filters(&Sys::new(), ifindex, false).expect("asked") {
            let program = Sys::new().prog_info(&*other).expect("asked").id;
            assert_eq!((filter.priority, filter.program_id), (1, program), "call {number}");
        }
        _ = clsact::remove_qdisc(&Sys::new(), ifindex);
        if calls.load(Ordering::Relaxed) < number {
            break;
        }
    }
    assert!(refused > 0 && added > 2, "{refused} refused, {added} added");
    host.clear().expect("nothing is left");
}

/// Another polc, wherever it keeps its files, adds or takes away no filter while one is at it.
#[test]
fn qdiscs_are_one_polcs_at_a_time() {
    const NAME: &str = "qdiscs_are_one_polcs_at_a_time";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("one");
    let host = |bpffs: &BpfFs, state: &TempDir| {
        let objects = POLICIES.map(|port| object(port, Way::Clsact.attach())).to_vec();
        Host::new(Way::Clsact, Path::new(&bpffs.join("")), state.path(), objects)
    };
    let others = (BpfFs::new("one-fs-other"), TempDir::in_memory("one-other"));
    let (host, other) = (host(&bpffs, &state), host(&others.0, &others.1));
    other.apply(&Sys::new(), 1, None).expect("applied");
    let lock = lock_qdiscs(&Sys::new()).expect("nobody has it");
    std::thread::scope(|scope| {
        let namespace = fs::File::open("/proc/thread-self/ns/net").expect("it is there");
        let entered = move || {
            let kinds = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(namespace.as_fd(), kinds).expect("root may");
        };
        let applying = scope.spawn(move || {
            entered();
            host.apply(&Sys::new(), 0, None).expect("applied");
            flush(&Sys::new(), &host.store, &host.slot).expect("flushed");
        });
        std::thread::sleep(Duration::from_millis(300));
        assert!(!applying.is_finished());
        let filters = || {
            let devices = net::devices(&Sys::new()).expect("a list");
            let ifindex = net::find(&devices, DEVICE).expect("it is there").ifindex;
            clsact::filters(&Sys::new(), ifindex, false).expect("asked").len()
        };
        assert_eq!(filters(), 1);
        drop(lock);
        applying.join().expect("it waited");
        assert_eq!(filters(), 1);
    });
    other.clear().expect("nothing is left");
}

/// A priority that another function got after polc's was detached does not make polc's attached.
#[test]
fn a_hook_that_was_detached_and_taken_is_not_polcs() {
    const NAME: &str = "a_hook_that_was_detached_and_taken_is_not_polcs";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("taken");
    let way = Way::Netfilter;
    let objects = POLICIES.map(|port| object(port, way.attach())).to_vec();
    let host = Host::new(way, Path::new(&bpffs.join("")), state.path(), objects);
    let (sys, slot) = (Sys::new(), host.store.slot(&host.slot));
    host.apply(&sys, 0, None).expect("applied");
    let via = |sys: &Sys| slot.read(sys).expect("readable").expect("there").via;
    let Via::Dispatch { priority, .. } = via(&sys) else { panic!("at a hook") };
    let link = sys.obj_get(&slot.link()).expect("pinned");
    sys.link_detach(&link).expect("detached");
    // `r0 = NF_ACCEPT; exit`.
    let accept = ProgramSpec {
        kind: ProgramType::NETFILTER,
        attach_type: 45,
        name: "other",
        license: "GPL",
        slots: &[0x0000_0001_0000_00b4, 0x95],
        btf: None,
    };
    let other = sys.prog_load(&accept, &mut []).expect("loaded");
    let place = LinkSpec::Netfilter { family: 2, hook: 1, priority, defrag: false };
    let _link = sys.link_create(&other, &place).expect("the priority is free");
    let state = slot.read(&sys).expect("readable").expect("there");
    assert_eq!(attach::current(&sys, &slot, &state).expect("asked"), None);
    assert_eq!(host.in_force(), Ok(None));
    host.apply(&sys, 1, None).expect("applied beside it");
    assert_eq!(host.in_force(), Ok(Some(1)));
    assert_ne!(via(&sys), Via::Dispatch { priority, defrag: false });
    host.clear().expect("flushed");
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
