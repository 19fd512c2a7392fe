//! ipset files against what ipset 7.17 itself reads, saves and refuses.

use polc_frontend_iptables::ipset::{self, Sets};
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::entities::Set;
use polc_ir::hook::{Family, Semantics};
use polc_ir::ruleset::Ruleset;
use polc_ir::set::SetContents;
use polc_ir::source::SourceMap;
use proptest::prelude::*;

fn read(text: &str) -> (SourceMap, Sets, Vec<Diagnostic>) {
    let mut sources = SourceMap::new();
    let file = sources.add("sets", text);
    let (sets, diagnostics) = ipset::parse(&sources, file);
    (sources, sets, diagnostics)
}

/// What is restored, and what `ipset save` prints of it, seeds and the order within a hash aside.
const SAVED: &[(&str, &str)] = &[
    (
        "create a hash:ip timeout 300 counters comment skbinfo\n\
         add a 1.2.3.4 timeout 10 packets 3 bytes 4 comment \"x y\" skbmark 0x1/0xff skbprio 1:10 skbqueue 3",
        "create a hash:ip family inet hashsize 1024 maxelem 65536 timeout 300 counters comment skbinfo\n\
         add a 1.2.3.4 timeout 10 packets 3 bytes 4 comment \"x y\" skbmark 0x1/0xff skbprio 1:10 skbqueue 3",
    ),
    (
        "create b hash:net,port\nadd b 10.0.0.0/8,tcp:80\nadd b 10.1.0.1/16,icmp:echo-request nomatch\n\
         add b 10.2.0.0/16,gre:0\nadd b 10.3.0.0/16,53",
        "create b hash:net,port family inet hashsize 1024 maxelem 65536\nadd b 10.0.0.0/8,tcp:80\n\
         add b 10.1.0.0/16,icmp:echo-request nomatch\nadd b 10.2.0.0/16,gre:0\nadd b 10.3.0.0/16,tcp:53",
    ),
    (
        "create c hash:net\nadd c 1.2.3.0-1.2.3.9",
        "create c hash:net family inet hashsize 1024 maxelem 65536\nadd c 1.2.3.0/29\nadd c 1.2.3.8/31",
    ),
    ("create d bitmap:port range 1-1000\nadd d tcp:90", "create d bitmap:port range 1-1000\nadd d 90"),
    (
        "create e bitmap:ip range 10.0.0.0/24 netmask 28\nadd e 10.0.0.17",
        "create e bitmap:ip range 10.0.0.0-10.0.0.255 netmask 28\nadd e 10.0.0.16",
    ),
    (
        "create e bitmap:ip range 10.0.0.20-10.0.0.5 netmask 28\nadd e 10.0.0.1",
        "create e bitmap:ip range 10.0.0.0-10.0.0.31 netmask 28\nadd e 10.0.0.0",
    ),
    (
        "create a hash:ip netmask 32\ncreate b hash:ip,port family inet6 netmask 128\n\
         create c bitmap:ip range 10.0.0.5-10.0.0.20 netmask 32\ncreate d hash:ip bitmask 255.255.255.255",
        "create a hash:ip family inet hashsize 1024 maxelem 65536\n\
         create b hash:ip,port family inet6 hashsize 1024 maxelem 65536\n\
         create c bitmap:ip range 10.0.0.5-10.0.0.20\ncreate d hash:ip family inet hashsize 1024 maxelem 65536",
    ),
    (
        "create f bitmap:ip,mac range 10.0.0.0-10.0.0.255\nadd f 10.0.0.1,00:1a:22:33:44:55\nadd f 10.0.0.2",
        "create f bitmap:ip,mac range 10.0.0.0-10.0.0.255\nadd f 10.0.0.1,00:1A:22:33:44:55\nadd f 10.0.0.2",
    ),
    (
        "create g hash:net,iface\nadd g 0.0.0.0/0,eth0\nadd g 1.2.3.0/24,physdev:eth1 nomatch",
        "create g hash:net,iface family inet hashsize 1024 maxelem 65536\nadd g 0.0.0.0/0,eth0\n\
         add g 1.2.3.0/24,physdev:eth1 nomatch",
    ),
    (
        "create h hash:ip,mark markmask 0xff\nadd h 1.2.3.4,0x1ff",
        "create h hash:ip,mark family inet markmask 0x000000ff hashsize 1024 maxelem 65536\n\
         add h 1.2.3.4,0x000000ff",
    ),
    (
        "create k hash:ip family inet6 netmask 64\nadd k 2001:db8::1",
        "create k hash:ip family inet6 hashsize 1024 maxelem 65536 netmask 64\nadd k 2001:db8::",
    ),
    (
        "create a hash:ip\ncreate b hash:ip\ncreate i list:set size 4\nadd i a\nadd i b before a",
        "create a hash:ip family inet hashsize 1024 maxelem 65536\n\
         create b hash:ip family inet hashsize 1024 maxelem 65536\ncreate i list:set size 4\nadd i b\nadd i a",
    ),
    (
        "create n hash:ip,port,net\nadd n 1.2.3.4,udp:53,10.0.0.0/8",
        "create n hash:ip,port,net family inet hashsize 1024 maxelem 65536\nadd n 1.2.3.4,udp:53,10.0.0.0/8",
    ),
];

