//! The parser: goes through the lines, keeps the names that are in scope, and takes statements and declarations apart.

use std::collections::HashMap;

use super::statement::{Operand, Parsed, Statement};
use super::text::{Variable, constant, is_name, source_line, special, split};
use crate::error::ParseError;
use crate::operand::{Predicate, Range, Register, Source};
use crate::windows::MODULE_WINDOW;

/// Registers of a bank. No kernel that NVRTC compiles comes near.
const MOST_REGISTERS: usize = 1 << 18;
/// Bytes of static shared memory: no device has more of any shared memory.
const MOST_SHARED: usize = 256 << 10;
/// Bytes of local memory of a thread.
const MOST_LOCAL: usize = 512 << 10;
/// Bytes of parameters.
const MOST_PARAMETERS: usize = 32764;
/// Bytes of a module's variables, far more than code brings with it.
const MOST_MODULE: usize = 64 << 20;
/// Where dynamic shared memory may lie: at a multiple of this.
const DYNAMIC_ALIGNMENT: usize = 128;

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
    /// What a pragma says of the bytes that the next statement uses.
    used: u32,
    /// The label before, until another statement comes.
    label: Option<String>,
    /// Dynamic shared memory is declared before the static one may be; its address is known at the end.
    /// With the line of each.
    dynamic: Vec<(usize, Variable)>,
}

