//! Accelerating a real host: what the kernel's own rules would drop is dropped before they see it, and nothing else is.
//!
//! Each test has a host whose iptables rules are in force, and a peer, network namespaces joined by a pair of devices.
//! Packets are counted by the kernel's own rules and by the program, so that it shows who dropped what. Without root
//! the tests say that they are skipped.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use polc_tests::kernel::{self, BpfFs, Namespace, TempDir};
use rustix::net::{self, AddressFamily, Protocol, SocketFlags, SocketType};

/// Longest wait for what comes in moments.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long what must not come is waited for.
const SILENCE: Duration = Duration::from_millis(300);

type Work = Box<dyn FnOnce() + Send>;

/// A host with a device, the peer at its other end, and where its polc keeps things.
struct Host {
    files: TempDir,
    pins: BpfFs,
    peer: Sender<Work>,
    _namespace: Namespace,
}

impl Host {
    /// Moves the calling thread into a host with these rules; `None` if the test can't run.
    fn new(name: &str, rules: &str) -> Option<Host> {
        let tools = ["ip", "iptables-legacy-restore", "iptables-legacy-save"];
        if !kernel::may_run(name) || !kernel::has_tools(name, &tools) {
            return None;
        }
        let namespace = Namespace::enter(&format!("{name}-host"));
        let (peer, work) = mpsc::channel::<Work>();
        let (ready, is_ready) = mpsc::channel();
        let peer_name = format!("{name}-peer");
        let in_peer = peer_name.clone();
        thread::spawn(move || {
            let _namespace = Namespace::enter(&in_peer);
            ready.send(()).expect("the host waits");
            work.into_iter().for_each(|work| work());
        });
        is_ready.recv_timeout(PATIENCE).expect("the peer is there");
        kernel::run("ip", &["link", "set", "lo", "up"]).expect("ip");
        ip("link add eth0 type veth peer name peer");
        ip(&format!("link set peer netns polc-{peer_name}-{}", std::process::id()));
        ip("addr add 192.0.2.1/24 dev eth0");
        ip("link set eth0 up");
        let host = Host {
            files: TempDir::new(name),
            pins: BpfFs::new(&format!("{name}-pins")),
            peer,
            _namespace: namespace,
        };
        host.at_peer(|| {
            ip("addr add 192.0.2.2/24 dev peer");
            ip("addr add 192.0.2.3/24 dev peer");
            ip("link set peer up");
        });
        // The neighbours get to know each other.
        let met = UdpSocket::bind("192.0.2.1:9").expect("the host's address");
        met.set_read_timeout(Some(PATIENCE)).expect("a time");
        host.send("192.0.2.2:4000", "192.0.2.1:9", 1);
        kernel::uninterrupted(|| met.recv(&mut [0; 8])).expect("the peer's packet");
        host.restore(rules);
        Some(host)
    }

    /// Does something in the peer, and waits until it is done.
    fn at_peer<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.peer.send(Box::new(move || _ = done.send(work()))).expect("the peer is there");
        result.recv_timeout(PATIENCE).expect("the peer does it")
    }

    /// Puts rules into the kernel, and into the file that polc is given.
    fn restore(&self, rules: &str) {
        let file = self.files.file("rules.v4", rules.as_bytes());
        kernel::run("iptables-legacy-restore", &[&file]).expect("the kernel takes the rules");
    }

    fn run(&self, args: &[&str]) -> Output {
        let state = self.files.path().join("state");
        let mut command = Command::new(env!("CARGO_BIN_EXE_polc"));
        command.args(args).args(["--bpffs", &self.pins.join(""), "--state"]).arg(state);
        command.current_dir(self.files.path()).stdin(Stdio::null()).output().expect("polc runs")
    }

    /// What a command says, output and remarks, that ends with `code`.
    fn says(&self, args: &[&str], code: i32) -> String {
        let output = self.run(args);
        let said =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        said
    }

    fn apply(&self, attach: &str) -> String {
        let apply = ["apply", "rules.v4", "--attach", attach];
        let device: &[&str] = if attach == "netfilter" { &[] } else { &["--dev", "eth0"] };
        self.says(&[&apply[..], device].concat(), 0)
    }

    /// Packets that the kernel's own rules dropped by policy.
    fn kernel_drops(&self) -> u64 {
        let saved = kernel::run("iptables-legacy-save", &["-c", "-t", "filter"]).expect("saved");
        let policy = saved.lines().find(|line| line.starts_with(":INPUT DROP")).expect("a policy");
        let packets = policy.split_once('[').and_then(|(_, rest)| rest.split_once(':')).expect("counters").0;
        packets.parse().expect("a number")
    }

    /// Whether the kernel's rules drop a packet; else the program does.
    fn kernel_decides(&self) -> bool {
        let before = self.kernel_drops();
        self.send("192.0.2.2:4000", "192.0.2.1:5000", 1);
        let began = Instant::now();
        while self.kernel_drops() == before {
            if began.elapsed() > SILENCE {
                return false;
            }
        }
        true
    }

    /// The directory of what is kept of the device's policy.
    fn kept(&self) -> PathBuf {
        let state = fs::read_dir(self.files.path().join("state")).expect("state");
        let mut slots = state.map(|entry| entry.expect("an entry").path().join("eth0-xdp-4"));
        slots.find(|path| path.is_dir()).expect("the policy's files")
    }

    /// Sends UDP packets from the peer's port to one of the host's.
    fn send(&self, from: &'static str, to: &'static str, count: usize) {
        self.at_peer(move || {
            let socket = UdpSocket::bind(from).expect("an address of the peer's");
            for _ in 0..count {
                socket.send_to(b"hello", to).expect("sent");
            }
        });
    }
}

