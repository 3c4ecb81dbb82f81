//! The VM's monotonic clock. It never goes back, and Erlang code reads the same one.

use std::time::Instant;

use erlmcp_core::clock::Clock;
use once_cell::race::OnceBox;
use rustler::sys::{ErlNifTimeUnit, enif_monotonic_time};

/// Erlang's monotonic time, counted from the first use of this clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VmClock;

struct Origin {
    erlang_ms: i64,
    instant: Instant,
}

/// Erlang's monotonic time; `None` on a thread that is not a scheduler.
fn erlang_ms() -> Option<i64> {
    // SAFETY: the function takes a unit and nothing else.
    let ms = unsafe { enif_monotonic_time(ErlNifTimeUnit::ERL_NIF_MSEC) };
    (ms != i64::MIN).then_some(ms)
}

fn origin() -> &'static Origin {
    static ORIGIN: OnceBox<Origin> = OnceBox::new();
    ORIGIN.get_or_init(|| {
        Box::new(Origin {
            erlang_ms: erlang_ms().unwrap_or(0),
            instant: Instant::now(),
        })
    })
}

impl VmClock {
    /// A time of this clock as Erlang's monotonic time.
    pub(crate) fn erlang_ms(ms: u64) -> i64 {
        origin().erlang_ms.saturating_add_unsigned(ms)
    }
}

impl Clock for VmClock {
    fn now_ms(&self) -> u64 {
        let origin = origin();
        match erlang_ms() {
            Some(ms) => u64::try_from(ms - origin.erlang_ms).unwrap_or(0),
            None => origin.instant.elapsed().as_millis() as u64,
        }
    }

    fn now_ns(&self) -> u64 {
        self.now_ms().saturating_mul(1_000_000)
    }
}
