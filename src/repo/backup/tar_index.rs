//! Reads the tar of a base backup as it passes: what its members are and where their bytes lie. Pure.

use tar::EntryType;
use tar::Header;

use crate::proto;

use super::BackupError;

const BLOCK: usize = 512;

/// A long name or a PAX header is read into memory; a real one is far smaller.
const EXTENSION_BYTES_MAX: u64 = 64 << 10;

/// What the next bytes of the tar are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// So many bytes of headers, padding or trailer.
    Frame(usize),
    /// So many bytes of the latest entry, which is a file; `at` is their place in it.
    Body { length: usize, at: u64 },
}

impl Piece {
    pub(super) const fn length(self) -> usize {
        match self {
            Self::Frame(length) | Self::Body { length, .. } => length,
        }
    }
}

/// Reads one tar, whatever slices it comes in.
#[derive(Debug)]
pub(super) struct TarIndex {
    /// The archive's name, for errors.
    name: String,
    state: State,
    /// Bytes read so far.
    offset: u64,
    header: Box<[u8; BLOCK]>,
    entries: Vec<proto::Entry>,
    /// From extension headers, for the next member.
    next: Extension,
}

#[derive(Debug, Default)]
struct Extension {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
}

#[derive(Debug)]
enum State {
    /// So many bytes of a header are there; the block before was all zero or not.
    Header {
        filled: usize,
        after_zero: bool,
    },
    Body {
        at: u64,
        size: u64,
    },
    Extension {
        kind: EntryType,
        size: u64,
        read: Vec<u8>,
    },
    Padding {
        left: usize,
    },
    /// Both zero blocks are there; only zeroes may follow.
    Trailer,
}

