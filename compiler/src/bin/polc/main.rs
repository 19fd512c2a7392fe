//! The `polc` command: reads the command line, runs one command, and turns what happened into an exit status.
//!
//! The library does the work; this binary reads files, renders findings and writes results. Exit status: 0 if all is
//! well, 1 if something was found or differs, 2 for bad usage or a file that can't be read, 3 if the kernel or the system
//! refuses.

mod cli;
mod cmd;
mod failure;
mod input;
mod output;
mod packets;
mod render;
mod write;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::of_process();
    let output = output::Output::new(cli.color);
    match cmd::run(&cli.command, &output) {
        Ok(code) => code,
        Err(failure) => {
            output.error(&failure.to_string());
            ExitCode::from(failure.exit_status())
        }
    }
}
