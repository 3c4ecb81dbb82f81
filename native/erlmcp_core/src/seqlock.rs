//! A small value beside its snapshot: read by loads alone, where an
//! epoch guard would cost more than all the rest.
//!
//! # Algorithm
//!
//! A sequence lock, in the form that H.-J. Boehm gives it for language memory models (*Can seqlocks get
//! along with programming language memory models?*, 2012): the words are atomics, and a reader
//! takes them only if the sequence number was the same before and after. Unlike the usual one it
//! never makes a reader wait: while the words are being written the number says so, and the reader
//! goes to where the value comes from instead.
//!
//! # Protocol
//!
//! `sequence` is twice the number of changes, with the last bit (`VALID`) set while the words are valid.
//! Whoever changes the source
//!
//! 1. changes it, then counts the change in `sequence`, which makes the words invalid;
//! 2. takes `is_copying`. If somebody has it, that one will see the count, and the change is done;
//! 3. reads `sequence` and then the source, writes the words, and makes them valid if `sequence` is
//!    the same still; if not, again from here;
//! 4. gives `is_copying` back; if the words are not valid by then, again from 2.
//!
//! *The words are never older than the last change that has returned*: it has counted, so they are
//! invalid until somebody has read the source after the count. *Two never write at the same time*:
//! step 2. *Somebody always makes them valid*: one who does not get `is_copying` in step 2 comes
//! before its return in step 4 in the order of changes of that word, so its count is seen there.

use crate::sync::{AtomicBool, AtomicU64, Ordering, fence};

const VALID: u64 = 1;

/// `N` words. See the module's documentation.
#[derive(Debug)]
pub struct SeqLock<const N: usize> {
    sequence: AtomicU64,
    words: [AtomicU64; N],
    is_copying: AtomicBool,
}

impl<const N: usize> SeqLock<N> {
    /// With these words, valid.
    pub fn new(words: [u64; N]) -> Self {
        Self {
            sequence: AtomicU64::new(VALID),
            words: words.map(AtomicU64::new),
            is_copying: AtomicBool::new(false),
        }
    }

    /// The words; `None` while they are not valid. Wait-free, and writes nothing.
    #[inline(always)]
    pub fn read(&self) -> Option<[u64; N]> {
        let before = self.sequence.load(Ordering::Acquire);
        if before & VALID == 0 {
            return None;
        }
        let words = std::array::from_fn(|n| self.words[n].load(Ordering::Relaxed));
        // With the fence in `refresh`: whoever has read one of the words of a later change sees
        // its count below.
        fence(Ordering::Acquire);
        (self.sequence.load(Ordering::Relaxed) == before).then_some(words)
    }

    /// The source has changed: makes the words what `source` gives, or leaves that to another thread
    /// that is about it. Readers get none until then.
    pub fn refresh(&self, source: impl Fn() -> [u64; N]) {
        let mut sequence = self.sequence.load(Ordering::Relaxed);
        while let Err(changed) = self.sequence.compare_exchange_weak(
            sequence,
            (sequence & !VALID) + 2,
            Ordering::AcqRel,
            Ordering::Relaxed,
        ) {
            sequence = changed;
        }
        while self.sequence.load(Ordering::Acquire) & VALID == 0
            && !self.is_copying.swap(true, Ordering::AcqRel)
        {
            self.copy(&source);
            // AcqRel: see "somebody always makes them valid".
            self.is_copying.swap(false, Ordering::AcqRel);
        }
    }

    /// For the one who has `is_copying`.
    fn copy(&self, source: &impl Fn() -> [u64; N]) {
        loop {
            let sequence = self.sequence.load(Ordering::Acquire);
            if sequence & VALID != 0 {
                return;
            }
            // With the fence in `read`.
            fence(Ordering::Release);
            for (word, value) in self.words.iter().zip(source()) {
                word.store(value, Ordering::Relaxed);
            }
            let is_current = self.sequence.compare_exchange(
                sequence,
                sequence | VALID,
                Ordering::Release,
                Ordering::Relaxed,
            );
            if is_current.is_ok() {
                return;
            }
        }
    }
}
