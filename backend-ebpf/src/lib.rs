//! From polc's plans to standard BPF object files, and the userspace machine that checks them.
//!
//! Words: an *instruction* takes one or two *slots* of 64 bits; a *label* is a place a jump can name; a *relocation*
//! is an instruction that needs a map's address when the program is loaded; a *map* is a table the kernel keeps for
//! a program, and a *direct value* is a byte in a map that code addresses without a lookup; an *object* is the ELF
//! file that holds programs, maps and what is known about both.
//!
//! The rooms, from the ground up: [`insn`] is the instruction set, [`kernel_api`] the kernel functions that programs may
//! call, [`asm`] turns instructions and labels into
//! position-fixed code, [`object`] turns code and maps into one ELF file and back, [`disasm`] prints it, [`vm`] runs it
//! without a kernel, [`budget`] says whether the kernel's verifier will accept it, and [`kernel_api`] is what programs use
//! of the kernel beyond helpers. [`emit`] makes
//! a plan an object, under the contract that [`abi`] writes down; what its programs report of packets is [`trace`]'s. Start with [`emit::emit`], or from below with
//! [`asm::Asm`].

pub mod abi;
pub mod asm;
mod btf;
pub mod budget;
pub mod debug_info;
pub mod disasm;
mod elf;
pub mod emit;
pub mod insn;
pub mod kernel_api;
pub mod manifest;
pub mod object;
pub mod trace;
pub mod vm;
