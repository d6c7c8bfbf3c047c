//! AdamW for the parameters of a module that require gradients, with its state stored by parameter
//! path.
//!
//! Only the parts that a step used are updated. In an adapter's factors, the ranks above the
//! largest active rank of the step keep their weights, moments and step counts: neither weight
//! decay nor momentum changes them.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use super::gradients::{Grads, Prefix, Prefixes};
use super::host::{lies_on_host, on_host};
use super::params::map_trained;
use crate::error::Result;
use crate::nn::host_values;

/// View of a parameter as `[outer, n, inner]`, where the middle axis has its own step counts and
/// only its first `active` indices are updated.
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

/// Bias corrections of both moments for one index of the counted axis. The first includes the
/// learning rate.
#[derive(Clone, Copy)]
struct Correction {
    first: f32,
    second: f32,
}

/// Constants shared by all updates of a step.
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

/// Suffix of the parameter path of a grid's scales.
const SCALES: &str = "adapter.grid.scales";
/// Learning rate of a grid's scales, relative to all other parameters.
const SCALES_LR: f64 = 0.1;

/// Number of elements per parallel task of the update in host memory.
const TASK: usize = 1 << 14;

/// The same range of elements of a parameter, its moments and its gradient.
struct Piece<'a> {
    value: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    grad: &'a [f32],
}

impl<'a> Piece<'a> {
    /// Splits the piece into parts of `len` elements; the last may be shorter.
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

    /// Updates the active part in place, in one pass.
    fn update(mut self, layout: Layout, update: Update, corrections: &[Correction]) {
        let Layout {
            outer,
            n,
            inner,
            active,
        } = layout;
        if inner == 1 {
            // The counted indices are adjacent in memory.
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

/// The flattened moments of a parameter, and the number of steps taken by each index of its counted
/// axis.
struct Moments {
    m: Tensor<1>,
    v: Tensor<1>,
    times: Vec<usize>,
}

/// AdamW (arXiv 1711.05101) with state by parameter path, so that checkpoints have named tensors.
pub(crate) struct NamedAdamW {
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    state: BTreeMap<String, Moments>,
    /// Whether tensors are in this process's memory, where unshared tensors are updated in place.
    pub(super) in_place: bool,
}

impl NamedAdamW {
    /// Creates an optimizer for parameters on `device`.
    pub fn new(betas: (f64, f64), eps: f64, weight_decay: f64, device: &Device) -> Self {
        Self {
            betas,
            eps,
            weight_decay,
            state: BTreeMap::new(),
            in_place: lies_on_host(device),
        }
    }

    /// Joint Euclidean norm of the gradients. Infinite if its square overflows an `f32`, as the
    /// second moment would.
    pub fn norm(&self, grads: &mut Grads) -> f64 {
        if grads.is_empty() {
            return 0.0;
        }
        let sum = if self.in_place {
            let mut sum = 0.0;
            for (path, grad) in std::mem::take(grads) {
                let (grad, square) = on_host(grad, |values| {
                    // Parts of fixed size, added in order, give the same sum for any number of
                    // threads.
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

    /// Takes one step with gradients scaled by `clip`. Parameters without a gradient, and the
    /// elements outside a parameter's prefix, are unchanged. Unshared weights are updated in place.
    pub fn step<M: Module>(
        &mut self,
        module: M,
        mut grads: Grads,
        prefixes: &Prefixes,
        clip: f64,
        lr: f64,
    ) -> M {
        map_trained(module, |path, value, shape| match grads.remove(path) {
            Some(grad) => {
                let layout = Layout::new(shape, prefixes.get(path));
                self.update(path, value, grad, layout, clip, lr)
            }
            None => value,
        })
    }

    fn update(
        &mut self,
        path: &str,
        value: Tensor<1>,
        grad: Tensor<1>,
        layout: Layout,
        clip: f64,
        lr: f64,
    ) -> Tensor<1> {
        // A grid's scales learn more slowly, as in NNCF's absorbable LoRA, and have no weight
        // decay, since a scale should not shrink towards 0.
        let (lr, weight_decay) = if path.ends_with(SCALES) {
            (lr * SCALES_LR, 0.0)
        } else {
            (lr, self.weight_decay)
        };
        let zeros = || Tensor::zeros([layout.outer * layout.n * layout.inner], &value.device());
        let Moments { m, v, mut times } = self.state.remove(path).unwrap_or_else(|| Moments {
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
        self.state.insert(path.to_string(), Moments { m, v, times });
        value
    }

    /// Returns the moments, named `m.<path>` and `v.<path>`, and the number of steps of each index
    /// of each parameter.
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

    /// Restores the state returned by [`moments`](Self::moments). `read` returns a tensor's
    /// elements by name.
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

/// Updates value and moments with tensor operations, for any backend.
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
