//! `reach`: how far packets get in a program.
//!
//! A rule that leaves every packet to the kernel, such as one about connections at the head of a chain, leaves nothing to
//! the rules behind it. Each of those may be all that a program could evaluate, and none of them is in the program. Whoever
//! compiled them wants to know.

use std::collections::BTreeSet;

use cranelift_entity::SecondaryMap;
use polc_ir::classifier::{Classifier, EntryData, Exit, StageData};
use polc_ir::diag::{Code, Diagnostic};
use polc_ir::entities::{Chain, Rule, Stage};
use polc_ir::env::{Attach, Connections, Mode, Place};
use polc_ir::outcome::{Decider, Ending, Verdict};
use polc_ir::ruleset::deferral::rule_deferral;
use polc_ir::ruleset::{Action, Ruleset};

use crate::beyond::Beyond;
use crate::report::{Report, Status};
use crate::select::busy;
use crate::session::Session;

/// Code of the finding that every packet is left to the kernel before it comes to rules that are compiled.
pub const NEVER_REACHED: Code = Code(303);

/// Rules beside the first that a finding points at.
const STOPS_SHOWN: usize = 8;

/// How far packets get at one place.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    /// The rules that some packet is tried against which is decided then.
    tried: SecondaryMap<Rule, bool>,
    /// Who leaves every packet to the kernel that gets as far: rules, or base chains of a table that translates.
    stops: BTreeSet<Decider>,
    /// A bound of the program ends some ways through the rules.
    bounded: bool,
}

impl Reach {
    /// Works it out from what `flatten` made of the rules, and from where bounds end ways through it. What `flatten` did not
    /// make because of one is added to these.
    pub fn new(ruleset: &Ruleset, flat: &Classifier, beyond: &mut Beyond) -> Reach {
        let mut reach = Reach::default();
        let refused = |stage: Stage| is_refused(flat, &flat.stages[stage]);
        let of_flatten: Vec<Stage> = flat.stages.keys().filter(|&stage| refused(stage)).collect();
        if !of_flatten.is_empty() {
            beyond.add_rules(flat, |stage| if refused(stage) { 0 } else { flat.stages[stage].entries.len() });
            let busy = busy(flat);
            let origins = of_flatten.into_iter().filter(|&stage| busy[stage]);
            for origin in origins.filter_map(|stage| flat.stages[stage].origin) {
                beyond.add_end(origin, origin.1);
            }
        }
        reach.bounded = !beyond.is_empty();
        let mut known: SecondaryMap<Stage, bool> = SecondaryMap::new();
        known[flat.root] = true;
        let mut pending = vec![flat.root];
        while let Some(stage) = pending.pop() {
            let stage = &flat.stages[stage];
            let bound = stage.origin.and_then(|origin| beyond.end(origin));
            if let (Some((_, from)), Some(bound)) = (stage.origin, bound)
                && bound == from
            {
                continue;
            }
            for &entry in &stage.entries {
                let next = flat.entries[entry].exit.successors();
                pending.extend(next.filter(|&next| !std::mem::replace(&mut known[next], true)));
            }
            let (Some((chain, from)), Some(&last)) = (stage.origin, stage.entries.last()) else { continue };
            let rules = &ruleset.chains[chain].rules;
            let last = &flat.entries[last];
            // A stage runs down its chain to a rule that takes all packets, to where another goes on, or to the end.
            let end = match (last.rule, &last.exit) {
                (Some(rule), _) => rules.iter().position(|&own| own == rule).map(|at| at + 1),
                (None, Exit::Then { stage, .. }) => match flat.stages[*stage].origin {
                    Some((next, at)) if next == chain => Some(at as usize),
                    _ => None,
                },
                (None, _) => None,
            };
            let from = from as usize;
            let end = end.filter(|end| *end > from).unwrap_or(rules.len());
            let end = bound.map_or(end, |bound| end.min(bound as usize));
            rules[from.min(end)..end].iter().for_each(|rule| reach.tried[*rule] = true);
            if let Exit::End(Ending { verdict: Verdict::Defer, by }) = last.exit {
                reach.stops.insert(by);
            }
        }
        if reach.bounded {
            for rule in ruleset.rules.keys() {
                if let Some(is_left) = beyond.is_left(rule) {
                    reach.tried[rule] = !is_left;
                }
            }
        }
        reach
    }

