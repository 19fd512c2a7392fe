//! Deferrals: what a rule needs that its place does not offer.
//!
//! One definition serves the evaluator, the flattener and the report, so that "compiled" means the same everywhere. A
//! clause that can't be evaluated is *unknown*; an action that can't be taken hands the packet to the kernel.

use std::collections::BTreeSet;
use std::fmt;

use crate::cube::Test;
use crate::derived::DerivedData;
use crate::env::{Attach, Connections, Fragments, Mode, Place, ct_state};
use crate::field::Field;
use crate::hook::{Family, Hook};
use crate::ruleset::{Action, Clause, ClauseKind, EffectTestKind, RuleData, Ruleset};
use crate::set::{DimensionKind, SetContents};
use crate::source::Span;

const LOCAL_ADDRESSES: &str = "the host's local addresses were not given";

/// Why a clause or action is not evaluated.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Deferral {
    /// The place does not give the field.
    Field {
        /// The field.
        field: Field,
        /// What is missing, as the end of a sentence.
        reason: &'static str,
    },
    /// The contents of a set named here were not given.
    UnknownSet(String),
    /// Rules change the elements of a set named here.
    ChangedSet(String),
    /// The elements of a set named here leave it by themselves.
    ExpiringSet(String),
    /// A match or target that nothing here evaluates.
    Opaque {
        /// Its name.
        name: String,
        /// Why, as the end of a sentence.
        reason: String,
    },
    /// A stateful test whose state the kernel's own rules keep.
    Stateful(&'static str),
}

impl Deferral {
    /// What who runs polc can give so that the clause is evaluated after all.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Deferral::UnknownSet(_) => Some("give what `ipset save` prints with `--ipset FILE`"),
            Deferral::Field { field: Field::Derived(_), reason: LOCAL_ADDRESSES } => {
                Some("give each address of the host with `--local ADDR`")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Deferral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Deferral::Field { reason, .. } => f.write_str(reason),
            Deferral::UnknownSet(name) => write!(f, "the contents of set `{name}` were not given"),
            Deferral::ChangedSet(name) => {
                write!(f, "rules change the elements of set `{name}`, which the kernel's own set has")
            }
            Deferral::ExpiringSet(name) => {
                write!(f, "elements of set `{name}` have timeouts, which the kernel's own set keeps")
            }
            Deferral::Opaque { name, reason } => write!(f, "`{name}` {reason}"),
            Deferral::Stateful(reason) => f.write_str(reason),
        }
    }
}

/// How a clause is evaluated at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClauseAbility {
    /// Its truth can be worked out.
    Known,
    /// Its truth is unknown, and looking at it leaves no trace in the kernel.
    Unknown(Deferral),
    /// Its truth is unknown, and the kernel must see every packet that gets as far.
    Observable(Deferral),
}

