//! Immediate terms as numbers: atoms, the empty list and local pids are one word, the same in every environment.

use std::mem::transmute;

use rustler::sys::ErlNifTerm;
use rustler::{Env, Term};

/// The word of a term. It means something outside the term's environment only if the term is
/// immediate.
#[inline]
pub(crate) fn word(term: Term<'_>) -> u64 {
    // SAFETY: `ErlNifTerm` is a transparent wrapper of `usize`.
    unsafe { transmute::<ErlNifTerm, usize>(term.as_c_arg()) as u64 }
}

/// The immediate term of a word.
///
/// # Safety
///
/// `word` must be what [`word`] gave for an atom, the empty list or a local pid.
#[inline]
pub(crate) unsafe fn term(env: Env<'_>, word: u64) -> Term<'_> {
    // SAFETY: `ErlNifTerm` is a transparent wrapper of `usize`; immediate terms belong to every
    // environment.
    unsafe { Term::new(env, transmute::<usize, ErlNifTerm>(word as usize)) }
}
