//! What the values of the maps have in common, and the functions that are generic over them.

use std::hash::Hash;
use std::ops::{ControlFlow, Range};

use papaya::Equivalent;

use super::entry::{Connection, Key, Location, Member, Server, Transport};
use super::group::{Binding, Decision, From, Roll};
use super::{Entry, Id, Map, Namespace, Registry};
use crate::token_bucket::Level;

/// Calls a function that is generic over [`Stored`] with the map of a namespace. Every operation selects its map
/// here, except registration: each namespace has its own insertion.
macro_rules! with_map {
    ($registry:expr, $namespace:expr, |$map:ident| $call:expr) => {
        match $namespace {
            $crate::registry::Namespace::Connection => {
                let $map = &$registry.connections;
                $call
            }
            $crate::registry::Namespace::Server => {
                let $map = &$registry.servers;
                $call
            }
            $crate::registry::Namespace::Transport => {
                let $map = &$registry.transports;
                $call
            }
            $crate::registry::Namespace::Member => {
                let $map = &$registry.members;
                $call
            }
        }
    };
}

pub(super) use with_map;

/// While a guard exists, nothing that is removed from the registry since can be freed; all of it is freed at once
/// when the guard is dropped. So a walk drops its guard after this many places: some 500 microseconds, configs
/// included.
pub(super) const PLACES_UNDER_ONE_GUARD: usize = 1_024;

/// Entries that are found before the first of them is used, so that their cache misses overlap.
const FOUND_TOGETHER: usize = 16;

fn batches(places: Range<u32>) -> impl Iterator<Item = (u32, u32)> {
    let end = places.end;
    places
        .step_by(FOUND_TOGETHER)
        .map(move |first| (first, end.min(first.saturating_add(FOUND_TOGETHER as u32))))
}

/// A value of the map of one namespace.
pub(super) trait Stored<L>: Send + Sized + 'static {
    /// The entry, which is registered if [`Self::is_registered`] says so.
    fn entry(&self) -> Option<&Entry<L>>;

    /// Whether the value is a registration. May decide an attempt to bind.
    #[inline]
    fn is_registered(&self, _registry: &Registry<L>) -> bool {
        true
    }

    /// The token bucket, if there is one.
    #[inline]
    fn level(&self) -> Option<&Level> {
        None
    }

    /// Releases what belongs to the value. Called once, after its removal.
    fn release(&self, registry: &Registry<L>);
}

impl<L> Stored<L> for Connection<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    #[inline]
    fn entry(&self) -> Option<&Entry<L>> {
        Some(&self.entry)
    }

    #[inline]
    fn level(&self) -> Option<&Level> {
        Some(&self.level)
    }

    fn release(&self, registry: &Registry<L>) {
        registry.buckets.left(&self.level);
    }
}

impl<L> Stored<L> for Server<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    #[inline]
    fn entry(&self) -> Option<&Entry<L>> {
        match self {
            Self::Dangling { .. } => None,
            Self::Registered { entry, .. } => Some(entry),
        }
    }

    #[inline]
    fn is_registered(&self, _registry: &Registry<L>) -> bool {
        matches!(self, Self::Registered { .. })
    }

    fn release(&self, _registry: &Registry<L>) {
        Decision::server_has_gone();
    }
}

impl<L> Stored<L> for Transport<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    #[inline]
    fn entry(&self) -> Option<&Entry<L>> {
        Some(&self.entry)
    }

    #[inline]
    fn is_registered(&self, registry: &Registry<L>) -> bool {
        match &self.binding {
            Binding::Unbound | Binding::To(_) => true,
            Binding::Pending(attempt) => match attempt.from {
                From::Unregistered => registry.decide(attempt),
                From::Registered(_) => true,
            },
        }
    }

    #[inline]
    fn level(&self) -> Option<&Level> {
        Some(&self.level)
    }

    fn release(&self, registry: &Registry<L>) {
        if let Some(membership) = registry.holding(&self.binding) {
            registry.leave(&membership);
        }
        registry.buckets.left(&self.level);
    }
}

