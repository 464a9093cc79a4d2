//! What `ldmatrix`, `stmatrix`, `movmatrix` and `wmma` read and write: the manual's figures, bounds, alignment, and lanes that are missing.

use crate::lanes::lanes;
use crate::operand::Space;
use crate::testing::{self, Accesses, Seen, bytes, numbers};
use crate::{Kind, Place, Stop};

/// Brings 1024 bytes of a buffer to shared memory.
const SHARED: &str = ".shared .align 128 .b8 tile[1024];\nmov.u32 %r500, %tid.x;\nmul.lo.u32 %r501, %r500, 32;\n\
    mov.u32 %r502, tile;\nadd.u32 %r502, %r502, %r501;\nmad.wide.u32 %rd0, %r500, 32, %a0;\n\
    ld.global.v4.u32 {%r503, %r504, %r505, %r506}, [%rd0];\nst.shared.v4.u32 [%r502], {%r503, %r504, %r505, %r506};\n\
    ld.global.v4.u32 {%r503, %r504, %r505, %r506}, [%rd0+16];\nst.shared.v4.u32 [%r502+16], {%r503, %r504, %r505, %r506};\n\
    bar.sync 0;\n";

/// Lane `l` names the row at `rows[l] * 16`, from a second buffer; where it stores its registers is in `%rd4`.
const NAMED: &str = "mad.wide.u32 %rd2, %r500, 4, %a1;\nld.global.u32 %r510, [%rd2];\nshl.b32 %r510, %r510, 4;\n\
    mov.u32 %r511, tile;\nadd.u32 %r510, %r510, %r511;\nmad.wide.u32 %rd4, %r500, 16, %a2;\n";

fn counted() -> Vec<u8> {
    bytes(&(0..512).collect::<Vec<u16>>(), u16::to_le_bytes)
}

/// Rows in no order; those that a smaller instruction does not look at are nowhere.
fn rows(matrices: usize) -> Vec<u32> {
    (0..32).map(|lane| if lane < 8 * matrices { (lane * 27 + 5) as u32 % 64 } else { 1 << 20 }).collect()
}

fn list(count: usize) -> String {
    (0..count).map(|at| format!("%r{at}")).collect::<Vec<_>>().join(", ")
}

#[test]
fn ldmatrix_by_the_figures() {
    for (count, trans, space) in [1, 2, 4].into_iter().flat_map(|count| {
        [("", ".shared"), (".trans", ".shared"), ("", ".shared::cta"), (".trans", "")].map(|(a, b)| (count, a, b))
    }) {
        let address = if space.is_empty() { "%rd3" } else { "%r510" };
        let mut body = format!("{SHARED}{NAMED}cvt.u64.u32 %rd3, %r510;\ncvta.shared.u64 %rd3, %rd3;\n");
        body += &format!("ldmatrix.sync.aligned.m8n8.x{count}{trans}{space}.b16 {{{}}}, [{address}];\n", list(count));
        (0..count).for_each(|at| body += &format!("st.global.u32 [%rd4+{}], %r{at};\n", at * 4));
        let rows = rows(count);
        let mut buffers = vec![counted(), bytes(&rows, u32::to_le_bytes), vec![0; 512]];
        testing::run(&body, &mut buffers).unwrap();
        let found = numbers(&buffers[2], u16::from_le_bytes);
        for lane in 0..32 {
            for at in 0..count * 2 {
                let (matrix, half) = (at / 2, at % 2);
                let (row, column) = match trans {
                    "" => (lane / 4, lane % 4 * 2 + half),
                    _ => (lane % 4 * 2 + half, lane / 4),
                };
                let expected = rows[8 * matrix + row] * 8 + column as u32;
                assert_eq!(u32::from(found[lane * 8 + at]), expected, "{count}{trans} lane {lane} element {at}");
            }
        }
    }
}

#[test]
fn stmatrix_by_the_figures() {
    for (count, trans) in [(1, ""), (2, ""), (4, ""), (1, ".trans"), (2, ".trans"), (4, ".trans")] {
        let mut body = format!("{SHARED}{NAMED}mad.wide.u32 %rd2, %r500, 16, %a0;\n");
        (0..count).for_each(|at| body += &format!("ld.global.u32 %r{at}, [%rd2+{}];\n", at * 4));
        body += &format!("stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r510], {{{}}};\n", list(count));
        // The lane's part of what is in shared memory now.
        body += "bar.warp.sync 0xffffffff;\nmad.wide.u32 %rd4, %r500, 32, %a2;\n";
        for half in [0, 16] {
            body += &format!("ld.shared.v4.u32 {{%r20, %r21, %r22, %r23}}, [%r502+{half}];\n");
            body += &format!("st.global.v4.u32 [%rd4+{half}], {{%r20, %r21, %r22, %r23}};\n");
        }
        let rows = rows(count);
        let mut buffers = vec![counted(), bytes(&rows, u32::to_le_bytes), vec![0; 1024]];
        testing::run(&body, &mut buffers).unwrap();
        let mut expected: Vec<u16> = (0..512).collect();
        for (lane, at) in (0..32).flat_map(|lane| (0..count * 2).map(move |at| (lane, at))) {
            let (row, column) = match trans {
                "" => (lane / 4, lane % 4 * 2 + at % 2),
                _ => (lane % 4 * 2 + at % 2, lane / 4),
            };
            expected[rows[8 * (at / 2) + row] as usize * 8 + column] = (lane * 8 + at) as u16;
        }
        assert_eq!(numbers(&buffers[2], u16::from_le_bytes), expected, "{count}{trans}");
    }
}

