//! Values -> what people and programs read. The only place, beside [`report`](crate::report) and
//! [`progress`](crate::progress), that prints.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::time::Duration;

use comfy_table::presets::NOTHING;
use comfy_table::{Attribute, Cell, ContentArrangement, Table};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, Unit};
use serde::Serialize;

/// Standard output took no more.
#[derive(Debug, thiserror::Error)]
#[error("write to standard output")]
pub(crate) struct PrintError(#[from] io::Error);

impl PrintError {
    /// True if the reader has seen enough: `walguard list | head`.
    pub(crate) fn is_reader_gone(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

/// Prints text for people.
pub(crate) fn print(text: &str) -> Result<(), PrintError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    if !text.ends_with('\n') {
        out.write_all(b"\n")?;
    }
    Ok(out.flush()?)
}

/// Prints a value for programs: indented JSON and a line's end.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), PrintError> {
    print(&serde_json::to_string_pretty(value).map_err(io::Error::other)?)
}

/// Standard output for very many lines: they are written in large pieces.
#[derive(Debug)]
pub(crate) struct Lines(io::BufWriter<io::Stdout>);

impl Lines {
    pub(crate) fn new() -> Self {
        Self(io::BufWriter::with_capacity(64 << 10, io::stdout()))
    }

    /// A line for people.
    pub(crate) fn print(&mut self, line: &impl std::fmt::Display) -> Result<(), PrintError> {
        Ok(writeln!(self.0, "{line}")?)
    }

    /// A line for programs.
    pub(crate) fn print_json(&mut self, value: &impl Serialize) -> Result<(), PrintError> {
        self.print(&serde_json::to_string(value).map_err(io::Error::other)?)
    }

    /// Writes what has gathered, before an error is told.
    pub(crate) fn flush(&mut self) -> Result<(), PrintError> {
        Ok(self.0.flush()?)
    }

    /// Writes the rest.
    pub(crate) fn finish(mut self) -> Result<(), PrintError> {
        self.flush()
    }
}

/// True if somebody is there to answer questions.
pub(crate) fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Tells somebody who is asked what the question is about.
pub(crate) fn tell(text: &str) -> io::Result<()> {
    io::stderr().lock().write_all(text.as_bytes())
}

/// Asks a question that is answered with a line, on the terminal. Where nobody can answer, the answer is `None`.
pub(crate) fn prompt(question: &str) -> io::Result<Option<String>> {
    if !can_ask() {
        return Ok(None);
    }
    let mut err = io::stderr().lock();
    write!(err, "{question} ")?;
    err.flush()?;
    let mut answer = String::new();
    let length = io::stdin().lock().read_line(&mut answer)?;
    Ok((length > 0).then_some(answer))
}

/// Asks a question that is answered with yes or no, on the terminal. Where nobody can answer, the answer is `None`.
pub(crate) fn ask(question: &str) -> io::Result<Option<bool>> {
    if !can_ask() {
        return Ok(None);
    }
    let answer = prompt(&format!("{question} [y/N]"))?.unwrap_or_default();
    Ok(Some(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")))
}

/// A table without lines, whose headers are in capitals. It fits the terminal's width and is not wrapped elsewhere.
pub(crate) fn table<const N: usize>(headers: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(headers.map(|header| Cell::new(header.to_uppercase()).add_attribute(Attribute::Bold)));
    if !io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Disabled).force_no_tty();
    }
    // Cells are set apart by the space on their right; without lines the first needs none on its left.
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// A table as text, without the spaces that fill its last column.
pub(crate) fn table_text(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// Columns of the terminal; 100 where there is none, or one that does not say.
pub(crate) fn width() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok().filter(|_| is_terminal());
    size.map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0).unwrap_or(100)
}

/// Lines of the terminal, if there is one.
pub(crate) fn height() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok().filter(|_| is_terminal());
    size.map(|size| usize::from(size.ws_row)).filter(|rows| *rows > 0)
}

