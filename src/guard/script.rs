//! What the guard is, as SQL: text to look at before it is run. Pure.

use std::fmt::Write as _;

/// What the guard watches in a database: the `[guard]` table of the settings. Nothing of it is there before
/// `walguard guard install`, or whoever ran what `walguard guard sql` prints, put it there.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Tables that get triggers: patterns over `schema.table` in which `*` stands for anything and `?` for one character.
    pub tables: Vec<String>,
    /// Tables that get none though they match.
    pub exclude: Vec<String>,
    /// Tell of `UPDATE` too.
    pub updates: bool,
    /// Count the rows of each statement; the rows are kept until its end for that.
    pub row_counts: bool,
    /// Tell of changed and dropped definitions; only a superuser can install that.
    pub definitions: bool,
    /// Refuse `TRUNCATE`, `DROP TABLE` and a `DELETE` of all rows unless the session gave a reason.
    pub protect: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tables: vec!["*".to_owned()],
            exclude: Vec::new(),
            updates: false,
            row_counts: true,
            definitions: true,
            protect: false,
        }
    }
}

/// The schema and the role of the guard.
pub const SCHEMA: &str = "walguard_guard";

const FUNCTIONS: &str = include_str!("sql/functions.sql");
const TRIGGERS: &str = include_str!("sql/triggers.sql");
const EVENTS: &str = include_str!("sql/events.sql");
const UNINSTALL: &str = include_str!("sql/uninstall.sql");

/// What a statement trigger is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Trigger {
    name: &'static str,
    event: &'static str,
    /// Its clause for the rows that went.
    rows: &'static str,
    function: &'static str,
    /// `pg_trigger.tgtype`: 2 before, 8 delete, 16 update, 32 truncate.
    kind: u8,
}

const GONE: &str = "REFERENCING OLD TABLE AS gone";

