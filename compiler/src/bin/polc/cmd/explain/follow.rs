//! A packet's way through the rules. Where it can't be told whether a rule matches, both ways are followed: what comes of
//! the packet if it does, then the rest as if it didn't.
//!
//! Evaluation is asked anew with what was supposed, and what it tells is the same up to there. At a place of a program
//! nothing is supposed: there a packet is left to the kernel, which is what is to be explained.

use polc::decider::describe;
use polc::deciding::deciding;
use polc::session::Session;
use polc_ir::entities::{Chain, Rule};
use polc_ir::env::{Env, Input, Place};
use polc_ir::outcome::{Decider, Ending, Outcome, Verdict};
use polc_ir::ruleset::{Action, Clause, ClauseKind, Event, Ruleset};
use polc_ir::state::State;

use super::text::Explanation;

/// Seed of the random numbers that `statistic` draws.
const SEED: u64 = 1;

/// The explanation.
pub(super) fn follow(session: &Session, place: &Place, env: &Env, packet: &Input) -> String {
    let followed = match place.attach {
        None => deciding(&session.ruleset, place.mode),
        Some(_) => session.ruleset.clone(),
    };
    let mut way = Way {
        session,
        place,
        env,
        packet,
        ruleset: followed.clone(),
        told: 0,
        resumed_behind: None,
        jumps: Vec::new(),
        endings: Vec::new(),
    };
    let mut explanation = Explanation::new(session, &followed, place, packet);
    let last = loop {
        let (events, outcome) = way.events();
        if place.attach.is_some() {
            way.tell(&mut explanation, &events);
            break outcome;
        }
        let open = events.iter().enumerate().skip(way.told).find_map(|(at, event)| match *event {
            Event::Possible(rule) if way.ruleset.rules[rule].action != Action::Continue => Some((at, rule)),
            _ => None,
        });
        match open {
            Some((at, rule)) => {
                way.tell(&mut explanation, &events[..=at]);
                way.suppose(rule, &events);
            }
            None => {
                way.tell(&mut explanation, &events);
                way.leave_jumps(&events);
                if let Some(&(jump, from)) = way.jumps.last() {
                    way.endings.push((way.jumps.iter().map(|(jump, _)| *jump).collect(), outcome));
                    explanation.say(&format!("if line {} does not match:", session.line_of(jump)));
                    way.never(jump, from - 1);
                    continue;
                }
                match outcome.ending {
                    Ending { verdict: Verdict::Defer, by: Decider::Policy(chain) }
                        if session.ruleset.translates(chain) =>
                    {
                        explanation.say("what follows holds unless the packet's connection is translated:");
                        way.without(chain, &events);
                    }
                    _ => break outcome,
                }
            }
        }
    };
    explanation.close_rule();
    explanation.text + &way.conclusion(&last)
}

/// How far a packet was followed, and what was supposed.
struct Way<'a> {
    session: &'a Session,
    place: &'a Place,
    env: &'a Env,
    packet: &'a Input,
    /// The rules with what was supposed.
    ruleset: Ruleset,
    /// Events that were told.
    told: usize,
    /// The rule whose trial was told: what the new evaluation says of it is passed over.
    resumed_behind: Option<Rule>,
    /// Rules that were supposed to match and jump into chains that the packet has not left, each with the number of
    /// events before the chain's first.
    jumps: Vec<(Rule, usize)>,
    /// What becomes of the packet if these rules match.
    endings: Vec<(Vec<Rule>, Outcome)>,
}

