//! Content to stored bytes and back: one zstd frame that carries its content's size and checksum.
//!
//! What is stored is a plain zstd file, so `zstd -d` reads it without walguard. (Format: RFC 8878.)

use std::io::Read;

/// The compression level that the settings default to: on heap and WAL bytes level 1 is faster than 3 and not larger.
pub const LEVEL_DEFAULT: i32 = 1;

/// The largest window that a frame from the repository may ask for, as a power of two: 8 MiB, what every reader must
/// support by RFC 8878. Our own frames at every level up to 19 stay within it.
const WINDOW_LOG_MAX: u32 = 23;

/// Compresses with one context for many frames: a context costs about a megabyte to set up.
pub struct Compressor {
    inner: zstd::bulk::Compressor<'static>,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").finish_non_exhaustive()
    }
}

impl Compressor {
    /// A compressor at `level`: 1 to 19, or negative for speed above all. Levels outside are clamped by zstd.
    ///
    /// # Panics
    /// If zstd cannot allocate its context.
    pub fn new(level: i32) -> Self {
        let mut inner = zstd::bulk::Compressor::new(level).expect("zstd makes a context");
        inner.include_checksum(true).expect("a fresh context takes the checksum flag");
        inner.include_contentsize(true).expect("a fresh context takes the content size flag");
        let window = zstd::zstd_safe::CParameter::WindowLog(WINDOW_LOG_MAX);
        if level >= 17 {
            inner.set_parameter(window).expect("a fresh context takes a window size");
        }
        Self { inner }
    }

    /// One frame that holds `content`.
    ///
    /// # Panics
    /// If zstd cannot allocate memory.
    pub fn compress(&mut self, content: &[u8]) -> Vec<u8> {
        let mut stored = Vec::new();
        self.compress_into(content, &mut stored);
        stored
    }

    /// Replaces what `stored` holds by one frame that holds `content`. A buffer that is used again costs no allocation.
    ///
    /// # Panics
    /// If zstd cannot allocate memory.
    pub fn compress_into(&mut self, content: &[u8], stored: &mut Vec<u8>) {
        stored.clear();
        stored.reserve(zstd::zstd_safe::compress_bound(content.len()));
        self.inner.compress_to_buffer(content, stored).expect("zstd compresses any bytes into its own bound");
    }
}

/// One frame that holds `content`, compressed at `level`.
///
/// # Panics
/// If zstd cannot allocate memory.
pub fn compress(content: &[u8], level: i32) -> Vec<u8> {
    Compressor::new(level).compress(content)
}

/// The content of `stored`, which must be exactly one frame of at most `limit` content bytes. The frame's checksum, if
/// it has one, is verified.
///
/// # Errors
/// If the bytes are not one whole, undamaged frame, or hold more than `limit` bytes.
pub fn decompress(stored: &[u8], limit: usize) -> Result<Vec<u8>, FrameError> {
    check_extent(stored)?;
    if let Some(size) = content_size(stored)? {
        let size = usize::try_from(size).ok().filter(|size| *size <= limit).ok_or(FrameError::TooLarge { limit })?;
        let mut content = Vec::with_capacity(size);
        let mut context = zstd::bulk::Decompressor::new().map_err(|e| FrameError::Damaged(e.to_string()))?;
        context.decompress_to_buffer(stored, &mut content).map_err(|e| FrameError::Damaged(e.to_string()))?;
        return Ok(content);
    }
    // Written by another tool from a pipe: the size shows at the end only.
    let mut content = Vec::new();
    let mut reader = reader(stored)?.take(limit as u64 + 1);
    reader.read_to_end(&mut content).map_err(|e| FrameError::Damaged(e.to_string()))?;
    if content.len() > limit { Err(FrameError::TooLarge { limit }) } else { Ok(content) }
}

/// Replaces `content` by that of `stored`, which must be exactly one frame that says how many bytes it holds: `length`. A
/// buffer that is used again costs no allocation. The frame's checksum, if it has one, is verified.
///
/// # Errors
/// If the bytes are not one whole, undamaged frame, or hold another number of bytes.
pub fn decompress_into(stored: &[u8], length: usize, content: &mut Vec<u8>) -> Result<(), FrameError> {
    content.clear();
    if content_size(stored)? != Some(length as u64) {
        // Written by another tool, or not what it should be.
        *content = decompress(stored, length)?;
        if content.len() != length {
            return Err(FrameError::Damaged(format!("{} bytes instead of {length}", content.len())));
        }
        return Ok(());
    }
    check_extent(stored)?;
    content.reserve(length);
    let mut context = zstd::bulk::Decompressor::new().map_err(|e| FrameError::Damaged(e.to_string()))?;
    context.decompress_to_buffer(stored, content).map_err(|e| FrameError::Damaged(e.to_string()))?;
    if content.len() != length {
        return Err(FrameError::Damaged(format!("{} bytes instead of {length}", content.len())));
    }
    Ok(())
}

/// The contents of the frames that `stored` consists of, one behind the other: at most `limit` bytes in all.
///
/// # Errors
/// If the bytes are not whole, undamaged frames, or hold more than `limit` bytes.
pub fn decompress_all(stored: &[u8], limit: usize) -> Result<Vec<u8>, FrameError> {
    let mut content = Vec::new();
    let mut rest = stored;
    loop {
        let (frame, behind) = split_first(rest)?;
        let left = limit - content.len();
        let more = decompress(frame, left).map_err(|error| match error {
            FrameError::TooLarge { .. } => FrameError::TooLarge { limit },
            damaged => damaged,
        })?;
        if content.is_empty() {
            content = more
        } else {
            content.extend_from_slice(&more)
        }
        if behind.is_empty() {
            return Ok(content);
        }
        rest = behind;
    }
}

