//! The guarded look-up: the address for a message, if circuit breaker, shard and token bucket admit it.
//!
//! The layers are checked in this order: the target's own circuit breaker, where there are any (see the module
//! `target_breakers`), the circuit breaker of all messages (a load), the depth of the shard (two loads), the token
//! bucket (one compare-and-swap). Then the message is counted in its shard. A layer that is off costs one load. If a
//! later layer refuses a message, the earlier ones keep no trace of it.

use std::hint::black_box;

use super::buckets::BucketError;
use super::entry::{Connection, Key};
use super::process_group::{Search, TooSparse};
use super::stored::{Stored, with_map};
use super::{Delivery, Entry, Id, Namespace, Registry};
use crate::admission::{Receiver, UNSEEN};
use crate::circuit_breaker::{CircuitBreaker, Permit, State};
use crate::clock::Clock;
use crate::counter::Passages;
use crate::shard::Shard;
use crate::token_bucket::Level;

/// The bucket that a message is charged to.
#[derive(Debug, Clone, Copy)]
pub enum Charged<'a> {
    /// None.
    Nobody,
    /// The target's bucket.
    Target,
    /// The bucket of a transport, if it is registered.
    Transport(Id<'a>),
}

/// Why a message is refused. Each refusal is counted (see [`crate::counter`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The target is not registered.
    NotFound = 0,
    /// The circuit is open, or the target's own.
    CircuitOpen = 1,
    /// The target's shard has its threshold of messages queued.
    ShardOverloaded = 2,
    /// The bucket that is charged is empty.
    RateLimited = 3,
    /// The target's message store has no room.
    StoreFull = 4,
}

/// Why a message to a connection whose lease delivers was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Undelivered<E> {
    /// A layer refuses it, or the delivery.
    Refused(Refusal),
    /// The delivery has failed for another reason.
    Failed(E),
}

/// What would become of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forecast {
    /// Why it would be refused; `None` if it would be admitted.
    pub refusal: Option<Refusal>,
    /// Milliseconds until every layer would admit it, as far as can be known: open circuits are half open, the
    /// shard is sampled, the bucket holds a token. 0 if it would be admitted, or the target is not registered.
    pub wait_ms: u64,
}

/// Events that the caller reports to other processes. Empty for most messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Events {
    /// This shard should be sampled now.
    pub sample: Option<u16>,
    /// This shard has entered overload.
    pub overloaded: Option<u16>,
    /// The circuit has become half open, before it changed to [`Self::circuit`].
    pub has_half_opened: bool,
    /// The circuit has changed to this state, open or closed.
    pub circuit: Option<State>,
}

impl Events {
    /// Whether there is anything to report.
    #[inline]
    pub fn is_some(&self) -> bool {
        self.sample.is_some()
            || self.overloaded.is_some()
            || self.has_half_opened
            || self.circuit.is_some()
    }
}

/// Messages whose look-ups are under way together. More of them gain nothing: a core has some 16 cache misses in
/// flight.
pub const ROUTED_TOGETHER: usize = 16;

struct Target<'a> {
    address: u64,
    key: &'a Key,
    level: Option<&'a Level>,
}

