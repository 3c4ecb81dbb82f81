//! Monotonic time, as a parameter of every algorithm that needs it.
//!
//! Times are 64-bit nanoseconds since an origin of the clock's own. The structures of this crate are defined for
//! 100 years of them, and for readings that go backwards.

use std::cell::Cell;

use crate::sync::{AtomicU64, Ordering};

/// A source of time.
pub trait Clock {
    /// Nanoseconds since the clock's origin.
    fn now_ns(&self) -> u64;

    /// Milliseconds since the clock's origin.
    fn now_ms(&self) -> u64 {
        self.now_ns() / 1_000_000
    }

    /// For a caller that would be refused at the time of [`Self::now_ns`]. Brings [`Self::now_ns`] up to date, and
    /// returns whether it may be later than before.
    fn renew(&self) -> bool {
        false
    }
}

/// One reading of a clock, for operations on many ids at about the same moment.
///
/// Reading the processor's counter may make it complete earlier instructions first (measured on a virtual Xeon), so
/// that the cache misses of many look-ups would be waited for one after the other. One reading for all of them lets
/// the misses overlap.
#[derive(Debug)]
pub struct Reading<'a, C> {
    clock: &'a C,
    now_ns: Cell<u64>,
}

impl<'a, C: Clock> Reading<'a, C> {
    /// A reading of the present time.
    pub fn of(clock: &'a C) -> Self {
        Self {
            clock,
            now_ns: Cell::new(clock.now_ns()),
        }
    }
}

impl<C: Clock> Clock for Reading<'_, C> {
    #[inline]
    fn now_ns(&self) -> u64 {
        self.now_ns.get()
    }

    fn renew(&self) -> bool {
        self.now_ns.set(self.clock.now_ns());
        true
    }
}

/// The processor's time stamp counter, by way of `quanta`, which calibrates it against the system's monotonic clock
/// and falls back to that where the counter is not invariant.
///
/// A reading costs about a tenth of one of the system's clock where that is virtual.
///
/// Where the counter restarts under a running process (a virtual machine that is restored from a snapshot, or some
/// hardware after it slept) the clock goes back, and continues from there. A clock that is behind its origin stands
/// still. So the origin is the counter's own, or twelve years ago at 3 GHz if that is later.
/// is later.
pub struct TscClock {
    clock: quanta::Clock,
    origin: u64,
    /// Nanoseconds per tick, times 2^48: a multiplication and a shift by a constant, where `quanta` itself shifts
    /// by a variable. For ticks of 0.1 to 65,536 ns it keeps 13 digits and more.
    ns_per_tick: u64,
}

impl TscClock {
    /// A calibrated clock. The first calibration in a process may take some milliseconds and up to 200.
    pub fn new() -> Self {
        let clock = quanta::Clock::new();
        Self {
            origin: clock.raw().saturating_sub(1 << 60),
            ns_per_tick: clock.delta_as_nanos(0, 1 << 48),
            clock,
        }
    }
}

impl Clock for TscClock {
    #[inline]
    fn now_ns(&self) -> u64 {
        let ticks = self.clock.raw().saturating_sub(self.origin);
        ((u128::from(ticks) * u128::from(self.ns_per_tick)) >> 48) as u64
    }
}

impl Default for TscClock {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for TscClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TscClock").finish_non_exhaustive()
    }
}

/// A clock that stands still until it is set: for tests.
#[derive(Debug)]
pub struct FakeClock(AtomicU64);

impl FakeClock {
    /// A clock that stands at this time.
    pub fn at_ns(now_ns: u64) -> Self {
        Self(AtomicU64::new(now_ns))
    }

    /// Sets the time, which may be earlier.
    pub fn set_ns(&self, now_ns: u64) {
        self.0.store(now_ns, Ordering::Relaxed);
    }

    /// Advances the time.
    pub fn advance_ns(&self, by_ns: u64) {
        self.0.fetch_add(by_ns, Ordering::Relaxed);
    }
}

impl Clock for FakeClock {
    fn now_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    #[cfg(not(miri))]
    fn the_processor_s_clock_keeps_the_system_s_time() {
        let clock = TscClock::new();
        let (began, began_ns) = (std::time::Instant::now(), clock.now_ns());
        std::thread::sleep(std::time::Duration::from_millis(200));
        // Two more readings around: any time that passes between them makes `most` longer and `least` shorter.
        let least = began.elapsed().as_nanos() as f64;
        let passed = (clock.now_ns() - began_ns) as f64;
        let most = began.elapsed().as_nanos() as f64;
        assert!(
            least * 0.999 - 1e5 < passed && passed < most * 1.001 + 1e5,
            "{least} {passed} {most}"
        );
    }

    #[test]
    fn a_reading_stands_still_until_it_is_renewed() {
        let clock = FakeClock::at_ns(5_000_000);
        let reading = Reading::of(&clock);
        clock.advance_ns(2_000_000);
        assert_eq!((reading.now_ns(), reading.now_ms()), (5_000_000, 5));
        assert!(reading.renew());
        assert_eq!((reading.now_ns(), reading.now_ms()), (7_000_000, 7));
        assert!(!clock.renew());
    }
}
