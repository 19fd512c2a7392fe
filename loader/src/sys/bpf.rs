//! `bpf(2)`: the commands that polc needs, each as a function with checked types.
//!
//! The structures follow `union bpf_attr` and the `bpf_*_info` structures of include/uapi/linux/bpf.h (Linux 6.18).
//! The kernel takes a shorter structure than its own, with zeros for the rest, and a longer one if what it does not
//! know is zero (kernel/bpf/syscall.c, `bpf_check_uarg_tail_zero`), so each command passes only the fields it uses.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use polc_ir::limits::BPF_NAME_BYTES_MAX;

use super::{Sys, checked, without_signals};

mod dump;
mod iter;
mod test_run;

pub use dump::{LineInfo, ProgramCode};
pub use test_run::{LiveFrames, TestRun, TestRunResult};

const MAP_CREATE: i32 = 0;
const MAP_LOOKUP_ELEM: i32 = 1;
const MAP_UPDATE_ELEM: i32 = 2;
const MAP_DELETE_ELEM: i32 = 3;
const MAP_GET_NEXT_KEY: i32 = 4;
const PROG_LOAD: i32 = 5;
const OBJ_PIN: i32 = 6;
const OBJ_GET: i32 = 7;
const PROG_GET_FD_BY_ID: i32 = 13;
const MAP_GET_FD_BY_ID: i32 = 14;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const PROG_QUERY: i32 = 16;
const BTF_LOAD: i32 = 18;
const MAP_FREEZE: i32 = 22;
const MAP_LOOKUP_BATCH: i32 = 24;
const MAP_UPDATE_BATCH: i32 = 26;
const LINK_CREATE: i32 = 28;
const LINK_UPDATE: i32 = 29;
const LINK_GET_FD_BY_ID: i32 = 30;
const LINK_GET_NEXT_ID: i32 = 31;
const LINK_DETACH: i32 = 34;

/// Map types that calls here treat differently (`enum bpf_map_type`).
const ARRAY: u32 = 2;
const PERCPU_HASH: u32 = 5;
const PERCPU_ARRAY: u32 = 6;
const LRU_PERCPU_HASH: u32 = 10;

/// How often a program is offered to the kernel while it says that it was interrupted, and how long between.
const LOADS_MAX: usize = 50;
const LOAD_PAUSE: Duration = Duration::from_millis(10);

/// `BPF_F_REPLACE`: the update is made only if the old program is the one named.
const F_REPLACE: u32 = 1 << 2;

/// A program type, by its number in `enum bpf_prog_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramType(pub u32);

impl ProgramType {
    /// tc and tcx.
    pub const SCHED_CLS: ProgramType = ProgramType(3);
    /// XDP.
    pub const XDP: ProgramType = ProgramType(6);
    /// Netfilter hooks.
    pub const NETFILTER: ProgramType = ProgramType(32);
}

/// What a map is created with.
#[derive(Clone, Copy, Debug)]
pub struct MapSpec<'a> {
    /// `enum bpf_map_type`.
    pub map_type: u32,
    /// Bytes of a key.
    pub key_bytes: u32,
    /// Bytes of a value.
    pub value_bytes: u32,
    /// Most elements.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// Its name, at most [`BPF_NAME_BYTES_MAX`] bytes; what is longer is cut.
    pub name: &'a str,
}

/// `BPF_F_*` flags of maps.
#[derive(Clone, Copy, Debug)]
pub struct MapFlags;

impl MapFlags {
    /// Programs may only read it.
    pub const RDONLY_PROG: u32 = 1 << 7;
    /// Userspace may map it.
    pub const MMAPABLE: u32 = 1 << 10;
}

/// Type information for a program to be loaded.
#[derive(Clone, Copy, Debug)]
pub struct BtfBlob<'a> {
    /// The loaded BTF.
    pub fd: BorrowedFd<'a>,
    /// Records of function information.
    pub func_info: &'a [u8],
    /// Bytes of each.
    pub func_info_bytes: u32,
    /// Records of line information.
    pub line_info: &'a [u8],
    /// Bytes of each.
    pub line_info_bytes: u32,
}

