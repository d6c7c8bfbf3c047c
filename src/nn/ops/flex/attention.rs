//! Causal attention on Flex. Blocks of queries are multiplied with the keys that they see, and the
//! backward pass recomputes the probabilities (the idea of FlashAttention, Dao et al., arXiv
//! 2205.14135, but with whole rows of scores, which fit into a CPU's cache).

use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::util::{floats, tensor};
use crate::arch::Scores;
use crate::kernels::Level;
use crate::kernels::disjoint::Disjoint;
use crate::kernels::gemm::{Matrix, Output, product};
use crate::kernels::rows;
use crate::nn::AttentionMask;

/// Maximum number of scores in one block, so that they stay in the second-level cache.
const BLOCK_SCORES: usize = 32 * 1024;
/// Maximum number of queries in a block. Smaller blocks skip more of the keys that come after a
/// query; larger ones make the products more efficient.
const BLOCK_QUERIES: usize = 64;
/// Number of multiplications below which a single thread is faster.
const SERIAL: usize = 64 * 1024;

/// The sizes of an attention operation.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    batch: usize,
    n_heads: usize,
    n_kv_heads: usize,
    seq_q: usize,
    seq_k: usize,
    head_dim: usize,
}

impl Sizes {
    /// Returns `None` if the tensors do not form an attention that the kernels support.
    pub(super) fn of(q: &FlexTensor, k: &FlexTensor, v: &FlexTensor) -> Option<Self> {
        let dims =
            |tensor: &FlexTensor| <[usize; 4]>::try_from(tensor.layout().shape().as_slice()).ok();
        let ([batch, n_heads, seq_q, head_dim], keys) = (dims(q)?, dims(k)?);
        let [batch_k, n_kv_heads, seq_k, head_dim_k] = keys;
        let fits = dims(v)? == keys && batch_k == batch && head_dim_k == head_dim && seq_k >= seq_q;
        let sizes = Sizes {
            batch,
            n_heads,
            n_kv_heads,
            seq_q,
            seq_k,
            head_dim,
        };
        let empty = [batch, n_heads, n_kv_heads, seq_q, head_dim].contains(&0);
        (fits && !empty && n_heads % n_kv_heads == 0).then_some(sizes)
    }

    /// Whether the saved sums and the gradient of the context have the right shapes.
    pub(super) fn fit(&self, log_sum_exp: &FlexTensor, grad: &FlexTensor) -> bool {
        log_sum_exp.layout().shape().as_slice() == [self.batch, self.n_heads, self.seq_q]
            && grad.layout().shape().as_slice() == [self.batch, self.seq_q, self.width()]
    }

    fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    fn width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    fn block(&self) -> usize {
        (BLOCK_SCORES / self.seq_k).clamp(8, BLOCK_QUERIES)
    }

    fn serial(&self) -> bool {
        self.batch * self.n_heads * self.seq_q * self.seq_k * self.head_dim < SERIAL
    }
}

/// The matrix `[seq, head_dim]` of one head in a tensor `[batch, n_heads, seq, head_dim]` with any
/// strides, starting at row `start`.
fn matrix_of_head(tensor: &FlexTensor, batch: usize, head: usize, start: usize) -> Matrix {
    let (values, layout) = (tensor.storage::<f32>(), tensor.layout());
    let strides = layout.strides();
    let offset = [batch, head, start]
        .into_iter()
        .zip(strides)
        .map(|(index, stride)| index as isize * stride);
    let offset = layout.start_offset() as isize + offset.sum::<isize>();
    Matrix {
        first: values.as_ptr().wrapping_offset(offset),
        row: strides[2],
        column: strides[3],
    }
}

/// A block of queries of one head. Its rows of scores cover the keys that any of its queries sees.
struct Block<'a> {
    sizes: Sizes,
    mask: &'a AttentionMask,
    batch: usize,
    first: usize,
    len: usize,
    keys: std::ops::Range<usize>,
}

