//! The statements of `pg_dump`'s section `post-data`, in the phases in which they can run: indexes beside each other, what
//! needs them in its order, foreign keys beside each other.
//!
//! ```text
//! 1 beside each other    CREATE INDEX, ADD CONSTRAINT ... PRIMARY KEY | UNIQUE | EXCLUDE       each locks one table
//! 2 in order             everything else up to the first foreign key: ATTACH PARTITION ...
//! 3 beside each other    ADD CONSTRAINT ... FOREIGN KEY                                        each locks two tables
//! 4 in order             the rest: triggers, policies, rows of materialized views ...
//! ```
//!
//! What of phase 1 needs something of phase 2 (an index of a materialized view that could only be made then) is refused by
//! the server, and runs at its place in phase 2.

/// When a statement runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Beside others.
    Indexes,
    /// One after the other.
    Ordered,
    /// Beside others.
    ForeignKeys,
    /// One after the other.
    Rest,
}

/// A statement, and the settings that hold for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Statement {
    /// Its number, from 0 on, the same in every run.
    pub(super) number: usize,
    pub(super) phase: Phase,
    /// `SET default_tablespace ...` and their like, as the script has them before it.
    pub(super) settings: String,
    /// Without the semicolon.
    pub(super) text: String,
}

impl Statement {
    /// What is done, for people: its first line, cut.
    pub(super) fn title(&self) -> String {
        title(&self.text)
    }
}

/// The first line of a statement, cut.
pub(super) fn title(text: &str) -> String {
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.trim().chars().take(120).collect()
}

/// The script's statements, each in its phase.
pub(super) fn statements(script: &str) -> Vec<Statement> {
    let mut found: Vec<Statement> = Vec::new();
    let mut settings: Vec<(String, String)> = Vec::new();
    let mut has_foreign_key = false;
    for text in split(script) {
        let words: Vec<String> = words(text).take(8).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        if let ["set", name, ..] = words.as_slice() {
            settings.retain(|(known, _)| known != name);
            settings.push(((*name).to_owned(), text.to_owned()));
            continue;
        }
        if let ["select", "pg_catalog", "set_config", ..] = words.as_slice() {
            continue; // the search path, which our sessions have set as strictly
        }
        let phase = match words.as_slice() {
            ["create", "index", ..] | ["create", "unique", "index", ..] => Phase::Indexes,
            ["alter", "table", ..] => match constraint(text) {
                Some("primary" | "unique" | "exclude") => Phase::Indexes,
                Some("foreign") => Phase::ForeignKeys,
                _ if has_foreign_key => Phase::Rest,
                _ => Phase::Ordered,
            },
            _ if has_foreign_key => Phase::Rest,
            _ => Phase::Ordered,
        };
        has_foreign_key |= phase == Phase::ForeignKeys;
        let settings: String = settings.iter().map(|(_, text)| format!("{text};\n")).collect();
        found.push(Statement { number: found.len(), phase, settings, text: text.to_owned() });
    }
    found
}

/// The kind of constraint that `ALTER TABLE ... ADD CONSTRAINT name` adds.
fn constraint(text: &str) -> Option<&'static str> {
    let words: Vec<String> = words(text).collect();
    let place = words.windows(2).position(|pair| pair[0] == "add" && pair[1] == "constraint")?;
    // The name is one word, quoted or not.
    match words.get(place + 3)?.as_str() {
        "primary" => Some("primary"),
        "unique" => Some("unique"),
        "exclude" => Some("exclude"),
        "foreign" => Some("foreign"),
        _ => None,
    }
}

/// The words of a statement in lower case; a quoted name is one, with its quotes; signs are none.
fn words(text: &str) -> impl Iterator<Item = String> {
    let mut rest = text;
    std::iter::from_fn(move || {
        loop {
            let (skipped, kind) = next_token(rest)?;
            let (token, behind) = rest.split_at_checked(skipped)?;
            rest = behind;
            match kind {
                Token::Word => return Some(token.to_lowercase()),
                Token::QuotedName => return Some(token.to_owned()),
                _ => {}
            }
        }
    })
}

