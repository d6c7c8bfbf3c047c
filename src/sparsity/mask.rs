//! Masks of the elements of a matrix that stay.

use rayon::prelude::*;

use super::Pattern;
use crate::error::{Error, Result};
use crate::linalg::Matrix;

/// A mask of the elements of a matrix `[out, in]` that are kept, with one bit per element. Each row
/// starts at a new word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    rows: usize,
    cols: usize,
    // Bits after column `cols` are 0, so that masks can be compared and counted word by word.
    words: Vec<u64>,
}

impl Mask {
    /// Creates a mask that keeps all elements (`keep`) or none.
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

    /// Creates a mask that keeps the elements of `matrix` that are not zero. NaN counts as not
    /// zero.
    pub fn from_nonzero(matrix: &Matrix) -> Self {
        let mut mask = Self::filled(matrix.rows(), matrix.cols(), false);
        mask.fill_rows(|i, row| {
            for (j, v) in matrix.row(i).iter().enumerate() {
                row.put(j, *v != 0.0);
            }
        });
        mask
    }

    /// Creates a mask from row-major booleans.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the length of `keep` is not `rows * cols`.
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

    /// Creates a mask that removes the lowest `scores`, as many as `pattern` requires. Of equal
    /// scores, those of lower index are removed first, as with a stable sort.
    ///
    /// # Errors
    /// Returns [`Error::NotFinite`] if a score is NaN (infinities are ordered as usual), and the
    /// errors of [`Pattern::validate`].
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

    /// Whether element `(i, j)` is kept.
    ///
    /// # Panics
    /// Panics if it is outside the matrix.
    pub fn get(&self, i: usize, j: usize) -> bool {
        assert!(
            i < self.rows && j < self.cols,
            "({i}, {j}) is outside a mask of {} x {}",
            self.rows,
            self.cols
        );
        self.words[i * self.cols.div_ceil(64) + j / 64] >> (j % 64) & 1 == 1
    }

    /// Sets whether element `(i, j)` is kept.
    ///
    /// # Panics
    /// Panics if it is outside the matrix.
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

    /// Number of elements that are kept.
    pub fn count_kept(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Share of elements that are removed, in 0..=1; 0 for a mask without elements.
    pub fn sparsity(&self) -> f64 {
        let total = self.rows * self.cols;
        if total == 0 {
            0.0
        } else {
            (total - self.count_kept()) as f64 / total as f64
        }
    }

    /// Whether `other` keeps all elements that this mask keeps. Returns `false` if the shapes
    /// differ.
    pub fn is_subset_of(&self, other: &Mask) -> bool {
        (self.rows, self.cols) == (other.rows, other.cols)
            && self
                .words
                .iter()
                .zip(&other.words)
                .all(|(a, b)| a & !b == 0)
    }

    /// The mask in row-major order, `true` for elements that are kept.
    #[cfg(test)]
    pub(crate) fn to_bools(&self) -> Vec<bool> {
        (0..self.rows)
            .flat_map(|i| (0..self.cols).map(move |j| self.get(i, j)))
            .collect()
    }

    /// The mask as a matrix of ones and zeros, for multiplication.
    pub fn to_matrix(&self) -> Matrix {
        Matrix::from_fn(self.rows, self.cols, |i, j| {
            f32::from(u8::from(self.get(i, j)))
        })
    }

    /// Sets the removed elements of `matrix` to `+0.0`.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if `matrix` has another shape.
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
        // A mask without columns has no words, but a chunk size must not be 0.
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

/// Computes `floor(len * ratio)` in `f64`, like Python's `int(len * ratio)`.
pub(super) fn floor_share(len: usize, ratio: f64) -> usize {
    ((len as f64 * ratio) as usize).min(len)
}

/// Number of weights that N:M keeps in a group of `len <= m`: N in a full group, and its share,
/// rounded up, in a shorter one.
pub(super) fn kept_in_group(n: usize, m: usize, len: usize) -> usize {
    if len == m {
        n
    } else {
        ((n as u128 * len as u128).div_ceil(m as u128)) as usize
    }
}

/// Calls `drop` with the indices, in ascending order, of the `count` lowest of `scores`, which must
/// not be NaN. Of equal scores, the first ones are dropped, as with a stable sort. The cost is
/// O(len), by selection instead of sorting.
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
    // All scores below the threshold are dropped. The rest of the count is taken from the first
    // scores that equal the threshold.
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

/// Maps a float to a `u32` with the same order. Both zeros map to the same number.
fn sort_key(v: f32) -> u32 {
    let bits = (v + 0.0).to_bits();
    if bits >> 31 == 0 {
        bits | 1 << 31
    } else {
        !bits
    }
}
