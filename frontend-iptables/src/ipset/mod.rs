//! ipset save files: sets read into typed elements, and lowered to the IR's sets.
//!
//! A file holds `create NAME TYPE [option]...` and `add NAME ELEMENT [option]...` lines (ipset(8)). Elements are read by
//! the set's type, dimension by dimension, so a malformed one is found where it stands.

mod element;

use std::collections::HashMap;

use polc_ir::diag::Diagnostic;
use polc_ir::entities::Set;
use polc_ir::hook::Family;
use polc_ir::limits;
use polc_ir::ruleset::Ruleset;
use polc_ir::set::{DimensionKind, DimensionValue, Element, SetContents, SetData};
use polc_ir::source::{File, SourceMap, Span};

use crate::codes;
use crate::lexer::{self, Word};

/// The sets of one or more files, in the order of their creation.
#[derive(Clone, Debug, Default)]
pub struct Sets {
    sets: Vec<SetAst>,
}

/// A set as written.
#[derive(Clone, Debug)]
pub struct SetAst {
    /// Its name.
    pub name: String,
    /// Its type (`hash:net,port`).
    pub kind: String,
    /// The family of its addresses; `None` where it has none.
    pub family: Option<Family>,
    /// Where it is created.
    pub span: Span,
    /// The type's dimensions. Empty for lists.
    pub dimensions: Vec<DimensionKind>,
    /// Its elements.
    pub elements: Vec<ElementAst>,
    /// The members of a list, by name.
    pub members: Vec<(String, Span)>,
    /// `netmask` of the set: addresses are cut to this length.
    pub netmask: Option<u8>,
    /// `markmask` of the set.
    pub markmask: u32,
}

/// An element as written.
#[derive(Clone, Debug)]
pub struct ElementAst {
    /// What it covers, a value for each dimension.
    pub values: Vec<DimensionValue>,
    /// It takes what it covers out of the set.
    pub nomatch: bool,
}

/// Types and their dimensions; the second says which of them are networks.
const TYPES: &[(&str, &[DimensionKind])] = {
    use DimensionKind::{Address, Device, Mac, Mark, Port};
    &[
        ("bitmap:ip", &[Address]),
        ("bitmap:ip,mac", &[Address, Mac]),
        ("bitmap:port", &[Port]),
        ("hash:ip", &[Address]),
        ("hash:mac", &[Mac]),
        ("hash:ip,mac", &[Address, Mac]),
        ("hash:net", &[Address]),
        ("hash:net,net", &[Address, Address]),
        ("hash:ip,port", &[Address, Port]),
        ("hash:net,port", &[Address, Port]),
        ("hash:ip,port,ip", &[Address, Port, Address]),
        ("hash:ip,port,net", &[Address, Port, Address]),
        ("hash:net,port,net", &[Address, Port, Address]),
        ("hash:ip,mark", &[Address, Mark]),
        ("hash:net,iface", &[Address, Device]),
        ("list:set", &[]),
    ]
};

/// Options of `create` and `add` that take a value, and those that don't.
const CREATE_VALUES: &[&str] = &[
    "family",
    "hashsize",
    "maxelem",
    "bucketsize",
    "initval",
    "netmask",
    "bitmask",
    "markmask",
    "range",
    "size",
    "timeout",
    "from",
    "to",
];
const CREATE_FLAGS: &[&str] = &["counters", "comment", "skbinfo", "forceadd", "-exist"];
const ADD_VALUES: &[&str] =
    &["timeout", "packets", "bytes", "comment", "skbmark", "skbprio", "skbqueue", "before", "after"];
const ADD_FLAGS: &[&str] = &["nomatch", "wildcard", "-exist"];

/// Reads a file's sets. What is not accepted has an error among the diagnostics.
pub fn parse(sources: &SourceMap, file: File) -> (Sets, Vec<Diagnostic>) {
    let mut parser =
        Parser { file, sets: Vec::new(), names: HashMap::new(), diagnostics: Vec::new(), elements: 0 };
    let mut words = Vec::new();
    for line in lexer::lines(sources.file(file).text()) {
        let text = line.text.trim();
        if text.is_empty() || text.starts_with('#') || text == "COMMIT" {
            continue;
        }
        words.clear();
        let span = line.span(file);
        let result = match lexer::words(line.text, file, line.start, &mut words) {
            Ok(()) => parser.line(&words, span),
            Err(_) => Err(Diagnostic::error(codes::SET_LINE, "the line can't be split into words", span)),
        };
        if let Err(diagnostic) = result
            && parser.diagnostics.len() < limits::DIAGNOSTICS_MAX
        {
            parser.diagnostics.push(diagnostic);
        }
    }
    (Sets { sets: parser.sets }, parser.diagnostics)
}

struct Parser {
    file: File,
    sets: Vec<SetAst>,
    names: HashMap<String, usize>,
    diagnostics: Vec<Diagnostic>,
    elements: usize,
}

