//! BPF Type Format: a writer for what polc's objects carry and a reader for what comes back.
//!
//! BTF (Documentation/bpf/btf.rst, include/uapi/linux/btf.h) is a list of types, numbered from 1, and a string table.
//! An object needs it for two things: `.maps` is declared by it (each attribute of a map is the length of an array
//! type, as `__uint` in libbpf's bpf_helpers.h writes it), and `.BTF.ext` borrows its strings to name source lines.

use std::collections::HashMap;

pub(crate) const MAGIC: u16 = 0xeb9f;
pub(crate) const VERSION: u8 = 1;
/// Bytes of the headers of `.BTF` and `.BTF.ext`.
pub(crate) const HEADER_BYTES: u32 = 24;

pub(crate) const KIND_INT: u8 = 1;
pub(crate) const KIND_PTR: u8 = 2;
pub(crate) const KIND_ARRAY: u8 = 3;
pub(crate) const KIND_STRUCT: u8 = 4;
pub(crate) const KIND_UNION: u8 = 5;
pub(crate) const KIND_ENUM: u8 = 6;
pub(crate) const KIND_FWD: u8 = 7;
pub(crate) const KIND_FUNC: u8 = 12;
pub(crate) const KIND_FUNC_PROTO: u8 = 13;
pub(crate) const KIND_VAR: u8 = 14;
pub(crate) const KIND_DATASEC: u8 = 15;
pub(crate) const KIND_FLOAT: u8 = 16;
pub(crate) const KIND_DECL_TAG: u8 = 17;
pub(crate) const KIND_TYPE_TAG: u8 = 18;
pub(crate) const KIND_ENUM64: u8 = 19;

/// A growing `.BTF` section.
#[derive(Default)]
pub(crate) struct Builder {
    types: Vec<u8>,
    count: u32,
    strings: Vec<u8>,
    offsets: HashMap<String, u32>,
}

impl Builder {
    /// The offset of `text` in the string table; equal strings share one.
    pub(crate) fn string(&mut self, text: &str) -> u32 {
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        if text.is_empty() {
            return 0;
        }
        if let Some(&offset) = self.offsets.get(text) {
            return offset;
        }
        let offset = self.strings.len() as u32;
        self.strings.extend_from_slice(text.as_bytes());
        self.strings.push(0);
        self.offsets.insert(text.to_string(), offset);
        offset
    }

    /// Adds a type and gives its number.
    fn add(&mut self, name: &str, kind: u8, vlen: usize, size_or_type: u32, rest: &[u32]) -> u32 {
        let name = self.string(name);
        for word in [name, u32::from(kind) << 24 | vlen as u32, size_or_type].iter().chain(rest) {
            self.types.extend_from_slice(&word.to_le_bytes());
        }
        self.count += 1;
        self.count
    }

    /// A signed 32-bit integer.
    pub(crate) fn int(&mut self) -> u32 {
        self.add("int", KIND_INT, 0, 4, &[1 << 24 | 32])
    }

    /// A structure with members: name, type, and offset in bytes.
    pub(crate) fn struct_of(&mut self, name: &str, bytes: u32, members: &[(&str, u32, u32)]) -> u32 {
        let members: Vec<[u32; 3]> =
            members.iter().map(|&(member, of, offset)| [self.string(member), of, offset * 8]).collect();
        self.add(name, KIND_STRUCT, members.len(), bytes, members.as_flattened())
    }

    /// A pointer.
    pub(crate) fn ptr(&mut self, to: u32) -> u32 {
        self.add("", KIND_PTR, 0, to, &[])
    }

    /// An array; also how a map's attribute is written.
    pub(crate) fn array(&mut self, element: u32, index: u32, length: u32) -> u32 {
        self.add("", KIND_ARRAY, 0, 0, &[element, index, length])
    }

    /// A structure without members that anybody asks for. The kernel recognises contexts by their name.
    pub(crate) fn opaque_struct(&mut self, name: &str, bytes: u32) -> u32 {
        self.add(name, KIND_STRUCT, 0, bytes, &[])
    }

    /// A structure of pointers, one after the other.
    pub(crate) fn struct_of_ptrs(&mut self, members: &[(&str, u32)]) -> u32 {
        let members: Vec<(&str, u32, u32)> =
            members.iter().zip(0..).map(|(&(name, of), index)| (name, of, index * 8)).collect();
        self.struct_of("", members.len() as u32 * 8, &members)
    }

    /// A global variable.
    pub(crate) fn var(&mut self, name: &str, of: u32) -> u32 {
        self.add(name, KIND_VAR, 0, of, &[1])
    }

    /// A section of variables: `(var, offset, size)`, in bytes.
    pub(crate) fn datasec(&mut self, name: &str, size: u32, vars: &[[u32; 3]]) -> u32 {
        self.add(name, KIND_DATASEC, vars.len(), size, vars.as_flattened())
    }

    /// An unsigned integer of a number of bytes.
    pub(crate) fn unsigned(&mut self, name: &str, bytes: u32) -> u32 {
        self.add(name, KIND_INT, 0, bytes, &[bytes * 8])
    }

