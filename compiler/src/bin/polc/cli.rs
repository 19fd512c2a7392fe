//! The command line's grammar: every command, option and default, and the text of `--help` and the man pages.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::PathBuf;

#[cfg(feature = "kernel")]
use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use polc_ir::diag::Severity;
use polc_ir::env::{Attach, Connections, Counting, Mode};
use polc_ir::hook::{Family, Hook, Semantics};

use crate::failure::Failure;
use crate::local::LocalAddress;
use crate::output::Output;

#[cfg(feature = "kernel")]
mod applied;

#[cfg(feature = "kernel")]
pub(crate) use applied::{DumpCode, MetricsArgs, SaveArgs, TopArgs, TraceArgs};

/// Compiles iptables rule sets to eBPF objects, and shows that they decide every packet as the rules say.
///
/// FILE is an iptables-save or ip6tables-save dump; `-` reads standard input. What changes or reads the running kernel
/// needs root: apply, restore, confirm, flush, set, and status, save, trace, top, serve-metrics, dump xlated, dump jited.
#[derive(Debug, Parser)]
#[command(
    name = "polc",
    version,
    max_term_width = 110,
    after_help = "Exit status: 0 if all is well, 1 if something was found or differs, 2 for bad usage or a file that can't be read,\n3 if the kernel or the system refuses; nothing is changed then."
)]
pub(crate) struct Cli {
    /// When to colour what is printed
    #[arg(long, global = true, value_enum, default_value_t = ColorChoice::Auto, value_name = "WHEN")]
    pub color: ColorChoice,
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The process's command line. ipset's `-exist` is the one long option with one dash.
    pub(crate) fn of_process() -> Cli {
        let word = |word: OsString| if word == "-exist" { "--exist".into() } else { word };
        Cli::try_parse_from(std::env::args_os().map(word)).unwrap_or_else(|told| {
            // Help that can't be written is an error, too, unless nobody reads it.
            let lost = told.print().err().filter(|error| error.kind() != ErrorKind::BrokenPipe);
            std::process::exit(lost.map_or(told.exit_code(), |error| {
                Output::new(ColorChoice::Auto).error(&format!("cannot write `standard output`: {error}"));
                2
            }))
        })
    }
}

/// When to use colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ColorChoice {
    /// On terminals, unless NO_COLOR is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Read a rule set, account for every rule, and look for rules that can't be meant
    Check(CheckArgs),
    /// Print a rule set as iptables-legacy-save does
    Fmt(FmtArgs),
    /// Compile a rule set to an eBPF object
    Compile(CompileArgs),
    /// Show that every level and the bytecode decide packets as the rules say
    Verify(VerifyArgs),
    /// Decide the packets of a capture or a list
    Simulate(SimulateArgs),
    /// Show every rule that a packet is tried against, and why it matched or not
    Explain(ExplainArgs),
    /// Print code beside the rules it comes from: of a rule set, an object, or an applied policy
    Dump(DumpArgs),
    /// Compile a rule set, verify it, and put it in force in the running kernel
    #[cfg(feature = "kernel")]
    Apply(ApplyArgs),
    /// As apply in replace mode, for rules on standard input, as iptables-restore takes them
    #[cfg(feature = "kernel")]
    Restore(RestoreArgs),
    /// Keep what apply --confirm put in force
    #[cfg(feature = "kernel")]
    Confirm(SlotArgs),
    /// Take applied policies away, and leave the host as it was before
    #[cfg(feature = "kernel")]
    Flush(FlushArgs),
    /// Show what is applied where, since when, and what it does
    #[cfg(feature = "kernel")]
    Status(StatusArgs),
    /// Print applied rule sets as iptables-save does, with live counters
    #[cfg(feature = "kernel")]
    Save(SaveArgs),
    /// Show packets as applied policies decide them
    #[cfg(feature = "kernel")]
    Trace(TraceArgs),
    /// Show which rules count how many packets a second
    #[cfg(feature = "kernel")]
    Top(TopArgs),
    /// Serve counters to Prometheus
    #[cfg(feature = "kernel")]
    ServeMetrics(MetricsArgs),
    /// Change, ask and list the sets of applied policies while they are in force, as ipset does
    #[cfg(feature = "kernel")]
    #[command(subcommand)]
    Set(SetCommand),
    /// Keep applied policies in step with the host: suspend what the kernel's rules no longer bear out, apply anew when
    /// addresses or devices change
    #[cfg(feature = "kernel")]
    Watch(WatchArgs),
    /// Go back to the policy before unless confirmed (started by apply --confirm)
    #[cfg(feature = "kernel")]
    #[command(hide = true)]
    Watchdog(WatchdogArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a folder
    Man {
        /// The folder; made if it isn't there
        #[arg(value_hint = ValueHint::DirPath)]
        folder: PathBuf,
    },
}

