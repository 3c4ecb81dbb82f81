//! Registering, removing and changing entries.

use std::thread;
use std::time::Duration;

use erlmcp_core::error::RegisterError;
use erlmcp_core::registry::{Entry, Id, Namespace};
use rustler::{Encoder, Env, Error, LocalPid, NifResult, Term};

use super::group::member_id;
use super::lookup::REMOTE;
use super::{
    MAX_LISTED_ON_NORMAL_SCHEDULER, as_id, encode_id, is_alive, live_entry, namespace, not_found,
    pid_term, removed, shard_of,
};
use crate::atoms;
use crate::config::Config;
use crate::immediate;
use crate::reschedule::{Outcome, Scheduler, Stopped, TooHeavy, reschedulable};
use crate::resource::{Registry, diverts_changes, passage, registry};
use crate::watch::{Lease, Watch};

/// The server that a transport is bound to on registration: `server_id` in its config.
fn automatic_binding(namespace: Namespace, config: Term<'_>) -> Option<Term<'_>> {
    if namespace != Namespace::Transport {
        return None;
    }
    let server = config.map_get(atoms::server_id()).ok()?;
    (atoms::undefined() != server).then_some(server)
}

/// The most retries, one right after the other, of a registration that finds the registry full. It retries more than
/// once only if a removal or another registration is under way at that moment.
const MAX_SEARCHES: u32 = 10;

/// The most further retries, on a dirty scheduler: the operating system may have suspended the thread of a removal
/// after the entry was removed and before its room was released.
const MAX_WAITS: u32 = 20;
const WAIT: Duration = Duration::from_millis(1);

/// Removes from a full registry all entries whose processes have exited and whose monitors have not fired
/// yet. Returns whether there may be room now.
///
/// Finding such processes takes a check of every entry. So that refused registrations cannot keep the
/// dirty schedulers busy, a large registry spends at most a tenth of the time on this.
fn remove_exited(
    env: Env<'_>,
    registry: &Registry,
    scheduler: Scheduler,
) -> Result<bool, TooHeavy> {
    if !registry.may_search() {
        return Ok(false);
    }
    if registry.high_water() > MAX_LISTED_ON_NORMAL_SCHEDULER {
        scheduler.require_dirty()?;
    }
    let mut alive = 0;
    registry.searching(|| {
        for namespace in Namespace::ALL {
            registry.for_each(namespace, |id, entry| {
                if is_alive(env, entry) {
                    alive += 1;
                } else {
                    registry.remove_exact(env, namespace, &id, |held| *held == entry.lease);
                }
            });
        }
    });
    // True also if the monitor of such a process has fired since the registry was found full.
    Ok(alive < registry.limits().max_entries())
}

/// What becomes of a registration whose id a process that is alive has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum IfTaken {
    /// `{already_registered, Pid}`.
    Refuse,
    /// `{found, {Pid, Config}}`.
    Find,
    /// Takes the id over: `{replaced, Pid, Sentinel}`, where the sentinel is `none` for a local process. For
    /// connections alone.
    Replace,
}

/// The registration that has the id; `None` if it has none any more.
fn taken<'a>(
    env: Env<'a>,
    registry: &Registry,
    namespace: Namespace,
    id: &Id<'_>,
    if_taken: IfTaken,
    scheduler: Scheduler,
) -> Result<Option<Term<'a>>, Stopped> {
    let Some(entry) = live_entry(env, registry, namespace, id) else {
        return Ok(None);
    };
    let pid = pid_term(env, &entry);
    Ok(match if_taken {
        IfTaken::Refuse => Some((atoms::already_registered(), pid).encode(env)),
        // `None`: the entry was removed since it was found.
        IfTaken::Find => entry
            .lease
            .config
            .load(env, scheduler)?
            .map(|config| (atoms::found(), (pid, config)).encode(env)),
        IfTaken::Replace => None,
    })
}

