//! `Ruleset`: what a packet filter means, without a syntax.
//!
//! Base chains sit on hooks, rules sit in chains; a rule is an ordered list of clauses and an action. The order of
//! clauses is part of the meaning: a clause may drop the packet (hotdrop) or spend state (limit) before a later one
//! fails. `eval` runs a packet through a path of hooks exactly as x_tables does (net/ipv4/netfilter/ip_tables.c,
//! `ipt_do_table`) and is the definition that every lower level has to equal.

pub mod deferral;
mod eval;
mod print;

pub use eval::{Behind, Event, Truth};

use std::sync::Arc;

use cranelift_entity::PrimaryMap;
use serde::{Deserialize, Serialize};

use crate::cube::Test;
use crate::derived::DerivedData;
use crate::entities::{Chain, Derived, EffectTest, Rule, Set, Table};
use crate::field::Field;
use crate::hook::{Family, Hook, Semantics, TableKind};
use crate::set::SetData;
use crate::source::Span;

/// The tables, chains, rules and sets of one address family.
#[derive(Clone, Debug)]
pub struct Ruleset {
    /// The address family of every rule.
    pub family: Family,
    /// Whose corner cases the clauses were lowered for.
    pub semantics: Semantics,
    /// The tables, in file order.
    pub tables: PrimaryMap<Table, TableData>,
    /// The chains of all tables, in file order.
    pub chains: PrimaryMap<Chain, ChainData>,
    /// The rules of all chains, in source order.
    pub rules: PrimaryMap<Rule, RuleData>,
    /// The sets that rules refer to.
    pub sets: PrimaryMap<Set, SetData>,
    /// The computed fields that rules test.
    pub derived: PrimaryMap<Derived, DerivedData>,
    /// The stateful and random tests. Each belongs to one clause of one rule, since its state does.
    pub effect_tests: PrimaryMap<EffectTest, EffectTestData>,
}

/// A table.
#[derive(Clone, Debug)]
pub struct TableData {
    /// Which table it is.
    pub kind: TableKind,
    /// The line that opens it.
    pub span: Span,
    /// Its chains, in file order.
    pub chains: Vec<Chain>,
}

/// Packets and bytes seen, as `iptables-save -c` prints them. Bytes count from the network header on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// How many packets.
    pub packets: u64,
    /// How many bytes.
    pub bytes: u64,
}

/// What a base chain does with packets that no rule decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Let the packet on.
    Accept,
    /// Drop it.
    Drop,
}

/// What makes a chain a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseChain {
    /// Where the chain sits.
    pub hook: Hook,
    /// What happens to packets that no rule decided.
    pub policy: Policy,
}

/// A chain.
#[derive(Clone, Debug)]
pub struct ChainData {
    /// The user's name for it.
    pub name: String,
    /// The table it belongs to.
    pub table: Table,
    /// Set for the chains that the kernel enters by itself.
    pub base: Option<BaseChain>,
    /// The rules, in order.
    pub rules: Vec<Rule>,
    /// The counters the dump gave (a base chain's policy; 0 otherwise).
    pub counters: Counters,
    /// The line that declares it.
    pub span: Span,
}

/// A rule.
#[derive(Clone, Debug)]
pub struct RuleData {
    /// The chain it is in.
    pub chain: Chain,
    /// Position in the chain, counted from 1 as iptables does.
    pub number: u32,
    /// The rule's line.
    pub span: Span,
    /// What must hold for the rule to match, evaluated in order until one clause fails.
    pub clauses: Vec<Clause>,
    /// What happens to packets that match.
    pub action: Action,
    /// Text of the action in the source (`-j DROP`); the rule's end if it has none.
    pub action_span: Span,
    /// The counters the dump gave.
    pub counters: Counters,
}

/// One condition of a rule and where the user wrote it.
#[derive(Clone, Debug)]
pub struct Clause {
    /// What is asked.
    pub kind: ClauseKind,
    /// The user's text for it.
    pub span: Span,
}

