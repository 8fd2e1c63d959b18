//! The rules: what each is called, from when on it speaks, how bad it finds what it sees, and the exceptions.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{Timestamp, civil};

use super::pattern::{Pattern, matches_glob};
use super::{Relation, Severity, Who};

/// A rule by its name, which never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuleName {
    /// Many rows of a table were deleted, in one transaction or within some minutes.
    RowsDeleted,
    /// A table has no rows left.
    TableEmptied,
    /// Several tables have no rows left.
    TablesEmptied,
    /// A table was truncated.
    Truncate,
    /// A table was dropped.
    DropTable,
    /// A schema was dropped.
    DropSchema,
    /// A database was dropped.
    DropDatabase,
    /// A column was dropped.
    DropColumn,
    /// Another table took a table's name, and has fewer rows.
    TableReplaced,
    /// Many rows of a table were updated.
    MassUpdate,
    /// A trigger was dropped or disabled.
    TriggerRemoved,
    /// An event trigger was dropped or disabled.
    EventTriggerRemoved,
    /// A rewrite rule of a table was dropped or disabled.
    RuleRemoved,
    /// A row security policy was dropped.
    PolicyRemoved,
    /// The guard's own objects were dropped or disabled.
    GuardRemoved,
    /// The history of migrations was deleted from, truncated or dropped.
    MigrationHistory,
    /// A base backup is much larger or smaller than the one before.
    BackupSize,
    /// The archive stays behind the server.
    ArchiveLag,
    /// WAL is missing for good.
    Gap,
    /// The replication slot is in danger.
    Slot,
    /// WAL cannot be understood: it is archived, but nobody watches it.
    UnreadableWal,
    /// A drill failed, or none has proved for too long that a restore works.
    Drill,
}

impl RuleName {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::RowsDeleted,
        Self::TableEmptied,
        Self::TablesEmptied,
        Self::Truncate,
        Self::DropTable,
        Self::DropSchema,
        Self::DropDatabase,
        Self::DropColumn,
        Self::TableReplaced,
        Self::MassUpdate,
        Self::TriggerRemoved,
        Self::EventTriggerRemoved,
        Self::RuleRemoved,
        Self::PolicyRemoved,
        Self::GuardRemoved,
        Self::MigrationHistory,
        Self::BackupSize,
        Self::ArchiveLag,
        Self::Gap,
        Self::Slot,
        Self::UnreadableWal,
        Self::Drill,
    ];

    /// The name, `rows-deleted`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RowsDeleted => "rows-deleted",
            Self::TableEmptied => "table-emptied",
            Self::TablesEmptied => "tables-emptied",
            Self::Truncate => "truncate",
            Self::DropTable => "drop-table",
            Self::DropSchema => "drop-schema",
            Self::DropDatabase => "drop-database",
            Self::DropColumn => "drop-column",
            Self::TableReplaced => "table-replaced",
            Self::MassUpdate => "mass-update",
            Self::TriggerRemoved => "trigger-removed",
            Self::EventTriggerRemoved => "event-trigger-removed",
            Self::RuleRemoved => "rule-removed",
            Self::PolicyRemoved => "policy-removed",
            Self::GuardRemoved => "guard-removed",
            Self::MigrationHistory => "migration-history",
            Self::BackupSize => "backup-size",
            Self::ArchiveLag => "archive-lag",
            Self::Gap => "gap",
            Self::Slot => "slot",
            Self::UnreadableWal => "unreadable-wal",
            Self::Drill => "drill",
        }
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// There is no such rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no rule `{0}`; the rules are {all}", all = RuleName::ALL.map(RuleName::as_str).join(", "))]
pub struct UnknownRule(pub String);

impl FromStr for RuleName {
    type Err = UnknownRule;

    fn from_str(text: &str) -> Result<Self, UnknownRule> {
        Self::ALL.into_iter().find(|rule| rule.as_str() == text).ok_or_else(|| UnknownRule(text.to_owned()))
    }
}

/// What can be set of the watch for damage.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Watch the WAL for damage.
    pub enabled: bool,
    /// Rows that go in several transactions are summed over this span.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub window: Duration,
    /// Findings of one session or on related tables within this span are one incident.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub group_within: Duration,
    /// `rows-deleted` speaks from so many rows on, if they are also this share of the table:
    pub rows_deleted_min: u64,
    /// In percent.
    pub rows_deleted_percent_min: u32,
    /// `table-emptied` speaks from so many rows on.
    pub table_emptied_rows_min: u64,
    /// `tables-emptied` speaks from so many tables on, each with a row or more.
    pub tables_emptied_min: u32,
    /// `mass-update` speaks from so many rows in one transaction on, if they are also this share of the table:
    pub rows_updated_min: u64,
    /// In percent.
    pub rows_updated_percent_min: u32,
    /// `backup-size` speaks if a backup differs from the one before by more than so many percent.
    pub backup_size_percent_max: u32,
    /// `archive-lag` speaks if WAL waits longer than this for the repository.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub archive_lag_max: Duration,
    /// Tables in which a migration tool writes what it did.
    pub migration_tables: Vec<Pattern>,
    /// Tables that no rule looks at.
    pub exclude: Vec<Pattern>,
    /// Learn for each table how much is normally deleted at which hour of the week, and do not speak of that.
    pub learn: bool,
    /// What is done to the session of a transaction that is still open when a rule speaks of it.
    pub breaker: Breaker,
    /// Exceptions; each one that matches is applied, later ones over earlier ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub adjust: Vec<Adjust>,
}

