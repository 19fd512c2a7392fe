//! The running kernel's own packet filter, in a network namespace made for the purpose: what it does with a packet.
//!
//! A rule set is restored with the real tools, frames come in by devices of the rules' names, and probes before and
//! after all chains of each hook tell how far each came, with which mark. Everything happens on the calling thread,
//! in one system call for a batch of frames, so when it returns all of them have gone as far as they go: nothing is
//! waited for. Nothing leaves the namespace: the last probe of FORWARD and INPUT drops what gets there, and the first
//! of OUTPUT what the host answers.
//!
//! The namespace has no name and is held by the thread alone, so it goes away with [`Netfilter`], with the thread, or
//! with the process, however they end.

mod bare;
mod probe;
mod save;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use polc_ir::hook::Family;

use self::probe::{FRAME_BYTES_MAX, Notes, RESULT_BYTES, SkbFields, TEMPLATE_BYTES, during};
use crate::kernel_types::KernelTypesError;
use crate::net;
use crate::sys::{LinkSpec, LiveFrames, Map, MapSpec, Namespace, Sys};

pub use bare::Bare;
pub use save::{CounterLine, counter_lines};

/// Most frames of a batch.
pub const FRAMES_MAX: usize = 4_096;

/// Most devices that frames come in by: each is a pair in the kernel.
pub const DEVICES_MAX: usize = 16;

/// Frames that take one step of the stack before the first of them takes the next.
const STEP: u32 = 64;

/// How long nothing may arrive before nothing more is expected.
const QUIET: Duration = Duration::from_millis(1);

/// How long the devices may take for what was sent to them.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes of a frame's slot in the pool: its length, the device it is sent by (0: it goes into the stack), itself.
const SLOT_BYTES: usize = 8 + FRAME_BYTES_MAX;

/// `enum bpf_map_type`.
const ARRAY: u32 = 2;

/// The device that the injector is attached to. It never comes up, so the program sees no frames but those it is run
/// on.
const PARK: &str = "polc-park";

/// How far a frame came, as bits.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Stages(u32);

impl Stages {
    /// It reached PREROUTING, before defragmentation.
    pub const PREROUTING: Stages = Stages(1);
    /// It passed defragmentation, if any.
    pub const WHOLE: Stages = Stages(2);
    /// It passed connection tracking, if any, and what comes before it.
    pub const TRACKED: Stages = Stages(4);
    /// It passed all chains of PREROUTING.
    pub const ROUTED: Stages = Stages(8);
    /// It reached FORWARD.
    pub const FORWARD: Stages = Stages(16);
    /// It passed all chains of FORWARD.
    pub const FORWARDED: Stages = Stages(32);
    /// It reached INPUT.
    pub const INPUT: Stages = Stages(64);
    /// It passed all chains of INPUT.
    pub const DELIVERED: Stages = Stages(128);

    /// Whether it passed these.
    pub const fn has(self, stages: Stages) -> bool {
        self.0 & stages.0 == stages.0
    }
}

impl fmt::Debug for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Stages::PREROUTING, "reached prerouting"),
            (Stages::WHOLE, "whole"),
            (Stages::TRACKED, "tracked"),
            (Stages::ROUTED, "passed prerouting"),
            (Stages::FORWARD, "reached forward"),
            (Stages::FORWARDED, "passed forward"),
            (Stages::INPUT, "reached input"),
            (Stages::DELIVERED, "passed input"),
        ];
        let mut names = names.iter().filter(|(stage, _)| self.has(*stage)).map(|(_, name)| *name);
        f.write_str(names.next().unwrap_or("reached no hook"))?;
        names.try_for_each(|name| write!(f, ", {name}"))
    }
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passage {
    /// How far it came.
    pub stages: Stages,
    /// Its mark after PREROUTING, if it passed.
    pub mark_routed: u32,
    /// Its mark after FORWARD or INPUT, if it passed.
    pub mark: u32,
    /// The state of its connection: `enum ip_conntrack_info`, plus 8 if there is a connection.
    pub connection: u32,
    /// Its length from the network header on after defragmentation, in bytes, if it came that far.
    pub length: u32,
}

