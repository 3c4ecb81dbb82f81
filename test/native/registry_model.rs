//! The registry against a model of plain maps: random histories on one thread. Every answer and the whole
//! state are compared after every step.
#![cfg(not(loom))]

use std::collections::BTreeMap;

use erlmcp_core::clock::FakeClock;
use erlmcp_core::error::{BindError, LimitsError, RegisterError};
use erlmcp_core::registry::{Delivery, Limits, Namespace, Registry};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    Register(Namespace, u8, Option<u8>),
    Replace(u8),
    Remove(Namespace, u8),
    /// Removal by lease: that of the current registration, or another one.
    RemoveLeased(Namespace, u8, bool),
    Exchange(Namespace, u8),
    Bind(u8, u8, bool),
    Unbind(u8),
    Close,
}

/// One registration: its lease, which is also its address here.
type Lease = u64;

#[derive(Default)]
struct Model {
    entries: BTreeMap<(u8, u8), Lease>,
    bindings: BTreeMap<u8, u8>,
}

const MAX_ENTRIES: u64 = 12;

impl Model {
    fn remove(&mut self, namespace: Namespace, id: u8) -> Option<Lease> {
        let removed = self.entries.remove(&(namespace as u8, id))?;
        match namespace {
            Namespace::Server => self.bindings.retain(|_, server| *server != id),
            Namespace::Transport => {
                self.bindings.remove(&id);
            }
            Namespace::Connection | Namespace::Member => {}
        }
        Some(removed)
    }

    fn has(&self, namespace: Namespace, id: u8) -> bool {
        self.entries.contains_key(&(namespace as u8, id))
    }
}

/// Two ids have the same bytes and differ in kind, and one is too long to be stored inline.
fn id_parts(id: u8) -> (u8, Vec<u8>) {
    match id {
        0 => (1, b"same bytes".to_vec()),
        1 => (2, b"same bytes".to_vec()),
        2 => (1, vec![7; 200]),
        3 => (1, Vec::new()),
        _ => (0, vec![id; 8]),
    }
}

fn namespaces() -> impl Strategy<Value = Namespace> {
    prop::sample::select(Namespace::ALL.to_vec())
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let id = 0..7u8;
    let step = prop_oneof![
        6 => (namespaces(), id.clone(), prop::option::of(id.clone()))
            .prop_map(|(n, i, b)| Step::Register(n, i, b)),
        2 => id.clone().prop_map(Step::Replace),
        3 => (namespaces(), id.clone()).prop_map(|(n, i)| Step::Remove(n, i)),
        2 => (namespaces(), id.clone(), any::<bool>())
            .prop_map(|(n, i, p)| Step::RemoveLeased(n, i, p)),
        2 => (namespaces(), id.clone()).prop_map(|(n, i)| Step::Exchange(n, i)),
        4 => (id.clone(), id.clone(), any::<bool>()).prop_map(|(t, s, m)| Step::Bind(t, s, m)),
        1 => id.prop_map(Step::Unbind),
        1 => Just(Step::Close),
    ];
    prop::collection::vec(step, 1..80)
}

