//! Models of the crate's own atomics, explored by loom. Run with
//!
//! ```text
//! RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 \
//!     cargo test --release -p erlmcp_core --test loom --target-dir target/loom
//! ```
//!
//! which takes some seconds. Without `--cfg loom` this file is empty.
#![cfg(loom)]

use erlmcp_core::admission::{Admission, Begun, Pass, Sampling, Taken, Threshold};
use erlmcp_core::call_breaker::{self, CallBreaker, Outcome};
use erlmcp_core::circuit_breaker::{CircuitBreaker, Config, Permit, State};
use erlmcp_core::clock::Clock;
use erlmcp_core::diversion::{Diversion, Diverted};
use erlmcp_core::gate::Gate;
use erlmcp_core::keyed_limiter::{KeyedLimiter, KeyedRefusal};
use erlmcp_core::message_store::{Bounds, MessageStore, PushError};
use erlmcp_core::registry::{
    self, Announcement, Announcements, Change, Decision, Entry, EntryBucket, EntryLimits,
    Headcount, Interest, Leaving, Namespace, Phase, Registry,
};
use erlmcp_core::seqlock::SeqLock;
use erlmcp_core::sequence::Sequence;
use erlmcp_core::slots::{OCCUPIED, Slots};
use erlmcp_core::token_bucket::{Level, Limits, Refused, Terms, TokenBucket};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;
use std::array;
use std::ops::ControlFlow;

use counted::{Counted, drained};

#[path = "counted.rs"]
mod counted;

/// Indexes that are held at the same time differ, and keep the words stored at them.
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

/// ABA: one thread loads the head of the free list while another pops it, pops the next one, and
/// pushes the first one back.
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

/// An iteration sees a word that is present throughout exactly once, whatever is inserted and removed
/// beside it.
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

/// Three threads: a bind; the removal of its server followed by a read of the transport; and a reader
/// that helps. All agree on the outcome. The remover never sees the old binding if the new one took
/// effect (that is, before the removal).
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

/// The last member leaves while two others join, one of whom leaves again. A group that somebody has joined has not ended, one
/// that has ended has no member and gets none, and one thread ends it.
#[test]
fn a_group_ends_once_and_with_its_last_member() {
    loom::model(|| {
        let headcount = Arc::new(Headcount::new());
        let members = Arc::new(AtomicU64::new(1));
        let ends = Arc::new(AtomicU64::new(0));
        let leave = {
            let (headcount, members, ends) = (
                Arc::clone(&headcount),
                Arc::clone(&members),
                Arc::clone(&ends),
            );
            move || {
                members.fetch_sub(1, Ordering::AcqRel);
                if headcount.leave() {
                    ends.fetch_add(1, Ordering::AcqRel);
                }
            }
        };
        let visitor = {
            let (headcount, members, leave) =
                (Arc::clone(&headcount), Arc::clone(&members), leave.clone());
            thread::spawn(move || {
                if headcount.enter() {
                    members.fetch_add(1, Ordering::AcqRel);
                    assert!(headcount.count() > 0);
                    leave();
                }
            })
        };
        let last = thread::spawn(leave);
        let stays = headcount.enter();
        if stays {
            members.fetch_add(1, Ordering::AcqRel);
            assert!(headcount.count() > 0);
        }
        visitor.join().unwrap();
        last.join().unwrap();
        assert_eq!(headcount.count(), members.load(Ordering::Acquire));
        assert_eq!(ends.load(Ordering::Acquire), u64::from(!stays));
    });
}

/// A thread that enters after the gate was closed learns that it is closed, or its entry is found by the
/// closing thread.
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

/// A thread that enters after the gate was closed removes its entry, unless the closing thread has removed
/// it: exactly one of the two does.
#[test]
fn what_entered_a_closed_gate_is_taken_out_once() {
    // As in a map: a removal that finds nothing stores nothing.
    fn take_out(entry: &AtomicBool) -> bool {
        entry
            .compare_exchange(true, false, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
    loom::model(|| {
        let gate = Arc::new(Gate::new());
        let entry = Arc::new(AtomicBool::new(false));
        let enters = {
            let (gate, entry) = (Arc::clone(&gate), Arc::clone(&entry));
            thread::spawn(move || {
                entry.store(true, Ordering::Release);
                gate.is_closed_behind() && take_out(&entry)
            })
        };
        gate.close();
        let removed = take_out(&entry);
        let refused = enters.join().unwrap();
        assert!(removed != refused);
        assert!(!entry.load(Ordering::Acquire));
    });
}

/// loom finds the race without the gate's fences.
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

/// The source of a sequence lock, and the lock: it copies a number, which only grows, and its inverse.
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

    /// The number, if the words are valid. Valid words belong together.
    fn read(&self) -> Option<u64> {
        let [number, inverse] = self.lock.read()?;
        assert_eq!(number, !inverse);
        Some(number)
    }
}

/// A reader never sees half of a change, and never an older number after its own change.
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

/// One of two threads that change the source concurrently makes the words valid, with the newest value.
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

/// A clock that stands still. loom does not see it as an atomic.
struct Still;

impl Clock for Still {
    fn now_ns(&self) -> u64 {
        1_000_000_000
    }
}

/// One token per hour, so that nothing is refilled.
fn limits(capacity: u64) -> Limits {
    Limits::new(capacity, 1.0 / 3600.0).unwrap()
}

/// Threads acquire from one bucket all tokens that it holds, and no more.
#[test]
fn a_bucket_gives_each_token_once() {
    loom::model(|| {
        let level = Arc::new(Level::full());
        let take = {
            let terms = Terms::new(limits(5), 0);
            let level = Arc::clone(&level);
            move |n| level.take(&terms, 0, n).map_or(0, |_| n)
        };
        let threads = [2, 3].map(|n| {
            let take = take.clone();
            thread::spawn(move || take(n))
        });
        let mine = take(1) + take(1);
        let theirs: u64 = threads.map(|t| t.join().unwrap()).into_iter().sum();
        // The acquisition of two or three tokens may have found too few left.
        assert!((3..=5).contains(&(mine + theirs)));
        // Rounding may lose a fraction of a token.
        let left = level.take(&Terms::new(limits(5), 0), 0, 0).unwrap() + mine + theirs;
        assert!((4..=5).contains(&left));
    });
}

/// Some threads use the former terms and others the later ones. Tokens acquired under the former terms stay
/// acquired, and no more are given than the bucket holds under either.
#[test]
fn a_bucket_is_converted_once() {
    loom::model(|| {
        let level = Arc::new(Level::full());
        let former = Terms::new(limits(2), 0);
        let later = former.changed(limits(3), 0, 8);
        let threads = [(former, 1), (later.clone(), 2)].map(|(terms, n)| {
            let level = Arc::clone(&level);
            thread::spawn(move || level.take(&terms, 0, n).map_or(0, |_| n))
        });
        let mine = level.take(&later, 0, 1).map_or(0, |_| 1);
        let theirs: u64 = threads.map(|t| t.join().unwrap()).into_iter().sum();
        assert!((1..=2).contains(&(mine + theirs)), "{mine} and {theirs}");
    });
}

/// An acquisition that overlaps changes of the limits uses the limits before or after one of them: it is not
/// refused if all of them allow it. loom sees all atomics but the snapshots.
#[test]
fn a_change_of_limits_refuses_nobody() {
    for changes in [1, 2] {
        loom::model(move || {
            let bucket = Arc::new(TokenBucket::new(Some(limits(8)), &Still));
            let other = {
                let bucket = Arc::clone(&bucket);
                thread::spawn(move || bucket.take(&Still, 2).map(|_| ()))
            };
            let changer = {
                let bucket = Arc::clone(&bucket);
                thread::spawn(move || {
                    for n in 0..changes {
                        bucket.set_limits(Some(limits(7 - n)), &Still);
                        let taken = bucket.take(&Still, 1);
                        assert!(matches!(taken, Ok(Some(_))), "{taken:?}");
                    }
                })
            };
            assert_eq!(other.join().unwrap(), Ok(()));
            changer.join().unwrap();
            let left = bucket.take(&Still, 0).unwrap().unwrap();
            // Each acquisition may come before or after each change of the capacity; rounding loses fractions.
            assert!((8 - 3 * changes - 2..=6).contains(&left), "{left} left");
        });
    }
}

/// A registry with one connection, which shares these limits.
fn registry_with_a_connection(limits: Limits) -> Arc<Registry<u64>> {
    let bounds = registry::Limits::new(1, 10, 10).unwrap();
    let registry = Registry::<u64>::new(bounds, &Still);
    registry.set_limits(Some(limits), &Still);
    let id = registry.id(0, b"a");
    let registered = registry.register(Namespace::Connection, id, 0, 1, None, |_| 1);
    assert!(registered.is_ok());
    Arc::new(registry)
}

fn take(registry: &Registry<u64>, tokens: u64) -> Option<u64> {
    let id = registry.id(0, b"a");
    registry
        .take_tokens(Namespace::Connection, &id, tokens, &Still)
        .expect("not refused")
}

fn set(registry: &Registry<u64>, limits: EntryLimits) {
    let id = registry.id(0, b"a");
    let changed = registry.set_entry_limits(Namespace::Connection, &id, limits, &Still);
    changed.unwrap();
}

/// An entry is written anew while a thread that has found its former value acquires tokens: none is refused, lost or given
/// twice, and nothing stays apart.
#[test]
fn tokens_stay_when_an_entry_is_written_anew() {
    loom::model(|| {
        let bucket = Arc::new(EntryBucket::new(limits(8), &Still));
        let taker = {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || {
                for _ in 0..2 {
                    assert!(matches!(bucket.take(1, &Still), Ok(Some(_))));
                }
            })
        };
        bucket.write_anew();
        assert!(matches!(bucket.take(1, &Still), Ok(Some(_))));
        taker.join().unwrap();
        assert_eq!(bucket.take(0, &Still), Ok(Some(5)));
        assert_eq!(bucket.apart(), 0);
    });
}

