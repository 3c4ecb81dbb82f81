//! The node's circuit breaker, and the terms of any of its kind.

use erlmcp_core::circuit_breaker::{CircuitBreaker, Config, Permit};
use rustler::{Atom, Encoder, Env, Error, NifResult, Term};

use crate::atoms;
use crate::backpressure::{circuit, clock};
use crate::routing::state_term;

#[rustler::nif]
fn breaker_state(env: Env<'_>) -> Term<'_> {
    state_term(env, circuit().state(clock()))
}

/// A permit. The outcome of a probe must be recorded as a success or a failure.
#[rustler::nif]
fn breaker_allow(env: Env<'_>) -> Term<'_> {
    match circuit().check(clock()) {
        Ok(Permit::Free | Permit::Probe { is_first: false }) => atoms::allowed().encode(env),
        Ok(Permit::Probe { is_first: true }) => (atoms::allowed(), atoms::half_open()).encode(env),
        Err(_) => atoms::refused().encode(env),
    }
}

#[rustler::nif]
fn breaker_success() -> Atom {
    if circuit().record_success(clock()) {
        atoms::closed()
    } else {
        atoms::none()
    }
}

#[rustler::nif]
fn breaker_failure() -> Atom {
    if circuit().record_failure(clock()) {
        atoms::open()
    } else {
        atoms::none()
    }
}

#[rustler::nif]
fn breaker_set(state: Term<'_>) -> NifResult<Atom> {
    let is_open = if atoms::open() == state {
        true
    } else if atoms::closed() == state {
        false
    } else {
        return Err(Error::BadArg);
    };
    Ok(match circuit().force(is_open, clock()) {
        false => atoms::none(),
        true if is_open => atoms::open(),
        true => atoms::closed(),
    })
}

/// A config: failure threshold, window, success threshold, timeout and probe limit.
pub(crate) fn config_of(term: Term<'_>) -> NifResult<Config> {
    let (failure_threshold, window_ms, success_threshold, timeout_ms, probe_limit) =
        term.decode()?;
    Ok(Config {
        failure_threshold,
        window_ms,
        success_threshold,
        timeout_ms,
        probe_limit,
    })
}

/// `off`, or a config.
#[rustler::nif]
fn breaker_configure(config: Term<'_>) -> NifResult<Atom> {
    let config = if atoms::off() == config {
        None
    } else {
        Some(config_of(config)?)
    };
    circuit()
        .configure(config, clock())
        .map_err(|_| Error::BadArg)?;
    Ok(atoms::ok())
}

/// Whether [`breaker_allow`] would let a call through now. Takes no probe.
#[rustler::nif]
fn breaker_would_allow() -> bool {
    circuit().wait_ms(clock()) == 0
}

#[rustler::nif]
fn breaker_stats<'a>(env: Env<'a>) -> NifResult<Term<'a>> {
    stats_term(env, circuit())
}

/// State, counters and config of a breaker.
pub(crate) fn stats_term<'a>(env: Env<'a>, breaker: &CircuitBreaker) -> NifResult<Term<'a>> {
    let stats = breaker.stats(clock());
    let off = atoms::off().encode(env);
    let config = breaker.config().map_or(off, |config| {
        (
            config.failure_threshold,
            config.window_ms,
            config.success_threshold,
            config.timeout_ms,
            config.probe_limit,
        )
            .encode(env)
    });
    let transitions = Term::map_from_arrays(
        env,
        &[atoms::open(), atoms::half_open(), atoms::closed()],
        &[
            stats.transitions.open,
            stats.transitions.half_open,
            stats.transitions.closed,
        ],
    )?;
    Term::map_from_arrays(
        env,
        &[
            atoms::state(),
            atoms::failures(),
            atoms::successes(),
            atoms::probes(),
            atoms::since_ms(),
            atoms::config(),
            atoms::transitions(),
        ],
        &[
            state_term(env, stats.state),
            stats.failures.encode(env),
            stats.successes.encode(env),
            stats.probes.encode(env),
            stats.since_ms.encode(env),
            config,
            transitions,
        ],
    )
}
