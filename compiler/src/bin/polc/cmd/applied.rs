//! Applied policies as the commands that read them back and watch them find them.

use polc_backend_ebpf::manifest::{CounterKind, CounterSlot, Manifest};
use polc_ir::hook::Hook;
use polc_loader::Error;
use polc_loader::status::{self, Open};
use polc_loader::sys::Sys;

use super::live;
use crate::cli::SlotArgs;
use crate::failure::Failure;
use crate::output::Output;

/// Opens the policies that options name; there may be none. Slots whose device is gone are remarked upon.
pub(super) fn open_all(sys: &Sys, args: &SlotArgs, output: &Output) -> Result<Vec<Open>, Failure> {
    let store = live::store(&args.store)?;
    let mut opened = Vec::new();
    for slot in live::slots(sys, args)? {
        match status::open(sys, &store, &slot) {
            Err(Error::NotApplied(_)) => {
                output.remark(&format!(
                    "{slot}: nothing is attached any more; `polc flush` removes what is left\n"
                ));
            }
            result => opened.push(result?),
        }
    }
    Ok(opened)
}

/// The same; that there is none is a failure.
pub(super) fn open_some(sys: &Sys, args: &SlotArgs, output: &Output) -> Result<Vec<Open>, Failure> {
    let opened = open_all(sys, args, output)?;
    if opened.is_empty() { Err(live::nothing(args)) } else { Ok(opened) }
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
