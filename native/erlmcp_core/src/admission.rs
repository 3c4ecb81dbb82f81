//! Admission control: a bound on the messages queued for one shard, without any help of the receivers.
//!
//! # Algorithm
//!
//! Every admitted message is charged twice: to its shard, by counting `admitted`, and to its receiver, in a record
//! (`crate::receivers`). A *look* reads the length of one receiver's mailbox and corrects both charges: the record
//! by the difference between what was found and what it was charged with, and the shard by as much, in the word
//! `credited`. A message is admitted while the depth `admitted - credited` is below the threshold.
//!
//! A process of the caller, the *sampler*, takes looks in batches ([`Admission::take`], [`Admission::report`]).
//! Each look corrects by itself: nothing depends on complete rounds, and looks that are never reported leave the
//! charges as they are. Only receivers that were sent something since they were last seen empty have a record. So
//! the cost of looks is in proportion to messages and not to registrations.
//!
//! A message to a queue that counts for itself has no record ([`Admission::hold`]). A process that has exited is charged
//! with nothing any more ([`Admission::ended`]).
//!
//! # Guarantee
//!
//! The depth is never below the sum of all charges: the shard is charged before a record is, and credited after a
//! record was. A charge that was read before a look covers all that the look can have found in addition. So the
//! messages that wait in the shard are at most `threshold`, and besides:
//!
//! * the messages that were between admission and sending when their receiver was looked at, until its next look;
//! * at the limit, one for each caller between the loads of [`Admission::check`] and the count of
//!   [`Admission::admit`].
//!
//! A caller has one message between admission and sending, but many where it sends many after one call. A record is
//! freed when two looks in a row have found nothing; a message that has been between admission and sending for so
//! long is not counted.
//!
//! Under [`Threshold::Auto`] the same holds for each process and [`RECEIVER_LIMIT`].
//!
//! A shard never refuses for want of a sampler: if the last look is older than ten intervals, and so is the message
//! that requested one, everything is admitted.
//!
//! # Time
//!
//! A stored time that is ahead of the clock counts as *now*: the clock has gone back. So nothing waits for longer
//! than its interval.
//!
//! # Trade-offs
//!
//! Messages that receivers have removed from their mailboxes count until they are looked at. So looks are requested
//! (by [`Admitted::wants_sample`]) when the depth reaches three quarters of the threshold, and taken in turn until
//! it is below five eighths. Each receiver is looked at when it is charged with about twice the mean, which is as
//! much as a look can return. Where all looks leave more than that, they are requested again when half of the room
//! has been used up, and not before an eighth as many messages as there were looks. The first message after a pause
//! requests looks too.
//!
//! A message that is sent between the two readings of a look, of the charge and of the mailbox, counts twice until the
//! receiver's next look: it cannot be told from one that has come by another way. So a shard may refuse messages that
//! would fit, for as long.
//!
//! Exactly one caller is told to request them. It may exit before it does. So a sampler that is active asks whether
//! looks are due ([`Admission::is_due`]) once in an interval; and as long as they are due and no sampler is active,
//! one more caller is told per interval.
//!
//! When they are due depends on the threshold. So one that is set or lowered has the next message request them, and the
//! pass that follows determines when they are due again.

use std::fmt;
use std::sync::Arc;

use seize::Collector;

use crate::receivers::{Charged, Found, Known, MAX_CHARGE, NOT_SEEN, Receivers};
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Mutex, Ordering};

/// The address of receivers that cannot be looked at. They are not charged.
pub const UNSEEN: u64 = 0;

/// Messages that one process gets from one shard under [`Threshold::Auto`] before it is seen to receive some; also
/// the lowest threshold.
pub const RECEIVER_LIMIT: u64 = 10_000;

/// Messages per receiver under [`Threshold::Auto`]: the lowest threshold over 234 receivers, which is what 64
/// shards have of 15,000.
const PER_RECEIVER: u64 = 43;

/// `admitted` and `credited` begin here, so that a shard may be credited in advance.
const ORIGIN: u64 = 1 << 40;

/// The threshold of a shard that admits everything.
const OFF: u64 = u64::MAX;

/// Set in a threshold that follows the number of receivers.
const AUTO: u64 = 1 << 62;

/// A look older than this many intervals is ignored.
const STALE_INTERVALS: u64 = 10;

/// A shard that keeps entering overload counts as a failure once in this interval.
const FAILURE_INTERVAL_MS: u64 = 1_000;

/// Looks of one batch: 3 microseconds if the processes wait, and some 200 if all are in the run queues and have to
/// be scheduled to answer (measured on OTP 25).
///
/// Adding a record compares it with the whole batch, since none may be in it twice.
const MAX_BATCH: usize = if cfg!(loom) { 2 } else { 32 };

/// Records that one batch scans: some 20 microseconds.
const MAX_SCANNED: u32 = 32_768;

