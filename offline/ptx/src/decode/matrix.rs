//! Which instruction of the matrix units an opcode is. What follows the name may be in any order; what is left over is not known.

use super::reader::Operands;
use crate::operand::{Source, Vector};
use crate::parse::opcode::space;
use crate::program::fragment::{Fragment, Number};
use crate::program::matrix::{Matrix, Product, Products, Tile};

/// The parts of an opcode that are not read yet.
struct Words<'a>(Vec<&'a str>);

impl<'a> Words<'a> {
    /// The first that `read` makes something of.
    fn take<T>(&mut self, read: impl Fn(&'a str) -> Option<T>) -> Option<T> {
        let (at, found) = self.0.iter().enumerate().find_map(|(at, word)| Some((at, read(word)?)))?;
        self.0.remove(at);
        Some(found)
    }

    fn has(&mut self, word: &str) -> bool {
        self.take(|it| (it == word).then_some(())).is_some()
    }

    /// Whether the next layout is that of rows.
    fn by_rows(&mut self) -> Option<bool> {
        self.take(|word| match word {
            "row" => Some(true),
            "col" => Some(false),
            _ => None,
        })
    }

    fn number(&mut self) -> Option<Number> {
        self.take(|word| match word {
            "f16" => Some(Number::F16),
            "bf16" => Some(Number::Bf16),
            "tf32" => Some(Number::Tf32),
            "f32" => Some(Number::F32),
            "s8" => Some(Number::S8),
            "u8" => Some(Number::U8),
            "s32" => Some(Number::S32),
            _ => None,
        })
    }

    /// `m16n8k16`
    fn shape(&mut self) -> Option<[usize; 3]> {
        self.take(|word| {
            let (m, rest) = word.strip_prefix('m')?.split_once('n')?;
            let (n, k) = rest.split_once('k')?;
            Some([m.parse().ok()?, n.parse().ok()?, k.parse().ok()?])
        })
    }

    /// Whether nothing is left but what says that the warp executes it together and where memory is.
    fn done(mut self) -> bool {
        let together = self.has("sync") && self.has("aligned");
        self.take(|word| ["shared", "shared::cta", "global"].contains(&word).then_some(()));
        together && self.0.is_empty()
    }
}

/// The instruction that an opcode names.
pub fn decode(parts: &[&str], operands: &mut Operands<'_>) -> Option<Matrix> {
    let mut words = Words(parts[1..].to_vec());
    match parts[0] {
        "wmma" if words.has("load") => wmma_load(parts, words, operands),
        "wmma" if words.has("store") => wmma_store(parts, words, operands),
        "wmma" if words.has("mma") => wmma(words, operands),
        "mma" => mma(words, operands),
        "ldmatrix" | "stmatrix" => rows(parts, words, operands),
        "movmatrix" => {
            let known = words.has("m8n8") && words.has("trans") && words.has("b16") && words.done();
            let (target, source) = (operands.register()?, operands.source()?);
            known.then_some(Matrix::Transpose(target, source))
        }
        _ => None,
    }
}

/// Whether `wmma` has the shape.
fn wmma_shape(shape: [usize; 3], input: Number) -> bool {
    match input {
        Number::Tf32 => shape == [16, 16, 8],
        Number::F16 | Number::Bf16 | Number::S8 | Number::U8 => {
            [[16, 16, 16], [32, 8, 16], [8, 32, 16]].contains(&shape)
        }
        Number::F32 | Number::S32 => false,
    }
}

/// A factor of `wmma`: of numbers of 16 bits after IEEE 754 each lane has 8 registers, whatever the shape.
fn wmma_factor(fragment: Fragment) -> Fragment {
    if fragment.number == Number::F16 { fragment.in_registers(8) } else { fragment }
}

fn wmma_load(parts: &[&str], mut words: Words<'_>, operands: &mut Operands<'_>) -> Option<Matrix> {
    let which = words.take(|word| ["a", "b", "c"].into_iter().find(|it| *it == word))?;
    let (by_rows, shape, number) = (words.by_rows()?, words.shape()?, words.number()?);
    let [m, n, k] = shape;
    // CubeCL names numbers of 32 bits as they are in memory.
    let number = if number == Number::F32 && which != "c" { Number::Tf32 } else { number };
    let (fragment, known) = match which {
        "a" => (wmma_factor(Fragment::first(number, m, k)), wmma_shape(shape, number)),
        "b" => (wmma_factor(Fragment::second(number, k, n)), wmma_shape(shape, number)),
        _ => (Fragment::sum(number, m, n), sums(shape, number)),
    };
    let (targets, address, stride) = (operands.targets()?, operands.address()?, operands.optional()?);
    let known = known && words.done() && targets.len() == fragment.registers;
    known.then_some(Matrix::Load(Tile { fragment, by_rows, space: space(parts), address, stride }, targets))
}

/// Whether a product of `wmma` may be such numbers.
fn sums(shape: [usize; 3], number: Number) -> bool {
    match number {
        Number::F16 | Number::S32 => wmma_shape(shape, Number::F16),
        Number::F32 => wmma_shape(shape, Number::F16) || wmma_shape(shape, Number::Tf32),
        _ => false,
    }
}

fn wmma_store(parts: &[&str], mut words: Words<'_>, operands: &mut Operands<'_>) -> Option<Matrix> {
    let known = words.has("d");
    let (by_rows, shape, number) = (words.by_rows()?, words.shape()?, words.number()?);
    let fragment = Fragment::sum(number, shape[0], shape[1]);
    let (address, sources, stride) = (operands.address()?, operands.sources()?, operands.optional()?);
    let known = known && sums(shape, number) && words.done() && sources.len() == fragment.registers;
    known.then_some(Matrix::Store(Tile { fragment, by_rows, space: space(parts), address, stride }, sources))
}

/// The types of a product: d, a, b, c. Where only two are named both factors are of 16 bits after IEEE 754.
fn types(words: &mut Words<'_>) -> Option<[Number; 4]> {
    let (first, second) = (words.number()?, words.number()?);
    match words.number() {
        None => Some([first, Number::F16, Number::F16, second]),
        Some(third) => Some([first, second, third, words.number()?]),
    }
}

/// Whether matrix units take factors of these types and sum them up in these.
fn summed([d, a, b, c]: [Number; 4]) -> bool {
    let float = |number| matches!(number, Number::F16 | Number::F32);
    let byte = |number| matches!(number, Number::S8 | Number::U8);
    match a {
        Number::F16 => b == a && float(c) && float(d),
        Number::Bf16 | Number::Tf32 => b == a && c == Number::F32 && d == c,
        Number::S8 | Number::U8 => byte(b) && c == Number::S32 && d == c,
        Number::F32 | Number::S32 => false,
    }
}

fn wmma(mut words: Words<'_>, operands: &mut Operands<'_>) -> Option<Matrix> {
    // Layouts are those of memory: registers hold the same elements whatever it is.
    words.by_rows()?;
    words.by_rows()?;
    let (shape, saturates) = (words.shape()?, words.has("satfinite"));
    let types = types(&mut words)?;
    let known = summed(types) && wmma_shape(shape, types[1]) && words.done();
    let [d, a, b, c] = types;
    let [m, n, k] = shape;
    let factors = [wmma_factor(Fragment::first(a, m, k)), wmma_factor(Fragment::second(b, k, n))];
    let sums = [Fragment::sum(c, m, n), Fragment::sum(d, m, n)];
    known.then(|| product(shape, factors, sums, saturates, operands))?
}

fn mma(mut words: Words<'_>, operands: &mut Operands<'_>) -> Option<Matrix> {
    let layouts = words.by_rows()? && !words.by_rows()?;
    let (shape, saturates) = (words.shape()?, words.has("satfinite"));
    let types = types(&mut words)?;
    let [d, a, b, c] = types;
    let [m, n, k] = shape;
    let depths = match a {
        Number::Tf32 => [4, 8],
        Number::S8 | Number::U8 => [16, 32],
        _ => [8, 16],
    };
    let known = layouts && [m, n] == [16, 8] && depths.contains(&k) && summed(types) && c == d && words.done();
    let factors = || [Fragment::first(a, m, k), Fragment::second(b, k, n)];
    let sums = || [Fragment::sum(c, m, n), Fragment::sum(d, m, n)];
    known.then(|| product(shape, factors(), sums(), saturates, operands))?
}

fn product(
    [m, n, k]: [usize; 3],
    [first, second]: [Fragment; 2],
    [added, sum]: [Fragment; 2],
    saturates: bool,
    operands: &mut Operands<'_>,
) -> Option<Matrix> {
    let d: Vector = operands.targets()?;
    let [a, b, c]: [Box<[Source]>; 3] = [operands.sources()?, operands.sources()?, operands.sources()?];
    let fits = d.len() == sum.registers
        && a.len() == first.registers
        && b.len() == second.registers
        && c.len() == added.registers;
    let products = Products { m, n, k, input: first.number, output: sum.number };
    let (a, b, c, d) = ((first, a), (second, b), (added, c), (sum, d));
    fits.then(|| Matrix::Product(Box::new(Product { products, a, b, c, d, saturates })))
}

/// `ldmatrix` and `stmatrix`.
fn rows(parts: &[&str], mut words: Words<'_>, operands: &mut Operands<'_>) -> Option<Matrix> {
    let shape = words.has("m8n8") && words.has("b16");
    let count = words.take(|word| match word {
        "x1" => Some(1),
        "x2" => Some(2),
        "x4" => Some(4),
        _ => None,
    })?;
    let transposed = words.has("trans");
    if !(shape && words.done()) {
        return None;
    }
    if parts[0] == "ldmatrix" {
        let (targets, address) = (operands.targets()?, operands.address()?);
        (targets.len() == count).then_some(Matrix::LoadRows(space(parts), transposed, targets, address))
    } else {
        let (address, sources) = (operands.address()?, operands.sources()?);
        (sources.len() == count).then_some(Matrix::StoreRows(space(parts), transposed, sources, address))
    }
}
