//! Programs at netfilter hooks: every level and rbpf agree on every dump, and the kernel, as root, loads the programs and
//! decides packets as they do.

use polc::Compiled;
use polc::place::{devices_of, place};
use polc::runner::{Level, Program, run};
use polc::select::Devices;
use polc::witness::Witnesses;
use polc_backend_ebpf::emit::{COUNTERS_MAP, GENERATOR_FAULT, RuleLine, Target, emit, ending_of};
use polc_backend_ebpf::object::Object;
use polc_ir::env::{Attach, Connections, Device, Env, Input, Mode};
use polc_ir::field::DeviceName;
use polc_ir::hook::{Family, Hook, Semantics};
use polc_ir::packet::network_packet;
use polc_ir::ruleset::Ruleset;
use polc_ir::source::SourceMap;
use polc_ir::state::State;
use polc_loader::load::{Loaded, load};
use polc_loader::sys::{Sys, TestRun};
use polc_tests::corpus;
use polc_tests::kernel::may_run;
use polc_tests::levels::{Levels, target};

/// Longest dump of a short run.
const DUMP_BYTES_MAX: usize = 24 << 10;

/// Packets for each program in userspace, and in the kernel.
const PACKETS: usize = 100;
const KERNEL_PACKETS: usize = 20;

fn devices(ruleset: &Ruleset) -> Devices {
    let mut declared = devices_of(ruleset);
    // Packets of a test run leave by the loopback device, which is number 1.
    for device in &mut declared {
        device.ifindex += 1;
    }
    let lo = DeviceName::new("lo").expect("a name");
    declared.retain(|device| device.name != lo);
    declared.push(Device { ifindex: 1, name: lo });
    declared.sort_by_key(|device| device.ifindex);
    Devices { declared, ..Devices::default() }
}

/// Calls `each` with every dump's hooks and what is compiled for them. The largest dumps take minutes, and are for long
/// runs.
fn every_program(each: &mut dyn FnMut(&str, &Ruleset, &Compiled, &Object)) {
    let long = std::env::var_os("POLC_LONG").is_some();
    for dump in corpus::all().iter().filter(|dump| dump.valid) {
        if !long && dump.text().len() > DUMP_BYTES_MAX {
            continue;
        }
        let ruleset = dump.ruleset(&mut SourceMap::new(), Semantics::Legacy);
        for hook in Hook::ALL {
            let mut place = place(&[hook], Attach::Netfilter, Mode::Accelerate, false);
            if ruleset.path_chains(&place).is_empty() {
                continue;
            }
            place.connections = Connections::State;
            let compiled = polc::compile(&ruleset, &place, &Env::default(), &devices(&ruleset));
            let line = |rule| {
                let data: &polc_ir::ruleset::RuleData = &ruleset.rules[rule];
                Some(RuleLine { file: dump.name.clone(), number: data.number, ..RuleLine::default() })
            };
            let target = Target { rule: &line, trace: true, suspend: true, ..target(Attach::Netfilter) };
            let name = format!("{} {hook}", dump.name);
            match emit(&compiled.plan, &target) {
                Ok(object) => each(&name, &ruleset, &compiled, &object),
                Err(found) => {
                    assert_ne!(found[0].code, GENERATOR_FAULT, "{name}: {found:?}");
                    eprintln!("{name}: {}", found[0].message);
                }
            }
        }
    }
}

