//! What the maps hold: keys, which include the place of their entry, and the entries of the namespaces.

use std::fmt;
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;

use ahash::{AHasher, RandomState};
use papaya::{Equivalent, Guard, HashMap};

use super::Namespace;
use super::announcements::Phase;
use super::group::{Binding, Group};
use super::process_group::Joined;
use crate::slots::OCCUPIED;
use crate::sync::AtomicU32;
use crate::token_bucket::Level;

/// An identifier as a caller passes it: bytes, and the kind of what they encode. Two ids are the same if and only
/// if both are equal. Created by [`super::Registry::id`], for that registry alone.
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

    /// The hash by which the registry's maps find the id: 63 bits, keyed at random.
    pub fn keyed_hash(&self) -> u64 {
        self.hash
    }
}

impl fmt::Debug for Id<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Id({}, {} bytes)", self.kind, self.bytes.len())
    }
}

/// The place of an entry in its registry, for as long as it is registered. Together with its lease it identifies
/// one registration, even after the place has been given to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    pub(super) slot: u32,
    pub(super) shard: u16,
    pub(super) namespace: Namespace,
}

impl Location {
    /// The namespace that the entry was registered in.
    pub fn namespace(&self) -> Namespace {
        self.namespace
    }

    /// The location in [`Self::BITS`] bits.
    pub fn to_bits(self) -> u64 {
        u64::from(self.slot) << 12 | u64::from(self.shard) << 2 | self.namespace as u64
    }

    /// The location of what [`Self::to_bits`] gave.
    pub fn from_bits(bits: u64) -> Self {
        Self {
            slot: (bits >> 12) as u32,
            shard: (bits >> 2 & 0x3ff) as u16,
            namespace: Namespace::ALL[(bits & 3) as usize % Namespace::COUNT],
        }
    }

    /// Namespaces take 2 bits, shards 10, and slots 29: twice as many as there are entries at most.
    pub const BITS: u32 = 41;
}

/// Ids of up to this many bytes need no allocation and no further cache line.
const INLINE_BYTES: usize = 26;

/// The bytes, and the index of the record that the entry's process is charged in (see [`crate::admission`]). In
/// either variant the index occupies what would otherwise be padding.
enum KeyBytes {
    Inline {
        receiver: AtomicU32,
        len: u8,
        bytes: [u8; INLINE_BYTES],
    },
    Boxed {
        receiver: AtomicU32,
        bytes: Box<[u8]>,
    },
}

/// An entry of the map with the most entries has 72 bytes, for which the allocator uses 80.
#[cfg(all(not(loom), target_pointer_width = "64"))]
const _: () = assert!(size_of::<Key>() == 40);

impl KeyBytes {
    fn new(bytes: &[u8]) -> Self {
        if bytes.len() <= INLINE_BYTES {
            let mut inline = [0; INLINE_BYTES];
            inline[..bytes.len()].copy_from_slice(bytes);
            Self::Inline {
                receiver: AtomicU32::new(0),
                len: bytes.len() as u8,
                bytes: inline,
            }
        } else {
            Self::Boxed {
                receiver: AtomicU32::new(0),
                bytes: bytes.into(),
            }
        }
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Inline { len, bytes, .. } => &bytes[..usize::from(*len)],
            Self::Boxed { bytes, .. } => bytes,
        }
    }

    fn receiver(&self) -> &AtomicU32 {
        match self {
            Self::Inline { receiver, .. } | Self::Boxed { receiver, .. } => receiver,
        }
    }
}

/// Namespaces take 2 bits, shards 10.
const PLACE_BITS: u16 = 0xfff;

/// The two bits above are those of the [`Delivery`].
const DELIVERY_SHIFT: u32 = 12;

/// How the messages of a connection are delivered. A route returns it; it is the caller that delivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Each is sent to the address.
    Single = 0,
    /// Those of one batch that go to the same address may be sent as one.
    Batched = 1,
    /// By what the lease says. No layer has been asked: see [`super::Registry::route_by_lease`].
    ByLease = 2,
}

/// The slot of a key that is in no shard's list.
const NO_SLOT: u32 = u32::MAX;

/// An owned id with its place. Equality is that of the id. The hash is not stored: it would cost as much memory as
/// it saves time, and would be used only when a table grows.
pub(super) struct Key {
    slot: u32,
    /// The lower bits of [`Location::to_bits`], namespace and shard, and the delivery.
    place: u16,
    kind: u8,
    /// Used by connections alone. It occupies what is spared by `place`.
    phase: Phase,
    bytes: KeyBytes,
}

impl Key {
    pub(super) fn new(id: Id<'_>, location: Location) -> Self {
        Self::with_phase(id, location, Phase::new(false))
    }

    pub(super) fn with_phase(id: Id<'_>, location: Location, phase: Phase) -> Self {
        Self {
            slot: location.slot,
            place: location.to_bits() as u16 & PLACE_BITS,
            kind: id.kind,
            phase,
            bytes: KeyBytes::new(id.bytes),
        }
    }

    pub(super) fn with_delivery(self, delivery: Delivery) -> Self {
        let place = self.place & PLACE_BITS | (delivery as u16) << DELIVERY_SHIFT;
        Self { place, ..self }
    }

