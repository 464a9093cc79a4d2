//! What instructions name: registers, predicates, numbers, addresses, and the spaces and elements of memory.

/// A register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Register {
    /// Of up to 32 bits.
    Word(u32),
    /// Of 64 bits.
    Long(u32),
    /// One bit.
    Predicate(u32),
}

/// A predicate as it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Predicate {
    /// Which.
    pub register: u32,
    /// Whether it is read as its opposite.
    pub negated: bool,
}

/// What an instruction reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A register.
    Register(Register),
    /// A predicate's opposite.
    Not(u32),
    /// A number, or a variable's address.
    Constant(u64),
    /// What the hardware knows of the thread.
    Special(Special),
}

/// Registers that the hardware sets (section 10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// The thread in its block, along a dimension.
    Thread(u8),
    /// Threads of a block.
    Threads(u8),
    /// The block in the grid.
    Block(u8),
    /// Blocks of the grid.
    Blocks(u8),
    /// The lane in its warp.
    Lane,
    /// The warp in its block.
    Warp,
    /// Lanes below, not above, equal to, not below, above one's own.
    LanesBelow,
    /// See [`Special::LanesBelow`].
    LanesUpTo,
    /// See [`Special::LanesBelow`].
    LaneAlone,
    /// See [`Special::LanesBelow`].
    LanesFrom,
    /// See [`Special::LanesBelow`].
    LanesAbove,
    /// Instructions that the warp has executed.
    Clock,
    /// Bytes of dynamic shared memory.
    DynamicShared,
    /// Bytes of all shared memory.
    TotalShared,
}

/// Where a variable or an address lies (section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Space {
    /// The address says where.
    Generic,
    /// Device memory.
    Global,
    /// Memory of the block.
    Shared,
    /// Memory of the thread.
    Local,
    /// The kernel's parameters.
    Parameter,
    /// Constants of the module.
    Constant,
}

/// An address: what a register holds, and an offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// None: the offset alone.
    pub base: Option<Register>,
    /// Bytes.
    pub offset: i64,
}

/// An element of memory as a register takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Element {
    /// Bytes.
    pub size: u8,
    /// Whether a wider register repeats the sign.
    pub signed: bool,
}

/// Registers of a vector operand; None where the number goes nowhere.
pub type Vector = Box<[Option<Register>]>;

/// Bytes of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub offset: usize,
    /// How many.
    pub size: usize,
}
