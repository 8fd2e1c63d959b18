//! The command line, as types: what clap parses and what `--help` tells.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use walguard::pg::TimelineId;

/// Streams, keeps and restores the WAL of a PostgreSQL cluster.
#[derive(Debug, Parser)]
#[command(
    name = "walguard",
    version,
    propagate_version = true,
    max_term_width = 120,
    arg_required_else_help = true,
    after_help = "\
Examples:
  walguard init --config walguard.toml --pg postgres://walguard@db1 --repo s3://backups/pg --cluster main
  walguard run --config walguard.toml
  walguard list --config walguard.toml
  walguard restore --config walguard.toml --to '10 minutes ago' --target-dir /var/lib/postgresql/restored

Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 finished but attention needed, 75 try again later."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// What every verb understands. A flag wins over its environment variable, and that over the settings file.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct GlobalArgs {
    /// Settings file; without it, flags, environment and defaults are all there is
    #[arg(long, global = true, env = "WALGUARD_CONFIG", hide_env_values = true, value_parser = path(), value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,

    /// The PostgreSQL server, as a URL or key=value; never with a password in it: use ~/.pgpass, PGPASSWORD or
    /// `postgres.password_file`
    #[arg(long, global = true, env = "WALGUARD_PG", hide_env_values = true, value_name = "CONNINFO")]
    pub(crate) pg: Option<String>,

    /// The repository: s3://bucket/prefix, or file:///path, or a path
    #[arg(long, global = true, env = "WALGUARD_REPO", hide_env_values = true, value_name = "URL", value_hint = ValueHint::Url)]
    pub(crate) repo: Option<String>,

    /// The cluster's name in the repository
    #[arg(long, global = true, env = "WALGUARD_CLUSTER", hide_env_values = true, value_name = "NAME")]
    pub(crate) cluster: Option<String>,

    /// Directory for WAL that is on its way to the repository
    #[arg(long, global = true, env = "WALGUARD_SPOOL", hide_env_values = true, value_parser = path(), value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) spool: Option<PathBuf>,

    /// Print JSON for programs instead of text for people; no progress
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Log more: -v what walguard decides, -vv every step
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    /// How log lines look on standard error
    #[arg(
        long,
        global = true,
        env = "WALGUARD_LOG_FORMAT",
        hide_env_values = true,
        value_name = "FORMAT",
        default_value = "text"
    )]
    pub(crate) log_format: LogFormat,
}

impl GlobalArgs {
    /// An empty variable or flag is as good as none.
    pub(crate) fn without_empty(mut self) -> Self {
        self.config = self.config.filter(|path| !path.as_os_str().is_empty());
        self.pg = self.pg.filter(|text| !text.is_empty());
        self.repo = self.repo.filter(|text| !text.is_empty());
        self.cluster = self.cluster.filter(|text| !text.is_empty());
        self.spool = self.spool.filter(|path| !path.as_os_str().is_empty());
        self
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// A line for people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

/// What walguard can do.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Init(InitArgs),
    Check(CheckArgs),
    Run(RunArgs),
    Backup(BackupArgs),
    List(ListArgs),
    Status(StatusArgs),
    Incidents(IncidentsArgs),
    Silence(SilenceArgs),
    Restore(RestoreArgs),
    Drill(DrillArgs),
    Handover(HandoverArgs),
    Verify(VerifyArgs),
    Expire(ExpireArgs),
    Guard(GuardArgs),
    Notify(NotifyArgs),
    Timeline(TimelineArgs),
    Index(IndexArgs),
    Wal(WalArgs),
    WalPush(WalPushArgs),
    WalFetch(WalFetchArgs),
    Demo(DemoArgs),
    Completions(CompletionsArgs),
}

/// Prepare a cluster: write a settings file, create the slot and the repository
///
/// Writes a settings file that explains every setting (to --config, unless that file is there already), creates the
/// replication slot (with a logical source the publications, too) and the cluster's place in the repository. What exists already is left as it is, so that
/// the command can be repeated.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  # what a superuser must grant first; needs no connection
  walguard init --print-sql --pg postgres://walguard@db1 | psql -h db1 -U postgres

  walguard init --config walguard.toml --pg postgres://walguard@db1 --repo s3://backups/pg --cluster main")]
pub(crate) struct InitArgs {
    /// Only print the SQL that grants what the settings need, and nothing else; connects to nothing
    #[arg(long, conflicts_with_all = ["json"])]
    pub(crate) print_sql: bool,
    /// Only print the settings file to standard output; connects to nothing
    #[arg(long, conflicts_with_all = ["print_sql", "json"])]
    pub(crate) print_settings: bool,
    /// How the server's changes are heard of; without it what the settings say, or `logical` if the server refuses `physical`
    #[arg(long, value_enum, value_name = "SOURCE")]
    pub(crate) source: Option<SourceArg>,
}

/// How the server's changes are heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum SourceArg {
    /// By its WAL, as a standby hears of them
    Physical,
    /// By logical replication of one database, for services that do not give their WAL away
    Logical,
}

