//! Random numbers that the device makes: spread over their range, the same for the same seed.

use ultramem::{ElementType, kernels::random};

use crate::device::{client, poison, read, types};

#[test]
fn random_numbers_are_spread_and_hang_on_the_seed() {
    let draw = |seed, dtype| {
        poison(&client(), 1 << 18);
        read(&random(&client(), "numbers", &[333, 101], dtype, 2.0, seed).unwrap())
    };
    for (dtype, _) in types() {
        let numbers = draw(1, dtype);
        assert!(numbers.iter().all(|x| (-2.0..=2.0).contains(x)), "{dtype}");
        let mean = numbers.iter().sum::<f32>() / numbers.len() as f32;
        let square = numbers.iter().map(|x| x * x).sum::<f32>() / numbers.len() as f32;
        // 2/√3 is the deviation of one number: the mean of 33,633 is off by 0.006 of it, the mean square by less.
        assert!(mean.abs() < 0.04 && (square - 4.0 / 3.0).abs() < 0.04, "{dtype}: {mean}, {square}");
        assert_eq!(numbers, draw(1, dtype));
        let same = numbers.iter().zip(draw(2, dtype)).filter(|(a, b)| **a == *b).count();
        assert!(same < numbers.len() / 100, "{same} numbers of another seed are the same");
    }
}

#[test]
fn no_numbers_are_a_tensor_too() {
    let none = random(&client(), "table", &[3, 0], ElementType::F32, 1.0, 1).unwrap();
    assert_eq!(none.shape().to_vec(), [3, 0]);
}
