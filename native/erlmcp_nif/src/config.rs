//! Config terms kept for entries, each distinct one once.
//!
//! A term is kept in one of three forms: an immediate one as its word; a small plain one encoded
//! (see [`crate::encoding`]), which is compact; any other one in an environment of its own, which
//! costs about 2.5 KB more, but from which it is copied out quickly and in which references, funs
//! and large binaries keep what they refer to alive.
//!
//! Terms that are equal (`=:=`) are kept once, in a table by content. A kept term counts its users;
//! the last one to leave takes it out of the table. Zero users is final: whoever finds the term
//! then takes it out in the place of the last user, and keeps a new copy. It stays equal to its like
//! until it is out: while the table grows, a key that was equal when another one was looked up and is
//! not any more would hide that other one.

use std::hash::{Hash, Hasher};
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::background;
use crate::encoding::{self, Zeros};
use crate::kept_hash::KeptHash;
use crate::tuple::tuple_elements;
use ahash::RandomState;
use once_cell::race::OnceBox;
use papaya::{Equivalent, HashMap};
use rustler::env::OwnedEnv;
use rustler::sys::ErlNifTerm;
use rustler::{Binary, Env, LocalPid, MapIterator, Term, TermType};

/// A term of this weight is worked on in half a millisecond: to weigh it, to hash it and to copy it
/// take some 50 ns each term together.
pub(crate) const MAX_WEIGHT_ON_NORMAL_SCHEDULER: usize = 10_000;
/// The maps free what was removed from them 32 at a time, or a few times as many when a reader has kept
/// them from it. 32 terms of this weight take up to 0.3 ms, where each part of them refers to something
/// that is freed by itself (some 40 ns each; measured with references to atomics).
const MAX_WEIGHT_FREED_IN_PLACE: usize = 200;
/// Up to this weight the overhead of an environment outweighs the slower decoding.
const MAX_COMPACT_WEIGHT: usize = 64;
/// Bytes of a binary that weigh as much as one more term.
pub(crate) const BYTES_PER_WEIGHT: usize = 16;

/// How much work one call may do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheduler {
    Normal,
    Dirty,
}

/// The work must be done on a dirty scheduler.
pub(crate) struct TooHeavy;

/// A kept term, counted as one user of it.
pub(crate) struct Config(Arc<Kept>);

struct Kept {
    users: AtomicUsize,
    hash: u64,
    weight: usize,
    content: Content,
}

enum Content {
    Immediate(ErlNifTerm),
    Compact(Box<[u8]>),
    Shared(SharedTerm),
    Remote(Box<Remote>),
}

/// The config of an entry whose process is on another node. Not shared.
pub(crate) struct Remote {
    /// The external format of the pid.
    pid: Box<[u8]>,
    /// The local process that ends when the remote one does.
    pub(crate) sentinel: LocalPid,
    config: Config,
}

/// A term in an environment that nobody writes to any more.
struct SharedTerm {
    env: OwnedEnv,
    term: ErlNifTerm,
}

// SAFETY: after its construction the environment is only read: `enif_make_copy` and
// `enif_is_identical` do not change their source, and the counters of the off-heap parts that they
// refer to are atomic. It is freed by the last owner.
unsafe impl Sync for SharedTerm {}

impl SharedTerm {
    fn new(term: Term<'_>) -> Self {
        let env = OwnedEnv::new();
        let term = env.run(|own| term.in_env(own).as_c_arg());
        Self { env, term }
    }

    fn is(&self, term: Term<'_>) -> bool {
        self.env.run(|own| {
            // SAFETY: the term was made in this environment, which has not been cleared.
            let kept = unsafe { Term::new(own, self.term) };
            kept == term
        })
    }

    fn copy<'a>(&self, env: Env<'a>) -> Term<'a> {
        self.env.run(|own| {
            // SAFETY: as in `is`.
            unsafe { Term::new(own, self.term) }.in_env(env)
        })
    }
}

impl Config {
    /// Keeps a term, or joins the users of an equal one.
    pub(crate) fn keep(term: Term<'_>, scheduler: Scheduler) -> Result<Self, TooHeavy> {
        let Some(Weighed { weight, is_plain }) =
            weigh(term, MAX_WEIGHT_ON_NORMAL_SCHEDULER, scheduler)
        else {
            return match scheduler {
                Scheduler::Normal => Err(TooHeavy),
                Scheduler::Dirty => Ok(table().keep_shared(term, usize::MAX)),
            };
        };
        if is_immediate(term) {
            return Ok(table().keep_immediate(term));
        }
        if is_plain && weight <= MAX_COMPACT_WEIGHT {
            return Ok(table().keep_compact(term, weight));
        }
        Ok(table().keep_shared(term, weight))
    }

