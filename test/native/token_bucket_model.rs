//! Token buckets against ideal ones in exact arithmetic: random histories of acquisitions, of a clock that
//! advances by nanoseconds and by years and goes back, and of changes of the limits. If the clock goes back
//! and limits change in one history, only the bounds are checked.
//!
//! A rate is a float, so a whole multiple of 2^-64, and a time is a whole number of nanoseconds.
//! Counted in 2^-64 of a billionth, all tokens are whole numbers of 128 bits: nothing here is
//! rounded. Takes some seconds in release.
#![cfg(not(loom))]

use std::cell::{Cell, RefCell};

use erlmcp_core::clock::{Clock, FakeClock};
use erlmcp_core::registry::{self, EntryLimits, Namespace, Registry};
use erlmcp_core::token_bucket::{Change, Limits, LimitsError, Refused, TokenBucket};
use proptest::prelude::*;

/// One token.
const ONE: i128 = 1_000_000_000 << 64;

const SECOND: u64 = 1_000_000_000;
const YEAR: u64 = 31_557_600 * SECOND;

/// The refill per nanosecond.
fn per_ns(limits: Limits) -> i128 {
    let scaled = limits.rate_per_second() * 2f64.powi(64);
    assert_eq!(scaled.fract(), 0.0);
    scaled as i128
}

fn tokens(n: u64) -> i128 {
    i128::from(n).checked_mul(ONE).unwrap()
}

/// The most by which clocks of different processors may disagree.
const TOLERANCE_NS: i128 = 1 << 20;

/// The bucket by definition: it loses the tokens acquired, gains `rate` per second, and holds `capacity` at
/// most. A clock that goes back removes the refill of that time, back to the moment at which the limits began.
/// If the bucket then lacks more than the tolerance, it becomes an empty one.
#[derive(Debug, Clone, Copy)]
struct Ideal {
    limits: Limits,
    since: u64,
    /// May be before the clock's origin.
    at: i128,
    held: i128,
}

impl Ideal {
    fn holding(held: i128, limits: Limits, now: u64) -> Self {
        Self {
            limits,
            since: now,
            at: i128::from(now),
            held: held.clamp(0, tokens(limits.capacity())),
        }
    }

    /// May be below zero after the clock has gone back.
    fn held(&self, now: u64) -> i128 {
        let full = tokens(self.limits.capacity());
        let elapsed = i128::from(now) - self.at;
        let refill = per_ns(self.limits).checked_mul(elapsed.abs());
        if elapsed >= 0 {
            let held = refill.and_then(|refill| refill.checked_add(self.held));
            held.map_or(full, |held| held.min(full))
        } else {
            refill.map_or(i128::MIN, |refill| self.held - refill)
        }
    }

    fn take(&mut self, n: u64, now: u64) {
        self.held = (self.held(now) - tokens(n)).max(0);
        self.at = i128::from(now);
    }

    /// Limits that began later than now begin now.
    fn begin(&mut self, now: u64) -> bool {
        let ahead = i128::from(self.since) - i128::from(now);
        if ahead > TOLERANCE_NS {
            self.at -= ahead;
            self.since = now;
        }
        ahead > TOLERANCE_NS
    }

    /// A refusal empties a bucket that lacks more than the tolerance after the clock has gone back. `spare_ns`
    /// allows for rounding.
    fn refuse(&mut self, now: u64, spare_ns: i128) -> bool {
        let is_displaced = self.held(now) < -per_ns(self.limits) * (TOLERANCE_NS + spare_ns);
        if is_displaced {
            (self.held, self.at) = (0, i128::from(now));
        }
        is_displaced
    }

    fn changed(&self, limits: Limits, now: u64) -> Self {
        Self::holding(self.held(now), limits, now)
    }
}

#[derive(Debug, Clone, Copy)]
enum Amount {
    Exactly(u64),
    /// A share of the capacity, in thousandths.
    Share(u64),
    Beyond(u64),
}

