//! Portable definitions of the operations, in terms of operations that every backend has.

use std::ops::{Add, Div, Mul, Sub};

use burn::backend::tensor::{BoolTensor, FloatTensor, IndexingUpdateOp, IntTensor};
use burn::backend::{Backend, TensorMetadata, get_device_settings};
use burn::tensor::{DType, FloatDType, Shape, Slice, TensorData};

use super::extension::DecoderOps;
use super::terms::{GridTerm, Head, LoraTerm, Teacher, Weight};
use crate::arch::{Activation, Scores};
use crate::nn::{AttentionMask, Dropout, StoredWeight};

/// A backend's tensor with operators, so that formulas read like mathematics.
struct Val<B: Backend>(FloatTensor<B>);

impl<B: Backend> Clone for Val<B> {
    fn clone(&self) -> Self {
        Val(self.0.clone())
    }
}

macro_rules! binary {
    ($trait:ident, $method:ident, $op:ident, $scalar_op:ident) => {
        impl<B: Backend> $trait for Val<B> {
            type Output = Self;
            fn $method(self, other: Self) -> Self {
                Val(B::$op(self.0, other.0))
            }
        }
        impl<B: Backend> $trait<f64> for Val<B> {
            type Output = Self;
            fn $method(self, other: f64) -> Self {
                Val(B::$scalar_op(self.0, other.into()))
            }
        }
    };
}
binary!(Add, add, float_add, float_add_scalar);
binary!(Sub, sub, float_sub, float_sub_scalar);
binary!(Mul, mul, float_mul, float_mul_scalar);
binary!(Div, div, float_div, float_div_scalar);

impl<B: Backend> Val<B> {
    fn dims<const D: usize>(&self) -> [usize; D] {
        self.0.shape().dims()
    }

    fn reshape<const D: usize>(self, dims: [usize; D]) -> Self {
        Val(B::float_reshape(self.0, Shape::from(dims)))
    }

    fn swap_dims(self, a: usize, b: usize) -> Self {
        Val(B::float_swap_dims(self.0, a, b))
    }

    fn matmul(self, other: Self) -> Self {
        Val(B::float_matmul(self.0, other.0))
    }

    fn mean_last(self) -> Self {
        let dim = self.0.rank() - 1;
        Val(B::float_mean_dim(self.0, dim))
    }

    fn sum_dim(self, dim: usize) -> Self {
        Val(B::float_sum_dim(self.0, dim))
    }

    fn exp(self) -> Self {
        Val(B::float_exp(self.0))
    }

    /// `ln(sum(exp(self)))` over `dim`, whose size becomes 1.
    fn log_sum_exp(self, dim: usize) -> Self {
        self.exponentials(dim).2
    }

    /// The terms of a softmax over `dim`, scaled so that the largest is 1, their sum, and
    /// `ln(sum(exp(self)))`. The quotient of the first two is exact for large `self`;
    /// `exp(self - ln(sum(exp(self))))` is not.
    fn exponentials(self, dim: usize) -> (Self, Self, Self) {
        let max = Val::<B>(B::float_max_dim(self.0.clone(), dim));
        let terms = (self - max.clone()).exp();
        let sum = terms.clone().sum_dim(dim);
        (terms, sum.clone(), Val::<B>(B::float_log(sum.0)) + max)
    }

    /// The features of the last of four dimensions that are rotated, in two halves of `half`, and
    /// the rest, if there is one.
    fn halves(self, half: usize) -> (Self, Self, Option<Self>) {
        let [a, b, c, width] = self.dims();
        let slice = |range: std::ops::Range<usize>| {
            let whole = [0..a, 0..b, 0..c, range].map(Slice::from);
            Val(B::float_slice(self.0.clone(), &whole))
        };
        let rest = (2 * half < width).then(|| slice(2 * half..width));
        (slice(0..half), slice(half..2 * half), rest)
    }

    /// Joins the parts of [`halves`](Self::halves).
    fn joined(low: Self, high: Self, rest: Option<Self>) -> Self {
        let parts = [low, high].into_iter().chain(rest);
        Val(B::float_cat(parts.map(|part| part.0).collect(), 3))
    }
}

/// `1 / sqrt(mean(x^2) + eps)`, with a last dimension of 1.
fn inverse_rms<B: Backend>(x: Val<B>, eps: f64) -> Val<B> {
    Val(B::float_recip(B::float_sqrt(
        ((x.clone() * x).mean_last() + eps).0,
    )))
}

