//! What ends with a process: the calls of named circuit breakers that it is in, the breakers that it owns, and the
//! message stores that it consumes.
//!
//! # One resource per process
//!
//! The first call of a process to a breaker, or its first store, creates a resource that monitors the process. All
//! later ones use the same resource. When the process exits, the VM calls `down`: the calls that it was in count as
//! failures, its breakers are removed, and its stores are closed. The monitor is never removed, since that can crash
//! OTP 25 (see [`crate::watch`]): the table holds the resource until `down`. A process that has called a breaker once
//! costs some 400 bytes until it exits.
//!
//! # The lock is hardly ever contended
//!
//! Only the process itself, in a native function, uses its resource; `down` runs after its last instruction. The one
//! exception is a process that is killed while its function runs on a dirty scheduler. Then `down` may have to wait
//! until that function has added its breaker, which takes a few instructions.

use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};
use std::thread;

use ahash::RandomState;
use erlmcp_core::call_breaker::{Outcome, Permit};
use erlmcp_core::circuit_breaker::State;
use once_cell::race::OnceBox;
use papaya::HashMap;
use rustler::{Encoder, Env, LocalPid, Monitor, Resource, ResourceArc};

use crate::immediate;
use crate::message_store::{self, Store};
use crate::named_breaker::{NamedBreaker, remove};
use crate::vm_clock::VmClock;

/// See the module's documentation.
pub(crate) struct CallerResource(Mutex<Held>);

#[derive(Default)]
struct Held {
    /// The calls that the process is in, the innermost last.
    calls: Vec<Call>,
    owned: Vec<Arc<NamedBreaker>>,
    stores: Stores,
}

#[derive(Default)]
struct Stores {
    /// Some of them may have been freed.
    all: Vec<Weak<Store>>,
    /// The number at which those are removed next: twice as many as were left, so that each store costs constant time.
    cleaned_at: usize,
}

/// A process consumes at most so many stores at one time: its exit takes a microsecond for each.
const MAX_STORES: usize = 1_000;

struct Call {
    named: Arc<NamedBreaker>,
    permit: Permit,
}

impl Resource for CallerResource {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, env: Env<'a>, pid: LocalPid, _monitor: Monitor) {
        let pid = immediate::word(pid.encode(env));
        callers().remove(&pid, &callers().guard());
        let Held {
            calls,
            owned,
            stores,
        } = std::mem::take(&mut *self.held());
        message_store::close(stores.all.iter().filter_map(Weak::upgrade));
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
        loop {
            match self.0.try_lock() {
                Ok(held) => return held,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                // See the module's documentation.
                Err(TryLockError::WouldBlock) => thread::yield_now(),
            }
        }
    }
}

/// Calls `f` with what the calling process holds; `None` if the process is exiting.
#[inline]
fn with_held<R>(env: Env<'_>, f: impl FnOnce(&mut Held) -> R) -> Option<R> {
    let pid = env.pid();
    let word = immediate::word(pid.encode(env));
    let guard = callers().guard();
    let caller = match callers().get(&word, &guard) {
        Some(caller) => caller,
        None => {
            let caller = ResourceArc::new(CallerResource(Mutex::default()));
            // The table holds it until `down`.
            env.monitor(&caller, &pid)?;
            callers().get_or_insert(word, caller, &guard)
        }
    };
    Some(f(&mut caller.held()))
}

/// Records that the calling process is in a call. Returns the call's number; `None` if the process is exiting.
#[inline]
pub(crate) fn begin(env: Env<'_>, named: &Arc<NamedBreaker>, permit: Permit) -> Option<usize> {
    with_held(env, |held| {
        if held.calls.capacity() == 0 {
            // Most processes are never in more than one call. Room for four would take 72 bytes more.
            held.calls.reserve_exact(1);
        }
        held.calls.push(Call {
            named: Arc::clone(named),
            permit,
        });
        held.calls.len() - 1
    })
}

/// Ends the calling process's call of this number. Returns its breaker and the transitions of that breaker;
/// `None` if there is no such call. Calls inside it that were not ended count as failures.
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

/// Makes the calling process the breaker's owner. `false` if the process is exiting.
pub(crate) fn own(env: Env<'_>, named: &Arc<NamedBreaker>) -> bool {
    with_held(env, |held| held.owned.push(Arc::clone(named))).is_some()
}

/// The calling process no longer owns the breaker.
pub(crate) fn disown(env: Env<'_>, named: &Arc<NamedBreaker>) {
    with_held(env, |held| {
        held.owned.retain(|other| !Arc::ptr_eq(other, named));
    });
}

/// Makes the calling process the store's consumer. `Some(false)` if it consumes [`MAX_STORES`] others, `None` if it is
/// exiting.
pub(crate) fn consume(env: Env<'_>, store: &Arc<Store>) -> Option<bool> {
    with_held(env, |held| {
        let Stores { all, cleaned_at } = &mut held.stores;
        if all.len() >= (*cleaned_at).min(MAX_STORES) {
            all.retain(|store| store.strong_count() > 0);
            *cleaned_at = 2 * all.len().max(4);
        }
        let has_room = all.len() < MAX_STORES;
        if has_room {
            all.push(Arc::downgrade(store));
        }
        has_room
    })
}
