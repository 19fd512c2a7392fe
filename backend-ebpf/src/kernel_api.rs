//! What programs use of the running kernel itself: functions that they call by name, beside the numbered helpers, and
//! fields of its structures.
//!
//! A helper has the same number in every kernel; a kernel function has the number of its type in the running kernel's
//! BTF (Documentation/bpf/kfuncs.rst). The instruction therefore holds 0 until it is loaded, [`crate::asm::Code`] lists
//! where which function is called, and an object names them as libbpf expects: undefined symbols, described in the BTF
//! section `.ksyms`.
//!
//! A field lies elsewhere in every kernel, too. Until it is loaded, an instruction holds the field's offset in the *local
//! layout*, which is this module's: the structures with only the members used here. The object's BTF describes them, so
//! that a loader finds the kernel's by name (CO-RE, Documentation/bpf/libbpf/libbpf_overview.rst), and the check VM lays
//! its own out in the same way.

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
    /// `bpf_dynptr_from_skb`: a handle to a packet's bytes, paged ones too, from the network header on at netfilter
    /// (net/core/filter.c).
    DynptrFromSkb,
}

/// A C type in a prototype.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CType {
    /// `void`, as a result.
    Void,
    /// `int`.
    Int,
    /// `u32`.
    U32,
    /// `u64`.
    U64,
    /// A pointer to a structure.
    Struct(&'static str),
}

impl KernelFunction {
    /// All of them.
    pub const ALL: [KernelFunction; 4] = [
        KernelFunction::XdpCtLookup,
        KernelFunction::SkbCtLookup,
        KernelFunction::CtRelease,
        KernelFunction::DynptrFromSkb,
    ];

    /// The kernel's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            KernelFunction::XdpCtLookup => "bpf_xdp_ct_lookup",
            KernelFunction::SkbCtLookup => "bpf_skb_ct_lookup",
            KernelFunction::CtRelease => "bpf_ct_release",
            KernelFunction::DynptrFromSkb => "bpf_dynptr_from_skb",
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
        const DYNPTR: [(&str, CType); 3] = [
            ("s", CType::Struct("__sk_buff")),
            ("flags", CType::U64),
            ("ptr__uninit", CType::Struct("bpf_dynptr")),
        ];
        match self {
            KernelFunction::XdpCtLookup => (CType::Struct("nf_conn"), &XDP),
            KernelFunction::SkbCtLookup => (CType::Struct("nf_conn"), &SKB),
            KernelFunction::CtRelease => (CType::Void, &[("ct", CType::Struct("nf_conn"))]),
            KernelFunction::DynptrFromSkb => (CType::Int, &DYNPTR),
        }
    }
}

/// A field of a structure of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelField {
    /// The structure's name.
    pub structure: &'static str,
    /// The field's.
    pub name: &'static str,
}

impl KernelField {
    /// Device that the packet came by, or null.
    pub const STATE_IN: KernelField = KernelField { structure: NF_HOOK_STATE, name: "in" };
    /// Device that it leaves by, or null.
    pub const STATE_OUT: KernelField = KernelField { structure: NF_HOOK_STATE, name: "out" };
    /// Length of the packet from the network header on, in bytes.
    pub const SKB_LEN: KernelField = KernelField { structure: SK_BUFF, name: "len" };
    /// The mark.
    pub const SKB_MARK: KernelField = KernelField { structure: SK_BUFF, name: "mark" };
    /// The byte whose lowest three bits are the packet's type (include/linux/skbuff.h, `PKT_TYPE_MAX`): bit fields have
    /// no offset of their own.
    pub const SKB_PACKET_TYPE: KernelField = KernelField { structure: SK_BUFF, name: "__pkt_type_offset" };
    /// Address of the packet's connection, above three bits that say what the packet is to it, `enum ip_conntrack_info`
    /// (include/linux/skbuff.h, `skb_get_nfct`).
    pub const SKB_CONNECTION: KernelField = KernelField { structure: SK_BUFF, name: "_nfct" };
    /// A device's number.
    pub const DEVICE_NUMBER: KernelField = KernelField { structure: NET_DEVICE, name: "ifindex" };

