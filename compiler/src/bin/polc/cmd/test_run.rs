//! A program in the kernel, run on packets without being attached (`BPF_PROG_TEST_RUN`).

use polc::select::Devices;
use polc_backend_ebpf::emit::{COUNTERS_MAP, Told};
use polc_backend_ebpf::object::Object;
use polc_ir::env::{Attach, Input};
use polc_ir::field::DeviceName;
use polc_ir::hook::Family;
use polc_ir::outcome::{Decider, FrameKind};
use polc_ir::packet::network_packet;
use polc_ir::plan::Plan;
use polc_loader::load::{Loaded, load};
use polc_loader::net::Device;
use polc_loader::netfilter::Bare;
use polc_loader::sys::{Sys, TestRun};
use polc_loader::{Error, carry};

use crate::failure::Failure;

/// Where the kernel finds the mark in the context of a tc program (`struct __sk_buff`).
const MARK: std::ops::Range<usize> = 8..12;

/// A test run: what the kernel is given, and the packet as the program sees it then.
#[derive(Debug)]
pub(super) struct Setup {
    pub input: Input,
    /// The frame; at netfilter, the packet.
    pub frame: Vec<u8>,
    pub context: Vec<u8>,
}

/// The test run of a packet: it comes by `device` and, where it leaves by that, by `other`. At netfilter it is one that
/// this host makes, of no device, leaving by the loopback device. `None` for packets that the kernel tests no program
/// with.
pub(super) fn as_tested(
    input: &Input,
    plan: &Plan,
    context_bytes: usize,
    device: &Device,
    other: Option<u32>,
) -> Option<Setup> {
    let attach = plan.place.attach.expect("programs are made for an attach point");
    let mut input = input.clone();
    if attach == Attach::Netfilter {
        // The kernel makes it, so nobody tracked it.
        input.connection = None;
    }
    // net/bpf/test_run.c: a frame has an Ethernet header at least, a tc program's more; VLAN tags, types of packets and
    // connections can't be given.
    let has_connection = input.connection.is_some_and(|connection| connection.is_in_table());
    if input.frame.len() <= 14 || input.frame.len() > 1_500 || input.vlan.is_some() || has_connection {
        return None;
    }
    let mut context = vec![0; context_bytes];
    if attach == Attach::Netfilter {
        // `bpf_prog_test_run_nf`; the context is the start of a `struct nf_hook_state`.
        input.mark = 0;
        input.packet_type = Some(0);
        input.in_device = None;
        let loopback = plan.devices.devices.iter().find(|(device, _)| device.ifindex == LOOPBACK);
        input.out_device = loopback.map(|(device, _)| device.name).or_else(|| DeviceName::new("lo"));
        context[..2].copy_from_slice(&[HOOK_OUTPUT, if plan.family == Family::V4 { 2 } else { 10 }]);
        let frame = network_packet(plan.family, &input).ok()?.to_vec();
        return Some(Setup { input, frame, context });
    }
    if attach == Attach::Xdp {
        context[4..8].copy_from_slice(&(input.frame.len() as u32).to_ne_bytes());
        context[12..16].copy_from_slice(&device.ifindex.to_ne_bytes());
        input.mark = 0;
    } else {
        context[MARK].copy_from_slice(&input.mark.to_ne_bytes());
        context[36..40].copy_from_slice(&other.unwrap_or(0).to_ne_bytes());
        context[40..44].copy_from_slice(&device.ifindex.to_ne_bytes());
        // `eth_type_trans` works the type out from the device's address.
        let own = device.address.get(..6).is_some_and(|own| own == &input.frame[..6]);
        input.packet_type = Some(match input.frame[..6] {
            _ if own => 0,
            [255, 255, 255, 255, 255, 255] => 1,
            [first, ..] if first & 1 == 1 => 2,
            _ => 3,
        });
    }
    Some(Setup { frame: input.frame.clone(), input, context })
}

/// `NF_INET_LOCAL_OUT` (include/uapi/linux/netfilter.h).
const HOOK_OUTPUT: u8 = 3;
/// Number of the loopback device, in every network namespace.
const LOOPBACK: u32 = 1;

/// What the kernel made of a packet.
#[derive(Debug)]
pub(super) struct Tested {
    /// The packet as the program saw it.
    pub input: Input,
    /// What the program tells, or what went wrong in it.
    pub result: Result<Told, String>,
    /// Its mark afterwards.
    pub mark: u32,
}

