//! Damage in, findings out: what each rule says of one transaction.

use std::sync::Arc;

use foldhash::{HashMap, HashSet};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::baseline::{Baseline, Deletion};
use super::damage::{Damage, Work};
use super::incident::{Rows, grouped};
use super::live_rows::{LiveRows, TableKey};
use super::rule::{Breaker, Case, Config, RuleName};
use super::window::WindowSum;
use super::{DdlEvent, DdlKind, Relation, Severity, Who};
use crate::pg::PgTime;

/// The schema of the guard's own objects.
const GUARD_SCHEMA: &str = "walguard_guard";

/// Of a table whose rows nobody knows so many times more must go before a rule speaks.
const UNKNOWN_FACTOR: u64 = 10;

/// A finding before it belongs to an incident.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub(super) rule: RuleName,
    pub(super) severity: Severity,
    pub(super) text: String,
    pub(super) relation: Option<Arc<Relation>>,
    /// What `before:<incident>` must stop before.
    pub(super) is_harm: bool,
    /// Rows or tables are lost.
    pub(super) is_loss: bool,
    /// Summed over the window: earlier transactions have a share in it.
    pub(super) window: Option<WindowSum>,
    pub(super) breaker: Breaker,
}

/// What rules look at besides the damage.
#[derive(Debug)]
pub(super) struct Judge<'a> {
    pub(super) config: &'a Config,
    pub(super) zone: &'a TimeZone,
    pub(super) live: &'a LiveRows,
    pub(super) baseline: &'a Baseline,
    pub(super) sums: &'a HashMap<TableKey, WindowSum>,
    pub(super) who: &'a Who,
    pub(super) time: PgTime,
}

