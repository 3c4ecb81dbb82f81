//! The resources: registries, and leases, which tie an entry to the life of a process.

use std::sync::{Arc, Weak};
use std::thread;

use erlmcp_core::registry::{Limits, Location, Namespace};
use once_cell::race::OnceBox;
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
            registry.remove_leased(&self.location, |held| std::ptr::eq(&*held.0, self));
            release(registry);
        }
    }
}

/// A counted reference to a lease. Equal leases are the same one.
#[derive(Clone)]
pub(crate) struct Lease(pub(crate) ResourceArc<LeaseResource>);

impl Lease {
    pub(crate) fn new(registry: &Arc<Registry>, location: Location, config: Config) -> Self {
        Self(ResourceArc::new(LeaseResource {
            registry: Arc::downgrade(registry),
            location,
            config,
        }))
    }
}

impl PartialEq for Lease {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_c_arg() == other.0.as_c_arg()
    }
}
