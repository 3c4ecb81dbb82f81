//! The registry under real contention. Each test asserts what must hold and that threads did get
//! into each other's way; otherwise it proves nothing.
#![cfg(not(loom))]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use erlmcp_core::clock::FakeClock;
use erlmcp_core::error::{BindError, RegisterError};
use erlmcp_core::registry::{Limits, Namespace, Registry};
use erlmcp_core::slots::{OCCUPIED, Slots};

const THREADS: u64 = 4;
const ROUNDS: u64 = if cfg!(miri) { 20 } else { 20_000 };

fn registry() -> Arc<Registry<u64>> {
    Arc::new(Registry::new(
        Limits::new(4, 1 << 20, 1000).unwrap(),
        &FakeClock::at_ns(0),
    ))
}

/// Runs `f` on several threads at once and returns what they returned.
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
    assert!(refused > 0, "no contention");
    assert_eq!(registry.count(Namespace::Connection), 0);
}

/// Servers come and go, by id and by lease, while transports are registered with automatic
/// bindings, bound, unbound and removed. When all is quiet, no binding to a server that has gone is
/// left, and nothing at all once the transports are gone.
#[test]
fn bindings_never_outlive_their_ends() {
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
                            registry.remove_leased(&at, |held| *held == round);
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
    assert!(unlucky > 0, "no contention");
    for server in [b"a", b"b"] {
        let server = registry.id(0, server);
        // Now it is registered, and after this it is not: what is bound to it is unbound.
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
}

/// A binding to a server that stays is never seen as anything else but one of the two that are made
/// in turn.
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
    // Whoever rebinds goes on until both bindings have been seen often enough.
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

/// While the table grows and shrinks by others, what is registered throughout is always found, and
/// listed exactly once.
#[test]
fn readers_find_everything_while_the_table_grows() {
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
                let mut listed = 0;
                for shard in 0..4 {
                    registry.for_each_connection_of(shard, |id, _| {
                        listed += u64::from(id.kind() == 1);
                    });
                }
                assert_eq!(listed, PERMANENT);
                checks += 1;
                if done.load(Ordering::Acquire) {
                    return checks;
                }
            }
        }
    })
    .into_iter()
    .sum();
    assert!(checks >= 2, "no contention");
}

/// Entering against closing: what was not refused has been removed.
/// Ids come back at other places while the table grows, so that the former table still has their
/// former keys: each is found and removed at its place, and listed there.
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
        // Takes the place that has become free.
        register(format!("filler {filler}"), u64::MAX);
        let place = register(returning(n), lease);
        let mut listed = 0;
        if filler % 64 == 0 {
            registry.for_each_address_of(0, |address| listed += u64::from(address == lease));
            assert_eq!(listed, 1, "filler {filler}");
        }
        let removed = registry.remove_leased(&place, |held| *held == lease);
        assert!(removed.is_some(), "filler {filler}");
        register(returning(n), lease);
    }
}

#[test]
fn nothing_is_left_behind_a_close() {
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
                    // Those who were registering while we closed take theirs out again.
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
    if !cfg!(miri) {
        assert!(refused.load(Ordering::Relaxed) > 0, "no contention");
    }
    registry.close(|_| {});
    assert_eq!(registry.count(Namespace::Server), 0);
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
