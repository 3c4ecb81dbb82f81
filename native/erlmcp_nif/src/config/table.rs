//! The table of kept terms, by content.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ahash::RandomState;
use erlmcp_core::churn::Churn;
use once_cell::race::OnceBox;
use papaya::{Equivalent, Guard, HashMap};
use rustler::Term;

use super::Config;
use super::kept::{Content, Kept, SharedTerm};
use crate::encoding::{self, Zeros};
use crate::kept_hash::KeptHash;
use crate::reschedule::{Scheduler, TooHeavy};

pub(super) struct Table {
    terms: HashMap<Stored, (), KeptHash>,
    hasher: RandomState,
    salt: u64,
    distinct: AtomicU64,
    churn: Churn,
}

/// A kept term as the table's key.
struct Stored(Arc<Kept>);

/// A term to look up.
enum Wanted<'a> {
    Compact(&'a [u8]),
    Shared(Term<'a>),
}

struct Query<'a> {
    hash: u64,
    wanted: Wanted<'a>,
}

pub(super) fn table() -> &'static Table {
    static TABLE: OnceBox<Table> = OnceBox::new();
    TABLE.get_or_init(|| {
        let hasher = RandomState::new();
        Box::new(Table {
            terms: HashMap::with_hasher(KeptHash::default()),
            salt: hasher.hash_one(0),
            hasher,
            distinct: AtomicU64::new(0),
            churn: Churn::new(),
        })
    })
}

/// Number of distinct terms that are kept.
pub(crate) fn distinct() -> u64 {
    table().distinct.load(Ordering::Relaxed)
}

impl Table {
    pub(super) fn keep_compact(
        &self,
        term: Term<'_>,
        weight: usize,
        scheduler: Scheduler,
    ) -> Result<Config, TooHeavy> {
        let Ok(bytes) = encoding::encode(term, usize::MAX, Zeros::Exact) else {
            return self.keep_shared(term, weight, true, scheduler);
        };
        self.keep(
            Query {
                hash: self.hasher.hash_one(bytes.as_slice()),
                wanted: Wanted::Compact(&bytes),
            },
            weight,
            scheduler,
            || Content::Compact(bytes.as_slice().into()),
        )
    }

    pub(super) fn keep_shared(
        &self,
        term: Term<'_>,
        weight: usize,
        may_refer: bool,
        scheduler: Scheduler,
    ) -> Result<Config, TooHeavy> {
        self.keep(
            Query {
                hash: self.hasher.hash_one(term.hash_internal(self.salt)),
                wanted: Wanted::Shared(term),
            },
            weight,
            scheduler,
            || Content::Shared {
                term: SharedTerm::new(term),
                may_refer,
            },
        )
    }

    fn keep(
        &self,
        query: Query<'_>,
        weight: usize,
        scheduler: Scheduler,
        content: impl Fn() -> Content,
    ) -> Result<Config, TooHeavy> {
        let guard = self.terms.guard();
        let mut kept = None;
        loop {
            if let Some((stored, ())) = self.terms.get_key_value(&query, &guard) {
                if let Some(config) = Config::join(&stored.0) {
                    return Ok(config);
                }
                self.forget(&stored.0);
            }
            if self.churn.is_due(query.hash, distinct) {
                scheduler.require_dirty()?;
                self.churn.complete_resize(&self.terms);
            }
            let kept = kept.get_or_insert_with(|| Kept::new(query.hash, weight, content()));
            if self
                .terms
                .try_insert(Stored(Arc::clone(kept)), (), &guard)
                .is_ok()
            {
                self.distinct.fetch_add(1, Ordering::Relaxed);
                return Ok(Config::first(Arc::clone(kept)));
            }
            // Lost to a concurrent insert of an equal term.
        }
    }

    /// Removes a term without users, unless it was removed already.
    pub(super) fn forget(&self, kept: &Arc<Kept>) {
        let guard = self.terms.guard();
        let is_it = |stored: &Stored, _: &()| Arc::ptr_eq(&stored.0, kept);
        let removed = self
            .terms
            .remove_if(&Stored(Arc::clone(kept)), is_it, &guard);
        if matches!(removed, Ok(Some(_))) {
            self.distinct.fetch_sub(1, Ordering::Relaxed);
            self.churn.removed(kept.hash);
            if kept.may_refer() {
                // The term may refer to something large, and this thread's batch of removed values may
                // never fill up. The flush frees the term now, unless more threads read the table than
                // there are values in the batch, or the table is being resized: then some later
                // registration frees it.
                guard.flush();
            }
        }
    }
}

impl PartialEq for Stored {
    fn eq(&self, other: &Self) -> bool {
        if Arc::ptr_eq(&self.0, &other.0) {
            return true;
        }
        self.0.hash == other.0.hash
            && match (&self.0.content, &other.0.content) {
                (Content::Compact(a), Content::Compact(b)) => a == b,
                (Content::Shared { term: a, .. }, Content::Shared { term: b, .. }) => a == b,
                _ => false,
            }
    }
}

impl Eq for Stored {}

impl Hash for Stored {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0.hash);
    }
}

impl Equivalent<Stored> for Query<'_> {
    fn equivalent(&self, stored: &Stored) -> bool {
        self.hash == stored.0.hash
            && match (&self.wanted, &stored.0.content) {
                (Wanted::Compact(wanted), Content::Compact(bytes)) => **wanted == **bytes,
                (Wanted::Shared(wanted), Content::Shared { term, .. }) => term.is(*wanted),
                _ => false,
            }
    }
}

impl Hash for Query<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}
