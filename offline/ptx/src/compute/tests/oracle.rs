//! Rounding by its definition: among all numbers of a format, in order, the two around the exact result, found by
//! comparisons alone.

use std::cmp::Ordering;

/// A format of floating-point numbers.
#[derive(Clone, Copy)]
pub(super) struct Format {
    /// Bits of the fraction.
    fraction: u32,
    /// Bits of the exponent.
    exponent: u32,
    /// The bits after those of the largest number: infinity, if there is one.
    pub infinity: i128,
    /// What a NaN result is.
    pub nan: i128,
}

/// A rounding word: `rn`, `rz`, `rm`, `rp`, `rna`.
pub(super) type Word = &'static str;

/// The format of a type.
pub(super) fn format(kind: &str) -> Format {
    let (fraction, exponent, infinity, nan) = match kind {
        "f16" => (10, 5, 0x7c00, 0x7fff),
        "bf16" => (7, 8, 0x7f80, 0x7fff),
        "tf32" => (10, 8, 0x3_fc00, 0x3_ffff),
        "f32" => (23, 8, 0x7f80_0000, 0x7fff_ffff),
        "f64" => (52, 11, 0x7ff0 << 48, 0x7fff_ffff_ffff_ffff),
        "e4m3" => (3, 4, 0x7f, 0x7f),
        "e5m2" => (2, 5, 0x7c, 0x7f),
        "e2m3" => (3, 2, 0x20, 0x1f),
        "e3m2" => (2, 3, 0x20, 0x1f),
        "e2m1" => (1, 2, 0x8, 0x7),
        _ => panic!("no format {kind}"),
    };
    Format { fraction, exponent, infinity, nan }
}

impl Format {
    /// The smallest number that is not subnormal.
    pub fn normal(self) -> f64 {
        self.magnitude(1 << self.fraction)
    }

    /// The sign bit.
    pub fn sign(self) -> i128 {
        1 << (self.exponent + self.fraction)
    }

    /// The number that a magnitude stands for, as if there were no infinity and no NaN.
    pub fn magnitude(self, bits: i128) -> f64 {
        if self.exponent == 11 {
            return f64::from_bits(bits as u64);
        }
        let (exponent, fraction) = (bits >> self.fraction, bits & ((1 << self.fraction) - 1));
        let bias = (1 << (self.exponent - 1)) - 1;
        let hidden = if exponent == 0 { 0 } else { 1 << self.fraction };
        let power = (exponent.max(1) as i32) - bias - self.fraction as i32;
        (fraction + hidden) as f64 * 2f64.powi(power)
    }

    /// The number that bits stand for.
    pub fn value(self, bits: i128) -> f64 {
        let magnitude = bits & (self.sign() - 1);
        let number = match magnitude.cmp(&self.infinity) {
            Ordering::Less => self.magnitude(magnitude),
            Ordering::Equal => f64::INFINITY,
            Ordering::Greater => f64::NAN,
        };
        if bits & self.sign() == 0 { number } else { -number }
    }

    /// The bits of a number that the format holds, or of infinity or NaN.
    pub fn bits(self, number: f64) -> i128 {
        if number.is_nan() {
            return self.nan;
        }
        if number.is_infinite() {
            return self.infinity | if number < 0.0 { self.sign() } else { 0 };
        }
        round(self, "rz", |candidate| number.partial_cmp(&candidate).expect("no NaN"), number.is_sign_negative())
    }
}

/// The bits of an exact result in a format: `compare` orders it against any number, `negative` is the sign of a result
/// of zero.
pub(super) fn round(format: Format, word: Word, compare: impl Fn(f64) -> Ordering, negative: bool) -> i128 {
    let number = |key: i128| if key < 0 { -format.magnitude(-key) } else { format.magnitude(key) };
    let negative = match compare(0.0) {
        Ordering::Less => true,
        Ordering::Equal => negative,
        Ordering::Greater => false,
    };
    let infinity = format.infinity;
    let (mut low, mut high) = (-infinity - 1, infinity + 1);
    while high - low > 1 {
        let middle = (low + high).div_euclid(2);
        if compare(number(middle)) == Ordering::Less { high = middle } else { low = middle }
    }
    let key =
        if (-infinity..=infinity).contains(&low) && compare(number(low)) == Ordering::Equal && low.abs() < infinity {
            low
        } else {
            let low = low.clamp(-infinity, infinity - 1);
            between(word, low, compare(number(low).midpoint(number(low + 1))))
        };
    key.abs() | if negative { format.sign() } else { 0 }
}

/// Which of two neighbours an exact result between them becomes; `side` is its order against their middle.
fn between(word: Word, low: i128, side: Ordering) -> i128 {
    let high = low + 1;
    let (inner, outer) = if low < 0 { (high, low) } else { (low, high) };
    let even = if low % 2 == 0 { low } else { high };
    match (word, side) {
        ("rm", _) => low,
        ("rp", _) => high,
        ("rz", _) => inner,
        ("rna", Ordering::Equal) => outer,
        ("rn", Ordering::Equal) => even,
        (_, Ordering::Less) => low,
        (_, _) => high,
    }
}

