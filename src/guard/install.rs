//! The guard in a database: put there, taken out, compared with what it should be.

use std::time::Duration;

use tokio_postgres::{Client, SimpleQueryMessage};

use super::script::Config;
use crate::capture::{self, CaptureError};

/// A database with thousands of tables takes a while.
const ANSWER_MAX: Duration = Duration::from_secs(120);

/// What of the guard should be there, and what is not as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// The database's name.
    pub database: String,
    /// Something of the guard is there.
    pub installed: bool,
    /// Triggers that should be there.
    pub triggers: u64,
    /// Of those, the ones that are there as they should be.
    pub triggers_ok: u64,
    /// Event triggers that should be there.
    pub event_triggers: u64,
    /// Of those, the ones that are there as they should be.
    pub event_triggers_ok: u64,
    /// What is not as it should be, the first hundred.
    pub problems: Vec<Problem>,
    /// How many there are in all.
    pub problems_total: u64,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// `trigger`, `function`, `event trigger` or `role`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// What is wrong with it.
    pub problem: String,
}

/// Problems that a report names.
const PROBLEMS_MAX: usize = 100;

impl Report {
    /// True if all that should be there is.
    pub fn is_whole(&self) -> bool {
        self.problems_total == 0
    }
}

/// Puts the guard into the database, or brings what is there up to date. Gives the server's warnings.
///
/// # Errors
/// If the role may not do it, a table is locked for more than five seconds, or the connection breaks. Then nothing is
/// changed.
pub async fn install(client: &Client, config: &Config) -> Result<(), CaptureError> {
    run(client, &config.install()).await
}

/// Takes the guard out of the database.
///
/// # Errors
/// As [`install`].
pub async fn uninstall(client: &Client) -> Result<(), CaptureError> {
    run(client, &Config::uninstall()).await
}

async fn run(client: &Client, sql: &str) -> Result<(), CaptureError> {
    let result = tokio::time::timeout(ANSWER_MAX, client.batch_execute(sql)).await;
    result.map_err(|_| silent())?.map_err(|error| capture::sql_error("the server", error))
}

fn silent() -> CaptureError {
    let what = format!("the server did not answer within {} s", ANSWER_MAX.as_secs());
    CaptureError::Unreachable { what, source: None }
}

/// Compares what is in the database with what should be. Every role may ask.
///
/// # Errors
/// If the server does not answer.
pub async fn inspect(client: &Client, config: &Config) -> Result<Report, CaptureError> {
    let all = config.difference();
    // Counted there: a database with a thousand tables has two thousand triggers that are all well.
    let sql = format!(
        "BEGIN READ ONLY; SELECT current_database(); \
         SELECT kind, count(*), count(*) FILTER (WHERE problem IS NULL), \
         count(*) FILTER (WHERE problem = 'is not there') FROM ({all}) AS all_of_it GROUP BY kind; \
         SELECT kind, name, problem FROM ({all}) AS all_of_it WHERE problem IS NOT NULL LIMIT {PROBLEMS_MAX}; COMMIT"
    );
    let answer = tokio::time::timeout(ANSWER_MAX, client.simple_query(&sql)).await;
    let answer = answer.map_err(|_| silent())?.map_err(|error| capture::sql_error("the server", error))?;
    let mut report = Report::default();
    let mut missing = 0;
    let mut total = 0;
    for message in answer {
        let SimpleQueryMessage::Row(row) = message else { continue };
        if row.len() == 1 {
            row.get(0).unwrap_or_default().clone_into(&mut report.database);
            continue;
        }
        let text = |column| row.get(column).unwrap_or_default().to_owned();
        let number = |column| row.get(column).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
        if row.len() == 4 {
            let (wanted, ok) = (number(1), number(2));
            match text(0).as_str() {
                "trigger" => (report.triggers, report.triggers_ok) = (wanted, ok),
                "event trigger" => (report.event_triggers, report.event_triggers_ok) = (wanted, ok),
                _ => {}
            }
            (total, missing) = (total + wanted, missing + number(3));
            report.problems_total += wanted - ok.min(wanted);
        } else {
            report.problems.push(Problem { kind: text(0), name: text(1), problem: text(2) });
        }
    }
    report.installed = missing < total;
    Ok(report)
}
