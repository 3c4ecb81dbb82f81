//! Binding transports to servers.

use erlmcp_core::error::BindError;
use erlmcp_core::registry::{Id, Namespace};
use rustler::{Atom, Encoder, Env, NifResult, Term};

use super::{
    MAX_LISTED_ON_NORMAL_SCHEDULER, as_id, encode_id, is_alive, live_entry, not_found, pid_term,
};
use crate::atoms;
use crate::id;
use crate::reschedule::{Outcome, Scheduler, reschedulable};
use crate::resource::{Registry, diverts_changes, passage, registry, unless_diverted};

#[rustler::nif]
fn bind<'a>(
    env: Env<'a>,
    of: Term<'a>,
    transport: Term<'a>,
    server: Term<'a>,
    server_must_exist: bool,
) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    if diverts_changes(of, Namespace::Transport) {
        return Ok(atoms::diverted().encode(env));
    }
    let transport = encode_id(registry, transport)?;
    let transport = as_id(registry, &transport);
    let server = encode_id(registry, server)?;
    let server = as_id(registry, &server);
    let Ok(_passage) = passage(of, registry, Namespace::Transport, &transport) else {
        return Ok(atoms::diverted().encode(env));
    };
    // A process that has exited must not be bound, nor bound to, even if its monitor has not fired yet.
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
    if diverts_changes(of, Namespace::Transport) {
        return Ok(atoms::diverted());
    }
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
    unless_diverted(env, of, Namespace::Transport, || {
        let transport = encode_id(registry, transport)?;
        let transport = as_id(registry, &transport);
        if live_entry(env, registry, Namespace::Transport, &transport).is_none() {
            return Ok(not_found(env));
        }
        Ok(match live_binding(env, registry, &transport)? {
            Some(server) => (atoms::ok(), server).encode(env),
            None => not_found(env),
        })
    })
}

/// The id of the server that a transport is bound to, unless that server has exited.
pub(crate) fn live_binding<'a>(
    env: Env<'a>,
    registry: &Registry,
    transport: &Id<'_>,
) -> NifResult<Option<Term<'a>>> {
    let mut was_without_server = false;
    loop {
        let Some(server) = registry.bound_server(transport, |server| {
            match registry.entry(Namespace::Server, &server) {
                Some(entry) if !is_alive(env, &entry) => {
                    live_entry(env, registry, Namespace::Server, &server);
                    None
                }
                // The server is not registered (yet), or it was removed just now together with the
                // binding: then the second look-up does not find the binding.
                None if !was_without_server => {
                    was_without_server = true;
                    None
                }
                _ => Some(id::decode(env, server.kind(), server.bytes())),
            }
        }) else {
            return Ok(None);
        };
        if let Some(server) = server {
            return server.map(Some);
        }
    }
}

fn bound_transports<'a>(
    env: Env<'a>,
    [of, server]: [Term<'a>; 2],
    scheduler: Scheduler,
) -> Outcome<'a> {
    let registry = registry(of)?;
    let server = encode_id(registry, server)?;
    let server = as_id(registry, &server);
    live_entry(env, registry, Namespace::Server, &server);
    if u64::from(registry.bound_high_water(&server)) > MAX_LISTED_ON_NORMAL_SCHEDULER {
        scheduler.require_dirty()?;
    }
    let mut pids = Term::list_new_empty(env);
    registry.for_each_bound(&server, |entry| {
        if is_alive(env, entry) {
            pids = pids.list_prepend(pid_term(env, entry));
        }
    });
    Ok(pids)
}

reschedulable!(c"bound_transports", 2, bound_transports);

#[rustler::nif(schedule = "DirtyCpu")]
fn bindings<'a>(env: Env<'a>, of: Term<'a>) -> NifResult<Term<'a>> {
    let registry = registry(of)?;
    unless_diverted(env, of, Namespace::Transport, || {
        list_bindings(env, registry)
    })
}

fn list_bindings<'a>(env: Env<'a>, registry: &Registry) -> NifResult<Term<'a>> {
    let mut list = Term::list_new_empty(env);
    let mut failed = None;
    registry.for_each_binding(|transport, entry, server| {
        let server_has_exited = || {
            registry
                .entry(Namespace::Server, &server)
                .is_some_and(|entry| !is_alive(env, &entry))
        };
        if !is_alive(env, entry) || server_has_exited() {
            return;
        }
        let pair = id::decode(env, transport.kind(), transport.bytes())
            .and_then(|transport| Ok((transport, id::decode(env, server.kind(), server.bytes())?)));
        match pair {
            Ok(pair) => list = list.list_prepend(pair),
            Err(error) => failed = Some(error),
        }
    });
    failed.map_or(Ok(list), Err)
}
