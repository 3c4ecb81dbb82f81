//! The registry: namespaces of ids, bindings of transports to servers, and groups of processes.
//!
//! # Structure
//!
//! One `papaya` map per namespace, from [`Id`] to an entry: a look-up hashes the id once, keyed at random, and
//! touches the table and the entry. For each shard and namespace a [`crate::slots::Slots`] holds the hashes of the
//! entries, so that listing a shard costs in proportion to the shard. Bindings are described in the module
//! `bindings`, groups in `process_group`.
//!
//! A registration carries a *lease* `L`. Equal leases are the same registration. So a removal can name the
//! registration that it means ([`Registry::remove_leased`]) and never removes another one of the same id.
//!
//! # Consistency
//!
//! Look-ups, registrations, removals and bindings are linearizable. Each takes effect at one compare-and-swap (or
//! load) in one map:
//!
//! * registration, re-registration and removal at the compare-and-swap of the id's entry, so that two registrations
//!   of one id never both succeed;
//! * a registration with an automatic binding when its attempt is decided;
//! * removal of a server, with all its bindings, at the compare-and-swap that removes it from the map.
//!
//! Listings and [`Registry::for_each_bound`] are weakly consistent. An entry that is present throughout is seen
//! exactly once. An entry that is inserted or removed meanwhile may or may not be seen. An id that is removed and
//! registered anew may be seen twice, once for each registration. Counters are exact when no operation is under
//! way; a registration counts from shortly before it is visible.
//!
//! All of these walk places and not tables. An entry keeps its place, so a walk can release its guard and resume
//! where it was, and does so again and again (see the module `stored`).
//!
//! `max_entries` bounds registrations including those under way. Close to it a registration may be refused although
//! another one that is under way is refused too (because its id is already registered).
//!
//! # Trade-offs
//!
//! Removed entries are freed some operations later (`papaya` reclaims in batches), so their leases are dropped
//! late. No guarantee depends on when a lease is dropped.

mod announcements;
mod bindings;
mod buckets;
mod entry;
mod group;
mod process_group;
mod registration;
mod routing;
mod stored;
mod target_breakers;

use std::fmt;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use ahash::RandomState;
use once_cell::race::OnceBox;
use papaya::{Guard, HashMap};
use seize::Collector;

pub use announcements::{Announcement, Announcements, Change, Interest};
#[doc(hidden)]
pub use announcements::{Leaving, Phase};
use buckets::Buckets;
#[cfg(loom)]
pub use buckets::EntryBucket;
pub use buckets::{BucketError, BucketState, EntryLimits};
pub(crate) use entry::IdHashing;
use entry::{Connection, Key, Located, Member, Server, Transport};
pub use entry::{Delivery, Entry, Id, Location};
#[doc(hidden)]
pub use group::Decision;
#[doc(hidden)]
pub use process_group::Headcount;
use process_group::ProcessGroup;
pub use process_group::{MemberId, Pick, Search, TooSparse};
pub use routing::{Charged, Events, Forecast, ROUTED_TOGETHER, Refusal, Undelivered};
use stored::with_map;
pub use target_breakers::{
    MAX_FAILURE_THRESHOLD, MAX_TARGET_BREAKERS, TargetBreakerError, TargetBreakers,
};

use crate::admission::{Admission, Sampling, Threshold, UNSEEN};
use crate::churn::Churn;
use crate::clock::Clock;
use crate::counter::{Passages, Refused};
use crate::diversion::Diversion;
use crate::error::LimitsError;
use crate::gate::Gate;
use crate::shard::Shard;
use crate::slots::Slots;
use crate::sync::{AtomicU64, Ordering};

/// The kinds of ids. The same id may be registered in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Namespace {
    /// MCP servers.
    Server = 0,
    /// MCP transports, which can be bound to servers.
    Transport = 1,
    /// Plain connections.
    Connection = 2,
    /// Memberships of processes in groups: see [`MemberId`].
    Member = 3,
}