fn ip(args: &str) {
    kernel::run("ip", &args.split(' ').collect::<Vec<_>>()).expect("ip");
}

/// A socket that waits no longer than for what must not come.
fn socket(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).expect("a free port");
    socket.set_read_timeout(Some(SILENCE)).expect("a time");
    socket
}

/// How many packets come.
fn received(socket: &UdpSocket) -> usize {
    std::iter::from_fn(|| match kernel::uninterrupted(|| socket.recv(&mut [0; 64])) {
        Ok(_) => Some(()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
        Err(error) => panic!("{error}"),
    })
    .count()
}

const STATEFUL: &str = "\
*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
COMMIT
";

#[test]
fn replies_pass_and_what_nobody_asked_for_is_dropped_early() {
    for (name, attach) in [("acc-xdp", "xdp"), ("acc-tc", "tc-ingress"), ("acc-hook", "netfilter")] {
        let Some(host) = Host::new(name, STATEFUL) else { return };
        // Without the program, the kernel's own rules drop.
        host.send("192.0.2.2:4000", "192.0.2.1:5000", 3);
        thread::sleep(SILENCE);
        let before = host.kernel_drops();
        assert!(before >= 3, "{before}");
        host.apply(attach);
        // Nobody asked for these.
        host.send("192.0.2.2:4000", "192.0.2.1:5000", 7);
        thread::sleep(SILENCE);
        assert_eq!(host.kernel_drops(), before, "{attach}: the program drops before the kernel's rules");
        // These answer.
        let local = socket("192.0.2.1:5000");
        host.at_peer(|| {
            let socket = UdpSocket::bind("192.0.2.3:6000").expect("free");
            socket.set_read_timeout(Some(PATIENCE)).expect("a time");
            thread::spawn(move || {
                let (bytes, from) =
                    kernel::uninterrupted(|| socket.recv_from(&mut [0; 64])).expect("a question");
                for _ in 0..5 {
                    socket.send_to(&vec![1; bytes], from).expect("answered");
                }
            });
        });
        local.send_to(b"question", "192.0.2.3:6000").expect("sent");
        assert_eq!(received(&local), 5, "{attach}");
        // From elsewhere to the same port: nobody asked.
        host.send("192.0.2.2:4001", "192.0.2.1:5000", 4);
        assert_eq!(received(&local), 0, "{attach}");
        assert_eq!(host.kernel_drops(), before, "{attach}");
        // A connection that rules let in, and one from here.
        let listener = TcpListener::bind("192.0.2.1:22").expect("free");
        let served = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a connection");
            let mut word = [0; 4];
            stream.read_exact(&mut word).expect("four bytes");
            stream.write_all(&word).expect("written");
        });
        host.at_peer(|| {
            let mut stream = TcpStream::connect("192.0.2.1:22").expect("the rules let it in");
            stream.set_read_timeout(Some(PATIENCE)).expect("a time");
            stream.write_all(b"ping").expect("written");
            stream.read_exact(&mut [0; 4]).expect("the answer");
        });
        served.join().expect("served");
        let status = host.says(&["status", "--sample", "0"], 0);
        assert!(status.contains(if attach == "netfilter" { "netfilter input" } else { "eth0" }), "{status}");
        host.says(&["flush"], 0);
        host.send("192.0.2.2:4000", "192.0.2.1:5000", 2);
        thread::sleep(SILENCE);
        assert_eq!(host.kernel_drops(), before + 2, "{attach}: the kernel's rules are left as they were");
    }
}

