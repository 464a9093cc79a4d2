//! Hidden states as text gives them: tokens of few frequent words and many rare ones (Zipf), each its word's direction and something of
//! its own. So rows are chosen again and again, some far more often than others.

use std::collections::HashMap;

use rand::{Rng, SeedableRng, rngs::StdRng};

/// Words that text is drawn from.
const WORDS: usize = 50_000;
/// What a token has of its word, as a share of its variance.
const SHARED: f32 = 0.8;

/// Drawn hidden states `[tokens, hidden_size]`, with numbers of variance 1; the same `seed` gives the same.
pub fn hidden_states(hidden_size: usize, tokens: usize, seed: u64) -> Vec<f32> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut words: HashMap<u64, Vec<f32>> = HashMap::new();
    let mut states = Vec::with_capacity(tokens * hidden_size);
    // The word of rank `r` comes up in proportion to `1 / r`: ranks are uniform in their logarithm.
    for _ in 0..tokens {
        let rank = (random.random::<f64>() * (WORDS as f64).ln()).exp() as u64;
        let word =
            words.entry(rank).or_insert_with(|| uniform(hidden_size, &mut StdRng::seed_from_u64(seed ^ (rank << 32))));
        let own = uniform(hidden_size, &mut random);
        states.extend(word.iter().zip(&own).map(|(word, own)| SHARED.sqrt() * word + (1.0 - SHARED).sqrt() * own));
    }
    states
}

/// Numbers of variance 1.
fn uniform(count: usize, random: &mut StdRng) -> Vec<f32> {
    let side = 3f32.sqrt();
    (0..count).map(|_| random.random_range(-side..side)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequent_words_are_alike_and_variance_is_one() {
        let (width, tokens) = (64, 512);
        let states = hidden_states(width, tokens, 3);
        let variance = states.iter().map(|x| f64::from(x * x)).sum::<f64>() / states.len() as f64;
        assert!((variance - 1.0).abs() < 0.05, "{variance}");
        // Two tokens of one word share most of their variance, others nothing: of 64 numbers with a deviation of an eighth.
        let rows: Vec<&[f32]> = states.chunks(width).collect();
        let alike = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>() / width as f32;
        let mut pairs: Vec<f32> = Vec::new();
        for (at, a) in rows.iter().enumerate() {
            pairs.extend(rows[..at].iter().map(|b| alike(a, b)));
        }
        // Of the chance that two tokens have one word, Σ 1/r² over the square of Σ 1/r, 1.6 / 11.4², by equal shares of the logarithm.
        let same = pairs.iter().filter(|&&it| it > 0.5).count() as f64 / pairs.len() as f64;
        assert!((0.004..0.06).contains(&same), "{same}");
    }
}
