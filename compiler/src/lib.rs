//! The polc policy compiler: rule sets to plans, and what the command line shares.
//!
//! A rule set goes through [`flatten`](flatten::flatten), [`decide`](decide::decide) and [`select`](select::select),
//! each a file, a verb and one public function; [`compile`] lists them in order, with verification between. The
//! backend makes an object of the plan.

pub mod decide;
pub mod flatten;
mod pipeline;
pub mod place;
pub mod runner;
pub mod select;
pub mod witness;

pub use pipeline::{Compiled, compile};
