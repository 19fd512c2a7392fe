//! The lists of grouped classes and the rows that say which entry of a list comes first.
//!
//! A list's entries differ in their services; lists with the same services share a row, which has a cell for each class of
//! services: the place in the list, from 1, or 0 if there is none. Rows are alike in parts, and in themselves. Where whole
//! rows would be a large table, a row is the numbers of its pages, each of which is kept once.

use polc_ir::entities::{Data, Value};
use polc_ir::plan::{AluKind, DataTable};

use super::classes::{Interned, mix, numbers};
use super::line::Line;
use super::matrix::Classes;

/// Bytes of rows that are kept whole. A page's number is one read more, which takes 4 ns; rows beyond this would take 2 MB and
/// more, and the caches from all else (sets of 10,000 rules: `./bench --only classify --size 10000`).
const WHOLE_BYTES_MAX: usize = 1 << 20;

/// Cells of a page of a row: as many as a processor fetches at once if each is a byte.
const PAGE: usize = 64;

/// A number behind every entry's.
pub(super) const NOBODY: u32 = u32::MAX;

/// Rows: what place in a list comes first, from 1, for every class of services; 0: none.
#[derive(Debug)]
pub(super) struct Rows {
    /// For each service, the classes in which it holds.
    holds: Vec<Vec<u32>>,
    /// The services of lists, and the row of each.
    services: Interned<u32>,
    row_of: Vec<u32>,
    /// The pages of each row, and the pages.
    rows: Interned<u32>,
    pages: Interned<u16>,
    /// Cells of a row: one for each class.
    cells: usize,
    /// Cells that all rows may have.
    cells_max: usize,
    /// Room for a row in whole pages, and for the numbers of those.
    row: Vec<u16>,
    numbers: Vec<u32>,
}

impl Rows {
    /// Row 0, of pairs without a list.
    pub(super) fn new(told: Option<&Classes>, services: usize, cells_max: usize) -> Rows {
        let classes = told.map_or(1, |told| told.sets.len());
        let mut holds: Vec<Vec<u32>> = vec![Vec::new(); services];
        for class in 0..classes as u32 {
            match told {
                None => holds[0].push(0),
                Some(told) => {
                    numbers(told.sets.get(class)).for_each(|service| holds[service].push(class));
                }
            }
        }
        let mut rows = Rows {
            holds,
            services: Interned::new(),
            row_of: Vec::new(),
            rows: Interned::new(),
            pages: Interned::new(),
            cells: classes,
            cells_max,
            row: vec![0; classes.next_multiple_of(PAGE)],
            numbers: Vec::new(),
        };
        rows.intern();
        rows
    }