#[test]
fn sets_print_as_ipset_saves_them() {
    for (text, saved) in SAVED {
        let (_, sets, diagnostics) = read(text);
        let errors: Vec<_> = diagnostics.iter().filter(|it| it.severity == Severity::Error).collect();
        assert!(errors.is_empty(), "{text}: {errors:?}");
        let printed = ipset::print(&sets);
        assert_eq!(printed.trim_end(), *saved);
        assert_eq!(ipset::print(&read(&printed).1), printed, "printing twice");
    }
}

/// What ipset refuses, and the text at fault.
const REFUSED: &[(&str, &str)] = &[
    ("create c hash:net\nadd c 0.0.0.0/0", "0.0.0.0/0"),
    ("create c hash:net\nadd c 1.2.3.4\nadd c 1.2.3.4", "1.2.3.4"),
    ("create c hash:net,port\nadd c 0.0.0.0/0,80", "0.0.0.0/0"),
    ("create c hash:ip\nadd c ::1", "::1"),
    ("create c hash:ip family inet6\nadd c 2001:db8::/64", "2001:db8::/64"),
    ("create c hash:ip maxelem 1\nadd c 1.1.1.1\nadd c 1.1.1.2", "1.1.1.2"),
    ("create c hash:ip\nadd c 1.1.1.1 timeout 3", "timeout"),
    ("create c hash:ip\nadd c 1.1.1.1 nomatch", "nomatch"),
    ("create c hash:ip\nadd c 1.1.1.1,80", "1.1.1.1,80"),
    ("create c hash:ip,port\nadd c 1.1.1.1,http-nonsense", "http-nonsense"),
    ("create c bitmap:ip range 10.0.0.0/30\nadd c 10.0.0.4", "10.0.0.4"),
    ("create c bitmap:port", "bitmap:port"),
    (
        "create c bitmap:ip range 10.0.0.5-10.0.0.3 netmask 24",
        "create c bitmap:ip range 10.0.0.5-10.0.0.3 netmask 24",
    ),
    (
        "create c bitmap:ip range 10.0.0.16-10.0.0.63 netmask 28",
        "create c bitmap:ip range 10.0.0.16-10.0.0.63 netmask 28",
    ),
    ("create c bitmap:ip range 10.0.0.5-10.0.0.20 netmask 28\nadd c 10.0.0.32", "10.0.0.32"),
    ("create c hash:foo", "hash:foo"),
    ("create c hash:ip\ncreate c hash:ip", "c"),
    ("create c hash:ip netmask 0", "0"),
    ("create c hash:ip\nadd c 0.0.0.0", "0.0.0.0"),
    ("create c hash:ip,port family inet6\nadd c ::,80", "::"),
    ("create c hash:ip netmask 24\nadd c 0.0.0.7", "0.0.0.7"),
    ("create c hash:ip\nadd c 1.1.1.0/0", "1.1.1.0/0"),
    ("create c hash:ip netmask 24\nadd c 1.1.1.1\nadd c 1.1.1.2", "1.1.1.2"),
    ("create c hash:ip bitmask 255.0.255.0\nadd c 1.1.1.1\nadd c 1.2.1.1", "1.2.1.1"),
    ("create c bitmap:ip range 10.0.0.0/15", "create c bitmap:ip range 10.0.0.0/15"),
    ("create c hash:net,iface\nadd c 10.0.0.0/8,", ""),
    (
        "create c bitmap:ip,mac range 10.0.0.0/16\nadd c 10.0.0.1,02:00:00:00:00:01\nadd c 10.0.0.1,02:00:00:00:00:02",
        "10.0.0.1,02:00:00:00:00:02",
    ),
    ("create c hash:ip\nadd c 1.1.1.1-1.1.1.5\nadd c 1.1.1.3", "1.1.1.3"),
    ("create c hash:ip\nadd c 1.1.1.3\nadd c 1.1.1.5-1.1.1.1", "1.1.1.5-1.1.1.1"),
    ("create c hash:ip netmask 28\nadd c 1.1.1.7\nadd c 1.1.1.9-1.1.1.30", "1.1.1.9-1.1.1.30"),
    ("create c hash:ip,port netmask 16\nadd c 1.1.2.4-1.1.2.5,80\nadd c 1.1.0.77,80", "1.1.0.77,80"),
    ("create c hash:ip maxelem 4\nadd c 1.1.1.1-1.1.1.5", "1.1.1.1-1.1.1.5"),
    ("create c hash:ip\nadd c 10.0.0.0/8", "10.0.0.0/8"),
    (
        "create c bitmap:ip range 10.0.0.0/24\nadd c 10.0.0.0/28\nadd c 10.0.0.15-10.0.0.17",
        "10.0.0.15-10.0.0.17",
    ),
    ("create c bitmap:port range 0-99\nadd c 10-20\nadd c 20-30", "20-30"),
    ("create c hash:ip,port\nadd c 1.1.1.1,tcp:80-90\nadd c 1.1.1.0/30,85", "1.1.1.0/30,85"),
    ("create c hash:ip,port family inet6\nadd c ::1,80-82\nadd c ::1,79\nadd c ::1,81", "::1,81"),
    (
        "create c hash:ip,port,ip\nadd c 1.1.1.1-1.1.1.3,8-9,2.2.2.2\nadd c 1.1.1.3,9,2.2.2.3\nadd c 1.1.1.3,9,2.2.2.2",
        "1.1.1.3,9,2.2.2.2",
    ),
    ("create c hash:net\nadd c 1.1.1.1-1.1.1.9\nadd c 1.1.1.8/30\nadd c 1.1.1.8/31", "1.1.1.8/31"),
    ("create c hash:net,port\nadd c 1.0.0.0-1.0.0.9,80-90\nadd c 1.0.0.8/31,85", "1.0.0.8/31,85"),
    ("create c hash:net\nadd c 0.0.0.0-255.255.255.255", "0.0.0.0-255.255.255.255"),
    ("add c 1.1.1.1", "c"),
    ("create l list:set\nadd l x", "x"),
    ("destroy", "destroy"),
    ("flush y", "y"),
    ("create c hash:ip comment\nadd c 1.1.1.1 comment \"x", "\"x"),
];

