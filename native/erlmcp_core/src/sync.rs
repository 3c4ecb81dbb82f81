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