    /// The number of the row that was written.
    fn intern(&mut self) -> u32 {
        self.numbers.clear();
        for page in self.row.as_chunks::<PAGE>().0 {
            self.numbers.push(self.pages.intern(page, page_hash(page)));
        }
        self.rows.intern(&self.numbers, list_hash(&self.numbers))
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Cells of a row.
    pub(super) fn cells(&self) -> usize {
        self.cells
    }

    /// Whether a service holds in all classes.
    fn always(&self, service: u32) -> bool {
        self.holds[service as usize].len() == self.cells
    }

    /// The row of a list's services. `None` if rows grow too large.
    fn row(&mut self, services: &[u32]) -> Option<u32> {
        let list = self.services.intern(services, list_hash(services)) as usize;
        if list == self.row_of.len() {
            if (self.len() + 1) * self.cells > self.cells_max {
                return None;
            }
            self.row.fill(0);
            for (place, &service) in services.iter().enumerate().rev() {
                for &class in &self.holds[service as usize] {
                    self.row[class as usize] = place as u16 + 1;
                }
            }
            let row = self.intern();
            self.row_of.push(row);
        }
        Some(self.row_of[list])
    }

    /// Pages of a row.
    fn pages_of_row(&self) -> usize {
        self.row.len() / PAGE
    }

    /// Whether rows are too large to be kept whole.
    fn are_paged(&self) -> bool {
        let largest = self.pages.flat().iter().copied().max().unwrap_or(0);
        DataTable::size(self.len() * self.cells, largest.into()).1 > WHOLE_BYTES_MAX
    }

    /// Writes what rows are looked up with. `service` writes the look-up of a packet's class of services, which
    /// stands for what it is given, if there are any.
    pub(super) fn write(
        &self,
        line: &mut Line<'_>,
        service: impl FnOnce(&mut Line<'_>, &dyn Fn(u32) -> u64) -> Option<Value>,
    ) -> Places {
        if !self.are_paged() {
            let cells = self.rows.lists().flat_map(|pages| {
                let cells = pages.iter().flat_map(|&page| self.pages.get(page));
                cells.take(self.cells).map(|&cell| cell.into())
            });
            let rows = line.table(DataTable::new(&cells.collect::<Vec<u64>>()));
            let bytes = line.width(rows);
            let class = service(line, &|class| u64::from(class) * bytes);
            return Places::Whole { rows, row_bytes: self.cells as u64 * bytes, class };
        }
        let numbers: Vec<u64> = self.rows.flat().iter().map(|&page| page.into()).collect();
        let cells: Vec<u64> = self.pages.flat().iter().map(|&cell| cell.into()).collect();
        let (numbers, pages) = (line.table(DataTable::new(&numbers)), line.table(DataTable::new(&cells)));
        let (number_bytes, cell_bytes) = (line.width(numbers), line.width(pages));
        let page_bytes = PAGE as u64 * cell_bytes;
        // Where a class's cell is in its page, below where the page's number is in a row.
        let class = service(line, &|class| {
            let (page, cell) = (u64::from(class) / PAGE as u64, u64::from(class) % PAGE as u64);
            page * number_bytes * page_bytes + cell * cell_bytes
        });
        let class = class.expect("there are services if there is more than one page");
        let page_bits = page_bytes.trailing_zeros();
        Places::Paged {
            numbers,
            row_bytes: self.pages_of_row() as u64 * number_bytes,
            of_row: line.with(AluKind::Shr, class, page_bits.into()),
            pages,
            page_bits,
            of_page: line.with(AluKind::And, class, page_bytes - 1),
        }
    }
}

/// What the place of a packet is looked up with in rows.
pub(super) enum Places {
    /// In a table of rows of so many bytes.
    Whole { rows: Data, row_bytes: u64, class: Option<Value> },
    /// In a table of rows of so many bytes that has the numbers of pages, and one of pages.
    Paged { numbers: Data, row_bytes: u64, of_row: Value, pages: Data, page_bits: u32, of_page: Value },
}

impl Places {
    /// Writes the look-up of the place in a row.
    pub(super) fn write(&self, line: &mut Line<'_>, row: Value) -> Value {
        match *self {
            Places::Whole { rows, row_bytes, class } => {
                let row = line.with(AluKind::Mul, row, row_bytes);
                let cell = class.map_or(row, |class| line.alu(AluKind::Add, row, class));
                line.read(rows, cell)
            }
            Places::Paged { numbers, row_bytes, of_row, pages, page_bits, of_page } => {
                let row = line.with(AluKind::Mul, row, row_bytes);
                let number = line.alu(AluKind::Add, row, of_row);
                let number = line.read(numbers, number);
                let page = line.with(AluKind::Shl, number, page_bits.into());
                let cell = line.alu(AluKind::Add, page, of_page);
                line.read(pages, cell)
            }
        }
    }
}

/// Lists of entries.
pub(super) struct Lists {
    /// For each service, the last list that has it.
    seen: Vec<u32>,
    count: u32,
    /// The numbers of each list, behind a [`NOBODY`].
    numbers: Interned<u32>,
    /// Room for the services of a list, and for its numbers.
    services: Vec<u32>,
    list: Vec<u32>,
}

impl Lists {
    /// No lists, of so many services.
    pub(super) fn new(services: usize) -> Lists {
        let mut lists = Lists {
            seen: vec![u32::MAX; services],
            count: 0,
            numbers: Interned::new(),
            services: Vec::new(),
            list: Vec::new(),
        };
        // The number at 0 is that of pairs without a list.
        lists.numbers.intern(&[NOBODY], list_hash(&[NOBODY]));
        lists
    }

    /// The row and base of a list of services and numbers, ascending by number. `None` if rows grow too large.
    pub(super) fn add(
        &mut self,
        rows: &mut Rows,
        entries: impl Iterator<Item = (u32, u32)>,
    ) -> Option<(u32, u32)> {
        self.services.clear();
        self.list.clear();
        self.list.push(NOBODY);
        for (service, number) in entries {
            // A service that came before never gets here.
            if std::mem::replace(&mut self.seen[service as usize], self.count) == self.count {
                continue;
            }
            self.services.push(service);
            self.list.push(number);
            if rows.always(service) {
                break;
            }
        }
        self.count += 1;
        if self.services.len() >= usize::from(u16::MAX) {
            return None;
        }
        let row = rows.row(&self.services)?;
        let list = self.numbers.intern(&self.list, list_hash(&self.list));
        Some((row, self.numbers.begin(list)))
    }

    /// All lists, one after another.
    pub(super) fn into_numbers(self) -> Vec<u32> {
        self.numbers.into_flat()
    }
}

fn list_hash(list: &[u32]) -> u64 {
    list.iter().fold(0, |hash, &number| mix(hash, number.into()))
}

fn page_hash(page: &[u16; PAGE]) -> u64 {
    let four = |cells: &[u16; 4]| cells.iter().fold(0, |four, &cell| four << 16 | u64::from(cell));
    page.as_chunks().0.iter().map(four).fold(0, mix)
}

#[cfg(test)]
mod tests {
    use super::super::line::Tables;
    use super::*;

    const CLASSES: u32 = 1_000;

    /// The lists' services: each holds in the classes that are multiples of its number and one.
    fn rows(lists: u32) -> (Rows, Vec<Vec<u32>>) {
        let mut rows = Rows::new(None, 1, usize::MAX);
        (rows.rows, rows.pages) = (Interned::new(), Interned::new());
        rows.cells = CLASSES as usize;
        rows.row = vec![0; rows.cells.next_multiple_of(PAGE)];
        rows.holds =
            (0..CLASSES).map(|service| (0..CLASSES).step_by(service as usize + 1).collect()).collect();
        rows.intern();
        let list = |list: u32| vec![1 + list % 7, 8 + list % 50, 60 + list % 900];
        (rows, (0..lists).map(list).collect())
    }

    #[test]
    fn places_are_those_of_the_first_service_that_holds() {
        for (lists, are_paged) in [(100, false), (6_300, true)] {
            let (mut rows, lists) = rows(lists);
            let numbers: Vec<u32> = lists.iter().map(|list| rows.row(list).expect("there is room")).collect();
            assert_eq!(rows.are_paged(), are_paged);
            let mut tables = Tables::new();
            let mut line = Line::new(&mut tables);
            let places = rows.write(&mut line, |line, map| {
                let classes = line.table(DataTable::new(&(0..CLASSES).map(map).collect::<Vec<u64>>()));
                let class = line.word(1);
                Some(line.index(classes, class))
            });
            let row = line.word(0);
            let place = places.write(&mut line, row);
            let step = line.step(place);
            for (list, &row) in lists.iter().zip(&numbers).step_by(33) {
                for class in 0..CLASSES {
                    let holds = |service: &u32| class % (service + 1) == 0;
                    let expected = list.iter().position(holds).map_or(0, |place| place as u64 + 1);
                    assert_eq!(step.eval(tables.all(), &[row, class]), expected, "{list:?} {class}");
                    assert_eq!(step.eval(tables.all(), &[0, class]), 0);
                }
            }
        }
    }
}
