//! `-m comment`: a remark, without effect on packets.

use crate::ast::{Given, Text};
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Printer, Spec};

/// The options of `-m comment`.
#[derive(Clone, Debug, PartialEq)]
pub struct Comment {
    /// `--comment`, cut to [`COMMENT_BYTES_MAX`].
    pub comment: Given<Text>,
}

/// Longest comment, in bytes; iptables cuts longer ones
/// (include/uapi/linux/netfilter/xt_comment.h, less the terminating NUL).
pub const COMMENT_BYTES_MAX: usize = 255;

const COMMENT: u8 = 0;

const OPTIONS: &[OptionSpec] = &[OptionSpec::value(COMMENT, "comment", "text").mandatory()];

impl Extension for Comment {
    const SPEC: Spec = Spec::new(
        "comment",
        Families::Both,
        OPTIONS,
        "Attaches a remark of up to 255 bytes to a rule. It matches every packet.",
    );

    fn parse(options: &Options<'_>) -> Result<Comment, Fault> {
        let comment = options.required(COMMENT, |option| {
            let text = option.argument.text;
            let end = text.floor_char_boundary(COMMENT_BYTES_MAX);
            Ok(options.text(&text[..end]))
        })?;
        Ok(Comment { comment })
    }

    fn print(&self, out: &mut Printer<'_>) {
        out.switch("comment");
        out.quoted(&self.comment.value);
    }
}
