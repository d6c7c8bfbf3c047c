//! Measures extracted models: a random Llama of LLaMA's shape against extracted subnets with
//! smaller widths, fewer heads or fewer blocks, in prefill and decoding:
//! `cargo bench --bench extracted -- bf16/mlp`, or any other part of a name.
//!
//! Ideally, half the multiply-accumulates take half the time in prefill, and half the bytes take
//! half the time in decoding. The table after criterion's output compares this with the
//! measurement: it shows the ratio of times divided by the ratio of costs. Full and extracted
//! models take turns, so that other load on the machine affects both. Adapters are merged, so they
//! have no effect.
//!
//! Settings: `BENCH_WEIGHTS` (f32, bf16, f16), `BENCH_HIDDEN`, `BENCH_MLP`, `BENCH_BLOCKS`,
//! `BENCH_HEADS`, `BENCH_VOCAB`, `BENCH_PROMPT` (tokens), `BENCH_CONTEXT` (tokens in the cache
//! before decoding), and `BENCH_FORETELL=1`, which also predicts the times from a latency table.

mod common;

use std::cell::OnceCell;
use std::time::Duration;

use burn::tensor::{Int, Tensor};
use common::{Subject, flag, in_turns, median, ok, quantile, setting, settings, timed};
use criterion::Criterion;
use elastic_lora::adapter::LoraConfig;
use elastic_lora::eval::{LatencyTable, Phase};
use elastic_lora::io::DType;
use elastic_lora::io::hf::{HfConfig, LlamaDims};
use elastic_lora::model::Decoder;
use elastic_lora::nn::{KvCache, host_values};
use elastic_lora::progress::Silent;
use elastic_lora::space::{Elastic, Group};
use elastic_lora::supernet::{SubnetCost, SuperNetConfig};
use elastic_lora::{Error, Merger, Result, SearchSpace, SubnetConfig, SuperNet};

struct Args {
    hidden: usize,
    mlp: usize,
    blocks: usize,
    heads: usize,
    vocab: usize,
    prompt: usize,
    context: usize,
}

/// Reductions: MLPs to half the width, heads to two thirds, blocks to two thirds, or all of them.
const CHANGES: [&str; 4] = ["mlp", "heads", "depth", "all"];

fn config(args: &Args) -> Result<HfConfig> {
    HfConfig::new_llama(&LlamaDims {
        vocab_size: args.vocab,
        hidden_size: args.hidden,
        intermediate_size: args.mlp,
        num_hidden_layers: args.blocks,
        num_attention_heads: args.heads,
        num_key_value_heads: args.heads,
        max_position_embeddings: 2 * args.prompt.max(args.context + 1),
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        bos_token_id: None,
        eos_token_id: None,
        pad_token_id: None,
        dtype: DType::F32,
    })
}

/// Creates the supernet: no ranks, two widths, two numbers of heads, two depths.
fn net(args: &Args, config: &HfConfig) -> Result<SuperNet> {
    let model = Decoder::init(config, 1, &common::training::device("flex")?)?;
    let layers = model.layer_shapes();
    let width = |names: &[&str], choices: [usize; 2]| {
        SearchSpace::groups_by_block(Elastic::Width, &layers, &[names], &choices)
    };
    let head_dim = args.hidden / args.heads;
    let mut groups = width(&["gate_proj", "up_proj"], [args.mlp, args.mlp / 2])?;
    groups.extend(width(
        &["q_proj", "k_proj", "v_proj"],
        [args.hidden, args.heads * 2 / 3 * head_dim],
    )?);
    // The middle blocks are removed first.
    let mut blocks: Vec<usize> = (0..args.blocks).collect();
    blocks.sort_by_key(|block| std::cmp::Reverse((2 * block + 1).abs_diff(args.blocks)));
    let names = blocks
        .into_iter()
        .map(|block| format!("model.layers.{block}"))
        .collect();
    groups.push(Group::of_kind(
        Elastic::Depth,
        "depth",
        names,
        vec![args.blocks, args.blocks * 2 / 3],
    )?);
    SuperNet::new(
        model,
        SearchSpace::new(groups)?,
        SuperNetConfig::new(LoraConfig::new(1)),
    )
}

/// Returns the largest subnet with one reduction.
fn subnet(net: &SuperNet, change: &str) -> SubnetConfig {
    let value = |group: &Group| {
        let kind = match group.kind() {
            Elastic::Depth => "depth",
            _ if group.layers()[0].contains("mlp") => "mlp",
            _ => "heads",
        };
        group.choices()[usize::from(["all", kind].contains(&change))]
    };
    let groups = net.space().groups().iter();
    groups
        .map(|group| (group.id().to_string(), value(group)))
        .collect()
}

/// Returns a measurement of a model on `n` tokens with `before` tokens in the cache.
fn phase(model: &Decoder, before: usize, n: usize) -> Result<impl FnMut() -> Result<Duration>> {
    let ids = |n: usize| (0..n as u32).map(|id| id % 97).collect::<Vec<_>>();
    let mut cache = KvCache::new(model.layers.len());
    if before > 0 {
        host_values(model.hidden_states(model.tokens(&ids(before), 1)?, Some(&mut cache)));
    }
    let tokens: Tensor<2, Int> = model.tokens(&ids(n), 1)?;
    Ok(move || {
        cache.truncate(before);
        timed(|| {
            let hidden = model.hidden_states(tokens.clone(), Some(&mut cache));
            Ok(host_values(model.logits(hidden.narrow(1, n - 1, 1))))
        })
    })
}

