//! A warp: 32 lanes in lock step. Lanes that part at a branch run one side after the other and come together at the branch's
//! post-dominator, by a stack of what is left to run.

use crate::atomic;
use crate::compute::Function;
use crate::error::{Site, Stop};
use crate::flow::{ControlFlow, END};
use crate::lanes::{ALL, Long, Mask, WARP, Word, blend, lanes};
use crate::memory::Memory;
use crate::observe::{At, Observer};
use crate::operand::{Register, Source, Special, Vector};
use crate::program::{Instruction, Logic, Op, Program};
use crate::windows::is_within;

/// What a warp runs in.
pub struct Context<'c, 'm, O> {
    /// The kernel.
    pub program: &'c Program,
    /// Where its lanes come together.
    pub flow: &'c ControlFlow,
    /// The launch's memory.
    pub memory: &'c mut Memory<'m>,
    /// Who looks on.
    pub observer: &'c mut O,
    /// Threads of a block, and blocks.
    pub shape: Shape,
    /// The epoch of the block.
    pub epoch: u32,
    /// Whether atomic operations take lanes from the last to the first.
    pub reversed: bool,
    /// Barriers in shared memory.
    pub transfers: &'c mut crate::transfer::Transfers,
}

/// Sizes of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Threads of a block in each dimension.
    pub threads: [u32; 3],
    /// Blocks in each dimension.
    pub blocks: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub dynamic_shared: usize,
}

/// Lanes that run together: where they are, and where they wait for others.
#[derive(Debug, Clone, Copy)]
struct Frame {
    next: usize,
    join: usize,
    mask: Mask,
}

/// What a warp does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum State {
    /// It runs.
    Runs,
    /// It waits at a barrier of the block, an instruction.
    Waits(usize),
    /// It has found that what a barrier in shared memory waits for has not happened, and lets others go on.
    Polls,
    /// All its lanes have ended.
    Done,
}

/// A warp.
pub struct Warp {
    /// The block, and the warp in it.
    pub block: usize,
    /// See `block`.
    pub number: usize,
    /// Lanes that there are.
    pub existing: Mask,
    /// Lanes that have not ended.
    pub running: Mask,
    /// What it does.
    pub state: State,
    /// How often its lanes have waited for each other.
    pub step: u32,
    /// Instructions that it has executed.
    pub executed: u64,
    /// Loop iterations of each lane.
    pub loops: Word,
    pub(crate) words: Vec<Word>,
    pub(crate) longs: Vec<Long>,
    pub(crate) predicates: Vec<Mask>,
    pub(crate) local: Vec<u8>,
    /// Copies that are under way.
    pub(crate) copies: crate::transfer::Copies,
    threads: [Word; 3],
    stack: Vec<Frame>,
}

impl Warp {
    /// A warp at the first instruction, whose registers hold zeros.
    pub fn new(program: &Program, shape: &Shape, block: usize, number: usize) -> Self {
        let [x, y, z] = shape.threads;
        let total = (x * y * z) as usize;
        let count = (total - number * WARP).min(WARP);
        let existing = if count == WARP { ALL } else { (1 << count) - 1 };
        let thread = |lane: usize| (number * WARP + lane) as u32;
        let threads = [
            std::array::from_fn(|lane| thread(lane) % x),
            std::array::from_fn(|lane| thread(lane) / x % y),
            std::array::from_fn(|lane| thread(lane) / (x * y)),
        ];
        let registers = program.registers;
        Self {
            block,
            number,
            existing,
            running: existing,
            state: State::Runs,
            step: 0,
            executed: 0,
            loops: [0; WARP],
            words: vec![[0; WARP]; registers.words],
            longs: vec![[0; WARP]; registers.longs],
            predicates: vec![0; registers.predicates],
            local: vec![0; program.local * WARP],
            copies: Default::default(),
            threads,
            stack: vec![Frame { next: 0, join: END, mask: existing }],
        }
    }

    /// Makes it another block's warp of the same number.
    pub fn restart(&mut self, block: usize) {
        self.words.fill([0; WARP]);
        self.longs.fill([0; WARP]);
        self.predicates.fill(0);
        self.local.fill(0);
        self.copies = Default::default();
        self.stack.clear();
        self.stack.push(Frame { next: 0, join: END, mask: self.existing });
        (self.block, self.running, self.state) = (block, self.existing, State::Runs);
        (self.step, self.executed, self.loops) = (0, 0, [0; WARP]);
    }

