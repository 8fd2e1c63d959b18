//! `walguard list`.

use std::fmt::Write as _;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use walguard::pg::{CommitPoint, Lsn, Oid};
use walguard::repo::catalog::{BackupInfo, Catalog, CatalogScope, Damage, LsnRange, Window};
use walguard::repo::cluster::ClusterIdentity;
use walguard::repo::gap::Gap;
use walguard::repo::{RepoError, Repository, UnfinishedBackup};
use walguard::settings::Source;

use crate::Outcome;
use crate::args::ListArgs;
use crate::context::Context;
use crate::render;

pub(crate) async fn run(context: Context, _args: ListArgs) -> anyhow::Result<Outcome> {
    let repository = context.initialized_repository().await?;
    if context.settings.source == Source::Logical {
        return of_changes(&context, &repository).await;
    }
    let catalog = repository.catalog(CatalogScope::Everything).await?;
    let unfinished_backups = repository.unfinished_backups().await?;
    let mut restorable = Vec::new();
    for window in catalog.windows() {
        // What cannot be read hinders the listing of nothing else; `verify` says what is wrong with it.
        let unread = |place: &str, error: &RepoError| {
            let timeline = window.timeline;
            tracing::warn!(hint = error.hint(), "the {place} of timeline {timeline} cannot be read: {error}");
        };
        let (first_commit, last_commit) = match catalog.history(window.timeline) {
            Some(path) => {
                let first = repository.first_commit(&catalog.identity, path, &window).await;
                let last = repository.last_commit(&catalog.identity, path, &window).await;
                let first = first.inspect_err(|error| unread("beginning", error)).unwrap_or_default();
                (first, last.inspect_err(|error| unread("end", error)).unwrap_or_default())
            }
            None => (None, None),
        };
        restorable.push(Restorable { window, first_commit, last_commit });
    }
    let listing = Listing::new(repository.url(), catalog, unfinished_backups, restorable);
    if context.json {
        render::print_json(&listing)?;
    } else {
        render::print(&listing.text(Timestamp::now(), &context.zone))?;
    }
    Ok(if listing.damaged.is_empty() { Outcome::Done } else { Outcome::Attention })
}

/// What there is of changes that logical replication told.
#[derive(Debug, Serialize)]
struct ChangeListing {
    repository: String,
    cluster: ClusterIdentity,
    databases: Vec<ChangeLog>,
    gaps: Vec<Gap>,
}

#[derive(Debug, Serialize)]
struct ChangeLog {
    database: String,
    oid: Oid,
    timeline: walguard::pg::TimelineId,
    objects: usize,
    /// Changes of transactions that committed behind this place ...
    from: Lsn,
    /// ... and up to this one are there.
    to: Lsn,
    first_made_at: Timestamp,
    last_made_at: Timestamp,
    /// From which it can be rebuilt.
    bases: Vec<Base>,
}

#[derive(Debug, Serialize)]
struct Base {
    label: String,
    time: Timestamp,
    consistent: Lsn,
    rows: u64,
    tables: usize,
    content_bytes: u64,
    stored_bytes: u64,
    left_out: Vec<String>,
}

async fn of_changes(context: &Context, repository: &Repository) -> anyhow::Result<Outcome> {
    let catalog = repository.catalog(CatalogScope::WithoutWal).await?;
    let mut databases = Vec::new();
    for oid in repository.changed_databases().await? {
        let names = repository.changes_after(oid, None).await?;
        let (Some(first), Some(last)) = (names.first(), names.last()) else { continue };
        let (first, last) = (repository.changes(*first).await?.header, repository.changes(*last).await?.header);
        let bases = repository.bases(oid).await?.into_iter().map(|base| Base {
            label: base.label,
            time: base.time,
            consistent: base.consistent,
            rows: base.tables.iter().map(|table| table.rows).sum(),
            tables: base.tables.len(),
            content_bytes: base.content_bytes,
            stored_bytes: base.stored_bytes,
            left_out: base.left_out,
        });
        databases.push(ChangeLog {
            bases: bases.collect(),
            database: last.database_name,
            oid,
            timeline: last.timeline,
            objects: names.len(),
            from: first.name.from,
            to: last.to,
            first_made_at: first.made_at,
            last_made_at: last.made_at,
        });
    }
    let listing =
        ChangeListing { repository: repository.url(), cluster: catalog.identity, databases, gaps: catalog.gaps };
    if context.json {
        render::print_json(&listing)?;
    } else {
        render::print(&listing.text(Timestamp::now(), &context.zone))?;
    }
    Ok(Outcome::Done)
}

