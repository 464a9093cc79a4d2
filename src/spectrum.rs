//! What hangs on the singular values of the summed core `Σ_k C_k` of each head: `u` and `v`, by which a row and a column are judged
//! apart, and the auxiliary loss that keeps the core close to rank 1 (DESIGN §2; the paper's TDQKR, section 3.2).

use nalgebra::{DMatrix, Dyn, SVD};
use ultramem_kernels::Error as Limit;

use crate::{MemoryConfig, Result};

/// Singular values past the first are free up to here.
const FREE: f64 = 0.15;

/// The singular value decomposition of each head's summed core.
#[derive(Debug)]
pub struct Spectrum {
    heads: Vec<SVD<f64, Dyn, Dyn>>,
}

impl Spectrum {
    /// Of `cores` `[cores, heads, tucker_rank, tucker_rank]`.
    ///
    /// # Errors
    /// Another number of numbers, as for product keys, which have no core.
    pub fn new(config: &MemoryConfig, cores: &[f32]) -> Result<Self> {
        let expected = [config.cores, config.heads, config.tucker_rank, config.tucker_rank];
        if cores.len() != expected.iter().product::<usize>() {
            let found = vec![cores.len()];
            return Err(Limit::Shape { tensor: "cores", found, expected: expected.to_vec() }.into());
        }
        Ok(Self::of(config, cores))
    }

    /// The same, of as many numbers as the configuration says.
    pub(crate) fn of(config: &MemoryConfig, cores: &[f32]) -> Self {
        let (heads, rank) = (config.heads, config.tucker_rank);
        let summed = |head: usize| {
            DMatrix::from_fn(rank, rank, |a, b| {
                let of_core = |core: usize| f64::from(cores[((core * heads + head) * rank + a) * rank + b]);
                (0..config.cores).map(of_core).sum()
            })
        };
        Self { heads: (0..heads).map(|head| SVD::new(summed(head), true, true)).collect() }
    }

    /// The mean over heads and all singular values but the first of `relu(σ - 0.15)²`, and its gradient for the cores.
    pub fn auxiliary_loss(&self, config: &MemoryConfig) -> (f64, Vec<f64>) {
        let area = config.tucker_rank * config.tucker_rank;
        let count = (config.heads * (config.tucker_rank - 1)).max(1) as f64;
        let mut loss = 0.0;
        let mut gradient = vec![0.0; config.heads * area];
        for (svd, gradient) in self.heads.iter().zip(gradient.chunks_exact_mut(area)) {
            for (at, sigma) in svd.singular_values.iter().enumerate().skip(1) {
                let over = (sigma - FREE).max(0.0);
                loss += over * over / count;
                let (u, v) = vectors(svd, at);
                for (out, (a, b)) in gradient.iter_mut().zip(u.iter().flat_map(|a| v.iter().map(move |b| (a, b)))) {
                    *out += 2.0 * over / count * a * b;
                }
            }
        }
        // The cores are summed: each has the gradient of the sum.
        (loss, gradient.repeat(config.cores))
    }

    /// `u` and `v` `[heads, tucker_rank]`. A pair of singular vectors may change its signs; it keeps those that are closer to
    /// `old`.
    pub fn leading(&self, old: (&[f32], &[f32])) -> (Vec<f32>, Vec<f32>) {
        let rank = self.heads.first().map_or(1, |svd| svd.singular_values.len());
        let (mut all_u, mut all_v) = (Vec::new(), Vec::new());
        for (svd, (old_u, old_v)) in self.heads.iter().zip(old.0.chunks(rank).zip(old.1.chunks(rank))) {
            let (u, v) = vectors(svd, 0);
            let along = dot(&u, old_u) + dot(&v, old_v);
            let sign = if along < 0.0 { -1.0 } else { 1.0 };
            all_u.extend(u.iter().map(|x| (sign * x) as f32));
            all_v.extend(v.iter().map(|x| (sign * x) as f32));
        }
        (all_u, all_v)
    }
}

/// The singular vectors of singular value `at`, the largest first.
fn vectors(svd: &SVD<f64, Dyn, Dyn>, at: usize) -> (Vec<f64>, Vec<f64>) {
    let left = svd.u.as_ref().map_or_else(Vec::new, |u| u.column(at).iter().copied().collect());
    let right = svd.v_t.as_ref().map_or_else(Vec::new, |v| v.row(at).iter().copied().collect());
    (left, right)
}

fn dot(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, &b)| a * f64::from(b)).sum()
}
