//! Supernets: a model with adapters and a search space of their shapes. All subnets share one set
//! of weights.

mod adapter;
mod cost;
mod deploy;
mod principal;
mod quantization;
mod shape;

pub use cost::SubnetCost;
pub use deploy::stored_bytes;
pub use quantization::{QaConfig, QaSummary};

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::Module;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::adapter::ElasticLora;
use crate::arch::BlockDims;
use crate::error::{Error, Result};
use crate::format::WeightFormat;
use crate::io::peft::{LoraAdapter, LoraWeights};
use crate::model::{Decoder, ParamCount};
use crate::nn::mix_seed;
use crate::space::{Elastic, LoraConfig, SearchSpace, SubnetConfig, widths};
use cost::Nonzeros;

/// Settings of a supernet's adapters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SuperNetConfig {
    /// Largest rank, alpha, dropout and scale rule, the same for every adapter.
    pub lora: LoraConfig,
    /// Layers outside the groups of the space that also get an adapter, always of the largest rank.
    pub fixed_layers: Vec<String>,
    /// Whether every update is confined to its weight's non-zeros (SparsePEFT), so that merging
    /// keeps each zero.
    pub sparse_peft: bool,
    /// Seed from which the adapters' factors A are drawn.
    pub seed: u64,
    /// Summary of the settings given to [`SuperNet::with_quantization`]; `None` without
    /// quantization-aware training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<QaSummary>,
}

impl SuperNetConfig {
    /// Creates unmasked adapters with the settings `lora` on the layers of the space.
    pub fn new(lora: LoraConfig) -> Self {
        Self {
            lora,
            fixed_layers: Vec::new(),
            sparse_peft: false,
            seed: 0,
            quantization: None,
        }
    }

    /// Like [`new`](Self::new), with [`LoraConfig::new`] for the largest rank in the space (1 if it
    /// has no ranks).
    pub fn for_space(space: &SearchSpace) -> Self {
        Self::new(LoraConfig::new(space.max_rank().max(1)))
    }

    setters! {
        with_lora(lora: LoraConfig);
        with_fixed_layers(fixed_layers: Vec<String>);
        with_sparse_peft(sparse_peft: bool);
        with_seed(seed: u64);
    }
}

/// A supernet: a decoder with elastic adapters, whose shape is chosen from a search space.
#[derive(Clone, Debug)]
pub struct SuperNet {
    model: Decoder,
    space: SearchSpace,
    config: SuperNetConfig,
    active: SubnetConfig,
    /// Sizes of the blocks with all channels and sub-blocks active.
    blocks: Vec<BlockDims>,
    nonzeros: Arc<Nonzeros>,
    /// What adapters took from the base, by layer; see
    /// [`init_from_principal`](Self::init_from_principal).
    taken: BTreeMap<String, LoraWeights>,
}

impl SuperNet {
    /// Freezes `model` and adds fresh adapters. The maximal subnet is active, and the output equals
    /// that of `model` until training.
    ///
    /// # Errors
    /// Returns an error if the model already has an adapter, if the space or `fixed_layers` names
    /// an unknown layer or the same layer twice, if a rank is above the largest, or if the settings
    /// are out of range. Returns [`Error::InvalidSpace`] if widths or depths do not make a model: a
    /// width group that omits a layer tied to its layers (gate and up; q, k and v), mixes layers of
    /// different shapes, or has a width that is not a whole number of heads and key/value heads; a
    /// smallest depth that leaves no block.
    pub fn new(model: Decoder, space: SearchSpace, config: SuperNetConfig) -> Result<Self> {
        config.lora.validate()?;
        // Only `with_quantization` sets this.
        let config = SuperNetConfig {
            quantization: None,
            ..config
        };
        space.validate_layers(&model.layer_shapes(), config.lora.rank)?;
        model.refuse_adapters("merge it first")?;
        widths::check(&shape::full_dims(&model), model.config().head_dim(), &space)?;
        let nonzeros = Arc::new(Nonzeros::new(&model));
        // A model whose own weights were trained still requires gradients everywhere.
        let mut model = model.set_require_grad(false);
        let grouped = space
            .groups_of_kind(Elastic::Rank)
            .flat_map(|group| group.layers());
        let names: Vec<String> = grouped.chain(&config.fixed_layers).cloned().collect();
        let device = model.device();
        for (index, name) in names.iter().enumerate() {
            let layer = model.linear_mut(name).ok_or_else(|| Error::UnknownLayer {
                context: "adapted layers".into(),
                layer: name.clone(),
            })?;
            if layer.adapter.is_some() {
                return Err(Error::InvalidSpace {
                    group: name.clone(),
                    reason: "this layer would get two adapters".into(),
                });
            }
            let [d_input, d_output] = layer.base.dims();
            let seed = mix_seed(config.seed, index as u64);
            layer.adapter = Some(ElasticLora::new(
                &config.lora,
                d_input,
                d_output,
                seed,
                &device,
            )?);
            if config.sparse_peft {
                layer.mask_by_base()?;
            }
        }
        let active = space.maximal();
        let blocks = shape::full_dims(&model);
        let mut net = Self {
            model,
            space,
            config,
            active: active.clone(),
            blocks,
            nonzeros,
            taken: BTreeMap::new(),
        };
        net.activate(&active)?;
        Ok(net)
    }

