//! Which weights to remove: magnitude, Wanda and RIA scores, SparseGPT, patterns, masks.
//!
//! Wanda: "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695); RIA: "Plug-and-Play: An
//! Efficient Post-training Pruning Method for Large Language Models" (ICLR 2024); `sparsegpt`. Everything here is a pure
//! function of a weight matrix `[out, in]` and of statistics of the layer's input; the pass over calibration data that
//! gathers those lives elsewhere. Departures: N:M means "at most N of M stay" (as hardware names it), where Wanda's code
//! counts the pruned ones; for 2:4 and 4:8 the two agree. A last group shorter than M keeps its share, rounded up.

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

/// How weights are ranked before the least important ones are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// By absolute value; needs no data.
    Magnitude,
    /// By absolute value times the norm of the input column (Wanda); needs [`InputNorms`].
    Wanda,
    /// By share of the absolute values of row and column, times the root of the input column's norm (RIA); needs
    /// [`InputNorms`].
    Ria,
    /// By what the removal costs once the other weights have made up for it, which they then do; needs a Hessian, and is
    /// `sparsegpt`, not a score.
    SparseGpt,
}

impl Method {
    /// Every method, for help texts.
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

    /// Scores of every weight of `weight` `[out, in]`; the smaller, the sooner it is removed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where Wanda or RIA is given no `norms`, and for SparseGPT; [`Error::ShapeMismatch`] where
    /// they are of another width.
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

/// `|w|` for every weight.
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

/// `|w| * sqrt(mean ||x_j||^2)` for every weight, in `f32` as Wanda's own code computes it.
///
/// # Shapes
/// `weight` and the result: `[out, in]`; `input_sq_norms`: `[in]`, from [`InputNorms::mean_sq_norms`].
///
/// # Errors
/// [`Error::ShapeMismatch`] where `input_sq_norms` has another length than `weight` has columns; [`Error::NotFinite`]
/// where one of them is negative, NaN or infinite.
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

/// `(|w_ij| / sum_j |w_ij| + |w_ij| / sum_i |w_ij|) * (mean ||x_j||^2)^(1/4)` for every weight: how much of its row and of its
/// column it is, so that no input or output loses all its weights.
///
/// # Shapes
/// `weight` and the result: `[out, in]`; `input_sq_norms`: `[in]`, from [`InputNorms::mean_sq_norms`].
///
/// # Errors
/// As [`wanda_scores`].
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
    // An empty row or column has zeros only, which score 0 whatever they are divided by.
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
