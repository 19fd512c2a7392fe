//! `Plan`: the steps a program takes and the tables it reads. The backend sees nothing above it.
//!
//! A program first parses the frame into a *key*, an array of 32-bit words on its stack; everything after reads and
//! writes that key alone. Each stage is then decided in one of three ways: as branch-light code (`Linear`), as a
//! straight line of arithmetic and table reads (`Lookup`), or by walking a table of nodes (`Walk`), whose code is the
//! same whatever the table's size. All end in exits.
//!
//! ```text
//! frame ─▶ key words ─▶ derived words ─▶ set membership ─▶ stage ─▶ exit ─┬▶ ending (slot)
//!                                                           ▲            │
//!                                                           └── writes ──┘
//! ```

mod eval;
mod lookup;
mod member;
mod print;
pub mod set;

pub use member::{MemberPart, MemberStep, NumberWords};

pub use lookup::{AluKind, DataTable, Given, Known, LookupStep, Op, Operand, PRESSURE_MAX, given};

use std::collections::BTreeMap;

use cranelift_entity::PrimaryMap;

use self::set::SetTable;
use crate::derived::DerivedData;
use crate::entities::{Data, Derived, EffectTest, Rule, Set, Stage, Step};
use crate::env::{Device, Place};
use crate::field::Field;
use crate::hook::Family;
use crate::outcome::{Count, Ending};
use crate::ruleset::EffectTestKind;
use crate::set::SetData;

/// Everything the backend needs to emit one program.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The address family of the packets it decides.
    pub family: Family,
    /// What it was made for; `attach` is set.
    pub place: Place,
    /// Where each field is in the key, in ascending order of `field`.
    pub key: Vec<KeySlot>,
    /// Device names that the rules tell apart. The key holds a device's class in place of its name.
    pub devices: DeviceClasses,
    /// Steps that code takes, one for each stage decided by code; a step refers only to steps with a smaller number.
    pub steps: PrimaryMap<Step, StepData>,
    /// The tables that look-up steps read.
    pub tables: PrimaryMap<Data, DataTable>,
    /// The table that `Walk` reads.
    pub walk: WalkTable,
    /// Where packets enter.
    pub root: Target,
    /// What packets are counted for. A trace's index is its counter slot. Those of frame endings that parsing may give
    /// are always among them.
    pub traces: Vec<Trace>,
    /// Definitions of derived fields in `key` that the program computes from the frame before the first stage.
    pub derived: PrimaryMap<Derived, DerivedData>,
    /// The sets that `derived` refers to.
    pub sets: PrimaryMap<Set, SetData>,
    /// Fields of `key` that say whether a packet is in a set, computed from tables before the first stage. Membership in
    /// other sets is decided by stages.
    pub members: Vec<MemberStep>,
    /// The tables of sets that `members` look up.
    pub set_tables: BTreeMap<Set, SetTable>,
    /// Stateful and random tests that exits run.
    pub effect_tests: PrimaryMap<EffectTest, EffectTestKind>,
}

/// A field's place in the key. Words hold numbers in the CPU's own order. A field wider than 32 bits takes several
/// words, the most significant first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeySlot {
    /// The field. `InDevice` and `OutDevice` stand for the device's class here.
    pub field: Field,
    /// Index of its first word.
    pub word: u8,
    /// How many words it takes: 1, 2 (a MAC address) or 4.
    pub words: u8,
    /// The bit that it is, counted from the lowest, if it is 0 or 1 and others share its word.
    pub flag: Option<u8>,
}

impl KeySlot {
    /// The bits of each of its words that are its own.
    pub fn own(&self) -> u32 {
        self.flag.map_or(u32::MAX, |bit| 1 << bit)
    }

    /// How far its lowest bit is from its last word's.
    pub fn shift(&self) -> u32 {
        self.flag.unwrap_or(0).into()
    }

    /// The width of what it holds of a field of so many bits.
    pub fn bits(&self, of_field: u8) -> u8 {
        if self.flag.is_some() { 1 } else { of_field }
    }

    /// Its words for a value, the most significant first, with no others' bits.
    pub fn spread(self, value: u128) -> impl Iterator<Item = u32> {
        let shifted = move |index: u8| (value >> (32 * u32::from(index))) as u32;
        (0..self.words).rev().map(move |index| shifted(index) << self.shift() & self.own())
    }

    /// Puts a value to its place, and leaves others' bits.
    pub fn put(self, value: u128, key: &mut [u32]) {
        for (word, value) in key[self.word.into()..].iter_mut().zip(self.spread(value)) {
            *word = *word & !self.own() | value;
        }
    }
}

/// Classes of devices: devices that no rule tells apart share one.
///
/// Class 0 is every device that was not declared; what needs to tell devices apart defers its packets. Class 1 is
/// "no device" and every declared device that no test names. The object's `devices` table maps a device number to its
/// class.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceClasses {
    /// Declared devices and their class, ascending by device number.
    pub devices: Vec<(Device, u16)>,
    /// For people and loaders: for each class from 0 on, the tested names (`eth+` for prefixes) that devices of the
    /// class satisfy.
    pub names: Vec<Vec<String>>,
    /// The input device is this class whatever the packet says (`--in-interface`).
    pub fixed_in: Option<u16>,
    /// The output device is this class whatever the packet says (`--out-interface`).
    pub fixed_out: Option<u16>,
}

