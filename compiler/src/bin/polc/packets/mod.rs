//! Packets to decide: from captures and from lists of JSON objects.

pub(crate) mod capture;
pub(crate) mod list;
