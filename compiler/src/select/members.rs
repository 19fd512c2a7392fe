//! Membership in sets that have tables: the fields that look-ups read, their steps, the tables.

use std::collections::BTreeMap;

use polc_ir::classifier::Classifier;
use polc_ir::derived::DerivedData;
use polc_ir::entities::{Derived, Set};
use polc_ir::env::Fragments;
use polc_ir::field::{End, Field};
use polc_ir::plan::set::{SetTable, build};
use polc_ir::plan::{KeySlot, MemberPart, MemberStep, NumberWords};
use polc_ir::set::port::TYPE_AND_CODE;
use polc_ir::set::{DimensionKind, device_field, leaves, mac_field};

/// A field that tables give, the sets it asks, its ends, and whether `nomatch` is asked for.
fn asked(classifier: &Classifier) -> impl Iterator<Item = (Derived, Vec<Set>, &[End], bool)> {
    classifier.members.iter().filter_map(|&derived| match &classifier.derived[derived] {
        DerivedData::Member { set, ends, return_nomatch } => {
            let mut sets = leaves(&classifier.sets, *set);
            // A set with more dimensions than ends holds nothing.
            sets.retain(|leaf| classifier.sets[*leaf].dimensions.len() <= ends.len());
            Some((derived, sets, ends.as_slice(), *return_nomatch))
        }
        _ => None,
    })
}

/// The fields that have to be in the key: those that tell members, and those that are looked up.
pub(super) fn fields(classifier: &Classifier) -> Vec<Field> {
    let mut fields = Vec::new();
    for (derived, sets, ends, _) in asked(classifier) {
        fields.push(Field::Derived(derived));
        for set in sets {
            for (dimension, &end) in classifier.sets[set].dimensions.iter().zip(ends) {
                match dimension {
                    DimensionKind::Address | DimensionKind::Net => fields.push(Field::address(end)),
                    DimensionKind::Port => {
                        fields.extend([Field::Proto, Field::port(end), TYPE_AND_CODE, Field::L4Len]);
                        fields.extend(as_seen(classifier).then_some(Field::FragOffset));
                    }
                    DimensionKind::Mac => fields.push(mac_field(end)),
                    DimensionKind::Mark => fields.push(Field::Mark),
                    DimensionKind::Device => fields.push(device_field(end)),
                }
            }
        }
    }
    fields
}

/// Whether sets are asked for names of devices: then each device has a class of its own.
pub(super) fn ask_for_devices(classifier: &Classifier) -> bool {
    let of = |set: Set| classifier.sets[set].dimensions.contains(&DimensionKind::Device);
    asked(classifier).any(|(_, sets, ..)| sets.into_iter().any(of))
}

/// Whether fragments come to the rules as they are.
fn as_seen(classifier: &Classifier) -> bool {
    classifier.place.fragments == Fragments::AsSeen
}

/// The steps that compute membership.
pub(super) fn steps(classifier: &Classifier, slot: impl Fn(Field) -> KeySlot) -> Vec<MemberStep> {
    let words = |field: Field, mask: u32| {
        let KeySlot { word, words, .. } = slot(field);
        NumberWords::Words { word, words, mask }
    };
    let number = |set: Set, dimension: DimensionKind, end: End| match dimension {
        DimensionKind::Address | DimensionKind::Net => words(Field::address(end), u32::MAX),
        DimensionKind::Mac => words(mac_field(end), u32::MAX),
        DimensionKind::Mark => words(Field::Mark, classifier.sets[set].mark_mask),
        DimensionKind::Port => NumberWords::Port {
            family: classifier.family,
            proto: slot(Field::Proto).word,
            port: slot(Field::port(end)).word,
            icmp: slot(TYPE_AND_CODE).word,
            l4_len: slot(Field::L4Len).word,
            frag_offset: as_seen(classifier).then(|| slot(Field::FragOffset).word),
        },
        DimensionKind::Device => NumberWords::Device { word: slot(device_field(end)).word },
    };
    let step = |(derived, sets, ends, return_nomatch): (Derived, Vec<Set>, &[End], bool)| {
        let part = |set: Set| {
            let data = &classifier.sets[set];
            let numbers =
                data.dimensions.iter().zip(ends).map(|(dimension, end)| number(set, *dimension, *end));
            MemberPart { set, nomatch: return_nomatch && data.takes_nomatch(), numbers: numbers.collect() }
        };
        let slot = slot(Field::Derived(derived));
        MemberStep { derived, slot, parts: sets.into_iter().map(part).collect() }
    };
    asked(classifier).map(step).collect()
}

/// The tables.
pub(super) fn tables(classifier: &Classifier) -> BTreeMap<Set, SetTable> {
    let table = |(&set, shape)| (set, build(&classifier.sets[set], classifier.family, shape));
    classifier.set_shapes.iter().map(table).collect()
}
