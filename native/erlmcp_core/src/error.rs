//! The errors of this crate, as values.

use std::fmt;

/// Why a registration was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegisterError {
    /// The id is registered already. `address` is that of the present registration.
    AlreadyRegistered {
        /// The address of the present registration.
        address: u64,
    },
    /// The registry holds `max_entries` registrations, those under way included.
    RegistryFull,
    /// The registry is closed for this namespace: its owner is exiting.
    Closed,
}

/// Why a binding was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BindError {
    /// No such server is registered.
    ServerNotFound,
    /// No such transport is registered.
    TransportNotFound,
}

/// Limits that are out of bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitsError {
    /// `shards` is not a power of two from 1 to 1024.
    Shards(u64),
    /// `max_entries` is not within 1 to 2^28.
    MaxEntries(u64),
    /// `max_id_bytes` is not within 1 to 16 MiB.
    MaxIdBytes(u64),
}

impl fmt::Display for RegisterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlreadyRegistered { .. } => f.write_str("the id is already registered"),
            Self::RegistryFull => f.write_str("the registry holds max_entries registrations"),
            Self::Closed => f.write_str("the registry is closed"),
        }
    }
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ServerNotFound => "no such server is registered",
            Self::TransportNotFound => "no such transport is registered",
        })
    }
}

impl fmt::Display for LimitsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shards(n) => write!(f, "shards: {n} is not a power of two from 1 to 1024"),
            Self::MaxEntries(n) => write!(f, "max_entries: {n} is not within 1 to 2^28"),
            Self::MaxIdBytes(n) => write!(f, "max_id_bytes: {n} is not within 1 to 2^24"),
        }
    }
}

impl std::error::Error for RegisterError {}
impl std::error::Error for BindError {}
impl std::error::Error for LimitsError {}
