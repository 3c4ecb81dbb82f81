//! Token buckets, admission control, circuit breaker and the guarded route under real contention,
//! by the real clock. Each test asserts an invariant, and that threads did contend; otherwise it proves
//! nothing.
//!
//! Takes about ten seconds on two cores in release.
#![cfg(not(loom))]

#[path = "contention.rs"]
mod contention;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use contention::until_contended;
use erlmcp_core::admission::{Admission, Pass, RECEIVER_LIMIT, Sampling, Taken, Threshold};
use erlmcp_core::circuit_breaker::{CircuitBreaker, Config, Permit, State};
use erlmcp_core::clock::{Clock, FakeClock, TscClock};
use erlmcp_core::counter::Refused as RefusedCounts;
use erlmcp_core::registry::{
    self, BucketError, Charged, Delivery, EntryLimits, Events, Namespace, Refusal, Registry,
    Undelivered,
};
use erlmcp_core::token_bucket::{Limits, Refused, TokenBucket};

const THREADS: usize = 8;
const TRIALS: usize = if cfg!(miri) { 1 } else { 100 };
const ROUNDS: u64 = if cfg!(miri) { 20 } else { 20_000 };
/// The duration of tests without a count of their own.
const TIME: Duration = Duration::from_millis(if cfg!(miri) { 20 } else { 1500 });

/// Runs `f` on all threads at once, and `beside` repeatedly on this one until they are done.
fn on_threads<R: Send>(f: impl Fn(usize) -> R + Sync, mut beside: impl FnMut()) -> Vec<R> {
    let (barrier, running) = (Barrier::new(THREADS), AtomicUsize::new(THREADS));
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|n| {
                let (f, barrier, running) = (&f, &barrier, &running);
                scope.spawn(move || {
                    barrier.wait();
                    // Counted down even if an assertion has failed.
                    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| f(n)));
                    running.fetch_sub(1, Ordering::AcqRel);
                    result
                })
            })
            .collect();
        while running.load(Ordering::Acquire) > 0 {
            beside();
            thread::yield_now();
        }
        let results = threads.into_iter().map(|t| t.join().unwrap());
        results
            .map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn limits(capacity: u64, rate_per_second: f64) -> Limits {
    Limits::new(capacity, rate_per_second).unwrap()
}

// ---- Token buckets ----

/// Acquires one token after the other until the bucket has refused so many times. Returns the tokens
/// acquired, and how often another thread had acquired the previous one.
fn empty(
    bucket: &TokenBucket,
    clock: &TscClock,
    refusals: u64,
    me: usize,
    latest: &AtomicUsize,
) -> (u64, u64) {
    let (mut taken, mut refused, mut crossed) = (0, 0, 0);
    while refused < refusals {
        if bucket.take(clock, 1).is_ok() {
            taken += 1;
            crossed += u64::from(latest.swap(me, Ordering::Relaxed) != me);
        } else {
            refused += 1;
        }
    }
    (taken, crossed)
}

