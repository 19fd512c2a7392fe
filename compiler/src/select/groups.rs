//! Grouped classes: a stage of any size by its two most selective columns, and a table of classes for all the others.
//!
//! Let the two columns be source and destination. Entries are put in groups by whether what they ask of either is wide
//! (holds for many of the ranges that other entries tell apart): a wide source crossed with all narrow ones is what
//! makes a single matrix large. In a group every pair of a source class and a destination class has a list of
//! entries, first match first; pairs without one are left out of a table of two hash functions, or the table is
//! indexed directly where that is small. What an entry asks of the other columns is its *service*; all services that a
//! packet satisfies are its service class. A list's entries differ in their services, and lists with the same services
//! share a row that says, for every service class, which entry of the list is first. So a list is a row and where its
//! entries' numbers begin (`rows`), and the least number over all groups wins.
//!
//! ```text
//! source ──▶ classes, one for each group ─┐
//! dest. ───▶ classes, one for each group ─┴▶ (row, base) ─▶ place = row[service class] ─▶ number = list[base + place]
//! others ──▶ service class ──────────────────────────────────┘
//! ```

use polc_ir::entities::{Entry, Value};
use polc_ir::plan::{AluKind, DataTable};

use super::classes::{Interned, mix};
use super::column::look_up;
use super::cuckoo::Cuckoo;
use super::line::Line;
use super::matrix::{Classes, classes};
use super::problem::{Column, Entries, Event, Masked, Problem, Run};
use super::rows::{Lists, NOBODY, Rows};
use super::wide::{GROUPS, Group, partition};

/// Bits of one value that hold a column's classes for all groups.
const PACKED_BITS_MAX: u32 = 62;

/// Elements of a table that is indexed directly, as a multiple of those of one with two hash functions.
const DIRECT_FACTOR: usize = 4;

/// Elements below which a table is always indexed directly.
const DIRECT_ELEMENTS: usize = 1 << 13;

/// A stage as grouped classes.
#[derive(Debug)]
pub(super) struct Groups {
    /// The column of each side.
    sides: [Side; 2],
    /// The service classes, by which rows have their cells.
    services: Option<Classes>,
    groups: Vec<Pairs>,
    rows: Rows,
    /// The numbers of lists' entries, each list behind a [`NOBODY`].
    lists: Vec<u32>,
    /// For each number its exit, or `None` if the number is the exit's.
    exit_of: Option<Vec<u32>>,
    /// The exits, each by an entry that has it.
    pub(super) exits: Vec<Entry>,
    /// How many pairs have a list.
    pairs: usize,
}

/// The entries of one group.
#[derive(Debug)]
struct Pairs {
    /// How many classes each side has.
    classes: [u32; 2],
    /// The lists of pairs of classes, ascending: the classes, the row, the base.
    lists: Vec<([u32; 2], u32, u32)>,
}

/// What a side's column stands for.
#[derive(Debug)]
struct Side {
    field: Option<Masked>,
    /// Where classes change, and the classes for each group there.
    runs: Vec<(u128, [u32; GROUPS])>,
}

impl Side {
    /// A column of which nothing is asked.
    fn none() -> Side {
        Side { field: None, runs: vec![(0, [0; GROUPS])] }
    }
}

/// What is asked of the columns of the sides, and of the others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// The predicate of each side.
    pub(super) sides: [Option<u32>; 2],
    /// The service.
    pub(super) service: u32,
}

