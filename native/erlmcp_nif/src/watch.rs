//! Watches: resources that monitor a process and, when it exits, remove the entry that they belong to.
//!
//! # A monitor is never removed
//!
//! `process_info(Pid, monitored_by)`, which every observer calls, makes references to the resources
//! that monitor a process. In OTP 25 it may find one that was freed after its monitor was removed (by
//! `enif_demonitor_process` or with the resource itself) but before the process had handled the signal
//! of the removal, and the VM then crashes. So a watch holds a reference to itself from its monitor until
//! the process has exited. If its entry is removed earlier, the watch becomes idle: it waits in a pool for
//! the next registration of the same process, under any id and in any registry. A process has as many
//! watches as it had registrations at one time. An idle watch takes less memory than the entry that it had.
//!
//! # Protocol
//!
//! The state is one word: the number of the registry and the location of the entry, or neither (idle),
//! and whether the process has exited (`DOWN`, for good).
//!
//! * Registering: pop a watch from the pool or make one; store the entry's place in the word; insert
//!   the entry; then load `DOWN`, and if it is set remove the entry again.
//! * The process exits: set `DOWN`; then remove the entry at the place in the word.
//!
//! Each side stores before it loads what the other one stores (Dekker), so one of the two removes the
//! entry. A watch only ever belongs to entries of its own process: whichever entry it is found with
//! after `DOWN`, that one must be removed.
//!
//! * Removing: the thread that removed the entry clears the word and pushes the watch to the pool; then
//!   it loads `DOWN`, and if it is set pops one watch from the pool, as `down` does after setting it.
//!
//! Each push to the pool of a process that has exited is followed by a pop, either by the thread that has
//! pushed or by the watch's `down`. A pop that fails has found the pool empty, so no watch stays in it.
//! Each call frees one watch, however many there are.

use std::ffi::c_void;
use std::mem::{self, ManuallyDrop};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering, fence};

use crossbeam_queue::SegQueue;

use erlmcp_core::registry::Location;
use once_cell::race::OnceBox;
use papaya::HashMap;
use rustler::sys::{enif_keep_resource, enif_monitor_process, enif_release_resource};
use rustler::{Encoder, Env, LocalPid, Monitor, Resource, ResourceArc};

use crate::config::Config;
use crate::immediate;
use crate::resource::{NUMBER_BITS, Registry, release};

const DOWN: u64 = 1 << 63;
const IDLE: u64 = 0;

const _: () = assert!(Location::BITS + NUMBER_BITS <= 63);

pub(crate) struct WatchResource {
    /// `DOWN`, then the registry's number, then the location; all zero if idle.
    word: AtomicU64,
}

impl WatchResource {
    /// The number of the registry and the place of the entry that the watch belongs to; `None` if it is idle, or if its
    /// process has exited. The entry may not have been inserted yet, or have been removed: its lease tells.
    pub(crate) fn entry(&self) -> Option<(u32, Location)> {
        match self.word.load(Ordering::Acquire) {
            IDLE => None,
            word if word & DOWN != 0 => None,
            word => Some(Self::place(word)),
        }
    }

    fn place(word: u64) -> (u32, Location) {
        let location = Location::from_bits(word & ((1 << Location::BITS) - 1));
        ((word >> Location::BITS) as u32, location)
    }
}

impl Resource for WatchResource {
    const IMPLEMENTS_DOWN: bool = true;

    /// Runs when the process has exited, on the scheduler that it exited on.
    fn down<'a>(&'a self, env: Env<'a>, pid: LocalPid, _monitor: Monitor) {
        let word = self.word.fetch_or(DOWN, Ordering::AcqRel);
        // SeqCst: orders the store of `DOWN` before the loads of the entry and the pool, against the
        // fence in `Watch::has_ended`.
        fence(Ordering::SeqCst);
        let (number, location) = Self::place(word);
        let pid = immediate::word(pid.encode(env));
        if word != IDLE
            && let Some(registry) = Registry::of_number(number)
        {
            registry.remove_leased(env, &location, pid, |held| held.watch.is(self));
            release(registry);
        }
        drain_pool(pid);
        // SAFETY: the reference that `Watch::start` left for us. The VM holds another one while
        // this callback runs.
        unsafe { enif_release_resource(resource_of(self)) };
    }
}

