//! What a benchmark found: tables and plots, written as one Markdown document with a section for each benchmark.
//!
//! A run of some benchmarks replaces their sections and leaves the others as they are.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::plot::Plot;

/// A table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    /// Column heads.
    pub(crate) head: Vec<String>,
    /// Rows, each as long as the head.
    pub(crate) rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub(crate) fn new(head: &[&str]) -> Table {
        Table { head: head.iter().map(|text| (*text).to_string()).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.head.len(), "a row has a cell for every column");
        self.rows.push(cells);
    }
}

/// A part of a section.
#[derive(Clone, Debug)]
pub(crate) enum Part {
    /// A paragraph.
    Text(String),
    /// A table.
    Table(Table),
    /// A plot.
    Plot(Plot),
}

/// What one benchmark found.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    /// The benchmark's name.
    pub(crate) name: &'static str,
    /// Its title.
    pub(crate) title: String,
    /// What it says.
    pub(crate) parts: Vec<Part>,
}

impl Section {
    /// A section without parts.
    pub(crate) fn new(name: &'static str, title: &str) -> Section {
        Section { name, title: title.to_string(), parts: Vec::new() }
    }

    /// Adds a paragraph.
    pub(crate) fn text(&mut self, text: impl Into<String>) {
        self.parts.push(Part::Text(text.into()));
    }

    /// Adds a table.
    pub(crate) fn table(&mut self, table: Table) {
        self.parts.push(Part::Table(table));
    }

    /// Adds a plot.
    pub(crate) fn plot(&mut self, plot: Plot) {
        self.parts.push(Part::Plot(plot));
    }

    /// The section as Markdown.
    pub(crate) fn markdown(&self) -> String {
        let mut out = format!("<!-- {} -->\n## {}\n", self.name, self.title);
        for part in &self.parts {
            out.push('\n');
            match part {
                Part::Text(text) => _ = writeln!(out, "{text}"),
                Part::Table(table) => {
                    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
                    out += &line(&table.head);
                    out += &line(&vec!["---".to_string(); table.head.len()]);
                    table.rows.iter().for_each(|row| out += &line(row));
                }
                Part::Plot(plot) => _ = writeln!(out, "![{}](benchmarks/{}.svg)", plot.title, plot.name),
            }
        }
        _ = writeln!(out, "<!-- /{} -->", self.name);
        out
    }

    /// Writes the section's plots, and its text in its place in the document.
    ///
    /// # Errors
    /// A file that can't be written.
    pub(crate) fn write(&self, folder: &Path, order: &[&str], head: &str) -> Result<(), String> {
        let plots = folder.join("benchmarks");
        fs::create_dir_all(&plots).map_err(|error| format!("{}: {error}", plots.display()))?;
        for part in &self.parts {
            if let Part::Plot(plot) = part {
                plot.write(&plots)?;
            }
        }
        let path = folder.join("benchmarks.md");
        let old = fs::read_to_string(&path).unwrap_or_default();
        let mut out = head.to_string();
        for name in order {
            if *name == self.name {
                out = out + "\n" + &self.markdown();
            } else if let Some(text) = section_of(&old, name) {
                out = out + "\n" + text + "\n";
            }
        }
        fs::write(&path, out).map_err(|error| format!("{}: {error}", path.display()))
    }
}

fn section_of<'a>(document: &'a str, name: &str) -> Option<&'a str> {
    let (open, close) = (format!("<!-- {name} -->"), format!("<!-- /{name} -->"));
    let start = document.find(&open)?;
    let end = document[start..].find(&close)? + start + close.len();
    Some(&document[start..end])
}

/// A time of a packet, short.
pub(crate) fn ns(value: f64) -> String {
    if value < 9.95 {
        format!("{value:.1}")
    } else if value < 9_999.5 {
        format!("{value:.0}")
    } else {
        format!("{:.1}k", value / 1_000.0)
    }
}

/// A duration in milliseconds.
pub(crate) fn ms(time: std::time::Duration) -> String {
    let value = time.as_secs_f64() * 1e3;
    if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

/// Bytes in megabytes.
pub(crate) fn mb(bytes: usize) -> String {
    let value = bytes as f64 / 1e6;
    if value < 9.95 { format!("{value:.2}") } else { format!("{value:.0}") }
}

/// The geometric mean; values below 0.1 count as that, since differences of times may come out at nothing.
pub(crate) fn geometric_mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, count) =
        values.into_iter().fold((0.0, 0), |(sum, count), value| (sum + value.max(0.1).ln(), count + 1));
    if count == 0 { 0.0 } else { (sum / f64::from(count)).exp() }
}

#[cfg(test)]
mod tests {
    use super::{Section, geometric_mean, ns, section_of};

    #[test]
    fn sections_are_found_again() {
        let (one, two) = (Section::new("one", "One"), Section::new("two", "Two"));
        let text = format!("head\n{}\n{}", one.markdown(), two.markdown());
        assert_eq!(section_of(&text, "two"), Some("<!-- two -->\n## Two\n<!-- /two -->"));
        assert_eq!(section_of(&text, "three"), None);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([ns(1.23), ns(45.6), ns(12_345.0)], ["1.2", "46", "12.3k"]);
        assert!((geometric_mean([1.0, 4.0]) - 2.0).abs() < 1e-9);
    }
}
