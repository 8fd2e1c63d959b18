//! What of the server's settings would hurt: findings for people, before anything runs.
//!
//! `gather` asks, `judge` (pure) tells what it means.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::SignedDuration;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::connection::sql_error;
use super::{CaptureError, Config, ConnInfo, Feedback, SlotInfo, Start, StreamEvent, Walsender, connect_sql};
use crate::pg::{PgTime, Position, ServerVersion};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, but somebody should look at it.
    Warning,
    /// It does not work like this.
    Error,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What was looked at: a setting's name, `version`, `server`, `slot`, `role`, `sql`, `tls`, `clock`, `senders`.
    pub topic: String,
    /// What was found.
    pub text: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Finding {
    fn new(level: Level, topic: &str, text: impl Into<String>) -> Self {
        Self { level, topic: topic.to_owned(), text: text.into(), hint: None }
    }

    pub(super) fn ok(topic: &str, text: impl Into<String>) -> Self {
        Self::new(Level::Ok, topic, text)
    }

    pub(super) fn warning(topic: &str, text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..Self::new(Level::Warning, topic, text) }
    }

    pub(super) fn error(topic: &str, text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..Self::new(Level::Error, topic, text) }
    }
}

/// Looks at everything that archiving needs: over a replication connection and, if it is allowed, over SQL. Changes
/// nothing on the server.
///
/// # Errors
/// If there is no replication connection to be had, or it breaks: then nothing else matters.
pub async fn preflight(info: &ConnInfo, config: &Config) -> Result<Vec<Finding>, CaptureError> {
    // Under a name of its own: it must not pass for the agent, neither for people nor for a synchronous commit.
    let ours = info.clone().with_application_name(&format!("{}-check", info.application_name));
    let facts = Facts { application_name: info.application_name.clone(), ..gather(&ours, config).await? };
    Ok(judge(&facts, config))
}

/// Settings that are looked at; `SHOW` tells them on a replication connection, too.
const SETTINGS: &[&str] = &[
    "wal_level",
    "max_wal_senders",
    "max_replication_slots",
    "max_slot_wal_keep_size",
    "idle_replication_slot_timeout", // 18+
    "wal_sender_timeout",
    "full_page_writes",
    "wal_compression",
    "data_checksums",
    "synchronous_standby_names",
    "wal_segment_size",
    "archive_mode",
    "archive_command",
    "archive_library", // 15+
];