/// An entry is written anew twice. So a thread may find its level on the way to the value that was present in between.
#[test]
fn tokens_stay_when_an_entry_is_written_anew_twice() {
    loom::model(|| {
        let bucket = Arc::new(EntryBucket::new(limits(8), &Still));
        let taker = {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || assert!(matches!(bucket.take(1, &Still), Ok(Some(_)))))
        };
        bucket.write_anew();
        bucket.write_anew();
        taker.join().unwrap();
        assert_eq!(bucket.take(0, &Still), Ok(Some(7)));
        assert_eq!(bucket.apart(), 0);
    });
}

/// An entry gets limits of its own, or the shared ones again, while it is written anew and a token is acquired.
#[test]
fn tokens_stay_when_an_entry_is_written_anew_and_its_limits_change() {
    for was_own in [false, true] {
        loom::model(move || {
            let bucket = Arc::new(EntryBucket::new(limits(8), &Still));
            let own = EntryLimits::Own(Some(limits(8).into()));
            if was_own {
                bucket.set(own, &Still).unwrap();
            }
            let changer = {
                let bucket = Arc::clone(&bucket);
                let limits = if was_own { EntryLimits::Shared } else { own };
                thread::spawn(move || bucket.set(limits, &Still).unwrap())
            };
            bucket.write_anew();
            assert!(matches!(bucket.take(1, &Still), Ok(Some(_))));
            changer.join().unwrap();
            assert_eq!(bucket.take(0, &Still), Ok(Some(7)));
            assert_eq!(bucket.apart(), usize::from(!was_own));
        });
    }
}

/// An entry gets limits of its own and then the shared ones again, while threads acquire tokens that it holds all
/// the time: no acquisition is refused, no token is lost, and none is given twice. loom sees the words and levels,
/// but not the map of own buckets.
#[test]
fn tokens_move_to_own_limits_and_back_while_they_are_taken() {
    loom::model(|| {
        let registry = registry_with_a_connection(limits(8));
        let taker = {
            let registry = Arc::clone(&registry);
            thread::spawn(move || {
                for _ in 0..2 {
                    assert!(take(&registry, 1).is_some(), "no limits");
                }
            })
        };
        set(&registry, EntryLimits::Own(Some(limits(9).into())));
        set(&registry, EntryLimits::Shared);
        taker.join().unwrap();
        // Each acquisition from a full bucket, and each move, loses a fraction to rounding.
        let left = take(&registry, 0).unwrap();
        assert!((5..=6).contains(&left), "{left} left");
    });
}

/// Two acquiring threads may both find that the tokens are to be moved, and move them concurrently with the change.
#[test]
fn tokens_are_moved_once() {
    loom::model(|| {
        let registry = registry_with_a_connection(limits(8));
        let takers = [1, 2].map(|n| {
            let registry = Arc::clone(&registry);
            thread::spawn(move || assert!(take(&registry, n).is_some(), "no limits"))
        });
        set(&registry, EntryLimits::Own(Some(limits(9).into())));
        for taker in takers {
            taker.join().unwrap();
        }
        let id = registry.id(0, b"a");
        let state = registry
            .bucket_state(Namespace::Connection, &id, &Still)
            .unwrap();
        assert_eq!(state.limits, Some(limits(9)));
        assert!(matches!(state.tokens, Some(4..=5)), "{state:?}");
    });
}

/// A clock that stands still at a time of its own.
struct At(u64);

impl Clock for At {
    fn now_ns(&self) -> u64 {
        self.0
    }
}

