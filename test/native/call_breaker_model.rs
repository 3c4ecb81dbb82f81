//! The call breaker against its definition: the model computes every figure from lists of outcomes.

use erlmcp_core::call_breaker::{CallBreaker, Config, MAX_PROBES, MAX_WINDOW, Outcome, Permit};
use erlmcp_core::circuit_breaker::{ConfigError, State};
use erlmcp_core::clock::FakeClock;
use proptest::prelude::*;

const MS: u64 = 1_000_000;

#[derive(Debug, Clone)]
enum Step {
    Advance(u64),
    /// Advances to the end of the open state, plus so many milliseconds.
    Timeout(i64),
    Back(u64),
    Enter(Option<u64>),
    /// Ends one of the running calls.
    Leave(prop::sample::Index, bool),
    Abandon(prop::sample::Index),
    Force(u8),
    Reset,
}

fn configs() -> impl Strategy<Value = Config> {
    (
        1..6u32,
        1..4u32,
        1..20u64,
        prop_oneof![1..8u32, Just(40)],
        prop_oneof![Just(0.0), Just(0.3), Just(0.5), Just(1.0)],
        1..4u32,
    )
        .prop_map(
            |(failure_threshold, success_threshold, timeout_ms, window_size, rate, probe_limit)| {
                Config {
                    failure_threshold,
                    success_threshold,
                    timeout_ms,
                    window_size,
                    failure_rate_threshold: rate,
                    probe_limit,
                }
            },
        )
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..6u64).prop_map(Step::Advance),
        4 => (-1..2i64).prop_map(Step::Timeout),
        1 => (0..30u64).prop_map(Step::Back),
        16 => prop::option::of(0..20u64).prop_map(Step::Enter),
        14 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(i, s)| Step::Leave(i, s)),
        2 => any::<prop::sample::Index>().prop_map(Step::Abandon),
        1 => (0..3u8).prop_map(Step::Force),
        1 => Just(Step::Reset),
    ];
    prop::collection::vec(step, 1..200)
}

/// A running call.
struct Running {
    permit: Permit,
    period: u32,
    /// The deadline of its slot: `None` without a slot, `u64::MAX` without a deadline.
    slot: Option<u64>,
    has_lost_its_slot: bool,
}

struct Model {
    config: Config,
    state: State,
    period: u32,
    began_ms: u64,
    window: Vec<bool>,
    failures_in_a_row: u64,
    successes_in_a_row: u64,
    successes: u64,
    failures: u64,
    rejected: u64,
    running: Vec<Running>,
    longest_ms: u64,
    untold: Vec<State>,
}

impl Model {
    fn begin(&mut self, state: State, now_ms: u64) {
        self.state = state;
        self.period += 1;
        self.began_ms = now_ms;
        self.untold.push(state);
        match state {
            State::Closed => {
                self.window.clear();
                self.failures_in_a_row = 0;
            }
            State::Open => self.successes_in_a_row = 0,
            _ => {
                self.failures_in_a_row = 0;
                self.successes_in_a_row = 0;
            }
        }
    }

    /// Done at every access: a time in the future becomes now, and an open state whose timeout has passed becomes
    /// half open.
    fn settle(&mut self, now_ms: u64) {
        if self.state == State::Open {
            self.began_ms = self.began_ms.min(now_ms);
            if now_ms - self.began_ms >= self.config.timeout_ms {
                self.begin(State::HalfOpen, now_ms);
            }
        }
    }

    fn enter(&mut self, now_ms: u64, limit_ms: Option<u64>) -> Option<Option<u64>> {
        self.settle(now_ms);
        match self.state {
            State::Closed => Some(None),
            State::HalfOpen => {
                self.longest_ms = self.longest_ms.max(limit_ms.unwrap_or(0));
                let latest = now_ms + self.longest_ms;
                let deadline = limit_ms.map_or(u64::MAX, |limit| now_ms + limit);
                let held = self.running.iter().filter(|call| call.slot.is_some());
                if held.count() < self.config.probe_limit as usize {
                    return Some(Some(deadline));
                }
                None.or_else(|| self.reclaim(now_ms, latest).then_some(Some(deadline)))
            }
            _ => None,
        }
    }

    /// Whether a slot is overdue. Which of several is reclaimed matters only to its call, so the test asks the
    /// breaker (see `run`).
    fn reclaim(&mut self, now_ms: u64, latest: u64) -> bool {
        self.running.iter().any(|call| {
            call.slot
                .is_some_and(|slot| slot <= now_ms && slot <= latest)
        })
    }

