//! The driver: a program that writes the next packet of a pool into the frame and tail-calls the program under test.
//!
//! `BPF_PROG_TEST_RUN` repeats a program on one packet, which the branch predictor and the caches soon know by heart.
//! So the program that is repeated is the driver; what it tail-calls is the program under test, unchanged, as it would
//! be attached. The driver's own cost, measured with an empty program behind it, is in every number and is subtracted.
//!
//! All programs are measured in turn, round after round, and the least time of a program counts: what disturbs a
//! machine only adds time. A program attached nowhere would cost a wait of 100 ms and more for each test run of XDP
//! (the kernel's dispatcher is changed for it), so the driver is attached to a device of a network namespace of its
//! own.

use std::time::Instant;

use aya::maps::{Array, MapData, ProgramArray};
use cranelift_entity::PrimaryMap;
use polc_backend_ebpf::abi;
use polc_backend_ebpf::asm::Asm;
use polc_backend_ebpf::insn::{AluOp, Cond, Helper, Reg, Size};
use polc_backend_ebpf::object::{DataSection, MapDef, MapKind, MapType, ProgramKind};
use polc_ir::hook::Family;

use crate::kernel::{Loaded, object};
use crate::packet::{CHECKSUM, FRAME, Form, L3, Layout, frame, layout, record};
use crate::rules::Header;
use crate::trace::POOL;

/// `bpf_redirect(ifindex, flags)`, include/uapi/linux/bpf.h.
const REDIRECT: Helper = Helper(23);

/// Packets run before the clock starts, so that each program finds its own tables in the caches again.
const WARM_UP: u32 = 16_384;

/// What the driver returns if the tail call failed.
const NOT_CALLED: u32 = 99;

/// Packets in the form that the driver reads.
pub(crate) struct Pool {
    bytes: Vec<u8>,
}

impl Pool {
    /// The pool of those indices into `headers`.
    pub(crate) fn new(family: Family, headers: &[Header], order: &[u32]) -> Pool {
        let bytes = order.iter().flat_map(|&index| record(family, &headers[index as usize]));
        Pool { bytes: bytes.collect() }
    }

    /// The pool of those indices into frames of [`FRAME`] bytes.
    pub(crate) fn of_frames(frames: &[Vec<u8>], order: &[u32]) -> Pool {
        let bytes = order.iter().flat_map(|&index| frames[index as usize].iter().copied());
        Pool { bytes: bytes.collect() }
    }
}

/// The least times of a program, and how the empty program's times varied.
#[derive(Clone, Debug)]
pub(crate) struct Times {
    /// For each program, for each pool: ns a packet, the driver included.
    pub(crate) ns: Vec<Vec<f64>>,
    /// Median over least time of the first program: 1 on a quiet machine.
    pub(crate) spread: f64,
}

/// A driver in the kernel.
pub(crate) struct Driver {
    loaded: Loaded,
    programs: ProgramArray<MapData>,
    form: Form,
    frame: Vec<u8>,
}

