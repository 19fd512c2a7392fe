//! What the kernel's verifier will make of a program, computed before it is asked.
//!
//! The verifier walks every path of a program, and stops on a path when it meets a state like one it has already been
//! through. So its work is the number of instructions only where states that meet look alike; otherwise it doubles at
//! each branch. This module replays that walk (kernel/bpf/verifier.c of Linux 6.18: `do_check`, `is_state_visited`,
//! `push_stack`, `check_cfg`) with the same order, the same places where states are compared, the same sparseness of
//! remembered states and the same rule for loops, but with one assumption in place of the comparison itself: *two
//! states at the same instruction, in the same turn of each loop around it, are alike*. It holds for code that keeps
//! what differs between paths out of registers that are still needed and out of stack slots that the verifier follows
//! (see [`crate::abi`]); for other code the estimate is too low, by a factor that grows with each such difference.
//!
//! No branch is taken to be decided, so code whose conditions the verifier can evaluate costs less than computed.
//!
//! Straight code branches too: where a constant masks a number that is known to be 0 or -1, the verifier follows either
//! on its own (`maybe_fork_scalars`). Generated code avoids that; what it would cost is counted (see `forks`).

use std::collections::HashMap;
use std::fmt;

use polc_ir::diag::Code as DiagCode;
use polc_ir::limits::{
    PROGRAM_INSNS_MAX, STACK_BYTES_MAX, VERIFIER_PENDING_JUMPS_MAX, VERIFIER_PROCESSED_MAX,
};

use crate::asm::{Code, PROGRAM_TOO_LONG};
use crate::insn::{AluOp, Insn, Operand, Reg, Unsupported, Width};

/// Diagnostic code: the verifier would give up before it has followed every path.
pub const TOO_COMPLEX: DiagCode = DiagCode(551);

/// Diagnostic code: the verifier would have too many branches to come back to.
pub const TOO_MANY_PENDING: DiagCode = DiagCode(552);

/// Diagnostic code: the program uses more stack than there is.
pub const STACK_TOO_LARGE: DiagCode = DiagCode(553);

/// The cost of one program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Length, slots.
    pub insns: usize,
    /// Instructions the verifier processes; one more than [`VERIFIER_PROCESSED_MAX`] stands for that and anything
    /// above.
    pub processed: usize,
    /// Most branches that wait to be followed at one time.
    pub pending_jumps: usize,
    /// Bytes of stack, from the frame pointer down.
    pub stack_bytes: usize,
}

/// A program that the kernel would refuse for its size or complexity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverBudget {
    /// Which limit: [`PROGRAM_TOO_LONG`], [`TOO_COMPLEX`], [`TOO_MANY_PENDING`] or [`STACK_TOO_LARGE`].
    pub code: DiagCode,
    /// What the program needs.
    pub needed: usize,
    /// What there is.
    pub limit: usize,
}

impl fmt::Display for OverBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OverBudget { code, needed, limit } = self;
        match *code {
            PROGRAM_TOO_LONG => write!(f, "the program takes {needed} instructions; the limit is {limit}"),
            TOO_COMPLEX => write!(f, "the kernel's verifier would process more than {limit} instructions"),
            TOO_MANY_PENDING => {
                write!(f, "the kernel's verifier would keep {needed} branches pending; the limit is {limit}")
            }
            _ => write!(f, "the program takes {needed} bytes of stack; the limit is {limit}"),
        }
    }
}

impl std::error::Error for OverBudget {}

impl Budget {
    /// Computes the cost of a program. Takes time in proportion to `processed`. Fails, with the slot, on code that
    /// doesn't decode.
    pub fn of(code: &Code) -> Result<Budget, (u32, Unsupported)> {
        let insns = code.insns()?;
        let walk = Walk::new(code, &insns).run();
        Ok(Budget {
            insns: code.slots.len(),
            processed: walk.processed,
            pending_jumps: walk.pending_max,
            stack_bytes: stack_bytes(&insns),
        })
    }

