//! Matrix products on processors with AVX-512, of `f32` or of bf16 numbers with `f32` sums: packed operands, tiles in registers.
//!
//! The left operand is packed once ([`Left`]) and may then be multiplied by several right ones. Those are packed block by block,
//! each by the task that needs it, into a buffer that stays in the second-level cache. An operand may have several parts along the
//! inner dimension, so that `x W + h B` is one product, `[x h] [W; B]`, which passes over its result once.
//!
//! A product that is only needed on the way to something else comes in strips, and never lies in memory as a whole.
//!
//! How sums are split depends on sizes alone: results are the same bits with any number of threads.

mod pack;
mod strips;
#[cfg(test)]
mod tests;
mod tile;

use std::cell::Cell;

use rayon::prelude::*;

use pack::Panels;
pub(super) use pack::{Numbers, Operand};
pub(super) use tile::{Kind, Level};

use super::flex_matmul::Shared;
use tile::{COLUMNS, Place, ROWS};

/// Units along the inner dimension after which sums go to memory.
const BLOCK_UNITS: usize = 576;
/// Units of a packed block of the right operand: 512 KiB.
const BLOCK: usize = 128 * 1024;
/// Most columns of such a block.
const BLOCK_COLUMNS: usize = 512;
/// Most units of a left operand that is packed for one product: 4 MiB, which stay in the cache.
const LEFT: usize = 1 << 20;
/// Least tasks for a thread, so that one that is held up is helped by the others.
const TASKS: usize = 3;
/// Time to pack a panel of the right operand, in tiles.
const PACKING: f64 = 0.5;
/// Time to pack a number, in multiplications.
const PACKED: usize = 8;
/// Multiplications below which other threads are not worth waking.
const SERIAL: usize = 128 * 128 * 128;

/// Sixteen units in one line of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    _units: [u32; 16],
}

thread_local! {
    static LEFT_BUFFER: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static RIGHT_BUFFER: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Memory for packed units that a thread keeps from product to product: fresh memory costs a page fault every 4 KiB.
struct Buffer {
    lines: Vec<Line>,
    home: &'static std::thread::LocalKey<Cell<Vec<Line>>>,
}

impl Buffer {
    /// Room for so many units, of any content. A product inside another on one thread finds the place empty and gets memory
    /// of its own.
    fn new(home: &'static std::thread::LocalKey<Cell<Vec<Line>>>, units: usize) -> Self {
        let mut lines = home.take();
        let n = units.div_ceil(16);
        if lines.len() < n {
            lines.resize(n, Line { _units: [0; 16] });
        }
        Self { lines, home }
    }

    fn first(&mut self) -> *mut u32 {
        self.lines.as_mut_ptr().cast()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.home.set(std::mem::take(&mut self.lines));
    }
}

/// Units in memory in which tasks write disjoint parts.
#[derive(Clone, Copy)]
struct Units(*mut u32);
// SAFETY: every task writes its own elements, and nobody reads before all are done.
unsafe impl Send for Units {}
// SAFETY: as above.
unsafe impl Sync for Units {}

impl Units {
    fn at(self, index: usize) -> *mut u32 {
        self.0.wrapping_add(index)
    }
}

/// Where a product goes: `out = factor * product`, or `out += factor * product`, row-major with `width` numbers from row to row.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub out: Shared,
    pub width: usize,
    pub factor: f32,
    pub add: bool,
}

/// Into how many blocks of columns, of at most `most` panels, and of rows to split a product of so many panels, so that all
/// threads end at about the same time and few panels are packed more than once.
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
        // From where there are enough tasks on, as far as a thread gets twice as many.
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

/// How a product is computed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Engine {
    pub level: Level,
    pub kind: Kind,
    /// Whether on all threads, where it is worth it.
    pub parallel: bool,
}

