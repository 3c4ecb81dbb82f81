//! Encoding of ids as bytes, and decoding. The bytes are equal if and only if the terms are (`=:=`).
//!
//! Atoms and binaries need no encoding: an atom is its word, which is unique in this VM and never
//! reused, and a binary is its bytes. Any other term is encoded (see [`crate::encoding`]).

use std::borrow::Cow;
use std::mem::MaybeUninit;

use erlmcp_core::registry::Id;
use rustler::sys::{ErlNifBinary, enif_inspect_binary};
use rustler::{Env, Error, NifResult, Term};

use crate::config::BYTES_PER_WEIGHT;
use crate::encoding::{self, Zeros};
use crate::immediate;
use crate::resource::Registry;

/// What the bytes of an id encode.
const ATOM: u8 = 0;
const BINARY: u8 = 1;
const OTHER: u8 = 2;

/// An encoded id.
pub(crate) struct EncodedId<'a> {
    pub(crate) kind: u8,
    bytes: Bytes<'a>,
}

enum Bytes<'a> {
    Word([u8; 8]),
    Slice(Cow<'a, [u8]>),
}

impl EncodedId<'_> {
    #[inline]
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Word(word) => word,
            Bytes::Slice(slice) => slice,
        }
    }
}

/// The bytes of a term, if it is a binary.
///
/// Like rustler's `Binary`, but address and size are loaded separately. If they are copied together, the
/// compiler merges the loads into a wide one. A wide load of two values that were just stored separately
/// cannot be forwarded: it waits until both stores have reached the cache, a tenth of the whole route.
#[inline(always)]
fn binary(term: Term<'_>) -> Option<&[u8]> {
    let mut binary = MaybeUninit::<ErlNifBinary>::uninit();
    // SAFETY: the term belongs to its environment, and its bytes live as long as that does. The
    // fields are written if the call reports a binary, and then `data` points at `size` bytes. It
    // may be null for an empty binary, but the pointer of a slice must not be.
    unsafe {
        if enif_inspect_binary(
            term.get_env().as_c_arg(),
            term.as_c_arg(),
            binary.as_mut_ptr(),
        ) == 0
        {
            return None;
        }
        let data = (&raw const (*binary.as_ptr()).data).read_volatile();
        let size = (&raw const (*binary.as_ptr()).size).read_volatile();
        if data.is_null() {
            return Some(&[]);
        }
        Some(std::slice::from_raw_parts(data, size))
    }
}

/// Encodes an id; `badarg` if it takes more than `max_bytes`, as [`encoding::encode`] counts them.
pub(crate) fn encode(term: Term<'_>, max_bytes: usize) -> NifResult<EncodedId<'_>> {
    match binary(term) {
        Some(bytes) if bytes.len() > max_bytes => Err(Error::BadArg),
        Some(bytes) => Ok(EncodedId {
            kind: BINARY,
            bytes: Bytes::Slice(Cow::Borrowed(bytes)),
        }),
        None => encode_other(term, max_bytes),
    }
}

/// Encodes an id that is not a binary.
fn encode_other(term: Term<'_>, max_bytes: usize) -> NifResult<EncodedId<'_>> {
    if term.is_atom() {
        return Ok(EncodedId {
            kind: ATOM,
            bytes: Bytes::Word(immediate::word(term).to_le_bytes()),
        });
    }
    Ok(EncodedId {
        kind: OTHER,
        bytes: Bytes::Slice(Cow::Owned(encoding::encode(
            term,
            max_bytes,
            Zeros::Merged,
        )?)),
    })
}

/// The kind and the bytes of an id. The bytes are the term's own, or else stored in `encoded`. `None` if
/// they are more than `max_bytes`.
///
/// Inlined: returning through memory costs as much as the hash.
#[inline(always)]
pub(crate) fn kind_and_bytes<'b, 'a: 'b>(
    term: Term<'a>,
    max_bytes: usize,
    encoded: &'b mut Option<EncodedId<'a>>,
) -> Option<(u8, &'b [u8])> {
    if let Some(bytes) = binary(term) {
        return (bytes.len() <= max_bytes).then_some((BINARY, bytes));
    }
    let encoded = encoded.insert(encode_other(term, max_bytes).ok()?);
    Some((encoded.kind, encoded.bytes()))
}

/// Calls `f` with the id of a term; `None` if the id takes more bytes than the registry allows.
///
/// Inlined with its callees, and on the hot path `R` is one word, so that nothing is returned through memory.
#[inline(always)]
pub(crate) fn with<R>(
    registry: &Registry,
    term: Term<'_>,
    f: impl FnOnce(&Id<'_>) -> R,
) -> Option<R> {
    let mut encoded = None;
    let (kind, bytes) = kind_and_bytes(term, registry.limits().max_id_bytes(), &mut encoded)?;
    Some(f(&registry.id(kind, bytes)))
}

/// The work of [`decode`], in the unit of a config's weight: each encoded term has at least one byte.
pub(crate) fn weight(kind: u8, bytes: &[u8]) -> usize {
    match kind {
        ATOM => 0,
        BINARY => bytes.len() / BYTES_PER_WEIGHT,
        _ => bytes.len(),
    }
}

/// The term of an id that [`encode`] made.
pub(crate) fn decode<'a>(env: Env<'a>, kind: u8, bytes: &[u8]) -> NifResult<Term<'a>> {
    match kind {
        ATOM => {
            let word: [u8; 8] = bytes.try_into().map_err(|_| Error::BadArg)?;
            // SAFETY: the bytes were written by `encode` from an atom, and atoms are immediate
            // terms, valid in every environment for as long as the VM lives.
            Ok(unsafe { immediate::term(env, u64::from_le_bytes(word)) })
        }
        BINARY => Ok(rustler::NewBinary::from_slice(env, bytes).into()),
        _ => encoding::decode(env, bytes),
    }
}
