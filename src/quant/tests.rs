use std::path::PathBuf;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;

use super::*;
use crate::error::Error;
use crate::format::QuantizedMatrix;
use crate::linalg::{Factor, FactorConfig, Hessian, Matrix};
use crate::sparsity::{Mask, Method, Pattern, SparseGptConfig, prune, sparsegpt};

fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Matrix::from_fn(rows, cols, |_, _| rng.random_range(-0.3f32..0.25))
}

/// Creates inputs whose columns are correlated and differ in size.
fn correlated(d: usize, tokens: usize, seed: u64) -> Hessian {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut hessian = Hessian::new(d);
    let mut x = vec![0.0_f32; tokens * d];
    for row in x.chunks_exact_mut(d) {
        let mut last = 0.0;
        for (j, value) in row.iter_mut().enumerate() {
            last = 0.8 * last + rng.random_range(-1.0f32..1.0);
            *value = last * (0.3 + (j * 7 % 11) as f32 * 0.2);
        }
    }
    hessian.update(&x).unwrap();
    hessian
}

/// Computes `e H e^T`, the squared output error caused by an error `e` of one output's weights.
fn output_error(hessian: &Hessian, error: &[f32]) -> f64 {
    let h = hessian.to_matrix();
    let dot = |row: &[f32]| -> f64 {
        row.iter()
            .zip(error)
            .map(|(h, e)| f64::from(*h) * f64::from(*e))
            .sum()
    };
    (0..error.len())
        .map(|i| f64::from(error[i]) * dot(h.row(i)))
        .sum()
}

fn energy(hessian: &Hessian, weight: &Matrix, found: &Matrix) -> f64 {
    (0..weight.rows())
        .map(|i| {
            let error: Vec<f32> = weight
                .row(i)
                .iter()
                .zip(found.row(i))
                .map(|(a, b)| b - a)
                .collect();
            output_error(hessian, &error)
        })
        .sum()
}

fn factor(hessian: &Hessian) -> Factor {
    Factor::new(hessian, &FactorConfig::new()).unwrap()
}

/// The textbook algorithm in `f64`: after each column is rounded, the remaining ones are adjusted
/// with the inverse of the remaining Hessian.
fn textbook(
    weight: &Matrix,
    hessian: &Hessian,
    config: &GridConfig,
    mask: Option<&Mask>,
) -> Vec<u8> {
    let d = weight.cols();
    let mean = hessian
        .diagonal()
        .iter()
        .map(|v| f64::from(*v))
        .sum::<f64>()
        / d as f64;
    let mut inverse: Vec<Vec<f64>> = (0..d)
        .map(|i| {
            let row = (0..d)
                .map(|j| f64::from(hessian.get(i, j)) + if i == j { 0.01 * mean } else { 0.0 });
            row.chain((0..d).map(|j| f64::from(u8::from(i == j))))
                .collect()
        })
        .collect();
    for i in 0..d {
        let pivot: Vec<f64> = inverse[i].iter().map(|v| v / inverse[i][i]).collect();
        for (k, row) in inverse.iter_mut().enumerate() {
            let f = row[i];
            row.iter_mut()
                .zip(&pivot)
                .for_each(|(v, p)| *v = if k == i { *p } else { *v - f * p });
        }
    }
    let mut inverse: Vec<Vec<f64>> = inverse.into_iter().map(|row| row[d..].to_vec()).collect();
    let mut w: Vec<Vec<f64>> = (0..weight.rows())
        .map(|i| weight.row(i).iter().map(|v| f64::from(*v)).collect())
        .collect();
    let mut codes = vec![0; weight.rows() * d];
    let mut grids = vec![
        GroupGrid {
            scale: 0.0,
            zero: 0,
            top: 0
        };
        weight.rows()
    ];
    let group = config.group_len(d);
    for j in 0..d {
        for (i, row) in w.iter_mut().enumerate() {
            if j % group == 0 {
                let values: Vec<f32> = row[j..(j + group).min(d)]
                    .iter()
                    .map(|v| *v as f32)
                    .collect();
                grids[i] = config.grid(&values).unwrap();
            }
            let code = match mask {
                Some(mask) if !mask.get(i, j) => grids[i].zero,
                _ => grids[i].code(row[j] as f32),
            };
            codes[i * d + j] = code;
            let error = (row[j] - f64::from(grids[i].value(code))) / inverse[j][j];
            (j..d).for_each(|k| row[k] -= error * inverse[j][k]);
        }
        let pivot = inverse[j].clone();
        for row in &mut inverse {
            let f = row[j] / pivot[j];
            row.iter_mut().zip(&pivot).for_each(|(v, p)| *v -= f * p);
        }
    }
    codes
}

