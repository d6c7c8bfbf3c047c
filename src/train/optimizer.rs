//! AdamW over the parameters of a module that require gradients, with state kept by parameter path.
//!
//! What a step did not use it leaves alone: of an adapter's factors, the ranks above the largest that was active in the step
//! keep weights, moments and step count, neither decayed nor moved by momentum.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use rayon::prelude::*;

use crate::adapter::ElasticLora;
use crate::arch::LinearKind;
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::nn::host_values;

/// Gradients by parameter path, flattened.
pub(crate) type Grads = BTreeMap<String, Tensor<1>>;

/// The flattened values of every trainable parameter, by path.
pub(crate) fn trainable<M: Module>(module: &M) -> BTreeMap<String, Tensor<1>> {
    struct Collect {
        path: Vec<String>,
        out: BTreeMap<String, Tensor<1>>,
    }
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.base();
            if value.is_require_grad() {
                let n = value.shape().num_elements();
                self.out
                    .insert(self.path.join("."), value.inner().reshape([n]));
            }
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    let mut collect = Collect {
        path: Vec::new(),
        out: BTreeMap::new(),
    };
    module.visit(&mut collect);
    collect.out
}

/// Adds a backward pass's gradients to `into`: those of the parameters that it reached.
pub(crate) fn collect<M: Module>(module: &M, grads: &mut Gradients, into: &mut Grads) {
    struct Collect<'a> {
        path: Vec<String>,
        grads: &'a mut Gradients,
        into: &'a mut Grads,
    }
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.base();
            if !value.is_require_grad() {
                return;
            }
            if let Some(grad) = value.grad_remove(self.grads) {
                let n = grad.shape().num_elements();
                let grad: Tensor<1> = grad.reshape([n]);
                let path = self.path.join(".");
                add(self.into, path, grad);
            }
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    module.visit(&mut Collect {
        path: Vec::new(),
        grads,
        into,
    });
}

/// Adds a micro-batch's gradients to those of the step.
pub(crate) fn accumulate(into: &mut Grads, from: Grads) {
    from.into_iter()
        .for_each(|(path, grad)| add(into, path, grad));
}

fn add(into: &mut Grads, path: String, grad: Tensor<1>) {
    let sum = match into.remove(&path) {
        Some(before) => before + grad,
        None => grad,
    };
    into.insert(path, sum);
}

/// The part of a parameter that a step used: the first `active` of the indices along `axis`, of which each has its own step
/// count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prefix {
    pub axis: usize,
    pub active: usize,
}

/// Prefixes by parameter path; a parameter without one is used as a whole.
pub(crate) type Prefixes = BTreeMap<String, Prefix>;

/// What the active subnet uses of the adapters' factors; nothing of those in parts of a block that it leaves out, which have
/// no gradient either.
pub(crate) fn active_prefixes(model: &Decoder) -> Prefixes {
    let mut prefixes = Prefixes::new();
    for_each_factor(model, |path, axis, adapter, runs| {
        if runs {
            prefixes.insert(
                path,
                Prefix {
                    axis,
                    active: adapter.active_rank(),
                },
            );
        }
    });
    prefixes
}

/// The number of indices that are counted, of the parameters of which they are.
pub(crate) fn rank_counts(model: &Decoder) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for_each_factor(model, |path, _, adapter, _| {
        counts.insert(path, adapter.max_rank());
    });
    counts
}

/// Shows each adapter factor's parameter path and rank axis, and whether its layer runs.
fn for_each_factor(model: &Decoder, mut f: impl FnMut(String, usize, &ElasticLora, bool)) {
    for (name, layer) in model.linears() {
        if let Some(adapter) = &layer.adapter {
            let runs = LinearKind::parse(&name)
                .is_none_or(|(block, kind)| model.layers[block].runs(kind.sub_block()));
            // The module's own path lacks the prefix that Hugging Face has.
            let path = name.strip_prefix("model.").unwrap_or(&name);
            f(format!("{path}.adapter.lora_a"), 1, adapter, runs);
            f(format!("{path}.adapter.lora_b"), 0, adapter, runs);
        }
    }
}

