//! `-m state`: the state of the connection a packet belongs to; the older, smaller form of `-m conntrack --ctstate`.

use super::conntrack::{States, parse_states};
use crate::ast::Given;
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Printer, Spec};

/// The options of `-m state`.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// `--state`.
    pub states: Given<States>,
}

const STATE: u8 = 0;

/// `--state` knows the first five states, not SNAT and DNAT.
const KNOWN: usize = 5;

const OPTIONS: &[OptionSpec] = &[OptionSpec::value(STATE, "state", "state[,...]").invertible().mandatory()];

impl Extension for State {
    const SPEC: Spec = Spec::new(
        "state",
        Families::Both,
        OPTIONS,
        "Matches by the state of the packet's connection: INVALID, NEW, ESTABLISHED, RELATED or UNTRACKED. The same \
         as `-m conntrack --ctstate`.",
    );

    fn parse(options: &Options<'_>) -> Result<State, Fault> {
        Ok(State { states: options.required(STATE, |option| parse_states(option, KNOWN))? })
    }

    fn print(&self, out: &mut Printer<'_>) {
        out.given("state", &self.states);
    }
}