/// How a rule set is read: common to all commands.
#[derive(Debug, Args)]
pub(crate) struct InputArgs {
    /// Address family of the rules; auto: by the save tool's header, the file's name, the addresses
    #[arg(long, value_enum, default_value_t = FamilyChoice::Auto, value_name = "FAMILY", help_heading = "Reading")]
    pub family: FamilyChoice,
    /// Files of sets, as `ipset save` writes them; repeat for several
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Reading")]
    pub ipset: Vec<PathBuf>,
    /// Accept only what iptables-legacy-restore accepts, with no sets but those of --ipset
    #[arg(long, help_heading = "Reading")]
    pub strict: bool,
    /// Whose corner cases hold where iptables-legacy and iptables-nft differ [default: by the save tool's header, else legacy]
    #[arg(long, value_enum, value_name = "WHOSE", help_heading = "Reading")]
    pub semantics: Option<SemanticsChoice>,
    /// An address of the host; repeat for each. Rules that ask whether an address is local need all of them, and those
    /// that ask for broadcast addresses the lengths of their prefixes, too
    #[arg(long, value_name = "ADDR[/LEN]", help_heading = "Reading")]
    pub local: Vec<LocalAddress>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FamilyChoice {
    #[value(name = "4")]
    V4,
    #[value(name = "6")]
    V6,
    Auto,
}

impl FamilyChoice {
    pub(crate) fn family(self) -> Option<Family> {
        match self {
            FamilyChoice::V4 => Some(Family::V4),
            FamilyChoice::V6 => Some(Family::V6),
            FamilyChoice::Auto => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SemanticsChoice {
    Legacy,
    Nft,
}

impl From<SemanticsChoice> for Semantics {
    fn from(choice: SemanticsChoice) -> Semantics {
        match choice {
            SemanticsChoice::Legacy => Semantics::Legacy,
            SemanticsChoice::Nft => Semantics::Nft,
        }
    }
}

/// Where a program sits and what it is for.
#[derive(Debug, Args)]
pub(crate) struct PlaceArgs {
    /// Hooks whose chains are compiled, in order; repeat for several [default: prerouting and input where packets
    /// arrive, output and postrouting where they leave]
    #[arg(long, value_enum, value_name = "HOOK", help_heading = "Place")]
    pub hook: Vec<HookChoice>,
    /// accelerate: the kernel's own rules stay, and decide what is deferred; replace: every rule has to be compiled
    #[arg(long, value_enum, default_value_t = ModeChoice::Accelerate, value_name = "MODE", help_heading = "Place")]
    pub mode: ModeChoice,
    /// The same as --mode replace
    #[arg(long, conflicts_with = "mode", help_heading = "Place")]
    pub replace: bool,
    /// Whether programs ask the kernel for the connections of packets they would drop, in accelerate mode where packets
    /// arrive [default: apply: what the host allows; else unknown]
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Place")]
    pub connections: Option<ConnectionsChoice>,
    /// What packets are counted for
    #[arg(long, value_enum, default_value_t = CountersChoice::Exact, value_name = "WHAT", help_heading = "Place")]
    pub counters: CountersChoice,
}

impl PlaceArgs {
    pub(crate) fn mode(&self) -> Mode {
        if self.replace { Mode::Replace } else { self.mode.into() }
    }

    /// What is known of connections at an attach point.
    pub(crate) fn connections(&self, attach: Attach) -> Result<Connections, Failure> {
        let asked = self.connections.unwrap_or(ConnectionsChoice::Unknown);
        let fits = match asked {
            ConnectionsChoice::Unknown => true,
            ConnectionsChoice::State => attach == Attach::Netfilter,
            _ => matches!(attach, Attach::Xdp | Attach::TcIngress),
        };
        if !fits || (asked != ConnectionsChoice::Unknown && self.mode() == Mode::Replace) {
            return Err(Failure::Usage(
                "connections are known in accelerate mode alone: looked up where packets arrive, at xdp and tc-ingress, \
                 and their state at netfilter"
                    .into(),
            ));
        }
        Ok(asked.into())
    }

    pub(crate) fn path(&self) -> Option<Vec<Hook>> {
        hooks_of(&self.hook)
    }
}

/// The hooks named, each once; none if none is.
pub(crate) fn hooks_of(named: &[HookChoice]) -> Option<Vec<Hook>> {
    let mut hooks: Vec<Hook> = Vec::new();
    for hook in named.iter().map(|hook| (*hook).into()) {
        if !hooks.contains(&hook) {
            hooks.push(hook);
        }
    }
    (!hooks.is_empty()).then_some(hooks)
}

/// Devices that packets come and go by.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// Device that packets come by
    #[arg(long, value_name = "NAME", help_heading = "Devices")]
    pub in_interface: Option<String>,
    /// Device that packets leave by
    #[arg(long, value_name = "NAME", help_heading = "Devices")]
    pub out_interface: Option<String>,
    /// A device of the host by name and number; repeat for each that the rules tell apart
    #[arg(long, value_name = "NAME=IFINDEX", value_parser = device, help_heading = "Devices")]
    pub device: Vec<(String, u32)>,
}

fn device(text: &str) -> Result<(String, u32), String> {
    let (name, number) = text.split_once('=').ok_or("expected NAME=IFINDEX, such as eth0=2")?;
    let number = number.parse().map_err(|_| format!("`{number}` is not a device number"))?;
    if polc_ir::field::DeviceName::new(name).is_none() {
        return Err(format!("`{name}` is not a device name: 1 to 15 bytes"));
    }
    Ok((name.to_string(), number))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AttachChoice {
    /// XDP, on a device's receive path.
    Xdp,
    /// tc or tcx ingress.
    TcIngress,
    /// tc or tcx egress.
    TcEgress,
    /// Netfilter's own hook, named by --hook; apply and restore take all that have rules, unless it is given.
    Netfilter,
}

impl From<AttachChoice> for Attach {
    fn from(choice: AttachChoice) -> Attach {
        match choice {
            AttachChoice::Xdp => Attach::Xdp,
            AttachChoice::TcIngress => Attach::TcIngress,
            AttachChoice::TcEgress => Attach::TcEgress,
            AttachChoice::Netfilter => Attach::Netfilter,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HookChoice {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

impl From<HookChoice> for Hook {
    fn from(choice: HookChoice) -> Hook {
        match choice {
            HookChoice::Prerouting => Hook::Prerouting,
            HookChoice::Input => Hook::Input,
            HookChoice::Forward => Hook::Forward,
            HookChoice::Output => Hook::Output,
            HookChoice::Postrouting => Hook::Postrouting,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeChoice {
    Accelerate,
    Replace,
}

impl From<ModeChoice> for Mode {
    fn from(choice: ModeChoice) -> Mode {
        match choice {
            ModeChoice::Accelerate => Mode::Accelerate,
            ModeChoice::Replace => Mode::Replace,
        }
    }
}

/// A choice as an option's value.
pub(crate) trait ValueName {
    /// The value's name.
    fn name(&self) -> String;
}

impl<T: ValueEnum> ValueName for T {
    fn name(&self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CountersChoice {
    /// What iptables counts: every rule that a packet meets and fits, and the policy that it comes to.
    Exact,
    /// Rules that accept, drop or reject it, and policies; jumps, marks and the like cost nothing.
    Terminal,
    /// Nothing; programs tell verdicts alone.
    Off,
}

impl From<CountersChoice> for Counting {
    fn from(choice: CountersChoice) -> Counting {
        match choice {
            CountersChoice::Exact => Counting::Exact,
            CountersChoice::Terminal => Counting::Terminal,
            CountersChoice::Off => Counting::Off,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConnectionsChoice {
    /// They don't.
    Unknown,
    /// They do; no helper (`-j CT --helper`) announces connections, so the first packet of none is RELATED.
    Lookup,
    /// They do; the first packet of a connection may be RELATED.
    LookupRelated,
    /// Packets carry their connection's state: at netfilter, behind connection tracking.
    State,
}

impl From<ConnectionsChoice> for Connections {
    fn from(choice: ConnectionsChoice) -> Connections {
        match choice {
            ConnectionsChoice::Unknown => Connections::Unknown,
            ConnectionsChoice::Lookup => Connections::LookedUp { expectations: false },
            ConnectionsChoice::LookupRelated => Connections::LookedUp { expectations: true },
            ConnectionsChoice::State => Connections::State,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DenyLevel {
    Note,
    Warning,
    Error,
}

impl From<DenyLevel> for Severity {
    fn from(level: DenyLevel) -> Severity {
        match level {
            DenyLevel::Note => Severity::Note,
            DenyLevel::Warning => Severity::Warning,
            DenyLevel::Error => Severity::Error,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReportFormat {
    /// For people: findings on standard error, the account on standard output.
    Human,
    /// One JSON object on standard output (docs/check-schema.json).
    Json,
    /// SARIF 2.1.0 on standard output.
    Sarif,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TextFormat {
    /// For people.
    Human,
    /// JSON.
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The rule set
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Judge the rules at this attach point alone [default: each where its hook is best served]
    #[arg(long, value_enum, value_name = "WHERE", help_heading = "Place")]
    pub attach: Option<AttachChoice>,
    #[command(flatten)]
    pub place: PlaceArgs,
    /// How findings are written
    #[arg(long, value_enum, default_value_t = ReportFormat::Human, value_name = "FORMAT")]
    pub format: ReportFormat,
    /// Exit with 1 if there is a finding of this severity or worse
    #[arg(long, value_enum, default_value_t = DenyLevel::Error, value_name = "SEVERITY")]
    pub deny: DenyLevel,
    /// Say for each deferred rule why, rather than once for each reason
    #[arg(long, short)]
    pub verbose: bool,
    #[command(flatten)]
    pub input: InputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct FmtArgs {
    /// The rule sets
    #[arg(required = true, value_hint = ValueHint::FilePath)]
    pub files: Vec<PathBuf>,
    /// Write nothing; exit with 1 if a file is not in canonical form
    #[arg(long)]
    pub check: bool,
    /// Rewrite the files in place rather than printing; comment lines are not kept
    #[arg(long, short, conflicts_with = "check")]
    pub write: bool,
    /// Print counters, as iptables-save -c does
    #[arg(long, short)]
    pub counters: bool,
    /// Address family of the rules; auto: by the save tool's header, the file's name, the addresses
    #[arg(long, value_enum, default_value_t = FamilyChoice::Auto, value_name = "FAMILY")]
    pub family: FamilyChoice,
    /// Files of sets, as `ipset save` writes them; repeat for several
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub ipset: Vec<PathBuf>,
    /// Accept only what iptables-legacy-restore accepts, with no sets but those of --ipset
    #[arg(long)]
    pub strict: bool,
}

/// What `compile --emit` can print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Emit {
    /// The rules' meaning.
    Ruleset,
    /// Stages of cubes.
    Classifier,
    /// How each stage is decided.
    Decision,
    /// What the program does.
    Plan,
    /// The instructions.
    Asm,
}

#[derive(Debug, Args)]
pub(crate) struct CompileArgs {
    /// The rule set
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// The object to write
    #[arg(short, long, value_name = "OBJECT", value_hint = ValueHint::FilePath, required_unless_present_any = ["emit", "explain_cost"])]
    pub output: Option<PathBuf>,
    /// Where the program sits
    #[arg(long, value_enum, value_name = "WHERE", default_value_t = AttachChoice::Xdp, help_heading = "Place")]
    pub attach: AttachChoice,
    #[command(flatten)]
    pub place: PlaceArgs,
    #[command(flatten)]
    pub devices: DeviceArgs,
    /// Let the program report packets as it decides them, while somebody watches
    #[arg(long)]
    pub trace: bool,
    /// Print these levels on standard output
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LEVEL")]
    pub emit: Vec<Emit>,
    /// Print what decides each stage, and what the cost model expects it to take
    #[arg(long)]
    pub explain_cost: bool,
    #[command(flatten)]
    pub input: InputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The rule set
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Verify at this attach point alone [default: at every one, for every hook whose chains have rules]
    #[arg(long, value_enum, value_name = "WHERE", help_heading = "Place")]
    pub attach: Option<AttachChoice>,
    #[command(flatten)]
    pub place: PlaceArgs,
    #[command(flatten)]
    pub devices: DeviceArgs,
    /// How the result is written
    #[arg(long, value_enum, default_value_t = TextFormat::Human, value_name = "FORMAT")]
    pub format: TextFormat,
    /// Random packets at each place, beside the witnesses and boundaries
    #[arg(long, default_value_t = 1_000, value_name = "COUNT")]
    pub random: u32,
    /// Seed of the random packets
    #[arg(long, default_value_t = 1, value_name = "SEED")]
    pub seed: u64,
    /// Also load each program and run the packets in the kernel, attached nowhere; needs root
    #[cfg(feature = "kernel")]
    #[arg(long)]
    pub kernel: bool,
    /// Also restore the rules with iptables-legacy, or iptables-nft for --semantics nft, in a network namespace of their
    /// own, and compare verdicts, marks and counters of packets sent through PREROUTING to INPUT and FORWARD; needs root
    #[cfg(feature = "kernel")]
    #[arg(long)]
    pub netfilter: bool,
    #[command(flatten)]
    pub input: InputArgs,
}

/// What decides the packets of `simulate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Level {
    Ruleset,
    Classifier,
    Decision,
    Plan,
    /// The bytecode, in userspace.
    Rbpf,
    /// The program in the running kernel, attached nowhere.
    #[cfg(feature = "kernel")]
    Kernel,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("source").required(true))]
pub(crate) struct SimulateArgs {
    /// The rule set
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Packets: a pcap or pcapng capture of Ethernet or raw IP
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, group = "source")]
    pub pcap: Option<PathBuf>,
    /// Packets: one JSON object a line, such as {"proto":"tcp","src":"10.0.0.1","dst":"10.0.0.2","dport":22} or
    /// {"packet":"tcp 10.0.0.1 > 10.0.0.2:22"} or {"frame":"HEX","in":"eth0","mark":1}; `-` reads standard input
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, group = "source")]
    pub packets: Option<PathBuf>,
    /// Where the program would sit [default: at level ruleset nowhere, the rules themselves being asked with everything
    /// given; at others where the first hook's rules are best served]
    #[arg(long, value_enum, value_name = "WHERE", help_heading = "Place")]
    pub attach: Option<AttachChoice>,
    #[command(flatten)]
    pub place: PlaceArgs,
    #[command(flatten)]
    pub devices: DeviceArgs,
    /// What decides
    #[arg(long, value_enum, default_value_t = Level::Ruleset, value_name = "LEVEL")]
    pub level: Level,
    /// How verdicts are written; json: one object a line
    #[arg(long, value_enum, default_value_t = TextFormat::Human, value_name = "FORMAT")]
    pub format: TextFormat,
    #[command(flatten)]
    pub input: InputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// The rule set
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// The packet, such as 'tcp 10.0.0.1:5000 > 10.0.0.2:22 in=eth0'
    #[arg(long, value_name = "PACKET")]
    pub packet: String,
    /// Where the program would sit; without it, the rules' own meaning with everything given is explained
    #[arg(long, value_enum, value_name = "WHERE", help_heading = "Place")]
    pub attach: Option<AttachChoice>,
    #[command(flatten)]
    pub place: PlaceArgs,
    #[command(flatten)]
    pub input: InputArgs,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct DumpArgs {
    #[cfg(feature = "kernel")]
    #[command(subcommand)]
    pub code: Option<DumpCode>,
    #[command(flatten)]
    pub input: DumpInput,
}

/// What `dump` reads where it asks no kernel.
#[derive(Debug, Args)]
pub(crate) struct DumpInput {
    /// The rule set, or an object that `polc compile` wrote; a file named as a command needs `./` in front
    #[arg(required = true, value_hint = ValueHint::FilePath)]
    pub file: Option<PathBuf>,
    /// Where the program sits, for a rule set
    #[arg(long, value_enum, value_name = "WHERE", default_value_t = AttachChoice::Xdp, help_heading = "Place")]
    pub attach: AttachChoice,
    #[command(flatten)]
    pub place: PlaceArgs,
    #[command(flatten)]
    pub devices: DeviceArgs,
    #[command(flatten)]
    pub input: InputArgs,
}

/// A path that means the same in processes that outlive this one, and are somewhere else.
#[cfg(feature = "kernel")]
fn absolute() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(std::path::absolute)
}

/// Where polc keeps what it knows about applied policies.
#[cfg(feature = "kernel")]
#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    /// The bpffs that maps, programs and links are pinned in; one is mounted if there is none
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, value_parser = absolute(), default_value = polc_loader::store::DEFAULT_BPFFS, help_heading = "State")]
    pub bpffs: PathBuf,
    /// Where the rest is kept; it need not outlive the machine
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, value_parser = absolute(), default_value = polc_loader::store::DEFAULT_STATE, help_heading = "State")]
    pub state: PathBuf,
}

/// Where among the programs of others.
#[cfg(feature = "kernel")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OrderChoice {
    /// Before all others.
    First,
    /// After all others.
    Last,
}

/// Traffic that accelerate mode leaves to the kernel whatever the rules say.
#[cfg(feature = "kernel")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KeepChoice {
    /// UDP to ports 67 and 68, or 546 and 547: DHCP clients read it with packet sockets.
    Dhcp,
    /// Nothing.
    None,
}

/// How a policy is put in force: common to apply and restore.
#[cfg(feature = "kernel")]
#[derive(Debug, Args)]
pub(crate) struct ApplyOptions {
    /// Where the program sits
    #[arg(long, value_enum, value_name = "WHERE", default_value_t = AttachChoice::Xdp, help_heading = "Place")]
    pub attach: AttachChoice,
    /// The device
    #[arg(long, value_name = "NAME", help_heading = "Place")]
    pub dev: Option<String>,
    /// Run XDP without the driver's help, on every device; slower
    #[arg(long, help_heading = "Place")]
    pub generic: bool,
    /// Use the clsact qdisc even where the kernel has tcx
    #[arg(long, help_heading = "Place")]
    pub clsact: bool,
    /// Go beside others' tcx programs, before or after them [default: refuse, and name them]
    #[arg(long, value_enum, value_name = "ORDER", help_heading = "Place")]
    pub order: Option<OrderChoice>,
    /// The program's priority among a netfilter hook's functions [default: the highest free one before the first table
    /// that the rules have chains of]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Place")]
    pub priority: Option<i32>,
    /// At a netfilter hook, have fragments reassembled first, as connection tracking does
    #[arg(long, help_heading = "Place")]
    pub defrag: bool,
    /// Go back to what was in force before, unless `polc confirm` follows within this time
    #[arg(long, value_name = "SECONDS", help_heading = "Safety", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub confirm: Option<u32>,
    /// Put nothing in force unless this packet is decided so, such as 'tcp 10.0.0.1:5000 > 10.0.0.2:22 => accept';
    /// repeat for several. The verdict is accept, drop, reject or defer; a packet that is left to the kernel fits accept
    #[arg(long, value_name = "PACKET => VERDICT", help_heading = "Safety")]
    pub canary: Vec<String>,
    /// Do everything but attach: compile, verify, load, test
    #[arg(long, help_heading = "Safety")]
    pub dry_run: bool,
    /// Don't compare the rules with the kernel's: accelerate mode drops what they would drop, whether or not the kernel
    /// has them
    #[arg(long, help_heading = "Safety")]
    pub unchecked: bool,
    /// Traffic that accelerate mode leaves to the kernel whatever the rules say
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = KeepChoice::Dhcp, help_heading = "Safety")]
    pub keep: KeepChoice,
    /// Leave out what `polc trace` needs; while nobody watches, it costs a packet next to nothing
    #[arg(long)]
    pub no_trace: bool,
    /// What reports call the rule set (given by watch)
    #[arg(long, hide = true)]
    pub named: Option<String>,
    /// Numbers of the programs that are replaced; if others are in force by then, nothing is (given by watch)
    #[arg(long, hide = true, value_delimiter = ',')]
    pub over: Vec<u32>,
    #[command(flatten)]
    pub input: InputArgs,
    #[command(flatten)]
    pub store: StoreArgs,
}

#[cfg(feature = "kernel")]
#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// The rule set
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    #[command(flatten)]
    pub place: PlaceArgs,
    #[command(flatten)]
    pub options: ApplyOptions,
}

#[cfg(feature = "kernel")]
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// Start with the counters that the rules give
    #[arg(long, short)]
    pub counters: bool,
    /// The same as --dry-run
    #[arg(long, short)]
    pub test: bool,
    /// Hooks whose chains are put in force, in order; repeat for several. Rules of others are then left out [default: all
    /// that the place has; rules of others are refused]
    #[arg(long, value_enum, value_name = "HOOK", help_heading = "Place")]
    pub hook: Vec<HookChoice>,
    /// The rule set [default: standard input]
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub options: ApplyOptions,
}

/// Which applied policies.
#[cfg(feature = "kernel")]
#[derive(Debug, Args)]
pub(crate) struct SlotArgs {
    /// Only policies at this attach point
    #[arg(long, value_enum, value_name = "WHERE")]
    pub attach: Option<AttachChoice>,
    /// Only policies of this device
    #[arg(long, value_name = "NAME")]
    pub dev: Option<String>,
    /// Only policies for this address family
    #[arg(long, value_enum, default_value_t = FamilyChoice::Auto, hide_default_value = true, hide_possible_values = true, value_name = "4|6")]
    pub family: FamilyChoice,
    /// Only policies at this netfilter hook
    #[arg(long, value_enum, value_name = "HOOK")]
    pub hook: Option<HookChoice>,
    #[command(flatten)]
    pub store: StoreArgs,
}

#[cfg(feature = "kernel")]
#[derive(Debug, Args)]
pub(crate) struct FlushArgs {
    #[command(flatten)]
    pub slots: SlotArgs,
    /// What is kept of a network namespace that is gone, by the number that `polc status` tells, instead of this one
    #[arg(long, value_name = "NUMBER")]
    pub gone: Option<u64>,
}

#[cfg(feature = "kernel")]
#[derive(Debug, Subcommand)]
pub(crate) enum SetCommand {
    /// Add an element: SET ELEMENT [nomatch] [-exist]
    Add(SetChangeArgs),
    /// Delete an element: SET ELEMENT [-exist]
    #[command(visible_alias = "delete")]
    Del(SetChangeArgs),
    /// Say whether an element is in a set; exit status 1 if it isn't: SET ELEMENT [nomatch]
    Test(SetChangeArgs),
    /// Print sets as ipset save does
    #[command(visible_alias = "save")]
    List(SetListArgs),
}

#[cfg(feature = "kernel")]
#[derive(Debug, Args)]
pub(crate) struct SetChangeArgs {
    #[command(flatten)]
    pub slots: SlotArgs,
    /// No error if the element is there already, or isn't; also `-exist`
    #[arg(long, short = '!')]
    pub exist: bool,
    /// The set, an element as ipset takes it, its options
    #[arg(required = true, num_args = 2.., value_name = "SET ELEMENT")]
    pub words: Vec<String>,
}

#[cfg(feature = "kernel")]
#[derive(Debug, Args)]
pub(crate) struct SetListArgs {
    #[command(flatten)]
    pub slots: SlotArgs,
    /// The set [default: all that can be changed]
    pub set: Option<String>,
}

#[cfg(feature = "kernel")]
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub slots: SlotArgs,
    /// How it is written
    #[arg(long, value_enum, default_value_t = TextFormat::Human, value_name = "FORMAT")]
    pub format: TextFormat,
    /// Watch for so many milliseconds to tell packets a second; 0: don't
    #[arg(long, default_value_t = 200, value_name = "MS", value_parser = clap::value_parser!(u32).range(0..=60_000))]
    pub sample: u32,
}

#[cfg(feature = "kernel")]
#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    #[command(flatten)]
    pub slots: SlotArgs,
    /// How often the kernel's rules are read, in milliseconds: x_tables does not tell when they change
    #[arg(long, default_value_t = 1_000, value_name = "MS", value_parser = clap::value_parser!(u32).range(10..=3_600_000))]
    pub interval: u32,
    /// Look once, and end: status 1 if a policy is suspended or could not be applied anew
    #[arg(long)]
    pub once: bool,
}

#[cfg(feature = "kernel")]
#[derive(Debug, Args)]
pub(crate) struct WatchdogArgs {
    /// The slot, as JSON
    #[arg(long)]
    pub slot: String,
    /// Which change
    #[arg(long)]
    pub token: String,
    #[command(flatten)]
    pub store: StoreArgs,
}

#[cfg(all(test, feature = "kernel"))]
mod tests {
    use super::*;

    #[test]
    fn folders_of_policies_do_not_depend_on_where_one_is() {
        let cli = Cli::try_parse_from(["polc", "status", "--bpffs", "fs", "--state", "state"]);
        let Ok(Cli { command: Command::Status(args), .. }) = cli else { panic!("{cli:?}") };
        let here = std::env::current_dir().expect("there is one");
        assert_eq!(args.slots.store.bpffs, here.join("fs"));
        assert_eq!(args.slots.store.state, here.join("state"));
    }
}