    /// The config of an entry for `pid`, a process of another node.
    pub(crate) fn of_remote(self, pid: Term<'_>, sentinel: LocalPid) -> Self {
        Self(Arc::new(Kept {
            users: AtomicUsize::new(1),
            hash: 0,
            weight: self.0.weight,
            content: Content::Remote(Box::new(Remote {
                pid: pid.to_binary().as_slice().into(),
                sentinel,
                config: self,
            })),
        }))
    }

    /// What is kept about a process of another node, if the entry is for one.
    pub(crate) fn remote(&self) -> Option<&Remote> {
        match &self.0.content {
            Content::Remote(remote) => Some(remote),
            _ => None,
        }
    }

    /// How much work it is to load the term: about 30 ns each.
    pub(crate) fn weight(&self) -> usize {
        self.0.weight
    }

    /// The term, copied into `env`.
    pub(crate) fn load<'a>(
        &self,
        env: Env<'a>,
        scheduler: Scheduler,
    ) -> Result<Term<'a>, TooHeavy> {
        if scheduler == Scheduler::Normal && self.0.weight > MAX_WEIGHT_ON_NORMAL_SCHEDULER {
            return Err(TooHeavy);
        }
        Ok(match &self.0.content {
            // SAFETY: the word is that of an immediate term.
            Content::Immediate(word) => unsafe { Term::new(env, *word) },
            Content::Compact(bytes) => encoding::decode(env, bytes).expect("an encoded term"),
            Content::Shared(shared) => shared.copy(env),
            Content::Remote(remote) => remote.config.load(env, scheduler)?,
        })
    }
}

/// The last reference may go in anybody's call, when the maps free what was removed from them.
impl Drop for Kept {
    fn drop(&mut self) {
        if self.weight > MAX_WEIGHT_FREED_IN_PLACE {
            let nothing = Content::Compact(Box::default());
            background::free(mem::replace(&mut self.content, nothing));
        }
    }
}

impl Remote {
    pub(crate) fn pid<'a>(&self, env: Env<'a>) -> Term<'a> {
        // SAFETY: the bytes were written by the VM itself.
        let decoded = unsafe { env.binary_to_term_trusted(&self.pid) };
        decoded.expect("the external format of a pid").0
    }
}

impl Clone for Config {
    fn clone(&self) -> Self {
        // We are a user, so there is at least one, and zero is not passed.
        self.0.users.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(&self.0))
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        if self.0.users.fetch_sub(1, Ordering::AcqRel) == 1 {
            table().forget(&self.0);
        }
    }
}

// ---- The table ----

struct Table {
    terms: HashMap<Stored, (), KeptHash>,
    hasher: RandomState,
    salt: u64,
    distinct: AtomicU64,
}

/// A kept term as the table's key.
struct Stored(Arc<Kept>);

/// A term that is looked for.
enum Wanted<'a> {
    Immediate(ErlNifTerm),
    Compact(&'a [u8]),
    Shared(Term<'a>),
}

struct Query<'a> {
    hash: u64,
    wanted: Wanted<'a>,
}

fn table() -> &'static Table {
    static TABLE: OnceBox<Table> = OnceBox::new();
    TABLE.get_or_init(|| {
        let hasher = RandomState::new();
        Box::new(Table {
            terms: HashMap::with_hasher(KeptHash::default()),
            salt: hasher.hash_one(0),
            hasher,
            distinct: AtomicU64::new(0),
        })
    })
}

/// Number of distinct terms that are kept.
pub(crate) fn distinct() -> u64 {
    table().distinct.load(Ordering::Relaxed)
}

impl Table {
    fn keep_immediate(&self, term: Term<'_>) -> Config {
        let word = term.as_c_arg();
        self.keep(
            Query {
                hash: self.hasher.hash_one(word),
                wanted: Wanted::Immediate(word),
            },
            1,
            || Content::Immediate(word),
        )
    }

    fn keep_compact(&self, term: Term<'_>, weight: usize) -> Config {
        let Ok(bytes) = encoding::encode(term, usize::MAX, Zeros::Exact) else {
            return self.keep_shared(term, weight);
        };
        self.keep(
            Query {
                hash: self.hasher.hash_one(bytes.as_slice()),
                wanted: Wanted::Compact(&bytes),
            },
            weight,
            || Content::Compact(bytes.as_slice().into()),
        )
    }

    fn keep_shared(&self, term: Term<'_>, weight: usize) -> Config {
        self.keep(
            Query {
                hash: self.hasher.hash_one(term.hash_internal(self.salt)),
                wanted: Wanted::Shared(term),
            },
            weight,
            || Content::Shared(SharedTerm::new(term)),
        )
    }

