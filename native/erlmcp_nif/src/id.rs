//! Identifiers: from a term to bytes that are equal exactly if the terms are (`=:=`), and back.
//!
//! Atoms and binaries need no encoding: an atom is its word, which is unique in this VM and never
//! reused, and a binary is its bytes. Any other term is encoded (see [`crate::encoding`]).

use std::borrow::Cow;

use erlmcp_core::registry::Id;
use rustler::{Binary, Env, Error, NifResult, Term};

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

/// Encodes an id; `badarg` if it takes more than `max_bytes`, as [`encoding::encode`] counts them.
pub(crate) fn encode(term: Term<'_>, max_bytes: usize) -> NifResult<EncodedId<'_>> {
    if let Ok(binary) = Binary::from_term(term) {
        let bytes = binary.as_slice();
        if bytes.len() > max_bytes {
            return Err(Error::BadArg);
        }
        return Ok(EncodedId {
            kind: BINARY,
            bytes: Bytes::Slice(Cow::Borrowed(bytes)),
        });
    }
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

/// Calls `f` with the id of a term; `badarg` if that takes more bytes than the registry's bound.
///
/// Inlined with what it calls: what is returned through memory here costs as much as the hash.
#[inline(always)]
pub(crate) fn with<R>(
    registry: &Registry,
    term: Term<'_>,
    f: impl FnOnce(&Id<'_>) -> R,
) -> NifResult<R> {
    let max_bytes = registry.limits().max_id_bytes();
    if let Ok(binary) = Binary::from_term(term) {
        let bytes = binary.as_slice();
        if bytes.len() > max_bytes {
            return Err(Error::BadArg);
        }
        return Ok(f(&registry.id(BINARY, bytes)));
    }
    let encoded = encode(term, max_bytes)?;
    Ok(f(&registry.id(encoded.kind, encoded.bytes())))
}

/// How much work [`decode`] has, as a config's weight: an encoded term has at least one byte.
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
