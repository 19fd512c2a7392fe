//! `polc apply` and `polc restore`: a rule set into force.
//!
//! Everything that may fail is done before anything is changed: read, compile, verify under rbpf, load, run the loaded
//! program on the same packets, decide the user's canaries. The swap is the last step.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use polc::build::{Extras, object_with};
use polc::place::{default_path, first_priority, place as place_of, refusal, whole_way};
use polc::reach::never_reached;
use polc::report::Report;
use polc::runner::Program;
use polc::select::Devices;
use polc::session::Session;
use polc::verify::{directed_packets, spot_check, spread_packets};
use polc::{Compiled, guard};
use polc_backend_ebpf::emit::{Told, return_code};
use polc_backend_ebpf::object::Object;
use polc_backend_ebpf::vm::VmError;
use polc_frontend_iptables::print;
use polc_ir::at_once::both;
use polc_ir::diag::Severity;
use polc_ir::env::{Attach, Connections, Counting, Device as IrDevice, Env, Input, Mode, Place};
use polc_ir::field::DeviceName;
use polc_ir::hook::{Family, Hook};
use polc_ir::outcome::Verdict;
use polc_ir::packet::text;
use polc_ir::source::bytes;
use polc_ir::state::State;
use polc_loader::coexist::Order;
use polc_loader::sets::SETS_FILE;
use polc_loader::state::{Confirm, SlotName};
use polc_loader::swap::{self, Applied, Check, Request, apply_all, check};
use polc_loader::sys::Sys;
use polc_loader::{Error, dispatch, load, net};

use super::compile::{accept_part, refuse};
use super::host::{self, Surroundings};
use super::save;
use super::test_run::{Setup, as_tested};
use super::{FOUND, account, counted, kept_sets, live, place, show, worst};
use crate::cli::{
    ApplyArgs, ApplyOptions, KeepChoice, OrderChoice, PlaceArgs, RestoreArgs, ValueName, hooks_of,
};
use crate::failure::Failure;
use crate::input;
use crate::output::Output;

/// Packets that a program decides under rbpf before it is loaded, and in the kernel before it is attached.
const CHECKED_PACKETS: usize = 200;

pub(super) fn run(args: &ApplyArgs, output: &Output) -> Result<ExitCode, Failure> {
    let job = Job {
        file: &args.file,
        mode: args.place.mode(),
        path: args.place.path(),
        place: Some(&args.place),
        options: &args.options,
        dry_run: args.options.dry_run,
        counters: false,
    };
    job.run(output)
}

pub(super) fn restore(args: &RestoreArgs, output: &Output) -> Result<ExitCode, Failure> {
    let stdin = std::path::PathBuf::from("-");
    let job = Job {
        file: args.file.as_ref().unwrap_or(&stdin),
        mode: Mode::Replace,
        path: hooks_of(&args.hook),
        place: None,
        options: &args.options,
        dry_run: args.test || args.options.dry_run,
        counters: args.counters,
    };
    job.run(output)
}

struct Job<'a> {
    file: &'a std::path::Path,
    mode: Mode,
    path: Option<Vec<Hook>>,
    /// What the user says about the place.
    place: Option<&'a PlaceArgs>,
    options: &'a ApplyOptions,
    dry_run: bool,
    counters: bool,
}

/// A program to be put in force, and where.
struct Part {
    slot: SlotName,
    object: Object,
    checks: Vec<Check>,
    place: Place,
    /// What becomes of the rules there.
    report: Report,
    hook_order: dispatch::Order,
}

/// The host that programs are made for.
#[derive(Clone, Copy)]
struct Live<'a> {
    sys: &'a Sys,
    devices: &'a [net::Device],
    /// The device; an empty one for hooks, which see those of all devices.
    device: &'a net::Device,
    surroundings: &'a Surroundings,
}

