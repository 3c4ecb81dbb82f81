//! Token buckets: one atomic word each, refilled on demand, without a timer.
//!
//! # Algorithm
//!
//! The generic cell rate algorithm (ITU-T Recommendation I.371, annex A: *virtual scheduling*). GCRA keeps the
//! *theoretical arrival time* of the next cell. Each cell advances it by the *emission interval*. A cell is
//! admitted if it comes no earlier than the *tolerance* before the theoretical arrival time. Here the emission
//! interval is the time that one token takes, and the tolerance is `capacity - 1` emission intervals.
//!
//! Times are *positions* on an axis that advances by the rate, so a token has the same length under every rate. The
//! word of a bucket is the theoretical arrival time less the length of `capacity` tokens: the position at which the
//! bucket is, or would have been, empty. The bucket holds the distance from its word to the present position, up to
//! the capacity. So neither a change of the rate nor a lower capacity changes a word.
//!
//! Positions are counted in *units*, modulo 2^63. A token is a power of two of units, chosen so that a nanosecond
//! is one to eight units.
//!
//! # Guarantee
//!
//! In every window of length `t` at most `capacity + rate * t` tokens are acquired, whatever the number of threads.
//! An acquisition belongs to the moment at which its clock was read.
//!
//! *Proof*: let `P1` and `P2` be the positions at the beginning and at the end of the window, rounded down. Each
//! acquisition advances the word by at least what it acquires. The first one acquires `n` units and leaves the word
//! at least `n + 1` units ahead of `P1 - capacity`: if the bucket was not full, its word was ahead of that position
//! (positions are integers); if it was full, the acquisition adds the unit. The last one leaves the word at `P2` at
//! most, unless the bucket was full again. So at most `capacity + P2 - P1 - 1` units are acquired, and rounding the
//! positions down has made `P2 - P1` less than one unit too large. If the bucket was full at the last acquisition,
//! that bound without `capacity` holds for all before it, and the last one acquires `capacity` at most.
//!
//! The added unit and the rounding make a bucket hold at most two units less than an ideal one: two nanoseconds'
//! worth of tokens, or one token where the rate is close to one a nanosecond. Each change of limits may cost two
//! more units.
//!
//! # When limits change
//!
//! Limits are replaced as a whole (`snapshot.rs`), and words stay as they are: a bucket keeps its tokens, up to the
//! lowest capacity since then. An acquisition that overlaps a change is judged by the limits before or after it.
//!
//! A *generation* of terms ends where words need a translation: when the capacity is raised (a bucket that was full
//! is not full any more) or when a token becomes another number of units. The next generation begins at a position
//! that no word has reached. So a word tells its generation, and the next acquisition translates it. Two numbers of
//! a generation suffice for a translation, because refilling for some time is `min(held + refill, bound)`, and a
//! sequence of such steps is one such step. A generation is forgotten when all its buckets must have been refilled
//! since, which loses nothing. Of the generations that end within the time in which a bucket fills, the last
//! [`MAX_PAST`] are remembered. A bucket that was last used before these counts as empty at the end of the newest
//! generation that was forgotten.
//!
//! # Clocks that go back
//!
//! A word ahead of the position was written at a later time. Clocks of different processors disagree by up to a
//! millisecond. A word that is further ahead, by a clock that is read after the word, was written before the clock
//! went back. Such a bucket counts as emptied now: it waits no longer than its limits make an empty bucket wait,
//! and gives no token twice. Terms that begin in the future begin now instead, at the same position.
//!
//! # Trade-offs
//!
//! Threads that acquire from one bucket at the same moment make each other retry the compare-and-swap (lock-free,
//! not wait-free). Thousands of buckets can share their limits at eight bytes each. The part of the limits that an
//! acquisition needs is stored beside the snapshot in a [`crate::seqlock`], since an epoch guard would double its
//! cost. A bucket that is not used for 25 years counts as empty then. One that is not used between a jump of the
//! clock back and a raise of its capacity may count as full.

use std::fmt;
use std::sync::Arc;

use crate::clock::Clock;
use crate::seqlock::SeqLock;
use crate::snapshot::Snapshot;
use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// The capacity of a bucket, and the rate at which it is refilled.
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

    /// The most tokens that the bucket holds.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Tokens that are added per second.
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

/// A change of either or both of the limits.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Change {
    /// `None`: stays.
    pub capacity: Option<u64>,
    /// `None`: stays.
    pub rate_per_second: Option<f64>,
}

impl Change {
    /// The changed limits, with the rest of `base`.
    pub fn over(self, base: Limits) -> Result<Limits, LimitsError> {
        Limits::new(
            self.capacity.unwrap_or(base.capacity),
            self.rate_per_second.unwrap_or(base.rate_per_second),
        )
    }
}

impl From<Limits> for Change {
    fn from(limits: Limits) -> Self {
        Self {
            capacity: Some(limits.capacity),
            rate_per_second: Some(limits.rate_per_second),
        }
    }
}

