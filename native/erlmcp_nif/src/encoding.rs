//! Terms as bytes: two terms are equal (`=:=`) if and only if their bytes are.
//!
//! Atoms and local pids are their words, which are unique in this VM. Lists, tuples and maps are written
//! in postfix order, elements first, so that neither direction needs recursion, whatever the nesting.
//! The encoding is our own and not the external term format:
//!
//! * It stops at a bound instead of first writing what may be gigabytes, except for bit strings and large
//!   integers (see below).
//! * In the external format a local pid or reference carries the node's name, so that it changes when the
//!   node becomes distributed.
//! * Before OTP 27, `0.0 =:= -0.0`, but the external format tells them apart.
//! * Atoms are decoded without a look-up in the VM's atom table.
//!
//! Terms without a better form (large integers, bit strings, ports, `fun M:F/A`, pids and references of
//! other nodes) are embedded in the external format.
//!
//! # What is refused
//!
//! Every fun but `fun M:F/A`. Two funs are equal if their captured values are, and the NIF API shows these
//! only in a copy. A copy loses sharing: `X1 = {X0, X0}, X2 = {X1, X1}, ...` takes a few words in a fun and
//! 2^40 terms in the copy. In tuples, lists and maps the encoder counts such terms one by one, and stops at
//! its bound.
//!
//! # What is not bounded
//!
//! References, ports and pids are short. But the NIF API shows a bit string that is not a binary, a binary
//! that does not begin at a byte boundary, and an integer of more than a word only as a copy, and tells no
//! size of them. So the first of them that exceeds the bound takes time and memory in proportion to its own
//! size before it is refused. The memory is freed when the call returns. (No integer has more than some
//! megabytes.)

use std::cell::OnceCell;

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
/// Preceded by the elements and the tail, followed by the number of elements.
const TAG_LIST: u8 = b'l';
/// Preceded by the elements, followed by their number.
const TAG_TUPLE: u8 = b't';
/// Preceded by all keys, then all values, followed by the number of pairs. Equal maps have the same
/// order of keys in one VM: that is how the VM itself compares them.
const TAG_MAP: u8 = b'm';
const TAG_EXTERNAL: u8 = b'x';

/// Each nested term counts at least this many bytes against the bound, however few bytes its encoding has,
/// since terms cost time too: some 50 ns each. As many bytes as a list cell.
const MIN_BYTES_PER_TERM: usize = 16;
/// A term that goes through the external format costs about as much as this many others.
const TERMS_PER_EXTERNAL: usize = 8;

enum Step<'a> {
    Visit(Term<'a>),
    /// The rest of a list, and the number of elements before it.
    Rest(Term<'a>, u32),
    /// All elements are written: write the tag, and the number of elements or pairs.
    Close(u8, u32),
}

/// The encoding of `-0.0`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zeros {
    /// `-0.0` differs from `0.0`.
    Exact,
    /// `-0.0` is encoded as `0.0` if the two are equal (`=:=`) in this VM.
    Merged,
}

/// Encodes a term; `badarg` if that takes more than `max_bytes`, or if a part of it has more than 2^32 - 1 bytes or elements.
pub(crate) fn encode(term: Term<'_>, max_bytes: usize, zeros: Zeros) -> NifResult<Vec<u8>> {
    // Room for most terms: to grow these would take half as long again.
    let mut steps = Vec::with_capacity(16);
    steps.push(Step::Visit(term));
    let mut encoding = Encoding {
        out: Vec::with_capacity(128.min(max_bytes)),
        steps,
        max_bytes,
        // A term that is not nested is bounded by its bytes alone.
        terms_left: TERMS_PER_EXTERNAL + max_bytes / MIN_BYTES_PER_TERM,
        zeros,
        node: OnceCell::new(),
    };
    while let Some(step) = encoding.steps.pop() {
        match step {
            Step::Visit(term) => encoding.visit(term)?,
            Step::Rest(rest, count) => encoding.rest_of_list(rest, count)?,
            Step::Close(tag, count) => encoding.close(tag, count),
        }
        if encoding.out.len() > max_bytes {
            return Err(Error::BadArg);
        }
    }
    Ok(encoding.out)
}

struct Encoding<'a> {
    out: Vec<u8>,
    steps: Vec<Step<'a>>,
    max_bytes: usize,
    /// The number of terms that may still become steps, so that the bound limits the steps too.
    terms_left: usize,
    zeros: Zeros,
    /// Read once, at the first reference.
    node: OnceCell<Option<ThisNode>>,
}

