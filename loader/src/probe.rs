//! What the running kernel can do, found out by doing it.
//!
//! Version numbers lie: distributions backport, and configurations leave out. So every feature is tried, in the
//! smallest way that tells "not there" from "not like this", and nothing stays behind. The version in which the feature
//! came (Documentation/bpf, and the commit that added the enumerator) is only told to the user.

use std::fmt;
use std::io;

use polc_backend_ebpf::asm::{Asm, Code};
use polc_backend_ebpf::insn::Reg;
use polc_backend_ebpf::manifest::KernelVersion;
use polc_backend_ebpf::object::MapType;

use crate::sys::{LinkSpec, MapFlags, MapSpec, ProgramSpec, ProgramType, QueryPoint, Sys};

/// Something of the kernel's that polc may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Feature {
    /// Loading programs at all.
    Bpf,
    /// Maps whose values programs address directly, frozen for constants.
    DataMaps,
    /// Type information with source lines.
    LineInfo,
    /// XDP programs, attached by links that can be updated.
    XdpLink,
    /// tc programs.
    Classifier,
    /// tcx: tc programs attached by links.
    Tcx,
    /// Programs on netfilter's hooks, attached by links.
    NetfilterLink,
    /// Ring buffers.
    RingBuffer,
}

impl Feature {
    /// All of them, the most basic first.
    pub const ALL: [Feature; 8] = [
        Feature::Bpf,
        Feature::DataMaps,
        Feature::LineInfo,
        Feature::XdpLink,
        Feature::Classifier,
        Feature::Tcx,
        Feature::NetfilterLink,
        Feature::RingBuffer,
    ];

    /// The first kernel that has it.
    pub const fn since(self) -> KernelVersion {
        match self {
            Feature::Bpf => KernelVersion(4, 1),
            Feature::DataMaps => KernelVersion(5, 2),
            Feature::LineInfo => KernelVersion(5, 0),
            Feature::XdpLink => KernelVersion(5, 9),
            Feature::Classifier => KernelVersion(4, 1),
            Feature::Tcx => KernelVersion(6, 6),
            Feature::NetfilterLink => KernelVersion(6, 4),
            Feature::RingBuffer => KernelVersion(5, 8),
        }
    }

    /// What it is, for people.
    pub const fn what(self) -> &'static str {
        match self {
            Feature::Bpf => "bpf(2)",
            Feature::DataMaps => "maps with direct values (frozen array maps)",
            Feature::LineInfo => "BTF with source lines",
            Feature::XdpLink => "XDP links",
            Feature::Classifier => "tc programs",
            Feature::Tcx => "tcx links",
            Feature::NetfilterLink => "BPF netfilter links",
            Feature::RingBuffer => "BPF ring buffers",
        }
    }
}

/// A feature that the running kernel lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Which.
    pub feature: Feature,
    /// How it showed.
    pub how: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, in Linux since {} ({})", self.feature.what(), self.feature.since(), self.how)
    }
}

/// Which of `features` are missing. A refusal for lack of rights is not taken for a lack of the feature.
pub fn missing(sys: &Sys, features: &[Feature]) -> Vec<Missing> {
    let mut found = Vec::new();
    for &feature in features {
        if let Err(error) = attempt(sys, feature)
            && error.raw_os_error() != Some(libc::EPERM)
        {
            found.push(Missing { feature, how: error.to_string() });
        }
    }
    found
}

fn attempt(sys: &Sys, feature: Feature) -> io::Result<()> {
    let array = |flags| MapSpec {
        map_type: MapType::ARRAY.0,
        key_bytes: 4,
        value_bytes: 4,
        max_entries: 1,
        flags,
        name: "polc_probe",
    };
    match feature {
        Feature::Bpf => sys.map_create(&array(0)).map(|_| ()),
        Feature::DataMaps => {
            let map = sys.map_create(&array(MapFlags::RDONLY_PROG))?;
            sys.map_freeze(&map)
        }
        // The smallest BTF with a type: magic, version 1, header of 24 bytes, then `int` of 32 bits, then its name.
        Feature::LineInfo => {
            let mut btf = vec![0x9f, 0xeb, 1, 0];
            for word in [24u32, 0, 16, 16, 5, 1, 1 << 24, 4, 1 << 24 | 32] {
                btf.extend_from_slice(&word.to_ne_bytes());
            }
            btf.extend_from_slice(b"\0int\0");
            sys.btf_load(&btf).map(|_| ())
        }
        // The loopback device, number 1 of every network namespace, has no XDP of its own: nothing gets attached, and the
        // kernel says so only if it knows XDP links.
        Feature::XdpLink => {
            let program = load(sys, ProgramType::XDP, ATTACH_XDP)?;
            match sys.link_create(&program, &LinkSpec::Xdp { ifindex: LOOPBACK, generic: false }) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(error),
                _ => Ok(()),
            }
        }
        Feature::Classifier => load(sys, ProgramType::SCHED_CLS, 0).map(|_| ()),
        // On a device that does not exist: ENODEV if the kernel knows tcx, EINVAL if not.
        Feature::Tcx => match sys.prog_query(NO_DEVICE, QueryPoint::TcxIngress) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            result => result.map(|_| ()),
        },
        Feature::NetfilterLink => load(sys, ProgramType::NETFILTER, ATTACH_NETFILTER).map(|_| ()),
        Feature::RingBuffer => {
            let spec = MapSpec {
                map_type: MapType::RINGBUF.0,
                key_bytes: 0,
                value_bytes: 0,
                max_entries: 4_096,
                flags: 0,
                name: "polc_probe",
            };
            sys.map_create(&spec).map(|_| ())
        }
    }
}

/// `BPF_XDP` and `BPF_NETFILTER` of `enum bpf_attach_type`.
const ATTACH_XDP: u32 = 37;
const ATTACH_NETFILTER: u32 = 45;

/// A device number that no device has: numbers are positive `int`s, given out from 1 on.
const NO_DEVICE: u32 = i32::MAX as u32;

const LOOPBACK: u32 = 1;

fn load(sys: &Sys, kind: ProgramType, attach_type: u32) -> io::Result<std::os::fd::OwnedFd> {
    let code = pass();
    let spec =
        ProgramSpec { kind, attach_type, name: "polc_probe", license: "GPL", slots: &code.slots, btf: None };
    sys.prog_load(&spec, &mut [])
}

/// A program that returns 1: what every kind of program may return.
fn pass() -> Code {
    let mut asm = Asm::new();
    asm.mov32(Reg::R0, 1);
    asm.exit();
    asm.finish().expect("two instructions are a program")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_is_missing_by_name_and_version() {
        let sys = Sys::with_hook(|_| Err(io::Error::from_raw_os_error(libc::EINVAL)));
        let found = missing(&sys, &Feature::ALL);
        assert_eq!(found.len(), Feature::ALL.len());
        assert!(found.iter().any(|missing| missing.to_string().starts_with("tcx links, in Linux since 6.6")));
    }

    #[test]
    fn a_lack_of_rights_is_no_lack_of_a_feature() {
        let sys = Sys::with_hook(|_| Err(io::Error::from_raw_os_error(libc::EPERM)));
        assert_eq!(missing(&sys, &Feature::ALL), []);
    }

    #[test]
    fn this_kernel_has_everything() {
        let sys = Sys::new();
        if !sys.missing_capabilities().is_empty() {
            eprintln!("skipped this_kernel_has_everything: needs root");
            return;
        }
        assert_eq!(missing(&sys, &Feature::ALL), []);
    }
}
