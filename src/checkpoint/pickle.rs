//! Python's pickles, as far as `torch.save` needs them, without doing anything that one asks for: a call of a function is noted, not made.
//!
//! The readers in candle-core and burn-store copy a value whenever a pickle refers to it again, so that some hundred bytes can ask for more
//! memory than there is, reserve what a pickle claims before it is there, and bring a framework along; serde-pickle knows no calls, and
//! repugnant-pickle is no longer kept. Here every value is kept once and refers to others by their place, so that a pickle needs memory in
//! proportion to its length.

use std::collections::HashMap;

use super::files::shown;

/// The values that a pickle makes.
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: Id,
}

/// A value's place among the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Id(u32);

/// A value, as far as a state dict is made of such.
#[derive(Debug)]
pub(super) enum Value<'a> {
    Int(i64),
    Text(&'a str),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A function or class of Python.
    Global {
        module: &'a str,
        name: &'a str,
    },
    /// What the function makes of the arguments.
    Call {
        function: Id,
        arguments: Id,
    },
    /// Something kept outside of the pickle: a storage.
    Persistent(Id),
    /// Anything else.
    Opaque,
}

/// The newest protocol.
const PROTOCOL: u8 = 5;
/// The most instructions that are followed, each of which makes a value at most: what a model of half a million tensors needs.
const LONGEST: usize = 1 << 24;

impl<'a> Pickle<'a> {
    /// What the pickle in `bytes` makes.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let mut machine = Machine { rest: bytes, values: vec![Value::Opaque], ..Machine::default() };
        for _ in 0..LONGEST {
            let at = bytes.len() - machine.rest.len();
            match machine.step() {
                Ok(None) => {}
                Ok(Some(root)) => return Ok(Self { values: machine.values, root }),
                Err(problem) => return Err(format!("byte {at}: {problem}")),
            }
        }
        Err(format!("has more than {LONGEST} instructions"))
    }

    /// What the pickle is of.
    pub(super) fn root(&self) -> Id {
        self.root
    }

    /// The value at a place that this pickle gave.
    pub(super) fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }
}

