//! The loops of the agent: who runs, what they tell each other, and how they end.
//!
//! ```text
//! capture   server -> spool         publishes what is spooled; tells the server what is durable
//! archive   spool -> repository     publishes what is archived
//! scan      spool -> understanding  what transactions did to which table; indexes
//! detect    understanding -> incidents; keeper: incidents -> repository, then whoever tells people
//! derived   indexes -> repository   beside the WAL, once that is archived
//! backups   server -> repository    when there is none, when WAL was lost, on schedule
//! drills    repository -> scratch   proves on schedule that a restore works, as a process of its own
//! logical   server -> repository    in place of the first three where WAL is not to be had: changes by logical replication
//! lease     one agent per cluster   renews; a lease that is lost ends the agent
//! breaker   SQL                     ends sessions where a rule asks for it, and writes down what came of it
//! evidence  SQL -> repository       saves the rows that an incident took away
//! flashback SQL                     holds snapshots through which deleted rows stay readable
//! protection SQL                    what protects tables, and what is gone of it
//! sessions  SQL                     who is at work; nudges WAL of open transactions out of the server
//! watch     SQL, systemd            what only SQL tells; watchdog
//! http      status, metrics
//! notify    incidents -> people     what was not told before included; depends on nothing but its channels
//! ```
//!
//! Positions travel over `watch` channels, WAL never does: the spool is the queue. Whatever passes by itself is tried
//! again inside its loop, for ever, and shown in the status; whatever does not ends the loop, and with it the agent.
//!
//! # What a death leaves behind, and what the next start does
//!
//! All durable state is in the repository and in the server's slot, so there is nothing to repair, only to look up.
//!
//! | killed | left behind | the next start |
//! |---|---|---|
//! | while writing the spool | a `.partial` segment file of unknown length | removes it; the segment is streamed again from its beginning, which the slot still holds |
//! | while uploading | nothing, or a whole object (stores make objects whole or not at all) | uploads again; the same content is success |
//! | after a put whose answer was lost | the object | uploads again; the same content is success |
//! | between a segment's put and the deletion of its tails | obsolete tails | finds them beside the segment and deletes them |
//! | between tails | tails without a hole up to the archived position | goes on with the next tail |
//! | during a base backup | parts without a manifest, which are no backup | takes another one; `expire` removes the parts |
//! | during a drill | a scratch directory, perhaps with a server in it | the next drill there ends the server and removes the directory |
//! | with the spool lost, on a new machine | nothing local | finds the archived position in the repository and streams from there |
//! | with a spool that is older than the archive | segments that are archived | removes them |
//! | with the slot dropped | WAL that the server may have removed | makes the slot anew; if WAL is gone: gap object, alarm, new base backup |
//! | during a timeline switch | a finished old timeline in the spool, or tails up to some point | streams the old timeline to its end, then the new one from the switch point's segment |

mod archive;
mod backups;
pub mod breaker;
mod capture;
mod derived;
mod detect;
mod drills;
pub mod evidence;
pub mod flashback;
mod lease;
mod logical;
mod loops;
pub mod names;
pub mod notify;
mod path;
mod patience;
mod protection;
mod rows;
mod scan;
mod schedule;
mod sessions;
mod source;
mod watch;

use std::path::PathBuf;

use anyhow::Context as _;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

use self::notify::Notifier;
use crate::backoff::{Chain, RetryPolicy};
use crate::capture::ConnInfo;
use crate::capture::spool::Spool;
use crate::decode;
use crate::decode::WalMajor;
use crate::detect::Incident;
use crate::guard;
use crate::notify::{OpenError, Reach, Setting};
use crate::pg::{Lsn, Position, TimelineHistory, TimelineId};
use crate::repo::Created;
use crate::repo::archiver::{self, Archiver, Channels, Report};
use crate::repo::cluster::ClusterIdentity;
use crate::repo::lease::{Claim, Lease, LeaseError};
use crate::repo::{RepoError, Repository};
use crate::serve::http;
use crate::serve::status::{Board, Status, Trouble};
use crate::settings;
use crate::settings::Settings;
use loops::Loops;
use source::{Source, SourceError};