/// A limiter for so many keys, with buckets of one token. Key 1 has a bucket, which is full again at the time that is
/// returned too.
fn limiter_with_a_key(max_keys: u64) -> (Arc<KeyedLimiter>, At) {
    let limiter = KeyedLimiter::new(Some(limits(1)), max_keys, &At(0));
    assert_eq!(limiter.take(limiter.key(0, &[1]), 1, &At(0)), Ok(Some(0)));
    (Arc::new(limiter), At(2 * 3600 * 1_000_000_000))
}

/// Whether one token of a key was acquired.
fn takes(limiter: &KeyedLimiter, key: u8, clock: &At) -> bool {
    let taken = limiter.take(limiter.key(0, &[key]), 1, clock);
    assert_ne!(taken, Err(KeyedRefusal::Refused(Refused::ExceedsCapacity)));
    taken.is_ok()
}

/// A bucket is forgotten to make room for another key while a thread acquires from it: its token is acquired once, and
/// there are no more buckets than keys allowed. loom sees words, places and counts, but not the map.
#[test]
fn a_forgotten_bucket_gives_its_token_once() {
    for max_keys in [1, 2] {
        loom::model(move || {
            let (limiter, now) = limiter_with_a_key(max_keys);
            let taker = {
                let limiter = Arc::clone(&limiter);
                let now = At(now.0);
                thread::spawn(move || usize::from(takes(&limiter, 1, &now)))
            };
            let others = usize::from(takes(&limiter, 2, &now));
            let taken = taker.join().unwrap();
            let lacking = (taken + others) as u64;
            assert!(lacking <= max_keys && lacking <= limiter.len());
            if taken == 1 {
                assert!(!takes(&limiter, 1, &now), "acquired twice");
            } else if others == 0 {
                assert!(takes(&limiter, 1, &now), "lost");
            }
        });
    }
}

/// One thread sets the shared limits while another one removes them: the limits in force are the ones
/// enforced.
#[test]
fn limits_that_are_set_are_in_use() {
    loom::model(|| {
        let bounds = registry::Limits::new(1, 10, 10).unwrap();
        let registry = Arc::new(Registry::<u64>::new(bounds, &Still));
        let other = {
            let registry = Arc::clone(&registry);
            thread::spawn(move || registry.set_limits(Some(limits(5)), &Still))
        };
        registry.set_limits(None, &Still);
        other.join().unwrap();
        assert_eq!(
            registry.has_token_buckets(),
            registry.shared_limits().is_some()
        );
    });
}

fn half_open(config: Config) -> Arc<CircuitBreaker> {
    let config = Config {
        timeout_ms: 0,
        ..config
    };
    let circuit = CircuitBreaker::new(Some(config), &Still).unwrap();
    circuit.force(true, &Still);
    Arc::new(circuit)
}

/// One of the callers that find an open circuit after its timeout makes it half open, and no more than
/// `probe_limit` callers are admitted.
#[test]
fn probes_are_bounded() {
    loom::model(|| {
        let circuit = half_open(Config {
            probe_limit: 2,
            ..Config::default()
        });
        let threads = [(); 2].map(|()| {
            let circuit = Arc::clone(&circuit);
            thread::spawn(move || circuit.check(&Still))
        });
        let mine = circuit.check(&Still);
        let permits = threads.map(|t| t.join().unwrap());
        let granted = || permits.iter().chain([&mine]).flatten();
        assert_eq!(granted().count(), 2);
        let first = Permit::Probe { is_first: true };
        assert_eq!(granted().filter(|permit| **permit == first).count(), 1);
        assert_eq!(circuit.stats(&Still).probes, 2);
    });
}

/// A place becomes free when the outcome of its probe is recorded, and not before: the probes under way are
/// never more than `probe_limit`.
#[test]
fn an_answer_frees_one_place() {
    loom::model(|| {
        let circuit = half_open(Config {
            probe_limit: 1,
            ..Config::default()
        });
        let is_under_way = Arc::new(AtomicBool::new(false));
        let probe = {
            let circuit = Arc::clone(&circuit);
            move |succeeds| {
                if circuit.check(&Still).is_err() {
                    return 0;
                }
                assert!(!is_under_way.swap(true, Ordering::AcqRel), "two probes");
                is_under_way.store(false, Ordering::Release);
                if succeeds {
                    circuit.record_success(&Still);
                } else {
                    circuit.release_probe();
                }
                1
            }
        };
        let other = {
            let probe = probe.clone();
            thread::spawn(move || probe(true))
        };
        let probes = probe(false) + probe(false) + other.join().unwrap();
        assert!(probes >= 1);
        assert_eq!(circuit.stats(&Still).probes, 0);
    });
}

/// Successes that close the circuit and a failure that opens it, of concurrent probes: each transition is
/// reported to the caller that made it, and the last one reported is the state of the circuit.
#[test]
fn each_change_of_a_circuit_is_told_once() {
    loom::model(|| {
        let circuit = half_open(Config {
            success_threshold: 1,
            failure_threshold: 1,
            ..Config::default()
        });
        for _ in 0..3 {
            circuit.check(&Still).unwrap();
        }
        let threads = [(); 2].map(|()| {
            let circuit = Arc::clone(&circuit);
            thread::spawn(move || circuit.record_success(&Still))
        });
        let has_opened = circuit.record_failure(&Still);
        let closings = threads.map(|t| t.join().unwrap());
        let closings = closings
            .into_iter()
            .filter(|has_closed| *has_closed)
            .count();
        // A failure opens a half-open circuit, and one that has been closed meanwhile.
        assert!(has_opened);
        assert!(closings <= 1, "closed twice");
        // The circuit is open, and without a timeout the next caller is a probe.
        let first = Permit::Probe { is_first: true };
        assert_eq!(circuit.check(&Still), Ok(first));
    });
}

/// Exactly one of as many failures as the threshold opens the circuit.
#[test]
fn one_of_too_many_failures_opens() {
    loom::model(|| {
        let config = Config {
            failure_threshold: 3,
            ..Config::default()
        };
        let circuit = Arc::new(CircuitBreaker::new(Some(config), &Still).unwrap());
        let threads = [(); 2].map(|()| {
            let circuit = Arc::clone(&circuit);
            thread::spawn(move || circuit.record_failure(&Still))
        });
        let mine = circuit.record_failure(&Still);
        let theirs = threads.map(|t| t.join().unwrap());
        let openings = theirs.into_iter().chain([mine]).filter(|opened| *opened);
        assert_eq!(openings.count(), 1);
        assert_eq!(circuit.state(&Still), State::Open);
    });
}

/// One probe succeeds and closes the circuit while another one fails. The failure opens the circuit, which then
/// was not closed, or it counts as the first failure of a closed circuit.
#[test]
fn a_late_failure_does_not_open_what_has_just_been_closed() {
    loom::model(|| {
        let config = Config {
            failure_threshold: 3,
            success_threshold: 1,
            timeout_ms: 0,
            ..Config::default()
        };
        let circuit = Arc::new(CircuitBreaker::new(Some(config), &Still).unwrap());
        circuit.force(true, &Still);
        for _ in 0..2 {
            circuit.check(&Still).unwrap();
        }
        let closer = {
            let circuit = Arc::clone(&circuit);
            thread::spawn(move || circuit.record_success(&Still))
        };
        let has_opened = circuit.record_failure(&Still);
        let has_closed = closer.join().unwrap();
        assert!(has_opened != has_closed);
        let failures = circuit.stats(&Still).failures;
        assert_eq!(failures, usize::from(has_closed));
    });
}

