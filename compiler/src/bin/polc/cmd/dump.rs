//! `polc dump`: code beside the rules it comes from, of a rule set, of an object, or of what is applied.

use std::process::ExitCode;

use polc::guard;
use polc_backend_ebpf::disasm::disassemble;
use polc_backend_ebpf::object::Object;
#[cfg(feature = "kernel")]
use polc_loader::{jited, sys::Sys};

use super::compile::{accept, refuse};
use super::{FOUND, place, show};
#[cfg(feature = "kernel")]
use super::{applied, live};
use crate::cli::{DumpArgs, DumpInput};
#[cfg(feature = "kernel")]
use crate::cli::{DumpCode, SlotArgs};
use crate::failure::Failure;
use crate::input;
use crate::output::Output;

/// How every ELF file starts.
const ELF_MAGIC: &[u8] = b"\x7fELF";

pub(super) fn run(args: &DumpArgs, output: &Output) -> Result<ExitCode, Failure> {
    #[cfg(feature = "kernel")]
    match &args.code {
        Some(DumpCode::Xlated(slots)) => return loaded(slots, jited::xlated, output),
        Some(DumpCode::Jited(slots)) => return loaded(slots, jited::jited, output),
        None => {}
    }
    compiled(&args.input, output)
}

/// What the kernel made of applied policies' programs.
#[cfg(feature = "kernel")]
fn loaded(
    slots: &SlotArgs,
    code: impl Fn(&Sys, std::os::fd::OwnedFd) -> Result<jited::Listing, polc_loader::Error>,
    output: &Output,
) -> Result<ExitCode, Failure> {
    let sys = Sys::new();
    let opened = applied::open_some(&sys, slots, output)?;
    for (index, policy) in opened.policies.iter().enumerate() {
        let listing = code(&sys, policy.open_program(&sys)?)?;
        let blank = if index > 0 { "\n" } else { "" };
        output.result(&format!("{blank}{}: {}\n{listing}", policy.slot, policy.generation.source))?;
    }
    live::all_well(opened.failed, output)
}

/// What polc makes of a rule set, or made of it before.
fn compiled(args: &DumpInput, output: &Output) -> Result<ExitCode, Failure> {
    let file =
        args.file.as_ref().ok_or_else(|| Failure::Usage("a rule set or an object is needed".into()))?;
    if !input::is_stdin(file) {
        let bytes = input::bytes(file)?;
        if bytes.starts_with(ELF_MAGIC) {
            let object = Object::read(&bytes).map_err(|error| {
                Failure::Input(format!("`{}` is not an object that polc wrote: {error}", file.display()))
            })?;
            output.result(&disassemble(&object))?;
            return Ok(ExitCode::SUCCESS);
        }
    }
    let mut session = input::session(file, &args.input)?;
    let place = place::whole(&session, place::of(args.attach.into(), &args.place, &args.input)?);
    let devices = place::declared(&args.devices)?;
    if accept(&session, &place, output).is_none() {
        return Ok(FOUND.into());
    }
    guard::leave_rewritten(&mut session.ruleset, &place);
    let env = input::env(&args.input, session.family());
    let compiled = polc::compile(&session.ruleset, &place, &env, &devices);
    if refuse(&session, &compiled.diagnostics, place.mode, output) {
        return Ok(FOUND.into());
    }
    match polc::build::object(&session, &compiled) {
        Ok((object, _)) => {
            output.result(&disassemble(&object))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(findings) => {
            show(output, &session.sources, &findings);
            Ok(FOUND.into())
        }
    }
}
