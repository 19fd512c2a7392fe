//! A table while its section is read: its chains by name, the order of their rules, and what lines do to both.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write as _;
use std::sync::Arc;

use polc_ir::hook::{Family, Hook, TableKind};
use polc_ir::limits;
use polc_ir::source::{Span, bytes};

use crate::ast::{ChainAst, ChainIndex, Counters, Policy, RuleAst, TableAst, TargetVerdict, Text};
use crate::codes;
use crate::ext::Fault;
use crate::order::{Homes, Order};
use crate::print;
use crate::targets;
use crate::value::WHITE_SPACE;

/// A table whose section is open.
pub(crate) struct OpenTable {
    /// Its chains' rules are in `orders` until the table is closed.
    pub(crate) ast: TableAst,
    family: Family,
    names: HashMap<Arc<str>, ChainIndex>,
    /// The rules of each chain, in order.
    orders: Vec<Order>,
    homes: Homes,
    /// How many of these rules lead to each chain.
    references: Vec<u32>,
    /// The rules by what they ask and do, in order; kept from the first line on that looks for a rule by this.
    alike: Option<HashMap<String, VecDeque<u32>>>,
}

impl OpenTable {
    /// A table with its base chains. Those that `before` has keep its policies.
    pub(crate) fn new(kind: TableKind, family: Family, span: Span, before: Option<&TableAst>) -> OpenTable {
        let ast = TableAst { kind, span, chains: Vec::new(), rules: Vec::new(), rejected: Vec::new() };
        let mut table = OpenTable {
            ast,
            family,
            names: HashMap::new(),
            orders: Vec::new(),
            homes: Homes::new(),
            references: Vec::new(),
            alike: None,
        };
        for hook in kind.hooks() {
            let kept = before.and_then(|table| table.chains.iter().find(|chain| chain.hook == Some(*hook)));
            let span = kept.map_or(span, |kept| kept.span);
            table.add_chain(hook.chain_name().into(), span, Some(*hook), None);
            if let (Some(kept), Some(chain)) = (kept, table.ast.chains.last_mut()) {
                chain.policy = kept.policy;
            }
        }
        table
    }

    /// The chain of this name.
    pub(crate) fn chain(&self, name: &str) -> Option<ChainIndex> {
        self.names.get(name).copied()
    }

    /// How many chains there are, deleted ones included.
    pub(crate) fn chains(&self) -> usize {
        self.orders.len()
    }

    /// How many rules a chain has.
    pub(crate) fn len(&self, chain: usize) -> usize {
        self.orders[chain].len()
    }

    fn add_chain(&mut self, name: Text, span: Span, hook: Option<Hook>, counters: Option<Counters>) {
        self.names.insert(name.shared(), ChainIndex(self.ast.chains.len() as u32));
        let (policy, rules) = (Policy::Accept, Vec::new());
        self.ast.chains.push(ChainAst { name, span, hook, policy, counters, rules, deleted: false });
        self.orders.push(Order::default());
        self.references.push(0);
    }

    /// What a line `:NAME -` makes, too.
    pub(crate) fn declare(
        &mut self,
        name: &str,
        span: Span,
        counters: Option<Counters>,
    ) -> Result<(), Fault> {
        check_name(name, span)?;
        if self.ast.chains.len() >= limits::CHAINS_MAX {
            let message = format!("more than {} chains", limits::CHAINS_MAX);
            return Err(Fault::new(codes::LIMIT, message).at(span));
        }
        self.add_chain(name.into(), span, None, counters);
        Ok(())
    }

    /// What `-N` makes: its name begins with neither `-` nor `!`, holds no blank, and is no target's.
    pub(crate) fn new_chain(&mut self, name: &str, span: Span) -> Result<(), Fault> {
        if self.names.contains_key(name) {
            return Err(Fault::new(codes::DUPLICATE_CHAIN, format!("chain `{name}` exists already")).at(span));
        }
        let bad = name.is_empty() || name.starts_with(['-', '!']) || name.contains(WHITE_SPACE);
        if bad || targets::find(name, self.family).is_some() {
            return Err(Fault::new(codes::CHAIN_NAME, format!("`{name}` can't be a chain's name")).at(span));
        }
        self.declare(name, span, None)
    }

    /// Puts a rule at a position of a chain, before the one that is there.
    pub(crate) fn insert(&mut self, chain: usize, position: usize, rule: RuleAst) {
        if let Some(to) = led_to(&rule) {
            self.references[to] += 1;
        }
        let id = self.ast.rules.len() as u32;
        self.orders[chain].insert(position, id, &mut self.homes);
        if let Some(alike) = &mut self.alike {
            let (order, homes) = (&self.orders[chain], &self.homes);
            let others = alike.entry(key(&rule, self.family)).or_default();
            let place = order.place(id, homes);
            let at = match others.back() {
                Some(&last) if order.place(last, homes) > place => {
                    others.partition_point(|&other| order.place(other, homes) < place)
                }
                _ => others.len(),
            };
            others.insert(at, id);
        }
        self.ast.rules.push(rule);
    }

