//! Sums of entries by rows: the gradients of a table of which only some rows were used.
//!
//! `gradients[u, k, c] = Σ factors[e, k] · sources[source[e], k, c]` over the entries e of row u, in their own order, or, where all factors
//! share a source, `gradients[u, c, k] = Σ factors[e, k] · sources[source[e], c]`, in a fixed order, so that every run gives the same bits. Reads each
//! entry's source once, writes each used row once, and never touches the table.
//!
//! Sorted entries are cut into blocks of one length, whatever rows they belong to, so that no unit has more to add up than another. A unit sums a
//! few vectors of one block, and writes each row that begins and ends in it. Of a row that goes on in other blocks each has a part; a second
//! launch, which lists the rows, adds them up. Several entries' sources are loaded at once, and sums are taken of [`CHUNK`] terms at a time
//! and then of those sums, so that rounding doesn't grow with their number.

use cubecl::prelude::*;

use crate::Result;
use crate::launch::device::Device;
use crate::launch::lesser::lesser;
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg, empty, f32_storage, u32_storage};
use crate::linear::interleave::interleaved;
use crate::linear::tile::zero_sums;
use crate::table::group::{Groups, HeadPlans, Runs, SortPlans, Two, heads_before, is_head};
use crate::table::row_gradients::RowGradients;

/// What belongs to the entries that are summed.
pub(crate) struct Terms<'a, R: Runtime> {
    /// u32 `[entries]`: which row of `sources` each entry reads, of each `per` of which `sources` has one.
    pub source: &'a Tensor<R>,
    pub per: usize,
    /// f32 `[entries, factors]`.
    pub factors: &'a Tensor<R>,
    /// f32, rows of `factors · slice` numbers, or of `slice` where `shared`.
    pub sources: &'a Tensor<R>,
    /// Factors of an entry.
    pub count: usize,
    /// Numbers that one factor goes with.
    pub slice: usize,
    /// Whether every factor goes with the same numbers; a row has the factors' sums interleaved then.
    pub shared: bool,
}

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct SumPlan {
    factors: usize,
    /// Vectors that one factor goes with.
    slice: usize,
    /// Factors of a unit: one, or, where they share a source, all.
    strands: usize,
    /// Vectors of a source that a unit reads; divides `slice`.
    run: usize,
    /// Rows that are numbered in `source` for each row of `sources`.
    per: usize,
    /// Entries whose sources are loaded at once.
    flight: usize,
    /// Units of a plane that add up counts together; 0 where each unit does by itself.
    plane: usize,
    units: usize,
}

/// The sizes of sums of entries by rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SumSizes {
    /// Factors of an entry.
    pub factors: usize,
    /// Numbers that one factor goes with.
    pub slice: usize,
    /// Whether every factor goes with the same numbers.
    pub shared: bool,
}

/// The launches that sum entries by rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SumPlans {
    plan: SumPlan,
    /// Numbers of a vector.
    vector: usize,
    /// Sums each block's entries.
    pub blocks: Launch,
    /// Cubes of `rows` that list rows, spread among those that add up parts.
    listing: usize,
    /// Lists the rows, and adds up the parts of those that lie in several blocks.
    pub rows: Launch,
}