fn sums(counts: Vec<(u64, u64)>) -> (u64, u64) {
    counts
        .into_iter()
        .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

#[test]
fn a_bucket_is_never_overdrawn() {
    let clock = TscClock::new();
    let (mut trial, mut trials_crossed) = (0, 0);
    until_contended(|| {
        trial += 1;
        // Every other bucket is refilled as fast as it is emptied.
        let limits = limits(200_000, if trial % 2 == 0 { 1000.0 } else { 3_000_000.7 });
        let bucket = TokenBucket::new(Some(limits), &clock);
        let began = clock.now_ns();
        let latest = AtomicUsize::new(0);
        let counts = on_threads(|n| empty(&bucket, &clock, 200, n, &latest), || ());
        let (taken, crossed) = sums(counts);
        let seconds = (clock.now_ns() - began) as f64 / 1e9;
        let most = limits.capacity() as f64 + limits.rate_per_second() * seconds;
        assert!(taken as f64 <= most, "{taken} of {most}");
        assert!(taken >= 199_999, "only {taken}");
        trials_crossed += usize::from(crossed > THREADS as u64);
        trial >= TRIALS && trials_crossed >= TRIALS / 4
    });
}

/// Whatever limits are in force, no more tokens are given than under the largest of them.
#[test]
fn a_bucket_is_not_overdrawn_while_its_limits_change() {
    let clock = TscClock::new();
    let all = [
        limits(3000, 1000.0),
        limits(5000, 1e6),
        limits(2, 0.5),
        limits(4999, 999_999.5),
    ];
    let (mut trials, mut changes, mut crossed) = (0, 0, 0);
    until_contended(|| {
        trials += 1;
        let bucket = TokenBucket::new(Some(all[1]), &clock);
        let (began, latest) = (clock.now_ns(), AtomicUsize::new(0));
        let counts = on_threads(
            |n| empty(&bucket, &clock, ROUNDS * 20, n, &latest),
            || {
                bucket.set_limits(Some(all[changes % 4]), &clock);
                changes += 1;
                thread::sleep(Duration::from_micros(changes as u64 % 7 * 100));
            },
        );
        let sums = sums(counts);
        let seconds = (clock.now_ns() - began) as f64 / 1e9;
        let most = 5000.0 + 1e6 * seconds;
        assert!(sums.0 as f64 <= most, "{} of {most}", sums.0);
        crossed += sums.1;
        trials >= TRIALS / 10 && changes > 40 && crossed > 10 * THREADS as u64
    });
}

/// An acquisition is not refused if the limits before and after a change both allow it, and a bucket that
/// holds tokens never looks empty.
#[test]
fn a_change_of_limits_refuses_nobody() {
    until_contended(|| {
        let clock = TscClock::new();
        let most = (1 << 32) - 1;
        let all = [
            limits(most, 1e9),
            limits(most - 1, 0.9e9),
            limits(most, 7e8),
        ];
        let bucket = TokenBucket::new(Some(all[0]), &clock);
        let mut changes = 0;
        let counts = on_threads(
            |_| {
                let mut changed = 0;
                for round in 0..ROUNDS * 10 {
                    let taken = bucket.take(&clock, round % 2);
                    let left = taken.expect("not refused").expect("limits");
                    assert!(left > most / 2, "{left} left");
                    changed += u64::from(bucket.limits() != Some(all[0]));
                }
                changed
            },
            || {
                let next = all[changes % all.len()];
                bucket.set_limits(Some(next), &clock);
                bucket.take(&clock, 1).expect("not refused");
                changes += 1;
            },
        );
        counts.iter().sum::<u64>() > 0 && changes > 3
    });
}

// ---- Buckets of entries ----

fn registry(clock: &impl Clock) -> Registry<u64> {
    Registry::new(registry::Limits::new(4, 1 << 16, 100).unwrap(), clock)
}

fn register(registry: &Registry<u64>, namespace: Namespace, bytes: &[u8], address: u64) -> bool {
    let shard = (address % 4) as u16;
    let id = registry.id(0, bytes);
    registry
        .register(namespace, id, shard, address, None, |_| address)
        .is_ok()
}

/// An entry that alternates between own and shared limits, and is written anew, always has limits.
#[test]
fn an_entry_is_never_without_limits() {
    until_contended(|| {
        let clock = TscClock::new();
        let registry = registry(&clock);
        registry.set_limits(Some(limits(5, 1.0)), &clock);
        register(&registry, Namespace::Connection, b"a", 1);
        let id = registry.id(0, b"a");
        let (namespace, done) = (Namespace::Connection, AtomicBool::new(false));
        let mut changes = 0u64;
        let started = Instant::now();
        let refusals = on_threads(
            |n| {
                let mut refusals = 0u64;
                while !done.load(Ordering::Relaxed) {
                    match registry.take_tokens(namespace, &id, (n % 2) as u64, &clock) {
                        Ok(left) => assert!(left.is_some(), "no limits"),
                        Err(BucketError::Refused(Refused::RateLimited { .. })) => refusals += 1,
                        Err(error) => panic!("{error:?}"),
                    }
                }
                refusals
            },
            || {
                for limits in [
                    EntryLimits::Own(Some(limits(7, 1.0).into())),
                    EntryLimits::Shared,
                ] {
                    let changed = registry.set_entry_limits(namespace, &id, limits, &clock);
                    changed.unwrap();
                }
                // The entry is written anew, with the same tokens.
                let written =
                    registry.exchange_lease(namespace, &id, |held| *held == 1, 1, Delivery::Single);
                assert_eq!(written, Some(1));
                changes += 1;
                done.store(started.elapsed() > TIME / 2, Ordering::Relaxed);
            },
        );
        refusals.into_iter().sum::<u64>() > 0 && changes > 10
    });
}

/// An entry that holds tokens all the time refuses no acquisition while it gets limits of its own and then the
/// shared ones again, and is written anew; and the tokens and limits that it reports belong together.
#[test]
fn an_entry_refuses_nobody_while_its_limits_move() {
    until_contended(|| {
        let clock = TscClock::new();
        let registry = registry(&clock);
        let most = (1 << 32) - 1;
        let shared = limits(most, 1e9);
        let own = limits(most - 1, 1e9);
        registry.set_limits(Some(shared), &clock);
        register(&registry, Namespace::Connection, b"a", 1);
        let id = registry.id(0, b"a");
        let namespace = Namespace::Connection;
        let mut changes = 0;
        let counts = on_threads(
            |n| {
                let mut seen = [0u64; 2];
                for _ in 0..ROUNDS * 5 {
                    if n == 0 {
                        let state = registry.bucket_state(namespace, &id, &clock).unwrap();
                        let (tokens, limits) = (state.tokens.unwrap(), state.limits.unwrap());
                        assert!(
                            most / 2 < tokens && tokens <= limits.capacity(),
                            "{state:?}"
                        );
                        seen[usize::from(limits == own)] += 1;
                    } else {
                        let taken = registry.take_tokens(namespace, &id, 1, &clock);
                        let left = taken.expect("not refused").expect("limits");
                        assert!(left > most / 2, "{left} left");
                    }
                }
                seen
            },
            || {
                for limits in [EntryLimits::Own(Some(own.into())), EntryLimits::Shared] {
                    registry
                        .set_entry_limits(namespace, &id, limits, &clock)
                        .unwrap();
                }
                // The entry is written anew, with the same tokens.
                let written =
                    registry.exchange_lease(namespace, &id, |held| *held == 1, 1, Delivery::Single);
                assert_eq!(written, Some(1));
                changes += 1;
            },
        );
        counts[0].iter().all(|times| *times > 0) && changes > 10
    });
}

/// Tokens acquired, by routes and without, while an entry gets limits of its own and then the shared ones again, and is written
/// anew, are acquired once: the entry never gives more than it held.
#[test]
fn an_entry_is_not_overdrawn_while_its_limits_move() {
    until_contended(|| {
        let clock = TscClock::new();
        let registry = registry(&clock);
        let capacity = ROUNDS * 100;
        registry.set_limits(Some(limits(capacity, 1.0)), &clock);
        register(&registry, Namespace::Connection, b"a", 1);
        let (id, namespace) = (registry.id(0, b"a"), Namespace::Connection);
        let circuit = CircuitBreaker::new(None, &clock).unwrap();
        let is_routed = || {
            let mut events = Events::default();
            let charged = Charged::Target;
            registry
                .route(namespace, &id, charged, &circuit, &clock, &mut events)
                .is_ok()
        };
        let (began, latest) = (clock.now_ns(), AtomicUsize::new(0));
        let mut changes = 0;
        let counts = on_threads(
            |n| {
                let (mut taken, mut refused, mut crossed) = (0, 0, 0);
                while refused < 1000 {
                    let is_taken = match n % 2 {
                        0 => is_routed(),
                        _ => registry.take_tokens(namespace, &id, 1, &clock).is_ok(),
                    };
                    if is_taken {
                        taken += 1;
                        crossed += u64::from(latest.swap(n, Ordering::Relaxed) != n);
                    } else {
                        refused += 1;
                    }
                }
                (taken, crossed)
            },
            || {
                let own = EntryLimits::Own(Some(limits(capacity, 1.0).into()));
                for limits in [own, EntryLimits::Shared] {
                    registry
                        .set_entry_limits(namespace, &id, limits, &clock)
                        .unwrap();
                }
                // The entry is written anew, with the same tokens.
                let written =
                    registry.exchange_lease(namespace, &id, |held| *held == 1, 1, Delivery::Single);
                assert_eq!(written, Some(1));
                changes += 1;
            },
        );
        let (taken, crossed) = sums(counts);
        let most = capacity + 2 + (clock.now_ns() - began) / 1_000_000_000;
        assert!(taken <= most, "{taken} of {most}");
        crossed > THREADS as u64 && changes > 10
    });
}

/// Own limits that replace other own limits apply to the same bucket.
#[test]
fn an_entry_is_not_overdrawn_while_its_own_limits_change() {
    until_contended(|| {
        let clock = TscClock::new();
        let registry = registry(&clock);
        register(&registry, Namespace::Connection, b"a", 1);
        let (id, namespace) = (registry.id(0, b"a"), Namespace::Connection);
        let capacity = ROUNDS * 100;
        let changes = AtomicU64::new(0);
        let change = || {
            let n = changes.fetch_add(1, Ordering::Relaxed);
            let own = EntryLimits::Own(Some(limits(capacity + n % 2, 1.0).into()));
            let changed = registry.set_entry_limits(namespace, &id, own, &clock);
            changed.unwrap();
        };
        change();
        let began = clock.now_ns();
        let counts = on_threads(
            |_| {
                let (mut taken, mut refused) = (0u64, 0u64);
                while refused < 1000 {
                    if taken % 1000 == 0 {
                        change();
                    }
                    match registry.take_tokens(namespace, &id, 1, &clock) {
                        Ok(_) => taken += 1,
                        Err(_) => refused += 1,
                    }
                }
                (taken, refused)
            },
            || (),
        );
        let threads = counts.iter().filter(|count| count.0 > 0).count();
        let (taken, _) = sums(counts);
        let most = capacity + 2 + (clock.now_ns() - began) / 1_000_000_000;
        assert!(taken <= most, "{taken} of {most}");
        threads > 1 && changes.into_inner() > 100
    });
}

/// Threads change the shared limits concurrently: the limits in force are enforced.
#[test]
fn limits_that_are_set_are_in_use() {
    until_contended(|| {
        let clock = FakeClock::at_ns(0);
        let registry = registry(&clock);
        let turn = Barrier::new(THREADS);
        let counts = on_threads(
            |n| {
                let mut counts = [0; 2];
                for _ in 0..ROUNDS.div_ceil(4) {
                    turn.wait();
                    let limits = (n % 2 == 0).then(|| limits(1, 1.0));
                    registry.set_limits(limits, &clock);
                    turn.wait();
                    let is_limited = registry.shared_limits().is_some();
                    assert!(
                        registry.has_token_buckets() || !is_limited,
                        "limits are not enforced"
                    );
                    counts[usize::from(is_limited)] += 1;
                }
                counts
            },
            || (),
        );
        let both = |counts: &[i32; 2]| counts.iter().all(|times| *times > 0);
        counts.iter().all(both)
    });
}

// ---- Circuit breaker ----

#[test]
fn probes_under_way_are_bounded() {
    until_contended(|| {
        let clock = FakeClock::at_ns(0);
        let config = Config {
            probe_limit: 3,
            success_threshold: 1000,
            timeout_ms: 10,
            ..Config::default()
        };
        let (mut refused, most) = (0, AtomicU64::new(0));
        for _ in 0..TRIALS {
            let circuit = CircuitBreaker::new(Some(config), &clock).unwrap();
            assert!(circuit.force(true, &clock));
            clock.advance_ns(10_000_000);
            let under_way = AtomicU64::new(0);
            let told = on_threads(
                |n| {
                    let (mut half_opened, mut closed, mut refused) = (0, 0, 0);
                    for turn in n.. {
                        let permit = match circuit.check(&clock) {
                            Ok(Permit::Free) => break,
                            Ok(permit) => permit,
                            Err(_) => {
                                refused += 1;
                                thread::yield_now();
                                continue;
                            }
                        };
                        half_opened += u64::from(permit == Permit::Probe { is_first: true });
                        let probes = under_way.fetch_add(1, Ordering::AcqRel) + 1;
                        assert!(probes <= 3, "{probes} probes under way");
                        most.fetch_max(probes, Ordering::Relaxed);
                        thread::yield_now();
                        under_way.fetch_sub(1, Ordering::AcqRel);
                        if turn % 4 == 0 {
                            circuit.release_probe();
                        } else {
                            closed += u64::from(circuit.record_success(&clock));
                        }
                    }
                    (half_opened, closed, refused)
                },
                || (),
            );
            assert_eq!(told.iter().map(|told| told.0).sum::<u64>(), 1);
            assert_eq!(told.iter().map(|told| told.1).sum::<u64>(), 1);
            assert_eq!(circuit.stats(&clock).state, State::Closed);
            refused += told.iter().map(|told| told.2).sum::<u64>();
        }
        refused > 0 && most.into_inner() == 3
    });
}

/// Each opening is reported to exactly one caller, the one whose failure has caused it.
#[test]
fn one_failure_opens_the_circuit() {
    until_contended(|| {
        let clock = FakeClock::at_ns(0);
        let mut openers = [0; THREADS];
        for _ in 0..TRIALS * 5 {
            let circuit = CircuitBreaker::new(Some(Config::default()), &clock).unwrap();
            let told = on_threads(
                |_| (0..10).filter(|_| circuit.record_failure(&clock)).count(),
                || (),
            );
            assert_eq!(told.iter().sum::<usize>(), 1);
            assert_eq!(circuit.state(&clock), State::Open);
            for (opener, times) in openers.iter_mut().zip(told) {
                *opener += times;
            }
        }
        openers.iter().filter(|times| **times > 0).count() > 1
    });
}

/// Openings, closings and all other operations at random: each transition is reported to the caller that has
/// made it, so that the reported transitions form a path.
#[test]
fn changes_that_are_told_add_up() {
    until_contended(|| {
        let clock = TscClock::new();
        let config = Config {
            failure_threshold: 3,
            success_threshold: 2,
            timeout_ms: 0,
            probe_limit: 2,
            ..Config::default()
        };
        let circuit = CircuitBreaker::new(Some(config), &clock).unwrap();
        let told = on_threads(
            |n| {
                let (mut half_opened, mut closed, mut opened) = (0, 0, 0);
                for round in 0..ROUNDS {
                    if (round + n as u64) % 5 < 2 {
                        opened += i64::from(circuit.record_failure(&clock));
                    } else if let Ok(Permit::Probe { is_first }) = circuit.check(&clock) {
                        half_opened += i64::from(is_first);
                        if round % 7 == 0 {
                            thread::yield_now();
                        }
                        closed += i64::from(circuit.record_success(&clock));
                    }
                }
                (half_opened, closed, opened)
            },
            || (),
        );
        let (half_opened, closed, opened) = told
            .into_iter()
            .fold((0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2));
        // Only an opening leaves closed, only a probe leaves open, and an opening or a closing leaves
        // half open. So as many openings leave closed as closings enter it, and all other openings lead
        // from half open to open.
        let (now_open, now_half_open) = match circuit.state(&clock) {
            // Half open since its timeout, which was reported to no caller.
            State::HalfOpen if circuit.check(&clock) == Ok(Permit::Probe { is_first: true }) => {
                (1, 0)
            }
            State::HalfOpen => (0, 1),
            State::Open => (1, 0),
            State::Closed | State::Off => (0, 0),
        };
        assert_eq!(opened - half_opened, now_open, "openings");
        let from_half_open = half_opened - closed - now_half_open;
        assert!(from_half_open >= 0 && from_half_open <= opened);
        closed > 0 && from_half_open > 0
    });
}

// ---- Admission control ----

/// A shard with some receivers, whose mailboxes are counters.
struct Shard {
    sampling: Sampling,
    admission: Admission,
    clock: TscClock,
    receivers: Vec<Receiver>,
    is_asked: AtomicBool,
}

#[derive(Default)]
struct Receiver {
    queued: AtomicI64,
    kept: [AtomicU32; 2],
}

const THRESHOLD: i64 = 500;
const RECEIVERS: usize = 20;
/// The number of registered receivers. Most are sent nothing.
const REGISTERED: u64 = 1_000;

impl Shard {
    fn new(threshold: Threshold) -> Self {
        let shard = Self {
            sampling: Sampling::new(600_000),
            admission: Admission::new(),
            clock: TscClock::new(),
            receivers: (0..RECEIVERS).map(|_| Receiver::default()).collect(),
            is_asked: AtomicBool::new(false),
        };
        shard.admission.set_threshold(threshold, REGISTERED);
        shard.sample(Pass::All);
        shard
    }

    /// Makes a pass, and the next one if that is due at once. Returns the number of mailboxes sampled.
    fn sample(&self, pass: Pass) -> usize {
        let mut looks = 0;
        let mut lengths = Vec::new();
        self.admission.begin_pass(pass, self.clock.now_ms());
        loop {
            lengths.clear();
            let taken = self.admission.take(false, |address| {
                let receiver = &self.receivers[address as usize - 1];
                lengths.push(Some(receiver.queued.load(Ordering::Acquire) as u64));
            });
            lengths.reverse();
            looks += lengths.len();
            match taken {
                Taken::Batch(number) => {
                    let lengths = lengths.iter().copied();
                    self.admission.report(number, lengths, self.clock.now_ms());
                }
                Taken::Done { is_due: false, .. } | Taken::Busy => return looks,
                Taken::Done { is_due: true, .. } => {
                    self.admission.begin_pass(Pass::Asked, self.clock.now_ms());
                }
            }
        }
    }

    fn queued(&self) -> i64 {
        let queued = |receiver: &Receiver| receiver.queued.load(Ordering::Acquire);
        self.receivers.iter().map(queued).sum()
    }

    /// Sends a message to a receiver, by one of its two ids, if there is room.
    fn send(&self, n: usize) -> bool {
        let now_ms = || self.clock.now_ms();
        let receiver = &self.receivers[n % RECEIVERS];
        let kept = &receiver.kept[n / RECEIVERS % 2];
        let mut to = self.admission.receiver((n % RECEIVERS) as u64 + 1, kept);
        let checked = self
            .admission
            .check(&mut to, &self.sampling, now_ms, || REGISTERED);
        match checked {
            Ok(()) => {
                let admitted = self.admission.admit(&to, &self.sampling, now_ms);
                if admitted.wants_sample {
                    self.is_asked.store(true, Ordering::Release);
                }
                receiver.queued.fetch_add(1, Ordering::AcqRel);
                true
            }
            Err(overloaded) => {
                if overloaded.wants_sample {
                    self.is_asked.store(true, Ordering::Release);
                }
                false
            }
        }
    }

    fn receive(&self, n: usize) {
        let some = |queued| (queued > 0).then(|| queued - 1);
        let _ = self.receivers[n % RECEIVERS].queued.fetch_update(
            Ordering::AcqRel,
            Ordering::Acquire,
            some,
        );
    }
}

/// Receivers keep up and stall by turns, and samplers sample all the time: never more messages than the threshold
/// are queued, except those between admission and sending, now or when their receiver was sampled. In the end the
/// depth is the number of queued messages.
#[test]
fn a_shard_stops_at_its_threshold() {
    until_contended(|| {
        let shard = Shard::new(Threshold::Exactly(THRESHOLD as u64));
        let started = Instant::now();
        let counts = on_threads(
            |n| {
                let (mut refused, mut most) = (0u64, 0);
                for round in n.. {
                    if started.elapsed() >= TIME {
                        break;
                    }
                    let is_slow = (started.elapsed().as_millis() / 50).is_multiple_of(2);
                    if n < 4 {
                        refused += u64::from(!shard.send(round * 7));
                        most = most.max(shard.queued());
                    } else if !is_slow {
                        shard.receive(round);
                    } else if n == 4 {
                        // A second sampler.
                        shard.sample(Pass::All);
                    }
                }
                (refused, most)
            },
            || {
                shard.sample(Pass::All);
            },
        );
        let most = counts.iter().map(|count| count.1).max().unwrap();
        // One message for each sender, and one for each that its sender had not sent when the receiver was sampled.
        let bound = THRESHOLD + 4 + 4 * RECEIVERS as i64;
        assert!(most <= bound, "{most} were queued");
        let is_contended = counts.iter().any(|count| count.0 > 0)
            && shard.admission.admitted() > 2 * THRESHOLD as u64;
        // No receiver receives any more: the shard is filled up to its threshold, and stays full.
        for round in 0.. {
            if !shard.send(round) {
                break;
            }
        }
        shard.sample(Pass::All);
        shard.sample(Pass::All);
        assert_eq!(shard.admission.depth() as i64, shard.queued());
        for round in 0.. {
            if !shard.send(round) {
                break;
            }
        }
        assert!(shard.queued() >= THRESHOLD);
        assert!(shard.admission.is_overloaded());
        // All receivers receive everything, and after two more samples of each no charge and no record is left.
        for receiver in &shard.receivers {
            receiver.queued.store(0, Ordering::Release);
        }
        for _ in 0..3 {
            shard.sample(Pass::All);
        }
        assert_eq!(shard.admission.depth(), 0);
        assert_eq!(shard.admission.active_receivers(), 0);
        assert!(shard.admission.pause());
        is_contended
    });
}

/// Under `Auto` one stalled receiver stops at its own limit; no message to the others is refused.
#[test]
fn a_receiver_stops_at_its_limit() {
    let shard = Shard::new(Threshold::Auto);
    let stopped = AtomicBool::new(false);
    let counts = on_threads(
        |n| {
            let mut refused = [0u64; 2];
            let mut round = n;
            while !stopped.load(Ordering::Acquire) {
                round += 1;
                let is_stalled = round % 4 != 0;
                let to = if is_stalled { 0 } else { 1 + round % 19 };
                if !shard.send(to) {
                    refused[usize::from(is_stalled)] += 1;
                    if is_stalled && refused[1] > 100 {
                        stopped.store(true, Ordering::Release);
                    }
                } else if !is_stalled {
                    shard.receive(to);
                }
                if shard.is_asked.swap(false, Ordering::AcqRel) {
                    shard.sample(Pass::Asked);
                }
            }
            refused
        },
        || {
            shard.sample(Pass::All);
        },
    );
    assert_eq!(counts.iter().map(|refused| refused[0]).sum::<u64>(), 0);
    // Messages sent while the receiver is sampled count twice until the next sample.
    shard.sample(Pass::All);
    while shard.send(0) {}
    let stalled = shard.receivers[0].queued.load(Ordering::Acquire) as u64;
    let most = RECEIVER_LIMIT + 2 * THREADS as u64;
    assert!((RECEIVER_LIMIT..=most).contains(&stalled), "{stalled}");
}

/// Samples are taken only on request, and receivers receive messages at once: no refusal lasts.
#[test]
fn a_shard_that_keeps_up_is_never_refused_for_long() {
    until_contended(|| {
        let shard = Shard::new(Threshold::Exactly(THRESHOLD as u64));
        let (started, mut samples) = (Instant::now(), 0);
        let last_sent = AtomicU64::new(shard.clock.now_ns());
        let counts = on_threads(
            |n| {
                let (mut sent, mut refused, mut longest) = (0u64, 0u64, 0);
                for round in n.. {
                    if started.elapsed() >= TIME {
                        break;
                    }
                    if shard.send(round * 7) {
                        shard.receive(round * 7);
                        let now = shard.clock.now_ns();
                        let before = last_sent.swap(now, Ordering::AcqRel);
                        longest = longest.max(now.saturating_sub(before));
                        sent += 1;
                    } else {
                        refused += 1;
                        thread::sleep(Duration::from_micros(10));
                    }
                }
                (sent, refused, longest)
            },
            || {
                // Also while the shard is overloaded, as managers do with their ticks.
                if shard.is_asked.swap(false, Ordering::AcqRel) {
                    shard.sample(Pass::Asked);
                    samples += 1;
                } else if shard.admission.is_overloaded() {
                    shard.sample(Pass::All);
                }
            },
        );
        let since = shard.clock.now_ns() - last_sent.into_inner();
        let longest = counts.iter().map(|count| count.2).fold(since, u64::max);
        let sent: u64 = counts.iter().map(|count| count.0).sum();
        let longest = Duration::from_nanos(longest);
        assert!(cfg!(miri) || longest < TIME / 2, "refused for {longest:?}");
        samples > 10 && sent > 10 * THRESHOLD as u64
    });
}

/// An overload is reported once, and its end once.
#[test]
fn overloads_are_told_in_turn() {
    until_contended(|| {
        let shard = Shard::new(Threshold::Exactly(THRESHOLD as u64));
        let (recoveries, started) = (AtomicU64::new(0), Instant::now());
        let entered: u64 = on_threads(
            |n| {
                let mut entered = 0;
                for round in n.. {
                    if started.elapsed() >= TIME / 3 {
                        break;
                    }
                    let receiver = &shard.receivers[round % RECEIVERS];
                    let address = (round % RECEIVERS) as u64 + 1;
                    let mut to = shard.admission.receiver(address, &receiver.kept[0]);
                    match shard.admission.check(&mut to, &shard.sampling, || 0, || 0) {
                        Ok(()) => {
                            shard.admission.admit(&to, &shard.sampling, || 0);
                        }
                        Err(overloaded) => entered += u64::from(overloaded.has_entered),
                    }
                }
                entered
            },
            || {
                shard.admission.begin_pass(Pass::All, 0);
                loop {
                    let mut looks = 0;
                    let has_recovered = match shard.admission.take(false, |_| looks += 1) {
                        Taken::Batch(number) => {
                            let lengths = vec![Some(0); looks];
                            shard.admission.report(number, lengths, 0).has_recovered
                        }
                        Taken::Done { has_recovered, .. } => has_recovered,
                        Taken::Busy => unreachable!("there is one sampler"),
                    };
                    recoveries.fetch_add(u64::from(has_recovered), Ordering::Relaxed);
                    if looks == 0 {
                        break;
                    }
                }
            },
        )
        .into_iter()
        .sum();
        let recoveries = recoveries.into_inner();
        let is_overloaded = u64::from(shard.admission.is_overloaded());
        assert_eq!(entered, recoveries + is_overloaded);
        recoveries > 0
    });
}

// ---- All layers ----

/// If a layer refuses a message, the layers before it give back what they have acquired: no probe is under way
/// after a refusal by the bucket, no token is lost after one by the shard, and no message is counted after
/// either. A probe that its shard refuses is a failure.
#[test]
fn a_refusal_leaves_no_trace_in_other_layers() {
    let clock = FakeClock::at_ns(0);
    let registry = registry(&clock);
    register(&registry, Namespace::Connection, b"a", 1);
    let (id, namespace) = (registry.id(0, b"a"), Namespace::Connection);
    registry.set_limits(Some(limits(1, 0.001)), &clock);
    let admission = registry.admission(1);
    registry.set_threshold(1, Threshold::Exactly(10));
    admission.begin_pass(Pass::All, 0);
    let config = Config {
        timeout_ms: 0,
        probe_limit: 1,
        ..Config::default()
    };
    let circuit = CircuitBreaker::new(Some(config), &clock).unwrap();
    let route = || {
        let mut events = Events::default();
        let routed = registry.route(
            namespace,
            &id,
            Charged::Target,
            &circuit,
            &clock,
            &mut events,
        );
        (routed, events)
    };
    circuit.force(true, &clock);
    let (routed, events) = route();
    assert_eq!(routed, Ok((1, Delivery::Single)));
    assert!(events.has_half_opened && events.circuit.is_none());
    assert_eq!(route().0, Err(Refusal::RateLimited));
    let stats = circuit.stats(&clock);
    assert_eq!((stats.probes, stats.successes), (0, 1));
    assert_eq!(admission.admitted(), 1);
    // The bucket has tokens again; the shard is full.
    let own = EntryLimits::Own(Some(limits(9, 0.001).into()));
    registry
        .set_entry_limits(namespace, &id, EntryLimits::Own(None), &clock)
        .unwrap();
    registry
        .set_entry_limits(namespace, &id, own, &clock)
        .unwrap();
    admission.adjust(7, 100);
    let before = registry.bucket_state(namespace, &id, &clock);
    let (routed, events) = route();
    assert_eq!(routed, Err(Refusal::ShardOverloaded));
    assert_eq!(events.circuit, Some(State::Open));
    assert_eq!(events.overloaded, Some(1));
    assert_eq!(registry.bucket_state(namespace, &id, &clock), before);
    assert_eq!(admission.admitted(), 1);
    // Even if the shard is overloaded already, refusing a probe opens the circuit.
    let (routed, events) = route();
    assert_eq!(routed, Err(Refusal::ShardOverloaded));
    assert!(events.has_half_opened);
    assert_eq!(
        (events.circuit, events.overloaded),
        (Some(State::Open), None)
    );
}

/// Refusals are counted by reason, in the shard of the target; for ids that are not registered, in any shard.
#[test]
fn every_refusal_is_counted_once() {
    let clock = FakeClock::at_ns(0);
    let registry = registry(&clock);
    let circuit = CircuitBreaker::new(Some(Config::default()), &clock).unwrap();
    registry.set_limits(Some(limits(2, 1.0)), &clock);
    // Both in shard 1.
    register(&registry, Namespace::Connection, b"a", 1);
    register(&registry, Namespace::Transport, b"t", 5);
    let route = |namespace, id: &[u8]| {
        let id = registry.id(0, id);
        // With a clock that stands still, a bucket keeps back one unit.
        clock.advance_ns(10);
        let mut events = Events::default();
        registry.route(
            namespace,
            &id,
            Charged::Target,
            &circuit,
            &clock,
            &mut events,
        )
    };
    let routed: Vec<_> = (0..5).map(|_| route(Namespace::Connection, b"a")).collect();
    let limited = Err(Refusal::RateLimited);
    let ok = Ok((1, Delivery::Single));
    assert_eq!(routed, [ok, ok, limited, limited, limited]);
    for namespace in Namespace::ALL {
        assert_eq!(route(namespace, b"nobody"), Err(Refusal::NotFound));
    }
    let admission = registry.admission(1);
    registry.set_threshold(1, Threshold::Exactly(1));
    admission.begin_pass(Pass::All, 0);
    admission.adjust(7, 1);
    for _ in 0..2 {
        let refused = route(Namespace::Transport, b"t");
        assert_eq!(refused, Err(Refusal::ShardOverloaded));
    }
    circuit.force(true, &clock);
    assert_eq!(route(Namespace::Transport, b"t"), Err(Refusal::CircuitOpen));
    let shards = 0..registry.limits().shards();
    let of = |count: fn(RefusedCounts) -> u64| -> Vec<u64> {
        let counts = shards.clone().map(|shard| count(registry.refused(shard)));
        counts.collect()
    };
    let unknown = Namespace::ALL.len() as u64;
    assert_eq!(of(|refused| refused.not_found).iter().sum::<u64>(), unknown);
    let all = [
        of(|refused| refused.circuit_open),
        of(|refused| refused.shard_overloaded),
        of(|refused| refused.rate_limited),
    ];
    for (counts, expected) in all.iter().zip([1, 2, 3]) {
        assert_eq!(counts.iter().sum::<u64>(), expected);
        assert_eq!(counts[1], expected);
    }
}

/// A message that a lease does not deliver leaves no trace in the layers, and one that it delivers counts.
#[test]
fn a_delivery_that_fails_leaves_no_trace() {
    let clock = FakeClock::at_ns(1_000_000);
    let registry = registry(&clock);
    let config = Config {
        timeout_ms: 0,
        probe_limit: 1,
        ..Config::default()
    };
    let circuit = CircuitBreaker::new(Some(config), &clock).unwrap();
    registry.set_limits(Some(limits(2, 1.0)), &clock);
    register(&registry, Namespace::Connection, b"a", 7);
    let id = registry.id(0, b"a");
    // 7 % 4, see `register`.
    let shard = 3;
    let admission = registry.admission(shard);
    registry.set_threshold(shard, Threshold::Exactly(10));
    circuit.force(true, &clock);
    let set = |delivery| registry.exchange_lease(Namespace::Connection, &id, |_| true, 1, delivery);
    set(Delivery::ByLease).unwrap();
    let mut events = Events::default();
    let asked = registry.route(
        Namespace::Connection,
        &id,
        Charged::Target,
        &circuit,
        &clock,
        &mut events,
    );
    assert_eq!(asked, Ok((7, Delivery::ByLease)));
    let state = || {
        let bucket = registry.bucket_state(Namespace::Connection, &id, &clock);
        (bucket, admission.admitted(), admission.depth())
    };
    let before = state();
    let mut route = |result: Result<(), Undelivered<&'static str>>| {
        registry.route_by_lease(&id, &circuit, &clock, &mut events, |_| result)
    };
    for _ in 0..5 {
        let full = Undelivered::Refused(Refusal::StoreFull);
        assert_eq!(route(Err(full)), Err(full));
        let failed = Undelivered::Failed("closed");
        assert_eq!(route(Err(failed)), Err(failed));
    }
    assert_eq!(state(), before);
    assert_eq!(registry.refused(shard).store_full, 5);
    assert_eq!(route(Ok(())), Ok(()));
    let (bucket, admitted, depth) = state();
    assert_eq!((bucket.unwrap().tokens, admitted, depth), (Some(1), 1, 0));
    // What waits somewhere else is charged by the caller.
    admission.begin_pass(Pass::All, clock.now_ms());
    admission.hold(10);
    let overloaded = Undelivered::Refused(Refusal::ShardOverloaded);
    assert_eq!(route(Ok(())), Err(overloaded));
    admission.release(10);
    assert_eq!(admission.depth(), 0);
}

