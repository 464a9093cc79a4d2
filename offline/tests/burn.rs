//! The Burn modules on the offline H100, whose allocator pads rows as CUDA's does: output, gradients and a training step against the oracle,
//! with and without fusion, in every element type, at widths whose rows are padded and at some whose rows are not.

use ultramem::ElementType::{BF16, F16, F32};
use ultramem_offline_burn::{fused, plain};

macro_rules! tests {
    ($($name:ident: $backend:ident.$check:ident($($argument:expr),*);)*) => {
        $(#[test] fn $name() { $backend::$check($($argument),*); })*
    };
}

// A layer is its rank, which is 1 for a product-key memory, the width of a key, and the width of a value. Rows of 6, 96, 192 and 320 numbers are
// padded in every type. Not every layer in every type on both backends: a layer's kernels take seconds to build for the host.
tests! {
    f32_ultramem: plain.is_the_oracle(F32, (2, 6, 96));
    f16_ultramem_fused: fused.is_the_oracle(F16, (2, 6, 96));
    bf16_ultramem_fused: fused.is_the_oracle(BF16, (4, 96, 320));
    f32_product_key_fused: fused.is_the_oracle(F32, (1, 192, 6));
    bf16_product_key: plain.is_the_oracle(BF16, (1, 192, 6));
    f16_product_key: plain.is_the_oracle(F16, (1, 320, 192));
    nothing_padded: plain.is_the_oracle(F32, (4, 16, 64));
    nothing_padded_fused: fused.is_the_oracle(F32, (4, 16, 64));
    tables_are_contiguous: plain.tables_are_contiguous();
    tables_are_contiguous_fused: fused.tables_are_contiguous();
    layers_run_beside_blocks: plain.layers_run_beside_blocks();
    layers_run_beside_blocks_fused: fused.layers_run_beside_blocks();
    a_padded_table_is_refused: plain.a_padded_table_is_refused();
    a_padded_table_is_refused_fused: fused.a_padded_table_is_refused();
}
