//! The registry: three namespaces of ids, and bindings of transports to servers.
//!
//! # Structure
//!
//! One `papaya` map a namespace, from [`Id`] to an entry: a look-up hashes the id once, keyed at
//! random, and touches the table and the entry. For each shard a [`crate::slots::Slots`] holds the
//! hashes of its entries, so that listing a shard costs in proportion to the shard. Bindings are
//! described in the module `bindings`.
//!
//! A registration carries a *lease* `L`. Leases that are equal are the same registration, so a
//! removal can name the one it means ([`Registry::remove_leased`]) and never takes away another
//! that has the same id.
//!
//! # Consistency
//!
//! Look-ups, registrations, removals and bindings are linearizable. Each takes effect at one
//! exchange (or read) in one map:
//!
//! * registration, re-registration and removal at the exchange of the id's entry, so that two
//!   registrations of one id never both win;
//! * a registration with an automatic binding when its attempt is decided;
//! * removal of a server, with all its bindings, at the exchange that takes it out of the map.
//!
//! Listings and [`Registry::for_each_bound`] are weakly consistent: what is there throughout is
//! seen exactly once, what comes or goes meanwhile may be seen or not. Counters are exact when
//! nothing is under way; a registration counts from shortly before it is visible.
//!
//! `max_entries` is a bound on registrations including those under way. Close to it one may be
//! refused although another one that is under way is refused too (because its id is taken).
//!
//! # Trade-offs
//!
//! Removed entries are freed some operations later (`papaya` reclaims in batches), so their leases
//! are dropped late. Nothing relies on when a lease is dropped.

mod bindings;
mod buckets;
mod entry;
mod group;
mod registration;
mod routing;

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use ahash::RandomState;
use papaya::HashMap;
use seize::Collector;

use buckets::Buckets;
pub use buckets::{BucketError, BucketState, EntryLimits};
use entry::{Connection, IdHashing, Key, Located, Server, Transport};
pub use entry::{Entry, Id, Location};
#[doc(hidden)]
pub use group::Decision;
pub use routing::{Charged, Events, Refusal};

use crate::admission::{Admission, Sampling};
use crate::clock::Clock;
use crate::counter::Refused;
use crate::diversion::Diversion;
use crate::error::LimitsError;
use crate::gate::Gate;
use crate::shard::Shard;
use crate::sync::AtomicU64;

/// The three kinds of ids. The same id may stand in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Namespace {
    /// MCP servers.
    Server = 0,
    /// MCP transports, which can be bound to servers.
    Transport = 1,
    /// Plain connections.
    Connection = 2,
}

impl Namespace {
    pub(crate) const COUNT: usize = 3;
    /// All of them, in the order of their discriminants.
    pub const ALL: [Self; Self::COUNT] = [Self::Server, Self::Transport, Self::Connection];
}

/// The bounds of a registry, fixed when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    shards: u16,
    max_entries: u64,
    max_id_bytes: usize,
}

impl Limits {
    /// `shards`: a power of two up to 1024. `max_entries`: registrations in all namespaces
    /// together, up to 2^28. `max_id_bytes`: bytes of an encoded id, up to 2^24.
    pub fn new(shards: u64, max_entries: u64, max_id_bytes: u64) -> Result<Self, LimitsError> {
        if !shards.is_power_of_two() || shards > 1024 {
            return Err(LimitsError::Shards(shards));
        }
        if !(1..=1 << 28).contains(&max_entries) {
            return Err(LimitsError::MaxEntries(max_entries));
        }
        if !(1..=1 << 24).contains(&max_id_bytes) {
            return Err(LimitsError::MaxIdBytes(max_id_bytes));
        }
        Ok(Self {
            shards: shards as u16,
            max_entries,
            max_id_bytes: max_id_bytes as usize,
        })
    }

    /// Number of shards.
    pub fn shards(&self) -> u16 {
        self.shards
    }

    /// Registrations that the registry takes in all.
    pub fn max_entries(&self) -> u64 {
        self.max_entries
    }

    /// Bytes that an encoded id may have.
    pub fn max_id_bytes(&self) -> usize {
        self.max_id_bytes
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            shards: 64,
            max_entries: 2_000_000,
            max_id_bytes: 65_535,
        }
    }
}

type Map<V> = HashMap<Key, V, IdHashing>;

/// All maps have one collector: a thread that reads one of them and then another one announces that
/// once.
fn map<V: Send + 'static>(collector: &Arc<Collector>, hashing: &IdHashing) -> Map<V> {
    HashMap::builder()
        .shared_collector(Arc::clone(collector))
        .hasher(hashing.clone())
        .build()
}

const DEFAULT_SAMPLE_INTERVAL_MS: u64 = 100;

