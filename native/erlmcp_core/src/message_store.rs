//! A bounded FIFO of messages for one consumer, outside of its heap.
//!
//! Any number of producers push; one consumer drains. The queue is crossbeam's `SegQueue`; one word beside it bounds
//! it, and says who wakes whom.
//!
//! # The word
//!
//! It holds the number of messages and their bytes, and three flags: `ARMED`, `LEAVING` and `CLOSED`. A push first reserves its
//! place in the word, then adds the message to the queue. A drain removes messages from the queue, then gives their
//! places back. So the word is never less than what the queue holds, and neither bound is ever exceeded.
//!
//! # No wake-up is lost
//!
//! A drain that finds the queue empty sets `ARMED` and looks once more. A push clears `ARMED` after it has added its
//! message, and if the flag was set, its caller wakes the consumer. Both are updates of one word, so one comes first.
//! If it is the push, the second look of the drain happens after it and finds the message. If it is the drain, the push
//! finds the flag. A push that comes between the flag and the second look wakes the consumer for a message that it is
//! about to find: a wake-up may be superfluous, never missing.
//!
//! # Nothing is left in a closed store
//!
//! [`MessageStore::close`] sets `CLOSED`, and then [`MessageStore::empty`] empties the queue. A push that had reserved
//! its place before adds its message, and then updates the word. If that update comes before `CLOSED`, the message is
//! in the queue that is emptied. Otherwise the push finds `CLOSED`, and removes one message itself, if there is one. Each
//! late push removes one, so none stays.
//!
//! # Leaving in order
//!
//! After [`MessageStore::leave`] the store is closed as soon as it holds nothing: by the compare-and-swap of a word that
//! counts no message, which a push that has reserved its place makes fail. So a sender whose push is refused as `Closed` knows
//! that the consumer has drained all that it has pushed before, and may send to the consumer in another way.
//!
//! # Waits
//!
//! A place is reserved by compare-and-swap. It is retried only after another push or drain has succeeded, and after
//! 1,000 times the push is refused as if the store were full. `SegQueue` itself waits for a push that the
//! operating system has suspended between two of its instructions.

use std::fmt;
use std::ops::ControlFlow;

use crate::sync::{AtomicU64, Ordering, SegQueue};

const CLOSED: u64 = 1 << 63;
const ARMED: u64 = 1 << 62;
const LEAVING: u64 = 1 << 61;
const LEN_SHIFT: u32 = 41;
const ONE: u64 = 1 << LEN_SHIFT;
const BYTES: u64 = ONE - 1;
const LEN: u64 = LEAVING - ONE;

/// How often a reservation is tried.
const ATTEMPTS: usize = 1_000;

/// A message of a store.
pub trait Bytes {
    /// The bytes that it counts, always the same.
    fn bytes(&self) -> u64;
}

/// See the module's documentation.
pub struct MessageStore<T> {
    word: AtomicU64,
    queue: SegQueue<T>,
    capacity: AtomicU64,
    max_bytes: AtomicU64,
}

/// What a store holds at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Messages, from 1 to [`Bounds::MAX_CAPACITY`].
    pub capacity: u64,
    /// Bytes of all messages together, from 1 to [`Bounds::MAX_BYTES`].
    pub max_bytes: u64,
}

impl Bounds {
    /// The highest capacity.
    pub const MAX_CAPACITY: u64 = 1_000_000;
    /// The highest number of bytes.
    pub const MAX_BYTES: u64 = u32::MAX as u64;

    /// Whether both bounds are in their range.
    pub fn are_valid(&self) -> bool {
        (1..=Self::MAX_CAPACITY).contains(&self.capacity)
            && (1..=Self::MAX_BYTES).contains(&self.max_bytes)
    }
}

const _: () = assert!(Bounds::MAX_CAPACITY <= LEN >> LEN_SHIFT && Bounds::MAX_BYTES <= BYTES);

/// Why a message is not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PushError {
    /// The store has no room for it now. Or 1,000 other pushes and drains have succeeded while it tried.
    Full,
    /// It has more bytes than the store may ever hold.
    TooLarge,
    /// The store has been closed.
    Closed,
}

impl<T: Bytes> MessageStore<T> {
    /// An empty store; `None` if the bounds are not valid. Its first message wakes the consumer.
    pub fn new(bounds: Bounds) -> Option<Self> {
        bounds.are_valid().then(|| Self {
            word: AtomicU64::new(ARMED),
            queue: SegQueue::new(),
            capacity: AtomicU64::new(bounds.capacity),
            max_bytes: AtomicU64::new(bounds.max_bytes),
        })
    }

    /// What the store holds at most.
    pub fn bounds(&self) -> Bounds {
        Bounds {
            capacity: self.capacity.load(Ordering::Relaxed),
            max_bytes: self.max_bytes.load(Ordering::Relaxed),
        }
    }

    /// Changes the bounds, of pushes that begin from now on. The store may hold more already. Bounds that are not valid change
    /// nothing.
    pub fn set_bounds(&self, bounds: Bounds) {
        if bounds.are_valid() {
            self.capacity.store(bounds.capacity, Ordering::Relaxed);
            self.max_bytes.store(bounds.max_bytes, Ordering::Relaxed);
        }
    }

