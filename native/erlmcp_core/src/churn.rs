//! Keys of a `papaya` map that are inserted and removed again and again.
//!
//! A removed key leaves a tombstone, which is never reused. So a key that is inserted and removed in turn fills its
//! probe sequence: after some fifty times in a half full table. The next insertion of the key begins an incremental
//! resize, and each later one copies 64 places. In a table of two million places that takes 32,000 insertions.
//! Meanwhile the key fills its sequence in the next table as well, which allocates another one, and so on: a chain
//! of tables that grows faster than it is copied. (With papaya 0.2.5, 50,000 removals and insertions of one key
//! among a million took 1 GB.) Many keys that are inserted and removed in turn do no harm, since each overflow
//! helps to copy.
//!
//! So removals are counted by hash. The insertion of a key whose count is due first completes the resize under way,
//! if there is one, and resets all counts. No key is removed more than [`LIMIT`] times between two completions,
//! which seldom fills a sequence twice.
//!
//! # Trade-offs
//!
//! The counts are approximate: concurrent removals may be counted once. Keys that share a count make it due early,
//! where there is mostly nothing to complete. Completing a resize takes 200 to 450 ns per key (0.4 s for a
//! million), so it is for dirty schedulers. One removal and insertion of the same key in 60 to 70 makes one
//! complete.

use std::hash::{BuildHasher, Hash};

use papaya::{Guard, HashMap};

use crate::sync::{AtomicU16, Ordering};

/// Removals of keys with one count before it is due.
pub const LIMIT: u16 = 32;

/// A table of fewer keys is copied before any sequence is filled. With 900 keys neither memory nor time grows, and a
/// removal and insertion of one key takes 1.6 us (3.7 us if resizes are completed there too).
const MIN_KEYS: u64 = 1_000;

/// A power of two.
const COUNTS: usize = 1024;

/// Counts removals from a map, or from several that hash alike.
#[derive(Debug)]
pub struct Churn(Box<[AtomicU16]>);

impl Churn {
    /// Counts of zero. 2 KB.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self((0..COUNTS).map(|_| AtomicU16::new(0)).collect())
    }

    /// Counts the removal of a key with this hash. A load and a store, so concurrent counts may be lost.
    #[inline]
    pub fn removed(&self, hash: u64) {
        let count = self.count(hash);
        let removed = count.load(Ordering::Relaxed).saturating_add(1);
        count.store(removed, Ordering::Relaxed);
    }

    /// Whether resizes must be completed before a key with this hash is inserted into maps of `keys` keys.
    #[inline]
    pub fn is_due(&self, hash: u64, keys: impl FnOnce() -> u64) -> bool {
        self.count(hash).load(Ordering::Relaxed) >= LIMIT && keys() >= MIN_KEYS
    }

    /// Completes the resize of a map that is under way, and resets the counts. Costs in proportion to its places,
    /// inside one guard.
    pub fn complete_resize<K, V, S>(&self, map: &HashMap<K, V, S>)
    where
        K: Hash + Eq,
        S: BuildHasher,
    {
        for count in &self.0 {
            count.store(0, Ordering::Relaxed);
        }
        let guard = map.guard();
        // An iterator walks one table, so it completes the resize first.
        let _ = map.iter(&guard);
        // This thread may not remove anything else for long, and the replaced tables are large.
        guard.flush();
    }

    /// Uses other bits than those that choose the place in the table.
    fn count(&self, hash: u64) -> &AtomicU16 {
        &self.0[(hash >> 32) as usize % COUNTS]
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn counts_are_due_and_begin_anew() {
        let churn = Churn::new();
        let (one, other) = (7 << 32, 8 << 32);
        for n in 0..100_000_u64 {
            assert_eq!(churn.is_due(one, || 1_000), n >= u64::from(LIMIT));
            assert!(!churn.is_due(one, || 999));
            churn.removed(one);
        }
        assert!(!churn.is_due(other, || 1_000));
        churn.complete_resize(&HashMap::<u64, ()>::new());
        assert!(!churn.is_due(one, || 1_000));
    }
}
