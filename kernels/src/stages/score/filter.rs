//! Score in one launch, on matrix units: the best `top_m` keys of each side of a token, and their scores of all ranks.
//!
//! A cube takes a tile of tokens, one side of one head and all of its lines, `[heads, 2, lines, key_dim]`, which it multiplies three times:
//!
//! - the projected keys, of which it keeps the largest score of each group of a few. A score that `top_m` groups reach is a bound: as many
//!   keys at least are as good, so that what is worse is not among the best;
//! - the projected keys again, to list for each row what reaches its bound: about a third more than are kept. A plane selects among them exactly.
//!   Multiplying anew costs less than to keep the scores, or to raise a bound step by step;
//! - the normalised keys, to write the scores of those that are kept.
//!
//! A row in which more keys reach the bound than there is room for, as many do where scores are equal, selects among those it has listed, which
//! makes a better bound, and the cube multiplies again. Each time what is left are fewer, at most `side_keys / (room - top_m)` times.
//!
//! Reads the lines once per tile of tokens, the projected ones twice, from cache, and writes what is kept.

use cubecl::prelude::{select as select_value, *};

use super::filter_plan::FilterPlan;
use super::matrix::{EIGHT, Plane, Two, multiply, normalise_tile};
use super::{GROUP, padded};
use crate::select::held::{bound_of, reach};
use crate::select::threshold::Bound;
use crate::select::{FOUR, Four, NAN_KEY, NOTHING, no_score, order_key, score_of};

/// A plane's scores of its rows and lines, as [`multiply`] leaves them.
type Sums = Sequence<Array<Vector<f32, Two>>>;

/// Steps of the depth whose keys are on their way at once: there are 128 registers a unit.
const AHEAD: usize = 4;
/// Bits of a word of marks.
const BITS: usize = 32;

/// Where a unit stands.
#[derive(CubeType, Clone, Copy)]
struct Place {
    plane: Plane,
    /// `head · 2 + side`.
    side: usize,
    /// The tile's first token, and where all tokens end.
    first: usize,
    end: usize,
    /// The first row of the tile, and the first line, that the plane multiplies.
    row: usize,
    line: usize,
}

/// What a cube knows of its rows.
#[derive(CubeType)]
struct Rows {
    /// `[tile, pitch]`: the largest score of each group as bits; then `room` scores of listed keys, as bits, and the keys; in place of these, in
    /// the end, the row's marks, and how many kept keys lie before each word of them.
    words: SharedMemory<u32>,
    /// `[tile, mark_words]`: a bit for each key that is kept, while keys are marked.
    marks: SharedMemory<Atomic<u32>>,
    /// Keys that reached the bound.
    listed: SharedMemory<Atomic<u32>>,
    /// The bound, an order key and the last key that may have it, and the score of it. A row that is done lists nothing.
    keys: SharedMemory<u32>,
    lasts: SharedMemory<u32>,
    scores: SharedMemory<f32>,
    /// How often a row was found that scores alone can't tell the candidates of: bounded by NaN, or by a key too.
    unclear: SharedMemory<Atomic<u32>>,
    #[cube(comptime)]
    plan: FilterPlan,
}

/// `CUBE_POS` runs over sides, then tiles of tokens.
#[cube(launch_unchecked)]
pub(crate) fn filter_keys_kernel<E: Float, S: Size>(
    query: &Array<Vector<f32, Four>>,
    query_norm: &Array<Vector<f32, Four>>,
    lines: &Array<Vector<u32, Four>>,
    kept_keys: &mut Array<u32>,
    kept_scores: &mut Array<Vector<f32, S>>,
    eps: f32,
    tokens: u32,
    cubes: u32,
    #[comptime] plan: FilterPlan,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let score = comptime!(plan.score);
    let (sides, shares) = comptime!((score.heads * 2, score.matrix_shares().0));
    let plane = Plane::of_unit(score.plane);
    let at = Place {
        plane,
        side: CUBE_POS % sides,
        first: CUBE_POS / sides * score.tile,
        end: tokens as usize,
        row: plane.index % shares * comptime!(score.tile / shares),
        line: plane.index / shares * comptime!(plan.lines_of_plane()),
    };
    let mut queries = SharedMemory::<Vector<u32, Four>>::new(comptime!(score.tile * score.key_dim / EIGHT));
    let mut rows = Rows::new(plan);
    normalise_tile::<E>(query, query_norm, &mut queries, at.first, at.end, at.side, plane, eps, score);
    sync_cube();
    find_largest::<E>(&queries, lines, &mut rows, at, plan);
    sync_cube();
    find_bounds(&mut rows, at, plan);
    sync_cube();
    let mut unclear = rows.unclear[0].load();
    let mut again = true;
    while again {
        list::<E>(&queries, lines, &mut rows, at, unclear > 0, plan);
        sync_cube();
        select_listed::<S>(kept_keys, kept_scores, &mut rows, at, plan);
        sync_cube();
        let now = rows.unclear[0].load();
        again = now != unclear;
        unclear = now;
    }
    if comptime!(!score.direct) {
        write_ranks::<E, S>(&queries, lines, kept_scores, &rows, at, plan);
    }
}

