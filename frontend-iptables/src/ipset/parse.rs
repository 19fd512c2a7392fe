//! Reads ipset save files line by line, as `ipset restore` does, but goes on after an error to find the rest.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::Range;

use polc_ir::diag::{Code, Diagnostic};
use polc_ir::hook::Family;
use polc_ir::limits;
use polc_ir::source::{File, SourceMap, Span};

use super::element::{self, AddressForm, Part, PartContext, SET_NAME_BYTES_MAX};
use super::kind::{Dimension, SetKind};
use super::seen::{self, Known, Seen};
use super::{CreateOptions, ElementAst, ElementExtra, Parts, SetAst, Sets, bulk, lower};
use crate::codes;
use crate::lexer;
use crate::value::{self, Masked, prefix_length, strtoul};

/// A word of a line, without its quotes.
pub(super) struct Word<'t> {
    pub(super) text: Cow<'t, str>,
    pub(super) span: Span,
}

/// What is wrong with a line, and where.
type Fault = (Code, String, Span);

/// Reads a save file.
///
/// The sets come in the order of their creation. A line with an error makes no set or element; whether all could be
/// read is told by the absence of errors among the diagnostics.
pub fn parse(sources: &SourceMap, file: File) -> (Sets, Vec<Diagnostic>) {
    let text = sources.file(file).text();
    let mut parser = Parser { lines: text.len() / LINE_BYTES, ..Parser::default() };
    if text.len() > limits::FILE_BYTES_MAX {
        let message = format!("the file is larger than {} MiB", limits::FILE_BYTES_MAX >> 20);
        parser.report(Diagnostic::error(codes::SET_LIMIT, message, Span::new(file, 0, 0)));
        return (Sets::default(), parser.diagnostics);
    }
    let mut at = 0;
    if text.starts_with(lexer::BYTE_ORDER_MARK) {
        at = lexer::BYTE_ORDER_MARK.len_utf8();
        let message = "the file begins with a byte order mark, which `ipset restore` takes for text";
        parser.report(Diagnostic::warning(codes::SET_TOLERATED, message, Span::new(file, 0, at as u32)));
    }
    while let Some(line) = lexer::lines(&text[at..]).next() {
        at = match parser.last {
            Some(set) if text.len() - at >= bulk::TEXT_BYTES_MIN && !is_list(&parser.sets[set]) => {
                parser.run(text, at, file, set)
            }
            _ => {
                let end = at + line.end();
                parser.lines(text, at..end, file);
                end
            }
        };
    }
    let warnings: Vec<Diagnostic> =
        parser.sets.iter().zip(&parser.seen).flat_map(|(set, seen)| warnings(set, seen.with_extra)).collect();
    for warning in warnings {
        parser.report(warning);
    }
    if parser.suppressed > 0 {
        let message = format!("{} more findings are not shown", parser.suppressed);
        parser.diagnostics.push(codes::with_hint(Diagnostic::note(
            codes::TOO_MANY_DIAGNOSTICS,
            message,
            None,
        )));
    }
    (Sets { sets: parser.sets }, parser.diagnostics)
}

/// What the compiler does not do with a set. `with_extra`: elements may have options.
fn warnings(set: &SetAst, with_extra: bool) -> Vec<Diagnostic> {
    let mut warnings = Vec::new();
    if let Err((why, span)) = lower::can_say(set) {
        let message = format!("what is in set `{}` can't be compiled: {why}", set.name);
        warnings.push(Diagnostic::warning(codes::SET_NOT_COMPILED, message, span));
    }
    let expires = |element: &&ElementAst| {
        let own = element.extra.as_ref().and_then(|extra| extra.timeout);
        own.or(set.options.timeout).is_some_and(|timeout| timeout > 0)
    };
    let may_expire = with_extra || set.options.timeout.is_some();
    if let Some(element) = set.elements.iter().filter(|_| may_expire).find(expires) {
        let message = format!("elements of set `{}` have timeouts, which programs do not keep", set.name);
        warnings.push(
            Diagnostic::warning(codes::SET_EXPIRES, message, element.span)
                .with_note("accelerate mode leaves rules that ask for it to the kernel; in replace mode they stay until they are deleted"),
        );
    }
    warnings
}

