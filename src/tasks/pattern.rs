//! Regular expressions of a task's description: sizes and work are bounded, because a description
//! may come from strangers.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use regex::{Captures, Regex, RegexBuilder};

/// Longest expression, in bytes. Parsing takes up to some kilobytes for each.
const MAX_LEN: usize = 2000;

/// Sizes of a compiled expression that are tried one after another, in bytes. Searching a byte
/// costs up to a step for each part of it.
const SIZES: [usize; 4] = [1 << 14, 1 << 16, 1 << 18, 1 << 20];

/// Bytes of a compiled expression that one unit of work pays for when a byte is searched.
const SEARCHED: u64 = 1 << 18;

/// Bytes of a compiled expression that one unit of work pays for when it is made.
const MADE: u64 = 1 << 6;

/// Most expressions that are kept.
const KEPT: usize = 64;

/// A compiled regular expression.
#[derive(Clone)]
pub(super) struct Pattern {
    regex: Regex,
    size: usize,
}

impl Pattern {
    /// Compiles an expression.
    ///
    /// # Errors
    /// Returns a sentence if it is not valid, or larger than any that a task needs.
    pub fn new(pattern: &str) -> Result<Self, String> {
        if pattern.len() > MAX_LEN {
            let len = pattern.len();
            return Err(format!(
                "a regular expression of {len} bytes, more than {MAX_LEN}"
            ));
        }
        let mut reason = String::new();
        for size in SIZES {
            let mut builder = RegexBuilder::new(pattern);
            match builder.size_limit(size).dfa_size_limit(size).build() {
                Ok(regex) => return Ok(Self { regex, size }),
                Err(error) => reason = error.to_string(),
            }
        }
        Err(reason)
    }

    /// The expression.
    pub fn regex(&self) -> &Regex {
        &self.regex
    }

    /// Returns what making the expression and searching `len` bytes costs, in units of work.
    pub fn cost(&self, len: usize) -> u64 {
        let size = self.size as u64;
        let searched = (len as u64).saturating_mul(size) / SEARCHED;
        searched.saturating_add(size / MADE)
    }

    /// Replaces the first `count` matches, or all for 0. `pay` is asked before each about the bytes
    /// that it adds at most.
    ///
    /// # Errors
    /// Returns the errors of `pay`.
    pub fn replace<E>(
        &self,
        text: &str,
        with: &Replacement,
        count: usize,
        mut pay: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<String, E> {
        let mut out = String::with_capacity(text.len());
        let (mut end, mut owed) = (0, 0_u64);
        let most = if count == 0 { usize::MAX } else { count };
        for captures in self.regex.captures_iter(text).take(most) {
            let Some(whole) = captures.get(0) else {
                continue;
            };
            // Small sums would be paid as nothing.
            owed = owed
                .saturating_add(with.most(whole.len()))
                .saturating_add(1);
            if owed >= 1024 {
                pay(std::mem::take(&mut owed))?;
            }
            out.push_str(&text[end..whole.start()]);
            with.write(&captures, &mut out);
            end = whole.end();
        }
        out.push_str(&text[end..]);
        Ok(out)
    }
}

/// What takes the place of a match.
#[derive(Clone, Debug)]
pub(super) struct Replacement {
    /// In the syntax of the regex crate.
    text: String,
    n_references: usize,
}

impl Replacement {
    /// Converts Python's references to groups, such as `\1`, to those of the regex crate.
    pub fn new(text: &str) -> Self {
        let mut out = String::with_capacity(text.len());
        let mut chars = text.chars().peekable();
        let mut n_references = 0;
        while let Some(c) = chars.next() {
            match (c, chars.peek().copied()) {
                ('\\', Some(digit)) if digit.is_ascii_digit() => {
                    out.push_str("${");
                    while let Some(digit) = chars.next_if(char::is_ascii_digit) {
                        out.push(digit);
                    }
                    out.push('}');
                    n_references += 1;
                }
                ('$', _) => out.push_str("$$"),
                _ => out.push(c),
            }
        }
        Self {
            text: out,
            n_references,
        }
    }

    /// Most bytes that are written for a match of a length. A group is a part of the match.
    fn most(&self, len: usize) -> u64 {
        let groups = (self.n_references as u64).saturating_mul(len as u64);
        groups.saturating_add(self.text.len() as u64)
    }

    fn write(&self, captures: &Captures<'_>, out: &mut String) {
        captures.expand(&self.text, out);
    }
}

/// The expressions that were used last.
#[derive(Default)]
pub(super) struct Patterns(Mutex<HashMap<String, Pattern>>);

impl Patterns {
    /// Returns the compiled form of an expression.
    ///
    /// # Errors
    /// Returns the errors of [`Pattern::new`].
    pub fn get(&self, pattern: &str) -> Result<Pattern, String> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.get(pattern) {
            return Ok(found.clone());
        }
        let compiled = Pattern::new(pattern)?;
        if known.len() >= KEPT {
            known.clear();
        }
        known.insert(pattern.to_string(), compiled.clone());
        Ok(compiled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_replace_as_the_regex_crate_does() {
        let free = |_| Ok::<_, String>(());
        for (pattern, with, text) in [
            (r"(\d)(x)?", r"<\1\2\0$>", "a1x2 é3"),
            (r"", "-", "aé"),
            (r"\s*b", "", "a  b b"),
            (r"q", "w", "none"),
        ] {
            let found = Pattern::new(pattern).unwrap();
            let with = Replacement::new(with);
            for count in 0..3 {
                let expected = Regex::new(pattern).unwrap();
                let expected = expected.replacen(text, count, with.text.as_str());
                assert_eq!(found.replace(text, &with, count, free), Ok(expected.into()));
            }
        }
        let all = Pattern::new("(.)").unwrap();
        let with = Replacement::new(&r"\1".repeat(1000));
        let mut left = 100_000_u64;
        let result = all.replace(&"x".repeat(1000), &with, 0, |bytes| {
            left = left.checked_sub(bytes).ok_or("too much")?;
            Ok(())
        });
        assert_eq!(result, Err("too much"));
    }

    #[test]
    fn patterns_have_a_size() {
        for pattern in [
            r"(\w{100}){100}".to_string(),
            "((a{100}){100}){100}".to_string(),
            "a".repeat(MAX_LEN + 1),
            "(".into(),
            "(".repeat(MAX_LEN),
        ] {
            let shown: String = pattern.chars().take(40).collect();
            assert!(Pattern::new(&pattern).is_err(), "{shown}");
        }
        let small = Pattern::new(r"\[.*?\]").unwrap();
        let large = Pattern::new(r"\w{20}").unwrap();
        assert!(small.cost(1 << 20) * 4 < large.cost(1 << 20));
    }
}
