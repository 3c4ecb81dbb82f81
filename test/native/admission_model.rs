//! Admission control against a plain model: random histories of messages, samples and changes, every
//! answer and every figure compared after every step.
//!
//! Takes about a second in release.
#![cfg(not(loom))]

use erlmcp_core::admission::{Admission, Admitted, Overloaded, Sampled, Sampling};
use proptest::prelude::*;

#[derive(Debug, Clone, Copy)]
enum Step {
    Route(u64),
    Check,
    /// Messages found, messages routed meanwhile, and whether it is the last one.
    Sample(u64, u64, bool),
    Skip,
    Adjust(i64),
    SetThreshold(Option<u64>),
    SetInterval(u64),
    Advance(u64),
    /// To the last moment at which the last sample counts, and so many milliseconds more or less.
    AdvanceToStale(i64),
    Back(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let threshold = prop_oneof![6 => 1..30u64, 1 => Just(10_000), 1 => Just(1 << 40)];
    let step = prop_oneof![
        12 => (1..5u64).prop_map(Step::Route),
        3 => (1..60u64).prop_map(Step::Route),
        3 => Just(Step::Check),
        8 => (0..30u64, 0..6u64, any::<bool>()).prop_map(|(q, m, l)| Step::Sample(q, m, l)),
        1 => (0..1u64 << 30).prop_map(|queued| Step::Sample(queued, 0, false)),
        2 => Just(Step::Skip),
        3 => (-20..20i64).prop_map(Step::Adjust),
        1 => (-1i64 << 30..1 << 30).prop_map(Step::Adjust),
        2 => prop::option::weighted(0.8, threshold).prop_map(Step::SetThreshold),
        1 => (1..300u64).prop_map(Step::SetInterval),
        4 => (0..400u64).prop_map(Step::Advance),
        1 => (0..5000u64).prop_map(Step::Advance),
        2 => (0..2i64).prop_map(Step::AdvanceToStale),
        1 => (0..2000u64).prop_map(Step::Back),
    ];
    prop::collection::vec(step, 1..100)
}

#[derive(Default)]
struct Model {
    threshold: Option<u64>,
    interval_ms: u64,
    now_ms: u64,
    /// What was found at the last sample, and everything admitted since that began.
    depth: u64,
    admitted: u64,
    /// The message with this number asks for a sample. One of those after it does where nobody was told
    /// to, and nothing sampled, in the last interval.
    asks: Option<u64>,
    told_ms: Option<u64>,
    sampled_ms: Option<u64>,
    /// What was admitted when the last sample began.
    seen: u64,
    asked_ms: Option<u64>,
    is_overloaded: bool,
    failed_ms: Option<u64>,
}

impl Model {
    fn is_stale(&self) -> bool {
        let age = |sampled| self.now_ms.saturating_sub(sampled);
        self.sampled_ms.is_none_or(|sampled| {
            age(sampled.max(self.asked_ms.unwrap_or(0))) > 10 * self.interval_ms
        })
    }

    fn is_open(&self) -> bool {
        self.threshold
            .is_none_or(|threshold| self.depth < threshold)
            || self.is_stale()
    }

    fn check(&mut self) -> Result<(), Overloaded> {
        if self.is_open() {
            return Ok(());
        }
        let has_entered = !self.is_overloaded;
        self.is_overloaded = true;
        let is_due = self
            .failed_ms
            .is_none_or(|failed| self.now_ms.saturating_sub(failed) >= 1000);
        if has_entered && is_due {
            self.failed_ms = Some(self.now_ms);
        }
        Err(Overloaded {
            has_entered,
            is_failure: has_entered && is_due,
        })
    }

    fn admit(&mut self) -> Admitted {
        if self.threshold.is_none() {
            return Admitted {
                wants_sample: false,
            };
        }
        self.admitted += 1;
        self.depth += 1;
        let is_first = self.asks == Some(self.admitted);
        let is_late = self
            .told_ms
            .is_none_or(|told| self.now_ms.saturating_sub(told) > self.interval_ms);
        let wants_sample = is_first || self.asks < Some(self.admitted) && is_late;
        if is_first {
            self.asked_ms = Some(self.now_ms);
        }
        if wants_sample {
            self.told_ms = Some(self.now_ms);
        }
        Admitted { wants_sample }
    }

