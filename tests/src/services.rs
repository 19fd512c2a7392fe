//! A dump of the size and shape of the largest that was found: kube-proxy's, for a cluster of many services.

use std::fmt::Write as _;

/// Endpoints of a service.
const ENDPOINTS: usize = 9;

/// The rules of so many services: a chain for each, a chain for each of its endpoints, connections spread by chance.
/// A service has 29 rules and 10 chains.
pub fn services(count: usize) -> String {
    let mut chains = String::new();
    let mut portals = String::new();
    let mut rules = String::new();
    for service in 0..count {
        let address = format!("10.96.{}.{}", service / 250, service % 250 + 1);
        let port = [80, 443, 8080, 9090][service % 4];
        let of_service =
            format!("-d {address}/32 -p tcp -m comment --comment \"team/app-{service} cluster IP\"");
        let mut write = |text: std::fmt::Arguments<'_>| rules.write_fmt(text).expect("strings take text");
        _ = writeln!(chains, ":SVC-{service:05} - [0:0]");
        _ = writeln!(portals, "-A SERVICES {of_service} -m tcp --dport {port} -j SVC-{service:05}");
        write(format_args!(
            "-A SVC-{service:05} ! -s 10.244.0.0/16 {of_service} -m tcp --dport {port} -j MARK-MASQ\n"
        ));
        for endpoint in 0..ENDPOINTS {
            let number = service * ENDPOINTS + endpoint;
            let pod = format!("10.244.{}.{}", number / 250 % 256, number % 250 + 1);
            let left = ENDPOINTS - endpoint;
            let chance = match left {
                1 => String::new(),
                left => format!(" -m statistic --mode random --probability {:.11}", 1.0 / left as f64),
            };
            _ = writeln!(chains, ":SEP-{number:06} - [0:0]");
            write(format_args!("-A SVC-{service:05}{chance} -j SEP-{number:06}\n"));
            write(format_args!("-A SEP-{number:06} -s {pod}/32 -j MARK-MASQ\n"));
            write(format_args!(
                "-A SEP-{number:06} -p tcp -m tcp -j DNAT --to-destination {pod}:{}\n",
                8080 + service % 3
            ));
        }
    }
    format!(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n\
         :MARK-MASQ - [0:0]\n:SERVICES - [0:0]\n{chains}\
         -A PREROUTING -j SERVICES\n-A OUTPUT -j SERVICES\n\
         -A MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n{portals}{rules}COMMIT\n\
         *filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
         -A INPUT ! -s 127.0.0.0/8 -d 127.0.0.0/8 -j DROP\n\
         -A FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\nCOMMIT\n"
    )
}

#[cfg(test)]
mod tests {
    use polc_frontend_iptables::{ParseOptions, parse};
    use polc_ir::source::SourceMap;

    use super::*;

    #[test]
    fn a_service_has_29_rules() {
        let mut sources = SourceMap::new();
        let file = sources.add("services.v4.rules", services(1_470));
        let (dump, diagnostics) = parse(&sources, file, &ParseOptions::default());
        assert!(diagnostics.is_empty(), "{:?}", diagnostics[0]);
        assert_eq!(dump.tables.iter().map(|table| table.rules.len()).sum::<usize>(), 29 * 1_470 + 6);
    }
}
