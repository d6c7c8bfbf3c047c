//! Writes a checkpoint of random weights of any size, to measure what large models need before one
//! is at hand.
//!
//! ```text
//! cargo run --release --example random_model -- --out random-7b
//! ```
//!
//! By default the sizes are those of LLaMA 7B (13.5 GB). The weights are drawn and written one
//! tensor at a time; the same seed gives the same files.

use std::path::PathBuf;

use clap::Parser;
use elastic_lora::io::hf::{HfFolder, LlamaDims};
use elastic_lora::io::{DType, HfConfig, HostTensor};
use elastic_lora::{Error, Result};
use half::bf16;

/// Writes a model folder of random weights in bf16.
#[derive(Parser)]
struct Args {
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// A folder or GGUF file whose sizes the model has; by default those of LLaMA 7B
    #[arg(long)]
    like: Option<PathBuf>,
    /// Number of blocks, if it is another
    #[arg(long)]
    blocks: Option<usize>,
    /// Fraction of the weights of the blocks that are zero
    #[arg(long, default_value_t = 0.0)]
    sparsity: f64,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Size in bytes above which weights are split into several files
    #[arg(long, default_value_t = 5_000_000_000)]
    shard_bytes: u64,
    /// Replace what is at --out
    #[arg(long)]
    overwrite: bool,
}

/// A generator that gives a number in a nanosecond: SplitMix64 (Steele, Lea, Flood 2014).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Draws `n` weights around 0 with a standard deviation of 0.02, as bytes of bf16. A share of
/// `zeros` in 2^16 is zero.
fn weights(n: usize, seed: u64, zeros: u64) -> Vec<u8> {
    // The sum of four numbers of 12 bits, whose standard deviation is 2365.
    let scale = 0.02 / 2365.0;
    let mut numbers = Numbers(seed);
    let mut bytes = Vec::with_capacity(2 * n);
    for _ in 0..n {
        let x = numbers.next();
        let sum: i32 = (0..4).map(|i| (x >> (12 * i) & 0xfff) as i32).sum();
        let kept = x >> 48 >= zeros;
        let value = if kept {
            (sum - 8190) as f32 * scale
        } else {
            0.0
        };
        bytes.extend_from_slice(&bf16::from_f32(value).to_le_bytes());
    }
    bytes
}

fn run(args: &Args) -> Result<()> {
    if !(0.0..1.0).contains(&args.sparsity) {
        return Err(Error::InvalidArgument {
            name: "--sparsity",
            found: args.sparsity.to_string(),
            expected: "a number from 0 to below 1".into(),
        });
    }
    let config = match &args.like {
        Some(like) => HfConfig::open(like)?,
        None => HfConfig::new_llama(&LlamaDims {
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            max_position_embeddings: 4096,
            rope_theta: 1e4,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: false,
            bos_token_id: Some(1),
            eos_token_id: Some(2),
            pad_token_id: None,
            dtype: DType::BF16,
        })?,
    };
    let config = match args.blocks {
        None => config,
        Some(n) => {
            let blocks: Vec<_> = config.blocks().iter().copied().cycle().take(n).collect();
            config.with_blocks(&blocks)?
        }
    };
    let zeros = (args.sparsity * 65536.0) as u64;
    let tensors = config.arch().tensors().into_iter().enumerate();
    let tensors = tensors.map(|(index, (name, shape))| {
        let n: usize = shape.iter().product();
        let seed = args.seed ^ (index as u64 + 1) << 40;
        // Gains of norms are 1, and embedding and head have no zeros.
        let (gains, in_block) = (shape.len() == 1, name.contains(".layers."));
        HostTensor::lazy_bytes(name, DType::BF16, shape, move || match gains {
            true => Ok(bf16::ONE.to_le_bytes().repeat(n)),
            false => Ok(weights(n, seed, if in_block { zeros } else { 0 })),
        })
    });
    let tensors: Vec<HostTensor<'_>> = tensors.collect();
    let folder = HfFolder::create(&args.out, args.overwrite)?;
    let folder = folder.with_max_shard_bytes(args.shard_bytes);
    folder.write_model(&config, DType::BF16, tensors)?;
    if let Some(like) = &args.like {
        folder.carry_over(like)?;
    }
    folder.commit()?;
    eprintln!("{} is written", args.out.display());
    Ok(())
}

fn main() {
    let args = Args::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        std::process::exit(i32::from(error.use_stderr()))
    });
    if let Err(error) = run(&args) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
