//! What a backup is called.

use jiff::Timestamp;

use crate::repo::RepoError;
use crate::repo::Repository;
use crate::repo::layout;
use crate::repo::store::ListRequest;

use super::BackupError;

/// A label under which the repository holds nothing yet: the one asked for, or the time (`20261122T061500Z`), with a
/// number behind it if that is taken.
///
/// # Errors
/// [`BackupError::Label`] and [`BackupError::LabelTaken`] for the one asked for; errors of the repository.
pub async fn choose_label(
    repository: &Repository,
    wanted: Option<&str>,
    now: Timestamp,
) -> Result<String, BackupError> {
    if let Some(wanted) = wanted {
        layout::check_name(wanted).map_err(|_| BackupError::Label(wanted.to_owned()))?;
        return match is_taken(repository, wanted).await? {
            true => Err(BackupError::LabelTaken(wanted.to_owned())),
            false => Ok(wanted.to_owned()),
        };
    }
    let time = now.strftime("%Y%m%dT%H%M%SZ").to_string();
    let mut label = time.clone();
    let mut number = 1;
    while is_taken(repository, &label).await? {
        number += 1;
        label = format!("{time}-{number}");
    }
    Ok(label)
}

async fn is_taken(repository: &Repository, label: &str) -> Result<bool, BackupError> {
    let request = ListRequest { prefix: repository.layout().backup_folder(label), ..ListRequest::default() };
    let page = repository.store().list(&request).await.map_err(RepoError::from)?;
    Ok(!page.objects.is_empty())
}
