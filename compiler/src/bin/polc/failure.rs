//! Failures of the world: what keeps a command from doing its work, apart from findings about the user's rules.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a command could not do its work.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A file can't be read.
    Read(PathBuf, io::Error),
    /// A file is larger than [`polc_ir::limits::FILE_BYTES_MAX`].
    TooLarge(PathBuf),
    /// A file can't be written.
    Write(PathBuf, io::Error),
    /// Options that don't go together, or a value that is not what an option takes.
    Usage(String),
    /// The input is readable, and not what it has to be.
    Input(String),
    /// The kernel or the system refuses.
    #[cfg(feature = "kernel")]
    Kernel(Box<polc_loader::Error>),
    /// The same, of one of several applied policies.
    #[cfg(feature = "kernel")]
    At(polc_loader::state::SlotName, Box<polc_loader::Error>),
    /// The kernel's packet filter can't be asked.
    #[cfg(feature = "kernel")]
    Netfilter(polc_loader::netfilter::NetfilterError),
}

impl Failure {
    pub(crate) fn read(path: &Path, error: io::Error) -> Failure {
        Failure::Read(path.to_path_buf(), error)
    }

    pub(crate) fn write(path: &Path, error: io::Error) -> Failure {
        Failure::Write(path.to_path_buf(), error)
    }

    /// A failure about one of several applied policies, which it names.
    #[cfg(feature = "kernel")]
    pub(crate) fn at(slot: &polc_loader::state::SlotName, error: polc_loader::Error) -> Failure {
        use polc_loader::Error;
        match error {
            Error::Corrupt { .. } | Error::Pin { .. } | Error::Disk { .. } => {
                Failure::At(slot.clone(), Box::new(error))
            }
            error => error.into(),
        }
    }

    /// This failure, of one of several packets.
    pub(crate) fn at_packet(self, index: usize) -> Failure {
        match self {
            Failure::Input(message) => Failure::Input(format!("packet {index}: {message}")),
            failure => failure,
        }
    }

    /// The exit status it gives.
    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            #[cfg(feature = "kernel")]
            Failure::Kernel(_) | Failure::At(..) | Failure::Netfilter(_) => 3,
            _ => 2,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Read(path, error) => write!(f, "cannot read `{}`: {error}", path.display()),
            Failure::TooLarge(path) => write!(
                f,
                "`{}` is larger than {} MiB, the most that is read",
                path.display(),
                polc_ir::limits::FILE_BYTES_MAX >> 20
            ),
            Failure::Write(path, error) => write!(f, "cannot write `{}`: {error}", path.display()),
            Failure::Usage(message) | Failure::Input(message) => f.write_str(message),
            #[cfg(feature = "kernel")]
            Failure::Netfilter(error) => write!(f, "the kernel's packet filter can't be asked: {error}"),
            #[cfg(feature = "kernel")]
            Failure::Kernel(error) => {
                refused(f, "", error)?;
                // Of a policy that is applied (`At`), what is kept stays where it is.
                if error.is_unwritable() {
                    f.write_str(", or name another directory with --state")?;
                }
                Ok(())
            }
            #[cfg(feature = "kernel")]
            Failure::At(slot, error) => refused(f, &format!("{slot}: "), error),
        }
    }
}

/// Why the kernel refuses, and what to do about it.
#[cfg(feature = "kernel")]
fn refused(f: &mut fmt::Formatter<'_>, place: &str, error: &polc_loader::Error) -> fmt::Result {
    write!(f, "[E{}] {place}{error}", error.code())?;
    if let polc_loader::Error::Verifier(refusal) = error {
        for line in refusal.log.lines() {
            write!(f, "\n  | {line}")?;
        }
    }
    match error.hint() {
        Some(hint) => write!(f, "\n  help: {hint}"),
        None => Ok(()),
    }
}

#[cfg(feature = "kernel")]
impl From<polc_loader::Error> for Failure {
    fn from(error: polc_loader::Error) -> Failure {
        Failure::Kernel(Box::new(error))
    }
}

#[cfg(feature = "kernel")]
impl From<polc_loader::netfilter::NetfilterError> for Failure {
    fn from(error: polc_loader::netfilter::NetfilterError) -> Failure {
        Failure::Netfilter(error)
    }
}