    /// Creates a supernet that trains all weights of the model and has one subnet, the model
    /// itself.
    ///
    /// # Errors
    /// Returns [`Error::HasAdapter`] for a model with adapters, and [`Error::Unsupported`] for a
    /// model with quantized weights.
    pub fn dense(model: Decoder) -> Result<Self> {
        model.refuse_adapters("merge it first")?;
        if let Some((name, _)) = model
            .linears()
            .find(|(_, layer)| layer.base.quantized().is_some())
        {
            return Err(Error::Unsupported {
                what: format!("training the quantized weight of `{name}`"),
            });
        }
        let nonzeros = Arc::new(Nonzeros::new(&model));
        let model = model.set_require_grad(true);
        let (space, config) = (
            SearchSpace::single(),
            SuperNetConfig::new(LoraConfig::new(1)),
        );
        Ok(Self {
            active: space.maximal(),
            blocks: shape::full_dims(&model),
            model,
            space,
            config,
            nonzeros,
            taken: BTreeMap::new(),
        })
    }

    /// The model with the active subnet.
    pub fn model(&self) -> &Decoder {
        &self.model
    }

    /// The model, for changes by a trainer. Layers and adapters must not be added or removed.
    pub(crate) fn model_mut(&mut self) -> &mut Decoder {
        &mut self.model
    }

    /// Maps the model, as Burn's optimizers do. Layers and adapters must not be added or removed.
    /// On an error the model is unchanged.
    pub(crate) fn replace_model(
        &mut self,
        f: impl FnOnce(Decoder) -> Result<Decoder>,
    ) -> Result<()> {
        self.model = f(self.model.clone())?;
        Ok(())
    }

    /// Like [`replace_model`](Self::replace_model), for an infallible `f`. The supernet gives up
    /// its own handle first, so that `f` can change in place all weights that are not shared
    /// elsewhere.
    pub(crate) fn update_model(&mut self, f: impl FnOnce(Decoder) -> Decoder) {
        let model = self.model.take();
        self.model = f(model);
    }

    /// The model with the active subnet and without autodiff, for evaluation. The weights are
    /// shared, not copied.
    pub fn eval_model(&self) -> Decoder {
        self.model.valid()
    }

    /// The search space.
    pub fn space(&self) -> &SearchSpace {
        &self.space
    }

    /// Settings of the adapters.
    pub fn config(&self) -> &SuperNetConfig {
        &self.config
    }

    /// Counts of the base's weights, without adapters, when the supernet was created.
    pub fn base_params(&self) -> ParamCount {
        self.nonzeros.all()
    }

    /// The active subnet.
    pub fn active(&self) -> &SubnetConfig {
        &self.active
    }

    /// Activates a subnet. No weights are moved.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`]. The active subnet is then unchanged.
    pub fn activate(&mut self, subnet: &SubnetConfig) -> Result<()> {
        let (ranks, blocks) = (self.space.ranks(subnet)?, self.block_dims(subnet)?);
        for (name, rank) in &ranks {
            let layer = self
                .model
                .linear_mut(name)
                .ok_or_else(|| Error::UnknownLayer {
                    context: "subnet".into(),
                    layer: name.clone(),
                })?;
            layer.set_active_rank(*rank)?;
        }
        shape::activate(&mut self.model, &blocks)?;
        self.active = subnet.clone();
        Ok(())
    }