    fn leave(&mut self, index: usize, is_success: bool, now_ms: u64) {
        let call = self.running.remove(index);
        if is_success {
            self.successes += 1;
        } else {
            self.failures += 1;
        }
        if call.period != self.period || call.has_lost_its_slot {
            return;
        }
        self.window.push(!is_success);
        if is_success {
            self.successes_in_a_row += 1;
            self.failures_in_a_row = 0;
            if self.state == State::HalfOpen
                && self.successes_in_a_row >= u64::from(self.config.success_threshold)
            {
                self.begin(State::Closed, now_ms);
            }
            return;
        }
        self.failures_in_a_row += 1;
        self.successes_in_a_row = 0;
        let is_full = self.window.len() >= self.config.window_size as usize;
        if self.state == State::HalfOpen
            || self.failures_in_a_row >= u64::from(self.config.failure_threshold)
            || is_full && self.rate() >= self.config.failure_rate_threshold
        {
            self.begin(State::Open, now_ms);
        }
    }

    fn rate(&self) -> f64 {
        let size = self.config.window_size as usize;
        let last = &self.window[self.window.len().saturating_sub(size)..];
        let failures = last.iter().filter(|is_failure| **is_failure).count();
        failures as f64 / last.len().max(1) as f64
    }

    fn force(&mut self, state: State, now_ms: u64) {
        self.settle(now_ms);
        if self.state != state && (state != State::HalfOpen || self.state == State::Open) {
            self.begin(state, now_ms);
        }
    }

    fn reset(&mut self, now_ms: u64) {
        self.settle(now_ms);
        let was_closed = self.state == State::Closed;
        self.begin(State::Closed, now_ms);
        if was_closed {
            self.untold.pop();
        }
        self.successes_in_a_row = 0;
    }
}

fn run(config: Config, start_ms: u64, steps: Vec<Step>) {
    let clock = FakeClock::at_ns(start_ms * MS);
    let breaker = CallBreaker::new(config, &clock).unwrap();
    let mut model = Model {
        config,
        state: State::Closed,
        period: 0,
        began_ms: start_ms,
        window: Vec::new(),
        failures_in_a_row: 0,
        successes_in_a_row: 0,
        successes: 0,
        failures: 0,
        rejected: 0,
        running: Vec::new(),
        longest_ms: 0,
        untold: Vec::new(),
    };
    let mut now_ms = start_ms;
    for step in steps {
        let mut told = Vec::new();
        match step {
            Step::Advance(ms) => now_ms += ms,
            Step::Timeout(off_by) => {
                let end = (model.began_ms + config.timeout_ms).saturating_add_signed(off_by);
                now_ms = now_ms.max(end);
            }
            Step::Back(ms) => {
                now_ms = now_ms.saturating_sub(ms);
                // The deadlines of slots claimed before are uncertain now, so all running calls end.
                while !model.running.is_empty() {
                    let permit = model.running[0].permit;
                    let mut changes = Vec::new();
                    breaker.leave(permit, Outcome::Success, &clock, &mut changes);
                    model.leave(0, true, clock_ms(&clock));
                    told.extend(changes);
                }
                model.began_ms = model.began_ms.min(now_ms);
            }
            Step::Enter(limit_ms) => {
                let expected = model.enter(now_ms, limit_ms);
                let entered = breaker.enter(&clock, limit_ms, &mut told);
                assert_eq!(entered.is_ok(), expected.is_some());
                match entered {
                    Err(_) => model.rejected += 1,
                    Ok(permit) => {
                        // The slot may have been reclaimed from an overdue call.
                        for call in &mut model.running {
                            if call.slot.is_some() && !breaker.holds_its_slot(call.permit) {
                                assert!(call.slot.is_some_and(|slot| slot <= now_ms));
                                call.slot = None;
                                call.has_lost_its_slot = true;
                            }
                        }
                        model.running.push(Running {
                            permit,
                            period: model.period,
                            slot: expected.flatten(),
                            has_lost_its_slot: false,
                        });
                    }
                }
            }
            Step::Leave(index, is_success) if !model.running.is_empty() => {
                let index = index.index(model.running.len());
                let outcome = if is_success {
                    Outcome::Success
                } else {
                    Outcome::Failure
                };
                breaker.leave(model.running[index].permit, outcome, &clock, &mut told);
                model.leave(index, is_success, now_ms);
            }
            Step::Abandon(index) if !model.running.is_empty() => {
                let index = index.index(model.running.len());
                breaker.abandon(model.running[index].permit, &clock);
                model.leave(index, false, now_ms);
            }
            Step::Leave(..) | Step::Abandon(_) => {}
            Step::Force(which) => {
                let state = [State::Closed, State::Open, State::HalfOpen][usize::from(which)];
                breaker.force(state, &clock, &mut told);
                model.force(state, now_ms);
            }
            Step::Reset => {
                breaker.reset(&clock, &mut told);
                model.reset(now_ms);
            }
        }
        clock.set_ns(now_ms * MS);
        model.settle(now_ms);
        let stats = breaker.stats(&clock, &mut told);
        assert_eq!(told, std::mem::take(&mut model.untold));
        assert_eq!(stats.state, model.state);
        assert_eq!(stats.consecutive_failures, model.failures_in_a_row);
        assert_eq!(stats.consecutive_successes, model.successes_in_a_row);
        assert_eq!(stats.total_successes, model.successes);
        assert_eq!(stats.total_failures, model.failures);
        assert_eq!(stats.total_rejected, model.rejected);
        assert_eq!(stats.failure_rate, model.rate());
        let held = model.running.iter().filter(|call| call.slot.is_some());
        assert_eq!(stats.probes, held.count());
        assert!(stats.probes <= config.probe_limit as usize);
    }
}

