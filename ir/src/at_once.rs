//! Several things at once, on threads.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{available_parallelism, scope};

/// Does both and gives what they give. A panic of either goes on here.
pub fn both<A, B: Send>(first: impl FnOnce() -> A, second: impl FnOnce() -> B + Send) -> (A, B) {
    scope(|scope| {
        let second = scope.spawn(second);
        let first = first();
        (first, second.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

/// What `work` gives for each item, in their order, on as many threads as there are CPUs. A panic goes on here.
pub fn each<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let take = || -> Vec<(usize, R)> {
        let one = || {
            let index = next.fetch_add(1, Ordering::Relaxed);
            Some((index, work(items.get(index)?)))
        };
        std::iter::from_fn(one).collect()
    };
    let threads = available_parallelism().map_or(1, usize::from).min(items.len());
    let mut done = scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(take)).collect();
        let mut done = take();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_done_and_a_panic_of_either_is_heard_of() {
        assert_eq!(both(|| 1, || "two"), (1, "two"));
        let panics = std::panic::catch_unwind(|| both(|| 1, || -> u32 { panic!("by the second") }));
        assert!(panics.is_err());
    }

    #[test]
    fn each_is_done_in_order_and_a_panic_is_heard_of() {
        let items: Vec<u32> = (0..1_000).collect();
        assert_eq!(each(&items, |item| item + 1), (1..=1_000).collect::<Vec<u32>>());
        assert_eq!(each(&[], |item: &u32| *item), Vec::<u32>::new());
        let panics = std::panic::catch_unwind(|| each(&items, |item| assert_ne!(*item, 700)));
        assert!(panics.is_err());
    }
}
