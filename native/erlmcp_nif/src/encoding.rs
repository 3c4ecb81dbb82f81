//! Terms as bytes: equal terms (`=:=`) have equal bytes, and the other way round.
//!
//! Atoms and local pids are their words, which are unique in this VM. What holds other terms is
//! written in postfix order, elements before what holds them, so that neither direction needs
//! recursion, whatever the nesting. The encoding is our own and not the external term format:
//!
//! * It stops at a bound instead of first writing what may be gigabytes.
//! * A local pid or reference in the external format carries the node's name, so that it would no
//!   longer be the same once the node has become distributed.
//! * Before OTP 27, `0.0 =:= -0.0`, but the external format tells them apart.
//! * Atoms are read back without a look at the VM's table of atoms.
//!
//! What has no better form (large integers, bit strings, ports, what belongs to another node) is
//! held in the external format inside the encoding; of a fun, without its creator, which is not
//! part of its identity.

use once_cell::race::OnceBool;
use rustler::types::tuple::make_tuple;
use rustler::{Binary, Encoder, Env, Error, LocalPid, MapIterator, NifResult, Term, TermType};

use crate::immediate;
use crate::tuple::tuple_elements;

fn word(term: Term<'_>) -> [u8; 8] {
    immediate::word(term).to_le_bytes()
}

fn binary<'a>(env: Env<'a>, bytes: &[u8]) -> Term<'a> {
    rustler::NewBinary::from_slice(env, bytes).into()
}

const TAG_ATOM: u8 = b'a';
const TAG_BINARY: u8 = b'b';
const TAG_BYTE: u8 = b'c';
const TAG_INTEGER: u8 = b'i';
const TAG_FLOAT: u8 = b'f';
const TAG_PID: u8 = b'p';
const TAG_REFERENCE: u8 = b'r';
const TAG_NIL: u8 = b'n';
/// Preceded by the tail and the elements, followed by the number of elements.
const TAG_LIST: u8 = b'l';
const TAG_TUPLE: u8 = b't';
/// Preceded by keys and values in turn, followed by the number of pairs. Equal maps have the same
/// order of keys in one VM: that is how the VM itself compares them.
const TAG_MAP: u8 = b'm';
const TAG_EXTERNAL: u8 = b'x';

enum Step<'a> {
    Visit(Term<'a>),
    /// All elements are written: write what holds them.
    Close(u8, u32),
}

/// What becomes of `-0.0`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zeros {
    /// It stays what it is.
    Exact,
    /// It becomes `0.0` where this VM takes the two for the same term.
    Merged,
}

/// Encodes a term; `badarg` if that takes more than `max_bytes`.
pub(crate) fn encode(term: Term<'_>, max_bytes: usize, zeros: Zeros) -> NifResult<Vec<u8>> {
    let mut encoding = Vec::new();
    let out = &mut encoding;
    let mut steps = vec![Step::Visit(term)];
    while let Some(step) = steps.pop() {
        match step {
            Step::Close(tag, count) => {
                out.push(tag);
                out.extend_from_slice(&count.to_le_bytes());
            }
            Step::Visit(term) => encode_one(term, max_bytes, zeros, out, &mut steps)?,
        }
        // Each step that is left will write at least one byte.
        if out.len() + steps.len() > max_bytes {
            return Err(Error::BadArg);
        }
    }
    Ok(encoding)
}