/// What the server tells of itself.
#[derive(Clone, Debug)]
struct Facts {
    version: ServerVersion,
    application_name: String,
    endpoint: String,
    local: bool,
    encrypted: bool,
    standby: bool,
    settings: BTreeMap<&'static str, String>,
    /// `None` if it could not be asked (14 without SQL).
    slot: Option<SlotFacts>,
    /// How far the server's clock is ahead of ours; `None` if it was not told.
    clock: Option<SignedDuration>,
    /// What only SQL tells, or why there is none.
    sql: Result<SqlFacts, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum SlotFacts {
    Missing,
    NotPhysical,
    Physical(Option<Position>),
}

#[derive(Clone, Debug, Default)]
struct SqlFacts {
    superuser: bool,
    monitor: bool,
    /// Walsenders in use, ours for this check not counted.
    senders: u32,
    slots: u32,
    /// `wal_status` of our slot, `safe_wal_size` in bytes, and whether somebody streams from it.
    slot: Option<(String, Option<i64>, bool)>,
    slot_is_logical: bool,
    /// The last attempt of `archive_command` failed.
    archiver_fails: bool,
}

async fn gather(info: &ConnInfo, config: &Config) -> Result<Facts, CaptureError> {
    let mut walsender = Walsender::connect(info).await?;
    let version = walsender.server_version();
    let system = walsender.identify_system().await?;
    let mut settings = BTreeMap::new();
    for name in SETTINGS {
        match walsender.show(name).await {
            Ok(value) => drop(settings.insert(*name, value)),
            Err(error) if error.server().is_some() => {} // not in this version, or not for this role
            Err(error) => return Err(error),
        }
    }
    let sql = match connect_sql(info).await {
        Ok(client) => ask_sql(&client, &config.slot).await.map_err(|error| error.to_string()),
        Err(error) => Err(crate::backoff::Chain(&error).to_string()),
    };
    let slot = match walsender.read_slot(&config.slot).await {
        Ok(Some(SlotInfo { restart })) => Some(SlotFacts::Physical(restart)),
        Ok(None) => Some(SlotFacts::Missing),
        Err(CaptureError::Unsupported(_)) => sql.as_ref().ok().map(|sql| match (&sql.slot, sql.slot_is_logical) {
            (_, true) => SlotFacts::NotPhysical,
            (Some(_), _) => SlotFacts::Physical(Some(Position { timeline: system.timeline, lsn: system.flush_lsn })),
            (None, _) => SlotFacts::Missing,
        }),
        Err(CaptureError::Server(_)) => Some(SlotFacts::NotPhysical), // it refuses to read a logical one
        Err(error) => return Err(error),
    };
    Ok(Facts {
        version,
        application_name: info.application_name.clone(),
        endpoint: walsender.endpoint().to_owned(),
        local: info.hosts.iter().any(|host| host.is_local() && host.to_string() == walsender.endpoint()),
        encrypted: walsender.is_encrypted(),
        standby: walsender.parameter("in_hot_standby") == Some("on"),
        settings,
        slot,
        sql,
        // Last: it uses the connection up.
        clock: clock(walsender, Position { timeline: system.timeline, lsn: system.flush_lsn }).await?,
    })
}

/// How far the server's clock is ahead of ours: a stream from the end of the WAL, asked for a sign of life, tells the
/// server's time without SQL.
async fn clock(walsender: Walsender, end: Position) -> Result<Option<SignedDuration>, CaptureError> {
    /// The answer takes a round trip.
    const PATIENCE: Duration = Duration::from_secs(5);
    let Start::Streaming(mut stream) = walsender.start_physical(None, end).await? else { return Ok(None) };
    let asked_at = jiff::Timestamp::now();
    stream.send_feedback(Feedback { reply_requested: true, ..Feedback::default() }).await?;
    let answer = async {
        loop {
            match stream.next().await? {
                StreamEvent::Keepalive { sent_at, .. } => return Ok(Some(sent_at)),
                StreamEvent::Wal { .. } => {}
                StreamEvent::EndOfTimeline { .. } => return Ok::<_, CaptureError>(None),
            }
        }
    };
    let Ok(answer) = tokio::time::timeout(PATIENCE, answer).await else { return Ok(None) };
    let half_way = asked_at.duration_until(jiff::Timestamp::now()) / 2;
    let ours = asked_at.saturating_add(half_way).unwrap_or(asked_at);
    Ok(answer?.map(|sent_at: PgTime| sent_at.since(PgTime::from(ours))))
}

async fn ask_sql(client: &Client, slot: &str) -> Result<SqlFacts, CaptureError> {
    let role = "SELECT rolsuper, pg_has_role(current_user, 'pg_monitor', 'MEMBER') FROM pg_roles \
                WHERE rolname = current_user";
    let role = one_row(client, role).await?;
    let column = |row: &[Option<String>], index: usize| row.get(index).cloned().flatten();
    let is_true = |value: Option<String>| value.as_deref() == Some("t");
    let counts = "SELECT (SELECT count(*) FROM pg_stat_replication), (SELECT count(*) FROM pg_replication_slots), \
                  (SELECT coalesce(last_failed_time > last_archived_time, last_failed_time IS NOT NULL) \
                   FROM pg_stat_archiver)";
    let counts = one_row(client, counts).await?;
    let number = |value: Option<String>| value.and_then(|text| text.parse::<u32>().ok()).unwrap_or_default();
    let slot = slot.replace('\'', "''");
    let state = format!(
        "SELECT slot_type, wal_status, safe_wal_size, active FROM pg_replication_slots WHERE slot_name = '{slot}'"
    );
    let state = one_row(client, &state).await?;
    Ok(SqlFacts {
        superuser: is_true(column(&role, 0)),
        monitor: is_true(column(&role, 1)),
        senders: number(column(&counts, 0)).saturating_sub(1),
        slots: number(column(&counts, 1)),
        archiver_fails: is_true(column(&counts, 2)),
        slot_is_logical: column(&state, 0).as_deref() == Some("logical"),
        slot: column(&state, 0).map(|_| {
            let safe = column(&state, 2).and_then(|text| text.parse().ok());
            (column(&state, 1).unwrap_or_default(), safe, is_true(column(&state, 3)))
        }),
    })
}

/// The first row of a result, as text; empty if there is none.
async fn one_row(client: &Client, query: &str) -> Result<Vec<Option<String>>, CaptureError> {
    let messages = client.simple_query(query).await.map_err(|error| sql_error("the server", error))?;
    let row = messages.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    Ok(row.map_or(Vec::new(), |row| (0..row.len()).map(|index| row.get(index).map(str::to_owned)).collect()))
}

/// What the facts mean. Pure.
fn judge(facts: &Facts, config: &Config) -> Vec<Finding> {
    let mut findings = vec![judge_version(facts), judge_server(facts), judge_tls(facts)];
    findings.extend(judge_sql(facts));
    findings.extend(judge_wal_level(facts));
    findings.extend(judge_senders(facts));
    findings.extend(judge_slot(facts, config));
    findings.extend(judge_slot_limits(facts));
    findings.extend(judge_pages(facts));
    findings.extend(judge_synchronous(facts));
    findings.extend(judge_archive_command(facts));
    findings.extend(judge_clock(facts));
    for (name, text) in [("wal_segment_size", "WAL segments of"), ("wal_compression", "full page images in WAL:")] {
        if let Some(value) = facts.settings.get(name) {
            findings.push(Finding::ok(name, format!("{text} {value}")));
        }
    }
    findings
}

impl Facts {
    fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str)
    }
}

