//! Applies one linear layer to the caller's buffers.

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::kernels::{self, Activations, Adapter, Linear, Rows, RowsMut, Scratch};

use super::model::Model;
use super::shape;
use super::weights::LayerWeights;
use super::workspace::{Line, bytes_of, grow};

/// An element type that a [`LinearLayer`] reads and writes.
#[doc(hidden)]
pub trait Number: Copy + Send + Sync + 'static + sealed::Sealed {
    /// Converts to `f32`, exactly.
    fn to_f32(self) -> f32;
    /// Converts from `f32`, rounding to nearest.
    fn from_f32(value: f32) -> Self;
    /// Returns the slice itself if its elements are `f32`.
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
    /// Returns the slice itself, for writing, if its elements are `f32`.
    fn as_f32_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

impl Number for f32 {
    fn to_f32(self) -> f32 {
        self
    }

    fn from_f32(value: f32) -> Self {
        value
    }

    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }

    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]> {
        Some(values)
    }
}

impl Number for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Number for bf16 {
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }

    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

/// One linear layer of a [`Model`] under a subnet.
///
/// It computes `y = x W^T + s (x A^T) B^T + b`, restricted to the active inputs, outputs and rank.
/// It is immutable, keeps the model alive, and can be used from any number of threads at once.
#[derive(Clone, Debug)]
pub struct LinearLayer {
    model: Model,
    layer: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
    /// Index of the subnet's weight.
    weight: usize,
    activations: Activations,
}

impl Model {
    /// Returns one linear layer under a subnet, to be applied to the caller's buffers. It keeps the
    /// model alive.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if there is no such layer or subnet, or if the subnet
    /// leaves the layer out, and [`Error::InvalidFile`] if the contents of one of its weights are
    /// damaged.
    pub fn linear(&self, layer: usize, subnet: usize) -> Result<LinearLayer> {
        LinearLayer::new(self, layer, subnet)
    }
}

impl LinearLayer {
    fn new(model: &Model, layer: usize, subnet: usize) -> Result<Self> {
        let stored = model.layer(layer)?;
        let shape = model.shape(subnet)?;
        let [inputs, outputs] = shape.dims(&model.weights, layer);
        if inputs == 0 || outputs == 0 {
            let name = model
                .subnets()
                .get(subnet)
                .map_or("", |subnet| &subnet.name);
            let expected = format!("a layer that subnet `{name}` has");
            return Err(Error::argument(
                "layer",
                format!("`{}`", stored.name),
                expected,
            ));
        }
        stored
            .weights()
            .try_for_each(|weight| weight.get().map(drop))?;
        let weight = shape.weights[layer];
        stored.weight_at(weight).get()?;
        let rank = shape.ranks[layer];
        Ok(Self {
            model: model.clone(),
            layer,
            inputs,
            outputs,
            rank,
            weight,
            activations: Activations::default(),
        })
    }

    /// Sets the precision to which inputs are quantized before multiplication with integer weights.
    pub fn with_activations(mut self, activations: Activations) -> Self {
        self.activations = activations;
        self
    }

    /// Number of active inputs.
    pub fn d_input(&self) -> usize {
        self.inputs
    }

    /// Number of active outputs.
    pub fn d_output(&self) -> usize {
        self.outputs
    }

    /// Active rank of the adapter; 0 without one.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The model that the layer belongs to.
    pub fn model(&self) -> &Model {
        &self.model
    }

    fn stored(&self) -> &LayerWeights {
        &self.model.weights.layers[self.layer]
    }

