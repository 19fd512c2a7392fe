//! The running kernel's own packet filter does with every packet what the rules' meaning says: verdicts, marks, and the
//! counters of every rule and policy.
//!
//! Every IPv4 dump that the tools restore goes through, forwarded and delivered. Without root the test says that it is
//! skipped. `POLC_LONG` takes more packets for each dump and route, `POLC_PACKETS` as many as it says.

use std::os::unix::fs::MetadataExt as _;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use polc::netfilter::{Comparison, compare};
use polc::session::{ReadOptions, Session};
use polc_ir::hook::{Family, Semantics};
use polc_ir::source::SourceMap;
use polc_loader::netfilter::{NetfilterError, Route};
use polc_tests::corpus::{self, Dump};

/// Packets for each dump and route, and those of the long run.
const PACKETS: usize = 6_000;
const LONG_PACKETS: usize = 20_000;

/// How often the process is stopped while packets go through, and packets of each round meanwhile.
const STOPS: usize = 400;
const STOPPED_PACKETS: usize = 30_000;

/// What all dumps gave.
#[derive(Default)]
struct Totals {
    compared: usize,
    packets: usize,
    left_out: usize,
    counters: usize,
    counters_hit: usize,
    wrong: Vec<String>,
    /// Dumps that the tools refuse, and what they say.
    refused: Vec<String>,
}

fn may_run(name: &str) -> bool {
    let root = std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0);
    if !root {
        eprintln!("skipped {name}: needs root");
    }
    root
}

fn session(dump: &Dump, semantics: Semantics) -> (Session, Vec<String>) {
    let mut sources = SourceMap::new();
    let rules = sources.add(dump.name.as_str(), dump.text());
    let sets: Vec<String> = dump.ipset_text().into_iter().collect();
    let files: Vec<_> = sets.iter().map(|text| sources.add("sets", text.as_str())).collect();
    let options = ReadOptions { semantics: Some(semantics), ..ReadOptions::default() };
    (Session::read(sources, rules, &files, &options), sets)
}

/// Compares one dump, forwarded and delivered.
fn one(dump: &Dump, semantics: Semantics, packets: usize, totals: &Mutex<Totals>) {
    let (session, sets) = session(dump, semantics);
    for route in [Route::Forward, Route::Local] {
        let comparison = Comparison { session: &session, sets: &sets, route, packets, seed: 7 };
        let result = compare(&comparison, &mut |_| ());
        let mut totals = totals.lock().expect("no test thread panics while it counts");
        match result {
            Ok(compared) => {
                totals.compared += 1;
                totals.packets += compared.packets;
                totals.left_out += compared.left_out.values().sum::<usize>();
                totals.counters += compared.counters;
                totals.counters_hit += compared.counters_hit;
                if let Some((sample, difference)) = compared.difference {
                    let frame: String = sample
                        .map(|sample| sample.input)
                        .map(|input| {
                            let hex: String = input.frame.iter().map(|byte| format!("{byte:02x}")).collect();
                            format!("{:?} {hex}", input.in_device)
                        })
                        .unwrap_or_default();
                    totals.wrong.push(format!("{} {route:?}: {difference:?}\n    {frame}", dump.name));
                }
            }
            Err(NetfilterError::Refused(command, said)) if !dump.valid => {
                totals.refused.push(format!("{}: {command}: {said}", dump.name));
                return;
            }
            Err(NetfilterError::Refused(command, said)) if said.contains("doesn't exist") => {
                totals.refused.push(format!("{}: {command}: {said}", dump.name));
                return;
            }
            Err(error) => totals.wrong.push(format!("{} {route:?}: {error}", dump.name)),
        }
    }
}

fn all(name: &str, semantics: Semantics) {
    if !may_run(name) {
        return;
    }
    let usual = if std::env::var_os("POLC_LONG").is_some() { LONG_PACKETS } else { PACKETS };
    let packets = std::env::var("POLC_PACKETS").ok().and_then(|text| text.parse().ok()).unwrap_or(usual);
    let only = std::env::var("POLC_DUMP").unwrap_or_default();
    let dumps: Vec<Dump> = corpus::all().into_iter().filter(|dump| dump.name.contains(&only)).collect();
    let totals = Mutex::new(Totals::default());
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(dump) = dumps.get(next.fetch_add(1, Ordering::Relaxed)) {
                    one(dump, semantics, packets, &totals);
                }
            });
        }
    });
    let totals = totals.into_inner().expect("no test thread panics while it counts");
    eprintln!(
        "{semantics:?}: {} routes of {} dumps, {} packets, {} left out, {} counters of which {} not zero",
        totals.compared,
        dumps.len(),
        totals.packets,
        totals.left_out,
        totals.counters,
        totals.counters_hit
    );
    for refused in &totals.refused {
        eprintln!("refused by the tools: {refused}");
    }
    let (count, wrong) = (totals.wrong.len(), &totals.wrong[..totals.wrong.len().min(12)]);
    assert!(wrong.is_empty(), "{count} wrong:\n{}", wrong.join("\n"));
}

