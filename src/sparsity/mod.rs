//! Pruning of weight matrices: magnitude, Wanda and RIA scores, SparseGPT, sparsity patterns and
//! masks.
//!
//! Wanda: "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695).
//! RIA: "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models" (ICLR
//! 2024). SparseGPT: see `sparsegpt`.
//!
//! Everything here is a pure function of a weight matrix `[out, in]` and of statistics of the
//! layer's input. The pass over calibration data that collects the statistics is not in this
//! module.
//!
//! Departures: N:M means that at most N of M weights stay, as in hardware, whereas Wanda's code
//! counts the pruned weights; for 2:4 and 4:8 both are the same. A last group shorter than M keeps
//! its share, rounded up.

pub(crate) mod compensate;
mod mask;
mod norms;
mod owl;
mod pattern;
mod sparsegpt;

pub use mask::Mask;
pub use norms::InputNorms;
pub use owl::OwlConfig;
pub(crate) use owl::outlier_share;
pub use pattern::Pattern;
pub use sparsegpt::{SparseGptConfig, sparsegpt};

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::linalg::Matrix;

/// How the importance of weights is determined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// The absolute value; needs no data.
    Magnitude,
    /// The absolute value times the norm of the input column (Wanda); needs [`InputNorms`].
    Wanda,
    /// The weight's share of the absolute values of its row and of its column, times the square
    /// root of the norm of the input column (RIA); needs [`InputNorms`].
    Ria,
    /// The error that removing the weight causes after the remaining weights have been adjusted to
    /// compensate. This method needs a Hessian, and also adjusts the weights. It is `sparsegpt`,
    /// and has no scores.
    SparseGpt,
}

impl Method {
    /// All methods, for help texts.
    pub const ALL: [Method; 4] = [
        Method::Magnitude,
        Method::Wanda,
        Method::Ria,
        Method::SparseGpt,
    ];

    /// Whether the method needs statistics of the layer's input.
    pub fn needs_calibration(self) -> bool {
        self != Method::Magnitude
    }

    /// Computes a score for every element of `weight` `[out, in]`. The lowest scores are removed
    /// first.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if Wanda or RIA has no `norms`, and for SparseGPT.
    /// Returns [`Error::ShapeMismatch`] if `norms` has another width than `weight`.
    pub fn scores(self, weight: &Matrix, norms: Option<&InputNorms>) -> Result<Matrix> {
        match (self, norms) {
            (Method::Magnitude, _) => Ok(magnitude_scores(weight)),
            (Method::Wanda, Some(norms)) => wanda_scores(weight, &norms.mean_sq_norms()),
            (Method::Ria, Some(norms)) => ria_scores(weight, &norms.mean_sq_norms()),
            (Method::Wanda | Method::Ria, None) => Err(Error::argument(
                "norms",
                "none",
                format!("{self} needs the norms of the layer's input"),
            )),
            (Method::SparseGpt, _) => Err(Error::argument(
                "method",
                self,
                "it changes weights as it goes, and has no scores to give",
            )),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Method::Magnitude => "magnitude",
            Method::Wanda => "wanda",
            Method::Ria => "ria",
            Method::SparseGpt => "sparsegpt",
        })
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let found = Method::ALL
            .into_iter()
            .find(|m| m.to_string().eq_ignore_ascii_case(s.trim()));
        found.ok_or_else(|| {
            Error::argument(
                "method",
                format!("{s:?}"),
                "one of magnitude, wanda, ria, sparsegpt",
            )
        })
    }
}

/// Computes `|w|` for every weight.
///
/// # Shapes
/// `weight` and the result: `[out, in]`.
#[doc(hidden)]
pub fn magnitude_scores(weight: &Matrix) -> Matrix {
    let mut scores = weight.clone();
    scores
        .as_mut_slice()
        .par_iter_mut()
        .for_each(|v| *v = v.abs());
    scores
}

