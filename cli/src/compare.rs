//! How far results are from what was expected.

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

/// How many of the slots are the expected ones, in their places.
pub fn equal_slots(found: &[u32], expected: &[i64]) -> usize {
    found.iter().zip(expected).filter(|&(&found, &expected)| i64::from(found) == expected).count()
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

    #[test]
    fn slots_count_where_they_are_equal() {
        assert_eq!(equal_slots(&[1, 2, 3], &[1, 3, 3]), 2);
    }
}
