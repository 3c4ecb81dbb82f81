//! What the receivers of one shard are charged with: the records of the processes that were sent something and have
//! not been seen empty since.
//!
//! # Structure
//!
//! A record is one word, `tag << 32 | charge`. The charge is the number of messages that its process has been sent
//! and has not yet been seen to receive. The tag is a keyed hash of the process's address, never 0; the tag of a
//! free record is 0. Records have stable indexes in segments that never move, as in [`crate::slots`]. A map leads
//! from an address to an index, so that all ids of one process share one record. A sender keeps the index beside
//! the id that it has looked up; the tag tells it when that index is stale.
//!
//! The words are dense, since senders touch nothing else. What samplers alone read (the address, and what the last
//! look has found) is in arrays of its own.
//!
//! # Invariants
//!
//! * Any thread may add to a charge. Only the thread that holds the shard's sampler subtracts from it, and no more
//!   than it has read before. So no word underflows.
//! * A charge may land in a record that has been freed, or given to another process, between a sender's load and
//!   its addition. It stays there: it is part of what the shard is charged with, and a look returns it
//!   ([`Receivers::scan`]). The sender charges the shard once more for the right record.
//! * A record is created by *adding* its tag to the word, and freed by a compare-and-swap from a charge that is known: 0, or
//!   one that is returned to the shard. So no charge is lost by either. The latter is done by the thread that holds the sampler:
//!   no record of a batch is freed between the look and its report without the report finding another tag.
//! * The address is stored before the tag is added, and determines the tag.
//! * The map's value is the index of a record whose tag has been added. If the tag is gone, the record was freed,
//!   and a thread that sees that removes the value. At worst a process has a second record for a while, which its
//!   samplers look at and free like any other.
//!
//! # Trade-offs
//!
//! A scan costs a word for each record that has existed at one time: in proportion to the processes that were
//! active, and not to those that are registered.

use std::fmt;
use std::sync::Arc;

use ahash::RandomState;
use once_cell::race::OnceBox;
use seize::Collector;

use crate::sync::{AtomicU32, AtomicU64, Ordering, zeroed_u32s, zeroed_u64s};

/// No index: what a sender keeps before it has one. Indexes are kept plus 1.
const NO_INDEX: u32 = 0;

/// The most that a record is charged with. Further messages are not counted: a process never has so many.
pub(crate) const MAX_CHARGE: u32 = 1 << 30;

/// What the last look has found, before the first look.
pub(crate) const NOT_SEEN: u32 = u32::MAX;

/// Attempts to charge a record that is concurrently freed.
const ATTEMPTS: usize = 4;

#[cfg(not(loom))]
const FIRST_SEGMENT: u32 = 64;
/// loom does not see `OnceBox`, so a model makes its only segment before it starts threads.
#[cfg(loom)]
const FIRST_SEGMENT: u32 = 4;

/// Enough to double [`FIRST_SEGMENT`] up to 2^29 records, twice as many as there are entries.
#[cfg(not(loom))]
const SEGMENTS: usize = 23;
#[cfg(loom)]
const SEGMENTS: usize = 1;

type Segments<T> = [OnceBox<Box<[T]>>; SEGMENTS];

/// Where a message goes, and the record of that process as far as it is known.
#[derive(Debug)]
pub(crate) struct Known<'a> {
    pub(crate) address: u64,
    /// The record's index plus 1, kept beside the id; [`NO_INDEX`] without one.
    pub(crate) kept: &'a AtomicU32,
    tag: u32,
    /// The index in `kept`, if the record had the tag.
    pub(crate) index: Option<u32>,
    /// The charge of the record.
    pub(crate) charge: u32,
}

/// Where a message was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Charged {
    /// In a record, whose charge is now `charge`.
    Record { index: u32, charge: u32 },
    /// In none: it was freed again and again.
    Stray,
}

