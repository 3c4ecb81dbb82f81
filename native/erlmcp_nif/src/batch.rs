//! Guarded look-ups for many messages to connections of the default registry, in one call.
//!
//! # Lists
//!
//! A connection may get the messages of one batch as one (see [`crate::delivery`]): a signal for each process instead of one
//! for each message. Its messages are put into lists here, in order. The caller sends the lists after the other messages of
//! the same call. So once a process has a list, all further messages to it go there, whatever its connections have chosen
//! meanwhile.

use erlmcp_core::clock::{Clock, Reading};
use erlmcp_core::registry::{Delivery, Entry, Events, ROUTED_TOGETHER, Refusal};
use rustler::sys::{ErlNifTerm, c_uint, enif_make_list_from_array};
use rustler::{Encoder, Env, Error, NifResult, Term};

use crate::atoms;
use crate::backpressure::{circuit, clock};
use crate::id;
use crate::immediate;
use crate::registry::lookup::REMOTE;
use crate::registry::pid_term;
use crate::resource::{Registry, default_registry};
use crate::routing::{refusal_term, with_events};
use crate::tuple::pair;
use crate::watch::Lease;

/// One call routes at most this many messages, in some 100 microseconds.
pub(crate) const SLICE: usize = 256;

/// The percentage of a process's time slice that one call consumes.
const SLICE_PERCENT: i32 = 10;

const _: () = assert!(SLICE.is_multiple_of(ROUTED_TOGETHER));

/// Results for the first messages of a list of `{Id, Message}`, in order, the rest of the list, and lists of those
/// messages whose result is `batched`: `[{Pid, Messages}]`.
///
/// An id that is too long to be registered counts as not registered. All messages share one clock reading.
#[rustler::nif]
fn route_batch<'a>(env: Env<'a>, messages: Term<'a>) -> NifResult<Term<'a>> {
    let registry = default_registry();
    let now = Reading::of(clock());
    let mut rest = messages;
    let mut routed = Routed {
        env,
        results: Vec::with_capacity(SLICE),
        lists: Lists::default(),
    };
    while routed.results.len() < SLICE && !rest.is_empty_list() {
        rest = route_together(registry, rest, &now, &mut routed)?;
    }
    let _ = rustler::schedule::consume_timeslice(env, SLICE_PERCENT);
    let results = list(env, &routed.results);
    Ok((results, rest, routed.lists.term(env)).encode(env))
}

/// Routes the next messages, and returns the rest of the list.
fn route_together<'a>(
    registry: &Registry,
    messages: Term<'a>,
    now: &impl Clock,
    all: &mut Routed<'a>,
) -> NifResult<Term<'a>> {
    let mut pairs = [[messages; 2]; ROUTED_TOGETHER];
    let mut rest = messages;
    let mut len = 0;
    while len < ROUTED_TOGETHER && !rest.is_empty_list() {
        let (message, others) = rest.list_get_cell().map_err(|_| Error::BadArg)?;
        pairs[len] = pair(message).ok_or(Error::BadArg)?;
        rest = others;
        len += 1;
    }
    let max_bytes = registry.limits().max_id_bytes();
    let mut encoded = [const { None }; ROUTED_TOGETHER];
    let mut ids = [None; ROUTED_TOGETHER];
    for ((id, encoded), [term, _]) in ids.iter_mut().zip(&mut encoded).zip(&pairs[..len]) {
        *id = id::kind_and_bytes(*term, max_bytes, encoded)
            .map(|(kind, bytes)| registry.id(kind, bytes));
    }
    let mut messages = pairs.iter().map(|[_, message]| *message);
    registry.route_connections(&ids[..len], circuit(), now, |routed, events| {
        if let Some(message) = messages.next() {
            all.add(message, routed, &events);
        }
    });
    Ok(rest)
}

/// The results of a call, under construction.
struct Routed<'a> {
    env: Env<'a>,
    results: Vec<ErlNifTerm>,
    lists: Lists,
}

impl<'a> Routed<'a> {
    fn add(
        &mut self,
        message: Term<'a>,
        routed: Result<(&Entry<Lease>, Delivery), Refusal>,
        events: &Events,
    ) {
        let env = self.env;
        let result = match routed {
            Ok((_, Delivery::ByLease)) => atoms::stored().encode(env),
            Ok((entry, _)) if entry.address == REMOTE => pid_term(env, entry),
            Ok((entry, delivery)) => {
                let max = match delivery {
                    Delivery::Batched => entry.lease.config.delivery().map_or(0, |d| d.batch()),
                    Delivery::Single | Delivery::ByLease => 0,
                };
                if self.lists.add(entry.address, max, message) {
                    atoms::batched().encode(env)
                } else {
                    // SAFETY: the address of an entry that is not for a remote process is a local pid.
                    unsafe { immediate::term(env, entry.address) }
                }
            }
            Err(refusal) => refusal_term(env, refusal),
        };
        self.results.push(if events.is_some() {
            with_events(env, result, events).as_c_arg()
        } else {
            result.as_c_arg()
        });
    }
}

/// The messages that are sent as lists. Nothing is allocated until there is one.
#[derive(Default)]
struct Lists {
    all: Vec<Messages>,
    /// By a hash of the address: the number of its last list, from 1.
    last: Vec<u16>,
}

struct Messages {
    address: u64,
    max: usize,
    terms: Vec<ErlNifTerm>,
}

/// Twice as many as there are lists at most, so that a search ends.
const PLACES: usize = 2 * SLICE;

impl Lists {
    /// Adds a message to the last list of a process. A process without one gets one, unless `max` is 0. Returns whether the
    /// message is in a list.
    fn add(&mut self, address: u64, max: usize, message: Term<'_>) -> bool {
        if max == 0 && self.all.is_empty() {
            return false;
        }
        if self.last.is_empty() {
            self.last.resize(PLACES, 0);
        }
        let mut place = place_of(address);
        let former = loop {
            match usize::from(self.last[place]).checked_sub(1) {
                Some(number) if self.all[number].address != address => {
                    place = (place + 1) % PLACES;
                }
                found => break found,
            }
        };
        let max = match former {
            Some(number) if self.all[number].terms.len() < self.all[number].max => {
                self.all[number].terms.push(message.as_c_arg());
                return true;
            }
            Some(number) => self.all[number].max,
            None if max == 0 => return false,
            None => max,
        };
        self.all.push(Messages {
            address,
            max,
            terms: vec![message.as_c_arg()],
        });
        self.last[place] = self.all.len() as u16;
        true
    }

    fn term<'a>(&self, env: Env<'a>) -> Term<'a> {
        let mut term = Term::list_new_empty(env);
        for messages in self.all.iter().rev() {
            // SAFETY: only a process of this node chooses lists, and other messages are added for the same address alone.
            let pid = unsafe { immediate::term(env, messages.address) };
            term = term.list_prepend((pid, list(env, &messages.terms)).encode(env));
        }
        term
    }
}

/// Fibonacci hashing: the words of pids differ in few bits.
fn place_of(address: u64) -> usize {
    let bits = PLACES.ilog2();
    (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - bits)) as usize
}

/// A list of terms of `env`.
fn list<'a>(env: Env<'a>, terms: &[ErlNifTerm]) -> Term<'a> {
    // SAFETY: `terms` holds that many terms of this environment.
    unsafe {
        let list = enif_make_list_from_array(env.as_c_arg(), terms.as_ptr(), terms.len() as c_uint);
        Term::new(env, list)
    }
}
