//! Admission control of the default registry's shards, and what their samplers need.

use erlmcp_core::admission::{Admission, Begun, Pass, Taken, Threshold};
use erlmcp_core::clock::Clock;
use erlmcp_core::registry::Namespace;
use rustler::{Atom, Encoder, Env, Error, NifResult, Term};

use crate::atoms;
use crate::backpressure::clock;
use crate::immediate;
use crate::registry::shard_number;
use crate::reschedule::{Outcome, Scheduler, reschedulable};
use crate::resource::default_registry;

fn admission(shard: Term<'_>) -> NifResult<&'static Admission> {
    let registry = default_registry();
    Ok(registry.admission(shard_number(registry, shard)?))
}

fn threshold(term: Term<'_>) -> NifResult<Threshold> {
    if atoms::infinity() == term {
        return Ok(Threshold::Off);
    }
    if atoms::auto() == term {
        return Ok(Threshold::Auto);
    }
    match term.decode::<u64>()? {
        0 => Err(Error::BadArg),
        threshold if threshold > MAX_THRESHOLD => Err(Error::BadArg),
        threshold => Ok(Threshold::Exactly(threshold)),
    }
}

const MAX_THRESHOLD: u64 = 1 << 40;

#[rustler::nif]
fn admission_check(shard: Term<'_>) -> NifResult<bool> {
    let registry = default_registry();
    Ok(registry.is_open(shard_number(registry, shard)?, clock()))
}

/// What the calling process says of its own messages.
#[rustler::nif]
fn admission_adjust(env: Env<'_>, shard: Term<'_>, delta: i64) -> NifResult<Atom> {
    let address = immediate::word(env.pid().encode(env));
    admission(shard)?.adjust(address, delta);
    Ok(atoms::ok())
}

#[rustler::nif]
fn admission_set_threshold(shard: Term<'_>, to: Term<'_>) -> NifResult<Atom> {
    let registry = default_registry();
    registry.set_threshold(shard_number(registry, shard)?, threshold(to)?);
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

fn or_infinity<'a>(env: Env<'a>, number: Option<u64>) -> Term<'a> {
    number.map_or(atoms::infinity().encode(env), |n| n.encode(env))
}

/// Depth, threshold in force, messages admitted so far, whether it is overloaded, age of the last sample.
#[rustler::nif]
fn admission_stats<'a>(env: Env<'a>, shard: Term<'a>) -> NifResult<Term<'a>> {
    let registry = default_registry();
    let number = shard_number(registry, shard)?;
    // A threshold that follows them.
    let _ = registry.receivers(number);
    let admission = registry.admission(number);
    Ok((
        admission.depth(),
        or_infinity(env, admission.threshold()),
        admission.admitted(),
        admission.is_overloaded(),
        or_infinity(env, admission.sample_age_ms(clock().now_ms())),
    )
        .encode(env))
}

