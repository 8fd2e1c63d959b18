//! The loop that keeps every table of the role in the publications, each in the one that its replica identity allows.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::backoff::Chain;
use crate::capture::logical::{self, Config, Survey};
use crate::capture::{CaptureError, ConnInfo};
use crate::serve::status::Board;

/// A new table, or one that lost its key, waits no longer than this. The look is one query.
const INTERVAL: Duration = Duration::from_secs(5);

/// Tables named in an alarm.
const NAMED_MAX: usize = 5;

/// What the loop works with.
#[derive(Debug)]
pub(in crate::supervisor) struct Publications {
    pub(in crate::supervisor) conninfo: ConnInfo,
    pub(in crate::supervisor) config: Config,
    pub(in crate::supervisor) board: Board,
}

impl Publications {
    pub(in crate::supervisor) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut client = None;
        let mut failing = false;
        while stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await.is_some() {
            match stop.run_until_cancelled(self.look(&mut client)).await {
                None => return Ok(()),
                Some(Ok(())) => failing = false,
                Some(Err(error)) => {
                    client = None;
                    // The stream tells of a server that is away.
                    if !std::mem::replace(&mut failing, true) && !error.is_transient() {
                        let text = format!("the publications cannot be kept: {}", Chain(&error));
                        self.board.raise("publication", text, error.hint());
                    }
                }
            }
        }
        Ok(())
    }

    async fn look(&self, client: &mut Option<tokio_postgres::Client>) -> Result<(), CaptureError> {
        if client.as_ref().is_none_or(tokio_postgres::Client::is_closed) {
            *client = Some(logical::connect(&self.conninfo).await?);
        }
        let Some(client) = client else { return Ok(()) };
        let (survey, refused) = logical::publish(client, &self.config).await?;
        match problem(&survey, &self.config, refused.as_ref()) {
            Some((text, hint)) => self.board.raise("publication", text, Some(hint)),
            None => self.board.clear("publication"),
        }
        Ok(())
    }
}

/// What of the publications wants somebody, worst first, and what to do.
fn problem(survey: &Survey, config: &Config, refused: Option<&CaptureError>) -> Option<(String, String)> {
    let named = |tables: Vec<&logical::Table>| {
        let more = tables.len().saturating_sub(NAMED_MAX);
        let names: Vec<_> = tables.iter().take(NAMED_MAX).map(|table| table.display_name()).collect();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        names.join(", ") + &more
    };
    let unusable: Vec<_> = survey.refused(config).collect();
    if !unusable.is_empty() {
        let text = format!(
            "the server refuses UPDATE and DELETE on {}: published without a replica identity",
            named(unusable)
        );
        let hint = "give them a primary key or REPLICA IDENTITY FULL, or take them out of the publication";
        return Some((text, hint.to_owned()));
    }
    let unpublished: Vec<_> = survey.unpublished().collect();
    if unpublished.is_empty() {
        return None;
    }
    let why = refused.map(|error| format!(" ({})", Chain(error))).unwrap_or_default();
    let text = format!("changes of {} are not seen: no publication names them{why}", named(unpublished));
    let hint = match config.manage {
        true => "make walguard's role a member of their owner, or add them to the publication",
        false => "add them to the publication: ALTER PUBLICATION ... ADD TABLE ...",
    };
    Some((text, hint.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::Oid;

    #[test]
    fn what_breaks_the_application_is_told_before_what_is_not_seen() {
        let table = |name: &str, has_identity, publications: &[&str]| logical::Table {
            oid: Oid(1),
            schema: "public".into(),
            name: name.into(),
            is_partitioned: false,
            has_identity,
            is_owned: false,
            publications: publications.iter().map(|name| (*name).to_owned()).collect(),
        };
        let mut survey = Survey {
            database: Oid(5),
            database_name: "shop".into(),
            publications: vec!["walguard".into()],
            is_for_all: false,
            tables: vec![table("a", true, &["walguard"]), table("b", true, &[]), table("c", false, &["walguard"])],
        };
        let config = Config::default();
        let text = |survey: &Survey| problem(survey, &config, None).map(|(text, _)| text);
        assert!(text(&survey).unwrap().contains("UPDATE and DELETE on public.c"));
        survey.tables.pop();
        assert!(text(&survey).unwrap().contains("changes of public.b are not seen"));
        survey.tables.pop();
        assert_eq!(text(&survey), None);
    }
}
