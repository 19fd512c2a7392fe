//! What was perhaps meant by a name that nobody knows.

use strsim::levenshtein;

/// The known name nearest to `name`, if it is near enough to be a slip of the fingers.
pub(super) fn nearest<'n>(name: &str, known: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let limit = if name.len() <= 4 { 1 } else { 2 };
    if name.len() > 32 {
        return None;
    }
    known
        .map(|known| (levenshtein(&name.to_ascii_lowercase(), &known.to_ascii_lowercase()), known))
        .filter(|&(distance, known)| distance <= limit && distance < known.len())
        .min()
        .map(|(_, known)| known)
}
