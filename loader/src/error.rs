//! What keeps polc from changing the running kernel, and what to do about it.
//!
//! One enum for the whole crate: whoever applies a policy has one question, "why not, and what now", and the answer has
//! to be as good for a full disk as for the verifier's refusal. Each has a code of the 0800s, a sentence, and mostly a
//! hint. Unless its text says otherwise, an error means that nothing was changed.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use polc_ir::diag::Code;

use crate::kernel_types::KernelTypesError;
use crate::probe::Missing;

/// Why the kernel does not agree with an object.
#[derive(Debug)]
pub enum Error {
    /// The process lacks these capabilities.
    Capabilities(Vec<&'static str>),
    /// There is no bpffs where pins are kept or to be kept.
    NoBpffs {
        /// The directory.
        path: PathBuf,
        /// Why that matters, or none is mounted.
        why: String,
        /// Whether the process has mounts of its own, which may be why, and end with it.
        own_mounts: bool,
    },
    /// The kernel lacks something that is needed.
    Kernel(Vec<Missing>),
    /// A device does not exist in this network namespace.
    NoDevice {
        /// Its name.
        name: String,
        /// Those that do.
        there: Vec<String>,
    },
    /// A device went away.
    DeviceGone(String),
    /// The driver can't run XDP programs with the device's MTU.
    MtuTooLarge {
        /// The device.
        device: String,
        /// Its MTU, in bytes.
        mtu: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The driver has no XDP, or not now.
    NoNativeXdp {
        /// The device.
        device: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else's programs are where polc's would go.
    Occupied {
        /// Where.
        place: String,
        /// What is there.
        by: Vec<String>,
        /// Whether polc could go beside it.
        may_chain: bool,
    },
    /// A priority of a netfilter hook, or every one that would do, is taken.
    PriorityTaken {
        /// Where.
        place: String,
        /// The priority.
        priority: i32,
        /// Programs that have it, possibly in another network namespace; none if a table of the kernel's own has.
        by: Vec<String>,
    },
    /// A priority that the kernel gives no program.
    Priority {
        /// The priority.
        priority: i32,
        /// Whether fragments were to be reassembled first.
        defrag: bool,
    },
    /// A policy is applied at another priority, or with fragments treated differently.
    OtherPlace {
        /// Where.
        place: String,
        /// Its priority.
        priority: i32,
        /// Whether fragments are reassembled first.
        defrag: bool,
    },
    /// A policy is attached in another way than is asked for.
    OtherWay {
        /// Where.
        place: String,
        /// How it is attached.
        way: &'static str,
    },
    /// polc's policy for the other address family has the only place.
    OtherFamily(String),
    /// A device has an `ingress` qdisc, and so none with the other side.
    IngressQdisc(String),
    /// A device shares a block of filters with others, and so has none of its own there.
    SharedBlock {
        /// The device.
        device: String,
        /// The block's number.
        block: u32,
    },
    /// A policy is applied to a device that had the name, which another has now.
    OtherDevice {
        /// Where.
        place: String,
        /// Number of the device that it is applied to.
        applied: u32,
        /// The name of that device now, if it is in this network namespace.
        now: Option<String>,
        /// Number of the device that has the name now.
        named: u32,
    },
    /// A policy is applied to the device by a name that it had before.
    OtherName {
        /// Where, by that name.
        place: String,
        /// The device's name now.
        now: String,
    },
    /// The device is part of another, whose name the rules see.
    LowerDevice {
        /// The device.
        device: String,
        /// The one it is part of.
        upper: String,
        /// What that is: `bridge`, `bond`.
        kind: String,
    },
    /// Which packets are for the host depends on routing rules.
    LocalByPolicy {
        /// Addresses that are local for some packets, the first and the last.
        addresses: (IpAddr, IpAddr),
        /// The routing table that says so.
        table: u32,
    },
    /// A map does not fit what memory or limits allow.
    MapMemory {
        /// The map's name.
        map: String,
        /// Bytes it would take.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel's verifier refuses the program.
    Verifier(Box<Refusal>),
    /// The object has no program, or none for the attach point.
    NoProgram(String),
    /// A pinned object is not what its name says.
    Pin {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// What polc wrote about an applied policy can't be understood.
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file can't be read or written.
    Disk {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another polc is at work on the same place.
    Locked(PathBuf),
    /// No policy is applied there.
    NotApplied(String),
    /// A change waits for its confirmation.
    Unconfirmed(String),
    /// The program attached is no longer the one that polc attached.
    Replaced {
        /// Where.
        place: String,
        /// Number of the program that is there.
        by: u32,
    },
    /// What was to be replaced is not in force any more, or its sets are not what they were.
    Overtaken(String),
    /// Of several changes one failed, and others could not be taken back.
    HalfDone {
        /// Where changes are in force.
        in_force: Vec<String>,
        /// What failed.
        error: Box<Error>,
    },
    /// A packet of the user's was decided otherwise than the user wants.
    Canary {
        /// The packet.
        packet: String,
        /// The verdict wanted.
        wanted: String,
        /// The verdict given.
        given: String,
    },
    /// The loaded program decides a packet otherwise than the object does in userspace.
    TestRun {
        /// The packet.
        packet: String,
        /// What the kernel's run returned.
        kernel: i32,
        /// What the check VM's run returned.
        vm: i32,
    },
    /// A kernel function that a program calls is not known.
    KernelTypes(KernelTypesError),
    /// The kernel's rules are not those that were given.
    Disagrees(String),
    /// The applied policy has no set of that name, or an element can't be in it.
    Set(String),
    /// Somebody watches the policy's reports already.
    Watched(String),
    /// The policy's program was compiled without reports.
    NoReports(String),
    /// Any other call that failed.
    Call {
        /// What polc was about to do.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What the verifier said.
#[derive(Debug)]
pub struct Refusal {
    /// The program's name.
    pub program: String,
    /// The verifier's last words.
    pub message: String,
    /// The user's line that the refused instruction comes from: file, line number, text.
    pub rule: Option<(String, u32, String)>,
    /// The end of its log.
    pub log: String,
    /// What the call gave.
    pub source: io::Error,
}

/// How many devices are named of those that exist.
const DEVICES_NAMED: usize = 10;

impl Error {
    /// For `map_err`: the failure of a call made to do `what`.
    pub fn call(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |source| Error::Call { what, source }
    }

    /// For `map_err`: the failure of an operation on a file of polc's state.
    pub fn disk(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Disk { path, source }
    }

    /// The diagnostic's code.
    pub const fn code(&self) -> Code {
        Code(match self {
            Error::Capabilities(_) => 800,
            Error::NoBpffs { .. } => 801,
            Error::Kernel(_) => 802,
            Error::NoDevice { .. } => 803,
            Error::DeviceGone(_) => 804,
            Error::MtuTooLarge { .. } => 805,
            Error::NoNativeXdp { .. } => 806,
            Error::Occupied { .. } => 807,
            Error::LowerDevice { .. } => 808,
            Error::MapMemory { .. } => 809,
            Error::Verifier(_) => 810,
            Error::NoProgram(_) => 811,
            Error::Pin { .. } => 812,
            Error::Corrupt { .. } => 813,
            Error::Disk { .. } => 814,
            Error::Locked(_) => 815,
            Error::NotApplied(_) => 816,
            Error::Replaced { .. } => 817,
            Error::Canary { .. } => 818,
            Error::TestRun { .. } => 819,
            Error::Set(_) => 820,
            Error::Call { .. } => 821,
            Error::Unconfirmed(_) => 822,
            Error::KernelTypes(_) => 823,
            Error::Disagrees(_) => 829,
            Error::Watched(_) => 824,
            Error::NoReports(_) => 825,
            Error::PriorityTaken { .. } => 826,
            Error::Priority { .. } => 827,
            Error::OtherPlace { .. } => 828,
            Error::OtherDevice { .. } => 830,
            Error::OtherWay { .. } => 831,
            Error::OtherFamily(_) => 832,
            Error::IngressQdisc(_) => 833,
            Error::HalfDone { .. } => 834,
            Error::LocalByPolicy { .. } => 835,
            Error::Overtaken(_) => 836,
            Error::OtherName { .. } => 837,
            Error::SharedBlock { .. } => 838,
        })
    }

    /// Whether it is that nothing can be written to a file system, so that another one would do.
    pub fn is_unwritable(&self) -> bool {
        let Error::Disk { source, .. } = self else { return false };
        matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::ReadOnlyFilesystem)
    }

    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Capabilities(_) => "run it as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON".into(),
            Error::NoBpffs { own_mounts: true, .. } => {
                "`ip netns exec` has mounts of its own: use `nsenter --net=/run/netns/NAME polc ...`, or name with --bpffs one that was mounted outside"
                    .into()
            }
            Error::NoBpffs { path, .. } => {
                format!("mount one (`mount -t bpf bpf {}`), or name another directory with --bpffs", path.display())
            }
            Error::Kernel(_) => "a newer kernel has it; `polc compile` writes an object without one".into(),
            Error::NoDevice { there, .. } => {
                let named = there.iter().take(DEVICES_NAMED).map(|name| format!("`{name}`"));
                let named = named.collect::<Vec<_>>().join(", ");
                match there.len().saturating_sub(DEVICES_NAMED) {
                    0 => format!("this network namespace has {named}"),
                    more => format!("this network namespace has {named} and {more} more (`ip link`)"),
                }
            }
            Error::DeviceGone(_) => "what was attached to it went with it; apply again once it is back".into(),
            Error::MtuTooLarge { device, .. } => {
                format!(
                    "lower it (`ip link set {device} mtu 1500`, and of a veth device that of its peer), or use --generic or --attach tc-ingress"
                )
            }
            Error::NoNativeXdp { .. } => "use --generic (slower) or --attach tc-ingress".into(),
            Error::Occupied { may_chain: true, .. } => {
                "--order first or --order last puts polc's program beside it; polc never removes what is not its own"
                    .into()
            }
            Error::Occupied { may_chain: false, .. } => {
                "detach it first, or use another attach point; polc never removes what is not its own".into()
            }
            Error::PriorityTaken { .. } => {
                "choose another with --priority; polc never removes what is not its own".into()
            }
            Error::Priority { defrag: true, .. } => {
                "with --defrag it has to be above -400, where fragments are reassembled".into()
            }
            Error::Priority { defrag: false, .. } => "the lowest and the highest number are not to be had".into(),
            Error::OtherDevice { now: Some(now), .. } => {
                format!("`polc flush --dev {now}` takes the policy off the device that was renamed")
            }
            Error::OtherDevice { now: None, .. } => "`polc flush` takes the policy off that device".into(),
            Error::OtherName { now, .. } => format!("`polc flush --dev {now}` takes it off; then apply again"),
            Error::OtherPlace { .. } => {
                "apply with the same options, or `polc flush` first: packets would meet both programs for a moment"
                    .into()
            }
            Error::OtherWay { .. } => "`polc flush` it first: packets would meet both programs for a moment".into(),
            Error::OtherFamily(_) => "apply one of the two with --attach tc-ingress, where there is room for both".into(),
            Error::IngressQdisc(device) => format!(
                "if nobody needs it, `tc qdisc del dev {device} ingress`; a kernel with tcx (6.6) needs neither"
            ),
            Error::SharedBlock { device, .. } => format!(
                "use --attach xdp, or tcx (Linux 6.6, without --clsact), which takes no qdisc; or give `{device}` a qdisc without a shared block"
            ),
            Error::HalfDone { .. } => "`polc status` shows what is in force; apply again, or `polc flush`".into(),
            Error::LocalByPolicy { .. } => {
                "attach behind routing (`--attach netfilter`), or say what is local with `--local ADDR`".into()
            }
            Error::LowerDevice { upper, .. } => format!("apply to `{upper}` with --attach tc-ingress"),
            Error::MapMemory { source, .. } if source.raw_os_error() == Some(libc::EPERM) => {
                "before Linux 5.11 raise the limit on locked memory (`ulimit -l unlimited`); later ones refuse for lack of CAP_BPF in the first user namespace, or by a security module"
                    .into()
            }
            Error::MapMemory { .. } => "free memory, raise the cgroup's limit, or split the rule set".into(),
            Error::Verifier(_) => {
                "the program was checked before; please report this rule set with the kernel's version".into()
            }
            Error::Pin { .. } => {
                "what is attached stays so; `polc flush` removes it and its pins, then apply again".into()
            }
            Error::Corrupt { path, .. } => format!(
                "what is attached stays so; `polc flush` removes it, or remove {} by hand and apply again",
                path.display()
            ),
            Error::Disk { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "make room on the file system".into()
            }
            Error::Disk { source, .. } if source.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                "mount the file system for writing".into()
            }
            Error::Disk { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "name directories that this user may write with --state and --bpffs".into()
            }
            Error::Locked(_) => "wait for the other polc to end".into(),
            Error::NotApplied(_) => "`polc status` shows what is applied".into(),
            Error::Unconfirmed(_) => "`polc confirm` keeps it; without it, it goes back by itself".into(),
            Error::Overtaken(_) => "what is in force by now stays so".into(),
            Error::Replaced { by, .. } => format!(
                "polc leaves it alone; `bpftool prog show id {by}` tells what it is. Once it is detached, `polc flush` removes what is left of polc's"
            ),
            Error::Canary { .. } => "`polc explain` shows which rule decides the packet".into(),
            Error::TestRun { .. } => {
                "a fault of polc or of the kernel: please report this rule set with the kernel's version".into()
            }
            Error::Disagrees(_) => {
                "accelerating drops what the kernel's own rules drop: give what iptables-save prints now; --unchecked drops all the same".into()
            }
            Error::KernelTypes(_) => {
                "compile without what needs it: connection look-ups need Linux 5.18 with conntrack built in, not a module".into()
            }
            Error::Watched(_) => "end the other `polc trace` first: one at a time watches a policy".into(),
            Error::NoReports(_) => "apply it again without --no-trace".into(),
            Error::NoProgram(_) | Error::Disk { .. } | Error::Set(_) | Error::Call { .. } => return None,
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Capabilities(missing) => {
                write!(f, "only a process with {} may load programs into the kernel", missing.join(", "))
            }
            Error::NoBpffs { path, why, .. } => write!(f, "`{}` is in no bpffs{why}", path.display()),
            Error::Kernel(missing) => {
                f.write_str("this kernel lacks ")?;
                for (index, missing) in missing.iter().enumerate() {
                    write!(f, "{}{missing}", if index == 0 { "" } else { "; " })?;
                }
                Ok(())
            }
            Error::NoDevice { name, .. } => write!(f, "there is no device `{name}`"),
            Error::DeviceGone(name) => write!(f, "the device `{name}` is gone"),
            Error::MtuTooLarge { device, mtu, source } => {
                let peer =
                    if source.raw_os_error() == Some(libc::ERANGE) { ", or that of its peer" } else { "" };
                write!(f, "the driver of `{device}` runs no XDP program with an MTU of {mtu}{peer}: {source}")
            }
            Error::NoNativeXdp { device, source } => {
                write!(f, "the driver of `{device}` runs no XDP program: {source}")
            }
            Error::Occupied { place, by, .. } => {
                write!(f, "{place} is taken by {}", by.join(", "))
            }
            Error::PriorityTaken { place, priority, by } if by.is_empty() => {
                write!(f, "priority {priority} {place} is taken by a table or module of the kernel's own")
            }
            Error::PriorityTaken { place, priority, by } => {
                write!(f, "priority {priority} {place} is taken by {}", by.join(", "))
            }
            Error::Priority { priority, .. } => {
                write!(f, "the kernel gives no program priority {priority}")
            }
            Error::OtherPlace { place, priority, defrag } => {
                let with = if *defrag { "with" } else { "without" };
                write!(
                    f,
                    "the policy {place} is applied at priority {priority}, {with} reassembly of fragments"
                )
            }
            Error::OtherWay { place, way } => write!(f, "the policy {place} is attached {way}"),
            Error::OtherFamily(place) => {
                write!(
                    f,
                    "{place}: polc's policy for the other address family is there, and there is room for one"
                )
            }
            Error::IngressQdisc(device) => {
                write!(
                    f,
                    "`{device}` has an ingress qdisc, beside which there is no clsact qdisc for tc-egress"
                )
            }
            Error::SharedBlock { device, block } => {
                write!(
                    f,
                    "the qdisc of `{device}` has the filters of block {block}, which other devices may share, and none of its own"
                )
            }
            Error::HalfDone { in_force, error } => {
                write!(f, "{error}; {} could not be taken back and is in force", in_force.join(", "))
            }
            Error::OtherDevice { place, applied, now, named } => {
                write!(f, "the policy {place} is on device number {applied}")?;
                if let Some(now) = now {
                    write!(f, ", which is called `{now}` now")?;
                }
                write!(f, ", and the name is that of number {named}")
            }
            Error::OtherName { place, now } => {
                write!(f, "the policy {place} is on this device, which is called `{now}` now")
            }
            Error::LocalByPolicy { addresses: (first, last), table } => write!(
                f,
                "routing rules lead packets to table {table}, which calls {first} to {last} local: before routing nothing tells which packets are INPUT's"
            ),
            Error::LowerDevice { device, upper, kind } => {
                write!(
                    f,
                    "`{device}` is part of the {kind} `{upper}`, so rules see its packets as that device's"
                )
            }
            Error::MapMemory { map, bytes, source } => {
                write!(f, "the map `{map}` of {bytes} bytes can't be made: {source}")
            }
            Error::Verifier(refusal) => {
                let Refusal { program, message, rule, source, .. } = &**refusal;
                write!(f, "the kernel refuses program `{program}`: {message} ({source})")?;
                match rule {
                    Some((file, line, text)) => write!(f, ", in the code of {file}:{line}: {text}"),
                    None => Ok(()),
                }
            }
            Error::NoProgram(what) => f.write_str(what),
            Error::Pin { path, why } => write!(f, "`{}`: {why}", path.display()),
            Error::Corrupt { path, why } => write!(f, "`{}` is damaged: {why}", path.display()),
            Error::Disk { path, source } => write!(f, "`{}`: {source}", path.display()),
            Error::Locked(path) => write!(f, "another polc is at work: `{}` is locked", path.display()),
            Error::NotApplied(place) => write!(f, "no policy of polc's is applied {place}"),
            Error::Overtaken(place) => {
                write!(
                    f,
                    "{place}: another policy was applied meanwhile, a set was changed, or it was taken away"
                )
            }
            Error::Replaced { place, by } => {
                write!(f, "{place}: program {by} is there, and no longer the one that polc attached")
            }
            Error::Unconfirmed(place) => {
                write!(f, "{place}: the last change has not been confirmed yet")
            }
            Error::Canary { packet, wanted, given } => {
                write!(f, "canary `{packet}`: {wanted} was wanted, the verdict is {given}")
            }
            Error::TestRun { packet, kernel, vm } => {
                write!(f, "the loaded program returns {kernel} for packet {packet}, and {vm} in userspace")
            }
            Error::KernelTypes(error) => error.fmt(f),
            Error::Disagrees(why) => write!(f, "the kernel's rules are not the ones given: {why}"),
            Error::Set(what) => f.write_str(what),
            Error::Watched(place) => write!(f, "{place}: another polc watches already"),
            Error::NoReports(place) => {
                write!(f, "{place}: the policy was applied without reports, so there is nothing to watch")
            }
            Error::Call { what, source } => write!(f, "can't {what}: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::MtuTooLarge { source, .. }
            | Error::NoNativeXdp { source, .. }
            | Error::MapMemory { source, .. }
            | Error::Disk { source, .. }
            | Error::Call { source, .. } => Some(source),
            Error::Verifier(refusal) => Some(&refusal.source),
            Error::HalfDone { error, .. } => Some(&**error),
            _ => None,
        }
    }
}
