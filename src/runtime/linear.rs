//! One linear layer on the caller's numbers.

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::kernels::{self, Activations, Adapter, Linear, Rows, RowsMut, Scratch};

use super::model::Model;
use super::shape;
use super::weights::LayerWeights;
use super::workspace::{Line, bytes_of, grow};

/// A number that a [`LinearLayer`] takes and gives.
#[doc(hidden)]
pub trait Number: Copy + Send + Sync + 'static + sealed::Sealed {
    /// As `f32`, exactly.
    fn to_f32(self) -> f32;
    /// Rounded to nearest.
    fn from_f32(value: f32) -> Self;
    /// Numbers that are `f32` already.
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
    /// Numbers that are `f32` already, to be written.
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

/// One linear layer of a [`Model`] under a subnet: `y = x W^T + s (x A^T) B^T + b`, on what of it is active. It keeps the model alive,
/// does not change, and may be used from any number of threads.
#[derive(Clone, Debug)]
pub struct LinearLayer {
    model: Model,
    layer: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
    activations: Activations,
}

impl LinearLayer {
    pub(super) fn new(model: &Model, layer: usize, subnet: usize) -> Result<Self> {
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
        let rank = shape.ranks[layer];
        Ok(Self {
            model: model.clone(),
            layer,
            inputs,
            outputs,
            rank,
            activations: Activations::default(),
        })
    }

    /// Sets how exactly the inputs of integer weights are kept.
    pub fn with_activations(mut self, activations: Activations) -> Self {
        self.activations = activations;
        self
    }

    /// Active inputs.
    pub fn d_input(&self) -> usize {
        self.inputs
    }

    /// Active outputs.
    pub fn d_output(&self) -> usize {
        self.outputs
    }

    /// Active rank of the adapter; 0 without one.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The model.
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
            weight: stored.weight.get()?,
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

    /// Bytes of scratch memory that [`forward`](Self::forward) needs for so many rows, whatever their numbers; begins at a line of 64
    /// bytes, or else takes up to 63 bytes more, which are counted.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for more rows than any memory holds.
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

    /// Applies the layer to `n_rows` rows; row `i` of `x` begins at `i * ldx`, that of `y` at `i * ldy`. What lies between the rows of
    /// `y` is left alone.
    ///
    /// # Shapes
    /// - `x`: `[n_rows, d_input]`, `y`: `[n_rows, d_output]`, the last row of either without what would come after it
    /// - `scratch`: at least [`scratch_bytes`](Self::scratch_bytes), at any alignment; allocated here where there is none
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a leading dimension under the row's length, [`Error::ShapeMismatch`] for a slice that is too
    /// short, [`Error::OutOfMemory`].
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
        // Rows end where the last one does.
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
        // Both begin at multiples of 4 bytes from a line's start.
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
