//! Selection by itself, on a device of any kind: rows of every sort against a plain sort, in the order that DESIGN §2 defines.

use cubecl::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use ultramem::kernels::{from_f32, top_m};
use ultramem::reference::selection_order;

/// Kinds of rows: what is drawn at random, and what a selection that guesses would fall for.
pub const KINDS: [&str; 11] = [
    "random",
    "all equal",
    "all NaN",
    "two values",
    "rising",
    "falling",
    "skewed",
    "best last",
    "signs of zero",
    "infinities and NaN",
    "in one lane",
];

/// `count` numbers of a kind, other ones for each seed.
pub fn row(kind: &str, count: usize, keep: usize, seed: u64) -> Vec<f32> {
    let rng = &mut StdRng::seed_from_u64(seed);
    let mut random: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect();
    match kind {
        "random" => {}
        "all equal" => random.fill(0.5),
        "all NaN" => random.fill(f32::NAN),
        "two values" => random.iter_mut().for_each(|x| *x = x.signum()),
        "rising" => random.sort_by(f32::total_cmp),
        "falling" => random.sort_by(|a, b| b.total_cmp(a)),
        "skewed" => random.iter_mut().for_each(|x| *x = x.signum() * 10f32.powf(30.0 * x.abs())),
        "best last" => random[count - keep..].iter_mut().for_each(|x| *x += 10.0),
        "signs of zero" => random.iter_mut().for_each(|x| *x = if *x > 0.0 { 0.0 } else { -0.0 }),
        "infinities and NaN" => {
            let odd = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.0];
            random.iter_mut().for_each(|x| *x = odd[(x.abs() * 3.999) as usize]);
            random.shuffle(rng);
        }
        // Each lane of a plane of 32 sees four neighbours of 128.
        "in one lane" => {
            random.iter_mut().enumerate().for_each(|(i, x)| *x += if i / 4 % 32 == 7 { i as f32 } else { 0.0 })
        }
        _ => panic!("no rows are {kind}"),
    }
    random
}

/// The positions of the best `keep` of a row, best first.
pub fn best(row: &[f32], keep: usize) -> Vec<u32> {
    let mut positions: Vec<u32> = (0..row.len() as u32).collect();
    positions.sort_by(|&a, &b| selection_order(row[a as usize].into(), row[b as usize].into()).then(a.cmp(&b)));
    positions.truncate(keep);
    positions
}

/// Every kind of row, of `count` numbers of which `keep` are kept, each in a place that the others follow.
pub fn hold<R: Runtime>(client: &ComputeClient<R>, count: usize, keep: usize, seed: u64) {
    let rows: Vec<Vec<f32>> = KINDS.iter().map(|kind| row(kind, count, keep, seed)).collect();
    let scores = from_f32(client, &[rows.len(), count], &rows.concat()).unwrap();
    let found = top_m(client, &scores, keep).unwrap();
    assert_eq!(found.shape().to_vec(), [rows.len(), keep]);
    let bytes = client.read_one(found.handle.clone()).unwrap();
    let found: Vec<u32> = bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    for ((kind, row), found) in KINDS.iter().zip(&rows).zip(found.chunks(keep)) {
        assert_eq!(found, best(row, keep), "{kind}, {keep} of {count}");
    }
}

/// The sizes that are held: rows shorter than a plane's lists and longer, all of a row, one of it, more than a plane ranks by counting.
pub const SIZES: [(usize, usize); 9] =
    [(1, 1), (5, 5), (31, 7), (128, 1), (500, 80), (1616, 80), (1000, 129), (700, 700), (2500, 300)];
