//! A circuit breaker around calls: opened by their outcomes.
//!
//! # Algorithm
//!
//! The three states of M. Nygard, *Release It!* (2007), with a count-based window:
//!
//! ```text
//!            failure_threshold failures in a row, or
//!            failure_rate_threshold over a full window
//!   closed ───────────────────────────────────────────► open ◄────────┐
//!     ▲                                                  │ timeout_ms │ a failure
//!     │         success_threshold successes in a row     ▼            │
//!     └──────────────────────────────────────────────── half open ────┘
//! ```
//!
//! A *period* is the time from one transition (or reset) to the next. A call gets a [`Permit`] of the period that
//! lets it through. Its outcome takes part in the decisions of that period alone. A later outcome counts in the
//! totals only.
//!
//! The state and the deciding counters are one word:
//!
//! ```text
//! bits 63..62  state    0 closed, 1 open, 2 half open
//! bits 61..32  period   modulo 2^30
//! bits 31..0   row      failures in a row (closed, open), successes in a row (half open)
//! ```
//!
//! # Invariants
//!
//! * Every transition is one compare-and-swap of the word, and increments the period. So exactly one caller makes
//!   it, and knows that it did.
//! * An outcome counts by a compare-and-swap of a word of its own period, or (a success that changes
//!   nothing) by a load of one. No outcome decides anything in a later period.
//! * The window is a ring of bits beside the word. Each of its words carries the period in which the window began,
//!   its *era*. The window of an earlier era counts as empty, and an outcome of an earlier era writes nothing. So
//!   no transition has to clear it. Closing begins an era.
//! * The time of a transition is stored after the word, tagged with its period. The first thread that needs it
//!   writes it.
//! * A slot of the half-open state is one word: free, or a claim. At most `probe_limit` claims exist,
//!   those of earlier half-open periods included.
//!
//! # Guarantees
//!
//! [`CallBreaker::enter`] is one load while closed. A success while closed is one increment and some loads, unless
//! there are failures to forget. Every operation is lock-free. Once an outcome was recorded, every thread sees the
//! state that it caused.
//!
//! # Trade-offs
//!
//! Under concurrency the window has the outcomes in an order in which they may have happened, which need not be
//! that of the word. A caller may be refused while a slot passes from one probe to another. The statistics are no
//! snapshot. A call that lasts for exactly 2^30 transitions counts in a period that is not its own.

use std::fmt;

use crate::circuit_breaker::{ConfigError, State};
use crate::clock::Clock;
use crate::sync::{AtomicBool, AtomicU64, Ordering, zeroed_u64s};

/// When the breaker opens and closes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Config {
    /// Failures in a row that open it, at least 1.
    pub failure_threshold: u32,
    /// Successes in a row that close it when half open, at least 1.
    pub success_threshold: u32,
    /// How long it stays open, 1 to 2^32 - 1.
    pub timeout_ms: u64,
    /// The number of last calls in the failure rate, 1 to [`MAX_WINDOW`].
    pub window_size: u32,
    /// The failure rate over a full window that opens it at a failure, 0.0 to 1.0.
    pub failure_rate_threshold: f64,
    /// Calls at a time when half open, 1 to [`MAX_PROBES`].
    pub probe_limit: u32,
}

/// The largest `window_size`.
pub const MAX_WINDOW: u32 = 1_000_000;
/// The largest `probe_limit`.
pub const MAX_PROBES: u32 = 1_000;
const MAX_TIMEOUT_MS: u64 = u32::MAX as u64;

impl Config {
    fn check(&self) -> Result<(), ConfigError> {
        if self.failure_threshold == 0 {
            Err(ConfigError("failure_threshold"))
        } else if self.success_threshold == 0 {
            Err(ConfigError("success_threshold"))
        } else if !(1..=MAX_TIMEOUT_MS).contains(&self.timeout_ms) {
            Err(ConfigError("timeout"))
        } else if !(1..=MAX_WINDOW).contains(&self.window_size) {
            Err(ConfigError("window_size"))
        } else if !(0.0..=1.0).contains(&self.failure_rate_threshold) {
            Err(ConfigError("failure_rate_threshold"))
        } else if !(1..=MAX_PROBES).contains(&self.probe_limit) {
            Err(ConfigError("probe_limit"))
        } else {
            Ok(())
        }
    }
}

/// The outcome of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The call succeeded.
    Success,
    /// The call failed.
    Failure,
}

/// A call that was let through. Its outcome must be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permit {
    period: u32,
    slot: Option<Slot>,
}