#[test]
fn rules_that_the_kernel_does_not_have_are_refused() {
    let Some(host) = Host::new("acc-agree", STATEFUL) else { return };
    let other = STATEFUL.replace("--dport 22", "--dport 23");
    host.files.file("other.v4", other.as_bytes());
    let apply = ["apply", "other.v4", "--dev", "eth0", "--attach", "tc-ingress"];
    let said = host.says(&apply, 3);
    assert!(
        said.contains("[E") && said.contains("--dport 23 -j ACCEPT` is given, and the kernel has"),
        "{said}"
    );
    assert!(said.contains("--unchecked"), "{said}");
    assert!(!host.files.path().join("state").join("eth0").exists());
    host.says(&[&apply[..], &["--unchecked"]].concat(), 0);
    host.says(&["flush"], 0);
    // Spelling makes no difference, a table that was not given does.
    host.files.file("other.v4", STATEFUL.replace("-m tcp --dport 22", "--dport ssh").as_bytes());
    host.says(&apply, 0);
    host.says(&["flush"], 0);
    let nat = "*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
               :POSTROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 22\nCOMMIT\n";
    let file = host.files.file("nat.v4", nat.as_bytes());
    kernel::run("iptables-legacy-restore", &["--noflush", &file]).expect("restored");
    let said = host.says(&apply, 3);
    assert!(said.contains("table nat: the kernel has"), "{said}");
}

/// Waits until `what` gives true; how long that took.
fn until(mut what: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !what() {
        assert!(began.elapsed() < PATIENCE, "it never happens");
        thread::sleep(Duration::from_millis(5));
    }
    began.elapsed()
}

#[test]
fn a_program_is_suspended_while_the_kernel_has_other_rules() {
    let Some(host) = Host::new("acc-watch", STATEFUL) else { return };
    host.apply("xdp");
    host.says(&["watch", "--once"], 0);
    let local = socket("192.0.2.1:5000");
    let arrives = || {
        host.send("192.0.2.2:4000", "192.0.2.1:5000", 1);
        received(&local) > 0
    };
    assert!(!arrives());
    // The kernel's rules change under the program: it drops by the old ones until somebody looks.
    let open = ["-I", "INPUT", "-p", "udp", "--dport", "5000", "-j", "ACCEPT"];
    kernel::run("iptables-legacy", &open).expect("the rule is taken");
    assert!(!arrives(), "nobody has looked");
    let said = host.says(&["watch", "--once"], 1);
    assert!(said.contains("suspended") && said.contains("--dport 5000"), "{said}");
    assert!(arrives());
    let suspended = || host.says(&["status", "--sample", "0"], 0).contains("suspended: every packet");
    assert!(suspended());
    let close = [&["-D"], &open[1..]].concat();
    kernel::run("iptables-legacy", &close).expect("the rule is gone");
    assert!(!arrives(), "the kernel's rules drop it");
    let said = host.says(&["watch", "--once"], 0);
    assert!(said.contains("goes on"), "{said}");
    assert!(!arrives() && !suspended());
    // Somebody who watches sees it within the interval, and the time that reading takes.
    let interval = Duration::from_millis(100);
    let mut watcher = Command::new(env!("CARGO_BIN_EXE_polc"))
        .args(["watch", "--interval", "100", "--bpffs", &host.pins.join(""), "--state"])
        .arg(host.files.path().join("state"))
        .stderr(Stdio::piped())
        .spawn()
        .expect("polc runs");
    thread::sleep(3 * interval);
    kernel::run("iptables-legacy", &open).expect("the rule is taken");
    let began = Instant::now();
    local.set_read_timeout(Some(Duration::from_millis(5))).expect("a time");
    until(arrives);
    eprintln!(
        "a change of the kernel's rules was seen after {:?}, looking every {interval:?}",
        began.elapsed()
    );
    // What stays so is said once.
    thread::sleep(3 * interval);
    kernel::run("iptables-legacy", &close).expect("the rule is gone");
    watcher.kill().expect("it runs");
    let said = watcher.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert_eq!(said.matches("suspended").count(), 1, "{said}");
}

