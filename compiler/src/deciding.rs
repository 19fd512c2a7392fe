//! `deciding`: the rules as they decide a packet, without what they record of it.
//!
//! A program leaves packets to the kernel whose way through the rules shows: in a log, a counter of a rate, a list of
//! addresses. Who asks what becomes of a packet wants to know what follows. Here actions that leave the packet as it is
//! do nothing, and tests of what only the kernel keeps are merely unknown. Rules and chains keep their numbers, so what
//! is traced of these rules is true of the others.

use std::collections::BTreeSet;

use polc_ir::env::Mode;
use polc_ir::field::Field;
use polc_ir::ruleset::{Action, ClauseKind, EffectTestKind, Opaque, Ruleset};

/// The rules without what they record. In replace mode, `nth` counts in the program itself.
pub fn deciding(ruleset: &Ruleset, mode: Mode) -> Ruleset {
    let tested = tested(ruleset);
    // Which may be computed from any other.
    let any_derived = tested.iter().any(|field| matches!(field, Field::Derived(_)));
    let mut deciding = ruleset.clone();
    for rule in deciding.rules.values_mut() {
        for clause in &mut rule.clauses {
            match &mut clause.kind {
                ClauseKind::Opaque(opaque) => opaque.observable = false,
                ClauseKind::Effect(test) => {
                    if let Some(kept) = kept(ruleset.effect_tests[*test].kind, mode) {
                        clause.kind = ClauseKind::Opaque(Box::new(kept));
                    }
                }
                ClauseKind::Any(_) | ClauseKind::Hotdrop(_) | ClauseKind::Doom(_) | ClauseKind::Beyond(_) => {
                }
            }
        }
        // Whatever the rules ask of a packet, they find it as it was; the mark is told with the verdict.
        let open = |field: &Field| *field == Field::Mark || tested.contains(field) || any_derived;
        if matches!(&rule.action, Action::Effect { writes, .. } if !writes.iter().any(open)) {
            rule.action = Action::Continue;
        }
    }
    deciding
}

/// The fields that rules test.
fn tested(ruleset: &Ruleset) -> BTreeSet<Field> {
    let clauses = ruleset.rules.values().flat_map(|rule| &rule.clauses);
    clauses.flat_map(|clause| clause.kind.tests()).map(|test| test.field).collect()
}

/// What stands for a test whose state the kernel's own rule keeps.
fn kept(kind: EffectTestKind, mode: Mode) -> Option<Opaque> {
    let (name, reason) = match (kind, mode) {
        (EffectTestKind::Limit { .. }, _) => ("limit", "depends on the credit that other packets have left"),
        (EffectTestKind::Nth { .. }, Mode::Accelerate) => {
            ("statistic", "depends on how many packets came before")
        }
        (EffectTestKind::Random { .. }, Mode::Accelerate) => ("statistic", "depends on chance"),
        (EffectTestKind::Nth { .. } | EffectTestKind::Random { .. }, Mode::Replace) => return None,
    };
    Some(Opaque { name: name.into(), reason: reason.into(), observable: false })
}

#[cfg(test)]
mod tests {
    use polc_ir::source::SourceMap;

    use super::*;
    use crate::session::{ReadOptions, Session};

    fn actions(text: &str) -> Vec<bool> {
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", text);
        let session = Session::read(sources, file, &[], &ReadOptions::default());
        assert!(!session.has_errors(), "{:?}", session.diagnostics);
        let deciding = deciding(&session.ruleset, Mode::Accelerate);
        deciding.rules.values().map(|rule| rule.action == Action::Continue).collect()
    }

    #[test]
    fn what_changes_a_packet_stays() {
        let changes = "-A FORWARD -p tcp -m tcp --tcp-flags SYN SYN -j TCPMSS --clamp-mss-to-pmtu\n\
            -A FORWARD -j CONNMARK --restore-mark\n-A FORWARD -j NFLOG\n";
        assert_eq!(actions(&format!("*mangle\n{changes}COMMIT\n")), [true, false, true]);
        let asked =
            "-A FORWARD -p tcp -m tcp --tcp-option 2 -j DROP\n-A FORWARD -m length --length 40 -j DROP\n";
        assert_eq!(
            actions(&format!("*mangle\n{changes}{asked}COMMIT\n")),
            [false, false, true, false, false]
        );
    }
}
