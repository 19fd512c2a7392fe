//! A mark from a hash of the packet's addresses and ports: the `HMARK` target (extensions/libxt_HMARK.c in iptables;
//! net/netfilter/xt_HMARK.c).

use polc_ir::field::Field;

use super::rewrite::change;
use crate::extension::{Arg, Context, Extension, Meaning, Opt, Options, Value, base};
use crate::value::Spelling;

/// The targets of this group.
pub(super) const ALL: &[Extension] = &[Extension {
    options: &[
        Opt::new("hmark-src-prefix", Arg::Length),
        Opt::new("hmark-dst-prefix", Arg::Length),
        Opt::new("hmark-sport-mask", HALF),
        Opt::new("hmark-dport-mask", HALF),
        Opt::new("hmark-spi-mask", WORD).excludes(&["hmark-sport-mask", "hmark-dport-mask"]),
        Opt::new("hmark-sport", HALF),
        Opt::new("hmark-dport", HALF),
        Opt::new("hmark-spi", WORD).excludes(&["hmark-sport", "hmark-dport"]),
        Opt::new("hmark-proto-mask", BYTE),
        Opt::new("hmark-rnd", WORD).must(),
        Opt::new("hmark-mod", Arg::Number(1, u32::MAX as u64)).must(),
        Opt::new("hmark-offset", Arg::Number(0, u32::MAX as u64)),
        Opt::new("hmark-tuple", Arg::Names(PARTS, Spelling::Abbreviated)),
    ],
    finish: Some(hash),
    ..base(
        "HMARK",
        Meaning::Target(|_| change("HMARK", "marks the packet with a hash", &[Field::Mark])),
        "Sets the packet's mark to a hash of its addresses and ports.",
    )
}];

/// Numbers that are printed in hexadecimal, of at least two, four and eight digits.
const BYTE: Arg = Arg::Custom {
    words: 1,
    parse: |words, context| Arg::Hex(0xffff).parse(words, context),
    print: print::<2>,
};
const HALF: Arg = Arg::Custom {
    words: 1,
    parse: |words, context| Arg::Hex(0xffff).parse(words, context),
    print: print::<4>,
};
const WORD: Arg = Arg::Custom {
    words: 1,
    parse: |words, context| Arg::Hex(u32::MAX as u64).parse(words, context),
    print: print::<8>,
};

fn print<const DIGITS: usize>(value: &Value, out: &mut String) {
    out.push_str(&format!(" 0x{:01$x}", value.number().unwrap_or(0), DIGITS));
}

/// What a hash can be of: each but the connection's original direction stands for an option with a full mask.
const PARTS: &[(&str, u64)] =
    &[("src", 0), ("dst", 1), ("sport", 2), ("dport", 3), ("spi", 4), ("proto", 8), ("ct", CONNECTION)];

const CONNECTION: u64 = 12;

fn hash(options: &mut Options, context: &Context) -> Result<(), String> {
    let bits = u64::from(context.family.address_bits());
    let full = [bits, bits, 0xffff, 0xffff, u32::MAX.into(), 0, 0, 0, 0xffff];
    let parts = match options.value("hmark-tuple") {
        Some((Value::List(parts), _)) => parts.clone(),
        _ => Vec::new(),
    };
    for &part in parts.iter().filter(|&&part| part != CONNECTION) {
        let name = options.extension.options[part as usize].name;
        if options.get(name).is_some_and(|given| given.span.is_some()) {
            return Err(format!("`--{name}` is given twice, once in `--hmark-tuple`"));
        }
        options.default(name, Value::Number(full[part as usize]));
    }
    if options.has("hmark-spi-mask") && options.count(&["hmark-sport-mask", "hmark-dport-mask"]) > 0 {
        return Err("a hash is of ports or of SPIs, not of both".into());
    }
    let parameters = ["hmark-rnd", "hmark-mod", "hmark-offset"];
    if options.count(&parameters) == options.given.len() {
        return Err("`--hmark-tuple` is needed".into());
    }
    for name in ["hmark-src-prefix", "hmark-dst-prefix"] {
        if let Some(length) = options.number(name) {
            options.set(name, Value::Number(length.min(bits)));
        }
    }
    options.remove("hmark-tuple");
    if parts.contains(&CONNECTION) {
        options.default("hmark-tuple", Value::List(vec![CONNECTION]));
    }
    Ok(())
}
