//! A batch of messages against the same messages one by one: results, events and counters.
#![cfg(not(loom))]

use erlmcp_core::admission::{Pass, Taken, Threshold};
use erlmcp_core::circuit_breaker::{CircuitBreaker, Config};
use erlmcp_core::clock::FakeClock;
use erlmcp_core::registry::{
    self, Charged, Delivery, EntryLimits, Events, Namespace, ROUTED_TOGETHER, Refusal, Registry,
};
use erlmcp_core::token_bucket::Limits;

const SEEDS: u64 = if cfg!(miri) { 3 } else { 300 };
const IDS: u64 = 40;

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

struct Side {
    registry: Registry<u64>,
    circuit: CircuitBreaker,
}

impl Side {
    /// Connections are numbered from 0; the last eight are not registered. There is one shard, since ids
    /// are spread by random keys.
    fn new(seed: u64, clock: &FakeClock) -> Self {
        let mut random = Random(seed);
        let registry = Registry::new(registry::Limits::new(1, 100, 100).unwrap(), clock);
        for n in 0..IDS - 8 {
            let name = n.to_le_bytes();
            // Some processes have several ids.
            registry
                .register(
                    Namespace::Connection,
                    registry.id(0, &name),
                    0,
                    n % 20 + 1,
                    None,
                    |_| n,
                )
                .unwrap();
            let delivery = match random.below(6) {
                0 => Delivery::ByLease,
                1 => Delivery::Batched,
                _ => Delivery::Single,
            };
            let id = registry.id(0, &name);
            let exchanged =
                registry.exchange_lease(Namespace::Connection, &id, |held| *held == n, n, delivery);
            assert_eq!(exchanged, Some(n));
            if random.below(3) == 0 {
                let limits = Limits::new(1 + random.below(5), 0.001).unwrap();
                registry
                    .set_entry_limits(
                        Namespace::Connection,
                        &id,
                        EntryLimits::Own(Some(limits.into())),
                        clock,
                    )
                    .unwrap();
            }
        }
        let shared = Limits::new(1 + random.below(50), 1.0).unwrap();
        registry.set_limits((random.below(2) == 0).then_some(shared), clock);
        let threshold = match random.below(3) {
            0 => Threshold::Off,
            1 => Threshold::Auto,
            _ => Threshold::Exactly(1 + random.below(60)),
        };
        registry.set_threshold(0, threshold);
        let config = Config {
            failure_threshold: 1,
            timeout_ms: 5,
            ..Config::default()
        };
        let circuit = CircuitBreaker::new(Some(config), clock).unwrap();
        Self { registry, circuit }
    }

    fn one_by_one(&self, ids: &[Option<u64>], clock: &FakeClock) -> Routed {
        let route = |id: &Option<u64>| {
            let mut events = Events::default();
            let Some(id) = id else {
                return (Err(self.registry.refuse_unknown()), events);
            };
            let name = id.to_le_bytes();
            let routed = self.registry.route(
                Namespace::Connection,
                &self.registry.id(0, &name),
                Charged::Target,
                &self.circuit,
                clock,
                &mut events,
            );
            (routed, events)
        };
        ids.iter().map(route).collect()
    }

    fn batch(&self, ids: &[Option<u64>], clock: &FakeClock) -> Routed {
        let names: Vec<_> = ids.iter().map(|id| id.map(u64::to_le_bytes)).collect();
        let ids: Vec<_> = names
            .iter()
            .map(|name| name.as_ref().map(|name| self.registry.id(0, name)))
            .collect();
        let mut routed = Vec::new();
        self.registry
            .route_connections(&ids, &self.circuit, clock, |result, events| {
                routed.push((result.map(|(entry, way)| (entry.address, way)), events));
            });
        routed
    }

    /// A pass of the sampler, which finds all mailboxes empty.
    fn sample(&self, now_ms: u64) {
        let admission = self.registry.admission(0);
        admission.begin_pass(Pass::All, now_ms);
        let mut looks = 0;
        while let Taken::Batch(number) = admission.take(false, |_| looks += 1) {
            admission.report(number, vec![Some(0); looks], now_ms);
            looks = 0;
        }
    }

    fn counters(&self, clock: &FakeClock) -> String {
        let admission = self.registry.admission(0);
        let buckets: Vec<_> = (0..IDS)
            .map(|n| {
                let name = n.to_le_bytes();
                let id = self.registry.id(0, &name);
                self.registry
                    .bucket_state(Namespace::Connection, &id, clock)
            })
            .collect();
        format!(
            "{} {} {:?} {:?} {buckets:?}",
            admission.admitted(),
            admission.depth(),
            self.registry.refused(0),
            self.circuit.stats(clock)
        )
    }
}

type Routed = Vec<(Result<(u64, Delivery), Refusal>, Events)>;

#[test]
fn a_batch_is_as_one_by_one() {
    let mut seen = [0u64; 5];
    for seed in 1..=SEEDS {
        let mut random = Random(seed * 0x9e37_79b9);
        let clock = FakeClock::at_ns(1_000_000_000);
        let (one, other) = (Side::new(seed, &clock), Side::new(seed, &clock));
        let mut now_ms = 1_000;
        for _ in 0..20 {
            let len = random.below(3 * ROUTED_TOGETHER as u64 + 2);
            // Some batches have many messages to few ids.
            let among = if random.below(3) == 0 { 3 } else { IDS };
            let ids: Vec<_> = (0..len)
                .map(|_| (random.below(20) > 0).then(|| random.below(among)))
                .collect();
            let routed = one.one_by_one(&ids, &clock);
            assert_eq!(other.batch(&ids, &clock), routed, "seed {seed}");
            assert_eq!(other.counters(&clock), one.counters(&clock), "seed {seed}");
            for (result, _) in routed {
                seen[result.map_or_else(|refusal| 1 + refusal as usize, |_| 0)] += 1;
            }
            let passed_ms = random.below(10);
            clock.advance_ns(passed_ms * 1_000_000);
            now_ms += passed_ms;
            if random.below(3) == 0 {
                one.sample(now_ms);
                other.sample(now_ms);
            }
        }
    }
    assert!(
        cfg!(miri) || seen.iter().all(|count| *count > 0),
        "{seen:?}"
    );
}
