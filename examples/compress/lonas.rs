//! Methods with elastic widths, heads and depth (LoNAS), whose results are smaller models.

use elastic_lora::arch::SubBlock;
use elastic_lora::calib::{InfluenceMeasure, block_influence, sort_channels};
use elastic_lora::eval::{Phase, mean_loss, measure_ms};
use elastic_lora::io::atomic;
use elastic_lora::merge::MergeMode;
use elastic_lora::model::{Decoder, Pretrained};
use elastic_lora::progress::Progress;
use elastic_lora::space::{Elastic, Group};
use elastic_lora::train::{Distillation, Sampling, TrainConfig};
use elastic_lora::{Error, Merger, Result, SearchSpace, SubnetConfig, SuperNet};

use crate::pipeline::Run;
use crate::report::Row;
use crate::{Args, Subnets, common};

/// Number of timed runs, of which the shortest is the time of a model.
const REPEATS: usize = 15;

/// Names of the subnets in table 1 of the paper.
const HEURISTIC: &str = "LoNAS, heuristic";
const BEST: &str = "LoNAS, searched: best";
const TARGET: &str = "LoNAS, searched: for the target";
const SMALLEST: &str = "LoNAS, searched: smallest within 1 %";

/// Returns the search space: the given ranks and, for each block, the width of the MLP and, if
/// requested, the number of heads.
pub fn lonas_space(args: &Args, model: &Decoder, ranks: SearchSpace) -> Result<SearchSpace> {
    let mut space = ranks;
    for (block, dims) in model.config().blocks().iter().enumerate() {
        let layers: Vec<_> = model
            .layer_shapes()
            .into_iter()
            .filter(|l| l.name.starts_with(&format!("model.layers.{block}.")))
            .collect();
        let mut widen = |names: &[&str], choices: Vec<usize>| -> Result<()> {
            if choices.len() > 1 {
                let groups =
                    SearchSpace::groups_by_block(Elastic::Width, &layers, &[names], &choices)?;
                space = space.clone().with_groups(groups)?;
            }
            Ok(())
        };
        if dims.has_mlp() {
            widen(
                &["gate_proj", "up_proj"],
                choices(&args.widths, dims.d_mlp, args.multiple),
            )?;
        }
        if dims.has_attention() {
            let step = dims.n_heads / dims.n_kv_heads * model.config().head_dim();
            widen(
                &["q_proj", "k_proj", "v_proj"],
                choices(&args.heads, dims.n_heads * model.config().head_dim(), step),
            )?;
        }
    }
    Ok(space)
}

/// Returns the given shares of `full`, each rounded to a multiple of `step` (except `full` itself),
/// at least one step.
fn choices(shares: &[f64], full: usize, step: usize) -> Vec<usize> {
    let size = |share: &f64| {
        if *share >= 1.0 {
            return full;
        }
        ((share * full as f64 / step as f64).round() as usize * step).clamp(step.min(full), full)
    };
    let mut sizes: Vec<usize> = shares.iter().map(size).collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes.dedup();
    sizes
}

/// Returns the group of the sub-blocks that a subnet may drop: the least influential ones, after
/// all that always stay.
fn depth_group(
    args: &Args,
    model: &Decoder,
    samples: &[Vec<u32>],
    progress: &dyn Progress,
) -> Result<Option<Group>> {
    if args.depth == 0 {
        return Ok(None);
    }
    let ranked = block_influence(model, samples, InfluenceMeasure::Loss, progress)?;
    // Attention and MLP sub-blocks are ranked separately; a whole block is dropped if both are.
    let units: Vec<String> = ranked
        .into_iter()
        .map(|unit| unit.name)
        .filter(|name| SubBlock::parse(name).is_some_and(|(_, units)| units.len() == 1))
        .collect();
    let least = units.len().saturating_sub(args.depth);
    if least == 0 {
        return Err(Error::argument(
            "depth",
            args.depth,
            format!("under the model's {} parts", units.len()),
        ));
    }
    let choices = (least..=units.len()).collect();
    Group::of_kind(Elastic::Depth, "depth", units, choices).map(Some)
}

