//! Reference implementation that the kernels are compared with: sums in `f64`, weight by weight.

use super::linear::Linear;
use crate::error::Result;

/// Computes `y = x W^T + s (x A^T) B^T + b` for one row. `x` has as many elements as there are
/// active inputs.
///
/// # Errors
/// Returns an error if a row of the weight cannot be dequantized, which does not happen for a
/// weight that this crate made.
pub fn forward_row(layer: &Linear<'_>, x: &[f32]) -> Result<Vec<f64>> {
    let dot = |weight: &[f32]| -> f64 {
        weight
            .iter()
            .zip(x)
            .map(|(w, x)| f64::from(*w) * f64::from(*x))
            .sum()
    };
    let mut row = vec![0.0; layer.weight.cols()];
    let mut y = Vec::with_capacity(layer.outputs);
    for output in 0..layer.outputs {
        layer.weight.dequantize_rows(output, &mut row)?;
        y.push(dot(&row) + layer.bias.map_or(0.0, |bias| f64::from(bias[output])));
    }
    if let Some(adapter) = &layer.adapter {
        let (mut a, mut bt) = (vec![0.0; adapter.a.cols()], vec![0.0; adapter.bt.cols()]);
        for rank in 0..adapter.rank {
            adapter.a.dequantize_rows(rank, &mut a)?;
            adapter.bt.dequantize_rows(rank, &mut bt)?;
            let h = f64::from(adapter.scale) * dot(&a);
            y.iter_mut()
                .zip(&bt)
                .for_each(|(y, b)| *y += h * f64::from(*b));
        }
    }
    Ok(y)
}
