//! Places that are taken, hidden or of another kind: each refused by name, and left as it was.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use polc_loader::sys::{ProgramType, Sys};
use polc_tests::kernel::{self, BpfFs};
use rustix::process::{Signal, kill_process};

use crate::host::{APPLY, APPLY_OTHER, Host, OTHER_RULES, ip, pid, programs, theirs};

fn tc(args: &str) -> String {
    kernel::run("tc", &args.split(' ').collect::<Vec<_>>()).expect("tc")
}

/// Rules for IPv6.
const RULES_V6: &str = "\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p udp -m udp --dport 53 -j DROP
COMMIT
";

#[test]
fn the_clsact_qdisc_goes_with_the_last_filter_if_polc_made_it() {
    let Some(host) = Host::new("fault-clsact") else { return };
    if !kernel::has_tools("the_clsact_qdisc_goes_with_the_last_filter_if_polc_made_it", &["tc"]) {
        return;
    }
    host.files.file("rules.v6", RULES_V6.as_bytes());
    let shown =
        || (tc("qdisc show dev eth0"), tc("filter show dev eth0 ingress"), tc("filter show dev eth0 egress"));
    let before = shown();
    let apply = |family: &str, attach: &str| {
        let (file, family) = (format!("rules.v{family}"), ["--family", family]);
        let place = ["--replace", "--dev", "eth0", "--attach", attach, "--clsact"];
        // The rules are INPUT's, and are not asked for where packets leave.
        let hook = if attach == "tc-egress" { &["--hook", "output"][..] } else { &[] };
        host.says(&[&["apply", &file][..], &place, &family, hook].concat(), 0);
    };
    let flush = |family: &str, attach: &str| {
        host.says(&["flush", "--family", family, "--attach", attach], 0);
    };
    let places = [("4", "tc-ingress"), ("6", "tc-ingress"), ("4", "tc-egress")];
    for first in 0..places.len() {
        places.iter().for_each(|(family, attach)| apply(family, attach));
        let order = (0..places.len()).map(|index| places[(first + index) % places.len()]);
        for (index, (family, attach)) in order.enumerate() {
            assert!(tc("qdisc show dev eth0").contains("clsact"), "{index}");
            flush(family, attach);
        }
        assert_eq!(shown(), before);
    }
    // A filter of somebody else's keeps it.
    apply("4", "tc-ingress");
    let pin = host.pins.join("theirs");
    let program = theirs(ProgramType::SCHED_CLS, 0xffff_ffff);
    Sys::new().obj_pin(&program, Path::new(&pin)).expect("pinned");
    tc(&format!("filter add dev eth0 egress bpf da pinned {pin}"));
    flush("4", "tc-ingress");
    assert!(tc("filter show dev eth0 egress").contains("theirs"));
    // And it is theirs now, and so is one that they made after ours was removed.
    tc("filter del dev eth0 egress");
    apply("4", "tc-ingress");
    flush("4", "tc-ingress");
    assert!(tc("qdisc show dev eth0").contains("clsact"));
    tc("qdisc del dev eth0 clsact");
    apply("4", "tc-ingress");
    tc("qdisc del dev eth0 clsact");
    tc("qdisc add dev eth0 clsact");
    host.says(&["flush"], 0);
    assert!(tc("qdisc show dev eth0").contains("clsact"));
    tc("qdisc del dev eth0 clsact");
    // An ingress qdisc has one side.
    tc("qdisc add dev eth0 ingress");
    let before = shown();
    apply("4", "tc-ingress");
    assert!(tc("filter show dev eth0 ingress").contains("polc"));
    flush("4", "tc-ingress");
    let egress = ["--dev", "eth0", "--attach", "tc-egress", "--hook", "output", "--clsact"];
    let said = host.says(&[&["apply", "rules.v4", "--replace"], &egress[..]].concat(), 3);
    assert!(said.contains("[E0833] `eth0` has an ingress qdisc") && said.contains("tc qdisc del"), "{said}");
    assert_eq!(shown(), before);
}

