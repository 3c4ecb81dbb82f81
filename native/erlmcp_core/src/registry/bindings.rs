//! Bindings of transports to servers.
//!
//! # Where the truth is
//!
//! A transport's map entry holds its binding, which names a [`Group`]: one life of a server id, from its
//! registration (or from the first automatic binding that names it) until the server is removed. A server's map
//! entry holds its current group. *A transport is bound if and only if the group it names is the current one of
//! that group's server id.* So removing a server from its map unbinds all its transports at that one instant,
//! whatever their number. Removing a transport removes its binding with it.
//!
//! # Binding is a write that depends on two entries
//!
//! `bind` must change the transport's entry only if the server's group is still current at that moment. That is
//! restricted double-compare single-swap (Harris, Fraser and Pratt, *A practical multi-word compare-and-swap
//! operation*, 2002), built from an [`Attempt`]:
//!
//! 1. The member is inserted in the group's list.
//! 2. One compare-and-swap replaces the binding in the transport's entry by the attempt, undecided. From here on
//!    every thread that needs this binding decides the attempt first.
//! 3. To decide: read whether the group is current, then compare-and-swap `undecided` for the answer. The first
//!    compare-and-swap wins.
//! 4. The thread that made the attempt replaces it by a plain binding.
//!
//! The binding takes effect at the *read* in step 3 of the thread that wins. Between that read and its
//! compare-and-swap no thread can have seen the old binding, since seeing means deciding. If the server is removed
//! in between, the binding was made just before and was removed with it. If the transport is removed before the
//! decision, then a decision "bound" means that the group was current all along (it is looked up before the
//! transport is, and no group comes back), so the binding was made just before the removal.
//!
//! Binding to the server that the transport is already bound to changes nothing, so that its place in the list
//! stays. The group is looked up first, then the binding to it is read, and then the group is still current. So it
//! was current when the binding was read, and that is when this takes effect.
//!
//! An automatic binding is part of a registration: the transport is inserted in the map with an undecided attempt
//! and counts as registered from the decision on. If the decision is "aborted", it was never registered, and the
//! thread that registers it retries with the group that is current now.
//!
//! # The list of members
//!
//! A group's list may name transports that are not (or no longer) bound; a reader checks each one against the
//! transport's entry. It never misses one that is bound: a member is inserted before step 2, and removed by the
//! thread whose compare-and-swap removed the binding from the transport's entry.

use std::sync::Arc;

use papaya::{Compute, Operation};

