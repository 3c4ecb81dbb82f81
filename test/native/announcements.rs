//! Announcements of joins and leaves: what is announced, in which order, and that a subscriber misses nothing, under
//! concurrent changes and subscriptions.
#![cfg(not(loom))]

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use erlmcp_core::clock::Clock;
use erlmcp_core::registry::{Change, Delivery, Interest, Limits, Namespace, Registry};
use erlmcp_core::sequence::Sequence;

const CONNECTION: Namespace = Namespace::Connection;
const ALL: u64 = u64::MAX;

struct Still;

impl Clock for Still {
    fn now_ns(&self) -> u64 {
        1_000_000_000
    }
}

fn registry() -> Registry<u64> {
    Registry::new(Limits::new(4, 1_000_000, 100).unwrap(), &Still)
}

/// Registers an id in the shard of its first byte. The lease is also the address.
fn register(registry: &Registry<u64>, id: &str, lease: u64) -> bool {
    let shard = u16::from(id.as_bytes()[0]) % 4;
    registry
        .register(
            CONNECTION,
            registry.id(0, id.as_bytes()),
            shard,
            lease,
            None,
            |_| lease,
        )
        .is_ok()
}

fn replace(registry: &Registry<u64>, id: &str, lease: u64) -> Option<u64> {
    let shard = u16::from(id.as_bytes()[0]) % 4;
    registry
        .replace_connection(registry.id(0, id.as_bytes()), shard, lease, |_| lease)
        .unwrap()
        .map(|entry| entry.lease)
}

fn remove(registry: &Registry<u64>, id: &str) -> Option<u64> {
    registry
        .remove(CONNECTION, &registry.id(0, id.as_bytes()))
        .map(|entry| entry.lease)
}

fn held(registry: &Registry<u64>, id: &str) -> Option<u64> {
    registry.address(CONNECTION, &registry.id(0, id.as_bytes()))
}

fn watch(registry: &Registry<u64>, id: &str, is_on: bool) -> u64 {
    let id = registry.id(0, id.as_bytes());
    registry.announcements().set(Interest::Id(id), is_on)
}

type Event = (Change, String, u64);

/// Reads all that is ready and is before `until`. Returns the events, the losses, and the position.
fn read(registry: &Registry<u64>, until: u64) -> (Vec<Event>, u64, u64) {
    let (mut events, mut lost) = (Vec::new(), 0);
    loop {
        let progress = registry
            .announcements()
            .read(100, until, |announcement| {
                let id = String::from_utf8(announcement.bytes.to_vec()).unwrap();
                events.push((announcement.change, id, announcement.entry.lease));
                ControlFlow::Continue(())
            })
            .expect("nobody else reads");
        lost += progress.lost;
        if !progress.has_more || progress.position == until {
            return (events, lost, progress.position);
        }
    }
}

fn joined(id: &str, lease: u64) -> Event {
    (Change::Joined, id.into(), lease)
}

fn left(id: &str, lease: u64) -> Event {
    (Change::Left, id.into(), lease)
}

#[test]
fn what_nobody_expects_is_not_announced() {
    let registry = registry();
    assert!(register(&registry, "a", 1));
    registry.announcements().set(Interest::Shard(1), true);
    watch(&registry, "b", true);
    registry.announcements().set(Interest::Shard(1), false);
    watch(&registry, "b", false);
    assert_eq!(registry.announcements().interests(), 0);
    assert!(register(&registry, "b", 2));
    assert_eq!(remove(&registry, "a"), Some(1));
    assert_eq!(read(&registry, ALL), (vec![], 0, 0));
}

#[test]
fn each_change_is_announced_once() {
    let registry = registry();
    registry.announcements().set(Interest::All, true);
    watch(&registry, "a", true);
    assert!(register(&registry, "a", 1));
    assert!(!register(&registry, "a", 2));
    assert_eq!(replace(&registry, "a", 3), Some(1));
    assert_eq!(replace(&registry, "b", 4), None);
    assert_eq!(remove(&registry, "a"), Some(3));
    assert_eq!(remove(&registry, "a"), None);
    let expected = vec![
        joined("a", 1),
        left("a", 1),
        joined("a", 3),
        joined("b", 4),
        left("a", 3),
    ];
    let (events, lost, _) = read(&registry, ALL);
    assert_eq!((events, lost), (expected, 0));
}

