//! Message stores as resources, and the messages in them.
//!
//! The consumer of a store is the process that has made it. Its exit closes the store (see [`crate::caller`]), and the
//! messages are freed off the schedulers.
//!
//! # How a message is kept
//!
//! A message of atoms, numbers, binaries, local pids, lists, tuples and maps is encoded ([`crate::encoding`]), binaries
//! included: so a part of a large binary is copied, and does not keep the whole. Any other message (with references,
//! ports, funs, bit strings or large integers) is copied into an environment of its own, which keeps alive what
//! it refers to. That takes about 2.5 KB more.

use std::mem;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use erlmcp_core::admission::Admission;
use erlmcp_core::message_store::{Bounds, Bytes, MessageStore, PushError};
use once_cell::race::OnceBox;
use papaya::HashMap;
use rustler::schedule::consume_timeslice;
use rustler::{Encoder, Env, Error, LocalPid, NifResult, Resource, ResourceArc, Term};

use crate::config::{BYTES_PER_WEIGHT, MAX_WEIGHT_ON_NORMAL_SCHEDULER, SharedTerm, Weighed, weigh};
use crate::encoding::{self, Zeros};
use crate::reschedule::{Outcome, Scheduler, Stopped, reschedulable};
use crate::resource::keep_library;
use crate::{atoms, background, caller};

/// A message of this weight with parts of its own takes some 50 µs to free.
const MAX_COPIED_WEIGHT_FREED_IN_PLACE: usize = 1_000;

/// An encoded message is one allocation. One of 1 MB is returned to the operating system.
const MAX_ENCODED_WEIGHT_FREED_IN_PLACE: usize = (1 << 20) / BYTES_PER_WEIGHT;

/// Stores with more messages than this are freed off the schedulers.
const MAX_LEN_FREED_IN_PLACE: u64 = 8;

/// A message of more weight is pushed and decoded on a dirty scheduler. A drain may decode twice as much, or a little
/// more: it stops when it has decoded this much.
const MAX_WEIGHT_IN_PLACE: usize = MAX_WEIGHT_ON_NORMAL_SCHEDULER / 2;

/// The weight of removing a message and beginning to decode it, whatever it is.
const WEIGHT_PER_MESSAGE: usize = 4;

pub(crate) struct Message {
    /// Its terms, and the sixteenth part of the bytes of its binaries.
    weight: usize,
    content: Content,
    /// Of the shard of the store's connection.
    charge: Option<Charge>,
}

/// A message that the admission control of a shard counts as long as this exists.
struct Charge(&'static Admission);

impl Charge {
    fn new(admission: &'static Admission) -> Self {
        admission.hold(1);
        Self(admission)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.0.release(1);
    }
}

enum Content {
    Encoded(Box<[u8]>),
    Copied(SharedTerm),
}

impl Message {
    fn new(term: Term<'_>, Weighed { weight, is_plain }: Weighed) -> NifResult<Self> {
        let content = if is_plain {
            // Its weight is the bound.
            let bytes = encoding::encode(term, isize::MAX as usize, Zeros::Exact)?;
            Content::Encoded(bytes.into())
        } else {
            Content::Copied(SharedTerm::new(term))
        };
        Ok(Self {
            weight,
            content,
            charge: None,
        })
    }

    fn load<'a>(&self, env: Env<'a>) -> NifResult<Term<'a>> {
        match &self.content {
            Content::Encoded(bytes) => encoding::decode(env, bytes),
            Content::Copied(term) => Ok(term.copy(env)),
        }
    }

    fn is_heavy(&self) -> bool {
        self.weight > MAX_WEIGHT_IN_PLACE
    }
}

impl Bytes for Message {
    fn bytes(&self) -> u64 {
        bytes(self.weight)
    }
}

/// What a message of this weight counts.
fn bytes(weight: usize) -> u64 {
    (weight * BYTES_PER_WEIGHT) as u64
}

