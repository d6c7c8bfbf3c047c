//! Long work: each kind reports its steps, stops at once on request, and prints nothing by itself.

use std::process::Command;

use crate::common::{Heard, random_ids, tiny, weight_bits};
use elastic_lora::adapter::LoraConfig;
use elastic_lora::calib::{
    ChannelScore, InfluenceMeasure, PruneConfig, QuantizeConfig, QuantizeMethod, block_influence,
    prune_model, quantize_model, sort_channels,
};
use elastic_lora::data::{Batch, Batcher, Sequence, fixed_batches};
use elastic_lora::eval::{
    Cost, LatencyTable, Metric, Phase, SubnetObjective, mean_loss, perplexity,
};
use elastic_lora::model::generate_batch;
use elastic_lora::progress::{Progress, Silent};
use elastic_lora::quant::GridConfig;
use elastic_lora::runtime::GenerateConfig;
use elastic_lora::search::{RandomSearchConfig, StudyConfig};
use elastic_lora::sparsity::{Method, OwlConfig, Pattern};
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{TrainConfig, Trainer};
use elastic_lora::{Error, Merger, Result, SearchSpace, SuperNet};

fn samples() -> Vec<Vec<u32>> {
    (0..4).map(|seed| random_ids(11, 41, seed)).collect()
}

fn batches() -> Vec<Batch> {
    let sequences: Vec<_> = samples().into_iter().map(Sequence::unmasked).collect();
    fixed_batches(&sequences, 2, 0).unwrap()
}

fn net() -> SuperNet {
    let model = tiny(false, 4);
    let space = SearchSpace::per_layer(&model.layer_shapes(), &[5, 3, 2]).unwrap();
    SuperNet::new(model, space, SuperNetConfig::new(LoraConfig::new(5))).unwrap()
}

/// A kind of long work, its minimum number of steps, and the tasks in which it may be interrupted.
type Work = (
    &'static str,
    usize,
    &'static [&'static str],
    fn(&dyn Progress) -> Result<()>,
);

const WORK: [Work; 13] = [
    ("pruning", 14, &["prune", "find outliers"], |progress| {
        let pattern = Pattern::Unstructured { ratio: 0.5 };
        let config = PruneConfig::new(Method::Wanda, pattern).with_owl(OwlConfig::default());
        prune_model(&mut tiny(true, 1), &samples(), &config, progress).map(drop)
    }),
    ("quantizing", 14, &["quantize"], |progress| {
        let config = QuantizeConfig::new(QuantizeMethod::Gptq, GridConfig::new(4));
        quantize_model(&mut tiny(true, 1), &samples(), &config, progress).map(drop)
    }),
    ("sorting", 2, &["score channels"], |progress| {
        let (mut model, score) = (tiny(true, 1), ChannelScore::Activation);
        let before = weight_bits(&model);
        let result = sort_channels(&mut model, &samples(), score, progress);
        assert_eq!(result.is_err(), weight_bits(&model) == before);
        result.map(drop)
    }),
    ("sorting by gradients", 1, &["score channels"], |progress| {
        sort_channels(
            &mut tiny(true, 1),
            &samples(),
            ChannelScore::Taylor,
            progress,
        )
        .map(drop)
    }),
    ("influence", 2, &["measure influence"], |progress| {
        block_influence(&tiny(true, 1), &samples(), InfluenceMeasure::Loss, progress).map(drop)
    }),
    ("training", 3, &["train", "evaluate"], |progress| {
        let sequences = samples().into_iter().map(Sequence::unmasked).collect();
        let mut data = Batcher::new(sequences, 2, 0, 1)?;
        Trainer::new(TrainConfig::new(3))?
            .run(&mut net(), &mut data, &batches(), progress)
            .map(drop)
    }),
    ("loss", 2, &["evaluate"], |progress| {
        mean_loss(&tiny(true, 1), &batches(), progress).map(drop)
    }),
    ("perplexity", 1, &["perplexity"], |progress| {
        perplexity(&tiny(true, 1), &random_ids(300, 41, 1), 17, progress).map(drop)
    }),
    ("generation", 1, &["generate"], |progress| {
        let config = GenerateConfig::new(9, vec![]);
        generate_batch(&tiny(true, 1), &samples(), &config, progress).map(drop)
    }),
    ("search", 4, &["search", "evaluate"], |progress| {
        let (net, batches) = (net(), batches());
        let objective = SubnetObjective::new(&net, Metric::Loss(&batches), Cost::Macs);
        let mut searcher = RandomSearchConfig::new().init(net.space())?;
        let evaluate = |subnet: &_| objective.evaluate(subnet, progress);
        let mut study = StudyConfig::new(4).init(net.space())?;
        study.run(&mut searcher, evaluate, progress).map(drop)
    }),
    ("parallel search", 4, &["search", "evaluate"], |progress| {
        let (net, batches) = (net(), batches());
        let objective = SubnetObjective::new(&net, Metric::Loss(&batches), Cost::Macs);
        let mut searcher = RandomSearchConfig::new().init(net.space())?;
        let evaluate = |subnet: &_| objective.evaluate(subnet, progress);
        let mut study = StudyConfig::new(4).init(net.space())?;
        study
            .run_parallel(&mut searcher, evaluate, progress)
            .map(drop)
    }),
    ("timing", 3, &["time parts"], |progress| {
        LatencyTable::measure(&net(), Phase::Prefill { n_tokens: 5 }, 1, progress).map(drop)
    }),
    ("merging", 15, &["merge", "compare"], |progress| {
        Merger::new()
            .merge(&net(), &samples()[..1], progress)
            .map(drop)
    }),
];

#[test]
fn every_kind_of_work_stops_where_it_is_told_to() {
    for (name, least, tasks, work) in WORK {
        let heard = Heard::default();
        work(&heard).unwrap();
        assert!(heard.steps().len() >= least, "{name}: {:?}", heard.steps());
        let last = heard.steps().pop().unwrap();
        assert_eq!(last.1, last.2, "{name}");
        assert!(heard.asked() > least, "{name}");
        for n in 0..heard.asked() {
            let stopping = Heard::stopping_at(n);
            match work(&stopping) {
                Err(Error::Interrupted { task }) => {
                    assert!(tasks.contains(&task.as_str()), "{name}: {task}");
                }
                other => panic!("{name}, {n}: {other:?}"),
            }
            // No more checks, except by threads that are already running.
            if name != "parallel search" {
                assert_eq!(stopping.asked(), n + 1, "{name}");
            }
        }
    }
}

#[test]
#[ignore = "run by the test below, in a process of its own"]
fn silent_work() {
    for (_, _, _, work) in WORK {
        work(&Silent).unwrap();
    }
}

#[test]
fn nothing_is_printed_unasked() {
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "progress::silent_work",
            "--nocapture",
        ])
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&child.stdout),
        String::from_utf8_lossy(&child.stderr),
    );
    assert!(child.status.success(), "{stderr}");
    assert_eq!(stderr, "");
    // The lines that the test itself prints.
    let ours =
        |line: &str| line.is_empty() || line.starts_with("running 1") || line.starts_with("test ");
    assert!(stdout.lines().all(ours), "{stdout}");
}
