//! A drill with the changes of a database: it is rebuilt in a server of its own, and every table's rows are counted.
//!
//! The server is a primary of a new cluster, without a TCP port. Nothing of the original's is set up in it but the database:
//! subscriptions come back disabled, jobs of extensions need settings that it has not, and it archives nothing.

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::scratch::{Limits, Scratch};
use super::{Moment, RANDOM_TRIES, Request};
use crate::pg::{Lsn, Oid, PgTime};
use crate::progress::Progress;
use crate::repo::Repository;
use crate::repo::drills::{Drill, ReachedMoment};
use crate::repo::verify::{Problem, ProblemKind, Unreachable};
use crate::restore::error::RestoreError;
use crate::restore::instance::Listen;
use crate::restore::plan::cancellable;
use crate::restore::proof::{self, Check, Point, Verdict};
use crate::restore::rebuild::RebuildError;
use crate::restore::rebuild::plan::{self, Plan};
use crate::restore::rebuild::private::{self, Private};
use crate::restore::rebuild::run::{self, Options, Report};
use crate::restore::target::Target;

/// Connections that copy rows at once, at most.
const JOBS_MAX: usize = 4;

/// The drill itself, without what comes before and after.
pub(super) async fn carry_out(
    repo: &Repository,
    (request, database): (&Request, Option<&str>),
    (scratch, limits): (&Scratch, &Limits),
    drill: &mut Drill,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<(), RestoreError> {
    let began = Instant::now();
    let plan = choose(repo, request, database, &mut drill.target, progress, cancel).await?;
    let base = &plan.base;
    drill.damage.extend(cancellable(cancel, lost_end(repo, base.database)).await??);
    drill.seconds.plan = began.elapsed().as_secs_f64();
    drill.database = Some(base.database_name.clone());
    drill.backup = Some(base.label.clone());
    (drill.content_bytes, drill.changes) = (base.content_bytes, Some(plan.changes));
    limits.check(base.content_bytes)?;

    let place = private::Options {
        data_dir: scratch.data_dir(),
        bin_dir: request.config.pg_bin_dir.clone(),
        path: request.path.clone(),
        listen: Listen { port: None, socket_dir: Some(scratch.socket_dir.clone()) },
    };
    progress.begin("make a server", None);
    let mut server = Box::pin(cancellable(cancel, Private::begin(place, base))).await??;
    progress.end();
    let asked = ask(repo, (request, &plan), &server, drill, progress, cancel).await;
    progress.begin("stop the server", None);
    server.stop().await?;
    progress.end();
    asked
}

/// Rebuilds the database, and looks at it.
async fn ask(
    repo: &Repository,
    (request, plan): (&Request, &Plan),
    server: &Private,
    drill: &mut Drill,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<(), RestoreError> {
    let options = Options {
        into: server.conninfo().map_err(RebuildError::from)?,
        jobs: std::thread::available_parallelism().map_or(1, |cores| cores.get().min(JOBS_MAX)),
        spill: server.spill(),
        partial: true, // what is missing is told, and the rest is looked at
        keep_notes: true,
    };
    let time = plan.last_kept.map(|kept| kept.time);
    match Box::pin(run::run(repo, plan, &options, progress, cancel)).await {
        Ok(report) => {
            let took = |phase| report.seconds.get(phase).copied().unwrap_or_default();
            (drill.seconds.extract, drill.seconds.replay) = (took("rows"), took("changes"));
            (drill.seconds.finish, drill.seconds.checks) = (took("indexes"), took("proof"));
            drill.points = points(plan, &report);
        }
        Err(RebuildError::Counts { tables }) => {
            drill.points = vec![Point::new("rows", Verdict::Failed, tables.join("; "))];
        }
        Err(error) => return Err(error.into()),
    }
    drill.reached = Some(ReachedMoment { timeline: plan.base.timeline, lsn: plan.stop, time });
    drill.points.extend(plan.remarks.iter().map(|remark| {
        let hint = "`walguard backup` takes a base from which it can be rebuilt whole again";
        Point::new("whole", Verdict::Failed, remark.clone()).with_hint(hint)
    }));
    let checking = Instant::now();
    // Those of other databases are for their drills.
    let is_for_this = |check: &&Check| check.database == plan.base.database_name;
    let checks: Vec<_> = request.config.checks.iter().filter(is_for_this).cloned().collect();
    let wanted = proof::Wanted { amcheck: request.config.amcheck, checks: &checks };
    let found = Box::pin(proof::of_server(&server.reach(), None, wanted, progress, cancel)).await?;
    drill.points.extend(found);
    drill.seconds.checks += checking.elapsed().as_secs_f64();
    Ok(())
}

/// What the rebuild proved by itself.
fn points(plan: &Plan, report: &Report) -> Vec<Point> {
    let kept = plan.last_kept.map_or_else(
        || "the base alone, as nothing was committed since".to_owned(),
        |kept| format!("the last transaction kept is {}, of {}", kept.xid, kept.time),
    );
    let target = format!("everything that committed before {} was rebuilt; {kept}", plan.stop);
    let rows = format!(
        "{} rows in {} tables, as many as the base and the changes say",
        report.rows_verified, report.tables_verified
    );
    let mut points = vec![Point::new("target", Verdict::Passed, target), Point::new("rows", Verdict::Passed, rows)];
    points.extend(report.not_made.iter().map(|what| {
        let hint = "install what brings the extension on the machine that makes drills";
        Point::new("made", Verdict::Failed, what.clone()).with_hint(hint)
    }));
    points
}

/// The plan of what is to be rebuilt.
async fn choose(
    repo: &Repository,
    request: &Request,
    database: Option<&str>,
    told: &mut String,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Plan, RestoreError> {
    let planned = |target: Target| {
        let database = database.map(str::to_owned);
        let wanted = plan::Request { target, exclusive: false, database, base: None, partial: true, only: Vec::new() };
        async move { plan::plan(repo, &wanted, progress, cancel).await }
    };
    let newest = || async { Ok::<_, RestoreError>(planned(Target::Latest).await?) };
    match (&request.target, request.config.moment) {
        (Some(target), _) => {
            *told = target.describe(&jiff::tz::TimeZone::UTC);
            return Ok(planned(target.clone()).await?);
        }
        (None, Moment::Newest) => {
            *told = Target::Latest.describe(&jiff::tz::TimeZone::UTC);
            return newest().await;
        }
        (None, Moment::Random) => {}
    }
    let Some((from, to)) = cancellable(cancel, span(repo, database)).await?? else {
        *told = "latest (no span of time to choose from yet)".to_owned();
        return newest().await;
    };
    let mut tried = 0;
    loop {
        tried += 1;
        let at = PgTime::from_micros(fastrand::i64(from.micros()..=to.micros()));
        *told = format!("{at} (a random moment)");
        match planned(Target::Time(at)).await {
            // It is not proved to be kept yet.
            Err(RebuildError::Unreachable { .. }) if tried < RANDOM_TRIES => {}
            other => return Ok(other?),
        }
    }
}

/// Everything up to what the agent proved to be kept must be there: an end that is gone leaves no hole.
async fn lost_end(repo: &Repository, database: Oid) -> Result<Option<Problem>, RestoreError> {
    let Some(proof) = repo.lease().await?.and_then(|lease| lease.caught_up) else { return Ok(None) };
    let Some(last) = repo.last_changes(database, Lsn::MAX).await? else { return Ok(None) };
    let last = repo.changes(last).await?.header;
    let (timeline, lsn) = (proof.position.timeline, proof.position.lsn);
    if last.timeline != timeline || last.to >= lsn {
        return Ok(None);
    }
    let problem = format!(
        "the end of the changes is gone: they end at {}, and the agent had kept them up to {lsn}, everything of {}",
        last.to, proof.time
    );
    let unreachable = vec![Unreachable { timeline, from: last.to, to: lsn, from_time: None, to_time: None }];
    let kind = ProblemKind::MissingWal;
    Ok(Some(Problem { kind, key: None, problem, backups: Vec::new(), unreachable, files: Vec::new() }))
}

/// The times from which a random moment is chosen: from the oldest base to what is known.
async fn span(repo: &Repository, database: Option<&str>) -> Result<Option<(PgTime, PgTime)>, RebuildError> {
    let oid = plan::database(repo, database).await?;
    let from = repo.bases(oid).await?.iter().map(|base| PgTime::from(base.time)).min();
    let to = repo.changes_known_to(oid).await?;
    Ok(from.zip(to).filter(|(from, to)| to > from))
}
