//! The match extensions (`-m NAME`): one file each, one row each in the table at the end.
//!
//! To add one, write `matches/NAME.rs` with a struct that implements [`crate::ext::Extension`], declare the module, and
//! add a row. Nothing else in this crate has to know.

pub mod addrtype;
pub mod comment;
pub mod conntrack;
pub mod icmp;
pub mod icmp6;
pub mod limit;
pub mod mark;
pub mod multiport;
pub mod set;
pub mod state;
pub mod tcp;
pub mod udp;

crate::ext::extension_table! {
    /// A match extension with its options.
    enum MatchKind;
    /// A row of [`MATCHES`].
    struct MatchEntry;
    /// All match extensions.
    static MATCHES;
    Addrtype(addrtype::Addrtype),
    Comment(comment::Comment),
    Conntrack(conntrack::Conntrack),
    Icmp(icmp::Icmp),
    Icmp6(icmp6::Icmp6),
    Limit(limit::Limit),
    Mark(mark::Mark),
    Multiport(multiport::Multiport),
    Set(set::Set),
    State(state::State),
    Tcp(tcp::Tcp),
    Udp(udp::Udp),
}