impl Namespace {
    pub(crate) const COUNT: usize = 4;
    /// All of them, in the order of their discriminants.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Server,
        Self::Transport,
        Self::Connection,
        Self::Member,
    ];

    /// Whether the ids are those of erlmcp, which another store may have instead of this one: servers and transports.
    pub fn is_of_erlmcp(self) -> bool {
        matches!(self, Self::Server | Self::Transport)
    }
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

    /// The most registrations, in all namespaces together.
    pub fn max_entries(&self) -> u64 {
        self.max_entries
    }

    /// The most bytes of an encoded id.
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

/// All maps share one collector: a thread that reads one map inside a guard of another one does not pin the epoch a
/// second time. So no map may be dropped before the registry is (see [`Shard::admission`]).
fn map<V: Send + 'static>(collector: &Arc<Collector>, hashing: &IdHashing) -> Map<V> {
    HashMap::builder()
        .shared_collector(Arc::clone(collector))
        .hasher(hashing.clone())
        .build()
}

const DEFAULT_SAMPLE_INTERVAL_MS: u64 = 100;

/// Registrations, those under way included. On its own pair of cache lines (x86 fetches pairs): every registration
/// writes it, and every look-up reads the fields beside it in the registry.
#[derive(Debug)]
#[repr(align(128))]
struct Reserved(AtomicU64);

