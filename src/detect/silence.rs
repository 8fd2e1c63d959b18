//! Silences: what nobody wants to hear of for a while, and why.

use jiff::Timestamp;

use super::incident::SilencedBy;
use super::pattern::{Pattern, matches_glob};
use super::{Relation, RuleName, Who};

/// A silence. It holds for a while, never for ever; a whole database wiped is told all the same.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Silence {
    /// Its name.
    pub id: String,
    /// From when on it holds.
    pub from: Timestamp,
    /// Until when.
    pub until: Timestamp,
    /// Why.
    pub reason: String,
    /// Who asked for it.
    pub by: String,
    /// Which rules; all if none is named.
    #[serde(default)]
    pub rules: Vec<RuleName>,
    /// Which tables; all if none is named.
    #[serde(default)]
    pub tables: Vec<Pattern>,
    /// Whose doing, by role, with `*` and `?`; anybody's if none is named. Who is unknown is none of them.
    #[serde(default)]
    pub roles: Vec<String>,
    /// Whose doing, by `application_name`, likewise.
    #[serde(default)]
    pub applications: Vec<String>,
    /// When somebody ended it before its time.
    #[serde(default)]
    pub lifted_at: Option<Timestamp>,
}

impl Silence {
    /// Whether it holds at a time.
    pub fn holds(&self, at: Timestamp) -> bool {
        (self.from..self.until).contains(&at) && self.lifted_at.is_none_or(|lifted| at < lifted)
    }

    /// Whether it is about a finding. What is about no table is meant only by a silence that names no table.
    pub fn covers(&self, rule: RuleName, table: Option<&Relation>, who: &Who, at: Timestamp) -> bool {
        let named = |globs: &[String], name: Option<&String>| {
            globs.is_empty() || name.is_some_and(|name| globs.iter().any(|glob| matches_glob(glob, name)))
        };
        self.holds(at)
            && (self.rules.is_empty() || self.rules.contains(&rule))
            && (self.tables.is_empty() || table.is_some_and(|table| self.tables.iter().any(|p| p.matches(table))))
            && named(&self.roles, who.actor.role.as_ref())
            && named(&self.applications, who.actor.application.as_ref())
    }

    /// How an incident names it.
    pub fn name(&self) -> SilencedBy {
        SilencedBy { id: self.id.clone(), reason: self.reason.clone(), until: self.until }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::super::testing;
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn silence() -> Silence {
        Silence {
            id: "s".into(),
            from: at(100),
            until: at(200),
            reason: "deploy".into(),
            by: "ada".into(),
            rules: Vec::new(),
            tables: Vec::new(),
            roles: Vec::new(),
            applications: Vec::new(),
            lifted_at: None,
        }
    }

    #[test]
    fn a_silence_holds_for_its_time_and_until_it_is_lifted() {
        let silence = silence();
        assert!(!silence.holds(at(99)) && silence.holds(at(100)) && silence.holds(at(199)) && !silence.holds(at(200)));
        let lifted = Silence { lifted_at: Some(at(150)), ..silence };
        assert!(lifted.holds(at(149)) && !lifted.holds(at(150)));
    }

    #[test]
    fn a_silence_is_about_what_it_names_only() {
        let orders = testing::relation("public", "orders", 1);
        let mut who = Who::default();
        let covers = |silence: &Silence, who: &Who| silence.covers(RuleName::Truncate, Some(&orders), who, at(100));
        assert!(covers(&silence(), &who));
        let of = |tables: &str| Silence { tables: vec![tables.parse().unwrap()], ..silence() };
        assert!(covers(&of("orders"), &who) && !covers(&of("jobs"), &who));
        assert!(!of("*").covers(RuleName::BackupSize, None, &who, at(100)), "a backup is no table");
        assert!(!covers(&Silence { rules: vec![RuleName::RowsDeleted], ..silence() }, &who));
        let deployer = Silence { roles: vec!["deploy*".into()], ..silence() };
        assert!(!covers(&deployer, &who), "nobody knows who it was");
        who.actor.role = Some("deployer".into());
        assert!(covers(&deployer, &who));
    }
}
