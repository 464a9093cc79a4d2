//! Backward of score: from the score vectors of the chosen slots' keys to the query before its norm, and to the keys.
//!
//! - `grad_q̂[t, side] = Σ_{h, m, ρ} grad_sides[t, h, m, side, ρ] · K̂[h, side, key, ρ]`, through the query's norm to the query;
//! - `grad_K̂[h, side, i, ρ] = Σ grad_sides[t, h, m, side, ρ] · q̂[t, side]` over the slots with that key, grouped by key and summed in the
//!   order of the slots ([`RowGradients`]), through the keys' norm to the keys;
//! - each norm's backward in place of the gradient that comes to it, and its weight's from the parts that every query, or key, has in it. The
//!   queries' leaves them normalised, `q̂`, for the keys' sums.
//!
//! Which keys are kept is a constant, so no score but those of chosen slots is looked at: no `[tokens, side_keys]` anywhere. Reads
//! `2 · heads · top_m · rank` normalised keys per token and as many queries, mostly from cache, and writes a gradient for each used key.

use cubecl::prelude::*;

use super::backward_plan::{FEW_RANKS, ScoreBackwardPlan, ScoreBackwardPlans};
use super::{Normalisation, PreparedKeys, Queries, ScoreSizes};
use crate::launch::device::Device;
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, float_type, index, positive, u32_storage, zeros};
use crate::linear::column_sum::{column_sum, column_sums};
use crate::linear::tile::zero_sums;
use crate::stages::norm::{NormGradients, Normed, norm_backward};
use crate::table::group::{Listed, One, SortPlan, count_digits, first_of, group, step_of};
use crate::table::row_gradients::RowGradients;
use crate::table::segment_sum::{Terms, sum_rows};
use crate::{Error, Result};

/// What the stage's forward pass was given, and the slots that came of it.
pub struct Scored<'a, R: Runtime> {
    /// The queries, before their norm.
    pub queries: Queries<'a, R>,
    /// The keys `[heads, 2, side_keys, key_dim, rank]`, before their norm.
    pub keys: &'a Tensor<R>,
    /// How keys are normalised; None takes them as they are.
    pub keys_norm: Option<Normalisation<'a, R>>,
    /// The keys as scoring reads them.
    pub prepared: &'a PreparedKeys<R>,
    /// u32 `[tokens, heads, top_m]`.
    pub slots: &'a Tensor<R>,
}

/// Gradients of the stage.
pub struct ScoreGradients<R: Runtime> {
    /// f32 `[tokens, query_pairs · 2 · key_dim]`: of the query before its norm.
    pub query: Tensor<R>,
    /// f32 `[key_dim]`; None where the queries are taken as they are.
    pub query_norm: Option<Tensor<R>>,
    /// Of the keys as a table `[heads · 2 · side_keys, key_dim · rank]`.
    pub keys: RowGradients<R>,
    /// f32 `[key_dim]`; None where the keys are taken as they are.
    pub keys_norm: Option<Tensor<R>>,
}

/// Launches the backward pass of [`score`](super::score).
///
/// - `grad_sides` f32 `[tokens, heads, top_m, 2, rank]`, as [`combine_backward`](crate::stages::combine::combine_backward) gives it; no tokens give
///   zeros, and no used key
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn score_backward<R: Runtime>(
    client: &ComputeClient<R>,
    scored: &Scored<'_, R>,
    grad_sides: &Tensor<R>,
) -> Result<ScoreGradients<R>> {
    let stage = ScoreBackwardCall::check(client, scored, grad_sides)?;
    if stage.tokens == 0 {
        return stage.nothing();
    }
    let query = stage.grad_queries(grad_sides)?;
    let (queries, of_queries) = match stage.through_query_norm(&query)? {
        Some(NormGradients { parts, normalised: Some(queries) }) => (queries, Some(parts)),
        _ => (stage.round()?, None),
    };
    let keys = stage.grad_keys(&queries, grad_sides)?;
    drop(queries);
    let of_keys = scored.keys_norm.map(|norm| stage.through_keys_norm(&keys, norm)).transpose()?;
    let sum = |parts: Option<Tensor<R>>| parts.map(|parts| column_sum(client, &parts)).transpose();
    let (query_norm, keys_norm) = match (of_queries, of_keys.map(|norm| norm.parts)) {
        (Some(queries), Some(keys)) => column_sums(client, [&queries, &keys])?.map(Some).into(),
        (queries, keys) => (sum(queries)?, sum(keys)?),
    };
    Ok(ScoreGradients { query, query_norm, keys, keys_norm })
}

