//! The token buckets of a registry's entries. All share the registry's limits; an entry may be given its own
//! limits.
//!
//! The word of a bucket is a field of its entry. A word from [`OWN`] on is no level but a mark. The entry was removed
//! ([`GONE`]), or the mark is a key of the map of [`Apart`]: of a bucket with the entry's own limits, or, from [`MOVED`]
//! on, of a level that is on its way from one value of the entry to the next.
//!
//! # Entries that are written anew
//!
//! A connection gets another lease or delivery by another value in the map of entries, which begins with the tokens of the
//! former one. Two words cannot change at once, so:
//!
//! 1. The word moves to a level in the map of [`Apart`]; the former value has its mark, an even one. Acquisitions go on
//!    there.
//! 2. The next value takes the former one's place. Its word is the next mark, an odd one: *fetch the level first*.
//! 3. Whoever finds the odd mark freezes the moved level, by a mark in its word, and then replaces the odd mark by what that
//!    word was ([`Buckets::settle`]). From then on the entry is as fast as a new one.
//!
//! A thread that has found the former value before step 2 finds its level frozen or gone, and looks the id up again. Only
//! such threads can make a freeze fail, each of them once.
//!
//! # Invariants
//!
//! * *An acquisition is judged by the one place that holds the tokens.* A verdict is computed from a loaded word. A
//!   mark or a frozen word gives no verdict. No second load confirms or overturns a verdict: between two loads an
//!   entry can leave the shared limits and return to them, so the second word says nothing about the first.
//! * *Tokens are in one place at any time.* A compare-and-swap moves them, from the exact level to a mark, or from
//!   a mark whose bucket is frozen to a level. The target holds the tokens before it can be found. So it never
//!   looks empty, and no acquisition is lost.
//! * *Acquisitions delay no change.* A change that loses [`ATTEMPTS`] compare-and-swaps to acquisitions announces
//!   the move in `moves`. A thread that sees the announcement moves the tokens before it acquires any. So each
//!   thread makes the change lose once more at most. An entry's own bucket is frozen, which cannot fail, and a
//!   thread that finds it frozen moves its tokens too.

use std::ops::ControlFlow;
use std::sync::Arc;

use ahash::RandomState;
use papaya::{Guard, HashMap};
use seize::Collector;

use super::stored::{Stored, with_map};
use super::{Id, Namespace, Registry};
use crate::clock::Clock;
use crate::sync::{AtomicU8, AtomicU32, AtomicU64, Ordering};
pub use crate::token_bucket::BucketState;
use crate::token_bucket::{
    Change, GONE, Level, Limiter, Limits, LimitsError, Refused, TokenBucket,
};

/// No level: the highest bit of a level is 0.
const OWN: u64 = 1 << 63;
const MOVED: u64 = OWN | 1 << 62;
/// As many changes are not reached. The second mark of a pair is less than [`GONE`].
const NUMBERS: u64 = 1 << 60;
/// The bit of a mark of the value that is present.
const PRESENT: u64 = 1;

/// Whether a word says that the level is still to be fetched.
fn is_unsettled(word: u64) -> bool {
    (MOVED..GONE).contains(&word) && word & PRESENT != 0
}

/// Compare-and-swaps that acquisitions may make fail before the move is announced.
const ATTEMPTS: usize = if cfg!(loom) { 1 } else { 8 };

/// Look-ups of an entry that is replaced each time. A caller that loses as often is told that there is none.
const REPLACED: usize = 8;

const SHARED_LIMITS: u8 = 1;
/// Never cleared.
const OWN_LIMITS: u8 = 2;
/// The highest bit, so that one comparison tests for it and any of the others.
const ENFORCED: u8 = 4;

/// Limits for one entry.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EntryLimits {
    /// The limits of the registry.
    Shared,
    /// Its own limits; `None` for no limits. A change keeps what it does not name: of the entry's own limits, those
    /// in force or the last ones, else of the shared limits.
    Own(Option<Change>),
}

/// Why no tokens were acquired, or why limits were not changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BucketError {
    /// The id is not registered.
    NotFound,
    /// The bucket does not hold enough tokens.
    Refused(Refused),
    /// The limits are out of bounds.
    Limits(LimitsError),
}

