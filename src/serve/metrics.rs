//! A status as Prometheus text.

use std::fmt;
use std::sync::atomic::AtomicU64;

use jiff::Timestamp;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::status::Status;

/// The metrics of `status` in the OpenMetrics text format. What is not known is absent, rather than 0.
///
/// # Errors
/// None in practice: writing into a `String` does not fail.
pub fn render(status: &Status) -> Result<String, fmt::Error> {
    let labels = [("cluster".into(), status.cluster.clone().into())];
    let mut registry = Registry::with_prefix_and_labels("walguard", labels.into_iter());
    let mut metrics = Metrics(&mut registry);

    metrics.flag("streaming", "WAL is streamed from the server", status.server.streaming);
    metrics.flag("synchronous", "Commits wait for this agent", status.server.synchronous);
    metrics.count("connections", "Connections begun to the server", status.server.connections);
    let positions = [
        ("flushed", "The end of the server's flushed WAL", status.server.flushed),
        ("received", "WAL received up to here", status.received),
        ("spooled", "WAL synced in the spool up to here", status.spooled),
        ("archived", "WAL durable in the repository up to here", status.archived),
        ("scanned", "WAL understood up to here", status.scan.position),
    ];
    for (name, help, position) in positions {
        if let Some(position) = position {
            metrics.bytes(&format!("{name}_position"), help, position.lsn.bytes());
        }
    }
    if let Some(archived) = status.archived {
        metrics.number("archived_timeline", "Timeline of the archived position", f64::from(archived.timeline.get()));
    }
    if let Some(time) = status.caught_up_to {
        metrics.time("complete_to_timestamp", "Whatever was committed by then is archived, as proved last", time);
    }
    if let Some(bytes) = status.lag_bytes {
        metrics.bytes("lag", "WAL that the server flushed and the repository does not hold", bytes);
    }
    if let Some(seconds) = status.lag_seconds {
        metrics.seconds("lag_age", "For how long the oldest WAL that is not archived has been waiting", seconds);
    }
    metrics.bytes("spool", "WAL in the spool", status.spool.bytes);
    metrics.bytes("spool_limit", "The most that the spool may hold", status.spool.size_max);
    metrics.flag("spool_full", "The spool is full: nothing is read from the server", status.spool.full);
    metrics.number("uploads", "WAL objects on their way to the repository", status.store.uploads as f64);
    metrics.count("objects_stored", "WAL objects made", status.store.objects_total);
    metrics.count("content_stored_bytes", "WAL in them", status.store.content_bytes_total);
    metrics.count("stored_bytes", "The same, compressed", status.store.stored_bytes_total);
    metrics.count("store_failures", "Calls to the repository that failed", status.store.failures_total);
    let open = status.scan.open_transactions as f64;
    metrics.number("wal_open_transactions", "Transactions that are open in the WAL", open);
    metrics.seconds("scan_cpu", "Processor time that understanding the WAL took so far", status.scan.cpu_seconds);
    metrics.count("decode_faults", "Records or pages that were not understood", status.scan.faults_total);
    metrics.count("derived_objects", "Indexes and snapshots of names written", status.scan.derived_total);
    metrics.count("unindexed_segments", "Segments that got no index", status.scan.unindexed_total);
    if let Some(last) = &status.backups.last {
        metrics.time("backup_last_timestamp", "When the newest base backup ended", last.at);
        metrics.bytes("backup_last_stored", "Size of the newest base backup in the repository", last.stored_bytes);
        metrics.number("backup_last_bad_pages", "Pages with a wrong checksum in it", last.bad_pages as f64);
    }
    metrics.flag("backup_running", "A base backup is being taken", status.backups.running.is_some());
    if let Some(proven) = &status.drills.proven {
        metrics.time("drill_last_success_timestamp", "When a restore was last proved to work", proven.finished_at);
        metrics.seconds("drill_last_success_duration", "What that took", proven.took_seconds);
    }
    if let Some(last) = &status.drills.last {
        metrics.time("drill_last_timestamp", "When the last drill ended, whatever came of it", last.finished_at);
        metrics.seconds("drill_last_duration", "What that took", last.took_seconds);
        metrics.flag("drill_last_failed", "It proved nothing, or that something is wrong", last.problem.is_some());
    }
    metrics.count("drill_failures", "Drills of this agent that did not prove a restore", status.drills.failures_total);
    metrics.flag("drill_running", "A restore is being proved", status.drills.running_since.is_some());
    metrics.flag("watching_sessions", "Samples are taken of who is at work in the server", status.who.watching);
    if status.who.watching {
        let open = status.who.open_transactions as f64;
        metrics.number("open_transactions", "Transactions with a number that were open at the last sample", open);
        metrics.seconds("session_sample", "What the last sample took", status.who.sample_seconds);
    }
    metrics.count("nudges", "Times that the server was made to flush WAL that it held back", status.who.nudges_total);
    let snapshots = status.flashback.snapshots as f64;
    metrics.number("flashback_snapshots", "Snapshots that are held for rows to stay readable", snapshots);
    if let Some(age) = status.flashback.age_seconds {
        metrics.seconds("flashback_age", "Age of the oldest of them: vacuum removes nothing that it sees", age);
    }
    if let Some(age) = status.flashback.xmin_age {
        metrics.number("flashback_xmin_age", "Transactions that began since the oldest that they need", age as f64);
    }
    metrics.flag("detecting", "The WAL is watched for damage", status.detect.watching);
    let unseen = status.detect.unseen().count() as f64;
    metrics.number("incidents_unseen", "Incidents that nobody has acknowledged", unseen);
    metrics.count("incidents", "Incidents found", status.detect.incidents_total);
    let unwritten = status.detect.unwritten as f64;
    metrics.number("incidents_unwritten", "Incidents that wait to be written into the repository", unwritten);
    metrics.number("gaps", "Holes in the archived WAL that this agent found", status.gaps.len() as f64);
    metrics.number("attention", "Things that somebody should look at", status.attention().len() as f64);
    metrics.alarms(status);
    metrics.databases(status);
    metrics.notifications(status);

    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// The content type of what [`render`] gives.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

struct Metrics<'a>(&'a mut Registry);

