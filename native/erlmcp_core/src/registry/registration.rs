//! Registering, removing and changing entries. Each takes effect at one compare-and-swap in one map,
//! except a registration with an automatic binding (see the module `bindings`).

use std::hash::Hash;
use std::ptr;
use std::sync::Arc;

use papaya::{Compute, Equivalent, Operation};

use super::announcements::{Leaving, Phase};
use super::entry::{Connection, Key, Member, Server, Transport};
use super::group::{Attempt, Binding, From, Group};
use super::stored::{Stored, with_map};
use super::{Delivery, Entry, Id, Location, Namespace, Registry};
use crate::error::RegisterError;
use crate::sync::Ordering;
use crate::token_bucket::Level;

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// Registers `id` for `address` in `shard`, and for a transport makes the automatic binding to the server named
    /// by `bind_to`, whether that is registered or not. A member ([`super::MemberId`]) joins its group. `lease` creates the
    /// lease of the entry; it is called at most once, after the first checks have passed.
    ///
    /// On an error the lease, if it was created, belongs to the caller. After `Ok` it belongs to the caller that
    /// removes the entry, which may have happened by then.
    ///
    /// `bind_to` is ignored in other namespaces. `shard` must be less than the number of shards.
    pub fn register(
        &self,
        namespace: Namespace,
        id: Id<'_>,
        shard: u16,
        address: u64,
        bind_to: Option<Id<'_>>,
        lease: impl FnOnce(Location) -> L,
    ) -> Result<(), RegisterError> {
        if let Some(address) = self.address(namespace, &id) {
            return Err(RegisterError::AlreadyRegistered { address });
        }
        if namespace.is_of_erlmcp() && self.gate.is_closed() {
            return Err(RegisterError::Closed);
        }
        if self.reserved.0.fetch_add(1, Ordering::Relaxed) >= self.limits.max_entries {
            self.reserved.0.fetch_sub(1, Ordering::Relaxed);
            return Err(RegisterError::RegistryFull);
        }
        let location = self.acquire_place(namespace, &id, shard);
        let entry = Entry {
            address,
            lease: lease(location),
        };
        let stands = match namespace {
            Namespace::Server => self.insert_server(id, location, &entry).map(|group| {
                self.stands(|| {
                    self.remove_from(&self.servers, &id, |_, held, _| {
                        Arc::ptr_eq(held.group(), &group)
                    })
                })
            }),
            Namespace::Transport => {
                self.insert_transport(id, location, entry, bind_to)
                    .map(|level| {
                        self.stands(|| {
                            self.remove_from(&self.transports, &id, |_, held, _| {
                                Arc::ptr_eq(&held.level, &level)
                            })
                        })
                    })
            }
            Namespace::Connection => {
                let guard = self.connections.guard();
                let connection = Connection {
                    entry,
                    level: self.buckets.full(),
                };
                let is_expected = self.announcements.is_expected(shard, id.hash);
                let key = Key::with_phase(id, location, Phase::new(is_expected));
                self.connections
                    .try_insert(key, connection, &guard)
                    .map(|_| {
                        self.joined(&id, shard, is_expected);
                        true
                    })
                    .map_err(|occupied| occupied.current.entry.address)
            }
            Namespace::Member => self.insert_member(id, location, entry).map(|()| true),
        };
        match stands {
            Ok(true) => Ok(()),
            Ok(false) => Err(RegisterError::Closed),
            Err(address) => {
                self.release(location);
                Err(RegisterError::AlreadyRegistered { address })
            }
        }
    }

    /// Registers the connection `id` in the place of the one that has the id, if there is one, which is returned; its
    /// lease belongs to the caller then. The rest is as in [`Self::register`]: the token bucket of the connection is
    /// full and has the shared limits.
    ///
    /// The replacement is one compare-and-swap: a concurrent look-up finds the former connection or the new one. The new
    /// one has another place, so a concurrent walk may see either, both or neither of them.
    pub fn replace_connection(
        &self,
        id: Id<'_>,
        shard: u16,
        address: u64,
        lease: impl FnOnce(Location) -> L,
    ) -> Result<Option<Entry<L>>, RegisterError> {
        let namespace = Namespace::Connection;
        // A replacement takes the room of the connection that it replaces, and counts twice meanwhile.
        let has_room = self.reserved.0.fetch_add(1, Ordering::Relaxed) < self.limits.max_entries;
        if !has_room && self.address(namespace, &id).is_none() {
            self.reserved.0.fetch_sub(1, Ordering::Relaxed);
            return Err(RegisterError::RegistryFull);
        }
        let location = self.acquire_place(namespace, &id, shard);
        let entry = Entry {
            address,
            lease: lease(location),
        };
        let connection = || Connection {
            entry: entry.clone(),
            level: self.buckets.full(),
        };
        let guard = self.connections.guard();
        let is_expected = self.announcements.is_expected(shard, id.hash);
        let key = || Key::with_phase(id, location, Phase::new(is_expected));
        // First by `try_insert`, as in `insert_server`: only that helps a resize.
        if has_room
            && self
                .connections
                .try_insert(key(), connection(), &guard)
                .is_ok()
        {
            self.joined(&id, shard, is_expected);
            return Ok(None);
        }
        loop {
            // What is replaced is announced. So it must be known before, if anybody may have an interest in it.
            let former = self
                .announcements
                .are_expected()
                .then(|| self.connections.get_key_value(&id, &guard));
            let leaving = match former {
                Some(Some((key, former))) => self.leaving(key, former, &guard),
                _ => Leaving::Unexpected,
            };
            let is_former = |current: Option<&Key>| match former {
                Some(former) => {
                    current.map(ptr::from_ref) == former.map(|(key, _)| ptr::from_ref(key))
                }
                None => true,
            };
            let replaced = self.connections.compute(
                key(),
                |current| match current {
                    _ if !is_former(current.map(|(key, _)| key)) => Operation::Abort(Ok(())),
                    None if !has_room => Operation::Abort(Err(RegisterError::RegistryFull)),
                    _ => Operation::Insert(connection()),
                },
                &guard,
            );
            match replaced {
                Compute::Updated {
                    old: (key, former), ..
                } => {
                    self.left(leaving, key, former);
                    self.joined(&id, shard, is_expected);
                    self.buckets.left(&former.level);
                    self.release_place(key.location());
                    return Ok(Some(former.entry.clone()));
                }
                Compute::Aborted(Err(full)) => {
                    self.release_place(location);
                    return Err(full);
                }
                // Lost to a concurrent change of this id.
                Compute::Aborted(Ok(())) => {}
                Compute::Inserted(..) | Compute::Removed(..) => {
                    self.joined(&id, shard, is_expected);
                    return Ok(None);
                }
            }
        }
    }

    /// Whether the entry that has just been inserted is a registration. If the gate is closed, it is not, and
    /// `remove` removes it.
    ///
    /// If the entry is gone, it was a registration: another thread has removed it (by `close` or by unregistering
    /// the id) and has its lease. That thread may use the lease for another registration, even of the same id at
    /// the same place once the gate is open again. So `remove` must compare what is unique to this registration,
    /// and not the lease.
    fn stands(&self, remove: impl FnOnce() -> Option<Entry<L>>) -> bool {
        !self.gate.is_closed_behind() || remove().is_none()
    }

    /// Returns the group, which is unique to this registration, or the address of the present one.
    fn insert_server(
        &self,
        id: Id<'_>,
        location: Location,
        entry: &Entry<L>,
    ) -> Result<Arc<Group>, u64> {
        let guard = self.servers.guard();
        let group = Group::new(Key::without_location(id));
        loop {
            // Not by `compute`: its insertions do not help papaya to complete a resize. A map filled by it alone
            // probes up to the limits of two tables ever after (15 times slower with 15,000 entries).
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
            // The transports that are bound to the id are bound to the server from now on.
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
                self.dangling.fetch_sub(1, Ordering::Relaxed);
                return Ok(Arc::clone(server.group()));
            }
            // Lost to a concurrent change of this id.
        }
    }

    /// Returns the level, which is unique to this registration, or the address of the present one.
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
                if occupied.current.is_registered(self) {
                    return Err(occupied.current.entry.address);
                }
                // Its server was removed before it was registered, so it never was registered. Help to remove it;
                // the thread that registers it retries as we do.
                let theirs = &occupied.current.entry.lease;
                let _ = self.transports.remove_if(
                    &id,
                    |_, held| held.entry.lease == *theirs && !held.is_registered(self),
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

    /// Returns the address of the present member.
    fn insert_member(&self, id: Id<'_>, location: Location, entry: Entry<L>) -> Result<(), u64> {
        let joined = self.join_process_group(&self.group_of(&id), location);
        let guard = self.members.guard();
        self.members
            .try_insert(Key::new(id, location), Member { entry, joined }, &guard)
            .map(|_| ())
            .map_err(|occupied| {
                self.leave_process_group(&occupied.not_inserted.joined);
                occupied.current.entry.address
            })
    }

    /// The place of an entry that is about to be inserted, which counts from now on.
    fn acquire_place(&self, namespace: Namespace, id: &Id<'_>, shard: u16) -> Location {
        let counts = &self.shards[usize::from(shard)];
        let slot = counts.slots_or_init(namespace).insert(id.hash);
        counts.entered(namespace);
        Location {
            slot,
            shard,
            namespace,
        }
    }

    /// Releases what a registration acquires before it is inserted in its map.
    pub(super) fn release(&self, location: Location) {
        self.churn.removed(self.release_place(location));
    }

    /// As [`Self::release`], for an entry that leaves no tombstone. Returns its hash.
    fn release_place(&self, location: Location) -> u64 {
        let shard = &self.shards[usize::from(location.shard)];
        let hash = shard
            .slots_or_init(location.namespace)
            .remove(location.slot);
        shard.left(location.namespace);
        self.reserved.0.fetch_sub(1, Ordering::Relaxed);
        hash
    }

    // ---- Removal ----

    /// Removes the registration of `id`, with its bindings, and returns it.
    pub fn remove(&self, namespace: Namespace, id: &Id<'_>) -> Option<Entry<L>> {
        self.remove_exact(namespace, id, |_| true)
    }

    /// Removes the registration of `id` if `is_meant` accepts its lease.
    pub fn remove_exact(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        is_meant: impl Fn(&L) -> bool,
    ) -> Option<Entry<L>> {
        self.remove_if(namespace, id, |_, lease| is_meant(lease))
    }

    /// Removes the entry at `location` if `is_meant` accepts its lease. For the end of what the lease stands for, and of the
    /// process at `address`: never removes another registration of the same id. The process is charged with nothing any more
    /// in the shard, whether the entry is still there or not.
    pub fn remove_leased(
        &self,
        location: &Location,
        address: u64,
        is_meant: impl Fn(&L) -> bool,
    ) -> Option<Entry<L>> {
        // `None`: the process was never sent anything in this shard.
        if let Some(admission) = self.shards[usize::from(location.shard)].admission_if_used() {
            admission.ended(address);
        }
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
        if namespace == Namespace::Connection {
            return self.remove_connection(query, is_meant);
        }
        with_map!(self, namespace, |map| {
            self.remove_from(map, query, |key, _, entry| is_meant(key, &entry.lease))
        })
    }

    /// Removes all servers and transports and refuses new ones until [`Self::open`]. Calls `removed` with each
    /// entry. Costs in proportion to the entries.
    pub fn close(&self, mut removed: impl FnMut(Entry<L>)) {
        self.gate.close();
        for namespace in [Namespace::Transport, Namespace::Server] {
            self.for_each(namespace, |id, _| {
                self.remove(namespace, &id).map(&mut removed);
            });
        }
    }

    /// Accepts registrations of servers and transports again.
    pub fn open(&self) {
        self.gate.open();
    }

    // ---- Change ----

    /// Replaces the lease of the server or connection registered under `id` by `new`, which must have the same location.
    /// Returns the former lease, if `is_former` accepts it.
    ///
    /// A connection gets the new lease's `delivery` at the same moment. Address, place and bindings stay, and so do the token
    /// bucket and its tokens: a message that is routed meanwhile is charged to them.
    pub fn exchange_lease(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        is_former: impl Fn(&L) -> bool,
        new: L,
        delivery: Delivery,
    ) -> Option<L> {
        match namespace {
            Namespace::Server => self.exchange_server_lease(id, is_former, new),
            Namespace::Connection => self.exchange_connection_lease(id, is_former, new, delivery),
            Namespace::Transport | Namespace::Member => None,
        }
    }

    fn exchange_connection_lease(
        &self,
        id: &Id<'_>,
        is_former: impl Fn(&L) -> bool,
        new: L,
        delivery: Delivery,
    ) -> Option<L> {
        let guard = self.connections.guard();
        let (key, held) = self.connections.get_key_value(id, &guard)?;
        if !is_former(&held.entry.lease) {
            return None;
        }
        let word = self.buckets.move_apart(&held.level)?;
        let exchanged = self.connections.compute(
            self.next_key(*id, key, held, &guard)
                .with_delivery(delivery),
            |current| match current {
                // No entry is freed under this guard, so the same address is the same entry.
                Some((_, current)) if ptr::eq(current, held) => Operation::Insert(Connection {
                    entry: Entry {
                        address: held.entry.address,
                        lease: new.clone(),
                    },
                    level: Level::with_word(word),
                }),
                _ => Operation::Abort(()),
            },
            &guard,
        );
        match exchanged {
            Compute::Updated { new: (_, new), .. } => {
                self.buckets.settle_present(&new.level);
                Some(held.entry.lease.clone())
            }
            _ => None,
        }
    }

    fn exchange_server_lease(
        &self,
        id: &Id<'_>,
        is_former: impl Fn(&L) -> bool,
        new: L,
    ) -> Option<L> {
        let guard = self.servers.guard();
        let (key, _) = self.servers.get_key_value(id, &guard)?;
        let location = key.location();
        let exchanged = self.servers.compute(
            Key::new(*id, location),
            |current| match current {
                // The key is written anew with the entry, so it must be the one that was read.
                Some((key, Server::Registered { group, entry }))
                    if key.location() == location && is_former(&entry.lease) =>
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
        match exchanged {
            Compute::Updated {
                old: (_, server), ..
            } => server.entry().map(|entry| entry.lease.clone()),
            _ => None,
        }
    }
}
