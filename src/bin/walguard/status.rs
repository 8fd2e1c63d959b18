//! `walguard status`.

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use walguard::capture::Walsender;
use walguard::pg::Position;
use walguard::repo::catalog::CatalogScope;
use walguard::serve::http::PORT_DEFAULT;
use walguard::serve::status::{Alarm, DrillSeen, Drills, GapSeen, LastBackup, Status, Trouble};

use crate::Outcome;
use crate::args::StatusArgs;
use crate::context::Context;
use crate::render;

/// An agent on this machine answers at once, or not at all.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Records of drills in which the last proof is looked for.
const DRILLS_READ: usize = 20;
/// A server that does not answer by now is told as unreachable: the repository is what this is about.
const SERVER_MAX: Duration = Duration::from_secs(5);

pub(crate) async fn run(context: Context, args: StatusArgs) -> anyhow::Result<Outcome> {
    loop {
        let (status, live) = match ask(&context, &args).await? {
            Some(status) => (status, true),
            None => (look(&context).await?, false),
        };
        if context.json {
            render::print_json(&serde_json::json!({
                "agent_running": live, "attention": status.attention(), "status": status,
            }))?;
        } else {
            if args.watch && std::io::stdout().is_terminal() {
                render::print("\x1b[H\x1b[2J")?; // ECMA-48: cursor home, erase display
            }
            render::print(&text(&status, live, &context))?;
        }
        if !args.watch {
            return Ok(if status.attention().is_empty() { Outcome::Done } else { Outcome::Attention });
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Asks the running agent; `None` if there is none that archives this cluster.
async fn ask(context: &Context, args: &StatusArgs) -> anyhow::Result<Option<Status>> {
    let named = args.http.or(context.settings.http.listen);
    let address = named.unwrap_or_else(|| SocketAddr::from((Ipv4Addr::LOCALHOST, PORT_DEFAULT)));
    let client =
        reqwest::Client::builder().timeout(ANSWER_MAX).no_proxy().build().context("prepare to ask the agent")?;
    let Ok(answer) = client.get(format!("http://{address}/status")).send().await else { return Ok(None) };
    let Ok(answer) = answer.error_for_status() else { return Ok(None) };
    let Ok(status) = answer.json::<Status>().await else { return Ok(None) };
    // Another cluster's agent may have the port.
    let wanted = &context.settings.cluster;
    Ok((wanted.is_empty() || *wanted == status.cluster).then_some(status))
}

/// What the repository knows and, if it answers, the server.
async fn look(context: &Context) -> anyhow::Result<Status> {
    let repo = context.repository().await?;
    let catalog = repo.catalog(CatalogScope::Everything).await?;
    let now = Timestamp::now();
    let mut status = Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cluster: context.settings.cluster.clone(),
        repository: repo.url(),
        at: Some(now),
        ..Status::default()
    };
    status.server.system_id = Some(catalog.identity.system_id);
    status.server.version = Some(catalog.identity.server_version);
    status.server.segment_size = Some(catalog.identity.segment_size);
    status.server.slot.clone_from(&context.settings.postgres.slot);
    let newest = catalog.timelines.iter().rev().find_map(|(t, wal)| Some((*t, wal, wal.ranges.end()?)));
    if let Some((timeline, wal, end)) = newest {
        status.archived = Some(Position { timeline, lsn: end });
        status.lag_seconds = wal.newest_at.map(|at| now.duration_since(at).as_secs_f64().max(0.0));
    }
    status.gaps = catalog
        .gaps
        .iter()
        .map(|gap| GapSeen {
            from: Position { timeline: gap.timeline, lsn: gap.from },
            to: gap.to,
            reason: gap.reason.clone(),
        })
        .collect();
    status.backups.last = catalog.backups.iter().max_by_key(|b| b.stop_time).map(|b| LastBackup {
        label: b.label.clone(),
        at: b.stop_time.timestamp(),
        stored_bytes: b.stored_bytes,
        start: b.start_position(),
        bad_pages: b.bad_pages,
    });
    // A repository without records is as good as one without drills.
    let drills = repo.drills(DRILLS_READ).await.unwrap_or_default();
    status.drills.last = drills.last().map(DrillSeen::from);
    status.drills.proven = drills.iter().rfind(|drill| drill.problem().is_none()).map(DrillSeen::from);
    look_at_server(context, &mut status).await;
    let lease = repo.lease().await?;
    if let Some(proof) = lease.as_ref().and_then(|lease| lease.caught_up) {
        status.caught_up_to = Some(proof.time.timestamp());
        status.caught_up_position = Some(proof.position);
    }
    match lease.filter(|lease| lease.expires_at > now) {
        Some(lease) => (status.host, status.pid) = (lease.host, lease.pid),
        None => {
            let hint = Some("start it: walguard run".to_owned());
            let alarm = Alarm { since: now, text: "no agent archives this cluster".to_owned(), hint };
            status.alarms.insert("agent".to_owned(), alarm);
        }
    }
    Ok(status)
}

async fn look_at_server(context: &Context, status: &mut Status) {
    let Ok(conninfo) = context.conninfo() else { return };
    let conninfo = conninfo.with_application_name("walguard-status");
    let asked = async {
        let mut walsender = Walsender::connect(&conninfo).await?;
        walsender.identify_system().await
    };
    let error = match tokio::time::timeout(SERVER_MAX, asked).await {
        Ok(Ok(system)) => {
            status.server.flushed = Some(Position { timeline: system.timeline, lsn: system.flush_lsn });
            status.lag_bytes = status.archived.map(|archived| system.flush_lsn.saturating_sub(archived.lsn));
            if status.lag_bytes == Some(0) {
                status.lag_seconds = Some(0.0);
            }
            return;
        }
        Ok(Err(error)) => (error.to_string(), error.hint()),
        Err(_) => ("it does not answer".to_owned(), None),
    };
    let at = status.at.unwrap_or(Timestamp::UNIX_EPOCH);
    status.server.trouble = Some(Trouble::again(None, at, error.0, error.1));
}

fn text(status: &Status, live: bool, context: &Context) -> String {
    let mut out = String::new();
    let now = status.at.unwrap_or_else(Timestamp::now);
    let position = |p: Option<Position>| p.map_or_else(|| "-".to_owned(), |p| p.to_string());
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<12} {value}"); // writing into a String does not fail
    };
    line("cluster", format!("{} in {}", status.cluster, status.repository));
    if !status.host.is_empty() {
        let since = status.started_at.map(|at| format!(", started {}", render::age(at, now))).unwrap_or_default();
        let silent = if live { "" } else { "; it was not reached, so this is what the repository knows" };
        line("agent", format!("process {} on {}{since}{silent}", status.pid, status.host));
    }
    let server = &status.server;
    let version = server.version.map(|v| format!("PostgreSQL {v}")).unwrap_or_default();
    let how = match (live, server.streaming, server.synchronous) {
        (false, ..) => String::new(),
        (true, true, true) => ", streaming, commits wait for it".to_owned(),
        (true, true, false) => ", streaming".to_owned(),
        (true, false, _) => format!(", {}", render::red("not streaming")),
    };
    line("server", format!("{version}, flushed {}{how}", position(server.flushed)));
    if let Some(wal_status) = &server.slot_wal_status {
        line("slot", format!("{} ({wal_status})", server.slot));
    }
    if live {
        line("received", position(status.received));
        line("spooled", position(status.spooled));
    }
    line("archived", position(status.archived));
    for one in &status.databases {
        let lag = one.lag_seconds.map_or_else(String::new, |seconds| {
            format!(", {} behind", render::duration(Duration::try_from_secs_f64(seconds).unwrap_or_default()))
        });
        let how = if one.streaming { lag } else { format!(", {}", render::red("not streaming")) };
        let base = one.last_base.as_ref().map_or("no base".to_owned(), |base| format!("base {}", base.label));
        line("database", format!("{}: archived {}{how}, {base}", one.database, position(one.archived)));
    }
    if let Some(time) = status.caught_up_to {
        line("complete to", format!("{}, when no transaction was under way", render::time(time, &context.zone)));
    }
    let lag = match (status.lag_bytes, status.lag_seconds) {
        (None, None) => "-".to_owned(),
        (bytes, seconds) => {
            let parts = [
                bytes.map(render::bytes),
                seconds.map(|s| render::duration(Duration::try_from_secs_f64(s).unwrap_or_default())),
            ];
            parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
        }
    };
    line("lag", lag);
    if live {
        if status.detect.watching {
            let looked_to = status.detect.looked_to.map(|at| format!(" to {at}")).unwrap_or_default();
            let unseen = match status.detect.unseen().count() {
                0 => "no open incident".to_owned(),
                1 => render::red("1 incident that nobody has seen"),
                number => render::red(&format!("{number} incidents that nobody has seen")),
            };
            let late = match status.detect.unwritten {
                0 => String::new(),
                number => format!(", {number} not yet written into the repository"),
            };
            line(
                "damage",
                format!("looked for{looked_to}, rows of {} tables known, {unseen}{late}", status.detect.tables),
            );
        }
        if status.who.watching {
            let hidden = if status.who.sees_all { "" } else { "; without pg_monitor it does not see what they do" };
            line("sessions", format!("watched, {} transactions open{hidden}", status.who.open_transactions));
        }
        for database in &status.protection.databases {
            let parts = [("triggers", database.triggers), ("event triggers", database.event_triggers)];
            let mut parts: Vec<_> = parts
                .into_iter()
                .filter(|(_, count)| count.there > 0)
                .map(|(what, count)| format!("{what} really in force: {} of {}", count.in_force, count.there))
                .collect();
            if let Some(guard) = database.guard {
                let whole = format!("guard: {} of {}", guard.in_force, guard.there);
                parts.push(if guard.in_force == guard.there { whole } else { render::red(&whole) });
            }
            if !parts.is_empty() {
                line("protection", format!("{}: {}", database.database, parts.join(", ")));
            }
        }
        let full = if status.spool.full { render::red(" FULL") } else { String::new() };
        let (used, most) = (render::bytes(status.spool.bytes), render::bytes(status.spool.size_max));
        line("spool", format!("{used} of {most}{full}"));
        let store = &status.store;
        let ratio = store.content_bytes_total as f64 / store.stored_bytes_total.max(1) as f64;
        line(
            "stored",
            format!(
                "{} objects, {} as {} ({ratio:.1} : 1), {} failed calls",
                store.objects_total,
                render::bytes(store.content_bytes_total),
                render::bytes(store.stored_bytes_total),
                store.failures_total
            ),
        );
    }
    match &status.backups.last {
        Some(last) => line(
            "last backup",
            format!("{}, {} ({})", last.label, render::time(last.at, &context.zone), render::bytes(last.stored_bytes)),
        ),
        None => line("last backup", "none".to_owned()),
    }
    if let Some(running) = &status.backups.running {
        let total = running.bytes_total.map(|t| format!(" of {}", render::bytes(t))).unwrap_or_default();
        line(
            "backup runs",
            format!("{}{total}, begun {}", render::bytes(running.bytes_done), render::age(running.since, now)),
        );
    }
    if let Some(next) = status.backups.next_at.filter(|_| live) {
        line("next backup", render::time(next, &context.zone));
    }
    for (name, value) in drill_lines(&status.drills, context, now) {
        line(name, value);
    }
    for (name, channel) in &status.notify.channels {
        let last = channel.delivered_at.map(|at| format!(", last {}", render::age(at, now))).unwrap_or_default();
        let waiting = match channel.pending {
            0 => String::new(),
            pending => render::yellow(&format!(", {pending} waiting, {} of them late", channel.late)),
        };
        line("told", format!("{name}: {} messages{last}{waiting}", channel.delivered_total));
    }
    for gap in &status.gaps {
        line("gap", format!("{} to {}: {}", gap.from, gap.to, gap.reason));
    }
    let troubles = [
        &server.trouble,
        &status.store.trouble,
        &status.spool.trouble,
        &status.backups.trouble,
        &status.drills.trouble,
        &status.notify.trouble,
    ];
    for trouble in troubles.into_iter().flatten() {
        line("trouble", render::yellow(&format!("{} (failed {} times)", trouble.error, trouble.failures)));
    }
    for attention in status.attention() {
        line("ATTENTION", render::red(&attention));
    }
    out
}

