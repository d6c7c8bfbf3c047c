//! The frozen linear layer under an adapter. All conversion between `[out, in]` and `[in, out]` is
//! here.

use burn::backend::Dispatch;
use burn::module::{Module, Param};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};

use crate::error::{Error, Result};
use crate::format::{PackedMatrix, StoredMatrix};
use crate::linalg::Matrix;
use crate::nn::StoredWeight;
use crate::nn::ops::{self, LoraTerm};

/// Converts a Hugging Face weight `[out, in]` to a Burn tensor `[in, out]`.
///
/// # Shapes
/// - `weight`: `[d_output, d_input]`; result: `[d_input, d_output]`
pub(crate) fn tensor_from_matrix(weight: &Matrix, device: &Device) -> Tensor<2> {
    let turned = weight.transposed();
    let shape = [turned.rows(), turned.cols()];
    Tensor::from_data(TensorData::new(turned.into_vec(), shape), device)
}

/// Converts a Burn weight `[in, out]` to a Hugging Face matrix `[out, in]`; the inverse of
/// [`tensor_from_matrix`].
///
/// # Shapes
/// - `weight`: `[d_input, d_output]`; result: `[d_output, d_input]`
#[doc(hidden)]
pub fn matrix_from_tensor(weight: Tensor<2>) -> Matrix {
    let [d_input, d_output] = weight.dims();
    let values = host_values(weight);
    Matrix::from_fn(d_input, d_output, |i, o| values[i * d_output + o]).transposed()
}

/// The elements of a tensor on the host, in row-major order, as `f32`.
#[doc(hidden)]
pub fn host_values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let n = tensor.shape().num_elements();
    let data = tensor.into_data_dtype(DType::F32);
    let values = data.try_into_vec::<f32>().unwrap_or_default();
    assert_eq!(
        values.len(),
        n,
        "the device gave back another number of f32 values than the tensor has"
    );
    values
}

/// A linear layer `y = x W + b` with a stored weight: the frozen part of an adapted layer.
///
/// The storage of the weight is internal to this type, so the decoder is the same for every storage
/// format. A quantized or sparse weight keeps its stored format ([`StoredMatrix`]) in host memory
/// and, after its first product there, in GPU memory. It cannot be trained. Products with few rows
/// read the stored format directly; for other products the weight is unpacked, one weight at a
/// time. A prefix of inputs and outputs may be active. The layer then acts as a smaller one with
/// the leading part of weight and bias (mode B of arXiv 2501.16372, figure 1); no weights are
/// moved.
#[derive(Module, Debug)]
pub struct BaseLinear {
    /// The dense weight, `[d_input, d_output]`; `None` if it is packed.
    weight: Option<Param<Tensor<2>>>,
    #[module(skip)]
    packed: Option<StoredWeight>,
    /// A tensor on the layer's device, since a packed weight has no device.
    anchor: Tensor<1>,
    /// `[d_output]`.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    active: [usize; 2],
}

/// A view of the first `len` indices along `axis`, or the tensor itself if that is all.
pub(crate) fn prefix<const D: usize>(tensor: Tensor<D>, axis: usize, len: usize) -> Tensor<D> {
    if tensor.dims()[axis] == len {
        tensor
    } else {
        tensor.narrow(axis, 0, len)
    }
}