fn judge_version(facts: &Facts) -> Finding {
    let text = format!("PostgreSQL {}", facts.version);
    if facts.version.is_supported() {
        return Finding::ok("version", text);
    }
    let (min, max) = (ServerVersion::MAJOR_MIN, ServerVersion::MAJOR_MAX);
    Finding::warning(
        "version",
        format!("{text} is newer than walguard knows"),
        format!("walguard was tested with {min} to {max}"),
    )
}

fn judge_server(facts: &Facts) -> Finding {
    let kind = if facts.standby { "a standby" } else { "the primary" };
    Finding::ok("server", format!("{} is {kind}", facts.endpoint))
}

fn judge_tls(facts: &Facts) -> Finding {
    if facts.encrypted {
        Finding::ok("tls", "the connection is encrypted")
    } else if facts.local {
        Finding::ok("tls", "the connection is not encrypted, and does not leave this machine")
    } else {
        let hint = "say sslmode=verify-full and sslrootcert=FILE in the connection string (and ssl = on in the server)";
        Finding::warning("tls", "the connection is not encrypted: whoever listens sees all data", hint)
    }
}

fn judge_sql(facts: &Facts) -> Vec<Finding> {
    match &facts.sql {
        Ok(sql) => {
            let role = if sql.superuser {
                Finding::ok("role", "a superuser; REPLICATION and pg_monitor would do")
            } else {
                Finding::ok("role", "has REPLICATION")
            };
            let monitor = if sql.superuser || sql.monitor {
                Finding::ok("pg_monitor", "the role sees all statistics")
            } else {
                let hint = "GRANT pg_monitor TO <role>";
                Finding::warning("pg_monitor", "the role does not see the statistics of other sessions", hint)
            };
            vec![role, monitor]
        }
        Err(problem) => {
            let hint = "let the role connect to a database, too (pg_hba.conf: hostssl postgres <role> <address>/32 \
                        scram-sha-256), or name another one with dbname=";
            vec![Finding::warning("sql", format!("no SQL connection, so less could be checked: {problem}"), hint)]
        }
    }
}

fn judge_wal_level(facts: &Facts) -> Option<Finding> {
    let level = facts.setting("wal_level")?;
    Some(match level {
        "minimal" => Finding::error(
            "wal_level",
            "wal_level = minimal: the WAL does not hold what a restore needs",
            "ALTER SYSTEM SET wal_level = replica; and restart",
        ),
        level => Finding::ok("wal_level", level),
    })
}

/// The stream, and a base backup beside it.
const SENDERS_NEEDED: u32 = 2;

fn judge_senders(facts: &Facts) -> Option<Finding> {
    let max: u32 = facts.setting("max_wal_senders")?.parse().ok()?;
    let used = facts.sql.as_ref().map_or(0, |sql| sql.senders);
    let streaming = facts.sql.as_ref().is_ok_and(|sql| sql.slot.as_ref().is_some_and(|(_, _, active)| *active));
    let needed = SENDERS_NEEDED - u32::from(streaming);
    let text = format!("{used} of {max} walsenders are in use");
    Some(if max.saturating_sub(used) < needed {
        let hint = "ALTER SYSTEM SET max_wal_senders = 10; and restart: the stream takes one, a base backup another";
        Finding::warning("max_wal_senders", text, hint)
    } else {
        Finding::ok("max_wal_senders", text)
    })
}

