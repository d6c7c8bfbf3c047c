//! Texts as they are compared, whatever stands around them.

/// Punctuation that ends a sentence or a part of it.
pub(super) const ENDS: [char; 13] = [
    '.', '!', '?', ',', ';', ':', '。', '！', '？', '，', '；', '：', '、',
];

/// Signs around a text that emphasize or quote it.
const AROUND: [char; 14] = [
    '"', '“', '”', '„', '«', '»', '\'', '‘', '’', '*', '_', '`', '「', '」',
];

/// Pairs of brackets.
const BRACKETS: [(char, char); 3] = [('(', ')'), ('[', ']'), ('{', '}')];

/// Signs of LaTeX around a text.
const LATEX: [(&str, &str); 6] = [
    ("\\boxed{", "}"),
    ("\\text{", "}"),
    ("\\textbf{", "}"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("$", "$"),
];

/// Returns whether a character may follow an answer without being a part of it.
pub(super) fn is_end(c: char) -> bool {
    let closes = BRACKETS.iter().any(|(_, close)| *close == c);
    c.is_whitespace() || ENDS.contains(&c) || AROUND.contains(&c) || closes || "$|<#\\".contains(c)
}

/// Returns the first line of a text that begins with white space or not.
pub(super) fn first_line(text: &str) -> &str {
    text.trim_start().lines().next().unwrap_or("").trim_end()
}

/// Returns a text in lower case with single spaces, and with the plain forms of quotes and minus.
pub(super) fn folded(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let plain = |c: char| match c {
        '‘' | '’' => '\'',
        '“' | '”' | '„' => '"',
        '−' => '-',
        c => c,
    };
    let text: String = words.join(" ").chars().map(plain).collect();
    text.to_lowercase()
}

/// Returns the unit behind a number as it is compared: `a.m.` is `am`.
pub(super) fn unit(text: &str) -> String {
    folded(text).replace("a.m", "am").replace("p.m", "pm")
}

/// Returns the inside of a text in brackets, if it is one word.
fn unwrapped(text: &str) -> Option<&str> {
    let (open, close) = BRACKETS.iter().find(|(open, _)| text.starts_with(*open))?;
    let inside = text.strip_prefix(*open)?.strip_suffix(*close)?.trim();
    let is_word = !inside.is_empty() && inside.chars().all(char::is_alphanumeric);
    is_word.then_some(inside)
}

/// Removes what stands around a text: quotes, brackets around a word, the point at its end. Keeps
/// what consists of such signs alone.
pub(super) fn stripped(text: &str) -> &str {
    let text = text.trim();
    let mut now = text;
    loop {
        let mut next = now.trim_matches(AROUND).trim();
        next = next.trim_end_matches(ENDS).trim_end();
        next = unwrapped(next).unwrap_or(next);
        // Options are also written as `B)`.
        if !next.contains(BRACKETS.map(|(open, _)| open)) {
            next = next.trim_end_matches(BRACKETS.map(|(_, close)| close));
            next = next.trim_end();
        }
        for (open, close) in LATEX {
            let inside = next.strip_prefix(open).and_then(|t| t.strip_suffix(close));
            next = inside.map_or(next, str::trim);
        }
        if next == now {
            break;
        }
        now = next;
    }
    if now.is_empty() { text } else { now }
}

/// A text as it is compared.
pub(super) struct Writing(String);

/// Returns a text as it is compared, or `None` if it is empty.
pub(super) fn writing(text: &str) -> Option<Writing> {
    let folded = folded(stripped(text));
    (!folded.is_empty()).then_some(Writing(folded))
}

impl Writing {
    /// Returns whether a line begins with this text. If `only`, nothing may follow it.
    pub fn begins(&self, line: &str, only: bool) -> bool {
        begins(&folded(line), &self.0, only)
    }
}

/// Returns whether a folded line begins with a folded text, and the text ends there. If `only`, so
/// does the line.
pub(super) fn begins(line: &str, text: &str, only: bool) -> bool {
    let Some(rest) = line.strip_prefix(text) else {
        return false;
    };
    if only {
        return rest.trim_matches(is_end).is_empty();
    }
    let mut chars = rest.chars();
    match chars.next() {
        None => true,
        // A part in brackets, or after a dash, explains the answer.
        Some(' ') => chars
            .next()
            .is_none_or(|c| is_end(c) || "([-–—".contains(c)),
        Some(c) => is_end(c) && !chars.next().is_some_and(char::is_alphanumeric),
    }
}

/// Returns a line as it stands, and without each of the signs that it begins with: quotes, a
/// bracket around a word, commands of LaTeX.
pub(super) fn readings(line: &str) -> impl Iterator<Item = &str> {
    let mut next = Some(line.trim());
    std::iter::from_fn(move || {
        let now = next?;
        let without = LATEX.iter().find_map(|(open, _)| now.strip_prefix(open));
        // A `$` before a number may be that of a currency.
        let starts_number = |c: char| c.is_ascii_digit() || matches!(c, '.' | '-' | '+' | '−');
        let without = without.filter(|_| {
            !now.strip_prefix('$')
                .is_some_and(|t| t.starts_with(starts_number))
        });
        let without = without.or_else(|| now.strip_prefix(AROUND));
        let without = without.or_else(|| {
            let (_, close) = BRACKETS.iter().find(|(open, _)| now.starts_with(*open))?;
            let inside = &now[1..];
            let word = inside.split(*close).next()?.trim();
            let is_word = !word.is_empty() && word.chars().all(char::is_alphanumeric);
            (is_word && inside.contains(*close)).then_some(inside)
        });
        next = without.map(str::trim_start);
        Some(now)
    })
}