/// A connection that was registered before the first interest is announced only when it leaves.
#[test]
fn interests_select_ids_and_shards() {
    let registry = registry();
    assert!(register(&registry, "a", 1));
    watch(&registry, "a", true);
    // "d" and "h" are in shard 0.
    registry.announcements().set(Interest::Shard(0), true);
    for (id, lease) in [("b", 2), ("d", 3), ("h", 4)] {
        assert!(register(&registry, id, lease));
    }
    for id in ["a", "b", "d"] {
        assert!(remove(&registry, id).is_some());
    }
    let expected = vec![joined("d", 3), joined("h", 4), left("a", 1), left("d", 3)];
    assert_eq!(read(&registry, ALL).0, expected);
    registry.announcements().clear();
    assert_eq!(registry.announcements().interests(), 0);
    assert!(remove(&registry, "h").is_some());
    assert_eq!(read(&registry, ALL).0, vec![]);
}

/// Without room changes are counted, and the count comes behind what was announced before.
#[test]
fn without_room_losses_are_counted() {
    let registry = registry();
    registry.announcements().set(Interest::All, true);
    let mut changes = 0;
    while changes < 200_000 {
        assert!(register(&registry, "a", changes));
        remove(&registry, "a");
        changes += 2;
    }
    let (events, lost, _) = read(&registry, ALL);
    assert_eq!(events.len() as u64 + lost, changes);
    assert!(lost > 0);
    // There is room again.
    assert!(register(&registry, "a", 7));
    let (events, lost, _) = read(&registry, ALL);
    assert_eq!((events, lost), (vec![joined("a", 7)], 0));
}

#[test]
fn a_reader_is_woken_once() {
    let registry = registry();
    let announcements = registry.announcements();
    announcements.set(Interest::All, true);
    let _ = read(&registry, ALL);
    assert!(!announcements.take_wake());
    assert!(register(&registry, "a", 1));
    assert!(announcements.take_wake());
    assert!(register(&registry, "b", 1));
    assert!(!announcements.take_wake());
    assert_eq!(read(&registry, ALL).0.len(), 2);
    remove(&registry, "a");
    assert!(announcements.take_wake());
}

/// The values behind a ticket that is held wait for it.
#[test]
fn tickets_are_read_in_order() {
    let sequence = Sequence::new(3);
    let read = || {
        let mut values = Vec::new();
        let progress = sequence.read(10, ALL, |value| {
            values.push(*value);
            ControlFlow::Continue(())
        });
        (values, progress.unwrap())
    };
    let (first, second, third) = (sequence.ticket(), sequence.ticket(), sequence.ticket());
    assert!(sequence.ticket().is_none());
    sequence.lose();
    third.unwrap().publish(3);
    second.unwrap().publish(2);
    let (values, progress) = read();
    assert_eq!((values, progress.lost), (vec![], 0));
    assert!(!progress.has_more);
    first.unwrap().publish(1);
    assert!(sequence.take_wake());
    let (values, progress) = read();
    assert_eq!(
        (values, progress.lost, progress.position),
        (vec![1, 2, 3], 1, 3)
    );
    drop(sequence.ticket());
    sequence.ticket().unwrap().publish(5);
    assert_eq!(read().0, vec![5]);
}

