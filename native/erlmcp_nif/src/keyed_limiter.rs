//! Keyed limiters, and what is taken from several buckets together.
//!
//! Limits are those of [`crate::token_bucket`].

use erlmcp_core::keyed_limiter::{Key, KeyedLimiter, KeyedRefusal};
use erlmcp_core::token_bucket::TokenBucket;
use rustler::{Atom, Encoder, Env, Error, NifResult, Resource, ResourceArc, Term};

use crate::atoms;
use crate::background;
use crate::backpressure::clock;
use crate::id;
use crate::resource::keep_library;
use crate::token_bucket::{
    bucket, change_limits, decode_limits, limits_term, state_term, taken_term,
};

/// The most bytes of an encoded key. In a call that takes from several buckets, each key has its share of them.
const MAX_KEY_BYTES: usize = 65_535;

/// Buckets that one call takes from at most.
const MAX_TOGETHER: usize = 16;

pub(crate) struct LimiterResource(Option<Box<KeyedLimiter>>);

impl Resource for LimiterResource {}

/// Freeing a limiter takes some 50 ns a key.
impl Drop for LimiterResource {
    fn drop(&mut self) {
        if let Some(limiter) = self.0.take() {
            background::free(limiter);
        }
    }
}

fn limiter<'a>(term: Term<'a>) -> NifResult<&'a KeyedLimiter> {
    term.try_get_resource::<LimiterResource>()
        .and_then(|resource| resource.0.as_deref())
        .ok_or(Error::BadArg)
}

fn key(limiter: &KeyedLimiter, term: Term<'_>, max_bytes: usize) -> NifResult<Key> {
    let mut encoded = None;
    let (kind, bytes) = id::kind_and_bytes(term, max_bytes, &mut encoded).ok_or(Error::BadArg)?;
    Ok(limiter.key(kind, bytes))
}

fn refusal_term(env: Env<'_>, refusal: KeyedRefusal) -> Term<'_> {
    match refusal {
        KeyedRefusal::Refused(refused) => taken_term(env, Err(refused)),
        KeyedRefusal::LimiterFull => atoms::limiter_full().encode(env),
    }
}

#[rustler::nif]
fn limiter_new(limits: Term<'_>, max_keys: u64) -> NifResult<ResourceArc<LimiterResource>> {
    let limits = decode_limits(limits)?;
    if !(1..=KeyedLimiter::MAX_KEYS).contains(&max_keys) {
        return Err(Error::BadArg);
    }
    // The reaper frees it.
    keep_library();
    let limiter = KeyedLimiter::new(limits, max_keys, clock());
    Ok(ResourceArc::new(LimiterResource(Some(Box::new(limiter)))))
}

#[rustler::nif]
fn limiter_take<'a>(
    env: Env<'a>,
    of: Term<'a>,
    key_term: Term<'a>,
    tokens: u64,
) -> NifResult<Term<'a>> {
    let limiter = limiter(of)?;
    let key = key(limiter, key_term, MAX_KEY_BYTES)?;
    Ok(match limiter.take(key, tokens, clock()) {
        Ok(left) => taken_term(env, Ok(left)),
        Err(refusal) => refusal_term(env, refusal),
    })
}

#[rustler::nif]
fn limiter_refund(of: Term<'_>, key_term: Term<'_>, tokens: u64) -> NifResult<Atom> {
    let limiter = limiter(of)?;
    limiter.refund(key(limiter, key_term, MAX_KEY_BYTES)?, tokens, clock());
    Ok(atoms::ok())
}

#[rustler::nif]
fn limiter_state<'a>(env: Env<'a>, of: Term<'a>, key_term: Term<'a>) -> NifResult<Term<'a>> {
    let limiter = limiter(of)?;
    let key = key(limiter, key_term, MAX_KEY_BYTES)?;
    Ok(state_term(env, &limiter.state(key, clock())))
}

#[rustler::nif]
fn limiter_set_limits<'a>(env: Env<'a>, of: Term<'a>, limits: Term<'a>) -> NifResult<Term<'a>> {
    let limiter = limiter(of)?;
    change_limits(env, limits, |change| limiter.change_limits(change, clock()))
}

/// The number of keys with a bucket, the most of them, and the limits.
#[rustler::nif]
fn limiter_info<'a>(env: Env<'a>, of: Term<'a>) -> NifResult<Term<'a>> {
    let limiter = limiter(of)?;
    let limits = limits_term(env, limiter.limits());
    Ok((limiter.len(), limiter.max_keys(), limits).encode(env))
}

// ---- Several buckets together ----

/// One of the buckets that a call takes from, and how many tokens.
enum Share<'a> {
    OfKey(&'a KeyedLimiter, Key, u64),
    OfBucket(&'a TokenBucket, u64),
}

impl<'a> Share<'a> {
    /// `{Limiter, Key, Tokens}` or `{Bucket, Tokens}`.
    fn decode(term: Term<'a>) -> NifResult<Self> {
        if let Ok((of, key_term, tokens)) = term.decode::<(Term<'a>, Term<'a>, u64)>() {
            let limiter = limiter(of)?;
            let key = key(limiter, key_term, MAX_KEY_BYTES / MAX_TOGETHER)?;
            return Ok(Self::OfKey(limiter, key, tokens));
        }
        let (of, tokens) = term.decode::<(Term<'a>, u64)>()?;
        Ok(Self::OfBucket(bucket(of)?, tokens))
    }

    /// Whether tokens were taken: none are without limits.
    fn take(&self) -> Result<bool, KeyedRefusal> {
        let left = match self {
            Self::OfKey(limiter, key, tokens) => limiter.take(*key, *tokens, clock())?,
            Self::OfBucket(bucket, tokens) => bucket.take(clock(), *tokens)?,
        };
        Ok(left.is_some())
    }

    fn refund(&self) {
        match self {
            Self::OfKey(limiter, key, tokens) => limiter.refund(*key, *tokens, clock()),
            Self::OfBucket(bucket, tokens) => bucket.refund(clock(), *tokens),
        }
    }
}

/// Takes from all of these buckets, or from none: `ok`, or the position of the first one that refuses, and why.
///
/// Takes from one after the other, and gives all back when one refuses. Until then another caller may be refused the
/// tokens that it gives back.
#[rustler::nif]
fn take_together<'a>(env: Env<'a>, list: Term<'a>) -> NifResult<Term<'a>> {
    let (mut shares, mut rest) = (Vec::with_capacity(MAX_TOGETHER), list);
    while let Ok((share, tail)) = rest.list_get_cell() {
        if shares.len() == MAX_TOGETHER {
            return Err(Error::BadArg);
        }
        shares.push(Share::decode(share)?);
        rest = tail;
    }
    if !rest.is_empty_list() {
        return Err(Error::BadArg);
    }
    let mut taken = Vec::with_capacity(shares.len());
    for (n, share) in shares.iter().enumerate() {
        match share.take() {
            Ok(true) => taken.push(share),
            Ok(false) => {}
            Err(refusal) => {
                taken.into_iter().for_each(Share::refund);
                return Ok((n + 1, refusal_term(env, refusal)).encode(env));
            }
        }
    }
    Ok(atoms::ok().encode(env))
}