fn compare(registry: &Registry<Lease>, model: &Model) {
    for namespace in Namespace::ALL {
        let mut listed = BTreeMap::new();
        registry.for_each(namespace, |id, entry| {
            let known = (0..7).find(|n| {
                let (kind, bytes) = id_parts(*n);
                kind == id.kind() && bytes == id.bytes()
            });
            let former = listed.insert(known.expect("an id of ours"), entry.address);
            assert_eq!(former, None, "listed twice");
        });
        let expected: BTreeMap<u8, Lease> = model
            .entries
            .iter()
            .filter(|((n, _), _)| *n == namespace as u8)
            .map(|((_, id), address)| (*id, *address))
            .collect();
        assert_eq!(listed, expected);
        assert_eq!(registry.count(namespace), expected.len() as u64);
        for n in 0..7 {
            let (kind, bytes) = id_parts(n);
            let id = registry.id(kind, &bytes);
            assert_eq!(registry.address(namespace, &id), expected.get(&n).copied());
        }
    }
    for n in 0..7 {
        let (kind, bytes) = id_parts(n);
        let id = registry.id(kind, &bytes);
        let bound = registry.bound_server(&id, |server| {
            (0..7).find(|s| id_parts(*s) == (server.kind(), server.bytes().to_vec()))
        });
        assert_eq!(bound.flatten(), model.bindings.get(&n).copied());
        let mut members = Vec::new();
        registry.for_each_bound(&id, |entry| members.push(entry.address));
        members.sort_unstable();
        let mut expected: Vec<Lease> = model
            .bindings
            .iter()
            .filter(|(_, server)| **server == n)
            .map(|(transport, _)| model.entries[&(Namespace::Transport as u8, *transport)])
            .collect();
        expected.sort_unstable();
        assert_eq!(members, expected);
    }
    let dangling = (0..7)
        .filter(|s| !model.has(Namespace::Server, *s) && model.bindings.values().any(|b| b == s));
    assert_eq!(registry.dangling_servers(), dangling.count() as u64);
    let mut of_shards = 0;
    for shard in 0..registry.limits().shards() {
        registry.for_each_connection_of(shard, |_, _| of_shards += 1);
    }
    assert_eq!(of_shards, registry.count(Namespace::Connection));
}