impl Amount {
    fn of(self, capacity: u64) -> u64 {
        match self {
            Self::Exactly(n) => n,
            Self::Share(share) => capacity * share / 1000,
            Self::Beyond(by) => capacity.saturating_add(by),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Take(Amount),
    Advance(u64),
    /// Advances by the refill time of so many tokens, plus some nanoseconds.
    Refill(Amount, i64),
    Back(u64),
    /// Waits as long as the last refusal has told.
    WaitAsTold,
    Change(Option<Limits>),
}

/// From 1 to 2^bits, every magnitude as likely as any other.
fn magnitudes(bits: u32) -> impl Strategy<Value = u64> {
    (0..bits).prop_flat_map(|bit| 1u64 << bit..=1 << (bit + 1))
}

fn rates() -> impl Strategy<Value = f64> {
    let lowest = (1.0f64 / 3600.0).ln();
    let highest = 1e9f64.ln();
    prop_oneof![
        6 => (0.0..=1.0f64).prop_map(move |x| (lowest + x * (highest - lowest)).exp()),
        2 => (1..=1_000_000_000u64).prop_map(|n| n as f64),
        1 => prop::sample::select(vec![
            1.0 / 3600.0, 0.1, 1.0 / 3.0, 1.0, 3.0, 10_000.0, 65_536.0,
            5e8f64.next_down(), 5e8, 999_999_999.5, 1e9f64.next_down(), 1e9,
        ]),
    ]
    .prop_map(|rate| rate.clamp(1.0 / 3600.0, 1e9))
}

fn limits() -> impl Strategy<Value = Limits> {
    let capacities = prop_oneof![8 => magnitudes(32), 1 => Just(1), 1 => Just(u64::MAX)];
    (rates(), capacities).prop_map(|(rate, capacity)| {
        // The most that is refilled in 2^53 ns.
        let most = (rate * 9_007_199.0) as u64;
        Limits::new(capacity.min(most).min((1 << 32) - 1), rate).unwrap()
    })
}

fn amounts() -> impl Strategy<Value = Amount> {
    prop_oneof![
        1 => Just(Amount::Exactly(0)),
        3 => Just(Amount::Exactly(1)),
        3 => magnitudes(32).prop_map(Amount::Exactly),
        6 => (1..1000u64).prop_map(Amount::Share),
        2 => Just(Amount::Share(1000)),
        1 => Just(Amount::Beyond(1)),
        1 => Just(Amount::Beyond(u64::MAX)),
    ]
}

fn steps(on_ns: u32, back_ns: u32, changes: u32) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        12 => amounts().prop_map(Step::Take),
        4 => magnitudes(on_ns).prop_map(Step::Advance),
        6 => (amounts(), -3..4i64).prop_map(|(amount, ns)| Step::Refill(amount, ns)),
        2 => magnitudes(back_ns).prop_map(Step::Back),
        4 => Just(Step::WaitAsTold),
        changes => prop::option::weighted(0.8, limits()).prop_map(Step::Change),
    ];
    prop::collection::vec(step, 1..100)
}

/// A bucket between two ideal ones.
struct History {
    clock: FakeClock,
    start: u64,
    years: u64,
    latest: u64,
    bucket: TokenBucket,
    is_off: bool,
    /// The bucket never holds more than this one.
    most: Option<Ideal>,
    /// The bucket holds at least as much as this one, less what is lost to rounding.
    least: Option<Ideal>,
    /// What changes may have lost to rounding.
    lost: i128,
    /// Time and tokens of each acquisition under the current limits.
    taken: Vec<(u64, u64)>,
    refused: Option<(u64, u64)>,
}

impl History {
    fn new(start: u64, limits: Option<Limits>) -> Self {
        let clock = FakeClock::at_ns(start);
        let bucket = TokenBucket::new(limits, &clock);
        // A new bucket is full even for a clock that is behind by the tolerance.
        let full = limits.map(|limits| Ideal {
            at: i128::from(start) - TOLERANCE_NS,
            ..Ideal::holding(i128::MAX, limits, start)
        });
        Self {
            clock,
            start,
            years: 100,
            latest: start,
            bucket,
            is_off: limits.is_none(),
            most: full,
            least: full,
            lost: 0,
            taken: Vec::new(),
            refused: None,
        }
    }

    fn now(&self) -> u64 {
        self.clock.now_ns()
    }

