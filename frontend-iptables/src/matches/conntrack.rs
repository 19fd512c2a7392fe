//! `-m conntrack`: the connection a packet belongs to.

use std::fmt;
use std::net::IpAddr;

use crate::ast::Given;
use crate::codes;
use crate::ext::{Extension, Families, Fault, GivenOption, OptionSpec, Options, Printer, Spec};
use crate::names;
use crate::value::{AddressMask, Ip, PortRange, prefix_length};

/// The options of `-m conntrack`; at least one is given.
#[derive(Clone, Debug, PartialEq)]
pub struct Conntrack {
    /// `--ctstate`.
    pub states: Option<Given<States>>,
    /// `--ctproto`.
    pub protocol: Option<Given<u8>>,
    /// `--ctorigsrc`.
    pub original_source: Option<Given<AddressMask>>,
    /// `--ctorigdst`.
    pub original_destination: Option<Given<AddressMask>>,
    /// `--ctreplsrc`.
    pub reply_source: Option<Given<AddressMask>>,
    /// `--ctrepldst`.
    pub reply_destination: Option<Given<AddressMask>>,
    /// `--ctorigsrcport`.
    pub original_source_ports: Option<Given<PortRange>>,
    /// `--ctorigdstport`.
    pub original_destination_ports: Option<Given<PortRange>>,
    /// `--ctreplsrcport`.
    pub reply_source_ports: Option<Given<PortRange>>,
    /// `--ctrepldstport`.
    pub reply_destination_ports: Option<Given<PortRange>>,
    /// `--ctstatus`.
    pub status: Option<Given<Status>>,
    /// `--ctexpire`: bounds on the remaining lifetime in seconds, inclusive.
    pub expire: Option<Given<(u32, u32)>>,
    /// `--ctdir`.
    pub direction: Option<Given<Direction>>,
}

/// A set of connection states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct States(u8);

impl States {
    /// The packet belongs to no connection that is or can be tracked.
    pub const INVALID: States = States(1);
    /// The packet starts a connection.
    pub const NEW: States = States(2);
    /// The packet starts a connection that another one expects, or is an error about one.
    pub const RELATED: States = States(4);
    /// The packet belongs to a connection with packets in both directions.
    pub const ESTABLISHED: States = States(8);
    /// The packet is exempt from tracking.
    pub const UNTRACKED: States = States(16);
    /// The connection's source address is translated.
    pub const SNAT: States = States(32);
    /// The connection's destination address is translated.
    pub const DNAT: States = States(64);

    /// Whether all of `other` are in the set.
    pub fn contains(self, other: States) -> bool {
        self.0 & other.0 == other.0
    }

    /// The states of either set.
    #[must_use]
    pub fn union(self, other: States) -> States {
        States(self.0 | other.0)
    }
}

/// The states and their names, in the order in which names are matched; the printer has its own order.
const STATES: &[(&str, States)] = &[
    ("INVALID", States::INVALID),
    ("NEW", States::NEW),
    ("ESTABLISHED", States::ESTABLISHED),
    ("RELATED", States::RELATED),
    ("UNTRACKED", States::UNTRACKED),
    ("SNAT", States::SNAT),
    ("DNAT", States::DNAT),
];

/// Prints `INVALID,NEW,RELATED,ESTABLISHED`, in iptables-save's order.
impl fmt::Display for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = [0, 1, 3, 2, 4, 5, 6];
        let names: Vec<&str> =
            order.iter().map(|&at| STATES[at]).filter(|row| self.contains(row.1)).map(|row| row.0).collect();
        f.write_str(&names.join(","))
    }
}

/// Reads a list of state names; only the first `known` rows of the table count.
pub(super) fn parse_states(option: &GivenOption<'_>, known: usize) -> Result<States, Fault> {
    let argument = &option.argument;
    let list = crate::value::name_list(argument.text, &STATES[..known]);
    let list = list.map_err(|item| {
        let names: Vec<&str> = STATES[..known].iter().map(|row| row.0).collect();
        argument
            .bad_part(item, format!("`{item}` is no connection state"))
            .hint(format!("the states are {}, with commas and no blanks", names.join(", ")))
    })?;
    Ok(list.into_iter().fold(States::default(), States::union))
}

/// A set of connection status bits, as the kernel numbers them (`enum ip_conntrack_status`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Status(pub u8);

