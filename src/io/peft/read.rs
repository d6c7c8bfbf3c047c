//! Reads PEFT folders.

use std::collections::BTreeMap;
use std::path::Path;

use super::changes::{BaseChanges, BaseInit, Stored, TokenRows};
use super::config::Rules;
use super::keys::{Field, Part, Parts, by_module};
use super::tables::EMBEDDING_MODULE;
use super::{LoraAdapter, LoraWeights, PREFIX};
use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::io::fields::bad_field;
use crate::io::tensors::{Checkpoint, plain_name};
use crate::io::{cache, read_json_object};

/// Number of modules that a notice names.
const N_NAMED: usize = 3;

impl LoraAdapter {
    /// Reads `adapter_config.json` and `adapter_model.safetensors` from a folder.
    ///
    /// The rank of each tensor must be the rank that the config gives to its layer (`r` or
    /// `rank_pattern`), with one exception: if no pattern matches the layer, a lower rank than `r`
    /// is accepted. The authors' code extracts subnets in this form: the first rows and columns of
    /// an adapter of rank `r`, whose scale is still `lora_alpha / r`.
    ///
    /// Read besides the pairs of linear layers: DoRA, pairs of embedding and head, biases, modules
    /// that are stored whole, resized vocabularies, trained token rows, and initializations whose
    /// base follows from the model's weights (`pissa`, `olora`).
    /// [`SuperNet::from_adapter`](../../struct.SuperNet.html#method.from_adapter) applies them.
    /// Pairs that the config does not name are not read; [`notices`](Self::notices) tells of them.
    ///
    /// # Errors
    /// Returns [`Error::Io`], [`Error::Json`] or [`Error::InvalidFile`] if a file cannot be read.
    /// Returns [`Error::InvalidConfig`] for an invalid field, and [`Error::Unsupported`] for other
    /// kinds of adapters, and for initializations that changed the base in a way that the files do
    /// not record. Returns [`Error::MissingTensor`] for an A without its B, and
    /// [`Error::TensorShape`], [`Error::InvalidRank`], [`Error::TensorDtype`] or
    /// [`Error::NotFinite`] for an invalid tensor.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = &*cache::resolve(folder.as_ref())?;
        let rules = Rules::parse(&read_json_object(&folder.join("adapter_config.json"))?)?;
        let path = folder.join("adapter_model.safetensors");
        if !path.exists() && folder.join("adapter_model.bin").exists() {
            return Err(Error::Unsupported {
                what: format!(
                    "{}: a pickled adapter_model.bin (save it as safetensors)",
                    folder.display()
                ),
            });
        }
        let file = Checkpoint::open(&path)?;
        let mut reader = Reader {
            adapter: Self {
                layers: BTreeMap::new(),
                base_model: rules.base_model.clone(),
                sparse: rules.sparse,
                quantization_aware: rules.quantization_aware,
                changes: BaseChanges {
                    tied: rules.tied,
                    ..BaseChanges::default()
                },
            },
            names: BTreeMap::new(),
            file: &file,
            rules: &rules,
        };
        let modules = by_module(file.names())?;
        let mut unused = Vec::new();
        for (module, parts) in &modules {
            if !reader.module(module, parts)? {
                unused.push(*module);
            }
        }
        let mut adapter = reader.adapter;
        adapter.finish(&rules, &unused)?;
        if adapter.layers.is_empty() && adapter.changes.is_empty() {
            let reason = match unused.is_empty() {
                true => "no LoRA tensor".to_string(),
                false => format!("`target_modules` names none of {}", listed(&unused)),
            };
            return Err(Error::invalid_file(&path, reason));
        }
        Ok(adapter)
    }

    /// Collects notices, and refuses what cannot be combined.
    fn finish(&mut self, rules: &Rules, unused: &[&str]) -> Result<()> {
        let changes = &mut self.changes;
        changes.notices = rules.notices.clone();
        if !unused.is_empty() {
            changes.notices.push(format!(
                "the adapter's tensors of {} are not applied, because the config does not name \
                 them in `target_modules`, or excludes them",
                listed(unused)
            ));
        }
        for name in rules.targets.saved() {
            let of_module = |(tensor, _): (&String, _)| {
                let module = tensor.rsplit_once('.').map(|(module, _)| module);
                module.is_some_and(|module| module.ends_with(name.as_str()))
            };
            if !changes.whole().any(of_module) {
                changes.notices.push(format!(
                    "`modules_to_save` names `{name}`, of which no tensor is stored"
                ));
            }
        }
        // Embeddings never have such an initialization.
        if self.layers.keys().any(|module| module != EMBEDDING_MODULE) {
            changes.init = rules.init;
        }
        let trained_under_base = self.sparse || self.quantization_aware;
        if trained_under_base && let Some(what) = changes.what() {
            return Err(Error::Unsupported {
                what: format!("a sparse or quantization-aware adapter with {what}"),
            });
        }
        Ok(())
    }
}

