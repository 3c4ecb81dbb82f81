//! The weight of a term: how much work it is to keep it.

use rustler::{Binary, LocalPid, MapIterator, Term, TermType};

use crate::reschedule::Scheduler;
use crate::tuple::tuple_elements;

/// Bytes of a binary that weigh as much as one more term.
pub(crate) const BYTES_PER_WEIGHT: usize = 16;

pub(crate) struct Weighed {
    pub(crate) weight: usize,
    /// Made of atoms, numbers, binaries, local pids, lists, tuples and maps only: the encoding
    /// loses nothing of these.
    pub(crate) is_plain: bool,
}

impl Weighed {
    /// Adds a term whose size only its external format tells, with so many bytes of it for each unit of weight.
    fn add_opaque(&mut self, term: Term<'_>, scheduler: Scheduler, bytes: usize) -> Option<()> {
        if scheduler == Scheduler::Normal {
            return None;
        }
        self.is_plain = false;
        self.weight += term.to_binary().len() / bytes;
        Some(())
    }
}

/// Weighs a term, or gives up beyond `max`. The cost is proportional to the smaller of the two.
///
/// Only the external format tells the size of a fun, of a bit string that is not a binary, and of a large integer.
/// It is a copy as large as the term. So a normal scheduler gives up on these terms, and a dirty one makes the
/// copy. A binary that does not begin at a byte boundary is copied by any inspection, and cannot be recognized
/// beforehand: it alone costs in proportion to its size.
pub(crate) fn weigh(term: Term<'_>, max: usize, scheduler: Scheduler) -> Option<Weighed> {
    let mut weighed = Weighed {
        weight: 0,
        is_plain: true,
    };
    // Room for most terms.
    let mut left = Vec::with_capacity(16);
    left.push(term);
    while let Some(term) = left.pop() {
        weighed.weight += 1;
        match term.get_type() {
            TermType::Atom | TermType::Float => {}
            TermType::Integer if term.decode::<i64>().is_ok() => {}
            TermType::Integer => weighed.add_opaque(term, scheduler, BYTES_PER_WEIGHT)?,
            TermType::Binary => match Binary::from_term(term) {
                Ok(binary) => weighed.weight += binary.len() / BYTES_PER_WEIGHT,
                Err(_) => weighed.add_opaque(term, scheduler, BYTES_PER_WEIGHT)?,
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
            // What a fun has captured may have one byte for each term: a list of bytes.
            TermType::Fun | TermType::Unknown => weighed.add_opaque(term, scheduler, 1)?,
        }
        if weighed.weight + left.len() > max {
            return None;
        }
    }
    Some(weighed)
}
