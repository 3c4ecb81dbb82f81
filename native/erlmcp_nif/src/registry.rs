//! The functions on registries. Those that may have much to do exist twice: the plain one answers
//! `dirty` instead of working for long, and the one named `*_dirty` then does it on a dirty
//! scheduler.

use std::ops::ControlFlow;

use erlmcp_core::error::{BindError, RegisterError};
use erlmcp_core::registry::{Entry, Id, Limits, Namespace};
use rustler::{Atom, Encoder, Env, Error, LocalPid, NifResult, ResourceArc, Term};

use crate::atoms;
use crate::config::{self, Config, MAX_WEIGHT_ON_NORMAL_SCHEDULER, Scheduler, TooHeavy};
use crate::id::{self, EncodedId};
use crate::immediate;
use crate::lookup::{self, REMOTE};
use crate::resource::{
    Registry, RegistryResource, default_registry, make_default_registry, passage, registry,
};
use crate::watch::{Lease, Watch};

/// Entries that are listed on a normal scheduler: about 300 microseconds.
pub(crate) const MAX_LISTED_ON_NORMAL_SCHEDULER: u64 = 500;

/// Places, most of them empty, that are walked on a normal scheduler: some 100 microseconds.
pub(crate) const MAX_WALKED_ON_NORMAL_SCHEDULER: u64 = 20_000;

// ---- Arguments and results ----

#[inline]
pub(crate) fn namespace(term: Term<'_>) -> NifResult<Namespace> {
    if atoms::connection() == term {
        Ok(Namespace::Connection)
    } else if atoms::server() == term {
        Ok(Namespace::Server)
    } else if atoms::transport() == term {
        Ok(Namespace::Transport)
    } else {
        Err(Error::BadArg)
    }
}

#[inline]
fn encode_id<'a>(registry: &Registry, term: Term<'a>) -> NifResult<EncodedId<'a>> {
    id::encode(term, registry.limits().max_id_bytes())
}

#[inline]
fn as_id<'a>(registry: &Registry, encoded: &'a EncodedId<'_>) -> Id<'a> {
    registry.id(encoded.kind, encoded.bytes())
}

pub(crate) fn shard_number(registry: &Registry, term: Term<'_>) -> NifResult<u16> {
    // rustler decodes narrower integers by cutting them off.
    let shard: u64 = term.decode()?;
    if shard < u64::from(registry.limits().shards()) {
        Ok(shard as u16)
    } else {
        Err(Error::BadArg)
    }
}

/// `erlang:phash2(Id, Shards)`, since the number of shards is a power of two.
fn shard_of(registry: &Registry, id: Term<'_>) -> u16 {
    (id.hash_phash2() % u32::from(registry.limits().shards())) as u16
}

pub(crate) fn pid_term<'a>(env: Env<'a>, entry: &Entry<Lease>) -> Term<'a> {
    match entry.lease.config.remote() {
        Some(remote) => remote.pid(env),
        // SAFETY: an entry that is not for a remote process has a local pid for an address.
        None => unsafe { immediate::term(env, entry.address) },
    }
}

/// Whether the entry's process is alive as far as this node knows.
fn is_alive(env: Env<'_>, entry: &Entry<Lease>) -> bool {
    if entry.address == REMOTE {
        return true;
    }
    // SAFETY: the address is not that of a remote process.
    let pid = unsafe { immediate::term(env, entry.address) };
    pid.decode::<LocalPid>()
        .is_ok_and(|pid| env.is_process_alive(pid))
}

/// The entry of an id, after removing one whose process has ended but whose monitor has not fired
/// yet: callers that have seen the process end must not see its entry.
pub(crate) fn live_entry(
    env: Env<'_>,
    registry: &Registry,
    namespace: Namespace,
    id: &Id<'_>,
) -> Option<Entry<Lease>> {
    loop {
        let entry = registry.entry(namespace, id)?;
        if is_alive(env, &entry) {
            return Some(entry);
        }
        registry.remove_exact(namespace, id, |held| *held == entry.lease);
    }
}

