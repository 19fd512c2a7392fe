//! The passes, in order.

use polc_ir::classifier::Classifier;
use polc_ir::decision::Decision;
use polc_ir::diag::Diagnostic;
use polc_ir::env::{Env, Place};
use polc_ir::plan::Plan;
use polc_ir::ruleset::Ruleset;

use crate::beyond::Beyond;
use crate::bound::{bound, first_deep, too_deep};
use crate::decide::decide;
use crate::flatten::flatten;
use crate::reach::Reach;
use crate::select::{Devices, Prefer, select, structure, structure_begun};
use crate::simplify::simplify;
use crate::split::split;

/// A rule set at every level down to the plan.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Stages of cubes.
    pub classifier: Classifier,
    /// How each stage is decided.
    pub decision: Decision,
    /// What the program does.
    pub plan: Plan,
    /// What was found on the way.
    pub diagnostics: Vec<Diagnostic>,
    /// How far packets get in the rules.
    pub reach: Reach,
}

/// Compiles a rule set for a place, down to the plan.
///
/// # Panics
/// If a pass breaks an invariant of its level: that is a bug of this crate.
pub fn compile(ruleset: &Ruleset, place: &Place, env: &Env, devices: &Devices) -> Compiled {
    compile_with(ruleset, place, env, devices, Prefer::Cheapest)
}

/// Like [`compile`], with a preference for how stages are decided.
///
/// # Panics
/// As [`compile`].
pub fn compile_with(
    ruleset: &Ruleset,
    place: &Place,
    env: &Env,
    devices: &Devices,
    prefer: Prefer,
) -> Compiled {
    let mut diagnostics = Vec::new();
    let flat = flatten(ruleset, place, env, &mut diagnostics);
    assert_eq!(flat.verify(), Vec::<String>::new(), "flatten makes a well-formed classifier");
    let mut beyond = Beyond::default();
    let mut reach = Reach::new(ruleset, &flat, &mut beyond);
    let classifier = simplify(split(flat));
    assert_eq!(classifier.verify(), Vec::<String>::new(), "simplify leaves a well-formed classifier");
    let (mut classifier, mut structures) = structure(classifier, devices, prefer);
    assert_eq!(classifier.verify(), Vec::<String>::new(), "structure leaves a well-formed classifier");
    let mut decision = decide(&classifier, &structures.walked);
    if let Some(stage) = first_deep(&classifier, &decision, &structures)
        && let Some(begun) = structure_begun(&classifier, &structures, stage, devices)
    {
        (classifier, structures) = begun;
        assert_eq!(classifier.verify(), Vec::<String>::new(), "structure leaves a well-formed classifier");
        decision = decide(&classifier, &structures.walked);
    }
    // Structures differ where less is left, and with them how deep stages lie.
    let mut is_bounded = false;
    loop {
        let (bounded, is_met) = bound(ruleset, classifier, &decision, &structures, &mut beyond);
        classifier = bounded;
        if !is_met {
            break;
        }
        is_bounded = true;
        assert_eq!(classifier.verify(), Vec::<String>::new(), "bound leaves a well-formed classifier");
        (classifier, structures) = structure(classifier, devices, prefer);
        decision = decide(&classifier, &structures.walked);
    }
    if is_bounded {
        diagnostics.push(too_deep(ruleset, &beyond));
        // Few rule sets meet the bound; the others need not keep what they are made from.
        reach = Reach::new(ruleset, &flatten(ruleset, place, env, &mut Vec::new()), &mut beyond);
    }
    assert_eq!(decision.verify(&classifier), Vec::<String>::new(), "decide makes a well-formed decision");
    let plan = select(&classifier, &decision, structures);
    assert_eq!(plan.verify(), Vec::<String>::new(), "select makes a well-formed plan");
    Compiled { classifier, decision, plan, diagnostics, reach }
}
