//! A linear layer with an optional elastic adapter.

use burn::module::Module;
use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};

use super::lora::ElasticLora;
use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::nn::{BaseLinear, matrix_from_tensor, ops};
use crate::space::{LoraConfig, ScaleRule};

/// Settings of a standalone [`ElasticLoraLinear`].
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use elastic_lora::ElasticLoraLinearConfig;
///
/// # fn main() -> elastic_lora::Result<()> {
/// let device = Device::flex();
/// let mut layer =
///     ElasticLoraLinearConfig::new(17, 5, 8).with_alpha(12.0).with_bias(true).init(&device)?;
/// layer.set_active_rank(3)?;
/// let x = Tensor::<2>::random([2, 17], Distribution::Default, &device);
/// assert_eq!(layer.forward(x).dims(), [2, 5]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ElasticLoraLinearConfig {
    /// Number of inputs.
    pub d_input: usize,
    /// Number of outputs.
    pub d_output: usize,
    /// Whether the base has a bias.
    pub bias: bool,
    /// Rank, alpha, dropout and scale rule of the adapter.
    pub lora: LoraConfig,
    /// Seed of the adapter's factor A.
    pub seed: u64,
}

impl ElasticLoraLinearConfig {
    /// Creates the settings of a layer without a bias, with an adapter configured by
    /// [`LoraConfig::new`].
    pub fn new(d_input: usize, d_output: usize, rank: usize) -> Self {
        Self {
            d_input,
            d_output,
            bias: false,
            lora: LoraConfig::new(rank),
            seed: 0,
        }
    }

    /// Sets alpha, the numerator of the scale.
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

    /// Creates a layer with a random frozen base (uniform in `±1 / sqrt(d_input)`, from the
    /// device's generator) and a fresh adapter.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if a size or the rank is 0, or if alpha or dropout is out
    /// of range.
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

    /// Puts a fresh adapter on an existing layer.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the base has other sizes, and [`Error::InvalidArgument`]
    /// as [`init`](Self::init) does.
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

/// A frozen linear layer with an optional elastic low-rank adapter. It computes
///
/// - with a plain adapter, `y = x W + b + s (dropout(x) A_r) B_r`;
/// - with SparsePEFT's mask `M`, `y = x (W + s A_r B_r * M) + b`;
/// - with a grid, `y = x grid(W + s A_r B_r * M) + b`.
///
/// It fits into any Burn model. The base is frozen; the factors of the adapter are trained, for
/// which the layer must be on a device with a tape (`device.autodiff()`), as
/// `examples/own_module.rs` shows. Dropout is applied only on such a device.
#[derive(Module, Debug)]
pub struct ElasticLoraLinear {
    /// The frozen layer.
    pub base: BaseLinear,
    /// The adapter, if any.
    pub adapter: Option<ElasticLora>,
}

impl ElasticLoraLinear {
    /// Creates a layer with an adapter.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the adapter was made for other sizes.
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

    /// Creates a layer without an adapter.
    pub fn plain(base: BaseLinear) -> Self {
        Self {
            base,
            adapter: None,
        }
    }

    /// Applies the layer with its active rank.
    ///
    /// The fused operation treats the base weight as a constant. If the weight is trained beside
    /// its adapter, plain operations are used, which give it a gradient. A masked adapter takes one
    /// product with the summed weight, exactly the weight that a merge produces; with dropout it
    /// takes two products. Beside a base weight in bf16 the sum is rounded to bf16, as a merge
    /// rounds it.
    ///
    /// With a grid, the summed weight is rounded to the grid, and the base weight is always a
    /// constant. Dropout then acts on the input of everything that the adapter changes,
    /// `x W + dropout(x) (grid(W + s A_r B_r * M) - W)`. As with the other adapters, and unlike in
    /// the authors' code, no input of the base weight is dropped.
    ///
    /// # Shapes
    /// - `x`: `[.., d_input]`; result: `[.., d_output]`, with the active sizes
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

    /// Sets the active rank. No weights are moved.
    ///
    /// # Errors
    /// Returns [`Error::InvalidRank`] if there is no adapter, or if `rank` is 0 or above the
    /// maximum.
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

    /// Numbers of active inputs and outputs; all of them at first.
    pub fn active_dims(&self) -> [usize; 2] {
        self.base.active_dims()
    }

    /// Restricts the base and the adapter to the first `d_input` inputs and `d_output` outputs
    /// (mode B). No weights are moved.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if a size is 0 or above the full size, and
    /// [`Error::Unsupported`] for a part of a quantized weight or for fewer inputs of a grid whose
    /// groups are not in order. The layer is then unchanged.
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

    /// The active rank, or 0 without an adapter.
    pub fn active_rank(&self) -> usize {
        self.adapter.as_ref().map_or(0, ElasticLora::active_rank)
    }

    /// Confines the update to the non-zeros of the base weight (SparsePEFT). Does nothing without
    /// an adapter.
    ///
    /// # Errors
    /// Currently infallible for layers created by this crate.
    pub fn mask_by_base(&mut self) -> Result<()> {
        if let Some(adapter) = &mut self.adapter {
            let weight = self.base.weight().without_autodiff();
            adapter.set_mask(Some(weight.not_equal_elem(0.0)))?;
        }
        Ok(())
    }

    /// The codes that training saw, `[d_output, d_input]` with the active sizes, if the adapter has
    /// a grid: the result of a merge.
    ///
    /// # Errors
    /// Returns [`Error::OffGrid`] if the device computed a value that is not on the grid, such as
    /// NaN.
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

    /// The weight with which a plain layer gives this layer's output: base plus active update,
    /// `[d_input, d_output]` with the active sizes.
    pub fn merged_weight(&self) -> Tensor<2> {
        match &self.adapter {
            // The sum is rounded as in training.
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
