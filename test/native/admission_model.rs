//! Admission control against a plain model: random histories of messages, samples, adjustments and changes.
//! Every answer and every figure are compared after every step.
//!
//! Takes about a second in release.
#![cfg(not(loom))]

use std::sync::atomic::AtomicU32;

use erlmcp_core::admission::{
    Admission, Begun, Overloaded, Pass, RECEIVER_LIMIT, Sampling, Taken, Threshold, UNSEEN,
};
use proptest::prelude::*;

/// The number of processes. Each has two ids. The last one cannot be sampled.
const PROCESSES: usize = 6;

#[derive(Debug, Clone, Copy)]
enum Step {
    /// Routes so many messages to a process, by one of its ids.
    Route(usize, usize, u64),
    Check(usize),
    /// A process receives so many messages at most.
    Receive(usize, u64),
    /// A pass: whether over all receivers, how many messages are routed during each batch, and whether the
    /// sampler is killed before it reports.
    Sample(bool, u64, bool),
    /// A pass in which no process answers.
    PassOver,
    Skip,
    Pause,
    Adjust(usize, i64),
    SetThreshold(Threshold, u64),
    Advance(u64),
    AdvanceToStale(i64),
    Back(u64),
}

fn thresholds() -> impl Strategy<Value = Threshold> {
    prop_oneof![
        6 => (1..30u64).prop_map(Threshold::Exactly),
        1 => Just(Threshold::Exactly(10_000)),
        1 => Just(Threshold::Exactly(1 << 40)),
        3 => Just(Threshold::Auto),
        2 => Just(Threshold::Off),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        12 => (0..PROCESSES, 0..2usize, 1..6u64).prop_map(|(p, id, n)| Step::Route(p, id, n)),
        3 => (0..PROCESSES, 0..2usize, 1..60u64).prop_map(|(p, id, n)| Step::Route(p, id, n)),
        1 => (0..PROCESSES, 0..2usize, 4_000..12_000u64).prop_map(|(p, id, n)| Step::Route(p, id, n)),
        3 => (0..PROCESSES).prop_map(Step::Check),
        8 => (0..PROCESSES, 0..60u64).prop_map(|(p, n)| Step::Receive(p, n)),
        3 => (0..PROCESSES).prop_map(|p| Step::Receive(p, u64::MAX)),
        8 => (any::<bool>(), 0..6u64, prop::bool::weighted(0.2))
            .prop_map(|(all, n, killed)| Step::Sample(all, n, killed)),
        1 => Just(Step::PassOver),
        2 => Just(Step::Skip),
        2 => Just(Step::Pause),
        3 => (0..PROCESSES, -20..20i64).prop_map(|(p, delta)| Step::Adjust(p, delta)),
        2 => (thresholds(), 0..500u64).prop_map(|(t, n)| Step::SetThreshold(t, n)),
        4 => (0..400u64).prop_map(Step::Advance),
        2 => (0..2i64).prop_map(Step::AdvanceToStale),
        1 => (0..2000u64).prop_map(Step::Back),
    ];
    prop::collection::vec(step, 1..100)
}

/// The messages admitted less those seen to be received, for the shard and for each process.
struct Model {
    threshold: Threshold,
    receivers: u64,
    now_ms: u64,
    depth: u64,
    charges: [u64; PROCESSES],
    /// The lengths of the mailboxes.
    queued: [u64; PROCESSES],
    lent: u64,
    admitted: u64,
    /// The message with this number requests a sample.
    asks: u64,
    sampled_ms: Option<u64>,
    asked_ms: Option<u64>,
    is_overloaded: bool,
    failed_ms: Option<u64>,
}

const INTERVAL_MS: u64 = 100;

impl Model {
    fn bound(&self) -> Option<u64> {
        match self.threshold {
            Threshold::Off => None,
            Threshold::Auto => Some(10_000.max(43 * self.receivers)),
            Threshold::Exactly(bound) => Some(bound),
        }
    }

    /// After the clock has gone back, a time in the future becomes now.
    fn age(at: &mut Option<u64>, now_ms: u64) -> Option<u64> {
        *at = at.map(|at| at.min(now_ms));
        at.map(|at| now_ms - at)
    }

