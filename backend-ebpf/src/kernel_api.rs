//! What programs use of the running kernel itself: functions that they call by name, beside the numbered helpers.
//!
//! A helper has the same number in every kernel; a kernel function has the number of its type in the running kernel's
//! BTF (Documentation/bpf/kfuncs.rst). The instruction therefore holds 0 until it is loaded, [`crate::asm::Code`] lists
//! where which function is called, and an object names them as libbpf expects: undefined symbols, described in the BTF
//! section `.ksyms`.

use std::fmt;

/// A kernel function. The kernel lets programs under the GPL alone call them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KernelFunction {
    /// `bpf_xdp_ct_lookup`: the connection that a packet of this address and port pair belongs to, a reference the
    /// program owns, or NULL (net/netfilter/nf_conntrack_bpf.c).
    XdpCtLookup,
    /// `bpf_skb_ct_lookup`: the same for tc.
    SkbCtLookup,
    /// `bpf_ct_release`: gives a connection back.
    CtRelease,
}

/// A C type in a prototype.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CType {
    /// `void`, as a result.
    Void,
    /// `u32`.
    U32,
    /// A pointer to a structure.
    Struct(&'static str),
}

impl KernelFunction {
    /// All of them.
    pub const ALL: [KernelFunction; 3] =
        [KernelFunction::XdpCtLookup, KernelFunction::SkbCtLookup, KernelFunction::CtRelease];

    /// The kernel's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            KernelFunction::XdpCtLookup => "bpf_xdp_ct_lookup",
            KernelFunction::SkbCtLookup => "bpf_skb_ct_lookup",
            KernelFunction::CtRelease => "bpf_ct_release",
        }
    }

    /// The function of that name.
    pub fn from_name(name: &str) -> Option<KernelFunction> {
        KernelFunction::ALL.into_iter().find(|function| function.name() == name)
    }

    /// Result and parameters, each with its name. Kernels differ in the parameters' names, which nobody compares.
    pub(crate) const fn prototype(self) -> (CType, &'static [(&'static str, CType)]) {
        const LOOKUP: [(&str, CType); 4] = [
            ("bpf_tuple", CType::Struct("bpf_sock_tuple")),
            ("tuple__sz", CType::U32),
            ("opts", CType::Struct("bpf_ct_opts")),
            ("opts__sz", CType::U32),
        ];
        const XDP: [(&str, CType); 5] =
            [("ctx", CType::Struct("xdp_md")), LOOKUP[0], LOOKUP[1], LOOKUP[2], LOOKUP[3]];
        const SKB: [(&str, CType); 5] =
            [("ctx", CType::Struct("__sk_buff")), LOOKUP[0], LOOKUP[1], LOOKUP[2], LOOKUP[3]];
        match self {
            KernelFunction::XdpCtLookup => (CType::Struct("nf_conn"), &XDP),
            KernelFunction::SkbCtLookup => (CType::Struct("nf_conn"), &SKB),
            KernelFunction::CtRelease => (CType::Void, &[("ct", CType::Struct("nf_conn"))]),
        }
    }
}

/// What of the kernel's an instruction uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KernelItem {
    /// A call.
    Function(KernelFunction),
}

/// The kernel's name.
impl fmt::Display for KernelItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KernelItem::Function(function) => f.write_str(function.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for function in KernelFunction::ALL {
            assert_eq!(KernelFunction::from_name(function.name()), Some(function));
        }
        assert_eq!(KernelFunction::from_name("bpf_ct_insert_entry"), None);
    }
}
