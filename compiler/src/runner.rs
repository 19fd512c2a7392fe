//! Runs a packet through every level, the emitted program under rbpf included.

use polc_backend_ebpf::emit::{COUNTERS_MAP, Told, writes_mark};
use polc_backend_ebpf::object::Object;
use polc_backend_ebpf::vm::{Connection, Context, Input as VmInput, Vm, VmError};
use polc_ir::classifier::Fields;
use polc_ir::decision::FirstOfList;
use polc_ir::derived;
use polc_ir::entities::{Entry, Stage};
use polc_ir::env::{Attach, Env, Input, ct_state};
use polc_ir::field::{DeviceName, Field};
use polc_ir::outcome::{Count, Ending, Outcome};
use polc_ir::packet::{View, frame_ending, network_packet};
use polc_ir::plan::Plan;
use polc_ir::ruleset::Ruleset;
use polc_ir::state::State;

use crate::Compiled;

/// A level that can run a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The rules' own meaning.
    Ruleset,
    /// Stages of cubes.
    Classifier,
    /// How stages are decided.
    Decision,
    /// Steps and tables.
    Plan,
    /// The emitted program under rbpf.
    Rbpf,
}

impl Level {
    /// The levels above the object, the reference first.
    pub const ABOVE: [Level; 4] = [Level::Ruleset, Level::Classifier, Level::Decision, Level::Plan];
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Level::Ruleset => "ruleset",
            Level::Classifier => "classifier",
            Level::Decision => "decision",
            Level::Plan => "plan",
            Level::Rbpf => "rbpf",
        })
    }
}

/// What the levels above the object make of a packet.
pub fn run(
    level: Level,
    ruleset: &Ruleset,
    compiled: &Compiled,
    env: &Env,
    input: &Input,
    state: &mut State,
) -> Outcome {
    let classifier = &compiled.classifier;
    let mut decide = |stage, fields: &Fields<'_>| {
        let first = classifier.first_of(&classifier.stages[stage].entries, fields);
        first.expect("a stage's last entry always holds")
    };
    let list = |_, entries: &[Entry], fields: &Fields<'_>| classifier.first_of(entries, fields);
    run_by(level, ruleset, compiled, env, input, state, &mut decide, &list)
}

/// The same, where `decide` says which entry of a stage a packet takes at [`Level::Classifier`], and `list` which of a
/// list at [`Level::Decision`].
#[expect(clippy::too_many_arguments, reason = "those of `run`, and who looks at entries")]
pub(crate) fn run_by(
    level: Level,
    ruleset: &Ruleset,
    compiled: &Compiled,
    env: &Env,
    input: &Input,
    state: &mut State,
    decide: &mut dyn FnMut(Stage, &Fields<'_>) -> Entry,
    list: &FirstOfList<'_>,
) -> Outcome {
    let place = &compiled.plan.place;
    if level == Level::Ruleset {
        return ruleset.eval(place, env, input, state);
    }
    let view = match View::new(ruleset.family, place, input) {
        Ok(view) => view,
        Err(ending) => {
            return Outcome { ending, mark: input.mark, counted: Vec::new() };
        }
    };
    let given = |field: Field| match field {
        Field::Derived(id) => {
            let member = compiled.classifier.member(id, &mut |field| view.get(field));
            member.unwrap_or_else(|| derived::eval(&ruleset.derived[id], &view)).into()
        }
        field => view.get(field),
    };
    match level {
        Level::Ruleset | Level::Classifier => compiled.classifier.eval_by(&given, state, decide),
        Level::Decision => compiled.decision.eval_by(&compiled.classifier, &given, state, list),
        Level::Plan | Level::Rbpf => compiled.plan.eval(&given, state),
    }
}

/// An object under rbpf.
pub struct Program {
    vm: Vm,
    attach: Attach,
    /// For each counter slot, packets and, above them, bytes so far.
    counters: Vec<u128>,
    mark: u32,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Program").field("attach", &self.attach).finish_non_exhaustive()
    }
}

impl Program {
    /// Loads an object for `plan`.
    ///
    /// # Errors
    /// What the check VM does not run.
    pub fn new(plan: &Plan, attach: Attach, object: &Object) -> Result<Program, VmError> {
        Ok(Program { vm: Vm::new(object)?, attach, counters: vec![0; plan.traces.len()], mark: 0 })
    }

    /// The mark that the last packet left with.
    pub fn mark(&self) -> u32 {
        self.mark
    }

    /// Whether the last packet left with the mark that it has to have if this is its outcome.
    ///
    /// # Errors
    /// What it left with.
    pub fn left_marked(&self, plan: &Plan, input: &Input, outcome: &Outcome) -> Result<(), String> {
        left_marked(plan, self.attach, input, outcome, self.mark)
    }

    /// Starts the random numbers that a [`State`] of the same seed draws.
    pub fn set_random_seed(&mut self, seed: u64) {
        self.vm.set_random_seed(seed);
    }

    /// Runs a packet: its ending, and what it was counted for, in ascending order. The error says what went wrong in the
    /// program; one that does not count tells too little.
    pub fn run(&mut self, plan: &Plan, input: &Input) -> Result<(Ending, Vec<Count>), String> {
        self.tell(plan, input).and_then(Told::counted)
    }