impl From<Refused> for BucketError {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

impl From<LimitsError> for BucketError {
    fn from(error: LimitsError) -> Self {
        Self::Limits(error)
    }
}

/// What a mark stands for.
enum Apart {
    /// The bucket of an entry with its own limits.
    Bucket(Box<TokenBucket>),
    /// The level of an entry that is written anew. Its word may be the mark of a bucket, or of what it was when it was frozen.
    Level(Level),
    /// The word of such a level when it was frozen.
    Frozen(u64),
}

/// Where a change moves the tokens of a level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    ToOwnLimits,
    Apart,
}

pub(super) struct Buckets {
    /// Whether any bucket has limits, and whether they are enforced: [`SHARED_LIMITS`],
    /// [`OWN_LIMITS`], [`ENFORCED`].
    in_use: AtomicU8,
    shared: Limiter,
    own: HashMap<u64, Apart, RandomState>,
    numbers: AtomicU64,
    /// The addresses of levels whose tokens are about to move.
    moves: HashMap<usize, Move>,
    /// Changes that have an entry in `moves`. Beside `in_use`, whose cache line routes have loaded before.
    moving: AtomicU32,
}

impl Buckets {
    /// `collector` is that of the maps of entries: see [`super::map`].
    pub(super) fn new(collector: &Arc<Collector>, clock: &impl Clock) -> Self {
        Self {
            in_use: AtomicU8::new(ENFORCED),
            shared: Limiter::new(None, clock),
            own: HashMap::builder()
                .shared_collector(Arc::clone(collector))
                .hasher(RandomState::new())
                .build(),
            numbers: AtomicU64::new(0),
            moves: HashMap::new(),
            moving: AtomicU32::new(0),
        }
    }

    /// Whether any bucket has limits that are enforced. One load.
    #[inline]
    pub(super) fn is_on(&self) -> bool {
        self.in_use.load(Ordering::Relaxed) > ENFORCED
    }

    /// The full bucket of a new entry.
    pub(super) fn full(&self) -> Level {
        self.shared.full()
    }

    #[inline]
    pub(super) fn take(
        &self,
        level: &Level,
        clock: &impl Clock,
        tokens: u64,
    ) -> Option<Result<Option<u64>, Refused>> {
        self.judged(level, clock, |limiter, level| {
            limiter.take_unless_marked(level, clock, tokens)
        })
    }

    /// The verdict of `judge`, by the limits and the level that hold the tokens of an entry; `None` if the entry was
    /// removed, or has another value by now. `judge` returns `None` where the level is a mark or frozen.
    #[inline]
    fn judged<R>(
        &self,
        level: &Level,
        clock: &impl Clock,
        judge: impl Fn(&Limiter, &Level) -> Option<R>,
    ) -> Option<R> {
        loop {
            if self.moving(level).is_none()
                && let Some(verdict) = judge(&self.shared, level)
            {
                return Some(verdict);
            }
            if let ControlFlow::Break(verdict) = self.judged_by_own_limits(level, clock, &judge) {
                return verdict;
            }
        }
    }

    /// Gives back tokens. `None` if the entry was removed, or has another value by now.
    pub(super) fn refund(&self, level: &Level, clock: &impl Clock, tokens: u64) -> Option<()> {
        self.judged(level, clock, |limiter, level| {
            limiter.refund(level, clock, tokens)
        })
    }

    /// The move that a change has announced. One load if there is no announcement.
    #[inline]
    fn moving(&self, level: &Level) -> Option<Move> {
        // Relaxed: an acquisition that does not see it makes the change lose once more.
        if self.moving.load(Ordering::Relaxed) > 0 {
            self.announced(level)
        } else {
            None
        }
    }

    #[cold]
    fn announced(&self, level: &Level) -> Option<Move> {
        self.moves
            .get(&address(level), &self.moves.guard())
            .copied()
    }

    /// The level that holds the tokens of an entry, or the mark of its own bucket: that of its value, or the one that this was
    /// moved to. `None` if the entry was removed, or has another value by now.
    fn standing<'l>(&self, level: &'l Level, guard: &'l impl Guard) -> Option<&'l Level> {
        loop {
            match level.word().load(Ordering::Acquire) {
                GONE => return None,
                mark if is_unsettled(mark) => self.settle(level, mark, guard),
                mark if mark >= MOVED => {
                    return match self.own.get(&mark, guard) {
                        // From `MOVED` on it is frozen, so the next value is there.
                        Some(Apart::Level(moved))
                            if moved.word().load(Ordering::Acquire) < MOVED =>
                        {
                            Some(moved)
                        }
                        _ => None,
                    };
                }
                _ => return Some(level),
            }
        }
    }