/// What is done to the session of a suspicious transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Breaker {
    /// Nothing.
    #[default]
    Off,
    /// Its backend is terminated, so that it cannot commit.
    Terminate,
}

/// An exception from the rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Adjust {
    /// Which rules; all if none is named.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<RuleName>,
    /// For which tables; all, and what concerns no table, if none is named.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<Pattern>,
    /// And not for these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub except: Vec<Pattern>,
    /// For which roles, with `*` and `?`; one that nobody knows is none of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<String>,
    /// For which `application_name`s, likewise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub applications: Vec<String>,
    /// At which time of day, in the zone of the settings: `22:00-06:00`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub between: Option<Between>,
    /// On which days; of a time past midnight that on which it began.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub days: Vec<Day>,
    /// How bad it is instead; `off` to say nothing at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub severity: Option<Level>,
    /// The rule's least number of rows instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows_min: Option<u64>,
    /// The rule's least share of the table instead, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent_min: Option<u32>,
    /// What is done to the session instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub breaker: Option<Breaker>,
    /// Why, for whoever reads the settings.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// A severity, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Nothing is said.
    Off,
    /// For the record.
    Info,
    /// Somebody should look.
    Warning,
    /// Somebody must look now.
    Critical,
}

/// A day of the week.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "they are the days of the week")]
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

/// A part of the day, written `22:00-06:00`: from the first time up to and without the second, past midnight if that is
/// earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Between {
    from: civil::Time,
    to: civil::Time,
}

impl FromStr for Between {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("`{text}` is no part of the day; one looks like \"22:00-06:00\"");
        let (from, to) = text.split_once('-').ok_or_else(refused)?;
        let time = |text: &str| text.trim().parse::<civil::Time>().map_err(|_| refused());
        let (from, to) = (time(from)?, time(to)?);
        if from == to { Err(refused()) } else { Ok(Self { from, to }) }
    }
}

impl serde::Serialize for Between {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}-{}", self.from, self.to))
    }
}

impl<'de> serde::Deserialize<'de> for Between {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The tables in which migration tools write what they did: Supabase, Rails and others, Alembic, Flyway, Prisma, Django,
/// Liquibase, Entity Framework, goose, Knex, Sequelize, TypeORM, Drizzle, Diesel, sqlx.
const MIGRATION_TABLES: [&str; 16] = [
    "supabase_migrations.schema_migrations",
    "schema_migrations",
    "alembic_version",
    "flyway_schema_history",
    "_prisma_migrations",
    "django_migrations",
    "databasechangelog",
    "__EFMigrationsHistory",
    "goose_db_version",
    "knex_migrations",
    "SequelizeMeta",
    "typeorm_migrations",
    "__drizzle_migrations",
    "__diesel_schema_migrations",
    "_sqlx_migrations",
    "pgmigrations",
];

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: true,
            window: Duration::from_secs(300),
            group_within: Duration::from_secs(60),
            rows_deleted_min: 100,
            rows_deleted_percent_min: 10,
            table_emptied_rows_min: 5,
            tables_emptied_min: 3,
            rows_updated_min: 100,
            rows_updated_percent_min: 50,
            backup_size_percent_max: 50,
            archive_lag_max: Duration::from_secs(300),
            migration_tables: MIGRATION_TABLES.iter().filter_map(|text| text.parse().ok()).collect(),
            exclude: Vec::new(),
            learn: true,
            breaker: Breaker::Off,
            adjust: Vec::new(),
        }
    }
}

/// What the settings say of one rule in one case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// How bad it is.
    pub severity: Severity,
    /// What is done to the session.
    pub breaker: Breaker,
}

/// Thresholds of a rule for one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    /// Rows.
    pub rows_min: u64,
    /// Share of the table, in percent.
    pub percent_min: u32,
}

/// What a rule is asked about.
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    /// The rule.
    pub rule: RuleName,
    /// The table, if it is about one.
    pub table: Option<&'a Relation>,
    /// Who did it, as far as that is known.
    pub who: &'a Who,
    /// When.
    pub at: Timestamp,
    /// The zone of the settings.
    pub zone: &'a TimeZone,
}