impl BaseLinear {
    /// Creates a frozen layer from a weight `[d_input, d_output]` and a bias `[d_output]`.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the bias has another length.
    pub fn from_tensors(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Result<Self> {
        let [d_input, d_output] = weight.dims();
        if let Some(bias) = &bias
            && bias.dims() != [d_output]
        {
            return Err(Error::ShapeMismatch {
                what: "bias".into(),
                expected: vec![d_output],
                found: bias.dims().to_vec(),
            });
        }
        let anchor = Tensor::zeros([1], &weight.device().without_autodiff());
        Ok(Self {
            weight: Some(Param::from_tensor(weight).set_require_grad(false)),
            packed: None,
            anchor,
            bias: bias.map(|bias| Param::from_tensor(bias).set_require_grad(false)),
            active: [d_input, d_output],
        })
    }

    /// Creates a frozen layer from a quantized weight, `[d_output, d_input]`, which stays packed,
    /// and a bias `[d_output]`.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the bias has another length.
    pub fn from_quantized(
        weight: PackedMatrix,
        bias: Option<&[f32]>,
        device: &Device,
    ) -> Result<Self> {
        Self::from_stored(weight.into(), bias, device)
    }

    /// Creates a frozen layer from a weight, `[d_output, d_input]`, which keeps its stored format,
    /// and a bias `[d_output]`.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the bias has another length, and the errors of
    /// [`StoredMatrix::check`].
    pub fn from_stored(
        weight: StoredMatrix,
        bias: Option<&[f32]>,
        device: &Device,
    ) -> Result<Self> {
        weight.check()?;
        let (d_input, d_output) = (weight.cols(), weight.rows());
        if let Some(bias) = bias.filter(|bias| bias.len() != d_output) {
            return Err(Error::ShapeMismatch {
                what: "bias".into(),
                expected: vec![d_output],
                found: vec![bias.len()],
            });
        }
        let bias =
            bias.map(|bias| Tensor::from_data(TensorData::new(bias.to_vec(), [d_output]), device));
        Ok(Self {
            weight: None,
            packed: Some(StoredWeight::new(weight)),
            anchor: Tensor::zeros([1], &device.clone().without_autodiff()),
            bias: bias.map(|bias| Param::from_tensor(bias).set_require_grad(false)),
            active: [d_input, d_output],
        })
    }

    /// The packed weight, `[d_output, d_input]`, if the weight is quantized and not sparse.
    pub fn quantized(&self) -> Option<&PackedMatrix> {
        self.stored_matrix()?.packed()
    }

    /// The stored weight, `[d_output, d_input]`, if the weight is not a tensor.
    pub fn stored_matrix(&self) -> Option<&StoredMatrix> {
        self.packed.as_ref().map(StoredWeight::matrix)
    }

    /// The weight as a tensor in its dtype; a packed weight is unpacked.
    fn value(&self) -> Tensor<2> {
        if let Some(weight) = &self.weight {
            return weight.val();
        }
        let (values, [d_input, d_output]) = match &self.packed {
            Some(packed) => (packed.values(), packed.dims()),
            // Unreachable: every constructor sets one of the two.
            None => (vec![0.0; self.active.iter().product()], self.active),
        };
        Tensor::<2>::from_data(TensorData::new(values, [d_output, d_input]), &self.device())
            .transpose()
    }

    /// The device of the layer; for a packed weight, without autodiff.
    fn device(&self) -> Device {
        match &self.weight {
            Some(weight) => weight.val().device(),
            None => self.anchor.device().without_autodiff(),
        }
    }

    /// Creates a frozen layer from a Hugging Face weight `[d_output, d_input]` and a bias
    /// `[d_output]`.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the bias has another length.
    pub fn from_matrix(weight: &Matrix, bias: Option<&[f32]>, device: &Device) -> Result<Self> {
        let bias = bias
            .map(|bias| Tensor::from_data(TensorData::new(bias.to_vec(), [bias.len()]), device));
        Self::from_tensors(tensor_from_matrix(weight, device), bias)
    }

    /// The weight as a dense `f32` tensor, `[d_input, d_output]`; a copy if the weight is stored in
    /// another format.
    pub fn weight(&self) -> Tensor<2> {
        let weight = self.value();
        if weight.dtype() == DType::F32 {
            weight
        } else {
            weight.cast(FloatDType::F32)
        }
    }

    /// A view of the active part of the weight in its dtype. A packed weight is unpacked.
    pub(crate) fn stored(&self) -> Tensor<2> {
        let [d_input, d_output] = self.active;
        prefix(prefix(self.value(), 0, d_input), 1, d_output)
    }

    /// The active part as a separate layer with a new weight, given in Hugging Face's orientation.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the weight has another shape.
    pub(crate) fn replaced(&self, weight: &Matrix) -> Result<Self> {
        let [d_input, d_output] = self.active;
        if (weight.rows(), weight.cols()) != (d_output, d_input) {
            return Err(Error::ShapeMismatch {
                what: "replacement weight".into(),
                expected: vec![d_output, d_input],
                found: vec![weight.rows(), weight.cols()],
            });
        }
        let device = self.device();
        let bias = self
            .bias
            .as_ref()
            .map(|bias| prefix(bias.val(), 0, d_output));
        let bias = bias.map(|bias| Tensor::from_data(bias.to_data(), &device));
        Self::from_tensors(tensor_from_matrix(weight, &device), bias)
    }

    /// Like [`replaced`](Self::replaced), with a quantized weight.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the weight has another shape.
    pub(crate) fn replaced_quantized(&self, weight: PackedMatrix) -> Result<Self> {
        let [d_input, d_output] = self.active;
        if (weight.rows(), weight.cols()) != (d_output, d_input) {
            return Err(Error::ShapeMismatch {
                what: "quantized replacement weight".into(),
                expected: vec![d_output, d_input],
                found: vec![weight.rows(), weight.cols()],
            });
        }
        let bias = self
            .bias
            .as_ref()
            .map(|bias| host_values(prefix(bias.val(), 0, d_output)));
        Self::from_quantized(weight, bias.as_deref(), &self.device())
    }

    /// The active part of the weight as `f32`.
    pub(crate) fn active_weight(&self) -> Tensor<2> {
        let weight = self.stored();
        if weight.dtype() == DType::F32 {
            weight
        } else {
            weight.cast(FloatDType::F32)
        }
    }

    /// Numbers of active inputs and outputs; all of them at first.
    pub fn active_dims(&self) -> [usize; 2] {
        self.active
    }

    /// Activates the first `d_input` inputs and `d_output` outputs. No weights are moved.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if a size is 0 or above the full size, and
    /// [`Error::Unsupported`] for a part of a quantized weight. The active sizes are then
    /// unchanged.
    pub fn set_active_dims(&mut self, active: [usize; 2]) -> Result<()> {
        let dims = self.dims();
        if active.contains(&0) || active[0] > dims[0] || active[1] > dims[1] {
            return Err(Error::ShapeMismatch {
                what: "active inputs and outputs of a layer, each at least 1 and at most".into(),
                expected: dims.to_vec(),
                found: active.to_vec(),
            });
        }
        if self.packed.is_some() && active != dims {
            return Err(Error::Unsupported {
                what: format!("a part, {active:?}, of a quantized weight of {dims:?}"),
            });
        }
        self.active = active;
        Ok(())
    }

    /// Stores the weight in another float dtype, rounded to nearest; a quantized weight is
    /// unchanged. A 16-bit weight takes half the memory and cannot be trained.
    pub fn with_dtype(mut self, dtype: FloatDType) -> Self {
        self.weight = self.weight.map(|weight| {
            if weight.val().dtype() == dtype.into() {
                return weight;
            }
            weight
                .map(|weight| weight.cast(dtype))
                .set_require_grad(false)
        });
        self
    }

    /// The weight in Hugging Face's orientation, `[d_output, d_input]`.
    pub fn to_matrix(&self) -> Matrix {
        matrix_from_tensor(self.value())
    }

    /// Replaces the weight by one of the same shape in Hugging Face's orientation. A quantized
    /// weight becomes a dense one.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the weight has another shape.
    pub fn set_matrix(&mut self, weight: &Matrix) -> Result<()> {
        let [d_input, d_output] = self.dims();
        if (weight.rows(), weight.cols()) != (d_output, d_input) {
            return Err(Error::ShapeMismatch {
                what: "replacement weight".into(),
                expected: vec![d_output, d_input],
                found: vec![weight.rows(), weight.cols()],
            });
        }
        let tensor = tensor_from_matrix(weight, &self.device());
        self.weight = Some(match self.weight.take() {
            Some(before) => {
                let (dtype, trained) = (before.val().dtype(), before.val().is_require_grad());
                before.map(|_| tensor.cast(dtype)).set_require_grad(trained)
            }
            None => Param::from_tensor(tensor).set_require_grad(false),
        });
        self.packed = None;
        Ok(())
    }

    /// The full sizes, `[d_input, d_output]`.
    pub fn dims(&self) -> [usize; 2] {
        match (&self.weight, &self.packed) {
            (Some(weight), _) => weight.lazy_shape().dims(),
            (None, Some(packed)) => packed.dims(),
            (None, None) => self.active,
        }
    }

    /// The active part of the weight, as the operand of a product.
    fn operand(&self) -> ops::Weight<Dispatch> {
        match &self.packed {
            Some(packed) => packed.into(),
            None => self.stored().into(),
        }
    }

    /// Applies the active part of the layer.
    ///
    /// # Shapes
    /// - `x`: `[.., d_input]`; result: `[.., d_output]`, with the active sizes
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let y = ops::linear(x, self.operand());
        self.with_bias(y)
    }

