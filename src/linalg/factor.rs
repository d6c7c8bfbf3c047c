//! The factor of a damped Hessian, with which rounding errors are propagated to later columns.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::cholesky::factor_upper;
use super::{Hessian, Matrix};
use crate::error::{Error, Result};

/// Upper limit of the damping, as a fraction of the diagonal's mean.
const MAX_DAMPING: f64 = 1.0;

/// Settings of the factorization of a Hessian.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct FactorConfig {
    /// Damping added to the diagonal, as a fraction of its mean.
    pub damping: f64,
    /// Whether the columns with the largest input are rounded first (GPTQ's `desc_act`), instead of
    /// from left to right.
    pub activation_order: bool,
}

impl Default for FactorConfig {
    fn default() -> Self {
        Self {
            damping: 0.01,
            activation_order: false,
        }
    }
}

impl FactorConfig {
    /// Creates settings with a damping of 0.01 and columns from left to right.
    pub fn new() -> Self {
        Self::default()
    }

    setters! {
        with_damping(damping: f64);
        with_activation_order(activation_order: bool);
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the damping is negative or not finite.
    pub fn validate(&self) -> Result<()> {
        if self.damping.is_finite() && self.damping >= 0.0 {
            return Ok(());
        }
        Err(Error::argument(
            "damping",
            self.damping,
            "finite and not negative",
        ))
    }
}

/// The upper triangular `U` of `H + damping = U U^T`, with its columns divided by their pivots. All
/// layers with the same input share it.
///
/// Let `d_i` be the errors of the columns before column `k`. Then `-sum_i d_i U_ik / U_kk` is the
/// change of column `k` that best compensates for them. GPTQ's original form uses the Cholesky
/// factor of the inverse, which is `U^-1`. Both give the same weights (*The Geometry of LLM
/// Quantization: GPTQ as Babai's Nearest Plane Algorithm*, arXiv 2507.18553), but this form needs
/// no inverse and only a quarter of the arithmetic.
#[derive(Clone, Debug)]
#[doc(hidden)]
pub struct Factor {
    couplings: Matrix,
    pivots: Vec<f32>,
    order: Option<Vec<u32>>,
    dead: Vec<u32>,
    damping: f64,
}

impl Factor {
    /// Factors a Hessian.
    ///
    /// A column that is 0 in all of the input is dead: it has no coupling to other columns, and its
    /// weights are treated as 0. If the damped matrix has no factor because it is singular to
    /// within rounding, and the damping is not 0, the damping is raised tenfold until it succeeds,
    /// at most to the mean of the diagonal. [`damping`](Self::damping) returns the damping used.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the damping is invalid, [`Error::NotFinite`] if the
    /// Hessian has a NaN or infinite element, and [`Error::NotPositiveDefinite`] if no damping
    /// suffices.
    pub fn new(hessian: &Hessian, config: &FactorConfig) -> Result<Self> {
        config.validate()?;
        hessian.check_finite()?;
        let diagonal = hessian.diagonal();
        let n = diagonal.len();
        if let Some(index) = diagonal.iter().position(|value| *value < 0.0) {
            let pivot = f64::from(diagonal[index]);
            return Err(Error::NotPositiveDefinite {
                what: "Hessian".into(),
                index,
                pivot,
            });
        }
        let dead: Vec<u32> = (0..n as u32)
            .filter(|i| diagonal[*i as usize] == 0.0)
            .collect();
        let live = n - dead.len();
        let mean = diagonal.iter().map(|value| f64::from(*value)).sum::<f64>() / live.max(1) as f64;
        let order = config.activation_order.then(|| {
            let mut order: Vec<u32> = (0..n as u32).collect();
            order.sort_by(|a, b| diagonal[*b as usize].total_cmp(&diagonal[*a as usize]));
            order
        });
        let column = |position: usize| {
            order
                .as_ref()
                .map_or(position, |order| order[position] as usize)
        };
        let mut damping = config.damping;
        let mut upper = loop {
            let mut upper = Matrix::zeros(n, n);
            upper
                .as_mut_slice()
                .par_chunks_mut(n.max(1))
                .enumerate()
                .for_each(|(i, row)| {
                    let from = column(i);
                    for (j, value) in row.iter_mut().enumerate().skip(i) {
                        *value = hessian.get(from, column(j));
                    }
                    if row[i] == 0.0 {
                        row[i] = if live > 0 { mean as f32 } else { 1.0 };
                    }
                    row[i] = (f64::from(row[i]) + damping * mean) as f32;
                });
            match factor_upper(&mut upper) {
                Ok(()) => break upper,
                Err(_) if damping > 0.0 && damping < MAX_DAMPING => {
                    damping = (damping * 10.0).min(MAX_DAMPING)
                }
                Err(bad) => {
                    let index = column(bad.index);
                    return Err(Error::NotPositiveDefinite {
                        what: "Hessian".into(),
                        index,
                        pivot: bad.value,
                    });
                }
            }
        };
        let pivots: Vec<f32> = (0..n).map(|i| upper.row(i)[i]).collect();
        upper
            .as_mut_slice()
            .par_chunks_mut(n.max(1))
            .enumerate()
            .for_each(|(i, row)| {
                row[..i].fill(0.0);
                row[i..]
                    .iter_mut()
                    .zip(&pivots[i..])
                    .for_each(|(value, pivot)| *value /= pivot);
            });
        Ok(Self {
            couplings: upper,
            pivots,
            order,
            dead,
            damping,
        })
    }