impl ChangeListing {
    fn text(&self, now: Timestamp, zone: &TimeZone) -> String {
        let Self { repository, cluster, .. } = self;
        let mut text = format!(
            "{repository}: PostgreSQL {}, system {}, changes by logical replication\n\n",
            cluster.server_version.major(),
            cluster.system_id
        );
        if self.databases.is_empty() {
            text += "no changes are kept yet; start the agent with `walguard run`\n\n";
        } else {
            let mut table = render::table(["database", "from", "to", "from LSN", "to LSN", "objects", "age"]);
            for log in &self.databases {
                table.add_row([
                    log.database.clone(),
                    render::time(render::whole_seconds(log.first_made_at), zone),
                    render::time(render::whole_seconds(log.last_made_at), zone),
                    log.from.to_string(),
                    log.to.to_string(),
                    log.objects.to_string(),
                    render::age(log.last_made_at, now),
                ]);
            }
            text += &(render::table_text(&table) + "\n");
            let mut table = render::table(["database", "base", "of", "age", "at", "rows", "stored", "state"]);
            for log in &self.databases {
                for base in &log.bases {
                    table.add_row([
                        log.database.clone(),
                        base.label.clone(),
                        render::time(render::whole_seconds(base.time), zone),
                        render::age(base.time, now),
                        base.consistent.to_string(),
                        render::number(base.rows),
                        render::bytes(base.stored_bytes),
                        if base.left_out.is_empty() { "whole".to_owned() } else { base.left_out.join("; ") },
                    ]);
                }
            }
            text += &match self.databases.iter().all(|log| log.bases.is_empty()) {
                true => "no base: nothing can be rebuilt; take one with `walguard backup`\n\n".to_owned(),
                false => render::table_text(&table) + "\n",
            };
        }
        for gap in &self.gaps {
            let at = render::time(render::whole_seconds(gap.at), zone);
            let _ = writeln!(text, "gap from {} to {}, noticed {at}: {}", gap.from, gap.to, gap.reason);
        }
        text
    }
}

/// What there is.
#[derive(Debug, Serialize)]
struct Listing {
    repository: String,
    cluster: ClusterIdentity,
    backups: Vec<Backup>,
    unfinished_backups: Vec<UnfinishedBackup>,
    restorable: Vec<Restorable>,
    timelines: Vec<Timeline>,
    gaps: Vec<Gap>,
    damaged: Vec<Damage>,
}

#[derive(Debug, Serialize)]
struct Backup {
    #[serde(flatten)]
    info: BackupInfo,
    /// Some moment can be restored from it: its WAL is there.
    usable: bool,
}

#[derive(Debug, Serialize)]
struct Restorable {
    #[serde(flatten)]
    window: Window,
    /// The first transaction behind the window's first place: a restore may end with it, or before it; `null` if none was
    /// found near that place.
    first_commit: Option<CommitPoint>,
    /// The last transaction that is there; `null` if none was found near the end.
    last_commit: Option<CommitPoint>,
}

#[derive(Debug, Serialize)]
struct Timeline {
    timeline: walguard::pg::TimelineId,
    history_known: bool,
    wal: Vec<LsnRange>,
    stored_bytes: u64,
}

impl Listing {
    fn new(
        repository: String,
        catalog: Catalog,
        unfinished_backups: Vec<UnfinishedBackup>,
        restorable: Vec<Restorable>,
    ) -> Self {
        let is_usable =
            |backup: &BackupInfo| restorable.iter().any(|restorable| restorable.window.backups.contains(&backup.label));
        let backups = catalog.backups.into_iter().map(|info| Backup { usable: is_usable(&info), info }).collect();
        let timelines = catalog.timelines.into_iter().map(|(timeline, wal)| Timeline {
            timeline,
            history_known: wal.history.is_some(),
            wal: wal.ranges.as_slice().to_vec(),
            stored_bytes: wal.stored_bytes,
        });
        Self {
            repository,
            cluster: catalog.identity,
            backups,
            unfinished_backups,
            timelines: timelines.collect(),
            restorable,
            gaps: catalog.gaps,
            damaged: catalog.damaged,
        }
    }