#[cube]
impl Rows {
    /// Nothing is listed or marked. Ends without a barrier.
    fn new(#[comptime] plan: FilterPlan) -> Rows {
        let (tile, units) = comptime!((plan.score.tile, plan.score.units));
        let marks = SharedMemory::<Atomic<u32>>::new(comptime!(tile * plan.mark_words()));
        for word in range_stepped(UNIT_POS as usize, comptime!(tile * plan.mark_words()), units) {
            marks[word].store(0u32);
        }
        let listed = SharedMemory::<Atomic<u32>>::new(tile);
        if (UNIT_POS as usize) < tile {
            listed[UNIT_POS as usize].store(0u32);
        }
        let unclear = SharedMemory::<Atomic<u32>>::new(1usize);
        if UNIT_POS == 0 {
            unclear[0].store(0u32);
        }
        Rows {
            words: SharedMemory::new(comptime!(tile * plan.pitch())),
            marks,
            listed,
            keys: SharedMemory::new(tile),
            lasts: SharedMemory::new(tile),
            scores: SharedMemory::new(tile),
            unclear,
            plan,
        }
    }

    /// Sets a row's bound; one of order key 0, which none has, ends it.
    fn bound(&mut self, row: usize, bound: Bound) {
        self.keys[row] = bound.key;
        self.lasts[row] = bound.last;
        self.scores[row] = score_of(bound.key);
    }

    /// Lists the keys of the row `8 · i` behind `row`, of those from `key` on that a lane has the scores of, whose bits are set.
    fn push(&mut self, sums: &Sums, passed: u32, row: usize, key: usize, #[comptime] i: usize) {
        let (pitch, room) = comptime!((self.plan.pitch(), self.plan.room));
        let mut place = self.listed[row + comptime!(i * EIGHT)].fetch_add(passed.count_ones()) as usize;
        #[unroll]
        for e in 0..comptime!(self.plan.of_lane()) {
            let bit = (passed >> comptime!(e as u32)) % 2;
            if bit == 1 && place < room {
                let at = row * pitch + place;
                self.words[at + comptime!(i * EIGHT * pitch)] = u32::reinterpret(number(sums, i, e, self.plan));
                self.words[at + comptime!(i * EIGHT * pitch + room)] = (key + comptime!(offset(e))) as u32;
            }
            place += bit as usize;
        }
    }

    /// The word of a key's mark in the row `8 · i` behind `row`, once its keys are selected, and how many kept keys lie before it.
    fn marked(&self, row: usize, key: usize, #[comptime] i: usize) -> (u32, u32) {
        let (pitch, words) = comptime!((self.plan.pitch(), self.plan.mark_words()));
        let (place, first) = (row * pitch + key / BITS, comptime!(i * EIGHT * pitch + self.plan.room));
        (self.words[place + first], self.words[place + comptime!(first + words)])
    }
}

/// The key of a lane's number `e` of a row, from the lane's first on.
fn offset(e: usize) -> usize {
    e / 2 * EIGHT + e % 2
}

/// A lane's number `e` of row `8 · i + lane / 4` of the plane's.
#[cube]
fn number(sums: &Sums, #[comptime] i: usize, #[comptime] e: usize, #[comptime] plan: FilterPlan) -> f32 {
    let both = sums.index(comptime!(plan.of_lane() / 2 * (i / 2) + e / 2))[comptime!(i % 2)];
    both[comptime!(e % 2)]
}

