//! Elastic adapters on any existing Burn module, through Burn's reparameterizations.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::Tensor;

use super::lora::{fresh_factors, summed_weight};
use crate::error::{Error, Result};
use crate::nn::mix_seed;
use crate::space::LoraConfig;
use crate::space::{LayerShape, SearchSpace, SubnetConfig};

/// The active ranks of a reparameterized module, by parameter path. Clones of the switches and of
/// the module share them.
#[derive(Clone, Debug, Default)]
pub struct RankSwitches {
    ranks: BTreeMap<String, Switch>,
}

#[derive(Clone, Debug)]
struct Switch {
    active: Arc<AtomicUsize>,
    max: usize,
    d_input: usize,
    d_output: usize,
}

impl RankSwitches {
    /// The adapted parameters as layers of a search space, named by their path
    /// (`encoder.0.weight`).
    pub fn layers(&self) -> Vec<LayerShape> {
        self.ranks
            .iter()
            .map(|(path, s)| LayerShape::new(path.clone(), s.d_input, s.d_output))
            .collect()
    }

    /// Sets the active rank of a parameter.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] if the path has no adapter, and [`Error::InvalidRank`] if
    /// `rank` is 0 or above the maximum.
    pub fn set(&self, path: &str, rank: usize) -> Result<()> {
        let switch = self.ranks.get(path).ok_or_else(|| Error::UnknownLayer {
            context: "rank switches".into(),
            layer: path.to_string(),
        })?;
        if rank == 0 || rank > switch.max {
            return Err(Error::InvalidRank {
                layer: path.to_string(),
                found: rank,
                max: switch.max,
            });
        }
        switch.active.store(rank, Ordering::Relaxed);
        Ok(())
    }

    /// The active rank of a parameter, or `None` if it has no adapter.
    pub fn get(&self, path: &str) -> Option<usize> {
        self.ranks
            .get(path)
            .map(|s| s.active.load(Ordering::Relaxed))
    }

    /// Activates a subnet of a space over [`layers`](Self::layers).
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`] and [`set`](Self::set). No rank is changed
    /// then.
    pub fn activate(&self, space: &SearchSpace, config: &SubnetConfig) -> Result<()> {
        let ranks = space.ranks(config)?;
        for (path, rank) in &ranks {
            let switch = self.ranks.get(path).ok_or_else(|| Error::UnknownLayer {
                context: "rank switches".into(),
                layer: path.clone(),
            })?;
            if *rank == 0 || *rank > switch.max {
                return Err(Error::InvalidRank {
                    layer: path.clone(),
                    found: *rank,
                    max: switch.max,
                });
            }
        }
        ranks
            .iter()
            .try_for_each(|(path, rank)| self.set(path, *rank))
    }
}

/// Attaches elastic adapters to the two-dimensional parameters of a Burn module that a filter
/// selects.
///
/// Every parameter of the module is frozen; the factors are trainable. Burn computes the summed
/// weight at every use, so this works for any module, but costs more than the two thin products of
/// [`ElasticLoraLinear`](super::ElasticLoraLinear). With [`masked`](Self::masked), the update keeps
/// the weight's zeros (SparsePEFT). Dropout is not applied, because a reparameterization sees the
/// weight and not the input.
///
/// ```
/// use burn::module::Module;
/// use burn::nn::LinearConfig;
/// use burn::tensor::Device;
/// use elastic_lora::adapter::{ElasticLoraReparameterizer, LoraConfig};
///
/// # fn main() -> elastic_lora::Result<()> {
/// let layer = LinearConfig::new(17, 5).init(&Device::flex());
/// let mut adapters = ElasticLoraReparameterizer::new(LoraConfig::new(8), 1)?;
/// let layer = layer.apply_reparameterization(&mut adapters);
/// let switches = adapters.switches();
/// switches.set("weight", 3)?;
/// assert_eq!(layer.materialize().weight.dims(), [17, 5]);
/// # Ok(())
/// # }
/// ```
pub struct ElasticLoraReparameterizer {
    config: LoraConfig,
    seed: u64,
    masked: bool,
    filter: Box<dyn Fn(&str) -> bool + Send>,
    switches: RankSwitches,
}

impl ElasticLoraReparameterizer {
    /// Creates adapters for every two-dimensional parameter.
    ///
    /// # Errors
    /// Returns the errors of [`LoraConfig::validate`].
    pub fn new(config: LoraConfig, seed: u64) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            seed,
            masked: false,
            filter: Box::new(|_| true),
            switches: RankSwitches::default(),
        })
    }

    /// Restricts the adapters to parameters whose path the filter accepts.
    pub fn matching(mut self, filter: impl Fn(&str) -> bool + Send + 'static) -> Self {
        self.filter = Box::new(filter);
        self
    }

    /// Confines each update to its weight's non-zeros.
    pub fn masked(mut self) -> Self {
        self.masked = true;
        self
    }

    /// The switches of the adapters attached so far.
    pub fn switches(&self) -> RankSwitches {
        self.switches.clone()
    }
}

impl Reparameterizer for &mut ElasticLoraReparameterizer {
    type Reparam = ElasticLoraReparam;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Self::Reparam>) {
        let param = param.set_require_grad(false);
        if D != 2 || !(self.filter)(path) {
            return (param, None);
        }
        let dims = param.lazy_shape();
        let (d_input, d_output) = (dims[0], dims[1]);
        let seed = mix_seed(self.seed, self.switches.ranks.len() as u64);
        let (lora_a, lora_b) = fresh_factors(
            self.config.rank,
            d_input,
            d_output,
            seed,
            &param.lazy_device(),
        );
        let active = Arc::new(AtomicUsize::new(self.config.rank));
        let switch = Switch {
            active: active.clone(),
            max: self.config.rank,
            d_input,
            d_output,
        };
        self.switches.ranks.insert(path.to_string(), switch);
        let reparam = ElasticLoraReparam {
            lora_a,
            lora_b,
            config: self.config.clone(),
            masked: self.masked,
            active: ActiveRank(active),
        };
        (param, Some(reparam))
    }
}

#[derive(Clone, Debug)]
struct ActiveRank(Arc<AtomicUsize>);

/// The state that [`ElasticLoraReparameterizer`] attaches to a parameter.
#[derive(Module, Debug)]
#[doc(hidden)]
pub struct ElasticLoraReparam {
    /// `[d_input, r_max]`.
    pub lora_a: Param<Tensor<2>>,
    /// `[r_max, d_output]`.
    pub lora_b: Param<Tensor<2>>,
    #[module(skip)]
    config: LoraConfig,
    #[module(skip)]
    masked: bool,
    #[module(skip)]
    active: ActiveRank,
}

impl Reparameterization for ElasticLoraReparam {
    const NAME: &'static str = "elastic_lora";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let rank = self.active.0.load(Ordering::Relaxed);
        let shape = base.dims();
        let base: Tensor<2> = base.reshape([shape[0], shape[1]]);
        let mask = self
            .masked
            .then(|| base.clone().without_autodiff().not_equal_elem(0.0));
        let (a, b) = (self.lora_a.val(), self.lora_b.val());
        summed_weight(base, a, b, rank, self.config.scale(rank), mask).reshape(shape)
    }
}
