//! The ClassBench rule sets and traces that may lie beside the checkout.
//!
//! ClassBench's output may not be shipped; where a folder `bench/rulesets` is in the shared data (`../shared`, or
//! `POLC_SHARED`), its twelve sets are measured. Rules are iptables-save text (`SET_SIZE.iptables.gz`). Headers are
//! 24-byte little-endian records (`SET_SIZE.hdr.gz`): source and destination address, two ports, protocol, flags, two
//! bytes of zero, and the number of the first rule that fits, from 1 (0: none), which is a truth found elsewhere.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;

use crate::rules::{Header, RuleSet};

/// The sets.
pub(crate) const SETS: [&str; 12] =
    ["acl1", "acl2", "acl3", "acl4", "acl5", "fw1", "fw2", "fw3", "fw4", "fw5", "ipc1", "ipc2"];

/// The folder, if it is there.
pub(crate) fn folder() -> Option<PathBuf> {
    let given = std::env::var_os("POLC_SHARED").map(PathBuf::from);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let beside = root.parent().map(|parent| parent.join("shared"));
    given.into_iter().chain(beside).map(|path| path.join("bench/rulesets")).find(|path| path.is_dir())
}

fn unpack(path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| GzDecoder::new(file).read_to_end(&mut bytes));
    read.map(|_| bytes).map_err(|error| format!("{}: {error}", path.display()))
}

/// Reads a set and its headers with their first rules. Size `10` is every tenth rule of size `100`, and has no
/// headers of its own.
///
/// # Errors
/// A file is missing or of another form.
pub(crate) fn read(folder: &Path, set: &str, size: &str) -> Result<(RuleSet, Vec<(Header, u32)>), String> {
    let stored = if size == "10" { "100" } else { size };
    let text = unpack(&folder.join(format!("{set}_{stored}.iptables.gz")))?;
    let text = String::from_utf8(text).map_err(|error| format!("{set}_{stored}: {error}"))?;
    let mut rules = RuleSet::parse(&format!("{set}_{size}"), &text)?;
    if size == "10" {
        rules.rules = rules.rules.iter().copied().step_by(10).take(10).collect();
        return Ok((rules, Vec::new()));
    }
    let records = unpack(&folder.join(format!("{set}_{size}.hdr.gz")))?;
    let headers = records.chunks_exact(24).map(|record| {
        let word = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().expect("four bytes"));
        let half = |at: usize| u16::from_le_bytes(record[at..at + 2].try_into().expect("two bytes"));
        let header = Header {
            src: word(0).into(),
            dst: word(4).into(),
            sport: half(8),
            dport: half(10),
            proto: record[12],
        };
        (header, word(16))
    });
    Ok((rules, headers.collect()))
}