/// The scores of a plane's rows and lines from `line` on, of the `lines` from `first` on; NaN past the last key.
#[cube]
fn scores_of<E: Float>(
    queries: &SharedMemory<Vector<u32, Four>>,
    lines: &Array<Vector<u32, Four>>,
    line: usize,
    at: Place,
    #[comptime] first: usize,
    #[comptime] count: usize,
    #[comptime] plan: FilterPlan,
) -> Sums {
    let score = comptime!(plan.score);
    let mut sums = Sums::new();
    let weight = (at.side * comptime!(score.pitch()) + first + line) * score.key_dim;
    // Of the last lines one group may be left.
    multiply::<E>(queries, lines, &mut sums, weight, at.row, (count - line) / GROUP, at.plane.lane, AHEAD, score);
    sums
}

/// Makes the scores of what is no key NaN.
#[cube]
fn blank(sums: &mut Sums, line: usize, at: Place, #[comptime] plan: FilterPlan) {
    let (keys, lines) = comptime!((plan.score.side_keys, plan.lines_of_plane()));
    if line + lines > keys {
        let key = line + 2 * (at.plane.lane % FOUR);
        #[unroll]
        for e in 0..comptime!(plan.of_lane()) {
            if key + comptime!(offset(e)) >= keys {
                #[unroll]
                for i in 0..comptime!(plan.eights()) {
                    let sum = sums.index_mut(comptime!(plan.of_lane() / 2 * (i / 2) + e / 2));
                    let mut both = sum[comptime!(i % 2)];
                    both[comptime!(e % 2)] = no_score();
                    sum[comptime!(i % 2)] = both;
                }
            }
        }
    }
}

/// Writes the largest score of each group of keys, NaN where no score is a number.
#[cube]
fn find_largest<E: Float>(
    queries: &SharedMemory<Vector<u32, Four>>,
    lines: &Array<Vector<u32, Four>>,
    rows: &mut Rows,
    at: Place,
    #[comptime] plan: FilterPlan,
) {
    let keys = comptime!(padded(plan.score.side_keys));
    let lane = at.plane.lane;
    for line in range_stepped(at.line, keys, comptime!(plan.lines_of_cube())) {
        let mut sums = scores_of::<E>(queries, lines, line, at, 0usize, keys, plan);
        blank(&mut sums, line, at, plan);
        let first = (at.row + lane / FOUR) * comptime!(plan.pitch()) + line / plan.group + lane % FOUR;
        #[unroll]
        for i in 0..comptime!(plan.eights()) {
            #[unroll]
            for j in 0..comptime!(plan.of_lane() / plan.group) {
                let mut largest = number(&sums, i, comptime!(j * plan.group), plan);
                #[unroll]
                for e in 1..plan.group {
                    largest = max(largest, number(&sums, i, comptime!(j * plan.group + e), plan));
                }
                rows.words[first + comptime!(i * EIGHT * plan.pitch() + j * FOUR)] = u32::reinterpret(largest);
            }
        }
    }
}

/// Finds a bound for each row: what the largest scores of `top_m` groups reach.
#[cube]
fn find_bounds(rows: &mut Rows, at: Place, #[comptime] plan: FilterPlan) {
    let (groups, units) = comptime!((plan.groups(), plan.score.plane));
    let slots = comptime!(groups.div_ceil(units));
    for row in range_stepped(at.plane.index, plan.score.tile, comptime!(plan.planes())) {
        let mut own = Array::<u32>::new(slots);
        #[unroll]
        for slot in 0..slots {
            let group = comptime!(slot * units) + at.plane.lane;
            own[slot] = NOTHING;
            if group < groups {
                own[slot] = order_key(f32::reinterpret(rows.words[row * comptime!(plan.pitch()) + group]));
            }
        }
        let reached = reach(&own, comptime!(groups as u32).runtime(), slots, plan.score.top_m, plan.most(), units);
        if at.plane.lane == 0 {
            let key = select_value(at.first + row < at.end, reached.key, 0u32);
            rows.bound(row, Bound { key, last: NOTHING.runtime() });
            if key >= NAN_KEY {
                rows.unclear[0].fetch_add(1u32);
            }
        }
    }
}

