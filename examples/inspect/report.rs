//! Collects what is known of a model, part by part, and prints it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use elastic_lora::arch::RopeScaling;
use elastic_lora::data::TextTokenizer;
use elastic_lora::io::bundle::Bundle;
use elastic_lora::io::{Checkpoint, Gguf, HfConfig, LoraAdapter, QuantizationConfig, model_path};
use elastic_lora::{Error, Result};
use serde_json::{Map, Value, json};

use super::bytes_of;

/// A weight or another tensor.
struct Row {
    name: String,
    /// Name of the dtype or format.
    kind: String,
    shape: Vec<usize>,
    bytes: usize,
    /// Number of zeros, if they were counted.
    zeros: Option<usize>,
}

impl Row {
    fn n(&self) -> usize {
        self.shape.iter().product()
    }
}

#[derive(Default)]
pub struct Report {
    /// Facts in the order in which they are printed.
    facts: Vec<(&'static str, Value)>,
    rows: Vec<Row>,
    adapter: Vec<(&'static str, Value)>,
    /// What would be refused: the part, and the error.
    refused: Vec<(String, String)>,
}

/// Reads a JSON file, if there is a valid one.
fn json_of(path: &Path) -> Option<Map<String, Value>> {
    let text = std::fs::read_to_string(path).ok()?;
    serde_json::from_str(&text).ok()
}

/// Numbers in a name are compared as numbers.
fn order(name: &str) -> Vec<(u64, &str)> {
    let part = |part| match str::parse(part) {
        Ok(number) => (number, ""),
        Err(_) => (u64::MAX, part),
    };
    name.split('.').map(part).collect()
}

fn scaling(scaling: &RopeScaling) -> String {
    match scaling {
        RopeScaling::Default => "none".into(),
        other => format!("{other:?}"),
    }
}

/// The one value of all blocks, or the smallest and the largest.
fn range(values: impl Iterator<Item = usize>) -> Value {
    let all: BTreeSet<usize> = values.collect();
    match (all.first(), all.last()) {
        (Some(least), Some(most)) if least != most => json!(format!("{least} to {most}")),
        (Some(one), _) => json!(one),
        _ => json!(0),
    }
}

/// Suffixes of the tensors that make up a quantized layer.
const PARTS: [&str; 9] = [
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
];

impl Report {
    fn fact(&mut self, name: &'static str, value: impl Into<Value>) {
        self.facts.push((name, value.into()));
    }

    /// Notes an error of a part and returns its value otherwise. Errors that only repeat another
    /// are left out.
    fn part<T>(&mut self, part: &str, result: Result<T>) -> Option<T> {
        result
            .map_err(|error| {
                let text = error.to_string();
                if !self.refused.iter().any(|(_, other)| *other == text) {
                    self.refused.push((part.into(), text));
                }
            })
            .ok()
    }

    /// Adds a model, and returns its config if it is not refused.
    pub fn add_model(&mut self, model: &Path, weights: bool) -> Result<Option<HfConfig>> {
        let path = model_path(model)?;
        let meta = std::fs::metadata(&path).map_err(|source| Error::Io {
            path: path.clone(),
            source,
        })?;
        self.fact("path", path.display().to_string());
        let gguf = match meta.is_file() {
            true => Gguf::open(&path),
            false => Err(Error::Unsupported {
                what: String::new(),
            }),
        };
        let config = match (meta.is_dir(), gguf) {
            (true, _) => self.add_folder(&path, weights),
            (_, Ok(gguf)) => self.add_gguf(&path, &gguf, weights),
            (_, Err(error)) => match Bundle::open(&path, true) {
                Ok(bundle) => self.add_bundle(&bundle, weights),
                Err(_) if is_gguf(&path) => {
                    self.fact("format", "GGUF");
                    self.part::<()>("file", Err(error));
                    None
                }
                Err(error) => {
                    self.fact("format", "weights alone");
                    let file = Checkpoint::open(&path)?;
                    if file
                        .metadata()
                        .get("format")
                        .is_some_and(|name| name.contains("elora"))
                    {
                        self.part::<()>("bundle", Err(error));
                    }
                    self.add_tensors(&file, None, None, weights);
                    let reason = "weights without a config.json: give the folder".to_string();
                    self.refused.push(("model".into(), reason));
                    None
                }
            },
        };
        let bytes = bytes_of(&path);
        self.fact("bytes", bytes);
        Ok(config)
    }

    fn add_folder(&mut self, path: &Path, weights: bool) -> Option<HfConfig> {
        self.fact("format", "Hugging Face folder");
        let raw = json_of(&path.join("config.json")).unwrap_or_default();
        let opened = HfConfig::open(path);
        let config = self.part("config.json", opened);
        match &config {
            Some(config) => self.add_config(config),
            None => {
                for name in ["model_type", "architectures"] {
                    if let Some(value) = raw.get(name) {
                        self.fact(name, value.clone());
                    }
                }
            }
        }
        let own = raw.get("quantization_config").and_then(Value::as_object);
        let quantization = match &config {
            Some(config) => config.quantization().cloned(),
            None => own.and_then(|raw| {
                let parsed = QuantizationConfig::from_json(raw.clone());
                self.part("quantization_config", parsed)
            }),
        };
        match (&quantization, own) {
            (Some(config), _) => self.fact("quantization", quantized(config)),
            (None, Some(own)) => {
                let method = own.get("quant_method").cloned();
                self.fact("quantization", method.unwrap_or_default());
            }
            (None, None) => self.fact("quantization", "none"),
        }
        let file = Checkpoint::open(path);
        if let Some(file) = self.part("weights", file) {
            if let Some(config) = &config {
                self.part("weights", config.check(&file));
            }
            self.add_tensors(&file, config.as_ref(), quantization.as_ref(), weights);
        }
        self.add_tokenizer(TextTokenizer::from_dir(path), config.as_ref());
        let from_config = json_of(&path.join("tokenizer_config.json"))
            .is_some_and(|config| config.get("chat_template").is_some_and(|t| !t.is_null()));
        let place = ["chat_template.jinja", "chat_template.json"]
            .into_iter()
            .find(|name| path.join(name).is_file())
            .or(from_config.then_some("tokenizer_config.json"));
        self.fact("chat template", place.unwrap_or("none"));
        config
    }

    fn add_gguf(&mut self, path: &Path, gguf: &Gguf, weights: bool) -> Option<HfConfig> {
        self.fact("format", "GGUF");
        if let Some(Some(name)) = self.part("architecture", gguf.architecture()) {
            self.fact("architecture", name);
        }
        let config = self.part("metadata", HfConfig::open(path));
        if let Some(config) = &config {
            self.add_config(config);
        }
        match self.part("weights", Checkpoint::open(path)) {
            Some(file) => self.add_tensors(&file, config.as_ref(), None, weights),
            // The tensors as they are, by their own names.
            None => self.rows.extend(gguf.tensors().map(|tensor| Row {
                name: tensor.name.into(),
                kind: tensor.kind.into(),
                shape: tensor.shape.to_vec(),
                bytes: tensor.n_bytes,
                zeros: None,
            })),
        }
        self.add_tokenizer(TextTokenizer::from_dir(path), config.as_ref());
        if let Some(template) = self.part("chat template", gguf.chat_template()) {
            let place = template.map_or("none", |_| "tokenizer.chat_template");
            self.fact("chat template", place);
        }
        config
    }

    fn add_bundle(&mut self, bundle: &Bundle, weights: bool) -> Option<HfConfig> {
        self.fact("format", "bundle");
        let raw = bundle.document().get("config").and_then(Value::as_object);
        let config = HfConfig::from_json(raw.cloned().unwrap_or_default());
        let config = self.part("config", config);
        if let Some(config) = &config {
            self.add_config(config);
        }
        let document = bundle.document();
        let subnets = document.get("subnets").and_then(Value::as_array);
        self.fact("subnets", subnets.map_or(0, Vec::len));
        for name in bundle.matrices() {
            let Some(matrix) = self.part("weights", bundle.matrix(name)) else {
                continue;
            };
            let sound = weights
                && self.part("weights", bundle.verify_matrix(name)).is_some()
                && self.part("weights", matrix.check()).is_some();
            let zeros = sound.then(|| count_zeros(matrix.to_matrix().as_slice()));
            self.rows.push(Row {
                name: name.into(),
                kind: format!("{:?}", matrix.format()),
                shape: vec![matrix.rows(), matrix.cols()],
                bytes: matrix.bytes(),
                zeros,
            });
        }
        self.rows
            .sort_by(|a, b| order(&a.name).cmp(&order(&b.name)));
        if bundle.contains("tokenizer.json") {
            let text = bundle.text("tokenizer.json");
            let tokenizer = text.and_then(|text| TextTokenizer::from_json(&text, bundle.path()));
            self.add_tokenizer(tokenizer, config.as_ref());
        } else {
            self.fact("tokenizer", "none");
        }
        config
    }

    fn add_config(&mut self, config: &HfConfig) {
        let blocks = config.blocks();
        let family = config.family();
        self.fact(
            "family",
            format!("{} ({})", family.model_type(), family.architecture()),
        );
        self.fact("blocks", blocks.len());
        self.fact("hidden size", config.hidden_size());
        self.fact("query heads", range(blocks.iter().map(|b| b.n_heads)));
        self.fact(
            "key/value heads",
            range(blocks.iter().map(|b| b.n_kv_heads)),
        );
        self.fact("head size", config.head_dim());
        self.fact("MLP width", range(blocks.iter().map(|b| b.d_mlp)));
        let biased = config.arch().biased.iter().map(|kind| kind.path());
        let biased: Vec<&str> = biased.collect();
        if !biased.is_empty() {
            self.fact("biases", biased.join(", "));
        }
        self.fact("vocabulary", config.vocab_size());
        self.fact("tied embedding and head", config.tie_word_embeddings());
        self.fact("context", config.max_position_embeddings());
        let window = config.sliding_window().map_or(json!("none"), Value::from);
        self.fact("sliding window", window);
        self.fact("rope theta", config.rope_theta());
        self.fact("rope scaling", scaling(config.rope_scaling()));
        self.fact("end-of-sequence tokens", json!(config.eos_token_ids()));
    }

    fn add_tokenizer(&mut self, opened: Result<TextTokenizer>, config: Option<&HfConfig>) {
        let Some(tokenizer) = self.part("tokenizer", opened) else {
            return;
        };
        self.fact("tokenizer", tokenizer.kind());
        self.fact("tokens", tokenizer.vocab_size());
        let text = |ids: &[u32]| {
            let texts = ids.iter().filter_map(|id| tokenizer.id_to_token(*id));
            Value::from(texts.collect::<Vec<_>>())
        };
        self.fact("put before a text", text(tokenizer.prefix()));
        self.fact("put after a text", text(tokenizer.suffix()));
        let special = tokenizer.special_tokens();
        let special = special.into_iter().map(|(id, text)| (text, json!(id)));
        self.fact("special tokens", special.collect::<Map<_, _>>());
        let over = config.filter(|config| tokenizer.vocab_size() > config.vocab_size());
        if let Some(config) = over {
            let reason = format!(
                "{} tokens, more than the {} of the model",
                tokenizer.vocab_size(),
                config.vocab_size()
            );
            self.refused.push(("tokenizer".into(), reason));
        }
    }

    fn add_tensors(
        &mut self,
        file: &Checkpoint,
        config: Option<&HfConfig>,
        quantization: Option<&QuantizationConfig>,
        weights: bool,
    ) {
        let linears = config.map(|config| config.arch().linears());
        let mut parts = BTreeSet::new();
        for layer in linears.into_iter().flatten() {
            let Some(quantization) = quantization.filter(|q| q.has_layer(file, &layer.name)) else {
                continue;
            };
            let mut bytes = 0;
            for suffix in PARTS {
                let name = format!("{}.{suffix}", layer.name);
                if let Ok((_, n)) = file.stored(&name) {
                    bytes += n;
                    parts.insert(name);
                }
            }
            let shape = [layer.d_output, layer.d_input];
            let zeros = if weights {
                let read = quantization.read_layer(file, &layer.name, shape);
                self.part(&layer.name, read)
                    .map(|matrix| matrix.count_zeros())
            } else {
                None
            };
            self.rows.push(Row {
                name: format!("{}.weight", layer.name),
                kind: quantized(quantization),
                shape: shape.to_vec(),
                bytes,
                zeros,
            });
        }
        for name in file.names().filter(|name| !parts.contains(*name)) {
            let (Ok(info), Ok((kind, bytes))) = (file.info(name), file.stored(name)) else {
                continue;
            };
            let mut zeros = None;
            // Tensors of integers are not weights by themselves.
            if weights && let Ok(values) = file.load_f32_unchecked(name) {
                zeros = Some(count_zeros(&values));
                if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                    let reason = format!("element {at} is {}", values[at]);
                    self.refused.push((name.into(), reason));
                }
            }
            self.rows.push(Row {
                name: name.into(),
                kind: kind.into(),
                shape: info.shape.clone(),
                bytes,
                zeros,
            });
        }
        self.rows
            .sort_by(|a, b| order(&a.name).cmp(&order(&b.name)));
    }

    /// Adds an adapter. `config` is that of the model, if there is one.
    pub fn add_adapter(&mut self, adapter: &Path, config: Option<&HfConfig>) -> Result<()> {
        let path: PathBuf = model_path(adapter)?;
        std::fs::metadata(&path).map_err(|source| Error::Io {
            path: path.clone(),
            source,
        })?;
        let mut facts = vec![("path", json!(path.display().to_string()))];
        let raw = json_of(&path.join("adapter_config.json")).unwrap_or_default();
        for (name, field) in [
            ("kind", "peft_type"),
            ("base model", "base_model_name_or_path"),
            ("rank of the config", "r"),
            ("alpha", "lora_alpha"),
            ("target modules", "target_modules"),
        ] {
            if let Some(value) = raw.get(field).filter(|value| !value.is_null()) {
                facts.push((name, value.clone()));
            }
        }
        if let Some(adapter) = self.part("adapter", LoraAdapter::open(&path)) {
            let layers = adapter.layers.values();
            facts.push(("layers", json!(adapter.layers.len())));
            facts.push(("ranks", range(layers.clone().map(|layer| layer.rank()))));
            let scales: BTreeSet<String> = layers
                .clone()
                .map(|layer| layer.scale().to_string())
                .collect();
            facts.push(("scales", json!(scales)));
            let n: usize = layers
                .clone()
                .map(|layer| layer.rank() * (layer.d_input() + layer.d_output()))
                .sum();
            facts.push(("parameters", json!(n)));
            let mut targets: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
            for (name, layer) in &adapter.layers {
                let target = name.rsplit('.').next().unwrap_or(name);
                targets.entry(target).or_default().insert(layer.rank());
            }
            let text = |ranks: BTreeSet<usize>| range(ranks.into_iter());
            let targets: Map<String, Value> = targets
                .into_iter()
                .map(|(name, ranks)| (name.into(), text(ranks)))
                .collect();
            facts.push(("ranks of targets", Value::Object(targets)));
            facts.push(("sparse", json!(adapter.sparse)));
            facts.push(("quantization-aware", json!(adapter.quantization_aware)));
            if !adapter.notices().is_empty() {
                facts.push(("notices", json!(adapter.notices())));
            }
            if let Some(config) = config {
                self.part("adapter", adapter.check(config));
            }
        }
        facts.push(("bytes", json!(bytes_of(&path))));
        self.adapter = facts;
        Ok(())
    }

    pub fn to_json(&self) -> String {
        let map = |facts: &[(&str, Value)]| -> Value {
            let facts = facts.iter().map(|(name, value)| (key(name), value.clone()));
            Value::Object(facts.collect())
        };
        let tensors: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "name": row.name, "kind": row.kind, "shape": row.shape, "bytes": row.bytes,
                    "bits_per_weight": bits(row.bytes, row.n()), "zeros": row.zeros,
                })
            })
            .collect();
        let totals = self.totals().into_iter().map(|total| {
            let value = json!({
                "tensors": total.tensors, "parameters": total.n, "bytes": total.bytes,
                "bits_per_weight": bits(total.bytes, total.n), "zeros": total.zeros,
            });
            (key(total.name), value)
        });
        let refused: Vec<Value> = self
            .refused
            .iter()
            .map(|(part, reason)| json!({"part": part, "reason": reason}))
            .collect();
        let mut report = json!({"refused": refused});
        if !self.facts.is_empty() {
            report["model"] = map(&self.facts);
            report["tensors"] = json!(tensors);
            report["totals"] = Value::Object(totals.collect());
        }
        if !self.adapter.is_empty() {
            report["adapter"] = map(&self.adapter);
        }
        format!("{report:#}")
    }

    fn totals(&self) -> [Total; 4] {
        let table = |row: &Row| {
            let name = row.name.as_str();
            name.contains("embed") || name.starts_with("lm_head") || name.starts_with("output.")
        };
        let total = |name, wanted: &dyn Fn(&Row) -> bool| {
            let rows = || self.rows.iter().filter(|row| wanted(row));
            Total {
                name,
                tensors: rows().count(),
                n: rows().map(Row::n).sum(),
                bytes: rows().map(|row| row.bytes).sum(),
                zeros: rows().map(|row| row.zeros).sum(),
            }
        };
        [
            total("linear layers", &|row| row.shape.len() == 2 && !table(row)),
            total("embedding and head", &|row| {
                row.shape.len() == 2 && table(row)
            }),
            total("others", &|row| row.shape.len() != 2),
            total("all", &|_| true),
        ]
    }
}