/// A call that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

const PERIOD_BITS: u32 = 30;
const PERIOD_MASK: u32 = (1 << PERIOD_BITS) - 1;

/// Whether period `a` came after period `b`, for periods less than 2^29 apart.
fn is_later(a: u32, b: u32) -> bool {
    let distance = a.wrapping_sub(b) & PERIOD_MASK;
    distance != 0 && distance < 1 << (PERIOD_BITS - 1)
}

/// State, period and row: see the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Word(u64);

impl Word {
    fn new(state: State, period: u32, row: u32) -> Self {
        Self((state as u64) << 62 | u64::from(period & PERIOD_MASK) << 32 | u64::from(row))
    }

    fn state(self) -> State {
        match self.0 >> 62 {
            0 => State::Closed,
            1 => State::Open,
            _ => State::HalfOpen,
        }
    }

    fn period(self) -> u32 {
        (self.0 >> 32) as u32 & PERIOD_MASK
    }

    fn row(self) -> u32 {
        self.0 as u32
    }

    fn with_row(self, row: u32) -> Self {
        Self::new(self.state(), self.period(), row)
    }

    /// The beginning of the next period.
    fn then(self, state: State, row: u32) -> Self {
        Self::new(state, self.period().wrapping_add(1), row)
    }
}

// ---- Times ----

const MS_BITS: u32 = 42;
const MAX_MS: u64 = (1 << MS_BITS) - 1;

fn now_ms(clock: &impl Clock) -> u64 {
    clock.now_ms().min(MAX_MS)
}

/// When a period began: the low bits of the period above the milliseconds.
struct Began(AtomicU64);

impl Began {
    fn new(now_ms: u64) -> Self {
        Self(AtomicU64::new(now_ms))
    }

    fn word(period: u32, ms: u64) -> u64 {
        u64::from(period) << MS_BITS | ms
    }

    /// When `period` began: at `now_ms` for the first caller that asks. If the stored time is in the future, the
    /// clock has gone back, and the period begins now.
    fn of(&self, period: u32, now_ms: u64) -> u64 {
        const MASK: u64 = (1 << (64 - MS_BITS)) - 1;
        let mut held = self.0.load(Ordering::Acquire);
        loop {
            // How many periods later this one is, modulo 2^22.
            let distance = u64::from(period).wrapping_sub(held >> MS_BITS) & MASK;
            let ms = held & MAX_MS;
            if distance == 0 && ms <= now_ms {
                return ms;
            }
            if distance > MASK / 2 {
                // A later period has begun, so the caller's compare-and-swap in this one will fail.
                return now_ms;
            }
            match self.0.compare_exchange(
                held,
                Self::word(period, now_ms),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return now_ms,
                Err(changed) => held = changed,
            }
        }
    }
}

// ---- The window ----

/// A word of the window: the era above 32 bits of content. The content is zero in any later era.
#[derive(Clone, Copy)]
struct Tagged(u64);

impl Tagged {
    fn new(era: u32, content: u32) -> Self {
        Self(u64::from(era) << 32 | u64::from(content))
    }

    fn era(self) -> u32 {
        (self.0 >> 32) as u32
    }

    fn content_in(self, era: u32) -> u32 {
        if self.era() == era { self.0 as u32 } else { 0 }
    }
}

/// Replaces the content of `word` in `era` by the result of `next`. Returns the content before; `None` if a later
/// era has begun.
fn change(word: &AtomicU64, era: u32, next: impl Fn(u32) -> u32) -> Option<u32> {
    let mut held = Tagged(word.load(Ordering::Acquire));
    loop {
        if is_later(held.era(), era) {
            return None;
        }
        let content = held.content_in(era);
        let changed = Tagged::new(era, next(content));
        if changed.0 == held.0 {
            return Some(content);
        }
        match word.compare_exchange(held.0, changed.0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Some(content),
            Err(lost) => held = Tagged(lost),
        }
    }
}

const CELL_BITS: u32 = 32;

/// The last outcomes: a ring of bits.
struct Window {
    size: u32,
    /// Outcomes so far. Wraps from `2 * size` to `size`, so that it also says whether the window is full.
    passed: AtomicU64,
    /// Bits that are set. Signed: the thread that overwrites a failure may subtract it before the thread that wrote
    /// it has added it.
    failures: AtomicU64,
    /// A set bit is a failure.
    cells: Box<[AtomicU64]>,
}

