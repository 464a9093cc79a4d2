//! Tensors that stay f32 in a record, on a backend in half precision too.

use burn::{
    record::{PrecisionSettings, Record},
    tensor::{DType, Tensor, TensorData, backend::Backend},
};

/// An f32 tensor whose record is f32, whatever the recorder's settings and the backend say. Burn reads the floats of a record in the backend's
/// own type, where a small second moment would become zero, and the step after it infinite.
#[derive(Clone, Debug)]
pub struct FullTensor<B: Backend, const D: usize>(
    /// The tensor.
    pub Tensor<B, D>,
);

impl<B: Backend, const D: usize> Record<B> for FullTensor<B, D> {
    type Item<S: PrecisionSettings> = TensorData;

    fn into_item<S: PrecisionSettings>(self) -> TensorData {
        self.0.into_data().convert::<f32>()
    }

    fn from_item<S: PrecisionSettings>(item: TensorData, device: &B::Device) -> Self {
        Self(Tensor::from_data(item.convert::<f32>(), (device, DType::F32)))
    }
}
