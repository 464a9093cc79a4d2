//! Numbers as people read them: with units, in groups of three digits.

/// Milliseconds with three or four digits.
pub fn ms(ms: f64) -> String {
    let digits = if ms < 10.0 { 3 } else { 1 };
    format!("{ms:.digits$} ms")
}

/// A share.
pub fn percent(share: f64) -> String {
    let digits = if share < 0.0995 { 1 } else { 0 };
    format!("{:.digits$} %", share * 100.0)
}

/// Bytes in the largest decimal unit that keeps a digit before the point.
pub fn bytes(bytes: u64) -> String {
    scaled(bytes, &["B", "kB", "MB", "GB", "TB", "PB", "EB"])
}

/// Bytes in a second.
pub fn rate(gb_s: f64) -> String {
    bytes((gb_s * 1e9) as u64) + "/s"
}

/// Operations.
pub fn flops(flops: u64) -> String {
    scaled(flops, &["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"])
}

fn scaled(number: u64, units: &[&str]) -> String {
    let (mut scaled, mut unit) = (number as f64, 0);
    while scaled >= 999.95 && unit + 1 < units.len() {
        scaled /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 { 0 } else { 1 };
    format!("{scaled:.digits$} {}", units[unit])
}

/// A whole number with commas between groups of three digits.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// "1 token", "2 tokens".
pub fn counted(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", grouped(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!((bytes(999), bytes(123_456), bytes(999_999)), ("999 B".into(), "123.5 kB".into(), "1.0 MB".into()));
        assert_eq!((grouped(999), grouped(1_000), grouped(65_536)), ("999".into(), "1,000".into(), "65,536".into()));
        assert_eq!((ms(1.5), ms(120.04), percent(0.0125)), ("1.500 ms".into(), "120.0 ms".into(), "1.2 %".into()));
    }
}
