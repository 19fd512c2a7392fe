//! `polc explain`: every rule that a packet is tried against, in the user's own text, and why it matched or not.

use std::fmt::Write as _;
use std::process::ExitCode;

use polc::decider::{chain_name, describe};
use polc::session::Session;
use polc_ir::diag::Diagnostic;
use polc_ir::entities::Rule;
use polc_ir::env::{Attach, Connections, Counting, Fragments, Input, Place};
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::{Family, Hook};
use polc_ir::packet::View;
use polc_ir::packet::text;
use polc_ir::ruleset::deferral::{ClauseAbility, action_deferral, clause_ability};
use polc_ir::ruleset::{Action, ClauseKind, Event, Truth};
use polc_ir::source::{SourceMap, Span};
use polc_ir::state::State;

use super::{FOUND, place, show};
use crate::cli::ExplainArgs;
use crate::failure::Failure;
use crate::input;
use crate::output::Output;
use crate::packets::list::{BAD_LINE, BAD_PACKET};

pub(super) fn run(args: &ExplainArgs, output: &Output) -> Result<ExitCode, Failure> {
    let session = input::session(&args.file, &args.input)?;
    show(output, &session.sources, &session.diagnostics);
    if session.has_errors() {
        return Ok(FOUND.into());
    }
    let packet = match packet(&args.packet) {
        Ok(packet) => packet,
        Err(wrong) => {
            let (sources, finding) = *wrong;
            show(output, &sources, &[finding]);
            return Err(Failure::Usage("the packet is not understood".into()));
        }
    };
    let place = explained_place(args, &packet)?;
    let env = input::env(&args.input, session.family());
    let mut explanation = Explanation::new(&session, &place, &packet);
    let outcome = session.ruleset.eval_traced(&place, &env, &packet, &mut State::new(1), &mut |event| {
        explanation.event(event);
    });
    explanation.close_rule();
    let mut text = explanation.text;
    let _ = writeln!(text, "=> {}", describe(&session, outcome.ending));
    if outcome.mark != packet.mark {
        let _ = writeln!(text, "   mark {:#x}, was {:#x}", outcome.mark, packet.mark);
    }
    output.result(&text);
    Ok(ExitCode::SUCCESS)
}

/// The packet, or a finding about its text.
fn packet(words: &str) -> Result<Input, Box<(SourceMap, Diagnostic)>> {
    let fail = |at: usize, message: String, code| {
        let mut sources = SourceMap::new();
        let file = sources.add("--packet", words);
        let rest = words.get(at..).unwrap_or("");
        let len = rest.find(char::is_whitespace).unwrap_or(rest.len());
        let span = Span::new(file, at as u32, (at + len) as u32);
        let finding = Diagnostic::error(code, message, span)
            .with_hint("write `PROTO SRC[:PORT] > DST[:PORT] [key=value]...`, such as `tcp 10.0.0.1:5000 > 10.0.0.2:22 in=eth0`");
        Box::new((sources, finding))
    };
    let spec = text::parse(words).map_err(|error| fail(error.at, error.message, BAD_LINE))?;
    spec.input().map_err(|message| fail(0, message, BAD_PACKET))
}

/// Where the packet is explained: the place that was named; else the rules' own meaning, on the hooks that the packet's
/// devices make sense on.
fn explained_place(args: &ExplainArgs, packet: &Input) -> Result<Place, Failure> {
    if let Some(attach) = args.attach {
        return place::of(attach.into(), &args.place, &args.input);
    }
    let path = args.place.path().unwrap_or_else(|| match (packet.in_device, packet.out_device) {
        (Some(_), Some(_)) => vec![Hook::Prerouting, Hook::Forward, Hook::Postrouting],
        (None, Some(_)) => vec![Hook::Output, Hook::Postrouting],
        _ => vec![Hook::Prerouting, Hook::Input],
    });
    Ok(Place {
        path,
        attach: None::<Attach>,
        mode: args.place.mode(),
        fragments: Fragments::Unresolved,
        connections: if packet.connection.is_some() { Connections::Given } else { Connections::Unknown },
        local_addresses: !args.input.local.is_empty(),
        counters: Counting::Exact,
    })
}

