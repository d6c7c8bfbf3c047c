//! Fine-tuned sparse quantized models (SQFT): the rows of table 2 of the paper, all trained by the
//! same trainer.
//!
//! Each row measures the written files: models and adapters are read back from their folders.

use std::collections::BTreeMap;
use std::path::Path;

use elastic_lora::calib::{QuantizeConfig, QuantizeMethod, quantize_model_keeping, walk_blocks};
use elastic_lora::format::{PackedMatrix, QuantizedMatrix};
use elastic_lora::io::peft::LoraAdapter;
use elastic_lora::io::{DType, atomic};
use elastic_lora::model::{Decoder, Pretrained};
use elastic_lora::nn::{BaseLinear, host_values};
use elastic_lora::progress::Task;
use elastic_lora::runtime::{Model, ModelOptions};
use elastic_lora::sparsity::{self, InputNorms, Mask};
use elastic_lora::supernet::QaConfig;
use elastic_lora::train::Sampling;
use elastic_lora::{ElasticLoraLinear, Merger, Result, SearchSpace, SuperNet};

use crate::pipeline::Run;
use crate::report::Row;
use crate::{Init, Method, QaStart, Quantize};

/// Name of the row that the others are relative to.
const LORA: &str = "LoRA";

/// Data type of written adapters.
const ADAPTER: DType = DType::F16;

/// A quantized model as read from its folder.
struct Quantized {
    model: Decoder,
    layers: BTreeMap<String, QuantizedMatrix>,
    folder: &'static str,
}

impl Quantized {
    /// Returns the model with the weights of the selected layers packed in memory as in the files.
    fn packed(&self, of: &Decoder, run: &Run<'_>, which: impl Fn(&str) -> bool) -> Result<Decoder> {
        let (mut model, device) = (of.clone(), of.device());
        model.try_for_each_linear(|name, layer| {
            run.check("pack weights")?;
            if let Some(matrix) = self.layers.get(name).filter(|_| which(name)) {
                let bias = layer.base.bias.as_ref().map(|bias| host_values(bias.val()));
                layer.base = BaseLinear::from_quantized(
                    PackedMatrix::new(matrix),
                    bias.as_deref(),
                    &device,
                )?;
            }
            Ok(())
        })?;
        Ok(model)
    }
}

