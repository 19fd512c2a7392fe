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
        assert_eq!(host.says(confirm, 1).matches("kept").count(), 0);
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