/// Whether a place gives a field. `fragment` asks for packets that are fragments.
pub fn field_deferral(ruleset: &Ruleset, place: &Place, field: Field, fragment: bool) -> Option<Deferral> {
    let missing = |reason| Some(Deferral::Field { field, reason });
    if fragment && place.fragments == Fragments::Unresolved && field.changes_with_reassembly(ruleset.family) {
        // The reassembled packet is not a fragment any more, which is all that `-f` asks.
        if field != Field::FragOffset || !always_reassembles(ruleset.family, place) {
            return missing("a fragment does not tell; the rules may see the reassembled packet");
        }
    }
    match field {
        Field::CtState | Field::CtStatus | Field::CtDirection | Field::CtMark
            if place.connections == Connections::State =>
        {
            missing(match field {
                Field::CtStatus | Field::CtMark => {
                    "at a netfilter hook a packet carries its connection's state; status and mark are in the kernel's record of it, which programs are not given there"
                }
                _ => "at a netfilter hook a packet's connection is asked for its state alone",
            })
        }
        Field::CtState | Field::CtStatus | Field::CtDirection | Field::CtMark
            if place.connections != Connections::Given =>
        {
            missing("connection state is not given here")
        }
        Field::OutDevice if matches!(place.attach, Some(Attach::Xdp | Attach::TcIngress)) => {
            missing("the output device is not known before routing")
        }
        // net/ipv4/ip_forward.c counts the hop before the hook; at the hook itself (no attach) the packet is as given.
        Field::Ttl
            if place.path.contains(&Hook::Forward)
                && matches!(place.attach, Some(Attach::Xdp | Attach::TcIngress)) =>
        {
            missing("forwarding takes one hop off before the rules see it")
        }
        Field::SrcMac | Field::DstMac if place.attach == Some(Attach::TcEgress) => {
            missing("the frame's addresses are no longer the received ones")
        }
        Field::SrcMac | Field::DstMac if place.attach == Some(Attach::Netfilter) => missing(
            "a program at a netfilter hook is given packets, not frames: whether there is an Ethernet header before one, and where, only the kernel's own match asks",
        ),
        Field::PacketType if place.attach == Some(Attach::TcEgress) => {
            missing("the packet type is no longer the received one")
        }
        Field::Derived(derived) => match &ruleset.derived[derived] {
            DerivedData::AddressType { device, .. } if !place.local_addresses || device.is_some() => {
                if device.is_some() {
                    missing("which device an address belongs to is not known here")
                } else {
                    missing(LOCAL_ADDRESSES)
                }
            }
            DerivedData::AddressType { .. } => None,
            DerivedData::Member { set, ends, .. } => set_deferral(ruleset, place, *set, ends, fragment),
            // The rest are computed from the transport header or the IPv6 extension headers.
            _ if fragment && place.fragments == Fragments::Unresolved => {
                missing("a fragment does not tell; the rules may see the reassembled packet")
            }
            DerivedData::U32(program) => {
                let changed = changed_header_bytes(ruleset, place);
                if program.reads(ruleset.family, &changed) {
                    missing("bytes that it reads may change before the rules see them")
                } else {
                    None
                }
            }
            _ => None,
        },
        _ => None,
    }
}

/// Whether a packet that the rules can't decide here is dropped rather than left to the kernel: in replace mode there
/// are no other rules, and what else can't be decided is refused before.
pub fn drops_undecided(place: &Place, fragment: bool) -> bool {
    fragment && place.mode == Mode::Replace && place.fragments == Fragments::Unresolved
}

/// Whether the rules of a place see no fragments. IPv4 for this host is reassembled before INPUT
/// (net/ipv4/ip_input.c, `ip_local_deliver`), and IPv6 behind it; elsewhere it depends on whether connections are tracked.
fn always_reassembles(family: Family, place: &Place) -> bool {
    family == Family::V4 && place.path == [Hook::Input]
}

/// Offsets of bytes of the network header that may have other values when the rules of a place see the packet than where
/// the program does: forwarding counts the hop (net/ipv4/ip_forward.c), and rules write.
fn changed_header_bytes(ruleset: &Ruleset, place: &Place) -> Vec<u32> {
    let writes = ruleset.rules.values().filter_map(|rule| match &rule.action {
        Action::Write(write) => Some(write.field),
        _ => None,
    });
    let mut fields: BTreeSet<Field> = writes.collect();
    if place.path.contains(&Hook::Forward) && matches!(place.attach, Some(Attach::Xdp | Attach::TcIngress)) {
        fields.insert(Field::Ttl);
    }
    let bytes = fields.into_iter().map(|field| -> &[u32] {
        match (ruleset.family, field) {
            // With the checksum.
            (Family::V4, Field::Tos) => &[1, 10, 11],
            (Family::V4, Field::Ttl) => &[8, 10, 11],
            (Family::V6, Field::Tos) => &[0, 1],
            (Family::V6, Field::Ttl) => &[7],
            _ => &[],
        }
    });
    bytes.flatten().copied().collect()
}

