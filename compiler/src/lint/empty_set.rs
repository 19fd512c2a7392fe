//! Rules that ask for membership in a set that has no elements, and so match nothing (or, negated, everything).

use polc_ir::derived::DerivedData;
use polc_ir::diag::Diagnostic;
use polc_ir::field::Field;
use polc_ir::ruleset::{Clause, ClauseKind, Ruleset};
use polc_ir::set::SetContents;

use super::EMPTY_SET;

pub(super) fn find(ruleset: &Ruleset) -> impl Iterator<Item = Diagnostic> {
    let clauses = ruleset.rules.values().flat_map(|rule| &rule.clauses);
    clauses.filter_map(move |clause| asks_empty(ruleset, clause))
}

fn asks_empty(ruleset: &Ruleset, clause: &Clause) -> Option<Diagnostic> {
    let ClauseKind::Any(tests) = &clause.kind else { return None };
    let [test] = &**tests else { return None };
    let Field::Derived(derived) = test.field else { return None };
    let DerivedData::Member { set, .. } = ruleset.derived[derived] else { return None };
    let data = &ruleset.sets[set];
    let empty = match &data.contents {
        SetContents::Elements(elements) => elements.is_empty() && !data.changed,
        // What rules add to a list goes to a set in it: to an empty one, nowhere.
        SetContents::Sets(members) => members.is_empty(),
        SetContents::Unknown => false,
    };
    let effect = if test.holds(0) { "this holds for every packet" } else { "the rule never matches" };
    // Members of the other family were left out.
    let (what, hint) = match &data.contents {
        SetContents::Sets(_) => (
            format!("list `{}` has no set with {} addresses", data.name, ruleset.family),
            "add a set of the rules' own family to the list, or remove the rule",
        ),
        _ => (
            format!("set `{}` has no elements", data.name),
            "give the set's elements in the ipset file, or remove the rule",
        ),
    };
    empty.then(|| {
        Diagnostic::warning(EMPTY_SET, format!("{what}, so {effect}"), clause.span)
            .with_label(data.span, "created here")
            .with_hint(hint)
    })
}
