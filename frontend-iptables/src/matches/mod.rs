//! The match extensions: one entry each, grouped by what they look at.

mod account;
mod bpf;
mod connection;
mod host;
mod network;
mod opaque;
mod pattern;
mod policy;
mod rateest;
mod rates;
mod time;
mod transport;
mod u32;

use std::collections::HashMap;
use std::sync::LazyLock;

use polc_ir::hook::Family;

use crate::extension::{Entry, Extension};

pub(crate) use network::parse_tos;

/// Every match, by group.
pub const ALL: &[&[Extension]] = &[
    transport::ALL,
    network::ALL,
    connection::ALL,
    account::ALL,
    host::ALL,
    rates::ALL,
    pattern::ALL,
    policy::ALL,
    time::ALL,
    u32::ALL,
    bpf::ALL,
    rateest::ALL,
    opaque::ALL,
];

static ENTRIES: LazyLock<Vec<Entry>> = LazyLock::new(|| Entry::table(ALL));

/// Every match, as the line parser sees it.
pub fn entries() -> impl Iterator<Item = &'static Entry> {
    ENTRIES.iter()
}

static BY_NAME: LazyLock<HashMap<(&'static str, Family), &'static Entry>> = LazyLock::new(|| {
    let mut names = HashMap::new();
    for entry in entries() {
        for family in
            [Family::V4, Family::V6].into_iter().filter(|family| entry.spec.families.contains(*family))
        {
            names.insert((entry.spec.name, family), entry);
        }
    }
    names
});

/// The match of this name in a family. `icmpv6` and `icmp6` are one match.
pub fn find(name: &str, family: Family) -> Option<&'static Entry> {
    let name = match name {
        "icmpv6" | "ipv6-icmp" => "icmp6",
        name => name,
    };
    BY_NAME.get(&(name, family)).copied()
}
