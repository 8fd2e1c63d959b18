//! `walguard check`: everything that archiving and restoring need, looked at before it is needed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use walguard::backoff::Chain;
use walguard::capture::probe::{self, Finding, Level};
use walguard::capture::{ConnInfo, logical};
use walguard::capture::{SystemInfo, Walsender};
use walguard::pg::{Lsn, TimelineHistory};
use walguard::repo::backup::Origin;
use walguard::repo::catalog::{Catalog, CatalogScope};
use walguard::repo::changes::Header;
use walguard::repo::cluster::ClusterIdentity;
use walguard::repo::drills::Drill;
use walguard::repo::{RepoError, Repository};
use walguard::restore::binaries;
use walguard::settings::Source;

use crate::Outcome;
use crate::args::CheckArgs;
use crate::context::{self, Context};
use crate::render;

/// WAL that may be on its way without anything being wrong: uploads in flight, and a segment that fills up.
const BEHIND_BYTES_MAX: u64 = 64 << 20;

/// Records of drills in which the last proof is looked for.
const DRILLS_READ: usize = 20;

/// The newest backup may be older than the interval by this factor: it takes time, and the next try may come later.
const BACKUP_AGE_FACTOR: u32 = 2;

pub(crate) async fn run(context: Context, _: CheckArgs) -> anyhow::Result<Outcome> {
    // Wrong usage is no finding.
    let conninfo = context.conninfo()?;
    let repository = context.repository().await?;

    let mut findings = Vec::new();
    let postgres = &context.settings.postgres;
    let is_logical = context.settings.source == Source::Logical;
    let preflight = match is_logical {
        true => logical::preflight(&conninfo, &context.settings.logical, &postgres.slot).await,
        false => probe::preflight(&conninfo, postgres).await,
    };
    match preflight {
        Ok(found) => findings.extend(found),
        Err(error) => findings.push(error_of("server", &error, error.hint())),
    }
    if is_logical {
        for database in context.databases(&conninfo).iter().skip(1) {
            check_database(&context, &conninfo.clone().with_dbname(database), &mut findings).await;
        }
    }
    let connected = match is_logical {
        true => Walsender::connect_to_database(&conninfo).await,
        false => Walsender::connect(&conninfo).await,
    };
    let server = match connected {
        Ok(walsender) => ask(walsender).await,
        Err(_) => None, // the preflight has told
    };
    let identity = check_repository(&repository, server.as_ref(), &mut findings).await;
    if is_logical {
        check_changes(&context, &repository, server.as_ref(), &mut findings).await;
    } else if let Some(identity) = &identity {
        check_archive(&context, &repository, server.as_ref(), &mut findings).await;
        check_programs(identity, &mut findings);
    }
    if is_logical || identity.is_some() {
        check_drills(&context, &repository, &mut findings).await;
    }
    check_spool(&context.settings.spool.dir, context.settings.spool.size_max.as_u64(), &mut findings);
    check_zone(&context, &mut findings);
    let report = Report { findings };
    if context.json {
        render::print_json(&report)?;
    } else {
        render::print(&report.text())?;
    }
    Ok(report.outcome())
}

/// What else is to be said of a further database than of the first.
async fn check_database(context: &Context, conninfo: &ConnInfo, findings: &mut Vec<Finding>) {
    let config = &context.settings.logical;
    let found = async {
        let survey = logical::Survey::ask(&logical::connect(conninfo).await?, config).await?;
        let slot = logical::slot_of(&context.settings.postgres.slot, survey.database);
        logical::preflight(conninfo, config, &slot).await
    };
    let known: Vec<_> = findings.iter().map(|finding| (finding.topic.clone(), finding.text.clone())).collect();
    match found.await {
        Ok(found) => {
            let news = found.into_iter().filter(|found| !known.contains(&(found.topic.clone(), found.text.clone())));
            findings.extend(
                news.map(|found| Finding { text: format!("database {}: {}", conninfo.dbname(), found.text), ..found }),
            );
        }
        Err(error) => {
            let mut found = error_of("server", &error, error.hint());
            found.text = format!("database {}: {}", conninfo.dbname(), found.text);
            findings.push(found);
        }
    }
}

