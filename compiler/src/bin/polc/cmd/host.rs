//! What an applied policy relies on: the kernel's own rules and sets, and the host around them.
//!
//! x_tables tells nobody when rules change, so they are read as the kernel's own tools print them and compared in
//! canonical form ([`polc::agree`]). The rest is asked of the kernel: addresses and devices over rtnetlink, tables of
//! nf_tables over nfnetlink, expected connections in /proc.

use std::path::Path;
use std::process::Command;

use polc::agree::{self, Difference};
use polc::session::Session;
use polc_backend_ebpf::kernel_api::{KernelField, KernelFunction};
use polc_frontend_iptables::ast::Dump;
use polc_frontend_iptables::ipset::{self, Sets};
use polc_frontend_iptables::{ParseOptions, parse, print};
use polc_ir::diag::Diagnostic;
use polc_ir::env::{Attach, Connections};
use polc_ir::field::Field;
use polc_ir::hook::{Family, Hook, Semantics};
use polc_ir::ruleset::ClauseKind;
use polc_ir::source::SourceMap;
use polc_ir::source::bytes::to_text;
use polc_loader::kernel_types::KernelTypes;
use polc_loader::sys::Sys;
use polc_loader::{Error, coexist, net, nft};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// Tables of nf_tables that iptables-nft keeps its rules in, and prints.
const IPTABLES_TABLES: [&str; 5] = ["raw", "mangle", "nat", "filter", "security"];

/// The host as a policy was compiled for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Surroundings {
    /// The host's own and broadcast addresses, as ranges; none if the user gave them.
    pub addresses: Option<Vec<String>>,
    /// Number of the device; 0 for netfilter's hooks.
    pub ifindex: u32,
    /// Number of the device that takes its packets.
    pub master: Option<u32>,
    /// Names and numbers of all devices; none where a program sees those of one alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<(String, u32)>,
    /// Whether connections are announced.
    pub expectations: bool,
}

impl Surroundings {
    /// As they are now. `addresses`: whether they come from the kernel.
    ///
    /// # Errors
    /// The device is not there, or the kernel does not tell.
    pub(super) fn now(
        sys: &Sys,
        family: Family,
        device: Option<&str>,
        addresses: bool,
    ) -> Result<Surroundings, Failure> {
        let devices = net::devices(sys)?;
        let all = devices.iter().map(|device| (device.name.clone(), device.ifindex));
        let all = if device.is_none() { all.collect() } else { Vec::new() };
        let device = device.map(|name| net::find(&devices, name)).transpose()?;
        let addresses = match addresses {
            true => {
                let found = net::addresses(sys, family)?;
                let range = |what: &str, range: &polc_ir::interval::Interval| {
                    let address = |value| net::address(value, family);
                    format!("{what} {}-{}", address(range.lo()), address(range.hi()))
                };
                let local = found.local.iter().map(|one| range("local", one));
                let broadcast = found.broadcast.iter().map(|one| range("broadcast", one));
                let by_policy =
                    found.by_policy.iter().map(|(one, table)| range(&format!("table {table}"), one));
                Some(local.chain(broadcast).chain(by_policy).collect())
            }
            false => None,
        };
        Ok(Surroundings {
            addresses,
            ifindex: device.map_or(0, |device| device.ifindex),
            master: device.and_then(|device| coexist::upper(device, &devices)).map(|upper| upper.ifindex),
            devices: all,
            expectations: expectations(),
        })
    }
}

/// Whether the first packet of a connection may be RELATED: connections are announced now, or helpers are given to
/// connections without being asked for (`net.netfilter.nf_conntrack_helper`, gone since Linux 6.0).
fn expectations() -> bool {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let tracking = Path::new("/proc/sys/net/netfilter/nf_conntrack_max").exists();
    let announced = match read("/proc/self/net/nf_conntrack_expect") {
        Some(text) => !text.trim().is_empty(),
        None => tracking,
    };
    announced || read("/proc/sys/net/netfilter/nf_conntrack_helper").is_some_and(|text| text.trim() == "1")
}

/// What a program at netfilter can know of connections, if its priority is not before `first`: packets carry their state
/// once they are tracked (net/netfilter/nf_conntrack_proto.c), which is before INPUT, FORWARD and POSTROUTING.
pub(super) fn carried(session: &Session, path: &[Hook], first: i32) -> Connections {
    const TRACKING: i32 = -200;
    let tracked =
        first > TRACKING || !path.iter().any(|hook| matches!(hook, Hook::Prerouting | Hook::Output));
    let KernelField { structure, name } = KernelField::SKB_CONNECTION;
    let known = || KernelTypes::read().is_ok_and(|types| types.field_offset(structure, name).is_ok());
    if tracked && asks_state(session) && known() { Connections::State } else { Connections::Unknown }
}

