//! What the fuzz targets claim of any input, as functions: fuzzing calls them with what it makes up, and tests with what
//! was found before (`tests/regressions`).
//!
//! Each panics where a claim does not hold.

use polc::place::{attach_for, devices_of, place};
use polc::runner::Program;
use polc::select::Devices;
use polc::witness::Witnesses;
use polc_backend_ebpf::emit::{GENERATOR_FAULT, emit};
use polc_backend_ebpf::object::Object;
use polc_frontend_iptables::{Mode, ParseOptions, ipset, lower, parse, print};
use polc_ir::diag::Severity;
use polc_ir::env::{self, Env};
use polc_ir::hook::{Hook, Semantics};
use polc_ir::source::SourceMap;

use crate::levels::{Levels, target};

/// Most rules of which [`levels_agree`] asks. How stages are decided is a search whose time grows with them, and under
/// a sanitizer it has to end well within a fuzzer's patience; large rule sets are what the corpora are for.
pub const RULES_MAX: usize = 16;

/// Packets that [`levels_agree`] sends to each hook.
const PACKETS: usize = 16;

/// Any text is read, and what is printed of it can be read. Some of what iptables-save writes means something else than
/// what it was written of (a default that is left out, a name that begins with a blank), but no more than once: printed
/// from then on it stays the same.
pub fn dump_parser(text: &str) {
    let mut sources = SourceMap::new();
    let file = sources.add("fuzz", text);
    let (dump, _) = parse(&sources, file, &ParseOptions::default());
    let options = ParseOptions { mode: Mode::Strict, family: Some(dump.family), ..ParseOptions::default() };
    let mut printed = vec![print(&dump, true)];
    for reading in ["again", "once more"] {
        let file = sources.add(reading, printed[printed.len() - 1].as_str());
        let (dump, diagnostics) = parse(&sources, file, &options);
        if !diagnostics.is_empty() {
            return;
        }
        lower(&dump, &[], Semantics::Legacy);
        printed.push(print(&dump, true));
    }
    assert_eq!(printed[2], printed[1], "printing comes to a fixpoint");
}

/// Any text is read as ipset's.
pub fn ipset_parser(text: &str) {
    let mut sources = SourceMap::new();
    let file = sources.add("fuzz", text);
    let _ = ipset::parse(&sources, file);
}

/// Any bytes are read as an object; what was read is written and read again the same.
pub fn object_reader(bytes: &[u8]) {
    if let Ok(object) = Object::read(bytes)
        && let Ok(written) = object.write()
    {
        assert_eq!(Object::read(&written).expect("what is written can be read"), object);
    }
}

/// Rules that are accepted, [`RULES_MAX`] at most, mean the same at every level and in the emitted program. Gives how many packets showed it.
pub fn levels_agree(text: &str) -> usize {
    let mut sources = SourceMap::new();
    let file = sources.add("fuzz", text);
    let (dump, diagnostics) = parse(&sources, file, &ParseOptions::default());
    if diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error) {
        return 0;
    }
    let ruleset = lower(&dump, &[], Semantics::Legacy);
    if ruleset.rules.len() > RULES_MAX {
        return 0;
    }
    let mut packets = 0;
    let devices = Devices { declared: devices_of(&ruleset), ..Devices::default() };
    let env = Env::default();
    for hook in Hook::ALL {
        let place = place(&[hook], attach_for(hook), env::Mode::Accelerate, false);
        if ruleset.path_chains(&place).is_empty() {
            continue;
        }
        let compiled = polc::compile(&ruleset, &place, &env, &devices);
        if !compiled.diagnostics.is_empty() {
            continue;
        }
        let attach = attach_for(hook);
        let program = match emit(&compiled.plan, &target(attach)) {
            Ok(object) => Some(Program::new(&compiled.plan, attach, &object).expect("the check VM takes it")),
            Err(found) => {
                assert_ne!(found[0].code, GENERATOR_FAULT, "{hook}: {found:?}");
                None
            }
        };
        let mut levels = Levels { ruleset: &ruleset, compiled: &compiled, env: &env, program };
        for input in Witnesses::new(&compiled.classifier, &devices.declared, 1).take(PACKETS) {
            packets += 1;
            levels.agree(&input).unwrap_or_else(|why| panic!("{hook} {why}"));
        }
    }
    packets
}