/// Cuts the queries of a batch row into blocks, each as its first query and its length. A block
/// has queries of one example only, so that no product covers keys of another one.
fn blocks(sizes: &Sizes, mask: &AttentionMask, row: usize) -> Vec<(usize, usize)> {
    let mut blocks = Vec::new();
    let mut first = 0;
    while first < sizes.seq_q {
        let mut len = sizes.block().min(sizes.seq_q - first);
        if let Some(segments) = &mask.segments {
            let start = segments.start(row, first);
            let same =
                (first..first + len).take_while(|query| segments.start(row, *query) == start);
            len = same.count();
        }
        blocks.push((first, len));
        first += len;
    }
    blocks
}

impl<'a> Block<'a> {
    fn new(
        sizes: Sizes,
        mask: &'a AttentionMask,
        batch: usize,
        (first, len): (usize, usize),
    ) -> Self {
        let visible = |query| mask.visible(batch, query, sizes.seq_q, sizes.seq_k);
        let (start, end) = (visible(first).start, visible(first + len - 1).end);
        Self {
            sizes,
            mask,
            batch,
            first,
            len,
            keys: start.min(end)..end,
        }
    }

    /// Calls `row` with each query's index in the block, its row of `scores`, and the range of that
    /// row that the query sees.
    fn each_row(
        &self,
        scores: &mut [f32],
        mut row: impl FnMut(usize, &mut [f32], std::ops::Range<usize>),
    ) {
        for (query, scores) in scores.chunks_exact_mut(self.keys.len()).enumerate() {
            let visible = self.mask.visible(
                self.batch,
                self.first + query,
                self.sizes.seq_q,
                self.sizes.seq_k,
            );
            let start = visible.start.max(self.keys.start).min(self.keys.end) - self.keys.start;
            let end = visible.end.max(self.keys.start).min(self.keys.end) - self.keys.start;
            row(query, scores, start..end.max(start));
        }
    }

    fn products(&self) -> ([usize; 3], [usize; 3], [usize; 3]) {
        let (keys, head_dim) = (self.keys.len(), self.sizes.head_dim);
        (
            [self.len, keys, head_dim],
            [self.len, head_dim, keys],
            [keys, head_dim, self.len],
        )
    }
}

/// Sets a row to zero outside `visible`.
fn hide(row: &mut [f32], visible: &std::ops::Range<usize>) {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
}

