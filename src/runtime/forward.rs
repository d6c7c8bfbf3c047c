//! The forward pass: computes on slices what the Burn decoder (`model::Decoder`) computes.
//!
//! Each matrix product is parallel internally. Between products, the work for one token is too
//! small to share between threads; the work for many tokens is split by rows.

use crate::arch::NormKind;
use crate::error::{Error, Result};
use crate::kernels::disjoint::Disjoint;
use crate::kernels::rows;
use crate::kernels::{self, Activations, Adapter, Level, Linear, Pool, Rows, RowsMut, Scratch};
use crate::progress::Progress;

use super::adapter::Active;
use super::attention::{Call, Heads, attend};
use super::cache::Cache;
use super::model::Weights;
use super::shape::{self, Shape};
use super::workspace::{Line, Workspace, bytes_of, grow};

/// Number of elements that justify a task of their own.
const TASK: usize = 16 * 1024;

/// A pass over the new tokens of one or several sequences.
pub(super) struct Pass<'a> {
    pub weights: &'a Weights,
    /// Settings of the rows, in order. Their subnets differ in nothing but ranks.
    pub settings: &'a [Setting<'a>],
    pub pool: &'a Pool,
    pub activations: Activations,
    /// Returns the cache of a sequence, which has room for its new tokens.
    pub caches: &'a (dyn Fn(usize) -> &'a Cache + Sync),
    /// Number of new tokens of each sequence.
    pub lens: &'a [usize],
    /// Asked between blocks whether to go on.
    pub progress: &'a dyn Progress,
}

/// A subnet with adapters, and the number of rows that it has.
#[derive(Clone, Copy)]
pub(super) struct Setting<'a> {
    pub rows: usize,
    pub shape: &'a Shape,
    /// Updates that take the place of the model's own adapters.
    pub active: Option<&'a Active>,
}

impl Setting<'_> {
    /// The low-rank update of a layer.
    fn update<'a>(&'a self, weights: &'a Weights, layer: usize) -> Result<Option<Adapter<'a>>> {
        let added = self.active.and_then(|active| active.of_layer(layer));
        let (own, rank) = (&weights.layers[layer].adapter, self.shape.ranks[layer]);
        Ok(match own {
            _ if added.is_some() => added,
            Some(adapter) if rank > 0 => Some(Adapter {
                a: adapter.a.get()?,
                bt: adapter.bt.get()?,
                rank,
                scale: shape::scale(&adapter.lora, rank),
            }),
            _ => None,
        })
    }
}

/// A layer of a pass, and the number of its active outputs.
#[derive(Clone, Copy)]
struct Layer {
    index: usize,
    outputs: usize,
}

/// Contiguous rows.
fn packed(values: &[f32], rows: usize, stride: usize) -> Rows<'_> {
    Rows {
        values: &values[..rows * stride],
        rows,
        stride,
    }
}

/// Contiguous rows, for writing.
fn packed_mut(values: &mut [f32], rows: usize, stride: usize) -> RowsMut<'_> {
    RowsMut {
        values: &mut values[..rows * stride],
        rows,
        stride,
    }
}