    /// The number of messages, and of their bytes. Those of a push or a drain that has not returned may be counted.
    pub fn size(&self) -> (u64, u64) {
        let word = self.word.load(Ordering::Acquire);
        ((word & LEN) >> LEN_SHIFT, word & BYTES)
    }

    /// Whether the store has been closed.
    pub fn is_closed(&self) -> bool {
        self.word.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Whether a message of so many bytes has room now.
    pub fn check(&self, bytes: u64) -> Result<(), PushError> {
        self.check_word(self.word.load(Ordering::Acquire), bytes)
    }

    fn check_word(&self, word: u64, bytes: u64) -> Result<(), PushError> {
        let Bounds {
            capacity,
            max_bytes,
        } = self.bounds();
        if word & CLOSED != 0 {
            return Err(PushError::Closed);
        }
        if bytes > max_bytes {
            return Err(PushError::TooLarge);
        }
        let has_room = (word & LEN) >> LEN_SHIFT < capacity && word & BYTES <= max_bytes - bytes;
        has_room.then_some(()).ok_or(PushError::Full)
    }

    /// Adds a message. Returns whether the caller has to wake the consumer. A message that comes while the store is being
    /// closed, because its consumer has exited, may be freed although it was accepted.
    pub fn push(&self, message: T) -> Result<bool, PushError> {
        self.reserve(message.bytes())?;
        self.queue.push(message);
        let word = self.word.fetch_and(!ARMED, Ordering::AcqRel);
        if word & CLOSED != 0 {
            let mut is_late = false;
            self.drain(1, |_| {
                is_late = true;
                ControlFlow::Break(())
            });
            // Otherwise the consumer has drained this message, or it was freed with the others.
            if is_late {
                return Err(PushError::Closed);
            }
        }
        Ok(word & ARMED != 0)
    }

    fn reserve(&self, bytes: u64) -> Result<(), PushError> {
        let mut word = self.word.load(Ordering::Acquire);
        for _ in 0..ATTEMPTS {
            self.check_word(word, bytes)?;
            match self.word.compare_exchange_weak(
                word,
                word + ONE + bytes,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Ok(()),
                Err(current) => word = current,
            }
        }
        Err(PushError::Full)
    }

    /// Passes up to `max` messages to `take`, oldest first, until it breaks. Returns whether the store was found empty:
    /// then the next push wakes the consumer. Otherwise the consumer has to drain again.
    pub fn drain(&self, max: usize, mut take: impl FnMut(T) -> ControlFlow<()>) -> bool {
        let (mut places, mut taken) = (0, 0);
        let mut is_armed = false;
        let is_empty = loop {
            if taken == max {
                break false;
            }
            match self.queue.pop() {
                None if is_armed => break true,
                None => {
                    self.word.fetch_or(ARMED, Ordering::AcqRel);
                    is_armed = true;
                }
                Some(message) => {
                    if is_armed {
                        // Not empty after all. A push that has cleared the flag wakes the consumer once too often.
                        self.word.fetch_and(!ARMED, Ordering::AcqRel);
                        is_armed = false;
                    }
                    taken += 1;
                    places += ONE + message.bytes();
                    if take(message).is_break() {
                        break false;
                    }
                }
            }
        };
        if taken > 0 {
            self.word.fetch_sub(places, Ordering::AcqRel);
        }
        if is_empty {
            self.close_if_left();
        }
        is_empty
    }

    /// Closes the store as soon as it holds nothing: now, or when the consumer finds it empty. Only for the consumer.
    pub fn leave(&self) {
        self.word.fetch_or(LEAVING, Ordering::AcqRel);
        self.close_if_left();
    }

    /// Keeps the store open after all. `false` if it has been closed. Only for the consumer.
    pub fn stay(&self) -> bool {
        self.word.fetch_and(!LEAVING, Ordering::AcqRel) & CLOSED == 0
    }

    fn close_if_left(&self) {
        let mut word = self.word.load(Ordering::Acquire);
        // Ends with the first push that has reserved its place: it stays there until the consumer drains.
        while word & LEAVING != 0 && word & (LEN | CLOSED) == 0 {
            match self.word.compare_exchange_weak(
                word,
                word | CLOSED,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return,
                Err(current) => word = current,
            }
        }
    }

    /// Refuses all pushes from now on. To be followed by [`Self::empty`].
    pub fn close(&self) {
        self.word.fetch_or(CLOSED, Ordering::AcqRel);
    }

    /// Frees all messages. Costs in proportion to them.
    pub fn empty(&self) {
        self.drain(usize::MAX, |_| ControlFlow::Continue(()));
    }
}

impl<T: Bytes> fmt::Debug for MessageStore<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (len, bytes) = self.size();
        f.debug_struct("MessageStore")
            .field("len", &len)
            .field("bytes", &bytes)
            .field("bounds", &self.bounds())
            .field("is_closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}
