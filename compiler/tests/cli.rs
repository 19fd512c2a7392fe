//! The command line as people and scripts see it: exit status, standard output and standard error, byte for byte.
//!
//! Each `.case` in `tests/cli` starts with the command (`$ polc check bad.rules`, `< FILE` for standard input); what
//! follows is what it printed. `BLESS=1 cargo test -p polc --test cli` writes it anew; the difference is the review.
//! Commands run in `tests/cli/input`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::json;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli")
}

fn polc(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polc"));
    command.args(args).current_dir(folder().join("input")).env_remove("NO_COLOR").stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> Output {
    command.output().expect("polc runs")
}

/// A temporary folder that goes away with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("polc-cli-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary folder");
        Scratch(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("a path in UTF-8").to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Splits at blanks; single quotes keep words together.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (index, part) in line.split('\'').enumerate() {
        if index % 2 == 1 {
            words.push(part.to_string());
        } else {
            words.extend(part.split_whitespace().map(str::to_string));
        }
    }
    words
}

/// What depends on how packets are made and code is generated, rather than on the command line, is written as `N`.
fn masked(text: &str) -> String {
    let mut masked = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        if line.contains(" agree on ") || line.contains(" processed by the verifier") {
            let mut last = ' ';
            for letter in line.chars() {
                let letter = if letter.is_ascii_digit() { 'N' } else { letter };
                if letter != 'N' || last != 'N' {
                    masked.push(letter);
                }
                last = letter;
            }
        } else {
            masked += line;
        }
    }
    masked
}