/// The statements of a script, without semicolons, and without what stands before them: blanks and comments.
///
/// (Postgres: `fe_utils/psqlscan.l` looks into bodies of functions in the same way.)
pub(super) fn split(script: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let (mut begin, mut at, mut depth) = (0, 0, 0_u32);
    let mut is_empty = true;
    // Words that a statement begins with, and how deep a body of a function is that is SQL itself: BEGIN ATOMIC ... END.
    let (mut first, mut body) = (Vec::<String>::new(), 0_u32);
    while let Some((length, kind)) = script.get(at..).and_then(next_token) {
        if kind == Token::Word {
            let word = script.get(at..at + length).unwrap_or_default().to_lowercase();
            let makes_function = first.first().is_some_and(|word| word == "create")
                && first.iter().any(|word| word == "function" || word == "procedure");
            match word.as_str() {
                "begin" if makes_function => body += 1,
                "case" if body > 0 => body += 1,
                "end" => body = body.saturating_sub(1),
                _ => {}
            }
            if first.len() < 4 {
                first.push(word);
            }
        }
        match kind {
            Token::Blank if is_empty => begin = at + length,
            Token::Blank => {}
            Token::Sign(';') if depth == 0 && body == 0 => {
                if !is_empty {
                    found.extend(script.get(begin..at).map(str::trim_end));
                }
                (begin, is_empty) = (at + length, true);
                first.clear();
            }
            Token::Sign(sign) => {
                depth = match sign {
                    '(' => depth + 1,
                    ')' => depth.saturating_sub(1),
                    _ => depth,
                };
                is_empty = false;
            }
            Token::Word | Token::QuotedName | Token::Literal => is_empty = false,
        }
        at += length;
    }
    if !is_empty {
        found.extend(script.get(begin..).map(str::trim_end));
    }
    found
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    /// White space and comments.
    Blank,
    Word,
    QuotedName,
    /// In quotes of any kind.
    Literal,
    Sign(char),
}

/// The length and the kind of what a text begins with; `None` at its end. What is not closed goes to the end.
///
/// (Postgres: `backend/parser/scan.l`. Scripts of `pg_dump` are written with `standard_conforming_strings` on.)
fn next_token(text: &str) -> Option<(usize, Token)> {
    let first = text.chars().next()?;
    let to = |end: Option<usize>| end.unwrap_or(text.len());
    Some(match first {
        c if c.is_whitespace() => (to(text.find(|c: char| !c.is_whitespace())), Token::Blank),
        '-' if text.starts_with("--") => (to(text.find('\n')), Token::Blank),
        '/' if text.starts_with("/*") => (comment(text), Token::Blank),
        '\'' => (quoted(text, '\'', false), Token::Literal),
        'e' | 'E' if text.get(1..2) == Some("'") => {
            (1 + text.get(1..).map_or(0, |text| quoted(text, '\'', true)), Token::Literal)
        }
        '"' => (quoted(text, '"', false), Token::QuotedName),
        '$' => match dollar_quoted(text) {
            Some(length) => (length, Token::Literal),
            None => (1, Token::Sign('$')),
        },
        c if is_word(c) => (to(text.find(|c| !is_word(c) && c != '$')), Token::Word),
        c => (c.len_utf8(), Token::Sign(c)),
    })
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || !c.is_ascii()
}