/// Lines that add to one set, one behind another.
#[derive(Clone, Copy)]
struct Message {
    /// The set.
    set: usize,
    /// Whether what they add may exist.
    may_exist: bool,
}

#[derive(Default)]
struct Parser {
    sets: Vec<SetAst>,
    by_name: HashMap<String, usize>,
    /// How many lines there may be, for making room.
    lines: usize,
    /// The set of the last `add`.
    last: Option<usize>,
    /// What each set holds already.
    seen: Vec<Seen>,
    diagnostics: Vec<Diagnostic>,
    suppressed: usize,
    elements: usize,
    /// A line has said `-exist`: from there on `ipset` takes what exists already.
    may_exist: bool,
    /// What `ipset` sends in one message: lines that add to one set, which all may exist or not as the first may.
    message: Option<Message>,
    /// That something was given again has been told.
    tolerated: bool,
}

impl Parser {
    fn report(&mut self, diagnostic: Diagnostic) {
        if self.diagnostics.len() < limits::DIAGNOSTICS_MAX {
            self.diagnostics.push(codes::with_hint(diagnostic));
        } else {
            self.suppressed += 1;
        }
    }

    fn report_fault(&mut self, result: Result<(), Fault>) {
        if let Err((code, message, span)) = result {
            self.report(Diagnostic::error(code, message, span));
        }
    }

    /// Reads a long text's lines from `at` on, those that add elements to one set on other threads; gives where it
    /// ended, at the beginning of a line.
    fn run(&mut self, text: &str, at: usize, file: File, index: usize) -> usize {
        self.send_to(index);
        let set = &mut self.sets[index];
        let mut elements = std::mem::take(&mut set.elements);
        let (before, mut hashes) = (elements.len(), Vec::with_capacity(elements.capacity()));
        let job = bulk::Job {
            text,
            file,
            set: &set.name,
            options: &set.options,
            cx: PartContext::of(set),
            hasher: &self.seen[index].hasher,
        };
        let rest = std::thread::scope(|scope| {
            let mut rest = at..at;
            for stretch in bulk::read(scope, &job, at) {
                elements.extend(stretch.elements);
                hashes.extend(stretch.hashes);
                rest = stretch.rest;
                if !rest.is_empty() {
                    break;
                }
            }
            rest
        });
        set.elements = elements;
        if self.takes_all(index, before, hashes) {
            self.elements += self.sets[index].elements.len() - before;
        } else {
            self.sets[index].elements.truncate(before);
            self.lines(text, at..rest.start, file);
        }
        let end = rest.end;
        self.lines(text, rest, file);
        end
    }

    /// Whether nothing is against a set's elements from `before` on, which have these hashes.
    fn takes_all(&mut self, index: usize, before: usize, hashes: Vec<u64>) -> bool {
        let set = &self.sets[index];
        !set.is_exceeded(self.seen[index].held + hashes.len() as u128)
            && self.elements + hashes.len() <= limits::SET_ELEMENTS_MAX
            && self.seen[index].insert_all(&set.elements, before, hashes)
    }

    /// Reads lines one by one.
    fn lines(&mut self, text: &str, lines: Range<usize>, file: File) {
        let start = lines.start as u32;
        for line in lexer::lines(&text[lines]) {
            let read = self.line(line.text, start + line.start, file);
            self.report_fault(read);
        }
    }

