//! Repetition of tests that prove nothing without contention: on a busy machine a thread may run alone for
//! a whole trial.

use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(600);

/// Repeats a trial until it reports contention. Under Miri one trial is enough.
pub(crate) fn until_contended(mut trial: impl FnMut() -> bool) {
    let started = Instant::now();
    while !trial() && !cfg!(miri) {
        assert!(started.elapsed() < PATIENCE, "no contention");
    }
}