/// Widens `into` to what `from` uses as well.
pub(crate) fn widen(into: &mut Prefixes, from: Prefixes) {
    for (path, prefix) in from {
        into.entry(path)
            .and_modify(|before| before.active = before.active.max(prefix.active))
            .or_insert(prefix);
    }
}

/// The factor that brings gradients of joint norm `norm` down to `max_norm`; 1 where they are no larger.
pub(crate) fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if norm > max_norm {
        max_norm / (norm + 1e-6)
    } else {
        1.0
    }
}

/// A parameter as `[outer, n, inner]` with the counted axis in the middle, of which the first `active` are updated.
#[derive(Clone, Copy)]
struct Layout {
    outer: usize,
    n: usize,
    inner: usize,
    active: usize,
}

impl Layout {
    fn new(shape: &[usize], prefix: Option<&Prefix>) -> Self {
        match prefix {
            Some(Prefix { axis, active }) => Self {
                outer: shape[..*axis].iter().product(),
                n: shape[*axis],
                inner: shape[axis + 1..].iter().product(),
                active: *active,
            },
            None => Self {
                outer: 1,
                n: 1,
                inner: shape.iter().product(),
                active: 1,
            },
        }
    }
}

/// What a parameter's index contributes to its update: the factors that correct both moments for their start from zero, the
/// first with the learning rate in it.
#[derive(Clone, Copy)]
struct Correction {
    first: f32,
    second: f32,
}

/// What all updates of a step share.
#[derive(Clone, Copy)]
struct Update {
    beta_1: f32,
    beta_2: f32,
    rest_1: f32,
    rest_2: f32,
    eps: f32,
    keep: f32,
    clip: f32,
}

impl Update {
    #[inline(always)]
    fn apply(&self, value: &mut f32, m: &mut f32, v: &mut f32, grad: f32, correction: Correction) {
        let grad = grad * self.clip;
        *m = self.beta_1 * *m + self.rest_1 * grad;
        *v = self.beta_2 * *v + self.rest_2 * grad * grad;
        *value = self.keep * *value
            - correction.first * *m / ((correction.second * *v).sqrt() + self.eps);
    }
}

/// How the path of a grid's scales ends.
const SCALES: &str = "adapter.grid.scales";
/// Their learning rate, in those of all else.
const SCALES_LR: f64 = 0.1;

/// Elements of a task of the update in host memory.
const TASK: usize = 1 << 14;

/// Equal parts of the same elements of a parameter, its moments and its gradient.
struct Piece<'a> {
    value: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    grad: &'a [f32],
}

impl<'a> Piece<'a> {
    /// Parts of `len` elements; the last may be shorter.
    fn chunks(self, len: usize) -> impl IndexedParallelIterator<Item = Piece<'a>> {
        let moments = self.m.par_chunks_mut(len).zip(self.v.par_chunks_mut(len));
        let rest = moments.zip(self.grad.par_chunks(len));
        self.value
            .par_chunks_mut(len)
            .zip(rest)
            .map(|(value, ((m, v), grad))| Piece { value, m, v, grad })
    }

    fn range(&mut self, range: Range<usize>) -> Piece<'_> {
        Piece {
            value: &mut self.value[range.clone()],
            m: &mut self.m[range.clone()],
            v: &mut self.v[range.clone()],
            grad: &self.grad[range],
        }
    }

    /// One pass over the active part, in place.
    fn update(mut self, layout: Layout, update: Update, corrections: &[Correction]) {
        let Layout {
            outer,
            n,
            inner,
            active,
        } = layout;
        if inner == 1 {
            // The counted indices lie side by side.
            self.chunks(n * (TASK / n).max(1)).for_each(|mut piece| {
                for row in 0..piece.value.len() / n {
                    piece
                        .range(row * n..row * n + active)
                        .each(update, |index| corrections[index]);
                }
            });
            return;
        }
        for start in (0..outer).map(|row| row * n * inner) {
            for (index, correction) in corrections.iter().enumerate() {
                let at = start + index * inner;
                let row = self.range(at..at + inner);
                row.chunks(TASK)
                    .for_each(|mut piece| piece.each(update, |_| *correction));
            }
        }
    }

    #[inline(always)]
    fn each(&mut self, update: Update, correction: impl Fn(usize) -> Correction) {
        let moments = self.m.iter_mut().zip(self.v.iter_mut());
        for (index, ((value, (m, v)), grad)) in self
            .value
            .iter_mut()
            .zip(moments)
            .zip(self.grad)
            .enumerate()
        {
            update.apply(value, m, v, *grad, correction(index));
        }
    }
}

