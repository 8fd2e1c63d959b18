//! An incident as a document that can be sent to a customer after reading: Markdown, or HTML.

use std::fmt::Write as _;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use walguard::detect::incident::{Incident, IncidentTransaction, Rows, TransactionState, grouped};
use walguard::detect::{DdlKind, Who, WhoSource};
use walguard::notify::Reach;
use walguard::notify::message::{self, Command};

use crate::incidents::{fate, state_in_words};
use crate::render;

/// Where and for whom the report is made.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    pub(crate) cluster: &'a str,
    /// How whoever reads it reaches the same repository.
    pub(crate) reach: Reach,
    pub(crate) zone: &'a TimeZone,
    pub(crate) at: Timestamp,
}

/// A document: all text in it is plain, and escaped when it is written.
#[derive(Debug, Default)]
pub(crate) struct Document {
    blocks: Vec<Block>,
}

#[derive(Debug)]
enum Block {
    Title(String),
    Heading(&'static str),
    Paragraph(String),
    Items(Vec<String>),
    Table(Vec<&'static str>, Vec<Vec<String>>),
    Code(String),
}

/// The report of an incident.
pub(crate) fn document(incident: &Incident, place: &Place<'_>) -> Document {
    let mut document = Document::default();
    let add = &mut document.blocks;
    add.push(Block::Title(format!("Incident {}: {}", incident.id, incident.title)));
    add.push(Block::Paragraph(format!(
        "Cluster {}. State: {} ({}). Severity: {}. Written by walguard {} on {} from revision {} of the incident.",
        place.cluster,
        incident.state.as_str(),
        state_in_words(incident.state),
        incident.severity.as_str(),
        env!("CARGO_PKG_VERSION"),
        render::time(render::whole_seconds(place.at), place.zone),
        incident.revision,
    )));
    add.push(Block::Heading("Summary"));
    summary(incident, place, add);
    add.push(Block::Heading("Timeline"));
    let moments = moments(incident, place);
    add.push(Block::Table(vec!["When", "Where in the WAL", "What"], moments));
    if !incident.tables.is_empty() {
        add.push(Block::Heading("Tables"));
        add.push(Block::Table(
            vec!["Table", "Rows before", "Rows after", "Deleted", "Updated", "Inserted", "Besides"],
            incident.tables.iter().map(table_row).collect(),
        ));
        left_out(incident.tables_more, "tables", add);
    }
    if !incident.ddl.is_empty() {
        add.push(Block::Heading("Definitions"));
        let row = |ddl: &walguard::detect::incident::DdlFinding| {
            vec![
                ddl_in_words(ddl.kind).to_owned(),
                ddl.object.clone().unwrap_or_default(),
                ddl.table.clone().unwrap_or_default(),
                ddl.lsn.to_string(),
            ]
        };
        add.push(Block::Table(
            vec!["What", "Object", "Table", "Where in the WAL"],
            incident.ddl.iter().map(row).collect(),
        ));
        left_out(incident.ddl_more, "changes", add);
    }
    add.push(Block::Heading("Who"));
    who(incident, add);
    if !incident.transactions.is_empty() {
        add.push(Block::Heading("Transactions"));
        let rows = incident.transactions.iter().map(|transaction| transaction_row(transaction, place));
        add.push(Block::Table(
            vec!["Transaction", "Ended", "State", "Deleted", "Updated", "Inserted", "By"],
            rows.collect(),
        ));
        left_out(incident.transactions_more, "transactions", add);
    }
    add.push(Block::Heading("What was done"));
    done(incident, place, add);
    add.push(Block::Heading("How to recover"));
    recovery(incident, place, add);
    add.push(Block::Heading("What could not be determined"));
    unknown(incident, add);
    document
}

fn summary(incident: &Incident, place: &Place<'_>, add: &mut Vec<Block>) {
    let mut text = format!("{}. ", capital(&incident.title));
    let _ = write!(text, "It began on {}", render::time(incident.began_at, place.zone));
    if incident.ended_at > incident.began_at {
        let took = incident.ended_at.duration_since(incident.began_at).unsigned_abs();
        let _ = write!(text, " and took {}", render::duration(took));
    }
    let late = incident.detected_at.duration_since(incident.began_at);
    if late.is_positive() {
        let _ = write!(text, "; it was noticed {} after its beginning", render::duration(late.unsigned_abs()));
    }
    text.push('.');
    let lost = incident.rows_lost();
    if lost > 0 {
        let tables = incident.tables.len() as u64 + incident.tables_more;
        let _ = write!(text, " {} rows are missing from {} tables.", grouped(lost), grouped(tables));
    }
    add.push(Block::Paragraph(text));
    let findings = incident
        .findings
        .iter()
        .map(|finding| format!("{} ({}, {})", finding.text, finding.rule, finding.severity.as_str()));
    add.push(Block::Items(findings.collect()));
    left_out(incident.findings_more, "findings", add);
}

fn moments(incident: &Incident, place: &Place<'_>) -> Vec<Vec<String>> {
    let mut moments: Vec<_> =
        incident.moments.iter().map(|moment| (moment.at, moment.lsn, moment.text.clone())).collect();
    moments.push((incident.detected_at, None, "noticed by walguard".to_owned()));
    for action in &incident.actions {
        moments.push((action.at, None, format!("{}: {}", action.kind, action.outcome)));
    }
    moments.sort_by_key(|(at, ..)| *at);
    let row = |(at, lsn, text): (Timestamp, Option<walguard::pg::Lsn>, String)| {
        let lsn = lsn.map(|lsn| lsn.to_string()).unwrap_or_default();
        vec![render::time_to_millis(at, place.zone), lsn, text]
    };
    moments.into_iter().map(row).collect()
}

fn table_row(damage: &walguard::detect::incident::TableDamage) -> Vec<String> {
    let rows = |rows: Option<Rows>| rows.map_or_else(|| "not known".to_owned(), |rows| rows.to_string());
    vec![
        damage.name.clone(),
        rows(damage.before),
        rows(damage.after),
        grouped(damage.deleted),
        grouped(damage.updated),
        grouped(damage.inserted),
        fate(damage),
    ]
}

fn transaction_row(transaction: &IncidentTransaction, place: &Place<'_>) -> Vec<String> {
    let state = match transaction.state {
        TransactionState::Open => "open",
        TransactionState::Prepared => "prepared",
        TransactionState::Committed => "committed",
        TransactionState::Aborted => "rolled back",
    };
    let at_least = if transaction.is_complete { "" } else { "at least " };
    vec![
        transaction.xid.map_or_else(|| "?".to_owned(), |xid| xid.to_string()),
        transaction.time.map(|time| render::time_to_millis(time.timestamp(), place.zone)).unwrap_or_default(),
        state.to_owned(),
        format!("{at_least}{}", grouped(transaction.deleted)),
        format!("{at_least}{}", grouped(transaction.updated)),
        format!("{at_least}{}", grouped(transaction.inserted)),
        transaction.who.actor.role.clone().unwrap_or_else(|| "not known".to_owned()),
    ]
}

fn who(incident: &Incident, add: &mut Vec<Block>) {
    if incident.is_condition() {
        add.push(Block::Paragraph("It is no transaction's doing.".to_owned()));
        return;
    }
    let Some(who) = incident.who() else { return };
    add.push(Block::Paragraph(who_in_words(who)));
    if let Some(query) = &who.actor.query {
        add.push(Block::Paragraph("The statement, as the server told it:".to_owned()));
        add.push(Block::Code(query.clone()));
    }
}

/// Who it was, with how that is known.
pub(crate) fn who_in_words(who: &Who) -> String {
    let Who { actor, source, note } = who;
    let mut parts = Vec::new();
    let named = [
        ("role", &actor.role),
        ("logged in as", &actor.session_user),
        ("database", &actor.database),
        ("application", &actor.application),
        ("client", &actor.client),
        ("backend", &actor.backend_type),
        ("prepared as", &actor.prepared),
    ];
    for (name, value) in named {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            parts.push(format!("{name} {value}"));
        }
    }
    if let Some(pid) = actor.pid {
        parts.push(format!("process {pid}"));
    }
    if let Some(begun) = actor.backend_start {
        parts.push(format!("connected since {begun}"));
    }
    let how = match source {
        WhoSource::Unknown => "nobody saw who it was",
        WhoSource::Nearby => "likely: such a session was seen about then, but not with this very transaction",
        WhoSource::Activity => "certain: the session was seen with this transaction in pg_stat_activity",
        WhoSource::Guard => "certain: the guard wrote it into the WAL in the same transaction",
    };
    let note = note.as_ref().map(|note| format!(" ({note})")).unwrap_or_default();
    if parts.is_empty() { format!("{how}{note}") } else { format!("{}; {how}{note}", parts.join(", ")) }
}

fn done(incident: &Incident, place: &Place<'_>, add: &mut Vec<Block>) {
    let mut items = Vec::new();
    for action in &incident.actions {
        let target = action.xid.map(|xid| format!(" of transaction {xid}")).unwrap_or_default();
        let came = match action.aborted {
            Some(true) => "; the transaction was rolled back",
            Some(false) => "; the transaction committed all the same",
            None => "",
        };
        items.push(format!("{}{target}: {}{came}", action.kind, action.outcome));
    }
    for evidence in &incident.evidence {
        let note = evidence.note.as_ref().map(|note| format!(" ({note})")).unwrap_or_default();
        items.push(format!(
            "{} rows of {} saved as {} in {}{note}",
            grouped(evidence.rows),
            evidence.table,
            evidence.format,
            evidence.key
        ));
    }
    for (what, signature) in [("acknowledged", &incident.acknowledged), ("resolved", &incident.resolved)] {
        if let Some(signature) = signature {
            let note = signature.note.as_ref().map(|note| format!(": {note}")).unwrap_or_default();
            items.push(format!(
                "{what} by {} on {}{note}",
                signature.by,
                render::time_to_millis(signature.at, place.zone)
            ));
        }
    }
    if items.is_empty() {
        items.push("Nothing but this record.".to_owned());
    }
    add.push(Block::Items(items));
}

fn recovery(incident: &Incident, place: &Place<'_>, add: &mut Vec<Block>) {
    let commands = message::way_back(incident, &place.reach);
    if commands.is_empty() {
        let text = if incident.is_condition() {
            "There is nothing to restore: no data was changed."
        } else {
            "There is nothing to restore: nothing of it is committed."
        };
        add.push(Block::Paragraph(text.to_owned()));
        return;
    }
    add.push(Block::Paragraph(
        "Everything that was committed before the first harm is kept, and nothing else. What was committed after it is lost \
         with a whole restore: the plan tells what that is."
            .to_owned(),
    ));
    for Command { purpose, command } in commands {
        add.push(Block::Paragraph(format!("{purpose}:")));
        add.push(Block::Code(command));
    }
}

fn unknown(incident: &Incident, add: &mut Vec<Block>) {
    let mut items = incident.notes.clone();
    let uncounted = incident.tables.iter().filter(|table| table.before.is_none()).count();
    if uncounted > 0 {
        items.push(format!("how many rows {uncounted} of the tables had before"));
    }
    let estimated = incident.tables.iter().filter(|table| table.before.is_some_and(|rows| !rows.exact)).count();
    if estimated > 0 {
        items.push(format!("the exact number of rows of {estimated} tables: it goes back to an estimate"));
    }
    if incident.transactions.iter().any(|transaction| !transaction.is_complete) {
        items.push("some transactions were not seen from their beginning: their rows are at least these".to_owned());
    }
    if items.is_empty() {
        items.push("Nothing is known to be missing.".to_owned());
    }
    add.push(Block::Items(items));
}

fn left_out(more: u64, what: &str, add: &mut Vec<Block>) {
    if more > 0 {
        add.push(Block::Paragraph(format!("... and {} more {what} that are not listed.", grouped(more))));
    }
}

/// What was done to a definition, in a word or two.
pub(crate) const fn ddl_in_words(kind: DdlKind) -> &'static str {
    match kind {
        DdlKind::Truncate => "table truncated",
        DdlKind::DropTable => "table dropped",
        DdlKind::DropOther => "view, sequence or index dropped",
        DdlKind::DropSchema => "schema dropped",
        DdlKind::DropDatabase => "database dropped",
        DdlKind::DropColumn => "column dropped",
        DdlKind::DropTrigger => "trigger dropped",
        DdlKind::DisableTrigger => "trigger disabled",
        DdlKind::DropRule => "rule dropped or disabled",
        DdlKind::DropPolicy => "policy dropped",
        DdlKind::DropEventTrigger => "event trigger dropped",
        DdlKind::DisableEventTrigger => "event trigger disabled",
        DdlKind::Create => "made",
        DdlKind::Rewrite => "written anew",
        DdlKind::Alter => "altered",
    }
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

impl Document {
    /// As Markdown. Nothing in the database's names and texts is taken for a mark.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        for block in &self.blocks {
            match block {
                Block::Title(title) => {
                    let _ = writeln!(text, "# {}\n", markdown(title));
                }
                Block::Heading(heading) => {
                    let _ = writeln!(text, "## {heading}\n");
                }
                Block::Paragraph(paragraph) => {
                    let _ = writeln!(text, "{}\n", markdown(paragraph));
                }
                Block::Items(items) => {
                    for item in items {
                        let _ = writeln!(text, "- {}", markdown(item));
                    }
                    text.push('\n');
                }
                Block::Table(headers, rows) => {
                    let _ = writeln!(text, "| {} |\n|{}", headers.join(" | "), "---|".repeat(headers.len()));
                    for row in rows {
                        let cells: Vec<_> = row.iter().map(|cell| markdown(cell)).collect();
                        let _ = writeln!(text, "| {} |", cells.join(" | "));
                    }
                    text.push('\n');
                }
                Block::Code(code) => {
                    // A fence that the text does not hold.
                    let longest = code.split(|c| c != '`').map(str::len).max().unwrap_or_default();
                    let fence = "`".repeat(longest.max(2) + 1);
                    let _ = writeln!(text, "{fence}\n{}\n{fence}\n", render::printable_lines(code));
                }
            }
        }
        text
    }

    /// As a page of HTML that needs nothing else.
    pub(crate) fn html(&self) -> String {
        let title = self.blocks.iter().find_map(|block| match block {
            Block::Title(title) => Some(html(title)),
            _ => None,
        });
        let mut text = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{}</title>\n<style>{STYLE}</style>\n",
            title.unwrap_or_default()
        );
        for block in &self.blocks {
            match block {
                Block::Title(title) => {
                    let _ = writeln!(text, "<h1>{}</h1>", html(title));
                }
                Block::Heading(heading) => {
                    let _ = writeln!(text, "<h2>{heading}</h2>");
                }
                Block::Paragraph(paragraph) => {
                    let _ = writeln!(text, "<p>{}</p>", html(paragraph));
                }
                Block::Items(items) => {
                    let items: String = items.iter().map(|item| format!("<li>{}</li>\n", html(item))).collect();
                    let _ = writeln!(text, "<ul>\n{items}</ul>");
                }
                Block::Table(headers, rows) => {
                    let head: String = headers.iter().map(|header| format!("<th>{header}</th>")).collect();
                    let _ = writeln!(text, "<table>\n<tr>{head}</tr>");
                    for row in rows {
                        let cells: String = row.iter().map(|cell| format!("<td>{}</td>", html(cell))).collect();
                        let _ = writeln!(text, "<tr>{cells}</tr>");
                    }
                    text += "</table>\n";
                }
                Block::Code(code) => {
                    let _ = writeln!(text, "<pre>{}</pre>", html_text(&render::printable_lines(code)));
                }
            }
        }
        text + "</html>\n"
    }
}