    /// Takes the rule at a position of a chain away.
    pub(crate) fn remove(&mut self, chain: usize, position: usize) {
        if let Some(alike) = &mut self.alike {
            let (order, homes) = (&self.orders[chain], &self.homes);
            let id = order.iter_from(position).next();
            let rule = id.map(|id| (id, &self.ast.rules[id as usize]));
            if let Some((id, rule)) = rule
                && let Some(others) = alike.get_mut(&key(rule, self.family))
            {
                let place = order.place(id, homes);
                others.remove(others.partition_point(|&other| order.place(other, homes) < place));
            }
        }
        let id = self.orders[chain].remove(position);
        if let Some(to) = led_to(&self.ast.rules[id as usize]) {
            self.references[to] -= 1;
        }
    }

    /// The position of the first rule of its chain that asks for the same and does the same.
    pub(crate) fn find(&mut self, rule: &RuleAst) -> Option<usize> {
        let (rules, family) = (&self.ast.rules, self.family);
        let alike = self.alike.get_or_insert_with(|| {
            let mut alike: HashMap<String, VecDeque<u32>> = HashMap::new();
            for id in self.orders.iter().flat_map(Order::iter) {
                alike.entry(key(&rules[id as usize], family)).or_default().push_back(id);
            }
            alike
        });
        let &first = alike.get(&key(rule, family))?.front()?;
        Some(self.orders[rule.chain.0 as usize].position(first, &self.homes))
    }

    /// Takes all rules of a chain away.
    pub(crate) fn flush(&mut self, chain: usize) {
        for id in std::mem::take(&mut self.orders[chain]).iter() {
            let rule = &self.ast.rules[id as usize];
            if let Some(to) = led_to(rule) {
                self.references[to] -= 1;
            }
            if let Some(alike) = &mut self.alike {
                alike.remove(&key(rule, self.family));
            }
        }
    }

    /// Takes a user chain away, if it has no rules and no rule leads to it.
    pub(crate) fn delete(&mut self, chain: usize, span: Span) -> Result<(), Fault> {
        let ChainAst { name, hook, deleted, .. } = &mut self.ast.chains[chain];
        let why = if hook.is_some() {
            "is a base chain"
        } else if self.orders[chain].len() > 0 {
            "has rules"
        } else if self.references[chain] > 0 {
            "is where rules lead to"
        } else {
            *deleted = true;
            self.names.remove(&**name);
            return Ok(());
        };
        let message = format!("chain `{name}` {why} and can't be deleted");
        Err(Fault::new(codes::COMMAND, message).at(span).hint("flush what holds it before this line"))
    }

    /// Gives a user chain another name, which no chain has.
    pub(crate) fn rename(&mut self, chain: usize, name: &str, span: Span) -> Result<(), Fault> {
        check_name(name, span)?;
        let fault = |message: String| Err(Fault::new(codes::CHAIN_NAME, message).at(span));
        if self.names.contains_key(name) {
            return fault(format!("chain `{name}` exists already"));
        }
        let old = &mut self.ast.chains[chain];
        if old.hook.is_some() {
            return fault(format!("chain `{}` is a base chain and can't be renamed", old.name));
        }
        let text = Text::from(name);
        if let Some(index) = self.names.remove(&*old.name) {
            self.names.insert(text.shared(), index);
        }
        old.name = text;
        Ok(())
    }

    /// The table as it is at its end.
    pub(crate) fn close(mut self) -> TableAst {
        for (chain, order) in self.ast.chains.iter_mut().zip(self.orders) {
            chain.rules.reserve_exact(order.len());
            chain.rules.extend(order.iter());
        }
        self.ast.rules.shrink_to_fit();
        self.ast
    }
}

/// The chain that a rule jumps or goes to.
fn led_to(rule: &RuleAst) -> Option<usize> {
    match rule.target.verdict {
        TargetVerdict::Jump(to) | TargetVerdict::Goto(to) => Some(to.0 as usize),
        _ => None,
    }
}

/// Whether a chain may have this name at all.
fn check_name(name: &str, span: Span) -> Result<(), Fault> {
    if ["ACCEPT", "DROP", "RETURN", "QUEUE"].contains(&name) {
        return Err(Fault::new(codes::CHAIN_NAME, format!("`{name}` can't be a chain's name")).at(span));
    }
    if bytes::count(name) > limits::CHAIN_NAME_BYTES_MAX {
        let message = format!("chain name `{name}` is longer than {} bytes", limits::CHAIN_NAME_BYTES_MAX);
        return Err(Fault::new(codes::CHAIN_NAME, message).at(span));
    }
    Ok(())
}

/// What rules of one chain have in common that `-D` and `-C` take for the same: what is saved of them, with chains by
/// number, since names change. No part of it holds a NUL, so that NULs keep the parts apart.
fn key(rule: &RuleAst, family: Family) -> String {
    let mut key = String::new();
    // IPv6 notes that a protocol was named, even if it is `all`.
    let named = family == Family::V6 && rule.protocol.is_some();
    let to = led_to(rule);
    write!(key, "{} {named} {to:?}", rule.chain.0)
        .and_then(|()| print::conditions(rule, "\0", &mut key))
        .and_then(|()| print::target(&rule.target.verdict, |_| "", &mut key))
        .expect("writing to a string succeeds");
    key
}
