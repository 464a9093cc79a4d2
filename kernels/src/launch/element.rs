//! Element types of weights and activations.

use cubecl::ir::{ElemType, FloatKind, StorageType};

/// The type in which weights and activations are stored. Sums are always taken in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// IEEE 754 single precision, 4 bytes.
    F32,
    /// IEEE 754 half precision, 2 bytes.
    F16,
    /// bfloat16: the upper half of an f32, 2 bytes.
    BF16,
}

impl ElementType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The same type in CubeCL's words.
    pub fn storage(self) -> StorageType {
        ElemType::Float(match self {
            Self::F32 => FloatKind::F32,
            Self::F16 => FloatKind::F16,
            Self::BF16 => FloatKind::BF16,
        })
        .into()
    }

    /// The element type behind one of CubeCL's, if it is one of ours.
    pub fn from_storage(storage: StorageType) -> Option<Self> {
        [Self::F32, Self::F16, Self::BF16].into_iter().find(|it| it.storage() == storage)
    }
}

impl core::fmt::Display for ElementType {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        })
    }
}

impl core::str::FromStr for ElementType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::F32, Self::F16, Self::BF16]
            .into_iter()
            .find(|it| it.to_string() == text)
            .ok_or_else(|| format!("unknown element type {text:?}, expected f32, f16 or bf16"))
    }
}