#[test]
fn addresses_are_followed() {
    // Packets for other hosts are none of INPUT's.
    let Some(host) = Host::new("acc-addr", STATEFUL) else { return };
    host.apply("xdp");
    let dropped = |host: &Host| {
        let before = host.kernel_drops();
        host.send("192.0.2.2:4000", "192.0.2.9:5000", 3);
        thread::sleep(SILENCE);
        host.kernel_drops() == before
    };
    ip("addr add 192.0.2.9/32 dev eth0");
    assert!(!dropped(&host), "the program was not told of the address");
    let said = host.says(&["watch", "--once"], 0);
    assert!(said.contains("applying anew"), "{said}");
    assert!(dropped(&host), "now it was");
    host.says(&["watch", "--once"], 0);
    // A device that becomes part of another is not one that rules name.
    ip("link add br0 type bridge");
    ip("link set eth0 master br0");
    let said = host.says(&["watch", "--once"], 1);
    assert!(said.contains("part of the bridge `br0`"), "{said}");
    host.says(&["watch", "--once"], 1);
}

/// Rules go by names, and so does what is kept: a renamed device's policy is not applied anew behind its user's back.
#[test]
fn a_renamed_devices_policy_waits_for_its_user() {
    let Some(host) = Host::new("acc-renamed", STATEFUL) else { return };
    host.apply("xdp");
    let suspended = || host.says(&["status", "--sample", "0"], 0).contains("suspended: every packet");
    let rename = |from: &str, to: &str| {
        ip(&format!("link set {from} down"));
        ip(&format!("link set {from} name {to}"));
        ip(&format!("link set {to} up"));
    };
    rename("eth0", "wan0");
    ip("addr add 192.0.2.9/32 dev wan0");
    let said = host.says(&["watch", "--once"], 1);
    assert!(said.contains("suspended, its device is called `wan0` now"), "{said}");
    assert!(said.contains("`polc flush --dev wan0`") && !said.contains("[E0803]"), "{said}");
    assert!(suspended());
    // Under its old name it is what it was, and follows the host.
    rename("wan0", "eth0");
    assert!(host.says(&["watch", "--once"], 0).contains("applying anew"));
    assert!(!suspended());
    rename("eth0", "wan0");
    host.says(&["watch", "--once"], 1);
    // What is said to be done does.
    host.says(&["flush", "--dev", "wan0"], 0);
    host.says(&["apply", "rules.v4", "--attach", "xdp", "--dev", "wan0"], 0);
    host.says(&["watch", "--once"], 0);
    assert!(!suspended());
    // In replace mode nothing else would decide its packets.
    host.says(&["flush"], 0);
    host.files.file("plain.v4", b"*filter\n:INPUT DROP [0:0]\nCOMMIT\n");
    host.says(&["apply", "plain.v4", "--attach", "xdp", "--dev", "wan0", "--replace"], 0);
    rename("wan0", "eth0");
    let said = host.says(&["watch", "--once"], 1);
    assert!(said.contains(": its device is called `eth0` now"), "{said}");
    host.says(&["flush"], 0);
}