/// A frame to be sent through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
    /// The number it carries in its header, from 1 to [`FRAMES_MAX`]; 0 if it can't carry one, and then nothing is
    /// told of it.
    pub id: u32,
    /// Which of the devices it comes in by.
    pub device: usize,
}

/// Which of the two packet filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// iptables-legacy and ip6tables-legacy.
    Legacy,
    /// iptables-nft and ip6tables-nft.
    Nft,
}

impl Tool {
    /// The command's name for an address family, without `-restore` or `-save`.
    pub const fn command(self, family: Family) -> &'static str {
        match (self, family) {
            (Tool::Legacy, Family::V4) => "iptables-legacy",
            (Tool::Legacy, Family::V6) => "ip6tables-legacy",
            (Tool::Nft, Family::V4) => "iptables-nft",
            (Tool::Nft, Family::V6) => "ip6tables-nft",
        }
    }
}

/// Where frames come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// As if a device had received them: past its driver, so no XDP program sees them.
    Stack,
    /// Sent by the device's peer: an XDP program on the device sees them first. It has to have one, since only then a
    /// veth takes frames that were redirected to it (drivers/net/veth.c, `veth_xdp_xmit`).
    Driver,
}

/// Where packets are routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To another host, by the output device.
    Forward,
    /// To this host, whatever their destination.
    Local,
}

/// Why the kernel's packet filter can't be asked.
#[derive(Debug)]
pub enum NetfilterError {
    /// A system call failed.
    Kernel(String, io::Error),
    /// The kernel's types are not known.
    Types(KernelTypesError),
    /// A command can't be run.
    Command(&'static str, io::Error),
    /// A command failed: its name, and what it said.
    Refused(String, String),
    /// How many of how many frames did not arrive at their devices.
    Lost(u64, usize),
}

impl fmt::Display for NetfilterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetfilterError::Kernel(what, error) => write!(f, "{what}: {error}"),
            NetfilterError::Types(error) => error.fmt(f),
            NetfilterError::Command(name, error) => write!(f, "cannot run `{name}`: {error}"),
            NetfilterError::Refused(command, said) => write!(f, "`{command}` failed: {said}"),
            NetfilterError::Lost(lost, of) => {
                write!(f, "{lost} of {of} frames did not arrive at their devices within {PATIENCE:?}")
            }
        }
    }
}

impl std::error::Error for NetfilterError {}

impl From<KernelTypesError> for NetfilterError {
    fn from(error: KernelTypesError) -> NetfilterError {
        NetfilterError::Types(error)
    }
}

/// A packet filter in a namespace of its own. The thread that makes it is inside until it is dropped.
#[derive(Debug)]
pub struct Netfilter {
    sys: Sys,
    family: Family,
    home: Namespace,
    /// Links, which end with their descriptors.
    links: Vec<OwnedFd>,
    injector: OwnedFd,
    pool: Map,
    next: Map,
    results: Map,
    devices: Vec<Pair>,
    /// The pool's contents before they are written to it. What is behind a frame's length is of no account.
    slots: Vec<u8>,
    local: bool,
    /// Namespaces belong to threads.
    thread: PhantomData<*const ()>,
}

impl Drop for Netfilter {
    fn drop(&mut self) {
        // The programs first: nothing may be left in the namespace but what goes with it.
        self.links.clear();
        _ = self.sys.set_net_namespace(&self.home);
    }
}

