//! Searches in transport headers: TCP and DCCP options, SCTP chunks.
//!
//! Each takes the packet from the transport header on, and gives 0 for a header cut short, which guards have dropped
//! before (see the field documentation for what the other values mean).

use super::{BEYOND, SctpFlags, SctpRule};
use crate::limits::{DCCP_OPTIONS_MAX, SCTP_CHUNKS_MAX};

const ABSENT: u32 = 0;
const PRESENT: u32 = 1;
const MALFORMED: u32 = 2;

/// net/netfilter/xt_tcpudp.c, `tcp_find_option`.
pub(super) fn tcp_option(kind: u8, header: &[u8]) -> u32 {
    let Some(offset) = header.get(12).map(|byte| usize::from(byte >> 4) * 4) else { return ABSENT };
    if offset <= 20 {
        return ABSENT;
    }
    let Some(options) = header.get(20..offset) else { return MALFORMED };
    // There are at most 40 bytes of them, so the bound is never reached.
    find_option(kind, options, options.len())
}

/// Bytes that each packet type has behind the basic header, in units of 4 (include/linux/dccp.h,
/// `dccp_packet_hdr_len`): request, response, data, ack, data with ack, close request, close, reset, sync, sync with
/// ack; those not assigned are taken for resets.
pub const DCCP_TYPE_WORDS: [u8; 16] = [1, 3, 0, 2, 2, 2, 2, 3, 2, 2, 3, 3, 3, 3, 3, 3];

/// net/netfilter/xt_dccp.c, `dccp_find_option`. The header's length is in byte 4, in words, and its shape in byte 8:
/// bit 0 for long sequence numbers, bits 4 to 1 the packet type (include/uapi/linux/dccp.h, `struct dccp_hdr`).
pub(super) fn dccp_option(kind: u8, header: &[u8]) -> u32 {
    if header.len() < 12 {
        return ABSENT;
    }
    let own = 3 + (header[8] & 1) + DCCP_TYPE_WORDS[usize::from(header[8] >> 1 & 15)];
    if header[4] < own {
        return MALFORMED;
    }
    match header.get(4 * usize::from(own)..4 * usize::from(header[4])) {
        Some(options) => find_option(kind, options, DCCP_OPTIONS_MAX as usize),
        // The kernel does not look whether the packet has them if there are none.
        None if header[4] == own => ABSENT,
        None => MALFORMED,
    }
}

/// An option of this kind among the first `most`. Options 0 and 1 are single bytes; a length of 0 counts as 1.
fn find_option(kind: u8, options: &[u8], most: usize) -> u32 {
    let mut at = 0;
    for _ in 0..most {
        match options.get(at) {
            None => return ABSENT,
            Some(&found) if found == kind => return PRESENT,
            Some(0 | 1) => at += 1,
            Some(_) => at += options.get(at + 1).map_or(1, |&len| usize::from(len).max(1)),
        }
    }
    if at < options.len() { BEYOND } else { ABSENT }
}

