//! The atomics of this crate: those of `std`, or loom's under `cfg(loom)`.
//!
//! Outside of loom's models a [`Mutex`] is only tried ([`Mutex::try_lock`]): no thread waits for one.

#[cfg(loom)]
pub(crate) use loom::sync::Mutex;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence,
};
#[cfg(not(loom))]
pub(crate) use std::sync::Mutex;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence,
};

#[cfg(loom)]
pub(crate) use self::stand_in::SegQueue;
#[cfg(not(loom))]
pub(crate) use crossbeam_queue::SegQueue;

/// `len` zeros, from the allocator's zeroed pages where it has them, so that a large array costs nothing until it
/// is used.
#[cfg(not(loom))]
pub(crate) fn zeroed_u64s(len: usize) -> Box<[AtomicU64]> {
    bytemuck::zeroed_slice_box(len)
}

#[cfg(loom)]
pub(crate) fn zeroed_u64s(len: usize) -> Box<[AtomicU64]> {
    (0..len).map(|_| AtomicU64::new(0)).collect()
}

/// As [`zeroed_u64s`], of half the size.
#[cfg(not(loom))]
pub(crate) fn zeroed_u32s(len: usize) -> Box<[AtomicU32]> {
    bytemuck::zeroed_slice_box(len)
}

#[cfg(loom)]
pub(crate) fn zeroed_u32s(len: usize) -> Box<[AtomicU32]> {
    (0..len).map(|_| AtomicU32::new(0)).collect()
}

/// What `SegQueue` promises, for loom. A pop waits for a push that has begun, as there.
#[cfg(loom)]
mod stand_in {
    use loom::sync::Mutex;
    use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use loom::thread;

    /// More than any model pushes.
    const SLOTS: usize = 8;

    pub(crate) struct SegQueue<T> {
        head: AtomicUsize,
        tail: AtomicUsize,
        slots: [(AtomicBool, Mutex<Option<T>>); SLOTS],
    }

    impl<T> SegQueue<T> {
        pub(crate) fn new() -> Self {
            Self {
                head: AtomicUsize::new(0),
                tail: AtomicUsize::new(0),
                slots: std::array::from_fn(|_| (AtomicBool::new(false), Mutex::new(None))),
            }
        }

        pub(crate) fn push(&self, value: T) {
            let (is_written, slot) = &self.slots[self.tail.fetch_add(1, Ordering::AcqRel)];
            *slot.lock().unwrap() = Some(value);
            is_written.store(true, Ordering::Release);
        }

        pub(crate) fn pop(&self) -> Option<T> {
            loop {
                let head = self.head.load(Ordering::Acquire);
                if head >= self.tail.load(Ordering::Acquire) {
                    return None;
                }
                let (is_written, slot) = &self.slots[head];
                if !is_written.load(Ordering::Acquire) {
                    thread::yield_now();
                    continue;
                }
                let next =
                    self.head
                        .compare_exchange(head, head + 1, Ordering::AcqRel, Ordering::Acquire);
                if next.is_ok() {
                    return slot.lock().unwrap().take();
                }
            }
        }
    }
}