impl Driver {
    /// Loads a driver and, at XDP, attaches it to `device`.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn new(kind: ProgramKind, form: Form, device: &str) -> Result<Driver, String> {
        let mut loaded = load(kind, form, Then::TailCall)?;
        if kind == ProgramKind::Xdp {
            loaded.attach_xdp(device)?;
        }
        let programs = loaded.ebpf.take_map("programs").ok_or("the driver has no programs")?;
        let programs = ProgramArray::try_from(programs).map_err(|error| error.to_string())?;
        let none = Header { src: 0, dst: 0, sport: 0, dport: 0, proto: 17 };
        let frame = match form {
            Form::Fields(family) => frame(family, &none),
            Form::Frames => vec![0; FRAME],
        };
        Ok(Driver { loaded, programs, form, frame })
    }

    fn fill(&mut self, pool: &Pool) -> Result<(), String> {
        let map = self.loaded.ebpf.map_mut(".data.pool").ok_or("the driver has no pool")?;
        match self.form {
            Form::Fields(Family::V4) => fill::<{ 16 * POOL }>(map, &pool.bytes),
            Form::Fields(Family::V6) => fill::<{ 40 * POOL }>(map, &pool.bytes),
            Form::Frames => fill::<{ FRAME * POOL }>(map, &pool.bytes),
        }
    }

    fn time(&self, repeat: u32) -> Result<f64, String> {
        let start = Instant::now();
        let result = self.loaded.run(&self.frame, repeat, None)?;
        let ns = start.elapsed().as_secs_f64() * 1e9 / f64::from(repeat);
        if result.return_value == NOT_CALLED {
            return Err("the tail call failed".into());
        }
        Ok(ns)
    }

    /// Measures programs of the driver's kind on pools of its family.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn measure(
        &mut self,
        programs: &[&Loaded],
        pools: &[Pool],
        rounds: usize,
    ) -> Result<Times, String> {
        let mut ns = vec![vec![f64::MAX; pools.len()]; programs.len()];
        let mut first = Vec::new();
        for _ in 0..rounds {
            for (index, pool) in pools.iter().enumerate() {
                self.fill(pool)?;
                for (least, program) in ns.iter_mut().zip(programs) {
                    self.programs.set(0, program.fd()?, 0).map_err(|error| format!("{error:?}"))?;
                    self.time(WARM_UP)?;
                    let time = self.time(POOL as u32)?;
                    least[index] = least[index].min(time);
                    if std::ptr::eq(*program, programs[0]) {
                        first.push(time);
                    }
                }
            }
        }
        first.sort_by(f64::total_cmp);
        let spread =
            first.get(first.len() / 2).zip(first.first()).map_or(1.0, |(median, least)| median / least);
        Ok(Times { ns, spread })
    }
}

fn fill<const N: usize>(map: &mut aya::maps::Map, bytes: &[u8]) -> Result<(), String> {
    let mut array: Array<_, [u8; N]> = map.try_into().map_err(|error| format!("the pool: {error}"))?;
    let value: Box<[u8; N]> = bytes.to_vec().into_boxed_slice().try_into().map_err(|_| "the pool's size")?;
    array.set(0, *value, 0).map_err(|error| format!("{error:?}"))
}

/// Where the driver's state is: how many packets it has written, and the device it sends to.
const STATE_MAP: &str = ".data.state";

/// Bytes of the state: a counter of 64 bits, a device's number of 32, and 4 unused.
const STATE_BYTES: usize = 16;

/// What follows after a packet was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// The program under test.
    TailCall,
    /// The device of that number in the state.
    Redirect,
}

/// A program that writes the next packet of a pool into the frame and sends it to a device.
pub(crate) struct Injector {
    loaded: Loaded,
    frame: Vec<u8>,
    context: Vec<u8>,
}

impl Injector {
    /// Loads an injector of IPv4 packets and attaches it to `device`, whose number is `ifindex`.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn new(device: &str, ifindex: u32) -> Result<Injector, String> {
        let mut loaded = load(ProgramKind::Xdp, Form::Fields(Family::V4), Then::Redirect)?;
        loaded.attach_xdp(device)?;
        let none = Header { src: 0, dst: 0, sport: 0, dport: 0, proto: 17 };
        let frame = frame(Family::V4, &none);
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let mut context = vec![0; 24];
        context[4..8].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
        context[12..16].copy_from_slice(&ifindex.to_ne_bytes());
        Ok(Injector { loaded, frame, context })
    }

    /// Replaces the packets.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn fill(&mut self, pool: &Pool) -> Result<(), String> {
        let map = self.loaded.ebpf.map_mut(".data.pool").ok_or("the injector has no pool")?;
        fill::<{ 16 * POOL }>(map, &pool.bytes)
    }

    /// Sends the first `packets` of the pool to a device, from the pool's beginning, and returns ns a packet.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn send(&mut self, ifindex: u32, packets: u32) -> Result<f64, String> {
        let map = self.loaded.ebpf.map_mut(STATE_MAP).ok_or("the injector has no state")?;
        let mut state: Array<_, [u8; STATE_BYTES]> =
            map.try_into().map_err(|error| format!("the state: {error}"))?;
        let mut bytes = [0; STATE_BYTES];
        bytes[8..12].copy_from_slice(&ifindex.to_ne_bytes());
        state.set(0, bytes, 0).map_err(|error| format!("{error:?}"))?;
        let start = Instant::now();
        self.loaded.run(&self.frame, packets, Some((BATCH, &self.context)))?;
        Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(packets))
    }
}