/// net/netfilter/xt_sctp.c, `match_packet`. A chunk has its type, flags, and length in bytes, which is rounded up to a
/// multiple of 4 and of which the kernel asks only that it isn't 0.
pub(super) fn sctp_chunks(rule: SctpRule, chunks: &[u32; 8], flags: &[SctpFlags], header: &[u8]) -> u32 {
    if header.len() < 12 {
        return ABSENT;
    }
    let mut missing = *chunks;
    let mut at = 12;
    for _ in 0..SCTP_CHUNKS_MAX {
        let Some(&[kind, has, high, low]) = header.get(at..at + 4) else { return MALFORMED };
        let len = usize::from(u16::from_be_bytes([high, low]));
        if len == 0 {
            return MALFORMED;
        }
        at += len.next_multiple_of(4);
        let (word, bit) = (usize::from(kind / 32), 1 << (kind % 32));
        let fits = chunks[word] & bit != 0
            && flags
                .iter()
                .find(|asked| asked.chunk == kind)
                .is_none_or(|asked| has & asked.mask == asked.value);
        match rule {
            SctpRule::Any if fits => return PRESENT,
            SctpRule::Only if !fits => return ABSENT,
            SctpRule::All if fits => missing[word] &= !bit,
            _ => {}
        }
        if at >= header.len() {
            return match rule {
                SctpRule::Any => ABSENT,
                SctpRule::Only => PRESENT,
                SctpRule::All => (missing == [0; 8]).into(),
            };
        }
    }
    BEYOND
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dccp(kind: u8, long: bool, words: u8, rest: &[u8]) -> Vec<u8> {
        let mut header = vec![0; 12];
        header[4] = words;
        header[8] = kind << 1 | u8::from(long);
        header.extend(rest);
        header
    }

    #[test]
    fn dccp_options_follow_the_packet_types_own_part() {
        // A request has a service code of 4 bytes, with long sequence numbers 4 more.
        assert_eq!(dccp_option(38, &dccp(0, false, 5, &[0, 0, 0, 38, 38, 3, 0, 0])), PRESENT);
        assert_eq!(dccp_option(38, &dccp(0, true, 5, &[0, 0, 0, 38, 38, 3, 0, 0])), ABSENT);
        assert_eq!(dccp_option(38, &dccp(0, true, 4, &[0, 0, 0, 0, 0, 0, 0, 0])), MALFORMED);
        // An option's contents are no options; its length of 0 counts as 1.
        assert_eq!(dccp_option(38, &dccp(2, false, 4, &[40, 4, 38, 38])), ABSENT);
        assert_eq!(dccp_option(38, &dccp(2, false, 4, &[40, 0, 38, 38])), PRESENT);
        assert_eq!(dccp_option(38, &dccp(2, false, 4, &[40, 9, 38, 38])), ABSENT);
        assert_eq!(dccp_option(38, &dccp(2, false, 4, &[1, 0, 38, 38])), PRESENT);
        assert_eq!(dccp_option(38, &dccp(2, false, 4, &[0, 0, 0])), MALFORMED);
        assert_eq!(dccp_option(38, &dccp(2, false, 4, &[0, 0, 0, 38])), PRESENT);
        assert_eq!(dccp_option(38, &dccp(2, false, 3, &[])), ABSENT);
    }

    #[test]
    fn dccp_options_are_followed_to_the_bound() {
        let most = DCCP_OPTIONS_MAX as usize;
        let words = (3 + most / 4 + 1) as u8;
        let mut header = dccp(2, false, words, &vec![1; most + 4]);
        assert_eq!(dccp_option(38, &header), BEYOND);
        header[12 + most] = 38;
        assert_eq!(dccp_option(38, &header), BEYOND);
        header[12 + most - 1] = 38;
        assert_eq!(dccp_option(38, &header), PRESENT);
        header[4] = words - 1;
        header[12 + most - 1] = 1;
        assert_eq!(dccp_option(38, &header), ABSENT);
    }

    fn sctp(chunks: &[[u8; 4]]) -> Vec<u8> {
        let mut packet = vec![0; 12];
        packet.extend(chunks.iter().flatten());
        packet
    }

    fn search(rule: SctpRule, kinds: &[u8], flags: &[SctpFlags], packet: &[u8]) -> u32 {
        let mut map = [0; 8];
        for kind in kinds {
            map[usize::from(kind / 32)] |= 1 << (kind % 32);
        }
        sctp_chunks(rule, &map, flags, packet)
    }

    #[test]
    fn sctp_chunks_any_all_only() {
        let packet = sctp(&[[1, 0, 0, 4], [64, 3, 0, 4], [192, 0, 0, 1]]);
        let of = |rule, kinds: &[u8]| search(rule, kinds, &[], &packet);
        assert_eq!(of(SctpRule::Any, &[0, 64]), PRESENT);
        assert_eq!(of(SctpRule::Any, &[0, 2]), ABSENT);
        assert_eq!(of(SctpRule::Any, &[]), ABSENT);
        assert_eq!(of(SctpRule::All, &[1, 64]), PRESENT);
        assert_eq!(of(SctpRule::All, &[1, 64, 2]), ABSENT);
        assert_eq!(of(SctpRule::All, &[]), PRESENT);
        assert_eq!(of(SctpRule::Only, &[1, 64, 192, 0]), PRESENT);
        assert_eq!(of(SctpRule::Only, &[1, 64]), ABSENT);
        let flags = |value| [SctpFlags { chunk: 64, mask: 3, value }];
        assert_eq!(search(SctpRule::Any, &[64], &flags(3), &packet), PRESENT);
        assert_eq!(search(SctpRule::Any, &[64], &flags(1), &packet), ABSENT);
        assert_eq!(search(SctpRule::All, &[1, 64], &flags(1), &packet), ABSENT);
        assert_eq!(search(SctpRule::Only, &[1, 64, 192], &flags(1), &packet), ABSENT);
        assert_eq!(search(SctpRule::Only, &[1, 64, 192], &flags(3), &packet), PRESENT);
    }

    #[test]
    fn sctp_chunks_that_are_malformed() {
        for rule in [SctpRule::Any, SctpRule::All, SctpRule::Only] {
            assert_eq!(search(rule, &[1], &[], &sctp(&[])), MALFORMED, "no chunk");
            assert_eq!(search(rule, &[1], &[], &sctp(&[[1, 0, 0, 0]])), MALFORMED, "no length");
            assert_eq!(search(rule, &[1], &[], &sctp(&[])[..11]), ABSENT, "no header");
        }
        let cut = [sctp(&[[1, 0, 0, 4]]), vec![1, 0, 0]].concat();
        assert_eq!(search(SctpRule::Any, &[1], &[], &cut), PRESENT, "found before");
        assert_eq!(search(SctpRule::Only, &[1], &[], &cut), MALFORMED);
        assert_eq!(
            search(SctpRule::Only, &[1], &[], &sctp(&[[1, 0, 9, 9]])),
            PRESENT,
            "a length beyond the end"
        );
    }

    #[test]
    fn sctp_chunks_are_followed_to_the_bound() {
        let most = SCTP_CHUNKS_MAX as usize;
        let mut chunks = vec![[1, 0, 0, 4]; most];
        assert_eq!(search(SctpRule::Only, &[1], &[], &sctp(&chunks)), PRESENT);
        assert_eq!(search(SctpRule::Any, &[2], &[], &sctp(&chunks)), ABSENT);
        chunks.push([2, 0, 0, 4]);
        for rule in [SctpRule::Any, SctpRule::All] {
            assert_eq!(search(rule, &[2], &[], &sctp(&chunks)), BEYOND);
        }
        assert_eq!(search(SctpRule::Any, &[1], &[], &sctp(&chunks)), PRESENT);
    }
}
