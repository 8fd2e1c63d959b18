//! A page image as it was written -> the page.

use super::record::{Image, ImageCompression};
use super::{DecodeError, Fault};
use crate::pg::{BLOCK_SIZE, Lsn};

impl Image<'_> {
    /// The page of [`BLOCK_SIZE`] bytes. `record` is the record that has the image, for errors.
    ///
    /// (Postgres: `RestoreBlockImage` in `access/transam/xlogreader.c`.)
    ///
    /// # Errors
    /// If the image cannot be decompressed to exactly a page without its hole.
    pub fn page(&self, record: Lsn) -> Result<Vec<u8>, DecodeError> {
        let wrong = || DecodeError::damaged(record, Fault::Impossible("a page image that gives no page"));
        let hole = usize::from(self.hole_length);
        let raw_length = BLOCK_SIZE.checked_sub(hole).ok_or_else(wrong)?;
        let raw = match self.compression {
            ImageCompression::None => self.bytes.to_vec(),
            ImageCompression::Pglz => pglz(self.bytes, raw_length).ok_or_else(wrong)?,
            ImageCompression::Lz4 => {
                let mut raw = vec![0; raw_length];
                let length = lz4_flex::block::decompress_into(self.bytes, &mut raw).map_err(|_| wrong())?;
                raw.truncate(length);
                raw
            }
            ImageCompression::Zstd => zstd::bulk::decompress(self.bytes, raw_length).map_err(|_| wrong())?,
        };
        if raw.len() != raw_length {
            return Err(wrong());
        }
        let (head, tail) = raw.split_at_checked(usize::from(self.hole_offset)).ok_or_else(wrong)?;
        let mut page = Vec::with_capacity(BLOCK_SIZE);
        page.extend_from_slice(head);
        page.resize(head.len() + hole, 0);
        page.extend_from_slice(tail);
        Ok(page)
    }
}

/// Decompresses Postgres's own LZ; `None` if the bytes do not give exactly `length`.
///
/// A control byte says of the next eight items, lowest bit first, which are literal bytes (0) and which are copies of what
/// came before (1). A copy is two or three bytes: four bits of length (from 3) and twelve of distance, and one more byte
/// of length where the four are all set. (Postgres: `pglz_decompress` in `common/pg_lzcompress.c`.)
fn pglz(mut source: &[u8], length: usize) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(length);
    let mut next = || {
        let (byte, rest) = source.split_first()?;
        source = rest;
        Some(*byte)
    };
    while out.len() < length {
        let control = next()?;
        for bit in 0..8 {
            if out.len() >= length {
                break;
            }
            if control >> bit & 1 == 0 {
                out.push(next()?);
                continue;
            }
            let (first, second) = (usize::from(next()?), usize::from(next()?));
            let distance = (first & 0xF0) << 4 | second;
            let mut count = (first & 0x0F) + 3;
            if count == 18 {
                count += usize::from(next()?);
            }
            let from = out.len().checked_sub(distance).filter(|_| distance > 0)?;
            // What is copied may reach into what the copy itself writes.
            for at in (from..).take(count.min(length - out.len())) {
                let byte = *out.get(at)?;
                out.push(byte);
            }
        }
    }
    source.is_empty().then_some(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn image(bytes: &[u8], compression: ImageCompression, hole: u16) -> Image<'_> {
        Image { bytes, hole_offset: 100, hole_length: hole, compression, apply: true }
    }

    /// 8092 bytes that differ, around a hole of 100.
    fn raw() -> Vec<u8> {
        (0..BLOCK_SIZE - 100).map(|i| (i / 3) as u8).collect()
    }

    #[test]
    fn an_image_gives_the_page_with_its_hole_of_zeros() {
        let raw = raw();
        let zstd = zstd::bulk::compress(&raw, 1).unwrap();
        let lz4 = lz4_flex::block::compress(&raw);
        for (bytes, compression) in
            [(&raw, ImageCompression::None), (&zstd, ImageCompression::Zstd), (&lz4, ImageCompression::Lz4)]
        {
            let page = image(bytes, compression, 100).page(Lsn::ZERO).unwrap();
            assert_eq!((page.len(), &page[..100], &page[200..]), (BLOCK_SIZE, &raw[..100], &raw[100..]));
            assert!(page[100..200].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn pglz_copies_reach_into_themselves() {
        // Literals `ab`, then 18 + 2 bytes from two before: `abab...`.
        let compressed = [0b100, b'a', b'b', 0x0F, 2, 2];
        assert_eq!(pglz(&compressed, 22).unwrap(), b"ab".repeat(11));
        assert_eq!(pglz(&compressed, 23), None, "too short");
        assert_eq!(pglz(&compressed[..5], 22), None);
        assert_eq!(pglz(&[1, 0, 9], 3), None, "nothing lies before");
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_or_a_page(bytes in prop::collection::vec(any::<u8>(), 0..300), hole in 0_u16..8192) {
            for compression in [ImageCompression::Pglz, ImageCompression::Lz4, ImageCompression::Zstd] {
                if let Ok(page) = image(&bytes, compression, hole).page(Lsn::ZERO) {
                    prop_assert_eq!(page.len(), BLOCK_SIZE);
                }
            }
        }
    }
}