// ---- The pool of idle watches, by process ----

/// The idle watches of a process. Most processes have at most one, which takes one word here. The queue takes
/// half a kilobyte, so it is created for the second one.
///
/// A pop that fails has missed only watches that were pushed meanwhile, by threads that pop afterwards if the
/// process has exited.
#[derive(Default)]
struct Pool {
    first: AtomicPtr<c_void>,
    others: OnceBox<SegQueue<Watch>>,
}

impl Pool {
    fn push(&self, watch: Watch) {
        let resource = watch.0.as_ptr();
        let is_first = self
            .first
            .compare_exchange(
                ptr::null_mut(),
                resource,
                Ordering::AcqRel,
                Ordering::Relaxed,
            )
            .is_ok();
        if is_first {
            // The pool holds the reference now.
            mem::forget(watch);
        } else {
            self.others.get_or_init(Box::default).push(watch);
        }
    }

    fn pop(&self) -> Option<Watch> {
        match NonNull::new(self.first.swap(ptr::null_mut(), Ordering::AcqRel)) {
            Some(resource) => Some(Watch(resource)),
            None => self.others.get()?.pop(),
        }
    }

    fn is_empty(&self) -> bool {
        self.first.load(Ordering::Acquire).is_null()
            && self.others.get().is_none_or(SegQueue::is_empty)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}

fn pools() -> &'static HashMap<u64, Pool> {
    static POOLS: OnceBox<HashMap<u64, Pool>> = OnceBox::new();
    POOLS.get_or_init(Box::default)
}

/// Pops a watch from the pool of a process that has exited, and removes the pool from the table if it is
/// empty. A watch that is pushed to it at that moment is freed with the pool.
fn drain_pool(pid: u64) {
    let guard = pools().guard();
    if let Some(pool) = pools().get(&pid, &guard) {
        drop(pool.pop());
        if pool.is_empty() {
            pools().remove(&pid, &guard);
        }
    }
}

// ---- Watches ----

/// A counted reference to a watch: rustler's `ResourceArc` in one word instead of two, since every
/// entry holds one. The word is the VM's pointer to the resource.
pub(crate) struct Watch(NonNull<c_void>);

// SAFETY: a counted reference to something that is `Send` and `Sync`.
unsafe impl Send for Watch {}
// SAFETY: as above.
unsafe impl Sync for Watch {}

/// The offset of the data in the VM's allocation, which is aligned for a pointer.
const DATA_OFFSET: usize = align_of::<WatchResource>();

/// The VM's pointer to the resource with this data. The provenance of the reference covers the data alone, so
/// the pointer takes the provenance that [`Watch::start`] has exposed.
fn resource_of(data: &WatchResource) -> *const c_void {
    ptr::with_exposed_provenance(ptr::from_ref(data).addr() - DATA_OFFSET)
}

impl Watch {
    /// An idle watch of a process; `None` if the process has exited.
    pub(crate) fn of(env: Env<'_>, pid: &LocalPid) -> Option<Self> {
        pools()
            .get(&immediate::word(pid.encode(env)), &pools().guard())
            .and_then(Pool::pop)
            .or_else(|| Self::start(env, pid))
    }

