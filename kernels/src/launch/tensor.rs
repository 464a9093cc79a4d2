//! Device tensors as the stages take them, contiguous in row-major order, the checks that every launch makes before anything runs, and
//! memory for them: an allocation each, or one for all that a call needs.

use core::cell::RefCell;
use core::ops::Deref;

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;

use crate::launch::device::has_pointers;
use crate::{ElementType, Error, Result};

/// A tensor on a device: CubeCL's [`TensorHandle`], which it dereferences to, and the client whose device holds its buffer. Stages take
/// contiguous ones only, and only those of the client that they are called with: a handle names no client, and CubeCL drops a launch with
/// another's without a word.
pub struct Tensor<R: Runtime> {
    client: ComputeClient<R>,
    tensor: TensorHandle<R>,
}

impl<R: Runtime> Clone for Tensor<R> {
    fn clone(&self) -> Self {
        Self { client: self.client.clone(), tensor: self.tensor.clone() }
    }
}

impl<R: Runtime> Deref for Tensor<R> {
    type Target = TensorHandle<R>;

    fn deref(&self) -> &TensorHandle<R> {
        &self.tensor
    }
}

impl<R: Runtime> Tensor<R> {
    /// A tensor of `client`'s device.
    pub fn new(client: &ComputeClient<R>, tensor: TensorHandle<R>) -> Self {
        Self { client: client.clone(), tensor }
    }

    /// A buffer of `client`'s device, read as `shape` in row-major order.
    pub fn new_contiguous(client: &ComputeClient<R>, shape: Vec<usize>, handle: Handle, dtype: StorageType) -> Self {
        Self::new(client, TensorHandle::new_contiguous(shape, handle, dtype))
    }

    /// The same buffer, read as `shape` in row-major order.
    pub fn reshaped(&self, shape: Vec<usize>) -> Self {
        Self::new_contiguous(&self.client, shape, self.handle.clone(), self.dtype)
    }

    /// The client whose device holds the buffer.
    pub fn client(&self) -> &ComputeClient<R> {
        &self.client
    }

    /// What CubeCL's own launches take.
    pub(crate) fn binding(&self) -> TensorBinding<R> {
        self.tensor.clone().binding()
    }

    /// Checks that the buffer is on `client`'s device. All clients of a device share its properties, at one address.
    ///
    /// # Errors
    /// [`Error::Client`].
    pub fn check_client(&self, name: &'static str, client: &ComputeClient<R>) -> Result<()> {
        if core::ptr::eq(self.client.properties(), client.properties()) {
            Ok(())
        } else {
            Err(Error::Client { tensor: name })
        }
    }
}

/// A tensor of `shape` on the device, its contents undefined.
///
/// # Errors
/// [`Error::Binding`] if it would not fit one binding of the device.
pub fn empty<R: Runtime>(
    client: &ComputeClient<R>,
    name: &'static str,
    shape: &[usize],
    storage: StorageType,
) -> Result<Tensor<R>> {
    let bytes = fits_binding(client, name, shape, storage)?;
    let handle = Workspace::take(client, bytes).unwrap_or_else(|| client.empty(bytes));
    Ok(Tensor::new_contiguous(client, shape.to_vec(), handle, storage))
}

/// Memory that this thread's next tensors are cut from.
struct Workspace {
    handle: Handle,
    used: usize,
    length: usize,
}

thread_local! {
    static WORKSPACE: RefCell<Option<Workspace>> = const { RefCell::new(None) };
}

impl Workspace {
    /// The next `bytes` of the thread's workspace, if there is one and they are left.
    fn take<R: Runtime>(client: &ComputeClient<R>, bytes: usize) -> Option<Handle> {
        WORKSPACE.with_borrow_mut(|workspace| {
            let Self { handle, used, length } = workspace.as_mut()?;
            let start = used.next_multiple_of(alignment(client));
            let end = start.checked_add(bytes).filter(|end| end <= length)?;
            *used = end;
            Some(handle.clone().offset_start(start as u64).offset_end((*length - end) as u64))
        })
    }
}

/// Runs `enqueue`, the tensors that it makes taking up one allocation for as many bytes each as `tensors` says, one behind the other; what does not fit
/// is allocated by itself. The allocation lives as long as any of them. Where a buffer is for reading or for writing, each has its own.
pub fn in_one_allocation<R: Runtime, T>(
    client: &ComputeClient<R>,
    tensors: impl FnOnce() -> Vec<usize>,
    enqueue: impl FnOnce() -> T,
) -> T {
    /// Takes the workspace away, whatever comes.
    struct Ends;
    impl Drop for Ends {
        fn drop(&mut self) {
            WORKSPACE.set(None);
        }
    }
    let tensors = if has_pointers(client) { tensors() } else { Vec::new() };
    let aligned = |bytes: usize| bytes.saturating_add(alignment(client)) / alignment(client) * alignment(client);
    let bytes = tensors.into_iter().map(aligned).fold(0, usize::saturating_add);
    // What no device has room for is told by whoever asks for it.
    if bytes == 0 || bytes as u64 > client.properties().memory.max_page_size {
        return enqueue();
    }
    let _ends = Ends;
    WORKSPACE.set(Some(Workspace { handle: client.empty(bytes), used: 0, length: bytes }));
    enqueue()
}

