//! `Ruleset::eval`: what a packet filter does with a packet. The definition; obviously right rather than fast.
//!
//! It is `ipt_do_table` (net/ipv4/netfilter/ip_tables.c) for each base chain of a path, with one addition: a clause
//! may be unknown where it is evaluated ([`super::deferral`]). A packet is dropped only if every resolution of what is
//! unknown drops it; what only the kernel can do ends in [`Verdict::Defer`]. Where connections are looked up, rules are
//! run as for a packet without one, and a drop that relied on it becomes a deferral if there is one.

use super::deferral::{
    ClauseAbility, SUPPOSED_STATE, clause_ability, drops_undecided, is_handed_over, supposes,
};
use super::{Action, ClauseKind, Policy, Ruleset};
use crate::cube::Test;
use crate::derived::DerivedData;
use crate::entities::{Chain, Rule};
use crate::env::{Attach, Connections, Env, Fragments, Input, Mode, Place};
use crate::field::Field;
use crate::hook::{Hook, TableKind};
use crate::outcome::{Count, Decider, Ending, Outcome, Verdict};
use crate::packet::View;
use crate::state::State;

/// How a clause turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// It holds.
    True,
    /// It doesn't.
    False,
    /// It can't be told here.
    Unknown,
}

/// What happens while a packet goes through the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A base chain is entered.
    Enter(Chain),
    /// A clause (by index) of a rule was evaluated.
    Clause(Rule, usize, Truth),
    /// A rule's action is taken.
    Matched(Rule),
    /// A rule may match; its action is possible, not certain.
    Possible(Rule),
    /// A base chain's policy is taken.
    Policy(Chain),
}

/// What is known of a packet's addresses behind a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// All.
    Known,
    /// All if it has no connection.
    IfAbsent,
    /// Nothing.
    Unknown,
}

/// Where evaluation comes back to after a chain.
#[derive(Clone, Copy)]
struct Frame {
    chain: Chain,
    next: usize,
    /// The jump was only possible, so nothing that happens in the chain is certain.
    hypothetical: bool,
}

/// What is known while a packet is evaluated.
struct Packet<'a, 'b> {
    ruleset: &'a Ruleset,
    place: &'a Place,
    env: &'a Env,
    view: &'a View<'b>,
    /// Fields that rules have written.
    written: Vec<(Field, u128)>,
    /// An earlier rule may have dropped the packet.
    doubt: bool,
    /// A clause was evaluated as for a packet without a connection.
    supposed: bool,
}

impl Ruleset {
    /// Runs a packet through the base chains of `place.path`.
    pub fn eval(&self, place: &Place, env: &Env, input: &Input, state: &mut State) -> Outcome {
        self.eval_traced(place, env, input, state, &mut |_| ())
    }

    /// Like [`Ruleset::eval`], and tells `trace` what happens on the way.
    pub fn eval_traced(
        &self,
        place: &Place,
        env: &Env,
        input: &Input,
        state: &mut State,
        trace: &mut impl FnMut(Event),
    ) -> Outcome {
        let view = match View::new(self.family, place, input) {
            Ok(view) => view,
            Err(ending) => return Outcome { ending, mark: input.mark, counted: Vec::new() },
        };
        let mut packet = Packet {
            ruleset: self,
            place,
            env,
            view: &view,
            written: Vec::new(),
            doubt: false,
            supposed: false,
        };
        let mut ending = packet.path(state, trace);
        if packet.supposed && ending.verdict == Verdict::Drop && view.get(Field::CtAbsent) == 0 {
            ending.verdict = Verdict::Defer;
        }
        if ending.verdict == Verdict::Defer && drops_undecided(place, view.is_fragment()) {
            ending.verdict = Verdict::Drop;
        }
        let mut counted = std::mem::take(&mut state.counted);
        counted.retain(|count| match *count {
            Count::Rule(rule) => place.counters.counts(self.rules[rule].action.ends()),
            Count::Policy(_) => place.counters.counts(true),
        });
        Outcome { ending, mark: packet.get(Field::Mark) as u32, counted }
    }