    fn credit(&mut self, began: u64, queued: u64, is_last: bool) -> Sampled {
        let was_overloaded = self.is_overloaded;
        let Some(threshold) = self.threshold else {
            self.is_overloaded = false;
            return Sampled {
                has_recovered: was_overloaded,
                is_used_up: false,
            };
        };
        self.depth = queued + (self.admitted - began);
        let left = threshold.saturating_sub(queued);
        self.asks = Some(began + if is_last { 1 } else { left.div_ceil(2) });
        let has_recovered = was_overloaded && left > threshold / 2;
        self.is_overloaded &= !has_recovered;
        Sampled {
            has_recovered,
            is_used_up: left > 0 && self.asks <= Some(self.admitted),
        }
    }

    fn set_threshold(&mut self, threshold: Option<u64>) {
        let queued = self.threshold.map_or(0, |_| self.depth);
        self.threshold = threshold;
        self.credit(self.admitted, queued, true);
    }
}

struct Run {
    sampling: Sampling,
    admission: Admission,
    model: Model,
}

impl Run {
    /// Returns whether the message was admitted.
    fn route(&mut self) -> bool {
        let now_ms = self.model.now_ms;
        let checked = self.admission.check(&self.sampling, || now_ms);
        assert_eq!(checked, self.model.check());
        if checked.is_ok() {
            assert_eq!(
                self.admission.admit(&self.sampling, || now_ms),
                self.model.admit()
            );
        }
        checked.is_ok()
    }

    fn step(&mut self, step: Step) {
        let now_ms = self.model.now_ms;
        match step {
            Step::Route(times) => {
                for _ in 0..times {
                    self.route();
                }
            }
            Step::Check => {
                let checked = self.admission.check(&self.sampling, || now_ms);
                assert_eq!(checked, self.model.check());
            }
            Step::Sample(queued, meanwhile, is_last) => {
                let began = self.admission.begin_sample();
                let model_began = self.model.admitted;
                for _ in 0..meanwhile {
                    self.route();
                }
                let sampled = self.admission.sampled(began, queued, is_last, now_ms);
                self.model.sampled_ms = Some(now_ms);
                self.model.told_ms = Some(now_ms);
                self.model.seen = model_began;
                assert_eq!(sampled, self.model.credit(model_began, queued, is_last));
            }
            Step::Skip => {
                self.admission.skip_sample(now_ms);
                self.model.sampled_ms = Some(now_ms);
                self.model.told_ms = Some(now_ms);
                self.model.seen = self.model.admitted;
            }
            Step::Adjust(delta) => {
                self.admission.adjust(delta);
                self.model.depth = self.model.depth.saturating_add_signed(delta);
            }
            Step::SetThreshold(threshold) => {
                self.admission.set_threshold(threshold);
                self.model.set_threshold(threshold);
            }
            Step::SetInterval(ms) => {
                self.sampling.set_interval_ms(ms);
                self.model.interval_ms = ms;
            }
            Step::Advance(ms) => self.model.now_ms += ms,
            Step::AdvanceToStale(ms) => {
                if let Some(last) = self.model.sampled_ms.max(self.model.asked_ms) {
                    let stale = last + 10 * self.model.interval_ms;
                    self.model.now_ms = now_ms.max(stale.saturating_add_signed(ms));
                }
            }
            Step::Back(ms) => self.model.now_ms = now_ms.saturating_sub(ms),
        }
        self.compare();
    }

