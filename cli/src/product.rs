//! What the device's arithmetic gives: the rate of a large square product by the library's own kernels, against which every stage
//! is held together with the copy bandwidth.

use cubecl::prelude::*;
use ultramem::ElementType;
use ultramem::kernels::empty;
use ultramem::kernels::query::{ProjectStrategy, query};

use crate::engine::{timed, times};
use crate::failure::{Failure, Result};

/// Operations per millisecond, of the strategy that is faster: the side is doubled until a product takes long enough to be measured.
pub fn matrix_flop_ms<R: Runtime>(client: &ComputeClient<R>, dtype: ElementType) -> Result<f64> {
    let rate = |strategy| rate_of(client, dtype, strategy);
    Ok(rate(ProjectStrategy::Tile)?.max(rate(ProjectStrategy::Cubek)?))
}

fn rate_of<R: Runtime>(client: &ComputeClient<R>, dtype: ElementType, strategy: ProjectStrategy) -> Result<f64> {
    let mut side = SMALLEST;
    loop {
        let tensor = |name| empty(client, name, &[side, side], dtype.storage());
        let (input, weight) = (tensor("input")?, tensor("weight")?);
        let run =
            || query(client, &input, &weight, strategy).map(drop).map_err(|error| Failure::new(error.to_string()));
        timed(client, &run, 1)?;
        let found = times((0..SAMPLES).map(|_| timed(client, &run, 1)).collect::<Result<_>>()?).median;
        if found >= LONG_MS || side == LARGEST {
            return Ok(2.0 * (side as f64).powi(3) / found);
        }
        side *= 2;
    }
}

const SMALLEST: usize = 256;
const LARGEST: usize = 8192;
const SAMPLES: usize = 3;
/// A product that lasts this long hides its launch.
const LONG_MS: f64 = 2.0;
