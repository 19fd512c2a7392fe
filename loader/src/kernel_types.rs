//! The running kernel's own types: where a field of a structure lies, and which number a function has.
//!
//! Programs at netfilter hooks read the kernel's structures directly and call its functions, and both differ from
//! kernel to kernel. The kernel describes itself in /sys/kernel/btf/vmlinux (Documentation/bpf/btf.rst); only what is
//! asked for is decoded. The bytes are the kernel's, and are still read with every length checked.

use std::fmt;
use std::fs;
use std::io;
use std::sync::OnceLock;

/// Where the kernel describes its types.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const HEADER_BYTES: usize = 24;

/// Kinds of types (include/uapi/linux/btf.h, `BTF_KIND_*`).
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const FUNC: u32 = 12;

/// Why the kernel's types are not known.
#[derive(Debug)]
pub enum KernelTypesError {
    /// The description can't be read: the kernel was built without `CONFIG_DEBUG_INFO_BTF`, or /sys is not mounted.
    Read(io::Error),
    /// It is not BTF.
    Malformed,
    /// There is no such structure, field or function.
    Missing(String),
}

impl fmt::Display for KernelTypesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KernelTypesError::Read(error) => write!(f, "cannot read {VMLINUX}: {error}"),
            KernelTypesError::Malformed => write!(f, "{VMLINUX} is not BTF"),
            KernelTypesError::Missing(what) => write!(f, "this kernel has no {what}"),
        }
    }
}

impl std::error::Error for KernelTypesError {}

/// The kernel's types.
#[derive(Clone)]
pub struct KernelTypes {
    bytes: Vec<u8>,
    /// Where each type's record begins; type 0 is `void` and has none.
    records: Vec<usize>,
    strings: usize,
}

impl fmt::Debug for KernelTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelTypes").field("types", &self.records.len()).finish_non_exhaustive()
    }
}

