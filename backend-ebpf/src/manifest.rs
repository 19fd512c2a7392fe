//! What an object says about itself in JSON: where it belongs, what it counts, what it needs.
//!
//! A loader that knows polc reads it from the section `polc.manifest`; any other loader skips it, so nothing that the
//! programs need to decide packets may be here alone. Fields are added, never renamed; readers ignore fields they
//! don't know.

use crate::trace::TraceManifest;
use polc_ir::env::{Attach, Device, Mode};
use polc_ir::hook::{Family, Hook, Semantics};
use polc_ir::plan::set::SetShape;
use serde::{Deserialize, Serialize};

/// The manifest of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Manifest {
    /// Version of polc that wrote the object.
    pub polc: String,
    /// Where the programs sit.
    pub attach: Option<Attach>,
    /// The hooks whose chains were compiled, in order.
    pub path: Vec<Hook>,
    /// How the object is deployed.
    pub mode: Option<Mode>,
    /// The address family.
    pub family: Option<Family>,
    /// Whose corner cases were followed.
    pub semantics: Option<Semantics>,
    /// What each slot of the counter map stands for; the index is the slot.
    pub counters: Vec<CounterSlot>,
    /// The rules and policies that slots count packets for. A rule's packets are the sum over all slots whose `counts`
    /// name it, once for each time they do.
    pub counted: Vec<Counted>,
    /// Devices that the object tells apart, with the numbers it was compiled for.
    pub devices: Vec<Device>,
    /// How packets are reported, if they can be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<TraceManifest>,
    /// The sets that have tables.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sets: Vec<SetManifest>,
    /// What a loader has to be able to do beyond the common.
    pub needs: Needs,
    /// Oldest kernel with everything the object uses.
    pub kernel_min: KernelVersion,
}

/// A set that has a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SetManifest {
    /// The set's name.
    pub name: String,
    /// The data map that is its table.
    pub map: String,
    /// The line that creates it, as `ipset save` writes it.
    pub create: String,
    /// Whether its elements may change while the program runs.
    pub live: bool,
    /// Most elements that it may get.
    pub elements_max: usize,
    /// How the table is laid out.
    pub shape: SetShape,
}

/// What one counter slot counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CounterSlot {
    /// What kind of end it is.
    pub kind: CounterKind,
    /// The table, where a rule or a policy decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,
    /// The chain, where a rule or a policy decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain: Option<String>,
    /// The rule's number within its chain, from 1, as `iptables -L --line-numbers` shows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<u32>,
    /// The source file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The source line, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// The source line's text, or a few words where no rule decided.
    pub text: String,
    /// `accept`, `drop`, `reject` or `defer`; none on the way to a verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
    /// What a packet counted here is counted for, in order: indices of `Manifest::counted`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub counts: Vec<u32>,
}

/// A rule or a policy that packets are counted for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Counted {
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The rule's number within its chain, from 1; none for the chain's policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<u32>,
    /// The source file; none for a policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The source line, from 1; none for a policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// The source line's text, or a few words for a policy.
    pub text: String,
    /// The rule as a save tool prints it, if the source line is something else, counts aside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canonical: Option<String>,
}

impl Counted {
    /// The text without the counts that a dump has before a rule (`[packets:bytes]`): they differ from save to save.
    pub fn without_counts(&self) -> &str {
        let text = self.text.trim();
        let rest = text.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        rest.map_or(text, |(_, rule)| rule.trim_start())
    }
}

/// What a counter slot stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CounterKind {
    /// A rule's action.
    Rule,
    /// A base chain's policy.
    Policy,
    /// A match that drops what it can't read.
    Hotdrop,
    /// Left to the kernel's own rules.
    Defer,
    /// A frame that never reaches the rules.
    Frame,
    /// No rule and no policy.
    Nothing,
    /// No end yet: the packet is counted in another slot too.
    OnTheWay,
}

/// What a loader needs beyond loading one ELF file unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Needs {
    /// A program array has to be filled with the object's other programs.
    pub tail_calls: bool,
    /// Maps of maps have to be made and filled.
    pub inner_maps: bool,
    /// What of the running kernel's has to be found by name ([`crate::kernel_api`]).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kernel: Vec<String>,
}

/// A kernel version, major and minor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct KernelVersion(pub u16, pub u16);

impl std::fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}