    fn line(&mut self, text: &str, start: u32, file: File) -> Result<(), Fault> {
        let span = |from: usize, to: usize| Span::new(file, start + from as u32, start + to as u32);
        if let Some([name, element]) = plain_add(text) {
            let element_at = 5 + name.len();
            let name = Word { text: Cow::Borrowed(name), span: span(4, element_at - 1) };
            let element = Word { text: Cow::Borrowed(element), span: span(element_at, text.len()) };
            return self.add(&[&name, &element], span(0, text.len()));
        }
        let trimmed = text.trim_start_matches([' ', '\t', '\r', '\x0b', '\x0c']);
        if trimmed.is_empty() || trimmed.starts_with('#') || matches!(trimmed.trim_end(), "COMMIT" | "commit")
        {
            return Ok(());
        }
        let indent = text.len() - trimmed.len();
        if text.len() > limits::LINE_BYTES_MAX {
            let message = format!("the line is longer than {} bytes", limits::LINE_BYTES_MAX);
            return Err((codes::SET_LIMIT, message, span(indent, text.len())));
        }
        if let Some(nul) = text.find('\0') {
            return Err((codes::SET_LINE, "a NUL byte".into(), span(nul, nul + 1)));
        }
        let words = words(text, &span)?;
        let line = span(indent, trimmed.trim_end().len() + indent);
        let mut words: Vec<&Word<'_>> = words.iter().collect();
        let all = words.len();
        words.retain(|word| !matches!(&*word.text, "-exist" | "-!"));
        self.may_exist |= words.len() < all;
        let Some((command, rest)) = words.split_first() else { return Ok(()) };
        let command_name = command.text.trim_start_matches('-');
        let is_add = matches!(command_name, "add" | "A" | "a");
        self.message = self.message.filter(|_| is_add);
        match command_name {
            _ if is_add => self.add(rest, line),
            "create" | "N" | "n" | "new" => self.create(rest, line),
            "flush" | "F" => self.flush(rest, line),
            other => {
                let message =
                    format!("`{other}` is not `create`, `add` or `flush`, the commands that are read");
                Err((codes::SET_LINE, message, command.span))
            }
        }
    }

    /// Begins a message if the last one is for another set.
    fn send_to(&mut self, set: usize) {
        if self.message.is_none_or(|message| message.set != set) {
            self.message = Some(Message { set, may_exist: self.may_exist });
        }
    }

    /// Tells, once, that `ipset restore` takes what exists already only if `-exist` was said before the first of the lines
    /// that it sends together (lib/session.c of ipset 7.17, `ipset_cmd`).
    fn given_again(&mut self, span: Span) {
        let is_taken = self.message.is_some_and(|message| message.may_exist);
        if !is_taken && !std::mem::replace(&mut self.tolerated, true) {
            let message =
                "what exists already is given again, which `ipset restore` refuses in spite of `-exist` here";
            let hint = "say `-exist` where the set's elements begin, or call `ipset restore -exist`";
            self.report(Diagnostic::warning(codes::SET_TOLERATED, message, span).with_hint(hint));
        }
    }

