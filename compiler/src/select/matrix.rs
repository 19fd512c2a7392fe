//! Classes and matrices: every column's values become classes, and classes are combined pair by pair.
//!
//! A class stands for the set of entries that are still possible. Two classes together stand for the entries in both,
//! of which all after the first that needs nothing else are forgotten: they can't win. So a table of two dimensions
//! turns two classes into one, and the last table gives the exit. The order of the combinations is chosen by the size
//! of the tables that come out.

use polc_ir::entities::Value;
use polc_ir::plan::{AluKind, DataTable};

use super::classes::{Sets, cut_after, first_of_both, insert, numbers, sparse};
use super::column::look_up;
use super::line::Line;
use super::problem::{Masked, Problem, Run};

/// Entries that bit sets are good for.
const ENTRIES_MAX: usize = 1 << 13;

/// Sets that a column's entries may ask for.
const PREDICATES_MAX: usize = 1 << 12;

/// Cells of a table.
const CELLS_MAX: usize = 1 << 21;

/// Words of bit sets that combining may look at.
const WORDS_MAX: usize = 1 << 26;

/// Words of the bit sets that say which classes have an entry.
const HAVING_WORDS_MAX: usize = 1 << 21;

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

/// Combines all columns.
fn combine(problem: &Problem, wanted: Wanted) -> Option<(Vec<Node>, Partial)> {
    if problem.entries.len() > ENTRIES_MAX
        || problem.columns.iter().any(|column| column.predicates.len() > PREDICATES_MAX)
    {
        return None;
    }
    let mut builder = Builder { problem, wanted, nodes: Vec::new(), work: 0 };
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
        let pair = builder.pair(&left, &right, CELLS_MAX)?;
        partials.push(pair);
    }
    if partials.len() == 3 {
        // Of every order of three, the one with the smallest tables is taken.
        let mut orders: Vec<(usize, usize, Partial, Vec<Node>)> = Vec::new();
        let size = |one: &Partial, other: &Partial| one.sets.len() * other.sets.len();
        for (a, b, c) in [(0, 1, 2), (0, 2, 1), (1, 2, 0)] {
            let nodes = builder.nodes.len();
            let least = orders.iter().map(|(cells, ..)| *cells).min().unwrap_or(usize::MAX);
            let first = size(&partials[a], &partials[b]);
            let classes_max = CELLS_MAX.min(least.saturating_sub(first)) / partials[c].sets.len();
            if first < least
                && let Some(pair) = builder.pair(&partials[a], &partials[b], classes_max)
            {
                let cells = first + size(&pair, &partials[c]);
                if cells < least && builder.afford_last(&pair, &partials[c]).is_some() {
                    orders.push((cells, c, pair, builder.nodes.split_off(nodes)));
                }
            }
            builder.nodes.truncate(nodes);
        }
        orders.sort_by_key(|(cells, ..)| *cells);
        let nodes = builder.nodes.len();
        let last = orders.into_iter().find_map(|(_, third, pair, own)| {
            builder.nodes.truncate(nodes);
            builder.nodes.extend(own);
            builder.last(&pair, &partials[third])
        });
        partials = vec![last?];
    } else if partials.len() == 2 {
        builder.afford_last(&partials[0], &partials[1])?;
        partials = vec![builder.last(&partials[0].clone(), &partials[1].clone())?];
    }
    let last = partials.remove(0);
    // Columns that were not looked at may stand behind it.
    builder.nodes.truncate(last.node + 1);
    Some((builder.nodes, last))
}

/// The two that make the smallest table.
fn smallest(partials: &[Partial]) -> Option<(usize, usize)> {
    let pairs =
        (0..partials.len()).flat_map(|left| (left + 1..partials.len()).map(move |right| (left, right)));
    pairs.min_by_key(|&(left, right)| partials[left].sets.len() * partials[right].sets.len())
}

