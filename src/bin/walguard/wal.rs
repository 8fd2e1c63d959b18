//! `walguard wal explain`: archived WAL, record by record, as `pg_waldump` prints it, with the names of tables.

use std::collections::{HashMap, HashSet};
use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;
use walguard::decode::change::Action;
use walguard::decode::explain::{Explanation, NameOf, explain};
use walguard::decode::{Change, DecodeError, Reader, Record, RmgrId, Source, WalMajor};
use walguard::detect::{Limits, Names, NamesLimits, NamesSnapshot, Observer, Relation};
use walguard::pg::{BLOCK_SIZE, Lsn, Oid, RelFile, SegmentName, SegmentSize, TimelineHistory, TimelineId};
use walguard::repo::catalog::CatalogScope;
use walguard::repo::{RepoError, Repository};

use crate::Outcome;
use crate::args::{ExplainArgs, WalArgs, WalVerb};
use crate::context::Context;
use crate::render::{Lines, PrintError};
use crate::report::UsageError;

/// Bytes given to the reader at a time: a record of a page or two never waits for more, and memory holds little beside
/// the segment.
const PIECE_BYTES: usize = 64 << 10;

pub(crate) async fn run(context: Context, args: WalArgs) -> anyhow::Result<Outcome> {
    match args.verb {
        WalVerb::Explain(args) => run_explain(context, args).await,
    }
}

async fn run_explain(context: Context, args: ExplainArgs) -> anyhow::Result<Outcome> {
    let filter = Filter::new(&args)?;
    let repository = context.repository().await?;
    // Which WAL is there is seen when it is read; histories tell on which timeline it is.
    let catalog = repository.catalog(CatalogScope::WalFrom(Lsn::MAX)).await?;
    let size = catalog.identity.segment_size;
    let place = Place::parse(&args.place, size)?;
    let major = WalMajor::of_server(catalog.identity.server_version).ok_or_else(|| {
        let version = catalog.identity.server_version;
        UsageError::new(format!("this version of walguard cannot read the WAL of PostgreSQL {version}"))
    })?;
    let source = Source { major, segment_size: size, system_id: Some(catalog.identity.system_id) };
    let timeline = args.timeline.or(place.timeline).or_else(|| catalog.newest_timeline()).unwrap_or(TimelineId::FIRST);
    let root = TimelineHistory::root(timeline);
    let path = match catalog.history(timeline) {
        Some(path) => path,
        None if timeline == TimelineId::FIRST || place.timeline == Some(timeline) => &root,
        None => {
            let hint = "`walguard list` shows the timelines that there are";
            return Err(UsageError::with_hint(format!("the repository knows no timeline {timeline}"), hint).into());
        }
    };
    let naming = match args.plain {
        true => None,
        false => {
            let first = SegmentName::at(path.timeline_at(place.from), place.from, size);
            Some(Naming::new(source, repository.names_before(path, &first, major).await?))
        }
    };
    let mut dump =
        Dump { lines: Lines::new(), json: context.json, filter, left: args.limit, unreadable: false, naming };
    dump.range(&repository, source, path, &place).await?;
    dump.lines.finish()?;
    Ok(if dump.unreadable { Outcome::Attention } else { Outcome::Done })
}

/// What is to be explained: the records that begin in `[from, to)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    from: Lsn,
    to: Option<Lsn>,
    /// A segment's name says its timeline.
    timeline: Option<TimelineId>,
}

impl Place {
    fn parse(text: &str, size: SegmentSize) -> Result<Self, UsageError> {
        if let Ok(segment) = SegmentName::parse(text, size) {
            let to = Some(segment.end());
            return Ok(Self { from: segment.start(), to, timeline: Some(segment.timeline) });
        }
        let hint = "name a segment (000000010000001600000037), a range (16/B3000000..16/B4000000), or where to begin \
                    (16/B3000000..)";
        let wrong = || UsageError::with_hint(format!("`{text}` is neither a WAL segment nor a range of LSNs"), hint);
        let (from, to) = text.split_once("..").ok_or_else(wrong)?;
        let from = Lsn::from_str(from).map_err(|_| wrong())?;
        let to = if to.is_empty() { None } else { Some(Lsn::from_str(to).map_err(|_| wrong())?) };
        if to.is_some_and(|to| to <= from) {
            return Err(UsageError::with_hint(format!("`{text}` ends before it begins"), hint));
        }
        Ok(Self { from, to, timeline: None })
    }
}

