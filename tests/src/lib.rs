//! What the tests, benches and fuzz targets of polc share: corpora, generators, oracles and runners.
//!
//! Tests here are data where they can be: a new case is a new file or a line in one. Generators and oracles are
//! libraries; a property or a fuzz target only joins them.

pub mod applied;
pub mod corpus;
pub mod fuzz;
pub mod generate;
pub mod kernel;
pub mod levels;
pub mod programs;
pub mod services;
pub mod stateless;
