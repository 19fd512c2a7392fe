//! Lowering: from the syntax tree to netfilter's meaning.
//!
//! A rule becomes an ordered list of clauses, in the order in which the kernel evaluates it: first what `ip_packet_match`
//! tests (net/ipv4/netfilter/ip_tables.c; addresses, devices, protocol, fragment), then the matches as written, each
//! preceded by the guards that say what happens to packets whose header it can't read. No rule vanishes: a match or
//! target that nothing below can evaluate becomes an opaque clause or action that carries its name and the reason.

mod guards;
pub(crate) mod header;
pub(crate) mod network;
mod targets;
pub(crate) mod transport;

use std::collections::BTreeSet;

use polc_ir::cube::{Test, TestLists};
use polc_ir::derived::{BEYOND, DerivedData};
use polc_ir::entities::{Chain, Rule, Set};
use polc_ir::field::Field;
use polc_ir::hook::{Family, Semantics};
use polc_ir::interval::IntervalSet;
use polc_ir::ruleset::{
    Action, BaseChain, ChainData, Clause, ClauseKind, Counters, EffectTestData, EffectTestKind, Opaque,
    Policy, RuleData, Ruleset, TableData,
};
use polc_ir::set::{SetContents, SetData, leaves};
use polc_ir::source::Span;

use crate::ast::{self, Dump, RuleAst, TableAst};
use crate::extension::Meaning;
use crate::ipset;

/// Lowers a dump and the sets it refers to.
///
/// What a rule needs that a place does not offer is judged there (`polc_ir::ruleset::deferral`), since it differs from
/// place to place. A set that a rule names and no file gives has unknown contents.
pub fn lower(dump: &Dump, sets: &[ipset::Sets], semantics: Semantics) -> Ruleset {
    let mut ruleset = Ruleset::new(dump.family, semantics);
    for file in sets {
        ipset::lower(file, dump.family, &mut ruleset);
    }
    let mut lists = TestLists::default();
    for table in &dump.tables {
        lower_table(table, &mut ruleset, &mut lists);
    }
    let changed = ruleset.rules.values().filter_map(|rule| match &rule.action {
        Action::Effect { sets, .. } => Some(sets),
        _ => None,
    });
    let names: BTreeSet<&String> = changed.flatten().collect();
    let named: Vec<Set> =
        ruleset.sets.keys().filter(|set| names.contains(&ruleset.sets[*set].name)).collect();
    for set in named {
        ruleset.sets[set].changed = true;
        // What is added to a list is added to a set in it (net/netfilter/ipset/ip_set_list_set.c, `list_set_kadd`).
        for leaf in leaves(&ruleset.sets, set) {
            ruleset.sets[leaf].changed = true;
        }
    }
    ruleset
}

fn lower_table(ast: &TableAst, ruleset: &mut Ruleset, lists: &mut TestLists) {
    let table = ruleset.tables.push(TableData { kind: ast.kind, span: ast.span, chains: Vec::new() });
    let chains: Vec<Option<Chain>> = ast
        .chains
        .iter()
        .map(|chain| (!chain.deleted).then(|| ruleset.chains.push(lower_chain(chain, table))))
        .collect();
    ruleset.tables[table].chains = chains.iter().copied().flatten().collect();

    ruleset.rules.reserve(ast.rules.len());
    // Rules are numbered in source order, which `-I` makes another order than the chain's.
    let rules: Vec<Option<Rule>> = ast
        .rules
        .iter()
        .map(|rule| {
            let chain = chains[rule.chain.0 as usize]?;
            Some(Lowering { ruleset, lists, chains: &chains }.rule(rule, chain))
        })
        .collect();
    for (chain, ast) in chains.iter().zip(&ast.chains) {
        let Some(chain) = *chain else { continue };
        let order: Vec<Rule> = ast.rules.iter().filter_map(|&rule| rules[rule as usize]).collect();
        for (number, &rule) in (1..).zip(&order) {
            ruleset.rules[rule].number = number;
        }
        ruleset.chains[chain].rules = order;
    }
}

fn lower_chain(ast: &ast::ChainAst, table: polc_ir::entities::Table) -> ChainData {
    let policy = match ast.policy {
        ast::Policy::Accept => Policy::Accept,
        ast::Policy::Drop => Policy::Drop,
    };
    ChainData {
        name: ast.name.to_string(),
        table,
        base: ast.hook.map(|hook| BaseChain { hook, policy }),
        rules: Vec::new(),
        counters: counters(ast.counters),
        span: ast.span,
    }
}

fn counters(ast: Option<ast::Counters>) -> Counters {
    ast.map_or(Counters::default(), |ast| Counters { packets: ast.packets, bytes: ast.bytes })
}

/// What lowering one rule needs at hand.
struct Lowering<'a> {
    ruleset: &'a mut Ruleset,
    lists: &'a mut TestLists,
    /// The IR's chain for each of the table's.
    chains: &'a [Option<Chain>],
}