fn resize(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

pub(super) fn forward(
    sizes: Sizes,
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    scores: Scores,
    mask: &AttentionMask,
) -> (FlexTensor, FlexTensor) {
    let (scale, softcap) = (scores.scale as f32, scores.softcap.map(|cap| cap as f32));
    let Sizes {
        batch,
        n_heads,
        seq_q,
        head_dim,
        ..
    } = sizes;
    let (of_context, of_sums) = (batch * seq_q * sizes.width(), batch * n_heads * seq_q);
    let mut context: Vec<f32> = Vec::with_capacity(of_context);
    let mut sums: Vec<f32> = Vec::with_capacity(of_sums);
    let out = Disjoint::uninit(&mut context.spare_capacity_mut()[..of_context]);
    let log_sum_exp = Disjoint::uninit(&mut sums.spare_capacity_mut()[..of_sums]);
    let mut tasks = Vec::new();
    for row in 0..batch {
        let blocks = blocks(&sizes, mask, row);
        let heads =
            (0..n_heads).flat_map(|head| blocks.iter().map(move |block| (row, head, *block)));
        tasks.extend(heads);
    }
    let level = Level::detect();
    let task = |buffer: &mut Vec<f32>, (row, head, queries): (usize, usize, (usize, usize))| {
        let block = Block::new(sizes, mask, row, queries);
        let first = block.first;
        let kv_head = head / sizes.group();
        let out_at =
            |query: usize| out.from((row * seq_q + query) * sizes.width() + head * head_dim);
        let sum_at = |query: usize| log_sum_exp.at((row * n_heads + head) * seq_q + query);
        if block.keys.is_empty() {
            for query in first..first + block.len {
                // SAFETY: `row`, `head` and `query` are below the sizes that `context` and `sums`
                // were allocated for, and no other task writes the rows of these queries.
                unsafe {
                    out_at(query).at(0).write_bytes(0, head_dim);
                    sum_at(query).write(0.0);
                }
            }
            return;
        }
        let scores = resize(buffer, block.len * block.keys.len());
        let (for_scores, for_queries, _) = block.products();
        let queries = matrix_of_head(q, row, head, first);
        let keys = matrix_of_head(k, row, kv_head, block.keys.start).transposed();
        // SAFETY: `Sizes::of` checked the shapes of `q`, `k` and `v`, so that the matrices stay
        // inside their storage, and `scores` was resized to `block.len * block.keys.len()`.
        unsafe {
            product(
                for_scores,
                queries,
                keys,
                Output::over(scores, block.keys.len()).times(scale),
                false,
            )
        };
        block.each_row(scores, |query, scores, visible| {
            hide(scores, &visible);
            if let Some(cap) = softcap {
                rows::softcap_in_place(level, &mut scores[visible.clone()], cap);
            }
            let sum = if visible.is_empty() {
                0.0
            } else {
                rows::softmax(level, &mut scores[visible])
            };
            // SAFETY: the index is below the number of queries that `sums` was allocated for, and
            // no other task writes it.
            unsafe { sum_at(first + query).write(sum) };
        });
        let weights = Matrix::rows(scores, block.keys.len());
        let values = matrix_of_head(v, row, kv_head, block.keys.start);
        // SAFETY: `values` stays inside its storage as above. `context` has room for `block.len`
        // rows at `first`, and no other task writes them.
        unsafe {
            product(
                for_queries,
                weights,
                values,
                Output::new(out_at(first), sizes.width()),
                false,
            )
        };
    };
    if sizes.serial() {
        let mut buffer = Vec::new();
        tasks.into_iter().for_each(|one| task(&mut buffer, one));
    } else {
        tasks.into_par_iter().for_each_init(Vec::new, task);
    }
    // SAFETY: the blocks of a row cover all its queries, so the tasks have written every row of every head.
    unsafe {
        context.set_len(of_context);
        sums.set_len(of_sums);
    }
    (
        tensor(context, Shape::from([batch, seq_q, sizes.width()])),
        tensor(sums, Shape::from([batch, n_heads, seq_q])),
    )
}

/// The slices that a task of the backward pass writes: gradients of queries, keys and values.
type Gradients<'a> = ((&'a mut [f32], &'a mut [f32]), &'a mut [f32]);

