//! Many rows of inputs: 32 rows of a weight are unpacked once into a panel, which stays in the
//! second-level cache. Tiles of products with all inputs are then computed along the panel.
//!
//! A panel of numbers is `[columns, 32]`. A panel of codes is `[columns / 4, 32, 4]`: each 32 bits
//! hold four columns of one row, which `vpdpbusd` multiplies by four inputs at once.

use std::arch::x86_64::*;
use std::ops::Range;

use super::codes::Packed;
use super::lanes::Avx512;
use super::loads::{first_lanes, near};
use super::sparse_int4::Unpack;
use super::sparse16;
use super::units::{OfWeight, for_sixteens};
use crate::format::{Dense, Grid, Number, PackedMatrix, Sparse16, SparseInt4};
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::linear::codes::Codes;
use crate::kernels::linear::input::{self, BLOCK, GROUPS, Input, Quantized};
use crate::kernels::linear::lanes::Lanes;
use crate::kernels::linear::task::{Task, Update};
use crate::kernels::number::{Stored, with_type_of};

/// Number of rows of a weight in a panel: two registers.
pub(super) const WIDTH: usize = 32;
/// Number of columns of a panel of numbers at a time: 128 KiB.
const COLUMNS: usize = 1024;

/// Returns the count of numbers of scratch memory for a thread.
pub(super) fn floats(inputs: usize, units: usize) -> usize {
    let codes = inputs.next_multiple_of(BLOCK) * WIDTH / 4 + 2 * units * WIDTH;
    codes.max(COLUMNS * WIDTH)
}

/// Destination of the sums of a tile: at most 32 outputs of each row.
#[derive(Clone, Copy)]
struct Place {
    out: *mut f32,
    stride: usize,
    columns: usize,
    add: bool,
}

impl Place {
    /// Returns the place of the outputs of at most [`WIDTH`] rows of a weight.
    fn new(output: DisjointRows<'_>, rows: &Range<usize>, add: bool) -> Self {
        Self {
            out: output.at(0, rows.start),
            stride: output.stride,
            columns: rows.len(),
            add,
        }
    }

    /// # Safety
    /// The outputs must exist and belong to this task.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(self, row: usize, half: usize, sums: __m512) {
        let out = self.out.wrapping_add(row * self.stride + 16 * half);
        let mask = first_lanes(self.columns.saturating_sub(16 * half));
        // SAFETY: the mask covers only existing outputs.
        unsafe {
            let sums = if self.add {
                _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, out))
            } else {
                sums
            };
            _mm512_mask_storeu_ps(out, mask, sums);
        }
    }
}

