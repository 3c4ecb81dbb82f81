//! Admission control: a bound on the messages queued for one shard, without any help of the
//! receivers.
//!
//! # Algorithm
//!
//! A credit scheme. Every admitted message counts up one word, `admitted`, and never down. A
//! *sample* says how many messages wait in the mailboxes of the shard's receivers; it moves the
//! word `limit` to what `admitted` was when the sample began, less what was found, plus the
//! threshold. A message is admitted while `admitted < limit`. So the depth `admitted - limit +
//! threshold` is what was found at the last sample and everything admitted since that began: an
//! upper bound, as receivers only ever take messages away.
//!
//! # Guarantee
//!
//! At most `threshold` messages wait in the shard, and besides: each message that was between admission
//! and sending when a sample began, and one for each caller between the two loads and the count of
//! [`Admission::admit`] at the limit. A caller has one message between admission and sending, but many
//! where it sends many after one call.
//!
//! A shard is never refused for want of a sampler: if the last sample is older than ten intervals,
//! and so is the message that asked for one, everything is admitted.
//!
//! # Trade-offs
//!
//! What receivers have taken off their mailboxes counts until the next sample. So a sample is asked
//! for (by [`Admitted::wants_sample`]) when half of what the last one left has been used up, and with
//! the first message after a pause. Exactly one caller is told then. It may end before it has passed
//! that on, so as long as a sample is due and the sampler gives no sign, one more caller is told an
//! interval.

use std::fmt;

use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// `admitted` begins here, so that a limit below it does not go under zero.
const ORIGIN: u64 = 1 << 40;

/// The limit of a shard that admits everything.
const OFF: u64 = u64::MAX;

/// Samples older than so many intervals are ignored.
const STALE_INTERVALS: u64 = 10;

/// A shard that keeps entering overload counts as a failure once in this time.
const FAILURE_INTERVAL_MS: u64 = 1_000;

/// What all shards of a registry have in common.
#[derive(Debug)]
pub struct Sampling {
    interval_ms: AtomicU64,
}

impl Sampling {
    /// Samples are taken every `interval_ms` milliseconds.
    pub fn new(interval_ms: u64) -> Self {
        Self {
            interval_ms: AtomicU64::new(interval_ms),
        }
    }

    /// Milliseconds between two samples.
    pub fn interval_ms(&self) -> u64 {
        self.interval_ms.load(Ordering::Relaxed)
    }

    /// Changes the interval.
    pub fn set_interval_ms(&self, interval_ms: u64) {
        self.interval_ms.store(interval_ms, Ordering::Relaxed);
    }
}

/// An admitted message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// The caller is the one to ask for a sample now.
    pub wants_sample: bool,
}

/// What a sample has led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampled {
    /// The shard was overloaded until now.
    pub has_recovered: bool,
    /// So much was admitted during the sample that the next one is due at once; nobody else will
    /// ask for it.
    pub is_used_up: bool,
}

/// A refused message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overloaded {
    /// This refusal is the first one of an overload.
    pub has_entered: bool,
    /// It counts as a failure of the node.
    pub is_failure: bool,
}

/// One shard's. Aligned so that no two share a cache line (or a pair of lines, as x86 fetches them).
#[repr(align(128))]
pub struct Admission {
    admitted: AtomicU64,
    limit: AtomicU64,
    /// The count with which a sample is asked for.
    sample_at: AtomicU64,
    threshold: AtomicU64,
    /// `ms + 1`; 0 is never.
    sampled_ms: AtomicU64,
    /// What `admitted` was then.
    seen: AtomicU64,
    /// When the sample that is due was first asked for: `ms + 1`; 0 is never.
    asked_ms: AtomicU64,
    /// When a caller was told last to ask for a sample, or the sampler was there: `ms + 1`; 0 is never.
    told_ms: AtomicU64,
    is_overloaded: AtomicBool,
    /// `ms + 1`; 0 is never.
    failed_ms: AtomicU64,
}

impl Admission {
    /// Admits everything until a threshold is set and the first sample was taken.
    pub fn new() -> Self {
        Self {
            admitted: AtomicU64::new(ORIGIN),
            limit: AtomicU64::new(OFF),
            sample_at: AtomicU64::new(0),
            threshold: AtomicU64::new(OFF),
            sampled_ms: AtomicU64::new(0),
            seen: AtomicU64::new(ORIGIN),
            asked_ms: AtomicU64::new(0),
            told_ms: AtomicU64::new(0),
            is_overloaded: AtomicBool::new(false),
            failed_ms: AtomicU64::new(0),
        }
    }