impl Lowering<'_> {
    fn rule(&mut self, ast: &RuleAst, chain: Chain) -> Rule {
        let mut body = Body {
            rule: Rule::from_u32(self.ruleset.rules.len() as u32),
            ruleset: self.ruleset,
            lists: self.lists,
            clauses: Vec::new(),
            span: ast.span,
        };
        header::lower(ast, &mut body);
        for one in ast.matches.iter() {
            body.span = one.span;
            if let Meaning::Match(lower) = one.options.extension.meaning {
                lower(&one.options, &mut body);
            }
        }
        let mut clauses = body.clauses;
        clauses.shrink_to_fit();
        let action = targets::lower(&ast.target.verdict, self.chains);
        self.ruleset.rules.push(RuleData {
            chain,
            number: 0,
            span: ast.span,
            clauses,
            action,
            action_span: ast.target.span,
            counters: counters(ast.counters),
        })
    }
}

/// The clauses of the rule being lowered.
pub struct Body<'a> {
    pub(crate) ruleset: &'a mut Ruleset,
    lists: &'a mut TestLists,
    rule: Rule,
    clauses: Vec<Clause>,
    /// The text that clauses added now come from.
    span: Span,
}

impl Body<'_> {
    pub(crate) fn family(&self) -> Family {
        self.ruleset.family
    }

    pub(crate) fn semantics(&self) -> Semantics {
        self.ruleset.semantics
    }

    pub(crate) fn push(&mut self, kind: ClauseKind) {
        self.clauses.push(Clause { kind, span: self.span });
    }

    /// The rule matches only if the test holds.
    pub(crate) fn require(&mut self, test: Test) {
        self.require_any(&[test]);
    }

    /// The rule matches only if one of the tests holds.
    pub(crate) fn require_any(&mut self, tests: &[Test]) {
        let tests = self.lists.list(tests);
        self.push(ClauseKind::Any(tests));
    }

    /// The rule matches only if the test holds, or with `negated` doesn't.
    pub(crate) fn require_unless(&mut self, negated: bool, test: Test) {
        let test = if negated { test.negated(self.family()) } else { test };
        self.require(test);
    }

    /// The rule matches only if the whole field lies in `values`, or with `negated` outside.
    pub(crate) fn require_values(&mut self, field: Field, negated: bool, values: IntervalSet) {
        let test = Test::new(field, self.family(), values);
        self.require_unless(negated, test);
    }

    /// The rule never matches.
    pub(crate) fn never(&mut self) {
        self.require_any(&[]);
    }

    /// The packet is dropped here if all the tests hold.
    pub(crate) fn hotdrop(&mut self, tests: Vec<Test>) {
        let tests = self.lists.list(&tests);
        self.push(ClauseKind::Hotdrop(tests));
    }

    /// A search that may drop the packet, or go beyond what is searched here, and has to find (or with `negated` not
    /// to find) what it looks for. x_tables' matches invert what came of it even where it drops the packet, and so match;
    /// nft looks at the drop first (net/netfilter/nft_compat.c, `__nft_match_eval`).
    pub(crate) fn search(&mut self, data: DerivedData, negated: bool) {
        let family = self.family();
        let field = Field::Derived(self.ruleset.derive(data));
        let drops = self.lists.list(&[Test::new(field, family, IntervalSet::point(2))]);
        self.push(match (negated, self.semantics()) {
            (true, Semantics::Legacy) => ClauseKind::Doom(drops),
            _ => ClauseKind::Hotdrop(drops),
        });
        self.push(ClauseKind::Beyond(Box::new(Test::new(field, family, IntervalSet::point(BEYOND.into())))));
        self.require_values(field, negated, IntervalSet::point(1));
    }

    /// A stateful or random test.
    pub(crate) fn effect(&mut self, kind: EffectTestKind, negate: bool) {
        let test = self.ruleset.effect_tests.push(EffectTestData { rule: self.rule, kind, negate });
        self.push(ClauseKind::Effect(test));
    }

    /// A condition that only the kernel can evaluate, without trace.
    pub(crate) fn opaque(&mut self, name: &str, reason: &str) {
        self.push(ClauseKind::Opaque(Box::new(Opaque {
            name: name.into(),
            reason: reason.into(),
            observable: false,
        })));
    }

    /// A condition that only the kernel can evaluate, and whose evaluation can be observed.
    pub(crate) fn observable(&mut self, name: &str, reason: &str) {
        self.push(ClauseKind::Opaque(Box::new(Opaque {
            name: name.into(),
            reason: reason.into(),
            observable: true,
        })));
    }

    /// The set of this name; one without known contents if no file declares it.
    pub(crate) fn set(&mut self, name: &str) -> Set {
        if let Some((set, _)) = self.ruleset.sets.iter().find(|(_, set)| set.name == name) {
            return set;
        }
        self.ruleset.sets.push(SetData {
            name: name.into(),
            family: None,
            dimensions: Vec::new(),
            netmask: None,
            mark_mask: u32::MAX,
            elements_max: 0,
            expires: false,
            changed: false,
            live: false,
            fixed: None,
            contents: SetContents::Unknown,
            create: String::new(),
            span: self.span,
        })
    }
}
