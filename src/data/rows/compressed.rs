//! Decompression of gzip and zstd files, with a limit on the decompressed size.

use std::io::{self, Read};

/// The largest decompressed size in bytes.
const MAX_BYTES: u64 = 16 << 30;
/// The decompressed size in bytes that is accepted for any compressed size.
const FREE_BYTES: u64 = 64 << 20;
/// The largest decompressed size beyond [`FREE_BYTES`], as a multiple of the compressed size. Text seldom compresses to
/// less than a tenth.
const MAX_RATIO: u64 = 200;

/// The reason why a file was not decompressed.
#[derive(Debug)]
pub enum Fault {
    Damaged(String),
    /// The decompressed size is larger than this many bytes.
    Large(u64),
}

/// The compression of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    /// The compression that a file's magic bytes indicate.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x1f, 0x8b, ..] => Some(Compression::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
            // A zstd file may begin with a skippable frame.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Compression::Zstd),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
        }
    }

    /// The usual extensions of compressed files.
    pub fn endings(self) -> &'static [&'static str] {
        match self {
            Compression::Gzip => &["gz", "gzip"],
            Compression::Zstd => &["zst", "zstd"],
        }
    }

    /// Decompresses the whole file.
    pub fn unpack(self, packed: &[u8]) -> Result<Vec<u8>, Fault> {
        self.unpack_within(packed, (packed.len() as u64).saturating_mul(MAX_RATIO).clamp(FREE_BYTES, MAX_BYTES))
    }

    pub(super) fn unpack_within(self, packed: &[u8], limit: u64) -> Result<Vec<u8>, Fault> {
        let mut plain = vec![];
        let result = match self {
            Compression::Gzip => flate2::read::MultiGzDecoder::new(packed).take(limit + 1).read_to_end(&mut plain),
            Compression::Zstd => frames(packed, limit + 1, &mut plain),
        };
        match result {
            _ if plain.len() as u64 > limit => Err(Fault::Large(limit)),
            Ok(_) => Ok(plain),
            Err(error) => Err(Fault::Damaged(error.to_string())),
        }
    }
}

/// Decompresses the frames of a zstd file in order and appends them to `plain` until it has `most` bytes.
fn frames(packed: &[u8], most: u64, plain: &mut Vec<u8>) -> io::Result<usize> {
    use ruzstd::decoding::StreamingDecoder;
    use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};

    let mut rest = packed;
    while !rest.is_empty() {
        let left = most.saturating_sub(plain.len() as u64);
        if left == 0 {
            break;
        }
        match StreamingDecoder::new(&mut rest) {
            Ok(mut frame) => {
                frame.by_ref().take(left).read_to_end(plain)?;
                let frame = frame.into_frame_decoder();
                let (said, found) = (frame.get_checksum_from_data(), frame.get_calculated_checksum());
                if frame.is_finished() && said.is_some() && said != found {
                    return Err(io::Error::other("its checksum does not match its content"));
                }
            }
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                rest = rest.get(length as usize..).ok_or_else(|| io::Error::other("a frame ends early"))?;
            }
            Err(error) => return Err(io::Error::other(error)),
        }
    }
    Ok(plain.len())
}