/// Computes `|w| * sqrt(mean ||x_j||^2)` for every weight, in `f32` as in Wanda's own code.
///
/// # Shapes
/// `weight` and the result: `[out, in]`; `input_sq_norms`: `[in]`, from
/// [`InputNorms::mean_sq_norms`].
///
/// # Errors
/// Returns [`Error::ShapeMismatch`] if the length of `input_sq_norms` is not the number of columns
/// of `weight`, and [`Error::NotFinite`] if one of its values is negative, NaN or infinite.
fn wanda_scores(weight: &Matrix, input_sq_norms: &[f32]) -> Result<Matrix> {
    check_norms(weight, input_sq_norms)?;
    let mut scores = weight.clone();
    if weight.cols() == 0 {
        return Ok(scores);
    }
    let norms: Vec<f32> = input_sq_norms.iter().map(|v| v.sqrt()).collect();
    scores
        .as_mut_slice()
        .par_chunks_mut(norms.len())
        .for_each(|row| {
            for (v, norm) in row.iter_mut().zip(&norms) {
                *v = v.abs() * norm;
            }
        });
    Ok(scores)
}

/// Computes `(|w_ij| / sum_j |w_ij| + |w_ij| / sum_i |w_ij|) * (mean ||x_j||^2)^(1/4)` for every
/// weight.
///
/// The first factor is the weight's share of its row and of its column, so no input or output loses
/// all its weights.
///
/// # Shapes
/// `weight` and the result: `[out, in]`; `input_sq_norms`: `[in]`, from
/// [`InputNorms::mean_sq_norms`].
///
/// # Errors
/// Returns the errors of [`wanda_scores`].
fn ria_scores(weight: &Matrix, input_sq_norms: &[f32]) -> Result<Matrix> {
    check_norms(weight, input_sq_norms)?;
    let mut scores = weight.clone();
    if weight.cols() == 0 {
        return Ok(scores);
    }
    let mut columns = vec![0.0_f64; weight.cols()];
    for i in 0..weight.rows() {
        columns
            .iter_mut()
            .zip(weight.row(i))
            .for_each(|(sum, v)| *sum += f64::from(v.abs()));
    }
    // The weights of an empty row or column are all 0, and their score is 0 with any divisor.
    let inverse = |sum: f64| if sum > 0.0 { (1.0 / sum) as f32 } else { 0.0 };
    let columns: Vec<f32> = columns.into_iter().map(inverse).collect();
    let norms: Vec<f32> = input_sq_norms.iter().map(|v| v.sqrt().sqrt()).collect();
    scores
        .as_mut_slice()
        .par_chunks_mut(norms.len())
        .for_each(|row| {
            let in_row = inverse(row.iter().map(|v| f64::from(v.abs())).sum());
            for ((v, in_column), norm) in row.iter_mut().zip(&columns).zip(&norms) {
                *v = v.abs() * (in_row + in_column) * norm;
            }
        });
    Ok(scores)
}

fn check_norms(weight: &Matrix, input_sq_norms: &[f32]) -> Result<()> {
    if input_sq_norms.len() != weight.cols() {
        return Err(Error::ShapeMismatch {
            what: "input norms, one per column of the weight".into(),
            expected: vec![weight.cols()],
            found: vec![input_sq_norms.len()],
        });
    }
    if let Some(index) = input_sq_norms
        .iter()
        .position(|v| !v.is_finite() || *v < 0.0)
    {
        return Err(Error::NotFinite {
            tensor: "input norms".into(),
            index,
            value: input_sq_norms[index],
        });
    }
    Ok(())
}

/// Removes the weights with the lowest `scores` from `weight`, as many as `pattern` requires, and
/// returns the mask of those that stay.
///
/// The result depends only on the arguments, with any number of threads. Of equal scores, the lower
/// column is removed first (the lower row-major index for [`Pattern::Layer`]). The cost is O(out *
/// in).
///
/// # Shapes
/// `weight`, `scores` and the mask: `[out, in]`.
///
/// # Errors
/// Returns [`Error::ShapeMismatch`] if the shapes differ, and the errors of [`Mask::from_scores`].
/// `weight` is then unchanged.
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
