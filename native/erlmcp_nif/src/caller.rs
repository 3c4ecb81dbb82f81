//! What a process has to do with named circuit breakers: the calls that it is in, and the breakers that end
//! with it.
//!
//! # One resource a process
//!
//! A process that calls a breaker gets a resource that monitors it, with its first call, and keeps that for
//! all later ones. When the process exits, the VM calls `down`: calls that it was in are failures, and its
//! breakers are removed. The monitor is never taken back, since that can crash OTP 25 (see
//! [`crate::watch`]): the table holds the resource until `down`. A process that has called a breaker once
//! costs some 400 bytes until it exits.
//!
//! # Nobody else looks
//!
//! The process itself, in a native function, is the only one to use its resource; `down` runs after its last
//! instruction. So the lock below is never held by another thread, and nobody ever waits for it.

use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use ahash::RandomState;
use erlmcp_core::call_breaker::{Outcome, Permit};
use erlmcp_core::circuit_breaker::State;
use once_cell::race::OnceBox;
use papaya::HashMap;
use rustler::{Encoder, Env, LocalPid, Monitor, Resource, ResourceArc};

use crate::immediate;
use crate::named_breaker::{NamedBreaker, remove};
use crate::vm_clock::VmClock;

/// See the module's documentation.
pub(crate) struct CallerResource(Mutex<Held>);

#[derive(Default)]
struct Held {
    /// The calls that the process is in, the innermost last.
    calls: Vec<Call>,
    owned: Vec<Arc<NamedBreaker>>,
}

struct Call {
    named: Arc<NamedBreaker>,
    permit: Permit,
}

impl Resource for CallerResource {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, env: Env<'a>, pid: LocalPid, _monitor: Monitor) {
        let pid = immediate::word(pid.encode(env));
        callers().remove(&pid, &callers().guard());
        let Held { calls, owned } = std::mem::take(&mut *self.held());
        for named in owned {
            remove(&named);
        }
        for Call { named, permit } in calls {
            named.breaker.abandon(permit, &VmClock);
        }
    }
}

type Callers = HashMap<u64, ResourceArc<CallerResource>, RandomState>;

fn callers() -> &'static Callers {
    static CALLERS: OnceBox<Callers> = OnceBox::new();
    CALLERS.get_or_init(Box::default)
}

impl CallerResource {
    fn held(&self) -> MutexGuard<'_, Held> {
        match self.0.try_lock() {
            Ok(held) => held,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => unreachable!("only the process itself looks"),
        }
    }
}

/// Calls `f` with what the calling process holds; `None` if that is exiting.
#[inline]
fn with_held<R>(env: Env<'_>, f: impl FnOnce(&mut Held) -> R) -> Option<R> {
    let pid = env.pid();
    let word = immediate::word(pid.encode(env));
    let guard = callers().guard();
    let caller = match callers().get(&word, &guard) {
        Some(caller) => caller,
        None => {
            let caller = ResourceArc::new(CallerResource(Mutex::default()));
            // Until `down`, the table keeps it.
            env.monitor(&caller, &pid)?;
            callers().get_or_insert(word, caller, &guard)
        }
    };
    Some(f(&mut caller.held()))
}

/// The calling process is in a call from now on. Returns its number; `None` if the process is exiting.
#[inline]
pub(crate) fn begin(env: Env<'_>, named: &Arc<NamedBreaker>, permit: Permit) -> Option<usize> {
    with_held(env, |held| {
        if held.calls.capacity() == 0 {
            // Most processes are never in more than one call, and four would be 72 bytes more.
            held.calls.reserve_exact(1);
        }
        held.calls.push(Call {
            named: Arc::clone(named),
            permit,
        });
        held.calls.len() - 1
    })
}

/// The calling process ends the call of this number, and gets the transitions of its breaker. Calls inside
/// it that were not ended are failures. `None` if there is no such call.
#[inline]
pub(crate) fn end(
    env: Env<'_>,
    number: usize,
    outcome: Outcome,
) -> Option<(Arc<NamedBreaker>, Vec<State>)> {
    let (call, inside) = with_held(env, |held| {
        if number >= held.calls.len() {
            return None;
        }
        let inside = held.calls.split_off(number + 1);
        Some((held.calls.pop()?, inside))
    })??;
    for Call { named, permit } in inside {
        named.breaker.abandon(permit, &VmClock);
    }
    let mut changes = Vec::new();
    let Call { named, permit } = call;
    named.breaker.leave(permit, outcome, &VmClock, &mut changes);
    Some((named, changes))
}

/// The breaker ends with the calling process. `false` if that is exiting.
pub(crate) fn own(env: Env<'_>, named: &Arc<NamedBreaker>) -> bool {
    with_held(env, |held| held.owned.push(Arc::clone(named))).is_some()
}

/// The calling process gives its breaker up.
pub(crate) fn disown(env: Env<'_>, named: &Arc<NamedBreaker>) {
    with_held(env, |held| {
        held.owned.retain(|other| !Arc::ptr_eq(other, named));
    });
}