    /// Where the field is in the local layout.
    pub fn local_offset(self) -> i16 {
        self.place().2.offset
    }

    /// The structure, and which member of it the field is.
    pub(crate) fn place(self) -> (&'static Structure, usize, &'static Member) {
        let found = STRUCTURES.iter().find_map(|structure| {
            let member = structure.members.iter().position(|member| member.field == self)?;
            Some((structure, member, &structure.members[member]))
        });
        found.expect("every field's structure is described")
    }
}

/// A member's type in the local layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemberType {
    /// `u32`.
    U32,
    /// `unsigned long`.
    Long,
    /// `struct net_device *`.
    Device,
    /// `u8 [0]`: a place between other members.
    Place,
}

/// A member of a local structure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    pub(crate) field: KernelField,
    pub(crate) of: MemberType,
    pub(crate) offset: i16,
}

/// A structure in the local layout.
#[derive(Debug)]
pub(crate) struct Structure {
    pub(crate) name: &'static str,
    pub(crate) bytes: u32,
    pub(crate) members: &'static [Member],
}

const NF_HOOK_STATE: &str = "nf_hook_state";
const SK_BUFF: &str = "sk_buff";
const NET_DEVICE: &str = "net_device";

const fn member(field: KernelField, of: MemberType, offset: i16) -> Member {
    Member { field, of, offset }
}

/// The local layout. What is pointed to comes before what points.
pub(crate) static STRUCTURES: [Structure; 3] = [
    Structure {
        name: NET_DEVICE,
        bytes: 4,
        members: &[member(KernelField::DEVICE_NUMBER, MemberType::U32, 0)],
    },
    Structure {
        name: NF_HOOK_STATE,
        bytes: 16,
        members: &[
            member(KernelField::STATE_IN, MemberType::Device, 0),
            member(KernelField::STATE_OUT, MemberType::Device, 8),
        ],
    },
    Structure {
        name: SK_BUFF,
        bytes: 24,
        members: &[
            member(KernelField::SKB_LEN, MemberType::U32, 0),
            member(KernelField::SKB_MARK, MemberType::U32, 4),
            member(KernelField::SKB_PACKET_TYPE, MemberType::Place, 8),
            member(KernelField::SKB_CONNECTION, MemberType::Long, 16),
        ],
    },
];

/// What of the kernel's an instruction uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KernelItem {
    /// A call.
    Function(KernelFunction),
    /// A load at a field's offset.
    Field(KernelField),
}

impl KernelItem {
    /// The item whose text this is.
    pub fn from_text(text: &str) -> Option<KernelItem> {
        let fields = STRUCTURES.iter().flat_map(|structure| structure.members);
        fields
            .map(|member| KernelItem::Field(member.field))
            .chain(KernelFunction::ALL.map(KernelItem::Function))
            .find(|item| item.to_string() == text)
    }
}

/// The kernel's name: `bpf_dynptr_from_skb`, `sk_buff.len`.
impl fmt::Display for KernelItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KernelItem::Function(function) => f.write_str(function.name()),
            KernelItem::Field(field) => write!(f, "{}.{}", field.structure, field.name),
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

    #[test]
    fn the_local_layout_holds_every_field_once_and_in_order() {
        for structure in &STRUCTURES {
            let mut end = 0;
            for (index, member) in structure.members.iter().enumerate() {
                let bytes = match member.of {
                    MemberType::U32 => 4,
                    MemberType::Device | MemberType::Long => 8,
                    MemberType::Place => 0,
                };
                assert!(i32::from(member.offset) >= end, "{member:?}");
                end = i32::from(member.offset) + bytes;
                let (found, at, _) = member.field.place();
                assert_eq!((found.name, at), (member.field.structure, index));
                let item = KernelItem::Field(member.field);
                assert_eq!(KernelItem::from_text(&item.to_string()), Some(item));
            }
            assert!(end <= structure.bytes as i32);
        }
    }
}
