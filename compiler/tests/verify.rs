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