    /// The instruction that comes next, and the lanes that will run it; None at the end.
    pub fn upcoming(&mut self) -> Option<(usize, Mask)> {
        while let Some(frame) = self.stack.last() {
            if frame.mask != 0 && frame.next != frame.join {
                return Some((frame.next, frame.mask));
            }
            self.stack.pop();
        }
        None
    }

    /// Executes one instruction.
    pub fn advance<O: Observer>(&mut self, context: &mut Context<'_, '_, O>) -> Result<(), Stop> {
        let Some((instruction, frame)) = self.upcoming() else {
            self.state = State::Done;
            return Ok(());
        };
        let program = context.program;
        let Some(Instruction { guard, op, .. }) = program.code.get(instruction) else {
            // The end of the text is the end of the thread.
            self.end(frame);
            return Ok(());
        };
        let mask = match guard {
            None => frame,
            Some(guard) => frame & (self.predicates[guard.register as usize] ^ if guard.negated { ALL } else { 0 }),
        };
        let at = At { block: self.block, warp: self.number, instruction, epoch: context.epoch, step: self.step };
        context.observer.issued(&at, mask, self.running);
        self.executed += 1;
        if context.flow.heads[instruction] {
            for lane in 0..WARP {
                self.loops[lane] += frame >> lane & 1;
            }
        }
        match op {
            Op::Branch(target) => self.branch(instruction, *target, mask, frame, context.flow.joins[instruction]),
            Op::BranchTable(index, targets) => {
                self.branch_table(instruction, (index, targets), mask, context);
            }
            Op::Exit => {
                self.jump(instruction + 1);
                self.end(mask);
            }
            Op::Barrier(_) => {
                self.jump(instruction + 1);
                self.arrive(&at, mask)?;
            }
            op => {
                self.jump(instruction + 1);
                if mask != 0 {
                    self.execute(&at, mask, op, context)?;
                }
            }
        }
        Ok(())
    }

