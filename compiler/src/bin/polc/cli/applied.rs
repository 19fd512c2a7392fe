//! The grammar of the commands that read back and watch applied policies.

use std::net::SocketAddr;

use clap::{Args, Subcommand, ValueEnum};

use super::{SlotArgs, TextFormat};

/// Where metrics are served unless the user says otherwise: to this host alone.
const DEFAULT_LISTEN: &str = "127.0.0.1:9788";

#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// Print each rule's packets and bytes, as iptables-save -c does
    #[arg(long, short)]
    pub counters: bool,
    #[command(flatten)]
    pub slots: SlotArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum VerdictChoice {
    Accept,
    Drop,
    Reject,
    Defer,
}

impl VerdictChoice {
    /// The word that counter slots have for it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            VerdictChoice::Accept => "accept",
            VerdictChoice::Drop => "drop",
            VerdictChoice::Reject => "reject",
            VerdictChoice::Defer => "defer",
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    /// Packets to show, such as `tcp dst 192.0.2.1 dport 22 or icmp`; all words are evaluated in the kernel
    #[arg(value_name = "FILTER", long_help = polc::watch::FILTER_LONG_HELP)]
    pub filter: Vec<String>,
    /// Only packets with this verdict; repeat for several
    #[arg(long, value_enum, value_name = "VERDICT", help_heading = "Who decided")]
    pub verdict: Vec<VerdictChoice>,
    /// Only packets decided in this chain: a rule of it, or its policy
    #[arg(long, value_name = "NAME", help_heading = "Who decided")]
    pub chain: Option<String>,
    /// Only packets decided by the rule in this line of the rule set
    #[arg(long, value_name = "NUMBER", help_heading = "Who decided")]
    pub line: Option<u32>,
    /// Most packets a second on each CPU that are shown; how many are not is told. 0: no limit
    #[arg(long, default_value_t = 1_000, value_name = "PACKETS")]
    pub rate: u32,
    /// End after so many packets
    #[arg(long, short, value_name = "PACKETS", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// How packets are written; json: one object a line (docs/trace-schema.json)
    #[arg(long, value_enum, default_value_t = TextFormat::Human, value_name = "FORMAT")]
    pub format: TextFormat,
    #[command(flatten)]
    pub slots: SlotArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Milliseconds between readings
    #[arg(long, default_value_t = 1_000, value_name = "MS", value_parser = clap::value_parser!(u32).range(50..=60_000))]
    pub interval: u32,
    #[command(flatten)]
    pub slots: SlotArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MetricsArgs {
    /// Address and port to listen on
    #[arg(long, value_name = "ADDR:PORT", default_value = DEFAULT_LISTEN)]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub slots: SlotArgs,
}

/// Which code of an applied policy's program.
#[derive(Debug, Subcommand)]
pub(crate) enum DumpCode {
    /// Print the bytecode of applied policies as the kernel's verifier rewrote it, beside the rules it comes from
    Xlated(SlotArgs),
    /// Print the machine code of applied policies, beside the rules it comes from
    Jited(SlotArgs),
}
