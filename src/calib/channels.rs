//! Importance scores of the channels of a block. A channel is one of the MLP's, or a key/value head
//! with its query heads, which spans several rows and columns.
//!
//! A channel consists of rows of some weights `[out, in]`, which write it, and columns of others,
//! which read it. Its score is a sum over these weights: of magnitudes, as in MultiPruner and NNCF,
//! or of Wanda's products (arXiv 2306.11695) over the columns that read it. Departure: NNCF sums
//! one L2 norm per layer; here, L2 is the norm of all weights of a channel.

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::linalg::Matrix;
use crate::sparsity::InputNorms;

/// How channels and heads are scored before they are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChannelScore {
    /// Sum of the absolute weights. Needs no data.
    L1,
    /// Square root of the sum of the squared weights. Needs no data.
    L2,
    /// Magnitude of the channel's contribution to the layer that reads it:
    /// `sum over outputs o of |W[o, j]| * ||x_j||`. Needs calibration.
    Activation,
    /// First-order change of the loss as the channel's weights shrink, `|<w, dL/dw>|`, from a
    /// sketch of the gradient by low-rank adapters. Needs calibration.
    Taylor,
}

impl ChannelScore {
    /// All scores, for help texts.
    pub const ALL: [ChannelScore; 4] = [
        ChannelScore::L1,
        ChannelScore::L2,
        ChannelScore::Activation,
        ChannelScore::Taylor,
    ];

    /// Whether the score needs calibration samples.
    pub fn needs_calibration(self) -> bool {
        matches!(self, ChannelScore::Activation | ChannelScore::Taylor)
    }
}

impl fmt::Display for ChannelScore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ChannelScore::L1 => "l1",
            ChannelScore::L2 => "l2",
            ChannelScore::Activation => "activation",
            ChannelScore::Taylor => "taylor",
        })
    }
}

impl FromStr for ChannelScore {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let found = Self::ALL
            .into_iter()
            .find(|score| score.to_string().eq_ignore_ascii_case(s.trim()));
        found.ok_or_else(|| {
            Error::argument(
                "channel score",
                format!("{s:?}"),
                "one of l1, l2, activation, taylor",
            )
        })
    }
}

/// The scores of a block's channels; larger is more important. MLP and head scores are not
/// comparable with each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct BlockScores {
    /// Score of each MLP channel.
    pub mlp: Vec<f64>,
    /// Score of each key/value head with its query heads.
    pub kv_groups: Vec<f64>,
}

/// The part that channels have in one weight: each channel has the next `width` rows or columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChannelPart<'a> {
    weight: &'a Matrix,
    width: usize,
    columns: bool,
}

impl<'a> ChannelPart<'a> {
    /// Gives each channel the next `width` rows of `weight`, `[out, in]`, which write it.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the rows are not a whole number of channels.
    pub fn rows(weight: &'a Matrix, width: usize) -> Result<Self> {
        Self::new(weight, width, false)
    }

    /// Gives each channel the next `width` columns of `weight`, `[out, in]`, which read it.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the columns are not a whole number of channels.
    pub fn columns(weight: &'a Matrix, width: usize) -> Result<Self> {
        Self::new(weight, width, true)
    }

    fn new(weight: &'a Matrix, width: usize, columns: bool) -> Result<Self> {
        let len = if columns {
            weight.cols()
        } else {
            weight.rows()
        };
        check_width(len, width)?;
        Ok(Self {
            weight,
            width,
            columns,
        })
    }

    fn n_channels(&self) -> usize {
        (if self.columns {
            self.weight.cols()
        } else {
            self.weight.rows()
        }) / self.width
    }

    /// For each channel, the sum of `f(j, w)` over its elements `w`, which are in columns `j`. One
    /// thread computes each sum, in the same order for any number of threads.
    fn sums(&self, f: impl Fn(usize, f32) -> f64 + Sync) -> Vec<f64> {
        // Processes the columns of many channels at once, so that rows are read in contiguous
        // pieces.
        let at_once = if self.columns {
            (256 / self.width).max(1)
        } else {
            1
        };
        let mut sums = vec![0.0; self.n_channels()];
        sums.par_chunks_mut(at_once)
            .enumerate()
            .for_each(|(chunk, sums)| {
                let start = chunk * at_once * self.width;
                let own = start..start + sums.len() * self.width;
                let (rows, columns) = if self.columns {
                    (0..self.weight.rows(), own)
                } else {
                    (own, 0..self.weight.cols())
                };
                let width = if self.columns {
                    self.width
                } else {
                    self.weight.cols().max(1)
                };
                for row in rows {
                    for (channel, values) in self.weight.row(row)[columns.clone()]
                        .chunks(width)
                        .enumerate()
                    {
                        let first = columns.start + channel * width;
                        sums[channel] += values
                            .iter()
                            .enumerate()
                            .map(|(j, w)| f(first + j, *w))
                            .sum::<f64>();
                    }
                }
            });
        sums
    }
}