    fn linear(&self) -> Result<Linear<'_>> {
        let stored = self.stored();
        let adapter = match &stored.adapter {
            Some(adapter) if self.rank > 0 => Some(Adapter {
                a: adapter.a.get()?,
                bt: adapter.bt.get()?,
                rank: self.rank,
                scale: shape::scale(&adapter.lora, self.rank),
            }),
            _ => None,
        };
        let bias = stored.bias.as_deref().map(|bias| &bias[..self.outputs]);
        Ok(Linear {
            weight: stored.weight_at(self.weight).get()?,
            outputs: self.outputs,
            bias,
            adapter,
        })
    }

    fn kernel_bytes(&self, n_rows: usize) -> Result<usize> {
        let layers = [self.linear()?];
        let bytes = kernels::scratch_bytes(
            &self.model.pool,
            &layers,
            n_rows,
            self.inputs,
            self.activations,
        );
        Ok(bytes.next_multiple_of(64))
    }

    /// Returns the bytes of scratch memory that [`forward`](Self::forward) needs for `n_rows` rows
    /// of any element type. The size includes up to 63 bytes for aligning the scratch memory to 64
    /// bytes.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if so many rows cannot fit into memory.
    pub fn scratch_bytes(&self, n_rows: usize) -> Result<usize> {
        let numbers = n_rows
            .checked_mul(4 * (self.inputs + self.outputs))
            .filter(|bytes| *bytes < isize::MAX as usize / 4);
        let Some(numbers) = numbers else {
            return Err(Error::argument(
                "n_rows",
                n_rows,
                "rows that fit into memory",
            ));
        };
        Ok(self.kernel_bytes(n_rows)? + numbers.next_multiple_of(64) + 128)
    }

    /// Applies the layer to `n_rows` rows. Row `i` of `x` begins at `i * ldx` and row `i` of `y` at
    /// `i * ldy`. Elements between the rows of `y` are not changed.
    ///
    /// # Shapes
    /// - `x`: `[n_rows, d_input]`, `y`: `[n_rows, d_output]`; neither needs elements after its last
    ///   row
    /// - `scratch`: at least [`scratch_bytes`](Self::scratch_bytes) bytes, at any alignment; if
    ///   `None`, the memory is allocated for this call
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if a leading dimension is less than the row's length,
    /// [`Error::ShapeMismatch`] if a slice is too short, and [`Error::OutOfMemory`] if memory runs
    /// out.
    pub fn forward<T: Number>(
        &self,
        n_rows: usize,
        x: &[T],
        ldx: usize,
        y: &mut [T],
        ldy: usize,
        scratch: Option<&mut [u8]>,
    ) -> Result<()> {
        let (d_input, d_output) = (self.inputs, self.outputs);
        check("x", x.len(), n_rows, d_input, ldx)?;
        check("y", y.len(), n_rows, d_output, ldy)?;
        if n_rows == 0 {
            return Ok(());
        }
        // Cut the slices at the end of the last row.
        let (x, y) = (
            &x[..(n_rows - 1) * ldx + d_input],
            &mut y[..(n_rows - 1) * ldy + d_output],
        );
        let needed = self.scratch_bytes(n_rows)?;
        let mut own: Vec<Line> = Vec::new();
        let scratch = match scratch {
            Some(scratch) => scratch,
            None => {
                grow(&mut own, needed.div_ceil(64), Line::ZERO)?;
                bytes_of(&mut own)
            }
        };
        if scratch.len() < needed {
            return Err(Error::ShapeMismatch {
                what: "bytes of scratch memory".into(),
                expected: vec![needed],
                found: vec![scratch.len()],
            });
        }
        if let Some(x) = T::as_f32(x)
            && let Some(y) = T::as_f32_mut(y)
        {
            let x = Rows {
                values: x,
                rows: n_rows,
                stride: ldx,
            };
            return self.run(
                x,
                RowsMut {
                    values: y,
                    rows: n_rows,
                    stride: ldy,
                },
                scratch,
            );
        }
        let skipped = scratch.as_ptr().align_offset(64).min(63);
        let (kernel, numbers) = scratch[skipped..].split_at_mut(self.kernel_bytes(n_rows)?);
        let (input, numbers) = numbers.split_at_mut(4 * n_rows * d_input);
        let output = &mut numbers[..4 * n_rows * d_output];
        // Both begin at a multiple of 4 bytes after a 64-byte boundary.
        let (Ok(input), Ok(output)) = (
            bytemuck::try_cast_slice_mut::<u8, f32>(input),
            bytemuck::try_cast_slice_mut::<u8, f32>(output),
        ) else {
            return Err(Error::argument(
                "scratch",
                "misaligned",
                "memory that can be aligned",
            ));
        };
        for (row, out) in input.chunks_exact_mut(d_input).enumerate() {
            out.iter_mut()
                .zip(&x[row * ldx..])
                .for_each(|(out, x)| *out = x.to_f32());
        }
        let x = Rows {
            values: input,
            rows: n_rows,
            stride: d_input,
        };
        let out = RowsMut {
            values: output,
            rows: n_rows,
            stride: d_output,
        };
        self.run(x, out, kernel)?;
        for (row, from) in output.chunks_exact(d_output).enumerate() {
            y[row * ldy..]
                .iter_mut()
                .zip(from)
                .for_each(|(y, from)| *y = T::from_f32(*from));
        }
        Ok(())
    }
}

impl LinearLayer {
    fn run(&self, x: Rows<'_>, y: RowsMut<'_>, scratch: &mut [u8]) -> Result<()> {
        let (layers, inputs) = ([self.linear()?], self.inputs);
        kernels::forward(
            &self.model.pool,
            &layers,
            x,
            inputs,
            &mut [y],
            self.activations,
            &mut Scratch::new(scratch),
        )
    }
}

fn check(name: &'static str, len: usize, rows: usize, width: usize, stride: usize) -> Result<()> {
    if stride < width {
        let what = if name == "x" { "ldx" } else { "ldy" };
        return Err(Error::argument(
            what,
            stride,
            format!("at least the row's length, {width}"),
        ));
    }
    let needed = rows.checked_sub(1).map_or(Some(0), |before| {
        before.checked_mul(stride)?.checked_add(width)
    });
    if needed.is_some_and(|needed| needed <= len) {
        return Ok(());
    }
    Err(Error::ShapeMismatch {
        what: format!("numbers of {name}"),
        expected: vec![rows, width],
        found: vec![len],
    })
}