/// Where packets of several devices meet the filters of one block, none of them has its own.
#[test]
fn a_shared_block_is_refused_by_name() {
    let Some(host) = Host::new("fault-block") else { return };
    if !kernel::has_tools("a_shared_block_is_refused_by_name", &["tc"]) {
        return;
    }
    tc("qdisc add dev eth0 ingress_block 7 clsact");
    let before = tc("qdisc show dev eth0");
    let apply = [&APPLY[..], &["--attach", "tc-ingress", "--clsact"]].concat();
    let said = host.says(&apply, 3);
    assert!(said.contains("[E0838] the qdisc of `eth0` has the filters of block 7"), "{said}");
    assert!(said.contains("help: use --attach xdp"), "{said}");
    assert_eq!(tc("qdisc show dev eth0"), before);
    // The other side is the device's own.
    let egress = ["--dev", "eth0", "--attach", "tc-egress", "--hook", "output", "--clsact"];
    host.says(&[&["apply", "rules.v4", "--replace"], &egress[..]].concat(), 0);
    host.says(&["flush"], 0);
    assert_eq!(tc("qdisc show dev eth0"), before);
}

/// Runs a command that ends well.
type Polc<'a> = &'a dyn Fn(&[&str]);

/// Two that keep their files in different places have filters on one qdisc, and whoever leaves last takes it along, if one
/// of them made it.
#[test]
fn polcs_that_know_nothing_of_each_other_share_a_qdisc() {
    let Some(host) = Host::new("fault-shared") else { return };
    if !kernel::has_tools("polcs_that_know_nothing_of_each_other_share_a_qdisc", &["tc"]) {
        return;
    }
    let (pins, state) = (BpfFs::new("fault-shared-other"), host.files.path().join("other-state"));
    let other = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polc"));
        command.args(args).args(["--bpffs", &pins.join(""), "--state"]).arg(&state);
        let output = command.current_dir(host.files.path()).output().expect("polc runs");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let own = |args: &[&str]| drop(host.says(args, 0));
    let apply = [&APPLY[..], &["--attach", "tc-ingress", "--clsact"]].concat();
    let filters = || tc("filter show dev eth0 ingress").matches("direct-action").count();
    let has_qdisc = || tc("qdisc show dev eth0").contains("clsact");
    let nothing_kept = || {
        for pins in [&host.pins, &pins] {
            assert!(!Path::new(&pins.join("polc")).exists());
        }
    };
    let (own, other): (Polc<'_>, Polc<'_>) = (&own, &other);
    for (first, second) in [(own, other), (other, own)] {
        for (leaves, stays) in [(first, second), (second, first)] {
            first(&apply);
            second(&apply);
            // What is applied anew is where it was.
            first(&apply);
            second(&apply);
            assert_eq!(filters(), 2);
            leaves(&["flush"]);
            assert_eq!((filters(), has_qdisc()), (1, true));
            stays(&["status", "--dev", "eth0", "--sample", "0"]);
            // Who comes back finds what the other knows.
            leaves(&apply);
            stays(&["flush"]);
            assert_eq!((filters(), has_qdisc()), (1, true));
            leaves(&["flush"]);
            assert!(!has_qdisc());
            nothing_kept();
        }
        // One that was there is nobody's.
        tc("qdisc add dev eth0 clsact");
        first(&apply);
        second(&apply);
        first(&["flush"]);
        second(&["flush"]);
        assert!(has_qdisc());
        tc("qdisc del dev eth0 clsact");
        nothing_kept();
    }
}