/// A receiver that is charged with this many messages is looked at ahead of the others, and again after every
/// further [`URGENT_STEP`].
const URGENT: u64 = RECEIVER_LIMIT / 2;
const URGENT_STEP: u64 = RECEIVER_LIMIT / 8;

/// Looks of an asked pass, besides one for each [`MESSAGES_PER_LOOK`] messages.
const MIN_LOOKS: u64 = 16;

/// A look costs some 200 ns; a message costs some 500 ns and its receiver's turn.
const MESSAGES_PER_LOOK: u64 = 8;

/// An asked pass after this many messages is taken before the load. It has [`MIN_LOOKS`] and an eighth as many
/// looks, which cost some percent of what the messages did.
const EARNED: u64 = 512;

/// Records of processes that have exited, which no pass over all records is taken for: 50 KB.
const CROWDED: u64 = 1_000;

/// Receivers that wait for an urgent look at one time.
const URGENT_PLACES: usize = if cfg!(loom) { 1 } else { 16 };

/// The settings that all shards of a registry share.
#[derive(Debug)]
pub struct Sampling {
    interval_ms: AtomicU64,
}

impl Sampling {
    /// Shards are sampled every `interval_ms` milliseconds.
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

/// How many messages a shard accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threshold {
    /// Any number.
    Off,
    /// In proportion to its receivers: 43 each, and at least 10,000.
    Auto,
    /// Exactly this many, up to 2^40.
    Exactly(u64),
}

/// An admitted message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// The caller must request a sample now.
    pub wants_sample: bool,
}

/// A refused message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overloaded {
    /// This refusal is the first one of an overload of the shard.
    pub has_entered: bool,
    /// It counts as a failure of the node.
    pub is_failure: bool,
    /// The caller must request a sample now.
    pub wants_sample: bool,
}

/// Which receivers a pass looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// As a caller has asked: receivers that wait for an urgent look, and if looks are due those that were sent
    /// something since their last look, one for each eight messages that were admitted since the last such pass.
    Asked,
    /// All that have a record. If a pass is ended early, the next one resumes where it stopped.
    All,
}

/// When the sampler takes a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// At once, before the load: its looks cost a small part of what the messages before them did.
    Urgently,
    /// Beside the load: the shard is so full that looks come fast.
    Normally,
    /// Not at all: another sampler holds the shard.
    Busy,
}

/// What a sampler does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Look at the receivers that were given, and report by this number.
    Batch(u64),
    /// The pass is over. If `is_due`, enough was admitted meanwhile that the next one is due at once; no other
    /// caller will request it.
    Done {
        /// See above.
        is_due: bool,
        /// The shard was overloaded until now.
        has_recovered: bool,
    },
    /// Another sampler holds the shard.
    Busy,
}

/// The result of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reported {
    /// Otherwise it was stale, and ignored.
    pub is_current: bool,
    /// The shard was overloaded until now.
    pub has_recovered: bool,
}

/// The receiver of a message on its way through the layers.
#[derive(Debug)]
pub struct Receiver<'a> {
    threshold: u64,
    /// `None` for a receiver that is not charged.
    known: Option<Known<'a>>,
}

impl Receiver<'_> {
    /// Whether the shard counts the messages that it admits: it has a threshold.
    #[inline]
    pub fn is_counted(&self) -> bool {
        self.threshold != OFF
    }
}

/// Its own cache line, or pair of lines, as x86 fetches them.
#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

/// Read by every message, and written by looks and settings, and by messages to queues that count for themselves.
struct Bounds {
    /// The threshold in force; [`OFF`], or with [`AUTO`].
    threshold: AtomicU64,
    credited: AtomicU64,
    /// The count at which looks are requested.
    look_at: AtomicU64,
}

struct Times {
    /// When the sampler was last active: `ms + 1`; 0 is never. The same holds for all times.
    sampled_ms: AtomicU64,
    /// `admitted` at that time.
    seen: AtomicU64,
    /// When the looks that are due were first requested.
    asked_ms: AtomicU64,
    /// When a caller was last told to request them, or the sampler was active.
    told_ms: AtomicU64,
    /// When a caller that was refused at [`RECEIVER_LIMIT`] was last told to request a look.
    urged_ms: AtomicU64,
    failed_ms: AtomicU64,
    is_overloaded: AtomicBool,
    /// Messages that are in no record, until the next batch of looks.
    strays: AtomicU64,
    /// Messages in queues that count for themselves.
    held: AtomicU64,
    /// Credited because processes reported to have received more than their records returned. The next batch takes
    /// it back.
    lent: AtomicU64,
    looks: AtomicU64,
}

/// The position of the sampler.
#[derive(Clone, Copy, Default)]
struct Position {
    /// Where the next batch begins, and how many records the pass still goes through.
    at: u32,
    left: u32,
}