/// A sampled shard with room for so many messages. Its first segment of records exists, since loom does not see
/// its creation.
fn shard(threshold: u64) -> Arc<Admission> {
    let admission = Admission::new();
    admission.set_threshold(Threshold::Exactly(threshold), 0);
    send(&admission, 9, &AtomicU32::new(0));
    for _ in 0..3 {
        sample(&admission, |_| 0);
    }
    assert_eq!((admission.depth(), admission.active_receivers()), (0, 0));
    Arc::new(admission)
}

/// Counts a message to a receiver.
fn send(admission: &Admission, address: u64, kept: &AtomicU32) -> bool {
    let to = admission.receiver(address, kept);
    admission.admit(&to, &Sampling::new(100), || 0).wants_sample
}

/// Sends a message if there is room. Returns whether its sender is to request a sample.
fn route(admission: &Admission, address: u64) -> Option<bool> {
    let (kept, sampling) = (AtomicU32::new(0), Sampling::new(100));
    let mut to = admission.receiver(address, &kept);
    admission.check(&mut to, &sampling, || 0, || 0).ok()?;
    Some(admission.admit(&to, &sampling, || 0).wants_sample)
}

/// A pass over all receivers. Returns whether the next pass is due; `None` if it met another sampler.
fn sample(admission: &Admission, queued: impl Fn(u64) -> u64) -> Option<bool> {
    if admission.begin_pass(Pass::All, 0) == Begun::Busy {
        return None;
    }
    loop {
        let mut lengths = Vec::new();
        let taken = admission.take(false, |address| lengths.push(Some(queued(address))));
        lengths.reverse();
        match taken {
            Taken::Batch(number) => {
                admission.report(number, lengths, 0);
            }
            Taken::Done { is_due, .. } => return Some(is_due),
            Taken::Busy => return None,
        }
    }
}

/// A sender whose index may be stale in any way, concurrently with samplers that free the record: each admitted
/// message is charged exactly once. After samples that find the mailbox empty no charge is left, and before that
/// the depth is never less than the length of the mailbox.
#[test]
fn charges_are_neither_lost_nor_doubled() {
    loom::model(|| {
        let admission = shard(100);
        let queued = Arc::new(AtomicU64::new(0));
        let kept = Arc::new(AtomicU32::new(0));
        // The receiver was seen empty once, so the next sample frees its record.
        send(&admission, 1, &kept);
        sample(&admission, |_| 0);
        let sender = {
            let (admission, kept) = (Arc::clone(&admission), Arc::clone(&kept));
            let queued = Arc::clone(&queued);
            thread::spawn(move || {
                send(&admission, 1, &kept);
                queued.fetch_add(1, Ordering::AcqRel);
            })
        };
        sample(&admission, |_| queued.load(Ordering::Acquire));
        sender.join().unwrap();
        // Two samples more than those that may have run between admission and sending.
        for _ in 0..2 {
            sample(&admission, |_| queued.load(Ordering::Acquire));
        }
        let depth = admission.depth();
        assert!(depth <= 1, "counted {depth} times");
        assert!(depth == 1 || admission.active_receivers() == 0);
        for _ in 0..3 {
            sample(&admission, |_| 0);
        }
        assert_eq!((admission.depth(), admission.active_receivers()), (0, 0));
    });
}

/// Two senders to one process without a record, by two ids: it gets one record, or a second one that its sampler
/// frees.
#[test]
fn records_are_made_once() {
    loom::model(|| {
        let admission = shard(100);
        let senders = [(); 2].map(|()| {
            let admission = Arc::clone(&admission);
            thread::spawn(move || {
                send(&admission, 1, &AtomicU32::new(0));
            })
        });
        for sender in senders {
            sender.join().unwrap();
        }
        assert_eq!(admission.depth(), 2);
        assert_eq!(admission.active_receivers(), 1);
        for _ in 0..3 {
            sample(&admission, |_| 0);
        }
        assert_eq!((admission.depth(), admission.active_receivers()), (0, 0));
    });
}

/// The record of one process is freed and reused for another one while a sender to the former still has its index.
#[test]
fn a_record_that_changes_hands_keeps_its_charge() {
    loom::model(|| {
        let admission = shard(100);
        let kept = Arc::new(AtomicU32::new(0));
        send(&admission, 1, &kept);
        sample(&admission, |_| 0);
        let former = {
            let (admission, kept) = (Arc::clone(&admission), Arc::clone(&kept));
            thread::spawn(move || send(&admission, 1, &kept))
        };
        let later = {
            let admission = Arc::clone(&admission);
            thread::spawn(move || {
                sample(&admission, |_| 0);
                send(&admission, 2, &AtomicU32::new(0))
            })
        };
        former.join().unwrap();
        later.join().unwrap();
        // Both receivers have exited: all charges are returned, whichever record holds them.
        for _ in 0..3 {
            sample(&admission, |_| 0);
        }
        assert_eq!((admission.depth(), admission.active_receivers()), (0, 0));
    });
}

/// Two samplers of a shard sample the same receiver: one of the reports counts, or none.
#[test]
fn two_samplers_credit_once() {
    loom::model(|| {
        let admission = shard(100);
        let kept = AtomicU32::new(0);
        for _ in 0..3 {
            send(&admission, 1, &kept);
        }
        let other = {
            let admission = Arc::clone(&admission);
            thread::spawn(move || sample(&admission, |_| 1))
        };
        sample(&admission, |_| 1);
        other.join().unwrap();
        let depth = admission.depth();
        assert!(depth == 1 || depth == 3, "credited twice: {depth}");
    });
}

/// A receiver reports the messages that it has received while it is being sampled: they are credited once.
#[test]
fn what_a_receiver_says_counts_once() {
    loom::model(|| {
        let admission = shard(100);
        let kept = AtomicU32::new(0);
        for _ in 0..3 {
            send(&admission, 1, &kept);
        }
        let queued = Arc::new(AtomicU64::new(3));
        let receiver = {
            let (admission, queued) = (Arc::clone(&admission), Arc::clone(&queued));
            thread::spawn(move || {
                queued.fetch_sub(2, Ordering::AcqRel);
                admission.adjust(1, -2);
            })
        };
        sample(&admission, |_| queued.load(Ordering::Acquire));
        receiver.join().unwrap();
        // Credit that was lent is due back by the next batch.
        sample(&admission, |_| queued.load(Ordering::Acquire));
        assert_eq!(admission.depth(), 1);
    });
}

