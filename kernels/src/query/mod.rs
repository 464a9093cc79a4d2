//! Query: the linear map from hidden states to queries, `W_q x` (§2.1 of the paper's layer; the norm is fused into
//! [`score`](crate::score)). The same launch makes the output projection of [`expand`](crate::expand).
//!
//! Shapes: input `[tokens, depth]`, weight `[depth, width]` (the transpose of PyTorch's `Linear.weight`), output
//! `[tokens, width]`.

mod backward;
mod forward;

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use cubek::matmul::definition::{MatmulElems, MatmulSetupError};
use cubek::matmul::launch::{Strategy, launch_ref};
use cubek::std::InputBinding;

pub use self::backward::{Map, QueryGradients, query_backward};
use self::forward::{ProjectPlan, project_kernel};
use crate::device::Device;
use crate::loops::check_loops;
use crate::product::{Product, Sharing};
use crate::tensor::{Tensor, arg, check, empty, f32_storage, float_type, positive, sizes, supports, tokens_of};
use crate::{ElementType, Error, Result};

/// How a linear map is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProjectStrategy {
    /// A tile of tokens against a tile of columns, read through the caches: any device, any shape.
    Tile,
    /// cubek's matrix product, which uses matrix units for 16-bit numbers where the device has them.
    Cubek,
}

impl ProjectStrategy {
    /// Matrix units for prefill where they take this element type, the tile otherwise.
    pub fn choose<R: Runtime>(client: &ComputeClient<R>, tokens: usize, weight: StorageType) -> Self {
        let units = client.features().matmul.cmma.iter().any(|unit| unit.a_type == weight && unit.b_type == weight);
        if units && tokens >= 64 { Self::Cubek } else { Self::Tile }
    }
}

/// Launches `query = input · weight`.
///
/// - `input` `[tokens, hidden_size]`, f32, f16 or bf16
/// - `weight` `[hidden_size, query_heads · 2 · key_dim]`, the same type
/// - returns `[tokens, query_heads · 2 · key_dim]` f32
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn query<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    strategy: ProjectStrategy,
) -> Result<Tensor<R>> {
    project(client, input, weight, f32_storage(), strategy)
}

/// Launches any linear map: `input [tokens, depth] · weight [depth, width]`, summed in f32, stored as `output`. No tokens give no output,
/// `[0, width]`.
///
/// # Errors
/// As [`query`].
pub fn project<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    output: StorageType,
    strategy: ProjectStrategy,
) -> Result<Tensor<R>> {
    float_type(client, input, "input")?;
    float_type(client, weight, "weight")?;
    let tokens = tokens_of(input, "input")?;
    let [depth, width] = sizes(weight, "weight")?;
    check(client, input, "input", &[tokens, depth], input.dtype)?;
    check(client, weight, "weight", &[depth, width], weight.dtype)?;
    positive(&[("rows of the weight", depth)])?;
    let sums = ElementType::from_storage(output).ok_or_else(|| Error::Type {
        tensor: "output",
        found: output.to_string(),
        expected: "f32, f16 or bf16".to_string(),
    })?;
    supports(client, sums)?;
    let output = empty(client, "output", &[tokens, width], output)?;
    if tokens * width == 0 {
        return Ok(output);
    }
    match strategy {
        ProjectStrategy::Tile => launch_tile(client, input, weight, &output)?,
        ProjectStrategy::Cubek => launch_cubek(client, input, weight, &output)?,
    }
    Ok(output)
}

fn launch_tile<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    output: &Tensor<R>,
) -> Result<()> {
    let device = Device::of(client);
    let (tokens, depth, out) = (input.shape()[0], weight.shape()[0], weight.shape()[1]);
    let width = device.width(weight.dtype.size(), &[out]);
    let row_width = device.width(4, &[depth]);
    let columns = out / width;
    let tile = tokens.next_power_of_two().min(device.tile);
    let bytes = width * weight.dtype.size();
    let product = Product { columns, depth: depth / row_width, tile, bytes, width };
    let tiles = tokens.div_ceil(tile);
    let sharing = Sharing::choose(&device, &product, tiles);
    let plan = ProjectPlan { sharing, tile };
    let cubes = tiles * sharing.cubes(columns);
    check_loops("project_kernel", (depth / row_width).div_ceil(sharing.slices))?;
    // SAFETY: shapes are checked; a unit reads and writes below `tokens` and `columns` only.
    unsafe {
        project_kernel::launch_unchecked::<R>(
            client,
            device.grid(cubes)?,
            CubeDim::new_1d(sharing.units() as u32),
            width,
            row_width,
            arg(input, row_width),
            arg(weight, width),
            arg(output, width),
            (depth / row_width) as u32,
            columns as u32,
            tokens as u32,
            cubes as u32,
            plan,
            input.dtype,
            weight.dtype,
            output.dtype,
        );
    }
    Ok(())
}

/// `output = input · weight` by cubek, `input` of any strides.
pub(crate) fn launch_cubek<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    output: &Tensor<R>,
) -> Result<()> {
    let launch = |strategy: Strategy| {
        let mut types = MatmulElems::from_single_dtype(weight.dtype.into());
        (types.lhs_global, types.acc_global) = (input.dtype, output.dtype);
        launch_ref(
            &strategy,
            client,
            InputBinding::new(input.binding(), input.dtype),
            InputBinding::new(weight.binding(), weight.dtype),
            output.binding(),
            &mut types,
        )
    };
    let (matrix_units, units) =
        (Strategy::SimpleCyclicCmma(Default::default()), Strategy::SimpleUnit(Default::default()));
    // Matrix units would round f32 to tf32, which has ten bits.
    let launched = match weight.dtype.size() {
        4 => launch(units),
        _ => match launch(matrix_units) {
            Err(MatmulSetupError::Unavailable(_)) => launch(units),
            launched => launched,
        },
    };
    launched.map_err(|reason| Error::Matmul {
        m: input.shape()[0],
        k: weight.shape()[0],
        n: weight.shape()[1],
        reason: format!("{reason:?}"),
    })
}