/// The first frame of `stored`, and what follows it.
///
/// # Errors
/// If the bytes do not begin with a frame that ends within them.
pub fn split_first(stored: &[u8]) -> Result<(&[u8], &[u8]), FrameError> {
    let extent = zstd::zstd_safe::find_frame_compressed_size(stored)
        .map_err(|code| FrameError::Damaged(zstd::zstd_safe::get_error_name(code).to_owned()))?;
    stored.split_at_checked(extent).ok_or_else(|| FrameError::Damaged("it is cut off".to_owned()))
}

/// Reads the content of one frame piece by piece, in memory bounded by the frame's window (at most 8 MiB). An error of
/// kind [`std::io::ErrorKind::Other`] or `UnexpectedEof` while reading means that the frame is damaged. The size is not
/// limited: the caller takes what it can bear.
///
/// # Errors
/// If the bytes are not one whole frame.
pub fn reader(stored: &[u8]) -> Result<impl Read, FrameError> {
    check_extent(stored)?;
    let mut decoder = zstd::stream::read::Decoder::with_buffer(stored)
        .map_err(|e| FrameError::Damaged(e.to_string()))?
        .single_frame();
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(|e| FrameError::Damaged(e.to_string()))?;
    Ok(decoder)
}

/// The content size that the frame's header announces, if it does. Nothing is verified.
///
/// # Errors
/// If the bytes do not begin like a frame.
pub fn content_size(stored: &[u8]) -> Result<Option<u64>, FrameError> {
    zstd::zstd_safe::get_frame_content_size(stored)
        .map_err(|_| FrameError::Damaged("does not begin like a zstd frame".to_owned()))
}

/// A frame may be damaged in its middle; but where it ends is written in its block headers, and it must end where the
/// object does.
fn check_extent(stored: &[u8]) -> Result<(), FrameError> {
    let (frame, behind) = split_first(stored)?;
    if behind.is_empty() {
        return Ok(());
    }
    Err(FrameError::Damaged(format!("{} bytes, but the frame ends after {}", stored.len(), frame.len())))
}

/// Stored bytes that do not give their content back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not one whole, undamaged frame.
    #[error("not a whole zstd frame: {0}")]
    Damaged(String),
    /// More content than this kind of object can have.
    #[error("holds more than the {limit} bytes that an object of its kind can have")]
    TooLarge {
        /// The bound, in bytes.
        limit: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn content_comes_back_at_every_level() {
        let content: Vec<u8> = (0..300_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for level in [-5, 1, 3, 19, 22] {
            let stored = compress(&content, level);
            assert_eq!(decompress(&stored, content.len()).unwrap(), content, "level {level}");
            assert_eq!(content_size(&stored).unwrap(), Some(content.len() as u64));
            let mut streamed = Vec::new();
            reader(&stored).unwrap().read_to_end(&mut streamed).unwrap();
            assert_eq!(streamed, content);
        }
    }

    #[test]
    fn no_frame_makes_us_allocate_more_than_the_limit() {
        let stored = compress(&vec![0; 1 << 20], 1);
        assert_eq!(decompress(&stored, (1 << 20) - 1), Err(FrameError::TooLarge { limit: (1 << 20) - 1 }));
        // Content of unknown size, as `cat file | zstd` writes it.
        let piped = zstd::stream::encode_all(&[0u8; 100_000][..], 1).unwrap();
        assert_eq!(content_size(&piped).unwrap(), None);
        assert_eq!(decompress(&piped, 100_000).unwrap().len(), 100_000);
        assert_eq!(decompress(&piped, 99_999), Err(FrameError::TooLarge { limit: 99_999 }));
        // A header that promises 2^60 bytes.
        let mut header = vec![0x28, 0xB5, 0x2F, 0xFD, 0b1110_0000];
        header.extend((1u64 << 60).to_le_bytes());
        header.extend([1, 0, 0]);
        assert!(decompress(&header, 1 << 20).is_err());
    }

    #[test]
    fn bytes_behind_the_frame_are_damage() {
        let mut stored = compress(b"content", 1);
        stored.push(0);
        assert!(matches!(decompress(&stored, 100), Err(FrameError::Damaged(_))));
        let mut twice = compress(b"content", 1);
        twice.extend(compress(b"content", 1));
        assert!(matches!(decompress(&twice, 100), Err(FrameError::Damaged(_))));
        assert_eq!(decompress_all(&twice, 14).unwrap(), b"contentcontent");
        assert_eq!(decompress_all(&twice, 13), Err(FrameError::TooLarge { limit: 13 }));
        assert!(matches!(decompress_all(&stored, 100), Err(FrameError::Damaged(_))));
        assert!(matches!(decompress_all(b"", 100), Err(FrameError::Damaged(_))));
        assert!(matches!(decompress(b"", 100), Err(FrameError::Damaged(_))));
    }

    proptest! {
        #[test]
        fn a_flipped_bit_or_a_cut_is_detected(
            content in proptest::collection::vec(0u8..4, 1..3000),
            bit in any::<prop::sample::Index>(),
            cut in any::<prop::sample::Index>(),
        ) {
            let stored = compress(&content, 1);
            let mut flipped = stored.clone();
            let bit = bit.index(stored.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            // A flip in a reserved or unused header bit may leave the content whole; wrong content must not pass.
            if let Ok(read) = decompress(&flipped, content.len()) {
                prop_assert_eq!(&read, &content);
            }
            prop_assert!(decompress(&stored[..cut.index(stored.len())], content.len()).is_err());
        }

        #[test]
        fn any_bytes_are_refused_or_read_within_the_limit(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(read) = decompress(&bytes, 1000) {
                prop_assert!(read.len() <= 1000);
            }
        }
    }
}