impl Config {
    /// Checks what cannot be told from the types.
    ///
    /// # Errors
    /// What is wrong, with the setting's name.
    pub fn check(&self) -> Result<(), String> {
        let spans = [("window", self.window, 3_600), ("group_within", self.group_within, 3_600)];
        for (name, span, most) in spans {
            if !(Duration::from_secs(1)..=Duration::from_secs(most)).contains(&span) {
                return Err(format!("detect.{name} = {span:?} is not from 1 s to 1 h"));
            }
        }
        let percents = [
            ("rows_deleted_percent_min", self.rows_deleted_percent_min),
            ("rows_updated_percent_min", self.rows_updated_percent_min),
        ];
        for (name, percent) in percents {
            if !(1..=100).contains(&percent) {
                return Err(format!("detect.{name} = {percent} is not from 1 to 100"));
            }
        }
        if self.adjust.len() > ADJUST_MAX {
            return Err(format!("detect.adjust has more than {ADJUST_MAX} entries"));
        }
        for (index, adjust) in self.adjust.iter().enumerate() {
            let Adjust { severity, rows_min, percent_min, breaker, .. } = adjust;
            if severity.is_none() && rows_min.is_none() && percent_min.is_none() && breaker.is_none() {
                return Err(format!("detect.adjust number {} changes nothing", index + 1));
            }
        }
        Ok(())
    }

    /// Whether a table is looked at.
    pub fn is_watched(&self, relation: &Relation) -> bool {
        !self.exclude.iter().any(|pattern| pattern.matches(relation))
    }

    /// Whether a migration tool writes in this table what it did.
    pub fn is_migration_history(&self, relation: &Relation) -> bool {
        self.migration_tables.iter().any(|pattern| pattern.matches(relation))
    }

    /// From when on a rule speaks in a case.
    pub fn thresholds(&self, case: &Case<'_>) -> Thresholds {
        let (rows_min, percent_min) = match case.rule {
            RuleName::TableEmptied => (self.table_emptied_rows_min, 100),
            RuleName::MassUpdate => (self.rows_updated_min, self.rows_updated_percent_min),
            _ => (self.rows_deleted_min, self.rows_deleted_percent_min),
        };
        self.matching(case).fold(Thresholds { rows_min, percent_min }, |before, adjust| Thresholds {
            rows_min: adjust.rows_min.unwrap_or(before.rows_min),
            percent_min: adjust.percent_min.unwrap_or(before.percent_min),
        })
    }

    /// How bad a case is that a rule by itself finds as bad as `severity`; `None` if nothing is to be said.
    pub fn judge(&self, case: &Case<'_>, severity: Severity) -> Option<Judgement> {
        let (mut level, mut breaker) = (Some(severity), self.breaker);
        for adjust in self.matching(case) {
            match adjust.severity {
                Some(Level::Off) => level = None,
                Some(Level::Info) => level = Some(Severity::Info),
                Some(Level::Warning) => level = Some(Severity::Warning),
                Some(Level::Critical) => level = Some(Severity::Critical),
                None => {}
            }
            breaker = adjust.breaker.unwrap_or(breaker);
        }
        level.map(|severity| Judgement { severity, breaker })
    }

    fn matching<'a>(&'a self, case: &'a Case<'a>) -> impl Iterator<Item = &'a Adjust> {
        self.adjust.iter().filter(|adjust| adjust.matches(case))
    }
}

/// Each is looked at for each finding.
const ADJUST_MAX: usize = 1_000;

impl Adjust {
    fn matches(&self, case: &Case<'_>) -> bool {
        let named = |globs: &[String], name: Option<&String>| {
            globs.is_empty() || name.is_some_and(|name| globs.iter().any(|glob| matches_glob(glob, name)))
        };
        let table = |patterns: &[Pattern]| {
            case.table.is_some_and(|table| patterns.iter().any(|pattern| pattern.matches(table)))
        };
        (self.rules.is_empty() || self.rules.contains(&case.rule))
            && (self.tables.is_empty() || table(&self.tables))
            && !table(&self.except)
            && named(&self.roles, case.who.actor.role.as_ref())
            && named(&self.applications, case.who.actor.application.as_ref())
            && self.is_now(case.at, case.zone)
    }

