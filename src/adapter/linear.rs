//! A linear layer with an optional elastic adapter.

use burn::module::Module;
use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};

use super::lora::ElasticLora;
use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::nn::{BaseLinear, matrix_from_tensor, ops};
use crate::space::{LoraConfig, ScaleRule};

/// Settings of an [`ElasticLoraLinear`] that stands on its own.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use elastic_lora::ElasticLoraLinearConfig;
///
/// # fn main() -> elastic_lora::Result<()> {
/// let device = Device::flex();
/// let mut layer = ElasticLoraLinearConfig::new(17, 5, 8).with_alpha(12.0).with_bias(true).init(&device)?;
/// layer.set_active_rank(3)?;
/// let x = Tensor::<2>::random([2, 17], Distribution::Default, &device);
/// assert_eq!(layer.forward(x).dims(), [2, 5]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ElasticLoraLinearConfig {
    /// Inputs.
    pub d_input: usize,
    /// Outputs.
    pub d_output: usize,
    /// Whether the base has a bias.
    pub bias: bool,
    /// Rank, alpha, dropout and scale rule of the adapter.
    pub lora: LoraConfig,
    /// Seed of the adapter's first factor.
    pub seed: u64,
}

impl ElasticLoraLinearConfig {
    /// A layer without a bias and with an adapter of [`LoraConfig::new`]'s settings.
    pub fn new(d_input: usize, d_output: usize, rank: usize) -> Self {
        Self {
            d_input,
            d_output,
            bias: false,
            lora: LoraConfig::new(rank),
            seed: 0,
        }
    }

    /// Sets the numerator of the scale.
    pub fn with_alpha(mut self, alpha: f64) -> Self {
        self.lora = self.lora.with_alpha(alpha);
        self
    }

    /// Sets the probability of dropping an element of the adapter's input in training, in 0..1.
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.lora = self.lora.with_dropout(dropout);
        self
    }

    /// Sets how the scale follows from alpha and rank.
    pub fn with_scale_rule(mut self, scale_rule: ScaleRule) -> Self {
        self.lora = self.lora.with_scale_rule(scale_rule);
        self
    }

    setters! {
        with_bias(bias: bool);
        with_seed(seed: u64);
    }

    /// A layer with a random frozen base (uniform in `±1 / sqrt(d_input)`, from the device's generator) and a fresh adapter.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a size or rank of 0, or an alpha or dropout outside its range.
    pub fn init(&self, device: &Device) -> Result<ElasticLoraLinear> {
        let adapter = ElasticLora::new(&self.lora, self.d_input, self.d_output, self.seed, device)?;
        let bound = 1.0 / (self.d_input as f64).sqrt();
        let uniform = Distribution::Uniform(-bound, bound);
        let weight = Tensor::random([self.d_input, self.d_output], uniform, device);
        let bias = self
            .bias
            .then(|| Tensor::random([self.d_output], uniform, device));
        Ok(ElasticLoraLinear {
            base: BaseLinear::from_tensors(weight, bias)?,
            adapter: Some(adapter),
        })
    }

    /// A fresh adapter on a layer that exists.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] where the base has other sizes; [`Error::InvalidArgument`] as for [`init`](Self::init).
    pub fn init_on(&self, base: BaseLinear, device: &Device) -> Result<ElasticLoraLinear> {
        if base.dims() != [self.d_input, self.d_output] {
            return Err(Error::ShapeMismatch {
                what: "base weight of an adapted layer".into(),
                expected: vec![self.d_input, self.d_output],
                found: base.dims().to_vec(),
            });
        }
        let adapter = ElasticLora::new(&self.lora, self.d_input, self.d_output, self.seed, device)?;
        Ok(ElasticLoraLinear {
            base,
            adapter: Some(adapter),
        })
    }
}

/// A frozen linear layer with, where there is one, an elastic low-rank adapter:
/// `y = x W + b + s (dropout(x) A_r) B_r`, or with SparsePEFT's mask `y = x (W + s A_r B_r * M) + b`, or with a grid
/// `y = x grid(W + s A_r B_r * M) + b`.
///
/// Usable in any Burn model. Dropout acts on an autodiff device only.
#[derive(Module, Debug)]
pub struct ElasticLoraLinear {
    /// The frozen layer.
    pub base: BaseLinear,
    /// The update; none leaves the base as it is.
    pub adapter: Option<ElasticLora>,
}

impl ElasticLoraLinear {
    /// A layer with an adapter.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] where the adapter is for other sizes.
    pub fn new(base: BaseLinear, adapter: ElasticLora) -> Result<Self> {
        let found = [adapter.d_input(), adapter.d_output()];
        if base.dims() != found {
            return Err(Error::ShapeMismatch {
                what: "adapter of a layer".into(),
                expected: base.dims().to_vec(),
                found: found.to_vec(),
            });
        }
        Ok(Self {
            base,
            adapter: Some(adapter),
        })
    }