    fn start(env: Env<'_>, pid: &LocalPid) -> Option<Self> {
        let watch = ManuallyDrop::new(ResourceArc::new(WatchResource {
            word: AtomicU64::new(IDLE),
        }));
        let resource = watch.as_c_arg();
        assert_eq!(
            resource.expose_provenance() + DATA_OFFSET,
            ptr::from_ref(&**watch).addr(),
            "the layout of resources has changed"
        );
        // SAFETY: the resource's data, which has just been referred to, lies behind this pointer: it is not null.
        let watch = Self(unsafe { NonNull::new_unchecked(resource.cast_mut()) });
        let for_down = ManuallyDrop::new(watch.clone());
        // SAFETY: the environment is that of the calling process; we hold the resource. No handle of
        // the monitor is requested, since the monitor is never removed.
        let result = unsafe {
            enif_monitor_process(
                env.as_c_arg(),
                watch.0.as_ptr(),
                pid.as_c_arg(),
                ptr::null_mut(),
            )
        };
        if result != 0 {
            drop(ManuallyDrop::into_inner(for_down));
            return None;
        }
        Some(watch)
    }

    fn data(&self) -> &WatchResource {
        // SAFETY: we count as a reference, so the resource is there, and `start` has checked that its
        // data is at this offset.
        unsafe { self.0.byte_add(DATA_OFFSET).cast().as_ref() }
    }

    pub(crate) fn is(&self, data: &WatchResource) -> bool {
        ptr::eq(self.data(), data)
    }

    /// Stores the place of the entry that is about to be inserted.
    pub(crate) fn place(&self, registry: &Registry, location: Location) {
        let place = u64::from(registry.number()) << Location::BITS | location.to_bits();
        let former = self.data().word.fetch_or(place, Ordering::AcqRel);
        debug_assert_eq!(former & !DOWN, IDLE, "the watch stands behind an entry");
    }

    /// Clears the place. Only for the caller that stored it and inserted no entry.
    pub(crate) fn displace(&self) {
        self.data().word.fetch_and(DOWN, Ordering::AcqRel);
    }

    /// Whether the process has exited. To be called after the entry was inserted, or the watch pushed.
    pub(crate) fn has_ended(&self) -> bool {
        // SeqCst: orders the insertion or the push before the load, against the fence in `down`.
        fence(Ordering::SeqCst);
        self.data().word.load(Ordering::Acquire) & DOWN != 0
    }

    /// Makes the watch idle, for the next registration of `pid`. Only for the caller that removed its entry (or
    /// inserted none).
    pub(crate) fn recycle(&self, pid: u64) {
        if self.data().word.fetch_and(DOWN, Ordering::AcqRel) & DOWN != 0 {
            return;
        }
        pools()
            .get_or_insert_with(pid, Pool::default, &pools().guard())
            .push(self.clone());
        if self.has_ended() {
            drain_pool(pid);
        }
    }
}

impl Clone for Watch {
    fn clone(&self) -> Self {
        // SAFETY: we hold the resource.
        unsafe { enif_keep_resource(self.0.as_ptr()) };
        Self(self.0)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // SAFETY: we hold the resource, and do not use it afterwards.
        unsafe { enif_release_resource(self.0.as_ptr()) };
    }
}

impl PartialEq for Watch {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

// ---- Leases ----

/// What an entry carries. Equal leases have the same watch: among the entries of living processes
/// that means the same registration.
#[derive(Clone)]
pub(crate) struct Lease {
    pub(crate) watch: Watch,
    pub(crate) config: Config,
}

impl Lease {
    /// A lease of the same registration.
    pub(crate) fn with_config(&self, config: Config) -> Self {
        Self {
            watch: self.watch.clone(),
            config,
        }
    }

    /// Whether this is the same lease with the same config.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self == other && self.config.is(&other.config)
    }

    /// Makes the watch idle after the entry was removed, or was not inserted, and revokes the config.
    /// `address` is the entry's.
    pub(crate) fn recycle(&self, address: u64) {
        self.config.revoke();
        // The watch of a remote process's entry monitors its sentinel, which is about to exit.
        if self.config.remote().is_none() {
            self.watch.recycle(address);
        }
    }
}

impl PartialEq for Lease {
    fn eq(&self, other: &Self) -> bool {
        self.watch == other.watch
    }
}
