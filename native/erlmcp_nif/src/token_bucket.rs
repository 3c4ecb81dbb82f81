//! Token buckets: those of the default registry's entries, and buckets as resources.
//!
//! Limits are `infinity` or `{Capacity, RatePerSecond}`; the rate is a float. In a change, an element that is
//! `undefined` keeps its value.

use erlmcp_core::registry::{BucketError, EntryLimits};
use erlmcp_core::token_bucket::{BucketState, Change, Limits, LimitsError, Refused, TokenBucket};
use rustler::{Atom, Encoder, Env, Error, NifResult, Resource, ResourceArc, Term};

use crate::atoms;
use crate::backpressure::clock;
use crate::id;
use crate::registry::namespace;
use crate::resource::default_registry;

pub(crate) struct BucketResource(TokenBucket);

impl Resource for BucketResource {}

pub(crate) fn decode_limits(term: Term<'_>) -> NifResult<Option<Limits>> {
    if atoms::infinity() == term {
        return Ok(None);
    }
    let (capacity, rate_per_second) = term.decode()?;
    Limits::new(capacity, rate_per_second)
        .map(Some)
        .map_err(|_| Error::BadArg)
}

/// `None` for no limits.
fn decode_change(term: Term<'_>) -> NifResult<Option<Change>> {
    if atoms::infinity() == term {
        return Ok(None);
    }
    let (capacity, rate_per_second): (Term<'_>, Term<'_>) = term.decode()?;
    let named = |term: Term<'_>| atoms::undefined() != term;
    let change = Change {
        capacity: named(capacity).then(|| capacity.decode()).transpose()?,
        rate_per_second: named(rate_per_second)
            .then(|| rate_per_second.decode())
            .transpose()?,
    };
    // Validates each value alone. Together they may still be invalid.
    let alone = [
        Change {
            rate_per_second: Some(1e9),
            ..change
        },
        Change {
            capacity: Some(1),
            ..change
        },
    ];
    match alone.map(|change| change.over(Limits::default())) {
        [Ok(_), Ok(_)] => Ok(Some(change)),
        _ => Err(Error::BadArg),
    }
}

pub(crate) fn limits_term(env: Env<'_>, limits: Option<Limits>) -> Term<'_> {
    limits.map_or(atoms::infinity().encode(env), |limits| {
        (limits.capacity(), limits.rate_per_second()).encode(env)
    })
}

pub(crate) fn taken_term(env: Env<'_>, taken: Result<Option<u64>, Refused>) -> Term<'_> {
    match taken {
        Ok(Some(left)) => (atoms::ok(), left).encode(env),
        Ok(None) => (atoms::ok(), atoms::infinity()).encode(env),
        Err(Refused::RateLimited { wait_ns }) => (atoms::rate_limited(), wait_ns).encode(env),
        Err(Refused::ExceedsCapacity) => atoms::exceeds_capacity().encode(env),
    }
}

pub(crate) fn change_limits<'a>(
    env: Env<'a>,
    limits: Term<'a>,
    change: impl FnOnce(Option<Change>) -> Result<(), LimitsError>,
) -> NifResult<Term<'a>> {
    changed_term(env, change(decode_change(limits)?))
}

fn changed_term(env: Env<'_>, changed: Result<(), LimitsError>) -> NifResult<Term<'_>> {
    match changed {
        Ok(()) => Ok(atoms::ok().encode(env)),
        Err(LimitsError::TooSlowToFill) => Ok(atoms::too_slow_to_fill().encode(env)),
        Err(_) => Err(Error::BadArg),
    }
}

pub(crate) fn state_term<'a>(env: Env<'a>, state: &BucketState) -> Term<'a> {
    let tokens = state
        .tokens
        .map_or(atoms::infinity().encode(env), |n| n.encode(env));
    (tokens, limits_term(env, state.limits)).encode(env)
}

// ---- Buckets as resources ----

#[rustler::nif]
fn bucket_new(limits: Term<'_>) -> NifResult<ResourceArc<BucketResource>> {
    let bucket = TokenBucket::new(decode_limits(limits)?, clock());
    Ok(ResourceArc::new(BucketResource(bucket)))
}

pub(crate) fn bucket<'a>(term: Term<'a>) -> NifResult<&'a TokenBucket> {
    term.try_get_resource::<BucketResource>()
        .map(|resource| &resource.0)
        .ok_or(Error::BadArg)
}

#[rustler::nif]
fn is_bucket(term: Term<'_>) -> bool {
    term.try_get_resource::<BucketResource>().is_some()
}

