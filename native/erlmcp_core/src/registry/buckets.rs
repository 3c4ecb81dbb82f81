//! The token buckets of a registry's entries. All share the registry's limits; an entry may be given
//! limits of its own.
//!
//! A bucket's word stands in the entry. A word from [`OWN`] on is no level but a mark: the entry's
//! bucket is in the map of own buckets, under the number in the mark, or the entry has been taken
//! out ([`GONE`]). Marks are set and taken back by an exchange of the word, so nothing that was
//! taken from the bucket at the same time is lost; but a taking that overlaps the exchange of *own*
//! limits for those of all may count under those before.

use std::sync::Arc;

use papaya::HashMap;

use super::{Id, Namespace, Registry};
use crate::clock::Clock;
use crate::sync::{AtomicU8, AtomicU64, Ordering};
use crate::token_bucket::{Level, Limiter, Limits, LimitsError, Refused, TokenBucket};

/// No level is ever so far on: see `MAX_BASE` in [`crate::token_bucket`].
const OWN: u64 = u64::MAX << 40;
const GONE: u64 = u64::MAX;

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
    /// Its own; `None` for none.
    Own(Option<Limits>),
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

/// What a bucket holds at the moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BucketState {
    /// Whole tokens; `None` without limits.
    pub tokens: Option<u64>,
    /// The limits; `None` for none.
    pub limits: Option<Limits>,
}

pub(super) struct Buckets {
    /// Whether any bucket has limits, and whether they are enforced: [`SHARED_LIMITS`],
    /// [`OWN_LIMITS`], [`ENFORCED`].
    in_use: AtomicU8,
    shared: Limiter,
    own: HashMap<u64, Arc<TokenBucket>>,
    numbers: AtomicU64,
}

impl Buckets {
    pub(super) fn new(clock: &impl Clock) -> Self {
        Self {
            in_use: AtomicU8::new(ENFORCED),
            shared: Limiter::new(None, clock),
            own: HashMap::new(),
            numbers: AtomicU64::new(0),
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
            let word = level.word().load(Ordering::Acquire);
            if word < OWN {
                let taken = self.shared.take(level, clock, tokens);
                // The mark may have been set just now. It reads as a level that is far ahead.
                let may_be_mark = tokens == 0 || matches!(taken, Err(Refused::RateLimited { .. }));
                if !may_be_mark || level.word().load(Ordering::Acquire) < OWN {
                    return taken;
                }
            }
            match self.of_own(level, |bucket| bucket.take(clock, tokens)) {
                Some(taken) => return taken,
                None if level.word().load(Ordering::Acquire) == GONE => return Ok(None),
                // It shares limits again.
                None => {}
            }
        }
    }

    /// Takes one token, or none: whether there was one.
    #[inline]
    pub(super) fn admits(&self, level: &Level, clock: &impl Clock) -> bool {
        if level.word().load(Ordering::Acquire) < OWN && self.shared.admits(level, clock) {
            return true;
        }
        self.admits_not_at_once(level, clock)
    }

    /// Refused by the shared limits, which may not be the bucket's.
    #[cold]
    fn admits_not_at_once(&self, level: &Level, clock: &impl Clock) -> bool {
        level.word().load(Ordering::Acquire) >= OWN && self.take(level, clock, 1).is_ok()
    }

    /// Gives `then` the bucket that the entry has for itself. `None` if it has none any more: the
    /// entry was taken out.
    #[cold]
    fn of_own<R>(&self, level: &Level, then: impl FnOnce(&TokenBucket) -> R) -> Option<R> {
        let guard = self.own.guard();
        loop {
            let mark = level.word().load(Ordering::Acquire);
            match self.own.get(&mark, &guard) {
                Some(bucket) => return Some(then(bucket)),
                None if mark == GONE || mark < OWN => return None,
                // Exchanged for another one meanwhile.
                None => {}
            }
        }
    }

