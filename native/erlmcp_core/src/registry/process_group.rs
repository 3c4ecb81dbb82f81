//! Groups of processes: an id with any number of members.
//!
//! # Where the truth is
//!
//! A membership is an entry of the map of members, under an id made of the group's and the member's (see [`MemberId`]).
//! So a process is in a group at most once. It joins and leaves at the compare-and-swap of that entry, and a member
//! whose process exits is removed as any other entry is.
//!
//! # The life of a group
//!
//! A group has no owner. It begins with its first member, and ends with the last one. The map of groups names the
//! group's [`Roll`], a list of the places of its members. As in `bindings`, the roll may name entries that are not (or
//! no longer) members, and misses none:
//!
//! * A process joins: count it in the [`Headcount`], insert its place in the roll, insert the entry.
//! * It leaves: remove the entry, remove its place from the roll, count it out. The thread that counts out the last
//!   one ends the group and removes it from the map.
//!
//! A group that has ended has no members and gets no more: [`Headcount::enter`] fails, and the process joins the next
//! group of the same id. So a walk of a group's roll that began before the end misses only members that joined meanwhile.
//!
//! # Picking one
//!
//! * Round robin: the cursor is compare-and-swapped from the place where the search began to the one behind the
//!   member that was found. So places without a member give nobody a second turn. A thread that loses the cursor
//!   searches again, [`CURSOR_TRIES`] times at most; then it uses what it has found, and one member has one turn more.
//! * By key, and at random with a random key: jump consistent hash (Lamping and Veach, *A fast, minimal memory, consistent
//!   hash algorithm*, 2014) over the places of the roll, hashed again where there is no member. A member that joins or
//!   leaves changes what is picked only for the keys that it gets or had.

use std::sync::Arc;

use super::entry::{Key, Member};
use super::group::Roll;
use super::{Entry, Id, Location, Namespace, Registry};
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// The id of a membership: the group's id and the member, which is any bytes (at most 65,535).
///
/// The bytes are those of the group, those of the member, and the number of the latter in two bytes. So two of them are
/// equal if and only if group and member are.
#[derive(Debug)]
pub struct MemberId {
    kind: u8,
    bytes: Vec<u8>,
}

const LENGTH_BYTES: usize = 2;

impl MemberId {
    /// The id of a member of a group. `None` if the member has too many bytes.
    pub fn new(group: &Id<'_>, member: &[u8]) -> Option<Self> {
        let length = u16::try_from(member.len()).ok()?.to_le_bytes();
        Some(Self {
            kind: group.kind,
            bytes: [group.bytes, member, &length].concat(),
        })
    }

    /// The kind of the group's id.
    pub fn kind(&self) -> u8 {
        self.kind
    }

    /// The bytes, for [`Registry::id`].
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of the group's id.
    pub fn group_bytes<'a>(member: &Id<'a>) -> &'a [u8] {
        let Some((rest, length)) = member.bytes.split_last_chunk::<LENGTH_BYTES>() else {
            return member.bytes;
        };
        let group = rest
            .len()
            .saturating_sub(usize::from(u16::from_le_bytes(*length)));
        &rest[..group]
    }
}

const ENDED: u64 = 1 << 63;

/// The number of members of a group, and whether the group has ended for good.
#[doc(hidden)]
#[derive(Debug)]
pub struct Headcount(AtomicU64);

impl Headcount {
    /// Of a group with one member.
    #[doc(hidden)]
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(AtomicU64::new(1))
    }

    /// Counts a member. Returns whether the group goes on: one that has ended never does again. Wait-free.
    #[doc(hidden)]
    pub fn enter(&self) -> bool {
        self.0.fetch_add(1, Ordering::AcqRel) & ENDED == 0
    }

    /// Counts a member out. Returns whether that has ended the group, which is true for one caller. Wait-free.
    #[doc(hidden)]
    pub fn leave(&self) -> bool {
        self.0.fetch_sub(1, Ordering::AcqRel) == 1
            && self
                .0
                .compare_exchange(0, ENDED, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
    }

    /// The members, those included that are just joining or leaving.
    #[doc(hidden)]
    pub fn count(&self) -> u64 {
        match self.0.load(Ordering::Acquire) {
            ended if ended & ENDED != 0 => 0,
            count => count,
        }
    }
}

/// One life of a group.
pub(super) struct ProcessGroup {
    /// The group's id; its location means nothing.
    id: Key,
    roll: Roll,
    headcount: Headcount,
    /// The place behind the member that round robin picked last.
    cursor: AtomicU32,
    /// How many members were picked at random.
    draws: AtomicU64,
}

impl ProcessGroup {
    fn new(id: &Id<'_>) -> Arc<Self> {
        Arc::new(Self {
            id: Key::without_location(*id),
            roll: Roll::new(),
            headcount: Headcount::new(),
            cursor: AtomicU32::new(0),
            draws: AtomicU64::new(0),
        })
    }
}