/// A parameter's moments, flattened, and the number of steps that each index along its counted axis has had.
struct Moments {
    m: Tensor<1>,
    v: Tensor<1>,
    times: Vec<usize>,
}

/// AdamW (arXiv 1711.05101) with state by parameter path, so that a checkpoint has names.
pub(crate) struct NamedAdamW {
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    state: BTreeMap<String, Moments>,
    /// Whether tensors lie in this process's memory, where a tensor that nobody shares is updated in place.
    in_place: bool,
}

impl NamedAdamW {
    /// For parameters on `device`.
    pub fn new(betas: (f64, f64), eps: f64, weight_decay: f64, device: &Device) -> Self {
        Self {
            betas,
            eps,
            weight_decay,
            state: BTreeMap::new(),
            in_place: lies_on_host(device),
        }
    }

    /// The gradients' joint Euclidean norm; infinite where its square is over what an `f32` holds, as the second moment
    /// would be.
    pub fn norm(&self, grads: &mut Grads) -> f64 {
        if grads.is_empty() {
            return 0.0;
        }
        let sum = if self.in_place {
            let mut sum = 0.0;
            for (path, grad) in std::mem::take(grads) {
                let (grad, square) = on_host(grad, |values| {
                    // Fixed parts, added in their order: the same sum whatever the number of threads.
                    let parts: Vec<f64> = values.par_chunks(TASK).map(sum_of_squares).collect();
                    parts.iter().sum::<f64>()
                });
                sum += square;
                grads.insert(path, grad);
            }
            sum
        } else {
            let squares: Vec<Tensor<1>> = grads
                .values()
                .map(|grad| grad.clone().square().sum())
                .collect();
            f64::from(host_values(Tensor::cat(squares, 0).sum())[0])
        };
        if sum > f64::from(f32::MAX) {
            f64::INFINITY
        } else {
            sum.sqrt()
        }
    }

