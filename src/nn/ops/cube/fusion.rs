//! The operations under Burn's fusion, which defers operations. An operation unknown to fusion is
//! queued among the others and run in its turn by the inner backend. All other operations stay
//! elementary, so that they can be fused.

use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape};
use burn_fusion::custom::{
    CustomOpIr, HandleContainer, OperationFn, OperationIr, StreamId, TensorIr,
};
use burn_fusion::{Fusion, FusionBackend, FusionHandle, FusionTensor};

use crate::nn::StoredWeight;
use crate::nn::ops::extension::DecoderOps;
use crate::nn::ops::portable;
use crate::nn::ops::terms::Weight;

/// Queues an operation with one input, and a result of the given shape and dtype.
fn queued<B: FusionBackend>(
    name: &str,
    x: FusionTensor<B::FusionRuntime>,
    (shape, dtype): (Shape, DType),
    run: impl Fn(FloatTensor<B>) -> FloatTensor<B> + Send + Sync + 'static,
) -> FusionTensor<B::FusionRuntime> {
    let client = x.client.clone();
    let input = x.into_ir();
    let output = TensorIr::uninit(client.create_empty_handle(), shape, dtype);
    let described = CustomOpIr {
        id: name.into(),
        inputs: vec![input.clone()],
        outputs: vec![output.clone()],
        scalars: Vec::new(),
    };
    let run = OperationFn(
        move |handles: &mut HandleContainer<FusionHandle<B::FusionRuntime>>| {
            let y = run(handles.get_float_tensor::<B>(&input));
            handles.register_float_tensor::<B>(&output.id, y);
            Ok(())
        },
    );
    client
        .register(StreamId::current(), OperationIr::Custom(described), run)
        .swap_remove(0)
}

impl<B: FusionBackend + DecoderOps> DecoderOps for Fusion<B> {
    fn stored_dense(beside: FloatTensor<Self>, weight: StoredWeight) -> FloatTensor<Self> {
        let result = (Shape::from(weight.dims()), DType::F32);
        queued::<B>("stored_dense", beside, result, move |beside| {
            B::stored_dense(beside, weight.clone())
        })
    }

    fn mixed_linear(x: FloatTensor<Self>, weight: Weight<Self>) -> FloatTensor<Self> {
        let weight = match weight {
            Weight::Dense(weight) => return portable::linear::<Self>(x, weight),
            Weight::Stored(weight) => weight,
        };
        let mut shape = x.shape.to_vec();
        if let Some(last) = shape.last_mut() {
            *last = weight.dims()[1];
        }
        let result = (Shape::from(shape), x.dtype);
        queued::<B>("stored_linear", x, result, move |x| {
            B::mixed_linear(x, Weight::Stored(weight.clone()))
        })
    }
}
