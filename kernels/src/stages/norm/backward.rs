//! Backward of a norm, with `û = (x - mean) · scale` and `g = grad · weight`: `grad_x = (g - û · mean(g · û) - mean(g)) · scale`, the last mean
//! for LayerNorm only, and `grad_weight = Σ grad · û` over all vectors.
//!
//! A cube takes a tile of vectors: its lanes sum what each vector's moments and means take, then `grad` becomes `grad_x` in place, piece
//! by piece, and each piece's part of the weight's gradient is added up over the tile. Moves the vectors and their gradients in once
//! (and once more from cache) and the gradients out once.

use cubecl::prelude::*;

use super::{Norm, scale_of};
use crate::Result;
use crate::launch::device::Device;
use crate::launch::loops::strided;
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Parts, Tensor, arg, f32_storage};
use crate::linear::interleave::{interleaved, load, strand};
use crate::linear::tile::{component_sum, zero_sums};
use crate::select::{lane_of, row_lanes};

impl Norm {
    /// Numbers of a vector that its way back sums: `Σ (x - centre)²` and `Σ g · (x - centre)`, and for LayerNorm `Σ (x - centre)`, `Σ g` and
    /// the centre, the first number of the vector, which lies near its mean.
    fn sums(self) -> usize {
        if self == Self::Rms { 2 } else { 5 }
    }

    /// Numbers of [`Means`] that are not zero.
    fn means(self) -> usize {
        if self == Self::Rms { 2 } else { 4 }
    }
}

/// Vectors whose norm is gone back through, in groups of `step` interleaved ones: number `d` of vector `k` lies at `d · step + k` of
/// its group.
pub(crate) struct Normed<'a, R: Runtime> {
    /// `[all groups, size, step]`, f32, f16 or bf16.
    pub numbers: &'a Tensor<R>,
    /// f32 `[size]`.
    pub weight: &'a Tensor<R>,
    pub norm: Norm,
    pub eps: f32,
    pub step: usize,
    /// Which of all groups `grad` has, u32 `[groups]`, and how many they are, u32 `[1]`; None: all of them in turn.
    pub listed: Option<(&'a Tensor<R>, &'a Tensor<R>)>,
    /// The type that the normalised vectors are rounded to, where they are wanted; groups have one vector then.
    pub rounded: Option<StorageType>,
}

/// What a norm's way back leaves besides the vectors' gradient.
pub(crate) struct NormGradients<R: Runtime> {
    /// f32 `[cubes, size]`: the parts of the weight's gradient.
    pub parts: Tensor<R>,
    /// f32 `[groups, size]`: the vectors as the norm gives them, rounded; None where they are not wanted.
    pub normalised: Option<Tensor<R>>,
}

/// The sizes of a norm's way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NormSizes {
    /// Which norm.
    pub norm: Norm,
    /// Groups of vectors.
    pub groups: usize,
    /// Numbers of a vector.
    pub size: usize,
    /// Vectors of a group.
    pub step: usize,
    /// Whether the groups are listed, or are all of them in turn.
    pub listed: bool,
    /// Whether the normalised vectors are wanted.
    pub normalised: bool,
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NormPlan {
    /// Which norm.
    pub norm: Norm,
    /// Numbers of a load.
    pub width: usize,
    /// Loads of a vector.
    pub pieces: usize,
    /// Vectors of a group.
    pub step: usize,
    /// Whether the groups are listed.
    pub listed: bool,
    /// Whether the normalised vectors are written.
    pub normalised: bool,
    /// Groups of a cube.
    pub tile: usize,
    /// Units of a cube.
    pub units: usize,
    /// Units side by side on the pieces of a group, a power of two.
    pub lanes: usize,
}