    fn set_clock(&mut self, to: u64) {
        let to = to.min(self.start.saturating_add(self.years * YEAR));
        self.clock.set_ns(to);
        self.latest = self.latest.max(to);
    }

    fn capacity(&self) -> u64 {
        self.most.map_or(1000, |ideal| ideal.limits.capacity())
    }

    fn step(&mut self, step: Step, furthest_back: u64) {
        match step {
            Step::Take(amount) => self.take(amount.of(self.capacity())),
            Step::Advance(by) => self.set_clock(self.now().saturating_add(by)),
            Step::Refill(amount, ns) => {
                let rate = self
                    .most
                    .map_or(1.0, |ideal| ideal.limits.rate_per_second());
                let n = amount.of(self.capacity()).min(1 << 32);
                let by = (n as f64 / rate * 1e9) as u64;
                let lowest = self.latest.saturating_sub(furthest_back);
                let to = self.now().saturating_add(by).saturating_add_signed(ns);
                self.set_clock(to.max(lowest));
            }
            Step::Back(by) => {
                let lowest = self.latest.saturating_sub(furthest_back);
                self.set_clock(self.now().saturating_sub(by).max(lowest));
            }
            Step::WaitAsTold => self.wait_as_told(),
            Step::Change(limits) => self.change(limits),
        }
        let expected = self.most.filter(|_| !self.is_off).map(|ideal| ideal.limits);
        assert_eq!(self.bucket.limits(), expected);
    }

    fn take(&mut self, n: u64) {
        self.refused = None;
        let now = self.now();
        let result = self.bucket.take(&self.clock, n);
        let (Some(most), Some(least), false) = (&mut self.most, &mut self.least, self.is_off)
        else {
            assert_eq!(result, Ok(None));
            return;
        };
        let mut is_displaced = false;
        if n <= most.limits.capacity() {
            is_displaced = most.begin(now);
            least.begin(now);
        }
        let per_ns = per_ns(most.limits);
        match result {
            Err(Refused::ExceedsCapacity) => assert!(n > most.limits.capacity()),
            _ if n > most.limits.capacity() => panic!("{n} taken at once: {result:?}"),
            Ok(None) => panic!("no limits"),
            Ok(Some(left)) => {
                if n > 0 {
                    assert!(most.held(now) >= tokens(n), "more was taken than there was");
                    most.take(n, now);
                    least.take(n, now);
                    self.taken.push((now, n));
                }
                if left > 0 {
                    assert_eq!(self.bucket.state(&self.clock).wait_ns, 0);
                }
                // The tokens left are reported as of a nanosecond later.
                let after = most.held(now).max(0);
                assert!(tokens(left) <= after + per_ns, "told {left} of {after}");
                let after = least.held(now);
                assert!(after < tokens(left) + ONE + per_ns + self.lost);
            }
            Err(Refused::RateLimited { wait_ns }) => {
                assert!(n > 0 && wait_ns > 0);
                most.refuse(now, -3);
                is_displaced |= least.refuse(now, 3);
                let enough = tokens(n) + ONE + self.lost;
                assert!(least.held(now) < enough, "refused with a token to spare");
                // Three nanoseconds before the end of the wait, even the ideal bucket would refuse.
                let before = now.saturating_add(wait_ns.saturating_sub(3));
                let enough = tokens(n) + self.lost;
                assert!(
                    before <= now || least.held(before) < enough,
                    "has to wait too long: {wait_ns} for {n} at {now}, {}",
                    least.held(now)
                );
                if n == 1 {
                    let state = self.bucket.state(&self.clock);
                    // The tokens of a state are those of a nanosecond later.
                    let is_sooner = wait_ns == 1 && state.tokens == Some(1);
                    assert_eq!(state.wait_ns, if is_sooner { 0 } else { wait_ns });
                }
                self.refused = Some((n, now.saturating_add(wait_ns)));
            }
        }
        if is_displaced {
            // Within a window the clock must not go back.
            let latest = self.taken.pop().filter(|(at, _)| *at == now);
            self.check_windows();
            self.taken = Vec::from_iter(latest);
        }
    }

