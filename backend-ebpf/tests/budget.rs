//! The cost model against the verifier itself.

use aya::programs::Xdp;
use polc_backend_ebpf::asm::{Asm, Code, PROGRAM_TOO_LONG};
use polc_backend_ebpf::budget::{Budget, STACK_TOO_LARGE, TOO_COMPLEX, TOO_MANY_PENDING};
use polc_backend_ebpf::insn::{AluOp, Cond, Helper, Reg, Size, Width};
use polc_backend_ebpf::manifest::Manifest;
use polc_backend_ebpf::object::{DataSection, MapDef, Object, Program, ProgramKind};
use polc_ir::entities::Map;
use polc_ir::limits::{
    PROGRAM_INSNS_MAX, STACK_BYTES_MAX, VERIFIER_PENDING_JUMPS_MAX, VERIFIER_PROCESSED_MAX,
};
use polc_tests::kernel::may_run;
use polc_tests::programs::map;

/// The first word of a key of which the verifier forgets what it knows, as in every program.
const FORGOTTEN: i16 = -4;
/// Of one that it follows.
const FOLLOWED: i16 = -8;

/// Copies 12 words of the packet to the stack, as every program does before it decides. Ends with `r6` the context.
fn emit_key(a: &mut Asm, first: i16) {
    let short = a.label();
    let parsed = a.label();
    a.mov64(Reg::R6, Reg::R1);
    a.load_ctx_pointer(Reg::R2, Reg::R1, 0);
    a.load_ctx_pointer(Reg::R3, Reg::R1, 4);
    a.mov64(Reg::R4, Reg::R2);
    a.alu64(AluOp::Add, Reg::R4, 60);
    a.jump64(Cond::Gt, Reg::R4, Reg::R3, short);
    for word in 0..12 {
        a.load(Size::W, Reg::R0, Reg::R2, word * 4);
        a.store(Size::W, Reg::FP, first - word * 8, Reg::R0);
    }
    a.goto(parsed);
    a.bind(short);
    a.mov32(Reg::R0, 2);
    a.exit();
    a.bind(parsed);
}

fn word(index: usize) -> i16 {
    FORGOTTEN - 8 * (index % 12) as i16
}

fn emit_verdict(a: &mut Asm, value: i32) {
    a.mov32(Reg::R0, value);
    a.exit();
}

/// Rules of `fields` comparisons each, with the key reloaded from the stack for each, as code.
fn linear(rules: usize, fields: usize) -> Asm {
    let mut a = Asm::new();
    emit_key(&mut a, FORGOTTEN);
    emit_rules(&mut a, FORGOTTEN, rules, fields);
    a
}

fn emit_rules(a: &mut Asm, first: i16, rules: usize, fields: usize) {
    let (drop, count) = (a.label(), a.label());
    for rule in 0..rules {
        let next = a.label();
        for field in 0..fields {
            a.load(Size::W, Reg::R1, Reg::FP, first + word(field) - FORGOTTEN);
            a.jump32(Cond::Ne, Reg::R1, (rule * 7 + field) as i32, next);
        }
        a.mov32(Reg::R7, rule as i32);
        a.goto(if rule % 2 == 0 { drop } else { count });
        a.bind(next);
    }
    emit_verdict(a, 2);
    a.bind(drop);
    emit_verdict(a, 1);
    a.bind(count);
    emit_verdict(a, 2);
}

/// Ranges: two comparisons a field after one load.
fn ranges(rules: usize) -> Asm {
    let mut a = Asm::new();
    emit_key(&mut a, FORGOTTEN);
    let drop = a.label();
    for rule in 0..rules {
        let next = a.label();
        for field in 0..2 {
            a.load(Size::W, Reg::R1, Reg::FP, word(field));
            a.alu32(AluOp::And, Reg::R1, 0xffff);
            a.alu32(AluOp::Sub, Reg::R1, rule as i32 * 3);
            a.jump32(Cond::Gt, Reg::R1, 10, next);
        }
        a.goto(drop);
        a.bind(next);
    }
    emit_verdict(&mut a, 2);
    a.bind(drop);
    emit_verdict(&mut a, 1);
    a
}

/// One comparison a rule, the taken branch being the hit.
fn chain(rules: usize) -> Asm {
    let mut a = Asm::new();
    emit_key(&mut a, FORGOTTEN);
    let drop = a.label();
    for rule in 0..rules {
        a.load(Size::W, Reg::R1, Reg::FP, word(rule));
        a.jump32(Cond::Eq, Reg::R1, rule as i32, drop);
    }
    emit_verdict(&mut a, 2);
    a.bind(drop);
    emit_verdict(&mut a, 1);
    a
}

