//! Numbers as a table holds them, f32, f16 or bf16, widened as they are read; and vectors of them.
//!
//! [`vectorised!`] compiles a loop for the vectors of several generations of processors and runs the one that this processor has. What it calls must
//! be inlined into it, so what loops call here is.

use std::borrow::Cow;
use std::ops::{Deref, DerefMut};

use bytemuck::{AnyBitPattern, NoUninit, Pod, Zeroable};
use half::{bf16, f16};
use pulp::{Simd, WithSimd};
use ultramem_kernels::{ElementType, Error, Result};

/// Numbers of a table or of keys, borrowed from wherever they lie: memory or a mapped file.
#[derive(Debug, Clone)]
pub enum Numbers<'a> {
    /// As they are.
    F32(Cow<'a, [f32]>),
    /// Widened as they are read.
    F16(Cow<'a, [f16]>),
    /// Widened as they are read.
    BF16(Cow<'a, [bf16]>),
}

/// The same, to be changed in place.
#[derive(Debug)]
pub enum NumbersMut<'a> {
    /// As they are.
    F32(&'a mut [f32]),
    /// Rounded as they are written.
    F16(&'a mut [f16]),
    /// Rounded as they are written.
    BF16(&'a mut [bf16]),
}

/// Does something with the slice behind [`Numbers`] or [`NumbersMut`], whatever its type.
macro_rules! with_slice {
    ($numbers:expr, Numbers, $slice:ident => $work:expr) => {
        match $numbers {
            $crate::numbers::Numbers::F32(numbers) => with_slice!(numbers.as_ref(), $slice => $work),
            $crate::numbers::Numbers::F16(numbers) => with_slice!(numbers.as_ref(), $slice => $work),
            $crate::numbers::Numbers::BF16(numbers) => with_slice!(numbers.as_ref(), $slice => $work),
        }
    };
    ($numbers:expr, NumbersMut, $slice:ident => $work:expr) => {
        match $numbers {
            $crate::numbers::NumbersMut::F32(numbers) => with_slice!(numbers, $slice => $work),
            $crate::numbers::NumbersMut::F16(numbers) => with_slice!(numbers, $slice => $work),
            $crate::numbers::NumbersMut::BF16(numbers) => with_slice!(numbers, $slice => $work),
        }
    };
    ($numbers:expr, $slice:ident => $work:expr) => {{
        let $slice = $numbers;
        $work
    }};
}
pub(crate) use with_slice;

impl<'a> Numbers<'a> {
    /// The little-endian `bytes` as numbers, in place; copied where they lie at an address that no such number can be read at. A number that is not
    /// whole is left out.
    pub fn of_bytes(dtype: ElementType, bytes: &'a [u8]) -> Self {
        match dtype {
            ElementType::F32 => Self::F32(cast(bytes)),
            ElementType::F16 => Self::F16(cast(bytes)),
            ElementType::BF16 => Self::BF16(cast(bytes)),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        with_slice!(self, Numbers, numbers => numbers.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their type.
    pub fn dtype(&self) -> ElementType {
        match self {
            Self::F32(_) => ElementType::F32,
            Self::F16(_) => ElementType::F16,
            Self::BF16(_) => ElementType::BF16,
        }
    }

    /// Asks the system to hold them in large pages, which rows that lie anywhere are found through in half the time. Where it has none to give, or the
    /// numbers lie in a file that it keeps in small ones, nothing happens. Takes some two seconds a gigabyte.
    pub(crate) fn in_large_pages(&self) {
        with_slice!(self, Numbers, numbers => large_pages(bytemuck::cast_slice(numbers)));
    }

    /// All of them, widened.
    pub fn widened(&self) -> Vec<f32> {
        with_slice!(self, Numbers, numbers => vectorised!(numbers.iter().map(|x| x.widen()).collect()))
    }
}

#[cfg(target_os = "linux")]
fn large_pages(bytes: &[u8]) {
    const PAGE: usize = 2 << 20;
    let before = bytes.as_ptr().align_offset(PAGE).min(bytes.len());
    let inside = &bytes[before..][..(bytes.len() - before) / PAGE * PAGE];
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_COLLAPSE] {
        // SAFETY: advice about pages that lie within the slice and are mapped as long as it lives; what they hold stays as it is.
        unsafe { libc::madvise(inside.as_ptr().cast_mut().cast(), inside.len(), advice) };
    }
}

#[cfg(not(target_os = "linux"))]
fn large_pages(_bytes: &[u8]) {}

/// Bytes as numbers, in place where they can be.
pub(crate) fn cast<E: AnyBitPattern + NoUninit>(bytes: &[u8]) -> Cow<'_, [E]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(numbers) => Cow::Borrowed(numbers),
        Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
    }
}

impl<'a> NumbersMut<'a> {
    /// The little-endian `bytes` as numbers, in place.
    ///
    /// # Errors
    /// Bytes that are no whole numbers, or lie at an address that no such number can be written at.
    pub fn of_bytes(dtype: ElementType, bytes: &'a mut [u8]) -> Result<Self> {
        let value = format!("{} bytes at {:p}", bytes.len(), bytes.as_ptr());
        let found = match dtype {
            ElementType::F32 => bytemuck::try_cast_slice_mut(bytes).map(Self::F32),
            ElementType::F16 => bytemuck::try_cast_slice_mut(bytes).map(Self::F16),
            ElementType::BF16 => bytemuck::try_cast_slice_mut(bytes).map(Self::BF16),
        };
        let expected = "whole numbers at an address of theirs";
        found.map_err(|_| Error::Range { what: "table to be changed", value, expected })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        with_slice!(self, NumbersMut, numbers => numbers.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A number of a table.
pub(crate) trait Element: Copy + Send + Sync {
    /// Bits of an f32's mantissa that the type lacks.
    const DROPPED: u32;
    /// The type's smallest normal number, and its largest one.
    const NORMAL: f32;
    const LARGEST: f32;

    fn widen(self) -> f32;

    /// To the nearest, of two that are as near to the even one.
    fn narrow(number: f32) -> Self;

    /// `Σ a · b`.
    #[inline(always)]
    fn dot<S: Simd>(simd: S, a: &[f32], b: &[Self]) -> f32 {
        dot_narrow(simd, a, b)
    }
}

impl Element for f32 {
    const DROPPED: u32 = 0;
    const NORMAL: f32 = f32::MIN_POSITIVE;
    const LARGEST: f32 = f32::MAX;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(number: f32) -> Self {
        number
    }

    #[inline(always)]
    fn dot<S: Simd>(simd: S, a: &[f32], b: &[Self]) -> f32 {
        dot_wide(simd, a, b)
    }
}

impl Element for bf16 {
    const DROPPED: u32 = 16;
    // Below it, bits of an f32 are cut off just as above.
    const NORMAL: f32 = 0.0;
    const LARGEST: f32 = f32::INFINITY;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(number: f32) -> Self {
        Self::from_f32(number)
    }
}

impl Element for f16 {
    const DROPPED: u32 = 13;
    const NORMAL: f32 = f32::from_bits(0x3880_0000);
    const LARGEST: f32 = 65504.0;

    /// Moves exponent and mantissa to where an f32 has them and mends the exponent's bias by a multiplication, which is exact for every number, those
    /// below the smallest normal one among them. Unlike the processor's conversion of one number, a compiler makes vectors of this.
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
        let unbounded = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(magnitude.to_bits() | unbounded | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn narrow(number: f32) -> Self {
        Self::from_f32(number)
    }
}

/// A cache line of numbers, where one begins.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Numbers from the beginning of a cache line on: vectors that lie across two would be read from both.
#[derive(Debug, Clone, Default)]
pub(crate) struct Aligned {
    lines: Vec<Line>,
    count: usize,
}

impl Aligned {
    /// So many zeros.
    pub fn zeros(count: usize) -> Self {
        Self { lines: vec![Line::zeroed(); count.div_ceil(16)], count }
    }
}

impl Deref for Aligned {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.count]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.count]
    }
}

/// A row of a table of rows of `width` numbers.
#[inline(always)]
pub(crate) fn row_of<E>(table: &[E], width: usize, row: u32) -> &[E] {
    &table[row as usize * width..][..width]
}

/// Runs `work` compiled for this processor's vectors. A closure that is not inlined is compiled for the least processor: use [`vectorised!`].
#[inline(always)]
pub(crate) fn with_vectors<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// The value of an expression that is compiled for this processor's vectors, with all that is inlined into it.
macro_rules! vectorised {
    ($work:expr) => {
        $crate::numbers::with_vectors(
            #[inline(always)]
            || $work,
        )
    };
}
pub(crate) use vectorised;

/// The vectors that loops run with here, in words.
pub fn vectors() -> &'static str {
    struct Width;
    impl WithSimd for Width {
        type Output = usize;

        fn with_simd<S: Simd>(self, _simd: S) -> usize {
            size_of::<S::f32s>() * 8
        }
    }
    match pulp::Arch::new().dispatch(Width) {
        512 => "512-bit vectors",
        256 => "256-bit vectors",
        128 => "128-bit vectors",
        _ => "no vectors",
    }
}

/// `Σ a · b`.
#[inline(always)]
pub(crate) fn dot<E: Element>(a: &[f32], b: &[E]) -> f32 {
    let mut sum = [0.0];
    dots(1, |_| (a, b), &mut sum);
    sum[0]
}

/// Dot products into `out`: both vectors of a pair are cut into so many `parts`, and each has one. Closures that are given must be inlined.
#[inline(always)]
pub(crate) fn dots<'a, E: Element + 'a>(parts: usize, pair: impl Fn(usize) -> (&'a [f32], &'a [E]), out: &mut [f32]) {
    pulp::Arch::new().dispatch(Dots { parts, pair, out });
}

/// No loop over sums: a compiler makes vectors of numbers that are added, but not of a sum that they are added to.
struct Dots<'o, F> {
    parts: usize,
    pair: F,
    out: &'o mut [f32],
}

impl<'a, E: Element + 'a, F: Fn(usize) -> (&'a [f32], &'a [E])> WithSimd for Dots<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (at, out) in self.out.chunks_exact_mut(self.parts).enumerate() {
            let (a, b) = (self.pair)(at);
            let width = (a.len() / self.parts).max(1);
            let parts = a.chunks_exact(width).zip(b.chunks_exact(width));
            out.iter_mut().zip(parts).for_each(|(out, (a, b))| *out = E::dot(simd, a, b));
        }
    }
}

#[inline(always)]
fn dot_wide<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let count = a.len().min(b.len());
    let ((a, rest_a), (b, rest_b)) = (S::as_simd_f32s(&a[..count]), S::as_simd_f32s(&b[..count]));
    let ((a, last_a), (b, last_b)) = (a.as_chunks::<4>(), b.as_chunks::<4>());
    // So many sums at once, for one waits for the one before it.
    let mut sums = [simd.splat_f32s(0.0); 4];
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum = simd.mul_add_e_f32s(*a, *b, *sum);
        }
    }
    for (sum, (a, b)) in sums.iter_mut().zip(last_a.iter().zip(last_b)) {
        *sum = simd.mul_add_e_f32s(*a, *b, *sum);
    }
    let [first, second, third, fourth] = sums;
    let mut sum = simd.add_f32s(simd.add_f32s(first, second), simd.add_f32s(third, fourth));
    if !rest_a.is_empty() {
        sum = simd.mul_add_e_f32s(simd.partial_load_f32s(rest_a), simd.partial_load_f32s(rest_b), sum);
    }
    simd.reduce_sum_f32s(sum)
}

