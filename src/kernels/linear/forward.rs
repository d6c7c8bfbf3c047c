//! Computes several layers on the same inputs: prepares the inputs, divides the work into tasks and
//! runs them.

use std::ops::Range;

use super::input::{Input, Layout, Needs, Order, Sharing, unit_of};
use super::layer::{Activations, Adapter, Linear, Rows, RowsMut, Scratch};
use super::plain;
use super::task::{Task, Update};
use crate::error::{Error, Result};
use crate::format::{Body, StoredMatrix};
use crate::kernels::disjoint::{Disjoint, DisjointRows};
use crate::kernels::isa;
use crate::kernels::level::Level;
use crate::kernels::memory::lines;
use crate::kernels::pool::Pool;

/// Approximate number of bytes of a weight that a task reads.
const TASK_BYTES: usize = 1024 * 1024;
/// Minimum number of tasks per thread, so that other threads can take over work from a delayed one.
const TASKS: usize = 4;
/// The number of outputs of each task, except the last, is a multiple of this.
const OUTPUTS: usize = 16;
/// Number of rows of inputs that one task prepares.
const PREPARED: usize = 8;

/// Layout of the scratch memory. Prepared inputs come first, then the inner results of adapters,
/// then the memory of each thread.
struct Places {
    layout: Layout,
    /// Offset of the inner results of adapters, in bytes.
    inner: usize,
    threads: usize,
    of_thread: usize,
    bytes: usize,
}

impl Places {
    fn new(
        level: Level,
        threads: usize,
        layers: &[Linear<'_>],
        rows: usize,
        inputs: usize,
        activations: Activations,
        work: Work,
    ) -> Self {
        let mut needs = Needs::default();
        let narrow = (activations == Activations::Int8).then(|| sharing(level, rows));
        for layer in layers {
            let weight = (work == Work::All).then_some(layer.weight);
            let weights = [weight, layer.adapter.map(|adapter| adapter.a)];
            for weight in weights.into_iter().flatten() {
                if let Some((order, unit)) = units_of(level, rows, weight.body()) {
                    needs.add(order, unit, narrow);
                }
            }
        }
        let layout = Layout::new(needs, inputs);
        let inner = rows * layout.bytes;
        let ranks: usize = layers.iter().map(|layer| inner_bytes(layer, rows)).sum();
        let at = inner + ranks;
        let cols = layers.iter().flat_map(|layer| {
            [
                layer.weight.cols(),
                layer.adapter.map_or(0, |adapter| adapter.a.cols()),
            ]
        });
        let floats = isa::kernels(level).map_or(0, |kernels| {
            kernels.scratch_floats(rows, inputs, layout.most_units())
        });
        let plain = cols.map(plain::scratch_bytes).max().unwrap_or(0);
        let of_thread = plain.max(lines(4 * floats));
        Self {
            layout,
            inner,
            threads: at,
            of_thread,
            bytes: at + threads * of_thread,
        }
    }
}

/// Returns the number of bytes of `x A^T` of a layer.
fn inner_bytes(layer: &Linear<'_>, rows: usize) -> usize {
    layer
        .adapter
        .map_or(0, |adapter| lines(4 * rows * adapter.rank))
}

/// Returns which inputs share a scale if they are rounded to 8 bits.
pub(in crate::kernels) fn sharing(level: Level, rows: usize) -> Sharing {
    isa::kernels(level).map_or(Sharing::Block, |kernels| kernels.sharing(rows))
}

/// Returns the order and the size of units in which the kernel for a weight of codes expects its
/// inputs. Returns `None` if there is no kernel for the weight.
pub(in crate::kernels) fn units_of(
    level: Level,
    rows: usize,
    weight: &Body,
) -> Option<(Order, usize)> {
    let kernels = isa::kernels(level)?;
    let (grid, order) = match weight {
        Body::Int(packed) => (
            packed.whole_grid(),
            kernels.packed_order(packed.bits(), rows),
        ),
        Body::SparseInt4(sparse) => (&sparse.grid, kernels.sparse_order()),
        _ => return None,
    };
    let unit = if grid.group_of.is_none() {
        unit_of(grid.group_size, grid.cols)
    } else {
        None
    };
    unit.map(|unit| (order, unit))
}

/// What a call computes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// The layers.
    All,
    /// The updates of the layers' adapters, which are added to the outputs.
    Updates,
}

