//! The elements of tuples of any size; the size may be untrusted.

use std::mem::MaybeUninit;

use rustler::Term;
use rustler::sys::{ErlNifTerm, enif_get_tuple};

/// The elements of a tuple, if `term` is one and has at most `max` of them.
pub(crate) fn tuple_elements<'a>(
    term: Term<'a>,
    max: usize,
) -> Option<impl ExactSizeIterator<Item = Term<'a>> + DoubleEndedIterator> {
    let elements = raw_elements(term).filter(|elements| elements.len() <= max)?;
    Some(elements.iter().map(move |element| {
        // SAFETY: the elements of a tuple belong to its environment.
        unsafe { Term::new(term.get_env(), *element) }
    }))
}

/// The elements of a pair, if `term` is one.
#[inline]
pub(crate) fn pair(term: Term<'_>) -> Option<[Term<'_>; 2]> {
    let elements: [ErlNifTerm; 2] = raw_elements(term)?.try_into().ok()?;
    // SAFETY: the elements of a tuple belong to its environment.
    Some(elements.map(|element| unsafe { Term::new(term.get_env(), element) }))
}

fn raw_elements(term: Term<'_>) -> Option<&[ErlNifTerm]> {
    let env = term.get_env();
    let mut arity = 0;
    let mut elements = MaybeUninit::uninit();
    // SAFETY: the term belongs to its environment; both results are written on success only.
    let elements = unsafe {
        if enif_get_tuple(
            env.as_c_arg(),
            term.as_c_arg(),
            &mut arity,
            elements.as_mut_ptr(),
        ) == 0
        {
            return None;
        }
        elements.assume_init()
    };
    let arity = usize::try_from(arity).ok()?;
    if arity == 0 {
        // The pointer of an empty tuple may be anything, null included.
        return Some(&[]);
    }
    // SAFETY: `elements` points at `arity` terms, which live as long as the environment.
    Some(unsafe { std::slice::from_raw_parts(elements, arity) })
}