/// Messages arrive while the sampler of the shard pauses: one of the senders is told to request a sample, or the
/// sampler does not pause.
#[test]
fn no_wake_up_is_lost() {
    loom::model(|| {
        let admission = shard(100);
        let threads = [1, 2].map(|address| {
            let admission = Arc::clone(&admission);
            thread::spawn(move || send(&admission, address, &AtomicU32::new(0)))
        });
        let sleeps = admission.pause();
        let asked = threads.map(|thread| thread.join().unwrap());
        let asked = asked.into_iter().filter(|asked| *asked).count();
        assert!(asked <= 1, "asked twice");
        assert!(!sleeps || asked == 1, "it sleeps and nobody has asked");
    });
}

/// No wake-up is lost at the end of a pass.
#[test]
fn the_end_of_a_pass_loses_no_wake_up() {
    loom::model(|| {
        let admission = shard(4);
        let threads = [1, 2].map(|address| {
            let admission = Arc::clone(&admission);
            thread::spawn(move || route(&admission, address) == Some(true))
        });
        admission.begin_pass(Pass::Asked, 0);
        // Uses up both places of the reserve.
        admission.adjust(3, 1);
        let taken = admission.take(true, |_| ());
        let asked = threads.map(|thread| thread.join().unwrap());
        let is_due = matches!(taken, Taken::Done { is_due: true, .. });
        let next = (0..4).any(|_| route(&admission, 4) == Some(true));
        assert!(is_due || next || asked.contains(&true), "nobody has asked");
    });
}

/// A sender was told to request a sample and did not: exactly one of the senders an interval later is told.
#[test]
fn a_lost_request_is_made_again_once() {
    loom::model(|| {
        let admission = shard(100);
        assert!(admission.pause());
        assert!(send(&admission, 1, &AtomicU32::new(0)));
        let threads = [(); 2].map(|()| {
            let admission = Arc::clone(&admission);
            thread::spawn(move || {
                let (kept, sampling) = (AtomicU32::new(0), Sampling::new(100));
                let to = admission.receiver(1, &kept);
                admission.admit(&to, &sampling, || 101).wants_sample
            })
        });
        let asked = threads.map(|thread| thread.join().unwrap());
        let asked = asked.into_iter().filter(|asked| *asked).count();
        assert_eq!(asked, 1, "{asked} were told");
    });
}

/// No wake-up is lost while the threshold is changed, which makes the next message request a sample.
#[test]
fn a_new_threshold_loses_no_wake_up() {
    loom::model(|| {
        let admission = shard(100);
        assert!(admission.pause());
        let sender = {
            let admission = Arc::clone(&admission);
            thread::spawn(move || route(&admission, 1))
        };
        // A thread of its own saves one preemption of the limit.
        let changer = {
            let admission = Arc::clone(&admission);
            thread::spawn(move || admission.set_threshold(Threshold::Exactly(50), 0))
        };
        let asked = sender.join().unwrap() == Some(true);
        changer.join().unwrap();
        let next = route(&admission, 1) == Some(true);
        assert!(next || asked, "nobody has asked");
    });
}

/// The threshold is lowered while a pass ends, which sets when looks are requested next: they are before the shard is full,
/// by its new threshold.
#[test]
fn a_lower_threshold_has_looks_requested() {
    loom::model(|| {
        let admission = shard(100);
        admission.begin_pass(Pass::Asked, 0);
        let changer = {
            let admission = Arc::clone(&admission);
            thread::spawn(move || admission.set_threshold(Threshold::Exactly(8), 0))
        };
        let taken = admission.take(true, |_| ());
        changer.join().unwrap();
        let is_due = matches!(taken, Taken::Done { is_due: true, .. });
        let asked = (0..8).any(|_| route(&admission, 1) == Some(true));
        assert!(
            asked || is_due,
            "the shard is full, and nobody has requested looks"
        );
    });
}

/// Without another sample, no more messages are admitted than there is room for, plus one for each further caller
/// that was between the check and the count. One of them enters overload.
#[test]
fn a_full_shard_admits_no_more() {
    loom::model(|| {
        let admission = shard(2);
        let before = admission.admitted();
        let send = |address| {
            let admission = Arc::clone(&admission);
            move || {
                let (kept, sampling) = (AtomicU32::new(0), Sampling::new(100));
                let mut entered = 0;
                for _ in 0..2 {
                    let mut to = admission.receiver(address, &kept);
                    match admission.check(&mut to, &sampling, || 0, || 0) {
                        Ok(()) => {
                            admission.admit(&to, &sampling, || 0);
                        }
                        Err(overloaded) => entered += usize::from(overloaded.has_entered),
                    }
                }
                entered
            }
        };
        let other = thread::spawn(send(1));
        let entered = send(2)() + other.join().unwrap();
        let admitted = admission.admitted() - before;
        assert!((2..=3).contains(&admitted), "{admitted} admitted");
        assert_eq!(entered, usize::from(admission.is_overloaded()));
        assert_eq!(admission.depth(), admitted);
    });
}

/// An automatic threshold that is updated while another one is set does not bring the former one back.
#[test]
fn a_new_threshold_stays() {
    for (former, later) in [
        (Threshold::Auto, Threshold::Exactly(1)),
        (Threshold::Auto, Threshold::Off),
        (Threshold::Exactly(9), Threshold::Exactly(1)),
        (Threshold::Off, Threshold::Exactly(1)),
    ] {
        loom::model(move || {
            let admission = shard(2);
            admission.set_threshold(former, 1_000);
            let follower = {
                let admission = Arc::clone(&admission);
                thread::spawn(move || {
                    let (kept, sampling) = (AtomicU32::new(0), Sampling::new(100));
                    // Full by any threshold: the check updates the threshold before it refuses.
                    admission.adjust(1, 1 << 20);
                    let mut to = admission.receiver(1, &kept);
                    let _ = admission.check(&mut to, &sampling, || 0, || 2_000);
                })
            };
            admission.set_threshold(later, 1_000);
            follower.join().unwrap();
            let bound = if later == Threshold::Off {
                None
            } else {
                Some(1)
            };
            assert_eq!(admission.threshold(), bound);
            assert!(!admission.is_auto());
        });
    }
}

