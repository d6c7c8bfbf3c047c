//! The low-rank update, whose active rank is chosen at run time.

use burn::module::{Module, Param};
use burn::tensor::{Bool, DType, Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::grid::WeightGrid;
use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::linalg::Matrix;
use crate::nn::ops::{self, Dropout, GridTerm, LoraTerm};
use crate::nn::{matrix_from_tensor, mix_seed, prefix, tensor_from_matrix};
use crate::space::LoraConfig;

/// Creates fresh factors: A is uniform in `±1 / sqrt(d_input)` (PEFT's Kaiming-uniform with
/// `a = sqrt(5)`), B is zero, so the update starts at zero. The same seed gives the same factors on
/// every backend.
pub(super) fn fresh_factors(
    rank: usize,
    d_input: usize,
    d_output: usize,
    seed: u64,
    device: &Device,
) -> (Param<Tensor<2>>, Param<Tensor<2>>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let bound = 1.0 / (d_input as f32).sqrt();
    let a: Vec<f32> = (0..d_input * rank)
        .map(|_| rng.random_range(-bound..=bound))
        .collect();
    let a = Tensor::from_data(TensorData::new(a, [d_input, rank]), device);
    let b = Tensor::zeros([rank, d_output], device);
    (Param::from_tensor(a), Param::from_tensor(b))
}

/// The weight plus the update, `W + s A_r B_r`, with the update masked if there is a mask.
/// SparsePEFT's training, merging and the reparameterization all use this one definition.
///
/// # Shapes
/// - `lora_a`: `[d_input, r_max]`, `lora_b`: `[r_max, d_output]`; `weight`, `mask` and result:
///   `[d_input, d_output]`
pub(crate) fn summed_weight(
    weight: Tensor<2>,
    lora_a: Tensor<2>,
    lora_b: Tensor<2>,
    rank: usize,
    scale: f64,
    mask: Option<Tensor<2, Bool>>,
) -> Tensor<2> {
    match mask {
        Some(mask) => ops::summed_weight(
            weight,
            mask,
            lora_a,
            lora_b,
            LoraTerm {
                rank,
                scale,
                dropout: Dropout::NONE,
            },
        ),
        // The scale is applied to the thin factor, which has fewer elements.
        None => weight + (lora_a.narrow(1, 0, rank) * scale).matmul(lora_b.narrow(0, 0, rank)),
    }
}

/// Applies dropout to `x` as [`Dropout`] defines it, with plain operations.
///
/// # Shapes
/// - `x`: any; result: the same
#[doc(hidden)]
pub fn seeded_dropout<const D: usize>(x: Tensor<D>, probability: f64, seed: u64) -> Tensor<D> {
    let dropout = Dropout { probability, seed };
    if !dropout.is_active() {
        return x;
    }
    let factors = TensorData::new(dropout.factors(x.shape().num_elements()), x.shape());
    let factors = Tensor::<D>::from_data(factors, &x.device().without_autodiff());
    x * factors
}

fn check_sizes(d_input: usize, d_output: usize) -> Result<()> {
    if d_input == 0 || d_output == 0 {
        return Err(Error::argument(
            "d_input x d_output",
            format!("{d_input} x {d_output}"),
            "both at least 1",
        ));
    }
    Ok(())
}

/// The elastic low-rank update of one layer.
///
/// All ranks share one pair of factors: rank `r` uses the first `r` columns of `lora_a` and rows of
/// `lora_b`, so changing the rank moves no weights (mode A of arXiv 2501.16372, figure 1).
#[derive(Module, Debug)]
pub struct ElasticLora {
    /// `[d_input, r_max]`; the transpose of PEFT's `lora_A`.
    pub lora_a: Param<Tensor<2>>,
    /// `[r_max, d_output]`; the transpose of PEFT's `lora_B`.
    pub lora_b: Param<Tensor<2>>,
    /// SparsePEFT's mask, `[d_input, d_output]`: true where the base weight is not zero.
    mask: Option<Tensor<2, Bool>>,
    /// The grid to which the sum with the base weight is rounded (QA-SparsePEFT).
    pub grid: Option<WeightGrid>,
    #[module(skip)]
    config: LoraConfig,
    #[module(skip)]
    active_rank: usize,
    #[module(skip)]
    active_dims: [usize; 2],
    #[module(skip)]
    dropout_seed: u64,
}

impl ElasticLora {
    /// Creates fresh factors for a layer, with all ranks active; see [`LoraConfig::new`]. The
    /// update is zero until trained.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if a size is 0, and as [`LoraConfig::validate`] does.
    pub fn new(
        config: &LoraConfig,
        d_input: usize,
        d_output: usize,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        config.validate()?;
        check_sizes(d_input, d_output)?;
        let (lora_a, lora_b) = fresh_factors(config.rank, d_input, d_output, seed, device);
        Ok(Self {
            lora_a,
            lora_b,
            mask: None,
            grid: None,
            active_rank: config.rank,
            active_dims: [d_input, d_output],
            config: config.clone(),
            dropout_seed: seed,
        })
    }

    /// Takes trained factors in PEFT's orientation, with all ranks active.
    ///
    /// # Shapes
    /// - `a`: `[r_max, d_input]`, `b`: `[d_output, r_max]`
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the ranks differ from each other or from `config.rank`,
    /// and [`Error::InvalidArgument`] as [`new`](Self::new) does.
    pub fn from_factors(
        config: &LoraConfig,
        a: &Matrix,
        b: &Matrix,
        device: &Device,
    ) -> Result<Self> {
        config.validate()?;
        if a.rows() != config.rank || b.cols() != config.rank {
            return Err(Error::ShapeMismatch {
                what: "ranks of the LoRA factors".into(),
                expected: vec![config.rank, config.rank],
                found: vec![a.rows(), b.cols()],
            });
        }
        check_sizes(a.cols(), b.rows())?;
        Ok(Self {
            lora_a: Param::from_tensor(tensor_from_matrix(a, device)),
            lora_b: Param::from_tensor(tensor_from_matrix(b, device)),
            mask: None,
            grid: None,
            active_rank: config.rank,
            active_dims: [a.cols(), b.rows()],
            config: config.clone(),
            dropout_seed: 0,
        })
    }

    /// Confines the update to the elements where `mask` is true (SparsePEFT, arXiv 2410.03750);
    /// `None` removes the mask.
    ///
    /// # Shapes
    /// - `mask`: `[d_input, d_output]`
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the mask has another shape.
    pub fn set_mask(&mut self, mask: Option<Tensor<2, Bool>>) -> Result<()> {
        let expected = [self.d_input(), self.d_output()];
        if let Some(mask) = &mask
            && mask.dims() != expected
        {
            return Err(Error::ShapeMismatch {
                what: "SparsePEFT mask".into(),
                expected: expected.to_vec(),
                found: mask.dims().to_vec(),
            });
        }
        self.mask = mask;
        Ok(())
    }

    /// SparsePEFT's mask, if there is one: true where the update acts.
    ///
    /// # Shapes
    /// - `[d_input, d_output]`
    pub fn mask(&self) -> Option<&Tensor<2, Bool>> {
        self.mask.as_ref()
    }

    /// Rounds the sum of base weight and update to a grid from now on (QA-SparsePEFT, arXiv
    /// 2410.03750). With `train_scales`, the grid's scales are trained too, as in NNCF's absorbable
    /// LoRA. Everything in `grid` but its codes is used.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the grid has another shape.
    pub fn set_grid(&mut self, grid: &QuantizedMatrix, train_scales: bool) -> Result<()> {
        let (expected, found) = (
            [self.d_output(), self.d_input()],
            [grid.rows(), grid.cols()],
        );
        if expected != found {
            return Err(Error::ShapeMismatch {
                what: "grid of an adapter's layer".into(),
                expected: expected.to_vec(),
                found: found.to_vec(),
            });
        }
        self.grid = Some(WeightGrid::new(
            grid,
            train_scales,
            self.is_masked(),
            &self.lora_a.val().device().without_autodiff(),
        ));
        Ok(())
    }

    /// Whether the update has a mask.
    pub fn is_masked(&self) -> bool {
        self.mask.is_some()
    }

    /// Settings of the adapter.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Number of inputs of the layer.
    pub fn d_input(&self) -> usize {
        self.lora_a.lazy_shape()[0]
    }

    /// Number of outputs of the layer.
    pub fn d_output(&self) -> usize {
        self.lora_b.lazy_shape()[1]
    }

    /// The largest rank.
    pub fn max_rank(&self) -> usize {
        self.config.rank
    }

    /// The active rank.
    pub fn active_rank(&self) -> usize {
        self.active_rank
    }

    /// Numbers of active inputs and outputs; all of them at first.
    pub fn active_dims(&self) -> [usize; 2] {
        self.active_dims
    }

    /// Restricts the update to the first inputs and outputs, like the layer that it belongs to
    /// (mode B). No weights are moved.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if a size is 0 or above the full size, and
    /// [`Error::Unsupported`] for fewer inputs of a grid whose groups are not in order. The active
    /// sizes are then unchanged.
    pub fn set_active_dims(&mut self, active: [usize; 2]) -> Result<()> {
        let dims = [self.d_input(), self.d_output()];
        if active.contains(&0) || active[0] > dims[0] || active[1] > dims[1] {
            return Err(Error::ShapeMismatch {
                what: "active inputs and outputs of an adapter, each at least 1 and at most".into(),
                expected: dims.to_vec(),
                found: active.to_vec(),
            });
        }
        if active[0] < dims[0]
            && self
                .grid
                .as_ref()
                .is_some_and(|grid| grid.groups().order.is_some())
        {
            return Err(Error::Unsupported {
                what: "a part of the inputs of a grid with groups in its own order".into(),
            });
        }
        self.active_dims = active;
        Ok(())
    }

    /// Views of A and B with all ranks, for the active inputs and outputs.
    pub(crate) fn factors(&self) -> (Tensor<2>, Tensor<2>) {
        let [d_input, d_output] = self.active_dims;
        (
            prefix(self.lora_a.val(), 0, d_input),
            prefix(self.lora_b.val(), 1, d_output),
        )
    }

    /// The scale at the active rank.
    pub fn scale(&self) -> f64 {
        self.config.scale(self.active_rank)
    }

    /// Activates the first `rank` columns of A and rows of B. No weights are moved.
    ///
    /// # Errors
    /// Returns [`Error::InvalidRank`] if `rank` is 0 or above the maximum. The active rank is then
    /// unchanged.
    pub fn set_active_rank(&mut self, rank: usize) -> Result<()> {
        if rank == 0 || rank > self.max_rank() {
            return Err(Error::InvalidRank {
                layer: "this layer".into(),
                found: rank,
                max: self.max_rank(),
            });
        }
        self.active_rank = rank;
        Ok(())
    }

    /// Sets the seed of the next forward pass's dropout mask. The trainer sets it once a step.
    pub fn set_dropout_seed(&mut self, seed: u64) {
        self.dropout_seed = seed;
    }

    /// The active update of the weight, `s A_r B_r`, masked if there is a mask, before any rounding
    /// to a grid: `[d_input, d_output]` with the active sizes.
    pub fn delta(&self) -> Tensor<2> {
        let device = self.lora_a.val().device().without_autodiff();
        self.summed_with(Tensor::zeros(self.active_dims, &device))
    }

    /// `weight` plus the active update, before any rounding to a grid.
    fn summed_with(&self, weight: Tensor<2>) -> Tensor<2> {
        let (a, b) = self.factors();
        summed_weight(
            weight,
            a,
            b,
            self.active_rank,
            self.scale(),
            self.active_mask(),
        )
    }

    /// A view of the mask for the active inputs and outputs.
    pub(crate) fn active_mask(&self) -> Option<Tensor<2, Bool>> {
        self.mask.as_ref().map(|mask| self.active_part(mask))
    }

    fn active_part(&self, mask: &Tensor<2, Bool>) -> Tensor<2, Bool> {
        let [d_input, d_output] = self.active_dims;
        let mask = mask.clone();
        if mask.dims() == self.active_dims {
            mask
        } else {
            mask.narrow(0, 0, d_input).narrow(1, 0, d_output)
        }
    }

    /// `weight` plus the active update, rounded to the grid if there is one. With a grid, no
    /// gradient reaches `weight`.
    ///
    /// # Shapes
    /// - `weight` and result: `[d_input, d_output]`, with the active sizes
    pub fn added_to(&self, weight: Tensor<2>) -> Tensor<2> {
        let Some(grid) = &self.grid else {
            return self.summed_with(weight);
        };
        let ((a, b), lora) = (
            self.factors(),
            LoraTerm {
                dropout: Dropout::NONE,
                ..self.term()
            },
        );
        let mask = self
            .mask
            .clone()
            .unwrap_or_else(|| grid.everywhere([self.d_input(), self.d_output()]));
        let mask = self.active_part(&mask);
        let (scales, zeros) = grid.active(self.active_dims);
        let term = GridTerm {
            lora,
            bits: grid.bits(),
            groups: grid.groups().clone(),
        };
        ops::quantized_sum(weight, mask, a, b, scales, zeros, term)
    }

    /// The product of `x` with [`added_to`](Self::added_to)'s weight; `None` if there is neither a
    /// mask nor a grid.
    ///
    /// # Shapes
    /// - `x`: `[.., d_input]`, `weight`: `[d_input, d_output]`, with the active sizes; result:
    ///   `[.., d_output]`
    pub(crate) fn product_with_sum<const D: usize>(
        &self,
        x: Tensor<D>,
        weight: Tensor<2>,
    ) -> Option<Tensor<D>> {
        let ((a, b), lora) = (
            self.factors(),
            LoraTerm {
                dropout: Dropout::NONE,
                ..self.term()
            },
        );
        let rounded = self.config.bf16_gradient || weight.dtype() == DType::BF16;
        let Some(grid) = &self.grid else {
            return Some(ops::summed_linear(
                x,
                weight,
                self.active_mask()?,
                [a, b],
                lora,
                rounded,
            ));
        };
        let mask = self
            .mask
            .clone()
            .unwrap_or_else(|| grid.everywhere([self.d_input(), self.d_output()]));
        let (mask, grids) = (
            self.active_part(&mask),
            grid.active(self.active_dims).into(),
        );
        let term = GridTerm {
            lora,
            bits: grid.bits(),
            groups: grid.groups().clone(),
        };
        Some(ops::quantized_linear(
            x,
            weight,
            mask,
            [a, b],
            grids,
            term,
            rounded,
        ))
    }

    /// The adapter's contribution to its layer's output, by plain operations: the two thin products
    /// `s (dropout(x) A_r) B_r`, or with a mask the product with [`delta`](Self::delta). A grid is
    /// ignored. Dropout is applied only on an autodiff device.
    /// [`ElasticLoraLinear`](super::ElasticLoraLinear) computes the same at less cost.
    ///
    /// # Shapes
    /// - `x`: `[.., d_input]`; result: `[.., d_output]`
    pub fn update<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dropped = self.dropped(x);
        if let Some(mask) = self.active_mask() {
            let (a, b) = self.factors();
            let nothing = Tensor::zeros(self.active_dims, &a.device().without_autodiff());
            let lora = LoraTerm {
                dropout: Dropout::NONE,
                ..self.term()
            };
            return ops::summed_linear(
                dropped,
                nothing,
                mask,
                [a, b],
                lora,
                self.config.bf16_gradient,
            );
        }
        let (a, b) = self.factors();
        let (a, b) = (
            prefix(a, 1, self.active_rank),
            prefix(b, 0, self.active_rank),
        );
        ops::linear(ops::linear(dropped, a) * self.scale(), b)
    }

    /// The parameters of the fused operations: active rank, scale and dropout.
    pub(crate) fn term(&self) -> LoraTerm {
        let dropout = Dropout {
            probability: self.dropout(),
            seed: self.dropout_seed,
        };
        LoraTerm {
            rank: self.active_rank,
            scale: self.scale(),
            dropout,
        }
    }

    /// `x` with the dropout of this step.
    pub(crate) fn dropped<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        seeded_dropout(x, self.dropout(), self.dropout_seed)
    }

    /// The dropout probability in effect: 0 unless gradients are tracked.
    fn dropout(&self) -> f64 {
        if self.lora_a.val().is_autodiff() {
            self.config.dropout
        } else {
            0.0
        }
    }

    /// The active factors in PEFT's orientation, A `[r, d_input]` and B `[d_output, r]` with the
    /// active sizes, and the scale.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] for a masked update or one with a grid: no pair of factors
    /// expresses either.
    pub fn active_factors(&self) -> Result<(Matrix, Matrix, f64)> {
        if self.grid.is_some() {
            return Err(Error::Unsupported {
                what: "writing a quantization-aware adapter as plain LoRA factors".into(),
            });
        }
        if self.is_masked() {
            return Err(Error::Unsupported {
                what: "writing a SparsePEFT adapter as plain LoRA factors".into(),
            });
        }
        let (a, b) = self.factors();
        let a = matrix_from_tensor(prefix(a, 1, self.active_rank));
        let b = matrix_from_tensor(prefix(b, 0, self.active_rank));
        Ok((a, b, self.scale()))
    }

    /// The dropout seed of one layer at one step, derived from the run's seed.
    pub(crate) fn step_seed(seed: u64, step: u64, layer: u64) -> u64 {
        mix_seed(mix_seed(seed, step), layer)
    }
}