/// The present state of a bucket.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BucketState {
    /// Whole tokens that it holds; `None` without limits.
    pub tokens: Option<u64>,
    /// The limits; `None` if there are none.
    pub limits: Option<Limits>,
    /// Nanoseconds until there is a whole token, if nobody takes any; 0 if there is one.
    pub wait_ns: u64,
}

impl BucketState {
    pub(crate) const UNLIMITED: Self = Self {
        tokens: None,
        limits: None,
        wait_ns: 0,
    };
}

/// Why no tokens were acquired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The bucket does not hold enough tokens now.
    RateLimited {
        /// Nanoseconds until it would, if no other caller acquires any meanwhile.
        wait_ns: u64,
    },
    /// The bucket never holds that many tokens.
    ExceedsCapacity,
}

// ---- Decision ----

/// The bits of levels and positions. A word with the highest bit set is no level: see [`FROZEN`] and
/// `registry/buckets.rs`.
const MASK: u64 = u64::MAX >> 1;

/// Set in the word of a bucket whose tokens are about to move elsewhere. No acquisition changes or judges such a
/// word. A fetch-or sets the bit, so acquisitions cannot delay it. The level stays readable, so any thread can
/// finish the move and none waits.
const FROZEN: u64 = 1 << 63;

/// The word of a bucket that was removed. It never changes again.
pub(crate) const GONE: u64 = u64::MAX;

/// Differences of positions lie from `-AHEAD` to `MASK - AHEAD`.
const AHEAD: i64 = 1 << 61;

/// Units a nanosecond, times this power of two, are less than 2^63.
const SPEED_BITS: u32 = 60;

/// 17 seconds, allowed between a change of terms and the last acquisition that read the clock before the change was
/// published.
const SLACK_NS_BITS: u32 = 34;

/// A millisecond, by which clocks of different processors may disagree.
const TOLERANCE_NS_BITS: u32 = 20;

/// Tokens that are held or refilled, in 2^-44 of a token: no token has more units.
type Held = i128;

const HELD_BITS: u32 = 44;

/// Enough to fill every bucket.
const FULL: Held = 1 << 100;

/// How far `position` is ahead of `word`.
#[inline]
fn behind(position: u64, word: u64) -> i64 {
    let shifted = position.wrapping_sub(word).wrapping_add(AHEAD as u64) & MASK;
    shifted as i64 - AHEAD
}

/// Units per second, and the binary logarithm of the units per token, for a rate that begins a generation.
fn units(rate_per_second: f64) -> (f64, u32) {
    // A float times a power of two is exact.
    let (mut units_per_second, mut token_bits) = (rate_per_second, 0);
    while units_per_second * 2.0 < 2e9 {
        units_per_second *= 2.0;
        token_bits += 1;
    }
    (units_per_second, token_bits)
}

/// How limits translate into positions: see the module's documentation.
#[derive(Debug, Clone, Copy)]
struct Scale {
    capacity: u64,
    /// A token is `1 << token_bits` units.
    token_bits: u32,
    /// Units a nanosecond, times `1 << SPEED_BITS`, rounded down.
    speed: u64,
    /// The position at `since_ns`.
    base: u64,
    since_ns: u64,
    /// How far `base` is ahead of the first word of the generation.
    reach: u64,
}

impl Scale {
    /// `units_per_second`: from 10^9 to less than 8 * 10^9.
    fn new(limits: Limits, (units_per_second, token_bits): (f64, u32), since_ns: u64) -> Self {
        // 53 significant bits of which 29 or more are before the point: an integer after 23 shifts.
        let shifted = (units_per_second * f64::from(1u32 << 23)) as u128;
        Self {
            capacity: limits.capacity,
            token_bits,
            speed: ((shifted << (SPEED_BITS - 23)) / 1_000_000_000) as u64,
            base: 0,
            since_ns,
            reach: 0,
        }
    }

    /// The first scale of a generation. Its first word is `first`: that of a full bucket, by a clock that is behind
    /// by the tolerance.
    fn begun_at(self, first: u64) -> Self {
        let reach = self.capacity_units() + self.units_in(TOLERANCE_NS_BITS);
        Self {
            base: first.wrapping_add(reach) & MASK,
            reach,
            ..self
        }
    }

    fn words(&self) -> [u64; 5] {
        let capacity_and_bits = self.capacity << 8 | u64::from(self.token_bits);
        [
            capacity_and_bits,
            self.speed,
            self.base,
            self.since_ns,
            self.reach,
        ]
    }