#[cold]
fn refused(shard: &Shard, refusal: Refusal) -> Refusal {
    shard.refusals.count(refusal);
    refusal
}

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// The address of `id` if a message may be sent there, and how. The message is then counted, except with
    /// [`Delivery::ByLease`]. Takes no lock: a compare-and-swap is retried only if another thread changes the same token
    /// bucket.
    #[inline(always)]
    pub fn route(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        charged: Charged<'_>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        events: &mut Events,
    ) -> Result<(u64, Delivery), Refusal> {
        with_map!(self, namespace, |map| {
            self.lookup(map, id, |key, value, entry| {
                let delivery = key.delivery();
                if delivery == Delivery::ByLease {
                    return Ok((entry.address, delivery));
                }
                let target = Target {
                    address: entry.address,
                    key,
                    level: value.level(),
                };
                self.pass(target, charged, circuit, clock, events)
                    .map(|address| (address, delivery))
            })
        })
        .unwrap_or_else(|| Err(self.not_found(id)))
    }

    /// Routes a message to a connection whose lease delivers it: after all layers have been passed, `deliver` gets the
    /// lease, whatever the connection's [`Delivery`] is now. If it returns an error, no layer keeps a trace of the message.
    #[cold]
    pub fn route_by_lease<R, E>(
        &self,
        id: &Id<'_>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        events: &mut Events,
        deliver: impl FnOnce(&L) -> Result<R, Undelivered<E>>,
    ) -> Result<R, Undelivered<E>> {
        self.lookup(&self.connections, id, |key, connection, entry| {
            let target = Target {
                // What the lease has taken waits in no mailbox.
                address: UNSEEN,
                key,
                level: Some(&connection.level),
            };
            let pass = || {
                let mut receiver = self.receiver(&target);
                let permit = self.check(
                    &target,
                    &mut receiver,
                    Charged::Target,
                    circuit,
                    clock,
                    events,
                );
                let permit = permit.map_err(Undelivered::Refused)?;
                let delivered = deliver(&entry.lease).map_err(|error| {
                    if self.buckets.is_on() {
                        // By the id: the connection may have been written anew meanwhile.
                        let _ = self.refund_tokens(Namespace::Connection, id, 1, clock);
                    }
                    if permit != Permit::Free {
                        circuit.release_probe();
                    }
                    if let Undelivered::Refused(refusal) = error {
                        self.shards[usize::from(key.shard())]
                            .refusals
                            .count(refusal);
                    }
                    error
                })?;
                self.admit(&target, &receiver, permit, circuit, clock, events);
                Ok(delivered)
            };
            if self.target_breakers.is_empty() || !self.enforces_limits() {
                return pass();
            }
            self.target_breakers
                .guarded(Namespace::Connection, id, clock, pass)
                .unwrap_or_else(|| {
                    let shard = &self.shards[usize::from(key.shard())];
                    Err(Undelivered::Refused(refused(shard, Refusal::CircuitOpen)))
                })
        })
        .unwrap_or_else(|| Err(Undelivered::Refused(self.not_found(id))))
    }

    /// Routes a message to each of some connections, in order, [`ROUTED_TOGETHER`] at a time. Calls `each` with the
    /// entry that it may be sent to, and how, or why not. `None` is an id that cannot be registered.
    ///
    /// Two passes, so that the cache misses of the messages overlap. The first one finds the entries and loads what
    /// the layers will read. The second one checks the layers, in order. The locked instructions of the layers wait
    /// for all loads before them, so in one pass only the misses of one message would be in flight at a time.
    ///
    /// Each look-up takes effect in the first pass, and the guard keeps what it has found until the second one. A
    /// message to an id that is removed or registered between the two is ordered before that: both happen within
    /// this call, and nothing that the first pass does is visible to other threads. The layers' state is read in
    /// the second pass alone.
    pub fn route_connections(
        &self,
        ids: &[Option<Id<'_>>],
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        mut each: impl FnMut(Result<(&Entry<L>, Delivery), Refusal>, Events),
    ) {
        let guard = self.connections.guard();
        for ids in ids.chunks(ROUTED_TOGETHER) {
            let mut found: [Option<(&Key, &Connection<L>)>; ROUTED_TOGETHER] =
                [None; ROUTED_TOGETHER];
            for (found, id) in found.iter_mut().zip(ids) {
                *found = id
                    .as_ref()
                    .and_then(|id| self.connections.get_key_value(id, &guard));
            }
            for (key, connection) in found.iter().flatten() {
                self.touch(key, connection);
            }
            for (found, id) in found.iter().zip(ids) {
                let mut events = Events::default();
                let routed = match (found, id) {
                    (Some((key, connection)), _) if key.delivery() == Delivery::ByLease => {
                        Ok((&connection.entry, Delivery::ByLease))
                    }
                    (Some((key, connection)), _) => {
                        let target = Target {
                            address: connection.entry.address,
                            key,
                            level: Some(&connection.level),
                        };
                        self.pass(target, Charged::Target, circuit, clock, &mut events)
                            .map(|_| (&connection.entry, key.delivery()))
                    }
                    (None, Some(id)) => Err(self.not_found(id)),
                    (None, None) => Err(self.refuse_unknown()),
                };
                each(routed, events);
            }
        }
    }

    /// Prefetches what a message to this connection will read.
    #[inline]
    fn touch(&self, key: &Key, connection: &Connection<L>) {
        let address = connection.entry.address;
        let admission = self.shards[usize::from(key.shard())].admission();
        black_box(admission.receiver(address, key.receiver()));
        if self.buckets.is_on() {
            black_box(connection.level.touch());
        }
    }

    /// Routes a message to every transport that is bound to `server`. Calls `each` with the entries that it may be
    /// sent to, or why not. Costs as [`Self::for_each_bound`] does.
    pub fn route_bound(
        &self,
        server: &Id<'_>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        mut each: impl FnMut(Result<&Entry<L>, Refusal>, Events),
    ) {
        self.visit_bound(server, |key, transport| {
            self.pass_uncharged(key, &transport.entry, circuit, clock, &mut each);
        });
    }

    /// Routes a message to every member of a group. Calls `each` with the entries that it may be sent to, or why not.
    /// Costs as [`Self::for_each_member`] does.
    pub fn route_group(
        &self,
        group: &Id<'_>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        mut each: impl FnMut(Result<&Entry<L>, Refusal>, Events),
    ) {
        self.visit_members(group, |key, member| {
            self.pass_uncharged(key, &member.entry, circuit, clock, &mut each);
        });
    }

    /// Routes a message to one member of a group, as [`Self::pick`] does. `routed` gets the entry that it may be sent to, or
    /// why not.
    pub fn route_member<R>(
        &self,
        group: &Id<'_>,
        search: Search,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        is_live: impl Fn(&Entry<L>) -> bool,
        mut routed: impl FnMut(Result<&Entry<L>, Refusal>, Events) -> R,
    ) -> Result<R, TooSparse> {
        let picked = self.pick_member(group, search, is_live, |key, member| {
            self.pass_uncharged(key, &member.entry, circuit, clock, &mut routed)
        })?;
        Ok(match picked {
            Some(result) => result,
            None => routed(Err(self.not_found(group)), Events::default()),
        })
    }

    /// As [`Self::pass`], with no bucket to charge.
    fn pass_uncharged<R>(
        &self,
        key: &Key,
        entry: &Entry<L>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        routed: &mut impl FnMut(Result<&Entry<L>, Refusal>, Events) -> R,
    ) -> R {
        let target = Target {
            address: entry.address,
            key,
            level: None,
        };
        let mut events = Events::default();
        let passed = self.pass(target, Charged::Nobody, circuit, clock, &mut events);
        routed(passed.map(|_| entry), events)
    }

    #[inline(always)]
    fn pass(
        &self,
        target: Target<'_>,
        charged: Charged<'_>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        events: &mut Events,
    ) -> Result<u64, Refusal> {
        if !self.target_breakers.is_empty() {
            return self.pass_target_breaker(target, charged, circuit, clock, events);
        }
        self.pass_layers(target, charged, circuit, clock, events)
    }

    /// A route without breakers of targets takes a tenth longer where this is inlined into it.
    #[cold]
    fn pass_target_breaker(
        &self,
        target: Target<'_>,
        charged: Charged<'_>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        events: &mut Events,
    ) -> Result<u64, Refusal> {
        if !self.enforces_limits() {
            return self.pass_layers(target, charged, circuit, clock, events);
        }
        let location = target.key.location();
        let id = self.id_of(target.key);
        self.target_breakers
            .guarded(location.namespace, &id, clock, || {
                self.pass_layers(target, charged, circuit, clock, events)
            })
            .unwrap_or_else(|| {
                let shard = &self.shards[usize::from(location.shard)];
                Err(refused(shard, Refusal::CircuitOpen))
            })
    }

    #[inline(always)]
    fn pass_layers(
        &self,
        target: Target<'_>,
        charged: Charged<'_>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        events: &mut Events,
    ) -> Result<u64, Refusal> {
        // First, since it may miss the cache.
        let mut receiver = self.receiver(&target);
        let permit = self.check(&target, &mut receiver, charged, circuit, clock, events)?;
        self.admit(&target, &receiver, permit, circuit, clock, events);
        Ok(target.address)
    }

    #[inline(always)]
    fn receiver<'a>(&'a self, target: &Target<'a>) -> Receiver<'a> {
        let admission = self.shards[usize::from(target.key.shard())].admission();
        admission.receiver(target.address, target.key.receiver())
    }

    /// Asks the layers, and acquires the token.
    #[inline(always)]
    fn check(
        &self,
        target: &Target<'_>,
        receiver: &mut Receiver<'_>,
        charged: Charged<'_>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        events: &mut Events,
    ) -> Result<Permit, Refusal> {
        let number = target.key.shard();
        let shard = &self.shards[usize::from(number)];
        let permit = circuit
            .check(clock)
            .map_err(|_| refused(shard, Refusal::CircuitOpen))?;
        if let Permit::Probe { is_first: true } = permit {
            events.has_half_opened = true;
        }
        let checked = shard.admission().check(
            receiver,
            &self.sampling,
            || clock.now_ms(),
            || shard.receivers(),
        );
        if let Err(overloaded) = checked {
            if overloaded.has_entered {
                events.overloaded = Some(number);
            }
            if overloaded.wants_sample {
                events.sample = Some(number);
            }
            let is_failure = overloaded.is_failure || permit != Permit::Free;
            if is_failure && circuit.record_failure(clock) {
                events.circuit = Some(State::Open);
            }
            return Err(refused(shard, Refusal::ShardOverloaded));
        }
        // The clock is renewed before a refusal: the bucket may have been refilled since its reading.
        if self.buckets.is_on()
            && !self.pay(target, charged, clock)
            && !(clock.renew() && self.pay(target, charged, clock))
        {
            if permit != Permit::Free {
                circuit.release_probe();
            }
            return Err(refused(shard, Refusal::RateLimited));
        }
        Ok(permit)
    }

    /// Counts a message that all layers admit.
    #[inline(always)]
    fn admit(
        &self,
        target: &Target<'_>,
        receiver: &Receiver<'_>,
        permit: Permit,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        events: &mut Events,
    ) {
        let number = target.key.shard();
        if receiver.is_counted() {
            let admission = self.shards[usize::from(number)].admission();
            if admission
                .admit(receiver, &self.sampling, || clock.now_ms())
                .wants_sample
            {
                events.sample = Some(number);
            }
        } else {
            self.passed(number);
        }
        if permit != Permit::Free && circuit.record_success(clock) {
            events.circuit = Some(State::Closed);
        }
    }

    /// Counts a message to a shard without a threshold. Not inlined, so that routes with thresholds stay short.
    #[inline(never)]
    fn passed(&self, shard: u16) {
        self.passages
            .get_or_init(|| Box::new(Passages::new(self.shards.len())))
            .count(usize::from(shard));
    }

    /// What would become of a message now. Leaves no trace of the question: takes no token and no probe, and counts
    /// nothing. The layers are asked one after the other, so it is no snapshot.
    pub fn forecast(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        charged: Charged<'_>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
    ) -> Forecast {
        let target = with_map!(self, namespace, |map| {
            self.lookup(map, id, |key, value, entry| {
                let shard = &self.shards[usize::from(key.shard())];
                let admission = shard.admission();
                let address = match key.delivery() {
                    Delivery::ByLease => UNSEEN,
                    Delivery::Single | Delivery::Batched => entry.address,
                };
                let mut receiver = admission.receiver(address, key.receiver());
                let admission_ms =
                    admission.wait_ms(&mut receiver, &self.sampling, clock.now_ms(), || {
                        shard.receivers()
                    });
                let bucket = match (charged, value.level()) {
                    _ if !self.buckets.is_on() => None,
                    (Charged::Target, Some(level)) => self.buckets.state(level, clock),
                    (Charged::Transport(id), _) => {
                        self.bucket_state(Namespace::Transport, &id, clock)
                    }
                    (Charged::Target, None) | (Charged::Nobody, _) => None,
                };
                (admission_ms, bucket)
            })
        });
        let Some((admission_ms, bucket)) = target else {
            return Forecast {
                refusal: Some(Refusal::NotFound),
                wait_ms: 0,
            };
        };
        let target_breaker_ms = match self.enforces_limits() {
            true => self
                .target_breakers
                .with(namespace, id, |breaker| breaker.wait_ms(clock)),
            false => None,
        }
        .unwrap_or(0);
        let layers = [
            (
                Refusal::CircuitOpen,
                circuit.wait_ms(clock).max(target_breaker_ms),
            ),
            (Refusal::ShardOverloaded, admission_ms),
            (
                Refusal::RateLimited,
                bucket.map_or(0, |bucket| bucket.wait_ns.div_ceil(1_000_000)),
            ),
        ];
        let refusals = layers.iter().filter(|(_, wait_ms)| *wait_ms > 0);
        Forecast {
            refusal: refusals.clone().map(|(refusal, _)| *refusal).next(),
            wait_ms: refusals.map(|(_, wait_ms)| *wait_ms).max().unwrap_or(0),
        }
    }

    /// Refuses a message to an id that was not looked up: it cannot be registered, or not where it would be looked
    /// up.
    pub fn refuse_unknown(&self) -> Refusal {
        refused(&self.shards[0], Refusal::NotFound)
    }

    /// Counts a message to a store that is replaced all the time.
    pub fn refuse_full(&self, id: &Id<'_>) -> Refusal {
        let shard = id.hash as usize % self.shards.len();
        refused(&self.shards[shard], Refusal::StoreFull)
    }

    /// Counted in any shard: an id that is not registered has none, and its hash spreads the writes.
    #[cold]
    fn not_found(&self, id: &Id<'_>) -> Refusal {
        let shard = id.hash as usize % self.shards.len();
        refused(&self.shards[shard], Refusal::NotFound)
    }

    #[inline(always)]
    fn pay(&self, target: &Target<'_>, charged: Charged<'_>, clock: &impl Clock) -> bool {
        match charged {
            Charged::Nobody => true,
            Charged::Target => target.level.is_none_or(|level| {
                self.buckets
                    .admits(level, clock)
                    .unwrap_or_else(|| self.pay_anew(target.key, clock))
            }),
            Charged::Transport(id) => self
                .lookup(&self.transports, &id, |_, transport, _| {
                    self.buckets.admits(&transport.level, clock)
                })
                .flatten()
                .unwrap_or(true),
        }
    }

    /// Charges the target whose value was replaced since it was found. A message to an entry that has just been removed needs
    /// no token.
    #[cold]
    fn pay_anew(&self, key: &Key, clock: &impl Clock) -> bool {
        let taken = self.take_tokens(key.location().namespace, &self.id_of(key), 1, clock);
        !matches!(taken, Err(BucketError::Refused(_)))
    }
}