/// A row as a tensor that broadcasts over `rank` dimensions.
fn row<B: Backend>(weight: Val<B>, rank: usize) -> Val<B> {
    let [width] = weight.dims();
    let mut dims = vec![1; rank];
    dims[rank - 1] = width;
    Val(B::float_reshape(weight.0, Shape::from(dims)))
}

pub(super) fn rms_norm<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    eps: f64,
) -> FloatTensor<B> {
    let (x, weight) = (Val::<B>(x), Val::<B>(weight));
    let rank = x.0.rank();
    let inverse = inverse_rms(x.clone(), eps);
    (x * inverse * row(weight, rank)).0
}

pub(super) fn rms_norm_backward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    eps: f64,
) -> FloatTensor<B> {
    let (x, weight, grad) = (Val::<B>(x), Val::<B>(weight), Val::<B>(grad));
    let rank = x.0.rank();
    let inverse = inverse_rms(x.clone(), eps);
    let normed = x * inverse.clone();
    let grad = grad * row(weight, rank);
    let along = (grad.clone() * normed.clone()).mean_last();
    ((grad - normed * along) * inverse).0
}

pub(super) fn rms_norm_backward_weight<B: Backend>(
    x: FloatTensor<B>,
    grad: FloatTensor<B>,
    eps: f64,
) -> FloatTensor<B> {
    let (x, grad) = (Val::<B>(x), Val::<B>(grad));
    let shape = x.0.shape();
    let width = shape[shape.num_dims() - 1];
    let rows = shape.num_elements() / width.max(1);
    let normed = x.clone() * inverse_rms(x, eps);
    (grad * normed)
        .reshape([rows, width])
        .sum_dim(0)
        .reshape([width])
        .0
}

/// The activation and its derivative.
fn activation<B: Backend>(x: Val<B>, activation: Activation) -> (Val<B>, Val<B>) {
    match activation {
        Activation::Silu => {
            let sigmoid = Val::<B>(B::sigmoid(x.0.clone()));
            let silu = x * sigmoid.clone();
            // silu' = sigmoid + silu * (1 - sigmoid)
            let slope = sigmoid.clone() + silu.clone() - silu.clone() * sigmoid;
            (silu, slope)
        }
        Activation::GeluTanh => {
            const CUBE: f64 = 0.044_715;
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let square = x.clone() * x.clone();
            let inner = (x.clone() * root) * (square.clone() * CUBE + 1.0);
            let tanh = Val::<B>(B::float_tanh(inner.0));
            let half = (tanh.clone() + 1.0) * 0.5;
            let value = x.clone() * half.clone();
            let inner_slope = (square * (3.0 * CUBE) + 1.0) * root;
            let rest = (tanh.clone() * tanh) * -1.0 + 1.0;
            (value, half + x * 0.5 * rest * inner_slope)
        }
    }
}

pub(super) fn gated<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    function: Activation,
) -> FloatTensor<B> {
    if function == Activation::Silu {
        // Without the derivative, which costs more than the function.
        let sigmoid = Val::<B>(B::sigmoid(gate.clone()));
        return (Val(gate) * sigmoid * Val(up)).0;
    }
    (activation::<B>(Val(gate), function).0 * Val(up)).0
}

pub(super) fn gated_backward<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    grad: FloatTensor<B>,
    function: Activation,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (up, grad) = (Val::<B>(up), Val(grad));
    let (value, slope) = activation::<B>(Val(gate), function);
    ((grad.clone() * up * slope).0, (grad * value).0)
}

/// `x` as a matrix whose rows are along the last dimension.
fn rows<B: Backend>(x: Val<B>) -> Val<B> {
    let shape = x.0.shape();
    let width = shape[shape.num_dims() - 1];
    let rows = shape.num_elements() / width.max(1);
    x.reshape([rows, width])
}

/// Reshapes rows to the shape of `like`, except for the last dimension.
fn shaped_as<B: Backend>(x: Val<B>, like: &Shape) -> FloatTensor<B> {
    let [_, width] = x.dims();
    let mut dims = like.as_slice().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = width;
    }
    B::float_reshape(x.0, Shape::from(dims))
}