impl NormPlan {
    /// Plans a norm's way back: as many units as have room for their sums, each group with a few lanes. The launch is checked when it is made.
    pub fn of(device: &Device, sizes: &NormSizes) -> Planned<Self> {
        let NormSizes { norm, groups, size, step, listed, normalised } = *sizes;
        let width = device.width(4, &[size]);
        let pieces = size / width;
        let with = |units: usize| {
            let tile = units / row_lanes(device, pieces).min(units);
            Self {
                norm,
                width,
                pieces,
                step,
                listed,
                normalised,
                tile,
                units,
                lanes: pieces.next_power_of_two().min(units),
            }
        };
        let mut plan = with(device.units(usize::MAX));
        while plan.units > 1 && plan.shared_bytes() > device.shared_bytes {
            plan = with(plan.units / 2);
        }
        let (cubes, units) = (groups.div_ceil(plan.tile), plan.units);
        let (shared_bytes, loops) = (plan.shared_bytes(), plan.loops());
        Planned { plan, launch: Launch { kernel: "norm_backward_kernel", cubes, units, shared_bytes, loops } }
    }

    /// Shares of a tile's groups that units go through at once.
    fn slices(&self) -> usize {
        self.units / self.lanes
    }

    /// Loop iterations of a unit: its sums, the means of its vectors, and its pieces of the tile's groups.
    fn loops(&self) -> usize {
        let lanes = self.units / self.tile;
        let means = strided(self.tile * self.step, self.units) * (1 + lanes);
        let shares = if self.slices() > 1 { self.slices() } else { 0 };
        strided(self.pieces, lanes)
            + means
            + strided(self.pieces, self.lanes) * (1 + strided(self.tile, self.slices()) + shares)
    }

    /// What units sum, means, and the parts that slices add up, of vectors of four at most.
    fn shared_bytes(&self) -> usize {
        let parts = if self.slices() > 1 { 4 * self.units } else { 0 };
        4 * (self.step * (self.units * self.norm.sums() + self.tile * self.norm.means()) + parts)
    }
}

/// Turns `grad`, f32 `[groups, size, step]`, from the gradient of the normalised vectors into that of the vectors.
pub(crate) fn norm_backward<R: Runtime>(
    client: &ComputeClient<R>,
    normed: &Normed<'_, R>,
    grad: &Tensor<R>,
    groups: usize,
) -> Result<NormGradients<R>> {
    let device = Device::of(client);
    let size = normed.weight.shape()[0];
    let (norm, step, listed, rounded) = (normed.norm, normed.step, normed.listed.is_some(), normed.rounded);
    let sizes = NormSizes { norm, groups, size, step, listed, normalised: rounded.is_some() };
    let Planned { plan, launch } = NormPlan::of(&device, &sizes).checked("norm backward", &device)?;
    let kept = if plan.normalised { groups } else { 0 };
    let shapes = [(&[kept, size][..], f32_storage()), (&[launch.cubes, size][..], f32_storage())];
    let Parts { words, starts, tensors: [normalised, parts] } = Parts::empty(client, "what a norm leaves", shapes)?;
    let (grid, cube_dim) = launch.start(&device)?;
    // A buffer that is written must not be bound twice.
    let (listed, used) = normed.listed.unwrap_or((normed.numbers, normed.numbers));
    // SAFETY: the caller has checked the shapes, and that listed groups are among all; a unit reads and writes groups of its cube, and the
    // parts begin at a whole vector behind the normalised ones.
    unsafe {
        norm_backward_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            plan.width,
            arg(normed.numbers, plan.width),
            arg(normed.weight, plan.width),
            arg(listed, 1),
            arg(used, 1),
            arg(grad, plan.width),
            arg(&words, plan.width),
            normed.eps,
            groups as u32,
            (starts[1] / plan.width) as u32,
            plan,
            normed.numbers.dtype,
            rounded.unwrap_or(f32_storage()),
        );
    }
    Ok(NormGradients { parts, normalised: plan.normalised.then_some(normalised) })
}

