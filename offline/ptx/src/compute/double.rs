//! Arithmetic of `f64`, which rounds to nearest (PTX ISA 8.7, section 9.7.3); the other directions are not known here.

use super::arithmetic::Arithmetic;
use super::function::Function;
use super::lanewise::op;

/// The function of an opcode of arithmetic of `f64`.
pub(super) fn find(name: &str, middle: &[&str], kind: &str) -> Option<Function> {
    if kind != "f64" {
        return None;
    }
    match (name, middle) {
        ("add", [] | ["rn"]) => Some(op!(|a: f64, b: f64| -> f64 { a + b })),
        ("sub", [] | ["rn"]) => Some(op!(|a: f64, b: f64| -> f64 { a - b })),
        ("mul", [] | ["rn"]) => Some(op!(|a: f64, b: f64| -> f64 { a * b })),
        ("fma" | "mad", ["rn"]) => Some(op!(|a: f64, b: f64, c: f64| -> f64 { a.mul_add(b, c) })),
        ("div", ["rn"]) => Some(op!(|a: f64, b: f64| -> f64 { a / b })),
        ("rcp", ["rn"]) => Some(op!(|a: f64| -> f64 { 1.0 / a })),
        ("sqrt", ["rn"]) => Some(op!(|a: f64| -> f64 { a.sqrt() })),
        ("min", []) => Some(op!(|a: f64, b: f64| -> f64 { a.extreme::<true, false>(b) })),
        ("max", []) => Some(op!(|a: f64, b: f64| -> f64 { a.extreme::<false, false>(b) })),
        ("abs", []) => Some(op!(|a: f64| -> f64 { a.abs() })),
        ("neg", []) => Some(op!(|a: f64| -> f64 { -a })),
        _ => None,
    }
}