/// Describes the shape of a subnet: run-length coded sizes of its blocks.
fn shape(net: &SuperNet, subnet: &SubnetConfig) -> Result<String> {
    let blocks = net.block_dims(subnet)?;
    let runs = |sizes: Vec<usize>| {
        let runs = sizes.chunk_by(|a, b| a == b).map(|run| match run.len() {
            1 => run[0].to_string(),
            n => format!("{}x{n}", run[0]),
        });
        runs.collect::<Vec<_>>().join(" ")
    };
    let mut text = format!(
        "mlp {}",
        runs(blocks.iter().map(|block| block.d_mlp).collect())
    );
    let heads: Vec<usize> = blocks.iter().map(|block| block.n_heads).collect();
    if heads
        .iter()
        .any(|n| *n != net.model().config().num_attention_heads())
    {
        text += &format!(", heads {}", runs(heads));
    }
    Ok(text)
}

/// Times in milliseconds: of the whole context as one prompt, and of one token after half of the
/// context.
struct Times {
    prefill: f64,
    decode: f64,
}

impl Times {
    fn of(model: &Decoder) -> Result<Self> {
        let context = model.config().max_position_embeddings().min(256);
        Ok(Self {
            prefill: measure_ms(model, Phase::Prefill { n_tokens: context }, REPEATS)?,
            decode: measure_ms(
                model,
                Phase::Decode {
                    context: context / 2,
                },
                REPEATS,
            )?,
        })
    }
}

