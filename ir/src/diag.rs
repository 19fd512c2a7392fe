//! Diagnostics: what polc tells a user about the user's own text.
//!
//! A [`Diagnostic`] points at source text, says what is wrong in one line, and says what to do. It is data: the binary
//! renders it for people, as JSON or as SARIF. Failures of the world (a file that can't be read, a system call) are
//! error enums of their own area; failures of polc are assertions. Neither is a `Diagnostic`.
//!
//! Codes are grouped by hundreds, each group owned by one room, which declares its codes as constants:
//!
//! | codes | room |
//! | --- | --- |
//! | 0100-0199 | reading iptables-save text (frontend-iptables) |
//! | 0200-0299 | reading ipset text (frontend-iptables) |
//! | 0300-0399 | lowering to the IR, rules that can't be compiled (frontends, compiler) |
//! | 0400-0499 | lints (compiler) |
//! | 0500-0599 | limits and budgets (compiler, backend-ebpf) |
//! | 0600-0699 | reading objects (backend-ebpf) |
//! | 0700-0799 | packets given as text or captures (ir, binary) |
//! | 0800-0899 | the kernel (loader) |

use std::fmt;

use serde::{Serialize, Serializer};

use crate::source::Span;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Note,
    /// Probably not what was meant, or compiled in part.
    Warning,
    /// The input is not accepted, or the request can't be carried out.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        })
    }
}

/// The stable number of a kind of finding. Printed after the severity's letter: `E0102`, `W0401`, `N0301`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code(pub u16);

/// A place in the source and what it has to do with the finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The text pointed at.
    pub span: Span,
    /// What to say beside it; may be empty.
    pub message: String,
}

/// One finding about the user's input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// Which kind of finding it is.
    pub code: Code,
    /// One line: what is wrong, naming the user's own words in backquotes.
    pub message: String,
    /// The text the finding is about. `None` only when no text is at fault (a missing option of the command line).
    pub span: Option<Span>,
    /// Other places that take part (the rule that shadows).
    pub secondary: Vec<Label>,
    /// Background: why this is so.
    pub notes: Vec<String>,
    /// What the user can do about it.
    pub hint: Option<String>,
}

impl Diagnostic {
    /// A finding of the given severity at `span`.
    pub fn new(
        severity: Severity,
        code: Code,
        message: impl Into<String>,
        span: impl Into<Option<Span>>,
    ) -> Diagnostic {
        Diagnostic {
            severity,
            code,
            message: message.into(),
            span: span.into(),
            secondary: Vec::new(),
            notes: Vec::new(),
            hint: None,
        }
    }

    /// An error at `span`.
    pub fn error(code: Code, message: impl Into<String>, span: impl Into<Option<Span>>) -> Diagnostic {
        Diagnostic::new(Severity::Error, code, message, span)
    }

    /// A warning at `span`.
    pub fn warning(code: Code, message: impl Into<String>, span: impl Into<Option<Span>>) -> Diagnostic {
        Diagnostic::new(Severity::Warning, code, message, span)
    }

    /// A note at `span`.
    pub fn note(code: Code, message: impl Into<String>, span: impl Into<Option<Span>>) -> Diagnostic {
        Diagnostic::new(Severity::Note, code, message, span)
    }

    /// Adds another place that takes part.
    pub fn with_label(mut self, span: Span, message: impl Into<String>) -> Diagnostic {
        self.secondary.push(Label { span, message: message.into() });
        self
    }

    /// Adds a sentence of background.
    pub fn with_note(mut self, note: impl Into<String>) -> Diagnostic {
        self.notes.push(note.into());
        self
    }

    /// Says what to do.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Diagnostic {
        self.hint = Some(hint.into());
        self
    }

    /// The code with its letter: `E0102`.
    pub fn code_text(&self) -> String {
        let letter = match self.severity {
            Severity::Note => 'N',
            Severity::Warning => 'W',
            Severity::Error => 'E',
        };
        format!("{letter}{}", self.code)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}", self.0)
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
