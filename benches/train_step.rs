//! One optimizer step of plain LoRA and of NLS (a random subnet a step), through the public trainer.

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use elastic_lora::adapter::LoraConfig;
use elastic_lora::data::{Batcher, Sequence};
use elastic_lora::io::DType;
use elastic_lora::io::hf::{HfConfig, LlamaDims};
use elastic_lora::model::Decoder;
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{Schedule, TrainConfig, Trainer};
use elastic_lora::{SearchSpace, SuperNet};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const ROWS: usize = 4;
const LEN: usize = 256;
const RANKS: [usize; 3] = [32, 24, 16];

struct Size {
    name: &'static str,
    hidden: usize,
    layers: usize,
    heads: usize,
    vocab: usize,
}

const SIZES: [Size; 2] = [
    Size { name: "128x4", hidden: 128, layers: 4, heads: 4, vocab: 512 },
    Size { name: "288x6", hidden: 288, layers: 6, heads: 6, vocab: 4096 },
];

/// What both methods train: the adapters of q, k, v, up, gate and down.
fn net(size: &Size, choices: &[usize]) -> SuperNet {
    let config = HfConfig::new_llama(&LlamaDims {
        vocab_size: size.vocab,
        hidden_size: size.hidden,
        intermediate_size: size.hidden * 8 / 3,
        num_hidden_layers: size.layers,
        num_attention_heads: size.heads,
        num_key_value_heads: size.heads,
        max_position_embeddings: LEN,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_id: None,
        pad_token_id: None,
        dtype: DType::F32,
    })
    .unwrap();
    let model = Decoder::init(&config, 1, &Device::flex()).unwrap();
    let groups = [&["q_proj", "k_proj", "v_proj"][..], &["up_proj", "gate_proj"], &["down_proj"]];
    let space = SearchSpace::grouped(&model.layer_shapes(), &groups, choices).unwrap();
    SuperNet::new(model, space, SuperNetConfig::new(LoraConfig::new(RANKS[0]))).unwrap()
}

fn data(size: &Size) -> Batcher {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut sequence = || Sequence::unmasked((0..LEN).map(|_| rng.random_range(0..size.vocab as u32)).collect());
    Batcher::new((0..4 * ROWS).map(|_| sequence()).collect(), ROWS, 0, 3).unwrap()
}

fn trainer(steps: usize, seed: u64) -> Trainer {
    let mut config = TrainConfig::new(steps);
    config.schedule = Schedule::Constant;
    config.seed = seed;
    Trainer::new(config).unwrap()
}

fn train_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("train_step");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(5));
    group.throughput(Throughput::Elements((ROWS * LEN) as u64));
    for size in &SIZES {
        for (method, choices) in [("lora", &RANKS[..1]), ("nls", &RANKS[..])] {
            let (mut net, mut data) = (net(size, choices), data(size));
            let mut seed = 0;
            group.bench_function(BenchmarkId::new(method, size.name), |b| {
                b.iter(|| {
                    seed += 1;
                    black_box(trainer(1, seed).run(&mut net, &mut data, &[]).unwrap())
                });
            });
        }
        // In turns, so that whatever else the machine does falls on both.
        let mut runs = [&RANKS[..1], &RANKS[..]].map(|choices| (net(size, choices), data(size), Vec::new()));
        for seed in 0..10 {
            for (net, data, seconds) in &mut runs {
                let start = Instant::now();
                trainer(1, seed).run(net, data, &[]).unwrap();
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        let [lora, nls] = runs.map(|(_, _, mut seconds)| {
            seconds.sort_by(f64::total_cmp);
            seconds[seconds.len() / 2]
        });
        println!("{}: a step of NLS takes {:.3} times one of LoRA ({nls:.4} s, {lora:.4} s)", size.name, nls / lora);
    }
    group.finish();
}

criterion_group!(benches, train_step);
criterion_main!(benches);
