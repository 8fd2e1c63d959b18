//! Which tables a setting is about: `database.schema.table` with `*` and `?`.

use std::fmt;
use std::str::FromStr;

use super::Relation;

/// The longest pattern, in bytes: three names of Postgres's longest, in quotes or not, are shorter.
const BYTES_MAX: usize = 256;

/// A pattern for tables: `table`, `schema.table` or `database.schema.table`, where `*` stands for any characters and `?`
/// for one. What is not named matches anything. Case matters, as it does between quotes in SQL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    /// Database, schema, table.
    parts: [Option<String>; 3],
}

/// The text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no pattern for tables; one looks like `jobs`, `public.*` or `shop.public.order_*`")]
pub struct PatternError(String);

impl Pattern {
    /// Whether a table is meant. One whose name nobody knows is meant by no pattern but those of stars.
    pub fn matches(&self, relation: &Relation) -> bool {
        self.matches_name(&relation.database_name, &relation.schema, &relation.name)
    }

    /// The same by names.
    pub fn matches_name(&self, database: &str, schema: &str, table: &str) -> bool {
        let names = [database, schema, table];
        self.parts.iter().zip(names).all(|(part, name)| part.as_ref().is_none_or(|glob| matches_glob(glob, name)))
    }
}

/// Whether `text` is meant by `glob`, in which `*` stands for any characters and `?` for one. Takes no longer than the
/// product of their lengths.
pub fn matches_glob(glob: &str, text: &str) -> bool {
    let (mut glob, mut text) = (glob.chars(), text.chars());
    // Where to go on if what comes does not match: the last star, and the first character that it does not stand for.
    let mut star: Option<(std::str::Chars<'_>, std::str::Chars<'_>)> = None;
    loop {
        let here = text.clone();
        match (glob.next(), text.next()) {
            (Some('*'), _) => {
                text = here;
                star = Some((glob.clone(), text.clone()));
            }
            (None, None) => return true,
            (Some(g), Some(t)) if g == '?' || g == t => {}
            _ => {
                let Some((after, from)) = &mut star else { return false };
                if from.next().is_none() {
                    return false;
                }
                glob = after.clone();
                text = from.clone();
            }
        }
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let parts: Vec<&str> = text.split('.').collect();
        if text.len() > BYTES_MAX || parts.len() > 3 || parts.iter().any(|part| part.is_empty()) {
            return Err(PatternError(text.chars().take(BYTES_MAX).collect()));
        }
        let mut all = [None, None, None];
        for (place, part) in all.iter_mut().rev().zip(parts.into_iter().rev()) {
            *place = Some(part.to_owned());
        }
        Ok(Self { text: text.to_owned(), parts: all })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl serde::Serialize for Pattern {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> serde::Deserialize<'de> for Pattern {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_named_matches_anything() {
        let matches = |text: &str| text.parse::<Pattern>().unwrap().matches_name("shop", "public", "orders");
        for text in ["orders", "public.orders", "shop.public.orders", "*", "sh*.p?blic.*", "*.*.order?", "o*r*s"] {
            assert!(matches(text), "{text}");
        }
        for text in ["order", "orders?", "shop.orders", "Orders", "public.*.orders", "*.*.order", "o*r*z"] {
            assert!(!matches(text), "{text}");
        }
    }

    #[test]
    fn many_stars_take_no_time() {
        let glob = "*a".repeat(120);
        assert!(!matches_glob(&glob, &"a".repeat(119)) && matches_glob(&glob, &"a".repeat(20_000)));
    }

    #[test]
    fn text_that_names_no_table_is_refused() {
        for text in ["", ".", "a.", "a..b", "a.b.c.d", &"x".repeat(300)] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
    }
}