/// What the server says that the rest is compared with.
struct Server {
    system: SystemInfo,
    identity: ClusterIdentity,
}

async fn ask(mut walsender: Walsender) -> Option<Server> {
    let system = walsender.identify_system().await.ok()?;
    let identity = Origin::ask(&mut walsender).await.ok()?.identity();
    Some(Server { system, identity })
}

/// Whether the repository can be used, and is this cluster's.
async fn check_repository(
    repository: &Repository,
    server: Option<&Server>,
    findings: &mut Vec<Finding>,
) -> Option<ClusterIdentity> {
    let topic = "repository";
    let url = repository.url();
    let here = repository.require_identity().await;
    if let Err(error @ RepoError::NotInitialized { .. }) = &here {
        findings.push(error_of(topic, error, error.hint()));
        return None;
    }
    match repository.probe().await {
        Ok(probe) => {
            findings.push(finding(Level::Ok, topic, format!("{url} can be read and written")));
            if !probe.create_once {
                findings.push(warning(
                    topic,
                    "the store does not refuse to write a key twice: two agents on one place would be told late",
                    "make sure that only one agent archives this cluster, or use a store that honours If-None-Match",
                ));
            }
            if let Some(problem) = probe.delete_problem {
                findings.push(warning(
                    topic,
                    format!("nothing can be deleted: {problem}"),
                    "`walguard expire` needs permission to delete; with object lock, retention is the store's own",
                ));
            }
        }
        Err(error) => {
            findings.push(error_of(topic, &error, error.hint()));
            return None;
        }
    }
    let identity = match (here, server) {
        (Err(error), _) => Err(error_of("cluster", &error, error.hint())),
        (Ok(here), None) => Ok(here),
        (Ok(here), Some(server)) => match here.check_same(&server.identity) {
            Ok(()) => Ok(here),
            Err(mismatch) => {
                let hint = "point --pg at the right server, or give this one a place of its own with --cluster";
                Err(error("cluster", format!("{url} belongs to another cluster: {mismatch}"), hint))
            }
        },
    };
    match identity {
        Ok(here) => {
            let text = format!("system identifier {}, PostgreSQL {}", here.system_id, here.server_version.major());
            findings.push(finding(Level::Ok, "cluster", text));
            Some(here)
        }
        Err(found) => {
            findings.push(found);
            None
        }
    }
}

