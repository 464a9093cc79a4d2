//! How far results are from what was expected.

use ultramem::reference::{self, Judged};
use ultramem::{MemoryConfig, Weights};

use crate::engine::Outcome;
use crate::failure::{Failure, Result};

/// The largest relative L2 error that counts as agreement in f32.
pub const F32_BOUND: f64 = 1e-5;
/// The same for gradients.
pub const GRADIENT_BOUND: f64 = 1e-4;
/// The largest in f16 and bf16, against the oracle on the same rounded inputs.
pub const HALF_BOUND: f64 = 1e-2;

/// `‖found − expected‖ / ‖expected‖`, or the numerator where everything expected is zero. Places where both hold NaN, or the
/// same infinity, agree; where only one does, the result is not finite.
pub fn relative_l2(found: &[f32], expected: &[f32]) -> f64 {
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&found, &expected) in found.iter().zip(expected) {
        let agree = found == expected || found.is_nan() && expected.is_nan();
        let (found, expected) = (f64::from(found), f64::from(expected));
        difference += if agree { 0.0 } else { (found - expected).powi(2) };
        norm += if expected.is_finite() { expected * expected } else { 0.0 };
    }
    if norm == 0.0 { difference.sqrt() } else { (difference / norm).sqrt() }
}

/// Two totals this close, relative to the largest of their head, are equal but for rounding.
const NEAR: f64 = 1e-5;

/// What a layer gave beside what was expected of it.
pub struct Comparison {
    /// The slots, judged by their scores.
    pub judged: Judged,
    /// The expected output, and, of the tokens that rightly chose other slots, what the oracle gives for those.
    pub output: Option<Vec<f32>>,
    /// The same of the scores.
    pub scores: Option<Vec<f32>>,
}

impl Comparison {
    /// Judges the slots of `outcome` against `slots`.
    pub fn new(
        config: &MemoryConfig,
        weights: &Weights<'_>,
        input: &[f32],
        outcome: &Outcome,
        slots: &[i64],
        (output, scores): (Option<Vec<f32>>, Option<Vec<f32>>),
    ) -> Result<Self> {
        // What is no slot is none of those that were found.
        let slots: Vec<u32> = slots.iter().map(|&slot| u32::try_from(slot).unwrap_or(u32::MAX)).collect();
        if let Some(slot) = slots.iter().find(|&&slot| slot as usize >= config.slots()) {
            return Err(Failure::new(format!("expected slot {slot} is not below {}", config.slots())));
        }
        let judged = reference::judge(config, weights, input, &outcome.slots, &slots, NEAR)?;
        let mut comparison = Self { judged, output, scores };
        if comparison.judged.right() {
            comparison.take_chosen(config, weights, input, &outcome.slots)?;
        }
        Ok(comparison)
    }

    fn take_chosen(
        &mut self,
        config: &MemoryConfig,
        weights: &Weights<'_>,
        input: &[f32],
        slots: &[u32],
    ) -> Result<()> {
        for &token in &self.judged.tokens {
            let (entries, width) = (config.heads * config.top_m, config.hidden_size);
            let row = &input[token * width..][..width];
            let chosen = reference::score_slots(config, weights, row, &slots[token * entries..][..entries])?;
            if let Some(output) = &mut self.output {
                let weighed = reference::weigh(config, weights, row, &chosen)?;
                let expanded = reference::expand(config, weights, row, &chosen.slots, &weighed.scores)?;
                narrow(&expanded, &mut output[token * width..][..width]);
            }
            if let Some(scores) = &mut self.scores {
                let width = entries * config.cores;
                narrow(&chosen.scores, &mut scores[token * width..][..width]);
            }
        }
        Ok(())
    }
}

fn narrow(numbers: &[f64], to: &mut [f32]) {
    for (to, &number) in to.iter_mut().zip(numbers) {
        *to = number as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_is_relative_and_never_hides_nan() {
        assert_eq!(relative_l2(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(relative_l2(&[3.0, 0.0], &[3.0, 4.0]), 0.8);
        assert_eq!(relative_l2(&[2.0], &[0.0]), 2.0);
        assert_eq!(relative_l2(&[f32::NAN, 1.0], &[f32::NAN, 1.0]), 0.0);
        assert!(relative_l2(&[f32::NAN], &[1.0]).is_nan());
        assert!(relative_l2(&[1.0], &[f32::NAN]).is_nan());
        assert!(!relative_l2(&[1.0, 1.0], &[f32::INFINITY, 1.0]).is_finite());
    }
}
