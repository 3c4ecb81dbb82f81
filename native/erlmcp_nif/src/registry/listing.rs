//! Listing and counting.

use std::ops::ControlFlow;

use erlmcp_core::registry::{Entry, Id, MemberId, Namespace};
use rustler::{Env, Error, NifResult, Term};

use super::{
    MAX_LISTED_ON_NORMAL_SCHEDULER, MAX_WALKED_ON_NORMAL_SCHEDULER, encode_id, is_alive, namespace,
    pid_term, shard_number, shard_of,
};
use crate::atoms;
use crate::config::{self, MAX_WEIGHT_ON_NORMAL_SCHEDULER};
use crate::id;
use crate::reschedule::{Outcome, Scheduler, Stopped, reschedulable};
use crate::resource::{Registry, registry, unless_diverted};
use crate::watch::{Lease, WatchResource};

/// A list of `{Id, {Pid, Config}}` under construction.
struct Listing<'a> {
    env: Env<'a>,
    scheduler: Scheduler,
    list: Term<'a>,
    weight: usize,
}

impl<'a> Listing<'a> {
    fn new(env: Env<'a>, scheduler: Scheduler) -> Self {
        Self {
            env,
            scheduler,
            list: Term::list_new_empty(env),
            weight: 0,
        }
    }

    /// Adds an entry, unless its process has exited.
    fn add(
        &mut self,
        registry: &Registry,
        namespace: Namespace,
        id: Id<'_>,
        entry: &Entry<Lease>,
    ) -> Result<(), Stopped> {
        if !is_alive(self.env, entry) {
            return Ok(());
        }
        let config = &entry.lease.config;
        self.weight = self
            .weight
            .saturating_add(config.weight())
            .saturating_add(id::weight(id.kind(), id.bytes()));
        if self.weight > MAX_WEIGHT_ON_NORMAL_SCHEDULER {
            self.scheduler.require_dirty()?;
        }
        let Some(config) = config.load(self.env, self.scheduler)? else {
            // The entry was removed or its config replaced since it was found.
            return match registry.entry(namespace, &id) {
                Some(entry) => self.add(registry, namespace, id, &entry),
                None => Ok(()),
            };
        };
        let id = id::decode(self.env, id.kind(), id.bytes())?;
        let listed = (id, (pid_term(self.env, entry), config));
        self.list = self.list.list_prepend(listed);
        Ok(())
    }
}

/// Breaks off the iteration at an error.
fn unless_stopped(result: Result<(), Stopped>) -> ControlFlow<Stopped> {
    match result {
        Ok(()) => ControlFlow::Continue(()),
        Err(stopped) => ControlFlow::Break(stopped),
    }
}

fn list<'a>(env: Env<'a>, [of, ns]: [Term<'a>; 2], scheduler: Scheduler) -> Outcome<'a> {
    let registry = registry(of)?;
    let namespace = namespace(ns)?;
    if registry.count(namespace) > MAX_LISTED_ON_NORMAL_SCHEDULER
        || registry.high_water_of(namespace) > MAX_WALKED_ON_NORMAL_SCHEDULER
    {
        scheduler.require_dirty()?;
    }
    unless_diverted(env, of, namespace, || {
        let mut listing = Listing::new(env, scheduler);
        match registry.try_for_each(namespace, |id, entry| {
            unless_stopped(listing.add(registry, namespace, id, entry))
        }) {
            ControlFlow::Continue(()) => Ok(listing.list),
            ControlFlow::Break(stopped) => Err(stopped),
        }
    })
}

reschedulable!(c"list", 2, list);

fn list_shard<'a>(env: Env<'a>, [of, shard]: [Term<'a>; 2], scheduler: Scheduler) -> Outcome<'a> {
    let registry = registry(of)?;
    let shard = shard_number(registry, shard)?;
    if u64::from(registry.shard_high_water(Namespace::Connection, shard))
        > MAX_LISTED_ON_NORMAL_SCHEDULER
    {
        scheduler.require_dirty()?;
    }
    let mut listing = Listing::new(env, scheduler);
    match registry.try_for_each_connection_of(shard, |id, entry| {
        unless_stopped(listing.add(registry, Namespace::Connection, id, entry))
    }) {
        ControlFlow::Continue(()) => Ok(listing.list),
        ControlFlow::Break(stopped) => Err(stopped),
    }
}

reschedulable!(c"list_shard", 2, list_shard);

/// The ids of the connections, or of the groups, whose entries belong to these watches, which are references among others.
///
/// One that is there throughout is found once: its watch belongs to it all the time.
fn watched<'a>(
    env: Env<'a>,
    namespace: Namespace,
    [of, watches]: [Term<'a>; 2],
    scheduler: Scheduler,
) -> Outcome<'a> {
    let registry = registry(of)?;
    let (mut ids, mut weight) = (Term::list_new_empty(env), 0);
    let (mut rest, mut visited) = (watches, 0);
    while let Ok((watch, tail)) = rest.list_get_cell() {
        rest = tail;
        visited += 1;
        if visited > MAX_LISTED_ON_NORMAL_SCHEDULER {
            scheduler.require_dirty()?;
        }
        let Some(watch) = watch.try_get_resource::<WatchResource>() else {
            continue;
        };
        let Some((number, location)) = watch.entry() else {
            continue;
        };
        if number != registry.number() || location.namespace() != namespace {
            continue;
        }
        let found = registry.with_entry_at(location, |id, entry| {
            weight += id::weight(id.kind(), id.bytes());
            if weight > MAX_WEIGHT_ON_NORMAL_SCHEDULER {
                scheduler.require_dirty()?;
            }
            let is_meant = entry.lease.watch.is(watch);
            let bytes = match namespace {
                Namespace::Member => MemberId::group_bytes(&id),
                _ => id.bytes(),
            };
            let decoded = is_meant.then(|| id::decode(env, id.kind(), bytes));
            Ok::<_, Stopped>(decoded.transpose()?)
        });
        if let Some(id) = found.transpose()?.flatten() {
            ids = ids.list_prepend(id);
        }
    }
    if !rest.is_empty_list() {
        return Err(Error::BadArg.into());
    }
    Ok(ids)
}

reschedulable!(c"watched_connections", 2, |env, arguments, scheduler| {
    watched(env, Namespace::Connection, arguments, scheduler)
});
reschedulable!(c"watched_groups", 2, |env, arguments, scheduler| {
    watched(env, Namespace::Member, arguments, scheduler)
});

/// The entries of a namespace, or with the atom `member` the memberships in groups.
#[rustler::nif]
fn count(of: Term<'_>, ns: Term<'_>) -> NifResult<u64> {
    let namespace = if atoms::member() == ns {
        Namespace::Member
    } else {
        namespace(ns)?
    };
    Ok(registry(of)?.count(namespace))
}

/// Servers, transports, connections and memberships.
#[rustler::nif]
fn count_shard(of: Term<'_>, shard: Term<'_>) -> NifResult<(u64, u64, u64, u64)> {
    let registry = registry(of)?;
    let shard = shard_number(registry, shard)?;
    Ok((
        registry.count_of(Namespace::Server, shard),
        registry.count_of(Namespace::Transport, shard),
        registry.count_of(Namespace::Connection, shard),
        registry.count_of(Namespace::Member, shard),
    ))
}

#[rustler::nif]
fn shard<'a>(of: Term<'a>, id: Term<'a>) -> NifResult<u16> {
    let registry = registry(of)?;
    encode_id(registry, id)?;
    Ok(shard_of(registry, id))
}

#[rustler::nif]
fn distinct_configs() -> u64 {
    config::distinct()
}
