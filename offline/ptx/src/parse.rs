//! PTX as text, as NVRTC writes it: declarations, labels, line numbers and statements with their operands (section 4).

use std::collections::HashMap;

use crate::error::ParseError;
use crate::program::{Banks, Predicate, Range, Register, Source, Special};

/// A statement before its instruction is looked up.
#[derive(Debug, Clone, PartialEq)]
pub struct Statement {
    pub guard: Option<Predicate>,
    pub opcode: String,
    pub operands: Vec<Operand>,
    /// Of the source.
    pub line: u32,
    /// Of the PTX.
    pub at: usize,
}

/// An operand as it is written.
#[derive(Debug, Clone, PartialEq)]
pub enum Operand {
    Source(Source),
    /// `_`, or a number that goes nowhere.
    Nowhere,
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `a|b`
    Pair(Register, u32),
    /// `[a+16]`, and `[a, {b, c}]` of a tensor.
    Address {
        base: Option<Register>,
        offset: i64,
    },
    /// A label, or a table of labels.
    Label(String),
}

/// A kernel's text, taken apart.
#[derive(Debug, Default)]
pub struct Parsed {
    pub entry: String,
    pub registers: Banks,
    pub parameters: Vec<Range>,
    pub static_shared: usize,
    pub local: usize,
    pub module: Vec<u8>,
    pub statements: Vec<Statement>,
    /// Of each label, the statement that follows it.
    pub labels: HashMap<String, usize>,
    /// Lists of labels to jump to by number.
    pub tables: HashMap<String, Vec<String>>,
}

/// Addresses that generic ones are made of: what is added to an offset in shared, local, parameter and module memory.
pub const SHARED_WINDOW: u64 = 1 << 60;
/// See [`SHARED_WINDOW`].
pub const LOCAL_WINDOW: u64 = 2 << 60;
/// See [`SHARED_WINDOW`].
pub const PARAMETER_WINDOW: u64 = 3 << 60;
/// See [`SHARED_WINDOW`]. Global addresses are generic: what the module names lies here, above all buffers.
pub const MODULE_WINDOW: u64 = 4 << 60;

/// Registers of one name and a number, `%r<10>`, or of one name alone.
#[derive(Clone, Copy)]
struct Family {
    kind: fn(u32) -> Register,
    first: u32,
    count: u32,
}

struct Parser {
    out: Parsed,
    /// Names of registers by scope, the innermost last.
    scopes: Vec<HashMap<String, Family>>,
    variables: HashMap<String, u64>,
    /// The file that the source is, and the line of it.
    line: u32,
    at: usize,
    /// Dynamic shared memory is declared before the static one may be; its address is known at the end.
    dynamic: Vec<String>,
}

/// Takes a kernel's text apart.
pub fn parse(text: &str) -> Result<Parsed, ParseError> {
    let mut parser = Parser {
        out: Parsed::default(),
        scopes: vec![HashMap::new()],
        variables: HashMap::new(),
        line: 0,
        at: 0,
        dynamic: Vec::new(),
    };
    parser.variables(text)?;
    let mut pending = String::new();
    for (number, line) in text.lines().enumerate() {
        parser.at = number + 1;
        let line = line.split("//").next().unwrap_or_default().trim();
        if line.starts_with(".section") {
            // What debuggers read follows to the end.
            break;
        }
        if pending.is_empty() && parser.takes_line(line) {
            continue;
        }
        parser.characters(line, &mut pending)?;
    }
    if !pending.trim().is_empty() {
        return Err(parser.syntax(format!("{} does not end", pending.trim())));
    }
    Ok(parser.out)
}

impl Parser {
    fn syntax(&self, reason: impl Into<String>) -> ParseError {
        ParseError::Syntax { line: self.at, reason: reason.into() }
    }

    /// Takes a line that is a directive without a semicolon.
    fn takes_line(&mut self, line: &str) -> bool {
        if let Some(place) = line.strip_prefix(".loc") {
            self.line = source_line(place).unwrap_or(self.line);
            return true;
        }
        line.is_empty() || [".version", ".target", ".address_size", ".file"].iter().any(|it| line.starts_with(it))
    }

