//! Counters of rules over generations: what a rule counted stays its own when the policy is replaced.
//!
//! A rule is the same one if its table, chain and text as a save tool prints it are; of several that are alike in a chain
//! the first goes with the first. A policy is its chain's. Totals are what earlier generations counted plus what the attached program did, and
//! the program's map is only read.

use std::collections::BTreeMap;

use polc_backend_ebpf::emit::COUNTERS_MAP;
use polc_backend_ebpf::manifest::{Counted, Manifest};
use polc_backend_ebpf::object::Object;

use crate::error::Error;
use crate::store::Slot;
use crate::swap::OBJECT_FILE;
use crate::sys::{Map, Sys};

/// What tells a rule or policy from the others: table, chain, text (none for a policy), and how many alike come before.
type Identity = (String, String, Option<String>, u32);

/// Packets and bytes by rule.
pub type ByRule = BTreeMap<Identity, (u64, u64)>;

/// The identities of a manifest's `counted`, in its order.
fn identities(counted: &[Counted]) -> Vec<Identity> {
    let mut seen: BTreeMap<(String, String, Option<String>), u32> = BTreeMap::new();
    let identity = |counted: &Counted| {
        let text = || counted.canonical.as_deref().unwrap_or_else(|| counted.without_counts());
        let text = counted.rule.map(|_| text().to_string());
        let key = (counted.table.clone(), counted.chain.clone(), text);
        let count = seen.entry(key.clone()).or_default();
        *count += 1;
        (key.0, key.1, key.2, *count)
    };
    counted.iter().map(identity).collect()
}

/// Adds counts to `carried`, which is by the order of the manifest's `counted`. Counts of rules that it doesn't have are
/// left out.
pub fn add(carried: &mut Vec<(u64, u64)>, manifest: &Manifest, counts: &ByRule) {
    carried.resize(manifest.counted.len(), (0, 0));
    for (own, identity) in carried.iter_mut().zip(identities(&manifest.counted)) {
        if let Some(&(packets, bytes)) = counts.get(&identity) {
            own.0 += packets;
            own.1 += bytes;
        }
    }
}

/// Packets and bytes of each slot of a counter map, over all CPUs.
pub fn slots(sys: &Sys, counters: &Map) -> Result<Vec<(u64, u64)>, Error> {
    let bytes = sys.map_read_array(counters).map_err(Error::call("read the counters"))?;
    let number = |value: &[u8]| u64::from_ne_bytes(value.try_into().expect("eight bytes"));
    Ok(bytes
        .chunks_exact(counters.stride().max(1))
        .map(|cpus| {
            cpus.chunks_exact(16).fold((0u64, 0u64), |sum, value| {
                (sum.0.wrapping_add(number(&value[..8])), sum.1.wrapping_add(number(&value[8..])))
            })
        })
        .collect())
}

/// Packets and bytes of each of the manifest's `counted`, from those of its slots and what was carried.
pub fn by_counted(manifest: &Manifest, slots: &[(u64, u64)], carried: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut totals = carried.to_vec();
    totals.resize(manifest.counted.len(), (0, 0));
    for (slot, &(packets, bytes)) in manifest.counters.iter().zip(slots) {
        for &index in &slot.counts {
            if let Some(total) = totals.get_mut(index as usize) {
                total.0 += packets;
                total.1 += bytes;
            }
        }
    }
    totals
}

/// The manifest of a generation.
pub(crate) fn manifest(sys: &Sys, slot: &Slot, generation: u32) -> Result<Manifest, Error> {
    object(sys, slot, generation).map(|object| object.manifest)
}

/// The object of a generation, without what is in its data maps.
pub(crate) fn object(sys: &Sys, slot: &Slot, generation: u32) -> Result<Object, Error> {
    let path = slot.generation_files(generation).join(OBJECT_FILE);
    let file = sys.open(&path).map_err(Error::disk(&path))?;
    let corrupt = |why: String| Error::Corrupt { path: path.clone(), why };
    let file = file.ok_or_else(|| corrupt("it is not there".to_string()))?;
    Object::read_outline(file).map_err(|error| corrupt(error.to_string()))
}

/// What a generation's own program counted.
pub(crate) fn own(sys: &Sys, slot: &Slot, generation: u32) -> Result<ByRule, Error> {
    totals(sys, slot, generation, &[])
}

/// What a generation's program counted, and what was carried into it.
pub(crate) fn totals(
    sys: &Sys,
    slot: &Slot,
    generation: u32,
    carried: &[(u64, u64)],
) -> Result<ByRule, Error> {
    let manifest = manifest(sys, slot, generation)?;
    if manifest.counted.is_empty() {
        // It may have no counters at all.
        return Ok(ByRule::new());
    }
    let path = slot.map(generation, COUNTERS_MAP);
    let fd = sys.obj_get(&path).map_err(Error::disk(&path))?;
    let map = sys.map(fd).map_err(Error::disk(&path))?;
    let totals = by_counted(&manifest, &slots(sys, &map)?, carried);
    Ok(identities(&manifest.counted).into_iter().zip(totals).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(chain: &str, rule: Option<u32>, text: &str) -> Counted {
        Counted { table: "filter".into(), chain: chain.into(), rule, text: text.into(), ..Counted::default() }
    }

    #[test]
    fn a_rule_is_the_same_whatever_it_counted() {
        let of = |text: &str| identities(&[counted("INPUT", Some(1), text)]);
        assert_eq!(of("[1:10] -A INPUT -j DROP"), of("-A INPUT -j DROP"));
        assert_eq!(of("[1:10] -A INPUT -j DROP"), of("[2:20] -A INPUT -j DROP"));
        assert_ne!(of("[1:10] -A INPUT -j DROP"), of("[1:10] -A INPUT -j ACCEPT"));
        // Nor how it was written.
        let canonical = Some("-A INPUT -p udp -m udp --dport 99 -j DROP".to_string());
        let written = counted("INPUT", Some(1), "[1:10] -A INPUT -p udp --dport 99 -j DROP");
        assert_eq!(
            identities(&[Counted { canonical, ..written }]),
            of("-A INPUT -p udp -m udp --dport 99 -j DROP")
        );
    }

    #[test]
    fn counts_follow_rules_that_moved() {
        let drop = |number| counted("INPUT", Some(number), "-A INPUT -j DROP");
        let old = vec![drop(1), drop(2), counted("INPUT", None, "policy of INPUT")];
        let counts: ByRule = identities(&old).into_iter().zip([(1, 10), (2, 20), (3, 30)]).collect();
        let ssh = counted("INPUT", Some(1), "-A INPUT -p tcp --dport 22 -j ACCEPT");
        let new =
            vec![ssh, drop(2), counted("FORWARD", None, "policy"), counted("INPUT", None, "policy"), drop(3)];
        let manifest = Manifest { counted: new, ..Manifest::default() };
        let mut carried = vec![(0, 0), (5, 5)];
        add(&mut carried, &manifest, &counts);
        assert_eq!(carried, [(0, 0), (6, 15), (0, 0), (3, 30), (2, 20)]);
    }
}
