// Prunes a small language model, trains adapters with several possible ranks, searches for the best
// rank of each, merges the adapters into the pruned weights, and runs the result. To use your own
// model and data, change the two paths.
use burn::tensor::Device;
use elastic_lora::adapter::LoraConfig;
use elastic_lora::calib::{PruneConfig, prune_model};
use elastic_lora::data::{
    Batcher, PromptTemplate, TokenizeOptions, fixed_batches, load_records, tokenize_records,
};
use elastic_lora::eval::{Cost, Metric, SubnetObjective};
use elastic_lora::format::WeightFormat;
use elastic_lora::model::Pretrained;
use elastic_lora::progress::TerminalProgress;
use elastic_lora::runtime::{Model, Session, SessionConfig};
use elastic_lora::search::{NsgaConfig, StudyConfig};
use elastic_lora::sparsity::{Method, Pattern};
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{TrainConfig, Trainer};
use elastic_lora::{Merger, SearchSpace, SuperNet};

fn main() -> elastic_lora::Result<()> {
    let progress = TerminalProgress::new();
    let base = Pretrained::open("assets/arithmetic-llama", &Device::flex())?;
    let records = load_records("assets/arithmetic-problems.jsonl")?;

    // Tokenize: the last tenth of the records is for validation. The rest is for training, and 64
    // of these sequences also calibrate the pruning.
    let options = TokenizeOptions::new(128);
    let all =
        tokenize_records(&records, PromptTemplate::Auto, &base.tokenizer, &options)?.sequences;
    let (train, valid) = all.split_at(all.len() * 9 / 10);
    let valid = fixed_batches(valid, 32, base.pad_id())?;
    let samples: Vec<Vec<u32>> = train.iter().take(64).map(|s| s.ids.clone()).collect();

    // Prune: set half of the weights to zero.
    let mut model = base.model.clone();
    let half = PruneConfig::new(Method::Wanda, Pattern::Unstructured { ratio: 0.5 });
    prune_model(&mut model, &samples, &half, &progress)?;

    // Supernet: every layer gets an adapter whose rank can be 32, 24 or 16. The adapters are masked
    // by the zeros of the weights, so that merging them keeps every zero.
    let space = SearchSpace::per_layer(&model.layer_shapes(), &[32, 24, 16])?;
    let adapters = SuperNetConfig::new(LoraConfig::new(32)).with_sparse_peft(true);
    let mut net = SuperNet::new(model, space, adapters)?;

    // Train: each step trains one random choice of ranks, so that all choices are trained at once.
    let mut batches = Batcher::new(train.to_vec(), 16, base.pad_id(), 0)?;
    let config = TrainConfig::new(150).with_lr(2e-3);
    Trainer::new(config)?.run(&mut net, &mut batches, &valid, &progress)?;

    // Search: find the choices with the best validation loss for their cost.
    let objective = SubnetObjective::new(&net, Metric::Loss(&valid), Cost::Macs);
    let mut searcher = NsgaConfig::new().with_population(8).init(net.space())?;
    let evaluate = |subnet: &_| objective.evaluate(subnet, &progress);
    let mut study = StudyConfig::new(24).init(net.space())?;
    let outcome = study.run(&mut searcher, evaluate, &progress)?;
    for found in outcome.front() {
        let (loss, macs) = (found.score(), found.cost());
        println!("loss {loss:.4} at {macs} MACs per token");
    }

    // Merge: add the best subnet to the weights, and write the result as a Hugging Face folder.
    if let Some(best) = outcome.best_score() {
        net.activate(&best.config)?;
    }
    let merged = Merger::new().merge(&net, &samples[..1], &progress)?;
    println!("{} zeros lost", merged.report.zeros_lost);
    base.write_variant(&merged.model, "target/quickstart", true)?;

    // Run: the weights are stored in a sparse format, in which each zero takes one bit.
    let model = Model::from_decoder(&merged.model, WeightFormat::SparseF16)?;
    let question = "Question: Ida buys 7 boxes of 6 eggs. Tom adds 5 more. How many eggs are there in total?\nAnswer:";
    let prompt = base.tokenizer.encode_prompt(question)?;
    let config = base.generate_config(40);
    let answer =
        Session::new(&model, &SessionConfig::default())?.generate(&prompt, &config, |_| true)?;
    println!("{question}{}", base.tokenizer.decode(&answer)?);
    Ok(())
}
