//! Source files and spans: where in the user's text something came from.
//!
//! Every diagnostic, rule and clause carries a [`Span`]. Lines and columns are computed on demand from a [`SourceMap`],
//! which is the only place that holds the text.

use std::fmt;

use cranelift_entity::{EntityRef, PrimaryMap, entity_impl};
use serde::{Deserialize, Serialize};

pub mod bytes;

/// A source file of a [`SourceMap`]. Prints as `file0`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct File(u32);
entity_impl!(File, "file");

/// A half-open range of bytes `start..end` in one source file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Span {
    /// The file the bytes are in.
    pub file: File,
    /// Offset of the first byte.
    pub start: u32,
    /// Offset one past the last byte.
    pub end: u32,
}

impl Span {
    /// The span `start..end` of `file`.
    ///
    /// # Panics
    /// If `start > end`.
    pub fn new(file: File, start: u32, end: u32) -> Span {
        assert!(start <= end, "a span ends where it starts or later");
        Span { file, start, end }
    }

    /// The smallest span that covers both.
    ///
    /// # Panics
    /// If the spans are in different files.
    pub fn to(self, other: Span) -> Span {
        assert_eq!(self.file, other.file, "a span lies in one file");
        Span { file: self.file, start: self.start.min(other.start), end: self.end.max(other.end) }
    }

    /// The empty span at this span's end.
    pub fn at_end(self) -> Span {
        Span { start: self.end, ..self }
    }

    /// How many bytes the span covers.
    pub fn len(self) -> u32 {
        self.end - self.start
    }

    /// Whether the span covers no byte.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }
}

/// A place as people and editors name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LineColumn {
    /// Line, counted from 1.
    pub line: u32,
    /// Column in Unicode scalar values, counted from 1.
    pub column: u32,
}

impl fmt::Display for LineColumn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// The text of one source file and where its lines start.
#[derive(Clone, Debug)]
pub struct SourceFile {
    name: String,
    text: String,
    line_starts: Vec<u32>,
}

impl SourceFile {
    /// The name the user gave, or `<stdin>`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Number of the line that holds byte `offset`, counted from 1.
    pub fn line(&self, offset: u32) -> u32 {
        self.line_starts.partition_point(|&start| start <= offset) as u32
    }

    /// Line and column of byte `offset`; past the end, the last position.
    pub fn line_column(&self, offset: u32) -> LineColumn {
        let offset = (offset as usize).min(self.text.len());
        let line = self.line(offset as u32);
        let start = self.line_starts[line as usize - 1] as usize;
        let before = self.text.get(start..offset).unwrap_or("");
        LineColumn { line, column: before.chars().count() as u32 + 1 }
    }

    /// The text of line `line` (counted from 1), without its line ending.
    pub fn line_text(&self, line: u32) -> &str {
        let index = line as usize - 1;
        let start = self.line_starts[index] as usize;
        let end = self.line_starts.get(index + 1).map_or(self.text.len(), |&next| next as usize);
        self.text[start..end].trim_end_matches(['\n', '\r'])
    }
}

/// All source files of a session.
#[derive(Clone, Debug, Default)]
pub struct SourceMap {
    files: PrimaryMap<File, SourceFile>,
}

impl SourceMap {
    /// An empty map.
    pub fn new() -> SourceMap {
        SourceMap::default()
    }

    /// Adds a file. Spans hold 32-bit offsets, so the caller checks [`crate::limits::FILE_BYTES_MAX`] first.
    ///
    /// # Panics
    /// If the text is 4 GiB or longer.
    pub fn add(&mut self, name: impl Into<String>, text: impl Into<String>) -> File {
        let text = text.into();
        assert!(u32::try_from(text.len()).is_ok(), "source offsets are 32 bits");
        let ends = memchr::memchr_iter(b'\n', text.as_bytes());
        let line_starts = std::iter::once(0).chain(ends.map(|at| at as u32 + 1)).collect();
        self.files.push(SourceFile { name: name.into(), text, line_starts })
    }

    /// The file's text and lines.
    pub fn file(&self, file: File) -> &SourceFile {
        &self.files[file]
    }

    /// The text a span covers; empty if the span does not fall on character boundaries.
    pub fn text(&self, span: Span) -> &str {
        self.files[span.file].text.get(span.start as usize..span.end as usize).unwrap_or("")
    }

    /// Where a span starts.
    pub fn line_column(&self, span: Span) -> LineColumn {
        self.files[span.file].line_column(span.start)
    }

    /// The files, in the order they were added.
    pub fn iter(&self) -> impl Iterator<Item = (File, &SourceFile)> {
        self.files.iter()
    }
}

impl File {
    /// The file number `index` of a map, in the order files were added.
    pub fn from_index(index: usize) -> File {
        File::new(index)
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}..{}", self.file, self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_count_characters_and_lines_start_at_one() {
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", "*filter\n# Übung -j\nCOMMIT");
        let at = |offset| sources.file(file).line_column(offset);
        assert_eq!(at(0), LineColumn { line: 1, column: 1 });
        assert_eq!(at(8), LineColumn { line: 2, column: 1 });
        assert_eq!(at(12), LineColumn { line: 2, column: 4 });
        assert_eq!(at(1000), LineColumn { line: 3, column: 7 });
        assert_eq!(sources.file(file).line_text(2), "# Übung -j");
    }
}
