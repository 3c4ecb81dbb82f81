//! Guarded look-ups in the default registry: the process that a message may be sent to, or the reason why
//! it may not be sent.
//!
//! A result is a pid, `undefined`, or the atom of the layer that refused. If there are events to report, it
//! is `{Result, Events}`. For a connection with a message store it is `stored`: the message must be routed by
//! `route_by_lease`.

use std::panic::catch_unwind;

use erlmcp_core::circuit_breaker::State;
use erlmcp_core::clock::Clock;
use erlmcp_core::registry::{Charged, Delivery, Entry, Events, Forecast, Id, Namespace, Refusal};
use rustler::codegen_runtime::{c_int, inventory};
use rustler::sys::{ErlNifEnv, ErlNifTerm, enif_make_badarg};
use rustler::{Encoder, Env, Error, NifResult, Term};

use crate::atoms;
use crate::backpressure::{circuit, clock};
use crate::delivery;
use crate::id;
use crate::immediate;
use crate::registry::lookup::REMOTE;
use crate::registry::{
    MAX_LISTED_ON_NORMAL_SCHEDULER, is_alive, live_entry, namespace, pick_of, pid_term, searched,
};
use crate::reschedule::{Outcome, Scheduler, reschedulable};
use crate::resource::{Registry, default_registry};
use crate::watch::Lease;

pub(crate) fn refusal_term(env: Env<'_>, refusal: Refusal) -> Term<'_> {
    match refusal {
        Refusal::NotFound => atoms::undefined(),
        Refusal::CircuitOpen => atoms::circuit_open(),
        Refusal::ShardOverloaded => atoms::shard_overloaded(),
        Refusal::RateLimited => atoms::rate_limited(),
        Refusal::StoreFull => atoms::store_full(),
    }
    .encode(env)
}

pub(crate) fn state_term(env: Env<'_>, state: State) -> Term<'_> {
    match state {
        State::Closed => atoms::closed(),
        State::Open => atoms::open(),
        State::HalfOpen => atoms::half_open(),
        State::Off => atoms::off(),
    }
    .encode(env)
}

#[cold]
pub(crate) fn with_events<'a>(env: Env<'a>, result: Term<'a>, events: &Events) -> Term<'a> {
    let events = prepend_events(env, events, Term::list_new_empty(env));
    (result, events).encode(env)
}

fn prepend_events<'a>(env: Env<'a>, events: &Events, mut list: Term<'a>) -> Term<'a> {
    if let Some(shard) = events.sample {
        list = list.list_prepend((atoms::sample(), shard).encode(env));
    }
    if let Some(shard) = events.overloaded {
        list = list.list_prepend((atoms::overloaded(), shard).encode(env));
    }
    if let Some(state) = events.circuit {
        list = list.list_prepend((atoms::circuit(), state_term(env, state)).encode(env));
    }
    if events.has_half_opened {
        list = list.list_prepend((atoms::circuit(), atoms::half_open()).encode(env));
    }
    list
}

/// The process of an entry that was found with this address, or `undefined` if it was for a remote process and is gone.
#[inline(always)]
pub(crate) fn address_term<'a>(
    env: Env<'a>,
    registry: &Registry,
    namespace: Namespace,
    id: &Id<'_>,
    address: u64,
) -> Term<'a> {
    match address {
        REMOTE => registry
            .entry(namespace, id)
            .map_or_else(|| atoms::undefined().encode(env), |e| pid_term(env, &e)),
        // SAFETY: the address of an entry that is not for a remote process is a local pid.
        _ => unsafe { immediate::term(env, address) },
    }
}

/// Routes one message to `id`; the result is a raw term. `payer` is the transport whose bucket is charged.
/// `None` if the id is too long.
#[inline(always)]
fn route<'a, const NAMESPACE: usize>(
    env: Env<'a>,
    registry: &Registry,
    id: Term<'a>,
    payer: Option<Term<'a>>,
    clock: &impl Clock,
) -> Option<ErlNifTerm> {
    let namespace = Namespace::ALL[NAMESPACE];
    // Without limits the payer does not matter. An id that is too long to be registered has no bucket.
    let mut encoded = None;
    let payer = payer
        .filter(|_| registry.has_token_buckets())
        .and_then(|payer| {
            id::kind_and_bytes(payer, registry.limits().max_id_bytes(), &mut encoded)
        });
    let charged = match payer {
        Some((kind, bytes)) => Charged::Transport(registry.id(kind, bytes)),
        None if namespace == Namespace::Connection => Charged::Target,
        None => Charged::Nobody,
    };
    id::with(registry, id, |id| {
        let mut events = Events::default();
        let routed = registry.route(namespace, id, charged, circuit(), clock, &mut events);
        let result = match routed {
            Ok((_, Delivery::ByLease)) => atoms::stored().encode(env),
            Ok((address, _)) => address_term(env, registry, namespace, id, address),
            Err(refusal) => refusal_term(env, refusal),
        };
        if events.is_some() {
            return with_events(env, result, &events).as_c_arg();
        }
        result.as_c_arg()
    })
}