    fn wait_as_told(&mut self) {
        let Some((n, until)) = self.refused else {
            return;
        };
        if until > self.start.saturating_add(self.years * YEAR) {
            return;
        }
        self.set_clock(until - 1);
        let early = self.bucket.take(&self.clock, n);
        assert_eq!(early, Err(Refused::RateLimited { wait_ns: 1 }));
        self.set_clock(until);
        let taken = self.taken.len();
        self.take(n);
        assert_eq!(self.taken.len(), taken + 1, "waited in vain");
    }

    fn change(&mut self, limits: Option<Limits>) {
        self.refused = None;
        self.bucket.set_limits(limits, &self.clock);
        self.is_off = limits.is_none();
        let Some(limits) = limits else {
            return;
        };
        self.check_windows();
        self.taken.clear();
        let now = self.now();
        let (Some(most), Some(least)) = (self.most, self.least) else {
            // The first limits: the bucket is full.
            self.most = Some(Ideal::holding(i128::MAX, limits, now));
            self.least = self.most;
            return;
        };
        self.lost += 2 * (per_ns(most.limits) + per_ns(limits));
        self.most = Some(most.changed(limits, now));
        self.least = Some(least.changed(limits, now));
    }

    /// Checks every window that begins and ends with an acquisition.
    fn check_windows(&self) {
        let Some(ideal) = self.most else {
            return;
        };
        let per_ns = per_ns(ideal.limits);
        // Removes common factors of both sides, so that sums of acquisitions fit.
        let shift = per_ns.trailing_zeros().min(64);
        let (one, per_ns) = (ONE >> shift, per_ns >> shift);
        for (first, (began, _)) in self.taken.iter().enumerate() {
            let mut sum = 0;
            for (ended, n) in &self.taken[first..] {
                sum += i128::from(*n);
                let beyond = (sum - i128::from(ideal.limits.capacity())).checked_mul(one);
                let refill = per_ns.checked_mul(i128::from(ended.saturating_sub(*began)));
                assert!(beyond.unwrap() <= refill.unwrap(), "more than the bucket's");
            }
        }
    }
}

fn run(start: u64, limits: Option<Limits>, steps: Vec<Step>, furthest_back: u64) {
    let mut history = History::new(start, limits);
    for step in steps {
        history.step(step, furthest_back);
    }
    history.check_windows();
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 5_000 },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn takes_what_an_ideal_bucket_would(
        start in prop_oneof![Just(0), magnitudes(61)],
        limits in limits(),
        steps in steps(61, 55, 0),
    ) {
        run(start, Some(limits), steps, u64::MAX);
    }

    #[test]
    fn keeps_its_tokens_when_limits_change(
        start in prop_oneof![Just(0), magnitudes(61)],
        limits in prop::option::weighted(0.8, limits()),
        steps in prop_oneof![steps(52, 1, 6), steps(52, 1, 90)],
    ) {
        let mut history = History::new(start, limits);
        history.years = 25;
        for step in steps {
            history.step(step, 0);
        }
        history.check_windows();
    }

    /// Whatever the clock does, and whatever limits were in force before.
    #[test]
    fn waits_no_longer_than_its_own_limits_make_it(
        start in prop_oneof![Just(0), magnitudes(61)],
        limits in limits(),
        steps in steps(55, 55, 20),
    ) {
        let clock = FakeClock::at_ns(start);
        let bucket = TokenBucket::new(Some(limits), &clock);
        let mut limits = limits;
        for step in steps {
            match step {
                Step::Advance(by) => clock.set_ns(clock.now_ns().saturating_add(by).min(1 << 62)),
                Step::Back(by) => clock.set_ns(clock.now_ns().saturating_sub(by)),
                Step::Change(Some(next)) => {
                    bucket.set_limits(Some(next), &clock);
                    limits = next;
                }
                Step::Take(amount) | Step::Refill(amount, _) => {
                    let n = amount.of(limits.capacity());
                    let Err(Refused::RateLimited { wait_ns }) = bucket.take(&clock, n) else {
                        continue;
                    };
                    let own_ns = n as f64 / limits.rate_per_second() * 1e9;
                    prop_assert!(
                        wait_ns as f64 <= own_ns * (1.0 + 1e-9) + TOLERANCE_NS as f64 + 4.0,
                        "{wait_ns} of {own_ns}"
                    );
                    clock.advance_ns(wait_ns);
                    prop_assert!(bucket.take(&clock, n).is_ok(), "waited in vain");
                }
                Step::WaitAsTold | Step::Change(None) => {}
            }
            let left = bucket.take(&clock, 0);
            prop_assert!(matches!(left, Ok(Some(left)) if left <= limits.capacity()));
        }
    }

    /// Acquisitions over a hundred years: the bucket is as exact at any moment as at the first.
    #[test]
    fn is_as_exact_after_a_hundred_years(
        limits in limits(),
        years in prop::collection::vec(1..30u64, 1..5),
        steps in steps(61, 33, 0),
    ) {
        let mut history = History::new(0, Some(limits));
        for years in years {
            history.take(1);
            history.set_clock((history.now() + years * YEAR).min(99 * YEAR));
        }
        for step in steps {
            history.step(step, u64::MAX);
        }
        history.check_windows();
    }
}

