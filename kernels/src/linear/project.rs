//! Linear maps, `output[t, o] = Σ_k input[t, k] · weight[k, o]`, on matrix units, by cubek's product or by a tile, which takes any device and
//! type.
//!
//! Shapes: input `[tokens, depth]`, weight `[depth, width]` (the transpose of PyTorch's `Linear.weight`), output `[tokens, width]`; f32, f16 or bf16,
//! summed in f32. Sizes or types that do not fit are an error, and nothing is launched.
//!
//! The tile: some tokens by some columns in each cube.
//! A unit reads the input rows of its tile and its own columns of the weight straight from global memory: units of a cube read the
//! same rows at the same time, which caches serve, and there is no barrier to wait at. Moves the input once per column tile,
//! the weight once per token tile (from cache where it fits: tiles of tokens run next to each other) and the output once. At few
//! tokens a cube takes few columns and its units share out the depth.

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use cubek::matmul::definition::{MatmulElems, MatmulSetupError};
use cubek::matmul::launch::{Strategy, launch_ref};
use cubek::std::InputBinding;

use crate::launch::device::{Device, has_units};
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Tensor, arg, check, empty, float_type, positive, sizes, supports, tokens_of};
use crate::linear::matrix::launch_matrix;
use crate::linear::matrix_plan::{MatrixPlans, MatrixSizes};
use crate::linear::tile::{Columns, Outputs, Product, Rows, Sharing, multiply};
use crate::{ElementType, Error, Result};

/// How a linear map is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProjectStrategy {
    /// A tile of tokens against a tile of columns, read through the caches: any device, any shape.
    Tile,
    /// Our product on matrix units, of 16-bit numbers in pairs; for f32 and odd sizes, the tile. The device has to have matrix units as CubeCL's
    /// CUDA shows them.
    Matrix,
    /// cubek's matrix product, which uses matrix units for 16-bit numbers where the device has them.
    Cubek,
    /// [`Tile`](Self::Tile), but a unit goes through the whole depth: a token has the same bits however many there are.
    InvariantTile,
    /// [`Matrix`](Self::Matrix), but a plane goes through the whole depth: likewise.
    InvariantMatrix,
}

impl ProjectStrategy {
    /// Matrix units where they take this element type, our own for two tokens and more, cubek's for prefill; the tile otherwise.
    pub fn choose<R: Runtime>(client: &ComputeClient<R>, tokens: usize, weight: StorageType) -> Self {
        let cmma = || client.features().matmul.cmma.iter().any(|unit| unit.a_type == weight && unit.b_type == weight);
        match tokens {
            2.. if has_units(client, weight) => Self::Matrix,
            64.. if cmma() => Self::Cubek,
            _ => Self::Tile,
        }
    }

    /// The same bits for a token whatever the number of tokens: matrix units where they take this element type, for one token, too.
    pub fn invariant<R: Runtime>(client: &ComputeClient<R>, weight: StorageType) -> Self {
        if has_units(client, weight) { Self::InvariantMatrix } else { Self::InvariantTile }
    }

    /// Whether a token's sums are taken in one order whatever the number of tokens.
    pub fn is_invariant(self) -> bool {
        matches!(self, Self::InvariantTile | Self::InvariantMatrix)
    }

    /// The launches of a product; None for cubek, which plans its own.
    ///
    /// # Errors
    /// Sizes that don't fit the device.
    pub fn plan(self, device: &Device, sizes: &ProjectSizes) -> Result<Option<ProductPlans>> {
        let whole = self.is_invariant();
        Ok(match self.of_numbers(sizes.dtype, [sizes.depth, sizes.width]) {
            Self::Tile | Self::InvariantTile => Some(ProductPlans::Tile(ProjectPlan::of(device, sizes, whole)?)),
            Self::Matrix | Self::InvariantMatrix => Some(ProductPlans::Matrix(sizes.on_units(device, whole)?)),
            Self::Cubek => None,
        })
    }

    /// Whether an f32 factor of a product with numbers of this type, in rows of so many, is rounded to it: what is multiplied twice is rounded
    /// once, before.
    pub fn rounds(self, dtype: ElementType, rows: [usize; 2]) -> bool {
        !matches!(self.of_numbers(dtype, rows), Self::Tile | Self::InvariantTile) && dtype != ElementType::F32
    }

    /// The same for numbers of this type, in rows of so many: matrix units would round f32, and they are given pairs.
    pub(crate) fn of_numbers(self, dtype: ElementType, rows: [usize; 2]) -> Self {
        let fits = dtype != ElementType::F32 && rows.iter().all(|row| row.is_multiple_of(2));
        match self {
            Self::Matrix if !fits => Self::Tile,
            Self::InvariantMatrix if !fits => Self::InvariantTile,
            _ => self,
        }
    }
}

/// The launches of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProductPlans {
    /// Of [`ProjectStrategy::Tile`] and [`ProjectStrategy::InvariantTile`].
    Tile(Planned<ProjectPlan>),
    /// Of [`ProjectStrategy::Matrix`] and [`ProjectStrategy::InvariantMatrix`].
    Matrix(MatrixPlans),
}

impl ProductPlans {
    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        match self {
            Self::Tile(planned) => vec![planned.launch],
            Self::Matrix(plans) => plans.launches(),
        }
    }

    /// Tokens that share one reading of the weight.
    pub fn tile(&self) -> usize {
        match self {
            Self::Tile(planned) => planned.plan.tile,
            Self::Matrix(plans) => plans.product.plan.rows(),
        }
    }

    /// Bytes of sums that are written in parts, to be added up.
    pub fn parts_bytes(&self) -> usize {
        match self {
            Self::Tile(_) => 0,
            Self::Matrix(plans) => plans.parts_bytes(),
        }
    }
}