    /// Breaks with the verdict by the entry's own bucket, with `None` if the entry was removed or has another value by now.
    /// Continues if the entry had no bucket of its own, or if that was frozen, in which case its tokens have been moved.
    #[cold]
    fn judged_by_own_limits<R>(
        &self,
        level: &Level,
        clock: &impl Clock,
        judge: impl Fn(&Limiter, &Level) -> Option<R>,
    ) -> ControlFlow<Option<R>> {
        let guard = self.own.guard();
        let Some(level) = self.standing(level, &guard) else {
            return ControlFlow::Break(None);
        };
        let word = level.word().load(Ordering::Acquire);
        match word {
            GONE => return ControlFlow::Break(None),
            MOVED.. => return ControlFlow::Continue(()),
            OWN.. => {}
            _ => {
                match self.moving(level) {
                    Some(Move::ToOwnLimits) => self.finish_own(level, word, clock),
                    Some(Move::Apart) => self.finish_apart(level, word),
                    // The entry's level was moved to this one.
                    None => {
                        if let Some(verdict) = judge(&self.shared, level) {
                            return ControlFlow::Break(Some(verdict));
                        }
                    }
                }
                return ControlFlow::Continue(());
            }
        }
        let Some(bucket) = self.bucket(level, word, &guard) else {
            return ControlFlow::Continue(());
        };
        let (limiter, own_level) = bucket.parts();
        match judge(limiter, own_level) {
            Some(verdict) => ControlFlow::Break(Some(verdict)),
            None => {
                self.give_back(level, word, bucket, clock);
                ControlFlow::Continue(())
            }
        }
    }

    /// Acquires one token; `Some(false)` if there is none, `None` if the entry was removed or written anew.
    #[inline]
    pub(super) fn admits(&self, level: &Level, clock: &impl Clock) -> Option<bool> {
        if self.moving(level).is_none()
            && let Some(is_admitted) = self.shared.admits(level, clock)
        {
            return Some(is_admitted);
        }
        self.admits_by_own_limits(level, clock)
    }

    /// For an entry that had its own limits when the shared ones were applied, or whose tokens are about to move.
    #[inline(never)]
    fn admits_by_own_limits(&self, level: &Level, clock: &impl Clock) -> Option<bool> {
        let mark = level.word().load(Ordering::Acquire);
        if let Some(Apart::Bucket(bucket)) = self.own.get(&mark, &self.own.guard()) {
            let (limiter, level) = bucket.parts();
            if let Some(is_admitted) = limiter.admits(level, clock) {
                return Some(is_admitted);
            }
        }
        self.take(level, clock, 1).map(|taken| taken.is_ok())
    }