/// Differences collected without branches, one jump a rule.
fn branch_free(rules: usize) -> Asm {
    let mut a = Asm::new();
    emit_key(&mut a, FORGOTTEN);
    let drop = a.label();
    for rule in 0..rules {
        a.mov32(Reg::R2, 0);
        for field in 0..4 {
            a.load(Size::W, Reg::R1, Reg::FP, word(field));
            a.alu32(AluOp::Xor, Reg::R1, (rule + field) as i32);
            a.alu32(AluOp::Or, Reg::R2, Reg::R1);
        }
        a.jump32(Cond::Eq, Reg::R2, 0, drop);
    }
    emit_verdict(&mut a, 2);
    a.bind(drop);
    emit_verdict(&mut a, 1);
    a
}

/// A diagram of `levels` by `width` nodes, each testing a reloaded field and going to two nodes of the next level.
fn diagram(levels: usize, width: usize) -> Asm {
    let mut a = Asm::new();
    emit_key(&mut a, FORGOTTEN);
    let labels: Vec<Vec<_>> = (0..levels).map(|_| (0..width).map(|_| a.label()).collect()).collect();
    let (drop, pass) = (a.label(), a.label());
    // Every node of the first level is reached.
    for (node, label) in labels[0].iter().enumerate().skip(1) {
        a.load(Size::W, Reg::R1, Reg::FP, word(0));
        a.jump32(Cond::Eq, Reg::R1, node as i32, *label);
    }
    a.goto(labels[0][0]);
    for (level, row) in labels.iter().enumerate() {
        for (node, label) in row.iter().enumerate() {
            a.bind(*label);
            a.load(Size::W, Reg::R1, Reg::FP, word(level));
            match labels.get(level + 1) {
                Some(next) => {
                    a.jump32(Cond::Gt, Reg::R1, (node * 100) as i32, next[(node * 7 + 3) % width]);
                    a.goto(next[node]);
                }
                None => {
                    a.jump32(Cond::Gt, Reg::R1, node as i32, drop);
                    a.goto(pass);
                }
            }
        }
    }
    a.bind(pass);
    emit_verdict(&mut a, 2);
    a.bind(drop);
    emit_verdict(&mut a, 1);
    a
}

/// A bounded walk over a table of nodes in a data section: which word of the key, what to compare it with, where to
/// go on.
fn walk(table: Map, counts: Map, nodes: u32, trips: u32) -> Asm {
    let mut a = Asm::new();
    emit_key(&mut a, FORGOTTEN);
    a.mov32(Reg::R7, 0);
    a.mov32(Reg::R8, 0);
    let done = a.label();
    let top = a.label_here();
    a.alu32(AluOp::And, Reg::R7, nodes as i32 - 1);
    a.mov64(Reg::R1, Reg::R7);
    a.alu64(AluOp::Lsh, Reg::R1, 4);
    a.load_map_value(Reg::R2, table, 0);
    a.alu64(AluOp::Add, Reg::R2, Reg::R1);
    a.load(Size::B, Reg::R3, Reg::R2, 0);
    a.alu64(AluOp::And, Reg::R3, 7);
    a.alu64(AluOp::Lsh, Reg::R3, 2);
    a.mov64(Reg::R4, Reg::FP);
    a.alu64(AluOp::Add, Reg::R4, -32);
    a.alu64(AluOp::Add, Reg::R4, Reg::R3);
    a.load(Size::W, Reg::R5, Reg::R4, 0);
    a.load(Size::W, Reg::R3, Reg::R2, 4);
    let smaller = a.label();
    a.load(Size::W, Reg::R7, Reg::R2, 8);
    a.jump32(Cond::Lt, Reg::R5, Reg::R3, smaller);
    a.load(Size::W, Reg::R7, Reg::R2, 12);
    a.bind(smaller);
    a.jump32(Cond::Set, Reg::R7, 0x1000_0000, done);
    a.alu32(AluOp::Add, Reg::R8, 1);
    a.loop_jump(Width::W32, Cond::Lt, Reg::R8, trips as i32, top, trips);
    a.bind(done);
    a.alu32(AluOp::And, Reg::R7, 0xff);
    a.store(Size::W, Reg::FP, -52, Reg::R7);
    a.load_map(Reg::R1, counts);
    a.mov64(Reg::R2, Reg::FP);
    a.alu64(AluOp::Add, Reg::R2, -52);
    a.call(Helper::MAP_LOOKUP_ELEM);
    let missing = a.label();
    a.jump64(Cond::Eq, Reg::R0, 0, missing);
    a.load(Size::Dw, Reg::R1, Reg::R0, 0);
    a.alu64(AluOp::Add, Reg::R1, 1);
    a.store(Size::Dw, Reg::R0, 0, Reg::R1);
    a.bind(missing);
    emit_verdict(&mut a, 2);
    a
}

