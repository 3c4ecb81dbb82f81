//! The message store against a model, and under contention.
#![cfg(not(loom))]

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use erlmcp_core::message_store::{Bounds, MessageStore, PushError};
use proptest::prelude::*;

use contention::until_contended;
use counted::{Counted, drained};

#[path = "contention.rs"]
mod contention;
#[path = "counted.rs"]
mod counted;

fn store<T>(capacity: u64, max_bytes: u64) -> MessageStore<Counted<T>> {
    MessageStore::new(Bounds {
        capacity,
        max_bytes,
    })
    .unwrap()
}

#[test]
fn bounds_are_checked() {
    for (capacity, max_bytes, are_valid) in [
        (1, 1, true),
        (Bounds::MAX_CAPACITY, Bounds::MAX_BYTES, true),
        (0, 1, false),
        (1, 0, false),
        (Bounds::MAX_CAPACITY + 1, 1, false),
        (1, Bounds::MAX_BYTES + 1, false),
    ] {
        let bounds = Bounds {
            capacity,
            max_bytes,
        };
        assert_eq!(
            MessageStore::<Counted<()>>::new(bounds).is_some(),
            are_valid,
            "{bounds:?}"
        );
    }
}

#[derive(Debug, Clone)]
enum Step {
    Push(u64),
    Drain(usize),
    /// Takes one message and stops, whatever is left.
    Break,
    Leave,
    Stay,
    Close,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0u64..40).prop_map(Step::Push),
        3 => (0usize..6).prop_map(Step::Drain),
        1 => Just(Step::Break),
        1 => Just(Step::Leave),
        1 => Just(Step::Stay),
        1 => Just(Step::Close),
    ];
    proptest::collection::vec(step, 0..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 5 } else { 2_000 }))]

    /// One thread: first in, first out; refused exactly beyond the bounds; the first push after an empty drain wakes. A
    /// store that is left is closed as soon as it is found empty.
    #[test]
    fn behaves_as_a_bounded_queue(steps in steps(), capacity in 1u64..8, max_bytes in 1u64..100) {
        let store = store(capacity, max_bytes);
        let mut model: VecDeque<(usize, u64)> = VecDeque::new();
        let (mut is_armed, mut is_leaving, mut is_closed) = (true, false, false);
        for (n, step) in steps.into_iter().enumerate() {
            match step {
                Step::Push(bytes) => {
                    let held: u64 = model.iter().map(|(_, bytes)| bytes).sum();
                    let expected = if is_closed {
                        Err(PushError::Closed)
                    } else if bytes > max_bytes {
                        Err(PushError::TooLarge)
                    } else if model.len() as u64 == capacity || held + bytes > max_bytes {
                        Err(PushError::Full)
                    } else {
                        model.push_back((n, bytes));
                        Ok(std::mem::take(&mut is_armed))
                    };
                    prop_assert_eq!(store.check(bytes), expected.map(|_| ()));
                    prop_assert_eq!(store.push(Counted(n, bytes)), expected);
                }
                Step::Drain(max) => {
                    let taken = max.min(model.len());
                    let expected: Vec<usize> = model.drain(..taken).map(|(n, _)| n).collect();
                    let is_empty = taken < max;
                    is_armed |= is_empty;
                    is_closed |= is_empty && is_leaving;
                    prop_assert_eq!(drained(&store, max), (expected, is_empty));
                }
                Step::Break => {
                    let expected = model.pop_front().map(|(n, _)| n);
                    is_armed |= expected.is_none();
                    is_closed |= expected.is_none() && is_leaving;
                    let mut taken = None;
                    let is_empty = store.drain(usize::MAX, |Counted(n, _)| {
                        taken = Some(n);
                        ControlFlow::Break(())
                    });
                    prop_assert_eq!((taken, is_empty), (expected, expected.is_none()));
                }
                Step::Leave => {
                    store.leave();
                    is_leaving = true;
                    is_closed |= model.is_empty();
                }
                Step::Stay => {
                    is_leaving = false;
                    prop_assert_eq!(store.stay(), !is_closed);
                }
                Step::Close => {
                    store.close();
                    store.empty();
                    model.clear();
                    is_closed = true;
                }
            }
            let held: u64 = model.iter().map(|(_, bytes)| bytes).sum();
            prop_assert_eq!(store.size(), (model.len() as u64, held));
            prop_assert_eq!(store.is_closed(), is_closed);
        }
    }
}

