//! Frees values that take long to free, off the schedulers. Also sends what a killed process cannot send.
//!
//! One thread, the reaper, frees the values of a queue. The first caller of [`free`] starts it, and it never
//! exits. It is not a scheduler, so Erlang processes run while it frees.
//!
//! # No value is lost
//!
//! A caller pushes its value and then wakes the reaper, if the reaper has published its handle in `REAPER`.
//! The reaper publishes the handle before its first pop. Each side stores before it loads what the other one
//! stores (Dekker): so either the reaper is woken after the push, or it finds the value. A wake-up that comes
//! before the reaper parks keeps it from parking.
//!
//! If no thread can be spawned, the caller that has tried to start it empties the queue itself. A caller
//! that finds the start under way has updated `IS_STARTED` after its push. The caller that failed to start
//! updates the same word before it empties the queue, so it finds that value. Any later caller tries again.
//!
//! # Nobody waits
//!
//! The queue has no lock: a push boxes the value and adds the box to the queue by a compare-and-swap. Every
//! 31st push links the next block of the queue; a push at just that moment spins until it has. Waking is one
//! swap and, if the reaper is parked, a system call that does not wait.
//!
//! # The library stays loaded
//!
//! The thread runs code of this library, so the VM must not unload it. The VM does not unload a library while
//! a resource with a destructor exists, and the first registry, keyed limiter or message store leaves one for good.
//! Without these there is nothing to do here. When the VM exits, the thread exits with it, whatever is in the queue:
//! the memory is returned with all other memory.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread::{self, Thread};

use crossbeam_queue::SegQueue;
use once_cell::race::OnceBox;
use rustler::env::OwnedEnv;
use rustler::{Encoder, Env, LocalPid};

static QUEUE: SegQueue<Box<dyn Any + Send>> = SegQueue::new();
static REAPER: OnceBox<Thread> = OnceBox::new();
static IS_STARTED: AtomicBool = AtomicBool::new(false);

/// Frees `value` some time later.
pub(crate) fn free(value: impl Any + Send) {
    QUEUE.push(Box::new(value));
    // SeqCst: orders the push before the load of `REAPER`, against the fence in `reap`.
    fence(Ordering::SeqCst);
    match REAPER.get() {
        Some(reaper) => reaper.unpark(),
        None => start(),
    }
}

/// Sends a message to a local process, which may have exited.
///
/// The VM does not send from a process that was killed while its native function runs on a dirty scheduler. Then the
/// reaper sends it; without a reaper, because no thread can be spawned, the message is lost.
pub(crate) fn send<M>(env: Env<'_>, to: LocalPid, message: M)
where
    M: Encoder + Send + 'static,
{
    if env.send(&to, &message).is_err() {
        free(Unsent { to, message });
    }
}

/// Is sent when it is dropped.
struct Unsent<M: Encoder> {
    to: LocalPid,
    message: M,
}

impl<M: Encoder> Drop for Unsent<M> {
    fn drop(&mut self) {
        // An error: the receiver has exited.
        let _ = OwnedEnv::new().send_and_clear(&self.to, |env| self.message.encode(env));
    }
}

#[cold]
fn start() {
    if IS_STARTED.swap(true, Ordering::AcqRel) {
        // The reaper is about to publish its handle, or the caller that starts it is about to fail.
        return;
    }
    let started = thread::Builder::new()
        .name("erlmcp_reaper".into())
        .spawn(reap);
    if started.is_err() {
        // A swap and not a store, so that `empty_queue` finds the values that were pushed meanwhile.
        IS_STARTED.swap(false, Ordering::AcqRel);
        empty_queue();
    }
}

fn reap() {
    // Nobody else sets it.
    let _ = REAPER.set(Box::new(thread::current()));
    // SeqCst: orders the store of `REAPER` before the first pop, against the fence in `free`.
    fence(Ordering::SeqCst);
    loop {
        empty_queue();
        thread::park();
    }
}

fn empty_queue() {
    while let Some(value) = QUEUE.pop() {
        // A destructor that panics must not keep the other values from being freed.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(value)));
    }
}