    fn is_stale(&mut self) -> bool {
        let Some(sampled) = Self::age(&mut self.sampled_ms, self.now_ms) else {
            return true;
        };
        let asked = Self::age(&mut self.asked_ms, self.now_ms).unwrap_or(u64::MAX);
        sampled.min(asked) > 10 * INTERVAL_MS
    }

    fn is_full(&self) -> bool {
        self.bound().is_some_and(|bound| self.depth >= bound)
    }

    fn check(&mut self, process: usize) -> Result<(), Overloaded> {
        let is_full = self.is_full();
        let is_receiver_full = self.threshold == Threshold::Auto
            && process + 1 != PROCESSES
            && self.charges[process] >= RECEIVER_LIMIT;
        if !(is_full || is_receiver_full) || self.is_stale() {
            // A full shard whose last sample is stale admits everything.
            return Ok(());
        }
        let mut overloaded = Overloaded {
            has_entered: false,
            is_failure: false,
            wants_sample: false,
        };
        if is_full {
            overloaded.has_entered = !self.is_overloaded;
            self.is_overloaded = true;
            if overloaded.has_entered
                && Self::age(&mut self.failed_ms, self.now_ms).is_none_or(|age| age >= 1000)
            {
                self.failed_ms = Some(self.now_ms);
                overloaded.is_failure = true;
            }
        }
        Err(overloaded)
    }

    fn admit(&mut self, process: usize) {
        if self.threshold == Threshold::Off {
            return;
        }
        self.admitted += 1;
        if process + 1 != PROCESSES {
            self.depth += 1;
            self.charges[process] += 1;
        }
    }

    /// The end of a pass of so many looks.
    fn finish(&mut self, looks: u64) {
        let Some(bound) = self.bound() else {
            return;
        };
        let pause = if self.depth < bound / 8 * 5 {
            (bound - bound / 4).saturating_sub(self.depth)
        } else {
            let room = bound.saturating_sub(self.depth);
            room.div_ceil(2).max(looks / 8)
        };
        self.asks = self.admitted + pause.max(1);
    }

    /// A look that found `queued`, after the charge was read as `charge`.
    fn look(&mut self, process: usize, charge: u64, queued: u64) {
        self.depth = self.depth + queued - charge;
        self.charges[process] = self.charges[process] + queued - charge;
    }

    fn recover(&mut self) -> bool {
        let has_room = self
            .bound()
            .is_none_or(|bound| self.depth < bound.div_ceil(2));
        let has_recovered = has_room && self.is_overloaded;
        self.is_overloaded &= !has_room;
        has_recovered
    }
}

struct Run {
    sampling: Sampling,
    admission: Admission,
    model: Model,
    kept: [[AtomicU32; 2]; PROCESSES],
}

fn address(process: usize) -> u64 {
    if process + 1 == PROCESSES {
        UNSEEN
    } else {
        1_000 + process as u64
    }
}

fn process(address: u64) -> usize {
    address as usize - 1_000
}

impl Run {
    fn new() -> Self {
        Self {
            sampling: Sampling::new(INTERVAL_MS),
            admission: Admission::new(),
            model: Model {
                threshold: Threshold::Off,
                receivers: 0,
                now_ms: 5_000,
                depth: 0,
                charges: [0; PROCESSES],
                queued: [0; PROCESSES],
                lent: 0,
                admitted: 0,
                asks: 0,
                sampled_ms: None,
                asked_ms: None,
                is_overloaded: false,
                failed_ms: None,
            },
            kept: Default::default(),
        }
    }

    fn route(&mut self, process: usize, id: usize) {
        let (now_ms, receivers) = (self.model.now_ms, self.model.receivers);
        let kept = &self.kept[process][id];
        let mut to = self.admission.receiver(address(process), kept);
        let checked = self
            .admission
            .check(&mut to, &self.sampling, || now_ms, || receivers);
        // When samples are requested is the subject of other tests.
        let checked = checked.map_err(|refused| Overloaded {
            wants_sample: false,
            ..refused
        });
        assert_eq!(checked, self.model.check(process));
        if checked.is_ok() {
            let before = self.model.admitted;
            let admitted = self.admission.admit(&to, &self.sampling, || now_ms);
            self.model.admit(process);
            self.model.queued[process] += 1;
            if self.model.admitted > before && self.model.admitted == self.model.asks {
                assert!(admitted.wants_sample);
                if self
                    .model
                    .bound()
                    .is_some_and(|bound| self.model.depth <= bound)
                {
                    self.model.asked_ms = Some(now_ms);
                }
            }
        }
    }

