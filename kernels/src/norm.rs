//! Normalisation over `key_dim`: which kind, its device functions, and its backward pass.
//!
//! Backward, with `û = (x - mean) · scale` and `g = grad · weight`: `grad_x = (g - û · mean(g · û) - mean(g)) · scale`, the last mean for
//! LayerNorm only, and `grad_weight = Σ grad · û` over all vectors. A cube takes a tile of vectors: its lanes sum what each vector's
//! moments and means take, then units add up the tile's part of the weight's gradient, then `grad` becomes `grad_x` in place. Moves
//! the vectors and their gradients in once (and twice more from cache) and out once.

use cubecl::prelude::*;

use crate::Result;
use crate::device::Device;
use crate::interleave::{interleaved, load, strand};
use crate::product::{component_sum, zero_sums};
use crate::select::{lane_of, lane_sum, row_lanes};
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
}

/// Groups that one cube goes back through, of vectors of `size` numbers.
pub fn norm_tile<R: Runtime>(client: &ComputeClient<R>, size: usize) -> usize {
    let device = Device::of(client);
    device.units(usize::MAX) / row_lanes(&device, size / device.width(4, &[size]))
}

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
    let (tile, units) = (norm_tile(client, size), device.units(usize::MAX));
    let plan = NormPlan {
        norm: normed.norm,
        pieces: size / width,
        step: normed.step,
        listed: normed.listed.is_some(),
        tile,
        units,
    };
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
    let first = CUBE_POS * plan.tile;
    let last = min(first + plan.tile, last);
    let means = means::<E, N>(numbers, weight, listed, grad, first, last, eps, plan);
    sync_cube();
    for piece in range_stepped(UNIT_POS as usize, plan.pieces, plan.units) {
        let mut sum = Vector::<f32, N>::new(0.0);
        for group in first..last {
            let x = load::<E, N>(numbers, (source(listed, group, plan) * plan.pieces + piece) * plan.step, plan.step);
            let given = load::<f32, N>(grad, (group * plan.pieces + piece) * plan.step, plan.step);
            #[unroll]
            for k in 0..plan.step {
                let of = read_means(&means, (group - first) * plan.step + k, plan.norm);
                let centred = strand::<N>(&x, k, plan.step) - Vector::new(of.mean);
                sum += strand::<N>(&given, k, plan.step) * centred * Vector::new(of.scale);
            }
        }
        parts[CUBE_POS * plan.pieces + piece] = sum;
    }
    // Every unit has read the gradients of the tile before any is written.
    sync_storage();
    for item in range_stepped(UNIT_POS as usize, comptime!(plan.tile * plan.pieces), plan.units) {
        let (group, piece) = (first + item / plan.pieces, item % plan.pieces);
        if group < last {
            let x = load::<E, N>(numbers, (source(listed, group, plan) * plan.pieces + piece) * plan.step, plan.step);
            let at = (group * plan.pieces + piece) * plan.step;
            let given = load::<f32, N>(grad, at, plan.step);
            let mut inner = zero_sums::<N>(plan.step);
            #[unroll]
            for k in 0..plan.step {
                let of = read_means(&means, (group - first) * plan.step + k, plan.norm);
                let centred = strand::<N>(&x, k, plan.step) - Vector::new(of.mean);
                let weighted = strand::<N>(&given, k, plan.step) * weight[piece];
                inner[k] = (weighted - centred * Vector::new(of.along) - Vector::new(of.across)) * Vector::new(of.scale);
            }
            #[unroll]
            for v in 0..plan.step {
                grad[at + v] = interleaved::<N>(&inner, 0usize, v, plan.step);
            }
        }
    }
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

/// The means of the groups `first..last`, [`MEANS`] numbers a vector, each group summed by its lanes.
#[cube]
fn means<E: Float, N: Size>(
    numbers: &Array<Vector<E, N>>,
    weight: &Array<Vector<f32, N>>,
    listed: &Array<u32>,
    grad: &Array<Vector<f32, N>>,
    first: usize,
    last: usize,
    eps: f32,
    #[comptime] plan: NormPlan,
) -> SharedMemory<f32> {
    let mut means = SharedMemory::<f32>::new(comptime!(plan.tile * plan.step * MEANS));
    let width = N::value();
    let size = comptime!(plan.pieces * width);
    let count = comptime!(size as f32);
    let at = lane_of(plan.tile, plan.units);
    let mut partial = SharedMemory::<f32>::new(comptime!(if at.lanes > 1 { plan.units } else { 1 }));
    let group = first + at.row;
    let mut centres = zero_sums::<N>(plan.step);
    let mut sums = zero_sums::<N>(plan.step);
    let mut squares = zero_sums::<N>(plan.step);
    let mut along = zero_sums::<N>(plan.step);
    let mut across = zero_sums::<N>(plan.step);
    if group < last {
        let numbers_of = source(listed, group, plan) * plan.pieces;
        if comptime!(plan.norm == Norm::Layer) {
            // About the first number, which lies near the mean.
            let x = load::<E, N>(numbers, numbers_of * plan.step, plan.step);
            #[unroll]
            for k in 0..plan.step {
                centres[k] = Vector::new(strand::<N>(&x, k, plan.step)[0]);
            }
        }
        for piece in range_stepped(at.lane, plan.pieces, at.lanes) {
            let x = load::<E, N>(numbers, (numbers_of + piece) * plan.step, plan.step);
            let given = load::<f32, N>(grad, (group * plan.pieces + piece) * plan.step, plan.step);
            #[unroll]
            for k in 0..plan.step {
                let weighted = strand::<N>(&given, k, plan.step) * weight[piece];
                let centred = strand::<N>(&x, k, plan.step) - centres[k];
                squares[k] += centred * centred;
                along[k] += weighted * centred;
                if comptime!(plan.norm == Norm::Layer) {
                    sums[k] += centred;
                    across[k] += weighted;
                }
            }
        }
    }
    #[unroll]
    for k in 0..plan.step {
        let mut squares = lane_sum(component_sum::<N>(squares[k]), &mut partial, at);
        let mut along = lane_sum(component_sum::<N>(along[k]), &mut partial, at);
        let place = (at.row * plan.step + k) * MEANS;
        if comptime!(plan.norm == Norm::Layer) {
            let sum = lane_sum(component_sum::<N>(sums[k]), &mut partial, at);
            let across = lane_sum(component_sum::<N>(across[k]), &mut partial, at);
            let mean = sum / count;
            // No less than zero by rounding; a NaN, which this would swallow, is in the mean.
            squares = max(squares - mean * sum, 0.0);
            along -= mean * across;
            means[place + 2] = centres[k][0] + mean;
            means[place + 3] = across / count;
        }
        let scale = scale_of(squares, eps, size);
        means[place] = scale;
        means[place + 1] = along * scale * scale / count;
    }
    means
}
