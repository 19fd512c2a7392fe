//! Makes a running kernel agree with a polc object, and takes it back.
//!
//! For whoever applies policies from a program; the command line is one such. This crate knows objects only: what a
//! rule is stays above it. Start with [`swap::apply`]; [`load::load`] is for programs that are to run without being
//! attached.
//!
//! | room | what it owns |
//! | --- | --- |
//! | [`sys`] | every call to the kernel, the only `unsafe` code here, with a hook at which tests let calls fail |
//! | [`probe`] | what the running kernel can do |
//! | [`net`] | devices and the host's addresses |
//! | [`load`] | an object into the kernel |
//! | [`attach`], [`clsact`], [`dispatch`] | a program onto its attach point, off it, and in place of another |
//! | [`coexist`] | others' programs |
//! | [`state`] | what is kept about applied policies |
//! | [`store`] | where: on disk and in bpffs, and the locks |
//! | [`swap`] | applying |
//! | [`confirm`] | keeping what was applied to be confirmed |
//! | [`flush`] | taking policies away |
//! | [`repair`] | making a slot whole again |
//! | [`held`] | going back when nobody confirms, whatever became of files and pins |
//! | [`carry`] | counters over generations |
//! | [`gone`] | what is kept of network namespaces that are gone |
//! | [`status`] | reading back what is applied |
//! | [`counters`], [`events`] | packets by rule, packets as they are decided |
//! | [`wish`] | whose packets a watcher wants, over generations |
//! | [`jited`] | a loaded program's code, beside the rules it comes from |
//! | [`tables`] | contents of maps |
//! | [`sets`] | elements of an applied policy's sets |
//! | [`kernel_types`] | where the kernel's own structures have their fields |
//! | [`netfilter`] | the kernel's own packet filter in a namespace of its own, asked what it does with packets |
//! | [`error`] | why not, and what to do |

pub mod attach;
pub mod carry;
pub mod clsact;
pub mod coexist;
pub mod confirm;
pub mod counters;
pub mod dispatch;
pub mod error;
pub mod events;
pub mod flush;
pub mod gone;
pub mod held;
pub mod jited;
pub mod kernel_types;
pub mod load;
pub mod net;
pub mod netfilter;
pub mod nft;
pub mod probe;
pub mod repair;
pub mod sets;
pub mod state;
pub mod status;
pub mod store;
pub mod swap;
pub mod sys;
pub mod tables;
pub mod wish;

pub use error::Error;
