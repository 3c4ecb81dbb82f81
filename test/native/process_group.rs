//! Groups of processes: against a model of plain sets, the members that are picked, and under contention.
#![cfg(not(loom))]

#[path = "contention.rs"]
mod contention;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use contention::until_contended;
use erlmcp_core::circuit_breaker::CircuitBreaker;
use erlmcp_core::clock::FakeClock;
use erlmcp_core::error::RegisterError;
use erlmcp_core::registry::{
    Limits, MemberId, Namespace, Pick, Refusal, Registry, Search, TooSparse,
};
use proptest::prelude::*;

const SHARDS: u16 = 4;
const MAX_ENTRIES: u64 = 1 << 20;

/// The group `group`: the bytes of each are the beginning of those of the next.
fn group_bytes(group: u8) -> Vec<u8> {
    vec![7; usize::from(group) * 15]
}

struct Groups(Registry<u64>);

impl Groups {
    fn new(max_entries: u64) -> Self {
        let limits = Limits::new(SHARDS.into(), max_entries, 1000).unwrap();
        Self(Registry::new(limits, &FakeClock::at_ns(0)))
    }

    /// The member is its own address.
    fn join(&self, group: u8, member: u64) -> Result<(), RegisterError> {
        let id = self.member_id(group, member);
        let shard = (member % u64::from(SHARDS)) as u16;
        self.0.register(
            Namespace::Member,
            self.0.id(id.kind(), id.bytes()),
            shard,
            member,
            None,
            |_| member,
        )
    }

    fn leave(&self, group: u8, member: u64) -> bool {
        let id = self.member_id(group, member);
        let id = self.0.id(id.kind(), id.bytes());
        self.0.remove(Namespace::Member, &id).is_some()
    }

    fn member_id(&self, group: u8, member: u64) -> MemberId {
        let group = group_bytes(group);
        MemberId::new(&self.0.id(0, &group), &member.to_le_bytes()).unwrap()
    }

    fn members(&self, group: u8) -> Vec<u64> {
        let mut members = Vec::new();
        let group = group_bytes(group);
        self.0
            .for_each_member(&self.0.id(0, &group), |entry| members.push(entry.address));
        members.sort_unstable();
        members
    }

    fn count(&self, group: u8) -> u64 {
        self.0.group_count(&self.0.id(0, &group_bytes(group)))
    }

    fn high_water(&self, group: u8) -> u32 {
        self.0.group_high_water(&self.0.id(0, &group_bytes(group)))
    }

    fn pick(&self, group: u8, pick: Pick) -> Option<u64> {
        self.search(group, pick, u32::MAX).unwrap()
    }

