//! Freeing what takes long to free, off the schedulers.

use std::thread;

/// Frees `value` on a thread of its own.
pub(crate) fn free(value: impl Send + 'static) {
    // Without a thread to be had, the closure and the value in it are freed here.
    let _ = thread::Builder::new().spawn(move || drop(value));
}
