//! Plans built by hand, and programs emitted from them, run in the check VM and in the kernel at once.

use aya::maps::PerCpuArray;
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, Xdp};
use cranelift_entity::PrimaryMap;
use polc_backend_ebpf::emit::{self, COUNTERS_MAP, RuleLine, Target, emit};
use polc_backend_ebpf::object::{Object, ProgramKind};
use polc_backend_ebpf::vm::{Context, Input, Vm};
use polc_ir::entities::{Rule, Stage};
use polc_ir::env::{Attach, Connections, Counting, Fragments, Mode, Place};
use polc_ir::field::Field;
use polc_ir::hook::{Family, Hook, Semantics};
use polc_ir::outcome::{Decider, Ending, FrameKind, Verdict};
use polc_ir::plan::{
    DeviceClasses, KeySlot, LinearEntry, LinearStep, LinearTest, Plan, PlanExit, StepData,
    Target as PlanTarget, Trace, WalkTable, WordTest,
};

/// Frame endings come first in the plans built here; rules' endings start at this slot.
pub const FIRST: u32 = 7;

/// The rule of this number.
pub fn rule(number: u32) -> Rule {
    Rule::from_u32(number)
}

/// A plan with these fields in its key and `rules` endings of rules, which drop and accept in turn.
pub fn plan(family: Family, attach: Attach, fields: &[Field], rules: u32) -> Plan {
    let frame = |verdict, kind| Ending { verdict, by: Decider::Frame(kind) };
    let mut endings = vec![
        frame(Verdict::Accept, FrameKind::Runt),
        frame(Verdict::Accept, FrameKind::NotIp),
        frame(Verdict::Accept, FrameKind::OtherFamily),
        frame(Verdict::Defer, FrameKind::Vlan),
        frame(Verdict::Drop, FrameKind::Malformed),
        frame(Verdict::Defer, FrameKind::UnknownDevice),
        frame(Verdict::Defer, FrameKind::ManyHeaders),
    ];
    assert_eq!(endings.len(), FIRST as usize);
    endings.extend((0..rules).map(|number| Ending {
        verdict: if number % 2 == 0 { Verdict::Drop } else { Verdict::Accept },
        by: Decider::Rule(rule(number)),
    }));
    let mut word = 0;
    let key = fields
        .iter()
        .map(|&field| {
            let words = match field {
                Field::InDevice | Field::OutDevice => 1,
                field => field.bits(family).div_ceil(32),
            };
            let slot = KeySlot { field, word, words, flag: None };
            word += words;
            slot
        })
        .collect();
    Plan {
        family,
        place: Place {
            path: vec![Hook::Prerouting],
            attach: Some(attach),
            mode: Mode::Accelerate,
            fragments: Fragments::AsSeen,
            connections: Connections::Unknown,
            local_addresses: false,
            counters: Counting::Exact,
        },
        key,
        devices: DeviceClasses::default(),
        steps: PrimaryMap::new(),
        tables: PrimaryMap::new(),
        walk: WalkTable::default(),
        root: PlanTarget::Step(polc_ir::entities::Step::from_u32(0)),
        traces: endings.into_iter().map(Trace::from).collect(),
        derived: PrimaryMap::new(),
        sets: PrimaryMap::new(),
        members: Vec::new(),
        set_tables: Default::default(),
        effect_tests: PrimaryMap::new(),
    }
}

/// A test that a word lies in a range.
pub fn range(word: u8, lo: u32, hi: u32) -> WordTest {
    WordTest { word, mask: u32::MAX, lo, hi }
}

/// A test that a word has one value.
pub fn eq(word: u8, value: u32) -> WordTest {
    range(word, value, value)
}

/// A condition that all tests hold.
pub fn all(tests: &[WordTest]) -> LinearTest {
    LinearTest { any: vec![tests.to_vec()] }
}

/// Adds a step of entries: rule `i` ends in slot `FIRST + i`.
pub fn linear(plan: &mut Plan, entries: Vec<Vec<LinearTest>>) {
    let entries = entries
        .into_iter()
        .enumerate()
        .map(|(number, tests)| LinearEntry {
            tests,
            exit: PlanExit::End(FIRST + number as u32),
            rule: Some(rule(number as u32)),
        })
        .collect();
    let step = plan.steps.push(StepData::Linear(LinearStep { stage: Stage::from_u32(0), entries }));
    plan.root = PlanTarget::Step(step);
}

/// The object of a plan.
///
/// # Panics
/// If it is not emitted.
pub fn object(plan: &Plan) -> Object {
    try_object(plan).unwrap_or_else(|diagnostics| panic!("{diagnostics:#?}"))
}

/// With reports of packets.
pub fn traced(plan: &Plan) -> Object {
    object_of(plan, true).unwrap_or_else(|diagnostics| panic!("{diagnostics:#?}"))
}