fn set_deferral(
    ruleset: &Ruleset,
    place: &Place,
    set: crate::entities::Set,
    ends: &[crate::field::End],
    fragment: bool,
) -> Option<Deferral> {
    use crate::field::End;
    let data = &ruleset.sets[set];
    if data.changed && place.mode == Mode::Accelerate {
        return Some(Deferral::ChangedSet(data.name.clone()));
    }
    match &data.contents {
        SetContents::Unknown if data.create.is_empty() => {
            return Some(Deferral::UnknownSet(data.name.clone()));
        }
        SetContents::Unknown => {
            let reason = "is a set whose elements are not compiled".into();
            return Some(Deferral::Opaque { name: data.name.clone(), reason });
        }
        // ipset forbids lists in lists (net/netfilter/ipset/ip_set_list_set.c), and so does lowering: one level.
        SetContents::Sets(members) => {
            return members
                .iter()
                .filter(|member| !matches!(ruleset.sets[**member].contents, SetContents::Sets(_)))
                .find_map(|member| set_deferral(ruleset, place, *member, ends, fragment));
        }
        SetContents::Elements(_) => {}
    }
    // The kernel's own set forgets elements while a program still has them.
    if data.expires && place.mode == Mode::Accelerate {
        return Some(Deferral::ExpiringSet(data.name.clone()));
    }
    data.dimensions.iter().zip(ends).find_map(|(dimension, end)| {
        let field = match (dimension, end) {
            (DimensionKind::Address | DimensionKind::Net, end) => Field::address(*end),
            (DimensionKind::Port, end) => Field::port(*end),
            (DimensionKind::Device, End::Src) => Field::InDevice,
            (DimensionKind::Device, End::Dst) => Field::OutDevice,
            (DimensionKind::Mac, End::Src) => Field::SrcMac,
            (DimensionKind::Mac, End::Dst) => Field::DstMac,
            // Membership is worked out once, before the first rule.
            (DimensionKind::Mark, _) if writes_marks(ruleset) => {
                return Some(Deferral::Field {
                    field: Field::Mark,
                    reason: "the rules may change the mark before the set is asked",
                });
            }
            (DimensionKind::Mark, _) => Field::Mark,
        };
        field_deferral(ruleset, place, field, fragment)
    })
}

fn writes_marks(ruleset: &Ruleset) -> bool {
    ruleset
        .rules
        .values()
        .any(|rule| matches!(&rule.action, Action::Write(write) if write.field == Field::Mark))
}

/// How a clause is evaluated at a place, for fragments or for whole packets.
pub fn clause_ability(ruleset: &Ruleset, place: &Place, clause: &Clause, fragment: bool) -> ClauseAbility {
    let fields_of = |tests: &[Test]| {
        tests.iter().filter(|test| !is_carried(place, test)).find_map(
            |test| match is_fixed_without_connection(place, test, fragment) {
                Some(true) => None,
                Some(false) => Some(Deferral::Field {
                    field: test.field,
                    reason: "packets without a connection may have more than one state",
                }),
                None => field_deferral(ruleset, place, test.field, fragment),
            },
        )
    };
    match &clause.kind {
        ClauseKind::Any(_) | ClauseKind::Hotdrop(_) | ClauseKind::Doom(_) | ClauseKind::Beyond(_) => {
            match fields_of(clause.kind.tests()) {
                Some(deferral) => ClauseAbility::Unknown(deferral),
                None => ClauseAbility::Known,
            }
        }
        ClauseKind::Effect(test) => match (ruleset.effect_tests[*test].kind, place.mode) {
            (EffectTestKind::Limit { .. }, _) => ClauseAbility::Observable(Deferral::Stateful(
                "a rate limit spends credit that only the kernel's own rule keeps",
            )),
            (EffectTestKind::Random { .. }, Mode::Accelerate) => ClauseAbility::Unknown(Deferral::Stateful(
                "the kernel's own rule draws its own random number",
            )),
            (EffectTestKind::Nth { .. }, Mode::Accelerate) => {
                ClauseAbility::Observable(Deferral::Stateful("the kernel's own rule keeps the counter"))
            }
            (_, Mode::Replace) => ClauseAbility::Known,
        },
        ClauseKind::Opaque(opaque) => {
            let deferral = Deferral::Opaque { name: opaque.name.clone(), reason: opaque.reason.clone() };
            if opaque.observable {
                ClauseAbility::Observable(deferral)
            } else {
                ClauseAbility::Unknown(deferral)
            }
        }
    }
}

/// Whether a test asks for nothing of a connection but the state that packets carry.
fn is_carried(place: &Place, test: &Test) -> bool {
    let translated = u128::from(ct_state::SNAT | ct_state::DNAT);
    place.connections == Connections::State && test.field == Field::CtState && test.mask & translated == 0
}

/// The states that a packet may have of which the kernel's table has no connection. The first stands for all of them in
/// tests on which they agree.
fn states_without_connection(expectations: bool) -> impl Iterator<Item = u16> {
    let states = [ct_state::NEW, ct_state::INVALID, ct_state::UNTRACKED];
    let related = expectations.then_some(ct_state::RELATED);
    states.into_iter().chain(related).flat_map(|state| {
        [0, ct_state::SNAT, ct_state::DNAT, ct_state::SNAT | ct_state::DNAT].map(|nat| state | nat)
    })
}