/// Whether there are backups, and WAL without a hole from the newest to now.
async fn check_archive(
    context: &Context,
    repository: &Repository,
    server: Option<&Server>,
    findings: &mut Vec<Finding>,
) {
    let now = Timestamp::now();
    let catalog = match repository.catalog(CatalogScope::WithoutWal).await {
        Ok(catalog) => catalog,
        Err(error) => return findings.push(error_of("archive", &error, error.hint())),
    };
    let newest = catalog.backups.iter().max_by_key(|backup| backup.stop_time);
    let Some(newest) = newest else {
        findings.push(warning(
            "backups",
            "there is no base backup yet: nothing can be restored",
            "take one with `walguard backup`",
        ));
        let scope = CatalogScope::WalFrom(server.map_or(Lsn::ZERO, |server| server.system.flush_lsn));
        return match repository.catalog(scope).await {
            Ok(catalog) => findings.extend(server.map(|server| freshness(&catalog, server, None, now))),
            Err(error) => findings.push(error_of("archive", &error, error.hint())),
        };
    };
    let ended = newest.stop_time.timestamp();
    let text = format!(
        "{} of them, the newest of {} ({})",
        catalog.backups.len(),
        render::time(render::whole_seconds(ended), &context.zone),
        render::age(ended, now)
    );
    let interval = context.settings.backup.interval.filter(|interval| !interval.is_zero());
    let age = Duration::try_from(now.duration_since(ended)).unwrap_or_default();
    findings.push(match interval {
        Some(interval) if age > interval * BACKUP_AGE_FACTOR => warning(
            "backups",
            format!("{text}; one was due after {}", render::duration(interval)),
            "see why with `walguard status`, or take one with `walguard backup`",
        ),
        _ => finding(Level::Ok, "backups", text),
    });
    if newest.bad_pages > 0 {
        findings.push(warning(
            "backups",
            format!("the newest backup holds {} pages whose checksum is wrong", newest.bad_pages),
            "the database itself is damaged: run `pg_amcheck`, and keep older backups until that is mended",
        ));
    }
    match repository.catalog(CatalogScope::WalFrom(newest.start)).await {
        Ok(catalog) => {
            findings.extend(server.map(|server| freshness(&catalog, server, Some(newest.start), now)));
            let gaps: Vec<_> = catalog.gaps.iter().filter(|gap| gap.to > newest.start).collect();
            findings.extend(gaps.iter().map(|gap| {
                error(
                    "gap",
                    format!(
                        "WAL of timeline {} from {} to {} was lost: {}",
                        gap.timeline, gap.from, gap.to, gap.reason
                    ),
                    "take a base backup now: `walguard backup`; moments in the gap cannot be restored",
                )
            }));
        }
        Err(error) => findings.push(error_of("archive", &error, error.hint())),
    }
}

/// Whether there are change logs, and how far they are behind the server.
async fn check_changes(
    context: &Context,
    repository: &Repository,
    server: Option<&Server>,
    findings: &mut Vec<Finding>,
) {
    let topic = "changes";
    let last = async {
        let mut last: Option<Header> = None;
        for database in repository.changed_databases().await? {
            if let Some(name) = repository.last_changes(database, Lsn::MAX).await? {
                let header = repository.changes(name).await?.header;
                last = Some(match last {
                    Some(last) if last.to >= header.to => last,
                    _ => header,
                });
            }
        }
        Ok::<_, RepoError>(last)
    };
    findings.push(match last.await {
        Err(error) => error_of(topic, &error, error.hint()),
        Ok(None) => warning(topic, "no changes are kept yet", "start the agent: `walguard run`"),
        Ok(Some(last)) => {
            let age = render::age(last.made_at, Timestamp::now());
            let behind = server.map_or(0, |server| server.system.flush_lsn.saturating_sub(last.to));
            let text = format!(
                "of {} kept to {}, {} behind the server, last written {age}",
                last.database_name,
                last.to,
                render::bytes(behind)
            );
            if behind > BEHIND_BYTES_MAX {
                warning(topic, text, "is the agent running, and keeping up? `walguard status` tells")
            } else {
                finding(Level::Ok, topic, text)
            }
        }
    });
    match repository.catalog(CatalogScope::WithoutWal).await {
        Ok(catalog) => findings.extend(catalog.gaps.iter().map(|gap| {
            let at = render::time(render::whole_seconds(gap.at), &context.zone);
            warning(
                "gap",
                format!("changes from {} to {} were lost, noticed {at}: {}", gap.from, gap.to, gap.reason),
                "one slot serves one agent; let it hold more WAL (max_slot_wal_keep_size)",
            )
        })),
        Err(error) => findings.push(error_of(topic, &error, error.hint())),
    }
}

