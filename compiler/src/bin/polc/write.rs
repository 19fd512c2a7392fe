//! Writing files whole or not at all: into a new file beside the old one, which then takes its name.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// Writes `bytes` to `path`. Whoever reads the path sees the old contents or the new, and nothing is left behind on
/// failure.
pub(crate) fn atomically(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    // A device or a pipe has nothing to protect, and must not be replaced.
    if fs::metadata(path).is_ok_and(|data| !data.is_file()) {
        return fs::write(path, bytes).map_err(|error| Failure::write(path, error));
    }
    // A link keeps pointing where it points.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let beside = temporary(&target);
    let written = fs::OpenOptions::new().write(true).create_new(true).open(&beside).and_then(|mut file| {
        if let Ok(old) = fs::metadata(&target) {
            file.set_permissions(old.permissions())?;
        }
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&beside, &target)).map_err(|error| {
        // The failure to report is the first one.
        let _ = fs::remove_file(&beside);
        Failure::write(path, error)
    })
}

fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}
