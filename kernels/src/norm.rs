//! Normalisation over `key_dim`: which kind, and its device functions.

/// How a vector is normalised before it is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Norm {
    /// RMSNorm: `x / sqrt(mean(x²) + eps) · weight`.
    Rms,
    /// LayerNorm without bias: `(x - mean(x)) / sqrt(var(x) + eps) · weight`.
    Layer,
}