    /// The bucket under a mark that was loaded from the entry. `None` if the entry has another word by now, which
    /// the caller's next load sees.
    fn bucket<'g>(
        &self,
        level: &Level,
        mark: u64,
        guard: &'g impl Guard,
    ) -> Option<&'g TokenBucket> {
        let bucket = match self.own.get(&mark, guard) {
            Some(Apart::Bucket(bucket)) => Some(bucket),
            _ => None,
        };
        if bucket.is_none() {
            // A read-modify-write reads the newest word, so no later load returns the mark again. `papaya` promises
            // as much, but by nothing that loom sees.
            level.word().fetch_or(0, Ordering::AcqRel);
        }
        bucket.map(Box::as_ref)
    }

    /// `None` if the entry was removed, or has another value by now.
    pub(super) fn state(&self, level: &Level, clock: &impl Clock) -> Option<BucketState> {
        let guard = self.own.guard();
        loop {
            let level = self.standing(level, &guard)?;
            let word = level.word().load(Ordering::Acquire);
            if word == GONE {
                return None;
            }
            if word < OWN {
                let state = self.shared.state(level, clock);
                if state.is_some() {
                    return state;
                }
                // The entry has just been given its own limits, was written anew, or was removed.
                continue;
            }
            // `None`: shared again meanwhile.
            if let Some(bucket) = self.bucket(level, word, &guard) {
                let state = bucket.state_unless_frozen(clock);
                if state.is_some() {
                    return state;
                }
                self.give_back(level, word, bucket, clock);
            }
        }
    }

    fn set_shared(&self, limits: Option<Limits>, clock: &impl Clock) {
        self.shared.set_limits(limits, clock);
        loop {
            let is_off = self.shared.is_off();
            if is_off {
                self.in_use.fetch_and(!SHARED_LIMITS, Ordering::AcqRel);
            } else {
                self.in_use.fetch_or(SHARED_LIMITS, Ordering::AcqRel);
            }
            // Concurrent changes may do the same: the last one sees here what all before it have set. Acquisitions
            // change neither.
            if self.shared.is_off() == is_off {
                break;
            }
        }
    }

    /// Changes the limits of an entry. It keeps its tokens, up to the new capacity.
    fn set(
        &self,
        level: &Level,
        limits: EntryLimits,
        clock: &impl Clock,
    ) -> Result<(), BucketError> {
        match limits {
            EntryLimits::Own(change) => self.set_own(level, change, clock),
            EntryLimits::Shared => self.share(level, clock),
        }
    }

    /// Retries for concurrent changes of the same entry, and for acquisitions: [`ATTEMPTS`] times, then once per
    /// thread after the move is announced.
    fn set_own(
        &self,
        level: &Level,
        change: Option<Change>,
        clock: &impl Clock,
    ) -> Result<(), BucketError> {
        let guard = self.own.guard();
        let shared = self.shared.last_limits().unwrap_or_default();
        let limits = change.unwrap_or_default().over(shared);
        let mut prepared = None;
        let mut attempts = 0;
        let mut announced = None;
        loop {
            let Some(level) = self.standing(level, &guard) else {
                if let Some((mark, _)) = prepared {
                    self.own.remove(&mark, &guard);
                }
                return Err(BucketError::NotFound);
            };
            if attempts >= ATTEMPTS {
                // Before the load: a thread that changes the word after it began before the announcement.
                Announced::renew(&mut announced, self, level, Move::ToOwnLimits);
            }
            let held = level.word().load(Ordering::Acquire);
            if held >= OWN {
                // Never used: lost to a concurrent change.
                if let Some((mark, _)) = prepared.take() {
                    self.own.remove(&mark, &guard);
                }
                if held == GONE {
                    return Err(BucketError::NotFound);
                }
                match self.bucket(level, held, &guard) {
                    // Its terms must be those of the moment at which it was frozen, or little newer.
                    Some(bucket) if bucket.is_frozen() => {
                        self.give_back(level, held, bucket, clock);
                        continue;
                    }
                    Some(bucket) => return Self::change_own(bucket, change, shared, clock),
                    // Replaced meanwhile.
                    None => continue,
                }
            }
            let (mark, bucket) = match &prepared {
                Some(prepared) => *prepared,
                None => *prepared.insert(self.prepared(limits?, change.is_none(), clock, &guard)),
            };
            attempts += 1;
            if self.replace(level, held, mark, bucket, clock) {
                return Ok(());
            }
        }
    }

    fn change_own(
        bucket: &TokenBucket,
        change: Option<Change>,
        shared: Limits,
        clock: &impl Clock,
    ) -> Result<(), BucketError> {
        match change {
            Some(change) => bucket.change_limits(change, shared, clock)?,
            None => bucket.set_limits(None, clock),
        }
        Ok(())
    }

    /// An empty bucket in the map, under a mark that nothing refers to.
    fn prepared<'g>(
        &self,
        limits: Limits,
        is_off: bool,
        clock: &impl Clock,
        guard: &'g impl Guard,
    ) -> (u64, &'g TokenBucket) {
        self.in_use.fetch_or(OWN_LIMITS, Ordering::Relaxed);
        let bucket = TokenBucket::holding(0, limits, clock);
        if is_off {
            bucket.set_limits(None, clock);
        }
        let mark = OWN + self.number();
        match self
            .own
            .get_or_insert(mark, Apart::Bucket(Box::new(bucket)), guard)
        {
            Apart::Bucket(bucket) => (mark, bucket),
            Apart::Level(_) | Apart::Frozen(_) => unreachable!("a mark of an own bucket"),
        }
    }

    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed) % NUMBERS
    }

    /// Moves the tokens of the level `held` to a prepared bucket.
    fn replace(
        &self,
        level: &Level,
        held: u64,
        mark: u64,
        bucket: &TokenBucket,
        clock: &impl Clock,
    ) -> bool {
        bucket.hold(self.shared.held(held, clock), clock);
        level
            .word()
            .compare_exchange(held, mark, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Helps a change that has announced a move: gives the entry a bucket with its present shared limits, which
    /// that change then finds and changes.
    fn finish_own(&self, level: &Level, held: u64, clock: &impl Clock) {
        let guard = self.own.guard();
        let limits = self.shared.last_limits().unwrap_or_default();
        let (mark, bucket) = self.prepared(limits, self.shared.is_off(), clock, &guard);
        if !self.replace(level, held, mark, bucket, clock) {
            // Lost to an acquisition, to that change, or to another thread that helps.
            self.own.remove(&mark, &guard);
        }
    }

    /// Moves the level of an entry apart, and returns the word of a value that is to take its place: see [`Self::settle`].
    /// `None` if the entry was removed. Acquisitions go on. Retries as [`Self::set_own`] does.
    pub(super) fn move_apart(&self, level: &Level) -> Option<u64> {
        let guard = self.own.guard();
        let mut attempts = 0;
        let mut announced = None;
        loop {
            if attempts >= ATTEMPTS {
                Announced::renew(&mut announced, self, level, Move::Apart);
            }
            match level.word().load(Ordering::Acquire) {
                GONE => return None,
                mark if is_unsettled(mark) => self.settle(level, mark, &guard),
                mark if mark >= MOVED => return Some(mark | PRESENT),
                held => self.finish_apart(level, held),
            }
            attempts += 1;
        }
    }

    /// Tries once to move a level apart that has this word: a level, or the mark of an own bucket, which stays where it is.
    fn finish_apart(&self, level: &Level, held: u64) {
        let guard = self.own.guard();
        let mark = self.moved_mark();
        self.own
            .insert(mark, Apart::Level(Level::with_word(held)), &guard);
        let moved = level
            .word()
            .compare_exchange(held, mark, Ordering::AcqRel, Ordering::Acquire);
        if moved.is_err() {
            self.own.remove(&mark, &guard);
        }
    }

    fn moved_mark(&self) -> u64 {
        MOVED + 2 * self.number()
    }

    /// Once the entry's present value has the word that [`Self::move_apart`] has returned.
    pub(super) fn settle_present(&self, level: &Level) {
        let mark = level.word().load(Ordering::Acquire);
        if is_unsettled(mark) {
            self.settle(level, mark, &self.own.guard());
        }
    }

    /// Moves the tokens of an entry that was written anew to its present value, whose word was `mark`. Afterwards it is another
    /// one. Retries for acquisitions by threads that have found the former value: one for each.
    fn settle(&self, level: &Level, mark: u64, guard: &impl Guard) {
        let former = mark & !PRESENT;
        while let Some(Apart::Level(moved)) = self.own.get(&former, guard) {
            let held = moved.word().load(Ordering::Acquire);
            if held < MOVED {
                let frozen = self.moved_mark();
                self.own.insert(frozen, Apart::Frozen(held), guard);
                let freeze = moved.word().compare_exchange(
                    held,
                    frozen,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                );
                if freeze.is_err() {
                    self.own.remove(&frozen, guard);
                }
                continue;
            }
            if let Some(Apart::Frozen(word)) = self.own.get(&held, guard) {
                let settled =
                    level
                        .word()
                        .compare_exchange(mark, *word, Ordering::AcqRel, Ordering::Acquire);
                if settled.is_ok() {
                    self.own.remove(&former, guard);
                    self.own.remove(&held, guard);
                }
            }
            break;
        }
        // Another thread has settled it, or removed the entry: see `Self::bucket`.
        level.word().fetch_or(0, Ordering::AcqRel);
    }

    /// Gives an entry the shared limits. Retries for concurrent changes of the same entry.
    fn share(&self, level: &Level, clock: &impl Clock) -> Result<(), BucketError> {
        let guard = self.own.guard();
        loop {
            let Some(level) = self.standing(level, &guard) else {
                return Err(BucketError::NotFound);
            };
            let mark = level.word().load(Ordering::Acquire);
            if mark == GONE {
                return Err(BucketError::NotFound);
            }
            if mark < OWN {
                return Ok(());
            }
            let Some(bucket) = self.bucket(level, mark, &guard) else {
                continue;
            };
            if self.give_back(level, mark, bucket, clock) {
                return Ok(());
            }
        }
    }

    /// Moves the tokens of the bucket under `mark` to the entry; `false` if another thread has done so, or the
    /// entry was removed.
    fn give_back(
        &self,
        level: &Level,
        mark: u64,
        bucket: &TokenBucket,
        clock: &impl Clock,
    ) -> bool {
        let next = self.shared.holding(bucket.freeze(clock), clock);
        let next = next.word().load(Ordering::Relaxed);
        let is_moved = level
            .word()
            .compare_exchange(mark, next, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        if is_moved {
            self.own.remove(&mark, &self.own.guard());
        }
        is_moved
    }

    /// Frees what an entry that was removed has apart.
    pub(super) fn left(&self, level: &Level) {
        // Of the threads that replace a mark, one gets it.
        let mark = level.word().swap(GONE, Ordering::AcqRel);
        let key = if mark >= MOVED { mark & !PRESENT } else { mark };
        if (OWN..GONE).contains(&mark)
            && let Some(Apart::Level(moved)) = self.own.remove(&key, &self.own.guard())
        {
            self.left(moved);
        }
    }
}

/// An entry's bucket, for models. loom does not see the map of entries, and would take a level that one thread finds there for
/// one that another thread is still making. So the values that the entry will have are made before.
#[cfg(loom)]
pub struct EntryBucket {
    buckets: Buckets,
    values: [Level; 3],
    present: AtomicU32,
}

#[cfg(loom)]
impl EntryBucket {
    /// A full bucket with these shared limits.
    pub fn new(limits: Limits, clock: &impl Clock) -> Self {
        let buckets = Buckets::new(&Arc::new(Collector::new()), clock);
        buckets.set_shared(Some(limits), clock);
        let values = std::array::from_fn(|_| buckets.full());
        Self {
            buckets,
            values,
            present: AtomicU32::new(0),
        }
    }

    /// As `Registry::with_level`, which gives up after some attempts.
    fn with_level<R>(&self, then: impl Fn(&Level) -> Option<R>) -> R {
        let mut present = self.present.load(Ordering::Acquire);
        loop {
            if let Some(result) = then(&self.values[present as usize]) {
                return result;
            }
            // Reads the newest value, as a look-up does: see `Buckets::bucket`.
            present = self.present.fetch_or(0, Ordering::AcqRel);
        }
    }

    /// Acquires tokens.
    pub fn take(&self, tokens: u64, clock: &impl Clock) -> Result<Option<u64>, Refused> {
        self.with_level(|level| self.buckets.take(level, clock, tokens))
    }

    /// Changes the limits.
    pub fn set(&self, limits: EntryLimits, clock: &impl Clock) -> Result<(), BucketError> {
        self.with_level(|level| match self.buckets.set(level, limits, clock) {
            Err(BucketError::NotFound) => None,
            set => Some(set),
        })
    }

    /// Gives the entry its next value, of three. Not by two threads at once.
    pub fn write_anew(&self) {
        let present = self.present.load(Ordering::Acquire);
        let next = &self.values[present as usize + 1];
        let word = self.buckets.move_apart(&self.values[present as usize]);
        next.word().store(word.unwrap(), Ordering::Relaxed);
        self.present.fetch_add(1, Ordering::AcqRel);
        self.buckets.settle_present(next);
    }

    /// The number of words and buckets that are apart.
    pub fn apart(&self) -> usize {
        self.buckets.own.len()
    }
}

/// Identifies a level while a reference to it exists.
fn address(level: &Level) -> usize {
    std::ptr::from_ref(level).addr()
}

/// A level in `moves`, until this is dropped.
struct Announced<'a> {
    buckets: &'a Buckets,
    address: usize,
}

impl<'a> Announced<'a> {
    /// The first of two changes of one entry to complete removes the announcement of both, so each renews its own before
    /// each attempt.
    fn renew(this: &mut Option<Self>, buckets: &'a Buckets, level: &Level, to: Move) {
        let address = address(level);
        if this.as_ref().is_none_or(|this| this.address != address) {
            buckets.moving.fetch_add(1, Ordering::AcqRel);
            *this = Some(Self { buckets, address });
        }
        buckets.moves.insert(address, to, &buckets.moves.guard());
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        let moves = &self.buckets.moves;
        moves.remove(&self.address, &moves.guard());
        self.buckets.moving.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// Changes the limits of all entries that have none of their own; `None` for no limits.
    pub fn set_limits(&self, limits: Option<Limits>, clock: &impl Clock) {
        self.buckets.set_shared(limits, clock);
    }

    /// Whether routes acquire from buckets, and check the breakers of targets. Limits, tokens and breakers are kept.
    pub fn enforce_limits(&self, is_on: bool) {
        if is_on {
            self.buckets.in_use.fetch_or(ENFORCED, Ordering::Relaxed);
        } else {
            self.buckets.in_use.fetch_and(!ENFORCED, Ordering::Relaxed);
        }
    }

    /// The last argument of [`Self::enforce_limits`]; `true` at first.
    pub fn enforces_limits(&self) -> bool {
        self.buckets.in_use.load(Ordering::Relaxed) & ENFORCED != 0
    }

    /// Whether routes acquire from any entry's bucket. One load.
    #[inline]
    pub fn has_token_buckets(&self) -> bool {
        self.buckets.is_on()
    }

    /// The limits of all entries that have none of their own.
    pub fn shared_limits(&self) -> Option<Limits> {
        self.buckets.shared.limits()
    }

    /// Changes the limits of one connection or transport. It keeps its tokens. Servers have no bucket: the result
    /// for them is always [`BucketError::NotFound`].
    pub fn set_entry_limits(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        limits: EntryLimits,
        clock: &impl Clock,
    ) -> Result<(), BucketError> {
        self.with_level(namespace, id, |level| {
            match self.buckets.set(level, limits, clock) {
                Err(BucketError::NotFound) => None,
                set => Some(set),
            }
        })
        .unwrap_or(Err(BucketError::NotFound))
    }

    /// Acquires all of `tokens` or none from the bucket of a connection or transport. Returns the number of tokens
    /// left; `None` where there are no limits.
    pub fn take_tokens(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        tokens: u64,
        clock: &impl Clock,
    ) -> Result<Option<u64>, BucketError> {
        self.with_level(namespace, id, |level| {
            self.buckets.take(level, clock, tokens)
        })
        .map_or(Err(BucketError::NotFound), |taken| Ok(taken?))
    }

    /// Gives back tokens that were acquired from the bucket of a connection or transport and not used. It holds no
    /// more than its capacity afterwards.
    pub fn refund_tokens(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        tokens: u64,
        clock: &impl Clock,
    ) -> Result<(), BucketError> {
        self.with_level(namespace, id, |level| {
            self.buckets.refund(level, clock, tokens)
        })
        .ok_or(BucketError::NotFound)
    }

    /// The state of the bucket of a connection or transport.
    pub fn bucket_state(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        clock: &impl Clock,
    ) -> Option<BucketState> {
        self.with_level(namespace, id, |level| self.buckets.state(level, clock))
    }

    /// The result of `then` with the level of an entry; `None` if there is none. `then` returns `None` if the entry was
    /// removed since it was found; then another one may have taken its place.
    fn with_level<R>(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        then: impl Fn(&Level) -> Option<R>,
    ) -> Option<R> {
        for _ in 0..REPLACED {
            let found = with_map!(self, namespace, |map| {
                self.lookup(map, id, |_, value, _| value.level().map(&then))
            });
            match found.flatten() {
                Some(None) => {}
                other => return other.flatten(),
            }
        }
        None
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::clock::FakeClock;

    /// Otherwise a bucket whose limits change during an acquisition would refuse it.
    #[test]
    fn shared_limits_say_nothing_of_a_mark() {
        let clock = FakeClock::at_ns(0);
        let limits = Limits::new(10, 1.0).unwrap();
        for mark in [OWN, OWN + 1, MOVED, MOVED + 1, GONE] {
            let level = Level::full();
            level.word().store(mark, Ordering::Relaxed);
            for limits in [None, Some(limits)] {
                let shared = Limiter::new(limits, &clock);
                for tokens in [0, 1, 11] {
                    let taken = shared.take_unless_marked(&level, &clock, tokens);
                    assert_eq!(taken, None);
                }
                assert_eq!(shared.admits(&level, &clock), None);
                assert_eq!(level.word().load(Ordering::Relaxed), mark);
            }
        }
    }

    /// An acquisition does not wait for the change that moves the tokens, and is not refused.
    #[test]
    fn a_taking_finishes_a_move_that_another_thread_has_begun() {
        let clock = FakeClock::at_ns(0);
        for shared in [None, Some(Limits::new(10, 1.0).unwrap())] {
            let buckets = Buckets::new(&Arc::new(Collector::new()), &clock);
            buckets.set_shared(shared, &clock);
            let level = buckets.full();
            let held = |tokens: u64| shared.map(|_| tokens);
            let state = |tokens| {
                Some(BucketState {
                    tokens: held(tokens),
                    limits: shared,
                    wait_ns: 0,
                })
            };
            assert_eq!(buckets.take(&level, &clock, 4), Some(Ok(held(6))));

            let mut announced = None;
            Announced::renew(&mut announced, &buckets, &level, Move::ToOwnLimits);
            assert_eq!(buckets.state(&level, &clock), state(6));
            assert_eq!(buckets.take(&level, &clock, 1), Some(Ok(held(5))));
            drop(announced);
            assert_eq!(buckets.moving(&level), None);
            let mark = level.word().load(Ordering::Relaxed);
            assert!((OWN..MOVED).contains(&mark));

            let guard = buckets.own.guard();
            buckets.bucket(&level, mark, &guard).unwrap().freeze(&clock);
            drop(guard);
            assert_eq!(buckets.state(&level, &clock), state(5));
            assert_eq!(buckets.admits(&level, &clock), Some(true));
            assert!(level.word().load(Ordering::Relaxed) < OWN);
            assert_eq!(buckets.state(&level, &clock), state(4));
            assert!(buckets.own.is_empty());

            buckets.left(&level);
            assert_eq!(buckets.state(&level, &clock), None);
        }
    }

    /// A value that is written anew keeps the tokens, at its own word: nothing stays apart but a bucket with own limits.
    #[test]
    fn an_entry_written_anew_has_its_tokens_at_its_own_word() {
        let clock = FakeClock::at_ns(0);
        let limits = |capacity| Limits::new(capacity, 1.0).unwrap();
        let buckets = Buckets::new(&Arc::new(Collector::new()), &clock);
        buckets.set_shared(Some(limits(10)), &clock);
        let mut level = buckets.full();
        let anew = |level: &Level| {
            let next = Level::with_word(buckets.move_apart(level).unwrap());
            // Found by a thread before the next value is there.
            assert!(matches!(buckets.take(level, &clock, 1), Some(Ok(Some(_)))));
            buckets.settle_present(&next);
            assert_eq!(buckets.take(level, &clock, 1), None);
            assert_eq!(buckets.admits(level, &clock), None);
            assert_eq!(buckets.state(level, &clock), None);
            next
        };
        for left in [9, 8] {
            level = anew(&level);
            assert_eq!(buckets.state(&level, &clock).unwrap().tokens, Some(left));
            assert!(level.word().load(Ordering::Relaxed) < OWN);
            assert!(buckets.own.is_empty());
        }
        let own = EntryLimits::Own(Some(limits(8).into()));
        buckets.set(&level, own, &clock).unwrap();
        for left in [7, 6] {
            level = anew(&level);
            let state = buckets.state(&level, &clock).unwrap();
            assert_eq!((state.tokens, state.limits), (Some(left), Some(limits(8))));
            assert!((OWN..MOVED).contains(&level.word().load(Ordering::Relaxed)));
            assert_eq!(buckets.own.len(), 1);
        }
        // Removed before it has settled.
        let next = Level::with_word(buckets.move_apart(&level).unwrap());
        buckets.left(&next);
        assert_eq!(buckets.state(&next, &clock), None);
        assert!(buckets.own.is_empty());
    }
}
