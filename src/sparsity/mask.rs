//! Which elements of a matrix stay.

use rayon::prelude::*;

use super::Pattern;
use crate::error::{Error, Result};
use crate::linalg::Matrix;

/// A keep mask of a matrix `[out, in]`, one bit per element; each row starts at a word of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    rows: usize,
    cols: usize,
    // Bits past `cols` in a row's last word are zero, so that masks compare and count word by word.
    words: Vec<u64>,
}

impl Mask {
    /// A mask that keeps everything (`keep`) or nothing.
    pub fn filled(rows: usize, cols: usize, keep: bool) -> Self {
        let mut mask = Self {
            rows,
            cols,
            words: vec![0; rows * cols.div_ceil(64)],
        };
        if keep {
            mask.fill_rows(|_, row| row.set_all());
        }
        mask
    }

    /// Keeps the elements of `matrix` that are not zero (NaN is not).
    pub fn from_nonzero(matrix: &Matrix) -> Self {
        let mut mask = Self::filled(matrix.rows(), matrix.cols(), false);
        mask.fill_rows(|i, row| {
            for (j, v) in matrix.row(i).iter().enumerate() {
                row.put(j, *v != 0.0);
            }
        });
        mask
    }

    /// Keeps what `keep` says, row-major.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] where its length is not `rows * cols`.
    pub(crate) fn from_bools(rows: usize, cols: usize, keep: &[bool]) -> Result<Self> {
        if rows.checked_mul(cols) != Some(keep.len()) {
            return Err(Error::ShapeMismatch {
                what: "mask elements".into(),
                expected: vec![rows, cols],
                found: vec![keep.len()],
            });
        }
        let mut mask = Self::filled(rows, cols, false);
        mask.fill_rows(|i, row| {
            for (j, keep) in keep[i * cols..(i + 1) * cols].iter().enumerate() {
                row.put(j, *keep);
            }
        });
        Ok(mask)
    }

