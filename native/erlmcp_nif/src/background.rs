//! Freeing what takes long to free, off the schedulers.
//!
//! One thread, the reaper, frees what others have put into a queue. It is started by the first one who
//! does so and never ends. It is no scheduler: what it takes, others get done meanwhile.
//!
//! # Nothing is lost
//!
//! Whoever puts something into the queue then wakes the reaper, if it has made itself known. The reaper
//! makes itself known before it looks into the queue for the first time. Each side writes before it
//! looks at what the other one writes (Dekker): so either the reaper is woken after the value was there,
//! or it finds the value. A wake-up that comes before the reaper sleeps keeps it from doing so.
//!
//! Where no thread can be had, the one who has tried to start it empties the queue himself. Each one who
//! finds the start under way has said so in the same word before, so that his value is seen then; each
//! one after that tries anew.
//!
//! # Nobody waits
//!
//! The queue has no lock: a value is put into a box of its own and that into the queue by one exchange; every
//! 31st one links the next block of the queue, and who comes at just that moment spins until it has. Waking
//! is one exchange and, if the reaper sleeps, a system call that does not wait.
//!
//! # The library stays
//!
//! The thread runs code of this library, so that the VM must not unload it. It does not while there is a
//! resource that has a destructor, and `Registry::create` has left one for good. Without a registry
//! there is nothing to free here. When the VM ends, the thread ends with it, whatever is in the queue:
//! the memory goes back with all other memory.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread::{self, Thread};

use crossbeam_queue::SegQueue;
use once_cell::race::OnceBox;

static QUEUE: SegQueue<Box<dyn Any + Send>> = SegQueue::new();
static REAPER: OnceBox<Thread> = OnceBox::new();
static IS_STARTED: AtomicBool = AtomicBool::new(false);

/// Frees `value` some time later.
pub(crate) fn free(value: impl Any + Send) {
    QUEUE.push(Box::new(value));
    // SeqCst: the queue is written before this fence and `REAPER` is read after it; against the one in
    // `reap`.
    fence(Ordering::SeqCst);
    match REAPER.get() {
        Some(reaper) => reaper.unpark(),
        None => start(),
    }
}

#[cold]
fn start() {
    if IS_STARTED.swap(true, Ordering::AcqRel) {
        // It makes itself known just now, or whoever starts it will find that he cannot.
        return;
    }
    let started = thread::Builder::new()
        .name("erlmcp_reaper".into())
        .spawn(reap);
    if started.is_err() {
        // An exchange and not a store, to see what those have put into the queue who came meanwhile.
        IS_STARTED.swap(false, Ordering::AcqRel);
        empty_queue();
    }
}

fn reap() {
    // Nobody else sets it.
    let _ = REAPER.set(Box::new(thread::current()));
    fence(Ordering::SeqCst);
    loop {
        empty_queue();
        thread::park();
    }
}

fn empty_queue() {
    while let Some(value) = QUEUE.pop() {
        // One that cannot be freed must not keep the others from it.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(value)));
    }
}
