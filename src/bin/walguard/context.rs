//! Settings file, environment and flags -> what a verb works with.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use jiff::tz::TimeZone;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use walguard::capture::{ConnInfo, Environment};
use walguard::notify::Reach;
use walguard::progress::Progress;
use walguard::repo::Repository;
use walguard::settings::{Settings, Source};

use crate::args::GlobalArgs;
use crate::report::UsageError;

/// Where PostgreSQL's programs are, for verbs without a flag that names it.
pub(crate) fn pg_bin_dir() -> Option<PathBuf> {
    std::env::var_os("WALGUARD_PG_BIN_DIR").filter(|dir| !dir.is_empty()).map(PathBuf::from)
}

/// What a verb works with.
#[derive(Debug)]
pub(crate) struct Context {
    /// The settings file with the flags and the environment laid over it.
    pub(crate) settings: Settings,
    /// The settings file, if there is one. Child processes are given the same.
    pub(crate) config: Option<PathBuf>,
    /// Flags that name the settings file, and repository and cluster where it does not: with them another call, from
    /// any directory and without our environment, reaches the same. Credentials are never among them.
    pub(crate) flags: Vec<String>,
    /// True if a program reads what we print.
    pub(crate) json: bool,
    /// The zone in which times without a zone are read, and in which times are shown beside UTC.
    pub(crate) zone: TimeZone,
}

impl Context {
    /// Reads the settings file, if one is named, and lays flags and environment over it.
    pub(crate) fn load(args: &GlobalArgs) -> anyhow::Result<Self> {
        let settings = match &args.config {
            Some(path) => Settings::read(path)?,
            None => Settings::default(),
        };
        Self::overlaid(settings, args)
    }

    /// What commands need that we print for people.
    pub(crate) fn reach(&self) -> Reach {
        Reach {
            flags: self.flags.clone(),
            restore_dir: self.settings.restore.target_dir.clone(),
            is_logical: self.settings.source == Source::Logical,
        }
    }

    /// As [`Context::load`], but the settings file need not be there yet.
    pub(crate) fn load_or_begin(args: &GlobalArgs) -> anyhow::Result<Self> {
        match &args.config {
            Some(path) if !path.exists() => Self::overlaid(Settings::default(), args),
            _ => Self::load(args),
        }
    }

    fn overlaid(mut settings: Settings, args: &GlobalArgs) -> anyhow::Result<Self> {
        let in_file = (settings.cluster.clone(), as_url(&settings.repository.url)?);
        if let Some(cluster) = &args.cluster {
            settings.cluster.clone_from(cluster);
        }
        if let Some(pg) = &args.pg {
            settings.postgres.conninfo.clone_from(pg);
        }
        if let Some(repo) = &args.repo {
            settings.repository.url.clone_from(repo);
        }
        settings.repository.url = as_url(&settings.repository.url)?;
        if let Some(dir) = &args.spool {
            settings.spool.dir.clone_from(dir);
        }
        let mut flags = Vec::new();
        if let Some(config) = &args.config {
            let config = std::path::absolute(config).unwrap_or_else(|_| config.clone());
            flags.extend(["--config".to_owned(), config.display().to_string()]);
        }
        let named = (&settings.cluster, &settings.repository.url);
        for (flag, value, in_file) in [("--repo", named.1, &in_file.1), ("--cluster", named.0, &in_file.0)] {
            if value != in_file {
                flags.extend([flag.to_owned(), value.clone()]);
            }
        }
        Ok(Self { flags, ..Self::new(settings, args)? })
    }

    /// For verbs that bring their own settings.
    pub(crate) fn without_settings(args: &GlobalArgs) -> anyhow::Result<Self> {
        Self::new(Settings::default(), args)
    }

    fn new(settings: Settings, args: &GlobalArgs) -> anyhow::Result<Self> {
        let zone = settings.time.zone().map_err(UsageError::new)?;
        Ok(Self { settings, config: args.config.clone(), flags: Vec::new(), json: args.json, zone })
    }

    /// The cluster's name.
    pub(crate) fn cluster(&self) -> anyhow::Result<&str> {
        let name = &self.settings.cluster;
        if name.is_empty() {
            let hint = "name it with --cluster NAME, WALGUARD_CLUSTER or `cluster = \"NAME\"` in the settings file";
            return Err(UsageError::with_hint("no cluster is named", hint).into());
        }
        Ok(name)
    }

