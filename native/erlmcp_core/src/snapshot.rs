//! A value that is replaced as a whole while readers hold earlier ones.
//!
//! Epoch-based reclamation (Fraser, *Practical lock-freedom*, 2004) as implemented by `crossbeam-epoch`: a reader
//! pins the epoch and then follows the pointer. A value that a writer has replaced is freed when all readers of
//! that time have unpinned. Reading is wait-free and writes nothing but the thread's own epoch.
//!
//! This is the only module of the crate with `unsafe` code.

#![allow(unsafe_code)]

use std::fmt;
use std::sync::atomic::Ordering;

use crossbeam_epoch::{Atomic, Owned, pin};

/// See the module's documentation.
pub(crate) struct Snapshot<T: Send + Sync + 'static> {
    /// Never null.
    value: Atomic<T>,
}

impl<T: Send + Sync + 'static> Snapshot<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            value: Atomic::new(value),
        }
    }

    /// Calls `read` with the present value.
    #[inline]
    pub(crate) fn read<R>(&self, read: impl FnOnce(&T) -> R) -> R {
        let guard = pin();
        // SAFETY: the pointer is from `Owned` and not null. Only `update` destroys what it points to, deferred
        // until no guard of this time is left.
        read(unsafe { self.value.load(Ordering::Acquire, &guard).deref() })
    }

    /// Replaces the value by what `next` makes of it, unless that is an error. `next` is called again if another
    /// thread has replaced the value meanwhile.
    pub(crate) fn update<E>(&self, mut next: impl FnMut(&T) -> Result<T, E>) -> Result<(), E> {
        let guard = pin();
        let mut held = self.value.load(Ordering::Acquire, &guard);
        loop {
            // SAFETY: as in `read`.
            let new = Owned::new(next(unsafe { held.deref() })?);
            match self.value.compare_exchange(
                held,
                new,
                Ordering::AcqRel,
                Ordering::Acquire,
                &guard,
            ) {
                Ok(_) => {
                    // SAFETY: we alone have just removed it from the only place where readers find it.
                    unsafe { guard.defer_destroy(held) };
                    return Ok(());
                }
                Err(lost) => held = lost.current,
            }
        }
    }
}

impl<T: Send + Sync + 'static> Drop for Snapshot<T> {
    fn drop(&mut self) {
        let value = std::mem::replace(&mut self.value, Atomic::null());
        // SAFETY: `&mut self`, so no reader and no writer is left.
        drop(unsafe { value.into_owned() });
    }
}

impl<T: Send + Sync + fmt::Debug + 'static> fmt::Debug for Snapshot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.read(|value| f.debug_tuple("Snapshot").field(value).finish())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn readers_see_whole_values_and_all_are_freed() {
        let alive = Arc::new(());
        let made = |n: u64| (n, !n, Arc::clone(&alive));
        let snapshot = Snapshot::new(made(0));
        let rounds = if cfg!(miri) { 50 } else { 10_000 };
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..rounds {
                        snapshot.read(|value| {
                            let (n, inverse, _) = value;
                            assert_eq!(*n, !inverse);
                        });
                    }
                });
                scope.spawn(|| {
                    for _ in 0..rounds {
                        let counted = |value: &(u64, u64, Arc<()>)| Ok::<_, ()>(made(value.0 + 1));
                        snapshot.update(counted).unwrap();
                    }
                });
            }
        });
        snapshot.read(|value| assert_eq!(value.0, 2 * rounds));
        drop(snapshot);
        // Threads hand over what they have not freed when they exit, which a join does not wait for.
        for _ in 0..10_000 {
            pin().flush();
            if Arc::strong_count(&alive) == 1 {
                return;
            }
            thread::yield_now();
        }
        panic!("{} values were not freed", Arc::strong_count(&alive) - 1);
    }
}