    /// One step with gradients scaled by `clip`; parameters without a gradient stay as they are, and of those with one, what
    /// lies outside its prefix. Weights that nobody else holds are updated in place.
    pub fn step<M: Module>(
        &mut self,
        module: M,
        grads: Grads,
        prefixes: &Prefixes,
        clip: f64,
        lr: f64,
    ) -> M {
        struct Apply<'a> {
            path: Vec<String>,
            optimizer: &'a mut NamedAdamW,
            grads: Grads,
            prefixes: &'a Prefixes,
            clip: f64,
            lr: f64,
        }
        impl ModuleMapper for Apply<'_> {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let path = self.path.join(".");
                let Some(grad) = self.grads.remove(&path) else {
                    return param;
                };
                let prefix = self.prefixes.get(&path);
                param.map(|value| {
                    let shape = value.dims();
                    let layout = Layout::new(&shape, prefix);
                    let value = value
                        .inner()
                        .reshape([layout.outer * layout.n * layout.inner]);
                    let value = self
                        .optimizer
                        .update(path, value, grad, layout, self.clip, self.lr);
                    Tensor::from_inner(value.reshape(shape)).require_grad()
                })
            }
            fn enter_module(&mut self, name: &str, _: &str) {
                self.path.push(name.to_string());
            }
            fn exit_module(&mut self, _: &str, _: &str) {
                self.path.pop();
            }
        }
        module.map(&mut Apply {
            path: Vec::new(),
            optimizer: self,
            grads,
            prefixes,
            clip,
            lr,
        })
    }

    fn update(
        &mut self,
        path: String,
        value: Tensor<1>,
        grad: Tensor<1>,
        layout: Layout,
        clip: f64,
        lr: f64,
    ) -> Tensor<1> {
        // A grid's scales: slower, as NNCF's absorbable LoRA has them, and never decayed, since 0 is no home to them.
        let (lr, weight_decay) = if path.ends_with(SCALES) {
            (lr * SCALES_LR, 0.0)
        } else {
            (lr, self.weight_decay)
        };
        let zeros = || Tensor::zeros([layout.outer * layout.n * layout.inner], &value.device());
        let Moments { m, v, mut times } = self.state.remove(&path).unwrap_or_else(|| Moments {
            m: zeros(),
            v: zeros(),
            times: vec![0; layout.n],
        });
        let (beta_1, beta_2) = self.betas;
        times[..layout.active]
            .iter_mut()
            .for_each(|time| *time += 1);
        let corrections: Vec<Correction> = times[..layout.active]
            .iter()
            .map(|time| Correction {
                first: (lr / (1.0 - beta_1.powf(*time as f64))) as f32,
                second: (1.0 / (1.0 - beta_2.powf(*time as f64))) as f32,
            })
            .collect();
        let update = Update {
            beta_1: beta_1 as f32,
            beta_2: beta_2 as f32,
            rest_1: (1.0 - beta_1) as f32,
            rest_2: (1.0 - beta_2) as f32,
            eps: self.eps as f32,
            keep: (1.0 - lr * weight_decay) as f32,
            clip: clip as f32,
        };
        let (value, m, v) = if self.in_place {
            let (value, (m, (v, ()))) = on_host(value, |value| {
                on_host(m, |m| {
                    on_host(v, |v| {
                        on_host(grad, |grad| {
                            Piece { value, m, v, grad }.update(layout, update, &corrections)
                        });
                    })
                })
            });
            (value, m, v)
        } else {
            on_device([value, m, v], grad, layout, update, &corrections)
        };
        self.state.insert(path, Moments { m, v, times });
        value
    }

    /// The moments, by `m.<path>`, `v.<path>`, and the number of steps each index of each parameter has had.
    pub fn moments(&self) -> (BTreeMap<String, Tensor<1>>, BTreeMap<String, Vec<usize>>) {
        let mut tensors = BTreeMap::new();
        let mut times = BTreeMap::new();
        for (path, state) in &self.state {
            tensors.insert(format!("m.{path}"), state.m.clone());
            tensors.insert(format!("v.{path}"), state.v.clone());
            times.insert(path.clone(), state.times.clone());
        }
        (tensors, times)
    }

    /// Takes up where [`moments`](Self::moments) left off; `read` gives a tensor's elements by its name.
    pub fn restore(
        &mut self,
        times: &BTreeMap<String, Vec<usize>>,
        device: &Device,
        mut read: impl FnMut(&str) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let tensor = |values: Vec<f32>| {
            let n = values.len();
            Tensor::<1>::from_data(TensorData::new(values, [n]), device)
        };
        let mut state = BTreeMap::new();
        for (path, times) in times {
            let (m, v) = (read(&format!("m.{path}"))?, read(&format!("v.{path}"))?);
            state.insert(
                path.clone(),
                Moments {
                    m: tensor(m),
                    v: tensor(v),
                    times: times.clone(),
                },
            );
        }
        self.state = state;
        Ok(())
    }
}