/// Transposes 16 rows of 16 32-bit numbers into 16 rows of a panel, from `first` on.
///
/// # Safety
/// The panel must have room for them.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn put(panel: *mut i32, first: usize, half: usize, rows: &[__m512i; 16]) {
    let none = _mm512_setzero_si512();
    let [mut pairs, mut fours] = [[none; 16]; 2];
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for i in 0..4 {
        let [a, b, c, d] = [
            pairs[4 * i],
            pairs[4 * i + 1],
            pairs[4 * i + 2],
            pairs[4 * i + 3],
        ];
        fours[4 * i] = _mm512_unpacklo_epi64(a, c);
        fours[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
        fours[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
        fours[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for i in 0..4 {
        let [a, b, c, d] = [fours[i], fours[4 + i], fours[8 + i], fours[12 + i]];
        let even = [
            _mm512_shuffle_i32x4::<0x88>(a, b),
            _mm512_shuffle_i32x4::<0x88>(c, d),
        ];
        let odd = [
            _mm512_shuffle_i32x4::<0xDD>(a, b),
            _mm512_shuffle_i32x4::<0xDD>(c, d),
        ];
        let at = |column: usize| {
            panel
                .wrapping_add((first + column) * WIDTH + 16 * half)
                .cast()
        };
        // SAFETY: the caller upholds this function's contract.
        unsafe {
            _mm512_storeu_si512(at(i), _mm512_shuffle_i32x4::<0x88>(even[0], even[1]));
            _mm512_storeu_si512(at(8 + i), _mm512_shuffle_i32x4::<0xDD>(even[0], even[1]));
            _mm512_storeu_si512(at(4 + i), _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]));
            _mm512_storeu_si512(at(12 + i), _mm512_shuffle_i32x4::<0xDD>(odd[0], odd[1]));
        }
    }
}

/// Calls a function that computes the tiles of up to six rows until all rows are done.
macro_rules! by_six {
    ($rows:expr, |$row:ident| $tile:ident($($arg:expr),* $(,)?)) => {{
        let mut $row = 0;
        while $row < $rows {
            match $rows - $row {
                1 => { $tile::<1>($($arg),*); $row += 1; }
                2..=3 => { $tile::<2>($($arg),*); $row += 2; }
                4..=5 => { $tile::<4>($($arg),*); $row += 4; }
                _ => { $tile::<6>($($arg),*); $row += 6; }
            }
        }
    }};
}

/// Multiplies by floating-point weights. `fill` unpacks some columns of some rows into a panel,
/// rounded up to 16.
///
/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
unsafe fn numbers(
    task: Task<'_>,
    scratch: &mut [f32],
    mut fill: impl FnMut(Range<usize>, Range<usize>, &mut [f32]),
) {
    let Task { input, output, .. } = task;
    let panel = &mut scratch[..COLUMNS * WIDTH];
    for first in task.rows.clone().step_by(WIDTH) {
        let rows = first..task.rows.end.min(first + WIDTH);
        let mut from = 0;
        // Run at least once, so that outputs are written even if no input is active.
        loop {
            let columns = from..input.inputs.min(from + COLUMNS);
            fill(rows.clone(), columns.clone(), panel);
            let place = Place::new(output, &rows, from > 0);
            let x = input.values.as_ptr().wrapping_add(from);
            // SAFETY: the caller upholds this function's contract, and the panel has the columns.
            unsafe {
                float_tiles(
                    panel.as_ptr(),
                    columns.len(),
                    x,
                    input.stride,
                    input.rows,
                    place,
                );
            }
            from += COLUMNS;
            if from >= input.inputs {
                break;
            }
        }
    }
}

/// # Safety
/// As for [`numbers`].
pub(super) unsafe fn dense(weight: &Dense, task: Task<'_>, scratch: &mut [f32]) {
    let (stride, values) = (weight.cols * weight.number.bytes(), &*weight.values);
    assert!(task.rows.end * stride <= values.len() && task.input.inputs <= weight.cols);
    with_type_of!(weight.number, T => {
        // SAFETY: the rows and columns exist, as asserted above; the caller guarantees the rest.
        unsafe {
            numbers(task, scratch, |rows, columns, panel| {
                let at = rows.start * stride + columns.start * size_of::<T>();
                widen::<T>(values.as_ptr().add(at), stride, rows.len(), columns.len(), panel);
            });
        }
    });
}

/// # Safety
/// As for [`numbers`].
pub(super) unsafe fn sparse(weight: &Sparse16, task: Task<'_>, scratch: &mut [f32]) {
    let mut at = [0; WIDTH];
    // SAFETY: the caller upholds this function's contract; every range of columns except the last
    // consists of whole words.
    unsafe {
        numbers(task, scratch, |rows, columns, panel| {
            if columns.start == 0 {
                for (row, at) in rows.clone().zip(&mut at) {
                    *at = 2 * weight.offsets.get(row);
                }
            }
            spread(weight, rows, columns, &mut at, panel);
        });
    }
}

/// # Safety
/// The panel must have `count` columns, `x` as many in each of `rows`, and the place must belong to
/// this task.
#[target_feature(enable = "avx512f,fma")]
unsafe fn float_tiles(
    panel: *const f32,
    count: usize,
    x: *const f32,
    stride: usize,
    rows: usize,
    place: Place,
) {
    let mut row = 0;
    // SAFETY: the caller upholds this function's contract.
    unsafe {
        while row < rows {
            let x = x.wrapping_add(row * stride);
            let place = Place {
                out: place.out.wrapping_add(row * place.stride),
                ..place
            };
            row += match rows - row {
                12.. => float_tile::<12>(panel, count, x, stride, place),
                8.. => float_tile::<8>(panel, count, x, stride, place),
                4.. => float_tile::<4>(panel, count, x, stride, place),
                2.. => float_tile::<2>(panel, count, x, stride, place),
                _ => float_tile::<1>(panel, count, x, stride, place),
            };
        }
    }
}

/// # Safety
/// As for [`float_tiles`], for `R` rows.
#[target_feature(enable = "avx512f,fma")]
#[allow(clippy::needless_range_loop)] // constant loops, which are unrolled
unsafe fn float_tile<const R: usize>(
    panel: *const f32,
    count: usize,
    x: *const f32,
    stride: usize,
    place: Place,
) -> usize {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: the caller upholds this function's contract.
    unsafe {
        for column in 0..count {
            let w = [0, 16].map(|half| _mm512_loadu_ps(panel.add(column * WIDTH + half)));
            for i in 0..R {
                let x = _mm512_set1_ps(*x.add(i * stride + column));
                sums[i][0] = _mm512_fmadd_ps(w[0], x, sums[i][0]);
                sums[i][1] = _mm512_fmadd_ps(w[1], x, sums[i][1]);
            }
        }
        for i in 0..R {
            place.store(i, 0, sums[i][0]);
            place.store(i, 1, sums[i][1]);
        }
    }
    R
}

/// Unpacks some columns of some rows of a dense weight into a panel.
///
/// # Safety
/// The columns must exist, and the panel must have room for them, rounded up to 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
unsafe fn widen<T: Stored>(
    first: *const u8,
    stride: usize,
    rows: usize,
    columns: usize,
    panel: &mut [f32],
) {
    // SAFETY: the caller upholds this function's contract, and panels consist of whole words.
    unsafe {
        fill_panel(
            panel.as_mut_ptr().cast(),
            rows,
            columns.div_ceil(16),
            |row, word| {
                let at = first.wrapping_add(row * stride + 16 * word * size_of::<T>());
                near(at.wrapping_add(512));
                let count = columns - 16 * word;
                _mm512_castps_si512(if count >= 16 {
                    Avx512::load::<T>(at)
                } else {
                    Avx512::load_some::<T>(at, count)
                })
            },
        );
    }
}

/// Unpacks some columns of some rows of a sparse weight into a panel. `at` holds the positions of
/// the next values of each row.
///
/// # Safety
/// As for [`widen`], and the columns must begin at a word.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
unsafe fn spread(
    sparse: &Sparse16,
    rows: Range<usize>,
    columns: Range<usize>,
    at: &mut [usize; WIDTH],
    panel: &mut [f32],
) {
    let words = sparse.bits.cols.div_ceil(64);
    let (bits, values): (&[u8], &[u8]) = (&sparse.bits.bytes, &sparse.values);
    assert!(rows.end * words * 8 <= bits.len() && columns.end <= sparse.bits.cols);
    let panel = panel.as_mut_ptr();
    for half in 0..2 {
        for column in columns.clone().step_by(64) {
            let mut block = [[_mm512_setzero_si512(); 16]; 4];
            for index in 0..16 {
                let row = rows.start + 16 * half + index;
                if row >= rows.end {
                    break;
                }
                let at = &mut at[16 * half + index];
                near(values.as_ptr().wrapping_add(*at + 256));
                // SAFETY: the word exists, as asserted above.
                let (numbers, count) = unsafe {
                    let word = bits.as_ptr().add((row * words + column / 64) * 8).cast();
                    sparse16::some_numbers(sparse.number == Number::F16, values, *at, word)
                };
                *at += 2 * count;
                for part in 0..4 {
                    block[part][index] = _mm512_castps_si512(numbers[part]);
                }
            }
            for (part, block) in block.iter().enumerate() {
                // SAFETY: panels consist of whole words.
                unsafe {
                    put(
                        panel.cast(),
                        column - columns.start + 16 * part,
                        half,
                        block,
                    )
                };
            }
        }
    }
}

/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
pub(super) unsafe fn packed(
    weight: &PackedMatrix,
    unit: usize,
    task: Task<'_>,
    scratch: &mut [f32],
) {
    let codes = Packed::new(weight, &task);
    // SAFETY: the caller upholds this function's contract.
    unsafe { multiply_codes(codes, weight.whole_grid(), unit, task, scratch) };
}

/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
pub(super) unsafe fn sparse_int4(
    weight: &SparseInt4,
    unit: usize,
    task: Task<'_>,
    scratch: &mut [f32],
) {
    // SAFETY: the caller upholds this function's contract.
    unsafe { multiply_codes(Unpack::new(weight), &weight.grid, unit, task, scratch) };
}

/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,bmi2,popcnt"
)]
unsafe fn multiply_codes<C: Codes<Step = [__m512i; 1]>>(
    codes: C,
    grid: &Grid,
    unit: usize,
    task: Task<'_>,
    scratch: &mut [f32],
) {
    let of_weight = OfWeight::new(grid, unit);
    for first in task.rows.clone().step_by(WIDTH) {
        let rows = first..task.rows.end.min(first + WIDTH);
        let task = Task {
            rows,
            ..task.clone()
        };
        // SAFETY: the caller upholds this function's contract.
        unsafe { some_codes(codes, &of_weight, unit, task, scratch) };
    }
}

