//! The names of DSCP classes, shared by `-m dscp` and `-j DSCP`.
//!
//! Values are six bits, as in RFC 2474 (CSn), RFC 2597 (AFxy) and RFC 3246 (EF).

use crate::value::abbreviates;

/// Class names and their code points (0-63).
pub const CLASSES: &[(&str, u8)] = &[
    ("CS0", 0x00),
    ("CS1", 0x08),
    ("CS2", 0x10),
    ("CS3", 0x18),
    ("CS4", 0x20),
    ("CS5", 0x28),
    ("CS6", 0x30),
    ("CS7", 0x38),
    ("BE", 0x00),
    ("AF11", 0x0a),
    ("AF12", 0x0c),
    ("AF13", 0x0e),
    ("AF21", 0x12),
    ("AF22", 0x14),
    ("AF23", 0x16),
    ("AF31", 0x1a),
    ("AF32", 0x1c),
    ("AF33", 0x1e),
    ("AF41", 0x22),
    ("AF42", 0x24),
    ("AF43", 0x26),
    ("EF", 0x2e),
];

/// The code point of a class, in any case. What follows the class's name is not looked at.
pub fn class(name: &str) -> Option<u8> {
    CLASSES.iter().find(|(class, _)| abbreviates(class, name)).map(|&(_, value)| value)
}