/// Check everything that archiving and restoring need
///
/// Looks at the server, the role, the slot, the repository, the spool directory, the age of archive and backups, clocks and
/// PostgreSQL's programs. Exits with 3 if something needs attention and with 1 if something cannot work.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard check --config walguard.toml
  walguard check --config walguard.toml --json | jq '.findings[] | select(.level != \"ok\")'")]
pub(crate) struct CheckArgs {}

/// Run the agent: stream, archive, back up on schedule, until it is stopped
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard run --config walguard.toml
  WALGUARD_PG=postgres://walguard@db1 WALGUARD_REPO=s3://backups/pg WALGUARD_CLUSTER=main walguard run --http 127.0.0.1:9187")]
pub(crate) struct RunArgs {
    /// Serve metrics, health and status on this address
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) http: Option<SocketAddr>,
    /// Take no scheduled base backups, whatever the settings say
    #[arg(long)]
    pub(crate) no_backups: bool,
}

/// Take a base backup
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard backup --config walguard.toml
  walguard backup --config walguard.toml --checkpoint spread --max-rate 50MiB --label before-upgrade")]
pub(crate) struct BackupArgs {
    /// Name of the backup; by default the moment it begins
    #[arg(long, value_name = "NAME")]
    pub(crate) label: Option<String>,
    /// How the server's checkpoint at the beginning is made: at once, or without a burst of writes
    #[arg(long, value_name = "MODE")]
    pub(crate) checkpoint: Option<CheckpointMode>,
    /// Send no more than this a second, for example 50MiB
    #[arg(long, value_name = "BYTES")]
    pub(crate) max_rate: Option<bytesize::ByteSize>,
    /// Do not wait until the WAL that the backup needs is archived
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// With a logical source: of this database; by default of the one of the connection string and those of `logical.databases`
    #[arg(long, value_name = "NAME")]
    pub(crate) database: Option<String>,
}

/// How the checkpoint of a base backup is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CheckpointMode {
    /// At once, with a burst of writes
    Fast,
    /// Spread over `checkpoint_completion_target`
    Spread,
}

/// List backups and what can be restored, from when to when
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard list --config walguard.toml
  walguard list --repo s3://backups/pg --cluster main --json")]
pub(crate) struct ListArgs {}

/// Show how far streaming and archiving are
///
/// Asks the running agent; without one, tells what the repository knows. Exits with 3 if something needs attention.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard status --config walguard.toml
  walguard status --config walguard.toml --watch")]
pub(crate) struct StatusArgs {
    /// Address of the agent's HTTP service; by default that of the settings
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) http: Option<SocketAddr>,
    /// Repeat every second until stopped
    #[arg(long)]
    pub(crate) watch: bool,
}

/// Show what was damaged, when and by whom; answer it; write a report
///
/// Without a subcommand, lists what somebody may have to look at. Reads the repository only. Where an incident is asked
/// for, `last` is the newest.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  walguard incidents --config walguard.toml
  walguard incidents --follow --json --config walguard.toml
  walguard incidents show last --config walguard.toml
  walguard incidents ack last --note 'on it' --config walguard.toml
  walguard incidents report 00000001-000000001A2B3C40 --html --output report.html --config walguard.toml
  walguard incidents rows 00000001-000000001A2B3C40 --config walguard.toml | psql -X -v ON_ERROR_STOP=1 -d postgres"
)]
pub(crate) struct IncidentsArgs {
    #[command(subcommand)]
    pub(crate) verb: Option<IncidentsVerb>,
    /// Show closed, silenced and unimportant ones too
    #[arg(long)]
    pub(crate) all: bool,
    /// Look at so many, the newest
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) limit: usize,
    /// Go on and tell each one that is new or changes
    #[arg(long)]
    pub(crate) follow: bool,
}

/// What can be done with incidents.
#[derive(Debug, Subcommand)]
pub(crate) enum IncidentsVerb {
    /// List what somebody may have to look at
    List,
    /// Show everything that is known of one
    Show(IncidentArgs),
    /// Say that you have seen it
    Ack(AnswerArgs),
    /// Close it
    Resolve(AnswerArgs),
    /// Write a report that can be sent on, in Markdown or HTML
    Report(ReportArgs),
    /// Print the deleted rows that were saved, as a script for psql that puts them back
    Rows(RowsArgs),
}

