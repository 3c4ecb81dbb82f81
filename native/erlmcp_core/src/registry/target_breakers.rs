//! Circuit breakers of single targets of routes.
//!
//! A breaker belongs to an id of a namespace, and not to a registration: a target that is registered anew again and
//! again keeps its breaker. The outcomes of messages are not known here. Callers report them, so a probe that a route
//! lets through stays under way until its outcome is reported, or until the breaker takes it for lost
//! ([`crate::circuit_breaker`]).
//!
//! A route checks its target's breaker before all other layers, and gives a probe back if one of them refuses. So no
//! layer keeps a trace of a message that another one refuses.
//!
//! While there is no breaker, a route pays one load of a word that only [`TargetBreakers::set`] and
//! [`TargetBreakers::remove`] write.

use std::fmt;
use std::sync::Arc;

use seize::Collector;

use super::entry::{IdHashing, Key};
use super::{Id, Map, Namespace, map};
use crate::churn::Churn;
use crate::circuit_breaker::{CircuitBreaker, Config, ConfigError, Permit, State};
use crate::clock::Clock;
use crate::sync::{AtomicU64, Ordering};

/// The most breakers of a registry: ids may come from input. One takes some 160 bytes, and 8 for each failure of its
/// threshold.
pub const MAX_TARGET_BREAKERS: u64 = 100_000;

/// The most failures within the window that a breaker of a target can be set to. Each of them takes 8 bytes.
pub const MAX_FAILURE_THRESHOLD: u32 = 1_000;

/// Why a target has no breaker with this config.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetBreakerError {
    /// There are [`MAX_TARGET_BREAKERS`] already.
    TooMany,
    /// A field is out of bounds.
    Config(ConfigError),
}

impl From<ConfigError> for TargetBreakerError {
    fn from(error: ConfigError) -> Self {
        Self::Config(error)
    }
}

/// See the module's documentation.
pub struct TargetBreakers {
    /// The number of breakers, those that are being inserted included.
    len: AtomicU64,
    /// By namespace.
    maps: [Map<CircuitBreaker>; Namespace::COUNT],
    churn: Churn,
}

impl TargetBreakers {
    pub(super) fn new(collector: &Arc<Collector>, hashing: &IdHashing) -> Self {
        Self {
            len: AtomicU64::new(0),
            maps: std::array::from_fn(|_| map(collector, hashing)),
            churn: Churn::new(),
        }
    }

    fn map(&self, namespace: Namespace) -> &Map<CircuitBreaker> {
        &self.maps[namespace as usize]
    }

    /// The number of breakers. One load.
    #[inline(always)]
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    /// Whether there is none. One load.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether [`Self::complete_resize`] should be called before a breaker of this id is set: see [`crate::churn`].
    pub fn is_churned(&self, id: &Id<'_>) -> bool {
        self.churn.is_due(id.hash, || self.len())
    }

    /// Costs in proportion to the breakers.
    pub fn complete_resize(&self) {
        for map in &self.maps {
            self.churn.complete_resize(map);
        }
    }

    /// Makes the breaker of an id, closed; or changes the config of the one that there is, which keeps its state and
    /// counts failures anew, unless the config is equal. Concurrent calls for one id make one breaker.
    pub fn set(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        config: Config,
        clock: &impl Clock,
    ) -> Result<(), TargetBreakerError> {
        if config.failure_threshold > MAX_FAILURE_THRESHOLD {
            return Err(ConfigError("failure_threshold").into());
        }
        let change = |breaker: &CircuitBreaker| {
            if breaker.config() == Some(config) {
                return Ok(());
            }
            Ok(breaker.configure(Some(config), clock)?)
        };
        let map = self.map(namespace);
        let guard = map.guard();
        if let Some(breaker) = map.get(id, &guard) {
            return change(breaker);
        }
        let breaker = CircuitBreaker::new(Some(config), clock)?;
        // Before the insertion: a route that starts after this function has returned must find the breaker. Close to the
        // bound a call may be refused although another one that is under way inserts nothing.
        if self.len.fetch_add(1, Ordering::AcqRel) >= MAX_TARGET_BREAKERS {
            self.len.fetch_sub(1, Ordering::AcqRel);
            return Err(TargetBreakerError::TooMany);
        }
        match map.try_insert(Key::without_location(*id), breaker, &guard) {
            Ok(_) => Ok(()),
            Err(occupied) => {
                self.len.fetch_sub(1, Ordering::AcqRel);
                change(occupied.current)
            }
        }
    }

    /// Removes the breaker of an id. Returns whether there was one.
    pub fn remove(&self, namespace: Namespace, id: &Id<'_>) -> bool {
        let map = self.map(namespace);
        let is_removed = map.remove(id, &map.guard()).is_some();
        if is_removed {
            self.churn.removed(id.hash);
            self.len.fetch_sub(1, Ordering::AcqRel);
        }
        is_removed
    }

    /// The result of `f` with the breaker of an id; `None` if it has none.
    pub fn with<R>(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        f: impl FnOnce(&CircuitBreaker) -> R,
    ) -> Option<R> {
        let map = self.map(namespace);
        map.get(id, &map.guard()).map(f)
    }

    /// The result of `route` if the breaker of an id lets a message through, or if there is none; `None` if it refuses. A
    /// probe is given back where `route` returns an error.
    pub(super) fn guarded<R, E>(
        &self,
        namespace: Namespace,
        id: &Id<'_>,
        clock: &impl Clock,
        route: impl FnOnce() -> Result<R, E>,
    ) -> Option<Result<R, E>> {
        let map = self.map(namespace);
        let guard = map.guard();
        let Some(breaker) = map.get(id, &guard) else {
            return Some(route());
        };
        let permit = breaker.check(clock).ok()?;
        let result = route();
        if result.is_err() && permit != Permit::Free {
            breaker.release_probe();
        }
        Some(result)
    }

    /// Calls `each` with the namespace, the kind and the bytes of each id that has a breaker, and with the breaker's
    /// state. No snapshot. One guard, so it costs memory while other threads remove entries.
    pub fn for_each(&self, clock: &impl Clock, mut each: impl FnMut(Namespace, u8, &[u8], State)) {
        for namespace in Namespace::ALL {
            let map = self.map(namespace);
            for (key, breaker) in map.iter(&map.guard()) {
                each(namespace, key.kind(), key.bytes(), breaker.state(clock));
            }
        }
    }
}

impl fmt::Debug for TargetBreakers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TargetBreakers")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
