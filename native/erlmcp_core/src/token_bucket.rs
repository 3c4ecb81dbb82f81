//! Token buckets: one atomic word each, refilled on demand, without a timer.
//!
//! # Algorithm
//!
//! The generic cell rate algorithm (ITU-T Recommendation I.371, annex A: *virtual scheduling*). The
//! word is the position at which the bucket will be full again, on an axis that advances with the
//! time: a bucket with a word at or before the present position is full, and `n` tokens move the
//! word forward by `n`. It may be ahead of the present position by the capacity at most.
//!
//! Positions are counted in *units*. A token is a power of two of them, chosen so that a nanosecond
//! is at least one and less than two units: any rate from one an hour to one a nanosecond keeps a
//! precision of 63 bits, and 100 years fit into the word.
//!
//! # Guarantee
//!
//! In every window of length `t` at most `capacity + rate * t` tokens are taken, whatever the number
//! of threads. A taking belongs to the moment at which its clock was read. *Proof*: a word never
//! moves back, and each taking moves it by what it takes. The first taking in a window leaves the
//! word at least `n` ahead of the position `P1` at its beginning, and one unit more: either it was
//! ahead of `P1` before (positions are integers) or the bucket was full and its taking adds the
//! unit. The last one leaves it `capacity` ahead of the position `P2` at the end at most. So what is
//! taken between is at most `capacity + P2 - P1 - 1`, and rounding the positions down has made
//! `P2 - P1` less than one unit too large. (If the bucket was full at the last one again, the same
//! holds for what came before, and the last one takes `capacity` at most.) A clock that goes
//! backwards moves the position back and no word: takings are refused until it has caught up.
//!
//! The added unit and the rounding make a bucket hold at most two units less than an ideal one: two
//! nanoseconds' worth of tokens, or one token where the rate is close to one a nanosecond.
//!
//! # When limits change
//!
//! Limits are exchanged as a whole (`snapshot.rs`), and words stay as they are. New [`Terms`]
//! begin at a position that no word has reached under the former ones, so a word tells which terms
//! it was written under, and whoever next takes from the bucket converts it: the tokens that it held
//! when the terms changed stay, as far as the new capacity goes. A taking that overlaps a change is
//! judged by one or the other. The last [`MAX_PAST`] terms are remembered; a bucket that was not
//! touched under any of them is taken for one that was empty when the oldest of them began.
//!
//! # Trade-offs
//!
//! Threads that take from one bucket at the same moment repeat each other's exchange (lock-free, not
//! wait-free). Thousands of buckets can share their limits at eight bytes each; what a taking needs of
//! them stands beside the snapshot in a [`crate::seqlock`], since an epoch guard would double its cost.

use std::fmt;

use crate::clock::Clock;
use crate::seqlock::SeqLock;
use crate::snapshot::Snapshot;
use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// What a bucket holds, and how fast it is refilled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    capacity: u64,
    rate_per_second: f64,
}

/// Limits that no bucket can have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LimitsError {
    /// `capacity` is not within 1 to 2^32 - 1.
    Capacity(u64),
    /// `rate_per_second` is not within 1 an hour to 10^9.
    RatePerSecond(f64),
    /// The bucket would take longer than 2^53 ns, some 104 days, from empty to full.
    TooSlowToFill,
    /// The limits have been changed so often that no position is left to begin at. With a bucket
    /// that fills within a minute that takes more than fifty million changes.
    TooManyChanges,
}

const MAX_CAPACITY: u64 = (1 << 32) - 1;
const MAX_FILL_NS: f64 = (1u64 << 53) as f64;

impl Limits {
    /// Up to `capacity` tokens at once, and `rate_per_second` of them in the long run.
    pub fn new(capacity: u64, rate_per_second: f64) -> Result<Self, LimitsError> {
        if !(1..=MAX_CAPACITY).contains(&capacity) {
            return Err(LimitsError::Capacity(capacity));
        }
        if !(1.0 / 3600.0..=1e9).contains(&rate_per_second) {
            return Err(LimitsError::RatePerSecond(rate_per_second));
        }
        if capacity as f64 / rate_per_second * 1e9 > MAX_FILL_NS {
            return Err(LimitsError::TooSlowToFill);
        }
        Ok(Self {
            capacity,
            rate_per_second,
        })
    }

