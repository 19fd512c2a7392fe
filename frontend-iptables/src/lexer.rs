//! Splits a dump into lines, and a rule line into words.
//!
//! iptables-restore has its own quoting, unlike any shell's: only `"` quotes, a closing quote ends the word whatever
//! follows, backslash escapes inside quotes only, and `'` is an ordinary character (iptables/xshared.c,
//! `add_param_to_argv`). Words borrow from the source wherever no quote had to be removed.

use std::borrow::Cow;

use nom::branch::alt;
use nom::bytes::complete::{tag, take_till, take_till1, take_while, take_while1};
use nom::character::complete::{anychar, char, none_of};
use nom::combinator::{map, recognize, value};
use nom::multi::fold_many0;
use nom::sequence::{preceded, terminated};
use nom::{IResult, Parser};
use polc_ir::source::{File, Span};

/// A word of a rule line, unquoted, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word<'a> {
    /// The text without quotes and escapes.
    pub text: Cow<'a, str>,
    /// The text as written, quotes included.
    pub span: Span,
}

/// Why a line can't be split into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LexError {
    /// The quote that starts here is not closed.
    UnclosedQuote(Span),
    /// This word is longer than [`polc_ir::limits::WORD_BYTES_MAX`].
    WordTooLong(Span),
    /// There are more words than [`polc_ir::limits::WORDS_MAX`]; the span is of the first too many.
    TooManyWords(Span),
}

/// How a line ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// `\n`, as it should be.
    Newline,
    /// `\r\n`.
    CarriageReturn,
    /// The file ends without a newline.
    EndOfFile,
}

/// A line of a source file.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// The text, without its ending.
    pub text: &'a str,
    /// Offset of the text's first byte in the file.
    pub start: u32,
    /// How the line ends.
    pub ending: Ending,
}

impl Line<'_> {
    /// Offset of what follows the line and its ending.
    pub fn end(&self) -> usize {
        let ending = match self.ending {
            Ending::Newline => 1,
            Ending::CarriageReturn => 2,
            Ending::EndOfFile => 0,
        };
        self.start as usize + self.text.len() + ending
    }

    /// The span of the whole line, without its ending.
    pub fn span(&self, file: File) -> Span {
        Span::new(file, self.start, self.start + self.text.len() as u32)
    }
}

/// What some editors put before the first line of UTF-8 text.
pub const BYTE_ORDER_MARK: char = '\u{feff}';

/// The lines of `text`, in order.
pub fn lines(text: &str) -> impl Iterator<Item = Line<'_>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = text.get(at..).filter(|rest| !rest.is_empty())?;
        let start = at as u32;
        let (line, ending) = match rest.find('\n') {
            Some(end) => {
                at += end + 1;
                match rest[..end].strip_suffix('\r') {
                    Some(line) => (line, Ending::CarriageReturn),
                    None => (&rest[..end], Ending::Newline),
                }
            }
            None => {
                at = text.len();
                (rest, Ending::EndOfFile)
            }
        };
        Some(Line { text: line, start, ending })
    })
}

/// What separates words in iptables-restore: space, tab, and the newline that is already gone.
fn is_blank(c: char) -> bool {
    c == ' ' || c == '\t'
}

fn blanks(input: &str) -> IResult<&str, &str> {
    take_while(is_blank).parse(input)
}

/// An unquoted stretch: everything up to a blank or a quote.
fn plain(input: &str) -> IResult<&str, &str> {
    take_till1(|c| is_blank(c) || c == '"').parse(input)
}

/// A quoted stretch with its quotes; the value is the text within, unescaped.
fn quoted(input: &str) -> IResult<&str, Cow<'_, str>> {
    let (rest, _) = char('"').parse(input)?;
    // Most quoted words hold no escape: take them as they are.
    let (after, simple) = take_till(|c| c == '"' || c == '\\').parse(rest)?;
    if let Some(end) = after.strip_prefix('"') {
        return Ok((end, Cow::Borrowed(simple)));
    }
    let piece = alt((preceded(char('\\'), anychar), none_of("\"\\")));
    map(
        terminated(
            fold_many0(piece, String::new, |mut text, c| {
                text.push(c);
                text
            }),
            char('"'),
        ),
        Cow::Owned,
    )
    .parse(rest)
}

/// One word: an unquoted stretch, a quoted one, or one of each, in this order. The closing quote ends the word.
fn word(input: &str) -> IResult<&str, Cow<'_, str>> {
    let (rest, start) = match plain(input) {
        Ok((rest, start)) => (rest, start),
        Err(nom::Err::Error(_)) => (input, ""),
        Err(other) => return Err(other),
    };
    if !rest.starts_with('"') {
        return Ok((rest, Cow::Borrowed(start)));
    }
    let (rest, text) = quoted(rest)?;
    Ok((rest, if start.is_empty() { text } else { Cow::Owned(format!("{start}{text}")) }))
}