/// How far the archive is behind the server, and whether it is whole `from` there.
fn freshness(catalog: &Catalog, server: &Server, from: Option<Lsn>, now: Timestamp) -> Finding {
    let Server { system, .. } = server;
    let topic = "archive";
    let wal = catalog.timelines.get(&system.timeline);
    let Some((wal, end)) = wal.and_then(|wal| Some((wal, wal.ranges.end()?))) else {
        return warning(
            topic,
            format!("no WAL of the server's timeline {} is archived yet", system.timeline),
            "start the agent: `walguard run`",
        );
    };
    let root = TimelineHistory::root(system.timeline);
    let path = wal.history.as_ref().unwrap_or(&root);
    if let Some(from) = from
        && let Err(missing) = catalog.covered(path, from, end)
    {
        return error(
            topic,
            missing.to_string(),
            "moments after that cannot be restored from the backups before it: take one with `walguard backup`",
        );
    }
    let behind = system.flush_lsn.saturating_sub(end);
    let stored = wal.newest_at.map(|at| format!(", last written {}", render::age(at, now))).unwrap_or_default();
    let text = format!("archived to {end}, {} behind the server{stored}", render::bytes(behind));
    if behind > BEHIND_BYTES_MAX {
        return warning(topic, text, "is the agent running, and keeping up? `walguard status` tells");
    }
    finding(Level::Ok, topic, text)
}

/// Whether the spool can be written, and has the room that its budget promises.
fn check_spool(dir: &Path, size_max: u64, findings: &mut Vec<Finding>) {
    // The agent makes what is missing; what counts is what is there.
    let existing = dir.ancestors().find(|place| place.exists()).unwrap_or(Path::new("/"));
    let topic = "spool";
    let shown = dir.display();
    if let Err(problem) = rustix::fs::access(existing, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK) {
        let problem = io::Error::from(problem);
        let hint = format!(
            "let the agent's user write there, or choose another place with --spool (ls -ld {})",
            existing.display()
        );
        findings.push(error(topic, format!("{shown} cannot be written: {problem}"), hint));
        return;
    }
    match rustix::fs::statvfs(existing) {
        Ok(disk) => {
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            let text = format!("{shown} has {} free; it may hold {}", render::bytes(free), render::bytes(size_max));
            findings.push(if free < size_max {
                warning(topic, text, "lower `spool.size_max` or make room: a full disk stops the reading of WAL")
            } else {
                finding(Level::Ok, topic, text)
            });
        }
        Err(problem) => findings.push(error(
            topic,
            format!("ask for the free space of {shown}: {}", io::Error::from(problem)),
            "look at the disk with `df -h`",
        )),
    }
}

/// Whether a restore finds PostgreSQL's programs here. It may well run on another machine, so this is no error.
fn check_programs(identity: &ClusterIdentity, findings: &mut Vec<Finding>) {
    let (topic, major) = ("restore", identity.server_version.major());
    let given = context::pg_bin_dir();
    findings.push(match binaries::find(major, given.as_deref(), std::env::var_os("PATH").as_deref()) {
        Ok(found) => finding(
            Level::Ok,
            topic,
            format!("PostgreSQL {} can be started from {}", found.version, found.dir.display()),
        ),
        Err(_) => warning(
            topic,
            format!("PostgreSQL {major} is not installed on this machine"),
            "install its server where you would restore, or name its directory with WALGUARD_PG_BIN_DIR",
        ),
    });
}