fn judge_slot(facts: &Facts, config: &Config) -> Option<Finding> {
    let name = &config.slot;
    let new_base = "what it held is lost: drop it (SELECT pg_drop_replication_slot(...)); the agent makes a new one and takes a new base backup";
    Some(match facts.slot.as_ref()? {
        SlotFacts::Missing => {
            let max: Option<u32> = facts.setting("max_replication_slots").and_then(|text| text.parse().ok());
            match (&facts.sql, max) {
                (Ok(sql), Some(max)) if sql.slots >= max => Finding::error(
                    "slot",
                    format!("slot {name} does not exist, and all {max} slots are in use"),
                    "drop a slot that nobody uses, or ALTER SYSTEM SET max_replication_slots = 10; and restart",
                ),
                _ => Finding::warning("slot", format!("slot {name} does not exist yet"), "walguard init creates it"),
            }
        }
        SlotFacts::NotPhysical => {
            Finding::error("slot", format!("slot {name} is a logical slot"), "name another slot in [postgres] slot")
        }
        SlotFacts::Physical(restart) => match facts.sql.as_ref().ok().and_then(|sql| sql.slot.as_ref()) {
            Some((status, _, _)) if status == "lost" => {
                Finding::error("slot", format!("slot {name} was invalidated"), new_base)
            }
            Some((status, _, _)) if status == "unreserved" => Finding::warning(
                "slot",
                format!("slot {name} no longer holds its WAL: the next checkpoint removes it"),
                "start the agent now, or see what keeps it from archiving: walguard status",
            ),
            Some((_, Some(safe), active)) => {
                let safe = bytesize::ByteSize(u64::try_from(*safe).unwrap_or_default());
                let who = if *active { "in use" } else { "free" };
                Finding::ok(
                    "slot",
                    format!("slot {name} is {who}; {safe} of WAL may be written before it is invalidated"),
                )
            }
            Some((_, None, active)) => {
                let who = if *active { "in use" } else { "free" };
                Finding::ok("slot", format!("slot {name} is {who}"))
            }
            None => match restart {
                Some(position) => Finding::ok("slot", format!("slot {name} holds WAL from {}", position.lsn)),
                None => Finding::warning("slot", format!("slot {name} holds no WAL"), new_base),
            },
        },
    })
}

fn judge_slot_limits(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    match facts.setting("max_slot_wal_keep_size") {
        Some("-1") => findings.push(Finding::warning(
            "max_slot_wal_keep_size",
            "max_slot_wal_keep_size = -1: while the agent is away, WAL fills the server's disk without end",
            "ALTER SYSTEM SET max_slot_wal_keep_size = '<half of the free disk space>'; and reload",
        )),
        Some(size) => {
            findings.push(Finding::ok("max_slot_wal_keep_size", format!("the slot holds back at most {size} of WAL")));
        }
        None => {}
    }
    match facts.setting("idle_replication_slot_timeout") {
        None | Some("0") => {}
        Some(limit) => findings.push(Finding::warning(
            "idle_replication_slot_timeout",
            format!(
                "a slot that nobody reads for {limit} is invalidated: an agent that is away for longer leaves a gap"
            ),
            "ALTER SYSTEM SET idle_replication_slot_timeout = 0; and reload",
        )),
    }
    if facts.setting("wal_sender_timeout") == Some("0") {
        findings.push(Finding::warning(
            "wal_sender_timeout",
            "wal_sender_timeout = 0: the server never notices that an agent died, and its slot stays in use",
            "ALTER SYSTEM SET wal_sender_timeout = '60s'; and reload",
        ));
    }
    findings
}