/// The object of a plan.
///
/// # Errors
/// Why it is not emitted.
pub fn try_object(plan: &Plan) -> Result<Object, Vec<polc_ir::diag::Diagnostic>> {
    object_of(plan, false)
}

fn object_of(plan: &Plan, trace: bool) -> Result<Object, Vec<polc_ir::diag::Diagnostic>> {
    let rules = |rule: Rule| {
        Some(RuleLine {
            file: "rules.v4".into(),
            line: rule.as_u32() + 3,
            text: format!("-A INPUT rule {rule}"),
            table: "filter".into(),
            chain: "INPUT".into(),
            number: rule.as_u32() + 1,
        })
    };
    let target = Target {
        attach: plan.place.attach.unwrap(),
        name: "main".into(),
        rule: &rules,
        chain: &|_| None,
        semantics: Semantics::Legacy,
        trace,
        suspend: false,
    };
    emit(plan, &target)
}

/// One program in the check VM and, as root, in the kernel.
pub struct Pair {
    /// The plan.
    pub plan: Plan,
    vm: Vm,
    kernel: Option<aya::Ebpf>,
    kind: ProgramKind,
    slots: usize,
    /// The mark that the last packet left with.
    pub mark: u32,
}

/// Packets and bytes of one slot.
type Counts = Vec<[u64; 2]>;

impl Pair {
    /// A plan's program in the check VM, and in the kernel where the test may load it.
    ///
    /// # Panics
    /// If either refuses it.
    pub fn new(name: &str, plan: Plan) -> Pair {
        let object = object(&plan);
        let vm = Vm::new(&object).expect("the VM links it");
        let kind = object.programs[0].kind;
        let slots = plan.traces.len();
        let kernel = crate::kernel::may_run(&format!("{name} in the kernel")).then(|| load(&object));
        Pair { plan, vm, kernel, kind, slots, mark: 0 }
    }

    /// Only in the VM, for contexts that the kernel's test run does not give.
    pub fn vm_only(plan: Plan) -> Pair {
        let object = object(&plan);
        let vm = Vm::new(&object).expect("the VM links it");
        Pair { slots: plan.traces.len(), plan, vm, kernel: None, kind: object.programs[0].kind, mark: 0 }
    }

    /// In the VM, with only the first bytes of the frame in the part that can be read directly.
    pub fn run_partly(&mut self, frame: &[u8], linear: usize) -> Ending {
        let before = self.vm_counts();
        let input = Input { packet: frame, linear: Some(linear), ..Input::default() };
        let returned = self.vm.run(0, &input).expect("runs").return_value;
        let packets: Vec<u64> = grown(&before, &self.vm_counts()).iter().map(|slot| slot[0]).collect();
        let attach = self.plan.place.attach.unwrap();
        emit::ending_of(&self.plan, attach, &packets, returned as i32)
            .unwrap_or_else(|error| panic!("{error}"))
            .0
    }

