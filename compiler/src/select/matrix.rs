//! Classes and matrices: every column's values become classes, and classes are combined pair by pair.
//!
//! A class stands for the set of entries that are still possible. Two classes together stand for the entries in both,
//! of which all after the first that needs nothing else are forgotten: they can't win. So a table of two dimensions
//! turns two classes into one, and the last table gives the exit. The order of the combinations is chosen by the size
//! of the tables that come out.

use polc_ir::entities::Value;
use polc_ir::plan::{AluKind, DataTable};

use super::cells::{firsts, in_both};
use super::classes::{Sets, cut_after, first_of_both, insert, numbers, sparse};
use super::column::look_up;
use super::line::Line;
use super::problem::{Masked, Problem, Run};

/// Entries that bit sets are good for.
const ENTRIES_MAX: usize = 1 << 13;

/// Sets that a column's entries may ask for.
const PREDICATES_MAX: usize = 1 << 12;

/// A stage as tables.
#[derive(Debug)]
pub(super) struct Matrix {
    nodes: Vec<Node>,
    /// For each class of the last node, its exit.
    exits: Vec<u32>,
}

#[derive(Clone, Debug)]
enum Node {
    /// The classes of a column's values.
    Column { field: Masked, runs: Vec<Run> },
    /// The class of two classes is `cells[left * width + right]`.
    Pair { left: usize, right: usize, width: usize, cells: Vec<u32> },
}

/// Something that gives classes, while tables are chosen.
#[derive(Clone, Debug)]
struct Partial {
    node: usize,
    sets: Sets,
    /// Which columns it looked at.
    columns: Vec<bool>,
}

/// Makes the tables, if they are small enough.
pub(super) fn matrix(problem: &Problem) -> Option<Matrix> {
    let (nodes, last) = combine(problem, Wanted::First)?;
    let exits = (0..last.sets.len() as u32)
        .map(|class| {
            // A combination that no packet has may have no entry.
            numbers(last.sets.get(class)).next().map_or(0, |entry| problem.exit_of[entry])
        })
        .collect();
    Some(Matrix { nodes, exits })
}

/// The sets of entries that packets satisfy, as classes.
#[derive(Debug)]
pub(super) struct Classes {
    tables: Matrix,
    /// For each class, the entries.
    pub(super) sets: Sets,
}

/// Makes tables that tell all the entries a packet satisfies, if they are small enough.
pub(super) fn classes(problem: &Problem) -> Option<Classes> {
    let (nodes, last) = combine(problem, Wanted::All)?;
    Some(Classes { tables: Matrix { nodes, exits: Vec::new() }, sets: last.sets })
}

impl Classes {
    /// Writes the look-up; a class stands for what `map` gives.
    pub(super) fn write(&self, line: &mut Line<'_>, map: &dyn Fn(u32) -> u64) -> Value {
        self.tables.node(line, self.tables.nodes.len() - 1, map)
    }
}

/// What a look-up is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// The first entry.
    First,
    /// All entries.
    All,
}

/// Whether matrices may be small enough, as far as that is seen at a glance.
pub(super) fn is_open(problem: &Problem) -> bool {
    problem.entries.len() <= ENTRIES_MAX
        && problem.columns.iter().all(|column| column.predicates.len() <= PREDICATES_MAX)
}

/// Combines all columns.
fn combine(problem: &Problem, wanted: Wanted) -> Option<(Vec<Node>, Partial)> {
    if !is_open(problem) {
        return None;
    }
    let mut builder = Builder { problem, wanted, nodes: Vec::new(), work: 0, stored: 0 };
    let mut partials: Vec<Partial> =
        (0..problem.columns.len()).map(|column| builder.column(column)).collect::<Option<_>>()?;
    // A column that tells nothing apart is not looked at; one has to be.
    while partials.len() > 1
        && let Some(idle) = partials.iter().position(|partial| partial.sets.len() == 1)
    {
        let idle = partials.remove(idle);
        for partial in &mut partials {
            for (mine, its) in partial.columns.iter_mut().zip(&idle.columns) {
                *mine |= its;
            }
        }
    }
    if partials.is_empty() {
        return None;
    }
    while partials.len() > 3 {
        let (left, right) = smallest(&partials)?;
        let right = partials.remove(right);
        let left = partials.remove(left);
        let pair = builder.pair(&left, &right, problem.room.cells)?;
        partials.push(pair);
    }
    if partials.len() == 3 {
        partials = vec![builder.three(&partials)?];
    } else if partials.len() == 2 {
        builder.afford_last(&partials[0], &partials[1])?;
        partials = vec![builder.last(&partials[0].clone(), &partials[1].clone())?];
    }
    let last = partials.remove(0);
    // Columns that were not looked at may stand behind it.
    builder.nodes.truncate(last.node + 1);
    Some((builder.nodes, last))
}

