//! Functions that move to a dirty scheduler when they have much to do.
//!
//! Such a function first runs on the scheduler of its caller. It returns [`TooHeavy`] as soon as it
//! sees that its work takes longer than about a millisecond; `enif_schedule_nif` then runs it again,
//! from its beginning, on a dirty scheduler. So it must not have changed anything when it gives up.
//!
//! The functions are registered here and not by rustler's attribute, since the address of a function
//! that the attribute generates cannot be passed to `enif_schedule_nif`.

use std::ffi::CStr;
use std::panic::catch_unwind;
use std::slice;

use rustler::codegen_runtime::{NifReturned, c_int, handle_nif_result};
use rustler::sys::{ErlNifEnv, ErlNifTerm};
use rustler::{Env, Error, SchedulerFlags, Term};

/// The scheduler of a call, which limits the call's work.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheduler {
    Normal,
    Dirty,
}

impl Scheduler {
    /// For work that takes longer than about a millisecond.
    pub(crate) fn require_dirty(self) -> Result<(), TooHeavy> {
        match self {
            Self::Normal => Err(TooHeavy),
            Self::Dirty => Ok(()),
        }
    }
}

/// The work must be done on a dirty scheduler.
pub(crate) struct TooHeavy;

/// Why a function has no result.
pub(crate) enum Stopped {
    TooHeavy,
    Failed(Error),
}

impl From<TooHeavy> for Stopped {
    fn from(_: TooHeavy) -> Self {
        Self::TooHeavy
    }
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

pub(crate) type Outcome<'a> = Result<Term<'a>, Stopped>;

/// A function of `ARITY` arguments. Made by [`reschedulable!`].
pub(crate) trait Reschedulable<const ARITY: usize> {
    const NAME: &'static CStr;

    /// Never too heavy for [`Scheduler::Dirty`].
    fn run<'a>(env: Env<'a>, arguments: [Term<'a>; ARITY], scheduler: Scheduler) -> Outcome<'a>;
}

/// What the VM calls, on a normal scheduler.
///
/// # Safety
///
/// Called by the VM, with its environment and `ARITY` terms of it.
pub(crate) unsafe extern "C" fn begin<F: Reschedulable<ARITY>, const ARITY: usize>(
    env: *mut ErlNifEnv,
    _argc: c_int,
    argv: *const ErlNifTerm,
) -> ErlNifTerm {
    // SAFETY: the caller's promise.
    unsafe { run::<F, ARITY>(env, argv, Scheduler::Normal) }
}

/// What the VM calls on a dirty scheduler.
///
/// # Safety
///
/// As for [`begin`].
unsafe extern "C" fn resume<F: Reschedulable<ARITY>, const ARITY: usize>(
    env: *mut ErlNifEnv,
    _argc: c_int,
    argv: *const ErlNifTerm,
) -> ErlNifTerm {
    // SAFETY: the caller's promise.
    unsafe { run::<F, ARITY>(env, argv, Scheduler::Dirty) }
}

/// # Safety
///
/// As for [`begin`].
unsafe fn run<F: Reschedulable<ARITY>, const ARITY: usize>(
    env: *mut ErlNifEnv,
    argv: *const ErlNifTerm,
    scheduler: Scheduler,
) -> ErlNifTerm {
    let lifetime = ();
    // SAFETY: the VM's environment, valid for this call.
    let caller = unsafe { Env::new(&lifetime, env) };
    // SAFETY: the VM passes `ARITY` terms.
    let terms = unsafe { slice::from_raw_parts(argv, ARITY) };
    let arguments = std::array::from_fn(|n| {
        // SAFETY: it is a term of the environment.
        unsafe { Term::new(caller, terms[n]) }
    });
    let outcome = catch_unwind(|| match F::run(caller, arguments, scheduler) {
        Ok(term) => Ok(Ok(term)),
        Err(Stopped::Failed(error)) => Ok(Err(error)),
        Err(Stopped::TooHeavy) => match scheduler {
            Scheduler::Normal => Err(TooHeavy),
            // Never happens: see `Reschedulable::run`.
            Scheduler::Dirty => Ok(Err(Error::BadArg)),
        },
    });
    let returned = match outcome {
        Ok(Ok(result)) => handle_nif_result(Ok(result), caller),
        Err(panic) => handle_nif_result::<Term<'_>>(Err(panic), caller),
        Ok(Err(TooHeavy)) => NifReturned::Reschedule {
            fun_name: F::NAME.into(),
            flags: SchedulerFlags::DirtyCpu,
            fun: resume::<F, ARITY>,
            args: terms.to_vec(),
        },
    };
    // SAFETY: the terms are of this environment, and `resume` takes as many as are passed on to it.
    unsafe { returned.apply(caller) }
}

/// Registers `$run` as the NIF `$name` of `$arity` arguments.
macro_rules! reschedulable {
    ($name:literal, $arity:literal, $run:expr) => {
        const _: () = {
            struct Function;

            impl $crate::reschedule::Reschedulable<$arity> for Function {
                const NAME: &'static ::std::ffi::CStr = $name;

                fn run<'a>(
                    env: ::rustler::Env<'a>,
                    arguments: [::rustler::Term<'a>; $arity],
                    scheduler: $crate::reschedule::Scheduler,
                ) -> $crate::reschedule::Outcome<'a> {
                    $run(env, arguments, scheduler)
                }
            }

            ::rustler::codegen_runtime::inventory::submit!(::rustler::Nif {
                name: $name.as_ptr(),
                arity: $arity,
                flags: ::rustler::SchedulerFlags::Normal as u32,
                raw_func: $crate::reschedule::begin::<Function, $arity>,
            });
        };
    };
}

pub(crate) use reschedulable;
