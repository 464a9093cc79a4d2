//! The transpose of a matrix: stages read a linear map's weight with its outputs innermost, PyTorch keeps it the other way.
//!
//! Moves the matrix once in and once out. A unit moves one number, neighbours writing neighbours.

use cubecl::prelude::*;

use crate::Result;
use crate::launch::device::Device;
use crate::launch::tensor::{Tensor, arg, check, empty, float_type, index, sizes};

/// `[columns, rows]` of `matrix` `[rows, columns]`, f32, f16 or bf16; either may be 0.
///
/// # Errors
/// A tensor that is no matrix of such numbers.
pub fn transpose<R: Runtime>(client: &ComputeClient<R>, matrix: &Tensor<R>) -> Result<Tensor<R>> {
    float_type(client, matrix, "matrix")?;
    let [rows, columns] = sizes(matrix, "matrix")?;
    check(client, matrix, "matrix", &[rows, columns], matrix.dtype)?;
    let device = Device::of(client);
    let transposed = empty(client, "transpose", &[columns, rows], matrix.dtype)?;
    if rows * columns == 0 {
        return Ok(transposed);
    }
    let (all_rows, all_columns) = (index("rows of the matrix", rows)?, index("columns of the matrix", columns)?);
    let units = device.flat(rows * columns);
    // SAFETY: the shape is checked; a unit reads and writes one number below `rows · columns`.
    unsafe {
        transpose_kernel::launch_unchecked::<R>(
            client,
            device.grid((rows * columns).div_ceil(units))?,
            CubeDim::new_1d(units as u32),
            matrix.required_address_type(),
            arg(matrix, 1),
            arg(&transposed, 1),
            all_rows,
            all_columns,
            units,
            matrix.dtype,
        );
    }
    Ok(transposed)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn transpose_kernel<E: Float>(
    matrix: &Array<E>,
    transposed: &mut Array<E>,
    rows: u32,
    columns: u32,
    #[comptime] units: usize,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    if item < rows as usize * columns as usize {
        transposed[item] = matrix[item % rows as usize * columns as usize + item / rows as usize];
    }
}
