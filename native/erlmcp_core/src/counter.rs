//! Counts of messages: those that were refused, by reason, and those that a shard without a threshold let through.
//!
//! A shard with a threshold counts what it admits in its depth (see [`crate::admission`]), so an admitted message writes
//! nothing here. A refusal writes one word of the shard that refused. Counts only grow; rates are differences of two
//! readings. Loads are relaxed: several words are not read as one snapshot.

#[cfg(not(loom))]
use std::cell::Cell;
#[cfg(not(loom))]
use std::sync::atomic::AtomicUsize;

use once_cell::race::OnceBox;

use crate::registry::Refusal;
use crate::sync::{AtomicU64, Ordering};

/// The number of messages that were refused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refused {
    /// Because the target was not registered.
    pub not_found: u64,
    /// By the circuit breaker.
    pub circuit_open: u64,
    /// By the admission control of the shard.
    pub shard_overloaded: u64,
    /// By the bucket that was charged.
    pub rate_limited: u64,
    /// Because the target's message store was full.
    pub store_full: u64,
}

/// The counts of one shard. Aligned so that they share no cache line (or pair of lines, as x86 fetches them) with
/// words that admitted messages write.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Refusals([AtomicU64; 5]);

impl Refusals {
    pub(crate) fn count(&self, refusal: Refusal) {
        self.0[refusal as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Refused {
        let of = |refusal: Refusal| self.0[refusal as usize].load(Ordering::Relaxed);
        Refused {
            not_found: of(Refusal::NotFound),
            circuit_open: of(Refusal::CircuitOpen),
            shard_overloaded: of(Refusal::ShardOverloaded),
            rate_limited: of(Refusal::RateLimited),
            store_full: of(Refusal::StoreFull),
        }
    }
}

/// Threads with counts of their own. The schedulers of a node are the first ones to route, and there are 1,024 at most.
const OWNERS: usize = if cfg!(any(loom, miri)) { 4 } else { 1_024 };

/// The counts of one thread begin on a line of their own (or pair of lines, as x86 fetches them).
const PER_LINE: usize = 16;

#[derive(Debug, Default)]
#[repr(align(128))]
struct Line([AtomicU64; PER_LINE]);

type Stripe = Box<[Line]>;

/// Messages that shards without a threshold let through, by shard.
///
/// Each thread counts in words that no other thread writes, by a load and a store: no locked instruction, and no cache line
/// that schedulers compete for. Threads beyond the first [`OWNERS`] share one stripe. A stripe is allocated by the first
/// message of its thread.
#[derive(Debug)]
pub(crate) struct Passages {
    stripes: Box<[OnceBox<Stripe>]>,
    shards: usize,
}

impl Passages {
    pub(crate) fn new(shards: usize) -> Self {
        Self {
            stripes: (0..=OWNERS).map(|_| OnceBox::new()).collect(),
            shards,
        }
    }

    /// Counts a message to a shard.
    #[inline]
    pub(crate) fn count(&self, shard: usize) {
        let owner = owner();
        let count = word(self.stripes[owner].get_or_init(|| self.stripe()), shard);
        if owner < OWNERS {
            // No other thread writes this word.
            count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        } else {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The messages to a shard so far.
    pub(crate) fn read(&self, shard: usize) -> u64 {
        self.stripes
            .iter()
            .filter_map(|stripe| stripe.get())
            .map(|stripe| word(stripe, shard).load(Ordering::Relaxed))
            .sum()
    }

    #[cold]
    fn stripe(&self) -> Box<Stripe> {
        Box::new(
            (0..self.shards.div_ceil(PER_LINE))
                .map(|_| Line::default())
                .collect(),
        )
    }
}

#[inline]
fn word(stripe: &Stripe, shard: usize) -> &AtomicU64 {
    &stripe[shard / PER_LINE].0[shard % PER_LINE]
}

/// The stripe of the calling thread; [`OWNERS`] is the shared one.
#[cfg(not(loom))]
#[inline]
fn owner() -> usize {
    thread_local! {
        /// Its stripe plus 1; 0 before its first message. A thread keeps its stripe when it exits: those of a VM stay.
        static OWNER: Cell<usize> = const { Cell::new(0) };
    }
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    OWNER.with(|own| {
        if own.get() == 0 {
            own.set(NEXT.fetch_add(1, Ordering::Relaxed).min(OWNERS) + 1);
        }
        own.get() - 1
    })
}

/// The threads of a model are one thread of the operating system.
#[cfg(loom)]
fn owner() -> usize {
    OWNERS
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_count_of_its_own() {
        let refusals = Refusals::default();
        assert_eq!(refusals.read(), Refused::default());
        let all = [
            Refusal::NotFound,
            Refusal::CircuitOpen,
            Refusal::ShardOverloaded,
            Refusal::RateLimited,
            Refusal::StoreFull,
        ];
        for (times, refusal) in all.into_iter().enumerate() {
            for _ in 0..=times {
                refusals.count(refusal);
            }
        }
        let expected = Refused {
            not_found: 1,
            circuit_open: 2,
            shard_overloaded: 3,
            rate_limited: 4,
            store_full: 5,
        };
        assert_eq!(refusals.read(), expected);
    }

    #[test]
    fn nothing_is_lost_between_threads() {
        const ROUNDS: u64 = if cfg!(miri) { 20 } else { 10_000 };
        let refusals = Refusals::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..ROUNDS).for_each(|_| refusals.count(Refusal::RateLimited)));
            }
        });
        assert_eq!(refusals.read().rate_limited, 4 * ROUNDS);
    }

    /// More threads than have counts of their own where that is feasible.
    #[test]
    fn no_passage_is_lost_between_threads() {
        const ROUNDS: u64 = if cfg!(miri) { 20 } else { 10_000 };
        const THREADS: u64 = 6;
        for shards in [1, 64, 1_024] {
            let passages = Passages::new(shards);
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        for round in 0..ROUNDS {
                            passages.count(round as usize % shards);
                            passages.count(shards - 1);
                        }
                    });
                }
            });
            let all: u64 = (0..shards).map(|shard| passages.read(shard)).sum();
            assert_eq!(all, 2 * THREADS * ROUNDS);
            assert!(passages.read(shards - 1) >= THREADS * ROUNDS);
        }
    }

    #[test]
    fn threads_beyond_the_owners_share_counts() {
        let passages = Passages::new(2);
        let threads = OWNERS as u64 + 8;
        for _ in 0..threads {
            std::thread::scope(|scope| {
                scope.spawn(|| passages.count(1));
            });
        }
        assert_eq!((passages.read(0), passages.read(1)), (0, threads));
        assert!(passages.stripes[OWNERS].get().is_some());
    }
}