/// A test of one key word: `lo <= key[word] & mask <= hi`, unsigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WordTest {
    /// Index of the word.
    pub word: u8,
    /// The bits that count.
    pub mask: u32,
    /// Smallest value that holds.
    pub lo: u32,
    /// Largest value that holds.
    pub hi: u32,
}

/// A condition in code: a conjunction of disjunctions of conjunctions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearTest {
    /// Holds if all word tests of any alternative hold.
    pub any: Vec<Vec<WordTest>>,
}

/// A stage that code decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StepData {
    /// By comparing.
    Linear(LinearStep),
    /// By looking up.
    Lookup(LookupStep),
}

impl StepData {
    /// The stage it decides.
    pub fn stage(&self) -> Stage {
        match self {
            StepData::Linear(step) => step.stage,
            StepData::Lookup(step) => step.stage,
        }
    }

    /// The step, if it compares.
    pub fn linear_mut(&mut self) -> Option<&mut LinearStep> {
        match self {
            StepData::Linear(step) => Some(step),
            StepData::Lookup(_) => None,
        }
    }

    /// What may happen then.
    pub fn exits(&self) -> impl Iterator<Item = &PlanExit> {
        let (entries, exits): (&[LinearEntry], &[PlanExit]) = match self {
            StepData::Linear(step) => (&step.entries, &[]),
            StepData::Lookup(step) => (&[], &step.exits),
        };
        entries.iter().map(|entry| &entry.exit).chain(exits)
    }
}

/// A stage as code: entries tried in order. The last one has no tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearStep {
    /// The stage it decides.
    pub stage: Stage,
    /// The entries.
    pub entries: Vec<LinearEntry>,
}

/// An entry as code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearEntry {
    /// All must hold.
    pub tests: Vec<LinearTest>,
    /// What happens then.
    pub exit: PlanExit,
    /// The rule whose line the instructions are attributed to.
    pub rule: Option<Rule>,
}

/// Where to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// In code.
    Step(Step),
    /// In the walk table, at this node.
    Walk(WalkRef),
}

/// What one counter slot stands for: a piece of a packet's way. A packet that is not lost is counted in any number of
/// slots without an ending, and then in one that has one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Trace {
    /// The packet's fate, for the last piece of the way.
    pub ending: Option<Ending>,
    /// What a packet counted here is counted for, in order.
    pub counts: Vec<Count>,
    /// A packet that comes to an end here does so if the kernel's table has no connection for it
    /// ([`Field::CtAbsent`]); otherwise it ends in the next slot, which defers it.
    pub if_absent: bool,
}

impl From<Ending> for Trace {
    fn from(ending: Ending) -> Trace {
        Trace { ending: Some(ending), counts: Vec::new(), if_absent: false }
    }
}

/// What an exit does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PlanExit {
    /// Count in this slot of `traces`, which has an ending, and return.
    End(u32),
    /// Change words and go on.
    Then {
        /// The slot to count in, if any.
        count: Option<u32>,
        /// The changes, in order.
        writes: Vec<WordWrite>,
        /// Where.
        next: Target,
    },
    /// Run a stateful or random test and go on.
    Test {
        /// The slot to count in, if any, whether or not the test holds.
        count: Option<u32>,
        /// The test.
        test: EffectTest,
        /// Where, if it holds.
        yes: Target,
        /// Where, if not.
        no: Target,
    },
}

/// A change of one key word: `word' = (word & !clear) ^ xor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WordWrite {
    /// Index of the word.
    pub word: u8,
    /// Bits set to 0 first.
    pub clear: u32,
    /// Bits inverted then.
    pub xor: u32,
}

/// A place in the walk table: a node, or an exit of the stage being decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalkRef {
    /// The node of this index.
    Node(u32),
    /// The exit of this index.
    Exit(u32),
    /// No entry holds here; another part of the stage gives one.
    None,
}

/// A node of the walk table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WalkNode {
    /// Goes on by one test.
    Test {
        /// The test.
        test: WordTest,
        /// Where, if it holds.
        yes: WalkRef,
        /// Where, if not.
        no: WalkRef,
    },
    /// Decides `first`, then `rest`; the smaller exit index wins. Only on the way from a stage's root through `rest`
    /// links, so that one pending reference is enough.
    Fork {
        /// Decided first.
        first: WalkRef,
        /// Decided then.
        rest: WalkRef,
    },
}

/// The table that decides stages as data. Exits of one stage are numbered in the order of its entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WalkTable {
    /// The nodes. A node refers only to nodes with a smaller index.
    pub nodes: Vec<WalkNode>,
    /// The exits. Their targets are all in the table.
    pub exits: Vec<PlanExit>,
    /// Most nodes any packet visits from any root to its ending, exits included: the bound of the program's loop.
    pub visits_max: u32,
}

impl WalkTable {
    /// The exit, if it is a step's and leads into the table, as one of the table's: it takes no code then. An exit that
    /// ends, or does nothing on its way, is left as it is.
    pub fn by_table(&mut self, exit: PlanExit) -> PlanExit {
        let inside = |target: &Target| matches!(target, Target::Walk(_));
        let moves = match &exit {
            PlanExit::End(_) => false,
            PlanExit::Then { count, writes, next } => inside(next) && (count.is_some() || !writes.is_empty()),
            PlanExit::Test { yes, no, .. } => inside(yes) && inside(no),
        };
        if !moves {
            return exit;
        }
        let next = Target::Walk(WalkRef::Exit(self.exits.len() as u32));
        self.exits.push(exit);
        PlanExit::Then { count: None, writes: Vec::new(), next }
    }
}