impl SumPlans {
    /// Plans sums of entries as `sort` has grouped them; no factors count as one. Each launch is checked when it is made.
    pub fn of(device: &Device, sort: &SortPlans, sizes: &SumSizes) -> Self {
        let SumSizes { slice, shared, .. } = *sizes;
        let factors = sizes.factors.max(1);
        let vector = device.width(4, &[slice]);
        let (slice, strands) = (slice / vector, if shared { factors } else { 1 });
        let run = if strands > FEW_STRANDS { 1 } else { device.run(slice) };
        let flight = if device.on_cpu || strands > FEW_STRANDS { 1 } else { 4 };
        let plan = SumPlan { factors, slice, strands, run, per: 1, flight, plane: device.exchange, units: 0 };
        let (heads, blocks) = (sort.heads, sort.heads.blocks());
        let loops = heads.loops() + heads.block.div_ceil(CHUNK) + heads.block.div_ceil(flight);
        let sums = Launch::flat(device, "sum_blocks_kernel", blocks.saturating_mul(plan.pieces()), loops);
        // Where a row has parts in all blocks: the search for its end, and its sum.
        let loops =
            heads.loops() + heads.run.max(2 * (blocks.max(1).ilog2() as usize + 1) + blocks + blocks.div_ceil(CHUNK));
        let rows =
            Launch::flat(device, "sum_rows_kernel", blocks.saturating_sub(1).saturating_mul(plan.width()), loops);
        let (units, few) = (rows.units, heads.runs.div_ceil(rows.units));
        let rows = Launch { cubes: rows.cubes.saturating_add(few), units, ..rows };
        Self { plan, vector, blocks: sums, listing: few, rows }
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        vec![self.blocks, self.rows]
    }
}

impl SumPlan {
    /// Vectors of a source.
    fn pitch(&self) -> usize {
        (self.factors / self.strands).saturating_mul(self.slice)
    }

    /// Units that share out a row.
    fn pieces(&self) -> usize {
        self.pitch() / self.run
    }

    /// Vectors of a row's gradient.
    fn width(&self) -> usize {
        self.pitch().saturating_mul(self.strands)
    }

    /// Vectors that a unit sums.
    fn sums(&self) -> usize {
        self.run * self.strands
    }
}

/// Terms that are added up one after the other.
const CHUNK: usize = 64;

/// Factors that share a source, of which a unit still takes several vectors or entries.
const FEW_STRANDS: usize = 4;

/// Sums the entries of each group into the gradient of its row, `[capacity, factors · slice]`, of a table of `table_rows` rows.
pub(crate) fn sum_rows<R: Runtime>(
    client: &ComputeClient<R>,
    groups: &Groups<R>,
    entries: &Terms<'_, R>,
    table_rows: usize,
) -> Result<RowGradients<R>> {
    let (device, capacity) = (Device::of(client), groups.plans.capacity);
    let Terms { count: factors, slice, shared, .. } = *entries;
    let plans = SumPlans::of(&device, &groups.plans, &SumSizes { factors, slice, shared });
    let width = entries.count * entries.slice;
    let summed = RowGradients {
        rows: empty(client, "distinct keys", &[capacity], u32_storage())?,
        count: empty(client, "count", &[1], u32_storage())?,
        gradients: empty(client, "row gradients", &[capacity, width], f32_storage())?,
        table_rows,
    };
    let shape = [groups.plans.heads.blocks(), 2, width];
    let parts = empty(client, "parts of row gradients", &shape, f32_storage())?;
    sum_blocks(client, (&device, &plans), groups, entries, &summed.gradients, &parts)?;
    finish_rows(client, (&device, &plans), groups, &parts, &summed)?;
    Ok(summed)
}

/// Sums each block's entries: the gradients of rows that lie in one block, and the parts of others, f32 `[blocks, 2, width]`: a block's first row,
/// where that has begun in an earlier one, and its last, where that goes on in the next. The rest is undefined.
fn sum_blocks<R: Runtime>(
    client: &ComputeClient<R>,
    (device, plans): (&Device, &SumPlans),
    groups: &Groups<R>,
    entries: &Terms<'_, R>,
    gradients: &Tensor<R>,
    parts: &Tensor<R>,
) -> Result<()> {
    let SumPlans { plan, vector, blocks: launch, .. } = *plans;
    let plan = SumPlan { per: entries.per, units: launch.units, ..plan };
    let SortPlans { entries: count, heads: heads @ HeadPlans { block, run, .. }, .. } = groups.plans;
    let (grid, cube_dim) = launch.start(device)?;
    // SAFETY: groups are of these entries; a unit writes its own vectors of rows below `capacity`, each in one block alone, and of its block's parts.
    unsafe {
        sum_blocks_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            gradients.required_address_type().max(parts.required_address_type()),
            vector,
            arg(&groups.pairs, 2),
            arg(&groups.heads, 1),
            arg(entries.source, 1),
            arg(entries.factors, 1),
            arg(entries.sources, vector),
            arg(gradients, vector),
            arg(parts, vector),
            count as u32,
            block as u32,
            run as u32,
            heads.of_cube() as u32,
            plan,
        );
    }
    Ok(())
}

