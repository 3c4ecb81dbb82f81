//! The guarded look-up: where a message goes, if circuit, shard and bucket let it through.
//!
//! The layers are asked in the order of what they cost and guard: the circuit (a load), the shard's
//! depth (two loads), the bucket (one exchange), and then the message is counted in its shard. A
//! layer that is off costs one load. What a layer before has let through and a later one refuses is
//! given back: it leaves no trace in the former.

use super::{Entry, Id, Namespace, Registry};
use crate::circuit_breaker::{CircuitBreaker, Permit, State};
use crate::clock::Clock;
use crate::shard::Shard;
use crate::token_bucket::Level;

/// Whose bucket pays for a message.
#[derive(Debug, Clone, Copy)]
pub enum Charged<'a> {
    /// Nobody's.
    Nobody,
    /// The target's own.
    Target,
    /// That of a transport, if it is registered.
    Transport(Id<'a>),
}

/// Why a message may not be sent. Each one is counted (see [`crate::counter`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The target is not registered.
    NotFound = 0,
    /// The circuit is open.
    CircuitOpen = 1,
    /// The target's shard has as many messages queued as it takes.
    ShardOverloaded = 2,
    /// The bucket that pays is empty.
    RateLimited = 3,
}

/// What the caller should tell others. Rare: nothing of it for most messages.
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
    /// Whether there is anything to tell.
    #[inline]
    pub fn is_some(&self) -> bool {
        self.sample.is_some()
            || self.overloaded.is_some()
            || self.has_half_opened
            || self.circuit.is_some()
    }
}

struct Target<'a> {
    address: u64,
    shard: u16,
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
    /// The address of `id` if a message may be sent there, which is then counted. Takes no lock,
    /// and is repeated only where others take from the same bucket at the same moment.
    #[inline(always)]
    pub fn route(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        charged: Charged<'_>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        events: &mut Events,
    ) -> Result<u64, Refusal> {
        match namespace {
            Namespace::Connection => {
                let guard = self.connections.guard();
                let Some((key, connection)) = self.connections.get_key_value(id, &guard) else {
                    return Err(self.not_found(id));
                };
                let target = Target {
                    address: connection.entry.address,
                    shard: key.shard(),
                    level: Some(&connection.level),
                };
                self.pass(target, charged, circuit, clock, events)
            }
            Namespace::Server => {
                let guard = self.servers.guard();
                let Some((key, server)) = self.servers.get_key_value(id, &guard) else {
                    return Err(self.not_found(id));
                };
                let Some(entry) = server.entry() else {
                    return Err(self.not_found(id));
                };
                let target = Target {
                    address: entry.address,
                    shard: key.shard(),
                    level: None,
                };
                self.pass(target, charged, circuit, clock, events)
            }
            Namespace::Transport => {
                let guard = self.transports.guard();
                let Some((key, transport)) = self.transports.get_key_value(id, &guard) else {
                    return Err(self.not_found(id));
                };
                if !self.is_registered(transport) {
                    return Err(self.not_found(id));
                }
                let target = Target {
                    address: transport.entry.address,
                    shard: key.shard(),
                    level: Some(&transport.level),
                };
                self.pass(target, charged, circuit, clock, events)
            }
        }
    }

    /// Routes a message to every transport that is bound to `server`: gives `each` the entries that
    /// it may be sent to, or why not. Costs as [`Self::for_each_bound`] does.
    pub fn route_bound(
        &self,
        server: &Id<'_>,
        circuit: &CircuitBreaker,
        clock: &impl Clock,
        mut each: impl FnMut(Result<&Entry<L>, Refusal>, Events),
    ) {
        self.visit_bound(server, |shard, transport| {
            let mut events = Events::default();
            let target = Target {
                address: transport.entry.address,
                shard,
                level: None,
            };
            let passed = self.pass(target, Charged::Nobody, circuit, clock, &mut events);
            each(passed.map(|_| &transport.entry), events);
        });
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
        let shard = &self.shards[usize::from(target.shard)];
        let permit = circuit
            .check(clock)
            .map_err(|_| refused(shard, Refusal::CircuitOpen))?;
        if let Permit::Probe { is_first: true } = permit {
            events.has_half_opened = true;
        }
        let admission = &shard.admission;
        if let Err(overloaded) = admission.check(&self.sampling, || clock.now_ms()) {
            if overloaded.has_entered {
                events.overloaded = Some(target.shard);
            }
            let is_failure = overloaded.is_failure || permit != Permit::Free;
            if is_failure && circuit.record_failure(clock) {
                events.circuit = Some(State::Open);
            }
            return Err(refused(shard, Refusal::ShardOverloaded));
        }
        // A bucket that has just been taken from may hold another token by now.
        if self.buckets.is_on()
            && !self.pay(target.level, charged, clock)
            && !(clock.renew() && self.pay(target.level, charged, clock))
        {
            if permit != Permit::Free {
                circuit.release_probe();
            }
            return Err(refused(shard, Refusal::RateLimited));
        }
        if admission
            .admit(&self.sampling, || clock.now_ms())
            .wants_sample
        {
            events.sample = Some(target.shard);
        }
        if permit != Permit::Free && circuit.record_success(clock) {
            events.circuit = Some(State::Closed);
        }
        Ok(target.address)
    }

    /// Refuses a message to an id that cannot be registered, or not where it is looked for, and was
    /// not looked up.
    pub fn refuse_unknown(&self) -> Refusal {
        refused(&self.shards[0], Refusal::NotFound)
    }

    /// Counted in any shard: what is not registered has none, and its hash spreads the writers.
    #[cold]
    fn not_found(&self, id: &Id<'_>) -> Refusal {
        let shard = id.hash as usize % self.shards.len();
        refused(&self.shards[shard], Refusal::NotFound)
    }

    #[inline(always)]
    fn pay(&self, target: Option<&Level>, charged: Charged<'_>, clock: &impl Clock) -> bool {
        match charged {
            Charged::Nobody => true,
            Charged::Target => target.is_none_or(|level| self.buckets.admits(level, clock)),
            Charged::Transport(id) => self
                .with_level(Namespace::Transport, &id, |level| {
                    self.buckets.admits(level, clock)
                })
                .unwrap_or(true),
        }
    }
}
