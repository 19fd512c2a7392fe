//! The texts of the sets that a policy was applied with, kept with it: they tell whether the kernel's sets are still its
//! own, and with which sets it is applied anew.
//!
//! Each is a file, and beside them is written how many there are and what each was. A file that is lost, emptied or cut
//! short would otherwise be one that asks for less, and everything agrees with that.

use std::fmt::Write as _;

use polc_ir::source::bytes;
use polc_loader::Error;
use polc_loader::status::Open;
use polc_loader::sys::Sys;
use serde::{Deserialize, Serialize};

/// What names of the files start with.
const PREFIX: &str = "sets-";
/// Name of the file that says what they were.
const LIST_FILE: &str = "kept.json";
/// What is wrong with a kept file that says something else than when it was written.
pub(super) const NOT_APPLIED: &str = "it is not what was applied";

/// What a kept file was when it was written.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Written {
    bytes: usize,
    hash: String,
}

impl Written {
    fn of(bytes: &[u8]) -> Written {
        let mut hash = String::new();
        _ = write!(hash, "{:016x}", fnv(bytes));
        Written { bytes: bytes.len(), hash }
    }
}

/// FNV-1a: who keeps the file may write it, so it is against accidents alone.
fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

fn name(index: usize) -> String {
    format!("{PREFIX}{index}")
}

/// The files to be kept with a policy that is applied with these sets.
pub(super) fn files(sets: &[String]) -> Vec<(String, Vec<u8>)> {
    let texts: Vec<Vec<u8>> = sets.iter().map(|text| bytes::of_text(text).into_owned()).collect();
    let written: Vec<Written> = texts.iter().map(|text| Written::of(text)).collect();
    let list = serde_json::to_vec(&written).expect("plain data serializes");
    let texts = texts.into_iter().enumerate().map(|(index, text)| (name(index), text));
    [(LIST_FILE.to_string(), list)].into_iter().chain(texts).collect()
}

/// The files that a policy was applied with, in their order.
///
/// # Errors
/// [`Error::Corrupt`] if one is not there, or is not what it was.
pub(super) fn read(sys: &Sys, policy: &Open) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let corrupt = |name: &str, why: String| Error::Corrupt { path: policy.path(name), why };
    let list: Vec<Written> = serde_json::from_str(&policy.kept_text(sys, LIST_FILE)?)
        .map_err(|error| corrupt(LIST_FILE, error.to_string()))?;
    let file = |(index, written): (usize, &Written)| {
        let name = name(index);
        let bytes = policy.file(sys, &name)?.ok_or_else(|| corrupt(&name, "it is not there".into()))?;
        if Written::of(&bytes) == *written {
            Ok((name, bytes))
        } else {
            Err(corrupt(&name, NOT_APPLIED.into()))
        }
    };
    list.iter().enumerate().map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_written_down_with_what_they_are() {
        assert_eq!(files(&[]), [(LIST_FILE.to_string(), b"[]".to_vec())]);
        let files = files(&["foobar".into(), "a\n".into()]);
        let list = r#"[{"bytes":6,"hash":"85944171f73967e8"},{"bytes":2,"hash":"089bdc07b544e7b2"}]"#;
        assert_eq!(files[0], (LIST_FILE.into(), list.into()));
        assert_eq!(files[1..], [("sets-0".into(), b"foobar".to_vec()), ("sets-1".into(), b"a\n".to_vec())]);
        for other in ["", "fooba", "foobaz", "foobar\n"] {
            assert_ne!(Written::of(other.as_bytes()), Written::of(b"foobar"), "{other:?}");
        }
    }
}
