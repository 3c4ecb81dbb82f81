//! Announcements of connections, for the process that reads them and sends events to subscribers.
//!
//! A registry has one reader, which is woken by `{announced, Number}` with the number of the registry. The message is
//! sent by the native call, or the `down` callback, whose change is the first one that the reader has not read.

use std::ops::ControlFlow;

use erlmcp_core::registry::{Announcement, Change, Interest};
use rustler::{Atom, Encoder, Env, Error, NifResult, Term};

use crate::atoms;
use crate::config::MAX_WEIGHT_ON_NORMAL_SCHEDULER;
use crate::id;
use crate::registry::{as_id, encode_id, pid_term, shard_number};
use crate::reschedule::{Outcome, Scheduler, Stopped, reschedulable};
use crate::resource::registry;
use crate::watch::Lease;

/// Announcements that one call reads at most, in some 100 microseconds.
const MAX_READ: usize = 256;

/// The calling process is the reader of a registry from now on. Returns the number of the registry.
#[rustler::nif]
fn announcements_attach<'a>(env: Env<'a>, of: Term<'a>) -> NifResult<u32> {
    let registry = registry(of)?;
    registry.set_reader(env);
    Ok(registry.number())
}

/// If the calling process is the reader of a registry, the registry has no reader and no interest any more. Otherwise nothing
/// changes: a process that is killed goes on here, while its successor may be the reader already.
#[rustler::nif(schedule = "DirtyCpu")]
fn announcements_detach<'a>(env: Env<'a>, of: Term<'a>) -> NifResult<Atom> {
    let registry = registry(of)?;
    if registry.unset_reader(env) {
        registry.announcements().clear();
    }
    Ok(atoms::ok())
}

/// Sets or clears an interest. Returns the position at which its announcements begin.
fn set<'a>(
    env: Env<'a>,
    [of, interest, is_on]: [Term<'a>; 3],
    scheduler: Scheduler,
) -> Outcome<'a> {
    let registry = registry(of)?;
    let is_on: bool = is_on.decode()?;
    let set = |interest| {
        if !registry.announcements().is_allocated() {
            scheduler.require_dirty()?;
        }
        let position = registry.announcements().set(interest, is_on);
        Ok(position.encode(env))
    };
    if atoms::all() == interest {
        return set(Interest::All);
    }
    let (kind, what) = interest.decode::<(Term<'a>, Term<'a>)>()?;
    if atoms::shard() == kind {
        set(Interest::Shard(shard_number(registry, what)?))
    } else if atoms::id() == kind {
        let encoded = encode_id(registry, what)?;
        let id = as_id(registry, &encoded);
        if is_on && registry.announcements().is_churned(&id) {
            scheduler.require_dirty()?;
            registry.announcements().complete_resize();
        }
        set(Interest::Id(id))
    } else {
        Err(Error::BadArg.into())
    }
}

reschedulable!(c"announcements_set", 3, set);

/// The number of interests that are set.
#[rustler::nif]
fn announcements_interests(of: Term<'_>) -> NifResult<u32> {
    Ok(registry(of)?.announcements().interests())
}

/// Reads the next announcements before a position: `{Events, Lost, Position, HasMore}`.
fn read<'a>(env: Env<'a>, [of, until]: [Term<'a>; 2], scheduler: Scheduler) -> Outcome<'a> {
    let registry = registry(of)?;
    let until = if atoms::infinity() == until {
        u64::MAX
    } else {
        until.decode()?
    };
    let (mut events, mut weight) = (Vec::new(), 0_usize);
    let mut is_too_heavy = false;
    let progress = registry
        .announcements()
        .read(MAX_READ, until, |announcement| {
            weight = weight.saturating_add(id::weight(announcement.kind, &announcement.bytes));
            if weight > MAX_WEIGHT_ON_NORMAL_SCHEDULER {
                // At least one a call.
                is_too_heavy = events.is_empty() && scheduler == Scheduler::Normal;
                if is_too_heavy || !events.is_empty() {
                    return ControlFlow::Break(());
                }
            }
            // The registry's own encoding.
            events.extend(event(env, announcement));
            ControlFlow::Continue(())
        });
    let Some(progress) = progress else {
        // Another process is reading.
        let none: [Term<'a>; 0] = [];
        return Ok((none.as_slice(), 0, 0, true).encode(env));
    };
    // Losses are reported once, so a call that has them must not start again.
    if is_too_heavy && progress.lost == 0 {
        return Err(Stopped::TooHeavy);
    }
    Ok((events, progress.lost, progress.position, progress.has_more).encode(env))
}

reschedulable!(c"announcements_read", 2, read);

fn event<'a>(env: Env<'a>, announcement: &Announcement<Lease>) -> NifResult<Term<'a>> {
    let change = match announcement.change {
        Change::Joined => atoms::joined(),
        Change::Left => atoms::left(),
    };
    let id = id::decode(env, announcement.kind, &announcement.bytes)?;
    let pid = pid_term(env, &announcement.entry);
    Ok((change, id, pid, announcement.shard).encode(env))
}