/// The threshold as it was set.
#[rustler::nif]
fn admission_threshold<'a>(env: Env<'a>, shard: Term<'a>) -> NifResult<Term<'a>> {
    let admission = admission(shard)?;
    if admission.is_auto() {
        return Ok(atoms::auto().encode(env));
    }
    Ok(or_infinity(env, admission.threshold()))
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

// ---- Receivers ----

/// Counts the processes behind a shard's entries, where entries have come or gone since the last count.
fn count_receivers<'a>(env: Env<'a>, [shard]: [Term<'a>; 1], scheduler: Scheduler) -> Outcome<'a> {
    let registry = default_registry();
    let shard = shard_number(registry, shard)?;
    if registry.is_count_old(shard) {
        let places_of = |namespace| u64::from(registry.shard_high_water(namespace, shard));
        let places: u64 = Namespace::ALL.into_iter().map(places_of).sum();
        if places > MAX_COUNTED_ON_NORMAL_SCHEDULER {
            scheduler.require_dirty()?;
        }
        registry.count_receivers(shard);
    }
    Ok(atoms::ok().encode(env))
}

/// Places whose receivers are counted on a normal scheduler: some 400 microseconds.
const MAX_COUNTED_ON_NORMAL_SCHEDULER: u64 = 2_000;

reschedulable!(c"count_receivers", 1, count_receivers);

/// Whether so many entries have come and gone that they should be counted.
#[rustler::nif]
fn is_receiver_count_due(shard: Term<'_>) -> NifResult<bool> {
    let registry = default_registry();
    let shard = shard_number(registry, shard)?;
    Ok(registry.admission(shard).is_auto() && registry.is_count_due(shard))
}

// ---- Samples ----

/// Begins a pass: `asked`, or `all`. Returns the priority that it should have, or `busy` if another sampler is
/// there.
#[rustler::nif]
fn sample_begin(shard: Term<'_>, pass: Term<'_>) -> NifResult<Atom> {
    let registry = default_registry();
    let shard = shard_number(registry, shard)?;
    let pass = if atoms::asked() == pass {
        Pass::Asked
    } else if atoms::all() == pass {
        Pass::All
    } else {
        return Err(Error::BadArg);
    };
    let _ = registry.receivers(shard);
    let begun = registry.admission(shard).begin_pass(pass, clock().now_ms());
    Ok(match begun {
        Begun::Urgently => atoms::high(),
        Begun::Normally => atoms::normal(),
        Begun::Busy => atoms::busy(),
    })
}

/// The next receivers to look at; or the end of the pass, if this `is_last`.
#[rustler::nif]
fn sample_take<'a>(env: Env<'a>, shard: Term<'a>, is_last: bool) -> NifResult<Term<'a>> {
    let mut pids = Term::list_new_empty(env);
    let taken = admission(shard)?.take(is_last, |address| {
        // SAFETY: the addresses that admission control knows are those of entries for local processes, and
        // of local callers: local pids.
        pids = pids.list_prepend(unsafe { immediate::term(env, address) });
    });
    Ok(match taken {
        Taken::Batch(number) => (number, pids).encode(env),
        Taken::Done { is_due: true, .. } => atoms::due().encode(env),
        Taken::Done { is_due: false, .. } => atoms::done().encode(env),
        Taken::Busy => atoms::busy().encode(env),
    })
}

/// What was found there, in the same order: messages, or `none` of a process that has not answered. Returns
/// whether it counts.
#[rustler::nif]
fn sample_report(shard: Term<'_>, number: u64, lengths: Term<'_>) -> NifResult<bool> {
    let admission = admission(shard)?;
    if lengths.list_length()? > MAX_REPORTED {
        return Err(Error::BadArg);
    }
    let lengths: Vec<Option<u64>> = lengths
        .into_list_iterator()?
        .map(|length| {
            if atoms::none() == length {
                Ok(None)
            } else {
                length.decode().map(Some)
            }
        })
        .collect::<NifResult<_>>()?;
    let reported = admission.report(number, lengths, clock().now_ms());
    Ok(reported.is_current)
}

/// More than there are in one batch.
const MAX_REPORTED: usize = 1_024;

/// Takes no sample this time.
#[rustler::nif]
fn sample_skip(shard: Term<'_>) -> NifResult<Atom> {
    let registry = default_registry();
    let shard = shard_number(registry, shard)?;
    let _ = registry.receivers(shard);
    registry.admission(shard).skip_sample(clock().now_ms());
    Ok(atoms::ok())
}

/// Takes none until one is asked for. Returns `false` if there is something to look at.
#[rustler::nif]
fn sample_pause(shard: Term<'_>) -> NifResult<bool> {
    Ok(admission(shard)?.pause())
}

/// Looks that were reported so far, and receivers that were sent something and not seen empty since.
#[rustler::nif]
fn sample_counts(shard: Term<'_>) -> NifResult<(u64, u32)> {
    let admission = admission(shard)?;
    Ok((admission.looks(), admission.active_receivers()))
}