impl<B: Backend> Val<B> {
    fn cast(self, dtype: DType) -> Self {
        if self.0.dtype() == dtype {
            self
        } else {
            Val(B::float_cast(self.0, dtype.into()))
        }
    }

    /// The first `n` indices along dimension `dim` of two.
    fn first(self, dim: usize, n: usize) -> Self {
        let [a, b] = self.dims();
        let whole = if dim == 0 { [0..n, 0..b] } else { [0..a, 0..n] };
        Val(B::float_slice(self.0, &whole.map(Slice::from)))
    }

    /// Pads with zeros at the end, up to `n` along dimension `dim` of two.
    fn padded(self, dim: usize, n: usize) -> Self {
        let mut dims: [usize; 2] = self.dims();
        if dims[dim] == n {
            return self;
        }
        dims[dim] = n - dims[dim];
        let zeros = B::float_zeros(Shape::from(dims), &self.0.device(), self.0.dtype().into());
        Val(B::float_cat(vec![self.0, zeros], dim))
    }

    fn dropped(self, dropout: Dropout) -> Self {
        if !dropout.is_active() {
            return self;
        }
        let (shape, dtype) = (self.0.shape(), self.0.dtype());
        let factors = TensorData::new(dropout.factors(shape.num_elements()), shape);
        let factors = Val::<B>(B::float_from_data(factors, &self.0.device())).cast(dtype);
        self * factors
    }
}

/// A product with a weight that may have another dtype than `x`. A bf16 weight is multiplied in
/// bf16, the purpose of that dtype. An f16 weight is widened, because gradients exceed the range of
/// f16.
fn product<B: Backend>(x: Val<B>, weight: Val<B>) -> Val<B> {
    let dtype = x.0.dtype();
    if weight.0.dtype() == DType::BF16 {
        return x.cast(DType::BF16).matmul(weight).cast(dtype);
    }
    x.matmul(weight.cast(dtype))
}

pub(super) fn linear<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    let shape = x.shape();
    shaped_as(product(rows(Val::<B>(x)), Val(weight)), &shape)
}

pub(super) fn linear_backward_input<B: Backend>(
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let shape = grad.shape();
    shaped_as(
        product(rows(Val::<B>(grad)), Val::<B>(weight).swap_dims(0, 1)),
        &shape,
    )
}

pub(super) fn linear_backward_weight<B: Backend>(
    x: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    rows(Val::<B>(x)).swap_dims(0, 1).matmul(rows(Val(grad))).0
}

pub(super) fn lora_linear<B: DecoderOps>(
    x: FloatTensor<B>,
    weight: Weight<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    term: LoraTerm,
) -> (FloatTensor<B>, FloatTensor<B>) {
    // The backend may have its own kernel for a stored weight.
    let base = if weight.is_read_as_stored(&x) {
        rows(Val::<B>(B::mixed_linear(x.clone(), weight)))
    } else {
        let weight = weight.dense(&x);
        product(rows(Val(x.clone())), Val(weight))
    };
    let (shape, x) = (x.shape(), rows(Val::<B>(x)));
    let h = x.dropped(term.dropout).matmul(Val(a).first(1, term.rank)) * term.scale;
    let y = base + h.clone().matmul(Val(b).first(0, term.rank));
    (shaped_as(y, &shape), h.0)
}

pub(super) fn lora_backward_inner<B: Backend>(
    b: FloatTensor<B>,
    grad: FloatTensor<B>,
    term: LoraTerm,
) -> FloatTensor<B> {
    (rows(Val::<B>(grad)).matmul(Val(b).first(0, term.rank).swap_dims(0, 1)) * term.scale).0
}

pub(super) fn lora_backward_input<B: Backend>(
    weight: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    grad: FloatTensor<B>,
    term: LoraTerm,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let g = lora_backward_inner::<B>(b, grad.clone(), term);
    let (shape, grad) = (grad.shape(), rows(Val::<B>(grad)));
    let update = Val::<B>(g.clone())
        .matmul(Val(a).first(1, term.rank).swap_dims(0, 1))
        .dropped(term.dropout);
    (
        shaped_as(product(grad, Val(weight).swap_dims(0, 1)) + update, &shape),
        g,
    )
}