/// The outcomes in the window, and the failures among them.
#[derive(Clone, Copy)]
struct Rate {
    outcomes: u32,
    failures: u32,
}

impl Rate {
    fn value(self) -> f64 {
        match self.outcomes {
            0 => 0.0,
            outcomes => f64::from(self.failures) / f64::from(outcomes),
        }
    }
}

impl Window {
    fn new(size: u32) -> Self {
        Self {
            size,
            passed: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            cells: zeroed_u64s(size.div_ceil(CELL_BITS) as usize),
        }
    }

    fn rate(&self, passed: u32, failures: u32) -> Rate {
        let outcomes = passed.min(self.size);
        Rate {
            outcomes,
            failures: (failures as i32).clamp(0, outcomes as i32) as u32,
        }
    }

    /// Begins an era.
    fn begin(&self, era: u32) {
        change(&self.passed, era, |passed| passed);
        change(&self.failures, era, |failures| failures);
    }

    /// The era that an outcome of `period` belongs to: in the closed state the period itself.
    fn era(&self, period: u32, state: State) -> u32 {
        match state {
            State::Closed => period,
            _ => {
                let era = Tagged(self.passed.load(Ordering::Acquire)).era();
                // A later era is not that of this outcome, which then writes nothing.
                if is_later(era, period) { period } else { era }
            }
        }
    }

    /// Adds an outcome. Returns the rate then; `None` if a later era has begun.
    fn slide(&self, era: u32, outcome: Outcome) -> Option<Rate> {
        let passed = Tagged(self.passed.load(Ordering::Acquire));
        let failures = Tagged(self.failures.load(Ordering::Acquire));
        if outcome == Outcome::Success
            && passed.content_in(era) >= self.size
            && failures.era() == era
            && failures.content_in(era) == 0
        {
            // Another success among successes alone: nothing changes.
            return Some(self.rate(self.size, 0));
        }
        let passed = change(&self.passed, era, |passed| {
            if passed + 1 == 2 * self.size {
                self.size
            } else {
                passed + 1
            }
        })?;
        let position = passed % self.size;
        let (cell, bit) = (position / CELL_BITS, 1 << (position % CELL_BITS));
        let is_failure = outcome == Outcome::Failure;
        let former = change(&self.cells[cell as usize], era, |bits| {
            if is_failure { bits | bit } else { bits & !bit }
        })?;
        let was_failure = former & bit != 0;
        let by = i32::from(is_failure) - i32::from(was_failure);
        let failures = change(&self.failures, era, |n| n.wrapping_add_signed(by))?;
        // Read again, so that of several outcomes that fill the window the one whose failures are counted last
        // finds it full.
        let passed = Tagged(self.passed.load(Ordering::Acquire)).content_in(era);
        Some(self.rate(passed, failures.wrapping_add_signed(by)))
    }

    fn read(&self) -> Rate {
        let passed = Tagged(self.passed.load(Ordering::Acquire));
        let failures = Tagged(self.failures.load(Ordering::Acquire));
        let era = passed.era();
        self.rate(passed.content_in(era), failures.content_in(era))
    }
}

// ---- Slots ----

/// A claim of a slot of the half-open state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slot {
    index: u32,
    number: u32,
}

const NUMBER_BITS: u32 = 64 - MS_BITS;
/// The deadline of a claim that has none.
const NEVER: u64 = MAX_MS;

/// One word a slot: zero if free, or the number of the claim (never zero) above its deadline.
struct Slots {
    slots: Box<[AtomicU64]>,
    next_number: AtomicU64,
    /// The longest time of any claim.
    longest_ms: AtomicU64,
}

impl Slots {
    fn new(limit: u32) -> Self {
        Self {
            slots: zeroed_u64s(limit as usize),
            next_number: AtomicU64::new(0),
            longest_ms: AtomicU64::new(0),
        }
    }