/// After each change all tokens are acquired.
#[test]
fn limits_may_change_any_number_of_times() {
    let changes = if cfg!(miri) { 20 } else { 300_000 };
    let all = [
        Limits::new(1000, 10_000.0).unwrap(),
        Limits::new(7, 0.3).unwrap(),
        Limits::new(50_000, 1e9).unwrap(),
    ];
    let mut history = History::new(0, Some(all[0]));
    for n in 0..changes {
        history.set_clock(history.now() + 700_000);
        history.change(Some(all[n % all.len()]));
        for bit in (0..16).rev() {
            history.take(1 << bit);
        }
    }
}

/// A bucket that has no limits and then gets some is full, and so is a new one.
#[test]
fn a_bucket_without_limits_lacks_nothing() {
    let clock = FakeClock::at_ns(5);
    let bucket = TokenBucket::new(None, &clock);
    assert_eq!(bucket.take(&clock, u64::MAX), Ok(None));
    assert_eq!(bucket.limits(), None);
    let limits = Limits::new(100, 0.001).unwrap();
    bucket.set_limits(Some(limits), &clock);
    assert_eq!(bucket.take(&clock, 100), Ok(Some(0)));
    // While the limits are off again, the bucket is refilled as before.
    bucket.set_limits(None, &clock);
    assert_eq!(bucket.take(&clock, 1000), Ok(None));
    clock.advance_ns(5000 * SECOND);
    bucket.set_limits(Some(limits), &clock);
    assert!(matches!(bucket.take(&clock, 0), Ok(Some(4 | 5))));
}

#[test]
fn limits_name_what_is_wrong() {
    for capacity in [0, 1 << 32, u64::MAX] {
        let error = LimitsError::Capacity(capacity);
        assert_eq!(Limits::new(capacity, 1.0), Err(error));
        assert!(error.to_string().contains(&capacity.to_string()));
    }
    let lowest = 1.0f64 / 3600.0;
    let rates = [
        0.0,
        -0.0,
        -1.0,
        lowest.next_down(),
        1e9f64.next_up(),
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::MIN_POSITIVE,
    ];
    for rate in rates {
        assert_eq!(Limits::new(1, rate), Err(LimitsError::RatePerSecond(rate)));
    }
    let nan = Limits::new(1, f64::NAN);
    assert!(matches!(nan, Err(LimitsError::RatePerSecond(rate)) if rate.is_nan()));
    let days_104 = (1u64 << 53) / SECOND;
    assert!(Limits::new(days_104, 1.0).is_ok());
    let slow = Limits::new(days_104 + 1, 1.0);
    assert_eq!(slow, Err(LimitsError::TooSlowToFill));
    for (capacity, rate) in [(1, lowest), (1, 1e9), ((1 << 32) - 1, 1e9)] {
        let limits = Limits::new(capacity, rate).unwrap();
        assert_eq!(limits.capacity(), capacity);
        assert_eq!(limits.rate_per_second(), rate);
    }
}

