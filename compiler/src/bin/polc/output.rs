//! Standard output and standard error: colour, and what happens when what is written has no room or no reader.
//!
//! Results go to standard output, findings and remarks to standard error. A closed pipe is no failure: its reader has
//! what it wanted, and the exit status still says what was found. Any other result that can't be written is one, since
//! whoever asked for it has half of it.

use std::io::{self, IsTerminal as _, Write as _};

use annotate_snippets::Renderer;
use polc_ir::source::bytes::{kept, of_text};
use serde::Serialize;

use crate::cli::ColorChoice;
use crate::failure::Failure;

/// Where things are printed.
#[derive(Debug)]
pub(crate) struct Output {
    color: bool,
}

impl Output {
    pub(crate) fn new(choice: ColorChoice) -> Output {
        let color = match choice {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            // https://no-color.org: present and not empty.
            ColorChoice::Auto => {
                io::stderr().is_terminal()
                    && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
                    && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
            }
        };
        Output { color }
    }

    /// What renders findings.
    pub(crate) fn renderer(&self) -> Renderer {
        if self.color { Renderer::styled() } else { Renderer::plain() }
    }

    /// Writes a result; bytes of the user's that are no UTF-8 as they were.
    ///
    /// # Errors
    /// Standard output takes no more. That nobody reads it any longer is none.
    pub(crate) fn result(&self, text: &str) -> Result<(), Failure> {
        self.bytes(&of_text(text))
    }

    /// Writes a result that is JSON, in lines of readable length. JSON is UTF-8 (RFC 8259, section 8.1), so bytes that
    /// are not stay the characters that they are kept as ([`polc_ir::source::bytes`]).
    ///
    /// # Errors
    /// As [`Output::result`].
    pub(crate) fn json(&self, value: &impl Serialize) -> Result<(), Failure> {
        self.json_text(&format!("{}\n", serde_json::to_string_pretty(value).expect("plain data serializes")))
    }

    /// Writes lines of JSON, as [`Output::json`] does one value.
    ///
    /// # Errors
    /// As [`Output::result`].
    pub(crate) fn json_text(&self, text: &str) -> Result<(), Failure> {
        self.bytes(text.as_bytes())
    }

    /// Writes a result that is no text.
    ///
    /// # Errors
    /// As [`Output::result`].
    pub(crate) fn bytes(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::write("standard output".as_ref(), error))
            }
            _ => Ok(()),
        }
    }

    /// Writes a remark or a finding; bytes that are no UTF-8 show as U+FFFD.
    pub(crate) fn remark(&self, text: &str) {
        let shown = text.replace(|character| kept(character).is_some(), "\u{fffd}");
        // Nobody is left to tell.
        let _ = io::stderr().lock().write_all(shown.as_bytes());
    }

    /// Writes a failure.
    pub(crate) fn error(&self, message: &str) {
        let title = annotate_snippets::Level::ERROR.primary_title(message);
        let text = self.renderer().render(&[annotate_snippets::Group::with_title(title)]);
        self.remark(&format!("{text}\n"));
    }
}
