//! Lowering of targets to actions.

use polc_ir::entities::Chain;
use polc_ir::ruleset::{Action, Opaque};

use crate::ast::{ChainIndex, TargetVerdict};
use crate::extension::Meaning;

/// The action of a target; `chains` holds the IR's chain for each of the table's.
pub(super) fn lower(verdict: &TargetVerdict, chains: &[Option<Chain>]) -> Action {
    let chain = |index: &ChainIndex| {
        // The parser refuses jumps to chains that `-X` has removed.
        chains[index.0 as usize].expect("a jump leads to a chain that exists")
    };
    match verdict {
        TargetVerdict::Continue => Action::Continue,
        TargetVerdict::Accept => Action::Accept,
        TargetVerdict::Drop => Action::Drop,
        TargetVerdict::Return => Action::Return,
        TargetVerdict::Queue => Action::Steal(Opaque {
            name: "QUEUE".into(),
            reason: "hands the packet to a program in user space".into(),
            observable: true,
        }),
        TargetVerdict::Jump(index) => Action::Jump(chain(index)),
        TargetVerdict::Goto(index) => Action::Goto(chain(index)),
        TargetVerdict::Extension(options) => match options.extension.meaning {
            Meaning::Target(action) => action(options),
            Meaning::Match(_) => unreachable!("the parser looks targets up among targets"),
        },
    }
}