/// # Safety
/// As for [`multiply_codes`], for at most [`WIDTH`] rows.
#[inline]
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,bmi2,popcnt"
)]
unsafe fn some_codes<C: Codes<Step = [__m512i; 1]>>(
    codes: C,
    of_weight: &OfWeight<'_>,
    unit: usize,
    task: Task<'_>,
    scratch: &mut [f32],
) {
    let Task {
        rows,
        input,
        output,
    } = task;
    let blocks = input.inputs.div_ceil(BLOCK);
    let units = blocks * (BLOCK / unit);
    let (panel, rest) = scratch.split_at_mut(blocks * BLOCK * WIDTH / 4);
    let (scales, rest) = rest.split_at_mut(units * WIDTH);
    let with_zeros = &mut rest[..units * WIDTH];
    for (index, row) in rows.clone().enumerate() {
        for_sixteens(
            of_weight,
            row,
            units,
            |from, some_scales, some_with_zeros| {
                for (at, (scale, with_zero)) in
                    (from..units).zip(some_scales.iter().zip(some_with_zeros))
                {
                    scales[at * WIDTH + index] = *scale;
                    with_zeros[at * WIDTH + index] = *with_zero;
                }
            },
        );
    }
    // Results past the last row are not stored. The rows are zero so that they hold no values that
    // are slow to compute with.
    for index in rows.len()..WIDTH {
        for at in 0..units {
            scales[at * WIDTH + index] = 0.0;
            with_zeros[at * WIDTH + index] = 0.0;
        }
    }
    let words: *mut i32 = panel.as_mut_ptr().cast();
    // SAFETY: the panel has room for all blocks, and the rows exist.
    unsafe {
        let mut of_rows: [C::Row; WIDTH] = std::array::from_fn(|index| {
            codes.row((rows.start + index).min(rows.end - 1), std::ptr::null())
        });
        fill_panel(words, rows.len(), 2 * blocks, |index, word| {
            codes.step::<false, false>(&mut of_rows[index], word)[0]
        });
    }
    let call = Panel {
        panel: words,
        scales: scales.as_ptr(),
        with_zeros: with_zeros.as_ptr(),
        unit,
        input,
        of_inputs: input.units(unit),
        x: input.quantized(C::ORDER),
        place: Place::new(output, &rows, false),
    };
    // SAFETY: the caller upholds this function's contract, and the panel is complete.
    unsafe {
        if input.wide() {
            by_six!(input.rows, |row| wide_tile(&call, row));
        } else {
            by_six!(input.rows, |row| narrow_tile(&call, row));
        }
    }
}