/// Which incident.
#[derive(Debug, Args)]
pub(crate) struct IncidentArgs {
    /// Its id, or `last`
    #[arg(value_name = "INCIDENT")]
    pub(crate) id: String,
    /// As it was in this revision, counted from 1
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) revision: Option<u32>,
}

/// An answer to an incident.
#[derive(Debug, Args)]
pub(crate) struct AnswerArgs {
    /// Its id, or `last`
    #[arg(value_name = "INCIDENT")]
    pub(crate) id: String,
    /// Who answers; by default the user of this shell
    #[arg(long, value_name = "NAME")]
    pub(crate) by: Option<String>,
    /// What to say about it
    #[arg(long, value_name = "TEXT")]
    pub(crate) note: Option<String>,
}

/// A report.
#[derive(Debug, Args)]
pub(crate) struct RowsArgs {
    /// Its id, or `last`
    #[arg(value_name = "INCIDENT")]
    pub(crate) id: String,
    /// Only those of this table, as the incident names it: `shop.public.users`; repeatable
    #[arg(long, value_name = "TABLE")]
    pub(crate) table: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Its id, or `last`
    #[arg(value_name = "INCIDENT")]
    pub(crate) id: String,
    /// HTML instead of Markdown
    #[arg(long)]
    pub(crate) html: bool,
    /// Write to this file instead of standard output
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) output: Option<PathBuf>,
}

/// Tell nobody of something for a while
///
/// Incidents are recorded all the same, and a wiped database is told whatever is silenced. Without arguments, lists the
/// silences that hold.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard silence --for 1h --reason 'release 4.2' --table 'public.*' --rule drop-column --config walguard.toml
  walguard silence --for '20 minutes' --reason 'load test' --role 'bench_*' --config walguard.toml
  walguard silence --list --config walguard.toml")]
pub(crate) struct SilenceArgs {
    /// For how long, for example 1h
    #[arg(long = "for", value_name = "SPAN", value_parser = span, requires = "reason")]
    pub(crate) span: Option<Duration>,
    /// Why
    #[arg(long, value_name = "TEXT", requires = "span")]
    pub(crate) reason: Option<String>,
    /// Only this rule, for example truncate; repeatable
    #[arg(long, value_name = "RULE", requires = "span")]
    pub(crate) rule: Vec<String>,
    /// Only these tables: TABLE, SCHEMA.TABLE or DATABASE.SCHEMA.TABLE, with * and ?; repeatable
    #[arg(long, value_name = "PATTERN", requires = "span")]
    pub(crate) table: Vec<String>,
    /// Only what this role did, with * and ?; repeatable
    #[arg(long, value_name = "PATTERN", requires = "span")]
    pub(crate) role: Vec<String>,
    /// Only what this application did, with * and ?; repeatable
    #[arg(long, value_name = "PATTERN", requires = "span")]
    pub(crate) application: Vec<String>,
    /// Who asks for it; by default the user of this shell
    #[arg(long, value_name = "NAME")]
    pub(crate) by: Option<String>,
    /// List the silences that hold (this is the default)
    #[arg(long, conflicts_with_all = ["span", "lift"])]
    pub(crate) list: bool,
    /// End this silence now
    #[arg(long, value_name = "ID", conflicts_with = "span")]
    pub(crate) lift: Option<String>,
}

/// Rebuild the database as it was at a moment
///
/// Makes a plan, shows it, and does it: fetches the base backup, replays WAL to exactly the target, and proves that
/// what was reached is what was planned.
#[derive(Debug, Args)]
#[command(after_help = "\
Targets (--to):
  latest                              everything that is archived
  '2025-12-17 08:14 Asia/Jerusalem'   a time; without a zone, in the zone of the settings
  2025-12-17T06:14:00Z                the same moment
  '10 minutes ago'
  16/B374D848                         everything before this LSN
  xid:4711                            up to and with this transaction; just before it with --exclusive
  name:before_upgrade                 a point made by pg_create_restore_point()
  before:00000001-000000001A2B3C40    all that committed before what this incident destroyed

Examples:
  walguard restore --config walguard.toml --target-dir /srv/restored     # shows what happened, and asks
  walguard restore --config walguard.toml --to '2025-12-17 08:14' --target-dir /srv/restored --dry-run
  walguard restore --config walguard.toml --to latest --target-dir /srv/restored --action promote --yes
  walguard restore --repo s3://backups/pg --cluster main --to 16/B374D848 --target-dir /srv/restored --port 5433")]
