//! `-m addrtype`: what the routing table says an address is.

use std::fmt;

use polc_ir::hook::{Family, Hook};

use crate::ast::Given;
use crate::check::wrong_hook;
use crate::codes;
use crate::ext::{
    Extension, Families, Fault, GivenOption, OptionSpec, Options, Place, Printer, Spec, set_of,
};

/// The options of `-m addrtype`; a source or a destination type is given.
#[derive(Clone, Debug, PartialEq)]
pub struct Addrtype {
    /// `--src-type`.
    pub source: Option<Given<AddressTypes>>,
    /// `--dst-type`.
    pub destination: Option<Given<AddressTypes>>,
    /// `--limit-iface-in` or `--limit-iface-out`.
    pub limit: Option<Given<LimitInterface>>,
}

/// The device to which the look-up is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LimitInterface {
    /// The device the packet came in by.
    In,
    /// The device the packet goes out by.
    Out,
}

/// A set of address types: bit n is the type numbered n in `enum rtn_type` (include/uapi/linux/rtnetlink.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressTypes(pub u16);

impl AddressTypes {
    /// An address of this host.
    pub const LOCAL: u16 = 1 << 2;
    /// A broadcast address of an attached network.
    pub const BROADCAST: u16 = 1 << 3;
    /// A multicast address.
    pub const MULTICAST: u16 = 1 << 5;
    /// An address routed to another host.
    pub const UNICAST: u16 = 1 << 1;
    /// An address with a blackhole route.
    pub const BLACKHOLE: u16 = 1 << 6;
    /// An address with a prohibit route.
    pub const PROHIBIT: u16 = 1 << 8;
}

/// The types' names, by number.
const NAMES: &[(&str, u16)] = &[
    ("UNSPEC", 0),
    ("UNICAST", 1),
    ("LOCAL", 2),
    ("BROADCAST", 3),
    ("ANYCAST", 4),
    ("MULTICAST", 5),
    ("BLACKHOLE", 6),
    ("UNREACHABLE", 7),
    ("PROHIBIT", 8),
    ("THROW", 9),
    ("NAT", 10),
    ("XRESOLVE", 11),
];

/// Prints `UNICAST,LOCAL`.
impl fmt::Display for AddressTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = NAMES.iter().filter(|row| self.0 & 1 << row.1 != 0).map(|row| row.0).collect();
        f.write_str(&names.join(","))
    }
}

const SOURCE: u8 = 0;
const DESTINATION: u8 = 1;
const LIMIT_IN: u8 = 2;
const LIMIT_OUT: u8 = 3;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::value(SOURCE, "src-type", "type[,...]").invertible(),
    OptionSpec::value(DESTINATION, "dst-type", "type[,...]").invertible(),
    OptionSpec::switch(LIMIT_IN, "limit-iface-in").excludes(set_of(LIMIT_OUT)),
    OptionSpec::switch(LIMIT_OUT, "limit-iface-out").excludes(set_of(LIMIT_IN)),
];

impl Extension for Addrtype {
    const SPEC: Spec = Spec::new(
        "addrtype",
        Families::Both,
        OPTIONS,
        "Matches by the type that the routing table gives the source or destination address: UNSPEC, UNICAST, LOCAL, \
         BROADCAST, ANYCAST, MULTICAST, BLACKHOLE, UNREACHABLE, PROHIBIT, THROW, NAT or XRESOLVE; the look-up can be \
         limited to the device the packet came in or goes out by.",
    );

    fn parse(options: &Options<'_>) -> Result<Addrtype, Fault> {
        let source = options.optional(SOURCE, parse_types)?;
        let destination = options.optional(DESTINATION, parse_types)?;
        if source.is_none() && destination.is_none() {
            return Err(Fault::new(codes::MISSING_OPTION, "`addrtype` needs `--src-type` or `--dst-type`"));
        }
        let limit_in = options.switch(LIMIT_IN).map(|given| given.map(|()| LimitInterface::In));
        let limit_out = options.switch(LIMIT_OUT).map(|given| given.map(|()| LimitInterface::Out));
        Ok(Addrtype { source, destination, limit: limit_in.or(limit_out) })
    }

    fn print(&self, out: &mut Printer<'_>) {
        out.given_if("src-type", &self.source);
        out.given_if("dst-type", &self.destination);
        match self.limit.map(|limit| limit.value) {
            Some(LimitInterface::In) => out.switch("limit-iface-in"),
            Some(LimitInterface::Out) => out.switch("limit-iface-out"),
            None => {}
        }
    }

    /// net/netfilter/xt_addrtype.c, `addrtype_mt_checkentry_v1`.
    fn check(&self, place: &Place) -> Result<(), Fault> {
        if let Some(limit) = self.limit {
            let (name, hooks): (_, &[Hook]) = match limit.value {
                LimitInterface::In => ("--limit-iface-in", &[Hook::Prerouting, Hook::Input, Hook::Forward]),
                LimitInterface::Out => {
                    ("--limit-iface-out", &[Hook::Forward, Hook::Output, Hook::Postrouting])
                }
            };
            if let Some(wrong) = place.hooks.iter().find(|hook| !hooks.contains(hook)) {
                return Err(wrong_hook(name, hooks, wrong).at(limit.span));
            }
        }
        if place.family == Family::V6 {
            for given in self.source.iter().chain(&self.destination) {
                let types = given.value.0;
                let refused = AddressTypes::BLACKHOLE | AddressTypes::BROADCAST;
                if types & refused != 0 || types >= AddressTypes::PROHIBIT {
                    let message = format!("IPv6 addresses have none of these types: {}", given.value);
                    return Err(Fault::new(codes::WRONG_FAMILY, message).at(given.span));
                }
            }
        }
        Ok(())
    }
}

fn parse_types(option: &GivenOption<'_>) -> Result<AddressTypes, Fault> {
    let argument = &option.argument;
    let list = crate::value::name_list(argument.text, NAMES).map_err(|item| {
        let names: Vec<&str> = NAMES.iter().map(|row| row.0).collect();
        argument
            .bad_part(item, format!("`{item}` is no address type"))
            .hint(format!("the types are {}", names.join(", ")))
    })?;
    Ok(AddressTypes(list.into_iter().fold(0, |set, number| set | 1 << number)))
}
