//! Column sums in a fixed order: of weight gradients that each token, or each key, has made apart.
//!
//! The units of a cube share out a few columns and all their rows: each adds up rows in chunks, chunk by chunk, and then the rows' shares are added up
//! through shared memory. Reads each number once, in one launch; two lists of rows of one width are summed apart in the same launch.

use cubecl::prelude::*;

use crate::Result;
use crate::launch::device::Device;
use crate::launch::loops::strided;
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Parts, Tensor, arg, f32_storage};

/// Rows that a unit adds up one after the other.
const CHUNK: usize = 64;
/// Rows that a unit has at least, where others could share them.
const FEW_ROWS: usize = 8;
/// Rows that a unit has at most, where a cube may have more units.
const MOST_ROWS: usize = 1 << 14;
/// Vectors that units side by side have at least: a line of a cache.
const LINE: usize = 8;

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ColumnSumPlan {
    /// Units side by side on vectors of a row.
    pub lanes: usize,
    /// Shares of the rows, each of as many units.
    pub slices: usize,
    /// Rows that a unit loads at once.
    pub flight: usize,
}

/// The launch of a column sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ColumnSumPlans {
    /// Numbers of a load.
    pub(crate) vector: usize,
    /// Cubes of the first list of rows.
    pub(crate) first: usize,
    /// How units share the rows out.
    pub(crate) sum: Planned<ColumnSumPlan>,
}

impl ColumnSumPlans {
    /// Plans the sums of one or two lists of so many rows of `width` numbers. The launch is checked when it is made.
    pub fn of(device: &Device, rows: &[usize], width: usize) -> Self {
        let vector = device.width(4, &[width]);
        let (vectors, most) = (width / vector, rows.iter().copied().max().unwrap_or(0));
        let units = device.units(usize::MAX);
        let least = vectors.clamp(1, LINE.min(units)).next_power_of_two();
        let slices = (most / FEW_ROWS).clamp(1, units / least);
        let mut slices = 1 << slices.ilog2();
        let flight = if device.on_cpu { 1 } else { 8 };
        while most.div_ceil(slices) > MOST_ROWS && 2 * slices * least <= device.most_units() {
            slices *= 2;
        }
        let lanes = vectors.clamp(1, (units / slices).max(least)).next_power_of_two();
        let plan = ColumnSumPlan { lanes, slices, flight };
        let first = if most == 0 { 0 } else { vectors.div_ceil(plan.lanes) };
        let of_unit = strided(most, slices);
        let launch = Launch {
            kernel: "column_sum_kernel",
            cubes: first.saturating_mul(rows.len()),
            units: plan.lanes * slices,
            shared_bytes: if slices > 1 { 4 * vector * plan.lanes * slices } else { 0 },
            loops: of_unit.saturating_add(of_unit.div_ceil(CHUNK)).saturating_add(slices),
        };
        Self { vector, first, sum: Planned { plan, launch } }
    }

    /// The launch, in the form of other plans.
    pub fn launches(&self) -> Vec<Launch> {
        vec![self.sum.launch]
    }
}

/// `sums[c] = Σ_r rows[r, c]` of f32 `[rows, width]`: the same bits in every run.
pub(crate) fn column_sum<R: Runtime>(client: &ComputeClient<R>, rows: &Tensor<R>) -> Result<Tensor<R>> {
    let plans = ColumnSumPlans::of(&Device::of(client), &[rows.shape()[0]], rows.shape()[1]);
    sum(client, plans, rows, rows).map(|[sums, _]| sums)
}

/// The same of two lists of rows of one width, each by itself.
pub(crate) fn column_sums<R: Runtime>(client: &ComputeClient<R>, rows: [&Tensor<R>; 2]) -> Result<[Tensor<R>; 2]> {
    let [first, second] = rows;
    let plans = ColumnSumPlans::of(&Device::of(client), &rows.map(|rows| rows.shape()[0]), first.shape()[1]);
    sum(client, plans, first, second)
}

