//! A packet at every level and in the emitted program: the comparison that most tests are made of.

use polc::Compiled;
use polc::runner::{Level, Program, run};
use polc_backend_ebpf::emit::{RuleLine, Target};
use polc_ir::env::{Attach, Env, Input};
use polc_ir::hook::Semantics;
use polc_ir::outcome::{Outcome, Verdict};
use polc_ir::ruleset::Ruleset;
use polc_ir::state::State;

/// A target that names no rules and reports no packets.
pub fn target(attach: Attach) -> Target<'static> {
    Target {
        attach,
        name: "polc".into(),
        rule: &|_| None::<RuleLine>,
        chain: &|_| None,
        semantics: Semantics::Legacy,
        trace: false,
        suspend: false,
    }
}

/// Rules, and what was compiled from them.
pub struct Levels<'a> {
    /// The rules.
    pub ruleset: &'a Ruleset,
    /// What was compiled from them.
    pub compiled: &'a Compiled,
    /// Where both run.
    pub env: &'a Env,
    /// The emitted program in the check VM, unless the kernel's bounds let none be emitted.
    pub program: Option<Program>,
}

impl Levels<'_> {
    /// What all of them say of a packet. Every level starts with a new state.
    ///
    /// # Errors
    /// The level that says something else, and what.
    pub fn agree(&mut self, input: &Input) -> Result<Outcome, String> {
        let of = |level| run(level, self.ruleset, self.compiled, self.env, input, &mut State::new(1));
        let mut expected = of(Level::Ruleset);
        // Beyond the bound on entries, packets are deferred although the rules could tell.
        let classified = of(Level::Classifier);
        if !self.compiled.diagnostics.is_empty() && classified.ending.verdict == Verdict::Defer {
            expected = classified;
        }
        for level in [Level::Classifier, Level::Decision, Level::Plan] {
            let outcome = of(level);
            if outcome != expected {
                return Err(format!("{level}: {outcome:?} instead of {expected:?} for {input:02x?}"));
            }
        }
        if let Some(program) = &mut self.program {
            match program.run(&self.compiled.plan, input) {
                Ok((ending, counted)) if expected.is(ending, &counted) => {
                    let left = program.left_marked(&self.compiled.plan, input, &expected);
                    left.map_err(|error| format!("rbpf: {error} for {input:02x?}"))?;
                }
                other => return Err(format!("rbpf: {other:?} instead of {expected:?} for {input:02x?}")),
            }
        }
        Ok(expected)
    }
}
