//! What bindings are made of: groups, memberships and attempts. The protocol is described in the
//! module `bindings`.

use std::ops::Range;
use std::sync::Arc;

use once_cell::race::OnceBox;

use super::entry::{Key, Location};
use crate::slots::{OCCUPIED, Slots};
use crate::sync::{AtomicU8, Ordering, fence};

/// The places of the members of a group. Allocated for the first member: a server may have none.
///
/// It may name entries that are not, or no longer, members: a reader checks each one.
pub(super) struct Roll(OnceBox<Slots>);

impl Roll {
    pub(super) fn new() -> Self {
        Self(OnceBox::new())
    }

    /// Inserts the place of an entry, and returns its index.
    pub(super) fn enter(&self, location: Location) -> u32 {
        let word = u64::from(location.shard) << 49 | OCCUPIED | u64::from(location.slot);
        self.0.get_or_init(|| Box::new(Slots::new())).insert(word)
    }

    /// Frees an index. Only for the thread that ended the membership, once.
    pub(super) fn leave(&self, index: u32) {
        if let Some(slots) = self.0.get() {
            slots.remove(index);
        }
    }

    /// The shard, and the slot in the shard, of the entry at an index.
    pub(super) fn get(&self, index: u32) -> Option<(u16, u32)> {
        let word = self.0.get()?.get(index)?;
        Some(((word >> 49) as u16, word as u32))
    }

    /// The occupied ones of these indexes.
    pub(super) fn within(&self, indexes: Range<u32>) -> impl Iterator<Item = (u32, u16, u32)> + '_ {
        indexes.filter_map(|index| self.get(index).map(|(shard, slot)| (index, shard, slot)))
    }

    /// Number of indexes: the most members at one time.
    pub(super) fn high_water(&self) -> u32 {
        self.0.get().map_or(0, Slots::high_water)
    }
}

/// One life of a server id.
pub(super) struct Group {
    /// The server's id; its location means nothing.
    pub(super) server: Key,
    /// The transports that may be bound.
    pub(super) roll: Roll,
}

impl Group {
    pub(super) fn new(server: Key) -> Arc<Self> {
        Arc::new(Self {
            server,
            roll: Roll::new(),
        })
    }

    pub(super) fn enter(self: &Arc<Self>, transport: Location) -> Membership {
        Membership {
            group: Arc::clone(self),
            slot: self.roll.enter(transport),
        }
    }
}

/// A place in a group's list.
#[derive(Clone)]
pub(super) struct Membership {
    pub(super) group: Arc<Group>,
    pub(super) slot: u32,
}

impl Membership {
    pub(super) fn is(&self, group: &Arc<Group>, slot: u32) -> bool {
        self.slot == slot && Arc::ptr_eq(&self.group, group)
    }
}

/// The binding in a transport's entry.
#[derive(Clone)]
pub(super) enum Binding {
    Unbound,
    To(Membership),
    Pending(Arc<Attempt>),
}

impl Binding {
    pub(super) fn settled(membership: Option<Membership>) -> Self {
        membership.map_or(Self::Unbound, Self::To)
    }

    pub(super) fn is_attempt(&self, attempt: &Arc<Attempt>) -> bool {
        matches!(self, Self::Pending(pending) if Arc::ptr_eq(pending, attempt))
    }
}

/// The descriptor of a binding that is being made.
pub(super) struct Attempt {
    pub(super) to: Membership,
    /// What holds if the attempt is aborted.
    pub(super) from: From,
    decision: Decision,
}

/// What an attempt replaces.
#[derive(Clone)]
pub(super) enum From {
    /// The transport is being registered with an automatic binding.
    Unregistered,
    Registered(Option<Membership>),
}

impl Attempt {
    pub(super) fn new(to: Membership, from: From) -> Arc<Self> {
        Arc::new(Self {
            to,
            from,
            decision: Decision::new(),
        })
    }

    /// Whether the attempt is bound. `is_current` says whether the attempt's group is the current one of its server
    /// id; it is called only while the attempt is undecided.
    pub(super) fn decide(&self, is_current: impl FnOnce() -> bool) -> bool {
        self.decision.decide(is_current)
    }
}

const UNDECIDED: u8 = 0;
const BOUND: u8 = 1;
const ABORTED: u8 = 2;

/// A decision that is made once, by the first thread.
#[doc(hidden)]
#[derive(Debug)]
pub struct Decision(AtomicU8);

impl Decision {
    #[doc(hidden)]
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(AtomicU8::new(UNDECIDED))
    }

    #[doc(hidden)]
    pub fn decide(&self, is_current: impl FnOnce() -> bool) -> bool {
        let decided = match self.0.load(Ordering::Acquire) {
            UNDECIDED => {
                // SeqCst: orders the write (or read) of the attempt before the read of the server, against the
                // fence in `server_has_gone`.
                fence(Ordering::SeqCst);
                let mine = if is_current() { BOUND } else { ABORTED };
                self.0
                    .compare_exchange(UNDECIDED, mine, Ordering::AcqRel, Ordering::Acquire)
                    .map_or_else(|theirs| theirs, |_| mine)
            }
            decided => decided,
        };
        decided == BOUND
    }

    /// For the thread that has removed a server from its map, before it reads anything else.
    #[doc(hidden)]
    pub fn server_has_gone() {
        // SeqCst, against the fence in `decide`: without both fences, one thread could read the server as current
        // after it was removed, while another one, which removed it, still reads the old binding of a transport
        // that the first one has bound to it.
        fence(Ordering::SeqCst);
    }
}