    /// Tokens that the bucket holds at most.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Tokens that it gets a second.
    pub fn rate_per_second(&self) -> f64 {
        self.rate_per_second
    }
}

impl Default for Limits {
    /// 1,000 at once and 10,000 a second.
    fn default() -> Self {
        Self {
            capacity: 1_000,
            rate_per_second: 10_000.0,
        }
    }
}

/// Why nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The bucket does not hold so many tokens now.
    RateLimited {
        /// Nanoseconds from now until it would, if nobody takes any meanwhile.
        wait_ns: u64,
    },
    /// The bucket never holds so many tokens.
    ExceedsCapacity,
}

// ---- Decision ----

/// How limits translate into positions: see the module's documentation.
#[derive(Debug, Clone, Copy)]
struct Scale {
    capacity: u64,
    /// A token is `1 << token_bits` units.
    token_bits: u32,
    /// Units a nanosecond, times 2^63, rounded down.
    speed: u64,
    /// The position at `since_ns`.
    base: u64,
    since_ns: u64,
}

impl Scale {
    fn new(limits: Limits, base: u64, since_ns: u64) -> Self {
        // A float times a power of two is exact.
        let mut token_bits = 0;
        let mut units_per_second = limits.rate_per_second;
        while units_per_second * 2.0 < 2e9 {
            units_per_second *= 2.0;
            token_bits += 1;
        }
        // From 10^9 to less than 2 * 10^9 with 53 significant bits: an integer after 23 shifts.
        let shifted = (units_per_second * f64::from(1u32 << 23)) as u128;
        Self {
            capacity: limits.capacity,
            token_bits,
            speed: ((shifted << (63 - 23)) / 1_000_000_000) as u64,
            base,
            since_ns,
        }
    }

    fn words(&self) -> [u64; 4] {
        let capacity_and_bits = self.capacity << 8 | u64::from(self.token_bits);
        [capacity_and_bits, self.speed, self.base, self.since_ns]
    }

    #[inline]
    fn from_words([capacity_and_bits, speed, base, since_ns]: [u64; 4]) -> Self {
        Self {
            capacity: capacity_and_bits >> 8,
            token_bits: capacity_and_bits as u8 as u32,
            speed,
            base,
            since_ns,
        }
    }

    #[inline]
    fn units(&self, tokens: u64) -> u64 {
        tokens << self.token_bits
    }

    #[inline]
    fn capacity_units(&self) -> u64 {
        self.units(self.capacity)
    }

    #[inline]
    fn position(&self, now_ns: u64) -> u64 {
        let elapsed_ns = u128::from(now_ns.saturating_sub(self.since_ns));
        self.base
            .saturating_add(((elapsed_ns * u128::from(self.speed)) >> 63) as u64)
    }

    /// Units held at a position by a bucket with this word.
    fn held_units(&self, word: u64, position: u64) -> u64 {
        self.capacity_units()
            .saturating_sub(word.saturating_sub(position))
    }

    /// The word of a bucket that held so many of `other`'s units when this scale began. Rounds down.
    fn word_holding(&self, units: u64, other: &Self) -> u64 {
        let here = (u128::from(units) << self.token_bits) >> other.token_bits;
        let lacking = u128::from(self.capacity_units()).saturating_sub(here);
        self.base + lacking as u64
    }

    /// The word after `tokens` were taken, and how many are left. `word` was written under this
    /// scale, or converted.
    #[inline]
    fn take(&self, word: u64, now_ns: u64, tokens: u64) -> Result<(u64, u64), Shortage> {
        if tokens > self.capacity {
            return Err(Shortage::Forever);
        }
        let position = self.position(now_ns);
        if word <= position {
            if tokens == 0 {
                return Ok((word, self.capacity));
            }
            let next = position.saturating_add(self.units(tokens));
            // The unit that makes up for rounding: see the module's documentation.
            return Ok((next.saturating_add(1), self.capacity - tokens));
        }
        let next = word.saturating_add(self.units(tokens));
        let ahead = next - position;
        match (self.capacity_units() + 1).checked_sub(ahead) {
            // The unit again: what is left is told as it will be a nanosecond later.
            Some(left) if left > 0 || tokens == 0 => Ok((next, left >> self.token_bits)),
            _ if word - position > self.capacity_units() + 1 => {
                Err(Shortage::Displaced(next - self.capacity_units()))
            }
            _ => Err(Shortage::Until(next - self.capacity_units())),
        }
    }