/// How long ago a restore was last proved to work, and what is known besides.
fn drill_lines(drills: &Drills, context: &Context, now: Timestamp) -> Vec<(&'static str, String)> {
    let took =
        |drill: &DrillSeen| render::duration(Duration::try_from_secs_f64(drill.took_seconds).unwrap_or_default());
    let mut lines = Vec::new();
    match (&drills.proven, &drills.last, drills.scheduled) {
        (Some(proven), ..) => lines.push((
            "restore",
            format!(
                "proved {}, in {}: {}",
                render::age(proven.finished_at, now),
                took(proven),
                render::printable(&proven.target)
            ),
        )),
        (None, None, false) => {}
        (None, ..) => lines.push(("restore", render::yellow("never proved to work"))),
    }
    if let Some((last, problem)) = drills.last.as_ref().and_then(|last| Some((last, last.problem.as_ref()?))) {
        let text = format!("{} {}: {}", last.outcome, render::age(last.finished_at, now), render::printable(problem));
        lines.push(("last drill", render::red(&text)));
    }
    if let Some(impossible) = &drills.impossible {
        lines.push(("next drill", render::red(impossible)));
    }
    match (drills.running_since, drills.next_at) {
        (Some(since), _) => lines.push(("drill runs", format!("begun {}", render::age(since, now)))),
        (None, Some(next)) => lines.push(("next drill", render::time(render::whole_seconds(next), &context.zone))),
        (None, None) => {}
    }
    lines
}