/// Whether a restore was proved to work, and whether that will go on.
async fn check_drills(context: &Context, repository: &Repository, findings: &mut Vec<Finding>) {
    let (topic, config, now) = ("drill", &context.settings.drill, Timestamp::now());
    let drills = match repository.drills(DRILLS_READ).await {
        Ok(drills) => drills,
        Err(error) => return findings.push(error_of(topic, &error, error.hint())),
    };
    let is_root = rustix::process::geteuid().is_root();
    if !config.every.is_zero() && is_root {
        findings.push(warning(
            topic,
            "run as root, as this is, the agent can make no drill: PostgreSQL does not run as root",
            "run it as the user that PostgreSQL runs as, or let that user's timer run `walguard drill`",
        ));
    }
    if !config.every.is_zero() {
        findings.extend(check_scratch(&config.scratch_dir, restored_bytes(repository).await));
    }
    let look = "see them with `walguard drill list`, and make one with `walguard drill`";
    // Of each database, where there are several, the last counts; of the cluster there is one.
    let last: BTreeMap<_, _> = drills.iter().map(|drill| (&drill.database, drill)).collect();
    if let Some((last, problem)) = last.values().find_map(|last| Some((*last, last.problem()?))) {
        let ended = render::age(last.finished_at, now);
        let of = last.database.as_ref().map(|name| format!(" of database {name}")).unwrap_or_default();
        let hint = last.hint.as_deref().unwrap_or(look);
        let text = format!("the last one{of}, {ended}, {}: {problem}", last.outcome.as_str());
        findings.push(warning(topic, text, hint));
        return;
    }
    // None failed, so the last are proofs; the oldest of them is that of which all can be said.
    let proven = last.values().min_by_key(|drill| drill.finished_at);
    let age = |drill: &Drill| Duration::try_from(now.duration_since(drill.finished_at)).unwrap_or_default();
    findings.push(match (proven, config.age_max()) {
        (Some(proven), Some(max)) if age(proven) > max => {
            let text = format!("a restore was last proved to work {}", render::age(proven.finished_at, now));
            warning(topic, format!("{text}, and should be every {}", render::duration(max)), look)
        }
        (Some(proven), _) => {
            let text = format!("a restore was proved to work {}", render::age(proven.finished_at, now));
            finding(Level::Ok, topic, text)
        }
        (None, Some(_)) => finding(Level::Ok, topic, "none was made yet; the agent makes one when it is due"),
        (None, None) => Finding {
            hint: Some("set `drill.every`, or make one now with `walguard drill`".to_owned()),
            ..finding(Level::Ok, topic, "none is set up: nothing proves that a restore works before you need it")
        },
    });
}

/// What a restore takes of a disk: the newest backup, or the largest base of a database. What cannot be read is told elsewhere.
async fn restored_bytes(repository: &Repository) -> u64 {
    let backups = repository.backups().await.unwrap_or_default();
    if let Some(newest) = backups.iter().max_by_key(|backup| backup.stop_time) {
        return newest.content_bytes;
    }
    let mut largest = 0;
    for database in repository.changed_databases().await.unwrap_or_default() {
        let bases = repository.bases(database).await.unwrap_or_default();
        largest = bases.last().map_or(0, |base| base.content_bytes).max(largest);
    }
    largest
}

/// Whether a drill can write where it should, and a base backup of `needed` bytes has room there.
fn check_scratch(dir: &Path, needed: u64) -> Option<Finding> {
    let (topic, shown) = ("drill", dir.display());
    // The directory itself is made, those above it are not.
    let existing = [Some(dir), dir.parent()].into_iter().flatten().find(|place| place.exists());
    let Some(existing) = existing else {
        let hint = "make it, for the agent's user, or name another with `drill.scratch_dir`";
        return Some(warning(topic, format!("{shown} is not there, nor what it would lie in"), hint));
    };
    if let Err(problem) = rustix::fs::access(existing, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK) {
        let problem = io::Error::from(problem);
        let hint = "let the agent's user write there, or name another place with `drill.scratch_dir`";
        return Some(warning(topic, format!("{} cannot be written: {problem}", existing.display()), hint));
    }
    let disk = rustix::fs::statvfs(existing).ok()?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    (free / 100 * 90 < needed).then(|| {
        let (free, needed) = (render::bytes(free), render::bytes(needed));
        let hint = "make room, or name a larger disk with `drill.scratch_dir`";
        warning(topic, format!("{shown} has {free} free, and a restored backup takes {needed}"), hint)
    })
}

