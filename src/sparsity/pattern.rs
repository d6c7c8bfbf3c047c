//! Sparsity patterns: where zeros may be.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The groups in which weights are compared, and how many weights of each group stay.
///
/// A pattern is written as `unstructured:0.5`, `layer:0.5` or `2:4`, also in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Pattern {
    /// Removes the `floor(in * ratio)` lowest scores of each output row (Wanda's comparison group).
    Unstructured {
        /// Share of weights to remove, in 0..=1.
        ratio: f64,
    },
    /// Removes the `floor(out * in * ratio)` lowest scores of the whole matrix. The sparsity of
    /// rows may differ.
    Layer {
        /// Share of weights to remove, in 0..=1.
        ratio: f64,
    },
    /// Keeps the `n` highest scores of each `m` consecutive inputs of a row. A last group of
    /// `g < m` inputs keeps `ceil(n * g / m)`, so no group has more than `n` non-zeros.
    NM {
        /// Number of weights that stay.
        n: usize,
        /// Number of weights per group.
        m: usize,
    },
}

impl Pattern {
    /// Creates the pattern named `name`: `unstructured` and `layer` use `ratio`; `N:M` ignores it.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the name is unknown, `ratio` is outside 0..=1 (also
    /// for N:M), N is larger than M, or M is 0.
    pub fn from_name(name: &str, ratio: f64) -> Result<Self> {
        check_ratio(ratio)?;
        let pattern = match name.trim().to_ascii_lowercase().as_str() {
            "unstructured" => Pattern::Unstructured { ratio },
            "layer" => Pattern::Layer { ratio },
            other => parse_nm(other).ok_or_else(|| unknown(name))?,
        };
        pattern.validate()?;
        Ok(pattern)
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the ratio is NaN or outside 0..=1, N is larger than M,
    /// or M is 0.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Pattern::Unstructured { ratio } | Pattern::Layer { ratio } => check_ratio(ratio),
            Pattern::NM { m: 0, .. } => {
                Err(Error::argument("pattern", self, "M must be at least 1"))
            }
            Pattern::NM { n, m } if n > m => {
                Err(Error::argument("pattern", self, "N must not exceed M"))
            }
            Pattern::NM { .. } => Ok(()),
        }
    }

    /// Returns the same pattern with another ratio. N:M is returned unchanged.
    pub fn with_ratio(self, ratio: f64) -> Self {
        match self {
            Pattern::Unstructured { .. } => Pattern::Unstructured { ratio },
            Pattern::Layer { .. } => Pattern::Layer { ratio },
            Pattern::NM { .. } => self,
        }
    }

    /// Number of consecutive columns that form a group for any size of the matrix: M for N:M,
    /// otherwise 1.
    pub(crate) fn group(&self) -> usize {
        match *self {
            Pattern::NM { m, .. } => m.max(1),
            _ => 1,
        }
    }

    /// Share of weights that the pattern removes from a large matrix, in 0..=1.
    pub fn ratio(&self) -> f64 {
        match *self {
            Pattern::Unstructured { ratio } | Pattern::Layer { ratio } => ratio,
            Pattern::NM { m: 0, .. } => 0.0,
            Pattern::NM { n, m } => 1.0 - n as f64 / m as f64,
        }
    }
}

fn check_ratio(ratio: f64) -> Result<()> {
    // The range does not contain NaN.
    if (0.0..=1.0).contains(&ratio) {
        return Ok(());
    }
    Err(Error::argument(
        "sparsity",
        ratio,
        "a share in 0..=1 is needed",
    ))
}

fn parse_nm(s: &str) -> Option<Pattern> {
    let (n, m) = s.split_once(':')?;
    Some(Pattern::NM {
        n: n.trim().parse().ok()?,
        m: m.trim().parse().ok()?,
    })
}

fn unknown(found: &str) -> Error {
    Error::argument(
        "pattern",
        format!("{found:?}"),
        "unstructured, layer (each with a ratio), or N:M such as 2:4",
    )
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::Unstructured { ratio } => write!(f, "unstructured:{ratio}"),
            Pattern::Layer { ratio } => write!(f, "layer:{ratio}"),
            Pattern::NM { n, m } => write!(f, "{n}:{m}"),
        }
    }
}

impl FromStr for Pattern {
    type Err = Error;

    /// Parses the format of [`Display`](fmt::Display): `unstructured:0.5`, `layer:0.5`, `2:4`.
    fn from_str(s: &str) -> Result<Self> {
        let (head, tail) = s.split_once(':').ok_or_else(|| unknown(s))?;
        match head.trim().to_ascii_lowercase().as_str() {
            name @ ("unstructured" | "layer") => {
                let ratio = tail
                    .trim()
                    .parse()
                    .map_err(|_| Error::argument("sparsity", tail, "a number is needed"))?;
                Self::from_name(name, ratio)
            }
            _ => Self::from_name(s, 0.0),
        }
    }
}

impl TryFrom<String> for Pattern {
    type Error = Error;

    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<Pattern> for String {
    fn from(p: Pattern) -> Self {
        p.to_string()
    }
}
