//! The rules of the house that the compiler does not know.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Modules that every other may import: vocabulary and generated messages.
const FREE: [&str; 2] = ["pg", "proto"];

/// Files and folders that turn values into values.
const PURE: [&str; 27] = [
    "src/pg",
    "src/decode",
    "src/detect",
    "src/capture/feedback.rs",
    "src/guard/activity.rs",
    "src/guard/message.rs",
    "src/guard/nudge.rs",
    "src/guard/script.rs",
    "src/guard/testimony.rs",
    "src/notify/message.rs",
    "src/notify/queue.rs",
    "src/repo/archiver/plan.rs",
    "src/repo/catalog.rs",
    "src/repo/changes/format.rs",
    "src/repo/index/build.rs",
    "src/repo/index/chronicle.rs",
    "src/repo/index/format.rs",
    "src/repo/index/level.rs",
    "src/repo/index/merged.rs",
    "src/repo/index/summary.rs",
    "src/repo/index/survey.rs",
    "src/repo/layout.rs",
    "src/restore/path.rs",
    "src/restore/rebuild/follow.rs",
    "src/restore/rebuild/sql.rs",
    "src/restore/scan.rs",
    "src/restore/target.rs",
];

/// What has no place in a pure module: sockets, files, clocks, tasks, chance.
const IMPURE: [&str; 13] = [
    "std::env",
    "std::fs",
    "std::net",
    "std::process",
    "std::thread",
    "tokio::",
    "rustix",
    "fastrand",
    "Instant::now",
    ".elapsed()",
    "SystemTime",
    "Timestamp::now",
    "Zoned::now",
];

#[test]
fn a_module_imports_only_what_stands_before_it() {
    let mut faults = Vec::new();
    for file in rust_files("src") {
        let path = relative(&file);
        if path.starts_with("src/bin") || path == "src/lib.rs" {
            continue;
        }
        let module = path.strip_prefix("src/").unwrap().split(['/', '.']).next().unwrap();
        for (number, line) in code_lines(&file) {
            for (at, _) in line.match_indices("crate::") {
                let imported: String =
                    line[at + 7..].chars().take_while(|c| c.is_alphanumeric() || matches!(c, '_' | '{')).collect();
                if imported.starts_with('{') {
                    faults.push(format!("{path}:{number}: one module per line, not `{}`", line.trim()));
                } else if imported.as_str() > module && !FREE.contains(&imported.as_str()) {
                    faults
                        .push(format!("{path}:{number}: `{module}` must not know `{imported}`, which comes after it"));
                } else if module == "pg" && imported != "pg" {
                    faults.push(format!("{path}:{number}: `pg` imports nothing, not even `{imported}`"));
                }
            }
        }
    }
    assert_none(&faults);
}

#[test]
fn pure_modules_name_no_socket_file_clock_or_task() {
    let mut faults = Vec::new();
    for place in PURE {
        let files = rust_files(place);
        assert!(!files.is_empty(), "{place} is gone: mend the list of pure modules");
        for file in files {
            for (number, line) in code_lines(&file) {
                let found = IMPURE.iter().filter(|name| line.contains(*name) && !is_use_of_jiff(&line));
                faults.extend(found.map(|name| format!("{}:{number}: `{name}` in a pure module", relative(&file))));
            }
        }
    }
    assert_none(&faults);
}

/// jiff's types are values; only asking it for the present is not.
fn is_use_of_jiff(line: &str) -> bool {
    line.trim_start().starts_with("use jiff::")
}

#[test]
fn every_module_says_what_it_is_for() {
    let files = ["src", "tests", "benches"].into_iter().flat_map(rust_files);
    let silent = files.filter(|file| !fs::read_to_string(file).unwrap().starts_with("//! "));
    let faults: Vec<_> = silent.map(|file| format!("{}: does not begin with `//! `", relative(&file))).collect();
    assert_none(&faults);
}

#[test]
fn nothing_is_left_for_later() {
    // Put together here, so that this file does not find itself.
    let words = ["TO", "FIX", "unimplemented", "to", "db"].into_iter().zip(["DO", "ME", "!", "do!(", "g!("]);
    let words: Vec<String> = words.map(|(head, tail)| format!("{head}{tail}")).collect();
    assert_none(&find(&words));
}

#[test]
fn nothing_names_one_machine_or_one_registry() {
    let places = ["/home", "/root", "/Users", "/work"].map(|place| format!("{place}/"));
    let hosts =
        ["npmjs", "pypi", "pythonhosted", "crates", "debian"].into_iter().zip([".org", ".org", ".org", ".io", ".org"]);
    let words: Vec<String> = places.into_iter().chain(hosts.map(|(name, end)| format!("{name}{end}"))).collect();
    assert_none(&find(&words));
}

#[test]
fn scripts_can_be_run_and_parsed() {
    let mut faults = Vec::new();
    let folders = ["scripts", ".ci"].map(|folder| root().join(folder));
    for file in folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap()).map(|entry| entry.unwrap().path()) {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let name = relative(&file);
        let is_shell = name.ends_with(".sh") || text.starts_with("#!/usr/bin/env bash");
        if text.starts_with("#!") && fs::metadata(&file).unwrap().permissions().mode() & 0o111 != 0o111 {
            faults.push(format!("{name}: is not executable"));
        }
        if !text.starts_with("#!") && !name.contains('.') {
            faults.push(format!("{name}: does not say what runs it"));
        }
        if is_shell && !Command::new("bash").arg("-n").arg(&file).status().unwrap().success() {
            faults.push(format!("{name}: bash cannot parse it"));
        }
    }
    assert_none(&faults);
}

fn assert_none(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn relative(file: &Path) -> String {
    file.strip_prefix(root()).unwrap().display().to_string()
}

/// The Rust files at or below a place, sorted.
fn rust_files(place: &str) -> Vec<PathBuf> {
    let mut files = files_below(&root().join(place));
    files.retain(|file| file.extension().is_some_and(|extension| extension == "rs"));
    files
}

fn files_below(place: &Path) -> Vec<PathBuf> {
    if place.is_file() {
        return vec![place.to_owned()];
    }
    let Ok(entries) = fs::read_dir(place) else { return Vec::new() };
    let mut files: Vec<_> = entries.flat_map(|entry| files_below(&entry.unwrap().path())).collect();
    files.sort();
    files
}

/// Numbered lines of code: no comments, and nothing after the unit tests begin.
fn code_lines(file: &Path) -> Vec<(usize, String)> {
    let text = fs::read_to_string(file).unwrap();
    let code = text.lines().take_while(|line| line.trim() != "#[cfg(test)]");
    let code = code.map(|line| line.split("//").next().unwrap_or_default().to_owned());
    code.enumerate().map(|(index, line)| (index + 1, line)).collect()
}

/// Where a text of the project contains one of `words`.
fn find(words: &[String]) -> Vec<String> {
    let places =
        ["src", "tests", "benches", "proto", "scripts", "deploy", ".ci", "README.md", "Cargo.toml", "build.rs"];
    let mut faults = Vec::new();
    for file in places.iter().flat_map(|place| files_below(&root().join(place))) {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        for (index, line) in text.lines().enumerate() {
            let found = words.iter().filter(|word| line.contains(word.as_str()));
            faults.extend(found.map(|word| format!("{}:{}: `{word}`", relative(&file), index + 1)));
        }
    }
    faults
}
