//! Tables whose addresses take more than 32 bits.

use ultramem::ElementType;

use crate::device::client;
use crate::large::hold;

#[test]
fn rows_of_a_small_table_are_read_and_updated_as_those_of_a_large_one() {
    hold(&client(), 1000, ElementType::F16).unwrap();
}

/// The table of 8944² slots over 4 blocks, 15 GB.
#[test]
#[ignore = "needs 16 GB of device memory in one binding and bf16: scripts/gpu-run runs it"]
fn a_table_of_twenty_million_rows_is_read_and_updated() {
    hold(&client(), 19_998_784, ElementType::BF16).unwrap();
}