    /// The base chains that a path runs: those that hold a rule, do not accept by policy, or translate replies before
    /// the program's packets come to the next. In replace mode there is nobody else to count for the others' policies;
    /// `nat` counts connections, not packets.
    pub fn path_chains(&self, place: &Place) -> Vec<Chain> {
        let chains = place.path.iter().flat_map(|&hook| self.base_chains(hook));
        let counts = |chain: Chain| {
            place.mode == Mode::Replace && self.tables[self.chains[chain].table].kind != TableKind::Nat
        };
        let arrives = matches!(place.attach, Some(Attach::Xdp | Attach::TcIngress));
        let rewrites = |chain: Chain| {
            let hook = self.chains[chain].base.map(|base| base.hook);
            arrives && hook == Some(Hook::Prerouting) && self.translates(chain)
        };
        chains.filter(|&chain| self.bears(chain) || counts(chain) || rewrites(chain)).collect()
    }

    /// Which of a path's base chains a packet comes to that the one at `index` let on, or is not seen by (`passed`); their
    /// number if to none. Where chains begin with rules that tell packets for this host from those for others, who comes
    /// through INPUT has arrived, and does not come to FORWARD.
    pub fn next_base(&self, chains: &[Chain], index: usize, passed: bool) -> usize {
        let is_on = |chain: Chain, hook| self.chains[chain].base.is_some_and(|base| base.hook == hook);
        let first = self.chains[chains[index]].rules.first();
        let tells = first.is_some_and(|rule| self.rules[*rule].action == Action::Pass);
        let mut next = index + 1;
        if !passed && tells && is_on(chains[index], Hook::Input) {
            while chains.get(next).is_some_and(|chain| is_on(*chain, Hook::Forward)) {
                next += 1;
            }
        }
        next
    }

    /// Whether anything on a path decides or counts packets by more than an accepting policy.
    pub fn bears_on(&self, place: &Place) -> bool {
        place.path.iter().flat_map(|&hook| self.base_chains(hook)).any(|chain| self.bears(chain))
    }

    fn bears(&self, chain: Chain) -> bool {
        let data = &self.chains[chain];
        !data.rules.is_empty() || data.base.is_some_and(|base| base.policy == Policy::Drop)
    }

    /// What is known of a packet's addresses behind a base chain that let it on. Those of a connection that `nat`
    /// translates are rewritten there (net/netfilter/nf_nat_core.c, `nf_nat_inet_fn`), whether or not the chain has rules;
    /// those of a packet that has no connection, and that no rule translates, are not.
    pub fn behind(&self, chain: Chain, place: &Place, fragment: bool) -> Behind {
        match place.connections {
            _ if !self.translates(chain) => Behind::Known,
            Connections::LookedUp { expectations: false } if !fragment => Behind::IfAbsent,
            _ => Behind::Unknown,
        }
    }

    /// Whether rules change what later rules see of a packet: a field, or by `nat` its addresses.
    pub fn rewrites(&self) -> bool {
        self.rules.values().any(|rule| match &rule.action {
            Action::Write(_) => true,
            Action::Effect { writes, .. } => !writes.is_empty(),
            Action::Steal(_) => self.tables[self.chains[rule.chain].table].kind == TableKind::Nat,
            _ => false,
        })
    }

    /// Whether a base chain rewrites addresses by what connections remember: it is one of `nat`, and some rule of that
    /// table translates.
    pub fn translates(&self, chain: Chain) -> bool {
        let table = self.chains[chain].table;
        self.tables[table].kind == TableKind::Nat
            && self
                .rules
                .values()
                .any(|rule| self.chains[rule.chain].table == table && matches!(rule.action, Action::Steal(_)))
    }
}

impl Packet<'_, '_> {
    fn get(&self, field: Field) -> u128 {
        if let Some((_, value)) = self.written.iter().rev().find(|(written, _)| *written == field) {
            return *value;
        }
        if field == Field::FragOffset
            && self.view.is_fragment()
            && self.place.fragments == Fragments::Unresolved
        {
            return 0;
        }
        if field == Field::CtState && matches!(self.place.connections, Connections::LookedUp { .. }) {
            return SUPPOSED_STATE.into();
        }
        if let Field::Derived(derived) = field {
            return match &self.ruleset.derived[derived] {
                DerivedData::Member { set, ends, return_nomatch } => {
                    let mut value = |field| self.get(field);
                    let (sets, family) = (&self.ruleset.sets, self.ruleset.family);
                    crate::set::holds(sets, family, *set, ends, *return_nomatch, &mut value).into()
                }
                DerivedData::AddressType { of, .. } => {
                    crate::derived::address_type(self.ruleset.family, self.env, self.get(Field::address(*of)))
                        .into()
                }
                other => crate::derived::eval(other, self.view).into(),
            };
        }
        self.view.get(field)
    }

