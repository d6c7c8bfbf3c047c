//! Trains the small model in `assets/`: a Llama of about a million weights, trained on arithmetic
//! word problems.
//!
//! The text is generated from a seed, so every run produces the same model. The kinds of problem
//! that `compress` fine-tunes on are rare in it.

#[path = "common/bpe.rs"]
mod bpe;
#[path = "common/mod.rs"]
mod common;

use std::path::PathBuf;

use bpe::{bpe_tokenizer_config, train_bpe};
use burn::tensor::Device;
use clap::Parser;
use common::arithmetic::{self, Kind, Split};
use elastic_lora::data::{
    Batcher, PromptTemplate, Record, TextTokenizer, TokenizeOptions, fixed_batches,
    tokenize_records,
};
use elastic_lora::eval::ProblemSet;
use elastic_lora::io::DType;
use elastic_lora::io::hf::{HfConfig, HfFolder, LlamaDims};
use elastic_lora::model::Decoder;
use elastic_lora::runtime::GenerateConfig;
use elastic_lora::train::{Sampling, TrainConfig, Trainer};
use elastic_lora::{Result, SuperNet};

/// Train a small Llama on generated arithmetic word problems and write it as a Hugging Face folder.
#[derive(Parser)]
struct Args {
    /// Folder for the model, which must not exist unless --overwrite is given
    #[arg(long, default_value = "arithmetic-llama")]
    out: PathBuf,
    /// Replace the folder if it exists
    #[arg(long)]
    overwrite: bool,
    /// Optimizer steps
    #[arg(long, default_value_t = 4000)]
    steps: usize,
    /// Number of problems per step
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Peak learning rate
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Number of blocks
    #[arg(long, default_value_t = 5)]
    layers: usize,
    /// Width of the residual stream; the MLP is 3 times as wide
    #[arg(long, default_value_t = 128)]
    hidden: usize,
    /// Number of problems generated for training
    #[arg(long, default_value_t = 200_000)]
    problems: usize,
    /// Random seed of data, weights and order
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder for checkpoints; training continues from the last one
    #[arg(long)]
    work: Option<PathBuf>,
}

/// Kinds of problem in the training text, with their weights. The last three are rare, and the
/// kinds that are not listed do not occur at all; they are left for fine-tuning.
const MIXTURE: [(Kind, f64); 9] = [
    (Kind::Sum, 0.20),
    (Kind::Difference, 0.14),
    (Kind::Compare, 0.10),
    (Kind::Product, 0.20),
    (Kind::Share, 0.10),
    (Kind::AddSub, 0.20),
    (Kind::MulAdd, 0.002),
    (Kind::MulSub, 0.002),
    (Kind::Times, 0.002),
];

/// Context length of the model, in tokens.
const CONTEXT: usize = 128;

fn records(problems: Vec<arithmetic::Problem>) -> Vec<Record> {
    problems
        .into_iter()
        .map(arithmetic::Problem::into_record)
        .collect()
}

fn run(args: &Args) -> Result<()> {
    // Check that the folder can be written before training, not after it.
    drop(HfFolder::create(&args.out, args.overwrite)?);
    let device = Device::flex();
    let train = records(arithmetic::mixture(
        &MIXTURE,
        Split::Train,
        args.problems,
        args.seed,
    )?);
    let template = PromptTemplate::QuestionAnswer;
    let texts: Vec<String> = train
        .iter()
        .map(|record| template.render(record))
        .map(|example| example.prompt + &example.completion)
        .collect();
    let tokenizer_json = train_bpe(&texts[..texts.len().min(20_000)], 512)?;
    let tokenizer = TextTokenizer::from_json(&tokenizer_json, "tokenizer.json")?;
    let (bos, eos) = (tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>"));
    let pad = tokenizer.token_to_id("<pad>");
    let tokenizer = tokenizer.with_special_ids(bos, eos);
    let pad_id = pad.unwrap_or(0);

    // For most problems, only the tokens of the answer count in the loss. The others teach the
    // language of the questions.
    let (language, solve) = train.split_at(train.len() / 4);
    let options = TokenizeOptions::new(CONTEXT);
    let mut sequences = tokenize_records(
        language,
        template,
        &tokenizer,
        &options.with_mask_prompt(false),
    )?
    .sequences;
    sequences.extend(tokenize_records(solve, template, &tokenizer, &options)?.sequences);
    let valid = records(arithmetic::mixture(&MIXTURE, Split::Valid, 512, args.seed)?);
    let valid = tokenize_records(&valid, template, &tokenizer, &options)?.sequences;
    let valid = fixed_batches(&valid, 64, pad_id)?;

    let config = HfConfig::new_llama(&LlamaDims {
        // A multiple of 64, because some formats pack outputs in groups of 64.
        vocab_size: tokenizer.vocab_size().next_multiple_of(64),
        hidden_size: args.hidden,
        intermediate_size: 3 * args.hidden,
        num_hidden_layers: args.layers,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        max_position_embeddings: CONTEXT,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        bos_token_id: bos,
        eos_token_id: eos,
        pad_token_id: pad,
        dtype: DType::F16,
    })?;
    let model = Decoder::init(&config, args.seed, &device)?;
    common::say!(
        "{} weights, vocabulary {}",
        model.count_base_params().total,
        tokenizer.vocab_size()
    );
    let mut net = SuperNet::dense(model)?;

    let progress = common::progress();
    let mut train_config = TrainConfig::new(args.steps);
    train_config.lr = args.lr;
    train_config.warmup = (args.steps / 20).min(200);
    train_config.weight_decay = 0.05;
    train_config.betas = (0.9, 0.98);
    train_config.sampling = Sampling::Fixed;
    train_config.seed = args.seed;
    train_config.eval_every = (args.steps / 20).max(1);
    train_config.checkpoint_every = (args.steps / 20).max(1);
    let mut trainer = Trainer::new(train_config)?.with_label("pretrain");
    if let Some(work) = &args.work {
        trainer = trainer.with_folder(work).with_resume(true);
    }
    let mut batcher = Batcher::new(sequences, args.batch, pad_id, args.seed)?;
    let report = trainer.run(&mut net, &mut batcher, &valid, &progress)?;
    common::say!(
        "{} steps in {:.0} s, {:.0} tokens/s, validation loss {:.4}",
        report.steps_done,
        report.seconds,
        report.tokens_per_second,
        report.valid_loss().unwrap_or(f64::NAN)
    );

    let model = net.into_model();
    let generate = GenerateConfig::new(40, eos.into_iter().collect());
    for kind in Kind::ALL {
        let test = records(arithmetic::problems(kind, Split::Test, 300, args.seed)?);
        let result = ProblemSet::new(&test, template, &tokenizer)?
            .exact_match(&model, &tokenizer, &generate, &progress)?;
        common::say!(
            "{:>12}: {:5.1} %",
            kind.to_string(),
            100.0 * result.accuracy()
        );
    }

    let folder = HfFolder::create(&args.out, args.overwrite)?;
    folder.write_model(&config, DType::F16, model.tensors(DType::F16)?)?;
    folder.write_text("tokenizer.json", &tokenizer_json)?;
    folder.write_text("tokenizer_config.json", &bpe_tokenizer_config(CONTEXT))?;
    folder.commit()?;
    common::say!("wrote {}", args.out.display());
    Ok(())
}

fn main() {
    common::exit_on_error(run(&common::parse()));
}
