//! A network namespace with nothing in it but devices of given numbers, for programs that are run on test packets:
//! those come in by devices that exist (net/bpf/test_run.c, `xdp_convert_md_to_buff`, `convert___skb_to_skb`).

use std::collections::BTreeSet;
use std::marker::PhantomData;

use super::{NetfilterError, during, ip};
use crate::net::{self, Device};
use crate::sys::{Namespace, Sys};

/// Most devices that are made. The loopback device and the kernel's own tunnels are there without.
const MADE_MAX: usize = 64;

/// A namespace of devices. The thread that makes it is inside until it is dropped.
#[derive(Debug)]
pub struct Bare {
    sys: Sys,
    home: Namespace,
    devices: Vec<Device>,
    /// Namespaces belong to threads.
    thread: PhantomData<*const ()>,
}

impl Drop for Bare {
    fn drop(&mut self) {
        _ = self.sys.set_net_namespace(&self.home);
    }
}

impl Bare {
    /// A namespace that has devices of the numbers `wanted`, or the first of them if they are many.
    ///
    /// # Errors
    /// No root, or no `ip` command.
    pub fn new(sys: &Sys, wanted: impl Iterator<Item = u32>) -> Result<Bare, NetfilterError> {
        let home = sys.net_namespace().map_err(during("looking up the network namespace"))?;
        sys.unshare_net().map_err(during("making a network namespace"))?;
        let mut bare = Bare { sys: sys.clone(), home, devices: Vec::new(), thread: PhantomData };
        let wanted: BTreeSet<u32> = wanted.collect();
        let list = || {
            net::devices(sys).map_err(|error| NetfilterError::Refused("rtnetlink".into(), error.to_string()))
        };
        let there: BTreeSet<u32> = list()?.iter().map(|device| device.ifindex).collect();
        let last = wanted.iter().chain(&there).max().copied().unwrap_or(0);
        let mut batch = String::new();
        for (number, peer) in wanted.difference(&there).take(MADE_MAX).zip(last.saturating_add(1)..) {
            batch += &format!(
                "link add name polc{number} index {number} address 02:00:00:00:00:02 type veth \
                 peer name polc{peer} index {peer}\n"
            );
        }
        if !batch.is_empty() {
            ip(&batch)?;
        }
        bare.devices = list()?;
        Ok(bare)
    }

    /// The device of that number.
    pub fn device(&self, ifindex: u32) -> Option<&Device> {
        self.devices.iter().find(|device| device.ifindex == ifindex)
    }
}