/// An object in the kernel, in a network namespace with the devices that it knows.
#[derive(Debug)]
pub(super) struct KernelProgram {
    sys: Sys,
    loaded: Loaded,
    bare: Bare,
    /// Number of a device that the program does not know.
    undeclared: u32,
    attach: Attach,
    context_bytes: usize,
    counters: Vec<u64>,
}

impl KernelProgram {
    /// Loads an object for `plan`.
    pub(super) fn new(plan: &Plan, object: &Object, devices: &Devices) -> Result<KernelProgram, Failure> {
        let sys = Sys::new();
        polc_loader::swap::may_change(&sys)?;
        let attach = plan.place.attach.expect("programs are made for an attach point");
        let context_bytes = object.programs[0].kind.context_bytes() as usize;
        let loaded = load(&sys, object)?;
        let numbers = devices.declared.iter().map(|device| device.ifindex);
        let undeclared = numbers.clone().max().unwrap_or(0).saturating_add(1);
        let bare = Bare::new(&sys, [undeclared].into_iter().chain(numbers))?;
        let counters = vec![0; plan.traces.len()];
        Ok(KernelProgram { sys, loaded, bare, undeclared, attach, context_bytes, counters })
    }

    /// Runs a packet. `None` if the kernel tests no program with it.
    pub(super) fn run(&mut self, plan: &Plan, input: &Input) -> Result<Option<Tested>, Failure> {
        let number = |name: Option<DeviceName>| {
            let known =
                plan.devices.devices.iter().find(|(device, _)| Some(device.name) == name && name.is_some());
            known.map(|(device, _)| device.ifindex)
        };
        let (came, leaves) = (number(input.in_device), number(input.out_device));
        let (at, other, named) = match self.attach {
            Attach::TcEgress => (leaves, came, input.out_device),
            Attach::Netfilter => (None, None, None),
            Attach::Xdp | Attach::TcIngress => (came, None, input.in_device),
        };
        // A packet of no device comes by one that the program was not told about.
        let at = match at {
            Some(number) => number,
            None if named.is_none() => self.undeclared,
            None => return Ok(None),
        };
        let Some(device) = self.bare.device(at) else { return Ok(None) };
        let Some(Setup { input, frame, context }) = as_tested(input, plan, self.context_bytes, device, other)
        else {
            return Ok(None);
        };
        let program = self.loaded.program().ok_or_else(|| Error::NoProgram("it has none".into()))?;
        let run = TestRun { frame: &frame, context: &context, repeat: 1 };
        let result = match self.sys.test_run(&program.fd, &run) {
            // A frame that the kernel makes no packet of for this kind of program.
            Err(error) if error.raw_os_error() == Some(EINVAL) => return Ok(None),
            result => result.map_err(Error::call("run the loaded program"))?,
        };
        let mark = match self.attach {
            Attach::Xdp | Attach::Netfilter => input.mark,
            Attach::TcIngress | Attach::TcEgress => {
                u32::from_ne_bytes(result.context[MARK].try_into().expect("four bytes"))
            }
        };
        let grown = self.grown()?;
        let result = Told::new(plan, self.attach, &grown, result.return_value as i32);
        let unknown_device = |told: &Told| match told {
            Told::Counted(ending, _) => ending.by == Decider::Frame(FrameKind::UnknownDevice),
            // It may have been that.
            Told::Returned(_) => true,
        };
        if named.is_none() && result.as_ref().is_ok_and(unknown_device) {
            // The rules tell devices apart, and in the kernel every packet has one.
            return Ok(None);
        }
        Ok(Some(Tested { input, result, mark }))
    }

    /// By how much each counter's packets grew.
    fn grown(&mut self) -> Result<Vec<u64>, Failure> {
        let slots = match self.loaded.map(COUNTERS_MAP) {
            Some(map) => carry::slots(&self.sys, map)?,
            None => Vec::new(),
        };
        let mut grown = vec![0; self.counters.len()];
        for ((packets, _), (before, grown)) in slots.into_iter().zip(self.counters.iter_mut().zip(&mut grown))
        {
            *grown = packets - *before;
            *before = packets;
        }
        Ok(grown)
    }
}

/// `errno` (include/uapi/asm-generic/errno-base.h).
const EINVAL: i32 = 22;
