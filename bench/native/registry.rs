//! The core registry, without the BEAM: look-ups by hit and miss at three sizes, registration with
//! removal, and binding, on one thread and on several, compared with `dashmap` as far as it can do the same.
//!
//! Method: ids are text of 24 bytes. Look-ups go through all of them in another order than that of their
//! registration, so that a large registry is as cold as the caches leave it. Hashing the id is part of every
//! operation. A registration has a shard, a counter and a slot in the shard's list; `dashmap` has none of
//! these and is keyed by `Box<[u8]>` with the same `ahash`. There are as many threads as cores, at least
//! two. The reported time is that of one operation of one thread.
//!
//! Run by `bench/run --criterion`. A filter and `--quick` may follow.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use ahash::RandomState;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dashmap::DashMap;
use erlmcp_core::clock::FakeClock;
use erlmcp_core::registry::{Limits, Namespace, Registry};

const SIZES: [u64; 3] = [1_000, 15_000, 1_000_000];
/// Ids that are registered and removed again.
const CHURN: u64 = 15_000;
/// The kind that [`Registry::id`] takes for a binary; any value would do.
const KIND: u8 = 0;

type Peer = DashMap<Box<[u8]>, u64, RandomState>;
type Key = [u8; 24];

fn key(n: u64) -> Key {
    let text = format!("session-{n:016x}");
    text.as_bytes().try_into().expect("24 bytes")
}

/// A step that has no factor in common with any size goes through all of it once.
fn shuffled(size: u64, first: u64) -> Vec<Key> {
    (0..size)
        .map(|n| key(first + n * 7_368_787 % size))
        .collect()
}

fn registry() -> Registry<u64> {
    Registry::new(Limits::default(), &FakeClock::at_ns(0))
}

fn shard(n: usize) -> u16 {
    (n % 64) as u16
}

fn register(registry: &Registry<u64>, namespace: Namespace, n: usize, key: &Key) {
    let id = registry.id(KIND, key);
    let lease = n as u64;
    registry
        .register(namespace, id, shard(n), lease, None, |_| lease)
        .expect("a free id");
}

/// A registry and a peer with so many keys, inserted in ascending order.
fn filled(size: u64) -> (Registry<u64>, Peer) {
    let (registry, peer) = (registry(), Peer::default());
    for n in 0..size {
        let key = key(n);
        register(&registry, Namespace::Connection, n as usize, &key);
        peer.insert(key.as_slice().into(), n);
    }
    (registry, peer)
}

/// Runs `operation` on as many threads as there are cores, `iterations` times each, and returns the elapsed
/// time.
fn on_threads(iterations: u64, operation: impl Fn(usize, u64) + Sync) -> Duration {
    let threads = threads();
    let barrier = Barrier::new(threads + 1);
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|thread| {
                let (barrier, operation) = (&barrier, &operation);
                scope.spawn(move || {
                    barrier.wait();
                    for iteration in 0..iterations {
                        operation(thread, iteration);
                    }
                })
            })
            .collect();
        barrier.wait();
        let start = Instant::now();
        for thread in running {
            thread.join().expect("no panic");
        }
        start.elapsed()
    })
}

fn threads() -> usize {
    thread::available_parallelism().map_or(2, |cores| cores.get().max(2))
}

