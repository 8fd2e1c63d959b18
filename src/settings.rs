//! The settings file: TOML that composes each stage's `Config`.
//!
//! Unknown keys are errors, so that a misspelt setting cannot be ignored. Everything has a default but the cluster's name,
//! the server and the repository, and those may come from flags or the environment instead.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::tz::TimeZone;

use crate::capture;
use crate::capture::spool;
use crate::detect;
use crate::guard;
use crate::notify;
use crate::repo;
use crate::repo::archiver;
use crate::repo::backup;
use crate::repo::retention;
use crate::restore;
use crate::restore::drill;
use crate::serve::http;

/// Everything that the settings file can say.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The cluster's name in the repository.
    pub cluster: String,
    /// How the server's changes are heard of.
    pub source: Source,
    /// The server.
    pub postgres: capture::Config,
    /// How changes are read where `source = "logical"`.
    pub logical: capture::logical::Config,
    /// Where everything is kept.
    pub repository: repo::Config,
    /// Where WAL waits for the repository.
    pub spool: spool::Config,
    /// How WAL goes into the repository.
    pub archive: archiver::Config,
    /// When and how base backups are taken.
    pub backup: backup::Config,
    /// How long backups and WAL are kept.
    pub retention: retention::Keep,
    /// What is damage.
    pub detect: detect::Config,
    /// How the agent finds out who is at work.
    pub who: guard::Config,
    /// What `walguard guard install` puts into a database.
    pub guard: guard::script::Config,
    /// The watch over what protects tables.
    pub protection: guard::Watch,
    /// Whether and how deleted rows are saved.
    pub flashback: guard::flashback::Config,
    /// What the breaker may do.
    pub breaker: guard::breaker::Config,
    /// How it is proved that a restore works.
    pub drill: drill::Config,
    /// Whom the agent tells of incidents: channels by name.
    pub notify: notify::Configs,
    /// Where restored clusters go.
    pub restore: restore::Config,
    /// Where the agent tells how it is.
    pub http: http::Config,
    /// How times are read and shown.
    pub time: Time,
}

/// How the server's changes are heard of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// By its WAL, as a standby hears of them.
    #[default]
    Physical,
    /// By logical replication of one database, for servers that do not give their WAL away.
    Logical,
}

/// How times are read and shown.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Time {
    /// IANA name of the zone in which a time without a zone is read: `Europe/Berlin`. Default: the machine's own.
    pub zone: String,
}

impl Default for Time {
    fn default() -> Self {
        Self { zone: SYSTEM_ZONE.to_owned() }
    }
}

/// The name that stands for the zone of the machine.
const SYSTEM_ZONE: &str = "system";

impl Settings {
    /// True if some rule may end sessions: the role needs `pg_signal_backend` for that.
    pub fn ends_sessions(&self) -> bool {
        let terminates = |breaker| breaker == detect::rule::Breaker::Terminate;
        let by_exception = self.detect.adjust.iter().filter_map(|adjust| adjust.breaker).any(terminates);
        self.breaker.per_hour > 0 && (terminates(self.detect.breaker) || by_exception)
    }

    /// What a logical source does not have.
    fn check_source(&self) -> Result<(), String> {
        if self.source == Source::Logical && self.archive.durability != archiver::Durability::Repository {
            let problem = "archive.durability = \"spool\" needs source = \"physical\": changes that come by logical \
                           replication are told to be safe when they are in the repository";
            return Err(problem.to_owned());
        }
        Ok(())
    }

    /// Reads a settings file.
    ///
    /// # Errors
    /// If it cannot be read, is not TOML, or says something that does not exist or cannot be.
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let text =
            fs::read_to_string(path).map_err(|source| SettingsError::Unreadable { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|problem| SettingsError::Invalid { path: path.to_owned(), problem })
    }