/// Packets that the kernel sends at once, as a driver's receive loop does (NAPI_POLL_WEIGHT).
pub(crate) const BATCH: u32 = 64;

/// Emits and loads the driver.
fn load(kind: ProgramKind, form: Form, then: Then) -> Result<Loaded, String> {
    let record = form.record();
    let frame = match form {
        Form::Fields(family) => layout(family).frame,
        Form::Frames => FRAME,
    };
    let mut maps = PrimaryMap::new();
    let pool = maps.push(MapDef::data("pool", DataSection::Data, vec![0; record * POOL]));
    let state = maps.push(MapDef::data("state", DataSection::Data, vec![0; STATE_BYTES]));
    let (data, data_end) = match kind {
        ProgramKind::Xdp => (abi::xdp_md::DATA, abi::xdp_md::DATA_END),
        ProgramKind::Classifier => (abi::sk_buff::DATA, abi::sk_buff::DATA_END),
        ProgramKind::Netfilter => unreachable!("netfilter programs are not measured"),
    };
    let mut a = Asm::new();
    let short = a.label();
    a.load_ctx_pointer(Reg::R2, Reg::R1, data);
    a.load_ctx_pointer(Reg::R3, Reg::R1, data_end);
    a.mov64(Reg::R4, Reg::R2);
    a.alu64(AluOp::Add, Reg::R4, frame as i32);
    a.jump64(Cond::Gt, Reg::R4, Reg::R3, short);
    a.load_map_value(Reg::R4, state, 0);
    a.load(Size::Dw, Reg::R5, Reg::R4, 0);
    a.mov64(Reg::R0, Reg::R5);
    a.alu64(AluOp::Add, Reg::R0, 1);
    a.store(Size::Dw, Reg::R4, 0, Reg::R0);
    a.alu64(AluOp::And, Reg::R5, POOL as i32 - 1);
    a.alu64(AluOp::Mul, Reg::R5, record as i32);
    a.load_map_value(Reg::R4, pool, 0);
    a.alu64(AluOp::Add, Reg::R4, Reg::R5);
    match form {
        Form::Fields(family) => {
            let Layout { src, address, proto, l4, .. } = layout(family);
            for at in (0..2 * address).step_by(8) {
                a.load(Size::Dw, Reg::R0, Reg::R4, at as i16);
                a.store(Size::Dw, Reg::R2, (src + at) as i16, Reg::R0);
            }
            a.load(Size::W, Reg::R0, Reg::R4, 2 * address as i16);
            a.store(Size::W, Reg::R2, l4 as i16, Reg::R0);
            a.load(Size::B, Reg::R0, Reg::R4, 2 * address as i16 + 4);
            a.store(Size::B, Reg::R2, proto as i16, Reg::R0);
        }
        Form::Frames => {
            for at in (0..FRAME as i16).step_by(8) {
                a.load(Size::Dw, Reg::R0, Reg::R4, at);
                a.store(Size::Dw, Reg::R2, at, Reg::R0);
            }
        }
    }
    match then {
        Then::TailCall => {
            let programs = maps.push(MapDef {
                name: "programs".into(),
                kind: MapKind::Declared {
                    map_type: MapType::PROG_ARRAY,
                    key_bytes: 4,
                    value_bytes: 4,
                    max_entries: 1,
                    flags: 0,
                },
            });
            a.load_map(Reg::R2, programs);
            a.mov32(Reg::R3, 0);
            a.call(Helper::TAIL_CALL);
        }
        Then::Redirect => {
            // The kernel's own stack looks at the checksum.
            a.load(Size::H, Reg::R0, Reg::R4, CHECKSUM as i16);
            a.store(Size::H, Reg::R2, L3 as i16 + 10, Reg::R0);
            a.load_map_value(Reg::R4, state, 0);
            a.load(Size::W, Reg::R1, Reg::R4, 8);
            a.mov32(Reg::R2, 0);
            a.call(REDIRECT);
            a.exit();
        }
    }
    a.bind(short);
    a.mov32(Reg::R0, NOT_CALLED as i32);
    a.exit();
    let code = a.finish().map_err(|error| error.to_string())?;
    Loaded::load(&object(kind, maps, code))
}
