//! A token's output has the same bits however many tokens are in the call: on matrix units, by planes, by several units a sum.

use super::*;

/// The bits of each token's output, scores and slots in a call of the tokens from `from` on.
fn run(case: &Case, from: usize, tokens: usize) -> Vec<Vec<u32>> {
    let layer = &case.layer;
    let width = layer.config().hidden_size;
    let found = layer.forward(&layer.upload(&case.input[from * width..][..tokens * width]).unwrap()).unwrap();
    assert_clean("a run of tokens", &case.reports());
    let floats = |tensor| layer.read(tensor).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let all = [floats(&found.output), floats(&found.chosen.scores), layer.read_slots(&found.chosen).unwrap()];
    let row = |token| all.iter().flat_map(|it| it[token * it.len() / tokens..][..it.len() / tokens].to_vec()).collect();
    (0..tokens).map(row).collect()
}

/// Calls of these numbers of tokens that give some token other bits than the call of all did.
fn differing(case: &Case, batches: &[usize]) -> Vec<usize> {
    let most = case.input.len() / case.layer.config().hidden_size;
    let all = run(case, 0, most);
    let differs = |&tokens: &usize| {
        let from = (most - tokens) / 3;
        run(case, from, tokens)[..] != all[from..][..tokens]
    };
    batches.iter().copied().filter(differs).collect()
}

/// 4,096 tokens of a layer whose stages go by matrix units, and of others; also that the strategies for speed do differ here.
#[test]
fn a_token_has_the_same_bits_in_a_call_of_any_number_of_tokens() {
    let units = Dimensions { hidden_size: 64, key_dim: 32, side_keys: 32, top_m: 4, value_dim: 32, ..dimensions() };
    let additive = Dimensions { value_dim: 6, key_dim: 5, hidden_size: 9, ..product_keys(Kind::ProductKey) };
    for (what, dims, dtype, most) in [
        ("on matrix units", units.clone(), ElementType::BF16, 4096),
        ("in f32", units, ElementType::F32, 300),
        ("odd sizes", dimensions(), ElementType::F16, 200),
        ("product keys", additive, ElementType::F32, 150),
    ] {
        let mut case = Case::random(dims, most, dtype, 11);
        let batches = [1, 2, 3, 16, 64, 130];
        assert!(!differing(&case, &batches).is_empty(), "{what}: for speed");
        case.layer = case.layer.with_invariance(true);
        assert_eq!(differing(&case, &batches), Vec::<usize>::new(), "{what}");
    }
}