/// Fills a panel with the words that `some` returns by row and word. A word is 16 32-bit numbers.
///
/// # Safety
/// The panel must have room for the words.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn fill_panel(
    panel: *mut i32,
    rows: usize,
    words: usize,
    mut some: impl FnMut(usize, usize) -> __m512i,
) {
    for half in 0..2 {
        for word in 0..words {
            let mut block = [_mm512_setzero_si512(); 16];
            for (index, row) in (16 * half..rows).zip(&mut block) {
                *row = some(index, word);
            }
            // SAFETY: the caller upholds this function's contract.
            unsafe { put(panel, 16 * word, half, &block) };
        }
    }
}

struct Panel<'a> {
    panel: *const i32,
    scales: *const f32,
    with_zeros: *const f32,
    unit: usize,
    input: &'a Input<'a>,
    of_inputs: input::Units,
    x: Quantized,
    place: Place,
}

/// # Safety
/// The panel must be complete, the inputs must be prepared, and the place must belong to this task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")]
unsafe fn wide_tile<const R: usize>(call: &Panel<'_>, row: usize) {
    // SAFETY: the caller upholds this function's contract.
    unsafe { code_tile::<true, R>(call, row) };
}

/// # Safety
/// As for [`wide_tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")]
unsafe fn narrow_tile<const R: usize>(call: &Panel<'_>, row: usize) {
    // SAFETY: the caller upholds this function's contract.
    unsafe { code_tile::<false, R>(call, row) };
}

