//! What each shard stores beside the maps: which entries it has, and how many.

use std::sync::{Arc, OnceLock};

use once_cell::race::OnceBox;
use seize::Collector;

use crate::admission::Admission;
use crate::counter::Refusals;
use crate::registry::Namespace;
use crate::slots::Slots;
use crate::sync::{AtomicU64, Ordering};

/// Receivers are counted anew after this many registrations and removals, or this part of the last count if that is
/// more.
const RECOUNT_AFTER: u64 = 64;
const RECOUNT_PART: u64 = 8;

/// Aligned so that no two shards share a cache line (two of 64 bytes, since x86 fetches pairs).
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Shard {
    /// The hashes of the entries of this shard, by namespace. Allocated at the first entry: most registries use
    /// only one namespace, and all slots would be a third of an empty registry.
    slots: [OnceBox<Slots>; Namespace::COUNT],
    population: Population,
    collector: Arc<Collector>,
    /// Allocated at the first use: most registries never route. By a lock: a thread that was too late to create it, and
    /// dropped its own, would drop a map that shares the registry's collector. With `papaya` 0.2.5 that frees at once
    /// whatever the collector keeps for its readers (<https://github.com/ibraheemdev/papaya/issues/102>).
    admission: OnceLock<Box<Admission>>,
    pub(crate) refusals: Refusals,
}

/// Written by registrations and removals. Apart from what messages read.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Population {
    counts: [AtomicU64; Namespace::COUNT],
    /// Registrations so far.
    registered: AtomicU64,
    /// At the last count of receivers: their number, and the registrations and removals before it.
    receivers: AtomicU64,
    counted_registered: AtomicU64,
    counted_removed: AtomicU64,
}

impl Shard {
    pub(crate) fn new(collector: &Arc<Collector>) -> Self {
        Self {
            slots: std::array::from_fn(|_| OnceBox::new()),
            population: Population::default(),
            collector: Arc::clone(collector),
            admission: OnceLock::new(),
            refusals: Refusals::default(),
        }
    }

    /// The admission control, allocated by the first call. Callers that come during that call wait for it.
    #[inline]
    pub(crate) fn admission(&self) -> &Admission {
        self.admission
            .get_or_init(|| Box::new(Admission::with_collector(&self.collector)))
    }

    /// The admission control; `None` if it was never used.
    pub(crate) fn admission_if_used(&self) -> Option<&Admission> {
        self.admission.get().map(Box::as_ref)
    }

    /// The hashes of the entries of one namespace; `None` if there never was one.
    pub(crate) fn slots(&self, namespace: Namespace) -> Option<&Slots> {
        self.slots[namespace as usize].get()
    }

    pub(crate) fn slots_or_init(&self, namespace: Namespace) -> &Slots {
        self.slots[namespace as usize].get_or_init(Box::default)
    }

    pub(crate) fn entered(&self, namespace: Namespace) {
        let population = &self.population;
        population.counts[namespace as usize].fetch_add(1, Ordering::Relaxed);
        population.registered.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn left(&self, namespace: Namespace) {
        self.population.counts[namespace as usize].fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn count(&self, namespace: Namespace) -> u64 {
        self.population.counts[namespace as usize].load(Ordering::Relaxed)
    }

    // ---- Receivers: the different processes behind the entries ----

    /// Registrations and removals so far.
    fn changes(&self) -> (u64, u64) {
        let entries: u64 = Namespace::ALL.iter().map(|ns| self.count(*ns)).sum();
        let registered = self.population.registered.load(Ordering::Relaxed);
        (registered, registered.saturating_sub(entries))
    }

    /// An upper bound of the receivers, except for a registration that has not been counted yet.
    pub(crate) fn receivers(&self) -> u64 {
        let population = &self.population;
        let (registered, removed) = self.changes();
        let counted = population.counted_registered.load(Ordering::Relaxed);
        let since = registered.saturating_sub(counted);
        let receivers = population.receivers.load(Ordering::Relaxed);
        (receivers + since).min(registered - removed)
    }

    /// Registrations and removals since receivers were counted.
    pub(crate) fn changes_since_count(&self) -> u64 {
        let population = &self.population;
        let (registered, removed) = self.changes();
        let since = |is: u64, was: &AtomicU64| is.saturating_sub(was.load(Ordering::Relaxed));
        since(registered, &population.counted_registered)
            + since(removed, &population.counted_removed)
    }

    /// Whether there were enough of them that a count, which costs in proportion to the entries, costs no more than
    /// a few steps for each of them.
    pub(crate) fn is_count_due(&self) -> bool {
        let receivers = self.population.receivers.load(Ordering::Relaxed);
        self.changes_since_count() > RECOUNT_AFTER.max(receivers / RECOUNT_PART)
    }

    /// Stores the result of `count`. Receivers that are registered meanwhile count in addition.
    pub(crate) fn recount(&self, count: impl FnOnce() -> u64) {
        let (registered, removed) = self.changes();
        let receivers = count();
        let population = &self.population;
        population.receivers.store(receivers, Ordering::Relaxed);
        population
            .counted_registered
            .store(registered, Ordering::Relaxed);
        population.counted_removed.store(removed, Ordering::Relaxed);
        self.admission().follow(self.receivers());
    }
}
