//! Entries that no packet takes, as far as a look at one stage after another tells: what packets come to a stage at all,
//! and what earlier entries leave of them. What only a whole way to a stage rules out is for [`super::ways`].

use cranelift_entity::{EntitySet, SecondaryMap};
use polc_ir::classifier::{Classifier, Exit};
use polc_ir::cube::{Cube, Test};
use polc_ir::entities::{Entry, Stage};

use super::random::Random;
use super::region::{Literal, Region, TooLong};
use super::solve::{Budget, Clause, Problem, Search};

/// Tests that are looked at for one entry beyond the entries before it, and for all.
const TESTS_MAX: usize = 1 << 14;
const TESTS_OF_ALL_MAX: usize = 1 << 26;
/// Intervals that are kept of a field's values at a stage.
const INTERVALS_MAX: usize = 64;

/// What is known of the entries of a classifier.
#[derive(Debug)]
pub(super) struct Hidden<'a> {
    classifier: &'a Classifier,
    /// Entries that no packet takes.
    pub(super) entries: EntitySet<Entry>,
    /// What packets are like that come to a stage, and what they may be like besides; `None` if none do.
    bounds: SecondaryMap<Stage, Option<Region<'a>>>,
}

impl<'a> Hidden<'a> {
    /// Looks at those among the entries for which `asked` holds, of packets that are like `domain`.
    pub(super) fn new(
        classifier: &'a Classifier,
        domain: &'a Cube,
        asked: impl Fn(Entry) -> bool,
    ) -> Hidden<'a> {
        let family = classifier.family;
        let mut hidden = Hidden { classifier, entries: EntitySet::new(), bounds: SecondaryMap::new() };
        let mut all = Budget::new(TESTS_OF_ALL_MAX);
        let mut bounds = Region::default();
        let is_possible = domain.tests().iter().all(|test| bounds.and(&Literal::new(test), true, family));
        hidden.bounds[classifier.root] = is_possible.then_some(bounds);
        // Stages lead to smaller numbers.
        for data in classifier.stages.values().rev() {
            for &entry in &data.entries {
                let region = hidden.region(entry);
                debug_assert!(region.is_some() || asked(entry), "no packet that was seen is ruled out");
                let is_hidden = region.is_none() || asked(entry) && hidden.leaves_nothing(entry, &mut all);
                let (Some(region), false) = (region, is_hidden) else {
                    hidden.entries.insert(entry);
                    continue;
                };
                let exit = &classifier.entries[entry].exit;
                let behind = match exit {
                    Exit::Then { writes, .. } => {
                        writes.iter().fold(region, |region, write| region.behind(write, family))
                    }
                    _ => region,
                };
                for next in exit.successors() {
                    match &mut hidden.bounds[next] {
                        Some(bounds) => bounds.join(&behind, INTERVALS_MAX, family),
                        none => *none = Some(behind.clone()),
                    }
                }
            }
        }
        hidden
    }

    /// What is known of packets that take an entry, without what earlier ones take; `None` if there are none.
    fn region(&self, entry: Entry) -> Option<Region<'a>> {
        let data = &self.classifier.entries[entry];
        let mut region = self.bounds[data.stage].clone()?;
        let tests = data.cube.tests();
        tests
            .iter()
            .all(|test| region.and(&Literal::new(test), true, self.classifier.family))
            .then_some(region)
    }

    /// Whether earlier entries take whatever an entry would; false also if that would take too long to find out.
    fn leaves_nothing(&self, entry: Entry, all: &mut Budget) -> bool {
        let problem = match self.enter(&[entry], Problem::default(), all) {
            Ok(Some((problem, _))) => problem,
            Ok(None) => return true,
            Err(TooLong) => return false,
        };
        let mut budget = Budget::new(TESTS_MAX.min(all.left()));
        let given = budget.left();
        let found = Search::new(problem, self.classifier.family).next(&mut budget, &mut Random::new(0));
        let spent = all.spend(given - budget.left());
        matches!(found, Ok(None)) && spent.is_ok()
    }

    /// What a packet is like that takes one of some entries of a stage, of which `problem` is asked where it does; `None`
    /// if it can't be. Whether that is all: an entry that takes some of what an earlier one of these leaves is
    /// not told from them.
    pub(super) fn enter(
        &self,
        taken: &[Entry],
        mut problem: Problem<'a>,
        budget: &mut Budget,
    ) -> Result<Option<(Problem<'a>, bool)>, TooLong> {
        let family = self.classifier.family;
        let stage = self.classifier.entries[taken[0]].stage;
        let region = if let [one] = *taken { self.region(one) } else { self.bounds[stage].clone() };
        let Some(region) = region.filter(|_| !taken.iter().all(|entry| self.entries.contains(*entry))) else {
            return Ok(None);
        };
        if !problem.region.and_region(&region, family) {
            return Ok(None);
        }
        let mut is_all = true;
        let (mut before, mut rest) = (Vec::new(), taken);
        for &entry in &self.classifier.stages[stage].entries {
            budget.spend(1)?;
            let tests = self.classifier.entries[entry].cube.tests();
            let literals = || tests.iter().map(Literal::new);
            if rest.first() == Some(&entry) {
                rest = &rest[1..];
                if rest.is_empty() {
                    break;
                }
                before.push(tests);
                continue;
            }
            if !literals().all(|literal| problem.region.leaves(&literal, true, family)) {
                continue;
            }
            budget.spend(tests.len() + before.len())?;
            if !before.is_empty() {
                let mut both = problem.region.clone();
                if !literals().all(|literal| both.and(&literal, true, family)) {
                    continue;
                }
                let may_hold = |tests: &&[Test]| {
                    tests.iter().map(Literal::new).all(|literal| both.leaves(&literal, true, family))
                };
                if before.iter().any(may_hold) {
                    is_all = false;
                    continue;
                }
            }
            problem.clauses.push(literals().collect::<Clause<'a>>());
        }
        if !problem.propagate(family, budget)? {
            return Ok(None);
        }
        problem.clauses.sort_unstable();
        problem.clauses.dedup();
        Ok(Some((problem, is_all)))
    }
}

