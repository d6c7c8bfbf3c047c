//! Helpers shared by the integration tests.
#![allow(dead_code)]

pub mod families;
pub mod python;
pub mod runtime;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor, TensorData};
use elastic_lora::io::hf::LlamaDims;
use elastic_lora::io::{Checkpoint, DType, HfConfig};
use elastic_lora::linalg::Matrix;
use elastic_lora::model::Decoder;
use elastic_lora::nn::host_values;
use elastic_lora::progress::{Progress, Task};
use elastic_lora::train::for_each_param;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Returns the path of a file or folder of reference models, data and outputs, or `None` if it does
/// not exist.
pub fn shared(relative: &str) -> Option<PathBuf> {
    let root = std::env::var_os("ELASTIC_LORA_SHARED").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")),
        PathBuf::from,
    );
    let path = root.join(relative);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is missing", path.display());
    None
}

/// Loads a model folder on the Flex device.
pub fn load(dir: &std::path::Path) -> Decoder {
    let config = HfConfig::open(dir).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    Decoder::load(&config, &checkpoint, &Device::flex()).unwrap()
}

/// Loads the i32 values of a tensor.
pub fn load_i32(checkpoint: &Checkpoint, name: &str) -> Vec<u32> {
    checkpoint
        .bytes(name)
        .unwrap()
        .chunks_exact(4)
        .map(|b| u32::try_from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])).unwrap())
        .collect()
}

/// Records every step as (label, done, total), and optionally interrupts after a number of checks.
#[derive(Default)]
pub struct Heard {
    steps: Mutex<Vec<(String, usize, usize)>>,
    asked: AtomicUsize,
    stop_at: Option<usize>,
}

impl Heard {
    /// Interrupts after `n` checks.
    pub fn stopping_at(n: usize) -> Self {
        Self {
            stop_at: Some(n),
            ..Self::default()
        }
    }

    /// Returns the number of checks for interruption.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    pub fn steps(&self) -> Vec<(String, usize, usize)> {
        self.steps.lock().unwrap().clone()
    }

    /// Asserts that a single task completed all of its steps.
    pub fn assert_all(&self, label: &str, total: usize) {
        let expected: Vec<_> = (1..=total).map(|n| (label.into(), n, total)).collect();
        assert_eq!(self.steps(), expected);
    }
}

impl Progress for Heard {
    fn step(&self, task: &Task<'_>, _note: &str) {
        let step = (task.label().to_string(), task.done(), task.total());
        self.steps.lock().unwrap().push(step);
    }

    fn is_interrupted(&self) -> bool {
        let before = self.asked.fetch_add(1, Ordering::Relaxed);
        self.stop_at.is_some_and(|n| before >= n)
    }
}

/// Returns the largest absolute difference.
pub fn max_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// Gives all weights a relevant size: matrices are scaled up, and norms get different gains.
struct Widen(f32);

impl ModuleMapper for Widen {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let factor = self.0;
        let param = param.map(|value| {
            if D > 1 {
                return value * factor;
            }
            let n = value.shape().num_elements();
            let gains: Vec<f32> = (0..n).map(|i| 0.7 + 0.05 * (i % 11) as f32).collect();
            Tensor::from_data(TensorData::new(gains, value.shape()), &value.device())
        });
        param.set_require_grad(false)
    }
}

/// Returns sizes that are odd where possible: 4 heads of 6 features, 2 key/value heads, an MLP of
/// width 37, 41 tokens, a context of 40.
pub fn tiny_dims(tied: bool) -> LlamaDims {
    LlamaDims {
        vocab_size: 41,
        hidden_size: 24,
        intermediate_size: 37,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 40,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: tied,
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        pad_token_id: None,
        dtype: DType::F32,
    }
}

/// Creates a random model of these sizes on a device. Its weights are large enough for attention to
/// be selective.
pub fn tiny_on(dims: &LlamaDims, seed: u64, device: &Device) -> Decoder {
    let config = HfConfig::new_llama(dims).unwrap();
    Decoder::init(&config, seed, device)
        .unwrap()
        .map(&mut Widen(12.0))
}

/// Creates a random tiny Llama on the Flex device.
pub fn tiny(tied: bool, seed: u64) -> Decoder {
    tiny_on(&tiny_dims(tied), seed, &Device::flex())
}

/// Creates a random tiny Mistral with a sliding window of this size.
pub fn tiny_mistral(window: Option<usize>, seed: u64) -> Decoder {
    let value = serde_json::json!({
        "model_type": "mistral", "architectures": ["MistralForCausalLM"],
        "vocab_size": 41, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false, "sliding_window": window,
    });
    let config = HfConfig::from_json(value.as_object().unwrap().clone()).unwrap();
    Decoder::init(&config, seed, &Device::flex())
        .unwrap()
        .map(&mut Widen(12.0))
}

/// Returns reproducible random numbers in -1..1.
pub fn random_values(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

/// Returns a reproducible random tensor with elements in -1..1.
pub fn random<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let values = random_values(shape.iter().product(), seed);
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Returns a reproducible random matrix with elements in -1..1.
pub fn random_matrix(rows: usize, cols: usize, seed: u64) -> Matrix {
    Matrix::new(rows, cols, random_values(rows * cols, seed)).unwrap()
}

/// Returns reproducible random token ids below `vocab`.
pub fn random_ids(n: usize, vocab: u32, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(0..vocab)).collect()
}

/// Returns the bits of every parameter by path, for exact comparisons.
pub fn weight_bits<M: Module>(module: &M) -> BTreeMap<String, Vec<u32>> {
    let mut out = BTreeMap::new();
    for_each_param(module, |path, param| {
        let bits = host_values(param.flattened());
        let bits = bits.into_iter().map(f32::to_bits).collect();
        assert!(out.insert(path.to_string(), bits).is_none());
    });
    out
}

/// Returns whether a parameter's path is a factor of an adapter.
pub fn is_factor(path: &str) -> bool {
    path.ends_with("lora_a") || path.ends_with("lora_b")
}