/// True if people watch.
pub(crate) fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Cells of a bar of `cells_max` cells at `max`: at least one for anything, so that little beside much is still seen.
pub(crate) fn bar(value: u64, max: u64, cells_max: usize) -> usize {
    if value == 0 || max == 0 || cells_max == 0 {
        return 0;
    }
    let cells = u128::from(value.min(max)) * cells_max as u128 / u128::from(max);
    usize::try_from(cells).unwrap_or(cells_max).max(1)
}

/// A number with commas: `10,036`.
pub(crate) fn number(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Prints over the line that the cursor is in, on a terminal; without its end, so that it can be printed over again.
pub(crate) fn reprint_line(text: &str) -> Result<(), PrintError> {
    let mut out = io::stdout().lock();
    write!(out, "\r\x1b[2K{text}")?;
    Ok(out.flush()?)
}

/// Green on a terminal that shows colours.
pub(crate) fn green(text: &str) -> String {
    painted(32, text)
}

/// Yellow on a terminal that shows colours.
pub(crate) fn yellow(text: &str) -> String {
    painted(33, text)
}

/// Red on a terminal that shows colours.
pub(crate) fn red(text: &str) -> String {
    painted(31, text)
}

/// Grey on a terminal that shows colours.
pub(crate) fn dim(text: &str) -> String {
    painted(2, text)
}

/// Bold on a terminal.
pub(crate) fn bold(text: &str) -> String {
    painted(1, text)
}

/// `style` is a parameter of ECMA-48's SGR. `NO_COLOR` is the convention by which people refuse it.
fn painted(style: u8, text: &str) -> String {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if refused || text.is_empty() || !io::stdout().is_terminal() {
        text.to_owned()
    } else {
        format!("\x1b[{style}m{text}\x1b[0m")
    }
}

/// `16.0 MiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

/// A duration with the precision that one wants to know: `0.35 s`, `12.4 s`, `3 min 05 s`, `2 h 10 min`, `5 d 3 h`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{:.2} s", duration.as_secs_f64()),
        10..60 => format!("{:.1} s", duration.as_secs_f64()),
        60..3_600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{} h {:02} min", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

/// A moment in UTC and, where that differs, in `zone`: `2025-12-17 06:14:00.25 UTC (08:14:00.25 Asia/Jerusalem)`.
pub(crate) fn time(time: Timestamp, zone: &TimeZone) -> String {
    let utc = time.to_zoned(TimeZone::UTC);
    let local = time.to_zoned(zone.clone());
    let digits = if time.subsec_nanosecond() == 0 { "" } else { "%.f" };
    let text = utc.strftime(&format!("%Y-%m-%d %H:%M:%S{digits} UTC")).to_string();
    if local.offset() == jiff::tz::Offset::UTC {
        return text;
    }
    let date = if local.date() == utc.date() { "" } else { "%Y-%m-%d " };
    let name = zone.iana_name().map_or_else(|| local.strftime("%:z").to_string(), str::to_owned);
    format!("{text} ({} {name})", local.strftime(&format!("{date}%H:%M:%S{digits}")))
}

/// A moment as [`time`] shows it, cut to milliseconds.
pub(crate) fn time_to_millis(moment: Timestamp, zone: &TimeZone) -> String {
    let cut = jiff::TimestampRound::new().smallest(Unit::Millisecond).mode(jiff::RoundMode::Floor);
    time(moment.round(cut).unwrap_or(moment), zone)
}

/// Text from elsewhere as one line that a terminal shows and does not obey.
pub(crate) fn printable(text: &str) -> String {
    printable_lines(text).replace('\n', " ")
}

/// Text from elsewhere that a terminal shows and does not obey.
pub(crate) fn printable_lines(text: &str) -> String {
    // Marks that turn the direction of writing are as good as control characters.
    let is_turn = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let shown = |c: char| match c {
        '\n' => '\n',
        '\t' | '\r' => ' ',
        c if c.is_control() || is_turn(c) => '\u{fffd}',
        c => c,
    };
    text.chars().map(shown).collect()
}

/// How long before `now` a moment was: `3 min 05 s ago`.
pub(crate) fn age(time: Timestamp, now: Timestamp) -> String {
    match Duration::try_from(now.duration_since(time)) {
        Ok(age) if age.as_secs() >= 1 => format!("{} ago", duration(Duration::from_secs(age.as_secs()))),
        Ok(_) => "now".to_owned(),
        // Two clocks, or one that was rounded: not worth a word.
        Err(_) if time.duration_since(now) < SignedDuration::from_secs(2) => "now".to_owned(),
        Err(_) => format!("{} ahead", duration(time.duration_since(now).unsigned_abs())),
    }
}

/// A moment cut to whole seconds, for tables.
pub(crate) fn whole_seconds(time: Timestamp) -> Timestamp {
    let cut = jiff::TimestampRound::new().smallest(Unit::Second).mode(jiff::RoundMode::Floor);
    time.round(cut).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_shown_in_utc_and_in_the_zone() {
        let moment: Timestamp = "2025-12-17T06:14:00.25Z".parse().unwrap();
        let zone = TimeZone::get("Asia/Jerusalem").unwrap();
        assert_eq!(time(moment, &zone), "2025-12-17 06:14:00.25 UTC (08:14:00.25 Asia/Jerusalem)");
        assert_eq!(time(moment, &TimeZone::UTC), "2025-12-17 06:14:00.25 UTC");
    }

    #[test]
    fn a_zone_in_which_it_is_another_day_shows_that_day() {
        let moment: Timestamp = "2025-12-17T23:00:00Z".parse().unwrap();
        let zone = TimeZone::get("Asia/Tokyo").unwrap();
        assert_eq!(time(moment, &zone), "2025-12-17 23:00:00 UTC (2025-12-18 08:00:00 Asia/Tokyo)");
    }

    #[test]
    fn text_from_elsewhere_gives_a_terminal_no_orders() {
        assert_eq!(printable("a\u{1b}[31m\nb\u{202e}c\u{7}"), "a\u{fffd}[31m b\u{fffd}c\u{fffd}");
        assert_eq!(printable_lines("a\r\n\tb"), "a \n b");
    }

    #[test]
    fn a_duration_has_the_precision_of_its_size() {
        let text = |millis| duration(Duration::from_millis(millis));
        assert_eq!(text(350), "0.35 s");
        assert_eq!(text(12_400), "12.4 s");
        assert_eq!(text(185_000), "3 min 05 s");
        assert_eq!(text(7_800_000), "2 h 10 min");
        assert_eq!(text(442_800_000), "5 d 3 h");
    }

    #[test]
    fn a_bar_shows_little_beside_much_and_never_more_than_there_is_room() {
        let cells = [0, 1, 499, 500, 1_000, 2_000].map(|value| bar(value, 1_000, 10));
        assert_eq!(cells, [0, 1, 4, 5, 10, 10]);
        assert_eq!((bar(u64::MAX, u64::MAX, 30), bar(5, 0, 30), bar(5, 5, 0)), (30, 0, 0));
    }

    #[test]
    fn a_number_is_set_in_threes() {
        assert_eq!([0, 999, 1_000, 10_036, 1_234_567].map(number), ["0", "999", "1,000", "10,036", "1,234,567"]);
    }

    #[test]
    fn an_age_tells_a_clock_that_is_ahead() {
        let now: Timestamp = "2025-12-17T06:14:00Z".parse().unwrap();
        assert_eq!(age("2025-12-17T06:13:00.5Z".parse().unwrap(), now), "59.0 s ago");
        assert_eq!(age(now, now), "now");
        assert_eq!(age("2025-12-17T06:14:05Z".parse().unwrap(), now), "5.00 s ahead");
    }
}
