//! Every bound of polc, by name.
//!
//! A bound exists so that no input can exhaust memory or time. Each is well above the largest real input measured
//! (42,622 rules, 14,452 chains, nesting to 7, lines of 427 bytes) and each has a diagnostic and a test at its edge.
//! Suffixes give the unit.

/// Largest source file, in bytes.
pub const FILE_BYTES_MAX: usize = 256 << 20;

/// Longest line of a dump, in bytes. iptables-restore reads lines into a buffer of 10,240 bytes
/// (iptables/iptables-restore.c).
pub const LINE_BYTES_MAX: usize = 10_239;

/// Longest word of a rule line, unquoted, in bytes: iptables-restore collects words in a buffer of 1,024 bytes
/// (iptables/xshared.c, `add_param`).
pub const WORD_BYTES_MAX: usize = 1_023;

/// Most words of a rule line: iptables-restore's argument list holds 255 entries, of which the program's name, the
/// table and the terminator take four (iptables/xshared.h, `MAX_ARGC`).
pub const WORDS_MAX: usize = 251;

/// Most chains in one dump.
pub const CHAINS_MAX: usize = 1 << 20;

/// Most rules in one dump, after address lists are expanded. What is read of a rule takes about 0.6 KB without matches and
/// 2.5 KB with three, text, syntax and meaning together.
pub const RULES_MAX: usize = 1 << 19;

/// Most matches in one dump, those of each rule that an address list makes counted: one line can make a quarter of a
/// million rules of a hundred matches. A match takes about 0.5 KB.
pub const MATCHES_MAX: usize = 2 << 20;

/// Most diagnostics kept for one file; the rest are counted in one closing note.
pub const DIAGNOSTICS_MAX: usize = 1_000;

/// Longest chain name, in bytes: `XT_EXTENSION_MAXNAMELEN - 1` less the terminating NUL, which
/// iptables refuses to reach (include/uapi/linux/netfilter/x_tables.h).
pub const CHAIN_NAME_BYTES_MAX: usize = 28;

/// Deepest chain of jumps followed: the deepest path through a loop-free rule set.
pub const JUMP_DEPTH_MAX: usize = 1_024;

/// Most chains that nf_tables lets a packet be in at once, the base chain among them (include/net/netfilter/nf_tables.h,
/// `NFT_JUMP_STACK_SIZE`).
pub const NFT_JUMP_DEPTH_MAX: usize = 16;

/// Most rules of a table that a packet may be tried against, if every jump is taken: eight times as many as a dump may
/// have. Chains that are jumped to more than once multiply: 60 of them, each jumped to twice by the one before, hold a
/// packet longer than anybody waits, in the kernel and in `Ruleset::eval`.
pub const RULES_PASSED_MAX: u64 = 8 * RULES_MAX as u64;

/// Most elements in one set.
pub const SET_ELEMENTS_MAX: usize = 4 << 20;

/// Most conjunctions one rule may expand to (`multiport --ports` is a disjunction of two).
pub const RULE_CUBES_MAX: usize = 64;

/// Most entries of a classifier, as a multiple of the rules it was made from, plus [`ENTRIES_BASE`].
pub const ENTRIES_PER_RULE_MAX: usize = 8;

/// Entries any classifier may have, however few its rules.
pub const ENTRIES_BASE: usize = 65_536;

/// Most entries of a classifier, however many its rules. An entry takes some 700 bytes while it is compiled, so that is
/// a gigabyte and a half.
pub const CLASSIFIER_ENTRIES_MAX: usize = 2 << 20;

/// Most instructions of one emitted program. A jump reaches 32,767 instructions either way, and rbpf's
/// interpreter can't follow longer ones.
pub const PROGRAM_INSNS_MAX: usize = 32_767;

/// Instructions the kernel's verifier processes before it gives up (kernel/bpf/verifier.c,
/// `BPF_COMPLEXITY_LIMIT_INSNS`).
pub const VERIFIER_PROCESSED_MAX: usize = 1_000_000;