/// The number of modules and the names of the first ones.
fn listed(modules: &[&str]) -> String {
    let first: Vec<String> = modules
        .iter()
        .take(N_NAMED)
        .map(|module| format!("`{module}`"))
        .collect();
    let more = match modules.len() > N_NAMED {
        true => ", ...",
        false => "",
    };
    let what = match modules.len() {
        1 => "module",
        _ => "modules",
    };
    format!("{} {what} ({}{more})", modules.len(), first.join(", "))
}

/// Collects what a file holds.
struct Reader<'a> {
    adapter: LoraAdapter,
    /// Paths in the file by the paths in a plain text model.
    names: BTreeMap<String, String>,
    file: &'a Checkpoint,
    rules: &'a Rules,
}

impl Reader<'_> {
    /// Reads the tensors of a module. Returns whether all of them are used.
    fn module(&mut self, module: &str, parts: &Parts<'_>) -> Result<bool> {
        let plain = plain_name(&format!("{module}."))
            .trim_end_matches('.')
            .to_string();
        if let Some(other) = self.names.insert(plain.clone(), module.into()) {
            let reason = format!("two adapters for `{plain}`, as `{other}` and as `{module}`");
            return Err(Error::invalid_file(self.file.path(), reason));
        }
        for (part, name) in parts {
            match part {
                Part::Base(field) | Part::Original(field) => {
                    self.whole(&plain, *field, name, false)?;
                }
                Part::Whole(field) => {
                    let own = self.rules.targets.saves(module);
                    self.whole(&plain, *field, name, own)?;
                }
                Part::Copy(field) => match parts.get(&Part::Whole(*field)) {
                    None => self.whole(&plain, *field, name, true)?,
                    // PEFT stores both where it saves embeddings, and reads the other.
                    Some(other) if self.file.same(name, other)? => {}
                    Some(other) => {
                        let reason = format!("`{name}` and `{other}` are one thing, and differ");
                        return Err(Error::invalid_file(self.file.path(), reason));
                    }
                },
                Part::Tokens => self.tokens(module, &plain, name)?,
                _ => {}
            }
        }
        let pair = [Part::A, Part::EmbeddingA]
            .iter()
            .any(|a| parts.contains_key(a));
        let of_pair = |part: &Part| {
            matches!(
                part,
                Part::A
                    | Part::B
                    | Part::BBias
                    | Part::EmbeddingA
                    | Part::EmbeddingB
                    | Part::Magnitude
            )
        };
        if !pair {
            // A tensor of a pair alone.
            return match parts.iter().find(|(part, _)| of_pair(part)) {
                None => Ok(true),
                Some((part, _)) => Err(Error::MissingTensor {
                    path: self.file.path().to_path_buf(),
                    tensor: match part {
                        Part::EmbeddingB => format!("{PREFIX}{module}.lora_embedding_A"),
                        _ => format!("{PREFIX}{module}.lora_A.weight"),
                    },
                }),
            };
        }
        // A path that is the model's and one that is the text model's may both be meant.
        let targets = &self.rules.targets;
        if !targets.has(module) && !targets.has(&plain) && !self.tied_to_target(&plain) {
            return Ok(false);
        }
        let weights = self.pair(module, parts)?;
        let changes = &mut self.adapter.changes;
        match (self.rules.dora, parts.get(&Part::Magnitude)) {
            (true, Some(name)) => {
                let magnitudes = vector(self.file, name)?;
                changes.magnitudes.insert(plain.clone(), magnitudes);
            }
            (false, None) => {}
            (true, None) => {
                return Err(Error::MissingTensor {
                    path: self.file.path().to_path_buf(),
                    tensor: format!("{PREFIX}{module}.lora_magnitude_vector"),
                });
            }
            (false, Some(name)) => {
                let reason = format!("not true, but there is `{name}` (DoRA)");
                return Err(bad_field("use_dora", reason));
            }
        }
        if let Some(name) = parts.get(&Part::BBias) {
            if self.rules.dora {
                return Err(Error::Unsupported {
                    what: format!("`use_dora` with a bias of LoRA (`{name}`)"),
                });
            }
            let mut bias = vector(self.file, name)?;
            bias.iter_mut().for_each(|b| *b *= weights.scale());
            changes.biases.insert(plain.clone(), bias);
        }
        self.adapter.layers.insert(plain, weights);
        Ok(true)
    }

    /// Whether a module is the embedding or head of a model in which they are trained as one, and
    /// the other of them has a pair.
    fn tied_to_target(&self, plain: &str) -> bool {
        let [one, other] = [EMBEDDING_MODULE, Architecture::HEAD_LAYER];
        let targets = &self.rules.targets;
        self.rules.tied
            && ((plain == one && targets.has(other)) || (plain == other && targets.has(one)))
    }

    /// Reads a pair of factors.
    fn pair(&self, module: &str, parts: &Parts<'_>) -> Result<LoraWeights> {
        let embedding = parts.contains_key(&Part::EmbeddingA);
        let (a, b, b_name) = match embedding {
            true => (Part::EmbeddingA, Part::EmbeddingB, "lora_embedding_B"),
            false => (Part::A, Part::B, "lora_B.weight"),
        };
        let missing = || Error::MissingTensor {
            path: self.file.path().to_path_buf(),
            tensor: format!("{PREFIX}{module}.{b_name}"),
        };
        let a_name = parts.get(&a).ok_or_else(missing)?;
        let b_name = parts.get(&b).ok_or_else(missing)?;
        let &[rank, d_input] = self.file.info(a_name)?.shape.as_slice() else {
            let found = self.file.info(a_name)?.shape.clone();
            return Err(Error::TensorShape {
                tensor: (*a_name).into(),
                expected: vec![self.rules.rank, 0],
                found,
            });
        };
        let found = &self.file.info(b_name)?.shape;
        let d_output = match found.as_slice() {
            &[d_output, columns] if columns == rank => d_output,
            _ => {
                let expected = vec![found.first().copied().unwrap_or(0), rank];
                return Err(Error::TensorShape {
                    tensor: (*b_name).into(),
                    expected,
                    found: found.clone(),
                });
            }
        };
        let (expected, named) = self.rules.rank_of(module)?;
        // The authors' code cuts the tensors but keeps the config's rank, which determines the
        // scale. What an initialization took from the base has the config's rank.
        let cut = !named && (1..expected).contains(&rank) && self.rules.init == BaseInit::Unchanged;
        if rank != expected && !cut {
            return Err(Error::InvalidRank {
                layer: module.into(),
                found: rank,
                max: expected,
            });
        }
        let scale = self.rules.scale_of(module, expected);
        let a = self.file.load_matrix(a_name, [rank, d_input])?;
        let b = self.file.load_matrix(b_name, [d_output, rank])?;
        match embedding {
            // An embedding is `[vocab_size, d_model]`, and its product is transposed.
            true => LoraWeights::new(b.transposed(), a.transposed(), scale),
            false => LoraWeights::new(a, b, scale),
        }
    }

    /// Reads a parameter that is stored whole.
    fn whole(&mut self, plain: &str, field: Field, name: &str, own: bool) -> Result<()> {
        let stored = Stored {
            shape: self.file.info(name)?.shape.clone(),
            values: self.file.load_f32(name)?,
        };
        let target = format!("{plain}.{}", field.name());
        let changes = &mut self.adapter.changes;
        let tensors = match own {
            true => &mut changes.copies,
            false => &mut changes.tensors,
        };
        match tensors.insert(target, stored) {
            None => Ok(()),
            Some(_) => {
                let reason = format!("the {} of `{plain}` is stored twice", field.name());
                Err(Error::invalid_file(self.file.path(), reason))
            }
        }
    }

    /// Reads the rows of trained tokens.
    fn tokens(&mut self, module: &str, plain: &str, name: &str) -> Result<()> {
        let Some(tokens) = self.rules.tokens_of(module) else {
            let reason = format!("no tokens of `{module}`, of which rows are stored");
            return Err(bad_field("trainable_token_indices", reason));
        };
        let &[n, d_model] = self.file.info(name)?.shape.as_slice() else {
            return Err(Error::TensorShape {
                tensor: name.into(),
                expected: vec![tokens.len(), 0],
                found: self.file.info(name)?.shape.clone(),
            });
        };
        if n != tokens.len() {
            return Err(Error::TensorShape {
                tensor: name.into(),
                expected: vec![tokens.len(), d_model],
                found: vec![n, d_model],
            });
        }
        let rows = TokenRows {
            tokens: tokens.to_vec(),
            rows: self.file.load_matrix(name, [n, d_model])?,
        };
        self.adapter.changes.tokens.insert(plain.into(), rows);
        Ok(())
    }
}

/// Reads a tensor of one dimension.
fn vector(file: &Checkpoint, name: &str) -> Result<Vec<f32>> {
    match file.info(name)?.shape.as_slice() {
        [_] => file.load_f32(name),
        found => Err(Error::TensorShape {
            tensor: name.into(),
            expected: vec![found.iter().product()],
            found: found.to_vec(),
        }),
    }
}
