//! Counts of what was refused, by reason.
//!
//! Refusals alone write here, each one word of the shard that refused, so that an admitted message
//! pays nothing. Counts only grow; whoever wants rates takes differences. They are relaxed: a sum
//! over several words is no snapshot.

use crate::registry::Refusal;
use crate::sync::{AtomicU64, Ordering};

/// So many messages were refused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refused {
    /// Whose target was not registered.
    pub not_found: u64,
    /// By the circuit.
    pub circuit_open: u64,
    /// By the admission control of the shard.
    pub shard_overloaded: u64,
    /// By the bucket that pays.
    pub rate_limited: u64,
}

/// One shard's. Apart from what admitted messages write: aligned so that it shares no cache line (or
/// pair of lines, as x86 fetches them) with that.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Refusals([AtomicU64; 4]);

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
