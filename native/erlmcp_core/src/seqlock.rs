//! A small value beside its snapshot, read by loads alone. An epoch guard would cost more than all the rest.
//!
//! # Algorithm
//!
//! A sequence lock, in the form that H.-J. Boehm gives it for language memory models (*Can seqlocks get along with
//! programming language memory models?*, 2012): the words are atomics, and a reader accepts them only if the
//! sequence number was the same before and after. Unlike in the usual form, a reader never waits: the sequence
//! number says while the words are being written, and the reader then reads the source of the value instead.
//!
//! # Protocol
//!
//! `sequence` is twice the number of changes, with the last bit (`VALID`) set while the words are valid. A thread
//! that changes the source
//!
//! 1. changes it, then counts the change in `sequence`, which makes the words invalid;
//! 2. acquires `is_copying`. If another thread has it, that one will see the count, and the change is done;
//! 3. reads `sequence` and then the source, writes the words, and makes them valid if `sequence` is still the same;
//!    if not, repeats this step;
//! 4. releases `is_copying`; if the words are not valid by then, continues at 2.
//!
//! *The words are never older than the last change that has returned*: it has been counted, so they are invalid
//! until a thread has read the source after the count. *Two threads never write at the same time*: step 2. *A
//! thread always makes them valid*: a thread that does not acquire `is_copying` in step 2 precedes the release in
//! step 4 in the modification order of that word, so its count is seen there.

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
    /// A lock with these words, valid.
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
        // With the fence in `copy`: a thread that has read one of the words of a later change sees its count below.
        fence(Ordering::Acquire);
        (self.sequence.load(Ordering::Relaxed) == before).then_some(words)
    }

    /// The source has changed: makes the words what `source` returns, or leaves that to a thread that is copying
    /// already. Readers get `None` until then.
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
            // AcqRel: see "a thread always makes them valid".
            self.is_copying.swap(false, Ordering::AcqRel);
        }
    }

    /// For the thread that has acquired `is_copying`.
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
