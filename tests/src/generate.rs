//! Strategies for rule sets: text that iptables would take, made so that rules meet.
//!
//! Values come from small pools, so that rules overlap, hide and contradict each other. What fails shrinks by rule, by
//! clause and towards the first of each pool.

use std::fmt::Write as _;
use std::ops::Range;

use polc::Compiled;
use polc::place::{attach_for, devices_of, place};
use polc::select::{Devices, Prefer};
use polc_backend_ebpf::emit::{self, emit};
use polc_backend_ebpf::object::Object;
use polc_frontend_iptables::{ParseOptions, ipset, lower, parse};
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::env::{Connections, Counting, Env, Mode, Place};
use polc_ir::hook::{Family, Hook, Semantics};
use polc_ir::ruleset::Ruleset;
use polc_ir::source::SourceMap;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::levels::target;

/// Matches for either family.
const EITHER: &[&str] = &[
    "-m comment --comment x",
    "-i eth0",
    "! -i eth+",
    "-m mark --mark 0x1/0x3",
    "-m mark ! --mark 0x2",
    "-m length --length 0:60",
    "-m length ! --length 40:1400",
    "-m dscp --dscp 0x2e",
    "-m tos --tos 0x10/0x3f",
    "-m ecn --ecn-ip-ect 1",
    "-m pkttype --pkt-type multicast",
    "-m mac --mac-source 02:00:00:00:00:01",
    "-m addrtype --dst-type MULTICAST",
    "-m addrtype ! --src-type LOCAL",
    "-m state --state ESTABLISHED",
    "-m state --state RELATED,ESTABLISHED",
    "-m conntrack ! --ctstate ESTABLISHED",
    "-m conntrack --ctstate NEW",
    "-m conntrack --ctstate NEW,RELATED",
    "-m conntrack --ctstate INVALID,UNTRACKED",
    "-m limit --limit 1/s",
    "-m string --algo bm --string x",
    "-m statistic --mode random --probability 0.5",
    "-m statistic --mode random ! --probability 0.3",
    "-m statistic --mode nth ! --every 3 --packet 0",
    "-m statistic --mode nth --every 3 --packet 1",
    "-m u32 --u32 4&0xFFFF=0:1024",
    "-m set --match-set hosts src",
    "-m set ! --match-set hosts dst",
    "-m set --match-set nets src",
    "-m set --match-set nets dst --return-nomatch",
    "-m set --match-set services dst,dst",
    "-m set ! --match-set services src,src",
    "-m set --match-set ports dst",
    "-m set --match-set behind src,src",
    "-m set --match-set all src",
];

const V4: &[&str] = &[
    "-s 10.0.0.0/8",
    "! -s 10.1.0.0/16",
    "-d 192.0.2.0/255.255.0.255",
    "-d 192.0.2.7",
    "-m iprange --src-range 10.0.0.5-10.3.0.7",
    "-m iprange ! --dst-range 192.0.2.0-192.0.2.9",
    "-m ttl --ttl-gt 63",
    "-m ttl ! --ttl-eq 1",
    "-f",
    "! -f",
    "-m u32 --u32 \"0>>22&0x3C@0&0xFFFF=0:1024\"",
];

const V6: &[&str] = &[
    "-s 2001:db8::/32",
    "! -s 2001:db8:1::/48",
    "-d 2001:db8::7",
    "-d 2001:db8::1/ffff:ffff::ffff",
    "-m iprange --src-range 2001:db8::5-2001:db8:3::7",
    "-m hl --hl-gt 63",
    "-m hl ! --hl-eq 255",
    "-m frag --fragfirst",
    "-m rt --rt-type 0",
    "-m hbh --hbh-len 8",
    "-m dst --dst-len 8",
    "-m ipv6header --header hop-by-hop --soft",
    "-m ipv6header --header frag,prot",
];

const TRANSPORT_EITHER: &[&str] = &[
    "",
    "-p tcp",
    "! -p udp",
    "-p tcp -m tcp --dport 22",
    "-p tcp -m tcp --sport 1024:65535 ! --dport 80",
    "-p tcp -m tcp --syn",
    "-p tcp -m tcp ! --tcp-flags SYN,RST,ACK RST",
    "-p tcp -m tcp --tcp-option 8",
    "-p tcp -m tcp ! --tcp-option 3",
    "-p udp -m udp --dport 53",
    "-p udp -m udp ! --sport 53",
    "-p udp -m multiport --ports 53,123,1000:2000",
    "-p tcp -m multiport ! --dports 22,80",
    "-p sctp -m sctp --dport 5",
    "-p sctp -m sctp --chunk-types any INIT,DATA",
    "-p sctp -m sctp ! --chunk-types all INIT,DATA",
    "-p dccp -m dccp --dccp-types REQUEST,INVALID",
    "-p dccp -m dccp --dccp-option 38",
    "-p dccp -m dccp ! --dccp-option 38",
    "-p esp -m esp --espspi 1:9",
];

const TRANSPORT_V4: &[&str] =
    &["-p icmp -m icmp --icmp-type 8", "-p icmp -m icmp ! --icmp-type 3/1", "-p ah -m ah --ahspi 3"];