/// Whatever is damaged of what is kept, a program that nobody can judge leaves its packets to the kernel.
#[test]
fn what_cant_be_judged_is_suspended() {
    let Some(host) = Host::new("acc-damaged", STATEFUL) else { return };
    host.apply("xdp");
    assert!(!host.kernel_decides());
    let slot = host.kept();
    let other = STATEFUL.replace("--dport 22", "--dport 23");
    for (file, contents) in [
        ("gen-1/rules", Some("junk")),
        ("gen-1/rules", Some("")),
        ("gen-1/rules", Some(other.as_str())),
        ("gen-1/rules", None),
        ("gen-1/canonical", None),
        ("gen-1/host.json", Some("junk")),
        ("gen-1/host.json", None),
        ("gen-1/options.json", Some("{}")),
        ("gen-1/options.json", None),
        ("gen-1/kept.json", Some("junk")),
        ("gen-1/kept.json", None),
        ("gen-1/object.o", Some("junk")),
        ("state.json", Some("junk")),
        ("state.json", None),
    ] {
        let path = slot.join(file);
        let whole = fs::read(&path).ok();
        match contents {
            Some(contents) => fs::write(&path, contents).expect("written"),
            None => fs::remove_file(&path).expect("removed"),
        }
        let said = host.says(&["watch", "--once"], 3);
        assert!(said.contains("suspended, ") && said.contains("[E0813]"), "{file} {contents:?}: {said}");
        assert!(host.kernel_decides(), "{file} {contents:?}");
        match whole {
            Some(whole) => fs::write(&path, whole).expect("written"),
            None => fs::remove_file(&path).expect("removed"),
        }
        let said = host.says(&["watch", "--once"], 0);
        assert!(said.contains("goes on"), "{file} {contents:?}: {said}");
    }
    assert!(!host.kernel_decides());
    // Who watches all the time says it once, and rules that say nothing do not agree with a kernel that has none.
    fs::write(slot.join("gen-1/rules"), "junk").expect("written");
    kernel::run("iptables-legacy", &["-F"]).expect("the rules are gone");
    kernel::run("iptables-legacy", &["-P", "INPUT", "ACCEPT"]).expect("the policy is taken");
    let mut watcher = Command::new(env!("CARGO_BIN_EXE_polc"))
        .args(["watch", "--interval", "50", "--bpffs", &host.pins.join(""), "--state"])
        .arg(host.files.path().join("state"))
        .stderr(Stdio::piped())
        .spawn()
        .expect("polc runs");
    let local = socket("192.0.2.1:5000");
    local.set_read_timeout(Some(Duration::from_millis(5))).expect("a time");
    until(|| {
        host.send("192.0.2.2:4000", "192.0.2.1:5000", 1);
        received(&local) > 0
    });
    thread::sleep(SILENCE);
    watcher.kill().expect("it runs");
    let said = watcher.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(!said.contains("goes on"), "{said}");
    assert_eq!((said.matches("suspended, ").count(), said.matches("[E0813]").count()), (1, 1), "{said}");
    host.says(&["flush"], 0);
}

/// Of the sets that it was compiled from none may be missing, or say less: everything agrees with that.
#[test]
fn what_is_kept_of_sets_is_what_was_applied() {
    let name = "what_is_kept_of_sets_is_what_was_applied";
    if !kernel::may_run(name) || !kernel::has_tools(name, &["ipset"]) {
        return;
    }
    // Packets of connections would be the kernel's to decide.
    const OPEN: &str = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n";
    let Some(host) = Host::new("acc-sets", OPEN) else { return };
    const SETS: &str = "create bad hash:ip family inet\nadd bad 192.0.2.2\nadd bad 192.0.2.99\n";
    let file = host.files.file("sets", SETS.as_bytes());
    kernel::run("ipset", &["restore", "-file", &file]).expect("the kernel takes the sets");
    let rule = "-A INPUT -m set --match-set bad src -j DROP\nCOMMIT";
    host.restore(&OPEN.replace("COMMIT", rule));
    let local = socket("192.0.2.1:5000");
    let apply = ["apply", "rules.v4", "--dev", "eth0", "--ipset", "sets"];
    host.says(&apply, 0);
    // Elements that went are let in by the kernel alone.
    kernel::run("ipset", &["del", "bad", "192.0.2.2"]).expect("it is there");
    let arrives = || {
        host.send("192.0.2.2:4000", "192.0.2.1:5000", 1);
        received(&local) > 0
    };
    assert!(!arrives());
    let slot = host.kept();
    for (file, contents) in [
        ("gen-1/sets-0", None),
        ("gen-1/sets-0", Some("")),
        ("gen-1/sets-0", Some("create bad hash:ip family inet\nadd bad 192.0.2.99\n")),
        ("gen-1/kept.json", None),
    ] {
        let path = slot.join(file);
        let whole = fs::read(&path).expect("it is kept");
        match contents {
            Some(contents) => fs::write(&path, contents).expect("written"),
            None => fs::remove_file(&path).expect("removed"),
        }
        let said = host.says(&["watch", "--once"], 3);
        assert!(said.contains("suspended, ") && said.contains("[E0813]"), "{file} {contents:?}: {said}");
        assert!(said.contains(file), "{said}");
        assert!(arrives(), "{file} {contents:?}");
        fs::write(&path, whole).expect("written");
        kernel::run("ipset", &["add", "bad", "192.0.2.2"]).expect("it is not there");
        let said = host.says(&["watch", "--once"], 0);
        assert!(said.contains("goes on"), "{file} {contents:?}: {said}");
        kernel::run("ipset", &["del", "bad", "192.0.2.2"]).expect("it is there");
        assert!(!arrives(), "{file} {contents:?}");
    }
    // Nor is a policy applied anew with less, where the kernel's rules are not asked.
    host.says(&[&apply[..], &["--replace"]].concat(), 0);
    let slot = slot.join("gen-2");
    for (file, less) in [("sets-0", "create bad hash:ip family inet\n"), ("sets.json", "[]")] {
        let whole = fs::read(slot.join(file)).expect("it is kept");
        fs::write(slot.join(file), less).expect("written");
        ip("addr add 192.0.2.9/32 dev eth0");
        let said = host.says(&["watch", "--once"], 3);
        assert!(said.contains("[E0813]") && said.contains(file), "{said}");
        assert!(!arrives());
        fs::write(slot.join(file), whole).expect("written");
        ip("addr del 192.0.2.9/32 dev eth0");
    }
    host.says(&["flush"], 0);
}

