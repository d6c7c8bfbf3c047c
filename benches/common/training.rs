//! Creates a supernet for each method and runs its training steps.

#[allow(unused_macros)]
#[path = "../../examples/common/mod.rs"]
mod examples;

use std::collections::BTreeMap;

use clap::ValueEnum;
use elastic_lora::adapter::LoraConfig;
use elastic_lora::data::{Batcher, Sequence};
use elastic_lora::format::QuantizedMatrix;
use elastic_lora::io::DType;
use elastic_lora::io::hf::{HfConfig, LlamaDims};
use elastic_lora::model::Decoder;
use elastic_lora::progress::Silent;
use elastic_lora::quant::{GridConfig, round_to_nearest};
use elastic_lora::sparsity::{self, Pattern};
use elastic_lora::supernet::{QaConfig, SuperNetConfig};
use elastic_lora::train::{Schedule, TrainConfig, Trainer};
use elastic_lora::{Result, SearchSpace, SuperNet};
pub use examples::device;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

pub const VOCAB: usize = 32_000;
pub const ROWS: usize = 4;
pub const LEN: usize = 256;
pub const RANKS: [usize; 3] = [32, 24, 16];

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    Lora,
    Nls,
    SparsePeft,
    /// With a grid of 4 bits and groups of 32
    QaSparsePeft,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weights {
    F32,
    Bf16,
    /// Packed 4-bit integers with groups of 32
    Int4,
}

/// A training configuration.
#[derive(Clone, Copy, Serialize)]
pub struct Case {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub method: Method,
    pub weights: Weights,
    pub bf16_gradient: bool,
}

/// Quantizes the weights of the layers to 4 bits.
fn quantized(model: &Decoder) -> Result<BTreeMap<String, QuantizedMatrix>> {
    let grid = GridConfig::new(4).with_group_size(Some(32));
    model
        .linears()
        .map(|(name, layer)| {
            Ok((
                name,
                round_to_nearest(&layer.base.to_matrix(), &grid, None)?,
            ))
        })
        .collect()
}

fn with_weights(model: Decoder, weights: Weights) -> Result<Decoder> {
    match weights {
        Weights::F32 => model.with_weight_dtype(DType::F32),
        Weights::Bf16 => model.with_weight_dtype(DType::BF16),
        Weights::Int4 => {
            let layers = quantized(&model)?;
            model.with_quantized(&layers)
        }
    }
}

/// Creates a supernet with adapters on q, k, v, up, gate and down.
pub fn net(case: &Case, device: &str) -> Result<SuperNet> {
    let config = HfConfig::new_llama(&LlamaDims {
        vocab_size: VOCAB,
        hidden_size: case.hidden,
        intermediate_size: case.hidden * 8 / 3,
        num_hidden_layers: case.layers,
        num_attention_heads: case.heads,
        num_key_value_heads: case.heads,
        max_position_embeddings: LEN,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_id: None,
        pad_token_id: None,
        dtype: DType::F32,
    })?;
    let mut model = Decoder::init(&config, 1, &self::device(device)?)?;
    let aware = case.method == Method::QaSparsePeft;
    let sparse = aware || case.method == Method::SparsePeft;
    if sparse {
        model.try_for_each_linear(|_, layer| {
            let mut weight = layer.base.to_matrix();
            let scores = sparsity::magnitude_scores(&weight);
            sparsity::prune(&mut weight, &scores, &Pattern::Unstructured { ratio: 0.5 })?;
            layer.base.set_matrix(&weight)
        })?;
    }
    let model = with_weights(model, case.weights)?;
    let choices = if case.method == Method::Nls {
        &RANKS[..]
    } else {
        &RANKS[..1]
    };
    let groups = [
        &["q_proj", "k_proj", "v_proj"][..],
        &["up_proj", "gate_proj"],
        &["down_proj"],
    ];
    let space = SearchSpace::grouped(&model.layer_shapes(), &groups, choices)?;
    let mut grids = if aware {
        quantized(&model)?
    } else {
        BTreeMap::new()
    };
    let lora = LoraConfig::new(RANKS[0]).with_bf16_gradient(case.bf16_gradient);
    let net = SuperNet::new(
        model,
        space,
        SuperNetConfig::new(lora).with_sparse_peft(sparse),
    )?;
    if !aware {
        return Ok(net);
    }
    let adapted = net.ranks(net.active())?;
    grids.retain(|name, _| adapted.contains_key(name));
    net.with_quantization(&QaConfig::new(grids))
}

pub fn data() -> Result<Batcher> {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut sequence = || {
        Sequence::unmasked(
            (0..LEN)
                .map(|_| rng.random_range(0..VOCAB as u32))
                .collect(),
        )
    };
    Batcher::new((0..4 * ROWS).map(|_| sequence()).collect(), ROWS, 0, 3)
}

/// Returns the total time of the steps of a run in milliseconds, without the setup and the end of
/// the run.
pub fn run(net: &mut SuperNet, data: &mut Batcher, steps: usize, seed: u64) -> Result<f64> {
    let mut config = TrainConfig::new(steps);
    config.schedule = Schedule::Constant;
    config.seed = seed;
    Ok(1e3 * Trainer::new(config)?.run(net, data, &[], &Silent)?.seconds)
}
