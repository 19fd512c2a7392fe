//! `guard`: rules that a running host adds in front of the user's, before anything is compiled.
//!
//! They are ordinary rules of the rule set's meaning, so every level treats them like the others and nothing below knows
//! of them. They stand at the head of a base chain with number 0, which no rule of the user's has.

use polc_ir::cube::Test;
use polc_ir::entities::{Chain, Rule};
use polc_ir::env::{Attach, Env, Mode, Place};
use polc_ir::field::Field;
use polc_ir::hook::{Family, Hook, TableKind};
use polc_ir::interval::{Interval, IntervalSet};
use polc_ir::ruleset::{Action, Clause, ClauseKind, Opaque, RuleData, Ruleset};

/// The number of rules added here.
pub const GUARD_NUMBER: u32 = 0;

/// What a rule that was added here does, in a few words.
pub fn what(rule: &RuleData) -> &'static str {
    match &rule.action {
        Action::Pass => "not a packet of this hook",
        Action::Steal(Opaque { name, .. }) if name == REWRITTEN => "rewritten by the kernel's rules before",
        _ => "DHCP, left to packet sockets",
    }
}

/// Name of what [`leave_rewritten`] adds.
const REWRITTEN: &str = "rewritten";

/// Leaves every packet to the kernel that its rules let leave, if they rewrite packets: a program at tc's egress sees what
/// came of it, not what the rules saw.
pub fn leave_rewritten(ruleset: &mut Ruleset, place: &Place) {
    if place.attach != Some(Attach::TcEgress) || place.mode != Mode::Accelerate || !ruleset.rewrites() {
        return;
    }
    let Some(chain) = first_filtering(ruleset, place) else { return };
    let what = Opaque {
        name: REWRITTEN.into(),
        reason: "has been through rules that change packets".into(),
        observable: false,
    };
    add(ruleset, chain, Vec::new(), Action::Steal(what));
}

/// The first base chain of a path that may drop. Chains of nat don't, and a rule there that leaves a packet to the kernel
/// is taken for a translation.
fn first_filtering(ruleset: &Ruleset, place: &Place) -> Option<Chain> {
    let is_nat = |chain: &Chain| ruleset.tables[ruleset.chains[*chain].table].kind == TableKind::Nat;
    ruleset.path_chains(place).into_iter().find(|chain| !is_nat(chain))
}

const UDP: u128 = 17;
/// Ports of DHCP and DHCPv6, servers and clients (RFC 2131, section 4.1; RFC 8415, section 7.2).
const DHCP_PORTS: (u128, u128) = (67, 68);
const DHCPV6_PORTS: (u128, u128) = (546, 547);

/// Leaves DHCP to the kernel. Packet sockets, which DHCP clients read, see frames before any rule of the kernel's, so a
/// rule that drops DHCP harms no client; a program at XDP or tc that does so would.
pub fn keep_dhcp(ruleset: &mut Ruleset, place: &Place) {
    let Some(chain) = first_filtering(ruleset, place) else { return };
    let (lo, hi) = match ruleset.family {
        Family::V4 => DHCP_PORTS,
        Family::V6 => DHCPV6_PORTS,
    };
    let tests = [
        Test::new(Field::Proto, ruleset.family, IntervalSet::point(UDP)),
        Test::new(Field::DstPort, ruleset.family, IntervalSet::range(lo, hi)),
    ];
    let what = Opaque {
        name: "keep".into(),
        reason: "is DHCP, which packet sockets read".into(),
        observable: false,
    };
    add(ruleset, chain, tests.into(), Action::Steal(what));
}

/// Lets only packets for this host meet the rules on INPUT, and only others those on FORWARD, as routing does
/// (net/ipv4/route.c, `ip_route_input_rcu`; net/ipv6/route.c). A destination is for this host if it is a local, broadcast
/// or multicast address, or if both addresses are 0.0.0.0. `env` gives the host's addresses; without them nothing is done.
pub fn split_local(ruleset: &mut Ruleset, place: &Place, env: &Env) {
    let Some(local) = &env.local else { return };
    let multicast = match ruleset.family {
        // 224.0.0.0/4, and the limited broadcast address.
        Family::V4 => [Interval::new(0xe000_0000, 0xefff_ffff), Interval::new(0xffff_ffff, 0xffff_ffff)],
        // ff00::/8; IPv6 has no broadcast.
        Family::V6 => [Interval::new(0xff << 120, u128::MAX), None],
    };
    let own: IntervalSet =
        local.iter().chain(&env.broadcast).copied().chain(multicast.into_iter().flatten()).collect();
    let to_host = Test::new(Field::DstAddr, ruleset.family, own);
    let to_others = to_host.negated(ruleset.family);
    // A host that has no address yet asks all others for one (net/ipv4/route.c, `ip_route_input_slow`, `brd_input`).
    let zero = |field| Test::new(field, ruleset.family, IntervalSet::point(0));
    let nameless = match ruleset.family {
        Family::V4 => vec![zero(Field::SrcAddr), zero(Field::DstAddr)],
        Family::V6 => Vec::new(),
    };
    let named: Vec<Test> = nameless.iter().map(|test| test.negated(ruleset.family)).collect();
    for chain in ruleset.path_chains(place) {
        match ruleset.chains[chain].base.map(|base| base.hook) {
            Some(Hook::Input) => {
                let mut clauses = vec![vec![to_others.clone()]];
                clauses.extend((!named.is_empty()).then(|| named.clone()));
                add_any(ruleset, chain, clauses, Action::Pass);
            }
            Some(Hook::Forward) => {
                if !nameless.is_empty() {
                    add(ruleset, chain, nameless.clone(), Action::Pass);
                }
                add(ruleset, chain, vec![to_host.clone()], Action::Pass);
            }
            _ => {}
        }
    }
}

/// Adds a rule for packets of which all the tests hold.
fn add(ruleset: &mut Ruleset, chain: Chain, tests: Vec<Test>, action: Action) {
    add_any(ruleset, chain, tests.into_iter().map(|test| vec![test]).collect(), action);
}

/// Adds a rule for packets of which one test of each clause holds.
fn add_any(ruleset: &mut Ruleset, chain: Chain, clauses: Vec<Vec<Test>>, action: Action) {
    let span = ruleset.chains[chain].span;
    let clauses =
        clauses.into_iter().map(|tests| Clause { kind: ClauseKind::Any(tests.into()), span }).collect();
    let rule: Rule = ruleset.rules.push(RuleData {
        chain,
        number: GUARD_NUMBER,
        span,
        clauses,
        action,
        action_span: span,
        counters: Default::default(),
    });
    ruleset.chains[chain].rules.insert(0, rule);
}
