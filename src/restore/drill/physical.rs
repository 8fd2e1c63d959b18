//! A drill with the WAL of a cluster: base backup, replay, and what a server in recovery can be asked.

use std::fs;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use jiff::SignedDuration;
use tokio_util::sync::CancellationToken;

use super::scratch::{Limits, Scratch};
use super::{Moment, RANDOM_MARGIN, RANDOM_TRIES, Request};
use crate::backoff::Chain;
use crate::pg::{Lsn, PgTime, SegmentName};
use crate::progress::Progress;
use crate::repo::backup::{BackupError, manifest};
use crate::repo::catalog::{Catalog, CatalogScope, LsnRange};
use crate::repo::drills::{Drill, ReachedMoment};
use crate::repo::store::StoreError;
use crate::repo::verify::{self, Problem, ProblemKind};
use crate::repo::{RepoError, Repository};
use crate::restore::binaries::Binaries;
use crate::restore::directory;
use crate::restore::error::RestoreError;
use crate::restore::extract::ExtractError;
use crate::restore::instance::{LOG, Listen};
use crate::restore::pages;
use crate::restore::plan::{self, RestorePlan, cancellable};
use crate::restore::proof::{self, Point, Reach, Verdict};
use crate::restore::run::{self, Action, Options, Start};
use crate::restore::standby;
use crate::restore::target::Target;

