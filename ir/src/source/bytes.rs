//! Bytes that are no UTF-8, kept in text.
//!
//! The tools of netfilter take names and comments for bytes, and old rule sets have some in Latin-1. Text that is read
//! holds a character of the last private-use plane for each such byte (U+10FF80 for 0x80 to U+10FFFF for 0xff), so that
//! what is printed has the bytes that were read. Where those characters themselves were in a file, their bytes are kept
//! in the same way, so that there is one text for all bytes and one way back.

use std::borrow::Cow;

/// What the byte 0 would be kept as.
const KEPT: u32 = 0x10_ff00;

fn keep(byte: u8) -> char {
    char::from_u32(KEPT + u32::from(byte)).expect("below the last scalar value")
}

/// The byte that a character of a text stands for, if it stands for one.
pub fn kept(character: char) -> Option<u8> {
    u32::from(character)
        .checked_sub(KEPT)
        .and_then(|byte| u8::try_from(byte).ok())
        .filter(|byte| *byte >= 0x80)
}

/// The text of a file's bytes.
pub fn to_text(bytes: Vec<u8>) -> String {
    let bytes = match String::from_utf8(bytes) {
        Ok(text) if !text.contains(|character| kept(character).is_some()) => return text,
        Ok(text) => text.into_bytes(),
        Err(error) => error.into_bytes(),
    };
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match kept(character) {
                None => text.push(character),
                Some(_) => text.extend(character.encode_utf8(&mut [0; 4]).bytes().map(keep)),
            }
        }
        text.extend(chunk.invalid().iter().copied().map(keep));
    }
    text
}

/// The bytes that a text was made of.
pub fn of_text(text: &str) -> Cow<'_, [u8]> {
    if !text.contains(|character| kept(character).is_some()) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for character in text.chars() {
        match kept(character) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Cow::Owned(bytes)
}

/// How many bytes [`of_text`] gives.
pub fn count(text: &str) -> usize {
    text.len() - 3 * text.chars().filter(|character| kept(*character).is_some()).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back() {
        // Beginnings of characters, what follows them, and what does neither, in every order.
        let some = [b'a', 0x80, 0xbf, 0xc3, 0xa4, 0xe2, 0xf4, 0x8f, 0xbe, 0xff];
        for number in 0..some.len().pow(4) {
            let bytes: Vec<u8> = (0..4).map(|at| some[number / some.len().pow(at) % some.len()]).collect();
            let text = to_text(bytes.clone());
            assert_eq!(count(&text), bytes.len());
            assert_eq!(&*of_text(&text), &bytes[..]);
        }
    }

    #[test]
    fn characters_that_stand_for_bytes_come_back() {
        for text in ["\u{10ff80}", "a\u{10ffff}\u{10ff7f}", "\u{e4}"] {
            let kept = to_text(text.as_bytes().to_vec());
            assert_eq!(&*of_text(&kept), text.as_bytes());
        }
        assert_eq!(to_text(vec![b'a', 0xe4]), "a\u{10ffe4}");
        assert_eq!(to_text("ä".as_bytes().to_vec()), "ä");
    }
}
