//! Products: linear maps by a tile, on matrix units or by cubek, a weight's gradient as outer products, transposes, column sums. Each file says its
//! shapes and the bytes that it moves.

pub(crate) mod cast;
pub(crate) mod column_sum;
pub(crate) mod interleave;
pub(crate) mod matrix;
mod matrix_plan;
pub mod matrix_tile;
pub(crate) mod outer;
pub(crate) mod project;
pub mod tile;
pub(crate) mod transpose;

pub use self::matrix_plan::{GroupSizes, MatrixPlan, MatrixPlans, MatrixSizes};
pub use self::project::{ProductPlans, ProjectPlan, ProjectSizes, ProjectStrategy, project};