/// The place of a member on the roll of its group.
pub(super) struct Joined {
    group: Arc<ProcessGroup>,
    index: u32,
}

impl Joined {
    fn is(&self, group: &Arc<ProcessGroup>, index: u32) -> bool {
        self.index == index && Arc::ptr_eq(&self.group, group)
    }
}

/// Which member of a group is picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    /// Each in turn.
    RoundRobin,
    /// Any.
    Random,
    /// The same one for the same number, as long as it is a member, and none that joins gets the number.
    Keyed(u64),
}

/// A search for a member of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Search {
    /// Which one.
    pub pick: Pick,
    /// How many places of the roll are searched in order: [`TooSparse`] if none of them has a live member and there are
    /// more.
    pub most_places: u32,
}

/// No member was found within the places that were to be searched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooSparse;

/// Searches of one pick by round robin.
const CURSOR_TRIES: u32 = 8;

/// Places that a key is hashed to before the places behind the last of these are searched in order. Where half of the
/// places have a member, one key in four billion comes to that.
const PROBES: u32 = 32;

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// The id of the group of a membership.
    pub(super) fn group_of<'a>(&self, member: &Id<'a>) -> Id<'a> {
        self.id(member.kind, MemberId::group_bytes(member))
    }

    /// Counts a member that is about to be inserted at this place, and puts it on the roll.
    pub(super) fn join_process_group(&self, id: &Id<'_>, location: Location) -> Joined {
        let group = self.enter_process_group(id);
        let index = group.roll.enter(location);
        Joined { group, index }
    }

    fn enter_process_group(&self, id: &Id<'_>) -> Arc<ProcessGroup> {
        let guard = self.groups.guard();
        loop {
            match self.groups.get(id, &guard) {
                Some(group) if group.headcount.enter() => return Arc::clone(group),
                Some(group) => self.forget_process_group(group),
                None => {
                    let group = ProcessGroup::new(id);
                    let key = Key::without_location(*id);
                    if self
                        .groups
                        .try_insert(key, Arc::clone(&group), &guard)
                        .is_ok()
                    {
                        return group;
                    }
                }
            }
            // Lost to the first member of the next group, or to the last one of this.
        }
    }

    /// Only for the thread that has removed the member's entry, or did not insert it.
    pub(super) fn leave_process_group(&self, joined: &Joined) {
        joined.group.roll.leave(joined.index);
        if joined.group.headcount.leave() {
            self.forget_process_group(&joined.group);
        }
    }

    fn forget_process_group(&self, group: &Arc<ProcessGroup>) {
        let guard = self.groups.guard();
        let id = self.id_of(&group.id);
        let removed = self
            .groups
            .remove_if(&id, |_, held| Arc::ptr_eq(held, group), &guard);
        if let Ok(Some(_)) = removed {
            self.churn.removed(id.hash);
        }
    }

    fn process_group(&self, id: &Id<'_>) -> Option<Arc<ProcessGroup>> {
        self.groups.get(id, &self.groups.guard()).map(Arc::clone)
    }

    /// Number of members of a group, those included that are just joining or leaving. Constant time.
    pub fn group_count(&self, group: &Id<'_>) -> u64 {
        self.groups
            .get(group, &self.groups.guard())
            .map_or(0, |group| group.headcount.count())
    }

    /// An upper bound of the members that [`Self::for_each_member`] visits: the most at one time since the group began.
    pub fn group_high_water(&self, group: &Id<'_>) -> u32 {
        self.groups
            .get(group, &self.groups.guard())
            .map_or(0, |group| group.roll.high_water())
    }

    /// Calls `each` with the members of a group. Weakly consistent; costs in proportion to the most members at one time
    /// since the group began.
    pub fn for_each_member(&self, group: &Id<'_>, mut each: impl FnMut(&Entry<L>)) {
        self.visit_members(group, |_, member| each(&member.entry));
    }

    pub(super) fn visit_members(&self, group: &Id<'_>, each: impl FnMut(&Key, &Member<L>)) {
        if let Some(group) = self.process_group(group) {
            let has_joined = |member: &Member<L>, index| member.joined.is(&group, index);
            let namespace = Namespace::Member;
            self.visit_roll(&self.members, namespace, &group.roll, has_joined, each);
        }
    }

    /// The result of `picked` for one member of a group that `is_live` accepts; `None` if there is none.
    ///
    /// Constant time if most of the places of the roll have a live member.
    pub fn pick<R>(
        &self,
        group: &Id<'_>,
        search: Search,
        is_live: impl Fn(&Entry<L>) -> bool,
        mut picked: impl FnMut(&Entry<L>) -> R,
    ) -> Result<Option<R>, TooSparse> {
        self.pick_member(group, search, is_live, |_, member| picked(&member.entry))
    }

    pub(super) fn pick_member<R>(
        &self,
        group: &Id<'_>,
        search: Search,
        is_live: impl Fn(&Entry<L>) -> bool,
        mut picked: impl FnMut(&Key, &Member<L>) -> R,
    ) -> Result<Option<R>, TooSparse> {
        let Some(group) = self.process_group(group) else {
            return Ok(None);
        };
        let places = group.roll.high_water();
        if places == 0 {
            return Ok(None);
        }
        let mut hash = match search.pick {
            Pick::RoundRobin => {
                for left in (0..CURSOR_TRIES).rev() {
                    let cursor = group.cursor.load(Ordering::Relaxed);
                    let take = |index, key: &Key, member: &Member<L>| {
                        // Relaxed: the cursor orders nothing but turns.
                        let advanced = group.cursor.compare_exchange(
                            cursor,
                            index + 1,
                            Ordering::Relaxed,
                            Ordering::Relaxed,
                        );
                        (advanced.is_ok() || left == 0).then(|| picked(key, member))
                    };
                    match self.first_member(&group, cursor, search.most_places, &is_live, take)? {
                        Found::Taken(result) => return Ok(Some(result)),
                        Found::Refused => {}
                        Found::None => break,
                    }
                }
                return Ok(None);
            }
            Pick::Random => {
                let draw = group.draws.fetch_add(1, Ordering::Relaxed);
                self.id(0, &draw.to_le_bytes()).hash
            }
            Pick::Keyed(hash) => hash,
        };
        let mut take = |_, key: &Key, member: &Member<L>| Some(picked(key, member));
        let mut index = 0;
        for _ in 0..PROBES {
            index = jump(hash, places);
            if let Ok(Found::Taken(result)) =
                self.first_member(&group, index, 1, &is_live, &mut take)
            {
                return Ok(Some(result));
            }
            hash = self.id(1, &hash.to_le_bytes()).hash;
        }
        match self.first_member(&group, index, search.most_places, &is_live, take)? {
            Found::Taken(result) => Ok(Some(result)),
            Found::Refused | Found::None => Ok(None),
        }
    }

    /// Calls `take` with the first live member at `start` or behind it, where the first place is behind the last one. At
    /// most `most` places are searched.
    fn first_member<R>(
        &self,
        group: &Arc<ProcessGroup>,
        start: u32,
        most: u32,
        is_live: &impl Fn(&Entry<L>) -> bool,
        mut take: impl FnMut(u32, &Key, &Member<L>) -> Option<R>,
    ) -> Result<Found<R>, TooSparse> {
        let places = group.roll.high_water();
        let searched = most.min(places);
        let start = start % places;
        for index in (start..places).chain(0..start).take(searched as usize) {
            let Some((shard, slot)) = group.roll.get(index) else {
                continue;
            };
            let guard = self.members.guard();
            let place = self.located(Location {
                slot,
                shard,
                namespace: Namespace::Member,
            });
            let Some((key, member)) = place.and_then(|place| place.find(&self.members, &guard))
            else {
                continue;
            };
            if member.joined.is(group, index) && is_live(&member.entry) {
                return Ok(take(index, key, member).map_or(Found::Refused, Found::Taken));
            }
        }
        if searched < places {
            Err(TooSparse)
        } else {
            Ok(Found::None)
        }
    }
}

