//! Standard output and standard error: colour, and what happens when the reader goes away.
//!
//! Results go to standard output, findings and remarks to standard error. A closed pipe is no failure: what can't be
//! written is not written, and the exit status still says what was found.

use std::io::{self, IsTerminal as _, Write as _};

use annotate_snippets::Renderer;
use polc_ir::source::bytes::{kept, of_text};

use crate::cli::ColorChoice;

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
    pub(crate) fn result(&self, text: &str) {
        let mut out = io::stdout().lock();
        // Nobody is left to tell.
        let _ = out.write_all(&of_text(text)).and_then(|()| out.flush());
    }

    /// Writes a remark or a finding; bytes that are no UTF-8 show as U+FFFD.
    pub(crate) fn remark(&self, text: &str) {
        let shown = text.replace(|character| kept(character).is_some(), "\u{fffd}");
        let _ = io::stderr().lock().write_all(shown.as_bytes());
    }

    /// Writes a failure.
    pub(crate) fn error(&self, message: &str) {
        let title = annotate_snippets::Level::ERROR.primary_title(message);
        let text = self.renderer().render(&[annotate_snippets::Group::with_title(title)]);
        self.remark(&format!("{text}\n"));
    }
}
