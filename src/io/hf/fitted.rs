//! The config that a checkpoint bears out. Where the two disagree, a notice or an error says so.

use super::config::HfConfig;
use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::io::tensors::{Checkpoint, DType};

/// Number of tensors that a sentence names.
const N_NAMED: usize = 3;

/// Ends of the names of tensors that change nothing: buffers that are computed, and scales of a
/// quantized key/value cache.
const BUFFERS: [&str; 6] = [
    "rotary_emb.inv_freq",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".kv_scale",
    ".prob_scale",
];

impl HfConfig {
    /// Checks that `checkpoint` has what the config asks for, like [`check`](Self::check), and
    /// returns the config as it holds for it:
    ///
    /// - Where two different matrices are stored for embedding and head, they are not tied.
    /// - Where all weights are plain numbers, they are not quantized.
    ///
    /// [`notices`](Self::notices) tells of both, and of tensors that are not used.
    ///
    /// # Errors
    /// Returns the errors of [`check`](Self::check). Returns [`Error::InvalidFile`] if there are
    /// tensors that belong to the model and that the config does not ask for, unless they are
    /// biases of zeros.
    pub fn fitted(&self, checkpoint: &Checkpoint) -> Result<Self> {
        let mut config = self.clone();
        config.drop_stale_quantization(checkpoint);
        config.untie_two_heads(checkpoint)?;
        config.check(checkpoint)?;
        config.judge_surplus(checkpoint)?;
        Ok(config)
    }

    /// Drops the settings of a quantization if all layers are stored as plain numbers.
    fn drop_stale_quantization(&mut self, checkpoint: &Checkpoint) {
        let method = match (self.quantization(), self.refused()) {
            (Some(config), _) => config.format().name().to_string(),
            (None, Some(what)) => what.to_string(),
            (None, None) => return,
        };
        let float = |dtype| matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16);
        let plain = self.arch().linears().iter().all(|layer| {
            let found = checkpoint.info(&format!("{}.weight", layer.name));
            found.is_ok_and(|info| {
                float(info.dtype) && info.shape == [layer.d_output, layer.d_input]
            })
        });
        if !plain {
            return;
        }
        *self = self.with_quantization(None);
        self.notice(format!(
            "`quantization_config` is not used, because all layers are stored as plain numbers: \
             {method}"
        ));
    }

    /// Gives the model a head of its own if one is stored that differs from the embedding.
    fn untie_two_heads(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let (embedding, head) = (Architecture::EMBEDDING, Architecture::HEAD);
        if !self.arch().tied || !checkpoint.contains(embedding) {
            return Ok(());
        }
        let codes = self
            .quantization()
            .is_some_and(|config| config.has_layer(checkpoint, Architecture::HEAD_LAYER));
        if !codes && (!checkpoint.contains(head) || checkpoint.same(embedding, head)?) {
            return Ok(());
        }
        self.untie();
        self.notice(format!(
            "the config says `tie_word_embeddings`, but `{embedding}` and `{head}` are stored and \
             differ; both are used"
        ));
        Ok(())
    }

    /// Judges the tensors that the config does not ask for.
    fn judge_surplus(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let arch = self.arch();
        let mut wanted: Vec<String> = arch.tensors().into_iter().map(|(name, _)| name).collect();
        wanted.push(self.embedding_name(checkpoint)?.into());
        if arch.tied {
            // It was compared with the embedding.
            wanted.push(Architecture::HEAD.into());
        }
        if let Some(config) = self.quantization() {
            let linears = arch.linears().into_iter().map(|layer| layer.name);
            let fused = arch.fused().into_iter().map(|fused| fused.name);
            let head = [Architecture::HEAD_LAYER.to_string()];
            for layer in linears.chain(fused).chain(head) {
                if config.has_layer(checkpoint, &layer) {
                    let weight = format!("{layer}.weight");
                    wanted.retain(|name| *name != weight);
                    wanted.extend(config.tensor_names(&layer));
                }
            }
        }
        wanted.sort_unstable();
        let known = |name: &str| {
            wanted
                .binary_search_by(|known| known.as_str().cmp(name))
                .is_ok()
        };
        let (mut of_model, mut others) = (Vec::new(), Vec::new());
        for name in checkpoint.names().filter(|name| !known(name)) {
            if BUFFERS.iter().any(|end| name.ends_with(end)) {
                continue;
            }
            if !self.is_of_model(name) {
                others.push(name);
            } else if !name.ends_with(".bias") || !checkpoint.is_zero(name)? {
                of_model.push(name);
            }
        }
        if !of_model.is_empty() {
            let reason = format!(
                "{} that would change the result, and that the config does not ask for",
                listed(&of_model)
            );
            return Err(Error::invalid_file(checkpoint.path(), reason));
        }
        if !others.is_empty() {
            let sentence = format!(
                "not used, since not part of the text model: {}",
                listed(&others)
            );
            self.notice(sentence);
        }
        Ok(())
    }

    /// Whether a tensor belongs to a module that the model has.
    fn is_of_model(&self, name: &str) -> bool {
        let n_blocks = self.arch().blocks.len();
        let block = || {
            let (block, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
            block.parse().ok()
        };
        let modules = [
            Architecture::EMBEDDING,
            Architecture::FINAL_NORM,
            Architecture::HEAD,
        ];
        let module = |name: &str| name.rsplit_once('.').map(|(module, _)| module.to_string());
        block().is_some_and(|block: usize| block < n_blocks)
            || modules.iter().any(|known| module(known) == module(name))
    }
}

/// The number of tensors and the names of the first ones.
fn listed(names: &[&str]) -> String {
    let first: Vec<String> = names
        .iter()
        .take(N_NAMED)
        .map(|name| format!("`{name}`"))
        .collect();
    let more = match names.len() > N_NAMED {
        true => ", ...",
        false => "",
    };
    let what = match names.len() {
        1 => "tensor",
        _ => "tensors",
    };
    format!("{} {what} ({}{more})", names.len(), first.join(", "))
}
