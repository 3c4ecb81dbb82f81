//! Tuples of any size, without trust in the size.

use std::mem::MaybeUninit;

use rustler::Term;
use rustler::sys::enif_get_tuple;

/// The elements of a tuple, if `term` is one and has at most `max` of them.
pub(crate) fn tuple_elements(term: Term<'_>, max: usize) -> Option<Vec<Term<'_>>> {
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
    if arity > max {
        return None;
    }
    // SAFETY: `elements` points at `arity` terms of the same environment. An empty tuple may come
    // with any pointer and is not read.
    Some(
        (0..arity)
            .map(|n| unsafe { Term::new(env, *elements.add(n)) })
            .collect(),
    )
}
