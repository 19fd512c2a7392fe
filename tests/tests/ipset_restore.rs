//! Made-up ipset files, full of ranges that overlap and masks: the line that is refused first is the one that
//! `ipset restore` refuses, or none is.

use std::process::Command;

use polc_frontend_iptables::ipset;
use polc_ir::diag::Severity;
use polc_ir::source::SourceMap;
use polc_tests::kernel::{Namespace, feed, has_tools, may_run};

/// Types that most kernels have, with the parts of their elements.
const SETS: [(&str, &[&str]); 16] = [
    ("hash:ip", &["host"]),
    ("hash:ip netmask 29", &["host"]),
    ("hash:ip netmask 28 maxelem 3", &["host"]),
    ("hash:ip bitmask 255.255.255.248", &["host"]),
    ("hash:ip maxelem 12", &["host"]),
    ("hash:ip,port", &["host", "port"]),
    ("hash:ip,port netmask 30", &["host", "port"]),
    ("hash:ip,port maxelem 9", &["host", "port"]),
    ("hash:ip,port,ip", &["host", "port", "one"]),
    ("hash:ip,port,net", &["host", "port", "net"]),
    ("hash:net", &["net"]),
    ("hash:net,port", &["net", "port"]),
    ("hash:net,iface", &["net", "device"]),
    ("bitmap:ip range 10.0.0.0/24", &["host"]),
    ("bitmap:ip range 10.0.0.0/24 netmask 29", &["host"]),
    ("bitmap:port range 0-99", &["number"]),
];

/// A generator of numbers (Marsaglia, "Xorshift RNGs", 2003).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn address(&mut self) -> String {
        format!("10.0.0.{}", self.below(48))
    }

    /// `forwards`: ranges don't run backwards.
    fn part(&mut self, kind: &str, forwards: bool) -> String {
        match (kind, self.below(6)) {
            ("host", 0 | 1) if forwards => {
                let first = self.below(48);
                format!("10.0.0.{first}-10.0.0.{}", first + self.below(30))
            }
            ("host" | "net", 0 | 1) => format!("{}-{}", self.address(), self.address()),
            ("host" | "net", 2) => format!("{}/{}", self.address(), 27 + self.below(6)),
            ("host" | "net" | "one", _) => self.address(),
            ("port", 0) => format!("udp:{}", self.below(12)),
            ("port", 1) => format!("icmp:{}/0", self.below(3)),
            ("port" | "number", 2 | 3) => format!("{}-{}", self.below(12), self.below(12)),
            ("port" | "number", _) => self.below(12).to_string(),
            _ => format!("eth{}", self.below(2)),
        }
    }

    fn text(&mut self, (create, parts): (&str, &[&str])) -> String {
        // In steps ipset makes addresses of a range that runs backwards that nothing finds; here it is refused.
        let forwards = create.starts_with("hash:ip netmask");
        let mut text = format!("create s {create}\n");
        for _ in 0..2 + self.below(6) {
            let parts: Vec<String> = parts.iter().map(|kind| self.part(kind, forwards)).collect();
            text.push_str(&format!("add s {}\n", parts.join(",")));
        }
        text
    }
}

/// The line that the tool refuses.
fn theirs(text: &str) -> Option<u32> {
    let (taken, said) = feed("ipset", &["restore"], text);
    let line = said.split("Error in line ").nth(1).and_then(|rest| rest.split(':').next()?.parse().ok());
    assert_eq!(line.is_none(), taken, "{said}\n{text}");
    line
}

/// The line that is refused here.
fn ours(text: &str) -> Option<u32> {
    let mut sources = SourceMap::new();
    let file = sources.add("sets", text);
    let (_, found) = ipset::parse(&sources, file);
    let error = found.into_iter().find(|one| one.severity == Severity::Error)?;
    Some(sources.line_column(error.span.expect("it has a place")).line)
}

#[test]
fn what_is_refused_first_is_what_ipset_refuses() {
    let name = "what_is_refused_first_is_what_ipset_refuses";
    if !may_run(name) || !has_tools(name, &["ipset", "ip"]) {
        return;
    }
    let _namespace = Namespace::enter("ipset-restore");
    let each = if std::env::var_os("POLC_LONG").is_some() { 1000 } else { 25 };
    let (mut random, mut refused) = (Random(0x2545_f491_4f6c_dd1d), 0);
    let mut wrong = Vec::new();
    for set in SETS {
        for _ in 0..each {
            let text = random.text(set);
            let (theirs, ours) = (theirs(&text), ours(&text));
            refused += usize::from(theirs.is_some());
            if theirs != ours {
                wrong.push(format!("{text}ipset refuses line {theirs:?}, polc {ours:?}"));
            }
            assert!(Command::new("ipset").arg("destroy").status().is_ok_and(|status| status.success()));
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong[..wrong.len().min(12)].join("\n"));
    assert!(refused > SETS.len() * each / 4, "{refused} refused");
}
