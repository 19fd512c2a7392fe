//! The iptables front end of polc: iptables-save and ipset text in, typed syntax trees out, and canonical text back.
//!
//! Read this crate if you want to know what a dump *says*; what it *means* to a packet is in `polc-ir`. Start with
//! [`parse()`], which turns a source into a [`ast::Dump`] and a list of diagnostics, and with [`print()`], which writes the
//! dump as iptables-legacy-save would.
//!
//! ```
//! use polc_frontend_iptables::{ParseOptions, parse, print};
//! use polc_ir::source::SourceMap;
//!
//! let mut sources = SourceMap::new();
//! let file = sources.add("rules.v4", "*filter\n:INPUT DROP\n-A INPUT -p tcp --dport ssh -j ACCEPT\nCOMMIT\n");
//! let (dump, diagnostics) = parse(&sources, file, &ParseOptions::default());
//! assert!(diagnostics.is_empty());
//! let rule = &dump.tables[0].rules[0];
//! assert_eq!(sources.text(rule.matches[0].span), "--dport ssh");
//! assert!(print(&dump, false).contains("\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n"));
//! ```
//!
//! | word | meaning |
//! | --- | --- |
//! | dump | the text of iptables-save: a section for each table |
//! | match, target | an extension after `-m` or `-j`, with its options |
//! | clause | an extension or base option as written, with its span |
//! | canonical text | what iptables-legacy-save 1.8.9 prints for a rule |
//!
//! The rooms: [`lexer`] splits lines and words, [`mod@parse`] runs the dump's lines, `rule` reads one rule line, [`ext`]
//! says what an extension is, [`matches`] and [`targets`] hold one file for each, `check` does the kernel's checks,
//! [`mod@print`] writes canonical text, [`names`] and [`value`] turn words into numbers, [`codes`] lists what can be wrong.

pub mod ast;
mod check;
pub mod codes;
pub mod ext;
pub mod lexer;
pub mod matches;
pub mod names;
pub mod parse;
pub mod print;
mod rule;
pub mod targets;
pub mod value;

pub use parse::{Existing, Mode, ParseOptions, parse};
pub use print::print;
