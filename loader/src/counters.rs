//! Reading an applied policy's counters: per slot, and per rule and policy.
//!
//! A program counts in *slots*, a value for each CPU, and the manifest says what a packet counted in a slot is counted
//! for. A packet on its way to a verdict is counted in several slots; each rule's packets are the sum over the slots
//! that name it. Programs add to their own CPU's value without a lock, packets before bytes, so a reading that meets a
//! packet in between may have its packet and not yet its bytes; no packet is lost or counted twice.

use std::ops::{Add, AddAssign};

use polc_backend_ebpf::manifest::{Counted, CounterSlot, Manifest};

use crate::error::Error;
use crate::status::Open;
use crate::sys::Sys;

/// Packets and their bytes, from the IP header on; of frames that are not IP, from behind the Ethernet header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Add for Counter {
    type Output = Counter;

    fn add(self, other: Counter) -> Counter {
        Counter {
            packets: self.packets.wrapping_add(other.packets),
            bytes: self.bytes.wrapping_add(other.bytes),
        }
    }
}

impl AddAssign for Counter {
    fn add_assign(&mut self, other: Counter) {
        *self = *self + other;
    }
}

impl Counter {
    /// What came since an earlier reading. Nothing if the earlier one is larger: the counters started anew.
    pub fn since(self, earlier: Counter) -> Counter {
        Counter {
            packets: self.packets.checked_sub(earlier.packets).unwrap_or(self.packets),
            bytes: self.bytes.checked_sub(earlier.bytes).unwrap_or(self.bytes),
        }
    }
}

impl From<(u64, u64)> for Counter {
    fn from((packets, bytes): (u64, u64)) -> Counter {
        Counter { packets, bytes }
    }
}

/// What each of a policy's counter slots counted since its program was loaded.
///
/// # Errors
/// The kernel does not tell.
pub fn by_slot(sys: &Sys, open: &Open) -> Result<Vec<Counter>, Error> {
    Ok(open.slots(sys)?.into_iter().map(Counter::from).collect())
}

/// Packets of each rule and policy that a policy counts: what the manifest's `counted` names, and its counter.
/// Predecessors' counts for the same rules are in it.
///
/// # Errors
/// The kernel does not tell.
pub fn by_rule<'o>(sys: &Sys, open: &'o Open) -> Result<Vec<(&'o Counted, Counter)>, Error> {
    let counts = open.counted(sys)?.into_iter().map(Counter::from);
    Ok(open.object.manifest.counted.iter().zip(counts).collect())
}

/// Sums slots up by verdict: accepted, dropped, left to the kernel, rejected by the kernel's rules.
pub fn by_verdict(manifest: &Manifest, slots: &[Counter]) -> Verdicts {
    let mut all = Verdicts::default();
    for (CounterSlot { verdict, .. }, counter) in manifest.counters.iter().zip(slots) {
        match verdict.as_deref() {
            Some("accept") => all.accept += *counter,
            Some("drop") => all.drop += *counter,
            Some("reject") => all.reject += *counter,
            Some("defer") => all.defer += *counter,
            _ => {}
        }
    }
    all
}

/// Packets by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdicts {
    /// Let on.
    pub accept: Counter,
    /// Dropped.
    pub drop: Counter,
    /// To be rejected.
    pub reject: Counter,
    /// Left to the kernel's own rules.
    pub defer: Counter,
}

impl Verdicts {
    /// With the verdicts' names.
    pub fn named(self) -> [(&'static str, Counter); 4] {
        [("accept", self.accept), ("drop", self.drop), ("reject", self.reject), ("defer", self.defer)]
    }
}

impl Add for Verdicts {
    type Output = Verdicts;

    fn add(self, other: Verdicts) -> Verdicts {
        Verdicts {
            accept: self.accept + other.accept,
            drop: self.drop + other.drop,
            reject: self.reject + other.reject,
            defer: self.defer + other.defer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use polc_backend_ebpf::manifest::CounterKind;

    fn slot(verdict: Option<&str>) -> CounterSlot {
        CounterSlot {
            kind: CounterKind::Rule,
            table: None,
            chain: None,
            rule: None,
            file: None,
            line: None,
            text: String::new(),
            verdict: verdict.map(str::to_string),
            counts: Vec::new(),
        }
    }

    #[test]
    fn slots_become_verdicts() {
        let manifest = Manifest {
            counters: vec![
                slot(Some("drop")),
                slot(Some("drop")),
                slot(None),
                slot(Some("accept")),
                slot(Some("defer")),
            ],
            ..Manifest::default()
        };
        let of = |packets: u64| Counter { packets, bytes: 100 * packets };
        let slots = [of(1), of(10), of(100), of(1_000), of(10_000)];
        let verdicts = by_verdict(&manifest, &slots);
        assert_eq!((verdicts.drop, verdicts.accept, verdicts.defer), (of(11), of(1_000), of(10_000)));
        assert_eq!(verdicts.reject, Counter::default());
    }

    #[test]
    fn counters_that_started_anew_count_from_zero() {
        let of = |packets| Counter { packets, bytes: 10 * packets };
        assert_eq!(of(7).since(of(3)), of(4));
        assert_eq!(of(2).since(of(3)), of(2));
    }
}
