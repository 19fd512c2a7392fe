//! From a session to an object: the passes, emission, and the budget that the kernel's verifier sets.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use polc_backend_ebpf::budget::Budget;
use polc_backend_ebpf::emit::{KEY_TOO_LARGE, Target, emit, key_words_max};
use polc_backend_ebpf::manifest::Counted;
use polc_backend_ebpf::object::Object;
use polc_frontend_iptables::print;
use polc_ir::diag::{Code, Diagnostic};
use polc_ir::entities::{Chain, Rule};
use polc_ir::env::{Attach, Env, Place};
use polc_ir::field::Field;
use polc_ir::plan::KeySlot;

use crate::decider::{chain_name, rule_line};
use crate::save::rule_lines;
use crate::select::Devices;
use crate::session::Session;
use crate::{Compiled, compile};

/// Code of an object that can't be written: an invariant of the object's format is broken.
pub const NOT_WRITTEN: Code = Code(530);

/// Name of the program in an object.
pub const PROGRAM_NAME: &str = "polc";

/// An object and what it was made of.
#[derive(Clone, Debug)]
pub struct Built {
    /// The levels down to the plan.
    pub compiled: Compiled,
    /// The object.
    pub object: Object,
    /// What the kernel's verifier will spend on each of its programs.
    pub budgets: Vec<Budget>,
}

/// What a program can do beside deciding packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// Report packets as it decides them ([`polc_backend_ebpf::trace`]).
    pub trace: bool,
    /// Leave every packet to the kernel while it is told to ([`polc_backend_ebpf::emit::SUSPEND_MAP`]).
    pub suspend: bool,
}

/// Emits the object of what was compiled for a place with an attach point, and computes its budget.
///
/// # Errors
/// What keeps the plan from becoming a program that the kernel accepts.
///
/// # Panics
/// If the place has no attach point.
pub fn object(session: &Session, compiled: &Compiled) -> Result<(Object, Vec<Budget>), Vec<Diagnostic>> {
    object_with(session, compiled, Extras::default())
}

/// The same, with what a program in the running kernel can be asked for beside verdicts.
///
/// # Errors
/// As [`object`].
///
/// # Panics
/// As [`object`].
pub fn object_with(
    session: &Session,
    compiled: &Compiled,
    extras: Extras,
) -> Result<(Object, Vec<Budget>), Vec<Diagnostic>> {
    let attach: Attach = compiled.plan.place.attach.expect("programs are made for an attach point");
    let target = Target {
        attach,
        name: PROGRAM_NAME.to_string(),
        rule: &|rule| Some(rule_line(session, rule)),
        chain: &|chain: Chain| Some(chain_name(session, chain)),
        semantics: session.ruleset.semantics,
        trace: extras.trace,
        suspend: extras.suspend,
    };
    let at_rule = |found: Vec<Diagnostic>| -> Vec<Diagnostic> {
        found.into_iter().map(|one| at_rule(one, session, compiled, attach)).collect()
    };
    let mut object = emit(&compiled.plan, &target).map_err(at_rule)?;
    name_canonically(session, &mut object.manifest.counted);
    let mut budgets = Vec::new();
    for program in &object.programs {
        match Budget::of(&program.code) {
            Ok(budget) => match budget.enforce() {
                Ok(()) => budgets.push(budget),
                Err(over) => return Err(vec![Diagnostic::error(over.code, over.to_string(), None)]),
            },
            Err((slot, why)) => {
                let message = format!("instruction {slot} of the emitted program does not decode: {why}");
                return Err(vec![Diagnostic::error(NOT_WRITTEN, message, None)]);
            }
        }
    }
    Ok((object, budgets))
}

/// Gives rules their canonical texts where their lines are something else: what `polc save` prints is the same rule.
fn name_canonically(session: &Session, counted: &mut [Counted]) {
    let canonical = print(&session.dump, false);
    let lines = rule_lines(&canonical);
    for counted in counted {
        let Some(number) = counted.rule.and_then(|number| number.checked_sub(1)) else { continue };
        let of_chain = lines.get(&(counted.table.as_str(), counted.chain.as_str()));
        let line = of_chain.and_then(|lines| lines.get(number as usize));
        counted.canonical =
            line.filter(|line| **line != counted.without_counts()).map(|line| (*line).to_string());
    }
}

/// What is said of a key that is too large, at the first rule for whose fields it has no room beside those of the rules
/// before.
fn at_rule(found: Diagnostic, session: &Session, compiled: &Compiled, attach: Attach) -> Diagnostic {
    if found.code != KEY_TOO_LARGE || found.span.is_some() {
        return found;
    }
    let mut of_rules: BTreeMap<Rule, BTreeSet<u8>> = BTreeMap::new();
    let slots: HashMap<Field, &KeySlot> = compiled.plan.key.iter().map(|slot| (slot.field, slot)).collect();
    for entry in compiled.classifier.entries.values() {
        let (Some(rule), tests) = (entry.rule, entry.cube.tests()) else { continue };
        let slots = tests.iter().filter_map(|test| slots.get(&test.field));
        of_rules.entry(rule).or_default().extend(slots.flat_map(|slot| slot.word..slot.word + slot.words));
    }
    let all = compiled.plan.key.iter().flat_map(|slot| slot.word..slot.word + slot.words);
    let mut used: BTreeSet<u8> =
        all.filter(|word| !of_rules.values().any(|own| own.contains(word))).collect();
    let words_max = key_words_max(attach);
    let first = of_rules.into_iter().find(|(_, words)| {
        used.extend(words);
        used.len() > words_max
    });
    Diagnostic { span: first.map(|(rule, _)| session.ruleset.rules[rule].span), ..found }
}

/// Compiles and emits.
///
/// # Errors
/// As [`object`].
pub fn build(
    session: &Session,
    place: &Place,
    env: &Env,
    devices: &Devices,
) -> Result<Built, Vec<Diagnostic>> {
    let compiled = compile(&session.ruleset, place, env, devices);
    let (object, budgets) = object(session, &compiled)?;
    Ok(Built { compiled, object, budgets })
}
