//! Programs that tests of the back end share. The one here is small but real: it counts packets for each protocol in a per-CPU array, drops
//! the ports listed in a data section, and remembers the last source address in two others.

pub mod frames;
pub mod plans;

use cranelift_entity::EntityRef;
use polc_backend_ebpf::asm::{Asm, Code};
use polc_backend_ebpf::insn::{AluOp, Cond, Helper, Reg, Size};
use polc_backend_ebpf::kernel_api::KernelFunction;
use polc_backend_ebpf::manifest::{CounterKind, CounterSlot, KernelVersion, Manifest};
use polc_backend_ebpf::object::{BSS, DataSection, MapDef, Object, Program, ProgramKind};
use polc_ir::entities::Map;

/// Dropped ports in network order, then one that is compared and never there.
pub const PORTS: [u16; 4] = [22, 23, 445, 0xffff];

/// The kinds of programs that see frames, which every loader knows.
pub const FRAME_KINDS: [ProgramKind; 2] = [ProgramKind::Xdp, ProgramKind::Classifier];

/// What programs return.
pub struct Actions {
    /// To let a packet on.
    pub pass: i32,
    /// To drop it.
    pub drop: i32,
}

/// What programs of this kind return.
pub fn actions(kind: ProgramKind) -> Actions {
    match kind {
        ProgramKind::Xdp => Actions { pass: 2, drop: 1 },
        ProgramKind::Classifier => Actions { pass: 0, drop: 2 },
        ProgramKind::Netfilter => Actions { pass: 1, drop: 0 },
    }
}

/// Offsets of `data` and `data_end` in the context.
pub fn packet_pointers(kind: ProgramKind) -> (i16, i16) {
    match kind {
        ProgramKind::Xdp => (0, 4),
        ProgramKind::Classifier => (76, 80),
        ProgramKind::Netfilter => panic!("a netfilter program has no packet pointers"),
    }
}

/// The object with one program of each of `kinds`.
pub fn sample(kinds: &[ProgramKind]) -> Object {
    let manifest = Manifest {
        polc: "0.1.0".to_string(),
        counters: vec![CounterSlot {
            kind: CounterKind::Rule,
            table: Some("filter".to_string()),
            chain: Some("INPUT".to_string()),
            rule: Some(1),
            file: Some("rules.v4".to_string()),
            line: Some(4),
            text: "-A INPUT -p tcp --dport 22 -j DROP".to_string(),
            verdict: Some("drop".to_string()),
            counts: Vec::new(),
        }],
        kernel_min: KernelVersion(5, 2),
        ..Manifest::default()
    };
    let mut object = Object::new(manifest);
    let ports = PORTS.iter().flat_map(|port| u32::from(*port).to_le_bytes()).collect();
    let ports = object.maps.push(MapDef::data("ports", DataSection::Rodata, ports));
    let last = object.maps.push(MapDef::data("last", DataSection::Data, vec![0; 16]));
    let counts = object.maps.push(MapDef::percpu_array("counts", 8, 256));
    let bss = object.maps.push(MapDef::data(BSS, DataSection::Bss, vec![0; 1 << 16]));
    for &kind in kinds {
        let name = format!("sample_{}", if kind == ProgramKind::Xdp { "xdp" } else { "tc" });
        object.programs.push(Program { name, kind, code: code(kind, ports, [last, bss], counts) });
    }
    object
}

/// The sample with a table of 4 MB, as large policies have it.
pub fn sample_with_tables(kinds: &[ProgramKind]) -> Object {
    let mut object = sample(kinds);
    let bytes = (0..4u32 << 20).map(|at| (at ^ at >> 8) as u8).collect();
    object.maps.push(MapDef::data("table", DataSection::Data, bytes));
    object
}

