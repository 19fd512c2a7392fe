//! What the switch of reports costs while it is off: `cargo bench -p polc-backend-ebpf --bench trace`, as root.
//!
//! The same rules with reports and without are test-run by the kernel in turns, so that whatever else the machine does
//! meets both alike; of each the best of many runs counts.

use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use polc_ir::env::Attach;
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_tests::programs;
use polc_tests::programs::plans::{all, eq, linear, load, object, plan, traced};

/// Runs of one program at a time.
const REPEAT: u32 = 200_000;
/// How often each program has its turn.
const TURNS: usize = 100;

fn main() {
    if !polc_tests::kernel::may_run("the cost of tracing that is off") {
        return;
    }
    // At tc: an XDP program that is not attached makes every call wait for its dispatcher.
    let mut plan = plan(Family::V4, Attach::TcIngress, &[Field::Proto, Field::DstPort], 3);
    linear(&mut plan, vec![vec![all(&[eq(0, 6), eq(1, 22)])], vec![all(&[eq(0, 17)])], vec![]]);
    let mut programs = [object(&plan), traced(&plan)].map(|object| load(&object));
    let mut best = [Duration::MAX; 2];
    for _ in 0..TURNS {
        for (program, best) in programs.iter_mut().zip(&mut best) {
            *best = (*best).min(run(program));
        }
    }
    let [without, with] = best.map(|time| time.as_nanos() as f64 / f64::from(REPEAT));
    eprintln!(
        "without reports {without:.2} ns, reports off {with:.2} ns: {:+.2} ns a packet",
        with - without
    );
}

/// How long all runs take. What the kernel says of it is rounded to whole nanoseconds a run.
fn run(program: &mut aya::Ebpf) -> Duration {
    let frame = programs::packet(80, 1);
    let mut options = TestRunOptions::new();
    options.data_in = Some(&frame);
    options.repeat = REPEAT;
    let program: &mut SchedClassifier = program.program_mut("main").expect("named").try_into().expect("tc");
    let started = Instant::now();
    program.test_run(options).expect("a test run");
    started.elapsed()
}