#[test]
fn what_ipset_refuses_is_pointed_at() {
    for (text, part) in REFUSED {
        let (sources, _, diagnostics) = read(text);
        let error = diagnostics.iter().find(|it| it.severity == Severity::Error);
        let span = error.unwrap_or_else(|| panic!("accepted: {text}")).span.expect("an error has a place");
        assert_eq!(sources.text(span), *part, "{text}: {}", error.map_or("", |it| &it.message));
        let last_line = text.lines().count() as u32;
        assert_eq!(sources.line_column(span).line, last_line, "{text}");
    }
}

#[test]
fn what_exists_is_given_anew_where_it_may() {
    let created = "create a hash:net comment\nadd a 10.0.0.0/8 comment old\nadd a 11.0.0.0/8\n";
    let printed = |more: &str| {
        let (_, sets, diagnostics) = read(&format!("{created}{more}"));
        let again = usize::from(more.starts_with("add -exist"));
        assert!(diagnostics.iter().all(|finding| finding.severity == Severity::Warning), "{diagnostics:?}");
        assert_eq!(diagnostics.len(), again, "{more}: {diagnostics:?}");
        ipset::print(&sets)
    };
    assert_eq!(printed("create a hash:net comment hashsize 64 -exist\nadd a 11.0.0.0/8 -exist"), printed(""));
    let anew = printed("add -exist a 10.0.0.0/8 nomatch comment new\n");
    assert_eq!(anew, printed("").replace("old", "new").replace("10.0.0.0/8", "10.0.0.0/8 nomatch"));
    assert_eq!(
        printed("flush a\nadd a 11.0.0.0/8"),
        printed("").replace("add a 10.0.0.0/8 comment \"old\"\n", "")
    );
    assert_eq!(printed("flush"), printed("").lines().next().map(|line| format!("{line}\n")).expect("one"));
    for wrong in
        ["create a hash:net -exist", "create a hash:ip comment -exist", "add a 11.0.0.0/8", "flush b"]
    {
        let (_, _, diagnostics) = read(&format!("{created}{wrong}"));
        assert_eq!(diagnostics.len(), 1, "{wrong}");
        assert_eq!(diagnostics[0].severity, Severity::Error, "{wrong}");
    }
}

