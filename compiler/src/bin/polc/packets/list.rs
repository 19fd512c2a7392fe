//! Packets as JSON, one object a line: fields by name, a text as `explain --packet` takes it, or a whole frame.

use std::path::Path;

use polc_ir::diag::{Code, Diagnostic};
use polc_ir::env::{Attach, Input};
use polc_ir::packet::text::{self, PacketSpec};
use polc_ir::source::{SourceMap, Span};

use crate::failure::Failure;
use crate::input;

/// Code of a line that is no JSON object, or not one that describes a packet.
pub(crate) const BAD_LINE: Code = Code(700);
/// Code of a packet with a value that no packet has.
pub(crate) const BAD_PACKET: Code = Code(701);
/// Code of a packet with a mark where none has one.
pub(crate) const MARK_AT_XDP: Code = Code(702);

/// Why a packet can't be as it is given at an attach point, and what to do: programs at XDP see frames that no packet has
/// been made of yet, so none can be run on one with a mark.
pub(crate) fn marked_too_early(packet: &Input, attach: Option<Attach>) -> Option<(String, &'static str)> {
    const HINT: &str = "leave the mark out, or ask at `--attach tc-ingress`, where packets have marks";
    let found = packet.mark != 0 && attach == Some(Attach::Xdp);
    found.then(|| (format!("no packet has a mark yet at XDP, and this one has {:#x}", packet.mark), HINT))
}

/// Reads a list for an attach point. Lines that are no packets there each have a finding.
pub(crate) fn read(
    sources: &mut SourceMap,
    path: &Path,
    attach: Option<Attach>,
    findings: &mut Vec<Diagnostic>,
) -> Result<Vec<Input>, Failure> {
    let file = input::text(sources, path, findings)?;
    let text = sources.file(file).text();
    let mut packets = Vec::new();
    let mut start = 0u32;
    for line in text.split_inclusive('\n') {
        let json = line.trim();
        if !json.is_empty() {
            let unmarked = |input: Input| match marked_too_early(&input, attach) {
                None => Ok(input),
                Some((message, hint)) => {
                    Err(Wrong { code: MARK_AT_XDP, message, hint, at: json.find("mark") })
                }
            };
            match packet(json).and_then(unmarked) {
                Ok(input) => packets.push(input),
                Err(Wrong { code, message, hint, at }) => {
                    let begin = start + (line.len() - line.trim_start().len()) as u32;
                    let span = match at {
                        None => Span::new(file, begin, begin + json.len() as u32),
                        Some(at) => {
                            let rest = json.get(at..).unwrap_or_default();
                            let quoted = rest.strip_prefix('"').and_then(|rest| rest.find('"'));
                            let word = rest.find(|c: char| c.is_whitespace() || "\",:}".contains(c));
                            let len = quoted.map(|at| at + 2).or(word).unwrap_or(rest.len());
                            Span::new(file, begin + at as u32, begin + (at + len) as u32)
                        }
                    };
                    findings.push(Diagnostic::error(code, message, span).with_hint(hint));
                }
            }
        }
        start += line.len() as u32;
    }
    Ok(packets)
}

/// What a line may be.
const HINT: &str = "write a JSON object a line, such as `{\"packet\": \"tcp 10.0.0.1:5000 > 10.0.0.2:22 in=eth0\"}` or \
    `{\"proto\": \"tcp\", \"src\": \"10.0.0.1\", \"dst\": \"10.0.0.2\", \"dport\": 22}`";

/// Why a line is no packet.
struct Wrong {
    code: Code,
    message: String,
    hint: &'static str,
    /// Where in the line, in bytes; `None`: all of it.
    at: Option<usize>,
}

impl Wrong {
    /// What is wrong with a line as JSON. Its position is not repeated in words.
    fn json(json: &str, error: &serde_json::Error) -> Wrong {
        let message = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        let message = message.strip_suffix(&place).unwrap_or(&message);
        let message = if error.is_data() { message.to_string() } else { format!("not JSON: {message}") };
        let mut at = error.column().saturating_sub(1);
        if error.is_data() {
            // What is no syntax error is told at the last byte of the name or value.
            let before = json.get(..at).unwrap_or_default();
            at = before
                .rfind(|c: char| c.is_whitespace() || ",:{[".contains(c))
                .map_or(at, |before| before + 1);
        }
        Wrong { code: BAD_LINE, message, hint: HINT, at: Some(at) }
    }
}

fn packet(json: &str) -> Result<Input, Wrong> {
    let value: serde_json::Value = serde_json::from_str(json).map_err(|error| Wrong::json(json, &error))?;
    let spec = match value.get("packet") {
        Some(serde_json::Value::String(words)) => {
            if value.as_object().is_some_and(|object| object.len() > 1) {
                let message = "`packet` says everything; other fields can't stand beside it".into();
                return Err(Wrong { code: BAD_LINE, message, hint: HINT, at: None });
            }
            // With escapes in it, the text stands nowhere in the line as it is.
            let begin = json.find(words.as_str());
            text::parse(words).map_err(|error| Wrong {
                code: BAD_LINE,
                message: error.message,
                hint: HINT,
                at: begin.map(|begin| begin + error.at),
            })?
        }
        _ => serde_json::from_str::<PacketSpec>(json).map_err(|error| Wrong::json(json, &error))?,
    };
    spec.input().map_err(|message| Wrong { code: BAD_PACKET, message, hint: HINT, at: None })
}