/// Lists what reaches the rows' bounds; where one is `unclear`, by order keys and positions.
#[cube]
fn list<E: Float>(
    queries: &SharedMemory<Vector<u32, Four>>,
    lines: &Array<Vector<u32, Four>>,
    rows: &mut Rows,
    at: Place,
    unclear: bool,
    #[comptime] plan: FilterPlan,
) {
    let keys = comptime!(padded(plan.score.side_keys));
    let (lane, row) = (at.plane.lane, at.row + at.plane.lane / FOUR);
    for line in range_stepped(at.line, keys, comptime!(plan.lines_of_cube())) {
        let mut sums = scores_of::<E>(queries, lines, line, at, 0usize, keys, plan);
        blank(&mut sums, line, at, plan);
        let key = line + 2 * (lane % FOUR);
        #[unroll]
        for i in 0..comptime!(plan.eights()) {
            let least = rows.scores[row + comptime!(i * EIGHT)];
            let mut passed = 0u32;
            #[unroll]
            for e in 0..comptime!(plan.of_lane()) {
                let bit = comptime!(1u32 << e as u32);
                passed |= select_value(number(&sums, i, e, plan) >= least, bit, 0u32);
            }
            if unclear {
                let of_row = row + comptime!(i * EIGHT);
                let bound = Bound { key: rows.keys[of_row], last: rows.lasts[of_row] };
                passed = passing(&sums, bound, key, i, plan);
            }
            if passed != 0 {
                rows.push(&sums, passed, row, key, i);
            }
        }
    }
}

/// A bit for each of a lane's keys of a row that `bound` holds.
#[cube]
fn passing(sums: &Sums, bound: Bound, first: usize, #[comptime] i: usize, #[comptime] plan: FilterPlan) -> u32 {
    let mut passed = 0u32;
    #[unroll]
    for e in 0..comptime!(plan.of_lane()) {
        let key = first + comptime!(offset(e));
        let held = bound.holds(order_key(number(sums, i, e, plan)), key as u32);
        passed |= select_value(held && key < plan.score.side_keys, comptime!(1u32 << e as u32), 0u32);
    }
    passed
}

/// Selects among what each row has listed, and writes what is kept; a row that lacked room gets a better bound instead.
#[cube]
fn select_listed<S: Size>(
    kept_keys: &mut Array<u32>,
    kept_scores: &mut Array<Vector<f32, S>>,
    rows: &mut Rows,
    at: Place,
    #[comptime] plan: FilterPlan,
) {
    let (room, units) = comptime!((plan.room, plan.score.plane));
    let slots = comptime!(room.div_ceil(units));
    for row in range_stepped(at.plane.index, plan.score.tile, comptime!(plan.planes())) {
        let listed = rows.listed[row].load();
        if listed > 0 {
            let count = min(listed, comptime!(room as u32));
            let first = row * comptime!(plan.pitch());
            let mut own = Array::<u32>::new(slots);
            let mut keys = Array::<u32>::new(slots);
            #[unroll]
            for slot in 0..slots {
                let place = comptime!(slot * units) + at.plane.lane;
                own[slot] = NOTHING;
                keys[slot] = 0u32;
                if place < count as usize {
                    own[slot] = order_key(f32::reinterpret(rows.words[first + place]));
                    keys[slot] = rows.words[first + room + place];
                }
            }
            let bound = bound_of(&own, &keys, count, slots, plan.score.top_m, units);
            sync_plane();
            if listed > comptime!(room as u32) {
                if at.plane.lane == 0 {
                    rows.bound(row, bound);
                    rows.unclear[0].fetch_add(1u32);
                }
            } else {
                write_kept::<S>(kept_keys, kept_scores, rows, &own, &keys, bound, row, at, plan);
                if at.plane.lane == 0 {
                    rows.bound(row, Bound { key: 0u32.runtime(), last: NOTHING.runtime() });
                }
            }
            if at.plane.lane == 0 {
                rows.listed[row].store(0u32);
            }
        }
    }
}