const PRODUCERS: u64 = 8;

/// Producers and one consumer, which sleeps until it is woken. Nothing is lost, nothing comes twice, the messages of
/// each producer come in order, no bound is passed, and no wake-up is missed: else the consumer would sleep for ever.
#[test]
fn nothing_is_lost_under_contention() {
    until_contended(|| {
        let (refused, slept) = produce_and_consume(if cfg!(miri) { 30 } else { 100_000 });
        refused > 0 && slept > 0
    });
}

/// How often producers were refused, and how often the consumer slept.
fn produce_and_consume(each: u64) -> (u64, u64) {
    let store = store(64, 600);
    let (refused, woken, slept) = (AtomicU64::new(0), AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let consumer = scope.spawn(|| {
            let mut next = [0; PRODUCERS as usize];
            let mut left = PRODUCERS * each;
            while left > 0 {
                let (messages, is_empty) = drained(&store, 10);
                left -= messages.len() as u64;
                for (producer, n) in messages {
                    assert_eq!(next[producer as usize], n, "of producer {producer}");
                    next[producer as usize] = n + 1;
                }
                if is_empty && left > 0 {
                    slept.fetch_add(1, Ordering::Relaxed);
                    while !woken.swap(false, Ordering::AcqRel) {
                        thread::park();
                    }
                }
            }
        });
        for producer in 0..PRODUCERS {
            let consumer = consumer.thread().clone();
            let (store, refused, woken) = (&store, &refused, &woken);
            scope.spawn(move || {
                for n in 0..each {
                    let bytes = n % 20;
                    loop {
                        let (len, held) = store.size();
                        assert!(len <= 64 && held <= 600, "{len} messages, {held} bytes");
                        match store.push(Counted((producer, n), bytes)) {
                            Ok(wakes) => {
                                if wakes {
                                    woken.store(true, Ordering::Release);
                                    consumer.unpark();
                                }
                                break;
                            }
                            Err(error) => {
                                assert_eq!(error, PushError::Full);
                                refused.fetch_add(1, Ordering::Relaxed);
                                thread::yield_now();
                            }
                        }
                    }
                }
            });
        }
    });
    assert_eq!(store.size(), (0, 0));
    (refused.into_inner(), slept.into_inner())
}

/// Whatever producers do while a store is closed, all messages are freed.
#[test]
fn a_closed_store_is_empty() {
    let rounds = if cfg!(miri) { 10 } else { 1_000 };
    until_contended(|| (0..rounds).map(|_| late_pushes()).sum::<usize>() > 0);
}

fn late_pushes() -> usize {
    let alive = Arc::new(());
    let store = store(1_000, 1_000);
    let late = thread::scope(|scope| {
        let producers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    (0..20)
                        .filter(|_| store.push(Counted(Arc::clone(&alive), 1)).is_err())
                        .count()
                })
            })
            .collect();
        store.close();
        store.empty();
        producers.into_iter().map(|p| p.join().unwrap()).sum()
    });
    assert_eq!(
        store.push(Counted(Arc::clone(&alive), 1)),
        Err(PushError::Closed)
    );
    assert_eq!((Arc::strong_count(&alive), store.size()), (1, (0, 0)));
    late
}

#[test]
fn what_is_in_a_store_is_freed_with_it() {
    let alive = Arc::new(());
    let store = store(100, 100);
    for _ in 0..100 {
        assert!(store.push(Counted(Arc::clone(&alive), 1)).is_ok());
    }
    drop(store);
    assert_eq!(Arc::strong_count(&alive), 1);
}
