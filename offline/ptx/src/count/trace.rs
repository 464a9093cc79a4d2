//! What each warp of a block did, instruction by instruction, for a model of [`time`](crate::time) to replay.

/// An instruction that a warp issued, and what it took of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Step {
    /// The instruction.
    pub instruction: u32,
    /// Whether any lane executed it.
    pub active: bool,
    /// Cycles of shared memory.
    pub shared: u16,
    /// Different words of shared memory, of four bytes.
    pub words: u16,
    /// Of an atomic operation on shared memory, the most lanes that hit one address.
    pub same_address: u16,
    /// Lines of the first-level cache that were looked up.
    pub tags: u16,
    /// Sectors that came from the second-level cache, or went there.
    pub sectors: u16,
    /// The buffer that they are of.
    pub buffer: u16,
}

/// What a block's warps did, each from its first instruction to its last.
pub type Trace = Vec<Vec<Step>>;

/// Traces of the first blocks that run, until they are long enough.
#[derive(Debug, Default)]
pub(super) struct Traces {
    /// A trace a block.
    pub blocks: Vec<Trace>,
    steps: usize,
    room: usize,
    open: bool,
}

impl Traces {
    /// Keeps whole blocks until they have `room` steps together.
    pub fn new(room: usize) -> Self {
        Self { room, ..Self::default() }
    }

    pub fn begin_block(&mut self) {
        self.open = self.steps < self.room;
        if self.open {
            self.blocks.push(Vec::new());
        }
    }

    pub fn issued(&mut self, warp: usize, instruction: usize, active: bool) {
        let Some(block) = self.blocks.last_mut().filter(|_| self.open) else { return };
        if block.len() <= warp {
            block.resize_with(warp + 1, Vec::new);
        }
        block[warp].push(Step { instruction: instruction as u32, active, ..Step::default() });
        self.steps += 1;
    }

    /// The step that a warp is at.
    pub fn current(&mut self, warp: usize) -> Option<&mut Step> {
        self.blocks.last_mut().filter(|_| self.open)?.get_mut(warp)?.last_mut()
    }
}
