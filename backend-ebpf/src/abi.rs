//! The contract inside an emitted program: which register holds what, where things are on the stack, and how the
//! records of its tables are laid out.
//!
//! Every part of the generator follows this page and nothing else, so that parts can be read one at a time.
//!
//! | register | headers | steps | walk |
//! | --- | --- | --- | --- |
//! | `r0`-`r5` | scratch | scratch | scratch |
//! | `r6` | the context, always | same | same |
//! | `r7` | frame start, not at netfilter; then IPv6 header offset | into the tables of look-up steps | reference being followed |
//! | `r8` | frame end, not at netfilter; then IPv6 next header | free | exit record, or counter slot |
//! | `r9` | network header, then transport header | free | turns taken, or return code |
//!
//! At netfilter there is no frame to point into: headers are copied to the buffer on the stack, where `r9` points.
//!
//! To end, code puts the counter slot in `r8` and the return code in `r9` and goes to the one place that counts.
//!
//! The stack holds the key, words in the CPU's own byte order, and below [`SCRATCH_BYTES`] of named places. The
//! verifier follows what is stored at a multiple of eight bytes and forgets what is stored elsewhere
//! (kernel/bpf/verifier.c, `check_stack_write_fixed_off`). Numbers that would multiply the verifier's states by their
//! possible values are therefore kept at odd multiples of four: reading them back gives "any 32 bits", and paths that
//! differ in nothing else become one. The key's words are kept in the same way, one in eight bytes, as long as there is
//! room for that; those of larger keys are made to be forgotten once the headers are read, and each that is found later
//! when it is.
//!
//! A zero that only some paths store comes from a number that is zero without the verifier's knowledge: it tells memory
//! that is zero from other memory, wherever it is. For the same reason pointers into the packet, which carry how many VLAN
//! tags were passed, are not kept over a loop: offsets are.

use polc_ir::limits::KEY_WORDS_MAX;

use crate::insn::Reg;

/// The context.
pub const CTX: Reg = Reg::R6;

/// Length of the packet from the network header on, in bytes; before there is one, of the frame behind its Ethernet
/// header. What counters add.
pub const LENGTH: i16 = -4;
/// A counter's key, for the map lookup.
pub const COUNTER_KEY: i16 = -12;
/// Offset of the network header in the frame.
pub const L3_OFFSET: i16 = -20;
/// Offset of the transport header from the network header.
pub const L4_OFFSET: i16 = -28;
/// Readable bytes from the transport header on.
pub const L4_LENGTH: i16 = -36;
/// Walk: the reference to follow once the current one came to an exit; [`NONE`] if there is none.
pub const PENDING: i16 = -44;
/// Before the walk: the transport protocol, where derived words need it.
pub const PROTOCOL: i16 = PENDING;
/// Walk: the smallest exit found so far, as a reference.
pub const BEST: i16 = -52;
/// Before the walk: where a header that was searched for is.
pub const FOUND: i16 = BEST;
/// Walk: where code hands over the first reference. Searches in headers: how far they are.
pub const HANDOVER: i16 = -60;
/// Bytes copied from the packet.
pub const BUFFER: i16 = -112;
/// How many bytes [`BUFFER`] has.
pub const BUFFER_BYTES: i16 = 48;
/// Reporting a packet: it is decided, so all places but [`LENGTH`] and [`COUNTER_KEY`] are free.
pub mod trace {
    /// The return code.
    pub const RETURN: i16 = super::L3_OFFSET;
    /// The record, [`crate::trace::record::BYTES`] long.
    pub const RECORD: i16 = super::BUFFER;
    /// Bytes of the frame, up to [`SCRATCH_BYTES`].
    pub const SCRATCH: i16 = RECORD + crate::trace::record::BYTES as i16;
    /// How many bytes [`SCRATCH`] has.
    pub const SCRATCH_BYTES: i16 = 16;
}

/// Bytes of a handle to a packet (include/uapi/linux/bpf.h, `struct bpf_dynptr`), which programs at netfilter hooks keep
/// below the key.
pub const DYNPTR_BYTES: i16 = 16;

/// Bytes of stack above the key. With the largest key 16 bytes are left at the stack's end, where the check VM keeps its
/// watch over loops.
pub const SCRATCH_BYTES: i16 = 112;

/// Words of a key up to which each has eight bytes of its own.
const SPARSE_WORDS_MAX: usize = 32;

/// Where the key's words are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyLayout {
    /// Words the stack has room for: a power of two up to 64, or 96.
    words: u16,
}

impl KeyLayout {
    /// Room for `words` words, at most [`KEY_WORDS_MAX`]; `None` if there are more.
    pub fn new(words: usize) -> Option<KeyLayout> {
        match words {
            0..=64 => Some(KeyLayout { words: words.next_power_of_two().max(2) as u16 }),
            65..=KEY_WORDS_MAX => Some(KeyLayout { words: KEY_WORDS_MAX as u16 }),
            _ => None,
        }
    }

    /// How many words there is room for.
    pub fn words(self) -> u16 {
        self.words
    }