/// The machine that a pickle is a program of.
#[derive(Default)]
struct Machine<'a> {
    rest: &'a [u8],
    /// The first one stands for all that are opaque.
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// How long the stack was at each mark that is still open.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// Follows one instruction. At the last one, the result.
    fn step(&mut self) -> Result<Option<Id>, String> {
        let code = self.byte()?;
        let made = match code {
            b'.' => return self.pop().map(Some),
            b')' | 0x85..=0x87 | b't' | b'}' | b'd' | b's' | b'u' => self.container(code)?,
            b']' | b'l' | 0x8f | 0x91 | b'a' | b'e' | 0x90 => self.collection(code)?,
            b'c' | 0x93 | b'Q' | b'R' | 0x81 | 0x92 | b'b' => self.object(code)?,
            b'N' | 0x88 | 0x89 | b'G' | b'I'..=b'M' | 0x8a..=0x8e | b'B' | b'C' | b'F' | b'S'..=b'V' | b'X' | 0x96 => {
                Some(self.scalar(code)?)
            }
            _ => self.bookkeeping(code).map(|()| None)?,
        };
        made.into_iter().for_each(|value| self.push(value));
        Ok(None)
    }

    /// What makes no value: marks, the memo, and what is said of the pickle itself.
    fn bookkeeping(&mut self, code: u8) -> Result<(), String> {
        match code {
            0x80 => self.protocol()?,
            0x95 => self.skip(8)?,
            b'(' => self.marks.push(self.stack.len()),
            b'0' => self.discard()?,
            b'1' => drop(self.pop_marked()?),
            b'2' => self.stack.push(self.top()?),
            b'q' | b'r' | 0x94 => self.remember(code)?,
            b'h' | b'j' => self.recall(code)?,
            other => return Err(format!("instruction {other:#04x}, which no file of torch.save needs")),
        }
        Ok(())
    }

    fn protocol(&mut self) -> Result<(), String> {
        match self.byte()? {
            0..=PROTOCOL => Ok(()),
            newer => Err(format!("protocol {newer}, expected at most {PROTOCOL}")),
        }
    }

    /// Numbers, text and bytes.
    fn scalar(&mut self, code: u8) -> Result<Value<'a>, String> {
        Ok(match code {
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            b'K' => Value::Int(self.byte()?.into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            0x8a => self.long()?,
            b'X' | 0x8c | 0x8d => self.text(code)?,
            b'I' | b'L' => self.decimal()?,
            // None, True, False.
            b'N' | 0x88 | 0x89 => Value::Opaque,
            b'G' => self.skip(8).map(|()| Value::Opaque)?,
            b'F' | b'S' | b'V' => self.line().map(|_| Value::Opaque)?,
            // Bytes, longer numbers and text of Python 2.
            _ => self.bytes(code).map(|_| Value::Opaque)?,
        })
    }

    /// Tuples and dicts.
    fn container(&mut self, code: u8) -> Result<Option<Value<'a>>, String> {
        Ok(Some(match code {
            b')' => Value::Tuple(Vec::new()),
            0x85..=0x87 => Value::Tuple(self.pop_last(usize::from(code - 0x84))?),
            b't' => Value::Tuple(self.pop_marked()?),
            b'}' => Value::Dict(Vec::new()),
            b'd' => Value::Dict(pairs(&self.pop_marked()?)?),
            one_or_more => {
                let items = if one_or_more == b's' { self.pop_last(2)? } else { self.pop_marked()? };
                self.set(&items)?;
                return Ok(None);
            }
        }))
    }

    /// Lists and sets: no tensor of a state dict is in one.
    fn collection(&mut self, code: u8) -> Result<Option<Value<'a>>, String> {
        match code {
            b'a' => return self.pop().map(|_| None),
            b'e' | 0x90 => return self.pop_marked().map(|_| None),
            b'l' | 0x91 => drop(self.pop_marked()?),
            _ => {}
        }
        Ok(Some(Value::Opaque))
    }

    /// Functions, calls and what is kept elsewhere.
    fn object(&mut self, code: u8) -> Result<Option<Value<'a>>, String> {
        Ok(Some(match code {
            b'c' => Value::Global { module: self.line()?, name: self.line()? },
            0x93 => self.global()?,
            b'Q' => Value::Persistent(self.pop()?),
            // The state of an object: a tensor's, or what an OrderedDict has besides its items.
            b'b' => return self.pop().map(|_| None),
            0x92 => self.pop_last(3).map(|_| Value::Opaque)?,
            _ => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call(function, arguments)
            }
        }))
    }

    fn global(&mut self) -> Result<Value<'a>, String> {
        let (name, module) = (self.pop()?, self.pop()?);
        match (self.value(module), self.value(name)) {
            (&Value::Text(module), &Value::Text(name)) => Ok(Value::Global { module, name }),
            _ => Err("a function whose name is not text".into()),
        }
    }

    /// An OrderedDict is a dict; anything else that a function or class makes is left as it is asked for.
    fn call(&self, function: Id, arguments: Id) -> Value<'a> {
        let empty = matches!(self.value(arguments), Value::Tuple(items) if items.is_empty());
        match self.value(function) {
            Value::Global { module: "collections", name: "OrderedDict" } if empty => Value::Dict(Vec::new()),
            _ => Value::Call { function, arguments },
        }
    }

    /// Adds keys and values, in turn, to the dict on top of the stack; what is no dict here keeps none.
    fn set(&mut self, items: &[Id]) -> Result<(), String> {
        let items = pairs(items)?;
        let Id(top) = self.top()?;
        if let Value::Dict(dict) = &mut self.values[top as usize] {
            dict.extend(items);
        }
        Ok(())
    }

    fn remember(&mut self, code: u8) -> Result<(), String> {
        let slot = match code {
            0x94 => self.memo.len() as u32,
            other => self.slot(other == b'q')?,
        };
        self.memo.insert(slot, self.top()?);
        Ok(())
    }

    fn recall(&mut self, code: u8) -> Result<(), String> {
        let slot = self.slot(code == b'h')?;
        let value = *self.memo.get(&slot).ok_or_else(|| format!("nothing was remembered as {slot}"))?;
        self.stack.push(value);
        Ok(())
    }

    fn slot(&mut self, short: bool) -> Result<u32, String> {
        if short { Ok(self.byte()?.into()) } else { self.array().map(u32::from_le_bytes) }
    }

    fn value(&self, Id(place): Id) -> &Value<'a> {
        &self.values[place as usize]
    }

    fn push(&mut self, value: Value<'a>) {
        if let Value::Opaque = value {
            return self.stack.push(Id(0));
        }
        // There are no more values than instructions, and those are fewer than this holds.
        self.stack.push(Id(self.values.len() as u32));
        self.values.push(value);
    }

    /// What is on the stack above the last mark.
    fn above(&self) -> usize {
        self.stack.len() - self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<Id, String> {
        match self.stack.last() {
            Some(&top) if self.above() > 0 => Ok(top),
            _ => Err("nothing is on the stack".into()),
        }
    }

    fn pop(&mut self) -> Result<Id, String> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    /// Forgets the value on top of the stack, or an open mark there.
    fn discard(&mut self) -> Result<(), String> {
        if self.above() == 0 && self.marks.pop().is_some() { Ok(()) } else { self.pop().map(drop) }
    }

    fn pop_last(&mut self, count: usize) -> Result<Vec<Id>, String> {
        if self.above() < count {
            return Err(format!("{} values are on the stack, expected {count}", self.above()));
        }
        Ok(self.stack.split_off(self.stack.len() - count))
    }

    fn pop_marked(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("no mark is on the stack")?;
        Ok(self.stack.split_off(mark))
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], String> {
        let left = self.rest.len();
        let split = usize::try_from(count).ok().and_then(|count| self.rest.split_at_checked(count));
        let (taken, rest) = split.ok_or_else(|| format!("{count} bytes are called for, but {left} are left"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn skip(&mut self, count: u64) -> Result<(), String> {
        self.take(count).map(drop)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or("the pickle ends too early")?;
        self.rest = rest;
        Ok(*taken)
    }

    /// What follows up to the end of the line.
    fn line(&mut self) -> Result<&'a str, String> {
        let end = self.rest.iter().position(|&byte| byte == b'\n').ok_or("a line without an end")?;
        let line = self.take(end as u64)?;
        self.skip(1)?;
        std::str::from_utf8(line).map_err(|error| format!("a line that is no text: {error}"))
    }

    /// A number in decimal, of which only what fits is kept. `01` and `00` are True and False.
    fn decimal(&mut self) -> Result<Value<'a>, String> {
        let line = self.line()?;
        let number = line.trim_end_matches('L').parse();
        Ok(number.map_or(Value::Opaque, Value::Int))
    }

    /// A number of as many bytes as the first one says, of which only what fits is kept.
    fn long(&mut self) -> Result<Value<'a>, String> {
        let length = self.byte()?;
        let bytes = self.take(length.into())?;
        if bytes.len() > 8 {
            return Ok(Value::Opaque);
        }
        let negative = bytes.last().is_some_and(|&last| last > 127);
        let mut whole = [if negative { 0xff } else { 0 }; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        Ok(Value::Int(i64::from_le_bytes(whole)))
    }

    /// Text. What is no UTF-8, as Python's lone surrogates, is nothing that a tensor is called.
    fn text(&mut self, code: u8) -> Result<Value<'a>, String> {
        let bytes = self.bytes(code)?;
        Ok(std::str::from_utf8(bytes).map_or(Value::Opaque, Value::Text))
    }

    /// Bytes after their number, of which the instruction says how long it is.
    fn bytes(&mut self, code: u8) -> Result<&'a [u8], String> {
        let length = match code {
            0x8c | b'U' | b'C' => self.byte()?.into(),
            0x8d | 0x8e | 0x96 => u64::from_le_bytes(self.array()?),
            _ => u32::from_le_bytes(self.array()?).into(),
        };
        self.take(length)
    }
}

/// Keys with their values, from where they are in turn.
fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, String> {
    let (pairs, []) = items.as_chunks::<2>() else {
        return Err(format!("{} keys and values, which are not pairs", items.len()));
    };
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}

impl Value<'_> {
    /// What the value is, for a message.
    pub(super) fn kind(&self) -> String {
        match self {
            Self::Int(number) => number.to_string(),
            Self::Text(text) => format!("the text {}", shown(text)),
            Self::Tuple(_) => "a tuple".into(),
            Self::Dict(_) => "a dict".into(),
            Self::Global { module, name } => format!("the Python object {}", shown(&format!("{module}.{name}"))),
            Self::Call { .. } => "an object of a Python class".into(),
            Self::Persistent(_) => "a storage".into(),
            Self::Opaque => "an object".into(),
        }
    }
}