#[cfg(feature = "flex")]
fn lies_on_host(device: &Device) -> bool {
    device.clone().without_autodiff() == Device::flex()
}

#[cfg(not(feature = "flex"))]
fn lies_on_host(_: &Device) -> bool {
    false
}

/// Shows a tensor's elements to `f`, which may change them. On Flex nothing is copied where nobody else holds the tensor.
fn on_host<R>(tensor: Tensor<1>, f: impl FnOnce(&mut [f32]) -> R) -> (Tensor<1>, R) {
    let device = tensor.device();
    let mut data = tensor.into_data();
    let result = f(data
        .as_mut_slice()
        .expect("weights, gradients and moments are f32"));
    (Tensor::from_data(data, &device), result)
}

fn sum_of_squares(values: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: f64 = chunks
        .remainder()
        .iter()
        .map(|v| f64::from(*v).powi(2))
        .sum();
    for chunk in chunks {
        sums.iter_mut()
            .zip(chunk)
            .for_each(|(sum, v)| *sum += f64::from(*v).powi(2));
    }
    sums.iter().sum::<f64>() + rest
}

/// The update of value and moments as tensor operations, for any backend.
fn on_device(
    tensors: [Tensor<1>; 3],
    grad: Tensor<1>,
    layout: Layout,
    update: Update,
    corrections: &[Correction],
) -> (Tensor<1>, Tensor<1>, Tensor<1>) {
    let Layout {
        outer,
        n,
        inner,
        active,
    } = layout;
    let whole = |tensor: Tensor<1>| -> Tensor<3> { tensor.reshape([outer, n, inner]) };
    let part = |tensor: &Tensor<3>| tensor.clone().narrow(1, 0, active);
    let device = grad.device();
    let factors = |of: fn(&Correction) -> f32| {
        let values: Vec<f32> = corrections.iter().map(of).collect();
        Tensor::<3>::from_data(TensorData::new(values, [1, active, 1]), &device)
    };
    let [value, m, v] = tensors.map(whole);
    let grad = part(&whole(grad)) * update.clip;
    let next_m = part(&m) * update.beta_1 + grad.clone() * update.rest_1;
    let next_v = part(&v) * update.beta_2 + grad.square() * update.rest_2;
    let root = (next_v.clone() * factors(|c| c.second)).sqrt() + update.eps;
    let next = part(&value) * update.keep - next_m.clone() * factors(|c| c.first) / root;
    let put = |into: Tensor<3>, part: Tensor<3>| {
        into.slice_assign([0..outer, 0..active, 0..inner], part)
            .reshape([outer * n * inner])
    };
    (put(value, next), put(m, next_m), put(v, next_v))
}

