//! The text form of a rule set: one line a rule, in the order in which rules are tried.

use std::fmt;

use super::{Action, ClauseKind, EffectTestKind, Policy, Ruleset};
use crate::cube::Test;
use crate::set::SetContents;

impl fmt::Display for Ruleset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ruleset {} {:?}", self.family, self.semantics)?;
        for (set, data) in &self.sets {
            write!(f, "{set}: {} (", data.name)?;
            for (index, dimension) in data.dimensions.iter().enumerate() {
                write!(f, "{}{dimension}", if index == 0 { "" } else { ", " })?;
            }
            match &data.contents {
                SetContents::Elements(elements) => writeln!(f, ") {} elements", elements.len())?,
                SetContents::Sets(members) => writeln!(f, ") {} sets", members.len())?,
                SetContents::Unknown => writeln!(f, ") unknown")?,
            }
        }
        for (derived, data) in &self.derived {
            writeln!(f, "{derived}: {data:?}")?;
        }
        for (effect, data) in &self.effect_tests {
            let not = if data.negate { "not " } else { "" };
            match data.kind {
                EffectTestKind::Random { probability } => {
                    writeln!(f, "{effect}: {not}random {probability:#x}/2^31")?;
                }
                EffectTestKind::Nth { every, initial } => {
                    writeln!(f, "{effect}: {not}nth every {} from {initial}", u64::from(every) + 1)?;
                }
                EffectTestKind::Limit { average, burst } => {
                    writeln!(f, "{effect}: {not}limit one per {average} * 0.1 ms, burst {burst}")?;
                }
            }
        }
        for (table, data) in &self.tables {
            writeln!(f, "{table}: {}", data.kind)?;
            for &chain in &data.chains {
                self.chain_text(chain, f)?;
            }
        }
        Ok(())
    }
}

impl Ruleset {
    fn chain_text(&self, chain: crate::entities::Chain, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let data = &self.chains[chain];
        write!(f, "  {chain}: {}", data.name)?;
        if let Some(base) = data.base {
            let policy = match base.policy {
                Policy::Accept => "accept",
                Policy::Drop => "drop",
            };
            write!(f, " on {}, policy {policy}", base.hook)?;
        }
        writeln!(f)?;
        for &rule in &data.rules {
            let data = &self.rules[rule];
            write!(f, "    {rule}:")?;
            for clause in &data.clauses {
                match &clause.kind {
                    ClauseKind::Any(tests) => write!(f, " [{}]", joined(tests, " or "))?,
                    ClauseKind::Hotdrop(tests) => write!(f, " [hotdrop if {}]", joined(tests, " and "))?,
                    ClauseKind::Doom(tests) => write!(f, " [doom if {}]", joined(tests, " and "))?,
                    ClauseKind::Beyond(test) => write!(f, " [defer if {test}]")?,
                    ClauseKind::Effect(effect) => write!(f, " [{effect}]")?,
                    ClauseKind::Opaque(opaque) => write!(f, " [`{}` unknown]", opaque.name)?,
                }
            }
            writeln!(f, " => {}", data.action)?;
        }
        Ok(())
    }
}

fn joined(tests: &[Test], between: &str) -> String {
    tests.iter().map(ToString::to_string).collect::<Vec<_>>().join(between)
}

/// Prints as the text form writes it: `accept`, `jump chain3`, `mark = mark & !0xff ^ 0x1`.
impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Continue => f.write_str("continue"),
            Action::Accept => f.write_str("accept"),
            Action::Pass => f.write_str("pass"),
            Action::Drop => f.write_str("drop"),
            Action::Reject(with) => write!(f, "{}", crate::outcome::Verdict::Reject(*with)),
            Action::Jump(chain) => write!(f, "jump {chain}"),
            Action::Goto(chain) => write!(f, "goto {chain}"),
            Action::Return => f.write_str("return"),
            Action::Write(write) => {
                write!(f, "{0} = {0} & !{1:#x} ^ {2:#x}", write.field, write.clear, write.xor)
            }
            Action::Effect { what, .. } => write!(f, "effect `{}`", what.name),
            Action::Steal(what) => write!(f, "steal `{}`", what.name),
        }
    }
}
