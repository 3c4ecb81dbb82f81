//! The resources: registries, and leases, which tie an entry to the life of a process.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::{Arc, Weak};
use std::thread;

use erlmcp_core::registry::{Limits, Location, Namespace};
use once_cell::race::OnceBox;
use rustler::sys::{enif_keep_resource, enif_monitor_process, enif_release_resource};
use rustler::{Env, Error, LocalPid, Monitor, NifResult, Resource, ResourceArc, Term};

use crate::atoms;
use crate::config::Config;

pub(crate) type Registry = erlmcp_core::registry::Registry<Lease>;

/// A registry as a term. It lives as long as something refers to it.
pub(crate) struct RegistryResource(pub(crate) Option<Arc<Registry>>);

impl Resource for RegistryResource {}

impl Drop for RegistryResource {
    fn drop(&mut self) {
        if let Some(registry) = self.0.take() {
            release(registry);
        }
    }
}

/// Freeing this many entries takes well under a millisecond.
const MAX_ENTRIES_FREED_IN_PLACE: u64 = 500;

/// Lets go of a registry; frees it on a thread of its own if it is the last one to do so and there
/// is much to free, since this runs on a scheduler.
fn release(registry: Arc<Registry>) {
    let Some(registry) = Arc::into_inner(registry) else {
        return;
    };
    let entries: u64 = Namespace::ALL.iter().map(|n| registry.count(*n)).sum();
    if entries > MAX_ENTRIES_FREED_IN_PLACE {
        // Without a thread to be had, the closure and the registry in it are freed here.
        let _ = thread::Builder::new().spawn(move || drop(registry));
    }
}

static DEFAULT: OnceBox<Arc<Registry>> = OnceBox::new();

/// The default registry, made on first use.
#[inline]
pub(crate) fn default_registry() -> &'static Arc<Registry> {
    DEFAULT.get_or_init(|| Box::new(Arc::new(Registry::new(Limits::default()))))
}

/// Makes the default registry with these bounds, unless it is there already.
pub(crate) fn make_default_registry(limits: Limits) -> bool {
    DEFAULT
        .set(Box::new(Arc::new(Registry::new(limits))))
        .is_ok()
}

/// The registry that an argument names: the atom `default`, or a resource.
#[inline]
pub(crate) fn registry<'a>(term: Term<'a>) -> NifResult<&'a Arc<Registry>> {
    if atoms::default() == term {
        return Ok(default_registry());
    }
    term.try_get_resource::<RegistryResource>()
        .and_then(|resource| resource.0.as_ref())
        .ok_or(Error::BadArg)
}

/// One registration: the resource that monitors its process. Dropping the last reference ends the
/// monitor.
pub(crate) struct LeaseResource {
    registry: Weak<Registry>,
    pub(crate) location: Location,
    pub(crate) config: Config,
}

impl Resource for LeaseResource {
    const IMPLEMENTS_DOWN: bool = true;

    /// Runs when the monitored process has ended, on the scheduler that ended it. Removes the
    /// entry that holds this very lease: another one under the same id has another lease, and while
    /// this callback runs nothing else can stand at our address.
    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, _monitor: Monitor) {
        if let Some(registry) = self.registry.upgrade() {
            registry.remove_leased(&self.location, |held| held.is(self));
            release(registry);
        }
    }
}

/// A counted reference to a lease: rustler's `ResourceArc` in one word instead of two, since every
/// entry holds one. Equal leases are the same one.
pub(crate) struct Lease(NonNull<LeaseResource>);

// SAFETY: a counted reference to something that is `Send` and `Sync`.
unsafe impl Send for Lease {}
// SAFETY: as above.
unsafe impl Sync for Lease {}

/// From the start of the VM's allocation, which is aligned for a pointer, to the data in it.
const DATA_OFFSET: usize = align_of::<LeaseResource>();

impl Lease {
    pub(crate) fn new(registry: &Arc<Registry>, location: Location, config: Config) -> Self {
        let lease = ManuallyDrop::new(ResourceArc::new(LeaseResource {
            registry: Arc::downgrade(registry),
            location,
            config,
        }));
        let data = NonNull::from(&**lease);
        assert_eq!(
            lease.as_c_arg().addr() + DATA_OFFSET,
            data.as_ptr().addr(),
            "the layout of resources has changed"
        );
        Self(data)
    }

    fn resource(&self) -> *const c_void {
        // SAFETY: `new` has checked that the allocation starts there.
        unsafe { self.0.as_ptr().byte_sub(DATA_OFFSET).cast() }
    }

    /// Whether this is the lease at an address.
    pub(crate) fn is(&self, data: &LeaseResource) -> bool {
        std::ptr::eq(self.0.as_ptr(), data)
    }

    /// Ties the lease to the life of a process; false if that has ended.
    pub(crate) fn monitor(&self, env: Env<'_>, pid: &LocalPid) -> bool {
        // SAFETY: the environment is that of the calling process; we hold the resource. The handle
        // of the monitor is not asked for: it ends with the resource.
        let result = unsafe {
            enif_monitor_process(
                env.as_c_arg(),
                self.resource(),
                pid.as_c_arg(),
                std::ptr::null_mut(),
            )
        };
        result == 0
    }
}

impl Deref for Lease {
    type Target = LeaseResource;

    fn deref(&self) -> &LeaseResource {
        // SAFETY: we count as a reference, so the resource is there.
        unsafe { self.0.as_ref() }
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        // SAFETY: we hold the resource.
        unsafe { enif_keep_resource(self.resource()) };
        Self(self.0)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // SAFETY: we hold the resource, and never again.
        unsafe { enif_release_resource(self.resource()) };
    }
}

impl PartialEq for Lease {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}
