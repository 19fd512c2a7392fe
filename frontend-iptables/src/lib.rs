//! iptables-save text: read, printed in canonical form, and lowered to the polc IR.
//!
//! A dump is read into a syntax tree ([`ast`]) whose values are typed and carry their spans; [`print()`] writes it as
//! iptables-legacy-save does; [`lower()`] gives its meaning. What a match or target takes, prints and means is one
//! entry of a table ([`mod@matches`], [`targets`]), so adding an extension touches one place.
//!
//! ```
//! use polc_frontend_iptables::{ParseOptions, lower, parse, print};
//! use polc_ir::hook::Semantics;
//! use polc_ir::source::SourceMap;
//!
//! let mut sources = SourceMap::new();
//! let file = sources.add("rules.v4", "*filter\n-A INPUT -p tcp --dport ssh -j ACCEPT\nCOMMIT\n");
//! let (dump, diagnostics) = parse(&sources, file, &ParseOptions::default());
//! assert!(diagnostics.is_empty());
//! assert!(print(&dump, false).contains("-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT"));
//! assert_eq!(lower(&dump, &[], Semantics::Legacy).rules.len(), 1);
//! ```

pub mod ast;
pub mod codes;
mod ext;
pub mod extension;
pub mod ipset;
pub mod lexer;
mod lower;
pub mod matches;
pub mod names;
mod order;
mod parse;
mod place;
mod print;
mod rule;
mod table;
pub mod targets;
pub mod value;

pub use lower::lower;
pub use parse::{Mode, ParseOptions, SetFamilies, parse};
pub use print::print;
