//! What polc keeps about policies is damaged, lost, or has no room: the others are not held up by it, and what is to go
//! back or away does.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use polc_ir::env::Attach;
use polc_ir::hook::{Family, Hook};
use polc_loader::attach;
use polc_loader::state::SlotName;
use polc_loader::sys::Sys;
use polc_tests::kernel::{self, Namespace};
use rustix::process::{Pid, Signal, kill_process};

use crate::host::{APPLY, FullDisk, Host, OTHER_RULES, PATIENCE, has_xdp};

/// Places, each with the options that lead to it.
const PLACES: [(&[&str], Attach); 3] = [
    (&["--dev", "eth0"], Attach::Xdp),
    (&["--dev", "eth0", "--attach", "tc-ingress", "--clsact"], Attach::TcIngress),
    (&["--attach", "netfilter", "--hook", "input"], Attach::Netfilter),
];

fn slot(attach: Attach) -> SlotName {
    let at_hook = attach == Attach::Netfilter;
    SlotName {
        device: (!at_hook).then(|| "eth0".into()),
        attach,
        hook: at_hook.then_some(Hook::Input),
        family: Family::V4,
    }
}

/// Numbers of the programs that are attached at the places; the notes beside the pins tell how to ask.
fn attached(host: &Host) -> [Option<u32>; 3] {
    PLACES.map(|(_, attach)| {
        let (sys, slot) = (Sys::new(), host.slot(&slot(attach)));
        let noted = slot.noted(&sys).expect("a note, or none")?;
        attach::current(&sys, &slot, &noted).expect("asked")
    })
}