fn agreement(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
}

#[test]
fn gptq_without_an_inverse_is_the_textbooks() {
    for (cols, group, block, symmetric) in [
        (37, 8, 128, false),
        (70, 70, 16, true),
        (45, 10, 7, true),
        (150, 32, 64, false),
        (1, 1, 1, false),
    ] {
        let (w, h) = (random(6, cols, cols as u64), correlated(cols, 3 * cols, 5));
        let grid = GridConfig::new(3)
            .with_group_size(Some(group))
            .with_symmetric(symmetric);
        let config = GptqConfig::new(grid).with_block_size(block);
        let found = gptq(&w, &factor(&h), &config, None).unwrap();
        assert!(
            agreement(&found.parts().codes, &textbook(&w, &h, &grid, None)) > 0.99,
            "{cols} by {group}"
        );
        let mut scores = w.clone();
        scores.as_mut_slice().iter_mut().for_each(|v| *v = v.abs());
        let mask = Mask::from_scores(&scores, &Pattern::Layer { ratio: 0.4 }).unwrap();
        let mut pruned = w.clone();
        mask.apply(&mut pruned).unwrap();
        // The textbook algorithm ignores the mask when it determines the grid of a group.
        let grid = grid.with_group_size(None);
        let found = gptq(
            &pruned,
            &factor(&h),
            &GptqConfig { grid, ..config },
            Some(&mask),
        )
        .unwrap();
        assert!(
            agreement(
                &found.parts().codes,
                &textbook(&pruned, &h, &grid, Some(&mask))
            ) > 0.99
        );
    }
}