impl<L> Stored<L> for Member<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    #[inline]
    fn entry(&self) -> Option<&Entry<L>> {
        Some(&self.entry)
    }

    fn release(&self, registry: &Registry<L>) {
        registry.leave_process_group(&self.joined);
    }
}

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// The result of `found` for the registration of `id`, if there is one.
    #[inline(always)]
    pub(super) fn lookup<V: Stored<L>, R>(
        &self,
        map: &Map<V>,
        id: &Id<'_>,
        found: impl FnOnce(&Key, &V, &Entry<L>) -> R,
    ) -> Option<R> {
        let guard = map.guard();
        let (key, value) = map.get_key_value(id, &guard)?;
        let entry = self.registered(value)?;
        Some(found(key, value, entry))
    }

    /// Calls `each` with every registration, until it breaks.
    pub(super) fn visit<V: Stored<L>, B>(
        &self,
        map: &Map<V>,
        namespace: Namespace,
        mut each: impl FnMut(&Key, &V, &Entry<L>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        (0..self.limits.shards())
            .try_for_each(|shard| self.visit_places(map, namespace, shard, 0..u32::MAX, &mut each))
    }

    /// Calls `each` with the registrations at `places` of a shard, until it breaks. A registration keeps its place.
    /// So one that is present throughout is seen exactly once, although the guard is released in between.
    pub(super) fn visit_places<V: Stored<L>, B>(
        &self,
        map: &Map<V>,
        namespace: Namespace,
        shard: u16,
        places: Range<u32>,
        mut each: impl FnMut(&Key, &V, &Entry<L>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let Some(slots) = self.shards[usize::from(shard)].slots(namespace) else {
            return ControlFlow::Continue(());
        };
        let end = places.end.min(slots.high_water());
        for first in (places.start..end).step_by(PLACES_UNDER_ONE_GUARD) {
            let last = end.min(first.saturating_add(PLACES_UNDER_ONE_GUARD as u32));
            let guard = map.guard();
            for (from, to) in batches(first..last) {
                let mut found = [None; FOUND_TOGETHER];
                for ((slot, hash), found) in slots.within(from..to).zip(&mut found) {
                    let location = Location {
                        slot,
                        shard,
                        namespace,
                    };
                    *found = self.at(location, hash).find(map, &guard);
                }
                for (key, value) in found.into_iter().flatten() {
                    if let Some(entry) = self.registered(value) {
                        each(key, value, entry)?;
                    }
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Calls `each` with the registrations on a roll that `belongs` accepts, which gets the value and its index on the
    /// roll. One that is on the roll throughout is seen exactly once.
    pub(super) fn visit_roll<V: Stored<L>>(
        &self,
        map: &Map<V>,
        namespace: Namespace,
        roll: &Roll,
        belongs: impl Fn(&V, u32) -> bool,
        mut each: impl FnMut(&Key, &V),
    ) {
        let end = roll.high_water();
        for first in (0..end).step_by(PLACES_UNDER_ONE_GUARD) {
            let last = end.min(first.saturating_add(PLACES_UNDER_ONE_GUARD as u32));
            let guard = map.guard();
            for (from, to) in batches(first..last) {
                let mut found = [None; FOUND_TOGETHER];
                for ((index, shard, slot), found) in roll.within(from..to).zip(&mut found) {
                    let location = Location {
                        slot,
                        shard,
                        namespace,
                    };
                    *found = self
                        .located(location)
                        .and_then(|place| place.find(map, &guard))
                        .map(|(key, value)| (index, key, value));
                }
                for (index, key, value) in found.into_iter().flatten() {
                    // The place may have been given to another entry since.
                    if belongs(value, index) && value.is_registered(self) {
                        each(key, value);
                    }
                }
            }
        }
    }

    /// Removes the registration that `query` finds, if it is the one meant.
    pub(super) fn remove_from<V: Stored<L>, Q>(
        &self,
        map: &Map<V>,
        query: &Q,
        is_meant: impl Fn(&Key, &V, &Entry<L>) -> bool,
    ) -> Option<Entry<L>>
    where
        Q: Equivalent<Key> + Hash,
    {
        let guard = map.guard();
        let is_removed = |key: &Key, value: &V| {
            // Last, since it may decide an attempt: only that of the value that is meant.
            value
                .entry()
                .is_some_and(|entry| is_meant(key, value, entry))
                && value.is_registered(self)
        };
        let (key, value) = map.remove_if(query, is_removed, &guard).ok()??;
        value.release(self);
        self.release(key.location());
        value.entry().cloned()
    }

    #[inline(always)]
    pub(super) fn registered<'v, V: Stored<L>>(&self, value: &'v V) -> Option<&'v Entry<L>> {
        value.entry().filter(|_| value.is_registered(self))
    }
}
