//! Quantization-aware supernets: every subnet is trained through quantization grids (QA-SparsePEFT
//! of SQFT, arXiv 2410.03750).
//!
//! The authors start from the sparse 16-bit weight if they have it, and otherwise from GPTQ's
//! codes. Here, training starts from the weights that the model holds, dense or quantized.
//! Departures: bits, groups and order of a grid are those of the quantizer that made it (the
//! authors use 4 bits and groups in order); scales may be trained (as in NNCF's absorbable LoRA);
//! dropout does not act on the base's input.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::SuperNet;
use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::model::Decoder;
use crate::nn::{host_values, mix_seed, tensor_from_matrix};
use crate::progress::{Progress, Task};
use crate::sparsity::Mask;

/// Settings of the grids that a supernet is trained through.
#[derive(Clone, Debug, Default)]
pub struct QaConfig {
    /// The grid of each adapted layer, by Hugging Face's module path. Its codes are ignored. A
    /// layer that is missing here but has a quantized weight keeps its own grid.
    pub grids: BTreeMap<String, QuantizedMatrix>,
    /// The weights that may be non-zero, for layers where the current zeros do not tell: in a
    /// pruned and quantized weight, rounding also produced zeros, which training may move again.
    /// Other layers keep the mask that they have, if any.
    pub masks: BTreeMap<String, Mask>,
    /// Whether the scales are trained along with the adapters, at a tenth of their learning rate
    /// and without weight decay.
    pub train_scales: bool,
}

impl QaConfig {
    /// Creates settings with these grids and fixed scales.
    pub fn new(grids: BTreeMap<String, QuantizedMatrix>) -> Self {
        Self {
            grids,
            ..Self::default()
        }
    }

    setters! {
        with_masks(masks: BTreeMap<String, Mask>);
        with_train_scales(train_scales: bool);
    }
}

/// Summary of a supernet's grids, kept in its settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct QaSummary {
    /// Bits per code, by layer.
    pub bits: BTreeMap<String, u8>,
    /// Hash of the grids and masks, which distinguishes one run from another.
    pub fingerprint: u64,
    /// Whether scales are trained.
    pub train_scales: bool,
}

impl SuperNet {
    /// Puts the weight of every adapted layer, update included, on a grid. From then on, the
    /// weights used in training are exactly those that [`Merger`](crate::Merger) produces. Updates
    /// stay masked (SparsePEFT) or unmasked as before.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if an adapted layer has no grid or the supernet has no
    /// adapters, [`Error::UnknownLayer`] if a grid or mask names a layer without an adapter, and
    /// [`Error::ShapeMismatch`] if a grid or mask has another shape.
    pub fn with_quantization(mut self, qa: &QaConfig) -> Result<Self> {
        if let Some(name) = self.taken.keys().next() {
            return Err(Error::Unsupported {
                what: format!("a grid for `{name}`, whose principal part the adapter has taken,"),
            });
        }
        let device = self.model.device().without_autodiff();
        for name in qa.grids.keys().chain(qa.masks.keys()) {
            if self
                .model
                .linear(name)
                .is_none_or(|layer| layer.adapter.is_none())
            {
                let context = "adapted layers of a quantization-aware supernet".to_string();
                return Err(Error::UnknownLayer {
                    context,
                    layer: name.clone(),
                });
            }
        }
        let (mut bits, mut print) = (BTreeMap::new(), Fingerprint::new());
        self.model.try_for_each_linear(|name, layer| {
            let own = layer.base.quantized();
            let Some(adapter) = &mut layer.adapter else {
                return Ok(());
            };
            if let Some(mask) = qa.masks.get(name) {
                let expected = [adapter.d_output(), adapter.d_input()];
                if [mask.rows(), mask.cols()] != expected {
                    return Err(Error::ShapeMismatch {
                        what: format!("mask of `{name}`"),
                        expected: expected.to_vec(),
                        found: vec![mask.rows(), mask.cols()],
                    });
                }
                adapter.set_mask(Some(
                    tensor_from_matrix(&mask.to_matrix(), &device).not_equal_elem(0.0),
                ))?;
            }
            let unpacked;
            let grid = match (qa.grids.get(name), own) {
                (Some(grid), _) => grid,
                (None, Some(own)) => {
                    unpacked = own.unpack();
                    &unpacked
                }
                (None, None) => {
                    return Err(Error::argument(
                        "grids",
                        name,
                        "a grid for every adapted layer",
                    ));
                }
            };
            adapter.set_grid(grid, qa.train_scales)?;
            bits.insert(name.to_string(), grid.parts().bits);
            print.add(name, grid, adapter.mask().map(|mask| mask.clone().float()));
            Ok(())
        })?;
        if bits.is_empty() {
            return Err(Error::argument(
                "net",
                "no adapter",
                "at least one layer to train through its grid",
            ));
        }
        let summary = QaSummary {
            bits,
            fingerprint: print.0,
            train_scales: qa.train_scales,
        };
        self.config.quantization = Some(summary);
        Ok(self)
    }
}

