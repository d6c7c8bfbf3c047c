//! Adapters of matrices that hold several linear layers, such as Phi-3's `qkv_proj`: split into
//! pairs for each layer, and stacked again.

use std::collections::BTreeMap;

use super::{LoraAdapter, LoraWeights, is_table};
use crate::arch::Fused;
use crate::error::{Error, Result};
use crate::io::hf::HfConfig;
use crate::linalg::Matrix;

impl LoraAdapter {
    /// Returns the pair of each linear layer of the blocks by its name. The pair of a matrix that
    /// holds several layers becomes a pair for each of them, with the same A and some of the rows
    /// of B. Ranks whose column of B is zero in these rows are left out.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] for a layer that the model does not have,
    /// [`Error::TensorShape`] with the shape of a product that does not fit, and
    /// [`Error::InvalidArgument`] if a layer has a pair of its own and one by its matrix.
    pub(crate) fn by_layer(&self, config: &HfConfig) -> Result<BTreeMap<String, LoraWeights>> {
        let mut shapes = BTreeMap::new();
        for layer in config.arch().linears() {
            shapes.insert(layer.name, [layer.d_output, layer.d_input]);
        }
        let fused = config.arch().fused();
        for matrix in &fused {
            shapes.insert(matrix.name.clone(), [matrix.d_output(), matrix.d_input]);
        }
        let mut layers = BTreeMap::new();
        let mut add = |name: &str, weights: LoraWeights| match layers.insert(name.into(), weights) {
            None => Ok(()),
            Some(_) => Err(Error::argument(
                "adapter",
                format!("two pairs for `{name}`"),
                "one, of its own or of the matrix that holds it",
            )),
        };
        for (name, weights) in self.layers.iter().filter(|(name, _)| !is_table(name)) {
            let Some(expected) = shapes.get(name) else {
                return Err(Error::UnknownLayer {
                    context: "LoRA adapter".into(),
                    layer: name.clone(),
                });
            };
            let found = [weights.d_output(), weights.d_input()];
            if found != *expected {
                return Err(Error::TensorShape {
                    tensor: format!("{name}.lora"),
                    expected: expected.to_vec(),
                    found: found.to_vec(),
                });
            }
            let Some(matrix) = fused.iter().find(|matrix| matrix.name == *name) else {
                add(name, weights.clone())?;
                continue;
            };
            let mut start = 0;
            for (layer, rows) in &matrix.parts {
                add(layer, weights.of_rows(start, *rows)?)?;
                start += rows;
            }
        }
        Ok(layers)
    }

    /// Replaces the pairs of layers that one matrix of the checkpoint holds by a pair for this
    /// matrix, which is what PEFT adapts. `rows` gives the number of output features of each layer.
    ///
    /// Pairs with the same A and scale keep this A. Otherwise the ranks add up: the rows of the A
    /// follow one another, and B is zero where a rank does not belong to the layer.
    pub(crate) fn stacked(
        mut self,
        config: &HfConfig,
        rows: impl Fn(&str) -> usize,
    ) -> Result<Self> {
        for matrix in config.arch().fused() {
            let parts: Vec<(usize, Option<LoraWeights>)> = matrix
                .parts
                .iter()
                .map(|(layer, _)| (rows(layer), self.layers.remove(layer)))
                .collect();
            if let Some(weights) = stack(&parts)? {
                self.layers.insert(matrix.name, weights);
            }
        }
        Ok(self)
    }
}

impl LoraWeights {
    /// Returns the pair of some of the output features, without ranks that do not reach them.
    fn of_rows(&self, start: usize, n: usize) -> Result<Self> {
        let b = |i: usize, k: usize| self.b.row(start + i)[k];
        let mut used: Vec<usize> = (0..self.rank())
            .filter(|k| (0..n).any(|i| b(i, *k) != 0.0))
            .collect();
        if used.is_empty() {
            used = (0..self.rank()).collect();
        }
        Self::new(
            Matrix::from_fn(used.len(), self.d_input(), |k, j| self.a.row(used[k])[j]),
            Matrix::from_fn(n, used.len(), |i, k| b(i, used[k])),
            self.scale,
        )
    }
}