use super::entry::{Key, Server, Transport};
use super::group::{Attempt, Binding, From, Group, Membership};
use super::stored::Stored;
use super::{Entry, Id, Namespace, Registry};
use crate::error::BindError;
use crate::sync::Ordering;

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// Binds a transport to a server, in place of its present binding.
    ///
    /// With `server_must_exist` the server must be registered at the moment of binding (checked before the
    /// transport); without it the binding is made as an automatic one.
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
            if !held.is_registered(self) {
                self.leave_group(&group);
                return Err(BindError::TransportNotFound);
            }
            let location = key.location();
            let from = self.holding(&held.binding);
            if from
                .as_ref()
                .is_some_and(|membership| Arc::ptr_eq(&membership.group, &group))
            {
                let is_bound = self.is_current(&group);
                self.leave_group(&group);
                if is_bound {
                    return Ok(());
                }
                // The server was removed after it was looked up.
                continue;
            }
            let attempt = Attempt::new(group.enter(location), From::Registered(from.clone()));
            let installed = self.transports.compute(
                Key::new(*transport, location),
                |current| match current {
                    // No entry is freed under this guard, so the same address is the same entry and `from` is its
                    // binding.
                    Some((_, current)) if std::ptr::eq(current, held) => {
                        Operation::Insert(Transport {
                            entry: held.entry.clone(),
                            binding: Binding::Pending(Arc::clone(&attempt)),
                            level: Arc::clone(&held.level),
                        })
                    }
                    _ => Operation::Abort(()),
                },
                &guard,
            );
            if !matches!(installed, Compute::Updated { .. }) {
                // Lost to a concurrent change of this transport.
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

    /// Removes a transport's binding. Returns whether the transport is registered.
    pub fn unbind(&self, transport: &Id<'_>) -> bool {
        loop {
            let guard = self.transports.guard();
            let Some((key, held)) = self.transports.get_key_value(transport, &guard) else {
                return false;
            };
            if !held.is_registered(self) {
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
                            level: Arc::clone(&held.level),
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

    /// Calls `found` with the id of the server that a transport is bound to, registered or not.
    pub fn bound_server<R>(
        &self,
        transport: &Id<'_>,
        found: impl FnOnce(Id<'_>) -> R,
    ) -> Option<R> {
        loop {
            let guard = self.transports.guard();
            let held = self.transports.get(transport, &guard)?;
            if !held.is_registered(self) {
                return None;
            }
            let membership = self.holding(&held.binding)?;
            if self.is_current(&membership.group) {
                return Some(found(self.id_of(&membership.group.server)));
            }
            // Unbound by the removal of its server, provided that the transport still had this binding when the
            // server was seen to be gone.
            if self
                .transports
                .get(transport, &guard)
                .is_some_and(|now| std::ptr::eq(now, held))
            {
                return None;
            }
        }
    }

    /// Calls `each` with the entries of the transports that are bound to `server`. Weakly consistent; costs in
    /// proportion to the most transports bound to it at one time.
    pub fn for_each_bound(&self, server: &Id<'_>, mut each: impl FnMut(&Entry<L>)) {
        self.visit_bound(server, |_, transport| each(&transport.entry));
    }

    /// As [`Self::for_each_bound`], with the key.
    pub(super) fn visit_bound(&self, server: &Id<'_>, each: impl FnMut(&Key, &Transport<L>)) {
        let group = {
            let guard = self.servers.guard();
            match self.servers.get(server, &guard) {
                Some(server) => Arc::clone(server.group()),
                None => return,
            }
        };
        let is_bound = |transport: &Transport<L>, member| {
            self.holding(&transport.binding)
                .is_some_and(|membership| membership.is(&group, member))
        };
        let namespace = Namespace::Transport;
        self.visit_roll(&self.transports, namespace, &group.roll, is_bound, each);
    }

    /// An upper bound of the transports that [`Self::for_each_bound`] visits.
    pub fn bound_high_water(&self, server: &Id<'_>) -> u32 {
        let guard = self.servers.guard();
        self.servers
            .get(server, &guard)
            .map_or(0, |server| server.group().roll.high_water())
    }

    // ---- The protocol ----

    pub(super) fn is_current(&self, group: &Arc<Group>) -> bool {
        let guard = self.servers.guard();
        self.servers
            .get(&self.id_of(&group.server), &guard)
            .is_some_and(|server| Arc::ptr_eq(server.group(), group))
    }

    pub(super) fn decide(&self, attempt: &Attempt) -> bool {
        attempt.decide(|| self.is_current(&attempt.to.group))
    }

    /// The membership that a binding stands for, after deciding it if need be. Its group may be no longer current.
    pub(super) fn holding(&self, binding: &Binding) -> Option<Membership> {
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

    /// Replaces a decided attempt by a plain binding, unless another thread has changed it.
    pub(super) fn settle(
        &self,
        transport: &Id<'_>,
        attempt: &Arc<Attempt>,
        kept: Option<Membership>,
    ) {
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
                        level: Arc::clone(&held.level),
                    })
                }
                _ => Operation::Abort(()),
            },
            &guard,
        );
    }

    /// The current group of a server id, for an automatic binding. An id without a server is kept in the map by
    /// counting the bindings to it; [`Self::leave_group`] undoes that.
    pub(super) fn join(&self, server: Id<'_>) -> Arc<Group> {
        let guard = self.servers.guard();
        loop {
            let joined = self.servers.compute(
                Key::without_location(server),
                |current| match current {
                    None => Operation::Abort(None),
                    Some((_, Server::Dangling { group, bound })) => {
                        Operation::Insert(Server::Dangling {
                            group: Arc::clone(group),
                            bound: bound + 1,
                        })
                    }
                    Some((_, Server::Registered { group, .. })) => {
                        Operation::Abort(Some(Arc::clone(group)))
                    }
                },
                &guard,
            );
            match joined {
                Compute::Aborted(Some(group)) => return group,
                Compute::Updated {
                    new: (_, server), ..
                } => return Arc::clone(server.group()),
                _ => {}
            }
            // Not by `compute`: see `insert_server`.
            let new = Server::Dangling {
                group: Group::new(Key::without_location(server)),
                bound: 1,
            };
            // Counted before it is inserted, so that it is never subtracted before it is added.
            self.dangling.fetch_add(1, Ordering::Relaxed);
            if let Ok(inserted) =
                self.servers
                    .try_insert(Key::without_location(server), new, &guard)
            {
                return Arc::clone(inserted.group());
            }
            self.dangling.fetch_sub(1, Ordering::Relaxed);
            // Lost to a concurrent change of this id.
        }
    }

    /// Ends a membership. Only for the thread whose compare-and-swap ended it (or that never made use of it).
    pub(super) fn leave(&self, membership: &Membership) {
        membership.group.roll.leave(membership.slot);
        self.leave_group(&membership.group);
    }

    /// Subtracts one binding from the count of an id without a server. Every binding to such a group was counted by
    /// `join`. Once the server is registered (or gone) the count is void.
    fn leave_group(&self, group: &Arc<Group>) {
        let guard = self.servers.guard();
        let is_dangling = |server: &Server<L>| matches!(server, Server::Dangling { group: held, .. } if Arc::ptr_eq(held, group));
        if !self
            .servers
            .get(&self.id_of(&group.server), &guard)
            .is_some_and(is_dangling)
        {
            return;
        }
        let left = self.servers.compute(
            Key::without_location(self.id_of(&group.server)),
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
        if matches!(left, Compute::Removed(..)) {
            self.dangling.fetch_sub(1, Ordering::Relaxed);
            self.churn.removed(self.id_of(&group.server).hash);
        }
    }
}
