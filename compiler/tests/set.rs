//! `polc set` on applied policies, as people and scripts see it. Without root the test says that it is skipped.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use polc_tests::kernel::{self, BpfFs, Namespace, TempDir};

/// Longest wait for what comes in moments.
const PATIENCE: Duration = Duration::from_secs(20);

const RULES: &str = "\
*filter
:INPUT ACCEPT [0:0]
-A INPUT -m set --match-set hosts src -j DROP
-A INPUT -m set --match-set nets src -j DROP
-A INPUT -m set --match-set services src,dst -j DROP
COMMIT
";

const SETS: &str = "\
create hosts hash:ip family inet hashsize 1024 maxelem 4
add hosts 192.0.2.1
create nets hash:net family inet hashsize 1024 maxelem 65536
add nets 10.0.0.0/8
create services hash:ip,port family inet hashsize 1024 maxelem 65536
";

struct Host {
    bpffs: String,
    files: TempDir,
    _pins: BpfFs,
}

impl Host {
    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polc"));
        command.current_dir(self.files.path()).args(args);
        command.output().expect("polc runs")
    }

    /// What a command prints, and its exit status.
    fn says(&self, words: &str) -> (i32, String) {
        let words: Vec<&str> = words.split(' ').collect();
        // Options stand before a set and its element, or behind.
        let (command, rest) = words.split_at(if words[0] == "set" { 2 } else { 1 });
        let output = self.run(&[command, &["--bpffs", &self.bpffs], rest, &["--state", "state"]].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code().expect("an exit status"), text + &String::from_utf8_lossy(&output.stderr))
    }

    fn well(&self, words: &str) -> String {
        let (status, text) = self.says(words);
        assert_eq!(status, 0, "{words}: {text}");
        text
    }

    fn fails(&self, words: &str, status: i32, with: &str) {
        let (found, text) = self.says(words);
        assert_eq!(found, status, "{words}: {text}");
        assert!(text.contains(with), "{words}: {text}");
    }
}