    /// Reads the text of a settings file. The error names line and column.
    ///
    /// # Errors
    /// As [`Settings::read`].
    pub fn parse(text: &str) -> Result<Self, String> {
        // What the crate that reads sizes expects says nothing to people.
        let told = |error: toml::de::Error| error.to_string().replace("parsable string", "a size such as \"64 MiB\"");
        let settings: Self = toml::from_str(text).map_err(|error| told(error).trim_end().to_owned())?;
        settings.time.zone()?;
        settings.logical.check()?;
        settings.check_source()?;
        settings.archive.check()?;
        settings.backup.check()?;
        settings.detect.check()?;
        settings.who.check()?;
        settings.guard.check()?;
        settings.flashback.check()?;
        settings.protection.check()?;
        settings.drill.check()?;
        settings.restore.check()?;
        notify::config::check(&settings.notify)?;
        // A timeout of nothing would end every connection before it begins.
        let postgres = &settings.postgres;
        for (name, value) in
            [("connect_timeout", postgres.connect_timeout), ("receive_timeout", postgres.receive_timeout)]
        {
            if value < Duration::from_secs(1) {
                return Err(format!("postgres.{name} = {value:?} is less than a second"));
            }
        }
        Ok(settings)
    }
}

/// A settings file that explains every setting and shows its default. What has no default (cluster, server, repository)
/// and the spool's directory, which the command line can name too, are filled in from `settings`.
pub fn template(settings: &Settings) -> String {
    let default = Settings::default();
    let chosen = [
        ("cluster", &settings.cluster, &default.cluster),
        ("conninfo", &settings.postgres.conninfo, &default.postgres.conninfo),
        ("url", &settings.repository.url, &default.repository.url),
    ];
    let spool = (settings.spool.dir != default.spool.dir).then(|| settings.spool.dir.display().to_string());
    let chosen = chosen.into_iter().filter(|(_, value, default)| value != default).map(|(key, value, _)| (key, value));
    let source = (settings.source == Source::Logical).then(|| "logical".to_owned());
    let chosen = chosen.chain(source.iter().map(|source| ("source", source)));
    let chosen: Vec<_> = chosen.chain(spool.iter().map(|dir| ("dir", dir))).collect();
    let mut text = String::new();
    for line in include_str!("settings/template.toml").lines() {
        let filled = line
            .strip_prefix('#')
            .and_then(|rest| rest.split_once(" = "))
            .and_then(|(key, _)| chosen.iter().find(|(name, _)| *name == key));
        match filled {
            Some((key, value)) => text += &format!("{key} = {}\n", toml::Value::from(value.as_str())),
            None => text += &format!("{line}\n"),
        }
    }
    text
}

impl Time {
    /// The zone.
    ///
    /// # Errors
    /// If there is no zone of that name; the text says so.
    pub fn zone(&self) -> Result<TimeZone, String> {
        if self.zone == SYSTEM_ZONE {
            return Ok(TimeZone::system());
        }
        TimeZone::get(&self.zone).map_err(|_| {
            format!("time.zone = {:?} is no time zone; it takes an IANA name such as \"Europe/Berlin\"", self.zone)
        })
    }
}

/// Reads a span of time as people write it: `30 days`, `36h`, `1 week`. A day is 24 hours; months and years, which have no
/// fixed length, are refused.
///
/// # Errors
/// What is wrong with it.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    let refused = || format!("{text:?} is no span of time; it takes for example \"30 days\", \"36h\" or \"90s\"");
    let span: jiff::Span = text.trim().parse().map_err(|_| refused())?;
    let duration = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|_| refused())?;
    Duration::try_from(duration).map_err(|_| refused())
}

/// The settings file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file is not there or may not be read.
    #[error("read settings file {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file says something wrong.
    #[error("settings file {}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        problem: String,
    },
}

