//! `-m set`: membership in an ipset.

use std::fmt;

use crate::ast::{Given, Text};
use crate::codes;
use crate::ext::{Extension, Families, Fault, GivenOption, OptionSpec, Options, Printer, Spec};

/// The options of `-m set`.
#[derive(Clone, Debug, PartialEq)]
pub struct Set {
    /// `--match-set`.
    pub set: Given<SetReference>,
    /// `--return-nomatch`: elements marked `nomatch` match, the others don't.
    pub return_nomatch: bool,
    /// `! --update-counters`: a match leaves the element's counters alone.
    pub keep_counters: bool,
    /// `! --update-subcounters`: a match in a list of sets leaves the member sets' counters alone.
    pub keep_subcounters: bool,
    /// `--packets-eq` and its like: a condition on the element's packet counter.
    pub packets: Option<Given<CounterTest>>,
    /// `--bytes-eq` and its like: a condition on the element's byte counter.
    pub bytes: Option<Given<CounterTest>>,
}

/// A set and how the packet's parts make an element of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetReference {
    /// The set's name.
    pub name: Text,
    /// For each dimension of the set, whether the packet's source or destination side is used.
    pub directions: Directions,
}

/// Source or destination, for each dimension of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directions(pub Box<[SetDirection]>);

/// Which side of a packet goes into one dimension of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SetDirection {
    /// The source address, port or input device.
    Source,
    /// The destination address, port or output device.
    Destination,
}

/// A comparison of an element's counter. With negation, `Equal` means unequal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CounterTest {
    /// How it is compared.
    pub relation: Relation,
    /// With what.
    pub value: u64,
}

/// How a counter is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Relation {
    /// `-eq`.
    Equal,
    /// `-lt`.
    Less,
    /// `-gt`.
    Greater,
}

/// Longest set name, in bytes (include/uapi/linux/netfilter/ipset/ip_set.h, `IPSET_MAXNAMELEN` less the NUL).
pub const SET_NAME_BYTES_MAX: usize = 31;

/// Most directions (`IPSET_DIM_MAX`).
const DIRECTIONS_MAX: usize = 6;

const MATCH_SET: u8 = 0;
const RETURN_NOMATCH: u8 = 1;
const UPDATE_COUNTERS: u8 = 2;
const UPDATE_SUBCOUNTERS: u8 = 3;
const PACKETS_EQ: u8 = 4;
const PACKETS_LT: u8 = 5;
const PACKETS_GT: u8 = 6;
const BYTES_EQ: u8 = 7;
const BYTES_LT: u8 = 8;
const BYTES_GT: u8 = 9;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::pair(MATCH_SET, "match-set", "name src|dst[,...]").invertible().mandatory(),
    OptionSpec::pair(MATCH_SET, "set", "name src|dst[,...]").invertible().mandatory(),
    OptionSpec::switch(RETURN_NOMATCH, "return-nomatch").invertible().repeatable(),
    OptionSpec::switch(UPDATE_COUNTERS, "update-counters").invertible().repeatable(),
    OptionSpec::value(PACKETS_EQ, "packets-eq", "value").invertible(),
    OptionSpec::value(PACKETS_LT, "packets-lt", "value"),
    OptionSpec::value(PACKETS_GT, "packets-gt", "value"),
    OptionSpec::value(BYTES_EQ, "bytes-eq", "value").invertible(),
    OptionSpec::value(BYTES_LT, "bytes-lt", "value"),
    OptionSpec::value(BYTES_GT, "bytes-gt", "value"),
    OptionSpec::switch(UPDATE_SUBCOUNTERS, "update-subcounters").invertible().repeatable(),
];

impl Extension for Set {
    const SPEC: Spec = Spec::new(
        "set",
        Families::Both,
        OPTIONS,
        "Matches packets whose addresses, ports or devices make an element of the named ipset; `src` and `dst` say, \
         for each dimension of the set, which side of the packet to take. `--return-nomatch` matches elements marked \
         `nomatch` instead; the counter options test the element's counters or keep a match from updating them.",
    );