/// Which records are wanted.
#[derive(Clone, Debug, Default)]
struct Filter {
    xid: Option<u32>,
    manager: Option<RmgrId>,
    /// Tablespace, database and number, or the number alone.
    relation: Option<(Option<(u32, u32)>, u32)>,
}

impl Filter {
    fn new(args: &ExplainArgs) -> Result<Self, UsageError> {
        let manager = args.rmgr.as_deref().map(manager).transpose()?;
        let relation = args.relation.as_deref().map(relation).transpose()?;
        Ok(Self { xid: args.xid, manager, relation })
    }

    /// Whether the header fits.
    fn header(&self, record: &Record<'_>) -> bool {
        let xid = record.header.xid.map_or(0, |xid| xid.get());
        self.xid.is_none_or(|wanted| wanted == xid) && self.manager.is_none_or(|wanted| wanted == record.header.rmgr)
    }

    /// Whether a page is touched that is wanted.
    fn pages(&self, explanation: &Explanation) -> bool {
        let Some((place, number)) = self.relation else { return true };
        explanation.blocks.iter().map(|block| block.relation).any(|file| {
            file.number == number && place.is_none_or(|place| place == (file.tablespace.0, file.database.0))
        })
    }
}

fn manager(text: &str) -> Result<RmgrId, UsageError> {
    let known = (0..128).map(RmgrId).filter(|manager| !manager.name().is_empty());
    known.clone().find(|manager| manager.name().eq_ignore_ascii_case(text)).ok_or_else(|| {
        let names: Vec<_> = known.map(RmgrId::name).collect();
        UsageError::with_hint(format!("no resource manager is called `{text}`"), format!("one of {}", names.join(", ")))
    })
}

fn relation(text: &str) -> Result<(Option<(u32, u32)>, u32), UsageError> {
    let numbers: Option<Vec<u32>> = text.split('/').map(|part| part.parse().ok()).collect();
    match numbers.as_deref() {
        Some([number]) => Ok((None, *number)),
        Some([tablespace, database, number]) => Ok((Some((*tablespace, *database)), *number)),
        _ => {
            let hint =
                "name it as the records do: 1663/5/16400, or 16400; `SELECT pg_relation_filepath('table')` tells";
            Err(UsageError::with_hint(format!("`{text}` is not the file of a relation"), hint))
        }
    }
}

/// A record for programs: one line.
#[derive(Debug, Serialize)]
struct Line<'a> {
    lsn: Lsn,
    end: Lsn,
    previous: Lsn,
    xid: u32,
    rmgr: &'a str,
    operation: &'a str,
    length: u32,
    description: &'a str,
    blocks: Vec<BlockLine>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct BlockLine {
    relation: String,
    /// The relation's name; `null` if nobody knows.
    name: Option<String>,
    fork: walguard::pg::Fork,
    block: u32,
    /// Bytes of the page's image; `null` if there is none.
    image_bytes: Option<usize>,
}

/// Records on their way to whoever reads them.
#[derive(Debug)]
struct Dump {
    lines: Lines,
    json: bool,
    filter: Filter,
    /// Records that may still be printed.
    left: Option<u64>,
    /// Some record could not be explained.
    unreadable: bool,
    /// What files are called; `None` if nobody wants to know.
    naming: Option<Naming>,
}

/// What files are called: by the catalogs' rows in the WAL itself, and by the indexes of the segments.
#[derive(Debug)]
struct Naming {
    observer: Box<Observer>,
    /// Databases whose catalogs were looked for.
    databases: HashSet<Oid>,
    indexed: HashMap<RelFile, Arc<Relation>>,
}

