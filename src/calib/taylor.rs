//! First-order importance of channels and heads from the gradients of low-rank adapters alone.
//!
//! As LoRAPrune (arXiv 2305.18403) has it, an adapter's gradients stand in for the weight's, which are never formed; the
//! criterion `|<w, dL/dw>|` is that of Molchanov et al. (arXiv 1611.06440). Departure: LoRAPrune goes by trained factors, this
//! by fresh ones. With A random and B zero the model computes what it did, `dL/dB = s A^T dL/dW`, and since `E[A A^T] =
//! r E[a^2] I`, the expectation of `A dL/dB / (s r E[a^2])` is `dL/dW`. Only its product with the weight is needed, for which
//! `A^T W` and `dL/dB`, both `[r, out]`, suffice.

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

/// The layers whose rows are scored; what reads them (o, down) tells nothing more.
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
    /// Rank of the adapters: the sketch's error goes with `1 / sqrt(rank)`, memory and part of the time with the rank.
    pub rank: usize,
    /// Tokens of a batch, each of which adds the absolute value of its term; one sample where samples are longer. A tape of
    /// the whole model over so many tokens is in memory.
    pub batch_tokens: usize,
    /// Seed of the random factors, which are drawn anew for each batch.
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

/// The mean over batches of `|<w, dL/dw>|`, summed over the rows `w` of gate and up that are an MLP channel's, and over those of
/// q, k and v that are a key/value group's. L is the mean loss of a batch, and the gradient a sketch.
///
/// Samples of fewer than two tokens predict nothing and are left out.
///
/// # Errors
/// [`Error::HasAdapter`]; [`Error::Unsupported`] while a layer has less than all of its channels active;
/// [`Error::InvalidArgument`] for a rank of 0 or over [`MAX_RANK`](crate::adapter::MAX_RANK), or
/// without a sample of two tokens; those of [`Decoder::tokens`] for a sample outside vocabulary or context;
/// [`Error::NotFinite`] where a gradient holds NaN or an infinity.
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

/// Gives each scored layer an adapter with random A and zero B, in place of the one that it has.
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
