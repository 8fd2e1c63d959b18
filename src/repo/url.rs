//! The repository's URL: a folder, or a bucket and a prefix.

use std::path::{Path, PathBuf};

use super::{RepoError, store};

/// Where a URL points.
pub(super) enum Place {
    Folder(PathBuf),
    Bucket { bucket: String, prefix: String },
}

pub(super) fn parse_url(url: &str) -> Result<Place, RepoError> {
    let refuse = |problem: &str| RepoError::Config {
        problem: if url.is_empty() { problem.to_owned() } else { format!("repository `{url}`: {problem}") },
        hint: "give it as `--repo s3://bucket/prefix` or `--repo file:///absolute/folder`, or in WALGUARD_REPO"
            .to_owned(),
    };
    if url.is_empty() {
        return Err(refuse("no repository is given"));
    }
    if let Some(path) = url.strip_prefix("file://").or_else(|| url.starts_with('/').then_some(url)) {
        let path = Path::new(path);
        if !path.is_absolute() {
            return Err(refuse("the folder must be absolute, with three slashes: file:///folder"));
        }
        return Ok(Place::Folder(path.components().collect()));
    }
    if let Some(place) = url.strip_prefix("s3://") {
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        if bucket.is_empty() {
            return Err(refuse("the bucket's name is missing"));
        }
        let prefix = prefix.trim_matches('/');
        if !prefix.is_empty() && store::check_key("use", prefix).is_err() {
            return Err(refuse("the prefix can hold A-Z a-z 0-9 . _ - and single slashes"));
        }
        return Ok(Place::Bucket { bucket: bucket.to_owned(), prefix: prefix.to_owned() });
    }
    Err(refuse("neither an s3:// nor a file:// URL"))
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Repository};
    use super::*;

    #[tokio::test]
    async fn a_url_that_cannot_be_is_told_as_such() {
        for url in ["", "ftp://x", "file://relative", "s3://", "s3://bucket/a b", "s3://bucket/../x", "relative/folder"]
        {
            let config = Config { url: url.to_owned(), ..Config::default() };
            let error = Repository::connect(&config, "main").await.unwrap_err();
            assert!(matches!(error, RepoError::Config { .. }) && error.hint().is_some(), "{url}: {error:?}");
        }
        let config = Config { url: "file:///srv/repo/".to_owned(), ..Config::default() };
        let repo = Repository::connect(&config, "main").await.unwrap();
        assert_eq!(repo.url(), "file:///srv/repo/main");
        assert!(Repository::connect(&config, "a/b").await.unwrap_err().hint().unwrap().contains("--cluster"));
    }
}