    /// What a shortage means to the one who wanted `tokens`.
    fn told(&self, shortage: Shortage, now_ns: u64, tokens: u64) -> Result<u64, Refused> {
        match shortage {
            Shortage::Forever => Err(Refused::ExceedsCapacity),
            Shortage::Displaced(_) if tokens == 0 => Ok(0),
            Shortage::Until(position) | Shortage::Displaced(position) => {
                Err(Refused::RateLimited {
                    wait_ns: self.reached_ns(position).saturating_sub(now_ns),
                })
            }
        }
    }

    /// When the position is reached.
    fn reached_ns(&self, position: u64) -> u64 {
        let units = u128::from(position.saturating_sub(self.base));
        let elapsed_ns = (units << 63).div_ceil(u128::from(self.speed));
        self.since_ns
            .saturating_add(elapsed_ns.try_into().unwrap_or(u64::MAX))
    }
}

/// Why nothing can be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shortage {
    /// There is enough at this position.
    Until(u64),
    /// As [`Self::Until`]. The word is further ahead than any taking at this moment has left it: it
    /// was written under later terms, or the clock has gone back.
    Displaced(u64),
    /// There is never enough.
    Forever,
}

/// Terms that are remembered after they were changed.
pub const MAX_PAST: usize = 8;

/// Between the last position under some terms and the first under the next ones: a taking that
/// read the clock up to so much later than the change was published is still told apart.
const SLACK: u64 = 1 << 34;

/// Positions under the last terms that there can be still have 100 years before them.
const MAX_BASE: u64 = 1 << 63;

/// The limits in force from a moment on, and those before them.
#[derive(Debug, Clone)]
pub struct Terms {
    limits: Limits,
    scale: Scale,
    /// The newest first, at most [`MAX_PAST`].
    past: Vec<Scale>,
}

impl Terms {
    /// The first ones of a bucket. Every word 0 is a full bucket.
    pub fn new(limits: Limits, now_ns: u64) -> Self {
        Self {
            limits,
            scale: Scale::new(limits, 0, now_ns),
            past: Vec::new(),
        }
    }

    /// The next ones.
    pub fn changed(&self, limits: Limits, now_ns: u64) -> Result<Self, LimitsError> {
        let former = &self.scale;
        let reached = former
            .position(now_ns)
            .saturating_add(former.capacity_units());
        let base = reached.saturating_add(SLACK);
        if base > MAX_BASE {
            return Err(LimitsError::TooManyChanges);
        }
        let mut past = Vec::with_capacity(MAX_PAST);
        past.push(*former);
        // What was in force long enough to fill any bucket makes all before it irrelevant.
        let mut until_ns = now_ns;
        for (scale, before) in std::iter::once(former).chain(&self.past).zip(&self.past) {
            let filled = scale.position(until_ns) - scale.base >= scale.capacity_units();
            if filled || past.len() == MAX_PAST {
                break;
            }
            until_ns = scale.since_ns;
            past.push(*before);
        }
        Ok(Self {
            limits,
            scale: Scale::new(limits, base, now_ns),
            past,
        })
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// A word, as if it had been written under these terms.
    #[inline]
    fn current(&self, word: u64) -> u64 {
        if word >= self.scale.base {
            word
        } else {
            self.converted(word)
        }
    }

    #[cold]
    fn converted(&self, word: u64) -> u64 {
        let written_under = self.past.iter().position(|scale| word >= scale.base);
        let (oldest, mut word) = match written_under {
            Some(index) => (index, word),
            None => {
                let oldest = self.past.len() - 1;
                let empty = self.past[oldest].base + self.past[oldest].capacity_units();
                (oldest, empty)
            }
        };
        for index in (0..=oldest).rev() {
            let former = &self.past[index];
            let next = if index == 0 {
                &self.scale
            } else {
                &self.past[index - 1]
            };
            let held = former.held_units(word, former.position(next.since_ns));
            word = next.word_holding(held, former);
        }
        word
    }
}

// ---- Storage and exchange ----

/// The word of one bucket. Its limits stand elsewhere, since many buckets share them.
#[derive(Debug)]
pub struct Level(AtomicU64);

impl Level {
    /// A full bucket under the first terms.
    #[allow(clippy::new_without_default)]
    pub fn full() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Takes tokens, or none. Returns how many are left.
    pub fn take(&self, terms: &Terms, now_ns: u64, tokens: u64) -> Result<u64, Refused> {
        let taken = self.try_take(terms, now_ns, tokens);
        taken.or_else(|shortage| terms.scale.told(shortage, now_ns, tokens))
    }