/// Writers of two stripes, and an owner that diverts them and then has the cells to itself: loom reports
/// any two at the same cell. A diverted writer writes nothing, and a writer after the end of the
/// diversion passes.
#[test]
fn the_owner_of_a_diversion_is_alone() {
    use loom::cell::UnsafeCell;

    loom::model(|| {
        let diversion = Arc::new(Diversion::new());
        let cells = Arc::new([UnsafeCell::new(0_u32), UnsafeCell::new(0)]);
        let write = |stripe: usize| {
            let (diversion, cells) = (Arc::clone(&diversion), Arc::clone(&cells));
            move || {
                let passage = diversion.enter(stripe as u64);
                if passage.is_some() {
                    // SAFETY: only the owner also accesses this cell, and then it is alone.
                    cells[stripe].with_mut(|cell| unsafe { *cell += 1 });
                }
                passage.is_some()
            }
        };
        let changes = Diverted {
            changes: true,
            ..Diverted::default()
        };
        let writers = [thread::spawn(write(0)), thread::spawn(write(1))];
        while !diversion.divert(changes) {
            thread::yield_now();
        }
        let seen: u32 = cells
            .iter()
            // SAFETY: all writers have been diverted or have left.
            .map(|cell| cell.with_mut(|cell| unsafe { *cell }))
            .sum();
        let passed: u32 = writers
            .into_iter()
            .map(|writer| u32::from(writer.join().unwrap()))
            .sum();
        assert_eq!(seen, passed);
        diversion.divert(Diverted::default());
        assert!(write(0)());
    });
}

/// An entry is removed from a structure while look-ups are diverted, and inserted again before the diversion
/// ends. A look-up that was not diverted and finds nothing notices the diversion.
#[test]
fn a_look_up_that_finds_nothing_notices_the_diversion() {
    loom::model(|| {
        let diversion = Arc::new(Diversion::new());
        let entry = Arc::new(AtomicU64::new(1));
        let lookup = {
            let (diversion, entry) = (Arc::clone(&diversion), Arc::clone(&entry));
            thread::spawn(move || {
                let sign = diversion.sign();
                if sign.diverts_lookups() {
                    return;
                }
                if entry.load(Ordering::Acquire) == 0 {
                    assert!(!diversion.is_still(sign));
                }
            })
        };
        diversion.divert(Diverted {
            changes: true,
            lookups: true,
            routes: true,
        });
        entry.store(0, Ordering::Release);
        entry.store(2, Ordering::Release);
        diversion.divert(Diverted::default());
        lookup.join().unwrap();
    });
}

fn call_breaker(config: call_breaker::Config) -> Arc<CallBreaker> {
    Arc::new(CallBreaker::new(config, &Still).unwrap())
}

fn calls() -> call_breaker::Config {
    call_breaker::Config {
        failure_threshold: 100,
        success_threshold: 1,
        timeout_ms: 1_000,
        window_size: 2,
        failure_rate_threshold: 1.0,
        probe_limit: 1,
    }
}

/// Makes one call. Returns the transitions that it has made.
fn call(breaker: &CallBreaker, outcome: Outcome) -> Vec<State> {
    let mut changes = Vec::new();
    if let Ok(permit) = breaker.enter(&Still, None, &mut changes) {
        breaker.leave(permit, outcome, &Still, &mut changes);
    }
    changes
}

/// Exactly one of two failures that fill the window, or are the threshold in a row, opens the breaker.
#[test]
fn call_breaker_is_opened_by_one_of_two_failures() {
    for failure_threshold in [2, 100] {
        loom::model(move || {
            let breaker = call_breaker(call_breaker::Config {
                failure_threshold,
                ..calls()
            });
            let other = {
                let breaker = Arc::clone(&breaker);
                thread::spawn(move || call(&breaker, Outcome::Failure))
            };
            let mut changes = call(&breaker, Outcome::Failure);
            changes.extend(other.join().unwrap());
            assert_eq!(changes, [State::Open]);
            assert_eq!(breaker.state(&Still, &mut changes), State::Open);
        });
    }
}

/// An outcome from before a reset decides nothing after it, however the two overlap: afterwards one failure
/// does not fill a window of two.
#[test]
fn call_breaker_forgets_outcomes_of_before_a_reset() {
    loom::model(|| {
        let breaker = call_breaker(calls());
        let mut changes = Vec::new();
        let permit = breaker.enter(&Still, None, &mut changes).unwrap();
        let other = {
            let breaker = Arc::clone(&breaker);
            thread::spawn(move || {
                let mut changes = Vec::new();
                breaker.leave(permit, Outcome::Failure, &Still, &mut changes);
                assert!(changes.is_empty());
            })
        };
        breaker.reset(&Still, &mut changes);
        changes.extend(call(&breaker, Outcome::Failure));
        other.join().unwrap();
        assert!(changes.is_empty());
        assert_eq!(breaker.stats(&Still, &mut changes).failure_rate, 1.0);
        assert_eq!(breaker.state(&Still, &mut changes), State::Closed);
        assert_eq!(call(&breaker, Outcome::Failure), [State::Open]);
    });
}

/// In the half-open state never more calls than the limit hold a slot, and the call whose outcome closes the
/// breaker does so once.
#[test]
fn call_breaker_bounds_its_probes() {
    loom::model(|| {
        let breaker = call_breaker(calls());
        let mut changes = Vec::new();
        breaker.force(State::Open, &Still, &mut changes);
        breaker.force(State::HalfOpen, &Still, &mut changes);
        let enter = |breaker: &CallBreaker| breaker.enter(&Still, None, &mut Vec::new());
        let other = {
            let breaker = Arc::clone(&breaker);
            thread::spawn(move || enter(&breaker).ok())
        };
        let mine = enter(&breaker).ok();
        let permits: Vec<_> = [mine, other.join().unwrap()]
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(permits.len(), 1);
        assert_eq!(breaker.stats(&Still, &mut changes).probes, 1);
        changes.clear();
        breaker.leave(permits[0], Outcome::Success, &Still, &mut changes);
        assert_eq!(changes, [State::Closed]);
        assert_eq!(breaker.stats(&Still, &mut changes).probes, 0);
    });
}

/// A caller may reclaim an overdue slot while the call that holds it ends: never two calls hold it, and the
/// outcome of the overdue call is counted once.
#[test]
fn call_breaker_passes_an_overdue_slot_on_once() {
    loom::model(|| {
        let breaker = call_breaker(call_breaker::Config {
            success_threshold: 2,
            ..calls()
        });
        let mut changes = Vec::new();
        breaker.force(State::Open, &Still, &mut changes);
        breaker.force(State::HalfOpen, &Still, &mut changes);
        let overdue = breaker.enter(&Still, Some(0), &mut changes).unwrap();
        changes.clear();
        let other = {
            let breaker = Arc::clone(&breaker);
            thread::spawn(move || {
                let mut changes = Vec::new();
                breaker.leave(overdue, Outcome::Success, &Still, &mut changes);
                changes
            })
        };
        let next = breaker.enter(&Still, None, &mut changes);
        changes.extend(other.join().unwrap());
        assert!(changes.is_empty());
        let stats = breaker.stats(&Still, &mut changes);
        assert_eq!(stats.probes, usize::from(next.is_ok()));
        assert_eq!(stats.total_successes, 1);
    });
}