/// Routes through all three layers while their settings change and entries are registered and removed. Every
/// address is the right one, an entry with limits of its own keeps to them, and in the end every message is
/// routed.
#[test]
fn routes_go_right_while_everything_changes() {
    until_contended(|| {
        let clock = TscClock::new();
        let registry = registry(&clock);
        registry.sampling().set_interval_ms(1);
        let circuit = CircuitBreaker::new(Some(Config::default()), &clock).unwrap();
        let names: Vec<[u8; 8]> = (0..64u64).map(u64::to_le_bytes).collect();
        for (address, name) in (0..).zip(&names) {
            assert!(register(&registry, Namespace::Connection, name, address));
            assert!(register(&registry, Namespace::Transport, name, address));
            assert!(register(&registry, Namespace::Server, name, address));
        }
        // Number 0 has limits of its own. Only routes acquire from its bucket.
        let own = limits(50, 1000.0);
        let metered = registry.id(0, &names[0]);
        let began = clock.now_ns();
        registry
            .set_entry_limits(
                Namespace::Connection,
                &metered,
                EntryLimits::Own(Some(own.into())),
                &clock,
            )
            .unwrap();
        let (started, mut changes) = (Instant::now(), 0u64);
        let counts = on_threads(
            |thread| {
                // Messages permitted on the metered connection, and refusals of each kind.
                let mut counts = [0u64; 5];
                for round in thread.. {
                    if started.elapsed() >= TIME {
                        break;
                    }
                    // The last sixteen are registered and removed.
                    let n = round * 7 % names.len();
                    let name = registry.id(0, &names[n]);
                    if n >= 48 && round % 3 == 0 {
                        let namespace = Namespace::ALL[round % 5 % 3];
                        if registry.remove(namespace, &name).is_none() {
                            register(&registry, namespace, &names[n], n as u64);
                        }
                    }
                    let (namespace, charged) = match round % 4 {
                        0 => (Namespace::Server, Charged::Transport(name)),
                        1 => (Namespace::Transport, Charged::Nobody),
                        _ => (Namespace::Connection, Charged::Target),
                    };
                    let (target, n) = if round % 16 == 3 {
                        (metered, 0)
                    } else {
                        (name, n)
                    };
                    let mut events = Events::default();
                    let mut routed = Err(Refusal::NotFound);
                    if namespace == Namespace::Connection && round % 8 >= 4 {
                        registry.route_connections(
                            &[Some(target)],
                            &circuit,
                            &clock,
                            |result, its| {
                                routed = result.map(|(entry, delivery)| (entry.address, delivery));
                                events = its;
                            },
                        );
                    } else {
                        routed = registry.route(
                            namespace,
                            &target,
                            charged,
                            &circuit,
                            &clock,
                            &mut events,
                        );
                    }
                    match routed {
                        Ok((address, _)) => {
                            assert_eq!(address, n as u64);
                            counts[0] += u64::from(n == 0 && namespace == Namespace::Connection);
                        }
                        Err(Refusal::StoreFull) => unreachable!("no connection has a store"),
                        Err(Refusal::NotFound) => {
                            assert!(n >= 48, "{n} was not found");
                            counts[1] += 1;
                        }
                        Err(Refusal::CircuitOpen) => counts[2] += 1,
                        Err(Refusal::ShardOverloaded) => counts[3] += 1,
                        Err(Refusal::RateLimited) => counts[4] += 1,
                    }
                    for shard in [events.sample, events.overloaded].into_iter().flatten() {
                        assert!(shard < 4);
                    }
                    if round % 1000 == 0 {
                        circuit.record_failure(&clock);
                    }
                }
                counts
            },
            || {
                changes += 1;
                let shard = (changes % 4) as u16;
                let admission = registry.admission(shard);
                admission.begin_pass(Pass::All, clock.now_ms());
                let mut looks = 0;
                while let Taken::Batch(number) = admission.take(false, |_| looks += 1) {
                    let lengths = vec![Some(changes % 3); looks];
                    admission.report(number, lengths, clock.now_ms());
                }
                let threshold = match changes / 8 % 4 {
                    0 => Threshold::Exactly(1),
                    1 => Threshold::Exactly(20),
                    2 => Threshold::Auto,
                    _ => Threshold::Off,
                };
                registry.set_threshold(shard, threshold);
                let shared = [Some(limits(5, 10.0)), Some(limits(1000, 1e6)), None];
                let shared = shared[(changes / 16 % 3) as usize];
                registry.set_limits(shared, &clock);
                let config = Config {
                    failure_threshold: 1 + changes as u32 % 3,
                    timeout_ms: changes % 3,
                    probe_limit: 1 + changes as u32 % 5,
                    success_threshold: 1 + changes as u32 % 4,
                    ..Config::default()
                };
                let config = (changes % 11 != 0).then_some(config);
                if changes % 4 == 0 {
                    circuit.configure(config, &clock).unwrap();
                }
            },
        );
        let total = |kind: usize| counts.iter().map(|counts| counts[kind]).sum::<u64>();
        let most = 50.0 + 1000.0 * (clock.now_ns() - began) as f64 / 1e9;
        assert!(total(0) as f64 <= most, "{} of {most}", total(0));
        let is_contended = changes > 100 && (0..5).all(|kind| total(kind) > 0);
        // With all layers off, every registered id is reached.
        circuit.configure(None, &clock).unwrap();
        registry.set_limits(None, &clock);
        for shard in 0..4 {
            registry.set_threshold(shard, Threshold::Off);
        }
        for (n, name) in (1..48).zip(&names[1..]) {
            let id = registry.id(0, name);
            let mut events = Events::default();
            for namespace in [
                Namespace::Server,
                Namespace::Transport,
                Namespace::Connection,
            ] {
                let routed = registry.route(
                    namespace,
                    &id,
                    Charged::Target,
                    &circuit,
                    &clock,
                    &mut events,
                );
                assert_eq!(routed, Ok((n, Delivery::Single)));
            }
            assert!(!events.is_some());
        }
        is_contended
    });
}