    fn try_take(&self, terms: &Terms, now_ns: u64, tokens: u64) -> Result<u64, Shortage> {
        self.exchange(|word| terms.scale.take(terms.current(word), now_ns, tokens))
    }

    /// Exchanges the word for what `next` makes of it, and returns the other thing that it gives.
    #[inline]
    fn exchange<E>(&self, next: impl Fn(u64) -> Result<(u64, u64), E>) -> Result<u64, E> {
        let mut held = self.0.load(Ordering::Acquire);
        loop {
            let (next, left) = next(held)?;
            if next == held {
                return Ok(left);
            }
            match self
                .0
                // Release: who reads the word sees the terms that it was written under.
                .compare_exchange_weak(held, next, Ordering::Release, Ordering::Acquire)
            {
                Ok(_) => return Ok(left),
                Err(changed) => held = changed,
            }
        }
    }

    pub(crate) fn word(&self) -> &AtomicU64 {
        &self.0
    }
}

/// Limits that buckets share, changed while the buckets are in use.
#[derive(Debug)]
pub struct Limiter {
    /// No limits. The terms are kept, since words refer to them.
    is_off: AtomicBool,
    scale: SeqLock<4>,
    terms: Snapshot<Terms>,
}

impl Limiter {
    /// With these limits; `None` for no limits.
    pub fn new(limits: Option<Limits>, clock: &impl Clock) -> Self {
        // So much that a full bucket is full under whatever limits come first.
        let first = limits.unwrap_or(Limits {
            capacity: MAX_CAPACITY,
            rate_per_second: 1e9,
        });
        let terms = Terms::new(first, clock.now_ns());
        Self {
            is_off: AtomicBool::new(limits.is_none()),
            scale: SeqLock::new(terms.scale.words()),
            terms: Snapshot::new(terms),
        }
    }

    /// A bucket that is full under the present terms.
    pub(crate) fn full(&self) -> Level {
        Level(AtomicU64::new(self.terms.read(|terms| terms.scale.base)))
    }

    /// Whether there are no limits. One load.
    #[inline]
    pub fn is_off(&self) -> bool {
        self.is_off.load(Ordering::Acquire)
    }

    /// Takes tokens from a bucket that has these limits. Returns how many are left; `None` where
    /// there are no limits. Lock-free.
    #[inline]
    pub fn take(
        &self,
        level: &Level,
        clock: &impl Clock,
        tokens: u64,
    ) -> Result<Option<u64>, Refused> {
        if self.is_off() {
            return Ok(None);
        }
        let now_ns = clock.now_ns();
        match self.take_quickly(level, now_ns, tokens) {
            Some(Ok(left)) => Ok(Some(left)),
            Some(Err((scale, shortage))) => scale.told(shortage, now_ns, tokens).map(Some),
            None => self.take_slowly(level, now_ns, tokens).map(Some),
        }
    }

    /// Takes one token, or none: whether there was one. As [`Self::take`], but a refusal costs as
    /// little as a token.
    #[inline]
    pub fn admits(&self, level: &Level, clock: &impl Clock) -> bool {
        if self.is_off() {
            return true;
        }
        let now_ns = clock.now_ns();
        match self.take_quickly(level, now_ns, 1) {
            Some(taken) => taken.is_ok(),
            None => self.take_slowly(level, now_ns, 1).is_ok(),
        }
    }

