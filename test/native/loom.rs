//! Models of the crate's own atomics, explored by loom. Run with
//!
//! ```text
//! RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 \
//!     cargo test --release -p erlmcp_core --test loom --target-dir target/loom
//! ```
//!
//! which takes some seconds. Without `--cfg loom` there is nothing in here.
#![cfg(loom)]

use erlmcp_core::gate::Gate;
use erlmcp_core::registry::Decision;
use erlmcp_core::seqlock::SeqLock;
use erlmcp_core::slots::{OCCUPIED, Slots};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};
use loom::thread;

/// Indexes that are held at the same time are different, and keep the words stored at them.
#[test]
fn slots_hand_out_each_index_once() {
    loom::model(|| {
        let slots = Arc::new(Slots::new());
        let freed = slots.insert(OCCUPIED | 9);
        slots.remove(freed);
        let other = {
            let slots = Arc::clone(&slots);
            thread::spawn(move || slots.insert(OCCUPIED | 1))
        };
        let mine = slots.insert(OCCUPIED | 2);
        let theirs = other.join().unwrap();
        assert_ne!(mine, theirs);
        assert_eq!(slots.get(theirs), Some(OCCUPIED | 1));
        assert_eq!(slots.get(mine), Some(OCCUPIED | 2));
    });
}

/// The case that ABA would break: one thread reads the head of the free list while another pops
/// it, pops the next one, and pushes the first one back.
#[test]
fn slots_survive_aba() {
    loom::model(|| {
        let slots = Arc::new(Slots::new());
        let a = slots.insert(OCCUPIED | 1);
        let b = slots.insert(OCCUPIED | 2);
        slots.remove(b);
        slots.remove(a);
        let other = {
            let slots = Arc::clone(&slots);
            thread::spawn(move || {
                let first = slots.insert(OCCUPIED | 3);
                let second = slots.insert(OCCUPIED | 4);
                slots.remove(first);
                second
            })
        };
        let mine = [slots.insert(OCCUPIED | 5), slots.insert(OCCUPIED | 6)];
        let theirs = other.join().unwrap();
        assert_ne!(mine[0], mine[1]);
        assert!(!mine.contains(&theirs));
        assert_eq!(slots.get(theirs), Some(OCCUPIED | 4));
        assert_eq!(slots.get(mine[0]), Some(OCCUPIED | 5));
        assert_eq!(slots.get(mine[1]), Some(OCCUPIED | 6));
    });
}

/// A walk sees a word that is there throughout exactly once, whatever comes and goes beside it.
#[test]
fn slots_are_walked_completely() {
    loom::model(|| {
        let slots = Arc::new(Slots::new());
        let passing = slots.insert(OCCUPIED | 1);
        slots.insert(OCCUPIED | 7);
        let other = {
            let slots = Arc::clone(&slots);
            thread::spawn(move || {
                slots.remove(passing);
                slots.insert(OCCUPIED | 2);
            })
        };
        let seen: Vec<u64> = slots.iter().map(|(_, word)| word & !OCCUPIED).collect();
        other.join().unwrap();
        assert_eq!(seen.iter().filter(|word| **word == 7).count(), 1);
        assert!(seen.iter().all(|word| [1, 2, 7].contains(word)));
    });
}

const OLD: u8 = 0;
const PENDING: u8 = 1;

