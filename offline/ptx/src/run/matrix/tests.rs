//! Products against plain sums of doubles: `wmma` in every shape, layout, type and stride, `mma.sync` with the lanes' elements placed by
//! the manual's formulas.

use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::program::Op;
use crate::program::fragment::Number;
use crate::program::matrix::Matrix;
use crate::testing;

/// A number's bits in memory.
fn encoded(number: Number, value: f64) -> Vec<u8> {
    match number {
        Number::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
        Number::Bf16 => bf16::from_f64(value).to_le_bytes().to_vec(),
        Number::Tf32 | Number::F32 => (value as f32).to_le_bytes().to_vec(),
        Number::S8 => (value as i8).to_le_bytes().to_vec(),
        Number::U8 => (value as u8).to_le_bytes().to_vec(),
        Number::S32 => (value as i32).to_le_bytes().to_vec(),
    }
}

fn decoded(number: Number, bytes: &[u8]) -> f64 {
    let word = bytes.try_into().map(u32::from_le_bytes);
    let half = bytes.try_into().map(u16::from_le_bytes);
    match number {
        Number::F16 => f16::from_bits(half.unwrap()).to_f64(),
        Number::Bf16 => bf16::from_bits(half.unwrap()).to_f64(),
        Number::Tf32 | Number::F32 => f32::from_bits(word.unwrap()).into(),
        Number::S8 => (bytes[0] as i8).into(),
        Number::U8 => bytes[0].into(),
        Number::S32 => (word.unwrap() as i32).into(),
    }
}

fn name(number: Number) -> &'static str {
    match number {
        Number::F16 => "f16",
        Number::Bf16 => "bf16",
        Number::Tf32 => "tf32",
        Number::F32 => "f32",
        Number::S8 => "s8",
        Number::U8 => "u8",
        Number::S32 => "s32",
    }
}

/// Numbers that every type holds as they are, so that sums of their products are exact in doubles.
fn drawn(number: Number, random: &mut StdRng) -> f64 {
    match number {
        Number::U8 => f64::from(random.random_range(0..200)),
        Number::S8 | Number::S32 => f64::from(random.random_range(-100..100)),
        _ => f64::from(random.random_range(-100..100)) / 16.0,
    }
}

/// A matrix by rows.
struct Plain {
    columns: usize,
    number: Number,
    values: Vec<f64>,
}

impl Plain {
    fn drawn(number: Number, rows: usize, columns: usize, random: &mut StdRng) -> Self {
        Self { columns, number, values: (0..rows * columns).map(|_| drawn(number, random)).collect() }
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.columns + column]
    }

    /// Its bytes with lines that are rows or columns, `stride` numbers apart.
    fn stored(&self, by_rows: bool, stride: usize) -> Vec<u8> {
        let rows = self.values.len() / self.columns;
        let (lines, length) = if by_rows { (rows, self.columns) } else { (self.columns, rows) };
        let value = |line, at| if by_rows { self.at(line, at) } else { self.at(at, line) };
        let number = |at: usize| {
            let (line, at) = (at / stride, at % stride);
            encoded(self.number, if at < length { value(line, at) } else { 77.0 })
        };
        (0..lines * stride).flat_map(number).collect()
    }
}

fn line(by_rows: bool, rows: usize, columns: usize) -> usize {
    if by_rows { columns } else { rows }
}

fn layout(by_rows: bool) -> &'static str {
    if by_rows { "row" } else { "col" }
}

/// `{%r5, %r6}`
fn registers(first: usize, count: usize) -> String {
    let names: Vec<String> = (first..first + count).map(|at| format!("%r{at}")).collect();
    format!("{{{}}}", names.join(", "))
}

/// A kernel with `wmma`: registers that the manual's table asks for of a, b, c and d.
struct Wmma {
    shape: [usize; 3],
    /// d, a, b, c
    types: [Number; 4],
    registers: [usize; 4],
}

