//! A gate that is closed before a walk removes everything, so that nothing slips in behind it.
//!
//! # Guarantee
//!
//! One thread enters something and then asks [`Gate::is_closed_behind`]; another one calls
//! [`Gate::close`] and then walks over what has been entered. At least one of them sees the other:
//! either the first learns that the gate is closed (and takes its thing out again), or the walk
//! finds it. That is Dekker's store-and-load pattern.

use crate::sync::{AtomicBool, Ordering, fence};

/// See the module's documentation.
#[derive(Debug)]
pub struct Gate {
    closed: AtomicBool,
}

impl Gate {
    /// An open gate.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self {
            closed: AtomicBool::new(false),
        }
    }

    /// Closes the gate. The walk comes after this.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        // SeqCst: orders the store before the loads of the walk, against the fence below.
        fence(Ordering::SeqCst);
    }

    /// Opens the gate.
    pub fn open(&self) {
        self.closed.store(false, Ordering::Release);
    }

    /// Whether the gate is closed, for those who have not entered anything yet.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Whether the gate was closed before what this thread entered could be seen by the walk.
    pub fn is_closed_behind(&self) -> bool {
        // SeqCst: orders the entry before the load, against the fence above.
        fence(Ordering::SeqCst);
        self.closed.load(Ordering::Relaxed)
    }
}