struct Total {
    name: &'static str,
    tensors: usize,
    n: usize,
    bytes: usize,
    zeros: Option<usize>,
}

fn key(name: &str) -> String {
    name.replace([' ', '-', '/'], "_").to_lowercase()
}

fn count_zeros(values: &[f32]) -> usize {
    values.iter().filter(|value| **value == 0.0).count()
}

fn bits(bytes: usize, n: usize) -> Option<f64> {
    (n > 0).then(|| (bytes as f64 * 8.0 / n as f64 * 1000.0).round() / 1000.0)
}

fn quantized(config: &QuantizationConfig) -> String {
    let groups = config
        .group_size()
        .map_or("rows".into(), |n| format!("groups of {n}"));
    format!("{:?}, {} bits in {groups}", config.format(), config.bits())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let facts = |f: &mut fmt::Formatter<'_>, facts: &[(&str, Value)]| {
            for (name, value) in facts {
                let text = match value {
                    Value::String(text) => text.clone(),
                    Value::Array(items) if items.is_empty() => "nothing".into(),
                    Value::Object(map) if map.len() > 12 => {
                        let few: Map<String, Value> = map.clone().into_iter().take(12).collect();
                        format!("{} of {}: {}", few.len(), map.len(), Value::Object(few))
                    }
                    other => other.to_string(),
                };
                writeln!(f, "{name:<24} {text}")?;
            }
            Ok(())
        };
        facts(f, &self.facts)?;
        if !self.rows.is_empty() {
            let name = self
                .rows
                .iter()
                .map(|row| row.name.len())
                .max()
                .unwrap_or(0);
            let kind = self
                .rows
                .iter()
                .map(|row| row.kind.len())
                .max()
                .unwrap_or(0)
                .max(4);
            writeln!(
                f,
                "\n{:<name$}  {:<kind$}  {:>14}  {:>11}  {:>6}  {:>6}",
                "tensor", "kind", "shape", "bytes", "bits", "zeros"
            )?;
            let line = |f: &mut fmt::Formatter<'_>, text: [&str; 3], bytes, n, zeros| {
                let percent = |zeros: usize| format!("{:.1}%", 100.0 * zeros as f64 / n as f64);
                let zeros = match zeros {
                    Some(zeros) if n > 0 => percent(zeros),
                    _ => "-".into(),
                };
                let bits = bits(bytes, n).map_or("-".into(), |bits| format!("{bits:.2}"));
                let [title, format, shape] = text;
                writeln!(
                    f,
                    "{title:<name$}  {format:<kind$}  {shape:>14}  {bytes:>11}  {bits:>6}  {zeros:>6}"
                )
            };
            for row in &self.rows {
                let shape = row.shape.iter().map(usize::to_string).collect::<Vec<_>>();
                let shape = shape.join(" x ");
                line(
                    f,
                    [&row.name, &row.kind, &shape],
                    row.bytes,
                    row.n(),
                    row.zeros,
                )?;
            }
            for total in self.totals().iter().filter(|total| total.tensors > 0) {
                let count = format!("{} tensors", total.tensors);
                let n = total.n.to_string();
                line(
                    f,
                    [total.name, &count, &n],
                    total.bytes,
                    total.n,
                    total.zeros,
                )?;
            }
        }
        if !self.adapter.is_empty() {
            writeln!(f, "\nadapter")?;
            facts(f, &self.adapter)?;
        }
        if self.refused.is_empty() {
            write!(f, "\nnothing would be refused")
        } else {
            write!(f, "\nwould be refused:")?;
            for (part, reason) in &self.refused {
                write!(f, "\n  {part}: {reason}")?;
            }
            Ok(())
        }
    }
}

fn is_gguf(path: &Path) -> bool {
    let mut start = [0; 4];
    let read = std::fs::File::open(path)
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut start));
    read.is_ok() && &start == b"GGUF"
}
