//! The check VM gives what the kernel gives: instructions, helpers, contexts, maps. Every program here writes what it
//! saw into the data section `.data.out`, runs in the VM, and, as root, in the kernel too.

use aya::maps::{Array, ProgramArray};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, Xdp};
use polc_backend_ebpf::asm::Asm;
use polc_backend_ebpf::insn::{AluOp, ByteOrder, Cond, Helper, Insn, Operand, Reg, Size, Width};
use polc_backend_ebpf::manifest::Manifest;
use polc_backend_ebpf::object::{DataSection, MapDef, MapKind, MapType, Object, Program, ProgramKind};
use polc_backend_ebpf::vm::{Connection, Context, Input, RunResult, Vm, VmError};
use polc_ir::entities::Map;
use polc_ir::limits::{VM_MAP_BYTES_MAX, VM_PACKET_BYTES_MAX};
use polc_tests::kernel::may_run;
use polc_tests::programs::{FRAME_KINDS, TUPLE, actions, looks_up_connections, packet, sample};

const OUT_BYTES: usize = 256;

/// An object with one program, whose first map is `.data.out`.
fn with_out(kind: ProgramKind, build: impl FnOnce(&mut Asm, &mut Object, Map)) -> Object {
    let mut object = Object::new(Manifest::default());
    let out = object.maps.push(MapDef::data("out", DataSection::Data, vec![0; OUT_BYTES]));
    let mut a = Asm::new();
    build(&mut a, &mut object, out);
    let code = a.finish().expect("assembles");
    object.programs.push(Program { name: "main".to_string(), kind, code });
    object
}

/// Writes `from` to the `index`th 64-bit word of `out`. `r5` is lost.
fn emit_out(a: &mut Asm, out: Map, index: u32, from: Reg) {
    a.load_map_value(Reg::R5, out, index * 8);
    a.store(Size::Dw, Reg::R5, 0, from);
}

/// Returns 2, which XDP calls pass and tc calls shot.
fn emit_return(a: &mut Asm) {
    a.mov32(Reg::R0, 2);
    a.exit();
}

fn in_vm(object: &Object, input: &Input<'_>) -> (RunResult, Vec<u8>) {
    let mut vm = Vm::new(object).expect("links");
    let result = vm.run(0, input).expect("runs");
    let out = vm.map("out").expect("named");
    (result, vm.values(out).to_vec())
}

/// An object in the kernel.
struct Kernel {
    ebpf: aya::Ebpf,
    kind: ProgramKind,
}

impl Kernel {
    fn load(object: &Object) -> Kernel {
        // Through the file, so that the writer is part of what is tested.
        let bytes = object.write().expect("writes");
        let mut ebpf = aya::EbpfLoader::new().load(&bytes).expect("aya loads it");
        for program in &object.programs {
            let loaded = ebpf.program_mut(&program.name).expect("named");
            let result = match program.kind {
                ProgramKind::Xdp => <&mut Xdp>::try_from(loaded).expect("XDP").load(),
                ProgramKind::Classifier => <&mut SchedClassifier>::try_from(loaded).expect("tc").load(),
                ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
            };
            result.unwrap_or_else(|error| panic!("the verifier: {error:?}"));
        }
        Kernel { ebpf, kind: object.programs[0].kind }
    }

    fn run(&mut self, name: &str, input: &Input<'_>) -> RunResult {
        let context = &input.context;
        let (mut given, mut got) = match self.kind {
            ProgramKind::Xdp => (vec![0; 24], vec![]),
            ProgramKind::Classifier => (vec![0; 192], vec![0; 192]),
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        };
        let mut put = |at: usize, value: u32| given[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        match self.kind {
            ProgramKind::Xdp => put(4, input.packet.len() as u32),
            ProgramKind::Classifier => {
                put(8, context.mark);
                put(32, context.priority);
                put(36, context.ingress_ifindex);
                put(40, context.ifindex);
            }
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        }
        let mut options = TestRunOptions::new();
        options.data_in = Some(input.packet);
        options.ctx_in = Some(&given);
        if !got.is_empty() {
            options.ctx_out = Some(&mut got);
        }
        let program = self.ebpf.program_mut(name).expect("named");
        let result = match self.kind {
            ProgramKind::Xdp => <&mut Xdp>::try_from(program).expect("XDP").test_run(options),
            ProgramKind::Classifier => {
                <&mut SchedClassifier>::try_from(program).expect("tc").test_run(options)
            }
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        };
        let mark = match self.kind {
            ProgramKind::Xdp => context.mark,
            ProgramKind::Classifier => u32::from_ne_bytes(got[8..12].try_into().expect("4 bytes")),
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        };
        RunResult { return_value: result.expect("test run").return_value, mark }
    }

    fn out(&self) -> Vec<u8> {
        let map = self.ebpf.map(".data.out").expect("named");
        Array::<_, [u8; OUT_BYTES]>::try_from(map).expect("array").get(&0, 0).expect("a value").to_vec()
    }
}

/// Runs in the VM and in the kernel, where allowed, and gives what the VM wrote, as words.
fn both(name: &str, object: &Object, input: &Input<'_>) -> Vec<u64> {
    let (result, out) = in_vm(object, input);
    if may_run(&format!("{name} in the kernel")) {
        let mut kernel = Kernel::load(object);
        assert_eq!(kernel.run("main", input), result, "{name}: result in the kernel (left) and the VM");
        assert_eq!(words(&kernel.out()), words(&out), "{name}: words in the kernel (left) and the VM");
    }
    words(&out)
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()
}

fn input(packet: &[u8]) -> Input<'_> {
    Input { packet, ..Input::default() }
}

