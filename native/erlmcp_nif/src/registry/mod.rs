//! The functions on registries, and what they share.

mod bindings;
mod group;
mod listing;
pub(crate) mod lookup;
mod registration;

use erlmcp_core::diversion::Diverted;
use erlmcp_core::registry::{Entry, Id, Limits, Namespace};
use rustler::{Atom, Encoder, Env, Error, LocalPid, NifResult, ResourceArc, Term};

pub(crate) use bindings::live_binding;
pub(crate) use group::{pick_of, searched};

use crate::atoms;
use crate::id::{self, EncodedId};
use crate::immediate;
use crate::resource::{
    Registry, RegistryResource, default_registry, make_default_registry, registry,
};
use crate::watch::Lease;

/// Up to this many entries are listed on a normal scheduler, in about 300 microseconds.
pub(crate) const MAX_LISTED_ON_NORMAL_SCHEDULER: u64 = 500;

/// Up to this many places, most of them empty, are scanned on a normal scheduler, in some 100 microseconds.
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
pub(crate) fn encode_id<'a>(registry: &Registry, term: Term<'a>) -> NifResult<EncodedId<'a>> {
    id::encode(term, registry.limits().max_id_bytes())
}

#[inline]
pub(crate) fn as_id<'a>(registry: &Registry, encoded: &'a EncodedId<'_>) -> Id<'a> {
    registry.id(encoded.kind, encoded.bytes())
}

pub(crate) fn shard_number(registry: &Registry, term: Term<'_>) -> NifResult<u16> {
    // rustler truncates when it decodes to a narrower integer.
    let shard: u64 = term.decode()?;
    if shard < u64::from(registry.limits().shards()) {
        Ok(shard as u16)
    } else {
        Err(Error::BadArg)
    }
}

/// Equals `erlang:phash2(Id, Shards)`, since the number of shards is a power of two.
pub(crate) fn shard_of(registry: &Registry, id: Term<'_>) -> u16 {
    (id.hash_phash2() % u32::from(registry.limits().shards())) as u16
}

pub(crate) fn pid_term<'a>(env: Env<'a>, entry: &Entry<Lease>) -> Term<'a> {
    match entry.lease.config.remote() {
        Some(remote) => remote.pid(env),
        // SAFETY: an entry that is not for a remote process has a local pid for an address.
        None => unsafe { immediate::term(env, entry.address) },
    }
}

/// Whether the process of a local pid is alive; one that is exiting is not.
pub(crate) fn is_process_alive(env: Env<'_>, pid: Term<'_>) -> bool {
    pid.decode::<LocalPid>()
        .is_ok_and(|pid| env.is_process_alive(pid))
}

/// Whether the process of an entry is alive; for a process of another node, whether its sentinel is.
pub(crate) fn is_alive(env: Env<'_>, entry: &Entry<Lease>) -> bool {
    match entry.lease.config.remote() {
        Some(remote) => env.is_process_alive(remote.sentinel),
        // SAFETY: the address of an entry that is not for a remote process is a local pid.
        None => is_process_alive(env, unsafe { immediate::term(env, entry.address) }),
    }
}

/// The entry of an id, if its process is alive. An entry whose process has exited is removed, even if the
/// monitor has not fired yet: no caller that has seen the exit sees the entry.
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
        registry.remove_exact(env, namespace, id, |held| *held == entry.lease);
    }
}

/// Releases the lease of a removed entry. Returns the sentinel of a remote process, which the caller must
/// stop.
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

/// From now on diverts exactly these kinds of calls with `default`: `changes`, `lookups`, `routes`. `ok`
/// if no change is under way; otherwise `busy`.
#[rustler::nif]
fn divert(whom: Term<'_>) -> NifResult<Atom> {
    // Rejects an improper list, at whose end rustler's decoder panics.
    if whom.list_length()? > MAX_DIVERTED {
        return Err(Error::BadArg);
    }
    let whom: Vec<Atom> = whom.decode()?;
    let is_silent = default_registry().diversion().divert(Diverted {
        changes: whom.contains(&atoms::changes()),
        lookups: whom.contains(&atoms::lookups()),
        routes: whom.contains(&atoms::routes()),
    });
    Ok(if is_silent {
        atoms::ok()
    } else {
        atoms::busy()
    })
}

/// Changes, look-ups and routes.
const MAX_DIVERTED: usize = 3;
