//! `polc completions`: a script that completes polc's command line in a shell.

use std::process::ExitCode;

use clap::CommandFactory as _;

use crate::cli::Cli;
use crate::failure::Failure;
use crate::output::Output;

pub(super) fn run(shell: clap_complete::Shell, output: &Output) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "polc", &mut script);
    output.result(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}