/// The text so far, and the rule being tried.
struct Explanation<'a> {
    session: &'a Session,
    place: &'a Place,
    view: Option<View<'a>>,
    text: String,
    /// The chain last named.
    chain: Option<polc_ir::entities::Chain>,
    /// The rule whose clauses are coming in, with those that came.
    rule: Option<(Rule, Vec<(usize, Truth)>)>,
    /// The mark was written, so the packet's own is not what a rule saw.
    mark_written: bool,
}

impl<'a> Explanation<'a> {
    fn new(session: &'a Session, place: &'a Place, packet: &'a Input) -> Explanation<'a> {
        let view = View::new(session.family(), place, packet).ok();
        let path: Vec<String> = place.path.iter().map(ToString::to_string).collect();
        Explanation {
            session,
            place,
            view,
            text: format!("through {}\n", path.join(", ")),
            chain: None,
            rule: None,
            mark_written: false,
        }
    }

    fn event(&mut self, event: Event) {
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
            }
            Event::Policy(chain) => {
                self.close_rule();
                let (table, name) = chain_name(self.session, chain);
                let _ = writeln!(self.text, "  {table} {name}: no rule decided, so its policy does");
            }
        }
    }

    fn name_chain(&mut self, chain: polc_ir::entities::Chain) {
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

    /// Ends the rule being tried, if there is one: it did not match.
    fn close_rule(&mut self) {
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
        if let Some(deferral) = action_deferral(self.place, &data.action) {
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

    /// What the packet has where a clause asks for something else.
    fn why_not(&self, rule: Rule, index: usize) -> String {
        let clause = &self.session.ruleset.rules[rule].clauses[index];
        let (tests, dropped) = match &clause.kind {
            ClauseKind::Any(tests) => (tests, false),
            ClauseKind::Hotdrop(tests) => (tests, true),
            ClauseKind::Beyond(_) => return BEYOND.into(),
            ClauseKind::Effect(_) => return "its turn, or its chance, did not come".into(),
            ClauseKind::Opaque(opaque) => return opaque.reason.clone(),
        };
        let mut values: Vec<String> = Vec::new();
        for test in tests {
            let value = self.value(test.field);
            if !values.contains(&value) {
                values.push(value);
            }
        }
        let values = values.join(", ");
        if dropped { format!("{values}: dropped, since the match can't read its header") } else { values }
    }

    fn value(&self, field: Field) -> String {
        let (Some(view), false) = (&self.view, self.mark_written && field == Field::Mark) else {
            return format!("{field} was changed");
        };
        if let Field::Derived(_) = field {
            return "the packet is not so".into();
        }
        format!("{field} is {}", show_value(field, self.session.family(), view.get(field)))
    }

    fn why_unknown(&self, rule: Rule, index: usize) -> String {
        let ruleset = &self.session.ruleset;
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

/// A field's value as people write it.
fn show_value(field: Field, family: Family, value: u128) -> String {
    match field {
        Field::SrcAddr | Field::DstAddr => match family {
            Family::V4 => std::net::Ipv4Addr::from(value as u32).to_string(),
            Family::V6 => std::net::Ipv6Addr::from(value).to_string(),
        },
        Field::InDevice | Field::OutDevice if value == 0 => "none".into(),
        Field::InDevice | Field::OutDevice => DeviceName::from_value(value).to_string(),
        Field::SrcMac | Field::DstMac => {
            let bytes = value.to_be_bytes();
            bytes[10..].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
        }
        Field::Proto => match polc_frontend_iptables::names::protocol_name(value as u16) {
            Some(name) => name.to_string(),
            None => value.to_string(),
        },
        Field::Mark | Field::CtMark | Field::Tos | Field::TcpFlags | Field::CtState | Field::CtStatus => {
            format!("{value:#x}")
        }
        _ => value.to_string(),
    }
}