/// Filters of both families get priorities of their own, though they be added at the same moment.
#[test]
fn two_filters_at_once_do_not_get_one_priority() {
    let Some(host) = Host::new("fault-filters") else { return };
    host.files.file("rules.v6", RULES_V6.as_bytes());
    let apply = |family: &str| {
        let (file, place) =
            (format!("rules.v{family}"), ["--dev", "eth0", "--attach", "tc-ingress", "--clsact"]);
        host.command(&[&["apply", &file, "--replace"], &place[..]].concat()).spawn().expect("polc runs")
    };
    for round in 0..3 {
        for child in ["4", "6"].map(apply) {
            let output = child.wait_with_output().expect("polc ends");
            assert!(output.status.success(), "{round}: {}", String::from_utf8_lossy(&output.stderr));
        }
        // Each is taken away alone.
        for family in ["4", "6"] {
            assert!(
                host.says(&["flush", "--family", family], 0).contains("removed at tc-ingress"),
                "{round}"
            );
        }
    }
    // Nothing is left of either.
    assert_eq!(host.says(&["flush"], 0), "nothing to remove\n");
}

/// Names come and go, and a policy stays with its device.
#[test]
fn a_policy_is_its_devices_whatever_that_is_called() {
    let Some(host) = Host::new("fault-names") else { return };
    let rename = |from: &str, to: &str| {
        ip(&format!("link set {from} down"));
        ip(&format!("link set {from} name {to}"));
    };
    for device in ["eth0", "eth1"] {
        host.says(&["apply", "rules.v4", "--replace", "--dev", device], 0);
    }
    let [own, other] = ["eth0", "eth1"].map(programs);
    for (from, to) in [("eth0", "swap"), ("eth1", "eth0"), ("swap", "eth1")] {
        rename(from, to);
    }
    let said = host.says(&["status", "--sample", "0"], 0);
    for name in ["eth0", "eth1"] {
        assert!(said.contains(&format!("its device is called `{name}` now")), "{said}");
    }
    let said = host.says(&["status", "--sample", "0", "--dev", "eth1", "--format", "json"], 0);
    assert!(said.contains("\"device_now\": \"eth1\""), "{said}");
    let said = host.says(&["flush", "--dev", "eth0"], 0);
    assert!(said.contains("removed at xdp of `eth1` for IPv4, whose device is called `eth0` now"), "{said}");
    assert_eq!((programs("eth1"), programs("eth0"), other.len()), (own, Vec::new(), 1));
    // The name of another device is not the policy's, and a name that no device has is nobody's.
    rename("eth0", "wan");
    ip("link add eth0 type veth peer name eth2");
    assert_eq!(host.says(&["flush", "--dev", "eth0"], 0), "nothing to remove\n");
    let said = host.says(&["flush", "--dev", "nosuch"], 3);
    assert!(said.contains("[E0803] there is no device `nosuch`") && said.contains("`wan`"), "{said}");
    assert_eq!(programs("eth1").len(), 1);
    let said = host.says(&APPLY, 3);
    assert!(said.contains("[E0830]") && said.contains("`polc flush --dev eth1`"), "{said}");
    // As long as no other device has it, the name that it was applied by does.
    ip("link delete eth0");
    host.says(&["flush", "--dev", "eth0"], 0);
    assert_eq!(programs("eth1").len(), 0);
}

#[test]
fn what_an_option_asks_for_in_vain_is_refused() {
    let Some(host) = Host::new("fault-ways") else { return };
    host.files.file("rules.v6", RULES_V6.as_bytes());
    host.says(&APPLY, 0);
    let before = programs("eth0");
    let said = host.says(&[&APPLY[..], &["--generic"]].concat(), 3);
    assert!(said.contains("[E0831]") && said.contains("attached by the driver"), "{said}");
    // There is room for one of the two families.
    let said = host.says(&["apply", "rules.v6", "--family", "6", "--replace", "--dev", "eth0"], 3);
    assert!(said.contains("[E0832]") && said.contains("--attach tc-ingress"), "{said}");
    assert_eq!(programs("eth0"), before);
    let tc = [&APPLY[..], &["--attach", "tc-ingress"]].concat();
    host.says(&tc, 0);
    let said = host.says(&[&tc[..], &["--clsact"]].concat(), 3);
    assert!(said.contains("[E0831]") && said.contains("by a tcx link"), "{said}");
    let v6 = ["apply", "rules.v6", "--family", "6", "--replace", "--dev", "eth0", "--attach", "tc-ingress"];
    host.says(&v6, 0);
    host.says(&["flush"], 0);
    host.says(&[&APPLY[..], &["--generic"]].concat(), 0);
    host.says(&[&APPLY[..], &["--generic"]].concat(), 0);
    host.says(&["flush"], 0);
}

