//! What the layers of backpressure share: the node's clock and circuit breaker.

use erlmcp_core::circuit_breaker::{CircuitBreaker, Config};
use erlmcp_core::clock::TscClock;
use once_cell::race::OnceBox;

static CLOCK: OnceBox<TscClock> = OnceBox::new();
static CIRCUIT: OnceBox<CircuitBreaker> = OnceBox::new();

/// The node's clock, calibrated when the library is loaded.
#[inline]
pub(crate) fn clock() -> &'static TscClock {
    CLOCK.get_or_init(Box::default)
}

/// The node's circuit breaker, with the default config until another one is set.
#[inline]
pub(crate) fn circuit() -> &'static CircuitBreaker {
    CIRCUIT.get_or_init(|| {
        let circuit = CircuitBreaker::new(Some(Config::default()), clock());
        Box::new(circuit.unwrap_or_else(|_| unreachable!("the default config is valid")))
    })
}
