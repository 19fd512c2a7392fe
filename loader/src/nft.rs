//! Which tables nf_tables has: rules there that no iptables wrote are nobody's here to judge.
//!
//! Asked over nfnetlink (include/uapi/linux/netfilter/nf_tables.h).

use std::io;

use crate::error::Error;
use crate::net::{attributes, text};
use crate::sys::{NetlinkRequest, Sys};

/// `NFNL_SUBSYS_NFTABLES` and `NFT_MSG_GETTABLE`; `NFT_MSG_NEWTABLE` is 0.
const GET_TABLE: u16 = 10 << 8 | 1;
const NEW_TABLE: u16 = 10 << 8;
/// Bytes of `struct nfgenmsg`: family, version, resource.
const HEADER_BYTES: usize = 4;
const NFTA_TABLE_NAME: u16 = 1;

/// A table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// `NFPROTO_*` of include/uapi/linux/netfilter.h.
    pub family: u8,
    /// Its name.
    pub name: String,
}

impl Table {
    /// The family as nft(8) writes it, if polc knows it.
    pub fn family_name(&self) -> &'static str {
        match self.family {
            1 => "inet",
            2 => "ip",
            3 => "arp",
            5 => "netdev",
            7 => "bridge",
            10 => "ip6",
            _ => "?",
        }
    }
}

/// All tables of the network namespace.
///
/// # Errors
/// The kernel does not tell.
pub fn tables(sys: &Sys) -> Result<Vec<Table>, Error> {
    let request =
        NetlinkRequest { kind: GET_TABLE, flags: NetlinkRequest::DUMP, body: vec![0; HEADER_BYTES] };
    let answers = match sys.nfnetlink(&request) {
        // A kernel without nf_tables, or whose module nobody has needed yet.
        Err(error) if [libc::EINVAL, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT].contains(&errno(&error)) => {
            Vec::new()
        }
        answers => answers.map_err(Error::call("list the tables of nf_tables"))?,
    };
    let table = |body: &[u8]| {
        let family = *body.first()?;
        let name = attributes(body.get(HEADER_BYTES..)?).find(|(kind, _)| *kind == NFTA_TABLE_NAME)?;
        Some(Table { family, name: text(name.1) })
    };
    Ok(answers.iter().filter(|answer| answer.kind == NEW_TABLE).filter_map(|a| table(&a.body)).collect())
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}
