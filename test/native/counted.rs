//! Messages of a message store for tests: any value, with the bytes that it counts.

use std::ops::ControlFlow;

use erlmcp_core::message_store::{Bytes, MessageStore};

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Counted<T>(pub(crate) T, pub(crate) u64);

impl<T> Bytes for Counted<T> {
    fn bytes(&self) -> u64 {
        self.1
    }
}

/// Up to `max` values, and whether the store was found empty.
pub(crate) fn drained<T>(store: &MessageStore<Counted<T>>, max: usize) -> (Vec<T>, bool) {
    let mut values = Vec::new();
    let is_empty = store.drain(max, |Counted(value, _)| {
        values.push(value);
        ControlFlow::Continue(())
    });
    (values, is_empty)
}
