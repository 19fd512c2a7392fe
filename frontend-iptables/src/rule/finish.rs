//! What can be checked only at the end of a line.

use polc_ir::diag::Diagnostic;
use polc_ir::hook::{Family, TableKind};
use polc_ir::source::Span;

use super::suggest::nearest;
use super::{Command, LineParser, LineTarget, RuleLine, WHOLE_WORD};
use crate::ast::{Given, MatchAst};
use crate::codes;
use crate::ext::{Argument, Fault, Options, Spec, address_fault, set_of};
use crate::extension;
use crate::targets;
use crate::value::AddressMask;

impl<'a> LineParser<'a, '_> {
    /// Checks the line, and gives it.
    pub(super) fn finish(mut self) -> Result<RuleLine<'a>, Fault> {
        if self.cx.table == TableKind::Nat
            && let Some(at) = self.drop_asked_for()
        {
            return Err(Fault::new(
                codes::WRONG_PLACE,
                "the nat table is not for filtering: DROP is not allowed in it",
            )
            .at(at)
            .hint("drop in the filter table, or in raw PREROUTING"));
        }
        let context = extension::Context { family: self.cx.family, protocol: self.protocol() };
        for instance in 0..self.instances.len() as u32 {
            let clause = &self.instances[instance as usize];
            let spec = match (clause.entry, self.target) {
                (Some(entry), _) => &entry.spec,
                (None, Some((entry, _))) => &entry.spec,
                (None, None) => continue,
            };
            let options = Options { sets: self.cx.sets, all: &self.options, instance };
            let in_clause = |fault: Fault| Fault { span: fault.span.or(Some(clause.span)), ..fault };
            check_options(spec, &options).map_err(in_clause)?;
            match (clause.entry, self.target) {
                (Some(entry), _) => {
                    let options = entry.parse(&options, &context).map_err(in_clause)?;
                    self.warn_of_unsaid(&options);
                    let span = self.instances[instance as usize].span;
                    self.line.matches.push(MatchAst { span, options });
                }
                (None, Some((entry, _))) => {
                    let options = entry.parse(&options, &context).map_err(in_clause)?;
                    self.line.target = LineTarget::Extension(options);
                    self.line.target_span = clause.span;
                }
                (None, None) => {}
            }
        }
        let Some(command) = self.command else {
            let fault = Fault::new(codes::COMMAND, "the line has no command")
                .hint("a rule line starts with `-A CHAIN`");
            return Err(match self.words.first() {
                Some(word) => fault.at(word.span),
                None => fault,
            });
        };
        if let Some(bang) = self.pending {
            return Err(Fault::new(codes::NEGATION, "nothing follows this `!`").at(bang));
        }
        if command.has_rule() {
            self.addresses()?;
        }
        self.check_command(command)?;
        self.line.command = command;
        self.line.chain = self.chain;
        self.line.operand = self.operand;
        self.line.protocol = self.protocol.map(|(_, given)| given);
        if command.has_rule() && self.target.is_none() {
            self.resolve_target()?;
        }
        Ok(self.line)
    }

    /// Where the line names DROP for a target or policy.
    fn drop_asked_for(&self) -> Option<Span> {
        let target = self.jump.as_ref().filter(|(target, _)| target.value.text == "DROP");
        let policy = self
            .operand
            .filter(|operand| matches!(self.command, Some(Command::Policy)) && operand.text == "DROP");
        target.map(|(target, _)| target.span).or(policy.map(|policy| policy.span))
    }

    /// Tells of what iptables-save leaves out although the rule means something else without it.
    fn warn_of_unsaid(&self, options: &extension::Options) {
        for given in options.given.iter().filter(|given| given.negated && options.is_unsaid(given)) {
            let Some(span) = given.span else { continue };
            self.warn(
                Diagnostic::warning(
                    codes::SUSPICIOUS,
                    "no packet is other than all: this never matches",
                    span,
                )
                .with_note("iptables-save leaves it out, and what it saves matches every packet")
                .with_hint("remove the rule, or say what it is to match"),
            );
        }
    }

    fn resolve_target(&mut self) -> Result<(), Fault> {
        let Some((target, goto)) = self.jump else { return Ok(()) };
        let name = target.value;
        self.line.target = match name.text {
            _ if (self.cx.is_chain)(name.text) && goto => LineTarget::Goto(name),
            _ if (self.cx.is_chain)(name.text) => LineTarget::Jump(name),
            _ if goto => {
                let message = format!("`-g {}`: the table has no such chain", name.text);
                return Err(Fault::new(codes::UNKNOWN_TARGET, message)
                    .at(name.span)
                    .hint(format!("declare it before this line: `:{} - [0:0]`", name.text)));
            }
            "ACCEPT" => LineTarget::Accept,
            "DROP" => LineTarget::Drop,
            "QUEUE" => LineTarget::Queue,
            "RETURN" => LineTarget::Return,
            _ => return Err(self.unknown_target(name)),
        };
        Ok(())
    }

    fn unknown_target(&self, name: Argument<'_>) -> Fault {
        let other = match self.cx.family {
            Family::V4 => Family::V6,
            Family::V6 => Family::V4,
        };
        if targets::find(name.text, other).is_some() {
            let message = format!("target `{}` exists for {other} only", name.text);
            return Fault::new(codes::WRONG_FAMILY, message).at(name.span);
        }
        let message = format!("`{}` is neither a chain of this table nor a known target", name.text);
        let fault = Fault::new(codes::UNKNOWN_TARGET, message).at(name.span);
        let standard = ["ACCEPT", "DROP", "RETURN", "QUEUE"];
        match nearest(name.text, targets::entries().map(|entry| entry.spec.name).chain(standard)) {
            Some(near) => fault.hint(format!("did you mean `{near}`?")),
            None => fault.hint(format!("declare the chain before this line: `:{} - [0:0]`", name.text)),
        }
    }

    fn addresses(&mut self) -> Result<(), Fault> {
        self.line.sources = self.address_list(self.source)?;
        self.line.destinations = self.address_list(self.destination)?;
        let several = self.line.sources.len() > 1 || self.line.destinations.len() > 1;
        let negated = self.source.iter().chain(&self.destination).find(|given| given.negated);
        match negated {
            Some(given) if several => {
                Err(Fault::new(codes::NEGATION, "`!` can't be used with lists of addresses")
                    .at(given.span)
                    .hint("write one rule for each address"))
            }
            _ if several && matches!(self.command, Some(Command::Replace(_))) => {
                Err(Fault::new(codes::COMMAND, "`-R` puts one rule in another's place, not several")
                    .hint("name one source and one destination"))
            }
            _ => Ok(()),
        }
    }

    fn address_list(&self, given: Option<Given<Argument<'a>>>) -> Result<Vec<Given<AddressMask>>, Fault> {
        let Some(given) = given else { return Ok(Vec::new()) };
        let argument = given.value;
        let several = argument.text.contains(',');
        argument
            .text
            .split(',')
            .map(|item| {
                let item = item.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
                let value = AddressMask::parse(item, self.cx.family).map_err(|bad| {
                    use crate::value::BadAddress;
                    let (BadAddress::Address(part) | BadAddress::Mask(part)) = bad;
                    let fault = address_fault(bad, self.cx.family).at(argument.span_of(part));
                    // No address begins with the option's own letter but where it was attached.
                    match part.starts_with('-') {
                        true => fault.hint(WHOLE_WORD),
                        false => fault,
                    }
                })?;
                let span = if several { argument.span_of(item) } else { given.span };
                Ok(Given { value, negated: given.negated, span })
            })
            .collect()
    }
}

