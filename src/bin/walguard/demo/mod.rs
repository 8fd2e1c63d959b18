//! `walguard demo`: what once happened to a game, and how it ends with walguard, in half a minute. It uses the same verbs
//! as everybody, as processes of their own, takes the way back out of the alarm's own text, and leaves nothing behind.

mod stage;

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use serde::Serialize;
use tokio_postgres::Client;

use crate::Outcome;
use crate::args::DemoArgs;
use crate::context::Context;
use crate::render;
use crate::report::UsageError;
use stage::{Stage, Told};

/// How long anything may take that the demo waits for. A laptop takes a second.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often a condition is looked at that the demo waits for.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The game's database.
const DATABASE: &str = "game";

/// Its tables, and how many rows each has: as few as a young game has, so that no threshold of rows would notice.
const TABLES: [(&str, i64); 18] = [
    ("users", 24),
    ("games", 12),
    ("players", 31),
    ("moves", 88),
    ("cards", 52),
    ("decks", 6),
    ("rounds", 36),
    ("scores", 36),
    ("messages", 41),
    ("friends", 17),
    ("invites", 9),
    ("sessions", 14),
    ("settings", 24),
    ("badges", 11),
    ("levels", 8),
    ("teams", 5),
    ("purchases", 7),
    ("audit_log", 63),
];

pub(crate) async fn run(context: Context, args: DemoArgs) -> anyhow::Result<Outcome> {
    if rustix::process::geteuid().is_root() {
        let hint = "`scripts/demo` does that by itself; or run it as another user, for example: \
                    setpriv --reuid=postgres --regid=postgres --clear-groups walguard demo";
        return Err(UsageError::with_hint("PostgreSQL refuses to run as root, and so does its demo", hint).into());
    }
    let cancel = context.cancel_on_signals()?;
    let mut stage = Stage::set(args.pg_bin_dir.as_deref())?;
    let mut show = Show { quiet: context.json, steps: Vec::new() };
    let result = cancel.run_until_cancelled(play(&mut stage, &mut show, args.report.as_deref())).await;
    let result = match result {
        Some(Ok(result)) => Ok(result),
        Some(Err(error)) => {
            stage.tell_logs();
            Err(error)
        }
        None => Err(anyhow::anyhow!("stopped")),
    };
    stage.strike(); // whatever happened
    let report = result?;
    show.end(&report)?;
    Ok(if report.is_exact() { Outcome::Done } else { Outcome::Failed(crate::report::FAILED) })
}

/// The story itself.
async fn play(stage: &mut Stage, show: &mut Show, report: Option<&Path>) -> anyhow::Result<Report> {
    show.begin(stage)?;
    let client = prepare(stage, show).await?;

    let begin = Instant::now();
    let goal = "INSERT INTO moves VALUES (1000, 'the last good move'); UPDATE games SET note = 'won' WHERE id = 12";
    client.batch_execute(goal).await.context("play on")?;
    let before = Content::of(&client).await?;
    show.step("a game is won: the last good commit", begin.elapsed())?;

    let culprit = stage.culprit().await?;
    let begin = Instant::now();
    culprit.batch_execute(&for_each(|table| format!("DROP TRIGGER protect ON {table}"))).await?;
    let dropped_at = SystemTime::now();
    show.disaster("migrate.py, on the wrong server: drops the triggers", begin.elapsed())?;
    let warning = wait("the alarm about the triggers", || async { Ok(stage.told().into_iter().next()) }).await?;
    let still_there = Content::of(&client).await?.rows;
    let warned = seconds_between(dropped_at, warning.at);
    show.alarm(&format!("{}: told {warned:.2} s later, and no row is gone yet", warning.text("title")))?;

    let begin = Instant::now();
    // It takes a second, as programs do.
    let wipe = for_each(|table| format!("DELETE FROM {table}")) + "SELECT pg_sleep(1)";
    culprit.batch_execute(&wipe).await.context("delete everything")?;
    let wiped_at = SystemTime::now();
    let after = Content::of(&client).await?;
    show.disaster("and deletes every row of all 18 tables", begin.elapsed())?;
    let is_whole = |told: &Told| told.message["rows_lost"].as_i64() == Some(before.rows);
    let alarm = wait("the alarm about all tables", || async {
        Ok(stage.told().into_iter().find(|told| is_whole(told) && told.message["committed"] == true))
    })
    .await?;
    let early = stage.told().into_iter().find(|told| is_whole(told) && told.message["committed"] == false);
    if let Some(early) = &early {
        let ahead = seconds_between(early.at, wiped_at);
        show.alarm(&format!("{}: told {ahead:.2} s before the commit", early.text("title")))?;
    }
    let alarmed = seconds_between(wiped_at, alarm.at);
    show.alarm(&format!("{}: told {alarmed:.2} s after the commit", alarm.text("title")))?;
    show.note("who", alarm.text("who"))?;
    let query: String = alarm.text("query").chars().take(QUERY_CHARS).collect();
    show.note("query", &format!("{query} ..."))?;

    let command = alarm.restore_command().context("find a way back in the alarm's text")?;
    show.note("way back", &command)?;
    let begin = Instant::now();
    stage.shell(&command).await.context("run the alarm's command")?;
    let restored_in = begin.elapsed();
    let restored = Content::of(&stage.restored_client().await?).await?;
    show.step("that command, as it stands: restored, proved, running", restored_in)?;

    let begin = Instant::now();
    let document = stage.report(alarm.text("incident"), report).await?;
    let what = match report {
        Some(path) => format!("the report for whoever asks: {}", path.display()),
        None => format!("the report for whoever asks, {} lines (--report keeps it)", document.lines().count()),
    };
    show.step(&what, begin.elapsed())?;

    Ok(Report {
        server_version: stage.version().to_string(),
        before,
        after,
        restored,
        rows_when_warned: still_there,
        warned_seconds: warned,
        alarmed_seconds: alarmed,
        who: alarm.text("who").to_owned(),
        command,
        restore_seconds: restored_in.as_secs_f64(),
        steps: show.steps.clone(),
    })
}