/// `-exist` is for everything behind it, but not for the rest of what `ipset` sends in one message with lines before it.
#[test]
fn from_where_it_is_said_on_everything_may_exist() {
    let found = |lines: &str| {
        let text = format!("create s hash:ip\ncreate t hash:ip\n{lines}\n");
        read(&text).2.into_iter().map(|one| one.severity).collect::<Vec<_>>()
    };
    assert_eq!(found("add -exist s 1.1.1.1\nadd t 1.1.1.1\nadd t 1.1.1.1\nadd s 1.1.1.0-1.1.1.3"), []);
    assert_eq!(found("add s 1.1.1.1\nadd t 1.1.1.1\nadd s 1.1.1.1 -exist\ncreate t hash:ip"), []);
    assert_eq!(found("add s 1.1.1.1\n\n# s\nadd -! s 1.1.1.1"), [Severity::Warning]);
    assert_eq!(found("add s 1.1.1.1\nadd s 1.1.1.1\n-exist add t 1.1.1.1"), [Severity::Error]);
}

/// Ranges may overlap where what exists may be given again, but not where the last would decide.
#[test]
fn ranges_overlap_where_they_may() {
    let found = |text: &str| read(text).2.into_iter().map(|one| one.severity).collect::<Vec<_>>();
    let created = "create c hash:ip maxelem 5\nadd c 1.1.1.1-1.1.1.5\n";
    assert_eq!(found(&format!("{created}add -exist c 1.1.1.3-1.1.1.4")), [Severity::Warning]);
    assert_eq!(found(&format!("{created}flush c\nadd c 1.1.1.1-1.1.1.5")), []);
    let created = "create c hash:ip,port,net\nadd c 1.1.1.0/28,80,2.0.0.0/8\n";
    let again = "add -exist c 1.1.1.1,80,2.0.0.0/8";
    assert_eq!(found(&format!("{created}{again}")), [Severity::Warning]);
    assert_eq!(found(&format!("{created}{again} nomatch")), [Severity::Error]);
}

/// A bitmap goes through a range in steps from its first address (ip_set_bitmap_ip.c).
#[test]
fn a_bitmap_leaves_out_the_rest_of_a_range() {
    let covered = |element: &str| {
        let (_, sets, _) = read(&format!("create c bitmap:ip range 10.0.0.0/24 netmask 28\nadd c {element}"));
        let mut ruleset = Ruleset::new(Family::V4, Semantics::Legacy);
        ipset::lower(&sets, Family::V4, &mut ruleset);
        let SetContents::Elements(elements) = &ruleset.sets[Set::from_u32(0)].contents else {
            panic!("some")
        };
        elements.iter().map(|element| format!("{:?}", element.values)).collect::<String>()
    };
    assert_eq!(covered("10.0.0.5-10.0.0.20"), covered("10.0.0.0/28"));
    assert_eq!(covered("10.0.0.5-10.0.0.21"), covered("10.0.0.0/27"));
}