impl Config {
    /// Whether the patterns can be.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(&self) -> Result<(), String> {
        for (name, patterns) in [("tables", &self.tables), ("exclude", &self.exclude)] {
            if let Some(bad) = patterns.iter().find(|pattern| pattern.is_empty() || pattern.contains(['\0', '\n'])) {
                return Err(format!("guard.{name}: {bad:?} is no pattern; it takes for example \"public.*\""));
            }
        }
        Ok(())
    }

    fn triggers(&self) -> Vec<Trigger> {
        let told = |name, event, kind| match self.row_counts {
            true => Trigger { name, event, rows: GONE, function: "rows_counted", kind },
            false => Trigger { name, event, rows: "", function: "rows_told", kind },
        };
        let mut triggers = vec![
            told("walguard_delete", "AFTER DELETE", 8),
            Trigger { name: "walguard_truncate", event: "AFTER TRUNCATE", rows: "", function: "rows_told", kind: 32 },
        ];
        if self.updates {
            triggers.push(told("walguard_update", "AFTER UPDATE", 16));
        }
        if self.protect {
            let (rows, table) = ("walguard_keep_rows", "walguard_keep_table");
            triggers.push(Trigger {
                name: rows,
                event: "AFTER DELETE",
                rows: GONE,
                function: "refuse_delete",
                kind: 8,
            });
            let event = "BEFORE TRUNCATE";
            triggers.push(Trigger { name: table, event, rows: "", function: "refuse_truncate", kind: 34 });
        }
        triggers
    }

    /// Name, event and function of the event triggers.
    fn event_triggers(&self) -> Vec<[&'static str; 3]> {
        let mut events = Vec::new();
        if self.definitions {
            events.push(["walguard_ddl", "ddl_command_end", "definitions_changed"]);
            events.push(["walguard_drop", "sql_drop", "objects_dropped"]);
        }
        if self.definitions && self.protect {
            events.push(["walguard_keep", "sql_drop", "refuse_drop"]);
            events.push(["walguard_keep_on", "ddl_command_end", "refuse_disable"]);
        }
        events
    }

    /// A condition on `c` of `pg_class` and `n` of `pg_namespace`.
    fn chosen(&self) -> String {
        format!(
            "(c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' \
             AND n.nspname NOT IN ('information_schema', '{SCHEMA}') \
             AND n.nspname || '.' || c.relname ~ {} AND NOT n.nspname || '.' || c.relname ~ {})",
            literal(&regex(&self.tables)),
            literal(&regex(&self.exclude))
        )
    }

    fn fill(&self, text: &str) -> String {
        let triggers = self.triggers();
        let triggers = triggers.iter().map(|trigger| {
            let Trigger { name, event, rows, function, kind } = trigger;
            format!("('{name}', '{event}', '{rows}', '{function}', {kind})")
        });
        let events = self.event_triggers();
        let events: Vec<_> =
            events.iter().map(|[name, event, function]| format!("('{name}', '{event}', '{function}')")).collect();
        let events = if events.is_empty() { "(NULL, NULL, NULL)".to_owned() } else { events.join(", ") };
        text.replace("@CHOSEN@", &self.chosen())
            .replace("@WANTED@", &triggers.collect::<Vec<_>>().join(", "))
            .replace("@EVENTS@", &events)
            .replace("@PROTECT@", if self.protect { "true" } else { "false" })
            .replace("@INCLUDE@", &literal(&regex(&self.tables)))
            .replace("@EXCLUDE@", &literal(&regex(&self.exclude)))
    }

    /// The SQL that puts the guard into a database, in one transaction. It can be repeated: what is as it should be stays,
    /// tables made since then get their triggers, and what is no longer asked for goes.
    pub fn install(&self) -> String {
        let mut text = String::from(
            "-- The guard of walguard for one database, in one transaction. Run it as a superuser, or, without\n\
             -- guard.definitions, as the owner of the tables with CREATEROLE.\n\
             BEGIN;\nSET LOCAL client_min_messages = warning;\n",
        );
        let _ = write!(text, "{}\n{}\n{}", self.fill(FUNCTIONS), self.fill(TRIGGERS), self.fill(EVENTS));
        text + "COMMIT;\n"
    }

    /// The SQL that takes the guard out of a database.
    pub fn uninstall() -> String {
        format!("BEGIN;\nSET LOCAL client_min_messages = warning;\n{UNINSTALL}COMMIT;\n")
    }

    /// A query with a row for each trigger, function, event trigger and role that should be there: columns `kind`, `name`,
    /// and `problem`, which is NULL where all is well.
    pub(super) fn difference(&self) -> String {
        let functions = self.functions();
        let functions: Vec<_> =
            functions.iter().map(|(name, body)| format!("({}, {})", literal(name), literal(body))).collect();
        self.fill(&format!(
            "WITH f AS (SELECT p.oid, p.proname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
               WHERE n.nspname = '{SCHEMA}') \
             SELECT 'trigger' AS kind, format('%s on %I.%I', w.name, n.nspname, c.relname) AS name, \
               CASE WHEN t.oid IS NULL THEN 'is not there' \
                    WHEN t.tgenabled = 'D' THEN 'is disabled' \
                    WHEN t.tgenabled <> 'A' THEN 'does not fire for replicated changes' \
                    WHEN f.proname IS DISTINCT FROM w.function OR t.tgtype <> w.type \
                      OR (t.tgoldtable IS NOT NULL) <> (w.rows <> '') THEN 'is another one' END AS problem \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
               CROSS JOIN (VALUES @WANTED@) AS w (name, event, rows, function, type) \
               LEFT JOIN pg_trigger t ON t.tgrelid = c.oid AND t.tgname = w.name \
               LEFT JOIN f ON f.oid = t.tgfoid WHERE @CHOSEN@ \
             UNION ALL \
             SELECT 'function', '{SCHEMA}.' || w.name, \
               CASE WHEN p.oid IS NULL THEN 'is not there' \
                    WHEN p.prosrc <> w.body THEN 'has another text' \
                    WHEN NOT p.prosecdef OR p.proconfig IS DISTINCT FROM ARRAY['search_path=pg_catalog, pg_temp'] \
                      THEN 'has other options' \
                    WHEN p.proowner::regrole::text <> '{SCHEMA}' THEN 'belongs to ' || p.proowner::regrole END \
             FROM (VALUES {}) AS w (name, body) \
               LEFT JOIN (pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace AND n.nspname = '{SCHEMA}') ON p.proname = w.name \
             UNION ALL \
             SELECT 'event trigger', w.name, \
               CASE WHEN e.oid IS NULL THEN 'is not there' \
                    WHEN e.evtenabled = 'D' THEN 'is disabled' \
                    WHEN e.evtenabled <> 'A' THEN 'does not fire for replicated changes' \
                    WHEN e.evtevent <> w.event OR f.proname IS DISTINCT FROM w.function THEN 'is another one' END \
             FROM (VALUES @EVENTS@) AS w (name, event, function) LEFT JOIN pg_event_trigger e ON e.evtname = w.name \
               LEFT JOIN f ON f.oid = e.evtfoid \
             WHERE w.name IS NOT NULL \
             UNION ALL \
             SELECT 'role', '{SCHEMA}', \
               CASE WHEN r.oid IS NULL THEN 'is not there' WHEN r.rolcanlogin THEN 'may log in' \
                    WHEN r.rolsuper THEN 'is a superuser' END \
             FROM (VALUES (1)) AS one LEFT JOIN pg_roles r ON r.rolname = '{SCHEMA}'",
            functions.join(", ")
        ))
    }

    /// Names and texts of the functions, as `pg_proc` has them.
    fn functions(&self) -> Vec<(String, String)> {
        let text = self.fill(FUNCTIONS);
        let mut functions = Vec::new();
        for part in text.split("CREATE OR REPLACE FUNCTION walguard_guard.").skip(1) {
            let Some((name, rest)) = part.split_once('(') else { continue };
            if let Some(body) = rest.split("$walguard$").nth(1) {
                functions.push((name.to_owned(), body.to_owned()));
            }
        }
        functions
    }
}

