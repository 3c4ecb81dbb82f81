//! A bounded queue whose places are numbered before their values exist.
//!
//! A producer first acquires a [`Ticket`], then makes a change elsewhere, and then publishes a value with the ticket or
//! drops it. The reader gets the values in the order of the tickets, and waits for a ticket that is still held. So values
//! are in an order that producers know before their changes are visible to others.
//!
//! # Algorithm
//!
//! A ring of places, as in Vyukov's bounded queue (2010), in which the acquisition of a place and the publication of its
//! value are two operations. `in_use` counts tickets from before their acquisition until the reader has passed them, so
//! a ticket's place is free. Nobody waits for anybody: without room there is no ticket, and the producer counts a loss
//! ([`Sequence::lose`]).
//!
//! # Losses
//!
//! A loss is reported behind all values whose tickets were acquired before it.
//!
//! # Wake-up
//!
//! A reader that finds nothing to read sets `is_armed` and looks again. A producer publishes, and then clears
//! `is_armed`; if it was set, the reader has to be woken, by whoever asks [`Sequence::take_wake`] next. Both sides swap
//! one word, so one of them comes first: either the producer finds the word set, or the reader acquires what was
//! published.
//!
//! # Trade-offs
//!
//! A thread that is suspended while it holds a ticket delays all values behind it.

use std::fmt;
use std::mem;
use std::ops::ControlFlow;

use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering};

struct Place<T> {
    /// The number of the ticket whose value is here, plus one.
    stamp: AtomicU64,
    /// Never contended: it belongs to the holder of the ticket, and then to the reader.
    value: Mutex<Option<T>>,
}

#[derive(Default)]
struct Reader {
    /// The number of the next ticket.
    position: u64,
    /// Losses to report when the reader has come to the ticket `reported_at`.
    lost: u64,
    reported_at: u64,
}

/// What [`Sequence::read`] has found, besides values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The number of the next ticket: all before it have been read.
    pub position: u64,
    /// Values that were lost, all behind those read so far.
    pub lost: u64,
    /// Whether to read again at once. Otherwise a producer wakes the reader.
    pub has_more: bool,
}

/// See the [module's documentation](self).
pub struct Sequence<T> {
    places: Box<[Place<T>]>,
    in_use: AtomicU64,
    next: AtomicU64,
    lost: AtomicU64,
    is_armed: AtomicBool,
    is_due: AtomicBool,
    reader: Mutex<Reader>,
}

impl<T> Sequence<T> {
    /// An empty sequence for at most `capacity` tickets that have not been read.
    pub fn new(capacity: usize) -> Self {
        Self {
            places: (0..capacity)
                .map(|_| Place {
                    stamp: AtomicU64::new(0),
                    value: Mutex::new(None),
                })
                .collect(),
            in_use: AtomicU64::new(0),
            next: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            is_armed: AtomicBool::new(false),
            is_due: AtomicBool::new(false),
            reader: Mutex::new(Reader::default()),
        }
    }

    /// The next ticket; `None` if there is no room. Wait-free.
    pub fn ticket(&self) -> Option<Ticket<'_, T>> {
        if self.in_use.fetch_add(1, Ordering::AcqRel) >= self.places.len() as u64 {
            self.in_use.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        Some(Ticket {
            sequence: self,
            number: self.next.fetch_add(1, Ordering::AcqRel),
        })
    }

    /// Counts a value that has no ticket.
    pub fn lose(&self) {
        self.lost.fetch_add(1, Ordering::AcqRel);
        self.wake();
    }

    /// The number of the next ticket.
    pub fn next(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    /// Reads at most `limit` tickets, and none from the number `until` on. Calls `each` with each value; if it breaks,
    /// the value stays. `None` if another thread is reading.
    pub fn read(
        &self,
        limit: usize,
        until: u64,
        mut each: impl FnMut(&T) -> ControlFlow<()>,
    ) -> Option<Progress> {
        let mut reader = self.reader.try_lock().ok()?;
        if reader.lost == 0 {
            reader.lost = self.lost.swap(0, Ordering::AcqRel);
            reader.reported_at = self.next();
        }
        let mut left = limit;
        let mut has_more = true;
        while left > 0 && reader.position < until {
            let place = self.place(reader.position);
            if !place.is_ready(reader.position) {
                has_more = !self.arm(place, reader.position);
                break;
            }
            let Ok(mut held) = place.value.try_lock() else {
                break;
            };
            if let Some(value) = &*held
                && each(value).is_break()
            {
                break;
            }
            let value = held.take();
            drop(held);
            reader.position += 1;
            self.in_use.fetch_sub(1, Ordering::AcqRel);
            drop(value);
            left -= 1;
        }
        let is_reported = reader.position >= reader.reported_at;
        let lost = if is_reported {
            mem::take(&mut reader.lost)
        } else {
            0
        };
        Some(Progress {
            position: reader.position,
            lost,
            has_more: has_more || (is_reported && self.lost.load(Ordering::Acquire) != 0),
        })
    }

    /// Whether the reader has to be woken. Then the caller must wake it.
    #[inline]
    pub fn take_wake(&self) -> bool {
        self.is_due.load(Ordering::Relaxed) && self.is_due.swap(false, Ordering::AcqRel)
    }

    fn place(&self, number: u64) -> &Place<T> {
        &self.places[(number % self.places.len() as u64) as usize]
    }

    /// The next producer wakes the reader; `false` if there is something to read by now.
    fn arm(&self, place: &Place<T>, position: u64) -> bool {
        self.is_armed.swap(true, Ordering::AcqRel);
        if !place.is_ready(position) {
            return true;
        }
        // A producer may have found the word set: at worst the reader is woken once too often.
        self.is_armed.swap(false, Ordering::AcqRel);
        false
    }

    fn wake(&self) {
        if self.is_armed.swap(false, Ordering::AcqRel) {
            self.is_due.store(true, Ordering::Release);
        }
    }
}

impl<T> Place<T> {
    fn is_ready(&self, number: u64) -> bool {
        self.stamp.load(Ordering::Acquire) == number + 1
    }
}

impl<T> fmt::Debug for Sequence<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sequence")
            .field("capacity", &self.places.len())
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

/// A place in a sequence. The reader waits until it is published or dropped.
pub struct Ticket<'a, T> {
    sequence: &'a Sequence<T>,
    number: u64,
}

impl<T> Ticket<'_, T> {
    /// Gives the ticket a value.
    pub fn publish(self, value: T) {
        if let Ok(mut held) = self.sequence.place(self.number).value.try_lock() {
            *held = Some(value);
        }
        // Its destructor does the rest.
    }
}

impl<T> Drop for Ticket<'_, T> {
    fn drop(&mut self) {
        let place = self.sequence.place(self.number);
        place.stamp.store(self.number + 1, Ordering::Release);
        self.sequence.wake();
    }
}

impl<T> fmt::Debug for Ticket<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ticket").field(&self.number).finish()
    }
}
