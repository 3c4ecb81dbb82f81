//! Watches: resources that monitor a process and, when it ends, remove the entry it stands behind.
//!
//! # A monitor is never taken back
//!
//! `process_info(Pid, monitored_by)`, which every observer asks, makes references to the resources
//! that monitor a process. In OTP 25 it may come upon one that was freed after its monitor was taken
//! back (by `enif_demonitor_process` or with the resource itself) but before the process had handled
//! the signal that says so, and the VM then crashes. So a watch holds a reference to itself from its
//! monitor until the process has ended. When its entry goes earlier the watch is idle and waits in
//! a pool for the next registration of the same process, of whatever id and in whatever registry.
//! A process has as many watches as it has had registrations at one time.
//!
//! # Protocol
//!
//! One word: the number of the registry and the location of the entry, or neither (idle), and
//! whether the process has ended (`DOWN`, for good).
//!
//! * Registering: take a watch from the pool or make one; write the entry's place into the word;
//!   enter the entry; then look at `DOWN`, and if it is set take the entry out again.
//! * The process ends: set `DOWN`; then remove the entry at the place in the word.
//!
//! Each side writes before it looks at what the other one writes (Dekker), so one of the two takes
//! the entry out. A watch only ever stands behind entries of its own process: whichever entry it is
//! found behind after `DOWN`, that one must go.
//!
//! * Removing: whoever took the entry out empties the word and puts the watch into the pool; then
//!   looks at `DOWN`, and if it is set takes one watch from the pool, as `down` does after setting it.
//!
//! After each watch that is put into the pool of a process that ends, one is taken from it, either by
//! the one who put it there or by its `down`. An attempt that fails has found the pool empty, so no
//! watch stays in it, and each call frees one watch however many there are.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

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

impl Resource for WatchResource {
    const IMPLEMENTS_DOWN: bool = true;

    /// Runs when the process has ended, on the scheduler that ended it.
    fn down<'a>(&'a self, env: Env<'a>, pid: LocalPid, _monitor: Monitor) {
        let word = self.word.fetch_or(DOWN, Ordering::AcqRel);
        // SeqCst: `DOWN` is written before this fence, the entry and the pool are read after it;
        // against the fences in `Watch::has_ended` and `Watch::recycle`.
        fence(Ordering::SeqCst);
        let number = (word >> Location::BITS) as u32;
        if word != IDLE
            && let Some(registry) = Registry::of_number(number)
        {
            let location = Location::from_bits(word & ((1 << Location::BITS) - 1));
            registry.remove_leased(&location, |held| held.watch.is(self));
            release(registry);
        }
        drain_pool(immediate::word(pid.encode(env)));
        // SAFETY: the reference that `Watch::start` left for us. The VM holds another one while
        // this callback runs.
        unsafe { enif_release_resource(resource_of(NonNull::from(self))) };
    }
}

// ---- The pool of idle watches, by process ----

type Pools = HashMap<u64, Arc<SegQueue<Watch>>>;

fn pools() -> &'static Pools {
    static POOLS: OnceBox<Pools> = OnceBox::new();
    POOLS.get_or_init(Box::default)
}

/// Takes a watch from the pool of a process that has ended, and the pool from the table if it is
/// empty. Who is putting another one into it just then loses nothing: it goes with the pool.
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
/// entry holds one.
pub(crate) struct Watch(NonNull<WatchResource>);

// SAFETY: a counted reference to something that is `Send` and `Sync`.
unsafe impl Send for Watch {}
// SAFETY: as above.
unsafe impl Sync for Watch {}

/// From the start of the VM's allocation, which is aligned for a pointer, to the data in it.
const DATA_OFFSET: usize = align_of::<WatchResource>();

fn resource_of(data: NonNull<WatchResource>) -> *const c_void {
    // SAFETY: `Watch::start` has checked that the allocation starts there.
    unsafe { data.as_ptr().byte_sub(DATA_OFFSET).cast() }
}

impl Watch {
    /// An idle watch of a process; `None` if the process has ended.
    pub(crate) fn of(env: Env<'_>, pid: &LocalPid) -> Option<Self> {
        let key = immediate::word(pid.encode(env));
        if let Some(pool) = pools().get(&key, &pools().guard())
            && let Some(watch) = pool.pop()
        {
            return Some(watch);
        }
        Self::start(env, pid)
    }

    fn start(env: Env<'_>, pid: &LocalPid) -> Option<Self> {
        let watch = ManuallyDrop::new(ResourceArc::new(WatchResource {
            word: AtomicU64::new(IDLE),
        }));
        let data = NonNull::from(&**watch);
        assert_eq!(
            watch.as_c_arg().addr() + DATA_OFFSET,
            data.as_ptr().addr(),
            "the layout of resources has changed"
        );
        let watch = Self(data);
        let for_down = ManuallyDrop::new(watch.clone());
        // SAFETY: the environment is that of the calling process; we hold the resource. The handle
        // of the monitor is not asked for, since it is never taken back.
        let result = unsafe {
            enif_monitor_process(
                env.as_c_arg(),
                resource_of(data),
                pid.as_c_arg(),
                std::ptr::null_mut(),
            )
        };
        if result != 0 {
            drop(ManuallyDrop::into_inner(for_down));
            return None;
        }
        Some(watch)
    }

    fn data(&self) -> &WatchResource {
        // SAFETY: we count as a reference, so the resource is there.
        unsafe { self.0.as_ref() }
    }

    fn is(&self, data: &WatchResource) -> bool {
        std::ptr::eq(self.0.as_ptr(), data)
    }

    /// Writes the place of the entry that is about to be entered.
    pub(crate) fn place(&self, registry: &Registry, location: Location) {
        let place = u64::from(registry.number()) << Location::BITS | location.to_bits();
        let former = self.data().word.fetch_or(place, Ordering::AcqRel);
        debug_assert_eq!(former & !DOWN, IDLE, "the watch stands behind an entry");
    }

    /// Takes the place back; for the one who wrote it and entered nothing.
    pub(crate) fn displace(&self) {
        self.data().word.fetch_and(DOWN, Ordering::AcqRel);
    }

    /// Whether the process has ended. Asked after the entry was entered.
    pub(crate) fn has_ended(&self) -> bool {
        // SeqCst: orders the entry before the load, against the fence in `down`.
        fence(Ordering::SeqCst);
        self.data().word.load(Ordering::Acquire) & DOWN != 0
    }

    /// Makes the watch idle, for the next registration of `pid`. Only for the one who took its
    /// entry out (or never entered one).
    pub(crate) fn recycle(&self, pid: u64) {
        if self.data().word.fetch_and(DOWN, Ordering::AcqRel) & DOWN != 0 {
            return;
        }
        pools()
            .get_or_insert_with(pid, Arc::default, &pools().guard())
            .push(self.clone());
        if self.has_ended() {
            drain_pool(pid);
        }
    }
}

impl Clone for Watch {
    fn clone(&self) -> Self {
        // SAFETY: we hold the resource.
        unsafe { enif_keep_resource(resource_of(self.0)) };
        Self(self.0)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // SAFETY: we hold the resource, and never again.
        unsafe { enif_release_resource(resource_of(self.0)) };
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
    /// Makes the watch idle after the entry was taken out. `address` is the entry's.
    pub(crate) fn recycle(&self, address: u64) {
        // The watch of a remote process's entry is its sentinel's, which is about to end.
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