    /// Fails on the first limit that is passed.
    pub fn enforce(&self) -> Result<(), OverBudget> {
        for (code, needed, limit) in [
            (PROGRAM_TOO_LONG, self.insns, PROGRAM_INSNS_MAX),
            (STACK_TOO_LARGE, self.stack_bytes, STACK_BYTES_MAX),
            (TOO_MANY_PENDING, self.pending_jumps, VERIFIER_PENDING_JUMPS_MAX),
            (TOO_COMPLEX, self.processed, VERIFIER_PROCESSED_MAX),
        ] {
            if needed > limit {
                return Err(OverBudget { code, needed, limit });
            }
        }
        Ok(())
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {PROGRAM_INSNS_MAX} instructions, {} of {VERIFIER_PROCESSED_MAX} processed by the verifier, \
             {} of {VERIFIER_PENDING_JUMPS_MAX} pending jumps, {} of {STACK_BYTES_MAX} bytes of stack",
            self.insns, self.processed, self.pending_jumps, self.stack_bytes
        )
    }
}

/// How sparsely states are remembered: after at least so many jumps and instructions since the last, and in a loop
/// that is being walked through, at least the greater numbers of either.
const JUMPS_MIN: usize = 2;
const INSNS_MIN: usize = 8;
const LOOP_JUMPS_MIN: usize = 20;
const LOOP_INSNS_MIN: usize = 100;

/// A loop: the slots `first..=back_jump`, left at the latest after `trips` turns.
struct Loop {
    first: u32,
    back_jump: u32,
    trips: u32,
}

/// A state that is remembered.
struct Remembered {
    /// The one remembered before it on the same path.
    parent: Option<usize>,
    /// Paths from here that are still being followed or pending.
    branches: usize,
    /// Where it was remembered.
    slot: u32,
}

/// A path being followed, or pending.
#[derive(Clone)]
struct Path {
    slot: u32,
    parent: Option<usize>,
    /// Turns taken of each loop; 0 outside it.
    turns: Box<[u32]>,
}

/// The verifier's walk.
struct Walk<'a> {
    insns: &'a [(u32, Insn)],
    /// Index in `insns` of the instruction at each slot.
    index: Vec<u32>,
    loops: Vec<Loop>,
    /// Where states are compared, by slot.
    prune_point: Vec<bool>,
    /// Where arithmetic branches, by slot.
    forks: Vec<bool>,
    /// The state last remembered at a slot in these turns. One remembered earlier is found by no path: either it was
    /// met, or the later one was made on a path through it and is done before it.
    remembered: HashMap<(u32, Box<[u32]>), usize>,
    /// How many states remembered at each slot are still being followed.
    open: Vec<u32>,
    states: Vec<Remembered>,
    pending: Vec<Path>,
    processed: usize,
    pending_max: usize,
    jumps: usize,
    /// `processed` and `jumps` when a state was last remembered.
    last: (usize, usize),
}

impl<'a> Walk<'a> {
    fn new(code: &Code, insns: &'a [(u32, Insn)]) -> Walk<'a> {
        let slots = code.slots.len();
        let mut index = vec![0; slots];
        let mut prune_point = vec![false; slots + 1];
        let mut loops = Vec::new();
        for (number, &(at, insn)) in insns.iter().enumerate() {
            index[at as usize] = number as u32;
            let target = insn.jump_offset().map(|off| (i64::from(at) + 1 + i64::from(off)).max(0) as u32);
            match insn {
                Insn::Jump { .. } => prune_point[at as usize] = true,
                Insn::Call { .. } | Insn::CallKernel { .. } => prune_point[at as usize + 1] = true,
                _ => {}
            }
            if let Some(target) = target {
                if let Some(point) = prune_point.get_mut(target as usize) {
                    *point = true;
                }
                if target <= at {
                    let marked = code.loops.iter().find(|l| l.back_jump == at);
                    loops.push(Loop {
                        first: target,
                        back_jump: at,
                        trips: marked.map_or(u32::MAX, |l| l.trips),
                    });
                }
            }
        }
        Walk {
            insns,
            index,
            forks: forks(insns, &prune_point),
            prune_point,
            remembered: HashMap::new(),
            open: vec![0; slots],
            states: Vec::new(),
            pending: Vec::new(),
            processed: 0,
            pending_max: 0,
            jumps: 0,
            last: (0, 0),
            loops,
        }
    }

    fn run(mut self) -> Walk<'a> {
        let mut path = Path { slot: 0, parent: None, turns: vec![0; self.loops.len()].into() };
        while self.processed <= VERIFIER_PROCESSED_MAX {
            let ended = match self.index.get(path.slot as usize) {
                Some(&number) => self.step(&mut path, self.insns[number as usize].1),
                // Control can't get here in code that the assembler accepts.
                None => true,
            };
            if ended {
                self.close(path.parent);
                match self.pending.pop() {
                    Some(next) => path = next,
                    None => break,
                }
            }
        }
        self
    }

