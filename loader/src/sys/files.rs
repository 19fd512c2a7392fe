//! The file operations that the loader's state rests on, each announced to the hook.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use super::Sys;

impl Sys {
    /// Writes a whole file: whoever opens `path` afterwards, a crash in between or not, finds the old bytes or the new
    /// ones. The bytes are on the disk when this returns.
    pub fn write_whole(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let beside = path.with_file_name(format!(".{name}.new"));
        let written = (|| {
            self.enter("create")?;
            let mut file = File::create(&beside)?;
            self.enter("write")?;
            file.write_all(bytes)?;
            self.enter("fsync")?;
            file.sync_all()?;
            self.enter("rename")?;
            fs::rename(&beside, path)
        })();
        if written.is_err() {
            // The failure to report is the first one; what is left is overwritten next time.
            let _ = fs::remove_file(&beside);
        }
        written?;
        self.enter("fsync_dir")?;
        match path.parent() {
            Some(parent) => File::open(parent)?.sync_all(),
            None => Ok(()),
        }
    }

    /// Writes files of a directory that nobody reads before it is written down elsewhere that they are whole. All are on
    /// the disk when this returns; after an error or a crash, any may be there in part.
    pub fn write_new(&self, folder: &Path, files: &[(&str, &[u8])]) -> io::Result<()> {
        let mut written = Vec::new();
        for (name, bytes) in files {
            self.enter("create")?;
            let mut file = File::create(folder.join(name))?;
            self.enter("write")?;
            file.write_all(bytes)?;
            written.push(file);
        }
        // Once all are on their way to the disk, waiting for one is waiting for most.
        for file in written {
            self.enter("fsync")?;
            file.sync_all()?;
        }
        self.enter("fsync_dir")?;
        File::open(folder)?.sync_all()
    }

    /// Locks a directory or file (flock(2)) until the result is closed, by a crash if need be. `WouldBlock` if another holds the
    /// lock until then.
    pub fn lock_file(&self, path: &Path, until: Instant) -> io::Result<File> {
        loop {
            self.enter("open_lock")?;
            let file = File::open(path)?;
            self.enter("flock")?;
            lock(&file, until)?;
            // Whoever held it may have removed it; a lock on one without a name keeps nobody out.
            let named = fs::metadata(path).is_ok_and(|named| {
                file.metadata().is_ok_and(|own| (own.dev(), own.ino()) == (named.dev(), named.ino()))
            });
            if named {
                return Ok(file);
            }
        }
    }

    /// Writes the text of a symbolic link: whoever reads it afterwards finds the old text or this one. It is made under
    /// the name `new` first, in the same directory.
    pub fn write_symlink(&self, path: &Path, new: &Path, text: &str) -> io::Result<()> {
        self.enter("symlink")?;
        absent_is_fine(fs::remove_file(new))?;
        std::os::unix::fs::symlink(text, new)?;
        self.enter("rename")?;
        fs::rename(new, path)
    }

    /// The text of a symbolic link; `None` if there is none.
    pub fn read_symlink(&self, path: &Path) -> io::Result<Option<String>> {
        self.enter("readlink")?;
        match fs::read_link(path) {
            Ok(text) => Ok(Some(text.to_string_lossy().into_owned())),
            // What is no link has no text (readlink(2), `EINVAL`).
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether there is something of this name.
    pub fn is_there(&self, path: &Path) -> io::Result<bool> {
        self.enter("stat")?;
        fs::exists(path)
    }

    /// Makes a directory and those above it, if they aren't there.
    pub fn make_dirs(&self, path: &Path) -> io::Result<()> {
        self.enter("mkdir")?;
        // One of those above may be removed in between, by who finds it empty.
        let mut made = fs::create_dir_all(path);
        for _ in 1..MKDIR_TRIES {
            match made {
                Err(error) if error.kind() == io::ErrorKind::NotFound => made = fs::create_dir_all(path),
                made => return made,
            }
        }
        made
    }

    /// Removes a file (a pin, too); nothing happens if there is none.
    pub fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.enter("unlink")?;
        absent_is_fine(fs::remove_file(path))
    }

    /// Removes an empty directory; nothing happens if there is none.
    pub fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.enter("rmdir")?;
        absent_is_fine(fs::remove_dir(path))
    }

    /// Removes a directory of state with all that is in it.
    pub fn remove_tree(&self, path: &Path) -> io::Result<()> {
        self.enter("rmtree")?;
        absent_is_fine(fs::remove_dir_all(path))
    }

    /// A file's bytes; `None` if there is none.
    pub fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        self.enter("read")?;
        match fs::read(path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A file to be read in parts; `None` if there is none.
    pub fn open(&self, path: &Path) -> io::Result<Option<File>> {
        self.enter("open")?;
        match File::open(path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The names in a directory, sorted; none if it isn't there.
    pub fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.enter("readdir")?;
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// Locks a file. To be told of its release takes a call that waits for as long as it takes, so it is tried again.
fn lock(file: &File, until: Instant) -> io::Result<()> {
    loop {
        match file.try_lock() {
            Err(fs::TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(LOCK_PAUSE),
            result => return Ok(result?),
        }
    }
}

/// How often directories are made again.
const MKDIR_TRIES: u32 = 16;
/// Pause after which a held lock is tried again.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