/// Makes the tables, if they are small enough.
pub(super) fn groups(problem: &Problem) -> Option<Groups> {
    let columns = selective(problem);
    let (services, asked) = services(problem, columns);
    let told = if services.columns.is_empty() { None } else { Some(classes(&services)?) };
    let (numbers, exit_of, exits) = number(problem);
    let columns = columns.map(|column| column.map(|column| &problem.columns[column]));
    let events = columns.map(|column| column.map_or_else(Vec::new, Column::events));
    let side = |side: usize| columns[side].map(|column| (column, events[side].as_slice()));
    let parts = partition([side(0), side(1)], &asked);
    let mut sides = [Side::none(), Side::none()];
    let mut members: Vec<[Members; 2]> = (0..GROUPS).map(|_| Default::default()).collect();
    for (at, side) in sides.iter_mut().enumerate() {
        if let Some(column) = columns[at] {
            let (runs, of_groups) =
                classes_of(column, &events[at], &parts, &asked, at, problem.room.crossed)?;
            *side = Side { field: Some(column.field), runs };
            for (members, mine) in members.iter_mut().zip(of_groups) {
                members[at] = mine;
            }
        }
    }
    let mut rows = Rows::new(told.as_ref(), services.entries.len(), problem.room.row_cells);
    let mut lists = Lists::new(services.entries.len());
    let mut groups = Vec::new();
    let mut crossed: Vec<(u64, u32)> = Vec::new();
    let mut room = problem.room.crossed;
    let mut pairs = 0;
    for (part, members) in parts.iter().zip(&members) {
        crossed.clear();
        let classes = |entry: u32| [0, 1].map(|at: usize| members[at].of(asked[entry as usize].sides[at]));
        let all: usize =
            part.iter().map(|&entry| classes(entry).map(<[u32]>::len).iter().product::<usize>()).sum();
        room = room.checked_sub(all)?;
        crossed.reserve(all);
        for &entry in part {
            let [left, right] = classes(entry);
            for &a in left {
                crossed.extend(right.iter().map(|&b| (u64::from(a) << 32 | u64::from(b), entry)));
            }
        }
        crossed.sort_unstable();
        let mut of_group = Vec::new();
        for list in crossed.chunk_by(|a, b| a.0 == b.0) {
            let entries =
                list.iter().map(|&(_, entry)| (asked[entry as usize].service, numbers[entry as usize]));
            let (row, base) = lists.add(&mut rows, entries)?;
            of_group.push(([(list[0].0 >> 32) as u32, list[0].0 as u32], row, base));
        }
        pairs += of_group.len();
        groups.push(Pairs { classes: [0, 1].map(|at| members[at].count()), lists: of_group });
    }
    Some(Groups { sides, rows, lists: lists.into_numbers(), services: told, groups, exit_of, exits, pairs })
}

/// The two columns that entries ask the most different things of.
fn selective(problem: &Problem) -> [Option<usize>; 2] {
    let mut columns: Vec<usize> = (0..problem.columns.len()).collect();
    columns.sort_by_key(|&column| std::cmp::Reverse(problem.columns[column].predicates.len()));
    let mut sides = [columns.first().copied(), columns.get(1).copied()];
    sides.sort_unstable_by_key(|side| side.unwrap_or(usize::MAX));
    sides
}

/// The services as a problem of their own, and what every entry asks.
fn services(problem: &Problem, sides: [Option<usize>; 2]) -> (Problem, Vec<Asked>) {
    let entries = Entries::default();
    let (exit_of, exits) = (Vec::new(), Vec::new());
    let mut own = Problem { columns: Vec::new(), entries, exit_of, exits, room: problem.room };
    let mut number = vec![0u32; problem.columns.len()];
    for (column, data) in problem.columns.iter().enumerate() {
        if !sides.contains(&Some(column)) {
            number[column] = own.columns.len() as u32;
            own.columns.push(data.clone());
        }
    }
    let mut known: Interned<(u32, u32)> = Interned::new();
    let mut asked = Vec::with_capacity(problem.entries.len());
    let mut others: Vec<(u32, u32)> = Vec::new();
    for tests in problem.entries.iter() {
        let mut one = Asked { sides: [None; 2], service: 0 };
        others.clear();
        for &(column, predicate) in tests {
            match sides.iter().position(|side| *side == Some(column as usize)) {
                Some(side) => one.sides[side] = Some(predicate),
                None => others.push((number[column as usize], predicate)),
            }
        }
        let both = |&(column, predicate): &(u32, u32)| u64::from(column) << 32 | u64::from(predicate);
        one.service = known.intern(&others, others.iter().map(both).fold(0, mix));
        asked.push(one);
    }
    known.lists().for_each(|service| own.entries.push(service));
    (own, asked)
}