    /// A key for an id that is not registered: of a server, of a group, or of a target with a breaker.
    pub(super) fn without_location(id: Id<'_>) -> Self {
        Self::new(
            id,
            Location {
                slot: NO_SLOT,
                shard: 0,
                namespace: Namespace::Server,
            },
        )
    }

    pub(super) fn kind(&self) -> u8 {
        self.kind
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    pub(super) fn phase(&self) -> &Phase {
        &self.phase
    }

    pub(super) fn shard(&self) -> u16 {
        self.location().shard
    }

    #[inline]
    pub(super) fn delivery(&self) -> Delivery {
        match self.place >> DELIVERY_SHIFT {
            0 => Delivery::Single,
            1 => Delivery::Batched,
            _ => Delivery::ByLease,
        }
    }

    /// The record's index, which admission control keeps beside the id.
    pub(super) fn receiver(&self) -> &AtomicU32 {
        self.bytes.receiver()
    }

    pub(super) fn location(&self) -> Location {
        Location {
            slot: self.slot,
            ..Location::from_bits(u64::from(self.place))
        }
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind && self.bytes() == other.bytes()
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.bytes());
        state.write_u8(self.kind);
    }
}

impl Equivalent<Key> for Id<'_> {
    #[inline]
    fn equivalent(&self, key: &Key) -> bool {
        self.kind == key.kind && self.bytes == key.bytes()
    }
}

impl Hash for Id<'_> {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// A query for the entry at a place, whatever its id is: finds the id that has this hash. Its key may by now be at
/// another place (see [`Located::is_place_of`]).
///
/// The query must not compare the place itself. While a map is resized, an entry that was copied and then removed
/// is still in the former table and leads on to the next one. The same id, registered anew at another place, is
/// found behind it. A query that accepted the place alone would pass by the entry and end in the former table. No
/// two ids have the same hash but once in millions of full registries (63 bits, keyed at random).
pub(super) struct Located<'a> {
    pub(super) hashing: &'a IdHashing,
    pub(super) hash: u64,
    pub(super) location: Location,
}

impl Located<'_> {
    /// Whether the key that was found has this place.
    pub(super) fn is_place_of(&self, key: &Key) -> bool {
        self.location == key.location()
    }

    /// The entry at the place, in the map of its namespace.
    pub(super) fn find<'g, V>(
        &self,
        map: &'g HashMap<Key, V, IdHashing>,
        guard: &'g impl Guard,
    ) -> Option<(&'g Key, &'g V)> {
        map.get_key_value(self, guard)
            .filter(|(key, _)| self.is_place_of(key))
    }
}

impl Equivalent<Key> for Located<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        self.hash == self.hashing.hash(key.kind, key.bytes())
    }
}

impl Hash for Located<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// The maps' hasher, keyed at random. A query with a known hash (an [`Id`], a [`Located`]) writes it as one `u64`.
/// A [`Key`], which is hashed when a table grows, writes its bytes and its kind.
#[derive(Clone)]
pub(crate) struct IdHashing(RandomState);

pub(crate) enum IdHasher {
    Computing(AHasher),
    Given(u64),
}

impl IdHashing {
    pub(crate) fn new(keys: RandomState) -> Self {
        Self(keys)
    }

    /// The hash of an id, with [`OCCUPIED`] set, so that [`crate::slots`] can store it.
    #[inline(always)]
    pub(crate) fn hash(&self, kind: u8, bytes: &[u8]) -> u64 {
        let mut hasher = self.0.build_hasher();
        hasher.write(bytes);
        hasher.write_u8(kind);
        hasher.finish() | OCCUPIED
    }
}

impl BuildHasher for IdHashing {
    type Hasher = IdHasher;

    #[inline]
    fn build_hasher(&self) -> IdHasher {
        IdHasher::Computing(self.0.build_hasher())
    }
}

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Self::Computing(hasher) = self {
            hasher.write(bytes);
        }
    }

    fn write_u8(&mut self, byte: u8) {
        if let Self::Computing(hasher) = self {
            hasher.write_u8(byte);
        }
    }

    #[inline]
    fn write_u64(&mut self, hash: u64) {
        *self = Self::Given(hash);
    }

    #[inline]
    fn finish(&self) -> u64 {
        match self {
            Self::Computing(hasher) => hasher.finish() | OCCUPIED,
            Self::Given(hash) => *hash,
        }
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
/// Each of these transitions is one compare-and-swap in the map:
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
}

/// A connection with its token bucket.
pub(super) struct Connection<L> {
    pub(super) entry: Entry<L>,
    pub(super) level: Level,
}

/// A registered transport with its binding: one value in one map, so that no binding can outlive
/// its transport.
#[derive(Clone)]
pub(super) struct Transport<L> {
    pub(super) entry: Entry<L>,
    pub(super) binding: Binding,
    /// Allocated apart, since each change of the binding writes the value anew.
    pub(super) level: Arc<Level>,
}

/// A membership of a process in a group.
pub(super) struct Member<L> {
    pub(super) entry: Entry<L>,
    pub(super) joined: Joined,
}