struct Builder<'a> {
    problem: &'a Problem,
    wanted: Wanted,
    nodes: Vec<Node>,
    /// Words looked at so far.
    work: usize,
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

    /// The table of two, if there is time for it and it gives at most so many classes.
    fn pair(&mut self, left: &Partial, right: &Partial, classes_max: usize) -> Option<Partial> {
        self.afford(left.sets.len() * right.sets.len(), left.sets.words())?;
        self.paired(left, right, classes_max)
    }

    /// The table of two, if it gives at most so many classes.
    fn paired(&mut self, left: &Partial, right: &Partial, classes_max: usize) -> Option<Partial> {
        let columns: Vec<bool> = left.columns.iter().zip(&right.columns).map(|(a, b)| a | b).collect();
        let done = self.done(&columns);
        let mut sets = Sets::new(self.problem.entries.len());
        let words = sets.words();
        let (height, width) = (left.sets.len(), right.sets.len());
        let mut cells = Vec::with_capacity(height * width);
        let mut row = vec![0; words];
        let mut both: Vec<(u32, u64)> = Vec::new();
        for a in 0..height as u32 {
            if sets.len() > classes_max {
                return None;
            }
            left.sets.write(a, &mut row);
            for b in 0..width as u32 {
                both.clear();
                for &(at, word) in right.sets.get(b) {
                    let word = word & row[at as usize];
                    let finished = word & done[at as usize];
                    if finished != 0 {
                        // Up to the lowest that is finished.
                        both.push((at, word & (finished ^ (finished - 1))));
                        break;
                    }
                    if word != 0 {
                        both.push((at, word));
                    }
                }
                // More often than not it is what the row before has there.
                let above = cells.len().checked_sub(width).map(|above: usize| cells[above]);
                let class = match above {
                    Some(class) if sets.get(class) == both => class,
                    _ => sets.intern(&both),
                };
                cells.push(class);
            }
        }
        if sets.len() > classes_max {
            return None;
        }
        self.nodes.push(Node::Pair { left: left.node, right: right.node, width, cells });
        Some(Partial { node: self.nodes.len() - 1, sets, columns })
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
        let exits = self.problem.exits.len();
        let mut sets = Sets::new(self.problem.entries.len());
        let (height, width) = (left.sets.len(), right.sets.len());
        let mut class_of: Vec<Option<u32>> = vec![None; exits];
        let mut cells = Vec::with_capacity(height * width);
        // For each entry, the right classes that have it.
        let words = width.div_ceil(64);
        if self.problem.entries.len() * words > HAVING_WORDS_MAX {
            return None;
        }
        let mut having = vec![0u64; self.problem.entries.len().max(1) * words];
        for b in 0..width {
            for entry in numbers(right.sets.get(b as u32)) {
                insert(&mut having[entry * words..][..words], b);
            }
        }
        let (mut open, mut first) = (vec![0u64; words], vec![0usize; width]);
        for a in 0..height as u32 {
            // The first entry of the left class that a right class has is theirs. A combination that no packet has may
            // have none.
            first.fill(0);
            open.fill(u64::MAX);
            let mut left_open = width;
            for entry in numbers(left.sets.get(a)) {
                for (word, (open, having)) in open.iter_mut().zip(&having[entry * words..]).enumerate() {
                    let mut taken = *open & having;
                    *open &= !having;
                    left_open -= taken.count_ones() as usize;
                    while taken != 0 {
                        first[64 * word + taken.trailing_zeros() as usize] = entry;
                        taken &= taken - 1;
                    }
                }
                if left_open == 0 {
                    break;
                }
            }
            for &first in &first {
                let class = &mut class_of[self.problem.exit_of[first] as usize];
                cells.push(
                    *class.get_or_insert_with(|| sets.intern(&[(first as u32 / 64, 1 << (first % 64))])),
                );
            }
        }
        self.nodes.push(Node::Pair { left: left.node, right: right.node, width, cells });
        Some(Partial { node: self.nodes.len() - 1, sets, columns: Vec::new() })
    }

    /// Whether so many cells of so many words can be looked at.
    fn afford(&mut self, cells: usize, words: usize) -> Option<()> {
        self.work += cells * words;
        (cells <= CELLS_MAX && self.work <= WORDS_MAX).then_some(())
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
