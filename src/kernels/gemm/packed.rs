//! Matrix products on processors with AVX-512, of `f32`, or of bf16 numbers with `f32` sums, with
//! packed operands and tiles in registers.
//!
//! The left operand is packed once ([`Left`]) and may then be multiplied by several right operands.
//! Right operands are packed block by block, each block by the task that needs it, into a buffer
//! that stays in the second-level cache. An operand may have several parts along the inner
//! dimension, so that `x W + h B` is one product, `[x h] [W; B]`, which passes over its result
//! once.
//!
//! A product that is only an intermediate result is computed in strips and never stored as a whole.
//!
//! The order of the sums depends only on the sizes, so results are bit-identical for any number of
//! threads.

use std::cell::Cell;
use std::ops::Range;
use std::thread::LocalKey;

use rayon::prelude::*;

use super::operand::{Operand, Output};
use super::pack::Panels;
use super::tile::{COLUMNS, Kind, Place, ROWS, tile};
use crate::kernels::Level;
use crate::kernels::disjoint::Disjoint;

/// Number of units along the inner dimension after which sums are written to memory.
const BLOCK_UNITS: usize = 576;
/// Size of a packed block of the right operand, in units: 512 KiB.
pub(super) const BLOCK: usize = 128 * 1024;
/// Maximum number of columns of such a block.
const BLOCK_COLUMNS: usize = 512;
/// Maximum size of a left operand that is packed for one product, in units: 4 MiB, which stay in
/// the cache.
const LEFT: usize = 1 << 20;
/// Minimum number of tasks per thread, so that other threads can take over work from a delayed one.
const TASKS: usize = 3;
/// Time to pack a panel of the right operand, relative to the time of a tile.
const PACKING: f64 = 0.5;
/// Time to pack a number, in multiplications.
const PACKED: usize = 8;
/// Number of multiplications below which waking other threads is not worthwhile.
const SERIAL: usize = 128 * 128 * 128;

/// Sixteen units in one cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

thread_local! {
    static LEFT_BUFFER: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static RIGHT_BUFFER: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Memory for packed units that a thread keeps from one product to the next, because fresh memory
/// costs a page fault every 4 KiB.
pub(super) struct Buffer {
    lines: Vec<Line>,
    home: &'static LocalKey<Cell<Vec<Line>>>,
}

impl Buffer {
    /// Returns room for `units` units of unspecified content. If a product runs inside another one
    /// on the same thread, it finds `home` empty and allocates its own memory.
    fn new(home: &'static LocalKey<Cell<Vec<Line>>>, units: usize) -> Self {
        let mut lines = home.take();
        let n = units.div_ceil(16);
        if lines.len() < n {
            lines.resize(n, Line([0; 16]));
        }
        Self { lines, home }
    }

    /// Returns a buffer for blocks of a right operand.
    pub(super) fn right(units: usize) -> Self {
        Self::new(&RIGHT_BUFFER, units)
    }

    fn units(&self) -> &[u32] {
        let n = 16 * self.lines.len();
        // SAFETY: a line consists of exactly sixteen units.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), n) }
    }

    pub(super) fn units_mut(&mut self) -> &mut [u32] {
        let n = 16 * self.lines.len();
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), n) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.home.set(std::mem::take(&mut self.lines));
    }
}

/// Chooses the number of column blocks, of at most `most` panels each, and of row blocks into which
/// to split a product of `rows` x `columns` panels, so that all threads end at about the same time
/// and few panels are packed more than once.
fn split([rows, columns]: [usize; 2], threads: usize, most: usize) -> [usize; 2] {
    let least = columns.div_ceil(most);
    if threads == 1 {
        return [least, 1];
    }
    let wanted = TASKS * threads;
    let time = |[column_blocks, row_blocks]: [usize; 2]| {
        let (panels, lines) = (
            columns.div_ceil(column_blocks) as f64,
            rows.div_ceil(row_blocks) as f64,
        );
        (column_blocks * row_blocks).div_ceil(threads) as f64 * panels * (lines + PACKING)
    };
    let mut best = [least, 1];
    for row_blocks in 1..=rows.min(2 * wanted) {
        // Try every number of column blocks from the first that gives enough tasks, up to `wanted`
        // more.
        let first = least.max(wanted.div_ceil(row_blocks)).min(columns);
        for column_blocks in first..=(first + wanted).min(columns) {
            let split = [column_blocks, row_blocks];
            if best == [least, 1] || time(split) < time(best) {
                best = split;
            }
        }
    }
    best
}

