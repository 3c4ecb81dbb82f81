//! A circuit breaker: refuses everything for a while after too many failures.
//!
//! # Algorithm
//!
//! The three states of M. Nygard, *Release It!* (2007):
//!
//! ```text
//!            failure_threshold failures within window_ms
//!   closed ────────────────────────────────────────────► open ◄─────────┐
//!     ▲                                                   │ timeout_ms  │ a failure
//!     │           success_threshold successes             ▼             │
//!     └─────────────────────────────────────────────── half open ───────┘
//! ```
//!
//! State, counters and the time of the last change are one word:
//!
//! ```text
//! bits 63..62  state        0 closed, 1 open, 2 half open, 3 off
//! bits 61..52  probes       let through while half open and not yet answered
//! bits 51..42  successes    of probes while half open
//! bits 41..0   since_ms     when this state began: enough for 139 years
//! ```
//!
//! so that every change is one compare-and-swap. No timer makes a circuit half open. A circuit whose word says open
//! is half open from `timeout_ms` after `since_ms` on, and the next change of the word starts from that state.
//!
//! Failures while closed are counted beside the word, in a ring of `failure_threshold - 1` times. A failure that
//! replaces a time within the window is the last one of `failure_threshold`. That is the exact sliding window.
//!
//! # Guarantee
//!
//! While closed, [`CircuitBreaker::check`] is one load and no write. While half open at most
//! `probe_limit` probes are under way, whatever the number of threads. Of `failure_threshold`
//! failures within the window one opens the circuit; each change is reported to exactly one caller.
//!
//! # Trade-offs
//!
//! A probe whose outcome is never reported holds its place until `timeout_ms` after the circuit became half open;
//! then all places are free again. Concurrent failures may take their places in the ring in another order than they
//! read the clock.
//!
//! # A clock that goes back
//!
//! A time in the future was written before the clock went back. A thread that finds one replaces it by now. So an
//! open circuit waits at most `timeout_ms` from then on, and a failure leaves the window at the latest when the
//! window has passed since then.

use std::fmt;

use crate::clock::Clock;
use crate::snapshot::Snapshot;
use crate::sync::{AtomicU64, Ordering};

/// When the circuit opens and closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Failures within the window that open it, 1 to 65,536.
    pub failure_threshold: u32,
    /// The window, at least 1.
    pub window_ms: u64,
    /// Successes that close it, 1 to 1,023.
    pub success_threshold: u32,
    /// How long it stays open.
    pub timeout_ms: u64,
    /// Probes under way at one time, 1 to 1,023.
    pub probe_limit: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            failure_threshold: 50,
            window_ms: 10_000,
            success_threshold: 10,
            timeout_ms: 30_000,
            probe_limit: 10,
        }
    }
}

/// A field of a [`Config`] that is out of bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigError(pub &'static str);

impl Config {
    fn check(&self) -> Result<(), ConfigError> {
        let counts = 1..=MAX_COUNT as u32;
        if !(1..=1 << 16).contains(&self.failure_threshold) {
            Err(ConfigError("failure_threshold"))
        } else if self.window_ms == 0 || self.window_ms > MAX_MS {
            Err(ConfigError("window_ms"))
        } else if !counts.contains(&self.success_threshold) {
            Err(ConfigError("success_threshold"))
        } else if self.timeout_ms > MAX_MS {
            Err(ConfigError("timeout_ms"))
        } else if !counts.contains(&self.probe_limit) {
            Err(ConfigError("probe_limit"))
        } else {
            Ok(())
        }
    }
}

/// The state of a circuit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Lets everything through and counts failures.
    Closed = 0,
    /// Refuses everything.
    Open = 1,
    /// Lets some probes through.
    HalfOpen = 2,
    /// Lets everything through and counts nothing.
    Off = 3,
}

const MAX_COUNT: u64 = (1 << 10) - 1;
const MAX_MS: u64 = (1 << 42) - 1;

/// The word: see the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Word(u64);

impl Word {
    fn new(state: State, probes: u64, successes: u64, since_ms: u64) -> Self {
        Self((state as u64) << 62 | probes << 52 | successes << 42 | since_ms.min(MAX_MS))
    }

    fn state(self) -> State {
        match self.0 >> 62 {
            0 => State::Closed,
            1 => State::Open,
            2 => State::HalfOpen,
            _ => State::Off,
        }
    }

    fn probes(self) -> u64 {
        self.0 >> 52 & MAX_COUNT
    }