    fn search(&self, group: u8, pick: Pick, most_places: u32) -> Result<Option<u64>, TooSparse> {
        let group = group_bytes(group);
        let group = self.0.id(0, &group);
        let search = Search { pick, most_places };
        self.0.pick(&group, search, |_| true, |entry| entry.address)
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Join(u8, u64),
    Leave(u8, u64),
    /// The process exits: the entries of all its memberships are removed by their places.
    Exit(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (group, member) = (0..4u8, 1..6u64);
    let step = prop_oneof![
        4 => (group.clone(), member.clone()).prop_map(|(group, member)| Step::Join(group, member)),
        3 => (group, member.clone()).prop_map(|(group, member)| Step::Leave(group, member)),
        1 => member.prop_map(Step::Exit),
    ];
    prop::collection::vec(step, 1..80)
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 2_000 },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn groups_are_sets(steps in steps()) {
        const MOST: usize = 9;
        let groups = Groups::new(MOST as u64);
        let mut model = BTreeMap::<u8, BTreeSet<u64>>::new();
        for step in steps {
            let entries: usize = model.values().map(BTreeSet::len).sum();
            match step {
                Step::Join(group, member) => {
                    let members = model.entry(group).or_default();
                    let expected = match () {
                        () if members.contains(&member) => {
                            Err(RegisterError::AlreadyRegistered { address: member })
                        }
                        () if entries == MOST => Err(RegisterError::RegistryFull),
                        () => Ok(()),
                    };
                    if expected.is_ok() {
                        members.insert(member);
                    }
                    prop_assert_eq!(groups.join(group, member), expected);
                }
                Step::Leave(group, member) => {
                    let members = model.entry(group).or_default();
                    prop_assert_eq!(groups.leave(group, member), members.remove(&member));
                }
                Step::Exit(member) => {
                    for (group, members) in &mut model {
                        prop_assert_eq!(groups.leave(*group, member), members.remove(&member));
                    }
                }
            }
            for group in 0..4 {
                let members = model.entry(group).or_default();
                let expected: Vec<u64> = members.iter().copied().collect();
                prop_assert_eq!(&groups.members(group), &expected);
                prop_assert_eq!(groups.count(group), expected.len() as u64);
                // A group without members is forgotten, with the places that it had.
                prop_assert_eq!(groups.high_water(group) > 0, !expected.is_empty());
                for pick in [Pick::RoundRobin, Pick::Random, Pick::Keyed(17)] {
                    match groups.pick(group, pick) {
                        None => prop_assert!(expected.is_empty()),
                        Some(picked) => prop_assert!(expected.contains(&picked)),
                    }
                }
            }
            let entries: usize = model.values().map(BTreeSet::len).sum();
            prop_assert_eq!(groups.0.count(Namespace::Member), entries as u64);
        }
    }
}

fn with_members(members: std::ops::Range<u64>) -> Groups {
    let groups = Groups::new(MAX_ENTRIES);
    for member in members {
        groups.join(1, member).unwrap();
    }
    groups
}

/// How often each member is picked.
fn turns(groups: &Groups, picks: impl Iterator<Item = Pick>) -> BTreeMap<u64, u64> {
    let mut turns = BTreeMap::new();
    for pick in picks {
        *turns.entry(groups.pick(1, pick).unwrap()).or_default() += 1;
    }
    turns
}

/// Also where members have left, so that there are places without one.
#[test]
fn round_robin_gives_each_member_the_same_turns() {
    let groups = with_members(1..101);
    for gone in (10..60).chain([1, 100]) {
        assert!(groups.leave(1, gone));
    }
    let turns = turns(&groups, std::iter::repeat_n(Pick::RoundRobin, 48 * 5));
    assert_eq!(turns.len(), 48);
    assert!(turns.values().all(|turns| *turns == 5), "{turns:?}");
}

#[test]
fn random_members_are_equally_likely() {
    const PICKS: u64 = if cfg!(miri) { 400 } else { 40_000 };
    let groups = with_members(1..11);
    // Eight of ten are left.
    assert!(groups.leave(1, 3) && groups.leave(1, 8));
    let turns = turns(&groups, (0..PICKS).map(|_| Pick::Random));
    assert_eq!(turns.len(), 8);
    if !cfg!(miri) {
        let share = PICKS / 8;
        let expected = share * 9 / 10..=share * 11 / 10;
        assert!(
            turns.values().all(|turns| expected.contains(turns)),
            "{turns:?}"
        );
    }
}

/// A member that leaves gives its keys away, and no other key moves. A member that joins gets keys, and no key moves between
/// the others.
#[test]
fn keys_move_only_with_their_members() {
    const KEYS: u64 = if cfg!(miri) { 50 } else { 5_000 };
    let groups = with_members(1..21);
    let keys: Vec<u64> = (0..KEYS)
        .map(|key| groups.0.id(0, &key.to_le_bytes()).keyed_hash())
        .collect();
    let choices = || -> Vec<u64> {
        keys.iter()
            .map(|key| groups.pick(1, Pick::Keyed(*key)).unwrap())
            .collect()
    };
    let mut before = choices();
    let changes = [
        (false, 7),
        (false, 20),
        (true, 100),
        (true, 101),
        (true, 102),
        (false, 100),
        (true, 103),
    ];
    for (joins, member) in changes {
        if joins {
            groups.join(1, member).unwrap();
        } else {
            assert!(groups.leave(1, member));
        }
        let after = choices();
        let mut moved = 0;
        for (was, is) in before.iter().zip(&after) {
            if was != is {
                moved += 1;
                assert_eq!(if joins { *is } else { *was }, member);
            }
        }
        let share = KEYS / groups.count(1);
        if !cfg!(miri) {
            assert!(
                (share / 2..=share * 2).contains(&moved),
                "{moved} keys moved with member {member}, expected about {share}"
            );
        }
        before = after;
    }
}

/// A search is bounded where most members have left, and finds the last one without a bound.
#[test]
fn a_sparse_group_is_searched_in_part() {
    let groups = with_members(1..5_001);
    for gone in 1..5_000 {
        assert!(groups.leave(1, gone));
    }
    for pick in [Pick::RoundRobin, Pick::Random, Pick::Keyed(1 << 40)] {
        assert_eq!(groups.pick(1, pick), Some(5_000));
    }
    // The cursor is behind the last member, which is found again at the end of the search.
    let partly = groups.search(1, Pick::RoundRobin, 1_000);
    assert_eq!(partly, Err(TooSparse));
    assert!(groups.leave(1, 5_000));
    assert_eq!(groups.search(1, Pick::RoundRobin, 1), Ok(None));
}

/// Members that have exited are passed over until they are removed.
#[test]
fn members_that_are_not_live_are_not_picked() {
    let groups = with_members(1..101);
    let bytes = group_bytes(1);
    let group = groups.0.id(0, &bytes);
    for pick in [Pick::RoundRobin, Pick::Random, Pick::Keyed(99)] {
        let search = Search {
            pick,
            most_places: u32::MAX,
        };
        for _ in 0..20 {
            let is_live = |entry: &erlmcp_core::registry::Entry<u64>| entry.address == 42;
            let picked = groups
                .0
                .pick(&group, search, is_live, |entry| entry.address);
            assert_eq!(picked, Ok(Some(42)));
        }
        let picked = groups.0.pick(&group, search, |_| false, |_| ());
        assert_eq!(picked, Ok(None));
    }
}

/// A message to a group passes the shard of each member, and is charged to no bucket.
#[test]
fn each_member_is_admitted_by_itself() {
    use erlmcp_core::admission::Threshold;
    let clock = FakeClock::at_ns(0);
    let circuit = CircuitBreaker::new(None, &clock).unwrap();
    let groups = with_members(1..9);
    groups.0.set_threshold(1, Threshold::Exactly(1));
    // A shard that has never been sampled admits everything.
    groups.0.admission(1).skip_sample(0);
    let bytes = group_bytes(1);
    let group = groups.0.id(0, &bytes);
    let (mut sent, mut refused) = (BTreeMap::<u64, u64>::new(), 0);
    for _ in 0..3 {
        groups
            .0
            .route_group(&group, &circuit, &clock, |routed, _| match routed {
                Ok(entry) => *sent.entry(entry.address).or_default() += 1,
                Err(Refusal::ShardOverloaded) => refused += 1,
                Err(other) => panic!("{other:?}"),
            });
    }
    // Members 1 and 5 are in shard 1, which admits one message in all.
    assert_eq!(refused, 5);
    assert_eq!(sent.values().sum::<u64>(), 3 * 6 + 1);
    let search = Search {
        pick: Pick::RoundRobin,
        most_places: u32::MAX,
    };
    let outcomes: Vec<_> = (0..8)
        .map(|_| {
            groups
                .0
                .route_member(
                    &group,
                    search,
                    &circuit,
                    &clock,
                    |_| true,
                    |routed, _| routed.map(|entry| entry.address),
                )
                .unwrap()
        })
        .collect();
    let refused = |outcome: &&Result<u64, Refusal>| outcome.is_err();
    assert_eq!(outcomes.iter().filter(refused).count(), 2);
    let nobody = groups.0.id(0, b"nobody");
    let outcome = groups.0.route_member(
        &nobody,
        search,
        &circuit,
        &clock,
        |_| true,
        |routed, _| routed.map(|entry| entry.address),
    );
    assert_eq!(outcome, Ok(Err(Refusal::NotFound)));
}

/// Threads join and leave one group until one has found a shared member taken. A thread sees its own member from its join to
/// its leave, the shared member has one owner at a time, and the group that they leave is empty and forgotten.
#[test]
fn members_come_and_go_at_once() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = if cfg!(miri) { 15 } else { 10_000 };
    const SHARED: u64 = 1_000;
    until_contended(|| {
        let groups = Groups::new(MAX_ENTRIES);
        let (owners, taken) = (AtomicU64::new(0), AtomicU64::new(0));
        let barrier = Barrier::new(THREADS as usize);
        thread::scope(|scope| {
            for own in 1..=THREADS {
                let (groups, owners, taken, barrier) = (&groups, &owners, &taken, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    for round in 0..ROUNDS {
                        groups.join(1, own).unwrap();
                        assert!(groups.members(1).contains(&own));
                        assert!(groups.count(1) >= 1);
                        match groups.join(1, SHARED) {
                            Ok(()) => {
                                assert_eq!(owners.fetch_add(1, Ordering::SeqCst), 0);
                                thread::yield_now();
                                owners.fetch_sub(1, Ordering::SeqCst);
                                assert!(groups.leave(1, SHARED));
                            }
                            Err(RegisterError::AlreadyRegistered { .. }) => {
                                taken.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(other) => panic!("{other}"),
                        }
                        let pick = [Pick::RoundRobin, Pick::Random, Pick::Keyed(own)]
                            [(round % 3) as usize];
                        assert!(groups.pick(1, pick).is_some());
                        assert!(groups.leave(1, own));
                        assert!(!groups.members(1).contains(&own));
                    }
                });
            }
        });
        assert_eq!(groups.members(1), []);
        assert_eq!(groups.high_water(1), 0);
        assert_eq!(groups.0.count(Namespace::Member), 0);
        taken.into_inner() > 0
    });
}

/// Of several threads that pick in turn, no member gets more than one turn more than its share for each time that the cursor was
/// lost; here that is compared with the picks in all.
#[test]
fn round_robin_is_fair_under_contention() {
    const THREADS: u64 = 4;
    const PICKS: u64 = if cfg!(miri) { 50 } else { 50_000 };
    const MEMBERS: u64 = 10;
    let groups = with_members(1..1 + MEMBERS);
    let turns: Vec<AtomicU64> = (0..=MEMBERS).map(|_| AtomicU64::new(0)).collect();
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..PICKS {
                    let picked = groups.pick(1, Pick::RoundRobin).unwrap();
                    turns[picked as usize].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let share = THREADS * PICKS / MEMBERS;
    for turns in &turns[1..] {
        let turns = turns.load(Ordering::Relaxed);
        assert!(
            turns.abs_diff(share) <= share / 5 + THREADS,
            "{turns} of {share}"
        );
    }
}