/// For [`Namespace::Member`] the id is that of the group, and the process is in the shard of its pid.
fn register<'a>(
    env: Env<'a>,
    namespace: Namespace,
    [of, id_term, pid, monitored, config_term]: [Term<'a>; 5],
    if_taken: IfTaken,
    scheduler: Scheduler,
) -> Outcome<'a> {
    let registry = registry(of)?;
    if diverts_changes(of, namespace) {
        return Ok(atoms::diverted().encode(env));
    }
    let encoded = encode_id(registry, id_term)?;
    if !pid.is_pid() || !monitored.is_pid() {
        return Err(Error::BadArg.into());
    }
    let member;
    let (id, group, hashed) = match namespace {
        Namespace::Member => {
            let group = as_id(registry, &encoded);
            member = member_id(&group, pid)?;
            (registry.id(member.kind(), member.bytes()), Some(group), pid)
        }
        _ => (as_id(registry, &encoded), None, id_term),
    };
    let is_local = pid.decode::<LocalPid>().is_ok();
    let address = if is_local {
        immediate::word(pid)
    } else {
        REMOTE
    };
    let bind_to = automatic_binding(namespace, config_term)
        .map(|server| encode_id(registry, server))
        .transpose()?;
    let bind_to = bind_to.as_ref().map(|server| as_id(registry, server));
    let is_churned = |id: Option<Id<'_>>| id.is_some_and(|id| registry.is_churned(&id));
    if is_churned(Some(id)) || is_churned(bind_to) || is_churned(group) {
        scheduler.require_dirty()?;
        registry.complete_resizes();
    }
    let Ok(_passage) = passage(of, registry, namespace, &id) else {
        return Ok(atoms::diverted().encode(env));
    };
    if let Some(taken) = taken(env, registry, namespace, &id, if_taken, scheduler)? {
        return Ok(taken);
    }
    if let Some(server) = &bind_to {
        // A binding made before its server is registered must not be removed with an earlier
        // server of that id that has exited.
        live_entry(env, registry, Namespace::Server, server);
    }
    let gone = |env| match if_taken {
        // As if registered and removed at once.
        IfTaken::Refuse | IfTaken::Find => Ok(atoms::ok().encode(env)),
        IfTaken::Replace => Ok(replaced(env, registry.remove(env, namespace, &id))),
    };
    let Ok(monitored) = monitored.decode::<LocalPid>() else {
        // A process of an earlier incarnation of this node.
        return gone(env);
    };
    let config = Config::keep(config_term, scheduler)?.of_entry();
    let config = if is_local {
        config
    } else {
        config.of_remote(pid, monitored)
    };
    let Some(watch) = Watch::of(env, &monitored) else {
        // The process has exited.
        return gone(env);
    };
    let lease = Lease { watch, config };
    let shard = shard_of(registry, hashed);
    let mut searches = 0;
    loop {
        let placed = |location| {
            lease.watch.place(registry, location);
            lease.clone()
        };
        let registered = match if_taken {
            IfTaken::Refuse | IfTaken::Find => registry
                .register(namespace, id, shard, address, bind_to, placed)
                .map(|()| None),
            IfTaken::Replace => registry.replace_connection(env, id, shard, address, placed),
        };
        registry.wake_reader(env);
        let refused = match registered {
            Ok(former) => {
                if lease.watch.has_ended() {
                    registry.remove_exact(env, namespace, &id, |held| *held == lease);
                }
                return Ok(replaced(env, former));
            }
            Err(RegisterError::AlreadyRegistered { .. }) => {
                match taken(env, registry, namespace, &id, if_taken, scheduler) {
                    Ok(Some(taken)) => taken,
                    Ok(None) => {
                        lease.watch.displace();
                        continue;
                    }
                    Err(stopped) => {
                        lease.recycle(address);
                        return Err(stopped);
                    }
                }
            }
            Err(RegisterError::RegistryFull) if searches == MAX_SEARCHES + MAX_WAITS => {
                atoms::registry_full().encode(env)
            }
            Err(RegisterError::RegistryFull) => match remove_exited(env, registry, scheduler) {
                Ok(true) => {
                    searches += 1;
                    lease.watch.displace();
                    if searches > MAX_SEARCHES {
                        if let Err(TooHeavy) = scheduler.require_dirty() {
                            lease.recycle(address);
                            return Err(Stopped::TooHeavy);
                        }
                        thread::sleep(WAIT);
                    }
                    continue;
                }
                Ok(false) => atoms::registry_full().encode(env),
                Err(TooHeavy) => {
                    lease.recycle(address);
                    return Err(Stopped::TooHeavy);
                }
            },
            Err(RegisterError::Closed) => atoms::registry_closed().encode(env),
        };
        lease.recycle(address);
        return Ok(refused);
    }
}

reschedulable!(c"register", 6, |env, arguments, scheduler| {
    let [of, ns, id, pid, monitored, config] = arguments;
    let arguments = [of, id, pid, monitored, config];
    register(env, namespace(ns)?, arguments, IfTaken::Refuse, scheduler)
});
reschedulable!(c"register_or_find", 5, |env, arguments, scheduler| {
    let namespace = Namespace::Connection;
    register(env, namespace, arguments, IfTaken::Find, scheduler)
});
reschedulable!(c"replace", 5, |env, arguments, scheduler| {
    let namespace = Namespace::Connection;
    register(env, namespace, arguments, IfTaken::Replace, scheduler)
});
reschedulable!(c"join_group", 4, |env, arguments, scheduler| {
    let [of, group, pid, monitored] = arguments;
    let arguments = [of, group, pid, monitored, atoms::none().encode(env)];
    register(
        env,
        Namespace::Member,
        arguments,
        IfTaken::Refuse,
        scheduler,
    )
});

