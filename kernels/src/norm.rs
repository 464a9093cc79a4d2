//! Normalisation over `key_dim`: which kind, its device functions, and its backward pass.
//!
//! Backward, with `û = (x - mean) · scale` and `g = grad · weight`: `grad_x = (g - û · mean(g · û) - mean(g)) · scale`, the last mean for
//! LayerNorm only, and `grad_weight = Σ grad · û` over all vectors. A cube takes a tile of vectors: its lanes sum what each vector's
//! moments and means take, then `grad` becomes `grad_x` in place, piece by piece, and each piece's part of the weight's gradient is
//! added up over the tile. Moves the vectors and their gradients in once (and once more from cache) and the gradients out once.

use cubecl::prelude::*;

use crate::Result;
use crate::device::Device;
use crate::interleave::{interleaved, load, strand};
use crate::product::{component_sum, zero_sums};
use crate::select::{lane_of, row_lanes};
use crate::sums::column_sum;
use crate::tensor::{Tensor, arg, empty, f32_storage};

/// How a vector is normalised before it is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Norm {
    /// RMSNorm: `x / sqrt(mean(x²) + eps) · weight`.
    Rms,
    /// LayerNorm without bias: `(x - mean(x)) / sqrt(var(x) + eps) · weight`.
    Layer,
}

/// What a vector's normalisation takes from the vector itself: `(x - mean) · scale · weight`.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Moments {
    pub mean: f32,
    pub scale: f32,
}

/// The scale of a vector of `size` numbers from their squares about the mean.
#[cube]
pub(crate) fn scale_of(squares: f32, eps: f32, #[comptime] size: usize) -> f32 {
    1.0 / f32::sqrt(squares / comptime!(size as f32) + eps)
}

/// The moments of `size` numbers at `first`, `first + step`, ….
#[cube]
pub(crate) fn moments<E: Float>(
    numbers: &Array<E>,
    first: usize,
    eps: f32,
    #[comptime] size: usize,
    #[comptime] step: usize,
    #[comptime] norm: Norm,
) -> Moments {
    let mut mean = 0.0f32;
    if comptime!(norm == Norm::Layer) {
        for k in 0..size {
            mean += f32::cast_from(numbers[first + k * step]);
        }
        mean /= comptime!(size as f32);
    }
    let mut squares = 0.0f32;
    for k in 0..size {
        let centred = f32::cast_from(numbers[first + k * step]) - mean;
        squares += centred * centred;
    }
    Moments { mean, scale: scale_of(squares, eps, size) }
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
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct NormPlan {
    norm: Norm,
    /// Vectors of numbers of a norm's vector.
    pieces: usize,
    step: usize,
    listed: bool,
    /// Groups of a cube.
    tile: usize,
    units: usize,
    /// Units side by side on the pieces of a group, a power of two.
    lanes: usize,
}

impl NormPlan {
    /// Shares of a tile's groups that units go through at once.
    fn slices(&self) -> usize {
        self.units / self.lanes
    }
}

/// Groups that one cube goes back through, of `step` vectors of `size` numbers each.
pub fn norm_tile<R: Runtime>(client: &ComputeClient<R>, size: usize, step: usize) -> usize {
    let device = Device::of(client);
    units(&device, step) / lanes(&device, size)
}

/// Units of a cube, each of which keeps sums of `step` vectors in shared memory.
fn units(device: &Device, step: usize) -> usize {
    device.units((MAX_SUMS / step).max(1))
}

/// Lanes that sum one group of vectors of `size` numbers.
fn lanes(device: &Device, size: usize) -> usize {
    row_lanes(device, size / device.width(4, &[size]))
}

/// Vectors that the units of a cube sum at a time.
const MAX_SUMS: usize = 512;

/// Turns `grad`, f32 `[groups, size, step]`, from the gradient of the normalised vectors into that of the vectors, and returns the
/// weight's, f32 `[size]`.
pub(crate) fn norm_backward<R: Runtime>(
    client: &ComputeClient<R>,
    normed: &Normed<'_, R>,
    grad: &Tensor<R>,
    groups: usize,
) -> Result<Tensor<R>> {
    let device = Device::of(client);
    let size = normed.weight.shape()[0];
    let width = device.width(4, &[size]);
    let units = units(&device, normed.step);
    let tile = (units / lanes(&device, size)).max(1);
    let plan = NormPlan {
        norm: normed.norm,
        pieces: size / width,
        step: normed.step,
        listed: normed.listed.is_some(),
        tile,
        units,
        lanes: (size / width).next_power_of_two().min(units),
    };
    let numbers = units * normed.step * SUMS + tile * normed.step * MEANS + units * width;
    device.fits_shared("norm backward", 4 * numbers)?;
    let cubes = groups.div_ceil(tile);
    let parts = empty(client, "parts of the norm's gradient", &[cubes, size], f32_storage())?;
    // A buffer that is written must not be bound twice.
    let (listed, used) = normed.listed.unwrap_or((normed.numbers, normed.numbers));
    // SAFETY: the caller has checked the shapes, and that listed groups are among all; a unit reads and writes groups of its cube.
    unsafe {
        norm_backward_kernel::launch_unchecked::<R>(
            client,
            device.grid(cubes)?,
            CubeDim::new_1d(units as u32),
            width,
            arg(normed.numbers, width),
            arg(normed.weight, width),
            arg(listed, 1),
            arg(used, 1),
            arg(grad, width),
            arg(&parts, width),
            normed.eps,
            groups as u32,
            plan,
            normed.numbers.dtype,
        );
    }
    column_sum(client, &parts)
}

#[cube(launch_unchecked)]
fn norm_backward_kernel<E: Float, N: Size>(
    numbers: &Array<Vector<E, N>>,
    weight: &Array<Vector<f32, N>>,
    listed: &Array<u32>,
    used: &Array<u32>,
    grad: &mut Array<Vector<f32, N>>,
    parts: &mut Array<Vector<f32, N>>,
    eps: f32,
    groups: u32,
    #[comptime] plan: NormPlan,
    #[define(E)] _dtype: StorageType,
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
    let mut means = SharedMemory::<f32>::new(comptime!(plan.tile * plan.step * MEANS));
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
                sum += through::<E, N>(numbers, weight, listed, grad, &means, first, group, piece, plan);
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
            parts[CUBE_POS * plan.pieces + piece] = sum;
        }
    }
}

