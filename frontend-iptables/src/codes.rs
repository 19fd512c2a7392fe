//! The diagnostic codes of this crate: E01xx for iptables-save text, E02xx for ipset text.
//!
//! A code names a kind of finding, not a message, so scripts and documentation can rely on it while wording improves.
//! Codes are never reused.

use polc_ir::diag::Code;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal;)*) => {
        $($(#[$doc])* pub const $name: Code = Code($number);)*

        /// Every code of this crate with its name, in numeric order.
        pub const ALL: &[(Code, &str)] = &[$(($name, stringify!($name)),)*];
    };
}

codes! {
    /// The line is no table, chain, rule, comment or COMMIT line.
    MALFORMED_LINE = 100;
    /// `*NAME` names no table of netfilter.
    UNKNOWN_TABLE = 101;
    /// A line that belongs in a table stands before `*TABLE` or after `COMMIT`.
    OUTSIDE_TABLE = 102;
    /// The file ends inside a table.
    MISSING_COMMIT = 103;
    /// A chain name is missing, too long, starts with `-` or `!`, or clashes with a target.
    CHAIN_NAME = 104;
    /// A user chain is declared twice in one table.
    DUPLICATE_CHAIN = 105;
    /// A policy is missing, unknown, or given to a user chain.
    POLICY = 106;
    /// Packet and byte counters are malformed.
    COUNTERS = 107;
    /// A rule is for a chain that its table does not have.
    UNKNOWN_CHAIN = 108;
    /// `-j` or `-g` names neither a chain of the table nor a known target.
    UNKNOWN_TARGET = 109;
    /// `-m` names no known match.
    UNKNOWN_MATCH = 110;
    /// No loaded extension has this option, or its abbreviation is ambiguous.
    UNKNOWN_OPTION = 111;
    /// An option lacks its argument.
    MISSING_ARGUMENT = 112;
    /// An option's argument is not a value it takes.
    BAD_VALUE = 113;
    /// An option that may be given once is given twice.
    REPEATED_OPTION = 114;
    /// `!` stands where nothing can be negated.
    NEGATION = 115;
    /// An extension lacks an option it can't do without.
    MISSING_OPTION = 116;
    /// Two options exclude each other, or one needs another that is absent.
    CONFLICTING_OPTIONS = 117;
    /// A word that belongs to no option.
    STRAY_WORD = 118;
    /// An extension works only with another `-p`.
    WRONG_PROTOCOL = 119;
    /// An extension or option is not allowed in this table, chain or hook.
    WRONG_PLACE = 120;
    /// Chains jump in a circle.
    CHAIN_LOOP = 121;
    /// A host, network, service or protocol name is not in the built-in tables.
    UNKNOWN_NAME = 122;
    /// An option, extension or address belongs to the other address family.
    WRONG_FAMILY = 123;
    /// A rule line has no command, two commands, or one that has no place in a restore file.
    COMMAND = 124;
    /// A rule number is malformed or past the end of its chain, or no rule equals the one given.
    RULE_NUMBER = 125;
    /// A quote is not closed.
    UNCLOSED_QUOTE = 126;
    /// A line or word is longer than iptables-restore can read, or has too many words.
    TOO_LONG = 127;
    /// The file exceeds a limit of polc.
    LIMIT = 128;
    /// A later section for the same table replaces this one.
    REPLACED_TABLE = 129;
    /// A line ends in CR LF (tolerant mode).
    CARRIAGE_RETURN = 130;
    /// Blanks before or after a line's text (tolerant mode).
    STRAY_BLANKS = 131;
    /// The last line has no newline (tolerant mode).
    NO_FINAL_NEWLINE = 132;
    /// `--option ! value`, negation as it was before iptables 1.4.3 (tolerant mode).
    OLD_NEGATION = 133;
    /// The text is accepted, but probably does not do what was meant.
    SUSPICIOUS = 134;
    /// A line for the other address family (`-4`, `-6`) is skipped.
    OTHER_FAMILY_LINE = 135;
    /// More findings than are kept.
    TOO_MANY_DIAGNOSTICS = 136;
    /// An extension polc knows by name but has no definition of its options for.
    UNSUPPORTED_EXTENSION = 137;
    /// An ipset line is no `create` or `add`.
    SET_LINE = 200;
    /// `create` names an unknown set type.
    SET_TYPE = 201;
    /// A set name is missing, too long or declared twice.
    SET_NAME = 202;
    /// `add` names a set that was not created.
    UNKNOWN_SET = 203;
    /// A set has no such option, or it lacks its argument.
    SET_OPTION = 204;
    /// An option's argument is not a value it takes.
    SET_VALUE = 205;
    /// An element does not fit the set's type.
    SET_ELEMENT = 206;
    /// An element of an address family that the set does not hold.
    SET_FAMILY = 207;
    /// An element the set already has.
    SET_DUPLICATE = 208;
    /// The file exceeds a limit of polc or of the set.
    SET_LIMIT = 209;
    /// Tolerated deviations from what `ipset restore` reads (tolerant mode).
    SET_TOLERATED = 210;
    /// A set whose contents the compiler can't express; its membership is unknown.
    SET_NOT_COMPILED = 211;
    /// Elements that expire are taken to stay.
    SET_EXPIRES = 212;
}

#[cfg(test)]
mod tests {
    #[test]
    fn codes_are_unique_and_ordered() {
        assert!(super::ALL.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(super::ALL.iter().all(|(code, _)| (100..300).contains(&code.0)));
    }
}