/// Takes a kernel's text apart.
pub fn parse(text: &str) -> Result<Parsed, ParseError> {
    let mut parser = Parser {
        out: Parsed::default(),
        scopes: vec![HashMap::new()],
        variables: HashMap::new(),
        line: 0,
        at: 0,
        used: u32::MAX,
        label: None,
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
    let unfinished = pending.trim();
    if !unfinished.is_empty() || parser.scopes.len() > 1 {
        return Err(
            parser.syntax(format!("{} does not end", if unfinished.is_empty() { "a brace" } else { unfinished }))
        );
    }
    if parser.out.program.entry.is_empty() {
        return Err(parser.syntax("there is no kernel"));
    }
    Ok(parser.out)
}

impl Parser {
    fn syntax(&self, reason: impl Into<String>) -> ParseError {
        ParseError::Syntax { line: self.at, reason: reason.into() }
    }

    /// Takes a line that is a directive without a semicolon.
    fn takes_line(&mut self, line: &str) -> bool {
        if let Some(place) = line.strip_prefix(".loc").filter(|place| place.starts_with(char::is_whitespace)) {
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
                ':' if depth == 0 && is_name(pending.trim()) => {
                    self.labelled(pending.trim())?;
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

    fn labelled(&mut self, name: &str) -> Result<(), ParseError> {
        self.label = Some(name.to_string());
        match self.out.labels.insert(name.to_string(), self.out.statements.len()) {
            Some(_) => Err(self.syntax(format!("the label {name} is there twice"))),
            None => Ok(()),
        }
    }

    fn is_head(&self, pending: &str) -> bool {
        [".entry", ".func"].iter().any(|word| pending.contains(word))
    }

    /// A kernel's name and parameters.
    fn head(&mut self, head: &str) -> Result<(), ParseError> {
        if head.contains(".func") {
            return Err(self.syntax("functions besides the kernel are not known"));
        }
        if !self.out.program.entry.is_empty() {
            return Err(self.syntax("there is more than one kernel"));
        }
        let rest = head.split_once(".entry").map_or("", |it| it.1);
        let (name, rest) = rest.split_once('(').unwrap_or((rest.split_whitespace().next().unwrap_or_default(), ""));
        if !is_name(name.trim()) {
            return Err(self.syntax("a kernel without a name"));
        }
        self.out.program.entry = name.trim().to_string();
        let parameters = rest.split(')').next().unwrap_or_default();
        let mut end = 0usize;
        for parameter in parameters.split(',').map(str::trim).filter(|it| !it.is_empty()) {
            let wrong = || self.syntax(format!("parameter {parameter}"));
            let variable = Variable::parse(parameter).filter(|it| it.bytes > 0).ok_or_else(wrong)?;
            let offset = variable.place(&mut end, MOST_PARAMETERS).ok_or_else(wrong)?;
            self.out.program.parameters.push(Range { offset, size: variable.bytes });
            self.variables.insert(variable.name, offset as u64);
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
            let wrong = || self.syntax(format!("variable {line}"));
            let declared = line.strip_suffix(';').filter(|it| !it.contains(';')).ok_or_else(wrong)?;
            let variable = Variable::parse(declared).ok_or_else(wrong)?;
            self.variable(space, variable).ok_or_else(|| self.syntax(format!("variable {line}")))?;
        }
        self.dynamic_variables()
    }

    /// Dynamic shared memory lies behind what is static, where any element may lie.
    fn dynamic_variables(&mut self) -> Result<(), ParseError> {
        for (line, variable) in &self.dynamic {
            if variable.place(&mut self.out.program.static_shared, MOST_SHARED).is_none() {
                self.at = *line;
                return Err(self.syntax(format!("variable {}", variable.name)));
            }
        }
        let start = self.out.program.static_shared as u64;
        self.variables.extend(self.dynamic.drain(..).map(|(_, variable)| (variable.name, start)));
        Ok(())
    }

    /// None where there is no place for it.
    fn variable(&mut self, space: &str, variable: Variable) -> Option<()> {
        if space == ".shared" && variable.bytes == 0 {
            let alignment = variable.alignment.max(DYNAMIC_ALIGNMENT);
            self.dynamic.push((self.at, Variable { alignment, ..variable }));
            return Some(());
        }
        let address = match space {
            ".shared" => variable.place(&mut self.out.program.static_shared, MOST_SHARED)? as u64,
            ".local" => variable.place(&mut self.out.program.local, MOST_LOCAL)? as u64,
            _ => {
                let mut end = self.out.program.module.len();
                let offset = variable.place(&mut end, MOST_MODULE)?;
                self.out.program.module.resize(end, 0);
                self.out.program.module[offset..][..variable.data.len()].copy_from_slice(&variable.data);
                // A constant's address is its offset in the window of constants, a global one is generic.
                if space == ".global" { MODULE_WINDOW + offset as u64 } else { offset as u64 }
            }
        };
        self.variables.insert(variable.name, address);
        Some(())
    }

    fn statement(&mut self, text: &str) -> Result<(), ParseError> {
        if let Some(declared) = text.strip_prefix(".reg") {
            return self.registers(declared.trim());
        }
        if let Some(table) = text.strip_prefix(".branchtargets") {
            let name = self.label.take().ok_or_else(|| self.syntax("a table without a label"))?;
            self.out.tables.insert(name, table.split(',').map(|it| it.trim().to_string()).collect());
            return Ok(());
        }
        if let Some(mask) = text.strip_prefix(".pragma \"used_bytes_mask ") {
            let mask = mask.trim_end_matches('"').parse();
            self.used = mask.map_err(|_| self.syntax(format!("{text} has no mask")))?;
            return Ok(());
        }
        if text.starts_with('.') || text.is_empty() {
            // Pragmas, and variables, which are known.
            return Ok(());
        }
        if self.scopes.len() == 1 {
            return Err(self.syntax("an instruction outside of a kernel"));
        }
        self.label = None;
        let used = std::mem::replace(&mut self.used, u32::MAX);
        let (guard, text) = self.guard(text)?;
        let (opcode, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let operands = split(rest).into_iter().map(|operand| self.operand(operand)).collect::<Result<Vec<_>, _>>()?;
        let statement = Statement { guard, opcode: opcode.to_string(), operands, line: self.line, at: self.at, used };
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
        for name in names.split(',').map(str::trim) {
            self.family(ty, name).ok_or_else(|| self.syntax(format!("registers {ty} {name}")))?;
        }
        Ok(())
    }

    /// `%f<31>` or `p`. None where it is neither, and where there are too many.
    fn family(&mut self, ty: &str, name: &str) -> Option<()> {
        let banks = &mut self.out.program.registers;
        let (kind, end): (fn(u32) -> Register, &mut usize) = match ty {
            ".pred" => (Register::Predicate, &mut banks.predicates),
            ".b64" | ".u64" | ".s64" | ".f64" => (Register::Long, &mut banks.longs),
            ".b8" | ".u8" | ".s8" | ".b16" | ".u16" | ".s16" | ".f16" | ".b32" | ".u32" | ".s32" | ".f32"
            | ".f16x2" => (Register::Word, &mut banks.words),
            _ => return None,
        };
        let (name, count) = match name.split_once('<') {
            Some((name, count)) => (name, count.strip_suffix('>')?.parse().ok()?),
            None => (name, 1),
        };
        let family = Family { kind, first: *end as u32, count };
        *end = (*end).checked_add(count as usize).filter(|end| *end <= MOST_REGISTERS)?;
        self.scopes.last_mut()?.insert(Some(name).filter(|name| is_name(name))?.to_string(), family);
        Some(())
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
            return self.vector(inner);
        }
        if let Some(inner) = text.strip_prefix('[').and_then(|it| it.strip_suffix(']')) {
            return self.address(inner.trim());
        }
        if let Some((first, second)) = text.split_once('|') {
            let pair = (self.register(first.trim()), self.register(second.trim()));
            return match (pair, second.trim()) {
                ((Some(first), Some(Register::Predicate(second))), _) => Ok(Operand::Pair(first, second)),
                ((Some(first), None), "_") => Ok(Operand::Source(Source::Register(first))),
                ((None, Some(second @ Register::Predicate(_))), _) if first.trim() == "_" => {
                    Ok(Operand::Vector(vec![Operand::Nowhere, Operand::Source(Source::Register(second))]))
                }
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

    /// The elements of a vector, none of which is one itself.
    fn vector(&self, inner: &str) -> Result<Operand, ParseError> {
        let element = |it: &str| match it.starts_with(['{', '[']) {
            true => Err(self.syntax(format!("element {it}"))),
            false => self.operand(it),
        };
        split(inner).into_iter().map(element).collect::<Result<_, _>>().map(Operand::Vector)
    }

    /// A variable's address, perhaps with an offset.
    fn symbol(&self, text: &str) -> Option<u64> {
        let (name, offset) = text.split_once('+').unwrap_or((text, "0"));
        let offset = constant(offset.trim())?;
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
