//! First-order importance of channels and heads, from gradients of low-rank adapters alone.
//!
//! As in LoRAPrune (arXiv 2305.18403), the gradients of an adapter stand in for those of the
//! weight, which are never computed. The criterion `|<w, dL/dw>|` is that of Molchanov et al.
//! (arXiv 1611.06440). Departure: LoRAPrune uses trained factors, this module fresh ones. With A
//! random and B zero, the model's output is unchanged and `dL/dB = s A^T dL/dW`. Since
//! `E[A A^T] = r E[a^2] I`, the expectation of `A dL/dB / (s r E[a^2])` is `dL/dW`. Only its
//! product with the weight is needed, which follows from `A^T W` and `dL/dB`, both `[r, out]`.

use burn::module::Module;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::channels::{BlockScores, sum_channels};
use super::{batches, targets};
use crate::adapter::{ElasticLora, LoraConfig};
use crate::arch::LinearKind;
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::nn::{host_values, mix_seed};
use crate::progress::{Progress, Task};

/// The layers whose rows are scored. The layers that read the channels (o, down) add no
/// information.
const SCORED: [LinearKind; 5] = [
    LinearKind::Q,
    LinearKind::K,
    LinearKind::V,
    LinearKind::Gate,
    LinearKind::Up,
];

/// Settings of [`taylor_scores`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct TaylorConfig {
    /// Rank of the adapters. The error of the sketch is proportional to `1 / sqrt(rank)`; memory
    /// and part of the time are proportional to the rank.
    pub rank: usize,
    /// Number of tokens in a batch, or one sample if samples are longer. Each batch adds the
    /// absolute value of its term. Memory must hold the activations of the whole model for one
    /// batch.
    pub batch_tokens: usize,
    /// Seed of the random factors, which are drawn again for each batch.
    pub seed: u64,
}

impl Default for TaylorConfig {
    /// Rank 32, 512 tokens a batch, seed 0.
    fn default() -> Self {
        Self {
            rank: 32,
            batch_tokens: 512,
            seed: 0,
        }
    }
}

impl TaylorConfig {
    /// Rank 32, 512 tokens a batch, seed 0.
    pub fn new() -> Self {
        Self::default()
    }

    setters! {
        with_rank(rank: usize);
        with_batch_tokens(batch_tokens: usize);
        with_seed(seed: u64);
    }
}

/// The mean over batches of `|<w, dL/dw>|`, summed over a channel's rows `w`: those of gate and up
/// for an MLP channel, those of q, k and v for a key/value group. `L` is the mean loss of a batch,
/// and its gradient is a sketch.
///
/// Samples of fewer than two tokens have nothing to predict and are left out.
///
/// # Errors
/// Returns [`Error::HasAdapter`] for a model with adapters, [`Error::Unsupported`] if a layer has
/// only part of its channels active, [`Error::InvalidArgument`] if the rank is 0 or above
/// [`MAX_RANK`](crate::adapter::MAX_RANK) or if no sample has two tokens, the errors of
/// [`Decoder::tokens`] for a sample outside the vocabulary or context, and [`Error::NotFinite`] if
/// a gradient holds NaN or an infinity.
#[doc(hidden)]
pub fn taylor_scores(
    model: &Decoder,
    samples: &[Vec<u32>],
    config: &TaylorConfig,
    progress: &dyn Progress,
) -> Result<Vec<BlockScores>> {
    model.check_reorderable()?;
    let lora = LoraConfig::new(config.rank).with_alpha(config.rank as f64);
    lora.validate()?;
    let batches = batches(samples, config.batch_tokens);
    let batches: Vec<_> = batches
        .into_iter()
        .filter(|(rows, ids)| ids.len() > *rows)
        .collect();
    if batches.is_empty() {
        return Err(Error::argument(
            "samples",
            samples.len(),
            "at least one of two tokens, for the taylor score",
        ));
    }
    let mut task = Task::begin(progress, "score channels", batches.len(), "batches")?;
    let mut probe = model.clone().set_require_grad(false).train();
    let tape = probe.device();
    let mut scores: Vec<BlockScores> = (probe.layers.iter())
        .map(|block| BlockScores {
            mlp: vec![0.0; block.n_mlp_channels()],
            kv_groups: vec![0.0; block.n_kv_groups()],
        })
        .collect();
    for (index, (rows, ids)) in batches.iter().enumerate() {
        put_on_adapters(
            &mut probe,
            &lora,
            mix_seed(config.seed, index as u64),
            &tape,
        )?;
        let targets = targets(*rows, ids);
        let loss = probe.nll_sum(probe.tokens(ids, *rows)?, &targets)? / targets.len() as f64;
        let mut grads = loss.backward();
        for (block, scores) in scores.iter_mut().enumerate() {
            for kind in SCORED {
                let Some(layer) = probe.layers[block].linear(kind) else {
                    continue;
                };
                let Some(adapter) = &layer.adapter else {
                    continue;
                };
                let Some(grad) = adapter.lora_b.val().grad_remove(&mut grads) else {
                    continue;
                };
                let a = adapter.lora_a.val().without_autodiff();
                let weight = layer.base.weight().without_autodiff();
                let terms = host_values((a.transpose().matmul(weight) * grad).sum_dim(0).abs());
                if let Some(index) = terms.iter().position(|v| !v.is_finite()) {
                    let tensor = format!("gradient of {}", kind.name(block));
                    return Err(Error::NotFinite {
                        tensor,
                        index,
                        value: terms[index],
                    });
                }
                let channels = match kind {
                    LinearKind::Gate | LinearKind::Up => &mut scores.mlp,
                    _ => &mut scores.kv_groups,
                };
                let width = terms.len() / channels.len();
                let share = sketch_scale(adapter) / batches.len() as f64;
                for (score, term) in channels.iter_mut().zip(sum_channels(&terms, width)?) {
                    *score += share * term;
                }
            }
        }
        task.step("")?;
    }
    Ok(scores)
}

/// Gives each scored layer an adapter with random A and zero B, replacing any previous one.
fn put_on_adapters(
    model: &mut Decoder,
    lora: &LoraConfig,
    seed: u64,
    device: &Device,
) -> Result<()> {
    for (index, block) in model.layers.iter_mut().enumerate() {
        for (slot, kind) in SCORED.into_iter().enumerate() {
            let Some(layer) = block.linear_mut(kind) else {
                continue;
            };
            let [d_input, d_output] = layer.base.dims();
            let seed = mix_seed(seed, (index * SCORED.len() + slot) as u64);
            layer.adapter = Some(ElasticLora::new(lora, d_input, d_output, seed, device)?);
        }
    }
    Ok(())
}

/// `1 / (s r E[a^2])`, where A is uniform in `±1 / sqrt(d_input)`.
fn sketch_scale(adapter: &ElasticLora) -> f64 {
    3.0 * adapter.d_input() as f64 / (adapter.scale() * adapter.max_rank() as f64)
}