#[cube(launch_unchecked)]
fn norm_backward_kernel<E: Float, Q: Float, N: Size>(
    numbers: &Array<Vector<E, N>>,
    weight: &Array<Vector<f32, N>>,
    listed: &Array<u32>,
    used: &Array<u32>,
    grad: &mut Array<Vector<f32, N>>,
    left: &mut Array<Vector<f32, N>>,
    eps: f32,
    groups: u32,
    parts: u32,
    #[comptime] plan: NormPlan,
    #[define(E)] _dtype: StorageType,
    #[define(Q)] _rounded: StorageType,
) {
    if CUBE_POS >= (groups as usize).div_ceil(plan.tile) {
        terminate!();
    }
    let mut last = groups as usize;
    if plan.listed {
        last = min(last, used[0] as usize);
    }
    let width = N::value();
    let size = comptime!(plan.pieces * width);
    let first = CUBE_POS * plan.tile;
    let last = min(first + plan.tile, last);
    let sums = sums::<E, N>(numbers, weight, listed, grad, first, last, plan);
    sync_cube();
    let mut means = SharedMemory::<f32>::new(comptime!(plan.tile * plan.step * plan.norm.means()));
    for vector in range_stepped(UNIT_POS as usize, comptime!(plan.tile * plan.step), plan.units) {
        write_means(&mut means, &sums, vector, eps, size, plan);
    }
    // Every unit has read the tile's gradients, and written what it made of them, before any gradient is replaced.
    sync_storage();
    sync_cube();
    let lane = UNIT_POS as usize % plan.lanes;
    let slice = UNIT_POS as usize / plan.lanes;
    let mut shares = SharedMemory::<Vector<f32, N>>::new(comptime!(if plan.slices() > 1 { plan.units } else { 1 }));
    for start in range_stepped(0usize, plan.pieces, plan.lanes) {
        let piece = start + lane;
        let mut sum = Vector::<f32, N>::new(0.0);
        if piece < plan.pieces {
            for group in range_stepped(first + slice, last, comptime!(plan.slices())) {
                sum += through::<E, Q, N>(numbers, weight, listed, grad, left, &means, first, group, piece, plan);
            }
        }
        if comptime!(plan.slices() > 1) {
            shares[UNIT_POS as usize] = sum;
            sync_cube();
            for other in 1..comptime!(plan.slices()) {
                sum += shares[other * plan.lanes + lane];
            }
            sync_cube();
        }
        if slice == 0 && piece < plan.pieces {
            left[parts as usize + CUBE_POS * plan.pieces + piece] = sum;
        }
    }
}

/// Brings one piece of a group's gradients through the norm, in place, and returns its part of the weight's gradient. Leaves the normalised
/// numbers, where they are wanted.
#[cube]
fn through<E: Float, Q: Float, N: Size>(
    numbers: &Array<Vector<E, N>>,
    weight: &Array<Vector<f32, N>>,
    listed: &Array<u32>,
    grad: &mut Array<Vector<f32, N>>,
    left: &mut Array<Vector<f32, N>>,
    means: &SharedMemory<f32>,
    first: usize,
    group: usize,
    piece: usize,
    #[comptime] plan: NormPlan,
) -> Vector<f32, N> {
    let x = load::<E, N>(numbers, (source(listed, group, plan) * plan.pieces + piece) * plan.step, plan.step);
    let at = (group * plan.pieces + piece) * plan.step;
    let given = load::<f32, N>(grad, at, plan.step);
    let mut part = Vector::<f32, N>::new(0.0);
    let mut inner = zero_sums::<N>(plan.step);
    #[unroll]
    for k in 0..plan.step {
        let of = read_means(means, (group - first) * plan.step + k, plan.norm);
        let centred = strand::<N>(&x, k, plan.step) - Vector::new(of.mean);
        let grad = strand::<N>(&given, k, plan.step);
        let scale = Vector::new(of.scale);
        inner[k] = (grad * weight[piece] - centred * Vector::new(of.along) - Vector::new(of.across)) * scale;
        part += grad * centred * scale;
        if comptime!(plan.normalised) {
            left[at] = Vector::cast_from(Vector::<Q, N>::cast_from(centred * scale * weight[piece]));
        }
    }
    #[unroll]
    for v in 0..plan.step {
        grad[at + v] = interleaved::<N>(&inner, 0usize, v, plan.step);
    }
    part
}

/// Which of all groups a listed one is.
#[cube]
fn source(listed: &Array<u32>, group: usize, #[comptime] plan: NormPlan) -> usize {
    let mut source = group;
    if plan.listed {
        source = listed[group] as usize;
    }
    source
}

/// What the way back through one vector's norm takes from all of the vector.
#[derive(CubeType, Clone, Copy)]
struct Means {
    /// Zero for RMSNorm.
    mean: f32,
    scale: f32,
    /// `mean(g · û) · scale`.
    along: f32,
    /// `mean(g)`; zero for RMSNorm.
    across: f32,
}

