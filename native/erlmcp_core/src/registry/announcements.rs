//! Announcements of connections that are registered or removed, for a reader that subscribers have asked for them.
//!
//! # Cost
//!
//! A change loads one word, `interests`, before and after: 0 while nobody subscribes. Otherwise it looks up whether
//! somebody has an interest in its id, and if so publishes one announcement. There is no fan-out here.
//!
//! # Order
//!
//! The announcements of one id are read in the order of its registrations and removals, since tickets of a
//! [`Sequence`] are acquired within these:
//!
//! * the announcement that a connection has joined: *after* its insertion, by the thread that has inserted it or by one
//!   that is about to remove it, whichever settles the entry's [`Phase`];
//! * the announcement that it has left: *before* its removal, and after its phase is settled. It is published after the
//!   removal; if the removal fails the ticket is dropped.
//!
//! The insertion of the next connection with this id is later than that removal, and so is its ticket. Each announcement
//! is published when its change is visible.
//!
//! # Nothing is missed
//!
//! * *Subscribing*: sets the interest; fence; then looks up an id.
//! * *Registering and removing*: changes the map; fence; then loads the interest.
//!
//! Each side stores before it loads what the other one stores (Dekker). So the look-up sees the change, or the change
//! sees the interest. A registration then announces itself. A removal that has no ticket can no longer be announced in
//! order: it counts a loss, which every subscriber is told of. That happens only where a subscription begins during the
//! removal.
//!
//! # Nothing out of date
//!
//! A subscription begins with the ticket that is the next one after its interest was set, and the look-up comes after
//! all earlier tickets are read: those belong to changes that the look-up sees. A later ticket must not belong to an
//! earlier state. The announcement of a connection that was removed meanwhile, by a thread that has found no interest,
//! would be. So a thread acquires the ticket; fence; then looks whether the connection is still there. If it is, its
//! removal comes later, and the fence of that removal and that of any subscription which the removal does not see are
//! later than this fence: the ticket is earlier than that subscription.
//!
//! # Trade-offs
//!
//! Of a connection that is registered while a subscription begins, only the removal may be announced. Of one that is
//! written anew (see `exchange_lease`) just then, the insertion may be announced twice: once by a thread that has found the
//! former key, and once by another that has found the next one.

use std::fmt;
use std::hash::Hash;
use std::ops::ControlFlow;
use std::ptr;

use once_cell::race::OnceBox;
use papaya::{Equivalent, Guard, HashMap};

use super::entry::{Connection, IdHashing, Key};
use super::{Entry, Id, Registry};
use crate::churn::Churn;
use crate::sequence::{Progress, Sequence, Ticket};
use crate::sync::{AtomicBool, AtomicU8, AtomicU32, Ordering, fence};

/// Tickets that are not read yet, at most: 1.5 MB, and the removals of a large node's connections in one burst.
#[cfg(not(loom))]
const CAPACITY: usize = 65_536;
#[cfg(loom)]
const CAPACITY: usize = 4;

/// What has happened to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It was registered.
    Joined,
    /// It was removed.
    Left,
}

/// Which connections a subscription is about.
#[derive(Debug, Clone, Copy)]
pub enum Interest<'a> {
    /// All of them.
    All,
    /// Those of a shard, which must be less than the number of shards.
    Shard(u16),
    /// The one with this id. Those of another id with the same hash are announced too.
    Id(Id<'a>),
}

/// A change of a connection.
#[derive(Debug)]
pub struct Announcement<L> {
    /// What has happened.
    pub change: Change,
    /// The connection's shard.
    pub shard: u16,
    /// The kind of its id, as given to [`Registry::id`].
    pub kind: u8,
    /// The bytes of its id.
    pub bytes: Box<[u8]>,
    /// The registration.
    pub entry: Entry<L>,
}

/// Whether the insertion of an entry was announced.
#[derive(Debug)]
pub struct Phase(AtomicU8);

const QUIET: u8 = 0;
const PENDING: u8 = 1;
const SETTLED: u8 = 2;

impl Phase {
    /// The phase of an entry that is about to be inserted. With `is_expected`, somebody had an interest in it before.
    pub fn new(is_expected: bool) -> Self {
        Self(AtomicU8::new(if is_expected { PENDING } else { QUIET }))
    }

    /// Whether the insertion has to be announced before the removal is.
    fn is_pending(&self) -> bool {
        self.0.load(Ordering::Acquire) == PENDING
    }

    fn is_settled(&self) -> bool {
        self.0.load(Ordering::Acquire) == SETTLED
    }

    /// The phase of a second key for the same connection, which takes the place of the first one. The phase must not be
    /// pending.
    pub(super) fn of_next(&self) -> Self {
        Self(AtomicU8::new(self.0.load(Ordering::Acquire)))
    }

