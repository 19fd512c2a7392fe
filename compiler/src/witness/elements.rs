//! Elements of the sets that are looked up in tables: what a packet is like that is in such a set.

use std::collections::BTreeMap;

use cranelift_entity::PrimaryMap;
use polc_ir::classifier::Classifier;
use polc_ir::cube::Cube;
use polc_ir::derived::DerivedData;
use polc_ir::entities::{Derived, Set};
use polc_ir::hook::Family;
use polc_ir::set::{self, SetContents, SetData};

/// Elements of a set that packets are made for.
const ELEMENTS_MAX: usize = 256;

/// For each membership that is looked up, cubes of elements: the first, the last, and some between.
pub(super) fn elements(classifier: &Classifier) -> BTreeMap<Derived, Vec<Cube>> {
    let of = |field: Derived| cubes(&classifier.sets, classifier.family, &classifier.derived[field]);
    classifier.members.iter().map(|&field| (field, of(field))).collect()
}

/// What packets are like that are in a set: its elements, if not too many. None if something else is computed.
pub(super) fn cubes(sets: &PrimaryMap<Set, SetData>, family: Family, computed: &DerivedData) -> Vec<Cube> {
    let mut cubes = Vec::new();
    let DerivedData::Member { set, ends, .. } = computed else { return cubes };
    for leaf in set::leaves(sets, *set) {
        let data = &sets[leaf];
        let SetContents::Elements(elements) = &data.contents else { continue };
        if elements.is_empty() || data.dimensions.len() > ends.len() {
            continue;
        }
        let count = elements.len().min(ELEMENTS_MAX);
        for at in 0..count {
            let element = elements.get(at * (elements.len() - 1) / (count - 1).max(1));
            cubes.extend(set::element_cubes(family, &element, ends));
        }
    }
    cubes
}
