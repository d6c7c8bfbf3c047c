//! Which weights to remove: magnitude and Wanda scores, patterns, masks; which channels and heads matter.
//!
//! Wanda: "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695). Everything here is a pure
//! function of a weight matrix `[out, in]` and of statistics of the layer's input; the pass over calibration data that
//! gathers those lives elsewhere. Departures: N:M means "at most N of M stay" (as hardware names it), where Wanda's code
//! counts the pruned ones; for 2:4 and 4:8 the two agree. A last group shorter than M keeps its share, rounded up.

mod channels;
mod mask;
mod norms;
mod pattern;

pub use channels::{ChannelScore, UnitPart, activation_scores, importance_order, l1_scores, l2_scores, sum_units};
pub use mask::Mask;
pub use norms::InputNorms;
pub use pattern::Pattern;

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::linalg::Matrix;

/// How weights are ranked before the least important ones are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// By absolute value; needs no data.
    Magnitude,
    /// By absolute value times the norm of the input column (Wanda); needs [`InputNorms`].
    Wanda,
}

impl Method {
    /// Every method, for help texts.
    pub const ALL: [Method; 2] = [Method::Magnitude, Method::Wanda];

    /// Whether the method needs statistics of the layer's input.
    pub fn needs_calibration(self) -> bool {
        self == Method::Wanda
    }

    /// Scores of every weight of `weight` `[out, in]`; the smaller, the sooner it is removed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where Wanda is given no `norms`; [`Error::ShapeMismatch`] where they are of another width.
    pub fn scores(self, weight: &Matrix, norms: Option<&InputNorms>) -> Result<Matrix> {
        match (self, norms) {
            (Method::Magnitude, _) => Ok(magnitude_scores(weight)),
            (Method::Wanda, Some(norms)) => wanda_scores(weight, &norms.mean_sq_norms()),
            (Method::Wanda, None) => {
                Err(Error::argument("norms", "none", "Wanda needs the norms of the layer's input"))
            }
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Method::Magnitude => "magnitude",
            Method::Wanda => "wanda",
        })
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let found = Method::ALL.into_iter().find(|m| m.to_string().eq_ignore_ascii_case(s.trim()));
        found.ok_or_else(|| Error::argument("method", format!("{s:?}"), "one of magnitude, wanda"))
    }
}

/// `|w|` for every weight.
///
/// # Shapes
/// `weight` and the result: `[out, in]`.
pub fn magnitude_scores(weight: &Matrix) -> Matrix {
    let mut scores = weight.clone();
    scores.as_mut_slice().par_iter_mut().for_each(|v| *v = v.abs());
    scores
}

/// `|w| * sqrt(mean ||x_j||^2)` for every weight, in `f32` as Wanda's own code computes it.
///
/// # Shapes
/// `weight` and the result: `[out, in]`; `input_sq_norms`: `[in]`, from [`InputNorms::mean_sq_norms`].
///
/// # Errors
/// [`Error::ShapeMismatch`] where `input_sq_norms` has another length than `weight` has columns; [`Error::NotFinite`]
/// where one of them is negative, NaN or infinite.
pub fn wanda_scores(weight: &Matrix, input_sq_norms: &[f32]) -> Result<Matrix> {
    if input_sq_norms.len() != weight.cols() {
        return Err(Error::ShapeMismatch {
            what: "input norms, one per column of the weight".into(),
            expected: vec![weight.cols()],
            found: vec![input_sq_norms.len()],
        });
    }
    if let Some(index) = input_sq_norms.iter().position(|v| !v.is_finite() || *v < 0.0) {
        return Err(Error::NotFinite { tensor: "input norms".into(), index, value: input_sq_norms[index] });
    }
    let mut scores = weight.clone();
    if weight.cols() == 0 {
        return Ok(scores);
    }
    let norms: Vec<f32> = input_sq_norms.iter().map(|v| v.sqrt()).collect();
    scores.as_mut_slice().par_chunks_mut(norms.len()).for_each(|row| {
        for (v, norm) in row.iter_mut().zip(&norms) {
            *v = v.abs() * norm;
        }
    });
    Ok(scores)
}

/// Removes from `weight` what `pattern` says, least `scores` first, and returns the mask of what stays.
///
/// The result depends on nothing but the arguments: ties go by column (by row-major index for [`Pattern::Layer`]), the lower
/// one is removed first, at any number of threads. O(out * in).
///
/// # Shapes
/// `weight`, `scores` and the mask: `[out, in]`.
///
/// # Errors
/// [`Error::ShapeMismatch`] where the shapes differ, and whatever [`Mask::from_scores`] returns. `weight` is then unchanged.
pub fn prune(weight: &mut Matrix, scores: &Matrix, pattern: &Pattern) -> Result<Mask> {
    if (weight.rows(), weight.cols()) != (scores.rows(), scores.cols()) {
        return Err(Error::ShapeMismatch {
            what: "scores of a weight".into(),
            expected: vec![weight.rows(), weight.cols()],
            found: vec![scores.rows(), scores.cols()],
        });
    }
    let mask = Mask::from_scores(scores, pattern)?;
    mask.apply(weight)?;
    Ok(mask)
}

#[cfg(test)]
mod tests;
