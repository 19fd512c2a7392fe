//! A host in a namespace of its own: what is applied to it in which way, what is in force there, and calls of it that fail.

use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
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
use polc_loader::confirm::Confirmed;
use polc_loader::flush::flush;
use polc_loader::held::Held;
use polc_loader::state::SlotName;
use polc_loader::store::{LOCK_WAIT, Store};
use polc_loader::swap::Request;
use polc_loader::sys::{QueryPoint, Sys, TestRun};
use polc_loader::{Error, clsact, confirm, net, swap};
use polc_tests::kernel::{BpfFs, Namespace, TempDir, run, uninterrupted};

pub(crate) const DEVICE: &str = "in0";

/// Calls that an operation makes at most; it ends long before.
pub(crate) const CALLS_MAX: usize = 400;

/// Policies: each drops the UDP port that is its own.
pub(crate) const POLICIES: [u16; 2] = [1_001, 1_002];

/// A UDP port that no policy drops.
pub(crate) const OPEN: u16 = 1_003;

/// Time within which a packet to it arrives.
pub(crate) const ARRIVES_WITHIN: Duration = Duration::from_secs(10);

/// How a policy is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Tcx,
    Clsact,
    Xdp,
    Netfilter,
}

impl Way {
    pub(crate) fn attach(self) -> Attach {
        match self {
            Way::Tcx | Way::Clsact => Attach::TcIngress,
            Way::Xdp => Attach::Xdp,
            Way::Netfilter => Attach::Netfilter,
        }
    }

    pub(crate) fn slot(self) -> SlotName {
        let at_hook = self == Way::Netfilter;
        SlotName {
            device: (!at_hook).then(|| DEVICE.into()),
            attach: self.attach(),
            hook: at_hook.then_some(Hook::Input),
            family: Family::V4,
        }
    }
}

pub(crate) const WAYS: [Way; 4] = [Way::Tcx, Way::Clsact, Way::Xdp, Way::Netfilter];

/// What is done while a call fails. Before each the first policy is in force, except before the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
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
    pub(crate) const ALL: [Operation; 6] = [
        Operation::First,
        Operation::Swap,
        Operation::SwapUnconfirmed,
        Operation::Confirm,
        Operation::GoBack,
        Operation::Flush,
    ];

    /// The policies (by index; `None`: none) in force before and after.
    pub(crate) fn changes(self) -> (Option<usize>, Option<usize>) {
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
pub(crate) struct Host {
    pub(crate) store: Store,
    pub(crate) slot: SlotName,
    way: Way,
    pub(crate) objects: Vec<Object>,
    bpffs: PathBuf,
    state: PathBuf,
}

pub(crate) fn request<'a>(
    slot: &'a SlotName,
    object: &'a Object,
    way: Way,
    confirm: Option<Duration>,
) -> Request<'a> {
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

pub(crate) fn confirm(sys: &Sys, store: &Store, name: &SlotName) -> Result<Confirmed, Error> {
    confirm::confirm(sys, store, name, Instant::now() + LOCK_WAIT)
}

impl Host {
    /// One that the policies are applied to.
    pub(crate) fn with_policies(way: Way, bpffs: &BpfFs, state: &TempDir) -> Host {
        let objects = POLICIES.map(|port| object(port, way.attach())).to_vec();
        Host::new(way, Path::new(&bpffs.join("")), state.path(), objects)
    }

    pub(crate) fn new(way: Way, bpffs: &Path, state: &Path, objects: Vec<Object>) -> Host {
        let slot = way.slot();
        let store = Store::new(bpffs, state).expect("the namespace is known");
        Host { store, slot, way, objects, bpffs: bpffs.into(), state: state.into() }
    }

    pub(crate) fn apply(&self, sys: &Sys, policy: usize, confirm: Option<Duration>) -> Result<(), Error> {
        let request = request(&self.slot, &self.objects[policy], self.way, confirm);
        swap::apply(sys, &self.store, &request, &mut |_| Ok(())).map(|_| ())
    }

    /// What goes before an operation; nothing of it fails.
    pub(crate) fn prepare(&self, operation: Operation) {
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

    pub(crate) fn operate(&self, sys: &Sys, operation: Operation) -> Result<(), Error> {
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
    pub(crate) fn in_force(&self) -> Result<Option<usize>, String> {
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
    pub(crate) fn dropped_by_device(&self) -> Result<Option<[bool; 2]>, String> {
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
    pub(crate) fn settle(&self, operation: Operation, found: Option<usize>) -> Result<(), String> {
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
    pub(crate) fn clear(&self) -> Result<(), String> {
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
pub(crate) fn dropped_by_hook() -> io::Result<[bool; 2]> {
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
pub(crate) fn frame(port: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 2]);
    frame.extend([4, 0]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 8, 0, 0]);
    frame
}

pub(crate) fn object(port: u16, attach: Attach) -> Object {
    let rules =
        format!("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p udp -m udp --dport {port} -j DROP\nCOMMIT\n");
    let mut sources = SourceMap::new();
    let file = sources.add("rules.v4", rules);
    let session = Session::read(sources, file, &[], &ReadOptions::default());
    let place = place(&[Hook::Input], attach, Mode::Replace, false);
    build(&session, &place, &Env::default(), &Devices::default()).expect("it compiles").object
}

/// A call to the kernel that fails: the number, counted from 1, and whether the process ends there instead.
pub(crate) fn faulty(number: usize, dies: bool) -> (Sys, Arc<AtomicUsize>) {
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
pub(crate) fn bench(name: &str) -> (BpfFs, TempDir, Namespace) {
    let bench = (BpfFs::new(&format!("{name}-fs")), TempDir::in_memory(name), Namespace::enter(name));
    let ip = |line: &str| run("ip", &line.split(' ').collect::<Vec<_>>()).expect("root may");
    ip("link add name in0 type veth peer name out0");
    ip("link set lo up");
    ip("link set in0 up");
    ip("link set out0 up");
    bench
}