/// Widens a block at a time.
#[inline(always)]
fn dot_narrow<S: Simd, E: Element>(simd: S, a: &[f32], b: &[E]) -> f32 {
    let (mut block, mut sum) = ([0.0; 128], 0.0);
    for (a, b) in a.chunks(block.len()).zip(b.chunks(block.len())) {
        block.iter_mut().zip(b).for_each(|(wide, x)| *wide = x.widen());
        sum += dot_wide(simd, a, &block[..b.len()]);
    }
    sum
}

/// `sums += scale · row`.
#[inline(always)]
pub(crate) fn add_scaled<E: Element>(sums: &mut [f32], scale: f32, row: &[E]) {
    for (sum, x) in sums.iter_mut().zip(row) {
        *sum += scale * x.widen();
    }
}

/// Rows that are on their way at once.
pub(crate) const AHEAD: usize = 8;

/// Asks for a row ahead of its use.
#[inline(always)]
pub(crate) fn prefetch<E>(row: &[E]) {
    #[cfg(target_arch = "x86_64")]
    let last = size_of_val(row).saturating_sub(1);
    // The row's last byte as well: a row that begins within a line ends in one more.
    for line in (0..last).step_by(64).chain([last]) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint that reads nothing and cannot fault; every x86-64 processor has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().cast::<i8>().wrapping_add(line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// Rounds numbers to `dtype` and back.
pub(crate) fn round(dtype: ElementType, numbers: &mut [f32]) {
    match dtype {
        ElementType::F32 => {}
        ElementType::F16 => numbers.iter_mut().for_each(|x| *x = f16::narrow(*x).widen()),
        ElementType::BF16 => vectorised!(numbers.iter_mut().for_each(|x| *x = bf16::narrow(*x).widen())),
    }
}
