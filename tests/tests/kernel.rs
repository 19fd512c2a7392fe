//! The kernel accepts the program of every dump, and decides packets as the plan does.
//!
//! Programs are loaded and run on test packets (`BPF_PROG_TEST_RUN`), attached nowhere. Without root the test says that
//! it is skipped.

use aya::maps::PerCpuArray;
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, Xdp};
use polc::place::{attach_for, devices_of, place};
use polc::runner::{Level, run};
use polc::select::Devices;
use polc::witness::Witnesses;
use polc_backend_ebpf::budget::Budget;
use polc_backend_ebpf::emit::{COUNTERS_MAP, GENERATOR_FAULT, RuleLine, Target, emit, ending_of};
use polc_backend_ebpf::object::{Object, ProgramKind};
use polc_ir::env::{Attach, Connections, Env, Input, Mode};
use polc_ir::hook::{Hook, Semantics};
use polc_ir::source::SourceMap;
use polc_ir::state::State;
use polc_tests::corpus;
use polc_tests::generate::{Case, case_of};
use polc_tests::kernel::{self, loopback_type, may_run};
use polc_tests::levels::target;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

/// Packets for each program.
const PACKETS: usize = 40;

struct Loaded {
    ebpf: aya::Ebpf,
    kind: ProgramKind,
    verified: u32,
}

fn load(object: &Object) -> Result<Loaded, String> {
    let bytes = object.write().map_err(|error| error.to_string())?;
    let mut ebpf = aya::EbpfLoader::new().load(&bytes).map_err(|error| error.to_string())?;
    let kind = object.programs[0].kind;
    let program = ebpf.program_mut("polc").expect("named");
    let loaded = kernel::load(|| match kind {
        ProgramKind::Xdp => <&mut Xdp>::try_from(&mut *program).expect("XDP").load(),
        ProgramKind::Classifier => <&mut SchedClassifier>::try_from(&mut *program).expect("tc").load(),
        ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
    });
    loaded.map_err(|error| {
        let text = format!("{error:?}");
        let from = text.ceil_char_boundary(text.len().saturating_sub(600));
        text[from..].to_string()
    })?;
    let verified = program.info().ok().and_then(|info| info.verified_instruction_count()).unwrap_or(0);
    Ok(Loaded { ebpf, kind, verified })
}

impl Loaded {
    /// The return code; `None` for packets that the kernel does not test tc programs with.
    fn run(&mut self, input: &Input) -> Option<i32> {
        if input.frame.len() < 14 || input.vlan.is_some() {
            return None;
        }
        let mut context = match self.kind {
            ProgramKind::Xdp => vec![0; 24],
            ProgramKind::Classifier => vec![0; 192],
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        };
        match self.kind {
            ProgramKind::Xdp => context[4..8].copy_from_slice(&(input.frame.len() as u32).to_ne_bytes()),
            ProgramKind::Classifier => context[8..12].copy_from_slice(&input.mark.to_ne_bytes()),
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        }
        let mut options = TestRunOptions::new();
        options.data_in = Some(&input.frame);
        options.ctx_in = Some(&context);
        let program = self.ebpf.program_mut("polc").expect("named");
        let result = match self.kind {
            ProgramKind::Xdp => <&mut Xdp>::try_from(program).expect("XDP").test_run(options),
            ProgramKind::Classifier => {
                <&mut SchedClassifier>::try_from(program).expect("tc").test_run(options)
            }
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        };
        result.ok().map(|result| result.return_value as i32)
    }

    fn packets(&self, slots: usize) -> Vec<u64> {
        let map = self.ebpf.map(COUNTERS_MAP).expect("counters");
        let map = PerCpuArray::<_, [u64; 2]>::try_from(map).expect("a per-CPU array");
        (0..slots as u32)
            .map(|slot| map.get(&slot, 0).expect("a slot").iter().map(|value| value[0]).sum())
            .collect()
    }
}

/// Random rule sets that are loaded.
const RULE_SETS: u32 = 100;

/// How many times more instructions the verifier may process than computed. Most it takes for small programs, of which the
/// headers behind VLAN tags, followed apart for each number of them, are the larger part.
const ESTIMATE_FACTOR_MAX: f64 = 2.0;

/// Whether the verifier processed about as much as computed.
fn as_computed(object: &Object, loaded: &Loaded) -> Result<(), String> {
    let computed = Budget::of(&object.programs[0].code).expect("decodes").processed;
    let verified = loaded.verified;
    match f64::from(verified) > ESTIMATE_FACTOR_MAX * computed as f64 {
        true => Err(format!("{verified} processed, {computed} computed")),
        false => Ok(()),
    }
}