pub(super) fn lora_backward_factors<B: Backend>(
    x: FloatTensor<B>,
    h: FloatTensor<B>,
    g: FloatTensor<B>,
    grad: FloatTensor<B>,
    max_rank: usize,
    term: LoraTerm,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (x, h, grad) = (
        rows(Val::<B>(x)).dropped(term.dropout),
        Val::<B>(h),
        rows(Val::<B>(grad)),
    );
    let a = x.swap_dims(0, 1).matmul(Val(g)).padded(1, max_rank);
    (a.0, h.swap_dims(0, 1).matmul(grad).padded(0, max_rank).0)
}

/// Casts a sum to bf16 if its weight is stored in bf16.
fn stored_as<B: Backend>(sum: Val<B>, stored: DType) -> FloatTensor<B> {
    if stored == DType::BF16 {
        sum.cast(stored).0
    } else {
        sum.0
    }
}

pub(super) fn summed_weight<B: Backend>(
    weight: FloatTensor<B>,
    mask: BoolTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    term: LoraTerm,
) -> FloatTensor<B> {
    let (a, dtype) = (Val::<B>(a), b.dtype());
    let delta = (a.first(1, term.rank) * term.scale).matmul(Val(b).first(0, term.rank));
    let stored = weight.dtype();
    stored_as(Val::<B>(weight).cast(dtype) + masked(delta, mask), stored)
}

pub(super) fn summed_weight_backward<B: Backend>(
    mask: BoolTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    grad: FloatTensor<B>,
    term: LoraTerm,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (a, b, grad) = (
        Val::<B>(a),
        Val::<B>(b),
        masked(Val::<B>(grad), mask) * term.scale,
    );
    let [_, max_rank] = a.dims();
    let grad_a = grad
        .clone()
        .matmul(b.first(0, term.rank).swap_dims(0, 1))
        .padded(1, max_rank);
    (
        grad_a.0,
        a.first(1, term.rank)
            .swap_dims(0, 1)
            .matmul(grad)
            .padded(0, max_rank)
            .0,
    )
}

/// Sets elements to zero where the mask is false.
fn masked<B: Backend>(x: Val<B>, mask: BoolTensor<B>) -> Val<B> {
    Val(B::float_mask_fill(x.0, B::bool_not(mask), 0.0.into()))
}

/// Unpacks a stored weight on the host to a dense tensor, `[d_input, d_output]`, on the device of
/// `x`.
pub(super) fn unpacked<B: Backend>(weight: &StoredWeight, x: &FloatTensor<B>) -> FloatTensor<B> {
    let [d_input, d_output] = weight.dims();
    let values = TensorData::new(weight.values(), [d_output, d_input]);
    B::float_swap_dims(B::float_from_data(values, &x.device()), 0, 1)
}

/// A weight relative to its grids, in multiples of the scale from the zero point.
struct Steps<B: Backend> {
    /// The exact value, between two steps; 0 outside the grid.
    inside: Val<B>,
    /// The step to which the weight is rounded.
    nearest: Val<B>,
    /// The scales. Scales that are not positive are replaced by 1, and the other fields are 0
    /// there.
    scales: Val<B>,
}

impl<B: Backend> Steps<B> {
    fn new(sum: Val<B>, scales: FloatTensor<B>, zeros: FloatTensor<B>, term: &GridTerm) -> Self {
        let [d_input, _] = sum.dims();
        let device = sum.0.device();
        let settings = get_device_settings::<B>(&device);
        let (int, truth) = (settings.int_dtype, settings.bool_dtype);
        let groups: Vec<i32> = (0..d_input).map(|row| term.groups.of(row) as i32).collect();
        let groups = B::int_from_data(
            TensorData::new(groups, [d_input]).convert_dtype(int.into()),
            &device,
        );
        let spread = |grid: FloatTensor<B>| Val::<B>(B::float_select(grid, 0, groups.clone()));
        let (scales, zeros) = (spread(scales), spread(zeros));
        let none = B::float_lower_equal_elem(scales.0.clone(), 0.0.into(), truth);
        let scales = Val::<B>(B::float_mask_fill(scales.0, none.clone(), 1.0.into()));
        let exact = Val::<B>(B::float_mask_fill(
            (sum / scales.clone()).0,
            none,
            0.0.into(),
        ));
        let low = zeros * -1.0;
        let high = low.clone() + f64::from(term.top());
        let under = B::float_lower(exact.0.clone(), low.0.clone(), truth);
        let over = B::float_greater(exact.0.clone(), high.0.clone(), truth);
        let clamped = B::float_mask_where(exact.0.clone(), under.clone(), low.0);
        let clamped = B::float_mask_where(clamped, over.clone(), high.0);
        let inside = B::float_mask_fill(
            B::float_mask_fill(exact.0.clone(), under, 0.0.into()),
            over,
            0.0.into(),
        );
        Self {
            inside: Val(inside),
            nearest: Val(B::float_round(clamped)),
            scales,
        }
    }
}

