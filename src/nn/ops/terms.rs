//! Arguments and results of the operations that are not tensors.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, ExtensionType, TensorMetadata};
use burn::tensor::Tensor;

use crate::nn::{Dropout, InputGroups, StoredWeight};

/// The low-rank part of a layer: active rank, scale and dropout.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraTerm {
    /// Active rank: the number of first columns of A and rows of B in use, at least 1.
    pub rank: usize,
    /// Scale of the update.
    pub scale: f64,
    /// Dropout of the adapter's input.
    pub dropout: Dropout,
}

/// A low-rank update whose sum with its weight is rounded to a grid.
#[derive(Clone, Debug, PartialEq)]
pub struct GridTerm {
    /// The update. Its dropout is ignored.
    pub lora: LoraTerm,
    /// Bits per code: the codes are `0..2^bits`.
    pub bits: u8,
    /// Groups of weight rows that share a scale and a zero point.
    pub groups: InputGroups,
}

impl GridTerm {
    /// The largest code.
    pub(super) fn top(&self) -> f32 {
        f32::from(u8::MAX >> (8 - self.bits.clamp(1, 8)))
    }
}

/// Maximum number of rows for which a product reads the stored format directly. For more rows, the
/// weight is unpacked once, and the product is dense.
pub(super) const FEW_ROWS: usize = 8;

/// The number of rows of an input with `elements` elements, if a product with the stored weight
/// reads it directly.
pub(super) fn stored_rows(elements: usize, weight: &StoredWeight) -> Option<usize> {
    let [d_input, _] = weight.dims();
    let rows = elements.checked_div(d_input)?;
    (rows * d_input == elements && (1..=FEW_ROWS).contains(&rows)).then_some(rows)
}

/// The weight of a linear layer: a tensor, or a constant in its stored format.
#[derive(Clone, Debug, ExtensionType)]
pub enum Weight<B: Backend> {
    /// A weight `[d_input, d_output]` of any float dtype.
    Dense(FloatTensor<B>),
    Stored(StoredWeight),
}

impl<B: Backend> Weight<B> {
    /// Whether the weight is stored and a product with `x` has few enough rows to read it directly.
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

/// Another model whose predictions the head's loss uses.
#[derive(Clone, Debug, ExtensionType)]
pub(crate) enum Teacher<B: Backend> {
    None,
    /// The teacher's hidden states, and its share of the loss.
    States(FloatTensor<B>, f64),
}

/// Results of the head: the loss, the loss against the targets alone, and the needed gradients.
pub(super) type Head<T> = (T, T, Option<T>, Option<T>);
