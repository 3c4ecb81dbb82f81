//! Config terms of entries, interned: equal terms (`=:=`) are kept once.
//!
//! A term is kept in one of three forms:
//!
//! * An immediate term is its word, and needs no memory beside the entry.
//! * A small plain term is encoded (see [`crate::encoding`]), which is compact.
//! * Any other term is in an environment of its own. That costs about 2.5 KB more, but the term is copied out
//!   quickly, and references, funs and large binaries keep alive what they refer to.
//!
//! Terms of the last two forms are in a table, by content. A kept term counts its users; the last user to leave
//! removes it from the table. A count of zero is final: a thread that finds such a term removes it in place of the
//! last user, and inserts a new copy. The term compares equal until it is removed. Otherwise, while the table is
//! resized, a key that was equal when another one was looked up and no longer is would hide that other one.
//!
//! # A removed entry does not keep its registry alive
//!
//! A config can refer to the registry that its entry is in. The registry's collector frees the memory of a removed
//! entry some removals later, or with the registry. If the entry held its config until then, config and registry
//! would keep each other alive. So an entry holds a config that may refer to something by [`Revocable`]: removing
//! the entry, or replacing its config, revokes the config at once, even while copies of the lease exist.

mod kept;
mod table;
mod weight;

use std::mem::{self, ManuallyDrop};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Weak};

use rustler::{Encoder, Env, LocalPid, Term};

use self::kept::{Content, Kept};
use self::table::table;
use crate::atoms;
use crate::delivery::Delivery;
use crate::encoding;
use crate::immediate;
use crate::reschedule::{Scheduler, Stopped, TooHeavy};

pub(crate) use self::kept::SharedTerm;
pub(crate) use self::table::distinct;
pub(crate) use self::weight::{BYTES_PER_WEIGHT, Weighed, weigh};

/// A term of this weight takes half a millisecond: weighing, hashing and copying take some 50 ns per term
/// together.
pub(crate) const MAX_WEIGHT_ON_NORMAL_SCHEDULER: usize = 10_000;
/// Up to this weight, the overhead of an environment outweighs the slower decoding.
const MAX_COMPACT_WEIGHT: usize = 64;

/// One word: a counted pointer to a [`Kept`], or the word of an immediate term. The two cannot be equal: only
/// the pointer is a multiple of the alignment of [`Kept`].
pub(crate) struct Config(*const Kept);

/// The word of an immediate term.
struct Immediate(u64);

/// Whether `word` cannot be a pointer to a [`Kept`].
#[inline]
fn is_unaligned(word: usize) -> bool {
    !word.is_multiple_of(mem::align_of::<Kept>())
}

// SAFETY: the pointer is a counted reference, like an `Arc`, to a value that may be sent and shared.
unsafe impl Send for Config where Arc<Kept>: Send {}
// SAFETY: as above.
unsafe impl Sync for Config where Arc<Kept>: Sync {}

impl Config {
    /// Keeps a term, or joins the users of an equal one.
    pub(crate) fn keep(term: Term<'_>, scheduler: Scheduler) -> Result<Self, TooHeavy> {
        let Some(Weighed { weight, is_plain }) =
            weigh(term, MAX_WEIGHT_ON_NORMAL_SCHEDULER, scheduler)
        else {
            scheduler.require_dirty()?;
            return table().keep_shared(term, usize::MAX, true, scheduler);
        };
        if let Some(immediate) = Self::immediate(term) {
            return Ok(immediate);
        }
        if is_plain && weight <= MAX_COMPACT_WEIGHT {
            return table().keep_compact(term, weight, scheduler);
        }
        table().keep_shared(term, weight, !is_plain, scheduler)
    }

    fn immediate(term: Term<'_>) -> Option<Self> {
        // A small integer is left out: whether it is immediate depends on its size.
        let is_immediate =
            term.is_atom() || term.is_empty_list() || term.decode::<LocalPid>().is_ok();
        let word = immediate::word(term) as usize;
        (is_immediate && is_unaligned(word)).then(|| Self(ptr::without_provenance(word)))
    }

    /// The first user of a new kept term.
    fn first(kept: Arc<Kept>) -> Self {
        Self(Arc::into_raw(kept))
    }

    /// A further user of a kept term; `None` if the last one has left.
    fn join(kept: &Arc<Kept>) -> Option<Self> {
        kept.try_join().then(|| Self(Arc::as_ptr(kept)))
    }

    /// A config that is not in the table.
    fn apart(weight: usize, content: Content) -> Self {
        Self::first(Kept::new(0, weight, content))
    }

    #[inline]
    fn view(&self) -> Result<&Kept, Immediate> {
        let word = self.0.addr();
        if is_unaligned(word) {
            return Err(Immediate(word as u64));
        }
        // SAFETY: this is a user, and the users together hold a reference.
        Ok(unsafe { &*self.0 })
    }

    /// The config in the form that one registration holds. It must not be given to a second registration.
    pub(crate) fn of_entry(self) -> Self {
        match self.view() {
            Ok(kept) if kept.may_refer() => {
                let weight = kept.weight;
                Self::apart(weight, Content::Revocable(Revocable::new(self)))
            }
            _ => self,
        }
    }

    /// The config of an entry for `pid`, a process of another node, from one made by [`Self::of_entry`].
    pub(crate) fn of_remote(self, pid: Term<'_>, sentinel: LocalPid) -> Self {
        let remote = Remote {
            pid: pid.to_binary().as_slice().into(),
            sentinel,
            config: self,
        };
        Self::apart(remote.config.weight(), Content::Remote(Box::new(remote)))
    }