impl Wmma {
    fn all() -> Vec<Self> {
        use Number::{Bf16, F16, F32, S8, S32, Tf32, U8};
        let mut all = vec![Self { shape: [16, 16, 8], types: [F32, Tf32, Tf32, F32], registers: [8, 4, 4, 8] }];
        for (shape, small_a, small_b) in [([16, 16, 16], 4, 4), ([32, 8, 16], 8, 2), ([8, 32, 16], 2, 8)] {
            let sum = |number| if number == F16 { 4 } else { 8 };
            for (d, c) in [(F32, F32), (F16, F16), (F32, F16), (F16, F32)] {
                all.push(Self { shape, types: [d, F16, F16, c], registers: [sum(d), 8, 8, sum(c)] });
            }
            all.push(Self { shape, types: [F32, Bf16, Bf16, F32], registers: [8, small_a, small_b, 8] });
            for byte in [S8, U8] {
                all.push(Self { shape, types: [S32, byte, byte, S32], registers: [8, small_a / 2, small_b / 2, 8] });
            }
        }
        all
    }

    fn shape(&self) -> String {
        let [m, n, k] = self.shape;
        format!("m{m}n{n}k{k}")
    }

    /// Loads a, b and c from the first three buffers, multiplies, stores into the fourth.
    fn body(&self, layouts: [bool; 4], strides: [Option<usize>; 4], space: &str) -> String {
        let shape = self.shape();
        let [d, a, b, c] = self.types;
        let stride = |at: usize| strides[at].map_or(String::new(), |stride| format!(", {stride}"));
        let [in_d, in_a, in_b, in_c] = [0, 1, 2, 3].map(|at| registers([30, 0, 10, 20][at], self.registers[at]));
        let load = |which: &str, at: usize, number, into: &str| {
            let place = ["", "%a0", "%a1", "%a2"][at];
            let (layout, stride) = (layout(layouts[at]), stride(at));
            format!(
                "wmma.load.{which}.sync.aligned.{layout}.{shape}{space}.{} {into}, [{place}]{stride};\n",
                name(number)
            )
        };
        let types = match a {
            Number::F16 => format!("{}.{}", name(d), name(c)),
            _ => format!("{}.{}.{}.{}", name(d), name(a), name(b), name(c)),
        };
        let (row_a, row_b) = (layout(layouts[1]), layout(layouts[2]));
        load("a", 1, a, &in_a)
            + &load("b", 2, b, &in_b)
            + &load("c", 3, c, &in_c)
            + &format!("wmma.mma.sync.aligned.{row_a}.{row_b}.{shape}.{types} {in_d}, {in_a}, {in_b}, {in_c};\n")
            + &format!(
                "wmma.store.d.sync.aligned.{}.{shape}{space}.{} [%a3], {in_d}{};\n",
                layout(layouts[0]),
                name(d),
                stride(0)
            )
    }

    fn check(&self, layouts: [bool; 4], padded: bool, space: &str, random: &mut StdRng) {
        let [m, n, k] = self.shape;
        let [d, a, b, c] = self.types;
        let (a, b, c) = (Plain::drawn(a, m, k, random), Plain::drawn(b, k, n, random), Plain::drawn(c, m, n, random));
        let length = [(m, n), (m, k), (k, n), (m, n)];
        let length: [usize; 4] = std::array::from_fn(|at| line(layouts[at], length[at].0, length[at].1));
        let strides = length.map(|length| if padded { length + 32 } else { length });
        let mut buffers = vec![
            a.stored(layouts[1], strides[1]),
            b.stored(layouts[2], strides[2]),
            c.stored(layouts[3], strides[3]),
            Plain { columns: n, number: d, values: vec![0.0; m * n] }.stored(layouts[0], strides[0]),
        ];
        let body = self.body(layouts, strides.map(|stride| padded.then_some(stride)), space);
        testing::run(&body, &mut buffers).unwrap_or_else(|stop| panic!("{stop:?}\n{body}"));
        let sum = |row, column| (0..k).map(|at| a.at(row, at) * b.at(at, column)).sum::<f64>() + c.at(row, column);
        let values = (0..m * n).map(|at| sum(at / n, at % n)).collect();
        let expected = Plain { columns: n, number: d, values }.stored(layouts[0], strides[0]);
        assert_eq!(buffers[3], expected, "{body}");
    }
}

