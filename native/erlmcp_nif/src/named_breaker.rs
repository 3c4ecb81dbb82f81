//! Named circuit breakers: the table of names, and the functions that work on the breakers.
//!
//! A breaker without an owner lives until it is removed. A breaker with an owner, the process that has
//! registered it, is removed when that process exits. The name of a breaker whose owner has exited is free, even
//! before the owner's `down` has run. A breaker is named by its name or by its owner's pid; a name takes
//! precedence.
//!
//! A function that changes the state returns the transitions that it has made, as `[{Name, State}]`, since native
//! code should not write logs. A transition by a caller that is killed is reported to the next caller that asks.
//!
//! `enter` and `leave` are registered by hand, as in [`crate::registry::lookup`], and for the same reason.

use std::hash::{Hash, Hasher};
use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ahash::RandomState;
use erlmcp_core::call_breaker::{CallBreaker, Config, Outcome};
use erlmcp_core::churn::Churn;
use erlmcp_core::circuit_breaker::State;
use once_cell::race::OnceBox;
use papaya::{Equivalent, HashMap};
use rustler::codegen_runtime::{c_int, inventory};
use rustler::sys::{ErlNifEnv, ErlNifTerm, enif_make_badarg};
use rustler::{Atom, Encoder, Env, Error, LocalPid, NifResult, Term};

use crate::encoding::{self, Zeros};
use crate::reschedule::{self, Scheduler, reschedulable};
use crate::routing::state_term;
use crate::vm_clock::VmClock;
use crate::{atoms, caller, id, immediate, resource};

/// The longest encoded name.
const MAX_NAME_BYTES: usize = 1_024;
/// The longest encoded config.
const MAX_CONFIG_BYTES: usize = 4_096;
/// Names may come from input, so their number is bounded.
const MAX_BREAKERS: usize = 100_000;

/// See the module's documentation.
pub(crate) struct NamedBreaker {
    pub(crate) breaker: CallBreaker,
    kind: u8,
    name: Box<[u8]>,
    /// The process whose exit removes the breaker.
    owner: Option<LocalPid>,
    /// The options as they were given, with defaults, as an encoded term.
    config: Box<[u8]>,
}

impl NamedBreaker {
    #[inline]
    fn is_alive(&self, env: Env<'_>) -> bool {
        self.owner.is_none_or(|owner| owner.is_alive(env))
    }
}

// ---- Names ----

/// A breaker as a key of the table, compared by name.
struct Named(Arc<NamedBreaker>);

struct Name<'a> {
    kind: u8,
    bytes: &'a [u8],
}

impl Hash for Name<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u8(self.kind);
        state.write(self.bytes);
    }
}

impl Hash for Named {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let NamedBreaker { kind, name, .. } = &*self.0;
        Name {
            kind: *kind,
            bytes: name,
        }
        .hash(state);
    }
}

impl PartialEq for Named {
    fn eq(&self, other: &Self) -> bool {
        self.0.kind == other.0.kind && self.0.name == other.0.name
    }
}

impl Eq for Named {}

impl Equivalent<Named> for Name<'_> {
    fn equivalent(&self, key: &Named) -> bool {
        self.kind == key.0.kind && *self.bytes == *key.0.name
    }
}

type Names = HashMap<Named, (), RandomState>;
type Owners = HashMap<u64, Arc<NamedBreaker>, RandomState>;

static COUNT: AtomicUsize = AtomicUsize::new(0);

fn names() -> &'static Names {
    static NAMES: OnceBox<Names> = OnceBox::new();
    NAMES.get_or_init(Box::default)
}

/// The breakers with an owner, by the owner's pid.
fn owners() -> &'static Owners {
    static OWNERS: OnceBox<Owners> = OnceBox::new();
    OWNERS.get_or_init(Box::default)
}

/// The removals of names, counted by a hash of their own.
fn churn() -> &'static (Churn, RandomState) {
    static CHURN: OnceBox<(Churn, RandomState)> = OnceBox::new();
    CHURN.get_or_init(|| Box::new((Churn::new(), RandomState::new())))
}

fn is_churned(name: &Name<'_>) -> bool {
    let (churn, hasher) = churn();
    let count = || COUNT.load(Ordering::Relaxed) as u64;
    churn.is_due(hasher.hash_one(name), count)
}