impl TarIndex {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            state: State::Header { filled: 0, after_zero: false },
            offset: 0,
            header: Box::new([0; BLOCK]),
            entries: Vec::new(),
            next: Extension::default(),
        }
    }

    /// The members seen so far; the last may still be under way.
    pub(super) fn entries(&self) -> &[proto::Entry] {
        &self.entries
    }

    /// Bytes read so far.
    pub(super) const fn offset(&self) -> u64 {
        self.offset
    }

    /// Takes the beginning of `bytes`, which must not be empty, and tells what it is. Call again with the rest.
    pub(super) fn read(&mut self, bytes: &[u8]) -> Result<Piece, BackupError> {
        let piece = match &mut self.state {
            State::Header { filled, .. } => {
                let length = bytes.len().min(BLOCK - *filled);
                self.header[*filled..*filled + length].copy_from_slice(&bytes[..length]);
                *filled += length;
                Piece::Frame(length)
            }
            State::Body { at, size } => {
                let length = usize::try_from(*size - *at).unwrap_or(usize::MAX).min(bytes.len());
                let piece = Piece::Body { length, at: *at };
                *at += length as u64;
                piece
            }
            State::Extension { size, read, .. } => {
                let length = usize::try_from(*size).unwrap_or(usize::MAX).saturating_sub(read.len()).min(bytes.len());
                read.extend_from_slice(&bytes[..length]);
                Piece::Frame(length)
            }
            State::Padding { left } => {
                let length = bytes.len().min(*left);
                *left -= length;
                Piece::Frame(length)
            }
            State::Trailer if bytes.iter().all(|b| *b == 0) => Piece::Frame(bytes.len()),
            State::Trailer => return Err(self.fault("data behind the end of the archive")),
        };
        self.offset += piece.length() as u64;
        self.settle()?;
        Ok(piece)
    }

    /// The members, once all bytes are read.
    pub(super) fn finish(self) -> Result<Vec<proto::Entry>, BackupError> {
        match self.state {
            State::Trailer => Ok(self.entries),
            _ => Err(self.fault("the archive is cut off")),
        }
    }

    /// Goes on to the next state if the present one has all its bytes, so that a state never waits for zero bytes.
    fn settle(&mut self) -> Result<(), BackupError> {
        loop {
            let next = match &mut self.state {
                State::Header { filled: BLOCK, after_zero } => {
                    if self.header.iter().all(|b| *b == 0) {
                        if *after_zero { State::Trailer } else { State::Header { filled: 0, after_zero: true } }
                    } else if *after_zero {
                        return Err(self.fault("a member behind a block of zeroes"));
                    } else {
                        self.member()?
                    }
                }
                State::Body { at, size } if at == size => padding(*size),
                State::Extension { kind, size, read } if read.len() as u64 == *size => {
                    let (kind, size, read) = (*kind, *size, std::mem::take(read));
                    self.extend(kind, read)?;
                    padding(size)
                }
                State::Padding { left: 0 } => State::Header { filled: 0, after_zero: false },
                _ => return Ok(()),
            };
            self.state = next;
        }
    }

    /// Reads a whole header and says what follows it.
    fn member(&mut self) -> Result<State, BackupError> {
        let header = Header::from_byte_slice(&self.header[..]);
        let number = |result: std::io::Result<u64>, what| result.map_err(|_| self.fault(what));
        let expected = number(header.cksum().map(u64::from), "a header without a checksum")?;
        let sum = self.header.iter().enumerate().map(|(at, byte)| match at {
            148..156 => u64::from(b' '),
            _ => u64::from(*byte),
        });
        if sum.sum::<u64>() != expected {
            return Err(self.fault("a header with a wrong checksum"));
        }
        let size = number(header.entry_size(), "a member without a size")?;
        let kind = header.entry_type();
        if matches!(
            kind,
            EntryType::GNULongName | EntryType::GNULongLink | EntryType::XHeader | EntryType::XGlobalHeader
        ) {
            if size > EXTENSION_BYTES_MAX {
                return Err(self.fault("an extended header that is too long"));
            }
            return Ok(State::Extension { kind, size, read: Vec::new() });
        }
        let mode = header.mode().map_err(|_| self.fault("a member without a mode"))? & 0o7777;
        let modified = number(header.mtime(), "a member without a time")?;
        let entry_kind = match kind {
            EntryType::Regular | EntryType::Continuous => proto::entry::Kind::File,
            EntryType::Directory => proto::entry::Kind::Directory,
            EntryType::Symlink => proto::entry::Kind::Symlink,
            _ => return Err(self.fault("a member that is neither file, directory nor symlink")),
        };
        let extension = std::mem::take(&mut self.next);
        let path = extension.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let target = match entry_kind {
            proto::entry::Kind::Symlink => {
                extension.target.or_else(|| header.link_name_bytes().map(|t| t.into_owned())).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        let size = match entry_kind {
            proto::entry::Kind::File => extension.size.unwrap_or(size),
            _ => 0, // some writers of tars put a size on directories; no bytes follow
        };
        self.entries.push(proto::Entry {
            path: normalized(&path),
            kind: entry_kind.into(),
            offset: self.offset,
            size,
            mode,
            target,
            modified: i64::try_from(modified).unwrap_or(i64::MAX),
        });
        Ok(State::Body { at: 0, size })
    }

    fn extend(&mut self, kind: EntryType, mut read: Vec<u8>) -> Result<(), BackupError> {
        match kind {
            EntryType::GNULongName | EntryType::GNULongLink => {
                while read.last() == Some(&0) {
                    read.pop();
                }
                let which = if kind == EntryType::GNULongName { &mut self.next.path } else { &mut self.next.target };
                *which = Some(read);
            }
            EntryType::XHeader => {
                for extension in tar::PaxExtensions::new(&read) {
                    let extension = extension.map_err(|_| self.fault("an extended header that cannot be read"))?;
                    let value = extension.value_bytes();
                    match extension.key_bytes() {
                        b"path" => self.next.path = Some(value.to_vec()),
                        b"linkpath" => self.next.target = Some(value.to_vec()),
                        b"size" => {
                            let size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                            self.next.size = Some(size.ok_or_else(|| self.fault("a member without a size"))?);
                        }
                        _ => {}
                    }
                }
            }
            _ => {} // global: comments
        }
        Ok(())
    }

    fn fault(&self, problem: &'static str) -> BackupError {
        BackupError::Tar { archive: self.name.clone(), offset: self.offset, problem }
    }
}

/// Members are filled up with zeroes to whole blocks.
fn padding(size: u64) -> State {
    let over = (size % BLOCK as u64) as usize; // less than a block
    State::Padding { left: if over == 0 { 0 } else { BLOCK - over } }
}

/// Without `./` before it and `/` behind it.
fn normalized(path: &[u8]) -> Vec<u8> {
    let mut path = path;
    while let Some(rest) = path.strip_prefix(b"./") {
        path = rest;
    }
    while let Some(rest) = path.strip_suffix(b"/") {
        path = rest;
    }
    path.to_vec()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A tar as any tool writes it: directories, files of many sizes, long names, a symlink.
    fn sample(long_names: bool) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Directory);
        header.set_mode(0o700);
        header.set_size(0);
        header.set_mtime(17);
        builder.append_data(&mut header.clone(), "./base/", &[][..]).unwrap();
        for size in [0, 1, 511, 512, 513, 20_000] {
            let mut header = if long_names { Header::new_gnu() } else { Header::new_ustar() };
            header.set_mode(0o600);
            header.set_size(size);
            header.set_mtime(18);
            let name = format!("base/{}{size}", if long_names { "long".repeat(60) } else { "short".to_owned() });
            builder.append_data(&mut header, name, &vec![7; size as usize][..]).unwrap();
        }
        header.set_entry_type(EntryType::Symlink);
        header.set_mode(0o777);
        builder.append_link(&mut header, "pg_tblspc/16385", "/elsewhere").unwrap();
        builder.into_inner().unwrap()
    }

    fn read_in(slices: impl IntoIterator<Item = Vec<u8>>) -> Result<Vec<proto::Entry>, BackupError> {
        let mut index = TarIndex::new("base");
        for slice in slices {
            let mut rest = &slice[..];
            while !rest.is_empty() {
                let piece = index.read(rest)?;
                assert!(piece.length() > 0 && piece.length() <= rest.len());
                if let Piece::Body { length, .. } = piece {
                    assert!(rest[..length].iter().all(|b| *b == 7), "only what files hold is told as such");
                }
                rest = &rest[piece.length()..];
            }
        }
        index.finish()
    }

    #[test]
    fn every_member_is_found_where_it_lies() {
        for long_names in [false, true] {
            let tar = sample(long_names);
            let entries = read_in([tar.clone()]).unwrap();
            let mut expected = tar::Archive::new(&tar[..]);
            let mut count = 0;
            for (theirs, ours) in expected.entries().unwrap().zip(&entries) {
                let theirs = theirs.unwrap();
                count += 1;
                assert_eq!(normalized(&theirs.path_bytes()), ours.path);
                assert_eq!((theirs.raw_file_position(), theirs.size()), (ours.offset, ours.size));
                assert_eq!(theirs.header().mode().unwrap(), ours.mode);
            }
            assert_eq!((count, entries.len()), (8, 8));
            assert_eq!(entries[7].target, b"/elsewhere");
            assert_eq!((&entries[0].path[..], entries[0].modified), (&b"base"[..], 17));
        }
    }

    #[test]
    fn a_name_that_is_not_text_is_kept_as_it_is() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = Header::new_ustar();
        header.as_old_mut().name[..6].copy_from_slice(b"caf\xe9/x");
        header.set_mode(0o600);
        header.set_mtime(0);
        header.set_size(0);
        header.set_cksum();
        builder.append(&header, &[][..]).unwrap();
        assert_eq!(read_in([builder.into_inner().unwrap()]).unwrap()[0].path, b"caf\xe9/x");
    }

    #[test]
    fn a_tar_that_is_cut_off_is_refused() {
        let tar = sample(true);
        for length in (0..tar.len()).step_by(256) {
            assert!(read_in([tar[..length].to_vec()]).is_err(), "{length}");
        }
    }

    #[test]
    fn a_damaged_header_is_told_with_its_place() {
        let mut tar = sample(false);
        tar[512 + 3] ^= 1;
        let error = read_in([tar]).unwrap_err();
        assert!(matches!(error, BackupError::Tar { offset: 1024, .. }), "{error:?}");
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_sliced_makes_no_difference(long in any::<bool>(), cuts in prop::collection::vec(1..3_000_usize, 1..40)) {
            let tar = sample(long);
            let (mut slices, mut rest) = (Vec::new(), &tar[..]);
            for cut in cuts.iter().cycle() {
                let (head, tail) = rest.split_at((*cut).min(rest.len()));
                slices.push(head.to_vec());
                rest = tail;
                if rest.is_empty() { break }
            }
            prop_assert_eq!(read_in(slices).unwrap(), read_in([tar]).unwrap());
        }

        #[test]
        fn bytes_from_anywhere_never_panic(mut blocks in prop::collection::vec(any::<[u8; 32]>(), 0..200), at in any::<prop::sample::Index>()) {
            let mut tar = sample(true);
            let at = at.index(tar.len());
            for (slot, byte) in tar[at..].iter_mut().zip(blocks.drain(..).flatten()) { *slot = byte }
            // Whatever is in the bodies' place here, so the check of bodies above does not hold.
            let (mut index, mut rest) = (TarIndex::new("base"), &tar[..]);
            while !rest.is_empty() {
                let Ok(piece) = index.read(rest) else { break };
                rest = &rest[piece.length()..];
            }
        }
    }
}
