//! Compares packed products, both with the processor's vector instructions and number by number,
//! with sums in `f64`.

use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::operand::{Numbers, Operand, Output};
use super::packed::{Engine, Left};
use super::tile::Kind;
use crate::kernels::Level;
use crate::kernels::disjoint::Disjoint;

/// A random matrix of `lines` x `inner` in memory with gaps, and its numbers.
struct Random {
    f32s: Vec<f32>,
    bf16s: Vec<bf16>,
    f16s: Vec<f16>,
    line: usize,
    step: usize,
    inner: usize,
}

impl Random {
    fn new(rng: &mut ChaCha8Rng, lines: usize, inner: usize, order: usize) -> Self {
        // The matrix is contiguous along the inner dimension, across it, or along neither.
        let (line, step) = [(inner + 3, 1), (1, lines + 2), (2 * inner + 5, 2)][order];
        let n = 1 + lines * line + inner * step;
        let f32s: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0_f32..1.0)).collect();
        let (bf16s, f16s) = f32s
            .iter()
            .map(|x| (bf16::from_f32(*x), f16::from_f32(*x)))
            .unzip();
        Self {
            f32s,
            bf16s,
            f16s,
            line,
            step,
            inner,
        }
    }

    fn operand(&self, format: usize) -> Operand {
        let first = match format {
            0 => Numbers::F32(&self.f32s[1]),
            1 => Numbers::Bf16(&self.bf16s[1]),
            _ => Numbers::F16(&self.f16s[1]),
        };
        Operand {
            first,
            line: self.line as isize,
            step: self.step as isize,
            inner: self.inner,
        }
    }

    /// Returns an element with the precision that the product sees.
    fn at(&self, kind: Kind, format: usize, line: usize, step: usize) -> f64 {
        let index = 1 + line * self.line + step * self.step;
        let value = [
            self.f32s[index],
            self.bf16s[index].to_f32(),
            self.f16s[index].to_f32(),
        ][format];
        f64::from(if kind == Kind::Bf16 {
            bf16::from_f32(value).to_f32()
        } else {
            value
        })
    }
}

fn engines() -> Vec<Engine> {
    let kinds = [Kind::F32, Kind::Bf16];
    let portable = kinds.map(|kind| Engine {
        level: Level::PORTABLE,
        kind,
        parallel: false,
    });
    let found = kinds
        .iter()
        .flat_map(|kind| [true, false].map(|parallel| Engine::new(*kind, parallel)));
    portable.into_iter().chain(found.flatten()).collect()
}

#[test]
fn products_of_odd_sizes_in_every_order_and_format() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let sizes = [
        [1, 1, 1],
        [2, 3, 5],
        [12, 32, 2],
        [13, 33, 257],
        [31, 70, 1300],
        [5, 24, 17],
        [9, 550, 33],
        [200, 49, 231],
    ];
    for (size, [m, n, inner]) in sizes.into_iter().enumerate() {
        for order in 0..9 {
            let left = Random::new(&mut rng, m, inner, order % 3);
            let right = Random::new(&mut rng, n, inner, order / 3);
            for (engine, format) in engines()
                .into_iter()
                .flat_map(|engine| [0, 1, 2].map(|format| (engine, format)))
            {
                let add = (order + size) % 2 == 1;
                let mut out = vec![0.5; m * (n + 1)];
                let output = Output::new(Disjoint::new(&mut out), n + 1)
                    .times(-1.5)
                    .added_if(add);
                // SAFETY: the operands are alive and have these sizes.
                unsafe { engine.product([m, n], left.operand(0), right.operand(format), output) };
                for (row, out) in out.chunks_exact(n + 1).enumerate() {
                    for (column, got) in out[..n].iter().enumerate() {
                        let terms = (0..inner).map(|k| {
                            left.at(engine.kind, 0, row, k)
                                * right.at(engine.kind, format, column, k)
                        });
                        let want = -1.5 * terms.sum::<f64>() + if add { 0.5 } else { 0.0 };
                        let error = (f64::from(*got) - want).abs();
                        assert!(
                            error < 6e-5,
                            "{engine:?} {m} {n} {inner} {order} {format}: {got}, not {want}"
                        );
                    }
                    assert_eq!(out[n], 0.5, "beyond the product");
                }
            }
        }
    }
}

#[test]
fn parts_are_one_product_and_threads_do_not_matter() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (m, n, inner) = (151, 210, [601, 23]);
    let lefts = inner.map(|inner| Random::new(&mut rng, m, inner, 0));
    let rights = inner.map(|inner| Random::new(&mut rng, n, inner, 1));
    for engine in engines() {
        let run = || {
            let mut out = vec![0.25; m * n];
            let mut left = Left::new(engine, m, &inner);
            // SAFETY: the operands are alive and have these sizes.
            unsafe {
                (0..2).for_each(|part| left.pack(part, lefts[part].operand(0)));
                let rights = rights.each_ref().map(|right| right.operand(0));
                // Multiply the first part alone, then both.
                let output = Output::new(Disjoint::new(&mut out), n).added();
                left.times(n, &rights[..1], output.times(0.5));
                left.times(n, &rights, output);
            }
            out
        };
        let out = run();
        for (row, column) in [(0, 0), (7, 31), (150, 209), (77, 100)] {
            let part = |part: usize| -> f64 {
                let terms = (0..inner[part]).map(|k| {
                    lefts[part].at(engine.kind, 0, row, k)
                        * rights[part].at(engine.kind, 0, column, k)
                });
                terms.sum()
            };
            let (got, want) = (out[row * n + column], 0.25 + 1.5 * part(0) + part(1));
            assert!(
                (f64::from(got) - want).abs() < 1e-4,
                "{engine:?} {row} {column}: {got}, not {want}"
            );
        }
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            assert_eq!(pool.install(run), out, "{engine:?}, {threads} threads");
        }
    }
}

#[test]
fn strips_are_the_product_whatever_the_columns() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for [m, n, inner] in [[1, 1, 1], [97, 31, 19], [13, 130, 301], [211, 77, 1100]] {
        for order in 0..9 {
            let left = Random::new(&mut rng, m, inner, order % 3);
            let right = Random::new(&mut rng, n, inner, order / 3);
            for engine in engines() {
                let mut packed = Left::new(engine, m, &[inner]);
                let width = packed.strip_columns(n);
                let mut out = vec![f32::NAN; m * n];
                // SAFETY: the operands are alive and have these sizes.
                unsafe {
                    packed.pack(0, left.operand(0));
                    for columns in (0..n)
                        .step_by(width)
                        .map(|first| first..(first + width).min(n))
                    {
                        packed.strips(right.operand(0), columns.clone(), |first, strip| {
                            for (row, strip) in strip.chunks_exact(columns.len()).enumerate() {
                                out[(first + row) * n..][columns.clone()].copy_from_slice(strip);
                            }
                        });
                    }
                }
                for (row, out) in out.chunks_exact(n).enumerate() {
                    for (column, got) in out.iter().enumerate().step_by(1 + n / 9) {
                        let terms = (0..inner).map(|k| {
                            left.at(engine.kind, 0, row, k) * right.at(engine.kind, 0, column, k)
                        });
                        let error = (f64::from(*got) - terms.sum::<f64>()).abs();
                        assert!(
                            error < 6e-5,
                            "{engine:?} {m} {n} {inner} {order}: {got} at {row}, {column}"
                        );
                    }
                }
            }
        }
    }
}
