//! Policies that stand at several netfilter hooks are confirmed together, and go back together.

use std::fs;
use std::time::{Duration, Instant};

use polc_ir::env::Attach;
use polc_ir::hook::{Family, Hook};
use polc_loader::attach;
use polc_loader::state::SlotName;
use polc_loader::sys::Sys;

use crate::host::{Host, PATIENCE};

const HOOKS: [Hook; 3] = [Hook::Input, Hook::Forward, Hook::Output];
const APPLY: [&str; 5] = ["apply", "one.v4", "--replace", "--attach", "netfilter"];
const APPLY_OTHER: [&str; 5] = ["apply", "other.v4", "--replace", "--attach", "netfilter"];

fn slot(hook: Hook) -> SlotName {
    SlotName { device: None, attach: Attach::Netfilter, hook: Some(hook), family: Family::V4 }
}

/// A host with two rule sets for all three hooks.
fn host(name: &str) -> Option<Host> {
    let host = Host::new(name)?;
    for (file, port) in [("one.v4", 53), ("other.v4", 54)] {
        let rules: String = HOOKS
            .iter()
            .map(|hook| format!("-A {} -p udp -m udp --dport {port} -j DROP\n", hook.chain_name()))
            .collect();
        host.files.file(file, format!("*filter\n{rules}COMMIT\n").as_bytes());
    }
    Some(host)
}

/// Numbers of the programs attached.
fn attached(host: &Host) -> [Option<u32>; 3] {
    HOOKS.map(|hook| {
        let (sys, slot) = (Sys::new(), host.slot(&slot(hook)));
        let state = slot.known(&sys).expect("it can be read")?;
        attach::current(&sys, &slot, &state).expect("asked")
    })
}

#[test]
fn several_hooks_have_one_time_and_are_confirmed_together() {
    let Some(host) = host("fault-together") else { return };
    host.says(&APPLY, 0);
    for confirm in [&["confirm"][..], &["confirm", "--hook", "forward"]] {
        host.says(&[&APPLY_OTHER[..], &["--confirm", "600"]].concat(), 0);
        let deadlines = HOOKS.map(|hook| {
            let state = host.slot(&slot(hook)).read(&Sys::new()).expect("readable").expect("there");
            state.intent.and_then(|intent| intent.confirm).expect("it waits").deadline_ms
        });
        assert_eq!(deadlines, [deadlines[0]; 3]);
        let said = host.says(confirm, 0);
        assert_eq!(said.matches("kept at netfilter").count(), 3, "{said}");
        assert!(!said.contains("nothing to confirm"), "{said}");
        // It need not be asked who was first, as long as nothing else was tried since.
        let said = host.says(confirm, 0);
        assert!(!said.contains("kept") && said.contains("confirmed before at netfilter"), "{said}");
    }
    host.says(&["flush"], 0);
}

/// Of two that confirm at once both are told that the change is kept.
#[test]
fn who_confirms_beside_another_hears_that_it_is_kept() {
    let Some(host) = host("fault-both") else { return };
    host.says(&APPLY, 0);
    host.says(&[&APPLY_OTHER[..], &["--confirm", "600"]].concat(), 0);
    let both = [(); 2].map(|()| host.command(&["confirm"]).spawn().expect("polc runs"));
    let outputs = both.map(|child| child.wait_with_output().expect("polc ends"));
    let said = outputs.each_ref().map(|output| String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(outputs.iter().all(|output| output.status.success()), "{said:?}");
    assert_eq!(said.iter().filter(|said| said.contains("kept at netfilter")).count(), 1, "{said:?}");
    // What was begun since and went back was not confirmed, though what is in force once was.
    host.says(&[&APPLY[..], &["--confirm", "1"]].concat(), 0);
    let before = attached(&host);
    let began = Instant::now();
    while attached(&host) == before {
        assert!(began.elapsed() < PATIENCE, "it does not go back");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(host.says(&["confirm"], 1).contains("nothing to confirm"));
    host.says(&["flush"], 0);
}

/// A damaged state keeps nobody from confirming: the note beside the pins does.
#[test]
fn a_change_is_confirmed_though_states_are_damaged() {
    let Some(host) = host("fault-note") else { return };
    host.says(&APPLY, 0);
    for damaged in [&HOOKS[..1], &HOOKS] {
        host.says(&[&APPLY_OTHER[..], &["--confirm", "2"]].concat(), 0);
        let after = attached(&host);
        for hook in damaged {
            fs::write(host.slot(&slot(*hook)).files().join("state.json"), b"{").expect("written");
        }
        // Another one's damage does not matter to it.
        let other = SlotName { family: Family::V6, ..slot(Hook::Input) };
        fs::create_dir_all(host.slot(&other).files()).expect("a folder");
        fs::write(host.slot(&other).files().join("state.json"), b"{").expect("written");
        let said = host.says(&["confirm"], 3);
        assert_eq!(said.matches("kept at netfilter").count(), 3, "{said}");
        assert!(said.contains("[E0813] at netfilter input for IPv6: "), "{said}");
        host.says(&["flush", "--family", "6"], 0);
        assert!(host.says(&["confirm"], 0).contains("confirmed before"));
        std::thread::sleep(Duration::from_millis(2_700));
        assert_eq!(attached(&host), after);
        host.says(&["flush"], 0);
        host.says(&APPLY, 0);
    }
    host.says(&["flush"], 0);
}

/// Where neither the files nor the note beside the pins tell of a change, what was held when it was made does.
#[test]
fn a_hook_goes_back_of_which_nothing_is_left_to_read() {
    let Some(host) = host("fault-unread") else { return };
    host.says(&APPLY, 0);
    let ids = |host: &Host| {
        let paths = HOOKS.map(|hook| host.slot(&slot(hook)));
        paths.map(|slot| {
            let place = Sys::new().obj_get(&slot.dispatch()).expect("pinned");
            let map = Sys::new().map(place).expect("a map");
            let at = |key: u32| Sys::new().map_lookup(&map, &key.to_ne_bytes()).expect("asked");
            [at(0), at(1)]
        })
    };
    let before = ids(&host);
    host.says(&[&APPLY_OTHER[..], &["--confirm", "2"]].concat(), 0);
    let output = host.slot(&slot(Hook::Output));
    fs::write(output.files().join("state.json"), b"x").expect("written");
    fs::remove_file(output.pins().join("note")).expect("it is there");
    let began = Instant::now();
    while ids(&host) != before {
        assert!(began.elapsed() < PATIENCE, "{:?} instead of {before:?}", attached(&host));
        std::thread::sleep(Duration::from_millis(50));
    }
    // Confirmed at another hook it is confirmed here.
    host.says(&["flush"], 0);
    host.says(&APPLY, 0);
    host.says(&[&APPLY_OTHER[..], &["--confirm", "2"]].concat(), 0);
    let after = ids(&host);
    fs::write(output.files().join("state.json"), b"x").expect("written");
    fs::remove_file(output.pins().join("note")).expect("it is there");
    host.says(&["confirm", "--hook", "input"], 0);
    std::thread::sleep(Duration::from_millis(2_700));
    assert_eq!(ids(&host), after);
    host.says(&["flush"], 0);
}
