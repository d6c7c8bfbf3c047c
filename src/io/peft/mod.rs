//! LoRA adapters in the folder format of Hugging Face's PEFT (`adapter_config.json`, `adapter_model.safetensors`).
//!
//! LoRA: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

mod pattern;
mod read;
mod write;

use std::collections::BTreeMap;

use rayon::prelude::*;

pub use write::PeftOptions;

use crate::error::{Error, Result};
use crate::io::hf::HfConfig;
use crate::linalg::Matrix;

/// One layer's low-rank pair: the layer's weight gains `scale * B A`.
#[derive(Clone, Debug, PartialEq)]
#[doc(hidden)]
pub struct LoraWeights {
    a: Matrix,
    b: Matrix,
    scale: f32,
}

impl LoraWeights {
    /// Puts `a` (`[rank, d_input]`) and `b` (`[d_output, rank]`) together.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] where their ranks differ; [`Error::InvalidArgument`] for a rank of zero or a scale that is
    /// not finite.
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

    /// A, `[rank, d_input]`.
    pub fn a(&self) -> &Matrix {
        &self.a
    }

    /// B, `[d_output, rank]`.
    pub fn b(&self) -> &Matrix {
        &self.b
    }

    /// The factor of the product.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The rank.
    pub fn rank(&self) -> usize {
        self.a.rows()
    }

    /// Features that go in.
    pub fn d_input(&self) -> usize {
        self.a.cols()
    }

    /// Features that come out.
    pub fn d_output(&self) -> usize {
        self.b.rows()
    }

    /// `scale * B A`, `[d_output, d_input]`, the product summed in f32 and then scaled, as PEFT does.
    ///
    /// Costs `d_output * rank * d_input` multiplications; rows in parallel, the same result at any thread count.
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

    /// The same product at a higher rank: rows of zeros below A, columns of zeros beside B.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a lower rank.
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

/// A LoRA adapter of a whole model, ranks and scales possibly different in each layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoraAdapter {
    /// By module path inside the base model, such as `model.layers.0.self_attn.q_proj`.
    pub layers: BTreeMap<String, LoraWeights>,
    /// The base model's name or path, as the file says.
    pub base_model: Option<String>,
    /// IntelLabs' `sparse_adapter`: the product was trained under the base weight's mask (SparsePEFT), so that it must be
    /// masked when it is merged. PEFT itself does not know the field.
    pub sparse: bool,
    /// IntelLabs' `quantization_aware`: the adapter was trained through the quantizer of its base weight (QA-SparsePEFT).
    pub quantization_aware: bool,
}

impl LoraAdapter {
    /// The largest rank; 0 without layers.
    pub fn max_rank(&self) -> usize {
        self.layers
            .values()
            .map(LoraWeights::rank)
            .max()
            .unwrap_or(0)
    }

    /// Checks that every layer is one of `config`'s, in its shape.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`]; [`Error::TensorShape`] with the shape of the product.
    pub fn check(&self, config: &HfConfig) -> Result<()> {
        let shapes: BTreeMap<String, [usize; 2]> = config
            .arch()
            .linears()
            .into_iter()
            .map(|l| (l.name, [l.d_output, l.d_input]))
            .collect();
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

/// Where PEFT hangs the base model.
const PREFIX: &str = "base_model.model.";

#[cfg(test)]
mod tests;