fn code(kind: ProgramKind, ports: Map, last: [Map; 2], counts: Map) -> Code {
    let Actions { pass, drop } = actions(kind);
    let (data, data_end) = packet_pointers(kind);
    let (r0, r1, r2, r3, r6, r7, r8) = (Reg::R0, Reg::R1, Reg::R2, Reg::R3, Reg::R6, Reg::R7, Reg::R8);
    let mut a = Asm::new();
    let file = a.file("rules.v4");
    let parse = a.line(file, 1, "*filter");
    let rule = a.line(file, 4, "-A INPUT -p tcp --dport 22 -j DROP");
    let (passing, dropping) = (a.label(), a.label());

    a.comment("packet pointers");
    a.load_ctx_pointer(r2, r1, data);
    a.load_ctx_pointer(r3, r1, data_end);
    a.set_line(Some(parse));
    a.mov64(r6, r2);
    a.alu64(AluOp::Add, r2, 14 + 20 + 4);
    a.jump64(Cond::Gt, r2, r3, passing);
    a.load(Size::H, r1, r6, 12);
    a.jump32(Cond::Ne, r1, 0x0008, passing);
    a.load(Size::B, r7, r6, 14 + 9);
    a.load(Size::H, r8, r6, 14 + 20 + 2);
    a.be(16, r8);

    a.comment("remember the source address");
    a.load(Size::W, r2, r6, 14 + 12);
    for map in last {
        a.load_map_value(r1, map, 8);
        a.store(Size::W, r1, 0, r2);
    }

    a.comment("count by protocol");
    a.store(Size::W, Reg::FP, -4, r7);
    a.load_map(r1, counts);
    a.mov64(r2, Reg::FP);
    a.alu64(AluOp::Add, r2, -4);
    a.call(Helper::MAP_LOOKUP_ELEM);
    a.jump64(Cond::Eq, r0, 0, passing);
    a.load(Size::Dw, r1, r0, 0);
    a.alu64(AluOp::Add, r1, 1);
    a.store(Size::Dw, r0, 0, r1);

    a.set_line(Some(rule));
    for index in 0..PORTS.len() {
        a.load_map_value(r1, ports, index as u32 * 4);
        a.load(Size::W, r2, r1, 0);
        a.jump32(Cond::Eq, r8, r2, dropping);
    }
    a.set_line(None);
    a.bind(passing);
    a.mov32(r0, pass);
    a.exit();
    a.set_line(Some(rule));
    a.bind(dropping);
    a.mov32(r0, drop);
    a.exit();
    a.finish().expect("the sample assembles")
}

/// A UDP packet to `port` from 192.0.2.`last`, 60 bytes long.
pub fn packet(port: u16, last: u8) -> Vec<u8> {
    let mut packet = vec![0; 60];
    packet[12] = 8;
    packet[14] = 0x45;
    packet[17] = 46;
    packet[22] = 64;
    packet[23] = 17;
    packet[26..30].copy_from_slice(&[192, 0, 2, last]);
    packet[30..34].copy_from_slice(&[198, 51, 100, 1]);
    packet[36..38].copy_from_slice(&port.to_be_bytes());
    packet
}

/// The object without what files don't hold.
pub fn without_comments(mut object: Object) -> Object {
    object.programs.iter_mut().for_each(|program| program.code.comments.clear());
    object
}

/// The map numbered `index`.
pub fn map(index: usize) -> Map {
    Map::new(index)
}

/// `bpf_sock_tuple` of UDP from 192.0.2.1:1000 to 192.0.2.2:53.
pub const TUPLE: [u8; 12] = [192, 0, 2, 1, 192, 0, 2, 2, 3, 232, 0, 53];

/// A program that asks the kernel for the connection of [`TUPLE`]. It passes packets if there is one, and drops them if
/// there is none; what else goes wrong it returns as the error's number.
pub fn looks_up_connections(kind: ProgramKind) -> Object {
    let actions = actions(kind);
    let (tuple, opts) = (-16, -32);
    let mut a = Asm::new();
    let (found, other) = (a.label(), a.label());
    for (at, word) in (0i16..).step_by(4).zip(TUPLE.as_chunks::<4>().0) {
        a.store(Size::W, Reg::FP, tuple + at, i32::from_le_bytes(*word));
    }
    // This network namespace, no error yet, UDP.
    for (at, word) in [(0, -1), (4, 0), (8, 17)] {
        a.store(Size::W, Reg::FP, opts + at, word);
    }
    a.mov64(Reg::R2, Reg::FP);
    a.alu64(AluOp::Add, Reg::R2, i32::from(tuple));
    a.mov64(Reg::R3, TUPLE.len() as i32);
    a.mov64(Reg::R4, Reg::FP);
    a.alu64(AluOp::Add, Reg::R4, i32::from(opts));
    a.mov64(Reg::R5, 12);
    a.call_kernel(match kind {
        ProgramKind::Xdp => KernelFunction::XdpCtLookup,
        ProgramKind::Classifier => KernelFunction::SkbCtLookup,
        ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
    });
    a.jump64(Cond::Ne, Reg::R0, 0, found);
    a.load(Size::W, Reg::R0, Reg::FP, opts + 4);
    a.jump32(Cond::Ne, Reg::R0, -2, other);
    a.mov32(Reg::R0, actions.drop);
    a.bind(other);
    a.exit();
    a.bind(found);
    a.mov64(Reg::R1, Reg::R0);
    a.call_kernel(KernelFunction::CtRelease);
    a.mov32(Reg::R0, actions.pass);
    a.exit();
    let code = a.finish().expect("assembles");
    let mut object = Object::new(Manifest::default());
    object.programs.push(Program { name: "lookup".to_string(), kind, code });
    object
}