    fn keep(&self, query: Query<'_>, weight: usize, content: impl Fn() -> Content) -> Config {
        let guard = self.terms.guard();
        let mut kept = None;
        loop {
            if let Some((stored, ())) = self.terms.get_key_value(&query, &guard) {
                if let Some(config) = stored.join() {
                    return config;
                }
                self.forget(&stored.0);
            }
            let kept = kept.get_or_insert_with(|| {
                Arc::new(Kept {
                    users: AtomicUsize::new(1),
                    hash: query.hash,
                    weight,
                    content: content(),
                })
            });
            if self
                .terms
                .try_insert(Stored(Arc::clone(kept)), (), &guard)
                .is_ok()
            {
                self.distinct.fetch_add(1, Ordering::Relaxed);
                return Config(Arc::clone(kept));
            }
            // Lost to a concurrent insert of an equal term.
        }
    }

    /// Takes out a term without users, unless that has been done.
    fn forget(&self, kept: &Arc<Kept>) {
        let guard = self.terms.guard();
        let is_it = |stored: &Stored, _: &()| Arc::ptr_eq(&stored.0, kept);
        let removed = self
            .terms
            .remove_if(&Stored(Arc::clone(kept)), is_it, &guard);
        if matches!(removed, Ok(Some(_))) {
            self.distinct.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Stored {
    /// One more user, unless the last one has left.
    fn join(&self) -> Option<Config> {
        self.0
            .users
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |users| {
                (users > 0).then_some(users + 1)
            })
            .ok()
            .map(|_| Config(Arc::clone(&self.0)))
    }
}

impl PartialEq for Stored {
    fn eq(&self, other: &Self) -> bool {
        if Arc::ptr_eq(&self.0, &other.0) {
            return true;
        }
        self.0.hash == other.0.hash
            && match (&self.0.content, &other.0.content) {
                (Content::Immediate(a), Content::Immediate(b)) => a == b,
                (Content::Compact(a), Content::Compact(b)) => a == b,
                (Content::Shared(a), Content::Shared(b)) => b.env.run(|own| {
                    // SAFETY: as in `SharedTerm::is`.
                    a.is(unsafe { Term::new(own, b.term) })
                }),
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
                (Wanted::Immediate(wanted), Content::Immediate(word)) => wanted == word,
                (Wanted::Compact(wanted), Content::Compact(bytes)) => **wanted == **bytes,
                (Wanted::Shared(wanted), Content::Shared(shared)) => shared.is(*wanted),
                _ => false,
            }
    }
}

impl Hash for Query<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

// ---- How much there is to do ----

struct Weighed {
    weight: usize,
    /// Made of atoms, numbers, binaries, local pids, lists, tuples and maps only: the encoding
    /// loses nothing of these.
    is_plain: bool,
}

impl Weighed {
    /// Adds a term of which only the external format has a size.
    fn add_opaque(&mut self, term: Term<'_>, scheduler: Scheduler) -> Option<()> {
        if scheduler == Scheduler::Normal {
            return None;
        }
        self.is_plain = false;
        self.weight += term.to_binary().len() / BYTES_PER_WEIGHT;
        Some(())
    }
}

fn is_immediate(term: Term<'_>) -> bool {
    // A small integer is left out: whether it is immediate depends on its size.
    term.is_atom() || term.is_empty_list() || term.decode::<LocalPid>().is_ok()
}

/// Weighs a term, or gives up beyond `max`. Costs in proportion to the smaller of both.
///
/// There is no size to be had of a fun, of a bit string that is no binary and of a large integer but that
/// of the external format, which is a copy as large as they are. So a normal scheduler gives up on these,
/// and a dirty one makes the copy. A binary that does not begin at a byte is copied to be shown at all, and it
/// cannot be seen beforehand that one does not: it alone costs in proportion to its size.
fn weigh(term: Term<'_>, max: usize, scheduler: Scheduler) -> Option<Weighed> {
    let mut weighed = Weighed {
        weight: 0,
        is_plain: true,
    };
    let mut left = vec![term];
    while let Some(term) = left.pop() {
        weighed.weight += 1;
        match term.get_type() {
            TermType::Atom | TermType::Float => {}
            TermType::Integer if term.decode::<i64>().is_ok() => {}
            TermType::Integer => weighed.add_opaque(term, scheduler)?,
            TermType::Binary => match Binary::from_term(term) {
                Ok(binary) => weighed.weight += binary.len() / BYTES_PER_WEIGHT,
                Err(_) => weighed.add_opaque(term, scheduler)?,
            },
            TermType::List => {
                if let Ok((head, tail)) = term.list_get_cell() {
                    left.push(tail);
                    left.push(head);
                }
            }
            TermType::Tuple => left.extend(tuple_elements(term, max)?),
            TermType::Map => {
                if 2 * term.map_size().ok()? > max {
                    return None;
                }
                for (key, value) in MapIterator::new(term)? {
                    left.push(key);
                    left.push(value);
                }
            }
            TermType::Pid => weighed.is_plain &= term.decode::<LocalPid>().is_ok(),
            TermType::Port | TermType::Ref => weighed.is_plain = false,
            TermType::Fun | TermType::Unknown => weighed.add_opaque(term, scheduler)?,
        }
        if weighed.weight + left.len() > max {
            return None;
        }
    }
    Some(weighed)
}
