//! The way to tc where the kernel has no tcx: a filter of type `bpf` on the `clsact` qdisc.
//!
//! What `tc qdisc add dev D clsact; tc filter add dev D ingress bpf da ...` does, over rtnetlink (net/sched/cls_bpf.c,
//! net/sched/sch_ingress.c). A qdisc that was there is left there, and so are the filters of others.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

use crate::net::{attributes, put, text, u32_at};
use crate::sys::{NetlinkRequest, Sys};

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_INGRESS_BLOCK: u16 = 13;
const TCA_EGRESS_BLOCK: u16 = 14;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
/// `TC_H_CLSACT`, which is `TC_H_INGRESS`, and its two sides (include/uapi/linux/pkt_sched.h).
const CLSACT_PARENT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
/// `ETH_P_ALL`, in network order.
const ALL_PROTOCOLS: u32 = 0x0003u16.to_be() as u32;
const HANDLE: u32 = 1;
const MESSAGE_BYTES: usize = 20;
/// Name of polc's filters.
const FILTER_NAME: &str = "polc";
/// The same on a qdisc that polc made, whose last filter takes it along. It tells one polc what another did that keeps
/// its files elsewhere.
const FILTER_NAME_MADE: &str = "polc-clsact";

/// The name of a filter of polc's on a qdisc that polc made, or on one that was there.
pub const fn filter_name(made: bool) -> &'static str {
    if made { FILTER_NAME_MADE } else { FILTER_NAME }
}

/// A filter of type `bpf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Its priority: filters run in ascending order.
    pub priority: u16,
    /// Its program's number; 0 for filters of another type.
    pub program_id: u32,
    /// What kind of filter it is.
    pub kind: String,
    /// Its name.
    pub name: String,
}

impl Filter {
    /// Whether a polc added it.
    pub fn is_polcs(&self) -> bool {
        self.name == FILTER_NAME || self.tells_made()
    }

    /// Whether a polc added it on a qdisc that a polc had made.
    pub fn tells_made(&self) -> bool {
        self.name == FILTER_NAME_MADE
    }
}

fn message(ifindex: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    for word in [ifindex, handle, parent, info] {
        body.extend_from_slice(&word.to_ne_bytes());
    }
    debug_assert_eq!(body.len(), MESSAGE_BYTES);
    body
}

const fn side(egress: bool) -> u32 {
    if egress { EGRESS } else { INGRESS }
}

/// The qdisc that a device's filters are on: `clsact`, which has both sides, or `ingress`, which has one and whose filters
/// are named as on the other's. There is room for one of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qdisc {
    /// Whether it has the side that packets leave by.
    pub has_egress: bool,
    /// The blocks of filters that it shares with other devices, where packets come in and where they leave. Their filters
    /// are not the device's.
    pub blocks: [Option<u32>; 2],
}

/// The one of the two that a device has.
pub fn qdisc(sys: &Sys, ifindex: u32) -> io::Result<Option<Qdisc>> {
    let body = message(ifindex, 0, 0, 0);
    let answers = sys.netlink(&NetlinkRequest { kind: RTM_GETQDISC, flags: NetlinkRequest::DUMP, body })?;
    let mut own = answers.iter().filter(|answer| u32_at(&answer.body, 4) == Some(ifindex));
    Ok(own.find_map(|answer| {
        let find = |wanted| {
            let mut all = attributes(answer.body.get(MESSAGE_BYTES..).unwrap_or_default());
            all.find_map(|(kind, value)| (kind == wanted).then_some(value))
        };
        let kind = text(find(TCA_KIND)?);
        let block = |kind| find(kind).and_then(|value| u32_at(value, 0)).filter(|block| *block != 0);
        matches!(kind.as_str(), "clsact" | "ingress").then(|| Qdisc {
            has_egress: kind == "clsact",
            blocks: [block(TCA_INGRESS_BLOCK), block(TCA_EGRESS_BLOCK)],
        })
    }))
}