fn object(code: Code) -> Object {
    let mut object = Object::new(Manifest::default());
    object.maps.push(MapDef::data("table", DataSection::Data, vec![0; 16 * 1024]));
    object.maps.push(MapDef::percpu_array("counts", 8, 256));
    object.programs.push(Program { name: "main".to_string(), kind: ProgramKind::Xdp, code });
    object
}

/// What the verifier processed, or its complaint.
fn verified(code: Code) -> Result<u64, String> {
    let bytes = object(code).write().expect("writes");
    let mut ebpf = aya::EbpfLoader::new()
        .verifier_log_level(aya::VerifierLogLevel::STATS)
        .load(&bytes)
        .expect("aya makes the maps");
    let program: &mut Xdp = ebpf.program_mut("main").expect("named").try_into().expect("XDP");
    program.load().map_err(|error| format!("{error:?}"))?;
    let info = program.info().expect("info");
    Ok(info.verified_instruction_count().expect("since Linux 5.16").into())
}

#[test]
fn estimates_bound_what_the_verifier_does() {
    if !may_run("estimates_bound_what_the_verifier_does") {
        return;
    }
    let (table, counts) = (map(0), map(1));
    let shapes: [(&str, Asm); 20] = [
        ("linear 2x1", linear(2, 1)),
        ("linear 10x1", linear(10, 1)),
        ("linear 1000x1", linear(1000, 1)),
        ("linear 10x3", linear(10, 3)),
        ("linear 1000x3", linear(1000, 3)),
        ("linear 300x5", linear(300, 5)),
        ("ranges 10", ranges(10)),
        ("ranges 1000", ranges(1000)),
        ("chain 10", chain(10)),
        ("chain 1000", chain(1000)),
        ("chain 8000", chain(8000)),
        ("branch-free 10", branch_free(10)),
        ("branch-free 1000", branch_free(1000)),
        ("diagram 4x4", diagram(4, 4)),
        ("diagram 12x10", diagram(12, 10)),
        ("diagram 12x600", diagram(12, 600)),
        ("diagram 60x100", diagram(60, 100)),
        ("walk 8", walk(table, counts, 1024, 8)),
        ("walk 32", walk(table, counts, 1024, 32)),
        ("walk 100", walk(table, counts, 1024, 100)),
    ];
    for (name, asm) in shapes {
        let code = asm.finish().expect("assembles");
        let budget = Budget::of(&code).expect("decodes");
        assert_eq!(budget.enforce(), Ok(()), "{name}");
        let real = verified(code).unwrap_or_else(|error| panic!("{name}: {error}"));
        eprintln!("{name}: {budget}; the verifier processed {real}");
        let computed = budget.processed as u64;
        assert!(real <= computed && computed <= 2 * real, "{name}: computed {computed}, really {real}");
        if !name.starts_with("walk") {
            assert_eq!(computed, real, "{name}: exact without loops");
        }
    }
}

