//! Which values iptables-save leaves out: those that ask for nothing, and defaults.
//!
//! Some it leaves out even where they are negated and ask for the impossible; what is saved then means something else.

use super::Value;
use crate::value::PortRange;

/// Every port.
pub(crate) fn every_port(value: &Value, _: bool) -> bool {
    *value == Value::Ports(PortRange::ALL)
}

/// Every number of 32 bits.
pub(crate) fn every_u32(value: &Value, _: bool) -> bool {
    *value == Value::Range(0, u32::MAX.into())
}

/// Zero, unless negated.
pub(crate) fn zero(value: &Value, negated: bool) -> bool {
    number::<0>(value, negated)
}

/// This number, unless negated.
pub(crate) fn number<const NUMBER: u64>(value: &Value, negated: bool) -> bool {
    !negated && *value == Value::Number(NUMBER)
}