/// Marks the keys of a row that `bound` holds, and writes them where as many kept ones come before them.
#[cube]
fn write_kept<S: Size>(
    kept_keys: &mut Array<u32>,
    kept_scores: &mut Array<Vector<f32, S>>,
    rows: &mut Rows,
    own: &Array<u32>,
    keys: &Array<u32>,
    bound: Bound,
    row: usize,
    at: Place,
    #[comptime] plan: FilterPlan,
) {
    let (words, units) = comptime!((plan.mark_words(), plan.score.plane));
    let (marks, first) = (row * words, row * comptime!(plan.pitch()));
    #[unroll]
    for slot in 0..comptime!(plan.room.div_ceil(units)) {
        if bound.holds(own[slot], keys[slot]) {
            // No two are the same: what is added is a bit that was not there.
            rows.marks[marks + keys[slot] as usize / BITS].fetch_add(1u32 << (keys[slot] % comptime!(BITS as u32)));
        }
    }
    sync_plane();
    let share = comptime!(words.div_ceil(units));
    let mut before = 0u32;
    #[unroll]
    for i in 0..share {
        if at.plane.lane * share + i < words {
            before += rows.marks[marks + at.plane.lane * share + i].load().count_ones();
        }
    }
    before = plane_exclusive_sum(before);
    #[unroll]
    for i in 0..share {
        let word = at.plane.lane * share + i;
        if word < words {
            let bits = rows.marks[marks + word].load();
            rows.words[first + plan.room + word] = bits;
            rows.words[first + comptime!(plan.room + words) + word] = before;
            before += bits.count_ones();
        }
    }
    sync_plane();
    let out = ((at.first + row) * comptime!(plan.score.heads * 2) + at.side) * plan.score.top_m;
    #[unroll]
    for slot in 0..comptime!(plan.room.div_ceil(units)) {
        if bound.holds(own[slot], keys[slot]) {
            let key = keys[slot] as usize;
            let (word, before) = rows.marked(row, key, 0usize);
            let place = out + (before + (word & ((1u32 << (key % BITS) as u32) - 1)).count_ones()) as usize;
            kept_keys[place] = keys[slot];
            if comptime!(plan.score.direct) {
                // A lone rank's scores are the approximate ones.
                let bits = rows.words[first + comptime!(slot * units) + at.plane.lane];
                kept_scores[place] = Vector::new(f32::reinterpret(bits));
            }
        }
    }
}

/// Writes the scores of all ranks of the keys that are marked. A plane's lines are those of keys whose marks lie in one word.
#[cube]
fn write_ranks<E: Float, S: Size>(
    queries: &SharedMemory<Vector<u32, Four>>,
    lines: &Array<Vector<u32, Four>>,
    kept_scores: &mut Array<Vector<f32, S>>,
    rows: &Rows,
    at: Place,
    #[comptime] plan: FilterPlan,
) {
    let score = comptime!(plan.score);
    let (keys, rank) = comptime!((padded(score.side_keys), score.rank));
    let (lane, row) = (at.plane.lane, at.row + at.plane.lane / FOUR);
    let pair = 2 * (lane % FOUR);
    let of_token = comptime!(score.heads * 2 * score.top_m);
    let out = (at.first + row) * of_token + at.side * score.top_m;
    for line in range_stepped(at.line, comptime!(keys * rank), comptime!(plan.lines_of_cube())) {
        let sums = scores_of::<E>(queries, lines, line, at, keys, comptime!(keys * rank), plan);
        let key = (line + pair) / rank;
        let shift = (key % BITS) as u32;
        #[unroll]
        for i in 0..comptime!(plan.eights()) {
            // Nothing is selected of what is no token.
            if at.first + row + comptime!(i * EIGHT) < at.end {
                let (word, before) = rows.marked(row, key, i);
                let own = word >> shift;
                let first =
                    out + comptime!(i * EIGHT * of_token) + (before + (word - (own << shift)).count_ones()) as usize;
                #[unroll]
                for n in 0..comptime!(plan.of_lane() / 2) {
                    let bit = comptime!(1u32 << (n * EIGHT / rank) as u32);
                    if own & bit != 0 {
                        let place = first + (own & comptime!(bit - 1)).count_ones() as usize;
                        let mut both = Vector::<f32, S>::new(number(&sums, i, comptime!(2 * n), plan));
                        both[1] = number(&sums, i, comptime!(2 * n + 1), plan);
                        kept_scores[place * comptime!(rank / 2) + (comptime!(n * EIGHT % rank) + pair % rank) / 2] =
                            both;
                    }
                }
            }
        }
    }
}
