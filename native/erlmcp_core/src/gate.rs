//! A gate that is closed before a walk removes all entries, so that no entry is inserted behind it.
//!
//! # Guarantee
//!
//! One thread inserts an entry and then calls [`Gate::is_closed_behind`]; another one calls [`Gate::close`] and
//! then walks over the entries. At least one of them sees the other: either the first learns that the gate is
//! closed (and removes its entry again), or the walk finds the entry. That is Dekker's store-and-load pattern.

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

    /// Whether the gate is closed, for threads that have not inserted anything yet.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Whether the gate was closed before the walk could see what this thread has inserted.
    pub fn is_closed_behind(&self) -> bool {
        // SeqCst: orders the insertion before the load, against the fence above.
        fence(Ordering::SeqCst);
        self.closed.load(Ordering::Relaxed)
    }
}
