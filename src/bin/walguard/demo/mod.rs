//! `walguard demo`: a disaster and its repair on a private PostgreSQL, in a minute. It uses the same verbs as everybody,
//! as processes of their own, and leaves nothing behind.

mod stage;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use serde::Serialize;
use tokio_postgres::Client;
use walguard::pg::Lsn;

use crate::Outcome;
use crate::args::DemoArgs;
use crate::context::Context;
use crate::render;
use crate::report::UsageError;
use stage::Stage;

/// How long anything may take that the demo waits for. A laptop takes a second.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often a condition is looked at that the demo waits for.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

pub(crate) async fn run(context: Context, args: DemoArgs) -> anyhow::Result<Outcome> {
    if rustix::process::geteuid().is_root() {
        let hint = "`scripts/demo` does that by itself; or run it as another user, for example: \
                    setpriv --reuid=postgres --regid=postgres --clear-groups walguard demo";
        return Err(UsageError::with_hint("PostgreSQL refuses to run as root, and so does its demo", hint).into());
    }
    let cancel = context.cancel_on_signals()?;
    let mut stage = Stage::set(args.pg_bin_dir.as_deref())?;
    let mut show = Show { quiet: context.json, context: &context, steps: Vec::new() };
    let result = cancel.run_until_cancelled(play(&mut stage, &mut show, args.rows)).await;
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
async fn play(stage: &mut Stage, show: &mut Show<'_>, rows: u32) -> anyhow::Result<Report> {
    show.begin(stage)?;

    let begin = Instant::now();
    stage.start_server().await?;
    let client = stage.client().await?;
    client
        .batch_execute(
            "CREATE ROLE walguard LOGIN REPLICATION; GRANT pg_monitor TO walguard;
             CREATE TABLE orders (id bigint PRIMARY KEY, customer text NOT NULL, cents bigint NOT NULL, at timestamptz NOT NULL)",
        )
        .await
        .context("prepare the database")?;
    show.step("start a private PostgreSQL", begin.elapsed())?;

    let begin = Instant::now();
    stage.walguard(&["init"]).await.context("initialise")?;
    stage.start_agent()?;
    wait("the agent's stream", || async { Ok(archived(&client).await?.is_some()) }).await?;
    show.step("start the agent: it streams the WAL into a repository", begin.elapsed())?;

    let begin = Instant::now();
    let backup = stage.walguard(&["backup", "--json"]).await.context("take a base backup")?;
    show.step("take a base backup", begin.elapsed())?;
    show.note(&format!(
        "{} of files in {}",
        render::bytes(backup["content_bytes"].as_u64().unwrap_or(0)),
        render::bytes(backup["stored_bytes"].as_u64().unwrap_or(0))
    ))?;

    let begin = Instant::now();
    let sql = format!(
        "INSERT INTO orders SELECT n, md5(n::text), (random() * 100000)::bigint, clock_timestamp()
         FROM generate_series(1, {rows}) n"
    );
    client.batch_execute(&sql).await.context("write rows")?;
    let before = Content::of(&client).await?;
    show.step(&format!("write {} rows", grouped(before.rows)), begin.elapsed())?;

    // The server's clock decides, as it does for commits.
    let moment: Timestamp = client.query_one("SELECT clock_timestamp()", &[]).await?.get(0);
    show.note(&format!("all is well at {}", render::time(moment, &show.context.zone)))?;

    let begin = Instant::now();
    client.batch_execute("DELETE FROM orders").await.context("delete rows")?;
    let after = Content::of(&client).await?;
    show.disaster("DELETE FROM orders  (somebody forgot the WHERE)", begin.elapsed())?;

    let begin = Instant::now();
    let deleted: String = client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await?.get(0);
    let deleted: Lsn = deleted.parse().context("read the server's position")?;
    wait("the delete to be archived", || async { Ok(archived(&client).await?.is_some_and(|lsn| lsn >= deleted)) })
        .await?;
    let durable = begin.elapsed();
    show.step("every commit up to now is in the repository", durable)?;

    let begin = Instant::now();
    let target = moment.to_string();
    stage.restore(&target).await.context("restore")?;
    let restored_in = begin.elapsed();
    let restored = Content::of(&stage.restored_client().await?).await?;
    show.step("restore to that moment, and start it", restored_in)?;

    Ok(Report {
        server_version: stage.version().to_string(),
        target: moment,
        before,
        after,
        restored,
        durable_seconds: durable.as_secs_f64(),
        restore_seconds: restored_in.as_secs_f64(),
        steps: show.steps.clone(),
    })
}

/// Up to where the server has heard that WAL is in the repository; `None` if nobody streams.
async fn archived(client: &Client) -> anyhow::Result<Option<Lsn>> {
    let sql =
        "SELECT flush_lsn::text FROM pg_stat_replication WHERE application_name = 'walguard' AND state = 'streaming'
               AND flush_lsn IS NOT NULL";
    let row = client.query_opt(sql, &[]).await.context("ask for the agent's position")?;
    Ok(row.map(|row| row.get::<_, String>(0).parse()).transpose()?)
}

/// Waits for a condition.
async fn wait<F, Fut>(what: &str, mut condition: F) -> anyhow::Result<()>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = anyhow::Result<bool>>,
{
    let begin = Instant::now();
    while !condition().await? {
        if begin.elapsed() > PATIENCE {
            bail!("waited {} in vain for {what}", render::duration(PATIENCE));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

/// What the table holds: how much, and a sum over all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Content {
    rows: i64,
    checksum: String,
}

impl Content {
    async fn of(client: &Client) -> anyhow::Result<Self> {
        // The order of rows may differ; the sum of their hashes does not.
        let sql =
            "SELECT count(*), to_hex((coalesce(sum(hashtextextended(orders::text, 0)), 0) % (1::bigint << 62))::bigint)
                   FROM orders";
        let row = client.query_one(sql, &[]).await.context("read the table")?;
        Ok(Self { rows: row.get(0), checksum: row.get(1) })
    }
}

#[derive(Debug, Serialize)]
struct Report {
    server_version: String,
    target: Timestamp,
    before: Content,
    after: Content,
    restored: Content,
    durable_seconds: f64,
    restore_seconds: f64,
    steps: Vec<Step>,
}

impl Report {
    /// Every row is back, and nothing else.
    fn is_exact(&self) -> bool {
        self.restored == self.before && self.after.rows == 0
    }
}

#[derive(Clone, Debug, Serialize)]
struct Step {
    what: String,
    seconds: f64,
}

/// What is seen of it.
struct Show<'a> {
    quiet: bool,
    context: &'a Context,
    steps: Vec<Step>,
}

/// Columns of what a step does.
const STEP_WIDTH: usize = 58;

impl Show<'_> {
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
        let mark = render::green("done");
        self.line(&mark, what, took)
    }

    fn disaster(&mut self, what: &str, took: Duration) -> anyhow::Result<()> {
        let mark = render::red("oops");
        self.line(&mark, what, took)
    }

    fn line(&mut self, mark: &str, what: &str, took: Duration) -> anyhow::Result<()> {
        self.steps.push(Step { what: what.to_owned(), seconds: took.as_secs_f64() });
        self.print(&format!("  {mark}  {what:STEP_WIDTH$} {:>9}", render::duration(took)))
    }

    fn note(&self, text: &str) -> anyhow::Result<()> {
        self.print(&format!("        {text}"))
    }

    fn end(&self, report: &Report) -> anyhow::Result<()> {
        if self.quiet {
            return Ok(render::print_json(report)?);
        }
        let Report { before, after, restored, .. } = report;
        let mut table = render::table(["", "before", "after the delete", "restored"]);
        let contents = [before, after, restored];
        table.add_row([vec!["  rows".to_owned()], contents.map(|content| grouped(content.rows)).to_vec()].concat());
        table.add_row(
            [vec!["  checksum".to_owned()], contents.map(|content| content.checksum.clone()).to_vec()].concat(),
        );
        let verdict = if report.is_exact() {
            render::green("Every row is back.")
        } else {
            render::red("What was restored is not what there was.")
        };
        self.print(&format!(
            "\n{}\n{verdict} A commit was off the server after {}; the restore took {}.\nNothing is left running, nothing is left behind.",
            render::table_text(&table),
            render::duration(Duration::from_secs_f64(report.durable_seconds)),
            render::duration(Duration::from_secs_f64(report.restore_seconds)),
        ))
    }
}

/// A number with thousands set apart: `100,000`.
fn grouped(number: i64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
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
    fn thousands_are_set_apart() {
        assert_eq!(
            ["0", "999", "1,000", "1,234,567"],
            [0, 999, 1_000, 1_234_567].map(grouped).each_ref().map(String::as_str)
        );
    }
}