impl Parser {
    fn line(&mut self, words: &[Word<'_>], span: Span) -> Result<(), Diagnostic> {
        debug_assert_eq!(span.file, self.file, "lines are of the file");
        match words.first().map(|word| &*word.text) {
            Some("create" | "-N" | "n") => self.create(words, span),
            Some("add" | "-A" | "a") => self.add(words, span),
            _ => Err(Diagnostic::error(codes::SET_LINE, "the line is neither `create` nor `add`", span)
                .with_hint("write what `ipset save` prints")),
        }
    }

    fn create(&mut self, words: &[Word<'_>], span: Span) -> Result<(), Diagnostic> {
        let [_, name, kind, options @ ..] = words else {
            return Err(Diagnostic::error(codes::SET_LINE, "`create` needs a name and a type", span));
        };
        if name.text.len() > 31 {
            return Err(Diagnostic::error(codes::SET_NAME, "a set's name has at most 31 bytes", name.span));
        }
        let Some((_, dimensions)) = TYPES.iter().find(|(known, _)| *known == kind.text) else {
            let known: Vec<&str> = TYPES.iter().map(|(known, _)| *known).collect();
            return Err(Diagnostic::error(
                codes::SET_TYPE,
                format!("`{}` is no set type", kind.text),
                kind.span,
            )
            .with_hint(format!("known: {}", known.join(", "))));
        };
        if let Some(&first) = self.names.get(&*name.text) {
            let message = format!("set `{}` is created twice", name.text);
            return Err(Diagnostic::error(codes::SET_NAME, message, name.span)
                .with_label(self.sets[first].span, "first created here"));
        }
        let addresses = dimensions.contains(&DimensionKind::Address);
        let mut set = SetAst {
            name: name.text.to_string(),
            kind: kind.text.to_string(),
            family: addresses.then_some(Family::V4),
            span,
            dimensions: dimensions.to_vec(),
            elements: Vec::new(),
            members: Vec::new(),
            netmask: None,
            markmask: u32::MAX,
        };
        for (option, value) in pairs(options, CREATE_VALUES, CREATE_FLAGS)? {
            let Some(value) = value else { continue };
            let bad = || {
                let message = format!("`{}` is not what `{}` takes", value.text, option.text);
                Diagnostic::error(codes::SET_VALUE, message, value.span)
            };
            match &*option.text {
                "family" if addresses => {
                    set.family = Some(match &*value.text {
                        "inet" | "ipv4" | "-4" => Family::V4,
                        "inet6" | "ipv6" | "-6" => Family::V6,
                        _ => return Err(bad().with_hint("write `inet` or `inet6`")),
                    });
                }
                "netmask" => set.netmask = Some(value.text.parse().map_err(|_| bad())?),
                "markmask" => {
                    set.markmask =
                        crate::value::number(&value.text, 0, u32::MAX.into()).ok_or_else(bad)? as u32;
                }
                "hashsize" | "maxelem" | "bucketsize" | "timeout" | "size" => {
                    crate::value::number(&value.text, 0, u64::from(u32::MAX)).ok_or_else(bad)?;
                }
                _ => {}
            }
        }
        self.names.insert(set.name.clone(), self.sets.len());
        self.sets.push(set);
        Ok(())
    }

    fn add(&mut self, words: &[Word<'_>], span: Span) -> Result<(), Diagnostic> {
        let [_, name, element, options @ ..] = words else {
            return Err(Diagnostic::error(codes::SET_LINE, "`add` needs a set and an element", span));
        };
        let Some(&index) = self.names.get(&*name.text) else {
            let message = format!("set `{}` is not created before", name.text);
            return Err(Diagnostic::error(codes::UNKNOWN_SET, message, name.span)
                .with_hint(format!("create it: `create {} TYPE`", name.text)));
        };
        self.elements += 1;
        if self.elements > limits::SET_ELEMENTS_MAX {
            let message = format!("more than {} elements", limits::SET_ELEMENTS_MAX);
            return Err(Diagnostic::error(codes::SET_LIMIT, message, span));
        }
        let options = pairs(options, ADD_VALUES, ADD_FLAGS)?;
        let has = |name: &str| options.iter().any(|(option, _)| option.text == name);
        let (nomatch, wildcard) = (has("nomatch"), has("wildcard"));
        let set = &mut self.sets[index];
        if set.kind == "list:set" {
            set.members.push((element.text.to_string(), element.span));
            return Ok(());
        }
        let values = element::parse(set, &element.text, wildcard)
            .map_err(|message| Diagnostic::error(codes::SET_ELEMENT, message, element.span))?;
        set.elements.extend(values.into_iter().map(|values| ElementAst { values, nomatch }));
        Ok(())
    }
}

/// An option and its value, if it takes one.
type Pair<'w, 'a> = (&'w Word<'a>, Option<&'w Word<'a>>);

/// Options and their values.
fn pairs<'w, 'a>(
    words: &'w [Word<'a>],
    values: &[&str],
    flags: &[&str],
) -> Result<Vec<Pair<'w, 'a>>, Diagnostic> {
    let mut pairs = Vec::new();
    let mut words = words.iter();
    while let Some(option) = words.next() {
        if flags.contains(&&*option.text) && !(option.text == "comment" && values.contains(&"comment")) {
            pairs.push((option, None));
        } else if values.contains(&&*option.text) {
            let Some(value) = words.next() else {
                let message = format!("`{}` needs a value", option.text);
                return Err(Diagnostic::error(codes::SET_OPTION, message, option.span));
            };
            pairs.push((option, Some(value)));
        } else {
            let message = format!("`{}` is no option here", option.text);
            return Err(Diagnostic::error(codes::SET_OPTION, message, option.span));
        }
    }
    Ok(pairs)
}

/// Adds the sets to a rule set: those without addresses, and those of its family.
///
/// Elements are put in the kernel's order of look-up: longer prefixes first, an exception before what it is an
/// exception from (net/netfilter/ipset/ip_set_hash_gen.h, `mtype_test_cidrs`).
pub fn lower(sets: &Sets, family: Family, ruleset: &mut Ruleset) {
    let width = |value: &DimensionValue| match value {
        DimensionValue::Address(range) => range.hi() - range.lo(),
        _ => 0,
    };
    let mut names: HashMap<&str, Set> = HashMap::new();
    let plain = sets.sets.iter().filter(|set| set.kind != "list:set");
    for set in plain.filter(|set| set.family.is_none_or(|own| own == family)) {
        let mut elements: Vec<Element> = set
            .elements
            .iter()
            .map(|element| Element { values: element.values.clone(), nomatch: element.nomatch })
            .collect();
        elements.sort_by_key(|element| {
            let widths: Vec<u128> = element.values.iter().map(width).collect();
            (widths, !element.nomatch)
        });
        let id = ruleset.sets.push(SetData {
            name: set.name.clone(),
            family: set.family,
            dimensions: set.dimensions.clone(),
            contents: SetContents::Elements(elements),
            span: set.span,
        });
        names.insert(&set.name, id);
    }
    for set in sets.sets.iter().filter(|set| set.kind == "list:set") {
        // Members of the other family hold nothing of this one.
        let members = set.members.iter().filter_map(|(name, _)| names.get(name.as_str()).copied()).collect();
        ruleset.sets.push(SetData {
            name: set.name.clone(),
            family: None,
            dimensions: Vec::new(),
            contents: SetContents::Sets(members),
            span: set.span,
        });
    }
}

impl Sets {
    /// The sets, in the order of their creation.
    pub fn iter(&self) -> impl Iterator<Item = &SetAst> {
        self.sets.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Sets, Vec<Diagnostic>) {
        let mut sources = SourceMap::new();
        let file = sources.add("sets", text);
        parse(&sources, file)
    }

    #[test]
    fn elements_are_read_by_type() {
        let (sets, diagnostics) = read(
            "create a hash:net family inet hashsize 1024 maxelem 65536 comment\n\
             add a 10.0.0.0/8 comment \"a b\"\nadd a 10.1.0.0/16 nomatch\n\
             create b hash:ip,port family inet6 timeout 30\nadd b 2001:db8::1,udp:53 timeout 10\n\
             create c hash:net,iface\nadd c 192.0.2.0/24,eth0\n\
             create d bitmap:port range 0-1024\nadd d 80-90\n\
             create e list:set size 8\nadd e a\n",
        );
        assert_eq!(diagnostics, []);
        let mut ruleset = Ruleset::new(Family::V4, polc_ir::hook::Semantics::Legacy);
        lower(&sets, Family::V4, &mut ruleset);
        let names: Vec<&str> = ruleset.sets.values().map(|set| set.name.as_str()).collect();
        assert_eq!(names, ["a", "c", "d", "e"]);
        let SetContents::Elements(elements) = &ruleset.sets[Set::from_u32(0)].contents else {
            panic!("a has elements")
        };
        // The longer prefix, which takes addresses out, is looked up first.
        assert_eq!(elements.iter().map(|element| element.nomatch).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn what_is_wrong_is_pointed_at() {
        let (_, diagnostics) =
            read("create a hash:net\nadd a 10.0.0.0/33\nadd b 1.1.1.1\ncreate c hash:foo\nflush\n");
        let codes: Vec<u16> = diagnostics.iter().map(|diagnostic| diagnostic.code.0).collect();
        assert_eq!(codes, [206, 203, 201, 200]);
        assert_eq!(diagnostics[0].span.map(|span| (span.start, span.end)), Some((24, 35)));
    }
}