    fn holds(&self, test: &Test) -> bool {
        test.holds(self.get(test.field))
    }

    /// The rule may have dropped the packet. Where what can't be decided is dropped, that is its end.
    fn doubt(&mut self, rule: Rule) -> Option<Ending> {
        self.doubt = true;
        let ending = Ending { verdict: Verdict::Defer, by: Decider::Rule(rule) };
        drops_undecided(self.place, self.view.is_fragment()).then_some(ending)
    }

    fn path(&mut self, state: &mut State, trace: &mut impl FnMut(Event)) -> Ending {
        let chains = self.ruleset.path_chains(self.place);
        let mut ending = Ending { verdict: Verdict::Accept, by: Decider::Nothing };
        let mut index = 0;
        while let Some(&chain) = chains.get(index) {
            trace(Event::Enter(chain));
            ending = self.base_chain(chain, state, trace);
            if ending.verdict != Verdict::Accept {
                return ending;
            }
            let passed =
                matches!(ending.by, Decider::Rule(rule) if self.ruleset.rules[rule].action == Action::Pass);
            index = self.ruleset.next_base(&chains, index, passed);
            if index < chains.len() {
                match self.ruleset.behind(chain, self.place, self.view.is_fragment()) {
                    Behind::Known => {}
                    Behind::IfAbsent => self.supposed = true,
                    Behind::Unknown => {
                        return Ending { verdict: Verdict::Defer, by: Decider::Policy(chain) };
                    }
                }
            }
        }
        if self.doubt && ending.by != Decider::Nothing {
            ending.verdict = Verdict::Defer;
        }
        ending
    }

    fn base_chain(&mut self, base: Chain, state: &mut State, trace: &mut impl FnMut(Event)) -> Ending {
        let ruleset = self.ruleset;
        let defer = |rule| Ending { verdict: Verdict::Defer, by: Decider::Rule(rule) };
        let end = |verdict, rule| Ending { verdict, by: Decider::Rule(rule) };
        let mut stack: Vec<Frame> = Vec::new();
        let (mut chain, mut next) = (base, 0);
        loop {
            let Some(&rule) = ruleset.chains[chain].rules.get(next) else {
                match stack.pop() {
                    Some(frame) => (chain, next) = (frame.chain, frame.next),
                    None => return self.policy(base, state, trace),
                }
                continue;
            };
            next += 1;
            state.tried += 1;
            let data = &ruleset.rules[rule];
            let (truth, doomed) = match self.clauses(rule, state, trace) {
                Ok(turned) => turned,
                Err(ending) => {
                    let hypothetical = stack.iter().position(|frame| frame.hypothetical);
                    match (ending.verdict, hypothetical) {
                        (Verdict::Drop, Some(at)) => {
                            if let Some(ending) = self.doubt(rule) {
                                return ending;
                            }
                            (chain, next) = (stack[at].chain, stack[at].next);
                            stack.truncate(at);
                            continue;
                        }
                        _ => return ending,
                    }
                }
            };
            let hypothetical = stack.iter().position(|frame| frame.hypothetical);
            match truth {
                Truth::False => continue,
                Truth::Unknown => {
                    trace(Event::Possible(rule));
                    match data.action {
                        Action::Drop => {
                            if let Some(ending) = self.doubt(rule) {
                                return ending;
                            }
                        }
                        Action::Continue => {}
                        Action::Jump(to) => {
                            stack.push(Frame { chain, next, hypothetical: true });
                            (chain, next) = (to, 0);
                        }
                        _ => return defer(rule),
                    }
                    continue;
                }
                Truth::True => {
                    trace(Event::Matched(rule));
                }
            }
            let (action, by) = match doomed {
                true => (data.action.of_doomed(), Decider::Hotdrop(rule)),
                false => (&data.action, Decider::Rule(rule)),
            };
            if is_handed_over(self.place, action, hypothetical.is_some(), self.doubt) {
                return defer(rule);
            }
            if hypothetical.is_none() {
                state.counted.push(Count::Rule(rule));
                state.rules[rule].count(self.view.bytes());
            }
            match action {
                Action::Continue => {}
                Action::Accept | Action::Pass => return end(Verdict::Accept, rule),
                Action::Drop => match hypothetical {
                    Some(at) => {
                        if let Some(ending) = self.doubt(rule) {
                            return ending;
                        }
                        (chain, next) = (stack[at].chain, stack[at].next);
                        stack.truncate(at);
                    }
                    None => return Ending { verdict: Verdict::Drop, by },
                },
                Action::Reject(with) => return end(Verdict::Reject(*with), rule),
                Action::Jump(to) => {
                    stack.push(Frame { chain, next, hypothetical: false });
                    (chain, next) = (*to, 0);
                }
                Action::Goto(to) => (chain, next) = (*to, 0),
                Action::Return => next = usize::MAX,
                Action::Write(write) => {
                    let value = write.apply(self.get(write.field));
                    self.written.push((write.field, value));
                }
                Action::Effect { .. } | Action::Steal(_) => return defer(rule),
            }
        }
    }