/// Returns the multiply-accumulates of a prompt, where the head is applied to the last token only,
/// and the bytes read for one token after `context`: every weight except the embedding, and keys
/// and values.
fn costs(config: &HfConfig, args: &Args, dtype: DType) -> (f64, f64) {
    let cost = SubnetCost::of_config(config);
    let head = config.vocab_size() * config.hidden_size();
    let macs = (cost.macs_per_token - head) * args.prompt + head + cost.attention_macs(args.prompt);
    let keys: usize = config
        .blocks()
        .iter()
        .map(|block| 2 * block.n_kv_heads * config.head_dim())
        .sum();
    (
        macs as f64,
        (cost.macs_per_token * dtype.size() + 4 * keys * args.context) as f64,
    )
}

fn bench(criterion: &mut Criterion) -> Result<()> {
    // The full sizes are those of the published figures; the quick ones take about a minute.
    let of = |name, full, quick| setting(name, if common::quick() { quick } else { full });
    let args = Args {
        hidden: of("BENCH_HIDDEN", "1536", "512"),
        mlp: of("BENCH_MLP", "4096", "1408"),
        blocks: of("BENCH_BLOCKS", "12", "6"),
        heads: of("BENCH_HEADS", "12", "8"),
        vocab: of("BENCH_VOCAB", "8000", "8000"),
        prompt: of("BENCH_PROMPT", "256", "256"),
        context: of("BENCH_CONTEXT", "128", "128"),
    };
    if args.heads < 2 || args.blocks < 2 {
        let found = args.heads.min(args.blocks);
        return Err(Error::argument("heads, blocks", found, "at least 2"));
    }
    let all_weights: Vec<String> = settings(
        "BENCH_WEIGHTS",
        if common::quick() { "f32" } else { "f32,bf16" },
    );
    let foretell = flag("BENCH_FORETELL");
    let config = config(&args)?;
    let mut net = net(&args, &config)?;
    let full = net.eval_model();
    let mut lines = Vec::new();
    for weights in all_weights {
        let dtype = match weights.as_str() {
            "bf16" => DType::BF16,
            "f16" => DType::F16,
            _ => DType::F32,
        };
        let full = full.clone().with_weight_dtype(dtype)?;
        let tables = OnceCell::new();
        for change in CHANGES {
            net.activate(&subnet(&net, change))?;
            let small = Merger::new()
                .extract(&net, &[], &Silent)?
                .model
                .with_weight_dtype(dtype)?;
            net.activate(&net.maximal())?;
            let (a, b) = (
                costs(full.config(), &args, dtype),
                costs(small.config(), &args, dtype),
            );
            let phases = [
                ("prefill", 0, args.prompt, a.0 / b.0),
                ("decode", args.context, 1, a.1 / b.1),
            ];
            for (index, (what, before, n, cost)) in phases.into_iter().enumerate() {
                let mut group = criterion.benchmark_group(format!("extracted/{weights}/{change}"));
                group.sample_size(10);
                let make = || {
                    Ok([
                        Box::new(phase(&small, before, n)?) as Subject,
                        Box::new(phase(&full, before, n)?),
                    ])
                };
                let Some([of_small, of_full]) = in_turns(&mut group, what, make) else {
                    continue;
                };
                let ms =
                    |share: fn(&[f64]) -> f64| [share(&of_full), share(&of_small)].map(|s| 1e3 * s);
                let (least, median) = (ms(|all| quantile(all, 0.0)), ms(median));
                let mut cells = [least, median]
                    .concat()
                    .iter()
                    .map(|ms| format!("{ms:.1}"))
                    .collect::<Vec<_>>();
                let ratios = [least, median].map(|[full, small]| full / small);
                let ratios = [
                    ratios[0],
                    ratios[1],
                    cost,
                    ratios[0] / cost,
                    ratios[1] / cost,
                ];
                cells.extend(ratios.map(|ratio| format!("{ratio:.3}")));
                if foretell {
                    let tables = tables.get_or_init(|| ok(foretold(&net, &full, &args)));
                    for (model, least) in [&full, &small].into_iter().zip(least) {
                        let ms = tables[index].predict_ms(model.config().blocks())?;
                        cells.extend([
                            format!("{ms:.1}"),
                            format!("{:+.1}%", 100.0 * (ms / least - 1.0)),
                        ]);
                    }
                }
                lines.push((format!("{weights} {change} {what}"), cells));
            }
        }
    }
    println!(
        "{} million parameters, prompt of {}, context of {}; minimum and median times in ms, ratios \
         of times (full / extracted), ratio of costs, and quotients of the ratios",
        SubnetCost::of_config(&config).params / 1_000_000,
        args.prompt,
        args.context,
    );
    let head = [
        "full", "small", "full", "small", "min", "median", "cost", "min", "median", "full", "off",
        "small", "off",
    ];
    let head = &head[..if foretell { 13 } else { 9 }];
    let head = (
        String::new(),
        head.iter().map(ToString::to_string).collect(),
    );
    for (name, cells) in std::iter::once(head).chain(lines) {
        let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:>9}")).collect();
        println!("{name:<20} {}", cells.join(" "));
    }
    Ok(())
}

/// Measures latency tables for prefill and decoding with the weights as stored. Only the sizes of
/// the choices matter, not the supernet's own weights.
fn foretold(net: &SuperNet, full: &Decoder, args: &Args) -> Result<[LatencyTable; 2]> {
    let stored = SuperNet::new(full.clone(), net.space().clone(), net.config().clone())?;
    let (n_tokens, context) = (args.prompt, args.context);
    let table = |phase, repeats| LatencyTable::measure(&stored, phase, repeats, &Silent);
    Ok([
        table(Phase::Prefill { n_tokens }, 3)?,
        table(Phase::Decode { context }, 10)?,
    ])
}

fn main() {
    common::main(bench);
}