fn judge_pages(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    match facts.setting("full_page_writes") {
        Some("off") if facts.standby => findings.push(Finding::error(
            "full_page_writes",
            "full_page_writes = off: no base backup can be taken from this standby",
            "ALTER SYSTEM SET full_page_writes = on; on the primary, and reload",
        )),
        Some("off") => findings.push(Finding::warning(
            "full_page_writes",
            "full_page_writes = off: a crash of the server can damage pages",
            "ALTER SYSTEM SET full_page_writes = on; and reload",
        )),
        Some(value) => findings.push(Finding::ok("full_page_writes", value)),
        None => {}
    }
    match facts.setting("data_checksums") {
        Some("off") => findings.push(Finding::warning(
            "data_checksums",
            "the cluster has no page checksums: a backup cannot tell whether its pages are whole",
            "stop the server and run pg_checksums --enable",
        )),
        Some(value) => findings.push(Finding::ok("data_checksums", value)),
        None => {}
    }
    findings
}

fn judge_synchronous(facts: &Facts) -> Option<Finding> {
    let topic = "synchronous_standby_names";
    let value = facts.setting(topic)?;
    let name = &facts.application_name;
    let names = synchronous_names(value);
    Some(if names.is_empty() {
        Finding::ok(topic, "commits do not wait for the archive")
    } else if names.iter().any(|listed| listed.eq_ignore_ascii_case(name)) {
        Finding::ok(topic, format!("commits wait for {name}: none is acknowledged that is not durable off-site"))
    } else if names.iter().any(|listed| listed == "*") {
        Finding::warning(
            topic,
            format!("synchronous_standby_names = '{value}' matches walguard, too: commits may wait for the archive"),
            format!("list the standbys by name, with or without {name}"),
        )
    } else {
        Finding::ok(topic, format!("commits wait for {}, not for the archive", names.join(", ")))
    })
}

/// The names of `synchronous_standby_names`: `a, "b c"`, `FIRST 2 (a, b)`, `ANY 1 (*)`, `2 (a, b)`.
/// (Postgres: `replication/syncrep_gram.y`.)
fn synchronous_names(value: &str) -> Vec<String> {
    let list = match value.split_once('(') {
        Some((_, rest)) => rest.rsplit_once(')').map_or(rest, |(list, _)| list),
        None => value,
    };
    list.split(',')
        .map(|name| name.trim())
        .map(|name| match name.strip_prefix('"').and_then(|name| name.strip_suffix('"')) {
            Some(quoted) => quoted.replace("\"\"", "\""),
            None => name.to_owned(),
        })
        .filter(|name| !name.is_empty())
        .collect()
}

fn judge_archive_command(facts: &Facts) -> Option<Finding> {
    let topic = "archive_command";
    if facts.setting("archive_mode")? == "off" {
        return Some(Finding::ok(topic, "off: walguard streams and does not need it"));
    }
    // `(disabled)` is shown for an empty command where archive_mode is off.
    let given = |name| facts.setting(name).filter(|value| !value.is_empty() && *value != "(disabled)");
    let fails = facts.sql.as_ref().is_ok_and(|sql| sql.archiver_fails);
    Some(match given("archive_library").or(given("archive_command")) {
        None => Finding::warning(
            topic,
            "archive_mode is on without an archive_command: the server keeps all WAL for ever",
            "ALTER SYSTEM SET archive_mode = off; and restart, or set an archive_command",
        ),
        Some(command) if fails => Finding::warning(
            topic,
            format!("archive_command fails ({command}): the server keeps WAL until it succeeds"),
            "see the server's log and SELECT * FROM pg_stat_archiver",
        ),
        Some(command) => Finding::ok(topic, format!("in use beside walguard: {command}")),
    })
}

/// A difference that makes a target time mean another commit than the one that people saw.
const CLOCK_DIFFERENCE_MAX: SignedDuration = SignedDuration::from_secs(1);

