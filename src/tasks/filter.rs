//! What is made of an output, and when it equals a reference.

use regex::Regex;

use super::encode::is_space;
use super::spec::{FilterStep, MetricSpec};
use crate::error::{Error, Result};

/// Compiles a regular expression of a task.
fn compiled(pattern: &str) -> Result<Regex> {
    let expected = |e: regex::Error| {
        let reason = e.to_string();
        format!("a regular expression of the regex crate: {reason}")
    };
    Regex::new(pattern).map_err(|e| Error::argument("regex_pattern", pattern, expected(e)))
}

/// The steps of a filter.
pub(super) struct Filter(Vec<(FilterStep, Option<Regex>)>);

impl Filter {
    pub fn new(steps: &[FilterStep]) -> Result<Self> {
        let with_regex = |step: &FilterStep| {
            let regex = match step {
                FilterStep::Regex { regex_pattern, .. }
                | FilterStep::RegexReplace { regex_pattern, .. } => Some(compiled(regex_pattern)?),
                _ => None,
            };
            Ok((step.clone(), regex))
        };
        Ok(Self(steps.iter().map(with_regex).collect::<Result<_>>()?))
    }

    pub fn apply(&self, output: &str) -> String {
        self.0
            .iter()
            .fold(output.to_string(), |text, (step, regex)| {
                match (step, regex) {
                    (
                        FilterStep::Regex {
                            group_select,
                            fallback,
                            ..
                        },
                        Some(regex),
                    ) => select(regex, &text, *group_select).unwrap_or_else(|| fallback.clone()),
                    (FilterStep::RegexReplace { replacement, .. }, Some(regex)) => {
                        let with = super::template::replacement(replacement);
                        regex.replace_all(&text, &*with).into_owned()
                    }
                    (FilterStep::Strip, _) => text.trim_matches(is_space).to_string(),
                    (FilterStep::Lowercase, _) => text.to_lowercase(),
                    _ => text,
                }
            })
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
    ignored: Vec<Regex>,
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
        for regex in &self.ignored {
            text = regex.replace_all(&text, "").into_owned();
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
