//! A kernel as it is executed: its registers by bank, its memory, and its instructions with every name resolved.

pub(crate) mod fragment;
pub(crate) mod matrix;
pub(crate) mod transfer;

use self::matrix::Matrix;
use self::transfer::Transfer;
use crate::compute::Function;
use crate::operand::{Address, Element, Predicate, Range, Register, Source, Space, Vector};

/// A kernel.
#[derive(Debug, Clone, Default)]
pub struct Program {
    /// The entry point.
    pub entry: String,
    /// Registers of a thread by bank.
    pub registers: Banks,
    /// Where each parameter lies in the block of parameters, and its bytes.
    pub parameters: Vec<Range>,
    /// Bytes of shared memory that the code names itself; what the launch asks for lies right behind them.
    pub static_shared: usize,
    /// Bytes of local memory of a thread.
    pub local: usize,
    /// Variables of the module: constants and global ones.
    pub module: Vec<u8>,
    /// The instructions.
    pub code: Vec<Instruction>,
}

/// How many registers there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Banks {
    /// Of up to 32 bits.
    pub words: usize,
    /// Of 64 bits.
    pub longs: usize,
    /// Predicates.
    pub predicates: usize,
}

/// An instruction.
#[derive(Debug, Clone)]
pub struct Instruction {
    /// Lanes whose predicate is as said execute it; None executes in all.
    pub guard: Option<Predicate>,
    /// What it does.
    pub op: Op,
    /// Its name in PTX.
    pub opcode: Box<str>,
    /// The line of the source that it comes from; 0 where that is not known.
    pub line: u32,
    /// The bytes of a load that are used, a bit each: NVVM may load more, which goes nowhere.
    pub used: u32,
    /// Registers that it reads.
    pub reads: Box<[Register]>,
    /// Registers that it writes.
    pub writes: Box<[Register]>,
}

/// What an instruction does.
#[derive(Debug, Clone)]
pub enum Op {
    /// A function of registers.
    Compute {
        /// Which.
        function: Function,
        /// Its result.
        target: Register,
        /// As many as the function takes; the rest is not read.
        sources: [Source; 4],
    },
    /// A comparison into a predicate, perhaps joined with another, and into that one's opposite.
    Compare {
        /// The comparison.
        function: Function,
        /// The result.
        target: Option<u32>,
        /// Takes the result with the comparison negated.
        opposite: Option<u32>,
        /// What the comparison is joined with.
        join: Option<(Logic, Source)>,
        /// What is compared.
        sources: [Source; 4],
    },
    /// One of two registers by a predicate: target, where it holds, where not, predicate.
    Select(Register, Source, Source, Source),
    /// Logic of predicates: target, operands.
    Logic(Logic, u32, Source, Source),
    /// A copy.
    Move(Register, Source),
    /// Numbers side by side in a wider register, the first in the lowest bits.
    Pack(Register, Box<[Source]>),
    /// The same taken apart.
    Unpack(Vector, Source),
    /// A load of as many elements as there are targets.
    Load(Space, Element, Vector, Address),
    /// A store.
    Store(Space, Element, Box<[Source]>, Address),
    /// An atomic operation: what it adds and, of a compare-and-swap, what it compares with first; `target` takes what was there.
    Atomic(Box<Atomic>),
    /// A generic address of one in a space, or the other way round: target, source, what is added.
    Convert(Register, Source, u64),
    /// Whether an address lies in a space.
    Within(u32, Source, Space),
    /// A jump to an instruction.
    Branch(usize),
    /// A jump by number: index and the instructions to jump to.
    BranchTable(Source, Box<[usize]>),
    /// The end of the thread.
    Exit,
    /// The end of the launch, with an error.
    Trap,
    /// Lanes exchange numbers or wait for each other.
    Collective(Box<Collective>),
    /// Warps of the block wait for each other.
    Barrier(Barrier),
    /// Matrix units.
    Matrix(Box<Matrix>),
    /// Copies that go on while the thread does, and what waits for them.
    Transfer(Box<Transfer>),
    /// Hints and fences: lanes run in order here.
    Nothing,
}

/// What predicates are joined by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logic {
    /// Both.
    And,
    /// At least one.
    Or,
    /// One alone.
    Xor,
    /// The first's opposite.
    Not,
    /// The first.
    First,
}

/// An atomic operation on memory (sections 9.7.13.5 and 9.7.13.6).
#[derive(Debug, Clone)]
pub struct Atomic {
    /// Where.
    pub space: Space,
    /// What.
    pub function: AtomicFunction,
    /// Bytes of an element.
    pub size: u8,
    /// What was there before, an element each; none for `red`.
    pub targets: Vector,
    /// The place.
    pub address: Address,
    /// Operands, an element each; of a compare-and-swap the number that is compared, then the one that is stored.
    pub sources: Box<[Source]>,
}

/// What an atomic operation makes of what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are PTX's")]
pub enum AtomicFunction {
    Add,
    AddF16,
    AddF16x2,
    AddBf16,
    AddBf16x2,
    AddF32,
    AddF64,
    And,
    Or,
    Xor,
    Exchange,
    CompareAndSwap,
    Increment,
    Decrement,
    MinUnsigned,
    MaxUnsigned,
    MinSigned,
    MaxSigned,
}

/// What the lanes of a warp do together. The members that an instruction names must come to it together.
#[derive(Debug, Clone)]
pub struct Collective {
    /// What.
    pub kind: CollectiveKind,
    /// The result.
    pub target: Option<Register>,
    /// A predicate beside it.
    pub predicate: Option<u32>,
    /// Operands.
    pub sources: [Source; 3],
    /// The lanes that take part; None are those that run.
    pub members: Option<Source>,
}

/// See [`Collective`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are PTX's")]
pub enum CollectiveKind {
    /// `bar.warp.sync`
    Wait,
    ShuffleUp,
    ShuffleDown,
    ShuffleXor,
    ShuffleIndex,
    VoteAll,
    VoteAny,
    VoteUniform,
    VoteBallot,
    MatchAny,
    MatchAll,
    ActiveMask,
    Elect,
    ReduceAdd,
    ReduceMinSigned,
    ReduceMaxSigned,
    ReduceMinUnsigned,
    ReduceMaxUnsigned,
    ReduceAnd,
    ReduceOr,
    ReduceXor,
}

/// A barrier of a block's warps (section 9.7.13.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Barrier {
    /// Which of sixteen.
    pub number: Source,
    /// Threads that it waits for; None are all of the block.
    pub threads: Option<Source>,
    /// Whether the warp waits, or only says that it was here.
    pub waits: bool,
    /// What the threads find out together: target, operand.
    pub vote: Option<(BarrierVote, Register, Source)>,
}

/// What threads find out at a barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarrierVote {
    /// How many.
    Count,
    /// Whether all.
    All,
    /// Whether any.
    Any,
}
