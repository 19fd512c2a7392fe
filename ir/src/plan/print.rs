//! The text form of a plan: the key, the steps, the walk table and the traces.

use std::fmt;

use super::{LinearTest, Plan, PlanExit, StepData, Target, Trace, WalkNode, WalkRef, WordTest};

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "plan {} root {}", self.family, self.root)?;
        writeln!(f, "key:")?;
        for slot in &self.key {
            match slot.flag {
                Some(bit) => writeln!(f, "    w{}: {}, bit {bit}", slot.word, slot.field)?,
                None => writeln!(f, "    w{}: {}, {} words", slot.word, slot.field, slot.words)?,
            }
        }
        if !self.devices.names.is_empty() {
            writeln!(f, "devices:")?;
            for (class, names) in self.devices.names.iter().enumerate() {
                writeln!(f, "    class {class}: {}", names.join(" "))?;
            }
            for (device, class) in &self.devices.devices {
                writeln!(f, "    {} ({}): class {class}", device.name, device.ifindex)?;
            }
        }
        for (step, data) in self.steps.iter().rev() {
            let data = match data {
                StepData::Linear(data) => data,
                StepData::Lookup(data) => {
                    writeln!(f, "{step}: # {}: {}", data.stage, data.structure)?;
                    for (value, op) in data.ops.iter() {
                        writeln!(f, "    {value} = {op}")?;
                    }
                    writeln!(f, "    exit {}", data.result)?;
                    for (index, exit) in data.exits.iter().enumerate() {
                        writeln!(f, "    x{index}: {exit}")?;
                    }
                    continue;
                }
            };
            writeln!(f, "{step}: # {}", data.stage)?;
            for entry in &data.entries {
                f.write_str("    ")?;
                for (index, test) in entry.tests.iter().enumerate() {
                    write!(f, "{}{test}", if index == 0 { "if " } else { " and " })?;
                }
                write!(f, "{}{}", if entry.tests.is_empty() { "" } else { " " }, entry.exit)?;
                match entry.rule {
                    Some(rule) => writeln!(f, "  # {rule}")?,
                    None => writeln!(f)?,
                }
            }
        }
        for (table, data) in self.tables.iter() {
            let (bytes, width) = (data.bytes.len(), data.width);
            writeln!(f, "{table}: {} elements of {width} bytes, {bytes} bytes", bytes / usize::from(width))?;
        }
        if !self.walk.exits.is_empty() {
            writeln!(f, "walk: at most {} visits", self.walk.visits_max)?;
            for (index, node) in self.walk.nodes.iter().enumerate().rev() {
                writeln!(f, "    n{index}: {node}")?;
            }
            for (index, exit) in self.walk.exits.iter().enumerate() {
                writeln!(f, "    x{index}: {exit}")?;
            }
        }
        writeln!(f, "traces:")?;
        for (slot, trace) in self.traces.iter().enumerate() {
            writeln!(f, "    {slot}: {trace}")?;
        }
        Ok(())
    }
}

/// Prints as `step3` or `n12`.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Step(step) => write!(f, "{step}"),
            Target::Walk(node) => write!(f, "{node}"),
        }
    }
}

/// Prints as `n12`, `x3` or `-`.
impl fmt::Display for WalkRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WalkRef::Node(node) => write!(f, "n{node}"),
            WalkRef::Exit(exit) => write!(f, "x{exit}"),
            WalkRef::None => f.write_str("-"),
        }
    }
}

impl fmt::Display for WalkNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WalkNode::Test { test, yes, no } => write!(f, "if {test} then {yes} else {no}"),
            WalkNode::Fork { first, rest } => write!(f, "lesser of {first} and {rest}"),
        }
    }
}

/// Prints as `w3 & 0xff = 0x6` or `w3 in 0x1..=0x5`.
impl fmt::Display for WordTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}", self.word)?;
        if self.mask != u32::MAX {
            write!(f, " & {:#x}", self.mask)?;
        }
        if self.lo == self.hi {
            write!(f, " = {:#x}", self.lo)
        } else {
            write!(f, " in {:#x}..={:#x}", self.lo, self.hi)
        }
    }
}

/// Prints as `drop by rule3; counts rule1, rule3`.
impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ending {
            Some(ending) => write!(f, "{ending}")?,
            None => f.write_str("on the way")?,
        }
        if self.if_absent {
            f.write_str(" if without connection")?;
        }
        for (index, count) in self.counts.iter().enumerate() {
            write!(f, "{}{count}", if index == 0 { "; counts " } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Display for LinearTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(")?;
        for (index, all) in self.any.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { " or " })?;
            for (index, test) in all.iter().enumerate() {
                write!(f, "{}{test}", if index == 0 { "" } else { " and " })?;
            }
        }
        f.write_str(")")
    }
}

impl fmt::Display for PlanExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PlanExit::End(slot) => write!(f, "end {slot}"),
            PlanExit::Then { count, writes, next } => {
                counting(f, *count)?;
                for write in writes {
                    write!(f, "w{0} = w{0} & !{1:#x} ^ {2:#x}; ", write.word, write.clear, write.xor)?;
                }
                write!(f, "go {next}")
            }
            PlanExit::Test { count, test, yes, no } => {
                counting(f, *count)?;
                write!(f, "if {test} go {yes} else {no}")
            }
        }
    }
}

fn counting(f: &mut fmt::Formatter<'_>, count: Option<u32>) -> fmt::Result {
    count.map_or(Ok(()), |slot| write!(f, "count {slot}; "))
}