pub(crate) struct RestoreArgs {
    /// The moment to restore; without any, on a terminal, recent incidents and minutes are shown to choose from
    #[arg(long, value_name = "TARGET")]
    pub(crate) to: Option<String>,
    /// Restore up to and with this transaction, as --to xid:N
    #[arg(long, value_name = "XID", conflicts_with_all = ["to", "to_name"])]
    pub(crate) to_xid: Option<u32>,
    /// Restore up to this restore point, as --to name:NAME
    #[arg(long, value_name = "NAME", conflicts_with = "to")]
    pub(crate) to_name: Option<String>,
    /// Directory that becomes the data directory; empty or not there yet. With a logical source, that of a new server
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, required_unless_present = "into")]
    pub(crate) target_dir: Option<PathBuf>,
    /// With a logical source: the empty database, of the same or a newer major version, in which it is rebuilt, instead of a
    /// new server
    #[arg(long, value_name = "CONNINFO", conflicts_with_all = ["target_dir", "to_name", "timeline", "verify", "overwrite", "delta", "amcheck",
        "tablespace", "port", "socket_dir"])]
    pub(crate) into: Option<String>,
    /// With a logical source: the database that is rebuilt; by default that of the incident, or of the connection string
    #[arg(long, value_name = "NAME")]
    pub(crate) database: Option<String>,
    /// With a logical source: rebuild what can be rebuilt, and say what is missing
    #[arg(long)]
    pub(crate) partial: bool,
    /// With a logical source: rows of these tables only, all others are made empty (`table`, `schema.table`, with * and ?; may be
    /// repeated)
    #[arg(long, value_name = "PATTERN")]
    pub(crate) only: Vec<String>,
    /// With a logical source: connections that copy rows at once
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub(crate) jobs: u8,
    /// Look for the target on this timeline's history instead of the newest
    #[arg(long, value_name = "ID", value_parser = timeline)]
    pub(crate) timeline: Option<TimelineId>,
    /// Begin with this backup instead of the latest one before the target
    #[arg(long, value_name = "LABEL")]
    pub(crate) backup: Option<String>,
    /// Stop just before the transaction of `xid:...`, or before what ended at the very time, instead of just after it
    #[arg(long)]
    pub(crate) exclusive: bool,
    /// Read all WAL that the restore needs before it begins, to find damage now and not on the way
    #[arg(long)]
    pub(crate) verify: bool,
    /// What happens once the target is reached
    #[arg(long, value_name = "ACTION", default_value = "pause")]
    pub(crate) action: Action,
    /// Start the restored server (this is the default)
    #[arg(long, overrides_with = "no_start")]
    pub(crate) start: bool,
    /// Only prepare the directory; starting the server recovers it
    #[arg(long)]
    pub(crate) no_start: bool,
    /// Only extract the base backup, and write nothing for recovery: for Patroni and others that do that by themselves,
    /// with `walguard wal-fetch` as restore_command
    #[arg(long, conflicts_with_all = ["start", "swap"])]
    pub(crate) bare: bool,
    /// Promote, stop, and put the result in the place of this stopped cluster, which is kept beside it; see `walguard handover`
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with_all = ["no_start", "action"])]
    pub(crate) swap: Option<PathBuf>,
    /// Do not ask before it begins
    #[arg(long, short = 'y')]
    pub(crate) yes: bool,
    /// Show the plan and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Replace what is in the directory, if that is provably a stopped cluster
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Turn what is in the directory, if that is provably a stopped cluster, into what is restored: fetch what differs
    #[arg(long, conflicts_with = "overwrite")]
    pub(crate) delta: bool,
    /// Place a tablespace elsewhere: OLD=NEW, OLD being its directory at backup time or its OID; repeatable
    #[arg(long, alias = "tablespace-map", value_name = "OLD=NEW")]
    pub(crate) tablespace: Vec<String>,
    /// WAL that may lie in pg_wal ahead of the replay, for example '2 GiB'; by default as memory and free room allow
    #[arg(long, value_name = "SIZE")]
    pub(crate) wal_ahead: Option<bytesize::ByteSize>,
    /// TCP port of the restored server; by default it listens on its Unix socket only
    #[arg(long, value_name = "PORT")]
    pub(crate) port: Option<u16>,
    /// Directory for the restored server's Unix socket
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) socket_dir: Option<PathBuf>,
    /// Directory with PostgreSQL's programs of the backup's major version
    #[arg(long, value_name = "DIR", env = "WALGUARD_PG_BIN_DIR", hide_env_values = true, value_hint = ValueHint::DirPath)]
    pub(crate) pg_bin_dir: Option<PathBuf>,
    /// Have the restored server check its tables and indexes, in every database that has the extension amcheck
    #[arg(long, conflicts_with = "no_start")]
    pub(crate) amcheck: bool,
}

