//! How scoring in one launch on matrix units is planned: tiles, groups of keys, and room for what a row lists.

use super::plan::{MATRIX_PLANE, MATRIX_TOKENS, ScorePlan, ScoreSizes};
use super::{GROUP, ScoreStrategy, padded};
use crate::launch::device::Device;
use crate::launch::loops::strided;
use crate::launch::plan::{Launch, Planned};

/// What is fixed when the filter's kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FilterPlan {
    /// The layer's sizes, tiles and units.
    pub score: ScorePlan,
    /// Keys of a group, the largest score of which helps to find a bound.
    pub group: usize,
    /// Keys that a row lists at most.
    pub room: usize,
}

/// Planes of a cube: one cube takes all registers of a multiprocessor.
const PLANES: usize = 16;
/// Most keys of a group.
const MOST_KEYS: usize = 8;

impl FilterPlan {
    /// The plan with the largest tile of tokens that reaches half of the multiprocessors, or else the smallest; None where it does not fit.
    pub fn of(device: &Device, sizes: &ScoreSizes) -> Option<Planned<Self>> {
        sizes.check().ok()?;
        let cut = ScorePlan::cut(device, sizes, ScoreStrategy::Filtered);
        let whole_pairs = sizes.direct || (sizes.rank.is_power_of_two() && (2..=GROUP).contains(&sizes.rank));
        let possible = whole_pairs && cut.takes_matrix_units(device, sizes, PLANES);
        let tiles = [MATRIX_TOKENS, MATRIX_TOKENS / 2].into_iter().filter(|_| possible);
        let plans = tiles.filter_map(|tile| {
            let score = ScorePlan { matrix: true, tile, units: PLANES * MATRIX_PLANE, ..cut.of_any_range() };
            Self::with(score).map(|plan| plan.filtering(sizes.tokens)).filter(|it| it.launch.fits(device))
        });
        let mut plans = plans.filter(|it| sizes.tokens > it.plan.score.tile / 2);
        let busy = |it: &Planned<Self>| it.is_worth_it(device);
        plans.clone().find(busy).or_else(|| plans.next_back())
    }

    /// With the groups that take the least memory.
    fn with(score: ScorePlan) -> Option<Self> {
        let (_, span) = score.matrix_shares();
        let groups = [8, 4, 2, 1].into_iter().filter(|&group| group <= MOST_KEYS.min(4 * span));
        let plans = groups.map(|group| {
            let plan = Self { score, group, room: 0 };
            Self { room: plan.wanted_room(), ..plan }
        });
        plans.filter(|plan| plan.groups() >= score.top_m).min_by_key(Self::pitch)
    }

    /// Keys that a row of numbers in random order lists, and as many more as chance may add.
    fn wanted_room(&self) -> usize {
        let reached = (self.most() as f64 / self.groups() as f64).min(1.0);
        let listed = self.score.side_keys as f64 * (1.0 - (1.0 - reached).powf(1.0 / self.group as f64));
        let room = (listed + 3.5 * listed.sqrt()) as usize;
        room.clamp(self.score.top_m, self.score.side_keys).max(2 * self.mark_words())
    }

    /// Groups whose largest score the bound may reach.
    pub(super) fn most(&self) -> usize {
        self.score.top_m + self.score.top_m / 16
    }

    /// Lines that a plane multiplies at a time, and a cube.
    pub(super) fn lines_of_plane(&self) -> usize {
        self.score.matrix_shares().1 * GROUP
    }

    pub(super) fn lines_of_cube(&self) -> usize {
        PLANES / self.score.matrix_shares().0 * self.lines_of_plane()
    }

    /// Planes of a cube.
    pub(super) fn planes(&self) -> usize {
        PLANES
    }

    /// Numbers that a lane has of a row and of a plane's lines.
    pub(super) fn of_lane(&self) -> usize {
        self.lines_of_plane() / 4
    }

    /// Groups of eight rows that a plane multiplies.
    pub(super) fn eights(&self) -> usize {
        self.score.tile / self.score.matrix_shares().0 / 8
    }

    /// Groups of a row.
    pub(super) fn groups(&self) -> usize {
        padded(self.score.side_keys).next_multiple_of(self.lines_of_plane()) / self.group
    }

    /// Words of a row: the groups' largest scores, then scores and positions of what is listed. Rows whose first words lie four banks apart.
    pub(super) fn pitch(&self) -> usize {
        self.groups().max(2 * self.room).saturating_sub(4).next_multiple_of(32) + 4
    }

    /// Words of a row's marks, an odd number: a bit for each key.
    pub(super) fn mark_words(&self) -> usize {
        self.score.side_keys.div_ceil(32) | 1
    }

    /// Numbers of a kept key's scores that are written at once.
    pub(super) fn width(&self) -> usize {
        if self.score.direct { 1 } else { 2 }
    }

    fn filtering(self, tokens: usize) -> Planned<Self> {
        let ScorePlan { heads, side_keys, key_dim, rank, top_m, tile, units, direct, .. } = self.score;
        let blocks = |lines: usize| strided(lines, self.lines_of_cube());
        let (keys, ranks) = (padded(side_keys), if direct { 0 } else { padded(side_keys) * rank });
        // What a bisection takes of numbers in random order, and of what is listed all that is left.
        let bisections = STEPS * 2 + strided(self.mark_words(), MATRIX_PLANE);
        let launch = Launch {
            kernel: "filter_keys_kernel",
            cubes: tokens.div_ceil(tile).saturating_mul(heads * 2),
            units,
            shared_bytes: 2 * tile * key_dim + 4 * tile * (self.pitch() + self.mark_words() + 4) + 4,
            loops: 2 * blocks(keys)
                + blocks(ranks)
                + strided(tile * self.mark_words(), units)
                + tile / PLANES
                    * (1 + 3 * strided(key_dim / 4, MATRIX_PLANE) + bisections + strided(top_m, MATRIX_PLANE)),
        };
        Planned { plan: self, launch }
    }
}

/// Steps of a bisection, more than numbers in random order need.
const STEPS: usize = 12;

impl Planned<FilterPlan> {
    /// Whether there is work for half of the multiprocessors at least.
    pub(super) fn is_worth_it(&self, device: &Device) -> bool {
        self.launch.cubes >= device.processors / 2
    }
}