/// Numbers entries so that a smaller number wins: by the exits if neighbours share theirs often enough, else by place,
/// and a table gives the exits.
fn number(problem: &Problem) -> (Vec<u32>, Option<Vec<u32>>, Vec<Entry>) {
    let mut numbers = Vec::with_capacity(problem.entries.len());
    let mut of_runs: Vec<u32> = Vec::new();
    for &exit in &problem.exit_of {
        if of_runs.last() != Some(&exit) {
            of_runs.push(exit);
        }
        numbers.push(of_runs.len() as u32 - 1);
    }
    if of_runs.len() <= problem.exits.len() + problem.exits.len() / 8 {
        let exits = of_runs.iter().map(|&exit| problem.exits[exit as usize]).collect();
        (numbers, None, exits)
    } else {
        (numbers, Some(of_runs), problem.exits.clone())
    }
}

/// For a group and a side: the classes in which each predicate holds.
#[derive(Debug, Default)]
struct Members {
    /// The classes of each predicate, ascending, one predicate after another, and where each one's end.
    classes: Vec<u32>,
    ends: Vec<u32>,
    /// All classes, for what asks nothing.
    all: Vec<u32>,
}

impl Members {
    /// By the predicates that hold in each class, of so many.
    fn new(predicates_of: &Interned<u32>, predicates: usize) -> Members {
        let all: Vec<u32> = (0..predicates_of.len() as u32).collect();
        let mut ends = vec![0u32; predicates];
        for &predicate in all.iter().flat_map(|&class| predicates_of.get(class)) {
            ends[predicate as usize] += 1;
        }
        let mut count = 0;
        for end in &mut ends {
            // First where each one's classes begin: what is put there moves it on.
            count += std::mem::replace(end, count);
        }
        let mut classes = vec![0; count as usize];
        for &class in &all {
            for &predicate in predicates_of.get(class) {
                let place = &mut ends[predicate as usize];
                classes[*place as usize] = class;
                *place += 1;
            }
        }
        Members { classes, ends, all }
    }

    fn of(&self, predicate: Option<u32>) -> &[u32] {
        match predicate.map(|predicate| predicate as usize) {
            Some(predicate) => {
                let begin = predicate.checked_sub(1).map_or(0, |before| self.ends[before]);
                &self.classes[begin as usize..self.ends[predicate] as usize]
            }
            None if self.all.is_empty() => &[0],
            None => &self.all,
        }
    }

    fn count(&self) -> u32 {
        self.all.len().max(1) as u32
    }
}