/// Ends what belonged to an entry that was taken out; returns the sentinel, which the caller must
/// end, of a remote process.
fn removed(entry: &Entry<Lease>) -> Option<LocalPid> {
    entry.lease.recycle(entry.address);
    entry.lease.config.remote().map(|remote| remote.sentinel)
}

fn not_found(env: Env<'_>) -> Term<'_> {
    (atoms::error(), atoms::not_found()).encode(env)
}

// ---- Registries ----

fn limits(shards: u64, max_entries: u64, max_id_bytes: u64) -> NifResult<Limits> {
    Limits::new(shards, max_entries, max_id_bytes).map_err(|_| Error::BadArg)
}

#[rustler::nif]
fn new(
    shards: u64,
    max_entries: u64,
    max_id_bytes: u64,
) -> NifResult<ResourceArc<RegistryResource>> {
    let registry = Registry::create(limits(shards, max_entries, max_id_bytes)?);
    Ok(ResourceArc::new(RegistryResource(Some(registry))))
}

#[rustler::nif]
fn make_default(shards: u64, max_entries: u64, max_id_bytes: u64) -> NifResult<Atom> {
    let made = make_default_registry(limits(shards, max_entries, max_id_bytes)?);
    Ok(if made {
        atoms::created()
    } else {
        atoms::exists()
    })
}

#[rustler::nif(name = "limits")]
fn registry_limits(of: Term<'_>) -> NifResult<(u16, u64, usize)> {
    let limits = registry(of)?.limits();
    Ok((limits.shards(), limits.max_entries(), limits.max_id_bytes()))
}

// ---- Look-up ----

#[rustler::nif]
fn whereis<'a>(env: Env<'a>, of: Term<'a>, ns: Term<'a>, id: Term<'a>) -> NifResult<Term<'a>> {
    let pid = lookup::pid(env, registry(of)?, namespace(ns)?, id).ok_or(Error::BadArg)?;
    // SAFETY: it is a term of this environment.
    Ok(unsafe { Term::new(env, pid) })
}

fn find_on<'a>(
    env: Env<'a>,
    of: Term<'a>,
    ns: Term<'a>,
    id: Term<'a>,
    scheduler: Scheduler,
) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let namespace = namespace(ns)?;
    let encoded = encode_id(registry, id)?;
    let Some(entry) = live_entry(env, registry, namespace, &as_id(registry, &encoded)) else {
        return Ok(not_found(env));
    };
    Ok(match entry.lease.config.load(env, scheduler) {
        Ok(config) => (atoms::ok(), (pid_term(env, &entry), config)).encode(env),
        Err(TooHeavy) => atoms::dirty().encode(env),
    })
}