/// The result of a registration that has taken the place of `former`.
fn replaced<'a>(env: Env<'a>, former: Option<Entry<Lease>>) -> Term<'a> {
    let Some(former) = former else {
        return atoms::ok().encode(env);
    };
    let pid = pid_term(env, &former);
    let sentinel = removed(&former).map_or(atoms::none().encode(env), |pid| pid.encode(env));
    (atoms::replaced(), pid, sentinel).encode(env)
}

#[rustler::nif]
fn unregister<'a>(env: Env<'a>, of: Term<'a>, ns: Term<'a>, id: Term<'a>) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let namespace = namespace(ns)?;
    if diverts_changes(of, namespace) {
        return Ok(atoms::diverted().encode(env));
    }
    let encoded = encode_id(registry, id)?;
    let id = as_id(registry, &encoded);
    let Ok(_passage) = passage(of, registry, namespace, &id) else {
        return Ok(atoms::diverted().encode(env));
    };
    let entry = registry.remove(env, namespace, &id);
    Ok(unregistered(env, entry.as_ref()))
}

/// `ok`, with the sentinel to stop if the entry had one.
fn unregistered<'a>(env: Env<'a>, entry: Option<&Entry<Lease>>) -> Term<'a> {
    match entry.and_then(removed) {
        Some(sentinel) => (atoms::ok(), sentinel).encode(env),
        None => atoms::ok().encode(env),
    }
}

/// Removes a process from a group: `ok`, with the sentinel to stop if it had one, or `not_joined`.
#[rustler::nif]
fn leave_group<'a>(
    env: Env<'a>,
    of: Term<'a>,
    group: Term<'a>,
    pid: Term<'a>,
) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let encoded = encode_id(registry, group)?;
    if !pid.is_pid() {
        return Err(Error::BadArg);
    }
    let member = member_id(&as_id(registry, &encoded), pid)?;
    let id = registry.id(member.kind(), member.bytes());
    Ok(match registry.remove(env, Namespace::Member, &id) {
        Some(entry) => unregistered(env, Some(&entry)),
        None => atoms::not_joined().encode(env),
    })
}

/// Removes a connection if `pid` holds it: `ok`, with the sentinel to stop if it had one, or `not_held`.
///
/// No retry: if the entry that was found is gone, then the process held no registration of this id at the moment after
/// its removal.
#[rustler::nif]
fn release<'a>(env: Env<'a>, of: Term<'a>, id: Term<'a>, pid: Term<'a>) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    if !pid.is_pid() {
        return Err(Error::BadArg);
    }
    let encoded = encode_id(registry, id)?;
    let id = as_id(registry, &encoded);
    let removed_entry = registry
        .entry(Namespace::Connection, &id)
        .filter(|entry| pid_term(env, entry) == pid)
        .and_then(|entry| {
            registry.remove_exact(env, Namespace::Connection, &id, |held| *held == entry.lease)
        });
    Ok(match removed_entry {
        None => atoms::not_held().encode(env),
        Some(entry) => unregistered(env, Some(&entry)),
    })
}

/// Replaces the config of a server or a connection.
fn update<'a>(
    env: Env<'a>,
    [of, ns, id, config]: [Term<'a>; 4],
    scheduler: Scheduler,
) -> Outcome<'a> {
    let registry = registry(of)?;
    let namespace = namespace(ns)?;
    if !matches!(namespace, Namespace::Server | Namespace::Connection) {
        return Err(Error::BadArg.into());
    }
    if diverts_changes(of, namespace) {
        return Ok(atoms::diverted().encode(env));
    }
    let encoded = encode_id(registry, id)?;
    let id = as_id(registry, &encoded);
    let kept = Config::keep(config, scheduler)?;
    let Ok(_passage) = passage(of, registry, namespace, &id) else {
        return Ok(atoms::diverted().encode(env));
    };
    loop {
        let Some(entry) = live_entry(env, registry, namespace, &id) else {
            return Ok(not_found(env));
        };
        let former = &entry.lease;
        // A config in the form of an entry belongs to one lease, and each attempt makes another one.
        let config = kept.clone().of_entry();
        let config = match former.config.remote() {
            Some(remote) => config.of_remote(pid_term(env, &entry), remote.sentinel),
            None => config.with_delivery(former.config.delivery().cloned().unwrap_or_default()),
        };
        if registry.exchange_config(env, namespace, &id, former, config) {
            return Ok(atoms::ok().encode(env));
        }
        // Lost to a concurrent change of this id.
    }
}

reschedulable!(c"update", 4, update);