    /// Adds a line's characters to the statement that is open and closes it where it ends.
    fn characters(&mut self, line: &str, pending: &mut String) -> Result<(), ParseError> {
        let mut depth = pending.matches('{').count() - pending.matches('}').count().min(pending.matches('{').count());
        for character in line.chars() {
            let empty = pending.trim().is_empty();
            match character {
                ';' => {
                    self.statement(pending.trim())?;
                    pending.clear();
                    depth = 0;
                }
                '{' if empty || self.is_head(pending) => {
                    if !empty {
                        self.head(pending.trim())?;
                    }
                    pending.clear();
                    self.scopes.push(HashMap::new());
                }
                '}' if empty => {
                    pending.clear();
                    self.scopes.pop();
                    if self.scopes.is_empty() {
                        return Err(self.syntax("a brace closes that nothing opened"));
                    }
                }
                ':' if depth == 0 && is_label(pending.trim()) => {
                    let next = self.out.statements.len();
                    self.out.labels.insert(pending.trim().to_string(), next);
                    pending.clear();
                }
                _ => {
                    depth += usize::from(character == '{');
                    pending.push(character);
                }
            }
        }
        if !pending.is_empty() {
            pending.push(' ');
        }
        Ok(())
    }

    fn is_head(&self, pending: &str) -> bool {
        [".entry", ".func"].iter().any(|word| pending.contains(word))
    }

    /// A kernel's name and parameters.
    fn head(&mut self, head: &str) -> Result<(), ParseError> {
        if head.contains(".func") {
            return Err(self.syntax("functions besides the kernel are not known"));
        }
        if !self.out.entry.is_empty() {
            return Err(self.syntax("there is more than one kernel"));
        }
        let (name, rest) = head.split_once(".entry").map(|it| it.1).unwrap_or_default().split_once('(').unwrap_or((
            head.split_once(".entry").map(|it| it.1).unwrap_or_default().split_whitespace().next().unwrap_or_default(),
            "",
        ));
        self.out.entry = name.trim().to_string();
        let parameters = rest.split(')').next().unwrap_or_default();
        let mut end = 0usize;
        for parameter in parameters.split(',').map(str::trim).filter(|it| !it.is_empty()) {
            let variable = Variable::parse(parameter).ok_or_else(|| self.syntax(format!("parameter {parameter}")))?;
            let offset = end.next_multiple_of(variable.alignment.max(1));
            self.variables.insert(variable.name, offset as u64);
            self.out.parameters.push(Range { offset, size: variable.bytes });
            end = offset + variable.bytes;
        }
        Ok(())
    }

    /// Shared, local, global and constant variables, wherever they are declared: code may name them before.
    fn variables(&mut self, text: &str) -> Result<(), ParseError> {
        let joined = |line: &str| line.split("//").next().unwrap_or_default().trim().to_string();
        for (number, line) in text.lines().map(joined).enumerate() {
            self.at = number + 1;
            let words: Vec<&str> = line.split_whitespace().collect();
            let has = |word| words.contains(&word);
            let space = [".shared", ".local", ".const", ".global"].into_iter().find(|space| has(space));
            let Some(space) = space.filter(|_| line.starts_with('.') && !has(".param")) else { continue };
            let declared = line.trim_end_matches(';');
            let variable = Variable::parse(declared).ok_or_else(|| self.syntax(format!("variable {declared}")))?;
            self.variable(space, variable);
        }
        for name in std::mem::take(&mut self.dynamic) {
            // Behind what is static, where any element may lie.
            self.variables.insert(name, self.out.static_shared.next_multiple_of(128) as u64);
        }
        Ok(())
    }