    fn sample(&mut self, pass: Pass, meanwhile: u64, is_killed: bool, answers: bool) {
        let now_ms = self.model.now_ms;
        assert_ne!(self.admission.begin_pass(pass, now_ms), Begun::Busy);
        self.model.sampled_ms = Some(now_ms);
        let mut looks = 0;
        for round in 0.. {
            assert!(round < 1_000, "a pass that does not end");
            let mut processes = Vec::new();
            let taken = self
                .admission
                .take(false, |address| processes.push(process(address)));
            processes.reverse();
            self.model.depth += std::mem::take(&mut self.model.lent);
            match taken {
                Taken::Batch(number) => {
                    let charges = self.model.charges;
                    let processes_looked_at = processes.len() as u64;
                    for n in 0..meanwhile {
                        self.route(n as usize % PROCESSES, 0);
                    }
                    let queued = self.model.queued;
                    if is_killed {
                        return;
                    }
                    let lengths = processes.iter().map(|p| answers.then_some(queued[*p]));
                    let reported = self.admission.report(number, lengths, now_ms);
                    assert!(reported.is_current || processes.is_empty());
                    if answers {
                        for process in processes {
                            self.model.look(process, charges[process], queued[process]);
                        }
                    }
                    if reported.is_current {
                        looks += processes_looked_at;
                        assert_eq!(reported.has_recovered, self.model.recover());
                    }
                    // A report counts once.
                    let again = self.admission.report(number, [Some(1_000_000)], now_ms);
                    assert!(!again.is_current);
                }
                Taken::Done { has_recovered, .. } => {
                    assert_eq!(has_recovered, self.model.recover());
                    self.model.finish(looks);
                    return;
                }
                Taken::Busy => unreachable!("there is one sampler"),
            }
        }
    }

    fn step(&mut self, step: Step) {
        let now_ms = self.model.now_ms;
        match step {
            Step::Route(process, id, times) => {
                for _ in 0..times {
                    self.route(process, id);
                }
            }
            Step::Check(process) => {
                let receivers = self.model.receivers;
                let kept = &self.kept[process][0];
                let mut to = self.admission.receiver(address(process), kept);
                let checked =
                    self.admission
                        .check(&mut to, &self.sampling, || now_ms, || receivers);
                let checked = checked.map_err(|refused| Overloaded {
                    wants_sample: false,
                    ..refused
                });
                assert_eq!(checked, self.model.check(process));
            }
            Step::Receive(process, most) => {
                let queued = &mut self.model.queued[process];
                *queued -= most.min(*queued);
            }
            Step::Sample(is_all, meanwhile, is_killed) => {
                let pass = if is_all { Pass::All } else { Pass::Asked };
                self.sample(pass, meanwhile, is_killed, true);
            }
            Step::PassOver => {
                // Receivers keep their charge.
                assert_ne!(self.admission.begin_pass(Pass::All, now_ms), Begun::Busy);
                self.model.sampled_ms = Some(now_ms);
                if let Taken::Batch(number) = self.admission.take(false, |_| ()) {
                    let none = std::iter::repeat_n(None, 100);
                    let reported = self.admission.report(number, none, now_ms);
                    self.model.depth += std::mem::take(&mut self.model.lent);
                    if reported.is_current {
                        assert_eq!(reported.has_recovered, self.model.recover());
                    }
                } else {
                    self.model.depth += std::mem::take(&mut self.model.lent);
                    self.model.recover();
                    self.model.finish(0);
                }
            }
            Step::Skip => {
                self.admission.skip_sample(now_ms);
                self.model.sampled_ms = Some(now_ms);
            }
            Step::Pause => {
                let is_idle = self.admission.active_receivers() == 0 && self.model.depth == 0;
                assert_eq!(self.admission.pause(), is_idle);
                if is_idle {
                    self.model.asks = self.model.admitted + 1;
                }
            }
            Step::Adjust(process, delta) => {
                self.admission.adjust(address(process), delta);
                let model = &mut self.model;
                if model.threshold != Threshold::Off && address(process) != UNSEEN {
                    if delta >= 0 {
                        model.depth += delta as u64;
                        model.charges[process] += delta as u64;
                    } else {
                        let taken = delta.unsigned_abs().min(model.charges[process]);
                        model.charges[process] -= taken;
                        let paid = taken.min(model.lent);
                        model.lent -= paid;
                        model.depth -= taken - paid;
                        let lent = (delta.unsigned_abs() - taken).min(model.depth);
                        model.depth -= lent;
                        model.lent += lent;
                    }
                }
            }
            Step::SetThreshold(threshold, receivers) => {
                self.admission.set_threshold(threshold, receivers);
                self.model.threshold = threshold;
                self.model.receivers = receivers;
                self.model.recover();
                self.model.asks = self.model.admitted + 1;
            }
            Step::Advance(ms) => self.model.now_ms += ms,
            Step::AdvanceToStale(ms) => {
                if let Some(last) = self.model.sampled_ms.max(self.model.asked_ms) {
                    let stale = last + 10 * INTERVAL_MS;
                    self.model.now_ms = now_ms.max(stale.saturating_add_signed(ms));
                }
            }
            Step::Back(ms) => self.model.now_ms = now_ms.saturating_sub(ms),
        }
        self.compare();
    }