/// What a clause asks. Clauses take most of a rule set's memory, so tests are shared ([`crate::cube::TestLists`]) and
/// what is rare is boxed.
#[derive(Clone, Debug)]
pub enum ClauseKind {
    /// Holds if any of the tests does (mostly there is exactly one).
    Any(Arc<[Test]>),
    /// Drops the packet here, whatever the rule's action is, if all the tests hold; holds otherwise. This is
    /// x_tables' hotdrop (include/linux/netfilter/x_tables.h, `struct xt_action_param`).
    Hotdrop(Arc<[Test]>),
    /// Dooms the packet if all the tests hold; holds in any case. What is doomed is dropped once the rule has been gone
    /// through: the clauses that follow are asked, the rule counts the packet if they hold, and its action is taken but
    /// for the verdict ([`Action::of_doomed`]). This is hotdrop in a part of a match whose result the match inverts, so
    /// that x_tables goes on with the rule (`ipt_do_table` looks at `hotdrop` between rules alone).
    Doom(Arc<[Test]>),
    /// Leaves the packet to the kernel if the test holds; holds otherwise. The test is of a derived field that was not
    /// searched to its end, because the packet holds more than the bounds of [`crate::limits`] allow.
    Beyond(Box<Test>),
    /// Holds if the stateful or random test does. Evaluated only if every earlier clause held.
    Effect(EffectTest),
    /// A condition that needs what no level here has. Its truth is unknown to everything but the kernel.
    Opaque(Box<Opaque>),
}

impl ClauseKind {
    /// What it asks of the packet, whether or not all of it has to hold.
    pub fn tests(&self) -> &[Test] {
        match self {
            ClauseKind::Any(tests) | ClauseKind::Hotdrop(tests) | ClauseKind::Doom(tests) => tests,
            ClauseKind::Beyond(test) => std::slice::from_ref(test),
            ClauseKind::Effect(_) | ClauseKind::Opaque(_) => &[],
        }
    }

    /// The tests on all of which the packet is dropped, whatever the rule's action is.
    pub fn drops_if(&self) -> Option<&[Test]> {
        match self {
            ClauseKind::Hotdrop(tests) | ClauseKind::Doom(tests) => Some(tests),
            _ => None,
        }
    }
}

/// A match or target that can't be evaluated here, by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Opaque {
    /// The extension's name (`string`, `NFQUEUE`).
    pub name: String,
    /// Why it can't be evaluated, as the end of a sentence: "searches the payload".
    pub reason: String,
    /// Whether evaluating it can be observed afterwards (`recent` writes a list, `connlimit` counts): then the kernel
    /// must see the packet.
    pub observable: bool,
}

/// A stateful or random test.
#[derive(Clone, Debug, PartialEq)]
pub struct EffectTestData {
    /// The rule it belongs to.
    pub rule: Rule,
    /// What it does.
    pub kind: EffectTestKind,
    /// Whether the clause holds where the test doesn't.
    pub negate: bool,
}

/// The kinds of stateful and random tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EffectTestKind {
    /// xt_statistic's random mode: holds if a random number of 31 bits is below `probability`
    /// (net/netfilter/xt_statistic.c).
    Random {
        /// In units of 2^-31.
        probability: u32,
    },
    /// xt_statistic's nth mode: a counter that starts at `initial`; a packet that finds it at `every` holds and sets
    /// it to 0, any other adds 1 (net/netfilter/xt_statistic.c).
    Nth {
        /// The value at which a packet holds: the user's `--every` less 1.
        every: u32,
        /// The counter's first value.
        initial: u32,
    },
    /// A token bucket, as xt_limit has it (net/netfilter/xt_limit.c).
    Limit {
        /// Time for one packet's credit, in units of 0.1 ms.
        average: u32,
        /// The bucket's size in packets.
        burst: u32,
    },
}