#[test]
fn sample_decides_and_counts() {
    let object = sample(&FRAME_KINDS);
    let mut vm = Vm::new(&object).expect("links");
    for (index, kind) in FRAME_KINDS.into_iter().enumerate() {
        let actions = actions(kind);
        for (port, action) in
            [(22, actions.drop), (80, actions.pass), (445, actions.drop), (23, actions.drop)]
        {
            let packet = packet(port, 7);
            let result = vm.run(index, &input(&packet)).expect("runs");
            assert_eq!(result.return_value, action as u32, "{kind} port {port}");
            assert_eq!(vm.packet(), packet);
        }
        assert_eq!(vm.run(index, &input(&[])).expect("runs").return_value, actions.pass as u32);
        assert_eq!(
            vm.run(index, &input(&packet(22, 7)[..37])).expect("runs").return_value,
            actions.pass as u32
        );
    }
    let counts = vm.map("counts").expect("named");
    assert_eq!(vm.value(counts, &17u32.to_ne_bytes()), Some(&8u64.to_ne_bytes()[..]));
    assert_eq!(vm.value(counts, &256u32.to_ne_bytes()), None);
    let last = vm.map("last").expect("named");
    assert_eq!(vm.values(last)[8..12], [192, 0, 2, 7]);
    vm.reset(&object);
    assert_eq!(vm.values(last), [0; 16]);
    assert_eq!(vm.value(counts, &17u32.to_ne_bytes()), Some(&[0; 8][..]));
    let ports = vm.map("ports").expect("named");
    assert_eq!(vm.values(ports)[..4], [22, 0, 0, 0], "constants are still there");
}

#[test]
fn xdp_context() {
    let object = with_out(ProgramKind::Xdp, |a, _, out| {
        a.load_ctx_pointer(Reg::R2, Reg::R1, 0);
        a.load_ctx_pointer(Reg::R3, Reg::R1, 4);
        a.load_ctx_pointer(Reg::R4, Reg::R1, 8);
        a.load(Size::W, Reg::R6, Reg::R1, 16);
        a.alu64(AluOp::Sub, Reg::R3, Reg::R2);
        a.alu64(AluOp::Sub, Reg::R2, Reg::R4);
        emit_out(a, out, 0, Reg::R3);
        emit_out(a, out, 1, Reg::R2);
        emit_out(a, out, 2, Reg::R6);
        emit_return(a);
    });
    let packet = packet(80, 1);
    let out = both("xdp_context", &object, &input(&packet));
    assert_eq!(out[..3], [60, 0, 0]);
}

