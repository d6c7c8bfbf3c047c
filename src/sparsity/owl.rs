//! OWL: the blocks of a model that have more outliers keep more of their weights.
//!
//! "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
//! Sparsity" (arXiv 2310.05175).

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::linalg::Matrix;

/// Settings of OWL.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OwlConfig {
    /// Threshold of outliers: a weight is an outlier if its score is more than this many times the
    /// mean of its block's scores (the paper's M).
    pub threshold: f64,
    /// Approximate maximum distance of a block's ratio from the model's. The smallest and the
    /// largest ratio are twice this apart (the paper's lambda).
    pub spread: f64,
}

impl Default for OwlConfig {
    fn default() -> Self {
        Self {
            threshold: 5.0,
            spread: 0.08,
        }
    }
}

impl OwlConfig {
    /// Creates the paper's settings: a threshold of 5 times the mean, and a spread of 0.08.
    pub fn new() -> Self {
        Self::default()
    }

    setters! {
        with_threshold(threshold: f64);
        with_spread(spread: f64);
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the threshold is not finite or not positive, or the
    /// spread is outside 0..=0.5.
    pub fn validate(&self) -> Result<()> {
        if !(self.threshold.is_finite() && self.threshold > 0.0) {
            return Err(Error::argument(
                "threshold",
                self.threshold,
                "finite and positive",
            ));
        }
        if !(0.0..=0.5).contains(&self.spread) {
            return Err(Error::argument("spread", self.spread, "in 0..=0.5"));
        }
        Ok(())
    }

    /// Computes the ratio of weights to remove from each block, from the blocks' shares of
    /// outliers. The ratio decreases linearly with the share; the extremes are `2 spread` apart,
    /// and the mean is `ratio`.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the settings are invalid, a share is not finite, or a
    /// block's ratio is outside 0..=1.
    pub fn ratios(&self, shares: &[f64], ratio: f64) -> Result<Vec<f64>> {
        self.validate()?;
        if let Some(share) = shares.iter().find(|share| !share.is_finite()) {
            return Err(Error::argument("share of outliers", share, "finite"));
        }
        let (min, max) = shares
            .iter()
            .fold((f64::MAX, f64::MIN), |(min, max), share| {
                (min.min(*share), max.max(*share))
            });
        let width = if max > min {
            2.0 * self.spread / (max - min)
        } else {
            0.0
        };
        let mean = shares.iter().sum::<f64>() / shares.len().max(1) as f64;
        let ratios: Vec<f64> = shares
            .iter()
            .map(|share| ratio - (share - mean) * width)
            .collect();
        match ratios.iter().find(|ratio| !(0.0..=1.0).contains(*ratio)) {
            Some(found) => {
                let expected = format!(
                    "in 0..=1; a ratio of {ratio} leaves no room for a spread of {}",
                    self.spread
                );
                Err(Error::argument("ratio of a block", found, expected))
            }
            None => Ok(ratios),
        }
    }
}

/// The share, in 0..=1, of scores above `threshold` times the mean of all scores.
pub(crate) fn outlier_share(scores: &[Matrix], threshold: f64) -> f64 {
    let count: usize = scores.iter().map(|scores| scores.as_slice().len()).sum();
    if count == 0 {
        return 0.0;
    }
    // Sum row by row, so that the result does not depend on the number of threads.
    let sum = |scores: &Matrix| -> f64 {
        let rows: Vec<f64> = (0..scores.rows())
            .into_par_iter()
            .map(|row| scores.row(row).iter().map(|score| f64::from(*score)).sum())
            .collect();
        rows.into_iter().sum()
    };
    let limit = scores.iter().map(sum).sum::<f64>() / count as f64 * threshold;
    let over = |scores: &Matrix| {
        scores
            .as_slice()
            .par_iter()
            .filter(|score| f64::from(**score) > limit)
            .count()
    };
    scores.iter().map(over).sum::<usize>() as f64 / count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_fall_with_outliers_and_keep_their_mean() {
        let ratios = OwlConfig::new().ratios(&[0.01, 0.04, 0.02], 0.6).unwrap();
        assert!((ratios.iter().sum::<f64>() / 3.0 - 0.6).abs() < 1e-12);
        assert!(ratios[0] > ratios[2] && ratios[2] > ratios[1]);
        assert!((ratios[0] - ratios[1] - 0.16).abs() < 1e-12);
        assert_eq!(OwlConfig::new().ratios(&[0.3; 4], 0.5).unwrap(), [0.5; 4]);
        assert!(OwlConfig::new().ratios(&[], 0.5).unwrap().is_empty());
    }

    #[test]
    fn shares_count_over_all_layers_of_a_block() {
        let small = Matrix::from_fn(3, 5, |_, _| 1.0);
        let large = Matrix::from_fn(1, 5, |_, j| if j == 2 { 40.0 } else { 1.0 });
        // The mean is 59 / 20, and five times the mean is 14.75.
        assert_eq!(outlier_share(&[small.clone(), large], 5.0), 0.05);
        assert_eq!(outlier_share(&[small], 5.0), 0.0);
        assert_eq!(outlier_share(&[], 5.0), 0.0);
    }

    #[test]
    fn bad_settings_are_refused() {
        for bad in [
            OwlConfig::new().with_threshold(0.0),
            OwlConfig::new().with_spread(f64::NAN),
        ] {
            assert!(bad.ratios(&[0.1, 0.2], 0.5).is_err());
        }
        assert!(OwlConfig::new().ratios(&[0.1, 0.2], 0.99).is_err());
        assert!(OwlConfig::new().ratios(&[f64::NAN], 0.5).is_err());
    }
}