impl Netfilter {
    /// An empty packet filter. Packets come in by devices named `inputs` and are forwarded by `output`.
    ///
    /// # Errors
    /// No root, a kernel without netfilter programs (before 6.4), or no `ip` command.
    pub fn new(
        sys: &Sys,
        family: Family,
        inputs: &[String],
        output: &str,
    ) -> Result<Netfilter, NetfilterError> {
        let fields = SkbFields::read()?;
        let home = sys.net_namespace().map_err(during("looking up the network namespace"))?;
        sys.unshare_net().map_err(during("making a network namespace"))?;
        // From here on the thread has to come back, whatever happens.
        match Inside::set_up(sys, family, inputs, output, &fields) {
            Ok(inside) => Ok(Netfilter {
                sys: sys.clone(),
                family,
                home,
                links: inside.links,
                injector: inside.injector,
                pool: inside.pool,
                next: inside.next,
                results: inside.results,
                devices: inside.devices,
                slots: Vec::new(),
                local: false,
                thread: PhantomData,
            }),
            Err(error) => {
                sys.set_net_namespace(&home).map_err(during("going back to the network namespace"))?;
                Err(error)
            }
        }
    }

    /// Routes packets from now on. They are forwarded at first.
    ///
    /// # Errors
    /// The `ip` command failed.
    pub fn route(&mut self, route: Route) -> Result<(), NetfilterError> {
        let local = route == Route::Local;
        if local == self.local {
            return Ok(());
        }
        let verb = if local { "add" } else { "del" };
        let all = match self.family {
            Family::V4 => "0.0.0.0/0",
            Family::V6 => "::/0",
        };
        ip(&format!("route {verb} local {all} dev lo\n"))?;
        self.local = local;
        Ok(())
    }

    /// Replaces the tables that `rules` names, counters at zero.
    ///
    /// # Errors
    /// The tool refuses them.
    pub fn load(&self, tool: Tool, rules: &str) -> Result<(), NetfilterError> {
        let name = format!("{}-restore", tool.command(self.family));
        run(&name, &["-w", "60"], rules).map(|_| ())
    }

    /// Makes the sets of an `ipset save` file.
    ///
    /// # Errors
    /// `ipset` refuses them.
    pub fn load_sets(&self, sets: &str) -> Result<(), NetfilterError> {
        run("ipset", &["restore", "-exist"], sets).map(|_| ())
    }

    /// What the tool's `-save -c` prints.
    ///
    /// # Errors
    /// The tool can't be run.
    pub fn save(&self, tool: Tool) -> Result<String, NetfilterError> {
        run(&format!("{}-save", tool.command(self.family)), &["-c"], "")
    }