/// Prove that a restore works: make one in scratch space, look at it, throw it away
///
/// Restores the newest state (or another moment) into a directory of its own, with a server that nobody reaches but
/// walguard, and that neither archives nor connects to anything. Proves that it stands at the target, that tables and
/// indexes are sound, that what `drill.checks` of the settings asks is so, that a primary comes of it, and that every page
/// has its checksum. With a logical source the database is rebuilt in a server of its own, and every table's rows are counted.
/// The result goes into the repository. Nothing else is left behind. Exits with 3 if something is not as
/// it should be, and with 1 if the moment could not be restored or the repository is damaged; then it says what is damaged,
/// and which moments are unreachable because of it.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  walguard drill --config walguard.toml
  walguard drill --config walguard.toml --random --scratch-dir /srv/scratch --max-bytes '200 GiB' --max-time 2h
  walguard drill list --config walguard.toml"
)]
pub(crate) struct DrillArgs {
    #[command(subcommand)]
    pub(crate) verb: Option<DrillVerb>,
    /// The moment to restore, as for `walguard restore`; by default what `drill.moment` says
    #[arg(long, value_name = "TARGET", conflicts_with = "random")]
    pub(crate) to: Option<String>,
    /// Restore a random moment since the oldest backup
    #[arg(long)]
    pub(crate) random: bool,
    /// With a logical source: the database; by default that of the connection string, or the only one
    #[arg(long, value_name = "NAME")]
    pub(crate) database: Option<String>,
    /// Directory in which the drill makes one of its own
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) scratch_dir: Option<PathBuf>,
    /// The most that it may take of the disk, for example '50 GiB'; by default nine tenths of what is free
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_bytes: Option<bytesize::ByteSize>,
    /// The longest that it may take, for example 2h
    #[arg(long, value_name = "SPAN", value_parser = span)]
    pub(crate) max_time: Option<Duration>,
    /// Check tables and indexes, in every database that has the extension amcheck
    #[arg(long)]
    pub(crate) amcheck: bool,
    /// Keep the directory, with the server stopped in it
    #[arg(long)]
    pub(crate) keep: bool,
    /// Directory with PostgreSQL's programs of the cluster's major version
    #[arg(long, value_name = "DIR", env = "WALGUARD_PG_BIN_DIR", hide_env_values = true, value_hint = ValueHint::DirPath)]
    pub(crate) pg_bin_dir: Option<PathBuf>,
}

/// What to do about drills other than making one.
#[derive(Debug, Subcommand)]
pub(crate) enum DrillVerb {
    /// List the drills that were made, the newest last
    List {
        /// How many at most
        #[arg(long, value_name = "N", default_value_t = 20)]
        newest: usize,
    },
}

/// What happens once a restore reaches its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Action {
    /// Stay in recovery, readable, so that one can look before deciding
    Pause,
    /// Become a writable primary on a new timeline
    Promote,
    /// Stop the server
    Shutdown,
}

/// Prove that what is in the repository is whole
///
/// Reads every object (or what is new since the last run) and checks it; names what is damaged or missing and which
/// moments that makes unreachable. Exits with 3 if anything is.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard verify --config walguard.toml
  walguard verify --config walguard.toml --new")]
pub(crate) struct VerifyArgs {
    /// Only what was not verified before
    #[arg(long)]
    pub(crate) new: bool,
    /// Objects read at once
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
}

/// Remove backups and WAL that are past what the settings keep
///
/// Shows what would go. With --yes it goes. What a kept backup needs is never removed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard expire --config walguard.toml
  walguard expire --config walguard.toml --keep-backups 7 --keep-for '30 days' --yes")]
pub(crate) struct ExpireArgs {
    /// Keep at least so many backups
    #[arg(long, value_name = "N")]
    pub(crate) keep_backups: Option<u32>,
    /// Keep every moment of the last so long restorable, for example '30 days'
    #[arg(long, value_name = "SPAN", value_parser = span)]
    pub(crate) keep_for: Option<Duration>,
    /// Do it; without this, only show
    #[arg(long, short = 'y', conflicts_with = "dry_run")]
    pub(crate) yes: bool,
    /// Only show (this is the default)
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Let the database tell, in its WAL, who deletes, empties and drops
///
/// Triggers and event triggers that write role, session user, client, application, statement and row count into the WAL, in
/// the same transaction. So it is known even of the fastest statement who did it, and it is kept where nobody in the
/// database can remove it. Optional: walguard works without it, and then knows what it sees in pg_stat_activity.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  # look at it, then let a superuser run it
  walguard guard sql --config walguard.toml
  walguard guard sql --tables 'public.*' --protect | psql -h db1 -U postgres shop