/// A regular expression of the server for any of these patterns. No pattern matches nothing.
fn regex(patterns: &[String]) -> String {
    let mut text = String::from("^(");
    for (place, pattern) in patterns.iter().enumerate() {
        if place > 0 {
            text.push('|');
        }
        // One without a schema is for all of them.
        if !pattern.contains('.') {
            text += ".*\\.";
        }
        for c in pattern.chars() {
            match c {
                '*' => text += ".*",
                '?' => text.push('.'),
                c if c.is_alphanumeric() || c == '_' => text.push(c),
                c => {
                    text.push('\\');
                    text.push(c);
                }
            }
        }
    }
    text + ")$"
}

/// A text as a literal, whatever `standard_conforming_strings` says.
fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') { format!("E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_stands_for_whole_names_and_is_no_regular_expression() {
        assert_eq!(regex(&["public.*".to_owned(), "a+b.c?".to_owned()]), "^(public\\..*|a\\+b\\.c.)$");
        assert_eq!(regex(&["users".to_owned()]), "^(.*\\.users)$");
        assert_eq!(regex(&[]), "^()$");
    }

    #[test]
    fn a_pattern_cannot_break_out_of_its_quotes() {
        let config = Config { tables: vec!["x'; DROP TABLE users; --\\".to_owned()], ..Config::default() };
        let text = config.install();
        assert!(!text.contains("x'; DROP"), "{text}");
        assert_eq!(literal("a'b\\c"), "E'a''b\\\\c'");
        assert!(Config { tables: vec![String::new()], ..Config::default() }.check().is_err());
    }

    #[test]
    fn every_placeholder_is_filled() {
        for config in
            [Config::default(), Config { protect: true, updates: true, definitions: false, ..Config::default() }]
        {
            for text in [config.install(), config.difference(), Config::uninstall()] {
                let left = text.split('@').nth(1);
                assert_eq!(left, None);
            }
            assert_eq!(config.functions().len(), 9);
        }
    }

    #[test]
    fn protection_comes_only_when_asked_for() {
        let plain = Config::default().install();
        assert!(!plain.contains("'walguard_keep_rows'") && !plain.contains("'walguard_keep'"));
        let protected = Config { protect: true, ..Config::default() }.install();
        assert!(protected.contains("'walguard_keep_rows'") && protected.contains("'walguard_keep'"));
    }
}
