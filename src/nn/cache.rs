//! The key/value cache of the tokens already processed.

use burn::tensor::Tensor;

use super::ops::AttentionMask;
use crate::arch::Rope;

/// Keys and values of one layer, each `[batch, n_kv_heads, capacity, head_dim]`, of which the first
/// `n_tokens` are in use.
#[derive(Clone, Debug, Default)]
struct LayerCache {
    keys: Option<Tensor<4>>,
    values: Option<Tensor<4>>,
    n_tokens: usize,
}

/// The key/value cache of a decoder for one batch of sequences, for inference.
///
/// It reserves capacity for further tokens and grows by half when that is used up. Appending a
/// token therefore writes only that token on a device that writes in place. A clone shares its
/// contents until either of the two appends.
#[derive(Clone, Debug, Default)]
#[doc(hidden)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    n_tokens: usize,
    /// Length of the sequences for which the newest keys were or will be rotated.
    len: usize,
    left_pad: Option<Vec<usize>>,
}

/// Writes `new` behind the first `len` tokens, into `held` or into a copy with more capacity.
fn joined(held: Option<Tensor<4>>, len: usize, new: Tensor<4>) -> Tensor<4> {
    let Some(held) = held.filter(|_| len > 0) else {
        return new;
    };
    let [batch, n_heads, n, head_dim] = new.dims();
    if held.dims()[2] < len + n {
        // The reserved part is never read, so any values will do: it is filled with old tokens.
        let held = held.narrow(2, 0, len);
        let room = held.clone().narrow(2, 0, len.div_ceil(2));
        return Tensor::cat(vec![held, new, room], 2);
    }
    held.slice_assign([0..batch, 0..n_heads, len..len + n, 0..head_dim], new)
}

impl KvCache {
    /// Creates an empty cache for `n_layers` layers.
    pub fn new(n_layers: usize) -> Self {
        Self {
            layers: vec![LayerCache::default(); n_layers],
            n_tokens: 0,
            len: 0,
            left_pad: None,
        }
    }

    /// Creates an empty cache for a batch whose rows start with the given numbers of padding
    /// tokens.
    pub fn with_left_pad(n_layers: usize, left_pad: Vec<usize>) -> Self {
        Self {
            left_pad: Some(left_pad),
            ..Self::new(n_layers)
        }
    }

    /// Number of cached tokens, padding included.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Length of the sequences for which new keys are rotated, at least.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Prepares for new tokens of sequences that will have `len` tokens in all, padding included.
    /// If the cached keys were rotated otherwise than in such a sequence, drops all tokens. They
    /// must then be added again.
    pub fn begin(&mut self, len: usize, ropes: &[Rope]) {
        if ropes
            .iter()
            .any(|rope| rope.switches_between(self.len, len))
        {
            self.truncate(0);
        }
        self.len = len;
    }

    /// The attention mask of the cached batch, without a window.
    pub fn mask(&self) -> AttentionMask {
        AttentionMask {
            left_pad: self.left_pad.clone(),
            ..AttentionMask::default()
        }
    }

    /// Appends the new keys and values of one layer, and returns all keys and values of the layer.
    pub fn append(
        &mut self,
        layer: usize,
        keys: Tensor<4>,
        values: Tensor<4>,
    ) -> (Tensor<4>, Tensor<4>) {
        let slot = &mut self.layers[layer];
        let (before, all) = (slot.n_tokens, slot.n_tokens + keys.dims()[2]);
        let append = |held: &mut Option<Tensor<4>>, new: Tensor<4>| {
            // Taken out, so that this is the only handle and the tensor is written in place.
            let joined = joined(held.take(), before, new);
            *held = Some(joined.clone());
            if joined.dims()[2] == all {
                joined
            } else {
                joined.narrow(2, 0, all)
            }
        };
        let both = (
            append(&mut slot.keys, keys),
            append(&mut slot.values, values),
        );
        slot.n_tokens = all;
        both
    }

    /// Counts `n` tokens as processed, after every layer has appended them.
    pub fn advance(&mut self, n: usize) {
        self.n_tokens += n;
    }

    /// Drops all tokens but the first `n_tokens`. Has no effect if the cache holds no more.
    pub fn truncate(&mut self, n_tokens: usize) {
        self.n_tokens = self.n_tokens.min(n_tokens);
        for slot in &mut self.layers {
            slot.n_tokens = slot.n_tokens.min(n_tokens);
        }
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

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::nn::host_values;
    use burn::tensor::{Device, Distribution};

    #[test]
    fn what_was_appended_is_held_in_order() {
        let device = Device::flex();
        let random = |n: usize| Tensor::<4>::random([2, 3, n, 5], Distribution::Default, &device);
        let mut cache = KvCache::new(2);
        let mut held: Option<(Tensor<4>, Tensor<4>)> = None;
        let mut copies = Vec::new();
        for n in [4, 1, 1, 3, 1, 1, 1, 9, 1] {
            let (keys, values) = (random(n), random(n));
            let join = |old: Option<Tensor<4>>, new: &Tensor<4>| match old {
                Some(old) => Tensor::cat(vec![old, new.clone()], 2),
                None => new.clone(),
            };
            let (old_keys, old_values) = held.take().unzip();
            let want = (join(old_keys, &keys), join(old_values, &values));
            for layer in 0..2 {
                let (all_keys, all_values) = cache.append(layer, keys.clone(), values.clone());
                assert_eq!(all_keys.dims(), want.0.dims());
                assert_eq!(host_values(all_keys), host_values(want.0.clone()));
                assert_eq!(host_values(all_values), host_values(want.1.clone()));
            }
            cache.advance(n);
            copies.push((cache.clone(), want.clone()));
            held = Some(want);
        }
        // Clones are unchanged by what was appended to others since.
        for (copy, (keys, values)) in &copies {
            for _ in 0..2 {
                let (mut copy, new) = (copy.clone(), random(1));
                let n = copy.n_tokens();
                let (all_keys, all_values) = copy.append(1, new.clone(), new.clone());
                assert_eq!(
                    host_values(all_keys.narrow(2, 0, n)),
                    host_values(keys.clone())
                );
                assert_eq!(
                    host_values(all_values.clone().narrow(2, 0, n)),
                    host_values(values.clone())
                );
                assert_eq!(host_values(all_values.narrow(2, n, 1)), host_values(new));
            }
        }
        // Truncated tokens are overwritten.
        let (keys, _) = held.unwrap();
        cache.truncate(6);
        cache.truncate(60);
        assert_eq!(cache.n_tokens(), 6);
        let new = random(2);
        let (all, _) = cache.append(0, new.clone(), new.clone());
        assert_eq!(
            host_values(all),
            host_values(Tensor::cat(vec![keys.narrow(2, 0, 6), new], 2))
        );
    }
}