/// Brings one piece of a group's gradients through the norm, in place, and returns its part of the weight's gradient.
#[cube]
fn through<E: Float, N: Size>(
    numbers: &Array<Vector<E, N>>,
    weight: &Array<Vector<f32, N>>,
    listed: &Array<u32>,
    grad: &mut Array<Vector<f32, N>>,
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

/// Numbers of [`Means`].
const MEANS: usize = 4;

#[cube]
fn read_means(means: &SharedMemory<f32>, vector: usize, #[comptime] norm: Norm) -> Means {
    let first = vector * MEANS;
    let mut of = Means { mean: 0.0f32, scale: means[first], along: means[first + 1], across: 0.0f32 };
    if comptime!(norm == Norm::Layer) {
        of.mean = means[first + 2];
        of.across = means[first + 3];
    }
    of
}

/// Numbers that a lane sums of a vector: `Σ (x - centre)²` and `Σ g · (x - centre)`, and for LayerNorm `Σ (x - centre)`, `Σ g` and the centre, the
/// first number of the vector, which lies near its mean.
const SUMS: usize = 5;

/// What each lane sums of its group's vectors, `[units, step, SUMS]`.
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
    let mut shared = SharedMemory::<f32>::new(comptime!(plan.units * plan.step * SUMS));
    let at = lane_of(plan.tile, plan.units);
    let group = first + at.row;
    let mut sums = Array::<f32>::new(comptime!(plan.step * SUMS));
    #[unroll]
    for i in 0..comptime!(plan.step * SUMS) {
        sums[i] = 0.0;
    }
    if group < last {
        let pieces = source(listed, group, plan) * plan.pieces;
        if comptime!(plan.norm == Norm::Layer) {
            let x = load::<E, N>(numbers, pieces * plan.step, plan.step);
            #[unroll]
            for k in 0..plan.step {
                sums[k * SUMS + 4] = strand::<N>(&x, k, plan.step)[0];
            }
        }
        for piece in range_stepped(at.lane, plan.pieces, at.lanes) {
            let x = load::<E, N>(numbers, (pieces + piece) * plan.step, plan.step);
            let given = load::<f32, N>(grad, (group * plan.pieces + piece) * plan.step, plan.step);
            #[unroll]
            for k in 0..plan.step {
                let weighted = strand::<N>(&given, k, plan.step) * weight[piece];
                let centred = strand::<N>(&x, k, plan.step) - Vector::new(sums[k * SUMS + 4]);
                sums[k * SUMS] += component_sum::<N>(centred * centred);
                sums[k * SUMS + 1] += component_sum::<N>(weighted * centred);
                if comptime!(plan.norm == Norm::Layer) {
                    sums[k * SUMS + 2] += component_sum::<N>(centred);
                    sums[k * SUMS + 3] += component_sum::<N>(weighted);
                }
            }
        }
    }
    #[unroll]
    for i in 0..comptime!(plan.step * SUMS) {
        shared[UNIT_POS as usize * comptime!(plan.step * SUMS) + i] = sums[i];
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
    let mut squares = 0.0f32;
    let mut along = 0.0f32;
    let mut centred = 0.0f32;
    let mut across = 0.0f32;
    for lane in 0..lanes {
        let of = ((group * lanes + lane) * plan.step + k) * SUMS;
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
        means[vector * MEANS + 2] = sums[(group * lanes * plan.step + k) * SUMS + 4] + centred * share;
        means[vector * MEANS + 3] = across * share;
    }
    let scale = scale_of(squares, eps, size);
    means[vector * MEANS] = scale;
    means[vector * MEANS + 1] = along * scale * scale * share;
}
