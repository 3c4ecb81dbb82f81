//! Token buckets by key: made on first use, forgotten once they are full again, never more than a fixed number.
//!
//! # Algorithm
//!
//! A key that has no bucket counts as one whose bucket was full when the limiter was made, and has not been used since.
//! So a bucket can be forgotten when it is full, and nobody gains a token by that, also where limits change. A hand walks
//! the places of all buckets, as in Corbató's *clock* (*A Paging Experiment with the Multics System*, 1968), and forgets
//! each full bucket that it meets. The insertion of a bucket moves the hand by `SWEPT` places, or by up to `SEARCHED`
//! where the limiter has no room. While such searches find nothing they are as short as a sweep, so that a flood of keys
//! costs little. There is no timer.
//!
//! All buckets share their limits. A bucket is the hash of its key and one word (see [`crate::token_bucket`]).
//!
//! # Invariants
//!
//! * *A bucket is forgotten by one compare-and-swap of its word*, from a full level to `GONE`. An acquisition is a
//!   compare-and-swap of the same word. So no acquisition is lost with a bucket: it came before, and the bucket was
//!   not full; or it fails, and the caller looks up the key again.
//! * *A key has one bucket at a time.* A bucket that is gone is removed from the map before the key gets another one.
//! * *A bucket is inserted full*, and acquired from afterwards, as any other. So an acquisition is never older than its
//!   bucket.
//! * *Full* is judged a millisecond late, by which the clocks of two processors may disagree.
//! * `len` counts each bucket from before its insertion until after its removal. So there are never more than
//!   `max_keys`, those that are being inserted included.
//!
//! # Trade-offs
//!
//! Keys are compared by their hash alone: 63 bits, keyed at random. Two keys with the same hash share a bucket, which
//! happens once in a hundred thousand runs with ten million keys, and admits less, never more.
//!
//! The hand looks at places and not at times, so `max_keys` buckets that are not full make the limiter refuse new
//! keys, and a search that happens to meet none of the full ones refuses too. Buckets of keys that are no longer used
//! stay until other keys are.

use std::fmt;

use ahash::RandomState;
use papaya::{Guard, HashMap};

use crate::clock::Clock;
use crate::registry::IdHashing;
use crate::slots::Slots;
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::token_bucket::{
    BucketState, Change, GONE, Level, Limiter, Limits, LimitsError, MAX_PAST, Refused,
};

/// Places that each insertion examines: more than one, so that buckets are forgotten faster than made.
const SWEPT: u32 = 2;

/// Places that an insertion examines at most if there is no room: some microseconds among a million buckets.
const SEARCHED: u32 = if cfg!(loom) { 2 } else { 32 };

/// Look-ups of one acquisition. It looks up a key again only after another thread has made or forgotten a bucket of
/// this key meanwhile.
const ATTEMPTS: usize = if cfg!(loom) { 3 } else { 64 };

/// A key of one limiter. Made by [`KeyedLimiter::key`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key(u64);

/// Why no tokens were acquired for a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyedRefusal {
    /// The bucket of the key does not hold enough tokens.
    Refused(Refused),
    /// The key had no bucket, and there is no room for another one.
    LimiterFull,
}

impl From<Refused> for KeyedRefusal {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

struct Bucket {
    level: Level,
    /// Its place, where the hand finds its key.
    slot: u32,
}

/// What the insertions and removals of buckets write. On its own pair of cache lines (x86 fetches pairs): every
/// acquisition reads the fields beside it in the limiter.
#[repr(align(128))]
struct Places {
    /// The keys of all buckets.
    keys: Slots,
    hand: AtomicU32,
    /// Buckets, from before their insertion until after their removal.
    len: AtomicU64,
    /// Whether the last search for room found none.
    is_crowded: AtomicBool,
}

/// See the [module's documentation](self).
pub struct KeyedLimiter {
    limiter: Limiter,
    hashing: IdHashing,
    buckets: HashMap<u64, Bucket, IdHashing>,
    max_keys: u64,
    places: Places,
}

impl KeyedLimiter {
    /// The most keys that a limiter can have.
    pub const MAX_KEYS: u64 = 1 << 28;

    /// A limiter without buckets, for at most `max_keys` at one time, from 1 to [`Self::MAX_KEYS`]; `None` for no
    /// limits. Allocates at the first use.
    pub fn new(limits: Option<Limits>, max_keys: u64, clock: &impl Clock) -> Self {
        let hashing = IdHashing::new(RandomState::new());
        Self {
            limiter: Limiter::new(limits, clock),
            buckets: HashMap::with_hasher(hashing.clone()),
            hashing,
            max_keys: max_keys.clamp(1, Self::MAX_KEYS),
            places: Places {
                keys: Slots::new(),
                hand: AtomicU32::new(0),
                len: AtomicU64::new(0),
                is_crowded: AtomicBool::new(false),
            },
        }
    }

    /// The key of `bytes` of some `kind`. Keys are the same if and only if both are equal (but see *Trade-offs*).
    pub fn key(&self, kind: u8, bytes: &[u8]) -> Key {
        Key(self.hashing.hash(kind, bytes))
    }