    fn variable(&mut self, space: &str, variable: Variable) {
        let Variable { name, bytes, alignment, data } = variable;
        if space == ".shared" && bytes == 0 {
            self.dynamic.push(name);
            return;
        }
        let place = |end: &mut usize| {
            let offset = end.next_multiple_of(alignment.max(1));
            *end = offset + bytes;
            offset as u64
        };
        let address = match space {
            ".shared" => place(&mut self.out.static_shared),
            ".local" => place(&mut self.out.local),
            _ => {
                let mut end = self.out.module.len();
                let offset = place(&mut end);
                self.out.module.resize(end, 0);
                self.out.module[offset as usize..][..data.len()].copy_from_slice(&data);
                // A constant's address is its offset in the window of constants, a global one is generic.
                if space == ".global" { MODULE_WINDOW + offset } else { offset }
            }
        };
        self.variables.insert(name, address);
    }

    fn statement(&mut self, text: &str) -> Result<(), ParseError> {
        if let Some(declared) = text.strip_prefix(".reg") {
            return self.registers(declared.trim());
        }
        if let Some(table) = text.strip_prefix(".branchtargets") {
            let last = self.out.labels.iter().find(|(_, at)| **at == self.out.statements.len());
            let name = last.map(|(name, _)| name.clone()).ok_or_else(|| self.syntax("a table without a label"))?;
            self.out.tables.insert(name, table.split(',').map(|it| it.trim().to_string()).collect());
            return Ok(());
        }
        if text.starts_with('.') || text.is_empty() {
            // Pragmas, and variables, which are known.
            return Ok(());
        }
        let (guard, text) = self.guard(text)?;
        let (opcode, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let operands = split(rest).into_iter().map(|operand| self.operand(operand)).collect::<Result<Vec<_>, _>>()?;
        let statement = Statement { guard, opcode: opcode.to_string(), operands, line: self.line, at: self.at };
        self.out.statements.push(statement);
        Ok(())
    }

    fn guard<'a>(&self, text: &'a str) -> Result<(Option<Predicate>, &'a str), ParseError> {
        let Some(rest) = text.strip_prefix('@') else { return Ok((None, text)) };
        let (name, rest) = rest.split_once(char::is_whitespace).ok_or_else(|| self.syntax("a guard alone"))?;
        let (name, negated) = name.strip_prefix('!').map_or((name, false), |name| (name, true));
        match self.register(name) {
            Some(Register::Predicate(register)) => Ok((Some(Predicate { register, negated }), rest.trim())),
            _ => Err(self.syntax(format!("{name} is no predicate"))),
        }
    }

    /// `.f32 %f<31>` or `.pred p, q`.
    fn registers(&mut self, declared: &str) -> Result<(), ParseError> {
        let (ty, names) = declared.split_once(char::is_whitespace).ok_or_else(|| self.syntax("registers"))?;
        let banks = &mut self.out.registers;
        let (kind, end): (fn(u32) -> Register, &mut usize) = match ty {
            ".pred" => (Register::Predicate, &mut banks.predicates),
            ".b64" | ".u64" | ".s64" | ".f64" => (Register::Long, &mut banks.longs),
            ".b8" | ".u8" | ".s8" | ".b16" | ".u16" | ".s16" | ".f16" | ".b32" | ".u32" | ".s32" | ".f32"
            | ".f16x2" => (Register::Word, &mut banks.words),
            _ => return Err(ParseError::Syntax { line: self.at, reason: format!("registers of type {ty}") }),
        };
        let scope = self.scopes.last_mut().expect("a scope is open");
        for name in names.split(',').map(str::trim) {
            let (name, count) = match name.split_once('<') {
                Some((name, count)) => (name, count.trim_end_matches('>').parse().unwrap_or(0)),
                None => (name, 1),
            };
            scope.insert(name.to_string(), Family { kind, first: *end as u32, count });
            *end += count as usize;
        }
        Ok(())
    }

    fn register(&self, name: &str) -> Option<Register> {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number: Option<u32> = name[stem.len()..].parse().ok();
        self.scopes.iter().rev().find_map(|scope| {
            if let Some(family) = scope.get(name) {
                return Some((family.kind)(family.first));
            }
            let (family, number) = (scope.get(stem)?, number?);
            (number < family.count).then(|| (family.kind)(family.first + number))
        })
    }