    fn compare(&self) {
        let (admission, model) = (&self.admission, &self.model);
        let now_ms = model.now_ms;
        assert_eq!(admission.threshold(), model.threshold);
        assert_eq!(
            admission.depth(),
            model.threshold.map_or(0, |_| model.depth)
        );
        assert_eq!(admission.admitted(), model.admitted);
        assert_eq!(admission.is_overloaded(), model.is_overloaded);
        assert_eq!(
            admission.is_open(&self.sampling, || now_ms),
            model.is_open()
        );
        assert_eq!(
            admission.is_unwatched(&self.sampling, now_ms),
            model.threshold.is_some() && model.admitted > model.seen && model.is_stale()
        );
        let age = model.sampled_ms.map(|at| now_ms.saturating_sub(at));
        assert_eq!(admission.sample_age_ms(now_ms), age);
    }
}

fn run(threshold: Option<u64>, steps: Vec<Step>) {
    let mut run = Run {
        sampling: Sampling::new(100),
        admission: Admission::new(),
        model: Model {
            interval_ms: 100,
            ..Model::default()
        },
    };
    run.compare();
    if threshold.is_some() {
        run.step(Step::SetThreshold(threshold));
    }
    for step in steps {
        run.step(step);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 5_000 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn behaves_like_its_definition(
        threshold in prop::option::weighted(0.8, 1..40u64),
        steps in steps(),
    ) {
        run(threshold, steps);
    }
}

fn sampled_shard(threshold: u64) -> (Admission, Sampling) {
    let (admission, sampling) = (Admission::new(), Sampling::new(100));
    admission.set_threshold(Some(threshold));
    admission.sampled(admission.begin_sample(), 0, false, 0);
    (admission, sampling)
}

/// Exactly one message asks for a sample, and before the last one is admitted: also where the last
/// sample has left but one.
#[test]
fn a_sample_is_asked_for_before_the_shard_is_full() {
    for threshold in 1..20 {
        for queued in 0..threshold {
            let (admission, sampling) = sampled_shard(threshold);
            let began = admission.begin_sample();
            let sampled = admission.sampled(began, queued, false, 0);
            assert!(!sampled.is_used_up, "nothing was admitted meanwhile");
            let mut asked = 0;
            while admission.check(&sampling, || 1).is_ok() {
                asked += u64::from(admission.admit(&sampling, || 1).wants_sample);
            }
            assert_eq!(asked, 1);
            assert_eq!(admission.admitted(), threshold - queued);
        }
    }
}

/// Whoever is told to ask may end before it has done so: then one of those who come later is told, an
/// interval later, and one an interval as long as nothing samples. That is no sign of a sampler: ten
/// intervals after the first one everything is admitted.
#[test]
fn a_request_that_is_lost_is_made_again() {
    let (admission, sampling) = sampled_shard(10_000);
    admission.sampled(admission.begin_sample(), 0, true, 0);
    let asked = |now_ms| {
        let asked = (0..20).filter(|_| admission.admit(&sampling, || now_ms).wants_sample);
        asked.count()
    };
    assert_eq!(asked(500), 1);
    assert_eq!(asked(600), 0, "within the interval");
    let times: Vec<_> = (601..2_000).filter(|now_ms| asked(*now_ms) == 1).collect();
    assert_eq!(times, (601..2_000).step_by(101).collect::<Vec<_>>());
    admission.set_threshold(Some(1));
    assert!(!admission.is_open(&sampling, || 1_500));
    assert!(admission.is_open(&sampling, || 1_501));
}

/// A depth of any size, either way, and what comes after it.
#[test]
fn any_adjustment_is_possible() {
    let (admission, sampling) = sampled_shard(10);
    for delta in [i64::MAX, i64::MAX, i64::MIN, i64::MIN, i64::MIN + 1, -1] {
        admission.adjust(delta);
        assert_eq!(admission.depth() >= 10, delta > 0);
        assert_eq!(admission.is_open(&sampling, || 0), delta < 0);
    }
    assert_eq!(admission.depth(), 0);
    let mut admitted = 0;
    while admission.check(&sampling, || 0).is_ok() {
        admission.admit(&sampling, || 0);
        admitted += 1;
    }
    assert_eq!(admitted, 10, "more than the threshold after all that");
}