/// # Safety
/// As for [`wide_tile`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")]
#[allow(clippy::needless_range_loop)] // constant loops, which are unrolled
unsafe fn code_tile<const WIDE: bool, const R: usize>(call: &Panel<'_>, row: usize) {
    let Panel {
        panel,
        scales,
        with_zeros,
        unit,
        input,
        of_inputs,
        x,
        place,
    } = *call;
    let x: [*const i32; R] = std::array::from_fn(|i| x.row(row + i).cast());
    let block_words = input.layout.block_bytes() / 4;
    // A run of columns has one scale of the weight and one of the inputs: a unit, or the part of it
    // in a group.
    let run = if WIDE { unit } else { unit.min(BLOCK / GROUPS) };
    let (of_block, fours, runs) = (BLOCK / unit, run / 4, unit / run);
    let mut totals = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: the panel and the prepared inputs have this many units.
    unsafe {
        for at in 0..of_inputs.count * runs {
            let (at, part) = (at / runs, at % runs);
            let mut high = [[_mm512_setzero_si512(); 2]; R];
            let mut low = [[_mm512_setzero_si512(); 2]; R];
            let panel = panel.add((at * runs + part) * fours * WIDTH);
            let start = at / of_block * block_words + (at % of_block * runs + part) * fours;
            for four in 0..fours {
                let w =
                    [0, 16].map(|half| _mm512_loadu_si512(panel.add(four * WIDTH + half).cast()));
                for i in 0..R {
                    let x_high = _mm512_set1_epi32(*x[i].add(start + four));
                    high[i][0] = _mm512_dpbusd_epi32(high[i][0], w[0], x_high);
                    high[i][1] = _mm512_dpbusd_epi32(high[i][1], w[1], x_high);
                    if WIDE {
                        let x_low = _mm512_set1_epi32(*x[i].add(start + BLOCK / 4 + four));
                        low[i][0] = _mm512_dpbusd_epi32(low[i][0], w[0], x_low);
                        low[i][1] = _mm512_dpbusd_epi32(low[i][1], w[1], x_low);
                    }
                }
            }
            for half in 0..2 {
                let scale = _mm512_loadu_ps(scales.add(at * WIDTH + 16 * half));
                let with_zero = _mm512_loadu_ps(with_zeros.add(at * WIDTH + 16 * half));
                for i in 0..R {
                    let of_input = if WIDE {
                        *of_inputs.scales(row + i).add(at)
                    } else {
                        let group = (at * unit + part * run) / (BLOCK / GROUPS);
                        *of_inputs.groups(row + i).add(group)
                    };
                    let all = if WIDE {
                        _mm512_add_epi32(_mm512_slli_epi32::<8>(high[i][half]), low[i][half])
                    } else {
                        high[i][half]
                    };
                    let mut total = totals[i][half];
                    if part == 0 {
                        let sum = _mm512_set1_ps(*of_inputs.sums(row + i).add(at));
                        total = _mm512_fnmadd_ps(with_zero, sum, total);
                    }
                    totals[i][half] = _mm512_fmadd_ps(
                        _mm512_cvtepi32_ps(all),
                        _mm512_mul_ps(scale, _mm512_set1_ps(of_input)),
                        total,
                    );
                }
            }
        }
        for i in 0..R {
            let place = Place {
                out: place.out.wrapping_add(row * place.stride),
                ..place
            };
            place.store(i, 0, totals[i][0]);
            place.store(i, 1, totals[i][1]);
        }
    }
}

/// Adds an update to some columns of all rows: `y += h (scale * bt)`.
///
/// # Safety
/// As for [`add_update`](crate::kernels::linear::task::Kernels::add_update).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
pub(super) unsafe fn add_update(update: &Update<'_>, task: Task<'_>, scratch: &mut [f32]) {
    let Task {
        rows: columns,
        input,
        output,
    } = task;
    let Update { bt, scale, h, rank } = *update;
    let (stride, values) = (update.stride(input.rows, &columns), &*bt.values);
    let size = bt.number.bytes();
    let panel = &mut scratch[..COLUMNS * WIDTH];
    for first in columns.clone().step_by(WIDTH) {
        let some = first..columns.end.min(first + WIDTH);
        let place = Place::new(output, &some, true);
        for from in (0..rank).step_by(COLUMNS) {
            let count = COLUMNS.min(rank - from);
            for (index, out) in panel.chunks_exact_mut(WIDTH).take(count).enumerate() {
                let at = (from + index) * stride;
                bt.number
                    .read(&values[at + some.start * size..at + some.end * size], out);
                out.iter_mut().for_each(|out| *out *= scale);
            }
            let h = h.as_ptr().wrapping_add(from);
            // SAFETY: `Update::stride` checked that the ranks and columns exist; the caller
            // guarantees the rest.
            unsafe { float_tiles(panel.as_ptr(), count, h, rank, input.rows, place) };
        }
    }
}