/// Which zone a time without one is read in. A machine without a zone reads all times in UTC, which surprises at 3 am.
fn check_zone(context: &Context, findings: &mut Vec<Finding>) {
    let now = Timestamp::now();
    let shown = render::time(render::whole_seconds(now), &context.zone);
    findings.push(match context.zone.iana_name() {
        Some(name) => {
            finding(Level::Ok, "time zone", format!("times without a zone are read in {name}; now is {shown}"))
        }
        None => warning(
            "time zone",
            format!("the machine's zone has no name; now is {shown}"),
            "set `time.zone` in the settings file, for example to \"Europe/Berlin\"",
        ),
    });
}

fn finding(level: Level, topic: &str, text: impl Into<String>) -> Finding {
    Finding { level, topic: topic.to_owned(), text: text.into(), hint: None }
}

fn warning(topic: &str, text: impl Into<String>, hint: impl Into<String>) -> Finding {
    Finding { hint: Some(hint.into()), ..finding(Level::Warning, topic, text) }
}

fn error(topic: &str, text: impl Into<String>, hint: impl Into<String>) -> Finding {
    Finding { hint: Some(hint.into()), ..finding(Level::Error, topic, text) }
}

fn error_of(topic: &str, cause: &dyn std::error::Error, hint: Option<String>) -> Finding {
    Finding { hint, ..finding(Level::Error, topic, Chain(cause).to_string()) }
}

#[derive(Debug, Serialize)]
struct Report {
    findings: Vec<Finding>,
}

impl Report {
    fn count(&self, level: Level) -> usize {
        self.findings.iter().filter(|finding| finding.level == level).count()
    }

    fn outcome(&self) -> Outcome {
        match (self.count(Level::Error), self.count(Level::Warning)) {
            (0, 0) => Outcome::Done,
            (0, _) => Outcome::Attention,
            (_, _) => Outcome::Failed(crate::report::FAILED),
        }
    }

    fn text(&self) -> String {
        let width = self.findings.iter().map(|finding| finding.topic.len()).max().unwrap_or(0);
        let mut text = String::new();
        for finding in &self.findings {
            let level = match finding.level {
                Level::Ok => render::green("ok     "),
                Level::Warning => render::yellow("warning"),
                Level::Error => render::red("error  "),
            };
            let _ = writeln!(text, "{level}  {:width$}  {}", finding.topic, finding.text);
            if let Some(hint) = &finding.hint {
                let _ = writeln!(text, "{:7}  {:width$}  HINT: {hint}", "", "");
            }
        }
        let (ok, warnings, errors) = (self.count(Level::Ok), self.count(Level::Warning), self.count(Level::Error));
        let _ = writeln!(text, "\n{ok} ok, {warnings} to look at, {errors} that cannot work");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides_the_exit_code() {
        let report = |levels: &[Level]| {
            let findings = levels.iter().map(|level| finding(*level, "topic", "text")).collect();
            Report { findings }.outcome()
        };
        assert_eq!(report(&[Level::Ok]), Outcome::Done);
        assert_eq!(report(&[Level::Ok, Level::Warning]), Outcome::Attention);
        assert_eq!(report(&[Level::Warning, Level::Error, Level::Ok]), Outcome::Failed(1));
    }

    #[test]
    fn a_drill_without_a_place_or_without_room_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let told = |dir: &Path, needed| check_scratch(dir, needed).map(|finding| finding.text).unwrap_or_default();
        assert_eq!(told(folder.path(), 1), "");
        assert_eq!(told(&folder.path().join("new"), 1), "");
        assert!(told(&folder.path().join("not/there"), 1).contains("is not there"));
        assert!(told(folder.path(), u64::MAX).contains("free"));
    }

    #[test]
    fn a_spool_that_cannot_hold_its_budget_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let mut findings = Vec::new();
        check_spool(&folder.path().join("not/there/yet"), 1, &mut findings);
        check_spool(folder.path(), u64::MAX, &mut findings);
        let levels: Vec<_> = findings.iter().map(|finding| finding.level).collect();
        assert_eq!(levels, [Level::Ok, Level::Warning]);
    }
}
