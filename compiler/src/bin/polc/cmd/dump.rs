//! `polc dump`: instructions beside the rules they come from, of a rule set or of an object.

use std::process::ExitCode;

use polc_backend_ebpf::disasm::disassemble;
use polc_backend_ebpf::object::Object;

use super::compile::{accept, refuse};
use super::{FOUND, place, show};
use crate::cli::DumpArgs;
use crate::failure::Failure;
use crate::input;
use crate::output::Output;

/// How every ELF file starts.
const ELF_MAGIC: &[u8] = b"\x7fELF";

pub(super) fn run(args: &DumpArgs, output: &Output) -> Result<ExitCode, Failure> {
    if !input::is_stdin(&args.file) {
        let bytes = input::bytes(&args.file)?;
        if bytes.starts_with(ELF_MAGIC) {
            let object = Object::read(&bytes).map_err(|error| {
                Failure::Input(format!("`{}` is not an object that polc wrote: {error}", args.file.display()))
            })?;
            output.result(&disassemble(&object));
            return Ok(ExitCode::SUCCESS);
        }
    }
    let session = input::session(&args.file, &args.input)?;
    let place = place::of(args.attach.into(), &args.place, &args.input);
    let devices = place::declared(&args.devices)?;
    if accept(&session, &place, output).is_none() {
        return Ok(FOUND.into());
    }
    let env = input::env(&args.input, session.family());
    let compiled = polc::compile(&session.ruleset, &place, &env, &devices);
    if refuse(&session, &compiled.diagnostics, place.mode, output) {
        return Ok(FOUND.into());
    }
    match polc::build::object(&session, &compiled) {
        Ok((object, _)) => {
            output.result(&disassemble(&object));
            Ok(ExitCode::SUCCESS)
        }
        Err(findings) => {
            show(output, &session.sources, &findings);
            Ok(FOUND.into())
        }
    }
}
