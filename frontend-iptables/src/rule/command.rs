//! What a line asks for: its command, the command's operands, and what goes with them.

use polc_ir::limits;
use polc_ir::source::bytes;

use super::{Command, LineParser, base_name};
use crate::ast::Counters;
use crate::codes;
use crate::ext::{Argument, Fault};
use crate::lexer::Word;
use crate::value::strtoul;

impl<'a> LineParser<'a, '_> {
    pub(super) fn command(
        &mut self,
        word: &'a Word<'a>,
        letter: char,
        value: Option<Argument<'a>>,
    ) -> Result<(), Fault> {
        let chain = if matches!(letter, 'F' | 'L' | 'S' | 'X' | 'Z') {
            value.or_else(|| self.operand())
        } else {
            value
        };
        let number = |operand: Argument<'_>| {
            operand.number(1, i32::MAX as u64).map(|number| number as u32).map_err(|fault| Fault {
                code: codes::RULE_NUMBER,
                message: format!("`{}` is no rule number", operand.text),
                ..fault
            })
        };
        let command = match letter {
            'A' => Command::Append,
            'C' => Command::Check,
            'D' => match self.operand() {
                Some(operand) => Command::DeleteNumber(number(operand)?),
                None => Command::DeleteRule,
            },
            'I' => Command::Insert(self.operand().map_or(Ok(1), number)?),
            'R' => match self.operand() {
                Some(operand) => Command::Replace(number(operand)?),
                None => {
                    return Err(Fault::new(codes::MISSING_ARGUMENT, "`-R` needs a chain and a rule number")
                        .at(word.span));
                }
            },
            'N' => Command::NewChain,
            'X' => Command::DeleteChain,
            'F' => Command::Flush,
            'E' | 'P' => {
                self.operand = self.operand();
                if self.operand.is_none() {
                    let what =
                        if letter == 'E' { "an old and a new chain name" } else { "a chain and a policy" };
                    let message = format!("`-{letter}` needs {what}");
                    return Err(Fault::new(codes::MISSING_ARGUMENT, message).at(word.span));
                }
                if letter == 'E' { Command::RenameChain } else { Command::Policy }
            }
            // Whoever lists may name a rule that isn't there.
            _ => {
                let operand = if chain.is_some() { self.operand() } else { None };
                let number = operand.map(number).transpose()?;
                match letter {
                    'Z' => Command::Zero(number),
                    'L' => Command::List,
                    _ => Command::ListRules,
                }
            }
        };
        // Listing and zeroing can be done at once, each once.
        let first = self.seen.insert(letter);
        let both = |one: Command, other: Command| {
            matches!(one, Command::Zero(_)) && matches!(other, Command::List | Command::ListRules)
        };
        self.command = Some(match self.command {
            None => command,
            Some(other) if first && both(command, other) => command,
            Some(other) if first && both(other, command) => other,
            Some(other) => {
                let message = format!("`-{}` and `-{letter}` on one line", other.letter());
                return Err(Fault::new(codes::COMMAND, message).at(word.span));
            }
        });
        // What lists or zeroes all goes to the chain that was named.
        self.chain = chain.or(self.chain);
        Ok(())
    }

    pub(super) fn set_counters(&mut self, word: &Word<'_>, packets: Argument<'a>) -> Result<(), Fault> {
        let fault = |span| {
            Fault::new(codes::COUNTERS, "`-c` needs a packet and a byte counter")
                .at(span)
                .hint("write `-c PACKETS BYTES`")
        };
        let (packets_text, bytes) = match packets.text.split_once(',') {
            Some((first, second)) if !first.is_empty() => {
                (first, Argument { text: second, span: packets.span_of(second), ..packets })
            }
            _ => (packets.text, self.operand().ok_or_else(|| fault(word.span))?),
        };
        // sscanf("%llu") takes leading digits and ignores what follows.
        let digits = |text: &str| strtoul(text, 10).map(|(value, _)| value);
        let packets = digits(packets_text).ok_or_else(|| fault(packets.span))?;
        let bytes = digits(bytes.text).ok_or_else(|| fault(bytes.span))?;
        self.line.counters = Some(Counters { packets, bytes });
        Ok(())
    }

    /// Which base options go with which command, and with which base chain (iptables/xshared.c, `generic_opt_check`).
    pub(super) fn check_command(&self, command: Command) -> Result<(), Fault> {
        let illegal: &[char] = match command {
            Command::Append | Command::Insert(_) | Command::Replace(_) => &[],
            Command::DeleteRule | Command::Check => &['c'],
            Command::Policy => &['s', 'd', 'p', 'j', 'i', 'o', 'f'],
            _ => &['s', 'd', 'p', 'j', 'i', 'o', 'c', 'f'],
        };
        if let Some(letter) = illegal.iter().find(|letter| self.seen.contains(letter)) {
            let message = format!("`{}` can't be used with `-{}`", base_name(*letter), command.letter());
            return Err(Fault::new(codes::COMMAND, message));
        }
        let Some(chain) = self.chain else { return Ok(()) };
        if bytes::count(chain.text) > limits::CHAIN_NAME_BYTES_MAX {
            let message =
                format!("chain name `{}` is longer than {} bytes", chain.text, limits::CHAIN_NAME_BYTES_MAX);
            return Err(Fault::new(codes::CHAIN_NAME, message).at(chain.span));
        }
        if !command.has_rule() && !matches!(command, Command::DeleteNumber(_)) {
            return Ok(());
        }
        let (device, why) = match chain.text {
            "PREROUTING" | "INPUT" => (self.line.out_interface.as_ref(), "no output device yet"),
            "OUTPUT" | "POSTROUTING" => (self.line.in_interface.as_ref(), "no input device"),
            _ => (None, ""),
        };
        match device {
            Some(given) => {
                Err(Fault::new(codes::WRONG_PLACE, format!("packets in {} have {why}", chain.text))
                    .at(given.span)
                    .hint("remove the option, or move the rule to FORWARD"))
            }
            None => Ok(()),
        }
    }
}