    /// From now on the insertion is not announced, except by the caller, if it is the first one.
    fn settle(&self) -> bool {
        self.0.swap(SETTLED, Ordering::AcqRel) != SETTLED
    }
}

struct State<L> {
    all: AtomicBool,
    shards: Box<[AtomicBool]>,
    ids: HashMap<u64, (), IdHashing>,
    churn: Churn,
    sequence: Sequence<Box<Announcement<L>>>,
}

/// The announcements of a registry's connections, in the order of its changes of each id.
pub struct Announcements<L> {
    /// The number of interests that are set.
    interests: AtomicU32,
    shards: u16,
    hashing: IdHashing,
    /// Allocated at the first interest.
    state: OnceBox<State<L>>,
}

/// A removal that is about to be made.
pub enum Leaving<'a, L> {
    /// Nobody had an interest in the connection.
    Unexpected,
    /// It will be announced with this ticket.
    Expected(Ticket<'a, Box<Announcement<L>>>),
    /// There was no ticket for it.
    Lost,
}

impl<L> fmt::Debug for Leaving<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unexpected => "Unexpected",
            Self::Expected(_) => "Expected",
            Self::Lost => "Lost",
        })
    }
}

impl<L> Announcements<L> {
    pub(super) fn new(shards: u16, hashing: IdHashing) -> Self {
        Self {
            interests: AtomicU32::new(0),
            shards,
            hashing,
            state: OnceBox::new(),
        }
    }

    /// Those of a registry with one shard.
    #[cfg(loom)]
    pub fn of_model() -> Self {
        Self::new(1, IdHashing::new(ahash::RandomState::new()))
    }

    /// Whether anybody has any interest.
    #[inline]
    pub(super) fn are_expected(&self) -> bool {
        self.interests.load(Ordering::Acquire) != 0
    }

    /// The number of interests that are set.
    pub fn interests(&self) -> u32 {
        self.interests.load(Ordering::Acquire)
    }

    /// Whether anybody has an interest in the connection with this shard and hash.
    #[inline]
    pub fn is_expected(&self, shard: u16, hash: u64) -> bool {
        self.are_expected() && self.expecting(shard, hash).is_some()
    }

    /// As [`Self::is_expected`], after a change of the map.
    #[inline]
    pub fn is_expected_behind(&self, shard: u16, hash: u64) -> bool {
        // SeqCst: orders the change before the load, against the fence in `set_interest`.
        fence(Ordering::SeqCst);
        self.is_expected(shard, hash)
    }

    #[cold]
    fn expecting(&self, shard: u16, hash: u64) -> Option<&State<L>> {
        let state = self.state.get()?;
        let is_expected = state.all.load(Ordering::Acquire)
            || state
                .shards
                .get(usize::from(shard))
                .is_some_and(|is_on| is_on.load(Ordering::Acquire))
            || state.ids.contains_key(&hash, &state.ids.guard());
        is_expected.then_some(state)
    }

    /// Announces an insertion, unless that has been done. `is_current`: whether the entry is still in the map. Returns
    /// `false` if it is not.
    #[doc(hidden)]
    pub fn join(
        &self,
        phase: &Phase,
        is_current: impl FnOnce() -> bool,
        announcement: impl FnOnce() -> Announcement<L>,
    ) -> bool {
        if phase.is_settled() {
            return true;
        }
        let Some(state) = self.state.get() else {
            return true;
        };
        let ticket = state.sequence.ticket();
        // SeqCst: orders the ticket before the look-up, against the fences in `is_expected_behind`, after a removal, and
        // in `set_interest`.
        fence(Ordering::SeqCst);
        if !is_current() {
            return false;
        }
        if phase.settle() {
            match ticket {
                Some(ticket) => ticket.publish(Box::new(announcement())),
                None => state.sequence.lose(),
            }
        }
        true
    }