    fn operand(&self, text: &str) -> Result<Operand, ParseError> {
        if let Some(inner) = text.strip_prefix('{').and_then(|it| it.strip_suffix('}')) {
            return split(inner).into_iter().map(|it| self.operand(it)).collect::<Result<_, _>>().map(Operand::Vector);
        }
        if let Some(inner) = text.strip_prefix('[').and_then(|it| it.strip_suffix(']')) {
            return self.address(inner.trim());
        }
        if let Some((first, second)) = text.split_once('|') {
            let pair = (self.register(first.trim()), self.register(second.trim()));
            return match (pair, second.trim()) {
                ((Some(first), Some(Register::Predicate(second))), _) => Ok(Operand::Pair(first, second)),
                ((Some(first), None), "_") => Ok(Operand::Source(Source::Register(first))),
                _ => Err(self.syntax(format!("operand {text}"))),
            };
        }
        if text == "_" {
            return Ok(Operand::Nowhere);
        }
        if let Some(name) = text.strip_prefix('!') {
            return match self.register(name) {
                Some(Register::Predicate(register)) => Ok(Operand::Source(Source::Not(register))),
                _ => Err(self.syntax(format!("operand {text}"))),
            };
        }
        if let Some(register) = self.register(text) {
            return Ok(Operand::Source(Source::Register(register)));
        }
        if let Some(number) = special(text) {
            return Ok(Operand::Source(number));
        }
        if let Some(number) = constant(text).or_else(|| self.symbol(text)) {
            return Ok(Operand::Source(Source::Constant(number)));
        }
        Ok(Operand::Label(text.to_string()))
    }

    /// A variable's address, perhaps with an offset.
    fn symbol(&self, text: &str) -> Option<u64> {
        let (name, offset) = text.split_once('+').map_or((text, 0), |(name, it)| (name, constant(it).unwrap_or(0)));
        self.variables.get(name.trim()).map(|address| address.wrapping_add(offset))
    }

    fn address(&self, text: &str) -> Result<Operand, ParseError> {
        let (name, offset) = text.split_once('+').unwrap_or((text, "0"));
        let unknown = || self.syntax(format!("address [{text}]"));
        let offset = constant(offset.trim()).ok_or_else(unknown)? as i64;
        if let Some(base) = self.register(name.trim()) {
            return Ok(Operand::Address { base: Some(base), offset });
        }
        let start = self.symbol(name.trim()).or_else(|| constant(name.trim())).ok_or_else(unknown)?;
        Ok(Operand::Address { base: None, offset: (start as i64).wrapping_add(offset) })
    }
}

/// The line of the first file in what follows `.loc`: of inlined code the line that it was inlined at.
fn source_line(place: &str) -> Option<u32> {
    let numbers = |text: &str| {
        let mut words = text.split_whitespace().map(|word| word.trim_end_matches(',').parse::<u32>());
        Some((words.next()?.ok()?, words.next()?.ok()?))
    };
    let (file, line) = match place.split_once("inlined_at") {
        Some((inner, outer)) => match numbers(inner)? {
            found @ (1, _) => found,
            _ => numbers(outer)?,
        },
        None => numbers(place)?,
    };
    (file == 1).then_some(line)
}

fn is_label(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "$_%".contains(c))
}

/// Operands, which commas part outside of braces and brackets.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, character) in text.char_indices() {
        match character {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' | ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    let last = text[start..].trim();
    if !last.is_empty() {
        parts.push(last);
    }
    parts
}

/// A number as its bits: an integer, or the bits of a float after `0f` or `0d`.
fn constant(text: &str) -> Option<u64> {
    let (text, negative) = text.strip_prefix('-').map_or((text, false), |text| (text, true));
    let text = text.strip_suffix('U').unwrap_or(text);
    let prefix = |prefix: &str| text.strip_prefix(prefix);
    let number = if let Some(bits) = prefix("0f").or_else(|| prefix("0F")) {
        u64::from(u32::from_str_radix(bits, 16).ok()?)
    } else if let Some(bits) = prefix("0d").or_else(|| prefix("0D")).or_else(|| prefix("0x")) {
        u64::from_str_radix(bits, 16).ok()?
    } else {
        text.parse().ok()?
    };
    Some(if negative { number.wrapping_neg() } else { number })
}

