use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::adamw::NamedAdamW;
use super::gradients::{Grads, Prefix, Prefixes};
use super::host::on_host;
use crate::nn::host_values;

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

/// Gradients that are zero outside the active ranks, and the active prefix of each parameter.
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
    let prefixes =
        [("a", 1), ("b", 0)].map(|(path, axis)| (path.to_string(), Prefix { axis, active: rank }));
    (
        grads
            .map(|(path, grad)| (path.to_string(), tensor(grad)))
            .into(),
        prefixes.into(),
    )
}

fn adamw(in_place: bool) -> NamedAdamW {
    let mut optimizer = NamedAdamW::new((0.9, 0.98), 1e-6, 0.1, &Device::flex());
    optimizer.in_place = in_place;
    optimizer
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
                        used(part, i) || after[part][i].to_bits() == before.0[part][i].to_bits()
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
    // A shared tensor is copied; an unshared one is not.
    assert_ne!(before, at(held.clone()));
    let (held, first) = on_host(held, |values| values.as_ptr() as usize);
    assert_eq!(first, at(held));
}
