//! What an extracted model is worth: a random Llama at LLaMA's shape against its subnets of smaller widths, fewer heads and less
//! depth, extracted, in prefill and in decoding: `cargo bench --bench extracted -- --weights f32,bf16`.
//!
//! Ideally a model that does half the multiply-accumulates takes half the time of prefill, and one of half the bytes half the time of
//! decoding. The last column says how near it comes: the ratio of times divided by that of the costs. Full and extracted models take
//! turns, so that whatever else the machine does falls on both. Adapters play no part: they are merged.

#[path = "../examples/common/mod.rs"]
mod common;

use std::time::Instant;

use burn::tensor::{Int, Tensor};
use clap::{Parser, ValueEnum};
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Weights {
    F32,
    Bf16,
    F16,
}

impl Weights {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Change {
    /// MLPs of half the width
    Mlp,
    /// Two thirds of the heads
    Heads,
    /// Two thirds of the blocks
    Depth,
    /// All of these
    All,
}

/// Time extracted models against the full one.
#[derive(Parser)]
struct Args {
    /// Width of the residual stream
    #[arg(long, default_value_t = 1536)]
    hidden: usize,
    /// Width of the MLPs
    #[arg(long, default_value_t = 4096)]
    mlp: usize,
    /// Blocks
    #[arg(long, default_value_t = 12)]
    blocks: usize,
    /// Heads
    #[arg(long, default_value_t = 12)]
    heads: usize,
    /// Vocabulary
    #[arg(long, default_value_t = 8000)]
    vocab: usize,
    /// How weights are stored
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Weights::F32, Weights::Bf16])]
    weights: Vec<Weights>,
    /// What is made smaller
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Change::Mlp, Change::Heads, Change::Depth, Change::All])]
    changes: Vec<Change>,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 256)]
    prompt: usize,
    /// Tokens before the one that is decoded
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// Turns of prefill; each has five runs of decoding
    #[arg(long, default_value_t = 5)]
    turns: usize,
    /// Foretell the times from a table of parts' times, too
    #[arg(long)]
    foretell: bool,
    /// What cargo passes to a bench
    #[arg(long, hide = true)]
    bench: bool,
}

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

/// The supernet: no ranks, two widths, two numbers of heads, two depths.
fn net(args: &Args, config: &HfConfig) -> Result<SuperNet> {
    let model = Decoder::init(config, 1, &common::device("flex")?)?;
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
    // The blocks in the middle go first.
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

/// The largest subnet but for what is made smaller.
fn subnet(net: &SuperNet, change: Change) -> SubnetConfig {
    let changed = |group: &Group| match group.kind() {
        Elastic::Depth => matches!(change, Change::Depth | Change::All),
        _ if group.layers()[0].contains("mlp") => matches!(change, Change::Mlp | Change::All),
        _ => matches!(change, Change::Heads | Change::All),
    };
    let value = |group: &Group| group.choices()[usize::from(changed(group))];
    net.space()
        .groups()
        .iter()
        .map(|group| (group.id().to_string(), value(group)))
        .collect()
}

/// One phase of one model: what is in the cache before, and the tokens that are timed.
struct Timed<'a> {
    model: &'a Decoder,
    before: usize,
    tokens: Tensor<2, Int>,
    cache: KvCache,
    ms: Vec<f64>,
}

impl<'a> Timed<'a> {
    fn new(model: &'a Decoder, before: usize, n: usize) -> Result<Self> {
        let ids = |n: usize| (0..n as u32).map(|id| id % 97).collect::<Vec<_>>();
        let mut cache = KvCache::new(model.layers.len());
        if before > 0 {
            host_values(model.hidden_states(model.tokens(&ids(before), 1)?, Some(&mut cache)));
        }
        let mut timed = Self {
            model,
            before,
            tokens: model.tokens(&ids(n), 1)?,
            cache,
            ms: Vec::new(),
        };
        timed.run();
        timed.ms.clear();
        Ok(timed)
    }

    fn run(&mut self) {
        self.cache.truncate(self.before);
        let n = self.tokens.dims()[1];
        let started = Instant::now();
        let hidden = self
            .model
            .hidden_states(self.tokens.clone(), Some(&mut self.cache));
        host_values(self.model.logits(hidden.narrow(1, n - 1, 1)));
        self.ms.push(1e3 * started.elapsed().as_secs_f64());
    }