fn special(text: &str) -> Option<Source> {
    let (name, dimension) = text.split_once('.').unwrap_or((text, "x"));
    let dimension = ["x", "y", "z"].iter().position(|it| *it == dimension)? as u8;
    let found = match name {
        "%tid" => Special::Thread(dimension),
        "%ntid" => Special::Threads(dimension),
        "%ctaid" => Special::Block(dimension),
        "%nctaid" => Special::Blocks(dimension),
        "%laneid" => Special::Lane,
        "%warpid" => Special::Warp,
        "%lanemask_lt" => Special::LanesBelow,
        "%lanemask_le" => Special::LanesUpTo,
        "%lanemask_eq" => Special::LaneAlone,
        "%lanemask_ge" => Special::LanesFrom,
        "%lanemask_gt" => Special::LanesAbove,
        "%clock" | "%clock64" | "%globaltimer" => Special::Clock,
        "%dynamic_smem_size" => Special::DynamicShared,
        "%total_smem_size" => Special::TotalShared,
        // One block a cluster.
        "%cluster_ctaid" | "%cluster_ctarank" => return Some(Source::Constant(0)),
        "%cluster_nctaid" | "%cluster_nctarank" => return Some(Source::Constant(1)),
        "WARP_SZ" => return Some(Source::Constant(32)),
        _ => return None,
    };
    Some(Source::Special(found))
}

/// `.param .align 4 .b8 name[56]`, `.global .align 4 .b32 name = 5` and the like.
struct Variable {
    name: String,
    bytes: usize,
    alignment: usize,
    data: Vec<u8>,
}

impl Variable {
    fn parse(text: &str) -> Option<Self> {
        let (declared, value) = text.split_once('=').unwrap_or((text, ""));
        let mut words = declared.split_whitespace();
        let (mut size, mut alignment, mut name) = (1usize, None, None);
        while let Some(word) = words.next() {
            match word {
                ".align" => alignment = words.next()?.parse().ok(),
                ".b8" | ".u8" | ".s8" => size = 1,
                ".b16" | ".u16" | ".s16" | ".f16" => size = 2,
                ".b32" | ".u32" | ".s32" | ".f32" => size = 4,
                ".b64" | ".u64" | ".s64" | ".f64" => size = 8,
                _ if word.starts_with('.') => {}
                _ => name = Some(word),
            }
        }
        let (name, count) = match name?.split_once('[') {
            Some((name, count)) => (name, count.trim_end_matches(']')),
            None => (name?, "1"),
        };
        let count: usize = if count.is_empty() { 0 } else { count.parse().ok()? };
        let numbers = value.split([',', '{', '}']).map(str::trim).filter(|it| !it.is_empty());
        let data = numbers.map(constant).collect::<Option<Vec<u64>>>()?;
        let data = data.iter().flat_map(|number| number.to_le_bytes().into_iter().take(size)).collect();
        Some(Self { name: name.to_string(), bytes: size * count, alignment: alignment.unwrap_or(size), data })
    }
}

/// The generic addresses of a space.
pub fn window(space: crate::program::Space) -> std::ops::Range<u64> {
    use crate::program::Space;
    match space {
        Space::Shared => SHARED_WINDOW..LOCAL_WINDOW,
        Space::Local => LOCAL_WINDOW..PARAMETER_WINDOW,
        Space::Parameter => PARAMETER_WINDOW..MODULE_WINDOW,
        Space::Global | Space::Generic => 0..SHARED_WINDOW,
        Space::Constant => MODULE_WINDOW..u64::MAX,
    }
}

/// Where in shared memory an address of a space lies, if it lies there.
pub fn shared_offset(space: crate::program::Space, address: u64) -> Option<u64> {
    use crate::program::Space;
    match space {
        Space::Shared => Some(address),
        Space::Generic if window(Space::Shared).contains(&address) => Some(address - SHARED_WINDOW),
        _ => None,
    }
}
