use std::path::PathBuf;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;

use super::*;

fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0f32..1.0))
}

/// A stable sort, which the selection must agree with.
fn oracle(scores: &[f32], count: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].partial_cmp(&scores[*b]).unwrap());
    let mut keep = vec![true; scores.len()];
    order[..count].iter().for_each(|k| keep[*k] = false);
    keep
}

fn shared() -> Option<PathBuf> {
    let path = std::env::var_os("ELASTIC_LORA_SHARED").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")),
        PathBuf::from,
    );
    path.is_dir().then_some(path)
}

fn f32s(st: &SafeTensors, name: &str) -> (Vec<usize>, Vec<f32>) {
    let t = st.tensor(name).unwrap();
    (
        t.shape().to_vec(),
        t.data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect(),
    )
}

#[test]
fn masks_equal_wandas_own_element_for_element() {
    let Some(shared) = shared() else {
        eprintln!("skipped: no shared vectors");
        return;
    };
    for layer in ["l0.q_proj", "l1.down_proj"] {
        let bytes =
            std::fs::read(shared.join(format!("vectors/pruning/{layer}.safetensors"))).unwrap();
        let st = SafeTensors::deserialize(&bytes).unwrap();
        let (shape, w) = f32s(&st, "weight");
        let w = Matrix::new(shape[0], shape[1], w).unwrap();
        let (x_shape, x) = f32s(&st, "x");
        let mut norms = InputNorms::new(x_shape[2]);
        for sequence in x.chunks_exact(x_shape[1] * x_shape[2]) {
            norms.update(sequence, 1).unwrap();
        }
        assert_eq!(norms.sequences(), 8);
        let expected = f32s(&st, "wanda.scaler_row").1;
        for (a, b) in norms.mean_sq_norms().iter().zip(&expected) {
            assert!((a - b).abs() <= 1e-5 * b.abs(), "{layer}: {a} against {b}");
        }
        for scores in [
            Method::Wanda.scores(&w, Some(&norms)).unwrap(),
            wanda_scores(&w, &expected).unwrap(),
        ] {
            for (name, pattern) in [
                ("30", "unstructured:0.3"),
                ("50", "unstructured:0.5"),
                ("2of4", "2:4"),
                ("4of8", "4:8"),
            ] {
                let mut pruned = w.clone();
                let mask = prune(&mut pruned, &scores, &pattern.parse().unwrap()).unwrap();
                let reference: Vec<bool> = st
                    .tensor(&format!("wanda.pruned_mask_{name}"))
                    .unwrap()
                    .data()
                    .iter()
                    .map(|b| *b == 0)
                    .collect();
                assert_eq!(mask.to_bools(), reference, "{layer} {pattern}");
                assert_eq!(Mask::from_nonzero(&pruned), mask);
            }
        }
    }
}

#[test]
fn selection_agrees_with_a_stable_sort_with_many_ties() {
    for (seed, (rows, cols)) in [(1, 1), (3, 17), (5, 64), (7, 65), (2, 333)]
        .into_iter()
        .enumerate()
    {
        let mut rng = ChaCha8Rng::seed_from_u64(seed as u64);
        // There are few distinct values, with both zeros and negative numbers among them.
        let scores = Matrix::from_fn(rows, cols, |_, _| -(rng.random_range(-3..4) as f32) * 0.5);
        for ratio in [0.0, 0.1, 0.3, 0.5, 0.77, 0.999, 1.0] {
            let mask = Mask::from_scores(&scores, &Pattern::Unstructured { ratio }).unwrap();
            let count = (cols as f64 * ratio) as usize;
            let expected: Vec<bool> = (0..rows)
                .flat_map(|i| oracle(scores.row(i), count))
                .collect();
            assert_eq!(mask.to_bools(), expected, "{rows}x{cols} {ratio}");
            let mask = Mask::from_scores(&scores, &Pattern::Layer { ratio }).unwrap();
            let count = ((rows * cols) as f64 * ratio) as usize;
            assert_eq!(
                mask.to_bools(),
                oracle(scores.as_slice(), count),
                "{rows}x{cols} layer {ratio}"
            );
            assert_eq!(mask.count_kept(), rows * cols - count);
        }
        for (n, m) in [(2, 4), (4, 8), (1, 3), (0, 4), (4, 4), (3, 5), (2, 1000)] {
            let mask = Mask::from_scores(&scores, &Pattern::NM { n, m }).unwrap();
            for i in 0..rows {
                for start in (0..cols).step_by(m) {
                    let end = (start + m).min(cols);
                    let group: Vec<bool> = (start..end).map(|j| mask.get(i, j)).collect();
                    let kept = group.iter().filter(|k| **k).count();
                    assert!(kept <= n);
                    let len = end - start;
                    assert_eq!(kept, (n * len).div_ceil(m), "{n}:{m} in a group of {len}");
                    assert_eq!(group, oracle(&scores.row(i)[start..end], len - kept));
                }
            }
        }
    }
}