#[test]
fn wmma_products() {
    let mut random = StdRng::seed_from_u64(1);
    for wmma in Wmma::all() {
        for layouts in 0..16u32 {
            let layouts = std::array::from_fn(|at| layouts >> at & 1 == 1);
            wmma.check(layouts, false, ".global", &mut random);
            wmma.check(layouts, true, "", &mut random);
        }
    }
}

/// Registers of `lanes` by the formulas of the manual: where each lane's elements lie.
fn placed(matrix: &Plain, elements: usize, place: impl Fn(usize, usize) -> (usize, usize)) -> Vec<u8> {
    let places = (0..32).flat_map(|lane| (0..elements).map(move |at| (lane, at)));
    let value = |(lane, at)| {
        let (row, column) = place(lane, at);
        encoded(matrix.number, matrix.at(row, column))
    };
    places.flat_map(value).collect()
}

/// Rows and columns of a lane's elements of a and b by section 9.7.14.5 (7 to 10): group `lane >> 2`, thread in group `lane % 4`.
fn factors(bytes: usize, k: usize, lane: usize, at: usize) -> ((usize, usize), (usize, usize)) {
    let (group, thread) = (lane >> 2, lane % 4);
    match (bytes, k) {
        (4, 4) => ((group + 8 * at, thread), (thread, group)),
        (4, _) => (
            (if at.is_multiple_of(2) { group } else { group + 8 }, thread + if at >= 2 { 4 } else { 0 }),
            (thread + 4 * at, group),
        ),
        (2, 8) => ((if at < 2 { group } else { group + 8 }, thread * 2 + (at & 1)), (thread * 2 + at, group)),
        (2, _) => {
            let row = if at < 2 || (4..6).contains(&at) { group } else { group + 8 };
            let column = if at < 4 { thread * 2 + (at & 1) } else { thread * 2 + (at & 1) + 8 };
            let second = if at < 2 { thread * 2 + (at & 1) } else { thread * 2 + (at & 1) + 8 };
            ((row, column), (second, group))
        }
        (_, 16) => ((if at < 4 { group } else { group + 8 }, thread * 4 + (at & 3)), (thread * 4 + (at & 3), group)),
        _ => {
            let row = if at < 4 || (8..12).contains(&at) { group } else { group + 8 };
            let column = if at < 8 { thread * 4 + (at & 3) } else { thread * 4 + (at & 3) + 16 };
            let second = if at < 4 { thread * 4 + (at & 3) } else { thread * 4 + (at & 3) + 16 };
            ((row, column), (second, group))
        }
    }
}

/// Rows and columns of a lane's elements of c and d.
fn sums(lane: usize, at: usize) -> (usize, usize) {
    (if at < 2 { lane >> 2 } else { (lane >> 2) + 8 }, lane % 4 * 2 + (at & 1))
}

/// Loads a lane's registers from a buffer that holds them lane by lane.
fn filled(buffer: usize, first: usize, count: usize) -> String {
    let mut text = format!("mad.wide.u32 %rd1, %r500, {}, %a{buffer};\n", count * 4);
    (0..count).for_each(|at| text += &format!("ld.global.u32 %r{}, [%rd1+{}];\n", first + at, at * 4));
    text
}

fn mma_body(k: usize, [d, a, b, c]: [Number; 4], counts: [usize; 4], modifier: &str) -> String {
    let [in_d, in_a, in_b, in_c] = [0, 1, 2, 3].map(|at| registers([30, 0, 10, 20][at], counts[at]));
    let types = format!("{}.{}.{}.{}", name(d), name(a), name(b), name(c));
    let mut text = "mov.u32 %r500, %tid.x;\n".to_string();
    text += &(filled(0, 0, counts[1]) + &filled(1, 10, counts[2]) + &filled(2, 20, counts[3]));
    text += &format!("mma.sync.aligned.m16n8k{k}.row.col{modifier}.{types} {in_d}, {in_a}, {in_b}, {in_c};\n");
    text += &format!("mad.wide.u32 %rd1, %r500, {}, %a3;\n", counts[0] * 4);
    (0..counts[0]).for_each(|at| text += &format!("st.global.u32 [%rd1+{}], %r{};\n", at * 4, 30 + at));
    text
}