    fn state(&self, level: &Level, clock: &impl Clock) -> BucketState {
        let own = self.of_own(level, |bucket| BucketState {
            tokens: bucket.take(clock, 0).ok().flatten(),
            limits: bucket.limits(),
        });
        own.unwrap_or_else(|| BucketState {
            tokens: self.shared.take(level, clock, 0).ok().flatten(),
            limits: self.shared.limits(),
        })
    }

    fn set_shared(&self, limits: Option<Limits>, clock: &impl Clock) -> Result<(), LimitsError> {
        self.shared.set_limits(limits, clock)?;
        loop {
            let is_off = self.shared.is_off();
            if is_off {
                self.in_use.fetch_and(!SHARED_LIMITS, Ordering::AcqRel);
            } else {
                self.in_use.fetch_or(SHARED_LIMITS, Ordering::AcqRel);
            }
            // Others may be about the same: the last one sees here what all before it have set.
            if self.shared.is_off() == is_off {
                break;
            }
        }
        Ok(())
    }

    /// Exchanges what `level` refers to. The tokens that are held stay, as far as the new capacity
    /// goes.
    fn set(
        &self,
        level: &Level,
        limits: EntryLimits,
        clock: &impl Clock,
    ) -> Result<(), BucketError> {
        let guard = self.own.guard();
        loop {
            let held = level.word().load(Ordering::Acquire);
            if held == GONE {
                return Err(BucketError::NotFound);
            }
            if let (EntryLimits::Own(limits), Some(bucket)) = (limits, self.own.get(&held, &guard))
                && bucket.set_limits(limits, clock).is_ok()
            {
                return Ok(());
            }
            let tokens = self.state(level, clock).tokens;
            let next = match limits {
                EntryLimits::Own(limits) => {
                    self.in_use.fetch_or(OWN_LIMITS, Ordering::Relaxed);
                    let bucket = TokenBucket::new(limits, clock);
                    if let Some(limits) = bucket.limits() {
                        spend(limits, tokens, |n| bucket.take(clock, n).map(|_| ()));
                    }
                    // Below GONE: 2^40 changes are not reached.
                    let mark = OWN + self.numbers.fetch_add(1, Ordering::Relaxed) % (GONE - OWN);
                    self.own.insert(mark, Arc::new(bucket), &guard);
                    mark
                }
                EntryLimits::Shared => {
                    let fresh = self.full();
                    if let Some(limits) = self.shared.limits() {
                        spend(limits, tokens, |n| {
                            self.shared.take(&fresh, clock, n).map(|_| ())
                        });
                    }
                    fresh.word().load(Ordering::Relaxed)
                }
            };
            let exchanged =
                level
                    .word()
                    .compare_exchange(held, next, Ordering::AcqRel, Ordering::Acquire);
            let unused = if exchanged.is_ok() { held } else { next };
            if unused >= OWN {
                self.own.remove(&unused, &guard);
            }
            if exchanged.is_ok() {
                return Ok(());
            }
        }
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

/// Takes from a full bucket what it has more than `tokens`; all of it stays for `None`.
fn spend(limits: Limits, tokens: Option<u64>, take: impl FnOnce(u64) -> Result<(), Refused>) {
    let surplus = tokens.map_or(0, |tokens| limits.capacity().saturating_sub(tokens));
    // A full bucket holds its capacity.
    let _ = take(surplus);
}

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// Changes the limits of all entries that have none of their own; `None` for no limits.
    pub fn set_limits(
        &self,
        limits: Option<Limits>,
        clock: &impl Clock,
    ) -> Result<(), LimitsError> {
        self.buckets.set_shared(limits, clock)
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
    }

    #[inline]
    pub(super) fn with_level<R>(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        then: impl FnOnce(&Level) -> R,
    ) -> Option<R> {
        match namespace {
            Namespace::Server => None,
            Namespace::Transport => {
                let guard = self.transports.guard();
                let transport = self.transports.get(id, &guard)?;
                self.is_registered(transport)
                    .then(|| then(&transport.level))
            }
            Namespace::Connection => {
                let guard = self.connections.guard();
                Some(then(&self.connections.get(id, &guard)?.level))
            }
        }
    }
}
