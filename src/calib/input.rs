//! The statistics of a layer's input that pruning and quantization methods need.

use burn::tensor::Tensor;

use super::column_squares;
use crate::error::{Error, Result};
use crate::linalg::{Factor, FactorConfig, Hessian};
use crate::nn::host_values;
use crate::sparsity::{InputNorms, Method};

/// A statistic of one input, shared by all layers with that input.
pub(super) enum InputStatistic {
    Nothing,
    Norms(InputNorms),
    Hessian(Hessian),
    /// The factor of a Hessian, computed for the first layer that needed it.
    Factor(Factor),
}

impl InputStatistic {
    /// Creates the empty statistic that pruning by `method` needs.
    pub fn of_method(method: Method, d_input: usize) -> Self {
        match method {
            Method::Magnitude => Self::Nothing,
            Method::Wanda | Method::Ria => Self::Norms(InputNorms::new(d_input)),
            Method::SparseGpt => Self::Hessian(Hessian::new(d_input)),
        }
    }

    /// Adds a layer input from some sequences, `[sequences, seq, d_input]`.
    pub fn observe(&mut self, x: &Tensor<3>) -> Result<()> {
        match self {
            Self::Nothing | Self::Factor(_) => Ok(()),
            Self::Norms(norms) => norms.update_sums(&column_squares(x), x.dims()[0]),
            Self::Hessian(hessian) => hessian.update(&host_values(x.clone())),
        }
    }

    /// The norms, if this statistic is norms.
    pub fn norms(&self) -> Option<&InputNorms> {
        match self {
            Self::Norms(norms) => Some(norms),
            _ => None,
        }
    }

    /// The factor of the Hessian, which replaces the Hessian.
    pub fn factor(&mut self, name: &str, config: &FactorConfig) -> Result<&Factor> {
        if let Self::Hessian(hessian) = self {
            // Without data, all columns would count as dead, and all weights as 0.
            if hessian.rows() == 0 {
                return Err(Error::argument(
                    "layer",
                    name,
                    "one that samples reach, not one that is left out",
                ));
            }
            *self = Self::Factor(Factor::new(hessian, config)?);
        }
        match self {
            Self::Factor(factor) => Ok(factor),
            _ => Err(Error::argument(
                "statistic",
                "none",
                "a Hessian of the layer's input is needed",
            )),
        }
    }
}

/// Adds the layer's name to an error from matrix code.
pub(super) fn in_layer(name: &str, error: Error) -> Error {
    let of = |what: String| format!("{name}: {what}");
    match error {
        Error::NotFinite {
            tensor,
            index,
            value,
        } => Error::NotFinite {
            tensor: of(tensor),
            index,
            value,
        },
        Error::NotPositiveDefinite { what, index, pivot } => Error::NotPositiveDefinite {
            what: of(what),
            index,
            pivot,
        },
        Error::TensorOverflow {
            tensor,
            index,
            value,
            dtype,
        } => Error::TensorOverflow {
            tensor: of(tensor),
            index,
            value,
            dtype,
        },
        other => other,
    }
}