/// Indexes that wait for their segments to be archived, at most: those of a gigabyte of WAL, some hundred KiB each at worst.
const DERIVED_MAX: usize = 64;

/// Findings in the WAL that wait to be looked at.
const OBSERVED_MAX: usize = 1024;

/// Changes of incidents that wait to be written: a few hundred KiB each at worst.
const INCIDENTS_MAX: usize = 64;

/// Where incidents go.
type Incidents = tokio::sync::mpsc::Sender<Incident>;

/// What an agent works with.
#[derive(Debug)]
pub struct Agent {
    /// All settings.
    pub settings: Settings,
    /// The server.
    pub conninfo: ConnInfo,
    /// The cluster's place in the repository.
    pub repo: Repository,
    /// The zone of `backup.at`, and of the times in messages.
    pub zone: TimeZone,
    /// The settings file, for the agent's own child processes.
    pub config: Option<PathBuf>,
    /// Flags by which another call of this program reaches the same repository, for the commands in messages.
    pub flags: Vec<String>,
    /// Take base backups on schedule, and when WAL was lost.
    pub backups: bool,
    /// Where `pg_dump` is, for the bases of a logical source; by default where it usually is.
    pub pg_bin_dir: Option<PathBuf>,
}

/// Where an agent begins, found out before its loops run.
#[derive(Debug)]
struct Beginning {
    identity: ClusterIdentity,
    start: archiver::start::Start,
    spool: Spool,
    source: Source,
    /// The server's history.
    path: TimelineHistory,
    claim: Claim,
    lease: Lease,
}

/// The same of an agent that reads changes.
#[derive(Debug)]
/// What was seen of transactions, and where that begins.
struct Seen {
    observed: tokio::sync::mpsc::Receiver<scan::Observed>,
    timeline: TimelineId,
    /// Databases that are streamed apart from each other; 0 if it is the whole WAL that is.
    apart: usize,
}

struct LogicalBeginning {
    origin: logical::Origin,
    claim: Claim,
    lease: Lease,
    /// Held: two agents on one machine must not have one name.
    _spool: Spool,
}