/// The kernel masks what is written first, then puts the ends in order, then adds one address after the other
/// (ip_set_hash_ip.c, ip_set_hash_ipport.c): under a mask, packets find those that are masked themselves.
#[test]
fn ranges_that_run_backwards_under_a_mask_begin_later() {
    let covered = |options: &str, element: &str| {
        let (_, sets, found) = read(&format!("create c {options}\nadd c {element}"));
        if let Some(error) = found.first() {
            return error.message.clone();
        }
        let mut ruleset = Ruleset::new(Family::V4, Semantics::Legacy);
        ipset::lower(&sets, Family::V4, &mut ruleset);
        let (_, again, _) = read(&ipset::print(&sets));
        assert_eq!(ipset::print(&again), ipset::print(&sets));
        let SetContents::Elements(elements) = &ruleset.sets[Set::from_u32(0)].contents else {
            panic!("some")
        };
        elements.iter().map(|element| format!("{:?}", element.values)).collect::<String>()
    };
    let masked = "hash:ip bitmask 255.255.255.248";
    assert_eq!(covered(masked, "10.0.0.20-10.0.0.3"), covered(masked, "10.0.0.8-10.0.0.16"));
    assert_eq!(covered(masked, "10.0.0.20-10.0.0.17"), covered(masked, "10.0.0.16"));
    assert_eq!(covered(masked, "10.0.0.8-10.0.0.1"), covered(masked, "10.0.0.8"));
    assert_eq!(covered(masked, "10.0.0.20-10.0.0.16"), covered(masked, "10.0.0.16"));
    let with_port = "hash:ip,port netmask 30";
    assert_eq!(covered(with_port, "10.0.0.9-10.0.0.3,80"), covered(with_port, "10.0.0.4-10.0.0.8,80"));
    let blocks = "hash:ip netmask 29";
    assert_eq!(covered(blocks, "10.0.0.20-10.0.0.8"), covered(blocks, "10.0.0.8-10.0.0.20"));
    assert!(covered(blocks, "10.0.0.20-10.0.0.3").contains("no address is"));
}

/// One Ethernet address an address, and it is the last (ip_set_bitmap_ipmac.c).
#[test]
fn another_ethernet_address_takes_the_place_of_the_first() {
    let (_, sets, _) = read(
        "create a bitmap:ip,mac range 10.0.0.0/16\nadd a 10.0.0.1,02:00:00:00:00:01\n\
         add -exist a 10.0.0.1,02:00:00:00:00:02\n",
    );
    let printed = ipset::print(&sets);
    assert!(printed.ends_with("\nadd a 10.0.0.1,02:00:00:00:00:02\n"), "{printed}");
    assert_eq!(printed.lines().count(), 2, "{printed}");
}

/// The kernel's look-up ends at the longest prefix that has an element of any device (ip_set_hash_netiface.c).
#[test]
fn prefixes_of_other_devices_are_not_looked_behind() {
    let can_be_said = |elements: &[&str]| {
        let text: String = elements.iter().map(|element| format!("add s {element}\n")).collect();
        let (_, sets, diagnostics) = read(&format!("create s hash:net,iface\n{text}"));
        let mut ruleset = Ruleset::new(Family::V4, Semantics::Legacy);
        ipset::lower(&sets, Family::V4, &mut ruleset);
        let said = ruleset.sets[Set::from_u32(0)].contents != SetContents::Unknown;
        assert_eq!(diagnostics.is_empty(), said, "{diagnostics:?}");
        said
    };
    assert!(can_be_said(&["10.0.0.0/8,eth0", "11.1.0.0/16,eth9"]));
    assert!(can_be_said(&["10.0.0.0/8,eth0", "10.1.0.0/16,eth0", "10.1.0.0/16,eth9"]));
    assert!(!can_be_said(&["10.0.0.0/8,eth0", "10.1.0.0/16,eth9"]));
    assert!(!can_be_said(&["0.0.0.0/0,eth0", "10.0.0.0/8,eth0", "10.1.0.0-10.1.2.9,eth9"]));
}

#[test]
fn a_list_may_be_created_before_what_it_gets() {
    let (_, sets, _) = read("create l list:set\ncreate e hash:ip\nadd l e\nadd e 1.2.3.4\n");
    let mut ruleset = Ruleset::new(Family::V4, Semantics::Legacy);
    ipset::lower(&sets, Family::V4, &mut ruleset);
    let SetContents::Sets(members) = &ruleset.sets[Set::from_u32(0)].contents else { panic!("no list") };
    assert_eq!(members[..], [Set::from_u32(1)]);
}

#[test]
fn a_byte_order_mark_is_told_once() {
    let (_, sets, diagnostics) = read("\u{feff}create a hash:ip\nadd a 1.1.1.1\n");
    assert_eq!(sets.iter().count(), 1);
    assert!(matches!(&diagnostics[..], [mark] if mark.severity == Severity::Warning));
}