/// The checked arguments.
struct ScoreBackwardCall<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    device: Device,
    scored: &'a Scored<'a, R>,
    tokens: usize,
    plan: ScoreBackwardPlan,
    plans: ScoreBackwardPlans,
}

impl<'a, R: Runtime> ScoreBackwardCall<'a, R> {
    fn check(client: &'a ComputeClient<R>, scored: &'a Scored<'a, R>, grad_sides: &Tensor<R>) -> Result<Self> {
        let [tokens, heads, top_m, 2, rank] = *grad_sides.shape().as_slice() else {
            let (found, expected) = (grad_sides.shape().to_vec(), "[tokens, heads, top_m, 2, rank]");
            return Err(Error::Dimensions { tensor: "gradient of the side scores", found, expected });
        };
        let [_, _, side_keys, key_dim, _] = *scored.keys.shape().as_slice() else {
            let (found, expected) = (scored.keys.shape().to_vec(), "[heads, 2, side_keys, key_dim, rank]");
            return Err(Error::Dimensions { tensor: "keys", found, expected });
        };
        positive(&[
            ("heads", heads),
            ("top_m", top_m),
            ("rank", rank),
            ("side_keys", side_keys),
            ("key_dim", key_dim),
        ])?;
        index("keys of all heads and sides", heads.saturating_mul(2).saturating_mul(side_keys))?;
        let dtype = float_type(client, scored.keys, "keys")?;
        check(client, grad_sides, "gradient of the side scores", &[tokens, heads, top_m, 2, rank], f32_storage())?;
        let (_, query_pairs) = scored.queries.check(client, heads, key_dim)?;
        check(client, scored.queries.numbers, "query", &[tokens, query_pairs * 2 * key_dim], f32_storage())?;
        check(client, scored.keys, "keys", &[heads, 2, side_keys, key_dim, rank], scored.keys.dtype)?;
        let normalised = [heads, 2, side_keys, rank, key_dim];
        check(client, &scored.prepared.normalised, "normalised keys", &normalised, scored.keys.dtype)?;
        if let Some((_, _, weight)) = scored.keys_norm {
            check(client, weight, "keys_norm", &[key_dim], f32_storage())?;
        }
        check(client, scored.slots, "slots", &[tokens, heads, top_m], u32_storage())?;
        let device = Device::of(client);
        let sizes = ScoreSizes {
            tokens,
            heads,
            query_pairs,
            heads_per_pair: scored.queries.heads_per_pair,
            side_keys,
            key_dim,
            rank,
            top_m,
            norm: scored.queries.norm.map(|(norm, ..)| norm),
            direct: false,
            dtype,
        };
        let plans = ScoreBackwardPlans::of(&device, &sizes, scored.keys_norm.map(|(norm, ..)| norm))?;
        Ok(Self { client, device, scored, tokens, plan: plans.plan, plans })
    }

    /// The gradients for no tokens: zeros, and no used key.
    fn nothing(&self) -> Result<ScoreGradients<R>> {
        let ScoreBackwardPlan { heads, side_keys, key_dim, rank, .. } = self.plan;
        let zeros = || zeros(self.client, "gradient of a norm", &[key_dim]);
        Ok(ScoreGradients {
            query: empty(self.client, "gradient of the query", self.scored.queries.numbers.shape(), f32_storage())?,
            query_norm: self.scored.queries.norm.map(|_| zeros()).transpose()?,
            keys: RowGradients::none(self.client, heads * 2 * side_keys, key_dim * rank)?,
            keys_norm: self.scored.keys_norm.map(|_| zeros()).transpose()?,
        })
    }

    /// Queries of all tokens: `tokens · query_pairs · 2`.
    fn queries(&self) -> usize {
        self.tokens * self.plan.query_pairs * 2
    }

