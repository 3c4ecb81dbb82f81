//! Registries as resources.

use std::mem;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use erlmcp_core::diversion::Passage;
use erlmcp_core::registry::{Id, Limits, Namespace};
use erlmcp_core::token_bucket;
use once_cell::race::OnceBox;
use papaya::HashMap;
use rustler::{NifResult, Resource, ResourceArc, Term};

use crate::atoms;
use crate::background;
use crate::backpressure::clock;
use crate::watch::Lease;

/// A registry, with the number by which its entries' watches know it.
pub(crate) struct Registry {
    core: erlmcp_core::registry::Registry<Lease>,
    number: u32,
}

/// Numbers of registries take this many bits. 0 is none.
pub(crate) const NUMBER_BITS: u32 = 22;

type Numbers = HashMap<u32, Weak<Registry>>;

fn numbers() -> &'static Numbers {
    static NUMBERS: OnceBox<Numbers> = OnceBox::new();
    NUMBERS.get_or_init(Box::default)
}

impl Registry {
    pub(crate) fn create(limits: Limits) -> Arc<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        keep_library();
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed) % ((1 << NUMBER_BITS) - 1) + 1;
            let guard = numbers().guard();
            if numbers().try_insert(number, Weak::new(), &guard).is_err() {
                // Still that of a registry made four million registries ago.
                continue;
            }
            let registry = Arc::new(Self {
                core: erlmcp_core::registry::Registry::new(limits, clock()),
                number,
            });
            numbers().insert(number, Arc::downgrade(&registry), &guard);
            return registry;
        }
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// The registry of a number, unless it is gone.
    pub(crate) fn of_number(number: u32) -> Option<Arc<Self>> {
        numbers().get(&number, &numbers().guard())?.upgrade()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        for namespace in Namespace::ALL {
            self.core
                .for_each(namespace, |_, entry| entry.lease.recycle(entry.address));
        }
        numbers().remove(&self.number, &numbers().guard());
    }
}

impl Deref for Registry {
    type Target = erlmcp_core::registry::Registry<Lease>;

    fn deref(&self) -> &Self::Target {
        &self.core
    }
}

/// A registry as a term. It lives as long as something refers to it.
pub(crate) struct RegistryResource(pub(crate) Option<Arc<Registry>>);

impl Resource for RegistryResource {}

/// Keeps the library in memory, also when its module is purged: what was freed in the background may
/// still be (see [`background`]), and so may what the schedulers' threads have left to be freed when
/// they end. The VM does not unload a library while there is a resource of it that has a destructor.
fn keep_library() {
    static IS_KEPT: AtomicBool = AtomicBool::new(false);
    if !IS_KEPT.swap(true, Ordering::Relaxed) {
        mem::forget(ResourceArc::new(RegistryResource(None)));
    }
}

impl Drop for RegistryResource {
    fn drop(&mut self) {
        if let Some(registry) = self.0.take() {
            release(registry);
        }
    }
}

/// Freeing this many entries takes well under a millisecond.
const MAX_ENTRIES_FREED_IN_PLACE: u64 = 500;

/// Lets go of a registry; if it is the last one to do so and there is much to free, not on the
/// scheduler that this runs on.
pub(crate) fn release(registry: Arc<Registry>) {
    let Some(registry) = Arc::into_inner(registry) else {
        return;
    };
    if registry.high_water() > MAX_ENTRIES_FREED_IN_PLACE {
        background::free(registry);
    }
}

static DEFAULT: OnceBox<Arc<Registry>> = OnceBox::new();

/// The default registry, made on first use.
#[inline]
pub(crate) fn default_registry() -> &'static Arc<Registry> {
    DEFAULT.get_or_init(|| Box::new(guarded(Limits::default())))
}

/// A registry with the default limits of token buckets: the default one has them, whether the
/// application runs or not.
fn guarded(limits: Limits) -> Arc<Registry> {
    let registry = Registry::create(limits);
    registry
        .set_limits(Some(token_bucket::Limits::default()), clock())
        .unwrap_or_else(|_| unreachable!("these are the first limits"));
    registry
}

/// Makes the default registry with these bounds, unless it is there already.
pub(crate) fn make_default_registry(limits: Limits) -> bool {
    DEFAULT.set(Box::new(guarded(limits))).is_ok()
}

/// The registry that an argument names: the atom `default`, or `exclusive` for the same one in the
/// hands of whoever has diverted the others (see [`passage`]), or a resource.
#[inline]
pub(crate) fn registry<'a>(term: Term<'a>) -> NifResult<&'a Arc<Registry>> {
    if atoms::default() == term || atoms::exclusive() == term {
        return Ok(default_registry());
    }
    term.try_get_resource::<RegistryResource>()
        .and_then(|resource| resource.0.as_ref())
        .ok_or(rustler::Error::BadArg)
}

/// The changes of servers, transports and bindings of the default registry were diverted.
pub(crate) struct Diverted;

/// Lets a change of `id` pass that names its registry by `of`. The change is made while the result
/// lives.
pub(crate) fn passage<'a>(
    of: Term<'_>,
    registry: &'a Registry,
    namespace: Namespace,
    id: &Id<'_>,
) -> Result<Option<Passage<'a>>, Diverted> {
    if namespace == Namespace::Connection || atoms::default() != of {
        return Ok(None);
    }
    registry
        .diversion()
        .enter(id.keyed_hash())
        .map(Some)
        .ok_or(Diverted)
}