    /// Applies the active part of the layer with a low-rank update of the same size; see
    /// [`ops::lora_linear`].
    ///
    /// # Shapes
    /// - `a`: `[d_input, r_max]`, `b`: `[r_max, d_output]`, with the active sizes
    pub(crate) fn forward_with<const D: usize>(
        &self,
        x: Tensor<D>,
        a: Tensor<2>,
        b: Tensor<2>,
        term: LoraTerm,
    ) -> Tensor<D> {
        let y = ops::lora_linear(x, self.operand(), a, b, term);
        self.with_bias(y)
    }

    /// Whether the weight is part of an autodiff graph.
    pub(crate) fn is_tracked(&self) -> bool {
        self.weight
            .as_ref()
            .is_some_and(|weight| weight.val().is_tracked())
    }

    /// Adds the bias, if there is one.
    pub(crate) fn with_bias<const D: usize>(&self, y: Tensor<D>) -> Tensor<D> {
        match &self.bias {
            Some(bias) => y + prefix(bias.val(), 0, self.active[1]).unsqueeze(),
            None => y,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orientation_round_trips_and_multiplies_as_hugging_face_does() {
        let device = Device::flex();
        let w = Matrix::from_fn(3, 5, |o, i| (o as f32 - 1.0) * 0.5 + i as f32 * 0.25);
        let layer = BaseLinear::from_matrix(&w, Some(&[0.5, -1.0, 2.0]), &device).unwrap();
        assert_eq!(layer.dims(), [5, 3]);
        assert_eq!(layer.to_matrix(), w);
        let x: Vec<f32> = (0..10).map(|i| (i as f32 * 0.7).sin()).collect();
        let y = host_values(layer.forward(Tensor::<2>::from_data(
            TensorData::new(x.clone(), [2, 5]),
            &device,
        )));
        for row in 0..2 {
            for o in 0..3 {
                let expected: f32 =
                    (0..5).map(|i| x[row * 5 + i] * w.row(o)[i]).sum::<f32>() + [0.5, -1.0, 2.0][o];
                approx::assert_abs_diff_eq!(y[row * 3 + o], expected, epsilon = 1e-5);
            }
        }
    }

    #[test]
    fn a_weight_of_another_shape_is_refused() {
        let device = Device::flex();
        let mut layer = BaseLinear::from_matrix(&Matrix::zeros(3, 5), None, &device).unwrap();
        assert!(matches!(
            layer.set_matrix(&Matrix::zeros(5, 3)),
            Err(Error::ShapeMismatch { .. })
        ));
        assert!(BaseLinear::from_matrix(&Matrix::zeros(3, 5), Some(&[0.0; 5]), &device).is_err());
    }
}
