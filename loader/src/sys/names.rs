//! Being told when names in a directory change (inotify(7)).

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::{Sys, checked};

/// What can be read when names of one of several directories came, or took others' places.
#[derive(Debug)]
pub struct NameChanges(File);

impl Sys {
    /// Waits for changes of names in directories from now on. One that is not there any more has none.
    pub fn name_changes<'a>(
        &self,
        directories: impl IntoIterator<Item = &'a Path>,
    ) -> io::Result<NameChanges> {
        self.enter("inotify")?;
        // SAFETY: the call touches no memory.
        let fd = checked(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) }.into())?;
        // SAFETY: the descriptor is new and nobody else has it.
        let changes = NameChanges(unsafe { File::from_raw_fd(fd as i32) });
        for directory in directories {
            let path = CString::new(directory.as_os_str().as_bytes())?;
            let kinds = libc::IN_CREATE | libc::IN_MOVED_TO;
            // SAFETY: the path lives and ends in a zero.
            let added = unsafe { libc::inotify_add_watch(changes.0.as_raw_fd(), path.as_ptr(), kinds) };
            match checked(added.into()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                added => drop(added?),
            }
        }
        Ok(changes)
    }
}

impl NameChanges {
    /// Throws away what was told so far.
    pub fn forget(&mut self) {
        // A record is at most as long as this (inotify(7), `NAME_MAX`), and there are several in it.
        let mut buffer = [0; 4 << 10];
        while self.0.read(&mut buffer).is_ok_and(|count| count > 0) {}
    }
}

impl AsFd for NameChanges {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
