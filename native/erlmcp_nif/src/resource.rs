//! Registries as resources.

use std::cell::Cell;
use std::mem;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use erlmcp_core::clock::Clock;
use erlmcp_core::diversion::Passage;
use erlmcp_core::error::RegisterError;
use erlmcp_core::registry::{Delivery, Entry, Id, Limits, Location, Namespace};
use erlmcp_core::token_bucket;
use once_cell::race::OnceBox;
use papaya::HashMap;
use rustler::{Encoder, Env, LocalPid, NifResult, Resource, ResourceArc, Term};

use crate::atoms;
use crate::background;
use crate::backpressure::clock;
use crate::config::Config;
use crate::immediate;
use crate::watch::Lease;

/// A registry, with the number by which watches refer to it.
pub(crate) struct Registry {
    core: erlmcp_core::registry::Registry<Lease>,
    number: u32,
    /// The earliest time, by the node's clock, of the next search of the registry (see
    /// [`Registry::may_search`]).
    next_search_ns: AtomicU64,
    /// The word of the pid that is woken for announcements; 0 for none. See [`crate::announcements`].
    reader: AtomicU64,
}

/// A registry that never had more entries than this is searched in some milliseconds, at every request.
const MAX_ENTRIES_ALWAYS_SEARCHED: u64 = 20_000;

/// A larger registry is not searched again for this many times the duration of a search.
const REST_AFTER_SEARCH: u64 = 9;

