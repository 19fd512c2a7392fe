//! A policy that polc applies gives every packet the verdict that iptables gives it, and counts it where iptables does.
//!
//! Every stateless filter table of the corpus, IPv4 and IPv6, goes into a network namespace of its own and is decided
//! by iptables and then by polc's programs, at XDP, at tc and at netfilter's hooks. Without root the tests say that they are skipped.
//! `POLC_PACKETS` changes the number of packets for each dump and route, `POLC_DUMP` names the dumps.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use polc_ir::env::Attach;
use polc_ir::hook::{Family, Hook, Semantics};
use polc_loader::netfilter::{NetfilterError, Route};
use polc_tests::applied::{Bench, Compared};
use polc_tests::corpus::{self, Dump};
use polc_tests::generate::case;
use polc_tests::kernel::{BpfFs, TempDir, has_tools, may_run};
use polc_tests::stateless::{Stateless, stateless};
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Packets for each dump and route, of which there are two.
const PACKETS: usize = 10_000;

const PLACES: [Attach; 3] = [Attach::Xdp, Attach::TcIngress, Attach::Netfilter];

#[derive(Default)]
struct Totals {
    dumps: usize,
    /// Dumps that were stateless as they are.
    whole: usize,
    fewest: Option<usize>,
    sum: Compared,
    apart: BTreeMap<String, usize>,
    wrong: Vec<String>,
}

impl Totals {
    fn add(&mut self, compared: &Compared) {
        let sum = &mut self.sum;
        sum.packets += compared.packets;
        sum.passed += compared.passed;
        sum.counters += compared.counters;
        sum.counters_hit += compared.counters_hit;
        for (from, to) in [(&compared.kinds, &mut sum.kinds), (&compared.left_out, &mut sum.left_out)] {
            for (what, count) in from {
                *to.entry(what).or_default() += count;
            }
        }
    }
}

/// Rules to be decided.
struct Rules {
    name: String,
    text: String,
    sets: Vec<String>,
}

/// Compares one rule set; how many packets at the place with the fewest.
fn one(
    rules: &Rules,
    semantics: Semantics,
    packets: usize,
    dirs: &(BpfFs, TempDir),
    totals: &Mutex<Totals>,
) -> Result<(), String> {
    let Rules { name, text, sets } = rules;
    // Places whose texts are the same share what iptables does.
    let mut texts: Vec<(Stateless, Vec<Attach>)> = Vec::new();
    for attach in PLACES {
        let rules = stateless(name, text, sets, semantics, attach)?;
        match texts.iter_mut().find(|(other, _)| other.text == rules.text) {
            Some((_, places)) => places.push(attach),
            None => texts.push((rules, vec![attach])),
        }
    }
    let whole = texts.iter().all(|(rules, _)| rules.lines_changed == 0);
    let said = |error: NetfilterError| error.to_string();
    let mut fewest = usize::MAX;
    for (rules, places) in &texts {
        let state = dirs.1.path().to_str().expect("UTF-8");
        let mut sum = 0;
        // One way by a device that rules name, the other by one that they don't; which is which alternates.
        let other = name.len() % 2 == 1;
        for (route, named) in [(Route::Forward, !other), (Route::Local, other)] {
            let mut bench = Bench::new(rules, sets, named, &dirs.0.join(""), state).map_err(said)?;
            let compared = bench.compare(route, places, packets).map_err(said)?;
            sum += compared.packets / places.len();
            let mut totals = totals.lock().expect("no test thread panics while it counts");
            totals.add(&compared);
            if let Some(difference) = compared.difference {
                totals.wrong.push(format!("{name}: {difference}"));
                return Ok(());
            }
        }
        fewest = fewest.min(sum);
    }
    let mut totals = totals.lock().expect("no test thread panics while it counts");
    totals.dumps += 1;
    totals.whole += usize::from(whole);
    if fewest < 2 * packets {
        return Err(format!("in part: no more than {fewest} packets can be"));
    }
    totals.fewest = Some(totals.fewest.unwrap_or(usize::MAX).min(fewest));
    Ok(())
}

