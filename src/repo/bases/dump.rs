//! `pg_dump`: the schema of a snapshot, as SQL.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use super::{BaseError, SCHEMA_BYTES_MAX};
use crate::capture::{CaptureError, ConnInfo};

/// Finds a `pg_dump` that can read a server of `major`: in `given` and nowhere else if that is set, otherwise in the
/// directories of `path` (the variable `PATH`) and where Debian and PGDG put newer ones.
///
/// # Errors
/// If there is none; the error says what was found instead.
pub(super) fn find(major: u32, given: Option<&Path>, path: Option<&OsStr>) -> Result<PathBuf, BaseError> {
    let places: Vec<PathBuf> = match given {
        Some(dir) => vec![dir.to_owned()],
        None => {
            let usual = (major..major + 10)
                .flat_map(|major| [format!("/usr/lib/postgresql/{major}/bin"), format!("/usr/pgsql-{major}/bin")]);
            std::env::split_paths(path.unwrap_or_default()).chain(usual.map(PathBuf::from)).collect()
        }
    };
    let mut seen = Vec::new();
    for program in places.iter().map(|dir| dir.join("pg_dump")).filter(|program| program.is_file()) {
        let Ok(output) = std::process::Command::new(&program).arg("--version").output() else { continue };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let number: String =
            text.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
        match number.parse::<u32>() {
            Ok(version) if version >= major => return Ok(program),
            Ok(version) => seen.push(format!("{version} in {}", program.display())),
            Err(_) => {}
        }
    }
    let problem = match seen.is_empty() {
        true => "none is in PATH or in the usual directories".to_owned(),
        false => format!("found only {}", seen.join(", ")),
    };
    Err(BaseError::NoDump { major, problem })
}

/// What `pg_dump` writes of one section, without what only `psql` understands.
///
/// # Errors
/// If it cannot be started, fails, or writes more than a schema can have.
pub(super) async fn section(
    program: &Path,
    conninfo: &ConnInfo,
    snapshot: &str,
    section: &str,
) -> Result<Vec<u8>, BaseError> {
    let failed = |problem: String| BaseError::Dump { program: program.to_owned(), problem };
    let environment = conninfo.child_environment()?;
    let mut command = Command::new(program);
    command
        .args(["--no-password", "--no-publications", "--no-subscriptions", "--encoding=UTF8"])
        .arg(format!("--section={section}"))
        .arg(format!("--snapshot={snapshot}"))
        .envs(environment)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(failed("its output cannot be read".to_owned()));
    };
    let (mut sql, mut said) = (Vec::new(), Vec::new());
    let (mut stdout, mut stderr) = (stdout.take(SCHEMA_BYTES_MAX as u64 + 1), stderr.take(64 << 10));
    let read = async { tokio::try_join!(stdout.read_to_end(&mut sql), stderr.read_to_end(&mut said)).map(drop) };
    read.await.map_err(|error| failed(error.to_string()))?;
    if sql.len() > SCHEMA_BYTES_MAX {
        return Err(failed(format!("the schema has more than {SCHEMA_BYTES_MAX} bytes")));
    }
    let status = child.wait().await.map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        let said = String::from_utf8_lossy(&said);
        let last = said.trim_end().lines().rev().take(3).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>();
        let text = if last.is_empty() { status.to_string() } else { last.join(" ") };
        if text.contains("could not connect") || text.contains("connection to server") {
            return Err(CaptureError::Unreachable { what: text, source: None }.into());
        }
        return Err(failed(text));
    }
    Ok(plain(&sql))
}

/// Leaves out `\restrict` and `\unrestrict`, by which newer versions keep `psql` from being led astray, and a setting that
/// newer versions write and servers before 17 do not know.
fn plain(sql: &[u8]) -> Vec<u8> {
    let is_left_out = |line: &[u8]| {
        line.starts_with(b"\\restrict ")
            || line.starts_with(b"\\unrestrict ")
            || line.trim_ascii_end() == b"SET transaction_timeout = 0;"
    };
    sql.split_inclusive(|byte| *byte == b'\n').filter(|line| !is_left_out(line)).flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_psql_or_a_newer_server_understands_is_left_out() {
        let sql = b"--\n\\restrict abc\nSET transaction_timeout = 0;\nSET x = 1;\nCREATE FUNCTION f() AS 'a\\restrict b';\n\\unrestrict abc\n";
        assert_eq!(plain(sql), b"--\nSET x = 1;\nCREATE FUNCTION f() AS 'a\\restrict b';\n");
    }
}