/// Adaptive hourly quotas: the limits change every hundred milliseconds, for buckets that are not used meanwhile
/// and for new ones.
#[test]
fn an_unused_bucket_keeps_its_tokens() {
    let changes = if cfg!(miri) { 20 } else { 4_000 };
    let clock = FakeClock::at_ns(7);
    let registry = registry(&clock);
    let hourly = |n: u64| Limits::new(n, n as f64 / 3600.0).unwrap();
    registry.set_limits(Some(hourly(1000)), &clock);
    let mut ideals: Vec<(Vec<u8>, Ideal)> = Vec::new();
    for n in 0..changes as u64 {
        let now = clock.now_ns();
        let limits = hourly(900 + n * 7919 % 400);
        registry.set_limits(Some(limits), &clock);
        for (_, ideal) in &mut ideals {
            *ideal = ideal.changed(limits, now);
        }
        if n % 50 == 0 {
            let id = n.to_string().into_bytes();
            register(&registry, Namespace::Transport, &id);
            assert_eq!(take(&registry, &id, 0, &clock), Some(limits.capacity()));
            let mut ideal = Ideal::holding(i128::MAX, limits, now);
            let spent = n * 31 % limits.capacity();
            take(&registry, &id, spent, &clock).expect("tokens");
            ideal.take(spent, now);
            ideals.push((id, ideal));
        }
        clock.advance_ns(SECOND / 10);
    }
    for (id, ideal) in &ideals {
        let expected = (ideal.held(clock.now_ns()) / ONE) as u64;
        let left = take(&registry, id, 0, &clock).unwrap();
        assert!(
            left == expected || left + 1 == expected,
            "{left} of {expected}"
        );
    }
}

/// More raises of the limits than are remembered: tokens may be lost, and none are created.
#[test]
fn forgotten_generations_make_no_tokens() {
    let changes = if cfg!(miri) { 20 } else { 10_000 };
    let clock = FakeClock::at_ns(7);
    let registry = registry(&clock);
    let limits = |n: u64| Limits::new(1000 + n % 2, 0.001).unwrap();
    registry.set_limits(Some(limits(0)), &clock);
    register(&registry, Namespace::Transport, b"a");
    register(&registry, Namespace::Transport, b"b");
    assert_eq!(take(&registry, b"a", 400, &clock), Some(600));
    for n in 1..=changes {
        registry.set_limits(Some(limits(n)), &clock);
        clock.advance_ns(SECOND);
    }
    let most = |held: u64| held + changes / 1000 + 1;
    let forgotten = take(&registry, b"a", 0, &clock).unwrap();
    assert!(forgotten <= most(600), "{forgotten}");
    let full = take(&registry, b"b", 0, &clock).unwrap();
    assert!(full <= 1001, "{full}");
    // The bucket is refilled as before.
    clock.advance_ns(2_000_000 * SECOND);
    assert!(take(&registry, b"a", 1000, &clock).is_some());
}

/// Own buckets are converted at each change, so that no former limits need to be remembered.
#[test]
fn an_own_bucket_keeps_its_tokens_for_ever() {
    let changes = if cfg!(miri) { 20 } else { 1_000_000 };
    let clock = FakeClock::at_ns(0);
    let slow = |n: u64| Limits::new(9_000_000 + n % 2, 1.0 + (n % 3) as f64).unwrap();
    let bucket = TokenBucket::new(Some(slow(0)), &clock);
    assert_eq!(bucket.take(&clock, 4_000_000), Ok(Some(5_000_000)));
    for n in 1..=changes {
        bucket.set_limits(Some(slow(n)), &clock);
    }
    let Ok(Some(left)) = bucket.take(&clock, 0) else {
        panic!("no tokens");
    };
    assert!((4_999_999..=5_000_000).contains(&left), "{left}");
}

