//! Checksums of records: CRC-32C with the processor's own instruction.

use multiversion::{inherit_target, multiversion};

use super::RecordHeader;

/// Gives the checksum of a record by its header and its body.
pub(super) type RecordChecksum = fn(&[u8; RecordHeader::BYTES], &[u8]) -> u32;

/// From this many bytes on the `crc32c` crate is quicker: it works on three runs of them at once.
#[cfg(target_arch = "x86_64")]
const LONG: usize = 768;

/// The quickest way to a record's checksum on this processor. Most records are short, and for them the `crc32c` crate takes
/// longer to find out how than to do it.
#[multiversion(targets("x86_64+sse4.2"))]
pub(super) fn fastest() -> RecordChecksum {
    multiversion::target::match_target! {
        "x86_64+sse4.2" => {
            use std::arch::x86_64::{_mm_crc32_u32, _mm_crc32_u64};
            #[inherit_target]
            fn in_words(head: &[u8; RecordHeader::BYTES], body: &[u8]) -> u32 {
                word_by_word(head, body, |crc, word| _mm_crc32_u64(crc, word), |crc, half| _mm_crc32_u32(crc, half))
            }
            in_words
        },
        _ => by_crate,
    }
}

/// The checksum of a record on any processor.
pub(super) fn by_crate(head: &[u8; RecordHeader::BYTES], body: &[u8]) -> u32 {
    with_header(crc32c::crc32c(body), head)
}

/// The checksum of a record, given that of its body (Postgres: `ValidXLogRecord` in `access/transam/xlogreader.c`).
pub(super) fn with_header(body: u32, head: &[u8; RecordHeader::BYTES]) -> u32 {
    let (checked, _) = head.split_at(RecordHeader::CHECKED_BYTES);
    crc32c::crc32c_append(body, checked)
}

/// The same as [`by_crate`], given what takes a word, or half of one, into a checksum. Inlined, so that those become one
/// instruction each.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn word_by_word(
    head: &[u8; RecordHeader::BYTES],
    body: &[u8],
    word: impl Fn(u64, u64) -> u64,
    half: impl Fn(u32, u32) -> u32,
) -> u32 {
    let (odd, rest) = body.split_at(body.len() % 8);
    let Some(first) = body.first_chunk().filter(|_| body.len() < LONG) else { return by_crate(head, body) };
    // The odd bytes go first, as the upper part of a word. Zeros before them would make no difference to a checksum that
    // begins with 0; the ones with which it begins are put into the first four bytes, or what of these comes later.
    let ones = u64::from(u32::MAX);
    let bits = 8 * odd.len() as u32; // at most 56
    let upper = (u64::from_le_bytes(*first) ^ ones) << (56 - bits) << 8;
    let mut crc = word(0, upper) ^ (ones >> bits);
    for eight in rest.as_chunks().0 {
        crc = word(crc, u64::from_le_bytes(*eight));
    }
    let [l0, l1, l2, l3, x0, x1, x2, x3, p0, p1, p2, p3, p4, p5, p6, p7, i0, i1, i2, i3, ..] = *head;
    crc = word(crc, u64::from_le_bytes([l0, l1, l2, l3, x0, x1, x2, x3]));
    crc = word(crc, u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7]));
    !half(crc as u32, u32::from_le_bytes([i0, i1, i2, i3])) // a checksum has 32 bits
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_fastest_way_gives_the_checksum_that_the_plain_one_gives(
            head: [u8; RecordHeader::BYTES],
            body in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..80),
                proptest::collection::vec(any::<u8>(), 0..1000),
            ],
        ) {
            prop_assert_eq!(fastest()(&head, &body), by_crate(&head, &body));
        }
    }
}
