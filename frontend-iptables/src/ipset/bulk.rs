//! Reads long runs of plain `add` lines of one set on threads of their own.
//!
//! What an element is depends on its line and its set's type alone, and large files are nearly all such lines. Whether
//! the set takes it depends on the lines before: so that stays with the parser, which takes all that was read here if
//! nothing is against any of it, and else reads the lines again as it reads every line. A line that is anything else
//! ends a stretch, and the parser reads it and what follows. So findings are the same as without threads.

use std::borrow::Cow;
use std::hash::BuildHasher as _;
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Scope, available_parallelism};

use hashbrown::DefaultHashBuilder;
use polc_ir::source::{File, Span};

use super::element::{Part, PartContext};
use super::parse::{Word, is_in_range, parts, plain_add};
use super::seen::is_one;
use super::{CreateOptions, ElementAst};
use crate::lexer;

/// Texts shorter than this are read without threads.
pub(super) const TEXT_BYTES_MIN: usize = 1 << 20;
/// Bytes of a stretch, up to the end of its last line.
const STRETCH_BYTES: usize = 1 << 18;
/// Stretches that a thread reads ahead.
const AHEAD: usize = 4;
/// Threads that read, at most: the parser takes elements about as fast as four of them give them.
const READERS_MAX: usize = 4;

/// What is read, and for which set.
#[derive(Clone, Copy)]
pub(super) struct Job<'t> {
    pub(super) text: &'t str,
    pub(super) file: File,
    pub(super) set: &'t str,
    pub(super) options: &'t CreateOptions,
    pub(super) cx: PartContext,
    pub(super) hasher: &'t DefaultHashBuilder,
}

/// The elements at the beginning of a stretch of text, and where the first line begins that is none of them.
pub(super) struct Stretch {
    pub(super) elements: Vec<ElementAst>,
    /// Of the parts of each.
    pub(super) hashes: Vec<u64>,
    pub(super) rest: Range<usize>,
}

/// Stretches of whole lines that together are the text from `at` on.
fn stretches(text: &str, mut at: usize) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    while at < text.len() {
        let end = (at + STRETCH_BYTES).min(text.len());
        let end = text.as_bytes()[end..]
            .iter()
            .position(|byte| *byte == b'\n')
            .map_or(text.len(), |more| end + more + 1);
        found.push(at..end);
        at = end;
    }
    found
}

/// The stretches of a job's text from `at` on, in order, read by threads of the scope. They end when nobody takes what
/// they read any more.
pub(super) fn read<'scope, 't: 'scope>(
    scope: &'scope Scope<'scope, '_>,
    job: &Job<'t>,
    at: usize,
) -> impl Iterator<Item = Stretch> + use<> {
    let all = stretches(job.text, at);
    let readers = available_parallelism().map_or(1, |cpus| cpus.get()).min(READERS_MAX);
    let receivers: Vec<Receiver<Stretch>> = (0..readers)
        .map(|reader| {
            let (sender, receiver) = sync_channel(AHEAD);
            let own: Vec<Range<usize>> = all.iter().skip(reader).step_by(readers).cloned().collect();
            let job = *job;
            scope.spawn(move || own.into_iter().all(|stretch| sender.send(job.read(stretch)).is_ok()));
            receiver
        })
        .collect();
    (0..all.len()).map_while(move |at| receivers[at % readers].recv().ok())
}

impl Job<'_> {
    fn read(&self, stretch: Range<usize>) -> Stretch {
        let room = stretch.len() / super::parse::LINE_BYTES;
        let (mut elements, mut hashes) = (Vec::with_capacity(room), Vec::with_capacity(room));
        let mut rest = stretch.clone();
        for line in lexer::lines(&self.text[stretch.clone()]) {
            let Some(element) = self.line(line.text, stretch.start + line.start as usize) else { break };
            hashes.push(self.hasher.hash_one(self.cx.kind.key(&element.parts)));
            elements.push(element);
            rest.start = stretch.start + line.end();
        }
        Stretch { elements, hashes, rest }
    }

    /// The element of a line that is an `add` of this set without options, well formed, in the set's range, and one.
    fn line(&self, line: &str, start: usize) -> Option<ElementAst> {
        let [_, element] = plain_add(line).filter(|[set, _]| *set == self.set)?;
        let from = (start + line.len() - element.len()) as u32;
        let span = Span::new(self.file, from, from + element.len() as u32);
        let parts = parts(&Word { text: Cow::Borrowed(element), span }, &self.cx).ok()?;
        let plain = is_one(self.cx.kind, &parts) && !parts.iter().any(Part::is_range);
        (plain && is_in_range(self.options, &parts)).then(|| ElementAst::plain(span, parts))
    }
}
