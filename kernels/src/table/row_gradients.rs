//! Gradients of a table of which only some rows were used: those rows, and a gradient for each.

use cubecl::prelude::*;

use crate::launch::device::Device;
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, from_u32, positive, sizes, u32_storage, zeros};
use crate::{Error, Result};

/// The gradient of a table `[rows, width]`, of which only the used rows are listed: each once, ascending, all of them of the table. Only
/// backward passes and [`RowGradients::new`] make one, so that whoever holds one need not check again.
pub struct RowGradients<R: Runtime> {
    pub(crate) rows: Tensor<R>,
    pub(crate) count: Tensor<R>,
    pub(crate) gradients: Tensor<R>,
    pub(crate) table_rows: usize,
}

impl<R: Runtime> Clone for RowGradients<R> {
    fn clone(&self) -> Self {
        Self {
            rows: self.rows.clone(),
            count: self.count.clone(),
            gradients: self.gradients.clone(),
            table_rows: self.table_rows,
        }
    }
}

impl<R: Runtime> RowGradients<R> {
    /// The gradient of no used rows.
    pub(crate) fn none(client: &ComputeClient<R>, table_rows: usize, width: usize) -> Result<Self> {
        Ok(Self {
            rows: empty(client, "rows", &[0], u32_storage())?,
            count: from_u32(client, &[1], &[0])?,
            gradients: empty(client, "row gradients", &[0, width], f32_storage())?,
            table_rows,
        })
    }

    /// u32 `[capacity]`: the used rows, ascending; the first `count` are set.
    pub fn rows(&self) -> &Tensor<R> {
        &self.rows
    }

    /// u32 `[1]`: how many rows are listed. It stays on the device: nobody waits for it.
    pub fn count(&self) -> &Tensor<R> {
        &self.count
    }

    /// f32 `[capacity, width]`: a gradient for each listed row; the others are undefined.
    pub fn gradients(&self) -> &Tensor<R> {
        &self.gradients
    }

    /// Rows of the table.
    pub fn table_rows(&self) -> usize {
        self.table_rows
    }

    /// Checks that the gradient is of a table of `rows` rows.
    pub(crate) fn check_table(&self, rows: usize) -> Result<()> {
        let (value, expected) = (self.table_rows as u64, rows as u64);
        if value == expected {
            Ok(())
        } else {
            Err(Error::Number { what: "rows of a gradient's table", value, expected })
        }
    }

    /// The gradient of the whole table, f32 `[rows, width]`: zero where a row was not used. For comparison, and for optimisers
    /// that know no sparse gradient; costs the whole table.
    ///
    /// # Errors
    /// Another number of rows than the table has, or a table larger than one binding.
    pub fn dense(&self, client: &ComputeClient<R>, rows: usize) -> Result<Tensor<R>> {
        let (capacity, width) = self.check(client)?;
        self.check_table(rows)?;
        let dense = zeros(client, "dense gradient", &[rows, width])?;
        if capacity == 0 {
            return Ok(dense);
        }
        let device = Device::of(client);
        let Planned { plan, launch } = ScatterPlan::of(&device, capacity, rows, width);
        let vector = width / plan.vectors;
        let (grid, cube_dim) = launch.start(&device)?;
        // SAFETY: shapes are checked; a row is written below `rows` only.
        unsafe {
            scatter_rows_kernel::launch_unchecked::<R>(
                client,
                grid,
                cube_dim,
                dense.required_address_type(),
                vector,
                arg(&self.rows, 1),
                arg(&self.count, 1),
                arg(&self.gradients, vector),
                arg(&dense, vector),
                plan,
            );
        }
        Ok(dense)
    }

    /// Checks the three tensors against each other and returns `(capacity, width)`.
    pub(crate) fn check(&self, client: &ComputeClient<R>) -> Result<(usize, usize)> {
        let [capacity, width] = sizes(&self.gradients, "row gradients")?;
        positive(&[("width of the row gradients", width)])?;
        check(client, &self.gradients, "row gradients", &[capacity, width], f32_storage())?;
        check(client, &self.rows, "rows", &[capacity], u32_storage())?;
        check(client, &self.count, "count", &[1], u32_storage())?;
        Ok((capacity, width))
    }
}

/// What is fixed when the kernel that makes a whole table's gradient is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ScatterPlan {
    /// Rows of the table.
    pub rows: usize,
    /// Loads of a row.
    pub vectors: usize,
    /// Units of a cube.
    pub units: usize,
}

impl ScatterPlan {
    /// Plans [`RowGradients::dense`], of at most `capacity` listed rows of a table `[rows, width]`. The launch is checked when it is made.
    pub fn of(device: &Device, capacity: usize, rows: usize, width: usize) -> Planned<Self> {
        let vectors = width / device.width(4, &[width]);
        let launch = Launch::flat(device, "scatter_rows_kernel", capacity.saturating_mul(vectors), 0);
        Planned { plan: Self { rows, vectors, units: launch.units }, launch }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn scatter_rows_kernel<N: Size>(
    rows: &Array<u32>,
    count: &Array<u32>,
    gradients: &Array<Vector<f32, N>>,
    dense: &mut Array<Vector<f32, N>>,
    #[comptime] plan: ScatterPlan,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let listed = min(count[0] as usize, rows.len());
    if item / plan.vectors < listed {
        let row = rows[item / plan.vectors] as usize;
        if row < plan.rows {
            dense[row * plan.vectors + item % plan.vectors] = gradients[item];
        }
    }
}