const TRANSPORT_V6: &[&str] = &[
    "-p ipv6-icmp -m icmp6 --icmpv6-type 128",
    "-p ipv6-icmp -m icmp6 ! --icmpv6-type 1/4",
    "-m ah --ahspi 3 --ahres",
];

const TARGETS: &[&str] = &[
    "",
    "-j ACCEPT",
    "-j DROP",
    "-j RETURN",
    "-j MARK --set-xmark 0x1/0x3",
    "-j MARK --and-mark 0x2",
    "-j REJECT",
    "-j LOG",
];

/// The sets that the matches name, of each kind that differs in how it is looked up.
const SETS_V4: &str = "create hosts hash:ip family inet\n\
    add hosts 10.0.0.5\nadd hosts 192.0.2.7\n\
    create nets hash:net family inet\n\
    add nets 10.0.0.0/8\nadd nets 10.1.0.0/16 nomatch\nadd nets 192.0.2.0/24\n\
    create services hash:ip,port family inet\n\
    add services 192.0.2.7,tcp:22\nadd services 192.0.2.7,udp:53\n\
    create ports bitmap:port range 0-1024\n\
    add ports 22\nadd ports 53-80\n\
    create behind hash:net,iface family inet\n\
    add behind 10.0.0.0/8,eth0\nadd behind 10.1.0.0/16,eth1\n\
    create all list:set\n\
    add all hosts\nadd all nets\n";

const SETS_V6: &str = "create hosts hash:ip family inet6\n\
    add hosts 2001:db8::5\nadd hosts 2001:db8::7\n\
    create nets hash:net family inet6\n\
    add nets 2001:db8::/32\nadd nets 2001:db8:1::/48 nomatch\n\
    create services hash:ip,port family inet6\n\
    add services 2001:db8::7,tcp:22\nadd services 2001:db8::7,udp:53\n\
    create ports bitmap:port range 0-1024\n\
    add ports 22\nadd ports 53-80\n\
    create behind hash:net,iface family inet6\n\
    add behind 2001:db8::/32,eth0\nadd behind 2001:db8:1::/48,eth1\n\
    create all list:set\n\
    add all hosts\nadd all nets\n";

/// A rule set, and how it is compiled.
#[derive(Clone, Debug)]
pub struct Case {
    /// The address family.
    pub family: Family,
    /// The hook of its base chain.
    pub hook: Hook,
    /// Whose meaning short headers have.
    pub semantics: Semantics,
    /// How it is deployed.
    pub mode: Mode,
    /// What is known of connections.
    pub connections: Connections,
    /// What packets are counted for.
    pub counters: Counting,
    /// How stages are decided: every structure gets its share, whatever the cost model thinks of small rule sets.
    pub prefer: Prefer,
    /// The base chain's policy.
    pub policy: &'static str,
    /// The rules of the base chain, then those of each user chain.
    pub chains: Vec<Vec<RuleText>>,
}

/// A rule as it is written, without its chain.
#[derive(Clone, Debug)]
pub struct RuleText {
    /// Matches that have no protocol.
    pub matches: Vec<&'static str>,
    /// Protocol and transport match.
    pub transport: &'static str,
    /// What happens.
    pub target: Target,
}

/// What a rule does.
#[derive(Clone, Debug)]
pub enum Target {
    /// Something other than going to a chain.
    Fixed(&'static str),
    /// Goes to a later user chain: so many further, modulo how many there are. A rule of the last one only counts.
    Chain {
        /// `-j` or `-g`.
        option: &'static str,
        /// How many further.
        further: usize,
    },
}

impl Case {
    /// The dump.
    pub fn dump(&self) -> String {
        let base = self.hook.chain_name();
        let users = self.chains.len() - 1;
        let mut text = format!("*filter\n:{base} {} [0:0]\n", self.policy);
        for user in 0..users {
            _ = writeln!(text, ":u{user} - [0:0]");
        }
        for (from, rules) in self.chains.iter().enumerate() {
            let name = if from == 0 { base.to_string() } else { format!("u{}", from - 1) };
            for rule in rules {
                _ = write!(text, "-A {name}");
                for (index, one) in rule.matches.iter().enumerate() {
                    if !repeats(one, &rule.matches[..index]) && fits(one, self.hook) {
                        _ = write!(text, " {one}");
                    }
                }
                for words in [rule.transport, &rule.target.text(from, users)] {
                    if !words.is_empty() {
                        _ = write!(text, " {words}");
                    }
                }
                text.push('\n');
            }
        }
        text + "COMMIT\n"
    }

    /// The ipset file that goes with it.
    pub fn sets(&self) -> &'static str {
        match self.family {
            Family::V4 => SETS_V4,
            Family::V6 => SETS_V6,
        }
    }
}

/// What a rule set is, and what it was compiled to.
pub struct Built {
    /// The rules.
    pub ruleset: Ruleset,
    /// Where they run.
    pub place: Place,
    /// Their devices.
    pub devices: Devices,
    /// What was compiled from them.
    pub compiled: Compiled,
    /// The emitted program, or why there is none.
    pub object: Result<Object, Vec<Diagnostic>>,
}

