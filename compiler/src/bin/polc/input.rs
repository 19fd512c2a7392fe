//! Reading files into a session: sizes, standard input, text that is no text.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use polc::session::{ReadOptions, Session};
use polc_ir::diag::{Code, Diagnostic};
use polc_ir::env::Env;
use polc_ir::hook::Family;
use polc_ir::limits::FILE_BYTES_MAX;
use polc_ir::source::bytes::{kept, to_text};
use polc_ir::source::{SourceMap, Span};

use crate::cli::InputArgs;
use crate::failure::Failure;
use crate::local;

/// Code of text that is not UTF-8.
const NOT_UTF8: Code = Code(150);

/// Name of standard input in findings.
pub(crate) const STDIN: &str = "<stdin>";

/// A file's bytes; `-` is standard input.
pub(crate) fn bytes(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let limit = FILE_BYTES_MAX as u64 + 1;
    let read = if is_stdin(path) {
        io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes))
    };
    read.map_err(|error| Failure::read(path, error))?;
    if bytes.len() > FILE_BYTES_MAX {
        return Err(Failure::TooLarge(path.to_path_buf()));
    }
    Ok(bytes)
}

/// Whether a path means standard input.
pub(crate) fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// The name of a path in findings.
pub(crate) fn name(path: &Path) -> String {
    if is_stdin(path) { STDIN.to_string() } else { path.to_string_lossy().into_owned() }
}

/// Adds a text file to `sources`; bytes that are no UTF-8 are kept ([`polc_ir::source::bytes`]), with a finding.
pub(crate) fn text(
    sources: &mut SourceMap,
    path: &Path,
    findings: &mut Vec<Diagnostic>,
) -> Result<polc_ir::source::File, Failure> {
    let text = to_text(bytes(path)?);
    if text.len() > FILE_BYTES_MAX {
        return Err(Failure::TooLarge(path.to_path_buf()));
    }
    let mut strange = text.char_indices().filter_map(|(at, character)| Some((at as u32, kept(character)?)));
    let (first, more) = (strange.next(), strange.count());
    let file = sources.add(name(path), text);
    if let Some((at, byte)) = first {
        let span = Span::new(file, at, at + char::MAX.len_utf8() as u32);
        let mut finding = Diagnostic::warning(NOT_UTF8, format!("byte 0x{byte:02x} is not UTF-8"), span)
            .with_note("netfilter's tools take it as it is, and so it is kept and printed")
            .with_hint("convert the file to UTF-8, with `iconv -f latin1 -t utf8` for instance");
        if more > 0 {
            finding = finding.with_note(format!("the file has {more} more of the kind"));
        }
        findings.push(finding);
    }
    Ok(file)
}

/// Reads a rule set and its sets as the command line says.
pub(crate) fn session(path: &Path, args: &InputArgs) -> Result<Session, Failure> {
    let options = ReadOptions {
        strict: args.strict,
        family: args.family.family(),
        semantics: args.semantics.map(Into::into),
    };
    let mut session = read(path, &args.ipset, &options)?;
    session.diagnostics.extend(local::finding(&session, &args.local));
    Ok(session)
}

/// Reads a rule set and its sets.
pub(crate) fn read(path: &Path, ipset: &[PathBuf], options: &ReadOptions) -> Result<Session, Failure> {
    if is_stdin(path) && ipset.iter().any(|set| is_stdin(set)) {
        return Err(Failure::Usage("standard input can't be both the rules and the sets".into()));
    }
    let mut sources = SourceMap::new();
    let mut findings = Vec::new();
    let rules = text(&mut sources, path, &mut findings)?;
    let mut sets = Vec::new();
    for path in ipset {
        sets.push(text(&mut sources, path, &mut findings)?);
    }
    let mut session = Session::read(sources, rules, &sets, options);
    findings.append(&mut session.diagnostics);
    session.diagnostics = findings;
    Ok(session)
}

/// The host as the command line describes it.
pub(crate) fn env(args: &InputArgs, family: Family) -> Env {
    local::env(&args.local, family)
}