    /// Sends frames through, in the order of their devices, and tells what became of each.
    ///
    /// # Panics
    /// There are more than [`FRAMES_MAX`] frames, one longer than 2,048 bytes or shorter than 14, or one of a device
    /// that does not exist.
    ///
    /// # Errors
    /// A system call failed.
    pub fn run(&mut self, frames: &[Frame], entry: Entry) -> Result<Vec<Passage>, NetfilterError> {
        assert!(frames.len() <= FRAMES_MAX, "at most {FRAMES_MAX} frames at a time");
        let sys = &self.sys;
        let filling = || during("filling the pool of frames");
        let mut order: Vec<usize> = (0..frames.len()).collect();
        order.sort_by_key(|&index| frames[index].device);
        let slots = &mut self.slots;
        slots.resize(slots.len().max(frames.len() * SLOT_BYTES), 0);
        for (slot, &index) in slots.chunks_exact_mut(SLOT_BYTES).zip(&order) {
            let frame = &frames[index];
            let bytes = &frame.bytes;
            assert!((14..=FRAME_BYTES_MAX).contains(&bytes.len()), "a frame of {} bytes", bytes.len());
            let peer = if entry == Entry::Driver { self.devices[frame.device].peer } else { 0 };
            slot[..4].copy_from_slice(&(bytes.len() as u32).to_ne_bytes());
            slot[4..8].copy_from_slice(&peer.to_ne_bytes());
            slot[8..8 + bytes.len()].copy_from_slice(bytes);
        }
        let numbers = |count: usize| (0..count as u32).flat_map(u32::to_ne_bytes).collect::<Vec<u8>>();
        if !frames.is_empty() {
            let keys = numbers(frames.len());
            sys.map_update_batch(&self.pool, &keys, &slots[..frames.len() * SLOT_BYTES], frames.len())
                .map_err(filling())?;
        }
        let count = FRAMES_MAX + 1;
        let zeros = vec![0; count * RESULT_BYTES as usize];
        sys.map_update_batch(&self.results, &numbers(count), &zeros, count).map_err(filling())?;
        sys.map_update(&self.next, &[0; 4], &[0; 8]).map_err(filling())?;
        let before = if entry == Entry::Driver { self.received()? } else { 0 };
        for group in order.chunk_by(|&one, &other| frames[one].device == frames[other].device) {
            self.send(self.devices[frames[group[0]].device].ifindex, group.len() as u64)?;
        }
        let read = || sys.map_read_array(&self.results).map_err(during("reading results"));
        let mut results = read()?;
        if entry == Entry::Driver {
            // The receiving devices' turn comes before the call returns, unless the CPU has much else to do.
            let started = Instant::now();
            while self.received()? - before < frames.len() as u64 {
                if started.elapsed() > PATIENCE {
                    let lost = frames.len() as u64 - (self.received()? - before);
                    return Err(NetfilterError::Lost(lost, frames.len()));
                }
                std::thread::sleep(QUIET);
            }
            loop {
                std::thread::sleep(QUIET);
                let before = std::mem::replace(&mut results, read()?);
                if before == results {
                    break;
                }
            }
        }
        let word = |at: usize| u32::from_ne_bytes(results[at..at + 4].try_into().expect("four bytes"));
        let passages = frames.iter().map(|frame| match frame.id as usize * RESULT_BYTES as usize {
            0 => Passage::default(),
            at => Passage {
                stages: Stages(word(at)),
                mark_routed: word(at + 4),
                mark: word(at + 8),
                connection: word(at + 12),
                length: word(at + 16),
            },
        });
        Ok(passages.collect())
    }

    /// Sends the pool's next frames by a device, each once. A stop and the freezer, which no mask puts off, end the
    /// call between two steps with `EINTR` (net/bpf/test_run.c, `bpf_test_timer_continue`), and do not say how many
    /// frames have gone: the injector counts them.
    fn send(&self, ifindex: u32, frames: u64) -> Result<(), NetfilterError> {
        let sys = &self.sys;
        let gone = || -> Result<u64, NetfilterError> {
            let next = sys.map_lookup(&self.next, &[0; 4]).map_err(during("counting frames"))?;
            let bytes =
                next.and_then(|value| value.try_into().ok()).expect("an array's value of eight bytes");
            Ok(u64::from_ne_bytes(bytes))
        };
        let end = gone()? + frames;
        loop {
            let count = (end - gone()?) as u32;
            if count == 0 {
                return Ok(());
            }
            let live = LiveFrames { ifindex, template: &[0; TEMPLATE_BYTES], count, batch: STEP };
            match sys.run_live_frames(&self.injector, &live) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => result.map_err(during("sending frames"))?,
            }
        }
    }

    /// How many frames all input devices have received.
    fn received(&self) -> Result<u64, NetfilterError> {
        let devices = net::devices(&self.sys)
            .map_err(|error| NetfilterError::Refused("rtnetlink".into(), error.to_string()))?;
        let inputs =
            devices.iter().filter(|device| self.devices.iter().any(|own| own.ifindex == device.ifindex));
        Ok(inputs.map(|device| device.received).sum())
    }
}

/// What is made inside the namespace.
struct Inside {
    links: Vec<OwnedFd>,
    injector: OwnedFd,
    pool: Map,
    next: Map,
    results: Map,
    devices: Vec<Pair>,
}

/// Numbers of a device and of the other end of its cable.
#[derive(Clone, Copy, Debug)]
struct Pair {
    ifindex: u32,
    peer: u32,
}