    fn successes(self) -> u64 {
        self.0 >> 42 & MAX_COUNT
    }

    fn since_ms(self) -> u64 {
        self.0 & MAX_MS
    }
}

/// A call that was let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    /// Nothing needs to be reported.
    Free,
    /// The call is a probe; its outcome must be reported.
    Probe {
        /// This call has made the circuit half open.
        is_first: bool,
    },
}

/// A call that was refused: the circuit is open, or half open with all probes under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CircuitOpen;

/// The config in force, and the times of the last failures.
#[derive(Debug)]
struct Settings {
    config: Config,
    next: AtomicU64,
    /// `ms + 1`; 0 is none.
    failures: Box<[AtomicU64]>,
}

impl Settings {
    fn new(config: Config) -> Self {
        Self {
            config,
            next: AtomicU64::new(0),
            failures: (1..config.failure_threshold)
                .map(|_| AtomicU64::new(0))
                .collect(),
        }
    }

    /// Records a failure. Returns whether it is the last one of `failure_threshold` within the window.
    fn failed(&self, now_ms: u64) -> bool {
        let length = self.failures.len() as u64;
        if length == 0 {
            return true;
        }
        let index = self.next.fetch_add(1, Ordering::Relaxed) % length;
        let former = self.failures[index as usize].swap(now_ms + 1, Ordering::AcqRel);
        if former > now_ms + 1 {
            self.move_to(now_ms);
        }
        former != 0 && (now_ms + 1).saturating_sub(former) < self.config.window_ms
    }

    /// The clock has gone back: moves failures in the future to now.
    fn move_to(&self, now_ms: u64) {
        for failure in &self.failures {
            let failed = failure.load(Ordering::Relaxed);
            if failed > now_ms + 1 {
                // Lost to a concurrent failure, which has as good a time.
                let _ = failure.compare_exchange(
                    failed,
                    now_ms + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
            }
        }
    }

    fn forget(&self) {
        for failure in &self.failures {
            failure.store(0, Ordering::Release);
        }
    }

    fn failures(&self, now_ms: u64) -> usize {
        self.move_to(now_ms);
        let is_recent = |failure: &&AtomicU64| {
            let failed = failure.load(Ordering::Relaxed);
            failed != 0 && (now_ms + 1).saturating_sub(failed) < self.config.window_ms
        };
        self.failures.iter().filter(is_recent).count()
    }
}

/// The state and the counters of a circuit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// The state.
    pub state: State,
    /// Failures within the window, at most one less than the threshold.
    pub failures: usize,
    /// Successes of probes.
    pub successes: u64,
    /// Probes under way.
    pub probes: u64,
    /// How long it has been in this state.
    pub since_ms: u64,
    /// How often it has changed to open, half open and closed.
    pub transitions: Transitions,
}

/// How often a circuit has changed to each state, since it was made. It counts as half open from its first probe on. Being
/// switched on or off is no change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transitions {
    /// To open.
    pub open: u64,
    /// To half open.
    pub half_open: u64,
    /// To closed.
    pub closed: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct CircuitBreaker {
    word: AtomicU64,
    /// A copy of the config's, apart: a refusal needs nothing else.
    timeout_ms: AtomicU64,
    settings: Snapshot<Settings>,
    /// By the state that was entered: closed, open, half open. Written by changes of the state alone.
    transitions: [AtomicU64; 3],
}

impl CircuitBreaker {
    /// A closed circuit; `None` for one that is off.
    pub fn new(config: Option<Config>, clock: &impl Clock) -> Result<Self, ConfigError> {
        config.unwrap_or_default().check()?;
        let state = config.map_or(State::Off, |_| State::Closed);
        Ok(Self {
            word: AtomicU64::new(Word::new(state, 0, 0, clock.now_ms()).0),
            timeout_ms: AtomicU64::new(config.unwrap_or_default().timeout_ms),
            settings: Snapshot::new(Settings::new(config.unwrap_or_default())),
            transitions: std::array::from_fn(|_| AtomicU64::new(0)),
        })
    }

    #[inline]
    fn word(&self) -> Word {
        Word(self.word.load(Ordering::Acquire))
    }

    /// The word, with its time moved to `now_ms` if it is later: see the module's documentation.
    fn word_until(&self, now_ms: u64) -> Word {
        let mut held = self.word();
        while held.since_ms() > now_ms {
            let next = Word::new(held.state(), held.probes(), held.successes(), now_ms);
            match self.exchange(held, next) {
                Ok(()) => return next,
                Err(changed) => held = changed,
            }
        }
        held
    }