fn judge_clock(facts: &Facts) -> Option<Finding> {
    let ahead = facts.clock?;
    let text = format!(
        "the server's clock is {:.3} s {} ours",
        ahead.abs().as_secs_f64(),
        if ahead.is_negative() { "behind" } else { "ahead of" }
    );
    Some(if ahead.abs() > CLOCK_DIFFERENCE_MAX {
        Finding::warning(
            "clock",
            text,
            "synchronise both clocks (NTP): restore targets are times by the server's clock",
        )
    } else {
        Finding::ok("clock", text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let settings = [
            ("wal_level", "replica"),
            ("max_wal_senders", "10"),
            ("max_replication_slots", "10"),
            ("max_slot_wal_keep_size", "10GB"),
            ("wal_sender_timeout", "1min"),
            ("full_page_writes", "on"),
            ("wal_compression", "off"),
            ("data_checksums", "on"),
            ("synchronous_standby_names", ""),
            ("wal_segment_size", "16MB"),
            ("archive_mode", "off"),
            ("archive_command", "(disabled)"),
        ];
        Facts {
            version: ServerVersion::new(150_020),
            application_name: "walguard".to_owned(),
            endpoint: "db1:5432".to_owned(),
            local: false,
            encrypted: true,
            standby: false,
            settings: settings.map(|(name, value)| (name, value.to_owned())).into(),
            slot: Some(SlotFacts::Physical(None)),
            clock: Some(SignedDuration::from_millis(20)),
            sql: Ok(SqlFacts { monitor: true, slot: Some(("reserved".to_owned(), None, true)), ..SqlFacts::default() }),
        }
    }

    fn worst(facts: &Facts, topic: &str) -> Option<Level> {
        let findings = judge(facts, &Config::default());
        let hintless = findings.iter().find(|f| f.level > Level::Ok && f.hint.is_none());
        assert_eq!(hintless, None, "what is not in order has a hint");
        findings.iter().filter(|finding| finding.topic == topic).map(|finding| finding.level).max()
    }

    #[test]
    fn a_server_in_order_has_no_warning() {
        let findings = judge(&facts(), &Config::default());
        assert!(findings.iter().all(|finding| finding.level == Level::Ok), "{findings:#?}");
    }

    #[test]
    fn each_setting_that_hurts_is_found() {
        let table = [
            ("wal_level", "minimal", "wal_level", Level::Error),
            ("max_wal_senders", "0", "max_wal_senders", Level::Warning),
            ("max_slot_wal_keep_size", "-1", "max_slot_wal_keep_size", Level::Warning),
            ("idle_replication_slot_timeout", "1d", "idle_replication_slot_timeout", Level::Warning),
            ("wal_sender_timeout", "0", "wal_sender_timeout", Level::Warning),
            ("full_page_writes", "off", "full_page_writes", Level::Warning),
            ("data_checksums", "off", "data_checksums", Level::Warning),
            ("synchronous_standby_names", "*", "synchronous_standby_names", Level::Warning),
            ("synchronous_standby_names", "ANY 1 (*)", "synchronous_standby_names", Level::Warning),
            ("synchronous_standby_names", "FIRST 1 (a, walguard)", "synchronous_standby_names", Level::Ok),
            ("archive_mode", "on", "archive_command", Level::Warning),
        ];
        for (name, value, topic, level) in table {
            let mut facts = facts();
            facts.settings.insert(name, value.to_owned());
            assert_eq!(worst(&facts, topic), Some(level), "{name} = {value}");
        }
    }

    #[test]
    fn a_slot_is_judged_by_what_it_still_holds() {
        for (status, level) in [("reserved", Level::Ok), ("unreserved", Level::Warning), ("lost", Level::Error)] {
            let mut facts = facts();
            facts.sql = Ok(SqlFacts { slot: Some((status.to_owned(), None, false)), ..SqlFacts::default() });
            assert_eq!(worst(&facts, "slot"), Some(level), "{status}");
        }
        let mut facts = facts();
        facts.slot = Some(SlotFacts::Missing);
        facts.sql = Ok(SqlFacts { slots: 10, ..SqlFacts::default() });
        assert_eq!(worst(&facts, "slot"), Some(Level::Error), "no slot is left");
        facts.sql = Err("no pg_hba.conf entry".to_owned());
        assert_eq!(worst(&facts, "slot"), Some(Level::Warning));
        assert_eq!(worst(&facts, "sql"), Some(Level::Warning));
    }

    #[test]
    fn clocks_that_differ_by_more_than_a_second_are_told() {
        for (millis, level) in
            [(999, Level::Ok), (-1_000, Level::Ok), (1_001, Level::Warning), (-5_000, Level::Warning)]
        {
            let mut facts = facts();
            facts.clock = Some(SignedDuration::from_millis(millis));
            assert_eq!(worst(&facts, "clock"), Some(level), "{millis} ms");
        }
    }

    #[test]
    fn synchronous_names_are_read_in_every_form() {
        assert_eq!(synchronous_names("a, \"b c\""), ["a", "b c"]);
        assert_eq!(synchronous_names("FIRST 2 (a, b)"), ["a", "b"]);
        assert_eq!(synchronous_names("ANY 1 (*)"), ["*"]);
        assert!(synchronous_names("").is_empty());
    }
}
