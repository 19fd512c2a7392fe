//! Kernel functions that look up connections, emulated (net/netfilter/nf_conntrack_bpf.c).
//!
//! The connections that there are, are given with each packet. References that a program gets it has to give back, as
//! the kernel's verifier would insist: a run that keeps one is a fault.

use super::helpers::{EINVAL, State, with};

const ENOENT: i32 = 2;
const EPROTO: i32 = 71;
const EAFNOSUPPORT: i32 = 97;

/// What stands for a `struct nf_conn *`: an address that no memory of a program's has.
const CONNECTION: u64 = 0x6374_0000_0000_0000;

/// Bytes of the two forms of `struct bpf_sock_tuple`: addresses and ports.
const TUPLE_BYTES: [usize; 2] = [12, 36];
/// Sizes of `struct bpf_ct_opts`: before zones (Linux 6.10) and since.
const OPTS_BYTES: [usize; 2] = [12, 16];
const OPTS_ERROR: u64 = 4;
const OPTS_PROTOCOL: usize = 8;

/// A connection, by what its packets in one direction look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// TCP or UDP, by protocol number.
    pub protocol: u8,
    /// `struct bpf_sock_tuple`, the part of its address family: source and destination address, then ports, all in
    /// network order.
    pub tuple: Vec<u8>,
}

/// `bpf_xdp_ct_lookup` and `bpf_skb_ct_lookup`.
pub(super) fn lookup(_: u64, tuple: u64, tuple_bytes: u64, opts: u64, opts_bytes: u64) -> u64 {
    with(|state| {
        let Some(given) = state.read(opts, opts_bytes as usize) else { return 0 };
        if !OPTS_BYTES.contains(&given.len()) {
            return refuse(state, opts, EINVAL as i32);
        }
        let protocol = given[OPTS_PROTOCOL];
        if !matches!(protocol, 6 | 17) {
            return refuse(state, opts, EPROTO);
        }
        if !TUPLE_BYTES.contains(&(tuple_bytes as usize)) {
            return refuse(state, opts, EAFNOSUPPORT);
        }
        let Some(tuple) = state.read(tuple, tuple_bytes as usize) else { return 0 };
        let index =
            state.connections.iter().position(|known| known.protocol == protocol && known.tuple == tuple);
        match index {
            Some(index) => {
                state.held += 1;
                CONNECTION + index as u64
            }
            None => refuse(state, opts, ENOENT),
        }
    })
}

fn refuse(state: &mut State, opts: u64, errno: i32) -> u64 {
    state.write(opts + OPTS_ERROR, &(-errno).to_ne_bytes());
    0
}

/// `bpf_ct_release`.
pub(super) fn release(connection: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    with(|state| {
        if connection < CONNECTION || state.held == 0 {
            state.fail("something else than a connection was given back");
        } else {
            state.held -= 1;
        }
        0
    })
}