/// Gives a device a `clsact` qdisc.
pub fn add_qdisc(sys: &Sys, ifindex: u32) -> io::Result<()> {
    let mut body = message(ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0);
    put(&mut body, TCA_KIND, b"clsact\0");
    let flags = NetlinkRequest::CREATE | NetlinkRequest::EXCL;
    sys.netlink(&NetlinkRequest { kind: RTM_NEWQDISC, flags, body }).map(|_| ())
}

/// Takes a device's `clsact` qdisc away, with all its filters.
pub fn remove_qdisc(sys: &Sys, ifindex: u32) -> io::Result<()> {
    let mut body = message(ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0);
    put(&mut body, TCA_KIND, b"clsact\0");
    sys.netlink(&NetlinkRequest { kind: RTM_DELQDISC, flags: 0, body }).map(|_| ())
}

/// The filters of one side of a device, by priority.
pub fn filters(sys: &Sys, ifindex: u32, egress: bool) -> io::Result<Vec<Filter>> {
    let body = message(ifindex, 0, side(egress), 0);
    let request = NetlinkRequest { kind: RTM_GETTFILTER, flags: NetlinkRequest::DUMP, body };
    let answers = match sys.netlink(&request) {
        // No qdisc, no filters.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Vec::new(),
        answers => answers?,
    };
    let mut found = Vec::new();
    for answer in &answers {
        let (Some(handle), Some(info)) = (u32_at(&answer.body, 8), u32_at(&answer.body, 16)) else {
            continue;
        };
        let mut filter =
            Filter { priority: (info >> 16) as u16, program_id: 0, kind: String::new(), name: String::new() };
        for (kind, value) in attributes(answer.body.get(MESSAGE_BYTES..).unwrap_or_default()) {
            match kind {
                TCA_KIND => filter.kind = text(value),
                TCA_OPTIONS => {
                    for (kind, value) in attributes(value) {
                        match kind {
                            TCA_BPF_ID => filter.program_id = u32_at(value, 0).unwrap_or(0),
                            TCA_BPF_NAME => filter.name = text(value),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        // Each priority is announced once without a filter.
        if handle != 0 {
            found.push(filter);
        }
    }
    found.sort_by_key(|filter| filter.priority);
    Ok(found)
}

/// Adds a program as a filter of that name, or puts it in place of the one of that priority, at once for every packet.
pub fn set_filter(
    sys: &Sys,
    ifindex: u32,
    egress: bool,
    priority: u16,
    program: impl AsFd,
    name: &str,
    replace: bool,
) -> io::Result<()> {
    let mut body = message(ifindex, HANDLE, side(egress), u32::from(priority) << 16 | ALL_PROTOCOLS);
    put(&mut body, TCA_KIND, b"bpf\0");
    let mut options = Vec::new();
    put(&mut options, TCA_BPF_FD, &(program.as_fd().as_raw_fd() as u32).to_ne_bytes());
    put(&mut options, TCA_BPF_NAME, format!("{name}\0").as_bytes());
    put(&mut options, TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes());
    put(&mut body, TCA_OPTIONS, &options);
    let flags = NetlinkRequest::CREATE | if replace { NetlinkRequest::REPLACE } else { NetlinkRequest::EXCL };
    sys.netlink(&NetlinkRequest { kind: RTM_NEWTFILTER, flags, body }).map(|_| ())
}

/// Removes the filter of a priority.
pub fn remove_filter(sys: &Sys, ifindex: u32, egress: bool, priority: u16) -> io::Result<()> {
    let mut body = message(ifindex, HANDLE, side(egress), u32::from(priority) << 16 | ALL_PROTOCOLS);
    put(&mut body, TCA_KIND, b"bpf\0");
    sys.netlink(&NetlinkRequest { kind: RTM_DELTFILTER, flags: 0, body }).map(|_| ())
}