/// The kernel's test run: a packet that this host makes, of no device, leaving by the loopback device
/// (net/bpf/test_run.c, `bpf_prog_test_run_nf`).
fn run_in_kernel(sys: &Sys, loaded: &Loaded, family: Family, input: &mut Input) -> Option<i32> {
    input.mark = 0;
    input.packet_type = Some(0);
    input.connection = None;
    input.in_device = None;
    input.out_device = DeviceName::new("lo");
    let packet = network_packet(family, input).ok()?.to_vec();
    let mut context = vec![0; 48];
    context[..2].copy_from_slice(&[3, if family == Family::V4 { 2 } else { 10 }]);
    let test = TestRun { frame: &packet, context: &context, repeat: 1 };
    match sys.test_run(&loaded.program()?.fd, &test) {
        Ok(result) => Some(result.return_value as i32),
        // Shorter than the kernel makes a packet of.
        Err(error) if error.raw_os_error() == Some(22) && packet.len() < 20 => None,
        Err(error) => panic!("test run of {packet:02x?}: {error}"),
    }
}

fn packets(sys: &Sys, loaded: &Loaded, slots: usize) -> Vec<u64> {
    let map = loaded.map(COUNTERS_MAP).expect("counters");
    let bytes = sys.map_read_array(map).expect("an array");
    let packets = |value: &[u8]| -> u64 {
        value.chunks_exact(16).map(|one| u64::from_ne_bytes(one[..8].try_into().expect("8 bytes"))).sum()
    };
    bytes.chunks_exact(map.stride()).take(slots).map(packets).collect()
}

#[test]
fn levels_and_kernel_agree_at_netfilter_hooks() {
    let in_kernel = may_run("levels_and_kernel_agree_at_netfilter_hooks (in the kernel)");
    let sys = Sys::new();
    let mut wrong = Vec::new();
    let (mut programs, mut run, mut run_in_kernel) = (0, 0, 0);
    every_program(&mut |name, ruleset, compiled, object| {
        programs += 1;
        run += levels(name, ruleset, compiled, object, &mut wrong);
        if in_kernel {
            run_in_kernel += kernel(&sys, name, ruleset, compiled, object, &mut wrong);
        }
    });
    eprintln!("{programs} programs, {run} packets in userspace, {run_in_kernel} in the kernel");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong[..wrong.len().min(12)].join("\n"));
}

/// Runs packets through all levels and rbpf; how many.
fn levels(
    name: &str,
    ruleset: &Ruleset,
    compiled: &Compiled,
    object: &Object,
    wrong: &mut Vec<String>,
) -> usize {
    let program = Some(Program::new(&compiled.plan, Attach::Netfilter, object).expect("runs"));
    let mut levels = Levels { ruleset, compiled, env: &Env::default(), program };
    let devices = devices(ruleset);
    for input in Witnesses::new(&compiled.classifier, &devices.declared, 1).take(PACKETS) {
        wrong.extend(levels.agree(&input).err().map(|why| format!("{name} {why}")));
    }
    PACKETS
}

/// Loads a program and runs packets through it; how many.
fn kernel(
    sys: &Sys,
    name: &str,
    ruleset: &Ruleset,
    compiled: &Compiled,
    object: &Object,
    wrong: &mut Vec<String>,
) -> usize {
    let loaded = match load(sys, object) {
        Ok(loaded) => loaded,
        Err(error) => {
            wrong.push(format!("{name}: {error:?}"));
            return 0;
        }
    };
    let slots = compiled.plan.traces.len();
    let mut before = packets(sys, &loaded, slots);
    let mut count = 0;
    for mut input in Witnesses::new(&compiled.classifier, &[], 7).take(KERNEL_PACKETS) {
        let Some(returned) = run_in_kernel(sys, &loaded, ruleset.family, &mut input) else { continue };
        let expected = run(Level::Plan, ruleset, compiled, &Env::default(), &input, &mut State::new(1));
        count += 1;
        let after = packets(sys, &loaded, slots);
        let grown: Vec<u64> = before.iter().zip(&after).map(|(before, after)| after - before).collect();
        before = after;
        match ending_of(&compiled.plan, Attach::Netfilter, &grown, returned) {
            Ok((ending, counted)) if expected.is(ending, &counted) => {}
            other => wrong.push(format!("{name}: {other:?} instead of {expected:?} for {input:02x?}")),
        }
    }
    count
}