/// A record as a scan finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) index: u32,
    pub(crate) charge: u32,
    /// What the last look has found; [`NOT_SEEN`] before the first one.
    pub(crate) seen: u32,
    pub(crate) address: u64,
}

/// See the module's documentation.
pub(crate) struct Receivers {
    keys: (u64, u64),
    words: Segments<AtomicU64>,
    /// `generation << 32 | index + 1` of the first free record; a low half of 0 means none.
    free: AtomicU64,
    /// Number of indexes ever handed out.
    len: AtomicU32,
    /// Number of records that have a tag.
    live: AtomicU32,
    addresses: Segments<AtomicU64>,
    /// What the last look has found.
    seen: Segments<AtomicU32>,
    /// Of a free record, the next free one plus 1.
    links: Segments<AtomicU32>,
    index: Index,
}

impl Receivers {
    pub(crate) fn new(collector: &Arc<Collector>) -> Self {
        let hashing = RandomState::new();
        Self {
            keys: (hashing.hash_one(1), hashing.hash_one(2) | 1),
            words: std::array::from_fn(|_| OnceBox::new()),
            free: AtomicU64::new(0),
            len: AtomicU32::new(0),
            live: AtomicU32::new(0),
            addresses: std::array::from_fn(|_| OnceBox::new()),
            seen: std::array::from_fn(|_| OnceBox::new()),
            links: std::array::from_fn(|_| OnceBox::new()),
            index: Index::new(collector, hashing),
        }
    }

    /// Keyed, so that no client can make two processes share a tag on purpose.
    #[inline]
    fn tag(&self, address: u64) -> u32 {
        let product = u128::from(address ^ self.keys.0) * u128::from(self.keys.1);
        let tag = ((product >> 64) ^ product) as u32;
        tag.max(1)
    }