pub(super) fn quantized_sum<B: Backend>(
    weight: FloatTensor<B>,
    mask: BoolTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    scales: FloatTensor<B>,
    zeros: FloatTensor<B>,
    term: GridTerm,
) -> FloatTensor<B> {
    let (stored, dtype) = (weight.dtype(), b.dtype());
    let weight = Val::<B>(weight).cast(dtype).0;
    let sum = Val::<B>(summed_weight::<B>(weight, mask, a, b, term.lora));
    let steps = Steps::new(sum, scales, zeros, &term);
    stored_as(steps.scales * steps.nearest, stored)
}

pub(super) fn quantized_sum_backward_scales<B: Backend>(
    sum: FloatTensor<B>,
    scales: FloatTensor<B>,
    zeros: FloatTensor<B>,
    grad: FloatTensor<B>,
    term: GridTerm,
) -> FloatTensor<B> {
    let ([groups, d_output], device, dtype) =
        (Val::<B>(scales.clone()).dims(), sum.device(), grad.dtype());
    let [d_input, _] = Val::<B>(sum.clone()).dims();
    let steps = Steps::<B>::new(Val(sum), scales, zeros, &term);
    let share = Val::<B>(grad) * (steps.nearest - steps.inside);
    // Multiplying with a membership matrix sums in a fixed order on every backend.
    let mut members = vec![0.0_f32; groups * d_input];
    (0..d_input).for_each(|row| members[term.groups.of(row) * d_input + row] = 1.0);
    let members = B::float_from_data(TensorData::new(members, [groups, d_input]), &device);
    let sums = Val::<B>(members).cast(dtype).matmul(share);
    debug_assert_eq!(sums.dims(), [groups, d_output]);
    sums.0
}

/// Limits scores to `cap * tanh(score / cap)`.
fn softcapped<B: Backend>(scores: Val<B>, softcap: Option<f64>) -> Val<B> {
    match softcap {
        Some(cap) => Val::<B>(B::float_tanh((scores / cap).0)) * cap,
        None => scores,
    }
}

/// The derivative of [`softcapped`] in terms of its result.
fn softcap_slope<B: Backend>(capped: Val<B>, cap: f64) -> Val<B> {
    let tanh = capped / cap;
    (tanh.clone() * tanh) * -1.0 + 1.0
}

/// Number of rows whose logits exist at a time.
const HEAD_ROWS: usize = 1024;

