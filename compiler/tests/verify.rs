//! `polc verify` finds nothing in any valid dump and leaves no entry open, within the time that a pull request can wait
//! for.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use polc_tests::corpus::{self, Dump};

/// Packets of all dumps.
static PACKETS: AtomicU64 = AtomicU64::new(0);

/// For one dump, on a machine that does other things, too.
const TIME_MAX: Duration = Duration::from_secs(120);

#[test]
fn every_dump_is_verified_in_time() {
    let dumps = corpus::all();
    let valid: Vec<Dump> = dumps.into_iter().filter(|dump| dump.valid).collect();
    assert!(!valid.is_empty());
    let left = Mutex::new(valid.iter());
    let work = || {
        loop {
            let next = left.lock().expect("nobody panics with it").next();
            let Some(dump) = next else { break };
            verify(dump);
        }
    };
    thread::scope(|scope| {
        let helper = scope.spawn(work);
        work();
        helper.join().expect("every dump is verified");
    });
    let packets = PACKETS.load(Ordering::Relaxed);
    assert!(packets > 4_000 * valid.len() as u64, "only {packets} packets");
}

/// A packet passes as many stages as there are rules that write the mark one after another, and there are as many packets
/// as rules: together they are bounded, and no entry stays open for that.
#[test]
fn chained_marks_are_verified_with_fewer_packets() {
    const RULES: usize = 240;
    let rules: String = (0..RULES)
        .map(|rule| {
            let (from, bit) = (1 + 50 * rule, 1u32 << (rule % 32));
            let ports = format!("{from}:{}", from + 3_000);
            format!("-A PREROUTING -p tcp -m tcp --dport {ports} -j MARK --or-mark {bit:#x}\n")
        })
        .collect();
    let file = std::env::temp_dir().join(format!("polc-chained-marks-{}", std::process::id()));
    std::fs::write(&file, format!("*mangle\n:PREROUTING ACCEPT [0:0]\n{rules}COMMIT\n"))
        .expect("a file is written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_polc"));
    let output = command.args(["verify", "--format", "json"]).arg(&file).output().expect("polc runs");
    std::fs::remove_file(&file).expect("it was written");
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!((&said["agree"], &said["compiled"]), (&true.into(), &RULES.into()));
    let (packets, not_taken) = (&said["packets"], &said["places"][0]["not_taken"]);
    assert_eq!(not_taken, 0, "{packets}");
    let packets = packets.as_u64().expect("a count");
    assert!((4_000..20_000).contains(&packets), "{packets}");
}

fn verify(dump: &Dump) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polc"));
    command.args(["verify", "--format", "json"]).arg(&dump.rules).stdin(Stdio::null());
    if let Some(sets) = &dump.ipset {
        command.args([Path::new("--ipset"), sets]);
    }
    let begin = Instant::now();
    let output = command.output().expect("polc runs");
    let time = begin.elapsed();
    let (said, remarks) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{}: {said}{remarks}", dump.name);
    assert!(time < TIME_MAX, "{}: {time:?}", dump.name);
    let said: serde_json::Value = serde_json::from_str(&said).expect("one object");
    assert_eq!(said["agree"], true, "{}", dump.name);
    let count = |key: &str| said[key].as_u64().expect("a count");
    assert_eq!(count("compiled") + count("deferred") + count("rejected"), count("rules"), "{}", dump.name);
    // Each entry was taken by a packet, or it is proven that none can take it.
    let places = said["places"].as_array().expect("a list");
    let missed = |place: &serde_json::Value| place["not_taken"].as_u64().expect("a count") > 0;
    assert!(!places.iter().any(missed), "{}: {places:?}", dump.name);
    PACKETS.fetch_add(count("packets"), Ordering::Relaxed);
}
