//! `walguard init`: settings file, repository and slot; or only the SQL that must be run before.

use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;
use walguard::atomic_file;
use walguard::capture::logical;
use walguard::capture::{CaptureError, ConnInfo, Created, Environment, SlotLife, Walsender};
use walguard::repo::backup::Origin;
use walguard::repo::cluster::ClusterIdentity;
use walguard::repo::{self, ProbeReport, Repository};
use walguard::settings::{self, Settings, Source};

use crate::Outcome;
use crate::args::{InitArgs, SourceArg};
use crate::context::Context;
use crate::render;
use crate::report::UsageError;

pub(crate) async fn run(mut context: Context, args: InitArgs) -> anyhow::Result<Outcome> {
    if let Some(source) = args.source {
        context.settings.source = match source {
            SourceArg::Physical => Source::Physical,
            SourceArg::Logical => Source::Logical,
        };
    }
    if args.print_sql {
        render::print(&grants(&context.settings, &Environment::from_process())?)?;
        return Ok(Outcome::Done);
    }
    if args.print_settings {
        render::print(&settings::template(&context.settings))?;
        return Ok(Outcome::Done);
    }
    let conninfo = context.conninfo()?;
    let repository = context.repository().await?;
    let file = context.config.as_deref();
    if file.is_some_and(|file| !file.exists()) {
        refuse_password(&context.settings)?;
    }

    if context.settings.source == Source::Logical {
        return init_logical(&context, &conninfo, &repository, None).await;
    }
    let is_chosen = args.source.is_some() || file.is_some_and(Path::exists);
    let mut walsender = match Walsender::connect(&conninfo).await {
        Ok(walsender) => walsender,
        // Whoever may replicate a database only is let in by another way.
        Err(refused) if !is_chosen && is_refusal(&refused) => {
            if Walsender::connect_to_database(&conninfo).await.is_err() {
                return Err(refused).context("connect to the server");
            }
            context.settings.source = Source::Logical;
            return init_logical(&context, &conninfo, &repository, Some(refused.to_string())).await;
        }
        Err(error) => return Err(error).context("connect to the server"),
    };
    let identity = Origin::ask(&mut walsender).await.context("ask the server who it is")?.identity();
    let place = repository.initialize(&identity).await.context("initialise the repository")?;
    let probe = repository.probe().await.context("try the repository")?;
    let slot = &context.settings.postgres.slot;
    let slot_created = match walsender.create_physical_slot(slot).await {
        Err(refused) if !is_chosen && is_refusal(&refused) => {
            context.settings.source = Source::Logical;
            return init_logical(&context, &conninfo, &repository, Some(refused.to_string())).await;
        }
        created => created.context("create the replication slot")?,
    };
    // Last: whoever finds it can rely on the rest.
    let settings_written = file.map(|file| write_settings(file, &context.settings)).transpose()?;

    let done = Done {
        identity,
        server: walsender.endpoint().to_owned(),
        repository: repository.url(),
        repository_created: place == repo::Created::New,
        probe,
        slot,
        slot_created: slot_created == Created::New,
        settings: file,
        settings_written,
    };
    if context.json {
        render::print_json(&done)?;
    } else {
        render::print(&done.text())?;
    }
    Ok(Outcome::Done)
}

/// True if it is the service that does not want this, and not a mistake of ours that another way would only hide.
const fn is_refusal(error: &CaptureError) -> bool {
    matches!(error, CaptureError::NotPermitted(_) | CaptureError::Unsupported(_))
        || matches!(error, CaptureError::Authentication { error, .. } if matches!(error.code.as_bytes(), b"28000"))
}

/// The same for a server whose changes are read by logical replication. `why`: what it said to physical replication.
async fn init_logical(
    context: &Context,
    conninfo: &ConnInfo,
    repository: &Repository,
    why: Option<String>,
) -> anyhow::Result<Outcome> {
    let settings = &context.settings;
    let mut walsender = Walsender::connect_to_database(conninfo).await.context("connect to the database")?;
    let identity = Origin::ask(&mut walsender).await.context("ask the server who it is")?.identity();
    let place = repository.initialize(&identity).await.context("initialise the repository")?;
    let probe = repository.probe().await.context("try the repository")?;
    let client = logical::connect(conninfo).await.context("connect to the database")?;
    let (survey, refused) = logical::publish(&client, &settings.logical).await.context("make the publications")?;
    let slot = &settings.postgres.slot;
    let there = logical::slot(&client, slot).await.context("look for the slot")?;
    let slot_created = there.is_none();
    if slot_created {
        let life = SlotLife::Kept { failover: settings.logical.failover };
        // The agent that is to come must not find it waiting for ever.
        let made = walsender.create_logical_slot(slot, life).await.context("create the replication slot")?;
        tracing::debug!(%made.consistent, "made the slot");
    }
    let file = context.config.as_deref();
    let settings_written = file.map(|file| write_settings(file, settings)).transpose()?;
    let done = LogicalDone {
        identity,
        server: walsender.endpoint().to_owned(),
        source: settings.source,
        why,
        database: survey.database_name.clone(),
        repository: repository.url(),
        repository_created: place == repo::Created::New,
        probe,
        published: survey.tables.len() - survey.unpublished().count(),
        inserts_only: survey.inserts_only(&settings.logical).map(logical::Table::display_name).collect(),
        unpublished: survey.unpublished().map(logical::Table::display_name).collect(),
        refused: refused.map(|error| error.to_string()),
        slot,
        slot_created,
        settings: file,
        settings_written,
    };
    if context.json {
        render::print_json(&done)?;
    } else {
        render::print(&done.text())?;
    }
    Ok(Outcome::Done)
}

