//! `-j LOG`: writes to the kernel log.

use crate::ast::{Given, Text};
use crate::ext::{Argument, Extension, Families, Fault, OptionSpec, Options, Printer, Spec};
use crate::names::LOG_LEVELS;
use crate::value::number;

/// The options of `-j LOG`.
#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    /// `--log-level`: 0 (emergency) to 7 (debug); 4 (warning) if not given.
    pub level: u8,
    /// `--log-prefix`, cut to [`PREFIX_BYTES_MAX`].
    pub prefix: Option<Given<Text>>,
    /// `--log-tcp-sequence`.
    pub tcp_sequence: bool,
    /// `--log-tcp-options`.
    pub tcp_options: bool,
    /// `--log-ip-options`.
    pub ip_options: bool,
    /// `--log-uid`.
    pub uid: bool,
    /// `--log-macdecode`.
    pub mac_decode: bool,
}

/// Longest prefix, in bytes; iptables cuts longer ones
/// (include/uapi/linux/netfilter/xt_LOG.h, less the terminating NUL).
pub const PREFIX_BYTES_MAX: usize = 29;

const LEVEL_DEFAULT: u8 = 4;

const LEVEL: u8 = 0;
const PREFIX: u8 = 1;
const TCP_SEQUENCE: u8 = 2;
const TCP_OPTIONS: u8 = 3;
const IP_OPTIONS: u8 = 4;
const UID: u8 = 5;
const MAC_DECODE: u8 = 6;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::value(LEVEL, "log-level", "level"),
    OptionSpec::value(PREFIX, "log-prefix", "text"),
    OptionSpec::switch(TCP_SEQUENCE, "log-tcp-sequence"),
    OptionSpec::switch(TCP_OPTIONS, "log-tcp-options"),
    OptionSpec::switch(IP_OPTIONS, "log-ip-options"),
    OptionSpec::switch(UID, "log-uid"),
    OptionSpec::switch(MAC_DECODE, "log-macdecode"),
];

impl Extension for Log {
    const SPEC: Spec = Spec::new(
        "LOG",
        Families::Both,
        OPTIONS,
        "Writes a line about the packet to the kernel log, with a prefix of up to 29 bytes, and goes on.",
    );

    fn parse(options: &Options<'_>) -> Result<Log, Fault> {
        Ok(Log {
            level: options
                .optional(LEVEL, |option| level(option.argument))?
                .map_or(LEVEL_DEFAULT, |given| given.value),
            prefix: options.optional(PREFIX, |option| {
                let text = option.argument.text;
                if text.is_empty() {
                    return Err(option.argument.bad("the prefix is empty"));
                }
                if text.contains('\n') {
                    return Err(option.argument.bad("a prefix can't contain a newline"));
                }
                Ok(options.text(&text[..text.floor_char_boundary(PREFIX_BYTES_MAX)]))
            })?,
            tcp_sequence: options.has(TCP_SEQUENCE),
            tcp_options: options.has(TCP_OPTIONS),
            ip_options: options.has(IP_OPTIONS),
            uid: options.has(UID),
            mac_decode: options.has(MAC_DECODE),
        })
    }

    fn print(&self, out: &mut Printer<'_>) {
        if let Some(prefix) = &self.prefix {
            out.switch("log-prefix");
            out.quoted(&prefix.value);
        }
        if self.level != LEVEL_DEFAULT {
            out.option("log-level", self.level);
        }
        out.switch_if("log-tcp-sequence", self.tcp_sequence);
        out.switch_if("log-tcp-options", self.tcp_options);
        out.switch_if("log-ip-options", self.ip_options);
        out.switch_if("log-uid", self.uid);
        out.switch_if("log-macdecode", self.mac_decode);
    }
}

/// A syslog level by number or name.
fn level(argument: Argument<'_>) -> Result<u8, Fault> {
    let named = || LOG_LEVELS.iter().find(|(name, _)| *name == argument.text).map(|&(_, level)| level);
    number(argument.text, 0, 7).map(|level| level as u8).or_else(named).ok_or_else(|| {
        let names: Vec<&str> = LOG_LEVELS.iter().map(|row| row.0).collect();
        argument
            .bad(format!("`{}` is no log level", argument.text))
            .hint(format!("the levels are 0 to 7, or {}", names.join(", ")))
    })
}
