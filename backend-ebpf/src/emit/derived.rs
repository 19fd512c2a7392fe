//! Derived words: fields that take more than a load, computed before the first stage.
//!
//! Set membership and address types are decided by stages, which write their words; they start as 0. The rest is read
//! from the packet here.

use polc_ir::derived::DerivedData;
use polc_ir::diag::Diagnostic;
use polc_ir::field::Field;

use super::{DERIVED_TOO_LARGE, Emitter};

impl Emitter<'_> {
    pub(super) fn derived(&mut self) {
        for slot in &self.plan.key {
            let Field::Derived(derived) = slot.field else { continue };
            match self.plan.derived.get(derived) {
                Some(DerivedData::Member { .. } | DerivedData::AddressType { .. }) | None => {}
                Some(_) => {
                    let message = format!("{derived} takes more than a program can search a packet for");
                    self.diagnostics.push(Diagnostic::error(DERIVED_TOO_LARGE, message, None));
                }
            }
        }
    }
}