/// The drill itself, without what comes before and after.
pub(super) async fn carry_out(
    repo: &Repository,
    request: &Request,
    (scratch, limits): (&Scratch, &Limits),
    (drill, target): (&mut Drill, &mut Option<Target>),
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<(), RestoreError> {
    let config = &request.config;
    let began = Instant::now();
    let catalog = cancellable(cancel, repo.catalog(CatalogScope::Everything)).await??;
    drill.damage = verify::apparent(repo.layout(), &catalog);
    drill.damage.extend(lost_end(repo, &catalog, cancel).await?);
    let plan = choose(repo, request, &catalog, (&mut drill.target, target), progress, cancel).await?;
    drill.seconds.plan = began.elapsed().as_secs_f64();
    drill.backup = Some(plan.backup.label.clone());
    (drill.content_bytes, drill.wal_bytes) = (plan.backup.content_bytes, plan.wal_bytes);
    limits.check(plan.backup.content_bytes)?;

    let options = Options {
        target_dir: scratch.data_dir(),
        tablespaces: tablespaces(scratch, repo, &plan, cancel).await?,
        overwrite: false,
        delta: false,
        wal_ahead: None,
        start: Some(Start {
            binaries: config.pg_bin_dir.clone(),
            path: request.path.clone(),
            listen: Listen { port: None, socket_dir: Some(scratch.socket_dir.clone()) },
            action: Action::Pause,
        }),
        bare: false,
    };
    let prepared = run::prepare(repo, &plan, &options).await?;
    let restored =
        Box::pin(run::run_and_hold(repo, &plan, &prepared, &options, &request.fetch, progress, cancel)).await?;
    let (report, Some(mut instance)) = restored else { return Err(RestoreError::Cancelled) };
    drill.seconds.extract = report.timings.extract.as_secs_f64();
    drill.seconds.replay = report.timings.replay.as_secs_f64();
    let position = plan.reached();
    let time = plan.kept.map(|kept| kept.time);
    drill.reached = Some(ReachedMoment { timeline: position.timeline, lsn: position.lsn, time });
    drill.points = proof::of_restore(&plan, &report);

    let checking = Instant::now();
    let role = report.running.map(|running| running.role).unwrap_or_default();
    let reach = Reach { socket_dir: instance.socket_dir.clone(), port: instance.port, role };
    let wanted = proof::Wanted { amcheck: config.amcheck, checks: &config.checks };
    let asked = async {
        let found = Box::pin(proof::of_server(&reach, plan.incident.as_deref(), wanted, progress, cancel)).await?;
        Ok::<_, RestoreError>((found, cancellable(cancel, proof::has_page_checksums(&reach)).await??))
    };
    let asked = asked.await;
    drill.seconds.checks = checking.elapsed().as_secs_f64();
    let finishing = Instant::now();
    progress.begin("stop the restored server", None);
    instance.stop().await?;
    progress.end();
    let (found, has_checksums) = asked?;
    drill.points.extend(found);
    if let Some(binaries) = &prepared.binaries {
        let point = end_recovery(binaries, &options.target_dir, progress, cancel).await?;
        let is_primary = point.verdict == Verdict::Passed;
        drill.points.push(point);
        drill.points.push(match (is_primary, has_checksums) {
            (true, true) => pages_point(pages::check(&options.target_dir, progress, cancel).await?),
            (true, false) => Point::new("pages", Verdict::Unproved, "not checked: the cluster has no page checksums")
                .with_hint("`pg_checksums --enable` adds them to a stopped cluster"),
            (false, _) => Point::new("pages", Verdict::Unproved, "not checked: not all of them were written"),
        });
    }
    drill.seconds.finish = finishing.elapsed().as_secs_f64();
    Ok(())
}

fn pages_point(read: pages::Pages) -> Point {
    let pages::Pages { files, pages, wrong, named } = read;
    if wrong == 0 {
        return Point::new(
            "pages",
            Verdict::Passed,
            format!("all {pages} pages in {files} files have their right checksum"),
        );
    }
    let text = format!("{wrong} of {pages} pages have a wrong checksum: {}", named.join(", "));
    let hint = "if `walguard verify` finds the backup whole, the original is damaged, too: run `pg_amcheck` there";
    Point::new("pages", Verdict::Failed, text).with_hint(hint)
}

/// Everything up to what the agent proved to be archived must be there: an end that is gone leaves no hole.
async fn lost_end(
    repo: &Repository,
    catalog: &Catalog,
    cancel: &CancellationToken,
) -> Result<Option<Problem>, RestoreError> {
    let Some(proof) = cancellable(cancel, repo.lease()).await??.and_then(|lease| lease.caught_up) else {
        return Ok(None);
    };
    let timeline = proof.position.timeline;
    let end = catalog.timelines.get(&timeline).and_then(|wal| wal.ranges.end()).unwrap_or(Lsn::ZERO);
    // A timeline that was left ends where it was left.
    if end >= proof.position.lsn || catalog.newest_timeline() != Some(timeline) {
        return Ok(None);
    }
    let text = format!(
        "the end of the WAL is gone: it ends at {end}, and the agent had archived it up to {}, everything of {}",
        proof.position.lsn, proof.time
    );
    let range = LsnRange { from: end, to: proof.position.lsn };
    Ok(Some(verify::explain(catalog, ProblemKind::MissingWal, (None, text), Some((timeline, range)), None)))
}

/// The plan of what is to be restored.
async fn choose(
    repo: &Repository,
    request: &Request,
    catalog: &Catalog,
    (told, chosen): (&mut String, &mut Option<Target>),
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<RestorePlan, RestoreError> {
    let planned = |target: Target| {
        let request = plan::Request { target, exclusive: false, timeline: None, backup: None, verify: false };
        async move { plan::plan(repo, &request, progress, cancel).await }
    };
    let named = match (&request.target, request.config.moment) {
        (Some(target), _) => Some(target.clone()),
        (None, Moment::Newest) => Some(Target::Latest),
        (None, Moment::Random) => None,
    };
    if let Some(target) = named {
        *told = target.describe(&jiff::tz::TimeZone::UTC);
        *chosen = Some(target.clone());
        return planned(target).await;
    }
    let Some((from, to)) = span(repo, catalog, cancel).await? else {
        *told = "latest (no span of time to choose from yet)".to_owned();
        *chosen = Some(Target::Latest);
        return planned(Target::Latest).await;
    };
    let mut tried = 0;
    loop {
        tried += 1;
        let at = PgTime::from_micros(fastrand::i64(from.micros()..=to.micros()));
        *told = format!("{at} (a random moment)");
        *chosen = Some(Target::Time(at));
        match planned(Target::Time(at)).await {
            // What is known to be lost is no news, and what was not proved to be archived is no loss.
            Err(RestoreError::MissingWal { missing, .. }) if tried < RANDOM_TRIES && is_recorded(catalog, missing) => {}
            Err(RestoreError::Unreachable { .. }) if tried < RANDOM_TRIES => {}
            other => return other,
        }
    }
}

fn is_recorded(catalog: &Catalog, missing: crate::repo::catalog::Missing) -> bool {
    let covers = |gap: &crate::repo::gap::Gap| {
        gap.timeline == missing.timeline && gap.from <= missing.from && gap.to >= missing.to
    };
    catalog.gaps.iter().any(covers)
}

/// The times from which a random moment is chosen: from the end of the oldest backup to what is surely archived.
async fn span(
    repo: &Repository,
    catalog: &Catalog,
    cancel: &CancellationToken,
) -> Result<Option<(PgTime, PgTime)>, RestoreError> {
    let windows = catalog.windows();
    let Some(from) = windows.iter().map(|window| window.from_time).min() else { return Ok(None) };
    let proved = cancellable(cancel, repo.lease()).await??.and_then(|lease| lease.caught_up).map(|proof| proof.time);
    let stored = windows.iter().filter_map(|window| window.to_time).max();
    let margin = SignedDuration::try_from(RANDOM_MARGIN).unwrap_or_default();
    let stored = stored.and_then(|at| at.checked_sub(margin).ok()).map(PgTime::from);
    let to = proved.max(stored);
    Ok(to.filter(|to| *to > from).map(|to| (from, to)))
}

/// Replays the rest in single-user mode, ends recovery, and shuts down. No other process is started, so no job of an
/// extension runs and nothing is written by anybody else.
///
/// Nobody could connect to look, so recovery does not wait at the target; and from 17 on a process that serves somebody and
/// prepares for readers of a standby at once finds its own slot for cache messages taken (Postgres: `SharedInvalBackendInit`
/// in `storage/ipc/sinvaladt.c`).
async fn end_recovery(
    binaries: &Binaries,
    data_dir: &Path,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Point, RestoreError> {
    progress.begin("make a primary of it", None);
    standby::end_as_recovery(data_dir)?; // a server in single-user mode cannot be a standby
    let name = "primary";
    let log = data_dir.join(LOG);
    let open = || File::options().create(true).append(true).open(&log).map_err(RestoreError::file("open", &log));
    let begin = open()?.metadata().map(|meta| meta.len()).unwrap_or_default();
    let program = binaries.dir.join("postgres");
    let mut command = tokio::process::Command::new(&program);
    command.arg("--single").arg("-D").arg(data_dir).current_dir(data_dir);
    let settings = [
        ("data_directory", data_dir.display().to_string()),
        ("ident_file", data_dir.join("pg_ident.conf").display().to_string()),
        ("recovery_target_action", "promote".to_owned()),
        ("hot_standby", "off".to_owned()),
        ("logging_collector", "off".to_owned()),
        ("log_destination", "stderr".to_owned()),
        ("ssl", "off".to_owned()),
    ];
    for (setting, value) in settings {
        command.arg("-c").arg(format!("{setting}={value}"));
    }
    command.arg("template1");
    command.stdin(Stdio::null()).stdout(open()?).stderr(open()?).kill_on_drop(true);
    let mut child = command.spawn().map_err(RestoreError::file("run", &program))?;
    let status = cancellable(cancel, child.wait()).await?.map_err(RestoreError::file("wait for", &program))?;
    progress.end();
    if status.success() && directory::was_shut_down(data_dir) {
        let text = "recovery was ended, a new timeline begun, and the server shut down cleanly";
        return Ok(Point::new(name, Verdict::Passed, text));
    }
    let text = fs::read(&log).unwrap_or_default();
    let text = text.get(usize::try_from(begin).unwrap_or_default()..).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(text.len().saturating_sub(2_000)..).unwrap_or_default()).into_owned();
    let text = format!("recovery could not be ended ({status}); the end of the log: {}", text.trim());
    Ok(Point::new(name, Verdict::Failed, text).with_hint("look at it with `walguard drill --keep`"))
}

/// Which damage an error speaks of, and what is unreachable because of it. A server that ended by itself does not say, and
/// of WAL it is not known what follows; then all that was to be replayed is read.
pub(super) async fn named(
    repo: &Repository,
    (target, backup): (Option<Target>, &Option<String>),
    error: &RestoreError,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Option<Problem>, RestoreError> {
    let catalog = match cancellable(cancel, repo.catalog(CatalogScope::Everything)).await? {
        Ok(catalog) => catalog,
        Err(error) => {
            tracing::warn!("what follows from the damage is not known: {}", Chain(&error));
            return Ok(None);
        }
    };
    if let Some(problem) = problem_of(repo, &catalog, backup.as_deref(), error) {
        return Ok(Some(problem));
    }
    if !matches!(error, RestoreError::Server { .. } | RestoreError::NotAsPlanned { .. } | RestoreError::Wal(_)) {
        return Ok(None);
    }
    let Some(target) = target else { return Ok(None) };
    let again = plan::Request { target, exclusive: false, timeline: None, backup: backup.clone(), verify: true };
    match Box::pin(plan::plan(repo, &again, progress, cancel)).await {
        Err(RestoreError::Cancelled) => Err(RestoreError::Cancelled),
        Err(found) => Ok(problem_of(repo, &catalog, backup.as_deref(), &found)),
        Ok(_) => Ok(None),
    }
}

fn problem_of(repo: &Repository, catalog: &Catalog, backup: Option<&str>, error: &RestoreError) -> Option<Problem> {
    let of_backup = |key: &str, kind, problem: String| {
        let label = backup.map(str::to_owned);
        verify::explain(catalog, kind, (Some(key.to_owned()), problem), None, label)
    };
    let gone = |key: &str| {
        of_backup(key, ProblemKind::MissingObject, "the backup's manifest names it, and it is not there".to_owned())
    };
    match error {
        RestoreError::MissingWal { missing, .. } => {
            // What a listing shows was told already.
            let range = LsnRange { from: missing.from, to: missing.to };
            let wal = Some((missing.timeline, range));
            let problem = verify::explain(catalog, ProblemKind::MissingWal, (None, missing.to_string()), wal, None);
            let known = verify::apparent(repo.layout(), catalog);
            (!known.iter().any(|known| known.unreachable == problem.unreachable)).then_some(problem)
        }
        RestoreError::DamagedWal { segment, problem, .. } => {
            let name = SegmentName::parse(segment, catalog.identity.segment_size).ok()?;
            let range = LsnRange { from: name.start(), to: name.end() };
            let key = repo.layout().segment(&name);
            let wal = Some((name.timeline, range));
            Some(verify::explain(catalog, ProblemKind::Damaged, (Some(key), problem.clone()), wal, None))
        }
        RestoreError::Backup(error) | RestoreError::Extract(ExtractError::Backup(error)) => match error {
            BackupError::Damaged { key, problem } => Some(of_backup(key, ProblemKind::Damaged, problem.clone())),
            BackupError::Repo(RepoError::Damaged { key, problem }) => {
                Some(of_backup(key, ProblemKind::Damaged, problem.clone()))
            }
            BackupError::Repo(RepoError::Store(StoreError::NotFound { key })) => Some(gone(key)),
            _ => None,
        },
        _ => None,
    }
}

/// Looks up when the transactions ended that cannot be restored: indexes outlive the WAL that they tell of.
pub(super) async fn tell_times(repo: &Repository, damage: &mut [Problem]) {
    let Ok(catalog) = repo.catalog(CatalogScope::WithoutWal).await else { return };
    for unreachable in damage.iter_mut().flat_map(|problem| &mut problem.unreachable) {
        let Some(path) = catalog.history(unreachable.timeline) else { continue };
        let lookup = repo.lookup(path.clone(), catalog.identity.segment_size);
        let range = LsnRange { from: unreachable.from, to: unreachable.to };
        if let Ok((summary, _)) = lookup.summary(range).await {
            (unreachable.from_time, unreachable.to_time) =
                summary.end_times.map_or((None, None), |(from, to)| (Some(from), Some(to)));
        }
    }
}

/// Every tablespace has its place in the scratch directory.
async fn tablespaces(
    scratch: &Scratch,
    repo: &Repository,
    plan: &RestorePlan,
    cancel: &CancellationToken,
) -> Result<Vec<(String, PathBuf)>, RestoreError> {
    let manifest = cancellable(cancel, manifest::read(repo, &plan.backup.label)).await??;
    let outside = manifest.archives.iter().filter(|archive| {
        archive.name.parse::<u32>().is_ok() && archive.location != format!("pg_tblspc/{}", archive.name)
    });
    let places: Vec<_> =
        outside.map(|archive| (archive.name.clone(), scratch.dir.join(format!("space-{}", archive.name)))).collect();
    Ok(places)
}