    /// Before a removal. `join` announces the insertion.
    #[doc(hidden)]
    pub fn leaving(
        &self,
        shard: u16,
        hash: u64,
        phase: &Phase,
        join: impl FnOnce(),
    ) -> Leaving<'_, L> {
        if !self.are_expected() {
            return Leaving::Unexpected;
        }
        let Some(state) = self.expecting(shard, hash) else {
            return Leaving::Unexpected;
        };
        if phase.is_pending() {
            join();
        }
        phase.settle();
        match state.sequence.ticket() {
            Some(ticket) => Leaving::Expected(ticket),
            None => Leaving::Lost,
        }
    }

    /// After the removal.
    #[doc(hidden)]
    pub fn left(
        &self,
        leaving: Leaving<'_, L>,
        shard: u16,
        hash: u64,
        announcement: impl FnOnce() -> Announcement<L>,
    ) {
        match leaving {
            Leaving::Expected(ticket) => ticket.publish(Box::new(announcement())),
            Leaving::Lost => self.lose(),
            Leaving::Unexpected => {
                if self.is_expected_behind(shard, hash) {
                    self.lose();
                }
            }
        }
    }

    /// After a removal while nobody had any interest.
    #[inline]
    fn left_unexpected(&self) {
        // SeqCst: orders the removal before the load, against the fence in `set_interest`.
        fence(Ordering::SeqCst);
        if self.are_expected() {
            self.lose();
        }
    }

    #[cold]
    fn lose(&self) {
        if let Some(state) = self.state.get() {
            state.sequence.lose();
        }
    }

    fn state(&self) -> &State<L> {
        self.state.get_or_init(|| {
            Box::new(State {
                all: AtomicBool::new(false),
                shards: (0..self.shards).map(|_| AtomicBool::new(false)).collect(),
                ids: HashMap::with_hasher(self.hashing.clone()),
                churn: Churn::new(),
                sequence: Sequence::new(CAPACITY),
            })
        })
    }

    /// Whether an interest was set before. The first one allocates 1.5 MB.
    pub fn is_allocated(&self) -> bool {
        self.state.get().is_some()
    }

    /// Whether [`Self::complete_resize`] should be called before an interest in `id` is set, which has been set and cleared
    /// again and again: see [`crate::churn`].
    pub fn is_churned(&self, id: &Id<'_>) -> bool {
        let interests = || u64::from(self.interests());
        self.state
            .get()
            .is_some_and(|state| state.churn.is_due(id.hash, interests))
    }

    /// Costs in proportion to the interests in ids.
    pub fn complete_resize(&self) {
        if let Some(state) = self.state.get() {
            state.churn.complete_resize(&state.ids);
        }
    }

    /// Sets or clears an interest. Returns the position at which its announcements begin.
    pub fn set(&self, interest: Interest<'_>, is_on: bool) -> u64 {
        let state = self.state();
        // Added before the interest is set, and subtracted after it is cleared: never less than are set.
        if is_on {
            self.interests.fetch_add(1, Ordering::AcqRel);
        }
        let was_on = match interest {
            Interest::All => state.all.swap(is_on, Ordering::AcqRel),
            Interest::Shard(shard) => {
                state.shards[usize::from(shard)].swap(is_on, Ordering::AcqRel)
            }
            Interest::Id(id) => {
                let guard = state.ids.guard();
                if is_on {
                    state.ids.try_insert(id.hash, (), &guard).is_err()
                } else {
                    let removed = state.ids.remove(&id.hash, &guard).is_some();
                    if removed {
                        state.churn.removed(id.hash);
                    }
                    removed
                }
            }
        };
        if was_on {
            self.interests.fetch_sub(1, Ordering::AcqRel);
        }
        // SeqCst: orders the interest before the look-ups of the subscriber and before the load of the ticket, against
        // the fences of changes.
        fence(Ordering::SeqCst);
        state.sequence.next()
    }

    /// Clears all interests, and drops what has not been read. Not to be called while other threads set interests. Costs
    /// in proportion to both.
    pub fn clear(&self) {
        let Some(state) = self.state.get() else {
            return;
        };
        if state.all.load(Ordering::Acquire) {
            self.set(Interest::All, false);
        }
        for (shard, is_on) in (0..).zip(&state.shards) {
            if is_on.load(Ordering::Acquire) {
                self.set(Interest::Shard(shard), false);
            }
        }
        let guard = state.ids.guard();
        for hash in state.ids.keys(&guard) {
            if state.ids.remove(hash, &guard).is_some() {
                self.interests.fetch_sub(1, Ordering::AcqRel);
            }
        }
        // Not more than are there now: producers may go on for as long as they see the former interests.
        let until = state.sequence.next();
        let _ = state
            .sequence
            .read(usize::MAX, until, |_| ControlFlow::Continue(()));
    }

    /// Reads announcements: see [`Sequence::read`].
    pub fn read(
        &self,
        limit: usize,
        until: u64,
        mut each: impl FnMut(&Announcement<L>) -> ControlFlow<()>,
    ) -> Option<Progress> {
        match self.state.get() {
            Some(state) => state.sequence.read(limit, until, |value| each(value)),
            None => Some(Progress {
                position: 0,
                lost: 0,
                has_more: false,
            }),
        }
    }

    /// Whether the reader has to be woken. Then the caller must wake it. To be asked after each change.
    #[inline]
    pub fn take_wake(&self) -> bool {
        self.are_expected() && self.is_wake_due()
    }

    #[cold]
    fn is_wake_due(&self) -> bool {
        self.state
            .get()
            .is_some_and(|state| state.sequence.take_wake())
    }
}