/// The two that make the smallest table: those with the fewest classes. The first is the one that comes first.
fn smallest(partials: &[Partial]) -> Option<(usize, usize)> {
    let size = |&at: &usize| (partials[at].sets.len(), at);
    let first = (0..partials.len()).min_by_key(size)?;
    let second = (0..partials.len()).filter(|&at| at != first).min_by_key(size)?;
    Some((first.min(second), first.max(second)))
}

/// An order of three: two that are combined first, in a table of so many cells, and the third.
struct Order<'a> {
    first: usize,
    a: &'a Partial,
    b: &'a Partial,
    third: &'a Partial,
}

struct Builder<'a> {
    problem: &'a Problem,
    wanted: Wanted,
    nodes: Vec<Node>,
    /// Words looked at so far.
    work: usize,
    /// Words of the tables' sets so far.
    stored: usize,
}

impl Builder<'_> {
    /// Entries that test nothing but these columns, and so win over all behind them; none if all are wanted.
    fn done(&self, columns: &[bool]) -> Vec<u64> {
        let mut done = vec![0; self.problem.entries.len().div_ceil(64).max(1)];
        if self.wanted == Wanted::All {
            return done;
        }
        for (entry, tests) in self.problem.entries.iter().enumerate() {
            if tests.iter().all(|&(column, _)| columns[column as usize]) {
                insert(&mut done, entry);
            }
        }
        done
    }

    fn column(&mut self, column: usize) -> Option<Partial> {
        let problem = self.problem;
        let mut sets = Sets::new(problem.entries.len());
        let words = sets.words();
        let mut untested = vec![0; words];
        let mut testing: Vec<Vec<u64>> = vec![vec![0; words]; problem.columns[column].predicates.len()];
        for (entry, tests) in problem.entries.iter().enumerate() {
            match tests.iter().find(|test| test.0 as usize == column) {
                None => insert(&mut untested, entry),
                Some(&(_, predicate)) => insert(&mut testing[predicate as usize], entry),
            }
        }
        let mut columns = vec![false; problem.columns.len()];
        columns[column] = true;
        let done = self.done(&columns);
        let mut runs: Vec<Run> = Vec::new();
        // Every entry tests for one set of a column, so that the entries of sets are apart.
        let mut now = untested;
        let mut kept = vec![0; words];
        let done: Vec<(u32, u64)> = sparse(&done).collect();
        let mut kept_words: Vec<(u32, u64)> = Vec::new();
        let events = problem.columns[column].events();
        let mut start = 0;
        let mut at = 0;
        loop {
            while let Some(&(value, predicate, begins)) = events.get(at)
                && value == start
            {
                for (word, entries) in now.iter_mut().zip(&testing[predicate as usize]) {
                    *word = if begins { *word | entries } else { *word & !entries };
                }
                at += 1;
            }
            kept.copy_from_slice(&now);
            if let Some(first) = first_of_both(&kept, &done) {
                cut_after(&mut kept, first);
            }
            kept_words.clear();
            kept_words.extend(sparse(&kept));
            let class = sets.intern(&kept_words);
            if runs.last().is_none_or(|run| run.class != class) {
                runs.push(Run { start, class });
            }
            match events.get(at) {
                Some(&(value, ..)) => start = value,
                None => break,
            }
        }
        self.afford(runs.len(), words)?;
        let field = problem.columns[column].field;
        self.nodes.push(Node::Column { field, runs });
        Some(Partial { node: self.nodes.len() - 1, sets, columns })
    }

    /// The tables of three: of every order, the one with the smallest. That whose first table is smallest comes first,
    /// and another can't win once it has more classes.
    fn three(&mut self, partials: &[Partial]) -> Option<Partial> {
        let size = |one: &Partial, other: &Partial| one.sets.len() * other.sets.len();
        let mut orders = [(0, 1, 2), (0, 2, 1), (1, 2, 0)].map(|numbers| {
            let (a, b, third) = (&partials[numbers.0], &partials[numbers.1], &partials[numbers.2]);
            Order { first: size(a, b), a, b, third }
        });
        orders.sort_by_key(|order| order.first);
        let mut best: Option<(usize, &Order<'_>, Node, Partial)> = None;
        for order in &orders {
            let least = best.as_ref().map_or(usize::MAX, |(cells, ..)| *cells);
            if order.first >= least || self.afford(order.first, order.a.sets.words()).is_none() {
                continue;
            }
            let classes_max = self.problem.room.cells.min(least - order.first) / order.third.sets.len();
            let Some((node, pair)) = self.table(order.a, order.b, classes_max) else { continue };
            let cells = order.first + size(&pair, order.third);
            if cells < least && self.afford_last(&pair, order.third).is_some() {
                best = Some((cells, order, node, pair));
            }
        }
        let (_, order, node, pair) = best?;
        self.nodes.push(node);
        self.last(&pair, order.third)
    }

    /// The table of two, if there is time for it and it gives at most so many classes.
    fn pair(&mut self, left: &Partial, right: &Partial, classes_max: usize) -> Option<Partial> {
        self.afford(left.sets.len() * right.sets.len(), left.sets.words())?;
        self.paired(left, right, classes_max)
    }

    /// The table of two, if it gives at most so many classes.
    fn paired(&mut self, left: &Partial, right: &Partial, classes_max: usize) -> Option<Partial> {
        let (node, pair) = self.table(left, right, classes_max)?;
        self.stored += pair.sets.stored();
        self.nodes.push(node);
        Some(pair)
    }

    /// The same as the node that would come next.
    fn table(&self, left: &Partial, right: &Partial, classes_max: usize) -> Option<(Node, Partial)> {
        let columns: Vec<bool> = left.columns.iter().zip(&right.columns).map(|(a, b)| a | b).collect();
        let words_max = self.problem.room.sets_words.saturating_sub(self.stored);
        let done = self.done(&columns);
        let (cells, sets) = in_both(&left.sets, &right.sets, &done, classes_max, words_max)?;
        let node = Node::Pair { left: left.node, right: right.node, width: right.sets.len(), cells };
        Some((node, Partial { node: self.nodes.len(), sets, columns }))
    }

    /// Whether there is time for the table of two that gives what is wanted.
    fn afford_last(&mut self, left: &Partial, right: &Partial) -> Option<()> {
        let words = match self.wanted {
            Wanted::First => 1 + left.sets.words() / 4,
            Wanted::All => left.sets.words(),
        };
        self.afford(left.sets.len() * right.sets.len(), words)
    }

    /// The table of two that gives what is wanted, once that is known to be affordable.
    fn last(&mut self, left: &Partial, right: &Partial) -> Option<Partial> {
        if self.wanted == Wanted::All {
            return self.paired(left, right, usize::MAX);
        }
        let mut sets = Sets::new(self.problem.entries.len());
        let mut class_of: Vec<Option<u32>> = vec![None; self.problem.exits.len()];
        let cells = firsts(&left.sets, &right.sets, |entry| {
            let class = &mut class_of[self.problem.exit_of[entry] as usize];
            *class.get_or_insert_with(|| sets.push(&[(entry as u32 / 64, 1 << (entry % 64))]))
        })?;
        self.nodes.push(Node::Pair { left: left.node, right: right.node, width: right.sets.len(), cells });
        Some(Partial { node: self.nodes.len() - 1, sets, columns: Vec::new() })
    }

    /// Whether so many cells of so many words can be looked at.
    fn afford(&mut self, cells: usize, words: usize) -> Option<()> {
        self.work += cells * words;
        let room = self.problem.room;
        (cells <= room.cells && self.work <= room.words).then_some(())
    }
}