    /// A layer without an adapter.
    pub fn plain(base: BaseLinear) -> Self {
        Self {
            base,
            adapter: None,
        }
    }

    /// Applies the layer with its active rank.
    ///
    /// The weight is a constant of the fused product; where somebody trains it beside its adapter, plain operations see
    /// to its gradient. A masked adapter takes one product with the summed weight, the very weight that a merge gives, or with
    /// dropout two. Beside a base weight of bf16 the sum is rounded to bf16, as it is where it is merged.
    ///
    /// With a grid, the summed weight is on it, and the base weight a constant in every case. What dropout then acts on is the input
    /// of all that the adapter changes, `x W + dropout(x) (grid(W + s A_r B_r * M) - W)`, so that, as with the other adapters and
    /// unlike in the authors' code, none of the base's input is dropped.
    ///
    /// # Shapes
    /// - `x`: `[.., d_input]`; result: `[.., d_output]`, both as far as active
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let Some(adapter) = &self.adapter else {
            return self.base.forward(x);
        };
        let term = adapter.term();
        let summed = adapter.is_masked() || adapter.grid.is_some();
        if summed
            && !term.dropout.is_active()
            && (adapter.grid.is_some() || !self.base.is_tracked())
        {
            let weight = self.base.stored().without_autodiff();
            if let Some(y) = adapter.product_with_sum(x.clone(), weight) {
                return self.base.with_bias(y);
            }
        }
        if adapter.grid.is_some() {
            let weight = self.base.active_weight().without_autodiff();
            let sum = adapter.added_to(weight.clone());
            return self.base.forward(x.clone()) + ops::linear(adapter.dropped(x), sum - weight);
        }
        if self.base.is_tracked() || (adapter.is_masked() && term.dropout.is_active()) {
            return self.base.forward(x.clone()) + adapter.update(x);
        }
        let (a, b) = adapter.factors();
        self.base.forward_with(x, a, b, term)
    }

    /// Makes a rank the active one. Moves no weight.
    ///
    /// # Errors
    /// [`Error::InvalidRank`] where there is no adapter, for 0, or for more than the maximum.
    pub fn set_active_rank(&mut self, rank: usize) -> Result<()> {
        match &mut self.adapter {
            Some(adapter) => adapter.set_active_rank(rank),
            None => Err(Error::InvalidRank {
                layer: "this layer, which has no adapter".into(),
                found: rank,
                max: 0,
            }),
        }
    }

    /// Inputs and outputs that are active, all of them at first.
    pub fn active_dims(&self) -> [usize; 2] {
        self.base.active_dims()
    }

    /// Makes the first `d_input` inputs and `d_output` outputs the active ones, of base and adapter alike (mode B). Moves no
    /// weight.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for 0 or more than there are, [`Error::Unsupported`] for a part of what has none; the layer is then as
    /// before.
    pub fn set_active_dims(&mut self, active: [usize; 2]) -> Result<()> {
        let before = self.base.active_dims();
        self.base.set_active_dims(active)?;
        let Some(adapter) = &mut self.adapter else {
            return Ok(());
        };
        adapter
            .set_active_dims(active)
            .or_else(|error| self.base.set_active_dims(before).and(Err(error)))
    }

    /// The active rank; 0 without an adapter.
    pub fn active_rank(&self) -> usize {
        self.adapter.as_ref().map_or(0, ElasticLora::active_rank)
    }

    /// Confines the update to the base weight's non-zeros (SparsePEFT); does nothing without an adapter.
    ///
    /// # Errors
    /// None for a layer that this crate built.
    pub fn mask_by_base(&mut self) -> Result<()> {
        if let Some(adapter) = &mut self.adapter {
            let weight = self.base.weight().without_autodiff();
            adapter.set_mask(Some(weight.not_equal_elem(0.0)))?;
        }
        Ok(())
    }

    /// What a merge gives where the adapter has a grid: the integers that training saw, `[d_output, d_input]` as far as active.
    ///
    /// # Errors
    /// [`Error::OffGrid`] where the device computed a value that is none of its grid's, NaN for one.
    pub fn merged_quantized(&self) -> Result<Option<QuantizedMatrix>> {
        match self
            .adapter
            .as_ref()
            .and_then(|adapter| adapter.grid.as_ref())
        {
            Some(grid) => grid
                .codes_of(&matrix_from_tensor(self.merged_weight()))
                .map(Some),
            None => Ok(None),
        }
    }

    /// The weight that a plain layer needs to give this layer's output: base plus active update, `[d_input, d_output]` as far as
    /// active.
    pub fn merged_weight(&self) -> Tensor<2> {
        match &self.adapter {
            // Rounded as it is in training.
            Some(adapter) if adapter.is_masked() && adapter.grid.is_none() => {
                let sum = adapter.added_to(self.base.stored());
                if sum.dtype() == DType::F32 {
                    sum
                } else {
                    sum.cast(FloatDType::F32)
                }
            }
            Some(adapter) => adapter.added_to(self.base.active_weight()),
            None => self.base.active_weight(),
        }
    }
}
