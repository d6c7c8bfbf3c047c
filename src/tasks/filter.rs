//! What is made of an output, and when it equals a reference.

use regex::Regex;

use super::encode::is_space;
use super::pattern::{Pattern, Replacement};
use super::spec::{FilterStep, MetricSpec};
use crate::error::{Error, Result};

/// Compiles a regular expression of a task.
fn compiled(pattern: &str) -> Result<Pattern> {
    let expected = |reason| format!("a regular expression of the regex crate: {reason}");
    Pattern::new(pattern).map_err(|reason| {
        let shown: String = pattern.chars().take(80).collect();
        Error::argument("regex_pattern", shown, expected(reason))
    })
}

/// Most bytes that a filter makes of an output, and that for each of its bytes.
const GROWTH: (usize, usize) = (1 << 16, 16);

/// The steps of a filter.
pub(super) struct Filter(Vec<Step>);

enum Step {
    Select(Pattern, i64, String),
    Replace(Pattern, Replacement),
    Strip,
    Lowercase,
}

impl Filter {
    pub fn new(steps: &[FilterStep]) -> Result<Self> {
        let step = |step: &FilterStep| {
            Ok(Some(match step {
                FilterStep::Regex {
                    regex_pattern,
                    group_select,
                    fallback,
                } => Step::Select(compiled(regex_pattern)?, *group_select, fallback.clone()),
                FilterStep::RegexReplace {
                    regex_pattern,
                    replacement,
                } => Step::Replace(compiled(regex_pattern)?, Replacement::new(replacement)),
                FilterStep::Strip => Step::Strip,
                FilterStep::Lowercase => Step::Lowercase,
                FilterStep::TakeFirst => return Ok(None),
            }))
        };
        let steps = steps.iter().filter_map(|one| step(one).transpose());
        Ok(Self(steps.collect::<Result<_>>()?))
    }

    /// Returns what the filter makes of an output.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the text grows beyond what comparing needs.
    pub fn apply(&self, output: &str) -> Result<String> {
        let most = output
            .len()
            .saturating_mul(GROWTH.1)
            .saturating_add(GROWTH.0);
        let mut left = most as u64;
        let mut text = output.to_string();
        for step in &self.0 {
            text = match step {
                Step::Select(pattern, index, fallback) => {
                    select(pattern.regex(), &text, *index).unwrap_or_else(|| fallback.clone())
                }
                Step::Replace(pattern, with) => pattern.replace(&text, with, 0, |bytes| {
                    left = left.checked_sub(bytes).ok_or_else(|| {
                        let expected = format!("no more than {most} bytes of replaced text");
                        Error::argument("filter_list", "replacements that grow", expected)
                    })?;
                    Ok(())
                })?,
                Step::Strip => text.trim_matches(is_space).to_string(),
                Step::Lowercase => text.to_lowercase(),
            };
        }
        Ok(text)
    }
}

/// Returns match `index` of those that Python's `findall` finds, without white space around it.
fn select(regex: &Regex, text: &str, index: i64) -> Option<String> {
    let of_groups = |captures: regex::Captures<'_>| {
        let groups: Vec<&str> = captures
            .iter()
            .skip(usize::from(captures.len() > 1))
            .map(|group| group.map_or("", |group| group.as_str()))
            .collect();
        match groups.as_slice() {
            [one] => Some((*one).to_string()),
            several => several
                .iter()
                .find(|g| !g.is_empty())
                .map(|g| (*g).to_string()),
        }
    };
    let all: Vec<Option<String>> = regex.captures_iter(text).map(of_groups).collect();
    let at = match usize::try_from(index) {
        Ok(at) => at,
        Err(_) => all
            .len()
            .checked_sub(usize::try_from(index.unsigned_abs()).ok()?)?,
    };
    let found = all.into_iter().nth(at)??;
    Some(found.trim_matches(is_space).to_string())
}

/// A metric of continuations.
pub(super) struct Match {
    ignored: Vec<Pattern>,
    spec: MetricSpec,
}

impl Match {
    pub fn new(spec: &MetricSpec) -> Result<Self> {
        let ignored = spec
            .regexes_to_ignore
            .iter()
            .map(|pattern| compiled(pattern));
        Ok(Self {
            ignored: ignored.collect::<Result<_>>()?,
            spec: spec.clone(),
        })
    }

    /// Returns whether an output equals a reference.
    pub fn is_match(&self, output: &str, reference: &str) -> bool {
        if self.spec.metric == "number_match" {
            let number = |text: &str| text.trim().parse::<f64>().ok();
            let pair = number(output).zip(number(reference));
            return pair.is_some_and(|(a, b)| (a - b).abs() <= self.spec.tolerance);
        }
        self.plain(output) == self.plain(reference)
    }

    /// Removes what does not count.
    fn plain(&self, text: &str) -> String {
        let mut text = text.to_string();
        for pattern in &self.ignored {
            text = pattern.regex().replace_all(&text, "").into_owned();
        }
        if self.spec.ignore_case {
            text = text.to_lowercase();
        }
        if self.spec.ignore_punctuation {
            text.retain(|c| !c.is_ascii_punctuation());
        }
        text
    }
}