    /// Whether a message would be admitted. One load where everything is.
    #[inline]
    pub fn check(
        &self,
        sampling: &Sampling,
        now_ms: impl FnOnce() -> u64,
    ) -> Result<(), Overloaded> {
        let limit = self.limit.load(Ordering::Relaxed);
        if limit == OFF || self.admitted.load(Ordering::Relaxed) < limit {
            return Ok(());
        }
        self.refuse(sampling, now_ms())
    }

    /// Whether a message would be admitted, without a trace of the question.
    pub fn is_open(&self, sampling: &Sampling, now_ms: impl FnOnce() -> u64) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        limit == OFF
            || self.admitted.load(Ordering::Relaxed) < limit
            || self.is_stale(sampling, now_ms())
    }

    fn is_stale(&self, sampling: &Sampling, now_ms: u64) -> bool {
        // Nobody has sampled yet: being asked to is no sign of a sampler.
        let sampled = match self.sampled_ms.load(Ordering::Relaxed) {
            0 => return true,
            sampled => sampled.max(self.asked_ms.load(Ordering::Relaxed)),
        };
        (now_ms + 1).saturating_sub(sampled) > STALE_INTERVALS * sampling.interval_ms()
    }

    /// Counts a message that [`Self::check`] has let through. The count of messages that go to a
    /// shard that admits everything is not kept.
    #[inline]
    pub fn admit(&self, sampling: &Sampling, now_ms: impl FnOnce() -> u64) -> Admitted {
        if self.limit.load(Ordering::Relaxed) == OFF {
            return Admitted {
                wants_sample: false,
            };
        }
        // AcqRel: in the order of changes of this word, see `sampled`.
        let count = self.admitted.fetch_add(1, Ordering::AcqRel) + 1;
        let sample_at = self.sample_at.load(Ordering::Relaxed);
        let wants_sample = count >= sample_at && self.tell(count == sample_at, sampling, now_ms());
        Admitted { wants_sample }
    }

    /// Whether this caller is the one to ask for the sample that is due: the one with the count at which
    /// it became so, or the first one after an interval in which nobody was told and nothing sampled.
    ///
    /// `asked_ms` stays what the first one made it: asking again is no sign of a sampler.
    #[cold]
    fn tell(&self, is_first: bool, sampling: &Sampling, now_ms: u64) -> bool {
        if is_first {
            self.asked_ms.store(now_ms + 1, Ordering::Relaxed);
            self.told_ms.store(now_ms + 1, Ordering::Relaxed);
            return true;
        }
        let told = self.told_ms.load(Ordering::Relaxed);
        (now_ms + 1).saturating_sub(told) > sampling.interval_ms()
            && self
                .told_ms
                .compare_exchange(told, now_ms + 1, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    #[cold]
    fn refuse(&self, sampling: &Sampling, now_ms: u64) -> Result<(), Overloaded> {
        if self.is_stale(sampling, now_ms) {
            return Ok(());
        }
        let has_entered = !self.is_overloaded.load(Ordering::Relaxed)
            && !self.is_overloaded.swap(true, Ordering::Relaxed);
        Err(Overloaded {
            has_entered,
            is_failure: has_entered && self.may_fail(now_ms),
        })
    }

    fn may_fail(&self, now_ms: u64) -> bool {
        let last = self.failed_ms.load(Ordering::Relaxed);
        let is_due = last == 0 || (now_ms + 1).saturating_sub(last) >= FAILURE_INTERVAL_MS;
        is_due
            && self
                .failed_ms
                .compare_exchange(last, now_ms + 1, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    // ---- For the sampler ----

    /// Begins a sample: the count that [`Self::sampled`] takes. Messages that are admitted from
    /// here on count whether the sample finds them or not.
    pub fn begin_sample(&self) -> u64 {
        self.admitted.load(Ordering::Acquire)
    }

    /// Ends a sample that began with `began` and found `queued` messages.
    ///
    /// `is_last`: no more samples will be taken until one is asked for; the next message does.
    pub fn sampled(&self, began: u64, queued: u64, is_last: bool, now_ms: u64) -> Sampled {
        self.saw(began, now_ms);
        self.credit(began, queued, is_last)
    }

    /// Instead of a sample: what was admitted since the last one is counted on as it is, and the
    /// sampler is there.
    pub fn skip_sample(&self, now_ms: u64) {
        self.saw(self.begin_sample(), now_ms);
    }

    fn saw(&self, admitted: u64, now_ms: u64) {
        self.seen.store(admitted, Ordering::Relaxed);
        self.sampled_ms.store(now_ms + 1, Ordering::Relaxed);
        self.told_ms.store(now_ms + 1, Ordering::Relaxed);
    }

    fn credit(&self, began: u64, queued: u64, is_last: bool) -> Sampled {
        let mut has_recovered = false;
        loop {
            let threshold = self.threshold.load(Ordering::Relaxed);
            let mut sampled = self.credit_up_to(threshold, began, queued, is_last);
            has_recovered |= sampled.has_recovered;
            // The threshold is changed before the limit: of two threads, the one who exchanges the
            // limit last sees both thresholds here.
            if self.threshold.load(Ordering::Relaxed) == threshold {
                sampled.has_recovered = has_recovered;
                return sampled;
            }
        }
    }

    fn credit_up_to(&self, threshold: u64, began: u64, queued: u64, is_last: bool) -> Sampled {
        if threshold == OFF {
            self.limit.swap(OFF, Ordering::AcqRel);
            return Sampled {
                has_recovered: self.is_overloaded.swap(false, Ordering::Relaxed),
                is_used_up: false,
            };
        }
        let limit = began.saturating_sub(queued).saturating_add(threshold);
        let left = limit.saturating_sub(began);
        // Rounded up: or else the last place would be used up before anybody took it.
        let sample_at = began + if is_last { 1 } else { left.div_ceil(2) };
        self.sample_at.store(sample_at, Ordering::Relaxed);
        self.limit.swap(limit, Ordering::AcqRel);
        // A change of the word that callers count in: one who counts later sees `sample_at`, and
        // one who counted before is seen here. So somebody knows when it is reached.
        let admitted = self.admitted.fetch_add(0, Ordering::AcqRel);
        Sampled {
            // Half the threshold: or else a shard that is just full would come and go all the time.
            has_recovered: left > threshold / 2
                && self.is_overloaded.load(Ordering::Relaxed)
                && self.is_overloaded.swap(false, Ordering::Relaxed),
            is_used_up: left > 0 && admitted >= sample_at,
        }
    }

    // ---- For everybody ----

    /// Messages that wait in the shard at most.
    pub fn depth(&self) -> u64 {
        let threshold = self.threshold.load(Ordering::Relaxed);
        let limit = self.limit.load(Ordering::Relaxed);
        if limit == OFF {
            return 0;
        }
        self.admitted
            .load(Ordering::Relaxed)
            .saturating_add(threshold)
            .saturating_sub(limit)
    }

    /// Counts messages that were queued (or with a negative `delta` taken) without a sample.
    pub fn adjust(&self, delta: i64) {
        let mut limit = self.limit.load(Ordering::Relaxed);
        while limit != OFF {
            let floor = self.admitted.load(Ordering::Relaxed);
            let threshold = self.threshold.load(Ordering::Relaxed);
            // A depth below zero would admit more than the threshold later on.
            let adjusted = limit
                .saturating_add_signed(delta.saturating_neg())
                .min(floor.saturating_add(threshold));
            match self.limit.compare_exchange_weak(
                limit,
                adjusted,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(changed) => limit = changed,
            }
        }
    }

    /// The messages that the shard takes; `None` for any number.
    pub fn threshold(&self) -> Option<u64> {
        let threshold = self.threshold.load(Ordering::Relaxed);
        (threshold != OFF).then_some(threshold)
    }

    /// Changes the threshold. The next message asks for a sample.
    pub fn set_threshold(&self, threshold: Option<u64>) {
        let (mut began, mut queued) = (self.begin_sample(), self.depth());
        self.threshold
            .store(threshold.unwrap_or(OFF), Ordering::Relaxed);
        // Those who were admitted meanwhile may not have asked.
        while self.credit(began, queued, true).is_used_up {
            (began, queued) = (self.begin_sample(), self.depth());
        }
    }

    /// Messages admitted so far.
    pub fn admitted(&self) -> u64 {
        self.admitted.load(Ordering::Relaxed) - ORIGIN
    }

    /// Whether messages were refused and the shard has not recovered since.
    pub fn is_overloaded(&self) -> bool {
        self.is_overloaded.load(Ordering::Relaxed)
    }

    /// Whether messages have been admitted since the last sample and that is too old to count:
    /// nobody samples, and everything is admitted. Not so where nothing has come since.
    pub fn is_unwatched(&self, sampling: &Sampling, now_ms: u64) -> bool {
        self.limit.load(Ordering::Relaxed) != OFF
            && self.admitted.load(Ordering::Relaxed) > self.seen.load(Ordering::Relaxed)
            && self.is_stale(sampling, now_ms)
    }

    /// Milliseconds since the last sample; `None` if there was none.
    pub fn sample_age_ms(&self, now_ms: u64) -> Option<u64> {
        match self.sampled_ms.load(Ordering::Relaxed) {
            0 => None,
            sampled => Some((now_ms + 1).saturating_sub(sampled)),
        }
    }
}

impl Default for Admission {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission")
            .field("admitted", &self.admitted())
            .field("depth", &self.depth())
            .field("threshold", &self.threshold())
            .finish_non_exhaustive()
    }
}