#[test]
fn limits_are_where_the_verifier_has_them() {
    let fits = |rules| Budget::of(&chain(rules).finish().expect("assembles")).expect("decodes").enforce();
    assert_eq!(fits(8191), Ok(()));
    let over = fits(8192).expect_err("one pending jump too many");
    assert_eq!((over.code, over.needed), (TOO_MANY_PENDING, 8193));

    let deep = |bytes: i16| {
        let mut a = Asm::new();
        a.mov32(Reg::R0, 2);
        a.store(Size::B, Reg::FP, -bytes, Reg::R0);
        a.exit();
        a.finish().expect("assembles")
    };
    let stack = |bytes| Budget::of(&deep(bytes)).expect("decodes").enforce();
    assert_eq!(stack(512), Ok(()));
    assert_eq!(stack(513).map_err(|over| over.code), Err(STACK_TOO_LARGE));

    let mut long = Asm::new();
    long.mov32(Reg::R0, 0);
    let top = long.label_here();
    long.alu32(AluOp::Add, Reg::R0, 1);
    long.loop_jump(Width::W32, Cond::Lt, Reg::R0, 1 << 20, top, 1 << 20);
    long.exit();
    let long = long.finish().expect("assembles");
    let over = Budget::of(&long).expect("decodes").enforce().expect_err("too complex");
    assert_eq!(over.code, TOO_COMPLEX);
    assert!(over.to_string().contains("1000000"));

    if may_run("limits_are_where_the_verifier_has_them in the kernel") {
        assert!(verified(chain(8191).finish().expect("assembles")).is_ok());
        let said = verified(chain(8192).finish().expect("assembles")).expect_err("refused");
        assert!(said.contains("sequence of 8193 jumps is too complex"), "{said}");
        assert!(verified(deep(512)).is_ok());
        assert!(verified(deep(513)).is_err());
        assert!(verified(long).expect_err("refused").contains("BPF program is too large"));
    }
}

/// Classes of `fields` numbers, each from the numbers' order to one bound: straight code without a branch.
fn classes(fields: usize, masked: bool) -> Code {
    let mut a = Asm::new();
    emit_key(&mut a, FORGOTTEN);
    a.mov32(Reg::R7, 0);
    for field in 0..fields {
        a.load(Size::W, Reg::R1, Reg::FP, word(field));
        a.alu64(AluOp::Sub, Reg::R1, 6);
        if masked {
            a.alu64(AluOp::Arsh, Reg::R1, 63);
            a.alu64(AluOp::And, Reg::R1, 1);
        } else {
            a.alu64(AluOp::Rsh, Reg::R1, 63);
        }
        a.alu64(AluOp::Add, Reg::R7, Reg::R1);
    }
    emit_verdict(&mut a, 2);
    a.finish().expect("assembles")
}

/// Masking what is known to be 0 or -1 costs the verifier a path each time, and the budget says so.
#[test]
fn masked_signs_cost_dearly() {
    let computed = |masked| Budget::of(&classes(10, masked)).expect("decodes").processed as u64;
    assert!(computed(true) > 100 * computed(false));
    if may_run("masked_signs_cost_dearly") {
        assert_eq!(verified(classes(10, false)), Ok(computed(false)));
        // Kernels that do not branch there process as little as without masks.
        let (real, most) = (verified(classes(10, true)).expect("accepted"), computed(true));
        assert!(real <= most && most <= 2 * real || real <= 2 * computed(false), "{real} against {most}");
    }
}

/// Why words are where the verifier forgets them: at multiples of eight, comparisons are remembered in the stack too.
#[test]
fn spilled_words_cost_dearly() {
    let build = |first| {
        let mut a = Asm::new();
        emit_key(&mut a, first);
        emit_rules(&mut a, first, 100, 3);
        a.finish().expect("assembles")
    };
    let (forgotten, followed) = (build(FORGOTTEN), build(FOLLOWED));
    let computed = Budget::of(&forgotten).expect("decodes").processed as u64;
    if may_run("spilled_words_cost_dearly") {
        assert_eq!(verified(forgotten), Ok(computed));
        let followed = verified(followed).expect("accepted");
        assert!(followed > 5 * computed, "{followed} against {computed}");
    }
}

#[test]
fn budgets_are_enforced_at_their_edges() {
    let largest = Budget {
        insns: PROGRAM_INSNS_MAX,
        processed: VERIFIER_PROCESSED_MAX,
        pending_jumps: VERIFIER_PENDING_JUMPS_MAX,
        stack_bytes: STACK_BYTES_MAX,
    };
    assert_eq!(largest.enforce(), Ok(()));
    let code = |budget: Budget| budget.enforce().expect_err("it is over the edge").code;
    assert_eq!(code(Budget { insns: PROGRAM_INSNS_MAX + 1, ..largest }), PROGRAM_TOO_LONG);
    assert_eq!(code(Budget { processed: VERIFIER_PROCESSED_MAX + 1, ..largest }), TOO_COMPLEX);
    assert_eq!(code(Budget { pending_jumps: VERIFIER_PENDING_JUMPS_MAX + 1, ..largest }), TOO_MANY_PENDING);
    assert_eq!(code(Budget { stack_bytes: STACK_BYTES_MAX + 1, ..largest }), STACK_TOO_LARGE);
}
