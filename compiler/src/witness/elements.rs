//! Elements of the sets that are looked up in tables: what a packet is like that is in such a set.

use std::collections::BTreeMap;

use polc_ir::classifier::Classifier;
use polc_ir::cube::Cube;
use polc_ir::derived::DerivedData;
use polc_ir::entities::Derived;
use polc_ir::set::{self, SetContents};

/// Elements of a set that packets are made for.
const ELEMENTS_MAX: usize = 256;

/// For each membership that is looked up, cubes of elements: the first, the last, and some between.
pub(super) fn elements(classifier: &Classifier) -> BTreeMap<Derived, Vec<Cube>> {
    classifier.members.iter().map(|&field| (field, cubes(classifier, field))).collect()
}

fn cubes(classifier: &Classifier, field: Derived) -> Vec<Cube> {
    let mut cubes = Vec::new();
    let DerivedData::Member { set, ends, .. } = &classifier.derived[field] else { return cubes };
    for leaf in set::leaves(&classifier.sets, *set) {
        let data = &classifier.sets[leaf];
        let SetContents::Elements(elements) = &data.contents else { continue };
        if elements.is_empty() || data.dimensions.len() > ends.len() {
            continue;
        }
        let count = elements.len().min(ELEMENTS_MAX);
        for at in 0..count {
            let element = elements.get(at * (elements.len() - 1) / (count - 1).max(1));
            cubes.extend(set::element_cubes(classifier.family, &element, ends));
        }
    }
    cubes
}