    /// The config of a connection that does not get its messages one by one, from one made by [`Self::of_entry`].
    pub(crate) fn with_delivery(self, delivery: Delivery) -> Self {
        if delivery.is_default() {
            return self;
        }
        let weight = self.weight();
        let delivered = Delivered {
            delivery,
            config: self,
        };
        Self::apart(weight, Content::Delivered(Box::new(delivered)))
    }

    /// How messages are delivered to the entry, if it has made a choice.
    pub(crate) fn delivery(&self) -> Option<&Delivery> {
        match self.view().map(|kept| &kept.content) {
            Ok(Content::Delivered(delivered)) => Some(&delivered.delivery),
            _ => None,
        }
    }

    /// The same config in the form that a new lease of the same registration holds, without its delivery; `None` if it was
    /// revoked.
    pub(crate) fn renewed(&self) -> Option<Self> {
        match self.view().map(|kept| &kept.content) {
            Ok(Content::Delivered(delivered)) => delivered.config.renewed(),
            Ok(Content::Revocable(revocable)) => Some(revocable.get()?.of_entry()),
            _ => Some(self.clone()),
        }
    }

    /// Whether this is the same word: the same term, and the same delivery.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    /// Drops the registration's use of the term, in every copy of its lease. Afterwards [`Self::load`] may
    /// return `None`.
    pub(crate) fn revoke(&self) {
        match self.view().map(|kept| &kept.content) {
            Ok(Content::Revocable(revocable)) => revocable.revoke(),
            Ok(Content::Remote(remote)) => remote.config.revoke(),
            Ok(Content::Delivered(delivered)) => delivered.config.revoke(),
            Ok(Content::Compact(_) | Content::Shared { .. }) | Err(_) => {}
        }
    }

    /// The data of a process of another node, if the entry is for one.
    pub(crate) fn remote(&self) -> Option<&Remote> {
        match self.view().map(|kept| &kept.content) {
            Ok(Content::Remote(remote)) => Some(remote),
            _ => None,
        }
    }

    /// The work of loading the term: about 30 ns per unit.
    pub(crate) fn weight(&self) -> usize {
        self.view().map_or(1, |kept| kept.weight)
    }

    /// The term, copied into `env`; `None` only if it has been revoked.
    pub(crate) fn load<'a>(
        &self,
        env: Env<'a>,
        scheduler: Scheduler,
    ) -> Result<Option<Term<'a>>, Stopped> {
        let kept = match self.view() {
            Ok(kept) => kept,
            // SAFETY: the word is that of an atom, an empty list or a local pid.
            Err(Immediate(word)) => return Ok(Some(unsafe { immediate::term(env, word) })),
        };
        if kept.weight > MAX_WEIGHT_ON_NORMAL_SCHEDULER {
            scheduler.require_dirty()?;
        }
        Ok(Some(match &kept.content {
            Content::Compact(bytes) => encoding::decode(env, bytes)?,
            Content::Shared { term, .. } => term.copy(env),
            Content::Revocable(revocable) => match revocable.get() {
                Some(config) => return config.load(env, scheduler),
                None => return Ok(None),
            },
            Content::Remote(remote) => return remote.config.load(env, scheduler),
            Content::Delivered(delivered) => return delivered.config.load(env, scheduler),
        }))
    }
}

impl Clone for Config {
    fn clone(&self) -> Self {
        if let Ok(kept) = self.view() {
            kept.join();
        }
        Self(self.0)
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        if !self.view().is_ok_and(Kept::leave) {
            return;
        }
        // SAFETY: this was the last user, to which the reference of all users passes.
        let kept = unsafe { Arc::from_raw(self.0) };
        if kept.is_in_table() {
            table().forget(&kept);
        }
    }
}

/// The config of one registration, counted as a user until it is revoked.
///
/// Invariant: `owned` is either null or a user of the term. The thread whose swap returns a user owns it.
struct Revocable {
    kept: Weak<Kept>,
    owned: AtomicPtr<Kept>,
}

impl Revocable {
    /// `config` must be a kept term, not an immediate one.
    fn new(config: Config) -> Self {
        let owned = ManuallyDrop::new(config).0;
        // SAFETY: the pointer is that of a user, which exists meanwhile. The reference stays with the users.
        let kept = ManuallyDrop::new(unsafe { Arc::from_raw(owned) });
        Self {
            kept: Arc::downgrade(&kept),
            owned: AtomicPtr::new(owned.cast_mut()),
        }
    }

    /// One more user of the term, unless the last one has left.
    fn get(&self) -> Option<Config> {
        Config::join(&self.kept.upgrade()?)
    }

    fn revoke(&self) {
        let owned = self.owned.swap(ptr::null_mut(), Ordering::AcqRel);
        if !owned.is_null() {
            // It was a user, and the swap returned it to no other thread.
            drop(Config(owned));
        }
    }
}

impl Drop for Revocable {
    fn drop(&mut self) {
        self.revoke();
    }
}

/// The config of a connection with a delivery. Not shared.
struct Delivered {
    delivery: Delivery,
    config: Config,
}

/// The config of an entry whose process is on another node. Not shared.
pub(crate) struct Remote {
    /// The external format of the pid.
    pid: Box<[u8]>,
    /// The local process that exits when the remote one does.
    pub(crate) sentinel: LocalPid,
    config: Config,
}

impl Remote {
    /// The pid; `undefined` if the VM cannot decode what it has encoded.
    pub(crate) fn pid<'a>(&self, env: Env<'a>) -> Term<'a> {
        // SAFETY: the bytes were written by the VM itself.
        let decoded = unsafe { env.binary_to_term_trusted(&self.pid) };
        decoded.map_or_else(|| atoms::undefined().encode(env), |(pid, _)| pid)
    }
}
