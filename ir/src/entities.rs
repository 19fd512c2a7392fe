//! The numbers by which one part of the IR refers to another.
//!
//! A reference is a `u32` newtype that prints the way the text form of its level writes it (`chain2`, `rule7`), so a
//! value in a debugger, a dump and a diagnostic all read alike. A reference means something only together with the
//! map it indexes; the data itself never holds pointers.

use cranelift_entity::entity_impl;
use serde::{Deserialize, Serialize};

macro_rules! entities {
    ($($(#[$doc:meta])* $name:ident, $prefix:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(u32);
        entity_impl!($name, $prefix);
    )*};
}

entities! {
    /// A table of a rule set (`filter`, `nat`, ...), in file order. Prints as `table0`.
    Table, "table";
    /// A chain, base or user-defined. Prints as `chain2`.
    Chain, "chain";
    /// A rule, numbered through the whole rule set in source order. Prints as `rule7`.
    Rule, "rule";
    /// A named set of addresses, ports, devices (an ipset). Prints as `set0`.
    Set, "set";
    /// A value computed from the packet or from tables by more than one load (set membership, a `u32` program, a TCP
    /// option search). Prints as `derived3`.
    Derived, "derived";
    /// A stateful or random test whose evaluation can be observed (limit, statistic). Prints as `effect1`.
    EffectTest, "effect";
    /// A stage of a classifier: an ordered list of entries over fields that are fixed when it is entered. Prints as
    /// `stage3`.
    Stage, "stage";
    /// An entry of a stage, numbered through the whole classifier. Prints as `entry12`.
    Entry, "entry";
    /// A node of a decision. Prints as `node12`.
    Node, "node";
    /// A step of a plan. Prints as `step4`.
    Step, "step";
    /// A BPF map in the object. Prints as `map3`.
    Map, "map";
    /// A value that a look-up step computes. Prints as `v7`.
    Value, "v";
    /// A table that look-up steps read. Prints as `data2`.
    Data, "data";
}