#[rustler::nif]
fn find<'a>(env: Env<'a>, of: Term<'a>, ns: Term<'a>, id: Term<'a>) -> NifResult<Term<'a>> {
    find_on(env, of, ns, id, Scheduler::Normal)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn find_dirty<'a>(env: Env<'a>, of: Term<'a>, ns: Term<'a>, id: Term<'a>) -> NifResult<Term<'a>> {
    find_on(env, of, ns, id, Scheduler::Dirty)
}

// ---- Registration ----

/// What stands in the config of a transport under `server_id`: the server that it is bound to.
fn automatic_binding(namespace: Namespace, config: Term<'_>) -> Option<Term<'_>> {
    if namespace != Namespace::Transport {
        return None;
    }
    let server = config.map_get(atoms::server_id()).ok()?;
    (atoms::undefined() != server).then_some(server)
}

fn register_on<'a>(
    env: Env<'a>,
    [of, ns, id_term, pid, monitored, config_term]: [Term<'a>; 6],
    scheduler: Scheduler,
) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let namespace = namespace(ns)?;
    let encoded = encode_id(registry, id_term)?;
    let id = as_id(registry, &encoded);
    if !pid.is_pid() {
        return Err(Error::BadArg);
    }
    if !monitored.is_pid() {
        return Err(Error::BadArg);
    }
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
    let Ok(_passage) = passage(of, registry, namespace, &id) else {
        return Ok(atoms::diverted().encode(env));
    };
    if let Some(taken) = live_entry(env, registry, namespace, &id) {
        return Ok((atoms::already_registered(), pid_term(env, &taken)).encode(env));
    }
    if let Some(server) = &bind_to {
        // A binding made ahead of a server must not go with an earlier one that has ended.
        live_entry(env, registry, Namespace::Server, server);
    }
    let Ok(monitored) = monitored.decode::<LocalPid>() else {
        // A process of an earlier life of this node: registered, and gone at once.
        return Ok(atoms::ok().encode(env));
    };
    let Ok(config) = Config::keep(config_term, scheduler) else {
        return Ok(atoms::dirty().encode(env));
    };
    let config = if is_local {
        config
    } else {
        config.of_remote(pid, monitored)
    };
    let Some(watch) = Watch::of(env, &monitored) else {
        // It has ended: registered, and gone at once.
        return Ok(atoms::ok().encode(env));
    };
    let lease = Lease { watch, config };
    loop {
        let registered = registry.register(
            namespace,
            id,
            shard_of(registry, id_term),
            address,
            bind_to,
            |location| {
                lease.watch.place(registry, location);
                lease.clone()
            },
        );
        let refused = match registered {
            Ok(_) => {
                if lease.watch.has_ended() {
                    registry.remove_exact(namespace, &id, |held| *held == lease);
                }
                return Ok(atoms::ok().encode(env));
            }
            Err(RegisterError::AlreadyRegistered { .. }) => {
                let Some(taken) = live_entry(env, registry, namespace, &id) else {
                    lease.watch.displace();
                    continue;
                };
                (atoms::already_registered(), pid_term(env, &taken)).encode(env)
            }
            Err(RegisterError::RegistryFull) => atoms::registry_full().encode(env),
            Err(RegisterError::Closed) => atoms::registry_closed().encode(env),
        };
        lease.recycle(address);
        return Ok(refused);
    }
}

#[rustler::nif]
fn register<'a>(
    env: Env<'a>,
    of: Term<'a>,
    ns: Term<'a>,
    id: Term<'a>,
    pid: Term<'a>,
    monitored: Term<'a>,
    config: Term<'a>,
) -> NifResult<Term<'a>> {
    register_on(env, [of, ns, id, pid, monitored, config], Scheduler::Normal)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn register_dirty<'a>(
    env: Env<'a>,
    of: Term<'a>,
    ns: Term<'a>,
    id: Term<'a>,
    pid: Term<'a>,
    monitored: Term<'a>,
    config: Term<'a>,
) -> NifResult<Term<'a>> {
    register_on(env, [of, ns, id, pid, monitored, config], Scheduler::Dirty)
}

#[rustler::nif]
fn unregister<'a>(env: Env<'a>, of: Term<'a>, ns: Term<'a>, id: Term<'a>) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let namespace = namespace(ns)?;
    let encoded = encode_id(registry, id)?;
    let id = as_id(registry, &encoded);
    let Ok(_passage) = passage(of, registry, namespace, &id) else {
        return Ok(atoms::diverted().encode(env));
    };
    let entry = registry.remove(namespace, &id);
    Ok(match entry.as_ref().and_then(removed) {
        Some(sentinel) => (atoms::ok(), sentinel).encode(env),
        None => atoms::ok().encode(env),
    })
}

