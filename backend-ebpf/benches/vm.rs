//! What a packet costs in the check VM: `cargo bench -p polc-backend-ebpf`.

use polc_backend_ebpf::budget::Budget;
use polc_backend_ebpf::object::{Object, ProgramKind};
use polc_backend_ebpf::vm::{Input, Vm};
use polc_tests::programs;

fn main() {
    divan::main();
}

/// The whole sample: 43 instructions with a map lookup.
#[divan::bench]
fn packet(bencher: divan::Bencher<'_, '_>) {
    let mut vm = Vm::new(&programs::sample(&ProgramKind::ALL)).expect("links");
    let packet = programs::packet(80, 1);
    bencher.bench_local(|| vm.run(0, &Input { packet: &packet, ..Input::default() }));
}

/// 8 instructions: what is left is the cost of a run.
#[divan::bench]
fn runt(bencher: divan::Bencher<'_, '_>) {
    let mut vm = Vm::new(&programs::sample(&ProgramKind::ALL)).expect("links");
    bencher.bench_local(|| vm.run(0, &Input { packet: &[0; 14], ..Input::default() }));
}

#[divan::bench]
fn new_vm(bencher: divan::Bencher<'_, '_>) {
    let object = programs::sample(&ProgramKind::ALL);
    bencher.bench_local(|| Vm::new(&object).map(drop));
}

#[divan::bench]
fn write_and_read_object(bencher: divan::Bencher<'_, '_>) {
    let object = programs::sample(&ProgramKind::ALL);
    bencher.bench_local(|| object.write().and_then(|bytes| Object::read(&bytes)).map(drop));
}

#[divan::bench]
fn budget(bencher: divan::Bencher<'_, '_>) {
    let object = programs::sample(&ProgramKind::ALL);
    bencher.bench_local(|| Budget::of(&object.programs[0].code));
}
