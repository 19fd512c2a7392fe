//! The target extensions (`-j NAME`): one file each, one row each in the table at the end.
//!
//! ACCEPT, DROP, QUEUE, RETURN and jumps to chains are no extensions: see [`crate::ast::TargetVerdict`]. To add a
//! target, write `targets/NAME.rs` with a struct that implements [`crate::ext::Extension`], declare the module, and add
//! a row.

pub mod dnat;
pub mod log;
pub mod mark;
pub mod masquerade;
pub mod nat;
pub mod redirect;
pub mod reject;
pub mod snat;

crate::ext::extension_table! {
    /// A target extension with its options.
    enum TargetKind;
    /// A row of [`TARGETS`].
    struct TargetEntry;
    /// All target extensions.
    static TARGETS;
    Dnat(dnat::Dnat),
    Log(log::Log),
    Mark(mark::SetMark),
    Masquerade(masquerade::Masquerade),
    Redirect(redirect::Redirect),
    Reject4(reject::Reject4),
    Reject6(reject::Reject6),
    Snat(snat::Snat),
}
