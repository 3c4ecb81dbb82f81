//! Admission control of the default registry's shards, and what their samplers need.

use erlmcp_core::admission::Admission;
use erlmcp_core::clock::Clock;
use rustler::{Atom, Encoder, Env, Error, NifResult, Term};

use crate::atoms;
use crate::backpressure::clock;
use crate::immediate;
use crate::lookup::REMOTE;
use crate::registry::{MAX_WALKED_ON_NORMAL_SCHEDULER, shard_number};
use crate::resource::default_registry;

fn admission(shard: Term<'_>) -> NifResult<&'static Admission> {
    let registry = default_registry();
    Ok(registry.admission(shard_number(registry, shard)?))
}

fn threshold(term: Term<'_>) -> NifResult<Option<u64>> {
    if atoms::infinity() == term {
        return Ok(None);
    }
    match term.decode::<u64>()? {
        0 => Err(Error::BadArg),
        threshold if threshold > MAX_THRESHOLD => Err(Error::BadArg),
        threshold => Ok(Some(threshold)),
    }
}

const MAX_THRESHOLD: u64 = 1 << 40;

#[rustler::nif]
fn admission_check(shard: Term<'_>) -> NifResult<bool> {
    let admission = admission(shard)?;
    Ok(admission.is_open(default_registry().sampling(), || clock().now_ms()))
}

#[rustler::nif]
fn admission_adjust(shard: Term<'_>, delta: i64) -> NifResult<Atom> {
    admission(shard)?.adjust(delta);
    Ok(atoms::ok())
}

#[rustler::nif]
fn admission_set_threshold(shard: Term<'_>, to: Term<'_>) -> NifResult<Atom> {
    admission(shard)?.set_threshold(threshold(to)?);
    Ok(atoms::ok())
}

#[rustler::nif]
fn set_sample_interval(interval_ms: u64) -> NifResult<Atom> {
    if !(1..=MAX_INTERVAL_MS).contains(&interval_ms) {
        return Err(Error::BadArg);
    }
    default_registry().sampling().set_interval_ms(interval_ms);
    Ok(atoms::ok())
}

const MAX_INTERVAL_MS: u64 = 86_400_000;

/// Depth, threshold, messages admitted so far, whether it is overloaded, age of the last sample.
#[rustler::nif]
fn admission_stats<'a>(env: Env<'a>, shard: Term<'a>) -> NifResult<Term<'a>> {
    let admission = admission(shard)?;
    let infinity = atoms::infinity().encode(env);
    let threshold = admission.threshold().map_or(infinity, |n| n.encode(env));
    let age = admission
        .sample_age_ms(clock().now_ms())
        .map_or(infinity, |n| n.encode(env));
    Ok((
        admission.depth(),
        threshold,
        admission.admitted(),
        admission.is_overloaded(),
        age,
    )
        .encode(env))
}

/// Whether messages have been admitted since a last sample that is too old to count.
#[rustler::nif]
fn admission_is_unwatched(shard: Term<'_>) -> NifResult<bool> {
    let admission = admission(shard)?;
    Ok(admission.is_unwatched(default_registry().sampling(), clock().now_ms()))
}

/// Messages refused so far: not found, circuit open, shard overloaded, rate limited.
#[rustler::nif]
fn refused(shard: Term<'_>) -> NifResult<(u64, u64, u64, u64)> {
    let registry = default_registry();
    let refused = registry.refused(shard_number(registry, shard)?);
    Ok((
        refused.not_found,
        refused.circuit_open,
        refused.shard_overloaded,
        refused.rate_limited,
    ))
}

/// Counts a message to nobody that was not looked up.
#[rustler::nif]
fn count_not_found() -> Atom {
    let _ = default_registry().refuse_unknown();
    atoms::ok()
}

/// Begins a sample.
#[rustler::nif]
fn sample_begin(shard: Term<'_>) -> NifResult<u64> {
    Ok(admission(shard)?.begin_sample())
}

/// Ends it. Returns whether the next sample is due at once.
#[rustler::nif]
fn sample_end(shard: Term<'_>, began: u64, queued: u64, is_last: bool) -> NifResult<bool> {
    let admission = admission(shard)?;
    if began > admission.begin_sample() {
        return Err(Error::BadArg);
    }
    Ok(admission
        .sampled(began, queued, is_last, clock().now_ms())
        .is_used_up)
}

/// Takes no sample this time.
#[rustler::nif]
fn sample_skip(shard: Term<'_>) -> NifResult<Atom> {
    admission(shard)?.skip_sample(clock().now_ms());
    Ok(atoms::ok())
}

/// The processes of this node behind a shard's entries, one for each entry.
fn receivers_of<'a>(env: Env<'a>, shard: u16) -> Term<'a> {
    let mut pids = Term::list_new_empty(env);
    default_registry().for_each_address_of(shard, |address| {
        if address != REMOTE {
            // SAFETY: the address of an entry that is not for a remote process is a local pid.
            pids = pids.list_prepend(unsafe { immediate::term(env, address) });
        }
    });
    pids
}

#[rustler::nif]
fn shard_receivers<'a>(env: Env<'a>, shard: Term<'a>) -> NifResult<Term<'a>> {
    let registry = default_registry();
    let shard = shard_number(registry, shard)?;
    // Each place is looked for in up to three maps.
    if u64::from(registry.shard_high_water(shard)) > MAX_WALKED_ON_NORMAL_SCHEDULER / 10 {
        return Ok(atoms::dirty().encode(env));
    }
    Ok(receivers_of(env, shard))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn shard_receivers_dirty<'a>(env: Env<'a>, shard: Term<'a>) -> NifResult<Term<'a>> {
    let shard = shard_number(default_registry(), shard)?;
    Ok(receivers_of(env, shard))
}