/// Pending jumps the kernel's verifier remembers (kernel/bpf/verifier.c, `BPF_COMPLEXITY_LIMIT_JMP_SEQ`).
pub const VERIFIER_PENDING_JUMPS_MAX: usize = 8_192;

/// Bytes of stack a BPF program has (include/linux/filter.h, `MAX_BPF_STACK`).
pub const STACK_BYTES_MAX: usize = 512;

/// Longest name of a program or map that the kernel keeps, in bytes (include/uapi/linux/bpf.h, `BPF_OBJ_NAME_LEN` less
/// the NUL).
pub const BPF_NAME_BYTES_MAX: usize = 15;

/// Largest data map of an object, in bytes: as far as direct values reach (include/linux/bpf_verifier.h,
/// `BPF_MAX_VAR_SIZ`).
pub const OBJECT_DATA_BYTES_MAX: usize = 1 << 29;

/// Most zeros the `.bss` section of an object may stand for, in bytes: a small file must not make a reader allocate
/// much.
pub const OBJECT_BSS_BYTES_MAX: usize = 16 << 20;

/// Most bytes of type information, its strings included, that the kernel takes (include/uapi/linux/btf.h,
/// `BTF_MAX_SIZE`).
pub const BTF_BYTES_MAX: usize = 16 << 20;

/// Most bytes of a source line's text in an object; what is longer is cut. 32,767 different lines of one program stay
/// well below [`BTF_BYTES_MAX`].
pub const OBJECT_LINE_TEXT_BYTES_MAX: usize = 240;

/// Largest source line number in an object, larger ones become it: 22 bits (include/uapi/linux/bpf.h,
/// `BPF_LINE_INFO_LINE_NUM`).
pub const OBJECT_LINE_NUMBER_MAX: u32 = (1 << 22) - 1;

/// Most bytes that the maps of an object may take in the check VM.
pub const VM_MAP_BYTES_MAX: usize = 1 << 30;

/// Longest packet that the check VM takes, in bytes: the longest IP packet with room for link headers.
pub const VM_PACKET_BYTES_MAX: usize = 65_535 + 256;

/// Most words of a program's key: more do not fit the stack beside what a program keeps there.
pub const KEY_WORDS_MAX: usize = 96;

/// The same for programs at netfilter hooks, which also keep a handle to the packet on their stack.
pub const NETFILTER_KEY_WORDS_MAX: usize = 64;

/// Most turns of a walk's loop that a packet may take. The verifier follows the loop turn by turn, about 630
/// instructions of [`VERIFIER_PROCESSED_MAX`] each.
pub const WALK_TURNS_MAX: u32 = 1_000;

/// Largest device number that objects tell apart.
pub const DEVICE_NUMBER_MAX: u32 = 65_535;

/// Most IPv6 extension headers a program follows. The verifier processes about 1,800 instructions for each.
pub const IPV6_EXT_HEADERS_MAX: u32 = 48;

/// Most DCCP options that a search follows; a packet with more is left to the kernel. A header has room for 1,008 bytes
/// of them, of which a stack that negotiates every feature uses about ten options.
pub const DCCP_OPTIONS_MAX: u32 = 128;

/// Most SCTP chunks that a search follows; a packet with more is left to the kernel.
pub const SCTP_CHUNKS_MAX: u32 = 64;

/// Turns of a walk that the compiler plans with: it counts cautiously, and leaves room for what a turn may add.
pub const WALK_TURNS_CAUTIOUS: u32 = 900;

/// Longest log that is asked of the kernel's verifier, in bytes.
pub const VERIFIER_LOG_BYTES_MAX: usize = 1 << 24;

/// Most operations of one look-up step: each becomes up to five instructions of a program's 32,767.
pub const LOOKUP_OPS_MAX: usize = 4_096;

/// Most levels of a set's table: combinations of prefix lengths, up to six neighbouring lengths being one. A cell names
/// its level in five bits, of which 0 says that there is no cell.
pub const SET_LEVELS_MAX: usize = 31;

/// Most cells of one set's table: as many as elements may be in a set, with room.
pub const SET_CELLS_MAX: usize = 8 << 20;