impl<'a> Encoding<'a> {
    fn visit(&mut self, term: Term<'a>) -> NifResult<()> {
        let out = &mut self.out;
        match term.get_type() {
            TermType::Atom => {
                out.push(TAG_ATOM);
                out.extend_from_slice(&word(term));
            }
            TermType::Binary => match Binary::from_term(term) {
                Ok(binary) => self.counted(TAG_BINARY, &binary)?,
                Err(_) => self.external(term)?,
            },
            TermType::Integer => match term.decode::<i64>() {
                Ok(integer) => match u8::try_from(integer) {
                    Ok(byte) => out.extend_from_slice(&[TAG_BYTE, byte]),
                    Err(_) => {
                        out.push(TAG_INTEGER);
                        out.extend_from_slice(&integer.to_le_bytes());
                    }
                },
                Err(_) => self.external(term)?,
            },
            TermType::Float => {
                let mut float: f64 = term.decode()?;
                if float == 0.0 && self.zeros == Zeros::Merged && zeros_are_equal(term.get_env()) {
                    float = 0.0;
                }
                out.push(TAG_FLOAT);
                out.extend_from_slice(&float.to_bits().to_le_bytes());
            }
            TermType::Pid if term.decode::<LocalPid>().is_ok() => {
                out.push(TAG_PID);
                out.extend_from_slice(&word(term));
            }
            TermType::Ref => {
                self.take(TERMS_PER_EXTERNAL)?;
                let node = self.node.get_or_init(|| ThisNode::of(term.get_env()));
                let encoded = term.to_binary();
                match node.as_ref().and_then(|node| node.numbers_of(&encoded)) {
                    Some(numbers) => self.counted(TAG_REFERENCE, numbers)?,
                    None => self.counted(TAG_EXTERNAL, &encoded)?,
                }
            }
            TermType::List => {
                if term.is_empty_list() {
                    out.push(TAG_NIL);
                } else {
                    self.steps.push(Step::Rest(term, 0));
                }
            }
            TermType::Tuple => {
                let elements = tuple_elements(term, self.terms_left).ok_or(Error::BadArg)?;
                self.take(elements.len())?;
                let count = u32::try_from(elements.len()).map_err(|_| Error::BadArg)?;
                self.steps.push(Step::Close(TAG_TUPLE, count));
                self.steps.extend(elements.rev().map(Step::Visit));
            }
            TermType::Map => {
                let size = term.map_size()?;
                self.take(2 * size)?;
                let count = u32::try_from(size).map_err(|_| Error::BadArg)?;
                self.steps.push(Step::Close(TAG_MAP, count));
                let pairs = MapIterator::new(term).ok_or(Error::BadArg)?;
                self.steps
                    .extend(pairs.map(|(_, value)| Step::Visit(value)));
                let pairs = MapIterator::new(term).ok_or(Error::BadArg)?;
                self.steps.extend(pairs.map(|(key, _)| Step::Visit(key)));
            }
            TermType::Fun if !is_external_fun(term) => return Err(Error::BadArg),
            _ => self.external(term)?,
        }
        Ok(())
    }

    fn take(&mut self, terms: usize) -> NifResult<()> {
        self.terms_left = self.terms_left.checked_sub(terms).ok_or(Error::BadArg)?;
        Ok(())
    }

    fn rest_of_list(&mut self, rest: Term<'a>, count: u32) -> NifResult<()> {
        match rest.list_get_cell() {
            Ok((head, tail)) => {
                self.take(1)?;
                let count = count.checked_add(1).ok_or(Error::BadArg)?;
                self.steps.push(Step::Rest(tail, count));
                self.steps.push(Step::Visit(head));
            }
            Err(_) => {
                self.steps.push(Step::Close(TAG_LIST, count));
                self.steps.push(Step::Visit(rest));
            }
        }
        Ok(())
    }

    fn close(&mut self, tag: u8, count: u32) {
        self.out.push(tag);
        self.out.extend_from_slice(&count.to_le_bytes());
    }