/// What was done for a logical source.
#[derive(Debug, Serialize)]
struct LogicalDone<'a> {
    #[serde(rename = "cluster")]
    identity: ClusterIdentity,
    server: String,
    source: Source,
    /// What the server said to physical replication, if that was tried.
    why: Option<String>,
    database: String,
    repository: String,
    repository_created: bool,
    probe: ProbeReport,
    published: usize,
    inserts_only: Vec<String>,
    unpublished: Vec<String>,
    refused: Option<String>,
    slot: &'a str,
    slot_created: bool,
    settings: Option<&'a Path>,
    settings_written: Option<bool>,
}

impl LogicalDone<'_> {
    fn text(&self) -> String {
        let Self { identity, server, database, repository, slot, .. } = self;
        let made = |new: bool| if new { "created" } else { "there already, left as it is" };
        let mut text = String::new();
        if let Some(why) = &self.why {
            text += &format!(
                "The server does not give its WAL away ({why}), so its changes are read by logical replication.\n\n"
            );
        }
        text += &format!(
            "server       {server}: PostgreSQL {}, system identifier {}\n\
             source       logical, database {database}: {} tables published\n\
             repository   {repository}: {}\n\
             slot         {slot}: {}\n",
            identity.server_version,
            identity.system_id,
            self.published,
            made(self.repository_created),
            made(self.slot_created),
        );
        if let (Some(file), Some(written)) = (self.settings, self.settings_written) {
            text += &format!("settings     {}: {}\n", file.display(), made(written));
        }
        if !self.inserts_only.is_empty() {
            text += &format!(
                "\nWithout a replica identity, so updates and deletes are not told: {}\n",
                self.inserts_only.join(", ")
            );
        }
        if !self.unpublished.is_empty() {
            let why = self.refused.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
            text += &format!("\nNot published, so not seen{why}: {}\n", self.unpublished.join(", "));
        }
        let config = self.settings.map(|file| format!(" --config {}", file.display())).unwrap_or_default();
        text + &format!(
            "\nFrom now on the server keeps its WAL until the agent has read it. Start the agent soon:\n  \
             walguard check{config}\n  walguard run{config}\n"
        )
    }
}

/// A password would be kept in a file that is read by more people than one thinks.
fn refuse_password(settings: &Settings) -> anyhow::Result<()> {
    let mut environment = Environment::from_process();
    environment.variables.remove("PGPASSWORD");
    if ConnInfo::from_config(&settings.postgres, &environment)?.has_password() {
        let hint = "put it into a file of its own, named by `postgres.password_file`, or into ~/.pgpass or PGPASSWORD, \
                    and leave it out of the connection string";
        return Err(UsageError::with_hint("the password would be written into the settings file", hint).into());
    }
    Ok(())
}

/// Writes the settings file unless it is there already.
fn write_settings(file: &Path, settings: &Settings) -> anyhow::Result<bool> {
    atomic_file::create(file, settings::template(settings).as_bytes())
        .with_context(|| format!("write settings file {}", file.display()))
}

/// What was done. Everything that existed was left as it was.
#[derive(Debug, Serialize)]
struct Done<'a> {
    #[serde(rename = "cluster")]
    identity: ClusterIdentity,
    server: String,
    repository: String,
    repository_created: bool,
    probe: ProbeReport,
    slot: &'a str,
    slot_created: bool,
    settings: Option<&'a Path>,
    settings_written: Option<bool>,
}

impl Done<'_> {
    fn text(&self) -> String {
        let Self { identity, server, repository, slot, .. } = self;
        let made = |new: bool| if new { "created" } else { "there already, left as it is" };
        let mut text = format!(
            "server      {server}: PostgreSQL {}, system identifier {}\n\
             repository  {repository}: {}\n\
             slot        {slot}: {}\n",
            identity.server_version,
            identity.system_id,
            made(self.repository_created),
            made(self.slot_created),
        );
        if let (Some(file), Some(written)) = (self.settings, self.settings_written) {
            text += &format!("settings    {}: {}\n", file.display(), made(written));
        }
        if !self.probe.create_once {
            text += "\nThe store does not refuse to write a key twice; walguard looks before each write and reads back after it.\n";
        }
        if let Some(problem) = &self.probe.delete_problem {
            text += &format!("\nNothing can be deleted there, so `walguard expire` will not work: {problem}\n");
        }
        let config = self.settings.map(|file| format!(" --config {}", file.display())).unwrap_or_default();
        text + &format!(
            "\nFrom now on the server keeps its WAL until the agent has archived it. Start the agent soon:\n  \
             walguard check{config}\n  walguard run{config}\n"
        )
    }
}