    /// Whether somebody lets nothing on that the rules behind could decide.
    fn is_stop(&self, ruleset: &Ruleset, by: Decider) -> bool {
        let Decider::Rule(rule) = by else { return true };
        let rules = &ruleset.chains[ruleset.rules[rule].chain].rules;
        let next = rules.iter().skip_while(|own| **own != rule).nth(1);
        // Some packets get on where fragments don't.
        next.is_none_or(|next| !self.tried[*next])
    }
}

/// Whether a stage is one that `flatten` did not make, because there would have been too many: all packets are left to the
/// kernel before the rule is asked.
fn is_refused(flat: &Classifier, stage: &StageData) -> bool {
    let [only] = stage.entries[..] else { return false };
    let EntryData { rule: None, exit: Exit::End(ending), .. } = &flat.entries[only] else { return false };
    ending.verdict == Verdict::Defer && matches!(ending.by, Decider::Rule(_))
}

/// The lines that count as compiled and that only packets come to which a bound leaves to the kernel before.
pub fn behind_bounds(session: &Session, report: &Report, places: &[(&Place, &Reach)]) -> BTreeSet<u32> {
    let ruleset = &session.ruleset;
    let bounded = places.iter().filter(|(_, reach)| reach.bounded);
    let behind = bounded.flat_map(|(place, reach)| {
        led_to(ruleset, place)
            .into_iter()
            .filter(|rule| !reach.tried[*rule])
            .map(|rule| session.line_of(rule))
    });
    let mut behind: BTreeSet<u32> = behind.collect();
    if !behind.is_empty() {
        let passed_over = passed_over(session, report, places);
        behind.retain(|line| passed_over.contains(line));
    }
    behind
}

/// The lines that count as compiled and whose rules no packet is tried against.
fn passed_over(session: &Session, report: &Report, places: &[(&Place, &Reach)]) -> BTreeSet<u32> {
    let tried = |rule: &Rule| places.iter().any(|(_, reach)| reach.tried[*rule]);
    let compiled = |line: &u32| report.lines.get(line) == Some(&Status::Compiled);
    session
        .rules_by_line()
        .into_iter()
        .filter(|(line, rules)| compiled(line) && !rules.iter().any(tried))
        .map(|(line, _)| line)
        .collect()
}

/// The lines that count as compiled and that no program comes to, because every packet is left to the kernel before; and
/// a finding for each rule or chain that does so. `places` are those where the rules are judged.
pub fn never_reached(
    session: &Session,
    report: &Report,
    places: &[(&Place, &Reach)],
) -> (BTreeSet<u32>, Vec<Diagnostic>) {
    let ruleset = &session.ruleset;
    let passed_over = passed_over(session, report, places);
    let mut lines = BTreeSet::new();
    let mut findings: Vec<Diagnostic> = Vec::new();
    if passed_over.is_empty() {
        return (lines, findings);
    }
    for (place, reach) in places {
        let led_to = led_to(ruleset, place);
        let behind: BTreeSet<u32> = led_to
            .iter()
            .filter(|rule| !reach.tried[**rule])
            .map(|rule| session.line_of(*rule))
            .filter(|line| passed_over.contains(line))
            .collect();
        let mut stops = reach.stops.iter().copied().filter(|by| reach.is_stop(ruleset, *by));
        // A path has what its hooks alone have.
        if behind.is_subset(&lines) {
            continue;
        }
        let Some(first) = stops.next() else { continue };
        let mut finding = finding(ruleset, place, first, behind.len());
        let mut others = stops.filter_map(|by| Some(stop(ruleset, place, by)?.0));
        for span in others.by_ref().take(STOPS_SHOWN) {
            finding = finding.with_label(span, "and those that come here");
        }
        let more = others.count();
        if more > 0 {
            finding = finding.with_note(format!("and those that come to {more} more rules"));
        }
        lines.extend(behind);
        findings.push(finding);
    }
    (lines, findings)
}