fn lookup(c: &mut Criterion) {
    for size in SIZES {
        let (hits, misses) = (shuffled(size, 0), shuffled(size, size));
        let (registry, peer) = filled(size);
        let mut group = c.benchmark_group(format!("lookup/{size}"));
        group.throughput(Throughput::Elements(1));
        for (what, keys) in [("hit", &hits), ("miss", &misses)] {
            let native = |n: usize| {
                let id = registry.id(KIND, &keys[n % keys.len()]);
                black_box(registry.address(Namespace::Connection, &id));
            };
            let dashmap = |n: usize| {
                black_box(peer.get(keys[n % keys.len()].as_slice()).map(|e| *e));
            };
            group.bench_function(BenchmarkId::new("registry", what), |b| {
                let mut n = 0;
                b.iter(|| {
                    n += 1;
                    native(n);
                });
            });
            group.bench_function(BenchmarkId::new("dashmap", what), |b| {
                let mut n = 0;
                b.iter(|| {
                    n += 1;
                    dashmap(n);
                });
            });
            let several = format!("{what} on {} threads", threads());
            // Threads begin at different places.
            let apart = keys.len() / threads();
            group.bench_function(BenchmarkId::new("registry", &several), |b| {
                b.iter_custom(|times| on_threads(times, |t, i| native(t * apart + i as usize)));
            });
            group.bench_function(BenchmarkId::new("dashmap", &several), |b| {
                b.iter_custom(|times| on_threads(times, |t, i| dashmap(t * apart + i as usize)));
            });
        }
        group.finish();
    }
}

/// One element is one registration and its removal, beside [`CHURN`] other entries.
fn register_and_remove(c: &mut Criterion) {
    let (registry, peer) = filled(CHURN);
    let fresh = shuffled(CHURN, CHURN);
    // Each thread has ids of its own.
    let of_thread: Vec<Vec<Key>> = (0..threads() as u64)
        .map(|thread| shuffled(CHURN, (thread + 1) * CHURN))
        .collect();
    let native = |keys: &[Key], n: usize| {
        let key = &keys[n % keys.len()];
        register(&registry, Namespace::Connection, n, key);
        let id = registry.id(KIND, key);
        black_box(registry.remove(Namespace::Connection, &id));
    };
    let dashmap = |keys: &[Key], n: usize| {
        let key = keys[n % keys.len()].as_slice();
        peer.insert(key.into(), n as u64);
        black_box(peer.remove(key));
    };
    let mut group = c.benchmark_group("register+remove");
    group.throughput(Throughput::Elements(1));
    group.bench_function("registry", |b| {
        let mut n = 0;
        b.iter(|| {
            n += 1;
            native(&fresh, n);
        });
    });
    group.bench_function("dashmap", |b| {
        let mut n = 0;
        b.iter(|| {
            n += 1;
            dashmap(&fresh, n);
        });
    });
    let several = format!("{} threads", threads());
    group.bench_function(BenchmarkId::new("registry", &several), |b| {
        b.iter_custom(|times| on_threads(times, |t, i| native(&of_thread[t], i as usize)));
    });
    group.bench_function(BenchmarkId::new("dashmap", &several), |b| {
        b.iter_custom(|times| on_threads(times, |t, i| dashmap(&of_thread[t], i as usize)));
    });
    group.finish();
}

/// Binds a transport again, to one of 16 servers; each transport moves on to the next server. `dashmap` has
/// nothing of the kind.
fn bind(c: &mut Criterion) {
    const SERVERS: usize = 16;
    let registry = registry();
    let servers = shuffled(SERVERS as u64, 0);
    let transports = shuffled(CHURN, CHURN);
    for (n, key) in servers.iter().enumerate() {
        register(&registry, Namespace::Server, n, key);
    }
    for (n, key) in transports.iter().enumerate() {
        register(&registry, Namespace::Transport, n, key);
    }
    let rebind = |n: usize| {
        let transport = registry.id(KIND, &transports[n % transports.len()]);
        let server = registry.id(KIND, &servers[(n + n / transports.len()) % SERVERS]);
        registry.bind(&transport, server, true).expect("both there");
    };
    let mut group = c.benchmark_group("bind");
    group.throughput(Throughput::Elements(1));
    group.bench_function("registry", |b| {
        let mut n = 0;
        b.iter(|| {
            n += 1;
            rebind(n);
        });
    });
    let apart = transports.len() / threads();
    group.bench_function(
        BenchmarkId::new("registry", format!("{} threads", threads())),
        |b| b.iter_custom(|times| on_threads(times, |t, i| rebind(t * apart + i as usize))),
    );
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = lookup, register_and_remove, bind
}
criterion_main!(benches);