/// What happens to a packet that matches a rule.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Nothing: the rule only counts.
    Continue,
    /// Leave the base chain; the packet goes on to the next one.
    Accept,
    /// Leave the base chain as a packet that its hook does not see: the rules at the head of chains that tell packets for
    /// this host from those for others, where a place has the hooks of both.
    Pass,
    /// Drop the packet.
    Drop,
    /// Drop it and answer.
    Reject(RejectWith),
    /// Go through another chain of the same table, and come back to the next rule.
    Jump(Chain),
    /// Go through another chain of the same table, and come back to where this chain would.
    Goto(Chain),
    /// Leave the chain; in a base chain, take the policy.
    Return,
    /// Change a field, and go on with the next rule.
    Write(Write),
    /// Something only the kernel does, after which the next rule runs (`LOG`, `CLASSIFY`, `TCPMSS`).
    Effect {
        /// What, and why it isn't done here.
        what: Opaque,
        /// Fields that have another value afterwards.
        writes: Vec<Field>,
        /// Names of sets that may hold other elements afterwards.
        sets: Vec<String>,
    },
    /// Something only the kernel does, after which the packet's fate is open (`DNAT`, `NFQUEUE`, `TPROXY`).
    Steal(Opaque),
}

impl Action {
    /// Whether it ends the packet's way through the base chain itself.
    pub fn ends(&self) -> bool {
        matches!(self, Action::Accept | Action::Pass | Action::Drop | Action::Reject(_))
    }

    /// What is left of it for a packet that is doomed ([`ClauseKind::Doom`]): it is dropped, and others than the packet
    /// may still be told.
    pub fn of_doomed(&self) -> &Action {
        match self {
            Action::Reject(_) | Action::Effect { .. } | Action::Steal(_) => self,
            _ => &Action::Drop,
        }
    }
}

/// A change of a field: `value' = (value & !clear) ^ xor`, which is how netfilter writes marks
/// (net/netfilter/xt_mark.c) and TOS (net/netfilter/xt_DSCP.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Write {
    /// The field.
    pub field: Field,
    /// The bits set to 0 first.
    pub clear: u128,
    /// The bits inverted then.
    pub xor: u128,
}

impl Write {
    /// The field's new value.
    pub fn apply(&self, value: u128) -> u128 {
        (value & !self.clear) ^ self.xor
    }
}

/// How REJECT answers (include/uapi/linux/netfilter_ipv4/ipt_REJECT.h and .../netfilter_ipv6/ip6t_REJECT.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RejectWith {
    /// An ICMP or ICMPv6 error of this type and code.
    Icmp {
        /// The ICMP type.
        kind: u8,
        /// The ICMP code.
        code: u8,
    },
    /// A TCP reset.
    TcpReset,
}

impl Ruleset {
    /// An empty rule set.
    pub fn new(family: Family, semantics: Semantics) -> Ruleset {
        Ruleset {
            family,
            semantics,
            tables: PrimaryMap::new(),
            chains: PrimaryMap::new(),
            rules: PrimaryMap::new(),
            sets: PrimaryMap::new(),
            derived: PrimaryMap::new(),
            effect_tests: PrimaryMap::new(),
        }
    }

    /// The base chains that a packet passes on `hook`, in order of priority. Chains of `nat` are among them.
    pub fn base_chains(&self, hook: Hook) -> Vec<Chain> {
        let mut chains: Vec<(i32, Chain)> = self
            .chains
            .iter()
            .filter(|(_, chain)| chain.base.is_some_and(|base| base.hook == hook))
            .map(|(id, chain)| (self.tables[chain.table].kind.priority(hook), id))
            .collect();
        chains.sort_unstable();
        chains.into_iter().map(|(_, chain)| chain).collect()
    }

    /// The derived field with this meaning, added if it is new.
    pub fn derive(&mut self, data: DerivedData) -> Derived {
        if let Some((found, _)) = self.derived.iter().find(|(_, have)| **have == data) {
            return found;
        }
        self.derived.push(data)
    }
}