/// The SQL that gives the role what the settings need. Nothing is asked of a server.
fn grants(settings: &Settings, environment: &Environment) -> anyhow::Result<String> {
    let mut postgres = settings.postgres.clone();
    if postgres.conninfo.is_empty() {
        "user=walguard".clone_into(&mut postgres.conninfo);
    }
    let info = ConnInfo::from_config(&postgres, environment)?;
    let (role, database) = (quoted(info.user()), quoted(info.dbname()));
    if settings.source == Source::Logical {
        return Ok(logical_grants(&role, &database));
    }
    let mut sql = format!(
        "-- Streams WAL and takes base backups. Give it a password with \\password, or a client certificate, and let it in\n\
         -- with two lines in pg_hba.conf: one for the database `replication`, one for the database {database}.\n\
         CREATE ROLE {role} LOGIN REPLICATION;\n\
         -- Settings, slots and sessions; no row of any table.\n\
         GRANT pg_monitor TO {role};\n\
         GRANT CONNECT ON DATABASE {database} TO {role};\n"
    );
    if settings.ends_sessions() {
        sql += &format!(
            "-- Rules with breaker = \"terminate\" end sessions of others, but no superuser's.\n\
             GRANT pg_signal_backend TO {role};\n"
        );
    }
    if settings.flashback.evidence {
        sql += &format!(
            "-- Rows that an incident deletes are read and saved (flashback.evidence). To save them of some tables only, grant\n\
             -- SELECT on those instead. Tables with row security are not read.\n\
             GRANT pg_read_all_data TO {role};\n"
        );
        for database in settings.flashback.databases.iter().filter(|name| *name != info.dbname()) {
            sql += &format!("GRANT CONNECT ON DATABASE {} TO {role};\n", quoted(database));
        }
    }
    Ok(sql)
}

/// The same for a logical source.
fn logical_grants(role: &str, database: &str) -> String {
    format!(
        "-- Reads changes by logical replication; wal_level must be logical. On a managed service this is the service's own\n\
         -- administrator, or a role with what that calls REPLICATION (rds_replication, cloudsqlsuperuser ...).\n\
         CREATE ROLE {role} LOGIN REPLICATION;\n\
         -- Makes the publications.\n\
         GRANT CREATE, CONNECT ON DATABASE {database} TO {role};\n\
         -- Settings, slots and sessions.\n\
         GRANT pg_monitor TO {role};\n\
         -- A table is published by its owner: make the role a member of each role that owns tables, or make the publications\n\
         -- yourself and say manage = false.\n\
         -- GRANT <owner> TO {role};\n"
    )
}

/// An identifier in SQL: as it is if it can be, in quotes if it must be.
fn quoted(name: &str) -> String {
    let plain = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    // None of the names that are likely here is a reserved word but these.
    if plain && !matches!(name, "user" | "all" | "default" | "table" | "select" | "grant" | "public" | "none") {
        name.to_owned()
    } else {
        format!("\"{}\"", name.replace('"', "\"\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sql_grants_the_least_to_the_role_of_the_connection_string() {
        let mut settings = Settings::default();
        settings.postgres.conninfo = "postgres://wal-guard@db1/Shop".into();
        let sql = grants(&settings, &Environment::default()).unwrap();
        let statements: Vec<_> = sql.lines().filter(|line| !line.starts_with("--")).collect();
        assert_eq!(
            statements,
            [
                "CREATE ROLE \"wal-guard\" LOGIN REPLICATION;",
                "GRANT pg_monitor TO \"wal-guard\";",
                "GRANT CONNECT ON DATABASE \"Shop\" TO \"wal-guard\";",
            ]
        );
    }

    #[test]
    fn what_is_switched_on_needs_its_grant_and_nothing_else_does() {
        let mut settings = Settings::default();
        let count = |settings: &Settings| {
            let sql = grants(settings, &Environment::default()).unwrap();
            (sql.contains("GRANT pg_signal_backend"), sql.contains("GRANT pg_read_all_data"), sql.contains("\"Shop\""))
        };
        assert_eq!(count(&settings), (false, false, false));
        settings.flashback.databases = vec!["Shop".to_owned()];
        assert_eq!(count(&settings), (false, false, false));
        settings.flashback.evidence = true;
        assert_eq!(count(&settings), (false, true, true));
        settings.detect.breaker = walguard::detect::rule::Breaker::Terminate;
        assert_eq!(count(&settings), (true, true, true));
        settings.breaker.per_hour = 0;
        assert_eq!(count(&settings), (false, true, true));
    }

    #[test]
    fn a_name_cannot_break_out_of_its_quotes() {
        assert_eq!(quoted("walguard"), "walguard");
        assert_eq!(quoted("User"), "\"User\"");
        assert_eq!(quoted("a\"; DROP"), "\"a\"\"; DROP\"");
        assert_eq!(quoted("user"), "\"user\"");
    }
}
