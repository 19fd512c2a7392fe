//! Filters and functions of others, and polcs that keep their files elsewhere.

use std::fs;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use polc_loader::flush::flush;
use polc_loader::state::Via;
use polc_loader::store::lock_qdiscs;
use polc_loader::sys::{LinkSpec, ProgramSpec, ProgramType, Sys};
use polc_loader::{Error, attach, clsact, net};
use polc_tests::kernel::{BpfFs, TempDir, has_tools, may_run};

use crate::host::{CALLS_MAX, DEVICE, Host, Way, bench};

/// A priority that somebody gave a filter first who waits for no lock makes that filter nobody else's, whatever its name.
#[test]
fn a_filter_that_was_there_first_is_not_polcs() {
    const NAME: &str = "a_filter_that_was_there_first_is_not_polcs";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("first");
    let host = Host::with_policies(Way::Clsact, &bpffs, &state);
    let ifindex =
        net::find(&net::devices(&Sys::new()).expect("a list"), DEVICE).expect("it is there").ifindex;
    // `r0 = TC_ACT_UNSPEC; exit`.
    let slots = [0xffff_ffff_0000_00b7, 0x95];
    let spec = ProgramSpec {
        kind: ProgramType::SCHED_CLS,
        attach_type: 0,
        name: "other",
        license: "GPL",
        slots: &slots,
        btf: None,
    };
    let other = Arc::new(Sys::new().prog_load(&spec, &mut []).expect("loaded"));
    let (mut refused, mut added) = (0, 0);
    for number in 1..=CALLS_MAX {
        let calls = Arc::new(AtomicUsize::new(0));
        let (counted, beside) = (calls.clone(), other.clone());
        let sys = Sys::with_hook(move |call| {
            if call == "netlink" && counted.fetch_add(1, Ordering::Relaxed) + 1 == number {
                // Where polc came first, they are there already.
                _ = clsact::add_qdisc(&Sys::new(), ifindex);
                let name = clsact::filter_name(false);
                _ = clsact::set_filter(&Sys::new(), ifindex, false, 1, &*beside, name, false);
            }
            Ok(())
        });
        match host.apply(&sys, 0, None) {
            Ok(()) => added += 1,
            Err(Error::Occupied { .. }) => {
                refused += 1;
                assert_eq!(host.store.names(&Sys::new()).expect("readable"), [], "call {number}");
            }
            Err(error) => panic!("call {number}: {error}"),
        }
        flush(&Sys::new(), &host.store, &host.slot).unwrap_or_else(|error| panic!("call {number}: {error}"));
        // What is theirs is left.
        for filter in clsact::filters(&Sys::new(), ifindex, false).expect("asked") {
            let program = Sys::new().prog_info(&*other).expect("asked").id;
            assert_eq!((filter.priority, filter.program_id), (1, program), "call {number}");
        }
        _ = clsact::remove_qdisc(&Sys::new(), ifindex);
        if calls.load(Ordering::Relaxed) < number {
            break;
        }
    }
    assert!(refused > 0 && added > 2, "{refused} refused, {added} added");
    host.clear().expect("nothing is left");
}

/// Another polc, wherever it keeps its files, adds or takes away no filter while one is at it.
#[test]
fn qdiscs_are_one_polcs_at_a_time() {
    const NAME: &str = "qdiscs_are_one_polcs_at_a_time";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("one");
    let others = (BpfFs::new("one-fs-other"), TempDir::in_memory("one-other"));
    let host = Host::with_policies(Way::Clsact, &bpffs, &state);
    let other = Host::with_policies(Way::Clsact, &others.0, &others.1);
    other.apply(&Sys::new(), 1, None).expect("applied");
    let lock = lock_qdiscs(&Sys::new()).expect("nobody has it");
    std::thread::scope(|scope| {
        let namespace = fs::File::open("/proc/thread-self/ns/net").expect("it is there");
        let entered = move || {
            let kinds = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(namespace.as_fd(), kinds).expect("root may");
        };
        let applying = scope.spawn(move || {
            entered();
            host.apply(&Sys::new(), 0, None).expect("applied");
            flush(&Sys::new(), &host.store, &host.slot).expect("flushed");
        });
        std::thread::sleep(Duration::from_millis(300));
        assert!(!applying.is_finished());
        let filters = || {
            let devices = net::devices(&Sys::new()).expect("a list");
            let ifindex = net::find(&devices, DEVICE).expect("it is there").ifindex;
            clsact::filters(&Sys::new(), ifindex, false).expect("asked").len()
        };
        assert_eq!(filters(), 1);
        drop(lock);
        applying.join().expect("it waited");
        assert_eq!(filters(), 1);
    });
    other.clear().expect("nothing is left");
}

/// A priority that another function got after polc's was detached does not make polc's attached.
#[test]
fn a_hook_that_was_detached_and_taken_is_not_polcs() {
    const NAME: &str = "a_hook_that_was_detached_and_taken_is_not_polcs";
    if !may_run(NAME) || !has_tools(NAME, &["ip", "mount"]) {
        return;
    }
    let (bpffs, state, _namespace) = bench("taken");
    let host = Host::with_policies(Way::Netfilter, &bpffs, &state);
    let (sys, slot) = (Sys::new(), host.store.slot(&host.slot));
    host.apply(&sys, 0, None).expect("applied");
    let via = |sys: &Sys| slot.read(sys).expect("readable").expect("there").via;
    let Via::Dispatch { priority, .. } = via(&sys) else { panic!("at a hook") };
    let link = sys.obj_get(&slot.link()).expect("pinned");
    sys.link_detach(&link).expect("detached");
    // `r0 = NF_ACCEPT; exit`.
    let accept = ProgramSpec {
        kind: ProgramType::NETFILTER,
        attach_type: 45,
        name: "other",
        license: "GPL",
        slots: &[0x0000_0001_0000_00b4, 0x95],
        btf: None,
    };
    let other = sys.prog_load(&accept, &mut []).expect("loaded");
    let place = LinkSpec::Netfilter { family: 2, hook: 1, priority, defrag: false };
    let _link = sys.link_create(&other, &place).expect("the priority is free");
    let state = slot.read(&sys).expect("readable").expect("there");
    assert_eq!(attach::current(&sys, &slot, &state).expect("asked"), None);
    assert_eq!(host.in_force(), Ok(None));
    host.apply(&sys, 1, None).expect("applied beside it");
    assert_eq!(host.in_force(), Ok(Some(1)));
    assert_ne!(via(&sys), Via::Dispatch { priority, defrag: false });
    host.clear().expect("flushed");
}