fn dumps(name: &str, semantics: Semantics) {
    let packets = std::env::var("POLC_PACKETS").ok().and_then(|text| text.parse().ok()).unwrap_or(PACKETS);
    let only = std::env::var("POLC_DUMP").unwrap_or_default();
    let mut dumps: Vec<Dump> =
        corpus::all().into_iter().filter(|dump| dump.valid && dump.name.contains(&only)).collect();
    // Dumps that ship with the repository may be in the larger corpus, too.
    let mut seen = BTreeSet::new();
    dumps.retain(|dump| seen.insert(dump.text()));
    let rules = dumps.into_iter().map(|dump| Rules {
        text: dump.text(),
        sets: dump.ipset_text().into_iter().collect(),
        name: dump.name,
    });
    all(name, semantics, &rules.collect::<Vec<_>>(), packets);
}

/// Compares rule sets, as many at a time as there are CPUs; how many could be.
fn all(name: &str, semantics: Semantics, rules: &[Rules], packets: usize) -> usize {
    if !may_run(name) || !has_tools(name, &["iptables-legacy-restore", "ip", "ipset"]) {
        return rules.len();
    }
    let totals = Mutex::new(Totals::default());
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get());
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (totals, next) = (&totals, &next);
            scope.spawn(move || {
                let name = format!("{}-{semantics:?}-{thread}", &name[..name.len().min(24)]);
                let dirs = (BpfFs::new(&format!("{name}-fs")), TempDir::in_memory(&name));
                while let Some(rules) = rules.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(why) = one(rules, semantics, packets, &dirs, totals) {
                        let mut totals = totals.lock().expect("no test thread panics while it counts");
                        *totals.apart.entry(format!("{}: {why}", rules.name)).or_default() += 1;
                    }
                }
            });
        }
    });
    let totals = totals.into_inner().expect("no test thread panics while it counts");
    let sum = &totals.sum;
    eprintln!(
        "{semantics:?}: {} dumps ({} of them stateless as they are), {} packets compared at XDP, tc and netfilter, at least {} a \
         dump and place, {} let through; {} counters, {} of them not zero",
        totals.dumps,
        totals.whole,
        sum.packets,
        totals.fewest.unwrap_or(0),
        sum.passed,
        sum.counters,
        sum.counters_hit
    );
    eprintln!("among the packets: {:?}; left out: {:?}", sum.kinds, sum.left_out);
    for apart in totals.apart.keys() {
        eprintln!("not compared: {apart}");
    }
    let (count, wrong) = (totals.wrong.len(), &totals.wrong[..totals.wrong.len().min(12)]);
    assert!(wrong.is_empty(), "{count} wrong:\n{}", wrong.join("\n"));
    totals.dumps
}

#[test]
fn applied_policies_decide_as_iptables_legacy() {
    dumps("applied_policies_decide_as_iptables_legacy", Semantics::Legacy);
}

#[test]
fn applied_policies_decide_as_iptables_nft() {
    dumps("applied_policies_decide_as_iptables_nft", Semantics::Nft);
}

/// Rule sets that nobody wrote. `POLC_LONG` makes it ten million packets.
#[test]
fn applied_random_policies_decide_as_iptables() {
    let long = std::env::var_os("POLC_LONG").is_some();
    let (rule_sets, packets) = if long { (110, 20_000) } else { (10, 1_000) };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[1; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let mut rules = Vec::new();
    while rules.len() < rule_sets {
        let case = case().new_tree(&mut runner).expect("strategies leave nothing out").current();
        // Arriving packets come to no other chains; the tools' own meanings are for the dumps.
        if matches!(case.hook, Hook::Input | Hook::Forward) && case.semantics == Semantics::Legacy {
            let family = if case.family == Family::V4 { "v4" } else { "v6" };
            let name = format!("random{}.{family}.rules", rules.len());
            rules.push(Rules { name, text: case.dump(), sets: vec![case.sets().to_string()] });
        }
    }
    let compared = all("applied_random_policies_decide_as_iptables", Semantics::Legacy, &rules, packets);
    assert!(compared >= rule_sets / 2, "no more than {compared} of {rule_sets} could be compared");
}