fn encode_one<'a>(
    term: Term<'a>,
    max_bytes: usize,
    zeros: Zeros,
    out: &mut Vec<u8>,
    steps: &mut Vec<Step<'a>>,
) -> NifResult<()> {
    match term.get_type() {
        TermType::Atom => {
            out.push(TAG_ATOM);
            out.extend_from_slice(&word(term));
        }
        TermType::Binary => match Binary::from_term(term) {
            Ok(binary) if binary.len() <= max_bytes => counted(TAG_BINARY, &binary, out),
            Ok(_) => return Err(Error::BadArg),
            Err(_) => external(term, max_bytes, out)?,
        },
        TermType::Integer => match term.decode::<i64>() {
            Ok(integer) => match u8::try_from(integer) {
                Ok(byte) => out.extend_from_slice(&[TAG_BYTE, byte]),
                Err(_) => {
                    out.push(TAG_INTEGER);
                    out.extend_from_slice(&integer.to_le_bytes());
                }
            },
            Err(_) => external(term, max_bytes, out)?,
        },
        TermType::Float => {
            let mut float: f64 = term.decode()?;
            if float == 0.0 && zeros == Zeros::Merged && zeros_are_equal(term.get_env()) {
                float = 0.0;
            }
            out.push(TAG_FLOAT);
            out.extend_from_slice(&float.to_bits().to_le_bytes());
        }
        TermType::Pid if term.decode::<LocalPid>().is_ok() => {
            out.push(TAG_PID);
            out.extend_from_slice(&word(term));
        }
        TermType::Ref => match local_reference_numbers(term) {
            Some(numbers) => counted(TAG_REFERENCE, &numbers, out),
            None => external(term, max_bytes, out)?,
        },
        TermType::List => {
            if term.is_empty_list() {
                out.push(TAG_NIL);
                return Ok(());
            }
            let mut elements = Vec::new();
            let mut tail = term;
            while let Ok((head, rest)) = tail.list_get_cell() {
                if elements.len() == max_bytes {
                    return Err(Error::BadArg);
                }
                elements.push(Step::Visit(head));
                tail = rest;
            }
            steps.push(Step::Close(TAG_LIST, elements.len() as u32));
            steps.extend(elements.into_iter().rev());
            steps.push(Step::Visit(tail));
        }
        TermType::Tuple => {
            let elements = tuple_elements(term, max_bytes).ok_or(Error::BadArg)?;
            steps.push(Step::Close(TAG_TUPLE, elements.len() as u32));
            steps.extend(elements.into_iter().rev().map(Step::Visit));
        }
        TermType::Map => {
            let size = term.map_size()?;
            if size > max_bytes {
                return Err(Error::BadArg);
            }
            steps.push(Step::Close(TAG_MAP, size as u32));
            for (key, value) in MapIterator::new(term).ok_or(Error::BadArg)? {
                steps.push(Step::Visit(value));
                steps.push(Step::Visit(key));
            }
        }
        TermType::Fun => {
            let encoded = term.to_binary();
            let anonymous = without_creator(&encoded);
            let bytes = anonymous.as_deref().unwrap_or(&encoded);
            if bytes.len() > max_bytes {
                return Err(Error::BadArg);
            }
            counted(TAG_EXTERNAL, bytes, out);
        }
        _ => external(term, max_bytes, out)?,
    }
    Ok(())
}

fn counted(tag: u8, bytes: &[u8], out: &mut Vec<u8>) {
    out.push(tag);
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

fn external(term: Term<'_>, max_bytes: usize, out: &mut Vec<u8>) -> NifResult<()> {
    let bytes = term.to_binary();
    if bytes.len() > max_bytes {
        return Err(Error::BadArg);
    }
    counted(TAG_EXTERNAL, &bytes, out);
    Ok(())
}

/// The term that [`encode`] was given.
pub(crate) fn decode<'a>(env: Env<'a>, mut bytes: &[u8]) -> NifResult<Term<'a>> {
    let mut stack: Vec<Term<'a>> = Vec::new();
    while let Some((&tag, rest)) = bytes.split_first() {
        bytes = rest;
        let term = match tag {
            TAG_ATOM | TAG_PID => {
                let word = take(&mut bytes)?;
                // SAFETY: written by `encode_one` from an atom or a local pid; both are immediate.
                unsafe { immediate::term(env, u64::from_le_bytes(word)) }
            }
            TAG_BINARY => binary(env, take_counted(&mut bytes)?),
            TAG_BYTE => take::<1>(&mut bytes)?[0].encode(env),
            TAG_INTEGER => i64::from_le_bytes(take(&mut bytes)?).encode(env),
            TAG_FLOAT => f64::from_bits(u64::from_le_bytes(take(&mut bytes)?)).encode(env),
            TAG_REFERENCE => local_reference(env, take_counted(&mut bytes)?)?,
            TAG_NIL => Term::list_new_empty(env),
            TAG_LIST => {
                let elements = pop(&mut stack, take_count(&mut bytes)?)?;
                let tail = stack.pop().ok_or(Error::BadArg)?;
                elements
                    .into_iter()
                    .rev()
                    .fold(tail, |list, element| list.list_prepend(element))
            }
            TAG_TUPLE => make_tuple(env, &pop(&mut stack, take_count(&mut bytes)?)?),
            TAG_MAP => {
                let flat = pop(&mut stack, 2 * take_count(&mut bytes)?)?;
                let (keys, values): (Vec<_>, Vec<_>) =
                    flat.chunks_exact(2).map(|pair| (pair[0], pair[1])).unzip();
                Term::map_from_term_arrays(env, &keys, &values)?
            }
            TAG_EXTERNAL => {
                let external = take_counted(&mut bytes)?;
                env.binary_to_term(external).ok_or(Error::BadArg)?.0
            }
            _ => return Err(Error::BadArg),
        };
        stack.push(term);
    }
    stack.pop().ok_or(Error::BadArg)
}

fn pop<'a>(stack: &mut Vec<Term<'a>>, count: usize) -> NifResult<Vec<Term<'a>>> {
    let first = stack.len().checked_sub(count).ok_or(Error::BadArg)?;
    Ok(stack.split_off(first))
}

fn take<const N: usize>(bytes: &mut &[u8]) -> NifResult<[u8; N]> {
    let (taken, rest) = bytes.split_first_chunk().ok_or(Error::BadArg)?;
    *bytes = rest;
    Ok(*taken)
}

fn take_count(bytes: &mut &[u8]) -> NifResult<usize> {
    Ok(u32::from_le_bytes(take(bytes)?) as usize)
}