/// Hooks have a program each, and are one policy to who applies it.
#[test]
fn hooks_are_told_of_together() {
    let Some(host) = Host::new("fault-hooks") else { return };
    let rules = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 1 -j DROP\n\
                 -A OUTPUT -p udp --dport 2 -j DROP\nCOMMIT\n";
    host.files.file("hooks.v4", rules.as_bytes());
    let apply = ["apply", "hooks.v4", "--replace", "--attach", "netfilter"];
    for args in [&[&apply[..], &["--dry-run"]].concat()[..], &apply] {
        let said = host.says(args, 0);
        let account = "2 rules: 2 compiled, 0 deferred, 0 rejected";
        assert!(said.matches(account).count() == 1 && !said.contains("N0302"), "{said}");
    }
    // Who names a hook twice names it.
    let said = host.says(&[&apply[..], &["--hook", "forward", "--hook", "forward"]].concat(), 0);
    assert!(
        said.contains("2 rules: 0 compiled, 2 deferred") && said.contains("note[N0302]: 2 rules"),
        "{said}"
    );
    let said = host.says(&["flush"], 0);
    assert_eq!(said.matches("removed at netfilter").count(), 3, "{said}");
    // Each hook counts what comes to it, and of rules that several come to one begins with what they counted.
    let saved = "*filter\n:INPUT ACCEPT [5:500]\n:FORWARD DROP [6:600]\n:OUTPUT ACCEPT [0:0]\n:OWN - [0:0]\n\
                 [7:700] -A INPUT -j OWN\n[8:800] -A FORWARD -j OWN\n[9:900] -A OWN -p tcp -j DROP\nCOMMIT\n";
    host.says_of(&["restore", "-c", "--attach", "netfilter"], saved, 0);
    let said = host.says(&["save", "-c"], 0);
    let (header, rules) = said.split_at(said.find("*filter").expect("rules"));
    assert_eq!(rules, saved);
    assert!(header.contains("netfilter input for IPv4, at netfilter forward for IPv4, at"), "{header}");
    host.says_of(&["restore", "-c", "--attach", "netfilter"], &said, 0);
    assert!(host.says(&["save", "-c"], 0).ends_with(saved));
    // Another rule set at one of them is printed by itself.
    host.says(&[&apply[..], &["--hook", "forward"]].concat(), 0);
    assert_eq!(host.says(&["save"], 0).matches("# Generated").count(), 2);
    host.files.file("none.v4", b"*nat\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n");
    let said = host.says(&["apply", "none.v4", "--attach", "netfilter", "--hook", "output"], 0);
    assert!(said.contains("0 rules"), "{said}");
    host.says(&["flush"], 0);
}