impl Run<'_> {
    /// Adds the rows of table 2 that `--method` selects.
    pub fn table_2(&mut self, base: &Decoder, space: &SearchSpace) -> Result<()> {
        let (args, dtype) = (self.args, self.task.pretrained.dtype);
        let all = args.method == Method::Table2;
        self.precision(dtype.to_string());
        let pruned = self.pruned(base)?;
        self.precision(dtype.to_string());

        let mut rounded = Vec::new();
        let integers = args.method != Method::SqftSparsePeft;
        if all || (integers && args.quantize == Quantize::Rtn) {
            let method = QuantizeMethod::Nearest;
            rounded.push((
                Quantize::Rtn,
                self.rounded("pruned, rounded to nearest", "pruned-rtn", &pruned, method)?,
            ));
        }
        if all || (integers && args.quantize == Quantize::Gptq) {
            let method = QuantizeMethod::Gptq;
            rounded.push((
                Quantize::Gptq,
                self.rounded("pruned, then GPTQ", "pruned-gptq", &pruned, method)?,
            ));
        }
        if all && args.prune != sparsity::Method::SparseGpt {
            let sparse = self.pruned_by(base, sparsity::Method::SparseGpt)?;
            self.rounded(
                "SparseGPT, then GPTQ",
                "sparsegpt-gptq",
                &sparse,
                QuantizeMethod::Gptq,
            )?;
        }
        if all || (integers && args.quantize == Quantize::Joint) {
            let method = QuantizeMethod::SparseGptq(self.settings.pattern);
            rounded.push((
                Quantize::Joint,
                self.rounded("SparseGPT and GPTQ in one", "joint", base, method)?,
            ));
        }
        let rounded = rounded
            .into_iter()
            .find(|(how, _)| *how == args.quantize)
            .map(|(_, rounded)| rounded);

        if all {
            let layers: Vec<_> = pruned
                .layer_shapes()
                .into_iter()
                .filter(|l| space.group_of_layer(&l.name).is_some())
                .collect();
            let fixed = SearchSpace::fixed(&layers, space.max_rank())?;
            let lora = Apart {
                name: LORA,
                training: "lora",
                adapter: "lora-adapter",
                base: "pruned",
            };
            self.apart(&lora, base, &pruned, fixed, Sampling::Fixed)?;
            let shears = Apart {
                name: "Shears",
                training: "shears",
                adapter: "adapter",
                base: "pruned",
            };
            self.apart(&shears, base, &pruned, space.clone(), Sampling::PerStep)?;
        }
        if args.method.includes(Method::SqftSparsePeft) {
            self.sparse_peft(&pruned, space)?;
            self.precision(format!("{dtype}, merged"));
            if all {
                let merged = self.out.join("merged");
                let merged = Pretrained::open(&merged, &pruned.device())?.model;
                let nearest = QuantizeMethod::Nearest;
                self.rounded(
                    "SparsePEFT, merged, then rounded",
                    "merged-rtn",
                    &merged,
                    nearest,
                )?;
                self.rounded(
                    "SparsePEFT, merged, then GPTQ",
                    "merged-gptq",
                    &merged,
                    QuantizeMethod::Gptq,
                )?;
            }
        }
        if let Some(rounded) = &rounded {
            if args.method.includes(Method::Sqft) {
                let sqft = Apart {
                    name: "SQFT",
                    training: "sqft",
                    adapter: "sqft-adapter",
                    base: rounded.folder,
                };
                let integers = rounded.packed(&rounded.model, self, |_| true)?;
                self.apart(&sqft, base, &integers, space.clone(), Sampling::PerStep)?;
            }
            if args.method.includes(Method::SqftQaSparsePeft) {
                self.quantization_aware(&pruned, rounded, space)?;
            }
        }
        let score = |row: &Row| row.accuracy.or(row.loss.map(|loss| (-loss).exp()));
        let lora = self
            .report
            .rows
            .iter()
            .find(|row| row.name == LORA)
            .and_then(score);
        for row in &mut self.report.rows {
            row.relative = lora.zip(score(row)).map(|(lora, score)| score / lora);
        }
        Ok(())
    }

    /// Sets the precision of the last row.
    fn precision(&mut self, precision: String) {
        if let Some(row) = self.report.rows.last_mut() {
            row.precision = Some(precision);
        }
    }

    /// Sets the bytes of the last row to what the runtime stores of a folder with codes, which are
    /// floats in the measured model, and of the adapters of `net`.
    fn bytes_of_codes(&mut self, folder: &str, net: Option<&SuperNet>) -> Result<()> {
        self.check("count bytes")?;
        let model = Model::open(self.out.join(folder), &ModelOptions::default())?;
        self.check("count bytes")?;
        let mut bytes = model.bytes();
        if let Some(net) = net {
            bytes += net.cost(net.active())?.adapter_params * ADAPTER.size();
        }
        if let Some(row) = self.report.rows.last_mut() {
            row.bytes = Some(bytes as u64);
        }
        Ok(())
    }

    /// Returns the name of the integer format of the weights.
    fn integers(&self) -> String {
        format!("INT{}", self.args.bits)
    }

    /// Quantizes a model without training, and adds its row.
    fn rounded(
        &mut self,
        name: &str,
        folder: &'static str,
        model: &Decoder,
        method: QuantizeMethod,
    ) -> Result<Quantized> {
        let mut rounded = model.clone();
        let config = QuantizeConfig::new(method, self.settings.grid);
        let samples = &self.task.calibration;
        let blocks = self.blocks();
        let layers =
            quantize_model_keeping(&mut rounded, samples, &config, blocks, &self.progress)?;
        let model = self.written(&rounded, &layers, folder)?;
        self.row(name, &model, None)?;
        self.precision(self.integers());
        self.kept_in(folder);
        self.bytes_of_codes(folder, None)?;
        Ok(Quantized {
            model,
            layers,
            folder,
        })
    }

    /// Writes a model whose given layers are quantized, and reads it back.
    fn written(
        &self,
        model: &Decoder,
        layers: &BTreeMap<String, QuantizedMatrix>,
        folder: &str,
    ) -> Result<Decoder> {
        let (pretrained, path) = (&self.task.pretrained, self.out.join(folder));
        self.check("write a model")?;
        pretrained.write_quantized(model, layers, self.args.file_format.into(), &path, true)?;
        self.check("read a model")?;
        Ok(Pretrained::open(&path, &pretrained.model.device())?.model)
    }

    /// Trains adapters that are not merged into their compressed base, and adds their row.
    /// `original` is the model before compression.
    fn apart(
        &mut self,
        row: &Apart,
        original: &Decoder,
        base: &Decoder,
        space: SearchSpace,
        sampling: Sampling,
    ) -> Result<()> {
        let mut net = self.supernet(base, space, false)?;
        if self.args.init == Init::Error {
            let norms = self.input_norms(base)?;
            net.init_from_error(original, &norms, &self.progress)?;
        }
        self.train(&mut net, row.training, sampling)?;
        let chosen = self.better_of_two(&mut net)?;
        let adapter = self.write_adapter(&net, row.base, row.adapter, ADAPTER)?;
        let folder = self.out.join(row.base);
        let read = Pretrained::open(&folder, &base.device())?.model;
        let read = SuperNet::from_adapter(read, &LoraAdapter::open(&adapter)?)?;
        self.row(row.name, read.model(), Some(&read))?;
        let integers = read_is_quantized(&folder)?;
        let base = if integers {
            self.integers()
        } else {
            self.task.pretrained.dtype.to_string()
        };
        self.precision(format!("{base} + {ADAPTER}"));
        self.kept_in(row.adapter);
        if integers {
            self.bytes_of_codes(row.base, Some(&read))?;
        }
        if let Some(row) = self.report.rows.last_mut() {
            row.ranks = Some(net.space().values(&chosen)?);
        }
        if net.space().n_subnets() > 1.0 {
            // Each run has one `supernet.elora`; that of table 2 is of Shears.
            let second = self.args.method == Method::Table2 && row.training == "sqft";
            let file = if second {
                "sqft-supernet.elora"
            } else {
                "supernet.elora"
            };
            self.write_supernet(&net, file, vec![("chosen", chosen.clone())], None)?;
            self.write_subnet(&net, &chosen, row.adapter)
        } else {
            Ok(())
        }
    }

    /// Returns the norms of the inputs of a model's layers on the calibration data.
    fn input_norms(&self, model: &Decoder) -> Result<BTreeMap<String, Vec<f32>>> {
        let mut norms = BTreeMap::new();
        walk_blocks(
            &mut model.clone(),
            &self.task.calibration,
            "measure inputs",
            InputNorms::new,
            |norms, x| norms.update(&host_values(x.clone()), x.dims()[0]),
            |name, _, found| {
                let roots = found.mean_sq_norms().into_iter().map(f32::sqrt);
                norms.insert(name.to_string(), roots.collect());
                Ok(())
            },
            &self.progress,
        )?;
        Ok(norms)
    }

    /// Trains through the grids of `rounded` with the mask of the sparse weights, merges, and adds
    /// the row.
    fn quantization_aware(
        &mut self,
        pruned: &Decoder,
        rounded: &Quantized,
        space: &SearchSpace,
    ) -> Result<()> {
        let args = self.args;
        let joint = args.quantize == Quantize::Joint;
        let start = args.qa_start.unwrap_or(if joint {
            QaStart::Gptq
        } else {
            QaStart::Sparse
        });
        let adapted = |name: &str| space.group_of_layer(name).is_some();
        let mut work = Task::begin(&self.progress, "prepare", 4, "steps")?;
        // Layers without an adapter keep their quantized weights in any case.
        let base = rounded.packed(pruned, self, |name| {
            start == QaStart::Gptq || !adapted(name)
        })?;
        work.step("weights packed")?;
        let sparse = if joint { &rounded.model } else { pruned };
        let layers = sparse.linears().filter(|(name, _)| adapted(name));
        let mask = |(name, layer): (String, &ElasticLoraLinear)| {
            self.check("make masks")?;
            Ok((name, Mask::from_nonzero(&layer.base.to_matrix())))
        };
        let masks = layers.map(mask).collect::<Result<_>>()?;
        work.step("masks made")?;
        let grids = rounded
            .layers
            .iter()
            .filter(|(name, _)| adapted(name))
            .map(|(n, m)| (n.clone(), m.clone()));
        let qa = QaConfig::new(grids.collect())
            .with_masks(masks)
            .with_train_scales(args.train_scales);
        let net = self.supernet(&base, space.clone(), true)?;
        work.step("adapters made")?;
        let mut net = net.with_quantization(&qa)?;
        work.step("grids made")?;
        drop(work);
        self.train(&mut net, "sqft-qa", Sampling::PerStep)?;
        let chosen = self.better_of_two(&mut net)?;

        let sample = self.sample(4);
        let merged = Merger::new().merge(&net, &sample, &self.progress)?;
        let integers = merged
            .model
            .linears()
            .filter_map(|(name, layer)| Some((name, layer.base.quantized()?.unpack())));
        let integers: BTreeMap<String, QuantizedMatrix> = integers.collect();
        let written = self.written(&merged.model, &integers, "merged-quantized")?;
        let (lost, difference) = self.compare_written(sparse, net.model(), &written, &sample)?;
        crate::common::say!(
            "merged {} layers: {lost} zeros lost; logits differ by at most {:.1e}, as written by {difference:.1e}",
            merged.report.layers.len(),
            merged.report.max_logit_difference.unwrap_or(0.0),
        );
        self.row("SQFT + QA-SparsePEFT", &written, None)?;
        self.precision(format!("{}, merged", self.integers()));
        self.kept_in("merged-quantized");
        self.bytes_of_codes("merged-quantized", None)?;
        if let Some(row) = self.report.rows.last_mut() {
            row.ranks = Some(net.space().values(&chosen)?);
        }
        atomic::write_json(self.out.join("merge_report_quantized.json"), &merged.report)?;
        self.write_merged(&net, "merged-quantized.elora")?;
        self.write_subnet(&net, &chosen, "merged-quantized")
    }
}

/// A row whose adapters are not merged: its name, and the folders of its training, its adapters and
/// its base.
struct Apart {
    name: &'static str,
    training: &'static str,
    adapter: &'static str,
    base: &'static str,
}

fn read_is_quantized(folder: &Path) -> Result<bool> {
    Ok(elastic_lora::io::HfConfig::open(folder)?
        .quantization()
        .is_some())
}