#[test]
fn sets_change_while_they_are_in_force() {
    let name = "sets_change_while_they_are_in_force";
    if !kernel::may_run(name) || !kernel::has_tools(name, &["ip"]) {
        return;
    }
    let _namespace = Namespace::enter("set-host");
    kernel::run("ip", &["link", "add", "eth0", "type", "veth", "peer", "name", "peer"]).unwrap();
    kernel::run("ip", &["link", "set", "eth0", "up"]).unwrap();
    let (files, pins) = (TempDir::new("set"), BpfFs::new("set-pins"));
    files.file("rules.v4", RULES.as_bytes());
    files.file("sets", SETS.as_bytes());
    let host = Host { bpffs: pins.join(""), files, _pins: pins };
    host.fails("set list", 3, "no policy of polc's is applied");
    let apply = "apply rules.v4 --ipset sets --attach tc-ingress --dev eth0";
    host.well(&format!("{apply} --replace"));
    let apply_of = |file: &str, more: &str| format!("{apply} --replace{more}").replace("rules.v4", file);
    let program =
        |text: &str| text.split("program ").nth(1).map(|rest| rest.split(' ').next().map(str::to_owned));
    let before = program(&host.well("status --sample 0"));

    assert_eq!(host.well("set list"), SETS);
    host.well("set add hosts 192.0.2.2");
    assert_eq!(host.well("set test hosts 192.0.2.2"), "192.0.2.2 is in set hosts.\n");
    host.fails("set test hosts 192.0.2.3", 1, "192.0.2.3 is NOT in set hosts.");
    host.fails("set add hosts 192.0.2.2", 1, "it's already added");
    host.well("set add hosts 192.0.2.2 -exist");
    host.well("set del hosts 192.0.2.1");
    host.fails("set del hosts 192.0.2.1", 1, "it's not added");
    host.well("set del -exist hosts 192.0.2.1");
    // Four hosts, where maxelem leaves room for three more: none of them.
    host.fails("set add hosts 192.0.2.8/30", 1, "Hash is full");
    host.fails("set add hosts 192.0.2.8/29", 1, "Hash is full");
    host.well("set add hosts 192.0.2.8/31");
    host.well("set add nets 10.1.0.0/16 nomatch");
    host.well("set add nets 2.0.0.0/7");
    host.fails("set test nets 10.1.2.3", 1, "NOT");
    host.well("set test nets 10.2.2.3");
    host.well("set add services 192.0.2.1,udp:53");
    host.fails("set add services 192.0.2.1", 2, "has 2 parts");
    host.fails("set add nothing 192.0.2.1", 2, "does not exist");
    host.fails("set add hosts 2001:db8::1", 2, "is not an IPv4 address");
    host.fails("set add hosts 192.0.2.200 timeout 5", 2, "timeout");
    assert_eq!(
        host.well("set list hosts"),
        "create hosts hash:ip family inet hashsize 1024 maxelem 4\n\
         add hosts 192.0.2.2\nadd hosts 192.0.2.8\nadd hosts 192.0.2.9\n"
    );
    assert_eq!(
        host.well("set list nets"),
        "create nets hash:net family inet hashsize 1024 maxelem 65536\n\
         add nets 2.0.0.0/7\nadd nets 10.0.0.0/8\nadd nets 10.1.0.0/16 nomatch\n"
    );
    assert_eq!(program(&host.well("status --sample 0")), before);
    // Who watches applies the sets again as they are, not as they were.
    let listed = host.well("set list");
    kernel::run("ip", &["addr", "add", "192.0.2.77/32", "dev", "eth0"]).unwrap();
    assert!(host.well("watch --once").contains("applying anew"));
    assert_eq!(host.well("set list"), listed);
    host.well("set test hosts 192.0.2.2");
    assert_eq!(host.well("watch --once"), "");
    // And the next time: what it was given through a pipe is kept.
    kernel::run("ip", &["addr", "add", "192.0.2.76/32", "dev", "eth0"]).unwrap();
    assert!(host.well("watch --once").contains("applying anew"));
    assert_eq!(host.well("set list"), listed);
    // What is listed can be applied again.
    host.files.file("listed", host.well("set list").as_bytes());
    host.well("apply rules.v4 --ipset listed --attach tc-ingress --dev eth0 --replace");
    host.well("set test nets 3.0.0.1");
    kernel::run("ip", &["addr", "add", "192.0.2.78/32", "dev", "eth0"]).unwrap();
    assert!(host.well("watch --once").contains("applying anew"));
    host.well("set test nets 3.0.0.1");

    // Policies that differ are alike afterwards.
    host.well("flush");
    host.files.file("hooks.v4", RULES.replace("INPUT -", "FORWARD -").as_bytes());
    let at = |file: &str, hook: &str| {
        format!("apply {file} --ipset sets --attach netfilter --hook {hook} --replace")
    };
    host.well(&at("rules.v4", "input"));
    host.well("set add hosts 192.0.2.2");
    host.well("set del hosts 192.0.2.1");
    host.well(&at("hooks.v4", "forward"));
    host.fails("set test hosts 192.0.2.2", 1, "NOT");
    host.well("set add hosts 192.0.2.2");
    host.fails("set add hosts 192.0.2.2", 1, "it's already added");
    host.well("set del hosts 192.0.2.1");
    host.fails("set del hosts 192.0.2.1", 1, "it's not added");
    let listed = |hook: &str| host.well(&format!("set list --hook {hook}"));
    assert_eq!(listed("input"), listed("forward"));
    host.well("flush");

    // What changes while a policy waits for its confirmation has changed when the one before it comes back.
    host.files.file("without.v4", b"*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n");
    host.well(&apply_of("rules.v4", ""));
    host.well(&apply_of("rules.v4", " --confirm 1"));
    assert_eq!(host.well("set add hosts 192.0.2.2"), "");
    assert_eq!(host.well("set del hosts 192.0.2.1"), "");
    let listed = host.well("set list");
    let began = Instant::now();
    while host.well("status --sample 0").contains("unless confirmed") {
        assert!(began.elapsed() < PATIENCE, "it does not go back");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(listed.contains("192.0.2.2") && !listed.contains("192.0.2.1\n"), "{listed}");
    assert_eq!(host.well("set list"), listed);
    // Where that has no room for it, or no such set, it is told.
    host.files.file("larger", SETS.replace("maxelem 4\n", "maxelem 99\n").as_bytes());
    host.well("set add hosts 192.0.2.4/31");
    host.well(&apply_of("rules.v4", " --confirm 600").replace("--ipset sets", "--ipset larger"));
    let said = host.well("set add hosts 192.0.2.8/31");
    assert!(said.contains("unless `polc confirm` follows") && said.contains("its maxelem is 4"), "{said}");
    let said = host.well("set add hosts 192.0.2.16/29");
    assert!(said.contains("unless `polc confirm` follows") && said.contains("its maxelem is 4"), "{said}");
    assert_eq!(host.well("set del hosts 192.0.2.16/29"), "");
    // Nor does it matter what became of that one: the change is made in the policy that is in force.
    let slot = "eth0-tc-ingress-4";
    let maps = Path::new(&host.bpffs).join("polc");
    let kept = host.files.path().join("state");
    let [maps, kept] = [maps, kept].map(|all| {
        let mut spaces = std::fs::read_dir(all).unwrap().map(|space| space.unwrap().path().join(slot));
        let generations = std::fs::read_dir(spaces.next().unwrap()).unwrap();
        let generations = generations.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
        generations.min().unwrap()
    });
    for pin in std::fs::read_dir(&maps).unwrap().map(|pin| pin.unwrap().path()) {
        if pin.file_name().is_some_and(|name| name.to_string_lossy().starts_with("map_")) {
            std::fs::remove_file(pin).unwrap();
        }
    }
    let said = host.well("set add hosts 192.0.2.24");
    assert!(said.contains("unless `polc confirm` follows") && said.contains("it is gone"), "{said}");
    std::fs::write(kept.join("sets.json"), "{").unwrap();
    let said = host.well("set add hosts 192.0.2.25");
    assert!(said.contains("unless `polc confirm` follows") && said.contains("is damaged"), "{said}");
    let listed = host.well("set list hosts");
    assert!(listed.contains("192.0.2.24\n") && listed.contains("192.0.2.25\n"), "{listed}");
    host.well("flush");
    host.well(&apply_of("without.v4", ""));
    host.well(&apply_of("rules.v4", " --confirm 600"));
    assert!(host.well("set del hosts 192.0.2.1").contains("it has no such set"));
    host.well("flush");

    host.well(&format!("{apply} --unchecked"));
    host.fails("set add hosts 192.0.2.7", 2, "the kernel's own set `hosts` decides");
    host.well("flush");
}
