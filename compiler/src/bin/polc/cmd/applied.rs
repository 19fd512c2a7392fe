//! Applied policies as the commands that read them back and watch them find them.

use polc_backend_ebpf::manifest::{Counted, CounterKind, CounterSlot, Manifest};
use polc_ir::hook::Hook;
use polc_loader::Error;
use polc_loader::state::SlotName;
use polc_loader::status::{self, Open};
use polc_loader::sys::Sys;

use super::live;
use crate::cli::SlotArgs;
use crate::failure::Failure;
use crate::output::Output;

/// The policies that options name, as far as they can be opened.
#[derive(Debug, Default)]
pub(super) struct Opened {
    /// Those that can.
    pub policies: Vec<Open>,
    /// Why others can't.
    pub failed: Vec<Failure>,
    /// Which these are.
    pub unread: Vec<SlotName>,
    /// Slots where nothing is attached any more.
    gone: Vec<SlotName>,
}

impl Opened {
    fn new(sys: &Sys, args: &SlotArgs) -> Result<Opened, Failure> {
        let store = live::store(&args.store)?;
        let mut opened = Opened::default();
        for slot in live::slots(sys, args)? {
            match status::open(sys, &store, &slot) {
                Ok(policy) => opened.policies.push(policy),
                Err(Error::NotApplied(_)) => opened.gone.push(slot),
                Err(error) => {
                    opened.failed.push(Failure::at(&slot, error));
                    opened.unread.push(slot);
                }
            }
        }
        Ok(opened)
    }

    /// Whether all of them are what is applied, as they were since the last one was opened, with what rules counted before.
    /// What keeps it from being told keeps nobody from reading.
    pub(super) fn stand(&self, sys: &Sys) -> bool {
        let stands = |open: &Open| open.generation.settled && open.is_attached(sys).unwrap_or(true);
        self.policies.iter().all(stands)
    }
}

/// Opens the policies that options name; there may be none. Slots whose program is gone are remarked upon.
pub(super) fn open_all(sys: &Sys, args: &SlotArgs, output: &Output) -> Result<Opened, Failure> {
    live::take_back_overdue(sys, args, output)?;
    let opened = Opened::new(sys, args)?;
    for slot in &opened.gone {
        output.remark(&format!("{slot}: nothing is attached any more; `polc flush` removes what is left\n"));
    }
    Ok(opened)
}

/// The same; that there is none is a failure.
pub(super) fn open_some(sys: &Sys, args: &SlotArgs, output: &Output) -> Result<Opened, Failure> {
    let mut opened = open_all(sys, args, output)?;
    match opened.failed.pop() {
        None if opened.policies.is_empty() => Err(live::nothing(sys, args)),
        Some(failure) if opened.policies.is_empty() => {
            opened.failed.push(failure);
            live::all_well(opened.failed, output).map(|_| Opened::default())
        }
        failure => {
            opened.failed.extend(failure);
            Ok(opened)
        }
    }
}

/// The policies that options name, over time: opened again only if what is applied changes.
#[derive(Debug, Default)]
pub(super) struct Followed(Opened);

impl Followed {
    /// What is applied now.
    pub(super) fn refresh(&mut self, sys: &Sys, args: &SlotArgs) -> Result<&Opened, Failure> {
        let opened = &self.0;
        let mut same = opened.policies.iter().map(|open| &open.slot).eq(&live::slots(sys, args)?);
        for open in &opened.policies {
            // What keeps it from being told keeps it from being opened again, and none of the others.
            same = same && open.generation.settled && open.is_attached(sys).unwrap_or(false);
        }
        if !same {
            self.0 = Opened::new(sys, args)?;
        }
        Ok(&self.0)
    }
}

/// Whether a counted rule or policy is the user's: guards that polc adds are not.
pub(super) fn is_users(counted: &Counted) -> bool {
    counted.rule != Some(polc::guard::GUARD_NUMBER)
}

/// The hook at which a counter slot's packets are decided, as far as its rules tell: that of the base chain which the
/// deciding rule or policy is in, else that of the last base chain whose rules counted the packet on its way. None for
/// frames that no rule sees.
pub(super) fn hook_of(manifest: &Manifest, slot: &CounterSlot) -> Option<Hook> {
    if matches!(slot.kind, CounterKind::Frame | CounterKind::OnTheWay) {
        return None;
    }
    let base = |chain: &str| manifest.path.iter().copied().find(|hook| hook.chain_name() == chain);
    let counted = || {
        let counted = slot.counts.iter().filter_map(|&index| manifest.counted.get(index as usize));
        let place = |hook: &Hook| manifest.path.iter().position(|other| other == hook);
        counted.filter_map(|counted| base(&counted.chain)).max_by_key(place)
    };
    let only = || match manifest.path.as_slice() {
        [only] => Some(*only),
        _ => None,
    };
    slot.chain.as_deref().and_then(base).or_else(counted).or_else(only)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_is_the_deciding_base_chains() {
        let counted = |chain: &str| Counted { chain: chain.into(), ..Counted::default() };
        let manifest = Manifest {
            path: vec![Hook::Prerouting, Hook::Input],
            counted: vec![counted("PREROUTING"), counted("INPUT"), counted("OWN")],
            ..Manifest::default()
        };
        let slot = |kind, chain: Option<&str>, counts: &[u32]| CounterSlot {
            kind,
            table: None,
            chain: chain.map(str::to_string),
            rule: None,
            file: None,
            line: None,
            text: String::new(),
            verdict: Some("drop".into()),
            counts: counts.to_vec(),
        };
        let of = |slot: &CounterSlot| hook_of(&manifest, slot);
        assert_eq!(of(&slot(CounterKind::Policy, Some("PREROUTING"), &[0])), Some(Hook::Prerouting));
        assert_eq!(of(&slot(CounterKind::Rule, Some("OWN"), &[0, 1, 2])), Some(Hook::Input));
        assert_eq!(of(&slot(CounterKind::Rule, Some("OWN"), &[0, 2])), Some(Hook::Prerouting));
        assert_eq!(of(&slot(CounterKind::Rule, Some("OWN"), &[2])), None);
        assert_eq!(of(&slot(CounterKind::Frame, None, &[])), None);
        let one = Manifest { path: vec![Hook::Forward], ..Manifest::default() };
        assert_eq!(hook_of(&one, &slot(CounterKind::Rule, Some("OWN"), &[])), Some(Hook::Forward));
    }
}
