//! Addresses of the host, as `--local` takes them: `192.0.2.1`, or with the length of its subnet's prefix, which tells the
//! subnet's broadcast address, too.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use polc::session::Session;
use polc_ir::derived::DerivedData;
use polc_ir::diag::{Code, Diagnostic};
use polc_ir::env::Env;
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::interval::Interval;
use polc_ir::ruleset::Ruleset;
use polc_ir::source::Span;

/// Rules tell broadcast addresses apart, and those of subnets are not known.
const NO_BROADCAST: Code = Code(304);

/// `RTN_UNICAST` and `RTN_BROADCAST` of include/uapi/linux/rtnetlink.h.
const UNICAST: u128 = 1;
const BROADCAST: u128 = 3;

/// An address of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LocalAddress {
    address: IpAddr,
    /// Length of the subnet's prefix.
    length: Option<u8>,
}

impl FromStr for LocalAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<LocalAddress, String> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| format!("`{address}` is not an address"))?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let length = match length.map(str::parse::<u8>) {
            None => None,
            Some(Ok(length)) if length <= most => Some(length),
            Some(_) => return Err(format!("the length of a prefix is a number up to {most}")),
        };
        Ok(LocalAddress { address, length })
    }
}

impl fmt::Display for LocalAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        self.length.map_or(Ok(()), |length| write!(f, "/{length}"))
    }
}

impl LocalAddress {
    fn number(&self, family: Family) -> Option<u128> {
        match (self.address, family) {
            (IpAddr::V4(address), Family::V4) => Some(address.to_bits().into()),
            (IpAddr::V6(address), Family::V6) => Some(address.to_bits()),
            _ => None,
        }
    }

    /// The broadcast address that the kernel adds with it (net/ipv4/fib_frontend.c, `fib_add_ifaddr`).
    fn broadcast(&self) -> Option<u128> {
        let IpAddr::V4(address) = self.address else { return None };
        let length = self.length.filter(|length| *length < 31)?;
        Some((address.to_bits() | u32::MAX >> length).into())
    }
}

/// The host with these addresses.
pub(crate) fn env(given: &[LocalAddress], family: Family) -> Env {
    let mut local: Vec<Interval> =
        given.iter().filter_map(|one| one.number(family)).map(Interval::point).collect();
    let known = !given.is_empty();
    if known {
        // The loopback network is local on every host.
        local.extend(match family {
            Family::V4 => Interval::new(0x7f00_0000, 0x7fff_ffff),
            Family::V6 => Interval::new(1, 1),
        });
        local.sort_unstable();
        local.dedup();
    }
    let of_family = given.iter().filter(|_| family == Family::V4);
    let mut broadcast: Vec<Interval> =
        of_family.filter_map(LocalAddress::broadcast).map(Interval::point).collect();
    broadcast.sort_unstable();
    broadcast.dedup();
    Env { devices: Vec::new(), local: known.then_some(local), broadcast }
}

/// Says so if rules tell broadcast addresses from others, and not all of them are known.
pub(crate) fn finding(session: &Session, given: &[LocalAddress]) -> Option<Diagnostic> {
    let without = given.iter().find(|one| one.address.is_ipv4() && one.length.is_none())?;
    if session.family() != Family::V4 {
        return None;
    }
    let span = asks_for_broadcast(&session.ruleset)?;
    let message = format!("no address is taken for the broadcast address of {without}'s subnet");
    let hint = format!("give the address as `ip address` prints it: `--local {without}/24`, for instance");
    Some(Diagnostic::note(NO_BROADCAST, message, span).with_hint(hint))
}

/// The first match that holds for unicast addresses and not for broadcast ones, or the other way round.
fn asks_for_broadcast(ruleset: &Ruleset) -> Option<Span> {
    ruleset.rules.values().flat_map(|rule| &rule.clauses).find_map(|clause| {
        let tells = clause.kind.tests().iter().any(|test| match test.field {
            Field::Derived(id) => {
                matches!(ruleset.derived[id], DerivedData::AddressType { .. })
                    && test.holds(UNICAST) != test.holds(BROADCAST)
            }
            _ => false,
        });
        tells.then_some(clause.span)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_tells_the_broadcast_address() {
        let given: Vec<LocalAddress> =
            ["10.0.0.2/24", "192.0.2.1", "198.51.100.2/31", "2001:db8::1/64", "10.0.0.3/24"]
                .map(|text| text.parse().expect("an address"))
                .into();
        assert_eq!(given[0].to_string(), "10.0.0.2/24");
        assert_eq!(given[1].to_string(), "192.0.2.1");
        let four = env(&given, Family::V4);
        assert_eq!(four.broadcast, [Interval::point(0x0a00_00ff)]);
        assert_eq!(four.local.map(|local| local.len()), Some(5));
        let six = env(&given, Family::V6);
        assert!(six.broadcast.is_empty());
        assert_eq!(six.local.map(|local| local.len()), Some(2));
        for wrong in ["10.0.0.2/33", "10.0.0.2/", "10.0.0/8", "::1/129", "/8", "10.0.0.2/-1"] {
            assert!(LocalAddress::from_str(wrong).is_err(), "{wrong}");
        }
    }
}
