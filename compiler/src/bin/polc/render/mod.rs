//! Findings as people, scripts and code hosts read them.

pub(crate) mod human;
pub(crate) mod json;
pub(crate) mod sarif;
