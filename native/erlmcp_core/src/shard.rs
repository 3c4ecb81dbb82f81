//! What is kept for each shard beside the maps: which entries it has, and how many.

use crate::admission::Admission;
use crate::counter::Refusals;
use crate::registry::Namespace;
use crate::slots::Slots;
use crate::sync::{AtomicU64, Ordering};

/// Aligned so that no two shards share a cache line (two of 64 bytes, since x86 fetches pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Shard {
    /// The hash of every entry of this shard, in all namespaces.
    pub(crate) slots: Slots,
    counts: [AtomicU64; Namespace::COUNT],
    pub(crate) admission: Admission,
    pub(crate) refusals: Refusals,
}

impl Shard {
    pub(crate) fn entered(&self, namespace: Namespace) {
        self.counts[namespace as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn left(&self, namespace: Namespace) {
        self.counts[namespace as usize].fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn count(&self, namespace: Namespace) -> u64 {
        self.counts[namespace as usize].load(Ordering::Relaxed)
    }
}