    #[inline]
    fn from_words([capacity_and_bits, speed, base, since_ns, reach]: [u64; 5]) -> Self {
        Self {
            capacity: capacity_and_bits >> 8,
            token_bits: capacity_and_bits as u8 as u32,
            speed,
            base,
            since_ns,
            reach,
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

    /// Nanoseconds since `since_ns`; negative if `now_ns` was read before it, or if the clock has gone back.
    #[inline]
    fn elapsed_ns(&self, now_ns: u64) -> i64 {
        now_ns.wrapping_sub(self.since_ns) as i64
    }

    /// Whether the terms begin in the future, by more than clocks disagree.
    #[inline]
    fn is_ahead(&self, now_ns: u64) -> bool {
        self.elapsed_ns(now_ns) < -(1 << TOLERANCE_NS_BITS)
    }

    /// Units since `since_ns`.
    #[inline]
    fn advanced(&self, now_ns: u64) -> i128 {
        (i128::from(self.elapsed_ns(now_ns)) * i128::from(self.speed)) >> SPEED_BITS
    }

    #[inline]
    fn position(&self, advanced: i128) -> u64 {
        self.base.wrapping_add(advanced as u64) & MASK
    }

    fn first(&self) -> u64 {
        self.base.wrapping_sub(self.reach) & MASK
    }

    /// Units in a time of `1 << ns_bits` nanoseconds.
    #[inline]
    fn units_in(&self, ns_bits: u32) -> u64 {
        self.speed >> (SPEED_BITS - ns_bits)
    }

    fn held(&self, units: i128) -> Held {
        units << (HELD_BITS - self.token_bits)
    }

    /// The word after `tokens` were acquired, and the number of tokens left.
    #[inline]
    fn take(&self, word: u64, now_ns: u64, tokens: u64) -> Result<(u64, u64), Shortage> {
        if word > MASK {
            return Err(Shortage::Untranslated);
        }
        if tokens > self.capacity {
            return Err(Shortage::Forever);
        }
        let advanced = self.advanced(now_ns);
        let position = self.position(advanced);
        let held = behind(position, word);
        let is_former = i128::from(held) > i128::from(self.reach) + advanced;
        if is_former || self.is_ahead(now_ns) {
            return Err(Shortage::Untranslated);
        }
        let capacity = self.capacity_units() as i64;
        let wanted = self.units(tokens) as i64;
        if held >= capacity {
            if tokens == 0 {
                return Ok((word, self.capacity));
            }
            // The unit that makes up for rounding: see *Guarantee* in the module's documentation.
            let left = (capacity - wanted - 1) as u64;
            let next = position.wrapping_sub(left) & MASK;
            return Ok((next, self.capacity - tokens));
        }
        match held - wanted {
            // The unit again: the tokens left are those of a nanosecond later.
            left if left >= 0 || (tokens == 0 && left == -1) => {
                let next = word.wrapping_add(wanted as u64) & MASK;
                Ok((next, ((left + 1) as u64) >> self.token_bits))
            }
            _ if held < -(self.units_in(TOLERANCE_NS_BITS) as i64) => {
                Err(Shortage::Displaced(position))
            }
            _ if tokens == 0 => Ok((word, 0)),
            left => Err(Shortage::Missing(left.unsigned_abs())),
        }
    }

    /// The refusal for a caller that wanted `tokens`.
    fn told(&self, shortage: Shortage, now_ns: u64, tokens: u64) -> Refused {
        let missing = match shortage {
            Shortage::Forever => return Refused::ExceedsCapacity,
            Shortage::Missing(units) => units,
            Shortage::Displaced(_) | Shortage::Untranslated => self.units(tokens),
        };
        let elapsed_ns = i128::from(self.elapsed_ns(now_ns));
        let reached = (self.advanced(now_ns) + i128::from(missing)) << SPEED_BITS;
        let speed = i128::from(self.speed);
        // Rounded up.
        let reached_ns = -(-reached).div_euclid(speed);
        Refused::RateLimited {
            wait_ns: (reached_ns - elapsed_ns).max(1) as u64,
        }
    }
}

/// Why no tokens can be acquired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shortage {
    /// This many units are missing.
    Missing(u64),
    /// The word is further ahead of this position than any acquisition at this moment leaves it.
    Displaced(u64),
    /// The word is from another generation or is no level, or the terms begin in the future.
    Untranslated,
    /// The bucket never holds that many tokens.
    Forever,
}

/// Past generations that are remembered although some of their buckets may not have been refilled since.
pub const MAX_PAST: usize = 4096;

/// As [`MAX_PAST`], for a bucket with its own limits. Each change translates its word.
const MAX_OWN_PAST: usize = 8;

/// A generation that has ended.
#[derive(Debug, Clone, Copy)]
struct Past {
    /// Its first word.
    first: u64,
    token_bits: u32,
    /// Its last position.
    end: u64,
    /// The capacity at its end.
    capacity: Held,
    /// A bucket that held `h` at its end held `min(h + refill, bound)` when the present generation began.
    refill: Held,
    bound: Held,
}

/// The limits in force since some moment, and the generations before them.
#[derive(Debug, Clone)]
pub struct Terms {
    limits: Limits,
    scale: Scale,
    /// `reach` at the beginning of the generation.
    began: u64,
    /// The newest first.
    past: Arc<[Past]>,
    /// What a bucket older than `past` held when the present generation began.
    older: Held,
}

impl Terms {
    /// The first terms of a bucket. The word 0 is a full bucket.
    pub fn new(limits: Limits, now_ns: u64) -> Self {
        let scale = Scale::new(limits, units(limits.rate_per_second), now_ns).begun_at(0);
        Self {
            limits,
            scale,
            began: scale.reach,
            past: Arc::new([]),
            older: FULL,
        }
    }