const STYLE: &str = "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}\
table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.2em .6em;text-align:left}\
pre{background:#f4f4f4;padding:1em;white-space:pre-wrap}";

/// Text of a line, its marks escaped.
fn markdown(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in render::printable(text).chars() {
        if matches!(c, '\\' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '|' | '#' | '~' | '&' | '!') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

fn html(text: &str) -> String {
    html_text(&render::printable(text))
}

fn html_text(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use walguard::detect::Actor;
    use walguard::detect::incident::{State, TableDamage, incident_id};
    use walguard::pg::{Lsn, TimelineId, Xid};

    use super::*;

    fn incident() -> Incident {
        let at: Timestamp = "2025-12-17T06:14:59.123456Z".parse().unwrap();
        let id = incident_id(TimelineId::FIRST, Lsn::new(0x1A2B_3C40));
        let mut incident = Incident { state: State::Committed, ..Incident::new(id, TimelineId::FIRST, at) };
        incident.title = "shop.public.t emptied".to_owned();
        incident.first_harm = Some(Lsn::new(0x1A2B_3C40));
        incident.tables.push(TableDamage {
            name: "shop.public.\"<b>|x\"".to_owned(),
            before: Some(Rows { count: 1_200, exact: false }),
            after: Some(Rows { count: 0, exact: true }),
            deleted: 1_200,
            ..TableDamage::default()
        });
        let actor = Actor {
            role: Some("app".into()),
            query: Some("DELETE FROM t -- ``` <script>\u{1b}[2J".into()),
            ..Actor::default()
        };
        incident.transactions.push(IncidentTransaction {
            xid: Xid::new(700),
            begin: Lsn::new(1),
            lsn: Some(Lsn::new(0x1A2B_3C40)),
            time: Some(at.into()),
            state: TransactionState::Committed,
            is_complete: true,
            inserted: 0,
            updated: 0,
            deleted: 1_200,
            who: Who { actor, source: WhoSource::Activity, note: None },
        });
        incident
    }

    fn written() -> Document {
        let place = Place {
            cluster: "main",
            reach: Reach {
                flags: ["--config", "/etc/wal guard.toml"].map(str::to_owned).into(),
                restore_dir: "/srv/restored".into(),
                is_logical: false,
            },
            zone: &TimeZone::UTC,
            at: Timestamp::UNIX_EPOCH,
        };
        document(&incident(), &place)
    }

    #[test]
    fn a_report_says_what_when_who_and_how_to_go_back() {
        let text = written().markdown();
        for part in [
            "## Summary",
            "2025-12-17 06:14:59.123 UTC",
            "about 1,200",
            "role app",
            "certain: the session was seen",
            "walguard restore --to before:00000001-000000001A2B3C40 \
             --target-dir /srv/restored/00000001-000000001A2B3C40 --action promote --yes --config '/etc/wal guard.toml'",
            "it goes back to an estimate",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn nothing_from_the_database_is_taken_for_a_mark_or_a_script() {
        let (markdown, html) = (written().markdown(), written().html());
        assert!(!html.contains("<script>") && !html.contains("<b>"), "{html}");
        assert!(!html.contains('\u{1b}') && !markdown.contains('\u{1b}'));
        assert!(markdown.contains("shop.public.\"\\<b\\>\\|x\""), "{markdown}");
        assert!(markdown.contains("\n````\nDELETE FROM t -- ```"), "{markdown}");
    }

    #[test]
    fn what_is_not_committed_has_no_way_back() {
        let incident = Incident { first_harm: None, state: State::Aborted, ..incident() };
        assert!(message::way_back(&incident, &Reach::default()).is_empty());
    }
}