#[test]
fn magnitude_keeps_the_large_ones() {
    let mut w = random(9, 37, 4);
    let before = w.clone();
    let scores = Method::Magnitude.scores(&w, None).unwrap();
    let mask = prune(&mut w, &scores, &Pattern::Unstructured { ratio: 0.4 }).unwrap();
    for i in 0..9 {
        let dropped = (0..37)
            .filter(|j| !mask.get(i, *j))
            .map(|j| before.row(i)[j].abs())
            .fold(0.0, f32::max);
        let kept = (0..37)
            .filter(|j| mask.get(i, *j))
            .map(|j| before.row(i)[j].abs())
            .fold(f32::MAX, f32::min);
        assert!(dropped <= kept);
        assert_eq!(w.row(i).iter().filter(|v| **v == 0.0).count(), 14);
        assert!((0..37).all(|j| w.row(i)[j]
            == if mask.get(i, j) {
                before.row(i)[j]
            } else {
                0.0
            }));
    }
    assert!((mask.sparsity() - 14.0 / 37.0).abs() < 1e-12);
    let harder = Mask::from_scores(&scores, &Pattern::Unstructured { ratio: 0.7 }).unwrap();
    assert!(harder.is_subset_of(&mask) && !mask.is_subset_of(&harder));
    assert!(!mask.is_subset_of(&Mask::filled(9, 36, true)));
}

#[test]
fn mask_round_trips_and_edges() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    for (rows, cols) in [(0, 5), (5, 0), (3, 64), (4, 129), (2, 63)] {
        let bools: Vec<bool> = (0..rows * cols).map(|_| rng.random()).collect();
        let mut mask = Mask::from_bools(rows, cols, &bools).unwrap();
        assert_eq!(mask.to_bools(), bools);
        assert_eq!(mask.count_kept(), bools.iter().filter(|b| **b).count());
        assert_eq!(Mask::from_nonzero(&mask.to_matrix()), mask);
        let full = Mask::filled(rows, cols, true);
        assert_eq!((full.count_kept(), full.sparsity()), (rows * cols, 0.0));
        assert!(mask.is_subset_of(&full));
        let mut w = random(rows, cols, 1);
        mask.apply(&mut w).unwrap();
        if rows * cols > 0 {
            mask.set(rows - 1, cols - 1, true);
            assert!(mask.get(rows - 1, cols - 1));
            mask.set(rows - 1, cols - 1, false);
            assert!(!mask.get(rows - 1, cols - 1));
        }
        Mask::from_scores(&w, &Pattern::NM { n: 2, m: 4 }).unwrap();
        Mask::from_scores(&w, &Pattern::Layer { ratio: 0.5 }).unwrap();
    }
    assert!(Mask::from_bools(2, 3, &[true; 5]).is_err());
    assert!(
        Mask::filled(2, 3, true)
            .apply(&mut Matrix::zeros(3, 2))
            .is_err()
    );
}

#[test]
fn thread_count_does_not_matter() {
    let scores = random(31, 130, 5);
    let masks: Vec<Mask> = [1, 2, 7]
        .map(|n| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(n)
                .build()
                .unwrap();
            pool.install(|| {
                Mask::from_scores(&scores, &Pattern::Unstructured { ratio: 0.5 }).unwrap()
            })
        })
        .into();
    assert!(masks.windows(2).all(|m| m[0] == m[1]));
}

#[test]
fn norms_are_means_over_sequences_however_batched() {
    let x = random(12, 7, 3);
    let mut one = InputNorms::new(7);
    x.as_slice()
        .chunks(3 * 7)
        .for_each(|s| one.update(s, 1).unwrap());
    let mut batched = InputNorms::new(7);
    batched.update(&x.as_slice()[..9 * 7], 3).unwrap();
    let sums: Vec<f32> = (0..7)
        .map(|j| (9..12).map(|i| x.row(i)[j] * x.row(i)[j]).sum())
        .collect();
    batched.update_sums(&sums, 1).unwrap();
    for (j, (a, b)) in one
        .mean_sq_norms()
        .iter()
        .zip(batched.mean_sq_norms())
        .enumerate()
    {
        let exact = (0..12).map(|i| f64::from(x.row(i)[j]).powi(2)).sum::<f64>() / 4.0;
        assert!((f64::from(*a) - exact).abs() < 1e-6 && (a - b).abs() < 1e-6);
    }
    let before = one.clone();
    assert!(one.update(&[1.0; 8], 1).is_err());
    assert!(matches!(
        one.update(&[f32::NAN; 7], 1),
        Err(Error::NotFinite { index: 0, .. })
    ));
    assert!(one.update(&[1.0; 7], 0).is_err());
    assert!(one.update_sums(&[1.0; 6], 1).is_err());
    assert!(one.update_sums(&[f32::INFINITY; 7], 1).is_err());
    assert_eq!(one, before);
    assert!(InputNorms::new(0).update(&[1.0], 1).is_err());
    InputNorms::new(0).update(&[], 1).unwrap();
}