#[cfg(test)]
mod tests {
    use polc_ir::entities::Rule;
    use polc_ir::env::Attach;

    use super::super::tests::classified;
    use super::*;

    /// The numbers of rules all of whose entries are hidden.
    fn hidden_rules(rules: &str) -> Vec<u32> {
        let text = format!("*filter\n:INPUT ACCEPT [0:0]\n:to - [0:0]\n{rules}\nCOMMIT\n");
        let (classifier, _) = classified(&text, Attach::Netfilter);
        let all = Cube::all();
        let hidden = Hidden::new(&classifier, &all, |_| true).entries;
        let entries_of = |rule| classifier.entries.iter().filter(move |(_, data)| data.rule == Some(rule));
        let all_hidden = |rule| entries_of(rule).all(|(entry, _)| hidden.contains(entry));
        let rules = (0..rules.lines().count() as u32).map(Rule::from_u32);
        rules.filter(|rule| all_hidden(*rule)).map(|rule| rule.as_u32() + 1).collect()
    }

    #[test]
    fn what_earlier_rules_take_together_is_hidden() {
        let halves = "-A INPUT -s 10.0.0.0/9 -j DROP\n-A INPUT -s 10.128.0.0/9 -j DROP\n";
        assert_eq!(hidden_rules(&format!("{halves}-A INPUT -s 10.1.0.0/8 -p udp -j ACCEPT")), [3]);
        assert!(hidden_rules(&format!("{halves}-A INPUT -s 10.0.0.0/7 -p udp -j ACCEPT")).is_empty());
        let one = "-A INPUT -s 10.0.0.0/9 -p udp -j DROP\n-A INPUT -s 10.0.0.0/8 -j ACCEPT";
        assert!(hidden_rules(one).is_empty());
    }

    #[test]
    fn what_only_hidden_rules_lead_to_is_hidden() {
        let rules = "-A INPUT -s 10.0.0.0/8 -j DROP\n-A INPUT -s 10.1.0.0/16 -j to\n-A to -p tcp -j ACCEPT";
        assert_eq!(hidden_rules(rules), [2, 3]);
        assert!(hidden_rules(&rules.replace("10.1.", "11.1.")).is_empty());
    }
}
