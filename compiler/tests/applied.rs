//! What the commands say about policies that are applied in the running kernel: `save`, `trace`, `status`, `top`,
//! `serve-metrics`, `dump xlated`, `dump jited`, as people and scripts see them.
//!
//! Each test has a host and a peer, network namespaces joined by a pair of devices, and directories of its own for pins
//! and state. Without root the tests say that they are skipped.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::UdpSocket;
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use polc_tests::kernel::{self, BpfFs, Namespace, TempDir};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const RULES: &str = "\
*filter
:INPUT DROP [0:0]
:LOGGED - [0:0]
-A INPUT -p udp -m udp --dport 53 -j LOGGED
-A INPUT -s 192.0.2.0/24 -p udp -m udp --dport 53 -j DROP
-A INPUT -p udp -m udp --dport 80 -j ACCEPT
-A LOGGED
COMMIT
";

/// Bytes of the peer's packets, from the IP header on.
const BYTES: u64 = 20 + 8 + 5;
/// Longest wait for what comes in moments.
const PATIENCE: Duration = Duration::from_secs(20);

/// A host with a device, the peer at its other end, and where its polc keeps things.
struct Host {
    state: String,
    bpffs: String,
    files: TempDir,
    peer: Sender<(u16, usize)>,
    sent: Receiver<()>,
    _pins: BpfFs,
    _namespace: Namespace,
}

impl Host {
    /// Moves the calling thread into the host; `None` if the test can't run.
    fn new(name: &str) -> Option<Host> {
        if !kernel::may_run(name) || !kernel::has_tools(name, &["ip"]) {
            return None;
        }
        let namespace = Namespace::enter(&format!("{name}-host"));
        let (peer, ports) = mpsc::channel::<(u16, usize)>();
        let (done, sent) = mpsc::channel();
        let peer_name = format!("{name}-peer");
        let in_peer = peer_name.clone();
        thread::spawn(move || {
            let _namespace = Namespace::enter(&in_peer);
            done.send(()).expect("the host waits");
            // The first message says that the device is here.
            let mut socket = None;
            for (port, count) in ports {
                let socket = socket.get_or_insert_with(|| {
                    ip("addr add 192.0.2.2/24 dev peer");
                    ip("link set peer up");
                    UdpSocket::bind("192.0.2.2:4000").expect("the peer's address")
                });
                for index in 0..count {
                    // The device's queue holds 256 packets.
                    if index % 100 == 99 {
                        thread::sleep(Duration::from_millis(2));
                    }
                    socket.send_to(b"hello", ("192.0.2.1", port)).expect("sent");
                }
                done.send(()).expect("the host waits");
            }
        });
        sent.recv_timeout(PATIENCE).expect("the peer is there");
        ip("link add eth0 type veth peer name peer");
        ip(&format!("link set peer netns polc-{peer_name}-{}", std::process::id()));
        ip("addr add 192.0.2.1/24 dev eth0");
        ip("link set eth0 up");
        let (files, pins) = (TempDir::new(name), BpfFs::new(&format!("{name}-pins")));
        files.file("rules.v4", RULES.as_bytes());
        let host = Host {
            state: files.path().join("state").to_str().expect("UTF-8").to_string(),
            bpffs: pins.join(""),
            files,
            peer,
            sent,
            _pins: pins,
            _namespace: namespace,
        };
        // The peer's device comes up, and the neighbours get to know each other.
        let socket = UdpSocket::bind("192.0.2.1:9").expect("the host's address");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time");
        host.send(9, 1);
        kernel::uninterrupted(|| socket.recv(&mut [0; 8])).expect("the peer's packet");
        Some(host)
    }

    /// polc with its directories; the first word of `args` is the command.
    fn polc(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polc"));
        command.args(args).args(["--bpffs", &self.bpffs, "--state", &self.state]).stdin(Stdio::null());
        command.current_dir(self.files.path());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.polc(args).output().expect("polc runs")
    }

