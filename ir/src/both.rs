//! Two things at once, on a thread each.

use std::panic::resume_unwind;
use std::thread::scope;

/// Does both and gives what they give. A panic of either goes on here.
pub fn both<A, B: Send>(first: impl FnOnce() -> A, second: impl FnOnce() -> B + Send) -> (A, B) {
    scope(|scope| {
        let second = scope.spawn(second);
        let first = first();
        (first, second.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

#[cfg(test)]
mod tests {
    use super::both;

    #[test]
    fn both_are_done_and_a_panic_of_either_is_heard_of() {
        assert_eq!(both(|| 1, || "two"), (1, "two"));
        let panics = std::panic::catch_unwind(|| both(|| 1, || -> u32 { panic!("by the second") }));
        assert!(panics.is_err());
    }
}