    /// Queries that no norm normalises, rounded to the keys' type, as scoring has them.
    fn round(&self) -> Result<Tensor<R>> {
        let numbers = self.scored.queries.numbers;
        let Some(launch) = self.plans.round else { return Ok(numbers.clone()) };
        let width = self.device.width(4, &[self.plan.key_dim]);
        let queries = empty(self.client, "rounded queries", numbers.shape(), f32_storage())?;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: both have one shape, and a unit reads and writes its own vector.
        unsafe {
            round_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                width,
                arg(numbers, width),
                arg(&queries, width),
                (self.queries() * self.plan.key_dim / width) as u32,
                launch.units,
                self.scored.keys.dtype,
            );
        }
        Ok(queries)
    }

    /// The gradient of the normalised queries.
    fn grad_queries(&self, grad_sides: &Tensor<R>) -> Result<Tensor<R>> {
        let key_dim = self.plan.key_dim;
        let (width, narrow) =
            (self.device.width(self.scored.keys.dtype.size(), &[key_dim]), self.device.width(4, &[key_dim]));
        let grad = empty(self.client, "gradient of the queries", self.scored.queries.numbers.shape(), f32_storage())?;
        let launch = self.plans.queries;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: shapes are checked; the kernel clamps keys to the side's.
        unsafe {
            grad_queries_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                width,
                narrow,
                arg(self.scored.slots, 1),
                arg(grad_sides, 1),
                arg(&self.scored.prepared.normalised, width),
                arg(&grad, narrow),
                self.queries() as u32,
                self.plans.compiled(launch),
                self.scored.keys.dtype,
            );
        }
        Ok(grad)
    }

    /// Turns the normalised queries' gradient into the queries', and leaves what the keys' sums and the norm's weight take of them.
    fn through_query_norm(&self, grad: &Tensor<R>) -> Result<Option<NormGradients<R>>> {
        let Queries { numbers, norm, .. } = self.scored.queries;
        let through = |(norm, eps, weight)| {
            let rounded = Some(self.scored.keys.dtype);
            let normed = Normed { numbers, weight, norm, eps, step: 1, listed: None, rounded };
            norm_backward(self.client, &normed, grad, self.queries())
        };
        norm.map(through).transpose()
    }

    /// The gradient of the normalised keys, `[heads · 2 · side_keys, key_dim · rank]`.
    fn grad_keys(&self, queries: &Tensor<R>, grad_sides: &Tensor<R>) -> Result<RowGradients<R>> {
        let entries = self.tokens * self.plan.heads * self.plan.top_m * 2;
        let rows = self.plan.heads * 2 * self.plan.side_keys;
        let keys = Listed::empty(self.client, entries, rows)?;
        let source = empty(self.client, "queries of the slots", &[entries], u32_storage())?;
        let launch = self.plans.list;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: shapes are checked; a unit writes its own entries, and a cube its own counts.
        unsafe {
            list_keys_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                arg(self.scored.slots, 1),
                arg(&keys.keys, 1),
                arg(&source, 1),
                arg(&keys.counts, 1),
                entries as u32,
                keys.plans.chunk as u32,
                launch.cubes as u32,
                self.plans.compiled(launch),
                keys.plans.plan,
            );
        }
        let groups = group(self.client, &keys)?;
        let (count, slice) = (self.plan.rank, self.plan.key_dim);
        let entries =
            Terms { source: &source, per: 1, factors: grad_sides, sources: queries, count, slice, shared: true };
        sum_rows(self.client, &groups, &entries, rows)
    }

    /// Turns the normalised keys' gradient into the keys'. Listed keys are below `heads · 2 · side_keys`, as
    /// `list_keys_kernel` has clamped them.
    fn through_keys_norm(&self, grad: &RowGradients<R>, norm: Normalisation<'_, R>) -> Result<NormGradients<R>> {
        let ((groups, _), (norm, eps, weight)) = (grad.check(self.client)?, norm);
        let numbers = self.scored.keys;
        let listed = Some((&grad.rows, &grad.count));
        let normed = Normed { numbers, weight, norm, eps, step: self.plan.rank, listed, rounded: None };
        norm_backward(self.client, &normed, &grad.gradients, groups)
    }
}

/// The key of a slot on one side, below `side_keys` whatever the slot is.
#[cube]
fn key_of(slot: u32, side: usize, #[comptime] plan: ScoreBackwardPlan) -> usize {
    let side_keys = comptime!(plan.side_keys as u32);
    let mut key = slot % side_keys;
    if side == 0 {
        key = min(slot / side_keys, side_keys - 1);
    }
    key as usize
}

/// The query that a head's side is scored with, of all queries of its token.
#[cube]
fn query_of(head: usize, side: usize, #[comptime] plan: ScoreBackwardPlan) -> usize {
    head / plan.heads_per_pair * 2 + side
}

