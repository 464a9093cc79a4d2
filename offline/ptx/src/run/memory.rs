//! The memory of a launch: buffers, the block's shared memory, parameters and what the module names; and the addresses of each.
//!
//! A buffer is a part of a page. Pages lie 2^40 bytes apart, so that whatever is beyond one is nobody's.

use super::shape::Shape;
use crate::lanes::{Long, Mask, those};
use crate::operand::Space;
use crate::program::Program;
use crate::windows::{LOCAL_WINDOW, MODULE_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW};

/// A buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// The page that it is a part of.
    pub page: usize,
    /// Its first byte in the page.
    pub offset: usize,
    /// Bytes.
    pub length: usize,
}

impl Buffer {
    /// The address that a kernel is given.
    pub fn address(&self) -> u64 {
        ((self.page as u64 + 1) << 40) + self.offset as u64
    }
}

/// Where something lies. Of two buffers that overlap it is in the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a buffer.
    Buffer(usize),
    /// In shared memory.
    Shared,
    /// In the thread's memory.
    Local,
    /// Among the parameters.
    Parameter,
    /// Among the module's variables.
    Module,
}

/// The memory of a launch; shared memory is that of the block that runs.
#[derive(Debug)]
pub struct Memory<'a> {
    /// The pages that buffers are parts of.
    pub pages: Vec<&'a mut [u8]>,
    /// The buffers.
    pub buffers: Vec<Buffer>,
    /// What the code names itself, then what the launch asks for.
    pub shared: Vec<u8>,
    /// The kernel's parameters.
    pub parameters: Vec<u8>,
    /// The module's variables.
    pub module: Vec<u8>,
    /// Bytes of local memory of a thread.
    pub local: usize,
}

/// What lanes access in one place, in one instruction.
#[derive(Debug, Clone, Copy)]
pub struct Access<'a> {
    /// Where.
    pub place: Place,
    /// Bytes from the start of the place, a lane each.
    pub offsets: &'a Long,
    /// The lanes.
    pub mask: Mask,
    /// Bytes of a lane.
    pub size: usize,
    /// Which of them matter, a bit each.
    pub used: u32,
    /// What they do.
    pub kind: Kind,
}

/// What an access does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Reads.
    Load,
    /// Writes.
    Store,
    /// Reads and writes, and nobody comes between.
    Atomic,
    /// Writes as an atomic operation: an exchange for whose result nobody asks.
    AtomicStore,
}

impl Kind {
    /// Whether it reads.
    pub fn loads(self) -> bool {
        matches!(self, Self::Load | Self::Atomic)
    }

    /// Whether it writes.
    pub fn stores(self) -> bool {
        self != Self::Load
    }

    /// Whether it is an atomic operation.
    pub fn is_atomic(self) -> bool {
        matches!(self, Self::Atomic | Self::AtomicStore)
    }
}

impl<'a> Memory<'a> {
    /// The memory of a launch of `program`.
    pub fn new(
        program: &Program,
        shape: &Shape,
        pages: Vec<&'a mut [u8]>,
        buffers: Vec<Buffer>,
        parameters: Vec<u8>,
    ) -> Self {
        let shared = vec![0; program.static_shared + shape.dynamic_shared];
        Self { pages, buffers, shared, parameters, module: program.module.clone(), local: program.local }
    }

    /// The place of an address, where it starts, and its bytes.
    fn locate(&self, space: Space, address: u64) -> Option<(Place, u64, usize)> {
        let window = |start: u64| address.wrapping_sub(start) < SHARED_WINDOW;
        let shared = self.shared.len();
        match space {
            Space::Shared => Some((Place::Shared, 0, shared)),
            Space::Local => Some((Place::Local, 0, self.local)),
            Space::Parameter => Some((Place::Parameter, 0, self.parameters.len())),
            Space::Constant => Some((Place::Module, 0, self.module.len())),
            Space::Generic | Space::Global if window(MODULE_WINDOW) => {
                Some((Place::Module, MODULE_WINDOW, self.module.len()))
            }
            Space::Generic if window(SHARED_WINDOW) => Some((Place::Shared, SHARED_WINDOW, shared)),
            Space::Generic if window(LOCAL_WINDOW) => Some((Place::Local, LOCAL_WINDOW, self.local)),
            Space::Generic if window(PARAMETER_WINDOW) => {
                Some((Place::Parameter, PARAMETER_WINDOW, self.parameters.len()))
            }
            Space::Generic | Space::Global => {
                let within = |buffer: &Buffer| address.wrapping_sub(buffer.address()) < buffer.length.max(1) as u64;
                let index = self.buffers.iter().position(within)?;
                Some((Place::Buffer(index), self.buffers[index].address(), self.buffers[index].length))
            }
        }
    }

    /// The lanes of an access by place, with their offsets there, handed to `visit` one place after the other. Nothing is handed on
    /// where one lane is out of bounds: its number is the error.
    pub fn by_place(
        &self,
        (space, size): (Space, usize),
        addresses: &Long,
        mask: Mask,
        mut visit: impl FnMut(Place, &Long, Mask),
    ) -> Result<(), usize> {
        let mut found: Vec<(Place, u64, Mask)> = Vec::new();
        let mut rest = mask;
        while rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            let (place, start, length) = self.locate(space, addresses[lane]).ok_or(lane)?;
            let most = (length as u64).checked_sub(size as u64).ok_or(lane)?;
            let inside = those(|lane| addresses[lane].wrapping_sub(start) <= most);
            if inside >> lane & 1 == 0 {
                return Err(lane);
            }
            found.push((place, start, rest & inside));
            rest &= !inside;
        }
        for (place, start, mask) in found {
            visit(place, &addresses.map(|address| address.wrapping_sub(start)), mask);
        }
        Ok(())
    }

    /// The bytes of a place; `local` are those of the warp.
    pub fn bytes<'b>(&'b mut self, place: Place, local: &'b mut [u8]) -> &'b mut [u8] {
        match place {
            Place::Buffer(index) => {
                let Buffer { page, offset, length } = self.buffers[index];
                &mut self.pages[page][offset..][..length]
            }
            Place::Shared => &mut self.shared,
            Place::Local => local,
            Place::Parameter => &mut self.parameters,
            Place::Module => &mut self.module,
        }
    }
}

/// A number of 1, 2, 4 or 8 bytes.
pub fn read(bytes: &[u8], at: usize, size: usize) -> u64 {
    match size {
        1 => bytes[at].into(),
        2 => u16::from_le_bytes(taken(bytes, at)).into(),
        4 => u32::from_le_bytes(taken(bytes, at)).into(),
        _ => u64::from_le_bytes(taken(bytes, at)),
    }
}

fn taken<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the range is of N bytes")
}

/// Writes the lowest bytes of a number.
pub fn write(bytes: &mut [u8], at: usize, size: usize, number: u64) {
    bytes[at..at + size].copy_from_slice(&number.to_le_bytes()[..size]);
}
