//! The registry under real contention. Each test asserts an invariant, and that threads did contend;
//! otherwise it proves nothing.
#![cfg(not(loom))]

#[path = "contention.rs"]
mod contention;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use contention::until_contended;
use erlmcp_core::circuit_breaker::CircuitBreaker;
use erlmcp_core::clock::FakeClock;
use erlmcp_core::error::{BindError, RegisterError};
use erlmcp_core::registry::{Entry, Id, Limits, Namespace, Registry};
use erlmcp_core::slots::{OCCUPIED, Slots};

const THREADS: u64 = 4;
const ROUNDS: u64 = if cfg!(miri) { 20 } else { 20_000 };

fn registry() -> Arc<Registry<u64>> {
    Arc::new(Registry::new(
        Limits::new(4, 1 << 20, 1000).unwrap(),
        &FakeClock::at_ns(0),
    ))
}

/// Runs `f` on several threads at once and returns the results.
fn on_threads<R: Send + 'static>(f: impl Fn(u64) -> R + Send + Sync + 'static) -> Vec<R> {
    let f = Arc::new(f);
    let barrier = Arc::new(Barrier::new(THREADS as usize));
    let threads: Vec<_> = (0..THREADS)
        .map(|n| {
            let (f, barrier) = (Arc::clone(&f), Arc::clone(&barrier));
            thread::spawn(move || {
                barrier.wait();
                f(n)
            })
        })
        .collect();
    threads.into_iter().map(|t| t.join().unwrap()).collect()
}

#[test]
fn one_id_is_registered_once() {
    until_contended(|| {
        let registry = registry();
        let holders = Arc::new(AtomicU64::new(0));
        let refused: u64 = on_threads({
            let (registry, holders) = (Arc::clone(&registry), Arc::clone(&holders));
            move |n| {
                let id = registry.id(0, b"contended");
                let mut refused = 0;
                for round in 0..ROUNDS {
                    let lease = n * ROUNDS + round;
                    match registry.register(Namespace::Connection, id, 0, lease, None, |_| lease) {
                        Ok(_) => {
                            assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two have it");
                            assert_eq!(registry.address(Namespace::Connection, &id), Some(lease));
                            thread::yield_now();
                            holders.fetch_sub(1, Ordering::SeqCst);
                            let removed = registry.remove(Namespace::Connection, &id);
                            assert_eq!(removed.map(|e| e.lease), Some(lease));
                        }
                        Err(RegisterError::AlreadyRegistered { .. }) => refused += 1,
                        Err(other) => panic!("{other}"),
                    }
                }
                refused
            }
        })
        .into_iter()
        .sum();
        assert_eq!(registry.count(Namespace::Connection), 0);
        refused > 0
    });
}

/// Threads replace one connection, register and remove it, by id and by lease. Each lease is given back once, and an id
/// that is only replaced is never absent.
#[test]
fn a_replaced_lease_is_given_back_once() {
    until_contended(|| {
        let registry = registry();
        let absent = registry.id(0, b"only replaced");
        let first = registry.replace_connection(absent, 0, 1, |_| 0).unwrap();
        assert!(first.is_none());
        let given_back = on_threads({
            let registry = Arc::clone(&registry);
            move |n| {
                let id = registry.id(0, b"contended");
                let kept = registry.id(0, b"only replaced");
                let (mut given_back, mut crossed) = (Vec::new(), 0);
                for round in 1..=ROUNDS {
                    let lease = n * ROUNDS + round;
                    let mut at = None;
                    let located = |location| {
                        at = Some(location);
                        lease
                    };
                    let removed = match round % 4 {
                        0 => registry.remove(Namespace::Connection, &id),
                        1 => {
                            let registered = registry.register(
                                Namespace::Connection,
                                id,
                                0,
                                lease,
                                None,
                                located,
                            );
                            if registered.is_err() && at.is_some() {
                                given_back.push(lease);
                            }
                            None
                        }
                        _ => registry.replace_connection(id, 0, lease, located).unwrap(),
                    };
                    given_back.extend(removed.map(|entry| entry.lease));
                    if let (3, Some(at)) = (round % 4, at) {
                        // None if another thread has replaced or removed it, whatever has the place by now.
                        let own = registry.remove_leased(&at, 0, |held| *held == lease);
                        crossed += u64::from(own.is_none());
                        given_back.extend(own.map(|entry| entry.lease));
                    }
                    registry.replace_connection(kept, 0, lease, |_| 0).unwrap();
                    assert!(registry.address(Namespace::Connection, &kept).is_some());
                }
                (given_back, crossed)
            }
        });
        let contended = registry.id(0, b"contended");
        let last = registry.remove(Namespace::Connection, &contended);
        let mut leases: Vec<u64> = given_back
            .iter()
            .flat_map(|(leases, _)| leases.iter().copied())
            .chain(last.map(|entry| entry.lease))
            .collect();
        let number = leases.len();
        leases.sort_unstable();
        leases.dedup();
        assert_eq!(leases.len(), number, "given back twice");
        // Each replacement took one; a registration that was refused early took none.
        assert!(number as u64 >= THREADS * ROUNDS / 2);
        assert_eq!(registry.count(Namespace::Connection), 1);
        given_back.iter().any(|(_, crossed)| *crossed > 0)
    });
}