#[test]
fn movmatrix_transposes() {
    let body = "mov.u32 %r500, %tid.x;\nmad.wide.u32 %rd0, %r500, 4, %a0;\nld.global.u32 %r0, [%rd0];\n\
        movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;\nst.global.u32 [%rd0], %r1;\n";
    let mut buffers = vec![counted()];
    testing::run(body, &mut buffers).unwrap();
    let found = numbers(&buffers[0], u16::from_le_bytes);
    // A lane's two numbers are neighbours in a row, so that the buffer is the matrix by rows.
    (0..64).for_each(|at| assert_eq!(usize::from(found[at]), at % 8 * 8 + at / 8));
}

#[test]
fn wmma_touches_each_byte_of_its_tile_once() {
    for (instruction, lines, length, stride, kind) in [
        (
            "wmma.load.a.sync.aligned.row.m16n16k16.f16 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%a0], 24;",
            16,
            32,
            48,
            Kind::Load,
        ),
        ("wmma.load.a.sync.aligned.col.m8n32k16.bf16 {%r0, %r1}, [%a0], 40;", 16, 16, 80, Kind::Load),
        ("wmma.load.b.sync.aligned.col.m32n8k16.s8 {%r0}, [%a0];", 8, 16, 16, Kind::Load),
        ("wmma.load.a.sync.aligned.col.m8n32k16.global.u8 {%r0}, [%a0], 16;", 16, 8, 16, Kind::Load),
        (
            "wmma.store.d.sync.aligned.col.m32n8k16.f32 [%a0], {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, 36;",
            8,
            128,
            144,
            Kind::Store,
        ),
        ("wmma.store.d.sync.aligned.row.m32n8k16.f16 [%a0], {%r0, %r1, %r2, %r3}, 8;", 32, 16, 16, Kind::Store),
    ] {
        let mut accesses = Accesses::default();
        let mut buffers = [vec![0; (lines - 1) * stride + length]];
        testing::run_as(instruction, testing::WARP, &mut buffers, &mut accesses).unwrap();
        let touched = |seen: &Seen| {
            let Seen { mask, size, offsets, .. } = *seen;
            lanes(mask).flat_map(move |lane| offsets[lane] as usize..offsets[lane] as usize + size)
        };
        let mut found: Vec<usize> = accesses.of(Place::Buffer(0)).flat_map(touched).collect();
        found.sort_unstable();
        let expected: Vec<usize> = (0..lines).flat_map(|line| line * stride..line * stride + length).collect();
        assert_eq!(found, expected, "{instruction}");
        assert!(accesses.0.iter().any(|it| it.kind == kind));
        // A byte less is too little.
        let mut buffers = [vec![0; (lines - 1) * stride + length - 1]];
        let stop = testing::run(instruction, &mut buffers).unwrap_err();
        assert!(matches!(stop, Stop::OutOfBounds { store, .. } if store == (kind == Kind::Store)), "{stop:?}");
    }
}

#[test]
fn what_is_not_aligned_stops() {
    let tile = "{%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}";
    for instruction in [
        format!("wmma.load.a.sync.aligned.row.m16n16k16.f16 {tile}, [%a0+8];"),
        format!("wmma.load.a.sync.aligned.row.m16n16k16.f16 {tile}, [%a0], 17;"),
        format!("wmma.store.d.sync.aligned.row.m16n16k16.f32 [%a0+4], {tile}, 16;"),
    ] {
        let stop = testing::run(&instruction, &mut [vec![0; 4096]]).unwrap_err();
        assert!(matches!(stop, Stop::Misaligned { size: 16, .. }), "{instruction} {stop:?}");
    }
    let body = format!("{SHARED}ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r0, %r1, %r2, %r3}}, [%r502+8];");
    let stop = testing::run(&body, &mut [counted()]).unwrap_err();
    assert!(matches!(stop, Stop::Misaligned { size: 16, .. }));
}

#[test]
fn what_is_out_of_bounds_stops() {
    let body = format!("{SHARED}ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r0}}, [%r502+816];");
    let stop = testing::run(&body, &mut [counted()]).unwrap_err();
    assert!(
        matches!(stop, Stop::OutOfBounds { at, space: Space::Shared, address: 1040, size: 16, store: false } if at.thread == 7),
        "{stop:?}"
    );
    let body = format!("{SHARED}stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r502+1024], {{%r0}};");
    let stop = testing::run(&body, &mut [counted()]).unwrap_err();
    assert!(matches!(stop, Stop::OutOfBounds { at, store: true, .. } if at.thread == 0), "{stop:?}");
}

#[test]
fn all_lanes_take_part() {
    let body = "mov.u32 %r0, %tid.x;\nsetp.lt.u32 %p0, %r0, 16;\n@%p0 movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;";
    let stop = testing::run(body, &mut []).unwrap_err();
    assert!(matches!(stop, Stop::DivergentWarp { missing: 0xffff_0000, .. }), "{stop:?}");
    let body = "movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;";
    let stop = testing::run_as(body, testing::threads(16), &mut [], &mut ()).unwrap_err();
    assert!(matches!(stop, Stop::DivergentWarp { missing: 0xffff_0000, .. }), "{stop:?}");
}