impl Drop for Message {
    fn drop(&mut self) {
        let max = match self.content {
            Content::Encoded(_) => MAX_ENCODED_WEIGHT_FREED_IN_PLACE,
            Content::Copied(_) => MAX_COPIED_WEIGHT_FREED_IN_PLACE,
        };
        if self.weight > max {
            let nothing = Content::Encoded(Box::default());
            background::free(mem::replace(&mut self.content, nothing));
        }
    }
}

/// A message that is decoded on a dirty scheduler.
pub(crate) struct MessageResource(Message);

impl Resource for MessageResource {}

pub(crate) struct Store {
    pub(crate) messages: MessageStore<Message>,
    consumer: LocalPid,
    number: u64,
    /// Of the shard of the connection that the store belongs to.
    admission: Option<&'static Admission>,
}

/// These stores refuse all pushes from now on. Their messages are freed later, all in one go: each wake-up of the
/// reaper is a system call.
pub(crate) fn close(stores: impl Iterator<Item = Arc<Store>>) {
    let closed: Vec<_> = stores
        .map(|store| {
            store.messages.close();
            Emptied(store)
        })
        .collect();
    if !closed.is_empty() {
        background::free(closed);
    }
}

/// Empties the store when it is dropped, whoever else holds it.
struct Emptied(Arc<Store>);

impl Drop for Emptied {
    fn drop(&mut self) {
        self.0.messages.empty();
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        stores().remove(&self.number, &stores().guard());
    }
}

pub(crate) struct StoreResource(Arc<Store>);

impl Resource for StoreResource {}

/// A counted reference to a store, as a term is.
#[derive(Clone)]
pub(crate) struct Handle(ResourceArc<StoreResource>);

impl PartialEq for Handle {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(&*self.0, &*other.0)
    }
}

impl Drop for StoreResource {
    fn drop(&mut self) {
        // Whoever has the last reference then frees an empty store.
        if self.0.messages.size().0 > MAX_LEN_FREED_IN_PLACE {
            background::free(Emptied(Arc::clone(&self.0)));
        }
    }
}

/// All stores, by number.
fn stores() -> &'static HashMap<u64, Weak<Store>> {
    static STORES: OnceBox<HashMap<u64, Weak<Store>>> = OnceBox::new();
    STORES.get_or_init(Box::default)
}

fn store<'a>(term: Term<'a>) -> NifResult<&'a Arc<Store>> {
    term.try_get_resource::<StoreResource>()
        .map(|resource| &resource.0)
        .ok_or(Error::BadArg)
}

/// The calling process consumes as many stores as it may.
pub(crate) struct TooManyStores;

impl Handle {
    /// An empty store whose consumer is the calling process.
    pub(crate) fn new(
        env: Env<'_>,
        bounds: Bounds,
        admission: Option<&'static Admission>,
    ) -> NifResult<Result<Self, TooManyStores>> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let messages = MessageStore::new(bounds).ok_or(Error::BadArg)?;
        // The reaper frees messages.
        keep_library();
        let store = Arc::new(Store {
            messages,
            consumer: env.pid(),
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            admission,
        });
        // An exiting process gets no result.
        if caller::consume(env, &store) == Some(false) {
            return Ok(Err(TooManyStores));
        }
        stores().insert(store.number, Arc::downgrade(&store), &stores().guard());
        Ok(Ok(Self(ResourceArc::new(StoreResource(store)))))
    }

    pub(crate) fn store(&self) -> &Store {
        &self.0.0
    }

    pub(crate) fn is_full(&self) -> bool {
        self.store().messages.check(bytes(1)) == Err(PushError::Full)
    }

    /// Wakes the consumer.
    pub(crate) fn wake(&self, env: Env<'_>) {
        let message = (
            atoms::erlmcp_message_store(),
            atoms::ready(),
            self.0.clone(),
        );
        background::send(env, self.store().consumer, message);
    }
}