impl Engine {
    /// None where the processor lacks the instructions.
    pub fn new(kind: Kind, parallel: bool) -> Option<Self> {
        Level::detect(kind).map(|level| Self {
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

    /// `left right`, for `m` lines of the left operand and `n` of the right one.
    ///
    /// # Safety
    /// The operands have so many lines and the same inner size, in living memory; the output has room, and nobody else writes it.
    pub unsafe fn product(self, [m, n]: [usize; 2], left: Operand, right: Operand, output: Output) {
        let most =
            (LEFT / m.max(1)).max(BLOCK_UNITS) / BLOCK_UNITS * BLOCK_UNITS * self.kind.numbers();
        for first in (0..left.inner).step_by(most) {
            let steps = first..(first + most).min(left.inner);
            // SAFETY: the caller's promise; so below.
            unsafe {
                let packed = Left::new(self, m, &[steps.len()]);
                packed.pack(0, left.steps(steps.clone()));
                packed.times(
                    n,
                    &[right.steps(steps)],
                    Output {
                        add: output.add || first > 0,
                        ..output
                    },
                );
            }
        }
    }
}

/// A left operand of one or more parts, packed in panels.
pub(super) struct Left {
    engine: Engine,
    m: usize,
    /// Units before each part, and of all together.
    starts: Vec<usize>,
    units: usize,
    _buffer: Buffer,
    first: Units,
}

impl Left {
    /// Room for `m` lines of parts with such inner sizes, of which each is to be packed before it is used.
    pub fn new(engine: Engine, m: usize, inner: &[usize]) -> Self {
        let (mut units, mut starts) = (0, Vec::with_capacity(inner.len()));
        for inner in inner {
            starts.push(units);
            units += inner.div_ceil(engine.kind.numbers());
        }
        let mut buffer = Buffer::new(&LEFT_BUFFER, m.div_ceil(ROWS) * ROWS * units);
        let first = Units(buffer.first());
        Self {
            engine,
            m,
            starts,
            units,
            _buffer: buffer,
            first,
        }
    }

    /// Packs a part.
    ///
    /// # Safety
    /// The operand has the lines and the inner size that were said, in living memory.
    pub unsafe fn pack(&self, part: usize, operand: Operand) {
        let Engine { level, kind, .. } = self.engine;
        let (start, units) = (self.starts[part], operand.units(kind));
        let panels = self.m.div_ceil(ROWS);
        let threads = self.engine.threads(self.m * operand.inner * PACKED);
        let some = panels.div_ceil(if threads > 1 { TASKS * threads } else { 1 });
        let pack = |index: usize| {
            let lines = index * some * ROWS..((index + 1) * some * ROWS).min(self.m);
            let first = self.first.at((index * some * self.units + start) * ROWS);
            let panels = Panels {
                first,
                stride: self.units * ROWS,
            };
            // SAFETY: the caller's promise; the panels are this task's.
            unsafe { operand.pack::<ROWS>(level, kind, lines, 0..units, panels) };
        };
        let tasks = panels.div_ceil(some);
        if threads > 1 {
            (0..tasks).into_par_iter().with_max_len(1).for_each(pack)
        } else {
            (0..tasks).for_each(pack)
        }
    }

    /// The product of the first parts with as many parts of a right operand of `n` lines.
    ///
    /// # Safety
    /// These parts are packed; the right ones have their inner sizes and `n` lines, in living memory; the output has room, and
    /// nobody else writes it.
    pub unsafe fn times(&self, n: usize, right: &[Operand], output: Output) {
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
            // SAFETY: the caller's promise; rows and columns are this task's.
            unsafe { self.block(n, right, output, block_units, units, columns, rows) };
        };
        let tasks = column_blocks * row_blocks;
        if threads > 1 && tasks > 1 {
            (0..tasks).into_par_iter().with_max_len(1).for_each(task);
        } else {
            (0..tasks).for_each(task);
        }
    }

    /// The product in some panels of columns and of rows.
    #[allow(clippy::too_many_arguments)] // the product's, and a task's ranges
    unsafe fn block(
        &self,
        n: usize,
        right: &[Operand],
        output: Output,
        block_units: usize,
        units: usize,
        columns: std::ops::Range<usize>,
        rows: std::ops::Range<usize>,
    ) {
        let Engine { level, kind, .. } = self.engine;
        let mut buffer = Buffer::new(&RIGHT_BUFFER, columns.len() * block_units * COLUMNS);
        let packed = Units(buffer.first());
        for first in (0..units).step_by(block_units) {
            let last = (first + block_units).min(units);
            let count = last - first;
            let mut start = 0;
            for part in right {
                let end = start + part.units(kind);
                let (from, to) = (first.max(start), last.min(end));
                if from < to {
                    let panels = Panels {
                        first: packed.at((from - first) * COLUMNS),
                        stride: count * COLUMNS,
                    };
                    let lines = columns.start * COLUMNS..(columns.end * COLUMNS).min(n);
                    // SAFETY: the caller's promise, and the buffer has room for these panels.
                    unsafe {
                        part.pack::<COLUMNS>(level, kind, lines, from - start..to - start, panels)
                    };
                }
                start = end;
            }
            for row in rows.clone() {
                let a = self.first.at((row * self.units + first) * ROWS);
                for (number, panel) in columns.clone().enumerate() {
                    let place = Place {
                        out: output.out.at(row * ROWS * output.width + panel * COLUMNS),
                        width: output.width,
                        rows: ROWS.min(self.m - row * ROWS),
                        columns: COLUMNS.min(n - panel * COLUMNS),
                        factor: output.factor,
                        add: output.add || first > 0,
                    };
                    // SAFETY: both panels are packed, and the place is this task's part of the output.
                    unsafe {
                        level.tile(kind, a, packed.at(number * count * COLUMNS), count, place)
                    };
                }
            }
        }
    }
}