    fn execute<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        op: &Op,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        match op {
            Op::Compute { function, target, sources } => self.compute(*function, *target, sources, mask, context),
            Op::Compare { function, target, opposite, join, sources } => {
                let found = self.compare(*function, sources, context);
                let other = join.map(|(logic, source)| (logic, self.predicate(&source)));
                let joined = |found: Mask| other.map_or(found, |(logic, other)| joined(logic, found, other));
                if let Some(target) = target {
                    self.set_predicate(*target, joined(found), mask);
                }
                if let Some(opposite) = opposite {
                    self.set_predicate(*opposite, joined(!found), mask);
                }
            }
            Op::Select(target, yes, no, predicate) => {
                let chosen = self.predicate(predicate);
                self.copy(*target, yes, mask & chosen, context);
                self.copy(*target, no, mask & !chosen, context);
            }
            Op::Logic(logic, target, first, second) => {
                let found = joined(*logic, self.predicate(first), self.predicate(second));
                self.set_predicate(*target, found, mask);
            }
            Op::Move(target, source) => self.copy(*target, source, mask, context),
            Op::Pack(target, sources) => self.pack(*target, sources, mask, context),
            Op::Unpack(targets, source) => self.unpack(targets, source, mask, context),
            Op::Load(space, element, targets, address) => {
                self.load(at, mask, (*space, *element), targets, address, context)?;
            }
            Op::Store(space, element, sources, address) => {
                self.store(at, mask, (*space, *element), sources, address, context)?;
            }
            Op::Atomic(it) => atomic::run(self, at, mask, it, context)?,
            Op::Convert(target, source, added) => {
                let sum = self.long(source, context).map(|address| address.wrapping_add(*added));
                self.set_long(*target, &sum, mask);
            }
            Op::Within(target, source, space) => {
                let addresses = self.long(source, context);
                let found = (0..WARP).fold(0, |all, lane| all | u32::from(is_within(*space, addresses[lane])) << lane);
                self.set_predicate(*target, found, mask);
            }
            Op::Collective(collective) => self.collect(at, mask, collective, context)?,
            Op::Matrix(matrix) => self.multiply(at, mask, matrix, context)?,
            Op::Transfer(transfer) => self.transfer(at, mask, transfer, context)?,
            Op::Trap => return Err(Stop::Trap { at: site(at, mask) }),
            Op::Nothing => {}
            Op::Branch(_) | Op::BranchTable(..) | Op::Exit | Op::Barrier(_) => {
                unreachable!("control flow is taken care of before")
            }
        }
        Ok(())
    }

    fn jump(&mut self, next: usize) {
        self.stack.last_mut().expect("lanes are running").next = next;
    }

    /// Ends lanes.
    fn end(&mut self, mask: Mask) {
        self.running &= !mask;
        self.stack.iter_mut().for_each(|frame| frame.mask &= !mask);
        if self.running == 0 {
            self.state = State::Done;
        }
    }

    fn branch(&mut self, instruction: usize, target: usize, taken: Mask, frame: Mask, join: usize) {
        if taken == 0 || taken == frame {
            return self.jump(if taken == 0 { instruction + 1 } else { target });
        }
        self.part(join, &[(instruction + 1, frame & !taken), (target, taken)]);
    }

    /// Parts the lanes that run: each side is run until it comes to `join`.
    fn part(&mut self, join: usize, sides: &[(usize, Mask)]) {
        let top = self.stack.last_mut().expect("lanes are running");
        if top.join == join {
            // Those below wait there for these already.
            self.stack.pop();
        } else {
            top.next = join;
        }
        for &(next, mask) in sides {
            if next != join && mask != 0 {
                self.stack.push(Frame { next, join, mask });
            }
        }
    }

    fn branch_table<O>(
        &mut self,
        instruction: usize,
        (index, targets): (&Source, &[usize]),
        mask: Mask,
        context: &Context<'_, '_, O>,
    ) {
        let index = self.word(index, context);
        let (_, frame) = self.upcoming().expect("lanes are running");
        let mut sides: Vec<(usize, Mask)> = vec![(instruction + 1, frame & !mask)];
        for lane in lanes(mask) {
            // Behind the table nothing is defined: the last entry stands in.
            let target = targets[(index[lane] as usize).min(targets.len() - 1)];
            match sides.iter_mut().find(|(next, _)| *next == target) {
                Some((_, mask)) => *mask |= 1 << lane,
                None => sides.push((target, 1 << lane)),
            }
        }
        sides.retain(|(_, mask)| *mask != 0);
        match sides.as_slice() {
            [(next, _)] => self.jump(*next),
            sides => self.part(context.flow.joins[instruction], sides),
        }
    }

    /// Comes to a barrier of the block: with all lanes, or with none where the guard holds in none.
    fn arrive(&mut self, at: &At, mask: Mask) -> Result<(), Stop> {
        if mask != 0 && mask != self.existing {
            return Err(Stop::DivergentWarp { at: site(at, mask), missing: self.existing & !mask });
        }
        if mask != 0 {
            self.state = State::Waits(at.instruction);
        }
        Ok(())
    }

    fn compute<O>(
        &mut self,
        function: Function,
        target: Register,
        sources: &[Source; 4],
        mask: Mask,
        context: &Context<'_, '_, O>,
    ) {
        use Function as F;
        let (mut a, mut b, mut c, mut d) = ([0; WARP], [0; WARP], [0; WARP], [0; WARP]);
        let (mut x, mut y, mut z) = ([0; WARP], [0; WARP], [0; WARP]);
        macro_rules! word {
            ($at:literal, $room:ident) => {
                self.word_in(&sources[$at], &mut $room, context)
            };
        }
        macro_rules! long {
            ($at:literal, $room:ident) => {
                self.long_in(&sources[$at], &mut $room, context)
            };
        }
        enum Result {
            Word(Word),
            Long(Long),
        }
        let result = match function {
            F::W(f) => Result::Word(f(word!(0, a))),
            F::WW(f) => Result::Word(f(word!(0, a), word!(1, b))),
            F::WWW(f) => Result::Word(f(word!(0, a), word!(1, b), word!(2, c))),
            F::WWWW(f) => Result::Word(f(word!(0, a), word!(1, b), word!(2, c), word!(3, d))),
            F::WofL(f) => Result::Word(f(long!(0, x))),
            F::L(f) => Result::Long(f(long!(0, x))),
            F::LL(f) => Result::Long(f(long!(0, x), long!(1, y))),
            F::LLL(f) => Result::Long(f(long!(0, x), long!(1, y), long!(2, z))),
            F::LofLW(f) => Result::Long(f(long!(0, x), word!(1, b))),
            F::LofLLW(f) => Result::Long(f(long!(0, x), long!(1, y), word!(2, c))),
            F::LofLWW(f) => Result::Long(f(long!(0, x), word!(1, b), word!(2, c))),
            F::LofLLWW(f) => Result::Long(f(long!(0, x), long!(1, y), word!(2, c), word!(3, d))),
            F::LofW(f) => Result::Long(f(word!(0, a))),
            F::LofWW(f) => Result::Long(f(word!(0, a), word!(1, b))),
            F::LofWWL(f) => Result::Long(f(word!(0, a), word!(1, b), long!(2, z))),
            F::PofW(_) | F::PofWW(_) | F::PofL(_) | F::PofLL(_) => unreachable!("a comparison is no computation"),
        };
        match result {
            Result::Word(result) => self.set_word(target, &result, mask),
            Result::Long(result) => self.set_long(target, &result, mask),
        }
    }

    fn compare<O>(&self, function: Function, sources: &[Source; 4], context: &Context<'_, '_, O>) -> Mask {
        let (mut a, mut b, mut x, mut y) = ([0; WARP], [0; WARP], [0; WARP], [0; WARP]);
        let [first, second, ..] = sources;
        match function {
            Function::PofW(f) => f(self.word_in(first, &mut a, context)),
            Function::PofWW(f) => f(self.word_in(first, &mut a, context), self.word_in(second, &mut b, context)),
            Function::PofL(f) => f(self.long_in(first, &mut x, context)),
            Function::PofLL(f) => f(self.long_in(first, &mut x, context), self.long_in(second, &mut y, context)),
            _ => unreachable!("a computation is no comparison"),
        }
    }

    fn copy<O>(&mut self, target: Register, source: &Source, mask: Mask, context: &Context<'_, '_, O>) {
        match target {
            Register::Word(_) => {
                let value = self.word(source, context);
                self.set_word(target, &value, mask);
            }
            Register::Long(_) => {
                let value = self.long(source, context);
                self.set_long(target, &value, mask);
            }
            Register::Predicate(target) => {
                let value = self.predicate(source);
                self.set_predicate(target, value, mask);
            }
        }
    }

    fn pack<O>(&mut self, target: Register, sources: &[Source], mask: Mask, context: &Context<'_, '_, O>) {
        let bits = if matches!(target, Register::Long(_)) { 64 } else { 32 } / sources.len();
        let mut packed: Long = [0; WARP];
        for (at, source) in sources.iter().enumerate() {
            let part = self.long(source, context);
            for lane in 0..WARP {
                packed[lane] |= (part[lane] & ((1 << bits) - 1)) << (at * bits);
            }
        }
        self.set(target, &packed, mask);
    }

    fn unpack<O>(&mut self, targets: &Vector, source: &Source, mask: Mask, context: &Context<'_, '_, O>) {
        let wide = matches!(source, Source::Register(Register::Long(_)));
        let bits = if wide { 64 } else { 32 } / targets.len();
        let whole = self.long(source, context);
        for (at, target) in targets.iter().enumerate() {
            let part = whole.map(|number| number >> (at * bits) & ((1 << bits) - 1));
            if let Some(target) = target {
                self.set(*target, &part, mask);
            }
        }
    }
}