/// The classes of a column's values for every group, and which predicates hold in them.
#[expect(clippy::type_complexity, reason = "two lists by group")]
fn classes_of(
    column: &Column,
    events: &[Event],
    parts: &[Group; GROUPS],
    asked: &[Asked],
    side: usize,
    mut room: usize,
) -> Option<(Vec<(u128, [u32; GROUPS])>, [Members; GROUPS])> {
    let mut in_groups: Vec<u8> = vec![0; column.predicates.len()];
    for (group, part) in parts.iter().enumerate() {
        for &entry in part {
            if let Some(predicate) = asked[entry as usize].sides[side] {
                in_groups[predicate as usize] |= 1 << group;
            }
        }
    }
    // The predicates that hold, ascending, and the sum of their hashes.
    let mut active: [(Vec<u32>, u64); GROUPS] = Default::default();
    let mut known: [Interned<u32>; GROUPS] = std::array::from_fn(|_| Interned::new());
    let mut changed = [true; GROUPS];
    let mut now = [0u32; GROUPS];
    let mut runs: Vec<(u128, [u32; GROUPS])> = Vec::new();
    let mut at = 0;
    let mut start = 0u128;
    loop {
        while let Some(&(value, predicate, begins)) = events.get(at)
            && value == start
        {
            for group in 0..GROUPS {
                if in_groups[predicate as usize] >> group & 1 == 0 {
                    continue;
                }
                changed[group] = true;
                let (active, hash) = &mut active[group];
                match active.binary_search(&predicate) {
                    Ok(place) if !begins => {
                        active.remove(place);
                        *hash = hash.wrapping_sub(mix(0, predicate.into()));
                    }
                    Err(place) if begins => {
                        active.insert(place, predicate);
                        *hash = hash.wrapping_add(mix(0, predicate.into()));
                    }
                    _ => {}
                }
            }
            at += 1;
        }
        for group in 0..GROUPS {
            if !std::mem::take(&mut changed[group]) {
                continue;
            }
            let (active, hash) = &active[group];
            let classes = known[group].len();
            now[group] = known[group].intern(active, *hash);
            if known[group].len() > classes {
                room = room.checked_sub(active.len())?;
            }
        }
        if runs.last().is_none_or(|(_, last)| *last != now) {
            runs.push((start, now));
        }
        match events.get(at) {
            Some(&(next, ..)) => start = next,
            None => break,
        }
    }
    let members = known.map(|known| Members::new(&known, column.predicates.len()));
    Some((runs, members))
}

/// Bits that numbers below `count` take.
fn bits(count: usize) -> u32 {
    usize::BITS - count.saturating_sub(1).leading_zeros()
}

impl Groups {
    /// What this is, for people.
    pub(super) fn describe(&self) -> String {
        let groups = self.groups.iter().filter(|group| !group.lists.is_empty()).count();
        let (rows, services) = (self.rows.len(), self.rows.cells());
        format!("{groups} groups, {} pairs, {rows} rows of {services} services", self.pairs)
    }