/// Bytes that the beginning of a binding may have to be a multiple of.
fn alignment<R: Runtime>(client: &ComputeClient<R>) -> usize {
    PART_ALIGNMENT.max(client.properties().memory.alignment as usize)
}

/// An f32 tensor of zeros.
pub(crate) fn zeros<R: Runtime>(client: &ComputeClient<R>, name: &'static str, shape: &[usize]) -> Result<Tensor<R>> {
    if shape.contains(&0) {
        return empty(client, name, shape, f32_storage());
    }
    fits_binding(client, name, shape, f32_storage())?;
    let zeros = TensorHandle::zeros(client, [shape.iter().product::<usize>()], f32_storage());
    Ok(Tensor::new_contiguous(client, shape.to_vec(), zeros.handle, f32_storage()))
}

/// Tensors of 4-byte elements that lie one after the other in one buffer: a kernel that would bind too many arrays takes them as one.
pub(crate) struct Parts<R: Runtime, const N: usize> {
    /// The whole buffer, as words.
    pub words: Tensor<R>,
    /// Each tensor's first word.
    pub starts: [usize; N],
    /// The tensors.
    pub tensors: [Tensor<R>; N],
}

impl<R: Runtime, const N: usize> Parts<R, N> {
    /// Tensors of the given shapes and types, their contents undefined.
    pub fn empty(client: &ComputeClient<R>, name: &'static str, parts: [(&[usize], StorageType); N]) -> Result<Self> {
        let align = alignment(client) / WORD;
        let size = |shape: &[usize]| shape.iter().fold(1, |size: usize, &of| size.saturating_mul(of));
        let mut length = 0usize;
        let starts = parts.map(|(shape, _)| {
            let start = length.next_multiple_of(align);
            length = size(shape).saturating_add(start).min(usize::MAX / (2 * WORD));
            start
        });
        let words = empty(client, name, &[length], u32_storage())?;
        let mut ends = parts.iter().zip(starts).map(|((shape, _), start)| start + size(shape));
        let tensors = core::array::from_fn(|at| {
            let (shape, storage) = parts[at];
            let (before, after) = (starts[at] * WORD, (length - ends.next().unwrap_or(length)) * WORD);
            let handle = words.handle.clone().offset_start(before as u64).offset_end(after as u64);
            Tensor::new_contiguous(client, shape.to_vec(), handle, storage)
        });
        Ok(Self { words, starts, tensors })
    }
}

/// Bytes of a u32 or an f32.
const WORD: usize = 4;
/// The most that a device may ask the beginning of a binding to be a multiple of.
const PART_ALIGNMENT: usize = 256;

/// The bytes of a tensor of `shape`, checked against the largest buffer that a kernel of this device can bind.
///
/// # Errors
/// [`Error::Binding`] with both sizes.
pub fn fits_binding<R: Runtime>(
    client: &ComputeClient<R>,
    name: &'static str,
    shape: &[usize],
    storage: StorageType,
) -> Result<usize> {
    let limit = client.properties().memory.max_page_size;
    let bytes = shape.iter().try_fold(storage.size(), |bytes, &size| bytes.checked_mul(size));
    match bytes {
        Some(bytes) if bytes as u64 <= limit => Ok(bytes),
        _ => Err(Error::Binding { tensor: name, bytes: bytes.map_or(u64::MAX, |bytes| bytes as u64), limit }),
    }
}

/// Checks that kernels of this device can compute with `dtype`.
///
/// # Errors
/// [`Error::UnsupportedType`].
pub fn supports<R: Runtime>(client: &ComputeClient<R>, dtype: ElementType) -> Result<()> {
    let supported = client.properties().supports_type(dtype.storage());
    if supported { Ok(()) } else { Err(Error::UnsupportedType(dtype)) }
}

/// The two sizes of a matrix.
pub(crate) fn sizes<R: Runtime>(matrix: &Tensor<R>, name: &'static str) -> Result<[usize; 2]> {
    let found = matrix.shape().to_vec();
    found.as_slice().try_into().map_err(|_| Error::Dimensions {
        tensor: name,
        found: found.clone(),
        expected: "a matrix",
    })
}