#[test]
fn bad_arguments_are_refused() {
    for bad in [
        "",
        "2",
        "unstructured",
        "unstructured:x",
        "unstructured:1.1",
        "layer:-0.1",
        "unstructured:nan",
        "5:4",
        "0:0",
        "-1:4",
        "2:4:8",
    ] {
        assert!(bad.parse::<Pattern>().is_err(), "{bad}");
    }
    assert!(Pattern::from_name("2:4", 1.5).is_err());
    assert!(Pattern::from_name("dense", 0.5).is_err());
    for good in [
        "unstructured:0.5",
        "layer:0.3",
        "2:4",
        "unstructured:0",
        "0:4",
    ] {
        let pattern: Pattern = good.parse().unwrap();
        assert_eq!(pattern.to_string(), good);
        let json = serde_json::to_string(&pattern).unwrap();
        assert_eq!(json, format!("\"{good}\""));
        assert_eq!(serde_json::from_str::<Pattern>(&json).unwrap(), pattern);
    }
    assert_eq!(Pattern::from_name(" 2:4 ", 0.5).unwrap().ratio(), 0.5);
    assert!(serde_json::from_str::<Pattern>("\"3:2\"").is_err());
    let mut w = random(3, 5, 1);
    for pattern in [
        Pattern::NM { n: 3, m: 2 },
        Pattern::NM { n: 0, m: 0 },
        Pattern::Layer { ratio: f64::NAN },
    ] {
        assert!(Mask::from_scores(&w, &pattern).is_err());
    }
    let mut scores = random(3, 5, 2);
    scores.as_mut_slice()[7] = f32::NAN;
    let before = w.clone();
    let refused = prune(&mut w, &scores, &Pattern::NM { n: 2, m: 4 });
    assert!(matches!(refused, Err(Error::NotFinite { index: 7, .. })));
    assert!(prune(&mut w, &random(5, 3, 1), &Pattern::NM { n: 2, m: 4 }).is_err());
    assert_eq!(w, before);
    assert!(wanda_scores(&w, &[1.0; 4]).is_err());
    assert!(wanda_scores(&w, &[-1.0; 5]).is_err());
    assert!(Method::Wanda.scores(&w, None).is_err());
    assert_eq!("Wanda".parse::<Method>().unwrap(), Method::Wanda);
    assert!("gptq".parse::<Method>().is_err());
}

#[test]
fn ria_weighs_each_weight_by_its_row_and_column() {
    let mut w = random(7, 13, 11);
    w.row_mut(2).fill(0.0);
    (0..7).for_each(|i| w.row_mut(i)[5] = 0.0);
    let norms: Vec<f32> = (0..13).map(|j| 0.3 + 1.7 * (j % 5) as f32).collect();
    let scores = ria_scores(&w, &norms).unwrap();
    let size = |i: usize, j: usize| f64::from(w.row(i)[j].abs());
    for i in 0..7 {
        for (j, norm) in norms.iter().enumerate() {
            let row: f64 = (0..13).map(|k| size(i, k)).sum();
            let column: f64 = (0..7).map(|k| size(k, j)).sum();
            let relative = if size(i, j) == 0.0 {
                0.0
            } else {
                size(i, j) / row + size(i, j) / column
            };
            let expected = relative * f64::from(*norm).powf(0.25);
            assert!(
                (f64::from(scores.row(i)[j]) - expected).abs() <= 1e-6 * (1.0 + expected),
                "({i}, {j})"
            );
        }
    }
    assert!(ria_scores(&w, &norms[1..]).is_err());
    assert!(ria_scores(&w, &[f32::NAN; 13]).is_err());
    assert!(
        Method::Ria
            .scores(&w, None)
            .unwrap_err()
            .to_string()
            .contains("ria")
    );
    assert!(Method::SparseGpt.scores(&w, None).is_err());
    for method in Method::ALL {
        assert_eq!(method.to_string().parse::<Method>().unwrap(), method);
        assert_eq!(
            serde_json::to_string(&method).unwrap(),
            format!("\"{method}\"")
        );
    }
}
