//! Parts: a stage that no structure takes as a whole is cut into runs of entries that one takes each.
//!
//! Entries with nothing in common make classes without end, but of a few hundred there are few enough. So the stage becomes
//! a line of stages: each has some of the entries, in their order, and sends what none of them takes on to the next. A run
//! that is still too much is halved, the next one is tried with twice as many; a single entry is compared. What a packet
//! takes grows with the number of parts, of which each has a hundred entries and more. If there is room for some parts
//! only, the rest of the stage is left to the walk.

use cranelift_entity::{PrimaryMap, SecondaryMap};
use polc_ir::classifier::{Classifier, EntryData, Exit, StageData};
use polc_ir::cube::Cube;
use polc_ir::entities::{Entry, Stage};

use super::line::Tables;
use super::room::Room;
use super::shape::Shape;
use super::{INSNS_PER_EXIT, Prefer, Selector};

/// Entries of the first part that is tried.
const FIRST_ENTRIES: usize = 1 << 11;

/// Parts of a stage, the first entries first.
#[derive(Debug)]
pub(super) struct Parts {
    /// Where each ends, and what takes it.
    pub(super) parts: Vec<(usize, Shape)>,
    /// They are all of the stage: there is room for no more otherwise.
    pub(super) is_whole: bool,
}

/// Where a stage is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// The stage.
    pub(super) stage: Stage,
    /// How many entries come before each part's end, but for the last entry, which all parts share.
    pub(super) ends: Vec<usize>,
}

impl Selector<'_> {
    /// Parts that structures take each, in at most so many instructions altogether.
    pub(super) fn parts(&self, entries: &[Entry], busy: bool, insns_max: usize) -> Parts {
        // Stages behind this one need room as well.
        let rooms = [
            (Room::PART, insns_max / 2),
            (Room::LARGE_PART, insns_max / 4 * 3),
            (Room::LARGEST_PART, insns_max),
        ];
        let mut longest = Parts { parts: Vec::new(), is_whole: false };
        for (room, insns_max) in rooms {
            let parts = self.parts_in(entries, busy, room, insns_max);
            if parts.is_whole {
                return parts;
            }
            let end = |parts: &Parts| parts.parts.last().map_or(0, |(end, _)| *end);
            if end(&parts) > end(&longest) {
                longest = parts;
            }
        }
        longest
    }

    /// Parts of at most so much room each.
    fn parts_in(&self, entries: &[Entry], busy: bool, room: Room, insns_max: usize) -> Parts {
        let mut parts: Vec<(usize, Shape)> = Vec::new();
        let Some((&last, body)) = entries.split_last() else { return Parts { parts, is_whole: false } };
        let (mut insns, mut from) = (0, 0);
        let mut size = (body.len() / 2).min(FIRST_ENTRIES);
        while from < body.len() {
            let to = body.len().min(from + size.max(1));
            let part: Vec<Entry> = body[from..to].iter().copied().chain([last]).collect();
            let lookup = || self.lookup(&part, busy, Prefer::Cheapest, room);
            match self.shape(&part, busy, Prefer::Cheapest, lookup, &mut Tables::new()) {
                Some(shape) => {
                    insns += shape.insns(self.classifier) + INSNS_PER_EXIT;
                    if insns > insns_max {
                        return Parts { parts, is_whole: false };
                    }
                    parts.push((to, shape));
                    (from, size) = (to, 2 * (to - from));
                }
                None if to - from > 1 => size = (to - from) / 2,
                None => return Parts { parts, is_whole: false },
            }
        }
        Parts { parts, is_whole: body.len() > 1 }
    }
}

/// The classifier with stages cut so.
pub(super) fn cut(classifier: Classifier, cuts: &[Cut]) -> Classifier {
    let mut ends: SecondaryMap<Stage, &[usize]> = SecondaryMap::new();
    cuts.iter().for_each(|cut| ends[cut.stage] = &cut.ends);
    let Classifier { stages, entries, root, .. } = classifier;
    let mut cut = Classifier { stages: PrimaryMap::new(), entries: PrimaryMap::new(), ..classifier };
    let mut number: SecondaryMap<Stage, Option<Stage>> = SecondaryMap::new();
    for (old, StageData { entries: whole, origin }) in &stages {
        let to = |old: Stage| number[old].expect("what an exit leads to has a smaller number");
        let inner = ends[old].len().saturating_sub(1);
        let ends = ends[old][..inner].iter().copied().chain([whole.len()]);
        let begins: Vec<usize> = std::iter::once(0).chain(ends.clone()).take(inner + 1).collect();
        let mut next: Option<Stage> = None;
        for (begin, end) in begins.into_iter().zip(ends.collect::<Vec<_>>()).rev() {
            let stage = cut.stages.push(StageData { entries: Vec::new(), origin: *origin });
            let own = whole[begin..end].iter().map(|&entry| {
                let EntryData { cube, rule, counts, exit, .. } = entries[entry].clone();
                EntryData { stage, cube, rule, counts, exit: exit.renumbered(to) }
            });
            let on = next.map(|next| {
                let exit = Exit::Then { writes: Vec::new(), stage: next };
                EntryData { stage, cube: Cube::all(), rule: None, counts: Vec::new(), exit }
            });
            for data in own.chain(on) {
                let entry = cut.entries.push(data);
                cut.stages[stage].entries.push(entry);
            }
            next = Some(stage);
        }
        number[old] = next;
    }
    cut.root = number[root].expect("every stage has a number");
    cut
}