    fn is_now(&self, at: Timestamp, zone: &TimeZone) -> bool {
        let local = at.to_zoned(zone.clone()).datetime();
        let mut date = local.date();
        if let Some(Between { from, to }) = self.between {
            let time = local.time();
            let is_inside = if from < to { (from..to).contains(&time) } else { time >= from || time < to };
            if !is_inside {
                return false;
            }
            if from > to && time < to {
                date = date.yesterday().unwrap_or(date);
            }
        }
        let day = match date.weekday() {
            civil::Weekday::Monday => Day::Mon,
            civil::Weekday::Tuesday => Day::Tue,
            civil::Weekday::Wednesday => Day::Wed,
            civil::Weekday::Thursday => Day::Thu,
            civil::Weekday::Friday => Day::Fri,
            civil::Weekday::Saturday => Day::Sat,
            civil::Weekday::Sunday => Day::Sun,
        };
        self.days.is_empty() || self.days.contains(&day)
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn a_rule_has_one_name_everywhere() {
        for rule in RuleName::ALL {
            assert_eq!(serde_json::to_string(&rule).unwrap(), format!("\"{rule}\""));
            assert_eq!(rule.as_str().parse::<RuleName>().unwrap(), rule);
        }
        assert!("truncated".parse::<RuleName>().unwrap_err().to_string().contains("truncate"));
    }

    static UTC: TimeZone = TimeZone::UTC;

    fn table(schema: &str, name: &str) -> Relation {
        super::super::testing::relation(schema, name, 1)
    }

    fn case<'a>(rule: RuleName, table: &'a Relation, who: &'a Who, at: &str) -> Case<'a> {
        Case { rule, table: Some(table), who, at: at.parse().unwrap(), zone: &UTC }
    }

    #[test]
    fn a_routine_is_routine_only_for_its_tables_and_at_its_time() {
        let config: Config = toml::from_str(
            r#"
            [[adjust]]
            rules = ["drop-table"]
            tables = ["events_2*"]
            except = ["events_2_keep"]
            between = "23:00-02:00"
            days = ["mon"]
            severity = "off"
            "#,
        )
        .unwrap();
        config.check().unwrap();
        let who = Who::default();
        let judged = |name: &str, rule, at| {
            let table = table("public", name);
            config.judge(&case(rule, &table, &who, at), Severity::Critical).map(|judged| judged.severity)
        };
        // A Monday, and the night that begins on it.
        assert_eq!(judged("events_2025", RuleName::DropTable, "2025-12-15T23:30:00Z"), None);
        assert_eq!(judged("events_2025", RuleName::DropTable, "2025-12-16T01:30:00Z"), None);
        let spoken = Some(Severity::Critical);
        assert_eq!(judged("events_2025", RuleName::DropTable, "2025-12-15T01:30:00Z"), spoken);
        assert_eq!(judged("events_2025", RuleName::DropTable, "2025-12-16T02:00:00Z"), spoken);
        assert_eq!(judged("events_2025", RuleName::Truncate, "2025-12-15T23:30:00Z"), spoken);
        assert_eq!(judged("events_2_keep", RuleName::DropTable, "2025-12-15T23:30:00Z"), spoken);
        assert_eq!(judged("orders", RuleName::DropTable, "2025-12-15T23:30:00Z"), spoken);
    }

    #[test]
    fn a_later_exception_wins_over_an_earlier_one_and_unknown_people_match_no_role() {
        let config: Config = toml::from_str(
            r#"
            [[adjust]]
            roles = ["etl_*"]
            severity = "off"
            [[adjust]]
            tables = ["public.orders"]
            severity = "critical"
            rows_min = 7
            breaker = "terminate"
            "#,
        )
        .unwrap();
        let mut who = Who::default();
        let (orders, other) = (table("public", "orders"), table("public", "other"));
        let at = "2025-12-15T23:30:00Z";
        let judged = config.judge(&case(RuleName::Truncate, &other, &who, at), Severity::Warning).unwrap();
        assert_eq!(judged, Judgement { severity: Severity::Warning, breaker: Breaker::Off });
        who.actor.role = Some("etl_night".into());
        assert_eq!(config.judge(&case(RuleName::Truncate, &other, &who, at), Severity::Warning), None);
        let judged = config.judge(&case(RuleName::Truncate, &orders, &who, at), Severity::Warning).unwrap();
        assert_eq!(judged, Judgement { severity: Severity::Critical, breaker: Breaker::Terminate });
        assert_eq!(config.thresholds(&case(RuleName::RowsDeleted, &orders, &who, at)).rows_min, 7);
    }

    #[test]
    fn an_exception_that_cannot_be_is_refused() {
        for (text, part) in [
            ("[[adjust]]\nrules = [\"drop\"]\nseverity = \"off\"", "drop"),
            ("[[adjust]]\nbetween = \"22:00\"", "22:00"),
            ("[[adjust]]\ntables = [\"a.b.c.d\"]", "a.b.c.d"),
            ("[[adjust]]\nseverty = \"off\"", "severty"),
        ] {
            let error = toml::from_str::<Config>(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let idle: Config = toml::from_str("[[adjust]]\nrules = [\"truncate\"]").unwrap();
        assert_eq!(idle.check().unwrap_err(), "detect.adjust number 1 changes nothing");
    }
}
