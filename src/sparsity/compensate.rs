//! The loop that SparseGPT and GPTQ share: columns are rounded or removed one after the other, and
//! later columns compensate for the errors.

use std::ops::Range;

use rayon::prelude::*;

use super::mask::{drop_least, floor_share, kept_in_group};
use super::{Mask, Pattern};
use crate::error::{Error, Result};
use crate::linalg::product::{View, add_product};
use crate::linalg::{Factor, Matrix};

/// Rounds the weights of one row. Positions are in rounding order.
pub(crate) trait RowRounding: Send + Sync {
    /// Returns the end of the group of columns that begins at `position`, if a group begins there
    /// and its grid is not known yet.
    fn group_end(&self, position: usize) -> Option<usize>;

    /// Determines the grid of a group from its current weights.
    fn begin_group(&mut self, group: Range<usize>, weights: &[f32]) -> Result<()>;

    /// Returns `weight` rounded to its grid.
    fn round(&mut self, position: usize, weight: f32) -> f32;

    /// Records that the weight is removed.
    fn remove(&mut self, position: usize);
}

/// Keeps weights unchanged.
pub(crate) struct Exact;

impl RowRounding for Exact {
    fn group_end(&self, _: usize) -> Option<usize> {
        None
    }

    fn begin_group(&mut self, _: Range<usize>, _: &[f32]) -> Result<()> {
        Ok(())
    }

    fn round(&mut self, _: usize, weight: f32) -> f32 {
        weight
    }

    fn remove(&mut self, _: usize) {}
}

/// The weights that stay.
#[derive(Clone, Copy)]
pub(crate) enum Keep<'a> {
    All,
    These(&'a Mask),
    /// The weights with the highest cost of removal, chosen when their columns are reached.
    Best(Pattern),
}

/// Settings of the loop over columns.
pub(crate) struct Pass<'a> {
    pub factor: &'a Factor,
    pub keep: Keep<'a>,
    /// Number of columns that are decided together; a multiple of the length of each kind of group.
    pub block: usize,
    /// Whether grids are determined from the weights at the start of the block, instead of the
    /// group.
    pub grids_at_block: bool,
}

/// The resulting weights, and the mask of those that stay.
pub(crate) struct Compensated {
    pub weight: Matrix,
    pub keep: Mask,
}

/// One block of one row, indexed by position inside the block.
struct RowBlock<'a> {
    /// The ideal values of the weights, given the errors of the columns before the block and of
    /// those already done in it.
    targets: &'a mut [f32],
    /// The original weights, replaced by the final ones as columns are done.
    weight: &'a mut [f32],
    /// The differences between final and original weights, for columns that are done.
    change: &'a mut [f32],
    keep: &'a mut [bool],
}

