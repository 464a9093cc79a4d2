#![allow(missing_docs)]
use crate::linear::{Matrix, product_here};
use crate::numbers::{dots, vectorised};
use crate::select::{Selection, order_key};
use std::time::Instant;
fn time(name: &str, mut f: impl FnMut()) {
    f();
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let s = Instant::now();
        f();
        best = best.min(s.elapsed().as_secs_f64());
    }
    println!("{name}: {:.1} us", best * 1e6);
}
pub fn probe() {
    let (t, n, w) = (64usize, 1616usize, 192usize);
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    };
    let q: Vec<f32> = (0..t * w).map(|_| next()).collect();
    let k: Vec<f32> = (0..n * w).map(|_| next()).collect();
    let mut kt = vec![0.0; n * w];
    for i in 0..n {
        for d in 0..w {
            kt[d * n + i] = k[i * w + d];
        }
    }
    let mut s = vec![0.0; t * n];
    time("gemm row-major keys", || product_here(&mut s, Matrix::new(&q, w), Matrix::new(&k, w).transposed()));
    time("gemm depth-major keys", || product_here(&mut s, Matrix::new(&q, w), Matrix::new(&kt, n)));
    let mut order = vec![0u32; t * n];
    time("order", || vectorised!(order.iter_mut().zip(&s).for_each(|(o, &x)| *o = order_key(x))));
    let mut sel = Selection::default();
    let mut chosen = vec![0u32; 80];
    time("select 64 rows of 1616, 80", || {
        vectorised!(for row in order.chunks_exact(n) {
            sel.best(row, &mut chosen)
        })
    });
    sel.report();
    let mut outs = vec![0.0; 160];
    time("80*2*64 dots of 192", || for r in 0..t { dots::<f32>(|c| (&q[r * w..][..w], &k[c * w..][..w]), &mut outs) });
    let (z, e, vd, sl) = (64usize, 160usize, 384usize, 192usize);
    let rows = 652864usize;
    let table: Vec<f32> = (0..rows * vd).map(|x| x as f32).collect();
    let at: Vec<usize> = (0..z * e).map(|x| (x * 2654435761) % rows).collect();
    let mut acc = vec![0.0f32; 4 * vd];
    for ahead in [2usize, 4, 8, 12, 16, 24] {
        time(&format!("pool 64 tokens ahead {ahead}"), || vectorised!({
            for (i, &r) in at.iter().enumerate() {
                if let Some(&p) = at.get(i + ahead) { crate::numbers::prefetch(&table[p * vd..][..vd]); }
                let row = &table[r * vd..][..vd];
                let b = &mut acc[i % 4 * vd..][..vd];
                crate::numbers::add_scaled(&mut b[..sl], 0.5, &row[..sl]);
                crate::numbers::add_scaled(&mut b[sl..], 0.5, &row[sl..]);
            }
        }));
    }
    time("pool without", || vectorised!({
        for (i, &r) in at.iter().enumerate() {
            let row = &table[r * vd..][..vd];
            let b = &mut acc[i % 4 * vd..][..vd];
            crate::numbers::add_scaled(&mut b[..sl], 0.5, &row[..sl]);
            crate::numbers::add_scaled(&mut b[sl..], 0.5, &row[sl..]);
        }
    }));
    let mut dst = vec![0.0f32; z * e * vd];
    time("memcpy of as much", || dst.copy_from_slice(&table[..z * e * vd]));
    time("memcpy of the rows", || for (d, &r) in dst.chunks_exact_mut(vd).zip(&at) { d.copy_from_slice(&table[r * vd..][..vd]) });
    println!("{} {}", acc[7], dst[9]);
    println!("{}", outs[3]);
    let small = &order[..128 * 64];
    let mut chosen = vec![0u32; 16];
    time("select 64 rows of 128, 16", || {
        vectorised!(for row in small.chunks_exact(128) {
            sel.best(row, &mut chosen)
        })
    });
}