    /// Takes away what a set holds, or what all do.
    fn flush(&mut self, words: &[&Word<'_>], line: Span) -> Result<(), Fault> {
        let sets = match words {
            [] => 0..self.sets.len(),
            [name] => {
                let index = self.find(name)?;
                index..index + 1
            }
            _ => return Err((codes::SET_LINE, "`flush` takes one set".into(), line)),
        };
        for index in sets {
            self.elements -= self.sets[index].elements.len();
            self.sets[index].elements.clear();
            self.seen[index].clear();
        }
        Ok(())
    }

    fn find(&self, name: &Word<'_>) -> Result<usize, Fault> {
        self.by_name
            .get(&*name.text)
            .copied()
            .ok_or_else(|| (codes::UNKNOWN_SET, format!("set `{}` is not created", name.text), name.span))
    }

    fn create(&mut self, words: &[&Word<'_>], line: Span) -> Result<(), Fault> {
        let [name, kind, rest @ ..] = words else {
            return Err((codes::SET_LINE, "`create` needs a name and a type".into(), line));
        };
        if name.text.len() > SET_NAME_BYTES_MAX {
            let message = format!("set name `{}` is longer than {SET_NAME_BYTES_MAX} bytes", name.text);
            return Err((codes::SET_NAME, message, name.span));
        }
        let existing = self.by_name.get(&*name.text).copied();
        if existing.is_some() && !self.may_exist {
            return Err((codes::SET_NAME, format!("set `{}` exists already", name.text), name.span));
        }
        let kind_word = kind;
        let kind = SetKind::find(&kind.text)
            .ok_or_else(|| (codes::SET_TYPE, format!("there is no set type `{}`", kind.text), kind.span))?;
        let family = family(kind, rest)?;
        let mut options = create_options(kind, family, rest)?;
        if let (true, Some(range), Some(netmask)) = (kind.is_bitmap(), options.addresses, options.netmask) {
            let whole = blocks_of(range, netmask).ok_or_else(|| {
                let message = "under a netmask, the range is to begin where a prefix does that holds it and more than one block";
                (codes::SET_OPTION, message.into(), line)
            })?;
            options.addresses = Some(whole);
        }
        if kind.is_bitmap() && options.addresses.is_none() && options.ports.is_none() {
            return Err((codes::SET_OPTION, format!("a {} needs a `range`", kind.name), kind_word.span));
        }
        let set = SetAst {
            name: name.text.to_string(),
            span: line,
            kind,
            family: kind.has_addresses().then_some(family),
            options,
            elements: Vec::new(),
        };
        if kind.is_bitmap() && set.elements_max() > BITMAP_ELEMENTS_MAX {
            let message = format!("a {} has room for {BITMAP_ELEMENTS_MAX} elements", kind.name);
            return Err((codes::SET_OPTION, message, line));
        }
        if let Some(existing) = existing {
            let known = &self.sets[existing];
            if known.kind == kind && known.family == set.family && known.options.holds_as(&set.options) {
                return Ok(());
            }
            let message = format!("set `{}` exists with another type or other options", name.text);
            return Err((codes::SET_NAME, message, line));
        }
        self.by_name.insert(name.text.to_string(), self.sets.len());
        // Those who make a large set say so, and a file can't have more elements than lines.
        let room = set.options.elements_max.map_or(0, |max| self.lines.min(max as usize));
        self.lines -= room;
        self.seen.push(Seen::new(kind));
        self.sets.push(SetAst { elements: Vec::with_capacity(room), ..set });
        Ok(())
    }

    fn add(&mut self, words: &[&Word<'_>], line: Span) -> Result<(), Fault> {
        let [name, element, rest @ ..] = words else {
            return Err((codes::SET_LINE, "`add` needs a set and an element".into(), line));
        };
        // Mostly the set of the line before.
        let last = self.last.filter(|&last| self.sets[last].name == name.text);
        let index = last.map_or_else(|| self.find(name), Ok)?;
        self.last = Some(index);
        self.send_to(index);
        let parts = parts(element, &PartContext::of(&self.sets[index]))?;
        for parts in element::prefix_by_prefix(self.sets[index].kind, parts) {
            self.take(index, parts, element, rest)?;
        }
        Ok(())
    }

    /// Adds an element to a set, unless something is against it. One that is there may be given again behind an `-exist`:
    /// then its options are those given last (net/netfilter/ipset/ip_set_hash_gen.h, `mtype_add`).
    fn take(
        &mut self,
        index: usize,
        parts: Parts,
        element: &Word<'_>,
        rest: &[&Word<'_>],
    ) -> Result<(), Fault> {
        let set = &self.sets[index];
        let hash = self.seen[index].hash(&parts);
        if !is_in_range(&set.options, &parts) {
            let message = format!("`{}` is outside the range of set `{}`", element.text, set.name);
            return Err((codes::SET_ELEMENT, message, element.span));
        }
        let mut ast = ElementAst::plain(element.span, parts);
        let place = element_options(set, &mut ast, rest)?;
        for part in &ast.parts {
            if let Part::Set(member) = part {
                let Some(&known) = self.by_name.get(&**member) else {
                    return Err((codes::UNKNOWN_SET, format!("set `{member}` is not created"), element.span));
                };
                if is_list(&self.sets[known]) {
                    return Err((codes::SET_ELEMENT, "a list holds no lists".into(), element.span));
                }
            }
        }
        let seen = &mut self.seen[index];
        let known = seen.knows(set, &ast.parts, hash);
        // Of what overlaps, the element that was added last would decide.
        let decides = set.kind.nomatch && (ast.nomatch || seen.with_nomatch);
        match known {
            Known::New if set.is_exceeded(seen.held + seen::size(set, &ast.parts)) => {
                let message = format!("set `{}` is full: its `maxelem` is {}", set.name, set.elements_max());
                return Err((codes::SET_LIMIT, message, element.span));
            }
            Known::New => {}
            Known::Same if self.may_exist => {
                let at = seen.find(&set.elements, &ast.parts, hash).expect("it is known");
                seen.with_extra |= ast.extra.is_some();
                seen.with_nomatch |= ast.nomatch;
                self.sets[index].elements[at] = ast;
                self.given_again(element.span);
                return Ok(());
            }
            Known::Partly if self.may_exist && !decides => self.given_again(element.span),
            Known::Same | Known::Partly => {
                let what = if known == Known::Same { "the element" } else { "some of the element" };
                let message = format!("set `{}` has {what} `{}` already", set.name, element.text);
                return Err((codes::SET_DUPLICATE, message, element.span));
            }
        }
        if self.elements == limits::SET_ELEMENTS_MAX {
            let message = format!("more than {} elements", limits::SET_ELEMENTS_MAX);
            return Err((codes::SET_LIMIT, message, element.span));
        }
        let (set, seen) = (&self.sets[index], &mut self.seen[index]);
        seen.insert(set, &ast.parts, hash, known);
        seen.with_nomatch |= ast.nomatch;
        self.elements += 1;
        self.seen[index].with_extra |= ast.extra.is_some();
        let elements = &mut self.sets[index].elements;
        let at = match place {
            None => elements.len(),
            Some((before, reference, span)) => {
                let found = elements
                    .iter()
                    .position(|it| it.parts.first() == Some(&Part::Set(reference.as_str().into())));
                let found = found.ok_or_else(|| {
                    (codes::SET_ELEMENT, format!("the list has no set `{reference}`"), span)
                })?;
                if before { found } else { found + 1 }
            }
        };
        elements.insert(at, ast);
        Ok(())
    }
}

/// The set and the element of a line that is `add SET ELEMENT` and nothing else, as nearly all lines of large files are.
pub(super) fn plain_add(text: &str) -> Option<[&str; 2]> {
    let (name, element) = text.strip_prefix("add ")?.split_once(' ')?;
    let plain = |word: &str| {
        !word.is_empty()
            && !word.starts_with('-')
            && word.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"')
    };
    (text.len() <= limits::LINE_BYTES_MAX && plain(name) && plain(element)).then_some([name, element])
}

fn is_list(set: &SetAst) -> bool {
    set.kind.dimensions == [Dimension::Set]
}

/// Bytes of the shortest line that adds an address.
pub(super) const LINE_BYTES: usize = 14;

/// Splits a line into words. A quote starts or ends anywhere in a word; there are no escapes
/// (lib/ipset.c, `build_argv`).
fn words<'t>(text: &'t str, span: &impl Fn(usize, usize) -> Span) -> Result<Vec<Word<'t>>, Fault> {
    let mut words = Vec::new();
    let mut word: Option<(usize, String)> = None;
    let mut quote = None;
    for (at, c) in text.char_indices() {
        match c {
            '"' => {
                quote = if quote.is_none() { Some(at) } else { None };
                word.get_or_insert((at, String::new()));
            }
            ' ' | '\t' | '\r' if quote.is_none() => {
                if let Some((from, text)) = word.take().filter(|(_, text)| !text.is_empty()) {
                    words.push(Word { text: text.into(), span: span(from, at) });
                }
            }
            c => word.get_or_insert((at, String::new())).1.push(c),
        }
    }
    if let Some(quote) = quote {
        return Err((codes::SET_LINE, "the quote is not closed".into(), span(quote, text.len())));
    }
    if let Some((from, word)) = word.filter(|(_, word)| !word.is_empty()) {
        words.push(Word { text: word.into(), span: span(from, text.len()) });
    }
    Ok(words)
}

fn family(kind: &SetKind, words: &[&Word<'_>]) -> Result<Family, Fault> {
    let mut found = None;
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let (value, span) = match &*word.text {
            "-4" | "-6" => (Some(*word), word.span),
            "family" => {
                let value = words.next().copied();
                (value, value.map_or(word.span, |value| value.span))
            }
            _ => continue,
        };
        let family = match value.map(|value| &*value.text) {
            Some("inet" | "ipv4" | "-4") => Family::V4,
            Some("inet6" | "ipv6" | "-6") => Family::V6,
            Some(other) => {
                return Err((codes::SET_VALUE, format!("`{other}` is no family: write inet or inet6"), span));
            }
            None => return Err((codes::SET_OPTION, "`family` needs an argument".into(), span)),
        };
        if !kind.create.contains(&"family") {
            return Err((codes::SET_OPTION, format!("a {} takes no family", kind.name), span));
        }
        if found.replace(family).is_some() {
            return Err((codes::SET_OPTION, "the family is given twice".into(), span));
        }
    }
    Ok(found.unwrap_or(Family::V4))
}

/// Options that old versions had and that have no effect any more.
const IGNORED: &[&str] = &["probes", "resize", "gc"];

fn create_options(
    kind: &'static SetKind,
    family: Family,
    words: &[&Word<'_>],
) -> Result<CreateOptions, Fault> {
    let mut options = CreateOptions::default();
    let mut from_to: [Option<&Word<'_>>; 2] = [None, None];
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let name = &*word.text;
        let mut value = || {
            words
                .next()
                .copied()
                .ok_or_else(|| (codes::SET_OPTION, format!("`{name}` needs an argument"), word.span))
        };
        match name {
            "-4" | "-6" => continue,
            "family" => {
                value()?;
                continue;
            }
            "from" | "to" if kind.is_bitmap() => {
                from_to[usize::from(name == "to")] = Some(value()?);
                continue;
            }
            "network" if kind.is_bitmap() => {
                let value = value()?;
                options.addresses = Some(address_range(value, family)?);
                continue;
            }
            name if IGNORED.contains(&name) => {
                value()?;
                continue;
            }
            name if !kind.create.contains(&name) => {
                let message =
                    format!("a {} has no option `{name}`: it takes {}", kind.name, kind.create.join(", "));
                return Err((codes::SET_OPTION, message, word.span));
            }
            _ => {}
        }
        match name {
            "counters" => options.counters = true,
            "comment" => options.comment = true,
            "skbinfo" => options.skbinfo = true,
            "forceadd" => options.force_add = true,
            _ => {
                let value = value()?;
                let bits = family.address_bits();
                let number = |max: u64| {
                    element::number(&value.text, max).map_err(|it| (codes::SET_VALUE, it, value.span))
                };
                match name {
                    "hashsize" => options.hash_size = Some(number(u32::MAX.into())? as u32),
                    "maxelem" => options.elements_max = Some(number(u32::MAX.into())? as u32),
                    "bucketsize" => options.bucket_size = Some(number(255)? as u8),
                    "initval" => options.seed = Some(number(u32::MAX.into())? as u32),
                    "timeout" => options.timeout = Some(number(TIMEOUT_MAX)? as u32),
                    "size" => options.size = Some(number(u32::MAX.into())? as u32),
                    "markmask" => options.mark_mask = Some(number(u32::MAX.into())? as u32),
                    "netmask" => {
                        let length = number(bits.into())? as u8;
                        if length == 0 {
                            return Err((codes::SET_VALUE, format!("a netmask is 1 to {bits}"), value.span));
                        }
                        options.netmask = Some(length);
                    }
                    "bitmask" => {
                        let mask = value::address(&value.text, family).filter(|mask| !mask.is_unspecified());
                        let message = || format!("`{}` is not an {family} mask", value.text);
                        options.bitmask =
                            Some(mask.ok_or_else(|| (codes::SET_VALUE, message(), value.span))?);
                    }
                    _ if kind.dimensions == [Dimension::TcpUdpPort] => {
                        let cx = PartContext::of_option(kind, family);
                        let part = element::part(&value.text, Dimension::TcpUdpPort, &cx);
                        if let Part::Port { first, last, .. } =
                            part.map_err(|it| (codes::SET_VALUE, it, value.span))?
                        {
                            options.ports = Some((first, last));
                        }
                    }
                    _ => options.addresses = Some(address_range(value, family)?),
                }
                if options.netmask.is_some() && options.bitmask.is_some() {
                    let message = "`netmask` and `bitmask` exclude each other".into();
                    return Err((codes::SET_OPTION, message, word.span));
                }
            }
        }
    }
    if let [Some(from), Some(to)] = from_to {
        if kind.dimensions == [Dimension::TcpUdpPort] {
            let port = |word: &Word<'_>| {
                let port = element::number(&word.text, u16::MAX.into());
                port.map(|port| port as u16).map_err(|it| (codes::SET_VALUE, it, word.span))
            };
            options.ports = Some((port(from)?, port(to)?));
        } else {
            options.addresses = Some((address_range(from, family)?.0, address_range(to, family)?.1));
        }
    }
    // A whole mask is none, and is not saved.
    options.netmask = options.netmask.filter(|length| *length < family.address_bits());
    options.bitmask = options.bitmask.filter(|mask| prefix_length(*mask) != Some(family.address_bits()));
    Ok(options)
}

/// Most elements of a bitmap (net/netfilter/ipset/ip_set_bitmap.h, `IPSET_BITMAP_MAX_RANGE`, and one).
const BITMAP_ELEMENTS_MAX: usize = 1 << 16;

/// The range of a bitmap with a netmask, in whole blocks; `None` if the kernel refuses it
/// (net/netfilter/ipset/ip_set_bitmap_ip.c, `bitmap_ip_create` and `range_to_mask`).
fn blocks_of((first, last): (IpAddr, IpAddr), netmask: u8) -> Option<(IpAddr, IpAddr)> {
    let (first, last) = (element::prefix_ends(first, netmask).0, element::prefix_ends(last, netmask).1);
    let begins = |length: &u8| element::prefix_ends(last, *length).0 == first;
    let everything = || (element::prefix_ends(first, 0) == (first, last)).then_some(0);
    let length = (1..32).rev().find(begins).or_else(everything)?;
    (netmask > length).then_some((first, last))
}

/// Longest timeout, in seconds: it is kept in milliseconds in 31 bits.
const TIMEOUT_MAX: u64 = (u32::MAX as u64 >> 1) / 1_000;

fn address_range(word: &Word<'_>, family: Family) -> Result<(IpAddr, IpAddr), Fault> {
    let (first, last, _) =
        element::address_range(&word.text, family).map_err(|it| (codes::SET_VALUE, it, word.span))?;
    Ok((first, last))
}

pub(super) fn parts(word: &Word<'_>, cx: &PartContext) -> Result<Parts, Fault> {
    let count = word.text.split(',').count();
    let dimensions = cx.kind.dimensions;
    // The second part of a bitmap:ip,mac may be missing.
    let optional = usize::from(cx.kind.name == "bitmap:ip,mac");
    if count > dimensions.len() || count + optional < dimensions.len() {
        let message = format!("an element of a {} has {} parts", cx.kind.name, dimensions.len());
        return Err((codes::SET_ELEMENT, message, word.span));
    }
    let verbatim = word.text.len() == word.span.len() as usize;
    let mut offset = word.span.start;
    let mut parts = Parts::new();
    for (text, &dimension) in word.text.split(',').zip(dimensions) {
        let span = match verbatim {
            true => Span::new(word.span.file, offset, offset + text.len() as u32),
            false => word.span,
        };
        offset += text.len() as u32 + 1;
        parts.push(element::part(text, dimension, cx).map_err(|message| {
            let other = match cx.family {
                Family::V4 => Family::V6,
                Family::V6 => Family::V4,
            };
            let addresses = matches!(dimension, Dimension::Host | Dimension::SingleHost | Dimension::Net);
            let code = if addresses && element::address_range(text, other).is_ok() {
                codes::SET_FAMILY
            } else {
                codes::SET_ELEMENT
            };
            (code, message, span)
        })?);
    }
    Ok(parts)
}

/// Elements of a bitmap lie in its range.
pub(super) fn is_in_range(options: &CreateOptions, parts: &[Part]) -> bool {
    match (parts.first(), options.addresses, options.ports) {
        (Some(Part::Address { first, last, .. }), Some((low, high)), _) => low <= *first && *last <= high,
        (Some(Part::Port { first, last, .. }), _, Some((low, high))) => low <= *first && *last <= high,
        _ => true,
    }
}

/// Reads an element's options; `Some` is where in a list it goes: before or after, which set, and where that is said.
fn element_options(
    set: &SetAst,
    ast: &mut ElementAst,
    words: &[&Word<'_>],
) -> Result<Option<(bool, String, Span)>, Fault> {
    let mut place = None;
    let mut extra = ElementExtra::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let name = &*word.text;
        let takes = |allowed: bool, what: &str| {
            if allowed {
                return Ok(());
            }
            let message = format!("`{name}` needs a set created with `{what}`");
            Err((codes::SET_OPTION, message, word.span))
        };
        match name {
            "nomatch" if set.kind.nomatch => {
                ast.nomatch = true;
                continue;
            }
            "wildcard" if set.kind.dimensions.contains(&Dimension::Device) => {
                ast.wildcard = true;
                continue;
            }
            "timeout" => takes(set.options.timeout.is_some(), "timeout")?,
            "packets" | "bytes" => takes(set.options.counters, "counters")?,
            "comment" => takes(set.options.comment, "comment")?,
            "skbmark" | "skbprio" | "skbqueue" => takes(set.options.skbinfo, "skbinfo")?,
            "before" | "after" if set.kind.dimensions == [Dimension::Set] => {}
            _ => {
                let message = format!("an element of a {} has no option `{name}`", set.kind.name);
                return Err((codes::SET_OPTION, message, word.span));
            }
        }
        let value = words
            .next()
            .ok_or_else(|| (codes::SET_OPTION, format!("`{name}` needs an argument"), word.span))?;
        let text = &*value.text;
        let number =
            |max: u64| element::number(text, max).map_err(|message| (codes::SET_VALUE, message, value.span));
        let bad = |what: &str| (codes::SET_VALUE, format!("`{text}` is no {what}"), value.span);
        match name {
            "timeout" => extra.timeout = Some(number(TIMEOUT_MAX)? as u32),
            "packets" => extra.packets = Some(number(u64::MAX)?),
            "bytes" => extra.bytes = Some(number(u64::MAX)?),
            "comment" => extra.comment = Some(text.into()),
            "skbmark" => {
                extra.mark = Some(parse_mark(text).ok_or_else(|| bad("mark: write 0xMARK[/0xMASK]"))?)
            }
            "skbprio" => {
                extra.priority = Some(parse_priority(text).ok_or_else(|| bad("class: write MAJOR:MINOR"))?)
            }
            "skbqueue" => extra.queue = Some(number(u16::MAX.into())? as u16),
            _ => place = Some((name == "before", value.text.to_string(), value.span)),
        }
    }
    if extra != ElementExtra::default() {
        ast.extra = Some(Box::new(extra));
    }
    Ok(place)
}

/// `0xMARK[/0xMASK]`.
fn parse_mark(text: &str) -> Option<Masked> {
    text.starts_with("0x").then(|| Masked::parse(text)).flatten()
}

/// `MAJOR:MINOR`, both hexadecimal.
fn parse_priority(text: &str) -> Option<u32> {
    let (major, rest) = strtoul(text, 16)?;
    let (minor, _) = strtoul(rest.strip_prefix(':')?, 16)?;
    Some((major as u32) << 16 | minor as u32 & 0xffff)
}

/// The prefix form of a range that is a prefix, for canonical text.
pub(super) fn single_prefix(first: IpAddr, last: IpAddr) -> Option<AddressForm> {
    let width = if first.is_ipv4() { 32 } else { 128 };
    let apart = element::bits(first) ^ element::bits(last);
    let length = (width - (128 - apart.leading_zeros())) as u8;
    (element::prefix_ends(first, length) == (first, last)).then_some(AddressForm::Prefix(length))
}