/// Checks sizes that must be at least 1, each with its name.
///
/// # Errors
/// [`Error::Zero`] with the first that is not.
pub fn positive(sizes: &[(&'static str, usize)]) -> Result<()> {
    sizes.iter().find(|(_, size)| *size == 0).map_or(Ok(()), |&(what, _)| Err(Error::Zero { what }))
}

/// A size that kernels count in a u32.
///
/// # Errors
/// [`Error::Exceeds`] for one that a u32 does not hold.
pub(crate) fn index(what: &'static str, size: usize) -> Result<u32> {
    let limit = u64::from(u32::MAX);
    u32::try_from(size).map_err(|_| Error::Exceeds { what, value: size as u64, limit_name: "the largest index", limit })
}

/// Checks one argument of a stage: on `client`'s device, contiguous, of the expected shape and type, with a buffer that is large enough.
///
/// # Errors
/// What does not fit, with both sides of it.
pub fn check<R: Runtime>(
    client: &ComputeClient<R>,
    tensor: &Tensor<R>,
    name: &'static str,
    expected: &[usize],
    storage: StorageType,
) -> Result<()> {
    let shape = tensor.shape().to_vec();
    if shape != expected {
        return Err(Error::Shape { tensor: name, found: shape, expected: expected.to_vec() });
    }
    if tensor.dtype != storage {
        return Err(Error::Type { tensor: name, found: tensor.dtype.to_string(), expected: storage.to_string() });
    }
    tensor.check_client(name, client)?;
    if shape.contains(&0) {
        return Ok(());
    }
    let handle = &tensor.handle;
    let unused = handle.offset_start.unwrap_or(0).saturating_add(handle.offset_end.unwrap_or(0));
    let found = handle.size().saturating_sub(unused);
    let strides = tensor.strides().to_vec();
    let mut step = 1usize;
    for (&size, &stride) in shape.iter().zip(&strides).rev() {
        if size != 1 && stride != step {
            return Err(Error::NotContiguous { tensor: name, shape, strides });
        }
        step = step.saturating_mul(size);
    }
    let bytes = (step as u64).saturating_mul(storage.size() as u64);
    if found < bytes {
        return Err(Error::Buffer { tensor: name, bytes, found });
    }
    Ok(())
}

/// The element type of a floating-point argument.
///
/// # Errors
/// [`Error::Type`] if it is none of ours, [`Error::UnsupportedType`] if kernels of this device lack it.
pub fn float_type<R: Runtime>(
    client: &ComputeClient<R>,
    tensor: &Tensor<R>,
    name: &'static str,
) -> Result<ElementType> {
    let dtype = ElementType::from_storage(tensor.dtype).ok_or_else(|| Error::Type {
        tensor: name,
        found: tensor.dtype.to_string(),
        expected: "f32, f16 or bf16".to_string(),
    })?;
    supports(client, dtype).map(|()| dtype)
}

/// Tokens of an argument whose first dimension counts them; there may be none.
///
/// # Errors
/// [`Error::Dimensions`] for a tensor without dimensions.
pub fn tokens_of<R: Runtime>(tensor: &Tensor<R>, name: &'static str) -> Result<usize> {
    let found = tensor.shape().to_vec();
    let expected = "tokens in its first dimension";
    found.first().copied().ok_or(Error::Dimensions { tensor: name, found, expected })
}

/// The tensor as a kernel argument of vectors of `width` elements.
///
/// # Safety
/// The buffer holds the elements of the tensor's shape, as [`check`] has shown or [`empty`] has made it.
pub unsafe fn arg<R: Runtime>(tensor: &Tensor<R>, width: usize) -> ArrayArg<R> {
    let length = tensor.shape().iter().product::<usize>() / width;
    // SAFETY: the caller's buffer holds the shape's elements; as many vectors are no more than those.
    unsafe { ArrayArg::from_raw_parts(tensor.handle.clone(), length) }
}

/// u32 in CubeCL's words.
pub fn u32_storage() -> StorageType {
    u32::as_type_native_unchecked().storage_type()
}

/// f32 in CubeCL's words.
pub(crate) fn f32_storage() -> StorageType {
    ElementType::F32.storage()
}

/// A tensor with the given numbers. Host to device: for weights and tests, not for a stage's hot path.
///
/// # Errors
/// [`Error::Binding`] if it would not fit one binding of the device, [`Error::Buffer`] for too few numbers.
pub fn from_f32<R: Runtime>(client: &ComputeClient<R>, shape: &[usize], numbers: &[f32]) -> Result<Tensor<R>> {
    from_bytes(client, shape, f32::as_bytes(numbers), f32_storage())
}

/// A tensor with the given indices, as [`from_f32`].
///
/// # Errors
/// As [`from_f32`].
pub fn from_u32<R: Runtime>(client: &ComputeClient<R>, shape: &[usize], numbers: &[u32]) -> Result<Tensor<R>> {
    from_bytes(client, shape, u32::as_bytes(numbers), u32_storage())
}

fn from_bytes<R: Runtime>(
    client: &ComputeClient<R>,
    shape: &[usize],
    bytes: &[u8],
    storage: StorageType,
) -> Result<Tensor<R>> {
    let needed = fits_binding(client, "tensor", shape, storage)?;
    if bytes.len() < needed {
        return Err(Error::Buffer { tensor: "tensor", bytes: needed as u64, found: bytes.len() as u64 });
    }
    Ok(Tensor::new_contiguous(client, shape.to_vec(), client.create_from_slice(bytes), storage))
}