    /// Runs a packet, whatever the program tells of it. The error says what went wrong in the program.
    pub fn tell(&mut self, plan: &Plan, input: &Input) -> Result<Told, String> {
        let number = |name: Option<DeviceName>| {
            let found =
                name.and_then(|name| plan.devices.devices.iter().find(|(device, _)| device.name == name));
            found.map_or(0, |(device, _)| device.ifindex)
        };
        let (in_number, out_number) = (number(input.in_device), number(input.out_device));
        let mut context = Context { mark: input.mark, ingress_ifindex: in_number, ..Context::default() };
        context.connection = carried(input);
        context.ifindex = match self.attach {
            Attach::TcEgress | Attach::Netfilter => out_number,
            Attach::Xdp | Attach::TcIngress => in_number,
        };
        context.vlan_tci = input.vlan;
        context.packet_type = input
            .packet_type
            .unwrap_or_else(|| match input.frame.get(..6) {
                Some([255, 255, 255, 255, 255, 255]) => 1,
                Some([first, ..]) if first & 1 == 1 => 2,
                _ => 0,
            })
            .into();
        let mut packet = &input.frame[..];
        if self.attach == Attach::Netfilter {
            match network_packet(plan.family, input) {
                Ok(found) => packet = found,
                // No hook of this family's sees it.
                Err(kind) => {
                    self.mark = input.mark;
                    return Ok(Told::Counted(frame_ending(kind, plan.place.mode), Vec::new()));
                }
            }
        }
        let connections: Vec<Connection> = connection(plan, input).into_iter().collect();
        let vm_input = VmInput { packet, context, connections: &connections, ..VmInput::default() };
        let result = self.vm.run(0, &vm_input);
        let result = result.map_err(|error| error.to_string())?;
        self.mark = result.mark;
        let values = self.vm.map(COUNTERS_MAP).map(|map| self.vm.values(map)).unwrap_or_default();
        let bytes = View::new(plan.family, &plan.place, input).map(|view| view.bytes()).ok();
        let mut grown = vec![0; self.counters.len()];
        let counters = values.as_chunks().0.iter().zip(&mut self.counters);
        for (slot, (value, before)) in counters.enumerate() {
            let now = u128::from_le_bytes(*value);
            // Nearly all of them.
            if now == *before {
                continue;
            }
            let [packets, counted] = [0, 64].map(|half| {
                let (before, now) = ((*before >> half) as u64, (now >> half) as u64);
                now.wrapping_sub(before)
            });
            *before = now;
            grown[slot] = packets;
            if let Some(bytes) = bytes
                && counted != packets.wrapping_mul(bytes)
            {
                return Err(format!(
                    "counter {slot} grew by {packets} packets and {counted} bytes; the packet has {bytes}"
                ));
            }
        }
        Told::new(plan, self.attach, &grown, result.return_value as i32)
    }
}

/// The mark that a packet leaves a program with: the rules', if the program is the one to write it, else its own.
pub fn mark_left(plan: &Plan, attach: Attach, input: &Input, outcome: &Outcome) -> u32 {
    if writes_mark(plan, attach) { outcome.mark } else { input.mark }
}

/// Whether a packet of this outcome has the mark that it has to leave with.
///
/// # Errors
/// What it left with.
pub(crate) fn left_marked(
    plan: &Plan,
    attach: Attach,
    input: &Input,
    outcome: &Outcome,
    mark: u32,
) -> Result<(), String> {
    let expected = mark_left(plan, attach, input, outcome);
    if mark == expected {
        return Ok(());
    }
    Err(format!("the packet leaves with mark {mark:#x} instead of {expected:#x}"))
}

/// What a packet carries of its connection, `skb->_nfct`.
fn carried(input: &Input) -> u64 {
    // Where a connection lies does not matter, but that it lies somewhere.
    const CONNECTION: u64 = 0x1000;
    const REPLY: u64 = 3;
    let Some(connection) = input.connection else { return 0 };
    let reply = if connection.reply { REPLY } else { 0 };
    // `enum ip_conntrack_info` of include/uapi/linux/netfilter/nf_conntrack_common.h.
    match connection.state {
        ct_state::ESTABLISHED => CONNECTION + reply,
        ct_state::RELATED => CONNECTION + reply + 1,
        ct_state::NEW => CONNECTION + 2,
        ct_state::UNTRACKED => 7,
        _ => 0,
    }
}

/// The packet's connection as the kernel's table has it, if it does.
fn connection(plan: &Plan, input: &Input) -> Option<Connection> {
    input.connection.filter(|connection| connection.is_in_table())?;
    let view = View::new(plan.family, &plan.place, input).ok()?;
    let number = |field: Field, bytes: usize| view.get(field).to_be_bytes()[16 - bytes..].to_vec();
    let address = usize::from(plan.family.address_bits() / 8);
    let parts =
        [(Field::SrcAddr, address), (Field::DstAddr, address), (Field::SrcPort, 2), (Field::DstPort, 2)];
    let tuple = parts.into_iter().flat_map(|(field, bytes)| number(field, bytes)).collect();
    Some(Connection { protocol: view.protocol(), tuple })
}
