//! How the messages of a connection of the default registry are delivered: to the mailbox of its process one by one, or as
//! lists, or to a message store.
//!
//! The choice is part of the config of the connection's lease, so it ends with the registration. Only the connection's
//! process makes it, as it has to handle what comes.
//!
//! # Back to the mailbox
//!
//! A process that no longer wants its store leaves it (see [`MessageStore::leave`]). As long as the store holds messages, it
//! gets the next ones too. It is closed when the process finds it empty. A route that finds a closed store gives the connection
//! its mailbox back, and is then tried again. So the order of each sender is kept.
//!
//! From the mailbox to a store there is no such order: a sender that was on its way to the mailbox may arrive there after
//! messages that it has sent to the store since.
//!
//! [`MessageStore::leave`]: erlmcp_core::message_store::MessageStore::leave

use erlmcp_core::message_store::{Bounds, PushError};
use erlmcp_core::registry::{self, Charged, Entry, Events, Id, Namespace, Refusal, Undelivered};
use rustler::{Encoder, Env, Error, NifResult, Term};

use crate::atoms;
use crate::backpressure::{circuit, clock};
use crate::batch::SLICE;
use crate::id;
use crate::immediate;
use crate::message_store::{Handle, TooManyStores, Weighty};
use crate::registry::{live_entry, shard_of};
use crate::reschedule::{Outcome, Scheduler, Stopped, reschedulable};
use crate::resource::{Registry, default_registry};
use crate::routing::{address_term, refusal_term, with_events};
use crate::watch::Lease;

/// See the module's documentation.
#[derive(Clone, Default, PartialEq)]
pub(crate) struct Delivery {
    store: Option<Handle>,
    /// The most messages of one list; 0 for none.
    batch: usize,
}

impl Delivery {
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The most messages that are sent to the process as one.
    pub(crate) fn batch(&self) -> usize {
        self.batch
    }

    fn has_closed_store(&self) -> bool {
        self.store
            .as_ref()
            .is_some_and(|store| store.store().messages.is_closed())
    }

    pub(crate) fn way(&self) -> registry::Delivery {
        if self.store.is_some() {
            registry::Delivery::ByLease
        } else if self.batch > 0 {
            registry::Delivery::Batched
        } else {
            registry::Delivery::Single
        }
    }
}

// ---- The choice ----

enum Choice {
    Mailbox,
    Batch(usize),
    Store(Bounds),
}

impl Choice {
    /// `mailbox`, `{batch, Messages}`, or `{store, Capacity, MaxBytes}`.
    fn decode(term: Term<'_>) -> NifResult<Self> {
        if atoms::mailbox() == term {
            return Ok(Self::Mailbox);
        }
        if let Ok((kind, capacity, max_bytes)) = term.decode::<(Term<'_>, u64, u64)>() {
            let bounds = Bounds {
                capacity,
                max_bytes,
            };
            return (atoms::store() == kind && bounds.are_valid())
                .then_some(Self::Store(bounds))
                .ok_or(Error::BadArg);
        }
        let (kind, messages): (Term<'_>, u64) = term.decode()?;
        (atoms::batch() == kind && (2..=SLICE as u64).contains(&messages))
            .then_some(Self::Batch(messages as usize))
            .ok_or(Error::BadArg)
    }
}

/// Changes the delivery of a connection of the calling process: `ok`, or the store; or `not_held` or `too_many_stores`.
#[rustler::nif]
fn set_delivery<'a>(env: Env<'a>, id: Term<'a>, choice: Term<'a>) -> NifResult<Term<'a>> {
    let registry = default_registry();
    let choice = Choice::decode(choice)?;
    let caller = immediate::word(env.pid().encode(env));
    let admission = registry.admission(shard_of(registry, id));
    // Of an attempt that has lost to another change.
    let mut new_store: Option<Handle> = None;
    let result = id::with(registry, id, |id| {
        loop {
            let entry = live_entry(env, registry, Namespace::Connection, id)
                .filter(|entry| entry.address == caller);
            let Some(entry) = entry else {
                return Ok(atoms::not_held().encode(env));
            };
            let former = entry.lease.config.delivery().cloned().unwrap_or_default();
            let mut next = former.clone();
            let mut result = atoms::ok().encode(env);
            match choice {
                Choice::Store(bounds) => {
                    let open = former.store.clone().filter(|store| {
                        let messages = &store.store().messages;
                        messages.set_bounds(bounds);
                        messages.stay()
                    });
                    let store = match open.or(new_store.take()) {
                        Some(store) => store,
                        None => match Handle::new(env, bounds, Some(admission))? {
                            Ok(store) => store,
                            Err(TooManyStores) => return Ok(atoms::too_many_stores().encode(env)),
                        },
                    };
                    new_store = Some(store.clone());
                    result = store.encode(env);
                    next = Delivery {
                        store: Some(store),
                        batch: 0,
                    };
                }
                Choice::Mailbox | Choice::Batch(_) => {
                    next.batch = match choice {
                        Choice::Batch(messages) => messages,
                        _ => 0,
                    };
                    if let Some(store) = &former.store {
                        store.store().messages.leave();
                    }
                    if former.has_closed_store() {
                        next.store = None;
                    }
                }
            }
            if next == former || exchange(env, registry, id, &entry, next) {
                return Ok(result);
            }
            // Lost to a concurrent change of this id.
        }
    });
    result.ok_or(Error::BadArg)?
}

