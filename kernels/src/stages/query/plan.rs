//! How the maps of an input are launched, forward and backward, from sizes and a device alone.

use super::bias::bias_launch;
use crate::launch::device::Device;
use crate::launch::plan::{Launch, check_all};
use crate::launch::tensor::{index, positive};
use crate::linear::cast::cast_launch;
use crate::linear::column_sum::ColumnSumPlans;
use crate::linear::outer::{OuterPlans, OuterSizes};
use crate::linear::{ProductPlans, ProjectSizes, ProjectStrategy};
use crate::{ElementType, Result};

/// The launches of a map of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueryPlans {
    /// The product; None for cubek.
    pub product: Option<ProductPlans>,
    /// Adds the bias.
    pub bias: Option<Launch>,
}

impl QueryPlans {
    /// Plans [`query`](super::query()) by `strategy`, with a bias where it is `biased`.
    ///
    /// # Errors
    /// Sizes that don't fit the device.
    pub fn of(device: &Device, sizes: &ProjectSizes, biased: bool, strategy: ProjectStrategy) -> Result<Self> {
        let bias = biased.then(|| bias_launch(device, sizes.tokens, sizes.width));
        Ok(Self { product: strategy.plan(device, sizes)?, bias })
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        self.product.iter().flat_map(ProductPlans::launches).chain(self.bias).collect()
    }
}

/// A map of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSizes {
    /// Numbers that a token is mapped to.
    pub width: usize,
    /// Whether it has a bias.
    pub biased: bool,
}

/// The sizes of the backward pass of all maps of an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryBackwardSizes {
    /// Tokens; none is no launch.
    pub tokens: usize,
    /// Width of the input.
    pub hidden_size: usize,
    /// Element type of the input and of the maps' weights.
    pub dtype: ElementType,
    /// The maps.
    pub maps: Vec<MapSizes>,
    /// Whether a gradient comes to the input by another way, too.
    pub more: bool,
}

/// The launches of the backward pass of all maps of an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryBackwardPlans {
    /// Those of each map.
    pub maps: Vec<MapPlans>,
}

/// The launches of one map's backward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapPlans {
    /// Rounds the gradient of what the map gave, where matrix units multiply it.
    pub cast: Option<Launch>,
    /// To the input; None for cubek.
    pub input: Option<ProductPlans>,
    /// Adds that to what has come to the input before.
    pub add: Option<Launch>,
    /// To the weight; None for cubek.
    pub weight: Option<OuterPlans>,
    /// To the bias.
    pub bias: Option<ColumnSumPlans>,
}

impl QueryBackwardPlans {
    /// Plans [`query_backward`](super::query_backward) by `strategy`.
    ///
    /// # Errors
    /// No maps, or sizes that don't fit the device.
    pub fn of(device: &Device, sizes: &QueryBackwardSizes, strategy: ProjectStrategy) -> Result<Self> {
        let QueryBackwardSizes { tokens, hidden_size, dtype, ref maps, more } = *sizes;
        positive(&[("maps of the input", maps.len()), ("width of the input", hidden_size)])?;
        index("width of the input", hidden_size)?;
        let of_map = |(at, map): (usize, &MapSizes)| {
            positive(&[("width of a map", map.width)])?;
            index("width of a map", map.width)?;
            let input = ProjectSizes { tokens, depth: map.width, width: hidden_size, dtype };
            let outer = OuterSizes { tokens, m: map.width, n: hidden_size, dtype };
            Ok(MapPlans {
                cast: strategy
                    .rounds(dtype, [map.width, hidden_size])
                    .then(|| cast_launch(device, tokens.saturating_mul(map.width))),
                input: strategy.plan(device, &input)?,
                add: (at > 0 || more).then(|| add_launch(device, tokens.saturating_mul(hidden_size))),
                weight: OuterPlans::of(device, &outer, strategy),
                bias: map.biased.then(|| ColumnSumPlans::of(device, &[tokens], map.width)),
            })
        };
        let plans = Self { maps: maps.iter().enumerate().map(of_map).collect::<Result<_>>()? };
        check_all("query backward", device, &plans.launches())?;
        Ok(plans)
    }

    /// The launches in their order; of no cubes where there are no tokens.
    pub fn launches(&self) -> Vec<Launch> {
        let products = |map: &MapPlans| map.input.as_ref().map_or(Vec::new(), ProductPlans::launches);
        let to_input = self.maps.iter().flat_map(|map| map.cast.into_iter().chain(products(map)).chain(map.add));
        let own = |map: &MapPlans| {
            let bias = map.bias.as_ref().map_or(Vec::new(), ColumnSumPlans::launches);
            [map.weight.as_ref().map_or(Vec::new(), OuterPlans::launches), bias].concat()
        };
        to_input.chain(self.maps.iter().flat_map(own)).collect()
    }
}

/// The launch that adds gradients of `count` numbers.
fn add_launch(device: &Device, count: usize) -> Launch {
    Launch::flat(device, "add_kernel", count / device.width(4, &[count]), 0)
}