/// Nobody knows when a consumer drains its store. A sender that asks a hundred times a second costs little.
const FULL_STORE_MS: u64 = 10;

/// What would become of a message to `id`, and the milliseconds until it would be admitted. `payer` is a list with the
/// transport whose bucket is charged, or empty.
#[rustler::nif]
fn forecast<'a>(env: Env<'a>, ns: Term<'a>, id: Term<'a>, payer: Term<'a>) -> NifResult<Term<'a>> {
    let registry = default_registry();
    let target = namespace(ns)?;
    let mut encoded = None;
    let charged = if payer.is_empty_list() {
        match target {
            Namespace::Connection => Charged::Target,
            Namespace::Server | Namespace::Transport | Namespace::Member => Charged::Nobody,
        }
    } else {
        let (payer, _) = payer.list_get_cell()?;
        // An id that is too long to be registered has no bucket.
        id::kind_and_bytes(payer, registry.limits().max_id_bytes(), &mut encoded)
            .map_or(Charged::Nobody, |(kind, bytes)| {
                Charged::Transport(registry.id(kind, bytes))
            })
    };
    id::with(registry, id, |id| {
        let mut forecast = registry.forecast(target, id, charged, circuit(), clock());
        if target == Namespace::Connection
            && forecast.refusal.is_none()
            && delivery::has_full_store(registry, id)
        {
            forecast = Forecast {
                refusal: Some(Refusal::StoreFull),
                wait_ms: FULL_STORE_MS,
            };
        }
        let outcome = forecast.refusal.map_or(atoms::ok().encode(env), |refusal| {
            refusal_term(env, refusal)
        });
        (outcome, forecast.wait_ms).encode(env)
    })
    .ok_or(Error::BadArg)
}

// ---- One message: registered by hand, see `crate::registry::lookup` ----

/// The first argument is the target's id. The second one, if `ARITY` is 2, is the transport whose bucket is
/// charged.
///
/// # Safety
///
/// Called by the VM, with its environment and as many terms of it as the function has arguments.
unsafe extern "C" fn route_raw<
    const NAMESPACE: usize,
    const ARITY: usize,
    const IS_EXCLUSIVE: bool,
>(
    env: *mut ErlNifEnv,
    _argc: c_int,
    argv: *const ErlNifTerm,
) -> ErlNifTerm {
    let lifetime = ();
    // SAFETY: the VM's environment, valid for this call.
    let caller = unsafe { Env::new(&lifetime, env) };
    // SAFETY: the function has at least one argument.
    let id = unsafe { Term::new(caller, *argv) };
    // SAFETY: read only if the function has a second argument.
    let payer = (ARITY == 2).then(|| unsafe { Term::new(caller, *argv.add(1)) });
    let namespace = Namespace::ALL[NAMESPACE];
    let routed = catch_unwind(|| {
        let registry = default_registry();
        if IS_EXCLUSIVE || namespace == Namespace::Connection {
            return route::<NAMESPACE>(caller, registry, id, payer, clock());
        }
        let diverted = || atoms::diverted().encode(caller).as_c_arg();
        let sign = registry.diversion().sign();
        if sign.diverts_routes() {
            return Some(diverted());
        }
        let result = route::<NAMESPACE>(caller, registry, id, payer, clock())?;
        // A target that was found was registered when the sign was loaded or later. One that was not
        // found may have been moved from this registry to another store since.
        if result == atoms::undefined().as_c_arg() && !registry.diversion().is_still(sign) {
            return Some(diverted());
        }
        Some(result)
    });
    match routed {
        Ok(Some(result)) => result,
        // SAFETY: the VM's environment. A panic becomes a badarg too.
        _ => unsafe { enif_make_badarg(env) },
    }
}

macro_rules! route {
    ($name:literal, $namespace:expr, $arity:literal, $is_exclusive:literal) => {
        inventory::submit!(rustler::Nif {
            name: $name.as_ptr(),
            arity: $arity,
            flags: rustler::SchedulerFlags::Normal as u32,
            raw_func: route_raw::<{ $namespace as usize }, $arity, $is_exclusive>,
        });
    };
}

