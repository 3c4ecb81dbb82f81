//! The circuit breaker against a plain model: random histories. Every answer and all counters are compared
//! after every step. The model's window is a list of the times of all failures.
//!
//! Takes about a second in release.
#![cfg(not(loom))]

use erlmcp_core::circuit_breaker::{
    CircuitBreaker, CircuitOpen, Config, ConfigError, Permit, State,
};
use erlmcp_core::clock::{Clock, FakeClock};
use proptest::prelude::*;

const MS: u64 = 1_000_000;

#[derive(Debug, Clone, Copy)]
enum Step {
    Advance(u64),
    /// Advances to the end of the timeout of the current state, plus so many milliseconds.
    Timeout(i64),
    /// Advances to the moment when the oldest failure that counts leaves the window, plus so many milliseconds.
    Window(i64),
    Back(u64),
    Check,
    Success,
    Failure,
    Release,
    Force(bool),
    Configure(Option<Config>),
}

fn configs() -> impl Strategy<Value = Config> {
    let thresholds = prop_oneof![8 => 1..6u32, 1 => Just(50)];
    (thresholds, 1..20u64, 1..5u32, 0..20u64, 1..5u32).prop_map(
        |(failure_threshold, window_ms, success_threshold, timeout_ms, probe_limit)| Config {
            failure_threshold,
            window_ms,
            success_threshold,
            timeout_ms,
            probe_limit,
        },
    )
}

fn steps(goes_back: bool) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..6 * MS).prop_map(Step::Advance),
        1 => (0..30 * MS).prop_map(Step::Advance),
        4 => (-1..2i64).prop_map(Step::Timeout),
        4 => (-1..2i64).prop_map(Step::Window),
        1 => (0..25 * MS).prop_map(move |ns| if goes_back { Step::Back(ns) } else { Step::Check }),
        12 => Just(Step::Check),
        8 => Just(Step::Success),
        16 => Just(Step::Failure),
        3 => Just(Step::Release),
        1 => any::<bool>().prop_map(Step::Force),
        1 => prop::option::weighted(0.8, configs()).prop_map(Step::Configure),
    ];
    prop::collection::vec(step, 1..200)
}

#[derive(Clone)]
struct Model {
    config: Config,
    state: State,
    since_ms: u64,
    probes: u64,
    successes: u64,
    /// The failures since the circuit was closed, in order.
    failures: Vec<u64>,
    /// Whether the clock has gone back since then: the window is only as good as the clock.
    is_blurred: bool,
}

impl Model {
    fn enter(&mut self, state: State, now_ms: u64) -> bool {
        let is_change = self.state != state;
        self.state = state;
        self.since_ms = now_ms;
        self.probes = 0;
        self.successes = 0;
        is_change
    }

    fn forget(&mut self) {
        self.failures.clear();
        self.is_blurred = false;
    }

