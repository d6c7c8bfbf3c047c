//! The pipeline: prune, train, search, merge, and report.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use elastic_lora::calib::{PruneConfig, prune_model_keeping};
use elastic_lora::eval::{Cost, Metric, ProblemSet, SubnetObjective, mean_loss};
use elastic_lora::format::WeightFormat;
use elastic_lora::io::peft::PeftOptions;
use elastic_lora::io::{DType, atomic};
use elastic_lora::model::{Decoder, Pretrained};
use elastic_lora::progress::{Progress, Task as Work, TerminalProgress};
use elastic_lora::runtime::{FormatPlan, GenerateConfig, Model};
use elastic_lora::search::{
    Evaluation, Heuristic, HillClimbingConfig, NsgaConfig, RandomSearchConfig, SearchOutcome,
    SearchReport, SensitivityConfig, StudyConfig,
};
use elastic_lora::sparsity::{self, Pattern};
use elastic_lora::supernet::{SuperNetConfig, stored_bytes};
use elastic_lora::train::{Sampling, TrainConfig, TrainReport, Trainer};
use elastic_lora::{Error, Merger, Result, SearchSpace, Searcher, SubnetConfig, SuperNet};
use serde_json::Value;

use crate::report::{Report, Row};
use crate::settings::{BLOCKS, MEASURED, Settings, lora_config};
use crate::target::Target;
use crate::task::{Task, fingerprint};
use crate::{Args, Init, Method, Search, SearchMetric, common};

pub struct Run<'a> {
    pub args: &'a Args,
    pub settings: &'a Settings,
    pub task: &'a Task,
    pub out: PathBuf,
    pub progress: TerminalProgress,
    pub report: Report,
    /// Loss and accuracy of the rows, by number and name. They are in a file until the run is over,
    /// so that `--resume` need not measure them again.
    measured: BTreeMap<String, (f64, Option<f64>)>,
}

pub fn run(args: &Args, settings: &Settings, task: &Task) -> Result<()> {
    let space = search_space(args, &task.pretrained.model)?;
    // Built once for its checks, so that errors in the adapters' settings are found before
    // training.
    fresh_supernet(args, &task.pretrained.model, space.clone(), false)?;
    if args.method.is_sqft() {
        settings.check_format(args, task.pretrained.model.config())?;
    }
    let mut identity = task.fingerprints();
    let text = space.to_json()?;
    identity.insert(
        "search space".into(),
        Value::String(fingerprint(text.bytes().map(u32::from))),
    );
    let claim = settings.prepare_out(args, identity)?;
    let result = steps(args, settings, task, &space);
    match &result {
        Err(Error::Interrupted { .. }) => {
            eprintln!("the same command with --resume goes on from here")
        }
        Err(_) => settings.discard_unless_resumable(claim),
        Ok(()) => {}
    }
    result
}