/// Returns the summed loss, the loss against the targets alone, and the needed gradients of the
/// hidden states and the weight.
pub(super) fn head<B: Backend>(
    hidden: FloatTensor<B>,
    weight: FloatTensor<B>,
    targets: IntTensor<B>,
    teacher: Teacher<B>,
    softcap: Option<f64>,
    [want_hidden, want_weight]: [bool; 2],
) -> Head<FloatTensor<B>> {
    let teacher = match teacher {
        Teacher::None => None,
        Teacher::States(hidden, mix) => Some((hidden, mix)),
    };
    let (hidden, weight) = (Val::<B>(hidden), Val::<B>(weight));
    let [n, d_model] = hidden.dims();
    let total =
        |parts: Vec<FloatTensor<B>>| Val::<B>(B::float_sum(B::float_cat(parts, 0))).reshape([1]);
    let (mut losses, mut nlls, mut slopes, mut grad_weight) =
        (Vec::new(), Vec::new(), Vec::new(), None::<Val<B>>);
    for first in (0..n).step_by(HEAD_ROWS) {
        let rows = first..(first + HEAD_ROWS).min(n);
        let (count, range) = (rows.len(), [rows.clone(), 0..d_model].map(Slice::from));
        let hidden = Val::<B>(B::float_slice(hidden.0.clone(), &range));
        let targets = B::int_slice(targets.clone(), &[Slice::from(rows)]);
        let targets = B::int_reshape(targets, Shape::from([count, 1]));
        let logits = softcapped(product(hidden.clone(), weight.clone()), softcap);
        let picked = Val::<B>(B::float_gather(1, logits.0.clone(), targets.clone()));
        let (terms, sum, log_sum_exp) = logits.clone().exponentials(1);
        let nll = Val::<B>(B::float_sum((log_sum_exp.clone() - picked).0)).reshape([1]);
        // The teacher's probabilities, multiplied by its share of the loss.
        let taught = teacher.as_ref().map(|(teacher, mix)| {
            let logits = product(
                Val::<B>(B::float_slice(teacher.clone(), &range)),
                weight.clone(),
            );
            let (terms, sum, _) = softcapped(logits, softcap).exponentials(1);
            terms / sum * *mix
        });
        let hard = teacher.as_ref().map_or(1.0, |(_, mix)| 1.0 - mix);
        let limit_slope = softcap.map(|cap| softcap_slope(logits.clone(), cap));
        match &taught {
            Some(taught) => {
                let soft = Val::<B>(B::float_sum((taught.clone() * (logits - log_sum_exp)).0))
                    .reshape([1]);
                losses.push((nll.clone() * hard - soft).0);
                nlls.push(nll.0);
            }
            None => losses.push(nll.0),
        }
        if !want_hidden && !want_weight {
            continue;
        }
        let softmax = terms / sum;
        let dtype: FloatDType = softmax.0.dtype().into();
        let picked = B::float_full(
            Shape::from([count, 1]),
            (-hard).into(),
            &softmax.0.device(),
            dtype,
        );
        let slope = Val::<B>(B::float_scatter(
            1,
            softmax.0,
            targets,
            picked,
            IndexingUpdateOp::Add,
        ));
        let slope = match taught {
            Some(taught) => slope - taught,
            None => slope,
        };
        let slope = match limit_slope {
            Some(limit) => slope * limit,
            None => slope,
        };
        if want_weight {
            let part = hidden.swap_dims(0, 1).matmul(slope.clone());
            grad_weight = Some(match grad_weight {
                Some(sum) => sum + part,
                None => part,
            });
        }
        if want_hidden {
            slopes.push(product(slope, weight.clone().swap_dims(0, 1)).0);
        }
    }
    let loss = total(losses).0;
    let nll = match teacher {
        Some(_) => total(nlls).0,
        None => loss.clone(),
    };
    let grad_hidden = want_hidden.then(|| B::float_cat(slopes, 0));
    (loss, nll, grad_hidden, grad_weight.map(|grad| grad.0))
}

/// The scores of `q k^T` with hidden keys far below zero, `[batch, n_kv_heads, group * seq_q, seq_k]`.
/// The heads of a group share keys, so they become more rows of one product, and no key is copied.
fn masked_scores<B: Backend>(
    q: Val<B>,
    k: Val<B>,
    Scores { scale, softcap }: Scores,
    mask: &AttentionMask,
) -> Val<B> {
    let [batch, n_heads, seq_q, head_dim] = q.dims();
    let [_, n_kv_heads, seq_k, _] = k.dims();
    let rows = n_heads / n_kv_heads.max(1) * seq_q;
    let scores = (q * scale)
        .reshape([batch, n_kv_heads, rows, head_dim])
        .matmul(k.swap_dims(2, 3));
    let scores = softcapped(scores, softcap);
    let Some((hidden, mask_rows)) = mask.hidden(batch, seq_q, seq_k) else {
        return scores;
    };
    let scores = scores.reshape([batch, n_heads, seq_q, seq_k]);
    let device = scores.0.device();
    // A backend rejects booleans stored in another type than its own.
    let stored = get_device_settings::<B>(&device).bool_dtype;
    let hidden = TensorData::new(hidden, [mask_rows, 1, seq_q, seq_k]).convert_dtype(stored.into());
    let hidden = B::bool_from_data(hidden, &device);
    let hidden = B::bool_expand(hidden, Shape::from([batch, n_heads, seq_q, seq_k]));
    Val::<B>(B::float_mask_fill(scores.0, hidden, (-1e30).into()))
        .reshape([batch, n_kv_heads, rows, seq_k])
}