#[test]
fn longer_prefixes_are_looked_up_first() {
    let text = "create a hash:net\nadd a 10.0.0.0/8\nadd a 10.1.0.0-10.1.255.255 nomatch\nadd a 10.1.2.3\n\
                create m hash:ip bitmask 255.0.255.0\nadd m 1.2.3.4\n";
    let (_, sets, diagnostics) = read(text);
    assert_eq!(diagnostics.len(), 1, "the mask that is no prefix: {diagnostics:?}");
    let mut ruleset = Ruleset::new(Family::V4, Semantics::Legacy);
    ipset::lower(&sets, Family::V4, &mut ruleset);
    let SetContents::Elements(elements) = &ruleset.sets[Set::from_u32(0)].contents else {
        panic!("a has elements")
    };
    assert_eq!(elements.iter().map(|element| element.nomatch).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(ruleset.sets[Set::from_u32(1)].contents, SetContents::Unknown);
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC*") {
        read(&text);
    }

    #[test]
    fn no_line_panics(
        kind in "(bitmap:ip|bitmap:port|hash:ip|hash:net|hash:net,port|hash:ip,mac|hash:net,iface|list:set)",
        options in "( (family inet6|netmask|range|timeout|maxelem|bitmask) [0-9a-f.:/-]{0,9}){0,2}",
        element in "[0-9a-f.,:/\\[\\]-]{0,20}",
        tail in "( [a-z]{1,8} [0-9x:]{0,5})?",
    ) {
        let (_, sets, _) = read(&format!("create s {kind}{options}\nadd s {element}{tail}\n"));
        let mut ruleset = Ruleset::new(Family::V4, Semantics::Legacy);
        ipset::lower(&sets, Family::V4, &mut ruleset);
        let printed = ipset::print(&sets);
        prop_assert_eq!(ipset::print(&read(&printed).1), printed);
    }
}

/// Long runs of plain lines are read on threads; lines that start with a blank are not plain. Both say the same, whatever
/// stands between.
#[test]
fn long_files_say_what_short_ones_do() {
    use std::fmt::Write as _;
    let mut text =
        String::from("create a hash:ip maxelem 59500\ncreate b hash:net family inet6 maxelem 40000\n");
    let mut odd = [
        "add a 1.2.3.4\r",
        "add a 1.2.3.4",
        "add a 1.2.3.4.5",
        "add b 2001:db8::/33 nomatch",
        "# a comment",
        "add c 1.1.1.1",
        "create c hash:net",
        "add c 10.0.0.0/8",
        "add b 1.2.3.4",
        "",
        "add \"a\" 1.2.3.5",
        "add a 1.2.3.5",
    ]
    .iter();
    for at in 0..90_000u32 {
        let [x, y, z] = [at >> 16, at >> 8 & 255, at & 255];
        _ = match at / 30_000 {
            // Two sets in turns, and more elements than `a` takes.
            1 => writeln!(text, "add b 2001:{x:x}:{y:x}:{z:x}::/64"),
            _ => writeln!(text, "add a 10.{x}.{y}.{z}"),
        };
        if at % 6_000 == 5_000 || at % 6_000 == 5_001 {
            _ = writeln!(text, "{}", odd.next().unwrap_or(&"add a 10.0.0.0-10.0.0.3"));
        }
    }
    text.push_str("add a 9.9.9.9");
    assert!(text.len() > 3 << 19);
    let told = |text: &str| {
        let (sources, sets, findings) = read(text);
        let findings = findings.into_iter().map(|finding| {
            let span = finding.span;
            (
                finding.code,
                finding.message,
                span.map(|span| (sources.text(span).to_string(), sources.line_column(span).line)),
            )
        });
        let spans: Vec<String> = sets
            .iter()
            .flat_map(|set| &set.elements)
            .map(|element| sources.text(element.span).to_string())
            .collect();
        (ipset::print(&sets), findings.collect::<Vec<_>>(), spans)
    };
    let (printed, findings, spans) = told(&text);
    let (one_by_one, same_findings, same_spans) = told(&text.replace("add ", " add "));
    assert!(printed == one_by_one && spans == same_spans);
    assert_eq!(findings, same_findings);
    assert!(findings.len() > 5 && printed.lines().count() > 80_000, "{findings:?}");
}