    /// Follows a path over one instruction; whether it ends there.
    fn step(&mut self, path: &mut Path, insn: Insn) -> bool {
        self.processed += 1;
        if self.prune_point[path.slot as usize] && self.seen(path) {
            return true;
        }
        if matches!(
            insn,
            Insn::Jump { .. } | Insn::Ja { .. } | Insn::Call { .. } | Insn::CallKernel { .. } | Insn::Exit
        ) {
            self.jumps += 1;
        }
        let at = path.slot;
        let next = at + insn.slots() as u32;
        let taken = insn.jump_offset().map(|off| (i64::from(at) + 1 + i64::from(off)).max(0) as u32);
        match (insn, taken) {
            (Insn::Exit, _) => return true,
            (Insn::Jump { .. }, Some(target)) => {
                self.branch(path, at, target);
                self.go(path, at, next);
            }
            (_, Some(target)) => return !self.go(path, at, target),
            (_, None) => {
                if self.forks[at as usize] {
                    // The other path does the same instruction once more, now on a number that is known.
                    self.processed += 1;
                    self.branch(path, at, next);
                }
                self.go(path, at, next);
            }
        }
        false
    }

    /// Puts off what a path may also do: go from `at` to `to`.
    fn branch(&mut self, path: &Path, at: u32, to: u32) {
        let mut other = path.clone();
        if self.go(&mut other, at, to) {
            if let Some(parent) = other.parent {
                self.states[parent].branches += 1;
            }
            self.pending.push(other);
            self.pending_max = self.pending_max.max(self.pending.len());
        }
    }

    /// Moves a path from `at` to `to`; false if the loop has had its turns.
    fn go(&self, path: &mut Path, at: u32, to: u32) -> bool {
        path.slot = to;
        for (l, turns) in self.loops.iter().zip(&mut path.turns) {
            if l.back_jump == at && to == l.first {
                if *turns >= l.trips {
                    return false;
                }
                *turns += 1;
            } else if !(l.first..=l.back_jump).contains(&to) {
                *turns = 0;
            }
        }
        true
    }

    /// Whether a state like the path's was seen; if not, it may be remembered.
    fn seen(&mut self, path: &mut Path) -> bool {
        let (insns, jumps) = (self.processed - self.last.0, self.jumps - self.last.1);
        let mut remember = jumps >= JUMPS_MIN && insns >= INSNS_MIN;
        let key = (path.slot, std::mem::take(&mut path.turns));
        let done = self.remembered.get(&key).is_some_and(|&state| self.states[state].branches == 0);
        // A state still being followed is not yet known to be safe: this is a loop.
        if self.open[path.slot as usize] > 0 {
            remember &= jumps >= LOOP_JUMPS_MIN || insns >= LOOP_INSNS_MIN;
        }
        path.turns = key.1.clone();
        if done {
            return true;
        }
        if remember {
            self.last = (self.processed, self.jumps);
            let number = self.states.len();
            self.states.push(Remembered { parent: path.parent, branches: 1, slot: path.slot });
            self.remembered.insert(key, number);
            self.open[path.slot as usize] += 1;
            path.parent = Some(number);
        }
        false
    }

    /// Notes that a path from `state` has been followed to its end.
    fn close(&mut self, mut state: Option<usize>) {
        while let Some(number) = state {
            let remembered = &mut self.states[number];
            remembered.branches -= 1;
            if remembered.branches > 0 {
                break;
            }
            self.open[remembered.slot as usize] -= 1;
            state = remembered.parent;
        }
    }
}

/// What the verifier surely knows of a register.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    Little,
    /// It is 0 or -1.
    ZeroOrOnes,
    /// Its value.
    Constant,
}

