//! What the crate's tests ask from outside: of objects, of programs under rbpf, and of the kernel.

mod budget;
mod common;
mod derived;
mod emit;
mod loaders;
mod object;
mod trace;
mod vm;