#[derive(Default)]
struct Sampler {
    /// The number of the last batch.
    number: u64,
    /// Its records. Empty after it was reported.
    batch: Vec<Found>,
    position: Position,
    /// The position after the batch is reported.
    next: Position,
    /// The number of records when the pass began.
    end: u32,
    is_all: bool,
    budget: u32,
    looks: u32,
    /// `admitted` when the last asked pass began.
    asked_at: u64,
}

/// The admission control of one shard.
pub struct Admission {
    bounds: Line<Bounds>,
    admitted: Line<AtomicU64>,
    receivers: Receivers,
    times: Line<Times>,
    /// Indexes plus 1; 0 for none.
    urgent: [AtomicU32; URGENT_PLACES],
    /// Never waited for: a thread that finds it locked leaves the shard to the other sampler.
    sampler: Mutex<Sampler>,
}

impl Admission {
    /// Admits everything until a threshold is set and a first sample was taken.
    pub fn new() -> Self {
        Self::with_collector(&Arc::new(Collector::new()))
    }

    pub(crate) fn with_collector(collector: &Arc<Collector>) -> Self {
        Self {
            bounds: Line(Bounds {
                threshold: AtomicU64::new(OFF),
                credited: AtomicU64::new(ORIGIN),
                look_at: AtomicU64::new(0),
            }),
            admitted: Line(AtomicU64::new(ORIGIN)),
            receivers: Receivers::new(collector),
            times: Line(Times {
                sampled_ms: AtomicU64::new(0),
                seen: AtomicU64::new(ORIGIN),
                asked_ms: AtomicU64::new(0),
                told_ms: AtomicU64::new(0),
                urged_ms: AtomicU64::new(0),
                failed_ms: AtomicU64::new(0),
                is_overloaded: AtomicBool::new(false),
                strays: AtomicU64::new(0),
                held: AtomicU64::new(0),
                lent: AtomicU64::new(0),
                looks: AtomicU64::new(0),
            }),
            urgent: std::array::from_fn(|_| AtomicU32::new(0)),
            sampler: Mutex::new(Sampler::default()),
        }
    }

    // ---- For messages ----

