//! `polc explain`: every rule that a packet is tried against, in the user's own text, and why it matched or not.

mod follow;
mod text;
mod values;

use std::process::ExitCode;

use polc::place::refusal;
use polc_ir::diag::Diagnostic;
use polc_ir::env::{Attach, Connections, Counting, Fragments, Input, Place};
use polc_ir::hook::Hook;
use polc_ir::packet::text as packet_text;
use polc_ir::source::{SourceMap, Span};

use self::follow::follow;
use super::{FOUND, place, show};
use crate::cli::ExplainArgs;
use crate::failure::Failure;
use crate::input;
use crate::output::Output;
use crate::packets::list::{BAD_LINE, BAD_PACKET, MARK_AT_XDP, marked_too_early};

pub(super) fn run(args: &ExplainArgs, output: &Output) -> Result<ExitCode, Failure> {
    let mut session = input::session(&args.file, &args.input)?;
    show(output, &session.sources, &session.diagnostics);
    if session.has_errors() {
        return Ok(FOUND.into());
    }
    let packet = match packet(&args.packet, args.attach.map(Into::into)) {
        Ok(packet) => packet,
        Err(wrong) => {
            let (sources, finding) = *wrong;
            show(output, &sources, &[finding]);
            return Err(Failure::Usage("the packet can't be explained".into()));
        }
    };
    let place = place::as_compiled(&mut session, explained_place(args, &packet)?);
    let env = input::env(&args.input, session.family());
    output.result(&follow(&session, &place, &env, &packet))?;
    Ok(ExitCode::SUCCESS)
}

/// What a packet may be.
const HINT: &str =
    "write `PROTO SRC[:PORT] > DST[:PORT] [key=value]...`, such as `tcp 10.0.0.1:5000 > 10.0.0.2:22 in=eth0`";

/// The packet, or a finding about its text.
fn packet(words: &str, attach: Option<Attach>) -> Result<Input, Box<(SourceMap, Diagnostic)>> {
    let fail = |at: usize, message: String, code, hint: &str| {
        let mut sources = SourceMap::new();
        let file = sources.add("--packet", words);
        let rest = words.get(at..).unwrap_or("");
        let len = rest.find(char::is_whitespace).unwrap_or(rest.len());
        let span = Span::new(file, at as u32, (at + len) as u32);
        Box::new((sources, Diagnostic::error(code, message, span).with_hint(hint)))
    };
    let spec = packet_text::parse(words).map_err(|error| fail(error.at, error.message, BAD_LINE, HINT))?;
    let packet = spec.input().map_err(|message| fail(0, message, BAD_PACKET, HINT))?;
    match marked_too_early(&packet, attach) {
        None => Ok(packet),
        Some((message, hint)) => Err(fail(words.find("mark").unwrap_or(0), message, MARK_AT_XDP, hint)),
    }
}

/// Where the packet is explained: the place that was named; else the rules' own meaning, on the hooks that the packet's
/// devices make sense on.
fn explained_place(args: &ExplainArgs, packet: &Input) -> Result<Place, Failure> {
    if let Some(attach) = args.attach {
        return place::of(attach.into(), &args.place, &args.input);
    }
    let path = args.place.path().unwrap_or_else(|| match (packet.in_device, packet.out_device) {
        (Some(_), Some(_)) => vec![Hook::Prerouting, Hook::Forward, Hook::Postrouting],
        (None, Some(_)) => vec![Hook::Output, Hook::Postrouting],
        _ => vec![Hook::Prerouting, Hook::Input],
    });
    if let Some(why) = refusal(&path, None, false) {
        return Err(Failure::Usage(why));
    }
    Ok(Place {
        path,
        attach: None,
        mode: args.place.mode(),
        fragments: Fragments::Unresolved,
        connections: if packet.connection.is_some() { Connections::Given } else { Connections::Unknown },
        local_addresses: !args.input.local.is_empty(),
        counters: Counting::Exact,
    })
}
