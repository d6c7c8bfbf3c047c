//! Reads and writes LoRA adapters in the folder format of Hugging Face's PEFT
//! (`adapter_config.json`, `adapter_model.safetensors`).
//!
//! LoRA: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

mod changes;
mod config;
mod fused;
mod keys;
mod merged;
mod pattern;
mod read;
mod tables;
mod targets;
mod write;

use std::collections::BTreeMap;

use rayon::prelude::*;

pub use changes::BaseChanges;
pub(crate) use changes::BaseInit;
#[cfg(all(test, feature = "burn"))]
pub(crate) use changes::Stored;
pub(crate) use merged::MergedSource;
pub(crate) use tables::{Tables, is_table};
pub use write::PeftOptions;

use crate::error::{Error, Result};
use crate::io::hf::HfConfig;
use crate::linalg::Matrix;

/// Low-rank pair of one layer, whose weight becomes `W + scale * B A`.
#[derive(Clone, Debug, PartialEq)]
#[doc(hidden)]
pub struct LoraWeights {
    a: Matrix,
    b: Matrix,
    scale: f32,
}

impl LoraWeights {
    /// Combines `a` (`[rank, d_input]`) and `b` (`[d_output, rank]`).
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if their ranks differ, and [`Error::InvalidArgument`] if
    /// the rank is zero or the scale is not finite.
    pub fn new(a: Matrix, b: Matrix, scale: f32) -> Result<Self> {
        if a.rows() != b.cols() {
            return Err(Error::ShapeMismatch {
                what: "columns of LoRA's B, against rows of its A".into(),
                expected: vec![a.rows()],
                found: vec![b.cols()],
            });
        }
        if a.rows() == 0 {
            return Err(Error::argument("rank", 0, "at least 1"));
        }
        if !scale.is_finite() {
            return Err(Error::argument("scale", scale, "a finite number"));
        }
        Ok(Self { a, b, scale })
    }

    /// Returns A, `[rank, d_input]`.
    pub fn a(&self) -> &Matrix {
        &self.a
    }

    /// Returns B, `[d_output, rank]`.
    pub fn b(&self) -> &Matrix {
        &self.b
    }

    /// Returns the scale of the product.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Returns the rank.
    pub fn rank(&self) -> usize {
        self.a.rows()
    }

    /// Returns the number of input features.
    pub fn d_input(&self) -> usize {
        self.a.cols()
    }

    /// Returns the number of output features.
    pub fn d_output(&self) -> usize {
        self.b.rows()
    }

    /// Returns `scale * B A`, `[d_output, d_input]`. The product is summed in f32 and then scaled,
    /// as in PEFT.
    ///
    /// The cost is `d_output * rank * d_input` multiplications. Rows are computed in parallel; the
    /// result does not depend on the number of threads.
    pub fn delta(&self) -> Matrix {
        let mut delta = Matrix::zeros(self.d_output(), self.d_input());
        if self.d_input() == 0 {
            return delta;
        }
        delta
            .as_mut_slice()
            .par_chunks_mut(self.d_input())
            .enumerate()
            .for_each(|(i, out)| {
                for (k, &b) in self.b.row(i).iter().enumerate() {
                    for (o, &a) in out.iter_mut().zip(self.a.row(k)) {
                        *o += b * a;
                    }
                }
                for o in out.iter_mut() {
                    *o *= self.scale;
                }
            });
        delta
    }

    /// Returns a pair whose product is that of this pair minus the product of `other`, cut to this
    /// pair's size. The ranks add up.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if `other` has fewer inputs or outputs.
    pub(crate) fn minus(&self, other: &Self) -> Result<Self> {
        let (d_input, d_output) = (self.d_input(), self.d_output());
        if other.d_input() < d_input || other.d_output() < d_output {
            return Err(Error::ShapeMismatch {
                what: "pair that is subtracted".into(),
                expected: vec![d_output, d_input],
                found: vec![other.d_output(), other.d_input()],
            });
        }
        let (rank, factor) = (self.rank(), -other.scale / self.scale);
        let a = Matrix::from_fn(rank + other.rank(), d_input, |k, j| match k < rank {
            true => self.a.row(k)[j],
            false => other.a.row(k - rank)[j],
        });
        let b = Matrix::from_fn(d_output, rank + other.rank(), |i, k| match k < rank {
            true => self.b.row(i)[k],
            false => factor * other.b.row(i)[k - rank],
        });
        Self::new(a, b, self.scale)
    }

    /// Returns the same product at a higher rank, by adding rows of zeros to A and columns of zeros
    /// to B.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if `rank` is lower than the current rank.
    pub fn padded(&self, rank: usize) -> Result<Self> {
        if rank < self.rank() {
            return Err(Error::argument(
                "rank",
                rank,
                format!("at least {}", self.rank()),
            ));
        }
        let r = self.rank();
        let a = Matrix::from_fn(rank, self.d_input(), |k, j| {
            if k < r { self.a.row(k)[j] } else { 0.0 }
        });
        let b = Matrix::from_fn(self.d_output(), rank, |i, k| {
            if k < r { self.b.row(i)[k] } else { 0.0 }
        });
        Self::new(a, b, self.scale)
    }
}

/// A LoRA adapter of a whole model. Ranks and scales may differ between layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoraAdapter {
    /// Weights by module path in the base model, such as `model.layers.0.self_attn.q_proj`. Where
    /// checkpoints hold several linear layers as one matrix, as those of Phi-3 do, the path is that
    /// of the matrix: `model.layers.0.self_attn.qkv_proj`. The blocks of a model for several kinds
    /// of input have the names that they have in the text model alone. The pair of the embedding,
    /// `model.embed_tokens`, has one output for each token, as that of the head, `lm_head`, has.
    pub layers: BTreeMap<String, LoraWeights>,
    /// Name or path of the base model, as stored in the file.
    pub base_model: Option<String>,
    /// IntelLabs' `sparse_adapter`: the adapter was trained under the mask of the base weight
    /// (SparsePEFT), so its product must be masked when it is merged. PEFT itself does not know
    /// this field.
    pub sparse: bool,
    /// IntelLabs' `quantization_aware`: the adapter was trained through the quantizer of the base
    /// weight (QA-SparsePEFT).
    pub quantization_aware: bool,
    /// What the adapter changes in its base besides; empty for a plain LoRA.
    pub changes: BaseChanges,
}

impl LoraAdapter {
    /// Returns the largest rank, or 0 without layers.
    pub fn max_rank(&self) -> usize {
        self.layers
            .values()
            .map(LoraWeights::rank)
            .max()
            .unwrap_or(0)
    }

    /// Checks that every layer exists in `config` and has the right shape, and that the model has
    /// what the adapter changes.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`], [`Error::TensorShape`] with the shape of the product, or
    /// [`Error::InvalidArgument`] if a layer has a pair of its own and one by the matrix that holds
    /// it.
    pub fn check(&self, config: &HfConfig) -> Result<()> {
        self.by_layer(config)?;
        self.check_tables(config.vocab_size(), config.hidden_size())?;
        self.check_tensors(config)
    }
}

/// Prefix that PEFT puts before the module paths of the base model.
const PREFIX: &str = "base_model.model.";

#[cfg(test)]
mod tests;
