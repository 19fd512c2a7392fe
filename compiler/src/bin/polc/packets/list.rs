//! Packets as JSON, one object a line: fields by name, a text as `explain --packet` takes it, or a whole frame.

use std::path::Path;

use polc_ir::diag::{Code, Diagnostic};
use polc_ir::env::Input;
use polc_ir::packet::text::{self, PacketSpec};
use polc_ir::source::{SourceMap, Span};

use crate::failure::Failure;
use crate::input;

/// Code of a line that is no JSON object, or not one that describes a packet.
pub(crate) const BAD_LINE: Code = Code(700);
/// Code of a packet with a value that no packet has.
pub(crate) const BAD_PACKET: Code = Code(701);

/// Reads a list. Lines that are not understood each have a finding.
pub(crate) fn read(
    sources: &mut SourceMap,
    path: &Path,
    findings: &mut Vec<Diagnostic>,
) -> Result<Vec<Input>, Failure> {
    let file = input::text(sources, path, findings)?;
    let text = sources.file(file).text();
    let mut packets = Vec::new();
    let mut start = 0u32;
    for line in text.split_inclusive('\n') {
        let json = line.trim();
        if !json.is_empty() {
            match packet(json) {
                Ok(input) => packets.push(input),
                Err((code, message)) => {
                    let at = start + (line.len() - line.trim_start().len()) as u32;
                    findings.push(Diagnostic::error(
                        code,
                        message,
                        Span::new(file, at, at + json.len() as u32),
                    ));
                }
            }
        }
        start += line.len() as u32;
    }
    Ok(packets)
}

fn packet(json: &str) -> Result<Input, (Code, String)> {
    let value: serde_json::Value =
        serde_json::from_str(json).map_err(|error| (BAD_LINE, error.to_string()))?;
    let spec = match value.get("packet") {
        Some(serde_json::Value::String(words)) => {
            if value.as_object().is_some_and(|object| object.len() > 1) {
                return Err((
                    BAD_LINE,
                    "`packet` says everything; other fields can't stand beside it".into(),
                ));
            }
            text::parse(words).map_err(|error| (BAD_LINE, error.message))?
        }
        _ => serde_json::from_value::<PacketSpec>(value).map_err(|error| (BAD_LINE, error.to_string()))?,
    };
    spec.input().map_err(|message| (BAD_PACKET, message))
}