/// Shapes by depth, with the types of d, a, b, c and the registers that the manual's tables ask for.
fn mma_forms() -> Vec<(usize, [Number; 4], [usize; 4])> {
    use Number::{Bf16, F16, F32, S8, S32, Tf32, U8};
    let mut all = vec![];
    for (k, a, b) in [(8, 2, 1), (16, 4, 2)] {
        all.push((k, [F32, F16, F16, F32], [4, a, b, 4]));
        all.push((k, [F16, F16, F16, F16], [2, a, b, 2]));
        all.push((k, [F32, Bf16, Bf16, F32], [4, a, b, 4]));
    }
    for (k, a, b) in [(4, 2, 1), (8, 4, 2)] {
        all.push((k, [F32, Tf32, Tf32, F32], [4, a, b, 4]));
    }
    for (k, a, b) in [(16, 2, 1), (32, 4, 2)] {
        for (first, second) in [(S8, S8), (S8, U8), (U8, S8), (U8, U8)] {
            all.push((k, [S32, first, second, S32], [4, a, b, 4]));
        }
    }
    all
}

#[test]
fn mma_products() {
    let mut random = StdRng::seed_from_u64(2);
    for (k, types, counts) in mma_forms() {
        let [d, a, b, c] = types;
        let (a, b) = (Plain::drawn(a, 16, k, &mut random), Plain::drawn(b, k, 8, &mut random));
        let c = Plain::drawn(c, 16, 8, &mut random);
        let size = a.number.size();
        let held = 4 / size;
        let mut buffers = vec![
            placed(&a, counts[1] * held, |lane, at| factors(size, k, lane, at).0),
            placed(&b, counts[2] * held, |lane, at| factors(size, k, lane, at).1),
            placed(&c, 4, sums),
            vec![0; counts[0] * 4 * 32],
        ];
        let body = mma_body(k, types, counts, "");
        testing::run(&body, &mut buffers).unwrap_or_else(|stop| panic!("{stop:?}\n{body}"));
        let sum = |row, column| (0..k).map(|at| a.at(row, at) * b.at(at, column)).sum::<f64>() + c.at(row, column);
        let expected = Plain { columns: 8, number: d, values: (0..128).map(|at| sum(at / 8, at % 8)).collect() };
        assert_eq!(buffers[3], placed(&expected, 4, sums), "{body}");
    }
}

/// Runs a product of matrices of one number each.
fn constant(k: usize, types: [Number; 4], counts: [usize; 4], [a, b, c]: [f64; 3], modifier: &str) -> f64 {
    let fill = |number: Number, value, count: usize| encoded(number, value).repeat(count * 4 * 32 / number.size());
    let [d, in_a, in_b, in_c] = types;
    let mut buffers =
        vec![fill(in_a, a, counts[1]), fill(in_b, b, counts[2]), fill(in_c, c, counts[3]), vec![0; counts[0] * 4 * 32]];
    testing::run(&mma_body(k, types, counts, modifier), &mut buffers).unwrap();
    decoded(d, &buffers[3][..d.size()])
}

#[test]
fn sums_of_integers_wrap_or_saturate() {
    let (types, counts) = ([Number::S32, Number::S8, Number::S8, Number::S32], [4, 4, 2, 4]);
    let sum = |c, modifier| constant(32, types, counts, [100.0, 100.0, c], modifier);
    let most = f64::from(i32::MAX);
    assert_eq!(sum(most, ".satfinite"), most);
    assert_eq!(sum(most, ""), f64::from(i32::MAX.wrapping_add(320_000)));
    assert_eq!(sum(-5.0, ".satfinite"), 319_995.0);
}