/// Stacks the pairs of layers with the same input; a layer without a pair has only its number of
/// output features. Returns `None` if no layer has a pair.
fn stack(parts: &[(usize, Option<LoraWeights>)]) -> Result<Option<LoraWeights>> {
    let present = || parts.iter().filter_map(|(_, weights)| weights.as_ref());
    let Some(first) = present().next() else {
        return Ok(None);
    };
    let shared = present().all(|w| w.a == first.a && w.scale == first.scale);
    let rank = if shared {
        first.rank()
    } else {
        present().map(LoraWeights::rank).sum()
    };
    let mut a = Vec::with_capacity(rank * first.d_input());
    if shared {
        a.extend_from_slice(first.a.as_slice());
    } else {
        present().for_each(|w| a.extend_from_slice(w.a.as_slice()));
    }
    // One scale for all: what differs goes into B.
    let scale = if first.scale == 0.0 { 1.0 } else { first.scale };
    let d_output: usize = parts.iter().map(|(rows, _)| rows).sum();
    let mut b = Matrix::zeros(d_output, rank);
    let (mut row, mut column) = (0, 0);
    for (rows, weights) in parts {
        if let Some(weights) = weights {
            let factor = weights.scale / scale;
            for i in 0..weights.d_output().min(*rows) {
                let out = &mut b.row_mut(row + i)[column..column + weights.rank()];
                for (out, value) in out.iter_mut().zip(weights.b.row(i)) {
                    *out = if factor == 1.0 {
                        *value
                    } else {
                        factor * value
                    };
                }
            }
            if !shared {
                column += weights.rank();
            }
        }
        row += rows;
    }
    let a = Matrix::new(rank, first.d_input(), a)?;
    LoraWeights::new(a, b, scale).map(Some)
}

