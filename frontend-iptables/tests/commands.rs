//! What lines other than `-A` do to a table, and words that stand for more than they spell: as iptables 1.8.9 has them.

use polc_frontend_iptables::{ParseOptions, parse, print};
use polc_ir::diag::Severity;
use polc_ir::hook::Family;
use polc_ir::source::SourceMap;

/// A filter table's own text, or the errors it gives.
fn read(lines: &str, family: Family) -> Result<String, Vec<String>> {
    let mut sources = SourceMap::new();
    let file = sources.add("rules", format!("*filter\n{lines}COMMIT\n"));
    let options = ParseOptions { family: Some(family), ..ParseOptions::default() };
    let (dump, findings) = parse(&sources, file, &options);
    let errors = findings.into_iter().filter(|found| found.severity == Severity::Error);
    let errors: Vec<String> = errors.map(|found| found.message).collect();
    if errors.is_empty() { Ok(print(&dump, false)) } else { Err(errors) }
}

/// The rules and user chains that are left.
fn left(lines: &str) -> Vec<String> {
    let text = read(lines, Family::V4).expect("no errors");
    let own = |line: &&str| line.starts_with("-A") || line.starts_with(':') && line.contains(" - ");
    text.lines().filter(own).map(String::from).collect()
}

fn errors(lines: &str) -> Vec<String> {
    read(lines, Family::V4).expect_err("an error")
}

#[test]
fn flushing_without_a_chain_flushes_all() {
    assert_eq!(left("-A INPUT -j DROP\n-A OUTPUT -j DROP\n-F\n"), Vec::<String>::new());
    assert_eq!(left("-A INPUT -j DROP\n-F\n-A INPUT -j ACCEPT\n"), ["-A INPUT -j ACCEPT"]);
    assert_eq!(left("-A INPUT -j DROP\n-A OUTPUT -j DROP\n-F INPUT\n"), ["-A OUTPUT -j DROP"]);
}

#[test]
fn chains_are_deleted_when_nothing_holds_them() {
    assert_eq!(left("-N a\n-N b\n-X\n"), Vec::<String>::new());
    assert_eq!(left("-N a\n-A INPUT -j a\n-F INPUT\n-X a\n"), Vec::<String>::new());
    assert_eq!(left("-N a\n-A INPUT -j a\n-D INPUT 1\n-X a\n"), Vec::<String>::new());
    assert_eq!(left("-N a\n-A INPUT -j a\n-R INPUT 1 -j DROP\n-X a\n"), ["-A INPUT -j DROP"]);
    assert_eq!(
        errors("-N a\n-A INPUT -j a\n-X a\n"),
        ["chain `a` is where rules lead to and can't be deleted"]
    );
    assert_eq!(errors("-N a\n-A a -j DROP\n-X\n"), ["chain `a` has rules and can't be deleted"]);
    assert_eq!(errors("-X INPUT\n"), ["chain `INPUT` is a base chain and can't be deleted"]);
}

#[test]
fn inserted_rules_come_first() {
    let lines =
        "-A INPUT -s 1.1.1.1\n-I INPUT -s 2.2.2.2\n-I INPUT 2 -s 3.3.3.3,4.4.4.4\n-R INPUT 1 -s 5.5.5.5\n";
    let sources: Vec<String> = left(lines).iter().map(|line| line[12..].to_string()).collect();
    assert_eq!(sources, ["5.5.5.5/32", "4.4.4.4/32", "3.3.3.3/32", "1.1.1.1/32"]);
}

#[test]
fn nothing_leads_to_base_chains() {
    for line in ["-A INPUT -j OUTPUT\n", "-A INPUT -g FORWARD\n", "-N a\n-A a -j INPUT\n"] {
        let found = errors(line);
        assert!(matches!(&found[..], [error] if error.contains("is a base chain")), "{found:?}");
    }
}

#[test]
fn many_commands_take_their_time_in_proportion() {
    const COUNT: usize = 50_000;
    let mut lines: String = (0..COUNT).map(|number| format!("-N c{number}\n-I INPUT -j ACCEPT\n")).collect();
    lines.extend((0..COUNT).map(|number| format!("-X c{number}\n")));
    assert_eq!(left(&lines).len(), COUNT);
    // Rules are found by what they ask, be they all alike or all different, and wherever lines put them.
    let rule = |number: usize| format!("-s 10.{}.{}.{}", number >> 16, number >> 8 & 255, number & 255);
    let mut lines: String = (0..COUNT).map(|number| format!("-A INPUT {}\n", rule(number))).collect();
    lines.extend((0..COUNT).rev().map(|number| format!("-I INPUT 2\n-C INPUT\n-D INPUT {}\n", rule(number))));
    lines.extend((0..COUNT).map(|_| "-D INPUT\n"));
    assert_eq!(left(&lines), [""; 0]);
}

