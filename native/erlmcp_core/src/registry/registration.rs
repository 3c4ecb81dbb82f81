//! Registering, removing and changing entries. Each takes effect at one exchange in one map, but for
//! a registration with an automatic binding (see the module `bindings`).

use std::hash::Hash;
use std::sync::Arc;

use papaya::{Compute, Equivalent, Operation};

use super::entry::{Connection, Key, Server, Transport};
use super::group::{Attempt, Binding, Decision, From, Group};
use super::{Entry, Id, Location, Namespace, Registry};
use crate::error::RegisterError;
use crate::sync::Ordering;
use crate::token_bucket::Level;

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// Registers `id` for `address` in `shard`, and for a transport makes the automatic binding to
    /// the server named by `bind_to`, whether that is registered or not. `lease` makes what the
    /// entry carries; it is called at most once, after the first checks have passed.
    ///
    /// With an error the lease, if it was made, goes back to the caller. After `Ok` it goes to
    /// whoever takes the entry out, which may have been done by then.
    ///
    /// `bind_to` is ignored for servers and connections. `shard` must be less than the
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
        if namespace != Namespace::Connection && self.gate.is_closed() {
            return Err(RegisterError::Closed);
        }
        if self.reserved.fetch_add(1, Ordering::Relaxed) >= self.limits.max_entries {
            self.reserved.fetch_sub(1, Ordering::Relaxed);
            return Err(RegisterError::RegistryFull);
        }
        let location = Location {
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
        let stands = match namespace {
            Namespace::Server => self.insert_server(id, location, &entry).map(|group| {
                self.stands(|| self.remove_server(&id, |_, held| Arc::ptr_eq(held.group(), &group)))
            }),
            Namespace::Transport => {
                self.insert_transport(id, location, entry, bind_to)
                    .map(|level| {
                        self.stands(|| {
                            self.remove_transport(&id, |_, held| Arc::ptr_eq(&held.level, &level))
                        })
                    })
            }
            Namespace::Connection => {
                let guard = self.connections.guard();
                let connection = Connection {
                    entry,
                    level: self.buckets.full(),
                };
                self.connections
                    .try_insert(Key::new(id, location), connection, &guard)
                    .map(|_| true)
                    .map_err(|occupied| occupied.current.entry.address)
            }
        };
        match stands {
            Ok(true) => Ok(lease),
            Ok(false) => Err(RegisterError::Closed),
            Err(address) => {
                self.release(location);
                Err(RegisterError::AlreadyRegistered { address })
            }
        }
    }

    /// Whether what has just been entered may stand. If the gate is closed, it may not, and
    /// `take_out` takes it out.
    ///
    /// If it is not there any more, then it did stand: somebody has removed it (the one who closes,
    /// or who unregisters the id), and has been given its lease. That one may have put the lease
    /// behind another registration already, even of the same id at the same place once the gate is
    /// open again. So `take_out` must not go by the lease, but by what is this registration's alone.
    fn stands(&self, take_out: impl FnOnce() -> Option<Entry<L>>) -> bool {
        !self.gate.is_closed_behind() || take_out().is_none()
    }

    /// Returns the group, which no other registration has, or the address of the one that is there.
    fn insert_server(
        &self,
        id: Id<'_>,
        location: Location,
        entry: &Entry<L>,
    ) -> Result<Arc<Group>, u64> {
        let guard = self.servers.guard();
        let group = Group::new(Key::without_location(id));
        loop {
            // Not by `compute`: what that inserts does not help papaya to finish a resize, so that
            // a map filled by it alone is probed to the limits of two tables ever after (15 times
            // slower with 15,000 entries).
            let new = Server::Registered {
                group: Arc::clone(&group),
                entry: entry.clone(),
            };
            let key = Key::new(id, location);
            let Err(occupied) = self.servers.try_insert(key, new, &guard) else {
                return Ok(group);
            };
            if let Some(held) = occupied.current.entry() {
                return Err(held.address);
            }
            // The transports that are bound to the name are bound to the server from now on.
            let registered = self.servers.compute(
                Key::new(id, location),
                |current| match current {
                    Some((_, Server::Dangling { group, .. })) => {
                        Operation::Insert(Server::Registered {
                            group: Arc::clone(group),
                            entry: entry.clone(),
                        })
                    }
                    _ => Operation::Abort(()),
                },
                &guard,
            );
            if let Compute::Updated {
                new: (_, server), ..
            } = registered
            {
                return Ok(Arc::clone(server.group()));
            }
            // Lost to another change of this name.
        }
    }

    /// Returns the level, which no other registration has, or the address of the one that is there.
    fn insert_transport(
        &self,
        id: Id<'_>,
        location: Location,
        entry: Entry<L>,
        bind_to: Option<Id<'_>>,
    ) -> Result<Arc<Level>, u64> {
        let guard = self.transports.guard();
        loop {
            let attempt = bind_to
                .map(|server| Attempt::new(self.join(server).enter(location), From::Unregistered));
            let level = Arc::new(self.buckets.full());
            let transport = Transport {
                entry: entry.clone(),
                binding: attempt.clone().map_or(Binding::Unbound, Binding::Pending),
                level: Arc::clone(&level),
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
                return Ok(level);
            };
            if self.decide(&attempt) {
                self.settle(&id, &attempt, Some(attempt.to.clone()));
                return Ok(level);
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
        self.remove_exact(namespace, id, |_| true)
    }

    /// Removes what is registered under `id` if `is_meant` says that its lease is the one meant.
    pub fn remove_exact(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        is_meant: impl Fn(&L) -> bool,
    ) -> Option<Entry<L>> {
        self.remove_if(namespace, id, |_, lease| is_meant(lease))
    }

    /// Removes the entry at `location` if `is_meant` says that its lease is the one meant. For
    /// the end of what the lease stands for: never touches another registration of the same id.
    pub fn remove_leased(
        &self,
        location: &Location,
        is_meant: impl Fn(&L) -> bool,
    ) -> Option<Entry<L>> {
        let place = self.located(*location)?;
        self.remove_if(location.namespace, &place, |key, lease| {
            place.is_place_of(key) && is_meant(lease)
        })
    }

    fn remove_if<Q>(
        &self,
        namespace: Namespace,
        query: &Q,
        is_meant: impl Fn(&Key, &L) -> bool,
    ) -> Option<Entry<L>>
    where
        Q: Equivalent<Key> + Hash,
    {
        match namespace {
            Namespace::Connection => {
                let guard = self.connections.guard();
                let (key, connection) = self
                    .connections
                    .remove_if(query, |key, held| is_meant(key, &held.entry.lease), &guard)
                    .ok()??;
                self.buckets.left(&connection.level);
                self.release(key.location());
                Some(connection.entry.clone())
            }
            Namespace::Server => self.remove_server(query, |key, server| {
                server
                    .entry()
                    .is_some_and(|entry| is_meant(key, &entry.lease))
            }),
            Namespace::Transport => self.remove_transport(query, |key, transport| {
                is_meant(key, &transport.entry.lease)
            }),
        }
    }

    /// `is_meant` is true for registered servers at most.
    fn remove_server<Q>(
        &self,
        query: &Q,
        is_meant: impl Fn(&Key, &Server<L>) -> bool,
    ) -> Option<Entry<L>>
    where
        Q: Equivalent<Key> + Hash,
    {
        let guard = self.servers.guard();
        let (key, server) = self.servers.remove_if(query, is_meant, &guard).ok()??;
        Decision::server_has_gone();
        self.release(key.location());
        server.entry().cloned()
    }

    fn remove_transport<Q>(
        &self,
        query: &Q,
        is_meant: impl Fn(&Key, &Transport<L>) -> bool,
    ) -> Option<Entry<L>>
    where
        Q: Equivalent<Key> + Hash,
    {
        let guard = self.transports.guard();
        let (key, transport) = self
            .transports
            .remove_if(
                query,
                |key, held| is_meant(key, held) && self.is_registered(held),
                &guard,
            )
            .ok()??;
        if let Some(membership) = self.holding(&transport.binding) {
            self.leave(&membership);
        }
        self.buckets.left(&transport.level);
        self.release(key.location());
        Some(transport.entry.clone())
    }

    /// Removes all servers and transports and refuses new ones until [`Self::open`]. `removed` is
    /// given each entry. Costs in proportion to what there is.
    pub fn close(&self, mut removed: impl FnMut(Entry<L>)) {
        self.gate.close();
        let guard = self.transports.guard();
        for key in self.transports.keys(&guard) {
            self.remove(Namespace::Transport, &self.id_of(key))
                .map(&mut removed);
        }
        let guard = self.servers.guard();
        for key in self.servers.keys(&guard) {
            self.remove(Namespace::Server, &self.id_of(key))
                .map(&mut removed);
        }
    }

    /// Takes registrations of servers and transports again.
    pub fn open(&self) {
        self.gate.open();
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
}