impl Pass<'_> {
    /// Processes the columns of `weight`, with one rounding per row.
    ///
    /// The targets of a block are its weights minus the effect of the errors of all columns before
    /// it, computed as one product for the block. Inside the block, the error of each column is
    /// applied to the later ones immediately. The result is the same with any number of threads.
    pub fn run<R: RowRounding>(&self, weight: &Matrix, roundings: &mut [R]) -> Result<Compensated> {
        let (rows, cols) = (weight.rows(), weight.cols());
        self.check(weight)?;
        if rows == 0 || cols == 0 {
            return Ok(Compensated {
                weight: weight.clone(),
                keep: Mask::filled(rows, cols, true),
            });
        }
        let column = |position: usize| {
            self.factor
                .order()
                .map_or(position, |order| order[position] as usize)
        };
        let mut weight = self.in_order(weight, |row, out| {
            (0..cols).for_each(|p| out[p] = row[column(p)])
        });
        let dead = self.dead_positions();
        let mut keep = vec![true; rows * cols];
        if let Keep::These(mask) = self.keep {
            keep.par_chunks_mut(cols)
                .enumerate()
                .for_each(|(row, keep)| {
                    keep.iter_mut()
                        .enumerate()
                        .for_each(|(position, keep)| *keep = mask.get(row, column(position)));
                });
        }
        weight
            .as_mut_slice()
            .par_chunks_mut(cols)
            .for_each(|row| dead.iter().for_each(|p| row[*p] = 0.0));
        let mut change = vec![0.0_f32; rows * cols];
        let mut targets = vec![0.0_f32; rows * self.block.min(cols)];
        // There are enough panels to keep many threads busy, each with enough rows for an efficient
        // product.
        let panel = rows.div_ceil(16).clamp(16, 512);
        let mut removed = 0;
        for start in (0..cols).step_by(self.block) {
            let block = start..(start + self.block).min(cols);
            let len = block.len();
            let targets = &mut targets[..rows * len];
            let couplings = View::rows(
                &self.factor.couplings().as_slice()[start..],
                [start, len],
                cols,
            );
            targets
                .par_chunks_mut(panel * len)
                .zip(weight.as_slice().par_chunks(panel * cols))
                .zip(change.par_chunks(panel * cols))
                .for_each(|((targets, weight), change)| {
                    for (target, row) in
                        targets.chunks_exact_mut(len).zip(weight.chunks_exact(cols))
                    {
                        target.copy_from_slice(&row[block.clone()]);
                    }
                    let errors = View::rows(change, [change.len() / cols, start], cols);
                    add_product(targets, len, -1.0, errors, couplings);
                });

            let in_block = rows_of(
                &block,
                cols,
                targets,
                weight.as_mut_slice(),
                &mut change,
                &mut keep,
            );
            let mut row_blocks: Vec<(RowBlock<'_>, &mut R)> =
                in_block.into_iter().zip(roundings.iter_mut()).collect();
            if let Keep::Best(Pattern::Unstructured { ratio } | Pattern::Layer { ratio }) =
                self.keep
            {
                let goal = floor_share(rows * block.end, ratio);
                self.choose(&block, &mut row_blocks, goal - removed);
                removed = goal;
            }
            row_blocks
                .par_iter_mut()
                .try_for_each_init(Vec::new, |scratch, (row, rounding)| {
                    self.finish(&block, row, *rounding, scratch)
                })?;
        }
        let kept = match self.keep {
            Keep::All => Mask::filled(rows, cols, true),
            Keep::These(mask) => mask.clone(),
            Keep::Best(_) => {
                let mut by_column = vec![false; rows * cols];
                by_column
                    .par_chunks_mut(cols)
                    .zip(keep.par_chunks(cols))
                    .for_each(|(out, keep)| {
                        keep.iter()
                            .enumerate()
                            .for_each(|(position, keep)| out[column(position)] = *keep);
                    });
                Mask::from_bools(rows, cols, &by_column)?
            }
        };
        drop(change);
        let weight = self.in_order(&weight, |row, out| {
            (0..cols).for_each(|p| out[column(p)] = row[p])
        });
        Ok(Compensated { weight, keep: kept })
    }

    fn check(&self, weight: &Matrix) -> Result<()> {
        let cols = weight.cols();
        if cols != self.factor.d_input() {
            return Err(Error::ShapeMismatch {
                what: "Hessian of a weight's input".into(),
                expected: vec![cols, cols],
                found: vec![self.factor.d_input(); 2],
            });
        }
        if let Some(index) = weight
            .as_slice()
            .par_iter()
            .position_first(|value| !value.is_finite())
        {
            return Err(Error::NotFinite {
                tensor: "weight".into(),
                index,
                value: weight.as_slice()[index],
            });
        }
        match self.keep {
            Keep::These(mask) if (mask.rows(), mask.cols()) != (weight.rows(), cols) => {
                Err(Error::ShapeMismatch {
                    what: "mask of a weight".into(),
                    expected: vec![weight.rows(), cols],
                    found: vec![mask.rows(), mask.cols()],
                })
            }
            Keep::Best(pattern) => {
                pattern.validate()?;
                match pattern {
                    Pattern::NM { .. } if self.factor.order().is_some() => Err(Error::argument(
                        "activation_order",
                        true,
                        "N:M patterns need the columns from left to right",
                    )),
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// Returns the matrix with `rearrange` applied to each row, or a copy if the order is from left
    /// to right.
    fn in_order(&self, matrix: &Matrix, rearrange: impl Fn(&[f32], &mut [f32]) + Sync) -> Matrix {
        let mut out = matrix.clone();
        if self.factor.order().is_some() {
            let rows = matrix.as_slice().par_chunks(matrix.cols());
            out.as_mut_slice()
                .par_chunks_mut(matrix.cols())
                .zip(rows)
                .for_each(|(out, row)| rearrange(row, out));
        }
        out
    }

    fn dead_positions(&self) -> Vec<usize> {
        match self.factor.order() {
            None => self
                .factor
                .dead()
                .iter()
                .map(|column| *column as usize)
                .collect(),
            Some(order) => (0..order.len())
                .filter(|p| self.factor.dead().binary_search(&order[*p]).is_ok())
                .collect(),
        }
    }

    /// Removes the `count` weights of a block, over all rows, whose removal costs least.
    fn choose<R: RowRounding>(
        &self,
        block: &Range<usize>,
        rows: &mut [(RowBlock<'_>, &mut R)],
        count: usize,
    ) {
        let len = block.len();
        let mut scores = vec![0.0_f32; rows.len() * len];
        scores
            .par_chunks_mut(len)
            .zip(rows.par_iter())
            .for_each_init(Vec::new, |settled, (scores, (row, _))| {
                self.settle(block, row, 0..len, settled);
                self.score(block.start, settled);
                scores.copy_from_slice(settled);
            });
        drop_least(&scores, count, &mut Vec::new(), |index| {
            rows[index / len].0.keep[index % len] = false
        });
    }

    /// Computes the weights of a range as [`finish`](Self::finish) would without rounding: the kept
    /// weights compensate for all errors before them, and for the weights that will be removed.
    fn rehearse(
        &self,
        block: &Range<usize>,
        row: &RowBlock<'_>,
        range: Range<usize>,
        weights: &mut Vec<f32>,
    ) -> Result<()> {
        let mut targets = row.targets[range.clone()].to_vec();
        let mut keep = row.keep[range.clone()].to_vec();
        let mut change = vec![0.0; range.len()];
        weights.clear();
        weights.extend_from_slice(&row.weight[range.clone()]);
        let mut copy = RowBlock {
            targets: &mut targets,
            weight: weights,
            change: &mut change,
            keep: &mut keep,
        };
        self.finish(
            &(block.start + range.start..block.start + range.end),
            &mut copy,
            &mut Exact,
            &mut Vec::new(),
        )
    }

    /// Computes the ideal weights of a range: each kept weight takes its target exactly, removed
    /// ones are 0, and later weights compensate.
    fn settle(
        &self,
        block: &Range<usize>,
        row: &RowBlock<'_>,
        range: Range<usize>,
        settled: &mut Vec<f32>,
    ) {
        settled.clear();
        settled.extend_from_slice(&row.targets[range.clone()]);
        for i in 0..range.len() {
            let at = range.start + i;
            let (done, later) = settled.split_at_mut(i + 1);
            if !row.keep[at] {
                done[i] = 0.0;
            }
            let couplings = self.factor.couplings().row(block.start + at);
            pass_on(
                later,
                done[i] - row.weight[at],
                &couplings[block.start + at + 1..],
            );
        }
    }

    /// Replaces weights by the cost of removing them.
    fn score(&self, start: usize, weights: &mut [f32]) {
        for (weight, pivot) in weights.iter_mut().zip(&self.factor.pivots()[start..]) {
            *weight = (*weight * pivot).powi(2);
        }
    }

    /// Processes a block of one row.
    fn finish<R: RowRounding>(
        &self,
        block: &Range<usize>,
        row: &mut RowBlock<'_>,
        rounding: &mut R,
        scratch: &mut Vec<f32>,
    ) -> Result<()> {
        let (len, start) = (block.len(), block.start);
        if self.grids_at_block && rounding.group_end(start).is_some() {
            self.rehearse(block, row, 0..len, scratch)?;
            let mut at = 0;
            while at < len {
                let Some(end) = rounding.group_end(start + at) else {
                    break;
                };
                rounding.begin_group(start + at..end, &scratch[at..end - start])?;
                at = end - start;
            }
        }
        for at in 0..len {
            if let Keep::Best(Pattern::NM { n, m }) = self.keep
                && (start + at).is_multiple_of(m)
            {
                let group = at..(at + m).min(len);
                self.settle(block, row, group.clone(), scratch);
                self.score(start + at, scratch);
                let count = group.len() - kept_in_group(n, m, group.len());
                drop_least(scratch, count, &mut Vec::new(), |index| {
                    row.keep[at + index] = false
                });
            }
            if let (false, Some(end)) = (self.grids_at_block, rounding.group_end(start + at)) {
                self.rehearse(block, row, at..end - start, scratch)?;
                rounding.begin_group(start + at..end, scratch)?;
            }
            let rounded = if row.keep[at] {
                rounding.round(start + at, row.targets[at])
            } else {
                rounding.remove(start + at);
                0.0
            };
            row.change[at] = rounded - row.weight[at];
            row.weight[at] = rounded;
            let couplings = &self.factor.couplings().row(start + at)[start + at + 1..];
            pass_on(&mut row.targets[at + 1..], row.change[at], couplings);
        }
        Ok(())
    }
}

/// Adjusts the later targets to compensate for the error of one weight.
fn pass_on(targets: &mut [f32], error: f32, couplings: &[f32]) {
    if error != 0.0 {
        targets
            .iter_mut()
            .zip(couplings)
            .for_each(|(target, coupling)| *target -= error * coupling);
    }
}

/// Splits a block into its rows.
fn rows_of<'a>(
    block: &Range<usize>,
    cols: usize,
    targets: &'a mut [f32],
    weight: &'a mut [f32],
    change: &'a mut [f32],
    keep: &'a mut [bool],
) -> Vec<RowBlock<'a>> {
    targets
        .chunks_exact_mut(block.len())
        .zip(weight.chunks_exact_mut(cols))
        .zip(change.chunks_exact_mut(cols))
        .zip(keep.chunks_exact_mut(cols))
        .map(|(((targets, weight), change), keep)| RowBlock {
            targets,
            weight: &mut weight[block.clone()],
            change: &mut change[block.clone()],
            keep: &mut keep[block.clone()],
        })
        .collect()
}

/// Returns the longest block up to `wanted` that is a multiple of both `lengths`, or the least
/// common multiple if that is longer, so that no group of columns is split between blocks.
pub(crate) fn block_length(wanted: usize, lengths: [usize; 2]) -> usize {
    let [a, b] = lengths;
    let (mut gcd, mut rest) = (a, b);
    while rest > 0 {
        (gcd, rest) = (rest, gcd % rest);
    }
    let unit = (a / gcd).saturating_mul(b);
    (wanted / unit).max(1).saturating_mul(unit)
}