    /// The word with its state at `now_ms`.
    fn at(&self, held: Word, now_ms: u64) -> Word {
        let is_over =
            now_ms.saturating_sub(held.since_ms()) >= self.timeout_ms.load(Ordering::Relaxed);
        if held.state() == State::Open && is_over {
            Word::new(State::HalfOpen, 0, 0, now_ms)
        } else {
            held
        }
    }

    /// The present state.
    pub fn state(&self, clock: &impl Clock) -> State {
        let now_ms = clock.now_ms();
        self.at(self.word_until(now_ms), now_ms).state()
    }

    /// Whether a call may go through. One load while the circuit is closed or off.
    #[inline]
    pub fn check(&self, clock: &impl Clock) -> Result<Permit, CircuitOpen> {
        match self.word().state() {
            State::Closed | State::Off => Ok(Permit::Free),
            State::Open | State::HalfOpen => self.probe(clock),
        }
    }

    #[cold]
    fn probe(&self, clock: &impl Clock) -> Result<Permit, CircuitOpen> {
        let mut held = self.word_until(clock.now_ms());
        loop {
            let now_ms = clock.now_ms();
            let current = self.at(held, now_ms);
            let age_ms = now_ms.saturating_sub(current.since_ms());
            let (probes, since_ms) = match current.state() {
                State::Closed | State::Off => return Ok(Permit::Free),
                State::Open => return Err(CircuitOpen),
                State::HalfOpen if current.probes() < self.probe_limit() => {
                    (current.probes() + 1, current.since_ms())
                }
                State::HalfOpen if self.has_lost_probes(age_ms) => (1, now_ms),
                State::HalfOpen => return Err(CircuitOpen),
            };
            let next = Word::new(State::HalfOpen, probes, current.successes(), since_ms);
            match self.exchange(held, next) {
                Ok(()) => {
                    return Ok(Permit::Probe {
                        is_first: held.state() == State::Open,
                    });
                }
                Err(changed) => held = changed,
            }
        }
    }

    /// Milliseconds until a call may go through; 0 if one may now. Leaves no trace of the question. While half open
    /// with all probes under way it is 1, since a probe may be answered at any time.
    pub fn wait_ms(&self, clock: &impl Clock) -> u64 {
        let now_ms = clock.now_ms();
        let current = self.at(self.word_until(now_ms), now_ms);
        let age_ms = now_ms.saturating_sub(current.since_ms());
        match current.state() {
            State::Closed | State::Off => 0,
            State::Open => self
                .timeout_ms
                .load(Ordering::Relaxed)
                .saturating_sub(age_ms)
                .max(1),
            State::HalfOpen if self.has_free_probe(current, age_ms) => 0,
            State::HalfOpen => 1,
        }
    }

    /// Whether another probe may go through, while half open for `age_ms`.
    ///
    /// Probes whose outcomes have not been reported in `timeout_ms` are lost. A circuit that became half open at this
    /// moment cannot have lost any.
    fn has_free_probe(&self, half_open: Word, age_ms: u64) -> bool {
        half_open.probes() < self.probe_limit() || self.has_lost_probes(age_ms)
    }

    fn has_lost_probes(&self, age_ms: u64) -> bool {
        age_ms > 0 && age_ms >= self.timeout_ms.load(Ordering::Relaxed)
    }

    fn probe_limit(&self) -> u64 {
        self.settings
            .read(|settings| u64::from(settings.config.probe_limit))
    }

    fn exchange(&self, held: Word, next: Word) -> Result<(), Word> {
        self.word
            .compare_exchange(held.0, next.0, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| self.count_transition(held.state(), next.state()))
            .map_err(Word)
    }

