//! `polc set`: elements of the sets of applied policies, added, deleted, asked and listed while the policies are in force.
//!
//! Elements are read and printed as ipset does, and so are the messages. A change is made in every policy that has the
//! set, by stores of single words, so that each packet meets the set as it was before or as it is after; no program is
//! loaded. An element that stands for several (a range of hosts or ports) is several changes, of which none is made if one
//! of them can't be. While a policy waits for its confirmation the change is made in the one that would come back, too.

use std::process::ExitCode;

use polc_backend_ebpf::manifest::SetManifest;
use polc_frontend_iptables::codes;
use polc_frontend_iptables::ipset::{self, Sets};
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::env::Mode;
use polc_ir::hook::{Family, Semantics};
use polc_ir::plan::set::change::{self, Refusal};
use polc_ir::plan::set::{COUNT_WORD, SetShape, Words};
use polc_ir::ruleset::Ruleset;
use polc_ir::set::{DimensionKind, Pattern, SetContents, SetData, patterns};
use polc_ir::source::SourceMap;
use polc_loader::Error;
use polc_loader::sets::{LiveSets, LiveTable, elements, read};
use polc_loader::state::SlotName;
use polc_loader::store::Locks;
use polc_loader::sys::{Map, Sys};

use super::{FOUND, live, show};
use crate::cli::{SetChangeArgs, SetCommand, SetListArgs, SlotArgs};
use crate::failure::Failure;
use crate::output::Output;