/// While a target's breaker is half open, routes of many threads have at most its limit under way, and those that its
/// bucket refuses are not.
#[test]
fn a_targets_probes_are_bounded_whatever_refuses_them() {
    const PROBES: u32 = 3;
    let clock = TscClock::new();
    let registry: Registry<u64> = Registry::new(registry::Limits::default(), &clock);
    register(&registry, Namespace::Connection, b"a", 5);
    registry.set_limits(Some(limits(2, 100_000.0)), &clock);
    let id = registry.id(0, b"a");
    let circuit = CircuitBreaker::new(Some(Config::default()), &clock).unwrap();
    let config = Config {
        failure_threshold: 1,
        success_threshold: 1023,
        timeout_ms: 0,
        probe_limit: PROBES,
        ..Config::default()
    };
    let breakers = registry.target_breakers();
    breakers
        .set(Namespace::Connection, &id, config, &clock)
        .unwrap();
    let with = |f: &dyn Fn(&CircuitBreaker)| breakers.with(Namespace::Connection, &id, f).unwrap();
    let under_way = AtomicU32::new(0);
    let refused = [const { AtomicU64::new(0) }; 2];
    until_contended(|| {
        with(&|breaker| {
            assert!(breaker.record_failure(&clock));
            assert!(breaker.check(&clock).is_ok());
            // No probe of this round is taken for lost.
            let config = Config {
                timeout_ms: 3_600_000,
                ..config
            };
            breaker.configure(Some(config), &clock).unwrap();
            breaker.release_probe();
        });
        on_threads(
            |_| {
                for _ in 0..if cfg!(miri) { 5 } else { 100 } {
                    let mut events = Events::default();
                    match registry.route(
                        Namespace::Connection,
                        &id,
                        Charged::Target,
                        &circuit,
                        &clock,
                        &mut events,
                    ) {
                        Ok(_) => {
                            assert!(under_way.fetch_add(1, Ordering::AcqRel) < PROBES);
                            thread::yield_now();
                            under_way.fetch_sub(1, Ordering::AcqRel);
                            with(&|breaker| assert!(!breaker.record_success(&clock)));
                        }
                        Err(Refusal::CircuitOpen) => {
                            refused[0].fetch_add(1, Ordering::Relaxed);
                        }
                        Err(Refusal::RateLimited) => {
                            refused[1].fetch_add(1, Ordering::Relaxed);
                        }
                        Err(other) => panic!("{other:?}"),
                    }
                }
            },
            || (),
        );
        with(&|breaker| {
            let stats = breaker.stats(&clock);
            assert_eq!((stats.state, stats.probes), (State::HalfOpen, 0));
            breaker.configure(Some(config), &clock).unwrap();
        });
        refused.iter().all(|n| n.load(Ordering::Relaxed) > 0)
    });
}

/// Threads that set and remove the breakers of a few targets: the number is that of the breakers that are left, and a route
/// finds each that was set before it.
#[test]
fn breakers_of_targets_are_counted() {
    let clock = TscClock::new();
    let registry: Registry<u64> = Registry::new(registry::Limits::default(), &clock);
    let breakers = registry.target_breakers();
    let config = Config::default();
    on_threads(
        |thread| {
            let own = [b'o', thread as u8];
            let own = registry.id(0, &own);
            let shared = registry.id(0, b"shared");
            for round in 0..if cfg!(miri) { 10 } else { 2_000 } {
                let namespace = Namespace::ALL[round % 3];
                for id in [&own, &shared] {
                    breakers.set(namespace, id, config, &clock).unwrap();
                }
                assert!(!breakers.is_empty());
                assert!(breakers.with(namespace, &own, |_| ()).is_some());
                assert!(breakers.remove(namespace, &own));
                assert!(!breakers.remove(namespace, &own));
                breakers.remove(namespace, &shared);
            }
        },
        || (),
    );
    let mut left = 0;
    breakers.for_each(&clock, |_, _, _, _| left += 1);
    assert_eq!(breakers.len(), left);
}