impl Inside {
    fn set_up(
        sys: &Sys,
        family: Family,
        inputs: &[String],
        output: &str,
        fields: &SkbFields,
    ) -> Result<Inside, NetfilterError> {
        devices(family, inputs, output)?;
        let devices = run("ip", &["-o", "link"], "")?;
        let ifindex = |name: &str| {
            // `2: eth0@peer: <BROADCAST,...`
            let number = devices.lines().find_map(|line| {
                let (number, rest) = line.split_once(": ")?;
                let (found, _) = rest.split_once(": ")?;
                (found.split('@').next() == Some(name)).then(|| number.parse::<u32>().ok())?
            });
            number.ok_or_else(|| NetfilterError::Refused("ip".into(), format!("made no device `{name}`")))
        };
        let array = |value_bytes, max_entries, name| {
            let spec = MapSpec { map_type: ARRAY, key_bytes: 4, value_bytes, max_entries, flags: 0, name };
            sys.map_create(&spec).map_err(during("making a map"))
        };
        let pool = array(SLOT_BYTES as u32, FRAMES_MAX as u32, "polc_pool")?;
        let next = array(8, 1, "polc_next")?;
        let results = array(RESULT_BYTES, FRAMES_MAX as u32 + 1, "polc_results")?;
        let injector = probe::injector(sys, &pool, &next)?;
        let mut inside = Inside { links: Vec::new(), injector, pool, next, results, devices: Vec::new() };
        let names = device_set(inputs, output);
        for name in inputs {
            let at = names.iter().position(|other| other == name).expect("it is among them");
            inside.devices.push(Pair { ifindex: ifindex(name)?, peer: ifindex(&peer_name(at))? });
        }
        // A program that is attached nowhere is entered into the kernel's dispatcher for each run, and taken out
        // again, which takes a hundred times as long as the run (kernel/bpf/dispatcher.c).
        let park = LinkSpec::Xdp { ifindex: ifindex(PARK)?, generic: false };
        let attaching = || during("attaching a probe");
        inside.links.push(sys.link_create(&inside.injector, &park).map_err(attaching())?);
        let number = match family {
            Family::V4 => 2,
            Family::V6 => 10,
        };
        // First and last of what may be at a hook; the very ends are the kernel's own
        // (net/netfilter/nf_bpf_link.c, `bpf_nf_check_pf_and_hooks`, `NF_IP_PRI_FIRST`, `NF_IP_PRI_LAST`).
        let (first, last) = (i32::MIN + 1, i32::MAX - 1);
        // Just behind `NF_IP_PRI_CONNTRACK_DEFRAG` and `NF_IP_PRI_CONNTRACK`, the same for both families
        // (include/uapi/linux/netfilter_ipv4.h).
        let (whole, tracked) = (-399, -199);
        const PREROUTING: u32 = 0;
        const INPUT: u32 = 1;
        const FORWARD: u32 = 2;
        const OUTPUT: u32 = 3;
        for (hook, priority, stage, notes, drops) in [
            (PREROUTING, first, Stages::PREROUTING, Notes::Stage, false),
            (PREROUTING, whole, Stages::WHOLE, Notes::Length, false),
            (PREROUTING, tracked, Stages::TRACKED, Notes::Mark(4), false),
            (PREROUTING, last, Stages::ROUTED, Notes::Mark(4), false),
            (FORWARD, first, Stages::FORWARD, Notes::Stage, false),
            (FORWARD, last, Stages::FORWARDED, Notes::Mark(8), true),
            (INPUT, first, Stages::INPUT, Notes::Stage, false),
            (INPUT, last, Stages::DELIVERED, Notes::Mark(8), true),
        ] {
            let program = probe::probe(sys, family, &inside.results, fields, stage.0, notes, drops)?;
            let spec = LinkSpec::Netfilter { family: number, hook, priority, defrag: false };
            inside.links.push(sys.link_create(&program, &spec).map_err(attaching())?);
        }
        let spec = LinkSpec::Netfilter { family: number, hook: OUTPUT, priority: first, defrag: false };
        inside.links.push(sys.link_create(&probe::drop_all(sys)?, &spec).map_err(attaching())?);
        Ok(inside)
    }
}