impl Encoder for Handle {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        self.0.encode(env)
    }
}

/// An empty store whose consumer is the calling process; or `too_many_stores`.
#[rustler::nif]
fn message_store_new<'a>(env: Env<'a>, capacity: u64, max_bytes: u64) -> NifResult<Term<'a>> {
    let bounds = Bounds {
        capacity,
        max_bytes,
    };
    Ok(match Handle::new(env, bounds, None)? {
        Ok(handle) => handle.encode(env),
        Err(TooManyStores) => atoms::too_many_stores().encode(env),
    })
}

/// Charges the calling process for the work, so that it is scheduled out as if it had been Erlang's.
fn charge(env: Env<'_>, weight: usize) {
    let percent =
        1 + 99 * weight.min(MAX_WEIGHT_ON_NORMAL_SCHEDULER) / MAX_WEIGHT_ON_NORMAL_SCHEDULER;
    // The result says whether the time is used up. The VM acts on it when the call returns.
    let _ = consume_timeslice(env, percent as i32);
}

fn refusal_term(env: Env<'_>, error: PushError) -> Term<'_> {
    match error {
        PushError::Full => atoms::full(),
        PushError::TooLarge => atoms::message_too_large(),
        PushError::Closed => atoms::closed(),
    }
    .encode(env)
}

/// A message that a store has room for, as far as is known. It is copied when it is pushed; on a dirty scheduler before, since
/// what is done with the store may be done under a guard.
pub(crate) enum Weighty<'a> {
    Weighed(Term<'a>, Weighed),
    Copied(Message),
}

impl<'a> Weighty<'a> {
    /// Weighs a message for a store. The error of [`Outcome`] is that it must be done on a dirty scheduler.
    pub(crate) fn new(
        message: Term<'a>,
        store: &Store,
        scheduler: Scheduler,
    ) -> Result<Result<Self, PushError>, Stopped> {
        let messages = &store.messages;
        // A message has at least one term.
        if let Err(error) = messages.check(bytes(1)) {
            return Ok(Err(error));
        }
        let bound = messages.bounds().max_bytes as usize / BYTES_PER_WEIGHT;
        let max = match scheduler {
            Scheduler::Normal => bound.min(MAX_WEIGHT_IN_PLACE),
            Scheduler::Dirty => bound,
        };
        let Some(weighed) = weigh(message, max, scheduler) else {
            scheduler.require_dirty()?;
            return Ok(Err(PushError::TooLarge));
        };
        if let Err(error) = messages.check(bytes(weighed.weight)) {
            return Ok(Err(error));
        }
        Ok(Ok(match scheduler {
            Scheduler::Normal => Self::Weighed(message, weighed),
            Scheduler::Dirty => Self::Copied(Message::new(message, weighed)?),
        }))
    }

    /// Adds the message to the store. Returns whether the caller has to wake the consumer.
    pub(crate) fn push(self, env: Env<'a>, store: &Store) -> NifResult<Result<bool, PushError>> {
        let mut message = match self {
            Self::Copied(message) => message,
            Self::Weighed(message, weighed) => {
                charge(env, weighed.weight);
                Message::new(message, weighed)?
            }
        };
        // Before the message is in the store.
        message.charge = store.admission.map(Charge::new);
        Ok(store.messages.push(message))
    }
}

/// Adds a message, and wakes the consumer if the store was empty when it last drained it: `ok`, `full`,
/// `message_too_large` or `closed`.
///
/// The consumer is woken here and not in Erlang: a caller that is killed between the two would leave it asleep.
fn message_store_push<'a>(
    env: Env<'a>,
    [of, message]: [Term<'a>; 2],
    scheduler: Scheduler,
) -> Outcome<'a> {
    let store = store(of)?;
    let weighty = match Weighty::new(message, store, scheduler)? {
        Ok(weighty) => weighty,
        Err(error) => return Ok(refusal_term(env, error)),
    };
    match weighty.push(env, store)? {
        Ok(wakes) => {
            if wakes {
                Handle(of.decode()?).wake(env);
            }
            Ok(atoms::ok().encode(env))
        }
        Err(error) => Ok(refusal_term(env, error)),
    }
}