  # or let walguard run it, as a superuser
  walguard guard install --config walguard.toml --pg postgres://postgres@db1/shop
  walguard guard status --config walguard.toml --database shop")]
pub(crate) struct GuardArgs {
    #[command(subcommand)]
    pub(crate) verb: GuardVerb,
}

/// What to do with the guard.
#[derive(Debug, Subcommand)]
pub(crate) enum GuardVerb {
    /// Print the SQL that installs it, or with --uninstall the SQL that removes it; connects to nothing
    Sql(GuardSqlArgs),
    /// Install it, or bring what is there up to date; needs a superuser, or the tables' owner and --no-definitions
    Install(GuardInstallArgs),
    /// Remove it
    Uninstall(GuardUninstallArgs),
    /// Compare what is there with what should be; exits with 3 if they differ
    Status(GuardInstallArgs),
}

/// Flags of `guard sql`.
#[derive(Debug, Args)]
pub(crate) struct GuardSqlArgs {
    #[command(flatten)]
    pub(crate) choice: GuardChoice,
    /// Print the SQL that removes it
    #[arg(long)]
    pub(crate) uninstall: bool,
}

/// Flags of `guard install` and `guard status`.
#[derive(Debug, Args)]
pub(crate) struct GuardInstallArgs {
    #[command(flatten)]
    pub(crate) choice: GuardChoice,
    /// The database; by default that of the connection string
    #[arg(long, value_name = "NAME")]
    pub(crate) database: Option<String>,
}

/// Flags of `guard uninstall`.
#[derive(Debug, Args)]
pub(crate) struct GuardUninstallArgs {
    /// The database; by default that of the connection string
    #[arg(long, value_name = "NAME")]
    pub(crate) database: Option<String>,
}

/// What the guard is to be, over what `[guard]` of the settings says.
#[derive(Debug, Args)]
pub(crate) struct GuardChoice {
    /// Tables to watch, as a pattern over schema.table; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub(crate) tables: Vec<String>,
    /// Tables not to watch though they match; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub(crate) exclude: Vec<String>,
    /// Tell of UPDATE too
    #[arg(long)]
    pub(crate) updates: bool,
    /// Refuse TRUNCATE, DROP TABLE and a DELETE of all rows unless the session says why: SET walguard.reason = '...'
    #[arg(long)]
    pub(crate) protect: bool,
    /// Do not count rows, which keeps the deleted rows of a statement until its end
    #[arg(long)]
    pub(crate) no_row_counts: bool,
    /// No event triggers, which only a superuser can make
    #[arg(long)]
    pub(crate) no_definitions: bool,
}

/// Try the channels through which people are told of incidents
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard notify list --config walguard.toml
  walguard notify test --config walguard.toml")]
pub(crate) struct NotifyArgs {
    #[command(subcommand)]
    pub(crate) verb: NotifyVerb,
}

/// What can be done with channels.
#[derive(Debug, Subcommand)]
pub(crate) enum NotifyVerb {
    Test(NotifyTestArgs),
    List(NotifyListArgs),
}

/// Send a message that says that it is a test, through every channel or one
///
/// Whatever a channel's severity and escalation are, the message goes out at once; nothing is tried again. Exits with 1 if
/// a receiver refuses it, and with 75 if one cannot be reached.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard notify test --config walguard.toml
  walguard notify test --channel oncall --config walguard.toml")]
pub(crate) struct NotifyTestArgs {
    /// Only this channel
    #[arg(long, value_name = "NAME")]
    pub(crate) channel: Option<String>,
}

/// List the channels: who is told of what, and when
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard notify list --config walguard.toml
  walguard notify list --config walguard.toml --json")]
pub(crate) struct NotifyListArgs {}

/// Show what happened when: rows that came, changed and went, tables emptied, definitions changed
///
/// Reads the repository only: indexes where there are any, archived WAL elsewhere, to the last second that is archived.
/// Shows the last archived hour unless a time is named. Exits with 3 if some of it could not be read.
#[derive(Debug, Args)]
#[command(after_help = "\
Times (--from, --to) are read as `restore --to` reads them:
  '2025-12-17 08:14 Asia/Jerusalem'   without a zone, in the zone of the settings
  '10 minutes ago'

Examples:
  walguard timeline --config walguard.toml
  walguard timeline --from '2025-12-17 08:00' --to '2025-12-17 08:30' --config walguard.toml
  walguard timeline --from '2 hours ago' --table 'public.*' --min-rows 100 --transactions --config walguard.toml
  walguard timeline --from '2025-12-17 08:14' --to '2025-12-17 08:16' --bucket 1s --config walguard.toml
  walguard timeline --follow --config walguard.toml")]
pub(crate) struct TimelineArgs {
    /// From this time on; by default an hour before the end
    #[arg(long, value_name = "TIME")]
    pub(crate) from: Option<String>,
    /// Up to this time; by default to the end of what is archived
    #[arg(long, value_name = "TIME", conflicts_with = "follow")]
    pub(crate) to: Option<String>,
    /// Only these tables: TABLE, SCHEMA.TABLE or DATABASE.SCHEMA.TABLE, with * and ?; repeatable
    #[arg(long, value_name = "PATTERN")]
    pub(crate) table: Vec<String>,
    /// Only these databases, by name (with * and ?) or OID; repeatable
    #[arg(long, value_name = "PATTERN")]
    pub(crate) database: Vec<String>,
    /// Leave out times, tables and transactions with fewer changed rows; what was dropped or truncated is shown always
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) min_rows: u64,
    /// How long a line's time is, for example 10s, 5m, 1h or '1 day'; by default a minute or as much as fits the screen
    #[arg(long, value_name = "SPAN", value_parser = span)]
    pub(crate) bucket: Option<Duration>,
    /// List the largest transactions instead: id, time, LSN, rows by table
    #[arg(long, conflicts_with_all = ["follow", "bucket"])]
    pub(crate) transactions: bool,
    /// Go on as more is archived, until stopped
    #[arg(long)]
    pub(crate) follow: bool,
    /// Follow this timeline's history instead of the newest
    #[arg(long, value_name = "ID", value_parser = timeline)]
    pub(crate) timeline: Option<TimelineId>,
}

