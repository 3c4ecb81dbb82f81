//! A kept term, and the count of its users.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustler::env::OwnedEnv;
use rustler::sys::ErlNifTerm;
use rustler::{Env, Term};

use super::{Delivered, Remote, Revocable};
use crate::background;

/// The maps free removed values in batches of 32, or of a few times as many after a reader has held them up. 32
/// terms of this weight take up to 0.3 ms if each part of them refers to something that is freed by itself (some
/// 40 ns each; measured with references to atomics).
const MAX_WEIGHT_FREED_IN_PLACE: usize = 200;

/// # Invariant
///
/// The users together hold one reference of the `Arc`. It is created with the first user and passes to the one
/// that brings the count to zero. So joining and leaving take one atomic update each. Zero is final.
pub(super) struct Kept {
    users: AtomicUsize,
    pub(super) hash: u64,
    pub(super) weight: usize,
    pub(super) content: Content,
}

pub(super) enum Content {
    Compact(Box<[u8]>),
    Shared {
        term: SharedTerm,
        /// Whether a part of it may keep something else alive, such as a registry.
        may_refer: bool,
    },
    /// Not in the table; belongs to one registration.
    Revocable(Revocable),
    /// Not in the table; belongs to one registration.
    Remote(Box<Remote>),
    /// Not in the table; belongs to one registration.
    Delivered(Box<Delivered>),
}

impl Kept {
    /// With one user, which holds the returned reference.
    pub(super) fn new(hash: u64, weight: usize, content: Content) -> Arc<Self> {
        Arc::new(Self {
            users: AtomicUsize::new(1),
            hash,
            weight,
            content,
        })
    }

    /// Whether the table finds it by its content.
    pub(super) fn is_in_table(&self) -> bool {
        matches!(self.content, Content::Compact(_) | Content::Shared { .. })
    }

    pub(super) fn may_refer(&self) -> bool {
        matches!(
            self.content,
            Content::Shared {
                may_refer: true,
                ..
            }
        )
    }

    /// Adds a user. Another user must exist meanwhile.
    #[inline]
    pub(super) fn join(&self) {
        self.users.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds a user, unless the last one has left.
    pub(super) fn try_join(&self) -> bool {
        self.users
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |users| {
                (users > 0).then_some(users + 1)
            })
            .is_ok()
    }

    /// Removes a user. Returns whether it was the last one, to which the reference passes.
    #[inline]
    pub(super) fn leave(&self) -> bool {
        self.users.fetch_sub(1, Ordering::AcqRel) == 1
    }
}

/// The last reference may be dropped in the call of any process, when the maps free their removed values.
impl Drop for Kept {
    fn drop(&mut self) {
        if self.is_in_table() && self.weight > MAX_WEIGHT_FREED_IN_PLACE {
            let nothing = Content::Compact(Box::default());
            background::free(mem::replace(&mut self.content, nothing));
        }
    }
}

/// A term in an environment that is no longer written to.
pub(crate) struct SharedTerm {
    env: OwnedEnv,
    term: ErlNifTerm,
}

// SAFETY: after its construction the environment is only read: `enif_make_copy` and
// `enif_is_identical` do not change their source, and the counters of the off-heap parts that they
// refer to are atomic. It is freed by the last owner.
unsafe impl Sync for SharedTerm {}

impl SharedTerm {
    pub(crate) fn new(term: Term<'_>) -> Self {
        let env = OwnedEnv::new();
        let term = env.run(|own| term.in_env(own).as_c_arg());
        Self { env, term }
    }

    pub(super) fn is(&self, term: Term<'_>) -> bool {
        self.env.run(|own| {
            // SAFETY: the term was made in this environment, which has not been cleared.
            let kept = unsafe { Term::new(own, self.term) };
            kept == term
        })
    }

    pub(crate) fn copy<'a>(&self, env: Env<'a>) -> Term<'a> {
        self.env.run(|own| {
            // SAFETY: as in `is`.
            unsafe { Term::new(own, self.term) }.in_env(env)
        })
    }
}

impl PartialEq for SharedTerm {
    fn eq(&self, other: &Self) -> bool {
        other.env.run(|own| {
            // SAFETY: as in `is`.
            self.is(unsafe { Term::new(own, other.term) })
        })
    }
}