    fn least(&self) -> f64 {
        self.ms.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn median(&self) -> f64 {
        let mut ms = self.ms.clone();
        ms.sort_by(f64::total_cmp);
        (ms[(ms.len() - 1) / 2] + ms[ms.len() / 2]) / 2.0
    }
}

/// Multiply-accumulates of a prompt, of which the head sees the last token alone; and bytes that one token after `context` reads:
/// every weight but the embedding, keys and values.
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

struct Foretold {
    prefill: LatencyTable,
    decode: LatencyTable,
}

fn line(name: &str, what: &str, cells: &[String]) {
    let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:>9}")).collect();
    common::say!("{name:<12} {what:<8} {}", cells.join(" "));
}

fn compare(
    args: &Args,
    name: &str,
    dtype: DType,
    full: &Decoder,
    small: &Decoder,
    told: Option<&Foretold>,
) -> Result<()> {
    let (of_full, of_small) = (
        costs(full.config(), args, dtype),
        costs(small.config(), args, dtype),
    );
    let phases = [
        (
            "prefill",
            0,
            args.prompt,
            1,
            of_full.0 / of_small.0,
            told.map(|told| &told.prefill),
        ),
        (
            "decode",
            args.context,
            1,
            5,
            of_full.1 / of_small.1,
            told.map(|told| &told.decode),
        ),
    ];
    for (what, before, n, runs, cost, table) in phases {
        let mut both = [Timed::new(full, before, n)?, Timed::new(small, before, n)?];
        for _ in 0..args.turns {
            for timed in &mut both {
                (0..runs).for_each(|_| timed.run());
            }
        }
        let [a, b] = &both;
        let (least, median) = (a.least() / b.least(), a.median() / b.median());
        let mut cells: Vec<String> = [a.least(), b.least(), a.median(), b.median()]
            .iter()
            .map(|ms| format!("{ms:.1}"))
            .collect();
        cells.extend(
            [least, median, cost, least / cost, median / cost]
                .iter()
                .map(|ratio| format!("{ratio:.3}")),
        );
        if let Some(table) = table {
            for timed in &both {
                let foretold = table.predict_ms(timed.model.config().blocks())?;
                cells.extend([
                    format!("{foretold:.1}"),
                    format!("{:+.1}%", 100.0 * (foretold / timed.least() - 1.0)),
                ]);
            }
        }
        line(name, what, &cells);
    }
    Ok(())
}

fn bench(args: &Args) -> Result<()> {
    if args.heads < 2 || args.blocks < 2 {
        return Err(Error::argument(
            "heads, blocks",
            args.heads.min(args.blocks),
            "at least 2",
        ));
    }
    let config = config(args)?;
    let mut net = net(args, &config)?;
    let full = net.eval_model();
    let mut small = Vec::new();
    for change in &args.changes {
        net.activate(&subnet(&net, *change))?;
        let name = change
            .to_possible_value()
            .map_or(String::new(), |value| value.get_name().to_string());
        small.push((name, Merger::new().extract(&net, &[], &Silent)?.model));
    }
    net.activate(&net.maximal())?;
    let threads = std::thread::available_parallelism().map_or(0, usize::from);
    common::say!(
        "{} million parameters, {} prompt, {} context, {} turns, {threads} threads; ms, least and median; then the ratios of times \
         (full / extracted, by least and by median), of costs, and their quotients",
        SubnetCost::of_config(&config).params / 1_000_000,
        args.prompt,
        args.context,
        args.turns
    );
    let mut head: Vec<&str> = vec![
        "full", "small", "full", "small", "least", "median", "cost", "least", "median",
    ];
    if args.foretell {
        head.extend(["full", "off", "small", "off"]);
    }
    for weights in &args.weights {
        let dtype = weights.dtype();
        let full = full.clone().with_weight_dtype(dtype)?;
        let told = if args.foretell {
            // Of the same storage: the widths' sizes are those of the space, the model's own weights play no part.
            let stored = SuperNet::new(full.clone(), net.space().clone(), net.config().clone())?;
            let table = |phase, repeats| LatencyTable::measure(&stored, phase, repeats, &Silent);
            Some(Foretold {
                prefill: table(
                    Phase::Prefill {
                        n_tokens: args.prompt,
                    },
                    3,
                )?,
                decode: table(
                    Phase::Decode {
                        context: args.context,
                    },
                    10,
                )?,
            })
        } else {
            None
        };
        line(
            &format!("{weights:?}").to_lowercase(),
            "",
            &head.iter().map(ToString::to_string).collect::<Vec<_>>(),
        );
        for (name, small) in &small {
            let small = small.clone().with_weight_dtype(dtype)?;
            compare(args, name, dtype, &full, &small, told.as_ref())?;
        }
    }
    Ok(())
}

fn main() {
    let args: Args = common::parse();
    // `cargo test --all-targets` runs benches too; there it is enough that they build.
    if args.bench {
        common::exit_on_error(bench(&args));
    } else {
        common::say!("nothing is measured without --bench, which `cargo bench` passes");
    }
}