    fn parse(options: &Options<'_>) -> Result<Set, Fault> {
        let never = |id| options.iter().any(|option| option.spec.id == id && option.negated);
        Ok(Set {
            set: options.required(MATCH_SET, |option| parse_set(option, options))?,
            return_nomatch: options.has(RETURN_NOMATCH),
            keep_counters: never(UPDATE_COUNTERS),
            keep_subcounters: never(UPDATE_SUBCOUNTERS),
            packets: parse_counter(options, "packets", [PACKETS_EQ, PACKETS_LT, PACKETS_GT])?,
            bytes: parse_counter(options, "bytes", [BYTES_EQ, BYTES_LT, BYTES_GT])?,
        })
    }

    fn print(&self, out: &mut Printer<'_>) {
        out.given("match-set", &self.set);
        out.switch_if("return-nomatch", self.return_nomatch);
        for (name, keep) in
            [("update-counters", self.keep_counters), ("update-subcounters", self.keep_subcounters)]
        {
            out.negation(keep);
            out.switch_if(name, keep);
        }
        for (name, test) in [("packets", &self.packets), ("bytes", &self.bytes)] {
            if let Some(test) = test {
                let relation = match test.value.relation {
                    Relation::Equal => "eq",
                    Relation::Less => "lt",
                    Relation::Greater => "gt",
                };
                out.negation(test.negated);
                out.option(&format!("{name}-{relation}"), test.value.value);
            }
        }
    }
}

/// Reads a set's name and directions.
pub(crate) fn parse_set(option: &GivenOption<'_>, options: &Options<'_>) -> Result<SetReference, Fault> {
    let name = option.argument;
    if name.text.len() > SET_NAME_BYTES_MAX {
        return Err(name.bad(format!("set name `{}` is longer than {SET_NAME_BYTES_MAX} bytes", name.text)));
    }
    if let Some(sets) = &options.existing.sets
        && !sets.contains(name.text)
    {
        return Err(Fault::new(codes::UNKNOWN_NAME, format!("there is no set `{}`", name.text))
            .at(name.span)
            .hint("give the file that creates it with --ipset"));
    }
    let directions: Result<Vec<SetDirection>, Fault> = option
        .second
        .text
        .split(',')
        .map(|item| {
            // Only the first three letters count.
            if item.starts_with("src") {
                Ok(SetDirection::Source)
            } else if item.starts_with("dst") {
                Ok(SetDirection::Destination)
            } else {
                Err(option.second.bad_part(item, format!("`{item}` is neither `src` nor `dst`")))
            }
        })
        .collect();
    let directions = directions?;
    if directions.len() > DIRECTIONS_MAX {
        return Err(option.second.bad(format!("more than {DIRECTIONS_MAX} directions")));
    }
    Ok(SetReference { name: options.text(name.text), directions: Directions(directions.into()) })
}

fn parse_counter(
    options: &Options<'_>,
    what: &str,
    ids: [u8; 3],
) -> Result<Option<Given<CounterTest>>, Fault> {
    let mut tests = options.iter().filter(|option| ids.contains(&option.spec.id));
    let Some(option) = tests.next() else { return Ok(None) };
    if let Some(second) = tests.next() {
        let message = format!("a second condition on {what}");
        return Err(Fault::new(codes::CONFLICTING_OPTIONS, message).at(second.span));
    }
    let relation = match ids.iter().position(|&id| id == option.spec.id) {
        Some(0) => Relation::Equal,
        Some(1) => Relation::Less,
        _ => Relation::Greater,
    };
    let value = option.argument.number(0, u64::MAX)?;
    Ok(Some(option.given(CounterTest { relation, value })))
}

/// Prints `name src,dst`.
impl fmt::Display for SetReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.directions)
    }
}

/// Prints `src,dst`.
impl fmt::Display for Directions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, direction) in self.0.iter().enumerate() {
            f.write_str(if position > 0 { "," } else { "" })?;
            f.write_str(if *direction == SetDirection::Source { "src" } else { "dst" })?;
        }
        Ok(())
    }
}