/// Method by which a product is computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Engine {
    pub level: Level,
    pub kind: Kind,
    /// Whether to use all threads when the product is large enough.
    pub parallel: bool,
}

impl Engine {
    /// Returns `None` if the processor lacks the instructions.
    pub fn new(kind: Kind, parallel: bool) -> Option<Self> {
        let level = Level::detect();
        kind.is_fast(level).then_some(Self {
            level,
            kind,
            parallel,
        })
    }

    fn threads(&self, multiplications: usize) -> usize {
        if self.parallel && multiplications >= SERIAL {
            rayon::current_num_threads()
        } else {
            1
        }
    }

    /// Computes `left right`, for `m` lines of the left operand and `n` of the right one.
    ///
    /// # Safety
    /// The operands must have these numbers of lines and the same inner size, in live memory. The
    /// output must have room, and nothing else may write it.
    pub unsafe fn product(
        self,
        [m, n]: [usize; 2],
        left: Operand,
        right: Operand,
        output: Output<'_>,
    ) {
        let most =
            (LEFT / m.max(1)).max(BLOCK_UNITS) / BLOCK_UNITS * BLOCK_UNITS * self.kind.numbers();
        for first in (0..left.inner).step_by(most) {
            let steps = first..(first + most).min(left.inner);
            // SAFETY: the caller upholds this function's contract, here and below.
            unsafe {
                let mut packed = Left::new(self, m, &[steps.len()]);
                packed.pack(0, left.steps(steps.clone()));
                packed.times(n, &[right.steps(steps)], output.added_if(first > 0));
            }
        }
    }
}

/// A left operand of one or more parts, packed in panels.
pub(crate) struct Left {
    pub(super) engine: Engine,
    pub(super) m: usize,
    /// Number of units before each part.
    starts: Vec<usize>,
    /// Number of units of all parts together.
    pub(super) units: usize,
    buffer: Buffer,
}

impl Left {
    /// Allocates room for `m` lines of parts with the given inner sizes. Each part must be packed
    /// before it is used.
    pub fn new(engine: Engine, m: usize, inner: &[usize]) -> Self {
        let (mut units, mut starts) = (0, Vec::with_capacity(inner.len()));
        for inner in inner {
            starts.push(units);
            units += inner.div_ceil(engine.kind.numbers());
        }
        Self {
            engine,
            m,
            starts,
            units,
            buffer: Buffer::new(&LEFT_BUFFER, m.div_ceil(ROWS) * ROWS * units),
        }
    }

    /// Packs a part.
    ///
    /// # Safety
    /// The operand must have the number of lines and the inner size that were passed to
    /// [`new`](Self::new), in live memory.
    pub unsafe fn pack(&mut self, part: usize, operand: Operand) {
        let Engine { level, kind, .. } = self.engine;
        let (m, stride, start) = (self.m, self.units, self.starts[part]);
        let units = operand.units(kind);
        let panels = m.div_ceil(ROWS);
        let threads = self.engine.threads(m * operand.inner * PACKED);
        let some = panels.div_ceil(if threads > 1 { TASKS * threads } else { 1 });
        let packed = Disjoint::new(self.buffer.units_mut());
        let pack = |index: usize| {
            let lines = index * some * ROWS..((index + 1) * some * ROWS).min(m);
            let panels = Panels {
                first: packed.at((index * some * stride + start) * ROWS),
                stride: stride * ROWS,
            };
            // SAFETY: the caller upholds this function's contract; the buffer has room for these
            // panels, which belong to this task.
            unsafe { operand.pack::<ROWS>(level, kind, lines, 0..units, panels) };
        };
        let tasks = panels.div_ceil(some);
        if threads > 1 {
            (0..tasks).into_par_iter().with_max_len(1).for_each(pack)
        } else {
            (0..tasks).for_each(pack)
        }
    }

