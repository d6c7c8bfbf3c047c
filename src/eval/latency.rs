//! The latency of a model on this machine: measured as a whole, or predicted from a table of its
//! parts' times.

use std::collections::BTreeSet;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use serde::{Deserialize, Serialize};

use crate::arch::BlockDims;
use crate::error::{Error, Result};
use crate::io::HfConfig;
use crate::model::Decoder;
use crate::nn::{KvCache, host_values};
use crate::progress::{Progress, Task};
use crate::space::{Elastic, SubnetConfig};
use crate::supernet::{SubnetCost, SuperNet};

/// The workload that is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Processing a prompt and computing the logits after its last token.
    Prefill {
        /// Number of tokens in the prompt.
        n_tokens: usize,
    },
    /// Generating one token after `context` others.
    Decode {
        /// Number of tokens in the cache.
        context: usize,
    },
}

impl Phase {
    /// Number of tokens in the cache before timing starts, and number of timed tokens.
    fn tokens(self) -> (usize, usize) {
        match self {
            Phase::Prefill { n_tokens } => (0, n_tokens),
            Phase::Decode { context } => (context, 1),
        }
    }

    fn check(self, config: &HfConfig) -> Result<()> {
        let (before, timed) = self.tokens();
        if timed == 0 {
            return Err(Error::argument("n_tokens", 0, "at least 1"));
        }
        let (found, max) = (before + timed, config.max_position_embeddings());
        if found > max {
            return Err(Error::SequenceTooLong {
                what: "timing".into(),
                found,
                max,
            });
        }
        Ok(())
    }
}

/// Reading this many bytes of weights evicts them from every cache.
const PAST_CACHES: usize = 256 << 20;

/// Runs once untimed and then `repeats` times. Returns the minimum in milliseconds, since other
/// load on the machine only adds to a time.
fn least_ms(repeats: usize, mut run: impl FnMut()) -> f64 {
    least_ms_after(repeats, || {}, &mut run)
}

/// Like [`least_ms`], with an untimed call of `before` ahead of each run.
fn least_ms_after(repeats: usize, mut before: impl FnMut(), mut run: impl FnMut()) -> f64 {
    run();
    let mut time = || {
        before();
        let started = Instant::now();
        run();
        1e3 * started.elapsed().as_secs_f64()
    };
    (0..repeats.max(1))
        .map(|_| time())
        .fold(f64::INFINITY, f64::min)
}

/// Waits until a tensor is computed: some devices compute asynchronously.
fn wait(x: &Tensor<3>) {
    let [_, seq, _] = x.dims();
    host_values(x.clone().narrow(1, seq - 1, 1).narrow(2, 0, 1));
}

/// Latency of a model on one sequence of token 0 in milliseconds, the minimum of `repeats` runs.
///
/// # Errors
/// Returns [`Error::SequenceTooLong`] for more tokens than the model's context.
#[doc(hidden)]
pub fn measure_ms(model: &Decoder, phase: Phase, repeats: usize) -> Result<f64> {
    phase.check(model.config())?;
    let (before, timed) = phase.tokens();
    let mut held = KvCache::new(model.layers.len());
    if before > 0 {
        wait(&model.hidden_states(model.tokens(&vec![0; before], 1)?, Some(&mut held)));
    }
    let tokens = model.tokens(&vec![0; timed], 1)?;
    Ok(least_ms(repeats, || {
        held.truncate(before);
        let hidden = model.hidden_states(tokens.clone(), Some(&mut held));
        wait(&model.logits(hidden.narrow(1, timed - 1, 1)));
    }))
}

/// Measured times of a model's parts at every size in a search space. The latency of a subnet is
/// predicted as their sum, so that a search need not run any subnet (the lookup table of
/// ProxylessNAS, arXiv 1812.00332).
///
/// Parts are timed as they are in an extracted subnet: dense, with adapters merged. Generating one
/// token is bound by reading the weights. A part that runs repeatedly would find its weights in the
/// processor's cache, which does not happen in a whole model. Therefore as many copies of the part
/// are timed in turn as exceed any cache, or as the model has blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LatencyTable {
    /// The workload that was timed.
    pub phase: Phase,
    /// Time of embedding, final norm and head, in milliseconds.
    pub rest_ms: f64,
    /// Time of attention with its norm in milliseconds, by numbers of query heads and key/value
    /// heads.
    pub attention_ms: Vec<(usize, usize, f64)>,
    /// Time of the MLP with its norm in milliseconds, by width.
    pub mlp_ms: Vec<(usize, f64)>,
}

