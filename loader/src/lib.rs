//! Makes a running kernel agree with a polc object, and takes it back.
//!
//! For whoever applies policies from a program; the command line is one such. This crate knows objects only: what a
//! rule is stays above it. Start with [`load::load`].
//!
//! | room | what it owns |
//! | --- | --- |
//! | [`sys`] | every call to the kernel, the only `unsafe` code here, with a hook at which tests let calls fail |
//! | [`probe`] | what the running kernel can do |
//! | [`load`] | an object into the kernel |
//! | [`error`] | why not, and what to do |

pub mod error;
pub mod load;
pub mod probe;
pub mod sys;

pub use error::Error;
