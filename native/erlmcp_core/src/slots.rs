//! A growable array of words with stable indexes: the index behind "all entries of one shard" and
//! "all transports of one server".
//!
//! A hash map finds one entry quickly, but lists a part of its entries only by walking all. A [`Slots`] holds one
//! word for each member of such a part, so that a walk costs in proportion to the most members at one time.
//!
//! Segments of doubling size that never move, as in Dechev, Pirkelbauer and Stroustrup,
//! *Lock-free dynamically resizable arrays* (2006). Free indexes are kept in a Treiber stack
//! (1986) threaded through the free words themselves; its head carries a generation that every
//! change increments, which is IBM's remedy against ABA (System/370 Principles of Operation).
//!
//! # Consistency
//!
//! `insert`, `remove` and `get` are linearizable for one index. A walk is weakly consistent: a
//! word that is there throughout is seen exactly once. A word may be seen by a walk before what it
//! refers to exists and after it is gone; the reader must check what it finds.
//!
//! # Trade-offs
//!
//! A member costs 8 bytes and no allocation of its own. In return a walk passes over the holes that removed members
//! left. Memory is kept until the structure is dropped.

use std::fmt;
use std::ops::Range;

use once_cell::race::OnceBox;

use crate::sync::{AtomicU32, AtomicU64, Ordering, zeroed_u64s};

/// The bit that distinguishes an occupied word from a free one. It lies between the bits that `papaya` uses for the
/// position (low) and for its metadata (the top seven). So a hash may always have it set without losing what a
/// table of fewer than 2^48 places needs.
pub const OCCUPIED: u64 = 1 << 48;

#[cfg(not(loom))]
const FIRST_SEGMENT: u32 = 8;
/// loom does not see `OnceBox`, so a model makes its only segment before it starts threads.
#[cfg(loom)]
const FIRST_SEGMENT: u32 = 4;

/// Enough to double [`FIRST_SEGMENT`] up to 2^31 words.
#[cfg(not(loom))]
const SEGMENTS: usize = 28;
#[cfg(loom)]
const SEGMENTS: usize = 1;

/// See the module's documentation.
///
/// A free word holds the index + 1 of the next free one, or 0.
pub struct Slots {
    /// `generation << 32 | index + 1` of the first free word; a low half of 0 means none.
    free: AtomicU64,
    /// Number of indexes ever handed out.
    len: AtomicU32,
    segments: [OnceBox<Box<[AtomicU64]>>; SEGMENTS],
}

impl Slots {
    /// An empty array. Allocates nothing.
    pub fn new() -> Self {
        Self {
            free: AtomicU64::new(0),
            len: AtomicU32::new(0),
            segments: std::array::from_fn(|_| OnceBox::new()),
        }
    }

    /// Stores `word`, which must have [`OCCUPIED`] set, and returns its index. Lock-free.
    pub fn insert(&self, word: u64) -> u32 {
        debug_assert!(word & OCCUPIED != 0);
        let index = self
            .pop_free()
            .unwrap_or_else(|| self.len.fetch_add(1, Ordering::Relaxed));
        self.word_or_init(index).store(word, Ordering::Release);
        index
    }

    /// Frees `index`, and returns its word. Only the owner of the index may call this, once. Lock-free.
    pub fn remove(&self, index: u32) -> u64 {
        let word = self.word_or_init(index);
        let held = word.load(Ordering::Relaxed);
        let mut head = self.free.load(Ordering::Acquire);
        loop {
            // The word is ours until the compare-and-swap below succeeds. Without OCCUPIED it is invisible to walks
            // from here on.
            word.store(head & 0xffff_ffff, Ordering::Release);
            let new = next_generation(head) | (u64::from(index) + 1);
            match self
                .free
                .compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return held,
                Err(changed) => head = changed,
            }
        }
    }

    /// The word at `index`, if it is occupied.
    pub fn get(&self, index: u32) -> Option<u64> {
        let word = self.word(index)?.load(Ordering::Acquire);
        (word & OCCUPIED != 0).then_some(word)
    }

    /// Number of indexes that a walk visits: the most words at one time.
    pub fn high_water(&self) -> u32 {
        self.len.load(Ordering::Acquire)
    }

    /// The occupied words with their indexes.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.within(0..self.high_water())
    }

    /// The occupied words at `indexes`, with their indexes.
    pub fn within(&self, indexes: Range<u32>) -> impl Iterator<Item = (u32, u64)> + '_ {
        indexes.filter_map(|index| Some((index, self.get(index)?)))
    }

    fn pop_free(&self) -> Option<u32> {
        let mut head = self.free.load(Ordering::Acquire);
        loop {
            let index = (head as u32).checked_sub(1)?;
            // Another thread may have popped this index and stored a word in it, or may be about to push it again.
            // Then the value read here is meaningless, but the generation has changed and the compare-and-swap
            // fails.
            let next = self.word_or_init(index).load(Ordering::Acquire) & 0xffff_ffff;
            match self.free.compare_exchange_weak(
                head,
                next_generation(head) | next,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(index),
                Err(changed) => head = changed,
            }
        }
    }

    fn word(&self, index: u32) -> Option<&AtomicU64> {
        let (segment, offset) = place(index);
        self.segments[segment].get().map(|words| &words[offset])
    }

    fn word_or_init(&self, index: u32) -> &AtomicU64 {
        let (segment, offset) = place(index);
        let words = self.segments[segment]
            .get_or_init(|| Box::new(zeroed_u64s((FIRST_SEGMENT as usize) << segment)));
        &words[offset]
    }
}

impl Default for Slots {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots")
            .field("high_water", &self.high_water())
            .finish_non_exhaustive()
    }
}

/// Segment `k` starts at `FIRST_SEGMENT * (2^k - 1)`.
fn place(index: u32) -> (usize, usize) {
    let shifted = index + FIRST_SEGMENT;
    let segment = shifted.ilog2() - FIRST_SEGMENT.ilog2();
    (
        segment as usize,
        (shifted - (FIRST_SEGMENT << segment)) as usize,
    )
}

fn next_generation(head: u64) -> u64 {
    ((head >> 32) + 1) << 32
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn places_follow_each_other() {
        let mut expected = (0, 0);
        for index in 0..if cfg!(miri) { 500 } else { 100_000 } {
            assert_eq!(place(index), expected, "index {index}");
            expected.1 += 1;
            if expected.1 == (FIRST_SEGMENT as usize) << expected.0 {
                expected = (expected.0 + 1, 0);
            }
        }
    }

    #[test]
    fn freed_indexes_are_used_again() {
        let slots = Slots::new();
        let indexes: Vec<u32> = (0..20).map(|n| slots.insert(OCCUPIED | n)).collect();
        for index in &indexes[5..15] {
            slots.remove(*index);
        }
        for n in 100..110 {
            slots.insert(OCCUPIED | n);
        }
        assert_eq!(slots.high_water(), 20);
        let mut words: Vec<u64> = slots.iter().map(|(_, word)| word & !OCCUPIED).collect();
        words.sort_unstable();
        let expected: Vec<u64> = (0..5).chain(15..20).chain(100..110).collect();
        assert_eq!(words, expected);
    }

    #[test]
    fn an_index_never_handed_out_is_empty() {
        assert_eq!(Slots::new().get(1_000_000), None);
    }
}
