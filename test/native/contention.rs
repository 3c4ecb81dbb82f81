//! Tests that prove nothing unless threads got into each other's way go on until they did: on a busy
//! machine a thread may run alone for as long as a trial takes.

use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(600);

/// Repeats a trial until it tells that there was contention. Under Miri one trial is enough.
pub(crate) fn until_contended(mut trial: impl FnMut() -> bool) {
    let started = Instant::now();
    while !trial() && !cfg!(miri) {
        assert!(started.elapsed() < PATIENCE, "no contention");
    }
}