    /// Draws a subnet uniformly, each group independently.
    pub fn sample<R: Rng + ?Sized>(&self, rng: &mut R) -> SubnetConfig {
        self.space.sample(rng)
    }

    /// The largest subnet.
    pub fn maximal(&self) -> SubnetConfig {
        self.space.maximal()
    }

    /// The smallest subnet.
    pub fn minimal(&self) -> SubnetConfig {
        self.space.minimal()
    }

    /// The paper's heuristic subnet: each group's middle choice.
    pub fn heuristic(&self) -> SubnetConfig {
        self.space.heuristic()
    }

    /// Number of subnets.
    pub fn n_subnets(&self) -> f64 {
        self.space.n_subnets()
    }

    /// The rank of each adapted layer under a subnet, by layer name.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`].
    pub fn ranks(&self, subnet: &SubnetConfig) -> Result<BTreeMap<String, usize>> {
        let mut ranks = self.space.ranks(subnet)?;
        ranks.extend(
            self.config
                .fixed_layers
                .iter()
                .map(|name| (name.clone(), self.config.lora.rank)),
        );
        Ok(ranks)
    }

    /// Sizes and costs of a subnet with unmerged adapters.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`].
    pub fn cost(&self, subnet: &SubnetConfig) -> Result<SubnetCost> {
        let blocks = self.block_dims(subnet)?;
        SubnetCost::count(
            self.model.config(),
            &blocks,
            &self.nonzeros,
            &self.ranks(subnet)?,
        )
    }

    /// Bytes of a subnet's weights after extraction, with linear layers stored in `format` and
    /// everything else dense at 16 bits per weight (32 for [`WeightFormat::F32`]). Zeros that
    /// merging an unmasked adapter fills are not counted.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`].
    pub fn stored_bytes(&self, subnet: &SubnetConfig, format: WeightFormat) -> Result<usize> {
        let blocks = self.block_dims(subnet)?;
        Ok(cost::stored_bytes(
            self.model.config(),
            &blocks,
            &self.nonzeros,
            format,
        ))
    }

    /// The sizes of each block under a subnet. A sub-block that is left out has no heads or width
    /// 0.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`].
    pub fn block_dims(&self, subnet: &SubnetConfig) -> Result<Vec<BlockDims>> {
        widths::block_dims(
            &self.blocks,
            self.model.config().head_dim(),
            &self.space,
            subnet,
        )
    }

    /// The active subnet as a plain LoRA: the first `r` rows and columns of each layer's factors,
    /// and its scale. If widths are elastic, the LoRA fits a base with the active widths.
    ///
    /// If the adapters began as parts of the weights
    /// ([`init_from_principal`](Self::init_from_principal)), the LoRA fits the model as it was
    /// before, and its ranks are larger by those that were taken.
    ///
    /// The layers have the names that PEFT uses for the family. Where a checkpoint holds several
    /// layers as one matrix, their factors are stacked, and their ranks add up unless they have the
    /// same A.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] for masked (SparsePEFT) and quantization-aware adapters,
    /// which a plain LoRA cannot express. Merge them instead.
    pub fn extract_adapter(&self) -> Result<LoraAdapter> {
        let mut layers = BTreeMap::new();
        for (name, layer) in self.model.linears() {
            if let Some(adapter) = layer.adapter.as_ref().filter(|_| self.model.runs(&name)) {
                let (a, b, scale) = adapter.active_factors()?;
                let mut weights = LoraWeights::new(a, b, scale as f32)?;
                if let Some(taken) = self.taken.get(&name) {
                    weights = weights.minus(taken)?;
                }
                layers.insert(name, weights);
            }
        }
        let adapter = LoraAdapter {
            layers,
            ..LoraAdapter::default()
        };
        let rows = |name: &str| {
            let layer = self.model.linear(name);
            layer.map_or(0, |layer| layer.active_dims()[1])
        };
        adapter.stacked(self.model.config(), rows)
    }

    /// Returns the model with the active subnet.
    pub fn into_model(self) -> Decoder {
        self.model
    }
}
