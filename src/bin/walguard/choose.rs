//! `walguard restore` without a target: shows what happened of late, and leads a person to the moment to go back to.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Context as _;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use walguard::decode::change::RowCounts;
use walguard::detect::Incident;
use walguard::pg::PgTime;
use walguard::repo::Repository;
use walguard::repo::catalog::{CatalogScope, LsnRange, Window};
use walguard::repo::index::lookup::{Activity, Wanted};
use walguard::restore::Target;

use crate::context::Context;
use crate::render;

/// Incidents shown, the newest first.
const INCIDENTS_MAX: usize = 10;

/// Minutes of the chart. They fit a screen together with the incidents.
const MINUTES: i64 = 30;

/// Columns of the chart's bars.
const BAR_WIDTH: u64 = 32;

/// Answers that are not understood before we give up.
const TRIES_MAX: usize = 5;

/// Microseconds of a minute.
const MINUTE: i64 = 60_000_000;

/// The target that a person chose; `None` if nobody is there to choose, or nothing was chosen.
pub(crate) async fn target(context: &Context, repo: &Repository) -> anyhow::Result<Option<Target>> {
    if !render::can_ask() {
        return Ok(None);
    }
    let zone = &context.zone;
    let mut incidents = repo.incidents(Some(INCIDENTS_MAX)).await.context("read incidents")?.incidents;
    incidents.retain(|incident| incident.first_harm.is_some());
    incidents.reverse();
    let (last, activity) = lately(repo).await?;
    let begin = last.map(|last| PgTime::from_micros((last.micros().div_euclid(MINUTE) - MINUTES + 1) * MINUTE));
    let mut text = incidents_text(&incidents, Timestamp::now(), zone);
    match (last, begin) {
        (Some(last), Some(begin)) => text += &chart(&activity, begin, last, &incidents, zone),
        _ => text.push_str("No commit was found in the archive.\n"),
    }
    render::tell(&text)?;
    let question = match incidents.is_empty() {
        true => "Go back to (a time such as 08:14, `10 minutes ago`, latest):",
        false => {
            "Go back to just before (an incident's number), or to (a time such as 08:14, `10 minutes ago`, latest):"
        }
    };
    for _ in 0..TRIES_MAX {
        let Some(answer) = render::prompt(question)? else { return Ok(None) };
        match understood(&answer, &incidents, last, zone) {
            Ok(target) => return Ok(target),
            Err(error) => render::tell(&format!("{error}\n"))?,
        }
    }
    Ok(None)
}

/// What an answer means; `None` if it is empty.
fn understood(
    answer: &str,
    incidents: &[Incident],
    last: Option<PgTime>,
    zone: &TimeZone,
) -> anyhow::Result<Option<Target>> {
    let answer = answer.trim();
    if answer.is_empty() {
        return Ok(None);
    }
    if let Ok(number) = answer.parse::<usize>() {
        let incident = number.checked_sub(1).and_then(|place| incidents.get(place));
        let incident = incident.with_context(|| format!("there is no incident {number} in the list"))?;
        return Ok(Some(Target::Before(incident.id.clone())));
    }
    // A time of day alone is one of the chart's: of the last day on which something was committed, up to then.
    let is_clock = answer.contains(':') && answer.bytes().all(|b| b.is_ascii_digit() || b == b':' || b == b'.');
    if let Some(last) = last.filter(|_| is_clock) {
        let date = last.timestamp().to_zoned(zone.clone()).date();
        let read = |date: jiff::civil::Date| Target::parse(&format!("{date} {answer}"), Timestamp::now(), zone);
        return Ok(Some(match read(date)? {
            Target::Time(time) if time.micros() > last.micros() + MINUTE => read(date.yesterday()?)?,
            target => target,
        }));
    }
    Ok(Some(Target::parse(answer, Timestamp::now(), zone)?))
}

/// When the last transaction of the newest timeline committed, and what happened in the minutes before.
async fn lately(repo: &Repository) -> anyhow::Result<(Option<PgTime>, Activity)> {
    let catalog = repo.catalog(CatalogScope::Everything).await.context("list the repository")?;
    let nothing = (None, Activity::default());
    let Some(timeline) = catalog.newest_timeline() else { return Ok(nothing) };
    let Some(path) = catalog.history(timeline) else { return Ok(nothing) };
    let windows = catalog.windows();
    let Some(window) = windows.iter().filter(|window| window.timeline == timeline).max_by_key(|window| window.to)
    else {
        return Ok(nothing);
    };
    let Window { from, to, .. } = *window;
    let Some(commit) = repo.last_commit(&catalog.identity, path, window).await.context("find the last commit")? else {
        return Ok(nothing);
    };
    let minute = commit.time.micros().div_euclid(MINUTE);
    let wanted = Wanted {
        from: PgTime::from_micros((minute - MINUTES + 1) * MINUTE),
        to: PgTime::from_micros((minute + 1) * MINUTE),
        minutes_each: 1,
        all_events: false,
    };
    let lookup = repo.lookup(path.clone(), catalog.identity.segment_size);
    let activity = lookup.activity(LsnRange { from, to }, wanted).await.context("read the index")?;
    Ok((Some(commit.time), activity))
}