    fn counted(&mut self, tag: u8, bytes: &[u8]) -> NifResult<()> {
        if bytes.len() > self.max_bytes {
            return Err(Error::BadArg);
        }
        let count = u32::try_from(bytes.len()).map_err(|_| Error::BadArg)?;
        self.out.push(tag);
        self.out.extend_from_slice(&count.to_le_bytes());
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    fn external(&mut self, term: Term<'_>) -> NifResult<()> {
        self.take(TERMS_PER_EXTERNAL)?;
        self.counted(TAG_EXTERNAL, &term.to_binary())
    }
}

/// The term that [`encode`] was given.
pub(crate) fn decode<'a>(env: Env<'a>, mut bytes: &[u8]) -> NifResult<Term<'a>> {
    let mut stack: Vec<Term<'a>> = Vec::new();
    let node = OnceCell::new();
    while let Some((&tag, rest)) = bytes.split_first() {
        bytes = rest;
        let term = match tag {
            TAG_ATOM | TAG_PID => {
                let word = take(&mut bytes)?;
                // SAFETY: written by `encode` from an atom or a local pid; both are immediate.
                unsafe { immediate::term(env, u64::from_le_bytes(word)) }
            }
            TAG_BINARY => binary(env, take_counted(&mut bytes)?),
            TAG_BYTE => take::<1>(&mut bytes)?[0].encode(env),
            TAG_INTEGER => i64::from_le_bytes(take(&mut bytes)?).encode(env),
            TAG_FLOAT => f64::from_bits(u64::from_le_bytes(take(&mut bytes)?)).encode(env),
            TAG_REFERENCE => {
                let numbers = take_counted(&mut bytes)?;
                let node = node.get_or_init(|| ThisNode::of(env));
                let encoded = node.as_ref().ok_or(Error::BadArg)?.reference(numbers);
                env.binary_to_term(&encoded).ok_or(Error::BadArg)?.0
            }
            TAG_NIL => Term::list_new_empty(env),
            TAG_LIST => {
                let tail = stack.pop().ok_or(Error::BadArg)?;
                let (first, elements) = top(&stack, take_count(&mut bytes)?)?;
                let elements = elements.iter().rev();
                let list = elements.fold(tail, |list, element| list.list_prepend(*element));
                stack.truncate(first);
                list
            }
            TAG_TUPLE => {
                let (first, elements) = top(&stack, take_count(&mut bytes)?)?;
                let tuple = make_tuple(env, elements);
                stack.truncate(first);
                tuple
            }
            TAG_MAP => {
                let count = take_count(&mut bytes)?;
                let (first, elements) = top(&stack, 2 * count)?;
                let (keys, values) = elements.split_at(count);
                let map = Term::map_from_term_arrays(env, keys, values)?;
                stack.truncate(first);
                map
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

/// The index of the first of the last `count` terms, and these terms.
fn top<'s, 'a>(stack: &'s [Term<'a>], count: usize) -> NifResult<(usize, &'s [Term<'a>])> {
    let first = stack.len().checked_sub(count).ok_or(Error::BadArg)?;
    Ok((first, &stack[first..]))
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

/// Whether `0.0 =:= -0.0` in this VM.
fn zeros_are_equal(env: Env<'_>) -> bool {
    static EQUAL: OnceBool = OnceBool::new();
    EQUAL.get_or_init(|| 0.0.encode(env) == (-0.0).encode(env))
}

/// Whether a fun is a `fun M:F/A`, which captures nothing.
///
/// The NIF API offers no other test: it prints a fun that was made in a function as `#Fun<...>`, without
/// its captured values.
fn is_external_fun(fun: Term<'_>) -> bool {
    format!("{fun:?}").starts_with("fun ")
}

// ---- References of this node ----
//
// In the external format: 131, 90, number of 32-bit words, node name as an atom, creation (4
// bytes), the words. A pid: 131, 88, node name, id (4), serial (4), creation (4).

const NEWER_REFERENCE_EXT: u8 = 90;
const NEW_PID_EXT: u8 = 88;

/// This node's name (an encoded atom) and creation.
struct ThisNode {
    name: Vec<u8>,
    creation: [u8; 4],
}

impl ThisNode {
    /// Read from the pid of the calling process.
    fn of(env: Env<'_>) -> Option<Self> {
        let encoded = env.pid().encode(env).to_binary();
        let rest = encoded.strip_prefix(&[131, NEW_PID_EXT])?;
        let (rest, creation) = rest.split_last_chunk::<4>()?;
        let (name, _id_and_serial) = rest.split_last_chunk::<8>()?;
        Some(Self {
            name: name.to_vec(),
            creation: *creation,
        })
    }

    /// The words of an encoded reference, if it belongs to this node.
    fn numbers_of<'b>(&self, encoded: &'b [u8]) -> Option<&'b [u8]> {
        let rest = encoded.strip_prefix(&[131, NEWER_REFERENCE_EXT])?;
        let (_words, rest) = rest.split_first_chunk::<2>()?;
        let rest = rest.strip_prefix(self.name.as_slice())?;
        rest.strip_prefix(&self.creation)
    }

    /// The encoded reference of these words.
    fn reference(&self, numbers: &[u8]) -> Vec<u8> {
        let words = (numbers.len() / 4) as u16;
        let mut encoded = vec![131, NEWER_REFERENCE_EXT];
        encoded.extend_from_slice(&words.to_be_bytes());
        encoded.extend_from_slice(&self.name);
        encoded.extend_from_slice(&self.creation);
        encoded.extend_from_slice(numbers);
        encoded
    }
}
