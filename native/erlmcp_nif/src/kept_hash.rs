//! A hasher for keys that store their hash.
//!
//! The owner of the map computes the hash once per operation, keyed at random. It is stored in the key,
//! so that a resize touches no key's content.

use std::hash::{BuildHasher, Hasher};

/// Passes on the one `u64` that a key writes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct KeptHash(u64);

impl BuildHasher for KeptHash {
    type Hasher = Self;

    fn build_hasher(&self) -> Self {
        Self::default()
    }
}

impl Hasher for KeptHash {
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("keys write one u64");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
