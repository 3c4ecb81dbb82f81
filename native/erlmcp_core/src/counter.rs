//! Counts of refused messages, by reason.
//!
//! Only refusals write here, each to one word of the shard that refused, so that an admitted message costs nothing.
//! Counts only grow; rates are differences of two readings. Loads are relaxed: several words are not read as one
//! snapshot.

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
}