/// Whether a test gives the same for every packet without a connection; `None` if it asks no state that is looked up.
fn is_fixed_without_connection(place: &Place, test: &Test, fragment: bool) -> Option<bool> {
    match place.connections {
        Connections::LookedUp { expectations } if test.field == Field::CtState && !fragment => {
            let mut states = states_without_connection(expectations).map(|state| test.holds(state.into()));
            let first = states.next();
            Some(states.all(|holds| Some(holds) == first))
        }
        _ => None,
    }
}

/// The state that rules see where connections are looked up; see [`supposes`].
pub const SUPPOSED_STATE: u16 = ct_state::NEW;

/// Whether a clause is evaluated as for a packet without a connection, whether or not it has one.
pub fn supposes(place: &Place, clause: &Clause, fragment: bool) -> bool {
    clause.kind.tests().iter().any(|test| is_fixed_without_connection(place, test, fragment) == Some(true))
}

/// Why an action hands the packet to the kernel, if it does.
pub fn action_deferral(place: &Place, action: &Action) -> Option<Deferral> {
    match action {
        Action::Effect { what, .. } | Action::Steal(what) => {
            Some(Deferral::Opaque { name: what.name.clone(), reason: what.reason.clone() })
        }
        Action::Write(write) if place.mode == Mode::Replace && write.field != Field::Mark => {
            Some(Deferral::Field { field: write.field, reason: "the packet's bytes are not rewritten here" })
        }
        Action::Write(_) if place.mode == Mode::Replace && place.attach == Some(Attach::Xdp) => {
            Some(Deferral::Field { field: Field::Mark, reason: "a frame has no mark at XDP" })
        }
        // The kernel's verifier lets such a program read `struct sk_buff` only (net/netfilter/nf_bpf_link.c).
        Action::Write(_) if place.mode == Mode::Replace && place.attach == Some(Attach::Netfilter) => {
            Some(Deferral::Field {
                field: Field::Mark,
                reason: "a program at a netfilter hook can't write a packet's mark",
            })
        }
        // What it may call is listed in net/netfilter/nf_bpf_link.c and by who registers functions for
        // `BPF_PROG_TYPE_NETFILTER` (as of Linux 6.18): nothing there sends a packet.
        Action::Reject(_) if place.mode == Mode::Replace && place.attach == Some(Attach::Netfilter) => {
            Some(Deferral::Opaque {
                name: "REJECT".into(),
                reason:
                    "answers packets, for which the kernel gives a program at a netfilter hook no function"
                        .into(),
            })
        }
        Action::Reject(_) if place.mode == Mode::Replace => Some(Deferral::Opaque {
            name: "REJECT".into(),
            reason: "answers packets, which no program here does yet".into(),
        }),
        _ => None,
    }
}

/// Whether a packet is left to the kernel by a rule that matches it.
///
/// Beside what the place does not offer, that is everything but a drop where it is not certain that the packet gets
/// there: in a chain that was only possibly jumped to (`hypothetical`), or behind a rule that may have dropped it
/// (`doubt`), where an answer might be sent twice.
pub fn is_handed_over(place: &Place, action: &Action, hypothetical: bool, doubt: bool) -> bool {
    action_deferral(place, action).is_some()
        || match action {
            Action::Accept | Action::Pass | Action::Write(_) => hypothetical,
            Action::Reject(_) => hypothetical || doubt,
            _ => false,
        }
}

/// The first thing about a rule that its place does not offer for whole packets, and where the user wrote it.
pub fn rule_deferral(ruleset: &Ruleset, place: &Place, rule: &RuleData) -> Option<(Span, Deferral)> {
    clause_deferral(ruleset, place, rule, false)
        .or_else(|| action_deferral(place, &rule.action).map(|deferral| (rule.action_span, deferral)))
}

/// The same of its clauses alone, for fragments or for whole packets.
pub fn clause_deferral(
    ruleset: &Ruleset,
    place: &Place,
    rule: &RuleData,
    fragment: bool,
) -> Option<(Span, Deferral)> {
    rule.clauses.iter().find_map(|clause| match clause_ability(ruleset, place, clause, fragment) {
        ClauseAbility::Known => None,
        ClauseAbility::Unknown(deferral) | ClauseAbility::Observable(deferral) => {
            Some((clause.span, deferral))
        }
    })
}