/// The rules that a place's chains lead to, but for those behind one that takes all packets whatever they are.
fn led_to(ruleset: &Ruleset, place: &Place) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::new();
    let mut known: SecondaryMap<Chain, bool> = SecondaryMap::new();
    let mut pending = ruleset.path_chains(place);
    while let Some(chain) = pending.pop() {
        if std::mem::replace(&mut known[chain], true) {
            continue;
        }
        for &rule in &ruleset.chains[chain].rules {
            rules.insert(rule);
            let data = &ruleset.rules[rule];
            if let Action::Jump(to) | Action::Goto(to) = data.action {
                pending.push(to);
            }
            let ends = data.action.ends() || matches!(data.action, Action::Goto(_) | Action::Return);
            if ends && data.clauses.is_empty() {
                break;
            }
        }
    }
    rules
}

/// Where somebody who leaves all packets to the kernel stands, and why.
fn stop(ruleset: &Ruleset, place: &Place, by: Decider) -> Option<(polc_ir::source::Span, String)> {
    match by {
        Decider::Rule(rule) => {
            let data = &ruleset.rules[rule];
            Some(match rule_deferral(ruleset, place, data) {
                Some((span, deferral)) => (span, deferral.to_string()),
                None => (data.span, "an earlier rule may have decided them".into()),
            })
        }
        Decider::Policy(chain) => {
            Some((ruleset.chains[chain].span, "its table translates packets of some connections".into()))
        }
        Decider::Hotdrop(_) | Decider::Frame(_) | Decider::Nothing => None,
    }
}

fn finding(ruleset: &Ruleset, place: &Place, by: Decider, count: usize) -> Diagnostic {
    let (rules, are) = if count == 1 { ("rule", "is") } else { ("rules", "are") };
    let message = format!(
        "every packet that comes here is left to the kernel, and {count} compiled {rules} behind it {are} never reached"
    );
    let stop = stop(ruleset, place, by);
    let finding = Diagnostic::warning(NEVER_REACHED, message, stop.as_ref().map(|(span, _)| *span));
    let finding = match stop {
        Some((_, why)) => finding.with_note(why),
        None => finding,
    };
    finding.with_hint(hint(ruleset, place, by))
}

/// What lets packets on.
fn hint(ruleset: &Ruleset, place: &Place, by: Decider) -> &'static str {
    let arrives = matches!(place.attach, Some(Attach::Xdp | Attach::TcIngress));
    match by {
        Decider::Policy(_) => {
            "a program on a hook of netfilter sits behind the translation: `--attach netfilter --hook HOOK`"
        }
        Decider::Rule(rule) if arrives && place.mode == Mode::Accelerate => {
            let connections = Connections::LookedUp { expectations: false };
            let asking = Place { connections, ..place.clone() };
            match rule_deferral(ruleset, &asking, &ruleset.rules[rule]) {
                None => "`--connections lookup` lets the program ask the kernel for connections",
                Some(_) => BEFORE,
            }
        }
        _ => BEFORE,
    }
}

/// Where nothing can be given.
const BEFORE: &str = "rules that stand before it are decided early: put there what drops the same packets";

#[cfg(test)]
mod tests {
    use polc_ir::env::Env;
    use polc_ir::hook::Hook;
    use polc_ir::source::SourceMap;

    use super::*;
    use crate::flatten::flatten;
    use crate::place::place;
    use crate::report::Scope;
    use crate::select::Prefer;
    use crate::session::ReadOptions;