/// A rule set that stands at several hooks is applied anew at all of them together.
#[test]
fn hooks_follow_together() {
    let rules = STATEFUL.replace(":FORWARD ACCEPT", ":FORWARD DROP");
    let Some(host) = Host::new("acc-hooks", &rules) else { return };
    host.says(&["apply", "rules.v4", "--attach", "netfilter"], 0);
    let status = |host: &Host| host.says(&["status", "--sample", "0"], 0);
    let hooks = status(&host).matches("generation 1,").count();
    assert!(hooks > 1, "{hooks}");
    ip("addr add 192.0.2.9/32 dev eth0");
    let said = host.says(&["watch", "--once"], 0);
    assert_eq!(said.matches("applying anew").count(), hooks, "{said}");
    assert_eq!(said.matches(" compiled, ").count(), 1, "by one command: {said}");
    assert_eq!(status(&host).matches("generation 2,").count(), hooks);
    host.says(&["flush"], 0);
}

/// A socket that DHCP clients have: it sees every frame of IPv4 before any rule does (packet(7)). One for every protocol
/// would see frames before tc does, too (net/core/dev.c, `__netif_receive_skb_core`).
fn packet_socket() -> File {
    const ETH_P_IP: u16 = 0x0800;
    let protocol = NonZeroU32::new(ETH_P_IP.to_be().into()).map(Protocol::from_raw);
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(AddressFamily::PACKET, SocketType::RAW, flags, protocol);
    File::from(socket.expect("root may"))
}

/// The frames that came.
fn frames(socket: &File) -> impl Iterator<Item = Vec<u8>> {
    let mut socket = socket;
    std::iter::from_fn(move || {
        let mut frame = vec![0; 2_048];
        let bytes = socket.read(&mut frame).ok()?;
        frame.truncate(bytes);
        Some(frame)
    })
}

#[test]
fn dhcp_clients_go_on() {
    // The offer to a client that has no address yet, which INPUT drops and a packet socket reads.
    for (name, attach) in [("acc-dhcp-xdp", "xdp"), ("acc-dhcp-tc", "tc-ingress")] {
        let Some(host) = Host::new(name, STATEFUL) else { return };
        let client = packet_socket();
        let offers = |host: &Host| {
            host.send("192.0.2.2:67", "192.0.2.1:68", 3);
            thread::sleep(SILENCE);
            frames(&client).filter(|frame| frame.get(36..38) == Some(&[0, 68])).count()
        };
        assert_eq!(offers(&host), 3);
        host.says(&["apply", "rules.v4", "--dev", "eth0", "--attach", attach, "--keep", "none"], 0);
        assert_eq!(offers(&host), 0, "{attach}: dropped before any socket sees it");
        host.apply(attach);
        assert_eq!(offers(&host), 3, "{attach}: kept, as is the default");
        host.says(&["flush"], 0);
    }
}