/// Waits until these are attached.
fn come_back(host: &Host, programs: [Option<u32>; 3]) {
    let began = Instant::now();
    while attached(host) != programs {
        assert!(began.elapsed() < PATIENCE, "{:?} are attached instead of {programs:?}", attached(host));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Applies a file at every place.
fn apply(host: &Host, file: &str, more: &[&str]) {
    for (place, _) in PLACES {
        host.says(&[&["apply", file, "--replace"], place, more].concat(), 0);
    }
}

/// Kills the processes that are to take this host's changes back.
fn kill_watchdogs(host: &Host) -> usize {
    let state = host.state.to_str().expect("UTF-8");
    let mut killed = 0;
    for entry in fs::read_dir("/proc").expect("processes") {
        let path = entry.expect("an entry").path();
        let Ok(words) = fs::read(path.join("cmdline")) else { continue };
        let words = String::from_utf8_lossy(&words).into_owned();
        let number = path.file_name().and_then(|name| name.to_str()?.parse().ok()).and_then(Pid::from_raw);
        if words.contains("\0watchdog\0") && words.contains(state) {
            kill_process(number.expect("a process"), Signal::KILL).expect("it runs");
            killed += 1;
        }
    }
    killed
}

#[test]
fn one_damaged_policy_does_not_hide_the_others() {
    let Some(host) = Host::new("fault-one") else { return };
    host.says(&APPLY, 0);
    host.says(&[&APPLY[..], &["--attach", "tc-ingress"]].concat(), 0);
    let state = host.slot(&slot(Attach::Xdp)).files().join("state.json");
    fs::write(&state, b"{").expect("written");
    for command in [&["status", "--sample", "0"][..], &["save", "-c"]] {
        let said = host.says(command, 3);
        assert!(said.contains("tc-ingress of `eth0` for IPv4: "), "{said}");
        assert!(
            said.contains("[E0813] at xdp of `eth0` for IPv4: ") && said.contains("is damaged"),
            "{said}"
        );
        assert!(said.contains("`polc flush` removes it"), "{said}");
    }
    // Lost altogether it is not taken for none.
    fs::remove_dir_all(state.parent().expect("a folder")).expect("it is there");
    host.says(&["flush", "--attach", "tc-ingress"], 0);
    let said = host.says(&["status", "--sample", "0"], 3);
    assert!(said.contains("[E0813] at xdp of `eth0`") && said.contains("it is not there"), "{said}");
    assert!(!said.contains("nothing is applied"), "{said}");
    host.says(&["flush"], 0);
    assert!(!has_xdp("eth0"));
    assert!(host.says(&["status", "--sample", "0"], 0).contains("nothing is applied"));
}

/// A state that was copied from another slot is not believed, and what the note tells is.
#[test]
fn a_state_of_another_slot_is_none() {
    let Some(host) = Host::new("fault-copied") else { return };
    apply(&host, "rules.v4", &[]);
    let state = |attach| host.slot(&slot(attach)).files().join("state.json");
    fs::copy(state(Attach::Netfilter), state(Attach::Xdp)).expect("copied");
    fs::copy(state(Attach::Xdp), state(Attach::TcIngress)).expect("copied");
    for command in [&["status", "--sample", "0"][..], &APPLY] {
        let said = host.says(command, 3);
        assert!(said.contains("[E0813]") && said.contains("`polc flush` removes it"), "{said}");
        assert!(said.contains("it is that of the policy at netfilter input for IPv4"), "{said}");
    }
    let removes_all = || {
        let said = host.says(&["flush"], 0);
        assert_eq!(said.matches("removed at").count(), 3, "{said}");
        assert_eq!(attached(&host), [None; 3]);
        assert!(!has_xdp("eth0"));
    };
    removes_all();
    // Nor is its own of another time.
    apply(&host, "rules.v4", &[]);
    let all = PLACES.map(|(_, attach)| (state(attach), fs::read(state(attach)).expect("a state")));
    (0..2).for_each(|_| apply(&host, "rules.v4", &[]));
    all.iter().for_each(|(path, bytes)| fs::write(path, bytes).expect("written"));
    for command in [&["status", "--sample", "0"][..], &APPLY] {
        let said = host.says(command, 3);
        assert!(said.contains("[E0813]") && said.contains("it is from before what is applied"), "{said}");
    }
    removes_all();
}

/// Where nothing is left to read, what is pinned tells what is polc's.
#[test]
fn what_nothing_tells_of_can_be_replaced_and_taken_away() {
    let Some(host) = Host::new("fault-nothing") else { return };
    apply(&host, "rules.v4", &[]);
    let shown = || kernel::run("tc", &["filter", "show", "dev", "eth0", "ingress"]).expect("tc");
    assert!(shown().contains("polc"));
    let lose_all = || {
        for (_, attach) in PLACES {
            let slot = host.slot(&slot(attach));
            fs::remove_dir_all(slot.files()).expect("it is there");
            fs::remove_file(slot.pins().join("note")).expect("it is there");
        }
        let said = host.says(&["status", "--sample", "0"], 3);
        assert_eq!(said.matches("[E0813]").count(), 3, "{said}");
    };
    lose_all();
    // What is applied takes its place.
    apply(&host, "rules.v4", &[]);
    let said = host.says(&["status", "--sample", "0"], 0);
    assert_eq!(said.matches("generation 2").count(), 3, "{said}");
    lose_all();
    let said = host.says(&["flush"], 0);
    assert_eq!(said.matches("removed at").count(), 3, "{said}");
    assert!(!has_xdp("eth0") && shown().is_empty(), "{}", shown());
    assert!(!Path::new(&host.pins.join("polc")).exists());
}

/// A change that waited is flushed, and the files that say so can't be removed: it is over all the same.
#[test]
fn what_was_flushed_does_not_go_back() {
    let Some(host) = Host::new("fault-flushed") else { return };
    host.files.file("other.v4", OTHER_RULES.as_bytes());
    fs::create_dir(&host.state).expect("a folder");
    let state = host.state.to_str().expect("UTF-8");
    let mount = |args: &[&str]| kernel::run("mount", args).expect("root may");
    mount(&["-t", "tmpfs", "tmpfs", state]);
    // The filter's place stays.
    kernel::run("tc", &["qdisc", "add", "dev", "eth0", "clsact"]).expect("tc");
    let filters = || kernel::run("tc", &["filter", "show", "dev", "eth0", "ingress"]).expect("tc");
    apply(&host, "rules.v4", &[]);
    apply(&host, "other.v4", &["--confirm", "1"]);
    assert!(has_xdp("eth0") && filters().contains("polc"));
    mount(&["-o", "remount,ro", state]);
    let said = host.says(&["flush"], 3);
    assert!(said.contains("[E0814]"), "{said}");
    let began = Instant::now();
    // Some time after it would have gone back.
    while began.elapsed() < Duration::from_millis(2_500) {
        assert!(!has_xdp("eth0") && filters().is_empty(), "{}", filters());
        std::thread::sleep(Duration::from_millis(50));
    }
    mount(&["-o", "remount,rw", state]);
    let said = host.says(&["status", "--sample", "0"], 0);
    assert!(said.contains("nothing is applied") && !said.contains("nobody confirmed"), "{said}");
    host.says(&["flush"], 0);
    kernel::run("umount", &[state]).expect("root may");
}

#[test]
fn changes_go_back_whatever_became_of_their_state() {
    let Some(host) = Host::new("fault-back") else { return };
    host.files.file("other.v4", OTHER_RULES.as_bytes());
    let folder = |attach| host.slot(&slot(attach)).files().to_path_buf();
    let damage = |what: &str, folder: &Path| match what {
        "damaged" => fs::write(folder.join("state.json"), b"{").expect("written"),
        _ => fs::remove_dir_all(folder).expect("it is there"),
    };
    for what in ["damaged", "lost"] {
        apply(&host, "rules.v4", &[]);
        let before = attached(&host);
        assert!(before.iter().all(Option::is_some), "{before:?}");
        apply(&host, "other.v4", &["--confirm", "2"]);
        let other = attached(&host);
        assert!(
            other.iter().zip(&before).all(|(other, before)| other.is_some() && other != before),
            "{what}"
        );
        PLACES.iter().for_each(|(_, attach)| damage(what, &folder(*attach)));
        come_back(&host, before);
        // Where it is damaged it has to be taken away, and what was lost has been made up for.
        host.says(&["flush"], 0);
        assert_eq!(attached(&host), [None; 3]);
        // Where nothing was before, nothing is afterwards.
        apply(&host, "other.v4", &["--confirm", "1"]);
        PLACES.iter().for_each(|(_, attach)| damage(what, &folder(*attach)));
        come_back(&host, [None; 3]);
        host.says(&["flush"], 0);
    }
}

/// The note beside the pins has the last word, whatever the state says of a change, or has no room to say.
#[test]
fn what_is_confirmed_stays_whatever_became_of_its_state() {
    let Some(host) = Host::new("fault-confirmed") else { return };
    host.files.file("other.v4", OTHER_RULES.as_bytes());
    let disk = FullDisk::new(host.state.clone());
    disk.make_room();
    let states = || {
        PLACES.map(|(_, attach)| {
            let path = host.slot(&slot(attach)).files().join("state.json");
            let bytes = fs::read(&path).expect("a state");
            (path, bytes)
        })
    };
    let put_back = |states: [(PathBuf, Vec<u8>); 3]| {
        states.iter().for_each(|(path, bytes)| fs::write(path, bytes).expect("written"));
    };
    let confirm = || {
        let said = host.says(&["confirm"], 0);
        assert_eq!(said.matches("kept at").count(), 3, "{said}");
        said
    };
    let stays = |programs| {
        std::thread::sleep(Duration::from_millis(2_700));
        let said = host.says(&["status", "--sample", "0"], 0);
        assert_eq!((attached(&host), said.contains("unless confirmed")), (programs, false), "{said}");
        assert_eq!(host.says(&["confirm"], 0).matches("confirmed before").count(), 3);
    };
    // Where nothing was before, nothing that goes makes room.
    apply(&host, "other.v4", &["--confirm", "2"]);
    let other = attached(&host);
    disk.fill();
    let said = confirm();
    assert_eq!(said.matches("the next polc does it").count(), 3, "{said}");
    stays(other);
    disk.make_room();
    apply(&host, "rules.v4", &[]);
    apply(&host, "other.v4", &["--confirm", "2"]);
    let other = attached(&host);
    disk.fill();
    confirm();
    stays(other);
    disk.make_room();
    // Nor does an old state undo it.
    apply(&host, "rules.v4", &["--confirm", "2"]);
    let (other, waiting) = (attached(&host), states());
    confirm();
    put_back(waiting);
    stays(other);
    // What waits goes back, though an old state knows nothing of it.
    host.says(&["flush"], 0);
    apply(&host, "rules.v4", &[]);
    let (before, old) = (attached(&host), states());
    apply(&host, "other.v4", &["--confirm", "2"]);
    put_back(old);
    come_back(&host, before);
    host.says(&["flush"], 0);
    assert_eq!(attached(&host), [None; 3]);
}

/// A set is changed and shown wherever it can be.
#[test]
fn one_damaged_policy_does_not_hold_up_the_sets_of_others() {
    let Some(host) = Host::new("fault-sets") else { return };
    let rules = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m set --match-set bad src -j DROP\nCOMMIT\n";
    host.files.file("set.v4", rules.as_bytes());
    host.files.file("bad", b"create bad hash:ip family inet\nadd bad 10.9.7.1\n");
    apply(&host, "set.v4", &["--ipset", "bad"]);
    let damaged = host.slot(&slot(Attach::TcIngress)).files().join("state.json");
    fs::write(&damaged, b"{").expect("written");
    let tells = |command: &[&str], result: &str| {
        let said = host.says(command, 3);
        assert_eq!(said.matches("[E0813] at tc-ingress of `eth0` for IPv4").count(), 1, "{said}");
        assert!(said.contains(result), "{said}");
        said
    };
    tells(&["set", "add", "bad", "10.9.7.7"], "");
    tells(&["set", "test", "bad", "10.9.7.7"], "10.9.7.7 is in set bad.");
    for command in [&["set", "list"][..], &["set", "list", "bad"]] {
        assert_eq!(tells(command, "# at xdp of `eth0`").matches("add bad 10.9.7.7").count(), 2);
    }
    tells(&["set", "del", "bad", "10.9.7.7"], "");
    // Whether the damaged one has a set that the others have not can't be told.
    let said = tells(&["set", "add", "good", "10.9.7.7"], "is damaged");
    assert!(!said.contains("does not exist"), "{said}");
    host.says(&["set", "test", "bad", "10.9.7.7", "--attach", "xdp"], 1);
    host.says(&["flush"], 0);
}

#[test]
fn the_next_polc_takes_back_what_its_watchdog_did_not() {
    let Some(host) = Host::new("fault-watchdog") else { return };
    host.files.file("other.v4", OTHER_RULES.as_bytes());
    apply(&host, "rules.v4", &[]);
    let before = attached(&host);
    apply(&host, "other.v4", &["--confirm", "1"]);
    assert_eq!(kill_watchdogs(&host), 3);
    // One of them has lost its state besides.
    fs::remove_dir_all(host.slot(&slot(Attach::TcIngress)).files()).expect("it is there");
    std::thread::sleep(Duration::from_millis(2_100));
    assert_ne!(attached(&host), before);
    let said = host.polc(&["status", "--sample", "0"], "");
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert_eq!(said.matches("nobody confirmed the last change in time").count(), 3, "{said}");
    assert_eq!(attached(&host), before);
    assert!(host.says(&["confirm", "--attach", "xdp"], 1).contains("nothing to confirm"));
    host.says(&["flush"], 0);
}

#[test]
fn what_is_in_force_can_be_taken_away_without_a_disk_to_write_to() {
    let Some(host) = Host::new("fault-flush") else { return };
    let disk = FullDisk::new(host.state.clone());
    disk.make_room();
    let target = host.state.to_str().expect("UTF-8");
    apply(&host, "rules.v4", &[]);
    disk.fill();
    host.says(&["flush"], 0);
    assert_eq!(attached(&host), [None; 3]);
    disk.make_room();
    apply(&host, "rules.v4", &[]);
    kernel::run("mount", &["-o", "remount,ro", target]).expect("mounted");
    let said = host.says(&["flush"], 3);
    assert_eq!(said.matches("[E0814]").count(), 3, "{said}");
    assert!(said.contains("mount the file system for writing"), "{said}");
    assert!(!has_xdp("eth0"));
    let said = host.says(&["status", "--sample", "0"], 0);
    assert_eq!(said.matches("nothing is attached any more").count(), 3, "{said}");
    kernel::run("mount", &["-o", "remount,rw", target]).expect("mounted");
    host.says(&["flush"], 0);
    assert!(!host.says(&["status", "--sample", "0"], 0).contains("any more"));
}

#[test]
fn pins_that_are_something_else_are_told_and_removed() {
    let Some(host) = Host::new("fault-pins") else { return };
    for (place, attach) in [PLACES[0], PLACES[2]] {
        host.says(&[&["apply", "rules.v4", "--replace"], place].concat(), 0);
        let slot = host.slot(&slot(attach));
        fs::remove_file(slot.link()).expect("it is there");
        fs::hard_link(slot.map(1, "polc_counters"), slot.link()).expect("a pin");
        let said = host.says(&["status", "--sample", "0"], 3);
        assert!(said.contains("[E0812]") && said.contains("it is no link"), "{said}");
        assert!(said.contains("`polc flush` removes it"), "{said}");
        host.says(&["flush"], 0);
        assert!(!slot.pins().exists());
        assert!(!has_xdp("eth0"));
    }
    // The map between a hook's link and its program.
    let apply = [&["apply", "rules.v4", "--replace"], PLACES[2].0].concat();
    host.says(&apply, 0);
    let slot = host.slot(&slot(PLACES[2].1));
    fs::remove_file(slot.dispatch()).expect("it is there");
    fs::hard_link(slot.program(1), slot.dispatch()).expect("a pin");
    assert!(host.says(&["status", "--sample", "0"], 3).contains("[E0812]"));
    host.says(&["flush"], 0);
    assert!(!slot.pins().exists());
    // Without it the link leads to no program, and what that does to packets is not taken for nothing.
    host.says(&apply, 0);
    fs::remove_file(slot.dispatch()).expect("it is there");
    for command in [&["status", "--sample", "0"][..], &["save", "-c"], &apply] {
        let said = host.says(command, 3);
        assert!(said.contains("[E0812]") && said.contains("leads to no program"), "{said}");
    }
    host.says(&["flush"], 0);
    assert!(!slot.pins().exists());
    // What hooks share.
    let shared = slot.pins().with_file_name("hooks-4");
    for (pin, other) in [("word", slot.program(1)), ("word", slot.dispatch()), ("none", slot.dispatch())] {
        host.says(&apply, 0);
        fs::remove_file(shared.join(pin)).expect("it is there");
        let said = host.says(&["status", "--sample", "0"], 3);
        assert!(said.contains("[E0812]") && said.contains("it is not there"), "{said}");
        if pin == "word" {
            host.says(&["apply", "rules.v4", "--replace", "--attach", "netfilter", "--hook", "output"], 3);
            assert!(!shared.join(pin).exists(), "another hook goes by the one that was lost");
        }
        fs::hard_link(&other, shared.join(pin)).expect("a pin");
        let said = host.says(&["status", "--sample", "0"], 3);
        assert!(said.contains("[E0812]") && said.contains("it is something else"), "{said}");
        host.says(&apply, 3);
        host.says(&["flush"], 0);
        assert!(!slot.pins().exists() && !shared.exists());
    }
    host.says(&apply, 0);
    host.says(&["flush"], 0);
}

#[test]
fn what_is_kept_of_namespaces_that_are_gone_is_told_and_removed() {
    let Some(host) = Host::new("fault-gone") else { return };
    let netfilter = [&["apply", "rules.v4", "--replace"], PLACES[2].0].concat();
    let mut commands = [host.command(&netfilter), host.command(&APPLY)];
    let other = std::thread::spawn(move || {
        let namespace = Namespace::enter("fault-gone-other");
        kernel::run("ip", &["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]).expect("ip");
        for command in &mut commands {
            let output = command.output().expect("polc runs");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let number = fs::metadata("/proc/thread-self/ns/net").expect("a namespace").ino();
        drop(namespace);
        number
    });
    let number = other.join().expect("it is applied");
    let said = host.says(&["status", "--sample", "0"], 0);
    assert!(said.contains(&format!("`polc flush --gone {number}` removes them")), "{said}");
    assert!(said.contains("nothing is applied"), "{said}");
    host.says(&["flush"], 0);
    let own = fs::metadata("/proc/thread-self/ns/net").expect("a namespace").ino();
    assert!(host.says(&["flush", "--gone", &own.to_string()], 3).contains("that is gone"));
    let said = host.says(&["flush", "--gone", &number.to_string()], 0);
    assert!(said.contains("removed 2 policies"), "{said}");
    assert!(!host.says(&["status", "--sample", "0"], 0).contains("is gone"));
    assert!(!Path::new(&host.pins.join("polc")).exists());
}

#[test]
fn a_netfilter_link_that_others_detach_is_missed() {
    let Some(host) = Host::new("fault-link") else { return };
    let (place, attach) = PLACES[2];
    let apply = [&["apply", "rules.v4", "--replace"], place].concat();
    host.says(&apply, 0);
    let (sys, slot) = (Sys::new(), host.slot(&slot(attach)));
    let link = sys.obj_get(&slot.link()).expect("it is pinned");
    sys.link_detach(&link).expect("detached");
    for command in [&["status", "--sample", "0"][..], &["watch", "--once"]] {
        let said = host.polc(command, "");
        let said =
            [said.stdout, said.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(said.contains("nothing is attached any more"), "{said}");
    }
    assert!(host.says(&["save"], 3).contains("[E0816]"));
    // What is applied again is in force again.
    host.says(&apply, 0);
    assert!(attached(&host)[2].is_some());
    assert!(host.says(&["save"], 0).contains("--dport 53"));
    host.says(&["flush"], 0);
    assert!(!slot.pins().exists());
}