fn update_server_on<'a>(
    env: Env<'a>,
    [of, id, config]: [Term<'a>; 3],
    scheduler: Scheduler,
) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let encoded = encode_id(registry, id)?;
    let id = as_id(registry, &encoded);
    let Ok(config) = Config::keep(config, scheduler) else {
        return Ok(atoms::dirty().encode(env));
    };
    let Ok(_passage) = passage(of, registry, Namespace::Server, &id) else {
        return Ok(atoms::diverted().encode(env));
    };
    loop {
        let Some(entry) = live_entry(env, registry, Namespace::Server, &id) else {
            return Ok(not_found(env));
        };
        let former = &entry.lease;
        let config = match former.config.remote() {
            Some(remote) => config
                .clone()
                .of_remote(pid_term(env, &entry), remote.sentinel),
            None => config.clone(),
        };
        let new = Lease {
            watch: former.watch.clone(),
            config,
        };
        if registry.exchange_server_lease(&id, former, new) {
            return Ok(atoms::ok().encode(env));
        }
        // Lost to another change of this server.
    }
}

#[rustler::nif]
fn update_server<'a>(
    env: Env<'a>,
    of: Term<'a>,
    id: Term<'a>,
    config: Term<'a>,
) -> NifResult<Term<'a>> {
    update_server_on(env, [of, id, config], Scheduler::Normal)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn update_server_dirty<'a>(
    env: Env<'a>,
    of: Term<'a>,
    id: Term<'a>,
    config: Term<'a>,
) -> NifResult<Term<'a>> {
    update_server_on(env, [of, id, config], Scheduler::Dirty)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn close(of: Term<'_>) -> NifResult<Vec<LocalPid>> {
    let mut sentinels = Vec::new();
    registry(of)?.close(|entry| {
        sentinels.extend(removed(&entry));
    });
    Ok(sentinels)
}

#[rustler::nif]
fn open(of: Term<'_>) -> NifResult<Atom> {
    registry(of)?.open();
    Ok(atoms::ok())
}

/// `ok` when all changes of the default registry's servers, transports and bindings that were not
/// diverted have been made; until then `busy`.
#[rustler::nif]
fn divert() -> Atom {
    if default_registry().diversion().set() {
        atoms::ok()
    } else {
        atoms::busy()
    }
}

#[rustler::nif]
fn undivert() -> Atom {
    default_registry().diversion().lift();
    atoms::ok()
}

// ---- Bindings ----

#[rustler::nif]
fn bind<'a>(
    env: Env<'a>,
    of: Term<'a>,
    transport: Term<'a>,
    server: Term<'a>,
    server_must_exist: bool,
) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let transport = encode_id(registry, transport)?;
    let transport = as_id(registry, &transport);
    let server = encode_id(registry, server)?;
    let server = as_id(registry, &server);
    let Ok(_passage) = passage(of, registry, Namespace::Transport, &transport) else {
        return Ok(atoms::diverted().encode(env));
    };
    // Whoever has ended must not be bound, nor bound to, although its monitor is yet to fire.
    live_entry(env, registry, Namespace::Server, &server);
    live_entry(env, registry, Namespace::Transport, &transport);
    Ok(match registry.bind(&transport, server, server_must_exist) {
        Ok(()) => atoms::ok().encode(env),
        Err(BindError::ServerNotFound) => (atoms::error(), atoms::server_not_found()).encode(env),
        Err(BindError::TransportNotFound) => {
            (atoms::error(), atoms::transport_not_found()).encode(env)
        }
    })
}

#[rustler::nif]
fn unbind<'a>(of: Term<'a>, transport: Term<'a>) -> NifResult<Atom> {
    let registry = registry(of)?;
    let transport = encode_id(registry, transport)?;
    let transport = as_id(registry, &transport);
    let Ok(_passage) = passage(of, registry, Namespace::Transport, &transport) else {
        return Ok(atoms::diverted());
    };
    registry.unbind(&transport);
    Ok(atoms::ok())
}