    /// The next terms, which remember up to `max_past` generations. One pass over these.
    pub fn changed(&self, limits: Limits, now_ns: u64, max_past: usize) -> Self {
        let former = &self.scale;
        // A time in the future counts as now: see the module's documentation.
        let advanced = former.advanced(now_ns).max(0);
        let position = former.position(advanced);
        let reach = i128::from(former.reach) + advanced;
        let units_per_second = limits.rate_per_second * (1u64 << former.token_bits) as f64;
        let is_same_generation =
            limits.capacity <= former.capacity && (1e9..8e9).contains(&units_per_second);
        if is_same_generation {
            let scale = Scale::new(limits, (units_per_second, former.token_bits), now_ns);
            return Self {
                limits,
                scale: Scale {
                    base: position,
                    // Further than any difference of positions, and far from an overflow.
                    reach: reach.min(i128::from(MASK)) as u64,
                    ..scale
                },
                past: Arc::clone(&self.past),
                ..*self
            };
        }
        let first = position.wrapping_add(former.units_in(SLACK_NS_BITS)) & MASK;
        let scale = Scale::new(limits, units(limits.rate_per_second), now_ns).begun_at(first);
        let refill = former.held(reach - i128::from(self.began));
        let capacity = Held::from(former.capacity) << HELD_BITS;
        let ended = Past {
            first: former.first(),
            token_bits: former.token_bits,
            end: position,
            capacity,
            refill: 0,
            bound: capacity,
        };
        let refilled = self.past.iter().map(|past| Past {
            refill: past.refill + refill,
            bound: (past.bound + refill).min(capacity),
            ..*past
        });
        let mut older = (self.older + refill).min(capacity);
        let mut past = Vec::with_capacity(max_past.min(self.past.len() + 1));
        for generation in std::iter::once(ended).chain(refilled) {
            let is_refilled = generation.refill >= generation.bound;
            let is_far = first.wrapping_sub(generation.first) & MASK > MASK - AHEAD as u64;
            if is_refilled || is_far || past.len() == max_past {
                // Every bucket of an even older generation holds as much or more.
                older = generation.refill.min(generation.bound);
                break;
            }
            past.push(generation);
        }
        Self {
            limits,
            scale,
            began: scale.reach,
            past: past.into(),
            older,
        }
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The next word, and the result for the caller. The word is not stored if it is unchanged.
    fn decide(&self, held: u64, now_ns: u64, tokens: u64) -> (u64, Result<u64, Refused>) {
        let scale = &self.scale;
        let taken = match scale.take(held, now_ns, tokens) {
            Err(Shortage::Untranslated) if held <= MASK => {
                scale.take(self.translated(held), now_ns, tokens)
            }
            taken => taken,
        };
        match taken {
            Ok((_, left)) if tokens == 0 => (held, Ok(left)),
            Ok((next, left)) => (next, Ok(left)),
            Err(Shortage::Displaced(_)) if tokens == 0 => (held, Ok(0)),
            Err(Shortage::Displaced(position)) => {
                // The unit that makes up for rounding.
                let missing = Shortage::Missing(scale.units(tokens) + 1);
                let empty = position.wrapping_add(1) & MASK;
                (empty, Err(scale.told(missing, now_ns, tokens)))
            }
            Err(shortage) => (held, Err(scale.told(shortage, now_ns, tokens))),
        }
    }

    /// Whether the bucket holds all tokens that it can.
    fn is_full(&self, word: u64, now_ns: u64) -> bool {
        self.decide(word, now_ns, self.limits.capacity).1.is_ok()
    }

    /// [`GONE`] and `true` if the bucket is full by every processor's clock.
    fn forgotten(&self, word: u64, now_ns: u64) -> (u64, bool) {
        let scale = &self.scale;
        let position = scale.position(scale.advanced(now_ns));
        let held = behind(position, self.present(word, now_ns));
        if held >= (scale.capacity_units() + scale.units_in(TOLERANCE_NS_BITS)) as i64 {
            return (GONE, true);
        }
        // Stores the verdict on a word from before the clock went back: otherwise it would not be full for as long.
        match self.decide(word, now_ns, self.limits.capacity) {
            (next, Err(_)) => (next, false),
            (_, Ok(_)) => (word, false),
        }
    }

    /// The next word of a bucket that gets `tokens` back. A full bucket stays as it is.
    fn refund(&self, word: u64, now_ns: u64, tokens: u64) -> u64 {
        if self.is_full(word, now_ns) {
            return word;
        }
        let scale = &self.scale;
        let capacity = scale.capacity_units();
        let position = scale.position(scale.advanced(now_ns));
        let word = self.present(word, now_ns);
        let held = behind(position, word);
        // A word that was written before the clock went back: see the module's documentation.
        let word = if held < -(scale.units_in(TOLERANCE_NS_BITS) as i64) {
            position.wrapping_add(1) & MASK
        } else {
            word
        };
        let units = scale.units(tokens.min(self.limits.capacity));
        let next = word.wrapping_sub(units) & MASK;
        if behind(position, next) > capacity as i64 {
            position.wrapping_sub(capacity) & MASK
        } else {
            next
        }
    }

    /// Whether the word was written in a former generation.
    fn is_former(&self, word: u64, now_ns: u64) -> bool {
        let scale = &self.scale;
        let advanced = scale.advanced(now_ns);
        let held = behind(scale.position(advanced), word);
        i128::from(held) > i128::from(scale.reach) + advanced
    }

    /// Translates a word to this generation.
    fn present(&self, word: u64, now_ns: u64) -> u64 {
        if self.is_former(word, now_ns) {
            self.translated(word)
        } else {
            word
        }
    }

    /// Translates a word of a former generation to this one.
    #[cold]
    fn translated(&self, word: u64) -> u64 {
        let first = self.scale.first();
        let distance = |from: u64| first.wrapping_sub(from) & MASK;
        // The newest generation that begins before the word.
        let index = self
            .past
            .partition_point(|past| distance(past.first) < distance(word));
        let held = self.past.get(index).map_or(self.older, |past| {
            let units = i128::from(behind(past.end, word));
            let held = (units << (HELD_BITS - past.token_bits)).min(past.capacity);
            (held + past.refill).min(past.bound)
        });
        self.holding(held)
    }

    /// The word of a bucket that held `held` when the generation began, rounded down. Never ahead of that moment:
    /// such a word could reach into the next generation.
    fn holding(&self, held: Held) -> u64 {
        let units = held >> (HELD_BITS - self.scale.token_bits);
        let units = units.clamp(0, i128::from(self.began));
        let began = self.scale.first().wrapping_add(self.began);
        began.wrapping_sub(units as u64) & MASK
    }

    /// What a bucket holds.
    fn held(&self, word: u64, now_ns: u64) -> Held {
        let scale = &self.scale;
        let position = scale.position(scale.advanced(now_ns).max(0));
        let units =
            behind(position, self.present(word, now_ns)).clamp(0, scale.capacity_units() as i64);
        scale.held(i128::from(units))
    }
}

// ---- Storage and compare-and-swap ----

/// The word of one bucket. Its limits are stored elsewhere, since many buckets share them.
#[derive(Debug)]
pub struct Level(AtomicU64);

impl Level {
    /// A full bucket under the first terms.
    #[allow(clippy::new_without_default)]
    pub fn full() -> Self {
        Self(AtomicU64::new(0))
    }

