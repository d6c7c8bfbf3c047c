//! Quantizes a model block by block.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::input::{InputStatistic, in_layer};
use super::kept::Kept;
use super::place::{InMemory, Place};
use super::prune::needed_samples;
use super::walk;
use crate::error::{Error, Result};
use crate::format::{QuantizedMatrix, StoredMatrix};
use crate::linalg::{FactorConfig, Hessian, Matrix};
use crate::model::Decoder;
use crate::nn::BaseLinear;
use crate::progress::Progress;
use crate::quant::{GptqConfig, GridConfig, gptq, round_to_nearest, sparse_gptq};
use crate::sparsity::{Mask, Pattern};

/// How weights are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuantizeMethod {
    /// Round to nearest. Needs no data.
    Nearest,
    /// GPTQ.
    Gptq,
    /// GPTQ, with SparseGPT pruning in the same pass.
    SparseGptq(Pattern),
}

impl fmt::Display for QuantizeMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nearest => f.write_str("nearest"),
            Self::Gptq => f.write_str("gptq"),
            Self::SparseGptq(pattern) => write!(f, "gptq with {pattern}"),
        }
    }
}

/// Settings of quantization.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizeConfig {
    /// How weights are rounded.
    pub method: QuantizeMethod,
    /// The grids, and the settings of GPTQ.
    pub gptq: GptqConfig,
    /// Preparation of GPTQ's Hessians.
    pub factor: FactorConfig,
}

impl QuantizeConfig {
    /// Creates settings that round to these grids by `method`.
    pub fn new(method: QuantizeMethod, grid: GridConfig) -> Self {
        Self {
            method,
            gptq: GptqConfig::new(grid),
            factor: FactorConfig::new(),
        }
    }

    setters! {
        with_gptq(gptq: GptqConfig);
        with_factor(factor: FactorConfig);
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`](crate::Error::InvalidArgument) for an invalid field.
    pub fn validate(&self) -> Result<()> {
        self.gptq.validate()?;
        self.factor.validate()?;
        if let QuantizeMethod::SparseGptq(pattern) = self.method {
            pattern.validate()?;
        }
        Ok(())
    }
}

/// Quantizes every linear layer inside the blocks, block by block. Each block is calibrated on the
/// output of the quantized blocks before it. Embedding, head and norms are unchanged. Weights that
/// are 0 stay 0.
///
/// Returns the quantized weights by Hugging Face's module path. The model's own weights become the
/// dequantized values, in the dtype in which they were stored.
///
/// # Errors
/// Returns [`Error::InvalidArgument`](crate::Error::InvalidArgument) for invalid settings or if the
/// method needs samples and there are none, [`Error::HasAdapter`](crate::Error::HasAdapter) for a
/// model with adapters, and the errors of [`walk_blocks`](super::walk_blocks), [`gptq`] and
/// [`round_to_nearest`], with the layer's name.
pub fn quantize_model(
    model: &mut Decoder,
    samples: &[Vec<u32>],
    config: &QuantizeConfig,
    progress: &dyn Progress,
) -> Result<BTreeMap<String, QuantizedMatrix>> {
    run(model, samples, config, None, progress)
}

/// Same as [`quantize_model`]. Finished blocks are kept in a folder within `folder`, and a later
/// call with the same model, samples and settings goes on after them, with the same result. What is
/// kept takes as much space as the codes, and once more the hidden states of the samples; remove
/// `folder` when it is no longer needed.
///
/// # Errors
/// Returns the errors of [`quantize_model`], [`Error::Io`](crate::Error::Io) if a file cannot be
/// written, and [`Error::InvalidFile`](crate::Error::InvalidFile) if a kept block is damaged.
pub fn quantize_model_keeping(
    model: &mut Decoder,
    samples: &[Vec<u32>],
    config: &QuantizeConfig,
    folder: impl AsRef<Path>,
    progress: &dyn Progress,
) -> Result<BTreeMap<String, QuantizedMatrix>> {
    run(model, samples, config, Some(folder.as_ref()), progress)
}

fn run(
    model: &mut Decoder,
    samples: &[Vec<u32>],
    config: &QuantizeConfig,
    folder: Option<&Path>,
    progress: &dyn Progress,
) -> Result<BTreeMap<String, QuantizedMatrix>> {
    config.validate()?;
    model.refuse_adapters("quantize before adapters are put on, or merge them first")?;
    let samples = config.needed(samples)?;
    let quantized = RefCell::new(BTreeMap::new());
    let put = |name: &str, found: QuantizedMatrix| {
        quantized.borrow_mut().insert(name.to_string(), found);
    };
    let store = |name: &str, _: &BaseLinear| match quantized.borrow().get(name) {
        Some(codes) => StoredMatrix::from_quantized(codes, false),
        None => Err(Error::argument("layer", name, "a layer with codes")),
    };
    let restore = |name: &str, layer: &mut BaseLinear, stored: &StoredMatrix| {
        let codes = stored.to_quantized();
        let codes = codes.ok_or_else(|| Error::argument("layer", name, "a layer with codes"))?;
        layer.set_matrix(&codes.dequantize())?;
        put(name, codes);
        Ok(())
    };
    let kept = match folder {
        Some(folder) => {
            let of = (&*model, samples);
            Some(Kept::new(folder, "quantize", config, of, &store, &restore)?)
        }
        None => None,
    };
    let mut place = InMemory::new(model, kept);
    config.walk(&mut place, samples, &put, progress)?;
    drop(place);
    Ok(quantized.take())
}

impl QuantizeConfig {
    /// The samples, if the method needs them.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if it does and there are none.
    pub(super) fn needed<'s>(&self, samples: &'s [Vec<u32>]) -> Result<&'s [Vec<u32>]> {
        let needed = self.method != QuantizeMethod::Nearest;
        needed_samples(samples, needed, self.method)
    }

    /// Quantizes a model wherever it is, and calls `put` with the codes of each layer.
    pub(super) fn walk(
        &self,
        place: &mut dyn Place,
        samples: &[Vec<u32>],
        put: &dyn Fn(&str, QuantizedMatrix),
        progress: &dyn Progress,
    ) -> Result<()> {
        walk(
            place,
            samples,
            "quantize",
            |d_input| match self.method {
                QuantizeMethod::Nearest => InputStatistic::Nothing,
                _ => InputStatistic::Hessian(Hessian::new(d_input)),
            },
            InputStatistic::observe,
            |name, layer, input| {
                let weight = layer.to_matrix();
                let found = quantize_layer(name, &weight, input, self)
                    .map_err(|error| in_layer(name, error))?;
                layer.set_matrix(&found.dequantize())?;
                put(name, found);
                Ok(())
            },
            progress,
        )
    }
}

fn quantize_layer(
    name: &str,
    weight: &Matrix,
    input: &mut InputStatistic,
    config: &QuantizeConfig,
) -> Result<QuantizedMatrix> {
    match config.method {
        QuantizeMethod::Nearest => round_to_nearest(weight, &config.gptq.grid, None),
        QuantizeMethod::Gptq => {
            let mask = Mask::from_nonzero(weight);
            gptq(
                weight,
                input.factor(name, &config.factor)?,
                &config.gptq,
                Some(&mask),
            )
        }
        QuantizeMethod::SparseGptq(pattern) => sparse_gptq(
            weight,
            input.factor(name, &config.factor)?,
            &config.gptq,
            &pattern,
        )
        .map(|(found, _)| found),
    }
}