impl SettingsError {
    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unreadable { path, source } if source.kind() == io::ErrorKind::NotFound => Some(format!(
                "write one with: walguard init --config {} --pg ... --repo ... --cluster ...",
                path.display()
            )),
            Self::Unreadable { path, .. } => Some(format!("let the user that runs walguard read {}", path.display())),
            Self::Invalid { .. } => Some("every setting, explained: walguard init --print-settings".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_setting_is_refused_by_name() {
        let problem = Settings::parse("[time]\nzoen = \"UTC\"\n").unwrap_err();
        assert!(problem.contains("zoen") && problem.contains("line 2"), "{problem}");
    }

    #[test]
    fn a_zone_that_does_not_exist_is_refused_by_name() {
        let problem = Settings::parse("[time]\nzone = \"Europe/Berlim\"\n").unwrap_err();
        assert!(problem.contains("Europe/Berlim"), "{problem}");
    }

    #[test]
    fn a_number_out_of_its_range_is_refused_by_name() {
        for (text, name) in [
            ("[archive]\ncompression_level = 20", "archive.compression_level"),
            ("[archive]\nuploads_max = 0", "archive.uploads_max"),
            ("[archive]\ntail_interval = \"0s\"", "archive.tail_interval"),
            ("[detect]\nrows_deleted_percent_min = 0", "detect.rows_deleted_percent_min"),
            ("[backup]\npart_size = \"1 KiB\"", "backup.part_size"),
            ("[who]\ninterval = \"1ms\"", "who.interval"),
            ("[guard]\ntables = [\"\"]", "guard.tables"),
            ("[flashback]\nwindow = \"5m\"", "flashback.window"),
            ("[protection]\ninterval = \"0s\"", "protection.interval"),
            ("[drill]\nevery = \"1s\"", "drill.every"),
            ("[drill]\nscratch_dir = \"here\"", "drill.scratch_dir"),
            ("[[drill.checks]]\nsql = \"SELECT true\"", "drill.checks"),
            ("[restore]\ntarget_dir = \"restored\"", "restore.target_dir"),
            ("[postgres]\nreceive_timeout = \"0s\"", "postgres.receive_timeout"),
            ("[logical]\npublication = \"\"", "logical.publication"),
            ("[logical]\ndatabases = [\"a\", \"\"]", "logical.databases"),
            ("[logical]\ndatabases = [\"a\", \"a\"]", "logical.databases"),
            ("source = \"logical\"\n[archive]\ndurability = \"spool\"", "archive.durability"),
        ] {
            let problem = Settings::parse(text).unwrap_err();
            assert!(problem.starts_with(name), "{problem}");
        }
    }

    #[test]
    fn an_empty_file_is_all_defaults() {
        assert_eq!(Settings::parse("").unwrap().time.zone, "system");
    }

    /// The template with every setting's `#` removed.
    fn all_settings_of_the_template() -> String {
        let lines = template(&Settings::default());
        let is_setting = |line: &str| {
            let name = line.strip_prefix('#').and_then(|rest| rest.split_once(" = "));
            name.is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'))
        };
        lines.lines().map(|line| if is_setting(line) { &line[1..] } else { line }).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_template_as_it_is_sets_nothing() {
        assert_eq!(Settings::parse(&template(&Settings::default())).unwrap(), Settings::default());
    }

    #[test]
    fn the_template_shows_the_defaults() {
        let shown: toml::Table = all_settings_of_the_template().parse().unwrap();
        Settings::parse(&all_settings_of_the_template()).unwrap();
        let default = toml::Table::try_from(Settings::default()).unwrap();
        compare("", &shown, &default);

        fn compare(path: &str, shown: &toml::Table, default: &toml::Table) {
            for (key, value) in default {
                let path = format!("{path}{key}");
                match (shown.get(key), value) {
                    (Some(toml::Value::Table(shown)), toml::Value::Table(default)) => {
                        compare(&format!("{path}."), shown, default);
                    }
                    // What has no default is shown with an example.
                    (Some(_), toml::Value::String(none)) if none.is_empty() => {}
                    (Some(shown), default) => assert_eq!(same(shown), same(default), "{path}"),
                    (None, _) => panic!("the template does not explain {path}"),
                }
            }
        }

        /// Sizes and durations have several spellings.
        fn same(value: &toml::Value) -> String {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let size = text.parse::<bytesize::ByteSize>().map(|size| size.to_string());
            size.ok().or_else(|| parse_span(&text).map(|span| format!("{span:?}")).ok()).unwrap_or(text)
        }
    }

    #[test]
    fn the_template_explains_settings_without_a_default_too() {
        // The error about an unknown setting names all that are known.
        let tables = [
            "",
            "[retention]",
            "[postgres]",
            "[logical]",
            "[repository]",
            "[repository.s3]",
            "[spool]",
            "[archive]",
            "[backup]",
            "[detect]",
            "[who]",
            "[guard]",
            "[protection]",
            "[flashback]",
            "[breaker]",
            "[drill]",
            "[restore]",
            "[http]",
            "[time]",
        ];
        for table in tables {
            let problem = Settings::parse(&format!("{table}\nunknown = 1\n")).unwrap_err();
            let known = problem.split_once("expected").unwrap_or_else(|| panic!("{problem}")).1;
            for name in known.split('`').skip(1).step_by(2) {
                let explained = all_settings_of_the_template();
                let begin = explained.find(&format!("{table}\n")).unwrap();
                let part = &explained[begin + table.len()..];
                let end = if table.is_empty() { 0 } else { part.find("\n[").unwrap_or(part.len()) };
                let found = match table {
                    "" => explained.contains(&format!("[{name}]")) || explained.contains(&format!("\n{name} = ")),
                    "[detect]" if name == "adjust" => explained.contains("[[detect.adjust]]"),
                    "[drill]" if name == "checks" => explained.contains("[[drill.checks]]"),
                    "[repository]" if name == "s3" => explained.contains("[repository.s3]"),
                    _ => part[..end].contains(&format!("\n{name} = ")),
                };
                assert!(found, "the template does not explain {table} {name}");
            }
        }
    }

    #[test]
    fn the_readme_names_settings_that_exist_with_their_defaults() {
        let readme = include_str!("../README.md");
        let table = readme.split("| Setting |").nth(1).unwrap().lines().skip(2);
        let all: toml::Table = all_settings_of_the_template().parse().unwrap();
        let defaults = toml::Table::try_from(Settings::default()).unwrap();
        let at = |table: &toml::Table, path: &str| {
            path.split('.').try_fold(toml::Value::Table(table.clone()), |value, key| value.get(key).cloned())
        };
        for row in table.take_while(|row| row.starts_with('|')) {
            let columns: Vec<_> = row.split('|').map(str::trim).collect();
            for name in columns[1].split('`').skip(1).step_by(2) {
                assert!(at(&all, name).is_some(), "there is no setting {name}");
                if let Some(shown) = columns[2].strip_prefix('`') {
                    let default = at(&defaults, name).or_else(|| at(&all, name)).unwrap();
                    let default = default.as_str().map_or_else(|| default.to_string(), str::to_owned);
                    let shown = shown.trim_end_matches('`');
                    let same = shown == default
                        || parse_span(shown).is_ok_and(|span| parse_span(&default) == Ok(span))
                        || shown.parse::<bytesize::ByteSize>().is_ok_and(|size| Ok(size) == default.parse());
                    assert!(same, "{name} is {default} by default, not {shown}");
                }
            }
        }
    }

    #[test]
    fn the_channels_that_the_template_shows_can_be_used_as_they_are() {
        let template = template(&Settings::default());
        // They are indented, because each is one of several and no default.
        let shown = template.lines().filter_map(|line| line.strip_prefix("#  "));
        let shown: Vec<_> = shown.filter(|line| !line.starts_with(' ')).collect();
        let settings = Settings::parse(&shown.join("\n")).unwrap();
        let mut kinds: Vec<_> = settings.notify.values().map(|channel| channel.kind.name()).collect();
        kinds.sort_unstable();
        let every = ["alertmanager", "command", "discord", "email", "pagerduty", "slack", "teams", "webhook"];
        assert_eq!(kinds, every);
    }

    #[test]
    fn the_template_holds_what_was_chosen() {
        let mut settings = Settings { cluster: "main".into(), ..Settings::default() };
        settings.postgres.conninfo = "host=/run/postgresql user='wal \\'guard'".into();
        settings.repository.url = "file:///srv/\"wal\"".into();
        settings.spool.dir = "/srv/spool".into();
        settings.source = Source::Logical;
        assert_eq!(Settings::parse(&template(&settings)).unwrap(), settings);
    }

    #[test]
    fn a_span_is_read_as_people_write_it() {
        assert_eq!(parse_span("30 days"), Ok(Duration::from_secs(30 * 86_400)));
        assert_eq!(parse_span("1 week"), Ok(Duration::from_secs(7 * 86_400)));
        assert_eq!(parse_span("36h"), Ok(Duration::from_secs(36 * 3_600)));
        assert_eq!(parse_span("250ms"), Ok(Duration::from_millis(250)));
        for text in ["", "1", "1 month", "-1 day", "soon"] {
            assert!(parse_span(text).is_err(), "{text}");
        }
    }
}
