//! Registering, removing and changing entries. Each takes effect at one exchange in one map, but for
//! a registration with an automatic binding (see the module `bindings`).

use std::sync::Arc;

use papaya::{Compute, Operation};

use super::entry::{Connection, Key, Server, Transport};
use super::group::{Attempt, Binding, Decision, From, Group};
use super::{Entry, Id, Location, Namespace, Registry};
use crate::error::RegisterError;
use crate::sync::Ordering;

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
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
        let inserted = match namespace {
            Namespace::Server => self.insert_server(id, location, &entry),
            Namespace::Transport => self.insert_transport(id, location, entry, bind_to),
            Namespace::Connection => {
                let guard = self.connections.guard();
                let connection = Connection {
                    entry,
                    level: self.buckets.full(),
                };
                self.connections
                    .try_insert(Key::new(id, location), connection, &guard)
                    .map(|_| ())
                    .map_err(|occupied| occupied.current.entry.address)
            }
        };
        if let Err(address) = inserted {
            self.release(location);
            return Err(RegisterError::AlreadyRegistered { address });
        }
        if namespace != Namespace::Connection && self.gate.is_closed_behind() {
            self.remove_if(namespace, &id, |held| *held == lease);
            return Err(RegisterError::Closed);
        }
        Ok(lease)
    }

    fn insert_server(&self, id: Id<'_>, location: Location, entry: &Entry<L>) -> Result<(), u64> {
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
                return Ok(());
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
            if matches!(registered, Compute::Updated { .. }) {
                return Ok(());
            }
            // Lost to another change of this name.
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
                level: Arc::new(self.buckets.full()),
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

    /// Removes what is registered under `id` if `is_meant` says that its lease is the one meant.
    pub fn remove_exact(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        is_meant: impl Fn(&L) -> bool,
    ) -> Option<Entry<L>> {
        self.remove_if(namespace, id, is_meant)
    }

    /// Removes the entry at `location` if `is_meant` says that its lease is the one meant. For
    /// the end of what the lease stands for: never touches another registration of the same id.
    pub fn remove_leased(
        &self,
        location: &Location,
        is_meant: impl Fn(&L) -> bool,
    ) -> Option<Entry<L>> {
        let place = self.located(*location)?;
        self.remove_if_key(location.namespace, &place, |key, lease| {
            place.is_place_of(key) && is_meant(lease)
        })
    }

    fn remove_if(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        is_meant: impl Fn(&L) -> bool,
    ) -> Option<Entry<L>> {
        self.remove_if_key(namespace, id, |_, lease| is_meant(lease))
    }

    fn remove_if_key<Q>(
        &self,
        namespace: Namespace,
        query: &Q,
        is_meant: impl Fn(&Key, &L) -> bool,
    ) -> Option<Entry<L>>
    where
        Q: papaya::Equivalent<Key> + std::hash::Hash,
    {
        let (location, entry) = match namespace {
            Namespace::Connection => {
                let guard = self.connections.guard();
                let (key, connection) = self
                    .connections
                    .remove_if(query, |key, held| is_meant(key, &held.entry.lease), &guard)
                    .ok()??;
                self.buckets.left(&connection.level);
                (key.location(), connection.entry.clone())
            }
            Namespace::Server => {
                let guard = self.servers.guard();
                let (key, server) = self
                    .servers
                    .remove_if(
                        query,
                        |key, server| server.entry().is_some_and(|e| is_meant(key, &e.lease)),
                        &guard,
                    )
                    .ok()??;
                Decision::server_has_gone();
                (key.location(), server.entry()?.clone())
            }
            Namespace::Transport => {
                let guard = self.transports.guard();
                let (key, transport) = self
                    .transports
                    .remove_if(
                        query,
                        |key, t| is_meant(key, &t.entry.lease) && self.is_registered(t),
                        &guard,
                    )
                    .ok()??;
                if let Some(membership) = self.holding(&transport.binding) {
                    self.leave(&membership);
                }
                self.buckets.left(&transport.level);
                (key.location(), transport.entry.clone())
            }
        };
        self.release(location);
        Some(entry)
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