    fn age_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.since_ms)
    }

    /// A time in the future becomes now when it is read.
    fn look(&mut self, now_ms: u64) {
        self.since_ms = self.since_ms.min(now_ms);
        for failed in &mut self.failures {
            *failed = now_ms.min(*failed);
        }
    }

    fn recent(&self, now_ms: u64) -> usize {
        let is_recent = |failed: &&u64| now_ms.saturating_sub(**failed) < self.config.window_ms;
        self.failures.iter().filter(is_recent).count()
    }

    fn is_over(&self, now_ms: u64) -> bool {
        self.age_ms(now_ms) >= self.config.timeout_ms
    }

    /// What a read reports, which changes nothing: the state and its age.
    fn seen(&self, now_ms: u64) -> (State, u64) {
        match self.state {
            State::Open if self.is_over(now_ms) => (
                State::HalfOpen,
                self.age_ms(now_ms) - self.config.timeout_ms,
            ),
            state => (state, self.age_ms(now_ms)),
        }
    }

    fn check(&mut self, now_ms: u64) -> Result<Permit, CircuitOpen> {
        let is_over = self.is_over(now_ms);
        match self.state {
            State::Closed | State::Off => Ok(Permit::Free),
            State::Open if is_over => {
                self.enter(State::HalfOpen, now_ms);
                self.probes = 1;
                Ok(Permit::Probe { is_first: true })
            }
            State::HalfOpen if self.probes < u64::from(self.config.probe_limit) => {
                self.probes += 1;
                Ok(Permit::Probe { is_first: false })
            }
            State::HalfOpen if is_over && now_ms > self.since_ms => {
                // All probes are lost.
                self.since_ms = now_ms;
                self.probes = 1;
                Ok(Permit::Probe { is_first: false })
            }
            State::Open | State::HalfOpen => Err(CircuitOpen),
        }
    }

    fn succeed(&mut self, now_ms: u64) -> bool {
        if self.state != State::HalfOpen {
            return false;
        }
        self.successes += 1;
        if self.successes >= u64::from(self.config.success_threshold) {
            self.forget();
            return self.enter(State::Closed, now_ms);
        }
        self.probes = self.probes.saturating_sub(1);
        false
    }

    fn fail(&mut self, now_ms: u64, has_opened: bool) -> bool {
        match self.seen(now_ms).0 {
            State::Open | State::Off => false,
            State::HalfOpen => self.enter(State::Open, now_ms),
            State::Closed => {
                self.failures.push(now_ms);
                let threshold = self.config.failure_threshold as usize;
                let opens = if !self.is_blurred {
                    self.recent(now_ms) >= threshold
                } else if has_opened {
                    self.failures.len() >= threshold
                } else {
                    // It must have opened if the last failures were all within the window.
                    let last = self.failures.iter().rev().take(threshold);
                    let recent =
                        last.filter(|f| now_ms.saturating_sub(**f) < self.config.window_ms);
                    recent.count() >= threshold
                };
                opens && self.enter(State::Open, now_ms)
            }
        }
    }

    fn force(&mut self, is_open: bool, now_ms: u64) -> bool {
        if self.state == State::Off {
            return false;
        }
        self.forget();
        self.enter(if is_open { State::Open } else { State::Closed }, now_ms)
    }

    fn configure(&mut self, config: Option<Config>, now_ms: u64) {
        match config {
            None if self.state != State::Off => {
                self.enter(State::Off, now_ms);
            }
            None => {}
            Some(config) => {
                self.config = config;
                self.forget();
                if self.state == State::Off {
                    self.enter(State::Closed, now_ms);
                }
            }
        }
    }
}