    /// Acquires all of `tokens` or none for a key. Returns the number of tokens left; `None` where there are no
    /// limits. Amortised constant time.
    pub fn take(
        &self,
        key: Key,
        tokens: u64,
        clock: &impl Clock,
    ) -> Result<Option<u64>, KeyedRefusal> {
        if self.limiter.is_off() {
            return Ok(None);
        }
        let guard = self.buckets.guard();
        for _ in 0..ATTEMPTS {
            if let Some(bucket) = self.bucket(key.0, &guard) {
                match self
                    .limiter
                    .take_unless_marked(&bucket.level, clock, tokens)
                {
                    Some(taken) => return Ok(taken?),
                    None => {
                        self.remove_forgotten(key.0, &guard);
                        continue;
                    }
                }
            }
            // Makes no bucket for a request that a full one refuses, or for nothing.
            let left = self.limiter.take(&Level::full(), clock, tokens)?;
            if tokens == 0 || left.is_none() {
                return Ok(left);
            }
            if !self.reserve(clock, &guard) {
                return Err(KeyedRefusal::LimiterFull);
            }
            let slot = self.places.keys.insert(key.0);
            // A full bucket, from which the next turn acquires. Another bucket of this key may have come and gone since
            // this one was found missing; tokens that had been acquired before the insertion would be forgotten with it.
            let bucket = Bucket {
                level: Level::full(),
                slot,
            };
            self.publication();
            if self.buckets.try_insert(key.0, bucket, &guard).is_err() {
                self.release(slot);
            }
        }
        Err(KeyedRefusal::LimiterFull)
    }

    /// Gives back tokens that were acquired for a key and not used. The bucket holds no more than its capacity
    /// afterwards.
    pub fn refund(&self, key: Key, tokens: u64, clock: &impl Clock) {
        let guard = self.buckets.guard();
        if let Some(bucket) = self.bucket(key.0, &guard) {
            // A bucket that has been forgotten was full.
            let _: Option<()> = self.limiter.refund(&bucket.level, clock, tokens);
        }
    }

    /// The bucket of a key. Makes none.
    pub fn state(&self, key: Key, clock: &impl Clock) -> BucketState {
        let guard = self.buckets.guard();
        self.bucket(key.0, &guard)
            .and_then(|bucket| self.limiter.state(&bucket.level, clock))
            .or_else(|| self.limiter.state(&Level::full(), clock))
            .unwrap_or(BucketState::UNLIMITED)
    }

    /// The limits of all buckets; `None` if there are none.
    pub fn limits(&self) -> Option<Limits> {
        self.limiter.limits()
    }

    /// Changes the limits of all buckets; `None` for no limits. A change keeps what it does not name. Buckets keep
    /// their tokens, up to the new capacity. So does a key without a bucket: it was full before.
    pub fn change_limits(
        &self,
        change: Option<Change>,
        clock: &impl Clock,
    ) -> Result<(), LimitsError> {
        match change {
            Some(change) => self
                .limiter
                .change_limits(change, Limits::default(), clock, MAX_PAST),
            None => {
                self.limiter.set_limits(None, clock);
                Ok(())
            }
        }
    }

    /// Number of buckets.
    pub fn len(&self) -> u64 {
        // Those that look for room count too.
        self.places.len.load(Ordering::Relaxed).min(self.max_keys)
    }

    /// Whether there is no bucket.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The most buckets at one time.
    pub fn max_keys(&self) -> u64 {
        self.max_keys
    }

    fn bucket<'g>(&self, key: u64, guard: &'g impl Guard) -> Option<&'g Bucket> {
        self.buckets
            .get(&key, guard)
            .inspect(|_| self.publication())
    }

    /// The map publishes a bucket with its insertion, but by nothing that loom sees.
    fn publication(&self) {
        #[cfg(loom)]
        self.places.len.fetch_add(0, Ordering::AcqRel);
    }

    /// Makes room for one more bucket, which counts from now on; `false` if there is none.
    fn reserve(&self, clock: &impl Clock, guard: &impl Guard) -> bool {
        if self.places.len.fetch_add(1, Ordering::Relaxed) < self.max_keys {
            for _ in 0..SWEPT {
                self.examine_next(clock, guard);
            }
            return true;
        }
        let is_crowded = self.places.is_crowded.load(Ordering::Relaxed);
        let searched = if is_crowded { SWEPT } else { SEARCHED };
        let has_found = (0..searched).any(|_| {
            self.examine_next(clock, guard);
            self.places.len.load(Ordering::Relaxed) <= self.max_keys
        });
        if has_found == is_crowded {
            self.places.is_crowded.store(!has_found, Ordering::Relaxed);
        }
        if !has_found {
            self.places.len.fetch_sub(1, Ordering::Relaxed);
        }
        has_found
    }

    /// Moves the hand to the next place, and forgets the bucket there if it is full.
    fn examine_next(&self, clock: &impl Clock, guard: &impl Guard) {
        let mut place = self.places.hand.fetch_add(1, Ordering::Relaxed);
        if place >= self.places.keys.high_water() {
            // Threads that do this at the same time examine the first place twice.
            self.places.hand.store(1, Ordering::Relaxed);
            place = 0;
        }
        if let Some(key) = self.places.keys.get(place)
            && let Some(bucket) = self.bucket(key, guard)
            && self.limiter.forget_if_full(&bucket.level, clock)
        {
            self.remove_forgotten(key, guard);
        }
    }

    /// Removes the bucket of a key if it is gone. One of the threads that find it gone does.
    fn remove_forgotten(&self, key: u64, guard: &impl Guard) {
        let removed = self.buckets.remove_if(
            &key,
            |_, bucket| {
                self.publication();
                bucket.level.word().load(Ordering::Acquire) == GONE
            },
            guard,
        );
        if let Ok(Some((_, bucket))) = removed {
            self.release(bucket.slot);
        }
    }

    fn release(&self, slot: u32) {
        self.places.keys.remove(slot);
        self.places.len.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for KeyedLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyedLimiter")
            .field("limits", &self.limits())
            .field("len", &self.len())
            .field("max_keys", &self.max_keys)
            .finish_non_exhaustive()
    }
}