impl Status {
    /// The connection was expected.
    pub const EXPECTED: u8 = 1;
    /// Packets were seen in both directions.
    pub const SEEN_REPLY: u8 = 2;
    /// The connection is not dropped early under pressure.
    pub const ASSURED: u8 = 4;
    /// The connection's first packet left this host or was delivered.
    pub const CONFIRMED: u8 = 8;
}

const STATUSES: &[(&str, u8)] = &[
    ("NONE", 0),
    ("EXPECTED", Status::EXPECTED),
    ("SEEN_REPLY", Status::SEEN_REPLY),
    ("ASSURED", Status::ASSURED),
    ("CONFIRMED", Status::CONFIRMED),
];

/// Prints `EXPECTED,ASSURED` or `NONE`.
impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = STATUSES.iter().filter(|row| self.0 & row.1 != 0).map(|row| row.0).collect();
        f.write_str(if names.is_empty() { "NONE".into() } else { names.join(",") }.as_str())
    }
}

/// A packet's direction within its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From who opened the connection.
    Original,
    /// The other way.
    Reply,
}

const STATE: u8 = 0;
const PROTOCOL: u8 = 1;
const ORIGINAL_SOURCE: u8 = 2;
const ORIGINAL_DESTINATION: u8 = 3;
const REPLY_SOURCE: u8 = 4;
const REPLY_DESTINATION: u8 = 5;
const ORIGINAL_SOURCE_PORT: u8 = 6;
const ORIGINAL_DESTINATION_PORT: u8 = 7;
const REPLY_SOURCE_PORT: u8 = 8;
const REPLY_DESTINATION_PORT: u8 = 9;
const STATUS: u8 = 10;
const EXPIRE: u8 = 11;
const DIRECTION: u8 = 12;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::value(STATE, "ctstate", "state[,...]").invertible(),
    OptionSpec::value(PROTOCOL, "ctproto", "protocol").invertible(),
    OptionSpec::value(ORIGINAL_SOURCE, "ctorigsrc", "address[/mask]").invertible(),
    OptionSpec::value(ORIGINAL_DESTINATION, "ctorigdst", "address[/mask]").invertible(),
    OptionSpec::value(REPLY_SOURCE, "ctreplsrc", "address[/mask]").invertible(),
    OptionSpec::value(REPLY_DESTINATION, "ctrepldst", "address[/mask]").invertible(),
    OptionSpec::value(STATUS, "ctstatus", "status[,...]").invertible(),
    OptionSpec::value(EXPIRE, "ctexpire", "seconds[:seconds]").invertible(),
    OptionSpec::value(ORIGINAL_SOURCE_PORT, "ctorigsrcport", "port[:port]").invertible(),
    OptionSpec::value(ORIGINAL_DESTINATION_PORT, "ctorigdstport", "port[:port]").invertible(),
    OptionSpec::value(REPLY_SOURCE_PORT, "ctreplsrcport", "port[:port]").invertible(),
    OptionSpec::value(REPLY_DESTINATION_PORT, "ctrepldstport", "port[:port]").invertible(),
    OptionSpec::value(DIRECTION, "ctdir", "ORIGINAL|REPLY"),
];

impl Extension for Conntrack {
    const SPEC: Spec = Spec::new(
        "conntrack",
        Families::Both,
        OPTIONS,
        "Matches by the connection a packet belongs to: its state (INVALID, NEW, ESTABLISHED, RELATED, UNTRACKED, and \
         SNAT or DNAT if its addresses are translated), protocol, addresses and ports in either direction, status \
         bits, remaining lifetime, and the packet's direction in it.",
    );

    fn parse(options: &Options<'_>) -> Result<Conntrack, Fault> {
        if options.given() == 0 {
            return Err(Fault::new(codes::MISSING_OPTION, "`conntrack` needs an option")
                .hint("such as `--ctstate NEW`"));
        }
        let address = |id| options.optional(id, |option| option.argument.host_mask(options.family));
        let ports = |id| options.optional(id, parse_port_range);
        Ok(Conntrack {
            states: options.optional(STATE, |option| parse_states(option, STATES.len()))?,
            protocol: options.optional(PROTOCOL, |option| Ok(option.argument.protocol()? as u8))?,
            original_source: address(ORIGINAL_SOURCE)?,
            original_destination: address(ORIGINAL_DESTINATION)?,
            reply_source: address(REPLY_SOURCE)?,
            reply_destination: address(REPLY_DESTINATION)?,
            original_source_ports: ports(ORIGINAL_SOURCE_PORT)?,
            original_destination_ports: ports(ORIGINAL_DESTINATION_PORT)?,
            reply_source_ports: ports(REPLY_SOURCE_PORT)?,
            reply_destination_ports: ports(REPLY_DESTINATION_PORT)?,
            status: options.optional(STATUS, parse_status)?,
            expire: options.optional(EXPIRE, |option| {
                let (first, last) = option.argument.number_range(u32::MAX.into())?;
                Ok((first as u32, last.unwrap_or(first) as u32))
            })?,
            direction: options.optional(DIRECTION, parse_direction)?,
        })
    }