impl<L> fmt::Debug for Announcements<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Announcements")
            .field("interests", &self.interests)
            .finish_non_exhaustive()
    }
}

impl<L> Registry<L>
where
    L: Clone + PartialEq + Send + Sync + 'static,
{
    /// The announcements of this registry's connections.
    pub fn announcements(&self) -> &Announcements<L> {
        &self.announcements
    }

    /// After the insertion of a connection, whose phase was made with `is_expected`.
    #[inline]
    pub(super) fn joined(&self, id: &Id<'_>, shard: u16, is_expected: bool) {
        if is_expected || self.announcements.is_expected_behind(shard, id.hash) {
            self.announce_current(id);
        }
    }

    /// Announces the connection that has the id now. That is the inserted one, or a later one, whose announcement this
    /// helps.
    #[cold]
    fn announce_current(&self, id: &Id<'_>) {
        let guard = self.connections.guard();
        while let Some((key, connection)) = self.connections.get_key_value(id, &guard) {
            if self.announce(key, connection, &guard) {
                break;
            }
            // Removed, or written anew under another key: then it may not be announced yet.
        }
    }

    /// Announces an insertion, unless that has been done; `false` if the key is no longer in the map.
    fn announce(&self, key: &Key, connection: &Connection<L>, guard: &impl Guard) -> bool {
        let is_current = || {
            let current = self.connections.get_key_value(&self.id_of(key), guard);
            current.is_some_and(|(found, _)| ptr::eq(found, key))
        };
        self.announcements.join(key.phase(), is_current, || {
            announcement(Change::Joined, key, connection)
        })
    }

    /// A key for a connection that is about to be written anew under the same id, at the same place. If its insertion is
    /// still to be announced, that is done first: two keys must not both be announced.
    pub(super) fn next_key(
        &self,
        id: Id<'_>,
        key: &Key,
        connection: &Connection<L>,
        guard: &impl Guard,
    ) -> Key {
        if key.phase().is_pending() {
            self.announce(key, connection, guard);
        }
        Key::with_phase(id, key.location(), key.phase().of_next())
    }

    /// Before the removal of the connection `key`.
    pub(super) fn leaving<'a>(
        &'a self,
        key: &Key,
        connection: &Connection<L>,
        guard: &impl Guard,
    ) -> Leaving<'a, L> {
        let hash = self.id_of(key).hash;
        self.announcements
            .leaving(key.shard(), hash, key.phase(), || {
                self.announce(key, connection, guard);
            })
    }

    /// After the removal of the connection `key`.
    pub(super) fn left(&self, leaving: Leaving<'_, L>, key: &Key, connection: &Connection<L>) {
        let hash = self.id_of(key).hash;
        self.announcements.left(leaving, key.shard(), hash, || {
            announcement(Change::Left, key, connection)
        });
    }

    /// Removes the connection that `query` finds, if it is the one meant, and announces that.
    pub(super) fn remove_connection<Q>(
        &self,
        query: &Q,
        is_meant: impl Fn(&Key, &L) -> bool,
    ) -> Option<Entry<L>>
    where
        Q: Equivalent<Key> + Hash,
    {
        if self.announcements.are_expected() {
            return self.remove_expected(query, is_meant);
        }
        let removed = self.remove_from(&self.connections, query, |key, _, entry| {
            is_meant(key, &entry.lease)
        })?;
        self.announcements.left_unexpected();
        Some(removed)
    }

    #[cold]
    fn remove_expected<Q>(&self, query: &Q, is_meant: impl Fn(&Key, &L) -> bool) -> Option<Entry<L>>
    where
        Q: Equivalent<Key> + Hash,
    {
        let guard = self.connections.guard();
        loop {
            let (key, connection) = self.connections.get_key_value(query, &guard)?;
            if !is_meant(key, &connection.entry.lease) {
                return None;
            }
            let leaving = self.leaving(key, connection, &guard);
            let removed =
                self.remove_from(&self.connections, query, |found, _, _| ptr::eq(found, key));
            if removed.is_some() {
                self.left(leaving, key, connection);
                return removed;
            }
            // Lost to a concurrent change of this id.
        }
    }
}

fn announcement<L: Clone>(
    change: Change,
    key: &Key,
    connection: &Connection<L>,
) -> Announcement<L> {
    Announcement {
        change,
        shard: key.shard(),
        kind: key.kind(),
        bytes: key.bytes().into(),
        entry: connection.entry.clone(),
    }
}