fn incidents_text(incidents: &[Incident], now: Timestamp, zone: &TimeZone) -> String {
    if incidents.is_empty() {
        return "No incident was found in what is archived.\n\n".to_owned();
    }
    let mut text = "Incidents, the newest first:\n".to_owned();
    for (number, incident) in (1..).zip(incidents) {
        let Incident { began_at, title, state, severity, .. } = incident;
        let began = render::time(render::whole_seconds(*began_at), zone);
        let age = render::age(*began_at, now);
        let state = format!("{}, {}", severity.as_str(), state.as_str());
        let title: String = title.chars().filter(|c| !c.is_control()).collect();
        let _ = writeln!(text, "{number:>4}  {began}, {age}: {title} ({state})");
    }
    text.push('\n');
    text
}

/// What was changed in which minute, and where an incident began.
fn chart(activity: &Activity, begin: PgTime, last: PgTime, incidents: &[Incident], zone: &TimeZone) -> String {
    let mut minutes: BTreeMap<i64, (u64, RowCounts)> = BTreeMap::new();
    for tally in &activity.tallies {
        let (transactions, rows) = minutes.entry(tally.minute).or_default();
        match tally.file {
            None => *transactions += tally.transactions,
            Some(_) => *rows += tally.rows,
        }
    }
    let size = |rows: &RowCounts| rows.inserted + rows.updated + rows.deleted + rows.moved;
    let largest = minutes.values().map(|(_, rows)| size(rows)).max().unwrap_or_default().max(1);
    let clock = |at: PgTime| at.timestamp().to_zoned(zone.clone()).strftime("%H:%M").to_string();
    let zone_name = zone.iana_name().unwrap_or("local time");
    let mut text = format!("The last {MINUTES} minutes ({zone_name}):\n");
    let _ = writeln!(text, "  {:5} {:>8} {:>9} {:>9} {:>9}", "", "commits", "inserted", "updated", "deleted");
    let first = begin.micros().div_euclid(MINUTE);
    for minute in first..=last.micros().div_euclid(MINUTE) {
        let at = PgTime::from_micros(minute * MINUTE);
        let (transactions, rows) = minutes.get(&minute).copied().unwrap_or_default();
        let bar = "#".repeat(usize::try_from((size(&rows) * BAR_WIDTH).div_ceil(largest)).unwrap_or_default());
        let next = at.timestamp() + SignedDuration::from_secs(60);
        let began = incidents.iter().position(|i| at.timestamp() <= i.began_at && i.began_at < next);
        let mark = began.map(|place| render::red(&format!(" <- incident {}", place + 1))).unwrap_or_default();
        let RowCounts { inserted, updated, deleted, .. } = rows;
        let line = format!("  {} {transactions:>8} {inserted:>9} {updated:>9} {deleted:>9}  {bar}{mark}", clock(at));
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let unindexed: u64 = activity.unindexed.iter().map(|unindexed| unindexed.segments).sum();
    if unindexed > 0 {
        let _ = writeln!(text, "  {unindexed} segments have no index and are not in the chart.");
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_of_day_is_one_of_the_chart_and_a_number_an_incident() {
        let zone = TimeZone::get("Asia/Jerusalem").unwrap();
        let last: Timestamp = "2025-12-16T22:05:00Z".parse().unwrap(); // 00:05 of the 17th there
        let read = |answer: &str| understood(answer, &[], Some(last.into()), &zone);
        let time = |text: &str| Some(Target::Time(text.parse::<Timestamp>().unwrap().into()));
        assert_eq!(read("00:04").unwrap(), time("2025-12-16T22:04:00Z"));
        assert_eq!(read(" 23:58 ").unwrap(), time("2025-12-16T21:58:00Z"));
        assert_eq!(read("2025-12-16 10:00").unwrap(), time("2025-12-16T08:00:00Z"));
        assert_eq!(read("latest").unwrap(), Some(Target::Latest));
        assert_eq!(read("").unwrap(), None);
        assert!(read("1").unwrap_err().to_string().contains("no incident 1"));
        assert!(read("soon").is_err());
    }
}