#[rustler::nif]
fn bound_server<'a>(env: Env<'a>, of: Term<'a>, transport: Term<'a>) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let transport = encode_id(registry, transport)?;
    let transport = as_id(registry, &transport);
    if live_entry(env, registry, Namespace::Transport, &transport).is_none() {
        return Ok(not_found(env));
    }
    let mut was_without_server = false;
    loop {
        let Some(server) = registry.bound_server(&transport, |server| {
            match registry.entry(Namespace::Server, &server) {
                Some(entry) if !is_alive(env, &entry) => {
                    live_entry(env, registry, Namespace::Server, &server);
                    None
                }
                // There is no such server (yet), or it went just now and took the binding along:
                // then the binding is not found the second time.
                None if !was_without_server => {
                    was_without_server = true;
                    None
                }
                _ => Some(id::decode(env, server.kind(), server.bytes())),
            }
        }) else {
            return Ok(not_found(env));
        };
        if let Some(server) = server {
            return Ok((atoms::ok(), server?).encode(env));
        }
    }
}

fn bound_on<'a>(
    env: Env<'a>,
    of: Term<'a>,
    server: Term<'a>,
    scheduler: Scheduler,
) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let server = encode_id(registry, server)?;
    let server = as_id(registry, &server);
    live_entry(env, registry, Namespace::Server, &server);
    if scheduler == Scheduler::Normal
        && u64::from(registry.bound_high_water(&server)) > MAX_LISTED_ON_NORMAL_SCHEDULER
    {
        return Ok(atoms::dirty().encode(env));
    }
    let mut pids = Term::list_new_empty(env);
    registry.for_each_bound(&server, |entry| {
        pids = pids.list_prepend(pid_term(env, entry));
    });
    Ok(pids)
}

#[rustler::nif]
fn bound_transports<'a>(env: Env<'a>, of: Term<'a>, server: Term<'a>) -> NifResult<Term<'a>> {
    bound_on(env, of, server, Scheduler::Normal)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn bound_transports_dirty<'a>(env: Env<'a>, of: Term<'a>, server: Term<'a>) -> NifResult<Term<'a>> {
    bound_on(env, of, server, Scheduler::Dirty)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn bindings<'a>(env: Env<'a>, of: Term<'a>) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let mut list = Term::list_new_empty(env);
    let mut failed = None;
    registry.for_each_binding(|transport, server| {
        let pair = id::decode(env, transport.kind(), transport.bytes())
            .and_then(|transport| Ok((transport, id::decode(env, server.kind(), server.bytes())?)));
        match pair {
            Ok(pair) => list = list.list_prepend(pair),
            Err(error) => failed = Some(error),
        }
    });
    failed.map_or(Ok(list), Err)
}

// ---- Listing and counting ----

/// A list of `{Id, {Pid, Config}}` in the making.
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

    /// Breaks with what is to be returned instead of the list.
    fn add(&mut self, id: Id<'_>, entry: &Entry<Lease>) -> ControlFlow<NifResult<Term<'a>>> {
        if !is_alive(self.env, entry) {
            return ControlFlow::Continue(());
        }
        let config = &entry.lease.config;
        self.weight = self
            .weight
            .saturating_add(config.weight())
            .saturating_add(id::weight(id.kind(), id.bytes()));
        if self.scheduler == Scheduler::Normal && self.weight > MAX_WEIGHT_ON_NORMAL_SCHEDULER {
            return ControlFlow::Break(Ok(atoms::dirty().encode(self.env)));
        }
        let id = match id::decode(self.env, id.kind(), id.bytes()) {
            Ok(id) => id,
            Err(error) => return ControlFlow::Break(Err(error)),
        };
        match config.load(self.env, self.scheduler) {
            Ok(config) => {
                let listed = (id, (pid_term(self.env, entry), config));
                self.list = self.list.list_prepend(listed);
                ControlFlow::Continue(())
            }
            Err(TooHeavy) => ControlFlow::Break(Ok(atoms::dirty().encode(self.env))),
        }
    }
}

fn list_on<'a>(
    env: Env<'a>,
    of: Term<'a>,
    ns: Term<'a>,
    scheduler: Scheduler,
) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let namespace = namespace(ns)?;
    if scheduler == Scheduler::Normal
        && (registry.count(namespace) > MAX_LISTED_ON_NORMAL_SCHEDULER
            || registry.high_water() > MAX_WALKED_ON_NORMAL_SCHEDULER)
    {
        return Ok(atoms::dirty().encode(env));
    }
    let mut listing = Listing::new(env, scheduler);
    match registry.try_for_each(namespace, |id, entry| listing.add(id, entry)) {
        ControlFlow::Continue(()) => Ok(listing.list),
        ControlFlow::Break(instead) => instead,
    }
}