#[test]
fn pins_that_would_be_hidden_or_end_with_the_command_are_refused() {
    let Some(host) = Host::new("fault-bpffs") else { return };
    let own = host.files.path().join("own");
    let apply = |bpffs: &str| -> Vec<String> {
        let mut words: Vec<String> = APPLY.map(String::from).into();
        words.extend(["--bpffs".into(), bpffs.into(), "--state".into(), host.state.to_string_lossy().into()]);
        words
    };
    let polc = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polc"));
        command.current_dir(host.files.path());
        command
    };
    fs::create_dir(&own).expect("a folder");
    fs::write(own.join("file"), b"theirs").expect("written");
    let words = apply(own.to_str().expect("UTF-8"));
    let output = polc().args(&words).output().expect("polc runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("[E0801]") && said.contains("would hide its files"), "{said}");
    assert_eq!(fs::read(own.join("file")).expect("it is there"), b"theirs");
    // `ip netns exec` gives a command mounts of its own, which end with it.
    fs::remove_file(own.join("file")).expect("removed");
    let mut command = Command::new("unshare");
    command.args(["--mount", env!("CARGO_BIN_EXE_polc")]).args(&words).current_dir(host.files.path());
    let output = command.output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("[E0801]") && said.contains("nsenter --net="), "{said}");
    assert_eq!(programs("eth0"), Vec::<u32>::new());
    // From there what is applied can't be seen, which is not taken for none.
    host.says(&APPLY, 0);
    let mut command = polc();
    command.args(["status", "--sample", "0", "--bpffs"]).arg(&own).arg("--state").arg(&host.state);
    let output = command.output().expect("polc runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("[E0801]") && said.contains("can't be seen"), "{said}");
    host.says(&["flush"], 0);
}

#[test]
fn capabilities_do_where_root_does() {
    let Some(host) = Host::new("fault-caps") else { return };
    if !kernel::has_tools("capabilities_do_where_root_does", &["setpriv"]) {
        return;
    }
    let folder = host.files.path();
    std::os::unix::fs::chown(folder, Some(65_534), Some(65_534)).expect("root may");
    let polc = folder.join("polc");
    fs::copy(env!("CARGO_BIN_EXE_polc"), &polc).expect("copied");
    let pins = host.pins.join("");
    std::os::unix::fs::chown(&pins, Some(65_534), Some(65_534)).expect("root may");
    let run = |capabilities: &str, args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        command.args(["--inh-caps", capabilities, "--ambient-caps", capabilities]);
        command
            .arg(&polc)
            .args(args)
            .args(["--bpffs", &pins, "--state"])
            .arg(&host.state)
            .current_dir(folder);
        let output = command.output().expect("setpriv runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = run("+net_admin,+perfmon", &APPLY);
    assert_eq!(code, Some(3), "{said}");
    assert!(
        said.contains("[E0800]") && said.contains("CAP_BPF") && !said.contains("with CAP_NET_ADMIN may"),
        "{said}"
    );
    let enough = "+net_admin,+perfmon,+bpf";
    let (code, said) = run(enough, &APPLY);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(programs("eth0").len(), 1);
    for args in [&["status"][..], &["save", "-c"], &["flush"]] {
        let (code, said) = run(enough, args);
        assert_eq!(code, Some(0), "{args:?}: {said}");
    }
    assert_eq!(programs("eth0"), Vec::<u32>::new());
    // Directories of root's are not this user's to write.
    fs::remove_dir_all(&host.state).expect("it is there");
    std::os::unix::fs::chown(folder, Some(0), Some(0)).expect("root may");
    let (code, said) = run(enough, &APPLY);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("[E0814]") && said.contains("that this user may write"), "{said}");
}

