//! A match that drops what it can't read, in a part whose result it inverts: x_tables goes on with the rule, counts the
//! packet if the rest of the rule holds, takes its action, and drops the packet then. Through iptables-nft the drop
//! comes first. Each case is evaluated at every level and in the emitted program; the kernel's own counters say the same.

use polc::netfilter::{Comparison, compare};
use polc::place::{devices_of, place};
use polc::runner::Program;
use polc::select::Devices;
use polc::session::{ReadOptions, Session};
use polc_backend_ebpf::emit::emit;
use polc_ir::env::{Attach, Env, Mode};
use polc_ir::hook::{Hook, Semantics};
use polc_ir::outcome::{Count, Verdict};
use polc_ir::packet::text;
use polc_ir::source::SourceMap;
use polc_loader::netfilter::Route;
use polc_tests::kernel::{has_tools, may_run};
use polc_tests::levels::{Levels, target};

use Mode::{Accelerate, Replace};
use Semantics::{Legacy, Nft};
use Verdict::{Accept, Defer, Drop};

/// A chunk without a length, and no chunk at all.
const CHUNKS: [&str; 2] =
    ["sctp 192.0.2.1:5000 > 198.51.100.1:9 len=40", "sctp 192.0.2.1:5000 > 198.51.100.1:9 len=32"];
/// A header that says it is shorter than itself.
const OPTIONS: &str = "dccp 192.0.2.1:5000 > 198.51.100.1:9 len=40";

/// The condition that such packets satisfy, and doom themselves by.
const NO_DATA: &str = "-p sctp -m sctp ! --chunk-types any DATA";

fn session(semantics: Semantics, table: &str, rules: &str) -> Session {
    let mut sources = SourceMap::new();
    let file = sources.add(
        "rules",
        format!("*{table}\n:FORWARD ACCEPT [0:0]\n:user - [0:0]\n:last - [0:0]\n{rules}\nCOMMIT\n"),
    );
    let options = ReadOptions { semantics: Some(semantics), ..ReadOptions::default() };
    let session = Session::read(sources, file, &[], &options);
    assert!(!session.has_errors(), "{:?}", session.diagnostics);
    session
}

/// What all levels say of a packet by these rules of FORWARD, and the numbers of the rules that count it, from 1.
fn says(semantics: Semantics, mode: Mode, table: &str, rules: &str, packet: &str) -> (Verdict, Vec<u32>) {
    let session = session(semantics, table, rules);
    let ruleset = &session.ruleset;
    let place = place(&[Hook::Forward], Attach::TcIngress, mode, false);
    let devices = Devices { declared: devices_of(ruleset), ..Devices::default() };
    let env = Env::default();
    let compiled = polc::compile(ruleset, &place, &env, &devices);
    let object = emit(&compiled.plan, &target(Attach::TcIngress)).expect("it is small");
    let program = Program::new(&compiled.plan, Attach::TcIngress, &object).expect("the check VM takes it");
    let mut levels = Levels { ruleset, compiled: &compiled, env: &env, program: Some(program) };
    let input = text::parse(packet).expect("a packet").input().expect("a packet");
    let said = levels.agree(&input).unwrap_or_else(|why| panic!("{packet}: {why}\n{ruleset}"));
    let counted = said.counted.iter().filter_map(|count| match count {
        Count::Rule(rule) => Some(rule.as_u32() + 1),
        Count::Policy(_) => None,
    });
    assert!(said.ending.verdict != Drop || said.counted.iter().all(|count| matches!(count, Count::Rule(_))));
    (said.ending.verdict, counted.collect())
}

#[test]
fn what_is_doomed_is_counted_and_then_dropped() {
    for packet in CHUNKS {
        let filter = |mode, rules: &str| says(Legacy, mode, "filter", rules, packet);
        for mode in [Accelerate, Replace] {
            for action in ["-j ACCEPT", "-j DROP", "-j RETURN", "", "-j user", "-g user"] {
                let rules = format!("-A FORWARD {NO_DATA} {action}\n-A user -j ACCEPT\n-A FORWARD -j ACCEPT");
                assert_eq!(filter(mode, &rules), (Drop, vec![1]), "{action}");
                let nft = says(Nft, mode, "filter", &rules, packet);
                assert_eq!(nft, (Drop, vec![]), "{action}");
            }
            // What follows decides whether it is counted, not whether it is dropped.
            for (further, counted) in [
                ("-m mark --mark 5", vec![]),
                ("-m mark ! --mark 5", vec![1]),
                (
                    "-m length --length 0:39 -m mark --mark 0",
                    if packet == CHUNKS[1] { vec![1] } else { vec![] },
                ),
                ("-m sctp ! --chunk-types all INIT", vec![1]),
                ("-m sctp --chunk-types all INIT", vec![]),
                ("-m multiport --dports 1:8", vec![]),
            ] {
                let rules = format!("-A FORWARD {NO_DATA} {further} -j ACCEPT");
                assert_eq!(filter(mode, &rules), (Drop, counted), "{further}");
            }
            // A match that isn't inverted ends the rule.
            let plain = format!("-A FORWARD {} -j ACCEPT", NO_DATA.replace("! ", ""));
            assert_eq!(filter(mode, &plain), (Drop, vec![]));
        }
        let mark =
            format!("-A FORWARD {NO_DATA} -j MARK --set-xmark 0x1/0xffffffff\n-A FORWARD -m mark --mark 1");
        assert_eq!(says(Legacy, Accelerate, "mangle", &mark, packet), (Drop, vec![1]));
        let called = format!("-A FORWARD -j user\n-A user {NO_DATA} -j last\n-A last -j ACCEPT");
        assert_eq!(filter(Accelerate, &called), (Drop, vec![1, 2]));
        // Its turn may come, or not.
        for (nth, counted) in [(0, vec![1]), (1, vec![])] {
            let rules =
                format!("-A FORWARD {NO_DATA} -m statistic --mode nth --every 2 --packet {nth} -j ACCEPT");
            assert_eq!(filter(Replace, &rules), (Drop, counted));
        }
    }
    let option = "-A FORWARD -p dccp -m dccp ! --dccp-option 32 -j ACCEPT";
    assert_eq!(says(Legacy, Accelerate, "filter", option, OPTIONS), (Drop, vec![1]));
    assert_eq!(says(Nft, Accelerate, "filter", option, OPTIONS), (Drop, vec![]));
}