/// A caller reads the clock, sleeps for less than clocks may disagree, and then finds limits that have changed
/// twice: it acquires from the tokens that the bucket holds, and leaves the rest.
#[test]
fn a_clock_behind_two_changes_finds_all_tokens() {
    let now = 5 * SECOND;
    for (capacity, slow, fast) in [
        ((1 << 32) - 1, 7e8, 1e9),
        (1_000_000, 1.0, 7.0),
        (10_000, 1.0, 7.0),
        (1_000, 10_000.0, 14_000.0),
    ] {
        for back in [0, 1, 1_000, 1 << 19, 1 << 20] {
            let limits = |capacity, rate| Some(Limits::new(capacity, rate).unwrap());
            let clock = FakeClock::at_ns(now);
            let bucket = TokenBucket::new(limits(capacity - 1, slow), &clock);
            bucket.set_limits(limits(capacity, slow), &clock);
            bucket.set_limits(limits(capacity, fast), &clock);
            clock.set_ns(now - back);
            let refilled = (back as f64 * fast / 1e9).ceil() as u64;
            let taken = bucket.take(&clock, 1);
            for taken in [taken, bucket.take(&clock, 0)] {
                let left = taken.expect("tokens").expect("limits");
                assert!(
                    left + 4 + refilled >= capacity,
                    "{left} of {capacity}, {back} ns behind"
                );
            }
        }
    }
}

/// A clock whose readings take so long that something else happens meanwhile.
struct SlowClock<'a> {
    clock: &'a FakeClock,
    meanwhile: RefCell<Vec<Box<dyn FnOnce() + 'a>>>,
}

impl SlowClock<'_> {
    fn sleep(&self) {
        let next = self.meanwhile.borrow_mut().pop();
        if let Some(next) = next {
            next();
        }
    }
}

impl Clock for SlowClock<'_> {
    fn now_ns(&self) -> u64 {
        let now_ns = self.clock.now_ns();
        self.sleep();
        now_ns
    }

    fn renew(&self) -> bool {
        self.sleep();
        true
    }
}

/// However long a thread sleeps during an acquisition, and however often the limits change meanwhile.
#[test]
fn who_sleeps_while_limits_change_is_not_refused() {
    let capacity = 1_000_000;
    let limits = |n: u64| Some(Limits::new(capacity + n, 1.0).unwrap());
    for changes in [1, 2, 100] {
        for amount in [0, 1] {
            for asleep in 0..8 {
                let clock = FakeClock::at_ns(7);
                let bucket = TokenBucket::new(limits(0), &clock);
                let raised = Cell::new(0);
                let meanwhile = || {
                    clock.advance_ns(SECOND / 100);
                    for _ in 0..changes {
                        raised.set(raised.get() + 1);
                        bucket.set_limits(limits(raised.get()), &clock);
                    }
                };
                let sleeps: Vec<Box<dyn FnOnce()>> = (0..=asleep)
                    .map(|n| -> Box<dyn FnOnce()> {
                        if n == 0 || n == asleep {
                            Box::new(meanwhile)
                        } else {
                            Box::new(|| ())
                        }
                    })
                    .rev()
                    .collect();
                let slow = SlowClock {
                    clock: &clock,
                    meanwhile: RefCell::new(sleeps),
                };
                let left = bucket.take(&slow, amount).unwrap().unwrap();
                let least = capacity - 2;
                assert!(left >= least, "{left}: {changes} changes, asleep {asleep}");
                let Some(left) = bucket.state(&slow).tokens else {
                    panic!("no limits");
                };
                assert!(left >= least, "{left}: {changes} changes, asleep {asleep}");
            }
        }
    }
}

/// A change keeps the values that it does not name.
#[test]
fn a_change_keeps_what_it_does_not_name() {
    let clock = FakeClock::at_ns(0);
    let otherwise = Limits::new(77, 7.0).unwrap();
    let bucket = TokenBucket::new(None, &clock);
    let changed = |capacity, rate_per_second| {
        let change = Change {
            capacity,
            rate_per_second,
        };
        let changed = bucket.change_limits(change, otherwise, &clock);
        let limits = bucket.limits().unwrap();
        changed.map(|()| (limits.capacity(), limits.rate_per_second()))
    };
    assert_eq!(changed(Some(5), None), Ok((5, 7.0)));
    assert_eq!(changed(None, Some(0.5)), Ok((5, 0.5)));
    let slow = changed(Some(1 << 31), None);
    assert_eq!(slow, Err(LimitsError::TooSlowToFill));
    assert_eq!(changed(None, None), Ok((5, 0.5)));
    bucket.set_limits(None, &clock);
    assert_eq!(bucket.limits(), None);
    assert_eq!(changed(None, Some(3.0)), Ok((5, 3.0)));
}

// ---- Buckets of a registry's entries ----

