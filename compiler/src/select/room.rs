//! What finding a structure for a stage may take of time and memory.

/// Bounds of a search for a structure; what would go beyond any is handed back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Columns: each takes time to make classes of, and a search in the program.
    pub(super) columns: usize,
    /// Cells of a table of two classes.
    pub(super) cells: usize,
    /// Words of bit sets that combining classes may look at.
    pub(super) words: usize,
    /// Words of the sets that the classes of a matrix's tables stand for, all together. Many columns that have nothing to
    /// do with each other make classes without end, of which each has most of the entries.
    pub(super) sets_words: usize,
    /// Pairs of classes with an entry each, over all groups.
    pub(super) crossed: usize,
    /// Cells of all rows of grouped classes.
    pub(super) row_cells: usize,
    /// Bytes of all tables.
    pub(super) table_bytes: usize,
}

impl Room {
    /// For a stage.
    pub(super) const WHOLE: Room = Room {
        columns: 128,
        cells: 1 << 21,
        words: 1 << 26,
        sets_words: 1 << 22,
        crossed: 1 << 23,
        row_cells: 1 << 25,
        table_bytes: 64 << 20,
    };

    /// For the largest parts of a stage.
    pub(super) const LARGEST_PART: Room = Room { columns: 32, ..Room::WHOLE };

    /// For a part of a stage of which small ones are too many.
    pub(super) const LARGE_PART: Room = Room {
        columns: 32,
        cells: 1 << 19,
        words: 1 << 24,
        sets_words: 1 << 20,
        crossed: 1 << 20,
        row_cells: 1 << 22,
        table_bytes: 1 << 21,
    };

    /// For one part of many of a stage: tables that stay in the second cache, and to know of what is too large takes
    /// milliseconds.
    pub(super) const PART: Room = Room {
        columns: 16,
        cells: 1 << 17,
        words: 1 << 22,
        sets_words: 1 << 19,
        crossed: 1 << 18,
        row_cells: 1 << 20,
        table_bytes: 1 << 19,
    };
}