pub(super) fn run(command: &SetCommand, output: &Output) -> Result<ExitCode, Failure> {
    match command {
        SetCommand::Add(args) => change(Verb::Add, args, output),
        SetCommand::Del(args) => change(Verb::Del, args, output),
        SetCommand::Test(args) => change(Verb::Test, args, output),
        SetCommand::List(args) => list(args, output),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verb {
    Add,
    Del,
    Test,
}

/// A policy's set: what is known about it, and its table.
struct Found {
    sets: LiveSets,
    manifest: SetManifest,
    map: Map,
}

impl Found {
    /// The set of that name, if the policy has one that can be changed.
    fn new(sys: &Sys, sets: LiveSets, name: &str) -> Result<Option<Found>, Failure> {
        let manifest = sets.sets.iter().find(|set| set.name == name && set.live).cloned();
        let Some(manifest) = manifest else { return Ok(None) };
        let map = sets.table(sys, &manifest).map_err(|error| Failure::at(&sets.name, error))?;
        Ok(Some(Found { sets, manifest, map }))
    }
}

/// What the policies that options name have, and nobody else changes as long as the locks live.
struct Policies<T> {
    all: Vec<T>,
    /// Why others can't be opened.
    failed: Vec<Failure>,
    locks: Locks,
}

/// The policies that options name, with their sets.
fn policies(sys: &Sys, args: &SlotArgs, output: &Output) -> Result<Policies<LiveSets>, Failure> {
    let (opened, locks) = LiveSets::open_all(sys, &live::store(&args.store)?, &live::slots(sys, args)?)?;
    let (mut all, mut failed) = (Vec::new(), Vec::new());
    for policy in opened {
        match policy {
            Ok(sets) => all.push(sets),
            Err((slot, error)) => failed.push(Failure::at(&slot, error)),
        }
    }
    if all.is_empty() {
        live::all_well(failed, output)?;
        return Err(live::nothing(sys, args));
    }
    Ok(Policies { all, failed, locks })
}

/// The tables of the set of that name.
fn find(sys: &Sys, args: &SlotArgs, name: &str, output: &Output) -> Result<Policies<Found>, Failure> {
    let Policies { all, mut failed, locks } = policies(sys, args, output)?;
    let mut found = Vec::new();
    let mut accelerates = false;
    for sets in all {
        accelerates |= sets.mode != Some(Mode::Replace);
        match Found::new(sys, sets, name) {
            Ok(table) => found.extend(table),
            Err(failure) => failed.push(failure),
        }
    }
    if !found.is_empty() {
        return Ok(Policies { all: found, failed, locks });
    }
    // One that can't be opened may have it.
    live::all_well(failed, output)?;
    Err(Failure::Usage(if accelerates {
        format!(
            "in accelerate mode the kernel's own set `{name}` decides: change it with ipset, then `polc apply` the rules and sets again"
        )
    } else {
        format!(
            "the set with the given name does not exist: no rule in force looks up a set `{name}` that can be changed"
        )
    }))
}

/// The element of a command line as patterns of a set's table, and how it prints.
struct Asked {
    patterns: Vec<Pattern>,
    text: String,
    hash: bool,
    takes_nomatch: bool,
    nomatch: bool,
    /// Every prefix is as long as an address.
    single: bool,
}

/// Why words are no element of a set.
struct NoElement {
    sources: SourceMap,
    findings: Vec<Diagnostic>,
}

impl NoElement {
    /// Whether it stands for more elements than the set may ever have.
    fn is_too_large(&self) -> bool {
        self.findings.iter().any(|finding| finding.code == codes::SET_LIMIT)
    }

    /// In one line.
    fn text(&self) -> String {
        let of = |finding: &Diagnostic| finding.message.clone();
        self.findings.first().map_or_else(|| "its set is of another kind".into(), of)
    }
}

/// Reads an element of a set that was created so.
fn element(
    manifest: &SetManifest,
    create: &str,
    family: Family,
    words: &[&str],
) -> Result<Result<Asked, NoElement>, Failure> {
    let mut sources = SourceMap::new();
    let quoted = words
        .iter()
        .map(|word| if word.contains([' ', '\t']) { format!("\"{word}\"") } else { (*word).to_string() });
    let line = format!("add {} {}", manifest.name, quoted.collect::<Vec<_>>().join(" "));
    let file = sources.add("the command line", format!("{create}{line}\n"));
    let (sets, mut findings) = ipset::parse(&sources, file);
    findings.retain(|finding: &Diagnostic| finding.severity == Severity::Error);
    let Some((data, ast)) = lowered(&sets, family).filter(|_| findings.is_empty()) else {
        return Ok(Err(NoElement { sources, findings }));
    };
    let (Some(element), SetContents::Elements(elements)) = (ast.elements.first(), &data.contents) else {
        return Ok(Err(NoElement { sources, findings }));
    };
    if element.extra.as_ref().is_some_and(|extra| extra.timeout.is_some()) {
        return Err(Failure::Usage(
            "programs keep no timeouts: add the element without one, and delete it when its time is over"
                .into(),
        ));
    }
    let mut all = Vec::new();
    for element in elements.iter() {
        patterns(&data, family, &element, &mut |pattern| all.push(pattern));
    }
    let single = all.iter().all(|pattern| pattern.lengths == manifest.shape.widths);
    Ok(Ok(Asked {
        patterns: all,
        text: words.first().copied().unwrap_or_default().to_string(),
        hash: ast.kind.name.starts_with("hash:"),
        takes_nomatch: data.takes_nomatch(),
        nomatch: element.nomatch,
        single,
    }))
}

/// A `create` line with room for at least so many elements.
fn with_room(create: &str, elements: usize) -> String {
    let mut words: Vec<String> = create.split_whitespace().map(String::from).collect();
    let max = words.iter().position(|word| word == "maxelem").and_then(|at| words.get_mut(at + 1));
    if let Some(max) = max.filter(|max| max.parse::<usize>().is_ok_and(|max| max < elements)) {
        *max = elements.to_string();
    }
    words.join(" ") + "\n"
}

/// The one set of a text.
fn lowered(sets: &Sets, family: Family) -> Option<(SetData, &ipset::SetAst)> {
    let ast = sets.iter().next()?;
    let mut ruleset = Ruleset::new(family, Semantics::Legacy);
    ipset::lower(sets, family, &mut ruleset);
    let mut data = ruleset.sets.values().next()?.clone();
    data.live = true;
    Some((data, ast))
}

fn change(verb: Verb, args: &SetChangeArgs, output: &Output) -> Result<ExitCode, Failure> {
    let words: Vec<&str> = args.words.iter().map(String::as_str).collect();
    let [name, words @ ..] = words.as_slice() else {
        return Err(Failure::Usage("a set and an element are needed".into()));
    };
    if words.is_empty() {
        return Err(Failure::Usage("an element is needed after the set".into()));
    }
    let sys = Sys::new();
    let Policies { all, failed, locks: _locks } = find(&sys, &args.slots, name, output)?;
    let status = change_in(&sys, all, verb, args.exist, name, words, output)?;
    live::all_well(failed, output).map(|_| status)
}

/// Makes or asks for a change in policies that all have the set.
fn change_in(
    sys: &Sys,
    mut found: Vec<Found>,
    verb: Verb,
    exist: bool,
    name: &str,
    words: &[&str],
    output: &Output,
) -> Result<ExitCode, Failure> {
    let before: Vec<(SlotName, Result<LiveSets, Error>)> = found
        .iter_mut()
        .filter_map(|found| Some((found.sets.name.clone(), *found.sets.before.take()?)))
        .collect();
    let refuse = |found: &Found, message: String| {
        output.error(&format!("set `{name}` {}: {message}", found.sets.name));
        Ok(ExitCode::from(FOUND))
    };
    let mut tables = Vec::new();
    for found in &found {
        let (manifest, family) = (&found.manifest, found.sets.name.family);
        let asked = match element(manifest, &manifest.create, family, words)? {
            Ok(asked) => asked,
            Err(none) if none.is_too_large() && verb == Verb::Add => {
                return refuse(found, is_full(manifest));
            }
            Err(none) => {
                show(output, &none.sources, &none.findings);
                return Ok(ExitCode::from(2));
            }
        };
        tables.push((found, asked, LiveTable::new(sys, &found.map)?));
    }
    // Where policies differ, of which one has an element and another has not, it is added to those that have not, and
    // deleted from those that have.
    let in_all = |index: usize, wanted: bool| {
        tables.iter().all(|(found, asked, table)| {
            let present = |pattern| change::test(&found.manifest.shape, table, pattern).is_some();
            asked.patterns.get(index).is_none_or(|pattern| present(pattern) == wanted)
        })
    };
    // What can't be done is found before anything is changed.
    for (found, asked, table) in &tables {
        for index in 0..asked.patterns.len() {
            match verb {
                Verb::Add if !exist && in_all(index, true) => {
                    return refuse(found, "Element cannot be added to the set: it's already added".into());
                }
                Verb::Del if !exist && in_all(index, false) => {
                    return refuse(found, "Element cannot be deleted from the set: it's not added".into());
                }
                _ => {}
            }
        }
        let fits = if verb == Verb::Add { takes(&found.manifest, asked, table) } else { Ok(()) };
        table.check()?;
        if let Err(message) = fits {
            return refuse(found, message);
        }
    }
    if verb == Verb::Test {
        let inside = tables.iter().all(|(found, asked, table)| holds(&found.manifest.shape, table, asked));
        tables.iter().try_for_each(|(_, _, table)| table.check())?;
        let text = tables.first().map_or("", |(_, asked, _)| asked.text.as_str());
        output.result(&format!("{text} is {}in set {name}.\n", if inside { "" } else { "NOT " }))?;
        return Ok(if inside { ExitCode::SUCCESS } else { ExitCode::from(FOUND) });
    }
    for (found, asked, table) in &tables {
        if let Err(refusal) = make(sys, verb, &found.manifest, asked, table)? {
            return refuse(found, why(refusal));
        }
    }
    // The change is made; what comes of it where it may never matter does not undo that.
    let most = tables.iter().map(|(found, ..)| found.manifest.elements_max).max().unwrap_or(0);
    for (place, sets) in before {
        if let Err(message) = make_before(sys, verb, sets, name, words, most) {
            output.remark(&format!(
                "set `{name}` {place}: unless `polc confirm` follows, a policy comes back without this change: {message}\n"
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes a change in the policy that comes back unless the last change is confirmed; `Err`: why not. The element stands for
/// no more than `most`.
fn make_before(
    sys: &Sys,
    verb: Verb,
    sets: Result<LiveSets, Error>,
    name: &str,
    words: &[&str],
    most: usize,
) -> Result<(), String> {
    let said = |error: Error| error.to_string();
    let sets = sets.map_err(said)?;
    let family = sets.name.family;
    let manifest = sets.sets.iter().find(|set| set.name == name && set.live);
    let manifest = manifest.ok_or("it has no such set that can be changed")?;
    let map = sets.table(sys, manifest).map_err(said)?;
    // Whether there is room for all of it is asked of the table.
    let create = with_room(&manifest.create, most);
    let asked = element(manifest, &create, family, words).map_err(|failure| failure.to_string())?;
    let asked = asked.map_err(|none| none.text())?;
    let table = LiveTable::new(sys, &map).map_err(said)?;
    let fits = if verb == Verb::Add { takes(manifest, &asked, &table) } else { Ok(()) };
    table.check().map_err(said)?;
    fits?;
    make(sys, verb, manifest, &asked, &table).map_err(said)?.map_err(why)
}

fn is_full(manifest: &SetManifest) -> String {
    format!("Hash is full, cannot add more elements: its maxelem is {}", manifest.elements_max)
}

/// Whether a table takes what there is of an element that it does not have; `Err`: why not.
fn takes(manifest: &SetManifest, asked: &Asked, table: &LiveTable<'_>) -> Result<(), String> {
    let shape = &manifest.shape;
    let mut new = 0;
    for pattern in &asked.patterns {
        if change::test(shape, table, pattern).is_none() {
            new += 1;
            change::add(shape, table, pattern, true).map_err(why)?;
        }
    }
    if asked.hash && new > 0 && table.word(COUNT_WORD) as usize + new > manifest.elements_max {
        return Err(is_full(manifest));
    }
    Ok(())
}

/// Makes a change in a table; `Err`: why it can't be made.
fn make(
    sys: &Sys,
    verb: Verb,
    manifest: &SetManifest,
    asked: &Asked,
    table: &LiveTable<'_>,
) -> Result<Result<(), Refusal>, Error> {
    let shape = &manifest.shape;
    for pattern in &asked.patterns {
        let stores = match verb {
            Verb::Add => change::add(shape, table, pattern, true),
            _ => change::remove(shape, table, pattern),
        };
        match stores {
            Ok(stores) => table.make(sys, &stores)?,
            // It was not there.
            Err(Refusal::Absent) => {}
            Err(refusal) => return Ok(Err(refusal)),
        }
    }
    Ok(Ok(()))
}

fn why(refusal: Refusal) -> String {
    let again = "`polc set list` gives the elements to apply the rules with again, which makes room";
    match refusal {
        Refusal::Present => "Element cannot be added to the set: it's already added".into(),
        Refusal::Absent => "Element cannot be deleted from the set: it's not added".into(),
        Refusal::Full => format!("there is no room left for this element; {again}"),
        Refusal::NoLevel => format!("no program looks for prefixes of these lengths yet; {again}"),
    }
}

/// Whether an element is in a table: hosts are asked as a packet would be, prefixes by themselves
/// (net/netfilter/ipset/ip_set_hash_gen.h, `mtype_test`).
fn holds(shape: &SetShape, table: &LiveTable<'_>, asked: &Asked) -> bool {
    asked.patterns.iter().all(|pattern| {
        let found = if asked.takes_nomatch && asked.single {
            shape.covers(table, &pattern.values)
        } else {
            change::test(shape, table, pattern)
        };
        found == Some(asked.nomatch)
    })
}

fn list(args: &SetListArgs, output: &Output) -> Result<ExitCode, Failure> {
    let sys = Sys::new();
    let Policies { all, mut failed, locks: _locks } = match &args.set {
        Some(name) => {
            let Policies { all, failed, locks } = find(&sys, &args.slots, name, output)?;
            Policies { all: all.into_iter().map(|found| found.sets).collect(), failed, locks }
        }
        None => policies(&sys, &args.slots, output)?,
    };
    let several = all.len() > 1;
    for sets in &all {
        if several {
            output.result(&format!("# {}\n", sets.name))?;
        }
        for manifest in &sets.sets {
            let wanted = args.set.as_ref().is_none_or(|name| *name == manifest.name);
            if wanted && manifest.live {
                match sets.table(&sys, manifest).and_then(|table| read(&sys, &table)) {
                    Ok(words) => output.result(&text(manifest, sets.name.family, &words))?,
                    Err(error) => failed.push(Failure::at(&sets.name, error)),
                }
            }
        }
    }
    live::all_well(failed, output)
}

/// A set as `ipset save` prints it, its elements in ascending order.
pub(super) fn text(manifest: &SetManifest, family: Family, words: &[u64]) -> String {
    let patterns = elements(manifest, words);
    let mut sources = SourceMap::new();
    let created = sources.add("set", manifest.create.clone());
    let (sets, _) = ipset::parse(&sources, created);
    let mut text = manifest.create.clone();
    if let Some(set) = sets.iter().next() {
        text.extend(patterns.iter().filter_map(|pattern| ipset::add_line(set, pattern)));
    }
    let whole = sources.add("elements", text);
    let (sets, _) = ipset::parse(&sources, whole);
    debug_assert!(lowered(&sets, family).is_some_and(|(data, _)| {
        data.dimensions.iter().all(|dimension| *dimension != DimensionKind::Device)
    }));
    ipset::print(&sets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use polc_ir::plan::set::{build, shape};

    /// What `list` prints of a table reads as the elements it was made of.
    #[test]
    fn tables_print_as_they_were_read() {
        for (create, elements) in [
            ("hash:net family inet", &["10.0.0.0/8", "10.1.0.0/16 nomatch", "192.0.2.1"][..]),
            ("hash:ip family inet netmask 24", &["10.0.0.0", "10.0.9.0"]),
            (
                "hash:ip,port family inet",
                &["10.0.0.1,icmp:echo-request", "10.0.0.1,tcp:22", "10.0.0.1,udp:53"],
            ),
            ("hash:net,port family inet6", &["2001:db8::/32,tcp:80", "2001:db8::1,ipv6-icmp:echo-request"]),
            ("hash:ip,mark family inet markmask 0x0000ff00", &["10.0.0.1,0x00001200"]),
            ("bitmap:port range 0-1023", &["22", "80"]),
            ("bitmap:ip,mac range 10.0.0.0-10.0.0.255", &["10.0.0.1,02:00:00:00:00:0A"]),
            ("hash:net,net family inet", &["10.0.0.0/8,192.0.2.0/24", "10.0.0.0/8,192.0.2.7 nomatch"]),
        ] {
            let mut text_in = format!("create s {create}\n");
            text_in.extend(elements.iter().map(|element| format!("add s {element}\n")));
            let mut sources = SourceMap::new();
            let file = sources.add("sets", text_in);
            let (sets, findings) = ipset::parse(&sources, file);
            assert!(findings.is_empty(), "{findings:?}");
            let family = sets.iter().next().unwrap().family.unwrap_or(Family::V4);
            let (data, ast) = lowered(&sets, family).unwrap();
            assert!(!ast.kind.dimensions.contains(&ipset::Dimension::Set));
            let shape = shape(&data, family).unwrap();
            let table = build(&data, family, &shape);
            let manifest = SetManifest {
                name: "s".into(),
                map: "set0".into(),
                create: data.create.clone(),
                live: true,
                elements_max: data.elements_max,
                shape,
            };
            let listed = text(&manifest, family, &table.words);
            let sorted = |text: &str| {
                let mut lines: Vec<String> = text.lines().map(ToOwned::to_owned).collect();
                lines.sort();
                lines
            };
            assert_eq!(sorted(&listed), sorted(&ipset::print(&sets)));
        }
    }
}