#[test]
fn whole_names_go_before_what_they_begin() {
    let read = |types: &str| read(&format!("-A INPUT -p mh -m mh --mh-type {types}\n"), Family::V6);
    let kept = |types: &str| {
        let text = read(types).expect("read");
        let line = text.lines().find(|line| line.starts_with("-A")).expect("a rule").to_string();
        line.rsplit(' ').next().expect("words").to_string()
    };
    for (types, numbers) in
        [("home-test", "3"), ("hot", "3"), ("home-test-init", "1"), ("careof-test", "4"), ("hoti:cot", "1:4")]
    {
        assert_eq!(kept(types), numbers, "{types}");
    }
    assert_eq!(read("5:1"), Err(vec!["`5:1` ends before it begins".to_string()]));
}

#[test]
fn services_of_any_protocol_are_ports_of_udp() {
    assert_eq!(left("-A INPUT -p udp --dport ssh\n"), ["-A INPUT -p udp -m udp --dport 22"]);
    assert_eq!(left("-A INPUT -p dccp --dport http\n"), ["-A INPUT -p dccp -m dccp --dport 80"]);
    assert!(errors("-A INPUT -p tcp --dport tftp\n")[0].contains("`tftp` is not a port"));
}

#[test]
fn packet_types_are_whole_names() {
    let type_of = |name: &str| left(&format!("-A INPUT -m pkttype --pkt-type {name}\n"));
    assert_eq!(type_of("otherhost"), ["-A INPUT -m pkttype --pkt-type otherhost"]);
    assert_eq!(type_of("bcast"), ["-A INPUT -m pkttype --pkt-type broadcast"]);
    assert!(errors("-A INPUT -m pkttype --pkt-type uni\n")[0].contains("none of unicast"));
}

#[test]
fn rates_in_bytes_are_kept_as_what_they_cost() {
    let rate = |text: &str| {
        let kept = left(&format!("-A INPUT -m hashlimit --hashlimit-above {text} --hashlimit-name a\n"));
        kept[0].split(' ').nth(5).expect("a rate").to_string()
    };
    for (given, kept) in
        [("5kb/s", "5kb/s"), ("100b/s", "96b/s"), ("1000mb/s", "1008mb/s"), ("1024kb/s", "1mb/s")]
    {
        assert_eq!(rate(given), kept, "{given}");
    }
}

#[test]
fn rules_are_deleted_and_looked_for_by_what_they_ask() {
    assert_eq!(left("-A INPUT -j DROP\n-A INPUT -j DROP\n-D INPUT -j DROP\n"), ["-A INPUT -j DROP"]);
    for (given, like) in [
        ("-p tcp --dport 80 -j DROP", "-p tcp -m tcp --dport 80 -j DROP"),
        ("-m limit --limit 5/s --limit-burst 3", "-m limit --limit-burst 3 --limit 5/second"),
        ("-m string --algo bm --string a", "-m string --algo bm --hex-string |61|"),
        ("-s 1.1.1.1,2.2.2.2 -j DROP", "-s 1.1.1.1,2.2.2.2 -j DROP"),
        ("-c 5 6 -j DROP", "-j DROP"),
        ("-p tcp --dport 0:65535", "-p tcp -m tcp"),
    ] {
        assert_eq!(
            left(&format!("-A INPUT {given}\n-C INPUT {like}\n-D INPUT {like}\n")),
            [""; 0],
            "{given}"
        );
    }
    for (given, other) in [
        ("-p udp --dport 80 -j DROP", "-p udp -j DROP"),
        ("-m mark --mark 1 -m mark --mark 2", "-m mark --mark 2 -m mark --mark 1"),
        ("-m comment --comment x -j DROP", "-j DROP"),
    ] {
        for command in ["-D", "-C"] {
            let found = errors(&format!("-A INPUT {given}\n{command} INPUT {other}\n"));
            assert_eq!(found, ["chain `INPUT` has no such rule"], "{given}");
        }
    }
    // IPv6 notes that a protocol was named, even if it is `all`.
    assert!(read("-A INPUT -p all -j DROP\n-D INPUT -j DROP\n", Family::V4).is_ok());
    assert!(read("-A INPUT -p all -j DROP\n-D INPUT -j DROP\n", Family::V6).is_err());
}

#[test]
fn user_chains_take_names_that_no_chain_has() {
    assert_eq!(
        left(":a - [0:0]\n-A INPUT -j a\n-E a b\n-A b -j DROP\n"),
        [":b - [0:0]", "-A INPUT -j b", "-A b -j DROP"]
    );
    for line in ["-E INPUT x\n", "-E a INPUT\n", "-E a a\n", "-E a ACCEPT\n", "-E nosuch x\n"] {
        errors(&format!(":a - [0:0]\n{line}"));
    }
}

