//! The token buckets of a registry's entries. All share the registry's limits; an entry may be given
//! limits of its own.
//!
//! A bucket's word stands in the entry. A word from [`OWN`] on is no level but a mark: the entry's
//! bucket is in the map of own buckets, under the number in the mark, or the entry was removed
//! ([`GONE`]).
//!
//! # Invariants
//!
//! * *A taking is judged by the one place that holds the tokens.* A verdict is computed from a loaded word, and
//!   a mark or a frozen word gives none. No second load confirms or overturns a verdict: between two
//!   loads an entry can leave the shared limits and come back, so the second word says nothing of the first.
//! * *Tokens are in one place at any time.* A compare-and-swap from the exact level to a mark moves them, or
//!   from a mark whose bucket is frozen to a level. The target holds them before it can be found, so it
//!   never looks empty, and no taking is lost.
//! * *Takings delay no change.* A change that loses [`ATTEMPTS`] compare-and-swaps to takings announces the move in
//!   `moves`. Whoever sees that moves the tokens before it takes, so each thread makes the change lose
//!   once more at most. A bucket of an entry's own is frozen, which cannot fail, and whoever finds it so moves its
//!   tokens too.

use std::sync::Arc;

use papaya::{Guard, HashMap};

use super::stored::{Stored, with_map};
use super::{Id, Namespace, Registry};
use crate::clock::Clock;
use crate::sync::{AtomicU8, AtomicU32, AtomicU64, Ordering};
pub use crate::token_bucket::BucketState;
use crate::token_bucket::{Change, Level, Limiter, Limits, LimitsError, Refused, TokenBucket};

/// No level: the highest bit of a level is 0.
const OWN: u64 = u64::MAX << 40;
const GONE: u64 = u64::MAX;

/// Compare-and-swaps that takings may make fail before the move is announced.
const ATTEMPTS: usize = if cfg!(loom) { 1 } else { 8 };

const SHARED_LIMITS: u8 = 1;
/// Never taken back.
const OWN_LIMITS: u8 = 2;
/// The highest bit, so that one comparison tells it with any of the others.
const ENFORCED: u8 = 4;

/// Limits for one entry.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EntryLimits {
    /// Those of the registry.
    Shared,
    /// Its own; `None` for none. What a change does not name stays: of its own limits, those in force or the last
    /// ones, else of those that it has shared.
    Own(Option<Change>),
}

/// Why nothing was taken, or why limits were not changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BucketError {
    /// The id is not registered.
    NotFound,
    /// The bucket has not enough.
    Refused(Refused),
    /// The limits are not possible.
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

pub(super) struct Buckets {
    /// Whether any bucket has limits, and whether they are enforced: [`SHARED_LIMITS`],
    /// [`OWN_LIMITS`], [`ENFORCED`].
    in_use: AtomicU8,
    shared: Limiter,
    own: HashMap<u64, Arc<TokenBucket>>,
    numbers: AtomicU64,
    /// The addresses of levels whose tokens are about to move to a bucket of the entry's own.
    moves: HashMap<usize, ()>,
    /// Changes that have something in `moves`. Stands beside `in_use`, which routes have loaded before.
    moving: AtomicU32,
}