route!(c"route_connection", Namespace::Connection, 1, false);
route!(c"route_server", Namespace::Server, 2, false);
route!(c"route_transport", Namespace::Transport, 1, false);
// These route whether routes are diverted or not.
route!(c"route_server_exclusive", Namespace::Server, 2, true);
route!(c"route_transport_exclusive", Namespace::Transport, 1, true);

// ---- One message to many ----

/// Three results: the processes of the transports bound to a server to which the message may be sent; the
/// reason of refusal for one of the others, or `none`; and events. With `IS_EXCLUSIVE` it routes whether routes are
/// diverted or not.
fn route_bound<'a, const IS_EXCLUSIVE: bool>(
    env: Env<'a>,
    [server]: [Term<'a>; 1],
    scheduler: Scheduler,
) -> Outcome<'a> {
    let registry = default_registry();
    let sign = registry.diversion().sign();
    if sign.diverts_routes() && !IS_EXCLUSIVE {
        return Ok(atoms::diverted().encode(env));
    }
    id::with(registry, server, |server| {
        if u64::from(registry.bound_high_water(server)) > MAX_LISTED_ON_NORMAL_SCHEDULER {
            scheduler.require_dirty()?;
        }
        // The monitor of a server that has exited may not have fired yet.
        live_entry(env, registry, Namespace::Server, server);
        let mut all = RoutedAll::new(env);
        registry.route_bound(server, circuit(), clock(), |routed, events| {
            all.add(routed, &events);
        });
        // Nothing has been sent yet, and some of the transports may have been moved to another store.
        if !IS_EXCLUSIVE && !registry.diversion().is_still(sign) {
            return Ok(atoms::diverted().encode(env));
        }
        Ok(all.into_term())
    })
    .ok_or(Error::BadArg)?
}

/// The result of a message to many, under construction.
struct RoutedAll<'a> {
    env: Env<'a>,
    pids: Term<'a>,
    refused: Option<Refusal>,
    events: Term<'a>,
}

impl<'a> RoutedAll<'a> {
    fn new(env: Env<'a>) -> Self {
        Self {
            env,
            pids: Term::list_new_empty(env),
            refused: None,
            events: Term::list_new_empty(env),
        }
    }

    fn add(&mut self, routed: Result<&Entry<Lease>, Refusal>, events: &Events) {
        match routed {
            Ok(entry) => self.pids = self.pids.list_prepend(pid_term(self.env, entry)),
            Err(refusal) => self.refused = Some(refusal),
        }
        if events.is_some() {
            self.events = prepend_events(self.env, events, self.events);
        }
    }

    fn into_term(self) -> Term<'a> {
        let refused = self
            .refused
            .map_or(atoms::none().encode(self.env), |refusal| {
                refusal_term(self.env, refusal)
            });
        (self.pids, refused, self.events).encode(self.env)
    }
}

reschedulable!(c"route_bound", 1, route_bound::<false>);
reschedulable!(c"route_bound_exclusive", 1, route_bound::<true>);

/// As [`route_bound`], to the members of a group.
fn route_group<'a>(env: Env<'a>, [group]: [Term<'a>; 1], scheduler: Scheduler) -> Outcome<'a> {
    let registry = default_registry();
    id::with(registry, group, |group| {
        if u64::from(registry.group_high_water(group)) > MAX_LISTED_ON_NORMAL_SCHEDULER {
            scheduler.require_dirty()?;
        }
        let mut all = RoutedAll::new(env);
        registry.route_group(group, circuit(), clock(), |routed, events| {
            all.add(routed, &events);
        });
        Ok(all.into_term())
    })
    .ok_or(Error::BadArg)?
}

reschedulable!(c"route_group", 1, route_group);

/// The process of one member of a group, if a message may be sent to it.
fn route_member<'a>(
    env: Env<'a>,
    [group, pick]: [Term<'a>; 2],
    scheduler: Scheduler,
) -> Outcome<'a> {
    let registry = default_registry();
    let pick = pick_of(registry, pick)?;
    id::with(registry, group, |group| {
        let is_alive = |entry: &Entry<Lease>| is_alive(env, entry);
        searched(scheduler, pick, |search| {
            registry.route_member(
                group,
                search,
                circuit(),
                clock(),
                is_alive,
                |routed, events| {
                    let result = match routed {
                        Ok(entry) => pid_term(env, entry),
                        Err(refusal) => refusal_term(env, refusal),
                    };
                    if events.is_some() {
                        with_events(env, result, &events)
                    } else {
                        result
                    }
                },
            )
        })
    })
    .ok_or(Error::BadArg)?
}

reschedulable!(c"route_member", 2, route_member);