    /// A function's type: its result's, and name and type of each parameter.
    pub(crate) fn func_proto(&mut self, result: u32, params: &[(&str, u32)]) -> u32 {
        let params: Vec<[u32; 2]> = params.iter().map(|&(name, of)| [self.string(name), of]).collect();
        self.add("", KIND_FUNC_PROTO, params.len(), result, params.as_flattened())
    }

    /// A function with global linkage.
    pub(crate) fn func(&mut self, name: &str, proto: u32) -> u32 {
        self.add(name, KIND_FUNC, 1, proto, &[])
    }

    /// A function that the kernel has.
    pub(crate) fn extern_func(&mut self, name: &str, proto: u32) -> u32 {
        self.add(name, KIND_FUNC, 2, proto, &[])
    }

    /// The section's bytes.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.string("");
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        let mut out = header(&[0, types, types, strings]);
        out.extend_from_slice(&self.types);
        out.extend_from_slice(&self.strings);
        out
    }
}

/// The header that `.BTF` and `.BTF.ext` share: magic, version, flags, header length, then offsets and lengths, of which
/// the latter has two more if it relocates fields.
pub(crate) fn header(words: &[u32]) -> Vec<u8> {
    let mut out = MAGIC.to_le_bytes().to_vec();
    out.extend([VERSION, 0]);
    out.extend_from_slice(&(8 + 4 * words.len() as u32).to_le_bytes());
    words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
    out
}

/// One type as read: its head and the words after it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Type<'a> {
    pub(crate) name: &'a str,
    pub(crate) kind: u8,
    pub(crate) size_or_type: u32,
    rest: &'a [u8],
}

impl Type<'_> {
    /// The `index`th 32-bit word after the head.
    pub(crate) fn word(&self, index: usize) -> Option<u32> {
        word(self.rest, index * 4)
    }

    /// How many words follow the head.
    pub(crate) fn words(&self) -> usize {
        self.rest.len() / 4
    }
}

/// A parsed `.BTF` section.
pub(crate) struct Btf<'a> {
    types: Vec<Type<'a>>,
    strings: &'a [u8],
}

/// The little-endian 32-bit word at byte `at`.
pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// Checks the header of `.BTF` or `.BTF.ext` and gives the two parts it delimits.
pub(crate) fn parts(bytes: &[u8]) -> Result<[&[u8]; 2], String> {
    let bad = || "header is damaged".to_string();
    let [m0, m1, version, _flags, ..] = bytes else { return Err(bad()) };
    if u16::from_le_bytes([*m0, *m1]) != MAGIC || *version != VERSION {
        return Err(bad());
    }
    let header = word(bytes, 4).ok_or_else(bad)? as usize;
    if header < HEADER_BYTES as usize {
        return Err(bad());
    }
    let body = bytes.get(header..).ok_or_else(bad)?;
    let part = |at: usize| {
        let (offset, length) = (word(bytes, at)? as usize, word(bytes, at + 4)? as usize);
        body.get(offset..offset.checked_add(length)?)
    };
    Ok([part(8).ok_or_else(bad)?, part(16).ok_or_else(bad)?])
}

impl<'a> Btf<'a> {
    /// Parses a `.BTF` section.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Btf<'a>, String> {
        let [mut types, strings] = parts(bytes)?;
        let mut btf = Btf { types: Vec::new(), strings };
        while !types.is_empty() {
            let cut = || format!("type {} is cut off", btf.types.len() + 1);
            let head = [0, 4, 8].map(|at| word(types, at));
            let [Some(name), Some(info), Some(size_or_type)] = head else { return Err(cut()) };
            let (kind, vlen) = ((info >> 24) as u8 & 31, info as usize & 0xffff);
            let rest_bytes = match kind {
                KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                KIND_ARRAY => 12,
                KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12 * vlen,
                KIND_ENUM | KIND_FUNC_PROTO => 8 * vlen,
                KIND_PTR | KIND_FWD..=KIND_FUNC | KIND_FLOAT | KIND_TYPE_TAG => 0,
                _ => return Err(format!("type {} is of unknown kind {kind}", btf.types.len() + 1)),
            };
            let rest = types.get(12..12 + rest_bytes).ok_or_else(cut)?;
            let name = btf.string(name).ok_or_else(|| format!("type {} has no name", btf.types.len() + 1))?;
            btf.types.push(Type { name, kind, size_or_type, rest });
            types = &types[12 + rest_bytes..];
        }
        Ok(btf)
    }

    /// The string at `offset`.
    pub(crate) fn string(&self, offset: u32) -> Option<&'a str> {
        let bytes = self.strings.get(offset as usize..)?;
        let end = bytes.iter().position(|&byte| byte == 0)?;
        std::str::from_utf8(&bytes[..end]).ok()
    }

    /// The type numbered `id`, if it is of that kind.
    pub(crate) fn get(&self, id: u32, kind: u8) -> Option<Type<'a>> {
        let found = *self.types.get((id as usize).checked_sub(1)?)?;
        (found.kind == kind).then_some(found)
    }

    /// The section of that name.
    pub(crate) fn datasec(&self, name: &str) -> Option<Type<'a>> {
        self.types.iter().copied().find(|found| found.kind == KIND_DATASEC && found.name == name)
    }
}