#[test]
fn classifier_context() {
    let object = with_out(ProgramKind::Classifier, |a, _, out| {
        a.mov64(Reg::R6, Reg::R1);
        // len, pkt_type, mark, protocol, vlan_present, vlan_tci, priority, ingress_ifindex, ifindex
        for (index, off) in [0, 4, 8, 16, 20, 24, 32, 36, 40].into_iter().enumerate() {
            a.load(Size::W, Reg::R2, Reg::R6, off);
            emit_out(a, out, index as u32, Reg::R2);
        }
        a.load_ctx_pointer(Reg::R2, Reg::R6, 76);
        a.load_ctx_pointer(Reg::R3, Reg::R6, 80);
        a.alu64(AluOp::Sub, Reg::R3, Reg::R2);
        emit_out(a, out, 9, Reg::R3);
        a.load(Size::W, Reg::R2, Reg::R6, 8);
        a.alu32(AluOp::Xor, Reg::R2, 0xff);
        a.store(Size::W, Reg::R6, 8, Reg::R2);
        emit_return(a);
    });
    let mut packet = packet(80, 1);
    packet[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    let context = Context {
        mark: 0x1234,
        priority: 7,
        ingress_ifindex: 0,
        ifindex: 1,
        packet_type: 3,
        ..Context::default()
    };
    let given = Input { packet: &packet, context, ..Input::default() };
    let out = both("classifier_context", &object, &given);
    assert_eq!(out[..10], [60, 3, 0x1234, 0x0008, 0, 0, 7, 0, 1, 60]);
    assert_eq!(in_vm(&object, &given).0, RunResult { return_value: 2, mark: 0x12cb });

    // What the kernel's test run doesn't let a caller set.
    let context =
        Context { vlan_tci: Some(5), vlan_protocol: 0x8100, protocol: Some(0x86dd), ..Context::default() };
    let (_, out) = in_vm(&object, &Input { packet: &packet, linear: Some(20), context, ..Input::default() });
    let out = words(&out);
    assert_eq!(out[..10], [60, 0, 0, 0xdd86, 1, 5, 0, 0, 0, 20]);
}

#[test]
fn array_and_hash_maps() {
    let object = with_out(ProgramKind::Xdp, |a, object, out| {
        let declared = |name: &str, map_type, key_bytes, value_bytes, max_entries| MapDef {
            name: name.to_string(),
            kind: MapKind::Declared { map_type, key_bytes, value_bytes, max_entries, flags: 0 },
        };
        let array = object.maps.push(declared("array", MapType::ARRAY, 4, 12, 3));
        let hash = object.maps.push(declared("hash", MapType::HASH, 8, 8, 2));
        let mut next = 0;
        let mut call = |a: &mut Asm, helper, map, key: i32, flags: i32| {
            a.store(Size::Dw, Reg::FP, -8, key);
            a.store(Size::Dw, Reg::FP, -16, key + 100);
            a.store(Size::Dw, Reg::FP, -24, key + 200);
            a.load_map(Reg::R1, map);
            a.mov64(Reg::R2, Reg::FP);
            a.alu64(AluOp::Add, Reg::R2, -8);
            a.mov64(Reg::R3, Reg::FP);
            a.alu64(AluOp::Add, Reg::R3, -24);
            a.mov32(Reg::R4, flags);
            a.call(helper);
            if helper == Helper::MAP_LOOKUP_ELEM {
                let missing = a.label();
                a.mov64(Reg::R6, -1);
                a.jump64(Cond::Eq, Reg::R0, 0, missing);
                a.load(Size::Dw, Reg::R6, Reg::R0, 0);
                a.bind(missing);
                a.mov64(Reg::R0, Reg::R6);
            }
            emit_out(a, out, next, Reg::R0);
            next += 1;
        };
        use Helper as H;
        for (helper, map, key, flags) in [
            (H::MAP_LOOKUP_ELEM, array, 2, 0),
            (H::MAP_LOOKUP_ELEM, array, 3, 0),
            (H::MAP_UPDATE_ELEM, array, 1, 0),
            (H::MAP_UPDATE_ELEM, array, 1, 1),
            (H::MAP_UPDATE_ELEM, array, 3, 0),
            (H::MAP_UPDATE_ELEM, array, 1, 9),
            (H::MAP_LOOKUP_ELEM, array, 1, 0),
            (H::MAP_DELETE_ELEM, array, 1, 0),
            (H::MAP_LOOKUP_ELEM, hash, 7, 0),
            (H::MAP_UPDATE_ELEM, hash, 7, 2),
            (H::MAP_UPDATE_ELEM, hash, 7, 1),
            (H::MAP_UPDATE_ELEM, hash, 7, 1),
            (H::MAP_UPDATE_ELEM, hash, 7, 2),
            (H::MAP_UPDATE_ELEM, hash, 8, 0),
            (H::MAP_UPDATE_ELEM, hash, 9, 0),
            (H::MAP_LOOKUP_ELEM, hash, 7, 0),
            (H::MAP_DELETE_ELEM, hash, 7, 0),
            (H::MAP_DELETE_ELEM, hash, 7, 0),
            (H::MAP_UPDATE_ELEM, hash, 9, 0),
            (H::MAP_LOOKUP_ELEM, hash, 9, 0),
            (H::MAP_UPDATE_ELEM, hash, 9, 5),
        ] {
            call(a, helper, map, key, flags);
        }
        emit_return(a);
    });
    let out = both("array_and_hash_maps", &object, &input(&packet(80, 1)));
    let errno = |code: i64| -code as u64;
    assert_eq!(out[..4], [0, u64::MAX, 0, errno(17)]);
    assert_eq!(out[8..14], [u64::MAX, errno(2), 0, errno(17), 0, 0]);
}

#[test]
fn packet_bytes_are_copied() {
    // offset, length; what follows is the helper's result and the 8 bytes it wrote to.
    const CASES: [(i32, i32); 7] = [(0, 8), (52, 8), (53, 8), (60, 1), (59, 1), (70_000, 4), (-1, 4)];
    for kind in FRAME_KINDS {
        let object = with_out(kind, |a, _, out| {
            a.mov64(Reg::R6, Reg::R1);
            for (index, (offset, length)) in CASES.into_iter().enumerate() {
                a.store(Size::Dw, Reg::FP, -8, -1);
                a.mov64(Reg::R1, Reg::R6);
                a.mov32(Reg::R2, offset);
                a.mov64(Reg::R3, Reg::FP);
                a.alu64(AluOp::Add, Reg::R3, -8);
                a.mov32(Reg::R4, length);
                a.call(if kind == ProgramKind::Xdp {
                    Helper::XDP_LOAD_BYTES
                } else {
                    Helper::SKB_LOAD_BYTES
                });
                emit_out(a, out, index as u32 * 2, Reg::R0);
                a.load(Size::Dw, Reg::R1, Reg::FP, -8);
                emit_out(a, out, index as u32 * 2 + 1, Reg::R1);
            }
            emit_return(a);
        });
        let mut packet = packet(80, 1);
        packet.iter_mut().enumerate().for_each(|(at, byte)| *byte ^= at as u8);
        let out = both(&format!("packet_bytes_are_copied {kind}"), &object, &input(&packet));
        assert_eq!((out[0], out[2]), (0, 0));
        assert_eq!(out[1].to_ne_bytes(), packet[..8]);
        assert_ne!(out[4], 0);
    }
}

#[test]
fn pulled_data_becomes_readable() {
    let object = with_out(ProgramKind::Classifier, |a, _, out| {
        a.mov64(Reg::R6, Reg::R1);
        for (index, length) in [61, 40, 0, 60].into_iter().enumerate() {
            a.mov64(Reg::R1, Reg::R6);
            a.mov32(Reg::R2, length);
            a.call(Helper::SKB_PULL_DATA);
            emit_out(a, out, index as u32 * 3, Reg::R0);
            a.load_ctx_pointer(Reg::R2, Reg::R6, 76);
            a.load_ctx_pointer(Reg::R3, Reg::R6, 80);
            let short = a.label();
            a.mov64(Reg::R7, -1);
            a.mov64(Reg::R1, Reg::R2);
            a.alu64(AluOp::Add, Reg::R1, 40);
            a.jump64(Cond::Gt, Reg::R1, Reg::R3, short);
            a.load(Size::B, Reg::R7, Reg::R2, 39);
            a.bind(short);
            a.alu64(AluOp::Sub, Reg::R3, Reg::R2);
            emit_out(a, out, index as u32 * 3 + 1, Reg::R3);
            emit_out(a, out, index as u32 * 3 + 2, Reg::R7);
        }
        emit_return(a);
    });
    let mut packet = packet(80, 1);
    packet[39] = 0x77;
    let out = both("pulled_data_becomes_readable", &object, &input(&packet));
    assert_eq!(out[..3], [-12i64 as u64, 60, 0x77]);
    let (_, out) = in_vm(&object, &Input { packet: &packet, linear: Some(20), ..Input::default() });
    let out = words(&out);
    assert_eq!(out[..12], [-12i64 as u64, 20, u64::MAX, 0, 40, 0x77, 0, 40, 0x77, 0, 60, 0x77]);
}

#[test]
fn random_time_and_cpu_are_given() {
    let object = with_out(ProgramKind::Xdp, |a, _, out| {
        let helpers = [Helper::GET_PRANDOM_U32, Helper::GET_PRANDOM_U32, Helper::KTIME_GET_NS];
        for (index, helper) in helpers.into_iter().chain([Helper::GET_SMP_PROCESSOR_ID]).enumerate() {
            a.call(helper);
            emit_out(a, out, index as u32, Reg::R0);
        }
        emit_return(a);
    });
    let packet = packet(80, 1);
    let mut vm = Vm::new(&object).expect("links");
    let out = vm.map("out").expect("named");
    let run = |vm: &mut Vm| {
        vm.run(0, &input(&packet)).expect("runs");
        words(vm.values(out))[..4].to_vec()
    };
    vm.set_random(0xffff_ffff);
    vm.set_time_ns(1 << 40);
    vm.set_cpu(3);
    assert_eq!(run(&mut vm), [0xffff_ffff, 0xffff_ffff, 1 << 40, 3]);
    vm.set_random_seed(42);
    let first = run(&mut vm);
    assert!(first[0] != first[1] && first[0] <= u64::from(u32::MAX));
    vm.set_random_seed(42);
    assert_eq!(run(&mut vm), first, "the same seed gives the same sequence");
    if may_run("random_time_and_cpu_are_given in the kernel") {
        let mut kernel = Kernel::load(&object);
        kernel.run("main", &input(&packet));
        let out = words(&kernel.out());
        assert!(out[0] <= u64::from(u32::MAX) && out[2] > 0 && out[3] < 4096);
    }
}

/// A program that counts its entries in `out` and calls itself, then another.
#[test]
fn tail_calls_go_on_elsewhere() {
    let mut object = with_out(ProgramKind::Xdp, |a, object, out| {
        let programs = object.maps.push(MapDef {
            name: "programs".to_string(),
            kind: MapKind::Declared {
                map_type: MapType::PROG_ARRAY,
                key_bytes: 4,
                value_bytes: 4,
                max_entries: 4,
                flags: 0,
            },
        });
        a.mov64(Reg::R6, Reg::R1);
        a.load_map_value(Reg::R7, out, 0);
        a.load(Size::Dw, Reg::R8, Reg::R7, 0);
        a.alu64(AluOp::Add, Reg::R8, 1);
        a.store(Size::Dw, Reg::R7, 0, Reg::R8);
        // Empty place, then out of range, then itself until the limit.
        for index in [3, 9, 0] {
            a.mov64(Reg::R1, Reg::R6);
            a.load_map(Reg::R2, programs);
            a.mov32(Reg::R3, index);
            a.call(Helper::TAIL_CALL);
            a.load(Size::Dw, Reg::R8, Reg::R7, 8);
            a.alu64(AluOp::Add, Reg::R8, 1);
            a.store(Size::Dw, Reg::R7, 8, Reg::R8);
        }
        emit_return(a);
    });
    let mut other = Asm::new();
    other.mov32(Reg::R0, 1);
    other.exit();
    let code = other.finish().expect("assembles");
    object.programs.push(Program { name: "other".to_string(), kind: ProgramKind::Xdp, code });

    let packet = packet(80, 1);
    let programs = object.map("programs").expect("named");
    for target in [0, 1] {
        let mut vm = Vm::new(&object).expect("links");
        assert!(vm.set_program(programs, 0, target));
        assert!(!vm.set_program(programs, 4, target));
        let result = vm.run(0, &input(&packet)).expect("runs");
        let out = vm.map("out").expect("named");
        let counted = words(vm.values(out))[..2].to_vec();
        // 33 calls of itself, all from the third place; the last fails there too.
        let expected = if target == 0 { (2, vec![34, 34 * 2 + 1]) } else { (1, vec![1, 2]) };
        assert_eq!((result.return_value, counted.clone()), expected);
        if may_run("tail_calls_go_on_elsewhere in the kernel") {
            let mut kernel = Kernel::load(&object);
            let name = object.programs[target].name.clone();
            let program: &mut Xdp = kernel.ebpf.program_mut(&name).expect("named").try_into().expect("XDP");
            let fd = program.fd().expect("loaded").try_clone().expect("cloned");
            let mut array: ProgramArray<_> =
                kernel.ebpf.map_mut("programs").expect("named").try_into().expect("program array");
            array.set(0, &fd, 0).expect("set");
            assert_eq!(kernel.run("main", &input(&packet)), result);
            assert_eq!(words(&kernel.out())[..2], counted);
        }
    }
}

#[test]
fn loops_run_and_end() {
    let count_to = |limit: i32, step: i32| {
        with_out(ProgramKind::Xdp, |a, _, out| {
            a.mov32(Reg::R0, 100);
            a.mov32(Reg::R1, 11);
            let top = a.label_here();
            a.alu32(AluOp::Add, Reg::R0, step);
            a.loop_jump(Width::W32, Cond::Lt, Reg::R0, limit, top, 10);
            emit_out(a, out, 0, Reg::R0);
            emit_out(a, out, 1, Reg::R1);
            emit_return(a);
        })
    };
    let packet = packet(80, 1);
    assert_eq!(both("loops_run_and_end", &count_to(110, 1), &input(&packet))[..2], [110, 11]);
    let endless = Vm::new(&count_to(110, 0)).expect("links").run(0, &input(&packet));
    let Err(VmError::Fault { what, .. }) = endless else { panic!("{endless:?}") };
    assert!(what.contains("more steps"), "{what}");
}

#[test]
fn what_the_verifier_would_refuse_is_a_fault() {
    let packet = packet(80, 1);
    let fault = |build: &dyn Fn(&mut Asm, &mut Object, Map)| {
        let object = with_out(ProgramKind::Xdp, |a, object, out| build(a, object, out));
        match Vm::new(&object).expect("links").run(0, &input(&packet)) {
            Err(VmError::Fault { what, .. }) => what,
            other => panic!("{other:?}"),
        }
    };
    for off in [60, 57, -1] {
        // The packet's end, its end crossed, its start.
        let what = fault(&|a, _, _| {
            a.load_ctx_pointer(Reg::R2, Reg::R1, 0);
            a.load(Size::W, Reg::R0, Reg::R2, off);
            a.exit();
        });
        assert!(what.contains("out of bounds"), "{what}");
    }
    let stack = fault(&|a, _, _| {
        a.load(Size::Dw, Reg::R0, Reg::FP, -520);
        a.exit();
    });
    assert!(stack.contains("out of bounds"), "{stack}");
    let null = fault(&|a, _, _| {
        a.mov32(Reg::R1, 0);
        a.store(Size::W, Reg::R1, 0, 1);
        a.exit();
    });
    assert!(null.contains("out of bounds"), "{null}");
    let key = fault(&|a, object, _| {
        let counts = object.maps.push(MapDef::percpu_array("counts", 8, 4));
        a.load_map(Reg::R1, counts);
        a.mov64(Reg::R2, Reg::FP);
        a.call(Helper::MAP_LOOKUP_ELEM);
        a.exit();
    });
    assert!(key.contains("does not own"), "{key}");
    let map = fault(&|a, _, _| {
        a.mov64(Reg::R2, Reg::FP);
        a.alu64(AluOp::Add, Reg::R2, -8);
        a.call(Helper::MAP_LOOKUP_ELEM);
        a.exit();
    });
    assert!(map.contains("something else than a map"), "{map}");
}

#[test]
fn what_the_vm_lacks_is_refused() {
    let refused = |build: &dyn Fn(&mut Asm, &mut Object)| {
        Vm::new(&with_out(ProgramKind::Xdp, |a, object, _| build(a, object))).expect_err("refused")
    };
    let helper = refused(&|a, _| {
        a.call(Helper(25));
        a.exit();
    });
    assert!(matches!(&helper, VmError::Refused { at: 0, why, .. } if why.contains("helper#25")), "{helper}");
    let field = refused(&|a, _| {
        a.load_ctx_pointer(Reg::R0, Reg::R1, 12);
        a.exit();
    });
    assert!(matches!(field, VmError::Refused { at: 0, .. }));
    let map = refused(&|a, object| {
        object.maps.push(MapDef {
            name: "trie".to_string(),
            kind: MapKind::Declared {
                map_type: MapType::LPM_TRIE,
                key_bytes: 8,
                value_bytes: 4,
                max_entries: 4096,
                flags: 0,
            },
        });
        a.mov32(Reg::R0, 0);
        a.exit();
    });
    assert_eq!(map, VmError::UnsupportedMap { map: "trie".to_string() });
    let huge = refused(&|a, object| {
        object.maps.push(MapDef::percpu_array("huge", VM_MAP_BYTES_MAX as u32 / 1024, 1025));
        a.mov32(Reg::R0, 0);
        a.exit();
    });
    assert_eq!(huge, VmError::TooLarge { map: "huge".to_string() });
    let long = vec![0; VM_PACKET_BYTES_MAX + 1];
    let mut vm = Vm::new(&sample(&[ProgramKind::Xdp])).expect("links");
    assert_eq!(vm.run(0, &input(&long)), Err(VmError::PacketTooLong(long.len())));
    assert!(vm.run(0, &input(&long[1..])).is_ok());
    assert_eq!(vm.run(1, &input(&[])), Err(VmError::NoProgram(1)));
}

/// Damaged instructions are refused, fault, or run to an end; the VM itself never panics, hangs or leaves its memory.
#[test]
fn damaged_programs_do_no_harm() {
    let (object, packet) = (sample(&FRAME_KINDS), packet(22, 1));
    let mut c = Choices(0x5eed);
    let (mut refused, mut faulted, mut ran) = (0, 0, 0);
    for _ in 0..20_000 {
        let mut object = object.clone();
        let program = c.below(2) as usize;
        for _ in 0..=c.below(3) {
            let slots = &mut object.programs[program].code.slots;
            let at = c.below(slots.len() as u64) as usize;
            slots[at] ^= if c.below(2) == 0 { 1 << c.below(64) } else { c.next() << c.below(48) };
        }
        match Vm::new(&object).map(|mut vm| vm.run(program, &input(&packet))) {
            Err(_) => refused += 1,
            Ok(Err(_)) => faulted += 1,
            Ok(Ok(_)) => ran += 1,
        }
    }
    assert!(refused > 0 && faulted > 0 && ran > 0, "{refused} refused, {faulted} faulted, {ran} ran");
}

/// A reproducible stream of choices.
struct Choices(u64);

impl Choices {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// Numbers near the edges as often as any.
    fn value(&mut self) -> u64 {
        match self.below(4) {
            0 => self.pick(&[0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 32, 1 << 63, u64::MAX]),
            1 => self.below(64),
            2 => self.next() as u32 as u64,
            _ => self.next(),
        }
    }
}

const ALU: [AluOp; 12] = [
    AluOp::Add,
    AluOp::Sub,
    AluOp::Mul,
    AluOp::Div,
    AluOp::Or,
    AluOp::And,
    AluOp::Lsh,
    AluOp::Rsh,
    AluOp::Mod,
    AluOp::Xor,
    AluOp::Mov,
    AluOp::Arsh,
];
const CONDS: [Cond; 11] = [
    Cond::Eq,
    Cond::Gt,
    Cond::Ge,
    Cond::Set,
    Cond::Ne,
    Cond::Sgt,
    Cond::Sge,
    Cond::Lt,
    Cond::Le,
    Cond::Slt,
    Cond::Sle,
];

fn random_insn(c: &mut Choices, widths: &[Width]) -> Insn {
    let reg = |c: &mut Choices| Reg::new(c.below(10) as u8).expect("below 10");
    let (dst, width) = (reg(c), c.pick(widths));
    let size = c.pick(&[Size::B, Size::H, Size::W, Size::Dw]);
    let off = -64 + (c.below(64 / size.bytes() as u64) as usize * size.bytes()) as i16;
    let src = if c.below(2) == 0 { Operand::Reg(reg(c)) } else { Operand::Imm(c.value() as i32) };
    match c.below(10) {
        0..5 => {
            let op = c.pick(&ALU);
            // The verifier wants shift counts within the width and divisors other than 0, where it sees them.
            let src = match (op, src) {
                (AluOp::Lsh | AluOp::Rsh | AluOp::Arsh, Operand::Imm(imm)) => {
                    Operand::Imm(imm & if width == Width::W64 { 63 } else { 31 })
                }
                (AluOp::Div | AluOp::Mod, Operand::Imm(0)) => Operand::Imm(3),
                (_, src) => src,
            };
            Insn::Alu { width, op, dst, src }
        }
        5 => Insn::Neg { width: Width::W32, dst },
        6 => {
            Insn::Endian { order: c.pick(&[ByteOrder::Be, ByteOrder::Le]), bits: c.pick(&[16, 32, 64]), dst }
        }
        7 => Insn::Load { size, dst, base: Reg::FP, off },
        8 => Insn::Store { size, base: Reg::FP, off, src },
        _ => Insn::LoadImm64 { dst, imm: c.value() },
    }
}

/// A program over all instructions that may be emitted: random registers and stack, straight-line code with forward
/// jumps, then all registers and the stack to `out`.
fn random_program(c: &mut Choices, kind: ProgramKind) -> Object {
    with_out(kind, |a, _, out| {
        let registers: Vec<Reg> = (0..10).filter_map(Reg::new).collect();
        for slot in 0..8 {
            a.load_imm64(Reg::R0, c.value());
            a.store(Size::Dw, Reg::FP, -64 + slot * 8, Reg::R0);
        }
        for &reg in &registers {
            a.load_imm64(reg, c.value());
        }
        let mut pending = Vec::new();
        for _ in 0..40 {
            if c.below(4) == 0 {
                let label = a.label();
                let width = c.pick(&[Width::W32, Width::W64]);
                let (dst, cond) = (c.pick(&registers), c.pick(&CONDS));
                let src = if c.below(2) == 0 {
                    Operand::Reg(c.pick(&registers))
                } else {
                    Operand::Imm(c.value() as i32)
                };
                let insn = Insn::Jump { width, cond, dst, src, off: 0 };
                if polc_backend_ebpf::asm::UnsafeInsn::of(&insn).is_none() {
                    a.jump(width, cond, dst, src, label);
                    pending.push((label, c.below(6)));
                }
            }
            pending.retain_mut(|(label, left)| {
                let due = *left == 0;
                if due {
                    a.bind(*label);
                }
                *left = left.saturating_sub(1);
                !due
            });
            let insn = loop {
                let insn = random_insn(c, &[Width::W32, Width::W64]);
                if polc_backend_ebpf::asm::UnsafeInsn::of(&insn).is_none() {
                    break insn;
                }
            };
            a.push(insn);
        }
        pending.into_iter().for_each(|(label, _)| a.bind(label));
        for (index, &reg) in registers.iter().enumerate() {
            a.store(Size::Dw, Reg::FP, -256 + index as i16 * 8, reg);
        }
        a.load_map_value(Reg::R1, out, 0);
        for index in 0..10 {
            a.load(Size::Dw, Reg::R2, Reg::FP, -256 + index * 8);
            a.store(Size::Dw, Reg::R1, index * 8, Reg::R2);
        }
        for index in 0..8 {
            a.load(Size::Dw, Reg::R2, Reg::FP, -64 + index * 8);
            a.store(Size::Dw, Reg::R1, (10 + index) * 8, Reg::R2);
        }
        emit_return(a);
    })
}

#[test]
fn random_programs_agree_with_the_kernel() {
    if !may_run("random_programs_agree_with_the_kernel") {
        return;
    }
    // Raise with POLC_RANDOM_PROGRAMS for a longer run.
    let count: u64 = std::env::var("POLC_RANDOM_PROGRAMS").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    let packet = packet(80, 1);
    for seed in 1..=count {
        let object =
            random_program(&mut Choices(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1), ProgramKind::Xdp);
        let (result, out) = in_vm(&object, &input(&packet));
        let mut kernel = Kernel::load(&object);
        assert_eq!(kernel.run("main", &input(&packet)), result, "program {seed}");
        assert_eq!(words(&kernel.out()), words(&out), "program {seed}: kernel (left) and VM");
    }
}

#[test]
fn connections_are_found_and_given_back() {
    for kind in FRAME_KINDS {
        let mut vm = Vm::new(&looks_up_connections(kind)).expect("links");
        let packet = packet(53, 7);
        let mut run = |connections: &[Connection]| {
            let input = Input { packet: &packet, connections, ..Input::default() };
            vm.run(0, &input).expect("runs").return_value as i32
        };
        let known = Connection { protocol: 17, tuple: TUPLE.to_vec() };
        let reply = Connection { protocol: 17, tuple: vec![192, 0, 2, 2, 192, 0, 2, 1, 0, 53, 3, 232] };
        assert_eq!(run(&[]), actions(kind).drop);
        assert_eq!(run(std::slice::from_ref(&reply)), actions(kind).drop);
        assert_eq!(run(&[reply, known]), actions(kind).pass);
    }
}

#[test]
fn a_connection_that_is_kept_is_a_fault() {
    let mut object = looks_up_connections(ProgramKind::Xdp);
    // The release becomes a plain assignment.
    let release = object.programs[0].code.kernel.pop().expect("released");
    let mut plain = Vec::new();
    Insn::Alu { width: Width::W64, op: AluOp::Mov, dst: Reg::R1, src: Operand::Imm(0) }.encode(&mut plain);
    object.programs[0].code.slots[release.slot as usize] = plain[0];
    let mut vm = Vm::new(&object).expect("links");
    let connections = [Connection { protocol: 17, tuple: TUPLE.to_vec() }];
    let input = Input { packet: &packet(53, 7), connections: &connections, ..Input::default() };
    assert!(matches!(vm.run(0, &input), Err(VmError::Fault { .. })));
}