fn registry(clock: &FakeClock) -> Registry<u64> {
    Registry::new(registry::Limits::new(1, 100, 100).unwrap(), clock)
}

fn register(registry: &Registry<u64>, namespace: Namespace, id: &[u8]) {
    let id = registry.id(0, id);
    registry
        .register(namespace, id, 0, 1, None, |_| 1)
        .expect("a new id");
}

/// Acquires from the bucket of a transport; connections behave the same.
fn take(registry: &Registry<u64>, id: &[u8], n: u64, clock: &FakeClock) -> Option<u64> {
    let id = registry.id(0, id);
    let left = registry.take_tokens(Namespace::Transport, &id, n, clock);
    left.ok().map(|left| left.unwrap_or(u64::MAX))
}

/// However often the shared limits have been changed before.
#[test]
fn a_new_entry_has_a_full_bucket() {
    let clock = FakeClock::at_ns(7);
    let registry = registry(&clock);
    register(&registry, Namespace::Transport, b"before");
    let slow = |capacity| Limits::new(capacity, 0.001).unwrap();
    for n in 0..20u8 {
        let limits = slow(100 + u64::from(n));
        registry.set_limits(Some(limits), &clock);
        for namespace in [Namespace::Transport, Namespace::Connection] {
            let bytes = [n];
            register(&registry, namespace, &bytes);
            let id = registry.id(0, &bytes);
            let left = registry.take_tokens(namespace, &id, 60, &clock);
            assert_eq!(left, Ok(Some(40 + u64::from(n))));
        }
        if n == 0 {
            assert_eq!(take(&registry, b"before", 50, &clock), Some(50));
        }
        clock.advance_ns(1);
    }
}

/// From the shared limits to its own, to others of its own, and back.
#[test]
fn an_entry_keeps_its_tokens_when_its_limits_change() {
    let clock = FakeClock::at_ns(7);
    let registry = registry(&clock);
    register(&registry, Namespace::Transport, b"a");
    let slow = |capacity| Limits::new(capacity, 0.001).unwrap();
    let id = registry.id(0, b"a");
    let set = |limits| registry.set_entry_limits(Namespace::Transport, &id, limits, &clock);
    let own = |capacity| EntryLimits::Own(Some(slow(capacity).into()));
    let held = || take(&registry, b"a", 0, &clock).unwrap();
    registry.set_limits(Some(slow(1000)), &clock);
    assert_eq!(take(&registry, b"a", 400, &clock), Some(600));
    set(own(5000)).unwrap();
    assert_eq!(held(), 600);
    set(own(200)).unwrap();
    assert_eq!(held(), 200);
    set(own(5000)).unwrap();
    assert_eq!(held(), 200);
    registry.set_limits(Some(slow(2000)), &clock);
    set(EntryLimits::Shared).unwrap();
    assert_eq!(held(), 200);
    set(EntryLimits::Own(None)).unwrap();
    assert_eq!(held(), u64::MAX);
    assert_eq!(take(&registry, b"a", 1 << 40, &clock), Some(u64::MAX));
    set(own(3)).unwrap();
    assert_eq!(take(&registry, b"a", 4, &clock), None);
    assert_eq!(take(&registry, b"b", 1, &clock), None);
    let state = registry.bucket_state(Namespace::Transport, &id, &clock);
    assert_eq!(state.unwrap().limits, Some(slow(3)));
}

/// An empty bucket reports zero tokens, even after the clock has gone back. A bucket without limits reports
/// none.
#[test]
fn an_empty_bucket_holds_nothing() {
    let clock = FakeClock::at_ns(5 * SECOND);
    let registry = registry(&clock);
    register(&registry, Namespace::Transport, b"a");
    let limits = Limits::new(10, 1.0).unwrap();
    registry.set_limits(Some(limits), &clock);
    assert_eq!(take(&registry, b"a", 10, &clock), Some(0));
    let id = registry.id(0, b"a");
    for now in [5, 4, 0] {
        clock.set_ns(now * SECOND);
        assert_eq!(take(&registry, b"a", 0, &clock), Some(0));
        let state = registry.bucket_state(Namespace::Transport, &id, &clock);
        assert_eq!(state.unwrap().tokens, Some(0));
    }
}