impl Job<'_> {
    fn run(&self, output: &Output) -> Result<ExitCode, Failure> {
        let sys = Sys::new();
        swap::may_change(&sys)?;
        let began = Instant::now();
        let mut session = input::session(self.file, &self.options.input)?;
        let attach: Attach = self.options.attach.into();
        self.check_options(attach)?;
        // A file that was cut to nothing is no rule set that lets everything through.
        if session.dump.tables.is_empty() && !session.has_errors() {
            let name = session.sources.file(session.rules_file).name();
            return Err(Failure::Input(format!("`{name}` has no table, so nothing is applied")));
        }
        // `polc save` prints those of all places one after another.
        let source = session.sources.file(session.rules_file);
        let saved = source.text().lines().filter(|line| line.starts_with(save::HEADER)).count();
        if saved > 1 {
            return Err(Failure::Input(format!(
                "`{}` holds {saved} rule sets, and one can be applied at a time: `polc save` prints one with --family and --dev or --attach",
                source.name()
            )));
        }
        let devices = net::devices(&sys)?;
        let device = match &self.options.dev {
            Some(name) => net::find(&devices, name)?.clone(),
            None if attach == Attach::Netfilter => net::Device::default(),
            None => {
                return Err(Failure::Usage(format!("--attach {attach} needs --dev NAME")));
            }
        };
        let given = !self.options.input.local.is_empty();
        let surroundings = Surroundings::now(&sys, session.family(), self.options.dev.as_deref(), !given)?;
        // As they were read: a pipe gives them once.
        let sets = session.set_files.iter().map(|&file| session.sources.file(file).text().to_string());
        let sets: Vec<String> = sets.collect();
        let given_sets = || sets.iter().map(|text| host::sets(text).0).collect::<Vec<_>>();
        if self.mode == Mode::Accelerate
            && !self.options.unchecked
            && let Some(why) = host::disagreement(&sys, &session, &given_sets())?
        {
            return Err(Error::Disagrees(why).into());
        }
        let mut parts = Vec::new();
        for path in self.paths(&sys, &session, attach)? {
            let live = Live { sys: &sys, devices: &devices, device: &device, surroundings: &surroundings };
            match self.part(&live, &mut session, attach, &path, output)? {
                Some(part) => parts.push(part),
                None => return Ok(FOUND.into()),
            }
        }
        if parts.is_empty() {
            let name = session.sources.file(session.rules_file).name();
            return Err(Failure::Input(format!("no rule of `{name}` is on a hook, so nothing is applied")));
        }
        let compiled_in = began.elapsed();
        let report = parts.iter().map(|part| &part.report).cloned().reduce(|mut all, report| {
            all.join(&report);
            all
        });
        let report = report.unwrap_or_default();
        if !self.says_what_is_left_out(&session, &report, &parts, output) {
            return Ok(FOUND.into());
        }
        let places: Vec<String> = parts.iter().map(|part| place::describe(&part.place)).collect();
        let account = format!("{} at {}", account::text(&report), places.join(", at "));
        if self.dry_run {
            output.remark(&format!("{account}\n"));
            for part in &parts {
                let loaded = load::load(&sys, &part.object)?;
                check(&sys, &loaded, &part.checks)?;
                output.remark(&format!(
                    "loaded and tested with {} {}, nothing attached\n",
                    counted(part.checks.len(), "packet"),
                    part.slot
                ));
            }
            return Ok(ExitCode::SUCCESS);
        }
        let done = self.put_in_force(&sys, &session, &parts, &sets, &surroundings)?;
        output.remark(&format!("{account}\n"));
        for (part, applied) in parts.iter().zip(&done) {
            output.remark(&self.said(part, applied, began, compiled_in));
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Shows what of the rules is not in force with these parts; whether that is what the user asked for. In accelerate
    /// mode it is the kernel's.
    fn says_what_is_left_out(
        &self,
        session: &Session,
        report: &Report,
        parts: &[Part],
        output: &Output,
    ) -> bool {
        let hooks: Vec<Hook> = parts.iter().flat_map(|part| part.place.path.iter().copied()).collect();
        let severity = if self.path.is_some() { Severity::Note } else { Severity::Error };
        let findings = match self.mode {
            Mode::Accelerate => report.elsewhere().into_iter().collect(),
            Mode::Replace => report.left_out(session, &hooks, severity),
        };
        show(output, &session.sources, &findings);
        worst(&findings) != Some(Severity::Error)
    }

    /// What is told of a part in force.
    fn said(&self, part: &Part, applied: &Applied, began: Instant, compiled_in: Duration) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "in force {} as program {} ({}), in {:.1} ms: {:.1} ms to compile and verify, {:.1} ms of the kernel's to load, {:.1} ms of the kernel's to attach",
            part.slot,
            applied.program_id,
            match applied.replaced {
                Some(old) => format!("generation {}, in place of {old}", applied.generation),
                None => format!("generation {}", applied.generation),
            },
            millis(applied.attached - began),
            millis(compiled_in),
            millis(applied.load_time),
            millis(applied.attach_time),
        );
        if self.options.confirm.is_some() {
            text += "it goes back by itself unless `polc confirm` follows\n";
        }
        if let Some(error) = &applied.untidy {
            let _ = writeln!(text, "not everything old could be removed ({error}); the next polc does it");
        }
        text
    }

    /// Refuses options that mean nothing at an attach point.
    fn check_options(&self, attach: Attach) -> Result<(), Failure> {
        let options = &self.options;
        let wrong = if attach == Attach::Netfilter {
            [("--dev", options.dev.is_some()), ("--generic", options.generic), ("--clsact", options.clsact)]
                .into_iter()
                .chain([("--order", options.order.is_some())])
                .find(|(_, given)| *given)
        } else {
            [("--priority", options.priority.is_some()), ("--defrag", options.defrag)]
                .into_iter()
                .find(|(_, given)| *given)
        };
        match wrong {
            Some((option, _)) => {
                Err(Failure::Usage(format!("{option} means nothing with --attach {attach}")))
            }
            None => Ok(()),
        }
    }

    /// Compiles, emits and verifies the program for a path of hooks; `None` if that found something, which was shown.
    fn part(
        &self,
        live: &Live<'_>,
        session: &mut Session,
        attach: Attach,
        path: &[Hook],
        output: &Output,
    ) -> Result<Option<Part>, Failure> {
        let Live { sys, devices, device, surroundings } = *live;
        let env = self.env(sys, session.family(), attach, path)?;
        let accelerates = self.mode == Mode::Accelerate;
        let connections = match self.place {
            Some(place) if place.connections.is_some() => place.connections(attach)?,
            _ if accelerates && attach == Attach::Netfilter => {
                let before = first_priority(&session.ruleset, &place_of(path, attach, self.mode, true));
                let first = self.options.priority.unwrap_or(before - dispatch::PRIORITIES_TRIED);
                host::carried(session, path, first)
            }
            _ if accelerates => host::connections(session, attach, surroundings),
            _ => Connections::Unknown,
        };
        let counters = self.place.map_or(Counting::Exact, |place| place.counters.into());
        let way = whole_way(&session.ruleset, path, attach);
        let place = Place { connections, counters, ..place_of(&way, attach, self.mode, true) };
        let Some(mut report) = accept_part(session, &place, output) else { return Ok(None) };
        // Other parts need not tell it again.
        session.diagnostics.clear();
        guard::leave_rewritten(&mut session.ruleset, &place);
        // At a netfilter hook packet sockets have seen the packet already, and the kernel has routed it.
        if attach != Attach::Netfilter {
            if accelerates && self.options.keep == KeepChoice::Dhcp {
                guard::keep_dhcp(&mut session.ruleset, &place);
            }
            if attach != Attach::TcEgress {
                guard::split_local(&mut session.ruleset, &place, &env);
            }
        }
        // In accelerate mode the kernel's own sets decide, and what they hold may change without polc.
        for set in session.ruleset.sets.values_mut() {
            set.live = self.mode == Mode::Replace && set.fixed.is_none();
        }
        let names = self.names(devices, attach)?;
        let compiled = polc::compile(&session.ruleset, &place, &env, &names);
        if refuse(session, &compiled.diagnostics, place.mode, output) {
            return Ok(None);
        }
        let reached = [(&place, &compiled.reach)];
        report.defer_bounded(session, &compiled.diagnostics, &reached);
        show(output, &session.sources, &never_reached(session, &report, &reached).1);
        let extras = Extras { trace: !self.options.no_trace, suspend: accelerates };
        let half = CHECKED_PACKETS / 2;
        let ((object, spread), mut packets) = both(
            || (object_with(session, &compiled, extras), spread_packets(&compiled, &names, half)),
            || directed_packets(&compiled, &names, half),
        );
        packets.extend(spread);
        let (object, _) = match object {
            Ok(made) => made,
            Err(findings) => {
                show(output, &session.sources, &findings);
                return Ok(None);
            }
        };
        // The kernel draws other random numbers.
        let is_fixed = compiled.plan.effect_tests.is_empty();
        let check = |program: &mut Program, input: &Input| {
            if is_fixed { one_check(program, &compiled, &object, input, device) } else { None }
        };
        let checked = spot_check(session, &compiled, &object, &env, &names, packets, &check);
        let checked = checked.map_err(not_run)?.map_err(|wrong| {
            Failure::Input(format!(
                "levels differ on packet {}, so nothing is applied; `polc verify` shows it",
                hex(&wrong.input.frame)
            ))
        })?;
        let mut checks = checked.into_iter().collect::<Result<Vec<Check>, Failure>>()?;
        for canary in &self.options.canary {
            checks.push(self.canary(canary, session, &place, &env, &compiled, &object, device)?);
        }
        let netfilter = attach == Attach::Netfilter;
        let slot = SlotName {
            device: (!netfilter).then(|| device.name.clone()),
            attach,
            hook: if netfilter { path.first().copied() } else { None },
            family: session.family(),
        };
        let hook_order = self.hook_order(session, &place)?;
        Ok(Some(Part { slot, object, checks, place, report, hook_order }))
    }

    /// Where a netfilter program goes among its hook's functions.
    fn hook_order(&self, session: &Session, place: &Place) -> Result<dispatch::Order, Failure> {
        let before = first_priority(&session.ruleset, place);
        let priority = self.options.priority;
        // Behind a table of the kernel's, packets are no longer what that table's rules saw.
        if let Some(priority) = priority.filter(|priority| *priority >= before)
            && self.mode == Mode::Accelerate
            && place.attach == Some(Attach::Netfilter)
        {
            return Err(Failure::Usage(format!(
                "--priority {priority} is behind the kernel's own rules, the first of which run at {before}"
            )));
        }
        Ok(dispatch::Order { priority, before, defrag: self.options.defrag })
    }

    /// Puts all parts in force, or none.
    fn put_in_force(
        &self,
        sys: &Sys,
        session: &Session,
        parts: &[Part],
        sets: &[String],
        surroundings: &Surroundings,
    ) -> Result<Vec<Applied>, Failure> {
        let store = live::store(&self.options.store)?;
        let rules = session.sources.file(session.rules_file);
        let kept: Vec<Vec<(String, Vec<u8>)>> =
            parts.iter().map(|part| self.kept(session, part, sets, surroundings)).collect();
        let kept: Vec<Vec<(&str, &[u8])>> = kept
            .iter()
            .map(|files| files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect())
            .collect();
        // Of a rule that several programs count, one starts with what it counted.
        let mut given = BTreeSet::new();
        let mut initial = |part: &Part| match self.counters {
            true => initial(session, &part.object, &mut given),
            false => Vec::new(),
        };
        let initial: Vec<Vec<(u64, u64)>> = parts.iter().map(&mut initial).collect();
        let requests: Vec<Request<'_>> = parts
            .iter()
            .enumerate()
            .map(|(index, part)| Request {
                slot: &part.slot,
                object: &part.object,
                source: self.options.named.as_deref().unwrap_or(rules.name()),
                files: &kept[index],
                contents: &[],
                checks: &part.checks,
                generic: self.options.generic,
                clsact: self.options.clsact,
                order: match self.options.order {
                    None => Order::Alone,
                    Some(OrderChoice::First) => Order::First,
                    Some(OrderChoice::Last) => Order::Last,
                },
                hook_order: part.hook_order,
                over: &self.options.over,
                alone: part.slot.hook.is_some() && self.path.is_none(),
                confirm: self.options.confirm.map(|seconds| Duration::from_secs(seconds.into())),
                initial: &initial[index],
            })
            .collect();
        let mut watch =
            |slot: &SlotName, confirm: &Confirm| live::start_watchdog(&self.options.store, slot, confirm);
        Ok(apply_all(sys, &store, &requests, &mut watch)?)
    }

    /// The files that are kept with a part, by name.
    fn kept(
        &self,
        session: &Session,
        part: &Part,
        sets: &[String],
        surroundings: &Surroundings,
    ) -> Vec<(String, Vec<u8>)> {
        let rules = session.sources.file(session.rules_file);
        let json = |value: serde_json::Result<Vec<u8>>| value.expect("plain data serializes");
        let mut files: Vec<(String, Vec<u8>)> = vec![
            (live::RULES_FILE.into(), bytes::of_text(rules.text()).into_owned()),
            (live::CANONICAL_FILE.into(), bytes::of_text(&print(&session.dump, false)).into_owned()),
            (live::HOST_FILE.into(), json(serde_json::to_vec(surroundings))),
            (live::OPTIONS_FILE.into(), json(serde_json::to_vec(&self.again(part)))),
            (SETS_FILE.into(), json(serde_json::to_vec(&part.object.manifest.sets))),
        ];
        files.extend(kept_sets::files(sets));
        files
    }

    /// The options that apply the same rules again, files aside.
    fn again(&self, part: &Part) -> Vec<String> {
        let ApplyOptions { input, store, .. } = self.options;
        let word = |value: &dyn ValueName| value.name();
        let mut words: Vec<String> = Vec::new();
        let mut option = |name: &str, value: String| words.extend([format!("--{name}"), value]);
        option("attach", word(&self.options.attach));
        option("mode", self.mode.to_string());
        self.options.dev.iter().for_each(|name| option("dev", name.clone()));
        match part.slot.hook {
            Some(hook) => option("hook", hook.to_string()),
            None => self.path.iter().flatten().for_each(|hook| option("hook", hook.to_string())),
        }
        self.options.order.iter().for_each(|order| option("order", word(order)));
        self.options.priority.iter().for_each(|priority| option("priority", priority.to_string()));
        option("keep", word(&self.options.keep));
        let asked = self.place.and_then(|place| place.connections);
        asked.iter().for_each(|connections| option("connections", word(connections)));
        self.place.iter().for_each(|place| option("counters", word(&place.counters)));
        option("family", word(&input.family));
        input.semantics.iter().for_each(|semantics| option("semantics", word(semantics)));
        input.local.iter().for_each(|address| option("local", address.to_string()));
        option("bpffs", store.bpffs.to_string_lossy().into_owned());
        option("state", store.state.to_string_lossy().into_owned());
        let flags = [
            ("generic", self.options.generic),
            ("clsact", self.options.clsact),
            ("defrag", self.options.defrag),
            ("unchecked", self.options.unchecked),
            ("no-trace", self.options.no_trace),
            ("strict", input.strict),
        ];
        words.extend(flags.iter().filter(|(_, on)| *on).map(|(name, _)| format!("--{name}")));
        words
    }

    /// The hooks of each program. At netfilter each hook has its own: the hooks named, else those whose chains have rules
    /// or have a program of polc's by now.
    fn paths(&self, sys: &Sys, session: &Session, attach: Attach) -> Result<Vec<Vec<Hook>>, Failure> {
        if attach != Attach::Netfilter {
            let path = self.hooks(attach);
            return match refusal(&path, Some(attach), true) {
                Some(why) => Err(Failure::Usage(why)),
                None => Ok(vec![path]),
            };
        }
        if let Some(path) = &self.path {
            return Ok(path.iter().map(|hook| vec![*hook]).collect());
        }
        let applied = live::store(&self.options.store)?.names(sys)?;
        let applied =
            |hook| applied.iter().any(|slot| slot.family == session.family() && slot.hook == Some(hook));
        let wanted = |hook: &Hook| {
            let place = place_of(&[*hook], attach, self.mode, true);
            !session.ruleset.path_chains(&place).is_empty() || applied(*hook)
        };
        Ok(Hook::ALL.into_iter().filter(wanted).map(|hook| vec![hook]).collect())
    }

    /// The hooks whose chains are compiled. A host that arriving packets may leave again has FORWARD beside INPUT; in
    /// accelerate mode the kernel's own rules see to it.
    fn hooks(&self, attach: Attach) -> Vec<Hook> {
        self.path.clone().unwrap_or_else(|| {
            let mut path = default_path(attach);
            if self.mode == Mode::Replace && attach != Attach::TcEgress {
                path.push(Hook::Forward);
            }
            path
        })
    }

    /// The host's addresses: those the user gives, else the kernel's. Before routing they have to tell INPUT's packets.
    fn env(&self, sys: &Sys, family: Family, attach: Attach, path: &[Hook]) -> Result<Env, Failure> {
        let given = input::env(&self.options.input, family);
        if given.local.is_some() {
            return Ok(given);
        }
        let found = net::addresses(sys, family)?;
        let early = matches!(attach, Attach::Xdp | Attach::TcIngress);
        if early
            && path.iter().any(|hook| matches!(hook, Hook::Input | Hook::Forward))
            && let Some((addresses, table)) = found.by_policy
        {
            let address = |value| net::address(value, family);
            let addresses = (address(addresses.lo()), address(addresses.hi()));
            return Err(Error::LocalByPolicy { addresses, table }.into());
        }
        Ok(Env { local: Some(found.local), broadcast: found.broadcast, ..given })
    }

    /// The devices, by which packets come and go. What runs on a device knows which one it is.
    fn names(&self, devices: &[net::Device], attach: Attach) -> Result<Devices, Failure> {
        let mut declared = Vec::new();
        for device in devices {
            // Names of other network namespaces' devices may be longer than rules can name; none of this one's is.
            if let Some(name) = DeviceName::new(&device.name) {
                declared.push(IrDevice { ifindex: device.ifindex, name });
            }
        }
        let own = self.options.dev.as_deref().map(place::device_name).transpose()?;
        Ok(match attach {
            Attach::TcEgress => Devices { declared, fixed_in: None, fixed_out: own },
            Attach::Netfilter => Devices { declared, fixed_in: None, fixed_out: None },
            Attach::Xdp | Attach::TcIngress => Devices { declared, fixed_in: own, fixed_out: None },
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn canary(
        &self,
        canary: &str,
        session: &Session,
        place: &Place,
        env: &Env,
        compiled: &Compiled,
        object: &Object,
        device: &net::Device,
    ) -> Result<Check, Failure> {
        let usage = |why: String| Failure::Usage(format!("canary `{canary}`: {why}"));
        let (packet, wanted) = canary.rsplit_once("=>").ok_or_else(|| {
            usage("expected `PACKET => VERDICT`, such as `tcp 10.0.0.1:5000 > 10.0.0.2:22 => accept`".into())
        })?;
        let (packet, wanted) = (packet.trim(), wanted.trim());
        if !["accept", "drop", "reject", "defer"].contains(&wanted) {
            return Err(usage(format!("`{wanted}` is none of accept, drop, reject, defer")));
        }
        let spec = text::parse(packet).map_err(|error| usage(error.message))?;
        let mut input = spec.input().map_err(usage)?;
        match place.attach {
            // Which ones is the packet's to say.
            Some(Attach::Netfilter) => {}
            Some(Attach::TcEgress) => input.out_device = Some(place::device_name(&device.name)?),
            _ => input.in_device = Some(place::device_name(&device.name)?),
        }
        let outcome = session.ruleset.eval(place, env, &input, &mut State::new(1));
        let given = outcome.ending.verdict;
        let fits = given.word() == wanted || (wanted == "accept" && given == Verdict::Defer);
        if !fits {
            return Err(Error::Canary {
                packet: packet.into(),
                wanted: wanted.into(),
                given: polc::decider::describe(session, outcome.ending),
            }
            .into());
        }
        let mut program = vm(compiled, object)?;
        one_check(&mut program, compiled, object, &input, device)
            .ok_or_else(|| usage("the kernel tests no such packet".into()))?
    }
}

fn vm(compiled: &Compiled, object: &Object) -> Result<Program, Failure> {
    let attach = compiled.plan.place.attach.expect("programs are made for an attach point");
    Program::new(&compiled.plan, attach, object).map_err(not_run)
}

fn not_run(error: VmError) -> Failure {
    Failure::Input(format!("the program can't be run in userspace: {error}"))
}

/// A packet as a test run has it, and what the VM returns for it; `None` for packets that the kernel tests no program
/// with.
fn one_check(
    program: &mut Program,
    compiled: &Compiled,
    object: &Object,
    input: &Input,
    device: &net::Device,
) -> Option<Result<Check, Failure>> {
    let plan = &compiled.plan;
    let attach = plan.place.attach.expect("programs are made for an attach point");
    let bytes = object.programs[0].kind.context_bytes() as usize;
    let Setup { mut input, frame, context } = as_tested(input, plan, bytes, device, None)?;
    let name = DeviceName::new(&device.name);
    match attach {
        Attach::TcEgress => (input.in_device, input.out_device) = (None, name),
        Attach::Xdp | Attach::TcIngress => (input.in_device, input.out_device) = (name, None),
        Attach::Netfilter => {}
    }
    Some(returned(program, compiled, &input).map(|returns| Check {
        text: hex(&frame),
        frame,
        context,
        returns,
    }))
}

/// What the program returns for a packet in userspace.
fn returned(program: &mut Program, compiled: &Compiled, input: &Input) -> Result<i32, Failure> {
    let place = &compiled.plan.place;
    let attach = place.attach.expect("programs are made for an attach point");
    let told = program
        .tell(&compiled.plan, input)
        .map_err(|error| Failure::Input(format!("the program fails in userspace: {error}")))?;
    Ok(match told {
        Told::Counted(ending, _) => return_code(attach, place.mode, ending.verdict),
        Told::Returned(code) => code,
    })
}

/// The counters that the dump gives, by the manifest's `counted`, but for those of rules in `given`, which grows.
fn initial(
    session: &Session,
    object: &Object,
    given: &mut BTreeSet<(String, String, Option<u32>)>,
) -> Vec<(u64, u64)> {
    let ruleset = &session.ruleset;
    let mut of = |counted: &polc_backend_ebpf::manifest::Counted| {
        if !given.insert((counted.table.clone(), counted.chain.clone(), counted.rule)) {
            return None;
        }
        let (_, chain) = ruleset.chains.iter().find(|(_, chain)| {
            chain.name == counted.chain && ruleset.tables[chain.table].kind.to_string() == counted.table
        })?;
        let counters = match counted.rule {
            Some(number) => {
                let rule = chain
                    .rules
                    .iter()
                    .map(|rule| &ruleset.rules[*rule])
                    .find(|rule| rule.number == number)?;
                rule.counters
            }
            None => chain.counters,
        };
        Some((counters.packets, counters.bytes))
    };
    object.manifest.counted.iter().map(|counted| of(counted).unwrap_or_default()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