/// The bits of a registry's number. No registry has number 0.
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
                // Still in use by a registry created four million registries ago.
                continue;
            }
            let registry = Arc::new(Self {
                core: erlmcp_core::registry::Registry::new(limits, clock()),
                number,
                next_search_ns: AtomicU64::new(0),
                reader: AtomicU64::new(0),
            });
            numbers().insert(number, Arc::downgrade(&registry), &guard);
            return registry;
        }
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Whether all entries may be searched, at a cost in proportion to their number.
    pub(crate) fn may_search(&self) -> bool {
        self.core.high_water() <= MAX_ENTRIES_ALWAYS_SEARCHED
            || clock().now_ns() >= self.next_search_ns.load(Ordering::Relaxed)
    }

    /// Runs a search, and sets the earliest time of the next one.
    pub(crate) fn searching(&self, search: impl FnOnce()) {
        let start = clock().now_ns();
        search();
        let end = clock().now_ns();
        let rest = REST_AFTER_SEARCH * end.saturating_sub(start);
        self.next_search_ns.store(end + rest, Ordering::Relaxed);
    }

    // ---- Announcements ----

    /// From now on this process is woken for announcements.
    pub(crate) fn set_reader(&self, env: Env<'_>) {
        let word = immediate::word(env.pid().encode(env));
        self.reader.store(word, Ordering::Release);
    }

    /// Whether the calling process was the reader, which it is no longer.
    pub(crate) fn unset_reader(&self, env: Env<'_>) -> bool {
        let word = immediate::word(env.pid().encode(env));
        self.reader
            .compare_exchange(word, 0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Wakes the reader if there is something to read for it. To be called after each change of connections.
    #[inline]
    pub(crate) fn wake_reader(&self, env: Env<'_>) {
        if self.core.announcements().take_wake() {
            self.send_announced(env);
        }
    }

    #[cold]
    fn send_announced(&self, env: Env<'_>) {
        let reader = self.reader.load(Ordering::Acquire);
        if reader == 0 {
            return;
        }
        // SAFETY: `set_reader` stores words of local pids.
        let pid = unsafe { immediate::term(env, reader) };
        if let Ok(pid) = pid.decode::<LocalPid>() {
            // If it has exited, the next reader begins by reading.
            background::send(env, pid, (atoms::announced(), self.number));
        }
    }

    // ---- Removal: as in the core, and revokes the configs ----

    /// See [`erlmcp_core::registry::Registry::remove`].
    pub(crate) fn remove(
        &self,
        env: Env<'_>,
        namespace: Namespace,
        id: &Id<'_>,
    ) -> Option<Entry<Lease>> {
        self.revoked(env, self.core.remove(namespace, id))
    }

    /// See [`erlmcp_core::registry::Registry::remove_exact`].
    pub(crate) fn remove_exact(
        &self,
        env: Env<'_>,
        namespace: Namespace,
        id: &Id<'_>,
        is_meant: impl Fn(&Lease) -> bool,
    ) -> Option<Entry<Lease>> {
        self.revoked(env, self.core.remove_exact(namespace, id, is_meant))
    }

    /// See [`erlmcp_core::registry::Registry::remove_leased`].
    pub(crate) fn remove_leased(
        &self,
        env: Env<'_>,
        location: &Location,
        address: u64,
        is_meant: impl Fn(&Lease) -> bool,
    ) -> Option<Entry<Lease>> {
        self.revoked(env, self.core.remove_leased(location, address, is_meant))
    }

    /// See [`erlmcp_core::registry::Registry::replace_connection`].
    pub(crate) fn replace_connection(
        &self,
        env: Env<'_>,
        id: Id<'_>,
        shard: u16,
        address: u64,
        lease: impl FnOnce(Location) -> Lease,
    ) -> Result<Option<Entry<Lease>>, RegisterError> {
        let replaced = self.core.replace_connection(id, shard, address, lease);
        replaced.map(|former| self.revoked(env, former))
    }

    fn revoked(&self, env: Env<'_>, removed: Option<Entry<Lease>>) -> Option<Entry<Lease>> {
        self.wake_reader(env);
        removed.inspect(|entry| self.revoke(&entry.lease))
    }

    /// See [`erlmcp_core::registry::Registry::close`].
    pub(crate) fn close(&self, mut removed: impl FnMut(Entry<Lease>)) {
        self.core.close(|entry| {
            entry.lease.config.revoke();
            removed(entry);
        });
    }

    /// Replaces a lease whose config nobody has replaced since it was read as `former`, by one with this config and the
    /// delivery in it. See [`erlmcp_core::registry::Registry::exchange_lease`].
    pub(crate) fn exchange_config(
        &self,
        env: Env<'_>,
        namespace: Namespace,
        id: &Id<'_>,
        former: &Lease,
        config: Config,
    ) -> bool {
        let way = config
            .delivery()
            .map_or(Delivery::Single, |delivery| delivery.way());
        let new = former.with_config(config);
        let is_former = |held: &Lease| held.is(former);
        let replaced = self.core.exchange_lease(namespace, id, is_former, new, way);
        // It may have announced the insertion, or dropped a ticket.
        self.wake_reader(env);
        replaced.map(|lease| self.revoke(&lease)).is_some()
    }

    /// Revokes the config of an entry that was removed or written anew. The entry's memory stays until the registry's
    /// collector frees it, and must not keep alive until then what the config refers to.
    fn revoke(&self, lease: &Lease) {
        lease.config.revoke();
        if lease.config.delivery().is_some() {
            // It may have the last reference to a message store, and this thread's batch of removed entries may never fill up.
            self.core.flush();
        }
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

/// Keeps the library loaded, even when its module is purged. The reaper may still have values to free (see
/// [`background`]), and so may the schedulers' threads when they exit. The VM does not unload a library while
/// a resource of it with a destructor exists.
pub(crate) fn keep_library() {
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

thread_local! {
    /// Whether this thread is freeing a registry in place. A registry to which only a config of that one referred
    /// is freed in the background: otherwise a chain of registries would be freed in one recursion.
    static IS_FREEING: Cell<bool> = const { Cell::new(false) };
}

/// Releases a reference to a registry. If it was the last one and there is much to free, the registry is not
/// freed on the calling scheduler.
pub(crate) fn release(registry: Arc<Registry>) {
    let Some(registry) = Arc::into_inner(registry) else {
        return;
    };
    if registry.high_water() > MAX_ENTRIES_FREED_IN_PLACE
        || registry.announcements().is_allocated()
        || IS_FREEING.get()
    {
        background::free(registry);
        return;
    }
    IS_FREEING.set(true);
    drop(registry);
    IS_FREEING.set(false);
}

static DEFAULT: OnceBox<Arc<Registry>> = OnceBox::new();

/// The default registry, made on first use.
#[inline]
pub(crate) fn default_registry() -> &'static Arc<Registry> {
    DEFAULT.get_or_init(|| Box::new(guarded(Limits::default())))
}

/// A registry with the default limits of token buckets. The default registry has them whether the
/// application runs or not.
fn guarded(limits: Limits) -> Arc<Registry> {
    let registry = Registry::create(limits);
    registry.set_limits(Some(token_bucket::Limits::default()), clock());
    registry
}

/// Makes the default registry with these bounds, unless it is there already.
pub(crate) fn make_default_registry(limits: Limits) -> bool {
    DEFAULT.set(Box::new(guarded(limits))).is_ok()
}

/// The registry that an argument names: the atom `default`; `exclusive` for the same registry used by its
/// owner, whose calls are never diverted (see [`passage`]); or a resource.
#[inline]
pub(crate) fn registry<'a>(term: Term<'a>) -> NifResult<&'a Arc<Registry>> {
    if atoms::default() == term || atoms::exclusive() == term {
        return Ok(default_registry());
    }
    term.try_get_resource::<RegistryResource>()
        .and_then(|resource| resource.0.as_ref())
        .ok_or(rustler::Error::BadArg)
}

/// Changes of servers, transports and bindings of the default registry are diverted.
pub(crate) struct Diverted;

/// Whether a change that names its registry by `of` is diverted. Checked before the other arguments are
/// decoded, since another store takes ids that are too long for this one. [`passage`] decides.
pub(crate) fn diverts_changes(of: Term<'_>, namespace: Namespace) -> bool {
    namespace.is_of_erlmcp()
        && atoms::default() == of
        && default_registry().diversion().sign().diverts_changes()
}

/// Admits a change of `id` that names its registry by `of`. The change is under way while the result lives.
pub(crate) fn passage<'a>(
    of: Term<'_>,
    registry: &'a Registry,
    namespace: Namespace,
    id: &Id<'_>,
) -> Result<Option<Passage<'a>>, Diverted> {
    if !namespace.is_of_erlmcp() || atoms::default() != of {
        return Ok(None);
    }
    registry
        .diversion()
        .enter(id.keyed_hash())
        .map(Some)
        .ok_or(Diverted)
}

/// The result of a look-up that names its registry by `of`, or `diverted`.
pub(crate) fn unless_diverted<'a, E>(
    env: Env<'a>,
    of: Term<'a>,
    namespace: Namespace,
    look_up: impl FnOnce() -> Result<Term<'a>, E>,
) -> Result<Term<'a>, E> {
    if !namespace.is_of_erlmcp() || atoms::default() != of {
        return look_up();
    }
    let diversion = default_registry().diversion();
    let sign = diversion.sign();
    if sign.diverts_lookups() {
        return Ok(atoms::diverted().encode(env));
    }
    let found = look_up()?;
    Ok(if diversion.is_still(sign) {
        found
    } else {
        atoms::diverted().encode(env)
    })
}