#[rustler::nif]
fn list<'a>(env: Env<'a>, of: Term<'a>, ns: Term<'a>) -> NifResult<Term<'a>> {
    list_on(env, of, ns, Scheduler::Normal)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn list_dirty<'a>(env: Env<'a>, of: Term<'a>, ns: Term<'a>) -> NifResult<Term<'a>> {
    list_on(env, of, ns, Scheduler::Dirty)
}

/// The ids alone, since the configs beside them may be large.
#[rustler::nif(schedule = "DirtyCpu")]
fn list_ids<'a>(env: Env<'a>, of: Term<'a>, ns: Term<'a>) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let mut list = Term::list_new_empty(env);
    let listed = registry.try_for_each(namespace(ns)?, |id, _entry| {
        match id::decode(env, id.kind(), id.bytes()) {
            Ok(id) => {
                list = list.list_prepend(id);
                ControlFlow::Continue(())
            }
            Err(error) => ControlFlow::Break(error),
        }
    });
    match listed {
        ControlFlow::Continue(()) => Ok(list),
        ControlFlow::Break(error) => Err(error),
    }
}

fn list_shard_on<'a>(
    env: Env<'a>,
    of: Term<'a>,
    shard: Term<'a>,
    scheduler: Scheduler,
) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let shard = shard_number(registry, shard)?;
    if scheduler == Scheduler::Normal
        && u64::from(registry.shard_high_water(shard)) > MAX_LISTED_ON_NORMAL_SCHEDULER
    {
        return Ok(atoms::dirty().encode(env));
    }
    let mut listing = Listing::new(env, scheduler);
    match registry.try_for_each_connection_of(shard, |id, entry| listing.add(id, entry)) {
        ControlFlow::Continue(()) => Ok(listing.list),
        ControlFlow::Break(instead) => instead,
    }
}

#[rustler::nif]
fn list_shard<'a>(env: Env<'a>, of: Term<'a>, shard: Term<'a>) -> NifResult<Term<'a>> {
    list_shard_on(env, of, shard, Scheduler::Normal)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn list_shard_dirty<'a>(env: Env<'a>, of: Term<'a>, shard: Term<'a>) -> NifResult<Term<'a>> {
    list_shard_on(env, of, shard, Scheduler::Dirty)
}

#[rustler::nif]
fn count(of: Term<'_>, ns: Term<'_>) -> NifResult<u64> {
    Ok(registry(of)?.count(namespace(ns)?))
}

/// How many entries a walk through a shard finds, and the processes of this node among them that
/// have ended. Dirty, since the walk is as long as the shard is large.
#[rustler::nif(schedule = "DirtyCpu")]
fn check_shard<'a>(env: Env<'a>, of: Term<'a>, shard: Term<'a>) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let mut found = 0_u64;
    let mut ended = Term::list_new_empty(env);
    registry.for_each_address_of(shard_number(registry, shard)?, |address| {
        found += 1;
        if address == REMOTE {
            return;
        }
        // SAFETY: the address is not that of a remote process.
        let pid = unsafe { immediate::term(env, address) };
        if !pid
            .decode::<LocalPid>()
            .is_ok_and(|pid| env.is_process_alive(pid))
        {
            ended = ended.list_prepend(pid);
        }
    });
    Ok((found, ended).encode(env))
}

#[rustler::nif]
fn count_shard(of: Term<'_>, shard: Term<'_>) -> NifResult<(u64, u64, u64)> {
    let registry = registry(of)?;
    let shard = shard_number(registry, shard)?;
    Ok((
        registry.count_of(Namespace::Server, shard),
        registry.count_of(Namespace::Transport, shard),
        registry.count_of(Namespace::Connection, shard),
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