    fn claim(&self, now_ms: u64, limit_ms: Option<u64>) -> Option<Slot> {
        let deadline = limit_ms.map_or(NEVER, |limit| now_ms.saturating_add(limit).min(NEVER - 1));
        if let Some(limit) = limit_ms {
            self.longest_ms.fetch_max(limit, Ordering::Relaxed);
        }
        for (index, slot) in (0..).zip(&self.slots) {
            let held = slot.load(Ordering::Acquire);
            if held != 0 && !self.is_overdue(slot, held, now_ms) {
                continue;
            }
            let number = self.next_number.fetch_add(1, Ordering::Relaxed);
            let number = number % ((1 << NUMBER_BITS) - 1) + 1;
            let claim = number << MS_BITS | deadline;
            if slot
                .compare_exchange(held, claim, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
            {
                let number = number as u32;
                return Some(Slot { index, number });
            }
            // Lost to another caller.
        }
        None
    }

    /// Whether the deadline of a claim has passed. A deadline further away than any claim's was written before the
    /// clock went back: the claim begins anew.
    fn is_overdue(&self, slot: &AtomicU64, held: u64, now_ms: u64) -> bool {
        let deadline = held & MAX_MS;
        let latest = now_ms.saturating_add(self.longest_ms.load(Ordering::Relaxed));
        if deadline == NEVER {
            return false;
        }
        if deadline > latest {
            let renewed = held & !MAX_MS | latest.min(NEVER - 1);
            // Lost to a release or to a concurrent renewal, which are as good.
            let _ = slot.compare_exchange(held, renewed, Ordering::AcqRel, Ordering::Relaxed);
            return false;
        }
        deadline <= now_ms
    }

    fn is_claimed(&self, slot: Slot) -> bool {
        let held = self.slots[slot.index as usize].load(Ordering::Acquire);
        held >> MS_BITS == u64::from(slot.number)
    }

    /// Frees a slot, unless it was reclaimed.
    fn release(&self, slot: Slot) {
        let word = &self.slots[slot.index as usize];
        let mut held = word.load(Ordering::Acquire);
        while held >> MS_BITS == u64::from(slot.number) {
            match word.compare_exchange(held, 0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                // The deadline was renewed, or the slot reclaimed.
                Err(changed) => held = changed,
            }
        }
    }

    fn claimed(&self) -> usize {
        let is_claimed = |slot: &&AtomicU64| slot.load(Ordering::Relaxed) != 0;
        self.slots.iter().filter(is_claimed).count()
    }
}

// ---- The breaker ----

/// The state and the counters of a breaker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stats {
    /// The state.
    pub state: State,
    /// Failures in a row.
    pub consecutive_failures: u64,
    /// Successes in a row.
    pub consecutive_successes: u64,
    /// All successes.
    pub total_successes: u64,
    /// All failures.
    pub total_failures: u64,
    /// All calls that were refused.
    pub total_rejected: u64,
    /// The failure rate of the window, full or not.
    pub failure_rate: f64,
    /// When the last failure was counted in its period, since the last reset.
    pub last_failure_ms: Option<u64>,
    /// When the present period began.
    pub last_change_ms: u64,
    /// Slots that are claimed.
    pub probes: usize,
}

/// Counts that decide nothing, apart from what callers read before each call.
#[derive(Default)]
#[repr(align(64))]
struct Counts {
    successes: AtomicU64,
    failures: AtomicU64,
    /// Outcomes that came after their period.
    late_successes: AtomicU64,
    late_failures: AtomicU64,
    rejected: AtomicU64,
    /// `successes` when the present row of successes began.
    row_began_at: AtomicU64,
    /// `ms + 1`; 0 is none.
    last_failure: AtomicU64,
}

/// See the module's documentation.
#[repr(align(64))]
pub struct CallBreaker {
    word: AtomicU64,
    config: Config,
    began: Began,
    /// Whether a transition has been reported to no caller.
    is_untold: AtomicBool,
    slots: Slots,
    window: Window,
    counts: Counts,
}

