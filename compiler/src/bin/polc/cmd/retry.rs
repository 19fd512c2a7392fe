//! Trying again what failed: at once where something has changed since, else after longer and longer pauses.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Longest pause.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(60);

/// What failed, of things that `K` tells apart and that were tried as `S` was.
#[derive(Debug)]
pub(super) struct Retries<K, S> {
    first: Duration,
    failed: BTreeMap<K, Failed<S>>,
}

#[derive(Debug)]
struct Failed<S> {
    seen: S,
    at: Instant,
    pause: Duration,
}

impl<K: Ord + Clone, S: PartialEq + Clone> Retries<K, S> {
    /// None; the first pause is this long.
    pub(super) fn new(first: Duration) -> Retries<K, S> {
        Retries { first: first.min(PAUSE_MAX), failed: BTreeMap::new() }
    }

    /// Whether it failed as things are, and it is not time yet to try again.
    pub(super) fn waits(&self, of: &K, seen: &S, now: Instant) -> bool {
        let failed = self.failed.get(of).filter(|failed| failed.seen == *seen);
        failed.is_some_and(|failed| now.saturating_duration_since(failed.at) < failed.pause)
    }

    /// Takes down how a try ended.
    pub(super) fn tried(&mut self, of: &K, seen: &S, well: bool, now: Instant) {
        let before = self.failed.remove(of).filter(|failed| failed.seen == *seen);
        if !well {
            let pause = before.map_or(self.first, |failed| (2 * failed.pause).min(PAUSE_MAX));
            self.failed.insert(of.clone(), Failed { seen: seen.clone(), at: now, pause });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_something_changes() {
        let mut retries: Retries<&str, u32> = Retries::new(Duration::from_secs(1));
        let (began, mut now) = (Instant::now(), Instant::now());
        let mut tries = 0;
        // As often as the host is looked at in 10 minutes.
        while now < began + Duration::from_secs(600) {
            if !retries.waits(&"eth0", &1, now) {
                retries.tried(&"eth0", &1, false, now);
                tries += 1;
            }
            now += Duration::from_millis(100);
        }
        // After 0, 1, 3, 7, 15, 31 and 63 s, and then once a minute.
        assert_eq!(tries, 15);
        assert!(retries.waits(&"eth0", &1, now) && !retries.waits(&"eth1", &1, now));
        assert!(!retries.waits(&"eth0", &2, now));
        retries.tried(&"eth0", &2, false, now);
        assert!(!retries.waits(&"eth0", &2, now + Duration::from_secs(1)));
        retries.tried(&"eth0", &2, true, now);
        assert!(!retries.waits(&"eth0", &2, now));
    }
}