/// Removes a breaker from the tables, unless it was removed already.
pub(crate) fn remove(named: &Arc<NamedBreaker>) {
    let guard = names().guard();
    let is_this = |other: &Named, (): &()| Arc::ptr_eq(&other.0, named);
    let name = Name {
        kind: named.kind,
        bytes: &named.name,
    };
    if let Ok(Some(_)) = names().remove_if(&name, is_this, &guard) {
        COUNT.fetch_sub(1, Ordering::AcqRel);
        let (churn, hasher) = churn();
        churn.removed(hasher.hash_one(&name));
    }
    if let Some(owner) = named.owner {
        let guard = owners().guard();
        let is_this = |_: &u64, other: &Arc<NamedBreaker>| Arc::ptr_eq(other, named);
        // Removes nothing if the owner has registered another breaker since.
        let _ = owners().remove_if(&word(&owner), is_this, &guard);
    }
}

fn word(pid: &LocalPid) -> u64 {
    // SAFETY: a local pid is an immediate term, and `ErlNifPid` is a structure of that alone.
    unsafe { std::mem::transmute::<rustler::sys::ErlNifPid, usize>(*pid.as_c_arg()) as u64 }
}

/// Calls `f` with the breaker of a name or of an owner's pid, unless its owner has exited.
#[inline]
fn with_breaker<R>(
    env: Env<'_>,
    breaker: Term<'_>,
    f: impl FnOnce(&Arc<NamedBreaker>) -> R,
) -> Option<R> {
    let mut encoded = None;
    if let Some((kind, bytes)) = id::kind_and_bytes(breaker, MAX_NAME_BYTES, &mut encoded) {
        let guard = names().guard();
        if let Some((named, ())) = names().get_key_value(&Name { kind, bytes }, &guard)
            && named.0.is_alive(env)
        {
            return Some(f(&named.0));
        }
    }
    let pid = breaker.decode::<LocalPid>().ok()?;
    let guard = owners().guard();
    let named = owners().get(&immediate::word(pid.encode(env)), &guard)?;
    named.is_alive(env).then(|| f(named))
}

/// A counted reference to a breaker, for functions that may run long or remove it.
fn breaker(env: Env<'_>, term: Term<'_>) -> Option<Arc<NamedBreaker>> {
    with_breaker(env, term, Arc::clone)
}

// ---- Registration ----

/// `ok`, `{already_registered, Pid | none}`, `name_too_long`, `config_too_large` or `too_many_breakers`. With
/// `IsOwned` the calling process is the owner.
fn named_breaker_register<'a>(
    env: Env<'a>,
    [name, config, options, is_owned]: [Term<'a>; 4],
    scheduler: Scheduler,
) -> reschedule::Outcome<'a> {
    let is_owned: bool = is_owned.decode()?;
    let (failure_threshold, success_threshold, timeout_ms, window_size, rate, probe_limit) =
        config.decode()?;
    let config = Config {
        failure_threshold,
        success_threshold,
        timeout_ms,
        window_size,
        failure_rate_threshold: rate,
        probe_limit,
    };
    let breaker = CallBreaker::new(config, &VmClock).map_err(|_| Error::BadArg)?;
    let mut encoded = None;
    let Some((kind, bytes)) = id::kind_and_bytes(name, MAX_NAME_BYTES, &mut encoded) else {
        return Ok(atoms::name_too_long().encode(env));
    };
    if is_churned(&Name { kind, bytes }) {
        scheduler.require_dirty()?;
        churn().0.complete_resize(names());
    }
    let Ok(options) = encoding::encode(options, MAX_CONFIG_BYTES, Zeros::Exact) else {
        return Ok(atoms::config_too_large().encode(env));
    };
    if COUNT.fetch_add(1, Ordering::AcqRel) >= MAX_BREAKERS {
        COUNT.fetch_sub(1, Ordering::AcqRel);
        return Ok(atoms::too_many_breakers().encode(env));
    }
    resource::keep_library();
    let named = Arc::new(NamedBreaker {
        breaker,
        kind,
        name: bytes.into(),
        owner: is_owned.then(|| env.pid()),
        config: options.into(),
    });
    if let Err(holder) = insert(env, &named) {
        COUNT.fetch_sub(1, Ordering::AcqRel);
        let owner = holder
            .owner
            .map_or(atoms::none().encode(env), |owner| owner.encode(env));
        return Ok((atoms::already_registered(), owner).encode(env));
    }
    if is_owned {
        // An exiting process gets no result, and its name is free.
        let _ = caller::own(env, &named);
        let owned = Arc::clone(&named);
        owners().insert(word(&env.pid()), owned, &owners().guard());
    }
    Ok(atoms::ok().encode(env))
}

