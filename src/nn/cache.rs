//! Keys and values of the tokens already seen.

use burn::tensor::Tensor;

use super::ops::AttentionMask;

/// One layer's keys and values, `[batch, n_kv_heads, n_tokens, head_dim]` each.
#[derive(Clone, Debug, Default)]
struct LayerCache {
    keys: Option<Tensor<4>>,
    values: Option<Tensor<4>>,
}

/// The key/value cache of a decoder for one batch of sequences, for inference.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    n_tokens: usize,
    left_pad: Option<Vec<usize>>,
}

impl KvCache {
    /// An empty cache of `n_layers` layers.
    pub fn new(n_layers: usize) -> Self {
        Self { layers: vec![LayerCache::default(); n_layers], n_tokens: 0, left_pad: None }
    }

    /// An empty cache for a batch whose rows begin with that many padding tokens each.
    pub fn with_left_pad(n_layers: usize, left_pad: Vec<usize>) -> Self {
        Self { left_pad: Some(left_pad), ..Self::new(n_layers) }
    }

    /// Tokens held, padding included.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Which keys are visible, given the model's window.
    pub fn mask(&self, window: Option<usize>) -> AttentionMask {
        AttentionMask { window, left_pad: self.left_pad.clone() }
    }

    /// Appends one layer's new keys and values and gives back all of that layer's.
    pub fn append(&mut self, layer: usize, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let slot = &mut self.layers[layer];
        let join = |old: Option<Tensor<4>>, new: Tensor<4>| match old {
            Some(old) => Tensor::cat(vec![old, new], 2),
            None => new,
        };
        let keys = join(slot.keys.take(), keys);
        let values = join(slot.values.take(), values);
        slot.keys = Some(keys.clone());
        slot.values = Some(values.clone());
        (keys, values)
    }

    /// Counts `n` tokens as seen, after every layer has appended them.
    pub fn advance(&mut self, n: usize) {
        self.n_tokens += n;
    }

    /// Keeps only the given rows of the batch, in that order.
    pub fn select_rows(&mut self, rows: &[usize]) {
        if let Some(pad) = &mut self.left_pad {
            *pad = rows.iter().map(|row| pad[*row]).collect();
        }
        for slot in &mut self.layers {
            for tensor in [&mut slot.keys, &mut slot.values] {
                *tensor = tensor.take().map(|tensor| {
                    let device = tensor.device();
                    let rows: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
                    tensor.select(0, Tensor::from_data(rows.as_slice(), &device))
                });
            }
        }
    }
}