fn clock_ms(clock: &FakeClock) -> u64 {
    use erlmcp_core::clock::Clock;
    clock.now_ms()
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
        steps in steps(),
    ) {
        run(config, start_ms, steps);
    }
}

fn config() -> Config {
    Config {
        failure_threshold: 5,
        success_threshold: 2,
        timeout_ms: 60_000,
        window_size: 10,
        failure_rate_threshold: 0.5,
        probe_limit: 2,
    }
}

/// A virtual machine that is restored from a snapshot of an hour ago.
#[test]
fn nothing_waits_for_a_clock_that_went_back() {
    const HOUR_MS: u64 = 3_600_000;
    let clock = FakeClock::at_ns(HOUR_MS * MS);
    let breaker = CallBreaker::new(config(), &clock).unwrap();
    let changes = &mut Vec::new();
    breaker.force(State::Open, &clock, changes);
    clock.set_ns(0);
    assert_eq!(breaker.state(&clock, changes), State::Open);
    clock.set_ns(59_999 * MS);
    assert_eq!(breaker.state(&clock, changes), State::Open);
    clock.set_ns(60_000 * MS);
    assert_eq!(breaker.state(&clock, changes), State::HalfOpen);
    // Slots that were claimed for five seconds are held for no more than five seconds.
    clock.set_ns(HOUR_MS * MS);
    let enter = |changes: &mut _| breaker.enter(&clock, Some(5_000), changes);
    assert!(enter(changes).is_ok() && enter(changes).is_ok());
    clock.set_ns(1_000 * MS);
    assert!(enter(changes).is_err());
    clock.set_ns(5_999 * MS);
    assert!(enter(changes).is_err());
    clock.set_ns(6_000 * MS);
    assert!(enter(changes).is_ok());
}

#[test]
fn the_largest_config_works() {
    let clock = FakeClock::at_ns(0);
    let largest = Config {
        failure_threshold: u32::MAX,
        success_threshold: u32::MAX,
        timeout_ms: u64::from(u32::MAX),
        window_size: MAX_WINDOW,
        failure_rate_threshold: 1.0,
        probe_limit: MAX_PROBES,
    };
    let breaker = CallBreaker::new(largest, &clock).unwrap();
    let changes = &mut Vec::new();
    let fail = |changes: &mut _| {
        let permit = breaker.enter(&clock, None, changes).unwrap();
        breaker.leave(permit, Outcome::Failure, &clock, changes);
    };
    for _ in 1..MAX_WINDOW {
        fail(changes);
    }
    assert!(changes.is_empty());
    fail(changes);
    assert_eq!(*changes, [State::Open]);
    breaker.force(State::HalfOpen, &clock, changes);
    for _ in 0..MAX_PROBES {
        assert!(breaker.enter(&clock, None, changes).is_ok());
    }
    assert!(breaker.enter(&clock, None, changes).is_err());
}

#[test]
fn configs_name_what_is_wrong() {
    let clock = FakeClock::at_ns(0);
    let bad = |field, config| {
        let error = CallBreaker::new(config, &clock).map(|_| ()).unwrap_err();
        assert_eq!(error, ConfigError(field));
    };
    let good = config();
    bad(
        "failure_threshold",
        Config {
            failure_threshold: 0,
            ..good
        },
    );
    bad(
        "success_threshold",
        Config {
            success_threshold: 0,
            ..good
        },
    );
    for timeout_ms in [0, 1 << 32] {
        bad("timeout", Config { timeout_ms, ..good });
    }
    for window_size in [0, MAX_WINDOW + 1] {
        bad(
            "window_size",
            Config {
                window_size,
                ..good
            },
        );
    }
    for failure_rate_threshold in [-0.1, 1.1, f64::NAN] {
        let config = Config {
            failure_rate_threshold,
            ..good
        };
        bad("failure_rate_threshold", config);
    }
    for probe_limit in [0, MAX_PROBES + 1] {
        bad(
            "probe_limit",
            Config {
                probe_limit,
                ..good
            },
        );
    }
}
