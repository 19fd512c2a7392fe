//! `polc fmt`: the canonical text of a rule set.

use std::process::ExitCode;

use polc::session::ReadOptions;
use polc_frontend_iptables::print;
use polc_ir::source::bytes::of_text;

use super::{FOUND, counted, show};
use crate::cli::FmtArgs;
use crate::failure::Failure;
use crate::input;
use crate::output::Output;
use crate::write;

pub(super) fn run(args: &FmtArgs, output: &Output) -> Result<ExitCode, Failure> {
    let mut status = ExitCode::SUCCESS;
    for path in &args.files {
        if args.write && input::is_stdin(path) {
            return Err(Failure::Usage("standard input can't be rewritten in place".into()));
        }
        let options = ReadOptions { strict: args.strict, family: args.family.family(), semantics: None };
        let session = input::read(path, &args.ipset, &options)?;
        show(output, &session.sources, &session.diagnostics);
        if session.has_errors() {
            // The text of what was read would be another rule set than the user's.
            status = FOUND.into();
            continue;
        }
        let canonical = print(&session.dump, args.counters);
        let text = session.sources.file(session.rules_file).text();
        if args.check {
            if canonical != text {
                output.result(&format!("{}\n", input::name(path)))?;
                status = FOUND.into();
            }
        } else if args.write {
            if canonical != text {
                write::atomically(path, &of_text(&canonical))?;
                let comments = text.lines().filter(|line| line.starts_with('#')).count();
                if comments > 0 {
                    let what = counted(comments, "comment line");
                    output.remark(&format!("{}: {what} not kept\n", input::name(path)));
                }
            }
        } else {
            output.result(&canonical)?;
        }
    }
    Ok(status)
}