/// Replaces the values of trainable parameters by path.
pub(crate) fn load_trainable<M: Module>(
    module: M,
    values: BTreeMap<String, Vec<f32>>,
) -> Result<M> {
    struct Load {
        path: Vec<String>,
        values: BTreeMap<String, Vec<f32>>,
        error: Option<Error>,
    }
    impl ModuleMapper for Load {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if !param.base().is_require_grad() {
                return param;
            }
            let path = self.path.join(".");
            let Some(values) = self.values.remove(&path) else {
                self.error.get_or_insert(Error::UnknownLayer {
                    context: "checkpoint".into(),
                    layer: path,
                });
                return param;
            };
            let shape = param.base().dims();
            if values.len() != shape.iter().product::<usize>() {
                self.error.get_or_insert(Error::TensorShape {
                    tensor: path,
                    expected: shape.to_vec(),
                    found: vec![values.len()],
                });
                return param;
            }
            param.map(|old| {
                let value = Tensor::<D>::from_data(
                    TensorData::new(values, shape),
                    &old.device().without_autodiff(),
                );
                Tensor::from_inner(value).require_grad()
            })
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    let mut load = Load {
        path: Vec::new(),
        values,
        error: None,
    };
    let module = module.map(&mut load);
    match (load.error, load.values.into_keys().next()) {
        (Some(error), _) => Err(error),
        (None, Some(path)) => Err(Error::UnknownLayer {
            context: "checkpoint".into(),
            layer: path,
        }),
        (None, None) => Ok(module),
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::optim::{AdamWConfig, Optimizer};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const SHAPE_A: [usize; 2] = [7, 5];
    const SHAPE_B: [usize; 2] = [5, 11];

    #[derive(Module, Debug)]
    struct Factors {
        a: Param<Tensor<2>>,
        b: Param<Tensor<2>>,
        bias: Param<Tensor<1>>,
    }

    fn random(n: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
        (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
    }

    fn factors(rng: &mut ChaCha8Rng) -> Factors {
        let device = Device::flex().autodiff();
        let mut matrix = |shape: [usize; 2]| {
            let data = TensorData::new(random(shape[0] * shape[1], rng), shape);
            Param::from_tensor(Tensor::<2>::from_data(data, &device))
        };
        let (a, b) = (matrix(SHAPE_A), matrix(SHAPE_B));
        let bias = Param::from_tensor(Tensor::<1>::from_data(
            TensorData::new(random(3, rng), [3]),
            &device,
        ));
        Factors { a, b, bias }
    }

    fn values(factors: &Factors) -> [Vec<f32>; 3] {
        [
            host_values(factors.a.val()),
            host_values(factors.b.val()),
            host_values(factors.bias.val()),
        ]
    }

    /// Gradients that are zero outside the active ranks, and what is active of each parameter.
    fn gradients(rank: usize, rng: &mut ChaCha8Rng) -> (Grads, Prefixes) {
        let tensor = |v: Vec<f32>| Tensor::<1>::from_data(v.as_slice(), &Device::flex());
        let mut a = random(35, rng);
        let mut b = random(55, rng);
        a.iter_mut()
            .enumerate()
            .filter(|(i, _)| i % 5 >= rank)
            .for_each(|(_, v)| *v = 0.0);
        b[rank * 11..].fill(0.0);
        let grads = [("a", a), ("b", b), ("bias", random(3, rng))];
        let prefixes = [("a", 1), ("b", 0)]
            .map(|(path, axis)| (path.to_string(), Prefix { axis, active: rank }));
        (
            grads
                .map(|(path, grad)| (path.to_string(), tensor(grad)))
                .into(),
            prefixes.into(),
        )
    }

    fn adamw(in_place: bool) -> NamedAdamW {
        NamedAdamW {
            in_place,
            ..NamedAdamW::new((0.9, 0.98), 1e-6, 0.1, &Device::flex())
        }
    }

    #[test]
    fn each_rank_is_a_plain_adamw_of_the_steps_that_used_it() {
        for in_place in [true, false] {
            let mut rng = ChaCha8Rng::seed_from_u64(3);
            let mut module = factors(&mut rng);
            let mut optimizer = adamw(in_place);
            // Value, moments and count of every element.
            let mut expected = values(&module).map(|part| {
                part.iter()
                    .map(|v| (*v as f64, 0.0, 0.0, 0))
                    .collect::<Vec<_>>()
            });
            for (step, rank) in [5, 2, 3, 1, 4, 2, 5, 3].into_iter().enumerate() {
                let (mut grads, prefixes) = gradients(rank, &mut rng);
                let (clip, lr) = (0.5 + 0.05 * step as f64, 0.02 / (1 + step) as f64);
                let used = |part: usize, i: usize| [i % 5, i / 11, 0][part] < rank;
                let mut square = 0.0;
                for (part, (_, grad)) in grads.iter().enumerate() {
                    for (i, g) in host_values(grad.clone()).into_iter().enumerate() {
                        square += f64::from(g).powi(2);
                        if !used(part, i) {
                            continue;
                        }
                        let (w, m, v, t) = &mut expected[part][i];
                        let g = f64::from(g) * clip;
                        *t += 1;
                        *m = 0.9 * *m + 0.1 * g;
                        *v = 0.98 * *v + 0.02 * g * g;
                        let (m, v) = (*m / (1.0 - 0.9f64.powi(*t)), *v / (1.0 - 0.98f64.powi(*t)));
                        *w -= lr * (0.1 * *w + m / (v.sqrt() + 1e-6));
                    }
                }
                approx::assert_relative_eq!(
                    optimizer.norm(&mut grads),
                    square.sqrt(),
                    max_relative = 1e-6
                );
                let before = (values(&module), optimizer.moments().0);
                module = optimizer.step(module, grads, &prefixes, clip, lr);
                let after = values(&module);
                for (part, path) in ["a", "b", "bias"].into_iter().enumerate() {
                    for (i, (w, ..)) in expected[part].iter().enumerate() {
                        approx::assert_abs_diff_eq!(f64::from(after[part][i]), *w, epsilon = 1e-6);
                        assert!(
                            used(part, i)
                                || after[part][i].to_bits() == before.0[part][i].to_bits()
                        );
                    }
                    for moment in ["m", "v"].map(|name| format!("{name}.{path}")) {
                        let Some(before) = before.1.get(&moment) else {
                            continue;
                        };
                        let (before, after) = (
                            host_values(before.clone()),
                            optimizer.moments().0[&moment].clone(),
                        );
                        for (i, (before, after)) in
                            before.into_iter().zip(host_values(after)).enumerate()
                        {
                            assert!(
                                used(part, i) || before.to_bits() == after.to_bits(),
                                "{moment}"
                            );
                        }
                    }
                }
            }
            assert_eq!(optimizer.moments().1["a"], [8, 7, 5, 3, 2]);
            assert_eq!(optimizer.moments().1["b"], [8, 7, 5, 3, 2]);
            assert_eq!(optimizer.moments().1["bias"], [8]);
        }
    }

    #[test]
    fn at_full_rank_it_is_burns() {
        for in_place in [true, false] {
            let mut rng = ChaCha8Rng::seed_from_u64(4);
            let mut module = factors(&mut rng);
            let mut optimizer = adamw(in_place);
            let burns = AdamWConfig::new()
                .with_beta_1(0.9)
                .with_beta_2(0.98)
                .with_epsilon(1e-6)
                .with_weight_decay(0.1)
                .build();
            let mut state = None;
            let mut expected = module.b.val().inner();
            for _ in 0..9 {
                let (grads, prefixes) = gradients(5, &mut rng);
                let grad = grads["b"].clone().reshape(SHAPE_B);
                (expected, state) = burns.step(0.01, expected, grad, state);
                module = optimizer.step(module, grads, &prefixes, 1.0, 0.01);
                for (w, e) in values(&module)[1].iter().zip(host_values(expected.clone())) {
                    approx::assert_abs_diff_eq!(*w, e, epsilon = 1e-6);
                }
            }
        }
    }

    #[test]
    fn weights_that_nobody_else_holds_stay_where_they_are() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let module = factors(&mut rng);
        let at = |tensor: Tensor<1>| {
            let (_, at) = on_host(tensor, |values| values.as_ptr() as usize);
            at
        };
        let mut optimizer = adamw(true);
        let (grads, prefixes) = gradients(2, &mut rng);
        let module = optimizer.step(module, grads, &prefixes, 1.0, 0.01);
        let held = module.b.val().inner().reshape([55]);
        drop(module);
        let before = at(held.clone());
        // Held twice, it is copied; held once, not.
        assert_ne!(before, at(held.clone()));
        let (held, first) = on_host(held, |values| values.as_ptr() as usize);
        assert_eq!(first, at(held));
    }
}
