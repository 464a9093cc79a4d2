//! The pipes of a multiprocessor, and which of them an instruction takes: of PTX by its opcode, of machine code by its mnemonic.

use serde::{Deserialize, Serialize};

/// What executes an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pipe {
    /// Multiply-adds in f32, and packed ones of 16 bits.
    Fma,
    /// Integers but for products, logic, shifts, comparisons, choices.
    Alu,
    /// Products of integers, and what ptxas moves there.
    Imad,
    /// f64.
    Double,
    /// Roots, exponentials, reciprocals.
    Special,
    /// Conversions, and counts of bits.
    Conversion,
    /// Matrix units.
    Matrix,
    /// Loads, stores, atomics, shuffles.
    Memory,
    /// Jumps and barriers.
    Branch,
    /// What takes an issue slot alone: constants, special and uniform registers.
    Other,
}

impl Pipe {
    /// All, in the order of tables.
    pub const ALL: [Self; 10] = [
        Self::Fma,
        Self::Alu,
        Self::Imad,
        Self::Double,
        Self::Special,
        Self::Conversion,
        Self::Matrix,
        Self::Memory,
        Self::Branch,
        Self::Other,
    ];

    /// The pipe of a PTX instruction.
    pub fn of_ptx(opcode: &str) -> Self {
        let parts: Vec<&str> = opcode.split('.').collect();
        let has = |words: &[&str]| words.iter().any(|word| parts.contains(word));
        match parts[0] {
            "ld" if has(&["param"]) => Self::Other,
            "ld" | "st" | "atom" | "red" | "shfl" | "ldmatrix" | "stmatrix" | "cp" | "mbarrier" | "prefetch" => {
                Self::Memory
            }
            "wmma" if !has(&["mma"]) => Self::Memory,
            "wmma" | "mma" => Self::Matrix,
            "bra" | "brx" | "bar" | "barrier" | "ret" | "exit" | "trap" | "membar" | "fence" => Self::Branch,
            "cvta" | "mov" | "nanosleep" => Self::Other,
            "ex2" | "lg2" | "sin" | "cos" | "tanh" | "rcp" | "rsqrt" | "sqrt" => Self::Special,
            "cvt" if integer(parts[parts.len() - 1]) && parts.get(1).is_some_and(|to| integer(to)) => Self::Alu,
            "cvt" if has(&["bf16"]) && has(&["f32"]) && !has(&["rn"]) => Self::Alu,
            "cvt" | "popc" | "clz" | "bfind" | "brev" => Self::Conversion,
            _ if has(&["f64"]) => Self::Double,
            "fma" | "add" | "sub" | "mul" | "mad" | "div" if has(&["f32", "f16", "f16x2", "bf16", "bf16x2"]) => {
                Self::Fma
            }
            "mul" | "mad" | "mul24" | "mad24" | "div" | "rem" | "dp4a" => Self::Imad,
            _ => Self::Alu,
        }
    }

    /// The pipe of a machine instruction.
    pub fn of_sass(mnemonic: &str) -> Self {
        let name = mnemonic.split('.').next().unwrap_or(mnemonic);
        match name {
            "FFMA" | "FADD" | "FMUL" | "FFMA32I" | "FADD32I" | "FMUL32I" | "HFMA2" | "HADD2" | "HMUL2" | "HFMA" => {
                Self::Fma
            }
            "IMAD" | "IMUL" | "IDP" | "IMAD32I" => Self::Imad,
            "DFMA" | "DADD" | "DMUL" | "DSETP" => Self::Double,
            "MUFU" => Self::Special,
            "I2F" | "F2I" | "F2F" | "I2I" | "FRND" | "POPC" | "FLO" | "BREV" | "I2FP" | "F2IP" => Self::Conversion,
            "HMMA" | "IMMA" | "DMMA" | "QMMA" | "BMMA" => Self::Matrix,
            "SHFL" | "MEMBAR" | "CCTL" | "LDSM" | "STSM" | "MATCH" | "REDUX" | "LDGSTS" | "LDGDEPBAR" | "DEPBAR" => {
                Self::Memory
            }
            "BRA" | "BRX" | "BSSY" | "BSYNC" | "EXIT" | "BAR" | "WARPSYNC" | "CALL" | "RET" | "BREAK" | "JMP"
            | "BMOV" => Self::Branch,
            "NOP" | "S2R" | "CS2R" | "LDC" | "S2UR" | "R2UR" | "ERRBAR" | "YIELD" | "DEPBAR.LE" => Self::Other,
            _ if ["LD", "ST", "ATOM", "RED"].iter().any(|start| name.starts_with(start)) => Self::Memory,
            // UMOV, ULDC, UIADD3: once a warp, beside the lanes.
            _ if name.starts_with('U') => Self::Other,
            _ => Self::Alu,
        }
    }
}

fn integer(ty: &str) -> bool {
    ty.starts_with(['u', 's', 'b']) && ty.len() <= 3 && ty[1..].parse::<u8>().is_ok()
}

impl std::fmt::Display for Pipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fma => "FMA",
            Self::Alu => "ALU",
            Self::Imad => "IMAD",
            Self::Double => "f64",
            Self::Special => "special",
            Self::Conversion => "conversion",
            Self::Matrix => "matrix",
            Self::Memory => "memory",
            Self::Branch => "branch",
            Self::Other => "other",
        })
    }
}
