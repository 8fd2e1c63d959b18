//! [`Progress`] on a terminal (bars), in a log (plain lines), or nowhere (`--json`).

use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use walguard::progress::{Progress, Silent};

use crate::render;

/// How often a log hears of unfinished work. Often enough to see that it lives, seldom enough to keep a day's log readable.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// The progress that fits standard error; silent with `--json`.
pub(crate) fn progress(json: bool) -> Arc<dyn Progress> {
    if json {
        Arc::new(Silent)
    } else if io::stderr().is_terminal() {
        Arc::new(Bar(Mutex::default()))
    } else {
        Arc::new(Lines { state: Mutex::default() })
    }
}

/// One bar at a time; a finished phase stays as a line.
#[derive(Debug, Default)]
struct Bar(Mutex<Option<ProgressBar>>);

impl Bar {
    fn current(&self) -> MutexGuard<'_, Option<ProgressBar>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn style(total_known: bool) -> ProgressStyle {
    let template = if total_known {
        "{prefix:24} {bar:30} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left  {wide_msg}"
    } else {
        "{prefix:24} {spinner} {binary_bytes}  {binary_bytes_per_sec}  {elapsed}  {wide_msg}"
    };
    ProgressStyle::with_template(template).expect("the templates above are well-formed").progress_chars("━╸ ")
}

impl Progress for Bar {
    fn begin(&self, phase: &str, bytes_total: Option<u64>) {
        self.end();
        let bar = ProgressBar::with_draw_target(bytes_total, ProgressDrawTarget::stderr())
            .with_style(style(bytes_total.is_some()))
            .with_prefix(phase.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        *self.current() = Some(bar);
    }

    fn set_total(&self, bytes_total: u64) {
        if let Some(bar) = &*self.current() {
            bar.set_style(style(true));
            bar.set_length(bytes_total);
        }
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &*self.current() {
            bar.inc(bytes);
        }
    }

    fn note(&self, text: &str) {
        if let Some(bar) = &*self.current() {
            bar.set_message(text.to_owned());
        }
    }

    fn end(&self) {
        if let Some(bar) = self.current().take() {
            bar.finish_and_clear();
            let line = finished(&bar.prefix(), bar.position(), bar.elapsed());
            let _ = writeln!(io::stderr(), "{line}"); // progress that cannot be shown must not stop the work
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = self.current().take() {
            bar.finish_and_clear(); // the work was given up: no line that says it is done
        }
    }
}

/// Plain lines, about every [`LINE_INTERVAL`] and at the end of a phase.
struct Lines {
    state: Mutex<Option<Phase>>,
}

struct Phase {
    name: String,
    total: Option<u64>,
    done: u64,
    note: String,
    began: Instant,
    told: Instant,
}

impl Lines {
    /// Changes the phase, and tells of it if it is time.
    fn update(&self, change: impl FnOnce(&mut Phase)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(phase) = &mut *state else { return };
        change(phase);
        if phase.told.elapsed() >= LINE_INTERVAL {
            phase.told = Instant::now();
            let _ = writeln!(io::stderr(), "{phase}");
        }
    }
}

impl Progress for Lines {
    fn begin(&self, phase: &str, bytes_total: Option<u64>) {
        self.end();
        let now = Instant::now();
        let phase =
            Phase { name: phase.to_owned(), total: bytes_total, done: 0, note: String::new(), began: now, told: now };
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(phase);
    }

    fn set_total(&self, bytes_total: u64) {
        self.update(|phase| phase.total = Some(bytes_total));
    }

    fn advance(&self, bytes: u64) {
        self.update(|phase| phase.done = phase.done.saturating_add(bytes));
    }

    fn note(&self, text: &str) {
        self.update(|phase| text.clone_into(&mut phase.note));
    }

    fn end(&self) {
        if let Some(phase) = self.state.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = writeln!(io::stderr(), "{}", finished(&phase.name, phase.done, phase.began.elapsed()));
        }
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lines")
    }
}

impl fmt::Display for Phase {
    /// `fetch base backup: 1.2 GiB of 4.0 GiB (30 %), 110 MiB/s, 26 s left, base/16384/2619`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.began.elapsed().as_secs_f64();
        let rate = if seconds > 0.0 { self.done as f64 / seconds } else { 0.0 };
        write!(f, "{}: {}", self.name, render::bytes(self.done))?;
        if let Some(total) = self.total.filter(|total| *total > 0) {
            write!(f, " of {} ({} %)", render::bytes(total), u128::from(self.done) * 100 / u128::from(total))?;
        }
        if self.done > 0 {
            write!(f, ", {}/s", render::bytes(rate as u64))?;
            let left = self.total.unwrap_or(0).saturating_sub(self.done);
            if left > 0 && rate >= 1.0 {
                write!(f, ", {} left", render::duration(Duration::from_secs((left as f64 / rate) as u64)))?;
            }
        }
        if !self.note.is_empty() {
            write!(f, ", {}", self.note)?;
        }
        Ok(())
    }
}

/// The line that stays of a finished phase.
fn finished(phase: &str, bytes: u64, took: Duration) -> String {
    if bytes == 0 {
        format!("{phase}: done in {}", render::duration(took))
    } else {
        let rate = (bytes as f64 / took.as_secs_f64().max(1e-6)) as u64;
        format!("{phase}: {} in {} ({}/s)", render::bytes(bytes), render::duration(took), render::bytes(rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_share_and_what_is_being_done() {
        let now = Instant::now();
        let phase = Phase {
            name: "fetch base backup".into(),
            total: Some(4 << 20),
            done: 1 << 20,
            note: "base/5/2619".into(),
            began: now,
            told: now,
        };
        let text = phase.to_string();
        assert!(text.starts_with("fetch base backup: 1.0 MiB of 4.0 MiB (25 %), "), "{text}");
        assert!(text.ends_with("base/5/2619"), "{text}");
    }

    #[test]
    fn work_outside_a_phase_is_no_trouble() {
        let lines = Lines { state: Mutex::default() };
        lines.advance(1);
        lines.note("x");
        lines.set_total(1);
        lines.end();
    }
}