fn check_width(len: usize, width: usize) -> Result<()> {
    if width == 0 || !len.is_multiple_of(width) {
        return Err(Error::ShapeMismatch {
            what: "rows or columns of whole channels".into(),
            expected: vec![len.checked_div(width).unwrap_or(0), width],
            found: vec![len],
        });
    }
    Ok(())
}

/// Sum of the absolute weights of each channel, over all parts.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if there are no parts, and [`Error::ShapeMismatch`] if they
/// differ in the number of channels.
pub(super) fn l1_scores(parts: &[ChannelPart<'_>]) -> Result<Vec<f64>> {
    sum_parts(parts, |w| f64::from(w).abs())
}

/// Square root of the sum of the squared weights of each channel, over all parts.
///
/// # Errors
/// Returns the errors of [`l1_scores`].
pub(super) fn l2_scores(parts: &[ChannelPart<'_>]) -> Result<Vec<f64>> {
    let mut scores = sum_parts(parts, |w| f64::from(w) * f64::from(w))?;
    scores.iter_mut().for_each(|score| *score = score.sqrt());
    Ok(scores)
}

fn sum_parts(parts: &[ChannelPart<'_>], f: impl Fn(f32) -> f64 + Sync) -> Result<Vec<f64>> {
    let Some(first) = parts.first() else {
        return Err(Error::argument("parts", "none", "at least one"));
    };
    let mut scores = vec![0.0; first.n_channels()];
    for part in parts {
        if part.n_channels() != scores.len() {
            return Err(Error::ShapeMismatch {
                what: "channels of a group of weights".into(),
                expected: vec![scores.len()],
                found: vec![part.n_channels()],
            });
        }
        scores
            .iter_mut()
            .zip(part.sums(|_, w| f(w)))
            .for_each(|(score, sum)| *score += sum);
    }
    Ok(scores)
}

/// Contribution of each channel to the output of the layer that reads it: the sum over its columns
/// `j` and all rows `o` of `|W[o, j]| * sqrt(mean ||x_j||^2)`, which are Wanda's scores.
///
/// # Shapes
/// - `weight`: `[out, in]`, of which each channel has the next `width` columns; `norms`: of the
///   layer's input
///
/// # Errors
/// Returns [`Error::ShapeMismatch`] if the columns are not a whole number of channels, or if
/// `norms` has another width.
pub(super) fn activation_scores(
    weight: &Matrix,
    width: usize,
    norms: &InputNorms,
) -> Result<Vec<f64>> {
    let part = ChannelPart::columns(weight, width)?;
    if norms.d_input() != weight.cols() {
        return Err(Error::ShapeMismatch {
            what: "input norms, one per column of the weight".into(),
            expected: vec![weight.cols()],
            found: vec![norms.d_input()],
        });
    }
    let norms: Vec<f64> = norms
        .mean_sq_norms()
        .iter()
        .map(|v| f64::from(*v).sqrt())
        .collect();
    Ok(part.sums(|j, w| f64::from(w).abs() * norms[j]))
}

/// Sums each `width` consecutive values, which turns scores of rows into scores of channels.
///
/// # Errors
/// Returns [`Error::ShapeMismatch`] if the values are not a whole number of channels.
pub(super) fn sum_channels(values: &[f32], width: usize) -> Result<Vec<f64>> {
    check_width(values.len(), width)?;
    Ok(values
        .chunks_exact(width)
        .map(|channel| channel.iter().map(|v| f64::from(*v)).sum())
        .collect())
}

/// The order that puts the most important channels first: position `i` is for channel `order[i]`.
/// Equally important channels keep their order.
///
/// # Errors
/// Returns [`Error::NotFinite`] if a score is NaN or infinite.
pub(super) fn importance_order(scores: &[f64]) -> Result<Vec<usize>> {
    if let Some(index) = scores.iter().position(|score| !score.is_finite()) {
        return Err(Error::NotFinite {
            tensor: "channel scores".into(),
            index,
            value: scores[index] as f32,
        });
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // All scores are finite, and -0 equals 0.
    order.sort_by(|a, b| {
        scores[*b]
            .partial_cmp(&scores[*a])
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0f32..1.0))
    }

    #[test]
    fn scores_are_sums_over_what_a_channel_owns() {
        // Seven channels: three rows each of one weight, one row of another, two columns of a
        // third.
        let (a, b, c) = (random(21, 5, 1), random(7, 9, 2), random(11, 14, 3));
        let parts = [
            ChannelPart::rows(&a, 3).unwrap(),
            ChannelPart::rows(&b, 1).unwrap(),
            ChannelPart::columns(&c, 2).unwrap(),
        ];
        let (l1, l2) = (l1_scores(&parts).unwrap(), l2_scores(&parts).unwrap());
        let mut norms = InputNorms::new(14);
        let x = random(10, 14, 4);
        norms.update(x.as_slice(), 2).unwrap();
        let activation = activation_scores(&c, 2, &norms).unwrap();
        for channel in 0..7 {
            let mut own: Vec<f64> = Vec::new();
            (0..21)
                .filter(|i| i / 3 == channel)
                .for_each(|i| own.extend(a.row(i).iter().map(|v| f64::from(*v))));
            own.extend(b.row(channel).iter().map(|v| f64::from(*v)));
            (0..11).for_each(|o| {
                own.extend(
                    c.row(o)[2 * channel..2 * channel + 2]
                        .iter()
                        .map(|v| f64::from(*v)),
                )
            });
            assert!((l1[channel] - own.iter().map(|v| v.abs()).sum::<f64>()).abs() < 1e-9);
            assert!((l2[channel] - own.iter().map(|v| v * v).sum::<f64>().sqrt()).abs() < 1e-9);
            let expected: f64 = (2 * channel..2 * channel + 2)
                .map(|j| {
                    let norm =
                        ((0..10).map(|t| f64::from(x.row(t)[j]).powi(2)).sum::<f64>() / 2.0).sqrt();
                    (0..11)
                        .map(|o| f64::from(c.row(o)[j]).abs() * norm)
                        .sum::<f64>()
                })
                .sum();
            assert!((activation[channel] - expected).abs() < 1e-5);
        }
        let pools = [1, 3].map(|n| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(n)
                .build()
                .unwrap()
        });
        let [one, three] = pools.map(|pool| pool.install(|| l1_scores(&parts).unwrap()));
        assert_eq!(one, three);
        assert_eq!(
            sum_channels(&[0.5, 1.0, -2.0, 4.0, 0.25, 0.0], 3).unwrap(),
            [-0.5, 4.25]
        );
    }

    #[test]
    fn order_is_descending_and_stable() {
        assert_eq!(
            importance_order(&[1.0, 3.0, 0.0, 3.0, -0.0, 1.0]).unwrap(),
            [1, 3, 0, 5, 2, 4]
        );
        assert_eq!(importance_order(&[]).unwrap(), Vec::<usize>::new());
        assert!(matches!(
            importance_order(&[1.0, f64::NAN]),
            Err(Error::NotFinite { index: 1, .. })
        ));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (a, b) = (random(21, 5, 1), random(7, 9, 2));
        assert!(ChannelPart::rows(&a, 4).is_err() && ChannelPart::rows(&a, 0).is_err());
        assert!(ChannelPart::columns(&b, 2).is_err());
        assert!(l1_scores(&[]).is_err());
        let parts = [
            ChannelPart::rows(&a, 7).unwrap(),
            ChannelPart::rows(&b, 1).unwrap(),
        ];
        assert!(matches!(
            l2_scores(&parts),
            Err(Error::ShapeMismatch { .. })
        ));
        assert!(activation_scores(&b, 3, &InputNorms::new(8)).is_err());
        assert!(sum_channels(&[1.0; 5], 2).is_err());
        for score in ChannelScore::ALL {
            assert_eq!(score.to_string().parse::<ChannelScore>().unwrap(), score);
            assert_eq!(
                serde_json::to_string(&score).unwrap(),
                format!("\"{score}\"")
            );
        }
        assert!("l3".parse::<ChannelScore>().is_err());
    }
}