#[test]
fn iptables_legacy_does_as_the_rules_say() {
    all("iptables_legacy_does_as_the_rules_say", Semantics::Legacy);
}

#[test]
fn iptables_nft_does_as_the_rules_say() {
    all("iptables_nft_does_as_the_rules_say", Semantics::Nft);
}

/// A process can be stopped at any time (a terminal's Ctrl-Z, the freezer of its control group), which ends a call
/// that sends frames in its middle: each frame goes once all the same.
#[test]
fn a_stop_in_between_loses_no_frame() {
    const NAME: &str = "a_stop_in_between_loses_no_frame";
    if !may_run(NAME) {
        return;
    }
    let text = "*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n-A FORWARD -p tcp -j ACCEPT\n\
                -A FORWARD -p udp -m udp --dport 0:32767 -j MARK --set-xmark 0x5/0xff\nCOMMIT\n";
    let mut sources = SourceMap::new();
    let rules = sources.add("rules", text);
    let options = ReadOptions { semantics: Some(Semantics::Legacy), ..ReadOptions::default() };
    let session = Session::read(sources, rules, &[], &options);
    let comparison =
        Comparison { session: &session, sets: &[], route: Route::Forward, packets: STOPPED_PACKETS, seed: 7 };
    let script = format!(
        "for i in $(seq {STOPS}); do kill -STOP {0}; sleep 0.002; kill -CONT {0}; sleep 0.006; done",
        std::process::id()
    );
    let mut stopping = Command::new("sh").args(["-c", &script]).spawn().expect("every system has sh");
    let mut compared = 0;
    let result = loop {
        match compare(&comparison, &mut |_| ()) {
            Ok(result) if result.difference.is_none() => compared += result.packets,
            other => break Err(other),
        }
        if stopping.try_wait().expect("it is a child").is_some() {
            break Ok(());
        }
    };
    // Whatever came out: it may not be stopped in the middle of the process's end.
    stopping.wait().expect("it is a child");
    assert!(result.is_ok(), "{result:?}");
    eprintln!("{compared} packets, {STOPS} stops");
}

/// What IPv6's matches do otherwise than IPv4's: types of addresses that all have to hold, flags of TCP in later
/// fragments, `-p all` on chains of headers that are cut short.
#[test]
fn ipv6_has_meanings_of_its_own() {
    const NAME: &str = "ipv6_has_meanings_of_its_own";
    if !may_run(NAME) {
        return;
    }
    let rules = [
        "-s 2001:db8::/32 -p tcp -m ecn --ecn-tcp-cwr",
        "-p tcp -m ecn ! --ecn-tcp-ece -j ACCEPT",
        "-p tcp -m ecn --ecn-tcp-cwr --ecn-tcp-ece -j DROP",
        "-m addrtype --dst-type UNICAST",
        "-m addrtype ! --dst-type UNICAST -j DROP",
        "-m addrtype --dst-type MULTICAST,UNICAST -j DROP",
        "-m addrtype ! --dst-type MULTICAST,UNICAST",
        "-m addrtype --src-type MULTICAST --dst-type UNICAST",
        "-m addrtype --src-type UNSPEC -j DROP",
        "-p all -m length --length 0:99",
        "-p all -j ACCEPT",
    ];
    let rules: String = rules.iter().map(|rule| format!("-A FORWARD {rule}\n")).collect();
    let text = format!("*filter\n:FORWARD DROP [0:0]\n{rules}COMMIT\n");
    for semantics in [Semantics::Legacy, Semantics::Nft] {
        let mut sources = SourceMap::new();
        let file = sources.add("rules", text.as_str());
        let (semantics, family) = (Some(semantics), Some(Family::V6));
        let session =
            Session::read(sources, file, &[], &ReadOptions { semantics, family, ..ReadOptions::default() });
        assert!(!session.has_errors(), "{:?}", session.diagnostics);
        let comparison =
            Comparison { session: &session, sets: &[], route: Route::Forward, packets: PACKETS, seed: 11 };
        let compared = compare(&comparison, &mut |_| ()).expect("netfilter is there");
        assert!(compared.difference.is_none(), "{semantics:?}: {:?}", compared.difference);
        assert!(compared.counters_hit >= 8, "{compared:?}");
    }
}
