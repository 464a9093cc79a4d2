//! Buffers in host memory, each byte with a mark that says whether anything was written to it since it was handed out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cubecl_runtime::server::IoError;
use cubecl_runtime::storage::{ComputeStorage, StorageHandle, StorageId, StorageUtilization};
use memmap2::MmapMut;

use crate::gpu::ALIGNMENT;

/// The pages that CubeCL's memory management cuts into buffers.
#[derive(Default)]
pub struct HostStorage {
    pages: HashMap<StorageId, Arc<Mutex<Page>>>,
}

impl std::fmt::Debug for HostStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostStorage of {} pages", self.pages.len())
    }
}

/// Bytes that the system hands out at once.
const SYSTEM_PAGE: usize = 4096;

/// Memory that the system hands out as it is touched, aligned as a GPU's is.
#[derive(Debug)]
pub(crate) struct Page {
    pub memory: MmapMut,
    pub written: Vec<bool>,
}

impl Page {
    fn of(length: usize) -> std::io::Result<Self> {
        Ok(Self { memory: MmapMut::map_anon(length.max(1))?, written: vec![false; length] })
    }
}

/// A buffer: a part of a page.
#[derive(Debug, Clone)]
pub struct HostBuffer {
    page: Arc<Mutex<Page>>,
    offset: usize,
    length: usize,
}

impl HostBuffer {
    /// A buffer of zeros that no device owns, for [`crate::profile::raw`].
    ///
    /// # Errors
    /// Memory that the system refuses.
    pub fn zeroed(length: usize) -> std::io::Result<Self> {
        Ok(Self { page: Arc::new(Mutex::new(Page::of(length)?)), offset: 0, length })
    }

    pub(crate) fn page(&self) -> MutexGuard<'_, Page> {
        self.page.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells one page from another.
    pub(crate) fn page_id(&self) -> usize {
        Arc::as_ptr(&self.page) as usize
    }

    /// Where in its page it starts.
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    /// Bytes of the buffer.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The contents.
    pub fn read(&self) -> Vec<u8> {
        self.page().memory[self.offset..][..self.length].to_vec()
    }

    /// Whether anything was written to each byte.
    pub fn written(&self) -> Vec<bool> {
        self.page().written[self.offset..][..self.length].to_vec()
    }

    /// Writes `bytes` from `start` on.
    pub fn write(&self, start: usize, bytes: &[u8]) {
        let mut page = self.page();
        page.memory[self.offset + start..][..bytes.len()].copy_from_slice(bytes);
        page.written[self.offset + start..][..bytes.len()].fill(true);
    }

    /// Hands the buffer out anew: nothing is written yet. Marks that are not set are left alone, so that the system commits no memory
    /// to those of a large buffer.
    pub fn forget(&self) {
        let mut page = self.page();
        let marks = page.written[self.offset..][..self.length].chunks_mut(SYSTEM_PAGE);
        marks.filter(|marks| marks.contains(&true)).for_each(|marks| marks.fill(false));
    }
}

impl ComputeStorage for HostStorage {
    type Resource = HostBuffer;

    fn alignment(&self) -> usize {
        ALIGNMENT as usize
    }

    fn get(&mut self, handle: &StorageHandle) -> HostBuffer {
        let page = self.pages[&handle.id].clone();
        HostBuffer { page, offset: handle.offset() as usize, length: handle.size() as usize }
    }

    fn alloc(&mut self, size: u64) -> Result<StorageHandle, IoError> {
        let refused = |_| IoError::BufferTooBig { size, backtrace: cubecl_common::backtrace::BackTrace::capture() };
        let page = Page::of(size as usize).map_err(refused)?;
        let id = StorageId::new();
        self.pages.insert(id, Arc::new(Mutex::new(page)));
        Ok(StorageHandle::new(id, StorageUtilization { offset: 0, size }))
    }

    fn dealloc(&mut self, id: StorageId) {
        self.pages.remove(&id);
    }

    fn flush(&mut self) {}
}