/// `mailbox`, `{batch, Messages}` or `{store, Store}`; or `not_found`.
#[rustler::nif]
fn delivery<'a>(env: Env<'a>, id: Term<'a>) -> NifResult<Term<'a>> {
    let registry = default_registry();
    id::with(registry, id, |id| {
        let Some(entry) = live_entry(env, registry, Namespace::Connection, id) else {
            return atoms::not_found().encode(env);
        };
        match entry.lease.config.delivery() {
            Some(Delivery {
                store: Some(store), ..
            }) if !store.store().messages.is_closed() => (atoms::store(), store).encode(env),
            Some(Delivery { batch, .. }) if *batch > 0 => {
                (atoms::batch(), *batch as u64).encode(env)
            }
            _ => atoms::mailbox().encode(env),
        }
    })
    .ok_or(Error::BadArg)
}

/// Whether a connection has a store without room for the smallest message.
pub(crate) fn has_full_store(registry: &Registry, id: &Id<'_>) -> bool {
    let entry = registry.entry(Namespace::Connection, id);
    entry
        .as_ref()
        .and_then(|entry| entry.lease.config.delivery()?.store.as_ref())
        .is_some_and(Handle::is_full)
}

fn exchange(
    env: Env<'_>,
    registry: &Registry,
    id: &Id<'_>,
    entry: &Entry<Lease>,
    next: Delivery,
) -> bool {
    let Some(config) = entry.lease.config.renewed() else {
        return false;
    };
    let config = config.with_delivery(next);
    registry.exchange_config(env, Namespace::Connection, id, &entry.lease, config)
}

// ---- One message ----

/// How often a route is tried whose store is closed meanwhile.
const ATTEMPTS: usize = 10;

/// Why a message is not in a store, and not refused by a layer.
enum Failed {
    TooLarge,
    /// The connection's store is closed, or it has another one.
    Changed,
    Error(Error),
}

/// Routes a message to a connection whose messages a store may get: the results of `route_connection`, or `ok` if the message
/// is in the store, `store_full` or `message_too_large`.
fn route_by_lease<'a>(
    env: Env<'a>,
    [id, message]: [Term<'a>; 2],
    scheduler: Scheduler,
) -> Outcome<'a> {
    let registry = default_registry();
    id::with(registry, id, |id| {
        let mut events = Events::default();
        let result = route_to(env, registry, id, message, scheduler, &mut events)?;
        Ok(match events.is_some() {
            true => with_events(env, result, &events),
            false => result,
        })
    })
    .ok_or(Error::BadArg)?
}

reschedulable!(c"route_by_lease", 2, route_by_lease);

fn route_to<'a>(
    env: Env<'a>,
    registry: &Registry,
    id: &Id<'_>,
    message: Term<'a>,
    scheduler: Scheduler,
    events: &mut Events,
) -> Outcome<'a> {
    for _ in 0..ATTEMPTS {
        let entry = registry.entry(Namespace::Connection, id);
        let delivery = entry
            .as_ref()
            .and_then(|entry| entry.lease.config.delivery());
        if let (Some(entry), Some(delivery)) = (&entry, delivery)
            && delivery.has_closed_store()
        {
            let next = Delivery {
                store: None,
                ..delivery.clone()
            };
            exchange(env, registry, id, entry, next);
            continue;
        }
        let Some(store) = delivery.and_then(|delivery| delivery.store.as_ref()) else {
            let charged = Charged::Target;
            match registry.route(
                Namespace::Connection,
                id,
                charged,
                circuit(),
                clock(),
                events,
            ) {
                Ok((_, registry::Delivery::ByLease)) => continue,
                Ok((address, _)) => {
                    let namespace = Namespace::Connection;
                    return Ok(address_term(env, registry, namespace, id, address));
                }
                Err(refusal) => return Ok(refusal_term(env, refusal)),
            }
        };
        match store_message(env, registry, id, store, message, scheduler, events)? {
            Ok(wakes) => {
                if wakes {
                    store.wake(env);
                }
                return Ok(atoms::ok().encode(env));
            }
            Err(Undelivered::Refused(refusal)) => return Ok(refusal_term(env, refusal)),
            Err(Undelivered::Failed(Failed::TooLarge)) => {
                return Ok(atoms::message_too_large().encode(env));
            }
            Err(Undelivered::Failed(Failed::Changed)) => {}
            Err(Undelivered::Failed(Failed::Error(error))) => return Err(error.into()),
        }
    }
    // The process changes the delivery all the time.
    Ok(refusal_term(env, registry.refuse_full(id)))
}

/// Returns whether the consumer must be woken.
fn store_message<'a>(
    env: Env<'a>,
    registry: &Registry,
    id: &Id<'_>,
    store: &Handle,
    message: Term<'a>,
    scheduler: Scheduler,
    events: &mut Events,
) -> Result<Result<bool, Undelivered<Failed>>, Stopped> {
    // Before the layers: it may have to be done on another scheduler.
    let weighty = Weighty::new(message, store.store(), scheduler)?;
    let routed = registry.route_by_lease(id, circuit(), clock(), events, |lease| {
        let current = lease.config.delivery().and_then(|now| now.store.as_ref());
        if current != Some(store) {
            return Err(Undelivered::Failed(Failed::Changed));
        }
        let pushed = match weighty {
            Ok(weighty) => weighty
                .push(env, store.store())
                .map_err(|error| Undelivered::Failed(Failed::Error(error)))?,
            Err(error) => Err(error),
        };
        pushed.map_err(|error| match error {
            PushError::Full => Undelivered::Refused(Refusal::StoreFull),
            PushError::TooLarge => Undelivered::Failed(Failed::TooLarge),
            PushError::Closed => Undelivered::Failed(Failed::Changed),
        })
    });
    Ok(routed)
}