#[cube(launch_unchecked)]
fn round_kernel<E: Float, N: Size>(
    query: &Array<Vector<f32, N>>,
    queries: &mut Array<Vector<f32, N>>,
    count: u32,
    #[comptime] units: usize,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    if item < count as usize {
        queries[item] = Vector::cast_from(Vector::<E, N>::cast_from(query[item]));
    }
}

/// A unit sums `block` vectors of one query's gradient, over the slots of the heads that it serves, and loads the keys of several at once.
#[cube(launch_unchecked)]
fn grad_queries_kernel<E: Float, D: Size, N: Size>(
    slots: &Array<u32>,
    grad_sides: &Array<f32>,
    normalised: &Array<Vector<E, D>>,
    grad: &mut Array<Vector<f32, N>>,
    count: u32,
    #[comptime] plan: ScoreBackwardPlan,
    #[define(E)] _dtype: StorageType,
) {
    let width = D::value();
    let depth = comptime!(plan.key_dim / width);
    let pieces = comptime!(depth / plan.block);
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let query = item / pieces;
    if query >= count as usize {
        terminate!();
    }
    let first = item % pieces * plan.block;
    let side = query % 2;
    let token = query / comptime!(plan.query_pairs * 2);
    let first_head = query / 2 % plan.query_pairs * plan.heads_per_pair;
    let mut sums = zero_sums::<D>(plan.block);
    for head in first_head..min(first_head + plan.heads_per_pair, plan.heads) {
        let row = token * plan.heads + head;
        for m in range_stepped(0usize, plan.top_m, plan.flight) {
            let mut keys = Array::<u32>::new(plan.flight);
            #[unroll]
            for n in 0..plan.flight {
                let slot = slots[row * plan.top_m + min(m + n, plan.top_m - 1)];
                keys[n] = ((head * 2 + side) * plan.side_keys + key_of(slot, side, plan)) as u32;
            }
            #[unroll(plan.rank <= FEW_RANKS)]
            for rho in 0..plan.rank {
                let mut factors = Array::<f32>::new(plan.flight);
                let mut lines = Array::<Vector<E, D>>::new(comptime!(plan.flight * plan.block));
                #[unroll]
                for n in 0..plan.flight {
                    let entry = row * plan.top_m + min(m + n, plan.top_m - 1);
                    factors[n] = grad_sides[(entry * 2 + side) * plan.rank + rho];
                    let base = (keys[n] as usize * plan.rank + rho) * depth + first;
                    #[unroll]
                    for b in 0..plan.block {
                        lines[n * plan.block + b] = normalised[base + b];
                    }
                }
                #[unroll]
                for n in 0..plan.flight {
                    if m + n < plan.top_m {
                        #[unroll]
                        for b in 0..plan.block {
                            sums[b] += Vector::new(factors[n]) * Vector::cast_from(lines[n * plan.block + b]);
                        }
                    }
                }
            }
        }
    }
    let narrow = N::value();
    #[unroll]
    for v in 0..comptime!(plan.block * width / narrow) {
        let mut part = Vector::<f32, N>::new(0.0);
        #[unroll]
        for n in 0..narrow {
            part[n] = sums[comptime!((v * narrow + n) / width)][comptime!((v * narrow + n) % width)];
        }
        grad[(query * depth + first) * comptime!(width / narrow) + v] = part;
    }
}

/// `keys[t, h, m, side]`: the slot's key among those of all heads and sides; `source`: its query among those of all tokens.
#[cube(launch_unchecked)]
fn list_keys_kernel(
    slots: &Array<u32>,
    keys: &mut Array<Vector<u32, One>>,
    source: &mut Array<u32>,
    counts: &mut Array<u32>,
    entries: u32,
    chunk: u32,
    cubes: u32,
    #[comptime] plan: ScoreBackwardPlan,
    #[comptime] sort: SortPlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let first = first_of(chunk, sort);
    for at in 0..chunk {
        let item = (first + at * comptime!(step_of(sort))) as usize;
        if item < entries as usize {
            let side = item % 2;
            let head = item / comptime!(2 * plan.top_m) % plan.heads;
            let token = item / comptime!(2 * plan.top_m * plan.heads);
            let key = (head * 2 + side) * plan.side_keys + key_of(slots[item / 2], side, plan);
            keys[item] = Vector::new(key as u32);
            source[item] = (token * comptime!(plan.query_pairs * 2) + query_of(head, side, plan)) as u32;
        }
    }
    // A unit counts what it has written itself.
    count_digits::<One>(keys, counts, entries, chunk, 0u32, sort);
}