impl LatencyTable {
    /// Times each part of `net`'s model at each size in its space, as the minimum of `repeats`
    /// runs.
    ///
    /// # Errors
    /// Returns the errors of [`measure_ms`].
    pub fn measure(
        net: &SuperNet,
        phase: Phase,
        repeats: usize,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let model = net.eval_model();
        let config = model.config();
        phase.check(config)?;
        let (mut attentions, mut widths) = (BTreeSet::new(), BTreeSet::new());
        for subnet in one_change(net) {
            for block in net.block_dims(&subnet)? {
                attentions.extend(
                    block
                        .has_attention()
                        .then_some((block.n_heads, block.n_kv_heads)),
                );
                widths.extend(block.has_mlp().then_some(block.d_mlp));
            }
        }
        let (all, device) = (
            1 + attentions.len() + widths.len(),
            model.device().without_autodiff(),
        );
        let mut task = Task::begin(progress, "time parts", all, "parts")?;
        let (before, timed) = phase.tokens();
        let ids = model.tokens(&vec![0; timed], 1)?;
        // Runs a block first, as in the model.
        let block = || {
            wait(&model.block(
                config.num_hidden_layers() - 1,
                model.embed(ids.clone()),
                None,
            ))
        };
        let rest_ms = least_ms_after(repeats, block, || {
            let hidden = model.norm.forward(model.embed(ids.clone()));
            wait(&model.logits(hidden.narrow(1, timed - 1, 1)));
        });
        task.step("")?;
        let mut part = |dims: BlockDims| -> Result<f64> {
            let part = part_model(&model, dims, timed, &device)?;
            let ms = time_blocks(&part, before, timed, repeats, &device);
            task.step("")?;
            Ok(ms)
        };
        let mut attention_ms = Vec::with_capacity(attentions.len());
        for (n_heads, n_kv_heads) in attentions {
            attention_ms.push((
                n_heads,
                n_kv_heads,
                part(BlockDims {
                    n_heads,
                    n_kv_heads,
                    d_mlp: 0,
                })?,
            ));
        }
        let mut mlp_ms = Vec::with_capacity(widths.len());
        for d_mlp in widths {
            mlp_ms.push((
                d_mlp,
                part(BlockDims {
                    n_heads: 0,
                    n_kv_heads: 0,
                    d_mlp,
                })?,
            ));
        }
        Ok(Self {
            phase,
            rest_ms,
            attention_ms,
            mlp_ms,
        })
    }

    /// Predicted latency in milliseconds of a model with blocks of these sizes.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] for a size that was not measured.
    pub fn predict_ms(&self, blocks: &[BlockDims]) -> Result<f64> {
        let missing = |block: &BlockDims| {
            Error::argument("block", format!("{block:?}"), "of sizes that were measured")
        };
        let mut sum = self.rest_ms;
        for block in blocks {
            if block.has_attention() {
                let part = self
                    .attention_ms
                    .iter()
                    .find(|part| (part.0, part.1) == (block.n_heads, block.n_kv_heads));
                sum += part.ok_or_else(|| missing(block))?.2;
            }
            if block.has_mlp() {
                sum += self
                    .mlp_ms
                    .iter()
                    .find(|part| part.0 == block.d_mlp)
                    .ok_or_else(|| missing(block))?
                    .1;
            }
        }
        Ok(sum)
    }
}

/// The largest subnet, and its variants with one width group at another choice. Together they
/// contain every block size.
fn one_change(net: &SuperNet) -> Vec<SubnetConfig> {
    let largest = net.maximal();
    let mut subnets = vec![largest.clone()];
    for group in net.space().groups_of_kind(Elastic::Width) {
        subnets.extend(group.choices()[1..].iter().map(|choice| {
            let mut subnet = largest.clone();
            subnet.set(group.id(), *choice);
            subnet
        }));
    }
    subnets
}

/// Configuration of `n` blocks with these sizes and a minimal vocabulary.
fn part_config(config: &HfConfig, dims: BlockDims, n: usize) -> Result<HfConfig> {
    let mut raw = config.with_blocks(&vec![dims; n])?.raw().clone();
    raw.insert("vocab_size".into(), 8.into());
    for token in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        raw.insert(token.into(), serde_json::Value::Null);
    }
    HfConfig::from_json(raw)
}

/// A model of random blocks with these sizes, stored in the dtype of `model`: a single block, or
/// for one timed token as many as exceed any cache, but no more than `model` has.
fn part_model(model: &Decoder, dims: BlockDims, timed: usize, device: &Device) -> Result<Decoder> {
    let (config, dtype) = (part_config(model.config(), dims, 1)?, model.weight_dtype());
    let part = Decoder::init(&config, 1, device)?.with_weight_dtype(dtype)?;
    let bytes = SubnetCost::of_config(&config).params * dtype.size();
    let n = if timed > 1 {
        1
    } else {
        PAST_CACHES
            .div_ceil(bytes)
            .min(model.config().num_hidden_layers())
    };
    let blocks = vec![part.layers[0].clone(); n];
    let mut part = part.with_layers(blocks, part_config(model.config(), dims, n)?);
    // Gives each copy its own memory.
    part.try_for_each_linear(|_, layer| layer.base.set_matrix(&layer.base.to_matrix()))?;
    Ok(part)
}

/// Time per block in milliseconds of a model whose blocks are all alike.
fn time_blocks(
    model: &Decoder,
    before: usize,
    timed: usize,
    repeats: usize,
    device: &Device,
) -> f64 {
    let (d_model, n) = (model.config().hidden_size(), model.layers.len());
    let input =
        |n: usize| Tensor::<3>::random([1, n, d_model], Distribution::Normal(0.0, 1.0), device);
    let mut held = KvCache::new(n);
    let run = |x: Tensor<3>, cache: &mut KvCache| {
        let mut x = x;
        let mut pass = model.pass(cache.n_tokens(), x.dims()[1], Some(cache));
        for (index, block) in model.layers.iter().enumerate() {
            x = block.forward(x, index, &mut pass);
        }
        wait(&x);
    };
    if before > 0 {
        run(input(before), &mut held);
        held.advance(before);
    }
    let x = input(timed);
    let all = least_ms(repeats, || {
        held.truncate(before);
        run(x.clone(), &mut held);
    });
    all / n as f64
}