    /// What is known of the record of `address`. Loads its word, so that a cache miss is in flight while other
    /// layers are checked.
    #[inline]
    pub(crate) fn know<'a>(&self, address: u64, kept: &'a AtomicU32) -> Known<'a> {
        let tag = self.tag(address);
        let mut known = Known {
            address,
            kept,
            tag,
            index: None,
            charge: 0,
        };
        let index = kept.load(Ordering::Relaxed);
        if index != NO_INDEX
            && let Some(word) = self.word(index - 1)
        {
            // Acquire: a thread that reads the record's tag sees what was stored before it was added.
            let word = word.load(Ordering::Acquire);
            if tag_of(word) == tag {
                known.index = Some(index - 1);
                known.charge = charge_of(word);
            }
        }
        known
    }

    /// The charge of a record that another id of the process may have made.
    #[cold]
    pub(crate) fn know_by_address(&self, known: &mut Known<'_>) {
        if let Some(index) = self.index.get(known.address)
            && let Some(word) = self.word(index)
        {
            let word = word.load(Ordering::Acquire);
            if tag_of(word) == known.tag {
                known.kept.store(index + 1, Ordering::Relaxed);
                known.index = Some(index);
                known.charge = charge_of(word);
            }
        }
    }

    /// Charges the process with a message, which the shard has been charged with already. `misplaced` charges the
    /// shard once more. Lock-free except for the map, and retried a few times at most.
    #[inline]
    pub(crate) fn charge(&self, known: &Known<'_>, mut misplaced: impl FnMut()) -> Charged {
        if let Some(index) = known.index
            && let Some(word) = self.word(index)
        {
            let before = word.fetch_add(1, Ordering::AcqRel);
            if tag_of(before) == known.tag {
                return Charged::Record {
                    index,
                    charge: charge_of(before) + 1,
                };
            }
            misplaced();
        }
        self.charge_slowly(known, misplaced)
    }

    #[cold]
    fn charge_slowly(&self, known: &Known<'_>, mut misplaced: impl FnMut()) -> Charged {
        for _ in 0..ATTEMPTS {
            let index = self.find_or_make(known.address, known.tag);
            let Some(word) = self.word(index) else {
                break;
            };
            if tag_of(word.load(Ordering::Acquire)) == known.tag {
                let before = word.fetch_add(1, Ordering::AcqRel);
                if tag_of(before) == known.tag {
                    known.kept.store(index + 1, Ordering::Relaxed);
                    return Charged::Record {
                        index,
                        charge: charge_of(before) + 1,
                    };
                }
                misplaced();
            }
            // It was freed; its sampler may not have removed it from the map yet.
            self.index.remove(known.address, index);
        }
        Charged::Stray
    }

    /// Charges the process at `address` with `charge` more messages, up to the maximum of its record. The shard has
    /// been charged with `charge`. Returns what was added to the record.
    pub(crate) fn charge_many(&self, address: u64, charge: u32) -> u32 {
        let tag = self.tag(address);
        for _ in 0..ATTEMPTS * 4 {
            let index = self.find_or_make(address, tag);
            let Some(word) = self.word(index) else {
                break;
            };
            let before = word.load(Ordering::Acquire);
            if tag_of(before) != tag {
                self.index.remove(address, index);
                continue;
            }
            let added = charge.min(MAX_CHARGE.saturating_sub(charge_of(before)));
            let after = before + u64::from(added);
            if word
                .compare_exchange(before, after, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                return added;
            }
        }
        0
    }

    fn find_or_make(&self, address: u64, tag: u32) -> u32 {
        if let Some(index) = self.index.get(address) {
            return index;
        }
        let index = self
            .pop_free()
            .unwrap_or_else(|| self.len.fetch_add(1, Ordering::Relaxed));
        init(&self.addresses, index, zeroed_u64s).store(address, Ordering::Relaxed);
        init(&self.seen, index, zeroed_u32s).store(NOT_SEEN, Ordering::Relaxed);
        self.live.fetch_add(1, Ordering::Relaxed);
        init(&self.words, index, zeroed_u64s).fetch_add(u64::from(tag) << 32, Ordering::AcqRel);
        match self.index.insert(address, index) {
            Ok(()) => index,
            Err(other) => {
                // Lost to a concurrent insert. If another thread charges our record already (by an index from an
                // earlier life of it), its sampler frees it.
                self.free_if_empty(index, tag);
                other
            }
        }
    }

    // ---- For the thread that holds the sampler ----

    /// The next record from `index` up to `end` that has a tag and is `wanted`. Charges in free records are passed
    /// to `returned`.
    pub(crate) fn scan(
        &self,
        index: u32,
        end: u32,
        mut wanted: impl FnMut(u32, u32) -> bool,
        mut returned: impl FnMut(u32),
    ) -> Option<Found> {
        (index..end).find_map(|index| {
            let word = self.word(index)?;
            let value = word.load(Ordering::Acquire);
            let (tag, charge) = (tag_of(value), charge_of(value));
            if tag == 0 {
                if charge > 0
                    && word
                        .compare_exchange(value, 0, Ordering::AcqRel, Ordering::Relaxed)
                        .is_ok()
                {
                    returned(charge);
                }
                return None;
            }
            let seen = get(&self.seen, index)?.load(Ordering::Relaxed);
            if !wanted(charge, seen) {
                return None;
            }
            self.found(index, tag, charge, seen)
        })
    }

    /// The record at `index`, unless it is free.
    pub(crate) fn get(&self, index: u32) -> Option<Found> {
        let value = self.word(index)?.load(Ordering::Acquire);
        let seen = get(&self.seen, index)?.load(Ordering::Relaxed);
        self.found(index, tag_of(value), charge_of(value), seen)
    }

    fn found(&self, index: u32, tag: u32, charge: u32, seen: u32) -> Option<Found> {
        let address = get(&self.addresses, index)?.load(Ordering::Relaxed);
        // Otherwise it was freed and created anew between the two loads.
        (tag != 0 && self.tag(address) == tag).then_some(Found {
            index,
            charge,
            seen,
            address,
        })
    }

    /// A look at the record's process has found `queued` messages, after its charge was read as `charge`.
    /// `returned` gets what the record gives back to the shard, after the record has given it. `charged` gets what
    /// the shard is charged with in addition, before the record is.
    ///
    /// A record that was found empty, and then without a charge and empty again, is freed: every thread that had
    /// charged it has sent its message between the two looks.
    pub(crate) fn look(
        &self,
        record: &Found,
        queued: u32,
        returned: impl FnOnce(u32),
        charged: impl FnOnce(u32),
    ) {
        let index = record.index;
        let (Some(word), Some(seen)) = (self.word(index), get(&self.seen, index)) else {
            return;
        };
        // Freed by `take_all` since, and maybe given to another process.
        if tag_of(word.load(Ordering::Acquire)) != self.tag(record.address) {
            return;
        }
        let queued = queued.min(MAX_CHARGE);
        seen.store(queued, Ordering::Relaxed);
        if queued < record.charge {
            let taken = record.charge - queued;
            word.fetch_sub(u64::from(taken), Ordering::AcqRel);
            returned(taken);
        } else if queued > record.charge {
            let room = MAX_CHARGE.saturating_sub(charge_of(word.load(Ordering::Relaxed)));
            let more = (queued - record.charge).min(room);
            charged(more);
            word.fetch_add(u64::from(more), Ordering::AcqRel);
        } else if queued == 0
            && record.seen == 0
            && self.free_if_empty(index, self.tag(record.address))
        {
            self.index.remove(record.address, index);
        }
    }

    /// Returns at most `charge` of what the process at `address` is charged with, and the record.
    pub(crate) fn take_back(&self, address: u64, charge: u32) -> Option<(u32, u32)> {
        let index = self.index.get(address)?;
        let word = self.word(index)?;
        let before = word.load(Ordering::Acquire);
        if tag_of(before) != self.tag(address) {
            return None;
        }
        let taken = charge.min(charge_of(before));
        word.fetch_sub(u64::from(taken), Ordering::AcqRel);
        Some((index, taken))
    }

    /// Frees the record of the process at `address`. Returns its index, and its charge, which the shard is credited with.
    /// `None` if there is none, or messages are charged to it all the time.
    pub(crate) fn take_all(&self, address: u64) -> Option<(u32, u32)> {
        let index = self.index.get(address)?;
        let word = self.word(index)?;
        for _ in 0..ATTEMPTS {
            let before = word.load(Ordering::Acquire);
            if tag_of(before) != self.tag(address) {
                return None;
            }
            if word
                .compare_exchange(before, 0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                self.freed(index);
                self.index.remove(address, index);
                return Some((index, charge_of(before)));
            }
        }
        None
    }

    /// Number of indexes that a scan visits: the most records there have been at one time.
    pub(crate) fn high_water(&self) -> u32 {
        self.len.load(Ordering::Acquire)
    }

    /// Number of records.
    pub(crate) fn live(&self) -> u32 {
        self.live.load(Ordering::Relaxed)
    }

    // ---- Records ----

    fn free_if_empty(&self, index: u32, tag: u32) -> bool {
        let is_freed = self.word(index).is_some_and(|word| {
            let empty = u64::from(tag) << 32;
            word.compare_exchange(empty, 0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        if is_freed {
            self.freed(index);
        }
        is_freed
    }

    fn freed(&self, index: u32) {
        self.live.fetch_sub(1, Ordering::Relaxed);
        self.push_free(index);
    }

    fn push_free(&self, index: u32) {
        let link = init(&self.links, index, zeroed_u32s);
        let mut head = self.free.load(Ordering::Acquire);
        loop {
            link.store(head as u32, Ordering::Release);
            let new = next_generation(head) | (u64::from(index) + 1);
            match self
                .free
                .compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return,
                Err(changed) => head = changed,
            }
        }
    }

    fn pop_free(&self) -> Option<u32> {
        let mut head = self.free.load(Ordering::Acquire);
        loop {
            let index = (head as u32).checked_sub(1)?;
            // Meaningless if another thread has popped it meanwhile. Then the generation has changed and the
            // compare-and-swap fails.
            let next = get(&self.links, index)?.load(Ordering::Acquire);
            match self.free.compare_exchange_weak(
                head,
                next_generation(head) | u64::from(next),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(index),
                Err(changed) => head = changed,
            }
        }
    }

    #[inline]
    fn word(&self, index: u32) -> Option<&AtomicU64> {
        get(&self.words, index)
    }
}

impl fmt::Debug for Receivers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receivers")
            .field("live", &self.live())
            .field("high_water", &self.high_water())
            .finish_non_exhaustive()
    }
}

