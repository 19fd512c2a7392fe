//! The text of a program: its instructions beside the rules they come from.
//!
//! The form is that of `bpftool prog dump xlated linum`, so that the two can be read side by side, with what bpftool
//! can't know added: names of maps, targets of jumps, remarks of the code generator. Code that doesn't decode is
//! printed as numbers, since a dump is most needed when something is wrong.

use std::fmt;

use crate::asm::{Code, LineRef, RelocKind};
use crate::insn::{Insn, Reg};
use crate::kernel_api::KernelItem;
use crate::object::{Object, Program};

/// Prints one program of an object.
#[derive(Clone, Copy, Debug)]
pub struct Disassembly<'a> {
    /// The object, for the names of maps.
    pub object: &'a Object,
    /// The program.
    pub program: &'a Program,
}

/// All programs of an object, one after the other.
pub fn disassemble(object: &Object) -> String {
    let texts: Vec<String> =
        object.programs.iter().map(|program| Disassembly { object, program }.to_string()).collect();
    texts.join("\n")
}

impl fmt::Display for Disassembly<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Program { name, kind, code } = self.program;
        writeln!(f, "{kind} {name}:")?;
        let mut line: Option<&LineRef> = None;
        let (mut at, mut comments) = (0, code.comments.iter().peekable());
        while at < code.slots.len() {
            let slot = at as u32;
            let here = code.line_at(slot);
            if here != line {
                line = here;
                match here {
                    Some(LineRef { file, line, text }) => {
                        let file = code.files.get(file.as_u32() as usize).map_or("?", String::as_str);
                        writeln!(f, "; {text} @ {file}:{line}")?;
                    }
                    None => writeln!(f, ";")?,
                }
            }
            let decoded = Insn::decode(&code.slots[at..]);
            let text = match decoded {
                Ok(insn) => self.insn(code, slot, insn),
                Err(why) => format!(".quad {:#018x} ({why})", code.slots[at]),
            };
            write!(f, "{slot:5}: ({:02x}) {text}", code.slots[at] as u8)?;
            let slots = decoded.map_or(1, |insn| insn.slots());
            at += slots;
            let mut separator = "  # ";
            while let Some((_, comment)) = comments.next_if(|(of, _)| (*of as usize) < at) {
                write!(f, "{separator}{comment}")?;
                separator = "; ";
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl Disassembly<'_> {
    /// One instruction, with maps by name and jumps with their target.
    fn insn(&self, code: &Code, slot: u32, insn: Insn) -> String {
        let map = |dst: Reg| {
            let index = code.relocs.binary_search_by_key(&slot, |reloc| reloc.slot).ok()?;
            let reloc = code.relocs[index];
            let def = self.object.maps.get(reloc.map)?;
            Some(match reloc.kind {
                RelocKind::Fd => format!("{dst} = map {}", def.symbol()),
                RelocKind::Value { offset } => format!("{dst} = &{}[{offset}]", def.symbol()),
            })
        };
        let named = match insn {
            Insn::LoadMap { dst, .. } | Insn::LoadMapValue { dst, .. } => map(dst),
            Insn::Ja { off } | Insn::Jump { off, .. } => {
                Some(format!("{insn} <{}>", i64::from(slot) + 1 + i64::from(off)))
            }
            Insn::Load { .. } | Insn::CallKernel { .. } => {
                let index = code.kernel.binary_search_by_key(&slot, |used| used.slot).ok();
                index.map(|index| match code.kernel[index].item {
                    KernelItem::Field(_) => format!("{insn} <{}>", code.kernel[index].item),
                    KernelItem::Function(function) => format!("call {}", function.name()),
                })
            }
            _ => None,
        };
        named.unwrap_or_else(|| insn.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::Asm;
    use crate::insn::{Cond, Helper};
    use crate::manifest::Manifest;
    use crate::object::{DataSection, MapDef, ProgramKind};

    #[test]
    fn instructions_stand_beside_their_rules() {
        let mut object = Object::new(Manifest::default());
        let ports = object.maps.push(MapDef::data("ports", DataSection::Rodata, vec![0; 16]));
        let counts = object.maps.push(MapDef::percpu_array("counts", 8, 4));
        let mut a = Asm::new();
        let file = a.file("rules.v4");
        let rule = a.line(file, 7, "-A INPUT -j DROP");
        a.comment("the mark");
        a.comment("as given");
        a.load_map_value(Reg::R1, ports, 4);
        a.set_line(Some(rule));
        a.load_map(Reg::R1, counts);
        let end = a.label();
        a.call(Helper::MAP_LOOKUP_ELEM);
        a.jump64(Cond::Eq, Reg::R0, 0, end);
        a.mov32(Reg::R0, 1);
        a.bind(end);
        a.set_line(None);
        a.exit();
        let mut code = a.finish().expect("assembles");
        let name = "main".to_string();
        let text = |code: &Code, object: &Object| {
            let program = Program { name: name.clone(), kind: ProgramKind::Xdp, code: code.clone() };
            Disassembly { object, program: &program }.to_string()
        };
        assert_eq!(
            text(&code, &object),
            "\
xdp main:
    0: (18) r1 = &.rodata.ports[4]  # the mark; as given
; -A INPUT -j DROP @ rules.v4:7
    2: (18) r1 = map counts
    4: (85) call map_lookup_elem#1
    5: (15) if r0 == 0 goto +1 <7>
    6: (b4) w0 = 1
;
    7: (95) exit
"
        );
        code.slots[6] = u64::MAX;
        assert!(text(&code, &object).contains("    6: (ff) .quad 0xffffffffffffffff (register above r10)\n"));
    }
}