fn run(steps: Vec<Step>) {
    let registry: Registry<Lease> = Registry::new(
        Limits::new(4, MAX_ENTRIES, 1000).unwrap(),
        &FakeClock::at_ns(0),
    );
    let mut model = Model::default();
    let mut locations = BTreeMap::new();
    for (n, step) in steps.into_iter().enumerate() {
        let lease = 100 + n as u64;
        match step {
            Step::Register(namespace, id, bind_to) => {
                let (kind, bytes) = id_parts(id);
                let server = bind_to.map(id_parts);
                let server = server.as_ref().map(|(kind, b)| registry.id(*kind, b));
                let mut location = None;
                let result = registry.register(
                    namespace,
                    registry.id(kind, &bytes),
                    u16::from(id % 4),
                    lease,
                    server,
                    |at| {
                        location = Some(at);
                        lease
                    },
                );
                let key = (namespace as u8, id);
                if let Some(address) = model.entries.get(&key) {
                    let taken = RegisterError::AlreadyRegistered { address: *address };
                    assert_eq!(result, Err(taken));
                } else if model.entries.len() as u64 == MAX_ENTRIES {
                    assert_eq!(result, Err(RegisterError::RegistryFull));
                } else {
                    assert_eq!(result, Ok(()));
                    model.entries.insert(key, lease);
                    locations.insert(key, (location.expect("a location"), lease));
                    if let (Namespace::Transport, Some(server)) = (namespace, bind_to) {
                        model.bindings.insert(id, server);
                    }
                }
            }
            Step::Replace(id) => {
                let (kind, bytes) = id_parts(id);
                let mut location = None;
                let shard = u16::from(id % 4);
                let replaced =
                    registry.replace_connection(registry.id(kind, &bytes), shard, lease, |at| {
                        location = Some(at);
                        lease
                    });
                let key = (Namespace::Connection as u8, id);
                let is_full = model.entries.len() as u64 == MAX_ENTRIES;
                if is_full && !model.entries.contains_key(&key) {
                    assert_eq!(replaced.map(|_| ()), Err(RegisterError::RegistryFull));
                } else {
                    let former = replaced.unwrap().map(|entry| entry.lease);
                    assert_eq!(former, model.entries.insert(key, lease));
                    locations.insert(key, (location.expect("a location"), lease));
                }
            }
            Step::Remove(namespace, id) => {
                let (kind, bytes) = id_parts(id);
                let removed = registry.remove(namespace, &registry.id(kind, &bytes));
                assert_eq!(removed.map(|e| e.lease), model.remove(namespace, id));
            }
            Step::RemoveLeased(namespace, id, present) => {
                let Some((location, lease)) = locations.get(&(namespace as u8, id)) else {
                    continue;
                };
                let lease = if present { *lease } else { 1 };
                let removed = registry.remove_leased(location, 0, |held| *held == lease);
                let is_held = model.entries.get(&(namespace as u8, id)) == Some(&lease);
                assert_eq!(removed.is_some(), is_held);
                if is_held {
                    model.remove(namespace, id);
                }
            }
            Step::Exchange(namespace, id) => {
                let (kind, bytes) = id_parts(id);
                let (key, entry_id) = ((namespace as u8, id), registry.id(kind, &bytes));
                if let Some((_, former)) = locations.get(&key).copied() {
                    let can_change = matches!(namespace, Namespace::Server | Namespace::Connection);
                    let is_held = can_change
                        && model.has(namespace, id)
                        && registry.entry(namespace, &entry_id).unwrap().lease == former;
                    let exchanged = registry.exchange_lease(
                        namespace,
                        &entry_id,
                        |held| *held == former,
                        former,
                        Delivery::Single,
                    );
                    assert_eq!(exchanged, is_held.then_some(former));
                    let other = registry.exchange_lease(
                        namespace,
                        &entry_id,
                        |held| *held == 1,
                        1,
                        Delivery::Single,
                    );
                    assert_eq!(other, None);
                }
            }
            Step::Bind(transport, server, must_exist) => {
                let (kind, bytes) = id_parts(transport);
                let (server_kind, server_bytes) = id_parts(server);
                let result = registry.bind(
                    &registry.id(kind, &bytes),
                    registry.id(server_kind, &server_bytes),
                    must_exist,
                );
                if must_exist && !model.has(Namespace::Server, server) {
                    assert_eq!(result, Err(BindError::ServerNotFound));
                } else if !model.has(Namespace::Transport, transport) {
                    assert_eq!(result, Err(BindError::TransportNotFound));
                } else {
                    assert_eq!(result, Ok(()));
                    model.bindings.insert(transport, server);
                }
            }
            Step::Unbind(transport) => {
                let (kind, bytes) = id_parts(transport);
                let is_registered = registry.unbind(&registry.id(kind, &bytes));
                assert_eq!(is_registered, model.has(Namespace::Transport, transport));
                model.bindings.remove(&transport);
            }
            Step::Close => {
                registry.close(|_| {});
                let (kind, bytes) = id_parts(0);
                let id = registry.id(kind, &bytes);
                let refused = registry.register(Namespace::Server, id, 0, 1, None, |_| 1);
                assert_eq!(refused, Err(RegisterError::Closed));
                registry.open();
                model.bindings.clear();
                model
                    .entries
                    .retain(|(n, _), _| *n >= Namespace::Connection as u8);
            }
        }
        compare(&registry, &model);
        for (key, (location, lease)) in &locations {
            // A place may have been given to another entry since.
            let found = registry.with_entry_at(*location, |_, entry| entry.lease);
            let is_held = model.entries.get(key) == Some(lease);
            assert_eq!(found == Some(*lease), is_held);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 500 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn behaves_like_plain_maps(steps in steps()) {
        run(steps);
    }
}

#[test]
fn limits_name_what_is_wrong() {
    assert_eq!(Limits::new(3, 1, 1), Err(LimitsError::Shards(3)));
    assert_eq!(Limits::new(0, 1, 1), Err(LimitsError::Shards(0)));
    assert_eq!(Limits::new(2048, 1, 1), Err(LimitsError::Shards(2048)));
    assert_eq!(Limits::new(1, 0, 1), Err(LimitsError::MaxEntries(0)));
    assert_eq!(Limits::new(1, 1, 0), Err(LimitsError::MaxIdBytes(0)));
    assert!(
        LimitsError::Shards(3)
            .to_string()
            .contains("3 is not a power of two")
    );
}
