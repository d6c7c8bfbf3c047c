//! A model, the adapters on it and the space of their shapes: all subnets share one set of weights.

mod adapter;
mod cost;
mod deploy;
mod quantization;
mod shape;

pub use cost::SubnetCost;
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
    /// Largest rank, alpha, dropout, scale rule: the same for every adapter.
    pub lora: LoraConfig,
    /// Layers that get an adapter of the largest rank without being in a group of the space.
    pub fixed_layers: Vec<String>,
    /// Confine every update to its weight's non-zeros (SparsePEFT), so that merging keeps each zero.
    pub sparse_peft: bool,
    /// Seed of the adapters' first factors.
    pub seed: u64,
    /// What [`SuperNet::with_quantization`] was given, in short; none for a net that is not quantization-aware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<QaSummary>,
}

impl SuperNetConfig {
    /// Adapters as `lora` says on the layers of the space, unmasked.
    pub fn new(lora: LoraConfig) -> Self {
        Self {
            lora,
            fixed_layers: Vec::new(),
            sparse_peft: false,
            seed: 0,
            quantization: None,
        }
    }

    /// As [`new`](Self::new) with [`LoraConfig::new`] of the largest rank that the space offers (1 where it offers none).
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

/// A supernet: a decoder whose adapters take any shape of a search space.
#[derive(Clone, Debug)]
pub struct SuperNet {
    model: Decoder,
    space: SearchSpace,
    config: SuperNetConfig,
    active: SubnetConfig,
    /// Sizes of the blocks with all channels and units active.
    blocks: Vec<BlockDims>,
    nonzeros: Arc<Nonzeros>,
}

impl SuperNet {
    /// Freezes `model` and puts fresh adapters on it. The maximal subnet is active; the model's output is as before until
    /// trained.
    ///
    /// # Errors
    /// Where the model has an adapter already, the space or `fixed_layers` names a layer that it lacks or names one twice, a
    /// rank is over the largest, or the settings are out of range. [`Error::InvalidSpace`] for widths and depths that make no model: a
    /// width that leaves out a layer tied to it (gate and up; q, k and v), mixes shapes, or is no whole number of heads and
    /// key/value heads; a smallest depth that leaves nothing.
    pub fn new(model: Decoder, space: SearchSpace, config: SuperNetConfig) -> Result<Self> {
        config.lora.validate()?;
        // That is for `with_quantization` to say.
        let config = SuperNetConfig {
            quantization: None,
            ..config
        };
        space.validate_layers(&model.layer_shapes(), config.lora.rank)?;
        model.refuse_adapters("merge it first")?;
        widths::check(&shape::full_dims(&model), model.config().head_dim(), &space)?;
        let nonzeros = Arc::new(Nonzeros::new(&model));
        // A model that was trained as a whole still wants gradients everywhere.
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
        };
        net.activate(&active)?;
        Ok(net)
    }

    /// A model all of whose weights are trained and that has one subnet: itself.
    ///
    /// # Errors
    /// [`Error::HasAdapter`] for a model with adapters, [`Error::Unsupported`] for one with quantized weights.
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
        })
    }

    /// The model with the active subnet.
    pub fn model(&self) -> &Decoder {
        &self.model
    }

    /// The model, to be changed by a trainer; its layers and adapters must stay.
    pub(crate) fn model_mut(&mut self) -> &mut Decoder {
        &mut self.model
    }

    /// Maps the model, as Burn's optimizers do; its layers and adapters must stay. On an error it is as before.
    pub(crate) fn replace_model(
        &mut self,
        f: impl FnOnce(Decoder) -> Result<Decoder>,
    ) -> Result<()> {
        self.model = f(self.model.clone())?;
        Ok(())
    }

    /// As [`replace_model`](Self::replace_model) for what cannot fail: `f` is given the only handle on weights that nobody
    /// outside holds, and so may change them in place.
    pub(crate) fn update_model(&mut self, f: impl FnOnce(Decoder) -> Decoder) {
        let model = self.model.take();
        self.model = f(model);
    }

    /// The model with the active subnet, off the tape: for evaluation. Weights are shared, not copied.
    pub fn eval_model(&self) -> Decoder {
        self.model.valid()
    }

    /// The space of its subnets.
    pub fn space(&self) -> &SearchSpace {
        &self.space
    }

    /// Settings.
    pub fn config(&self) -> &SuperNetConfig {
        &self.config
    }

    /// Weights of the base, adapters left out, as they were when the supernet was made.
    pub fn base_params(&self) -> ParamCount {
        self.nonzeros.all()
    }

    /// The active subnet.
    pub fn active(&self) -> &SubnetConfig {
        &self.active
    }

    /// Makes a subnet the active one. Moves no weight.
    ///
    /// # Errors
    /// As [`SearchSpace::validate`]; the active subnet is then as before.
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

    /// A uniformly drawn subnet, each group independently.
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

    /// The paper's heuristic: each group's middle choice.
    pub fn heuristic(&self) -> SubnetConfig {
        self.space.heuristic()
    }

    /// Number of subnets.
    pub fn n_subnets(&self) -> f64 {
        self.space.n_subnets()
    }

    /// Names of the adapted layers with their ranks under a subnet.
    ///
    /// # Errors
    /// As [`SearchSpace::validate`].
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

    /// Sizes and costs of a subnet whose adapters stay apart from the base.
    ///
    /// # Errors
    /// As [`SearchSpace::validate`].
    pub fn cost(&self, subnet: &SubnetConfig) -> Result<SubnetCost> {
        let blocks = self.block_dims(subnet)?;
        SubnetCost::count(
            self.model.config(),
            &blocks,
            &self.nonzeros,
            &self.ranks(subnet)?,
        )
    }

    /// Bytes of a subnet's weights once it is extracted, its linear layers stored in `format` and all else dense at 16 bits (32
    /// beside [`WeightFormat::F32`]). Zeros that merging an unmasked adapter fills are not counted.
    ///
    /// # Errors
    /// As [`SearchSpace::validate`].
    pub fn stored_bytes(&self, subnet: &SubnetConfig, format: WeightFormat) -> Result<usize> {
        let blocks = self.block_dims(subnet)?;
        Ok(cost::stored_bytes(
            self.model.config(),
            &blocks,
            &self.nonzeros,
            format,
        ))
    }

    /// The sizes of each block under a subnet; what is left out has no heads or no width.
    ///
    /// # Errors
    /// As [`SearchSpace::validate`].
    pub fn block_dims(&self, subnet: &SubnetConfig) -> Result<Vec<BlockDims>> {
        widths::block_dims(
            &self.blocks,
            self.model.config().head_dim(),
            &self.space,
            subnet,
        )
    }

    /// The active subnet as a plain LoRA: each layer's first `r` rows and columns, with its scale; for a base of its widths, where
    /// they are elastic.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for SparsePEFT's masked adapters and for quantization-aware ones, which no plain LoRA expresses: merge
    /// them.
    pub fn extract_adapter(&self) -> Result<LoraAdapter> {
        let mut layers = BTreeMap::new();
        for (name, layer) in self.model.linears() {
            if let Some(adapter) = layer.adapter.as_ref().filter(|_| self.model.runs(&name)) {
                let (a, b, scale) = adapter.active_factors()?;
                layers.insert(name, LoraWeights::new(a, b, scale as f32)?);
            }
        }
        Ok(LoraAdapter {
            layers,
            ..LoraAdapter::default()
        })
    }

    /// Takes the supernet apart, leaving the model with the active subnet.
    pub fn into_model(self) -> Decoder {
        self.model
    }
}