    fn print(&self, out: &mut Printer<'_>) {
        out.given_if("ctstate", &self.states);
        out.given_if("ctproto", &self.protocol);
        print_address(out, "ctorigsrc", &self.original_source);
        print_address(out, "ctorigdst", &self.original_destination);
        print_address(out, "ctreplsrc", &self.reply_source);
        print_address(out, "ctrepldst", &self.reply_destination);
        print_ports(out, "ctorigsrcport", &self.original_source_ports);
        print_ports(out, "ctorigdstport", &self.original_destination_ports);
        print_ports(out, "ctreplsrcport", &self.reply_source_ports);
        print_ports(out, "ctrepldstport", &self.reply_destination_ports);
        out.given_if("ctstatus", &self.status);
        if let Some(Given { value: (first, last), negated, .. }) = self.expire {
            out.negation(negated);
            if first == last {
                out.option("ctexpire", first);
            } else {
                out.option("ctexpire", format_args!("{first}:{last}"));
            }
        }
        if let Some(direction) = self.direction {
            out.option("ctdir", if direction.value == Direction::Original { "ORIGINAL" } else { "REPLY" });
        }
    }
}

fn parse_status(option: &GivenOption<'_>) -> Result<Status, Fault> {
    let argument = &option.argument;
    let list = crate::value::name_list(argument.text, STATUSES).map_err(|item| {
        argument
            .bad_part(item, format!("`{item}` is no connection status"))
            .hint("they are NONE, EXPECTED, SEEN_REPLY, ASSURED and CONFIRMED")
    })?;
    Ok(Status(list.into_iter().fold(0, |set, bit| set | bit)))
}

fn parse_direction(option: &GivenOption<'_>) -> Result<Direction, Fault> {
    match option.argument.text {
        text if text.eq_ignore_ascii_case("ORIGINAL") => Ok(Direction::Original),
        text if text.eq_ignore_ascii_case("REPLY") => Ok(Direction::Reply),
        text => Err(option.argument.bad(format!("`{text}` is no direction")).hint("write ORIGINAL or REPLY")),
    }
}

/// Ports as `getaddrinfo` reads them: a decimal number or a service of any protocol.
pub(crate) fn any_port(option: &GivenOption<'_>, text: &str) -> Result<u16, Fault> {
    text.parse()
        .ok()
        .or_else(|| names::service(text, None))
        .ok_or_else(|| option.argument.unknown_port(text, None))
}

fn parse_port_range(option: &GivenOption<'_>) -> Result<PortRange, Fault> {
    let port = |text: &str, default| if text.is_empty() { Ok(default) } else { any_port(option, text) };
    match option.argument.text.split_once(':') {
        Some((first, last)) => Ok(PortRange { first: port(first, 0)?, last: port(last, u16::MAX)? }),
        None => {
            let port = port(option.argument.text, 0)?;
            Ok(PortRange { first: port, last: port })
        }
    }
}

fn print_ports(out: &mut Printer<'_>, name: &str, ports: &Option<Given<PortRange>>) {
    let Some(given) = ports else { return };
    out.negation(given.negated);
    if given.value.last == 0 {
        out.option(name, given.value.first);
    } else {
        out.option(name, given.value);
    }
}

fn print_address(out: &mut Printer<'_>, name: &str, address: &Option<Given<AddressMask>>) {
    let Some(given) = address else { return };
    out.negation(given.negated);
    out.option(name, Ip(given.value.address));
    let full = match given.value.mask {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    };
    if prefix_length(given.value.mask) != Some(full) {
        use std::fmt::Write;
        let _ = write!(out, "{}", given.value.mask_text());
    }
}