/// Lists the rows, and adds up the parts of those that lie in several blocks.
fn finish_rows<R: Runtime>(
    client: &ComputeClient<R>,
    (device, plans): (&Device, &SumPlans),
    groups: &Groups<R>,
    parts: &Tensor<R>,
    summed: &RowGradients<R>,
) -> Result<()> {
    let SumPlans { plan, vector, rows: launch, listing, .. } = *plans;
    let SortPlans { entries: count, heads: heads @ HeadPlans { block, run, .. }, .. } = groups.plans;
    let (grid, cube_dim) = launch.start(device)?;
    // SAFETY: there are at most `capacity` rows, and each is listed by the unit of the run that it begins in; its parts are those of its
    // blocks, and a unit writes its own vector of it.
    unsafe {
        sum_rows_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            summed.gradients.required_address_type().max(parts.required_address_type()),
            vector,
            arg(&groups.pairs, 2),
            arg(&groups.heads, 1),
            arg(parts, vector),
            arg(&summed.gradients, vector),
            arg(&summed.rows, 1),
            arg(&summed.count, 1),
            count as u32,
            block as u32,
            run as u32,
            heads.of_cube() as u32,
            listing as u32,
            (launch.cubes / listing) as u32,
            SumPlan { units: launch.units, ..plan },
        );
    }
    Ok(())
}

/// A unit's piece of a row: its first vector of a source, and the factor that goes with it.
#[derive(CubeType, Clone, Copy)]
struct Piece {
    first: usize,
    factor: usize,
}

/// Writes a unit's sums to row `row` of `gradients`.
#[cube]
fn write_sums<N: Size>(
    sums: &Array<Vector<f32, N>>,
    gradients: &mut Array<Vector<f32, N>>,
    row: usize,
    piece: Piece,
    #[comptime] plan: SumPlan,
) {
    #[unroll]
    for b in 0..plan.run {
        #[unroll]
        for v in 0..plan.strands {
            gradients[(row * plan.pitch() + piece.first + b) * plan.strands + v] =
                interleaved::<N>(sums, comptime!(b * plan.strands), v, plan.strands);
        }
    }
}

