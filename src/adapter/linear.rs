//! A linear layer with an optional elastic adapter.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};

use super::lora::{ElasticLora, LoraConfig, ScaleRule};
use crate::error::{Error, Result};
use crate::nn::BaseLinear;

/// Settings of an [`ElasticLoraLinear`] that stands on its own.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use elastic_lora::ElasticLoraLinearConfig;
///
/// # fn main() -> elastic_lora::Result<()> {
/// let device = Device::flex();
/// let mut layer = ElasticLoraLinearConfig::new(17, 5, 8).with_alpha(Some(12.0)).with_bias(true).init(&device)?;
/// layer.set_active_rank(3)?;
/// let x = Tensor::<2>::random([2, 17], Distribution::Default, &device);
/// assert_eq!(layer.forward(x).dims(), [2, 5]);
/// # Ok(())
/// # }
/// ```
#[derive(Config, Debug)]
pub struct ElasticLoraLinearConfig {
    /// Inputs.
    pub d_input: usize,
    /// Outputs.
    pub d_output: usize,
    /// The largest rank.
    pub rank: usize,
    /// Numerator of the scale; twice the rank where it is not given.
    pub alpha: Option<f64>,
    /// Probability of dropping an element of the adapter's input in training, in 0..1.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Whether the base has a bias.
    #[config(default = false)]
    pub bias: bool,
    /// How the scale follows from alpha and rank.
    #[config(default = "ScaleRule::AlphaOverMaxRank")]
    pub scale_rule: ScaleRule,
    /// Seed of the adapter's first factor.
    #[config(default = 0)]
    pub seed: u64,
}

impl ElasticLoraLinearConfig {
    /// A layer with a random frozen base (uniform in `±1 / sqrt(d_input)`, from the device's generator) and a fresh adapter.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a size or rank of 0, or an alpha or dropout outside its range.
    pub fn init(&self, device: &Device) -> Result<ElasticLoraLinear> {
        let adapter = ElasticLora::new(&self.lora(), self.d_input, self.d_output, self.seed, device)?;
        let bound = 1.0 / (self.d_input as f64).sqrt();
        let uniform = Distribution::Uniform(-bound, bound);
        let weight = Tensor::random([self.d_input, self.d_output], uniform, device);
        let bias = self.bias.then(|| Tensor::random([self.d_output], uniform, device));
        Ok(ElasticLoraLinear { base: BaseLinear::from_tensors(weight, bias)?, adapter: Some(adapter) })
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
        let adapter = ElasticLora::new(&self.lora(), self.d_input, self.d_output, self.seed, device)?;
        Ok(ElasticLoraLinear { base, adapter: Some(adapter) })
    }

    fn lora(&self) -> LoraConfig {
        LoraConfig {
            rank: self.rank,
            alpha: self.alpha.unwrap_or(2.0 * self.rank as f64),
            dropout: self.dropout,
            scale_rule: self.scale_rule,
        }
    }
}

/// A frozen linear layer with, where there is one, an elastic low-rank adapter:
/// `y = x W + b + s (dropout(x) A_r) B_r`, or with SparsePEFT's mask `y = x (W + s A_r B_r * M) + b`.
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
        Ok(Self { base, adapter: Some(adapter) })
    }

    /// A layer without an adapter.
    pub fn plain(base: BaseLinear) -> Self {
        Self { base, adapter: None }
    }

    /// Applies the layer with its active rank; see [`ElasticLora::forward`].
    ///
    /// # Shapes
    /// - `x`: `[.., d_input]`; result: `[.., d_output]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.adapter {
            Some(adapter) => adapter.forward(x, self.base.weight.val(), self.base.bias.as_ref().map(|bias| bias.val())),
            None => self.base.forward(x),
        }
    }

    /// Makes a rank the active one. Moves no weight.
    ///
    /// # Errors
    /// [`Error::InvalidRank`] where there is no adapter, for 0, or for more than the maximum.
    pub fn set_active_rank(&mut self, rank: usize) -> Result<()> {
        match &mut self.adapter {
            Some(adapter) => adapter.set_active_rank(rank),
            None => Err(Error::InvalidRank { layer: "this layer, which has no adapter".into(), found: rank, max: 0 }),
        }
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
            let weight = self.base.weight.val().without_autodiff();
            adapter.set_mask(Some(weight.not_equal_elem(0.0).float()))?;
        }
        Ok(())
    }

    /// The weight that a plain layer needs to give this layer's output: base plus active update, `[d_input, d_output]`.
    pub fn merged_weight(&self) -> Tensor<2> {
        let weight = self.base.weight.val();
        match &self.adapter {
            Some(adapter) => weight + adapter.delta(),
            None => weight,
        }
    }
}
