//! Findings as SARIF 2.1.0 (OASIS, sarif-v2.1.0-os), which code hosts show beside the lines.

use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::source::{SourceMap, Span};
use serde_json::{Value, json};

/// One run with all findings.
pub(crate) fn log(sources: &SourceMap, findings: &[Diagnostic]) -> Value {
    let mut codes: Vec<String> = findings.iter().map(Diagnostic::code_text).collect();
    codes.sort_unstable();
    codes.dedup();
    let rules: Vec<Value> = codes.iter().map(|code| json!({ "id": code })).collect();
    let results: Vec<Value> = findings
        .iter()
        .map(|finding| {
            let code = finding.code_text();
            let mut text = finding.message.clone();
            for more in finding.notes.iter().chain(&finding.hint) {
                text.push('\n');
                text.push_str(more);
            }
            let mut result = json!({
                "ruleId": code,
                "ruleIndex": codes.binary_search(&code).unwrap_or_default(),
                "level": level(finding.severity),
                "message": { "text": text },
            });
            if let Some(span) = finding.span {
                result["locations"] = json!([{ "physicalLocation": location(sources, span) }]);
            }
            if !finding.secondary.is_empty() {
                result["relatedLocations"] = finding
                    .secondary
                    .iter()
                    .enumerate()
                    .map(|(id, label)| {
                        json!({
                            "id": id,
                            "physicalLocation": location(sources, label.span),
                            "message": { "text": label.message },
                        })
                    })
                    .collect();
            }
            result
        })
        .collect();
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": { "name": "polc", "version": env!("CARGO_PKG_VERSION"), "rules": rules } },
            "columnKind": "unicodeCodePoints",
            "results": results,
        }],
    })
}

fn level(severity: Severity) -> &'static str {
    match severity {
        Severity::Note => "note",
        Severity::Warning => "warning",
        Severity::Error => "error",
    }
}

fn location(sources: &SourceMap, span: Span) -> Value {
    let file = sources.file(span.file);
    let (start, end) = (file.line_column(span.start), file.line_column(span.end));
    json!({
        "artifactLocation": { "uri": uri(file.name()) },
        "region": {
            "startLine": start.line,
            "startColumn": start.column,
            "endLine": end.line,
            "endColumn": end.column,
        },
    })
}

/// A path as a relative or absolute URI reference (RFC 3986): what is no path character is percent-encoded.
fn uri(name: &str) -> String {
    let mut uri = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=@".contains(&byte) {
            uri.push(byte.into());
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
    uri
}
