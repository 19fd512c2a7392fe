//! `polc man`: the manual pages, one for polc and one for each command.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory as _;

use crate::cli::Cli;
use crate::failure::Failure;

pub(super) fn run(folder: &Path) -> Result<ExitCode, Failure> {
    let written = fs::create_dir_all(folder).and_then(|()| clap_mangen::generate_to(Cli::command(), folder));
    written.map_err(|error| Failure::write(folder, error))?;
    Ok(ExitCode::SUCCESS)
}