#[inline]
fn tag_of(word: u64) -> u32 {
    (word >> 32) as u32
}

#[inline]
fn charge_of(word: u64) -> u32 {
    word as u32
}

fn next_generation(head: u64) -> u64 {
    ((head >> 32) + 1) << 32
}

/// Segment `k` starts at `FIRST_SEGMENT * (2^k - 1)`.
#[inline]
fn place(index: u32) -> (usize, usize) {
    let shifted = index + FIRST_SEGMENT;
    let segment = shifted.ilog2() - FIRST_SEGMENT.ilog2();
    (
        segment as usize,
        (shifted - (FIRST_SEGMENT << segment)) as usize,
    )
}

#[inline]
fn get<T>(segments: &Segments<T>, index: u32) -> Option<&T> {
    let (segment, offset) = place(index);
    segments.get(segment)?.get()?.get(offset)
}

fn init<T>(segments: &Segments<T>, index: u32, zeroed: impl FnOnce(usize) -> Box<[T]>) -> &T {
    let (segment, offset) = place(index);
    let place =
        segments[segment].get_or_init(|| Box::new(zeroed((FIRST_SEGMENT as usize) << segment)));
    &place[offset]
}

// ---- Address to index ----

#[cfg(not(loom))]
struct Index(papaya::HashMap<u64, u32, RandomState>);