    /// Lines that are never reached at XDP on this path, and where findings point.
    fn lines(text: &str, path: &[Hook], connections: Connections) -> (Vec<u32>, Vec<u32>) {
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", text);
        let session = Session::read(sources, file, &[], &ReadOptions::default());
        assert!(!session.has_errors(), "{:?}", session.diagnostics);
        let place = Place { connections, ..place(path, Attach::Xdp, Mode::Accelerate, false) };
        let report = Report::new(&session, Scope::At(&place));
        let flat = flatten(&session.ruleset, &place, &Env::default(), &mut Vec::new());
        let reach = Reach::new(&session.ruleset, &flat, &mut Beyond::default());
        let (lines, findings) = never_reached(&session, &report, &[(&place, &reach)]);
        let at = findings.iter().map(|finding| session.sources.line_column(finding.span.expect("text")).line);
        (lines.into_iter().collect(), at.collect())
    }

    const STATE: &str = "*filter\n:user - [0:0]\n-A INPUT -s 10.0.0.1 -j DROP\n-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT\n\
        -A INPUT -s 10.0.0.2 -j DROP\n-A INPUT -j user\n-A user -p tcp -j DROP\n-A FORWARD -j DROP\nCOMMIT\n";

    #[test]
    fn what_leaves_every_packet_to_the_kernel_hides_what_follows() {
        let input = [Hook::Input];
        assert_eq!(lines(STATE, &input, Connections::Unknown), (vec![5, 6, 7], vec![4]));
        let asked = Connections::LookedUp { expectations: false };
        assert_eq!(lines(STATE, &input, asked), (vec![], vec![]));
        // Some packets get on: those that are not logged, and those that a rule may drop.
        let some = "*filter\n-A INPUT -p udp -j LOG\n-A INPUT -m conntrack --ctstate INVALID -j DROP\n-A INPUT -j DROP\nCOMMIT\n";
        assert_eq!(lines(some, &input, Connections::Unknown), (vec![], vec![]));
    }

    #[test]
    fn a_chain_hides_what_only_its_end_leads_to() {
        let text = "*filter\n:log - [0:0]\n-A INPUT -p tcp -j log\n-A INPUT -p udp -j DROP\n-A log -j LOG\n-A log -j DROP\nCOMMIT\n";
        assert_eq!(lines(text, &[Hook::Input], Connections::Unknown), (vec![6], vec![5]));
    }

    #[test]
    fn what_is_behind_a_bound_is_deferred() {
        // Ranges that overlap every way: none of them says what another does.
        let range = |i: usize| format!("10.0.{}.{}-10.255.255.255", i / 256, i % 256);
        let mark = |i: usize| {
            let (src, dst) = (range(i), range(i * 7919 % 2000));
            format!(
                "-A INPUT -m iprange --src-range {src} --dst-range {dst} -j MARK --set-xmark {i}/0xffff\n"
            )
        };
        let marks: String = (0..2000).map(mark).collect();
        let text = format!(
            "*mangle\n-A INPUT -p udp -j DROP\n{marks}COMMIT\n*filter\n:end - [0:0]\n-A INPUT -j end\n-A end -s 10.0.0.1 -j DROP\nCOMMIT\n"
        );
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", text);
        let session = Session::read(sources, file, &[], &ReadOptions::default());
        let place = place(&[Hook::Input], Attach::Xdp, Mode::Accelerate, false);
        let mut report = Report::new(&session, Scope::At(&place));
        assert_eq!(report.compiled(), 2003);
        let compiled = crate::compile(&session.ruleset, &place, &Env::default(), &Default::default());
        let [finding] = &compiled.diagnostics[..] else { panic!("{:?}", compiled.diagnostics) };
        assert_eq!(finding.code, crate::bound::TOO_DEEP);
        let first = session.sources.line_column(finding.span.expect("a rule")).line;
        report.defer_bounded(&session, &compiled.diagnostics, &[(&place, &compiled.reach)]);
        // All packets but those of the first rule are left to the kernel, marked or not.
        assert_eq!((first, report.compiled(), report.deferred()), (3, 1, 2002));
        // Nothing is left of what is behind it, so that packets can be made for all entries.
        let classifier = &compiled.classifier;
        let listed: usize = classifier.stages.values().map(|stage| stage.entries.len()).sum();
        assert_eq!(classifier.entries.len(), listed);
        assert_eq!(crate::witness::Witnesses::new(classifier, &[], 1).take(200).count(), 200);
    }