reschedulable!(c"message_store_push", 2, message_store_push);

/// Up to `max` messages, oldest first, with what is left: `{empty, Messages}`, `{more, Messages}`, or `{Message,
/// Messages}` with a next message that [`message_store_open`] decodes. `not_consumer` for another process.
#[rustler::nif]
fn message_store_drain<'a>(env: Env<'a>, of: Term<'a>, max: u64) -> NifResult<Term<'a>> {
    let store = store(of)?;
    if store.consumer != env.pid() {
        return Ok(atoms::not_consumer().encode(env));
    }
    // As many as there are, up to the weight: no reallocation saves a tenth of the time.
    let most = (MAX_WEIGHT_IN_PLACE / WEIGHT_PER_MESSAGE) as u64;
    let expected = max.min(store.messages.size().0).min(most);
    let mut messages = Vec::with_capacity(expected as usize);
    let mut heavy = None;
    let mut failed = None;
    let mut weight = 0;
    let mut charges = 0;
    let is_empty = store.messages.drain(max as usize, |mut message| {
        // Returned together: all routes of the shard read the word.
        if let Some(charge) = message.charge.take() {
            mem::forget(charge);
            charges += 1;
        }
        if message.is_heavy() {
            heavy = Some(message);
            return ControlFlow::Break(());
        }
        weight += message.weight + WEIGHT_PER_MESSAGE;
        match message.load(env) {
            Ok(term) => messages.push(term),
            Err(error) => {
                failed = Some(error);
                return ControlFlow::Break(());
            }
        }
        match weight > MAX_WEIGHT_IN_PLACE {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    if let Some(admission) = store.admission {
        admission.release(charges);
    }
    charge(env, weight);
    // The messages before it must not be lost with it.
    if let Some(error) = failed.filter(|_| messages.is_empty()) {
        return Err(error);
    }
    let rest = match heavy {
        Some(message) => ResourceArc::new(MessageResource(message)).encode(env),
        None if is_empty => atoms::empty().encode(env),
        None => atoms::more().encode(env),
    };
    Ok((rest, messages).encode(env))
}

/// The message that [`message_store_drain`] has left undecoded.
#[rustler::nif(schedule = "DirtyCpu")]
fn message_store_open<'a>(env: Env<'a>, message: Term<'a>) -> NifResult<Term<'a>> {
    message
        .try_get_resource::<MessageResource>()
        .ok_or(Error::BadArg)?
        .0
        .load(env)
}

/// `{Len, Bytes, Capacity, MaxBytes, Consumer, IsClosed}`
#[rustler::nif]
fn message_store_info<'a>(env: Env<'a>, of: Term<'a>) -> NifResult<Term<'a>> {
    let store = store(of)?;
    let (len, bytes) = store.messages.size();
    let Bounds {
        capacity,
        max_bytes,
    } = store.messages.bounds();
    let is_closed = store.messages.is_closed();
    Ok((len, bytes, capacity, max_bytes, store.consumer, is_closed).encode(env))
}

/// `{Stores, Messages, Bytes}` of all stores.
#[rustler::nif(schedule = "DirtyCpu")]
fn message_stores(env: Env<'_>) -> Term<'_> {
    let guard = stores().guard();
    let sizes = stores()
        .iter(&guard)
        .filter_map(|(_, store)| Some(store.upgrade()?.messages.size()));
    sizes
        .fold((0, 0, 0), |(stores, messages, held), (len, bytes)| {
            (stores + 1, messages + len, held + bytes)
        })
        .encode(env)
}