impl Buckets {
    pub(super) fn new(clock: &impl Clock) -> Self {
        Self {
            in_use: AtomicU8::new(ENFORCED),
            shared: Limiter::new(None, clock),
            own: HashMap::new(),
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
    ) -> Result<Option<u64>, Refused> {
        loop {
            if !self.is_moving(level)
                && let Some(taken) = self.shared.take_unless_marked(level, clock, tokens)
            {
                return taken;
            }
            if let Some(taken) = self.take_own(level, clock, tokens) {
                return taken;
            }
        }
    }

    /// Whether a change has announced that the entry gets a bucket of its own. One load where none has.
    #[inline]
    fn is_moving(&self, level: &Level) -> bool {
        // Relaxed: whoever takes without seeing it makes the change lose once more.
        self.moving.load(Ordering::Relaxed) > 0 && self.is_announced(level)
    }

    #[cold]
    fn is_announced(&self, level: &Level) -> bool {
        self.moves
            .contains_key(&address(level), &self.moves.guard())
    }

    /// `None` if the entry had no bucket of its own, or that was frozen. It has been moved then.
    #[cold]
    fn take_own(
        &self,
        level: &Level,
        clock: &impl Clock,
        tokens: u64,
    ) -> Option<Result<Option<u64>, Refused>> {
        let guard = self.own.guard();
        let word = level.word().load(Ordering::Acquire);
        if word == GONE {
            return Some(Ok(None));
        }
        if word < OWN {
            if self.is_moving(level) {
                self.finish_own(level, word, clock);
            }
            return None;
        }
        let bucket = self.bucket(level, word, &guard)?;
        let taken = bucket.take_unless_frozen(clock, tokens);
        if taken.is_none() {
            self.give_back(level, word, bucket, clock);
        }
        taken
    }

    /// Takes one token, or none: whether there was one.
    #[inline]
    pub(super) fn admits(&self, level: &Level, clock: &impl Clock) -> bool {
        if !self.is_moving(level)
            && let Some(is_admitted) = self.shared.admits(level, clock)
        {
            return is_admitted;
        }
        self.admits_by_own_limits(level, clock)
    }

    /// The entry had limits of its own when the shared ones were asked, or is about to get some.
    #[cold]
    fn admits_by_own_limits(&self, level: &Level, clock: &impl Clock) -> bool {
        self.take(level, clock, 1).is_ok()
    }

    /// The bucket under a mark that was loaded from the entry; `None` if the entry has another word by now, which
    /// the caller's next load sees.
    fn bucket<'g>(
        &self,
        level: &Level,
        mark: u64,
        guard: &'g impl Guard,
    ) -> Option<&'g Arc<TokenBucket>> {
        let bucket = self.own.get(&mark, guard);
        if bucket.is_none() {
            // Reads the newest word, so no later load returns the mark again. The map promises as much, but
            // nothing that loom sees.
            level.word().fetch_or(0, Ordering::AcqRel);
        }
        bucket
    }

    /// `None` if the entry was removed.
    fn state(&self, level: &Level, clock: &impl Clock) -> Option<BucketState> {
        let guard = self.own.guard();
        loop {
            let word = level.word().load(Ordering::Acquire);
            if word == GONE {
                return None;
            }
            if word < OWN {
                let state = self.shared.state(level, clock);
                if state.is_some() {
                    return state;
                }
                // It has just got limits of its own, or was removed.
                continue;
            }
            // None: shared again meanwhile.
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
            // Another change may do the same: the last one sees here what all before it have set. Takings change
            // neither.
            if self.shared.is_off() == is_off {
                break;
            }
        }
    }

    /// Replaces what `level` refers to. The tokens that are held stay, as far as the new capacity goes.
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

    /// Repeats itself for other changes of the same entry, and for takings [`ATTEMPTS`] times at most.
    fn set_own(
        &self,
        level: &Level,
        change: Option<Change>,
        clock: &impl Clock,
    ) -> Result<(), BucketError> {
        let guard = self.own.guard();
        let shared = self.shared.last_limits().unwrap_or_default();
        let limits = change.unwrap_or_default().over(shared);
        let mut prepared: Option<(u64, Arc<TokenBucket>)> = None;
        let mut attempts = 0;
        let mut announced = None;
        loop {
            if attempts >= ATTEMPTS {
                // Before the load: who changes the word after it has begun before the announcement.
                announced
                    .get_or_insert_with(|| Announced::of(self, level))
                    .renew();
            }
            let held = level.word().load(Ordering::Acquire);
            if held >= OWN {
                // Never in use: of the other changes one was quicker.
                if let Some((mark, _)) = prepared.take() {
                    self.own.remove(&mark, &guard);
                }
                if held == GONE {
                    return Err(BucketError::NotFound);
                }
                match self.bucket(level, held, &guard) {
                    // Its terms are needed as they were when it was frozen, or little newer.
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
                Some(prepared) => prepared,
                None => prepared.insert(self.prepared(limits?, change.is_none(), clock)),
            };
            attempts += 1;
            if self.replace(level, held, *mark, bucket, clock) {
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
    fn prepared(
        &self,
        limits: Limits,
        is_off: bool,
        clock: &impl Clock,
    ) -> (u64, Arc<TokenBucket>) {
        self.in_use.fetch_or(OWN_LIMITS, Ordering::Relaxed);
        let bucket = Arc::new(TokenBucket::holding(0, limits, clock));
        if is_off {
            bucket.set_limits(None, clock);
        }
        // Below GONE: 2^40 changes are not reached.
        let mark = OWN + self.numbers.fetch_add(1, Ordering::Relaxed) % (GONE - OWN);
        self.own
            .insert(mark, Arc::clone(&bucket), &self.own.guard());
        (mark, bucket)
    }

    /// Moves what the level `held` says to a prepared bucket.
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

    /// For a change that has announced a move: gives the entry a bucket with the limits that it has shared, which
    /// that change finds and changes.
    fn finish_own(&self, level: &Level, held: u64, clock: &impl Clock) {
        let limits = self.shared.last_limits().unwrap_or_default();
        let (mark, bucket) = self.prepared(limits, self.shared.is_off(), clock);
        if !self.replace(level, held, mark, &bucket, clock) {
            // Lost to a taking, to that change, or to another one that helps.
            self.own.remove(&mark, &self.own.guard());
        }
    }

    /// Gives an entry the limits of all. Repeats itself for other changes of the same entry.
    fn share(&self, level: &Level, clock: &impl Clock) -> Result<(), BucketError> {
        let guard = self.own.guard();
        loop {
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

    /// Moves what the bucket under `mark` holds to the entry; `false` if that has been done, or the entry was
    /// removed.
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

    /// Frees what an entry that was taken out had for itself.
    pub(super) fn left(&self, level: &Level) {
        // Of those who exchange a mark, one gets it.
        let mark = level.word().swap(GONE, Ordering::AcqRel);
        if mark >= OWN {
            self.own.remove(&mark, &self.own.guard());
        }
    }
}

/// What a level is known by while somebody refers to it.
fn address(level: &Level) -> usize {
    std::ptr::from_ref(level).addr()
}

/// A level in `moves`, until this is dropped.
struct Announced<'a> {
    buckets: &'a Buckets,
    address: usize,
}

impl<'a> Announced<'a> {
    fn of(buckets: &'a Buckets, level: &Level) -> Self {
        buckets.moving.fetch_add(1, Ordering::AcqRel);
        let address = address(level);
        let announced = Self { buckets, address };
        announced.renew();
        announced
    }

    /// Of two changes of one entry, the first to end removes what both have announced.
    fn renew(&self) {
        let moves = &self.buckets.moves;
        moves.insert(self.address, (), &moves.guard());
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

    /// Whether routes take from buckets. Limits and tokens stay as they are.
    pub fn enforce_limits(&self, is_on: bool) {
        if is_on {
            self.buckets.in_use.fetch_or(ENFORCED, Ordering::Relaxed);
        } else {
            self.buckets.in_use.fetch_and(!ENFORCED, Ordering::Relaxed);
        }
    }

    /// What [`Self::enforce_limits`] has been told last; at first it is on.
    pub fn enforces_limits(&self) -> bool {
        self.buckets.in_use.load(Ordering::Relaxed) & ENFORCED != 0
    }

    /// Whether routes take from any entry's bucket. One load.
    #[inline]
    pub fn has_token_buckets(&self) -> bool {
        self.buckets.is_on()
    }

    /// The limits of all entries that have none of their own.
    pub fn shared_limits(&self) -> Option<Limits> {
        self.buckets.shared.limits()
    }

    /// Changes the limits of one connection or transport. Tokens that it holds stay. Servers have no
    /// bucket: they are never found.
    pub fn set_entry_limits(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        limits: EntryLimits,
        clock: &impl Clock,
    ) -> Result<(), BucketError> {
        self.with_level(namespace, id, |level| {
            self.buckets.set(level, limits, clock)
        })
        .unwrap_or(Err(BucketError::NotFound))
    }

    /// Takes tokens from the bucket of a connection or transport, or none. Returns how many are
    /// left; `None` where there are no limits.
    pub fn take_tokens(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        tokens: u64,
        clock: &impl Clock,
    ) -> Result<Option<u64>, BucketError> {
        self.with_level(namespace, id, |level| {
            Ok(self.buckets.take(level, clock, tokens)?)
        })
        .unwrap_or(Err(BucketError::NotFound))
    }

    /// What the bucket of a connection or transport holds.
    pub fn bucket_state(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        clock: &impl Clock,
    ) -> Option<BucketState> {
        self.with_level(namespace, id, |level| self.buckets.state(level, clock))
            .flatten()
    }

    fn with_level<R>(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        then: impl FnOnce(&Level) -> R,
    ) -> Option<R> {
        with_map!(self, namespace, |map| {
            self.lookup(map, id, |_, value, _| value.level().map(then))
        })
        .flatten()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::clock::FakeClock;

    /// Or else a bucket that is given other limits while tokens are taken from it would refuse them.
    #[test]
    fn shared_limits_say_nothing_of_a_mark() {
        let clock = FakeClock::at_ns(0);
        let limits = Limits::new(10, 1.0).unwrap();
        for mark in [OWN, OWN + 1, GONE] {
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

    /// Whoever takes does not wait for the change that moves the tokens, and is not refused.
    #[test]
    fn a_taking_finishes_a_move_that_another_thread_has_begun() {
        let clock = FakeClock::at_ns(0);
        for shared in [None, Some(Limits::new(10, 1.0).unwrap())] {
            let buckets = Buckets::new(&clock);
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
            assert_eq!(buckets.take(&level, &clock, 4), Ok(held(6)));

            let announced = Announced::of(&buckets, &level);
            assert_eq!(buckets.state(&level, &clock), state(6));
            assert_eq!(buckets.take(&level, &clock, 1), Ok(held(5)));
            drop(announced);
            assert!(!buckets.is_moving(&level));
            let mark = level.word().load(Ordering::Relaxed);
            assert!((OWN..GONE).contains(&mark));

            let guard = buckets.own.guard();
            buckets.own.get(&mark, &guard).unwrap().freeze(&clock);
            assert_eq!(buckets.state(&level, &clock), state(5));
            assert!(buckets.admits(&level, &clock));
            assert!(level.word().load(Ordering::Relaxed) < OWN);
            assert_eq!(buckets.state(&level, &clock), state(4));
            assert!(buckets.own.is_empty());

            buckets.left(&level);
            assert_eq!(buckets.state(&level, &clock), None);
        }
    }
}
