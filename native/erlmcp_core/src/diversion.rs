//! A diversion: turns away changes, look-ups and routes of a structure, and detects when the last change that began
//! before has completed.
//!
//! Callers use a structure directly until one owner needs it alone, to copy it or because another structure holds
//! the entries. The owner diverts *changes*, and waits until none is under way. It diverts *look-ups* and *routes*
//! while the structure does not hold what they read.
//!
//! # Guarantee
//!
//! * Changes are counted. A change enters (increments a count) and then loads the sign; the owner stores the sign
//!   and then loads the counts. At least one of them sees the other: Dekker's store-and-load pattern, as in the
//!   module `gate`. So with changes diverted and all counts at zero, every change that entered has left, and its
//!   writes are visible to the owner.
//! * Look-ups are not counted. They load the word before and after ([`Diversion::sign`] and
//!   [`Diversion::is_still`]). Each store of the owner makes another word. So two equal words mean that the owner
//!   did not divert look-ups in between, and that the result was current at that time.
//!
//! # Trade-offs
//!
//! A change costs two atomic additions, in one of many counters so that changes of different ids seldom contend. A
//! look-up costs two loads. A sequence number of 61 bits does not wrap around.

use crate::sync::{AtomicU64, Ordering, fence};

#[cfg(not(loom))]
const STRIPES: usize = 64;
#[cfg(loom)]
const STRIPES: usize = 2;

/// Alone in its cache line (two of 64 bytes, since x86 fetches pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe(AtomicU64);

/// The kinds of operations that are turned away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Diverted {
    /// Changes.
    pub changes: bool,
    /// Look-ups.
    pub lookups: bool,
    /// Routes of messages.
    pub routes: bool,
}

const CHANGES: u64 = 1;
const LOOKUPS: u64 = 2;
const ROUTES: u64 = 4;
const SEQUENCE: u64 = 8;

/// The word of a diversion at one moment: a sequence number (61 bits), and what is diverted (3 bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sign(u64);

impl Sign {
    /// Whether changes are diverted.
    #[inline]
    pub fn diverts_changes(self) -> bool {
        self.0 & CHANGES != 0
    }

    /// Whether look-ups are diverted.
    #[inline]
    pub fn diverts_lookups(self) -> bool {
        self.0 & LOOKUPS != 0
    }

    /// Whether routes are diverted.
    #[inline]
    pub fn diverts_routes(self) -> bool {
        self.0 & ROUTES != 0
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Diversion {
    word: AtomicU64,
    inside: Box<[Stripe]>,
}

/// A change under way, until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Passage<'a>(&'a Stripe);

impl Diversion {
    /// A diversion that diverts nothing.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self {
            word: AtomicU64::new(0),
            inside: (0..STRIPES).map(|_| Stripe::default()).collect(),
        }
    }

    /// Begins a change, unless changes are diverted. `hash` is that of the id that is changed.
    pub fn enter(&self, hash: u64) -> Option<Passage<'_>> {
        let stripe = &self.inside[hash as usize % STRIPES];
        stripe.0.fetch_add(1, Ordering::Relaxed);
        let passage = Passage(stripe);
        // SeqCst: orders the count before the load of the sign, against the fence in `divert`.
        fence(Ordering::SeqCst);
        if self.word.load(Ordering::Acquire) & CHANGES == 0 {
            Some(passage)
        } else {
            None
        }
    }

    /// Diverts these operations and no others from now on. Only one owner may call it at a time. Returns whether no
    /// change is under way. If changes are diverted and one is under way, call it again a little later.
    pub fn divert(&self, whom: Diverted) -> bool {
        let sequence = (self.word.load(Ordering::Relaxed) & !(SEQUENCE - 1)).wrapping_add(SEQUENCE);
        let bit = |is_set: bool, bit: u64| if is_set { bit } else { 0 };
        let bits =
            bit(whom.changes, CHANGES) | bit(whom.lookups, LOOKUPS) | bit(whom.routes, ROUTES);
        self.word.store(sequence | bits, Ordering::Release);
        // SeqCst: orders the sign before the loads of the counts, against the fence in `enter`.
        fence(Ordering::SeqCst);
        self.inside
            .iter()
            .all(|stripe| stripe.0.load(Ordering::Acquire) == 0)
    }

    /// The sign in force now. One load.
    #[inline]
    pub fn sign(&self) -> Sign {
        Sign(self.word.load(Ordering::Acquire))
    }

    /// Whether `sign` has been in force since it was loaded.
    #[inline]
    pub fn is_still(&self, sign: Sign) -> bool {
        // Acquire: orders the look-up before this load. A thread that removes an entry has stored another word
        // before, so a look-up that misses the entry finds that word here.
        fence(Ordering::Acquire);
        self.word.load(Ordering::Relaxed) == sign.0
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

    const CHANGES_ALONE: Diverted = Diverted {
        changes: true,
        lookups: false,
        routes: false,
    };

    #[test]
    fn a_change_under_way_is_waited_for() {
        let diversion = Diversion::new();
        let passage = diversion.enter(7).expect("nobody is diverted");
        assert!(!diversion.divert(CHANGES_ALONE));
        assert!(diversion.enter(8).is_none());
        drop(passage);
        assert!(diversion.divert(CHANGES_ALONE));
        assert!(diversion.enter(7).is_none());
        assert!(
            diversion.divert(CHANGES_ALONE),
            "what is turned away has left"
        );
        assert!(diversion.divert(Diverted::default()));
        assert!(diversion.enter(7).is_some());
    }

    #[test]
    fn each_kind_is_diverted_by_itself() {
        let diversion = Diversion::new();
        diversion.divert(CHANGES_ALONE);
        assert!(!diversion.sign().diverts_lookups());
        assert!(!diversion.sign().diverts_routes());
        diversion.divert(Diverted {
            routes: true,
            ..Diverted::default()
        });
        assert!(diversion.enter(1).is_some());
        assert!(!diversion.sign().diverts_lookups());
        assert!(diversion.sign().diverts_routes());
        diversion.divert(Diverted {
            lookups: true,
            ..Diverted::default()
        });
        assert!(diversion.sign().diverts_lookups());
    }

    #[test]
    fn a_look_up_notices_that_the_owner_was_there() {
        let diversion = Diversion::new();
        let sign = diversion.sign();
        assert!(diversion.is_still(sign));
        diversion.divert(Diverted {
            lookups: true,
            ..Diverted::default()
        });
        diversion.divert(Diverted::default());
        assert!(!diversion.is_still(sign));
    }
}