fn steps(args: &Args, settings: &Settings, task: &Task, space: &SearchSpace) -> Result<()> {
    let started = Instant::now();
    let command = std::env::args().collect::<Vec<_>>().join(" ");
    let mut run = Run {
        args,
        settings,
        task,
        out: settings.out.clone(),
        progress: common::progress(),
        report: Report::new(command, args.seed),
        measured: BTreeMap::new(),
    };
    let measured = run.out.join(MEASURED);
    if args.resume && measured.is_file() {
        let text = std::fs::read_to_string(&measured).map_err(|e| Error::io(&measured, e))?;
        run.measured = serde_json::from_str(&text).map_err(|e| Error::json(&measured, e))?;
    }

    eprintln!("{}", task.calibration_said);
    let base = task.pretrained.model.clone();
    run.row("base", &base, None)?;
    match args.method {
        Method::Lonas => run.lonas(&base, space)?,
        method if method.is_sqft() => run.table_2(&base, space)?,
        _ => pruned_methods(&mut run, &base, space)?,
    }
    run.report.write(run.out.join("report.json"))?;
    let blocks = run.blocks();
    if blocks.is_dir() {
        std::fs::remove_dir_all(&blocks).map_err(|e| Error::io(&blocks, e))?;
    }
    if measured.is_file() {
        std::fs::remove_file(&measured).map_err(|e| Error::io(&measured, e))?;
    }
    common::say!("\n{}", run.report);
    common::say!(
        "results in {} ({:.0} s)",
        run.out.display(),
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Runs the methods that start from a pruned model.
fn pruned_methods(run: &mut Run<'_>, base: &Decoder, space: &SearchSpace) -> Result<()> {
    let args = run.args;
    let pruned = run.pruned(base)?;
    common::say!("{} subnets in {} groups", space.n_subnets(), space.len());
    if args.method.includes(Method::Lora) {
        run.lora(&pruned, space)?;
    }
    if args.method.includes(Method::Shears) {
        run.shears(&pruned, space)?;
    }
    if args.method.includes(Method::SparsePeft) {
        run.sparse_peft(&pruned, space)?;
    }
    Ok(())
}

fn search_space(args: &Args, model: &Decoder) -> Result<SearchSpace> {
    let layers = model.layer_shapes();
    let space = match &args.space {
        Some(file) => SearchSpace::from_file(file, &layers)?,
        None => {
            let groups: Vec<Vec<&str>> = args
                .groups
                .split(';')
                .map(|group| {
                    group
                        .split(',')
                        .map(str::trim)
                        .filter(|name| !name.is_empty())
                        .collect()
                })
                .collect();
            SearchSpace::grouped(&layers, &groups, &args.ranks)?
        }
    };
    // A rank larger than the smaller side of a matrix adds nothing.
    for layer in &layers {
        let Some(group) = space.group_of_layer(&layer.name) else {
            continue;
        };
        let (found, max) = (group.choices()[0], layer.d_input.min(layer.d_output));
        if found > max {
            return Err(Error::InvalidRank {
                layer: layer.name.clone(),
                found,
                max,
            });
        }
    }
    Ok(space)
}

fn fresh_supernet(
    args: &Args,
    model: &Decoder,
    space: SearchSpace,
    masked: bool,
) -> Result<SuperNet> {
    let max_rank = space.max_rank();
    let config = SuperNetConfig::new(lora_config(args, max_rank))
        .with_sparse_peft(masked)
        .with_seed(args.seed);
    SuperNet::new(model.clone(), space, config)
}

/// Returns the settings for generating answers.
fn generate_config(task: &Task) -> GenerateConfig {
    task.pretrained.generate_config(task.max_new_tokens)
}

/// Converts a fraction to a percentage, rounded to at most one decimal.
fn percent(share: f64) -> f64 {
    (1000.0 * share).round() / 10.0
}

impl Run<'_> {
    /// Stops an interrupted run between two steps that report no progress. Each takes seconds for a
    /// model of half a billion weights.
    pub fn check(&self, task: &str) -> Result<()> {
        match self.progress.is_interrupted() {
            true => Err(Error::Interrupted { task: task.into() }),
            false => Ok(()),
        }
    }

    /// Prunes a model, adds its row and writes it.
    pub fn pruned(&mut self, base: &Decoder) -> Result<Decoder> {
        let pruned = self.pruned_by(base, self.args.prune)?;
        let name = match self.settings.pattern {
            Pattern::Unstructured { ratio } | Pattern::Layer { ratio } => {
                format!("pruned to {} %", percent(ratio))
            }
            pattern => format!("pruned to {pattern}"),
        };
        self.row(&name, &pruned, None)?;
        self.kept_in("pruned");
        let folder = self.out.join("pruned");
        self.task.pretrained.write_variant(&pruned, folder, true)?;
        Ok(pruned)
    }

    /// Names the folder or file, within that of the run, that holds the model of the last row.
    pub fn kept_in(&mut self, folder: impl Into<String>) {
        if let Some(row) = self.report.rows.last_mut() {
            row.folder = Some(folder.into());
        }
    }

    /// Returns the formats in which the runtime stores a model with this fraction of zeros in its
    /// layers: sparse where that is smaller, in the 16-bit type of the checkpoint. Codes are stored
    /// as codes.
    fn plan(&self, sparsity: f64) -> FormatPlan {
        // A sparse format has one bit for each weight.
        let sparse = sparsity > 1.0 / 16.0 + 0.05;
        FormatPlan::new(match (self.task.pretrained.dtype, sparse) {
            (DType::BF16, true) => WeightFormat::SparseBf16,
            (DType::BF16, false) => WeightFormat::Bf16,
            (_, true) => WeightFormat::SparseF16,
            (DType::F16, false) => WeightFormat::F16,
            (_, false) => WeightFormat::F32,
        })
    }

    /// Writes a supernet as a bundle, with named subnets among which a program can switch.
    pub fn write_supernet(
        &self,
        net: &SuperNet,
        file: &str,
        named: Vec<(&str, SubnetConfig)>,
        front: Option<&SearchOutcome>,
    ) -> Result<()> {
        let mut subnets: Vec<(String, SubnetConfig)> = [
            ("largest", net.maximal()),
            ("heuristic", net.heuristic()),
            ("smallest", net.minimal()),
        ]
        .into_iter()
        .chain(named)
        .map(|(name, subnet)| (name.to_string(), subnet))
        .collect();
        let members: Vec<&Evaluation> = front.into_iter().flat_map(SearchOutcome::front).collect();
        let found = spaced(&members, self.args.front);
        let members = found.iter().enumerate();
        subnets.extend(members.map(|(at, one)| (format!("front-{}", at + 1), one.config.clone())));
        let plan = self.plan(self.share_of_zeros(net.model())?);
        let model = Model::from_supernet(net, &subnets, plan)?;
        self.check("write a bundle")?;
        model
            .with_tokenizer(&self.task.pretrained.folder)?
            .save(self.out.join(file), true)?;
        let names: Vec<&str> = subnets.iter().map(|(name, _)| name.as_str()).collect();
        common::say!("{file}: {} subnets: {}", names.len(), names.join(", "));
        Ok(())
    }

    /// Merges the largest, the heuristic and the smallest subnet, and writes them as one bundle,
    /// among which a program can switch. The updates of these methods go through a mask or a grid,
    /// so that no pair of factors expresses them.
    pub fn write_merged(&self, net: &SuperNet, file: &str) -> Result<()> {
        let subnets = [
            ("largest", net.maximal()),
            ("heuristic", net.heuristic()),
            ("smallest", net.minimal()),
        ]
        .map(|(name, subnet)| (name.to_string(), subnet));
        let plan = self.plan(self.share_of_zeros(net.model())?);
        Merger::new()
            .merge_subnets(net, &subnets, plan, &self.progress)?
            .with_tokenizer(&self.task.pretrained.folder)?
            .save(self.out.join(file), true)?;
        common::say!("{file}: merged subnets: largest, heuristic, smallest");
        Ok(())
    }

    /// Creates a supernet whose adapters begin as asked for, except for [`Init::Error`].
    pub fn supernet(&self, model: &Decoder, space: SearchSpace, masked: bool) -> Result<SuperNet> {
        self.check("make adapters")?;
        let mut net = fresh_supernet(self.args, model, space, masked)?;
        self.check("make adapters")?;
        if self.args.init == Init::Pissa {
            net.init_from_principal(&self.progress)?;
        }
        Ok(net)
    }

    /// The folder of finished blocks, from which `--resume` goes on while the run is not over.
    pub fn blocks(&self) -> PathBuf {
        self.out.join(BLOCKS)
    }

    /// Prunes a model by the given method.
    pub fn pruned_by(&self, base: &Decoder, method: sparsity::Method) -> Result<Decoder> {
        let mut pruned = base.clone();
        // Without zeros to make, there is nothing to measure.
        if matches!(
            self.settings.pattern,
            Pattern::Unstructured { ratio: 0.0 } | Pattern::Layer { ratio: 0.0 }
        ) {
            return Ok(pruned);
        }
        let config = PruneConfig::new(method, self.settings.pattern);
        let samples = &self.task.calibration;
        prune_model_keeping(&mut pruned, samples, &config, self.blocks(), &self.progress)?;
        Ok(pruned)
    }

    /// Measures a model as it is and adds its row. `net` provides costs and ranks for adapters that
    /// are not merged.
    pub fn row(&mut self, name: &str, model: &Decoder, net: Option<&SuperNet>) -> Result<()> {
        let mut row = Row::new(name);
        let (loss, accuracy) = self.measured(name, model)?;
        (row.loss, row.accuracy) = (Some(loss), accuracy);
        let sparsity = self.share_of_zeros(model)?;
        row.sparsity = Some(sparsity);
        let plain;
        let net = match net {
            Some(net) => net,
            None => {
                let config = SuperNetConfig::new(lora_config(self.args, 1));
                plain = SuperNet::new(model.clone(), SearchSpace::single(), config)?;
                self.check("count zeros")?;
                &plain
            }
        };
        let cost = net.cost(net.active())?;
        row.params = Some(cost.params as u64);
        row.nonzero_params = Some(cost.nonzero_params as u64);
        row.macs_per_token = Some(cost.macs_per_token as u64);
        // The runtime stores adapters in the type of the weights that stay dense.
        let base = stored_bytes(model, self.plan(sparsity))?;
        self.check("count bytes")?;
        let size = self.task.pretrained.dtype.size();
        row.bytes = Some((base + cost.adapter_params * size) as u64);
        if !net.space().is_empty() {
            row.ranks = Some(net.space().values(net.active())?);
        }
        let accuracy = row
            .accuracy
            .map_or(String::new(), |a| format!(", accuracy {:.1} %", 100.0 * a));
        common::say!("{name}: loss {:.4}{accuracy}", row.loss.unwrap_or(f64::NAN));
        self.report.rows.push(row);
        Ok(())
    }

    /// Returns the loss and the accuracy of the next row's model.
    fn measured(&mut self, name: &str, model: &Decoder) -> Result<(f64, Option<f64>)> {
        let key = format!("{}. {name}", self.report.rows.len() + 1);
        if let Some(found) = self.measured.get(&key) {
            return Ok(*found);
        }
        let loss = mean_loss(model, &self.task.test, &self.progress)?;
        let accuracy = match &self.task.problems {
            Some(problems) => Some(self.accuracy(problems, model)?),
            None => None,
        };
        // JSON has no NaN.
        if loss.is_finite() {
            self.measured.insert(key, (loss, accuracy));
            atomic::write_json(self.out.join(MEASURED), &self.measured)?;
        }
        Ok((loss, accuracy))
    }

    /// Returns the beginnings of some calibration sequences, on which logits are compared.
    pub fn sample(&self, n: usize) -> Vec<Vec<u32>> {
        const LENGTH: usize = 128;
        let samples = self.task.calibration.iter().take(n);
        samples
            .map(|ids| ids[..ids.len().min(LENGTH)].to_vec())
            .collect()
    }

    /// Returns the fraction of problems that a model answers correctly.
    pub fn accuracy(&self, problems: &ProblemSet, model: &Decoder) -> Result<f64> {
        let (tokenizer, config) = (&self.task.pretrained.tokenizer, generate_config(self.task));
        let found = problems.exact_match(model, tokenizer, &config, &self.progress)?;
        Ok(found.accuracy())
    }

    pub fn train(&self, net: &mut SuperNet, name: &str, sampling: Sampling) -> Result<TrainReport> {
        self.train_with(
            net,
            name,
            TrainConfig {
                sampling,
                ..self.settings.train.clone()
            },
        )
    }

    pub fn train_with(
        &self,
        net: &mut SuperNet,
        name: &str,
        config: TrainConfig,
    ) -> Result<TrainReport> {
        let args = self.args;
        let mut batcher = self.task.train.clone();
        let report = Trainer::new(config)?
            .with_folder(self.out.join(name))
            .with_resume(args.resume)
            .with_label(name)
            .run(net, &mut batcher, &self.task.valid, &self.progress)?;
        if report.steps_done > 0 {
            let per_step = 1000.0 * report.seconds / report.steps_done as f64;
            common::say!(
                "trained {name}: {} steps, {per_step:.0} ms a step, {:.0} tokens/s",
                report.steps_done,
                report.tokens_per_second
            );
        }
        Ok(report)
    }

    fn lora(&mut self, pruned: &Decoder, space: &SearchSpace) -> Result<()> {
        let layers: Vec<_> = pruned
            .layer_shapes()
            .into_iter()
            .filter(|l| space.group_of_layer(&l.name).is_some())
            .collect();
        let fixed = SearchSpace::fixed(&layers, space.max_rank())?;
        let mut net = self.supernet(pruned, fixed, false)?;
        self.train(&mut net, "lora", Sampling::Fixed)?;
        self.row("LoRA on the pruned base", net.model(), Some(&net))?;
        self.kept_in("lora-adapter");
        self.write_adapter(&net, "pruned", "lora-adapter", PeftOptions::default().dtype)?;
        Ok(())
    }

    fn shears(&mut self, pruned: &Decoder, space: &SearchSpace) -> Result<()> {
        let mut net = self.supernet(pruned, space.clone(), false)?;
        self.train(&mut net, "shears", Sampling::PerStep)?;
        net.activate(&net.maximal())?;
        self.row("Shears, largest", net.model(), Some(&net))?;
        net.activate(&net.heuristic())?;
        self.row("Shears, heuristic", net.model(), Some(&net))?;

        let outcome = self.search(&net, "shears", false)?;
        // The best subnet on the validation set among those that cost no more than the heuristic
        // subnet, which is one of them.
        let most = self.objective(&net)?.cost(&net, &net.heuristic())?;
        let chosen = match (
            self.meet_target(&mut net, &outcome)?,
            outcome.best_under(most),
        ) {
            (Some(chosen), _) => chosen,
            (None, Some(best)) => best.config.clone(),
            (None, None) => net.heuristic(),
        };
        let named = vec![("searched", chosen.clone())];
        self.write_search(&net, "Shears", &outcome, named.clone())?;
        net.activate(&chosen)?;
        self.row("Shears, searched", net.model(), Some(&net))?;
        self.kept_in("adapter");

        self.write_adapter(&net, "pruned", "adapter", PeftOptions::default().dtype)?;
        self.write_supernet(&net, "supernet.elora", named, Some(&outcome))?;
        self.write_subnet(&net, &chosen, "adapter")
    }

    /// Writes the adapters of the active subnet as a PEFT folder, for the base model in the folder
    /// `base`.
    pub fn write_adapter(
        &self,
        net: &SuperNet,
        base: &str,
        name: &str,
        dtype: DType,
    ) -> Result<PathBuf> {
        let mut adapter = net.extract_adapter()?;
        // Lets PEFT find the base weights of the adapter by itself.
        let base = self.out.join(base);
        let base = base.canonicalize().map_err(|e| Error::io(&base, e))?;
        adapter.base_model = Some(base.to_string_lossy().into_owned());
        let options = PeftOptions {
            overwrite: true,
            dropout: self.args.dropout,
            dtype,
            ..PeftOptions::for_model(net.model().config())
        };
        let folder = self.out.join(name);
        adapter.write(&folder, &options)?;
        Ok(folder)
    }

    /// Searches the subnets of the supernet that was trained in `folder`. If `merged`, adapters
    /// have no cost.
    pub fn search(&self, net: &SuperNet, folder: &str, merged: bool) -> Result<SearchOutcome> {
        let (args, space) = (self.args, net.space());
        // The reference subnets are evaluated with every search algorithm, because the report shows
        // them.
        let seeds = vec![net.heuristic(), net.maximal(), net.minimal()];
        let mut n_evals = args.evals;
        let mut searcher: Box<dyn Searcher> = match args.search {
            Search::Sensitivity => {
                let config = SensitivityConfig::new().with_fidelity(args.scoring_share);
                let scored = config.n_scored(space)?;
                let in_full = (args.scoring_share * scored as f64).ceil() as usize;
                let corrections = args.evals.saturating_sub(in_full).max(10);
                // The scoring pass must be whole.
                n_evals = in_full + corrections;
                Box::new(config.with_corrections(corrections).init(space)?)
            }
            Search::Nsga2 => {
                let population = (args.evals / 4).clamp(4, 40);
                let config = NsgaConfig::new()
                    .with_population(population)
                    .with_seed(args.seed)
                    .with_screening(10);
                Box::new(config.with_initial(seeds).init(space)?)
            }
            Search::Random => Box::new(
                RandomSearchConfig::new()
                    .with_seed(args.seed)
                    .with_initial(seeds)
                    .init(space)?,
            ),
            Search::HillClimbing => {
                Box::new(HillClimbingConfig::new().with_seed(args.seed).init(space)?)
            }
            Search::Heuristic => Box::new(Heuristic::new(space)),
        };
        let log = self.out.join(folder).join("search.jsonl");
        if !args.resume && log.exists() {
            std::fs::remove_file(&log).map_err(|e| Error::io(&log, e))?;
        }
        let tag = format!(
            "{} seed {} steps {} batch {} lr {} sparsity {} {} {:?} against {:?}{}",
            self.task.pretrained.folder.display(),
            args.seed,
            args.steps,
            args.batch,
            args.lr,
            args.sparsity,
            args.pattern,
            args.metric,
            args.cost,
            args.target
                .map_or(String::new(), |target| format!(" for {target}"))
        );
        let mut study = StudyConfig::new(n_evals)
            .with_log(log)
            .with_tag(tag)
            .init(space)?;
        let objective = self.objective(net)?.with_merged(merged);
        let started = Instant::now();
        let progress = &self.progress;
        let evaluate = |subnet: &_, share| objective.evaluate_at(subnet, share, progress);
        let outcome = study.run_at(&mut searcher, evaluate, progress)?;
        common::say!(
            "searched by {}: {} subnets in {:.0} s, {} on the front, worth {:.1} evaluations in full",
            outcome.searcher(),
            outcome.evaluations().len(),
            started.elapsed().as_secs_f64(),
            outcome.front().len(),
            outcome.n_full_evaluations()
        );
        Ok(outcome)
    }

    /// Writes the report of a search, with the subnets that were chosen.
    pub fn write_search(
        &self,
        net: &SuperNet,
        method: &str,
        outcome: &SearchOutcome,
        chosen: Vec<(&str, SubnetConfig)>,
    ) -> Result<()> {
        let names = self.objective(net)?.names();
        let folder = &self.task.pretrained.folder;
        let model = folder.file_name().unwrap_or(folder.as_os_str());
        let mut report = SearchReport::new(net.space(), outcome, &names)
            .with_title(format!("{}, {method}", model.to_string_lossy()));
        for (name, subnet) in chosen {
            report = report.with_chosen(name, subnet);
        }
        report.write(&self.out)?;
        report.write_curves(&self.out)?;
        Ok(())
    }

    /// Returns the cost that the target and the arguments name.
    fn cost(&self, net: &SuperNet) -> Result<Cost> {
        Ok(match self.args.target {
            Some(Target::Bytes(_)) if self.args.method == Method::Lonas => {
                Cost::Stored(match self.stored_dtype() {
                    DType::BF16 => WeightFormat::Bf16,
                    DType::F16 => WeightFormat::F16,
                    _ => WeightFormat::F32,
                })
            }
            Some(Target::Bytes(_)) => {
                let plan = self.plan(self.share_of_zeros(net.model())?);
                Cost::Stored(plan.linears.unwrap_or(WeightFormat::F32))
            }
            Some(Target::Milliseconds(_)) => Cost::Latency,
            _ => self.args.cost.into(),
        })
    }

    /// Returns what a search minimises: the negated score and the cost that the arguments name, on
    /// the validation set.
    pub fn objective<'n>(&'n self, net: &'n SuperNet) -> Result<SubnetObjective<'n>> {
        let pretrained = &self.task.pretrained;
        let metric = match (self.args.metric, &self.task.valid_problems) {
            (SearchMetric::Loss, _) => Metric::Loss(&self.task.valid),
            (SearchMetric::Accuracy, Some(problems)) => Metric::Accuracy {
                problems,
                tokenizer: &pretrained.tokenizer,
                generate: generate_config(self.task),
            },
            (SearchMetric::Accuracy, None) => return Err(Task::no_answers()),
        };
        let objective = SubnetObjective::new(net, metric, self.cost(net)?);
        match self.phase(net.model()) {
            Some(phase) => Ok(objective.with_latency(self.latency_table(net, phase)?)),
            None => Ok(objective),
        }
    }

    /// Activates and returns the better, on the validation set, of the two subnets that need no
    /// search.
    pub fn better_of_two(&self, net: &mut SuperNet) -> Result<SubnetConfig> {
        let mut best: Option<(f64, SubnetConfig)> = None;
        for subnet in [net.heuristic(), net.maximal()] {
            net.activate(&subnet)?;
            let loss = mean_loss(net.model(), &self.task.valid, &self.progress)?;
            if best.as_ref().is_none_or(|(least, _)| loss < *least) {
                best = Some((loss, subnet));
            }
        }
        let chosen = best.map_or_else(|| net.heuristic(), |(_, subnet)| subnet);
        net.activate(&chosen)?;
        Ok(chosen)
    }

    pub fn sparse_peft(&mut self, pruned: &Decoder, space: &SearchSpace) -> Result<()> {
        let mut net = self.supernet(pruned, space.clone(), true)?;
        self.train(&mut net, "sparse-peft", Sampling::PerStep)?;
        // Ranks have no cost after merging, so no search is needed.
        let chosen = self.better_of_two(&mut net)?;
        let sample = self.sample(4);
        let merged = Merger::new().merge(&net, &sample, &self.progress)?;
        // The model is measured as it was written: in the checkpoint's own type, and read back.
        let pretrained = &self.task.pretrained;
        let folder = self.out.join("merged");
        pretrained.write_variant(&merged.model, &folder, true)?;
        self.check("read the merged model")?;
        let written = Pretrained::open(&folder, &pretrained.model.device())?.model;
        let (lost, difference) = self.compare_written(pruned, net.model(), &written, &sample)?;
        common::say!(
            "merged {} layers: {lost} zeros lost; logits differ by at most {:.1e} in f32, {:.1e} as written in {}",
            merged.report.layers.len(),
            merged.report.max_logit_difference.unwrap_or(0.0),
            difference,
            pretrained.dtype
        );
        self.row("SparsePEFT, merged", &written, None)?;
        if let Some(row) = self.report.rows.last_mut() {
            row.ranks = Some(net.space().values(&chosen)?);
        }
        self.kept_in("merged");
        atomic::write_json(self.out.join("merge_report.json"), &merged.report)?;
        self.write_merged(&net, "merged.elora")?;
        self.write_subnet(&net, &chosen, "merged")
    }

    /// Returns the fraction of zeros among the weights of a model's linear layers.
    fn share_of_zeros(&self, model: &Decoder) -> Result<f64> {
        let (mut zeros, mut all) = (0, 0);
        for (_, layer) in model.linears() {
            self.check("count zeros")?;
            let weight = layer.base.to_matrix();
            zeros += weight.count_zeros();
            all += weight.as_slice().len();
        }
        Ok(zeros as f64 / all.max(1) as f64)
    }

    /// Compares a model as it was written with the one that it was made from: returns the number of
    /// zeros of the linear layers of `sparse` that are lost, and the largest absolute difference of
    /// the logits of `merged` on token sequences.
    pub fn compare_written(
        &self,
        sparse: &Decoder,
        merged: &Decoder,
        written: &Decoder,
        sample: &[Vec<u32>],
    ) -> Result<(usize, f32)> {
        let n_layers = written.linears().count();
        let n = n_layers + sample.len();
        let mut task = Work::begin(&self.progress, "compare as written", n, "parts")?;
        let mut lost = 0;
        for ((_, before), (name, after)) in sparse.linears().zip(written.linears()) {
            let (before, after) = (before.base.to_matrix(), after.base.to_matrix());
            let pairs = before.as_slice().iter().zip(after.as_slice());
            lost += pairs.filter(|(b, a)| **b == 0.0 && **a != 0.0).count();
            task.step(&name)?;
        }
        let mut largest = 0.0;
        for ids in sample {
            let logits = |model: &Decoder| Ok::<_, Error>(model.forward(model.tokens(ids, 1)?));
            let difference = (logits(merged)? - logits(written)?).abs().max();
            largest = f32::max(largest, difference.into_scalar());
            task.step("logits")?;
        }
        Ok((lost, largest))
    }

    /// Writes the search space and the subnet next to the model that was made from it.
    pub fn write_subnet(&self, net: &SuperNet, subnet: &SubnetConfig, name: &str) -> Result<()> {
        let path = |what: &str| -> PathBuf { self.out.join(format!("{name}_{what}.json")) };
        atomic::write_json(path("space"), net.space())?;
        atomic::write_json(path("subnet"), subnet)?;
        let ranks: BTreeMap<String, usize> = net.ranks(subnet)?;
        atomic::write_json(path("ranks"), &ranks)
    }
}

/// Returns at most `n` members of a front, cheapest first, evenly spaced among all.
fn spaced<'a>(front: &[&'a Evaluation], n: Option<usize>) -> Vec<&'a Evaluation> {
    let last = front.len().saturating_sub(1);
    let n = n.unwrap_or(front.len()).min(front.len());
    let at = |index: usize| match n {
        1 => last / 2,
        _ => (index * last + (n - 1) / 2) / (n - 1),
    };
    (0..n).map(|index| front[at(index)]).collect()
}