    /// Whether each word is at an odd multiple of four, where the verifier does not follow it.
    pub fn sparse(self) -> bool {
        usize::from(self.words) <= SPARSE_WORDS_MAX
    }

    /// Bytes from a word to the next.
    pub fn stride(self) -> i16 {
        if self.sparse() { 8 } else { 4 }
    }

    /// Stack offset of the first of all the bytes, a multiple of eight.
    pub fn base(self) -> i16 {
        -SCRATCH_BYTES - self.stride() * self.words as i16
    }

    /// Stack offset of a word.
    pub fn word(self, word: u8) -> i16 {
        self.base() + self.stride() - 4 + self.stride() * i16::from(word)
    }

    /// Stack offset of the handle to the packet.
    pub fn dynptr(self) -> i16 {
        self.base() - DYNPTR_BYTES
    }

    /// Whether word offsets in tables are in two parts, see [`KeyLayout::table_offset`].
    pub fn split(self) -> bool {
        self.words > 64
    }

    /// How tables name a word: its offset in bytes from word 0. With [`KeyLayout::split`] bit 8 stands for 128 more, so
    /// that two masks bound it.
    pub fn table_offset(self, word: u8) -> u32 {
        let offset = self.stride() as u32 * u32::from(word);
        if self.split() && word >= 64 { (offset - 128) | 256 } else { offset }
    }
}

/// Bit of a table reference that marks all but tests: exits, forks and "none". The lower bits are an index into the
/// table, where each of these has a record too.
pub const EXIT_BIT: u32 = 1 << 31;
/// Bit set in references to nodes, tests and forks alike. It also keeps every reference from being 0: the verifier
/// would follow a stored 0.
pub const NODE_BIT: u32 = 1 << 30;
/// The reference to nothing. Larger than every reference to an exit. Its record is the table's last.
pub const NONE: u32 = u32::MAX;

/// Bytes of a record of a walk node or exit.
pub const RECORD_BYTES: usize = 32;
/// log2 of [`RECORD_BYTES`].
pub const RECORD_SHIFT: i32 = 5;

/// A node's record, in bytes from its start; all words are 32 bits in the CPU's own order. A node tests
/// `(key[WORD] & MASK) - LO <= SPAN`. Records of exits, forks and "none" have a test that always holds and leads to
/// themselves, so that taking a step there does nothing.
pub mod node {
    /// Reference to follow if the test holds.
    pub const YES: i16 = 0;
    /// Reference to follow if not. For a fork: what is decided first.
    pub const NO: i16 = 4;
    /// Bits of the word that count.
    pub const MASK: i16 = 8;
    /// Smallest value that holds.
    pub const LO: i16 = 12;
    /// Largest value that holds, less the smallest.
    pub const SPAN: i16 = 16;
    /// The word, by [`super::KeyLayout::table_offset`].
    pub const WORD: i16 = 20;
    /// For a fork: what is decided then.
    pub const REST: i16 = 24;
}

/// An exit's record, likewise.
pub mod exit {
    /// What it does: one of the numbers below.
    pub const KIND: i16 = 0;
    /// End: the counter slot. Others: the reference to go on with (tests: if they hold).
    pub const NEXT: i16 = 4;
    /// End: the return code. Count: the counter slot. Tests: the reference to go on with, if it does not hold.
    pub const OTHER: i16 = 8;
    /// Random: the probability. Nth: the number at which it holds.
    pub const PARAMETER: i16 = 12;
    /// Nth: offset of the counter.
    pub const STATE: i16 = 16;
    /// Write: the word of the first of two changes, by [`super::KeyLayout::table_offset`]; then bits to clear, and bits
    /// to invert.
    pub const WRITE: i16 = 8;
    /// Bytes of a change.
    pub const WRITE_BYTES: i16 = 12;
    /// How many changes a record has room for. Those of a longer list go on in further records.
    pub const WRITES: usize = 2;

    /// Count and return.
    pub const END: u32 = 0;
    /// Change words and go on.
    pub const THEN: u32 = 1;
    /// Draw a random number.
    pub const RANDOM: u32 = 2;
    /// Count packets and let every nth through.
    pub const NTH: u32 = 3;
    /// Add the packet to a counter slot and go on.
    pub const COUNT: u32 = 4;
}

/// In place of a return code: the packet is dropped and counted in the slot of `r8` if it has no connection, and let on
/// and counted in the next otherwise. No program returns it.
pub const CONFIRM: i32 = 0x1_0000;

/// Asking the kernel for a connection: the packet is decided, so [`BUFFER`] is free.
pub mod lookup {
    /// `struct bpf_sock_tuple` (include/uapi/linux/bpf.h): addresses, then ports, in network order.
    pub const TUPLE: i16 = super::BUFFER;
    /// Its bytes for IPv4.
    pub const TUPLE_V4_BYTES: i16 = 12;
    /// Its bytes for IPv6.
    pub const TUPLE_V6_BYTES: i16 = 36;
    /// `struct bpf_ct_opts` (net/netfilter/nf_conntrack_bpf.c): network namespace, error, then protocol and direction.
    pub const OPTS: i16 = TUPLE + TUPLE_V6_BYTES;
    /// Its bytes in every kernel that has it; newer ones have a zone behind.
    pub const OPTS_BYTES: i16 = 12;
    /// Offset of the error in it.
    pub const OPTS_ERROR: i16 = 4;
    /// Offset of the protocol in it.
    pub const OPTS_PROTOCOL: i16 = 8;
    /// The error of a table without such a connection (include/uapi/asm-generic/errno-base.h).
    pub const ENOENT: i32 = 2;
}