    fn compare(&mut self) {
        let (admission, model) = (&self.admission, &mut self.model);
        let (now_ms, receivers) = (model.now_ms, model.receivers);
        assert_eq!(admission.threshold(), model.bound());
        assert_eq!(admission.is_auto(), model.threshold == Threshold::Auto);
        let depth = model.bound().map_or(0, |_| model.depth);
        assert_eq!(admission.depth(), depth);
        assert_eq!(admission.admitted(), model.admitted);
        assert_eq!(admission.is_overloaded(), model.is_overloaded);
        let is_open = !model.is_full() || model.is_stale();
        assert_eq!(
            admission.is_open(&self.sampling, || now_ms, || receivers),
            is_open
        );
        let age = Model::age(&mut model.sampled_ms, now_ms);
        assert_eq!(admission.sample_age_ms(now_ms), age);
        // Every charge is part of the depth or was lent.
        let charged: u64 = model.charges.iter().sum();
        assert!(model.depth + model.lent >= charged);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 3_000 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn behaves_like_its_definition(threshold in thresholds(), steps in steps()) {
        let mut run = Run::new();
        run.compare();
        run.step(Step::SetThreshold(threshold, 0));
        for step in steps {
            run.step(step);
        }
        // All processes receive everything. After three passes no charge and no record is left.
        for process in 0..PROCESSES {
            run.step(Step::Receive(process, u64::MAX));
        }
        for _ in 0..3 {
            run.step(Step::Sample(true, 0, false));
        }
        assert_eq!(run.admission.depth(), 0);
        assert_eq!(run.admission.active_receivers(), 0);
        assert!(run.admission.pause());
    }
}

fn sampled_shard(threshold: Threshold) -> (Admission, Sampling) {
    let (admission, sampling) = (Admission::new(), Sampling::new(100));
    admission.set_threshold(threshold, 0);
    sample(&admission, Pass::All, &[]);
    (admission, sampling)
}

/// A pass in which each process has so many messages. Returns the number of mailboxes sampled.
fn sample(admission: &Admission, pass: Pass, queued: &[u64]) -> usize {
    let mut looks = 0;
    admission.begin_pass(pass, 0);
    loop {
        let mut lengths = Vec::new();
        let taken = admission.take(false, |address| {
            lengths.push(Some(queued.get(address as usize - 1).copied().unwrap_or(0)));
        });
        lengths.reverse();
        let Taken::Batch(number) = taken else {
            return looks;
        };
        looks += lengths.len();
        admission.report(number, lengths, 0);
    }
}

/// `None` if the message is refused; otherwise whether its sender is to request a sample.
fn send(admission: &Admission, sampling: &Sampling, address: u64, now_ms: u64) -> Option<bool> {
    let kept = AtomicU32::new(0);
    let mut to = admission.receiver(address, &kept);
    admission.check(&mut to, sampling, || now_ms, || 0).ok()?;
    Some(admission.admit(&to, sampling, || now_ms).wants_sample)
}

/// Exactly one sender is told to request a sample before the shard is full, even if the last sample has left
/// room for only one message.
#[test]
fn a_sample_is_asked_for_before_the_shard_is_full() {
    for threshold in 1..20 {
        for queued in 0..threshold {
            let (admission, sampling) = sampled_shard(Threshold::Exactly(threshold));
            admission.adjust(1, queued as i64);
            sample(&admission, Pass::All, &[queued]);
            let mut asked = 0;
            while let Some(asks) = send(&admission, &sampling, 1, 1) {
                asked += u64::from(asks);
            }
            assert_eq!(asked, 1, "{threshold} {queued}");
            assert_eq!(admission.admitted(), threshold - queued);
        }
    }
}

/// A sender that is told to request a sample may exit before it has done so. Then a later sender is told, an
/// interval later, and one per interval as long as nothing samples. These requests are no sign of a sampler:
/// ten intervals after the first one everything is admitted.
#[test]
fn a_request_that_is_lost_is_made_again() {
    let (admission, sampling) = sampled_shard(Threshold::Exactly(10_000));
    assert!(admission.pause());
    let asked = |now_ms| {
        let asked = (0..5).filter(|_| send(&admission, &sampling, 1, now_ms) == Some(true));
        asked.count()
    };
    assert_eq!(asked(500), 1);
    assert_eq!(asked(600), 0, "within the interval");
    let times: Vec<_> = (601..2_000).filter(|now_ms| asked(*now_ms) == 1).collect();
    assert_eq!(times, (601..2_000).step_by(101).collect::<Vec<_>>());
    admission.set_threshold(Threshold::Exactly(1), 0);
    assert!(!admission.is_open(&sampling, || 1_500, || 0));
    assert!(admission.is_open(&sampling, || 1_501, || 0));
}

/// The clock goes back by any amount: a lost request is made again an interval later, and a shard without a
/// sampler is open ten intervals later.
#[test]
fn time_that_goes_back_makes_nobody_wait() {
    let (admission, sampling) = sampled_shard(Threshold::Exactly(2));
    assert!(admission.pause());
    admission.skip_sample(1_000_000);
    assert_eq!(send(&admission, &sampling, 1, 1_000_000), Some(true));
    assert_eq!(send(&admission, &sampling, 1, 1_000_000), Some(false));
    assert!(!admission.is_open(&sampling, || 10, || 0));
    assert!(!admission.is_open(&sampling, || 1_010, || 0));
    assert!(admission.is_open(&sampling, || 1_011, || 0));
    assert_eq!(admission.sample_age_ms(1_011), Some(1_001));
    admission.set_threshold(Threshold::Exactly(100), 0);
    assert_eq!(send(&admission, &sampling, 1, 1_000_000), Some(true));
    assert_eq!(send(&admission, &sampling, 1, 10), Some(false));
    assert_eq!(send(&admission, &sampling, 1, 110), Some(false));
    assert_eq!(send(&admission, &sampling, 1, 111), Some(true));
}

/// Adjustments of any size, up and down, and admission after them.
#[test]
fn any_adjustment_is_possible() {
    let (admission, sampling) = sampled_shard(Threshold::Exactly(10));
    for delta in [i64::MAX, i64::MAX, i64::MIN, i64::MIN, i64::MIN + 1, -1] {
        admission.adjust(1, delta);
        assert_eq!(admission.depth() >= 10, delta > 0);
        assert_eq!(admission.is_open(&sampling, || 0, || 0), delta < 0);
    }
    assert_eq!(admission.depth(), 0);
    let mut admitted = 0;
    while send(&admission, &sampling, 1, 0).is_some() {
        admitted += 1;
    }
    assert_eq!(admitted, 10, "more than the threshold after all that");
}

/// Messages that a receiver reports as received while it is being sampled are credited once.
#[test]
fn an_adjustment_during_a_look_counts_once() {
    let (admission, sampling) = sampled_shard(Threshold::Exactly(100));
    for _ in 0..10 {
        send(&admission, &sampling, 1, 0);
    }
    admission.begin_pass(Pass::All, 0);
    let Taken::Batch(number) = admission.take(false, |_| ()) else {
        panic!("nothing to look at");
    };
    admission.adjust(1, -4);
    admission.report(number, [Some(6)], 0);
    assert_eq!(admission.depth(), 6);
}

/// A process exits while its mailbox is looked at, and its record is given to another one: what was found belongs to neither.
#[test]
fn a_record_that_is_freed_during_a_look_is_left_alone() {
    let (admission, sampling) = sampled_shard(Threshold::Exactly(100));
    for _ in 0..3 {
        send(&admission, &sampling, 1, 0);
    }
    admission.begin_pass(Pass::All, 0);
    let Taken::Batch(number) = admission.take(false, |_| ()) else {
        panic!("nothing to look at");
    };
    admission.ended(1);
    assert_eq!((admission.depth(), admission.active_receivers()), (0, 0));
    send(&admission, &sampling, 2, 0);
    admission.report(number, [Some(50)], 0);
    assert_eq!((admission.depth(), admission.active_receivers()), (1, 1));
    for expected in [1, 0] {
        sample(&admission, Pass::All, &[0, 0, 0]);
        assert_eq!(
            (admission.depth(), admission.active_receivers()),
            (0, expected)
        );
    }
}

/// Messages in a queue that counts for itself fill the shard, and need no sampler unless it is full.
#[test]
fn held_messages_are_not_sampled() {
    let (admission, sampling) = sampled_shard(Threshold::Exactly(100));
    admission.hold(50);
    assert_eq!(admission.depth(), 50);
    assert!(admission.pause());
    admission.hold(50);
    assert!(
        !admission.pause(),
        "without samples it would admit everything"
    );
    assert!(send(&admission, &sampling, 1, 0).is_none());
    admission.release(100);
    assert_eq!(admission.depth(), 0);
    assert!(admission.pause());
}

/// Records of exited processes that nobody has freed are noticed.
#[test]
fn many_records_are_a_crowd() {
    let (admission, sampling) = sampled_shard(Threshold::Exactly(10_000));
    for address in 1..=1_003 {
        send(&admission, &sampling, address, 0);
    }
    assert!(admission.is_crowded(1) && !admission.is_crowded(2));
    admission.ended(1);
    assert!(!admission.is_crowded(1));
}

/// A process with many ids is charged in one record, sampled once, and refused at its limit.
#[test]
fn a_process_counts_once() {
    let (admission, sampling) = (Admission::new(), Sampling::new(100));
    admission.set_threshold(Threshold::Auto, 1_000);
    sample(&admission, Pass::All, &[]);
    let kept: Vec<AtomicU32> = (0..1_000).map(|_| AtomicU32::new(0)).collect();
    let mut admitted = 0;
    for round in 0..20_000 {
        let mut to = admission.receiver(7, &kept[round % kept.len()]);
        if admission.check(&mut to, &sampling, || 1, || 1_000).is_ok() {
            admission.admit(&to, &sampling, || 1);
            admitted += 1;
        }
    }
    assert_eq!(admitted, RECEIVER_LIMIT);
    assert_eq!(admission.active_receivers(), 1);
    assert!(!admission.is_overloaded(), "the others of the shard go on");
    assert!(send(&admission, &sampling, 8, 1).is_some());
    assert_eq!(
        sample(&admission, Pass::All, &[0, 0, 0, 0, 0, 0, 10_000, 1]),
        2
    );
    assert_eq!(send(&admission, &sampling, 7, 1), None);
    assert_eq!(sample(&admission, Pass::All, &[]), 2);
    assert_eq!(admission.depth(), 0);
}

/// A hot receiver is sampled as often as it needs, without samples of all the others.
#[test]
fn a_hot_receiver_is_looked_at_alone() {
    let (admission, sampling) = (Admission::new(), Sampling::new(100));
    admission.set_threshold(Threshold::Auto, 10_000);
    sample(&admission, Pass::All, &[]);
    for address in 1..=10_000 {
        send(&admission, &sampling, address, 1);
    }
    let mut looks = 0;
    for _ in 0..100_000 {
        if send(&admission, &sampling, 77, 1) == Some(true) {
            looks += sample(&admission, Pass::Asked, &[]);
        }
    }
    assert!(looks <= 100_000 / 5_000 + 1, "{looks} looks");
}