#[cube]
fn read_means(means: &SharedMemory<f32>, vector: usize, #[comptime] norm: Norm) -> Means {
    let first = vector * comptime!(norm.means());
    let mut of = Means { mean: 0.0f32, scale: means[first], along: means[first + 1], across: 0.0f32 };
    if comptime!(norm == Norm::Layer) {
        of.mean = means[first + 2];
        of.across = means[first + 3];
    }
    of
}

/// What each lane sums of its group's vectors, `[units, step, sums]`.
#[cube]
fn sums<E: Float, N: Size>(
    numbers: &Array<Vector<E, N>>,
    weight: &Array<Vector<f32, N>>,
    listed: &Array<u32>,
    grad: &Array<Vector<f32, N>>,
    first: usize,
    last: usize,
    #[comptime] plan: NormPlan,
) -> SharedMemory<f32> {
    let count = comptime!(plan.norm.sums());
    let mut shared = SharedMemory::<f32>::new(comptime!(plan.units * plan.step * count));
    let at = lane_of(plan.tile, plan.units);
    let group = first + at.row;
    let mut sums = Array::<f32>::new(comptime!(plan.step * count));
    #[unroll]
    for i in 0..comptime!(plan.step * count) {
        sums[i] = 0.0;
    }
    if group < last {
        let pieces = source(listed, group, plan) * plan.pieces;
        if comptime!(plan.norm == Norm::Layer) {
            let x = load::<E, N>(numbers, pieces * plan.step, plan.step);
            #[unroll]
            for k in 0..plan.step {
                sums[k * count + 4] = strand::<N>(&x, k, plan.step)[0];
            }
        }
        for piece in range_stepped(at.lane, plan.pieces, at.lanes) {
            let x = load::<E, N>(numbers, (pieces + piece) * plan.step, plan.step);
            let given = load::<f32, N>(grad, (group * plan.pieces + piece) * plan.step, plan.step);
            #[unroll]
            for k in 0..plan.step {
                let weighted = strand::<N>(&given, k, plan.step) * weight[piece];
                let mut centred = strand::<N>(&x, k, plan.step);
                if comptime!(plan.norm == Norm::Layer) {
                    centred -= Vector::new(sums[k * count + 4]);
                    sums[k * count + 2] += component_sum::<N>(centred);
                    sums[k * count + 3] += component_sum::<N>(weighted);
                }
                sums[k * count] += component_sum::<N>(centred * centred);
                sums[k * count + 1] += component_sum::<N>(weighted * centred);
            }
        }
    }
    #[unroll]
    for i in 0..comptime!(plan.step * count) {
        shared[UNIT_POS as usize * comptime!(plan.step * count) + i] = sums[i];
    }
    shared
}

/// The means of one of a tile's vectors from what its lanes have summed.
#[cube]
fn write_means(
    means: &mut SharedMemory<f32>,
    sums: &SharedMemory<f32>,
    vector: usize,
    eps: f32,
    #[comptime] size: usize,
    #[comptime] plan: NormPlan,
) {
    let share = comptime!(1.0 / size as f32);
    let lanes = comptime!(plan.units / plan.tile);
    let (group, k) = (vector / plan.step, vector % plan.step);
    let place = vector * comptime!(plan.norm.means());
    let mut squares = 0.0f32;
    let mut along = 0.0f32;
    let mut centred = 0.0f32;
    let mut across = 0.0f32;
    for lane in 0..lanes {
        let of = ((group * lanes + lane) * plan.step + k) * comptime!(plan.norm.sums());
        squares += sums[of];
        along += sums[of + 1];
        if comptime!(plan.norm == Norm::Layer) {
            centred += sums[of + 2];
            across += sums[of + 3];
        }
    }
    if comptime!(plan.norm == Norm::Layer) {
        // No less than zero by rounding; a NaN, which this would swallow, is in the mean.
        squares = max(squares - centred * centred * share, 0.0);
        along -= centred * across * share;
        let centre = sums[(group * lanes * plan.step + k) * comptime!(plan.norm.sums()) + 4];
        means[place + 2] = centre + centred * share;
        means[place + 3] = across * share;
    }
    let scale = scale_of(squares, eps, size);
    means[place] = scale;
    means[place + 1] = along * scale * scale * share;
}