impl Run<'_> {
    /// Fills a row of table 1: an extracted model compared with the full one.
    fn table_1_row(
        &mut self,
        name: &str,
        model: &Decoder,
        shape: Option<String>,
        full: &Times,
    ) -> Result<()> {
        self.row(name, model, None)?;
        let times = Times::of(model)?;
        let score = |row: &Row| row.accuracy.or(row.loss.map(|loss| (-loss).exp()));
        let lora = self
            .report
            .rows
            .iter()
            .find(|row| row.name == LORA)
            .and_then(score);
        if let Some(row) = self.report.rows.last_mut() {
            row.relative = lora.zip(score(row)).map(|(lora, score)| score / lora);
            row.prefill_speedup = Some(full.prefill / times.prefill);
            row.decode_speedup = Some(full.decode / times.decode);
            row.shape = shape;
        }
        Ok(())
    }

    /// Runs LoRA, the heuristic subnet and two searched subnets, each as a plain model.
    pub fn lonas(&mut self, base: &Decoder, ranks: &SearchSpace) -> Result<()> {
        let args = self.args;
        let merger = Merger::new().with_mode(MergeMode::Dense);
        let (full, lora_score) = if args.elastic_only {
            (Times::of(base)?, None)
        } else {
            let layers: Vec<_> = base
                .layer_shapes()
                .into_iter()
                .filter(|l| ranks.group_of_layer(&l.name).is_some())
                .collect();
            let mut lora =
                self.supernet(base, SearchSpace::fixed(&layers, ranks.max_rank())?, false)?;
            self.train(&mut lora, "lora-dense", Sampling::Fixed)?;
            let lora = merger.extract(&lora, &[], &self.progress)?.model;
            let full = Times::of(&lora)?;
            self.table_1_row(LORA, &lora, None, &full)?;
            (full, Some(self.valid_score(&lora)?))
        };

        let mut sorted = base.clone();
        if let Some(score) = self.settings.order {
            let samples = &self.task.calibration;
            let order = sort_channels(&mut sorted, samples, score, &self.progress)?;
            atomic::write_json(self.out.join("channel_order.json"), &order)?;
        }
        let mut space = lonas_space(args, &sorted, ranks.clone())?;
        let samples = &self.task.calibration;
        if let Some(depth) = depth_group(args, &sorted, samples, &self.progress)? {
            space = space.with_groups([depth])?;
        }
        common::say!("{} subnets in {} groups", space.n_subnets(), space.len());
        let mut net = self.supernet(&sorted, space, false)?;
        for (name, subnet) in [("heuristic", net.heuristic()), ("smallest", net.minimal())] {
            net.activate(&subnet)?;
            common::say!(
                "{name}, untrained: validation loss {:.4}",
                mean_loss(&net.eval_model(), &self.task.valid, &self.progress)?
            );
        }
        net.activate(&net.maximal())?;
        let config = match args.subnets {
            Subnets::Uniform => TrainConfig {
                sampling: Sampling::PerStep,
                ..self.settings.train.clone()
            },
            Subnets::Sandwich => TrainConfig {
                sampling: Sampling::Sandwich { random: 1 },
                distillation: Some(Distillation::default()),
                ..self.settings.train.clone()
            },
        };
        self.train_with(&mut net, "lonas", config)?;

        let (heuristic, largest, smallest) = (net.heuristic(), net.maximal(), net.minimal());
        for (name, subnet) in [
            ("LoNAS, largest", largest),
            ("LoNAS, smallest", smallest),
            (HEURISTIC, heuristic),
        ] {
            self.extracted_row(name, &mut net, &subnet, &merger, None, &full)?;
        }
        let Some(lora_score) = lora_score else {
            return self.write_supernet(&net, "supernet.elora", Vec::new(), None);
        };
        let outcome = self.search(&net, "lonas", true)?;
        // The best subnet is the best by the score that the search optimized. The smallest one is
        // compared with LoRA by the score of the table, which only the subnets of the front get,
        // because accuracy is expensive.
        let best = outcome
            .front()
            .min_by(|a, b| a.score().total_cmp(&b.score()));
        let best = best.map(|best| best.config.clone());
        let mut small: Option<(f64, SubnetConfig)> = None;
        for member in outcome.front() {
            net.activate(&member.config)?;
            let within = self.valid_score(&net.eval_model())? >= 0.99 * lora_score;
            if within && small.as_ref().is_none_or(|(cost, _)| member.cost() < *cost) {
                small = Some((member.cost(), member.config.clone()));
            }
        }
        let small = small.map(|(_, subnet)| subnet);
        net.activate(&net.maximal())?;
        let target = self.meet_target(&mut net, &outcome)?;
        let named = [
            ("best", &best),
            ("smallest-within-1-percent", &small),
            ("target", &target),
        ];
        let named: Vec<_> = named
            .into_iter()
            .filter_map(|(name, found)| Some((name, found.clone()?)))
            .collect();
        self.write_search(&net, "LoNAS", &outcome, named.clone())?;
        self.write_supernet(&net, "supernet.elora", named, Some(&outcome))?;
        let score = self.objective(&net)?.names().score;
        common::say!("best: by the {score}, which the search optimized");
        if let Some(best) = best {
            self.extracted_row(BEST, &mut net, &best, &merger, Some("best"), &full)?;
        }
        if let Some(target) = target {
            self.extracted_row(TARGET, &mut net, &target, &merger, Some("target"), &full)?;
        }
        match small {
            Some(small) => {
                self.extracted_row(SMALLEST, &mut net, &small, &merger, Some("smallest"), &full)
            }
            None => {
                common::say!("no subnet of the front is within 1 % of LoRA on the validation set");
                Ok(())
            }
        }
    }

    /// Extracts a subnet and adds its row. If a folder name is given, writes the model to it and
    /// measures the written model.
    fn extracted_row(
        &mut self,
        name: &str,
        net: &mut SuperNet,
        subnet: &SubnetConfig,
        merger: &Merger,
        folder: Option<&str>,
        full: &Times,
    ) -> Result<()> {
        net.activate(subnet)?;
        let sample = self.sample(2);
        let extracted = merger.extract(net, &sample, &self.progress)?;
        let mut model = extracted.model;
        if let Some(folder) = folder {
            let pretrained = &self.task.pretrained;
            let path = self.out.join(folder);
            pretrained.write_variant(&model, &path, true)?;
            model = Pretrained::open(&path, &pretrained.model.device())?.model;
            common::say!(
                "extracted {folder}: logits differ by at most {:.1e} in f32",
                extracted.report.max_logit_difference.unwrap_or(0.0)
            );
            atomic::write_json(self.out.join(format!("{folder}_subnet.json")), subnet)?;
        }
        let text = shape(net, subnet)?;
        self.table_1_row(name, &model, Some(text), full)?;
        if let Some(folder) = folder {
            self.kept_in(folder);
        }
        Ok(())
    }

    /// Returns the quality of a model on the validation set, where more is better: the accuracy if
    /// there are answers, or else the likelihood of a token.
    fn valid_score(&self, model: &Decoder) -> Result<f64> {
        match &self.task.valid_problems {
            Some(problems) => self.accuracy(problems, model),
            None => Ok((-mean_loss(model, &self.task.valid, &self.progress)?).exp()),
        }
    }
}

/// Name of the row that the others are relative to.
const LORA: &str = "LoRA";
