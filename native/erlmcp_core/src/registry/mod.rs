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
mod entry;

use std::fmt;
use std::sync::Arc;

use ahash::RandomState;
use papaya::{Compute, HashMap, Operation};

pub use bindings::Decision;
use bindings::{Attempt, Binding, From, Group, Membership};
pub use entry::{Entry, Id, Location};
use entry::{Key, Server, Transport};

use crate::error::{BindError, LimitsError, RegisterError};
use crate::kept_hash::KeptHash;
use crate::shard::Shard;
use crate::slots::OCCUPIED;
use crate::sync::{AtomicBool, AtomicU64, Ordering, fence};

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
    /// together, up to 2^30. `max_id_bytes`: bytes of an encoded id, up to 2^24.
    pub fn new(shards: u64, max_entries: u64, max_id_bytes: u64) -> Result<Self, LimitsError> {
        if !shards.is_power_of_two() || shards > 1024 {
            return Err(LimitsError::Shards(shards));
        }
        if !(1..=1 << 30).contains(&max_entries) {
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

type Map<V> = HashMap<Key, V, KeptHash>;

/// See the [module's documentation](self).
pub struct Registry<L> {
    limits: Limits,
    hasher: RandomState,
    servers: Map<Server<L>>,
    transports: Map<Transport<L>>,
    connections: Map<Entry<L>>,
    shards: Box<[Shard]>,
    /// Registrations, those under way included.
    reserved: AtomicU64,
    /// Whether the namespaces of servers and transports take no registrations.
    closed: AtomicBool,
}

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// An empty registry. Its maps allocate when they are first used.
    pub fn new(limits: Limits) -> Self {
        fn map<V>() -> Map<V> {
            HashMap::with_hasher(KeptHash::default())
        }
        Self {
            limits,
            hasher: RandomState::new(),
            servers: map(),
            transports: map(),
            connections: map(),
            shards: (0..limits.shards).map(|_| Shard::default()).collect(),
            reserved: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        }
    }

    /// The bounds that the registry was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The id of `bytes` of some `kind`, with its hash: what every other operation takes.
    #[inline(always)]
    pub fn id<'a>(&self, kind: u8, bytes: &'a [u8]) -> Id<'a> {
        use std::hash::{BuildHasher, Hasher};
        let mut hasher = self.hasher.build_hasher();
        hasher.write(bytes);
        hasher.write_u8(kind);
        Id {
            hash: hasher.finish() | OCCUPIED,
            kind,
            bytes,
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
                Some(self.connections.get(id, &guard)?.address)
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

    /// The address and the lease of `id`.
    pub fn entry(&self, namespace: Namespace, id: &Id<'_>) -> Option<Entry<L>> {
        match namespace {
            Namespace::Connection => {
                let guard = self.connections.guard();
                self.connections.get(id, &guard).cloned()
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

    // ---- Registration ----

    /// Registers `id` for `address` in `shard`, and for a transport makes the automatic binding to
    /// the server named by `bind_to`, whether that is registered or not. `lease` makes what the
    /// entry carries; it is called at most once, after the first checks have passed.
    ///
    /// Lock-free. `bind_to` is ignored for servers and connections. `shard` must be less than the
    /// number of shards.
    pub fn register(
        &self,
        namespace: Namespace,
        id: Id<'_>,
        shard: u16,
        address: u64,
        bind_to: Option<Id<'_>>,
        lease: impl FnOnce(Location) -> L,
    ) -> Result<L, RegisterError> {
        if let Some(address) = self.address(namespace, &id) {
            return Err(RegisterError::AlreadyRegistered { address });
        }
        if self.reserved.fetch_add(1, Ordering::Relaxed) >= self.limits.max_entries {
            self.reserved.fetch_sub(1, Ordering::Relaxed);
            return Err(RegisterError::RegistryFull);
        }
        let location = Location {
            hash: id.hash,
            slot: self.shards[usize::from(shard)].slots.insert(id.hash),
            shard,
            namespace,
        };
        self.shards[usize::from(shard)].entered(namespace);
        let lease = lease(location);
        let entry = Entry {
            address,
            lease: lease.clone(),
        };
        let inserted = match namespace {
            Namespace::Server => self.insert_server(Key::new(id, location), entry),
            Namespace::Transport => self.insert_transport(id, location, entry, bind_to),
            Namespace::Connection => {
                let guard = self.connections.guard();
                self.connections
                    .try_insert(Key::new(id, location), entry, &guard)
                    .map(|_| ())
                    .map_err(|occupied| occupied.current.address)
            }
        };
        if let Err(address) = inserted {
            self.release(location);
            return Err(RegisterError::AlreadyRegistered { address });
        }
        // SeqCst: the entry was written before this fence and `closed` is read after it;
        // `close` writes and walks in the opposite order with the same fence between. So either
        // we see that the registry is closed, or the walk sees our entry.
        fence(Ordering::SeqCst);
        if namespace != Namespace::Connection && self.closed.load(Ordering::Relaxed) {
            self.remove_leased(&location, |held| *held == lease);
            return Err(RegisterError::Closed);
        }
        Ok(lease)
    }

    fn insert_server(&self, key: Key, entry: Entry<L>) -> Result<(), u64> {
        let guard = self.servers.guard();
        let id_for_group = Key::without_location(key.id());
        let new_group = Group::new(id_for_group);
        let registered = self.servers.compute(
            key,
            |current| match current {
                None => Operation::Insert(Server::Registered {
                    group: Arc::clone(&new_group),
                    entry: entry.clone(),
                }),
                // The transports that are bound to the name are bound to the server from now on.
                Some((_, Server::Dangling { group, .. })) => {
                    Operation::Insert(Server::Registered {
                        group: Arc::clone(group),
                        entry: entry.clone(),
                    })
                }
                Some((_, Server::Registered { entry, .. })) => Operation::Abort(entry.address),
            },
            &guard,
        );
        match registered {
            Compute::Aborted(address) => Err(address),
            _ => Ok(()),
        }
    }

    fn insert_transport(
        &self,
        id: Id<'_>,
        location: Location,
        entry: Entry<L>,
        bind_to: Option<Id<'_>>,
    ) -> Result<(), u64> {
        let guard = self.transports.guard();
        loop {
            let attempt = bind_to
                .map(|server| Attempt::new(self.join(server).enter(location), From::Unregistered));
            let transport = Transport {
                entry: entry.clone(),
                binding: attempt.clone().map_or(Binding::Unbound, Binding::Pending),
            };
            let key = Key::new(id, location);
            if let Err(occupied) = self.transports.try_insert(key, transport, &guard) {
                if let Some(attempt) = attempt {
                    self.leave(&attempt.to);
                }
                if self.is_registered(occupied.current) {
                    return Err(occupied.current.entry.address);
                }
                // Its server went before it was registered, so it never was. Help it out of the
                // way; the one who registers it begins again like us.
                let theirs = &occupied.current.entry.lease;
                let _ = self.transports.remove_if(
                    &id,
                    |_, held| held.entry.lease == *theirs && !self.is_registered(held),
                    &guard,
                );
                continue;
            }
            let Some(attempt) = attempt else {
                return Ok(());
            };
            if self.decide(&attempt) {
                self.settle(&id, &attempt, Some(attempt.to.clone()));
                return Ok(());
            }
            let _ =
                self.transports
                    .remove_if(&id, |_, held| held.binding.is_attempt(&attempt), &guard);
            self.leave(&attempt.to);
        }
    }

    /// Gives back what a registration took before it entered its map.
    fn release(&self, location: Location) {
        let shard = &self.shards[usize::from(location.shard)];
        shard.slots.remove(location.slot);
        shard.left(location.namespace);
        self.reserved.fetch_sub(1, Ordering::Relaxed);
    }

    // ---- Removal ----

    /// Removes whatever is registered under `id`, with its bindings, and returns it.
    pub fn remove(&self, namespace: Namespace, id: &Id<'_>) -> Option<Entry<L>> {
        self.remove_if(namespace, id, |_| true)
    }

    /// Removes the entry at `location` if `is_meant` says that its lease is the one meant. For
    /// the end of what the lease stands for: never touches another registration of the same id.
    pub fn remove_leased(
        &self,
        location: &Location,
        is_meant: impl Fn(&L) -> bool,
    ) -> Option<Entry<L>> {
        self.remove_if(location.namespace, location, is_meant)
    }

    fn remove_if<Q>(
        &self,
        namespace: Namespace,
        query: &Q,
        is_meant: impl Fn(&L) -> bool,
    ) -> Option<Entry<L>>
    where
        Q: papaya::Equivalent<Key> + std::hash::Hash,
    {
        let (location, entry) = match namespace {
            Namespace::Connection => {
                let guard = self.connections.guard();
                let (key, entry) = self
                    .connections
                    .remove_if(query, |_, entry| is_meant(&entry.lease), &guard)
                    .ok()??;
                (key.location(), entry.clone())
            }
            Namespace::Server => {
                let guard = self.servers.guard();
                let (key, server) = self
                    .servers
                    .remove_if(
                        query,
                        |_, server| server.entry().is_some_and(|e| is_meant(&e.lease)),
                        &guard,
                    )
                    .ok()??;
                // SeqCst: pairs with the fence in `Decision::decide`.
                fence(Ordering::SeqCst);
                (key.location(), server.entry()?.clone())
            }
            Namespace::Transport => {
                let guard = self.transports.guard();
                let (key, transport) = self
                    .transports
                    .remove_if(
                        query,
                        |_, t| is_meant(&t.entry.lease) && self.is_registered(t),
                        &guard,
                    )
                    .ok()??;
                if let Some(membership) = self.holding(&transport.binding) {
                    self.leave(&membership);
                }
                (key.location(), transport.entry.clone())
            }
        };
        self.release(location);
        Some(entry)
    }

    /// Removes all servers and transports and refuses new ones until [`Self::open`]. `removed` is
    /// given each entry. Costs in proportion to what there is.
    pub fn close(&self, mut removed: impl FnMut(Entry<L>)) {
        self.closed.store(true, Ordering::Relaxed);
        // SeqCst: see the end of `register`.
        fence(Ordering::SeqCst);
        let guard = self.transports.guard();
        for key in self.transports.keys(&guard) {
            self.remove(Namespace::Transport, &key.id())
                .map(&mut removed);
        }
        let guard = self.servers.guard();
        for key in self.servers.keys(&guard) {
            self.remove(Namespace::Server, &key.id()).map(&mut removed);
        }
    }

    /// Takes registrations of servers and transports again.
    pub fn open(&self) {
        self.closed.store(false, Ordering::Release);
    }

    // ---- Change ----

    /// Exchanges `former`, the lease of the server registered under `id`, for `new`, which must
    /// have the same location. Address and bindings stay. Returns whether `former` was the lease.
    pub fn exchange_server_lease(&self, id: &Id<'_>, former: &L, new: L) -> bool {
        let guard = self.servers.guard();
        let Some((key, _)) = self.servers.get_key_value(id, &guard) else {
            return false;
        };
        let location = key.location();
        let exchanged = self.servers.compute(
            Key::new(*id, location),
            |current| match current {
                // The key is written anew with the entry, so it must be the one we read.
                Some((key, Server::Registered { group, entry }))
                    if key.location() == location && entry.lease == *former =>
                {
                    Operation::Insert(Server::Registered {
                        group: Arc::clone(group),
                        entry: Entry {
                            address: entry.address,
                            lease: new.clone(),
                        },
                    })
                }
                _ => Operation::Abort(()),
            },
            &guard,
        );
        matches!(exchanged, Compute::Updated { .. })
    }

    // ---- Bindings ----

    /// Binds a transport to a server, instead of what it is bound to. Lock-free.
    ///
    /// With `server_must_exist` the server must be registered at the moment of binding (checked
    /// before the transport); without it the binding is made as an automatic one.
    pub fn bind(
        &self,
        transport: &Id<'_>,
        server: Id<'_>,
        server_must_exist: bool,
    ) -> Result<(), BindError> {
        loop {
            let group = if server_must_exist {
                let guard = self.servers.guard();
                match self.servers.get(&server, &guard) {
                    Some(Server::Registered { group, .. }) => Arc::clone(group),
                    _ => return Err(BindError::ServerNotFound),
                }
            } else {
                self.join(server)
            };
            let guard = self.transports.guard();
            let Some((key, held)) = self.transports.get_key_value(transport, &guard) else {
                self.leave_group(&group);
                return Err(BindError::TransportNotFound);
            };
            if !self.is_registered(held) {
                self.leave_group(&group);
                return Err(BindError::TransportNotFound);
            }
            let location = key.location();
            let from = self.holding(&held.binding);
            let attempt = Attempt::new(group.enter(location), From::Registered(from.clone()));
            let installed = self.transports.compute(
                Key::new(*transport, location),
                |current| match current {
                    // No entry is freed while we hold the guard, so the same address is the same
                    // entry and `from` is what it holds.
                    Some((_, current)) if std::ptr::eq(current, held) => {
                        Operation::Insert(Transport {
                            entry: held.entry.clone(),
                            binding: Binding::Pending(Arc::clone(&attempt)),
                        })
                    }
                    _ => Operation::Abort(()),
                },
                &guard,
            );
            if !matches!(installed, Compute::Updated { .. }) {
                // Lost to another change of this transport.
                self.leave(&attempt.to);
                continue;
            }
            let bound = self.decide(&attempt);
            let (kept, left) = if bound {
                (Some(attempt.to.clone()), from)
            } else {
                (from, Some(attempt.to.clone()))
            };
            self.settle(transport, &attempt, kept);
            if let Some(left) = left {
                self.leave(&left);
            }
            if bound {
                return Ok(());
            }
            if server_must_exist {
                return Err(BindError::ServerNotFound);
            }
        }
    }

    /// Ends a transport's binding. Returns whether the transport is registered.
    pub fn unbind(&self, transport: &Id<'_>) -> bool {
        loop {
            let guard = self.transports.guard();
            let Some((key, held)) = self.transports.get_key_value(transport, &guard) else {
                return false;
            };
            if !self.is_registered(held) {
                return false;
            }
            let Some(from) = self.holding(&held.binding) else {
                return true;
            };
            let unbound = self.transports.compute(
                Key::new(*transport, key.location()),
                |current| match current {
                    Some((_, current)) if std::ptr::eq(current, held) => {
                        Operation::Insert(Transport {
                            entry: held.entry.clone(),
                            binding: Binding::Unbound,
                        })
                    }
                    _ => Operation::Abort(()),
                },
                &guard,
            );
            if matches!(unbound, Compute::Updated { .. }) {
                self.leave(&from);
                return true;
            }
        }
    }

    /// Gives `found` the id of the server that a transport is bound to, registered or not.
    pub fn bound_server<R>(
        &self,
        transport: &Id<'_>,
        found: impl FnOnce(Id<'_>) -> R,
    ) -> Option<R> {
        loop {
            let guard = self.transports.guard();
            let held = self.transports.get(transport, &guard)?;
            if !self.is_registered(held) {
                return None;
            }
            let membership = self.holding(&held.binding)?;
            if self.is_current(&membership.group) {
                return Some(found(membership.group.server.id()));
            }
            // Unbound by the end of its server, provided that it was still this binding when we
            // saw the server gone.
            if self
                .transports
                .get(transport, &guard)
                .is_some_and(|now| std::ptr::eq(now, held))
            {
                return None;
            }
        }
    }

    /// Gives `each` the entries of the transports that are bound to `server`. Weakly consistent;
    /// costs in proportion to the most transports bound to it at one time.
    pub fn for_each_bound(&self, server: &Id<'_>, mut each: impl FnMut(&Entry<L>)) {
        let servers = self.servers.guard();
        let Some(server) = self.servers.get(server, &servers) else {
            return;
        };
        let group = server.group();
        let transports = self.transports.guard();
        for (member, shard, slot) in group.members() {
            let Some(hash) = self.shards[usize::from(shard)].slots.get(slot) else {
                continue;
            };
            let location = Location {
                hash,
                slot,
                shard,
                namespace: Namespace::Transport,
            };
            let Some(transport) = self.transports.get(&location, &transports) else {
                continue;
            };
            // The place may have been given to another transport since.
            let is_bound = self
                .holding(&transport.binding)
                .is_some_and(|membership| membership.is(group, member));
            if is_bound && self.is_registered(transport) {
                each(&transport.entry);
            }
        }
    }

    /// An upper bound of what [`Self::for_each_bound`] visits.
    pub fn bound_high_water(&self, server: &Id<'_>) -> u32 {
        let guard = self.servers.guard();
        self.servers
            .get(server, &guard)
            .map_or(0, |server| server.group().high_water())
    }

    // ---- Listing and counting ----

    /// Gives `each` every entry of a namespace with its id. Weakly consistent.
    pub fn for_each(&self, namespace: Namespace, mut each: impl FnMut(Id<'_>, &Entry<L>)) {
        match namespace {
            Namespace::Connection => {
                let guard = self.connections.guard();
                for (key, entry) in self.connections.iter(&guard) {
                    each(key.id(), entry);
                }
            }
            Namespace::Server => {
                let guard = self.servers.guard();
                for (key, server) in self.servers.iter(&guard) {
                    if let Some(entry) = server.entry() {
                        each(key.id(), entry);
                    }
                }
            }
            Namespace::Transport => {
                let guard = self.transports.guard();
                for (key, transport) in self.transports.iter(&guard) {
                    if self.is_registered(transport) {
                        each(key.id(), &transport.entry);
                    }
                }
            }
        }
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
                each(key.id(), membership.group.server.id());
            }
        }
    }

    /// Gives `each` the connections of one shard with their ids. Weakly consistent; costs in
    /// proportion to the most entries of that shard at one time.
    pub fn for_each_connection_of(&self, shard: u16, mut each: impl FnMut(Id<'_>, &Entry<L>)) {
        let guard = self.connections.guard();
        for (slot, hash) in self.shards[usize::from(shard)].slots.iter() {
            let location = Location {
                hash,
                slot,
                shard,
                namespace: Namespace::Connection,
            };
            if let Some((key, entry)) = self.connections.get_key_value(&location, &guard) {
                each(key.id(), entry);
            }
        }
    }

    /// Number of entries of one namespace in one shard. Constant time.
    pub fn count_of(&self, namespace: Namespace, shard: u16) -> u64 {
        self.shards[usize::from(shard)].count(namespace)
    }

    /// Number of entries of one namespace. Costs one load a shard.
    pub fn count(&self, namespace: Namespace) -> u64 {
        self.shards.iter().map(|shard| shard.count(namespace)).sum()
    }

    /// Number of places that a listing of the shard visits.
    pub fn shard_high_water(&self, shard: u16) -> u32 {
        self.shards[usize::from(shard)].slots.high_water()
    }

    /// Server ids that are in the map only because automatic bindings name them.
    pub fn dangling_servers(&self) -> usize {
        let guard = self.servers.guard();
        self.servers
            .values(&guard)
            .filter(|server| server.entry().is_none())
            .count()
    }

    // ---- The protocol of bindings: see the module `bindings` ----

    fn is_current(&self, group: &Arc<Group>) -> bool {
        let guard = self.servers.guard();
        self.servers
            .get(&group.server.id(), &guard)
            .is_some_and(|server| Arc::ptr_eq(server.group(), group))
    }

    fn decide(&self, attempt: &Attempt) -> bool {
        attempt.decide(|| self.is_current(&attempt.to.group))
    }

    /// Whether a transport that is in the map counts as registered.
    #[inline]
    fn is_registered(&self, transport: &Transport<L>) -> bool {
        match &transport.binding {
            Binding::Unbound | Binding::To(_) => true,
            Binding::Pending(attempt) => match attempt.from {
                From::Unregistered => self.decide(attempt),
                From::Registered(_) => true,
            },
        }
    }

    /// The membership that a binding amounts to, after deciding it if need be. Its group may have
    /// ended.
    fn holding(&self, binding: &Binding) -> Option<Membership> {
        match binding {
            Binding::Unbound => None,
            Binding::To(membership) => Some(membership.clone()),
            Binding::Pending(attempt) if self.decide(attempt) => Some(attempt.to.clone()),
            Binding::Pending(attempt) => match &attempt.from {
                From::Unregistered => None,
                From::Registered(from) => from.clone(),
            },
        }
    }

    /// Puts a plain binding in the place of a decided attempt, unless somebody was quicker.
    fn settle(&self, transport: &Id<'_>, attempt: &Arc<Attempt>, kept: Option<Membership>) {
        let guard = self.transports.guard();
        let Some((key, _)) = self.transports.get_key_value(transport, &guard) else {
            return;
        };
        let _ = self.transports.compute(
            Key::new(*transport, key.location()),
            |current| match current {
                // Only an entry at that place can hold this attempt.
                Some((_, held)) if held.binding.is_attempt(attempt) => {
                    Operation::Insert(Transport {
                        entry: held.entry.clone(),
                        binding: Binding::settled(kept.clone()),
                    })
                }
                _ => Operation::Abort(()),
            },
            &guard,
        );
    }

    /// The current group of a server id, for an automatic binding. A name without a server is
    /// kept in the map by counting the bindings to it; [`Self::leave_group`] undoes that.
    fn join(&self, server: Id<'_>) -> Arc<Group> {
        let guard = self.servers.guard();
        let new_group = Group::new(Key::without_location(server));
        let joined = self.servers.compute(
            Key::without_location(server),
            |current| match current {
                None => Operation::Insert(Server::Dangling {
                    group: Arc::clone(&new_group),
                    bound: 1,
                }),
                Some((_, Server::Dangling { group, bound })) => {
                    Operation::Insert(Server::Dangling {
                        group: Arc::clone(group),
                        bound: bound + 1,
                    })
                }
                Some((_, Server::Registered { group, .. })) => Operation::Abort(Arc::clone(group)),
            },
            &guard,
        );
        match joined {
            Compute::Inserted(_, server) => Arc::clone(server.group()),
            Compute::Updated {
                new: (_, server), ..
            } => Arc::clone(server.group()),
            Compute::Aborted(group) => group,
            Compute::Removed(..) => unreachable!("join never removes"),
        }
    }

    /// Ends a membership. Only for the one whose exchange ended it (or who never made use of it).
    fn leave(&self, membership: &Membership) {
        membership.leave_list();
        self.leave_group(&membership.group);
    }

    /// Takes one binding off the count of a name without a server. Every binding to such a group
    /// was counted by `join`, and once the server is registered (or gone) the count is void.
    fn leave_group(&self, group: &Arc<Group>) {
        let guard = self.servers.guard();
        let is_dangling = |server: &Server<L>| matches!(server, Server::Dangling { group: held, .. } if Arc::ptr_eq(held, group));
        if !self
            .servers
            .get(&group.server.id(), &guard)
            .is_some_and(is_dangling)
        {
            return;
        }
        let _ = self.servers.compute(
            Key::without_location(group.server.id()),
            |current| match current {
                Some((_, Server::Dangling { group: held, bound })) if Arc::ptr_eq(held, group) => {
                    if *bound == 1 {
                        Operation::Remove
                    } else {
                        Operation::Insert(Server::Dangling {
                            group: Arc::clone(held),
                            bound: bound - 1,
                        })
                    }
                }
                _ => Operation::Abort(()),
            },
            &guard,
        );
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