/// A success ends a row of failures, or comes before the concurrent failure: the row is never shorter than the
/// number of failures after the success.
#[test]
fn call_breaker_counts_rows() {
    loom::model(|| {
        let breaker = call_breaker(call_breaker::Config {
            failure_threshold: 2,
            window_size: 10,
            ..calls()
        });
        assert!(call(&breaker, Outcome::Failure).is_empty());
        let other = {
            let breaker = Arc::clone(&breaker);
            thread::spawn(move || call(&breaker, Outcome::Success))
        };
        let opened = !call(&breaker, Outcome::Failure).is_empty();
        assert!(other.join().unwrap().is_empty());
        let mut changes = Vec::new();
        let stats = breaker.stats(&Still, &mut changes);
        let row = stats.consecutive_failures;
        assert_eq!(
            stats.state,
            if opened { State::Open } else { State::Closed }
        );
        assert!(if opened { row == 2 } else { row <= 1 });
    });
}

/// One id of a map, which is one word here: the lease, and whether the insertion was expected. Leases are never used
/// again.
struct Announced {
    announcements: Announcements<u64>,
    current: AtomicU64,
    /// By word.
    phases: [Phase; 6],
}

impl Announced {
    /// With this connection, or none (0), registered while nobody had an interest.
    fn with(lease: u64) -> Arc<Self> {
        let announcements = Announcements::of_model();
        // loom does not see that the first interest allocates.
        announcements.set(Interest::All, true);
        announcements.set(Interest::All, false);
        Arc::new(Self {
            announcements,
            current: AtomicU64::new(lease * 2),
            phases: array::from_fn(|word| Phase::new(word % 2 == 1)),
        })
    }

    fn announcement(&self, change: Change, word: u64) -> Announcement<u64> {
        let (address, lease) = (0, word / 2);
        Announcement {
            change,
            shard: 0,
            kind: 0,
            bytes: Box::default(),
            entry: Entry { address, lease },
        }
    }

    fn join(&self, word: u64) {
        self.announcements.join(
            &self.phases[word as usize],
            || self.current.load(Ordering::Acquire) == word,
            || self.announcement(Change::Joined, word),
        );
    }

    fn register(&self, lease: u64) {
        let is_expected = self.announcements.is_expected(0, 0);
        let word = lease * 2 + u64::from(is_expected);
        let inserted = self
            .current
            .compare_exchange(0, word, Ordering::AcqRel, Ordering::Acquire);
        if inserted.is_ok() && (is_expected || self.announcements.is_expected_behind(0, 0)) {
            match self.current.load(Ordering::Acquire) {
                0 => {}
                found => self.join(found),
            }
        }
    }

    fn remove(&self) {
        let word = self.current.load(Ordering::Acquire);
        if word == 0 {
            return;
        }
        let leaving: Leaving<'_, u64> =
            self.announcements
                .leaving(0, 0, &self.phases[word as usize], || self.join(word));
        let removed = self
            .current
            .compare_exchange(word, 0, Ordering::AcqRel, Ordering::Acquire);
        if removed.is_ok() {
            self.announcements
                .left(leaving, 0, 0, || self.announcement(Change::Left, word));
        }
    }

    /// Calls `each` with what is ready and is before `until`. Returns the losses and the position.
    fn read(&self, until: u64, mut each: impl FnMut(Change, u64)) -> (u64, u64) {
        let progress = self.announcements.read(10, until, |announcement| {
            each(announcement.change, announcement.entry.lease);
            ControlFlow::Continue(())
        });
        progress.map_or((0, 0), |progress| (progress.lost, progress.position))
    }

    fn held(&self) -> u64 {
        self.current.load(Ordering::Acquire) / 2
    }

    fn set(&self, is_on: bool) -> u64 {
        self.announcements.set(Interest::All, is_on)
    }
}

/// Makes two changes, each in a thread of its own.
fn changing(
    announced: &Arc<Announced>,
    changes: [fn(&Announced); 2],
) -> Vec<thread::JoinHandle<()>> {
    let spawned = changes.map(|change| {
        let announced = Arc::clone(announced);
        thread::spawn(move || change(&announced))
    });
    spawned.into()
}

/// Subscribes, and looks up the id when all that came before has been read. When the threads have come to their end, the
/// subscriber knows the state, or of a loss.
fn subscriber_knows(announced: &Announced, threads: Vec<thread::JoinHandle<()>>) {
    let since = announced.set(true);
    let (mut early, position) = announced.read(since, |_, _| {});
    let mut threads = Some(threads);
    if position < since {
        for thread in threads.take().unwrap() {
            thread.join().unwrap();
        }
        early += announced.read(since, |_, _| {}).0;
    }
    let mut state = announced.held();
    for thread in threads.into_iter().flatten() {
        thread.join().unwrap();
    }
    let (late, _) = announced.read(u64::MAX, |change, lease| {
        state = if change == Change::Joined { lease } else { 0 };
    });
    assert!(
        early + late > 0 || state == announced.held(),
        "a change was missed"
    );
}

/// A subscription begins while a connection leaves and another one joins.
#[test]
fn a_subscriber_misses_no_change() {
    loom::model(|| {
        let announced = Announced::with(1);
        let threads = changing(&announced, [|it| it.remove(), |it| it.register(2)]);
        subscriber_knows(&announced, threads);
    });
}

/// A subscription ends and another one begins while a connection joins and leaves: the second subscriber is not told of
/// a connection that was removed before.
#[test]
fn a_subscriber_is_told_of_nothing_out_of_date() {
    loom::model(|| {
        let announced = Announced::with(0);
        announced.set(true);
        let threads = changing(&announced, [|it| it.register(1), |it| it.remove()]);
        announced.set(false);
        subscriber_knows(&announced, threads);
    });
}

/// Joins and leaves alternate, and the last one is the state.
#[test]
fn changes_are_announced_in_order() {
    loom::model(|| {
        let announced = Announced::with(0);
        announced.set(true);
        let threads = changing(&announced, [|it| it.register(1), |it| it.remove()]);
        announced.remove();
        announced.register(2);
        for thread in threads {
            thread.join().unwrap();
        }
        let mut state = 0;
        let (lost, _) = announced.read(u64::MAX, |change, lease| match change {
            Change::Joined => {
                assert_eq!(state, 0, "joined twice");
                state = lease;
            }
            Change::Left => {
                assert_eq!(state, lease, "left without having joined");
                state = 0;
            }
        });
        assert!(lost > 0 || state == announced.held());
    });
}

/// A reader that has found nothing more to read is woken for what is published then.
#[test]
fn a_reader_is_woken_for_what_it_has_not_found() {
    loom::model(|| {
        let sequence = Arc::new(Sequence::new(2));
        let producers = [1u8, 2].map(|value| {
            let sequence = Arc::clone(&sequence);
            thread::spawn(move || {
                match sequence.ticket() {
                    Some(ticket) if value == 1 => ticket.publish(value),
                    Some(ticket) => drop(ticket),
                    None => sequence.lose(),
                }
                sequence.take_wake()
            })
        });
        let found = sequence.read(5, u64::MAX, |_| ControlFlow::Continue(()));
        let woken = producers
            .map(|producer| producer.join().unwrap())
            .contains(&true);
        let found = found.unwrap();
        assert!(found.has_more || woken || found.position == sequence.next());
    });
}

