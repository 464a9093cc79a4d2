//! One instruction of a warp: which lanes execute it, and what it does.

use super::atomic;
use super::context::Context;
use super::observe::{At, Observer};
use super::warp::{State, Warp};
use crate::compute::Function;
use crate::error::Stop;
use crate::lanes::{ALL, Long, Mask, WARP, Word, lanes, those};
use crate::operand::{Register, Source, Vector};
use crate::program::{Instruction, Logic, Op};
use crate::windows::is_within;

impl Warp {
    /// Executes one instruction.
    pub(super) fn advance<O: Observer>(&mut self, context: &mut Context<'_, '_, O>) -> Result<(), Stop> {
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
                self.set_predicate(*target, those(|lane| is_within(*space, addresses[lane])), mask);
            }
            Op::Collective(collective) => self.collect(at, mask, collective, context)?,
            Op::Matrix(matrix) => self.multiply(at, mask, matrix, context)?,
            Op::Transfer(transfer) => self.transfer(at, mask, transfer, context)?,
            Op::Trap => return Err(Stop::Trap { at: at.site(mask) }),
            Op::Nothing => {}
            Op::Branch(_) | Op::BranchTable(..) | Op::Exit | Op::Barrier(_) => {
                unreachable!("control flow is taken care of before")
            }
        }
        Ok(())
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
            return Err(Stop::DivergentWarp { at: at.site(mask), missing: self.existing & !mask });
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

fn joined(logic: Logic, first: Mask, second: Mask) -> Mask {
    match logic {
        Logic::And => first & second,
        Logic::Or => first | second,
        Logic::Xor => first ^ second,
        Logic::Not => !first,
        Logic::First => first,
    }
}