reschedulable!(c"named_breaker_register", 4, named_breaker_register);

/// Inserts a breaker under its name, or returns the breaker that has the name, unless its owner has exited.
fn insert(env: Env<'_>, named: &Arc<NamedBreaker>) -> Result<(), Arc<NamedBreaker>> {
    loop {
        let guard = names().guard();
        let entered = names().try_insert(Named(Arc::clone(named)), (), &guard);
        if entered.is_ok() {
            return Ok(());
        }
        let name = Name {
            kind: named.kind,
            bytes: &named.name,
        };
        // Retry if the holder was removed meanwhile, or if its owner has exited.
        if let Some((holder, ())) = names().get_key_value(&name, &guard) {
            if holder.0.is_alive(env) {
                return Err(Arc::clone(&holder.0));
            }
            remove(&holder.0);
        }
    }
}

/// The owner of a breaker; `none` if it has none; `undefined` if there is no such breaker.
#[rustler::nif]
fn named_breaker_owner<'a>(env: Env<'a>, name: Term<'a>) -> Term<'a> {
    with_breaker(env, name, |named| {
        named
            .owner
            .map_or(atoms::none().encode(env), |owner| owner.encode(env))
    })
    .unwrap_or_else(|| atoms::undefined().encode(env))
}

/// Removes a breaker that has no owner, or whose owner is the calling process.
#[rustler::nif]
fn named_breaker_remove<'a>(env: Env<'a>, name: Term<'a>) -> Atom {
    let Some(named) = breaker(env, name) else {
        return atoms::undefined();
    };
    remove(&named);
    if named.owner == Some(env.pid()) {
        caller::disown(env, &named);
    }
    atoms::ok()
}

/// All names.
#[rustler::nif(schedule = "DirtyCpu")]
fn named_breakers<'a>(env: Env<'a>) -> NifResult<Vec<Term<'a>>> {
    let guard = names().guard();
    let living = names()
        .iter(&guard)
        .map(|(named, ())| &named.0)
        .filter(|named| named.is_alive(env));
    living
        .map(|named| id::decode(env, named.kind, &named.name))
        .collect()
}

// ---- Operation ----

fn changes<'a>(env: Env<'a>, named: &NamedBreaker, changes: &[State]) -> NifResult<Term<'a>> {
    let name = match changes {
        [] => return Ok(Term::list_new_empty(env)),
        _ => id::decode(env, named.kind, &named.name)?,
    };
    let changes = changes.iter().map(|state| (name, state_term(env, *state)));
    Ok(changes.collect::<Vec<_>>().encode(env))
}

/// The state, with transitions; or `undefined`.
#[rustler::nif]
fn named_breaker_state<'a>(env: Env<'a>, name: Term<'a>) -> NifResult<Term<'a>> {
    let Some(named) = breaker(env, name) else {
        return Ok(atoms::undefined().encode(env));
    };
    let mut told = Vec::new();
    let state = state_term(env, named.breaker.state(&VmClock, &mut told));
    Ok((state, changes(env, &named, &told)?).encode(env))
}

/// Transitions; or `undefined`.
#[rustler::nif]
fn named_breaker_force<'a>(env: Env<'a>, name: Term<'a>, to: Term<'a>) -> NifResult<Term<'a>> {
    let state = if atoms::reset() == to {
        None
    } else if atoms::open() == to {
        Some(State::Open)
    } else if atoms::closed() == to {
        Some(State::Closed)
    } else if atoms::half_open() == to {
        Some(State::HalfOpen)
    } else {
        return Err(Error::BadArg);
    };
    let Some(named) = breaker(env, name) else {
        return Ok(atoms::undefined().encode(env));
    };
    let mut told = Vec::new();
    match state {
        None => named.breaker.reset(&VmClock, &mut told),
        Some(state) => named.breaker.force(state, &VmClock, &mut told),
    }
    changes(env, &named, &told)
}