    fn text(&self, now: Timestamp, zone: &TimeZone) -> String {
        let mut text = String::new();
        let stored: u64 = self.timelines.iter().map(|timeline| timeline.stored_bytes).sum();
        let Self { repository, cluster, .. } = self;
        let _ = writeln!(
            text,
            "{repository}: PostgreSQL {}, system {}, {} of WAL in segments of {}\n",
            cluster.server_version.major(),
            cluster.system_id,
            render::bytes(stored),
            render::bytes(cluster.segment_size.bytes()),
        );
        text += &self.backups_text(now, zone);
        text += &self.restorable_text(zone);
        for gap in &self.gaps {
            let Gap { timeline, from, to, reason, at } = gap;
            let at = render::time(render::whole_seconds(*at), zone);
            let _ = writeln!(text, "gap on timeline {timeline} from {from} to {to}, noticed {at}: {reason}");
        }
        for timeline in self.timelines.iter().filter(|timeline| !timeline.history_known) {
            let number = timeline.timeline;
            let _ = writeln!(text, "the history of timeline {number} is missing: nothing on it can be restored");
        }
        for backup in &self.unfinished_backups {
            let age = render::age(backup.newest_at, now);
            let stored = render::bytes(backup.stored_bytes);
            let _ = writeln!(text, "unfinished backup {}: {stored}, last written to {age}", backup.label);
        }
        for damage in &self.damaged {
            let _ = writeln!(text, "damaged: {}: {}", damage.key, damage.problem);
        }
        text
    }

    fn backups_text(&self, now: Timestamp, zone: &TimeZone) -> String {
        if self.backups.is_empty() {
            return "no base backup: nothing can be restored; take one with `walguard backup`\n\n".to_owned();
        }
        let mut table = render::table(["backup", "ended", "age", "timeline", "start", "size", "stored", "state"]);
        for Backup { info, usable } in &self.backups {
            let ended = render::whole_seconds(info.stop_time.timestamp());
            let pages = match (info.bad_pages, info.page_checksums_verified) {
                (0, true) => "pages verified".to_owned(),
                (0, false) => "pages without checksums".to_owned(),
                (bad, _) => format!("{bad} BAD PAGES"),
            };
            table.add_row([
                info.label.clone(),
                render::time(ended, zone),
                render::age(ended, now),
                info.timeline.to_string(),
                info.start.to_string(),
                render::bytes(info.content_bytes),
                render::bytes(info.stored_bytes),
                if *usable { pages } else { format!("NOT RESTORABLE: its WAL is not all there; {pages}") },
            ]);
        }
        render::table_text(&table) + "\n"
    }

    fn restorable_text(&self, zone: &TimeZone) -> String {
        if self.restorable.is_empty() {
            return "nothing is restorable\n\n".to_owned();
        }
        let mut table =
            render::table(["timeline", "from the first commit", "to the last commit", "from LSN", "to LSN", "backups"]);
        for Restorable { window, first_commit, last_commit } in &self.restorable {
            let last = match (last_commit, window.to_time) {
                (Some(commit), _) => render::time(commit.time.timestamp(), zone),
                (None, Some(stored)) => format!("stored {}", render::time(render::whole_seconds(stored), zone)),
                (None, None) => "a hole in the WAL".to_owned(),
            };
            let first = match first_commit {
                Some(commit) => render::time(commit.time.timestamp(), zone),
                None => {
                    format!("backup of {}", render::time(render::whole_seconds(window.from_time.timestamp()), zone))
                }
            };
            table.add_row([
                window.timeline.to_string(),
                first,
                last,
                window.from.to_string(),
                window.to.to_string(),
                window.backups.len().to_string(),
            ]);
        }
        render::table_text(&table) + "\n"
    }
}