impl Naming {
    /// Begins with the names of a snapshot from before; some may have changed since.
    fn new(source: Source, snapshot: Option<(SegmentName, NamesSnapshot)>) -> Self {
        let (_, snapshot) = snapshot.unzip();
        let names = Names::import(source.major, NamesLimits::default(), snapshot.unwrap_or_default());
        let observer = Box::new(Observer::new(names, Limits::default(), false));
        Self { observer, databases: HashSet::new(), indexed: HashMap::new() }
    }

    /// Takes the names in a segment's index. Without one, or with one that cannot be read, there are fewer names.
    async fn segment(&mut self, repository: &Repository, name: &SegmentName) -> Result<(), RepoError> {
        match repository.index(name).await {
            Ok(index) => self.indexed.extend(index.into_iter().flat_map(|index| index.names)),
            Err(RepoError::Damaged { key, problem }) => tracing::warn!("no names from {key}: {problem}"),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn see(&mut self, record: &Record<'_>) {
        // What cannot be read is told as such when it is explained.
        if let Ok(change) = Change::read(record) {
            if let Action::Rows(rows) = &change.action
                && rows.is_surely_catalog()
                && self.databases.insert(rows.file.database)
            {
                self.observer.names_mut().assume_catalogs(rows.file.database, rows.file.tablespace);
            }
            self.observer.see(record, &change);
        }
    }

    fn of(&self, file: RelFile) -> Option<String> {
        let relation = self.observer.names().relation_of_file(file).or_else(|| self.indexed.get(&file).cloned())?;
        Some(relation.full_name())
    }
}

impl Dump {
    /// Reads one segment after the other, as far as the WAL reaches.
    async fn range(
        &mut self,
        repository: &Repository,
        source: Source,
        path: &TimelineHistory,
        place: &Place,
    ) -> anyhow::Result<()> {
        let size = source.segment_size;
        let mut at = place.from.align_down(BLOCK_SIZE as u64);
        let mut reader = Reader::at_page(source, at);
        loop {
            let number = size.segment_of(at);
            let newest = SegmentName { timeline: path.file_timeline(number, size), number, size };
            // The segment with a switch point is there on the newer timeline, unless that wrote nothing yet.
            let own = SegmentName { timeline: path.timeline_at(at), number, size };
            let read = match repository.read_segment(&newest).await {
                Err(error) if error.is_not_found() && own != newest => repository.read_segment(&own).await,
                read => read,
            };
            let read = match read {
                Ok(read) => read,
                Err(error) if error.is_not_found() => return ends(place, reader.proved_to(), at),
                Err(error) => return Err(error.into()),
            };
            if let Some(naming) = &mut self.naming {
                naming.segment(repository, &newest).await?;
            }
            let valid = usize::try_from(read.valid_to).unwrap_or(usize::MAX).min(read.bytes.len());
            let skip = usize::try_from(size.offset_of(at)).unwrap_or(usize::MAX).min(valid);
            for piece in read.bytes.slice(skip..valid).chunks(PIECE_BYTES) {
                reader.push(piece);
                loop {
                    match reader.next_record() {
                        Ok(None) => break,
                        Ok(Some(record)) if record.lsn < place.from => self.name(&record),
                        Ok(Some(record)) if place.to.is_some_and(|to| record.lsn >= to) => return Ok(()),
                        Ok(Some(record)) => self.record(&record)?,
                        Err(DecodeError::Unwritten { at }) => return ends(place, reader.proved_to(), at),
                        Err(error) => {
                            self.lines.flush()?;
                            return Err(error.into());
                        }
                    }
                    if self.left == Some(0) {
                        return Ok(());
                    }
                }
            }
            at = size.end_of(number);
        }
    }

    fn name(&mut self, record: &Record<'_>) {
        if let Some(naming) = &mut self.naming {
            naming.see(record);
        }
    }

    fn record(&mut self, record: &Record<'_>) -> Result<(), PrintError> {
        self.name(record);
        if !self.filter.header(record) {
            return Ok(());
        }
        let explanation = explain(record);
        if explanation.as_ref().is_ok_and(|explanation| !self.filter.pages(explanation)) {
            return Ok(());
        }
        self.unreadable |= explanation.is_err();
        self.left = self.left.map(|left| left.saturating_sub(1));
        let naming = self.naming.as_ref();
        let name_of = |file: RelFile| naming.and_then(|naming| naming.of(file));
        match (self.json, explanation) {
            (false, Ok(explanation)) => self.lines.print(&explanation.named(&name_of)),
            (false, Err(error)) => self.lines.print(&format_args!(
                "rmgr: {:<11} lsn: {}, prev {}, error: {error}",
                record.header.rmgr.name(),
                record.lsn,
                record.header.previous
            )),
            (true, explanation) => {
                let error = explanation.as_ref().err().map(ToString::to_string);
                let explanation = explanation.ok();
                let explanation = explanation.as_ref();
                self.lines.print_json(&Line {
                    lsn: record.lsn,
                    end: record.end,
                    previous: record.header.previous,
                    xid: record.header.xid.map_or(0, |xid| xid.get()),
                    rmgr: explanation.map_or(record.header.rmgr.name(), |explanation| &explanation.manager),
                    operation: explanation.map_or("", |explanation| &explanation.operation),
                    length: record.header.total_length,
                    description: explanation.map_or("", |explanation| &explanation.description),
                    blocks: explanation.map(|explanation| blocks(explanation, &name_of)).unwrap_or_default(),
                    error,
                })
            }
        }
    }
}

fn blocks(explanation: &Explanation, name_of: &NameOf<'_>) -> Vec<BlockLine> {
    let block = |block: &walguard::decode::explain::BlockExplanation| {
        let file = block.relation;
        BlockLine {
            relation: format!("{}/{}/{}", file.tablespace, file.database, file.number),
            name: name_of(file),
            fork: block.fork,
            block: block.number,
            image_bytes: block.image.map(|(bytes, _)| bytes),
        }
    };
    explanation.blocks.iter().map(block).collect()
}

/// The WAL ends at `at`. That is well if no end was asked for, or if the end lies where no record begins any more.
fn ends(place: &Place, proved: Option<Lsn>, at: Lsn) -> anyhow::Result<()> {
    let reached = proved.unwrap_or(at);
    let problem = match (proved, place.to) {
        (None, _) => format!("the repository has no WAL at {}", place.from),
        (Some(_), Some(to)) if reached < to => format!("the WAL in the repository ends at {reached}, before {to}"),
        _ => return Ok(()),
    };
    let hint = "`walguard list` shows what there is; another timeline is named with --timeline";
    Err(UsageError::with_hint(problem, hint).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_segment_or_a_range() {
        let size = SegmentSize::new(16 << 20).unwrap();
        let place = Place::parse("000000020000000100000003", size).unwrap();
        assert_eq!((place.from, place.to), (Lsn::new(0x1_0300_0000), Some(Lsn::new(0x1_0400_0000))));
        assert_eq!(place.timeline, TimelineId::new(2));
        let place = Place::parse("0/10..0/20", size).unwrap();
        assert_eq!((place.from, place.to, place.timeline), (Lsn::new(16), Some(Lsn::new(32)), None));
        assert_eq!(Place::parse("0/10..", size).unwrap().to, None);
        for wrong in ["", "0/10", "..0/10", "x..y", "0/20..0/10", "0/10..0/10", "00000002000000010000000"] {
            assert!(Place::parse(wrong, size).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn managers_are_found_by_name_and_relations_by_file() {
        assert_eq!(manager("heap2").unwrap(), RmgrId::HEAP2);
        assert!(manager("").is_err() && manager("heaps").is_err());
        assert_eq!(relation("16400").unwrap(), (None, 16_400));
        assert_eq!(relation("1663/5/16400").unwrap(), (Some((1663, 5)), 16_400));
        assert!(relation("5/16400").is_err() && relation("orders").is_err());
    }
}