/// Launches any linear map: `input [tokens, depth] · weight [depth, width]`, summed in f32, stored as `output`. No tokens give no output,
/// `[0, width]`.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn project<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    output: StorageType,
    strategy: ProjectStrategy,
) -> Result<Tensor<R>> {
    float_type(client, input, "input")?;
    let dtype = float_type(client, weight, "weight")?;
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
    let device = Device::of(client);
    let sizes = ProjectSizes { tokens, depth, width, dtype };
    match strategy.plan(&device, &sizes)? {
        Some(ProductPlans::Tile(planned)) => launch_tile(client, input, weight, &output, planned)?,
        Some(ProductPlans::Matrix(plans)) => launch_matrix(client, input, weight, &output, dtype.storage(), &plans)?,
        None => launch_cubek(client, input, weight, &output)?,
    }
    Ok(output)
}

/// The sizes of a product, and the type of its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProjectSizes {
    /// Rows of the input; none is no launch.
    pub tokens: usize,
    /// Numbers of an input row.
    pub depth: usize,
    /// Numbers of an output row.
    pub width: usize,
    /// Element type of the weight.
    pub dtype: ElementType,
}

impl ProjectSizes {
    /// The plans on matrix units, with the depth in one piece if it has to be `whole`.
    fn on_units(&self, device: &Device, whole: bool) -> Result<MatrixPlans> {
        let Self { tokens, depth, width, .. } = *self;
        positive(&[("rows of the weight", depth), ("columns of the weight", width)])?;
        let sizes = MatrixSizes { rows: tokens, columns: width, depth, turned: false, whole };
        MatrixPlans::of(device, &sizes).checked(device)
    }
}

/// What is fixed when the kernel is compiled. Which columns and how much depth there is, is known only when the kernel runs, so that every
/// product of a layer is one kernel, compiled once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProjectPlan {
    /// How the units of a cube share the product out.
    pub sharing: Sharing,
    /// Tokens of a cube, which share one reading of its part of the weight.
    pub tile: usize,
    /// Numbers of a load of the weight.
    pub width: usize,
    /// Numbers of a load of an input row.
    pub row_width: usize,
}

impl ProjectPlan {
    /// Plans [`project`] by [`ProjectStrategy::Tile`], or by [`ProjectStrategy::InvariantTile`], with the depth in one piece, if it is `whole`.
    ///
    /// # Errors
    /// Sizes that don't fit the device.
    pub fn of(device: &Device, sizes: &ProjectSizes, whole: bool) -> Result<Planned<Self>> {
        let ProjectSizes { tokens, depth, width: out, dtype } = *sizes;
        positive(&[("rows of the weight", depth), ("columns of the weight", out)])?;
        let (width, row_width) = (device.width(dtype.size(), &[out]), device.width(4, &[depth]));
        let (columns, depth, tile) = (out / width, depth / row_width, device.tile_of(tokens));
        let product = Product { columns, depth, tile, bytes: width * dtype.size(), width };
        let tiles = tokens.div_ceil(tile);
        let sharing = Sharing::choose(device, &product, tiles.max(1), whole);
        let launch = Launch {
            kernel: "project_kernel",
            cubes: tiles.saturating_mul(sharing.cubes(columns)),
            units: sharing.units(),
            shared_bytes: sharing.shared_bytes(&product),
            loops: depth.div_ceil(sharing.slices),
        };
        Planned { plan: Self { sharing, tile, width, row_width }, launch }.checked("project", device)
    }
}

fn launch_tile<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    output: &Tensor<R>,
    planned: Planned<ProjectPlan>,
) -> Result<()> {
    let (device, Planned { plan, launch }) = (Device::of(client), planned);
    let (tokens, depth, out) = (input.shape()[0], weight.shape()[0], weight.shape()[1]);
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: shapes are checked; a unit reads and writes below `tokens` and `columns` only.
    unsafe {
        project_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            plan.width,
            plan.row_width,
            arg(input, plan.row_width),
            arg(weight, plan.width),
            arg(output, plan.width),
            (depth / plan.row_width) as u32,
            (out / plan.width) as u32,
            tokens as u32,
            launch.cubes as u32,
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

/// `depth` is the vectors of an input row, `width` those of a weight row.
///
/// One cube computes `tile` tokens by `lanes · block` column vectors; `CUBE_POS` runs over token tiles first.
#[cube(launch_unchecked)]
pub(crate) fn project_kernel<I: Float, E: Float, O: Float, N: Size, W: Size>(
    input: &Array<Vector<I, W>>,
    weight: &Array<Vector<E, N>>,
    output: &mut Array<Vector<O, N>>,
    depth: u32,
    width: u32,
    tokens: u32,
    cubes: u32,
    #[comptime] plan: ProjectPlan,
    #[define(I)] _input_type: StorageType,
    #[define(E)] _weight_type: StorageType,
    #[define(O)] _output_type: StorageType,
) {
    let token_tiles = tokens.div_ceil(plan.tile as u32) as usize;
    let sharing = comptime!(plan.sharing);
    let first = CUBE_POS / token_tiles * comptime!(sharing.lanes * sharing.block);
    let columns = Columns {
        first: first + UNIT_POS as usize % sharing.lanes,
        last: width as usize - 1,
        stride: sharing.lanes,
        count: sharing.block,
    };
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let token = CUBE_POS % token_tiles * plan.tile;
    let rows = Rows { first: token, last: tokens as usize - 1, pitch: depth as usize, count: plan.tile };
    let outputs = Outputs { first: token, end: tokens as usize };
    multiply::<I, E, O, N, W>(
        &input.to_slice(),
        &rows.places(),
        weight,
        0usize,
        output,
        outputs,
        columns,
        sharing.slices,
    );
}