fn take_counted<'b>(bytes: &mut &'b [u8]) -> NifResult<&'b [u8]> {
    let count = take_count(bytes)?;
    let (taken, rest) = bytes.split_at_checked(count).ok_or(Error::BadArg)?;
    *bytes = rest;
    Ok(taken)
}

/// Whether this VM takes `0.0` and `-0.0` for the same term.
fn zeros_are_equal(env: Env<'_>) -> bool {
    static EQUAL: OnceBool = OnceBool::new();
    EQUAL.get_or_init(|| 0.0.encode(env) == (-0.0).encode(env))
}

// ---- Funs ----
//
// In the external format: 131, 112, size (4 bytes, itself and all that follows), arity (1), unique
// (16), index (4), number of free variables (4), module (an atom), index and unique (integers), the
// creator's pid, the free variables.

const NEW_FUN_EXT: u8 = 112;

/// A pid that stands for any creator.
const NOBODY: &[u8] = b"\x58\x77\x0dnonode@nohost\0\0\0\0\0\0\0\0\0\0\0\0";

/// The external format of a fun made by nobody in particular; `None` if it is not that of a local
/// fun.
fn without_creator(encoded: &[u8]) -> Option<Vec<u8>> {
    let body = encoded.strip_prefix(&[131, NEW_FUN_EXT])?.get(4..)?;
    let rest = after_atom(body.get(1 + 16 + 4 + 4..)?)?;
    let creator = after_integer(after_integer(rest)?)?;
    let free = after_atom(creator.strip_prefix(&[NEW_PID_EXT])?)?.get(12..)?;
    let before = &body[..body.len() - creator.len()];
    let size = (4 + before.len() + NOBODY.len() + free.len()) as u32;
    let mut anonymous = vec![131, NEW_FUN_EXT];
    anonymous.extend_from_slice(&size.to_be_bytes());
    anonymous.extend_from_slice(before);
    anonymous.extend_from_slice(NOBODY);
    anonymous.extend_from_slice(free);
    Some(anonymous)
}

fn after_atom(bytes: &[u8]) -> Option<&[u8]> {
    match bytes {
        // SMALL_ATOM_UTF8_EXT, SMALL_ATOM_EXT
        [119 | 115, length, rest @ ..] => rest.get(usize::from(*length)..),
        // ATOM_UTF8_EXT, ATOM_EXT
        [118 | 100, high, low, rest @ ..] => {
            rest.get(usize::from(u16::from_be_bytes([*high, *low]))..)
        }
        _ => None,
    }
}

fn after_integer(bytes: &[u8]) -> Option<&[u8]> {
    match bytes {
        // SMALL_INTEGER_EXT
        [97, _, rest @ ..] => Some(rest),
        // INTEGER_EXT
        [98, _, _, _, _, rest @ ..] => Some(rest),
        // SMALL_BIG_EXT
        [110, length, _sign, rest @ ..] => rest.get(usize::from(*length)..),
        _ => None,
    }
}

// ---- References of this node ----
//
// In the external format: 131, 90, number of 32-bit words, node name as an atom, creation (4
// bytes), the words. A pid: 131, 88, node name, id (4), serial (4), creation (4).

const NEWER_REFERENCE_EXT: u8 = 90;
const NEW_PID_EXT: u8 = 88;

/// The words of a reference of this node, without the node's name.
fn local_reference_numbers(term: Term<'_>) -> Option<Vec<u8>> {
    let (node, creation) = this_node(term.get_env())?;
    let encoded = term.to_binary();
    let rest = encoded.strip_prefix(&[131, NEWER_REFERENCE_EXT])?;
    let (_words, rest) = rest.split_first_chunk::<2>()?;
    let rest = rest.strip_prefix(node.as_slice())?;
    Some(rest.strip_prefix(&creation)?.to_vec())
}

fn local_reference<'a>(env: Env<'a>, numbers: &[u8]) -> NifResult<Term<'a>> {
    let (node, creation) = this_node(env).ok_or(Error::BadArg)?;
    let words = (numbers.len() / 4) as u16;
    let mut encoded = vec![131, NEWER_REFERENCE_EXT];
    encoded.extend_from_slice(&words.to_be_bytes());
    encoded.extend_from_slice(&node);
    encoded.extend_from_slice(&creation);
    encoded.extend_from_slice(numbers);
    Ok(env.binary_to_term(&encoded).ok_or(Error::BadArg)?.0)
}

/// This node's name (an encoded atom) and creation, as the calling process's pid shows them.
fn this_node(env: Env<'_>) -> Option<(Vec<u8>, [u8; 4])> {
    let encoded = env.pid().encode(env).to_binary();
    let rest = encoded.strip_prefix(&[131, NEW_PID_EXT])?;
    let (rest, creation) = rest.split_last_chunk::<4>()?;
    let (node, _id_and_serial) = rest.split_last_chunk::<8>()?;
    Some((node.to_vec(), *creation))
}