    /// Returns the packed panel that begins at line `line`, a multiple of [`ROWS`], from unit
    /// `unit` on.
    pub(super) fn panel(&self, line: usize, unit: usize) -> *const u32 {
        self.buffer.units()[line * self.units + unit * ROWS..].as_ptr()
    }

    /// Computes the product of the first parts with as many parts of a right operand of `n` lines.
    ///
    /// # Safety
    /// These parts must be packed. The right parts must have the same inner sizes and `n` lines, in
    /// live memory. The output must have room for the product, and nothing else may use it.
    pub unsafe fn times(&self, n: usize, right: &[Operand], output: Output<'_>) {
        let kind = self.engine.kind;
        let units: usize = right.iter().map(|part| part.units(kind)).sum();
        if self.m == 0 || n == 0 || units == 0 {
            return;
        }
        let block_units = units.div_ceil(units.div_ceil(BLOCK_UNITS));
        let (panels, row_panels) = (n.div_ceil(COLUMNS), self.m.div_ceil(ROWS));
        let threads = self.engine.threads(self.m * n * units);
        let most = ((BLOCK / block_units).min(BLOCK_COLUMNS) / COLUMNS).max(1);
        let [column_blocks, row_blocks] = split([row_panels, panels], threads, most);
        let task = |index: usize| {
            let (column, row) = (index / row_blocks, index % row_blocks);
            let share =
                |index: usize, of: usize, all: usize| index * all / of..(index + 1) * all / of;
            let (columns, rows) = (
                share(column, column_blocks, panels),
                share(row, row_blocks, row_panels),
            );
            // SAFETY: the caller upholds this function's contract; the rows and columns belong to
            // this task.
            unsafe { self.block(n, right, output, block_units, units, columns, rows) };
        };
        let tasks = column_blocks * row_blocks;
        if threads > 1 && tasks > 1 {
            (0..tasks).into_par_iter().with_max_len(1).for_each(task);
        } else {
            (0..tasks).for_each(task);
        }
    }

    /// Computes the product for some panels of columns and of rows.
    #[allow(clippy::too_many_arguments)] // the product's, and a task's ranges
    unsafe fn block(
        &self,
        n: usize,
        right: &[Operand],
        output: Output<'_>,
        block_units: usize,
        units: usize,
        columns: Range<usize>,
        rows: Range<usize>,
    ) {
        let Engine { level, kind, .. } = self.engine;
        let mut buffer = Buffer::right(columns.len() * block_units * COLUMNS);
        let packed = buffer.units_mut().as_mut_ptr();
        for first in (0..units).step_by(block_units) {
            let last = (first + block_units).min(units);
            let count = last - first;
            let mut start = 0;
            for part in right {
                let end = start + part.units(kind);
                let (from, to) = (first.max(start), last.min(end));
                if from < to {
                    let panels = Panels {
                        first: packed.wrapping_add((from - first) * COLUMNS),
                        stride: count * COLUMNS,
                    };
                    let lines = columns.start * COLUMNS..(columns.end * COLUMNS).min(n);
                    // SAFETY: the caller upholds this function's contract, and the buffer has room
                    // for these panels.
                    unsafe {
                        part.pack::<COLUMNS>(level, kind, lines, from - start..to - start, panels)
                    };
                }
                start = end;
            }
            for row in rows.clone() {
                let a = self.panel(row * ROWS, first);
                for (number, panel) in columns.clone().enumerate() {
                    let place = Place {
                        out: output.to.at(row * ROWS, panel * COLUMNS),
                        width: output.to.stride,
                        rows: ROWS.min(self.m - row * ROWS),
                        columns: COLUMNS.min(n - panel * COLUMNS),
                        factor: output.factor,
                        add: output.add || first > 0,
                    };
                    let b = packed.wrapping_add(number * count * COLUMNS);
                    // SAFETY: both panels are packed, and the place is the part of the output that
                    // belongs to this task.
                    unsafe { tile(level, kind, a, b, count, place) };
                }
            }
        }
    }
}
