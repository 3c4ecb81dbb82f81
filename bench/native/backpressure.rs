//! Each layer of backpressure alone, compared with well-maintained peers: `governor` for the token bucket,
//! `recloser` for the circuit breaker. Admission control has no peer; it is compared with one atomic
//! counter.
//!
//! Method: every structure accepts everything, so the path of an accepted message is measured; refusals are
//! measured separately. Bucket and `governor` have the same limits (10^9 per second, and a burst of 10^9) and
//! the same kind of clock. Several threads work on the *same* structure, which is the worst case. The reported
//! time is that of one operation of one thread.
//!
//! Run by `bench/run --criterion`. A filter and `--quick` may follow.
#![allow(missing_docs)]

use std::hint::black_box;
use std::num::NonZeroU32;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use erlmcp_core::admission::{Admission, Pass, Sampling, Threshold};
use erlmcp_core::circuit_breaker::{CircuitBreaker, Config};
use erlmcp_core::clock::{Clock, TscClock};
use erlmcp_core::token_bucket::{Limits, TokenBucket};
use governor::{Quota, RateLimiter};
use recloser::{Error, Recloser};

const THREADS: [usize; 3] = [2, 4, 8];
const PLENTY: u32 = 1_000_000_000;

/// Runs `operation` on so many threads, `iterations` times each, and returns the elapsed time.
fn on_threads(threads: usize, iterations: u64, operation: impl Fn() + Sync) -> Duration {
    let barrier = Barrier::new(threads + 1);
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|_| {
                let (barrier, operation) = (&barrier, &operation);
                scope.spawn(move || {
                    barrier.wait();
                    for _ in 0..iterations {
                        operation();
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

/// One operation alone, and on several threads.
fn measure(group: &mut Group<'_>, name: &str, operation: impl Fn() + Sync) {
    group.bench_function(BenchmarkId::new(name, "alone"), |b| b.iter(&operation));
    for threads in THREADS {
        group.bench_function(BenchmarkId::new(name, format!("{threads} threads")), |b| {
            b.iter_custom(|times| on_threads(threads, times, &operation));
        });
    }
}

type Group<'a> = BenchmarkGroup<'a, WallTime>;

fn group<'a>(c: &'a mut Criterion, name: &str) -> Group<'a> {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(1));
    group
}

fn clock(c: &mut Criterion) {
    let tsc = TscClock::new();
    let mut group = c.benchmark_group("clock");
    group.bench_function("tsc", |b| b.iter(|| black_box(tsc.now_ns())));
    group.bench_function("std", |b| b.iter(|| black_box(Instant::now())));
    group.finish();
}

fn token_bucket(c: &mut Criterion) {
    let clock = TscClock::new();
    let plenty = Limits::new(u64::from(PLENTY), 1e9).expect("limits");
    let bucket = TokenBucket::new(Some(plenty), &clock);
    let quota = Quota::per_second(NonZeroU32::new(PLENTY).expect("a burst"));
    let governor = RateLimiter::direct(quota);
    let mut admitted = group(c, "token_bucket");
    measure(&mut admitted, "bucket", || {
        black_box(bucket.take(&clock, 1)).expect("a token");
    });
    measure(&mut admitted, "governor", || {
        governor.check().expect("a cell")
    });
    admitted.finish();

    let one = Limits::new(1, 1.0 / 3600.0).expect("limits");
    let empty = TokenBucket::new(Some(one), &clock);
    empty.take(&clock, 1).expect("the only token");
    let hourly = Quota::per_hour(NonZeroU32::new(1).expect("a burst"));
    let spent = RateLimiter::direct(hourly);
    spent.check().expect("the only cell");
    let mut refused = group(c, "token_bucket refused");
    measure(&mut refused, "bucket", || {
        black_box(empty.take(&clock, 1)).expect_err("no token");
    });
    measure(&mut refused, "governor", || {
        black_box(spent.check()).expect_err("no cell");
    });
    refused.finish();
}

fn circuit_breaker(c: &mut Criterion) {
    let clock = TscClock::new();
    let circuit = CircuitBreaker::new(Some(Config::default()), &clock).expect("a config");
    let recloser = Recloser::default();
    let mut closed = group(c, "circuit_breaker");
    measure(&mut closed, "check", || {
        black_box(circuit.check(&clock)).expect("closed");
    });
    measure(&mut closed, "recloser", || {
        let called: Result<(), Error<()>> = recloser.call(|| Ok(()));
        black_box(called).expect("closed");
    });
    closed.finish();

    let open = CircuitBreaker::new(Some(Config::default()), &clock).expect("a config");
    assert!(open.force(true, &clock));
    measure(&mut group(c, "circuit_breaker refused"), "check", || {
        black_box(open.check(&clock)).expect_err("open");
    });
}

fn admission(c: &mut Criterion) {
    let clock = TscClock::new();
    let sampling = Sampling::new(100);
    let shard = Admission::new();
    shard.set_threshold(Threshold::Exactly(1 << 39), 0);
    shard.begin_pass(Pass::All, clock.now_ms());
    let (counter, kept) = (AtomicU64::new(0), AtomicU32::new(0));
    let mut admitted = group(c, "admission");
    measure(&mut admitted, "check and admit", || {
        let mut to = shard.receiver(1, &kept);
        shard
            .check(&mut to, &sampling, || clock.now_ms(), || 1)
            .expect("room for all");
        black_box(shard.admit(&to, &sampling, || clock.now_ms()));
    });
    measure(&mut admitted, "fetch_add", || {
        black_box(counter.fetch_add(1, Ordering::AcqRel));
    });
    admitted.finish();

    // A sample is stale after ten intervals.
    let patient = Sampling::new(86_400_000);
    let full = Admission::new();
    full.set_threshold(Threshold::Exactly(1), 0);
    full.begin_pass(Pass::All, clock.now_ms());
    full.adjust(1, 1);
    measure(&mut group(c, "admission refused"), "check", || {
        let mut to = full.receiver(1, &kept);
        black_box(full.check(&mut to, &patient, || clock.now_ms(), || 1)).expect_err("full");
    });
}

criterion_group!(benches, clock, token_bucket, circuit_breaker, admission);
criterion_main!(benches);
