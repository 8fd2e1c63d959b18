//! `walguard index rebuild` and `walguard index status`.

use std::fmt::Write as _;

use serde::Serialize;
use walguard::pg::{Lsn, SegmentName, SegmentSize};
use walguard::repo::catalog::LsnRange;
use walguard::repo::index::rebuild::{IndexStatus, Options, Rebuilt};

use crate::Outcome;
use crate::args::{IndexArgs, IndexRebuildArgs, IndexVerb};
use crate::context::Context;
use crate::render;
use crate::report::UsageError;

/// Failures and holes shown to people. JSON has more.
const SHOWN: usize = 20;

pub(crate) async fn run(context: Context, args: IndexArgs) -> anyhow::Result<Outcome> {
    match args.verb {
        IndexVerb::Rebuild(args) => rebuild(context, args).await,
        IndexVerb::Status(_) => status(context).await,
    }
}

async fn rebuild(context: Context, args: IndexRebuildArgs) -> anyhow::Result<Outcome> {
    let repository = context.repository().await?;
    let cancel = context.cancel_on_signals()?;
    let size = repository.require_identity().await?.segment_size;
    let from = args.from.map(|place| place_of(&place, size)).transpose()?;
    let to = args.to.map(|place| place_of(&place, size)).transpose()?;
    let range = LsnRange {
        from: from.map_or(Lsn::ZERO, |(from, _)| from),
        // Both ends are meant: the segment that is named, or that holds the LSN, is the last one.
        to: to.map_or(Lsn::MAX, |(_, behind)| behind),
    };
    if range.from >= range.to {
        return Err(UsageError::new("--from lies behind --to").into());
    }
    let options = Options { range, timeline: args.timeline, check: args.check, all: args.all };
    let rebuilt = repository.rebuild_indexes(options, &*context.progress(), &cancel).await?;
    if context.json {
        render::print_json(&rebuilt)?;
    } else {
        render::print(&rebuilt_text(&rebuilt, options))?;
    }
    Ok(if rebuilt.complete && rebuilt.failed_total == 0 { Outcome::Done } else { Outcome::Attention })
}

/// A place in the WAL as people name it, and the first one behind it.
fn place_of(text: &str, size: SegmentSize) -> anyhow::Result<(Lsn, Lsn)> {
    if let Ok(segment) = SegmentName::parse(text, size) {
        return Ok((segment.start(), segment.end()));
    }
    match text.parse::<Lsn>() {
        Ok(lsn) => Ok((lsn, Lsn::new(lsn.bytes().saturating_add(1)))),
        Err(_) => {
            let hint = "an LSN looks like 16/B374D848, a segment like 000000010000001600000037";
            Err(UsageError::with_hint(format!("`{text}` is neither an LSN nor a segment"), hint).into())
        }
    }
}

fn rebuilt_text(rebuilt: &Rebuilt, options: Options) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "looked at {} segments, read {}: {} indexes made, {} replaced, {} as they were; {} merged",
        rebuilt.segments,
        render::bytes(rebuilt.wal_bytes),
        rebuilt.made,
        rebuilt.replaced,
        rebuilt.same,
        rebuilt.merged,
    );
    for segment in &rebuilt.waiting {
        let _ = writeln!(text, "{segment} waits for the end of its last record, which is not archived yet");
    }
    for failed in rebuilt.failed.iter().take(SHOWN) {
        let _ = writeln!(text, "FAILED {}: {}", failed.segment, failed.problem);
    }
    let hidden = rebuilt.failed_total.saturating_sub(SHOWN as u64);
    if hidden > 0 {
        let _ = writeln!(text, "... and {hidden} more; --json shows up to a thousand");
    }
    if !options.check && !options.all {
        text += "indexes that were there were not read: --check finds damaged ones and replaces them\n";
    }
    if !rebuilt.complete {
        text += "stopped before the end; the same command goes on from here\n";
    }
    text
}

async fn status(context: Context) -> anyhow::Result<Outcome> {
    let repository = context.repository().await?;
    let status = repository.index_status().await?;
    let has_holes = status.iter().any(|timeline| !timeline.holes.is_empty());
    if context.json {
        render::print_json(&Report { timelines: &status })?;
    } else if status.is_empty() {
        render::print("no WAL is archived")?;
    } else {
        let text: String = status.iter().map(status_text).collect();
        let hint = "`walguard index rebuild` makes what is missing\n";
        render::print(&format!("{text}{}", if has_holes { hint } else { "" }))?;
    }
    Ok(if has_holes { Outcome::Attention } else { Outcome::Done })
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    timelines: &'a [IndexStatus],
}

fn status_text(status: &IndexStatus) -> String {
    let mut text = String::new();
    let _ =
        write!(text, "timeline {}: {} of {} segments have an index", status.timeline, status.indexed, status.segments);
    if status.last_is_waiting {
        text += " (the last one gets it when the next begins)";
    }
    text.push('\n');
    let stored = status.index_bytes + status.merged_bytes;
    let percent = |of: u64| stored as f64 * 100.0 / of.max(1) as f64;
    let _ = writeln!(
        text,
        "  {} in indexes and {} merged ones: {:.2} % of {} of WAL, {:.2} % of the {} that are stored of it",
        render::bytes(stored),
        status.merged,
        percent(status.wal_bytes),
        render::bytes(status.wal_bytes),
        percent(status.wal_stored_bytes),
        render::bytes(status.wal_stored_bytes),
    );
    for hole in status.holes.iter().take(SHOWN) {
        let _ = match hole.segments {
            1 => writeln!(text, "  no index: {}", hole.first),
            many => writeln!(text, "  no index: {} to {}, {many} segments", hole.first, hole.last),
        };
    }
    if status.holes.len() > SHOWN {
        let _ = writeln!(text, "  ... and {} more; --json shows all", status.holes.len() - SHOWN);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_an_lsn_or_a_whole_segment() {
        let size = SegmentSize::DEFAULT;
        let segment = (Lsn::new(0x16_3700_0000), Lsn::new(0x16_3800_0000));
        assert_eq!(place_of("000000010000001600000037", size).unwrap(), segment);
        assert_eq!(place_of("16/37000028", size).unwrap(), (Lsn::new(0x16_3700_0028), Lsn::new(0x16_3700_0029)));
        assert!(place_of("yesterday", size).is_err());
    }
}