/// The sums of the first list, and, where `plans` has two, of the second.
fn sum<R: Runtime>(
    client: &ComputeClient<R>,
    plans: ColumnSumPlans,
    first: &Tensor<R>,
    second: &Tensor<R>,
) -> Result<[Tensor<R>; 2]> {
    let ColumnSumPlans { vector, first: cubes, sum: Planned { plan, launch } } = plans;
    let width = first.shape()[1];
    let more = usize::from(launch.cubes > cubes) * width;
    let sums = Parts::empty(client, "column sums", [(&[width], f32_storage()), (&[more], f32_storage())])?;
    let (grid, cube_dim) = launch.start(&Device::of(client))?;
    // SAFETY: a unit reads one column of vectors in the rows of its list and writes one sum of the list's; parts begin at whole vectors.
    unsafe {
        column_sum_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            vector,
            arg(first, vector),
            arg(second, vector),
            arg(&sums.words, vector),
            first.shape()[0] as u32,
            second.shape()[0] as u32,
            (width / vector) as u32,
            (sums.starts[1] / vector) as u32,
            cubes as u32,
            plan,
        );
    }
    Ok(sums.tensors)
}

#[cube(launch_unchecked)]
fn column_sum_kernel<N: Size>(
    rows: &Array<Vector<f32, N>>,
    more: &Array<Vector<f32, N>>,
    sums: &mut Array<Vector<f32, N>>,
    count: u32,
    more_count: u32,
    vectors: u32,
    second: u32,
    cubes: u32,
    #[comptime] plan: ColumnSumPlan,
) {
    let (lane, slice) = (UNIT_POS as usize % plan.lanes, UNIT_POS as usize / plan.lanes);
    let vectors = vectors as usize;
    let mut vector = CUBE_POS * plan.lanes + lane;
    let mut at = vector;
    let mut sum = Vector::<f32, N>::new(0.0);
    if CUBE_POS < cubes as usize {
        sum += sum_rows::<N>(rows, vector, slice, count, vectors, plan);
    } else {
        vector -= cubes as usize * plan.lanes;
        at = second as usize + vector;
        sum += sum_rows::<N>(more, vector, slice, more_count, vectors, plan);
    }
    if comptime!(plan.slices > 1) {
        let mut shares = SharedMemory::<Vector<f32, N>>::new(comptime!(plan.lanes * plan.slices));
        shares[UNIT_POS as usize] = sum;
        sync_cube();
        if slice == 0 {
            for other in 1..plan.slices {
                sum += shares[other * plan.lanes + lane];
            }
        }
    }
    if slice == 0 && vector < vectors {
        sums[at] = sum;
    }
}

/// A unit's share of the sum of a column of vectors.
#[cube]
fn sum_rows<N: Size>(
    rows: &Array<Vector<f32, N>>,
    vector: usize,
    slice: usize,
    count: u32,
    vectors: usize,
    #[comptime] plan: ColumnSumPlan,
) -> Vector<f32, N> {
    let count = count as usize;
    let mut sum = Vector::<f32, N>::new(0.0);
    if vector < vectors {
        for start in range_stepped(slice, count, comptime!(CHUNK * plan.slices)) {
            let stop = min(start + comptime!(CHUNK * plan.slices), count);
            let mut chunk = Vector::<f32, N>::new(0.0);
            for first in range_stepped(start, stop, comptime!(plan.flight * plan.slices)) {
                let mut held = Array::<Vector<f32, N>>::new(plan.flight);
                #[unroll]
                for n in 0..plan.flight {
                    let row = first + n * plan.slices;
                    held[n] = Vector::new(0.0);
                    if row < stop {
                        held[n] = rows[row * vectors + vector];
                    }
                }
                #[unroll]
                for n in 0..plan.flight {
                    chunk += held[n];
                }
            }
            sum += chunk;
        }
    }
    sum
}