    /// A level with this word, or mark.
    pub(crate) fn with_word(word: u64) -> Self {
        Self(AtomicU64::new(word))
    }

    /// Loads the word without ordering: to prefetch it, or to test a bit.
    #[inline]
    pub(crate) fn touch(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Acquires all of `tokens` or none. Returns the number of tokens left.
    pub fn take(&self, terms: &Terms, now_ns: u64, tokens: u64) -> Result<u64, Refused> {
        self.update(|word| terms.decide(word, now_ns, tokens))
    }

    /// Replaces the word by the first result of `next`, and returns the second one.
    #[inline]
    fn update<R>(&self, mut next: impl FnMut(u64) -> (u64, R)) -> R {
        let mut held = self.0.load(Ordering::Acquire);
        loop {
            let (next, result) = next(held);
            if next == held {
                return result;
            }
            match self
                .0
                // Release: a thread that reads the word sees the terms that it was written under.
                .compare_exchange_weak(held, next, Ordering::Release, Ordering::Acquire)
            {
                Ok(_) => return result,
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
    /// Whether there are no limits. The terms are kept, since words refer to them.
    is_off: AtomicBool,
    scale: SeqLock<5>,
    terms: Snapshot<Option<Terms>>,
}

impl Limiter {
    /// A limiter with these limits; `None` for no limits.
    pub fn new(limits: Option<Limits>, clock: &impl Clock) -> Self {
        Self::with_terms(limits.map(|limits| Terms::new(limits, clock.now_ns())))
    }

    fn with_terms(terms: Option<Terms>) -> Self {
        Self {
            is_off: AtomicBool::new(terms.is_none()),
            scale: SeqLock::new(Self::words(&terms)),
            terms: Snapshot::new(terms),
        }
    }

    /// The words of the scale. Without limits they are never used.
    fn words(terms: &Option<Terms>) -> [u64; 5] {
        terms.as_ref().map_or([0; 5], |terms| terms.scale.words())
    }

    /// A bucket that is full under the present terms.
    pub(crate) fn full(&self) -> Level {
        let word = self.terms.read(|terms| {
            terms.as_ref().map_or(0, |terms| {
                let scale = &terms.scale;
                scale.base.wrapping_sub(scale.capacity_units()) & MASK
            })
        });
        Level(AtomicU64::new(word))
    }

    /// A bucket that holds `held`.
    pub(crate) fn holding(&self, held: Held, clock: &impl Clock) -> Level {
        let now_ns = clock.now_ns();
        let word = self.terms.read(|terms| {
            terms.as_ref().map_or(0, |terms| {
                let scale = &terms.scale;
                let position = scale.position(scale.advanced(now_ns).max(0));
                let capacity = i128::from(scale.capacity_units());
                let units = (held >> (HELD_BITS - scale.token_bits)).min(capacity);
                position.wrapping_sub(units as u64) & MASK
            })
        });
        Level(AtomicU64::new(word))
    }

    /// What a bucket with this word holds; without limits, [`FULL`].
    pub(crate) fn held(&self, word: u64, clock: &impl Clock) -> Held {
        if self.is_off() {
            return FULL;
        }
        let now_ns = clock.now_ns();
        self.terms.read(|terms| {
            terms
                .as_ref()
                .map_or(FULL, |terms| terms.held(word, now_ns))
        })
    }

    /// The tokens and the limits of a bucket, both of the same terms. `None` if the word was no level when it was
    /// judged.
    pub(crate) fn state(&self, level: &Level, clock: &impl Clock) -> Option<BucketState> {
        if self.is_off() {
            return Some(BucketState::UNLIMITED);
        }
        self.judged(
            level,
            clock,
            BucketState::UNLIMITED,
            |terms, word, now_ns| {
                let tokens = terms.decide(word, now_ns, 0).1.unwrap_or(0);
                let wait_ns = match terms.decide(word, now_ns, 1).1 {
                    // The tokens are those of a nanosecond later.
                    Err(Refused::RateLimited { wait_ns }) if tokens == 0 => wait_ns,
                    _ => 0,
                };
                let state = BucketState {
                    tokens: Some(tokens),
                    limits: Some(terms.limits),
                    wait_ns,
                };
                (word, state)
            },
        )
    }

    /// Whether there are no limits. One load.
    #[inline]
    pub fn is_off(&self) -> bool {
        self.is_off.load(Ordering::Acquire)
    }

    /// Acquires tokens from a bucket that has these limits. Returns the number of tokens left; `None` where there
    /// are no limits. Lock-free.
    #[inline]
    pub fn take(
        &self,
        level: &Level,
        clock: &impl Clock,
        tokens: u64,
    ) -> Result<Option<u64>, Refused> {
        // Only levels of entries are ever marked.
        self.take_unless_marked(level, clock, tokens)
            .unwrap_or(Ok(None))
    }

    /// As [`Self::take`]; `None` if the word was no level when it was judged.
    #[inline]
    pub(crate) fn take_unless_marked(
        &self,
        level: &Level,
        clock: &impl Clock,
        tokens: u64,
    ) -> Option<Result<Option<u64>, Refused>> {
        if self.is_off() {
            return (level.touch() <= MASK).then_some(Ok(None));
        }
        let now_ns = clock.now_ns();
        match self.take_quickly(level, now_ns, tokens) {
            Some(Ok(left)) => Some(Ok(Some(left))),
            Some(Err((scale, shortage))) => Some(Err(scale.told(shortage, now_ns, tokens))),
            None => self.take_slowly(level, clock, tokens),
        }
    }

    /// Acquires one token; `Some(false)` if there is none, `None` if the word was no level when it was judged. As
    /// [`Self::take`], but a refusal costs as little as a token.
    #[inline]
    pub(crate) fn admits(&self, level: &Level, clock: &impl Clock) -> Option<bool> {
        if self.is_off() {
            return (level.touch() <= MASK).then_some(true);
        }
        match self.take_quickly(level, clock.now_ns(), 1) {
            Some(taken) => Some(taken.is_ok()),
            None => self.take_slowly(level, clock, 1).map(|taken| taken.is_ok()),
        }
    }

    /// The fast path. `None` if the bucket's word needs more than the scale, or if the terms are being changed.
    ///
    /// The clock is read before the terms. So a thread that is suspended between the two does not apply former
    /// terms to a time after they were replaced.
    #[inline(always)]
    fn take_quickly(
        &self,
        level: &Level,
        now_ns: u64,
        tokens: u64,
    ) -> Option<Result<u64, (Scale, Shortage)>> {
        let scale = Scale::from_words(self.scale.read()?);
        let taken = level.update(|word| match scale.take(word, now_ns, tokens) {
            Ok((next, left)) => (next, Ok(left)),
            Err(shortage) => (word, Err(shortage)),
        });
        match taken {
            Ok(left) => Some(Ok(left)),
            Err(Shortage::Displaced(_) | Shortage::Untranslated) => None,
            Err(shortage) => Some(Err((scale, shortage))),
        }
    }

    /// Gives back tokens that were acquired, up to the capacity; `None` if the word was no level when it was judged.
    pub(crate) fn refund(&self, level: &Level, clock: &impl Clock, tokens: u64) -> Option<()> {
        if self.is_off() {
            return (level.touch() <= MASK).then_some(());
        }
        self.judged(level, clock, (), |terms, word, now_ns| {
            (terms.refund(word, now_ns, tokens), ())
        })
    }

    /// Changes the word of a bucket to [`GONE`] if it is full by every processor's clock. Returns whether it has.
    pub(crate) fn forget_if_full(&self, level: &Level, clock: &impl Clock) -> bool {
        let forgotten = self.judged(level, clock, false, |terms, word, now_ns| {
            terms.forgotten(word, now_ns)
        });
        forgotten == Some(true)
    }

    #[cold]
    fn take_slowly(
        &self,
        level: &Level,
        clock: &impl Clock,
        tokens: u64,
    ) -> Option<Result<Option<u64>, Refused>> {
        self.judged(level, clock, Ok(None), |terms, word, now_ns| {
            let (next, taken) = terms.decide(word, now_ns, tokens);
            (next, taken.map(Some))
        })
    }

    /// Loads the word of a bucket, has `judge` give the next word and a verdict, and stores that word. Returns the
    /// verdict; `unlimited` if there are no terms, `None` if the word is no level.
    ///
    /// The terms are read after each load of the word, so they are not older than the word. The clock is read
    /// before the terms (see [`Self::take_quickly`]). A word that is ahead of them was written before the clock
    /// went back.
    ///
    /// A thread that is suspended between these loads retries. That happens only after a change of limits
    /// meanwhile:
    /// * Terms that begin later than the time that it has read do not apply to that time.
    /// * If so many generations have begun since the word was loaded that its generation is forgotten, the word is
    ///   judged as that of an unused bucket. Then another thread has translated it. So a compare-and-swap confirms
    ///   every verdict on a word of a former generation, even if the word is unchanged.
    fn judged<R: Copy>(
        &self,
        level: &Level,
        clock: &impl Clock,
        unlimited: R,
        judge: impl Fn(&Terms, u64, u64) -> (u64, R),
    ) -> Option<R> {
        let mut word = level.0.load(Ordering::Acquire);
        while word <= MASK {
            self.begin_now(clock);
            clock.renew();
            let now_ns = clock.now_ns();
            let judged = self.terms.read(|terms| match terms {
                Some(terms) if terms.scale.is_ahead(now_ns) => None,
                Some(terms) => {
                    let (next, verdict) = judge(terms, word, now_ns);
                    Some((terms.is_former(word, now_ns), next, verdict))
                }
                None => Some((false, word, unlimited)),
            });
            let Some((is_former, next, verdict)) = judged else {
                word = level.0.load(Ordering::Acquire);
                continue;
            };
            if next == word && !is_former {
                return Some(verdict);
            }
            match level
                .0
                .compare_exchange(word, next, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return Some(verdict),
                Err(changed) => word = changed,
            }
        }
        None
    }

    /// If the clock has gone back behind the beginning of the terms, begins them anew at the same position.
    fn begin_now(&self, clock: &impl Clock) {
        let began_anew = self.terms.update(|terms| {
            clock.renew();
            let now_ns = clock.now_ns();
            match terms {
                Some(terms) if terms.scale.is_ahead(now_ns) => {
                    Ok(Some(terms.changed(terms.limits, now_ns, terms.past.len())))
                }
                _ => Err(()),
            }
        });
        if began_anew.is_ok() {
            self.scale.refresh(|| self.terms.read(Self::words));
        }
    }

    /// The limits; `None` if there are none.
    pub fn limits(&self) -> Option<Limits> {
        if self.is_off() {
            return None;
        }
        self.last_limits()
    }

    /// The limits, or the last ones if there are none now.
    pub fn last_limits(&self) -> Option<Limits> {
        self.terms.read(|terms| terms.as_ref().map(Terms::limits))
    }

    /// Changes the limits; `None` for no limits.
    pub fn set_limits(&self, limits: Option<Limits>, clock: &impl Clock) {
        match limits {
            // Cannot fail: complete limits are valid over any others.
            Some(limits) => {
                let _ = self.change_limits(limits.into(), limits, clock, MAX_PAST);
            }
            None => self.is_off.store(true, Ordering::Release),
        }
    }

    /// Changes the limits that `change` names. The others stay: those in force, or the last ones, or else those of
    /// `otherwise`. Retries for concurrent changes alone, never for acquisitions.
    pub(crate) fn change_limits(
        &self,
        change: Change,
        otherwise: Limits,
        clock: &impl Clock,
        max_past: usize,
    ) -> Result<(), LimitsError> {
        self.terms.update(|terms| {
            let base = terms.as_ref().map_or(otherwise, Terms::limits);
            let limits = change.over(base)?;
            let now_ns = clock.now_ns();
            Ok(Some(match terms {
                Some(terms) => terms.changed(limits, now_ns, max_past),
                None => Terms::new(limits, now_ns),
            }))
        })?;
        self.scale.refresh(|| self.terms.read(Self::words));
        self.is_off.store(false, Ordering::Release);
        Ok(())
    }
}

/// A level in cache lines of its own (two of 64 bytes, since x86 fetches pairs).
#[derive(Debug)]
#[repr(align(128))]
struct Apart(Level);

/// A bucket with its own limits. Its level is written all the time. Apart from it, the limits, which are read, stay
/// in the caches of other processors.
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

    /// A bucket that holds `held`.
    pub(crate) fn holding(held: Held, limits: Limits, clock: &impl Clock) -> Self {
        let limiter = Limiter::new(Some(limits), clock);
        let level = limiter.holding(held, clock);
        Self {
            limiter,
            level: Apart(level),
        }
    }

    /// Replaces what the bucket holds, before another thread uses it.
    pub(crate) fn hold(&self, held: Held, clock: &impl Clock) {
        let word = self.limiter.holding(held, clock).0.load(Ordering::Relaxed);
        self.level.0.0.store(word, Ordering::Release);
    }

    /// Stops all acquisitions, and returns what they have left.
    pub(crate) fn freeze(&self, clock: &impl Clock) -> Held {
        let word = self.level.0.0.fetch_or(FROZEN, Ordering::AcqRel);
        self.limiter.held(word & MASK, clock)
    }

    /// Whether its tokens are about to move elsewhere.
    pub(crate) fn is_frozen(&self) -> bool {
        self.level.0.touch() & FROZEN != 0
    }

    /// Its limits and its level, whose word is none while the bucket is frozen.
    pub(crate) fn parts(&self) -> (&Limiter, &Level) {
        (&self.limiter, &self.level.0)
    }

    /// Its tokens and its limits.
    pub fn state(&self, clock: &impl Clock) -> BucketState {
        // Only buckets of entries are ever frozen.
        self.state_unless_frozen(clock)
            .unwrap_or(BucketState::UNLIMITED)
    }

    /// As [`Self::state`]; `None` if it is frozen.
    pub(crate) fn state_unless_frozen(&self, clock: &impl Clock) -> Option<BucketState> {
        self.limiter.state(&self.level.0, clock)
    }

    /// Acquires all of `tokens` or none. Returns the number of tokens left; `None` where there are no limits.
    #[inline]
    pub fn take(&self, clock: &impl Clock, tokens: u64) -> Result<Option<u64>, Refused> {
        self.limiter.take(&self.level.0, clock, tokens)
    }

    /// Gives back tokens that were acquired, up to the capacity.
    pub fn refund(&self, clock: &impl Clock, tokens: u64) {
        // Only buckets of entries are ever frozen.
        let _: Option<()> = self.limiter.refund(&self.level.0, clock, tokens);
    }

    /// The limits; `None` if there are none.
    pub fn limits(&self) -> Option<Limits> {
        self.limiter.limits()
    }

    /// Changes the limits; `None` for no limits. The bucket keeps its tokens, up to the new capacity.
    pub fn set_limits(&self, limits: Option<Limits>, clock: &impl Clock) {
        match limits {
            // Cannot fail: complete limits are valid over any others.
            Some(limits) => {
                let _ = self.change_limits(limits.into(), limits, clock);
            }
            None => self.limiter.set_limits(None, clock),
        }
    }

    /// Changes the limits that `change` names. The others stay: those in force, or the last ones, or else those of
    /// `otherwise`. The bucket keeps its tokens, up to the new capacity.
    pub fn change_limits(
        &self,
        change: Change,
        otherwise: Limits,
        clock: &impl Clock,
    ) -> Result<(), LimitsError> {
        self.limiter
            .change_limits(change, otherwise, clock, MAX_OWN_PAST)?;
        // Translates the word. A concurrent acquisition that writes a word of the present generation ends the loop.
        // One under former terms, which began before the change, makes it retry once.
        self.level.0.update(|word| {
            if word > MASK {
                // Frozen: the tokens move elsewhere, and this change is ordered before the move.
                return (word, ());
            }
            let now_ns = clock.now_ns();
            self.limiter.terms.read(|terms| {
                let present = terms
                    .as_ref()
                    .map_or(word, |terms| terms.present(word, now_ns));
                (present, ())
            })
        });
        Ok(())
    }

    /// The limits, or the last ones if there are none now.
    pub fn last_limits(&self) -> Option<Limits> {
        self.limiter.last_limits()
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
        }
    }
}

impl std::error::Error for LimitsError {}