impl CallBreaker {
    /// A closed breaker.
    pub fn new(config: Config, clock: &impl Clock) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            word: AtomicU64::new(Word::new(State::Closed, 0, 0).0),
            config,
            began: Began::new(now_ms(clock)),
            is_untold: AtomicBool::new(false),
            slots: Slots::new(config.probe_limit),
            window: Window::new(config.window_size),
            counts: Counts::default(),
        })
    }

    #[inline]
    fn word(&self) -> Word {
        Word(self.word.load(Ordering::Acquire))
    }

    fn swap(&self, held: Word, next: Word) -> Result<(), Word> {
        self.word
            .compare_exchange(held.0, next.0, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| ())
            .map_err(Word)
    }

    /// Lets a call through while closed: one load.
    #[inline]
    pub fn enter_closed(&self) -> Option<Permit> {
        let word = self.word();
        (word.state() == State::Closed).then_some(Permit {
            period: word.period(),
            slot: None,
        })
    }

    /// Whether a call may be made. `limit_ms` is how long at most a slot of the half-open state is held for it.
    /// Transitions that this caller must report are added to `changes`.
    pub fn enter(
        &self,
        clock: &impl Clock,
        limit_ms: Option<u64>,
        changes: &mut Vec<State>,
    ) -> Result<Permit, Refused> {
        let word = self.settle(clock, changes);
        let slot = match word.state() {
            State::Closed => Some(None),
            State::HalfOpen => self.slots.claim(now_ms(clock), limit_ms).map(Some),
            _ => None,
        };
        let permit = slot.map(|slot| Permit {
            period: word.period(),
            slot,
        });
        permit.ok_or_else(|| {
            self.counts.rejected.fetch_add(1, Ordering::Relaxed);
            Refused
        })
    }

    /// Records the outcome of a call, and frees its slot. A call whose slot was reclaimed counts as one of a former
    /// period.
    pub fn leave(
        &self,
        permit: Permit,
        outcome: Outcome,
        clock: &impl Clock,
        changes: &mut Vec<State>,
    ) {
        let is_in_time =
            self.holds_its_slot(permit) && self.decide(permit.period, outcome, clock, changes);
        if !is_in_time {
            let late = match outcome {
                Outcome::Success => &self.counts.late_successes,
                Outcome::Failure => &self.counts.late_failures,
            };
            late.fetch_add(1, Ordering::Relaxed);
        }
        // After the decision, so that no more calls than the limit run before it.
        if let Some(slot) = permit.slot {
            self.slots.release(slot);
        }
    }

    /// Whether a call still holds its slot, if it was let through with one.
    pub fn holds_its_slot(&self, permit: Permit) -> bool {
        permit.slot.is_none_or(|slot| self.slots.is_claimed(slot))
    }

    /// As [`Self::leave`] with a failure, for a caller that cannot report transitions: the next caller reports
    /// them.
    pub fn abandon(&self, permit: Permit, clock: &impl Clock) {
        let mut changes = Vec::new();
        self.leave(permit, Outcome::Failure, clock, &mut changes);
        if !changes.is_empty() {
            self.is_untold.store(true, Ordering::Release);
        }
    }

    /// Counts an outcome in its period; `false` if that is over.
    fn decide(
        &self,
        period: u32,
        outcome: Outcome,
        clock: &impl Clock,
        changes: &mut Vec<State>,
    ) -> bool {
        let mut held = self.word();
        let next = loop {
            if held.period() != period {
                return false;
            }
            let row = held.row().saturating_add(1);
            let next = match (held.state(), outcome) {
                (State::Closed, Outcome::Success) if held.row() == 0 => break held,
                (State::Closed, Outcome::Success) => held.with_row(0),
                (State::Closed, Outcome::Failure) if row >= self.config.failure_threshold => {
                    held.then(State::Open, row)
                }
                (State::HalfOpen, Outcome::Success) if row >= self.config.success_threshold => {
                    held.then(State::Closed, 0)
                }
                (State::Closed, Outcome::Failure) | (State::HalfOpen, Outcome::Success) => {
                    held.with_row(row)
                }
                (State::HalfOpen, Outcome::Failure) => held.then(State::Open, 1),
                // No call is let through in an open period.
                (State::Open | State::Off, _) => return false,
            };
            match self.swap(held, next) {
                Ok(()) => break next,
                Err(changed) => held = changed,
            }
        };
        match outcome {
            Outcome::Success => {
                self.counts.successes.fetch_add(1, Ordering::Relaxed);
            }
            Outcome::Failure => {
                self.counts.failures.fetch_add(1, Ordering::Relaxed);
                let failed = now_ms(clock) + 1;
                self.counts.last_failure.store(failed, Ordering::Relaxed);
                self.end_row_of_successes();
            }
        }
        if next.state() == State::Closed && next.period() != period {
            self.begin(next, clock, changes);
            return true;
        }
        let era = self.window.era(period, held.state());
        let rate = self.window.slide(era, outcome);
        if next.period() != period {
            self.begin(next, clock, changes);
        } else if held.state() == State::Closed
            && outcome == Outcome::Failure
            && rate.is_some_and(|rate| self.is_too_high(rate))
        {
            self.trip(next, clock, changes);
        }
        true
    }

    fn is_too_high(&self, rate: Rate) -> bool {
        rate.outcomes == self.config.window_size
            && rate.value() >= self.config.failure_rate_threshold
    }

    /// Opens the breaker in the closed period of `held`, unless another transition ends that period.
    fn trip(&self, mut held: Word, clock: &impl Clock, changes: &mut Vec<State>) {
        let period = held.period();
        while held.period() == period {
            let next = held.then(State::Open, held.row());
            match self.swap(held, next) {
                Ok(()) => return self.begin(next, clock, changes),
                Err(changed) => held = changed,
            }
        }
    }

    /// What follows a transition.
    fn begin(&self, word: Word, clock: &impl Clock, changes: &mut Vec<State>) {
        self.began.of(word.period(), now_ms(clock));
        match word.state() {
            State::Closed => self.window.begin(word.period()),
            State::Open => self.end_row_of_successes(),
            State::HalfOpen | State::Off => {}
        }
        changes.push(word.state());
    }

    fn end_row_of_successes(&self) {
        let successes = self.counts.successes.load(Ordering::Relaxed);
        self.counts.row_began_at.store(successes, Ordering::Relaxed);
    }

    /// The word, made half open if the open state has timed out.
    fn settle(&self, clock: &impl Clock, changes: &mut Vec<State>) -> Word {
        let mut held = self.word();
        // The load keeps callers of an open breaker from contending for one cache line.
        if self.is_untold.load(Ordering::Acquire) && self.is_untold.swap(false, Ordering::AcqRel) {
            changes.push(State::Open);
        }
        while held.state() == State::Open {
            let now_ms = now_ms(clock);
            let began_ms = self.began.of(held.period(), now_ms);
            if now_ms - began_ms < self.config.timeout_ms {
                break;
            }
            let next = held.then(State::HalfOpen, 0);
            match self.swap(held, next) {
                Ok(()) => {
                    self.begin(next, clock, changes);
                    return next;
                }
                Err(changed) => held = changed,
            }
        }
        held
    }

    /// The present state.
    pub fn state(&self, clock: &impl Clock, changes: &mut Vec<State>) -> State {
        self.settle(clock, changes).state()
    }

    /// Forces the breaker into a state: open for its `timeout_ms`; closed; half open, if it is open. A breaker that
    /// is in that state already stays as it is.
    pub fn force(&self, state: State, clock: &impl Clock, changes: &mut Vec<State>) {
        let mut held = self.settle(clock, changes);
        loop {
            let next = match (held.state(), state) {
                (State::Closed, State::Open) => held.then(State::Open, held.row()),
                (State::HalfOpen, State::Open) => held.then(State::Open, 0),
                (State::Open | State::HalfOpen, State::Closed) => held.then(State::Closed, 0),
                (State::Open, State::HalfOpen) => held.then(State::HalfOpen, 0),
                _ => return,
            };
            match self.swap(held, next) {
                Ok(()) => return self.begin(next, clock, changes),
                Err(changed) => held = changed,
            }
        }
    }

    /// Closes the breaker and forgets all but the totals, even if it is closed already. The outcomes of calls under
    /// way are late then.
    pub fn reset(&self, clock: &impl Clock, changes: &mut Vec<State>) {
        let mut held = self.settle(clock, changes);
        loop {
            let next = held.then(State::Closed, 0);
            match self.swap(held, next) {
                Ok(()) => break,
                Err(changed) => held = changed,
            }
        }
        let told = changes.len();
        self.begin(held.then(State::Closed, 0), clock, changes);
        if held.state() == State::Closed {
            changes.truncate(told);
        }
        self.end_row_of_successes();
        self.counts.last_failure.store(0, Ordering::Relaxed);
    }

    /// The config.
    pub fn config(&self) -> Config {
        self.config
    }

    /// State and counters.
    pub fn stats(&self, clock: &impl Clock, changes: &mut Vec<State>) -> Stats {
        let word = self.settle(clock, changes);
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = &self.counts;
        let successes = read(&counts.successes);
        let row = u64::from(word.row());
        let (consecutive_failures, consecutive_successes) = match word.state() {
            State::HalfOpen => (0, row),
            State::Open => (row, 0),
            State::Closed | State::Off => {
                (row, successes.saturating_sub(read(&counts.row_began_at)))
            }
        };
        Stats {
            state: word.state(),
            consecutive_failures,
            consecutive_successes,
            total_successes: successes + read(&counts.late_successes),
            total_failures: read(&counts.failures) + read(&counts.late_failures),
            total_rejected: read(&counts.rejected),
            failure_rate: self.window.read().value(),
            last_failure_ms: read(&counts.last_failure).checked_sub(1),
            last_change_ms: self.began.of(word.period(), now_ms(clock)),
            probes: self.slots.claimed(),
        }
    }
}

impl fmt::Debug for CallBreaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallBreaker")
            .field("state", &self.word().state())
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}