    /// Writes the look-up; the value is an index into `exits`. `None` if classes or lists are too many for a word.
    pub(super) fn write(&self, line: &mut Line<'_>) -> Option<Value> {
        let groups: Vec<usize> = (0..GROUPS).filter(|&group| !self.groups[group].lists.is_empty()).collect();
        // Where each group's class is in a side's value.
        let mut shifts = [[0u32; GROUPS]; 2];
        let mut widths = [[0u32; GROUPS]; 2];
        let mut used = [0u32; 2];
        for &group in &groups {
            for side in 0..2 {
                shifts[side][group] = used[side];
                widths[side][group] = bits(self.groups[group].classes[side] as usize);
                used[side] += widths[side][group];
            }
        }
        if used.iter().any(|&bits| bits > PACKED_BITS_MAX) {
            return None;
        }
        let sides = [0, 1].map(|side| self.side(line, side, &groups, shifts[side]));
        let row_bits = bits(self.rows.len());
        let base_bits = bits(self.lists.len());
        let mut leaves: Vec<Value> = Vec::new();
        for &group in &groups {
            let pairs = &self.groups[group];
            let last = Some(&group) == groups.last();
            let classes = [0, 1].map(|side| {
                let class = line.with(AluKind::Shr, sides[side], shifts[side][group].into());
                if last { class } else { line.with(AluKind::And, class, (1 << widths[side][group]) - 1) }
            });
            let of = |row: u32, base: u32| u64::from(row) | u64::from(base) << row_bits;
            let width = widths[0][group] + widths[1][group];
            let hashed = Cuckoo::elements(pairs.lists.len());
            let all = pairs.classes.iter().map(|&count| count as usize).product::<usize>();
            if all <= DIRECT_ELEMENTS.max(DIRECT_FACTOR * hashed) {
                let mut elements = vec![0u64; all];
                for &([a, b], row, base) in &pairs.lists {
                    elements[a as usize * pairs.classes[1] as usize + b as usize] = of(row, base);
                }
                let index = line.with(AluKind::Mul, classes[0], pairs.classes[1].into());
                let index = line.alu(AluKind::Add, index, classes[1]);
                leaves.push({
                    let table = line.table(DataTable::new(&elements));
                    line.index(table, index)
                });
                continue;
            }
            let mut items: Vec<(u64, u64)> = pairs
                .lists
                .iter()
                .map(|&([a, b], row, base)| (u64::from(a) << widths[1][group] | u64::from(b), of(row, base)))
                .collect();
            let mut leaf_bits = row_bits + base_bits;
            let mut leaves_apart = None;
            if width + leaf_bits > 63 {
                // The leaf is too wide to lie beside its key: a number of the leaf does.
                let mut distinct: Vec<u64> = items.iter().map(|&(_, leaf)| leaf).collect();
                distinct.push(0);
                distinct.sort_unstable();
                distinct.dedup();
                leaf_bits = bits(distinct.len());
                for item in &mut items {
                    item.1 = distinct.binary_search(&item.1).expect("it is among them") as u64;
                }
                leaves_apart = Some(DataTable::new(&distinct));
                if width + leaf_bits > 63 {
                    return None;
                }
            }
            let key = line.with(AluKind::Shl, classes[0], widths[1][group].into());
            let key = line.alu(AluKind::Or, key, classes[1]);
            let leaf = Cuckoo::new(&items, leaf_bits.max(1))?.write(line, key);
            leaves.push(match leaves_apart {
                None => leaf,
                Some(table) => {
                    let table = line.table(table);
                    line.index(table, leaf)
                }
            });
        }
        let services = self.services.as_ref();
        let places = self.rows.write(line, |line, map| Some(services?.write(line, map)));
        let numbers = self.lists.iter().map(|&number| self.listed(number));
        let largest = numbers.clone().max().unwrap_or(0);
        let lists = line.table(DataTable::of(numbers, largest));
        let mut least: Option<Value> = None;
        for leaf in leaves {
            let row = if base_bits == 0 { leaf } else { line.with(AluKind::And, leaf, (1 << row_bits) - 1) };
            let place = places.write(line, row);
            let base = line.with(AluKind::Shr, leaf, row_bits.into());
            let at = line.alu(AluKind::Add, base, place);
            let number = line.index(lists, at);
            least = Some(match least {
                None => number,
                Some(least) => line.min(least, number),
            });
        }
        let least = least?;
        Some(match &self.exit_of {
            None => least,
            Some(exit_of) => {
                let exits: Vec<u64> = exit_of.iter().map(|&exit| exit.into()).collect();
                let exits = line.table(DataTable::new(&exits));
                line.index(exits, least)
            }
        })
    }

    /// The numbers as they stand in the table: [`NOBODY`] needs no more bytes than the others.
    fn listed(&self, number: u32) -> u64 {
        let beyond = self.exit_of.as_ref().map_or(self.exits.len(), Vec::len) as u64;
        if number == NOBODY { beyond } else { number.into() }
    }

    /// Writes the look-up of a side.
    fn side(&self, line: &mut Line<'_>, side: usize, groups: &[usize], shifts: [u32; GROUPS]) -> Value {
        let Side { field, runs } = &self.sides[side];
        let pack = |classes: &[u32; GROUPS]| -> u64 {
            groups.iter().map(|&group| u64::from(classes[group]) << shifts[group]).sum()
        };
        match field {
            None => line.constant(0),
            Some(field) => {
                let packed: Vec<u64> = runs.iter().map(|(_, classes)| pack(classes)).collect();
                let runs: Vec<Run> =
                    (0..).zip(runs).map(|(class, &(start, _))| Run { start, class }).collect();
                look_up(line, *field, &runs, &|class| packed[class as usize])
            }
        }
    }
}