/// What becomes of a quote that the line does not close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenQuote {
    /// The line is not split.
    Refuse,
    /// The word takes the rest of the line and the newline behind it, as iptables-restore has it
    /// (iptables/xshared.c, `add_param_to_argv`).
    TakeNewline,
}

/// Splits `line`, whose first byte is at `start` of `file`, into words, appended to `words`.
pub fn words<'a>(
    line: &'a str,
    file: File,
    start: u32,
    open: OpenQuote,
    words: &mut Vec<Word<'a>>,
) -> Result<(), LexError> {
    let offset = |rest: &str| start + (line.len() - rest.len()) as u32;
    let mut rest = line;
    loop {
        if let Ok((after, _)) = blanks(rest) {
            rest = after;
        }
        if rest.is_empty() {
            return Ok(());
        }
        let from = offset(rest);
        let (after, text) = match word(rest) {
            Ok(split) => split,
            Err(_) if open == OpenQuote::TakeNewline => {
                let closed = format!("{rest}\n\"");
                let (_, text) = word(&closed).expect("the quote is closed now");
                ("", Cow::Owned(text.into_owned()))
            }
            Err(_) => {
                let quote = from + rest.find('"').unwrap_or(0) as u32;
                return Err(LexError::UnclosedQuote(Span::new(file, quote, start + line.len() as u32)));
            }
        };
        let span = Span::new(file, from, offset(after));
        if text.len() > polc_ir::limits::WORD_BYTES_MAX {
            return Err(LexError::WordTooLong(span));
        }
        if words.len() == polc_ir::limits::WORDS_MAX {
            return Err(LexError::TooManyWords(span));
        }
        words.push(Word { text, span });
        rest = after;
    }
}

/// `[PACKETS:BYTES]`, with no blanks inside; the values are as written. The rest follows without a blank.
///
/// iptables-restore without `-c` does not look at the numbers, so neither does this parser
/// (iptables/xshared.c, `tokenize_rule_counters`).
pub fn counters(input: &str) -> IResult<&str, (&str, &str)> {
    let field = |input| take_while1(|c| c != ':' && c != ']').parse(input);
    let (rest, _) = tag("[").parse(input)?;
    let (rest, _) = take_while(|c| c == ':').parse(rest)?;
    let (rest, packets) = field(rest)?;
    let (rest, _) = tag(":").parse(rest)?;
    let (rest, bytes) = recognize(take_while1(|c| c != ']')).parse(rest)?;
    let (rest, _) = value((), tag("]")).parse(rest)?;
    Ok((rest, (packets, bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(line: &str) -> Vec<String> {
        let mut out = Vec::new();
        words(line, File::from_index(0), 0, OpenQuote::Refuse, &mut out).expect("splits");
        out.into_iter().map(|word| word.text.into_owned()).collect()
    }

    #[test]
    fn quoting_is_restores_own() {
        assert_eq!(split(r#"-A  INPUT	-j "a b""#), ["-A", "INPUT", "-j", "a b"]);
        assert_eq!(split(r#""a\"b\\" 'c d'"#), ["a\"b\\", "'c", "d'"]);
        assert_eq!(split(r#"x"y"z """#), ["xy", "z", ""]);
        assert_eq!(split(r"a\b"), [r"a\b"]);
    }

    #[test]
    fn unclosed_quotes_point_at_the_quote() {
        let mut out = Vec::new();
        let error = words(r#"-m "abc"#, File::from_index(0), 10, OpenQuote::Refuse, &mut out).unwrap_err();
        assert_eq!(error, LexError::UnclosedQuote(Span::new(File::from_index(0), 13, 17)));
    }

    #[test]
    fn unclosed_quotes_may_take_the_newline() {
        for (line, last) in [(r#"-m "abc d"#, "abc d\n"), (r#"-m "a\\b\"#, "a\\b\n"), (r#"-m x"y"#, "xy\n")] {
            let mut out = Vec::new();
            words(line, File::from_index(0), 10, OpenQuote::TakeNewline, &mut out).expect("splits");
            assert_eq!(out.len(), 2);
            assert_eq!(out[1].text, last);
            assert_eq!(out[1].span, Span::new(File::from_index(0), 13, 10 + line.len() as u32));
        }
    }

    #[test]
    fn lines_know_their_endings() {
        let all: Vec<_> = lines("a\r\n\nb").map(|line| (line.text, line.start, line.ending)).collect();
        assert_eq!(
            all,
            [("a", 0, Ending::CarriageReturn), ("", 3, Ending::Newline), ("b", 4, Ending::EndOfFile)]
        );
    }

    #[test]
    fn counters_are_taken_as_written() {
        assert_eq!(counters("[1:2]-A X"), Ok(("-A X", ("1", "2"))));
        assert!(counters("[12]").is_err());
    }
}
