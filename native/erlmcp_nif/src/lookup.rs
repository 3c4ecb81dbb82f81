//! The hot path: the process of an id in the default registry.
//!
//! These functions are registered by hand, since rustler's attribute collects the arguments of every
//! call into a vector: an allocation that costs about a third of the whole look-up.

use std::panic::catch_unwind;

use erlmcp_core::registry::Namespace;
use rustler::codegen_runtime::{c_int, inventory};
use rustler::sys::{ErlNifEnv, ErlNifTerm, enif_make_badarg};
use rustler::{Encoder, Env, Term};

use crate::atoms;
use crate::id;
use crate::immediate;
use crate::registry::pid_term;
use crate::resource::{Registry, default_registry};

/// The address of an entry whose process is on another node. No pid is this word.
pub(crate) const REMOTE: u64 = 0;

/// The pid of an id, or the atom `undefined`, as a raw term; `None` if the id is too long.
#[inline(always)]
pub(crate) fn pid<'a>(
    env: Env<'a>,
    registry: &Registry,
    namespace: Namespace,
    id: Term<'a>,
) -> Option<ErlNifTerm> {
    id::with(registry, id, |id| {
        let pid = match registry.address(namespace, id) {
            None => atoms::undefined().encode(env),
            Some(REMOTE) => registry
                .entry(namespace, id)
                .map_or_else(|| atoms::undefined().encode(env), |e| pid_term(env, &e)),
            // SAFETY: the address of an entry that is not for a remote process is a local pid.
            Some(address) => unsafe { immediate::term(env, address) },
        };
        pid.as_c_arg()
    })
}

/// One argument: the id.
///
/// # Safety
///
/// Called by the VM, with its environment and as many terms of it as the function has arguments.
unsafe extern "C" fn whereis<const NAMESPACE: usize>(
    env: *mut ErlNifEnv,
    _argc: c_int,
    argv: *const ErlNifTerm,
) -> ErlNifTerm {
    let lifetime = ();
    // SAFETY: the VM's environment, valid for this call.
    let caller = unsafe { Env::new(&lifetime, env) };
    // SAFETY: the function has one argument.
    let id = unsafe { Term::new(caller, *argv) };
    let found = catch_unwind(|| pid(caller, default_registry(), Namespace::ALL[NAMESPACE], id));
    match found {
        Ok(Some(found)) => found,
        // SAFETY: the VM's environment. A panic ends as a badarg too.
        _ => unsafe { enif_make_badarg(env) },
    }
}

macro_rules! whereis {
    ($name:literal, $namespace:expr) => {
        inventory::submit!(rustler::Nif {
            name: $name.as_ptr(),
            arity: 1,
            flags: rustler::SchedulerFlags::Normal as u32,
            raw_func: whereis::<{ $namespace as usize }>,
        });
    };
}

whereis!(c"whereis_connection", Namespace::Connection);
whereis!(c"whereis_server", Namespace::Server);
whereis!(c"whereis_transport", Namespace::Transport);
