//! What the maps hold: keys that carry their hash and their place, and the entries of the three
//! namespaces.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use papaya::Equivalent;

use super::Namespace;
use super::bindings::{Binding, Group};

/// An identifier as a caller gives it: bytes, and what kind of thing they encode. Two ids are the
/// same exactly if both are equal. Made by [`super::Registry::id`], for that registry alone.
#[derive(Clone, Copy)]
pub struct Id<'a> {
    pub(super) hash: u64,
    pub(super) kind: u8,
    pub(super) bytes: &'a [u8],
}

impl<'a> Id<'a> {
    /// What the bytes encode, as given to [`super::Registry::id`].
    pub fn kind(&self) -> u8 {
        self.kind
    }

    /// The bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

impl fmt::Debug for Id<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Id({}, {} bytes)", self.kind, self.bytes.len())
    }
}

/// Where an entry stands in its registry. Together with its lease it says exactly which
/// registration is meant, also when the id has been registered anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    pub(super) hash: u64,
    pub(super) slot: u32,
    pub(super) shard: u16,
    pub(super) namespace: Namespace,
}

impl Location {
    /// The namespace that the entry was registered in.
    pub fn namespace(&self) -> Namespace {
        self.namespace
    }

    /// The shard that the entry was registered in.
    pub fn shard(&self) -> u16 {
        self.shard
    }
}

/// Ids of up to this many bytes need no allocation of their own and no further cache line.
const INLINE_BYTES: usize = 30;

enum KeyBytes {
    Inline { len: u8, bytes: [u8; INLINE_BYTES] },
    Boxed(Box<[u8]>),
}

impl KeyBytes {
    fn new(bytes: &[u8]) -> Self {
        if bytes.len() <= INLINE_BYTES {
            let mut inline = [0; INLINE_BYTES];
            inline[..bytes.len()].copy_from_slice(bytes);
            Self::Inline {
                len: bytes.len() as u8,
                bytes: inline,
            }
        } else {
            Self::Boxed(bytes.into())
        }
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Inline { len, bytes } => &bytes[..usize::from(*len)],
            Self::Boxed(bytes) => bytes,
        }
    }
}

/// The slot of a key that is in no shard's list.
const NO_SLOT: u32 = u32::MAX;

/// An owned id with its place. Equality is that of the id.
pub(super) struct Key {
    hash: u64,
    slot: u32,
    shard: u16,
    kind: u8,
    namespace: Namespace,
    bytes: KeyBytes,
}

impl Key {
    pub(super) fn new(id: Id<'_>, location: Location) -> Self {
        Self {
            hash: id.hash,
            slot: location.slot,
            shard: location.shard,
            kind: id.kind,
            namespace: location.namespace,
            bytes: KeyBytes::new(id.bytes),
        }
    }

    /// A key for a server id that is not registered.
    pub(super) fn without_location(id: Id<'_>) -> Self {
        Self::new(
            id,
            Location {
                hash: id.hash,
                slot: NO_SLOT,
                shard: 0,
                namespace: Namespace::Server,
            },
        )
    }

    pub(super) fn id(&self) -> Id<'_> {
        Id {
            hash: self.hash,
            kind: self.kind,
            bytes: self.bytes.as_slice(),
        }
    }

    pub(super) fn location(&self) -> Location {
        Location {
            hash: self.hash,
            slot: self.slot,
            shard: self.shard,
            namespace: self.namespace,
        }
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        other.id().equivalent(self)
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl Equivalent<Key> for Id<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        self.hash == key.hash && self.kind == key.kind && self.bytes == key.bytes.as_slice()
    }
}

impl Hash for Id<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl Equivalent<Key> for Location {
    fn equivalent(&self, key: &Key) -> bool {
        self.hash == key.hash && self.slot == key.slot && self.shard == key.shard
    }
}

impl Hash for Location {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// One registration: where messages go, and the lease that its caller attached.
#[derive(Debug, Clone)]
pub struct Entry<L> {
    /// Where messages go; the registry gives it no meaning.
    pub address: u64,
    /// What the caller attached. Equality of leases is identity of registrations.
    pub lease: L,
}

/// A server id: registered, or only named by automatic bindings ("dangling").
///
/// Transitions, each one exchange in the map:
///
/// ```text
/// absent ─► Dangling(g, 1) ─► Dangling(g, n ± 1) ─► absent (at 0)
///                └──────────────► Registered(g) ─► absent
/// absent ───────────────────────► Registered(g)
/// ```
///
/// A group never comes back once it has left the map, and Registered never turns into Dangling.
pub(super) enum Server<L> {
    /// `bound` automatic bindings keep the id in the map.
    Dangling {
        group: Arc<Group>,
        bound: u64,
    },
    Registered {
        group: Arc<Group>,
        entry: Entry<L>,
    },
}

impl<L> Server<L> {
    pub(super) fn group(&self) -> &Arc<Group> {
        match self {
            Self::Dangling { group, .. } | Self::Registered { group, .. } => group,
        }
    }

    pub(super) fn entry(&self) -> Option<&Entry<L>> {
        match self {
            Self::Dangling { .. } => None,
            Self::Registered { entry, .. } => Some(entry),
        }
    }
}

/// A registered transport with its binding: one value in one map, so that no binding can outlive
/// its transport.
#[derive(Clone)]
pub(super) struct Transport<L> {
    pub(super) entry: Entry<L>,
    pub(super) binding: Binding,
}