/// A lease that can tell whether it has been dropped, for as long as nothing else is stored in its memory.
#[derive(Debug)]
struct Canary(AtomicU64);

const ALIVE: u64 = 0x00a1_1ce0_00a1_1ce0;

impl Canary {
    fn new() -> Self {
        Self(AtomicU64::new(ALIVE))
    }
}

impl Clone for Canary {
    fn clone(&self) -> Self {
        let word = self.0.load(Ordering::Relaxed);
        assert_eq!(word, ALIVE, "an entry was freed while it was read");
        Self::new()
    }
}

impl PartialEq for Canary {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Drop for Canary {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Relaxed);
        // Otherwise the compiler may leave out a write before a free.
        std::hint::black_box(&self.0);
    }
}

/// Threads use the admission control of many shards for the first time at once, while others read entries that they
/// replace. Nothing that is read is freed by a thread that was too late to create what is created once.
#[test]
fn a_first_use_frees_nothing_that_is_read() {
    const SHARDS: u64 = if cfg!(miri) { 8 } else { 1024 };
    const REGISTRIES: u64 = if cfg!(miri) { 1 } else { 20 };
    for _ in 0..REGISTRIES {
        let limits = Limits::new(SHARDS, 1 << 20, 1000).unwrap();
        let registry = Arc::new(Registry::new(limits, &FakeClock::at_ns(0)));
        let first = registry.id(0, b"replaced 0");
        let second = registry.id(0, b"replaced 1");
        for id in [first, second] {
            registry
                .replace_connection(id, 0, 1, |_| Canary::new())
                .unwrap();
        }
        on_threads({
            let registry = Arc::clone(&registry);
            let (replacing, used) = (AtomicU64::new(0), AtomicU64::new(0));
            move |n| {
                let id = if n % 2 == 0 { first } else { second };
                if n < 2 {
                    replacing.fetch_add(1, Ordering::Relaxed);
                    while used.load(Ordering::Relaxed) < 2 {
                        let former = registry.replace_connection(id, 0, 1, |_| Canary::new());
                        assert!(former.unwrap().is_some());
                    }
                } else {
                    while replacing.load(Ordering::Relaxed) < 2 {
                        thread::yield_now();
                    }
                    for shard in 0..SHARDS as u16 {
                        registry.admission(shard);
                    }
                    used.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
}

/// Servers are registered and removed, by id and by lease, while transports are registered with automatic
/// bindings, bound, unbound and removed. Afterwards no binding to a removed server is left, and nothing at
/// all once the transports are removed.
#[test]
fn bindings_never_outlive_their_ends() {
    until_contended(|| {
        let registry = registry();
        let unlucky: u64 = on_threads({
            let registry = Arc::clone(&registry);
            move |n| {
                let mut unlucky = 0;
                for round in 0..ROUNDS {
                    let server = registry.id(0, if round % 2 == 0 { b"a" } else { b"b" });
                    let transport = registry.id(0, if round % 3 == 0 { b"t" } else { b"u" });
                    match (n + round) % 4 {
                        0 => {
                            let mut at = None;
                            let _ = registry.register(Namespace::Server, server, 0, 1, None, |l| {
                                at = Some(l);
                                round
                            });
                            if let (true, Some(at)) = (round % 8 < 4, at) {
                                registry.remove_leased(&at, 0, |held| *held == round);
                            } else {
                                registry.remove(Namespace::Server, &server);
                            }
                        }
                        1 => {
                            let _ = registry.register(
                                Namespace::Transport,
                                transport,
                                1,
                                2,
                                Some(server),
                                |_| round,
                            );
                        }
                        2 => match registry.bind(&transport, server, round % 5 != 0) {
                            Ok(()) => {}
                            Err(BindError::ServerNotFound | BindError::TransportNotFound) => {
                                unlucky += 1;
                            }
                        },
                        _ => {
                            if round % 7 == 0 {
                                registry.unbind(&transport);
                            } else {
                                registry.remove(Namespace::Transport, &transport);
                            }
                            registry.for_each_bound(&server, |entry| assert_eq!(entry.address, 2));
                        }
                    }
                }
                unlucky
            }
        })
        .into_iter()
        .sum();
        for server in [b"a", b"b"] {
            let server = registry.id(0, server);
            // Registering and removing the server unbinds all transports from it.
            let _ = registry.register(Namespace::Server, server, 0, 1, None, |_| 0);
            registry.remove(Namespace::Server, &server);
            registry.for_each_bound(&server, |_| panic!("bound to a server that has gone"));
        }
        for transport in [b"t", b"u"] {
            let transport = registry.id(0, transport);
            assert_eq!(registry.bound_server(&transport, |_| ()), None);
            registry.remove(Namespace::Transport, &transport);
        }
        assert_eq!(registry.dangling_servers(), 0);
        for namespace in Namespace::ALL {
            assert_eq!(registry.count(namespace), 0);
        }
        unlucky > 0
    });
}

/// Readers see only one of the two bindings that are made in turn, since both servers stay registered.
#[test]
fn a_rebound_transport_is_always_bound() {
    let registry = registry();
    for (namespace, id) in [
        (Namespace::Server, b"a"),
        (Namespace::Server, b"b"),
        (Namespace::Transport, b"t"),
    ] {
        let id = registry.id(0, id);
        registry.register(namespace, id, 0, 1, None, |_| 0).unwrap();
    }
    registry
        .bind(&registry.id(0, b"t"), registry.id(0, b"a"), true)
        .unwrap();
    // The binding thread goes on until the readers have seen both bindings often enough.
    let enough = AtomicU64::new(0);
    let seen = on_threads({
        let registry = Arc::clone(&registry);
        move |n| {
            let transport = registry.id(0, b"t");
            let mut seen = [0, 0];
            if n == 0 {
                for round in 0.. {
                    let server = registry.id(0, if round % 2 == 0 { b"b" } else { b"a" });
                    registry.bind(&transport, server, true).unwrap();
                    if enough.load(Ordering::Relaxed) == THREADS - 1 {
                        break;
                    }
                }
            } else {
                while seen.iter().any(|times| *times < ROUNDS / 20) {
                    let is_b = registry.bound_server(&transport, |s| s.bytes() == b"b");
                    seen[usize::from(is_b.expect("bound"))] += 1;
                }
                enough.fetch_add(1, Ordering::Relaxed);
            }
            seen
        }
    });
    let (a, b) = seen.iter().fold((0, 0), |(a, b), s| (a + s[0], b + s[1]));
    assert!(a > 0 && b > 0, "no contention");
}

/// While other ids make the table grow and shrink, an id that is registered throughout is always found, and
/// listed exactly once.
#[test]
fn readers_find_everything_while_the_table_grows() {
    until_contended(|| {
        const PERMANENT: u64 = if cfg!(miri) { 5 } else { 500 };
        let registry = registry();
        for n in 0..PERMANENT {
            let bytes = n.to_le_bytes();
            let id = registry.id(1, &bytes);
            registry
                .register(Namespace::Connection, id, (n % 4) as u16, n, None, |_| n)
                .unwrap();
        }
        let done = Arc::new(AtomicBool::new(false));
        let checks: u64 = on_threads({
            let registry = Arc::clone(&registry);
            move |n| {
                if n < 2 {
                    for m in 0..ROUNDS {
                        let bytes = (n << 32 | m).to_le_bytes();
                        let id = registry.id(2, &bytes);
                        registry
                            .register(Namespace::Connection, id, 0, m, None, |_| m)
                            .unwrap();
                        if m >= 5000 {
                            let bytes = (n << 32 | (m - 5000)).to_le_bytes();
                            registry.remove(Namespace::Connection, &registry.id(2, &bytes));
                        }
                    }
                    done.store(true, Ordering::Release);
                    return 0;
                }
                let mut checks = 0;
                loop {
                    for m in 0..PERMANENT {
                        let bytes = m.to_le_bytes();
                        let id = registry.id(1, &bytes);
                        assert_eq!(registry.address(Namespace::Connection, &id), Some(m));
                    }
                    let mut listed = vec![0; PERMANENT as usize];
                    let mut list = |id: Id<'_>, entry: &Entry<u64>| {
                        if id.kind() == 1 {
                            listed[entry.address as usize] += 1;
                        }
                    };
                    if checks % 2 == 0 {
                        registry.for_each(Namespace::Connection, list);
                    } else {
                        for shard in 0..4 {
                            registry.for_each_connection_of(shard, &mut list);
                        }
                    }
                    assert_eq!(listed, [1; PERMANENT as usize]);
                    checks += 1;
                    if done.load(Ordering::Acquire) {
                        return checks;
                    }
                }
            }
        })
        .into_iter()
        .sum();
        checks >= 2
    });
}

/// Ids are registered again at other places while the table grows, so that the former table still has their
/// former keys: each is found and removed at its current place, and listed there.
#[test]
fn every_place_is_found_while_the_table_grows() {
    const FILLERS: u64 = if cfg!(miri) { 300 } else { 20_000 };
    const RETURNING: u64 = 16;
    let registry = registry();
    let register = |name: String, lease: u64| {
        let mut place = None;
        let id = registry.id(0, name.as_bytes());
        registry
            .register(Namespace::Connection, id, 0, lease, None, |location| {
                place = Some(location);
                lease
            })
            .unwrap();
        place.unwrap()
    };
    let returning = |n: u64| format!("returning {n}");
    for n in 0..RETURNING {
        register(returning(n), n);
    }
    for filler in 0..FILLERS {
        let lease = RETURNING + filler;
        let n = filler % RETURNING;
        let name = returning(n);
        let id = registry.id(0, name.as_bytes());
        registry.remove(Namespace::Connection, &id).unwrap();
        // Reuses the place that has become free.
        register(format!("filler {filler}"), u64::MAX);
        let place = register(returning(n), lease);
        let mut listed = 0;
        if filler % 64 == 0 {
            registry.for_each_address_of(0, |address| listed += u64::from(address == lease));
            assert_eq!(listed, 1, "filler {filler}");
        }
        let removed = registry.remove_leased(&place, 0, |held| *held == lease);
        assert!(removed.is_some(), "filler {filler}");
        register(returning(n), lease);
    }
}

type Walk = fn(&Registry<Arc<()>>, &mut dyn FnMut());

/// A long iteration does not keep entries that are removed meanwhile from being freed. Here the iteration itself
/// removes them, at its first step; at its last step most of them must have been freed.
#[test]
#[cfg_attr(miri, ignore = "takes ten minutes")]
fn garbage_is_freed_during_walks() {
    // Several times the places that are visited inside one guard.
    const VISITED: u64 = 10_000;
    const REMOVED: u64 = 10_000;
    let walks: [(&str, Walk); 8] = [
        ("for_each", |registry, each| {
            registry.for_each(Namespace::Transport, |_, _| each());
        }),
        ("for_each_connection_of", |registry, each| {
            registry.for_each_connection_of(0, |_, _| each());
        }),
        ("try_for_each_at", |registry, each| {
            let namespace = Namespace::Connection;
            let places = 0..registry.shard_high_water(namespace, 0);
            let _: ControlFlow<()> = registry.try_for_each_at(namespace, 0, places, |_, _| {
                each();
                ControlFlow::Continue(())
            });
        }),
        ("for_each_address_of", |registry, each| {
            registry.for_each_address_of(0, |_| each());
        }),
        ("for_each_binding", |registry, each| {
            registry.for_each_binding(|_, _, _| each());
        }),
        ("for_each_bound", |registry, each| {
            registry.for_each_bound(&registry.id(0, b"s"), |_| each());
        }),
        ("route_bound", |registry, each| {
            let clock = FakeClock::at_ns(0);
            let circuit = CircuitBreaker::new(None, &clock).unwrap();
            let server = registry.id(0, b"s");
            registry.route_bound(&server, &circuit, &clock, |_, _| each());
        }),
        ("close", |registry, each| registry.close(|_| each())),
    ];
    for (name, walk) in walks {
        let registry: Registry<Arc<()>> =
            Registry::new(Limits::new(1, 1 << 20, 1000).unwrap(), &FakeClock::at_ns(0));
        let register = |namespace, kind, n: u64, lease: &Arc<()>| {
            let bytes = n.to_le_bytes();
            registry
                .register(
                    namespace,
                    registry.id(kind, &bytes),
                    0,
                    n,
                    Some(registry.id(0, b"s")),
                    |_| Arc::clone(lease),
                )
                .unwrap();
        };
        let (visited, removed) = (Arc::new(()), Arc::new(()));
        for n in 0..VISITED {
            register(Namespace::Transport, 0, n, &visited);
            register(Namespace::Connection, 0, n, &visited);
        }
        for n in 0..REMOVED {
            register(Namespace::Connection, 1, n, &removed);
        }
        let (mut steps, mut kept) = (0, 0);
        walk(&registry, &mut || {
            if steps == 0 {
                for n in 0..REMOVED {
                    let bytes = n.to_le_bytes();
                    registry
                        .remove(Namespace::Connection, &registry.id(1, &bytes))
                        .unwrap();
                }
            }
            steps += 1;
            kept = Arc::strong_count(&removed) as u64 - 1;
        });
        assert!(steps >= VISITED, "{name}: {steps} steps");
        assert!(kept < REMOVED / 2, "{name}: {kept} of {REMOVED} are kept");
    }
}

/// Registration against closing: an entry whose registration was not refused has been removed.
#[test]
fn nothing_is_left_behind_a_close() {
    until_contended(|| {
        let closes = if cfg!(miri) { 3 } else { 300 };
        let registry = registry();
        let refused = Arc::new(AtomicU64::new(0));
        let done = Arc::new(AtomicBool::new(false));
        on_threads({
            let (registry, refused) = (Arc::clone(&registry), Arc::clone(&refused));
            move |n| {
                if n == 0 {
                    let deadline = Instant::now() + Duration::from_secs(60);
                    let mut closed = 0;
                    // On a busy machine the others may not get a turn for that many closes.
                    while closed < closes
                        || !cfg!(miri)
                            && refused.load(Ordering::Relaxed) == 0
                            && Instant::now() < deadline
                    {
                        closed += 1;
                        registry.close(|_| {});
                        // Threads that were registering during the close remove their entries again.
                        loop {
                            let mut left = 0;
                            registry.for_each(Namespace::Server, |_, _| left += 1);
                            if left == 0 && registry.count(Namespace::Server) == 0 {
                                break;
                            }
                            assert!(Instant::now() < deadline, "{left} left behind");
                            thread::yield_now();
                        }
                        registry.open();
                        thread::yield_now();
                    }
                    done.store(true, Ordering::Release);
                    return;
                }
                let mut m = 0;
                while !done.load(Ordering::Acquire) {
                    m += 1;
                    let bytes = (n << 32 | (m % 50)).to_le_bytes();
                    let id = registry.id(0, &bytes);
                    match registry.register(Namespace::Server, id, 0, m, None, |_| m) {
                        Err(RegisterError::Closed) => {
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(_) | Err(RegisterError::AlreadyRegistered { .. }) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            }
        });
        registry.close(|_| {});
        assert_eq!(registry.count(Namespace::Server), 0);
        refused.load(Ordering::Relaxed) > 0
    });
}

/// A server with so many transports bound to it, whose addresses are their numbers from 0 on.
fn bound_transports(number: u64) -> Arc<Registry<u64>> {
    let registry = registry();
    let server = registry.id(0, b"s");
    registry
        .register(Namespace::Server, server, 0, 0, None, |_| 0)
        .unwrap();
    for n in 0..number {
        let bytes = n.to_le_bytes();
        let id = registry.id(0, &bytes);
        registry
            .register(Namespace::Transport, id, 0, n, None, |_| n)
            .unwrap();
        registry.bind(&id, server, true).unwrap();
    }
    registry
}

/// The addresses of the bound transports. `meanwhile` runs after the first one.
fn bound_while(registry: &Registry<u64>, meanwhile: impl Fn()) -> Vec<u64> {
    let mut found = Vec::new();
    registry.for_each_bound(&registry.id(0, b"s"), |entry| {
        if found.is_empty() {
            meanwhile();
        }
        found.push(entry.address);
    });
    found
}

/// A transport that is bound to the same server again stays bound throughout: an iteration over the bound
/// transports finds it once.
#[test]
fn binding_to_the_same_server_is_no_change() {
    let registry = bound_transports(2);
    let server = registry.id(0, b"s");
    let (first, second) = (0u64.to_le_bytes(), 1u64.to_le_bytes());
    let (first, second) = (registry.id(0, &first), registry.id(0, &second));
    for must_exist in [true, false] {
        let again = || registry.bind(&second, server, must_exist).unwrap();
        assert_eq!(bound_while(&registry, again), [0, 1], "missed");
    }
    assert!(registry.unbind(&second));
    let again = || registry.bind(&first, server, true).unwrap();
    assert_eq!(bound_while(&registry, again), [0], "twice");
    // The same holds for an id without a server, which exists as long as a transport is bound to it.
    registry.remove(Namespace::Server, &server);
    for _ in 0..3 {
        registry.bind(&first, server, false).unwrap();
        assert_eq!(bound_while(&registry, || ()), [0]);
    }
    assert!(registry.unbind(&first));
    assert_eq!(bound_while(&registry, || ()), [0; 0]);
}

/// The same with two concurrent binders.
#[test]
fn rebound_transports_are_found_once() {
    until_contended(|| {
        const BOUND: u64 = 20;
        let registry = bound_transports(BOUND);
        let done = Arc::new(AtomicBool::new(false));
        let binders: Vec<_> = (0..2)
            .map(|n| {
                let (registry, done) = (Arc::clone(&registry), Arc::clone(&done));
                thread::spawn(move || {
                    let mut bindings = 0u64;
                    while !done.load(Ordering::Relaxed) {
                        let id = ((bindings * 7 + n) % BOUND).to_le_bytes();
                        let transport = registry.id(0, &id);
                        registry
                            .bind(&transport, registry.id(0, b"s"), bindings.is_multiple_of(2))
                            .unwrap();
                        bindings += 1;
                    }
                    bindings
                })
            })
            .collect();
        let walks = if cfg!(miri) { 3 } else { 20_000 };
        for _ in 0..walks {
            let mut found = bound_while(&registry, thread::yield_now);
            found.sort_unstable();
            assert_eq!(found, (0..BOUND).collect::<Vec<_>>());
        }
        done.store(true, Ordering::Relaxed);
        let bindings: u64 = binders.into_iter().map(|b| b.join().unwrap()).sum();
        bindings > walks
    });
}

/// Leases that are reused, each by one registration at a time.
#[derive(Default)]
struct Pool {
    idle: Mutex<Vec<u64>>,
    made: AtomicU64,
}

impl Pool {
    fn take(&self) -> u64 {
        let idle = self.idle.lock().unwrap().pop();
        idle.unwrap_or_else(|| self.made.fetch_add(1, Ordering::Relaxed))
    }

    fn give_back(&self, lease: u64) {
        let mut idle = self.idle.lock().unwrap();
        assert!(!idle.contains(&lease), "given back twice");
        idle.push(lease);
    }
}

/// Registration against closing and opening. Each lease is given back once: to the caller that is refused, or
/// by the close that removes the entry. An entry registered while the registry is open stays until it is closed,
/// even if a caller that is being refused was using its id and its lease a moment ago.
#[test]
fn every_lease_is_given_back_once() {
    until_contended(|| {
        let closes = if cfg!(miri) { 3 } else { 30_000 };
        let registry = registry();
        let pool = Arc::new(Pool::default());
        // Odd while the registry is not open.
        let epoch = Arc::new(AtomicU64::new(0));
        let refused = Arc::new(AtomicU64::new(0));
        let removed = Arc::new(AtomicU64::new(0));
        let done = Arc::new(AtomicBool::new(false));
        on_threads({
            let (registry, pool) = (Arc::clone(&registry), Arc::clone(&pool));
            let (refused, removed) = (Arc::clone(&refused), Arc::clone(&removed));
            move |n| {
                if n == 0 {
                    let deadline = Instant::now() + Duration::from_secs(60);
                    for closed in 0.. {
                        let is_enough = cfg!(miri) || refused.load(Ordering::Relaxed) >= 1000;
                        if closed >= closes && is_enough || Instant::now() > deadline {
                            break;
                        }
                        epoch.fetch_add(1, Ordering::SeqCst);
                        registry.close(|entry| {
                            removed.fetch_add(1, Ordering::Relaxed);
                            pool.give_back(entry.lease);
                        });
                        registry.open();
                        epoch.fetch_add(1, Ordering::SeqCst);
                    }
                    done.store(true, Ordering::Release);
                    return;
                }
                let server = registry.id(0, b"s");
                let mut m = 0;
                while !done.load(Ordering::Acquire) {
                    m += 1;
                    let id = registry.id(0, if m % 2 == 0 { b"a" } else { b"b" });
                    let (namespace, bind_to) = match m % 3 {
                        0 => (Namespace::Server, None),
                        1 => (Namespace::Transport, None),
                        _ => (Namespace::Transport, Some(server)),
                    };
                    let began = epoch.load(Ordering::SeqCst);
                    let mut taken = None;
                    let registered = registry
                        .register(namespace, id, 0, 1, bind_to, |_| *taken.insert(pool.take()));
                    if m % 2 == 0 {
                        thread::yield_now();
                    }
                    let is_there = registry.address(namespace, &id).is_some();
                    let was_open = began.is_multiple_of(2) && epoch.load(Ordering::SeqCst) == began;
                    match registered {
                        Ok(_) => assert!(is_there || !was_open, "removed while it was open"),
                        Err(RegisterError::AlreadyRegistered { .. }) => {}
                        Err(RegisterError::Closed) => assert!(!was_open, "refused by an open one"),
                        Err(other) => panic!("{other}"),
                    }
                    if let (Err(error), Some(lease)) = (registered, taken) {
                        let is_closed = matches!(error, RegisterError::Closed);
                        refused.fetch_add(u64::from(is_closed), Ordering::Relaxed);
                        pool.give_back(lease);
                    }
                }
            }
        });
        registry.close(|entry| pool.give_back(entry.lease));
        let made = pool.made.load(Ordering::Relaxed);
        assert_eq!(pool.idle.lock().unwrap().len() as u64, made);
        assert_eq!(registry.dangling_servers(), 0);
        for namespace in Namespace::ALL {
            assert_eq!(registry.count(namespace), 0);
        }
        refused.load(Ordering::Relaxed) > 0 && removed.load(Ordering::Relaxed) > 0
    });
}

#[test]
fn max_entries_is_never_passed() {
    let registry: Arc<Registry<u64>> = Arc::new(Registry::new(
        Limits::new(1, 10, 100).unwrap(),
        &FakeClock::at_ns(0),
    ));
    let full: u64 = on_threads({
        let registry = Arc::clone(&registry);
        move |n| {
            let mut full = 0;
            for m in 0..ROUNDS {
                let bytes = (n << 32 | m).to_le_bytes();
                let id = registry.id(0, &bytes);
                match registry.register(Namespace::Connection, id, 0, m, None, |_| m) {
                    Ok(_) => {
                        assert!(registry.count(Namespace::Connection) <= 10);
                        if m % 3 != 0 {
                            registry.remove(Namespace::Connection, &id);
                        }
                    }
                    Err(RegisterError::RegistryFull) => full += 1,
                    Err(other) => panic!("{other}"),
                }
            }
            full
        }
    })
    .into_iter()
    .sum();
    assert!(full > 0);
    // A thread that has removed its last entry may have left room.
    let mut register_another = {
        let mut n = u64::MAX;
        move |registry: &Registry<u64>| {
            n -= 1;
            let bytes = n.to_le_bytes();
            registry.register(
                Namespace::Connection,
                registry.id(0, &bytes),
                0,
                n,
                None,
                |_| n,
            )
        }
    };
    while register_another(&registry).is_ok() {}
    assert_eq!(registry.count(Namespace::Connection), 10);
}

#[test]
fn slots_are_never_shared() {
    let slots = Arc::new(Slots::new());
    on_threads({
        let slots = Arc::clone(&slots);
        move |n| {
            let mut held = Vec::new();
            for round in 0..ROUNDS {
                let word = OCCUPIED | (n + 1) << 24 | (round & 0xff_ffff);
                held.push((slots.insert(word), word));
                if held.len() > 8 {
                    for (index, word) in held.drain(..) {
                        assert_eq!(slots.get(index), Some(word));
                        slots.remove(index);
                    }
                }
            }
            for (index, _) in held {
                slots.remove(index);
            }
        }
    });
    assert_eq!(slots.iter().count(), 0);
    assert!(
        u64::from(slots.high_water()) <= THREADS * 9,
        "freed indexes were not used again"
    );
}