/// Rules of one dump seldom ask for many things that are searched for, one after the other, where states that the
/// verifier tells apart would multiply.
#[test]
fn the_verifier_processes_what_is_computed_for_random_rule_sets() {
    if !may_run("the_verifier_processes_what_is_computed_for_random_rule_sets") {
        return;
    }
    let config =
        Config { cases: RULE_SETS, failure_persistence: None, max_shrink_iters: 100, ..Config::default() };
    // Equal runs make equal rule sets.
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let result = runner.run(&case_of(0..20), |case| {
        let fail = |error: String| TestCaseError::fail(format!("{error}\n{}", case.dump()));
        // aya knows no kernel functions, by which connections are looked up.
        let built = Case { connections: Connections::Unknown, ..case.clone() }.build().map_err(fail)?;
        // The bounds that are computed may be passed; then the kernel isn't asked.
        let Ok(object) = built.object else { return Ok(()) };
        let loaded = load(&object).map_err(fail)?;
        as_computed(&object, &loaded).map_err(fail)
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
}

#[test]
fn the_kernel_runs_every_dump() {
    if !may_run("the_kernel_runs_every_dump") {
        return;
    }
    let mut wrong = Vec::new();
    let (mut programs, mut packets, mut most) = (0, 0, (0, String::new()));
    for dump in corpus::all().iter().filter(|dump| dump.valid) {
        let mut sources = SourceMap::new();
        let ruleset = dump.ruleset(&mut sources, Semantics::Legacy);
        let line = |rule| {
            let data: &polc_ir::ruleset::RuleData = &ruleset.rules[rule];
            let number = sources.line_column(data.span).line;
            Some(RuleLine {
                file: dump.name.clone(),
                line: number,
                text: sources.file(data.span.file).line_text(number).to_string(),
                number: data.number,
                ..RuleLine::default()
            })
        };
        for hook in Hook::ALL {
            let attach = attach_for(hook);
            let place = place(&[hook], attach, Mode::Accelerate, false);
            if ruleset.path_chains(&place).is_empty() {
                continue;
            }
            let env = Env::default();
            let devices = Devices { declared: devices_of(&ruleset), ..Devices::default() };
            let compiled = polc::compile(&ruleset, &place, &env, &devices);
            let target = Target { rule: &line, ..target(attach) };
            let name = format!("{} {hook}", dump.name);
            let object = match emit(&compiled.plan, &target) {
                Ok(object) => object,
                Err(found) => {
                    assert_ne!(found[0].code, GENERATOR_FAULT, "{name}: {found:?}");
                    continue;
                }
            };
            let mut loaded = match load(&object) {
                Ok(loaded) => loaded,
                Err(error) => {
                    wrong.push(format!("{name}: {error}"));
                    continue;
                }
            };
            if let Err(error) = as_computed(&object, &loaded) {
                wrong.push(format!("{name}: {error}"));
            }
            programs += 1;
            most = most.max((loaded.verified, name.clone()));
            let slots = compiled.plan.traces.len();
            let mut before = loaded.packets(slots);
            for mut input in Witnesses::new(&compiled.classifier, &[], 7).take(PACKETS) {
                // Test packets are on the loopback device, number 1, and their type follows from its address.
                let here =
                    devices.declared.iter().find(|device| device.ifindex == 1).map(|device| device.name);
                (input.in_device, input.out_device) =
                    if attach == Attach::TcEgress { (None, here) } else { (here, None) };
                input.packet_type = (attach != Attach::Xdp).then(|| loopback_type(&input.frame));
                let expected = run(Level::Plan, &ruleset, &compiled, &env, &input, &mut State::new(1));
                let Some(returned) = loaded.run(&input) else { continue };
                packets += 1;
                let after = loaded.packets(slots);
                let grown: Vec<u64> =
                    before.iter().zip(&after).map(|(before, after)| after - before).collect();
                before = after;
                match ending_of(&compiled.plan, attach, &grown, returned) {
                    Ok((ending, counted)) if expected.is(ending, &counted) => {}
                    other => {
                        wrong.push(format!("{name}: {other:?} instead of {expected:?} for {:02x?}", input))
                    }
                }
            }
        }
    }
    eprintln!("{programs} programs, {packets} packets; most processed: {} by {}", most.0, most.1);
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
}