impl Agent {
    /// Runs until `stop` is cancelled: then WAL that was received is archived within ten seconds, as far as the
    /// repository takes it.
    ///
    /// # Errors
    /// What cannot pass by itself. At the start that includes a server that refuses us and a repository that belongs to
    /// another cluster; later only what would do harm if it were ignored.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let settings = &self.settings;
        let board = Board::new(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cluster: settings.cluster.clone(),
            repository: self.repo.url(),
            host: lease::host(),
            pid: std::process::id(),
            started_at: Some(Timestamp::now()),
            ..Status::default()
        });
        board.update(|s| s.server.slot.clone_from(&settings.postgres.slot));
        let notifier = self.notifier(&board).context("prepare to tell people of incidents")?;
        let listener = http::bind(&settings.http).await.context("open the port of `http.listen`")?;
        tracing::info!(http = %listener.local_addr()?, version = env!("CARGO_PKG_VERSION"), "agent started");
        watch::notify(&[NotifyState::Ready]);

        let mut loops = Loops::new(stop.clone());
        let window = board.clone();
        loops.start("http", |stop| async move { Ok(http::serve(listener, window, stop).await?) });
        if settings.source == settings::Source::Logical {
            return self.run_logical(board, notifier, loops, stop).await;
        }
        let Some(begun) = stop.run_until_cancelled(self.begin(&board, Self::try_begin)).await else { return Ok(()) };
        let Beginning { identity, start, spool, source, path, claim, lease } = begun?;

        let archived = tokio::sync::watch::Sender::new(start.archived);
        let report = tokio::sync::watch::Sender::new(Report::default());
        let synchronous = tokio::sync::watch::Sender::new(false);
        let backup_wanted = tokio::sync::watch::Sender::new(None);
        let spool_closed = CancellationToken::new();

        let streaming = capture::Capture {
            source,
            identity: identity.clone(),
            have: spool.spooled().position().max(start.archived),
            spool: spool.clone(),
            board: board.clone(),
            durability: settings.archive.durability,
            archived: archived.subscribe(),
            synchronous: synchronous.clone(),
            backup_wanted: backup_wanted.clone(),
            lost: None,
        };
        let closed = spool_closed.clone().drop_guard();
        loops.start("capture", |stop| async move {
            let result = streaming.run(stop).await;
            drop(closed); // nothing more comes into the spool
            result
        });

        let told = (archived.subscribe(), report.subscribe());
        let (archived_for_scan, archived_for_derived) = (archived.subscribe(), archived.subscribe());
        let channels = Channels { archived, report, synchronous: synchronous.subscribe() };
        let archiver = Archiver::new(&self.repo, &spool, &settings.archive, start, channels);
        let tell = board.clone();
        loops.start("archive", |stop| archive::run(archiver, told.0, told.1, tell, stop, spool_closed));

        let sessions = guard::Sessions::new();
        let losses = guard::Losses::default();
        let timeline = path.timeline();
        let (incidents, told) = tokio::sync::mpsc::channel(notify::INCIDENTS_WAITING_MAX);
        if let Some(major) = WalMajor::of_server(identity.server_version) {
            let (derived, derive) = tokio::sync::mpsc::channel(DERIVED_MAX);
            let missed = derived::Missed::default();
            let (observed, observe) = tokio::sync::mpsc::channel(OBSERVED_MAX);
            let scan = scan::Scan {
                repo: self.repo.clone(),
                spool: spool.clone(),
                source: decode::Source {
                    major,
                    segment_size: identity.segment_size,
                    system_id: Some(identity.system_id),
                },
                conninfo: self
                    .conninfo
                    .clone()
                    .with_application_name(&format!("{}-names", self.conninfo.application_name())),
                board: board.clone(),
                path,
                archived: archived_for_scan,
                derived,
                missed: missed.clone(),
                observed,
            };
            loops.start("scan", |stop| scan.run(stop));
            let deriving = derived::Derive {
                repo: self.repo.clone(),
                major,
                board: board.clone(),
                archived: archived_for_derived,
                derived: derive,
                missed,
            };
            loops.start("derived", |stop| deriving.run(stop));
            let evidence = self.start_evidence(&mut loops, &board);
            let seen = Seen { observed: observe, timeline, apart: 0 };
            self.start_detection(&mut loops, &board, seen, (sessions.clone(), losses.clone()), (incidents, evidence));
        }

        self.start_watches(&mut loops, &board, synchronous, (sessions, losses));

        if self.backups {
            let backups = backups::Backups {
                conninfo: self.conninfo.clone(),
                repo: self.repo.clone(),
                config: settings.backup.clone(),
                schedule: schedule::Schedule {
                    every: settings.backup.interval.filter(|interval| !interval.is_zero()),
                    at: settings.backup.at,
                    zone: self.zone.clone(),
                },
                keep: settings.retention,
                board: board.clone(),
                wanted: backup_wanted,
            };
            loops.start("backups", |stop| backups.run(stop));
        }
        self.start_drills(&mut loops, &board, Vec::new());
        loops.start("notify", |stop| notifier.run(told, stop));

        let (repo, held, proved) = (self.repo.clone(), lease.clone(), board.clone());
        loops.start("lease", |stop| lease::run(repo, claim, held, proved, stop));

        let result = loops.run().await;
        lease::release(&self.repo, &lease, &board).await;
        tracing::info!(archived = board.snapshot(Timestamp::now()).archived.map(|a| a.to_string()), "agent stopped");
        result
    }

    /// Runs with the changes of one database, by logical replication, in place of the cluster's WAL.
    async fn run_logical(
        &self,
        board: Board,
        notifier: Notifier,
        mut loops: Loops,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let settings = &self.settings;
        let Some(begun) = stop.run_until_cancelled(self.begin(&board, Self::try_begin_logical)).await else {
            return Ok(());
        };
        let LogicalBeginning { origin, claim, lease, _spool } = begun?;
        let (sessions, losses) = (guard::Sessions::new(), guard::Losses::default());
        let (observed, observe) = tokio::sync::mpsc::channel(OBSERVED_MAX);
        let (incidents, told) = tokio::sync::mpsc::channel(notify::INCIDENTS_WAITING_MAX);
        let timeline = origin.at.timeline;
        let others: Vec<_> = settings.logical.databases.iter().filter(|name| **name != origin.database_name).collect();
        let mut first = self.database(board.clone(), observed);
        if !others.is_empty() {
            first.board = board.part(&origin.database_name);
        }
        for name in &others {
            let mut other = first.clone();
            other.conninfo = other.conninfo.with_dbname(name);
            other.board = board.part(name);
            loops.start("database", |stop| other.run(stop));
        }
        let database_name = origin.database_name.clone();
        first.start(&mut loops, origin);
        let evidence = self.start_evidence(&mut loops, &board);
        let seen = Seen { observed: observe, timeline, apart: 1 + others.len() };
        self.start_detection(&mut loops, &board, seen, (sessions.clone(), losses.clone()), (incidents, evidence));
        let all = std::iter::once(&database_name).chain(others).cloned().collect();
        self.start_drills(&mut loops, &board, all);
        let synchronous = tokio::sync::watch::Sender::new(false);
        self.start_watches(&mut loops, &board, synchronous, (sessions, losses));
        loops.start("notify", |stop| notifier.run(told, stop));
        let (repo, held, proved) = (self.repo.clone(), lease.clone(), board.clone());
        loops.start("lease", |stop| lease::run(repo, claim, held, proved, stop));

        let result = loops.run().await;
        lease::release(&self.repo, &lease, &board).await;
        tracing::info!(kept = board.snapshot(Timestamp::now()).archived.map(|a| a.to_string()), "agent stopped");
        result
    }

    /// Starts the loops that hold snapshots and save rows, if they are wanted; gives where incidents go then.
    fn start_evidence(&self, loops: &mut Loops, board: &Board) -> Option<Incidents> {
        if !self.settings.flashback.evidence {
            return None;
        }
        let flashback = flashback::Flashback::new(
            self.beside("flashback"),
            self.settings.flashback.clone(),
            self.repo.clone(),
            board.clone(),
        );
        let holding = flashback.clone();
        loops.start("flashback", |stop| holding.run(stop));
        let (saved, incidents) = tokio::sync::mpsc::channel(INCIDENTS_MAX);
        let saving = evidence::Saving { flashback, repo: self.repo.clone(), incidents };
        loops.start("evidence", |stop| saving.run(stop));
        Some(saved)
    }

    /// Starts the loop that proves that a restore works: of the cluster, or of each of these databases.
    fn start_drills(&self, loops: &mut Loops, board: &Board, databases: Vec<String>) {
        let drills = drills::Drills {
            repo: self.repo.clone(),
            config: self.settings.drill.clone(),
            zone: self.zone.clone(),
            settings: self.config.clone(),
            repository: self.settings.repository.url.clone(),
            cluster: self.settings.cluster.clone(),
            databases,
            board: board.clone(),
        };
        loops.start("drills", |stop| drills.run(stop));
    }

    /// Starts the loops that look over SQL at what only SQL tells.
    fn start_watches(
        &self,
        loops: &mut Loops,
        board: &Board,
        synchronous: tokio::sync::watch::Sender<bool>,
        (sessions, losses): (guard::Sessions, guard::Losses),
    ) {
        let settings = &self.settings;
        let watching = watch::Watch {
            conninfo: self.beside("watch"),
            stream_name: self.conninfo.application_name().to_owned(),
            slot: settings.postgres.slot.clone(),
            board: board.clone(),
            synchronous,
        };
        loops.start("watch", |stop| watching.run(stop));
        if settings.who.enabled {
            let watcher = sessions::Watcher {
                conninfo: self.beside("who"),
                config: settings.who.clone(),
                sessions,
                board: board.clone(),
            };
            loops.start("sessions", |stop| watcher.run(stop));
        }
        if settings.protection.enabled {
            let watcher = protection::Watcher {
                conninfo: self.beside("protection"),
                interval: settings.protection.interval,
                guard: settings.guard.clone(),
                losses,
                board: board.clone(),
            };
            loops.start("protection", |stop| watcher.run(stop));
        }
    }

    /// Starts the loops that make incidents of what the WAL tells.
    fn start_detection(
        &self,
        loops: &mut Loops,
        board: &Board,
        Seen { mut observed, timeline, apart }: Seen,
        (sessions, losses): (guard::Sessions, guard::Losses),
        (told, evidence): (Incidents, Option<Incidents>),
    ) {
        if !self.settings.detect.enabled {
            loops.start("observe", |stop| async move {
                while stop.run_until_cancelled(observed.recv()).await.flatten().is_some() {}
                stop.cancelled().await;
                Ok(())
            });
            return;
        }
        let (found, find) = tokio::sync::mpsc::channel(INCIDENTS_MAX);
        let (breaks, wanted) = tokio::sync::mpsc::channel(INCIDENTS_MAX);
        let watch = detect::Watch {
            repo: self.repo.clone(),
            config: self.settings.detect.clone(),
            zone: self.zone.clone(),
            timeline,
            conninfo: self.beside("rows"),
            sessions: sessions.clone(),
            board: board.clone(),
            apart,
            observed,
            found,
            losses,
            breaks,
        };
        loops.start("detect", |stop| watch.run(stop));
        let breaker = guard::Breaker::new(self.beside("breaker"), self.settings.breaker.clone());
        let breaking = breaker::Breaking { breaker, sessions, repo: self.repo.clone(), wanted };
        loops.start("breaker", |stop| breaking.run(stop));
        let keeper = detect::Keeper { repo: self.repo.clone(), board: board.clone(), found: find, told, evidence };
        loops.start("incidents", |stop| keeper.run(stop));
    }

    /// What the loops of a database work with that is read by logical replication: the one that the connection string names.
    fn database(&self, board: Board, observed: tokio::sync::mpsc::Sender<scan::Observed>) -> logical::Database {
        let settings = &self.settings;
        let schedule = schedule::Schedule {
            every: settings.backup.interval.filter(|interval| !interval.is_zero()),
            at: settings.backup.at,
            zone: self.zone.clone(),
        };
        logical::Database {
            conninfo: self.conninfo.clone(),
            slot: settings.postgres.slot.clone(),
            config: settings.logical.clone(),
            repo: self.repo.clone(),
            interval: settings.archive.tail_interval,
            level: settings.archive.compression_level,
            bases: self.backups.then_some(schedule),
            keep: settings.retention,
            bin_dir: self.pg_bin_dir.clone(),
            dir: settings.spool.dir.join(&settings.cluster),
            board,
            observed,
        }
    }

    /// How a connection beside the stream is made, under a name of its own.
    fn beside(&self, purpose: &str) -> ConnInfo {
        self.conninfo.clone().with_application_name(&format!("{}-{purpose}", self.conninfo.application_name()))
    }

    /// Prepares to tell people; what cannot work shows before anything else begins.
    fn notifier(&self, board: &Board) -> Result<Notifier, OpenError> {
        let setting = Setting {
            cluster: self.settings.cluster.clone(),
            reach: Reach {
                flags: self.flags.clone(),
                restore_dir: self.settings.restore.target_dir.clone(),
                is_logical: self.settings.source == settings::Source::Logical,
            },
            zone: self.zone.clone(),
        };
        let spool = self.settings.spool.dir.join(&self.settings.cluster);
        Notifier::new(&self.settings.notify, self.repo.clone(), &spool, setting, board.clone())
    }

    /// Finds out who the server is, whose the repository is, and where the archive stands. Waits for both as long as it
    /// takes; what will not pass is an error, so that a mistake in the settings shows at once.
    async fn begin<T>(
        &self,
        board: &Board,
        try_begin: impl AsyncFn(&Self, &Board) -> Result<T, SourceError>,
    ) -> anyhow::Result<T> {
        let mut failures = 0;
        loop {
            let error = match try_begin(self, board).await {
                Ok(beginning) => {
                    board.clear("lease");
                    board.clear("repository");
                    board.update(|s| {
                        s.server.trouble = None;
                        s.store.trouble = None;
                        s.spool.trouble = None;
                    });
                    return Ok(beginning);
                }
                Err(error) if error.is_transient() => error,
                Err(error) => return Err(error.into_anyhow()).context("begin"),
            };
            failures += 1;
            let pause = RetryPolicy::FOREVER.pause(failures);
            let (text, hint) = (Chain(&error).to_string(), error.hint());
            if matches!(error, SourceError::Lease(LeaseError::Held(_))) {
                board.raise("lease", text.clone(), hint.clone());
            }
            if matches!(error, SourceError::Repo(RepoError::Vanished { .. })) {
                board.raise("repository", text.clone(), hint.clone());
            }
            board.update(|s| {
                let place = match &error {
                    SourceError::Repo(_) => &mut s.store.trouble,
                    SourceError::Spool(_) => &mut s.spool.trouble,
                    _ => &mut s.server.trouble,
                };
                *place = Some(Trouble::again(place.as_ref(), Timestamp::now(), text.clone(), hint));
            });
            if failures.is_power_of_two() {
                tracing::warn!(failures, ?pause, hint = error.hint(), "failed to begin, will try again: {text}");
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn try_begin_logical(&self, board: &Board) -> Result<LogicalBeginning, SourceError> {
        let origin = logical::origin(&self.conninfo).await?;
        // It holds who we are and where we archive, and nothing else.
        let spool = Spool::open(&self.settings.spool, &self.settings.cluster, origin.identity.segment_size)?;
        self.try_begin_repository(board, &spool, &origin.identity, origin.at).await?;
        let claim = lease::claim(spool.holder());
        let lease = self.repo.acquire_lease(&claim, Timestamp::now(), |held| lease::is_gone(&claim, held)).await?;
        Ok(LogicalBeginning { origin, claim, lease, _spool: spool })
    }

    /// Finds out whether the repository is this cluster's, and can be used. Makes its place, unless it was there before: then
    /// a file system is not mounted, or somebody removed it, and a new one would hide that.
    async fn try_begin_repository(
        &self,
        board: &Board,
        spool: &Spool,
        identity: &ClusterIdentity,
        at: Position,
    ) -> Result<(), SourceError> {
        let url = self.repo.url();
        let known = format!("{} {url}", identity.system_id);
        if spool.repository().as_ref() == Some(&known) && self.repo.identity().await?.is_none() {
            return Err(RepoError::Vanished { url }.into());
        }
        if self.repo.initialize(identity).await? == Created::New {
            tracing::info!(url, system_id = %identity.system_id, "made the cluster's place");
        }
        let probe = self.repo.probe().await?;
        spool.remember_repository(&known)?;
        board.update(|s| {
            s.server.system_id = Some(identity.system_id);
            s.server.version = Some(identity.server_version);
            s.server.segment_size = Some(identity.segment_size);
            s.server.flushed = Some(at);
            s.store.enforces_create_once = probe.create_once;
            s.spool.size_max = self.settings.spool.size_max.as_u64();
        });
        Ok(())
    }

    async fn try_begin(&self, board: &Board) -> Result<Beginning, SourceError> {
        let mut source = Source::new(self.conninfo.clone(), self.settings.postgres.slot.clone(), self.repo.clone());
        let source::Connected { mut walsender, identity, at } = source.connect().await?;
        let spool = Spool::open(&self.settings.spool, &self.settings.cluster, identity.segment_size)?;
        self.try_begin_repository(board, &spool, &identity, at).await?;
        let claim = lease::claim(spool.holder());
        let lease = self.repo.acquire_lease(&claim, Timestamp::now(), |held| lease::is_gone(&claim, held)).await?;

        let path = source.path(&mut walsender, at.timeline).await?;
        let restart = source.ensure_slot(&mut walsender).await?;
        drop(walsender); // the search below may take a while, and a connection is a process of the server
        // With `durability = "spool"` the slot begins behind what is only in the spool.
        let spooled = spool.spooled().runs.first().map_or(restart, |run| run.begin.max(Lsn::new(1)));
        let start = archiver::start::find(&self.repo, &path, Some(restart.min(spooled))).await?;
        match start.archived {
            Some(archived) => tracing::info!(%archived, "the archive was found"),
            None => tracing::info!("the archive is empty"),
        }
        spool.keep_from(start.archived)?;
        board.update(|s| {
            s.archived = start.archived;
            s.spool.bytes = spool.spooled().bytes;
        });
        Ok(Beginning { identity, start, spool, source, path, claim, lease })
    }
}