/// Adds `more` to `sums`, and makes it zero.
#[cube]
fn add<N: Size>(sums: &mut Array<Vector<f32, N>>, more: &mut Array<Vector<f32, N>>, #[comptime] count: usize) {
    #[unroll]
    for i in 0..count {
        sums[i] += more[i];
        more[i] = Vector::new(0.0);
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_blocks_kernel<N: Size>(
    pairs: &Array<Vector<u32, Two>>,
    heads: &Array<u32>,
    source: &Array<u32>,
    factors: &Array<f32>,
    sources: &Array<Vector<f32, N>>,
    gradients: &mut Array<Vector<f32, N>>,
    parts: &mut Array<Vector<f32, N>>,
    entries: u32,
    block: u32,
    run: u32,
    of_cube: u32,
    #[comptime] plan: SumPlan,
) {
    let runs = Runs::new(entries, run, of_cube);
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let blocks = entries.div_ceil(block) as usize;
    let own = lesser(item / comptime!(plan.pieces()), blocks - 1) as u32;
    let begin = own * block;
    // Rows are numbered as they begin.
    let mut row = heads_before(heads, begin / run, runs, plan.plane);
    if item / comptime!(plan.pieces()) >= blocks {
        terminate!();
    }
    let end = min(begin + block, entries);
    let first = item % comptime!(plan.pieces()) * plan.run;
    let piece = Piece { first, factor: first / plan.slice };
    let count = comptime!(plan.sums());
    let mut sums = zero_sums::<N>(count);
    let mut chunk = zero_sums::<N>(count);
    let mut key = pairs[begin as usize][0];
    let mut begun = !is_head(pairs, begin);
    for start in range_stepped(begin, end, CHUNK as u32) {
        let stop = min(start + CHUNK as u32, end);
        for at in range_stepped(start, stop, comptime!(plan.flight as u32)) {
            let mut keys = Array::<u32>::new(plan.flight);
            let mut numbers = Array::<u32>::new(plan.flight);
            #[unroll]
            for n in 0..plan.flight {
                let pair = pairs[min(at + n as u32, end - 1) as usize];
                keys[n] = pair[0];
                numbers[n] = pair[1];
            }
            let mut scales = Array::<f32>::new(comptime!(plan.flight * plan.strands));
            let mut lines = Array::<Vector<f32, N>>::new(comptime!(plan.flight * plan.run));
            #[unroll]
            for n in 0..plan.flight {
                let entry = numbers[n] as usize;
                let line = (source[entry] / comptime!(plan.per as u32)) as usize * plan.pitch() + piece.first;
                #[unroll]
                for k in 0..plan.strands {
                    scales[n * plan.strands + k] = factors[entry * plan.factors + piece.factor + k];
                }
                #[unroll]
                for b in 0..plan.run {
                    lines[n * plan.run + b] = sources[line + b];
                }
            }
            #[unroll]
            for n in 0..plan.flight {
                if at + (n as u32) < stop {
                    if keys[n] != key {
                        add::<N>(&mut sums, &mut chunk, count);
                        if begun {
                            write_sums::<N>(&sums, parts, own as usize * 2, piece, plan);
                        } else {
                            write_sums::<N>(&sums, gradients, row as usize, piece, plan);
                            row += 1;
                        }
                        begun = false;
                        key = keys[n];
                        #[unroll]
                        for i in 0..count {
                            sums[i] = Vector::new(0.0);
                        }
                    }
                    #[unroll]
                    for k in 0..plan.strands {
                        let scale = Vector::new(scales[n * plan.strands + k]);
                        #[unroll]
                        for b in 0..plan.run {
                            chunk[b * plan.strands + k] += scale * lines[n * plan.run + b];
                        }
                    }
                }
            }
        }
        add::<N>(&mut sums, &mut chunk, count);
    }
    let goes_on = end < entries && !is_head(pairs, min(end, entries - 1));
    if begun || goes_on {
        write_sums::<N>(&sums, parts, own as usize * 2 + usize::cast_from(!begun), piece, plan);
    } else {
        write_sums::<N>(&sums, gradients, row as usize, piece, plan);
    }
}

/// One cube of `every`, `listing` of them, lists rows, a unit those that begin in a run. The others have a unit for each vector of each block but the
/// last: it adds up the parts of the row that begins in the block and goes on in the next, if one does.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_rows_kernel<N: Size>(
    pairs: &Array<Vector<u32, Two>>,
    heads: &Array<u32>,
    parts: &Array<Vector<f32, N>>,
    gradients: &mut Array<Vector<f32, N>>,
    rows: &mut Array<u32>,
    count: &mut Array<u32>,
    entries: u32,
    block: u32,
    run: u32,
    of_cube: u32,
    listing: u32,
    every: u32,
    #[comptime] plan: SumPlan,
) {
    let runs = Runs::new(entries, run, of_cube);
    let cube = CUBE_POS as u32;
    let listed = min(cube.div_ceil(every), listing);
    if cube == listed * every && listed < listing {
        let own = listed * comptime!(plan.units as u32) + UNIT_POS;
        list_rows(pairs, heads, rows, count, own, entries, runs, plan);
    } else {
        let item = (cube - listed) as usize * plan.units + UNIT_POS as usize;
        add_parts::<N>(pairs, heads, parts, gradients, item, entries, block, runs, plan);
    }
}

#[cube]
fn list_rows(
    pairs: &Array<Vector<u32, Two>>,
    heads: &Array<u32>,
    rows: &mut Array<u32>,
    count: &mut Array<u32>,
    own: u32,
    entries: u32,
    runs: Runs,
    #[comptime] plan: SumPlan,
) {
    let mut row = heads_before(heads, min(own, runs.runs - 1), runs, plan.plane);
    if own < runs.runs {
        let first = own * runs.run;
        let last = min(first + runs.run, entries);
        let mut before = pairs[max(first, 1) as usize - 1][0];
        for start in range_stepped(first, last, comptime!(plan.flight as u32)) {
            let mut keys = Array::<u32>::new(plan.flight);
            #[unroll]
            for n in 0..plan.flight {
                keys[n] = pairs[min(start + n as u32, last - 1) as usize][0];
            }
            #[unroll]
            for n in 0..plan.flight {
                let i = start + n as u32;
                // Behind the last, the last again.
                if i == 0 || keys[n] != before {
                    rows[row as usize] = keys[n];
                    row += 1;
                }
                before = keys[n];
            }
        }
        if own + 1 == runs.runs {
            count[0] = row;
        }
    }
}

#[cube]
fn add_parts<N: Size>(
    pairs: &Array<Vector<u32, Two>>,
    heads: &Array<u32>,
    parts: &Array<Vector<f32, N>>,
    gradients: &mut Array<Vector<f32, N>>,
    item: usize,
    entries: u32,
    block: u32,
    runs: Runs,
    #[comptime] plan: SumPlan,
) {
    let width = comptime!(plan.width());
    let blocks = entries.div_ceil(block);
    let vector = item % width;
    let own = lesser(item / width, blocks as usize - 1) as u32;
    let end = min(own * block + block, entries - 1);
    let key = pairs[end as usize][0];
    let last = pairs[max(end, 1) as usize - 1][0];
    let begins = own == 0 || pairs[max(own * block, 1) as usize - 1][0] != key;
    let goes_on = own + 1 < blocks && last == key && begins;
    let mut asks = goes_on;
    if comptime!(plan.plane > 0) {
        asks = plane_any(goes_on);
    }
    if asks {
        let before = heads_before(heads, end / runs.run, runs, plan.plane);
        if goes_on {
            let stop = stop_of(pairs, key, own + 2, blocks, block);
            let mut sum = parts[(own as usize * 2 + 1) * width + vector];
            for start in range_stepped(own + 1, stop, CHUNK as u32) {
                let mut chunk = Vector::<f32, N>::new(0.0);
                for other in start..min(start + CHUNK as u32, stop) {
                    chunk += parts[other as usize * 2 * width + vector];
                }
                sum += chunk;
            }
            gradients[(before - 1) as usize * width + vector] = sum;
        }
    }
}

/// The first block from `first` on that does not begin with `key`, or `blocks`: most rows end soon, so that steps grow before a bisection.
#[cube]
fn stop_of(pairs: &Array<Vector<u32, Two>>, key: u32, first: u32, blocks: u32, block: u32) -> u32 {
    let mut low = first;
    let mut high = first;
    let mut step = 1u32;
    let mut more = high < blocks;
    while more {
        if pairs[(high * block) as usize][0] == key {
            low = high + 1;
            high += step;
            step *= 2;
            more = high < blocks;
        } else {
            more = false;
        }
    }
    high = min(high, blocks);
    while low < high {
        let middle = (low + high) / 2;
        if pairs[(middle * block) as usize][0] == key {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}