/// A value at which the reader breaks off stays.
#[test]
fn a_reader_may_break_off() {
    let sequence = Sequence::new(3);
    sequence.ticket().unwrap().publish(1);
    let progress = sequence.read(10, ALL, |_| ControlFlow::Break(())).unwrap();
    assert!(progress.has_more);
    assert_eq!(progress.position, 0);
    let progress = sequence
        .read(10, ALL, |value| {
            assert_eq!(*value, 1);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(progress.position, 1);
}

/// A change of one of a few ids, chosen at random.
fn change_something(registry: &Registry<u64>, ids: &[&str], random: &mut u64, leases: &AtomicU64) {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    let id = ids[(*random >> 32) as usize % ids.len()];
    let lease = leases.fetch_add(1, Ordering::Relaxed);
    match *random % 6 {
        0 | 1 => _ = register(registry, id, lease),
        2 => _ = replace(registry, id, lease),
        3 => _ = remove(registry, id),
        // Written anew, which is no change.
        4 => {
            if let Some(lease) = held(registry, id) {
                let id = registry.id(0, id.as_bytes());
                registry.exchange_lease(
                    CONNECTION,
                    &id,
                    |held| *held == lease,
                    lease,
                    Delivery::Single,
                );
            }
        }
        _ => {
            if let Some(lease) = held(registry, id) {
                let id = registry.id(0, id.as_bytes());
                registry.remove_exact(CONNECTION, &id, |held| *held == lease);
            }
        }
    }
}

const THREADS: u64 = 4;
const IDS: [&str; 3] = ["a", "b", "long enough to be stored apart from the key"];

/// Of each id, joins and leaves alternate, each leave is that of the last join, and the last event is the state.
#[test]
fn changes_of_an_id_are_announced_in_order() {
    let (registry, leases) = (registry(), AtomicU64::new(1));
    registry.announcements().set(Interest::All, true);
    let mut states: HashMap<String, u64> = HashMap::new();
    let mut number = 0;
    for round in 0..40 {
        let barrier = Barrier::new(THREADS as usize);
        thread::scope(|scope| {
            for thread in 1..=THREADS {
                let (registry, leases, barrier) = (&registry, &leases, &barrier);
                scope.spawn(move || {
                    let mut random = thread * 7_919 + round * 104_729;
                    barrier.wait();
                    for _ in 0..2_000 {
                        change_something(registry, &IDS, &mut random, leases);
                    }
                });
            }
        });
        let (events, lost, _) = read(&registry, ALL);
        assert_eq!(lost, 0);
        number += events.len();
        for (change, id, lease) in events {
            match change {
                Change::Joined => assert_eq!(states.insert(id, lease), None),
                Change::Left => assert_eq!(states.remove(&id), Some(lease)),
            }
        }
        for id in IDS {
            assert_eq!(states.get(id).copied(), held(&registry, id));
        }
    }
    assert!(number > 10_000, "{number} events");
}

/// Subscribers that begin and end at any time, and look up their id once: what they have heard is the state in the end.
#[test]
fn a_subscriber_misses_nothing() {
    let (registry, leases) = (registry(), AtomicU64::new(1));
    let (mut with_events, mut with_losses) = (0, 0);
    for round in 0..3_000 {
        let barrier = Barrier::new(THREADS as usize + 2);
        let is_over = AtomicBool::new(false);
        let (mut state, mut lost) = (None, 0);
        thread::scope(|scope| {
            for thread in 1..=THREADS {
                let (registry, leases, barrier) = (&registry, &leases, &barrier);
                scope.spawn(move || {
                    let mut random = thread * 7_919 + round * 104_729;
                    barrier.wait();
                    for _ in 0..30 {
                        change_something(registry, &["a", "b"], &mut random, leases);
                    }
                });
            }
            // Others come and go.
            scope.spawn(|| {
                barrier.wait();
                while !is_over.load(Ordering::Relaxed) {
                    registry.announcements().set(Interest::All, true);
                    registry.announcements().set(Interest::All, false);
                }
            });
            barrier.wait();
            let since = watch(&registry, "a", true);
            while read(&registry, since).2 < since {
                thread::yield_now();
            }
            state = held(&registry, "a");
            let (events, lost_early, _) = read(&registry, ALL);
            lost += lost_early;
            apply(&mut state, &events);
            is_over.store(true, Ordering::Relaxed);
        });
        let (events, lost_late, _) = read(&registry, ALL);
        lost += lost_late;
        apply(&mut state, &events);
        with_events += u64::from(!events.is_empty());
        with_losses += u64::from(lost > 0);
        if lost == 0 {
            assert_eq!(state, held(&registry, "a"), "round {round}");
        }
        watch(&registry, "a", false);
        assert_eq!(registry.announcements().interests(), 0);
    }
    assert!(with_events > 100, "{with_events} rounds with events");
    assert!(with_losses < 2_900, "{with_losses} rounds with losses");
}

fn apply(state: &mut Option<u64>, events: &[Event]) {
    for (change, id, lease) in events {
        if id == "a" {
            *state = (*change == Change::Joined).then_some(*lease);
        }
    }
}