fn run(config: Config, start_ms: u64, steps: Vec<Step>) {
    let clock = FakeClock::at_ns(start_ms * MS);
    let circuit = CircuitBreaker::new(Some(config), &clock).unwrap();
    let mut model = Model {
        config,
        state: State::Closed,
        since_ms: start_ms,
        probes: 0,
        successes: 0,
        failures: Vec::new(),
        is_blurred: false,
    };
    let until = |ms: u64, off_by: i64| {
        let to = ms.saturating_add_signed(off_by).max(clock.now_ms());
        clock.set_ns(clock.now_ns().max(to * MS));
    };
    for step in steps {
        let now_ms = clock.now_ms();
        match step {
            Step::Advance(ns) => clock.advance_ns(ns),
            Step::Timeout(off_by) => until(model.since_ms + model.config.timeout_ms, off_by),
            Step::Window(off_by) => {
                let oldest = model
                    .failures
                    .len()
                    .saturating_sub(model.config.failure_threshold as usize - 1);
                if let Some(failed) = model.failures.get(oldest) {
                    until(failed + model.config.window_ms, off_by);
                }
            }
            Step::Back(ns) => {
                clock.set_ns(clock.now_ns().saturating_sub(ns));
                model.is_blurred = true;
            }
            Step::Check => assert_eq!(circuit.check(&clock), model.check(now_ms)),
            Step::Success => assert_eq!(circuit.record_success(&clock), model.succeed(now_ms)),
            Step::Failure => {
                let has_opened = circuit.record_failure(&clock);
                assert_eq!(has_opened, model.fail(now_ms, has_opened));
            }
            Step::Release => {
                circuit.release_probe();
                model.probes = model.probes.saturating_sub(1);
            }
            Step::Force(is_open) => {
                let is_change = circuit.force(is_open, &clock);
                assert_eq!(is_change, model.force(is_open, now_ms));
            }
            Step::Configure(config) => {
                circuit.configure(config, &clock).unwrap();
                model.configure(config, now_ms);
            }
        }
        let is_on = model.state != State::Off;
        model.look(clock.now_ms());
        let (state, age_ms) = model.seen(clock.now_ms());
        assert_eq!(circuit.state(&clock), state);
        assert_eq!(circuit.config(), is_on.then_some(model.config));
        let wait_ms = circuit.wait_ms(&clock);
        let is_refused = model.clone().check(clock.now_ms()).is_err();
        assert_eq!(wait_ms > 0, is_refused);
        if state == State::Open {
            assert_eq!(wait_ms, model.config.timeout_ms - age_ms);
        }
        let (stats, now_ms) = (circuit.stats(&clock), clock.now_ms());
        assert_eq!(stats.state, state);
        assert_eq!(stats.probes, model.probes);
        assert_eq!(stats.successes, model.successes);
        assert_eq!(stats.since_ms, age_ms);
        let most = model.config.failure_threshold as usize - 1;
        if model.is_blurred {
            assert!(stats.failures <= model.failures.len().min(most));
        } else if is_on {
            assert_eq!(stats.failures, model.recent(now_ms).min(most));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 3_000 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn behaves_like_its_definition(
        config in configs(),
        start_ms in prop_oneof![Just(0), Just(100 * 31_557_600_000u64)],
        steps in any::<bool>().prop_flat_map(steps),
    ) {
        run(config, start_ms, steps);
    }
}

#[test]
fn opens_at_exactly_its_threshold() {
    let clock = FakeClock::at_ns(0);
    let circuit = CircuitBreaker::new(Some(Config::default()), &clock).unwrap();
    for _ in 0..49 {
        assert!(!circuit.record_failure(&clock));
        clock.advance_ns(MS);
    }
    assert_eq!(circuit.stats(&clock).failures, 49);
    // The first failure is 9,999 ms old now, which is within the window.
    clock.set_ns(9_999 * MS);
    assert!(circuit.record_failure(&clock));
    assert_eq!(circuit.check(&clock), Err(CircuitOpen));
    clock.advance_ns(29_999 * MS);
    assert_eq!(circuit.check(&clock), Err(CircuitOpen));
    clock.advance_ns(MS);
    let first = Permit::Probe { is_first: true };
    assert_eq!(circuit.check(&clock), Ok(first));
    for n in 1..=10 {
        assert_eq!(circuit.record_success(&clock), n == 10);
    }
    assert_eq!(circuit.state(&clock), State::Closed);
}

/// Without any call of `check`, so that a caller that reads the state before it sends is not locked out.
#[test]
fn an_open_circuit_becomes_half_open_by_itself() {
    let clock = FakeClock::at_ns(0);
    let circuit = CircuitBreaker::new(Some(Config::default()), &clock).unwrap();
    circuit.force(true, &clock);
    clock.set_ns(29_999 * MS);
    assert_eq!(circuit.state(&clock), State::Open);
    assert!(!circuit.record_failure(&clock), "open already");
    clock.set_ns(30_000 * MS);
    assert_eq!(circuit.state(&clock), State::HalfOpen);
    clock.set_ns(31_000 * MS);
    assert_eq!(circuit.stats(&clock).since_ms, 1_000);
    assert!(!circuit.record_success(&clock), "not of a probe");
    assert_eq!(circuit.stats(&clock).successes, 0);
    assert!(!circuit.record_failure(&clock), "open before and after");
    assert_eq!(circuit.state(&clock), State::Open);
    clock.set_ns(61_000 * MS);
    assert_eq!(circuit.state(&clock), State::HalfOpen);
    let first = Permit::Probe { is_first: true };
    assert_eq!(circuit.check(&clock), Ok(first));
}

/// A virtual machine that is restored from a snapshot of an hour ago.
#[test]
fn nothing_waits_for_a_clock_that_went_back() {
    const HOUR_MS: u64 = 3_600_000;
    let clock = FakeClock::at_ns(HOUR_MS * MS);
    let config = Config {
        failure_threshold: 3,
        success_threshold: 2,
        probe_limit: 1,
        ..Config::default()
    };
    let circuit = CircuitBreaker::new(Some(config), &clock).unwrap();
    let first = Permit::Probe { is_first: true };
    // Open.
    circuit.force(true, &clock);
    clock.set_ns(0);
    assert_eq!(circuit.check(&clock), Err(CircuitOpen));
    clock.set_ns(29_999 * MS);
    assert_eq!(circuit.state(&clock), State::Open);
    clock.set_ns(30_000 * MS);
    assert_eq!(circuit.check(&clock), Ok(first));
    // Half open, with a probe whose outcome is never recorded.
    clock.set_ns(5 * MS);
    assert_eq!(circuit.check(&clock), Err(CircuitOpen));
    clock.set_ns(30_005 * MS);
    let other = Permit::Probe { is_first: false };
    assert_eq!(circuit.check(&clock), Ok(other));
    // Closed: the earlier failures are forgotten a window later.
    circuit.force(false, &clock);
    clock.set_ns(HOUR_MS * MS);
    assert!(!circuit.record_failure(&clock));
    assert!(!circuit.record_failure(&clock));
    clock.set_ns(0);
    assert_eq!(circuit.stats(&clock).failures, 2);
    clock.set_ns(9_999 * MS);
    assert_eq!(circuit.stats(&clock).failures, 2);
    clock.set_ns(10_000 * MS);
    assert_eq!(circuit.stats(&clock).failures, 0);
    assert!(!circuit.record_failure(&clock));
    assert!(!circuit.record_failure(&clock));
    assert_eq!(circuit.state(&clock), State::Closed);
}

#[test]
fn a_failure_as_old_as_the_window_is_out_of_it() {
    let clock = FakeClock::at_ns(0);
    let config = Config {
        failure_threshold: 2,
        window_ms: 10,
        ..Config::default()
    };
    let circuit = CircuitBreaker::new(Some(config), &clock).unwrap();
    circuit.record_failure(&clock);
    clock.set_ns(10 * MS);
    assert!(!circuit.record_failure(&clock));
    clock.set_ns(20 * MS - 1);
    assert!(circuit.record_failure(&clock));
}

#[test]
fn configs_name_what_is_wrong() {
    let clock = FakeClock::at_ns(0);
    let good = Config::default();
    let bad = |field, config| {
        let error = ConfigError(field);
        assert_eq!(
            CircuitBreaker::new(Some(config), &clock).map(|_| ()),
            Err(error)
        );
        let circuit = CircuitBreaker::new(Some(good), &clock).unwrap();
        assert_eq!(circuit.configure(Some(config), &clock), Err(error));
        assert_eq!(circuit.config(), Some(good));
        assert!(error.to_string().contains(field));
    };
    for failure_threshold in [0, (1 << 16) + 1, u32::MAX] {
        let config = Config {
            failure_threshold,
            ..good
        };
        bad("failure_threshold", config);
    }
    for window_ms in [0, 1 << 42, u64::MAX] {
        bad("window_ms", Config { window_ms, ..good });
    }
    for success_threshold in [0, 1024, u32::MAX] {
        let config = Config {
            success_threshold,
            ..good
        };
        bad("success_threshold", config);
    }
    for timeout_ms in [1 << 42, u64::MAX] {
        bad("timeout_ms", Config { timeout_ms, ..good });
    }
    for probe_limit in [0, 1024, u32::MAX] {
        bad(
            "probe_limit",
            Config {
                probe_limit,
                ..good
            },
        );
    }
}

/// All bounds at once: no field of the word overflows into the next one.
#[test]
fn the_largest_config_works() {
    let clock = FakeClock::at_ns(0);
    let config = Config {
        failure_threshold: 1 << 16,
        window_ms: (1 << 42) - 1,
        success_threshold: 1023,
        timeout_ms: 0,
        probe_limit: 1023,
    };
    let circuit = CircuitBreaker::new(Some(config), &clock).unwrap();
    clock.set_ns(((1 << 42) - 2) * MS);
    for n in 1..=1u32 << 16 {
        assert_eq!(circuit.record_failure(&clock), n == 1 << 16);
    }
    for n in 1..=1023 {
        let permit = Permit::Probe { is_first: n == 1 };
        assert_eq!(circuit.check(&clock), Ok(permit));
    }
    assert_eq!(circuit.check(&clock), Err(CircuitOpen));
    for n in 1..=1023 {
        assert_eq!(circuit.stats(&clock).probes, 1024 - n);
        assert_eq!(circuit.record_success(&clock), n == 1023);
    }
    assert_eq!(circuit.check(&clock), Ok(Permit::Free));
}