impl Matrix {
    /// Writes the look-up; the value is the index of the problem's exit.
    pub(super) fn write(&self, line: &mut Line<'_>) -> Value {
        let exits = &self.exits;
        self.node(line, self.nodes.len() - 1, &|class| exits[class as usize].into())
    }

    /// What this is, for people.
    pub(super) fn describe(&self) -> String {
        match self.nodes.last() {
            Some(Node::Pair { width, cells, .. }) => format!("matrix {} x {width}", cells.len() / width),
            Some(Node::Column { runs, .. }) => format!("search of {} runs", runs.len()),
            None => "nothing".to_string(),
        }
    }

    /// Writes a node, a class of which stands for what `map` gives. Depth is bounded by the number of columns.
    fn node(&self, line: &mut Line<'_>, node: usize, map: &dyn Fn(u32) -> u64) -> Value {
        match &self.nodes[node] {
            Node::Column { field, runs } => look_up(line, *field, runs, map),
            Node::Pair { left, right, width, cells } => {
                let classes = cells.iter().max().map_or(0, |&last| last + 1);
                let values: Vec<u64> = (0..classes).map(map).collect();
                let largest = values.iter().copied().max().unwrap_or(0);
                let cells = cells.iter().map(|&class| values[class as usize]);
                let table = line.table(DataTable::of(cells, largest));
                let (bytes, width) = (line.width(table), *width as u64);
                let left = self.node(line, *left, &|class| u64::from(class) * width * bytes);
                let right = self.node(line, *right, &|class| u64::from(class) * bytes);
                let offset = line.alu(AluKind::Add, left, right);
                line.read(table, offset)
            }
        }
    }
}