/// The length of a comment, in which others may lie.
fn comment(text: &str) -> usize {
    let (mut depth, mut at) = (0_u32, 0);
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        if rest.starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest.starts_with("*/") {
            (depth, at) = (depth.saturating_sub(1), at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The length of what begins with a quote; a doubled one does not end it, nor one behind a backslash if those count.
fn quoted(text: &str, quote: char, escapes: bool) -> usize {
    let mut characters = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = characters.next() {
        if escapes && c == '\\' {
            characters.next();
        } else if c == quote {
            match characters.peek() {
                Some((_, next)) if *next == quote => drop(characters.next()),
                _ => return at + quote.len_utf8(),
            }
        }
    }
    text.len()
}

/// The length of `$tag$ ... $tag$`; `None` if the dollar begins none.
fn dollar_quoted(text: &str) -> Option<usize> {
    let tag_end = text.get(1..)?.find('$')? + 2;
    let tag = text.get(..tag_end)?;
    let name = tag.trim_matches('$');
    if !name.chars().all(is_word) || name.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let body = text.get(tag_end..)?;
    Some(body.find(tag).map_or(text.len(), |end| tag_end + end + tag.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SCRIPT: &str = r#"
--
-- PostgreSQL database dump
--
SET statement_timeout = 0;
SELECT pg_catalog.set_config('search_path', '', false);
SET default_tablespace = '';

--
-- Name: a a_pkey; Type: CONSTRAINT; Schema: public; Owner: o; it's
--

ALTER TABLE ONLY public.a
    ADD CONSTRAINT a_pkey PRIMARY KEY (id);

SET default_tablespace = fast;

CREATE UNIQUE INDEX "odd;name" ON public.a USING btree (lower((note)::text)) WHERE (note <> 'a;b''c'::text);
ALTER INDEX public.parts_pkey ATTACH PARTITION public.parts_1_pkey;
ALTER TABLE ONLY public.b
    ADD CONSTRAINT "b add constraint x primary" FOREIGN KEY (a) REFERENCES public.a(id);
CREATE RULE r AS ON DELETE TO public.a DO INSTEAD ( INSERT INTO public.log VALUES (1); UPDATE public.log SET n = 2; );
CREATE TRIGGER t BEFORE INSERT ON public.a FOR EACH ROW EXECUTE FUNCTION public.f('x;--', E'\'; DROP TABLE a; --');
COMMENT ON TRIGGER t ON public.a IS 'it is /* no comment; ';
/* a comment; /* within; */ */ CREATE POLICY p ON public.a USING ((note = $q$a;'b$q$));
REFRESH MATERIALIZED VIEW public.m
"#;

    #[test]
    fn a_functions_body_is_part_of_its_statement_in_whichever_way_it_is_written() {
        let atomic = "CREATE FUNCTION public.f(n integer) RETURNS integer\n    LANGUAGE sql\n    BEGIN ATOMIC\n \
                      SELECT CASE WHEN (n > 0) THEN 1 ELSE 2 END;\n SELECT n;\nEND";
        let quoted = "CREATE OR REPLACE PROCEDURE public.p()\n    LANGUAGE plpgsql\n    AS $$ BEGIN; x; END; $$";
        let script = format!("{atomic};\n\n{quoted};\nCOMMENT ON FUNCTION public.f IS 'begin';\nSELECT 1 AS \"end\";");
        assert_eq!(split(&script), [atomic, quoted, "COMMENT ON FUNCTION public.f IS 'begin'", "SELECT 1 AS \"end\""]);
    }

    #[test]
    fn statements_are_told_apart_and_put_into_the_phase_in_which_they_can_run() {
        let found = statements(SCRIPT);
        let phases: Vec<_> = found.iter().map(|statement| (statement.phase, words(&statement.text).nth(1))).collect();
        let word = |word: &str| Some(word.to_owned());
        assert_eq!(
            phases,
            [
                (Phase::Indexes, word("table")),
                (Phase::Indexes, word("unique")),
                (Phase::Ordered, word("index")),
                (Phase::ForeignKeys, word("table")),
                (Phase::Rest, word("rule")),
                (Phase::Rest, word("trigger")),
                (Phase::Rest, word("on")),
                (Phase::Rest, word("policy")),
                (Phase::Rest, word("materialized")),
            ]
        );
        assert!(found[0].settings.contains("default_tablespace = ''") && !found[0].settings.contains("fast"));
        assert!(found[1].settings.contains("default_tablespace = fast;"), "{}", found[1].settings);
        assert!(found[4].text.ends_with("UPDATE public.log SET n = 2; )"), "{}", found[4].text);
        assert_eq!(found[7].text, "CREATE POLICY p ON public.a USING ((note = $q$a;'b$q$))");
        assert_eq!(found[0].title(), "ALTER TABLE ONLY public.a");
    }

    proptest! {
        /// Whatever stands between quotes and comments: nothing is lost but blanks, comments and semicolons.
        #[test]
        fn nothing_of_a_script_is_lost(parts in prop::collection::vec("[a-z ;'\"$()\\-/*\\\\\n\u{e9}]{0,12}", 0..12)) {
            let script = parts.concat();
            let mut at = 0;
            for statement in split(&script) {
                let found = script.get(at..).unwrap().find(statement);
                prop_assert!(found.is_some() && !statement.is_empty());
                at += found.unwrap() + statement.len();
            }
            let _ = statements(&script);
        }
    }
}
