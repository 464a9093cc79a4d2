//! The runtime of offline devices, as CubeCL asks for one.

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::device::DeviceId;
use cubecl::ir::{ContiguousElements, MatrixLayout, MmaProperties, TargetProperties};
use cubecl::zspace::{Shape, Strides, striding::has_pitched_row_major_strides};
use cubecl_common::device::Device;
use cubecl_cpp::cuda::mma::contiguous_elements_cuda;

use crate::OfflineDevice;
use crate::server::OfflineServer;
use crate::target::TargetCompiler;

/// CubeCL's CUDA runtime without CUDA: the same compiler, the same properties, buffers in host memory.
#[derive(Debug, Clone)]
pub struct OfflineRuntime;

impl Runtime for OfflineRuntime {
    type Compiler = TargetCompiler;
    type Server = OfflineServer;
    type Device = OfflineDevice;

    fn client(device: &OfflineDevice) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_client: &ComputeClient<Self>) -> &'static str {
        "cuda"
    }

    fn require_array_lengths() -> bool {
        true
    }

    fn max_cube_count() -> (u32, u32, u32) {
        (i32::MAX as u32, u16::MAX.into(), u16::MAX.into())
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        has_pitched_row_major_strides(shape, strides)
    }

    fn target_properties() -> TargetProperties {
        TargetProperties {
            mma: MmaProperties {
                register_size_bits: 32,
                const_plane_size: 32,
                register_layout_a: MatrixLayout::RowMajor,
                register_layout_b: MatrixLayout::ColMajor,
                register_layout_acc: MatrixLayout::RowMajor,
                register_duplication_a: 1,
                register_duplication_b: 1,
                register_duplication_acc: 1,
                contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
            },
        }
    }

    fn enumerate_devices(_: u16, (): &()) -> Vec<DeviceId> {
        OfflineDevice::all().iter().map(Device::to_id).collect()
    }
}