    /// The databases whose changes are read by logical replication: that of the connection string first.
    pub(crate) fn databases(&self, conninfo: &ConnInfo) -> Vec<String> {
        let others = self.settings.logical.databases.iter().filter(|name| *name != conninfo.dbname());
        std::iter::once(conninfo.dbname()).chain(others.map(String::as_str)).map(str::to_owned).collect()
    }

    /// How to reach the server. Without a connection string it comes from `PG*` variables alone, as with `psql`; if there
    /// is none either, that is an error: nobody should archive by chance what happens to listen on the local socket.
    pub(crate) fn conninfo(&self) -> anyhow::Result<ConnInfo> {
        let environment = Environment::from_process();
        if self.settings.postgres.conninfo.is_empty()
            && environment.variables.get("PGHOST").is_none_or(String::is_empty)
        {
            let hint = "name it with --pg CONNINFO, WALGUARD_PG or `postgres.conninfo` in the settings file, \
                        for example --pg postgres://walguard@db1";
            return Err(UsageError::with_hint("no PostgreSQL server is named", hint).into());
        }
        // Said now, and not at night when the server first asks for a password.
        if let Some(file) = &self.settings.postgres.password_file
            && let Err(error) = std::fs::File::open(file)
        {
            let problem = format!("read the password file {}: {error}", file.display());
            let hint = "make it, readable for the user that runs walguard and nobody else, with the password in its first \
                        line; or change `postgres.password_file`";
            return Err(UsageError::with_hint(problem, hint).into());
        }
        Ok(ConnInfo::from_config(&self.settings.postgres, &environment)?)
    }

    /// The cluster's part of the repository. Nothing is written, and nothing read but credentials.
    pub(crate) async fn repository(&self) -> anyhow::Result<Repository> {
        let cluster = self.cluster()?;
        if self.settings.repository.url.is_empty() {
            let hint = "name it with --repo URL, WALGUARD_REPO or `repository.url` in the settings file, \
                        for example --repo s3://backups/pg";
            return Err(UsageError::with_hint("no repository is named", hint).into());
        }
        Ok(Repository::connect(&self.settings.repository, cluster).await?)
    }

    /// The same of a place that was initialised: a wrong URL or name is told as such, and not as one where nothing happened.
    pub(crate) async fn initialized_repository(&self) -> anyhow::Result<Repository> {
        let repository = self.repository().await?;
        repository.require_identity().await?;
        Ok(repository)
    }

    /// Tells people how far long work is; silent with `--json`.
    pub(crate) fn progress(&self) -> Arc<dyn Progress> {
        crate::progress::progress(self.json)
    }

    /// A token that the first SIGINT or SIGTERM cancels, so that the verb can end well; the second ends the program at
    /// once, as they all do for verbs that never call this.
    pub(crate) fn cancel_on_signals(&self) -> anyhow::Result<CancellationToken> {
        let token = CancellationToken::new();
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let cancel = token.clone();
        tokio::spawn(async move {
            for again in [false, true] {
                let number = tokio::select! {
                    _ = interrupt.recv() => 2,
                    _ = terminate.recv() => 15,
                };
                if again {
                    std::process::exit(128 + number); // as a shell shows a program that died of the signal
                }
                cancel.cancel();
            }
        });
        Ok(token)
    }
}

/// A path, as people write a repository in a directory, becomes a URL; URLs stay.
fn as_url(repo: &str) -> anyhow::Result<String> {
    if repo.is_empty() || repo.contains("://") {
        return Ok(repo.to_owned());
    }
    let path = std::path::absolute(repo).with_context(|| format!("find the directory {repo}"))?;
    Ok(format!("file://{}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_taken_for_a_repository_in_a_directory() {
        assert_eq!(as_url("/srv/wal").unwrap(), "file:///srv/wal");
        assert!(as_url("wal").unwrap().ends_with("/wal"));
        assert_eq!(as_url("s3://backups/pg").unwrap(), "s3://backups/pg");
        assert_eq!(as_url("").unwrap(), "");
    }
}
