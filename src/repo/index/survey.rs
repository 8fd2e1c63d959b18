//! Does an index say what is in its segment? Pure.

use super::format::SegmentIndex;
use crate::decode::rmgr::xact;
use crate::decode::{Reader, Source};
use crate::pg::{Lsn, PgTime, SegmentName};

/// What a segment holds as far as it can be told from its bytes alone.
#[derive(Debug)]
pub struct Survey {
    name: SegmentName,
    reader: Reader,
    records: u64,
    last: Option<(Lsn, Lsn)>,
    ends: Vec<(Lsn, PgTime, bool)>,
    /// Some record could not be read: nothing is known of what follows.
    is_stuck: bool,
}

impl Survey {
    /// Of a segment whose bytes are given from its beginning on.
    pub fn new(source: Source, name: SegmentName) -> Self {
        let reader = Reader::at_page(source, name.start());
        Self { name, reader, records: 0, last: None, ends: Vec::new(), is_stuck: false }
    }

    /// Takes the next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.is_stuck {
            return;
        }
        self.reader.push(bytes);
        loop {
            let record = match self.reader.next_record() {
                Ok(Some(record)) => record,
                Ok(None) => return,
                Err(_) => break,
            };
            let Ok(end) = xact::read(&record) else { break };
            self.records += 1;
            self.last = Some((record.lsn, record.end));
            if let Some(end) = end {
                self.ends.push((record.lsn, end.time, end.committed));
            }
        }
        self.is_stuck = true;
    }

    /// What `index` says that is not so; `None` if it agrees. Of WAL that cannot be read nothing is said.
    pub fn contradiction(&self, index: &SegmentIndex) -> Option<&'static str> {
        if self.is_stuck {
            return None;
        }
        // The last record may go on in the next segment: then it was not seen.
        let goes_on = index.last.is_some_and(|(_, end)| end > self.name.end());
        if self.records + u64::from(goes_on) != index.records {
            return Some("tells of another number of records than the segment holds");
        }
        if !goes_on && self.last != index.last {
            return Some("names another last record than the segment's");
        }
        let unseen = usize::from(goes_on && index.ends_with_transaction);
        let seen = index.ends.iter().map(|end| (end.lsn, end.time, end.committed));
        if index.ends.len() != self.ends.len() + unseen || !self.ends.iter().copied().eq(seen.take(self.ends.len())) {
            return Some("tells of other ends of transactions than the segment holds");
        }
        None
    }
}
