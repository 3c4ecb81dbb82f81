//! Circuit breakers of single targets of routes in the default registry.

use erlmcp_core::circuit_breaker::CircuitBreaker;
use erlmcp_core::registry::{Namespace, TargetBreakerError, TargetBreakers};
use rustler::{Encoder, Env, Error, NifResult, Term};

use crate::atoms;
use crate::backpressure::clock;
use crate::circuit_breaker::{config_of, stats_term};
use crate::id;
use crate::registry::{as_id, encode_id, namespace};
use crate::reschedule::{Outcome, Scheduler, reschedulable};
use crate::resource::default_registry;
use crate::routing::state_term;

fn breakers() -> &'static TargetBreakers {
    default_registry().target_breakers()
}

/// The result of `f` with the breaker of a target, or `none`.
fn with_breaker<'a>(
    env: Env<'a>,
    ns: Term<'a>,
    id: Term<'a>,
    f: impl FnOnce(&CircuitBreaker) -> NifResult<Term<'a>>,
) -> NifResult<Term<'a>> {
    let registry = default_registry();
    let namespace = namespace(ns)?;
    id::with(registry, id, |id| breakers().with(namespace, id, f))
        .ok_or(Error::BadArg)?
        .unwrap_or_else(|| Ok(atoms::none().encode(env)))
}

/// Makes the breaker of a target, or changes its config: `ok` or `too_many_breakers`. The config is that of
/// `breaker_configure`, but not `off`.
fn set<'a>(env: Env<'a>, [ns, id, config]: [Term<'a>; 3], scheduler: Scheduler) -> Outcome<'a> {
    let namespace = namespace(ns)?;
    let config = config_of(config)?;
    let registry = default_registry();
    let encoded = encode_id(registry, id)?;
    let id = as_id(registry, &encoded);
    if breakers().is_churned(&id) {
        scheduler.require_dirty()?;
        breakers().complete_resize();
    }
    let result = match breakers().set(namespace, &id, config, clock()) {
        Ok(()) => atoms::ok(),
        Err(TargetBreakerError::TooMany) => atoms::too_many_breakers(),
        Err(TargetBreakerError::Config(_)) => return Err(Error::BadArg.into()),
    };
    Ok(result.encode(env))
}

reschedulable!(c"target_breaker_set", 3, set);

/// Whether the target had a breaker.
#[rustler::nif]
fn target_breaker_remove<'a>(ns: Term<'a>, id: Term<'a>) -> NifResult<bool> {
    let namespace = namespace(ns)?;
    id::with(default_registry(), id, |id| {
        breakers().remove(namespace, id)
    })
    .ok_or(Error::BadArg)
}

/// Records the outcome of a message, `success` or `failure`, or sets the state, `open` or `closed`. Returns the state that
/// the breaker has changed to, or `ok`.
#[rustler::nif]
fn target_breaker_change<'a>(
    env: Env<'a>,
    ns: Term<'a>,
    id: Term<'a>,
    change: Term<'a>,
) -> NifResult<Term<'a>> {
    with_breaker(env, ns, id, |breaker| {
        let changed = if atoms::success() == change {
            breaker.record_success(clock()).then(atoms::closed)
        } else if atoms::failure() == change {
            breaker.record_failure(clock()).then(atoms::open)
        } else if atoms::open() == change {
            breaker.force(true, clock()).then(atoms::open)
        } else if atoms::closed() == change {
            breaker.force(false, clock()).then(atoms::closed)
        } else {
            return Err(Error::BadArg);
        };
        Ok(changed.unwrap_or_else(atoms::ok).encode(env))
    })
}

/// The map of `breaker_stats`.
#[rustler::nif]
fn target_breaker_stats<'a>(env: Env<'a>, ns: Term<'a>, id: Term<'a>) -> NifResult<Term<'a>> {
    with_breaker(env, ns, id, |breaker| stats_term(env, breaker))
}

/// The targets that have a breaker, with its state: `[{Namespace, Id, State}]`.
#[rustler::nif(schedule = "DirtyCpu")]
fn target_breakers<'a>(env: Env<'a>) -> NifResult<Vec<Term<'a>>> {
    let mut all = Vec::new();
    let mut failed = None;
    breakers().for_each(clock(), |namespace, kind, bytes, state| {
        let namespace = match namespace {
            Namespace::Server => atoms::server(),
            Namespace::Transport => atoms::transport(),
            Namespace::Connection => atoms::connection(),
            Namespace::Member => atoms::member(),
        };
        match id::decode(env, kind, bytes) {
            Ok(id) => all.push((namespace, id, state_term(env, state)).encode(env)),
            Err(error) => failed = Some(error),
        }
    });
    failed.map_or(Ok(all), Err)
}
