//! `atom` and `red`: each operation and type in each space, with all lanes at one place in either order, against a fold over the lanes.

use half::{bf16, f16};

use crate::testing::{self, Accesses, Backwards, WARP, bytes, numbers, program};
use crate::{Chance, Kind, ParseError, Place};

/// An operation: its words after the space, bytes, what is there first, each lane's operand, and what is there afterwards.
struct Case<'a> {
    name: &'a str,
    size: usize,
    first: u64,
    operand: &'a dyn Fn(u64) -> u64,
    after: &'a dyn Fn(u64, u64) -> u64,
}

fn case<'a>(
    (name, size, first): (&'a str, usize, u64),
    operand: &'a dyn Fn(u64) -> u64,
    after: &'a dyn Fn(u64, u64) -> u64,
) -> Case<'a> {
    Case { name, size, first, operand, after }
}

/// What the operation is done to, by space: declarations, its address, and how opcodes name the space. `%a0` has what is there first.
const SPACES: [(&str, &str, &str); 4] = [
    ("", "mov.u64 %rd3, %a0;", ".global"),
    ("", "mov.u64 %rd3, %a0;", ""),
    (".shared .align 16 .b8 tile[16];\n", "mov.u64 %rd3, tile;", ".shared"),
    (".shared .align 16 .b8 tile[16];\n", "cvta.shared.u64 %rd3, tile;", ""),
];

/// Runs an operation in all lanes at one place; what each lane got, and what is there afterwards.
fn run(case: &Case<'_>, space: (&str, &str, &str), keeps: bool, chance: &mut dyn Chance) -> (Vec<u64>, u64) {
    let (declared, place, words) = space;
    let (operand, result, ty) = match case.size {
        2 => ("%h1", "%h2", "u16"),
        4 => ("%r1", "%r2", "u32"),
        _ => ("%rd1", "%rd2", "u64"),
    };
    let operation = match (keeps, case.name.starts_with("cas")) {
        (true, false) => format!("atom{words}.{} {result}, [%rd3], {operand};", case.name),
        (true, true) => format!("atom{words}.{} {result}, [%rd3], 7, {operand};", case.name),
        (false, _) => format!("red{words}.{} [%rd3], {operand};", case.name),
    };
    let body = format!(
        "{declared}{place}\nld.global.u64 %rd4, [%a0];\nst.u64 [%rd3], %rd4;\nmov.u32 %r0, %laneid;\n\
         mad.wide.u32 %rd5, %r0, 8, %a1;\nld.global.{ty} {operand}, [%rd5];\nbar.warp.sync -1;\n{operation}\n\
         st.global.u64 [%rd5], 0;\nst.global.{ty} [%rd5], {result};\nld.u64 %rd4, [%rd3];\nst.global.u64 [%a2], %rd4;\n"
    );
    let body = if words == ".shared" {
        body.replace("st.u64", "st.shared.u64").replace("ld.u64", "ld.shared.u64")
    } else {
        body
    };
    let operands: Vec<u64> = (0..32).map(case.operand).collect();
    let mut buffers = [bytes(&[case.first, 0], u64::to_le_bytes), bytes(&operands, u64::to_le_bytes), vec![0; 8]];
    let kernel = program(&body, 3).unwrap_or_else(|error| panic!("{error}\n{body}"));
    testing::run_in_order(&kernel, WARP, &mut buffers, &mut (), chance)
        .unwrap_or_else(|stop| panic!("{stop:?}\n{body}"));
    (numbers(&buffers[1], u64::from_le_bytes), numbers(&buffers[2], u64::from_le_bytes)[0])
}

/// Checks an operation in all spaces, in both orders, with and without its result.
fn check(case: &Case<'_>) {
    let mask = u64::MAX >> (64 - 8 * case.size);
    let orders: [(bool, &mut dyn Chance); 2] = [(false, &mut ()), (true, &mut Backwards)];
    for (reversed, chance) in orders {
        let (mut there, mut before) = (case.first, vec![0; 32]);
        for at in 0..32 {
            let lane = if reversed { 31 - at } else { at };
            before[lane] = there & mask;
            there = there & !mask | (case.after)(there & mask, (case.operand)(lane as u64) & mask) & mask;
        }
        for space in SPACES {
            let found = run(case, space, true, chance);
            assert_eq!(found, (before.clone(), there), "{} in {space:?}, reversed: {reversed}", case.name);
            if !case.name.starts_with("exch") && !case.name.starts_with("cas") {
                assert_eq!(run(case, space, false, chance).1, there, "red of {} in {space:?}", case.name);
            }
        }
    }
}