/// The first lane of a mask at an instruction.
pub fn site(at: &At, mask: Mask) -> Site {
    let lane = mask.trailing_zeros().min(WARP as u32 - 1) as usize;
    Site { block: at.block, thread: at.warp * WARP + lane, instruction: at.instruction }
}

fn joined(logic: Logic, first: Mask, second: Mask) -> Mask {
    match logic {
        Logic::And => first & second,
        Logic::Or => first | second,
        Logic::Xor => first ^ second,
        Logic::Not => !first,
        Logic::First => first,
    }
}

/// Reading and writing registers.
impl Warp {
    /// A source as words, a register where it lies, else in `room`.
    pub(crate) fn word_in<'a, O>(
        &'a self,
        source: &Source,
        room: &'a mut Word,
        context: &Context<'_, '_, O>,
    ) -> &'a Word {
        match source {
            Source::Register(Register::Word(at)) => return &self.words[*at as usize],
            Source::Register(Register::Long(at)) => *room = self.longs[*at as usize].map(|number| number as u32),
            Source::Register(Register::Predicate(_)) | Source::Not(_) => {
                let mask = self.predicate(source);
                *room = std::array::from_fn(|lane| mask >> lane & 1);
            }
            Source::Constant(number) => *room = [*number as u32; WARP],
            Source::Special(special) => *room = self.special(*special, context),
        }
        room
    }

    /// A source as words.
    pub(crate) fn word<O>(&self, source: &Source, context: &Context<'_, '_, O>) -> Word {
        let mut room = [0; WARP];
        *self.word_in(source, &mut room, context)
    }

    /// A source as long words.
    pub(crate) fn long_in<'a, O>(
        &'a self,
        source: &Source,
        room: &'a mut Long,
        context: &Context<'_, '_, O>,
    ) -> &'a Long {
        match source {
            Source::Register(Register::Long(at)) => return &self.longs[*at as usize],
            Source::Constant(number) => *room = [*number; WARP],
            source => *room = self.word(source, context).map(u64::from),
        }
        room
    }

    /// A source as long words.
    pub(crate) fn long<O>(&self, source: &Source, context: &Context<'_, '_, O>) -> Long {
        let mut room = [0; WARP];
        *self.long_in(source, &mut room, context)
    }

    /// A predicate, or a number that stands for one: it holds where it is not zero.
    pub(crate) fn predicate(&self, source: &Source) -> Mask {
        match source {
            Source::Register(Register::Predicate(at)) => self.predicates[*at as usize],
            Source::Not(at) => !self.predicates[*at as usize],
            Source::Constant(0) => 0,
            Source::Constant(_) => ALL,
            source => unreachable!("{source:?} is no predicate"),
        }
    }

    /// Writes numbers, cut to what the register holds.
    pub(crate) fn set(&mut self, target: Register, value: &Long, mask: Mask) {
        match target {
            Register::Word(_) => self.set_word(target, &value.map(|number| number as u32), mask),
            _ => self.set_long(target, value, mask),
        }
    }

    /// Writes words.
    pub(crate) fn set_word(&mut self, target: Register, value: &Word, mask: Mask) {
        match target {
            Register::Word(at) => blend(&mut self.words[at as usize], value, mask),
            Register::Long(at) => blend(&mut self.longs[at as usize], &value.map(u64::from), mask),
            Register::Predicate(at) => {
                let found = (0..WARP).fold(0, |all, lane| all | u32::from(value[lane] != 0) << lane);
                self.set_predicate(at, found, mask);
            }
        }
    }

    /// Writes long words.
    pub(crate) fn set_long(&mut self, target: Register, value: &Long, mask: Mask) {
        match target {
            Register::Long(at) => blend(&mut self.longs[at as usize], value, mask),
            target => self.set_word(target, &value.map(|number| number as u32), mask),
        }
    }

    /// Writes a predicate.
    pub(crate) fn set_predicate(&mut self, target: u32, value: Mask, mask: Mask) {
        let target = &mut self.predicates[target as usize];
        *target = *target & !mask | value & mask;
    }

    fn special<O>(&self, special: Special, context: &Context<'_, '_, O>) -> Word {
        let Shape { threads, blocks, dynamic_shared } = context.shape;
        let by_lane = |of: fn(u32) -> u32| std::array::from_fn(|lane| of(lane as u32));
        let [columns, rows, _] = blocks.map(|count| count as usize);
        let (column, rest) = (self.block % columns, self.block / columns);
        let block_at = [column, rest % rows, rest / rows].map(|at| at as u32);
        match special {
            Special::Thread(dimension) => self.threads[usize::from(dimension)],
            Special::Threads(dimension) => [threads[usize::from(dimension)]; WARP],
            Special::Block(dimension) => [block_at[usize::from(dimension)]; WARP],
            Special::Blocks(dimension) => [blocks[usize::from(dimension)]; WARP],
            Special::Lane => by_lane(|lane| lane),
            Special::Warp => [self.number as u32; WARP],
            Special::LanesBelow => by_lane(|lane| (1 << lane) - 1),
            Special::LanesUpTo => by_lane(|lane| u32::MAX >> (31 - lane)),
            Special::LaneAlone => by_lane(|lane| 1 << lane),
            Special::LanesFrom => by_lane(|lane| u32::MAX << lane),
            Special::LanesAbove => by_lane(|lane| u32::MAX << lane << 1),
            Special::Clock => [self.executed as u32; WARP],
            Special::DynamicShared => [dynamic_shared as u32; WARP],
            Special::TotalShared => [context.memory.shared.len() as u32; WARP],
        }
    }
}