/// Makes the devices and routes, and tells the kernel to judge packets by nothing but rules.
fn devices(family: Family, inputs: &[String], output: &str) -> Result<(), NetfilterError> {
    let set = |path: &str, value: &str| {
        let path = format!("/proc/sys/net/{path}");
        fs::write(&path, value).map_err(|error| NetfilterError::Kernel(format!("writing {path}"), error))
    };
    for which in ["all", "default"] {
        for (name, value) in
            [("rp_filter", "0"), ("accept_local", "1"), ("route_localnet", "1"), ("send_redirects", "0")]
        {
            set(&format!("ipv4/conf/{which}/{name}"), value)?;
        }
        for (name, value) in [("forwarding", "1"), ("accept_ra", "0"), ("accept_dad", "0")] {
            set(&format!("ipv6/conf/{which}/{name}"), value)?;
        }
    }
    // Packets of the other family would be the kernel's own.
    let off = if family == Family::V4 { "1" } else { "0" };
    set("ipv6/conf/default/disable_ipv6", off)?;
    // No addresses of their own.
    set("ipv6/conf/default/addr_gen_mode", "1")?;
    set("ipv4/ip_forward", "1")?;
    let names = device_set(inputs, output);
    let mut batch = format!("link set lo up\nlink add {PARK} type veth peer name polc-parked\n");
    for (index, name) in names.iter().enumerate() {
        let peer = peer_name(index);
        batch += &format!(
            "link add {name} address 02:00:00:00:00:02 type veth peer name {peer}\n\
             link set {name} up\nlink set {peer} up\n"
        );
    }
    let (next_hop, all) = match family {
        Family::V4 => ("169.254.1.1", "0.0.0.0/0"),
        Family::V6 => ("fe80::1234", "::/0"),
    };
    batch += &format!(
        "neigh replace {next_hop} lladdr 02:00:00:00:00:99 dev {output} nud permanent\n\
         route replace {all} via {next_hop} dev {output} onlink\n"
    );
    ip(&batch)
}

/// The devices to make, each with a peer.
fn device_set<'a>(inputs: &'a [String], output: &'a str) -> Vec<&'a str> {
    let names: BTreeSet<&str> = inputs.iter().map(String::as_str).chain([output]).collect();
    names.into_iter().collect()
}

/// The name of a device's peer, by its place among [`device_set`].
fn peer_name(index: usize) -> String {
    format!("polc-peer{index}")
}

fn ip(batch: &str) -> Result<(), NetfilterError> {
    run("ip", &["-batch", "-"], batch).map(|_| ())
}

/// Where a command is: administrators' may not be on a user's path. (A path for the command alone would have the whole
/// process copied to start it.)
fn located(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut places = std::env::split_paths(&path).chain(administrators).map(|folder| folder.join(name));
    places.find(|place| place.is_file()).unwrap_or_else(|| name.into())
}

/// Runs a command inside the namespace; its standard output.
fn run(name: &str, args: &[&str], input: &str) -> Result<String, NetfilterError> {
    let not_run = |error| {
        let command = if name == "ip" {
            "ip"
        } else if name == "ipset" {
            "ipset"
        } else {
            "iptables"
        };
        NetfilterError::Command(command, error)
    };
    let mut child = Command::new(located(name))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(not_run)?;
    let mut stdin = child.stdin.take().expect("a pipe was asked for");
    let text = input.to_string();
    // The command may write before it has read all.
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()));
    let output = child.wait_with_output().map_err(not_run)?;
    // A command that does not read to the end has failed, and says why.
    _ = writer.join();
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
        Err(NetfilterError::Refused(name.to_string(), said))
    }
}