/// Who else would hear of the packet hears of it: an answer, a log, a rate's credit.
#[test]
fn what_others_are_told_of_the_doomed_stays() {
    let says = |rules: &str| says(Legacy, Accelerate, "filter", rules, CHUNKS[0]);
    assert!(
        matches!(says(&format!("-A FORWARD {NO_DATA} -j REJECT")), (Verdict::Reject(_), counted) if counted == [1])
    );
    for seen in ["-j LOG", "-m limit --limit 1/sec -j ACCEPT", "-m conntrack --ctstate NEW -j LOG"] {
        assert_eq!(says(&format!("-A FORWARD {NO_DATA} {seen}")).0, Defer, "{seen}");
    }
}

/// What can't be told may come before the match that dooms, behind it, or lead to its chain.
#[test]
fn doom_that_is_not_certain_is_doubt() {
    let says = |rules: &str| says(Legacy, Accelerate, "filter", rules, CHUNKS[0]);
    let tracked = "-m conntrack --ctstate NEW";
    let behind = format!("-A FORWARD {NO_DATA} {tracked} -j ACCEPT\n-A FORWARD -j ACCEPT");
    assert_eq!(says(&behind), (Drop, vec![]));
    for before in [
        format!("-A FORWARD {tracked} {NO_DATA}"),
        format!("-A FORWARD {tracked} {NO_DATA} -j DROP"),
        format!("-A FORWARD {tracked} -j user\n-A user {NO_DATA} -j RETURN"),
        format!("-A FORWARD {tracked} -j user\n-A user -j last\n-A last {NO_DATA} -j ACCEPT"),
    ] {
        assert_eq!(says(&format!("{before}\n-A FORWARD -j ACCEPT")).0, Defer, "{before}");
        let (verdict, counted) = says(&format!("{before}\n-A FORWARD -j DROP"));
        assert_eq!((verdict, counted.len()), (Drop, 1), "{before}");
    }
    assert_eq!(
        says(&format!("-A FORWARD {tracked} -j user\n-A user {NO_DATA} -j DROP\n-A user -j ACCEPT")).0,
        Defer
    );
    assert_eq!(says("-A FORWARD -j ACCEPT").0, Accept);
}

#[test]
fn the_kernel_counts_what_it_dooms() {
    let name = "the_kernel_counts_what_it_dooms";
    if !may_run(name) || !has_tools(name, &["iptables-legacy-restore", "iptables-nft-restore", "ip"]) {
        return;
    }
    let rules = format!(
        "-A FORWARD {NO_DATA} -m mark ! --mark 0x0 -j ACCEPT\n\
         -A FORWARD -p sctp -m sctp --dport 1:999 ! --chunk-types only INIT -j user\n\
         -A FORWARD -p sctp -m sctp --dport 1000:1999 ! --chunk-types all INIT,DATA -g user\n\
         -A FORWARD -p sctp -m sctp --dport 2000:2999 ! --chunk-types any INIT -j RETURN\n\
         -A FORWARD -p sctp -m sctp --dport 3000:3999 ! --chunk-types any INIT -m multiport --sports 1:30000 -j MARK --set-xmark 0x1/0xffffffff\n\
         -A FORWARD -p sctp -m sctp ! --chunk-types any INIT -j REJECT\n\
         -A FORWARD -p dccp -m dccp --sport 1:30000 ! --dccp-option 32\n\
         -A FORWARD -p dccp -m dccp ! --dccp-option 38 -j DROP\n\
         -A user -p sctp -m sctp --sport 1:1000 -j DROP\n-A user -j ACCEPT"
    );
    for semantics in [Legacy, Nft] {
        // MARK is mangle's, REJECT filter's.
        for (table, left_out) in [("filter", "MARK"), ("mangle", "REJECT")] {
            let rules: Vec<&str> = rules.lines().filter(|rule| !rule.contains(left_out)).collect();
            let session = session(semantics, table, &rules.join("\n"));
            let (sets, route) = (&[][..], Route::Forward);
            let comparison = Comparison { session: &session, sets, route, packets: 4000, seed: 3 };
            let compared = compare(&comparison, &mut |_| ()).expect("netfilter is there");
            assert!(compared.difference.is_none(), "{semantics:?} {table}: {:?}", compared.difference);
            assert!(compared.counters_hit >= 8, "{compared:?}");
        }
    }
}