impl Judge<'_> {
    /// What the rules say.
    pub(super) fn drafts(&self, work: &Work<'_>, damages: &[Damage]) -> Vec<Draft> {
        let mut drafts = Vec::new();
        for damage in damages.iter().filter(|damage| self.config.is_watched(&damage.relation)) {
            self.table(damage, &mut drafts);
        }
        for event in work.ddl {
            self.definition(event, damages, &mut drafts);
        }
        drafts
    }

    fn table(&self, damage: &Damage, drafts: &mut Vec<Draft>) {
        if damage.step.created && !damage.step.dropped && damage.replaced_by.is_none() {
            return; // nobody's rows but the transaction's own
        }
        if self.config.is_migration_history(&damage.relation) {
            self.migration_history(damage, drafts);
            return;
        }
        if damage.replaced_by.is_some() {
            self.replaced(damage, drafts);
        } else if damage.step.dropped {
            self.dropped(damage, drafts);
        } else if damage.truncated {
            self.truncated(damage, drafts);
        } else {
            self.deleted(damage, drafts);
            self.updated(damage, drafts);
        }
    }

    /// The rows that a table lost, and how many it had: in the transaction alone, and within the window.
    fn losses<'b>(&'b self, damage: &'b Damage) -> impl Iterator<Item = (u64, Option<Rows>, Option<&'b WindowSum>)> {
        let alone = damage.counts.deleted.saturating_sub(damage.counts.inserted);
        let sum = self.sums.get(&damage.key());
        let in_window = sum.filter(|sum| sum.lost() > alone).map(|sum| {
            let before = damage.after.map(|after| Rows { count: after.count.saturating_add(sum.lost()), ..after });
            (sum.lost(), before, Some(sum))
        });
        // The larger one tells more.
        in_window.into_iter().chain([(alone, damage.before, None)])
    }

    fn deleted(&self, damage: &Damage, drafts: &mut Vec<Draft>) {
        if damage.counts.deleted == 0 {
            return;
        }
        let name = damage.relation.full_name();
        for (lost, before, sum) in self.losses(damage) {
            if lost == 0 || self.is_normal(damage, lost) {
                continue;
            }
            let of_rows = Damage::of_rows(lost, before);
            let over = sum.map_or(String::new(), |sum| format!(" in {} transactions", grouped(sum.transactions)));
            let case = self.case(RuleName::TableEmptied, Some(&damage.relation));
            if damage.after.is_some_and(|after| after.count == 0)
                && lost >= self.config.thresholds(&case).rows_min
                && before.is_some()
                && self.add(
                    damage,
                    &case,
                    self.severity_of_emptied(damage),
                    format!("{name} emptied{over}: {of_rows} deleted"),
                    sum,
                    drafts,
                )
            {
                return;
            }
            let case = self.case(RuleName::RowsDeleted, Some(&damage.relation));
            let least = self.config.thresholds(&case);
            let (is_much, severity) = match before {
                Some(before) => (reaches(lost, least.percent_min, before.count), Severity::Critical),
                None => (lost >= least.rows_min.saturating_mul(UNKNOWN_FACTOR), Severity::Warning),
            };
            if is_much
                && lost >= least.rows_min
                && self.add(damage, &case, severity, format!("{of_rows} deleted from {name}{over}"), sum, drafts)
            {
                return;
            }
        }
    }

    fn updated(&self, damage: &Damage, drafts: &mut Vec<Draft>) {
        let all = damage.counts.updated.saturating_add(damage.counts.moved);
        let rows = all.saturating_sub(damage.counts.inserted.saturating_sub(damage.counts.moved));
        let case = self.case(RuleName::MassUpdate, Some(&damage.relation));
        let least = self.config.thresholds(&case);
        let is_much = match damage.before {
            Some(before) => reaches(rows, least.percent_min, before.count),
            None => rows >= least.rows_min.saturating_mul(UNKNOWN_FACTOR),
        };
        if rows >= least.rows_min && rows > 0 && is_much {
            let of_rows = Damage::of_rows(rows, damage.before);
            let text = format!("{of_rows} updated in {} by one transaction", damage.relation.full_name());
            if self.add(damage, &case, Severity::Warning, text, None, drafts)
                && let Some(draft) = drafts.last_mut()
            {
                draft.is_loss = false;
            }
        }
    }

    fn truncated(&self, damage: &Damage, drafts: &mut Vec<Draft>) {
        let name = damage.relation.full_name();
        let after = damage.after.map_or(0, |rows| rows.count);
        let (severity, text) = match damage.before {
            // There was nothing to lose.
            Some(Rows { count: 0, exact: true }) => return,
            Some(Rows { count: 0, .. }) => {
                (Severity::Warning, format!("{name} truncated; it is said to have been empty"))
            }
            Some(before) if after.saturating_mul(10) >= before.count.saturating_mul(9) => {
                let text = format!("{name} truncated and loaded again: {before} rows before, {} after", grouped(after));
                (Severity::Info, text)
            }
            Some(before) if after > 0 => {
                let text = format!(
                    "{name} truncated and loaded again with less: {before} rows before, {} after",
                    grouped(after)
                );
                (Severity::Critical, text)
            }
            Some(before) => (Severity::Critical, format!("{name} truncated: {before} rows gone")),
            None if after > 0 => {
                (Severity::Warning, format!("{name} truncated and loaded again with {} rows", grouped(after)))
            }
            None => (Severity::Critical, format!("{name} truncated; nobody knows how many rows it had")),
        };
        if severity > Severity::Info && self.is_normal(damage, damage.lost()) {
            return;
        }
        let case = self.case(RuleName::Truncate, Some(&damage.relation));
        if self.add(damage, &case, severity, text, None, drafts)
            && let Some(draft) = drafts.last_mut()
        {
            draft.is_loss = severity > Severity::Info;
        }
    }

    fn dropped(&self, damage: &Damage, drafts: &mut Vec<Draft>) {
        let name = damage.relation.full_name();
        let (severity, text) = match damage.before {
            Some(Rows { count: 0, exact: true }) => (Severity::Warning, format!("{name} dropped; it had no rows")),
            Some(before) => (Severity::Critical, format!("{name} dropped with {before} rows")),
            None => (Severity::Critical, format!("{name} dropped; nobody knows how many rows it had")),
        };
        let rule = if is_guard(&damage.relation) { RuleName::GuardRemoved } else { RuleName::DropTable };
        let case = self.case(rule, Some(&damage.relation));
        self.add(damage, &case, severity, text, None, drafts);
    }

    fn replaced(&self, damage: &Damage, drafts: &mut Vec<Draft>) {
        let name = damage.known_as();
        let Some((_, after)) = damage.replaced_by else { return };
        let (severity, text) = match (damage.before, after) {
            (Some(before), Some(after)) => {
                let least = self.config.thresholds(&self.case(RuleName::TableReplaced, Some(&damage.relation)));
                let lost = before.count.saturating_sub(after.count);
                let is_emptied = after.count == 0 && before.count >= self.config.table_emptied_rows_min;
                let is_much = lost >= least.rows_min && reaches(lost, least.percent_min, before.count);
                if !is_emptied && !is_much {
                    return; // a table rebuilt with what it held
                }
                let text = format!("{name} replaced by another table: {before} rows before, {after} after");
                (Severity::Critical, text)
            }
            _ if damage.step.dropped => {
                let text =
                    format!("{name} dropped and replaced by another table; nobody knows whether it holds as much");
                (Severity::Warning, text)
            }
            _ => return, // it is still there under another name
        };
        self.add(damage, &self.case(RuleName::TableReplaced, Some(&damage.relation)), severity, text, None, drafts);
    }

    fn migration_history(&self, damage: &Damage, drafts: &mut Vec<Draft>) {
        let name = damage.relation.full_name();
        let case = self.case(RuleName::MigrationHistory, Some(&damage.relation));
        let deleted = damage.counts.deleted;
        let (severity, text) = if damage.step.dropped {
            (Severity::Critical, format!("the history of migrations, {name}, was dropped"))
        } else if damage.truncated {
            if damage.before == Some(Rows { count: 0, exact: true }) {
                return;
            }
            (Severity::Critical, format!("the history of migrations, {name}, was truncated"))
        } else if deleted == 0 {
            return;
        } else {
            let of_rows = Damage::of_rows(deleted, damage.before);
            let inserted = match damage.counts.inserted {
                0 => String::new(),
                rows => format!(", {} inserted", grouped(rows)),
            };
            // One row is how a tool takes one migration back, or notes another version.
            let severity = match (deleted, damage.counts.inserted) {
                (1, 1..) => Severity::Info,
                (1, 0) => Severity::Warning,
                _ => Severity::Critical,
            };
            (severity, format!("{of_rows} deleted from the history of migrations, {name}{inserted}"))
        };
        self.add(damage, &case, severity, text, None, drafts);
    }

    fn definition(&self, event: &DdlEvent, damages: &[Damage], drafts: &mut Vec<Draft>) {
        let table = event.relation.as_ref();
        if table.is_some_and(|table| !self.config.is_watched(table)) {
            return;
        }
        let object = event.object.as_deref().unwrap_or("of unknown name");
        let of_guard = table.is_some_and(|table| is_guard(table)) || object.starts_with("walguard");
        let on = table.map(|table| format!(" on {}", table.full_name())).unwrap_or_default();
        let (rule, severity, text) = match event.kind {
            DdlKind::DropSchema => {
                let lost = damages.iter().filter(|damage| damage.step.dropped && damage.lost() > 0).count();
                let severity = if lost > 0 { Severity::Critical } else { Severity::Warning };
                (RuleName::DropSchema, severity, format!("schema {object} dropped"))
            }
            DdlKind::DropDatabase => (RuleName::DropDatabase, Severity::Critical, format!("database {object} dropped")),
            DdlKind::DropColumn => (RuleName::DropColumn, Severity::Warning, format!("column {object}{on} dropped")),
            DdlKind::DropTrigger => {
                (RuleName::TriggerRemoved, Severity::Warning, format!("trigger {object}{on} dropped"))
            }
            DdlKind::DisableTrigger => {
                (RuleName::TriggerRemoved, Severity::Warning, format!("trigger {object}{on} disabled"))
            }
            DdlKind::DropRule => {
                (RuleName::RuleRemoved, Severity::Warning, format!("rule {object}{on} dropped or disabled"))
            }
            DdlKind::DropPolicy => (RuleName::PolicyRemoved, Severity::Warning, format!("policy {object}{on} dropped")),
            DdlKind::DropEventTrigger => {
                (RuleName::EventTriggerRemoved, Severity::Critical, format!("event trigger {object} dropped"))
            }
            DdlKind::DisableEventTrigger => {
                (RuleName::EventTriggerRemoved, Severity::Critical, format!("event trigger {object} disabled"))
            }
            // Tables are looked at one by one.
            DdlKind::Truncate
            | DdlKind::DropTable
            | DdlKind::DropOther
            | DdlKind::Create
            | DdlKind::Rewrite
            | DdlKind::Alter => return,
        };
        let is_protection = !matches!(rule, RuleName::DropSchema | RuleName::DropDatabase | RuleName::DropColumn);
        let (rule, severity) = match of_guard && is_protection || object == GUARD_SCHEMA {
            true => (RuleName::GuardRemoved, Severity::Critical),
            false => (rule, severity),
        };
        let case = self.case(rule, table.map(|table| &**table));
        let Some(judged) = self.config.judge(&case, severity) else { return };
        drafts.push(Draft {
            rule,
            severity: judged.severity,
            text,
            relation: event.relation.clone(),
            is_harm: true,
            is_loss: !is_protection,
            window: None,
            breaker: judged.breaker,
        });
    }

    /// Adds what a rule says, if the settings want to hear it.
    fn add(
        &self,
        damage: &Damage,
        case: &Case<'_>,
        severity: Severity,
        text: String,
        sum: Option<&WindowSum>,
        drafts: &mut Vec<Draft>,
    ) -> bool {
        let Some(judged) = self.config.judge(case, severity) else { return false };
        drafts.push(Draft {
            rule: case.rule,
            severity: judged.severity,
            text,
            relation: Some(damage.relation.clone()),
            is_harm: true,
            is_loss: true,
            window: sum.cloned(),
            breaker: judged.breaker,
        });
        true
    }

    /// A table by whose history rows come and go may be a queue that is drained to nothing, which is known once it happened
    /// three times: until then nobody is woken up for it.
    fn severity_of_emptied(&self, damage: &Damage) -> Severity {
        let may_be_queue = self.config.learn
            && !damage.truncated
            && self.live.is_churning(damage.key())
            && self.baseline.is_new(damage.key());
        if may_be_queue { Severity::Warning } else { Severity::Critical }
    }

    fn is_normal(&self, damage: &Damage, lost: u64) -> bool {
        if !self.config.learn {
            return false;
        }
        let deletion = self.deletion(damage, lost);
        self.baseline.is_normal(damage.key(), &deletion)
            || self.live.is_churning(damage.key()) && !self.baseline.is_unusual_transaction(damage.key(), &deletion)
    }

    pub(super) fn deletion(&self, damage: &Damage, lost: u64) -> Deletion {
        Deletion {
            time: self.time,
            in_window: lost,
            in_transaction: if damage.truncated { lost } else { damage.counts.deleted },
            emptied: damage.is_emptied(),
        }
    }

    fn case<'b>(&'b self, rule: RuleName, table: Option<&'b Relation>) -> Case<'b> {
        Case { rule, table, who: self.who, at: self.at(), zone: self.zone }
    }

    fn at(&self) -> Timestamp {
        self.time.timestamp()
    }
}

/// Whether `part` is at least so many percent of `all`.
fn reaches(part: u64, percent: u32, all: u64) -> bool {
    u128::from(part) * 100 >= u128::from(percent) * u128::from(all)
}

fn is_guard(relation: &Relation) -> bool {
    relation.schema == GUARD_SCHEMA
}

/// The tables that findings are about.
pub(super) fn tables_of(drafts: &[Draft]) -> HashSet<TableKey> {
    drafts
        .iter()
        .filter_map(|draft| draft.relation.as_ref())
        .map(|relation| super::live_rows::key_of(relation))
        .collect()
}