#[test]
fn declared_chains_have_names_that_no_command_makes() {
    assert_eq!(left(":!x - [0:0]\n-A !x -j DROP\n"), [":!x - [0:0]", "-A !x -j DROP"]);
    assert_eq!(left(":LOG - [0:0]\n-A INPUT -j LOG\n"), [":LOG - [0:0]", "-A INPUT -j LOG"]);
    for line in ["-N !x\n", "-N -x\n", "-N LOG\n", "-N ACCEPT\n", ":ACCEPT - [0:0]\n"] {
        assert!(errors(line)[0].contains("can't be a chain's name"), "{line}");
    }
    assert_eq!(left(":x - foo\n:INPUT DROP 0:0\n"), [":x - [0:0]"]);
}

#[test]
fn what_no_packet_reaches_is_not_judged() {
    let owner = "-m owner --uid-owner 0";
    for lines in [
        ":a - [0:0]\n-A a -j a\n".to_string(),
        ":a - [0:0]\n:b - [0:0]\n-A a -j b\n-A b -j a\n".to_string(),
        ":a - [0:0]\n-A INPUT -j DROP\n-A INPUT -j a\n-A a -j a\n".to_string(),
        format!(":a - [0:0]\n-A a {owner}\n"),
        format!("-A INPUT -j RETURN\n-A INPUT {owner}\n"),
        format!(":a - [0:0]\n-A OUTPUT -j a\n-A a {owner}\n"),
    ] {
        assert!(read(&lines, Family::V4).is_ok(), "{lines}");
    }
    for lines in [
        ":a - [0:0]\n-A INPUT -j a\n-A a -j a\n".to_string(),
        ":a - [0:0]\n-A INPUT -p tcp -j DROP\n-A INPUT -j a\n-A a -j a\n".to_string(),
        format!(":a - [0:0]\n-A INPUT -j a\n-A OUTPUT -j a\n-A a {owner}\n"),
        format!("-A INPUT -j LOG\n-A INPUT {owner}\n"),
        format!("-A FORWARD -i + -j DROP\n-A FORWARD {owner}\n"),
    ] {
        assert!(read(&lines, Family::V4).is_err(), "{lines}");
    }
    // IPv6 notes that a protocol was named, and goes on.
    let all = format!("-A INPUT -p all -j DROP\n-A INPUT {owner}\n");
    assert!(read(&all, Family::V4).is_ok() && read(&all, Family::V6).is_err());
}

#[test]
fn lines_end_at_a_nul() {
    assert_eq!(left("-A INPUT -m comment --comment x\0y -j DROP\n"), ["-A INPUT -m comment --comment x"]);
}

#[test]
fn measured_rates_are_printed_in_bits() {
    for (given, kept) in [
        (
            "--rateest RE1 --rateest-gt --rateest-bps 5kbit",
            "--rateest RE1 --rateest-gt --rateest-bps 5000bit",
        ),
        (
            "--rateest RE1 --rateest-lt --rateest-bps 1Mibit",
            "--rateest RE1 --rateest-lt --rateest-bps 1049Kbit",
        ),
        ("--rateest RE1 --rateest-lt --rateest-bps", "--rateest RE1 --rateest-lt --rateest-bps 0bit"),
        (
            "--rateest1 RE1 --rateest2 RE2 ! --rateest-lt --rateest-pps",
            "--rateest1 RE1 ! --rateest-lt --rateest-pps --rateest2 RE2",
        ),
        (
            "--rateest-delta --rateest RE1 --rateest-lt --rateest-bps 16bit",
            "--rateest-delta --rateest RE1 --rateest-bps1 0bit --rateest-lt --rateest-bps2 16bit",
        ),
    ] {
        let kept = format!("-A INPUT -m rateest {kept}");
        assert_eq!(left(&format!("-A INPUT -m rateest {given}\n")), [kept]);
    }
}

#[test]
fn numbers_past_any_bound_are_refused() {
    const HUGE: &str = "18446744073709551615";
    for options in [
        format!("-m time --timestart {HUGE}:0"),
        format!("-m time --datestop {HUGE}-{HUGE}"),
        format!("-m hashlimit --hashlimit-name a --hashlimit-upto {HUGE}mb/s"),
        format!("-m hashlimit --hashlimit-name a --hashlimit-upto 5kb/s --hashlimit-burst {HUGE}mb"),
        format!("-m limit --limit {HUGE}/day"),
        format!("-m cluster --cluster-total-nodes 32 --cluster-local-node {HUGE} --cluster-hash-seed 1"),
        format!("-m statistic --mode random --probability 0x1p{HUGE}"),
    ] {
        errors(&format!("-A INPUT {options}\n"));
    }
}
