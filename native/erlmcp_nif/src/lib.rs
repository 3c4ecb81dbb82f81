//! The NIF library of `erlmcp_native`: each function decodes its arguments, calls the core once, and
//! encodes the result. `erlmcp_nif.erl` documents the functions.
//!
//! Panics do not cross into the VM: rustler catches them in functions and callbacks.

mod admission;
mod announcements;
mod atoms;
mod background;
mod backpressure;
mod batch;
mod caller;
mod circuit_breaker;
mod config;
mod delivery;
mod encoding;
mod id;
mod immediate;
mod kept_hash;
mod keyed_limiter;
mod message_store;
mod named_breaker;
mod page;
mod registry;
mod reschedule;
mod resource;
mod routing;
mod target_breaker;
mod token_bucket;
mod tuple;
mod vm_clock;
mod watch;

use rustler::{Env, Term};

/// `version` is that of the Erlang modules. A library of another one may know other arguments, so it is not loaded.
fn load(env: Env<'_>, version: Term<'_>) -> bool {
    if !version
        .decode()
        .is_ok_and(|version: &str| version == env!("CARGO_PKG_VERSION"))
    {
        return false;
    }
    // Calibrates the clock.
    let _ = backpressure::circuit();
    env.register::<resource::RegistryResource>().is_ok()
        && env.register::<token_bucket::BucketResource>().is_ok()
        && env.register::<keyed_limiter::LimiterResource>().is_ok()
        && env.register::<message_store::StoreResource>().is_ok()
        && env.register::<message_store::MessageResource>().is_ok()
        && env.register::<watch::WatchResource>().is_ok()
        && env.register::<caller::CallerResource>().is_ok()
}

rustler::init!("erlmcp_nif", load = load);
