//! Findings as JSON, in the form that docs/check-schema.json describes. Fields are added, never renamed or removed.

use polc_ir::diag::Diagnostic;
use polc_ir::source::{SourceMap, Span};
use serde::Serialize;

/// One finding.
#[derive(Debug, Serialize)]
pub(crate) struct Finding<'a> {
    severity: polc_ir::diag::Severity,
    code: String,
    message: &'a str,
    #[serde(flatten)]
    place: Option<Place<'a>>,
    #[serde(flatten)]
    nowhere: Option<Nowhere>,
    hint: Option<&'a str>,
    notes: &'a [String],
    related: Vec<Related<'a>>,
}

/// Where a span starts and ends; lines and columns count from 1, columns in characters, the end is exclusive.
#[derive(Debug, Serialize)]
pub(crate) struct Place<'a> {
    file: &'a str,
    line: u32,
    column: u32,
    end_line: u32,
    end_column: u32,
}

/// The same fields for a finding that no text is at fault for.
#[derive(Debug, Default, Serialize)]
struct Nowhere {
    file: Option<()>,
    line: Option<()>,
    column: Option<()>,
    end_line: Option<()>,
    end_column: Option<()>,
}

#[derive(Debug, Serialize)]
struct Related<'a> {
    #[serde(flatten)]
    place: Place<'a>,
    message: &'a str,
}

impl<'a> Finding<'a> {
    pub(crate) fn new(sources: &'a SourceMap, finding: &'a Diagnostic) -> Finding<'a> {
        Finding {
            severity: finding.severity,
            code: finding.code_text(),
            message: &finding.message,
            place: finding.span.map(|span| Place::new(sources, span)),
            nowhere: finding.span.is_none().then(Nowhere::default),
            hint: finding.hint.as_deref(),
            notes: &finding.notes,
            related: finding
                .secondary
                .iter()
                .map(|label| Related { place: Place::new(sources, label.span), message: &label.message })
                .collect(),
        }
    }
}

impl<'a> Place<'a> {
    pub(crate) fn new(sources: &'a SourceMap, span: Span) -> Place<'a> {
        let file = sources.file(span.file);
        let (start, end) = (file.line_column(span.start), file.line_column(span.end));
        Place {
            file: file.name(),
            line: start.line,
            column: start.column,
            end_line: end.line,
            end_column: end.column,
        }
    }
}

/// All findings.
pub(crate) fn findings<'a>(sources: &'a SourceMap, findings: &'a [Diagnostic]) -> Vec<Finding<'a>> {
    findings.iter().map(|finding| Finding::new(sources, finding)).collect()
}
