//! Groups of processes: members, and one of them.

use erlmcp_core::registry::{Id, MemberId, Pick, Search, TooSparse};
use rustler::{Encoder, Env, Error, LocalPid, NifResult, Term};

use super::{
    MAX_LISTED_ON_NORMAL_SCHEDULER, MAX_WALKED_ON_NORMAL_SCHEDULER, as_id, encode_id, is_alive,
    pid_term,
};
use crate::atoms;
use crate::encoding::{self, Zeros};
use crate::id;
use crate::immediate;
use crate::reschedule::{Outcome, Scheduler, Stopped, reschedulable};
use crate::resource::{Registry, registry};

/// The id of the membership of a process. A local pid is its word; no other pid has an encoding of 8 bytes.
pub(super) fn member_id(group: &Id<'_>, pid: Term<'_>) -> NifResult<MemberId> {
    let id = if pid.decode::<LocalPid>().is_ok() {
        MemberId::new(group, &immediate::word(pid).to_le_bytes())
    } else {
        let encoded = encoding::encode(pid, usize::from(u16::MAX), Zeros::Exact)?;
        MemberId::new(group, &encoded)
    };
    id.ok_or(Error::BadArg)
}

/// `round_robin`, `random`, or a list of the key.
pub(crate) fn pick_of(registry: &Registry, term: Term<'_>) -> NifResult<Pick> {
    if atoms::round_robin() == term {
        return Ok(Pick::RoundRobin);
    }
    if atoms::random() == term {
        return Ok(Pick::Random);
    }
    let (key, rest) = term.list_get_cell().map_err(|_| Error::BadArg)?;
    if !rest.is_empty_list() {
        return Err(Error::BadArg);
    }
    id::with(registry, key, |key| Pick::Keyed(key.keyed_hash())).ok_or(Error::BadArg)
}

/// The result of `found`, which searches for a member.
pub(crate) fn searched<'a>(
    scheduler: Scheduler,
    pick: Pick,
    found: impl FnOnce(Search) -> Result<Term<'a>, TooSparse>,
) -> Outcome<'a> {
    let most_places = match scheduler {
        Scheduler::Normal => MAX_WALKED_ON_NORMAL_SCHEDULER as u32,
        Scheduler::Dirty => u32::MAX,
    };
    found(Search { pick, most_places }).map_err(|TooSparse| Stopped::TooHeavy)
}

fn group_members<'a>(
    env: Env<'a>,
    [of, group]: [Term<'a>; 2],
    scheduler: Scheduler,
) -> Outcome<'a> {
    let registry = registry(of)?;
    let encoded = encode_id(registry, group)?;
    let group = as_id(registry, &encoded);
    if u64::from(registry.group_high_water(&group)) > MAX_LISTED_ON_NORMAL_SCHEDULER {
        scheduler.require_dirty()?;
    }
    let mut pids = Term::list_new_empty(env);
    registry.for_each_member(&group, |entry| {
        if is_alive(env, entry) {
            pids = pids.list_prepend(pid_term(env, entry));
        }
    });
    Ok(pids)
}

reschedulable!(c"group_members", 2, group_members);

fn pick_member<'a>(
    env: Env<'a>,
    [of, group, pick]: [Term<'a>; 3],
    scheduler: Scheduler,
) -> Outcome<'a> {
    let registry = registry(of)?;
    let encoded = encode_id(registry, group)?;
    let group = as_id(registry, &encoded);
    let pick = pick_of(registry, pick)?;
    searched(scheduler, pick, |search| {
        let picked = registry.pick(
            &group,
            search,
            |entry| is_alive(env, entry),
            |entry| pid_term(env, entry),
        )?;
        Ok(picked.unwrap_or_else(|| atoms::undefined().encode(env)))
    })
}

reschedulable!(c"pick_member", 3, pick_member);

#[rustler::nif]
fn group_count(of: Term<'_>, group: Term<'_>) -> NifResult<u64> {
    let registry = registry(of)?;
    let encoded = encode_id(registry, group)?;
    Ok(registry.group_count(&as_id(registry, &encoded)))
}
