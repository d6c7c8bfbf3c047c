//! Keys and values of the tokens already seen.

use burn::tensor::Tensor;

use super::ops::AttentionMask;

/// One layer's keys and values, `[batch, n_kv_heads, room, head_dim]` each, of which the first `n_tokens` are held.
#[derive(Clone, Debug, Default)]
struct LayerCache {
    keys: Option<Tensor<4>>,
    values: Option<Tensor<4>>,
    n_tokens: usize,
}

/// The key/value cache of a decoder for one batch of sequences, for inference.
///
/// It keeps room for tokens to come, and grows by half where that is used up, so that appending a token writes that token alone
/// on a device that writes in place. A clone shares what it holds until one of the two appends.
#[derive(Clone, Debug, Default)]
#[doc(hidden)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    n_tokens: usize,
    left_pad: Option<Vec<usize>>,
}

/// `held`, or a copy with more room, where `new` stands after the first `len` tokens.
fn joined(held: Option<Tensor<4>>, len: usize, new: Tensor<4>) -> Tensor<4> {
    let Some(held) = held.filter(|_| len > 0) else {
        return new;
    };
    let [batch, n_heads, n, head_dim] = new.dims();
    if held.dims()[2] < len + n {
        // What lies in the room is never read: the tokens themselves will do.
        let held = held.narrow(2, 0, len);
        let room = held.clone().narrow(2, 0, len.div_ceil(2));
        return Tensor::cat(vec![held, new, room], 2);
    }
    held.slice_assign([0..batch, 0..n_heads, len..len + n, 0..head_dim], new)
}

impl KvCache {
    /// An empty cache of `n_layers` layers.
    pub fn new(n_layers: usize) -> Self {
        Self {
            layers: vec![LayerCache::default(); n_layers],
            n_tokens: 0,
            left_pad: None,
        }
    }

    /// An empty cache for a batch whose rows begin with that many padding tokens each.
    pub fn with_left_pad(n_layers: usize, left_pad: Vec<usize>) -> Self {
        Self {
            left_pad: Some(left_pad),
            ..Self::new(n_layers)
        }
    }

    /// Tokens held, padding included.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Which keys are visible, given the model's window.
    pub fn mask(&self, window: Option<usize>) -> AttentionMask {
        AttentionMask {
            window,
            left_pad: self.left_pad.clone(),
        }
    }

    /// Appends one layer's new keys and values and gives back all of that layer's.
    pub fn append(
        &mut self,
        layer: usize,
        keys: Tensor<4>,
        values: Tensor<4>,
    ) -> (Tensor<4>, Tensor<4>) {
        let slot = &mut self.layers[layer];
        let (before, all) = (slot.n_tokens, slot.n_tokens + keys.dims()[2]);
        let append = |held: &mut Option<Tensor<4>>, new: Tensor<4>| {
            // The only handle, so that it is written in place.
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

    /// Counts `n` tokens as seen, after every layer has appended them.
    pub fn advance(&mut self, n: usize) {
        self.n_tokens += n;
    }

    /// Forgets all tokens but the first `n_tokens`; nothing where it holds no more than that.
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
        // Clones are as they were, whatever was appended to the others since.
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
        // Forgotten tokens are written over.
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