    /// How many rules are compiled, and whether the last is.
    fn compiled(text: &str, mode: Mode, prefer: Prefer) -> (usize, bool) {
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", text);
        let session = Session::read(sources, file, &[], &ReadOptions::default());
        let place = place(&[Hook::Input], Attach::Xdp, mode, false);
        let mut report = Report::new(&session, Scope::At(&place));
        let env = Env::default();
        let compiled = crate::compile_with(&session.ruleset, &place, &env, &Default::default(), prefer);
        report.defer_bounded(&session, &compiled.diagnostics, &[(&place, &compiled.reach)]);
        let last = report.lines.values().next_back() == Some(&Status::Compiled);
        (report.compiled(), last)
    }

    #[test]
    fn a_rule_is_compiled_if_packets_come_to_it_that_no_bound_ends() {
        let mark = |i: usize| {
            let from = i * 7919 % 60_000;
            let to = from + i * 104_729 % 5_000;
            format!("-A INPUT -p tcp -m tcp --dport {from}:{to} -j MARK --or-mark {}\n", 1 << (i % 32))
        };
        let marks: String = (0..800).map(mark).collect();
        let text = format!("*filter\n{marks}-A INPUT -p tcp -m tcp --dport 65100 -j DROP\nCOMMIT\n");
        let (compiled, last) = compiled(&text, Mode::Accelerate, Prefer::Cheapest);
        assert!((1..801).contains(&compiled), "{compiled}");
        assert!(last);
    }

    #[test]
    fn rules_that_ask_for_chance_are_led_past_those_that_cannot_match() {
        let rule = |i: usize| {
            let host = format!("10.0.{}.{}", i / 256, i % 256);
            format!("-A INPUT -s {host} -m statistic --mode random --probability 0.5 -j DROP\n")
        };
        let rules: String = (0..900).map(rule).collect();
        let text = format!("*filter\n{rules}COMMIT\n");
        assert_eq!(compiled(&text, Mode::Replace, Prefer::Cheapest), (900, true));
    }

    #[test]
    fn the_first_rules_of_a_stage_that_is_too_deep_are_compiled() {
        let rule = |i: u32| {
            let mask = i.wrapping_mul(2_654_435_761) | 0x8100_0081;
            let value = i.wrapping_mul(40_503_001) & mask;
            let [value, mask] = [value, mask].map(std::net::Ipv4Addr::from);
            format!("-A INPUT -s {value}/{mask} -p tcp -m tcp --dport {} -j DROP\n", i * 31 % 60_000)
        };
        let rules: String = (1..5000).map(rule).collect();
        let (compiled, last) = compiled(&format!("*filter\n{rules}COMMIT\n"), Mode::Accelerate, Prefer::Walk);
        assert!((500..4999).contains(&compiled), "{compiled}");
        assert!(!last);
    }

    #[test]
    fn a_table_that_translates_hides_the_next_hook() {
        let text = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080\nCOMMIT\n\
            *filter\n-A INPUT -s 10.0.0.1 -j DROP\nCOMMIT\n";
        assert_eq!(lines(text, &[Hook::Prerouting, Hook::Input], Connections::Unknown), (vec![6], vec![2]));
        assert_eq!(lines(text, &[Hook::Input], Connections::Unknown), (vec![], vec![]));
    }
}
