//! What is read back from a program in the running kernel: reports, counters, code. Without root the tests say that they
//! are skipped.

use polc::build::{Extras, object_with};
use polc::place::place;
use polc::select::Devices;
use polc::session::{ReadOptions, Session};
use polc_backend_ebpf::emit::COUNTERS_MAP;
use polc_backend_ebpf::object::Object;
use polc_backend_ebpf::trace::{Config, EventTransport, Pattern, Tally};
use polc_ir::env::{Attach, Env, Mode};
use polc_ir::hook::Hook;
use polc_ir::source::SourceMap;
use polc_loader::carry;
use polc_loader::counters::{self, Counter};
use polc_loader::events::{self, Ends, TraceMaps, Watch};
use polc_loader::jited;
use polc_loader::load::{Loaded, load};
use polc_loader::sys::{Sys, TestRun};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

const RULES: &str = "\
*filter
:INPUT ACCEPT [0:0]
:LOG-IT - [0:0]
-A INPUT -p tcp -m tcp --dport 22 -j LOG-IT
-A INPUT -s 192.0.2.0/24 -p tcp -m tcp --dport 22 -j DROP
-A INPUT -p udp -m udp --dport 53 -j DROP
-A LOG-IT
COMMIT
";

/// Loads the rules as a tc program, or says that `name` is skipped.
fn loaded(name: &str, sys: &Sys, trace: bool) -> Option<(Object, Loaded)> {
    if !sys.missing_capabilities().is_empty() {
        eprintln!("skipped {name}: needs root");
        return None;
    }
    let mut sources = SourceMap::new();
    let file = sources.add("rules.v4", RULES);
    let session = Session::read(sources, file, &[], &ReadOptions::default());
    assert!(!session.has_errors(), "{:?}", session.diagnostics);
    let place = place(&[Hook::Prerouting, Hook::Input], Attach::TcIngress, Mode::Replace, false);
    let compiled = polc::compile(&session.ruleset, &place, &Env::default(), &Devices::default());
    let (object, _) =
        object_with(&session, &compiled, Extras { trace, ..Extras::default() }).expect("emitted");
    let loaded = load(sys, &object).expect("loaded");
    Some((object, loaded))
}

/// A frame with a transport header of nothing but ports.
fn frame(proto: u8, source: [u8; 4], port: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0, 40, 0, 1, 0, 0, 64, proto, 0, 0]);
    frame.extend(source);
    frame.extend([198, 51, 100, 2, 4, 0]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0]);
    frame
}

fn run(sys: &Sys, loaded: &Loaded, frame: &[u8]) {
    let program = &loaded.program().expect("one program").fd;
    sys.test_run(program, &TestRun { frame, context: &[], repeat: 1 }).expect("a test run");
}

#[test]
fn packets_are_reported_while_somebody_watches() {
    let sys = Sys::new();
    let Some((object, loaded)) = loaded("reports", &sys, true) else { return };
    let maps = TraceMaps::of(&object.manifest, |name| loaded.map(name)).expect("compiled with reports");
    let ssh = frame(6, [192, 0, 2, 9], 22);
    let dns = frame(17, [203, 0, 113, 1], 53);
    run(&sys, &loaded, &ssh);
    let config = Config { on: true, patterns: vec![Pattern::default()], rate: 0, burst: 1 };
    let mut watch = Watch::start(&sys, maps, &config, |_| true).unwrap();
    assert_eq!(watch.take(), None);
    run(&sys, &loaded, &ssh);
    run(&sys, &loaded, &dns);
    let waited = Instant::now();
    assert!(
        !events::wait(&sys, std::slice::from_ref(&watch), Ends::default(), Duration::from_secs(60)).unwrap()
    );
    assert!(waited.elapsed() < Duration::from_secs(60), "there was something to read");
    let events: Vec<_> = std::iter::from_fn(|| watch.take()).collect();
    assert_eq!(events.len(), 2);
    let slots: Vec<_> = events.iter().map(|event| &object.manifest.counters[event.slot as usize]).collect();
    assert_eq!((slots[0].line, slots[0].verdict.as_deref()), (Some(5), Some("drop")));
    assert_eq!((slots[1].line, slots[1].verdict.as_deref()), (Some(6), Some("drop")));
    assert_eq!(events[0].ip.unwrap().transport, EventTransport::Ports(1024, 22));
    assert_eq!(events[0].length, 40);
    assert!(events[0].time_ns <= events[1].time_ns && events[1].time_ns <= sys.monotonic_ns());
    assert_eq!(watch.tally().unwrap(), Tally { reported: 2, limited: 0, full: 0 });
    drop(watch);
    run(&sys, &loaded, &ssh);
    // Only what line 6 decides, and what the first watcher was told is not told again.
    let wanted = |slot: usize| object.manifest.counters.get(slot).is_some_and(|slot| slot.line == Some(6));
    let mut watch = Watch::start(&sys, maps, &config, wanted).unwrap();
    run(&sys, &loaded, &ssh);
    run(&sys, &loaded, &dns);
    let events: Vec<_> = std::iter::from_fn(|| watch.take()).collect();
    assert_eq!(events.len(), 1);
    assert_eq!(object.manifest.counters[events[0].slot as usize].line, Some(6));
    // More than the buffer holds, over several of its lengths: none is lost while somebody reads.
    let mut seen = 0;
    for _ in 0..20 {
        for _ in 0..1_000 {
            run(&sys, &loaded, &dns);
        }
        seen += std::iter::from_fn(|| watch.take()).count();
    }
    assert_eq!(seen, 20_000);
    assert_eq!(watch.tally().unwrap(), Tally { reported: 20_001, limited: 0, full: 0 });
}