/// Returns the number of bytes of scratch memory that [`forward`] needs for `rows` rows on this
/// pool. [`add_updates`] needs no more.
pub fn scratch_bytes(
    pool: &Pool,
    layers: &[Linear<'_>],
    rows: usize,
    inputs: usize,
    activations: Activations,
) -> usize {
    // The maximum over all instruction sets, so that any of them may be forced, plus one cache line
    // for alignment.
    let needed = |level| {
        Places::new(
            level,
            pool.threads(),
            layers,
            rows,
            inputs,
            activations,
            Work::All,
        )
        .bytes
    };
    Level::up_to_widest().map(needed).max().unwrap_or(0) + 64
}

/// Computes several layers on the same inputs in one call, such as the queries, keys and values of
/// a block. The first `inputs` columns of each weight are multiplied by the rows of `x`. Without
/// any layer or row, nothing happens. Does not allocate memory.
///
/// # Shapes
/// - `x`: `[rows, inputs]`
/// - `y`: for each layer `[rows, outputs]`
///
/// # Errors
/// Returns [`Error::ShapeMismatch`] if the shapes do not fit each other or the scratch memory is
/// smaller than [`scratch_bytes`], and [`Error::InvalidArgument`] if the `bt` of an adapter is not
/// dense.
pub fn forward(
    pool: &Pool,
    layers: &[Linear<'_>],
    x: Rows<'_>,
    inputs: usize,
    y: &mut [RowsMut<'_>],
    activations: Activations,
    scratch: &mut Scratch<'_>,
) -> Result<()> {
    forward_on(
        Level::detect(),
        pool,
        layers,
        x,
        inputs,
        y,
        activations,
        scratch,
    )
}

/// Adds the updates of the layers' adapters to outputs that were computed without them, such as some
/// of the rows of a larger call. The sum is the one that [`forward`] computes. Layers without an
/// adapter are passed over.
///
/// # Shapes
/// As for [`forward`].
///
/// # Errors
/// As for [`forward`].
pub fn add_updates(
    pool: &Pool,
    layers: &[Linear<'_>],
    x: Rows<'_>,
    inputs: usize,
    y: &mut [RowsMut<'_>],
    activations: Activations,
    scratch: &mut Scratch<'_>,
) -> Result<()> {
    if layers.iter().all(|layer| layer.adapter.is_none()) {
        return Ok(());
    }
    run(
        (Level::detect(), Work::Updates),
        pool,
        layers,
        x,
        inputs,
        y,
        activations,
        scratch,
    )
}

/// Same as [`forward`], with the given instruction set.
///
/// # Errors
/// As for [`forward`].
#[allow(clippy::too_many_arguments)] // those of `forward` and one more
pub fn forward_on(
    level: Level,
    pool: &Pool,
    layers: &[Linear<'_>],
    x: Rows<'_>,
    inputs: usize,
    y: &mut [RowsMut<'_>],
    activations: Activations,
    scratch: &mut Scratch<'_>,
) -> Result<()> {
    run(
        (level, Work::All),
        pool,
        layers,
        x,
        inputs,
        y,
        activations,
        scratch,
    )
}

#[allow(clippy::too_many_arguments)] // as above
fn run(
    (level, work): (Level, Work),
    pool: &Pool,
    layers: &[Linear<'_>],
    x: Rows<'_>,
    inputs: usize,
    y: &mut [RowsMut<'_>],
    activations: Activations,
    scratch: &mut Scratch<'_>,
) -> Result<()> {
    check(layers, &x, inputs, y)?;
    if x.rows == 0 {
        return Ok(());
    }
    let places = Places::new(
        level,
        pool.threads(),
        layers,
        x.rows,
        inputs,
        activations,
        work,
    );
    // Align the memory to a cache line.
    let skip = scratch
        .bytes
        .as_ptr()
        .align_offset(64)
        .min(scratch.bytes.len());
    let memory = Disjoint::new(&mut scratch.bytes[skip..]);
    if memory.len() < places.bytes {
        return Err(mismatch(
            "bytes of scratch memory",
            &[places.bytes],
            &[memory.len()],
        ));
    }
    let input = Input {
        level,
        values: x.values,
        rows: x.rows,
        stride: x.stride,
        inputs,
        layout: places.layout,
        memory,
        at: 0,
    };
    if places.layout.bytes > 0 {
        pool.for_each(x.rows.div_ceil(PREPARED), |_, task| {
            for row in task * PREPARED..((task + 1) * PREPARED).min(x.rows) {
                // SAFETY: each row belongs to one task only.
                unsafe { input.prepare(row) };
            }
        });
    }
    let call = Call {
        level,
        work,
        layers,
        input,
        places: &places,
        memory,
    };
    let most = isa::kernels(level).and_then(|kernels| kernels.task_outputs(x.rows));
    let tasks = |product| Tasks {
        layers,
        product,
        work,
        threads: pool.threads(),
        most,
    };
    let inner = tasks(Product::Inner);
    if inner.count() > 0 {
        pool.for_each(inner.count(), |thread, task| {
            if let Some((layer, ranks)) = inner.get(task) {
                // SAFETY: the ranks belong to this task, and each thread has its own memory.
                unsafe { call.inner(thread, layer, ranks) };
            }
        });
    }
    let outer = tasks(Product::Outer);
    let outputs = Disjoint::new(y);
    pool.for_each(outer.count(), |thread, task| {
        if let Some((layer, range)) = outer.get(task) {
            // SAFETY: the columns belong to this task, and each thread has its own memory. `check`
            // verified that the columns are within `y`.
            unsafe { call.outer(thread, layer, range, rows_of(outputs, layer)) };
        }
    });
    Ok(())
}

/// Returns the destination of a layer's outputs.
fn rows_of<'a>(y: Disjoint<'a, RowsMut<'_>>, layer: usize) -> DisjointRows<'a> {
    assert!(layer < y.len());
    // SAFETY: the index was checked above. Tasks only read the descriptions of the outputs, and no
    // reference to the numbers is made: only the length and pointer of the slice are copied.
    unsafe {
        let rows = y.at(layer);
        let values: *mut [f32] = (&raw const (*rows).values).cast::<*mut [f32]>().read();
        DisjointRows {
            all: Disjoint::from_raw(values.cast(), values.len()),
            stride: (*rows).stride,
        }
    }
}

struct Call<'a> {
    level: Level,
    work: Work,
    layers: &'a [Linear<'a>],
    input: Input<'a>,
    places: &'a Places,
    memory: Disjoint<'a, u8>,
}

impl<'a> Call<'a> {
    /// Returns the memory for `x A^T` of a layer.
    fn h(&self, layer: usize, adapter: &Adapter<'_>) -> Disjoint<'a, f32> {
        let before = self.layers[..layer]
            .iter()
            .map(|layer| inner_bytes(layer, self.input.rows));
        let from = self.places.inner + before.sum::<usize>();
        self.memory.floats(from, self.input.rows * adapter.rank)
    }

    /// Computes some columns of `x A^T`.
    ///
    /// # Safety
    /// The ranks must belong to this task, and the memory of `thread` to the current thread.
    unsafe fn inner(&self, thread: usize, layer: usize, ranks: Range<usize>) {
        if let Some(adapter) = &self.layers[layer].adapter {
            let output = DisjointRows {
                all: self.h(layer, adapter),
                stride: adapter.rank,
            };
            // SAFETY: the caller upholds this function's contract, and the memory has room for all
            // ranks.
            unsafe { self.multiply(thread, adapter.a, self.task(ranks, output)) };
        }
    }

    /// Computes some outputs of a layer.
    ///
    /// # Safety
    /// The outputs must belong to this task and lie within the output's memory, and the memory of
    /// `thread` must belong to the current thread.
    unsafe fn outer(
        &self,
        thread: usize,
        layer: usize,
        range: Range<usize>,
        output: DisjointRows<'_>,
    ) {
        let Linear {
            weight,
            bias,
            adapter,
            ..
        } = self.layers[layer];
        let task = self.task(range.clone(), output);
        if self.work == Work::All {
            // SAFETY: the caller upholds this function's contract.
            unsafe { self.multiply(thread, weight, task.clone()) };
        }
        if let Some(bias) = bias.filter(|_| self.work == Work::All) {
            for row in 0..self.input.rows {
                // SAFETY: the caller upholds this function's contract.
                let y = unsafe { output.row(row, range.clone()) };
                y.iter_mut()
                    .zip(&bias[range.clone()])
                    .for_each(|(y, bias)| *y += bias);
            }
        }
        if let Some(adapter) = adapter
            && let Body::Dense(bt) = adapter.bt.body()
        {
            let h = self.h(layer, &adapter);
            // SAFETY: `h` was written by the tasks of the inner products, which are all done; the
            // caller guarantees the rest.
            unsafe {
                let update = Update {
                    bt,
                    scale: adapter.scale,
                    h: h.shared(0..h.len()),
                    rank: adapter.rank,
                };
                match isa::kernels(self.level) {
                    Some(kernels) => kernels.add_update(&update, task, self.scratch(thread)),
                    None => plain::add_update(self.level, &update, task),
                }
            }
        }
    }

    fn task<'b>(&'b self, rows: Range<usize>, output: DisjointRows<'b>) -> Task<'b> {
        Task {
            rows,
            input: &self.input,
            output,
        }
    }

    /// # Safety
    /// The memory of `thread` must belong to the current thread, and no other slice of it may be
    /// alive.
    unsafe fn scratch(&self, thread: usize) -> &'a mut [f32] {
        let at = self.places.threads + thread * self.places.of_thread;
        let all = self.memory.floats(at, self.places.of_thread / 4);
        // SAFETY: the caller upholds this function's contract.
        unsafe { all.part(0..all.len()) }
    }

    /// # Safety
    /// The outputs must belong to this task and lie within the output's memory, and the memory of
    /// `thread` must belong to the current thread.
    unsafe fn multiply(&self, thread: usize, weight: &StoredMatrix, task: Task<'_>) {
        let (body, cols) = (weight.body(), weight.cols());
        if let Some(kernels) = isa::kernels(self.level) {
            let unit = units_of(self.level, self.input.rows, body).map(|(_, unit)| unit);
            // SAFETY: the caller upholds this function's contract; `Level` values exist only for
            // instruction sets that the processor supports.
            if unsafe { kernels.multiply(body, unit, task.clone(), self.scratch(thread)) } {
                return;
            }
        }
        let at = self.places.threads + thread * self.places.of_thread;
        // SAFETY: the caller upholds this function's contract; the two parts do not overlap.
        unsafe {
            let numbers = self.memory.floats(at, cols).part(0..cols);
            let codes = self.memory.from(at + lines(4 * cols)).part(0..cols);
            plain::multiply(self.level, body, task, numbers, codes);
        }
    }
}

/// Results that tasks compute: the inner results of adapters, or the outputs.
#[derive(Clone, Copy)]
enum Product {
    Inner,
    Outer,
}

/// The tasks of a call. Each computes some outputs of one layer.
struct Tasks<'a> {
    layers: &'a [Linear<'a>],
    product: Product,
    work: Work,
    threads: usize,
    /// Number of outputs of a task, if the kernel prescribes it.
    most: Option<usize>,
}

impl Tasks<'_> {
    /// Returns the number of outputs of a layer and of each of its tasks.
    fn split(&self, layer: &Linear<'_>) -> (usize, usize) {
        let (outputs, weight) = match (self.product, &layer.adapter) {
            (Product::Outer, None) if self.work == Work::Updates => return (0, 1),
            (Product::Outer, _) => (layer.outputs, layer.weight),
            (Product::Inner, Some(adapter)) => (adapter.rank, adapter.a),
            (Product::Inner, None) => return (0, 1),
        };
        if let Some(most) = self.most {
            return (outputs, most);
        }
        let row = weight
            .bytes()
            .checked_div(weight.rows())
            .unwrap_or(0)
            .max(1);
        let most = (TASK_BYTES / row).min(outputs.div_ceil(TASKS * self.threads));
        (outputs, most.next_multiple_of(OUTPUTS).max(OUTPUTS))
    }

    fn count(&self) -> usize {
        self.layers
            .iter()
            .map(|layer| self.split(layer))
            .map(|(outputs, size)| outputs.div_ceil(size))
            .sum()
    }

    fn get(&self, mut task: usize) -> Option<(usize, Range<usize>)> {
        for (index, layer) in self.layers.iter().enumerate() {
            let (outputs, size) = self.split(layer);
            let count = outputs.div_ceil(size);
            if task < count {
                return Some((index, task * size..((task + 1) * size).min(outputs)));
            }
            task -= count;
        }
        None
    }
}

fn mismatch(what: &str, expected: &[usize], found: &[usize]) -> Error {
    Error::ShapeMismatch {
        what: what.into(),
        expected: expected.to_vec(),
        found: found.to_vec(),
    }
}

/// Returns whether `rows` rows of `width` numbers fit into a slice.
fn fits(len: usize, rows: usize, stride: usize, width: usize) -> bool {
    let end = rows
        .saturating_sub(1)
        .checked_mul(stride)
        .and_then(|start| start.checked_add(width));
    (rows <= 1 || stride >= width) && (rows == 0 || end.is_some_and(|end| end <= len))
}

fn check(layers: &[Linear<'_>], x: &Rows<'_>, inputs: usize, y: &[RowsMut<'_>]) -> Result<()> {
    if !fits(x.values.len(), x.rows, x.stride, inputs) {
        return Err(mismatch(
            "rows of inputs",
            &[x.rows, inputs],
            &[x.values.len(), x.stride],
        ));
    }
    if layers.len() != y.len() {
        return Err(mismatch("outputs of layers", &[layers.len()], &[y.len()]));
    }
    for (layer, y) in layers.iter().zip(y) {
        let Linear {
            weight,
            outputs,
            bias,
            adapter,
        } = layer;
        if inputs > weight.cols() || *outputs > weight.rows() {
            return Err(mismatch(
                "active sizes of a weight",
                &[weight.rows(), weight.cols()],
                &[*outputs, inputs],
            ));
        }
        if y.rows != x.rows || !fits(y.values.len(), y.rows, y.stride, *outputs) {
            return Err(mismatch(
                "rows of outputs",
                &[x.rows, *outputs],
                &[y.rows, y.values.len(), y.stride],
            ));
        }
        if let Some(bias) = bias
            && bias.len() < *outputs
        {
            return Err(mismatch("bias", &[*outputs], &[bias.len()]));
        }
        if let Some(adapter) = adapter {
            let (a, bt) = (adapter.a, adapter.bt);
            if adapter.rank > a.rows() || inputs > a.cols() {
                return Err(mismatch(
                    "active sizes of an adapter's a",
                    &[a.rows(), a.cols()],
                    &[adapter.rank, inputs],
                ));
            }
            if adapter.rank > bt.rows() || *outputs > bt.cols() {
                return Err(mismatch(
                    "active sizes of an adapter's bt",
                    &[bt.rows(), bt.cols()],
                    &[adapter.rank, *outputs],
                ));
            }
            if !matches!(bt.body(), Body::Dense(_)) {
                return Err(Error::argument(
                    "bt",
                    format!("{:?}", bt.format()),
                    "a dense format",
                ));
            }
        }
    }
    Ok(())
}