/// What a program is loaded from.
#[derive(Clone, Copy, Debug)]
pub struct ProgramSpec<'a> {
    /// Its type.
    pub kind: ProgramType,
    /// `expected_attach_type`: what it will be attached to, where the type alone does not say.
    pub attach_type: u32,
    /// Its name; what is longer than [`BPF_NAME_BYTES_MAX`] is cut.
    pub name: &'a str,
    /// Its licence.
    pub license: &'a str,
    /// Its instructions, with file descriptors in place of maps.
    pub slots: &'a [u64],
    /// Types and lines, if any.
    pub btf: Option<BtfBlob<'a>>,
}

/// What the kernel says about a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapInfo {
    /// `enum bpf_map_type`.
    pub map_type: u32,
    /// Its number in the kernel.
    pub id: u32,
    /// Bytes of a key.
    pub key_bytes: u32,
    /// Bytes of a value (of one CPU's, for per-CPU maps).
    pub value_bytes: u32,
    /// Most elements.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// Its name.
    pub name: String,
}

/// An open map. Its lengths are known, so that no call reads or writes past a buffer.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    info: MapInfo,
    stride: usize,
}

impl Map {
    /// What the kernel says about it.
    pub fn info(&self) -> &MapInfo {
        &self.info
    }

    /// Bytes of a value as userspace sees it: for per-CPU maps one for each possible CPU, each padded to 8 bytes.
    pub fn stride(&self) -> usize {
        self.stride
    }

    fn check(&self, key: &[u8], value_bytes: usize) -> io::Result<()> {
        if key.len() == self.info.key_bytes as usize && value_bytes == self.stride {
            Ok(())
        } else {
            Err(io::Error::from(io::ErrorKind::InvalidInput))
        }
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What the kernel says about a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramInfo {
    /// `enum bpf_prog_type`.
    pub program_type: u32,
    /// Its number in the kernel.
    pub id: u32,
    /// A hash of its instructions.
    pub tag: [u8; 8],
    /// Its name.
    pub name: String,
    /// When it was loaded, in nanoseconds since boot.
    pub load_time_ns: u64,
    /// Its maps' numbers.
    pub map_ids: Vec<u32>,
    /// Bytes of machine code.
    pub jited_bytes: u32,
    /// Bytes of instructions, as the kernel rewrote them.
    pub xlated_bytes: u32,
    /// Instructions the verifier processed.
    pub verified_insns: u32,
}

/// What a link attaches to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkSpec {
    /// XDP on a device.
    Xdp {
        /// The device.
        ifindex: u32,
        /// Generic mode: `XDP_FLAGS_SKB_MODE`; otherwise the driver's, `XDP_FLAGS_DRV_MODE`.
        generic: bool,
    },
    /// tcx on a device.
    Tcx {
        /// The device.
        ifindex: u32,
        /// Egress rather than ingress.
        egress: bool,
        /// Before all others rather than after them.
        first: bool,
    },
    /// A netfilter hook of the calling process's network namespace.
    Netfilter {
        /// `NFPROTO_IPV4` (2) or `NFPROTO_IPV6` (10).
        family: u32,
        /// `NF_INET_*`.
        hook: u32,
        /// Its place among the hook's functions; it has to be free.
        priority: i32,
        /// Whether packets are defragmented first.
        defrag: bool,
    },
}

/// What the kernel says about a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Its number in the kernel.
    pub id: u32,
    /// Its program's number.
    pub program_id: u32,
    /// What it is attached to.
    pub kind: LinkKind,
}

/// What a link is attached to. Device number 0: the device is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// XDP.
    Xdp {
        /// The device.
        ifindex: u32,
    },
    /// tcx.
    Tcx {
        /// The device.
        ifindex: u32,
        /// Egress rather than ingress.
        egress: bool,
    },
    /// A netfilter hook.
    Netfilter {
        /// `NFPROTO_*`.
        family: u32,
        /// `NF_INET_*`.
        hook: u32,
        /// Its place.
        priority: i32,
        /// Whether packets are defragmented first.
        defrag: bool,
    },
    /// Something else, by its number in `enum bpf_link_type`.
    Other(u32),
}

/// Where to ask for attached programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryPoint {
    /// tcx ingress.
    TcxIngress,
    /// tcx egress.
    TcxEgress,
}

#[repr(C)]
#[derive(Default)]
struct MapCreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct ElemAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgLoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}

#[repr(C)]
#[derive(Default)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