enum Found<R> {
    Taken(R),
    Refused,
    None,
}

/// A number below `buckets`, of which one more takes an equal share of the keys from each: jump consistent hash.
/// `buckets` must not be 0. Costs in proportion to the logarithm of `buckets`.
fn jump(mut key: u64, buckets: u32) -> u32 {
    let (mut bucket, mut next) = (0, 0.0);
    while next < f64::from(buckets) {
        bucket = next as u32;
        key = key.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        next = (f64::from(bucket) + 1.0) * ((1u64 << 31) as f64 / ((key >> 33) + 1) as f64);
    }
    bucket
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn one_more_bucket_takes_only_its_share() {
        const KEYS: u64 = 10_000;
        for buckets in 1..40 {
            let mut moved = 0;
            for key in 0..KEYS {
                // Hashed, as the keys of users are.
                let key = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let (before, after) = (jump(key, buckets), jump(key, buckets + 1));
                if before != after {
                    assert_eq!(after, buckets, "moves go to the new bucket alone");
                    moved += 1;
                }
            }
            let share = KEYS / u64::from(buckets + 1);
            assert!(
                (share * 8 / 10..=share * 12 / 10).contains(&moved),
                "{moved} of {share} keys moved to bucket {buckets}"
            );
        }
    }

    #[test]
    fn the_group_of_a_malformed_id_is_some_prefix() {
        for bytes in [&b""[..], b"\x01", b"\xff\xff", b"ab\x09\x00", b"ab\x01\x00"] {
            let member = Id {
                hash: 0,
                kind: 0,
                bytes,
            };
            assert!(bytes.starts_with(MemberId::group_bytes(&member)));
        }
    }
}