/// A bind, the removal of its server followed by a look at the transport, and a reader that helps.
/// All agree on the outcome, and the one who removed the server never sees the old binding if the
/// new one took effect (that is, before the removal).
#[test]
fn binding_is_decided_once_and_before_the_server_goes() {
    loom::model(|| {
        let transport = Arc::new(AtomicU8::new(OLD));
        let server_is_current = Arc::new(AtomicBool::new(true));
        let decision = Arc::new(Decision::new());
        let look = {
            let (transport, current, decision) = (
                Arc::clone(&transport),
                Arc::clone(&server_is_current),
                Arc::clone(&decision),
            );
            move || match transport.load(Ordering::Acquire) {
                OLD => None,
                _ => Some(decision.decide(|| current.load(Ordering::Acquire))),
            }
        };
        let remover = {
            let (current, look) = (Arc::clone(&server_is_current), look.clone());
            thread::spawn(move || {
                current.store(false, Ordering::Release);
                Decision::server_has_gone();
                look()
            })
        };
        let reader = thread::spawn(look);
        transport.store(PENDING, Ordering::Release);
        let bound = decision.decide(|| server_is_current.load(Ordering::Acquire));
        let after_removal = remover.join().unwrap();
        let read = reader.join().unwrap();
        match after_removal {
            None => assert!(
                !bound,
                "the old binding was seen after the new one had ended"
            ),
            Some(theirs) => assert_eq!(theirs, bound),
        }
        if let Some(theirs) = read {
            assert_eq!(theirs, bound);
        }
    });
}

/// Whoever enters behind a closed gate learns so, or is found by the walk.
#[test]
fn nothing_slips_through_the_gate() {
    loom::model(|| {
        let gate = Arc::new(Gate::new());
        let entry = Arc::new(AtomicBool::new(false));
        let enters = {
            let (gate, entry) = (Arc::clone(&gate), Arc::clone(&entry));
            thread::spawn(move || {
                entry.store(true, Ordering::Release);
                gate.is_closed_behind()
            })
        };
        gate.close();
        let found = entry.load(Ordering::Acquire);
        let refused = enters.join().unwrap();
        assert!(found || refused);
    });
}

/// loom itself would find the gate's race if the fences were not there.
#[test]
#[should_panic(expected = "slipped through")]
fn without_fences_something_slips_through() {
    loom::model(|| {
        let closed = Arc::new(AtomicBool::new(false));
        let entry = Arc::new(AtomicBool::new(false));
        let enters = {
            let (closed, entry) = (Arc::clone(&closed), Arc::clone(&entry));
            thread::spawn(move || {
                entry.store(true, Ordering::Release);
                fence(Ordering::Release);
                closed.load(Ordering::Acquire)
            })
        };
        closed.store(true, Ordering::Release);
        let found = entry.load(Ordering::Acquire);
        let refused = enters.join().unwrap();
        assert!(found || refused, "slipped through");
    });
}

/// What a sequence lock copies: a number, which only grows, and its inverse.
struct Copied {
    source: AtomicU64,
    lock: SeqLock<2>,
}

impl Copied {
    fn new() -> Self {
        Self {
            source: AtomicU64::new(0),
            lock: SeqLock::new([0, !0]),
        }
    }

    fn change(&self) -> u64 {
        let number = self.source.fetch_add(1, Ordering::AcqRel) + 1;
        self.lock.refresh(|| {
            let number = self.source.load(Ordering::Acquire);
            [number, !number]
        });
        number
    }

    /// The number, if the words are valid, which then belong together.
    fn read(&self) -> Option<u64> {
        let [number, inverse] = self.lock.read()?;
        assert_eq!(number, !inverse);
        Some(number)
    }
}

/// A reader never sees half of a change, and after its own change no older number.
#[test]
fn seqlock_readers_see_whole_values() {
    loom::model(|| {
        let copied = Arc::new(Copied::new());
        let writer = {
            let copied = Arc::clone(&copied);
            thread::spawn(move || {
                let changed = copied.change();
                assert!(copied.read().is_none_or(|number| number >= changed));
            })
        };
        let first = copied.read();
        let second = copied.read();
        if let (Some(first), Some(second)) = (first, second) {
            assert!(first <= second);
        }
        writer.join().unwrap();
        assert_eq!(copied.read(), Some(1));
    });
}

/// Of two that change the source at the same time one makes the words valid, with the newest value.
#[test]
fn seqlock_ends_valid_after_two_changes() {
    loom::model(|| {
        let copied = Arc::new(Copied::new());
        let other = {
            let copied = Arc::clone(&copied);
            thread::spawn(move || {
                copied.change();
            })
        };
        let changed = copied.change();
        assert!(copied.read().is_none_or(|number| number >= changed));
        other.join().unwrap();
        assert_eq!(copied.read(), Some(2));
    });
}