/// See the [module's documentation](self).
pub struct Registry<L> {
    limits: Limits,
    hashing: IdHashing,
    servers: Map<Server<L>>,
    transports: Map<Transport<L>>,
    connections: Map<Connection<L>>,
    members: Map<Member<L>>,
    groups: Map<Arc<ProcessGroup>>,
    churn: Churn,
    shards: Box<[Shard]>,
    buckets: Buckets,
    sampling: Sampling,
    reserved: Reserved,
    /// See [`Self::dangling_servers`].
    dangling: AtomicU64,
    /// Closed while servers and transports cannot be registered.
    gate: Gate,
    diversion: Diversion,
    announcements: Announcements<L>,
    target_breakers: TargetBreakers,
    /// Allocated by the first message that no threshold counts.
    passages: OnceBox<Passages>,
}

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// An empty registry. Its maps allocate at the first use.
    ///
    /// It has no limits but its own bounds: every message is routed until [`Self::set_limits`] or the thresholds of
    /// [`Self::admission`] are set.
    pub fn new(limits: Limits, clock: &impl Clock) -> Self {
        let hashing = IdHashing::new(RandomState::new());
        let collector = Arc::new(Collector::new());
        Self {
            limits,
            servers: map(&collector, &hashing),
            transports: map(&collector, &hashing),
            connections: map(&collector, &hashing),
            members: map(&collector, &hashing),
            groups: map(&collector, &hashing),
            announcements: Announcements::new(limits.shards, hashing.clone()),
            target_breakers: TargetBreakers::new(&collector, &hashing),
            hashing,
            churn: Churn::new(),
            shards: (0..limits.shards).map(|_| Shard::new(&collector)).collect(),
            buckets: Buckets::new(&collector, clock),
            sampling: Sampling::new(DEFAULT_SAMPLE_INTERVAL_MS),
            reserved: Reserved(AtomicU64::new(0)),
            dangling: AtomicU64::new(0),
            gate: Gate::new(),
            diversion: Diversion::new(),
            passages: OnceBox::new(),
        }
    }

    /// The diversion of calls on servers, transports and bindings. The registry does not check it: its callers do.
    pub fn diversion(&self) -> &Diversion {
        &self.diversion
    }

    /// The circuit breakers of single targets of routes.
    pub fn target_breakers(&self) -> &TargetBreakers {
        &self.target_breakers
    }

    /// The bounds of the registry.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The id of `bytes` of some `kind`, with its hash: the argument of every other operation.
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
            .slots(location.namespace)?
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

    /// Whether [`Self::complete_resizes`] should be called before `id` is registered, a transport that is bound to it,
    /// or a member of it. Then `id` has been registered and removed so often that the resizes of the maps would not
    /// complete by themselves.
    #[inline]
    pub fn is_churned(&self, id: &Id<'_>) -> bool {
        self.churn
            .is_due(id.hash, || self.reserved.0.load(Ordering::Relaxed))
    }

    /// Completes the resizes of the maps that are under way: see [`crate::churn`]. Costs in proportion to their
    /// entries, inside one guard.
    pub fn complete_resizes(&self) {
        self.churn.complete_resize(&self.servers);
        self.churn.complete_resize(&self.transports);
        self.churn.complete_resize(&self.connections);
        self.churn.complete_resize(&self.members);
        self.churn.complete_resize(&self.groups);
    }

    // ---- Look-up ----

    /// The address of `id`, and nothing else: the fast path. Wait-free while the table is not being resized.
    #[inline(always)]
    pub fn address(&self, namespace: Namespace, id: &Id<'_>) -> Option<u64> {
        with_map!(self, namespace, |map| {
            self.lookup(map, id, |_, _, entry| entry.address)
        })
    }

    /// The address and the lease of `id`.
    pub fn entry(&self, namespace: Namespace, id: &Id<'_>) -> Option<Entry<L>> {
        with_map!(self, namespace, |map| {
            self.lookup(map, id, |_, _, entry| entry.clone())
        })
    }

    /// The result of `f` with the entry at a place, and its id; `None` if nothing is registered there.
    pub fn with_entry_at<R>(
        &self,
        location: Location,
        f: impl FnOnce(Id<'_>, &Entry<L>) -> R,
    ) -> Option<R> {
        let located = self.located(location)?;
        with_map!(self, location.namespace, |map| {
            let guard = map.guard();
            let (key, value) = located.find(map, &guard)?;
            let entry = self.registered(value)?;
            Some(f(self.id_of(key), entry))
        })
    }

    // ---- Listing and counting ----

    /// Calls `each` with every entry of a namespace and its id. Weakly consistent.
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
        with_map!(self, namespace, |map| {
            self.visit(map, namespace, |key, _, entry| each(self.id_of(key), entry))
        })
    }

    /// Calls `each` with every binding: the transport with its entry, and the server. Weakly consistent.
    pub fn for_each_binding(&self, mut each: impl FnMut(Id<'_>, &Entry<L>, Id<'_>)) {
        let _: ControlFlow<()> = self.visit(
            &self.transports,
            Namespace::Transport,
            |key, transport, entry| {
                if let Some(membership) = self.holding(&transport.binding)
                    && self.is_current(&membership.group)
                {
                    let server = self.id_of(&membership.group.server);
                    each(self.id_of(key), entry, server);
                }
                ControlFlow::Continue(())
            },
        );
    }

    /// Calls `each` with the connections of one shard and their ids. Weakly consistent; costs in proportion to the
    /// most entries of that shard at one time.
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
        self.visit_places(
            &self.connections,
            Namespace::Connection,
            shard,
            0..u32::MAX,
            |key, _, entry| each(self.id_of(key), entry),
        )
    }

    /// Calls `each` with the entries of one namespace at `places` of a shard, and their ids. All places of a shard
    /// are those below [`Self::shard_high_water`]; an entry keeps its place. Weakly consistent.
    pub fn try_for_each_at<B>(
        &self,
        namespace: Namespace,
        shard: u16,
        places: Range<u32>,
        mut each: impl FnMut(Id<'_>, &Entry<L>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        with_map!(self, namespace, |map| {
            self.visit_places(map, namespace, shard, places, |key, _, entry| {
                each(self.id_of(key), entry)
            })
        })
    }

    /// Calls `each` with the address of every entry of one shard, in all namespaces. Weakly consistent; costs in
    /// proportion to the most entries of that shard at one time.
    pub fn for_each_address_of(&self, shard: u16, mut each: impl FnMut(u64)) {
        for namespace in Namespace::ALL {
            with_map!(self, namespace, |map| {
                let _: ControlFlow<()> =
                    self.visit_places(map, namespace, shard, 0..u32::MAX, |_, _, entry| {
                        each(entry.address);
                        ControlFlow::Continue(())
                    });
            });
        }
    }

    /// Number of entries of one namespace in one shard. Constant time.
    pub fn count_of(&self, namespace: Namespace, shard: u16) -> u64 {
        self.shards[usize::from(shard)].count(namespace)
    }

    /// The admission control of a shard, which must be less than the number of shards.
    pub fn admission(&self, shard: u16) -> &Admission {
        self.shards[usize::from(shard)].admission()
    }

    /// Changes the threshold of a shard.
    pub fn set_threshold(&self, shard: u16, threshold: Threshold) {
        let shard = &self.shards[usize::from(shard)];
        shard
            .admission()
            .set_threshold(threshold, shard.receivers());
    }

    /// Whether a message to some receiver of a shard would be admitted. Counts and reports nothing.
    pub fn is_open(&self, shard: u16, clock: &impl Clock) -> bool {
        let shard = &self.shards[usize::from(shard)];
        shard
            .admission()
            .is_open(&self.sampling, || clock.now_ms(), || shard.receivers())
    }

    /// Frees what this thread has removed from the connections, unless other threads read them just now.
    pub fn flush(&self) {
        Guard::flush(&self.connections.guard());
    }

    /// The number of processes behind the entries of a shard, estimated without counting them. An automatic
    /// threshold follows it.
    pub fn receivers(&self, shard: u16) -> u64 {
        let shard = &self.shards[usize::from(shard)];
        let receivers = shard.receivers();
        shard.admission().follow(receivers);
        receivers
    }

    /// Whether enough entries have been registered and removed that the receivers of a shard should be counted.
    pub fn is_count_due(&self, shard: u16) -> bool {
        self.shards[usize::from(shard)].is_count_due()
    }

    /// Whether any entry of a shard has been registered or removed since its receivers were counted.
    pub fn is_count_old(&self, shard: u16) -> bool {
        self.shards[usize::from(shard)].changes_since_count() > 0
    }

    /// Counts the processes behind the entries of a shard, except those whose address is [`UNSEEN`]. Costs as
    /// [`Self::for_each_address_of`] does.
    pub fn count_receivers(&self, shard: u16) {
        self.shards[usize::from(shard)].recount(|| {
            let mut addresses = Vec::new();
            self.for_each_address_of(shard, |address| {
                if address != UNSEEN {
                    addresses.push(address);
                }
            });
            addresses.sort_unstable();
            addresses.dedup();
            addresses.len() as u64
        });
    }

    /// Messages to a shard that were refused so far. A message to an id that is not registered counts in any shard:
    /// only the sum of these over all shards means something.
    pub fn refused(&self, shard: u16) -> Refused {
        self.shards[usize::from(shard)].refusals.read()
    }

    /// Messages to a shard that were admitted so far, whether it had a threshold or not. A load for each thread that has
    /// routed without a threshold.
    pub fn admitted(&self, shard: u16) -> u64 {
        let shard = usize::from(shard);
        let counted = self.shards[shard]
            .admission_if_used()
            .map_or(0, Admission::admitted);
        let passed = self
            .passages
            .get()
            .map_or(0, |passages| passages.read(shard));
        counted + passed
    }

    /// How often the shards are sampled.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Number of entries of one namespace. One load per shard.
    pub fn count(&self, namespace: Namespace) -> u64 {
        self.shards.iter().map(|shard| shard.count(namespace)).sum()
    }

    /// Number of places that a listing of one namespace in one shard visits.
    pub fn shard_high_water(&self, namespace: Namespace, shard: u16) -> u32 {
        self.shards[usize::from(shard)]
            .slots(namespace)
            .map_or(0, Slots::high_water)
    }

    /// Number of places that [`Self::for_each`] visits: the most entries of the namespace at one time, or a little
    /// more. One load per shard.
    pub fn high_water_of(&self, namespace: Namespace) -> u64 {
        (0..self.limits.shards())
            .map(|shard| u64::from(self.shard_high_water(namespace, shard)))
            .sum()
    }

    /// The sum of [`Self::high_water_of`] over the namespaces. The tables never shrink by themselves.
    pub fn high_water(&self) -> u64 {
        Namespace::ALL
            .into_iter()
            .map(|namespace| self.high_water_of(namespace))
            .sum()
    }

    /// Server ids that are in the map only because automatic bindings name them.
    pub fn dangling_servers(&self) -> u64 {
        self.dangling.load(Ordering::Relaxed)
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