#[test]
fn gptq_errs_less_than_rounding_to_nearest() {
    for seed in 0..6 {
        let (w, h) = (random(13, 77, seed), correlated(77, 300, seed + 50));
        for bits in [2, 3, 4, 8] {
            for (group, symmetric) in [
                (Some(32), false),
                (None, true),
                (Some(16), true),
                (None, false),
            ] {
                let grid = GridConfig::new(bits)
                    .with_group_size(group)
                    .with_symmetric(symmetric);
                let nearest = energy(
                    &h,
                    &w,
                    &round_to_nearest(&w, &grid, None).unwrap().dequantize(),
                );
                for groups in [GroupGrids::Current, GroupGrids::Block, GroupGrids::Static] {
                    for order in [false, true] {
                        let factor =
                            Factor::new(&h, &FactorConfig::new().with_activation_order(order))
                                .unwrap();
                        let found = gptq(
                            &w,
                            &factor,
                            &GptqConfig::new(grid).with_groups(groups),
                            None,
                        )
                        .unwrap();
                        let found = energy(&h, &w, &found.dequantize());
                        assert!(
                            found < nearest,
                            "{grid:?} {groups:?} {order}: {found} against {nearest}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_mask_is_kept_and_joint_is_no_worse_than_one_after_the_other() {
    let (mut joint_sum, mut after_sum, mut undone) = (0.0, 0.0, 0);
    for seed in 0..8 {
        let (w, h) = (random(24, 90, seed), correlated(90, 400, seed + 20));
        let factor = factor(&h);
        let config =
            GptqConfig::new(GridConfig::new(3).with_group_size(Some(16))).with_block_size(32);
        for pattern in [Pattern::Layer { ratio: 0.5 }, Pattern::NM { n: 2, m: 4 }] {
            let (joint, mask) = sparse_gptq(&w, &factor, &config, &pattern).unwrap();
            let kept = |found: &QuantizedMatrix, mask: &Mask| {
                (0..24 * 90).all(|k| {
                    let (i, j) = (k / 90, k % 90);
                    mask.get(i, j) || found.parts().codes[k] == found.grid(i, found.group_of(j)).1
                })
            };
            assert!(kept(&joint, &mask));
            if let Pattern::NM { .. } = pattern {
                assert!((0..24).all(|i| {
                    (0..22).all(|g| (0..4).filter(|j| mask.get(i, 4 * g + j)).count() == 2)
                }));
            } else {
                assert_eq!(mask.count_kept(), 24 * 45);
            }
            let mut pruned = w.clone();
            let settings = SparseGptConfig::new().with_block_size(32);
            let alone = sparsegpt(&mut pruned, &factor, &pattern, &settings).unwrap();
            let after = gptq(&pruned, &factor, &config, Some(&alone)).unwrap();
            assert!(kept(&after, &alone));
            let free = gptq(&pruned, &factor, &config, None).unwrap().dequantize();
            undone += (0..24 * 90)
                .filter(|k| !alone.get(k / 90, k % 90) && free.as_slice()[*k] != 0.0)
                .count();
            joint_sum += energy(&h, &w, &joint.dequantize()).ln();
            after_sum += energy(&h, &w, &after.dequantize()).ln();
            let nearest = round_to_nearest(&pruned, &config.grid, Some(&alone)).unwrap();
            assert!(kept(&nearest, &alone));
            assert!(energy(&h, &w, &after.dequantize()) < energy(&h, &w, &nearest.dequantize()));
        }
    }
    let ratio = ((joint_sum - after_sum) / 16.0_f64).exp();
    eprintln!("joint over sequential: {ratio:.3}");
    // The ratio is 0.998 on one machine; rounding on another processor changes some codes.
    assert!(ratio <= 1.01);
    // GPTQ without a mask fills many zeros.
    assert!(undone > 100);
}

#[test]
fn sparsegpt_errs_less_than_masks_of_the_same_share() {
    for seed in 0..5 {
        let (w, h) = (random(20, 70, seed), correlated(70, 300, seed + 9));
        let mut norms = crate::sparsity::InputNorms::new(70);
        norms.update_sums(&h.diagonal(), 1).unwrap();
        for pattern in [
            Pattern::Unstructured { ratio: 0.6 },
            Pattern::NM { n: 2, m: 4 },
            Pattern::NM { n: 3, m: 7 },
        ] {
            let mut best = w.clone();
            let mask =
                sparsegpt(&mut best, &factor(&h), &pattern, &SparseGptConfig::new()).unwrap();
            assert!(
                (0..20).all(|i| (0..70).all(|j| mask.get(i, j) || best.row(i)[j].to_bits() == 0))
            );
            let wanda = Method::Wanda.scores(&w, Some(&norms)).unwrap();
            let mut other = w.clone();
            let by_wanda = prune(&mut other, &wanda, &pattern).unwrap();
            assert!(mask.count_kept().abs_diff(by_wanda.count_kept()) <= 20);
            assert!(
                energy(&h, &w, &best) < 0.9 * energy(&h, &w, &other),
                "{pattern}"
            );
        }
        let ordered = Factor::new(&h, &FactorConfig::new().with_activation_order(true)).unwrap();
        let mut changed = w.clone();
        let mask = sparsegpt(
            &mut changed,
            &ordered,
            &Pattern::Layer { ratio: 0.5 },
            &SparseGptConfig::new(),
        )
        .unwrap();
        assert_eq!(mask, Mask::from_nonzero(&changed));
        assert_eq!(mask.count_kept(), 700);
        let refused = sparsegpt(
            &mut changed,
            &ordered,
            &Pattern::NM { n: 2, m: 4 },
            &SparseGptConfig::new(),
        );
        assert!(matches!(
            refused,
            Err(Error::InvalidArgument {
                name: "activation_order",
                ..
            })
        ));
        let mut whole = w.clone();
        sparsegpt(
            &mut whole,
            &factor(&h),
            &Pattern::Layer { ratio: 0.0 },
            &SparseGptConfig::new(),
        )
        .unwrap();
        assert_eq!(whole, w);
    }
}

#[test]
fn grids_reach_their_ends_and_zero() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for bits in [2, 3, 4, 8] {
        for round in 0..200 {
            let shift = [0.0, 0.6, -0.6][round % 3];
            let weights: Vec<f32> = (0..17)
                .map(|_| rng.random_range(-0.5f32..0.5) + shift)
                .collect();
            for symmetric in [false, true] {
                for zero_from_one in [false, true] {
                    for dtype in [ScaleDtype::F32, ScaleDtype::F16, ScaleDtype::Bf16] {
                        let config = GridConfig::new(bits)
                            .with_symmetric(symmetric)
                            .with_scale_dtype(dtype);
                        let grid = config
                            .with_zero_from_one(zero_from_one)
                            .grid(&weights)
                            .unwrap();
                        assert_eq!(grid.scale, dtype.round(grid.scale));
                        assert_eq!((grid.value(grid.zero), grid.code(0.0)), (0.0, grid.zero));
                        assert!(!zero_from_one || grid.zero >= 1);
                        assert!(!symmetric || grid.zero == 1 << (bits - 1));
                        // A symmetric grid has one step less on the positive side, and rounded
                        // scales may not quite reach the ends.
                        let slack =
                            if symmetric { 1.01 } else { 0.51 } + f32::from(grid.top) / 256.0;
                        for w in &weights {
                            let code = grid.code(*w);
                            assert!(
                                (grid.value(code) - w).abs() <= slack * grid.scale,
                                "{w} by {grid:?}"
                            );
                            let exact = (w / grid.scale).round_ties_even() + f32::from(grid.zero);
                            assert_eq!(f32::from(code), exact.clamp(0.0, f32::from(grid.top)));
                        }
                    }
                }
            }
        }
    }
    let config = GridConfig::new(4);
    assert_eq!(
        config.grid(&[0.0, -0.0]).unwrap(),
        GroupGrid {
            scale: 0.0,
            zero: 8,
            top: 15
        }
    );
    assert_eq!(config.grid(&[0.0]).unwrap().code(3.0), 8);
    assert_eq!(
        config
            .with_scale_dtype(ScaleDtype::F16)
            .grid(&[1e-9, -1e-9])
            .unwrap()
            .scale,
        0.0
    );
    let large = config.with_scale_dtype(ScaleDtype::F16).grid(&[2e6, -1e6]);
    assert!(matches!(
        large,
        Err(Error::TensorOverflow { dtype: "f16", .. })
    ));
    assert!(matches!(
        config.grid(&[3e38, -3e38]),
        Err(Error::TensorOverflow { .. })
    ));
    assert!(matches!(
        config.grid(&[1.0, f32::NAN]),
        Err(Error::NotFinite { index: 1, .. })
    ));
}

#[test]
fn groups_of_zeros_and_ragged_ones() {
    let (mut w, h) = (random(5, 43, 1), correlated(43, 200, 2));
    for i in 0..5 {
        w.row_mut(i)[16..32].fill(0.0);
    }
    w.row_mut(3).fill(0.0);
    let mask = Mask::from_nonzero(&w);
    for grid in [
        GridConfig::new(4).with_group_size(Some(16)),
        GridConfig::new(2).with_group_size(Some(99)),
    ] {
        let config = GptqConfig::new(grid);
        for order in [false, true] {
            let factor =
                Factor::new(&h, &FactorConfig::new().with_activation_order(order)).unwrap();
            let found = [
                round_to_nearest(&w, &grid, None).unwrap(),
                gptq(&w, &factor, &config, Some(&mask)).unwrap(),
                gptq(
                    &w,
                    &factor,
                    &config.with_groups(GroupGrids::Static),
                    Some(&mask),
                )
                .unwrap(),
            ];
            for found in found {
                let dense = found.dequantize();
                assert!(dense.row(3).iter().all(|v| *v == 0.0));
                assert!((0..5).all(|i| dense.row(i)[16..32].iter().all(|v| *v == 0.0)));
                assert!(dense.count_zeros() < 4 * 43);
            }
        }
    }
    // These columns are 0 in all of the input.
    let mut x = vec![0.0; 60 * 43];
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    x.chunks_exact_mut(43).for_each(|row| {
        row[..40]
            .iter_mut()
            .for_each(|v| *v = rng.random_range(-1.0..1.0))
    });
    let mut dead = Hessian::new(43);
    dead.update(&x).unwrap();
    let found = gptq(
        &random(5, 43, 7),
        &factor(&dead),
        &GptqConfig::new(GridConfig::new(4)),
        None,
    )
    .unwrap();
    assert!((0..5).all(|i| found.dequantize().row(i)[40..].iter().all(|v| *v == 0.0)));
}

#[test]
fn bad_arguments_are_refused() {
    let (w, h) = (random(3, 20, 1), correlated(20, 60, 2));
    let f = factor(&h);
    let good = GptqConfig::new(GridConfig::new(4).with_group_size(Some(6)));
    for (name, config) in [
        (
            "bits",
            GptqConfig {
                grid: GridConfig::new(5),
                ..good
            },
        ),
        (
            "group_size",
            GptqConfig {
                grid: good.grid.with_group_size(Some(0)),
                ..good
            },
        ),
        ("block_size", good.with_block_size(0)),
    ] {
        let error = gptq(&w, &f, &config, None).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        assert!(name == "block_size" || round_to_nearest(&w, &config.grid, None).is_err());
    }
    let mut nan = w.clone();
    nan.as_mut_slice()[23] = f32::NAN;
    assert!(matches!(
        gptq(&nan, &f, &good, None),
        Err(Error::NotFinite { index: 23, .. })
    ));
    assert!(matches!(
        round_to_nearest(&nan, &good.grid, None),
        Err(Error::NotFinite { index: 23, .. })
    ));
    assert!(matches!(
        gptq(&random(3, 19, 1), &f, &good, None),
        Err(Error::ShapeMismatch { .. })
    ));
    let mask = Mask::filled(4, 20, true);
    assert!(matches!(
        gptq(&w, &f, &good, Some(&mask)),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(round_to_nearest(&w, &good.grid, Some(&mask)).is_err());
    assert!(sparse_gptq(&w, &f, &good, &Pattern::NM { n: 3, m: 2 }).is_err());
    assert!(sparse_gptq(&w, &f, &good, &Pattern::Layer { ratio: f64::NAN }).is_err());
    let mut pruned = nan.clone();
    assert!(
        sparsegpt(
            &mut pruned,
            &f,
            &Pattern::NM { n: 2, m: 4 },
            &SparseGptConfig::new()
        )
        .is_err()
    );
    assert!(
        sparsegpt(
            &mut pruned,
            &f,
            &Pattern::NM { n: 2, m: 4 },
            &SparseGptConfig { block_size: 0 }
        )
        .is_err()
    );
    for (rows, cols) in [(0, 20), (3, 0), (0, 0)] {
        let (w, f) = (Matrix::zeros(rows, cols), factor(&Hessian::new(cols)));
        assert_eq!(gptq(&w, &f, &good, None).unwrap().dequantize(), w);
        assert_eq!(
            round_to_nearest(&w, &good.grid, None).unwrap().dequantize(),
            w
        );
        sparse_gptq(&w, &f, &good, &Pattern::NM { n: 2, m: 4 }).unwrap();
    }
}

#[test]
fn thread_count_does_not_matter() {
    let w = random(70, 260, 5);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let h = correlated(260, 300, 6);
            let config = GptqConfig::new(GridConfig::new(4).with_group_size(Some(32)));
            let joint = sparse_gptq(
                &w,
                &factor(&h),
                &config,
                &Pattern::Unstructured { ratio: 0.5 },
            )
            .unwrap();
            let ordered =
                Factor::new(&h, &FactorConfig::new().with_activation_order(true)).unwrap();
            (joint, gptq(&w, &ordered, &config, None).unwrap())
        })
    };
    let first = run(1);
    assert_eq!(first.1.parts().group_of.as_ref().map(Vec::len), Some(260));
    assert!(run(2) == first && run(7) == first);
}

struct Vectors {
    bytes: Vec<u8>,
}

impl Vectors {
    fn open(layer: &str) -> Option<Self> {
        let root = std::env::var_os("ELASTIC_LORA_SHARED").map_or_else(
            || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")),
            PathBuf::from,
        );
        match std::fs::read(root.join(format!("vectors/pruning/{layer}.safetensors"))) {
            Ok(bytes) => Some(Self { bytes }),
            Err(_) => {
                eprintln!("skipped: no shared vectors");
                None
            }
        }
    }

    fn matrix(&self, name: &str) -> Matrix {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        let cols = *tensor.shape().last().unwrap();
        let values: Vec<f32> = tensor
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        Matrix::new(values.len() / cols, cols, values).unwrap()
    }
}

fn same(a: &Matrix, b: &Matrix, scale: f32) -> f64 {
    let close = a
        .as_slice()
        .iter()
        .zip(b.as_slice())
        .filter(|(a, b)| (*a - *b).abs() <= 1e-3 * scale)
        .count();
    close as f64 / a.as_slice().len() as f64
}

#[test]
fn weights_are_those_of_the_authors_code() {
    for layer in ["l0.q_proj", "l1.down_proj"] {
        let Some(vectors) = Vectors::open(layer) else {
            return;
        };
        let w = vectors.matrix("weight");
        let h = Hessian::from_matrix(vectors.matrix("H")).unwrap();
        let mut own = Hessian::new(w.cols());
        own.update(vectors.matrix("x").as_slice()).unwrap();
        let worst = (0..w.cols())
            .map(|i| (own.get(i, i) / 4.0 / h.get(i, i) - 1.0).abs())
            .fold(0.0, f32::max);
        assert!(
            worst < 1e-4,
            "{layer}: the Hessian's diagonal is off by {worst}"
        );

        let per_row = GridConfig::new(4).with_group_size(None);
        let nearest = round_to_nearest(&w, &per_row, None).unwrap();
        assert_eq!(
            nearest.dequantize(),
            vectors.matrix("rtn.w_4b_perrow_asym"),
            "{layer}"
        );
        assert_eq!(
            nearest.parts().scales,
            vectors.matrix("gptq.scale_4b_perrow_asym").into_vec()
        );
        let zeros: Vec<f32> = nearest
            .parts()
            .zeros
            .iter()
            .map(|zero| f32::from(*zero))
            .collect();
        assert_eq!(zeros, vectors.matrix("gptq.zero_4b_perrow_asym").into_vec());

        let by_32 = GridConfig::new(4).with_group_size(Some(32));
        for (name, grid, groups, order, least) in [
            ("perrow_asym", per_row, GroupGrids::Block, false, 0.995),
            (
                "perrow_sym",
                per_row.with_symmetric(true),
                GroupGrids::Block,
                false,
                0.995,
            ),
            ("g32_asym", by_32, GroupGrids::Block, false, 0.995),
            ("g32_asym", by_32, GroupGrids::Current, false, 0.0),
            (
                "g32_asym_static_actorder",
                by_32,
                GroupGrids::Static,
                true,
                0.995,
            ),
        ] {
            let factor =
                Factor::new(&h, &FactorConfig::new().with_activation_order(order)).unwrap();
            let found = gptq(
                &w,
                &factor,
                &GptqConfig::new(grid).with_groups(groups),
                None,
            )
            .unwrap()
            .dequantize();
            let reference = vectors.matrix(&format!("gptq.w_4b_{name}"));
            let ratio = energy(&h, &w, &found) / energy(&h, &w, &reference);
            let agree = same(&found, &reference, 0.01);
            let nearest = round_to_nearest(&w, &grid, None).unwrap().dequantize();
            let nearest = energy(&h, &w, &nearest) / energy(&h, &w, &reference);
            eprintln!(
                "{layer} {name} {groups:?}: {agree:.4} equal, error {ratio:.4} (to nearest {nearest:.3})"
            );
            assert!(
                agree >= least && ratio < 1.005,
                "{layer} {name} {groups:?}: {agree} equal, error {ratio}"
            );
        }
        for (name, pattern, block) in [
            ("50", "layer:0.5", 128),
            ("50_bs32", "layer:0.5", 32),
            ("2of4", "2:4", 128),
        ] {
            let reference = vectors.matrix(&format!("sparsegpt.w_{name}"));
            let mut found = w.clone();
            let settings = SparseGptConfig::new().with_block_size(block);
            let mask = sparsegpt(
                &mut found,
                &factor(&h),
                &pattern.parse().unwrap(),
                &settings,
            )
            .unwrap();
            let theirs = Mask::from_nonzero(&reference).to_bools();
            let equal = mask
                .to_bools()
                .iter()
                .zip(&theirs)
                .filter(|(a, b)| a == b)
                .count();
            let equal = equal as f64 / theirs.len() as f64;
            let ratio = energy(&h, &w, &found) / energy(&h, &w, &reference);
            eprintln!("{layer} {name}: masks {equal:.4} equal, error {ratio:.4}");
            assert!(
                equal > 0.99 && ratio < 1.005,
                "{layer} {name}: masks {equal} equal, error {ratio}"
            );
        }
    }
}
