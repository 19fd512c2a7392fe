//! Findings for people: the line, carets under what is meant, notes and what to do.

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::source::{SourceMap, Span};

/// One finding as text, with a newline at its end.
pub(crate) fn render(renderer: &Renderer, sources: &SourceMap, finding: &Diagnostic) -> String {
    let level = match finding.severity {
        Severity::Note => Level::NOTE,
        Severity::Warning => Level::WARNING,
        Severity::Error => Level::ERROR,
    };
    let title = level.primary_title(finding.message.as_str()).id(finding.code_text());
    let mut group = Group::with_title(title);
    let mut lines: Vec<LineSnippet<'_>> = Vec::new();
    if let Some(span) = finding.span {
        LineSnippet::add(&mut lines, sources, span, AnnotationKind::Primary, "");
    }
    for label in &finding.secondary {
        LineSnippet::add(&mut lines, sources, label.span, AnnotationKind::Context, &label.message);
    }
    for line in lines {
        group = group.element(line.snippet);
    }
    for note in &finding.notes {
        group = group.element(Level::NOTE.message(note.as_str()));
    }
    if let Some(hint) = &finding.hint {
        group = group.element(Level::HELP.message(hint.as_str()));
    }
    format!("{}\n\n", renderer.render(&[group]))
}

/// One source line and the carets under it. Only that line is handed to the renderer: files have tens of thousands.
struct LineSnippet<'a> {
    key: (polc_ir::source::File, u32),
    snippet: Snippet<'a, annotate_snippets::Annotation<'a>>,
}

impl<'a> LineSnippet<'a> {
    fn add(
        lines: &mut Vec<LineSnippet<'a>>,
        sources: &'a SourceMap,
        span: Span,
        kind: AnnotationKind,
        label: &'a str,
    ) {
        let file = sources.file(span.file);
        let line = file.line(span.start);
        let text = file.line_text(line);
        let start_of_line = text.as_ptr() as usize - file.text().as_ptr() as usize;
        let within = |offset: u32| {
            let mut at = (offset as usize).saturating_sub(start_of_line).min(text.len());
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            at
        };
        let (start, end) = (within(span.start), within(span.end));
        let mut annotation = kind.span(start..end.max(start));
        if !label.is_empty() {
            annotation = annotation.label(label);
        }
        let key = (span.file, line);
        match lines.iter().position(|have| have.key == key) {
            Some(at) => {
                let LineSnippet { snippet, .. } = lines.remove(at);
                lines.insert(at, LineSnippet { key, snippet: snippet.annotation(annotation) });
            }
            None => {
                let snippet =
                    Snippet::source(text).line_start(line as usize).path(file.name()).annotation(annotation);
                lines.push(LineSnippet { key, snippet });
            }
        }
    }
}