/// Whether rules ask for the state of connections.
fn asks_state(session: &Session) -> bool {
    session.ruleset.rules.values().flat_map(|rule| &rule.clauses).any(|clause| match &clause.kind {
        ClauseKind::Any(tests) => tests.iter().any(|test| test.field == Field::CtState),
        _ => false,
    })
}

/// What a program can know of connections here: what the kernel tells, if the rules ask and it has a way to tell.
pub(super) fn connections(session: &Session, attach: Attach, surroundings: &Surroundings) -> Connections {
    let ruleset = &session.ruleset;
    // So does whether replies are translated.
    let asks = asks_state(session)
        || ruleset.base_chains(Hook::Prerouting).into_iter().any(|chain| ruleset.translates(chain));
    let function = match attach {
        Attach::Xdp => KernelFunction::XdpCtLookup,
        Attach::TcIngress => KernelFunction::SkbCtLookup,
        _ => return Connections::Unknown,
    };
    let has = |types: &KernelTypes| {
        [function, KernelFunction::CtRelease].iter().all(|function| types.function(function.name()).is_ok())
    };
    if !asks || !KernelTypes::read().is_ok_and(has) {
        return Connections::Unknown;
    }
    let helpers = print(&session.dump, false).contains(" --helper ");
    Connections::LookedUp { expectations: helpers || surroundings.expectations }
}

/// Why the kernel's rules do not bear out what a rule set with these sets says, if they don't.
pub(super) fn disagreement(sys: &Sys, session: &Session, sets: &[Sets]) -> Result<Option<String>, Failure> {
    let family = session.family();
    let prefix = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    let legacy = saved(&[&format!("{prefix}-legacy-save")])?;
    let nft = saved(&[&format!("{prefix}-nft-save")])?;
    // Where the tools are not told apart, there is one kind of rules.
    let (legacy, nft) = match (legacy, nft) {
        (None, None) => (saved(&[&format!("{prefix}-save")])?, None),
        both => both,
    };
    if legacy.is_none() && nft.is_none() {
        let source = std::io::Error::from(std::io::ErrorKind::NotFound);
        return Err(Error::Call { what: format!("run `{prefix}-save` to compare the rules"), source }.into());
    }
    if let Some(text) = nft.iter().flat_map(|text| text.lines()).find(|line| line.contains("is incompatible"))
    {
        return Ok(Some(text.trim_start_matches("# ").to_string()));
    }
    let (own, other) = match session.ruleset.semantics {
        Semantics::Nft if nft.is_some() => (nft, legacy),
        Semantics::Legacy | Semantics::Nft => (legacy.clone().or_else(|| nft.clone()), legacy.and(nft)),
    };
    let found = agree::rules(&session.dump, &dump(&own.unwrap_or_default(), family))
        .or_else(|| agree::anything(&dump(&other.unwrap_or_default(), family)))
        .map(|difference| difference.to_string());
    if found.is_some() {
        return Ok(found);
    }
    let foreign = nft::tables(sys)?.into_iter().find(|table| {
        let known = matches!(table.family_name(), "ip" | "ip6") && IPTABLES_TABLES.contains(&&*table.name);
        let sees = match family {
            Family::V4 => ["ip", "inet", "netdev"],
            Family::V6 => ["ip6", "inet", "netdev"],
        };
        !known && sees.contains(&table.family_name())
    });
    if let Some(table) = foreign {
        return Ok(Some(format!("nf_tables has `table {} {}`", table.family_name(), table.name)));
    }
    Ok(set_difference(sets)?.map(|difference| difference.to_string()))
}

/// The first difference between sets that were given and the kernel's.
fn set_difference(given: &[Sets]) -> Result<Option<Difference>, Failure> {
    if given.is_empty() {
        return Ok(None);
    }
    let Some(live) = saved(&["ipset", "save"])? else {
        let source = std::io::Error::from(std::io::ErrorKind::NotFound);
        return Err(Error::Call { what: "run `ipset` to compare the sets".into(), source }.into());
    };
    let (live, _) = sets(&live);
    Ok(given.iter().find_map(|given| agree::sets(given, &live)))
}

/// The sets of a text, and what there is to say about it.
pub(super) fn sets(text: &str) -> (Sets, Vec<Diagnostic>) {
    let mut sources = SourceMap::new();
    let file = sources.add("sets", text);
    ipset::parse(&sources, file)
}

/// The rules of a text, as far as they can be read.
pub(super) fn dump(text: &str, family: Family) -> Dump {
    let mut sources = SourceMap::new();
    let file = sources.add("the kernel's rules", text);
    parse(&sources, file, &ParseOptions { family: Some(family), ..ParseOptions::default() }).0
}

/// What a command prints; none if there is no such command.
fn saved(command: &[&str]) -> Result<Option<String>, Failure> {
    let what = || format!("run `{}`", command.join(" "));
    let output = match Command::new(command[0]).args(&command[1..]).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        output => output.map_err(Error::call(what()))?,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(Error::call(what())(std::io::Error::other(said)).into());
    }
    Ok(Some(to_text(output.stdout)))
}