/// Different bits of each lane.
fn spread(lane: u64) -> u64 {
    (lane + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(lane as u32)
}

#[test]
fn integers() {
    let sum = |old: u64, it: u64| old.wrapping_add(it);
    for name in ["add.u32", "add.s32", "relaxed.gpu.add.u32", "acq_rel.cta.add.u32"] {
        check(&case((name, 4, 0xffff_fff0), &spread, &sum));
    }
    for name in ["add.u64", "add.s64", "release.sys.add.u64"] {
        check(&case((name, 8, u64::MAX - 5), &spread, &sum));
    }
    for (suffix, size) in [("b32", 4), ("b64", 8)] {
        check(&case((&format!("and.{suffix}"), size, u64::MAX), &|lane| !(3 << (2 * lane)), &|old, it| old & it));
        check(&case((&format!("or.{suffix}"), size, 1 << 33 | 5), &|lane| 1 << (2 * lane), &|old, it| old | it));
        check(&case((&format!("xor.{suffix}"), size, 12345), &spread, &|old, it| old ^ it));
        check(&case((&format!("exch.{suffix}"), size, 12345), &spread, &|_, it| it));
    }
    let (word, long) = (|it: u64| it as u32 as i32, |it: u64| it as i64);
    check(&case(("min.u32", 4, u64::MAX), &spread, &|old, it| old.min(it)));
    check(&case(("max.u32", 4, 0), &spread, &|old, it| old.max(it)));
    check(&case(("min.s32", 4, 5), &spread, &|old, it| word(old).min(word(it)) as u64));
    check(&case(("max.s32", 4, 0x8000_0000), &spread, &|old, it| word(old).max(word(it)) as u64));
    check(&case(("min.u64", 8, u64::MAX), &spread, &|old, it| old.min(it)));
    check(&case(("max.u64", 8, 0), &spread, &|old, it| old.max(it)));
    check(&case(("min.s64", 8, 5), &spread, &|old, it| long(old).min(long(it)) as u64));
    check(&case(("max.s64", 8, 1 << 63), &spread, &|old, it| long(old).max(long(it)) as u64));
}

/// `inc` counts up to the operand and `dec` down from it, again and again.
#[test]
fn counters_wrap() {
    let up = |old: u64, most: u64| if old >= most { 0 } else { old + 1 };
    let down = |old: u64, most: u64| if old == 0 || old > most { most } else { old - 1 };
    for most in [0, 1, 4, 31, 0xffff_ffff] {
        for first in [0, 3, 5, 0xffff_ffff] {
            check(&case(("inc.u32", 4, first), &|_| most, &up));
            check(&case(("dec.u32", 4, first), &|_| most, &down));
        }
    }
    check(&case(("inc.u32", 4, 2), &|lane| lane % 5, &up));
    check(&case(("dec.u32", 4, 2), &|lane| lane % 5, &down));
}

/// A compare-and-swap with seven takes place in the lane that finds one.
#[test]
fn compare_and_swap() {
    let swap = |old: u64, it: u64| if old == 7 { it } else { old };
    for (name, size) in [("cas.b16", 2), ("cas.b32", 4), ("cas.b64", 8)] {
        check(&case((name, size, 7), &|lane| lane + 100, &swap));
        check(&case((name, size, 7), &|lane| if lane % 3 == 0 { lane } else { 7 }, &swap));
        check(&case((name, size, 8), &spread, &swap));
        // What lies above is not compared.
        check(&case((name, size, 7 | 0xab00_0000_0000_0000), &|lane| lane + 100, &swap));
    }
    // Between negative numbers of 16 bits.
    let body = "mov.u16 %h1, -3;\nst.global.u32 [%a0], 0x1234fffd;\natom.global.cas.b16 %h2, [%a0], %h1, -4;\n\
        cvt.u32.u16 %r2, %h2;\nmov.u32 %r1, %laneid;\nsetp.eq.u32 %p0, %r1, 0;\n@%p0 st.global.u32 [%a0+4], %r2;";
    let mut buffers = [vec![0; 8]];
    testing::run(body, &mut buffers).unwrap();
    assert_eq!(numbers(&buffers[0], u32::from_le_bytes), [0x1234_fffc, 0xfffd]);
}

#[test]
fn floats() {
    let small = |lane: u64| u64::from((lane as f32 * 1.37 - 11.0).to_bits());
    let sum32 = |old: u64, it: u64| u64::from((f32::from_bits(old as u32) + f32::from_bits(it as u32)).to_bits());
    check(&case(("add.f32", 4, u64::from(0.1f32.to_bits())), &small, &sum32));
    check(&case(("add.f32", 4, u64::from(1e9f32.to_bits())), &small, &sum32));
    let double = |lane: u64| (lane as f64 * 1.37 - 11.0).to_bits();
    let sum64 = |old: u64, it: u64| (f64::from_bits(old) + f64::from_bits(it)).to_bits();
    check(&case(("add.f64", 8, 0.1f64.to_bits()), &double, &sum64));
    check(&case(("add.f64", 8, 5e-324f64.to_bits()), &|lane| lane, &sum64));
}

/// Sums of two numbers of 16 bits fit `f32` closely enough that rounding twice is rounding once.
#[test]
fn halves_and_pairs() {
    let half = |old: u64, it: u64| {
        let sum = f16::from_bits(old as u16).to_f32() + f16::from_bits(it as u16).to_f32();
        u64::from(f16::from_f32(sum).to_bits())
    };
    let brain = |old: u64, it: u64| {
        let sum = bf16::from_bits(old as u16).to_f32() + bf16::from_bits(it as u16).to_f32();
        u64::from(bf16::from_f32(sum).to_bits())
    };
    let number = |lane: u64| lane as f32 * 0.37 - 4.0;
    let halves = |lane: u64| u64::from(f16::from_f32(number(lane)).to_bits());
    let brains = |lane: u64| u64::from(bf16::from_f32(number(lane)).to_bits());
    check(&case(("add.noftz.f16", 2, halves(40) | 0xabcd_0000), &halves, &half));
    check(&case(("add.noftz.f16", 2, 0x0001), &|lane| 0x03f0 + lane, &half));
    check(&case(("add.noftz.bf16", 2, brains(40) | 0xabcd_0000), &brains, &brain));
    let halves = |lane: u64| halves(lane) | halves(63 - lane) << 16;
    let brains = |lane: u64| brains(lane) | brains(63 - lane) << 16;
    let half = |old: u64, it: u64| half(old & 0xffff, it & 0xffff) | half(old >> 16, it >> 16) << 16;
    let brain = |old: u64, it: u64| brain(old & 0xffff, it & 0xffff) | brain(old >> 16, it >> 16) << 16;
    check(&case(("add.noftz.f16x2", 4, halves(40)), &halves, &half));
    check(&case(("add.noftz.bf16x2", 4, brains(40)), &brains, &brain));
}

/// Sums of `f32` in global memory have no subnormal numbers, those in shared memory do.
#[test]
fn subnormal_sums() {
    let minus_zero = u64::from((-0f32).to_bits());
    // One lane adds to what is there, the others add nothing.
    let found = |first: f32, added: f32, space: usize| {
        let operand = |lane: u64| if lane == 3 { added.to_bits().into() } else { minus_zero };
        run(&case(("add.f32", 4, first.to_bits().into()), &operand, &|old, _| old), SPACES[space], true, &mut ()).1
    };
    let smallest = f32::MIN_POSITIVE;
    // Of subnormal numbers, and of others whose sum is one.
    for (first, added) in [(-1e-40, -1e-40), (smallest, -1.5 * smallest)] {
        assert_eq!([found(first, added, 0), found(first, added, 1)], [minus_zero; 2]);
        let sum = u64::from((first + added).to_bits());
        assert_eq!([found(first, added, 2), found(first, added, 3)], [sum; 2]);
    }
    assert_eq!(found(smallest, -1e-40, 0), u64::from(smallest.to_bits()));
}

#[test]
fn vectors() {
    let float = |at: usize| (at as f32).sqrt();
    for (count, forms) in [(2, ["v2.f32.add", "add.v2.f32"]), (4, ["v4.f32.add", "add.v4.f32"])] {
        let names = |from: usize| {
            let all: Vec<String> = (0..count).map(|at| format!("%f{}", from + at)).collect();
            format!("{{{}}}", all.join(", "))
        };
        for form in forms {
            let (old, operand) = (names(10), names(20));
            let operation = [
                format!("atom.global.{form} {old}, [%a0], {operand};"),
                format!("red.global.{form} [%a0], {operand};"),
                format!("red.relaxed.gpu.global.{form} [%a0], {operand};"),
            ];
            for (at, operation) in operation.iter().enumerate() {
                let body = format!(
                    "mov.u32 %r0, %laneid;\nmad.wide.u32 %rd5, %r0, {}, %a1;\nld.global.v{count}.f32 {operand}, [%rd5];\n\
                     {operation}\nst.global.v{count}.f32 [%rd5], {old};\n",
                    4 * count
                );
                let operands: Vec<f32> = (0..32 * count).map(float).collect();
                let mut buffers = [bytes(&[0.5f32; 4][..count], f32::to_le_bytes), bytes(&operands, f32::to_le_bytes)];
                testing::run(&body, &mut buffers).unwrap_or_else(|stop| panic!("{stop:?}\n{body}"));
                let (after, found) =
                    (numbers(&buffers[0], f32::from_le_bytes), numbers(&buffers[1], f32::from_le_bytes));
                for element in 0..count {
                    let mut sum = 0.5;
                    for lane in 0..32 {
                        if at == 0 {
                            assert_eq!(found[lane * count + element], sum, "{operation}");
                        }
                        sum += float(lane * count + element);
                    }
                    assert_eq!(after[element], sum, "{operation}");
                }
            }
        }
    }
}

/// Lanes that are off, and lanes at places of their own.
#[test]
fn lanes_at_their_own_places() {
    let body = "mov.u32 %r0, %laneid;\nsetp.lt.u32 %p0, %r0, 20;\nand.b32 %r1, %r0, 7;\nmad.wide.u32 %rd1, %r1, 4, %a0;\n\
        mad.wide.u32 %rd2, %r0, 4, %a1;\nmov.u32 %r2, 99;\n@%p0 atom.global.add.u32 %r2, [%rd1], 1;\nst.global.u32 [%rd2], %r2;\n";
    let mut buffers = [vec![0; 32], vec![0; 128]];
    testing::run(body, &mut buffers).unwrap();
    assert_eq!(numbers(&buffers[0], u32::from_le_bytes), [3, 3, 3, 3, 2, 2, 2, 2]);
    let found = numbers(&buffers[1], u32::from_le_bytes);
    (0..32).for_each(|lane| assert_eq!(found[lane], if lane < 20 { lane as u32 / 8 } else { 99 }));
}

#[test]
fn what_nobody_asks_for_is_not_read() {
    for (operation, kind, size) in [
        ("atom.global.exch.b32 %r1, [%a0], 5;", Kind::AtomicStore, 4),
        ("atom.global.exch.b64 _, [%a0], 5;", Kind::AtomicStore, 8),
        ("atom.global.exch.b32 %r1, [%a0], 5;\nadd.u32 %r2, %r1, 1;", Kind::Atomic, 4),
        ("atom.global.add.u32 %r1, [%a0], 5;", Kind::Atomic, 4),
        ("atom.global.cas.b32 %r1, [%a0], 5, 6;", Kind::Atomic, 4),
        ("red.global.add.u32 [%a0], 5;", Kind::Atomic, 4),
        ("red.global.or.b64 [%a0], 5;", Kind::Atomic, 8),
        ("red.global.add.v2.f32 [%a0], {%f0, %f1};", Kind::Atomic, 8),
    ] {
        let mut accesses = Accesses::default();
        testing::run_as(operation, WARP, &mut [vec![0; 8]], &mut accesses).unwrap();
        let found: Vec<(Kind, usize)> = accesses.of(Place::Buffer(0)).map(|it| (it.kind, it.size)).collect();
        assert_eq!(found, [(kind, size)], "{operation}");
    }
}

#[test]
fn what_the_manual_does_not_have_is_not_known() {
    for form in [
        "atom.global.add.f16.v0 %h0, [%a0], %h1;",
        "atom.global.add.b32 %r0, [%a0], %r1;",
        "atom.global.sub.u32 %r0, [%a0], %r1;",
        "atom.global.and.u32 %r0, [%a0], %r1;",
        "atom.global.inc.u64 %rd0, [%a0], %rd1;",
        "atom.global.min.f32 %f0, [%a0], %f1;",
        "atom.global.exch.b128 %rd0, [%a0], %rd1;",
        "atom.global.cas.b32 %r0, [%a0], %r1;",
        "atom.global.add.u32 %r0, [%a0], %r1, %r2;",
        "atom.global.add.u32 {}, [%a0], %r1;",
        "atom.global.add.u32 [%a0], %r1;",
        "atom.global.add.u64 %r0, [%a0], %rd1;",
        "atom.global.add.u32 %p0, [%a0], %r1;",
        "atom.global.v4.add.u32 {%r0, %r1, %r2, %r3}, [%a0], {%r0, %r1, %r2, %r3};",
        "atom.global.v8.f32.add {%f0}, [%a0], {%f0};",
        "atom.global.add.add.u32 %r0, [%a0], %r1;",
        "atom.global.quick.add.u32 %r0, [%a0], %r1;",
        "atom.local.add.u32 %r0, [%a0], %r1;",
        "atom.const.add.u32 %r0, [%a0], %r1;",
        "atom.param.add.u32 %r0, [%a0], %r1;",
        "red.global.exch.b32 [%a0], %r1;",
        "red.global.cas.b32 [%a0], %r1, %r2;",
        "red.global.add.u32 %r0, [%a0], %r1;",
        "red.async.add.u32 [%a0], %r1, [%a0];",
        "atom.global %r0, [%a0], %r1;",
    ] {
        assert!(matches!(program(form, 1), Err(ParseError::Unknown { .. })), "{form}");
    }
}
