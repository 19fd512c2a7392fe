//! Matches and targets of a line: what loads them, and their options.

use polc_ir::hook::Family;
use polc_ir::limits;
use polc_ir::source::{Span, bytes};

use super::suggest::nearest;
use super::{BASE, Instance, LineParser, Loaded, Lookup};
use crate::ast::Given;
use crate::codes;
use crate::ext::{Argument, Fault, GivenOption, OptionSpec};
use crate::extension::Entry;
use crate::lexer::Word;
use crate::matches;
use crate::names;
use crate::targets;

impl<'a> LineParser<'a, '_> {
    pub(super) fn load_match(&mut self, word: &Word<'_>, name: Argument<'a>) -> Result<(), Fault> {
        let Some(entry) = matches::find(name.text, self.cx.family) else {
            return Err(self.unknown_match(name));
        };
        self.add_match(entry, word.span.to(name.span));
        Ok(())
    }

    fn add_match(&mut self, entry: &'static Entry, span: Span) {
        let instance = self.instances.len() as u32;
        self.instances.push(Instance { entry: Some(entry), span });
        let known = self.loaded.iter_mut().find(|loaded| std::ptr::eq(loaded.options, entry.spec.options));
        match known {
            Some(loaded) if !entry.spec.options.is_empty() => loaded.instance = instance,
            _ => self.loaded.push(Loaded { options: entry.spec.options, instance }),
        }
    }

    fn unknown_match(&self, name: Argument<'_>) -> Fault {
        let other = match self.cx.family {
            Family::V4 => Family::V6,
            Family::V6 => Family::V4,
        };
        if matches::find(name.text, other).is_some() {
            return Fault::new(codes::WRONG_FAMILY, format!("match `{}` exists for {other} only", name.text))
                .at(name.span);
        }
        let fault =
            Fault::new(codes::UNKNOWN_MATCH, format!("there is no match `{}`", name.text)).at(name.span);
        match nearest(name.text, matches::entries().map(|entry| entry.spec.name)) {
            Some(near) => fault.hint(format!("did you mean `{near}`?")),
            None => fault,
        }
    }

    /// Loads the match of the rule's protocol, if that was not done yet.
    pub(super) fn load_protocol(&mut self) -> Result<bool, Fault> {
        let Some((name, given)) = &self.protocol else { return Ok(false) };
        if self.protocol_used {
            return Ok(false);
        }
        let lower = name.text.to_ascii_lowercase();
        // A number is turned into its name first: `-p 6` loads tcp.
        let name = match crate::value::number(&lower, 0, 255) {
            Some(_) => names::protocol_name(given.value),
            None => Some(&*lower),
        };
        let Some(entry) = name.and_then(|name| matches::find(name, self.cx.family)) else { return Ok(false) };
        self.protocol_used = true;
        // The clause has no `-m`; its span grows from its first option.
        let here = self.words[self.at - 1].span;
        self.add_match(entry, self.pending.map_or(here, |bang| bang.to(here)));
        Ok(true)
    }

    pub(super) fn unknown_option(&self, word: &Word<'_>, name: &str, lookup: Lookup) -> Fault {
        let fault = match lookup {
            Lookup::Ambiguous(candidates) => {
                let message = format!("`--{name}` is ambiguous");
                return Fault::new(codes::UNKNOWN_OPTION, message)
                    .at(word.span)
                    .hint(format!("write one of {}", candidates.join(", ")));
            }
            _ => Fault::new(codes::UNKNOWN_OPTION, format!("unknown option `{}`", word.text)).at(word.span),
        };
        let owners: Vec<String> = matches::entries()
            .map(|entry| ("-m", &entry.spec))
            .chain(targets::entries().map(|entry| ("-j", &entry.spec)))
            .filter(|(_, spec)| spec.families.contains(self.cx.family))
            .filter(|(_, spec)| spec.options.iter().any(|option| option.name == name))
            .map(|(flag, spec)| format!("`{flag} {}`", spec.name))
            .collect();
        if !owners.is_empty() {
            return fault
                .hint(format!("it is an option of {}, which must come before it", owners.join(" or ")));
        }
        let known = self.loaded.iter().flat_map(|loaded| loaded.options).map(|option| option.name);
        match nearest(name, known.chain(BASE.iter().map(|row| row.0))) {
            Some(near) => fault.hint(format!("did you mean `--{near}`?")),
            None => fault,
        }
    }

    pub(super) fn jump(&mut self, word: &'a Word<'a>, name: Argument<'a>, goto: bool) -> Result<(), Fault> {
        if name.text.is_empty() {
            return Err(
                Fault::new(codes::UNKNOWN_TARGET, "the target's name is empty").at(word.span.to(name.span))
            );
        }
        if bytes::count(name.text) > limits::CHAIN_NAME_BYTES_MAX {
            let message =
                format!("target name `{}` is longer than {} bytes", name.text, limits::CHAIN_NAME_BYTES_MAX);
            return Err(Fault::new(codes::UNKNOWN_TARGET, message).at(name.span));
        }
        let span = word.span.to(name.span);
        self.jump = Some((Given { value: name, negated: false, span }, goto));
        self.line.target_span = span;
        let standard = matches!(name.text, "ACCEPT" | "DROP" | "QUEUE" | "RETURN");
        if goto || standard || (self.cx.is_chain)(name.text) {
            return Ok(());
        }
        if let Some(entry) = targets::find(name.text, self.cx.family) {
            let instance = self.instances.len() as u32;
            self.instances.push(Instance { entry: None, span });
            self.loaded.push(Loaded { options: entry.spec.options, instance });
            self.target = Some((entry, instance));
        }
        Ok(())
    }

    pub(super) fn extension_option(
        &mut self,
        word: &'a Word<'a>,
        table: usize,
        spec: &'static OptionSpec,
        attached: Option<Argument<'a>>,
    ) -> Result<(), Fault> {
        let mut span = word.span;
        let nothing = Argument { text: "", span: word.span.at_end(), verbatim: true };
        let (mut first, mut second, mut old) = (nothing, nothing, false);
        if spec.optional {
            first = attached.or_else(|| self.operand()).unwrap_or(nothing);
            span = span.to(first.span);
        } else if spec.arguments > 0 {
            first = self.value(word, attached)?;
            if spec.invertible {
                old = self.old_negation(word.span, &mut first)?;
            }
            span = span.to(first.span);
        }
        if spec.arguments > 1 {
            second = self.operand().ok_or_else(|| {
                Fault::new(codes::MISSING_ARGUMENT, format!("`--{}` needs two arguments", spec.name)).at(span)
            })?;
            span = span.to(second.span);
        }
        let (negated, span) = self.negation(span);
        let negated = negated || old;
        if negated && !spec.invertible {
            return Err(Fault::new(codes::NEGATION, format!("`--{}` can't be negated", spec.name)).at(span));
        }
        let instance = self.loaded[table].instance;
        let twice = |option: &&GivenOption<'_>| option.instance == instance && option.spec.id == spec.id;
        if !spec.repeatable && self.options.iter().any(|option| twice(&option)) {
            return Err(
                Fault::new(codes::REPEATED_OPTION, format!("`--{}` is given twice", spec.name)).at(span)
            );
        }
        let clause = &mut self.instances[instance as usize];
        clause.span = clause.span.to(span);
        let protocol = self.protocol();
        self.options.push(GivenOption { spec, negated, span, argument: first, second, protocol, instance });
        Ok(())
    }
}