/// See the [module's documentation](self).
pub struct Registry<L> {
    limits: Limits,
    hashing: IdHashing,
    servers: Map<Server<L>>,
    transports: Map<Transport<L>>,
    connections: Map<Connection<L>>,
    shards: Box<[Shard]>,
    buckets: Buckets,
    sampling: Sampling,
    /// Registrations, those under way included.
    reserved: AtomicU64,
    /// Closed while the namespaces of servers and transports take no registrations.
    gate: Gate,
    diversion: Diversion,
}

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// An empty registry. Its maps allocate when they are first used.
    ///
    /// It has no limits but its own bounds: every message is routed until
    /// [`Self::set_limits`] or the thresholds of [`Self::admission`] are set.
    pub fn new(limits: Limits, clock: &impl Clock) -> Self {
        let hashing = IdHashing(RandomState::new());
        let collector = Arc::new(Collector::new());
        Self {
            limits,
            servers: map(&collector, &hashing),
            transports: map(&collector, &hashing),
            connections: map(&collector, &hashing),
            hashing,
            shards: (0..limits.shards).map(|_| Shard::default()).collect(),
            buckets: Buckets::new(clock),
            sampling: Sampling::new(DEFAULT_SAMPLE_INTERVAL_MS),
            reserved: AtomicU64::new(0),
            gate: Gate::new(),
            diversion: Diversion::new(),
        }
    }

    /// The diversion of those who change servers, transports and bindings. The registry does not
    /// look at it: whoever lets others write to it does.
    pub fn diversion(&self) -> &Diversion {
        &self.diversion
    }

    /// The bounds that the registry was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The id of `bytes` of some `kind`, with its hash: what every other operation takes.
    #[inline(always)]
    pub fn id<'a>(&self, kind: u8, bytes: &'a [u8]) -> Id<'a> {
        Id {
            hash: self.hashing.hash(kind, bytes),
            kind,
            bytes,
        }
    }

    fn id_of<'a>(&self, key: &'a Key) -> Id<'a> {
        self.id(key.kind(), key.bytes())
    }

    /// A query for the entry at a place; `None` if nothing is registered there.
    fn located(&self, location: Location) -> Option<Located<'_>> {
        let hash = self.shards[usize::from(location.shard)]
            .slots
            .get(location.slot)?;
        Some(self.at(location, hash))
    }

    fn at(&self, location: Location, hash: u64) -> Located<'_> {
        Located {
            hashing: &self.hashing,
            hash,
            location,
        }
    }

    // ---- Look-up ----

    /// The address of `id`, and nothing else: the hot path. Wait-free while the table is not
    /// being resized.
    #[inline(always)]
    pub fn address(&self, namespace: Namespace, id: &Id<'_>) -> Option<u64> {
        match namespace {
            Namespace::Connection => {
                let guard = self.connections.guard();
                Some(self.connections.get(id, &guard)?.entry.address)
            }
            Namespace::Server => {
                let guard = self.servers.guard();
                Some(self.servers.get(id, &guard)?.entry()?.address)
            }
            Namespace::Transport => {
                let guard = self.transports.guard();
                let transport = self.transports.get(id, &guard)?;
                self.is_registered(transport)
                    .then_some(transport.entry.address)
            }
        }
    }

    /// Runs `f`, in which look-ups by this thread cost less: each has to announce that it reads, and
    /// what is announced once here holds for all. Nothing that is removed meanwhile is freed before
    /// `f` returns.
    #[inline]
    pub fn reading<R>(&self, f: impl FnOnce() -> R) -> R {
        let _guard = self.connections.guard();
        f()
    }

    /// The address and the lease of `id`.
    pub fn entry(&self, namespace: Namespace, id: &Id<'_>) -> Option<Entry<L>> {
        match namespace {
            Namespace::Connection => {
                let guard = self.connections.guard();
                Some(self.connections.get(id, &guard)?.entry.clone())
            }
            Namespace::Server => {
                let guard = self.servers.guard();
                self.servers.get(id, &guard)?.entry().cloned()
            }
            Namespace::Transport => {
                let guard = self.transports.guard();
                let transport = self.transports.get(id, &guard)?;
                self.is_registered(transport)
                    .then(|| transport.entry.clone())
            }
        }
    }

    // ---- Listing and counting ----

    /// Gives `each` every entry of a namespace with its id. Weakly consistent.
    pub fn for_each(&self, namespace: Namespace, mut each: impl FnMut(Id<'_>, &Entry<L>)) {
        let _: ControlFlow<()> = self.try_for_each(namespace, |id, entry| {
            each(id, entry);
            ControlFlow::Continue(())
        });
    }

    /// As [`Self::for_each`], until `each` breaks.
    pub fn try_for_each<B>(
        &self,
        namespace: Namespace,
        mut each: impl FnMut(Id<'_>, &Entry<L>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        match namespace {
            Namespace::Connection => {
                let guard = self.connections.guard();
                for (key, connection) in self.connections.iter(&guard) {
                    each(self.id_of(key), &connection.entry)?;
                }
            }
            Namespace::Server => {
                let guard = self.servers.guard();
                for (key, server) in self.servers.iter(&guard) {
                    if let Some(entry) = server.entry() {
                        each(self.id_of(key), entry)?;
                    }
                }
            }
            Namespace::Transport => {
                let guard = self.transports.guard();
                for (key, transport) in self.transports.iter(&guard) {
                    if self.is_registered(transport) {
                        each(self.id_of(key), &transport.entry)?;
                    }
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Gives `each` every binding: transport, server. Weakly consistent.
    pub fn for_each_binding(&self, mut each: impl FnMut(Id<'_>, Id<'_>)) {
        let guard = self.transports.guard();
        for (key, transport) in self.transports.iter(&guard) {
            if !self.is_registered(transport) {
                continue;
            }
            if let Some(membership) = self.holding(&transport.binding)
                && self.is_current(&membership.group)
            {
                each(self.id_of(key), self.id_of(&membership.group.server));
            }
        }
    }

    /// Gives `each` the connections of one shard with their ids. Weakly consistent; costs in
    /// proportion to the most entries of that shard at one time.
    pub fn for_each_connection_of(&self, shard: u16, mut each: impl FnMut(Id<'_>, &Entry<L>)) {
        let _: ControlFlow<()> = self.try_for_each_connection_of(shard, |id, entry| {
            each(id, entry);
            ControlFlow::Continue(())
        });
    }

    /// As [`Self::for_each_connection_of`], until `each` breaks.
    pub fn try_for_each_connection_of<B>(
        &self,
        shard: u16,
        mut each: impl FnMut(Id<'_>, &Entry<L>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let guard = self.connections.guard();
        for (slot, hash) in self.shards[usize::from(shard)].slots.iter() {
            let location = Location {
                slot,
                shard,
                namespace: Namespace::Connection,
            };
            let place = self.at(location, hash);
            if let Some((key, connection)) = place.find(&self.connections, &guard) {
                each(self.id_of(key), &connection.entry)?;
            }
        }
        ControlFlow::Continue(())
    }

    /// Gives `each` the address of every entry of one shard, in all namespaces. Weakly consistent;
    /// costs in proportion to the most entries of that shard at one time.
    pub fn for_each_address_of(&self, shard: u16, mut each: impl FnMut(u64)) {
        for (slot, hash) in self.shards[usize::from(shard)].slots.iter() {
            let at = |namespace| {
                let location = Location {
                    slot,
                    shard,
                    namespace,
                };
                self.address_at(&self.at(location, hash))
            };
            // An id that comes last here is the one most often there.
            if let Some(address) = Namespace::ALL.into_iter().rev().find_map(at) {
                each(address);
            }
        }
    }

    fn address_at(&self, place: &Located<'_>) -> Option<u64> {
        match place.location.namespace {
            Namespace::Connection => {
                let guard = self.connections.guard();
                Some(place.find(&self.connections, &guard)?.1.entry.address)
            }
            Namespace::Server => {
                let guard = self.servers.guard();
                Some(place.find(&self.servers, &guard)?.1.entry()?.address)
            }
            Namespace::Transport => {
                let guard = self.transports.guard();
                let (_, transport) = place.find(&self.transports, &guard)?;
                self.is_registered(transport)
                    .then_some(transport.entry.address)
            }
        }
    }

    /// Number of entries of one namespace in one shard. Constant time.
    pub fn count_of(&self, namespace: Namespace, shard: u16) -> u64 {
        self.shards[usize::from(shard)].count(namespace)
    }

    /// The admission control of a shard, which must be less than the number of shards.
    pub fn admission(&self, shard: u16) -> &Admission {
        &self.shards[usize::from(shard)].admission
    }

    /// Messages to a shard that were refused so far. Those to nobody count in any shard: only their
    /// sum over all shards means something.
    pub fn refused(&self, shard: u16) -> Refused {
        self.shards[usize::from(shard)].refusals.read()
    }

    /// How often the shards are sampled.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Number of entries of one namespace. Costs one load a shard.
    pub fn count(&self, namespace: Namespace) -> u64 {
        self.shards.iter().map(|shard| shard.count(namespace)).sum()
    }

    /// Number of places that a listing of the shard visits.
    pub fn shard_high_water(&self, shard: u16) -> u32 {
        self.shards[usize::from(shard)].slots.high_water()
    }

    /// The most entries that there have been at one time, or a little more: the tables never shrink
    /// by themselves, so this is what [`Self::for_each`] costs. One load a shard.
    pub fn high_water(&self) -> u64 {
        self.shards
            .iter()
            .map(|shard| u64::from(shard.slots.high_water()))
            .sum()
    }

    /// Server ids that are in the map only because automatic bindings name them.
    pub fn dangling_servers(&self) -> usize {
        let guard = self.servers.guard();
        self.servers
            .values(&guard)
            .filter(|server| server.entry().is_none())
            .count()
    }
}

impl<L> fmt::Debug for Registry<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("limits", &self.limits)
            .field("reserved", &self.reserved)
            .finish_non_exhaustive()
    }
}