#[rustler::nif]
fn bucket_take<'a>(env: Env<'a>, of: Term<'a>, tokens: u64) -> NifResult<Term<'a>> {
    Ok(taken_term(env, bucket(of)?.take(clock(), tokens)))
}

#[rustler::nif]
fn bucket_state<'a>(env: Env<'a>, of: Term<'a>) -> NifResult<Term<'a>> {
    Ok(state_term(env, &bucket(of)?.state(clock())))
}

#[rustler::nif]
fn bucket_set_limits<'a>(env: Env<'a>, of: Term<'a>, limits: Term<'a>) -> NifResult<Term<'a>> {
    let bucket = bucket(of)?;
    change_limits(env, limits, |change| match change {
        Some(change) => bucket.change_limits(change, Limits::default(), clock()),
        None => {
            bucket.set_limits(None, clock());
            Ok(())
        }
    })
}

#[rustler::nif]
fn bucket_refund(of: Term<'_>, tokens: u64) -> NifResult<Atom> {
    bucket(of)?.refund(clock(), tokens);
    Ok(atoms::ok())
}

// ---- Buckets of entries ----

#[rustler::nif]
fn entry_take<'a>(env: Env<'a>, ns: Term<'a>, id: Term<'a>, tokens: u64) -> NifResult<Term<'a>> {
    let registry = default_registry();
    let namespace = namespace(ns)?;
    id::with(registry, id, |id| {
        match registry.take_tokens(namespace, id, tokens, clock()) {
            Ok(left) => taken_term(env, Ok(left)),
            Err(BucketError::Refused(refused)) => taken_term(env, Err(refused)),
            Err(_) => atoms::not_found().encode(env),
        }
    })
    .ok_or(Error::BadArg)
}

#[rustler::nif]
fn entry_refund(ns: Term<'_>, id: Term<'_>, tokens: u64) -> NifResult<Atom> {
    let registry = default_registry();
    let namespace = namespace(ns)?;
    id::with(registry, id, |id| {
        match registry.refund_tokens(namespace, id, tokens, clock()) {
            Ok(()) => atoms::ok(),
            Err(_) => atoms::not_found(),
        }
    })
    .ok_or(Error::BadArg)
}

#[rustler::nif]
fn entry_bucket_state<'a>(env: Env<'a>, ns: Term<'a>, id: Term<'a>) -> NifResult<Term<'a>> {
    let registry = default_registry();
    let namespace = namespace(ns)?;
    id::with(registry, id, |id| {
        registry
            .bucket_state(namespace, id, clock())
            .map_or(atoms::not_found().encode(env), |state| {
                state_term(env, &state)
            })
    })
    .ok_or(Error::BadArg)
}

/// Sets the limits of one entry; `shared` stands for the limits of all entries.
#[rustler::nif]
fn entry_set_limits<'a>(
    env: Env<'a>,
    ns: Term<'a>,
    id: Term<'a>,
    limits: Term<'a>,
) -> NifResult<Term<'a>> {
    let registry = default_registry();
    let namespace = namespace(ns)?;
    let limits = if atoms::shared() == limits {
        EntryLimits::Shared
    } else {
        EntryLimits::Own(decode_change(limits)?)
    };
    id::with(registry, id, |id| {
        match registry.set_entry_limits(namespace, id, limits, clock()) {
            Ok(()) => changed_term(env, Ok(())),
            Err(BucketError::Limits(error)) => changed_term(env, Err(error)),
            Err(_) => Ok(atoms::not_found().encode(env)),
        }
    })
    .ok_or(Error::BadArg)?
}

#[rustler::nif]
fn set_shared_limits(limits: Term<'_>) -> NifResult<Atom> {
    default_registry().set_limits(decode_limits(limits)?, clock());
    Ok(atoms::ok())
}

#[rustler::nif]
fn shared_limits(env: Env<'_>) -> Term<'_> {
    limits_term(env, default_registry().shared_limits())
}

/// Sets whether routes take from buckets and check the breakers of targets.
#[rustler::nif]
fn enforce_limits(is_on: bool) -> Atom {
    default_registry().enforce_limits(is_on);
    atoms::ok()
}

#[rustler::nif]
fn enforces_limits() -> bool {
    default_registry().enforces_limits()
}

/// Whether any bucket has limits that are enforced.
#[rustler::nif]
fn has_token_buckets() -> bool {
    default_registry().has_token_buckets()
}

/// Whether these are valid limits. Sets nothing.
#[rustler::nif]
fn are_limits(limits: Term<'_>) -> bool {
    decode_limits(limits).is_ok()
}
