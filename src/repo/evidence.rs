//! Rows that an incident took away, saved beside it.

use bytes::Bytes;

use super::layout::check_name;
use super::put::SameContent;
use super::{RepoError, Repository};

impl Repository {
    /// Saves the rows of a table beside an incident: `incidents/<id>/evidence/<schema>.<table>.copy.zst`. Gives the key. What
    /// was saved before stays: the first look saw most.
    ///
    /// # Errors
    /// Of the store.
    pub async fn put_evidence(&self, id: &str, schema: &str, table: &str, stored: Bytes) -> Result<String, RepoError> {
        let key = self.layout().evidence(id, &evidence_name(schema, table));
        match self.put_once(&key, stored, SameContent::Verbatim).await {
            Ok(_) | Err(RepoError::Conflict { .. }) => Ok(key),
            Err(error) => Err(error),
        }
    }
}

/// `schema.table`, as far as it can be a part of a key; otherwise what is left of it, and a hash so that no two tables share
/// it.
fn evidence_name(schema: &str, table: &str) -> String {
    let name = format!("{schema}.{table}");
    if check_name(&name).is_ok() {
        return name;
    }
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    let readable: String = name.chars().map(plain).take(40).collect();
    let hash = blake3::hash(format!("{schema}\0{table}").as_bytes()).to_hex();
    format!("t{}-{}", readable, hash.get(..12).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::tests::repository;
    use super::*;

    #[test]
    fn every_table_has_a_name_of_its_own_that_can_be_a_key() {
        assert_eq!(evidence_name("public", "users"), "public.users");
        let odd =
            [("public", "a/b"), ("public", "a b"), ("publi", "c.a b"), (".x", "y"), ("s", &"t".repeat(200)), ("", "é")];
        let names: std::collections::BTreeSet<_> =
            odd.iter().map(|(schema, table)| evidence_name(schema, table)).collect();
        assert_eq!(names.len(), odd.len());
        assert!(names.iter().all(|name| check_name(name).is_ok()), "{names:?}");
    }

    #[tokio::test]
    async fn what_was_saved_first_stays() {
        let repo = repository();
        let id = "00000001-0000000000000010";
        let key = repo.put_evidence(id, "public", "users", Bytes::from_static(b"one")).await.unwrap();
        assert_eq!(repo.put_evidence(id, "public", "users", Bytes::from_static(b"two")).await.unwrap(), key);
        assert_eq!(&repo.store().read(&key, None).await.unwrap()[..], b"one");
        assert!(key.ends_with("/evidence/public.users.copy.zst"));
    }
}