    fn policy(&self, base: Chain, state: &mut State, trace: &mut impl FnMut(Event)) -> Ending {
        trace(Event::Policy(base));
        state.counted.push(Count::Policy(base));
        state.policies[base].count(self.view.bytes());
        let drop = self.ruleset.chains[base].base.is_some_and(|base| base.policy == Policy::Drop);
        let verdict = if drop { Verdict::Drop } else { Verdict::Accept };
        Ending { verdict, by: Decider::Policy(base) }
    }

    /// Whether a rule's clauses hold, and doom the packet, or the packet's end if one of them decides it.
    fn clauses(
        &mut self,
        rule: Rule,
        state: &mut State,
        trace: &mut impl FnMut(Event),
    ) -> Result<(Truth, bool), Ending> {
        let ruleset = self.ruleset;
        let (mut truth, mut doomed) = (Truth::True, false);
        let dropped = Err(Ending { verdict: Verdict::Drop, by: Decider::Hotdrop(rule) });
        for (index, clause) in ruleset.rules[rule].clauses.iter().enumerate() {
            let observable = Err(Ending { verdict: Verdict::Defer, by: Decider::Rule(rule) });
            let ability = clause_ability(ruleset, self.place, clause, self.view.is_fragment());
            if ability == ClauseAbility::Known {
                self.supposed |= supposes(self.place, clause, self.view.is_fragment());
            }
            let holds = match ability {
                ClauseAbility::Observable(_) => {
                    trace(Event::Clause(rule, index, Truth::Unknown));
                    return observable;
                }
                ClauseAbility::Unknown(_) => {
                    let ending = match clause.kind {
                        ClauseKind::Hotdrop(_) | ClauseKind::Doom(_) => self.doubt(rule),
                        // The clause that tests what was found is unknown too.
                        ClauseKind::Beyond(_) => continue,
                        _ => {
                            truth = Truth::Unknown;
                            None
                        }
                    };
                    trace(Event::Clause(rule, index, Truth::Unknown));
                    match ending {
                        Some(ending) => return Err(ending),
                        None => continue,
                    }
                }
                ClauseAbility::Known => match &clause.kind {
                    ClauseKind::Any(tests) => tests.iter().any(|test| self.holds(test)),
                    ClauseKind::Hotdrop(tests) => {
                        if tests.iter().all(|test| self.holds(test)) {
                            trace(Event::Clause(rule, index, Truth::False));
                            if truth == Truth::True || doomed {
                                return dropped;
                            }
                            return self.doubt(rule).map_or(Ok((Truth::False, false)), Err);
                        }
                        continue;
                    }
                    ClauseKind::Doom(tests) => {
                        if tests.iter().all(|test| self.holds(test)) && !doomed {
                            if truth == Truth::True {
                                doomed = true;
                            } else if let Some(ending) = self.doubt(rule) {
                                return Err(ending);
                            }
                        }
                        continue;
                    }
                    ClauseKind::Beyond(test) if self.holds(test) => {
                        trace(Event::Clause(rule, index, Truth::Unknown));
                        return observable;
                    }
                    ClauseKind::Beyond(_) => continue,
                    ClauseKind::Effect(_) if truth == Truth::Unknown => return observable,
                    ClauseKind::Effect(test) => {
                        let data = &ruleset.effect_tests[*test];
                        match state.effect_test(*test, data.kind) {
                            Some(holds) => holds != data.negate,
                            None => return observable,
                        }
                    }
                    ClauseKind::Opaque(_) => return observable,
                },
            };
            trace(Event::Clause(rule, index, if holds { Truth::True } else { Truth::False }));
            if !holds && doomed {
                return dropped;
            }
            if !holds {
                return Ok((Truth::False, false));
            }
        }
        if truth == Truth::Unknown && doomed && *ruleset.rules[rule].action.of_doomed() == Action::Drop {
            return dropped;
        }
        Ok((truth, doomed))
    }
}
