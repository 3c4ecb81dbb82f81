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

/// The calling process reports a change in the length of its own mailbox.
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
    // Updates an automatic threshold, which follows the number of receivers.
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

/// Whether messages have been admitted since the last sample and that sample is stale.
#[rustler::nif]
fn admission_is_unwatched(shard: Term<'_>) -> NifResult<bool> {
    let admission = admission(shard)?;
    Ok(admission.is_unwatched(default_registry().sampling(), clock().now_ms()))
}

/// Messages admitted so far, with a threshold or without.
#[rustler::nif]
fn admitted(shard: Term<'_>) -> NifResult<u64> {
    let registry = default_registry();
    Ok(registry.admitted(shard_number(registry, shard)?))
}

/// Messages refused so far: not found, circuit open, shard overloaded, rate limited, store full.
#[rustler::nif]
fn refused(shard: Term<'_>) -> NifResult<(u64, u64, u64, u64, u64)> {
    let registry = default_registry();
    let refused = registry.refused(shard_number(registry, shard)?);
    Ok((
        refused.not_found,
        refused.circuit_open,
        refused.shard_overloaded,
        refused.rate_limited,
        refused.store_full,
    ))
}

/// Counts a message to an unregistered id that was not looked up.
#[rustler::nif]
fn count_not_found() -> Atom {
    let _ = default_registry().refuse_unknown();
    atoms::ok()
}

// ---- Receivers ----

/// Counts the processes behind a shard's entries, if entries were added or removed since the last count.
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

/// Up to this many places are counted on a normal scheduler, in some 400 microseconds.
const MAX_COUNTED_ON_NORMAL_SCHEDULER: u64 = 2_000;

reschedulable!(c"count_receivers", 1, count_receivers);

/// Whether the threshold is automatic and so many entries were added or removed that the receivers should be
/// counted.
#[rustler::nif]
fn is_receiver_count_due(shard: Term<'_>) -> NifResult<bool> {
    let registry = default_registry();
    let shard = shard_number(registry, shard)?;
    Ok(registry.admission(shard).is_auto() && registry.is_count_due(shard))
}

// ---- Samples ----

/// Begins a pass over the receivers that callers have requested (`asked`), or over `all`. Returns the priority
/// for the pass, or `busy` while another sampler makes one.
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

/// The next receivers to sample, or the end of the pass. With `is_last` only urgent receivers come before the
/// end.
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

/// Reports the lengths of the receivers' mailboxes, in the same order; `none` for a process that has not answered.
/// Returns whether the report counts.
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

/// More receivers than a batch has.
const MAX_REPORTED: usize = 1_024;

/// Instead of a sample: messages admitted since the last one keep counting. Returns the pass that is due nevertheless, since
/// its request was lost (`asked`), or many processes have exited (`all`); or `none`.
#[rustler::nif]
fn sample_skip(shard: Term<'_>) -> NifResult<Atom> {
    let registry = default_registry();
    let shard = shard_number(registry, shard)?;
    let receivers = registry.receivers(shard);
    let admission = registry.admission(shard);
    admission.skip_sample(clock().now_ms());
    Ok(if admission.is_due() {
        atoms::asked()
    } else if admission.is_crowded(receivers) {
        atoms::all()
    } else {
        atoms::none()
    })
}

/// No more samples until one is requested. Returns `false` if there are receivers to sample.
#[rustler::nif]
fn sample_pause(shard: Term<'_>) -> NifResult<bool> {
    Ok(admission(shard)?.pause())
}

/// Mailboxes sampled so far, and receivers that were sent something and not seen empty since.
#[rustler::nif]
fn sample_counts(shard: Term<'_>) -> NifResult<(u64, u32)> {
    let admission = admission(shard)?;
    Ok((admission.looks(), admission.active_receivers()))
}