/// Figures and options, with transitions; or `undefined`.
#[rustler::nif]
fn named_breaker_stats<'a>(env: Env<'a>, name: Term<'a>) -> NifResult<Term<'a>> {
    let Some(named) = breaker(env, name) else {
        return Ok(atoms::undefined().encode(env));
    };
    let mut told = Vec::new();
    let stats = named.breaker.stats(&VmClock, &mut told);
    let last_failure = stats.last_failure_ms.map(VmClock::erlang_ms);
    let map = Term::map_from_arrays(
        env,
        &[
            atoms::name(),
            atoms::state(),
            atoms::consecutive_failures(),
            atoms::consecutive_successes(),
            atoms::total_successes(),
            atoms::total_failures(),
            atoms::total_rejected(),
            atoms::last_failure_time(),
            atoms::last_state_change(),
            atoms::failure_rate(),
            atoms::config(),
        ],
        &[
            id::decode(env, named.kind, &named.name)?,
            state_term(env, stats.state),
            stats.consecutive_failures.encode(env),
            stats.consecutive_successes.encode(env),
            stats.total_successes.encode(env),
            stats.total_failures.encode(env),
            stats.total_rejected.encode(env),
            last_failure.map_or(atoms::undefined().encode(env), |ms| ms.encode(env)),
            VmClock::erlang_ms(stats.last_change_ms).encode(env),
            stats.failure_rate.encode(env),
            encoding::decode(env, &named.config)?,
        ],
    )?;
    Ok((map, changes(env, &named, &told)?).encode(env))
}

// ---- Calls ----

fn limit_ms(term: Term<'_>) -> NifResult<Option<u64>> {
    if atoms::infinity() == term {
        return Ok(None);
    }
    term.decode().map(Some)
}

/// Admits the calling process to a call. Returns the call's number or `refused`, either one with the transitions
/// if there are any; `undefined` if there is no such breaker.
#[inline(always)]
fn enter<'a>(env: Env<'a>, name: Term<'a>, limit: Term<'a>) -> NifResult<Term<'a>> {
    let limit_ms = limit_ms(limit)?;
    with_breaker(env, name, |named| {
        if let Some(permit) = named.breaker.enter_closed() {
            return match caller::begin(env, named, permit) {
                Some(number) => Ok(number.encode(env)),
                None => Err(Error::BadArg),
            };
        }
        enter_slowly(env, named, limit_ms)
    })
    .unwrap_or_else(|| Ok(atoms::undefined().encode(env)))
}

#[cold]
fn enter_slowly<'a>(
    env: Env<'a>,
    named: &Arc<NamedBreaker>,
    limit_ms: Option<u64>,
) -> NifResult<Term<'a>> {
    let mut told = Vec::new();
    let result = match named.breaker.enter(&VmClock, limit_ms, &mut told) {
        Ok(permit) => caller::begin(env, named, permit)
            .ok_or(Error::BadArg)?
            .encode(env),
        Err(_) => atoms::refused().encode(env),
    };
    if told.is_empty() {
        return Ok(result);
    }
    Ok((result, changes(env, named, &told)?).encode(env))
}

/// Ends a call: `ok`, or transitions.
#[inline(always)]
fn leave<'a>(env: Env<'a>, number: Term<'a>, outcome: Term<'a>) -> NifResult<Term<'a>> {
    let outcome = if atoms::success() == outcome {
        Outcome::Success
    } else if atoms::failure() == outcome {
        Outcome::Failure
    } else {
        return Err(Error::BadArg);
    };
    let (named, told) = caller::end(env, number.decode()?, outcome).ok_or(Error::BadArg)?;
    if told.is_empty() {
        return Ok(atoms::ok().encode(env));
    }
    changes(env, &named, &told)
}

/// # Safety
///
/// Called by the VM, with its environment and two terms of it.
unsafe extern "C" fn raw<const IS_ENTER: bool>(
    env: *mut ErlNifEnv,
    _argc: c_int,
    argv: *const ErlNifTerm,
) -> ErlNifTerm {
    let lifetime = ();
    // SAFETY: the VM's environment, valid for this call.
    let caller = unsafe { Env::new(&lifetime, env) };
    // SAFETY: the function has two arguments.
    let (first, second) = unsafe { (Term::new(caller, *argv), Term::new(caller, *argv.add(1))) };
    let result = catch_unwind(|| {
        if IS_ENTER {
            enter(caller, first, second)
        } else {
            leave(caller, first, second)
        }
    });
    match result {
        Ok(Ok(term)) => term.as_c_arg(),
        // SAFETY: the VM's environment. A panic becomes a badarg too.
        _ => unsafe { enif_make_badarg(env) },
    }
}

macro_rules! raw_nif {
    ($name:literal, $is_enter:expr) => {
        inventory::submit!(rustler::Nif {
            name: $name.as_ptr(),
            arity: 2,
            flags: rustler::SchedulerFlags::Normal as u32,
            raw_func: raw::<{ $is_enter }>,
        });
    };
}

raw_nif!(c"named_breaker_enter", true);
raw_nif!(c"named_breaker_leave", false);