    /// `None` if the bucket's word is from other terms, or the terms are being changed. The clock is
    /// read before the terms, so that a thread that sleeps between has not been under former terms
    /// for longer than they were in force.
    #[inline(always)]
    fn take_quickly(
        &self,
        level: &Level,
        now_ns: u64,
        tokens: u64,
    ) -> Option<Result<u64, (Scale, Shortage)>> {
        let scale = Scale::from_words(self.scale.read()?);
        let taken = level.exchange(|word| {
            if word < scale.base {
                return Err(None);
            }
            scale.take(word, now_ns, tokens).map_err(Some)
        });
        match taken {
            Ok(left) => Some(Ok(left)),
            Err(None | Some(Shortage::Displaced(_))) => None,
            Err(Some(shortage)) => Some(Err((scale, shortage))),
        }
    }

    #[cold]
    fn take_slowly(&self, level: &Level, now_ns: u64, tokens: u64) -> Result<u64, Refused> {
        loop {
            let (taken, scale) = self
                .terms
                .read(|terms| (level.try_take(terms, now_ns, tokens), terms.scale));
            match taken {
                // The word was written under later terms, which we see as we have seen the word.
                Err(Shortage::Displaced(_))
                    if self.terms.read(|terms| terms.scale.base) != scale.base => {}
                taken => return taken.or_else(|shortage| scale.told(shortage, now_ns, tokens)),
            }
        }
    }

    /// The limits; `None` if there are none.
    pub fn limits(&self) -> Option<Limits> {
        (!self.is_off()).then(|| self.terms.read(Terms::limits))
    }

    /// Changes the limits; `None` for no limits.
    pub fn set_limits(
        &self,
        limits: Option<Limits>,
        clock: &impl Clock,
    ) -> Result<(), LimitsError> {
        if let Some(limits) = limits {
            self.terms
                .update(|terms| terms.changed(limits, clock.now_ns()))?;
            self.scale
                .refresh(|| self.terms.read(|terms| terms.scale.words()));
        }
        self.is_off.store(limits.is_none(), Ordering::Release);
        Ok(())
    }
}

/// A level in cache lines of its own (two of 64 bytes, since x86 fetches pairs).
#[derive(Debug)]
#[repr(align(128))]
struct Apart(Level);

/// A bucket with limits of its own. Its level is written all the time and must not take the limits,
/// which are read, out of the caches of others.
#[derive(Debug)]
pub struct TokenBucket {
    limiter: Limiter,
    level: Apart,
}

impl TokenBucket {
    /// A full bucket; `None` for no limits.
    pub fn new(limits: Option<Limits>, clock: &impl Clock) -> Self {
        Self {
            limiter: Limiter::new(limits, clock),
            level: Apart(Level::full()),
        }
    }

    /// Takes tokens, or none. Returns how many are left; `None` where there are no limits.
    #[inline]
    pub fn take(&self, clock: &impl Clock, tokens: u64) -> Result<Option<u64>, Refused> {
        self.limiter.take(&self.level.0, clock, tokens)
    }

    /// The limits; `None` if there are none.
    pub fn limits(&self) -> Option<Limits> {
        self.limiter.limits()
    }

    /// Changes the limits. The tokens that the bucket holds stay, up to the new capacity.
    pub fn set_limits(
        &self,
        limits: Option<Limits>,
        clock: &impl Clock,
    ) -> Result<(), LimitsError> {
        self.limiter.set_limits(limits, clock)
    }
}

impl fmt::Display for LimitsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capacity(n) => write!(f, "capacity: {n} is not within 1 to 2^32 - 1"),
            Self::RatePerSecond(rate) => {
                write!(f, "rate_per_second: {rate} is not within 1/3600 to 10^9")
            }
            Self::TooSlowToFill => f.write_str("capacity: takes longer than 2^53 ns to fill"),
            Self::TooManyChanges => f.write_str("the limits were changed too often"),
        }
    }
}

impl std::error::Error for LimitsError {}
