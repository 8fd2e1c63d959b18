//! Changes of transactions that were sent before their commit, kept until that comes: in memory, and on disk when they are
//! many.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use super::RebuildError;
use crate::pg::Xid;

/// Changes that are kept in memory; more go to files.
const MEMORY_BYTES_MAX: usize = 32 << 20;

/// The changes.
#[derive(Debug)]
pub(super) struct Spill {
    dir: PathBuf,
    open: BTreeMap<Xid, Part>,
    bytes: usize,
    files: u64,
}

/// What was sent of one transaction.
#[derive(Debug, Default)]
pub(super) struct Part {
    memory: Vec<u8>,
    file: Option<(PathBuf, File)>,
    /// Subtransactions that were rolled back.
    undone: HashSet<Xid>,
}

impl Spill {
    /// Keeps files in `dir`, which is made if it is not there.
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), open: BTreeMap::new(), bytes: 0, files: 0 }
    }

    /// Adds a message of a transaction.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(super) fn add(&mut self, top: Xid, message: &[u8]) -> Result<(), RebuildError> {
        let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
        let part = self.open.entry(top).or_default();
        part.memory.extend(length.to_be_bytes());
        part.memory.extend_from_slice(message);
        self.bytes += message.len() + 4;
        if self.bytes > MEMORY_BYTES_MAX {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), RebuildError> {
        for part in self.open.values_mut().filter(|part| !part.memory.is_empty()) {
            let path = match &part.file {
                Some((path, _)) => path.clone(),
                None => {
                    self.files += 1;
                    self.dir.join(format!("rebuild-{}-{}", std::process::id(), self.files))
                }
            };
            let failed = |source: io::Error| RebuildError::Spill { path: path.display().to_string(), source };
            let file = match part.file.take() {
                Some((_, file)) => file,
                None => {
                    std::fs::create_dir_all(&self.dir).map_err(failed)?;
                    File::options().read(true).write(true).create_new(true).open(&path).map_err(failed)?
                }
            };
            (&file).write_all(&part.memory).map_err(failed)?;
            self.bytes -= part.memory.len();
            part.memory = Vec::new();
            part.file = Some((path, file));
        }
        Ok(())
    }

    /// A subtransaction is rolled back, or the whole of it.
    pub(super) fn abort(&mut self, top: Xid, sub: Xid) {
        if top == sub {
            drop(self.take(top));
        } else if let Some(part) = self.open.get_mut(&top) {
            part.undone.insert(sub);
        }
    }

    /// What was sent of a transaction; nothing is known of it afterwards.
    pub(super) fn take(&mut self, top: Xid) -> Option<Part> {
        let part = self.open.remove(&top)?;
        self.bytes -= part.memory.len();
        Some(part)
    }

    /// Nothing is open any more.
    pub(super) fn forget(&mut self) {
        self.open.clear();
        self.bytes = 0;
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some((path, _)) = &self.file {
            let _ = std::fs::remove_file(path); // what is left there harms nobody
        }
    }
}

impl Part {
    /// The subtransactions that were rolled back, whose changes do not count.
    pub(super) fn take_undone(&mut self) -> HashSet<Xid> {
        std::mem::take(&mut self.undone)
    }

    /// Its messages, in order, one after the other.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(super) fn messages(&mut self) -> Result<Messages<'_>, RebuildError> {
        let path = self.file.as_ref().map(|(path, _)| path.display().to_string()).unwrap_or_default();
        let file = match &mut self.file {
            Some((_, file)) => {
                let rewound = file.seek(SeekFrom::Start(0));
                rewound.map_err(|source| RebuildError::Spill { path: path.clone(), source })?;
                Some(BufReader::with_capacity(1 << 20, &*file))
            }
            None => None,
        };
        Ok(Messages { file, memory: &self.memory, path })
    }
}

/// See [`Part::messages`].
pub(super) struct Messages<'a> {
    file: Option<BufReader<&'a File>>,
    memory: &'a [u8],
    path: String,
}

impl Messages<'_> {
    /// The next message; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u8>>, RebuildError> {
        let failed = |source: io::Error| RebuildError::Spill { path: self.path.clone(), source };
        if let Some(file) = &mut self.file {
            let mut length = [0; 4];
            match file.read_exact(&mut length) {
                Ok(()) => {
                    let mut message = Vec::new();
                    let length = u64::from(u32::from_be_bytes(length));
                    file.take(length).read_to_end(&mut message).map_err(failed)?;
                    return Ok(Some(message));
                }
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => self.file = None,
                Err(error) => return Err(failed(error)),
            }
        }
        let Some((length, rest)) = self.memory.split_first_chunk::<4>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let Some((message, rest)) = rest.split_at_checked(length) else { return Ok(None) };
        self.memory = rest;
        Ok(Some(message.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xid(number: u32) -> Xid {
        Xid::new(number).unwrap()
    }

    #[test]
    fn what_does_not_fit_into_memory_comes_back_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut spill = Spill::new(&dir.path().join("spill"));
        let message = |number: u32| {
            let mut message = vec![7; 100_000];
            message.extend(number.to_be_bytes());
            message
        };
        for number in 0..700 {
            spill.add(xid(10 + number % 2), &message(number)).unwrap();
        }
        let files = || std::fs::read_dir(dir.path().join("spill")).unwrap().count();
        assert_eq!(files(), 2);
        spill.abort(xid(10), xid(12));
        let mut part = spill.take(xid(10)).unwrap();
        assert_eq!(part.take_undone(), HashSet::from([xid(12)]));
        let mut messages = part.messages().unwrap();
        for number in (0..700).step_by(2) {
            assert!(messages.next().unwrap() == Some(message(number)), "{number}");
        }
        assert_eq!(messages.next().unwrap(), None);
        drop(part);
        spill.abort(xid(11), xid(11));
        assert_eq!(files(), 0);
        assert!(spill.take(xid(11)).is_none());
    }
}