impl Way<'_> {
    fn events(&self) -> (Vec<Event>, Outcome) {
        let mut events = Vec::new();
        let mut state = State::new(SEED);
        let mut trace = |event| events.push(event);
        let outcome = self.ruleset.eval_traced(self.place, self.env, self.packet, &mut state, &mut trace);
        (events, outcome)
    }

    /// Tells what was not told yet.
    fn tell(&mut self, explanation: &mut Explanation<'_>, events: &[Event]) {
        for event in events.iter().skip(self.told) {
            if self.resumed_behind.is_some() && rule_of(event) == self.resumed_behind {
                continue;
            }
            self.resumed_behind = None;
            explanation.event(*event);
        }
        self.told = events.len();
    }

    /// Follows the packet on from a rule of which it is open whether it matches: into its chain if it jumps, else past it,
    /// once it is known what comes of it otherwise.
    fn suppose(&mut self, rule: Rule, events: &[Event]) {
        let before = events[..self.told].iter().rposition(|event| rule_of(event) != Some(rule));
        let trial = before.map_or(0, |before| before + 1);
        self.leave_jumps(&events[..trial]);
        self.ruleset.rules[rule].clauses.clear();
        if matches!(self.ruleset.rules[rule].action, Action::Jump(_)) {
            self.jumps.push((rule, trial + 1));
            self.resume(rule, trial);
            return;
        }
        let (_, outcome) = self.events();
        let jumps = self.jumps.iter().map(|(jump, _)| *jump);
        self.endings.push((jumps.chain([rule]).collect(), outcome));
        self.never(rule, trial);
    }

    /// Goes on as if a rule did not match, whose trial began after so many events.
    fn never(&mut self, rule: Rule, trial: usize) {
        let span = self.ruleset.rules[rule].action_span;
        self.ruleset.rules[rule].clauses = vec![Clause { span, kind: ClauseKind::Any(Default::default()) }];
        self.jumps.retain(|(jump, _)| *jump != rule);
        self.resume(rule, trial);
    }

    /// Goes on without a chain.
    fn without(&mut self, chain: Chain, events: &[Event]) {
        self.ruleset.chains[chain].base = None;
        self.told = events.iter().position(|event| *event == Event::Enter(chain)).unwrap_or(0);
    }

    /// Goes on behind the trial of a rule, which was told.
    fn resume(&mut self, rule: Rule, trial: usize) {
        self.told = trial;
        self.resumed_behind = Some(rule);
    }

    /// Forgets the jumps whose chains the packet has left: to where the rule stands, or to another base chain.
    fn leave_jumps(&mut self, events: &[Event]) {
        let chain_of = |rule: Rule| self.ruleset.rules[rule].chain;
        self.jumps.retain(|(jump, from)| {
            !events.iter().skip(*from).any(|event| match rule_of(event) {
                Some(rule) => chain_of(rule) == chain_of(*jump),
                None => true,
            })
        });
    }

    /// The verdicts, each with what it hangs on beside that those before don't hold.
    fn conclusion(&self, last: &Outcome) -> String {
        let mut text = String::new();
        let mut otherwise = "";
        for (conditions, outcome) in &self.endings {
            let lines: Vec<String> =
                conditions.iter().map(|rule| self.session.line_of(*rule).to_string()).collect();
            let when = match (conditions.as_slice(), outcome.ending.by) {
                ([only], Decider::Rule(rule)) if *only == rule => "it matches".to_string(),
                ([_], _) => format!("line {} matches", lines[0]),
                _ => format!("lines {} match", lines.join(", ")),
            };
            text += &format!("=> {otherwise}{}, if {when}\n{}", self.ending(outcome), self.mark(outcome));
            otherwise = "otherwise ";
        }
        text + &format!("=> {otherwise}{}\n{}", self.ending(last), self.mark(last))
    }

    fn ending(&self, outcome: &Outcome) -> String {
        let ending = describe(self.session, outcome.ending);
        // Nobody leaves it to anybody: it can't be told.
        match (self.place.attach, ending.strip_prefix("defer by")) {
            (None, Some(by)) => format!("open, by{by}"),
            _ => ending,
        }
    }

    fn mark(&self, outcome: &Outcome) -> String {
        if outcome.mark == self.packet.mark {
            return String::new();
        }
        format!("   mark {:#x}, was {:#x}\n", outcome.mark, self.packet.mark)
    }
}

/// The rule that an event is about.
fn rule_of(event: &Event) -> Option<Rule> {
    match *event {
        Event::Clause(rule, ..) | Event::Matched(rule) | Event::Possible(rule) => Some(rule),
        Event::Enter(_) | Event::Policy(_) => None,
    }
}