impl SuperNet {
    /// Initializes every adapter with the error that compression made in its weight; see
    /// [`ElasticLora::init_from_error`](crate::adapter::ElasticLora::init_from_error). Under a mask
    /// this is an approximation. Optional; call it before training.
    ///
    /// `original` is the model before compression. `norms` holds the norms of the layers' inputs,
    /// by Hugging Face's module path (the square roots of
    /// [`InputNorms::mean_sq_norms`](crate::sparsity::InputNorms::mean_sq_norms)); layers with
    /// norms weight the error by them.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] if `original` lacks an adapted layer,
    /// [`Error::ShapeMismatch`] if its weight there has another shape, [`Error::Interrupted`] (some
    /// adapters then begin otherwise than others), and the errors of
    /// [`ElasticLora::init_from_error`](crate::adapter::ElasticLora::init_from_error).
    pub fn init_from_error(
        &mut self,
        original: &Decoder,
        norms: &BTreeMap<String, Vec<f32>>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let mut seed = mix_seed(self.config.seed, u64::MAX);
        let adapted = self.model.linears().filter(|(_, l)| l.adapter.is_some());
        let mut task = Task::begin(progress, "begin adapters", adapted.count(), "layers")?;
        self.model.try_for_each_linear(|name, layer| {
            let Some(adapter) = &mut layer.adapter else {
                return Ok(());
            };
            let before = original.linear(name).ok_or_else(|| Error::UnknownLayer {
                context: "model before compression".into(),
                layer: name.to_string(),
            })?;
            let (mut error, after) = (before.base.to_matrix(), layer.base.to_matrix());
            if (error.rows(), error.cols()) != (after.rows(), after.cols()) {
                return Err(Error::ShapeMismatch {
                    what: format!("`{name}` before compression"),
                    expected: vec![after.rows(), after.cols()],
                    found: vec![error.rows(), error.cols()],
                });
            }
            error
                .as_mut_slice()
                .iter_mut()
                .zip(after.as_slice())
                .for_each(|(error, after)| *error -= after);
            seed = mix_seed(seed, 1);
            adapter.init_from_error(&error, norms.get(name).map(Vec::as_slice), seed)?;
            task.step("")
        })
    }
}

/// FNV-1a hash (Fowler, Noll, Vo) of grids and masks.
struct Fingerprint(u64);

impl Fingerprint {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn word(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    }

    fn add(&mut self, name: &str, grid: &QuantizedMatrix, mask: Option<Tensor<2>>) {
        let parts = grid.parts();
        name.bytes().for_each(|byte| self.word(byte.into()));
        self.word(parts.bits.into());
        self.word(parts.group_size as u64);
        parts
            .scales
            .iter()
            .for_each(|scale| self.word(scale.to_bits().into()));
        parts
            .zeros
            .iter()
            .for_each(|zero| self.word((*zero).into()));
        parts
            .group_of
            .iter()
            .flatten()
            .for_each(|group| self.word((*group).into()));
        let mask = mask.map(host_values).unwrap_or_default();
        mask.iter()
            .for_each(|keep| self.word(keep.to_bits().into()));
    }
}
