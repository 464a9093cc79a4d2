//! More cubes than one dimension of a grid takes (65,535 on most devices), in every stage. Layers are as small as can be, so
//! that every number of the result is known.

use ultramem::kernels::RowSource;
use ultramem::kernels::combine::{Chosen, PairScore, combine};
use ultramem::kernels::expand::{ExpandStrategy, Memory, expand};
use ultramem::kernels::linear::ProjectStrategy;
use ultramem::kernels::query::query;
use ultramem::kernels::score::Queries;
use ultramem::kernels::score::{Kept, KeyFactors, ScoreStrategy, prepare_keys, score};
use ultramem::kernels::{from_f32, from_u32};
use ultramem::{Norm, Tensor};

use crate::device::{Adapter, client, poison, read_f32, read_u32};

/// Enough for 65,537 cubes of 8 rows.
const ROWS: usize = 8 * 65_536 + 5;

/// ±1, ±2 or ±3, different from row to row.
fn number(row: usize) -> f32 {
    [1.0, -2.0, 3.0, -1.0, 2.0, -3.0, 1.0][row % 7]
}

/// A tensor of `shape` that holds `number(0)`, `number(step)`, ….
fn numbers(shape: &[usize], step: usize) -> Tensor<Adapter> {
    let numbers: Vec<f32> = (0..shape.iter().product()).map(|row| number(row * step)).collect();
    from_f32(&client(), shape, &numbers).unwrap()
}

fn assert_rows(found: &[f32], expected: impl Fn(usize) -> f32) {
    let wrong = found.iter().enumerate().position(|(row, &found)| found != expected(row));
    assert_eq!(wrong, None, "of {} rows: {:?}", found.len(), wrong.map(|row| (found[row], expected(row))));
}

#[test]
fn query_takes_any_number_of_tokens() {
    let client = client();
    let (input, weight) = (numbers(&[ROWS, 1], 1), from_f32(&client, &[1, 1], &[2.0]).unwrap());
    poison(&client, 1 << 24);
    let found = query(&client, &input, &weight, None, ProjectStrategy::Tile).unwrap();
    assert_rows(&read_f32(&client, &found), |row| 2.0 * number(row));
}

#[test]
fn score_takes_any_number_of_sides() {
    let (client, heads, tokens) = (client(), 1024, 264);
    let ones = from_f32(&client, &[1], &[1.0]).unwrap();
    let factors = KeyFactors { norm: None, vectors: None };
    let keys = prepare_keys(&client, &numbers(&[heads, 2, 1, 1, 1], 1), &factors).unwrap();
    let query = numbers(&[tokens, 2], 1);
    for strategy in [ScoreStrategy::Whole, ScoreStrategy::Split { splits: 2 }] {
        poison(&client, 1 << 24);
        let queries = Queries { numbers: &query, norm: Some((Norm::Rms, 0.0, &ones)), heads_per_pair: heads };
        let kept = score(&client, &queries, &keys, 1, strategy).unwrap();
        assert!(read_u32(&client, &kept.keys).iter().all(|&key| key == 0));
        // The norm leaves a query of one number its sign.
        let sign = |row: usize| number(row / (2 * heads) * 2 + row % 2).signum();
        assert_rows(&read_f32(&client, &kept.scores), |row| sign(row) * number(row % (2 * heads)));
    }
}

#[test]
fn combine_takes_any_number_of_rows() {
    let client = client();
    let key = |at: usize| (at % 5) as u32;
    let keys: Vec<u32> = (0..2 * ROWS).map(key).collect();
    let keys = from_u32(&client, &[ROWS, 1, 2, 1], &keys).unwrap();
    let kept = Kept { keys, scores: numbers(&[ROWS, 1, 2, 1, 1], 1) };
    let core = from_f32(&client, &[1, 1, 1, 1], &[1.0]).unwrap();
    poison(&client, 1 << 24);
    let chosen = combine(&client, &kept, 5, &PairScore::Tucker(&core)).unwrap();
    assert_rows(&read_f32(&client, &chosen.scores), |row| number(2 * row) * number(2 * row + 1));
    let slots = read_u32(&client, &chosen.slots);
    assert!(slots.iter().enumerate().all(|(row, &slot)| slot == key(2 * row) * 5 + key(2 * row + 1)));
}

#[test]
fn expand_takes_any_number_of_tokens() {
    let client = client();
    let slots: Vec<u32> = (0..ROWS).map(|row| (row % 3) as u32).collect();
    let chosen =
        Chosen { slots: from_u32(&client, &[ROWS, 1, 1], &slots).unwrap(), scores: numbers(&[ROWS, 1, 1, 1], 1) };
    let (values, weight) = ([numbers(&[3, 1], 1)], from_f32(&client, &[1, 1], &[2.0]).unwrap());
    let rows = RowSource::own(&[], 1, 3);
    let memory = Memory { values: &values, rows, weight: Some(&weight), bias: None, gate: None, output_gate: None };
    for strategy in [ExpandStrategy::Fused, ExpandStrategy::Pooled(ProjectStrategy::Tile)] {
        poison(&client, 1 << 24);
        let found = expand(&client, &chosen, &memory, strategy).unwrap();
        assert_rows(&read_f32(&client, &found), |row| 2.0 * number(row) * number(row % 3));
    }
}