/// A number in 1,088 bits with its point after the 448th from below: sums of two products of `f32` fit exactly.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Fixed([u64; 17]);

impl Fixed {
    /// A number from 2^-448 to 2^600.
    pub fn new(number: f64) -> Self {
        let bits = number.to_bits();
        let mut words = [0; 17];
        if number != 0.0 {
            let place = (bits >> 52 & 0x7ff) as usize + 448 - 1075;
            let significand = u128::from(bits & ((1 << 52) - 1) | 1 << 52) << (place % 64);
            words[place / 64] = significand as u64;
            words[place / 64 + 1] = (significand >> 64) as u64;
        }
        if number < 0.0 { Fixed(words).negated() } else { Fixed(words) }
    }

    /// The sum.
    pub fn plus(self, other: Self) -> Self {
        let mut carry = false;
        Fixed(std::array::from_fn(|index| {
            let (sum, first) = self.0[index].overflowing_add(other.0[index]);
            let (sum, second) = sum.overflowing_add(carry.into());
            carry = first || second;
            sum
        }))
    }

    /// The number with the other sign.
    pub fn negated(self) -> Self {
        let one = Fixed(std::array::from_fn(|index| u64::from(index == 0)));
        Fixed(self.0.map(|word| !word)).plus(one)
    }

    /// How it compares with a number.
    pub fn compare(self, other: f64) -> Ordering {
        let difference = self.plus(Fixed::new(-other));
        match (difference == Fixed([0; 17]), difference.0[16] >> 63) {
            (true, _) => Ordering::Equal,
            (_, 0) => Ordering::Greater,
            (_, _) => Ordering::Less,
        }
    }
}

/// A product plus a third number, rounded; all of formats of 24 bits at most.
pub(super) fn fused(format: Format, word: Word, a: f64, b: f64, c: f64) -> i128 {
    let product = a * b;
    if !(product + c).is_finite() {
        return format.bits(product + c);
    }
    let exact = Fixed::new(product).plus(Fixed::new(c));
    let same_sign = product.is_sign_negative() == c.is_sign_negative();
    let negative_zero = if same_sign { c.is_sign_negative() } else { word == "rm" };
    round(format, word, |candidate| exact.compare(candidate), negative_zero)
}

/// A product, rounded.
pub(super) fn product(format: Format, word: Word, a: f64, b: f64) -> i128 {
    let exact = a * b;
    if !exact.is_finite() {
        return format.bits(exact);
    }
    round(format, word, |candidate| exact.partial_cmp(&candidate).expect("finite"), exact.is_sign_negative())
}

/// A quotient, rounded; of numbers of 24 bits at most.
pub(super) fn quotient(format: Format, word: Word, a: f64, b: f64) -> i128 {
    if !(a / b).is_finite() || b.is_infinite() {
        return format.bits(a / b);
    }
    let order = |candidate: f64| (candidate * b).partial_cmp(&a).expect("finite");
    let compare = |candidate: f64| if b > 0.0 { order(candidate).reverse() } else { order(candidate) };
    round(format, word, compare, (a / b).is_sign_negative())
}

/// A square root, rounded; of a number of 24 bits at most.
pub(super) fn root(format: Format, word: Word, a: f64) -> i128 {
    if a < 0.0 || a.is_nan() || a.is_infinite() || a == 0.0 {
        return format.bits(a.sqrt());
    }
    let compare = |candidate: f64| {
        if candidate < 0.0 { Ordering::Greater } else { a.partial_cmp(&(candidate * candidate)).expect("finite") }
    };
    round(format, word, compare, false)
}

/// An integer, rounded. Middles of numbers of 64 bits are not numbers of 64 bits: there the distances decide.
pub(super) fn integer(format: Format, word: Word, number: i128) -> i128 {
    if (format.exponent, word) == (11, "rn") {
        let (low, high) = (integer(format, "rm", number), integer(format, "rp", number));
        let distance = |bits: i128| (format.value(bits) as i128 - number).abs();
        let even = if low % 2 == 0 { low } else { high };
        return match distance(low).cmp(&distance(high)) {
            Ordering::Less => low,
            Ordering::Equal => even,
            Ordering::Greater => high,
        };
    }
    let compare = |candidate: f64| {
        let whole = candidate as i128;
        number.cmp(&whole).then((whole as f64).partial_cmp(&candidate).expect("no NaN"))
    };
    round(format, word, compare, false)
}

/// A number of 64 bits, rounded.
pub(super) fn number(format: Format, word: Word, number: f64) -> i128 {
    product(format, word, number, 1.0)
}