#[test]
fn cases() {
    let bless = std::env::var_os("BLESS").is_some();
    let mut names: Vec<PathBuf> = fs::read_dir(folder())
        .expect("the cases are there")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "case"))
        .collect();
    names.sort();
    assert!(!names.is_empty());
    let mut wrong = Vec::new();
    for path in names {
        let expected = fs::read_to_string(&path).expect("a case is text");
        let command_line = expected.lines().next().expect("a case has a command");
        let mut args = words(command_line.strip_prefix("$ polc ").expect("a case starts with `$ polc `"));
        let stdin = args.iter().position(|word| word == "<").map(|at| {
            let name = args.remove(at + 1);
            args.remove(at);
            name
        });
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut command = polc(&args);
        if let Some(name) = stdin {
            let file = fs::File::open(folder().join("input").join(name)).expect("the input is there");
            command.stdin(file);
        }
        let output = run(&mut command);
        let actual = format!(
            "{command_line}\n# exit {}\n# stdout\n{}# stderr\n{}",
            output.status.code().expect("polc exits"),
            masked(&String::from_utf8(output.stdout).expect("text")),
            masked(&String::from_utf8(output.stderr).expect("text")),
        );
        if bless {
            fs::write(&path, actual).expect("a case can be written");
        } else if actual != expected {
            wrong.push(format!("{}:\n{actual}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "not as blessed (BLESS=1 writes it anew):\n{}", wrong.join("\n"));
}

#[test]
fn the_json_of_check_adds_up_and_has_the_documented_fields() {
    let output = run(&mut polc(&["check", "--format", "json", "bad.v4.rules"]));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let number = |name: &str| result[name].as_u64().unwrap_or_else(|| panic!("`{name}` is a number"));
    assert_eq!(number("compiled") + number("deferred") + number("rejected"), number("rules"));
    let text = fs::read_to_string(folder().join("input/bad.v4.rules")).expect("the input");
    let lines = text.lines().filter(|line| line.starts_with("-A") || line.starts_with("-I")).count();
    assert_eq!(number("rules"), lines as u64);
    let schema = fs::read_to_string(folder().join("../../../docs/check-schema.json")).expect("the schema");
    let schema: serde_json::Value = serde_json::from_str(&schema).expect("the schema is JSON");
    let finding = &schema["$defs"]["finding"];
    for found in result["diagnostics"].as_array().expect("a list") {
        for name in finding["required"].as_array().expect("a list") {
            assert!(found.get(name.as_str().expect("a name")).is_some(), "{name} in {found}");
        }
        for (name, _) in found.as_object().expect("an object") {
            assert!(finding["properties"].get(name).is_some(), "{name} is documented");
        }
    }
    for (name, _) in result.as_object().expect("an object") {
        assert!(schema["properties"].get(name).is_some(), "{name} is documented");
    }
}

#[test]
fn the_json_of_verify_has_the_documented_fields() {
    let output = run(&mut polc(&["verify", "--format", "json", "good.v4.rules"]));
    assert_eq!(output.status.code(), Some(0));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(result["agree"], true);
    assert!(result["packets"].as_u64().expect("a number") >= 1_000);
    let schema = fs::read_to_string(folder().join("../../../docs/verify-schema.json")).expect("the schema");
    let schema: serde_json::Value = serde_json::from_str(&schema).expect("the schema is JSON");
    for (name, _) in result.as_object().expect("an object") {
        assert!(schema["properties"].get(name).is_some(), "{name} is documented");
    }
    for name in schema["required"].as_array().expect("a list") {
        assert!(result.get(name.as_str().expect("a name")).is_some(), "{name}");
    }
}

#[test]
fn sarif_points_at_the_lines() {
    let output = run(&mut polc(&["check", "--format", "sarif", "bad.v4.rules"]));
    let log: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(log["version"], "2.1.0");
    let results = log["runs"][0]["results"].as_array().expect("a list");
    assert!(results.iter().any(|result| {
        result["level"] == "error"
            && result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "bad.v4.rules"
    }));
    let rules = log["runs"][0]["tool"]["driver"]["rules"].as_array().expect("a list");
    for result in results {
        let index = result["ruleIndex"].as_u64().expect("a number") as usize;
        assert_eq!(rules[index]["id"], result["ruleId"]);
    }
}

#[test]
fn compiling_twice_gives_the_same_bytes_and_leaves_nothing_else() {
    let scratch = Scratch::new("compile");
    let (one, two) = (scratch.file("one.o"), scratch.file("two.o"));
    for object in [&one, &two] {
        let output = run(&mut polc(&["compile", "good.v4.rules", "-o", object]));
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(fs::read(&one).expect("an object"), fs::read(&two).expect("an object"));
    assert_eq!(fs::read_dir(&scratch.0).expect("the folder").count(), 2);
    // Nor does it matter where the rules lie.
    let rules = scratch.file("good.v4.rules");
    fs::copy(folder().join("input/good.v4.rules"), &rules).expect("copied");
    let output = run(&mut polc(&["compile", &rules, "-o", &two]));
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read(&one).expect("an object"), fs::read(&two).expect("an object"));
    let dump = run(&mut polc(&["dump", &one]));
    let text = String::from_utf8(dump.stdout).expect("text");
    assert!(text.contains("-A INPUT -s 192.0.2.0/24 -j DROP @ good.v4.rules:"), "{text}");
}

/// The file has no blocks on the disk.
#[test]
fn a_file_that_is_too_large_is_not_read() {
    let scratch = Scratch::new("large");
    let path = scratch.file("rules.v4");
    let file = fs::File::create(&path).expect("can be made");
    file.set_len(polc_ir::limits::FILE_BYTES_MAX as u64 + 1).expect("can be sparse");
    let output = run(&mut polc(&["check", &path]));
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("is larger than 256 MiB, the most that is read"), "{said}");
}

#[test]
fn a_failed_compilation_writes_nothing() {
    let scratch = Scratch::new("failed");
    let object = scratch.file("x.o");
    let output = run(&mut polc(&["compile", "bad.v4.rules", "-o", &object]));
    assert_eq!(output.status.code(), Some(1));
    let output = run(&mut polc(&["compile", "good.v4.rules", "--replace", "-o", &object]));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(fs::read_dir(&scratch.0).expect("the folder").count(), 0);
}

#[test]
fn fmt_rewrites_in_place_and_is_idempotent() {
    let scratch = Scratch::new("fmt");
    let file = scratch.file("rules.v4");
    fs::copy(folder().join("input/loose.v4.rules"), &file).expect("copied");
    assert_eq!(run(&mut polc(&["fmt", "--check", &file])).status.code(), Some(1));
    assert_eq!(run(&mut polc(&["fmt", "--write", &file])).status.code(), Some(0));
    assert_eq!(run(&mut polc(&["fmt", "--check", &file])).status.code(), Some(0));
    let printed = run(&mut polc(&["fmt", &file])).stdout;
    assert_eq!(printed, fs::read(&file).expect("the file"));
}

#[test]
fn every_level_decides_the_same() {
    let of = |level: &str| {
        run(&mut polc(&[
            "simulate",
            "good.v4.rules",
            "--packets",
            "packets.jsonl",
            "--format",
            "json",
            "--attach",
            "tc-ingress",
            "--hook",
            "input",
            "--level",
            level,
        ]))
        .stdout
    };
    let expected = of("ruleset");
    assert!(!expected.is_empty());
    for level in ["classifier", "decision", "plan", "rbpf"] {
        assert_eq!(String::from_utf8(of(level)), String::from_utf8(expected.clone()), "{level}");
    }
}

#[test]
fn captures_are_read() {
    let scratch = Scratch::new("pcap");
    let path = scratch.file("two.pcap");
    // pcap 2.4, little-endian microseconds, raw IP; a UDP packet, and the first 24 bytes of another.
    let packet = [
        &[0x45u8, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 1][..],
        &[0, 53, 0x10, 0, 0, 12, 0, 0, 1, 2, 3, 4],
    ]
    .concat();
    let mut bytes =
        [0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 101, 0, 0, 0].to_vec();
    for captured in [32u32, 24] {
        bytes.extend([0; 8]);
        bytes.extend(captured.to_le_bytes());
        bytes.extend(32u32.to_le_bytes());
        bytes.extend(&packet[..captured as usize]);
    }
    fs::write(&path, &bytes).expect("written");
    let output = run(&mut polc(&["simulate", "good.v4.rules", "--pcap", &path, "--format", "json"]));
    let text = String::from_utf8(output.stdout).expect("text");
    assert_eq!(text.lines().count(), 2);
    assert!(text.lines().all(|line| line.contains(r#""verdict":"drop""#)), "{text}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 packet captured in part"));
    // Cut within the second packet: the first is decided. Within the first: nothing is.
    for (length, decided) in [(bytes.len() - 10, 1), (50, 0)] {
        fs::write(&path, &bytes[..length]).expect("written");
        let output = run(&mut polc(&["simulate", "good.v4.rules", "--pcap", &path]));
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), decided);
    }
    // As `tcpdump -s 24` writes: the header says that no packet is longer, and the second one was.
    bytes[16..20].copy_from_slice(&24u32.to_le_bytes());
    fs::write(&path, &bytes).expect("written");
    let output = run(&mut polc(&["simulate", "good.v4.rules", "--pcap", &path, "--format", "json"]));
    assert_eq!(text, String::from_utf8_lossy(&output.stdout));
    // One in front that is longer than any IP packet: it is named, keeps its number, and the others are decided.
    let mut long = bytes[..24].to_vec();
    long.extend([0; 8]);
    long.extend([70_000u32.to_le_bytes(); 2].concat());
    long.extend([0x45; 70_000]);
    long.extend(&bytes[24..]);
    fs::write(&path, &long).expect("written");
    let output = run(&mut polc(&["simulate", "good.v4.rules", "--pcap", &path, "--format", "json"]));
    assert_eq!(output.status.code(), Some(1));
    let lines: Vec<serde_json::Value> = output
        .stdout
        .split_inclusive(|byte| *byte == b'\n')
        .map(|line| serde_json::from_slice(line).expect("JSON"))
        .collect();
    let verdicts: Vec<_> = lines.iter().map(|line| (&line["index"], &line["verdict"])).collect();
    assert_eq!(
        verdicts,
        [(&json!(0), &json!(null)), (&json!(1), &json!("drop")), (&json!(2), &json!("drop"))]
    );
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 packet not tested: longer than 65791 bytes"));
    // As `tcpdump -i any` writes: cooked, version 2.
    bytes[20..24].copy_from_slice(&276u32.to_le_bytes());
    let cooked = [&[8, 0, 0, 0, 0, 0, 0, 2, 0, 1, 0, 6][..], &[0; 8], &packet].concat();
    bytes.truncate(24 + 8);
    bytes.extend([(cooked.len() as u32).to_le_bytes(); 2].concat());
    bytes.extend(cooked);
    fs::write(&path, &bytes).expect("written");
    let output = run(&mut polc(&["simulate", "good.v4.rules", "--pcap", &path, "--format", "json"]));
    assert_eq!(text.lines().next(), String::from_utf8_lossy(&output.stdout).lines().next());

    // The same as pcapng, big-endian: a section, a raw IP and an Ethernet interface, a packet of each.
    let block = |kind: u32, words: &[u32], data: &[u8]| {
        let padded = data.len().next_multiple_of(4);
        let length = (12 + 4 * words.len() + padded) as u32;
        let mut block: Vec<u8> =
            [&[kind, length], words].concat().into_iter().flat_map(u32::to_be_bytes).collect();
        block.extend(data);
        block.resize(block.len() + padded - data.len(), 0);
        block.extend(length.to_be_bytes());
        block
    };
    let interface = |link: u32| block(1, &[link << 16, 0], &[]);
    let enhanced = |interface: u32, data: &[u8], length: u32| {
        block(6, &[interface, 0, 0, data.len() as u32, length], data)
    };
    let ethernet = [&[2u8, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0][..], &packet].concat();
    let bytes = [
        block(0x0a0d_0d0a, &[0x1a2b_3c4d, 1 << 16, u32::MAX, u32::MAX], &[]),
        interface(101),
        interface(1),
        enhanced(0, &packet[..24], 32),
        enhanced(1, &ethernet, ethernet.len() as u32),
    ]
    .concat();
    let path = scratch.file("two.pcapng");
    fs::write(&path, &bytes).expect("written");
    let output = run(&mut polc(&["simulate", "good.v4.rules", "--pcap", &path, "--format", "json"]));
    let other = String::from_utf8(output.stdout).expect("text");
    let sorted = |text: &str| -> Vec<String> {
        // All but the packet's number.
        let mut lines: Vec<String> =
            text.lines().map(|line| line.replacen(char::is_numeric, "", 1)).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&other), sorted(&text), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 packet captured in part"));
    fs::write(&path, &bytes[..bytes.len() - 30]).expect("written");
    assert_eq!(run(&mut polc(&["simulate", "good.v4.rules", "--pcap", &path])).status.code(), Some(2));
}

#[test]
fn bytes_that_are_no_utf_8_are_kept() {
    let scratch = Scratch::new("latin1");
    let path = scratch.file("latin1.v4.rules");
    // 253 bytes more, so that the comment is as long as can be.
    let line = |filler| {
        [&b"-A INPUT -i \xe4+ -m comment --comment \"\xfc"[..], &vec![b'x'; filler], b"\xe9\" -j DROP\n"]
            .concat()
    };
    let text = |filler| {
        [&b"*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\n"[..], &line(filler), b"COMMIT\n"]
            .concat()
    };
    fs::write(&path, text(253)).expect("written");
    let output = run(&mut polc(&["fmt", "--strict", &path]));
    assert!(output.stdout.windows(line(253).len()).any(|window| window == line(253)));
    let said = String::from_utf8(output.stderr).expect("text");
    assert!(said.contains("byte 0xe4 is not UTF-8") && said.contains("2 more of the kind"), "{said}");
    assert_eq!(run(&mut polc(&["check", &path])).status.code(), Some(0));
    assert_eq!(run(&mut polc(&["verify", &path])).status.code(), Some(0));
    // A longer one is cut, and its last byte goes.
    fs::write(&path, text(254)).expect("written");
    let output = run(&mut polc(&["fmt", "--strict", &path]));
    let end = b"xxx\" -j DROP\n";
    assert!(output.stdout.windows(end.len()).any(|window| window == end));
}

/// JSON is UTF-8, whatever the names of the user's are.
#[test]
fn json_is_utf_8() {
    let scratch = Scratch::new("json");
    let path = scratch.file("latin1.v4.rules");
    let text = b"*filter\n:INPUT ACCEPT\n:\xe9 - [0:0]\n:lost\xe9 - [0:0]\n-A INPUT -j \xe9\n-A \xe9 -j DROP\nCOMMIT\n";
    fs::write(&path, text).expect("written");
    let packets = ["--packets", "packets.jsonl"];
    let commands: [(&[&str], &str); 4] = [
        (&["check", "--format", "json"], "`lost\u{10ffe9}`"),
        (&["check", "--format", "sarif"], "`lost\u{10ffe9}`"),
        (&["verify", "--format", "json", "--random", "0"], "latin1.v4.rules"),
        (&["simulate", "--format", "json", packets[0], packets[1]], "\"chain\":\"\u{10ffe9}\""),
    ];
    for (command, expected) in commands {
        let output = run(&mut polc(&[command, &[&path]].concat()));
        let said = String::from_utf8(output.stdout).expect("UTF-8");
        for value in serde_json::Deserializer::from_str(&said).into_iter::<serde_json::Value>() {
            value.expect("JSON");
        }
        assert!(said.contains(expected), "{command:?}: {said}");
    }
}

/// What is compiled is the same whoever is asked, where a bound leaves rules out as well.
#[test]
fn check_compile_and_verify_count_alike() {
    let scratch = Scratch::new("account");
    let fields: String =
        (0..100).map(|word| format!("-A INPUT -m u32 --u32 \"{}=1\" -j DROP\n", 4 * word)).collect();
    // Each counts and goes on: stage after stage, which a packet may take a turn for each of.
    let counts: String =
        (1..120).map(|host| format!("-A INPUT -s 10.{host}.0.0/255.{}.0.0\n", host | 1)).collect();
    let inputs = [
        ("fields", fields, "100 rules: 0 compiled, 100 deferred, 0 rejected"),
        ("counts", counts, "119 rules: 119 compiled, 0 deferred, 0 rejected"),
    ];
    for (name, rules, expected) in inputs {
        let path = scratch.file(name);
        fs::write(&path, format!("*filter\n:INPUT ACCEPT\n{rules}COMMIT\n")).expect("written");
        let compiled = name == "counts";
        let commands: [&[&str]; 5] = [
            &["check"],
            &["verify", "--random", "0"],
            &["check", "--attach", "xdp"],
            &["verify", "--attach", "xdp", "--random", "0"],
            &["compile", "--attach", "xdp", "-o", "/dev/null"],
        ];
        for command in commands {
            if compiled && command[0] == "verify" && std::env::var_os("POLC_LONG").is_none() {
                continue;
            }
            let output = run(&mut polc(&[command, &[&path]].concat()));
            let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            // Rules that were left out are an error where the user names the place.
            let named = command.contains(&"xdp");
            assert_eq!(output.status.code(), Some(i32::from(named && !compiled)), "{command:?}: {said}");
            if compiled || command[0] != "compile" {
                assert!(said.contains(expected), "{command:?}: {said}");
            }
            assert_eq!(said.contains("E0560"), named && !compiled, "{command:?}: {said}");
            assert_eq!(said.contains("W0560"), !named && !compiled, "{command:?}: {said}");
            // At the first word that the key has no room for.
            assert_eq!(
                said.contains(&format!("{path}:")) && said.contains("0560]"),
                !compiled,
                "{command:?}: {said}"
            );
        }
    }
}

/// A path that begins behind hooks whose rules rewrite packets gets them, whoever is asked.
#[test]
fn a_named_place_is_the_same_to_every_command() {
    let commands: [&[&str]; 5] = [
        &["check", "--attach", "xdp", "--hook", "input"],
        &["verify", "--attach", "xdp", "--hook", "input", "--random", "0"],
        &["compile", "--attach", "xdp", "--hook", "input", "-o", "/dev/null"],
        &["simulate", "--attach", "xdp", "--hook", "input", "--level", "rbpf", "--packets", "arriving.jsonl"],
        &["explain", "--attach", "xdp", "--hook", "input", "--packet", "udp 192.0.2.1:1 > 10.0.0.1:2"],
    ];
    for command in commands {
        let output = run(&mut polc(&[command, &["open.v4.rules"]].concat()));
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{command:?}: {said}");
        match command[0] {
            "check" => assert!(said.contains("11 rules: 3 compiled, 8 deferred, 0 rejected"), "{said}"),
            "verify" | "compile" => {
                assert!(said.contains("11 rules: 3 compiled, 8 deferred, 0 rejected"), "{said}");
                assert!(said.contains("xdp for prerouting, input"), "{said}");
            }
            _ => assert!(said.contains("prerouting, input"), "{said}"),
        }
    }
}

/// Commands that print something.
const PRINTING: [&[&str]; 10] = [
    &["--help"],
    &["check", "good.v4.rules"],
    &["check", "--format", "json", "good.v4.rules"],
    &["check", "--format", "sarif", "good.v4.rules"],
    &["fmt", "good.v4.rules"],
    &["dump", "good.v4.rules"],
    &["compile", "--emit", "plan", "good.v4.rules"],
    &["compile", "-o", "-", "good.v4.rules"],
    &["simulate", "--packets", "packets.jsonl", "good.v4.rules"],
    &["explain", "--packet", "udp 192.0.2.1:1 > 10.0.0.1:2", "good.v4.rules"],
];

#[test]
fn what_can_not_be_written_is_an_error() {
    for command in PRINTING {
        let full = fs::File::options().write(true).open("/dev/full").expect("a device that is always full");
        let output = run(polc(command).stdout(full));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{command:?}: {said}");
        assert!(
            said.contains("cannot write `standard output`: No space left on device"),
            "{command:?}: {said}"
        );
    }
}

#[test]
fn a_reader_that_has_enough_is_no_error() {
    for command in PRINTING {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = run(polc(command).stdout(writer));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{command:?}: {said}");
        assert!(!said.contains("error"), "{command:?}: {said}");
    }
}

#[test]
fn a_byte_order_mark_is_told_once() {
    let scratch = Scratch::new("mark");
    let path = scratch.file("mark.rules");
    let good = fs::read_to_string(folder().join("input/good.v4.rules")).expect("the rules");
    fs::write(&path, format!("\u{feff}{good}")).expect("written");
    for (args, status) in [(vec!["check"], 0), (vec!["check", "--strict"], 1)] {
        let output = run(&mut polc(&[&args[..], &[&path]].concat()));
        let said = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert_eq!(said.matches("byte order mark").count(), 1, "{said}");
    }
}

#[test]
fn strict_reading_knows_the_sets_that_are_given() {
    let scratch = Scratch::new("strict-sets");
    let rules = scratch.file("rules.v4");
    let text = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
        -A INPUT -m set --match-set some src -j DROP\nCOMMIT\n";
    fs::write(&rules, text).expect("written");
    let (four, six) = (scratch.file("four"), scratch.file("six"));
    fs::write(&four, "create some hash:ip family inet hashsize 1024 maxelem 65536\n").expect("written");
    fs::write(&six, "create some hash:ip family inet6 hashsize 1024 maxelem 65536\n").expect("written");
    let status = |args: &[&str]| run(&mut polc(&[&["fmt", "--strict", &rules], args].concat())).status.code();
    assert_eq!(run(&mut polc(&["fmt", &rules])).status.code(), Some(0));
    assert_eq!(status(&[]), Some(1));
    assert_eq!(status(&["--ipset", &four]), Some(0));
    assert_eq!(status(&["--ipset", &six]), Some(1));
}

#[test]
fn colour_is_asked_for_or_a_terminal() {
    let colour = |args: &[&str]| run(&mut polc(args)).stderr.contains(&0x1b);
    assert!(!colour(&["check", "bad.v4.rules"]));
    assert!(colour(&["check", "--color", "always", "bad.v4.rules"]));
    assert!(!colour(&["check", "--color", "never", "bad.v4.rules"]));
}

#[test]
fn completions_and_manual_pages_cover_every_command() {
    let scratch = Scratch::new("man");
    assert_eq!(run(&mut polc(&["man", &scratch.file("man")])).status.code(), Some(0));
    let commands = [
        "check",
        "fmt",
        "compile",
        "verify",
        "simulate",
        "explain",
        "dump",
        "dump-jited",
        "apply",
        "status",
        "save",
        "trace",
        "top",
        "serve-metrics",
    ];
    for command in commands {
        assert!(Path::new(&scratch.file(&format!("man/polc-{command}.1"))).exists(), "{command}");
        for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
            let script = run(&mut polc(&["completions", shell])).stdout;
            let last = command.strip_prefix("dump-").unwrap_or(command);
            assert!(String::from_utf8_lossy(&script).contains(last), "{shell} {command}");
        }
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = polc(&["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("polc runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("polc ends");
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
}

/// Whether the test runs as root; if not, says that `name` is skipped.
fn is_root(name: &str) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let root = fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0);
    if !root && !name.is_empty() {
        eprintln!("skipped {name}: needs root");
    }
    root
}

#[test]
fn the_kernel_decides_as_the_levels_do() {
    if !is_root("the_kernel_decides_as_the_levels_do") {
        return;
    }
    let scratch = Scratch::new("kernel-level");
    // What the kernel makes no test packet of comes below: a frame of two bytes, a packet that comes by no device.
    let packets = fs::read_to_string(folder().join("input/packets.jsonl")).expect("the packets");
    let packets: String =
        packets.split_inclusive('\n').filter(|line| line.contains("eth0") || line.contains("=lo")).collect();
    let file = scratch.file("packets.jsonl");
    for attach in ["xdp", "tc-ingress"] {
        // At XDP no packet has a mark.
        let can_be = |line: &&str| attach != "xdp" || !line.contains("mark");
        fs::write(&file, packets.split_inclusive('\n').filter(can_be).collect::<String>()).expect("written");
        let of = |level: &str| {
            let output = run(&mut polc(&[
                "simulate",
                "good.v4.rules",
                "--packets",
                &file,
                "--attach",
                attach,
                "--level",
                level,
            ]));
            assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).expect("text")
        };
        assert_eq!(of("kernel"), of("plan"), "{attach}");
    }
    let output =
        run(&mut polc(&["simulate", "good.v4.rules", "--packets", "packets.jsonl", "--level", "kernel"]));
    assert_eq!(output.status.code(), Some(1));
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    let untested = lines.lines().filter(|line| line.ends_with(": not tested")).count();
    assert!(lines.contains("\n6: not tested\n") && untested < lines.lines().count(), "{lines}");
    let remark = format!("{untested} packets not tested");
    assert!(String::from_utf8_lossy(&output.stderr).contains(&remark));
}

#[test]
fn verify_asks_the_kernel_and_its_packet_filter() {
    if !is_root("verify_asks_the_kernel_and_its_packet_filter") {
        return;
    }
    for semantics in ["legacy", "nft"] {
        let args = [
            "verify",
            "--kernel",
            "--netfilter",
            "--semantics",
            semantics,
            "--format",
            "json",
            "good.v4.rules",
        ];
        let output = run(&mut polc(&args));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!((output.status.code(), &result["agree"]), (Some(0), &true.into()), "{result}");
        let schema =
            fs::read_to_string(folder().join("../../../docs/verify-schema.json")).expect("the schema");
        let schema: serde_json::Value = serde_json::from_str(&schema).expect("the schema is JSON");
        let documented = |found: &serde_json::Value, properties: &serde_json::Value| {
            for (name, _) in found.as_object().expect("an object") {
                assert!(properties.get(name).is_some(), "{name} is documented");
            }
        };
        for place in result["places"].as_array().expect("a list") {
            assert!(place["kernel"]["packets"].as_u64().expect("a number") > 500, "{place}");
            let places = &schema["properties"]["places"]["items"]["properties"];
            documented(&place["kernel"], &places["kernel"]["properties"]);
        }
        documented(&result["not_compared"], &schema["properties"]["not_compared"]["properties"]);
        let ways = result["netfilter"].as_array().expect("a list");
        assert_eq!(ways.len(), 2);
        for way in ways {
            assert!(way["packets"].as_u64().expect("a number") > 500, "{way}");
            assert!(way["counters_hit"].as_u64().expect("a number") > 0, "{way}");
            documented(way, &schema["properties"]["netfilter"]["items"]["properties"]);
        }
    }
}

#[test]
fn the_kernel_is_asked_by_root_alone() {
    use std::os::unix::process::CommandExt as _;
    for option in ["--kernel", "--netfilter"] {
        let mut command = polc(&["verify", option, "-"]);
        if is_root("") {
            // Nobody.
            command.uid(65_534).current_dir("/");
        }
        let output = run(&mut command);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(
            said.contains("only a process with CAP_NET_ADMIN") && said.contains("run it as root"),
            "{said}"
        );
    }
}