pub(super) fn causal_attention<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    scores: Scores,
    mask: AttentionMask,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (q, k, v) = (Val::<B>(q), Val::<B>(k), Val::<B>(v));
    let [batch, n_heads, seq_q, head_dim] = q.dims();
    let scores = masked_scores(q, k, scores, &mask);
    let log_sum_exp = scores.clone().log_sum_exp(3);
    let context = (scores - log_sum_exp.clone())
        .exp()
        .matmul(v)
        .reshape([batch, n_heads, seq_q, head_dim]);
    let context = context
        .swap_dims(1, 2)
        .reshape([batch, seq_q, n_heads * head_dim]);
    (context.0, log_sum_exp.reshape([batch, n_heads, seq_q]).0)
}

pub(super) fn causal_attention_backward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    log_sum_exp: FloatTensor<B>,
    grad: FloatTensor<B>,
    scores: Scores,
    mask: AttentionMask,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (q, k, v, grad) = (Val::<B>(q), Val::<B>(k), Val::<B>(v), Val::<B>(grad));
    let [batch, n_heads, seq_q, head_dim] = q.dims();
    let [_, n_kv_heads, _, _] = k.dims();
    let rows = n_heads / n_kv_heads.max(1) * seq_q;
    let grad = grad
        .reshape([batch, seq_q, n_heads, head_dim])
        .swap_dims(1, 2);
    let grad = grad.reshape([batch, n_kv_heads, rows, head_dim]);
    let log_sum_exp = Val::<B>(log_sum_exp).reshape([batch, n_kv_heads, rows, 1]);
    let limited = masked_scores(q.clone(), k.clone(), scores, &mask);
    let weights = (limited.clone() - log_sum_exp).exp();
    let grad_v = weights.clone().swap_dims(2, 3).matmul(grad.clone());
    let grad_weights = grad.matmul(v.swap_dims(2, 3));
    let along = (weights.clone() * grad_weights.clone()).sum_dim(3);
    let grad_scores = weights * (grad_weights - along) * scores.scale;
    // The weight of a hidden key is 0, so the slope at its score does not matter if it is finite.
    let grad_scores = match scores.softcap {
        Some(cap) => {
            let visible = Val::<B>(B::float_clamp_min(limited.0, (-cap).into()));
            grad_scores * softcap_slope(visible, cap)
        }
        None => grad_scores,
    };
    let grad_q = grad_scores
        .clone()
        .matmul(k)
        .reshape([batch, n_heads, seq_q, head_dim]);
    let grad_k = grad_scores
        .swap_dims(2, 3)
        .matmul(q.reshape([batch, n_kv_heads, rows, head_dim]));
    (grad_q.0, grad_k.0, grad_v.0)
}

/// A rotary table, `[seq, half]` or `[batch * seq, half]`, as a tensor that broadcasts over heads,
/// and over the batch if all rows have the same positions.
fn table<B: Backend>(table: FloatTensor<B>, seq: usize) -> Val<B> {
    let table = Val::<B>(table);
    let [positions, half] = table.dims();
    table.reshape([positions / seq.max(1), 1, seq, half])
}

pub(super) fn rotary<B: Backend>(
    x: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    n_heads: usize,
) -> FloatTensor<B> {
    let x = Val::<B>(x);
    let [batch, seq, width] = x.dims();
    let (cos, sin) = (table::<B>(cos, seq), table::<B>(sin, seq));
    let [.., half] = cos.dims::<4>();
    let (low, high, rest) = x
        .reshape([batch, seq, n_heads, width / n_heads.max(1)])
        .swap_dims(1, 2)
        .halves(half);
    let rotated_low = low.clone() * cos.clone() - high.clone() * sin.clone();
    Val::joined(rotated_low, high * cos + low * sin, rest).0
}

pub(super) fn rotary_backward<B: Backend>(
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let grad = Val::<B>(grad);
    let [batch, n_heads, seq, head_dim] = grad.dims();
    let (cos, sin) = (table::<B>(cos, seq), table::<B>(sin, seq));
    let [.., half] = cos.dims::<4>();
    let (low, high, rest) = grad.halves(half);
    let back_low = low.clone() * cos.clone() + high.clone() * sin.clone();
    let back = Val::joined(back_low, high * cos - low * sin, rest);
    back.swap_dims(1, 2)
        .reshape([batch, seq, n_heads * head_dim])
        .0
}