/// Returns the module path of each linear layer, or of the matrix that holds it.
pub(super) fn modules(config: &HfConfig) -> Vec<String> {
    let fused = config.arch().fused();
    let holder = |layer: &str| -> Option<&Fused> {
        let holds = |matrix: &&Fused| matrix.parts.iter().any(|(name, _)| name == layer);
        fused.iter().find(holds)
    };
    let mut modules: Vec<String> = config
        .arch()
        .linears()
        .into_iter()
        .map(|layer| holder(&layer.name).map_or(layer.name, |matrix| matrix.name.clone()))
        .collect();
    modules.dedup();
    modules
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const QKV: &str = "model.layers.1.self_attn.qkv_proj";
    const GATE_UP: &str = "model.layers.0.mlp.gate_up_proj";

    /// A config of Phi-3 with 4 heads of 2 features, 2 key/value heads, and MLPs of width 5.
    fn config() -> HfConfig {
        let config = json!({
            "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 8,
            "intermediate_size": 5, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 9, "max_position_embeddings": 16,
        });
        HfConfig::from_json(config.as_object().unwrap().clone()).unwrap()
    }

    /// A matrix of small numbers that are never zero and whose products are exact.
    fn matrix(rows: usize, cols: usize, salt: usize) -> Matrix {
        Matrix::from_fn(rows, cols, |i, j| {
            ((i * 7 + j * 3 + salt) % 11) as f32 - 5.25
        })
    }

    fn pair(rank: usize, rows: usize, scale: f32, salt: usize) -> LoraWeights {
        LoraWeights::new(matrix(rank, 8, salt), matrix(rows, rank, salt + 1), scale).unwrap()
    }

    fn adapter(layers: impl IntoIterator<Item = (&'static str, LoraWeights)>) -> LoraAdapter {
        let named = layers.into_iter().map(|(name, w)| (name.to_string(), w));
        LoraAdapter {
            layers: named.collect(),
            ..LoraAdapter::default()
        }
    }

    fn rows(config: &HfConfig) -> impl Fn(&str) -> usize {
        let layers = config.arch().linears();
        move |name| layers.iter().find(|l| l.name == name).unwrap().d_output
    }

    /// Returns the products of pairs, one below the other.
    fn deltas(pairs: &[&LoraWeights]) -> Vec<f32> {
        pairs.iter().flat_map(|w| w.delta().into_vec()).collect()
    }

    #[test]
    fn a_pair_of_a_matrix_becomes_pairs_of_its_layers_and_back() {
        let config = config();
        let whole = adapter([(QKV, pair(3, 16, 0.75, 1)), (GATE_UP, pair(2, 10, 1.5, 2))]);
        let layers = whole.by_layer(&config).unwrap();
        let named = |kind: &str| &layers[&format!("model.layers.1.self_attn.{kind}")];
        let parts = [named("q_proj"), named("k_proj"), named("v_proj")];
        assert_eq!(parts.map(LoraWeights::d_output), [8, 4, 4]);
        assert_eq!(deltas(&parts), whole.layers[QKV].delta().into_vec());
        assert_eq!(layers.len(), 5);
        let split = LoraAdapter {
            layers,
            ..LoraAdapter::default()
        };
        assert_eq!(split.stacked(&config, rows(&config)).unwrap(), whole);
    }

    #[test]
    fn pairs_of_different_ranks_and_scales_are_stacked_and_split_again() {
        let config = config();
        let (gate, up) = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj");
        let (q, v) = (
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.v_proj",
        );
        let before = adapter([
            (gate, pair(2, 5, 0.5, 3)),
            (up, pair(3, 5, 2.0, 4)),
            (q, pair(1, 8, 0.5, 5)),
            // The keys between queries and values have no pair.
            (v, pair(2, 4, 0.5, 6)),
        ]);
        let stacked = before.clone().stacked(&config, rows(&config)).unwrap();
        let ranks: Vec<_> = stacked
            .layers
            .iter()
            .map(|(name, w)| (name.as_str(), w.rank(), w.d_output()))
            .collect();
        assert_eq!(ranks, [(GATE_UP, 5, 10), (QKV, 3, 16)]);
        let mut after = stacked.by_layer(&config).unwrap();
        let expected = deltas(&[&before.layers[gate], &before.layers[up]]);
        assert_eq!(stacked.layers[GATE_UP].delta().into_vec(), expected);
        // The layer without a pair gets one that adds nothing; the others keep their ranks.
        let keys = after.remove("model.layers.1.self_attn.k_proj").unwrap();
        assert_eq!(keys.delta().count_zeros(), 4 * 8);
        for (name, weights) in &before.layers {
            assert_eq!(after[name].rank(), weights.rank(), "{name}");
            assert_eq!(after[name].delta(), weights.delta(), "{name}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let config = config();
        let error = |adapter: LoraAdapter| adapter.by_layer(&config).unwrap_err().to_string();
        let found = error(adapter([(QKV, pair(2, 15, 1.0, 1))]));
        assert!(found.contains(QKV) && found.contains("16"), "{found}");
        let q = "model.layers.1.self_attn.q_proj";
        let found = error(adapter([
            (QKV, pair(2, 16, 1.0, 1)),
            (q, pair(2, 8, 1.0, 1)),
        ]));
        assert!(found.contains(q), "{found}");
        let found = error(adapter([(
            "model.layers.2.mlp.gate_up_proj",
            pair(2, 10, 1.0, 1),
        )]));
        assert!(found.contains("model.layers.2.mlp.gate_up_proj"), "{found}");
    }

    #[test]
    fn the_modules_of_a_model_are_those_of_its_checkpoint() {
        let names = modules(&config());
        let block = |n: usize| {
            [
                "self_attn.qkv_proj",
                "self_attn.o_proj",
                "mlp.gate_up_proj",
                "mlp.down_proj",
            ]
            .map(|module| format!("model.layers.{n}.{module}"))
        };
        assert_eq!(names, [block(0), block(1)].concat());
    }
}