    /// Removes the least `scores` that `pattern` allows; of equal ones, those of lower index first, as a stable sort would.
    ///
    /// # Errors
    /// [`Error::NotFinite`] where a score is NaN (infinities are ordered as usual); whatever [`Pattern::validate`] returns.
    pub fn from_scores(scores: &Matrix, pattern: &Pattern) -> Result<Self> {
        pattern.validate()?;
        if let Some(index) = scores.as_slice().par_iter().position_first(|v| v.is_nan()) {
            return Err(Error::NotFinite {
                tensor: "scores".into(),
                index,
                value: f32::NAN,
            });
        }
        let mut mask = Self::filled(scores.rows(), scores.cols(), true);
        match *pattern {
            Pattern::Unstructured { ratio } => {
                let count = floor_share(scores.cols(), ratio);
                mask.fill_rows(|i, row| {
                    drop_least(scores.row(i), count, &mut Vec::new(), |j| row.put(j, false));
                });
            }
            Pattern::NM { n, m } => mask.fill_rows(|i, row| {
                let mut scratch = Vec::with_capacity(m.min(scores.cols()));
                for (g, group) in scores.row(i).chunks(m).enumerate() {
                    let count = group.len() - kept_in_group(n, m, group.len());
                    drop_least(group, count, &mut scratch, |j| row.put(g * m + j, false));
                }
            }),
            Pattern::Layer { ratio } => {
                let count = floor_share(scores.as_slice().len(), ratio);
                drop_least(scores.as_slice(), count, &mut Vec::new(), |k| {
                    mask.set(k / scores.cols(), k % scores.cols(), false);
                });
            }
        }
        Ok(mask)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether element `(i, j)` stays.
    ///
    /// # Panics
    /// Where it lies outside the matrix.
    pub fn get(&self, i: usize, j: usize) -> bool {
        assert!(
            i < self.rows && j < self.cols,
            "({i}, {j}) is outside a mask of {} x {}",
            self.rows,
            self.cols
        );
        self.words[i * self.cols.div_ceil(64) + j / 64] >> (j % 64) & 1 == 1
    }

    /// Keeps element `(i, j)` or not.
    ///
    /// # Panics
    /// Where it lies outside the matrix.
    pub fn set(&mut self, i: usize, j: usize, keep: bool) {
        assert!(
            i < self.rows && j < self.cols,
            "({i}, {j}) is outside a mask of {} x {}",
            self.rows,
            self.cols
        );
        let stride = self.cols.div_ceil(64);
        RowBits {
            words: &mut self.words[i * stride..(i + 1) * stride],
            cols: self.cols,
        }
        .put(j, keep);
    }

    /// Number of elements that stay.
    pub fn count_kept(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Share of elements that go, in 0..=1; 0 for a mask without elements.
    pub fn sparsity(&self) -> f64 {
        let total = self.rows * self.cols;
        if total == 0 {
            0.0
        } else {
            (total - self.count_kept()) as f64 / total as f64
        }
    }

    /// Whether everything that this mask keeps, `other` keeps too. `false` where the shapes differ.
    pub fn is_subset_of(&self, other: &Mask) -> bool {
        (self.rows, self.cols) == (other.rows, other.cols)
            && self
                .words
                .iter()
                .zip(&other.words)
                .all(|(a, b)| a & !b == 0)
    }

    /// The mask row-major, `true` where an element stays.
    #[cfg(test)]
    pub(crate) fn to_bools(&self) -> Vec<bool> {
        (0..self.rows)
            .flat_map(|i| (0..self.cols).map(move |j| self.get(i, j)))
            .collect()
    }

    /// The mask as a matrix of ones and zeros, to multiply with.
    pub fn to_matrix(&self) -> Matrix {
        Matrix::from_fn(self.rows, self.cols, |i, j| {
            f32::from(u8::from(self.get(i, j)))
        })
    }

    /// Sets what does not stay to `+0.0`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] where `matrix` has another shape.
    pub fn apply(&self, matrix: &mut Matrix) -> Result<()> {
        if (self.rows, self.cols) != (matrix.rows(), matrix.cols()) {
            return Err(Error::ShapeMismatch {
                what: "matrix under a mask".into(),
                expected: vec![self.rows, self.cols],
                found: vec![matrix.rows(), matrix.cols()],
            });
        }
        if self.cols == 0 {
            return Ok(());
        }
        matrix
            .as_mut_slice()
            .par_chunks_mut(self.cols)
            .zip(self.words.par_chunks(self.cols.div_ceil(64)))
            .for_each(|(row, bits)| {
                for (j, v) in row.iter_mut().enumerate() {
                    if bits[j / 64] >> (j % 64) & 1 == 0 {
                        *v = 0.0;
                    }
                }
            });
        Ok(())
    }

    fn fill_rows(&mut self, f: impl Fn(usize, &mut RowBits<'_>) + Sync) {
        let cols = self.cols;
        // No columns, no words, and no chunks of size 0.
        self.words
            .par_chunks_mut(cols.div_ceil(64).max(1))
            .enumerate()
            .for_each(|(i, words)| f(i, &mut RowBits { words, cols }));
    }
}

/// The bits of one row.
struct RowBits<'a> {
    words: &'a mut [u64],
    cols: usize,
}

impl RowBits<'_> {
    fn put(&mut self, j: usize, keep: bool) {
        let bit = 1u64 << (j % 64);
        if keep {
            self.words[j / 64] |= bit;
        } else {
            self.words[j / 64] &= !bit;
        }
    }

    fn set_all(&mut self) {
        self.words.fill(u64::MAX);
        if let (Some(last), tail @ 1..) = (self.words.last_mut(), self.cols % 64) {
            *last = (1 << tail) - 1;
        }
    }
}

/// `floor(len * ratio)` in `f64`, as Python's `int(len * ratio)`.
pub(super) fn floor_share(len: usize, ratio: f64) -> usize {
    ((len as f64 * ratio) as usize).min(len)
}

/// What N:M leaves in a group of `len <= m`: N of a whole one, the share of a short one rounded up.
pub(super) fn kept_in_group(n: usize, m: usize, len: usize) -> usize {
    if len == m {
        n
    } else {
        ((n as u128 * len as u128).div_ceil(m as u128)) as usize
    }
}

/// Calls `drop` with the indices, ascending, of the `count` least of `scores` (no NaN). Of equal scores the first ones go:
/// what a stable sort would put first. O(len) by selection instead of sorting.
pub(super) fn drop_least(
    scores: &[f32],
    count: usize,
    scratch: &mut Vec<u32>,
    mut drop: impl FnMut(usize),
) {
    if count == 0 {
        return;
    }
    if count >= scores.len() {
        (0..scores.len()).for_each(drop);
        return;
    }
    scratch.clear();
    scratch.extend(scores.iter().map(|v| sort_key(*v)));
    let (below, threshold, _) = scratch.select_nth_unstable(count - 1);
    let threshold = *threshold;
    // Those below the threshold all go; what is left of the count goes to the first ones that equal it.
    let mut equal = count - below.iter().filter(|key| **key < threshold).count();
    for (k, v) in scores.iter().enumerate() {
        let key = sort_key(*v);
        if key < threshold {
            drop(k);
        } else if key == threshold && equal > 0 {
            equal -= 1;
            drop(k);
        }
    }
}

/// A `u32` that orders as the float does; both zeros are one.
fn sort_key(v: f32) -> u32 {
    let bits = (v + 0.0).to_bits();
    if bits >> 31 == 0 {
        bits | 1 << 31
    } else {
        !bits
    }
}
