//! Keyed limiters: against one token bucket a key that is never forgotten, and under contention.
#![cfg(not(loom))]

#[path = "contention.rs"]
mod contention;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use contention::until_contended;
use erlmcp_core::clock::{Clock, FakeClock};
use erlmcp_core::keyed_limiter::{KeyedLimiter, KeyedRefusal};
use erlmcp_core::token_bucket::{Change, Limits, Refused, TokenBucket};
use proptest::prelude::*;

const SECOND: u64 = 1_000_000_000;

fn limits(capacity: u64, rate_per_second: f64) -> Limits {
    Limits::new(capacity, rate_per_second).unwrap()
}

fn take(limiter: &KeyedLimiter, key: u8, n: u64, clock: &FakeClock) -> Taken {
    limiter.take(limiter.key(0, &[key]), n, clock)
}

/// As [`take`], until all places have been examined.
fn take_persistently(limiter: &KeyedLimiter, key: u8, n: u64, clock: &FakeClock) -> Taken {
    (0..=limiter.max_keys())
        .map(|_| take(limiter, key, n, clock))
        .find(|taken| *taken != Err(KeyedRefusal::LimiterFull))
        .unwrap_or(Err(KeyedRefusal::LimiterFull))
}

type Taken = Result<Option<u64>, KeyedRefusal>;

#[derive(Debug, Clone, Copy)]
enum Step {
    Take(u8, u64),
    Refund(u8, u64),
    Advance(u64),
}

fn steps(keys: u8) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..keys, 0..12u64).prop_map(|(key, n)| Step::Take(key, n)),
        1 => (0..keys, 0..12u64).prop_map(|(key, n)| Step::Refund(key, n)),
        // Up to twice the time in which a bucket of ten tokens is refilled.
        2 => (0..20 * SECOND).prop_map(Step::Advance),
    ];
    prop::collection::vec(step, 1..200)
}

/// Buckets that are never forgotten.
struct Kept<'a> {
    clock: &'a FakeClock,
    limits: Limits,
    buckets: HashMap<u8, TokenBucket>,
}

impl Kept<'_> {
    fn of(&mut self, key: u8) -> &TokenBucket {
        self.buckets
            .entry(key)
            .or_insert_with(|| TokenBucket::new(Some(self.limits), self.clock))
    }
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 2_000 },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    /// Forgetting gives nobody a token and takes none away.
    #[test]
    fn a_key_has_what_its_own_bucket_would_have(steps in steps(20)) {
        let (clock, limits) = (FakeClock::at_ns(0), limits(10, 1.0));
        let limiter = KeyedLimiter::new(Some(limits), 100, &clock);
        let mut kept = Kept { clock: &clock, limits, buckets: HashMap::new() };
        for step in steps {
            match step {
                Step::Take(key, n) => {
                    let ideal = kept.of(key).take(&clock, n).map_err(KeyedRefusal::Refused);
                    prop_assert_eq!(take(&limiter, key, n, &clock), ideal);
                }
                Step::Refund(key, n) => {
                    kept.of(key).refund(&clock, n);
                    limiter.refund(limiter.key(0, &[key]), n, &clock);
                }
                Step::Advance(ns) => clock.advance_ns(ns),
            }
            for key in 0..20 {
                let state = limiter.state(limiter.key(0, &[key]), &clock);
                prop_assert_eq!(state, kept.of(key).state(&clock));
            }
        }
    }

    /// There are never more buckets than `max_keys`, and only a limiter whose buckets all lack something refuses a
    /// new key.
    #[test]
    fn a_full_limiter_refuses_only_new_keys(max_keys in 1..8u64, steps in steps(20)) {
        let (clock, limits) = (FakeClock::at_ns(0), limits(10, 1.0));
        let limiter = KeyedLimiter::new(Some(limits), max_keys, &clock);
        let mut kept = Kept { clock: &clock, limits, buckets: HashMap::new() };
        let mut used: HashMap<u8, u64> = HashMap::new();
        for step in steps {
            match step {
                Step::Take(key, n) => match take_persistently(&limiter, key, n, &clock) {
                    Err(KeyedRefusal::LimiterFull) => {
                        // A bucket is full again ten seconds after its last use, and forgotten a millisecond later.
                        let full = clock.now_ns().saturating_sub(10 * SECOND + 2_000_000);
                        let lacking = used.iter().filter(|(other, at)| **other != key && **at >= full);
                        prop_assert!(n > 0 && lacking.count() as u64 >= max_keys);
                    }
                    taken => {
                        let ideal = kept.of(key).take(&clock, n).map_err(KeyedRefusal::Refused);
                        prop_assert_eq!(taken, ideal);
                        if taken.is_ok() && n > 0 {
                            used.insert(key, clock.now_ns());
                        }
                    }
                },
                Step::Refund(key, n) => {
                    kept.of(key).refund(&clock, n);
                    limiter.refund(limiter.key(0, &[key]), n, &clock);
                }
                Step::Advance(ns) => clock.advance_ns(ns),
            }
            prop_assert!(limiter.len() <= max_keys);
        }
    }

    /// What is refunded is as if it had never been taken, up to the unit that rounding loses.
    #[test]
    fn a_refund_undoes_an_acquisition(
        capacity in 1..1_000u64,
        before in 0..1_000u64,
        taken in 0..1_000u64,
        refunded in 0..1_000u64,
        waits in (0..2 * SECOND, 0..2 * SECOND, 0..2 * SECOND),
    ) {
        let clock = FakeClock::at_ns(0);
        let [one, other] = [(); 2].map(|()| TokenBucket::new(Some(limits(capacity, 100.0)), &clock));
        for bucket in [&one, &other] {
            let _ = bucket.take(&clock, before);
        }
        clock.advance_ns(waits.0);
        let refunded = refunded.min(taken);
        let is_taken = one.take(&clock, taken).is_ok();
        let _ = other.take(&clock, if is_taken { taken - refunded } else { 0 });
        clock.advance_ns(waits.1);
        if is_taken {
            one.refund(&clock, refunded);
        }
        clock.advance_ns(waits.2);
        let [one, other] = [one, other].map(|bucket| bucket.state(&clock).tokens.unwrap());
        prop_assert!(one <= other && other <= one + 1, "{} {}", one, other);
    }
}