#[test]
fn sums_are_rounded_once() {
    use Number::{F16, F32, Tf32};
    // 16 products of 2^-14 each and 2048 of which f16 knows every second number: 2048 + 2^-10 is nearer to 2048, and exact in f32.
    let small = f64::from(2.0f32.powi(-7));
    assert_eq!(constant(16, [F32, F16, F16, F32], [4, 4, 2, 4], [small, small, 2048.0], ""), 2048.0 + 2.0f64.powi(-10));
    assert_eq!(constant(16, [F16; 4], [2, 4, 2, 2], [small, small, 2048.0], ""), 2048.0);
    assert_eq!(constant(16, [F16; 4], [2, 4, 2, 2], [0.265_625, 0.25, 2048.0], ""), 2050.0);
    // Infinities, NaNs and numbers below the normal ones.
    assert!(constant(16, [F32, F16, F16, F32], [4, 4, 2, 4], [f64::INFINITY, 0.0, 0.0], "").is_nan());
    assert!(constant(16, [F16; 4], [2, 4, 2, 2], [f64::NAN, 0.0, 0.0], "").is_nan());
    assert_eq!(constant(16, [F32, F16, F16, F32], [4, 4, 2, 4], [-1.0, f64::INFINITY, 0.0], ""), f64::NEG_INFINITY);
    let least = 2.0f64.powi(-24);
    assert_eq!(constant(16, [F32, F16, F16, F32], [4, 4, 2, 4], [3.0 * least, 1.0, 0.0], ""), 48.0 * least);
    assert_eq!(constant(16, [F16; 4], [2, 4, 2, 2], [300.0, 300.0, 0.0], ""), f64::INFINITY);
    // The lowest bits of a number of 32 bits are not looked at.
    let more = f64::from(1.0f32 + f32::EPSILON);
    assert_eq!(constant(8, [F32, Tf32, Tf32, F32], [4, 4, 2, 4], [more, more, 0.0], ""), 8.0);
}

/// Of accumulators the elements may be changed one by one, and be cast: the same lane holds the same ones in each type.
#[test]
fn elements_of_sums_can_be_changed() {
    let mut random = StdRng::seed_from_u64(3);
    let c = Plain::drawn(Number::F32, 16, 16, &mut random);
    let mut buffers = vec![c.stored(true, 16), vec![0; 512]];
    let mut body =
        "wmma.load.c.sync.aligned.row.m16n16k16.global.f32 {%f0, %f1, %f2, %f3, %f4, %f5, %f6, %f7}, [%a0];\n"
            .to_string();
    for pair in 0..4 {
        for half in 0..2 {
            body += &format!("add.f32 %f{0}, %f{0}, 0f3F800000;\n", 2 * pair + half);
            body += &format!("cvt.rn.f16.f32 %h{half}, %f{};\n", 2 * pair + half);
        }
        body += &format!("mov.b32 %r{pair}, {{%h0, %h1}};\n");
    }
    body += "wmma.store.d.sync.aligned.col.m16n16k16.global.f16 [%a1], {%r0, %r1, %r2, %r3};\n";
    testing::run(&body, &mut buffers).unwrap();
    let values = c.values.iter().map(|value| value + 1.0).collect();
    assert_eq!(buffers[1], Plain { columns: 16, number: Number::F16, values }.stored(false, 16));
}

#[test]
fn products_are_told() {
    let body = mma_body(16, [Number::F32, Number::Bf16, Number::Bf16, Number::F32], [4, 4, 2, 4], "");
    let program = testing::program(&body, 4).unwrap();
    let found = program.code.iter().find_map(|it| match &it.op {
        Op::Matrix(matrix) => Matrix::products(matrix),
        _ => None,
    });
    let found = found.unwrap();
    assert_eq!((found.m, found.n, found.k), (16, 8, 16));
    assert_eq!((found.input, found.output), (Number::Bf16, Number::F32));
}

#[test]
fn what_the_manual_does_not_have_is_not_known() {
    let four = registers(0, 4);
    for text in [
        format!("mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {four}, {four}, {{%r0, %r1}}, {four};"),
        format!("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {four}, {four}, {four}, {four};"),
        format!("mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {four}, {four}, {{%r0, %r1}}, {four};"),
        format!("mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {four}, {four}, {{%r0, %r1}}, {four};"),
        format!("mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {four}, {four}, {{%r0, %r1}}, {four};"),
        format!("wmma.load.a.sync.aligned.row.m16n16k16.f16 {four}, [%a0];"),
        format!("wmma.load.c.sync.aligned.row.m16n16k16.bf16 {four}, [%a0];"),
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0}, [%r1];".to_string(),
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8 {%r0}, [%r1];".to_string(),
    ] {
        assert!(testing::program(&text, 1).is_err(), "{text}");
    }
}