    /// Number of input columns.
    pub fn d_input(&self) -> usize {
        self.pivots.len()
    }

    /// `U_ik / U_kk` by position in rounding order; 1 on the diagonal.
    pub(crate) fn couplings(&self) -> &Matrix {
        &self.couplings
    }

    /// `U_kk` by position in rounding order. Its square is the cost of a unit error of that weight
    /// after all later weights have compensated for it, which is the inverse of the `[H^-1]_kk`
    /// that SparseGPT divides by.
    pub(crate) fn pivots(&self) -> &[f32] {
        &self.pivots
    }

    /// The column at each position of the rounding order; `None` if the order is from left to
    /// right.
    pub fn order(&self) -> Option<&[u32]> {
        self.order.as_deref()
    }

    /// Columns that are 0 in all of the input, in ascending order.
    pub(crate) fn dead(&self) -> &[u32] {
        &self.dead
    }

    /// The damping used, as a fraction of the diagonal's mean.
    pub fn damping(&self) -> f64 {
        self.damping
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn hessian(d: usize, rows: usize, seed: u64) -> Hessian {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut hessian = Hessian::new(d);
        let x: Vec<f32> = (0..rows * d)
            .map(|i| rng.random_range(-1.0..1.0) * (1 + i % d % 5) as f32)
            .collect();
        hessian.update(&x).unwrap();
        hessian
    }

    #[test]
    fn pivots_are_the_inverse_of_the_inverses_last_corner() {
        // With one column left, [H^-1]_kk = 1 / H_kk.
        let (d, damping) = (37, 0.02);
        let h = hessian(d, 90, 1);
        let mean = h.diagonal().iter().sum::<f32>() / d as f32;
        let factor = Factor::new(&h, &FactorConfig::new().with_damping(damping)).unwrap();
        let last = h.get(d - 1, d - 1) + damping as f32 * mean;
        approx::assert_relative_eq!(factor.pivots()[d - 1].powi(2), last, max_relative = 1e-5);
        assert_eq!(
            (factor.d_input(), factor.damping(), factor.order()),
            (d, damping, None)
        );
        assert!((0..d).all(|i| factor.couplings().row(i)[i] == 1.0));
        let ordered = Factor::new(&h, &FactorConfig::new().with_activation_order(true)).unwrap();
        let order = ordered.order().unwrap();
        assert!(
            order
                .windows(2)
                .all(|w| h.diagonal()[w[0] as usize] >= h.diagonal()[w[1] as usize])
        );
    }

    #[test]
    fn dead_columns_couple_to_nothing() {
        let mut x = vec![0.0; 8 * 5];
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for row in x.chunks_exact_mut(5) {
            row.iter_mut().enumerate().for_each(|(j, v)| {
                *v = if j == 2 {
                    0.0
                } else {
                    rng.random_range(-1.0..1.0)
                }
            });
        }
        let mut h = Hessian::new(5);
        h.update(&x).unwrap();
        let factor = Factor::new(&h, &FactorConfig::new()).unwrap();
        assert_eq!(factor.dead(), [2]);
        assert!((0..5).all(|i| i == 2
            || (factor.couplings().row(i)[2] == 0.0 && factor.couplings().row(2)[i] == 0.0)));
        let nothing = Factor::new(&Hessian::new(4), &FactorConfig::new()).unwrap();
        assert_eq!(nothing.dead().len(), 4);
    }

    #[test]
    fn a_singular_hessian_is_damped_or_refused() {
        let h = hessian(30, 4, 3);
        assert_eq!(
            Factor::new(&h, &FactorConfig::new()).unwrap().damping(),
            0.01
        );
        assert!(
            Factor::new(&h, &FactorConfig::new().with_damping(1e-12))
                .unwrap()
                .damping()
                > 1e-12
        );
        let none = Factor::new(&h, &FactorConfig::new().with_damping(0.0));
        assert!(
            matches!(none, Err(Error::NotPositiveDefinite { .. })),
            "{none:?}"
        );
        let indefinite = Matrix::from_fn(3, 3, |i, j| if i == j { 1.0 } else { 9.0 });
        let refused = Factor::new(
            &Hessian::from_matrix(indefinite).unwrap(),
            &FactorConfig::new(),
        );
        assert!(
            refused
                .unwrap_err()
                .to_string()
                .contains("not positive definite")
        );
        let negative = Matrix::from_fn(2, 2, |i, j| if i == j { -1.0 } else { 0.0 });
        assert!(
            Factor::new(
                &Hessian::from_matrix(negative).unwrap(),
                &FactorConfig::new()
            )
            .is_err()
        );
        for bad in [f64::NAN, -0.1, f64::INFINITY] {
            assert!(Factor::new(&h, &FactorConfig::new().with_damping(bad)).is_err());
        }
    }
}