/// A server with the game's database, an agent that watches it, and a base backup.
async fn prepare(stage: &mut Stage, show: &mut Show) -> anyhow::Result<Client> {
    let begin = Instant::now();
    stage.start_server().await?;
    let admin = stage.client("postgres", "postgres").await?;
    let roles = "CREATE ROLE walguard LOGIN REPLICATION; GRANT pg_monitor, pg_read_all_data TO walguard; \
                 CREATE ROLE game_owner LOGIN";
    admin.batch_execute(roles).await.context("make the roles")?;
    admin.batch_execute(&format!("CREATE DATABASE {DATABASE} OWNER game_owner")).await.context("make the database")?;
    let client = stage.client("game_owner", DATABASE).await?;
    let refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'protected'; END $$";
    client.batch_execute(refuse).await.context("make the trigger's function")?;
    let mut sql = for_each(|table| {
        format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, note text); \
             CREATE TRIGGER protect BEFORE TRUNCATE ON {table} EXECUTE FUNCTION refuse()"
        )
    });
    for (table, rows) in TABLES {
        sql += &format!("INSERT INTO {table} SELECT n, md5('{table}' || n) FROM generate_series(1, {rows}) n;");
    }
    client.batch_execute(&sql).await.context("make the tables")?;
    let content = Content::of(&client).await?;
    let what = format!("a young game: 18 tables, {} rows, {} triggers protect them", content.rows, content.triggers);
    show.step(&what, begin.elapsed())?;

    let begin = Instant::now();
    stage.write_settings()?;
    stage.walguard(&["init"]).await.context("initialise")?;
    stage.start_agent()?;
    wait("the agent's watch", || async {
        let status = stage.status().await;
        let ready = status.is_some_and(|status| {
            status.who.watching && status.detect.watching && status.detect.tables >= TABLES.len() as u64
        });
        Ok(ready.then_some(()))
    })
    .await?;
    show.step("the agent archives every commit, and watches", begin.elapsed())?;

    let begin = Instant::now();
    let backup = stage.walguard(&["backup", "--json"]).await.context("take a base backup")?;
    let bytes = |name: &str| render::bytes(backup[name].as_u64().unwrap_or(0));
    show.step(&format!("a base backup: {} in {}", bytes("content_bytes"), bytes("stored_bytes")), begin.elapsed())?;
    Ok(client)
}

/// A statement for each table.
fn for_each(statement: impl Fn(&str) -> String) -> String {
    TABLES.iter().map(|(table, _)| statement(table) + ";").collect()
}

fn seconds_between(begin: SystemTime, end: SystemTime) -> f64 {
    // An alarm may be there before the statement that it is about has returned to us.
    end.duration_since(begin).unwrap_or_default().as_secs_f64()
}