/// Look after the indexes that say what archived WAL holds
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard index status --config walguard.toml
  walguard index rebuild --config walguard.toml")]
pub(crate) struct IndexArgs {
    #[command(subcommand)]
    pub(crate) verb: IndexVerb,
}

/// What can be done with indexes.
#[derive(Debug, Subcommand)]
pub(crate) enum IndexVerb {
    Rebuild(IndexRebuildArgs),
    Status(IndexStatusArgs),
}

/// Make the indexes that are missing, from the archived WAL
///
/// The agent writes an index beside each segment; what it missed, or what was archived without it, is made here. Indexes
/// are derived: nothing is lost with them but time. Exits with 3 if some WAL could not be read.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard index rebuild --config walguard.toml
  walguard index rebuild --config walguard.toml --from 16/B3000000 --to 16/B9000000
  walguard index rebuild --config walguard.toml --from 000000010000001600000037 --all")]
pub(crate) struct IndexRebuildArgs {
    /// Begin with this segment, or the one that holds this LSN
    #[arg(long, value_name = "LSN|SEGMENT")]
    pub(crate) from: Option<String>,
    /// End with this segment, or the one that holds this LSN
    #[arg(long, value_name = "LSN|SEGMENT")]
    pub(crate) to: Option<String>,
    /// Only segments of this timeline; by default of all
    #[arg(long, value_name = "ID", value_parser = timeline)]
    pub(crate) timeline: Option<TimelineId>,
    /// Read the indexes that are there, and make those anew that cannot be read
    #[arg(long)]
    pub(crate) check: bool,
    /// Make all indexes anew, and replace those that say something else
    #[arg(long, conflicts_with = "check")]
    pub(crate) all: bool,
}

/// Show how many segments have an index, and which have none
///
/// Exits with 3 if segments lack theirs; the last one gets it when the next begins.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard index status --config walguard.toml --json")]
pub(crate) struct IndexStatusArgs {}

/// Look into archived WAL
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard wal explain 000000010000001600000037 --config walguard.toml")]
pub(crate) struct WalArgs {
    #[command(subcommand)]
    pub(crate) verb: WalVerb,
}

/// What can be done with WAL.
#[derive(Debug, Subcommand)]
pub(crate) enum WalVerb {
    Explain(ExplainArgs),
}

/// Print records of archived WAL, as `pg_waldump` does, with the names of tables
///
/// Reads the repository only, unfinished segments included. With --json, one object a line. Exits with 3 if some record
/// could not be explained.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard wal explain 000000010000001600000037 --config walguard.toml
  walguard wal explain 16/B3000000..16/B4000000 --rmgr Transaction --config walguard.toml
  walguard wal explain 16/B3000000.. --xid 4711 --limit 100 --json --config walguard.toml")]