impl Metrics<'_> {
    fn number(&mut self, name: &str, help: &str, value: f64) {
        self.0.register(name, help, gauge(value));
    }

    fn flag(&mut self, name: &str, help: &str, value: bool) {
        self.number(name, help, f64::from(u8::from(value)));
    }

    fn bytes(&mut self, name: &str, help: &str, value: u64) {
        self.0.register_with_unit(name, help, Unit::Bytes, gauge(value as f64));
    }

    fn seconds(&mut self, name: &str, help: &str, value: f64) {
        self.0.register_with_unit(name, help, Unit::Seconds, gauge(value));
    }

    fn time(&mut self, name: &str, help: &str, value: Timestamp) {
        self.seconds(name, help, value.as_second() as f64);
    }

    fn count(&mut self, name: &str, help: &str, value: u64) {
        let counter: Counter<u64, AtomicU64> = Counter::default();
        counter.inc_by(value);
        self.0.register(name, help, counter);
    }

    fn databases(&mut self, status: &Status) {
        let (streaming, lag) = (Gauges::default(), Gauges::default());
        for one in &status.databases {
            let of_it = vec![("database".to_owned(), one.database.clone())];
            streaming.get_or_create(&of_it).set(f64::from(u8::from(one.streaming)));
            if let Some(seconds) = one.lag_seconds {
                lag.get_or_create(&of_it).set(seconds);
            }
        }
        let help = "Changes of this database are read, where several are";
        self.0.register("database_streaming", help, streaming);
        let help = "For how long its oldest change that is not archived has been waiting";
        self.0.register_with_unit("database_lag_age", help, Unit::Seconds, lag);
    }

    fn alarms(&mut self, status: &Status) {
        let family: Family<Vec<(String, String)>, Gauge<f64, AtomicU64>> = Family::default();
        for name in status.alarms.keys() {
            family.get_or_create(&vec![("alarm".to_owned(), name.clone())]).set(1.0);
        }
        self.0.register("alarm", "What somebody must look at, by name", family);
    }
}

type Counts = Family<Vec<(String, String)>, Counter<u64, AtomicU64>>;
type Gauges = Family<Vec<(String, String)>, Gauge<f64, AtomicU64>>;

