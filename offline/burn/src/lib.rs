//! The checks of the Burn modules on the offline H100, which `ultramem-offline`'s test `burn` runs. A crate of their own, for Burn's backends
//! take minutes to optimise, and the device has to be optimised.

mod checks;

use std::sync::OnceLock;

use burn::tensor::backend::DeviceOps;
use burn_cubecl::CubeBackend;
use burn_fusion::Fusion;
use cubecl::{
    Runtime,
    client::ComputeClient,
    device::{Device, DeviceId},
    ir::TargetProperties,
    zspace::{Shape, Strides},
};
use ultramem::ElementType;
use ultramem_offline::{OfflineDevice, OfflineRuntime, OfflineServer, TargetCompiler};

macro_rules! on_each_backend {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*);)*) => {
        /// On Burn's backend without fusion.
        pub mod plain {
            $($(#[$doc])* pub fn $name($($argument: $type),*) { crate::checks::$name::<super::Plain>($($argument),*); })*
        }
        /// On Burn's backend with fusion.
        pub mod fused {
            $($(#[$doc])* pub fn $name($($argument: $type),*) { crate::checks::$name::<super::Fused>($($argument),*); })*
        }
    };
}

on_each_backend! {
    /// Forward, gradients and a training step in `dtype` of a layer: its rank, which is 1 for a product-key memory, `key_dim` and `value_dim`.
    /// No table is copied in the forward pass.
    ///
    /// # Panics
    /// Where something is not the oracle's.
    is_the_oracle(dtype: crate::ElementType, layer: (usize, usize, usize));
    /// A table that is new or loaded is contiguous.
    ///
    /// # Panics
    /// Where it is not.
    tables_are_contiguous();
    /// Layers that add some blocks after they read run beside the blocks, in streams of their own, and give the numbers of a model that runs in
    /// order, forward and backward; whatever the order between streams that their waits allow.
    ///
    /// # Panics
    /// Where they don't.
    layers_run_beside_blocks();
    /// A step refuses a table that is padded, and gives the model back.
    ///
    /// # Panics
    /// Where it does not.
    a_padded_table_is_refused();
}

/// Burn's device: an offline one that can be compared, and of which one is the default.
#[derive(Clone, Debug)]
pub struct Card(pub OfflineDevice);

impl Default for Card {
    fn default() -> Self {
        static FIRST: OnceLock<Card> = OnceLock::new();
        FIRST.get_or_init(|| Card(OfflineDevice::default())).clone()
    }
}

impl PartialEq for Card {
    fn eq(&self, other: &Self) -> bool {
        self.to_id() == other.to_id()
    }
}

impl Device for Card {
    fn from_id(id: DeviceId) -> Self {
        Card(OfflineDevice::from_id(id))
    }

    fn to_id(&self) -> DeviceId {
        self.0.to_id()
    }
}

impl DeviceOps for Card {}

/// The offline runtime on Burn's device, which makes it one that Burn's backends run on.
#[derive(Clone, Debug)]
pub struct BurnRuntime;

impl Runtime for BurnRuntime {
    type Compiler = TargetCompiler;
    type Server = OfflineServer;
    type Device = Card;

    fn client(device: &Card) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_: &ComputeClient<Self>) -> &'static str {
        "cuda"
    }

    fn require_array_lengths() -> bool {
        OfflineRuntime::require_array_lengths()
    }

    fn max_cube_count() -> (u32, u32, u32) {
        OfflineRuntime::max_cube_count()
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        OfflineRuntime::can_read_tensor(shape, strides)
    }

    fn target_properties() -> TargetProperties {
        OfflineRuntime::target_properties()
    }

    fn enumerate_devices(kind: u16, info: &()) -> Vec<DeviceId> {
        OfflineRuntime::enumerate_devices(kind, info)
    }
}

/// Burn's CUDA backend, with the offline device in CUDA's place. The element type is the device's default.
pub type Plain = CubeBackend<BurnRuntime, f32, i32, u8>;
/// The same with fusion.
pub type Fused = Fusion<Plain>;
