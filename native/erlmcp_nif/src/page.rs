//! Reads a namespace of a registry page by page, for its owner, which copies or empties it while it keeps
//! serving.

use std::ops::ControlFlow;

use erlmcp_core::registry::{Entry, Id, Namespace};
use rustler::{Encoder, Env, NifResult, Term};

use crate::atoms;
use crate::id;
use crate::registry::{is_alive, live_binding, namespace, pid_term, shard_number};
use crate::reschedule::Scheduler;
use crate::resource::{Registry, registry};
use crate::watch::Lease;

/// The entries of a namespace at `count` places of a shard, from place `from` on, as `{Id, Pid, Config,
/// Binding}`, and the next place, or `none` at the end. Runs on a dirty scheduler, since configs may be
/// large.
#[rustler::nif(schedule = "DirtyCpu")]
fn page<'a>(
    env: Env<'a>,
    of: Term<'a>,
    ns: Term<'a>,
    shard: Term<'a>,
    from: u32,
    count: u32,
) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    let namespace = namespace(ns)?;
    let shard = shard_number(registry, shard)?;
    let end = registry.shard_high_water(namespace, shard);
    let next = from.saturating_add(count).min(end);
    let mut rows = Term::list_new_empty(env);
    let walked = registry.try_for_each_at(namespace, shard, from..next, |id, entry| {
        if !is_alive(env, entry) {
            return ControlFlow::Continue(());
        }
        match row(env, registry, namespace, &id, entry) {
            Ok(row) => {
                if let Some(row) = row {
                    rows = rows.list_prepend(row);
                }
                ControlFlow::Continue(())
            }
            Err(error) => ControlFlow::Break(error),
        }
    });
    if let ControlFlow::Break(error) = walked {
        return Err(error);
    }
    let next = if next < end {
        next.encode(env)
    } else {
        atoms::none().encode(env)
    };
    Ok((rows, next).encode(env))
}

/// The row of an entry; `None` if the entry has been removed.
fn row<'a>(
    env: Env<'a>,
    registry: &Registry,
    namespace: Namespace,
    id: &Id<'_>,
    entry: &Entry<Lease>,
) -> NifResult<Option<Term<'a>>> {
    // Never too heavy: this is a dirty scheduler.
    let config = entry
        .lease
        .config
        .load(env, Scheduler::Dirty)
        .map_err(|_| rustler::Error::BadArg)?;
    let Some(config) = config else {
        // The entry was removed or its config replaced since it was found.
        return match registry.entry(namespace, id) {
            Some(entry) => row(env, registry, namespace, id, &entry),
            None => Ok(None),
        };
    };
    let binding = match namespace {
        Namespace::Transport => live_binding(env, registry, id)?,
        _ => None,
    };
    let binding = match binding {
        Some(server) => (atoms::bound(), server).encode(env),
        None => atoms::unbound().encode(env),
    };
    let id = id::decode(env, id.kind(), id.bytes())?;
    Ok(Some(
        (id, pid_term(env, entry), config, binding).encode(env),
    ))
}
