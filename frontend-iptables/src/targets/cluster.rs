//! An address that several hosts share: the `CLUSTERIP` target (extensions/libipt_CLUSTERIP.c in iptables;
//! net/ipv4/netfilter/ipt_CLUSTERIP.c of kernels up to Linux 6.2, the last to have it).

use super::terminal::steal;
use crate::extension::{Arg, Context, Extension, Families, Meaning, Opt, Options, Site, Value, base};
use crate::value::{AddressMask, Mac, Spelling};

/// The targets of this group.
pub(super) const ALL: &[Extension] = &[Extension {
    families: Families::V4,
    options: &[
        Opt::new("new", Arg::Flag),
        Opt::new("hashmode", Arg::Name(HASHES, Spelling::Exact)),
        Opt::new("clustermac", Arg::Custom { words: 1, parse: parse_group, print: print_group }),
        Opt::new("total-nodes", Arg::Number(0, NODES_MAX)),
        Opt::new("local-node", Arg::Number(0, NODES_MAX)),
        Opt::new("hash-init", Arg::Number(0, u32::MAX as u64)),
    ],
    finish: Some(|options, _| {
        let parts = ["new", "hashmode", "clustermac", "total-nodes", "local-node"];
        match options.count(&parts) {
            0 if options.given.is_empty() => Ok(()),
            5 => {
                options.default("hash-init", Value::Number(0));
                Ok(())
            }
            _ => {
                Err(format!("a cluster is made with all of `--{}`, or named with none", parts.join("`, `--")))
            }
        }
    }),
    place: Some(shared_address),
    ..base(
        "CLUSTERIP",
        Meaning::Target(|_| steal("CLUSTERIP", "takes this host's share of a cluster's connections")),
        "Takes the connections to a shared address that this host is to answer.",
    )
}];

/// `CLUSTERIP_MAX_NODES` of include/uapi/linux/netfilter_ipv4/ipt_CLUSTERIP.h.
const NODES_MAX: u64 = 16;

const HASHES: &[(&str, u64)] =
    &[("sourceip", 0), ("sourceip-sourceport", 1), ("sourceip-sourceport-destport", 2)];

fn parse_group(words: &[&str], context: &Context) -> Result<Value, String> {
    match Arg::Mac.parse(words, context)? {
        Value::Mac(Mac(bytes)) if bytes[0] & 1 == 0 => Err(format!("`{}` is no group's address", words[0])),
        group => Ok(group),
    }
}

fn print_group(group: &Value, out: &mut String) {
    if let Value::Mac(group) = group {
        out.push_str(&format!(" {group}").to_ascii_uppercase());
    }
}

/// What a cluster shares is one address (`clusterip_tg_check`), which nf_tables knows nothing of.
fn shared_address(_: &Options, site: &Site<'_>) -> Result<(), String> {
    if site.nft {
        return Err("the kernel takes `CLUSTERIP` from iptables-legacy alone".into());
    }
    match site.rule.destination.as_deref() {
        Some(given) if !given.negated && is_host(&given.value) => Ok(()),
        _ => Err("`CLUSTERIP` needs the address that is shared, `-d ADDRESS`".into()),
    }
}

fn is_host(address: &AddressMask) -> bool {
    !address.address.is_unspecified() && address.prefix_length() == Some(32)
}

#[cfg(test)]
mod tests {
    use polc_ir::hook::Semantics::{self, Legacy, Nft};
    use polc_ir::source::SourceMap;

    use crate::{ParseOptions, codes, parse};

    /// Kernels that have it refuse what shares no address.
    #[test]
    fn one_address_is_shared() {
        let cases: [(&str, Semantics, bool); 5] = [
            ("-d 192.0.2.1", Legacy, true),
            ("", Legacy, false),
            ("! -d 192.0.2.1", Legacy, false),
            ("-d 192.0.2.0/24", Legacy, false),
            ("-d 192.0.2.1", Nft, false),
        ];
        for (destination, semantics, taken) in cases {
            let mut sources = SourceMap::new();
            let file =
                sources.add("rules", format!("*filter\n-A INPUT {destination} -j CLUSTERIP\nCOMMIT\n"));
            let options = ParseOptions { semantics: Some(semantics), ..ParseOptions::default() };
            let (dump, found) = parse(&sources, file, &options);
            let found: Vec<_> = found.iter().map(|one| one.code).collect();
            let expected = if taken { vec![] } else { vec![codes::WRONG_PLACE] };
            assert_eq!(found, expected, "{destination} {semantics:?}");
            assert_eq!(crate::print(&dump, false).contains("CLUSTERIP"), taken);
        }
    }
}