    /// The receiver at `address`. `kept` is a word that the caller stores beside the id, 0 at first. One load where
    /// everything is admitted.
    #[inline]
    pub fn receiver<'a>(&self, address: u64, kept: &'a AtomicU32) -> Receiver<'a> {
        let threshold = self.bounds.0.threshold.load(Ordering::Relaxed);
        let is_charged = threshold != OFF && address != UNSEEN;
        Receiver {
            threshold,
            known: is_charged.then(|| self.receivers.know(address, kept)),
        }
    }

    /// Whether a message would be admitted. `receivers` returns the number of receivers of the shard.
    #[inline]
    pub fn check(
        &self,
        receiver: &mut Receiver<'_>,
        sampling: &Sampling,
        now_ms: impl FnOnce() -> u64,
        receivers: impl FnOnce() -> u64,
    ) -> Result<(), Overloaded> {
        let threshold = receiver.threshold;
        if threshold == OFF {
            return Ok(());
        }
        if self.queued() >= bound(threshold) {
            return self.refuse(sampling, now_ms(), receivers);
        }
        match self.at_limit(receiver) {
            Some(known) => self.refuse_one(known.index, sampling, now_ms()),
            None => Ok(()),
        }
    }

    /// The receiver, if an automatic threshold gives it no more messages.
    #[inline]
    fn at_limit<'r, 'a>(&self, receiver: &'r mut Receiver<'a>) -> Option<&'r Known<'a>> {
        if receiver.threshold & AUTO == 0 {
            return None;
        }
        let known = receiver.known.as_mut()?;
        if known.index.is_none() {
            self.receivers.know_by_address(known);
        }
        (u64::from(known.charge) >= RECEIVER_LIMIT).then_some(known)
    }

    /// Milliseconds until the next sample is due, 1 if it is overdue, if a message to `receiver` would not be admitted
    /// now; else 0. Leaves no trace of the question.
    pub fn wait_ms(
        &self,
        receiver: &mut Receiver<'_>,
        sampling: &Sampling,
        now_ms: u64,
        receivers: impl FnOnce() -> u64,
    ) -> u64 {
        let is_admitted = self.is_open(sampling, || now_ms, receivers)
            && (self.at_limit(receiver).is_none() || self.is_stale(sampling, now_ms));
        if is_admitted {
            return 0;
        }
        let age_ms = self.sample_age_ms(now_ms).unwrap_or(0);
        sampling.interval_ms().saturating_sub(age_ms).max(1)
    }

    /// Whether a message to some receiver would be admitted. Counts and reports nothing.
    pub fn is_open(
        &self,
        sampling: &Sampling,
        now_ms: impl FnOnce() -> u64,
        receivers: impl FnOnce() -> u64,
    ) -> bool {
        let has_room = |threshold| threshold == OFF || self.queued() < bound(threshold);
        has_room(self.bounds.0.threshold.load(Ordering::Relaxed))
            || has_room(self.follow(receivers()))
            || self.is_stale(sampling, now_ms())
    }

    /// Charges a message that [`Self::check`] has admitted. Messages to a shard that admits everything are not
    /// counted.
    #[inline]
    pub fn admit(
        &self,
        receiver: &Receiver<'_>,
        sampling: &Sampling,
        now_ms: impl FnOnce() -> u64,
    ) -> Admitted {
        if receiver.threshold == OFF {
            return Admitted {
                wants_sample: false,
            };
        }
        // AcqRel: this count and `ask_at` synchronize by the modification order of this word.
        let count = self.admitted.0.fetch_add(1, Ordering::AcqRel) + 1;
        let is_urgent = match &receiver.known {
            Some(known) if known.charge < MAX_CHARGE => self.charge(known, receiver.threshold),
            _ => {
                self.credit(1);
                false
            }
        };
        let look_at = self.bounds.0.look_at.load(Ordering::Relaxed);
        let is_due = count >= look_at && self.tell(count == look_at, sampling, now_ms());
        Admitted {
            wants_sample: is_urgent || is_due,
        }
    }

    /// Charges the receiver. Returns whether the caller must request a look at it.
    #[inline]
    fn charge(&self, known: &Known<'_>, threshold: u64) -> bool {
        // A misplaced charge stays in the record where it is, so the shard is charged once more.
        match self.receivers.charge(known, || self.debit(1)) {
            Charged::Record { index, charge } => {
                let above = u64::from(charge).wrapping_sub(URGENT);
                threshold & AUTO != 0
                    && u64::from(charge) >= URGENT
                    && above.is_multiple_of(URGENT_STEP)
                    && self.urge(index)
            }
            Charged::Stray => {
                self.times.0.strays.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    /// Has the sampler look at this receiver. Always `true`, even if other receivers wait already: the sampler
    /// looks at all of them.
    #[cold]
    fn urge(&self, index: u32) -> bool {
        for place in &self.urgent {
            let waiting = place.load(Ordering::Relaxed);
            let is_free = waiting == 0
                && place
                    .compare_exchange(0, index + 1, Ordering::Release, Ordering::Relaxed)
                    .is_ok();
            if is_free || waiting == index + 1 {
                break;
            }
        }
        true
    }

    /// Whether this caller must request the looks that are due: the one with the count at which they became due, or
    /// the first one after an interval in which no caller was told and no sampler was active.
    /// `asked_ms` keeps the time of the first request: a repeated one is no evidence of a sampler.
    #[cold]
    fn tell(&self, is_first: bool, sampling: &Sampling, now_ms: u64) -> bool {
        let times = &self.times.0;
        if is_first {
            // A message that was admitted for want of a sampler is no evidence of one.
            if self.queued() <= bound(self.bounds.0.threshold.load(Ordering::Relaxed)) {
                times.asked_ms.store(now_ms + 1, Ordering::Relaxed);
            }
            times.told_ms.store(now_ms + 1, Ordering::Relaxed);
            return true;
        }
        let interval_ms = sampling.interval_ms();
        claim(&times.told_ms, now_ms, |age_ms| age_ms > interval_ms)
    }

    #[cold]
    fn refuse(
        &self,
        sampling: &Sampling,
        now_ms: u64,
        receivers: impl FnOnce() -> u64,
    ) -> Result<(), Overloaded> {
        let threshold = self.follow(receivers());
        if threshold == OFF || self.queued() < bound(threshold) || self.is_stale(sampling, now_ms) {
            return Ok(());
        }
        let is_overloaded = &self.times.0.is_overloaded;
        let has_entered =
            !is_overloaded.load(Ordering::Relaxed) && !is_overloaded.swap(true, Ordering::Relaxed);
        let is_failure = has_entered
            && claim(&self.times.0.failed_ms, now_ms, |age_ms| {
                age_ms >= FAILURE_INTERVAL_MS
            });
        Err(Overloaded {
            has_entered,
            is_failure,
            wants_sample: false,
        })
    }

    /// Refuses a message because of its receiver alone, which has reached its limit. The shard has room.
    #[cold]
    fn refuse_one(
        &self,
        index: Option<u32>,
        sampling: &Sampling,
        now_ms: u64,
    ) -> Result<(), Overloaded> {
        if self.is_stale(sampling, now_ms) {
            return Ok(());
        }
        let interval_ms = sampling.interval_ms();
        let is_due = claim(&self.times.0.urged_ms, now_ms, |age_ms| {
            age_ms > interval_ms
        });
        Err(Overloaded {
            has_entered: false,
            is_failure: false,
            wants_sample: is_due && index.is_some_and(|index| self.urge(index)),
        })
    }

    fn is_stale(&self, sampling: &Sampling, now_ms: u64) -> bool {
        // Never sampled: a request is no evidence of a sampler.
        let Some(sampled) = age_ms(&self.times.0.sampled_ms, now_ms) else {
            return true;
        };
        let asked = age_ms(&self.times.0.asked_ms, now_ms).unwrap_or(u64::MAX);
        sampled.min(asked) > STALE_INTERVALS * sampling.interval_ms()
    }

    // ---- For the sampler ----

    /// Begins a pass, in place of one that was not completed.
    pub fn begin_pass(&self, pass: Pass, now_ms: u64) -> Begun {
        let Ok(mut sampler) = self.sampler.try_lock() else {
            return Begun::Busy;
        };
        self.skip_sample(now_ms);
        let admitted = self.admitted.0.load(Ordering::Acquire);
        let is_due = self.is_due();
        sampler.end = self.receivers.high_water();
        sampler.position.left = match pass {
            Pass::Asked if !is_due => 0,
            Pass::Asked | Pass::All => sampler.end,
        };
        sampler.looks = 0;
        sampler.number += 1;
        sampler.batch.clear();
        match pass {
            Pass::All => {
                (sampler.is_all, sampler.budget) = (true, u32::MAX);
                Begun::Urgently
            }
            Pass::Asked => {
                let since = admitted - sampler.asked_at;
                let budget = MIN_LOOKS + since / MESSAGES_PER_LOOK;
                let budget = u32::try_from(budget).unwrap_or(u32::MAX);
                (sampler.is_all, sampler.budget) = (false, budget);
                sampler.asked_at = admitted;
                if since >= EARNED {
                    Begun::Urgently
                } else {
                    Begun::Normally
                }
            }
        }
    }

    /// The next receivers of the pass: those that wait for an urgent look, and then the next ones in order.
    /// `look_at` is called with each, the last one first, since that is how lists are built. Until they are
    /// reported the next call gives the same ones once more.
    ///
    /// With `is_last` the pass ends here.
    pub fn take(&self, is_last: bool, mut look_at: impl FnMut(u64)) -> Taken {
        let Ok(mut sampler) = self.sampler.try_lock() else {
            return Taken::Busy;
        };
        self.settle();
        let sampler = &mut *sampler;
        sampler.number += 1;
        sampler.batch.clear();
        for place in &self.urgent {
            if let Some(index) = place.swap(0, Ordering::Acquire).checked_sub(1) {
                let record = self.receivers.get(index);
                sampler
                    .batch
                    .extend(record.filter(|_| !holds(&sampler.batch, index)));
            }
        }
        if is_last || !sampler.is_all && self.has_reserve() {
            sampler.position.left = 0;
        }
        self.scan(sampler);
        if sampler.batch.is_empty() && sampler.position.left == 0 {
            return Taken::Done {
                has_recovered: self.recover(),
                is_due: self.finish(sampler.looks),
            };
        }
        for record in sampler.batch.iter().rev() {
            look_at(record.address);
        }
        Taken::Batch(sampler.number)
    }

    /// Adds the next records of the pass to the batch.
    fn scan(&self, sampler: &mut Sampler) {
        let Sampler {
            batch,
            position,
            end,
            is_all,
            budget,
            ..
        } = sampler;
        let most = MAX_BATCH.min(*budget as usize);
        let Position { mut at, mut left } = *position;
        if most == 0 {
            left = 0;
        }
        let mut scanned = 0;
        let mut found = 0;
        while left > 0 && scanned < MAX_SCANNED && found < most {
            if at >= *end {
                at = 0;
            }
            let to = at + left.min(*end - at).min(MAX_SCANNED - scanned);
            let record = self.receivers.scan(
                at,
                to,
                |charge, seen| {
                    // With `is_all` every record: charged, or not yet seen empty twice. Otherwise those charged
                    // with more than the last look has found, or charged and never looked at.
                    *is_all || charge > 0 && (charge > seen || seen == NOT_SEEN)
                },
                |charge| self.credit(u64::from(charge)),
            );
            let passed = record.map_or(to, |record| record.index + 1) - at;
            (at, left, scanned) = (at + passed, left - passed, scanned + passed);
            if let Some(record) = record.filter(|record| !holds(batch, record.index)) {
                batch.push(record);
                found += 1;
            }
        }
        sampler.next = Position { at, left };
        if batch.is_empty() {
            *position = sampler.next;
        }
    }

    /// The results of the looks at the receivers of a batch, in its order: messages in the mailbox, 0 for a process
    /// that has exited, `None` for one that has not answered, which keeps its charge. Receivers that are missing at
    /// the end keep their charge too. A report on any but the last batch is ignored.
    pub fn report(
        &self,
        number: u64,
        lengths: impl IntoIterator<Item = Option<u64>>,
        now_ms: u64,
    ) -> Reported {
        let ignored = Reported {
            is_current: false,
            has_recovered: false,
        };
        let Ok(mut sampler) = self.sampler.try_lock() else {
            return ignored;
        };
        if sampler.number != number || sampler.batch.is_empty() {
            return ignored;
        }
        self.skip_sample(now_ms);
        let mut credited = 0;
        for (record, length) in sampler.batch.iter().zip(lengths) {
            let Some(length) = length else {
                continue;
            };
            let queued = u32::try_from(length).unwrap_or(u32::MAX);
            self.receivers.look(
                record,
                queued,
                |returned| credited += u64::from(returned),
                |charged| self.debit(u64::from(charged)),
            );
        }
        self.credit(credited);
        let looks = sampler.batch.len() as u32;
        self.times
            .0
            .looks
            .fetch_add(u64::from(looks), Ordering::Relaxed);
        sampler.batch.clear();
        sampler.looks = sampler.looks.saturating_add(looks);
        sampler.budget = sampler.budget.saturating_sub(looks);
        sampler.position = sampler.next;
        sampler.number += 1;
        Reported {
            is_current: true,
            has_recovered: self.recover(),
        }
    }

    /// Sets when looks are requested next. Returns whether they are due already.
    fn finish(&self, looks: u32) -> bool {
        let threshold = self.bounds.0.threshold.load(Ordering::Relaxed);
        if threshold == OFF {
            return false;
        }
        let admitted = self.admitted.0.load(Ordering::Acquire);
        let room = bound(threshold).saturating_sub(self.queued());
        let pause = if self.has_reserve() {
            ask_level(bound(threshold)).saturating_sub(self.queued())
        } else {
            // Rounded up: otherwise the last place would be used up before the request.
            room.div_ceil(2).max(u64::from(looks / 8))
        };
        let pause = pause.max(1);
        let mut is_due = self.ask_at(admitted + pause);
        // After `ask_at`: if this is the former threshold, `rearm` comes after it, and its count prevails.
        if self.bounds.0.threshold.load(Ordering::Relaxed) != threshold {
            is_due = self.ask_at(admitted + 1);
        }
        room > 0 && is_due
    }

    /// Has the next message request looks, after the threshold has changed.
    fn rearm(&self) {
        // `finish` updates the same word before it loads the threshold again. Either this comes first, and it finds
        // the new threshold; or the count that it has stored is replaced by the one below.
        let admitted = self.admitted.0.fetch_add(0, Ordering::AcqRel);
        self.ask_at(admitted + 1);
        // A message that is admitted at this moment may have loaded `look_at` before. The next one requests in any
        // case.
        self.times.0.told_ms.store(0, Ordering::Relaxed);
    }

    /// Whether looks can wait until the depth is at [`ask_level`].
    fn has_reserve(&self) -> bool {
        let threshold = self.bounds.0.threshold.load(Ordering::Relaxed);
        threshold == OFF || self.queued() < bound(threshold) / 8 * 5
    }

    /// Has the message with this count request looks. Returns whether that count has been reached already.
    fn ask_at(&self, count: u64) -> bool {
        self.bounds.0.look_at.store(count, Ordering::Relaxed);
        // A read-modify-write of the word that callers count in: a caller that counts later sees `look_at`, and one
        // that counted before is seen here. So one of them detects that the count is reached.
        self.admitted.0.fetch_add(0, Ordering::AcqRel) >= count
    }

    /// Whether looks are due: no pass has ended since.
    pub fn is_due(&self) -> bool {
        self.admitted.0.load(Ordering::Relaxed) >= self.bounds.0.look_at.load(Ordering::Relaxed)
    }

    /// Pauses sampling until a message is admitted, which requests a sample. `false` if there is something to look
    /// at, or the shard is so full that it would admit everything for want of a sampler.
    pub fn pause(&self) -> bool {
        let admitted = self.admitted.0.load(Ordering::Acquire);
        let held = self.times.0.held.load(Ordering::Acquire);
        self.receivers.live() == 0
            && self.queued() <= held
            && (held == 0 || self.has_reserve())
            && !self.ask_at(admitted + 1)
    }

    /// In place of a sample: everything admitted since the last one keeps its charge, and the sampler counts as
    /// active.
    pub fn skip_sample(&self, now_ms: u64) {
        let times = &self.times.0;
        let admitted = self.admitted.0.load(Ordering::Acquire);
        times.seen.store(admitted, Ordering::Relaxed);
        times.sampled_ms.store(now_ms + 1, Ordering::Relaxed);
        times.told_ms.store(now_ms + 1, Ordering::Relaxed);
    }

    /// Settles what was counted outside of the records.
    fn settle(&self) {
        let times = &self.times.0;
        if times.lent.load(Ordering::Relaxed) > 0 {
            self.debit(times.lent.swap(0, Ordering::AcqRel));
        }
        if times.strays.load(Ordering::Relaxed) > 0 {
            self.credit(times.strays.swap(0, Ordering::AcqRel));
        }
    }

    fn recover(&self) -> bool {
        let threshold = self.bounds.0.threshold.load(Ordering::Relaxed);
        let is_overloaded = &self.times.0.is_overloaded;
        // Half the threshold: otherwise a shard that is just full would enter and leave overload all the time.
        (threshold == OFF || self.queued() < bound(threshold).div_ceil(2))
            && is_overloaded.load(Ordering::Relaxed)
            && is_overloaded.swap(false, Ordering::Relaxed)
    }

    // ---- For all callers ----

    /// Charges the shard with this many messages in a queue that counts for itself what waits in it, exactly. To be called
    /// before they are added to it.
    pub fn hold(&self, messages: u64) {
        self.times.0.held.fetch_add(messages, Ordering::AcqRel);
        self.debit(messages);
    }

    /// So many of the messages of [`Self::hold`] have left their queue.
    pub fn release(&self, messages: u64) {
        self.credit(messages);
        self.times.0.held.fetch_sub(messages, Ordering::AcqRel);
    }

    /// Adds room for this many messages to the shard.
    fn credit(&self, messages: u64) {
        self.bounds.0.credited.fetch_add(messages, Ordering::AcqRel);
    }

    /// Charges the shard with this many messages, besides those admitted.
    fn debit(&self, messages: u64) {
        self.bounds.0.credited.fetch_sub(messages, Ordering::AcqRel);
    }

    #[inline]
    fn queued(&self) -> u64 {
        let admitted = self.admitted.0.load(Ordering::Relaxed);
        let credited = self.bounds.0.credited.load(Ordering::Relaxed);
        // Below zero for a moment, when the first load is older than the second one.
        admitted
            .checked_sub(credited)
            .filter(|queued| *queued <= i64::MAX as u64)
            .unwrap_or(0)
    }

    /// The most messages that wait in the shard; 0 while everything is admitted.
    pub fn depth(&self) -> u64 {
        match self.threshold() {
            Some(_) => self.queued(),
            None => 0,
        }
    }

    /// The process at `address` reports that `delta` messages were queued there, or with a negative `delta` that it
    /// has received as many.
    ///
    /// What it has received is returned from its own charge, exactly. The rest is lent to the shard until the next
    /// batch of looks, since the same messages may be found gone elsewhere. No more than the depth is lent, so that
    /// it never goes below zero.
    pub fn adjust(&self, address: u64, delta: i64) {
        let messages = u32::try_from(delta.unsigned_abs()).unwrap_or(u32::MAX);
        if self.threshold().is_none() || address == UNSEEN {
            return;
        }
        if delta >= 0 {
            let messages = messages.min(MAX_CHARGE);
            self.debit(u64::from(messages));
            let charged = self.receivers.charge_many(address, messages);
            self.credit(u64::from(messages - charged));
            return;
        }
        let returned = self.take_back(address, messages);
        let lent = delta.unsigned_abs() - u64::from(returned);
        let lent = lent.min(self.queued());
        if lent > 0 {
            self.times.0.lent.fetch_add(lent, Ordering::AcqRel);
            self.credit(lent);
        }
    }

    /// Returns part of the charge of a process. If its record is in the batch, the charge that was read there is
    /// reduced as well, so that the look does not find the same messages missing a second time.
    fn take_back(&self, address: u64, messages: u32) -> u32 {
        let Ok(mut sampler) = self.sampler.try_lock() else {
            return 0;
        };
        let Some((index, returned)) = self.receivers.take_back(address, messages) else {
            return 0;
        };
        self.give_back(&mut sampler, index, returned);
        returned
    }

    /// Part of the charge of a record has been taken from it.
    fn give_back(&self, sampler: &mut Sampler, index: u32, returned: u32) {
        // Lent messages are paid back first: they may be the same ones.
        let lent = &self.times.0.lent;
        let paid = lent.load(Ordering::Acquire).min(u64::from(returned));
        lent.fetch_sub(paid, Ordering::AcqRel);
        self.credit(u64::from(returned) - paid);
        for record in &mut sampler.batch {
            if record.index == index {
                record.charge = record.charge.saturating_sub(returned);
            }
        }
    }

    /// The process at `address` has exited: its charge is returned, and its record is freed. Otherwise a record whose
    /// process was seen empty once would be found again only by a pass over all of them. If the sampler is busy just now, or
    /// messages are charged all the time, it is left to such a pass (see [`Self::is_crowded`]).
    pub fn ended(&self, address: u64) {
        if address == UNSEEN || self.receivers.live() == 0 {
            return;
        }
        if let Ok(mut sampler) = self.sampler.try_lock()
            && let Some((index, returned)) = self.receivers.take_all(address)
        {
            self.give_back(&mut sampler, index, returned);
        }
    }

    /// Whether there are so many more records than processes behind the shard's entries, `receivers`, that a pass over all of
    /// them is due. Most are of processes that have exited.
    pub fn is_crowded(&self, receivers: u64) -> bool {
        u64::from(self.receivers.live()) > 2 * receivers + CROWDED
    }

    /// The most messages that the shard accepts; `None` for any number.
    pub fn threshold(&self) -> Option<u64> {
        let threshold = self.bounds.0.threshold.load(Ordering::Relaxed);
        (threshold != OFF).then_some(bound(threshold))
    }

    /// Whether the threshold follows the number of receivers.
    pub fn is_auto(&self) -> bool {
        is_auto(self.bounds.0.threshold.load(Ordering::Relaxed))
    }

    /// Changes the threshold: one swap. The next message requests a sample. `receivers` is the number of receivers
    /// of the shard.
    pub fn set_threshold(&self, threshold: Threshold, receivers: u64) {
        let word = match threshold {
            Threshold::Off => OFF,
            Threshold::Auto => automatic(receivers),
            Threshold::Exactly(threshold) => threshold,
        };
        // A swap and no store: no compare-and-swap of `follow` comes between what it reads and what it writes.
        self.bounds.0.threshold.swap(word, Ordering::AcqRel);
        self.recover();
        self.rearm();
    }

    /// Has an automatic threshold follow the number of receivers. Returns the threshold in force.
    pub(crate) fn follow(&self, receivers: u64) -> u64 {
        let word = self.bounds.0.threshold.load(Ordering::Relaxed);
        let followed = automatic(receivers);
        if !is_auto(word) || word == followed {
            return word;
        }
        // Lost to a concurrent change, which prevails.
        match self.bounds.0.threshold.compare_exchange(
            word,
            followed,
            Ordering::AcqRel,
            Ordering::Relaxed,
        ) {
            Ok(_) => {
                // Below a higher threshold looks are requested too early, which does no harm.
                if followed < word {
                    self.rearm();
                }
                followed
            }
            Err(other) => other,
        }
    }

    /// Messages admitted so far.
    pub fn admitted(&self) -> u64 {
        self.admitted.0.load(Ordering::Relaxed) - ORIGIN
    }

    /// Number of processes that were sent something and have not been seen empty since.
    pub fn active_receivers(&self) -> u32 {
        self.receivers.live()
    }

    /// Looks that were reported so far.
    pub fn looks(&self) -> u64 {
        self.times.0.looks.load(Ordering::Relaxed)
    }

    /// Whether messages were refused and the shard has not recovered since.
    pub fn is_overloaded(&self) -> bool {
        self.times.0.is_overloaded.load(Ordering::Relaxed)
    }

    /// Whether messages have been admitted since the last sample and that is too old to count: no process samples,
    /// and everything is admitted. `false` if no message has been admitted since.
    pub fn is_unwatched(&self, sampling: &Sampling, now_ms: u64) -> bool {
        self.threshold().is_some()
            && self.admitted.0.load(Ordering::Relaxed) > self.times.0.seen.load(Ordering::Relaxed)
            && self.is_stale(sampling, now_ms)
    }

    /// Milliseconds since the sampler was last active; `None` if it never was.
    pub fn sample_age_ms(&self, now_ms: u64) -> Option<u64> {
        age_ms(&self.times.0.sampled_ms, now_ms)
    }
}

/// Whether a batch has a record. A record twice in one batch would be credited twice for what one look has found.
fn holds(batch: &[Found], index: u32) -> bool {
    batch.iter().any(|record| record.index == index)
}

/// The depth at which looks are requested. The higher it is, the more messages each look covers; the room left must
/// last until the sampler looks.
fn ask_level(bound: u64) -> u64 {
    bound - bound / 4
}

/// The number of messages in a threshold that is not [`OFF`].
#[inline]
fn bound(threshold: u64) -> u64 {
    threshold & !AUTO
}

#[inline]
fn is_auto(threshold: u64) -> bool {
    threshold != OFF && threshold & AUTO != 0
}

fn automatic(receivers: u64) -> u64 {
    AUTO | receivers
        .saturating_mul(PER_RECEIVER)
        .clamp(RECEIVER_LIMIT, 1 << 40)
}

/// Milliseconds since a stored time; `None` for never. A time ahead of the clock counts as now.
fn age_ms(at: &AtomicU64, now_ms: u64) -> Option<u64> {
    let now = now_ms + 1;
    match at.load(Ordering::Relaxed) {
        0 => None,
        ahead if ahead > now => {
            // Lost to a concurrent store, which is no older.
            let _ = at.compare_exchange(ahead, now, Ordering::Relaxed, Ordering::Relaxed);
            Some(0)
        }
        stored => Some(now - stored),
    }
}

/// Stores the time, for exactly one of the callers for which the stored time `is_due` by its age.
fn claim(at: &AtomicU64, now_ms: u64, is_due: impl FnOnce(u64) -> bool) -> bool {
    let age = age_ms(at, now_ms);
    let stored = match age {
        None => 0,
        Some(age) => now_ms + 1 - age,
    };
    age.is_none_or(is_due)
        && at
            .compare_exchange(stored, now_ms + 1, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
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
            .field("receivers", &self.receivers)
            .finish_non_exhaustive()
    }
}