/// Gradients of `q`, `k` and `v`. `log_sum_exp` and `grad` must be contiguous. Each task handles a
/// key/value head of one batch row, whose gradient sums over every query of its group.
pub(super) fn backward(
    sizes: Sizes,
    [q, k, v]: [&FlexTensor; 3],
    log_sum_exp: &FlexTensor,
    grad: &FlexTensor,
    scores: Scores,
    mask: &AttentionMask,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let (scale, softcap) = (scores.scale as f32, scores.softcap.map(|cap| cap as f32));
    let Sizes {
        batch,
        n_heads,
        n_kv_heads,
        seq_q,
        seq_k,
        head_dim,
    } = sizes;
    let (level, group, width) = (Level::detect(), sizes.group(), sizes.width());
    let (log_sum_exp, grad) = (floats(log_sum_exp), floats(grad));
    let mut grad_q = vec![0.0; batch * n_heads * seq_q * head_dim];
    let mut grad_k = vec![0.0; batch * n_kv_heads * seq_k * head_dim];
    let mut grad_v = vec![0.0; batch * n_kv_heads * seq_k * head_dim];
    let task = |(weights, slopes): &mut (Vec<f32>, Vec<f32>),
                (index, ((grad_q, grad_k), grad_v)): (usize, Gradients<'_>)| {
        let (row, kv_head) = (index / n_kv_heads, index % n_kv_heads);
        let blocks = blocks(&sizes, mask, row);
        for (number, grad_q) in grad_q.chunks_exact_mut(seq_q * head_dim).enumerate() {
            let head = kv_head * group + number;
            for queries in &blocks {
                let block = Block::new(sizes, mask, row, *queries);
                let first = block.first;
                let n_keys = block.keys.len();
                if n_keys == 0 {
                    continue;
                }
                let weights = resize(weights, block.len * n_keys);
                let slopes = resize(slopes, block.len * n_keys);
                let (for_scores, for_queries, for_keys) = block.products();
                let queries = matrix_of_head(q, row, head, first);
                let keys = matrix_of_head(k, row, kv_head, block.keys.start);
                let values = matrix_of_head(v, row, kv_head, block.keys.start);
                let grads = Matrix::rows(
                    &grad[(row * seq_q + first) * width + head * head_dim..],
                    width,
                );
                let grad_q = &mut grad_q[first * head_dim..(first + block.len) * head_dim];
                let of_keys = block.keys.start * head_dim..block.keys.end * head_dim;
                let (grad_k, grad_v) = (&mut grad_k[of_keys.clone()], &mut grad_v[of_keys]);
                // SAFETY: `Sizes::of` checked the shapes of `q`, `k` and `v`, and `fit` that of
                // `grad`, so that the matrices stay inside their storage. `weights` and `slopes`
                // were resized to `block.len * n_keys`.
                unsafe {
                    product(
                        for_scores,
                        queries,
                        keys.transposed(),
                        Output::over(weights, n_keys).times(scale),
                        false,
                    );
                    product(
                        for_scores,
                        grads,
                        values.transposed(),
                        Output::over(slopes, n_keys),
                        false,
                    );
                }
                block.each_row(weights, |query, weights, visible| {
                    hide(weights, &visible);
                    let limited = softcap.map(|cap| {
                        rows::softcap_in_place(level, &mut weights[visible.clone()], cap);
                        (weights[visible.clone()].to_vec(), cap)
                    });
                    let sum = log_sum_exp[(row * n_heads + head) * seq_q + first + query];
                    rows::exp_shifted(level, &mut weights[visible.clone()], sum, 1.0);
                    let slopes = &mut slopes[query * n_keys..(query + 1) * n_keys];
                    hide(slopes, &visible);
                    let slopes = &mut slopes[visible.clone()];
                    rows::softmax_backward(level, &weights[visible], slopes);
                    if let Some((limited, cap)) = limited {
                        rows::softcap_backward(level, &limited, slopes, cap);
                    }
                });
                let (weights, slopes) =
                    (Matrix::rows(weights, n_keys), Matrix::rows(slopes, n_keys));
                // SAFETY: the operands are as above. `grad_q`, `grad_k` and `grad_v` were sliced to
                // the sizes of these products and belong to this task.
                unsafe {
                    product(
                        for_keys,
                        weights.transposed(),
                        grads,
                        Output::over(grad_v, head_dim).added(),
                        false,
                    );
                    product(
                        for_keys,
                        slopes.transposed(),
                        queries,
                        Output::over(grad_k, head_dim).times(scale).added(),
                        false,
                    );
                    product(
                        for_queries,
                        slopes,
                        keys,
                        Output::over(grad_q, head_dim).times(scale),
                        false,
                    );
                }
            }
        }
    };
    let (of_q, of_k) = (group * seq_q * head_dim, seq_k * head_dim);
    if sizes.serial() {
        let chunks = grad_q
            .chunks_mut(of_q)
            .zip(grad_k.chunks_mut(of_k))
            .zip(grad_v.chunks_mut(of_k));
        let mut buffers = Default::default();
        chunks
            .enumerate()
            .for_each(|chunk| task(&mut buffers, chunk));
    } else {
        let chunks = grad_q
            .par_chunks_mut(of_q)
            .zip(grad_k.par_chunks_mut(of_k))
            .zip(grad_v.par_chunks_mut(of_k));
        chunks.enumerate().for_each_init(Default::default, task);
    }
    let of_keys = Shape::from([batch, n_kv_heads, seq_k, head_dim]);
    (
        tensor(grad_q, Shape::from([batch, n_heads, seq_q, head_dim])),
        tensor(grad_k, of_keys.clone()),
        tensor(grad_v, of_keys),
    )
}