#[repr(C)]
#[derive(Default)]
struct BtfLoadAttr {
    btf: u64,
    log_buf: u64,
    btf_size: u32,
    log_size: u32,
    log_level: u32,
    log_true_size: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    /// The union: netfilter's family, hook, priority and flags; tcx's relative id.
    extra: [u32; 4],
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
#[derive(Default)]
struct ProgInfoBytes {
    program_type: u32,
    id: u32,
    tag: [u8; 8],
    jited_prog_len: u32,
    xlated_prog_len: u32,
    jited_prog_insns: u64,
    xlated_prog_insns: u64,
    load_time: u64,
    created_by_uid: u32,
    nr_map_ids: u32,
    map_ids: u64,
    name: [u8; 16],
    ifindex: u32,
    gpl_compatible: u32,
    netns_dev: u64,
    netns_ino: u64,
    nr_jited_ksyms: u32,
    nr_jited_func_lens: u32,
    jited_ksyms: u64,
    jited_func_lens: u64,
    btf_id: u32,
    func_info_rec_size: u32,
    func_info: u64,
    nr_func_info: u32,
    nr_line_info: u32,
    line_info: u64,
    jited_line_info: u64,
    nr_jited_line_info: u32,
    line_info_rec_size: u32,
    jited_line_info_rec_size: u32,
    nr_prog_tags: u32,
    prog_tags: u64,
    run_time_ns: u64,
    run_cnt: u64,
    recursion_misses: u64,
    verified_insns: u32,
    attach_btf_obj_id: u32,
}

#[repr(C)]
#[derive(Default)]
struct MapInfoBytes {
    map_type: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct LinkInfoBytes {
    link_type: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    extra: [u32; 6],
}

const ATTACH_XDP: u32 = 37;
const ATTACH_NETFILTER: u32 = 45;
const ATTACH_TCX_INGRESS: u32 = 46;
const ATTACH_TCX_EGRESS: u32 = 47;
const LINK_TYPE_XDP: u32 = 6;
const LINK_TYPE_NETFILTER: u32 = 10;
const LINK_TYPE_TCX: u32 = 11;
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const F_BEFORE: u32 = 1 << 3;
const F_AFTER: u32 = 1 << 4;
const F_NETFILTER_IP_DEFRAG: u32 = 1;
/// Attached programs asked for at one point: the kernel keeps at most 64 (include/net/tcx.h, `BPF_MPROG_MAX`).
const QUERY_MAX: usize = 64;

fn ptr<T>(bytes: &[T]) -> u64 {
    if bytes.is_empty() { 0 } else { bytes.as_ptr() as u64 }
}

fn fd(fd: impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd() as u32
}

fn name16(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    let len = name.floor_char_boundary(BPF_NAME_BYTES_MAX);
    bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
    bytes
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn c_string(text: &[u8]) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

impl Sys {
    /// Makes the call.
    ///
    /// # Safety
    /// Every address in `attr` is that of memory which outlives the call and is as long as the lengths beside it say,
    /// and writable where the command writes.
    unsafe fn bpf<T>(&self, name: &'static str, command: i32, attr: &mut T) -> io::Result<i64> {
        self.enter(name)?;
        let mut call = || {
            // SAFETY: `attr` is a valid structure of the size given; the rest is the caller's promise.
            let result =
                unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
            checked(result)
        };
        if command != PROG_LOAD {
            return call();
        }
        without_signals(|| {
            for _ in 1..LOADS_MAX {
                match call() {
                    // A stop or the freezer, which nothing puts off, came in between.
                    Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => thread::sleep(LOAD_PAUSE),
                    result => return result,
                }
            }
            call()
        })
    }

    /// As [`Sys::bpf`], for commands that give a file descriptor.
    ///
    /// # Safety
    /// As [`Sys::bpf`].
    unsafe fn bpf_fd<T>(&self, name: &'static str, command: i32, attr: &mut T) -> io::Result<OwnedFd> {
        // SAFETY: the caller's promise.
        let fd = unsafe { self.bpf(name, command, attr) }?;
        // SAFETY: the command gave a new descriptor that nobody else has (with O_CLOEXEC, as all of bpf's have).
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Creates a map.
    pub fn map_create(&self, spec: &MapSpec<'_>) -> io::Result<Map> {
        let mut attr = MapCreateAttr {
            map_type: spec.map_type,
            key_size: spec.key_bytes,
            value_size: spec.value_bytes,
            max_entries: spec.max_entries,
            map_flags: spec.flags,
            map_name: name16(spec.name),
            ..MapCreateAttr::default()
        };
        // SAFETY: no addresses.
        let fd = unsafe { self.bpf_fd("map_create", MAP_CREATE, &mut attr) }?;
        self.map(fd)
    }

    /// A map by its descriptor. Descriptors of another kind are refused.
    pub fn map(&self, fd: OwnedFd) -> io::Result<Map> {
        // What a descriptor is the kernel tells through /proc alone; every other kind of object fails here.
        if self
            .map_next_key_raw(fd.as_fd(), 0, 0)
            .is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
        {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let info = self.map_info(fd.as_fd())?;
        let value = info.value_bytes as usize;
        let stride = match info.map_type {
            PERCPU_HASH | PERCPU_ARRAY | LRU_PERCPU_HASH => {
                value.next_multiple_of(8) * self.possible_cpus()?
            }
            // References to other objects are numbers of four bytes, whatever is kept.
            _ => value,
        };
        Ok(Map { fd, info, stride })
    }

    /// Sets the value of a key. For per-CPU maps the value is one for each possible CPU, each padded to 8 bytes.
    pub fn map_update(&self, map: &Map, key: &[u8], value: &[u8]) -> io::Result<()> {
        map.check(key, value.len())?;
        let mut attr = ElemAttr { map_fd: fd(map), key: ptr(key), value: ptr(value), ..ElemAttr::default() };
        // SAFETY: both slices live and are as long as the map's keys and values.
        unsafe { self.bpf("map_update", MAP_UPDATE_ELEM, &mut attr) }.map(|_| ())
    }

    /// Reads the value of a key (see [`Map::stride`]), if there is one.
    pub fn map_lookup(&self, map: &Map, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        map.check(key, map.stride)?;
        let mut value = vec![0u8; map.stride];
        let mut attr = ElemAttr {
            map_fd: fd(map),
            key: ptr(key),
            value: value.as_mut_ptr() as u64,
            ..ElemAttr::default()
        };
        // SAFETY: both live, the second exclusively, and are as long as the map's keys and values.
        match unsafe { self.bpf("map_lookup", MAP_LOOKUP_ELEM, &mut attr) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes a key; whether it was there.
    pub fn map_delete(&self, map: &Map, key: &[u8]) -> io::Result<bool> {
        map.check(key, map.stride)?;
        let mut attr = ElemAttr { map_fd: fd(map), key: ptr(key), ..ElemAttr::default() };
        // SAFETY: the slice lives and is as long as the map's keys.
        match unsafe { self.bpf("map_delete", MAP_DELETE_ELEM, &mut attr) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The key after `key`, or the first; `None` at the end.
    pub fn map_next_key(&self, map: &Map, key: Option<&[u8]>) -> io::Result<Option<Vec<u8>>> {
        if let Some(key) = key {
            map.check(key, map.stride)?;
        }
        let mut next = vec![0u8; map.info.key_bytes as usize];
        match self.map_next_key_raw(map.as_fd(), key.map_or(0, ptr), next.as_mut_ptr() as u64) {
            Ok(()) => Ok(Some(next)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks for the key after the one at address `key` and writes it to `next`. With both 0 it asks only whether the
    /// descriptor is a map's: EINVAL if not, and EFAULT or ENOENT if it is.
    fn map_next_key_raw(&self, map: BorrowedFd<'_>, key: u64, next: u64) -> io::Result<()> {
        let mut attr = ElemAttr { map_fd: fd(map), key, value: next, ..ElemAttr::default() };
        // SAFETY: the callers here give addresses of keys of the map, or 0, which the kernel refuses to write to.
        unsafe { self.bpf("map_next_key", MAP_GET_NEXT_KEY, &mut attr) }.map(|_| ())
    }

    /// Reads all elements of an array, or of a per-CPU array, at once: [`Map::stride`] bytes each.
    pub fn map_read_array(&self, map: &Map) -> io::Result<Vec<u8>> {
        if !matches!(map.info.map_type, ARRAY | PERCPU_ARRAY) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let count = map.info.max_entries;
        let mut keys = vec![0u32; count as usize];
        let mut values = vec![0u8; count as usize * map.stride];
        let mut cursor = 0u32;
        let mut attr = BatchAttr {
            out_batch: std::ptr::from_mut(&mut cursor) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count,
            map_fd: fd(map),
            ..BatchAttr::default()
        };
        // SAFETY: the buffers live and have room for `count` keys and values; `in_batch` 0 means the start.
        match unsafe { self.bpf("map_lookup_batch", MAP_LOOKUP_BATCH, &mut attr) } {
            Ok(_) => {}
            // The end was reached (kernel/bpf/syscall.c, `generic_map_lookup_batch`).
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
        values.truncate(attr.count as usize * map.stride);
        Ok(values)
    }

    /// Sets `count` keys and values, which follow each other without gaps. Some of them may be set if it fails.
    pub fn map_update_batch(&self, map: &Map, keys: &[u8], values: &[u8], count: usize) -> io::Result<()> {
        if keys.len() != count * map.info.key_bytes as usize || values.len() != count * map.stride {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let mut attr = BatchAttr {
            keys: ptr(keys),
            values: ptr(values),
            count: count as u32,
            map_fd: fd(map),
            ..BatchAttr::default()
        };
        // SAFETY: both slices live and hold `count` keys and values.
        unsafe { self.bpf("map_update_batch", MAP_UPDATE_BATCH, &mut attr) }.map(|_| ())
    }

    /// Keeps userspace from changing a map from now on.
    pub fn map_freeze(&self, map: &Map) -> io::Result<()> {
        let mut attr = fd(map);
        // SAFETY: no addresses.
        unsafe { self.bpf("map_freeze", MAP_FREEZE, &mut attr) }.map(|_| ())
    }

    /// Loads type information.
    pub fn btf_load(&self, btf: &[u8]) -> io::Result<OwnedFd> {
        let mut attr = BtfLoadAttr { btf: ptr(btf), btf_size: btf.len() as u32, ..BtfLoadAttr::default() };
        // SAFETY: the slice lives and is as long as said.
        unsafe { self.bpf_fd("btf_load", BTF_LOAD, &mut attr) }
    }

    /// Loads a program. `log` gets the verifier's words if it is not empty.
    pub fn prog_load(&self, spec: &ProgramSpec<'_>, log: &mut [u8]) -> io::Result<OwnedFd> {
        let license = c_string(spec.license.as_bytes())?;
        let mut attr = ProgLoadAttr {
            prog_type: spec.kind.0,
            insn_cnt: spec.slots.len() as u32,
            insns: ptr(spec.slots),
            license: license.as_ptr() as u64,
            log_level: u32::from(!log.is_empty()),
            log_size: log.len() as u32,
            log_buf: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
            prog_name: name16(spec.name),
            expected_attach_type: spec.attach_type,
            ..ProgLoadAttr::default()
        };
        if let Some(btf) = &spec.btf {
            attr.prog_btf_fd = fd(btf.fd);
            attr.func_info_rec_size = btf.func_info_bytes;
            attr.func_info = ptr(btf.func_info);
            attr.func_info_cnt = btf.func_info.len() as u32 / btf.func_info_bytes;
            attr.line_info_rec_size = btf.line_info_bytes;
            attr.line_info = ptr(btf.line_info);
            attr.line_info_cnt = btf.line_info.len() as u32 / btf.line_info_bytes;
        }
        // SAFETY: all buffers live, and the lengths beside them are theirs.
        unsafe { self.bpf_fd("prog_load", PROG_LOAD, &mut attr) }
    }

    /// Pins a program, a map or a link at a path of a bpffs.
    pub fn obj_pin(&self, object: impl AsFd, path: &Path) -> io::Result<()> {
        let path = c_string(path.as_os_str().as_bytes())?;
        let mut attr = ObjAttr { pathname: path.as_ptr() as u64, bpf_fd: fd(object), file_flags: 0 };
        // SAFETY: the path lives and ends in NUL.
        unsafe { self.bpf("obj_pin", OBJ_PIN, &mut attr) }.map(|_| ())
    }

    /// Opens what is pinned at a path.
    pub fn obj_get(&self, path: &Path) -> io::Result<OwnedFd> {
        let path = c_string(path.as_os_str().as_bytes())?;
        let mut attr = ObjAttr { pathname: path.as_ptr() as u64, ..ObjAttr::default() };
        // SAFETY: the path lives and ends in NUL.
        unsafe { self.bpf_fd("obj_get", OBJ_GET, &mut attr) }
    }

    /// Opens a program by its number.
    pub fn prog_by_id(&self, id: u32) -> io::Result<OwnedFd> {
        self.by_id("prog_by_id", PROG_GET_FD_BY_ID, id)
    }

    /// Opens a map by its number.
    pub fn map_by_id(&self, id: u32) -> io::Result<Map> {
        self.map(self.by_id("map_by_id", MAP_GET_FD_BY_ID, id)?)
    }

    /// Opens a link by its number.
    pub fn link_by_id(&self, id: u32) -> io::Result<OwnedFd> {
        self.by_id("link_by_id", LINK_GET_FD_BY_ID, id)
    }

    /// The number of the link after `id` in all network namespaces; `None` at the end. From 0 on all of them.
    pub fn link_next_id(&self, id: u32) -> io::Result<Option<u32>> {
        let mut attr = [id, 0, 0];
        // SAFETY: no addresses.
        match unsafe { self.bpf("link_next_id", LINK_GET_NEXT_ID, &mut attr) } {
            Ok(_) => Ok(Some(attr[1])),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn by_id(&self, name: &'static str, command: i32, id: u32) -> io::Result<OwnedFd> {
        let mut attr = [id, 0, 0];
        // SAFETY: no addresses.
        unsafe { self.bpf_fd(name, command, &mut attr) }
    }

    /// Fills `info`.
    ///
    /// # Safety
    /// Addresses in `info` are those of memory that is as long as the counts beside them say.
    unsafe fn info<T>(&self, name: &'static str, object: impl AsFd, info: &mut T) -> io::Result<()> {
        let mut attr = InfoAttr {
            bpf_fd: fd(object),
            info_len: size_of::<T>() as u32,
            info: std::ptr::from_mut(info) as u64,
        };
        // SAFETY: `info` lives and is as long as said; the rest is the caller's promise.
        unsafe { self.bpf(name, OBJ_GET_INFO_BY_FD, &mut attr) }.map(|_| ())
    }

    /// What the kernel says about a program. Descriptors of another kind give nonsense, never a fault.
    pub fn prog_info(&self, program: impl AsFd) -> io::Result<ProgramInfo> {
        let program = program.as_fd();
        let mut info = ProgInfoBytes::default();
        // SAFETY: no addresses.
        unsafe { self.info("prog_info", program, &mut info) }?;
        let mut map_ids = vec![0u32; info.nr_map_ids as usize];
        if !map_ids.is_empty() {
            let mut second = ProgInfoBytes {
                nr_map_ids: info.nr_map_ids,
                map_ids: map_ids.as_mut_ptr() as u64,
                ..ProgInfoBytes::default()
            };
            // SAFETY: the buffer has room for `nr_map_ids` numbers.
            unsafe { self.info("prog_info", program, &mut second) }?;
        }
        Ok(ProgramInfo {
            program_type: info.program_type,
            id: info.id,
            tag: info.tag,
            name: text(&info.name),
            load_time_ns: info.load_time,
            map_ids,
            jited_bytes: info.jited_prog_len,
            xlated_bytes: info.xlated_prog_len,
            verified_insns: info.verified_insns,
        })
    }

    fn map_info(&self, map: impl AsFd) -> io::Result<MapInfo> {
        let mut info = MapInfoBytes::default();
        // SAFETY: no addresses.
        unsafe { self.info("map_info", map, &mut info) }?;
        Ok(MapInfo {
            map_type: info.map_type,
            id: info.id,
            key_bytes: info.key_size,
            value_bytes: info.value_size,
            max_entries: info.max_entries,
            flags: info.map_flags,
            name: text(&info.name),
        })
    }

    /// Whether a descriptor is that of a link: asked about something else, the kernel tells of that in other words.
    pub fn is_link(&self, link: impl AsFd) -> io::Result<bool> {
        self.tells_of(link, "link_type:")
    }

    /// Whether a descriptor is that of a program.
    pub fn is_program(&self, program: impl AsFd) -> io::Result<bool> {
        self.tells_of(program, "prog_type:")
    }

    fn tells_of(&self, descriptor: impl AsFd, what: &str) -> io::Result<bool> {
        self.enter("fdinfo")?;
        let number = descriptor.as_fd().as_raw_fd();
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
        Ok(text.lines().any(|line| line.starts_with(what)))
    }

    /// What the kernel says about a link.
    pub fn link_info(&self, link: impl AsFd) -> io::Result<LinkInfo> {
        let mut info = LinkInfoBytes::default();
        // SAFETY: no addresses.
        unsafe { self.info("link_info", link, &mut info) }?;
        let kind = match info.link_type {
            LINK_TYPE_XDP => LinkKind::Xdp { ifindex: info.extra[0] },
            LINK_TYPE_TCX => {
                LinkKind::Tcx { ifindex: info.extra[0], egress: info.extra[1] == ATTACH_TCX_EGRESS }
            }
            LINK_TYPE_NETFILTER => LinkKind::Netfilter {
                family: info.extra[0],
                hook: info.extra[1],
                priority: info.extra[2] as i32,
                defrag: info.extra[3] & F_NETFILTER_IP_DEFRAG != 0,
            },
            other => LinkKind::Other(other),
        };
        Ok(LinkInfo { id: info.id, program_id: info.prog_id, kind })
    }

    /// Attaches a program. It stays attached as long as the link is open or pinned.
    pub fn link_create(&self, program: impl AsFd, spec: &LinkSpec) -> io::Result<OwnedFd> {
        let mut attr = LinkCreateAttr { prog_fd: fd(program), ..LinkCreateAttr::default() };
        match *spec {
            LinkSpec::Xdp { ifindex, generic } => {
                attr.target = ifindex;
                attr.attach_type = ATTACH_XDP;
                attr.flags = if generic { XDP_FLAGS_SKB_MODE } else { XDP_FLAGS_DRV_MODE };
            }
            LinkSpec::Tcx { ifindex, egress, first } => {
                attr.target = ifindex;
                attr.attach_type = if egress { ATTACH_TCX_EGRESS } else { ATTACH_TCX_INGRESS };
                attr.flags = if first { F_BEFORE } else { F_AFTER };
            }
            LinkSpec::Netfilter { family, hook, priority, defrag } => {
                attr.attach_type = ATTACH_NETFILTER;
                let flags = if defrag { F_NETFILTER_IP_DEFRAG } else { 0 };
                attr.extra = [family, hook, priority as u32, flags];
            }
        }
        // SAFETY: no addresses.
        unsafe { self.bpf_fd("link_create", LINK_CREATE, &mut attr) }
    }

    /// Puts `new` in place of a link's program, at once for every packet. With `old` only if that is the program that
    /// is there; otherwise the kernel says EPERM.
    pub fn link_update(
        &self,
        link: impl AsFd,
        new: impl AsFd,
        old: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let mut attr = LinkUpdateAttr {
            link_fd: fd(link),
            new_prog_fd: fd(new),
            flags: if old.is_some() { F_REPLACE } else { 0 },
            old_prog_fd: old.map_or(0, fd),
        };
        // SAFETY: no addresses.
        unsafe { self.bpf("link_update", LINK_UPDATE, &mut attr) }.map(|_| ())
    }

    /// Detaches a link, whoever else holds it.
    pub fn link_detach(&self, link: impl AsFd) -> io::Result<()> {
        let mut attr = fd(link);
        // SAFETY: no addresses.
        unsafe { self.bpf("link_detach", LINK_DETACH, &mut attr) }.map(|_| ())
    }

    /// The programs attached to a device, in their order: their numbers, and those of their links (0: none).
    pub fn prog_query(&self, ifindex: u32, point: QueryPoint) -> io::Result<Vec<(u32, u32)>> {
        let mut programs = [0u32; QUERY_MAX];
        let mut links = [0u32; QUERY_MAX];
        let mut attr = QueryAttr {
            target: ifindex,
            attach_type: match point {
                QueryPoint::TcxIngress => ATTACH_TCX_INGRESS,
                QueryPoint::TcxEgress => ATTACH_TCX_EGRESS,
            },
            prog_ids: programs.as_mut_ptr() as u64,
            link_ids: links.as_mut_ptr() as u64,
            count: QUERY_MAX as u32,
            ..QueryAttr::default()
        };
        // SAFETY: both buffers have room for `count` numbers.
        match unsafe { self.bpf("prog_query", PROG_QUERY, &mut attr) } {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
        let count = (attr.count as usize).min(QUERY_MAX);
        Ok(programs.into_iter().zip(links).take(count).collect())
    }
}