pub(crate) struct ExplainArgs {
    /// A segment's name, or FROM..TO as LSNs; without TO, as far as the WAL reaches
    #[arg(value_name = "SEGMENT|FROM..TO")]
    pub(crate) place: String,
    /// Follow this timeline's history; by default the segment's own timeline, or the newest
    #[arg(long, value_name = "ID", value_parser = timeline)]
    pub(crate) timeline: Option<TimelineId>,
    /// Only records of this transaction (of a subtransaction by its own id); 0 for those of none
    #[arg(long, value_name = "XID")]
    pub(crate) xid: Option<u32>,
    /// Only records of this resource manager, for example Heap
    #[arg(long, value_name = "NAME")]
    pub(crate) rmgr: Option<String>,
    /// Only records that touch this file: TABLESPACE/DATABASE/NUMBER, or the number alone
    #[arg(long, value_name = "FILE")]
    pub(crate) relation: Option<String>,
    /// Stop after so many records
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    /// Without names: line for line what `pg_waldump` prints
    #[arg(long)]
    pub(crate) plain: bool,
}

/// Put one WAL file into the repository, as `archive_command`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  # postgresql.conf
  archive_command = 'walguard wal-push --config /etc/walguard.toml %p'")]
pub(crate) struct WalPushArgs {
    /// The file: %p of `archive_command`
    #[arg(value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) path: PathBuf,
}

/// Get one WAL file out of the repository, as `restore_command`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  # postgresql.conf
  restore_command = 'walguard wal-fetch --config /etc/walguard.toml %f %p'")]
pub(crate) struct WalFetchArgs {
    /// Name of the WAL file: %f of `restore_command`
    #[arg(value_name = "FILE")]
    pub(crate) file: String,
    /// Where to put it: %p of `restore_command`
    #[arg(value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) path: PathBuf,
    /// Leave no helper behind that fetches what the server will ask for next
    #[arg(long)]
    pub(crate) no_prefetch: bool,
    /// Be that helper: fetch what comes after FILE, until the server asks for nothing any more
    #[arg(long, hide = true)]
    pub(crate) prefetch: bool,
}

/// Show the whole of it in half a minute, on a private PostgreSQL, leaving nothing behind
///
/// Replays what happened to a real game: triggers that protect 18 tables are dropped, and everything is deleted. The alarm
/// says who did it and how to go back; its own command is run, and what it brings back is compared with what there was.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard demo
  walguard demo --report incident.md --pg-bin-dir /usr/lib/postgresql/17/bin")]
pub(crate) struct DemoArgs {
    /// Keep the report of the incident in this file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) report: Option<PathBuf>,
    /// Directory with PostgreSQL's programs; by default the newest that is found
    #[arg(long, value_name = "DIR", env = "WALGUARD_PG_BIN_DIR", hide_env_values = true, value_hint = ValueHint::DirPath)]
    pub(crate) pg_bin_dir: Option<PathBuf>,
}

/// Make a restored directory a cluster of its own, or put it in the place of the original
///
/// What `walguard restore` left waiting becomes a primary and is stopped, and the settings of the restore are taken out of
/// it: it archives again, connects where the original did, and listens where the original did. With --swap it then takes the
/// place of the original's data directory on the same host, which is kept beside it under a dated name. Start it as always.
/// Everything that can stand in the way is looked for before anything is changed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard handover /srv/restored/00000001-000000001A2B3C40 --swap /var/lib/postgresql/15/main
  walguard handover /srv/restored/00000001-000000001A2B3C40")]
pub(crate) struct HandoverArgs {
    /// The restored directory
    #[arg(value_name = "RESTORED", value_hint = ValueHint::DirPath)]
    pub(crate) restored: PathBuf,
    /// The original's data directory, of a stopped server, on the same file system
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) swap: Option<PathBuf>,
    /// Do not ask before it begins
    #[arg(long, short = 'y')]
    pub(crate) yes: bool,
    /// Directory with PostgreSQL's programs of the cluster's major version
    #[arg(long, value_name = "DIR", env = "WALGUARD_PG_BIN_DIR", hide_env_values = true, value_hint = ValueHint::DirPath)]
    pub(crate) pg_bin_dir: Option<PathBuf>,
}

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  walguard completions bash > /etc/bash_completion.d/walguard
  walguard completions zsh > ~/.zfunc/_walguard")]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub(crate) shell: clap_complete::Shell,
}

/// A path, or nothing: see [`GlobalArgs::without_empty`].
fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// A timeline's number, from 1.
fn timeline(text: &str) -> Result<TimelineId, String> {
    let number: u32 = text.parse().map_err(|_| "a timeline is a number from 1 up, as `walguard list` shows it")?;
    TimelineId::new(number).ok_or_else(|| "timelines begin with 1".into())
}

/// A span of time for people: `30 days`, `36h`.
fn span(text: &str) -> Result<Duration, String> {
    walguard::settings::parse_span(text)
}
