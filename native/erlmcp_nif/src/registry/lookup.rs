//! Look-up: the process of an id.
//!
//! The two functions of one argument, on the default registry, are the hot path. They are registered
//! by hand, since rustler's attribute collects the arguments of every call into a vector: an
//! allocation that costs about a third of the whole look-up.

use std::panic::catch_unwind;

use erlmcp_core::registry::Namespace;
use rustler::codegen_runtime::{c_int, inventory};
use rustler::sys::{ErlNifEnv, ErlNifTerm, enif_make_badarg};
use rustler::{Encoder, Env, Error, NifResult, Term};

use super::{
    as_id, encode_id, is_alive, is_process_alive, live_entry, namespace, not_found, pid_term,
};
use crate::atoms;
use crate::id;
use crate::immediate;
use crate::reschedule::{Outcome, Scheduler, reschedulable};
use crate::resource::{Registry, default_registry, registry, unless_diverted};

/// The address of an entry whose process is on another node. No pid has this word.
pub(crate) const REMOTE: u64 = 0;

/// The pid of an id, or the atom `undefined`, as a raw term; `None` if the id is too long. With
/// `IS_CHECKED` only the pid of a process that is alive.
#[inline(always)]
fn pid<'a, const IS_CHECKED: bool>(
    env: Env<'a>,
    registry: &Registry,
    namespace: Namespace,
    id: Term<'a>,
) -> Option<ErlNifTerm> {
    id::with(registry, id, |id| {
        let pid = match registry.address(namespace, id) {
            None => None,
            Some(REMOTE) => registry
                .entry(namespace, id)
                .filter(|entry| !IS_CHECKED || is_alive(env, entry))
                .map(|entry| pid_term(env, &entry)),
            Some(address) => {
                // SAFETY: the address of an entry that is not for a remote process is a local pid.
                let pid = unsafe { immediate::term(env, address) };
                (!IS_CHECKED || is_process_alive(env, pid)).then_some(pid)
            }
        };
        pid.unwrap_or_else(|| atoms::undefined().encode(env))
            .as_c_arg()
    })
}

/// The pid of an id whose process is alive, or the atom `undefined`, as a raw term; `None` if the id
/// is too long.
pub(crate) fn live_pid<'a>(
    env: Env<'a>,
    registry: &Registry,
    namespace: Namespace,
    id: Term<'a>,
) -> Option<ErlNifTerm> {
    pid::<true>(env, registry, namespace, id)
}

/// One argument: the id.
///
/// # Safety
///
/// Called by the VM, with its environment and as many terms of it as the function has arguments.
unsafe extern "C" fn raw_whereis<const IS_CHECKED: bool>(
    env: *mut ErlNifEnv,
    _argc: c_int,
    argv: *const ErlNifTerm,
) -> ErlNifTerm {
    let lifetime = ();
    // SAFETY: the VM's environment, valid for this call.
    let caller = unsafe { Env::new(&lifetime, env) };
    // SAFETY: the function has one argument.
    let id = unsafe { Term::new(caller, *argv) };
    let found =
        catch_unwind(|| pid::<IS_CHECKED>(caller, default_registry(), Namespace::Connection, id));
    match found {
        Ok(Some(found)) => found,
        // SAFETY: the VM's environment. A panic becomes a badarg too.
        _ => unsafe { enif_make_badarg(env) },
    }
}

macro_rules! whereis {
    ($name:literal, $is_checked:literal) => {
        inventory::submit!(rustler::Nif {
            name: $name.as_ptr(),
            arity: 1,
            flags: rustler::SchedulerFlags::Normal as u32,
            raw_func: raw_whereis::<$is_checked>,
        });
    };
}

whereis!(c"whereis_connection", false);
whereis!(c"whereis_name", true);

// ---- Any registry ----

#[rustler::nif]
fn whereis<'a>(env: Env<'a>, of: Term<'a>, ns: Term<'a>, id: Term<'a>) -> NifResult<Term<'a>> {
    let pid = live_pid(env, registry(of)?, namespace(ns)?, id).ok_or(Error::BadArg)?;
    // SAFETY: it is a term of this environment.
    Ok(unsafe { Term::new(env, pid) })
}

fn find<'a>(env: Env<'a>, [of, ns, id]: [Term<'a>; 3], scheduler: Scheduler) -> Outcome<'a> {
    let registry = registry(of)?;
    let namespace = namespace(ns)?;
    unless_diverted(env, of, namespace, || {
        let encoded = encode_id(registry, id)?;
        let id = as_id(registry, &encoded);
        loop {
            let Some(entry) = live_entry(env, registry, namespace, &id) else {
                return Ok(not_found(env));
            };
            if let Some(config) = entry.lease.config.load(env, scheduler)? {
                return Ok((atoms::ok(), (pid_term(env, &entry), config)).encode(env));
            }
            // The entry was removed or its config replaced since it was found.
        }
    })
}

reschedulable!(c"find", 3, find);