/// A flood of keys changes nothing but that new keys are refused.
#[test]
fn a_flood_of_keys_moves_no_other_key() {
    let clock = FakeClock::at_ns(0);
    let limiter = KeyedLimiter::new(Some(limits(10, 1.0)), 100, &clock);
    assert_eq!(take(&limiter, 0, 10, &clock), Ok(Some(0)));
    let flood = if cfg!(miri) { 300 } else { 1_000_000_u64 };
    let mut refused = 0;
    for n in 0..flood {
        let key = limiter.key(1, &n.to_le_bytes());
        match limiter.take(key, 1, &clock) {
            Err(KeyedRefusal::LimiterFull) => refused += 1,
            taken => assert_eq!(taken, Ok(Some(9))),
        }
        assert!(limiter.len() <= 100);
    }
    assert_eq!(refused, flood - 99);
    let empty = take(&limiter, 0, 1, &clock);
    assert!(matches!(
        empty,
        Err(KeyedRefusal::Refused(Refused::RateLimited { .. }))
    ));
    // Once they are full again they make room for others.
    clock.advance_ns(11 * SECOND);
    assert_eq!(take(&limiter, 1, 1, &clock), Ok(Some(9)));
    assert_eq!(take(&limiter, 0, 10, &clock), Ok(Some(0)));
}

/// Buckets that are not used any more are forgotten while others are made.
#[test]
fn unused_buckets_are_forgotten() {
    let clock = FakeClock::at_ns(0);
    let limiter = KeyedLimiter::new(Some(limits(1, 1.0)), 1_000_000, &clock);
    for n in 0..if cfg!(miri) { 500 } else { 100_000_u64 } {
        let key = limiter.key(1, &n.to_le_bytes());
        assert_eq!(limiter.take(key, 1, &clock), Ok(Some(0)));
        // A hundred of them are not full. The hand visits all places in half as many insertions.
        clock.advance_ns(SECOND / 100);
        assert!(limiter.len() <= 300, "{} after {n}", limiter.len());
    }
}

#[test]
fn limits_change_for_all_keys() {
    let clock = FakeClock::at_ns(0);
    let limiter = KeyedLimiter::new(Some(limits(10, 1.0)), 100, &clock);
    assert_eq!(take(&limiter, 1, 4, &clock), Ok(Some(6)));
    let capacity = |n| Change {
        capacity: Some(n),
        rate_per_second: None,
    };
    limiter.change_limits(Some(capacity(20)), &clock).unwrap();
    assert_eq!(limiter.limits(), Some(limits(20, 1.0)));
    // A key with a bucket keeps its tokens, less what rounding loses.
    let left = limiter.state(limiter.key(0, &[1]), &clock).tokens;
    assert!(matches!(left, Some(5..=6)), "{left:?}");
    // So does a key without one, which was full.
    assert_eq!(take(&limiter, 2, 0, &clock), Ok(Some(10)));
    clock.advance_ns(10 * SECOND);
    assert_eq!(take(&limiter, 2, 0, &clock), Ok(Some(20)));
    limiter.change_limits(None, &clock).unwrap();
    assert_eq!(take(&limiter, 1, 1 << 40, &clock), Ok(None));
    assert_eq!(limiter.limits(), None);
    limiter.change_limits(Some(capacity(5)), &clock).unwrap();
    assert_eq!(limiter.limits(), Some(limits(5, 1.0)));
    assert_eq!(
        take(&limiter, 3, 6, &clock),
        Err(KeyedRefusal::Refused(Refused::ExceedsCapacity))
    );
}