impl KernelTypes {
    /// The running kernel's: megabytes, which are read once.
    ///
    /// # Errors
    /// They can't be read.
    pub fn read() -> Result<&'static KernelTypes, KernelTypesError> {
        static RUNNING: OnceLock<KernelTypes> = OnceLock::new();
        if let Some(types) = RUNNING.get() {
            return Ok(types);
        }
        let types = KernelTypes::new(fs::read(VMLINUX).map_err(KernelTypesError::Read)?)?;
        Ok(RUNNING.get_or_init(|| types))
    }

    /// From the bytes of a description, in this machine's byte order.
    ///
    /// # Errors
    /// They are not BTF.
    pub fn new(bytes: Vec<u8>) -> Result<KernelTypes, KernelTypesError> {
        let malformed = KernelTypesError::Malformed;
        let mut types = KernelTypes { bytes, records: vec![0], strings: 0 };
        let header = |at| types.word(at).map(|word| word as usize);
        let (Some(first), Some(len), Some(from), Some(bytes), Some(strings)) =
            (types.word(0), header(4), header(8), header(12), header(16))
        else {
            return Err(malformed);
        };
        if first as u16 != MAGIC || len < HEADER_BYTES {
            return Err(malformed);
        }
        let (Some(mut at), Some(strings)) = (len.checked_add(from), len.checked_add(strings)) else {
            return Err(malformed);
        };
        let Some(end) = at.checked_add(bytes) else { return Err(malformed) };
        types.strings = strings;
        while at < end {
            let info = types.word(at + 4).ok_or(KernelTypesError::Malformed)?;
            types.records.push(at);
            at += record_bytes(info).ok_or(KernelTypesError::Malformed)?;
        }
        Ok(types)
    }

    fn word(&self, at: usize) -> Option<u32> {
        let bytes = self.bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    }

    fn is_named(&self, offset: u32, name: &str) -> bool {
        let from = self.strings.saturating_add(offset as usize);
        let found = self.bytes.get(from..).and_then(|rest| rest.get(..=name.len()));
        found.is_some_and(|found| found.starts_with(name.as_bytes()) && found.ends_with(&[0]))
    }

    /// Bytes from the start of `struct structure` to `field`, which may lie in unnamed structures within.
    ///
    /// # Errors
    /// There is no such structure or field, or the field does not begin at a byte.
    pub fn field_offset(&self, structure: &str, field: &str) -> Result<i16, KernelTypesError> {
        let missing = || KernelTypesError::Missing(format!("`{field}` in `struct {structure}`"));
        let root = self.records.iter().skip(1).find(|&&at| {
            let (Some(name), Some(info)) = (self.word(at), self.word(at + 4)) else { return false };
            kind(info) == STRUCT && info & 0xffff != 0 && self.is_named(name, structure)
        });
        // Structures within structures, with where they begin. The kernel's nest a few levels deep.
        let mut within = vec![(*root.ok_or_else(missing)?, 0u32)];
        let mut looked_at = 0;
        while let Some((at, base)) = within.pop() {
            looked_at += 1;
            let info = self.word(at + 4).ok_or(KernelTypesError::Malformed)?;
            for member in 0..(info & 0xffff) as usize {
                let record = at + 12 + 12 * member;
                let (Some(name), Some(of), Some(offset)) =
                    (self.word(record), self.word(record + 4), self.word(record + 8))
                else {
                    return Err(KernelTypesError::Malformed);
                };
                // With the flag, the upper byte is the width of a bit field.
                let bits = base + if info >> 31 == 1 { offset & 0x00ff_ffff } else { offset };
                if self.is_named(name, field) {
                    return match (bits % 8, i16::try_from(bits / 8)) {
                        (0, Ok(bytes)) => Ok(bytes),
                        _ => Err(missing()),
                    };
                }
                let inner = self.records.get(of as usize).copied().filter(|_| of != 0);
                let inner_info = inner.and_then(|at| self.word(at + 4));
                if let (true, Some(inner), Some(info)) = (self.is_named(name, ""), inner, inner_info)
                    && matches!(kind(info), STRUCT | UNION)
                    && looked_at < self.records.len()
                {
                    within.push((inner, bits));
                }
            }
        }
        Err(missing())
    }

    /// The type number of a function.
    ///
    /// # Errors
    /// There is no such function.
    pub fn function(&self, name: &str) -> Result<u32, KernelTypesError> {
        let found = self.records.iter().skip(1).position(|&at| {
            let (Some(offset), Some(info)) = (self.word(at), self.word(at + 4)) else { return false };
            kind(info) == FUNC && self.is_named(offset, name)
        });
        found
            .map(|index| index as u32 + 1)
            .ok_or_else(|| KernelTypesError::Missing(format!("function `{name}`")))
    }
}

fn kind(info: u32) -> u32 {
    info >> 24 & 0x1f
}

/// Bytes of a type's record; `None` for kinds that do not exist.
fn record_bytes(info: u32) -> Option<usize> {
    let count = (info & 0xffff) as usize;
    let rest = match kind(info) {
        // Pointer, forward, typedef, volatile, const, restrict, function, float, type tag.
        2 | 7..=12 | 16 | 18 => 0,
        // Integer, variable, declaration tag.
        1 | 14 | 17 => 4,
        // Array.
        3 => 12,
        STRUCT | UNION | 15 | 19 => 12 * count,
        6 | 13 => 8 * count,
        _ => return None,
    };
    Some(12 + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernels_types_are_read() {
        let Ok(types) = KernelTypes::read() else {
            eprintln!("skipped the_running_kernels_types_are_read: no {VMLINUX}");
            return;
        };
        // `dev` is in an unnamed structure in an unnamed union since Linux 4.20, and second of all pointers there.
        assert_eq!(types.field_offset("sk_buff", "next").ok(), Some(0));
        assert_eq!(types.field_offset("sk_buff", "dev").ok(), Some(16));
        assert!(types.field_offset("sk_buff", "no_such_field").is_err());
        assert!(types.function("ip_rcv").is_ok());
        assert!(types.function("no_such_function").is_err());
    }

    #[test]
    fn bytes_that_are_not_btf_are_refused() {
        for bytes in [vec![], vec![0x9f], vec![0x9f, 0xeb, 1, 0], vec![0xff; 64]] {
            assert!(matches!(KernelTypes::new(bytes), Err(KernelTypesError::Malformed)));
        }
    }
}
