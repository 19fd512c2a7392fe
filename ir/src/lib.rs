//! The typed intermediate representation of polc, the policy compiler.
//!
//! A policy passes through five levels, each a data type with a printer, a verifier and an evaluator:
//!
//! | level | what it is |
//! | --- | --- |
//! | `Ruleset` | tables, base chains on hooks, chains, rules, sets: netfilter's meaning without a syntax |
//! | `Classifier` | per attach point a DAG of stages, each an ordered list of cubes; first match wins |
//! | `Decision` | per stage a DAG of tests, lists and minima over the stage's entries |
//! | `Plan` | the steps a program takes and the tables it reads |
//! | object | a BPF ELF file; it belongs to the backend |
//!
//! This crate holds those types, what they share (packets, fields, intervals, sources, diagnostics) and their
//! reference evaluators. It does no I/O, runs no passes, and knows neither iptables' nor Kubernetes' syntax, nor eBPF.
//! Start with `ruleset::Ruleset`, whose `eval` defines what everything else has to equal.

pub mod at_once;
pub mod classifier;
pub mod cube;
pub mod decision;
pub mod derived;
pub mod diag;
pub mod entities;
pub mod env;
pub mod field;
pub mod hook;
pub mod interval;
pub mod limits;
pub mod outcome;
pub mod packet;
pub mod plan;
pub mod ruleset;
pub mod set;
pub mod source;
pub mod state;