/// A capacity that is lowered and raised again makes no tokens, whether the bucket was forgotten in between or not.
#[test]
fn a_lower_capacity_for_a_moment_makes_no_tokens() {
    let clock = FakeClock::at_ns(0);
    let capacity = |n| Change {
        capacity: Some(n),
        rate_per_second: None,
    };
    for others in [0, 10] {
        let limiter = KeyedLimiter::new(Some(limits(1000, 1.0)), 100, &clock);
        assert_eq!(take(&limiter, 1, 1000, &clock), Ok(Some(0)));
        limiter.change_limits(Some(capacity(1)), &clock).unwrap();
        clock.advance_ns(2 * SECOND);
        for other in 0..others {
            assert!(take(&limiter, 100 + other, 1, &clock).is_ok());
        }
        limiter.change_limits(Some(capacity(1000)), &clock).unwrap();
        let left = limiter.state(limiter.key(0, &[1]), &clock).tokens;
        assert!(matches!(left, Some(0..=1)), "{left:?}");
    }
}

/// A clock whose first reading is followed by something else that happens, as if the thread were suspended there.
struct Suspended<'a> {
    clock: &'a FakeClock,
    meanwhile: RefCell<Option<Box<dyn FnOnce() + 'a>>>,
}

impl Clock for Suspended<'_> {
    fn now_ns(&self) -> u64 {
        let now_ns = self.clock.now_ns();
        if let Some(meanwhile) = self.meanwhile.take() {
            meanwhile();
        }
        now_ns
    }
}

/// A caller finds no bucket and is suspended after it has read the clock. Meanwhile the key gets a bucket, which is
/// emptied, refilled and forgotten. The caller's tokens belong to the time at which its bucket is there.
#[test]
fn an_acquisition_is_not_older_than_its_bucket() {
    let clock = FakeClock::at_ns(0);
    let limiter = KeyedLimiter::new(Some(limits(10, 10.0)), 100, &clock);
    let key = limiter.key(0, &[1]);
    let meanwhile = Box::new(|| {
        assert_eq!(limiter.take(key, 10, &clock), Ok(Some(0)));
        clock.advance_ns(2 * SECOND);
        assert!(take(&limiter, 2, 1, &clock).is_ok());
        assert_eq!(limiter.len(), 1, "not forgotten");
    });
    let suspended = Suspended {
        clock: &clock,
        meanwhile: RefCell::new(Some(meanwhile)),
    };
    assert_eq!(limiter.take(key, 10, &suspended), Ok(Some(0)));
    let more = limiter.take(key, 1, &clock);
    assert!(
        matches!(more, Err(KeyedRefusal::Refused(_))),
        "{more:?} of a bucket that has just been emptied"
    );
}

/// After the clock has gone back, an unused bucket is forgotten as soon as its own limits allow.
#[test]
fn buckets_are_forgotten_after_the_clock_has_gone_back() {
    let clock = FakeClock::at_ns(1_000_000 * SECOND);
    let limiter = KeyedLimiter::new(Some(limits(10, 1.0)), 3, &clock);
    clock.advance_ns(500_000 * SECOND);
    for key in 0..3 {
        assert!(take(&limiter, key, 1, &clock).is_ok());
    }
    clock.set_ns(1_000_000 * SECOND + 1);
    assert_eq!(take(&limiter, 9, 1, &clock), Err(KeyedRefusal::LimiterFull));
    clock.advance_ns(11 * SECOND);
    assert!(take_persistently(&limiter, 9, 1, &clock).is_ok());
}

/// Keys whose buckets are full, and are being forgotten for others, are acquired from by all threads at once: none
/// gives more than it holds. The clock stands still in each round.
#[test]
fn no_key_is_overdrawn_while_buckets_are_forgotten() {
    const THREADS: u64 = 4;
    const CAPACITY: u64 = 5;
    const MAX_KEYS: u64 = 8;
    const KEYS: u64 = 6;
    let clock = FakeClock::at_ns(0);
    let limiter = KeyedLimiter::new(Some(limits(CAPACITY, 1.0)), MAX_KEYS, &clock);
    let (mut round, mut shared) = (0, 0);
    until_contended(|| {
        round += 1;
        clock.advance_ns(10 * SECOND);
        let taken: Vec<AtomicU64> = (0..KEYS).map(|_| AtomicU64::new(0)).collect();
        let takers: Vec<AtomicU64> = (0..KEYS).map(|_| AtomicU64::new(0)).collect();
        let barrier = Barrier::new(THREADS as usize);
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let (limiter, clock, taken, takers) = (&limiter, &clock, &taken, &takers);
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    for n in 0..KEYS {
                        // Half of the keys are those of the round before.
                        let n = (n + thread) % KEYS;
                        let key = limiter.key(2, &(round * KEYS / 2 + n).to_le_bytes());
                        let mut mine = 0;
                        // Until it is empty, or there is no room for it.
                        while limiter.take(key, 1, clock).is_ok() {
                            mine += 1;
                        }
                        taken[n as usize].fetch_add(mine, Ordering::Relaxed);
                        takers[n as usize].fetch_add(u64::from(mine > 0), Ordering::Relaxed);
                    }
                });
            }
        });
        for taken in taken {
            let taken = taken.into_inner();
            assert!(taken <= CAPACITY, "{taken} tokens");
        }
        assert!(limiter.len() <= MAX_KEYS);
        shared += takers
            .into_iter()
            .filter(|takers| takers.load(Ordering::Relaxed) > 1)
            .count();
        round >= 2_000 && shared >= 100
    });
}