impl Metrics<'_> {
    fn notifications(&mut self, status: &Status) {
        let now = status.at.unwrap_or(Timestamp::UNIX_EPOCH);
        let (total, pending, oldest) = (Counts::default(), Gauges::default(), Gauges::default());
        for (name, channel) in &status.notify.channels {
            let label = ("channel".to_owned(), name.clone());
            let outcomes = [
                ("delivered", channel.delivered_total),
                ("failed", channel.failed_total),
                ("given_up", channel.given_up_total),
            ];
            for (outcome, count) in outcomes {
                total.get_or_create(&vec![label.clone(), ("outcome".to_owned(), outcome.to_owned())]).inc_by(count);
            }
            pending.get_or_create(&vec![label.clone()]).set(channel.pending as f64);
            let age = channel.oldest_due.map_or(0.0, |due| now.duration_since(due).as_secs_f64().max(0.0));
            oldest.get_or_create(&vec![label]).set(age);
        }
        self.0.register("notifications", "Messages to a channel, by what became of them", total);
        self.0.register("notifications_pending", "Messages that are due and not told", pending);
        let help = "For how long the oldest of them has been due";
        self.0.register_with_unit("notifications_oldest", help, Unit::Seconds, oldest);
    }
}

fn gauge(value: f64) -> Gauge<f64, AtomicU64> {
    let gauge: Gauge<f64, AtomicU64> = Gauge::default();
    gauge.set(value);
    gauge
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::{Lsn, Position, TimelineId};

    #[test]
    fn what_is_not_known_is_absent_and_the_rest_carries_the_cluster() {
        let mut status = Status { cluster: "main".to_owned(), ..Status::default() };
        let text = render(&status).unwrap();
        assert!(!text.contains("archived_position"), "{text}");
        status.archived = Some(Position { timeline: TimelineId::FIRST, lsn: Lsn::new(4096) });
        status.store.failures_total = 3;
        let text = render(&status).unwrap();
        assert!(text.contains("walguard_archived_position_bytes{cluster=\"main\"} 4096"), "{text}");
        assert!(text.contains("walguard_store_failures_total{cluster=\"main\"} 3"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn what_waits_for_a_channel_is_counted_by_its_name() {
        let at: Timestamp = "2025-12-17T06:14:00Z".parse().unwrap();
        let mut status = Status { cluster: "main".to_owned(), at: Some(at), ..Status::default() };
        let mut channel = crate::notify::queue::ChannelStatus { pending: 2, failed_total: 7, ..Default::default() };
        channel.oldest_due = Some(at - jiff::SignedDuration::from_secs(90));
        status.notify.channels.insert("oncall".to_owned(), channel);
        let text = render(&status).unwrap();
        for line in [
            "walguard_notifications_total{cluster=\"main\",channel=\"oncall\",outcome=\"failed\"} 7",
            "walguard_notifications_pending{cluster=\"main\",channel=\"oncall\"} 2",
            "walguard_notifications_oldest_seconds{cluster=\"main\",channel=\"oncall\"} 90",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn the_readme_lists_every_metric_and_no_other() {
        // Every name that this file registers, whether a status has it or not.
        let code = include_str!("metrics.rs").split("#[cfg(test)]").next().unwrap_or_default();
        let calls = ["flag", "bytes", "seconds", "time", "number", "count"];
        let families = [
            "alarm",
            "database_streaming",
            "database_lag_age_seconds",
            "notifications_total",
            "notifications_pending",
            "notifications_oldest_seconds",
        ];
        let mut names: Vec<_> = families.iter().map(|name| format!("walguard_{name}")).collect();
        for line in code.lines().map(str::trim) {
            let call = calls.iter().find_map(|call| Some((call, line.strip_prefix(&format!("metrics.{call}(\""))?)));
            let Some((call, rest)) = call else { continue };
            let name = rest.split('"').next().unwrap_or_default();
            let unit = match *call {
                "bytes" => "_bytes",
                "seconds" | "time" => "_seconds",
                "count" => "_total",
                _ => "",
            };
            names.push(format!("walguard_{name}{unit}"));
        }
        for position in ["flushed", "received", "spooled", "archived", "scanned"] {
            names.push(format!("walguard_{position}_position_bytes"));
        }
        names.sort();
        let readme = include_str!("../../README.md");
        let mut listed: Vec<String> = readme
            .lines()
            .filter(|line| line.starts_with("| `walguard_"))
            .flat_map(|line| line.split('`').skip(1).step_by(2))
            .map(str::to_owned)
            .collect();
        listed.sort();
        assert_eq!(listed, names);
    }
}
