//! Prunes a model block by block.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::input::{InputStatistic, in_layer};
use super::kept::Kept;
use super::place::{InMemory, Place};
use super::walk;
use crate::arch::LinearKind;
use crate::error::{Error, Result};
use crate::format::{StoredMatrix, WeightFormat};
use crate::linalg::{FactorConfig, Matrix};
use crate::model::Decoder;
use crate::nn::BaseLinear;
use crate::progress::Progress;
use crate::sparsity::{
    Method, OwlConfig, Pattern, SparseGptConfig, outlier_share, prune, sparsegpt,
};

/// Report of pruning one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct PrunedLayer {
    /// Hugging Face's module path of the layer.
    pub name: String,
    /// Number of weights.
    pub params: usize,
    /// Number of weights that are zero after pruning.
    pub zeros: usize,
}

/// Settings of pruning.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PruneConfig {
    /// How weights are ranked.
    pub method: Method,
    /// Pattern that the zeros must follow.
    pub pattern: Pattern,
    /// Preparation of SparseGPT's Hessians.
    pub factor: FactorConfig,
    /// SparseGPT's settings.
    pub sparsegpt: SparseGptConfig,
    /// OWL settings, with which blocks with more outliers keep more of their weights; `None` prunes
    /// all blocks alike.
    pub owl: Option<OwlConfig>,
}

impl PruneConfig {
    /// Creates settings that prune the same fraction of every block.
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

    /// Checks the settings.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] for an invalid field, for OWL with an N:M pattern, and
    /// for SparseGPT with an N:M pattern in activation order.
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

/// Prunes every linear layer inside the blocks, block by block. Each block is calibrated on the
/// output of the pruned blocks before it. Embedding, head and norms are unchanged. The token
/// sequences in `samples` are the calibration data. OWL takes an extra pass over the samples
/// through the unpruned model.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] for invalid settings or if the method needs samples and there
/// are none, [`Error::HasAdapter`] for a model with adapters, and the errors of
/// [`walk_blocks`](super::walk_blocks), [`Method::scores`] and [`sparsegpt`].
pub fn prune_model(
    model: &mut Decoder,
    samples: &[Vec<u32>],
    config: &PruneConfig,
    progress: &dyn Progress,
) -> Result<Vec<PrunedLayer>> {
    run(model, samples, config, None, progress)
}

/// Same as [`prune_model`]. Finished blocks are kept in a folder within `folder`, and a later call
/// with the same model, samples and settings goes on after them, with the same result. What is kept
/// takes as much space as the weights in 32 bits, and once more the hidden states of the samples;
/// remove `folder` when it is no longer needed. OWL's first pass is not kept.
///
/// # Errors
/// Returns the errors of [`prune_model`], [`Error::Io`] if a file cannot be written, and
/// [`Error::InvalidFile`] if a kept block is damaged.
pub fn prune_model_keeping(
    model: &mut Decoder,
    samples: &[Vec<u32>],
    config: &PruneConfig,
    folder: impl AsRef<Path>,
    progress: &dyn Progress,
) -> Result<Vec<PrunedLayer>> {
    run(model, samples, config, Some(folder.as_ref()), progress)
}

fn run(
    model: &mut Decoder,
    samples: &[Vec<u32>],
    config: &PruneConfig,
    folder: Option<&Path>,
    progress: &dyn Progress,
) -> Result<Vec<PrunedLayer>> {
    config.validate()?;
    model.refuse_adapters("prune before adapters are put on, or merge them first")?;
    let samples = config.needed(samples)?;
    let mut place = InMemory::new(model, None);
    let patterns = config.patterns(&mut place, samples, progress)?;
    let report = RefCell::new(Vec::new());
    let note = |layer: PrunedLayer| report.borrow_mut().push(layer);
    let store = |name: &str, layer: &BaseLinear| {
        StoredMatrix::from_matrix(&layer.to_matrix(), WeightFormat::F32)
            .map_err(|error| in_layer(name, error))
    };
    let restore = |name: &str, layer: &mut BaseLinear, stored: &StoredMatrix| {
        let weight = stored.to_matrix();
        layer.set_matrix(&weight)?;
        note(PrunedLayer::new(name, &weight));
        Ok(())
    };
    let kept = match folder {
        Some(folder) => {
            let of = (&*model, samples);
            Some(Kept::new(folder, "prune", config, of, &store, &restore)?)
        }
        None => None,
    };
    let mut place = InMemory::new(model, kept);
    config.walk(&mut place, samples, &patterns, &note, progress)?;
    Ok(report.take())
}

impl PrunedLayer {
    fn new(name: &str, weight: &Matrix) -> Self {
        Self {
            name: name.to_string(),
            params: weight.as_slice().len(),
            zeros: weight.count_zeros(),
        }
    }
}

impl PruneConfig {
    /// The samples, if the method needs them.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if it does and there are none.
    pub(super) fn needed<'s>(&self, samples: &'s [Vec<u32>]) -> Result<&'s [Vec<u32>]> {
        needed_samples(samples, self.method.needs_calibration(), self.method)
    }

    /// The pattern of each block.
    pub(super) fn patterns(
        &self,
        place: &mut dyn Place,
        samples: &[Vec<u32>],
        progress: &dyn Progress,
    ) -> Result<Vec<Pattern>> {
        match &self.owl {
            Some(owl) => owl_patterns(place, samples, self, owl, progress),
            None => Ok(vec![self.pattern; place.model().layers.len()]),
        }
    }

    /// Prunes a model wherever it is, and calls `note` with a report about each layer.
    pub(super) fn walk(
        &self,
        place: &mut dyn Place,
        samples: &[Vec<u32>],
        patterns: &[Pattern],
        note: &dyn Fn(PrunedLayer),
        progress: &dyn Progress,
    ) -> Result<()> {
        let method = self.method;
        walk(
            place,
            samples,
            "prune",
            |d_input| InputStatistic::of_method(method, d_input),
            InputStatistic::observe,
            |name, layer, input| {
                let pattern =
                    LinearKind::parse(name).map_or(&self.pattern, |(block, _)| &patterns[block]);
                let mut weight = layer.to_matrix();
                if method == Method::SparseGpt {
                    let factor = input
                        .factor(name, &self.factor)
                        .map_err(|error| in_layer(name, error))?;
                    sparsegpt(&mut weight, factor, pattern, &self.sparsegpt)
                        .map_err(|error| in_layer(name, error))?;
                } else {
                    let scores = method.scores(&weight, input.norms())?;
                    prune(&mut weight, &scores, pattern).map_err(|error| in_layer(name, error))?;
                }
                layer.set_matrix(&weight)?;
                note(PrunedLayer::new(name, &weight));
                Ok(())
            },
            progress,
        )
    }
}

/// The samples if they are needed, and otherwise none.
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

/// The pattern of each block, derived from the outliers among its scores (Wanda's if there are
/// samples).
fn owl_patterns(
    place: &mut dyn Place,
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
    let linears = place.model().config().arch().linears();
    let names: Vec<String> = linears.into_iter().map(|layer| layer.name).collect();
    let mut done = 0;
    walk(
        place,
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
    let mut patterns = vec![config.pattern; place.model().layers.len()];
    shares
        .keys()
        .zip(ratios)
        .for_each(|(block, ratio)| patterns[*block] = config.pattern.with_ratio(ratio));
    Ok(patterns)
}