#[test]
fn a_program_without_reports_says_so() {
    let sys = Sys::new();
    let Some((object, loaded)) = loaded("no reports", &sys, false) else { return };
    assert!(TraceMaps::of(&object.manifest, |name| loaded.map(name)).is_none());
}

#[test]
fn counters_are_those_of_the_rules() {
    let sys = Sys::new();
    let Some((object, loaded)) = loaded("counters", &sys, false) else { return };
    for _ in 0..3 {
        run(&sys, &loaded, &frame(6, [192, 0, 2, 9], 22));
    }
    run(&sys, &loaded, &frame(6, [203, 0, 113, 1], 22));
    run(&sys, &loaded, &frame(17, [203, 0, 113, 1], 53));
    run(&sys, &loaded, &frame(47, [203, 0, 113, 1], 1));
    let slots = carry::slots(&sys, loaded.map(COUNTERS_MAP).expect("counters")).unwrap();
    let by_rule = carry::by_counted(&object.manifest, &slots, &[]);
    let of = |chain: &str, rule: Option<u32>| {
        let counted = &object.manifest.counted;
        let index = counted.iter().position(|one| one.chain == chain && one.rule == rule).expect("counted");
        by_rule[index].0
    };
    assert_eq!(of("INPUT", Some(1)), 4);
    assert_eq!(of("LOG-IT", Some(1)), 4);
    assert_eq!(of("INPUT", Some(2)), 3);
    assert_eq!(of("INPUT", Some(3)), 1);
    assert_eq!(of("INPUT", None), 2);
    let slots: Vec<Counter> = slots.into_iter().map(Counter::from).collect();
    let verdicts = counters::by_verdict(&object.manifest, &slots);
    assert_eq!(verdicts.drop, Counter { packets: 4, bytes: 160 });
    assert_eq!(verdicts.accept, Counter { packets: 2, bytes: 80 });
}

#[test]
fn code_stands_beside_its_rules() {
    let sys = Sys::new();
    let Some((_, loaded)) = loaded("dump", &sys, true) else { return };
    let program = loaded.program().expect("one program").fd.as_fd();
    let info = sys.prog_info(program).unwrap();
    let xlated = jited::xlated(&sys, program).unwrap();
    let jited = jited::jited(&sys, program).unwrap();
    assert_eq!(xlated.total().bytes, u64::from(info.xlated_bytes));
    assert_eq!(jited.total().bytes, u64::from(info.jited_bytes));
    for listing in [&xlated, &jited] {
        let lines: Vec<u32> =
            listing.costs().iter().filter_map(|(line, _)| line.map(|line| line.line)).collect();
        // What a table decides with others has no code of its own.
        assert!(lines.len() >= 2 && lines.iter().all(|line| (4..=7).contains(line)), "{listing}");
        assert!(listing.costs().iter().all(|(_, cost)| cost.instrs > 0));
        assert!(listing.to_string().contains("; -A INPUT -p tcp -m tcp --dport 22 -j LOG-IT @ rules.v4:4\n"));
    }
    let text = jited.to_string();
    assert!(text.contains("push rbp") && text.contains("call bpf_ringbuf_output"), "{text}");
    assert!(!text.contains("(bad)"), "{text}");
    let text = xlated.to_string();
    assert!(text.contains("call bpf_ktime_get_ns") && text.contains("map polc_events"), "{text}");
}