/// Checks options against their declarations (libxtables/xtoptions.c, `xtables_options_fcheck`).
fn check_options(spec: &Spec, options: &Options<'_>) -> Result<(), Fault> {
    let given = options.given();
    let named = |id| spec.options.iter().find(|it| it.id == id).map_or("", |it| it.name);
    for option in spec.options {
        let bit = set_of(option.id);
        if given & bit == 0 {
            if option.mandatory {
                let message = format!("`{}` needs `--{}`", spec.name, option.name);
                return Err(Fault::new(codes::MISSING_OPTION, message));
            }
            continue;
        }
        let others = given & !bit;
        let at = |fault: Fault| match options.get(option.id) {
            Some(given) => fault.at(given.span),
            None => fault,
        };
        let clash = others & option.excludes;
        if clash != 0 {
            let other = named(clash.trailing_zeros() as u8);
            let message = format!("`--{}` and `--{other}` exclude each other", option.name);
            return Err(at(Fault::new(codes::CONFLICTING_OPTIONS, message)));
        }
        let missing = option.requires & !given;
        if missing != 0 {
            let other = named(missing.trailing_zeros() as u8);
            let message = format!("`--{}` needs `--{other}` too", option.name);
            return Err(at(Fault::new(codes::CONFLICTING_OPTIONS, message)));
        }
    }
    Ok(())
}