#[cfg(not(loom))]
impl Index {
    fn new(collector: &Arc<Collector>, hashing: RandomState) -> Self {
        let map = papaya::HashMap::builder()
            .shared_collector(Arc::clone(collector))
            .hasher(hashing)
            .build();
        Self(map)
    }

    fn get(&self, address: u64) -> Option<u32> {
        self.0.get(&address, &self.0.guard()).copied()
    }

    fn insert(&self, address: u64, index: u32) -> Result<(), u32> {
        let guard = self.0.guard();
        let inserted = self.0.try_insert(address, index, &guard);
        inserted.map(|_| ()).map_err(|occupied| *occupied.current)
    }

    fn remove(&self, address: u64, index: u32) {
        let guard = self.0.guard();
        let _ = self
            .0
            .remove_if(&address, |_, value| *value == index, &guard);
    }
}

/// In loom's models alone, in place of papaya, whose atomics loom does not see. A lock is as linearizable.
/// `loom::sync` exists under `cfg(loom)` only, so no released library can contain it.
#[cfg(loom)]
struct Index(loom::sync::Mutex<std::collections::HashMap<u64, u32>>);

#[cfg(loom)]
impl Index {
    fn new(_collector: &Arc<Collector>, _hashing: RandomState) -> Self {
        Self(loom::sync::Mutex::new(std::collections::HashMap::new()))
    }

    fn get(&self, address: u64) -> Option<u32> {
        self.0.lock().unwrap().get(&address).copied()
    }

    fn insert(&self, address: u64, index: u32) -> Result<(), u32> {
        match *self.0.lock().unwrap().entry(address).or_insert(index) {
            is if is == index => Ok(()),
            other => Err(other),
        }
    }

    fn remove(&self, address: u64, index: u32) {
        let mut map = self.0.lock().unwrap();
        if map.get(&address) == Some(&index) {
            map.remove(&address);
        }
    }
}
