//! The polc policy compiler: rule sets to plans, and what the command line shares.
//!
//! A rule set goes through [`flatten`](flatten::flatten), [`split`](split::split), [`simplify`](simplify::simplify),
//! [`decide`](decide::decide) and [`select`](select::select), each a file, a verb and one public function; [`compile`] lists them in order, with verification between. The
//! backend makes an object of the plan.
//!
//! Around them: [`session::Session`] reads a rule set, [`report`] accounts for each of its rules at a [`place`],
//! [`mod@lint`] looks for rules that can't be meant, [`runner`] runs packets through every level. The library does no I/O
//! and never names the loader, but for `netfilter`, which asks the running kernel (feature `kernel`).

pub mod agree;
pub mod beyond;
pub mod bound;
pub mod build;
pub mod decide;
pub mod decider;
pub mod deciding;
pub mod flatten;
pub mod guard;
pub mod lint;
mod members;
#[cfg(feature = "kernel")]
pub mod netfilter;
mod pipeline;
pub mod place;
pub mod reach;
pub mod report;
pub mod runner;
pub mod save;
pub mod select;
pub mod session;
pub mod simplify;
pub mod split;
pub mod verify;
pub mod watch;
pub mod witness;

pub use pipeline::{Compiled, compile, compile_with};
