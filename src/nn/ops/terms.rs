//! What the operations take and give besides tensors.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, ExtensionType, TensorMetadata};
use burn::tensor::Tensor;

use crate::nn::{Dropout, InputGroups, StoredWeight};

/// The low-rank part of a layer: which ranks act, how strongly, and what is dropped of its input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraTerm {
    /// Ranks in use: the first columns of A and rows of B, at least 1.
    pub rank: usize,
    /// Factor of the update.
    pub scale: f64,
    /// Of the adapter's input.
    pub dropout: Dropout,
}

/// A low-rank update whose sum with its weight is rounded to a grid.
#[derive(Clone, Debug, PartialEq)]
pub struct GridTerm {
    /// The update; its dropout is not used.
    pub lora: LoraTerm,
    /// Bits of a code: the codes are `0..2^bits`.
    pub bits: u8,
    /// Which rows of the weight share a scale and a zero point.
    pub groups: InputGroups,
}

impl GridTerm {
    /// The largest code.
    pub(super) fn top(&self) -> f32 {
        f32::from(u8::MAX >> (8 - self.bits.clamp(1, 8)))
    }
}

/// Most rows of a product that reads a stored weight as it is stored; for more, it is unpacked
/// once, and the product is dense.
pub(super) const FEW_ROWS: usize = 8;

/// Rows of a product of so many numbers with a stored weight, where they are few.
pub(super) fn stored_rows(elements: usize, weight: &StoredWeight) -> Option<usize> {
    let [d_input, _] = weight.dims();
    let rows = elements.checked_div(d_input)?;
    (rows * d_input == elements && (1..=FEW_ROWS).contains(&rows)).then_some(rows)
}

/// A linear layer's weight: a tensor, or a constant that stays as it is stored.
#[derive(Clone, Debug, ExtensionType)]
pub enum Weight<B: Backend> {
    /// `[d_input, d_output]`, in any float format.
    Dense(FloatTensor<B>),
    Stored(StoredWeight),
}

impl<B: Backend> Weight<B> {
    /// Whether it is stored and multiplied by a few rows of `x`, as which it is not unpacked.
    pub(super) fn is_read_as_stored(&self, x: &FloatTensor<B>) -> bool {
        match self {
            Self::Dense(_) => false,
            Self::Stored(weight) => stored_rows(x.shape().num_elements(), weight).is_some(),
        }
    }
}

impl From<Tensor<2>> for Weight<Dispatch> {
    fn from(weight: Tensor<2>) -> Self {
        Self::Dense(weight.into_dispatch())
    }
}

impl From<&StoredWeight> for Weight<Dispatch> {
    fn from(weight: &StoredWeight) -> Self {
        Self::Stored(weight.clone())
    }
}

/// Another model that the head's loss compares with.
#[derive(Clone, Debug, ExtensionType)]
pub(crate) enum Teacher<B: Backend> {
    None,
    /// Its hidden states, and its share of the loss.
    States(FloatTensor<B>, f64),
}

/// What the head gives: the loss, that against the targets alone, and the gradients that are
/// wanted.
pub(super) type Head<T> = (T, T, Option<T>, Option<T>);