    fn count_transition(&self, from: State, to: State) {
        if from != to && from != State::Off && to != State::Off {
            self.transitions[to as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    fn transitions(&self) -> Transitions {
        let to = |state: State| self.transitions[state as usize].load(Ordering::Relaxed);
        Transitions {
            open: to(State::Open),
            half_open: to(State::HalfOpen),
            closed: to(State::Closed),
        }
    }

    /// Records the success of a probe. Returns whether that has closed the circuit. Does not count if no call has
    /// been let through since the circuit opened.
    pub fn record_success(&self, clock: &impl Clock) -> bool {
        let mut held = self.word();
        while held.state() == State::HalfOpen {
            let threshold = self
                .settings
                .read(|settings| u64::from(settings.config.success_threshold));
            let successes = held.successes() + 1;
            let next = if successes >= threshold {
                // Before the circuit is closed, since failures count from then on.
                self.settings.read(Settings::forget);
                Word::new(State::Closed, 0, 0, clock.now_ms())
            } else {
                let probes = held.probes().saturating_sub(1);
                Word::new(State::HalfOpen, probes, successes, held.since_ms())
            };
            match self.exchange(held, next) {
                Ok(()) => return next.state() == State::Closed,
                Err(changed) => held = changed,
            }
        }
        false
    }

    /// Records a failure. Returns whether that has opened the circuit. If no call has been let through since the
    /// circuit opened before, returns `false`, although the circuit's time begins anew.
    pub fn record_failure(&self, clock: &impl Clock) -> bool {
        let now_ms = clock.now_ms();
        let mut held = self.word_until(now_ms);
        loop {
            let open = Word::new(State::Open, 0, 0, now_ms);
            match self.at(held, now_ms).state() {
                State::Open | State::Off => return false,
                State::HalfOpen => match self.exchange(held, open) {
                    Ok(()) => return held.state() != State::Open,
                    // The circuit may have been closed meanwhile. Then this counts as a failure while closed.
                    Err(changed) => held = changed,
                },
                // The last one of `failure_threshold`. If the word has changed since it was loaded, another failure
                // has opened the circuit, or a call has closed it, which is ordered after all failures that were
                // counted before.
                State::Closed => {
                    return self.settings.read(|settings| settings.failed(now_ms))
                        && self.exchange(held, open).is_ok();
                }
            }
        }
    }

    /// Ends a probe that has neither succeeded nor failed: its place is free again.
    pub fn release_probe(&self) {
        let mut held = self.word();
        while held.state() == State::HalfOpen && held.probes() > 0 {
            let next = Word::new(
                State::HalfOpen,
                held.probes() - 1,
                held.successes(),
                held.since_ms(),
            );
            match self.exchange(held, next) {
                Ok(()) => return,
                Err(changed) => held = changed,
            }
        }
    }

    /// Opens or closes the circuit, unless it is off. Former failures are forgotten. Returns whether the state
    /// changed.
    pub fn force(&self, is_open: bool, clock: &impl Clock) -> bool {
        let state = if is_open { State::Open } else { State::Closed };
        let mut held = self.word();
        while held.state() != State::Off {
            self.settings.read(Settings::forget);
            match self.exchange(held, Word::new(state, 0, 0, clock.now_ms())) {
                Ok(()) => return held.state() != state,
                Err(changed) => held = changed,
            }
        }
        false
    }

    /// Changes the config; `None` switches the circuit off. The state stays if the circuit was on before. Failures
    /// are counted anew.
    pub fn configure(&self, config: Option<Config>, clock: &impl Clock) -> Result<(), ConfigError> {
        if let Some(config) = config {
            config.check()?;
            self.settings
                .update(|_| Ok::<_, ConfigError>(Settings::new(config)))?;
            self.timeout_ms.store(config.timeout_ms, Ordering::Relaxed);
        }
        let mut held = self.word();
        while (held.state() == State::Off) != config.is_none() {
            let state = config.map_or(State::Off, |_| State::Closed);
            match self.exchange(held, Word::new(state, 0, 0, clock.now_ms())) {
                Ok(()) => break,
                Err(changed) => held = changed,
            }
        }
        Ok(())
    }

    /// The config; `None` if the circuit is off.
    pub fn config(&self) -> Option<Config> {
        (self.word().state() != State::Off).then(|| self.settings.read(|settings| settings.config))
    }

    /// State and counters.
    pub fn stats(&self, clock: &impl Clock) -> Stats {
        let now_ms = clock.now_ms();
        let held = self.word_until(now_ms);
        let current = self.at(held, now_ms);
        let began_ms = if current == held {
            held.since_ms()
        } else {
            held.since_ms() + self.timeout_ms.load(Ordering::Relaxed)
        };
        Stats {
            state: current.state(),
            failures: self.settings.read(|settings| settings.failures(now_ms)),
            successes: current.successes(),
            probes: current.probes(),
            since_ms: now_ms.saturating_sub(began_ms),
            transitions: self.transitions(),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is out of bounds", self.0)
    }
}

impl std::error::Error for ConfigError {}
