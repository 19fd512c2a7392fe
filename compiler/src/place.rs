//! Where programs sit for each hook, and the devices that a check invents.
//!
//! A frame that arrives passes PREROUTING, then INPUT if it is for this host; one that leaves passes OUTPUT if this
//! host made it, then POSTROUTING. Those are the default paths. Whether an arriving frame is for this host is not
//! worked out by the program: whoever compiles for FORWARD names the hooks. At netfilter a program sits on one hook and
//! runs that hook's chains alone, on packets as they are there.

use std::collections::BTreeSet;

use polc_ir::derived::DerivedData;
use polc_ir::env::{Attach, Connections, Counting, Device, Fragments, Mode, Place};
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::{Hook, TableKind};
use polc_ir::ruleset::Ruleset;
use polc_ir::set::{DimensionKind, DimensionValue, SetContents, leaves};

/// The attach point that sees a hook's packets: XDP before routing, tc where the device they leave by is known.
pub fn attach_for(hook: Hook) -> Attach {
    match hook {
        Hook::Prerouting | Hook::Input | Hook::Forward => Attach::Xdp,
        Hook::Output | Hook::Postrouting => Attach::TcEgress,
    }
}

/// The attach point at which most of what a hook's rules test is known: receive for PREROUTING and INPUT; transmit,
/// where the output device is known, for the others. Rules are accounted for there unless the user names a place.
pub fn best_attach(hook: Hook) -> Attach {
    match hook {
        Hook::Prerouting | Hook::Input => Attach::TcIngress,
        Hook::Forward | Hook::Output | Hook::Postrouting => Attach::TcEgress,
    }
}

/// The hooks that an attach point stands for unless the user names others.
pub fn default_path(attach: Attach) -> Vec<Hook> {
    match attach {
        Attach::Xdp | Attach::TcIngress => vec![Hook::Prerouting, Hook::Input],
        Attach::TcEgress => vec![Hook::Output, Hook::Postrouting],
        Attach::Netfilter => vec![Hook::Input],
    }
}

/// The hooks that packets pass until the last one named: those that arrive pass PREROUTING first, which matters where the
/// rules there, or connections that `nat` translates, change what the others see.
pub fn whole_way(ruleset: &Ruleset, path: &[Hook], attach: Attach) -> Vec<Hook> {
    let arrives = matches!(attach, Attach::Xdp | Attach::TcIngress);
    let is_behind = matches!(path, [Hook::Input | Hook::Forward, ..]);
    let first = if arrives && is_behind && ruleset.rewrites() { &[Hook::Prerouting][..] } else { &[] };
    first.iter().chain(path).copied().collect()
}

/// The hooks that packets pass, in order, from where they arrive or are made.
const ARRIVING: [&[Hook]; 2] =
    [&[Hook::Prerouting, Hook::Input], &[Hook::Prerouting, Hook::Forward, Hook::Postrouting]];
const LEAVING: [&[Hook]; 2] = [&[Hook::Output, Hook::Postrouting], &[Hook::Forward, Hook::Postrouting]];
/// The same where a rule in front of INPUT and FORWARD tells whom packets are for ([`crate::guard::split_local`]).
const TOLD_APART: [&[Hook]; 1] = [&[Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Postrouting]];

/// Why no packet at an attach point, or anywhere, passes these hooks in this order, if so. `told_apart`: packets for this
/// host are told from others, so that a path may have the hooks of both.
pub fn refusal(path: &[Hook], attach: Option<Attach>, told_apart: bool) -> Option<String> {
    let ways: Vec<&[Hook]> = match attach {
        Some(Attach::Netfilter) if path.len() == 1 => return None,
        Some(Attach::Netfilter) => {
            return Some(format!(
                "a program at netfilter sits on one hook, and {} are named; give --hook once",
                path.len()
            ));
        }
        Some(Attach::Xdp | Attach::TcIngress) if told_apart => TOLD_APART.to_vec(),
        Some(Attach::Xdp | Attach::TcIngress) => ARRIVING.to_vec(),
        Some(Attach::TcEgress) => LEAVING.to_vec(),
        None => [ARRIVING, LEAVING].concat(),
    };
    let passes = |way: &&[Hook]| {
        let mut way = way.iter();
        path.iter().all(|hook| way.any(|passed| passed == hook))
    };
    if ways.iter().any(passes) {
        return None;
    }
    let list = |hooks: &[Hook]| hooks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" > ");
    let at = attach.map_or(String::new(), |attach| format!(" at {attach}"));
    let ways: Vec<String> = ways.iter().map(|way| list(way)).collect();
    Some(format!("no packet{at} passes {}; the ways are {}", list(path), ways.join(" and ")))
}

/// Priority of the first table whose chain a place runs: a program on the kernel's hook that stands for the chains comes
/// before it. Where there are none, the filter table's.
pub fn first_priority(ruleset: &Ruleset, place: &Place) -> i32 {
    let chains = ruleset.path_chains(place);
    let priorities = chains.iter().filter_map(|&chain| {
        let data = &ruleset.chains[chain];
        Some(ruleset.tables[data.table].kind.priority(data.base?.hook))
    });
    priorities.min().unwrap_or(TableKind::Filter.priority(Hook::Input))
}

/// The place of a program that decides the chains of `path`.
pub fn place(path: &[Hook], attach: Attach, mode: Mode, local_addresses: bool) -> Place {
    Place {
        path: path.to_vec(),
        attach: Some(attach),
        mode,
        // At a hook a program meets what the hook's chains meet, reassembled or not.
        fragments: match attach {
            Attach::Netfilter => Fragments::AsSeen,
            Attach::Xdp | Attach::TcIngress | Attach::TcEgress => Fragments::Unresolved,
        },
        connections: Connections::Unknown,
        local_addresses,
        counters: Counting::Exact,
    }
}

/// Elements of a set that are looked through for names of devices.
const SET_DEVICES_MAX: usize = 256;

/// A device for every name that rules mention, or the first elements of their sets, and one that none does, with made-up
/// numbers.
pub fn devices_of(ruleset: &Ruleset) -> Vec<Device> {
    let mut names: BTreeSet<DeviceName> = BTreeSet::new();
    let clauses = ruleset.rules.values().flat_map(|rule| &rule.clauses);
    for clause in clauses {
        let tests = clause.kind.tests().iter();
        for test in tests.filter(|test| matches!(test.field, Field::InDevice | Field::OutDevice)) {
            for interval in test.values.intervals() {
                // A prefix stands for itself: `eth` is a name that `eth+` fits.
                for value in [interval.lo(), interval.hi()] {
                    let name = DeviceName::from_value(value);
                    if DeviceName::new(&name.to_string()) == Some(name) {
                        names.insert(name);
                    }
                }
            }
        }
    }
    let asked = ruleset.derived.values().filter_map(|derived| match derived {
        DerivedData::Member { set, .. } => Some(leaves(&ruleset.sets, *set)),
        _ => None,
    });
    for set in asked.flatten() {
        let SetContents::Elements(elements) = &ruleset.sets[set].contents else { continue };
        if ruleset.sets[set].dimensions.contains(&DimensionKind::Device) {
            let values = elements.iter().take(SET_DEVICES_MAX).flat_map(|element| element.values);
            names.extend(values.filter_map(|value| match value {
                DimensionValue::Device(name) => Some(name),
                _ => None,
            }));
        }
    }
    names.extend(DeviceName::new("polc-other"));
    names.into_iter().zip(1..).map(|(name, ifindex)| Device { ifindex, name }).collect()
}
