//! The statistics of a layer's input that Wanda needs.

use crate::error::{Error, Result};

/// Running mean of the squared L2 norm of each input column over calibration sequences.
///
/// This is Wanda's `scaler_row`: for a batch of `b` sequences after `n` others, `s *= n / (n + b)`,
/// then `s += ||x_j||^2 / (n + b)`, where the norm is over all tokens of the batch. The mean is in
/// `f64`, so the order of sequences has almost no effect.
#[derive(Clone, Debug, PartialEq)]
#[doc(hidden)]
pub struct InputNorms {
    mean: Vec<f64>,
    sequences: usize,
}

impl InputNorms {
    /// Creates empty statistics for a layer with `d_input` input columns.
    pub fn new(d_input: usize) -> Self {
        Self {
            mean: vec![0.0; d_input],
            sequences: 0,
        }
    }

    /// Number of input columns.
    pub fn d_input(&self) -> usize {
        self.mean.len()
    }

    /// Number of sequences added so far.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Adds the input of `sequences` sequences, without padding.
    ///
    /// # Shapes
    /// `x`: `[tokens of all sequences, d_input]`, row-major.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if `x` does not consist of whole rows, [`Error::NotFinite`]
    /// if it has a NaN or infinite element, and [`Error::InvalidArgument`] if `sequences` is 0. The
    /// statistics are then unchanged.
    pub fn update(&mut self, x: &[f32], sequences: usize) -> Result<()> {
        let d = self.mean.len();
        if (d == 0 && !x.is_empty()) || (d > 0 && !x.len().is_multiple_of(d)) {
            return Err(Error::ShapeMismatch {
                what: "calibration input, elements of whole rows".into(),
                expected: vec![x.len().checked_div(d).unwrap_or(0), d],
                found: vec![x.len()],
            });
        }
        if let Some(index) = x.iter().position(|v| !v.is_finite()) {
            return Err(Error::NotFinite {
                tensor: "calibration input".into(),
                index,
                value: x[index],
            });
        }
        let mut sums = vec![0.0f64; d];
        if d > 0 {
            for row in x.chunks_exact(d) {
                for (s, v) in sums.iter_mut().zip(row) {
                    *s += f64::from(*v) * f64::from(*v);
                }
            }
        }
        self.fold(&sums, sequences)
    }

    /// Adds `sequences` sequences whose squared column norms were summed elsewhere, for example on
    /// a device.
    ///
    /// # Shapes
    /// `sums`: `[d_input]`; element `j` is the sum of `x_j^2` over all tokens of these sequences.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if `sums` has another length, and otherwise the errors of
    /// [`update`](Self::update).
    pub(crate) fn update_sums(&mut self, sums: &[f32], sequences: usize) -> Result<()> {
        if sums.len() != self.mean.len() {
            return Err(Error::ShapeMismatch {
                what: "sums of squares, one per input column".into(),
                expected: vec![self.mean.len()],
                found: vec![sums.len()],
            });
        }
        if let Some(index) = sums.iter().position(|v| !v.is_finite()) {
            return Err(Error::NotFinite {
                tensor: "calibration input".into(),
                index,
                value: sums[index],
            });
        }
        let sums: Vec<f64> = sums.iter().map(|v| f64::from(*v)).collect();
        self.fold(&sums, sequences)
    }

    fn fold(&mut self, sums: &[f64], sequences: usize) -> Result<()> {
        if sequences == 0 {
            return Err(Error::argument("sequences", 0, "at least 1"));
        }
        let (before, after) = (self.sequences as f64, (self.sequences + sequences) as f64);
        for (mean, sum) in self.mean.iter_mut().zip(sums) {
            *mean = *mean * (before / after) + sum / after;
        }
        self.sequences += sequences;
        Ok(())
    }

    /// Mean of the squared norm of each column over the sequences, `[d_input]`, rounded to `f32`.
    pub fn mean_sq_norms(&self) -> Vec<f32> {
        self.mean.iter().map(|v| *v as f32).collect()
    }
}