/// Waits for something.
async fn wait<T, F, Fut>(what: &str, mut look: F) -> anyhow::Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = anyhow::Result<Option<T>>>,
{
    let begin = Instant::now();
    loop {
        if let Some(found) = look().await? {
            return Ok(found);
        }
        if begin.elapsed() > PATIENCE {
            bail!("waited {} in vain for {what}", render::duration(PATIENCE));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// What the database holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Content {
    users: i64,
    games: i64,
    rows: i64,
    triggers: i64,
    /// Of all rows of all tables.
    checksum: String,
}

impl Content {
    async fn of(client: &Client) -> anyhow::Result<Self> {
        let each = TABLES.map(|(table, _)| format!("SELECT '{table}' AS name, t::text AS row FROM {table} t"));
        // The order of rows may differ; the sum of their hashes does not.
        let sql = format!(
            "SELECT count(*) FILTER (WHERE name = 'users'), count(*) FILTER (WHERE name = 'games'), count(*), \
             to_hex((coalesce(sum(hashtextextended(name || row, 0)), 0) % (1::bigint << 62))::bigint), \
             (SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal) FROM ({}) AS everything",
            each.join(" UNION ALL ")
        );
        let row = client.query_one(&sql, &[]).await.context("read the tables")?;
        Ok(Self { users: row.get(0), games: row.get(1), rows: row.get(2), checksum: row.get(3), triggers: row.get(4) })
    }
}

#[derive(Debug, Serialize)]
struct Report {
    server_version: String,
    before: Content,
    after: Content,
    restored: Content,
    /// Rows that were there when the alarm about the triggers came.
    rows_when_warned: i64,
    warned_seconds: f64,
    alarmed_seconds: f64,
    who: String,
    command: String,
    restore_seconds: f64,
    steps: Vec<Step>,
}

impl Report {
    /// Every row and trigger is back, and nothing else.
    fn is_exact(&self) -> bool {
        self.restored == self.before && self.after.rows == 0 && self.rows_when_warned == self.before.rows
    }
}

#[derive(Clone, Debug, Serialize)]
struct Step {
    what: String,
    seconds: f64,
}

/// What is seen of it.
struct Show {
    quiet: bool,
    steps: Vec<Step>,
}

/// Columns of what a step does.
const STEP_WIDTH: usize = 58;

/// Characters of a statement that are shown.
const QUERY_CHARS: usize = 50;

/// Columns of text beside the marks, on a terminal of 80.
const TEXT_WIDTH: usize = 70;

impl Show {
    fn print(&self, text: &str) -> anyhow::Result<()> {
        if !self.quiet {
            render::print(text)?;
        }
        Ok(())
    }

    fn begin(&self, stage: &Stage) -> anyhow::Result<()> {
        let title = render::bold("walguard demo");
        self.print(&format!("\n{title}   PostgreSQL {}, all of it in {}\n", stage.version(), stage.dir().display()))
    }

    fn step(&mut self, what: &str, took: Duration) -> anyhow::Result<()> {
        let mark = render::green(" done");
        self.line(&mark, what, took)
    }

    fn disaster(&mut self, what: &str, took: Duration) -> anyhow::Result<()> {
        let mark = render::red(" oops");
        self.line(&mark, what, took)
    }

    fn line(&mut self, mark: &str, what: &str, took: Duration) -> anyhow::Result<()> {
        self.steps.push(Step { what: what.to_owned(), seconds: took.as_secs_f64() });
        self.print(&format!("  {mark}  {what:STEP_WIDTH$} {:>9}", render::duration(took)))
    }

    /// What walguard told.
    fn alarm(&self, what: &str) -> anyhow::Result<()> {
        for (place, line) in wrapped(what, TEXT_WIDTH).iter().enumerate() {
            let mark = if place == 0 { render::yellow("ALARM") } else { " ".repeat(5) };
            self.print(&format!("  {mark}  {}", render::bold(line)))?;
        }
        Ok(())
    }

    /// More of it.
    fn note(&self, name: &str, what: &str) -> anyhow::Result<()> {
        for (place, line) in wrapped(&render::printable(what), TEXT_WIDTH - 9).iter().enumerate() {
            let name = if place == 0 { name } else { "" };
            self.print(&format!("         {name:9}{line}"))?;
        }
        Ok(())
    }

    fn end(&self, report: &Report) -> anyhow::Result<()> {
        if self.quiet {
            return Ok(render::print_json(report)?);
        }
        let Report { before, after, restored, .. } = report;
        let mut table = render::table(["", "before", "after the wipe", "restored"]);
        let contents = [before, after, restored];
        let mut row = |name: &str, value: fn(&Content) -> String| {
            table.add_row([vec![format!("  {name}")], contents.map(value).to_vec()].concat());
        };
        row("users", |content| content.users.to_string());
        row("games", |content| content.games.to_string());
        row("rows of all 18 tables", |content| content.rows.to_string());
        row("checksum of them", |content| content.checksum.clone());
        row("protection triggers", |content| content.triggers.to_string());
        let verdict = if report.is_exact() {
            render::green("Every row and every trigger is back")
        } else {
            render::red("What was restored is not what there was")
        };
        self.print(&format!(
            "\n{}\n{verdict}, {} after the alarm's command was run.\nNothing is left running, nothing is left behind.",
            render::table_text(&table),
            render::duration(Duration::from_secs_f64(report.restore_seconds)),
        ))
    }
}

/// Text in lines of at most `width` characters, cut at spaces; a longer word has a line of its own.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// The last lines of a program's output, for whoever must find out why something failed.
fn tail(path: &Path) -> String {
    let text = std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines.get(lines.len().saturating_sub(10)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_wrapped_at_spaces_and_never_within_a_word() {
        assert_eq!(wrapped("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrapped("unbreakable a", 4), ["unbreakable", "a"]);
        assert!(wrapped("", 4).is_empty());
    }
}