    /// Standard output of a command that ends well.
    fn well(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {error}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Standard error of a command that ends with `code`.
    fn fails(&self, args: &[&str], code: i32) -> String {
        let output = self.run(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        error
    }

    fn apply(&self, options: &[&str]) {
        self.well(&[&["apply", "rules.v4", "--dev", "eth0", "--replace"], options].concat());
    }

    /// Has the peer send UDP packets to a port of the host.
    fn send(&self, port: u16, count: usize) {
        self.peer.send((port, count)).expect("the peer is there");
        self.sent.recv_timeout(PATIENCE).expect("the peer sends");
    }

    /// Starts a command that watches, and waits until it does.
    fn watch(&self, args: &[&str]) -> Watcher {
        let child = self.polc(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.expect("polc runs");
        let lines = lines(child.stderr.take().expect("piped"));
        let out = child.stdout.take();
        let mut watcher = Watcher { child, out, lines };
        let line = watcher.remark();
        assert!(line.contains("watching"), "{args:?}: {line}");
        watcher
    }
}

fn ip(args: &str) {
    kernel::run("ip", &args.split(' ').collect::<Vec<_>>()).expect("ip");
}

/// Lines that are read as they come.
fn lines(from: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    receive
}

/// A polc that goes on until told otherwise.
struct Watcher {
    child: Child,
    out: Option<ChildStdout>,
    lines: Receiver<String>,
}

impl Watcher {
    fn remark(&mut self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("polc says something")
    }

    fn tell(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("it runs");
    }

    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("its own child") {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it printed until its end, by lines.
    fn rest(&mut self) -> Vec<String> {
        let mut text = String::new();
        self.out.take().expect("read once").read_to_string(&mut text).expect("text");
        text.lines().map(str::to_string).collect()
    }

    /// What it remarked until its end.
    fn remarks(&self) -> String {
        self.lines.iter().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until something is so.
fn eventually<T>(mut what: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match what() {
            Ok(found) => return found,
            Err(why) => assert!(Instant::now() < deadline, "{why}"),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Asserts that a schema of docs/ documents every field of a value, and that what it requires is there.
fn documented(schema: &str, definition: &str, value: &Value) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(schema);
    let all = json(&std::fs::read_to_string(path).expect("the schema"));
    let mut left = vec![(all.pointer(definition).expect("the definition"), value)];
    while let Some((part, value)) = left.pop() {
        let part = match part["$ref"].as_str() {
            Some(reference) => all.pointer(&reference[1..]).expect("the definition"),
            None => part,
        };
        for name in part["required"].as_array().into_iter().flatten() {
            assert!(value.get(name.as_str().expect("a name")).is_some(), "{name} in {value}");
        }
        for (name, field) in value.as_object().into_iter().flatten() {
            let documented = part["properties"].get(name).unwrap_or_else(|| panic!("{schema}: {name}"));
            left.push((documented, field));
        }
        left.extend(value.as_array().into_iter().flatten().map(|element| (&part["items"], element)));
    }
}

fn json(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

#[test]
fn save_prints_live_counters_that_restore_takes() {
    let Some(host) = Host::new("save") else { return };
    host.apply(&[]);
    host.send(53, 3);
    host.send(80, 2);
    host.send(7, 1);
    let expected = format!(
        "*filter\n:INPUT DROP [1:{}]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:LOGGED - [0:0]\n\
         [3:{three}] -A INPUT -p udp -m udp --dport 53 -j LOGGED\n\
         [3:{three}] -A INPUT -s 192.0.2.0/24 -p udp -m udp --dport 53 -j DROP\n\
         [2:{}] -A INPUT -p udp -m udp --dport 80 -j ACCEPT\n[3:{three}] -A LOGGED\nCOMMIT\n",
        BYTES,
        2 * BYTES,
        three = 3 * BYTES,
    );
    let rules = |saved: &str| saved.split_once("rules.v4\n").expect("a header").1.to_string();
    let saved = eventually(|| {
        let saved = host.well(&["save", "-c"]);
        if rules(&saved) == expected { Ok(saved) } else { Err(saved) }
    });
    let header: Vec<&str> = saved.lines().take(2).collect();
    assert!(header[0].starts_with("# Generated by polc ") && header[0].ends_with(" as iptables-save"));
    assert_eq!(header[1], "# In force at xdp of `eth0` for IPv4: rules.v4");
    // Rules that are applied anew go on counting, and zeros of others' stay away from them.
    host.apply(&[]);
    let again = host.well(&["save", "-c"]);
    assert_eq!(rules(&again), expected);
    // The same rules may be written otherwise.
    host.files.file("rules.v4", RULES.replace(" -m udp", "").as_bytes());
    host.apply(&[]);
    assert_eq!(rules(&host.well(&["save", "-c"])), expected);
    host.files.file("rules.v4", RULES.as_bytes());
    let file = host.files.file("saved", saved.as_bytes());
    host.well(&["flush"]);
    host.well(&["restore", "-c", &file, "--dev", "eth0"]);
    let restored = host.well(&["save", "-c"]);
    assert_eq!(restored.split_once("saved\n").expect("a header").1, expected);
    // With -c counters are the file's, whatever is in force.
    host.send(80, 1);
    host.well(&["restore", "-c", &file, "--dev", "eth0"]);
    assert_eq!(host.well(&["save", "-c"]).split_once("saved\n").expect("a header").1, expected);
    // Without -c, policies alone have counters.
    let plain = host.well(&["save", "--attach", "xdp", "--family", "4"]);
    assert!(plain.contains(&format!(":INPUT DROP [1:{BYTES}]\n")), "{plain}");
    assert!(plain.contains("\n-A INPUT -p udp -m udp --dport 80 -j ACCEPT\n"), "{plain}");
    let error = host.fails(&["save", "--family", "6"], 3);
    assert!(error.contains("[E0816]") && error.contains("for IPv6"), "{error}");
}

#[test]
fn trace_shows_packets_as_they_are_decided() {
    let Some(host) = Host::new("trace") else { return };
    host.apply(&[]);
    let mut watcher = host.watch(&["trace", "--format", "json", "udp", "dport", "53", "or", "dport", "80"]);
    host.send(53, 2);
    host.send(7, 1);
    host.send(80, 1);
    eventually(|| {
        let saved = host.well(&["save", "-c"]);
        if saved.contains("[1:33] -A INPUT -p udp -m udp --dport 80") { Ok(()) } else { Err(saved) }
    });
    watcher.tell(Signal::INT);
    assert_eq!(watcher.end().code(), Some(0));
    let lines = watcher.rest();
    assert_eq!(lines.len(), 3, "{lines:?}");
    let first = json(&lines[0]);
    for (name, value) in [
        ("attach", "xdp".into()),
        ("hook", "input".into()),
        ("device", "eth0".into()),
        ("verdict", "drop".into()),
        ("table", "filter".into()),
        ("chain", "INPUT".into()),
        ("rule", 2.into()),
        ("file", "rules.v4".into()),
        ("line", 5.into()),
        ("text", "-A INPUT -s 192.0.2.0/24 -p udp -m udp --dport 53 -j DROP".into()),
        ("proto", "udp".into()),
        ("src", "192.0.2.2".into()),
        ("dst", "192.0.2.1".into()),
        ("sport", 4000.into()),
        ("dport", 53.into()),
        ("length", BYTES.into()),
        ("mark", Value::from(0)),
    ] {
        assert_eq!(first[name], value, "{name}");
    }
    // Rules of INPUT have the last word on what is for this host.
    let accepted = json(&lines[2]);
    for (name, value) in [("verdict", "accept"), ("hook", "input"), ("chain", "INPUT")] {
        assert_eq!(accepted[name], value, "{name}");
    }
    assert_eq!((&accepted["rule"], &accepted["line"]), (&3.into(), &6.into()));
    for line in &lines {
        documented("trace-schema.json", "/$defs/packet", &json(line));
    }
    assert_eq!(watcher.remarks(), "3 packets shown");

    // For people, and who decided.
    let mut watcher = host.watch(&["trace", "-c", "1", "--verdict", "drop", "--chain", "INPUT"]);
    host.send(80, 1);
    host.send(7, 1);
    assert_eq!(watcher.end().code(), Some(0));
    let lines = watcher.rest();
    assert_eq!(lines.len(), 1, "{lines:?}");
    let (_, line) = lines[0].split_once(' ').expect("a time");
    assert_eq!(line, "eth0 xdp input drop   udp 192.0.2.2:4000 > 192.0.2.1:7 length 33  policy of INPUT");
    let error = host.fails(&["trace", "--line", "99"], 2);
    assert!(error.contains("no packet is ever decided by a rule in line 99"), "{error}");
    let error = host.fails(&["trace", "host", "192.0.2.1"], 2);
    assert!(error.contains("`host` is no word of a filter"), "{error}");
}

#[test]
fn what_trace_does_not_show_is_counted() {
    let Some(host) = Host::new("rate") else { return };
    host.apply(&[]);
    let mut watcher = host.watch(&["trace", "--format", "json", "--rate", "5", "dport", "53"]);
    host.send(53, 2_000);
    eventually(|| {
        let saved = host.well(&["save", "-c"]);
        if saved.contains("[2000:66000] -A LOGGED") { Ok(()) } else { Err(saved) }
    });
    watcher.tell(Signal::TERM);
    assert_eq!(watcher.end().code(), Some(0));
    let lines: Vec<Value> = watcher.rest().iter().map(|line| json(line)).collect();
    let shown = lines.iter().filter(|line| line.get("time").is_some()).count() as u64;
    for gap in lines.iter().filter(|line| line.get("time").is_none()) {
        documented("trace-schema.json", "/$defs/gap", gap);
    }
    let missing: u64 = lines
        .iter()
        .filter_map(|line| line.get("not_reported"))
        .map(|gap| {
            gap["over_rate"].as_u64().expect("a number") + gap["buffer_full"].as_u64().expect("a number")
        })
        .sum();
    assert!(shown >= 5 && missing > 1_000, "{shown} shown, {missing} not");
    assert_eq!(shown + missing, 2_000);
    let remarks = watcher.remarks();
    let expected =
        format!("{shown} packets shown, {missing} packets not reported: {missing} over 5 a second");
    assert!(remarks.starts_with(&expected), "{remarks}");
}

#[test]
fn trace_ends_though_its_reader_does_not_read() {
    let Some(host) = Host::new("stuck") else { return };
    host.apply(&[]);
    // A pipe holds 64 KiB.
    let mut watcher = host.watch(&["trace", "--format", "json", "--rate", "0", "dport", "53"]);
    host.send(53, 2_000);
    eventually(|| {
        let saved = host.well(&["save", "-c"]);
        if saved.contains("[2000:66000] -A LOGGED") { Ok(()) } else { Err(saved) }
    });
    watcher.tell(Signal::TERM);
    let unread = watcher.out.take();
    assert_eq!(watcher.end().code(), Some(0));
    assert!(watcher.remarks().contains("not all of which were read"), "{}", watcher.remarks());
    drop(unread);
    assert!(host.well(&["status", "--sample", "0"]).contains("reports off"));
}

#[test]
fn trace_ends_when_nobody_reads_and_follows_the_policy() {
    let Some(host) = Host::new("follow") else { return };
    host.apply(&[]);
    // A reader that goes away, without a packet to tell of it.
    let mut watcher = host.watch(&["trace"]);
    drop(watcher.out.take());
    assert_eq!(watcher.end().code(), Some(0));

    // One watcher at a time; the next may come when it is gone, killed or not.
    let mut watcher = host.watch(&["trace"]);
    let error = host.fails(&["trace"], 3);
    assert!(error.contains("[E0824]") && error.contains("end the other `polc trace` first"), "{error}");
    watcher.tell(Signal::KILL);
    watcher.end();

    // A policy comes that has nobody who decides what is wanted, and goes.
    let own = RULES.replace("80 -j ACCEPT", "80 -j OWN").replace("COMMIT", "-A OWN -j ACCEPT\nCOMMIT");
    let own = host.files.file("own.v4", own.replace(":LOGGED", ":OWN - [0:0]\n:LOGGED").as_bytes());
    let apply_own = || host.well(&["apply", &own, "--dev", "eth0", "--replace"]);
    apply_own();
    let mut watcher = host.watch(&["trace", "--chain", "OWN"]);
    host.apply(&[]);
    assert!(watcher.remark().contains("replaced"));
    assert!(watcher.remark().contains("no packet is ever decided in chain `OWN`"));
    assert!(watcher.remark().contains("watching"));
    host.send(80, 1);
    apply_own();
    host.send(80, 1);
    assert!(watcher.remark().contains("replaced"));
    assert!(watcher.remark().contains("watching"));
    watcher.tell(Signal::INT);
    assert_eq!(watcher.end().code(), Some(0));
    assert!(watcher.remarks().contains("1 packet shown"));
    host.apply(&[]);

    // The policy is replaced, then removed.
    let mut watcher = host.watch(&["trace", "--format", "json", "dport", "80"]);
    host.apply(&[]);
    assert!(watcher.remark().contains("replaced"));
    assert!(watcher.remark().contains("watching"));
    host.send(80, 1);
    eventually(|| {
        let saved = host.well(&["save", "-c"]);
        if saved.contains("[1:33] -A INPUT -p udp -m udp --dport 80") { Ok(()) } else { Err(saved) }
    });
    host.well(&["flush"]);
    assert_eq!(watcher.end().code(), Some(0));
    let remarks = watcher.remarks();
    assert!(remarks.contains("1 packet shown") && remarks.contains("is not applied any more"), "{remarks}");
    assert_eq!(watcher.rest().len(), 1);
}

/// A policy without reports in place of the one that is watched is waited out.
#[test]
fn trace_waits_for_a_policy_that_reports() {
    let Some(host) = Host::new("waits") else { return };
    host.apply(&[]);
    let mut watcher = host.watch(&["trace", "--format", "json", "dport", "80"]);
    let expect = |watcher: &mut Watcher, what: &[&str]| {
        for part in what {
            let line = watcher.remark();
            assert!(line.contains(part), "{part}: {line}");
        }
    };
    let waits = ["replaced", "applied without reports, so not shown", "waiting for a policy that is applied"];
    let goes_on = ["replaced", "is neither shown nor counted", "watching"];
    // It is replaced again, and it goes back by itself.
    host.apply(&["--no-trace"]);
    expect(&mut watcher, &waits);
    host.send(80, 1);
    host.apply(&[]);
    expect(&mut watcher, &goes_on);
    host.send(80, 2);
    host.apply(&["--no-trace", "--confirm", "1"]);
    expect(&mut watcher, &waits);
    expect(&mut watcher, &goes_on);
    host.send(80, 1);
    eventually(|| {
        let saved = host.well(&["save", "-c"]);
        if saved.contains("[4:132] -A INPUT -p udp -m udp --dport 80") { Ok(()) } else { Err(saved) }
    });
    // While it waits it ends as ever.
    host.apply(&["--no-trace"]);
    expect(&mut watcher, &waits);
    watcher.tell(Signal::INT);
    assert_eq!(watcher.end().code(), Some(0));
    assert_eq!(watcher.rest().len(), 3);
    assert!(watcher.remarks().contains("3 packets shown"));
    let error = host.fails(&["trace"], 3);
    assert!(error.contains("[E0825]") && error.contains("apply it again without --no-trace"), "{error}");
    // Beside one that reports, too.
    host.apply(&["--attach", "tc-ingress"]);
    let mut watcher =
        host.polc(&["trace"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("polc runs");
    let lines = lines(watcher.stderr.take().expect("piped"));
    let mut watcher = Watcher { child: watcher, out: None, lines };
    expect(&mut watcher, &["at xdp of `eth0` for IPv4: applied without reports", "watching at tc-ingress"]);
    host.apply(&[]);
    expect(&mut watcher, &["replaced", "watching at xdp", "watching at tc-ingress"]);
    host.well(&["flush"]);
    assert_eq!(watcher.end().code(), Some(0));
}

/// Packets that a new policy decides before its watcher has come to it are shown.
#[test]
fn trace_misses_nothing_when_policies_change() {
    let Some(host) = Host::new("change") else { return };
    // What one policy reports is not cut short by a change of the other.
    host.apply(&[]);
    host.apply(&["--attach", "tc-ingress"]);
    let mut watcher = host.watch(&["trace", "--format", "json", "--verdict", "accept", "dport", "80"]);
    watcher.remark();
    let mut sent = 0;
    let mut send = |count| {
        host.send(80, count);
        sent += 2 * count;
    };
    for options in [&[][..], &[], &["--attach", "tc-ingress"], &[], &["--confirm", "1"]] {
        host.apply(options);
        send(3);
        assert!(watcher.remark().contains("replaced"));
        assert!([watcher.remark(), watcher.remark()].iter().all(|line| line.contains("watching")));
    }
    thread::sleep(Duration::from_millis(1_300));
    send(3);
    eventually(|| {
        let saved = host.well(&["save", "-c", "--attach", "tc-ingress"]);
        let all = format!("[{}:{}] -A INPUT -p udp -m udp --dport 80", sent / 2, sent / 2 * BYTES as usize);
        if saved.contains(&all) { Ok(()) } else { Err(saved) }
    });
    watcher.tell(Signal::INT);
    assert_eq!(watcher.end().code(), Some(0));
    assert_eq!(watcher.rest().len(), sent);
    let remarks = watcher.remarks();
    assert!(
        remarks.contains(&format!("{sent} packets shown")) && !remarks.contains("neither shown"),
        "{remarks}"
    );
    assert!(!host.well(&["status", "--sample", "0"]).contains("reports on"));
}

#[test]
fn code_of_applied_policies_stands_beside_its_rules() {
    let Some(host) = Host::new("code") else { return };
    let error = host.fails(&["dump", "jited"], 3);
    assert!(error.contains("[E0816] no policy of polc's is applied here"), "{error}");
    host.apply(&[]);
    for (code, instruction) in [("xlated", "(95) exit"), ("jited", "push rbp")] {
        let text = host.well(&["dump", code, "--dev", "eth0"]);
        assert!(text.starts_with("at xdp of `eth0` for IPv4: rules.v4\n"), "{text}");
        assert!(text.contains(instruction), "{text}");
        assert!(text.contains("; -A INPUT -p udp -m udp --dport 53 -j LOGGED @ rules.v4:4\n"), "{text}");
        // What each rule costs that has code of its own; what a table decides with others has none.
        let table = text.split_once("\ninstructions  bytes  line\n").expect("a table").1;
        let rows: Vec<&str> = table.lines().filter(|row| row.contains(": -A INPUT")).collect();
        assert!(rows.len() >= 2 && rows[0].contains("  rules.v4:4: "), "{table}");
        for row in rows {
            let numbers: Vec<u64> =
                row.split_whitespace().take(2).map(|number| number.parse().expect("a number")).collect();
            assert!(numbers[0] > 0 && numbers[1] >= numbers[0], "{row}");
        }
    }
    ip("link add eth1 type veth peer name eth2");
    let error = host.fails(&["dump", "jited", "--dev", "eth1"], 3);
    assert!(error.contains("no policy of polc's is applied here of `eth1`"), "{error}");
    for command in [&["dump", "jited"][..], &["status"], &["save"], &["watch", "--once"], &["flush"]] {
        let error = host.fails(&[command, &["--dev", "nope"]].concat(), 3);
        assert!(error.contains("[E0803] there is no device `nope`\n"), "{error}");
        assert!(error.contains("help: this network namespace has `lo`, `"), "{error}");
        assert!(error.contains("`eth0`") && error.contains("`eth1`"), "{error}");
    }
}

#[test]
fn status_tells_what_is_applied() {
    let Some(host) = Host::new("status") else { return };
    assert_eq!(host.well(&["status"]), "nothing is applied\n");
    assert_eq!(host.well(&["status", "--format", "json"]), "[]\n");
    host.apply(&[]);
    host.send(53, 3);
    host.send(80, 1);
    let status = eventually(|| {
        let status = json(&host.well(&["status", "--format", "json"]));
        // Frames of the neighbours' own are accepted too.
        let seen = status[0]["verdicts"]["accept"]["packets"].as_u64() >= Some(1)
            && status[0]["verdicts"]["drop"]["packets"] == 3;
        if seen { Ok(status) } else { Err(status.to_string()) }
    });
    documented("status-schema.json", "", &status);
    let policy = &status[0];
    assert_eq!(policy["attach"], "xdp");
    assert_eq!(policy["device"], "eth0");
    assert_eq!(policy["family"], 4);
    assert_eq!(policy["mode"], "replace");
    assert_eq!(policy["via"], "xdp link");
    assert_eq!(policy["path"], serde_json::json!(["prerouting", "input", "forward"]));
    assert_eq!(policy["rules"], 4);
    assert_eq!(policy["verdicts"]["drop"]["bytes"], 3 * BYTES);
    let counters = &policy["maps"].as_array().expect("maps")[0];
    assert_eq!(counters["name"], "polc_counters");
    assert!(
        counters["entries"].as_u64() > Some(4)
            && counters["entries"].as_u64() <= counters["entries_max"].as_u64()
    );
    let text = host.well(&["status", "--sample", "0"]);
    assert!(
        text.starts_with("at xdp of `eth0` for IPv4: rules.v4, replace mode, 4 rules\n  since 20"),
        "{text}"
    );
    assert!(text.contains("generation 1, by xdp link for prerouting, input, forward\n"), "{text}");
    assert!(text.contains("  drop               3 packets              99 bytes\n"), "{text}");
}

#[test]
fn metrics_are_served_to_whoever_asks() {
    let Some(host) = Host::new("metrics") else { return };
    ip("link set lo up");
    let mut server = host.polc(&["serve-metrics", "--listen", "127.0.0.1:0"]);
    let mut child = server.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("polc runs");
    let lines = lines(child.stderr.take().expect("piped"));
    let mut server = Watcher { child, out: None, lines };
    let line = server.remark();
    let address =
        line.strip_prefix("serving metrics on http://").and_then(|rest| rest.strip_suffix("/metrics"));
    let address = address.unwrap_or_else(|| panic!("{line}")).to_string();
    let get = |request: &str| {
        use std::io::Write as _;
        let mut stream = std::net::TcpStream::connect(&address).expect("it listens");
        write!(stream, "{request} HTTP/1.1\r\nHost: polc\r\nConnection: close\r\n\r\n").expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    // Nothing is applied, which is no failure.
    let answer = get("GET /metrics");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"));
    assert!(answer.contains("\npolc_policies 0\n") && answer.ends_with("# EOF\n"), "{answer}");
    host.apply(&[]);
    host.send(53, 3);
    let place = "attach=\"xdp\",device=\"eth0\",family=\"4\"";
    let rule = format!(
        "polc_rule_packets_total{{{place},table=\"filter\",chain=\"INPUT\",rule=\"2\",\
         text=\"-A INPUT -s 192.0.2.0/24 -p udp -m udp --dport 53 -j DROP\"}} 3\n"
    );
    let answer = eventually(|| {
        let answer = get("GET /metrics");
        if answer.contains(&rule) { Ok(answer) } else { Err(answer) }
    });
    for line in [
        "polc_policies 1\n".to_string(),
        format!("polc_packets_total{{{place},verdict=\"drop\"}} 3\n"),
        format!("polc_bytes_total{{{place},verdict=\"drop\"}} {}\n", 3 * BYTES),
        format!(
            "polc_policy_info{{{place},mode=\"replace\",source=\"rules.v4\",generation=\"1\",via=\"xdp link\","
        ),
        format!("polc_map_entries{{{place},map=\"polc_counters\"}} "),
        format!("polc_program_instructions{{{place}}} "),
    ] {
        assert!(answer.contains(&line), "{line}: {answer}");
    }
    // One that asks and asks and never reads keeps nobody waiting.
    let mut greedy = std::net::TcpStream::connect(&address).expect("it listens");
    greedy.set_nonblocking(true).expect("a mode");
    let asked = (0..20_000).take_while(|_| {
        use std::io::Write as _;
        greedy.write_all(b"GET /metrics HTTP/1.1\r\nHost: polc\r\n\r\n").is_ok()
    });
    assert!(asked.count() > 100);
    assert!(get("GET /metrics").contains(&rule));
    drop(greedy);
    // Nor do those that ask for nothing, and for nonsense.
    let nonsense = format!("GET /{} HTTP/1.1", "a".repeat(100_000));
    for (request, status) in [("\u{fffd}", "400 "), (nonsense.as_str(), "431 "), ("HEAD /metrics", "200 ")] {
        let answer = get(request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        assert!(request != "HEAD /metrics" || answer.ends_with("\r\n\r\n"), "{answer}");
    }
    let idle: Vec<_> =
        (0..300).map(|_| std::net::TcpStream::connect(&address).expect("it listens")).collect();
    assert!(get("GET /metrics").contains(&rule));
    drop(idle);
    // Of many that ask at once each is answered.
    let asking: Vec<_> = (0..200)
        .map(|_| {
            use std::io::Write as _;
            let mut stream = std::net::TcpStream::connect(&address).expect("it listens");
            write!(stream, "GET /metrics HTTP/1.1\r\nHost: polc\r\n\r\n").expect("sent");
            stream
        })
        .collect();
    let threads = std::fs::read_dir(format!("/proc/{}/task", server.child.id())).expect("it runs").count();
    assert!(threads < 200, "{threads} threads");
    for mut stream in asking {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.contains(&rule), "{answer}");
    }
    // Of two policies one is damaged under the server, and under somebody who watches both.
    host.apply(&["--attach", "tc-ingress"]);
    assert!(get("GET /metrics").contains("\npolc_policies 2\n"));
    let mut watcher = host.watch(&["trace", "--verdict", "drop"]);
    watcher.remark();
    let folder = std::fs::read_dir(std::path::Path::new(&host.bpffs).join("polc")).expect("pins");
    let folder = folder.map(|entry| entry.expect("an entry").path()).next().expect("a namespace");
    let link = folder.join("eth0-tc-ingress-4/link");
    std::fs::remove_file(&link).expect("it is there");
    std::fs::hard_link(folder.join("eth0-tc-ingress-4/gen-1/prog"), &link).expect("a pin");
    let answer = get("GET /metrics");
    for line in ["\npolc_policies 1\n", "\npolc_policies_unread 1\n"] {
        assert!(answer.contains(line), "{answer}");
    }
    assert!(watcher.remark().contains("[E0812]"));
    host.well(&["flush", "--attach", "tc-ingress"]);
    watcher.tell(Signal::INT);
    assert_eq!(watcher.end().code(), Some(0));
    // OpenMetrics: a counter's samples end in _total, its name does not.
    let answer = get("GET /metrics");
    assert!(answer.contains("# TYPE polc_rule_packets counter\n"), "{answer}");
    host.well(&["flush"]);
    assert!(get("GET /metrics").contains("\npolc_policies 0\n"));
    assert!(get("GET /other").starts_with("HTTP/1.1 404 "));
    assert!(get("POST /metrics").starts_with("HTTP/1.1 405 "));
    let error = host.fails(&["serve-metrics", "--listen", &address], 3);
    assert!(error.contains(&format!("[E0821] can't listen on {address}")), "{error}");
    server.tell(Signal::TERM);
    assert_eq!(server.end().code(), Some(0));
}

#[test]
fn top_runs_on_a_terminal_only() {
    let Some(host) = Host::new("top") else { return };
    host.apply(&[]);
    let error = host.fails(&["top"], 2);
    assert!(error.contains("needs a terminal; `polc status` prints packets a second"), "{error}");
    if !kernel::has_tools("top", &["tmux"]) {
        return;
    }
    let socket = host.files.path().join("tmux");
    let socket = socket.to_str().expect("UTF-8");
    let tmux = |args: &[&str]| kernel::run("tmux", &[&["-S", socket], args].concat());
    let polc = env!("CARGO_BIN_EXE_polc");
    let (bpffs, state) = (&host.bpffs, &host.state);
    let command =
        format!("{polc} top --interval 100 --bpffs {bpffs} --state {state}; echo ended with $?; sleep 60");
    tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "130", "-y", "14", &command]).expect("tmux");
    let shows = |what: &str| {
        eventually(|| {
            host.send(53, 5);
            let screen = tmux(&["capture-pane", "-p"])?;
            if screen.contains(what) { Ok(screen) } else { Err(screen) }
        })
    };
    let screen = shows("at xdp of `eth0` for IPv4: rules.v4");
    assert!(screen.contains("q quit") && screen.contains("packets/s"), "{screen}");
    // The rule that counts comes first.
    eventually(|| {
        host.send(53, 5);
        let screen = tmux(&["capture-pane", "-p"])?;
        let first = screen.lines().nth(4).unwrap_or_default();
        if first.contains("--dport 53") && !first.trim_start().starts_with("0 ") {
            Ok(())
        } else {
            Err(screen)
        }
    });
    tmux(&["send-keys", "i"]).expect("a key");
    tmux(&["send-keys", "s"]).expect("a key");
    let screen = shows("by bytes/s");
    assert!(!screen.contains("--dport 80"), "{screen}");
    // The policy goes away, and with it the screen.
    host.well(&["flush"]);
    let screen = eventually(|| {
        let screen = tmux(&["capture-pane", "-p"])?;
        if screen.contains("ended with 3") { Ok(screen) } else { Err(screen) }
    });
    assert!(screen.contains("[E0816]"), "{screen}");
    // The terminal goes away, and with it the command.
    host.apply(&[]);
    let command = format!("exec {polc} top --interval 100 --bpffs {bpffs} --state {state}");
    tmux(&["new-window", &command]).expect("tmux");
    shows("at xdp of `eth0` for IPv4: rules.v4");
    let pid = tmux(&["display-message", "-p", "#{pane_pid}"]).expect("tmux");
    let _ = tmux(&["kill-server"]);
    eventually(|| match std::fs::read(format!("/proc/{}/cmdline", pid.trim())) {
        Ok(running) if !running.is_empty() => Err(format!("{} is still there", pid.trim())),
        _ => Ok(()),
    });
}

#[test]
fn faults_are_told_and_change_nothing() {
    let Some(host) = Host::new("faults") else { return };
    let commands: [&[&str]; 6] = [
        &["save"],
        &["trace", "-c", "1"],
        &["status"],
        &["dump", "jited"],
        &["dump", "xlated"],
        &["serve-metrics"],
    ];
    // Nothing is applied. status and serve-metrics say so, and it is no failure.
    for command in [commands[0], commands[1], commands[3], commands[4]] {
        let error = host.fails(command, 3);
        assert!(
            error.contains("[E0816]") && error.contains("`polc status` shows what is applied"),
            "{error}"
        );
    }
    host.apply(&["--no-trace"]);
    let error = host.fails(&["trace"], 3);
    assert!(error.contains("[E0825]") && error.contains("apply it again without --no-trace"), "{error}");
    // A user who is not root.
    for command in commands {
        use std::os::unix::process::CommandExt as _;
        let output = host.polc(command).uid(65_534).output();
        let Ok(output) = output else {
            eprintln!("skipped part of faults: another user may not run polc here");
            break;
        };
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{command:?}: {error}");
        assert!(error.contains("[E0800]") && error.contains("run it as root"), "{command:?}: {error}");
    }
    // The pins are not where they are looked for: no bpffs is mounted there.
    let nowhere = host.files.path().join("nowhere");
    let lost = Command::new(env!("CARGO_BIN_EXE_polc"))
        .args(["save", "--state", &host.state, "--bpffs", nowhere.to_str().expect("UTF-8")])
        .output()
        .expect("polc runs");
    let error = String::from_utf8_lossy(&lost.stderr);
    assert_eq!(lost.status.code(), Some(3), "{error}");
    assert!(error.contains("[E0801]") && error.contains("what is applied here can't be seen"), "{error}");
    // What is kept is damaged.
    let namespace =
        std::fs::read_dir(&host.state).expect("state").next().expect("a namespace").expect("an entry");
    let slot = namespace.path().join("eth0-xdp-4");
    let damaged = |file: &str, bytes: &[u8], part: &str| {
        let path = slot.join(file);
        let whole = std::fs::read(&path).expect("the file");
        std::fs::write(&path, bytes).expect("written");
        for command in commands {
            let error = host.fails(command, 3);
            assert!(error.contains(part) && error.contains("help: "), "{command:?} {file}: {error}");
        }
        std::fs::write(&path, whole).expect("written");
    };
    damaged("state.json", b"{", "[E0813]");
    damaged("gen-1/object.o", b"\x7fELF", "[E0813]");
    let canonical = slot.join("gen-1/canonical");
    let whole = std::fs::read(&canonical).expect("the file");
    std::fs::remove_file(&canonical).expect("removed");
    let error = host.fails(commands[0], 3);
    assert!(error.contains("[E0813]") && error.contains("it is not there"), "{error}");
    std::fs::write(&canonical, whole).expect("written");
    // A pin is something else.
    let pins =
        std::path::Path::new(&host.bpffs).join("polc").join(namespace.file_name()).join("eth0-xdp-4/gen-1");
    let (counters, kept) = (pins.join("map_polc_counters"), pins.join("kept"));
    std::fs::rename(&counters, &kept).expect("moved");
    for command in [commands[0], commands[2], commands[3]] {
        let error = host.fails(command, 3);
        assert!(error.contains("[E0812]") && error.contains("it is not there"), "{command:?}: {error}");
    }
    std::fs::hard_link(pins.join("map_tables"), &counters).expect("a pin");
    let error = host.fails(&["save"], 3);
    assert!(error.contains("[E0812]") && error.contains("and the object's map has"), "{error}");
    std::fs::remove_file(&counters).expect("removed");
    std::fs::rename(&kept, &counters).expect("moved");
    host.well(&["save"]);
    host.well(&["flush"]);
}