impl Case {
    /// Compiles the rule set and emits its program.
    ///
    /// # Errors
    ///
    /// What the front end has against the text.
    pub fn build(&self) -> Result<Built, String> {
        let mut sources = SourceMap::new();
        let file = sources.add("random", self.dump());
        let options = ParseOptions { family: Some(self.family), ..ParseOptions::default() };
        let (dump, diagnostics) = parse(&sources, file, &options);
        let set_file = sources.add("sets", self.sets());
        let (sets, set_diagnostics) = ipset::parse(&sources, set_file);
        let mut found = diagnostics.iter().chain(&set_diagnostics);
        if let Some(error) = found.find(|diagnostic| diagnostic.severity == Severity::Error) {
            return Err(format!("{error:?}"));
        }
        let ruleset = lower(&dump, &[sets], self.semantics);
        let attach = attach_for(self.hook);
        let mut place = place(&[self.hook], attach, self.mode, false);
        place.connections = self.connections;
        place.counters = self.counters;
        let devices = Devices { declared: devices_of(&ruleset), ..Devices::default() };
        let compiled = polc::compile_with(&ruleset, &place, &Env::default(), &devices, self.prefer);
        let object = emit(&compiled.plan, &emit::Target { semantics: self.semantics, ..target(attach) });
        Ok(Built { ruleset, place, devices, compiled, object })
    }
}

impl Target {
    fn text(&self, from: usize, users: usize) -> String {
        match self {
            Target::Fixed(words) => (*words).to_string(),
            // User chains lead forward only: from the base chain to all, from each to those behind it.
            Target::Chain { option, further } if from < users => {
                format!("{option} u{}", from + further % (users - from))
            }
            Target::Chain { .. } => String::new(),
        }
    }
}

/// Whether an option that can be given once, or the very same match, was there before.
fn repeats(one: &str, before: &[&str]) -> bool {
    let option = |words: &str| {
        let mut words = words.trim_start_matches("! ").split(' ');
        match (words.next(), words.next()) {
            (Some("-m"), Some(name)) => format!("-m {name}"),
            (first, _) => first.unwrap_or_default().to_string(),
        }
    };
    before.iter().any(|earlier| option(earlier) == option(one))
}

/// Whether a chain that the base chain's hook reaches takes the match: OUTPUT has no input device, and no MAC address
/// that a packet came from.
fn fits(one: &str, hook: Hook) -> bool {
    hook != Hook::Output || !(one.contains("-i ") || one.contains("-m mac "))
}

fn rule(family: Family) -> impl Strategy<Value = RuleText> {
    let (matches, transports) = match family {
        Family::V4 => ([EITHER, V4].concat(), [TRANSPORT_EITHER, TRANSPORT_V4].concat()),
        Family::V6 => ([EITHER, V6].concat(), [TRANSPORT_EITHER, TRANSPORT_V6].concat()),
    };
    let chain =
        (select(vec!["-j", "-g"]), 0usize..4).prop_map(|(option, further)| Target::Chain { option, further });
    let target = prop_oneof![3 => select(TARGETS).prop_map(Target::Fixed), 1 => chain];
    (vec(select(matches), 0..3), select(transports), target)
        .prop_map(|(matches, transport, target)| RuleText { matches, transport, target })
}

/// How a rule set is deployed. Connections are looked up only where the kernel's rules stay.
fn mode() -> impl Strategy<Value = (Mode, Connections)> {
    let known = vec![
        Connections::Unknown,
        Connections::LookedUp { expectations: false },
        Connections::LookedUp { expectations: true },
    ];
    let accelerated = select(known).prop_map(|connections| (Mode::Accelerate, connections));
    prop_oneof![accelerated, Just((Mode::Replace, Connections::Unknown))]
}

/// A rule set with a base chain and up to three user chains, of a few rules each.
pub fn case() -> impl Strategy<Value = Case> {
    case_of(0..7)
}

/// The same with so many rules in each chain.
pub fn case_of(rules: Range<usize>) -> impl Strategy<Value = Case> {
    select(vec![Family::V4, Family::V6]).prop_flat_map(move |family| {
        (
            select(vec![Hook::Input, Hook::Forward, Hook::Output]),
            select(vec![Semantics::Legacy, Semantics::Nft]),
            mode(),
            select(vec![Counting::Exact, Counting::Terminal, Counting::Exact, Counting::Off]),
            select(vec![
                Prefer::Linear,
                Prefer::Matrix,
                Prefer::Groups,
                Prefer::Parts,
                Prefer::Walk,
                Prefer::Cheapest,
            ]),
            select(vec!["ACCEPT", "DROP"]),
            vec(vec(rule(family), rules.clone()), 1..5),
        )
            .prop_map(
                move |(hook, semantics, (mode, connections), counters, prefer, policy, chains)| Case {
                    family,
                    hook,
                    semantics,
                    mode,
                    // Programs on the way out can't look connections up.
                    connections: if hook == Hook::Output { Connections::Unknown } else { connections },
                    counters,
                    prefer,
                    policy,
                    chains,
                },
            )
    })
}