impl Pass<'_> {
    /// The subnet of the first rows, which all share but for the ranks.
    fn shape(&self) -> &Shape {
        self.settings[0].shape
    }

    /// Describes the active part of a layer to the kernels, with the update of a setting.
    fn linear<'s>(&'s self, layer: Layer, setting: Option<&'s Setting<'_>>) -> Result<Linear<'s>> {
        let stored = &self.weights.layers[layer.index];
        let bias = stored.bias.as_deref().map(|bias| &bias[..layer.outputs]);
        let adapter = match setting {
            Some(setting) => setting.update(self.weights, layer.index)?,
            None => None,
        };
        Ok(Linear {
            weight: stored.weight_at(self.shape().weights[layer.index]).get()?,
            outputs: layer.outputs,
            bias,
            adapter,
        })
    }

    fn linears<'s, const N: usize>(
        &'s self,
        layers: [Layer; N],
        setting: Option<&'s Setting<'_>>,
    ) -> Result<[Linear<'s>; N]> {
        let mut all = [self.linear(layers[0], setting)?; N];
        for (linear, layer) in all.iter_mut().zip(layers).skip(1) {
            *linear = self.linear(layer, setting)?;
        }
        Ok(all)
    }

    /// Applies several layers to the same inputs, whose rows have these settings. The weights are
    /// read once for all rows; if there are several settings, each then adds its updates to its
    /// rows.
    fn multiply<const N: usize>(
        &self,
        settings: &[Setting<'_>],
        layers: [Layer; N],
        x: Rows<'_>,
        inputs: usize,
        y: &mut [RowsMut<'_>; N],
        scratch: &mut Vec<Line>,
    ) -> Result<()> {
        let (pool, activations) = (self.pool, self.activations);
        let one = match settings {
            [one] => Some(one),
            _ => None,
        };
        let linears = self.linears(layers, one)?;
        let bytes = kernels::scratch_bytes(pool, &linears, x.rows, inputs, activations);
        grow(scratch, bytes.div_ceil(64), Line::ZERO)?;
        let mut memory = Scratch::new(bytes_of(scratch));
        kernels::forward(pool, &linears, x, inputs, y, activations, &mut memory)?;
        if one.is_some() {
            return Ok(());
        }
        let mut row = 0;
        for setting in settings {
            let linears = self.linears(layers, Some(setting))?;
            let rows = setting.rows;
            let x = Rows {
                values: &x.values[row * x.stride..],
                rows,
                ..x
            };
            let mut y = y.each_mut().map(|y| RowsMut {
                values: &mut y.values[row * y.stride..],
                rows,
                stride: y.stride,
            });
            let bytes = kernels::scratch_bytes(pool, &linears, rows, inputs, activations);
            grow(scratch, bytes.div_ceil(64), Line::ZERO)?;
            let mut memory = Scratch::new(bytes_of(scratch));
            kernels::add_updates(pool, &linears, x, inputs, &mut y, activations, &mut memory)?;
            row += rows;
        }
        Ok(())
    }

    /// Number of new tokens of all sequences together.
    fn rows(&self) -> usize {
        self.lens.iter().sum()
    }

    /// Runs the blocks. `tokens` holds the tokens of the first sequence, then those of the next,
    /// and so on; all must be in the vocabulary. The residual stream is left in `work.x`. The keys
    /// and values are in the caches, which do not count the new tokens yet.
    pub fn blocks(&self, tokens: &[u32], work: &mut Workspace) -> Result<()> {
        let (config, rows) = (&self.weights.config, self.rows());
        let (d_model, scale) = (config.hidden_size(), config.arch().embedding_scale());
        work.reserve(config, &self.weights.ropes, rows)?;
        let embedding = self.weights.embedding.get()?;
        let places = self.lens.iter().enumerate();
        let places = places.flat_map(|(seq, len)| (0..*len).map(move |at| (seq, at)));
        for ((row, token), (seq, at)) in tokens.iter().enumerate().zip(places) {
            let x = &mut work.x[row * d_model..(row + 1) * d_model];
            embedding.dequantize_rows(*token as usize, x)?;
            if scale != 1.0 {
                x.iter_mut().for_each(|x| *x *= scale);
            }
            let cache = (self.caches)(seq);
            let (position, len) = (cache.n_tokens() + at, cache.len());
            for (rope, (cos, sin)) in self.weights.ropes.iter().zip(&mut work.rotations) {
                let range = row * rope.half()..(row + 1) * rope.half();
                rope.rotation_at(position, len, &mut cos[range.clone()], &mut sin[range]);
            }
        }
        for (block, dims) in self.shape().blocks.iter().enumerate() {
            if self.progress.is_interrupted() {
                let task = "a forward pass".to_string();
                return Err(Error::Interrupted { task });
            }
            let [attention, mlp] = self.weights.first[block];
            if let Some(first) = attention.filter(|_| dims.has_attention()) {
                self.attention(block, first, work)?;
            }
            if let Some(first) = mlp.filter(|_| dims.has_mlp()) {
                self.mlp(block, first, work)?;
            }
        }
        Ok(())
    }

    fn attention(&self, block: usize, first: usize, work: &mut Workspace) -> Result<()> {
        let (config, dims, rows) = (
            &self.weights.config,
            self.shape().blocks[block],
            self.rows(),
        );
        let (d_model, head_dim) = (config.hidden_size(), config.head_dim());
        let (queries, keys) = (dims.n_heads * head_dim, dims.n_kv_heads * head_dim);
        self.norm(block, NormKind::Attention, work);
        let layer = |at, outputs| Layer {
            index: first + at,
            outputs,
        };
        let layers = [layer(0, queries), layer(1, keys), layer(2, keys)];
        let mut y = [
            packed_mut(&mut work.a, rows, queries),
            packed_mut(&mut work.b, rows, keys),
            packed_mut(&mut work.c, rows, keys),
        ];
        self.multiply(
            self.settings,
            layers,
            packed(&work.normed, rows, d_model),
            d_model,
            &mut y,
            &mut work.scratch,
        )?;
        let positions = config.arch().positions(block);
        let heads = Heads {
            n_heads: dims.n_heads,
            n_kv_heads: dims.n_kv_heads,
            head_dim,
            window: positions.window,
            scores: config.arch().scores,
            norms: [NormKind::Q, NormKind::K].map(|kind| self.weights.gain(block, kind)),
            norm_eps: config.rms_norm_eps() as f32,
        };
        let rotation = match positions.rope.and_then(|rope| {
            let (cos, sin) = work.rotations.get(rope)?;
            Some((&cos[..], &sin[..], self.weights.ropes.get(rope)?.half()))
        }) {
            Some(rotation) => rotation,
            None => (&[][..], &[][..], 0),
        };
        let (q, k, out) = (
            Disjoint::new(&mut work.a),
            Disjoint::new(&mut work.b),
            Disjoint::new(&mut work.context),
        );
        // Sequences with the same number of new tokens are attended to together.
        let (mut seq, mut row) = (0, 0);
        for same in self.lens.chunk_by(|a, b| a == b) {
            let (n_seqs, n) = (same.len(), same[0]);
            let first = seq;
            attend(
                self.pool,
                &Call {
                    heads,
                    block,
                    n_seqs,
                    n,
                    row,
                    caches: &|seq| (self.caches)(first + seq),
                    q,
                    k,
                    v: &work.c,
                    rotation,
                    out,
                    level: Level::detect(),
                },
            );
            (seq, row) = (seq + n_seqs, row + n_seqs * n);
        }
        let out = (block, NormKind::AttentionOut);
        self.add_product(first + 3, queries, out, work, |work| &mut work.context)
    }

    fn mlp(&self, block: usize, first: usize, work: &mut Workspace) -> Result<()> {
        let (d_model, d_mlp, rows) = (
            self.weights.config.hidden_size(),
            self.shape().blocks[block].d_mlp,
            self.rows(),
        );
        self.norm(block, NormKind::Mlp, work);
        let layers = [0, 1].map(|at| Layer {
            index: first + at,
            outputs: d_mlp,
        });
        let mut y = [
            packed_mut(&mut work.a, rows, d_mlp),
            packed_mut(&mut work.b, rows, d_mlp),
        ];
        self.multiply(
            self.settings,
            layers,
            packed(&work.normed, rows, d_model),
            d_model,
            &mut y,
            &mut work.scratch,
        )?;
        let (gate, up, level) = (Disjoint::new(&mut work.a), &work.b, Level::detect());
        let activation = self.weights.config.arch().activation;
        self.in_parts(rows * d_mlp, 1, |range| {
            // SAFETY: the ranges given to the tasks do not overlap.
            let gate = unsafe { gate.part(range.clone()) };
            rows::gated_in_place(level, activation, gate, &up[range]);
        });
        let out = (block, NormKind::MlpOut);
        self.add_product(first + 2, d_mlp, out, work, |work| &mut work.a)
    }

    /// Adds a layer's output to the residual stream, normalized if the family has the norm.
    fn add_product(
        &self,
        layer: usize,
        inputs: usize,
        (block, norm): (usize, NormKind),
        work: &mut Workspace,
        input: impl Fn(&mut Workspace) -> &mut Vec<f32>,
    ) -> Result<()> {
        let (d_model, rows) = (self.weights.config.hidden_size(), self.rows());
        let layers = [Layer {
            index: layer,
            outputs: d_model,
        }];
        // Take the input out during the call, so that the other buffers can be borrowed at the same
        // time.
        let x = std::mem::take(input(work));
        let mut y = [packed_mut(&mut work.added, rows, d_model)];
        let done = self.multiply(
            self.settings,
            layers,
            packed(&x, rows, inputs),
            inputs,
            &mut y,
            &mut work.scratch,
        );
        *input(work) = x;
        done?;
        if let Some(gain) = self.weights.gain(block, norm) {
            let (added, eps) = (
                Disjoint::new(&mut work.added),
                self.weights.config.rms_norm_eps(),
            );
            self.in_parts(rows, d_model, |range| {
                // SAFETY: the ranges given to the tasks do not overlap.
                let added = unsafe { added.part(range.start * d_model..range.end * d_model) };
                rows::rms_norm_in_place(Level::detect(), added, gain, eps as f32);
            });
        }
        let (x, added) = (Disjoint::new(&mut work.x), &work.added);
        self.in_parts(rows * d_model, 1, |range| {
            // SAFETY: the ranges given to the tasks do not overlap.
            let x = unsafe { x.part(range.clone()) };
            x.iter_mut()
                .zip(&added[range])
                .for_each(|(x, added)| *x += added);
        });
        Ok(())
    }

    /// Normalizes the residual stream into `work.normed`.
    fn norm(&self, block: usize, kind: NormKind, work: &mut Workspace) {
        // Every sub-block has its norm: `Weights::new` checked that.
        let Some(gain) = self.weights.gain(block, kind) else {
            return;
        };
        let (out, x, eps, level) = (
            Disjoint::new(&mut work.normed),
            &work.x,
            self.weights.config.rms_norm_eps() as f32,
            Level::detect(),
        );
        self.in_parts(self.rows(), gain.len(), |range| {
            let range = range.start * gain.len()..range.end * gain.len();
            // SAFETY: the ranges given to the tasks do not overlap.
            let out = unsafe { out.part(range.clone()) };
            rows::rms_norm(level, &x[range], gain, eps, rows::as_uninit(out));
        });
    }

    /// Calls `f` on ranges that together cover `0..n`, in parallel if there is enough work.
    /// `weight` is the number of elements per item.
    fn in_parts(&self, n: usize, weight: usize, f: impl Fn(std::ops::Range<usize>) + Sync) {
        let part = (TASK / weight).max(1);
        if n <= 2 * part {
            return f(0..n);
        }
        self.pool.for_each(n.div_ceil(part), |_, task| {
            f(task * part..((task + 1) * part).min(n))
        });
    }

    /// Computes the logits of the rows `wanted`, in ascending order, from the residual stream.
    ///
    /// # Shapes
    /// - `logits`: `[wanted, vocab_size]`
    pub fn logits(
        &self,
        wanted: impl ExactSizeIterator<Item = usize>,
        work: &mut Workspace,
        logits: &mut [f32],
    ) -> Result<()> {
        let (config, head) = (&self.weights.config, self.weights.layers.len() - 1);
        let (d_model, vocab_size, eps) = (
            config.hidden_size(),
            config.vocab_size(),
            config.rms_norm_eps() as f32,
        );
        let n = wanted.len();
        if logits.len() != n * vocab_size {
            return Err(Error::ShapeMismatch {
                what: "logits".into(),
                expected: vec![n, vocab_size],
                found: vec![logits.len()],
            });
        }
        // The settings of the wanted rows, each with the end of its rows.
        let several = self.settings.len() > 1;
        let mut settings = if several {
            self.settings.to_vec()
        } else {
            Vec::new()
        };
        settings.iter_mut().for_each(|setting| setting.rows = 0);
        let (mut at, mut end) = (0, self.settings[0].rows);
        for (row, normed) in wanted.zip(work.normed.chunks_exact_mut(d_model)) {
            if several {
                while row >= end {
                    at += 1;
                    end += self.settings[at].rows;
                }
                settings[at].rows += 1;
            }
            rows::rms_norm(
                Level::detect(),
                &work.x[row * d_model..(row + 1) * d_model],
                &self.weights.final_gain,
                eps,
                rows::as_uninit(normed),
            );
        }
        let layers = [Layer {
            index: head,
            outputs: vocab_size,
        }];
        let x = packed(&work.normed, n, d_model);
        settings.retain(|setting| setting.rows > 0);
        self.multiply(
            if several { &settings } else { self.settings },
            layers,
            x,
            d_model,
            &mut [packed_mut(logits, n, vocab_size)],
            &mut work.scratch,
        )?;
        if let Some(cap) = config.arch().logit_softcap {
            let (logits, cap) = (Disjoint::new(logits), cap as f32);
            self.in_parts(n * vocab_size, 1, |range| {
                // SAFETY: the ranges given to the tasks do not overlap.
                let logits = unsafe { logits.part(range) };
                rows::softcap_in_place(Level::detect(), logits, cap);
            });
        }
        Ok(())
    }
}
