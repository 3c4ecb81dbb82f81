//! A diversion: sends writers another way, and knows when the last one that came the old way has
//! gone.
//!
//! Writers go straight to a structure until somebody needs it for himself (to copy it, or to make
//! each change in two places). He sets the diversion and waits for silence: from then on no writer
//! is in a passage, and none enters one, until the diversion is lifted.
//!
//! # Guarantee
//!
//! A writer enters (counts itself in) and then looks at the sign; the other one puts the sign up
//! and then looks at the counts. At least one of them sees the other: Dekker's store-and-load
//! pattern, as in the module `gate`. So with the sign up and all counts at zero, whoever has
//! entered has left, and its writes are visible to the one who found the counts at zero.
//!
//! # Trade-offs
//!
//! Two atomic additions a write, in one of many counters so that writers of different ids seldom
//! meet. Reads are not counted: they may see the structure as it was when the sign went up, and
//! their callers check afterwards whether the way has changed.

use crate::sync::{AtomicBool, AtomicU64, Ordering, fence};

#[cfg(not(loom))]
const STRIPES: usize = 64;
#[cfg(loom)]
const STRIPES: usize = 2;

/// Alone in its cache line (two of 64 bytes, since x86 fetches pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe(AtomicU64);

/// See the module's documentation.
#[derive(Debug)]
pub struct Diversion {
    is_set: AtomicBool,
    inside: Box<[Stripe]>,
}

/// A writer on its way; the way stays open until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Passage<'a>(&'a Stripe);

impl Diversion {
    /// The way is open.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self {
            is_set: AtomicBool::new(false),
            inside: (0..STRIPES).map(|_| Stripe::default()).collect(),
        }
    }

    /// Begins a write, unless writers are diverted. `hash` is that of what is written to.
    pub fn enter(&self, hash: u64) -> Option<Passage<'_>> {
        let stripe = &self.inside[hash as usize % STRIPES];
        stripe.0.fetch_add(1, Ordering::Relaxed);
        let passage = Passage(stripe);
        // SeqCst: orders the count before the look at the sign, against the fence in `set`.
        fence(Ordering::SeqCst);
        if self.is_set() { None } else { Some(passage) }
    }

    /// Diverts writers from now on. Returns whether all who came before have gone; if not, call it
    /// again a little later.
    pub fn set(&self) -> bool {
        self.is_set.store(true, Ordering::Relaxed);
        // SeqCst: orders the sign before the look at the counts, against the fence in `enter`.
        fence(Ordering::SeqCst);
        self.inside
            .iter()
            .all(|stripe| stripe.0.load(Ordering::Acquire) == 0)
    }

    /// Lets writers pass again.
    pub fn lift(&self) {
        self.is_set.store(false, Ordering::Release);
    }

    /// Whether writers are diverted. One load.
    #[inline]
    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_writer_inside_keeps_it_from_silence() {
        let diversion = Diversion::new();
        let passage = diversion.enter(7).expect("the way is open");
        assert!(!diversion.set());
        assert!(diversion.enter(8).is_none());
        drop(passage);
        assert!(diversion.set());
        assert!(diversion.enter(7).is_none());
        assert!(diversion.set(), "whoever is turned away has left");
        diversion.lift();
        assert!(diversion.enter(7).is_some());
    }
}
