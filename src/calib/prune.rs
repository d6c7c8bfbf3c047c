//! Pruning of a model, block by block.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::input::{InputStatistic, in_layer};
use super::walk_blocks;
use crate::arch::LinearKind;
use crate::error::{Error, Result};
use crate::linalg::FactorConfig;
use crate::model::Decoder;
use crate::progress::Progress;
use crate::sparsity::{
    Method, OwlConfig, Pattern, SparseGptConfig, outlier_share, prune, sparsegpt,
};

/// What pruning did to one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct PrunedLayer {
    /// Hugging Face's module path.
    pub name: String,
    /// Weights.
    pub params: usize,
    /// Weights that are zero now.
    pub zeros: usize,
}

/// How a model is pruned.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PruneConfig {
    /// How weights are ranked.
    pub method: Method,
    /// Where the zeros may lie.
    pub pattern: Pattern,
    /// How SparseGPT's Hessians are made ready.
    pub factor: FactorConfig,
    /// SparseGPT's settings.
    pub sparsegpt: SparseGptConfig,
    /// Whether blocks with more outliers keep more of their weights.
    pub owl: Option<OwlConfig>,
}

impl PruneConfig {
    /// The same share in every block.
    pub fn new(method: Method, pattern: Pattern) -> Self {
        Self {
            method,
            pattern,
            factor: FactorConfig::new(),
            sparsegpt: SparseGptConfig::new(),
            owl: None,
        }
    }

    setters! {
        with_factor(factor: FactorConfig);
        with_sparsegpt(sparsegpt: SparseGptConfig);
        with_owl(owl: OwlConfig) = Some(owl);
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for one that breaks its rule, for OWL with an N:M pattern, and for SparseGPT's N:M in
    /// activation order.
    pub fn validate(&self) -> Result<()> {
        self.pattern.validate()?;
        self.factor.validate()?;
        self.sparsegpt.validate()?;
        if let Some(owl) = &self.owl {
            owl.validate()?;
            if matches!(self.pattern, Pattern::NM { .. }) {
                return Err(Error::argument(
                    "owl",
                    self.pattern,
                    "a pattern with a ratio, which N:M has not",
                ));
            }
        }
        Ok(())
    }
}

/// Prunes every linear layer inside the blocks, block by block, each calibrated on what the pruned ones before it put out;
/// embedding, head and norms are left alone. Token sequences in `samples` are the calibration data. OWL takes a pass over the
/// samples of its own, through the model as it is.
///
/// # Errors
/// [`Error::InvalidArgument`] for bad settings and for a method that needs samples without any; [`Error::HasAdapter`] for a
/// model with adapters; those of [`walk_blocks`], of [`Method::scores`] and of [`sparsegpt`].
pub fn prune_model(
    model: &mut Decoder,
    samples: &[Vec<u32>],
    config: &PruneConfig,
    progress: &dyn Progress,
) -> Result<Vec<PrunedLayer>> {
    config.validate()?;
    model.refuse_adapters("prune before adapters are put on, or merge them first")?;
    let method = config.method;
    let samples = needed_samples(samples, method.needs_calibration(), method)?;
    let patterns = match &config.owl {
        Some(owl) => owl_patterns(model, samples, config, owl, progress)?,
        None => vec![config.pattern; model.layers.len()],
    };
    let mut report = Vec::new();
    walk_blocks(
        model,
        samples,
        "prune",
        |d_input| InputStatistic::of_method(method, d_input),
        InputStatistic::observe,
        |name, layer, input| {
            let pattern =
                LinearKind::parse(name).map_or(&config.pattern, |(block, _)| &patterns[block]);
            let mut weight = layer.to_matrix();
            if method == Method::SparseGpt {
                let factor = input
                    .factor(name, &config.factor)
                    .map_err(|error| in_layer(name, error))?;
                sparsegpt(&mut weight, factor, pattern, &config.sparsegpt)
                    .map_err(|error| in_layer(name, error))?;
            } else {
                let scores = method.scores(&weight, input.norms())?;
                prune(&mut weight, &scores, pattern).map_err(|error| in_layer(name, error))?;
            }
            layer.set_matrix(&weight)?;
            report.push(PrunedLayer {
                name: name.to_string(),
                params: weight.as_slice().len(),
                zeros: weight.count_zeros(),
            });
            Ok(())
        },
        progress,
    )?;
    Ok(report)
}

/// The samples where they are needed, else none.
pub(super) fn needed_samples(
    samples: &[Vec<u32>],
    needed: bool,
    method: impl std::fmt::Display,
) -> Result<&[Vec<u32>]> {
    if !needed {
        return Ok(&[]);
    }
    if samples.iter().all(|sample| sample.is_empty()) {
        return Err(Error::argument(
            "samples",
            0,
            format!("{method} needs calibration samples"),
        ));
    }
    Ok(samples)
}

/// Each block's pattern by the outliers among its scores, of Wanda where there are samples.
fn owl_patterns(
    model: &mut Decoder,
    samples: &[Vec<u32>],
    config: &PruneConfig,
    owl: &OwlConfig,
    progress: &dyn Progress,
) -> Result<Vec<Pattern>> {
    let method = if config.method.needs_calibration() {
        Method::Wanda
    } else {
        Method::Magnitude
    };
    let mut shares: BTreeMap<usize, f64> = BTreeMap::new();
    let mut scores = Vec::with_capacity(LinearKind::ALL.len());
    let names: Vec<String> = model.linears().map(|(name, _)| name).collect();
    let mut done = 0;
    walk_blocks(
        model,
        samples,
        "find outliers",
        |d_input| InputStatistic::of_method(method, d_input),
        InputStatistic::observe,
        |name, layer, input| {
            let of_layer = method.scores(&layer.to_matrix(), input.norms());
            scores.push(of_layer.map_err(|error| in_layer(name, error))?);
            done += 1;
            let block = |name: &String| LinearKind::parse(name).map(|(block, _)| block);
            let (here, next) = (
                names.get(done - 1).and_then(block),
                names.get(done).and_then(block),
            );
            if let (Some(here), true) = (here, here != next) {
                shares.insert(here, outlier_share(&scores, owl.threshold));
                scores.clear();
            }
            Ok(())
        },
        progress,
    )?;
    let found: Vec<f64> = shares.values().copied().collect();
    let ratios = owl.ratios(&found, config.pattern.ratio())?;
    let mut patterns = vec![config.pattern; model.layers.len()];
    shares
        .keys()
        .zip(ratios)
        .for_each(|(block, ratio)| patterns[*block] = config.pattern.with_ratio(ratio));
    Ok(patterns)
}