#[test]
fn packets_that_other_rules_see_are_nobodys() {
    let Some(host) = Host::new("fault-routing") else { return };
    let apply = |more: &[&str], code| host.says(&[&APPLY, more].concat(), code);
    // macvlans take packets from the device they are on, by their own Ethernet addresses.
    ip("link add mv0 link eth0 type macvlan");
    assert!(apply(&[], 3).contains("`eth0` is part of the macvlan `mv0`"));
    ip("link del mv0");
    // What `watch` does when one appears later.
    apply(&[], 0);
    ip("link add mv0 link eth0 type macvlan");
    let said = host.says(&["watch", "--once"], 1);
    assert!(said.contains("part of the macvlan `mv0`"), "{said}");
    // It is looked at again and again, and said once.
    let child = host.command(&["watch", "--interval", "20"]).spawn().expect("polc runs");
    std::thread::sleep(Duration::from_millis(800));
    kill_process(pid(&child), Signal::TERM).expect("it runs");
    let said = child.wait_with_output().expect("polc ends");
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert_eq!(said.matches("[E0808]").count(), 1, "{said}");
    ip("link del mv0");
    host.says(&["watch", "--once"], 0);
    // As transparent proxies have it: for some marks all addresses are local.
    ip("route add local default dev lo table 300");
    apply(&[], 0);
    ip("rule add fwmark 1 lookup 300");
    let said = host.says(&["watch", "--once"], 1);
    assert!(said.contains("table 300"), "{said}");
    let said = apply(&[], 3);
    assert!(said.contains("table 300, which calls 0.0.0.0 to 255.255.255.255 local"), "{said}");
    apply(&["--local", "192.0.2.1"], 0);
    host.says(&["flush"], 0);
    host.says(&["apply", "rules.v4", "--replace", "--attach", "netfilter"], 0);
    // Both families in one stream are not one rule set.
    host.files.file("rules.v6", RULES_V6.as_bytes());
    host.says(&["apply", "rules.v6", "--family", "6", "--replace", "--attach", "netfilter"], 0);
    let saved = host.says(&["save", "-c"], 0);
    let said = host.says_of(&["restore", "-c", "--attach", "netfilter"], &saved, 2);
    assert!(said.contains("holds 2 rule sets"), "{said}");
    assert_eq!(host.says(&["save", "-c"], 0), saved);
}

#[test]
fn what_is_compiled_for_a_policy_replaces_no_other() {
    let Some(host) = Host::new("fault-overtaken") else { return };
    host.files.file("other.v4", OTHER_RULES.as_bytes());
    host.says(&APPLY, 0);
    let before = host.says(&["status", "--format", "json"], 0);
    let said = host.says(&[&APPLY_OTHER[..], &["--over", "4294967295"]].concat(), 3);
    assert!(said.contains("another policy was applied meanwhile"), "{said}");
    assert!(host.says(&["status"], 0).contains("rules.v4"));
    let status: serde_json::Value = serde_json::from_str(&before).expect("JSON");
    let find = |value: &serde_json::Value| value[0]["program"].as_u64();
    let program = find(&status).expect("a program's number").to_string();
    host.says(&[&APPLY_OTHER[..], &["--over", &program]].concat(), 0);
    // Nor does it undo what was done to a set meanwhile.
    let rules = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m set --match-set bad src -j DROP\nCOMMIT\n";
    host.files.file("set.v4", rules.as_bytes());
    host.files.file("bad", b"create bad hash:ip family inet\nadd bad 10.9.7.1\n");
    let with_set = ["apply", "set.v4", "--ipset", "bad", "--replace", "--dev", "eth0"];
    host.says(&with_set, 0);
    let in_force = || {
        let status: serde_json::Value =
            serde_json::from_str(&host.says(&["status", "--format", "json"], 0)).expect("JSON");
        find(&status).expect("a program's number").to_string()
    };
    host.says(&[&with_set[..], &["--over", &in_force()]].concat(), 0);
    host.says(&["set", "add", "bad", "10.9.7.7"], 0);
    let said = host.says(&[&with_set[..], &["--over", &in_force()]].concat(), 3);
    assert!(said.contains("[E0836]") && said.contains("a set was changed"), "{said}");
    host.says(&["set", "test", "bad", "10.9.7.7"], 0);
    // With the set as it is nothing is undone.
    host.files.file("bad", b"create bad hash:ip family inet\nadd bad 10.9.7.7\nadd bad 10.9.7.1\n");
    host.says(&[&with_set[..], &["--over", &in_force()]].concat(), 0);
    host.says(&["set", "test", "bad", "10.9.7.7"], 0);
    // What was taken away does not come back.
    host.says(&["flush"], 0);
    host.says(&[&APPLY[..], &["--over", &program]].concat(), 3);
    assert!(!host.says(&["status"], 0).contains("rules.v4"));
}
