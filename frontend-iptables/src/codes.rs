//! The diagnostic codes of this crate: E01xx for iptables-save text, E02xx for ipset text.
//!
//! A code names a kind of finding, not a message, so scripts and documentation can rely on it while wording improves.
//! Codes are never reused.

use polc_ir::diag::{Code, Diagnostic};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $hint:literal;)*) => {
        $($(#[$doc])* pub const $name: Code = Code($number);)*

        /// Every code of this crate with its name, in numeric order.
        pub const ALL: &[(Code, &str)] = &[$(($name, stringify!($name)),)*];

        /// What to do about a finding whose place has nothing more exact to say.
        fn hint(code: Code) -> Option<&'static str> {
            match code {
                $($name => Some($hint),)*
                _ => None,
            }
        }
    };
}

codes! {
    /// The line is no table, chain, rule, comment or COMMIT line.
    MALFORMED_LINE = 100, "a line is `*TABLE`, `:CHAIN POLICY [0:0]`, a rule such as `-A CHAIN ... -j TARGET`, `COMMIT`, or a comment";
    /// `*NAME` names no table of netfilter.
    UNKNOWN_TABLE = 101, "the tables are raw, mangle, nat, filter and security";
    /// A line that belongs in a table stands before `*TABLE` or after `COMMIT`.
    OUTSIDE_TABLE = 102, "put the line between `*TABLE` and its `COMMIT`";
    /// The file ends inside a table.
    MISSING_COMMIT = 103, "end the table with a line `COMMIT`";
    /// A chain name is missing, too long, starts with `-` or `!`, or clashes with a target.
    CHAIN_NAME = 104, "a chain's name has at most 28 bytes, no blanks, does not start with `-` or `!`, and is no target's";
    /// A user chain is declared twice in one table.
    DUPLICATE_CHAIN = 105, "remove one of the two declarations";
    /// A policy is missing, unknown, or given to a user chain.
    POLICY = 106, "a policy is ACCEPT or DROP for a built-in chain, and `-` for any other";
    /// Packet and byte counters are malformed.
    COUNTERS = 107, "counters are written `[packets:bytes]`, in decimal";
    /// A rule is for a chain that its table does not have.
    UNKNOWN_CHAIN = 108, "declare the chain before its rules: `:CHAIN - [0:0]`";
    /// `-j` or `-g` names neither a chain of the table nor a known target.
    UNKNOWN_TARGET = 109, "declare the chain before this line, or check the target's spelling";
    /// `-m` names no known match.
    UNKNOWN_MATCH = 110, "polc knows the matches of iptables 1.8; `man iptables-extensions` lists them";
    /// No loaded extension has this option, or its abbreviation is ambiguous.
    UNKNOWN_OPTION = 111, "load the match that has the option first, with `-m`";
    /// An option lacks its argument.
    MISSING_ARGUMENT = 112, "write the option's value after it";
    /// An option's argument is not a value it takes.
    BAD_VALUE = 113, "`man iptables-extensions` says what the option takes";
    /// An option that may be given once is given twice.
    REPEATED_OPTION = 114, "remove one of the two, or write two rules";
    /// `!` stands where nothing can be negated.
    NEGATION = 115, "write `!` before an option that can be negated";
    /// An extension lacks an option it can't do without.
    MISSING_OPTION = 116, "add the option";
    /// Two options exclude each other, or one needs another that is absent.
    CONFLICTING_OPTIONS = 117, "`man iptables-extensions` says which options go together, and with what";
    /// A word that belongs to no option.
    STRAY_WORD = 118, "remove the word, or put quotes around a value that has blanks";
    /// An extension works only with another `-p`.
    WRONG_PROTOCOL = 119, "add the `-p` that the extension belongs to before it";
    /// An extension or option is not allowed in this table, chain or hook.
    WRONG_PLACE = 120, "change the rule, or move it to a table and chain where it is allowed";
    /// Chains jump in a circle.
    CHAIN_LOOP = 121, "remove one of the jumps";
    /// A host, network, service or protocol name is not in the built-in tables.
    UNKNOWN_NAME = 122, "write the number: names are those of Debian's tables";
    /// An option, extension or address belongs to the other address family.
    WRONG_FAMILY = 123, "IPv4 rules belong in iptables-restore's file, IPv6 rules in ip6tables-restore's";
    /// A rule line has no command, two commands, or one that has no place in a restore file.
    COMMAND = 124, "a rule line starts with `-A CHAIN`";
    /// A rule number is malformed or past the end of its chain, or no rule equals the one given.
    RULE_NUMBER = 125, "rules are numbered from 1 in their chain";
    /// A quote is not closed.
    UNCLOSED_QUOTE = 126, "close the quote on the same line";
    /// A line or word is longer than iptables-restore can read, or has too many words.
    TOO_LONG = 127, "iptables-restore can't read it either: shorten it";
    /// The file exceeds a limit of polc.
    LIMIT = 128, "split the file";
    /// A later section for the same table replaces this one.
    REPLACED_TABLE = 129, "make one section of the two";
    /// A line ends in CR LF (tolerant mode).
    CARRIAGE_RETURN = 130, "end lines with LF alone; `polc fmt` does";
    /// Blanks before or after a line's text (tolerant mode).
    STRAY_BLANKS = 131, "remove the blanks; `polc fmt` does";
    /// The last line has no newline (tolerant mode).
    NO_FINAL_NEWLINE = 132, "end the last line with a newline; `polc fmt` does";
    /// `--option ! value`, negation as it was before iptables 1.4.3 (tolerant mode).
    OLD_NEGATION = 133, "write `! --option value`; `polc fmt` does";
    /// The text is accepted, but probably does not do what was meant.
    SUSPICIOUS = 134, "say what is meant more plainly";
    /// A line for the other address family (`-4`, `-6`) is skipped.
    OTHER_FAMILY_LINE = 135, "check the file once for each family, with `--family 4` and `--family 6`";
    /// More findings than are kept.
    TOO_MANY_DIAGNOSTICS = 136, "correct those that are shown and check again";
    /// An extension polc knows by name but has no definition of its options for.
    UNSUPPORTED_EXTENSION = 137, "rules with it stay with the kernel";
    /// The file begins with a byte order mark (tolerant mode).
    BYTE_ORDER_MARK = 138, "save the file as UTF-8 without one; `polc fmt` does";
    /// Chains are nested deeper than nf_tables follows.
    CHAIN_DEPTH = 139, "put some of the chains' rules in the chains that jump to them";
    /// An ipset line is no `create`, `add` or `flush`.
    SET_LINE = 200, "a line is `create NAME TYPE ...`, `add NAME ELEMENT ...` or `flush NAME`";
    /// `create` names an unknown set type.
    SET_TYPE = 201, "`man ipset` lists the set types";
    /// A set name is missing, too long or declared twice.
    SET_NAME = 202, "a set's name has 1 to 31 bytes and is declared once";
    /// `add` names a set that was not created.
    UNKNOWN_SET = 203, "create the set before adding to it";
    /// A set has no such option, or it lacks its argument.
    SET_OPTION = 204, "`man ipset` lists the options of each set type";
    /// An option's argument is not a value it takes.
    SET_VALUE = 205, "`man ipset` says what the option takes";
    /// An element does not fit the set's type.
    SET_ELEMENT = 206, "an element has the parts that the set's type names, in its order, with commas between";
    /// An element of an address family that the set does not hold.
    SET_FAMILY = 207, "create the set with `family inet6` for IPv6 addresses";
    /// An element the set already has.
    SET_DUPLICATE = 208, "remove the line, or give it `-exist`";
    /// The file exceeds a limit of polc or of the set.
    SET_LIMIT = 209, "split the set, or create it with a larger `maxelem`";
    /// Tolerated deviations from what `ipset restore` reads (tolerant mode).
    SET_TOLERATED = 210, "write it as `ipset save` does";
    /// A set whose contents the compiler can't express; its membership is unknown.
    SET_NOT_COMPILED = 211, "rules that look at the set stay with the kernel";
    /// Elements that expire are taken to stay.
    SET_EXPIRES = 212, "delete elements when their time is over, or compile again";
}

/// The finding, with its code's hint if it has none of its own.
pub(crate) fn with_hint(diagnostic: Diagnostic) -> Diagnostic {
    match hint(diagnostic.code) {
        Some(hint) if diagnostic.hint.is_none() => diagnostic.with_hint(hint),
        _ => diagnostic,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn codes_are_unique_and_ordered() {
        assert!(super::ALL.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(super::ALL.iter().all(|(code, _)| (100..300).contains(&code.0)));
    }
}