/// Which slots hold an `and` or `or` of a number that is 0 or -1 with a constant. Only what a straight line shows is
/// found: at `joins` nothing is known.
fn forks(insns: &[(u32, Insn)], joins: &[bool]) -> Vec<bool> {
    let mut forks = vec![false; joins.len()];
    let mut known = [Known::Little; 11];
    for &(at, insn) in insns {
        if joins[at as usize] {
            known = [Known::Little; 11];
        }
        let (dst, becomes) = match insn {
            Insn::Alu { width, op, dst, src } => {
                let before = known[usize::from(dst.number())];
                let operand = match src {
                    Operand::Imm(_) => Known::Constant,
                    Operand::Reg(src) => known[usize::from(src.number())],
                };
                let sign = match width {
                    Width::W64 => Operand::Imm(63),
                    Width::W32 => Operand::Imm(31),
                };
                let becomes = match (op, before, operand) {
                    (AluOp::Mov, ..) => operand,
                    (_, Known::Constant, Known::Constant) => Known::Constant,
                    (AluOp::And | AluOp::Or, Known::ZeroOrOnes, Known::Constant) => {
                        forks[at as usize] = true;
                        Known::Constant
                    }
                    (AluOp::Arsh, ..) if src == sign => Known::ZeroOrOnes,
                    _ => Known::Little,
                };
                (dst, becomes)
            }
            Insn::LoadImm64 { dst, .. } => (dst, Known::Constant),
            Insn::Neg { dst, .. }
            | Insn::Endian { dst, .. }
            | Insn::LoadMap { dst, .. }
            | Insn::LoadMapValue { dst, .. }
            | Insn::Load { dst, .. } => (dst, Known::Little),
            // States are compared behind a call, which is a join.
            Insn::Store { .. }
            | Insn::Ja { .. }
            | Insn::Jump { .. }
            | Insn::Call { .. }
            | Insn::CallKernel { .. }
            | Insn::Exit => continue,
        };
        known[usize::from(dst.number())] = becomes;
    }
    forks
}

/// Bytes of stack a program touches, counted from the frame pointer down.
pub fn stack_bytes(insns: &[(u32, Insn)]) -> usize {
    let mut deepest = 0i64;
    // Offset below the frame pointer that a register may hold, following moves and additions in program order.
    let mut offsets: [Option<i64>; 11] = [None; 11];
    offsets[usize::from(Reg::FP.number())] = Some(0);
    for (_, insn) in insns {
        match *insn {
            Insn::Load { base, off, dst, .. } => {
                if let Some(at) = offsets[usize::from(base.number())] {
                    deepest = deepest.min(at + i64::from(off));
                }
                offsets[usize::from(dst.number())] = None;
            }
            Insn::Store { base, off, .. } => {
                if let Some(at) = offsets[usize::from(base.number())] {
                    deepest = deepest.min(at + i64::from(off));
                }
            }
            Insn::Alu { width: Width::W64, op, dst, src } => {
                let before = offsets[usize::from(dst.number())];
                let after = match (op, src) {
                    (AluOp::Mov, Operand::Reg(src)) => offsets[usize::from(src.number())],
                    (AluOp::Add, Operand::Imm(imm)) => before.map(|at| at + i64::from(imm)),
                    (AluOp::Sub, Operand::Imm(imm)) => before.map(|at| at - i64::from(imm)),
                    _ => None,
                };
                offsets[usize::from(dst.number())] = after;
                deepest = deepest.min(after.unwrap_or(0));
            }
            Insn::Alu { dst, .. } | Insn::Neg { dst, .. } | Insn::Endian { dst, .. } => {
                offsets[usize::from(dst.number())] = None;
            }
            Insn::LoadImm64 { dst, .. } | Insn::LoadMap { dst, .. } | Insn::LoadMapValue { dst, .. } => {
                offsets[usize::from(dst.number())] = None;
            }
            Insn::Ja { .. }
            | Insn::Jump { .. }
            | Insn::Call { .. }
            | Insn::CallKernel { .. }
            | Insn::Exit => {}
        }
    }
    deepest.unsigned_abs() as usize
}