/// Without room values are lost. The loss is reported behind those that were published before.
#[test]
fn losses_are_reported_in_order() {
    loom::model(|| {
        let sequence = Arc::new(Sequence::new(1));
        let ticket = sequence.ticket().unwrap();
        let producer = {
            let sequence = Arc::clone(&sequence);
            thread::spawn(move || match sequence.ticket() {
                Some(ticket) => ticket.publish(2u8),
                None => sequence.lose(),
            })
        };
        let mut values = Vec::new();
        let mut lost = 0;
        let mut read = |values: &mut Vec<u8>| {
            let progress = sequence
                .read(5, u64::MAX, |value| {
                    values.push(*value);
                    ControlFlow::Continue(())
                })
                .unwrap();
            if progress.lost > 0 {
                assert_eq!(*values, [1]);
            }
            lost += progress.lost;
        };
        read(&mut values);
        ticket.publish(1);
        read(&mut values);
        producer.join().unwrap();
        read(&mut values);
        assert_eq!(values.len() as u64 + lost, 2);
    });
}

fn message_store<T>(capacity: u64) -> Arc<MessageStore<Counted<T>>> {
    let bounds = Bounds {
        capacity,
        max_bytes: 100,
    };
    Arc::new(MessageStore::new(bounds).unwrap())
}

/// A consumer drains until the store is empty, and then sleeps. What it has not seen by then, one of the producers wakes
/// it for.
#[test]
fn no_message_stays_in_a_store_unannounced() {
    loom::model(|| {
        let store = message_store(10);
        // The first message wakes: this consumer is awake.
        assert_eq!(store.push(Counted(0, 1)), Ok(true));
        let threads = [1, 2].map(|n| {
            let store = Arc::clone(&store);
            thread::spawn(move || store.push(Counted(n, 1)).unwrap())
        });
        let mut seen = Vec::new();
        loop {
            let (messages, is_empty) = drained(&store, 3);
            seen.extend(messages);
            if is_empty {
                break;
            }
        }
        let wakes = threads.map(|thread| thread.join().unwrap());
        let (late, _) = drained(&store, 10);
        assert!(
            late.is_empty() || wakes.contains(&true),
            "{late:?} came after {seen:?}, and nobody has woken the consumer"
        );
        seen.extend(late);
        seen.sort_unstable();
        assert_eq!((seen, store.size()), (vec![0, 1, 2], (0, 0)));
    });
}

/// Two producers, room for one: one of them is refused, unless the consumer has made room.
#[test]
fn a_store_never_holds_more_than_its_capacity() {
    loom::model(|| {
        let store = message_store(1);
        let threads = [1, 2].map(|n| {
            let store = Arc::clone(&store);
            thread::spawn(move || store.push(Counted(n, 1)))
        });
        let (seen, _) = drained(&store, 1);
        assert!(store.size().0 <= 1);
        let stored = threads
            .map(|thread| thread.join().unwrap())
            .into_iter()
            .filter(|pushed| match pushed {
                Ok(_) => true,
                Err(error) => {
                    assert_eq!(*error, PushError::Full);
                    false
                }
            })
            .count();
        let (late, _) = drained(&store, 10);
        assert_eq!(seen.len() + late.len(), stored);
        assert!((1..=1 + seen.len()).contains(&stored));
    });
}

/// A store is closed while two messages come: afterwards it holds none.
#[test]
fn a_store_that_is_closed_frees_late_messages() {
    loom::model(|| {
        let store = message_store(10);
        let alive = std::sync::Arc::new(());
        let threads = [(); 2].map(|()| {
            let (store, alive) = (Arc::clone(&store), std::sync::Arc::clone(&alive));
            thread::spawn(move || store.push(Counted(alive, 1)))
        });
        store.close();
        store.empty();
        for thread in threads {
            let _ = thread.join().unwrap();
        }
        assert_eq!(
            (std::sync::Arc::strong_count(&alive), store.size()),
            (1, (0, 0))
        );
    });
}

/// A process exits while a message to it is charged, and while its mailbox is sampled. Nothing stays charged, and nothing is
/// returned twice: a shard that had room for more than its threshold would never be full again.
#[test]
fn the_charge_of_an_exited_process_is_returned_once() {
    loom::model(|| {
        let admission = shard(100);
        let kept = Arc::new(AtomicU32::new(0));
        send(&admission, 1, &kept);
        let threads = [
            {
                let (admission, kept) = (Arc::clone(&admission), Arc::clone(&kept));
                thread::spawn(move || {
                    send(&admission, 1, &kept);
                })
            },
            {
                let admission = Arc::clone(&admission);
                thread::spawn(move || admission.ended(1))
            },
        ];
        sample(&admission, |_| 0);
        for thread in threads {
            thread.join().unwrap();
        }
        for _ in 0..2 {
            sample(&admission, |_| 0);
        }
        assert_eq!((admission.depth(), admission.active_receivers()), (0, 0));
        // Not below zero either.
        send(&admission, 2, &AtomicU32::new(0));
        assert_eq!((admission.depth(), admission.active_receivers()), (1, 1));
    });
}

/// A consumer leaves its store while a sender pushes. What the store refuses, the sender sends to the consumer's mailbox: no
/// sooner than the consumer has everything that the store has accepted before.
#[test]
fn a_store_that_is_left_keeps_the_order() {
    loom::model(|| {
        let store = message_store(10);
        let mailbox = Arc::new([(); 2].map(|()| AtomicBool::new(false)));
        let sender = {
            let (store, mailbox) = (Arc::clone(&store), Arc::clone(&mailbox));
            thread::spawn(move || {
                for n in [0, 1] {
                    match store.push(Counted(n, 1)) {
                        Ok(_) => {}
                        Err(error) => {
                            assert_eq!(error, PushError::Closed);
                            mailbox[n].store(true, Ordering::Release);
                        }
                    }
                }
            })
        };
        store.leave();
        let (mut seen, _) = drained(&store, 10);
        let sent = [0, 1].map(|n| mailbox[n].load(Ordering::Acquire));
        if sent.contains(&true) {
            assert!(store.is_closed());
            let (late, _) = drained(&store, 10);
            assert_eq!(late, vec![], "in the store, after {sent:?} in the mailbox");
        }
        sender.join().unwrap();
        // A wake-up, if it has not been found empty.
        let (late, is_empty) = drained(&store, 10);
        assert!(is_empty && store.is_closed());
        seen.extend(late);
        let sent = [0, 1].map(|n| mailbox[n].load(Ordering::Acquire));
        seen.extend((0..2).filter(|n| sent[*n]));
        assert_eq!(seen, vec![0, 1]);
    });
}