/// Return codes of XDP programs (include/uapi/linux/bpf.h, `enum xdp_action`).
pub mod xdp {
    /// Drop the frame.
    pub const DROP: i32 = 1;
    /// Let it on.
    pub const PASS: i32 = 2;
}

/// Return codes of tc programs (include/uapi/linux/pkt_cls.h).
pub mod tc {
    /// Drop the packet.
    pub const SHOT: i32 = 2;
    /// Go on with the next filter or program, and let the packet on if there is none (tcx: `TCX_NEXT`). `TC_ACT_OK`
    /// would keep other programs from seeing it.
    pub const UNSPEC: i32 = -1;
}

/// Return codes of netfilter programs (include/uapi/linux/netfilter.h).
pub mod netfilter {
    /// Drop the packet.
    pub const DROP: i32 = 0;
    /// Go on with the next function of the hook.
    pub const ACCEPT: i32 = 1;
}

/// Offsets of the netfilter context (include/net/netfilter/nf_bpf_link.h, `struct bpf_nf_ctx`).
pub mod nf_ctx {
    /// Pointer to `struct nf_hook_state`.
    pub const STATE: i16 = 0;
    /// Pointer to `struct sk_buff`.
    pub const SKB: i16 = 8;
}

/// Offsets of the XDP context (include/uapi/linux/bpf.h, `struct xdp_md`).
pub mod xdp_md {
    /// Start of the frame.
    pub const DATA: i16 = 0;
    /// End of the frame.
    pub const DATA_END: i16 = 4;
    /// Number of the receiving device.
    pub const INGRESS_IFINDEX: i16 = 12;
}

/// Offsets of the tc context (include/uapi/linux/bpf.h, `struct __sk_buff`).
pub mod sk_buff {
    /// Length of the frame.
    pub const LEN: i16 = 0;
    /// `PACKET_*`.
    pub const PKT_TYPE: i16 = 4;
    /// The mark.
    pub const MARK: i16 = 8;
    /// Whether a VLAN tag was taken out.
    pub const VLAN_PRESENT: i16 = 20;
    /// That tag.
    pub const VLAN_TCI: i16 = 24;
    /// Number of the device by which the packet came to the host; 0 for the host's own.
    pub const INGRESS_IFINDEX: i16 = 36;
    /// Number of the device the program runs for.
    pub const IFINDEX: i16 = 40;
    /// Start of the part of the frame that can be read directly.
    pub const DATA: i16 = 76;
    /// End of that part.
    pub const DATA_END: i16 = 80;
}

#[cfg(test)]
mod tests {
    use super::*;
    use polc_ir::limits::NETFILTER_KEY_WORDS_MAX;

    #[test]
    fn keys_fit_the_stack() {
        for words in 0..=KEY_WORDS_MAX {
            let layout = KeyLayout::new(words).unwrap();
            assert!(usize::from(layout.words()) >= words);
            assert!(-layout.base() as usize + 16 <= polc_ir::limits::STACK_BYTES_MAX);
            assert_eq!(layout.base() % 8, 0);
            assert_eq!(layout.word(0).rem_euclid(8), if layout.sparse() { 4 } else { 0 });
            for word in 0..words as u8 {
                let named = layout.table_offset(word);
                let masked = if layout.split() { (named & 252) + (named >> 1 & 128) } else { named };
                assert_eq!(masked as i16, layout.word(word) - layout.word(0));
            }
        }
        assert_eq!(KeyLayout::new(KEY_WORDS_MAX + 1), None);
        let widest = KeyLayout::new(NETFILTER_KEY_WORDS_MAX).unwrap();
        assert!(-widest.dynptr() as usize + 16 <= polc_ir::limits::STACK_BYTES_MAX);
        assert_eq!(widest.dynptr() % 8, 0);
    }

    #[test]
    fn places_do_not_overlap_and_are_forgotten_by_the_verifier() {
        let mut places = [LENGTH, COUNTER_KEY, L3_OFFSET, L4_OFFSET, L4_LENGTH, PENDING, BEST, HANDOVER];
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] >= 4));
        assert!(places.iter().all(|place| place.rem_euclid(8) == 4));
        assert!(BUFFER + BUFFER_BYTES <= places[0]);
        const {
            assert!(SCRATCH_BYTES == -BUFFER);
            assert!(lookup::OPTS + lookup::OPTS_BYTES <= BUFFER + BUFFER_BYTES && lookup::OPTS % 4 == 0);
            assert!(trace::SCRATCH + trace::SCRATCH_BYTES <= trace::RETURN && trace::RECORD % 8 == 0);
        };
    }
}
