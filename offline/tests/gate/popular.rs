//! Rows and keys that every token chooses: their sums are cut into blocks, and the blocks' parts added up.

use super::*;

/// Equal tokens, whose every row and key has as many entries as there are tokens, or twice that; and among others, whose rows are their own.
#[test]
fn rows_that_every_token_chooses_have_the_oracles_gradient() {
    for (dims, dtype) in [
        (dimensions(), ElementType::F32),
        (dimensions(), ElementType::BF16),
        (Dimensions { value_dim: 6, key_dim: 5, hidden_size: 9, ..product_keys(Kind::ProductKey) }, ElementType::F32),
    ] {
        let mut case = Case::random(dims, 300, dtype, 5);
        let width = case.layer.config().hidden_size;
        let alike = case.input[..width].repeat(240);
        case.input[..alike.len()].copy_from_slice(&alike);
        case.hold_backward("a row of many tokens");
    }
}