    /// The ending of a frame, on which VM and kernel agree, and the bytes that were counted.
    pub fn run_counted(&mut self, frame: &[u8], context: &Context) -> (Result<Ending, String>, u64) {
        let attach = self.plan.place.attach.unwrap();
        let mut context = context.clone();
        let before = self.vm_counts();
        if self.kind == ProgramKind::Classifier {
            // What the kernel's test run says of a frame on the loopback device.
            let multicast = frame.first().is_some_and(|byte| byte & 1 != 0);
            context.packet_type = match frame.get(..6) {
                Some([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) => 1,
                Some(_) if multicast => 2,
                Some([0, 0, 0, 0, 0, 0]) => 0,
                _ => 3,
            };
        }
        let input = Input { packet: frame, context, ..Input::default() };
        let in_vm = self.vm.run(0, &input).expect("runs");
        let vm_grown = grown(&before, &self.vm_counts());
        // The kernel refuses to test frames of less than an Ethernet header, and tc frames of nothing more or with
        // less than an IP header (net/bpf/test_run.c, `bpf_prog_test_run_skb`).
        let minimum = match (self.kind, frame.get(12..14)) {
            (ProgramKind::Xdp, _) => 14,
            (_, Some([0x08, 0x00])) => 34,
            (_, Some([0x86, 0xdd])) => 54,
            _ => 15,
        };
        if self.kernel.is_some() && frame.len() >= minimum {
            let before = self.kernel_counts();
            let (returned, mark) = self.kernel_run(&input);
            assert_eq!(mark, in_vm.mark, "mark in the kernel (left) and the VM");
            let kernel_grown = grown(&before, &self.kernel_counts());
            let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!((returned, &kernel_grown), (in_vm.return_value, &vm_grown), "kernel and VM on {hex}");
        }
        self.mark = in_vm.mark;
        let packets: Vec<u64> = vm_grown.iter().map(|slot| slot[0]).collect();
        let bytes = vm_grown.iter().map(|slot| slot[1]).sum();
        let ending = emit::ending_of(&self.plan, attach, &packets, in_vm.return_value as i32);
        (ending.map(|(ending, _)| ending), bytes)
    }

    /// What both say of a frame.
    ///
    /// # Panics
    /// If they differ.
    pub fn run(&mut self, frame: &[u8], context: &Context) -> Ending {
        self.run_counted(frame, context).0.unwrap_or_else(|error| panic!("{error}"))
    }

    /// The rule that decided a frame, or the kind of frame it is.
    pub fn decides(&mut self, frame: &[u8]) -> Decider {
        self.run(frame, &Context { ingress_ifindex: 1, ifindex: 1, ..Context::default() }).by
    }

    fn vm_counts(&self) -> Counts {
        let map = self.vm.map(COUNTERS_MAP).expect("counters");
        self.vm.values(map).chunks_exact(16).map(pair).take(self.slots).collect()
    }

    fn kernel_counts(&self) -> Counts {
        let map = self.kernel.as_ref().unwrap().map(COUNTERS_MAP).expect("counters");
        let map = PerCpuArray::<_, [u8; 16]>::try_from(map).expect("a per-CPU array");
        (0..self.slots as u32)
            .map(|slot| {
                let values = map.get(&slot, 0).expect("a slot");
                values.iter().map(|value| pair(&value[..])).fold([0, 0], |a, b| [a[0] + b[0], a[1] + b[1]])
            })
            .collect()
    }

    fn kernel_run(&mut self, input: &Input<'_>) -> (u32, u32) {
        let context = &input.context;
        let mut given = match self.kind {
            ProgramKind::Xdp => vec![0; 24],
            ProgramKind::Classifier => vec![0; 192],
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        };
        let mut put = |at: usize, value: u32| given[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        match self.kind {
            ProgramKind::Xdp => {
                put(4, input.packet.len() as u32);
                put(12, context.ingress_ifindex);
            }
            ProgramKind::Classifier => {
                put(8, context.mark);
                put(36, context.ingress_ifindex);
                put(40, context.ifindex);
            }
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        }
        let mut options = TestRunOptions::new();
        options.data_in = Some(input.packet);
        options.ctx_in = Some(&given);
        let mut got = if self.kind == ProgramKind::Xdp { vec![] } else { vec![0; 192] };
        if !got.is_empty() {
            options.ctx_out = Some(&mut got);
        }
        let program = self.kernel.as_mut().unwrap().program_mut("main").expect("named");
        let result = match self.kind {
            ProgramKind::Xdp => <&mut Xdp>::try_from(program).expect("XDP").test_run(options),
            ProgramKind::Classifier => {
                <&mut SchedClassifier>::try_from(program).expect("tc").test_run(options)
            }
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        };
        match result {
            Ok(result) => {
                let mark = got.get(8..12).map(|mark| u32::from_ne_bytes(mark.try_into().expect("4 bytes")));
                (result.return_value, mark.unwrap_or(context.mark))
            }
            Err(error) => panic!("test run of {:02x?}: {error}", input.packet),
        }
    }

    /// What the verifier processed, if the program is in the kernel.
    pub fn verified(&mut self) -> Option<u32> {
        let program = self.kernel.as_mut()?.program_mut("main").expect("named");
        program.info().expect("info").verified_instruction_count()
    }
}

fn pair(bytes: &[u8]) -> [u64; 2] {
    [0, 8].map(|at| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes")))
}

fn grown(before: &Counts, after: &Counts) -> Counts {
    before.iter().zip(after).map(|(b, a)| [a[0] - b[0], a[1] - b[1]]).collect()
}

/// How often a program is loaded again.
const LOAD_TRIES: usize = 3;

/// An object in the kernel.
///
/// # Panics
/// If it is refused.
pub fn load(object: &Object) -> aya::Ebpf {
    let bytes = object.write().expect("writes");
    let mut ebpf = aya::EbpfLoader::new().load(&bytes).expect("aya loads it");
    for program in &object.programs {
        let loaded = ebpf.program_mut(&program.name).expect("named");
        let mut load = || match program.kind {
            ProgramKind::Xdp => <&mut Xdp>::try_from(&mut *loaded).expect("XDP").load(),
            ProgramKind::Classifier => <&mut SchedClassifier>::try_from(&mut *loaded).expect("tc").load(),
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        };
        // The verifier gives up when a signal comes (EAGAIN), as at the end of another test's child; then aya asks for
        // its log, which has no room for what it says of a program that it takes.
        let result = (0..LOAD_TRIES).fold(load(), |result, _| result.or_else(|_| load()));
        result.unwrap_or_else(|error| {
            let text = format!("{error:?}").replace("\\n", "\n");
            let tail = text.len().saturating_sub(6000);
            panic!("the verifier: {}", &text[text.ceil_char_boundary(tail)..])
        });
    }
    ebpf
}
