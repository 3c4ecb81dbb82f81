//! The data structures under `erlmcp_native`, without any notion of the BEAM.
//!
//! The crate is generic over what a registration carries (a *lease*, see [`registry`]) and treats identifiers as
//! bytes and message targets as 64-bit addresses. The NIF crate gives these a meaning.
//!
//! # Guarantees
//!
//! * Every operation of [`registry::Registry`] is linearizable, except for the iterations, which
//!   are weakly consistent: an element that is present throughout is seen exactly once.
//! * Look-ups and routes take no lock and make progress whatever other threads do, except that a route to a process
//!   without a record in admission control inserts one, and the first one in a shard creates its admission control,
//!   under a lock. An update is retried when another thread's update of the same id came between. While a map grows,
//!   `papaya` has one thread allocate the next table, under a lock, and an update waits while another thread copies
//!   its entry.
//! * Only one small module has `unsafe` code.

#![deny(unsafe_code)]

pub mod admission;
pub mod call_breaker;
#[doc(hidden)]
pub mod churn;
pub mod circuit_breaker;
pub mod clock;
pub mod counter;
#[doc(hidden)]
pub mod diversion;
pub mod error;
#[doc(hidden)]
pub mod gate;
pub mod keyed_limiter;
pub mod message_store;
mod receivers;
pub mod registry;
#[doc(hidden)]
pub mod seqlock;
pub mod sequence;
mod shard;
#[doc(hidden)]
pub mod slots;
mod snapshot;
mod sync;
pub mod token_bucket;
