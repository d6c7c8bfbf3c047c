use std::mem::MaybeUninit;

use super::*;
use crate::arch::Activation;
use crate::kernels::level::Level;

#[test]
fn exp_is_accurate_at_every_level() {
    for level in Level::available() {
        for step in 0..200_000 {
            let x = -87.0 + step as f32 * (175.0 / 200_000.0);
            let mut row = [x];
            exp_shifted(level, &mut row, 0.0, 1.0);
            let exact = f64::from(x).exp();
            let error = ((f64::from(row[0]) - exact) / exact).abs();
            assert!(
                error < 2e-7,
                "{level:?}: exp({x}) = {}, off by {error}",
                row[0]
            );
        }
        let mut row = [
            f32::NEG_INFINITY,
            -1e30,
            -88.0,
            0.0,
            f32::NAN,
            f32::INFINITY,
        ];
        exp_shifted(level, &mut row, 0.0, 1.0);
        assert_eq!(&row[..4], &[0.0, 0.0, 0.0, 1.0]);
        assert!(row[4].is_nan() && row[5] > 1e38);
    }
}

#[test]
fn levels_agree() {
    let wave = |n: usize, step: f32| {
        (0..n)
            .map(|i| (i as f32 * step).sin() * 6.0)
            .collect::<Vec<f32>>()
    };
    let written = |out: Vec<MaybeUninit<f32>>| {
        // SAFETY: the kernels write every element.
        out.into_iter()
            .map(|x| unsafe { x.assume_init() })
            .collect::<Vec<f32>>()
    };
    for width in [2, 16, 34, 250] {
        let (a, b) = (wave(3 * width, 0.7), wave(3 * width, 1.3));
        let run = |level| {
            let mut all = vec![log_sum_exp(level, &a)];
            let mut out = vec![MaybeUninit::uninit(); 3 * width];
            for activation in [Activation::Silu, Activation::GeluTanh] {
                gated(level, activation, &a, &b, &mut out);
                all.extend(written(out.clone()));
                let (mut gate, mut up) = (a.clone(), b.clone());
                gated_backward(level, activation, &mut gate, &mut up, &b);
                all.extend(gate.into_iter().chain(up));
            }
            rms_norm(level, &a, &b[..width], 1e-3, &mut out);
            all.extend(written(out));
            let mut out = vec![MaybeUninit::uninit(); width];
            rotate(
                level,
                &a[..width],
                &b[..width / 2],
                &b[width / 2..width],
                &mut out,
            );
            all.extend(written(out.clone()));
            rotate_back(
                level,
                &a[..width],
                &b[..width / 2],
                &b[width / 2..width],
                &mut out,
            );
            all.extend(written(out));
            let (mut grad, mut sum) = (b.clone(), vec![0.0; width]);
            rms_norm_backward(level, &a, &b[..width], 1e-3, &mut grad);
            rms_norm_backward_weight(level, &a, &b, 1e-3, &mut sum);
            let (mut weights, mut slopes) = (a.clone(), b.clone());
            all.push(softmax(level, &mut weights));
            let mut rest = b.clone();
            let (log_sum_exp, cross_entropy) = softmax_less(level, &mut rest, &weights, 0.7);
            all.extend(rest.into_iter().chain([log_sum_exp, cross_entropy]));
            softmax_backward(level, &weights, &mut slopes);
            all.into_iter()
                .chain(grad)
                .chain(sum)
                .chain(weights)
                .chain(slopes)
                .collect()
        };
        let want: Vec<f32> = run(Level::PORTABLE);
        for level in Level::available() {
            for (got, want) in run(level).iter().zip(&want) {
                assert!(
                    (got - want).abs() <= 2e-5 * (1.0 + want.abs()),
                    "{level:?}, {width}: {got} and {want}"
                );
            }
        }
    }
}
