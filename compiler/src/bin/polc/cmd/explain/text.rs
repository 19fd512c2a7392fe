//! An explanation as text: events of evaluation, told in the words of the rule set.

use std::fmt::Write as _;

use polc::decider::chain_name;
use polc::session::Session;
use polc_ir::entities::{Chain, Rule};
use polc_ir::env::{Input, Place};
use polc_ir::field::Field;
use polc_ir::packet::View;
use polc_ir::ruleset::deferral::{ClauseAbility, action_deferral, clause_ability};
use polc_ir::ruleset::{Action, ClauseKind, Event, Ruleset, Truth};
use polc_ir::source::Span;

use super::values;

/// The text so far, and the rule being tried.
pub(super) struct Explanation<'a> {
    session: &'a Session,
    /// The rules that are followed: the session's, or those without what they record.
    followed: &'a Ruleset,
    place: &'a Place,
    view: Option<View<'a>>,
    pub(super) text: String,
    /// The chain last named.
    chain: Option<Chain>,
    /// The rule whose clauses are coming in, with those that came.
    rule: Option<(Rule, Vec<(usize, Truth)>)>,
    /// The mark was written, so the packet's own is not what a rule saw.
    mark_written: bool,
}

impl<'a> Explanation<'a> {
    pub(super) fn new(
        session: &'a Session,
        followed: &'a Ruleset,
        place: &'a Place,
        packet: &'a Input,
    ) -> Explanation<'a> {
        let view = View::new(session.family(), place, packet).ok();
        let path: Vec<String> = place.path.iter().map(ToString::to_string).collect();
        Explanation {
            session,
            followed,
            place,
            view,
            text: format!("through {}\n", path.join(", ")),
            chain: None,
            rule: None,
            mark_written: false,
        }
    }

    pub(super) fn event(&mut self, event: Event) {
        match event {
            Event::Enter(chain) => {
                self.close_rule();
                self.chain = None;
                self.name_chain(chain);
            }
            Event::Clause(rule, clause, truth) => {
                self.open_rule(rule);
                if let Some((_, clauses)) = &mut self.rule {
                    clauses.push((clause, truth));
                }
            }
            Event::Matched(rule) => {
                self.open_rule(rule);
                self.close_rule_as("matches");
                self.action(rule);
            }
            Event::Possible(rule) => {
                self.open_rule(rule);
                self.close_rule_as("may match");
                if self.goes_on(rule) {
                    self.action(rule);
                }
            }
            Event::Policy(chain) => {
                self.close_rule();
                let (table, name) = chain_name(self.session, chain);
                let _ = writeln!(self.text, "  {table} {name}: no rule decided, so its policy does");
            }
        }
    }

    fn name_chain(&mut self, chain: Chain) {
        if self.chain != Some(chain) {
            self.chain = Some(chain);
            let (table, name) = chain_name(self.session, chain);
            let _ = writeln!(self.text, "{table} {name}");
        }
    }

    fn open_rule(&mut self, rule: Rule) {
        if self.rule.as_ref().is_some_and(|(open, _)| *open == rule) {
            return;
        }
        self.close_rule();
        self.name_chain(self.session.ruleset.rules[rule].chain);
        self.rule = Some((rule, Vec::new()));
    }

    /// A remark between rules; the next one names its chain again.
    pub(super) fn say(&mut self, remark: &str) {
        self.close_rule();
        self.chain = None;
        let _ = writeln!(self.text, "{remark}");
    }

    /// Ends the rule being tried, if there is one: it did not match.
    pub(super) fn close_rule(&mut self) {
        let last = self.rule.as_ref().and_then(|(_, clauses)| clauses.last().map(|(_, truth)| *truth));
        self.close_rule_as(match last {
            Some(Truth::Unknown) => "can't be told",
            _ => "does not match",
        });
    }

    fn close_rule_as(&mut self, how: &str) {
        let Some((rule, clauses)) = self.rule.take() else { return };
        let session = self.session;
        let line = session.line_of(rule);
        let text = session.sources.file(session.rules_file).line_text(line).trim();
        let _ = writeln!(self.text, "  {line}: {text}");
        // Several clauses may come from one piece of text: guards, then the test. The worst tells.
        let mut shown: Vec<(Span, Truth, usize)> = Vec::new();
        for (index, truth) in clauses {
            let span = session.ruleset.rules[rule].clauses[index].span;
            match shown.iter_mut().find(|(have, _, _)| *have == span) {
                Some(have) if have.1 == Truth::True => *have = (span, truth, index),
                Some(_) => {}
                None => shown.push((span, truth, index)),
            }
        }
        for (span, truth, index) in shown {
            let words = session.sources.text(span);
            let _ = match truth {
                Truth::True => writeln!(self.text, "      yes  {words}"),
                Truth::False => writeln!(self.text, "      no   {words}   ({})", self.why_not(rule, index)),
                Truth::Unknown => {
                    writeln!(self.text, "      ?    {words}   ({})", self.why_unknown(rule, index))
                }
            };
        }
        let _ = writeln!(self.text, "      {how}");
    }

    fn action(&mut self, rule: Rule) {
        let data = &self.session.ruleset.rules[rule];
        let words = self.session.sources.text(data.action_span);
        if self.goes_on(rule) {
            if let Action::Effect { what, .. } = &data.action {
                let _ = writeln!(self.text, "      {words}: {}; the next rule follows", what.reason);
            }
        } else if let Some(deferral) = action_deferral(self.place, &data.action) {
            let _ = writeln!(self.text, "      {words}: left to the kernel ({deferral})");
        }
        match data.action {
            Action::Write(write) if write.field == Field::Mark => self.mark_written = true,
            Action::Return => {
                let _ = writeln!(self.text, "      returns");
            }
            _ => {}
        }
    }

    /// Whether a rule's action only records, and is passed over.
    fn goes_on(&self, rule: Rule) -> bool {
        let own = &self.session.ruleset.rules[rule].action;
        *own != Action::Continue && self.followed.rules[rule].action == Action::Continue
    }

    /// What the packet has where a clause asks for something else.
    fn why_not(&self, rule: Rule, index: usize) -> String {
        let clause = &self.session.ruleset.rules[rule].clauses[index];
        let (tests, dropped) = match &clause.kind {
            ClauseKind::Any(tests) => (tests, false),
            ClauseKind::Hotdrop(tests) | ClauseKind::Doom(tests) => (tests, true),
            ClauseKind::Beyond(_) => return BEYOND.into(),
            ClauseKind::Effect(_) => return "its turn, or its chance, did not come".into(),
            ClauseKind::Opaque(opaque) => return opaque.reason.clone(),
        };
        let mut values: Vec<String> = Vec::new();
        for field in tests.iter().map(|test| test.field) {
            let value = match &self.view {
                _ if matches!(field, Field::Derived(_)) => return "the packet is not so".into(),
                Some(view) if !(self.mark_written && field == Field::Mark) => {
                    values::words(field, self.session.family(), view.get(field))
                }
                _ => return "an earlier rule changed it".into(),
            };
            if !values.contains(&value) {
                values.push(value);
            }
        }
        let has = format!("the packet has {}", values.join(" and "));
        if dropped { format!("{has}: dropped, since the match can't read its header") } else { has }
    }

    fn why_unknown(&self, rule: Rule, index: usize) -> String {
        let ruleset = self.followed;
        let fragment = self.view.as_ref().is_some_and(View::is_fragment);
        match clause_ability(ruleset, self.place, &ruleset.rules[rule].clauses[index], fragment) {
            ClauseAbility::Unknown(why) | ClauseAbility::Observable(why) => why.to_string(),
            ClauseAbility::Known
                if matches!(ruleset.rules[rule].clauses[index].kind, ClauseKind::Beyond(_)) =>
            {
                BEYOND.into()
            }
            ClauseAbility::Known => "an earlier condition can't be told".into(),
        }
    }
}

/// Why a search gives up.
const BEYOND: &str = "the packet holds more options, chunks or headers than are searched";
