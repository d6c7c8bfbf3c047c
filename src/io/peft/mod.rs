//! Reads and writes LoRA adapters in the folder format of Hugging Face's PEFT
//! (`adapter_config.json`, `adapter_model.safetensors`).
//!
//! LoRA: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

mod pattern;
mod read;
mod write;

use std::collections::BTreeMap;

use rayon::prelude::*;

pub use write::PeftOptions;

use crate::arch::Architecture;
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
    /// Weights by module path in the base model, such as `model.layers.0.self_attn.q_proj`.
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

    /// Returns the adapter with one pair for each linear layer. A pair of a matrix that holds
    /// several layers, such as Phi-3's `qkv_proj`, becomes one pair for each of them: they have the
    /// same A, and their B are the rows of that B.
    ///
    /// # Errors
    /// Returns [`Error::TensorShape`] if such a pair has the wrong shape.
    pub fn split(&self, config: &HfConfig) -> Result<Self> {
        let mut split = self.clone();
        for fused in config.arch().fused() {
            let Some(weights) = split.layers.remove(&fused.name) else {
                continue;
            };
            let (found, expected) = (
                vec![weights.d_output(), weights.d_input()],
                vec![fused.d_output(), fused.d_input],
            );
            if found != expected {
                let tensor = format!("{}.lora", fused.name);
                return Err(Error::TensorShape {
                    tensor,
                    expected,
                    found,
                });
            }
            for (layer, _) in &fused.parts {
                let Some(rows) = fused.rows_of(layer) else {
                    continue;
                };
                let b = weights.b();
                let part = Matrix::from_fn(rows.len(), b.cols(), |i, k| b.row(rows.start + i)[k]);
                let part = LoraWeights::new(weights.a().clone(), part, weights.scale())?;
                if split.layers.insert(layer.clone(), part).is_some() {
                    return Err(Error::Unsupported {
                        what: format!(
                            "a LoRA of both `{}` and `{layer}`, a part of it",
                            fused.name
                        ),
                    });
                }
            }
        }
        Ok(split)
    }

    /// Returns the adapter with one pair for each matrix that checkpoints of the family store: the
    /// inverse of [`split`](Self::split). If the layers of a matrix have different A, the rank of
    /// its pair is the sum of theirs; the product is the same.
    ///
    /// # Errors
    /// Currently infallible for an adapter that fits `config`.
    pub fn fused(&self, config: &HfConfig) -> Result<Self> {
        self.fused_for(config.arch())
    }

    pub(crate) fn fused_for(&self, arch: &Architecture) -> Result<Self> {
        let mut all = self.clone();
        for fused in arch.fused() {
            let parts: Vec<Option<LoraWeights>> = fused
                .parts
                .iter()
                .map(|(layer, _)| all.layers.remove(layer))
                .collect();
            let Some(first) = parts.iter().flatten().next() else {
                continue;
            };
            let scale = first.scale();
            let shared = parts.iter().all(|part| {
                part.as_ref()
                    .is_some_and(|part| part.a() == first.a() && part.scale() == scale)
            });
            let rank = match shared {
                true => first.rank(),
                false => parts.iter().flatten().map(LoraWeights::rank).sum(),
            };
            let mut a = Matrix::zeros(rank, fused.d_input);
            let mut b = Matrix::zeros(fused.d_output(), rank);
            let (mut start, mut row) = (0, 0);
            for (part, (_, rows)) in parts.iter().zip(&fused.parts) {
                if let Some(part) = part {
                    let factor = part.scale() / scale;
                    for k in 0..part.rank() {
                        a.row_mut(start + k).copy_from_slice(part.a().row(k));
                    }
                    for i in 0..part.d_output().min(*rows) {
                        let out = &mut b.row_mut(row + i)[start..start + part.rank()];
                        out.copy_from_slice(part.b().row(i));
                        if factor != 1.0 {
                            out.iter_mut().for_each(|value| *value *= factor);
                        }
                    }
                    if !shared {
                        start += part.rank();
                    }
                }
                row += rows;
            }
            let weights = LoraWeights::new(a, b, scale)?;
            all.layers.insert(fused.name, weights);
        }
        Ok(all)
    }

    /// Checks that every layer exists in `config` and has the right shape.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`], or [`Error::TensorShape`] with the shape of the product.
    pub fn check(&self, config: &HfConfig) -> Result<()> {
        let layers = config.arch().linears().into_iter();
        let layers = layers.map(|l| (l.name, [l.d_output, l.d_input]));
        let fused = config.arch().fused().into_iter();
        let fused = fused.map(|fused| {
            let shape = [fused.d_output(), fused.d_input];
            (fused.name, shape)
        });
        let shapes: BTreeMap<String, [usize; 2]> = layers.chain(fused).collect();
        for (layer, weights) in &self.layers {
            let Some(expected) = shapes.get(layer) else {
                return Err(Error::UnknownLayer {
                    context: "LoRA adapter".into(),
                    layer: layer.clone(),
                });
            };
            let found = [weights.d_output(), weights.d_input()];
            if found != *expected {
                let tensor = format!("{layer}.lora");
                return Err(Error::TensorShape {
                    tensor,
                    expected: expected.to_vec(),
                    found: found.to_vec(),
                });
            }
        }
        Ok(())
    }
}

/// Prefix that PEFT puts before the module paths of the base model.
const PREFIX: &str = "base_model.model.";

#[cfg(test)]
mod tests;
