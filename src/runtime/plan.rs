//! In which formats a model's weights are stored.

use crate::error::{Error, Result};
use crate::format::{StoredMatrix, WeightFormat};
use crate::linalg::Matrix;
use crate::quant::{GridConfig, ScaleDtype, round_to_nearest};

/// The formats of a model's weights, by their place. Norms and biases are always kept at 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatPlan {
    /// The linear layers inside the blocks.
    pub linears: WeightFormat,
    /// The embedding, of which a token reads one row; the head as well where they are tied.
    pub embedding: WeightFormat,
    /// The head, where it is not tied.
    pub head: WeightFormat,
    /// The factors of low-rank adapters: a dense format of numbers.
    pub adapters: WeightFormat,
}

impl FormatPlan {
    /// `linears` inside the blocks; all else dense at 16 bits, or at 32 beside [`WeightFormat::F32`].
    pub fn new(linears: WeightFormat) -> Self {
        let dense = match linears {
            WeightFormat::F32 => WeightFormat::F32,
            WeightFormat::Bf16 | WeightFormat::SparseBf16 | WeightFormat::NmBf16 { .. } => {
                WeightFormat::Bf16
            }
            _ => WeightFormat::F16,
        };
        Self {
            linears,
            embedding: dense,
            head: dense,
            adapters: dense,
        }
    }

    /// Sets the head's format.
    pub fn with_head(mut self, head: WeightFormat) -> Self {
        self.head = head;
        self
    }

    /// Sets the embedding's format.
    pub fn with_embedding(mut self, embedding: WeightFormat) -> Self {
        self.embedding = embedding;
        self
    }

    /// Sets the format of adapters' factors.
    pub fn with_adapters(mut self, adapters: WeightFormat) -> Self {
        self.adapters = adapters;
        self
    }

    pub(crate) fn validate(&self) -> Result<()> {
        match self.adapters {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => Ok(()),
            other => Err(Error::argument(
                "adapters",
                format!("{other:?}"),
                "f32, f16 or bf16",
            )),
        }
    }
}

impl From<WeightFormat> for FormatPlan {
    fn from(linears: WeightFormat) -> Self {
        Self::new(linears)
    }
}

/// Names the tensor that could not be stored.
fn named(name: &str, error: Error) -> Error {
    match error {
        Error::InvalidArgument {
            found, expected, ..
        } => Error::Unsupported {
            what: format!("storing `{name}`: {found} (expected {expected})"),
        },
        other => other,
    }
}

/// Stores a weight of numbers. Codes are rounded to nearest, zeros kept; what was quantized better comes with codes of its own.
pub(crate) fn encode(name: &str, weight: &Matrix, format: WeightFormat) -> Result<StoredMatrix> {
    let (bits, group_size, symmetric, sparse) = match format {
        WeightFormat::Int {
            bits,
            group_size,
            symmetric,
        } => (bits, group_size, symmetric, false),
        WeightFormat::SparseInt4 {
            group_size,
            symmetric,
        } => (4, group_size, symmetric, true),
        _ => return StoredMatrix::from_matrix(weight, format).map_err(|error| named(name, error)),
    };
    let grid = GridConfig::new(bits)
        .with_group_size(group_size)
        .with_symmetric(symmetric)
        .with_scale_dtype(ScaleDtype::F16);
    let codes = round_to_nearest(weight, &grid, None)?;
    StoredMatrix::from_quantized(&codes, sparse).map_err(|error| named(name, error))
}

/// Stores a weight in another format. Codes stay the codes that they are, sparse or not; numbers are rounded where the format asks
/// for it.
pub(super) fn convert(
    name: &str,
    stored: &StoredMatrix,
    format: WeightFormat,
) -> Result<StoredMatrix> {
    if stored.format() == format {
        return Ok(stored.clone());
    }
    let sparse = match format {
        WeightFormat::Int { .. } => Some(false),
        WeightFormat::SparseInt4 { .. } => Some(true),
        _ => None,
    };
    let Some((codes, sparse)) = stored.to_quantized().zip(sparse) else {
        return encode(name, &stored.to_matrix(), format);
    };
    let converted =
        StoredMatrix::from_quantized(&codes, sparse).map_err(|error| named(name, error))?;
    // A row's only group has no size of its own.
    let sizes = |format: WeightFormat| match format {
        WeightFormat::Int {
            bits,
            group_size,
            symmetric,
        } => Some((
            bits,
            group_size.unwrap_or(stored.cols()).min(stored.cols()),
            symmetric,
        )),
        WeightFormat::SparseInt4 {
            group_size,
            symmetric,
        } => Some((
            4,
            group_size.unwrap_or(stored.cols()).min(stored.cols()),
            symmetric,
        )),
        _ => None,
    };
    if sizes(converted.format()) != sizes(format) {
        let (from, to) = (converted.format(), format);
        return Err(Error::Unsupported {
            what: format!("storing `{name}`, codes of {from:?}, as {to:?}"),
        });
    }
    Ok(converted)
}
